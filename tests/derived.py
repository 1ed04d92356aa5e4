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
    lines = ["| route | for | what |", "|---|---|---|"]
    lines += [
        f"| `{' '.join(route.methods)} {route.path}` | {route.access.value} | {route.summary} |"
        for route in llmq.ROUTES
    ]
    return "\n".join(lines)
