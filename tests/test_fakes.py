"""The fakes are proven first: against urllib and http.client, which share no code with them."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests import fakes
from tests.fakes import (
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    chunk,
    eventually,
    need,
    require,
    require_command,
    sse,
    words,
)
from tests.fakes import (
    http as request_bytes,
)

CHAT = "/v1/chat/completions"


async def in_thread(work: Any, *arguments: Any) -> Any:
    """A blocking standard-library client beside the loop that serves it."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


def fetch(url: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=5) as answer:  # noqa: S310
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


# ---- The backend, judged by the standard library's clients -----------------------------------


async def test_urllib_reads_whole_answers_that_echo_the_last_user_message():
    async with FakeBackend() as fake:
        status, headers, body = await in_thread(fetch, fake.url + CHAT, chat("one  two\nthree "))
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["choices"][0]["message"]["content"] == "one  two\nthree "
    assert json.loads(body)["usage"]["completion_tokens"] == 3


async def test_urllib_reads_streams_word_by_word():
    body = chat("one  two\nthree ", stream=True, stream_options={"include_usage": True})
    async with FakeBackend() as fake:
        _, headers, data = await in_thread(fetch, fake.url + CHAT, body)
    assert headers["Content-Type"] == "text/event-stream"
    events = [line[6:] for line in data.decode().split("\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [c["delta"] for e in events[:-1] for c in json.loads(e)["choices"]]
    assert [d["content"] for d in deltas if d] == ["one", "  two", "\nthree "]
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 3


async def test_http_client_keeps_one_connection_for_many_requests():
    def work(port: int) -> list[int]:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        statuses = []
        for text in ("a", "b", "c"):
            client.request("POST", CHAT, json.dumps(chat(text)))
            statuses.append(client.getresponse().read() and 200)
        client.close()
        return statuses

    async with FakeBackend() as fake:
        assert await in_thread(work, fake.port) == [200, 200, 200]
        assert fake.connections == 1
        assert [r.text for r in fake.requests] == ["a", "b", "c"]
        assert len({r.connection for r in fake.requests}) == 1


async def test_http_client_may_send_chunked_bodies():
    def work(port: int) -> Any:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        data = json.dumps(chat("in pieces")).encode()
        client.request("POST", CHAT, iter([data[:10], data[10:]]), encode_chunked=True)
        try:
            return json.loads(client.getresponse().read())
        finally:
            client.close()

    async with FakeBackend() as fake:
        answer = await in_thread(work, fake.port)
        assert fake.requests[0].headers["transfer-encoding"] == "chunked"
    assert answer["choices"][0]["message"]["content"] == "in pieces"


@pytest.mark.parametrize(
    ("kind", "path", "status", "part"),
    [
        ("openai", "/v1/models", 200, '"id": "m"'),
        ("openai", "/api/version", 404, "not found"),
        ("openai", "/health", 404, "not found"),
        ("ollama", "/", 200, "Ollama is running"),
        ("ollama", "/api/version", 200, '"version"'),
        ("ollama", "/api/tags", 200, '"name": "m"'),
        ("ollama", "/api/ps", 200, '"models": []'),
        ("ollama", "/v1/models", 200, '"library"'),
        ("llamacpp", "/v1/models", 200, '"owned_by": "llamacpp"'),
        ("llamacpp", "/health", 200, '"ok"'),
        ("llamacpp", "/props", 200, '"total_slots": 1'),
        ("llamacpp", "/api/tags", 404, "not found"),
        ("lmstudio", "/api/v0/models", 200, '"id": "m"'),
        ("vllm", "/version", 200, '"version"'),
    ],
)
async def test_each_kind_answers_its_own_probes(kind: str, path: str, status: int, part: str):
    async with FakeBackend(kind=kind) as fake:
        seen, headers, body = await in_thread(fetch, fake.url + path)
        assert (seen, part in body.decode()) == (status, True)
        assert (headers.get("Server") == "llama.cpp") == (kind == "llamacpp")
        assert fake.probes == 1
        assert fake.probe_paths == [path]
        assert not fake.requests


async def test_probes_can_be_steered():
    async with FakeBackend(kind="ollama") as fake:
        fake.models = ["a", "b"]
        fake.loaded = ["b"]
        assert [m["name"] for m in (await ask(fake.port, "GET", "/api/tags")).json()["models"]] == [
            "a",
            "b",
        ]
        assert (await ask(fake.port, "GET", "/api/ps")).json()["models"][0]["name"] == "b"
        fake.probe_status = 503
        assert (await ask(fake.port, "GET", "/api/tags")).status == 503
        assert (await ask(fake.port, "GET", "/props")).status == 404
        fake.probe_answers["/api/tags"] = (200, b"{not json")
        assert (await ask(fake.port, "GET", "/api/tags")).body == b"{not json"
        assert (await ask(fake.port, "HEAD", "/api/tags")).headers["content-length"] == "9"
        fake.hold_probes()
        waiting = asyncio.ensure_future(ask(fake.port, "GET", "/api/ps"))
        await eventually(lambda: fake.probe_paths[-1] == "/api/ps" and fake.probes == 7)
        assert not waiting.done()
        fake.release_probes()
        assert (await waiting).status == 503


# ---- By hand ---------------------------------------------------------------------------------


async def test_a_stream_can_be_sent_piece_by_piece():
    async with FakeBackend(auto=False) as fake, await Raw.open(fake.port) as c:
        await c.send(request_bytes("POST", CHAT, None, json.dumps(chat("x", True)).encode()))
        request = await fake.arrived()
        assert (request.method, request.path, request.headers["host"]) == (
            "POST",
            CHAT,
            "127.0.0.1",
        )
        assert request.raw.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert fake.active == 1
        await request.start_stream([("X-Mark", "7")])
        assert (await c.head()).headers["x-mark"] == "7"
        events = c.events()
        for word in ("one", " two"):
            await request.piece(word)
            assert (await events.__anext__())["choices"][0]["delta"] == {"content": word}
        await request.finish_stream()
        rest = [event async for event in events]
        assert (rest[0]["choices"][0]["finish_reason"], rest[1]) == ("stop", "[DONE]")
        assert fake.active == 0
        assert fake.max_active == 1


async def test_a_request_can_be_refused_and_answered_with_raw_bytes():
    async with FakeBackend(auto=False) as fake, await Raw.open(fake.port) as c:
        await c.send(request_bytes("POST", CHAT, None, b"{}"))
        await (await fake.arrived()).status(503, fakes.LOADING, [("Retry-After", "3")])
        answer = await c.response()
        assert (answer.status, answer.headers["retry-after"], answer.clean) == (503, "3", True)
        await c.send(request_bytes("POST", CHAT, None, b"{}"))
        await (await fake.arrived()).send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        assert (await c.response()).body == b"hi"


async def test_a_connection_can_be_closed_or_reset_under_an_answer():
    promise = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
    async with FakeBackend(auto=False) as fake:
        for broken in ("close", "reset"):
            async with await Raw.open(fake.port) as c:
                await c.send(request_bytes("POST", CHAT, None, b"{}"))
                request = await fake.arrived()
                await request.send(promise)
                await c.head()
                getattr(request, broken)()
                answer = await c.response()
                assert not answer.clean
                assert c.ended == {"close": "eof", "reset": "reset"}[broken]
                assert fake.active == 0


@pytest.mark.parametrize("way", ["close", "rst", "fin"])
async def test_a_leaving_client_is_seen_at_once_however_it_leaves(way: str):
    async with FakeBackend(auto=False) as fake:
        c = await Raw.open(fake.port)
        await c.send(request_bytes("POST", CHAT, None, b"{}"))
        request = await fake.arrived()
        assert fake.active == 1
        getattr(c, way)()
        assert fake.active == 0  # by the socket itself, before the loop has met it
        await request.left()
        assert request.done.is_set()


async def test_two_at_once_are_seen_as_two_and_held_until_released():
    async with FakeBackend() as fake:
        fake.hold()
        asks = [ask(fake.port, "POST", CHAT, json=chat(text)) for text in ("a", "b")]
        waiting = asyncio.gather(*asks)
        await eventually(lambda: fake.active == 2)
        fake.release()
        assert [answer.content for answer in await waiting] == ["a", "b"]
        assert fake.max_active == 2
        assert fake.active == 0


async def test_a_backend_can_go_and_come_back_on_its_port():
    async with FakeBackend() as fake:
        c = await Raw.open(fake.port)
        port = fake.port
        await fake.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            await Raw.open(port)
        await c.send(request_bytes("GET", "/v1/models"))
        assert (await c.response()).status == 200, "connections that are there go on"
        fake.drop_connections()
        assert await c.closed() == "reset"
        await fake.listen_again()
        assert fake.port == port
        assert (await ask(port, "GET", "/v1/models")).status == 200


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"POST /x HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "0 Host lines"),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nBad Name: 1\r\n\r\n", "bad line"),
        (b"POST /x HTTP/1.0\r\nHost: a\r\n\r\n", "bad request line"),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
            "more than one framing",
        ),
        (2 * b"POST /x HTTP/1.1\r\nHost: a\r\n\r\n", "pipelined"),
    ],
)
async def test_a_backend_notes_where_http_is_broken(data: bytes, word: str):
    with pytest.raises(AssertionError, match=word):
        await break_the_rules(data)


