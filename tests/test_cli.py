"""What a person types: help, version, status, mode and config, and plain words when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import llmq
from tests.fakes import FakeBackend, ask, chat, eventually, run_llmq, running

ROWS = list(llmq.known_settings())
NOBODY = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file and no variable of this machine steers the command."""
    for name in list(os.environ):
        foreign = name in ("HOST", "PORT", "OLLAMA_URL", "OLLAMA_MODEL") or name.startswith("LLM_")
        if foreign or name.startswith("LLMQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(llmq, "CONFIG_PLACES", (str(tmp_path / "nowhere"),))


def leave(*arguments: str) -> int:
    """The exit code of a command that argparse ends."""
    with pytest.raises(SystemExit) as raised:
        llmq.main(list(arguments))
    return int(raised.value.code or 0)


async def command(*arguments: str) -> int:
    """A command that asks a llmq in this very loop, in a thread of its own."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, llmq.main, list(arguments))


# ---- Help and version ------------------------------------------------------------------------


def test_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave("--version") == 0
    assert capsys.readouterr().out == f"llmq {llmq.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(flag) == 0
    said = capsys.readouterr().out
    for name in llmq.COMMANDS:
        assert re.search(rf"^ +{name} ", said, re.MULTILINE), name
    assert "serve --help" in said


def test_help_has_each_command_in_its_group_and_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert leave("--help") == 0
    said = capsys.readouterr().out
    listed = dict(re.findall(r"(?m)^([A-Z][^:\n]+):\n((?:  \w+ +.+\n)+)", said))
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, row in llmq.COMMANDS.items():
        groups.setdefault(row.group, []).append((name, row.help))
    assert {
        group: re.findall(r"(?m)^  (\w+) +(.+)$", text) for group, text in listed.items()
    } == groups
    assert len(re.findall(r"(?m)^  \w", said)) == len(llmq.COMMANDS)
    assert all(len(line) < 100 for line in said.splitlines())


@pytest.mark.parametrize("name", llmq.COMMANDS)
def test_each_command_has_a_help_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    row = llmq.COMMANDS[name]
    assert leave(name, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: llmq {name} ")
    assert ("--url URL" in said, "--key-file FILE" in said) == (row.asks, row.asks)
    assert bool(re.search(rf"(?m)^ +--json +{re.escape(row.json)}$", said)) == bool(row.json)


@pytest.mark.parametrize("name", ["serve", "config"])
def test_help_of_a_command_lists_every_setting_with_its_default(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert leave(name, "--help") == 0
    said = capsys.readouterr().out
    for row in ROWS:
        text = re.escape(f"{row.help} (default: {row.shown_default or 'none'})")
        assert re.search(rf"^ +{row.flag}( [A-Z]+)?\s+{text}$", said, re.MULTILINE), row.key
    for flag in ("--config FILE", "--backend URL"):
        assert flag in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--slotz", "2"),
        ("--slotz", "2"),
        ("mode",),
        ("mode", "fast"),
        ("config",),
        ("config", "burn"),
        ("status", "twice"),
        ("dance",),
    ],
)
def test_odd_arguments_end_with_2_and_the_usage(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(*arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("usage: llmq")


@pytest.mark.parametrize(
    ("arguments", "listed", "cure"),
    [
        (("statsu",), "COMMAND", "unknown command statsu; did you mean status?"),
        (
            ("xyzzy",),
            "COMMAND",
            "unknown command xyzzy; known: cancel, completion, config, connect, gpu, job, jobs, "
            "key, mode, models, result, run, serve, status, top, usage",
        ),
        (("--slotz", "2"), "--num-ctx", "unknown flag --slotz; did you mean --slots?"),
        (("serve", "--dmo"), "--demo", "unknown flag --dmo; did you mean --demo?"),
        (("top", "--intervl=3"), "--once", "unknown flag --intervl; did you mean --interval?"),
        (("status", "--\x1b[2J"), "--url", "unknown flag --?[2J; known: --json, --key-file, --url"),
    ],
)
def test_what_is_not_known_is_answered_with_the_list_and_the_nearest(
    arguments: tuple[str, ...], listed: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(*arguments) == 2
    *usage, last = capsys.readouterr().err.splitlines()
    assert listed in "\n".join(usage)
    assert last.endswith(f"error: {cure}")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("mode", "paussed"), "paused"),
        (("mode", "prio"), "priority"),
        (("mode", "opne"), "open"),
        (("config", "chekc"), "check"),
        (("models", "laod", "m"), "load"),
        (("run", "--class", "hihg", "--", "x"), "high"),
    ],
)
def test_misspelt_value_is_told_the_nearest(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(*arguments) == 2
    assert f"did you mean {word}?" in capsys.readouterr().err


def test_flag_before_its_command_is_not_told_that_the_command_is_unknown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_when(monkeypatch, lambda _: None)
    with contextlib.suppress(SystemExit):
        llmq.main(["--port", "0", "serve"])
    assert "unknown command serve" not in capsys.readouterr().err


def test_program_says_its_version() -> None:
    ended = run_llmq("--version")
    assert (ended.returncode, ended.stdout) == (0, f"llmq {llmq.__version__}\n")


# ---- Asking a running llmq -------------------------------------------------------------------


async def test_status_shows_mode_backends_and_requests(capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        tasks = [asyncio.ensure_future(q.chat("tell nobody"))]
        request = await fake.arrived()
        tasks.append(asyncio.ensure_future(q.chat("tell nobody", headers={"X-User-ID": "alice"})))
        await eventually(lambda: q.gateway.scheduler.waiting)
        q.gateway.config_error = "llmq.json: odd"
        assert await command("status", "--url", q.base) == 0
        said = capsys.readouterr().out
        for words in (
            r"^ open +waiting 1 +running 1 ",
            r"^ not reloaded: llmq\.json: odd$",
            rf"^ box +up .* 1/1 .* m  {fake.url}$",
            r"^ +run normal .* box$",
            r"^ +1 normal user:alice +m .* local busy \(1/1\): anonymous, m$",
        ):
            assert re.search(words, said, re.MULTILINE), (words, said)
        assert "tell nobody" not in said
        assert await command("status", "--json", "--url", q.base + "/") == 0
        snapshot = json.loads(capsys.readouterr().out)
        assert snapshot["queue"]["waiting"] == 1
        assert set(snapshot) == set(await q.status())
        await request.answer("done")
        await (await fake.arrived()).answer("done")
        await asyncio.gather(*tasks)


async def test_status_shows_why_a_backend_is_down(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(f"box={NOBODY}") as q:
        (backend,) = q.gateway.fleet.backends.values()
        await eventually(lambda: backend.error)
        assert await command("status", "--url", q.base) == 0
        assert re.search(
            rf"box +down .* 0/1 .* {backend.error}  {NOBODY}\n", capsys.readouterr().out
        )


@pytest.mark.parametrize("mode", ["paused", "priority", "open"])
async def test_mode_is_set(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(NOBODY) as q:
        assert await command("mode", mode, "--url", q.base) == 0
        assert capsys.readouterr().out == f"mode is {mode}\n"
        assert (await q.status())["mode"] == mode


async def test_llmq_is_asked_where_the_settings_say_that_it_listens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(NOBODY) as q:
        monkeypatch.setenv("LLMQ_SERVER_PORT", str(q.port))
        assert await command("status") == 0
        assert f"llmq {llmq.__version__}  {q.base}" in capsys.readouterr().out
        if len(q.service.addresses) > 1:
            monkeypatch.setenv("LLMQ_SERVER_HOST", "::1")
            assert await command("status") == 0


async def test_proxy_of_the_environment_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", NOBODY)
    async with running(NOBODY) as q:
        assert await command("status", "--url", q.base) == 0
        assert capsys.readouterr().out


ASKING = [("status",), ("status", "--json"), ("mode", "paused")]


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
@pytest.mark.parametrize("url", [NOBODY, "127.0.0.1:9", "nonsense", "http://[::1", "ftp://a"])
def test_nobody_there_is_said_in_one_plain_line(
    arguments: tuple[str, ...], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmq.main([*arguments, "--url", url]) == 1
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    assert line.startswith("llmq: ")
    assert url in line
    assert "`llmq` starts one on this box, --url names another" in line
    assert "rrno" not in line


@pytest.mark.parametrize("answer", [(404, {}), (200, {}), (200, []), (200, b"<html>"), (500, b"")])
async def test_somebody_else_there_is_said_in_one_plain_line(
    answer: tuple[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeBackend() as fake:
        fake.probe_answers["/llmq/status"] = answer
        assert await command("status", "--url", fake.url) == 1
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert fake.url in line
        assert not said.out


LLMQ = {"X-LLMQ-Id": "x"}
DEEP = b"[" * 100_000
ODD: list[tuple[int, dict[str, str], bytes]] = [
    (200, LLMQ, b"{}"),
    (200, LLMQ, b'{"mode":["open"]}'),
    (200, LLMQ, DEEP),
    (200, LLMQ, b"\xff\xfe"),
    (400, LLMQ, DEEP),
    (400, LLMQ, b"[1]"),
    (400, LLMQ, b'{"error":{"message":"\\u001b[2Jowned"}}'),
    (400, LLMQ, b'{"error":{"message":[1]}}'),
    (200, {}, b'{"mode":"open"}'),
]


@pytest.mark.parametrize("arguments", [*ASKING[:1], ("top", "--once"), ASKING[2]], ids=" ".join)
@pytest.mark.parametrize(("status", "headers", "body"), ODD)
async def test_odd_answers_are_said_without_traceback_or_escape(
    arguments: tuple[str, ...],
    status: int,
    headers: dict[str, str],
    body: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with scripted(status, headers, body) as url:
        code = await command(*arguments, "--url", url)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert (code, said.out) == (1, "") or (arguments[0] == "mode" and status == 200)
    assert len((said.err + said.out).splitlines()) == 1


async def test_answer_without_end_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llmq, "MOST_ANSWERED", 1 << 20)
    async with scripted(200, LLMQ, b" " * (2 << 20)) as url:
        assert await command("status", "--url", url) == 1
        assert "the answer is too long" in capsys.readouterr().err
        monkeypatch.setattr(llmq, "ANSWER_SECONDS", -1.0)  # it has taken too long already
        monkeypatch.setattr(llmq, "MOST_ANSWERED", 1 << 30)
        with pytest.raises(TimeoutError, match="does not end"):
            llmq.read_bounded(SimpleNamespace(read1=lambda _most: b" "))


@contextlib.asynccontextmanager
async def scripted(status: int, headers: dict[str, str], body: bytes) -> AsyncIterator[str]:
    """A server that answers everything so."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            await writer.drain()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_setting_the_mode_where_it_is_refused_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with FakeBackend() as fake:  # answers 404 to any change
        assert await command("mode", "open", "--url", fake.url) == 1
        assert "404" in capsys.readouterr().err


def test_mistake_in_the_settings_is_told_by_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMQ_QUEUE_SLOTS", "many")
    for arguments in (["status"], ["mode", "open"], ["config", "check"], ["serve"], []):
        assert llmq.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("llmq: variable LLMQ_QUEUE_SLOTS: queue.slots = many: ")


# ---- As JSON -----------------------------------------------------------------------------------

# What to type, and what of the JSON the words for people hold, too.
Held = Callable[[Any], list[Any]]
AS_JSON: dict[str, tuple[str, Held]] = {
    "config": ("config show --slots 3", lambda told: [f"queue.slots = {told['queue']['slots']}"]),
    "config check": ("config check", lambda told: ["good"] if told["good"] else ["?"]),
    "key": ("key alice", lambda told: [told["name"]]),
    "status": (
        "status",
        lambda told: [
            f"waiting {told['queue']['waiting']}",
            *[one["name"] for one in told["backends"]],
            *[one["client"] for one in told["requests"]],
        ],
    ),
    "top": ("top --once", lambda told: [told["mode"], told["recent"][0]["model"]]),
    "models": (
        "models",
        lambda told: [word for row in told for word in (row["model"], row["backend"])],
    ),
    "connect": ("connect curl", lambda told: [told[0]["text"].splitlines()[0]]),
    "models load": ("models load m", lambda told: [f"load {told['model']}: {told['backend']}"]),
    "gpu": ("gpu", lambda told: list(told["devices"])),
    "jobs": (
        "jobs",
        lambda told: [
            row[name] for row in told for name in ("id", "status", "class", "client", "model")
        ],
    ),
    "job": ("job JOB", lambda told: [f"{name:<13} " for name in told] + [told["id"]]),
    "usage": (
        "usage",
        lambda told: [row[name] for row in told for name in ("day", "client", "model", "requests")],
    ),
    "mode": ("mode paused", lambda told: [f"mode is {told['mode']}"]),
    "cancel": ("cancel JOB", lambda told: [told["id"], told["status"], "cancelled"]),
}


def test_every_command_that_prints_json_is_tried() -> None:
    assert {name.partition(" ")[0] for name in AS_JSON} == {
        name for name, row in llmq.COMMANDS.items() if row.json
    }


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", AS_JSON)
async def test_json_of_a_command_holds_what_it_shows(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line, held = AS_JSON[name]
    async with FakeBackend(kind="ollama") as fake:
        tool = str(tmp_path / "no-nvidia-smi")
        settings = {"server__state": str(tmp_path / "state.db"), "router__nvidia_smi": tool}
        async with running(f"box={fake.url}", **settings) as q:
            assert (await q.chat("hi", headers={"X-User-ID": "alice"})).status == 200
            await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
            later = [
                (await q.chat("hi", headers={"Prefer": "respond-async"})).json()["id"]
                for _ in range(2)
            ]
            words = line.split()
            asks = ("--url", q.base) if llmq.COMMANDS[words[0]].asks else ()
            printed = []
            for ident, more in zip(later, ((), ("--json",))):
                typed = [ident if word == "JOB" else word for word in words]
                if name == "models load" and more:  # the same once more is pending
                    await ask(q.port, "DELETE", "/llmq/requests?state=waiting")
                assert await command(*typed, *asks, *more) == 0
                told = capsys.readouterr()
                assert not told.err
                printed.append(
                    told.out.replace(later[0], later[-1]) if "JOB" in words else told.out
                )
            await ask(q.port, "DELETE", "/llmq/requests?state=waiting")
    shown, told = printed[0], json.loads(printed[1])
    expected = held(told)
    assert expected
    for one in expected:
        assert str(one) in shown, (one, shown)


# ---- Names from other queues ------------------------------------------------------------------

OWN_WORDS = {  # what people type who come from elsewhere, and llmq's own words for it
    # llm-queue
    "serve": "serve",
    # ollamaMQ
    "-p 8123": "serve --port 8123",
    "--port 8123": "serve --port 8123",
    "-o http://a:1,http://b:2": "serve --backend http://a:1 --backend http://b:2",
    "--backend-urls http://a:1,http://b:2": "serve --backend http://a:1 --backend http://b:2",
    "--backend-urls=http://a:1": "serve --backend http://a:1",
    "--ollama-urls http://a:1": "serve --backend http://a:1",
    "--ollama-urls=http://a:1,http://b:2": "serve --backend http://a:1 --backend http://b:2",
    "-b http://a:1": "serve --backend http://a:1",
    "-t 90": "serve --first-byte-timeout 90 --idle-timeout 90",
    "--timeout 90": "serve --first-byte-timeout 90 --idle-timeout 90",
    "--timeout=90": "serve --first-byte-timeout 90 --idle-timeout 90",
    "--no-tui": "serve",
    "-H 127.0.0.2": "serve --host 127.0.0.2",
    "--allow-all-routes": "serve --allow-all-routes",
    "-p 8123 -o http://a:1 -t 90 --no-tui": "serve --port 8123 --backend http://a:1"
    " --first-byte-timeout 90 --idle-timeout 90",
    # ollama-queue-proxy and ollama-auth-sidecar have a file and variables alone
    # ollama-agent-router
    "serve -c llmq.json": "serve --config llmq.json",
    "serve --config llmq.json": "serve --config llmq.json",
    "validate-config": "config check",
    "validate-config --config llmq.json": "config check --config llmq.json",
    "validate-config -c llmq.json": "config check --config llmq.json",
    "init": "config init",
    "init --wizard": "config init",
    "init -o llmq.toml": "config init --output llmq.toml",
    "configure": "config init",
    "configure --detect": "config init",
    "configure --non-interactive --answers a.json --dry-run --overwrite": "config init"
    " --non-interactive --answers a.json --dry-run --overwrite",
    "-u http://x:1 status": "status --url http://x:1",
    "--url http://x:1 status": "status --url http://x:1",
    "--url=http://x:1 status": "status --url http://x:1",
    "status -u http://x:1": "status --url http://x:1",
    "-u http://x:1 models": "models --url http://x:1",
    "-u http://x:1 gpu": "gpu --url http://x:1",
    "-u http://x:1 jobs": "jobs --url http://x:1",
    "-u http://x:1 job job_1": "job job_1 --url http://x:1",
    "-u http://x:1 result job_1": "result job_1 --url http://x:1",
    "-u http://x:1 cancel job_1": "cancel job_1 --url http://x:1",
}
FOREIGN = re.compile(
    r"(?<!\S)(-[pobtHcu]|--(?:backend-urls|ollama-urls|timeout|no-tui|wizard|detect)|"
    r"validate-config|init|configure)(?=[ =]|$)"
)


def parsed(words: list[str]) -> dict[str, Any]:
    """What a command line says."""
    try:
        options = vars(llmq.build_parser().parse_args(words))
    except SystemExit:
        pytest.fail(f"not understood: {words}")
    given = {name: value for name, value in options.items() if name != "parser"}
    if "backends" in given:
        given["backends"] = [url for one in given["backends"] for url in one.split(",")]
    return given


@pytest.mark.parametrize("typed", OWN_WORDS)
def test_words_of_other_queues_mean_llmqs_own_with_a_note_each(typed: str) -> None:
    words, notes = llmq.modernised(typed.split())
    assert parsed(words) == parsed(OWN_WORDS[typed].split())
    foreign = [one for one in FOREIGN.findall(typed) if one != "-o" or "init" not in typed]
    assert [note.partition(" is ")[0] for note in notes] == foreign
    assert all(note.isprintable() and note.endswith(" here") for note in notes)


@pytest.mark.parametrize("word", ["-u", "-p", "-c", "-t", "-o", "--no-tui", "--detect", "--url=x"])
def test_words_of_a_command_that_is_run_are_its_own(word: str) -> None:
    typed = ["run", "--device", "gpu", "--", "python3", word, "train.py"]
    assert llmq.modernised(typed) == (typed, [])


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("-V",), ("--version",), ("gpu",)])
def test_words_of_its_own_are_no_news(words: tuple[str, ...]) -> None:
    assert llmq.modernised(list(words))[1] == []


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version_has_a_short_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(flag) == 0
    assert capsys.readouterr().out == f"llmq {llmq.__version__}\n"


