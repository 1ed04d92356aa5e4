"""llmq under a service manager: what it tells systemd, and what it does with sockets it is given.

The test is the manager: it owns the socket that is told, and the one that listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import (
    ROOT,
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    clean_environment,
    eventually,
    http,
    require_command,
    run_llmq,
)

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
NOBODY = "http://127.0.0.1:9"  # where nothing listens
CHAT = "/v1/chat/completions"
# Puts the socket where a manager puts it, at file descriptor 3, and becomes the program.
HAND_OVER = """
import os, sys
number = int(sys.argv[1])
os.dup2(number, 3)
os.set_inheritable(3, True)
if number != 3:
    os.close(number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""
# A llmq whose event loop hangs as soon as somebody asks for its state.
HANGING = """
import sys, llmq
def hang(*_, **__):
    open(FIFO).read()
FIFO = sys.argv.pop()
llmq.snapshot = hang
sys.exit(llmq.main())
"""


class Manager:
    """The service manager's socket, and what was heard there, in order."""

    def __init__(self, abstract: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="llmq-test-")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        place = f"{self.folder.name}/notify"
        self.socket.bind("\0" + place if abstract else place)
        self.socket.setblocking(False)
        self.name = "@" + place if abstract else place
        self.heard: list[str] = []

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.folder.cleanup()

    @property
    def env(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.name}

    async def hear(self) -> list[str]:
        """The next message, as its lines."""
        data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        facts = data.decode().split("\n")
        self.heard += facts
        return facts

    async def until(self, pattern: str) -> str:
        """The next fact that matches; the test's deadline ends the wait."""
        while True:
            for fact in await self.hear():
                if re.search(pattern, fact):
                    return fact

    def rest(self) -> list[str]:
        """All that was ever heard, what lies unread included."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self.socket.recv(65536).decode().split("\n")
        return self.heard


# ---- What it tells ---------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
async def test_ready_is_told_once_and_only_when_it_listens(abstract: bool) -> None:
    if abstract and not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's")
    with Manager(abstract) as manager, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        flags = ("--port", str(port), "--backend", NOBODY)
        async with Process(*flags, env=manager.env, ready=False) as p:
            assert await manager.hear() == ["READY=1"]
            assert (await ask(port, "GET", "/health")).status == 200
            assert await p.ended() == 0
        assert manager.rest().count("READY=1") == 1


@pytest.mark.parametrize(("flags", "code"), [(["--slots", "0"], 2), ([], 78)])
async def test_what_cannot_start_is_never_ready(flags: list[str], code: int) -> None:
    with Manager() as manager, socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_llmq("--port", port, *flags, "--backend", NOBODY, env=manager.env)
        assert ended.returncode == code
        assert len(ended.stderr.splitlines()) == 1
        assert manager.rest() == []


async def test_status_says_address_mode_and_how_much_there_is_to_do() -> None:
    with Manager() as manager:
        async with FakeBackend(auto=False) as fake:
            flags = ("--port", "0", "--backend", fake.url)
            async with Process(*flags, env=manager.env) as p:
                first = await manager.until("^STATUS=")
                assert first == f"STATUS=http://127.0.0.1:{p.port}, open: 0 waiting, 0 running"
                chats = [asyncio.ensure_future(ask_chat(p.port, str(n))) for n in range(3)]
                await manager.until("^STATUS=.* open: 2 waiting, 1 running$")
                change = {"mode": "paused"}
                assert (await ask(p.port, "POST", "/llmq/mode", json=change)).status == 200
                await manager.until("^STATUS=.* paused: 2 waiting, 1 running$")
                fake.auto = True
                await (await fake.arrived()).answer("done")
                await ask(p.port, "POST", "/llmq/mode", json={"mode": "open"})
                assert [(await one).status for one in chats] == [200, 200, 200]
                await manager.until("^STATUS=.* open: 0 waiting, 0 running$")
                assert await p.ended() == 0
        assert not [fact for fact in manager.rest() if fact.startswith("WATCHDOG")]


async def test_stopping_is_told_at_once_and_more_time_asked_for_while_it_drains() -> None:
    with Manager() as manager:
        async with FakeBackend(auto=False) as fake:
            flags = ("--port", "0", "--backend", fake.url)
            async with Process(*flags, env=manager.env) as p:
                one = asyncio.ensure_future(ask_chat(p.port, "x"))
                request = await fake.arrived()
                await manager.until("^STATUS=.* 1 running$")
                before = manager.rest()
                assert not [fact for fact in before if fact.startswith("EXTEND")]
                p.signal(signal.SIGTERM)
                await manager.until("^STOPPING=1$")
                for _ in range(2):
                    more = await manager.until("^EXTEND_TIMEOUT_USEC=")
                    assert int(more.partition("=")[2]) > 5_000_000
                assert [f for f in manager.heard if re.search("stopping: 0 waiting, 1 running$", f)]
                await request.answer("well")
                assert (await one).content == "well"
                assert await p.ended(0) == 0


async def test_watchdog_hears_each_beat_before_its_time_is_up() -> None:
    with Manager() as manager:
        env = {**manager.env, "WATCHDOG_USEC": "1500000"}
        async with Process("--port", "0", "--backend", NOBODY, env=env) as p:
            for _ in range(4):
                await asyncio.wait_for(manager.until("^WATCHDOG=1$"), 1.5)
            assert await p.ended() == 0


async def test_watchdog_of_another_process_hears_nothing() -> None:
    with Manager() as manager:
        env = {**manager.env, "WATCHDOG_USEC": "90000", "WATCHDOG_PID": "1"}
        async with Process("--port", "0", "--backend", NOBODY, env=env) as p:
            for mode in ("paused", "open"):
                await ask(p.port, "POST", "/llmq/mode", json={"mode": mode})
                await manager.until(f"^STATUS=.* {mode}: ")
            assert await p.ended() == 0
        assert not [fact for fact in manager.rest() if fact.startswith("WATCHDOG")]


async def test_watchdog_hears_no_more_from_a_loop_that_hangs_and_the_log_says_where(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Manager() as manager:
        env = {**manager.env, "WATCHDOG_USEC": "900000", "PYTHONPATH": str(ROOT)}
        p = Process("--port", "0", "--backend", NOBODY, env=env)
        p.command = [sys.executable, "-c", HANGING, *p.command[2:], str(fifo)]
        async with p:
            await manager.until("^WATCHDOG=1$")
            async with await Raw.open(p.port) as client:
                await client.send(http("GET", "/llmq/status"))
                held = await eventually(lambda: writer(fifo))  # and nothing comes: it hangs
                manager.rest()
                with pytest.raises(asyncio.TimeoutError):  # as systemd finds out
                    await asyncio.wait_for(manager.until("^WATCHDOG=1$"), 0.9)
                assert await p.ended(signal.SIGABRT) == -signal.SIGABRT
                held.close()
        assert re.search(r'File ".*llmq\.py", line \d+ in ', p.output)
        assert "in hang" in p.output


def writer(fifo: Path) -> Any:
    """The other end of it, once somebody reads."""
    try:
        return open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb")
    except OSError:
        return None


@pytest.mark.parametrize("place", ["/nowhere/notify", "@nobody-listens-here", "relative"])
async def test_manager_that_is_not_there_changes_nothing(place: str) -> None:
    env = {"NOTIFY_SOCKET": place, "WATCHDOG_USEC": "30000"}
    async with Process("--port", "0", "--backend", NOBODY, env=env) as p:
        assert (await ask(p.port, "GET", "/health")).status == 200
        assert await p.ended() == 0
        assert "Traceback" not in p.output


async def test_manager_that_does_not_listen_holds_up_nothing() -> None:
    with Manager() as manager:
        env = {**manager.env, "WATCHDOG_USEC": "3000"}  # a thousand messages a second
        async with Process("--port", "0", "--backend", NOBODY, env=env) as p:
            sent = 0
            while sent < 10 or not full(manager):
                assert (await ask(p.port, "GET", "/health")).status == 200
                sent += 1
            assert (await ask(p.port, "GET", "/health")).status == 200
            assert await p.ended() == 0


def full(manager: Manager) -> bool:
    """Whether the manager's socket takes no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one_more:
        one_more.setblocking(False)
        try:
            one_more.sendto(
                b"X=1", "\0" + manager.name[1:] if manager.name[0] == "@" else manager.name
            )
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("asked", ["", "soon", "-1", "0"])
async def test_odd_watchdog_is_none(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", asked)
    assert llmq.watchdog_seconds() == 0
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    assert llmq.watchdog_seconds() == 1.5
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert llmq.watchdog_seconds() == 1.5


# ---- Sockets that it is given ----------------------------------------------------------------


async def ask_chat(port: int, text: str) -> Any:
    return await ask(port, "POST", CHAT, json=chat(text))


async def begin(port: int, text: str, stream: bool = False) -> Raw:
    """A client that has sent its request and waits."""
    client = await Raw.open(port)
    body = json.dumps(chat(text, stream)).encode()
    await client.send(http("POST", CHAT, {"Content-Type": "application/json"}, body))
    return client


def listening(kind: int = socket.AF_INET) -> socket.socket:
    """What the manager holds: it stays open over every restart."""
    held = socket.socket(kind)
    held.bind(("127.0.0.1", 0) if kind == socket.AF_INET else ("::1", 0))
    held.listen(1024)
    return held


def given(held: socket.socket, *flags: str, ready: bool = True, **env: str) -> Process:
    """llmq as a manager starts it, the socket in its hands."""
    p = Process(*flags, pass_fds=(held.fileno(),), ready=ready, env=env)
    p.command = [sys.executable, "-c", HAND_OVER, str(held.fileno()), *p.command]
    return p


def activated(held: socket.socket, *flags: str, **env: str) -> Process:
    """llmq behind systemd-socket-activate, which starts it when the first client comes."""
    activator = require_command("systemd-socket-activate")
    p = given(held, *flags, ready=False)
    kept = {**clean_environment(p.home.name), "PYTHONUNBUFFERED": "1", **env}
    passed = [f"--setenv={name}={value}" for name, value in kept.items()]
    at = p.command.index(str(held.fileno())) + 1
    p.command[at:at] = [activator, *passed]
    return p


async def test_given_socket_is_served_in_place_of_the_port_of_the_settings() -> None:
    with listening() as held, socket.create_server(("127.0.0.1", 0)) as taken:
        port = held.getsockname()[1]
        async with given(held, "--demo", "--port", str(taken.getsockname()[1])) as p:
            assert p.port == port
            assert f"llmq {llmq.__version__} on http://127.0.0.1:{port}\n" in p.output
            answer = await ask(port, "POST", CHAT, json=chat("hello there", model="echo"))
            assert answer.content == "hello there"
            assert await p.ended() == 0


async def test_all_given_sockets_are_served() -> None:
    with listening() as four, contextlib.ExitStack() as stack:
        try:
            six = stack.enter_context(listening(socket.AF_INET6))
        except OSError:
            pytest.skip("no IPv6 here")
        settings = build_settings({"backends": [NOBODY]})
        service = llmq.Service(settings, sockets=[four.dup(), six.dup()])
        await service.start()
        ports = [one.getsockname()[1] for one in (four, six)]
        assert service.addresses == [f"http://127.0.0.1:{ports[0]}", f"http://[::1]:{ports[1]}"]
        for host, port in zip(("127.0.0.1", "::1"), ports):
            async with await Raw.open(port, host) as client:
                await client.send(http("GET", "/health"))
                assert (await client.response()).status == 200
        await service.stop()


async def test_socket_meant_for_another_process_is_left_alone() -> None:
    with listening() as held:
        p = given(held, "--demo", "--port", "0")
        p.command[2] = HAND_OVER.replace("str(os.getpid())", "'1'")
        async with p:
            assert p.port != held.getsockname()[1]
            assert await p.ended() == 0


@pytest.mark.parametrize("what", ["closed", "not listening", "datagrams", "no TCP"])
async def test_what_is_no_listening_tcp_socket_is_refused_in_one_line(
    what: str, tmp_path: Path
) -> None:
    family = socket.AF_UNIX if what == "no TCP" else socket.AF_INET
    kind = socket.SOCK_DGRAM if what == "datagrams" else socket.SOCK_STREAM
    with socket.socket(family, kind) as odd:
        if what == "no TCP":
            odd.bind(str(tmp_path / "s"))
            odd.listen()
        p = given(odd, "--demo", ready=False)
        if what == "closed":
            p.command[2] = HAND_OVER.replace('LISTEN_FDS="1"', 'LISTEN_FDS="2"')
        async with p:
            assert await p.ended(0) == 78
            (line,) = p.output.splitlines()
            assert line.startswith("llmq: LISTEN_FDS: ")


class Elsewhere:
    """In place of a socket that is open to the network: none is opened for a test."""

    def getsockname(self) -> tuple[str, int]:
        return ("0.0.0.0", 11500)


async def test_given_socket_beyond_this_box_needs_the_word_that_it_is_meant() -> None:
    with listening() as held:
        settings = build_settings({"backends": [NOBODY]})
        service = llmq.Service(settings, sockets=[held, Elsewhere()])
        with pytest.raises(llmq.ConfigError, match=r"host 0\.0\.0\.0: .* --allow-anonymous-lan"):
            await service.start()
        assert "*" in service.api.names


def test_variables_of_the_hand_over_are_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PID": str(os.getpid()), "FDS": "0", "FDNAMES": "a"}.items():
        monkeypatch.setenv("LISTEN_" + name, value)
    assert llmq.inherited_sockets() == []
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


# ---- A restart -------------------------------------------------------------------------------


@pytest.mark.deadline(40)
async def test_all_of_200_requests_sent_during_a_restart_are_answered() -> None:
    with listening() as held, Manager() as manager:
        port = held.getsockname()[1]
        async with FakeBackend(auto=False) as fake:
            flags = ("--backend", fake.url)
            async with activated(held, *flags, **manager.env) as old:
                client = await begin(port, "stream", stream=True)  # wakes the activator
                request = await fake.arrived()
                await request.start_stream()
                await request.piece("one ")
                await client.until(b"one ")
                old.signal(signal.SIGTERM)
                await manager.until("^STOPPING=1$")
                during = [await begin(port, f"during {n}") for n in range(100)]
                await request.piece("two")
                await request.finish_stream()
                assert b"[DONE]" in await client.until(b"0\r\n\r\n")
                assert await old.ended(0) == 0
            fake.auto = True
            between = [await begin(port, f"between {n}") for n in range(100)]
            async with activated(held, *flags) as new:
                for n, one in enumerate(during):
                    answer = await one.response()
                    assert (answer.status, answer.content) == (200, f"during {n}")
                for n, one in enumerate(between):
                    answer = await one.response()
                    assert (answer.status, answer.content) == (200, f"between {n}")
                assert await new.ended() == 0
            assert len(fake.requests) == 201


@pytest.mark.deadline(60)
async def test_clients_that_ask_all_the_time_do_not_notice_restarts() -> None:
    """Three restarts in the middle of it: also what was just accepted is answered, with 200."""
    answers: list[tuple[int, bool]] = []
    over = asyncio.Event()

    async def keep_asking(port: int, name: str) -> None:
        while not over.is_set():
            answer = await ask_chat(port, f"{name} {len(answers)}")
            answers.append((answer.status, answer.clean))

    with listening() as held:
        port = held.getsockname()[1]
        async with FakeBackend() as fake:
            flags = ("--backend", fake.url, "--slots", "8")
            clients = [asyncio.ensure_future(keep_asking(port, f"c{n}")) for n in range(8)]
            for turn in range(1, 4):
                async with given(held, *flags) as p:
                    await eventually(lambda: len(answers) > 70 * turn, 20)  # noqa: B023
                    assert await p.ended() == 0
            async with given(held, *flags) as p:
                await eventually(lambda: len(answers) > 280, 20)
                over.set()
                await asyncio.gather(*clients)
                assert await p.ended() == 0
    assert set(answers) == {(200, True)}


async def test_new_connection_that_says_nothing_does_not_hold_up_the_stop() -> None:
    with listening() as held:
        async with given(held, "--demo") as p:
            async with await Raw.open(p.port) as silent:
                assert (await ask(p.port, "GET", "/health")).status == 200  # it is accepted
                assert await p.ended(seconds=4) == 0
                assert await silent.closed() == "eof"


async def test_connection_accepted_before_the_stop_may_still_speak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "STOP_SECONDS", 0)
    with listening() as held:
        settings = build_settings({"backends": [NOBODY]})
        service = llmq.Service(settings, sockets=[held.dup()])
        await service.start()
        clients = [await Raw.open(service.port) for _ in range(2)]
        await eventually(lambda: len(service._servers[0].connections) == len(clients))
        stop = asyncio.ensure_future(service.stop())
        await service.stopping.wait()
        for client in clients:  # one after the other, so that the second is late
            await client.send(http("GET", "/health"))
            answer = await client.response()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        await stop


async def test_what_comes_while_it_stops_stays_for_the_next_one() -> None:
    with listening() as held:
        settings = build_settings({"backends": [NOBODY], "server.drain_timeout": 1})
        service = llmq.Service(settings, sockets=[held.dup()])
        await service.start()
        stop = asyncio.ensure_future(service.stop())
        await service.stopping.wait()
        async with await Raw.open(service.port) as client:
            await client.send(http("GET", "/health"))
            await stop
            held.setblocking(False)
            taken, _ = await asyncio.get_running_loop().sock_accept(held)
            with taken:
                assert b"GET /health" in await asyncio.get_running_loop().sock_recv(taken, 4096)
