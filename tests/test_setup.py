"""`llmq config init`: what it finds, what it asks, and the file that it writes, or does not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from tests.fakes import (
    LLMQ,
    FakeBackend,
    Process,
    ask,
    chat,
    clean_environment,
    eventually,
    require,
    run_llmq,
    running,
)
from tests.smoke import find_pythons

NOBODY = "http://127.0.0.1:9"  # where no runner listens
GIB = 1 << 30
NAME = "llmq.toml" if sys.version_info >= (3, 11) else "llmq.json"
TASKS = [
    "triage", "simple_chat", "summarize", "code_generate", "code_review", "code_fix",
    "agentic_reasoning", "large_context", "tool_use", "unknown",
]  # fmt: skip
CARD = "NVIDIA GeForce RTX 4090, 24564, 512, 3"  # as nvidia-smi tells of it
USUAL = {"qwen3:4b": 2.5, "qwen2.5-coder:7b": 4.7, "gpt-oss:20b": 13.8}  # models and their GiB
SLEEP = shutil.which("sleep")
QUIET = ("config", "init", "--non-interactive")


# ---- A box to set up ---------------------------------------------------------------------------


def nobody_else(monkeypatch: pytest.MonkeyPatch, ollama: str = NOBODY) -> None:
    """Nothing of the machine that runs the tests is found, but for an Ollama at this URL."""
    at_home = llmq.KINDS["ollama"]._replace(url=ollama)
    monkeypatch.setattr(llmq, "RUNNERS", (at_home,))
    monkeypatch.setitem(llmq.KINDS, "ollama", at_home)
    monkeypatch.setattr(llmq, "read_amd", list)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder, on a box without runners and cards."""
    nobody_else(monkeypatch)
    for name in [name for name in os.environ if name.startswith(("LLMQ_", "OLLAMA"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def usual_file(home: Path) -> Path:
    return home / ".config/llmq" / NAME


def files_of(folder: Path) -> list[str]:
    """Every file below, a draft that was left among them."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def ollama(models: dict[str, float], port: int = 0) -> FakeBackend:
    """An Ollama that has these models, of so many GiB."""
    fake = FakeBackend(list(models), kind="ollama", port=port)
    rows = [{"name": name, "model": name, "size": int(size * GIB)} for name, size in models.items()]
    fake.probe_answers["/api/tags"] = 200, {"models": rows}
    return fake


def report(models: dict[str, float], kind: str = "ollama") -> Any:
    names = tuple(models)
    tags = tuple({"name": name, "size": int(size * GIB)} for name, size in models.items())
    return llmq.Report(kind, tuple({"id": name} for name in names), names, (), 0.0, tags)


def box(models: dict[str, float], gib: float = 0, maker: str = "nvidia") -> Any:
    """What would be found where an Ollama has these models, beside a card of so many GiB."""
    cards = (llmq.Card("card", int(gib * 1024)),) if gib else ()
    return llmq.Found((("ollama", NOBODY, report(models)),), maker if gib else "none", cards)


def find(monkeypatch: pytest.MonkeyPatch, found: Any, then: Callable[[], object] = int) -> None:
    """Let the look around find just this; and do something then."""

    async def survey(_environ: object) -> Any:
        then()
        return found

    monkeypatch.setattr(llmq, "survey", survey)


def made(*arguments: str, place: str = "made.json") -> Any:
    """The configuration that is written, in the form that every Python reads."""
    assert llmq.main([*QUIET, "--output", place, *arguments]) == 0
    return json.loads(Path(place).read_text(encoding="utf-8"))


def answers(document: Any) -> str:
    """A file of answers."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    Path("answers.json").write_bytes(text)
    return "answers.json"


def tool(folder: Path, *lines: str, name: str = "nvidia-smi") -> None:
    """A program of this name on the PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)


# ---- What a model is for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "role"),
    [
        ("llama3.2:3b", 2.0, "fast"),
        ("qwen3:8b", 5.2, "fast"),
        ("gemma3:12b", 8.1, "fast"),
        ("qwen2.5-coder:7b", 4.7, "code"),
        ("codellama", 3.8, "code"),
        ("codestral:22b", 11.9, "code"),
        ("deepseek-coder:6.7b", 3.8, "code"),
        ("Devstral-Small", 0.0, "code"),
        ("code-reviewer:7b", 4.0, "review"),
        ("deepseek-r1:7b", 4.7, "heavy"),
        ("qwq", 0.0, "heavy"),
        ("gpt-oss:120b-cloud", 0.0, "heavy"),
        ("hermes3:8b", 4.7, "tool"),
        ("functionary-small", 4.0, "tool"),
        ("llava:7b", 4.7, "vision"),
        ("qwen2.5vl:7b", 6.0, "vision"),
        ("llama3.2-vision:11b", 7.8, "vision"),
        ("mixtral:8x7b", 26.0, "heavy"),
        ("qwen3-coder:30b", 18.6, "heavy"),
    ],
)
def test_role_of_a_model_is_told_by_its_name_and_size(name: str, size: float, role: str) -> None:
    assert llmq.role_of(name, size) == role


def test_every_type_of_task_has_every_model_that_makes_texts() -> None:
    seeded, names = random.Random(14), list(USUAL)
    names += ["hermes3:8b", "llava:7b", "code-reviewer", "deepseek-r1:7b"]
    for _ in range(50):
        some = seeded.sample(names, seeded.randint(1, len(names)))
        document = llmq.propose(box({name: seeded.uniform(0, 20) for name in some}))
        assert sorted(document["models"]) == sorted(some)
        assert sorted(document["routes"]) == sorted(TASKS)
        assert all(sorted(row) == sorted(some) for row in document["routes"].values())


def test_row_of_a_type_begins_with_the_model_that_is_for_it() -> None:
    others = {"hermes3:8b": 4.7, "llava:7b": 4.6, "code-reviewer:7b": 4.1, "llama3.2:1b": 1.3}
    document = llmq.propose(box({**USUAL, **others}))
    best = {task: row[0] for task, row in document["routes"].items()}
    assert best["code_generate"] == best["code_fix"] == "qwen2.5-coder:7b"
    assert best["code_review"] == "code-reviewer:7b"
    assert best["tool_use"] == "hermes3:8b"
    assert best["agentic_reasoning"] == best["large_context"] == "gpt-oss:20b"
    light = ("triage", "simple_chat", "summarize", "unknown")
    assert {best[task] for task in light} == {"llama3.2:1b"}, "the smallest of the fast ones"
    assert {row[-1] for row in document["routes"].values()} == {"llava:7b"}
    told = document["models"]["qwen2.5-coder:7b"]
    assert told["size_gb"] == 4.7
    assert "code_generate" in told["purpose"]


def test_models_that_embed_are_in_no_row() -> None:
    embed = {
        "nomic-embed-text": 0.3,
        "bge-m3": 1.2,
        "all-minilm": 0.1,
        "bge-reranker-v2": 1.1,
        "text-embedding-3": 0.0,
    }
    assert "models" not in llmq.propose(box(embed))
    assert "routes" not in llmq.propose(box(embed))
    document = llmq.propose(box({**embed, "qwen3:4b": 2.5}))
    assert list(document["models"]) == ["qwen3:4b"]
    assert all(row == ["qwen3:4b"] for row in document["routes"].values())


def test_without_runners_llmq_is_left_to_look_for_them_by_itself() -> None:
    document = llmq.propose(llmq.Found())
    assert not {"backends", "models", "routes", "router"} & set(document)


@pytest.mark.parametrize(
    ("maker", "gib", "models", "wanted"),
    [
        ("nvidia", 24, USUAL, True),
        ("nvidia", 24, {"llama3.3:70b": 42.5}, False),
        ("nvidia", 24, {**USUAL, "llama3.3:70b": 42.5}, False),
        ("nvidia", 8, {"a": 6.4}, True),
        ("nvidia", 8, {"a": 6.6}, False),  # 1.5 GiB are to stay free
        ("amd", 24, USUAL, False),
        ("apple", 48, USUAL, False),
    ],
)
def test_require_gpu_is_proposed_for_nvidia_where_every_model_fits(
    maker: str, gib: float, models: dict[str, float], wanted: bool
) -> None:
    document = llmq.propose(box(models, gib, maker))
    assert document["router"]["require_gpu"] is wanted
    assert 1 <= document["devices"]["local"]["vram_reserve_gb"] <= 2


def test_without_a_card_nothing_is_said_of_graphics_memory() -> None:
    document = llmq.propose(box(USUAL))
    assert "router" not in document
    assert document["devices"] == {"local": {"slots": 1}}


def test_every_runner_that_was_found_is_in_the_file_also_two_of_a_kind() -> None:
    urls = ["http://127.0.0.1:11434", "http://box:11434"]
    document = llmq.propose(llmq.Found(tuple(("ollama", url, report(USUAL)) for url in urls)))
    assert [row["url"] for row in document["backends"].values()] == urls


@pytest.mark.parametrize(
    "name",
    ["models/My Model (q4).gguf", "模型:7b", 'a"b\\c\n[x]', "m" * 200, "\x1b]0;x\x07"],
    ids=["spaces", "not ASCII", "quotes and lines", "long", "control characters"],
)
def test_model_of_any_name_is_left_out_or_written_but_stops_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find(monkeypatch, box({"qwen3:4b": 2.5, name: 3.0}))
    document = made()
    assert "qwen3:4b" in document["models"]
    assert "qwen3:4b" in document["routes"]["triage"]
    assert llmq.main(["config", "check", "--config", "made.json"]) == 0
    assert files_of(home) == ["made.json"]


# ---- What is found -----------------------------------------------------------------------------


async def runners(environ: dict[str, str]) -> list[tuple[str, str]]:
    return [(kind, url) for kind, url, _ in (await llmq.survey(environ)).runners]


@pytest.mark.parametrize(
    "spelling",
    [
        "127.0.0.1:PORT",
        "http://127.0.0.1:PORT",
        "http://127.0.0.1:PORT/",
        "  127.0.0.1:PORT ",
        "0.0.0.0:PORT",
        "http://0.0.0.0:PORT",
        ":PORT",
        '"127.0.0.1:PORT"',
    ],
)
@pytest.mark.usefixtures("home")
async def test_ollama_is_found_where_its_variable_says(
    monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    nobody_else(monkeypatch)
    async with ollama(USUAL) as fake:
        found = await llmq.survey({"OLLAMA_HOST": spelling.replace("PORT", str(fake.port))})
    assert [(kind, url) for kind, url, _ in found.runners] == [("ollama", fake.url)]
    assert found.models == USUAL
    assert f"Ollama at {fake.url}, 3 models" in str(found)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "127.0.0.1", "[::]", "::", "-", "http://", "a b:1", "x:99999999"]
)
@pytest.mark.usefixtures("home")
async def test_ollama_at_its_usual_port_is_found_whatever_its_variable_says(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    async with ollama(USUAL) as fake:
        nobody_else(monkeypatch, fake.url)
        assert await runners({"OLLAMA_HOST": host}) == [("ollama", fake.url)]


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("box", "http://box:11434"),
        ("box:1234", "http://box:1234"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:11434", "http://127.0.0.1:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("http://box", "http://box:80"),
        ("https://box", "https://box:443"),
        ("https://box:8443/", "https://box:8443"),
    ],
)
def test_variable_is_read_as_ollama_itself_reads_it(host: str, place: str) -> None:
    read = llmq.place_of_ollama(host)
    usual = {"http": ":80", "https": ":443"}[place.partition(":")[0]]
    assert read in (place, place[: -len(usual)] if place.endswith(usual) else place)


@pytest.mark.usefixtures("home")
async def test_one_ollama_under_two_names_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ollama(USUAL) as fake:
        nobody_else(monkeypatch, fake.url)
        assert len(await runners({"OLLAMA_HOST": f"localhost:{fake.port}"})) == 1


@pytest.mark.usefixtures("home")
async def test_llmq_that_answers_there_is_no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ollama(USUAL) as fake, running(fake.url) as q:
        nobody_else(monkeypatch, q.base)
        assert await runners({}) == []
        assert await runners({"OLLAMA_HOST": f"127.0.0.1:{q.port}"}) == []
        assert await runners({"OLLAMA_HOST": fake.url}) == [("ollama", fake.url)]


@pytest.mark.usefixtures("home")
async def test_runner_that_hangs_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "LOOK_SECONDS", 0.5)
    async with ollama(USUAL) as hanging, ollama(USUAL) as fake:
        nobody_else(monkeypatch, fake.url)
        hanging.hold_probes()
        assert await runners({"OLLAMA_HOST": hanging.url}) == [("ollama", fake.url)]
        assert hanging.probes
        await eventually(lambda: not hanging.open and not fake.open)


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\xff\xfe", b"<html>", b"[]", b"7", b"{}", b'{"data": 7}', b"[" * 5000, b'{"a": NaN}'],
    ids=lambda body: ascii(body[:12]),
)
@pytest.mark.usefixtures("home")
async def test_what_answers_garbage_is_no_runner_and_no_trouble(
    monkeypatch: pytest.MonkeyPatch, garbage: bytes
) -> None:
    async with ollama(USUAL) as fake:
        nobody_else(monkeypatch, fake.url)
        fake.probe_answers = {"/v1/models": (200, garbage), "/api/tags": (200, garbage)}
        assert (await llmq.survey({})).models == {}
        fake.probe_answers = {"/api/version": (200, garbage)}
        assert await runners({}) == []
        fake.probe_answers = {"/api/tags": (200, garbage)}  # its models are known, not their sizes
        assert (await llmq.survey({})).models == dict.fromkeys(USUAL, 0)


async def test_cards_and_their_memory_are_found(home: Path) -> None:
    tool(home, f'echo "{CARD}"')
    found = await llmq.survey({})
    assert (found.maker, found.video_memory) == ("nvidia", pytest.approx(24, abs=0.1))
    assert "graphics: NVIDIA GeForce RTX 4090 (nvidia), 24.0 GiB" in str(found)
    tool(home, f'echo "{CARD}"', f'echo "{CARD}"')
    assert (await llmq.survey({})).video_memory == pytest.approx(48, abs=0.1)


@pytest.mark.parametrize(
    "lines",
    [
        ["echo No devices were found", "exit 6"],
        ["echo NVIDIA-SMI has failed because it could not communicate with the driver", "exit 9"],
        ["echo what is this"],
        ["echo 'NVIDIA GB10, [N/A], [N/A], 0'"],
        ["kill -9 $$"],
        [],
    ],
    ids=["no card", "no driver", "other words", "memory is not told", "killed", "silent"],
)
async def test_tool_without_a_card_is_a_box_without_one(home: Path, lines: list[str]) -> None:
    tool(home, *lines)
    found = await llmq.survey({})
    assert found.cards == ()
    assert "graphics: no card that tells its memory" in str(found)
    assert "router" not in llmq.propose(found)


@pytest.mark.usefixtures("home")
async def test_cores_and_memory_of_the_box_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 12 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    assert "this box: 6 cores, 12 GiB of memory" in str(await llmq.survey({}))


async def test_ollama_that_is_installed_and_does_not_run_is_told(home: Path) -> None:
    assert "none answers" in str(await llmq.survey({}))
    tool(home, name="ollama")
    assert "Ollama is installed, but does not answer" in str(await llmq.survey({}))


# ---- The file ----------------------------------------------------------------------------------

PIECES = [
    'say "hi"', "back\\slash", "\\u0041", "a\nb", "a\r\nb", "\t", "\x00", "\x1f", "\x7f", "\x85",
    "\u2028", "😀", "名前", "é", "'", "'''", '"""', "#", "# no comment", "[x]", "a = 1", "{", "}",
    "a b", "a.b", "a:b", "claude-*", "", "true", "1", "-", "_", "${NAME}", "\ufeff",
]  # fmt: skip


def random_text(seeded: random.Random) -> str:
    return "".join(seeded.choices(PIECES, k=seeded.randint(0, 3)))


def random_value(seeded: random.Random, depth: int) -> Any:
    leaves: list[Callable[[], Any]] = [
        lambda: random_text(seeded),
        lambda: seeded.randint(-(2**63), 2**63 - 1),
        lambda: seeded.choice([0.0, -0.0, 0.1, 1e300, 5e-324, 1e16, 1e22, -2.5, 1e-7]),
        lambda: seeded.random() < 0.5,
    ]
    if depth:
        leaves += [
            lambda: random_table(seeded, depth - 1),
            lambda: [random_value(seeded, depth - 1) for _ in range(seeded.randint(0, 3))],
        ]
    return seeded.choice(leaves)()


def random_table(seeded: random.Random, depth: int, least: int = 0) -> dict[str, Any]:
    names: set[str] = set()
    while len(names) < least:
        names |= {random_text(seeded) for _ in range(seeded.randint(least, 4))}
    return {name: random_value(seeded, depth) for name in sorted(names)}


def toml_reader() -> Callable[[str], Any]:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    import tomllib

    return tomllib.loads


def same(one: Any, other: Any) -> bool:
    """Equal, and 1, 1.0 and true are not the same."""
    texts = [json.dumps(value, sort_keys=True) for value in (one, other)]
    return texts[0] == texts[1]


@pytest.mark.untraced
def test_any_document_is_read_back_from_toml_as_it_was() -> None:
    loads = toml_reader()
    seeded = random.Random(1414)
    for _ in range(300):
        document = {
            "server": random_table(seeded, 3),
            "aliases": random_table(seeded, 0),
            "models": {random_text(seeded): random_table(seeded, 2) for _ in range(3)},
            "backends": {"box": {"url": random_text(seeded), **random_table(seeded, 1)}},
            "rules": [random_table(seeded, 1) for _ in range(1, 3)],
        }
        text = llmq.render_toml(document)
        assert same(loads(text), document), text


def test_every_setting_is_commented_in_one_line_of_its_own() -> None:
    loads = toml_reader()
    document: dict[str, Any] = {}
    count = 0
    for table, cls in {**llmq.TABLES, **llmq.ROW_TABLES}.items():
        rows = {row.key.partition(".")[2]: "x" for row in llmq.known_settings({table: cls})}
        ordinary = table in llmq.TABLES
        document[table] = rows if ordinary else [rows] if table == "rules" else {"row one": rows}
        count += len(rows)
    text = llmq.render_toml(document)
    assert loads(text) == document
    commented = [line for line in text.splitlines() if re.search(r'^\w+ = "x"  # \S', line)]
    assert len(commented) == count


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.deadline(60)
def test_every_python_accepts_and_understands_what_it_wrote(tmp_path: Path) -> None:
    odd = {text: f"{text}!" for text in PIECES if text and "$" not in text}
    document = {
        "models": {"mode": "manual", "items": [{"name": "q:8b", "role": "code", "sizeGb": 5.5}]},
        "aliases": odd,
        "rules": [{"header": 'X-Task: "a" # b', "class": "low"}],
        "server": {"port": 12001},
    }
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import llmq\n"
        "llmq.RUNNERS, llmq.read_amd = (), list\n"
        "llmq.KINDS['ollama'] = llmq.KINDS['ollama']._replace(url='http://127.0.0.1:9')\n"
        "init = ['config', 'init', '--non-interactive', '--answers', sys.argv.pop(1)]\n"
        "told = [llmq.main(init), llmq.main(['config', 'check'])]\n"
        "print(told, os.listdir(os.path.expanduser('~/.config/llmq')))\n"
        "sys.exit(llmq.main(['config', 'show', '--json']))\n"
    )
    pythons = {name: path for name, path in find_pythons().items() if int(name[2:]) >= 9}
    assert pythons
    for version, found in pythons.items():
        real = subprocess.check_output([found, "-c", "import sys; print(sys.executable)"])
        python = real.decode().strip()
        with tempfile.TemporaryDirectory(prefix="llmq-test-") as folder:
            done = subprocess.run(
                [python, "-W", "error", "-c", code, str(LLMQ.parent), str(path)],
                capture_output=True, text=True, timeout=50, check=False, cwd=folder,
                env={**clean_environment(folder), "PATH": folder},
            )  # fmt: skip
        name = "llmq.toml" if int(version[2:]) >= 11 else "llmq.json"
        said, shown = done.stdout.partition("{")[::2]
        assert done.returncode == 0, (version, done.stdout, done.stderr)
        assert f"[0, 0] ['{name}']" in said, (version, said, done.stderr)
        settings = json.loads("{" + shown)
        assert settings["aliases"] == odd, version
        assert settings["models"]["q:8b"]["size_gb"] == 5.5
        assert settings["rules"][0]["header"] == 'X-Task: "a" # b'
        assert settings["server"]["port"] == 12001


# ---- Where it is written -----------------------------------------------------------------------


def test_file_is_for_its_owner_alone_and_says_where_it_is(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0)
    try:
        assert llmq.main(QUIET) == 0
    finally:
        os.umask(before)
    path = usual_file(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert files_of(home) == [str(path.relative_to(home))]
    assert capsys.readouterr().out == f"wrote {path}; `llmq` uses it from now on\n"
    assert llmq.main(["config", "check"]) == 0


def test_file_of_any_name_is_json_only_where_it_is_called_so(home: Path) -> None:
    for place in ("a.json", "new/folder/b.json", str(home / "c.json"), "~/d.json"):
        assert made(place=place)["server"]["port"] == 11500 if place[0] != "~" else True
        assert llmq.main([*QUIET, "-o", place, "--overwrite"]) == 0
    assert llmq.main([*QUIET, "--output=new/e.toml"]) == 0
    assert (home / "new/e.toml").read_text(encoding="utf-8").startswith("# llmq's configuration")
    names = ["a.json", "c.json", "d.json", "new/e.toml", "new/folder/b.json"]
    assert files_of(home) == names


@pytest.mark.parametrize("how", ["below a file", "is a folder", "where nobody may write"])
def test_place_that_cannot_be_written_is_told_and_nothing_is_left(
    home: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    (home / "file").write_text("whole", encoding="utf-8")
    (home / "folder").mkdir()
    place = {"below a file": "file/llmq.json", "is a folder": "folder"}.get(how, "/proc/x/l.json")
    assert llmq.main([*QUIET, "--overwrite", "--output", place]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"llmq: {place}: ")
    assert files_of(home) == ["file"]
    assert (home / "file").read_text(encoding="utf-8") == "whole"


def test_file_that_is_there_is_overwritten_only_when_that_is_said(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = usual_file(home)
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    for more in ([], ["--answers", answers({})]):
        assert llmq.main([*QUIET, *more]) == 2
        said = capsys.readouterr().err
        assert f"{path} is there already" in said
        assert "--overwrite" in said
        assert "--output" in said
    assert path.read_text(encoding="utf-8") == "mine"
    path.chmod(0o644)
    assert llmq.main([*QUIET, "--overwrite"]) == 0
    assert "port" in path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_file_that_appears_while_it_looks_around_stays_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        Path("made.json").write_text("mine", encoding="utf-8")

    find(monkeypatch, llmq.Found(), write)
    assert llmq.main([*QUIET, "--output", "made.json"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path("made.json").read_text(encoding="utf-8") == "mine"
    assert files_of(home) == ["made.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_file_whole_and_no_draft(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    Path("made.json").write_text("mine", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    assert llmq.main([*QUIET, "--output", "made.json", "--overwrite"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert Path("made.json").read_text(encoding="utf-8") == "mine"
    assert files_of(home) == ["made.json"]


@pytest.mark.parametrize("place", ["made.json", "made.toml"])
def test_dry_run_prints_the_file_alone_and_writes_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    assert llmq.main([*QUIET, "--output", place]) == 0
    written = Path(place).read_text(encoding="utf-8")
    capsys.readouterr()
    assert llmq.main([*QUIET, "--output", place, "--dry-run"]) == 0, "it is no overwriting"
    printed = capsys.readouterr()
    assert printed.out == written
    assert "this box: " in printed.err
    assert llmq.main([*QUIET, "--output", "other.json", "--dry-run"]) == 0
    assert files_of(home) == [place]


@pytest.mark.usefixtures("home")
def test_words_of_other_queues_mean_the_same() -> None:
    document = made()
    for word in ("init", "configure"):
        words = ["--wizard", "--detect", "--non-interactive", "-o", "again.json", "--overwrite"]
        assert llmq.main([word, *words]) == 0
        assert json.loads(Path("again.json").read_text(encoding="utf-8")) == document


def test_it_is_said_to_be_used_only_where_it_will_be(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variable goes before every usual place, TOML before JSON."""
    llmq.main([*QUIET, "--output", "made.json"])
    assert "from now on" not in capsys.readouterr().out
    llmq.main([*QUIET, "--output", "~/.config/llmq/llmq.toml"])
    assert "from now on" in capsys.readouterr().out
    llmq.main([*QUIET, "--output", "~/.config/llmq/llmq.json"])
    assert "from now on" not in capsys.readouterr().out
    monkeypatch.setenv("LLMQ_CONFIG", str(home / "made.json"))
    llmq.main([*QUIET, "--overwrite"])  # writes where it says
    assert f"wrote {home / 'made.json'}; `llmq` uses it from now on" in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_setting_on_the_command_line_is_written_or_refused() -> None:
    place = "made.json"
    try:
        code = llmq.main([*QUIET, "--output", place, "--port", "12345"])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 2 or json.loads(Path(place).read_text(encoding="utf-8"))["server"] == {
        "port": 12345
    }


def test_without_a_terminal_it_says_what_to_add() -> None:
    done = run_llmq("config", "init")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no terminal" in done.stderr
    assert "--non-interactive" in done.stderr


# ---- Answers in a file -------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_answers_go_over_what_was_found_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, box(USUAL, 24))
    monkeypatch.setenv("BOX_KEY", "sk-of-the-box")
    told = {
        "server": {"port": 12000, "max_body": "8MiB"},
        "backends": {"box": {"url": "http://box:8000", "key": "${BOX_KEY}"}},
        "devices": {"local": {"slots": 3}, "box": {"slots": 8}},
        "models": {"qwen3:4b": {"max_concurrent": 2}, "*": {"class": "low"}},
        "routes": {"triage": ["gpt-oss:20b"]},
        "router": {"require_gpu": False},
        "aliases": {"claude-*": "gpt-oss:20b"},
        "rules": [{"route": "/v1/embeddings", "class": "low"}, {"model": "*", "class": "normal"}],
    }
    document = made("--answers", answers(told))
    assert document["server"] == {"port": 12000, "max_body": "8MiB"}
    assert sorted(document["backends"]) == ["box", "ollama"]
    assert document["backends"]["box"]["key"] == "${BOX_KEY}", "a secret stays where it is"
    assert document["devices"]["local"] == {"slots": 3, "vram_reserve_gb": 1.5}
    assert document["devices"]["box"] == {"slots": 8}
    assert document["models"]["qwen3:4b"]["size_gb"] == 2.5
    assert document["models"]["qwen3:4b"]["max_concurrent"] == 2
    assert document["models"]["*"] == {"class": "low"}
    assert document["routes"]["triage"] == ["gpt-oss:20b"]
    assert len(document["routes"]["unknown"]) == 3
    assert document["router"] == {"require_gpu": False}
    assert document["aliases"] == told["aliases"]
    assert document["rules"] == told["rules"]
    assert llmq.main(["config", "check", "--config", "made.json"]) == 0


@pytest.mark.usefixtures("home")
def test_answers_alone_ask_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    told = answers({"server": {"port": 12002}})
    assert llmq.main(["config", "init", "--answers", told, "--dry-run"]) == 0
    assert "12002" in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_answers_may_be_toml_where_python_reads_it() -> None:
    toml_reader()
    Path("a.toml").write_text('[aliases]\n"x y" = "m"\n[[rules]]\nclass = "low"\n', "utf-8")
    document = made("--answers", "a.toml")
    assert document["aliases"] == {"x y": "m"}
    assert document["rules"] == [{"class": "low"}]


def items(*rows: Any, **more: Any) -> dict[str, Any]:
    """Answers as agent-router has them."""
    return {"models": {"mode": "manual", "items": list(rows)}, **more}


@pytest.mark.usefixtures("home")
def test_models_as_agent_router_names_them_take_the_place_of_those_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find(monkeypatch, box({"found:8b": 5.0}))
    roles = ("fast", "code", "review", "heavy", "tool", "vision")
    rows = [
        {"name": f"{role}:7b", "role": role, "sizeGb": 4 + size} for size, role in enumerate(roles)
    ]
    document = made("--answers", answers(items(*rows, server={"port": 12003})))
    assert document["server"]["port"] == 12003
    assert sorted(document["models"]) == sorted(f"{role}:7b" for role in roles)
    assert document["models"]["review:7b"]["size_gb"] == 6
    for task, role in {
        "triage": "fast",
        "simple_chat": "fast",
        "code_generate": "code",
        "code_fix": "code",
        "code_review": "review",
        "agentic_reasoning": "heavy",
        "tool_use": "tool",
    }.items():
        assert document["routes"][task][0] == f"{role}:7b"
        assert task in document["models"][f"{role}:7b"]["purpose"]
    assert llmq.main(["config", "check", "--config", "made.json"]) == 0


@pytest.mark.usefixtures("home")
def test_model_without_role_or_size_is_told_by_its_name() -> None:
    document = made("--answers", answers(items({"name": "qwen2.5-coder:7b"}, {"name": "tiny"})))
    assert document["routes"]["code_fix"] == ["qwen2.5-coder:7b", "tiny"]
    assert document["routes"]["triage"] == ["tiny", "qwen2.5-coder:7b"]
    assert "size_gb" not in document["models"]["tiny"]


@pytest.mark.usefixtures("home")
def test_list_without_models_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, box(USUAL))
    document = made("--answers", answers(items()))
    assert not {"models", "routes"} & set(document)


BROKEN: dict[str, Any] = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a list": [],
    "a number": 5,
    "unknown table": {"nonsense": {"a": 1}},
    "unknown table, no table": {"nonsense": 1},
    "unknown key": {"server": {"prot": 1}},
    "bad value": {"server": {"port": "x"}},
    "a null": {"server": {"host": None}},
    "no number": b'{"upstream": {"idle_timeout": NaN}}',
    "table is a number": {"server": 5},
    "table is a list": {"backends": ["http://box:1"]},
    "row is a text": {"backends": {"box": "http://box:1"}},
    "bad url": {"backends": {"box": {"url": "ftp://box"}}},
    "rules are a number": {"rules": 5},
    "rules are a table": {"rules": {"class": "low"}},
    "rule is a number": {"rules": [5]},
    "routes are a list": {"routes": ["m"]},
    "route is a number": {"routes": {"triage": 5}},
    "alias is a number": {"aliases": {"a": 5}},
    "half a character": b'{"aliases": {"a": "\\ud800"}}',
    "variable that is not set": {"backends": {"box": {"url": "http://b:1", "key": "${NOT_SET}"}}},
    "file that is not there": {"keys": {"me": {"key_file": "/not/there"}}},
    "no name": items({"role": "fast"}),
    "empty name": items({"name": "", "role": "fast"}),
    "name is a number": items({"name": 5}),
    "unknown role": items({"name": "m", "role": "clever"}),
    "role is a list": items({"name": "m", "role": ["fast"]}),
    "item is a number": items(5),
    "items are a text": {"models": {"mode": "manual", "items": "m"}},
    "a mode alone": {"models": {"mode": "recommended"}},
    "models are a list": {"models": ["m"]},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_answers_that_cannot_be_meant_are_told_in_a_line_and_nothing_is_written(
    home: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    told = answers(BROKEN[broken])
    assert llmq.main([*QUIET, "--output", "made.toml", "--answers", told]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("llmq: ")
    assert len(said) < 400
    assert files_of(home) == ["answers.json"]


@pytest.mark.parametrize("broken", ["no JSON", "bad value", "unknown role", "table is a number"])
@pytest.mark.usefixtures("home")
def test_line_about_broken_answers_names_their_file(
    capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    assert llmq.main([*QUIET, "--answers", answers(BROKEN[broken])]) == 2
    assert "answers.json" in capsys.readouterr().err.splitlines()[-1]


def test_answers_that_are_not_there_are_told(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmq.main([*QUIET, "--answers", "none.json"]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    assert files_of(home) == []


# ---- In a terminal -----------------------------------------------------------------------------

DRIVER = """
import os, sys
sys.path.insert(0, os.environ["TEST_ROOT"])
import llmq
llmq.KINDS["ollama"] = llmq.KINDS["ollama"]._replace(url=os.environ["TEST_OLLAMA"])
llmq.RUNNERS, llmq.read_amd = (llmq.KINDS["ollama"],), list
llmq.LOOK_SECONDS = float(os.environ.get("TEST_LOOK", "5"))
llmq.TOOL_SECONDS = float(os.environ.get("TEST_TOOL", "5"))
codes = {llmq.main(sys.argv[1:]) for _ in range(int(os.environ.get("TEST_TIMES", "1")))}
sys.exit(codes.pop() if len(codes) == 1 else f"left with {codes}")
"""


def driven(home: Path, url: str, **more: str) -> dict[str, Any]:
    """How a process is started that finds an Ollama at this URL, and nothing else."""
    env = {
        **clean_environment(str(home)),
        "PATH": str(home / "bin"),
        "TEST_ROOT": str(LLMQ.parent),
        "TEST_OLLAMA": url,
        **more,
    }
    return {"env": env, "cwd": home}


class Dialogue:
    """`llmq config init` in a terminal of its own, and the screen that a person would see."""

    def __init__(
        self,
        home: Path,
        *arguments: str,
        url: str = NOBODY,
        size: tuple[int, int] = (80, 40),
        **env: str,
    ) -> None:
        pyte = require("pyte")
        self.screen = pyte.Screen(*size)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.seen = 0  # of what was printed, what an earlier question has been found in
        self.over = False  # all that it printed is here
        self.hand, self.theirs = os.openpty()
        columns, lines = size
        fcntl.ioctl(self.hand, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.popen = subprocess.Popen(
            [sys.executable, "-c", DRIVER, "config", "init", *arguments],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            start_new_session=True,
            preexec_fn=self.settle,  # noqa: PLW1509
            **driven(home, url, TERM="xterm-256color", **env),
        )
        os.close(self.theirs)
        os.set_blocking(self.hand, False)
        asyncio.get_running_loop().add_reader(self.hand, self.read)

    @staticmethod
    def settle() -> None:
        """Have the terminal, and be stopped by it: a shell's background jobs ignore Ctrl-C."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def read(self) -> None:
        try:
            data = os.read(self.hand, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # nobody has it open any more
        self.raw += data
        self.stream.feed(data)
        if not data:
            self.over = True
            asyncio.get_running_loop().remove_reader(self.hand)

    @property
    def printed(self) -> str:
        return self.raw.decode(errors="replace").replace("\r\n", "\n")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    async def asks(self, words: str) -> None:
        """Wait until it asks this, and for the answer."""

        def found() -> int:
            match = re.compile(f"(?s){words}.*?\\] > $").search(self.printed, self.seen)
            return match.end() if match else 0

        try:
            self.seen = await eventually(found, 8)
        except AssertionError:
            raise AssertionError(f"it does not ask {words!r}:\n{self.printed}") from None

    async def says(self, words: str, times: int) -> None:
        await eventually(lambda: self.printed.count(words) == times)

    def press(self, keys: str) -> None:
        os.write(self.hand, keys.encode())

    async def talk(self, *pairs: tuple[str, str]) -> None:
        """Answer each of these questions."""
        for question, answer in pairs:
            await self.asks(question)
            self.press(f"{answer}\r")

    async def ended(self) -> int:
        await eventually(lambda: self.popen.poll() is not None and self.over)
        return int(self.popen.returncode)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        asyncio.get_running_loop().remove_reader(self.hand)
        os.close(self.hand)


@contextlib.asynccontextmanager
async def dialogue(*facts: Any, **more: Any) -> AsyncIterator[Dialogue]:
    opened = Dialogue(*facts, **more)
    try:
        yield opened
    finally:
        opened.close()


FIVE = ("Which runners", "How many", "May `auto`", "Refuse models", "Who may use")
EVERY = (*FIVE, r"\nWrite\s+\S+\?")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The home of a process on a box with a card."""
    tool(tmp_path, f'echo "{CARD}"')
    yield tmp_path
    shutil.rmtree(tmp_path)


def written(folder: Path) -> list[str]:
    return [name for name in files_of(folder) if not name.startswith("bin/")]


def checked(path: Path) -> Any:
    """The settings of a file that `config check` accepts."""
    settings, _ = llmq.read_settings({"config": str(path)}, {})
    return llmq.as_document(settings)


async def test_every_question_is_answered_and_the_file_written(folder: Path) -> None:
    async with ollama(USUAL) as fake, dialogue(folder, url=fake.url) as person:
        await person.talk(
            (
                f"graphics: .*4090.*Ollama at {fake.url}, 3 models.*{FIVE[0]}",
                f"{fake.url}, b=http://box:8000/v1",
            ),
            (FIVE[1], "2"),
            (FIVE[2], "yes"),
            (FIVE[3] + ".*24 GiB", "n"),
            (FIVE[4], "box"),
            (EVERY[-1], "y"),
        )
        assert await person.ended() == 0
        path = usual_file(folder)
        assert f"wrote {path}; `llmq` uses it from now on" in person.printed
        settings = checked(path)
    assert settings["backends"]["ollama"]["url"] == fake.url
    assert settings["backends"]["b"]["url"] == "http://box:8000"
    assert settings["devices"]["local"]["slots"] == 2
    assert sorted(settings["models"]) == sorted(USUAL)
    assert settings["router"]["require_gpu"] is False
    assert settings["server"]["host"] != "0.0.0.0"
    assert settings["keys"] == {}
    assert written(folder) == [f".config/llmq/{NAME}"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_enter_at_every_question_gives_what_is_made_without_asking(folder: Path) -> None:
    async with ollama(USUAL) as fake:
        async with dialogue(folder, "--output", "asked.json", url=fake.url) as person:
            await person.talk(*[(question, "") for question in EVERY])
            assert await person.ended() == 0
            assert "wrote asked.json\n" in person.printed
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DRIVER, *QUIET, "--output", "silent.json",
            **driven(folder, fake.url),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert await process.wait() == 0
    asked, silent = ((folder / name).read_text("utf-8") for name in ("asked.json", "silent.json"))
    assert json.loads(asked) == json.loads(silent)
    assert json.loads(asked)["router"] == {"require_gpu": True}


async def test_wrong_answers_are_asked_again_with_what_is_wrong(folder: Path) -> None:
    async with ollama(USUAL) as fake:
        async with dialogue(folder, "-o", "made.json", url=fake.url) as person:
            await person.talk(
                (FIVE[0], "ftp://box"),
                (f"url.*{FIVE[0]}", "http://box:99999"),
                (f"url.*{FIVE[0]}", "http://me:secret@box:1"),
                (f"password.*{FIVE[0]}", "http://box:1, http://box:1"),
                (f"twice.*{FIVE[0]}", ""),
            )
            await person.asks(FIVE[1])
            for wrong in ("0", "-1", "many", "1.5", "1 2", "²"):
                person.press(f"{wrong}\r")
                await person.asks(f"number.*{FIVE[1]}")
            person.press("4\r")
            await person.talk(
                (FIVE[2], "maybe"),
                (f"say yes or no.*{FIVE[2]}", "N"),
                (FIVE[3], "ja"),
                (f"say yes or no.*{FIVE[3]}", "YES"),
                (FIVE[4], "everybody"),
                (f"box or network.*{FIVE[4]}", " box "),
                (EVERY[-1], "yess"),
                (f"say yes or no.*{EVERY[-1]}", "Yes"),
            )
            assert await person.ended() == 0
    document = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    assert [row["url"] for row in document["backends"].values()] == [fake.url]
    assert document["devices"]["local"]["slots"] == 4
    assert not {"models", "routes"} & set(document), "`auto` may not choose"
    assert document["router"]["require_gpu"] is True


async def test_word_that_is_no_url_is_told_so(folder: Path) -> None:
    async with dialogue(folder) as person:
        await person.talk((FIVE[0], "my runner"))
        await person.asks(FIVE[0])
        told = person.printed.partition("my runner\n")[2].splitlines()[0]
        assert re.search(r"(?i)\burl\b", told)
        assert "[backends.NAME]" not in told, "words of a file that nobody has seen"


async def test_nothing_is_written_where_the_last_answer_is_no(folder: Path) -> None:
    async with dialogue(folder) as person:
        for question in (FIVE[0], FIVE[1], FIVE[3], FIVE[4]):  # there are no models to choose from
            await person.talk((question, ""))
        await person.talk((EVERY[-1], "no"))
        assert await person.ended() == 1
        assert "nothing was written" in person.printed
    assert written(folder) == []


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
async def test_who_leaves_at_a_question_has_written_nothing(folder: Path, key: str) -> None:
    async with ollama(USUAL) as fake:
        async with dialogue(folder, url=fake.url, TEST_TIMES=str(len(EVERY))) as person:
            for count, last in enumerate(EVERY):
                await person.talk(*[(question, "") for question in EVERY[:count]])
                await person.asks(last)
                person.press(key)
                await person.says("nothing was written\n", times=count + 1)
                assert written(folder) == []
            assert await person.ended() == 1, "each time"
            assert "Traceback" not in person.printed
    assert written(folder) == []


async def test_who_leaves_while_it_looks_around_has_written_nothing(folder: Path) -> None:
    async with ollama(USUAL) as fake:
        fake.hold_probes()
        async with dialogue(folder, url=fake.url, TEST_LOOK="60") as person:
            await eventually(lambda: fake.probes)
            person.press("\x03")
            assert await person.ended() == 1
            assert "nothing was written" in person.printed
            assert "Traceback" not in person.printed
        await eventually(lambda: not fake.open)
    assert written(folder) == []


@pytest.mark.parametrize("leave", ["no\r", "\r", "\x03", "\x04"], ids=ascii)
async def test_file_that_is_there_stays_unless_the_person_says_yes(
    folder: Path, leave: str
) -> None:
    (folder / "made.json").write_text("mine", encoding="utf-8")
    async with dialogue(folder, "--output", "made.json") as person:
        await person.asks("made.json is there already. Write it anew")
        person.press(leave)
        assert await person.ended() == 1
        assert "nothing was written" in person.printed
        assert FIVE[0] not in person.printed
    assert (folder / "made.json").read_text(encoding="utf-8") == "mine"
    assert written(folder) == ["made.json"]


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["asked", "unasked"])
async def test_file_is_written_anew_where_that_is_wanted(folder: Path, more: list[str]) -> None:
    (folder / "made.json").write_text("mine", encoding="utf-8")
    async with ollama(USUAL) as fake:
        async with dialogue(folder, "--output", "made.json", *more, url=fake.url) as person:
            if not more:
                await person.talk(("is there already", "y"))
            await person.talk(*[(question, "") for question in EVERY])
            assert await person.ended() == 0
            assert ("is there already" in person.printed) is not more or not more
    assert json.loads((folder / "made.json").read_text(encoding="utf-8"))["models"]
    assert written(folder) == ["made.json"]


async def test_file_that_appears_during_the_dialogue_stays_as_it_is(folder: Path) -> None:
    async with ollama(USUAL) as fake:
        async with dialogue(folder, "--output", "made.json", url=fake.url) as person:
            await person.talk(*[(question, "") for question in FIVE])
            await person.asks(EVERY[-1])
            (folder / "made.json").write_text("mine", encoding="utf-8")
            person.press("y\r")
            await eventually(lambda: b"already" in person.raw or person.popen.poll() is not None)
    assert (folder / "made.json").read_text(encoding="utf-8") == "mine"
    assert written(folder) == ["made.json"]


async def test_dry_run_asks_and_prints_and_writes_nothing(folder: Path) -> None:
    (folder / "made.json").write_text("mine", encoding="utf-8")
    async with ollama(USUAL) as fake:
        more = ("--output", "made.json", "--dry-run")
        async with dialogue(folder, *more, url=fake.url) as person:
            await person.talk(*[(question, "") for question in FIVE])
            assert await person.ended() == 0
            printed = json.loads(re.findall(r"(?ms)^\{$.*^\}$", person.printed)[0])
            assert sorted(printed["models"]) == sorted(USUAL)
            assert "is there already" not in person.printed
    assert (folder / "made.json").read_text(encoding="utf-8") == "mine"
    assert written(folder) == ["made.json"]


async def test_questions_are_numbered_without_a_gap(folder: Path) -> None:
    (folder / "bin/nvidia-smi").unlink()  # and no models: what they are about is not asked
    async with dialogue(folder) as person:
        for number in itertools.count(1):
            await person.asks(r"(\d\. |Write\s)")
            numbers = [int(one) for one in re.findall(r"(?m)^(\d)\. ", person.printed)]
            assert numbers == list(range(1, len(numbers) + 1)), person.printed
            if len(numbers) < number:
                break
            person.press("\r")
    assert numbers


async def test_models_of_a_runner_that_was_taken_out_are_not_proposed(folder: Path) -> None:
    async with ollama(USUAL) as fake:
        async with dialogue(folder, "--output", "made.json", url=fake.url) as person:
            await person.talk((FIVE[0], "http://box:8000"), (FIVE[1], ""))
            await person.asks(r"\d\. ")
            while "Write made.json" not in person.printed:
                person.press("\r")
                await person.asks(r"(\d\. |Write\s)")
            person.press("\r")
            assert await person.ended() == 0
    document = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    assert [row["url"] for row in document["backends"].values()] == ["http://box:8000"]
    assert not {"models", "routes"} & set(document), "nobody has them"


async def test_network_gets_a_key_that_is_shown_once_and_kept_as_its_hash(folder: Path) -> None:
    async with ollama(USUAL) as fake:
        async with dialogue(folder, "--output", "made.json", url=fake.url) as person:
            await person.talk(*[(question, "") for question in FIVE[:4]])
            await person.talk((FIVE[4], "network"), (EVERY[-1], ""))
            assert await person.ended() == 0
            keys = re.findall(r"llmq-[\w-]{40,}", person.printed)
        assert len(keys) == 1, "shown once"
        text = (folder / "made.json").read_text(encoding="utf-8")
        document = json.loads(text)
        assert keys[0] not in text
        digest = hashlib.sha256(keys[0].encode()).hexdigest()
        assert [row["key_hash"] for row in document["keys"].values()] == [f"sha256:{digest}"]
        assert document["server"]["host"] == "0.0.0.0"
        assert document["server"]["require_key"] == "remote"
        settings = checked(folder / "made.json")
        assert sorted(settings["keys"]["me"]["rights"]) == ["control", "infer", "models"]
        await let_in_by(keys[0], folder / "made.json")


async def let_in_by(key: str, path: Path) -> None:
    """Of those beyond this box it lets in who has the key; a proxy that is trusted names them."""
    away = {"X-Forwarded-For": "10.1.2.3"}
    env = {"LLMQ_SERVER_TRUSTED_PROXIES": "127.0.0.1"}
    arguments = ("--config", str(path), "--host", "127.0.0.1", "--port", "0", "--state", "")
    async with Process(*arguments, env=env) as p:
        body = chat("hello", model="qwen3:4b")
        for path_of, method, more in (
            ("/v1/chat/completions", "POST", {"json": body}),
            ("/llmq/status", "GET", {}),
        ):
            refused = await ask(p.port, method, path_of, headers=away, **more)
            wrong = {**away, "Authorization": "Bearer llmq-" + "x" * 43}
            right = {**away, "Authorization": f"Bearer {key}"}
            assert refused.status == 401
            assert (await ask(p.port, method, path_of, headers=wrong, **more)).status == 401
            assert (await ask(p.port, method, path_of, headers=right, **more)).status == 200
            assert (await ask(p.port, method, path_of, **more)).status == 200, "this box"


async def test_key_of_a_dry_run_is_shown_too(folder: Path) -> None:
    """Else what it prints has the hash of a key that nobody knows."""
    async with ollama(USUAL) as fake:
        more = ("--output", "made.json", "--dry-run")
        async with dialogue(folder, *more, url=fake.url) as person:
            await person.talk(*[(question, "") for question in FIVE[:4]], (FIVE[4], "network"))
            assert await person.ended() == 0
            keys = re.findall(r"llmq-[\w-]{40,}", person.printed)
            hashes = re.findall(r"sha256:([0-9a-f]{64})", person.printed)
    assert [hashlib.sha256(key.encode()).hexdigest() for key in keys] == hashes


@pytest.mark.parametrize("models", [USUAL, {}], ids=["runner", "none"])
async def test_dialogue_fits_into_eighty_columns(folder: Path, models: dict[str, float]) -> None:
    """Else the terminal breaks words; what is long itself, as a path, may be broken."""
    async with ollama(models or USUAL) as fake:
        url = fake.url if models else NOBODY
        async with dialogue(folder, "-o", "made.json", url=url) as person:
            questions = EVERY if models else [one for one in EVERY if one != FIVE[2]]
            await person.talk(*[(question, "") for question in questions])
            assert await person.ended() == 0
    assert [line for line in person.printed.splitlines() if len(line) > 80] == []


# ---- What is left behind -----------------------------------------------------------------------


async def silent(folder: Path, url: str, **env: str) -> tuple[str, str]:
    """What it prints where every warning is shown."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "dev", "-W", "error", "-c", DRIVER,
        *QUIET, "-o", "made.json", "--overwrite", **driven(folder, url, **env),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = (text.decode() for text in await process.communicate())
    assert process.returncode == 0, err
    return out, err


async def test_runner_that_hangs_leaves_no_connection_and_no_warning(folder: Path) -> None:
    async with ollama(USUAL) as hanging, ollama(USUAL) as fake:
        hanging.hold_probes()
        out, err = await silent(folder, fake.url, OLLAMA_HOST=hanging.url, TEST_LOOK="1")
        assert out == "wrote made.json\n"
        assert re.fullmatch(f"this box.*\ngraphics: .*\nrunner: .*{fake.url}.*\n", err), err
        await eventually(lambda: not hanging.open and not fake.open)


async def test_tool_that_hangs_is_ended_and_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Python warns of it when the command ends, as soon as the box is busy."""
    tool(home, f"exec {SLEEP} 60")
    begun: list[Any] = []
    begin = asyncio.create_subprocess_exec

    async def noted(*facts: Any, **more: Any) -> Any:
        begun.append(await begin(*facts, **more))
        return begun[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    monkeypatch.setattr(llmq, "TOOL_SECONDS", 0.1)
    assert (await llmq.survey({})).cards == ()
    ended = [process.returncode for process in begun]
    await asyncio.gather(*[process.wait() for process in begun])
    assert ended == [-signal.SIGKILL]
