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
        (("statsu",), "status", "unknown command statsu; did you mean status?"),
        (
            ("xyzzy",),
            "config",
            "unknown command xyzzy; known: cancel, config, job, jobs, key, mode, models, result, "
            "run, serve, status, top, usage",
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

    monkeypatch.setitem(llmq.COMMANDS, "status", interrupted)
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
