"""A backend may refuse, break, stall or lie: the client gets the truth, and the slot is free."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import llmq
from tests.fakes import (
    LOADING,
    Answer,
    FakeBackend,
    FakeRequest,
    Raw,
    ask,
    black_hole,
    chat,
    chunk,
    eventually,
    http,
    render_answer,
    render_head,
    running,
    sse,
)

pytestmark = pytest.mark.untraced  # others cover the lines behind these

RECORDINGS = Path(__file__).parent / "real" / "recordings"
each_shape = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
SECOND = 1.0  # the contract: after a failure the next one starts within a second
PROBED = {"upstream__probe_interval": 0.2}  # so that a backend's going and coming is soon known
GOOD = {"choices": [{"index": 0, "message": {"content": "good"}, "finish_reason": "stop"}]}
GOOD_BODY = json.dumps(GOOD).encode()
JSON = [("Content-Type", "application/json")]
EVENTS = [("Content-Type", "text/event-stream")]


def said(text: str, finish: str | None = None) -> bytes:
    """One event of a stream."""
    return sse({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


def assert_error(answer: Answer, status: int, code: str | None = None) -> None:
    """A whole error in the OpenAI shape: the backend's own, or llmq's with its code."""
    assert (answer.status, answer.clean) == (status, True), answer
    assert answer.headers["content-type"].startswith("application/json"), answer
    error = answer.json()["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    if code:
        assert {"message", "type", "param", "code"} <= error.keys(), answer
        assert error["code"] == code, answer


def assert_broken_stream(answer: Answer, text: str) -> None:
    """What came was delivered, then an error event, and no end that looks like a success."""
    assert answer.status == 200, answer
    assert answer.content == text
    *_, last = answer.events()
    assert isinstance(last, dict), answer
    assert last["error"]["message"], answer
    assert not answer.clean, answer
    assert b"[DONE]" not in answer.body
    assert b'"stop"' not in answer.body


def assert_retry_after(answer: Answer) -> None:
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def start(q: running, text: str, **more: Any) -> asyncio.Future[Answer]:
    """One chat in the background."""
    return asyncio.ensure_future(q.chat(text, **more))


async def arrival(*fakes: FakeBackend) -> tuple[FakeBackend, FakeRequest]:
    """The next request at any of these backends."""
    fake = await eventually(lambda: next((fake for fake in fakes if fake.has_arrived()), None))
    return fake, await fake.arrived()


async def waiting(q: running, number: int) -> None:
    """Return once exactly so many wait; the test's deadline ends it otherwise."""
    while (await q.status())["queue"]["waiting"] != number:
        pass


async def state(q: running, name: str, number: int = 0) -> dict[str, Any]:
    """Return the backend once it is in that state; the test's deadline ends it otherwise."""
    while (backend := (await q.status())["backends"][number])["state"] != name:
        pass
    return dict(backend)


async def serves_on(q: running, fake: FakeBackend, arrived: int) -> None:
    """The slot is free at once, the next answer is its own, and nothing was sent in between."""
    asked = start(q, "and now?")
    request = await asyncio.wait_for(fake.arrived(), SECOND)
    await request.answer("well")
    answer = await asked
    assert (answer.status, answer.content, answer.clean) == (200, "well", True)
    assert len(fake.requests) == arrived + 1, "sent more often than it may be"
    assert fake.max_active == 1


# ---- Answers that are none -------------------------------------------------------------------

CHUNKED = [("Transfer-Encoding", "chunked")]
BROKEN: dict[str, bytes] = {
    "no HTTP": b"\x00\xff\xfe SSH-2.0-nonsense\r\n\r\n" * 20,
    "half a status line": b"HTTP/1.1 2",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "another version": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "a status that is no number": b"HTTP/1.1 2x0 OK\r\nContent-Length: 2\r\n\r\n{}",
    "a status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\n{}",
    "a line without a colon": b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 2\r\n\r\n{}",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
    "differing lengths": render_head(200, [*JSON, ("Content-Length", "2"), ("Content-Length", "9")])
    + GOOD_BODY,
    "a list of lengths": render_head(200, [*JSON, ("Content-Length", "2, 9")]) + GOOD_BODY,
    "a length with a sign": render_head(200, [*JSON, ("Content-Length", "+2")]) + b"{}",
    "a length with an underscore": render_head(200, [*JSON, ("Content-Length", "1_0")]) + b"{}",
    "an unknown transfer coding": render_head(200, [*JSON, ("Transfer-Encoding", "gzip, chunked")]),
    "a chunk size that is none": render_head(200, [*JSON, *CHUNKED]) + b"0x2\r\n{}\r\n0\r\n\r\n",
    "one huge header": render_head(200, [*JSON, ("X-Huge", "x" * 70_000)]) + GOOD_BODY,
    "many headers": render_head(200, [(f"X-{n}", "x" * 700) for n in range(100)]) + GOOD_BODY,
    "nothing": render_head(200, [*JSON, ("Content-Length", "0")]),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "interim answers without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 500
    + render_answer(200, GOOD_BODY),
    "a page": render_answer(200, b"<html>Welcome</html>", [("Content-Type", "text/html")]),
    "half a document": render_answer(200, b'{"choices": [{"message": {"content": "half'),
    "a body cut short": render_head(200, [*JSON, ("Content-Length", "999")]) + GOOD_BODY,
    "chunks cut short": render_head(200, [*JSON, *CHUNKED]) + chunk(GOOD_BODY),
    "a chunk cut short": render_head(200, [*JSON, *CHUNKED]) + chunk(GOOD_BODY)[:-9],
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
async def test_a_broken_whole_answer_is_a_502_and_is_not_asked_for_again(raw: bytes) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        request = await fake.arrived()
        await request.send(raw)
        request.close()
        assert_error(await asked, 502, "backend_error")
        await serves_on(q, fake, 1)


BROKEN_STREAMS = {
    name: BROKEN[name]
    for name in (
        "no HTTP",
        "half a status line",
        "half a head",
        "differing lengths",
        "one huge header",
        "nothing",
        "a page",
    )
}
BROKEN_STREAMS["no body"] = render_head(200, [*EVENTS, *CHUNKED])
BROKEN_STREAMS["no byte of a body"] = render_head(200, [*EVENTS, ("Content-Length", "0")])
BROKEN_STREAMS["an empty body"] = render_head(200, [*EVENTS, *CHUNKED]) + b"0\r\n\r\n"


@pytest.mark.parametrize("raw", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS)
async def test_a_stream_that_breaks_before_its_body_is_a_502(raw: bytes) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=True)
        request = await fake.arrived()
        await request.send(raw)
        request.close()
        assert_error(await asked, 502, "backend_error")
        await serves_on(q, fake, 1)


