"""While a request waits its client hears that llmq lives, in each dialect, and then the truth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import llmq
from tests.fake_runner import (
    BY_PATH,
    CHAT,
    DIALECTS,
    EMBEDDINGS,
    GENERATE,
    MESSAGES,
    NATIVE_CHAT,
    STREAMING,
    Dialect,
    Runner,
    parse_events,
    parse_lines,
    speak,
    start_speaking,
)
from tests.fakes import Answer, FakeRequest, Process, Raw, ask, chunk, eventually, running

SOON = {  # which is at the next look of llmq, four times a second
    "server__heartbeat_after": 0.05,
    "server__heartbeat_interval": 0.05,
    "server__whole_heartbeat_after": 0.05,
}
SIGNS = [one for one in STREAMING if one is not GENERATE]  # the others have the same streams
RUNNERS = [one for one in DIALECTS if one.path != "/v1/rerank"]  # what Ollama speaks
SHAPES = [(one, stream) for one in RUNNERS for stream in (True, False) if one.streams or not stream]
LEAVING = [Raw.close, Raw.rst, Raw.fin]
OPENAI_SIGN = rb": position=\d+(?: eta=\d+)?\n"


def at_once(cases: list[Any]) -> Callable[[Any], Any]:
    """Run the test once for each of the cases, all at the same time: waiting is most of it."""

    def decorate(test: Any) -> Any:
        async def one(case: tuple[Any, ...]) -> None:
            try:
                await test(*case)
            except BaseException as error:
                raise AssertionError(f"in the case {case}") from error

        async def all_of_them() -> None:
            tasks = [asyncio.ensure_future(one(case)) for case in cases]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        all_of_them.__name__, all_of_them.__doc__ = test.__name__, test.__doc__
        return all_of_them

    return decorate


each_shape = at_once(SHAPES)
each_sign = at_once([(one,) for one in SIGNS])


def sign_of(dialect: Dialect, stream: bool = True) -> bytes:
    """The pattern of one sign of life."""
    openai = dialect.sign.startswith(b": position")
    return (OPENAI_SIGN if openai else dialect.sign) if stream else b" "


@contextlib.asynccontextmanager
async def busy(**settings: Any) -> AsyncIterator[tuple[Runner, running, FakeRequest]]:
    """A backend whose one slot is taken by a request that the test holds."""
    async with Runner(auto=False) as fake, running(fake.url, **{**SOON, **settings}) as q:
        first = asyncio.ensure_future(CHAT.ask(q.port, "the first"))
        request = await fake.arrived()
        yield fake, q, request
        if not request.done.is_set():
            await speak(request)
        await first


async def signs(raw: Raw, dialect: Dialect, stream: bool, number: int) -> bytes:
    """Read the head, and so many signs of life; nothing but them."""
    answer = raw.answer or await raw.head()
    raw.answer = answer
    assert answer.status == 200
    media = dialect.media if stream else "application/json"
    assert answer.headers["content-type"].startswith(media)
    pattern = re.compile(rb"(?:%s){%d,}" % (sign_of(dialect, stream), number))
    while not pattern.fullmatch(answer.body):
        answer.body += await next_chunk(raw)
        one_sign = re.compile(rb"(?:%s)*" % sign_of(dialect, stream))
        assert one_sign.fullmatch(answer.body), answer
    return answer.body


async def next_chunk(raw: Raw) -> bytes:
    size = int((await raw.until(b"\r\n")).split(b";")[0], 16)
    return (await raw.exactly(size + 2))[:-2]


async def rest(raw: Raw) -> Answer:
    """The answer whose head and signs of life were read, to its end; all of its body."""
    answer = raw.answer
    assert answer is not None
    early = answer.body
    answer = await raw.response()
    assert answer.body.startswith(early)
    return answer


def real_part(dialect: Dialect, stream: bool, body: bytes) -> bytes:
    """A body without the signs of life before it."""
    return body[len(early_part(dialect, stream, body)) :]


def early_part(dialect: Dialect, stream: bool, body: bytes) -> bytes:
    """The signs of life at the beginning of a body."""
    found = re.match(rb"(?:%s)*" % sign_of(dialect, stream), body)
    assert found
    return found.group()


def assert_failed(answer: Answer, dialect: Dialect, stream: bool, words: str) -> None:
    """After an early head: the error in the dialect's own words, no good end of any kind."""
    assert answer.status == 200, answer
    assert not answer.clean, answer
    if stream:
        assert words in dialect.stream_error(answer.body), answer
        assert not dialect.complete(answer.body), answer
    else:
        assert words in dialect.whole_error(answer), answer
    for good in (b"[DONE]", b'"done":true', b"message_stop", b"completed", b'"stop"', b"end_turn"):
        assert good not in answer.body, answer


