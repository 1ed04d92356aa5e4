"""llmq as a process: it drains, dies, restarts and reloads in good order, or refuses plainly."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import (
    LLMQ,
    Answer,
    FakeBackend,
    FakeRequest,
    Process,
    Raw,
    ask,
    chat,
    eventually,
    http,
    run_llmq,
    running,
)

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them"),
    pytest.mark.usefixtures("measured"),  # how llmq starts and ends, which happens in them alone
]
SECOND = 1.0
CHAT = "/v1/chat/completions"


async def begin(port: int, text: str, stream: bool = False) -> Raw:
    """A client that has sent its request and waits."""
    client = await Raw.open(port)
    body = json.dumps(chat(text, stream)).encode()
    await client.send(
        http("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, body)
    )
    return client


async def status(port: int) -> dict[str, Any]:
    return dict((await ask(port, "GET", "/llmq/status")).json())


async def waiting(port: int, number: int) -> None:
    """Return once exactly so many wait; the test's deadline ends it otherwise."""
    while (await status(port))["queue"]["waiting"] != number:
        pass


def serving(fake: FakeBackend, *more: str) -> Process:
    return Process("--port", "0", "--backend", fake.url, *more)


async def streaming(p: Process, fake: FakeBackend) -> tuple[Raw, FakeRequest]:
    """A client that has read the first word of its stream."""
    client = await begin(p.port, "stream", stream=True)
    request = await fake.arrived()
    await request.start_stream()
    await request.piece("one ")
    await client.head()
    await client.until(b"one ")
    return client, request


async def rest_of(client: Raw) -> bytes:
    rest = b""
    while data := await client.read():
        rest += data
    return rest


def assert_error(answer: Answer, status: int, code: str) -> None:
    assert (answer.status, answer.code, answer.clean) == (status, code, True), answer
    assert answer.json()["error"]["message"]


# ---- Stop ------------------------------------------------------------------------------------


async def test_sigterm_lets_the_running_end_tells_the_waiting_and_exits_0() -> None:
    async with FakeBackend(auto=False) as fake, serving(fake) as p:
        client, request = await streaming(p, fake)
        idle = await Raw.open(p.port)
        await idle.send(http("GET", "/health"))
        assert (await idle.response()).status == 200
        waiters = [await begin(p.port, f"waiter {n}", stream=bool(n % 2)) for n in range(4)]
        await waiting(p.port, 4)
        p.signal(signal.SIGTERM)
        for waiter in waiters:
            answer = await waiter.response()
            waiter.close()
            assert_error(answer, 503, "shutting_down")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        async with await begin(p.port, "too late") as late:
            answer = await late.response()
        assert_error(answer, 503, "shutting_down")
        assert answer.headers["connection"] == "close"
        assert await idle.closed() == "eof"
        await request.piece("two")
        await request.finish_stream()
        rest = await rest_of(client)
        assert b"two" in rest
        assert b"[DONE]" in rest
        assert rest.endswith(b"0\r\n\r\n")
        client.close()
        assert await p.ended(0) == 0
        assert [request.text for request in fake.requests] == ["stream"]


async def test_a_whole_answer_is_finished_during_the_drain() -> None:
    async with FakeBackend(auto=False) as fake, serving(fake) as p:
        client = await begin(p.port, "hello")
        request = await fake.arrived()
        waiter = await begin(p.port, "waiter")
        await waiting(p.port, 1)
        p.signal(signal.SIGTERM)
        assert_error(await waiter.response(), 503, "shutting_down")  # so the drain has begun
        waiter.close()
        await request.answer("well")
        answer = await client.response()
        client.close()
        assert (answer.status, answer.content, answer.clean) == (200, "well", True)
        assert await p.ended(0) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