async def break_the_rules(data: bytes) -> None:
    async with FakeBackend(auto=False) as fake, await Raw.open(fake.port) as c:
        await c.send(data)
        await eventually(lambda: fake.faults)


# ---- The client, judged by sockets that say what they should not ------------------------------


async def answer_of(
    data: bytes, method: str = "GET", reset: bool = False
) -> tuple[fakes.Answer, str]:
    """What `Raw` makes of a server that says `data` and ends the connection."""
    done: asyncio.Queue[Any] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        if reset:
            await reader.readuntil(b"go")
            fakes.Connection(1, reader, writer).reset()
        writer.close()
        done.put_nowait(None)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, await Raw.open(server.sockets[0].getsockname()[1]) as c:
        await c.send(request_bytes(method, "/"))
        await c.head()
        if reset:
            await c.send(b"go")
        answer = await c.response()
        ended = await c.closed()
        await done.get()
    return answer, ended


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "body", "clean"),
    [
        (OK + b"Content-Length: 5\r\n\r\nwhole", b"whole", True),
        (OK + b"Content-Length: 9\r\n\r\nhalf", b"half", False),
        (OK + b"\r\nto the end", b"to the end", True),
        (CHUNKED + chunk(b"one") + chunk(b"two") + b"0\r\n\r\n", b"onetwo", True),
        (CHUNKED + chunk(b"one") + b"0\r\nX: 1\r\n\r\n", b"one", True),
        (CHUNKED + chunk(b"one") + b"0\r\n", b"one", False),
        (CHUNKED + chunk(b"one"), b"one", False),
        (CHUNKED + chunk(b"one") + b"5\r\ntw", b"onetw", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\nx", b"x", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    ],
)
async def test_an_answer_is_clean_only_if_its_framing_ended(data: bytes, body: bytes, clean: bool):
    answer, ended = await answer_of(data)
    assert (answer.body, answer.clean, ended) == (body, clean, "eof")


async def test_an_answer_without_a_length_that_is_reset_is_unclean():
    answer, ended = await answer_of(OK + b"\r\npart", reset=True)
    assert (answer.body, answer.clean, ended) == (b"part", False, "reset")


async def test_a_head_answer_has_no_body():
    answer, _ = await answer_of(OK + b"Content-Length: 5\r\n\r\n", method="HEAD")
    assert (answer.body, answer.clean) == (b"", True)


def test_events_are_complete_or_not_events():
    answer = fakes.Answer(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream")
    answer.body = b": ping\n\n" + sse({"a": 1}) + sse("[DONE]") + b"data: half"
    assert answer.events() == [{"a": 1}, "[DONE]"]


def test_words_lose_nothing():
    for text in ("", " ", "a", " a  b\n\nc ", "a b", "\n"):
        assert "".join(words(text)) == text


# ---- The frame around each test --------------------------------------------------------------


def test_what_a_machine_lacks_is_a_skip_here_and_a_failure_where_all_is_required(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("LLMQ_REQUIRE_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_module"):
        require("no_such_module")
    with pytest.raises(pytest.skip.Exception, match="because"):
        require_command("no-such-program", "because")
    monkeypatch.setenv("LLMQ_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="a reason"):
        need(False, "a reason")
    assert require("json") is json


FRAME = """
import asyncio, socket, threading
import pytest

@pytest.mark.deadline(0.3)
async def test_hangs():
    await asyncio.get_running_loop().create_future()

@pytest.mark.deadline(0.3)
def test_blocks():
    threading.Event().wait()

async def test_fails_unseen():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()

async def test_leaves_a_task_of_llmq():
    names = {"asyncio": asyncio}
    code = "async def stray(): await asyncio.get_running_loop().create_future()"
    exec(compile(code, "llmq.py", "exec"), names)
    names["task"] = asyncio.ensure_future(names["stray"]())

async def test_forgets_an_await():
    asyncio.Event().wait()

async def test_leaves_a_socket_open():
    socket.socket()

@pytest.fixture
def five():
    return 5

@pytest.mark.parametrize("six", [6])
async def test_passes(five, six):
    assert (five, six) == (5, 6)
"""


@pytest.mark.deadline(30)
def test_a_test_that_hangs_blocks_fails_unseen_or_forgets_fails(tmp_path: Any):
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "fakes.py"):
        (root / "tests" / name).write_bytes((fakes.ROOT / "tests" / name).read_bytes())
    (root / "pyproject.toml").write_bytes((fakes.ROOT / "pyproject.toml").read_bytes())
    (root / "tests" / "test_frame.py").write_text(FRAME)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = {name: value for name, value in os.environ.items() if name[:3] not in ("COV", "PYT")}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert "6 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "it waited at:\n  test_frame.py:7 in test_hangs" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "still running: stray" in done.stdout


STUB = """
import signal, sys, os
print("warming up", flush=True)
print("llmq on http://127.0.0.1:4711 and [::1]", flush=True)
print(sorted(os.environ), file=sys.stderr, flush=True)
print(sys.argv[1:], file=sys.stderr, flush=True)
signal.sigwait([signal.SIGTERM, signal.SIGHUP])
print("bye", flush=True)
sys.exit(7)
"""


@pytest.fixture
def stub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of llmq.py that masks the two signals and says good-bye."""
    text = STUB.replace("print(", "signal.pthread_sigmask(0, [1, 15]); print(", 1)
    (tmp_path / "stub.py").write_text(text)
    monkeypatch.setattr(fakes, "LLMQ", tmp_path / "stub.py")
    monkeypatch.setenv("LLMQ_SERVER_PORT", "1")


@pytest.mark.usefixtures("stub")
def test_a_process_is_started_clean_read_and_stopped():
    with Process("--port", "0", env={"EXTRA": "1"}) as p:
        assert p.port == 4711
        p.wait_for("--port")
        assert "'EXTRA'" in p.output
        assert "LLMQ_SERVER_PORT" not in p.output
        assert p.stop() == 7
        assert p.output.endswith("bye\n")


@pytest.mark.usefixtures("stub")
async def test_a_process_beside_a_loop_is_awaited():
    async with Process() as p:
        await p.line("HOME")
        assert await p.ended(fakes.signals.SIGHUP) == 7


@pytest.mark.usefixtures("stub")
def test_a_process_without_the_expected_line_fails_with_its_output():
    with Process() as p, pytest.raises(AssertionError, match="warming up"):
        p.wait_for("never said", seconds=0)


async def test_eventually_fails_with_the_place_of_the_predicate():
    with pytest.raises(AssertionError, match=r"test_fakes\.py:\d+"):
        await eventually(lambda: False, seconds=0)
    assert await eventually(lambda: socket) is socket
