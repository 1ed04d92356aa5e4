"""Framing over sockets: where one request ends and the next begins is never in doubt."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests import corpus
from tests.corpus import BODY, CHUNKED, CHUNKS, LAST, LENGTH, Case, chunk, get, post, whole
from tests.fakes import Answer, FakeBackend, Raw, ask, chat, running


def named(case: Case) -> str:
    return case.name


@pytest.fixture(autouse=True)
def _nothing_unexpected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No input makes llmq log a traceback."""
    yield
    assert not [record for record in caplog.get_records("call") if record.exc_info]


async def to_the_end(port: int, data: bytes, fin: bool = False) -> list[Answer]:
    """Every answer on a connection until llmq closes it; nothing but answers may come."""
    raw = await Raw.open(port)
    await raw.send(data)
    if fin:
        raw.fin()
    answers = []
    with contextlib.suppress(EOFError):
        while True:
            answers.append(await raw.response())
    raw.close()
    assert not raw.buffer, f"no answer: {raw.buffer[:200]!r}"
    return answers


async def texts_run(port: int, fake: FakeBackend) -> list[str]:
    """What the backend was asked; a good request behind it all proves that nothing is to come."""
    assert (await ask(port, "POST", "/v1/chat/completions", json=chat("good"))).status == 200
    return [request.text for request in fake.requests]


@pytest.mark.parametrize("case", corpus.REFUSED + corpus.BAD_HOST_FIELDS, ids=named)
async def test_doubtful_request_is_refused_and_nothing_behind_it_runs(case: Case) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        answers = await to_the_end(q.port, case.sent + whole(b"behind"))
        assert [a.status in case.answers and a.clean for a in answers] == [True], (case, answers)
        assert answers[0].headers["connection"].lower() == "close"
        assert answers[0].json()["error"]["message"]
        assert await texts_run(q.port, fake) == ["good"], case.why


@pytest.mark.parametrize("case", corpus.SERVED, ids=named)
async def test_every_valid_framing_delivers_the_same_body_and_the_connection_goes_on(
    case: Case,
) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(case.sent + whole(b"second"))
        assert [(await raw.response()).content for _ in range(2)] == ["first", "second"], case.why
        assert fake.requests[0].body == BODY


@pytest.mark.parametrize("trailer", [b"Content-Length: 5", CHUNKED[:-2], b"Host: x"])
async def test_trailers_never_become_header_fields(trailer: bytes) -> None:
    sent = post(CHUNKED, CHUNKS[:-2] + trailer + b"\r\n\r\n") + whole(b"second")
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(sent)
        if (await raw.response()).status == 400:  # refusing one is as good as ignoring it
            assert await raw.closed()
        else:
            assert (await raw.response()).content == "second"
            assert await texts_run(q.port, fake) == ["first", "second", "good"]


@pytest.mark.parametrize("case", corpus.CUT, ids=named)
async def test_body_cut_short_by_the_end_of_the_connection_is_never_run(case: Case) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        answers = await to_the_end(q.port, case.sent, fin=True)
        assert [a.status for a in answers] in ([], *([code] for code in case.answers))
        assert await texts_run(q.port, fake) == ["good"], case.why


@pytest.mark.parametrize("case", corpus.EARLY, ids=named)
async def test_body_that_nobody_asked_for_is_never_the_next_request(case: Case) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(case.sent + get())
        first = await raw.response()
        assert first.status in case.answers, (case.why, first)
        assert "allow" in first.headers or first.status != 405
        if "close" in first.headers.get("connection", ""):
            assert await raw.closed()
        else:
            assert (await raw.response()).status == 200
        raw.close()
        assert await texts_run(q.port, fake) == ["good"]


@pytest.mark.deadline(30)
@pytest.mark.parametrize("sent", [post(LENGTH, BODY), post(CHUNKED, CHUNKS)], ids=["cl", "te"])
async def test_request_may_arrive_in_any_two_pieces(sent: bytes) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw, other = await Raw.open(q.port), await Raw.open(q.port)
        raw.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(1, len(sent)):
            await raw.send(sent[:cut])
            await other.send(get())  # its answer proves that llmq had time to read the first piece
            assert (await other.response()).status == 200
            await raw.send(sent[cut:])
            assert (await raw.response()).content == "first", f"cut at {cut}"
        assert all(request.body == BODY for request in fake.requests)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_expect_100_continue_asks_for_the_body_once(framing: str) -> None:
    fields, body = (LENGTH, BODY) if framing == "length" else (CHUNKED, CHUNKS)
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(post(fields + b"Expect: 100-Continue\r\n", b""))
        assert (await raw.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await raw.send(body)
        assert (await raw.until(b"\r\n")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n", b""), b"413"),
        (post(CHUNKED + LENGTH + b"Expect: 100-continue\r\n", b""), b"400"),
        (post(LENGTH + b"Expect: 100-continue\r\n", BODY, version=b"1.0"), b"200"),
        (get(fields=b"Expect: 100-continue\r\n"), b"200"),
        (get(b"evil.example", fields=b"Expect: 100-continue\r\n" + LENGTH), b"403"),
    ],
    ids=["too-large", "doubtful", "http-1.0", "no-body", "foreign-host"],
)
async def test_expect_gets_no_100_where_no_body_is_wanted(sent: bytes, status: bytes) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(sent)
        assert (await raw.until(b"\r\n")).split(b" ")[1] == status
        raw.close()


async def test_unknown_expectation_is_ignored_or_417() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(get(fields=b"Expect: the-unexpected\r\n"))
        assert (await raw.response()).status in (200, 417)


async def test_body_up_to_the_limit_passes_and_one_byte_more_is_413() -> None:
    full = BODY.ljust(100)
    async with FakeBackend() as fake, running(fake.url, server__max_body=100) as q:
        raw = await Raw.open(q.port)
        for fields, body in ((b"Content-Length: 100\r\n", full), (CHUNKED, chunk(full) + LAST)):
            await raw.send(post(fields, body))
            assert (await raw.response()).content == "first"
        for fields, body in ((b"Content-Length: 101\r\n", b""), (CHUNKED, b"65\r\n" + full)):
            answers = await to_the_end(q.port, post(fields, body))
            assert [answer.status for answer in answers] == [413]
        assert await texts_run(q.port, fake) == ["first", "first", "good"]