@each_shape
async def test_a_reset_in_the_head_is_a_502_and_is_not_asked_for_again(stream: bool) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=stream)
        request = await fake.arrived()
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Ty")
        request.reset()
        # A reset may throw away what came before it: then nothing had arrived, and one more
        # attempt is right. Either way the client is told, and the slot is free.
        outcome = asyncio.ensure_future(fake.arrived())
        await asyncio.wait([asked, outcome], return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            outcome.result().reset()
        else:
            outcome.cancel()
        assert_error(await asked, 502, "backend_error")
        await serves_on(q, fake, len(fake.requests))


BREAKS: dict[str, bytes] = {
    "the end of the connection": b"",
    "the last chunk without the end mark": b"0\r\n\r\n",
    "a chunk cut short": chunk(said("lost"))[:-9],
    "a chunk size that is none": b"what?\r\n",
    "half an event, then the last chunk": chunk(b'data: {"choices": [') + b"0\r\n\r\n",
    "an error and the end mark": chunk(sse({"error": {"message": "out of memory"}}))
    + chunk(sse("[DONE]"))
    + b"0\r\n\r\n",
    "the end mark, but no last chunk": chunk(sse("[DONE]")),
    "junk": chunk(b"}{ not json\n\n\xff\xfe\n\n") + b"0\r\n\r\n",
}


@pytest.mark.parametrize("raw", BREAKS.values(), ids=BREAKS)
async def test_a_stream_that_breaks_ends_in_an_error_and_unclean(raw: bytes) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client, request = await in_mid_stream(q, fake)
        await request.send(raw)
        request.close()
        assert_broken_stream(await client.response(), "one two")
        client.close()
        await serves_on(q, fake, 1)


async def test_a_stream_that_is_reset_ends_in_an_error_and_unclean() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client, request = await in_mid_stream(q, fake)
        request.reset()
        assert_broken_stream(await client.response(), "one two")
        client.close()
        await serves_on(q, fake, 1)


async def in_mid_stream(q: running, fake: FakeBackend) -> tuple[Raw, FakeRequest]:
    """A client that has been shown two words, and its request at the backend."""
    client = await Raw.open(q.port)
    body = json.dumps(chat("hello", stream=True)).encode()
    await client.send(http("POST", "/v1/chat/completions", dict(JSON), body))
    request = await fake.arrived()
    await request.start_stream()
    await request.piece("one ")
    await request.piece("two")
    seen = await client.until(b"two")
    client.buffer = seen + client.buffer  # to be read again, as a whole
    return client, request


async def test_a_stream_that_a_runner_interrupts_for_another_never_looks_done() -> None:
    """Recorded from llama-cpp-python: [DONE], but no finish reason and no last chunk."""
    raw = (RECORDINGS / "llama-cpp-python.interrupted-stream.response.txt").read_bytes()
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=True)
        request = await fake.arrived()
        await request.send(raw)
        request.close()
        assert_broken_stream(await asked, "")
        await serves_on(q, fake, 1)


POISON = render_answer(200, GOOD_BODY.replace(b"good", b"POISON"))


async def test_what_a_backend_sends_too_much_reaches_nobody() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        request = await fake.arrived()
        request.finished()
        await request.send(render_answer(200, GOOD_BODY) + POISON)
        answer = await asked
        assert (answer.status, b"POISON" in answer.body) in ((200, False), (502, False)), answer
        asked = start(q, "mine?")
        fresh = await fake.arrived()
        assert fresh.connection is not request.connection, "a poisoned connection was used again"
        await fresh.answer("yours")
        assert (await asked).content == "yours"


async def test_bytes_on_an_idle_pooled_connection_reach_nobody() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        request = await fake.arrived()
        await request.answer("good")
        assert (await asked).content == "good"
        await request.send(POISON)  # it is in the socket before the next request is
        asked = start(q, "mine?")
        fresh = await fake.arrived()
        assert fresh.connection is not request.connection, "a poisoned connection was used again"
        await fresh.answer("yours")
        assert (await asked).content == "yours"


# ---- Answers that are odd but right ----------------------------------------------------------

EVENT_BODY = said("good") + said("", "stop") + sse("[DONE]")
CLOSE = [("Connection", "close")]
ODD: dict[str, bytes] = {
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Type: %s\r\n\r\n%s",
    "to the end of the connection": b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n%s",
    "no reason phrase": b"HTTP/1.1 200 \r\nContent-Type: %s\r\nConnection: close\r\n\r\n%s",
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n%s",
    "odd case and spaces": b"HTTP/1.1 200 OK\r\ncOnTeNt-TyPe:\t%s \r\n\r\n%s",
}


@each_shape
@pytest.mark.parametrize("raw", ODD.values(), ids=ODD)
async def test_an_odd_answer_is_relayed(raw: bytes, stream: bool) -> None:
    shape = (b"text/event-stream", EVENT_BODY) if stream else (b"application/json", GOOD_BODY)
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=stream)
        request = await fake.arrived()
        await request.send(raw % shape)
        request.close()
        answer = await asked
        assert (answer.status, answer.body, answer.clean) == (200, shape[1], True)
        await serves_on(q, fake, 1)


@each_shape
async def test_odd_chunks_are_relayed_whole(stream: bool) -> None:
    body, kind = (EVENT_BODY, EVENTS) if stream else (GOOD_BODY, JSON)
    pieces = [body[:1], body[1:10], body[10:11], body[11:]]
    coded = b"".join(b"00%X;name=value\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    coded += b"0\r\nX-Trailer: x\r\n\r\n"
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=stream)
        request = await fake.arrived()
        request.finished()
        await request.send(render_head(200, [*kind, *CHUNKED]) + coded)
        answer = await asked
        assert (answer.status, answer.body, answer.clean) == (200, body, True)
        assert answer.trailer == b""
        await serves_on(q, fake, 1)


@each_shape
async def test_an_answer_that_drips_in_byte_by_byte_is_relayed(stream: bool) -> None:
    body, kind = (EVENT_BODY, EVENTS) if stream else (GOOD_BODY, JSON)
    raw = render_head(200, [*kind, *CHUNKED]) + chunk(body[:50]) + chunk(body[50:]) + b"0\r\n\r\n"
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=stream)
        request = await fake.arrived()
        nodelay(request)
        request.finished()
        for byte in raw:
            await request.send(bytes([byte]))
        answer = await asked
        assert (answer.status, answer.body, answer.clean) == (200, body, True)