async def waiting(q: running, number: int) -> None:
    """Return once exactly so many wait; the test's deadline ends it otherwise."""
    while (await q.status())["queue"]["waiting"] != number:
        pass


async def the_id(q: running, text: str) -> str:
    """llmq's id of the request whose client gave it this one."""
    rows = {row["request_id"]: row["id"] for row in (await q.status())["requests"]}
    return str(rows[text])


def silent(raw: Raw) -> bool:
    """Whether nothing at all has come."""
    with pytest.raises(BlockingIOError):
        raw.socket.recv(1)
    return not raw.buffer


# ---- Signs of life ---------------------------------------------------------------------------


@each_shape
async def test_waiting_request_hears_signs_of_life_and_then_its_whole_answer(
    dialect: Dialect, stream: bool
) -> None:
    async with busy() as (fake, q, first):
        raw = await dialect.begin(q.port, "one two three", stream)
        early = await signs(raw, dialect, stream, 3)
        await speak(first)
        await speak(await fake.arrived())
        answer = await rest(raw)
        assert dialect.text(answer) == "one two three"
        assert b"message_start" not in early
        assert "x-llmq-id" in answer.headers
        assert answer.headers["access-control-allow-origin"] == "*"


@each_shape
async def test_running_request_hears_them_until_the_first_byte_of_the_answer(
    dialect: Dialect, stream: bool
) -> None:
    async with Runner(auto=False) as fake, running(fake.url, **SOON) as q:
        raw = await dialect.begin(q.port, "one two", stream)
        request = await fake.arrived()
        early = await signs(raw, dialect, stream, 2)
        if b"position" in early:
            assert set(re.findall(rb"position=(\d+)", early)) == {b"0"}
        if stream:  # a backend's head is no byte of its body
            await start_speaking(request)
            await signs(raw, dialect, stream, 4)
            for piece in dialect.pieces("m", "one two"):
                await request.send(chunk(piece))
            request.finished()
            await request.send(b"0\r\n\r\n")
        else:
            await speak(request)
        answer = await rest(raw)
        assert dialect.text(answer) == "one two"


async def test_signs_of_openais_streams_tell_position_and_the_eta_that_is_known() -> None:
    """Each is one line; before a request for the model has ended nobody knows how long one runs."""
    async with busy() as (fake, q, first):
        one = await CHAT.begin(q.port, "one", True)
        await waiting(q, 1)
        two = await CHAT.begin(q.port, "two", True)
        await waiting(q, 2)
        assert set((await signs(one, CHAT, True, 2)).splitlines()) == {b": position=1"}
        assert set((await signs(two, CHAT, True, 5)).splitlines()) == {b": position=2"}
        await speak(first)
        request = await fake.arrived()
        before = len(await signs(two, CHAT, True, 1))
        while b": position=1 eta=" not in two.answer.body[before:]:
            await signs(two, CHAT, True, two.answer.body.count(b"\n") + 1)
        await speak(request)
        await speak(await fake.arrived())
        assert CHAT.text(await rest(one)) == "one"
        assert CHAT.text(await rest(two)) == "two"


