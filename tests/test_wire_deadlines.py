"""Deadlines over sockets: a client that does not go on is told so or cut off, and delays nobody."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from tests.corpus import BODY, CHUNKED, CHUNKS, HOST, LENGTH, get, post, whole
from tests.fakes import Answer, FakeBackend, Raw, ask, chat, running

NOBODY = "http://127.0.0.1:9"  # where no backend is needed
SHORT = 0.3
HALF_HEADS = [
    b"G",
    b"GET /health HT",
    get()[:-2],
    post(LENGTH, b"")[:-2],
    b"\r\n",
    b"GET /\r\nX: y",
]
HALF_BODIES = [
    post(LENGTH, b""),
    post(LENGTH, BODY[:-1]),
    post(CHUNKED, b""),
    post(CHUNKED, b"3c"),
    post(CHUNKED, b"3c\r\n" + BODY[:9]),
    post(CHUNKED, b"3c\r\n" + BODY + b"\r\n"),
    post(CHUNKED, b"3c\r\n" + BODY + b"\r\n0\r\n"),
    post(CHUNKED, b"3c\r\n" + BODY + b"\r\n0\r\nX-T: y\r\n"),
]


@pytest.fixture(autouse=True)
def _nothing_unexpected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No input makes llmq log a traceback."""
    yield
    assert not [record for record in caplog.get_records("call") if record.exc_info]


async def ending(raw: Raw) -> list[Answer]:
    """What comes on a connection until llmq closes it."""
    answers = []
    with contextlib.suppress(EOFError):
        while True:
            answers.append(await raw.response())
    raw.close()
    return answers


def assert_timed_out(answers: list[Answer], sent: bytes = b"") -> None:
    assert [answer.status for answer in answers] in ([408], []), (sent, answers)
    for answer in answers:
        assert answer.headers["connection"].lower() == "close"
        assert answer.code == "request_timeout"


async def drip(raw: Raw, other: Raw, data: bytes, seconds: float) -> None:
    """Send `data` byte by byte over at least `seconds`; the answers to `other` are the beat."""
    raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    start = time.monotonic()
    for i in range(len(data)):
        await raw.send(data[i : i + 1])
        while time.monotonic() - start < seconds * i / len(data):
            await other.send(get())
            assert (await other.response()).status == 200


async def test_heads_that_are_never_complete_end_at_the_deadline() -> None:
    async with running(NOBODY, server__head_timeout=SHORT) as q:
        half = [(sent, await Raw.open(q.port)) for sent in HALF_HEADS]
        for sent, raw in half:
            await raw.send(sent)
        for sent, raw in half:
            assert_timed_out(await ending(raw), sent)
        assert (await ask(q.port, "GET", "/health")).status == 200


async def test_silent_connection_is_closed() -> None:
    async with running(NOBODY, server__head_timeout=SHORT, server__keep_alive=SHORT) as q:
        assert_timed_out(await ending(await Raw.open(q.port)))


async def test_head_deadline_is_a_total_that_dripping_does_not_move() -> None:
    async with running(NOBODY, server__head_timeout=SHORT) as q:
        raw, other = await Raw.open(q.port), await Raw.open(q.port)
        await raw.send(b"GET /health HTTP/1.1\r\n" + HOST + b"X-Slow: ")
        with contextlib.suppress(ConnectionError):
            await drip(raw, other, b"a" * 200, 4)
            pytest.fail("a head that came for 4 s passed a deadline of 0.3 s")
        assert_timed_out(await ending(raw))


async def test_slow_head_within_the_deadline_is_served() -> None:
    async with running(NOBODY, server__keep_alive=SHORT, server__body_timeout=SHORT) as q:
        raw, other = await Raw.open(q.port), await Raw.open(q.port)
        await drip(raw, other, get(), 1)
        assert (await raw.response()).status == 200


async def test_bodies_that_stall_end_in_408_and_are_never_run() -> None:
    async with FakeBackend() as fake, running(fake.url, server__body_timeout=SHORT) as q:
        half = [(sent, await Raw.open(q.port)) for sent in HALF_BODIES]
        for sent, raw in half:
            await raw.send(sent)
        for sent, raw in half:
            answers = await ending(raw)
            assert_timed_out(answers, sent)
            assert answers, "a request whose head came is told what happened"
        assert (await q.chat("good")).status == 200
        assert [request.text for request in fake.requests] == ["good"]