@pytest.mark.parametrize("flag", ["-p", "-t", "-o", "--timeout="])
def test_foreign_flag_without_its_value_is_a_mistake(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_when(monkeypatch, lambda _: None)
    assert llmq.main(["--port=0", flag]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("llmq: command line: ")


def test_ollamamqs_command_line_serves_with_its_notes_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    stop_when(monkeypatch, lambda service: seen.append(service.settings))
    typed = f"-p 0 --ollama-urls {NOBODY},http://127.0.0.2:9 --timeout 90 --no-tui"
    assert llmq.main(typed.split()) == 0
    (settings,) = seen
    assert [one.url for one in settings.backends.values()] == [NOBODY, "http://127.0.0.2:9"]
    assert settings.upstream.first_byte_timeout == settings.upstream.idle_timeout == 90
    assert capsys.readouterr().err.splitlines() == [
        "-p is --port here",
        "--ollama-urls is --backend here",
        "--timeout is --first-byte-timeout and --idle-timeout here",
        "--no-tui is not needed here",
    ]


def test_configuration_is_validated_by_its_other_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llmq.json"
    for text, code in (('{"queue": {"slots": 2}}', 0), ('{"queue": {"slotz": 2}}', 2)):
        file.write_text(text)
        assert llmq.main(["validate-config", "--config", str(file)]) == code
        said = capsys.readouterr()
        note, *others = said.err.splitlines()
        assert note == "validate-config is config check here"
        assert ("good" in said.out, len(others)) == (code == 0, int(code == 2))


async def test_status_is_asked_with_the_url_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(NOBODY) as q:
        for flag in ("--url", "-u"):
            assert await command(flag, q.base, "status", "--json") == 0
            assert json.loads(capsys.readouterr().out)["version"] == llmq.__version__


# ---- Settings --------------------------------------------------------------------------------


def test_good_settings_are_said_to_be_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llmq.json"
    file.write_text('{"queue": {"slots": 2}}')
    assert llmq.main(["config", "check", "--config", str(file)]) == 0
    assert "good" in capsys.readouterr().out
    file.write_text('{"queue": {"slotz": 2}}')
    assert llmq.main(["config", "check", "--config", str(file)]) == 2
    assert "slotz" in capsys.readouterr().err


def test_shown_json_is_a_file_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--slots", "3", "--backend", "box=http://box:1", "--keep-alive", "2m"]
    flags += ["--allowed-host", "a", "--allow-anonymous-lan", "--max-body", "8MiB"]
    assert llmq.main(["config", "show", "--json", *flags]) == 0
    first = capsys.readouterr().out
    tables = json.loads(first)
    assert tables["queue"]["slots"] == 3
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps(tables))
    assert llmq.main(["config", "show", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == tables


def test_shown_settings_keep_keys_to_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = {"url": "http://box:1", "key": "sk-secret", "kind": "vllm"}
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps({"backends": {"box": box}, "devices": {"gpu": {"slots": 2}}}))
    assert llmq.main(["config", "show", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["box"]["key"] == "***"
    assert llmq.main(["config", "show", "--config", str(file)]) == 0
    said = capsys.readouterr().out
    assert "sk-secret" not in said
    assert "backends.box = " in said
    assert "***" in said
    assert 'devices.gpu = {"slots": 2, ' in said
    for row in ROWS:
        assert re.search(rf"^{re.escape(row.key)} = ", said, re.MULTILINE), row.key


def test_ignored_host_is_said_beside_what_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOST", "my-laptop")
    assert llmq.main(["config", "show", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["server"]["host"] == ""
    assert said.err.startswith("HOST=my-laptop ignored")


# ---- Serving ---------------------------------------------------------------------------------


def test_serving_ends_well_when_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    stop_when(monkeypatch, lambda service: asked.append(llmq.banner(service)))
    monkeypatch.setenv("HOST", "my-laptop")
    assert llmq.main(["--port", "0", "--demo"]) == 0
    (banner,) = asked
    said = capsys.readouterr().out
    assert "HOST=my-laptop ignored" in said
    assert banner in said


def test_hurried_end_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_when(monkeypatch, lambda service: service.on_signal())
    assert llmq.main(["serve", "--port", "0", "--demo"]) == 1


def test_interrupt_before_it_serves_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    row = llmq.COMMANDS["status"]._replace(run=interrupted)
    monkeypatch.setitem(llmq.COMMANDS, "status", row)
    assert llmq.main(["status"]) == 0


def stop_when(monkeypatch: pytest.MonkeyPatch, before: Callable[[Any], object]) -> None:
    """Let `llmq serve` in this process be asked to stop as soon as it has started."""
    start = llmq.Service.start
    monkeypatch.setattr(llmq, "set_up_log", lambda _: None)
    monkeypatch.setattr(llmq.gc, "freeze", lambda: None)
    monkeypatch.setattr(llmq.gc, "set_threshold", lambda *_: None)

    async def start_and_stop(service: Any) -> None:
        await start(service)
        before(service)
        service.on_signal()

    monkeypatch.setattr(llmq.Service, "start", start_and_stop)


async def test_first_line_to_paste_works(capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        found = re.search(r"OPENAI_BASE_URL=http://127\.0\.0\.1:(\d+)/v1", llmq.banner(q.service))
        assert found
        answer = await ask(int(found.group(1)), "POST", "/v1/chat/completions", json=chat("hi"))
        assert answer.content == "hi"
    assert not capsys.readouterr().out


# ---- Help in a word --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *llmq.COMMANDS])
def test_help_in_a_word_is_the_help_of_a_flag(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [name] if name else []
    assert leave("help", *words) == 0
    said = capsys.readouterr().out
    assert leave(*words, "--help") == 0
    assert said == capsys.readouterr().out


def test_help_for_what_is_no_command_is_told_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert leave("help", "statuz") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "status" in said.err