async def test_asked_to_stop_while_idle_it_exits_0_at_once_and_says_no_traceback(
    number: int,
) -> None:
    async with FakeBackend() as fake, serving(fake) as p:
        assert (await ask(p.port, "GET", "/health")).status == 200
        assert await p.ended(number) == 0
        assert "Traceback" not in p.output
        assert "running request" not in p.output


async def test_those_who_only_watch_do_not_hold_up_the_stop() -> None:
    async with FakeBackend() as fake, serving(fake) as p:
        watcher = await Raw.open(p.port)
        await watcher.send(http("GET", "/llmq/events"))
        await watcher.until(b"data:")
        half = await Raw.open(p.port)
        await half.send(http("POST", "/v1/chat/completions", {"Content-Length": "9"}))
        assert await p.ended() == 0


async def test_ctrl_c_drains_too() -> None:
    async with FakeBackend(auto=False) as fake, serving(fake) as p:
        client, request = await streaming(p, fake)
        waiter = await begin(p.port, "waiter")
        await waiting(p.port, 1)
        p.signal(signal.SIGINT)
        said = "stopping: waits 30 s for 1 running request .anonymous.; asked again it stops now"
        await p.line(said)
        assert_error(await waiter.response(), 503, "shutting_down")
        waiter.close()
        await request.finish_stream()
        assert b"[DONE]" in await rest_of(client)
        client.close()
        assert await p.ended(0) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
async def test_a_second_signal_exits_now_with_1(second: int) -> None:
    async with FakeBackend(auto=False) as fake, serving(fake) as p:
        client, request = await streaming(p, fake)
        waiter = await begin(p.port, "waiter")
        await waiting(p.port, 1)
        p.signal(signal.SIGTERM)
        assert_error(await waiter.response(), 503, "shutting_down")
        assert await p.ended(second, seconds=3) == 1
        rest = await rest_of(client)
        assert b"[DONE]" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
        await request.left()
        assert "Traceback" not in p.output


async def test_a_drain_ends_at_its_limit_and_what_still_runs_is_told() -> None:
    async with FakeBackend(auto=False) as fake, serving(fake, "--drain-timeout", "0.5s") as p:
        client, request = await streaming(p, fake)
        assert await p.ended() == 0
        rest = await rest_of(client)
        assert b'"error"' in rest
        assert b"[DONE]" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
        await request.left()
        assert "Traceback" not in p.output


# ---- Die and start again ---------------------------------------------------------------------


@pytest.mark.deadline(20)
async def test_killed_it_starts_again_on_the_same_port_and_no_stream_looks_done() -> None:
    async with FakeBackend(auto=False) as fake:
        async with serving(fake) as p:
            client, request = await streaming(p, fake)
            waiter = await begin(p.port, "waiter")
            await waiting(p.port, 1)
            assert await p.ended(signal.SIGKILL) == -signal.SIGKILL
            rest = await rest_of(client)
            assert b"[DONE]" not in rest
            assert not rest.endswith(b"0\r\n\r\n")
            assert not await rest_of(waiter)
            await request.left()
        async with Process("--port", str(p.port), "--backend", fake.url) as again:
            assert again.port == p.port
            client = await begin(again.port, "and now?")
            await (await fake.arrived()).answer("well")
            assert (await client.response()).content == "well"
            assert [request.text for request in fake.requests] == ["stream", "and now?"]


def test_a_port_that_is_taken_is_said_in_one_line_and_exits_78() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ended = run_llmq("--port", port, "--demo")
        assert ended.returncode == 78
        (line,) = ended.stderr.splitlines()
        assert port in line
        assert "another program listens there: add --port N" in line


async def test_a_port_that_llmq_has_already_is_said_with_what_to_do() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        loop = asyncio.get_running_loop()
        ended = await loop.run_in_executor(None, run_llmq, "--port", str(q.port), "--demo")
        assert ended.returncode == 78
        (line,) = ended.stderr.splitlines()
        assert f"127.0.0.1:{q.port}: llmq runs there already: see `llmq status`" in line
        assert "--port N" in line