@pytest.mark.parametrize("key", [{}, {"headers": {"anthropic-version": "2023-06-01"}}])
async def test_ping_of_anthropics_stream_is_an_event_that_its_clients_know(key: Any) -> None:
    async with busy() as (fake, q, first):
        raw = await MESSAGES.begin(q.port, "one", True, **key)
        early = await signs(raw, MESSAGES, True, 2)
        assert parse_events(early)[:2] == [("ping", {"type": "ping"})] * 2
        await speak(first)
        await speak(await fake.arrived())
        assert MESSAGES.text(await rest(raw)) == "one"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_stream_is_what_ollamas_clients_mean_when_they_say_nothing(path: str) -> None:
    dialect = BY_PATH[path]
    async with busy() as (fake, q, first):
        raw = await Raw.open(q.port)
        body = dialect.body("one two")
        del body["stream"]
        asked = json.dumps(body).encode()
        await raw.send(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
            % (path.encode(), len(asked), asked)
        )
        await signs(raw, dialect, True, 2)
        await speak(first)
        await speak(await fake.arrived())
        answer = await rest(raw)
        assert [one["done"] for one in parse_lines(answer.body)] == [False, False, True]
        assert dialect.text(answer) == "one two"


@at_once([(CHAT,), (NATIVE_CHAT,)])
async def test_stream_that_is_translated_has_signs_of_the_clients_dialect(
    dialect: Dialect,
) -> None:
    native = dialect is CHAT
    async with Runner(auto=False, kind="ollama" if native else "openai") as fake:
        async with running(fake.url, **SOON) as q:
            more = {"numCtx": 8192} if native else {}
            raw = await dialect.begin(q.port, "one two", True, **more)
            request = await fake.arrived()
            assert request.path == ("/api/chat" if native else "/v1/chat/completions")
            await signs(raw, dialect, True, 2)
            await speak(request)
            assert dialect.text(await rest(raw)) == "one two"


async def test_connection_serves_on_after_an_answer_that_began_with_signs_of_life() -> None:
    async with busy() as (fake, q, first):
        raw = await Raw.open(q.port)
        for dialect, stream in ((NATIVE_CHAT, True), (CHAT, False)):
            await raw.send(dialect.request("one", stream))
            await signs(raw, dialect, stream, 1)
            if not first.done.is_set():
                await speak(first)
            await speak(await fake.arrived())
            assert dialect.text(await rest(raw)) == "one"
        await raw.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await raw.response()).body == b"ok"


# ---- When there are none ---------------------------------------------------------------------


@each_shape
async def test_short_wait_has_a_truthful_status(dialect: Dialect, stream: bool) -> None:
    async with Runner(auto=False) as fake, running(fake.url) as q:
        raw = await dialect.begin(q.port, "one", stream)
        await (await fake.arrived()).status(400, {"error": {"message": "too odd", "code": 400}})
        answer = await raw.response()
        assert (answer.status, answer.clean) == (400, True)
        assert "too odd" in dialect.error(answer)


@each_sign
async def test_head_of_the_backend_alone_is_no_answer_yet(dialect: Dialect) -> None:
    """It may still break before it says a word, and that has a status of its own."""
    async with Runner(auto=False) as fake, running(fake.url) as q:
        for broken in (FakeRequest.close, FakeRequest.reset):
            raw = await dialect.begin(q.port, "one", True)
            request = await fake.arrived()
            await start_speaking(request)
            assert (await ask(q.port, "GET", "/health")).body == b"ok"
            broken(request)
            answer = await raw.response()
            assert (answer.status, answer.clean) == (502, True)
            assert dialect.whole_error(answer)