def nodelay(request: FakeRequest) -> None:
    sock = request.connection.writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def test_an_unasked_compression_is_told_or_refused() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        request = await fake.arrived()
        assert request.headers.get("accept-encoding", "identity") == "identity"
        await request.status(200, b"\x1f\x8b\x08\x00 packed", [*JSON, ("Content-Encoding", "gzip")])
        answer = await asked
        if answer.status == 200:
            assert answer.headers["content-encoding"] == "gzip"
        else:
            assert_error(answer, 502, "backend_error")
        await serves_on(q, fake, 1)


async def test_only_named_headers_of_a_backend_are_relayed() -> None:
    kept = [("OpenAI-Processing-Ms", "12"), ("X-RateLimit-Remaining-Tokens", "9")]
    cut = [("Set-Cookie", "a=b"), ("X-Powered-By", "x"), ("Access-Control-Allow-Origin", "evil")]
    cut += [("X-Request-Id", "theirs"), ("Access-Control-Allow-Credentials", "1")]
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", headers={"X-Request-Id": "ours"})
        await (await fake.arrived()).status(200, GOOD, [*kept, *cut])
        answer = await asked
        assert answer.status == 200
        assert all(answer.headers[name.lower()] == value for name, value in kept)
        assert not set(cut) & {(name, value) for name, value in answer.header_list}
        assert not {"set-cookie", "x-powered-by"} & answer.headers.keys()
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["x-request-id"] == "ours"


@pytest.mark.parametrize("byte", ["\r", "\0", "\x7f"], ids=["CR", "NUL", "DEL"])
@pytest.mark.parametrize("name", ["Content-Type", "Retry-After", "X-RateLimit-Limit"])
async def test_a_control_character_in_a_header_injects_nothing(byte: str, name: str) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        value = f"application/json{byte}X-Injected: yes"
        await (await fake.arrived()).status(200, GOOD, [(name, value)])
        answer = await asked
        assert answer.status in (200, 502), answer
        assert byte.encode() not in answer.raw_head.replace(b"\r\n", b"")
        assert not [line for line, _ in answer.header_list if line.startswith("x-injected")]


# ---- Statuses --------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("status", [400, 409, 413, 422, 429, 503])
async def test_a_refusal_by_the_backend_keeps_status_message_and_retry_after(
    status: int, stream: bool
) -> None:
    error = {"error": {"message": "too long; 4097 > 4096", "type": "x", "param": None, "code": "y"}}
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=stream)
        await (await fake.arrived()).status(status, error, [("Retry-After", "7")])
        answer = await asked
        assert_error(answer, status)
        assert answer.json()["error"]["message"] == "too long; 4097 > 4096"
        assert answer.headers["retry-after"] == "7"
        await serves_on(q, fake, 1)


async def test_an_unknown_model_by_the_backends_word_keeps_its_404() -> None:
    error = {"message": "model 'm' not found", "type": "not_found_error", "param": None}
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        await (await fake.arrived()).status(404, {"error": {**error, "code": "model_not_found"}})
        answer = await asked
        assert_error(answer, 404)
        assert "model 'm' not found" in answer.json()["error"]["message"]
        await serves_on(q, fake, 1)


@pytest.mark.parametrize(
    "body",
    [b'{"error": "prompt too long"}', b'{"detail": "prompt too long"}', b"prompt too long"],
    ids=["error text", "detail", "plain"],
)
async def test_a_refusal_in_another_shape_becomes_an_error_object(body: bytes) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        kind = "application/json" if body.startswith(b"{") else "text/plain"
        await (await fake.arrived()).status(400, body, [("Content-Type", kind)])
        assert_error(await asked, 400)
        await serves_on(q, fake, 1)


@each_shape
@pytest.mark.parametrize("status", [401, 403])
async def test_a_backend_that_refuses_llmqs_key_is_a_502(status: int, stream: bool) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(backends={"box": {"url": fake.url, "key": "k"}}) as q:
            asked = start(q, "hello", stream=stream)
            await (await fake.arrived()).status(status, {"error": {"message": "bad key sk-secret"}})
            answer = await asked
            assert_error(answer, 502, "backend_error")
            assert "www-authenticate" not in answer.headers
            await serves_on(q, fake, 1)


SIGN_IN = {"signin_url": "https://ollama.com/connect?name=box&key=abc"}
REFUSALS: dict[str, tuple[str, Any]] = {
    "OpenAI's": ("/v1/chat/completions", {"error": {"message": "unauthorized"}, **SIGN_IN}),
    "Ollama's": ("/api/chat", {"error": "unauthorized", **SIGN_IN}),
    "Ollama's to OpenAI's client": (
        "/v1/chat/completions",
        {"error": "unauthorized", **SIGN_IN},
    ),
}


@each_shape
@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(("path", "body"), REFUSALS.values(), ids=REFUSALS)
async def test_a_backends_own_refusal_passes_where_llmq_has_no_key_there(
    path: str, body: Any, status: int, stream: bool
) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        more = {"json": {**chat("hello"), "stream": stream}}
        asked = asyncio.ensure_future(ask(q.port, "POST", path, **more))
        await (await fake.arrived()).status(status, body)
        answer = await asked
        assert (answer.status, answer.clean) == (status, True)
        assert answer.json() == body
        await serves_on(q, fake, 1)


# ---- What counts against a backend's health, and what does not -------------------------------

NO_DEATHS: dict[str, bytes] = {
    **{
        str(status): render_answer(status, b'{"error": {"message": "odd"}}', JSON)
        for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 503, 504)
    },
    "a page": render_answer(500, b"<html>oops</html>", [("Content-Type", "text/html")]),
    "a redirect": render_answer(302, b"", [("Location", "/elsewhere")]),
    "no JSON": render_answer(200, b"<html>", JSON),
    "too long": render_answer(200, b'{"x": "' + b"x" * 6000 + b'"}', JSON),
    "too long a head": render_answer(200, b"{}", [("X-Huge", "x" * 70_000)]),
    "no head that HTTP knows": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n{}",
    "a compressed one": render_answer(200, b"{}", [*JSON, ("Content-Encoding", "gzip")]),
    "an error event": render_answer(200, said("a") + sse({"error": {"message": "odd"}}), EVENTS),
    "half a stream": render_answer(200, said("a"), EVENTS),
}
DEATHS: dict[str, bytes] = {
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "half an answer": render_head(200, [*JSON, ("Content-Length", "900")]) + b'{"x": 1',
    "half a chunked stream": render_head(200, [*EVENTS, ("Transfer-Encoding", "chunked")])
    + chunk(said("a")),
}


