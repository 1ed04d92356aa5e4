"""Connections of clients at their limits: heads without end, bytes ahead, answers left unread."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

import pytest

import llmq
from tests.fakes import FakeBackend, Raw, ask, chat, eventually, http, running

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOBODY = "http://127.0.0.1:9"  # where no backend listens
MUCH = b"a" * 100_000


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /" + MUCH, 414, "uri_too_long"),
        (b"\r\n\r\nGET /" + MUCH, 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + MUCH, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, 431, "headers_too_large"),
        (b"\r\n" * 50_000, 400, "bad_request"),
    ],
    ids=["line", "line after empty ones", "field", "fields", "empty lines"],
)
async def test_head_without_end_is_refused_in_words(sent: bytes, status: int, code: str) -> None:
    async with running(NOBODY) as q:
        client = await Raw.open(q.port)
        await client.send(sent)
        answer = await client.response()
        assert (answer.status, answer.code) == (status, code)
        assert answer.headers["connection"] == "close"
        assert answer.headers["access-control-allow-origin"] == "*"
        client.close()


async def test_what_could_not_be_read_is_shown_to_no_page_where_pages_are_named() -> None:
    async with running(NOBODY, server__cors_origins=["https://my.page"]) as q:
        client = await Raw.open(q.port)
        await client.send(b"GET /" + MUCH)
        answer = await client.response()
        assert answer.status == 414
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        client.close()


async def test_bytes_sent_far_ahead_are_dropped_and_the_answer_still_comes() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await Raw.open(q.port)
        body = json.dumps(chat("first")).encode()
        more = http("POST", CHAT, JSON, json.dumps(chat("second" + "x" * 200_000)).encode())
        await client.send(http("POST", CHAT, JSON, body) + more)
        request = await fake.arrived()
        await request.answer("first")
        answer = await client.response()
        assert (answer.content, answer.clean) == ("first", True)
        await client.closed()
        assert len(fake.requests) == 1, "what was dropped in part is never run"


async def test_answer_to_a_slow_reader_is_sent_to_its_end_before_the_connection_closes() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await Raw.open(q.port, receive_buffer=4096)
        body = json.dumps(chat("a")).encode()
        await client.send(http("POST", CHAT, {**JSON, "Connection": "close"}, body))
        await (await fake.arrived()).answer("x" * 3_000_000)
        await eventually(lambda: not q.gateway.calls)
        answer = await client.response()
        assert (len(answer.content), answer.clean) == (3_000_000, True)
        assert await client.closed() == "eof"


async def test_failure_of_a_connection_is_logged_and_ends_only_this_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Any) -> Any:
        raise ZeroDivisionError("nobody foresaw this")

    caplog.set_level(logging.INFO, "llmq")
    async with running(NOBODY) as q:
        other = await Raw.open(q.port)
        await other.send(http("GET", "/health"))
        assert (await other.response()).status == 200
        monkeypatch.setattr(llmq, "parse_request_head", broken)
        client = await Raw.open(q.port)
        await client.send(http("GET", "/health"))
        assert await client.closed()
        monkeypatch.undo()
        await other.send(http("GET", "/health"))
        assert (await other.response()).status == 200
        other.close()
    assert [one.getMessage() for one in caplog.records if one.exc_info] == ["connection failed"]


@pytest.mark.parametrize(
    "sent",
    [b"x\r\n", b"-5\r\n", b"5\r\nabcdeXX", b"5 ;\x00\r\n", b"1" * 100_000 + b"\r\n"],
    ids=lambda sent: ascii(sent)[2:16],
)
async def test_broken_chunks_of_a_body_that_streams_through_are_told(sent: bytes) -> None:
    async with FakeBackend(kind="ollama", auto=False) as fake, running(fake.url) as q:
        await eventually(lambda: all(one.models_known for one in q.gateway.fleet.backends.values()))
        raw = await Raw.open(q.port)
        chunked = {"Transfer-Encoding": "chunked"}
        await raw.send(http("POST", "/api/blobs/sha256:0", chunked, b"") + sent)
        answer = await raw.response()
        assert (answer.status, answer.clean) == (400, True)
        assert answer.json()["error"].startswith("malformed body")
        assert await raw.closed()
        assert not fake.requests


async def test_loop_without_readers_to_remove_stops_accepting_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows, whose event loop has no `remove_reader`."""

    def refuse(_number: int) -> None:
        raise NotImplementedError

    async with FakeBackend() as fake, running(fake.url) as q:
        loop = asyncio.get_running_loop()
        with monkeypatch.context() as windows:
            windows.setattr(llmq.os, "name", "nt")
            windows.setattr(loop, "remove_reader", refuse)
            (server,) = q.service._servers
            server.stop_accepting()
        with pytest.raises(ConnectionRefusedError):
            await Raw.open(q.port)


async def test_who_asks_on_and_on_and_reads_nothing_is_read_no_more() -> None:
    async with running(NOBODY) as q:
        client = await Raw.open(q.port, receive_buffer=4096)
        sending = asyncio.ensure_future(client.send(http("GET", "/llmq") * 200_000))

        def unsent() -> int:
            return max((one.unsent for one in q.service._servers[0].connections), default=0)

        await eventually(lambda: unsent() > llmq.ANSWER_BUFFER)
        for _ in range(50):  # many turns, in which more could be answered
            assert (await ask(q.port, "GET", "/health")).status == 200
        assert 0 < unsent() < llmq.ANSWER_BUFFER + llmq.MIB, "at most one answer more"
        sending.cancel()
        client.close()


async def test_requests_that_came_together_are_answered_one_in_each_turn_of_the_loop() -> None:
    order = []

    async def answer(exchange: Any) -> None:
        order.append("answer")
        asyncio.get_running_loop().call_soon(order.append, "others")
        exchange.respond(200, b"ok")

    server = llmq.HttpServer(answer, llmq.Settings(), 8)
    client = await Raw.open(await server.listen("127.0.0.1", 0))
    await client.send(http("GET", "/") * 50)
    for _ in range(50):
        await client.response()
    assert order == ["answer", "others"] * 50
    client.close()
    await server.close()


async def test_header_that_latin_1_cannot_say_is_sent_all_the_same() -> None:
    async def answer(exchange: Any) -> None:
        exchange.respond(200, b"ok", headers=[("X", "日本")])

    server = llmq.HttpServer(answer, llmq.Settings(), 8)
    client = await Raw.open(await server.listen("127.0.0.1", 0))
    await client.send(http("GET", "/"))
    assert (await client.response()).headers["x"] == "??"
    client.close()
    await server.close()


async def test_empty_lines_by_the_thousand_leave_others_their_turn() -> None:
    async def nothing(_exchange: Any) -> None:
        pass

    server = llmq.HttpServer(nothing, llmq.Settings(), 8)
    loop, turns = asyncio.get_running_loop(), []
    ours, theirs = socket.socketpair()
    _, stream = await loop.create_connection(llmq.Stream, sock=ours)
    stream.data_received(b"\r\n\r\n" * 1000 + http("GET", "/after"))
    reading = asyncio.ensure_future(llmq.Connection(server, stream).read_request())

    def take_turn() -> None:
        turns.append(1)
        if not reading.done():
            loop.call_soon(take_turn)

    loop.call_soon(take_turn)
    request = await reading
    assert request is not None
    assert request.path == "/after"
    assert len(turns) >= 1000
    stream.close()
    theirs.close()