@each_shape
async def test_setting_of_nought_means_never(dialect: Dialect, stream: bool) -> None:
    """Seen by another llmq, whose client has heard three signs in the same time."""
    never = {"server__heartbeat_after": 0, "server__whole_heartbeat_after": 0}
    async with busy(**never) as (fake, q, first), busy() as (other, clock, held):
        raw = await dialect.begin(q.port, "one", stream)
        await waiting(q, 1)
        later = await CHAT.begin(clock.port, "later", True)
        await signs(later, CHAT, True, 3)
        assert silent(raw)
        await speak(held)
        await speak(await other.arrived())
        await rest(later)
        await speak(first)
        await (await fake.arrived()).status(404, {"error": "model 'm' not found"})
        answer = await raw.response()
        assert (answer.status, answer.clean) == (404, True)


async def test_streams_and_whole_bodies_begin_at_their_own_times() -> None:
    for late, early, stream in (
        ("heartbeat_after", CHAT, False),
        ("whole_heartbeat_after", CHAT, True),
    ):
        async with busy(**{f"server__{late}": 60}) as (fake, q, first):
            silent_one = await CHAT.begin(q.port, "silent", not stream)
            await waiting(q, 1)
            heard = await early.begin(q.port, "heard", stream)
            await signs(heard, early, stream, 2)
            assert silent(silent_one), late
            await speak(first)
            await speak(await fake.arrived())
            assert CHAT.text(await silent_one.response()) == "silent"
            await speak(await fake.arrived())
            assert CHAT.text(await rest(heard)) == "heard"


async def test_whole_body_waits_four_minutes_by_default_and_a_stream_a_quarter_of_one() -> None:
    async with Runner() as fake, running(fake.url) as q:
        server = q.service.settings.server
        assert server.heartbeat_after == 15
        assert server.heartbeat_interval == 10
        assert server.whole_heartbeat_after == 240


@each_sign
async def test_interval_is_the_time_between_two_signs(dialect: Dialect) -> None:
    async with busy(server__heartbeat_interval=60) as (fake, q, first):
        raw = await dialect.begin(q.port, "one", True)
        await signs(raw, dialect, True, 1)
        async with busy() as (other, clock, held):  # whose signs come at the next look each
            later = await CHAT.begin(clock.port, "later", True)
            await signs(later, CHAT, True, 3)
            assert silent(raw)
            await speak(held)
            await speak(await other.arrived())
        await speak(first)
        await speak(await fake.arrived())
        answer = await rest(raw)
        assert dialect.text(answer) == "one"
        assert len(re.findall(sign_of(dialect), early_part(dialect, True, answer.body))) == 1


def moments(monkeypatch: pytest.MonkeyPatch, interval: float, until: int) -> list[int]:
    """The seconds at which one is sent to a call that is silent from its first second on."""
    call = SimpleNamespace(heartbeat_at=15.0, heartbeats=0, error=None, blind=False, job="")
    settings = SimpleNamespace(server=SimpleNamespace(heartbeat_interval=interval))
    gateway: Any = SimpleNamespace(calls={"1": call}, settings=settings)
    seen: list[int] = []
    monkeypatch.setattr(llmq, "send_heartbeat", lambda _gateway, _call, _now: seen.append(second))
    for second in range(until):
        llmq.send_heartbeats(gateway, float(second))
    return seen


def test_signs_become_rarer_up_to_six_times_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = moments(monkeypatch, 10.0, 600)
    assert seen[0] == 15
    gaps = [later - one for one, later in zip(seen, seen[1:])]
    assert gaps[:13] == [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 60, 60]
    seen = moments(monkeypatch, 4.0, 300)
    assert [later - one for one, later in zip(seen, seen[1:])][:12] == [*range(4, 25, 2), 24]


# ---- In mid-stream ---------------------------------------------------------------------------