@pytest.mark.parametrize("raw", NO_DEATHS.values(), ids=NO_DEATHS)
async def test_whatever_a_backend_answers_is_an_answer_and_no_failure(raw: bytes) -> None:
    """Four bad requests of one client cost the others nothing."""
    async with FakeBackend(auto=False) as fake, running(fake.url, upstream__max_answer=5000) as q:
        (backend,) = q.gateway.fleet.backends.values()
        await state(q, "up")
        for number in range(4):
            stream = b"event-stream" in raw
            asked = start(q, "hello", stream=stream)
            request = await asyncio.wait_for(fake.arrived(), SECOND)
            await request.send(raw)
            request.close()
            answer = await asked
            assert answer.status >= 400 or not answer.clean, answer
            assert (backend.failures, backend.usable) == (0, True), number
        await serves_on(q, fake, 4)


@pytest.mark.parametrize("answers", [{"message": []}, {"choices": 7}, [], 7, None], ids=str)
async def test_an_answer_that_cannot_be_translated_is_no_failure(answers: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        (backend,) = q.gateway.fleet.backends.values()
        await state(q, "up")
        for _ in range(4):
            body = {**chat("hello"), "stream": False}
            asked = asyncio.ensure_future(ask(q.port, "POST", "/api/chat", json=body))
            request = await asyncio.wait_for(fake.arrived(), SECOND)
            await request.status(200, answers)
            assert (await asked).status == 502
            assert (backend.failures, backend.usable) == (0, True)
        await serves_on(q, fake, 4)


@pytest.mark.parametrize("breaks", [FakeRequest.close, FakeRequest.reset], ids=["close", "reset"])
@pytest.mark.parametrize("raw", DEATHS.values(), ids=DEATHS)
async def test_connections_that_end_inside_an_answer_count_and_three_make_it_down(
    raw: bytes, breaks: Any
) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__probe_interval=60) as q:
            (backend,) = q.gateway.fleet.backends.values()
            await state(q, "up")
            fake.hold_probes()
            for number in (1, 2, 3):
                assert backend.state is llmq.State.UP
                asked = start(q, "hello", stream=b"event-stream" in raw)
                request = await fake.arrived()
                await request.send(raw)
                breaks(request)
                assert not (await asked).clean or (await asked).status == 502
                assert backend.failures == number
            assert backend.state is llmq.State.DOWN
            fake.release_probes()


async def test_time_outs_count_and_three_make_it_down() -> None:
    limits = {"upstream__probe_interval": 60, "upstream__first_byte_timeout": 0.1}
    async with FakeBackend(auto=False) as fake, running(fake.url, **limits) as q:
        (backend,) = q.gateway.fleet.backends.values()
        await state(q, "up")
        fake.hold_probes()
        for number in (1, 2, 3):
            asked = start(q, "hello")
            await fake.arrived()
            assert (await asked).status == 504
            assert backend.failures == number
        assert backend.state is llmq.State.DOWN
        fake.release_probes()


def test_a_stream_may_be_silent_for_ten_minutes_by_default() -> None:
    assert llmq.Settings().upstream.idle_timeout == 600


@each_shape
@pytest.mark.parametrize("status", [500, 502, 504])
async def test_a_failed_backend_is_told_as_such_and_not_asked_again(
    status: int, stream: bool
) -> None:
    page = b"<html><script>alert(1)</script>Bad Gateway</html>"
    for body, kind in (page, "text/html"), (b'{"error": {"message": "oops"}}', "application/json"):
        async with FakeBackend(auto=False) as fake, running(fake.url) as q:
            asked = start(q, "hello", stream=stream)
            await (await fake.arrived()).status(status, body, [("Content-Type", kind)])
            answer = await asked
            assert answer.status in (status, 502)
            assert_error(answer, answer.status)
            await serves_on(q, fake, 1)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    async with FakeBackend() as canary, FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello")
        target = [("Location", f"{canary.url}/v1/chat/completions")]
        await (await fake.arrived()).status(status, b"", target)
        answer = await asked
        assert_error(answer, 502, "backend_error")
        assert "location" not in answer.headers
        await serves_on(q, fake, 1)
        assert canary.connections == 0


# ---- Attempts --------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("breaks", [FakeRequest.close, FakeRequest.reset], ids=["close", "reset"])
async def test_a_break_before_any_byte_gets_one_more_attempt(breaks: Any, stream: bool) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = start(q, "hello", stream=stream)
        breaks(await fake.arrived())
        await (await fake.arrived()).answer("at last")
        answer = await asked
        assert (answer.status, answer.content, answer.clean) == (200, "at last", True)
        await serves_on(q, fake, 2)


@pytest.mark.parametrize("attempts", [1, 2])  # three failures in a row are another rule: down
async def test_attempts_end_at_their_number(attempts: int) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, queue__max_attempts=attempts) as q:
            asked = start(q, "hello")
            for _ in range(attempts):
                (await fake.arrived()).close()
            assert_error(await asked, 502, "backend_error")
            await serves_on(q, fake, attempts)


async def test_another_attempt_goes_before_those_who_came_later() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = [start(q, "first")]
        request = await fake.arrived()
        asked.append(start(q, "second"))
        await waiting(q, 1)
        request.close()
        for text in "first", "second":
            request = await fake.arrived()
            assert request.text == text
            await request.answer(text)
        assert [(await each).content for each in asked] == ["first", "second"]
        assert fake.max_active == 1


async def test_another_attempt_goes_to_another_backend() -> None:
    async with FakeBackend(auto=False) as one, FakeBackend(auto=False) as two:
        async with running(one.url, two.url) as q:
            await state(q, "up", 0)
            await state(q, "up", 1)
            for _ in range(4):
                asked = start(q, "hello")
                first, request = await arrival(one, two)
                request.close()
                second, request = await arrival(one, two)
                assert second is not first
                await request.answer("well")
                assert (await asked).content == "well"
                assert one.active + two.active == 0


async def test_a_refused_connection_is_tried_at_another_backend() -> None:
    async with FakeBackend() as one, FakeBackend() as two, running(one.url, two.url) as q:
        await state(q, "up", 0)
        await state(q, "up", 1)
        await one.stop_listening()
        one.drop_connections()
        for n in range(4):
            assert (await q.chat(f"hello {n}")).content == f"hello {n}"
        assert len(two.requests) == 4