@pytest.mark.parametrize("path", [b"/nowhere", b"/health"])
async def test_body_that_never_comes_after_an_early_answer_ends_the_connection(path: bytes) -> None:
    async with running(NOBODY, server__body_timeout=SHORT) as q:
        for sent in (post(LENGTH, b"", path), post(CHUNKED, b"3", path)):
            raw = await Raw.open(q.port)
            await raw.send(sent)
            assert [answer.status in (404, 405) for answer in await ending(raw)] == [True]


async def test_body_asked_for_by_100_continue_has_the_same_deadline() -> None:
    async with running(NOBODY, server__body_timeout=SHORT) as q:
        raw = await Raw.open(q.port)
        await raw.send(post(LENGTH + b"Expect: 100-continue\r\n", b""))
        assert_timed_out(await ending(raw))


async def test_body_timeout_counts_from_the_last_byte() -> None:
    async with FakeBackend() as fake, running(fake.url, server__body_timeout=1) as q:
        raw, other = await Raw.open(q.port), await Raw.open(q.port)
        await raw.send(post(LENGTH, b""))
        await drip(raw, other, BODY, 1.5)
        assert (await raw.response()).content == "first"


async def test_whole_upload_has_a_deadline_that_dripping_does_not_move() -> None:
    async with FakeBackend() as fake, running(fake.url, server__upload_timeout=SHORT) as q:
        raw, other = await Raw.open(q.port), await Raw.open(q.port)
        await raw.send(post(LENGTH, b""))
        with contextlib.suppress(ConnectionError):
            await drip(raw, other, BODY[:-1], 4)
            pytest.fail("a body that came for 4 s passed a deadline of 0.3 s")
        assert_timed_out(await ending(raw))
        assert (await q.chat("good")).status == 200
        assert [request.text for request in fake.requests] == ["good"]


async def test_idle_connection_is_closed_in_good_order() -> None:
    async with running(NOBODY, server__keep_alive=SHORT) as q:
        raw = await Raw.open(q.port)
        await raw.send(get() + get())
        assert [(await raw.response()).status for _ in range(2)] == [200, 200]
        assert await ending(raw) == []
        assert raw.ended == "eof"


async def test_second_head_on_a_connection_has_the_head_deadline() -> None:
    async with running(NOBODY, server__head_timeout=SHORT) as q:
        raw = await Raw.open(q.port)
        await raw.send(get() + get()[:-2])
        assert (await raw.response()).status == 200
        assert_timed_out(await ending(raw))


async def test_request_that_waits_or_runs_has_no_client_deadline() -> None:
    short = dict.fromkeys(("head_timeout", "body_timeout", "upload_timeout", "keep_alive"), SHORT)
    settings = {f"server__{name}": value for name, value in short.items()}
    async with FakeBackend(auto=False) as fake, running(fake.url, **settings) as q:
        runs, waits = await Raw.open(q.port), await Raw.open(q.port)
        await runs.send(whole(b"runs"))
        request = await fake.arrived()
        await waits.send(post(CHUNKED, CHUNKS))
        for _ in range(2):  # an idle connection that ends proves that all the limits passed
            await ending(await Raw.open(q.port))
        await request.answer("1")
        await (await fake.arrived()).answer("2")
        for raw, text in ((runs, "1"), (waits, "2")):
            assert (await raw.response()).content == text
            await raw.send(get())  # and the connection goes on
            assert (await raw.response()).status == 200


async def test_200_half_open_connections_delay_no_fresh_client_and_end_in_time() -> None:
    async with FakeBackend() as fake, running(fake.url, server__head_timeout=2) as q:
        half = [await Raw.open(q.port) for _ in range(200)]
        for i, raw in enumerate(half):
            await raw.send([b"", b"GET / HTTP/1.1\r\nX: ", post(LENGTH, b"")[:-1], b"\r\n"][i % 4])
        start = time.monotonic()
        assert (await ask(q.port, "GET", "/health")).status == 200
        answer = await ask(q.port, "POST", "/v1/chat/completions", json=chat("fresh"))
        assert answer.content == "fresh"
        assert time.monotonic() - start < 1
        for raw in half:
            assert_timed_out(await ending(raw))