@each_sign
async def test_they_go_on_in_mid_stream_between_two_events(dialect: Dialect) -> None:
    async with Runner(auto=False) as fake, running(fake.url, **SOON) as q:
        raw = await dialect.begin(q.port, "one two", True)
        request = await fake.arrived()
        await start_speaking(request)
        first, second, *others = dialect.pieces("m", "one two")
        await request.send(chunk(first))
        answer = raw.answer = await raw.head()
        assert answer.headers["content-type"].startswith(dialect.media)
        sign = sign_of(dialect)
        begun = rb"(?:%s)*%s(?:%s){%%d,}" % (sign, re.escape(first).replace(b"%", b"%%"), sign)
        while not re.fullmatch(begun % 2, answer.body):
            answer.body += await next_chunk(raw)
        half = len(second) // 2  # of an event is held back, and never torn by a sign
        await request.send(chunk(second[:half]))
        while not re.fullmatch(begun % 4, answer.body):
            answer.body += await next_chunk(raw)
        await request.send(chunk(b"".join([second[half:], *others])))
        request.finished()
        await request.send(b"0\r\n\r\n")
        answer = await rest(raw)
        assert dialect.text(answer) == "one two"
        early = re.match(begun % 4, answer.body)
        assert early
        assert answer.body[early.end() :] == b"".join([second, *others])


async def test_there_are_none_inside_an_event_too_long_to_be_held_nor_before_their_time() -> None:
    first, *others = CHAT.pieces("m", "one two")
    long = first.replace(b"one", b"x" * (llmq.WATCHED_LINE + 1000))
    for sent, more in ((long[:-500], SOON), (first, {"server__heartbeat_after": 60})):
        async with Runner(auto=False) as fake, running(fake.url, **more) as q, busy() as clock:
            raw = await CHAT.begin(q.port, "one two", True)
            request = await fake.arrived()
            await start_speaking(request)
            await request.send(chunk(sent))
            later = await CHAT.begin(clock[1].port, "later", True)
            await signs(later, CHAT, True, 4)
            left = (long if sent is not first else first)[len(sent) :]
            await request.send(chunk(b"".join([left, *others])))
            request.finished()
            await request.send(b"0\r\n\r\n")
            answer = await raw.response()
            assert answer.clean
            body = real_part(CHAT, True, answer.body)
            assert body == b"".join([sent, left, *others])
            await speak(clock[2])
            await speak(await clock[0].arrived())
            await rest(later)


async def test_stream_that_is_translated_has_them_in_mid_stream_too() -> None:
    async with Runner(auto=False, kind="openai") as fake, running(fake.url, **SOON) as q:
        raw = await NATIVE_CHAT.begin(q.port, "one two", True)
        request = await fake.arrived()
        await start_speaking(request)
        first, *others = CHAT.pieces("m", "one two")
        await request.send(chunk(first))
        answer = raw.answer = await raw.head()
        while not re.fullmatch(rb" *\{.*\}\n {2,}", answer.body):
            answer.body += await next_chunk(raw)
        await request.send(chunk(b"".join(others)))
        request.finished()
        await request.send(b"0\r\n\r\n")
        assert NATIVE_CHAT.text(await rest(raw)) == "one two"


async def test_bits_of_a_tool_call_that_are_held_back_are_no_signs_of_life() -> None:
    function = {"name": "f", "arguments": " "}
    delta = {"tool_calls": [{"index": 0, "id": "a", "function": function}]}
    bit = b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
    async with Runner(auto=False, kind="openai") as fake, running(fake.url, **SOON) as q:
        raw = await NATIVE_CHAT.begin(q.port, "one", True)
        request = await fake.arrived()
        await start_speaking(request)

        async def speak_on() -> None:
            while True:
                await request.send(chunk(bit))
                await ask(q.port, "GET", "/health")

        speaking = asyncio.ensure_future(speak_on())
        answer = raw.answer = await raw.head()
        while answer.body.count(b" ") < 5:
            answer.body += await next_chunk(raw)
        speaking.cancel()
        raw.close()
        await request.left()


# ---- Failures after the early head -----------------------------------------------------------