async def test_a_refused_connection_with_no_other_backend_is_told() -> None:
    async with FakeBackend() as fake, running(fake.url, queue__down_wait=0.3) as q:
        await state(q, "up")
        await fake.stop_listening()
        fake.drop_connections()
        answer = await q.chat("hello")
        assert answer.status in (502, 503)
        assert_error(answer, answer.status)


@pytest.mark.parametrize("breaks", [FakeRequest.close, FakeRequest.reset], ids=["close", "reset"])
async def test_a_dead_pooled_connection_gets_a_fresh_one_outside_the_count(breaks: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__max_attempts=1) as q:
        asked = start(q, "hello")
        await (await fake.arrived()).answer("good")
        assert (await asked).content == "good"
        asked = start(q, "again")
        pooled = await fake.arrived()
        if pooled.connection is not fake.requests[0].connection:
            pytest.fail("the connection was not kept: nothing to see here")
        breaks(pooled)
        fresh = await fake.arrived()
        assert fresh.connection is not pooled.connection
        await fresh.answer("well")
        assert (await asked).content == "well"


async def test_a_fresh_connection_that_dies_too_uses_the_attempt_up() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__max_attempts=1) as q:
        asked = start(q, "hello")
        await (await fake.arrived()).answer("good")
        assert (await asked).content == "good"
        asked = start(q, "again")
        (await fake.arrived()).close()
        (await fake.arrived()).close()
        assert_error(await asked, 502, "backend_error")
        await serves_on(q, fake, 3)


async def test_a_pooled_connection_that_the_backend_closed_is_not_used() -> None:
    async with FakeBackend() as fake, running(fake.url, queue__max_attempts=1) as q:
        for n in range(20):
            assert (await q.chat(f"hello {n}")).content == f"hello {n}"
            for connection in list(fake.open):
                connection.writer.close()
        assert len(fake.requests) == 20


class Broken(FakeBackend):
    """While `broken` it hangs up on probes without a word, or is silent."""

    broken = ""

    async def _answer_probe(self, request: FakeRequest) -> None:
        if self.broken == "hangs up":
            request.reset()
        await super()._answer_probe(request)


@pytest.mark.parametrize("lately", [False, True], ids=["new", "delivered lately"])
@pytest.mark.parametrize("how", ["hangs up", "is silent"])
async def test_a_retry_is_not_spent_on_a_runner_that_no_probe_got_through_to(
    how: str, lately: bool
) -> None:
    limits = {"upstream__probe_timeout": 0.1, "upstream__probe_interval": 0.1}
    async with Broken(auto=False) as fake, running(fake.url, **limits) as q:
        if lately:
            asked = start(q, "good")
            request = await fake.arrived()
            await request.status(200, GOOD_BODY, [("Connection", "close")])
            request.close()
            assert (await asked).content == "good"
        await state(q, "up")
        asked = start(q, "hello")
        request = await fake.arrived()
        fake.broken = how
        if how == "is silent":
            fake.hold_probes()
        request.reset()
        before, sent = fake.probes, len(fake.requests)
        await eventually(lambda: fake.probes >= before + 3)  # so two have failed
        assert len(fake.requests) == sent, "sent to a runner that may be dead"
        fake.broken = ""
        fake.release_probes()
        again = await asyncio.wait_for(fake.arrived(), 5)
        await again.answer("well")
        assert (await asked).content == "well"


# ---- Loading, down and unknown ---------------------------------------------------------------


@each_shape
async def test_a_request_waits_for_a_runner_that_loads_and_is_then_served(stream: bool) -> None:
    async with FakeBackend(auto=False, kind="llamacpp") as fake, running(fake.url) as q:
        asked = [start(q, "first", stream=stream)]
        request = await fake.arrived()
        fake.probe_status = 503
        await request.status(503, LOADING)
        await state(q, "loading")
        asked.append(start(q, "second", stream=stream))
        await waiting(q, 2)
        fake.probe_status = 200
        for text in "first", "second":
            request = await fake.arrived()
            assert request.text == text
            await request.answer(text)
        assert [(await each).content for each in asked] == ["first", "second"]
        assert len(fake.requests) == 3


async def test_nothing_is_sent_to_a_runner_that_loads_since_the_start() -> None:
    async with FakeBackend(auto=False, kind="llamacpp") as fake:
        fake.probe_status = 503
        async with running(fake.url) as q:
            asked = start(q, "hello")
            await state(q, "loading")
            await waiting(q, 1)
            assert not fake.requests
            fake.probe_status = 200
            await (await fake.arrived()).answer("well")
            assert (await asked).content == "well"


@pytest.mark.deadline(25)
async def test_a_request_for_a_backend_that_is_down_waits_for_it() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, **PROBED) as q:
        await state(q, "up")
        await fake.stop_listening()
        fake.drop_connections()
        await state(q, "down")
        asked = start(q, "patience")
        await waiting(q, 1)
        await fake.listen_again()
        await (await fake.arrived()).answer("well")
        assert (await asked).content == "well"
        assert len(fake.requests) == 1


async def test_a_backend_that_stays_down_is_told_after_the_wait() -> None:
    async with FakeBackend() as fake, running(fake.url, queue__down_wait=0.5, **PROBED) as q:
        await state(q, "up")
        await fake.stop_listening()
        fake.drop_connections()
        await state(q, "down")
        for stream in False, True:
            answer = await q.chat("patience", stream=stream)
            assert_error(answer, 503, "backend_down")
            assert_retry_after(answer)
        assert not fake.requests


async def test_a_backend_that_is_down_holds_up_nobody_else() -> None:
    async with FakeBackend(models=["a"]) as dead, FakeBackend(models=["b"]) as alive:
        async with running(dead.url, alive.url, **PROBED) as q:
            await state(q, "up", 0)
            await state(q, "up", 1)
            await dead.stop_listening()
            dead.drop_connections()
            await state(q, "down", 0)
            client = await Raw.open(q.port)
            body = json.dumps(chat("patience", model="a")).encode()
            await client.send(http("POST", "/v1/chat/completions", dict(JSON), body))
            await waiting(q, 1)
            for n in range(5):
                assert (await q.chat(f"hello {n}", model="b")).content == f"hello {n}"
            client.close()
            await waiting(q, 0)


async def test_waiting_longer_than_allowed_is_told_with_the_advice_not_to_retry() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__max_wait_normal=0.3) as q:
        held = start(q, "held")
        request = await fake.arrived()
        answer = await q.chat("late")
        assert_error(answer, 503, "wait_timeout")
        assert answer.headers["x-should-retry"] == "false"
        assert_retry_after(answer)
        await request.answer("well")
        assert (await held).content == "well"
        await serves_on(q, fake, 1)


