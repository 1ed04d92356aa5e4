"""The README says what is: its tables are the derived ones, its commands work.

`python3 -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import re
import sys

import llmq
from tests.derived import metrics_markdown, routes_markdown, settings_markdown
from tests.fakes import ROOT, Process, ask, chat
from tests.test_client_matrix import clients_markdown

README = ROOT / "README.md"
TABLES = {
    "settings": settings_markdown,
    "routes": routes_markdown,
    "clients": clients_markdown,
    "metrics": metrics_markdown,
}


def filled(text: str) -> str:
    """The README with its tables as they are derived."""
    for name, derive in TABLES.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL)
        start, end = marks.search(text).span(1)[1], marks.search(text).span(2)[0]
        text = f"{text[:start]}{derive()}\n{text[end:]}"
    return text


def test_tables_are_the_derived_ones():
    text = README.read_text(encoding="utf-8")
    assert text == filled(text), "run python3 -m tests.test_readme"


def test_comparison_is_measured():
    text = README.read_text(encoding="utf-8")
    table = text.partition("<!-- comparison -->")[2].partition("<!-- /comparison -->")[0]
    assert "| dispatch gap" in table
    assert "llm-queue" in table


def test_every_flag_that_is_named_exists():
    known = {row.flag for row in llmq.known_settings()}
    known |= {"--backend", "--config", "--demo", "--json", "--help", "--version"}
    known |= {"--url", "--once", "--interval"}  # of `top`
    known |= {"--system-site-packages"}  # of Python's venv
    for path in ("install.sh", "tray/llmq_tray.py"):
        known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / path).read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.read_text(encoding="utf-8")))
    assert named <= known


def test_file_that_is_shown_is_a_good_one():
    if sys.version_info < (3, 11):
        return
    import tomllib

    text = README.read_text(encoding="utf-8")
    document = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    settings = llmq.merge_layers([llmq.file_layer("llmq.toml", document)])
    assert settings.backends["gpu"].slots == settings.devices["gpu-box"].slots == 8


async def test_first_question_is_answered_as_shown():
    async with Process("--demo", "--port", "0") as p:
        body = chat("hello")
        del body["model"]
        answer = await ask(p.port, "POST", "/v1/chat/completions", json=body)
    assert answer.content == "hello"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