@each_shape
async def test_request_cancelled_in_the_queue_is_told_in_its_dialect(
    dialect: Dialect, stream: bool
) -> None:
    async with busy() as (fake, q, first):
        raw = await dialect.begin(q.port, "one", stream, headers={"X-Request-Id": "one"})
        await signs(raw, dialect, stream, 2)
        answer = await ask(q.port, "DELETE", f"/llmq/requests/{await the_id(q, 'one')}")
        assert answer.json() == {"cancelled": 1}
        assert_failed(await rest(raw), dialect, stream, "cancel")
        await speak(first)
        assert CHAT.text(await next_one(q, fake)) == "next"
        assert len(fake.requests) == 2, "the cancelled one reached the backend"


async def next_one(q: running, fake: Runner) -> Answer:
    """One more request; it is the next to arrive at the backend."""
    asked = asyncio.ensure_future(CHAT.ask(q.port, "next"))
    request = await fake.arrived()
    assert request.text == "next"
    await speak(request)
    return await asked


@each_shape
async def test_shutdown_tells_what_waits(dialect: Dialect, stream: bool) -> None:
    async with busy() as (_, q, _first):
        raw = await dialect.begin(q.port, "one", stream)
        await signs(raw, dialect, stream, 1)
        stop = asyncio.ensure_future(q.service.stop())
        assert_failed(await rest(raw), dialect, stream, "shutting down")
        await speak(_first)
        await stop


@each_shape
async def test_error_of_the_backend_keeps_its_words(dialect: Dialect, stream: bool) -> None:
    async with Runner(auto=False) as fake, running(fake.url, **SOON) as q:
        for status, error in (
            (400, {"error": "the prompt is too long"}),
            (500, {"error": {"message": "the prompt is too long", "type": "x", "code": 500}}),
            (404, {"error": "model 'm' not found: the prompt is too long"}),
        ):
            raw = await dialect.begin(q.port, "one", stream)
            request = await fake.arrived()
            await signs(raw, dialect, stream, 1)
            await request.status(status, error)
            answer = await rest(raw)
            assert not answer.clean
            assert "the prompt is too long" in dialect.error(answer)
            assert not (stream and dialect.complete(answer.body))


@each_shape
async def test_backend_that_breaks_is_told(dialect: Dialect, stream: bool) -> None:
    async with Runner(auto=False) as fake:
        async with running(fake.url, queue__max_attempts=1, **SOON) as q:
            raw = await dialect.begin(q.port, "one", stream)
            request = await fake.arrived()
            await signs(raw, dialect, stream, 1)
            request.reset()
            assert_failed(await rest(raw), dialect, stream, "")


@each_shape
async def test_backend_that_stays_down_is_told_after_the_wait(
    dialect: Dialect, stream: bool
) -> None:
    quick = {"upstream__probe_interval": 0.1, "queue__down_wait": 1, **SOON}
    async with Runner(auto=False) as fake, running(fake.url, **quick) as q:
        while (await q.status())["backends"][0]["state"] != "up":
            pass
        await fake.stop_listening()
        fake.drop_connections()
        while (await q.status())["backends"][0]["state"] != "down":
            pass
        raw = await dialect.begin(q.port, "one", stream)
        await signs(raw, dialect, stream, 1)
        assert_failed(await rest(raw), dialect, stream, "no runner answers")


@each_shape
async def test_backend_that_never_begins_is_told_as_a_time_out(
    dialect: Dialect, stream: bool
) -> None:
    async with Runner(auto=False) as fake:
        async with running(fake.url, upstream__first_byte_timeout=1, **SOON) as q:
            raw = await dialect.begin(q.port, "one", stream)
            request = await fake.arrived()
            await signs(raw, dialect, stream, 1)
            answer = await rest(raw)
            assert_failed(answer, dialect, stream, "")
            await request.left()
            if dialect is MESSAGES:
                body = parse_events(answer.body)[-1][1] if stream else answer.json()
                assert body["error"]["type"] == "timeout_error"