async def test_a_model_is_unknown_only_when_every_backend_has_told_its_list() -> None:
    dead = free_port()
    async with FakeBackend() as fake:
        async with running(fake.url) as q:
            assert_error(await q.chat("hello", model="other"), 404, "model_not_found")
        urls = fake.url, f"http://127.0.0.1:{dead}"
        async with running(*urls, queue__down_wait=0.3) as q:
            assert_error(await q.chat("hello", model="other"), 503, "backend_down")
            assert (await q.chat("hello")).content == "hello"
        assert len(fake.requests) == 1


async def test_a_model_that_is_new_at_the_backend_is_found_by_a_fresh_look() -> None:
    rarely = {"upstream__probe_interval": 3600}
    async with FakeBackend() as fake, running(fake.url, **rarely) as q:
        assert (await q.chat("hello")).content == "hello"
        fake.models = ["m", "new"]
        while (answer := await q.chat("hello", model="new")).status == 404:
            pass  # it looks at most once a second, and has looked at its start
        assert answer.content == "hello"


# ---- Silence ---------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("head", [False, True], ids=["nothing", "a head"])
async def test_a_silent_backend_is_a_504_and_is_cut_off_before_the_next_starts(
    stream: bool, head: bool
) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__first_byte_timeout=0.4) as q:
            asked = start(q, "hello", stream=stream)
            silent = await fake.arrived()
            if head:
                kind = EVENTS if stream else JSON
                await silent.send(render_head(200, [*kind, *CHUNKED]))
            after = start(q, "after")
            request = await fake.arrived()
            assert silent.connection.peer_closed(), "the slot was given on too early"
            await request.answer("well")
            assert_error(await asked, 504, "backend_timeout")
            assert (await after).content == "well"
            assert fake.max_active == 1
            await serves_on(q, fake, 2)


async def test_a_stream_that_falls_silent_ends_in_an_error() -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__idle_timeout=0.4) as q:
            asked = start(q, "hello", stream=True)
            silent = await fake.arrived()
            await silent.start_stream()
            await silent.piece("one")
            after = start(q, "after")
            request = await fake.arrived()
            assert silent.connection.peer_closed(), "the slot was given on too early"
            await request.answer("well")
            assert_broken_stream(await asked, "one")
            assert (await after).content == "well"
            await serves_on(q, fake, 2)


async def test_a_whole_answer_that_falls_silent_is_a_504() -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__idle_timeout=0.4) as q:
            asked = start(q, "hello")
            silent = await fake.arrived()
            await silent.send(render_head(200, [*JSON, ("Content-Length", "999")]) + b'{"choices')
            assert_error(await asked, 504, "backend_timeout")
            await asyncio.wait_for(silent.left(), SECOND)
            await serves_on(q, fake, 1)


@each_shape
async def test_the_idle_limit_does_not_begin_before_the_first_byte(stream: bool) -> None:
    """A long prompt: nothing comes for longer than tokens may be apart."""
    limits = {"upstream__idle_timeout": 0.3, "upstream__first_byte_timeout": 30}
    async with FakeBackend(auto=False) as fake, running(fake.url, **limits) as q:
        asked = start(q, "hello", stream=stream)
        request = await fake.arrived()
        if stream:
            await request.start_stream()
        other = await running_beside(limits)
        assert other.status == 200
        assert not request.connection.peer_closed()
        if stream:
            await request.piece("well")
            await request.finish_stream()
        else:
            await request.answer("well")
        assert (await asked).content == "well"


async def running_beside(limits: dict[str, Any]) -> Answer:
    """Another llmq in which the idle limit passes: the later event that proves an absence."""
    async with FakeBackend(auto=False) as fake, running(fake.url, **limits) as q:
        asked = start(q, "hello", stream=True)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("one")
        return await asked


async def test_the_backend_is_never_asked_for_more_than_its_slots_across_time_outs() -> None:
    limits = {"upstream__first_byte_timeout": 0.3, "upstream__idle_timeout": 0.3}
    async with FakeBackend(auto=False) as fake, running(fake.url, **limits) as q:
        asked = [start(q, f"hello {n}", stream=bool(n % 2)) for n in range(4)]
        for part in b"", render_head(200, [*EVENTS, *CHUNKED]), render_head(200, JSON) + b"{":
            request = await fake.arrived()  # silent at once, after the head, in the body
            assert fake.active == 1
            await request.send(part)
        await (await fake.arrived()).answer("well")
        assert [(await each).status for each in asked] == [504, 504, 504, 200]
        assert fake.max_active == 1
        await serves_on(q, fake, 4)


async def vanish(q: running, fake: FakeBackend) -> None:
    """The backend was up, and now nobody is there."""
    await state(q, "up")
    await fake.stop_listening()
    fake.drop_connections()


async def test_a_connection_that_is_not_answered_is_a_502_in_time() -> None:
    limits = {"upstream__connect_timeout": 0.3, "upstream__probe_interval": 3600}
    limits["queue__max_attempts"] = 1  # another one waits until a probe gets through
    async with FakeBackend(auto=False) as fake, running(fake.url, **limits) as q:
        await vanish(q, fake)
        with black_hole(fake.port):
            assert_error(await q.chat("hello"), 502, "backend_error")
        assert not fake.requests


@pytest.mark.parametrize("leave", [Raw.close, Raw.fin, Raw.rst], ids=["close", "fin", "reset"])
async def test_who_leaves_while_connecting_frees_the_slot(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__probe_interval=3600) as q:
            await vanish(q, fake)
            with black_hole(fake.port):
                client = await Raw.open(q.port)
                body = json.dumps(chat("leaver")).encode()
                await client.send(http("POST", "/v1/chat/completions", dict(JSON), body))
                while not (await q.status())["queue"]["running"]:
                    pass
                leave(client)
                while (await q.status())["queue"]["running"]:
                    pass
            await fake.listen_again()
            await serves_on(q, fake, 0)


# ---- Devices ---------------------------------------------------------------------------------


async def test_two_backends_on_one_host_share_one_slot() -> None:
    async with FakeBackend(auto=False) as one, FakeBackend(auto=False, models=["n"]) as two:
        async with running(one.url, two.url.replace("127.0.0.1", "localhost")) as q:
            await state(q, "up", 0)
            await state(q, "up", 1)
            asked = [start(q, f"hello {n}", model="mn"[n % 2]) for n in range(6)]
            for _ in asked:
                _, request = await arrival(one, two)
                assert one.active + two.active == 1
                await request.answer(request.text)
            assert [(await each).content for each in asked] == [f"hello {n}" for n in range(6)]
            assert (len(one.requests), len(two.requests)) == (3, 3)


