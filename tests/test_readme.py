"""The README says what is: its tables are the derived ones, its commands work.

`python3 -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import metrics_markdown, routes_markdown, settings_markdown
from tests.fakes import ROOT, Process, ask, chat, run_llmq
from tests.test_client_matrix import clients_markdown

README = ROOT / "README.md"


def rows_markdown() -> str:
    """The keys of the tables that have rows, each with what it is for."""
    lines = ["| key | default | what |", "|---|---|---|"]
    for table, cls in llmq.ROW_TABLES.items():
        title = "[[rules]]" if table == "rules" else f"[{table}.NAME]"
        for row in llmq.known_settings({table: cls}):
            name = row.key.partition(".")[2]
            lines.append(f"| `{title}` `{name}` | {row.shown_default} | {row.help} |")
    return "\n".join(lines)


TABLES = {
    "settings": settings_markdown,
    "routes": routes_markdown,
    "clients": clients_markdown,
    "metrics": metrics_markdown,
    "rows": rows_markdown,
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
    known |= flags_of_commands()
    known |= {"--system-site-packages", "--pictures"}  # of Python's venv, and of the replay
    known |= {one for cell, _ in migration() for one in re.findall(r"--[a-z][a-z-]+", cell)}
    for path in ("install.sh", "tray/llmq_tray.py"):
        known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / path).read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.read_text(encoding="utf-8")))
    assert named <= known


def flags_of_commands() -> set[str]:
    """Those that no setting is behind."""
    command = llmq.build_parser().parse_args
    parsers = [llmq.build_parser(), *(command([name]).parser for name in ("serve", "top", "run"))]
    texts = [parser.format_help() for parser in [*parsers, command(["models"]).parser]]
    return {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}


# ---- The example file ------------------------------------------------------------------------


def between(name: str) -> str:
    """What stands between two marks of the README."""
    text = README.read_text(encoding="utf-8")
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


def example() -> str:
    return between("example").partition("```toml\n")[2].partition("```")[0]


def as_json(toml: str) -> dict[str, Any]:
    """The same as JSON, of the little of TOML that the example needs; any Python can read it."""
    document: dict[str, Any] = {}
    table = document
    for line in toml.splitlines():
        text = re.sub(r"\s+#.*$", "", line)
        if text.startswith("[["):
            document.setdefault(text.strip("[]"), []).append({})
            table = document[text.strip("[]")][-1]
        elif text.startswith("["):
            table = document
            for quoted, bare in re.findall(r'"([^"]+)"|([\w-]+)', text):
                table = table.setdefault(quoted or bare, {})
        elif text:
            key, _, value = text.partition(" = ")
            value = re.sub(r"\{ ([\w-]+) = (.*) \}", r'{"\1": \2}', value)
            table[key.strip('"')] = json.loads(value)
    return document


@pytest.fixture(params=["toml", "json"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The example as a user has saved it."""
    if request.param == "toml" and sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    path = tmp_path / f"llmq.{request.param}"
    toml = request.param == "toml"
    path.write_text(example() if toml else json.dumps(as_json(example())), encoding="utf-8")
    return path


def test_example_file_is_accepted(file: Path) -> None:
    checked = run_llmq("config", "check", "--config", str(file))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == "the configuration is good\n"


def test_example_file_is_the_same_in_both_forms() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    import tomllib

    assert tomllib.loads(example()) == as_json(example())


def test_example_file_shows_every_table_with_rows_and_explains_each_line() -> None:
    shown = as_json(example())
    assert set(llmq.OWN_TABLES) <= set(shown)
    assert len(shown["backends"]) == 3
    lines = [line for line in example().splitlines() if " = " in line and "#" not in line]
    plain = ("url = ", 'class = "', 'device = "', "slots = ")  # said once, or by their own name
    assert [line for line in lines if not line.startswith(plain)] == []


# ---- The way from ollamaMQ -------------------------------------------------------------------

OTHERS = set("false class action model backend load unload models llmq top q true".split())  # noqa: SIM905


def migration() -> list[tuple[str, str]]:
    """What ollamaMQ has, and what llmq has in its place."""
    rows = [line.strip("| ").split(" | ") for line in between("migration").splitlines()[2:]]
    return [(theirs, ours) for theirs, ours in rows]


# Of ollamaMQ 0.3: what its command line, its entry point, its file, its screen and HTTP have.
THEIRS = """
    -p --port -H --host -b -o --backend-urls --ollama-urls -t --timeout --no-tui --allow-all-routes
    --load-keep-alive -c --model-config -h -V --version
    OLLAMA_MQ_API_KEY RUST_LOG BACKEND_URLS OLLAMA_URLS PORT HOST TIMEOUT
    backends settings port host timeout load_keep_alive allow_all_routes settings.stuck_timeout
    models name identifier max_ctx keep_alive max_concurrent_requests blocked_items.json
    j k Tab h l a L U r p b x X u ? q Esc
    X-User-ID X-API-Key Authorization /admin/models /admin/models/load /unload /health
""".split()  # noqa: SIM905 - a list of 60 words is no easier to read


@pytest.mark.parametrize("name", THEIRS)
def test_whatever_ollamamq_has_is_in_the_table(name: str) -> None:
    told = [one for theirs, _ in migration() for one in re.findall(r"`([^`]+)`", theirs)]
    assert name in " ".join(told).split(), name


def test_what_the_table_names_of_llmq_exists() -> None:
    told = [one for _, ours in migration() for one in re.findall(r"`([^`]+)`", ours)]
    words = [word for one in told for word in re.split(r"[\s=]+", one)]
    rows = list(llmq.known_settings())
    settings = {row.flag: row for row in rows}
    variables = {row.variable for row in rows} | {row.env_alias for row in rows}
    variables |= {"LLMQ_BACKENDS", "OLLAMA_URL"}
    keys = {row.key.partition(".")[2] for row in rows}
    keys |= {row.key.partition(".")[2] for row in llmq.known_settings(llmq.ROW_TABLES)}
    tables = {f"[{name}]" for name in (*llmq.TABLES, "aliases")}
    tables |= {f"[{name}.NAME]" for name in llmq.ROW_TABLES} | {'[models."*"]'}
    for word in words:
        if word.startswith("--"):
            assert word in {*settings, *flags_of_commands()}, word
        elif word.isupper() and "_" in word:
            assert word in variables, word
        elif word.startswith("["):
            assert word in tables | {'["*"]'}, word
        elif word.startswith("/"):
            paths = {re.sub(r"\{.*", "NAME", route.path) for route in llmq.ROUTES}
            assert word in paths, word
        elif re.fullmatch(r"[a-z_]+", word):
            assert word in keys | OTHERS, word
    commands = {one.split()[1] for one in told if one.startswith("llmq ")}
    assert commands <= set(llmq.COMMANDS)


async def test_first_question_is_answered_as_shown():
    async with Process("--demo", "--port", "0") as p:
        body = chat("hello")
        del body["model"]
        answer = await ask(p.port, "POST", "/v1/chat/completions", json=body)
    assert answer.content == "hello"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