@each_shape
async def test_wait_past_its_limit_is_told(dialect: Dialect, stream: bool) -> None:
    async with busy(queue__max_wait_normal=1) as (_, q, _first):
        raw = await dialect.begin(q.port, "one", stream)
        await signs(raw, dialect, stream, 1)
        assert_failed(await rest(raw), dialect, stream, "")
        await waiting(q, 0)


@each_shape
async def test_answer_that_breaks_after_the_signs_ends_unclean(
    dialect: Dialect, stream: bool
) -> None:
    async with Runner(auto=False) as fake:
        async with running(fake.url, queue__max_attempts=1, **SOON) as q:
            raw = await dialect.begin(q.port, "one two", stream)
            request = await fake.arrived()
            await signs(raw, dialect, stream, 1)
            if stream:
                await start_speaking(request)
                await request.send(chunk(dialect.pieces("m", "one two")[0]))
            else:
                await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
            request.close()
            answer = await rest(raw)
            assert not answer.clean
            assert not (stream and dialect.complete(answer.body)), answer
            dialect.error(answer)


@each_sign
async def test_whole_answer_to_a_stream_that_has_begun_is_never_taken_for_one(
    dialect: Dialect,
) -> None:
    """Some runners cannot stream everything; what they send then is no event of a stream."""
    async with Runner(auto=False) as fake, running(fake.url, **SOON) as q:
        raw = await dialect.begin(q.port, "one two", True)
        request = await fake.arrived()
        await signs(raw, dialect, True, 1)
        await request.status(200, dialect.whole("m", "one two"))
        answer = await rest(raw)
        if answer.clean:
            assert dialect.text(answer) == "one two"
        else:
            assert dialect.stream_error(answer.body)


@each_sign
async def test_failed_attempt_may_be_made_again_although_the_head_has_gone(
    dialect: Dialect,
) -> None:
    async with Runner(auto=False) as fake, running(fake.url, **SOON) as q:
        raw = await dialect.begin(q.port, "one two", True)
        request = await fake.arrived()
        await signs(raw, dialect, True, 1)
        request.reset()
        await speak(await fake.arrived())
        assert dialect.text(await rest(raw)) == "one two"


# ---- Clients ---------------------------------------------------------------------------------


@at_once([(*shape, leave) for shape in SHAPES for leave in LEAVING])
async def test_client_that_leaves_meanwhile_is_gone_from_the_queue(
    dialect: Dialect, stream: bool, leave: Any
) -> None:
    async with busy() as (fake, q, first):
        raw = await dialect.begin(q.port, "gone", stream)
        await signs(raw, dialect, stream, 1)
        leave(raw)
        await waiting(q, 0)
        await speak(first)
        assert CHAT.text(await next_one(q, fake)) == "next"


@each_sign
async def test_client_that_leaves_while_its_request_runs_frees_the_slot(dialect: Dialect) -> None:
    async with Runner(auto=False) as fake, running(fake.url, **SOON) as q:
        raw = await dialect.begin(q.port, "gone", True)
        request = await fake.arrived()
        await signs(raw, dialect, True, 1)
        raw.close()
        await asyncio.wait_for(request.left(), 1)
        assert CHAT.text(await next_one(q, fake)) == "next"


def old(dialect: Dialect, stream: bool) -> bytes:
    """A request as HTTP/1.0 writes it."""
    return dialect.request("one two", stream).replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)


@each_shape
async def test_old_client_gets_signs_and_answer_without_chunks(
    dialect: Dialect, stream: bool
) -> None:
    async with busy() as (fake, q, first):
        raw = await Raw.open(q.port)
        await raw.send(old(dialect, stream))
        answer = await raw.head()
        assert "transfer-encoding" not in answer.headers
        sign = sign_of(dialect, stream)
        while not re.fullmatch(rb"(?:%s){2,}" % sign, raw.buffer):
            raw.buffer += await raw._receive()
        await speak(first)
        await speak(await fake.arrived())
        assert dialect.text(await raw.response()) == "one two"