async def test_the_device_setting_splits_backends_on_one_host() -> None:
    async with FakeBackend(auto=False) as one, FakeBackend(auto=False, models=["n"]) as two:
        split = {"one": {"url": one.url}, "two": {"url": two.url, "device": "gpu1"}}
        async with running(backends=split) as q:
            asked = [start(q, "hello", model=model) for model in "mn"]
            requests = [await one.arrived(), await two.arrived()]  # both at once
            for request in requests:
                await request.answer("well")
            assert [(await each).content for each in asked] == ["well", "well"]


async def test_a_backend_may_have_fewer_slots_than_its_device() -> None:
    async with FakeBackend(auto=False) as fake:
        few = {"one": {"url": fake.url, "slots": 2}}
        async with running(queue__slots=3, backends=few) as q:
            asked = [start(q, f"hello {n}") for n in range(5)]
            for _ in asked:
                request = await fake.arrived()
                assert fake.active <= 2
                await eventually(lambda: fake.has_arrived() or len(fake.requests) == 5)
                await request.answer(request.text)
            assert [(await each).content for each in asked] == [f"hello {n}" for n in range(5)]
            assert fake.max_active == 2


# ---- What the backend gets to see ------------------------------------------------------------

ALLOWED = {"accept", "content-type", "user-agent", "anthropic-version", "anthropic-beta"}
ALLOWED |= {"openai-beta", "traceparent", "host", "content-length", "connection", "via"}
ALLOWED |= {"accept-encoding"}


async def test_keys_and_other_headers_of_clients_stay_here() -> None:
    headers = {
        "Authorization": "Bearer sk-client",
        "X-Api-Key": "sk-client",
        "Cookie": "session=sk-client",
        "Proxy-Authorization": "Basic sk-client",
        "X-Forwarded-For": "10.0.0.1",
        "X-User-ID": "alice",
        "X-Queue-Priority": "high",
        "Origin": "http://localhost:3000",
        "Referer": "http://localhost:3000/?sk-client",
        "User-Agent": "tester/1",
        "OpenAI-Beta": "x=1",
        "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "Accept": "application/json",
        "Host": "localhost:1",
    }
    async with FakeBackend() as fake, running(fake.url) as q:
        assert (await q.chat("hello", headers=headers)).status == 200
        (request,) = fake.requests
        assert request.headers.keys() <= ALLOWED
        assert b"sk-client" not in request.raw
        for name in "User-Agent", "OpenAI-Beta", "Traceparent", "Accept":
            assert request.headers[name.lower()] == headers[name]
        assert request.headers["host"] == f"127.0.0.1:{fake.port}"
        assert "llmq" in request.headers["via"]


async def test_the_key_of_a_backend_comes_from_the_settings() -> None:
    async with FakeBackend() as fake, FakeBackend(models=["n"]) as other:
        both = {"one": {"url": fake.url, "key": "sk-ours"}, "two": {"url": other.url}}
        async with running(backends=both) as q:
            headers = {"Authorization": "Bearer sk-client"}
            assert (await q.chat("hello", headers=headers)).status == 200
            assert (await q.chat("hello", headers=headers, model="n")).status == 200
            assert fake.requests[0].headers["authorization"] == "Bearer sk-ours"
            assert "authorization" not in other.requests[0].headers
            assert "sk-ours" not in json.dumps(await q.status())


UNTOUCHED = [
    rb'{"model":"m","messages":[{"role":"user","content":"a\u0062\/ \ud83d\ude00"}]}',
    ' {\r\n\t"messages" : [ {"content":"\u00e9\U0001f600" , "role":"user"} ] ,'
    '"model" : "m" }\n'.encode(),
    b'{"model":"m","messages":[{"role":"user","content":"x"}],"t":1.50e0,"seed":-0,"u":null,'
    b'"big":123456789012345678901234567890,"f":0.1000000000000000055511151231257827}',
    b'{"model":"m","messages":[{"role":"user","content":"x","priority":"high","model":"z"}],'
    b'"metadata":{"priority":1,"numCtx":2,"model":"z"}}',
]


@pytest.mark.parametrize("body", UNTOUCHED, ids=["escapes", "spaces", "numbers", "nested"])
async def test_a_body_with_nothing_to_cut_arrives_byte_for_byte(body: bytes) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        headers = dict(JSON)
        path = "/v1/chat/completions?api-version=1&x=%20"
        answer = await ask(q.port, "POST", path, body=body, headers=headers)
        assert answer.status == 200, answer
        assert fake.requests[0].body == body
        assert fake.requests[0].path == path


REST = rb'"model":"m","messages":[{"role":"user","content":"a\u0062"}],"t":1.50'
CUT = [
    b'{"priority":"high",' + REST + b"}",
    b"{" + REST + b',"priority":true}',
    b'{"numCtx":4096,' + REST + b',"priority":"low"}',
    rb'{"prior\u0069ty":"high",' + REST + b"}",
    b'{"priority":null,"numCtx":4096,' + REST + b"}",
]


@pytest.mark.parametrize("body", CUT, ids=["first", "last", "both", "escaped", "adjacent"])
async def test_llmqs_own_fields_are_cut_and_every_other_byte_stays(body: bytes) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        answer = await ask(q.port, "POST", "/v1/chat/completions", body=body, headers=dict(JSON))
        assert answer.status == 200, answer
        assert fake.requests[0].body == b"{" + REST + b"}"


async def test_only_the_name_of_the_model_is_replaced_where_the_backend_knows_another() -> None:
    async with FakeBackend(models=["M:latest"], kind="vllm") as fake, running(fake.url) as q:
        body = b'{ "model" : "m", "messages":[{"role":"user","content":"m"}], "t" : 1.50 }'
        answer = await ask(q.port, "POST", "/v1/chat/completions", body=body, headers=dict(JSON))
        assert answer.status == 200, answer
        assert fake.requests[0].body == body.replace(b'"m"', b'"M:latest"', 1)


# ---- Loops -----------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_a_backend_that_is_this_llmq_itself_is_refused() -> None:
    port = free_port()
    url = f"http://localhost:{port}"
    async with running(url, server__port=port, queue__down_wait=0.3) as q:
        answer = await q.chat("hello")
        assert answer.status in (404, 502, 503, 508)
        assert_error(answer, answer.status)
        while not (backend := (await q.status())["backends"][0])["error"]:
            pass
        assert backend["state"] != "up"


