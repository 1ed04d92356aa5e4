"""The README's tables, and settings from dotted keys: what only tests need of the declarations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llmq


def build_settings(values: Mapping[str, Any]) -> llmq.Settings:
    """Settings from dotted keys, as in {"queue.slots": 2, "backends": ["http://127.0.0.1:1"]}."""
    return llmq.merge_layers([("settings", dict(values))])


def settings_markdown() -> str:
    lines = ["| flag | variable | default | what |", "|---|---|---|---|"]
    for row in llmq.known_settings():
        variables = f"`{row.variable}`" + (f", `{row.env_alias}`" if row.env_alias else "")
        lines.append(f"| `{row.flag}` | {variables} | {row.shown_default} | {row.help} |")
    return "\n".join(lines)


def metrics_markdown() -> str:
    lines = ["| metric | type | labels | what |", "|---|---|---|---|"]
    for one in llmq.METRICS:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        lines.append(f"| `{one.name}` | {one.type} | {labels} | {one.help} |")
    return "\n".join(lines)


def routes_markdown() -> str:
    """`right` is what a key must have for it; there is none where it needs no key."""
    lines = ["| route | for | right | what |", "|---|---|---|---|"]
    for route in llmq.ROUTES:
        path, right = (
            f"`{' '.join(route.methods)} {route.path}`",
            f"`{route.right}`" * bool(route.right),
        )
        lines.append(f"| {path} | {route.access.value} | {right} | {route.summary} |")
    return "\n".join(lines)


def row_title(table: str) -> str:
    """A table with rows as the file has it."""
    odd = {"rules": "[[rules]]", "ports": "[ports.NUMBER]"}
    return odd.get(table, f"[{table}.NAME]")


def rows_markdown() -> str:
    """The keys of the tables that have rows, each with what it is for."""
    lines = ["| key | default | what |", "|---|---|---|"]
    for table, cls in llmq.ROW_TABLES.items():
        for row in llmq.known_settings({table: cls}):
            name = row.key.partition(".")[2]
            lines.append(f"| `{row_title(table)}` `{name}` | {row.shown_default} | {row.help} |")
    return "\n".join(lines)