@each_shape
async def test_old_client_sees_a_late_failure_as_a_reset(dialect: Dialect, stream: bool) -> None:
    async with busy() as (_, q, _first):
        raw = await Raw.open(q.port)
        await raw.send(old(dialect, stream)[: -0 or None])
        await raw.head()
        await raw.until(b"\n" if dialect.sign != b" " and stream else b" ")
        await ask(q.port, "DELETE", "/llmq/requests?state=waiting")
        answer = await raw.response()
        assert not answer.clean
        assert raw.ended == "reset"


@pytest.mark.deadline(30)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_answer_may_come_at_the_moment_of_a_sign(stream: bool) -> None:
    """Sixty answers, spread over two seconds of signs each quarter of one; each is complete."""
    often = {**dict.fromkeys(SOON, 0.01), "queue__slots": 60}
    dialects = [one for one in SIGNS if one.streams]
    async with Runner(auto=False) as fake, running(fake.url, **often) as q:
        asked = [
            asyncio.ensure_future(
                dialects[number % len(dialects)].ask(q.port, f"n {number}", stream)
            )
            for number in range(60)
        ]
        for _ in range(60):
            request = await fake.arrived()
            for _ in range(8):  # the drip: each look at the status takes its while
                await q.status()
            await speak(request)
        for number, answer in enumerate(await asyncio.gather(*asked)):
            dialect = dialects[number % len(dialects)]
            assert dialect.text(answer) == f"n {number}"
            good = dialect.pieces("m", f"n {number}") if stream else []
            body = real_part(dialect, stream, answer.body)
            assert not good or body == b"".join(good)


@each_sign
async def test_bytes_of_an_answer_after_the_signs_are_the_backends(dialect: Dialect) -> None:
    async with busy() as (fake, q, first):
        raw = await dialect.begin(q.port, "häßlich 日本", True)
        await signs(raw, dialect, True, 2)
        await speak(first)
        await speak(await fake.arrived())
        answer = await rest(raw)
        good = b"".join(dialect.pieces("m", "häßlich 日本"))
        assert real_part(dialect, True, answer.body) == good


async def test_embeddings_after_signs_are_json_with_spaces_before_it() -> None:
    async with busy() as (fake, q, first):
        raw = await EMBEDDINGS.begin(q.port, "one two")
        await signs(raw, EMBEDDINGS, False, 3)
        await speak(first)
        await speak(await fake.arrived())
        answer = await rest(raw)
        assert answer.body.startswith(b"   {")
        assert answer.json() == EMBEDDINGS.whole("m", "one two")


# ---- As a process ----------------------------------------------------------------------------


@pytest.mark.deadline(20)
async def test_flags_set_the_times_and_a_signal_tells_who_waits() -> None:
    flags = ["--heartbeat-after", "0.3", "--heartbeat-interval", "0.3"]
    flags += ["--whole-heartbeat-after", "0.3", "--drain-timeout", "1"]
    async with Runner(auto=False) as fake:
        async with Process("--port", "0", "--backend", fake.url, *flags) as p:
            first = asyncio.ensure_future(CHAT.ask(p.port, "first"))
            request = await fake.arrived()
            raws = [await one.begin(p.port, "one", stream) for one, stream in SHAPES]
            for raw, (dialect, stream) in zip(raws, SHAPES):
                await signs(raw, dialect, stream, 1)
            p.signal(signal.SIGTERM)
            for raw, (dialect, stream) in zip(raws, SHAPES):
                assert_failed(await rest(raw), dialect, stream, "shutting down")
            await speak(request)
            assert CHAT.text(await first) == "first"
            assert await p.ended(0) == 0
            assert len(await eventually(lambda: fake.requests)) == 1