async def test_a_request_that_was_here_before_is_a_loop() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        assert (await q.chat("hello")).status == 200
        via = fake.requests[0].headers["via"]
        assert_error(await q.chat("hello", headers={"Via": via}), 508, "loop_detected")
        assert (await q.chat("hello", headers={"Via": "1.1 nginx"})).status == 200
        assert len(fake.requests) == 2


# ---- All of it at once -----------------------------------------------------------------------


async def misbehave(request: FakeRequest, deed: str) -> None:
    """One of the things that backends do."""
    if deed == "close":
        request.close()
    elif deed == "reset":
        request.reset()
    elif deed == "refuse":
        await request.status(500, {"error": {"message": "out of memory"}})
    elif deed == "nonsense":
        await request.send(b"what?\r\n\r\n")
        request.close()
    elif deed == "stall":
        await request.left()
    elif deed == "break":
        await request.start_stream()
        await request.piece(request.text.partition(" ")[0])
        request.reset()
    else:
        with contextlib.suppress(ConnectionError):  # on a busy machine it may come too late
            await request.answer(request.text)


def assert_truthful(answer: Answer, text: str) -> None:
    """A whole answer that is one's own, or an error, or a stream that shows that it broke."""
    if answer.status != 200:
        assert_error(answer, answer.status)
        assert answer.status in (500, 502, 503, 504)
    elif answer.clean:
        assert answer.content == text
    else:
        assert_broken_stream(answer, text.partition(" ")[0] if answer.content else "")


@pytest.mark.deadline(30)
async def test_whatever_backends_do_each_client_gets_one_truthful_answer() -> None:
    deeds = ["answer"] * 12 + ["close", "reset", "refuse", "nonsense", "stall", "break"]
    rng = random.Random(7)
    limits = {"upstream__first_byte_timeout": 0.3, "queue__slots": 2, **PROBED}
    async with FakeBackend(auto=False) as one, FakeBackend(auto=False) as two:

        async def work(fake: FakeBackend) -> None:
            while True:
                request = await fake.arrived()
                assert one.active + two.active <= 2
                tasks.append(asyncio.ensure_future(misbehave(request, rng.choice(deeds))))

        async with running(one.url, two.url, **limits) as q:
            tasks: list[asyncio.Future[None]] = []
            workers = [asyncio.ensure_future(work(fake)) for fake in (one, two)]
            texts = [f"{n} is my number" for n in range(200)]
            asked = [start(q, text, stream=bool(n % 3)) for n, text in enumerate(texts)]
            for text, each in zip(texts, asked):
                assert_truthful(await each, text)
            served = [each.result().clean and each.result().status == 200 for each in asked]
            assert sum(served) > 100
            queue = (await q.status())["queue"]
            assert (queue["waiting"], queue["running"]) == (0, 0)
            await eventually(lambda: one.active + two.active == 0)
            await asyncio.gather(*tasks)
            assert not any(worker.done() for worker in workers), "more than the slots at once"
            for worker in workers:
                worker.cancel()


@pytest.mark.deadline(15)
async def test_a_head_that_is_too_large_is_a_502_at_once() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asking = asyncio.ensure_future(q.chat("a"))
        request = await fake.arrived()
        await request.send(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n")
        assert (await asyncio.wait_for(asking, 2)).status == 502


async def test_a_break_elsewhere_does_not_let_a_retry_go_ahead_of_the_probe() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__slots=2) as q:
        asking = {text: asyncio.ensure_future(q.chat(text)) for text in ("silent", "broken")}
        requests = {request.text: request for request in [await fake.arrived() for _ in asking]}
        head = render_head(200, [("Content-Type", "application/json"), ("Content-Length", "9")])
        await requests["broken"].send(head + b"{")
        (call,) = [one for one in q.gateway.calls.values() if b"broken" in one.question.body]
        await eventually(lambda: call.first_byte)
        fake.hold_probes()
        await fake.stop_listening()  # the runner dies: one had no answer yet, one a part of it
        requests["silent"].close()
        requests["broken"].close()
        assert (await asking["broken"]).status == 502
        await fake.listen_again()
        fake.release_probes()
        again = asyncio.ensure_future(fake.arrived())
        await asyncio.wait({again, asking["silent"]}, return_when=asyncio.FIRST_COMPLETED)
        assert not asking["silent"].done(), asking["silent"].result()
        await (await again).answer("served")
        assert (await asking["silent"]).content == "served"


async def test_llmqs_own_lack_of_open_files_is_no_fault_of_the_runner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def none_left(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    async with FakeBackend() as fake, running(fake.url) as q:
        assert (await ask(q.port, "POST", "/v1/chat/completions", json=chat("x"))).status == 200
        [backend] = q.gateway.fleet.backends.values()
        q.gateway.pool.close()
        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", none_left)
        with pytest.raises(llmq.OutOfFiles):
            await llmq.dial(backend.url)
        await q.gateway.monitor.probe(backend)
        assert (backend.state, backend.failures) == (llmq.State.UP, 0)
        monkeypatch.undo()
        assert (await ask(q.port, "POST", "/v1/chat/completions", json=chat("x"))).status == 200


async def test_names_that_are_slow_to_be_found_delay_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, look_up = threading.Event(), socket.getaddrinfo

    def slow(host: str, *place: Any, **hints: Any) -> Any:
        if host == "slow.test":
            found.wait(10)
            raise socket.gaierror(-2, "Name or service not known")
        return look_up("127.0.0.1" if host == "good.test" else host, *place, **hints)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    before = set(threading.enumerate())
    async with FakeBackend() as fake:
        names = ["slow.test"] * 40  # more than asyncio's executor has threads
        dials = [asyncio.ensure_future(llmq.dial(f"http://{name}:80")) for name in names]
        upstream = await llmq.dial(f"http://good.test:{urlsplit(fake.url).port}")
        assert not any(one.done() for one in dials)
        looking = set(threading.enumerate()) - before
        assert len(looking) == len(names)
        assert all(thread.daemon for thread in looking), "the end of the program waits for none"
        await upstream.close()
        found.set()
        ends = await asyncio.gather(*dials, return_exceptions=True)
        assert {type(end) for end in ends} == {socket.gaierror}


async def test_each_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(_host: str, port: int, **_: Any) -> Any:
        return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.7", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    async with FakeBackend() as fake:
        port = urlsplit(fake.url).port
        upstream = await llmq.dial(f"http://two.test:{port}")
        assert upstream.stream.transport.get_extra_info("peername")[0] == "127.0.0.1"
        await upstream.close()
    with pytest.raises(ConnectionRefusedError):
        await llmq.dial(f"http://two.test:{port}")