async def test_an_exception_nobody_foresaw_is_a_500_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import llmq

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /home/x")

    async with FakeBackend() as fake, running(fake.url) as q:
        assert (await q.chat("before")).content == "before"
        with monkeypatch.context() as patch:
            patch.setattr(llmq.Gateway, "serve", broken)
            answer = await q.chat("now")
            assert_error(answer, 500, "internal_error")
            assert answer.headers["connection"] == "close"
            assert b"secret" not in answer.body
        assert (await q.chat("after")).content == "after"


# ---- Reload ----------------------------------------------------------------------------------


def write(path: Path, **tables: Any) -> str:
    """Write the configuration as JSON, which every Python can read; return its name."""
    path.write_text(json.dumps(tables))
    path.chmod(0o600)
    return str(path)


def backends(**fakes: FakeBackend) -> dict[str, Any]:
    return {name: {"url": fake.url} for name, fake in fakes.items()}


async def reload(p: Process, done: Any) -> dict[str, Any]:
    """SIGHUP; return the first snapshot in which `done` is true."""
    p.signal(signal.SIGHUP)
    while not done(snapshot := await status(p.port)):
        pass
    return snapshot


async def test_sighup_applies_the_changed_file(tmp_path: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        file = tmp_path / "llmq.json"
        write(file, backends=backends(one=fake), queue={"slots": 1})
        async with Process("--port", "0", "--config", str(file)) as p:
            clients = [await begin(p.port, f"number {n}") for n in range(3)]
            requests = [await fake.arrived()]
            await waiting(p.port, 2)
            write(file, backends=backends(one=fake), queue={"slots": 2})
            p.signal(signal.SIGHUP)
            requests.append(await fake.arrived())  # at once, beside the first
            assert fake.active == 2
            write(file, backends=backends(one=fake), queue={"slots": 1})
            await reload(p, lambda seen: seen["devices"][0]["slots"] == 1)
            assert fake.active == 2, "a lower slot count cuts nothing that runs"
            await requests[0].answer("0")
            await waiting(p.port, 1)
            await requests[1].answer("1")
            await (await fake.arrived()).answer("2")
            assert [(await client.response()).content for client in clients] == ["0", "1", "2"]
            assert fake.max_active == 2


async def test_a_file_that_changes_is_read_without_being_told(tmp_path: Path) -> None:
    file = tmp_path / "llmq.json"
    write(file, server={"port": 0}, backends={"one": {"url": "http://127.0.0.1:1"}})
    async with Process("--config", str(file)) as p:
        write(file, server={"port": 0}, backends={"two": {"url": "http://127.0.0.1:1"}})
        await p.line(r"reload: done")
        assert [one["name"] for one in (await status(p.port))["backends"]] == ["two"]


BAD_FILES = {
    "no JSON": "{",
    "unknown key": '{"queue": {"slotz": 2}}',
    "bad value": '{"queue": {"slots": 0}}',
    "nothing": None,
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
async def test_a_bad_file_changes_nothing_and_shows_in_the_status(
    tmp_path: Path, text: str | None
) -> None:
    async with FakeBackend() as fake:
        file = tmp_path / "llmq.json"
        write(file, backends=backends(one=fake), queue={"slots": 2})
        async with Process("--port", "0", "--config", str(file)) as p:
            assert not (await status(p.port))["config_error"]
            if text is None:
                file.unlink()
            else:
                file.write_text(text)
            snapshot = await reload(p, lambda seen: seen["config_error"])
            assert "llmq.json" in snapshot["config_error"]
            assert snapshot["devices"][0]["slots"] == 2
            assert [backend["name"] for backend in snapshot["backends"]] == ["one"]
            answer = await (await begin(p.port, "still here?")).response()
            assert answer.content == "still here?"
            write(file, backends=backends(one=fake), queue={"slots": 3})
            snapshot = await reload(p, lambda seen: not seen["config_error"])
            assert snapshot["devices"][0]["slots"] == 3


async def test_a_removed_backend_drains_and_its_waiters_go_elsewhere(tmp_path: Path) -> None:
    async with FakeBackend(auto=False) as old, FakeBackend(auto=False) as new:
        file = tmp_path / "llmq.json"
        write(file, backends=backends(old=old))
        async with Process("--port", "0", "--config", str(file)) as p:
            runner, request = await streaming(p, old)
            waiter = await begin(p.port, "waiter")
            await waiting(p.port, 1)
            write(file, backends={"new": {"url": new.url, "device": "other"}})
            p.signal(signal.SIGHUP)
            await (await new.arrived()).answer("well")
            assert (await waiter.response()).content == "well"
            await request.piece("two")
            await request.finish_stream()
            assert b"[DONE]" in await runner.until(b"[DONE]")
            while len((await status(p.port))["backends"]) != 1:
                pass
            assert len(old.requests) == 1


async def test_a_request_may_ask_for_the_reload_too(tmp_path: Path) -> None:
    async with FakeBackend() as fake:
        file = tmp_path / "llmq.json"
        write(file, backends=backends(one=fake), queue={"slots": 1})
        async with Process("--port", "0", "--config", str(file)) as p:
            write(file, backends=backends(one=fake), queue={"slots": 5})
            assert (await ask(p.port, "POST", "/llmq/reload", json={})).status < 300
            while (await status(p.port))["devices"][0]["slots"] != 5:
                pass


async def test_flags_and_environment_still_win_after_a_reload(tmp_path: Path) -> None:
    async with FakeBackend() as fake:
        file = tmp_path / "llmq.json"
        write(file, queue={"slots": 1, "max_depth": 10})
        arguments = "--port", "0", "--config", str(file), "--backend", fake.url, "--slots", "4"
        async with Process(*arguments, env={"LLMQ_QUEUE_MAX_DEPTH": "77"}) as p:
            assert (await status(p.port))["queue"]["full_at"] == 77
            file.write_text("{")
            await reload(p, lambda seen: seen["config_error"])
            write(file, queue={"slots": 2, "max_depth": 20})
            snapshot = await reload(p, lambda seen: not seen["config_error"])
            assert snapshot["devices"][0]["slots"] == 4
            assert snapshot["queue"]["full_at"] == 77


async def test_a_reload_that_changes_the_log_loses_no_line_of_a_request(tmp_path: Path) -> None:
    """Request lines are written together, a few times a second; those that are due are too."""
    file, ids = tmp_path / "llmq.json", []
    async with FakeBackend() as fake:
        write(file, backends=backends(one=fake))
        async with Process("--port", "0", "--config", str(file)) as p:
            for log in ({"format": "json"}, {"level": "error"}, {"level": "warning"}) * 3:
                for _ in range(5):
                    answer = await ask(p.port, "POST", CHAT, json=chat("x"))
                    ids.append(answer.headers["x-llmq-id"])
                for changed in (log, {}):
                    write(file, backends=backends(one=fake), log=changed)
                    await ask(p.port, "POST", "/llmq/reload", json={})
            assert await p.ended() == 0
            lines = [line for line in p.output.splitlines() if "outcome" in line]
            assert [one for one in ids if not any(one in line for line in lines)] == []
            assert len(lines) == len(ids)


# ---- A start that is refused -----------------------------------------------------------------


def box(**more: Any) -> dict[str, Any]:
    """A file with one backend."""
    return {"backends": {"box": {"url": "http://x", **more}}}


MISTAKES: dict[str, tuple[Any, str, str]] = {  # the file -> what the line names, a word of the cure
    "no JSON": ('{"queue": {"slots": 2}', "llmq.json", r"line|column|JSON"),
    "no object": ("[]", "llmq.json", r"object|table"),
    "unknown table": ({"queues": {"slots": 2}}, "queues", r"\bqueue\b"),
    "unknown key": ({"queue": {"slotz": 2}}, "slotz", r"\bslots\b"),
    "table that is none": ({"queue": 3}, "queue", r"table|object|key"),
    "text for a number": ({"queue": {"slots": "many"}}, "slots", r"number|integer"),
    "fraction for a number": ({"queue": {"slots": 1.5}}, "slots", r"number|integer"),
    "true for a number": ({"queue": {"slots": True}}, "slots", r"number|integer"),
    "number for text": ({"upstream": {"model": 3}}, "model", r"text|string"),
    "text for a switch": ({"server": {"allow_anonymous_lan": "maybe"}}, "anonymous_lan", "true"),
    "list for text": ({"server": {"host": ["::1"]}}, "host", r"text|string|address"),
    "text for a list": ({"server": {"allowed_hosts": 3}}, "allowed_hosts", "list"),
    "null": ({"queue": {"slots": None}}, "slots", r"number|integer"),
    "no slots": ({"queue": {"slots": 0}}, "slots", r"1|least|positive"),
    "negative depth": ({"queue": {"max_depth": -1}}, "max_depth", r"\b[01]\b|least|positive"),
    "port too high": ({"server": {"port": 70000}}, "port", "65535"),
    "odd duration": ({"server": {"keep_alive": "5 parsecs"}}, "keep_alive", r"\b\d+(\.\d+)?[sm]\b"),
    "negative duration": ({"server": {"keep_alive": "-5s"}}, "keep_alive", r"\d"),
    "odd size": ({"server": {"max_body": "8 elephants"}}, "max_body", "MiB"),
    "unknown choice": ({"log": {"format": "xml"}}, "format", r"json.*text|text.*json"),
    "backend without address": ({"backends": {"box": {"kind": "ollama"}}}, "box", "url"),
    "backend with odd address": ({"backends": {"box": {"url": "ftp://x"}}}, "box", "http"),
    "backend of odd kind": (box(kind="z"), "kind", "ollama"),
    "backend with unknown key": (box(slot=2), "slot", "slots"),
    "negative slots": (box(slots=-1), "slots", r"\b[01]\b|least|positive"),
    "device without slots": ({"devices": {"gpu": {"slots": 0}}}, "gpu", r"1|least"),
    "device with unknown key": ({"devices": {"gpu": {"slotz": 2}}}, "slotz", r"\bslots\b"),
}


def refusal(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Start llmq as a user would; return the one line with which it refused."""
    ended = run_llmq(*arguments, env=env)
    assert ended.returncode == 2, ended
    assert not ended.stdout, "nothing may be served or said before the settings are right"
    (line,) = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_file_stops_the_start_with_one_helpful_line(
    tmp_path: Path, mistake: tuple[Any, str, str]
) -> None:
    content, named, cure = mistake
    file = tmp_path / "llmq.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    line = refusal("--port", "0", "--demo", "--config", str(file))
    assert str(file) in line
    assert named in line
    assert re.search(cure, line.replace(str(file), "")), f"no cure in: {line}"


def test_a_mistake_in_toml_names_its_line(tmp_path: Path) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    file = tmp_path / "llmq.toml"
    file.write_text("[queue]\nslots = 1\nmax_depth = = 3\n")
    line = refusal("--port", "0", "--demo", "--config", str(file))
    assert str(file) in line
    assert re.search(r"line 3|:3\b", line)
    file.write_text("[queue]\nslotz = 1\n")
    line = refusal("--port", "0", "--demo", "--config", str(file))
    assert re.search(r"slotz.*\bslots\b", line)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "gone.json" in refusal("--demo", "--config", str(tmp_path / "gone.json"))
    assert "gone.json" in refusal("--demo", env={"LLMQ_CONFIG": str(tmp_path / "gone.json")})


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "llmq.json"
    write(file, queue={"slots": 2})
    file.chmod(0o666)
    line = refusal("--port", "0", "--demo", "--config", str(file))
    assert str(file) in line
    assert "chmod" in line


@pytest.mark.parametrize(
    ("arguments", "env", "named"),
    [
        (("--slots", "many"), {}, "slots"),
        (("--slots", "0"), {}, "slots"),
        (("--port", "x"), {}, "port"),
        (("--keep-alive", "soon"), {}, "keep-alive"),
        (("--backend", "ftp://x"), {}, "backend"),
        (("--backend", "a=http://x", "--backend", "a=http://y"), {}, "backend"),
        (("--slotz", "2"), {}, "slotz"),
        (("serve", "twice"), {}, "twice"),
        ((), {"LLMQ_QUEUE_SLOTS": "many"}, "LLMQ_QUEUE_SLOTS"),
        ((), {"LLMQ_SERVER_PORT": "70000"}, "LLMQ_SERVER_PORT"),
        ((), {"PORT": "x"}, "PORT"),
        ((), {"LLM_TIMEOUT_MS": "x"}, "LLM_TIMEOUT_MS"),
        ((), {"LLMQ_BACKENDS": "ftp://x"}, "LLMQ_BACKENDS"),
        ((), {"LLMQ_QUEUE_SLOTZ": "2"}, "LLMQ_QUEUE_SLOTZ"),
    ],
    ids=str,
)
def test_a_mistake_in_flags_or_environment_is_named(
    arguments: tuple[str, ...], env: dict[str, str], named: str
) -> None:
    ended = run_llmq(*arguments, env=env)
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr
    assert named in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_bind_outside_loopback_needs_a_word(host: str) -> None:
    assert "--allow-anonymous-lan" in refusal("--port", "0", "--demo", "--host", host)
    env = {"LLMQ_SERVER_HOST": host, "LLMQ_SERVER_PORT": "0"}
    assert "--allow-anonymous-lan" in refusal("--demo", env=env)


def test_an_address_that_this_machine_has_not_is_said_in_one_line_and_exits_78() -> None:
    flags = "--port", "0", "--demo", "--host", "192.0.2.1", "--allow-anonymous-lan"
    ended = run_llmq(*flags)  # an address for documentation: nobody has it
    assert ended.returncode == 78
    (line,) = ended.stderr.splitlines()
    assert "192.0.2.1" in line


async def test_the_connection_to_a_client_outlives_a_reload(tmp_path: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        file = tmp_path / "llmq.json"
        write(file, backends=backends(one=fake), queue={"slots": 1})
        async with Process("--port", "0", "--config", str(file)) as p:
            client, request = await streaming(p, fake)
            write(file, backends=backends(one=fake), queue={"slots": 2})
            await reload(p, lambda seen: seen["devices"][0]["slots"] == 2)
            await eventually(lambda: not request.connection.peer_closed())
            await request.piece("two")
            await request.finish_stream()
            rest = await client.until(b"[DONE]")
            assert b"two" in rest


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_words_that_nobody_takes_are_no_failure(stream: str) -> None:
    command = [sys.executable, str(LLMQ), "--port", "0", "--demo"]
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    with open("/dev/full", "w") as full:
        streams: dict[str, Any] = {stream: full, other: subprocess.PIPE}
        process = subprocess.Popen(command, text=True, **streams)
    with process:
        heard = getattr(process, other)
        while "demo" not in heard.readline():
            pass
        state = Path(f"/proc/{process.pid}/status")
        while not catches(state.read_text(), signal.SIGTERM):
            pass
        process.send_signal(signal.SIGTERM)
        heard.read()
        assert process.wait(8) == 0


def catches(status: str, number: int) -> bool:
    """Whether a process handles a signal, as /proc tells."""
    (caught,) = re.findall(r"SigCgt:\s*([0-9a-f]+)", status)
    return bool(int(caught, 16) >> (number - 1) & 1)
