"""The Anthropic routes: Claude's clients find their own streams, errors, headers and counts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.fake_ollama import (
    EVENTS,
    Runner,
    arrival,
    ended,
    exchange,
    least,
    named_event,
    named_events,
    open_stream,
    post,
    refuse,
    stream,
    told,
    told_to_stop,
    waiting,
    whole,
)
from tests.fakes import Answer, ask, running

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
NOBODY = "http://127.0.0.1:9"  # where no backend listens
VERSION = {"anthropic-version": "2023-06-01"}
each_kind = pytest.mark.parametrize("kind", ["ollama", "llamacpp", "openai"])
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 9, "output_tokens": 7},
}
START = {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}}
BEGIN = [
    named_event("message_start", START),
    named_event("ping", {"type": "ping"}),
    named_event(
        "content_block_start",
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    ),
]
FINISH = [
    named_event("content_block_stop", {"type": "content_block_stop", "index": 0}),
    named_event(
        "message_delta",
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 7},
        },
    ),
    named_event("message_stop", {"type": "message_stop"}),
]


def delta(text: str) -> bytes:
    inner = {"type": "text_delta", "text": text}
    document = {"type": "content_block_delta", "index": 0, "delta": inner}
    return named_event("content_block_delta", document)


GOOD = [*BEGIN, delta("one"), delta(" two"), *FINISH]


def assert_shape(document: Any, kind: str, *parts: str) -> None:
    assert document["type"] == "error", document
    assert document["error"]["type"] == kind, document
    assert isinstance(document["error"]["message"], str), document
    assert document["error"]["message"], document
    for part in parts:
        assert part in document["error"]["message"], document


def assert_error(answer: Answer, status: int, kind: str, *parts: str) -> None:
    """A whole error as Anthropic writes them, with the id that the headers tell."""
    assert (answer.status, answer.clean) == (status, True), answer
    assert answer.headers["content-type"].startswith("application/json"), answer
    assert_shape(answer.json(), kind, *parts)
    assert answer.json()["request_id"] == answer.headers["request-id"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def assert_broken(answer: Answer, sent: bytes, *parts: str) -> None:
    """What came was delivered, then `event: error`, and no end as if complete."""
    assert answer.status == 200, answer
    assert answer.body.startswith(sent), answer
    (name, document), *more = named_events(answer)[len(sent.split(b"\n\n")) - 1 :]
    assert (name, more) == ("error", []), answer
    assert_shape(document, document["error"]["type"], *parts)
    assert document["error"]["type"].endswith("_error")
    assert not answer.clean, answer
    assert b"message_stop" not in answer.body


# ---- What passes -----------------------------------------------------------------------------


@each_kind
async def test_message_passes_byte_for_byte_both_ways(kind: str) -> None:
    body = (
        b'{ "max_tokens":1.0e1,"model":"m", "metadata":{"user_id":"\\u0041"},"messages":'
        b'[{"role":"user","content":[{"type":"text","text":"hi","cache_control":{"a":1,"a":2}}]}]}'
    )
    answered = json.dumps(MESSAGE, indent=2).encode()
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, MESSAGES, body, answered)
        assert (request.path, request.body) == (MESSAGES, body)
        assert (answer.status, answer.clean, answer.body) == (200, True, answered)


@each_kind
async def test_stream_passes_byte_for_byte_and_ends_with_message_stop(kind: str) -> None:
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        body = least(MESSAGES, stream=True)
        _, answer = await exchange(q, runner, MESSAGES, body, GOOD, content_type=EVENTS)
        assert (answer.status, answer.clean, answer.body) == (200, True, b"".join(GOOD))
        assert answer.headers["content-type"].startswith(EVENTS)
        (record,) = await ended(q)
        assert (record["outcome"], record["route"]) == ("done", MESSAGES)


async def test_pieces_and_pings_of_the_runner_come_at_once() -> None:
    async with Runner() as runner, running(runner.url) as q:
        client = await open_stream(q, MESSAGES, least(MESSAGES, stream=True))
        request = await runner.arrived()
        await request.start_stream()
        for piece in [*BEGIN, delta("one"), named_event("ping", {"type": "ping"}), delta(" two")]:
            await request.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            assert piece in await client.until(b"\n\n\r\n")
        request.finished()
        await request.send(b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in FINISH))
        await request.send(b"0\r\n\r\n")
        assert b"message_stop" in await client.until(b"0\r\n\r\n")


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_record_has_the_output_tokens(streamed: bool) -> None:
    async with Runner() as runner, running(runner.url) as q:
        body = least(MESSAGES, stream=streamed)
        if streamed:
            await exchange(q, runner, MESSAGES, body, GOOD, content_type=EVENTS)
        else:
            await exchange(q, runner, MESSAGES, body, MESSAGE)
        (record,) = await ended(q)
        assert (record["tokens"], record["outcome"]) == (7, "done")


async def test_own_fields_are_cut_and_the_model_keeps_its_spelling() -> None:
    body = b'{"model":"counter","max_tokens":9,"priority":"low","messages":[{"role":"user"}]}'
    async with Runner(["counter:latest"]) as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, MESSAGES, body, MESSAGE)
        assert answer.status == 200
        wanted = b'{"model":"counter","max_tokens":9,"messages":[{"role":"user"}]}'
        assert request.body == wanted


async def test_alias_leads_claudes_names_to_a_model_that_is_there() -> None:
    async with Runner(["qwen3-coder:30b"]) as runner:
        async with running(runner.url, aliases={"claude-*": "qwen3-coder:30b"}) as q:
            body = least(MESSAGES, model="claude-sonnet-4-5-20250929")
            request, answer = await exchange(q, runner, MESSAGES, body, MESSAGE)
            assert answer.status == 200
            assert request.json == {**body, "model": "qwen3-coder:30b"}


async def test_query_string_is_kept() -> None:
    async with Runner() as runner, running(runner.url) as q:
        path = f"{MESSAGES}?beta=true"
        request, answer = await exchange(q, runner, path, least(MESSAGES), MESSAGE)
        assert (request.path, answer.status) == (path, 200)


@each_kind
@pytest.mark.parametrize(
    "key", [{"x-api-key": "sk-ant-1"}, {"Authorization": "Bearer sk-ant-1"}], ids=str
)
async def test_key_never_reaches_the_runner(kind: str, key: dict[str, str]) -> None:
    told_too = {
        **VERSION,
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "anthropic-dangerous-direct-browser-access": "true",
        "x-app": "cli",
    }
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        request, answer = await exchange(
            q, runner, MESSAGES, least(MESSAGES), MESSAGE, headers={**key, **told_too}
        )
        assert answer.status == 200
        assert b"sk-ant" not in request.raw
        for name in ("anthropic-version", "anthropic-beta"):
            assert request.headers[name] == told_too[name]
        assert "x-api-key" not in request.headers
        assert "x-app" not in request.headers


async def test_runner_gets_its_own_key_in_place_of_the_clients() -> None:
    async with Runner(kind="openai") as runner:
        settings = {"backends": {"one": {"url": runner.url, "key": "sk-own"}}}
        async with running(**settings) as q:
            request, answer = await exchange(
                q, runner, MESSAGES, least(MESSAGES), MESSAGE, headers={"x-api-key": "sk-ant-1"}
            )
            assert answer.status == 200
            assert b"sk-ant" not in request.raw
            assert b"sk-own" in request.raw


# ---- Errors before the head ------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"model":"m","model":"m"}', b'{"model":7}', b'{"priority":3}', b"\xff"],
    ids=ascii,
)
async def test_bad_body_is_an_invalid_request(body: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "POST", MESSAGES, body=body)
        assert_error(answer, 400, "invalid_request_error")
        assert not runner.requests


async def test_own_request_id_comes_back_in_the_error() -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        mine = {"X-Request-Id": "req_011.mine"}
        answer = await ask(q.port, "POST", MESSAGES, body=b"{", headers=mine)
        assert_error(answer, 400, "invalid_request_error")
        assert answer.json()["request_id"] == "req_011.mine"


async def test_unknown_model_is_not_found() -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "POST", MESSAGES, json=least(MESSAGES, model="claude-x"))
        assert_error(answer, 404, "not_found_error", "claude-x")


async def test_unknown_route_below_messages_is_not_found() -> None:
    async with running(NOBODY) as q:
        answer = await ask(q.port, "POST", f"{MESSAGES}/nope", json={})
        assert_error(answer, 404, "not_found_error")


async def test_body_that_is_too_large_is_told_so() -> None:
    async with Runner() as runner, running(runner.url, server__max_body=1000) as q:
        large = json.dumps(least(MESSAGES, x="y" * 2000)).encode()
        assert_error(await ask(q.port, "POST", MESSAGES, body=large), 413, "request_too_large")


async def test_full_queue_is_a_rate_limit() -> None:
    async with Runner() as runner, running(runner.url, queue__max_depth=2) as q:
        first = post(q, MESSAGES, least(MESSAGES))
        await arrival(first, runner)
        second = post(q, MESSAGES, least(MESSAGES))
        await waiting(q, 1)
        full = await ask(q.port, "POST", MESSAGES, json=least(MESSAGES))
        assert_error(full, 429, "rate_limit_error")
        assert 1 <= int(full.headers["retry-after"]) <= 60
        first.cancel()
        second.cancel()


async def test_end_of_service_is_an_overload() -> None:
    async with Runner() as runner:
        answer = await told_to_stop(runner, MESSAGES, least(MESSAGES))
        assert_error(answer, 503, "overloaded_error")
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_backend_that_is_down_is_an_overload() -> None:
    async with running(NOBODY, queue__down_wait=0.1) as q:
        answer = await ask(q.port, "POST", MESSAGES, json=least(MESSAGES))
        assert_error(answer, 503, "overloaded_error")


async def test_wait_that_is_too_long_is_an_overload() -> None:
    async with Runner() as runner, running(runner.url, queue__max_wait_normal=0.1) as q:
        first = post(q, MESSAGES, least(MESSAGES))
        await arrival(first, runner)
        late = await ask(q.port, "POST", MESSAGES, json=least(MESSAGES))
        assert_error(late, 503, "overloaded_error")
        assert late.headers["x-should-retry"] == "false"
        first.cancel()


async def test_silent_backend_is_a_timeout() -> None:
    async with Runner() as runner, running(runner.url, upstream__first_byte_timeout=0.2) as q:
        asked = post(q, MESSAGES, least(MESSAGES))
        await arrival(asked, runner)
        assert_error(await asked, 504, "timeout_error")


@pytest.mark.parametrize("body", [b"<html>", b"", b'{"type":"message"'], ids=ascii)
async def test_answer_that_is_none_is_an_api_error(body: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, MESSAGES, least(MESSAGES), body)
        assert_error(answer, 502, "api_error")


async def test_whole_answer_that_says_it_failed_is_an_api_error() -> None:
    failed = {"type": "error", "error": {"type": "api_error", "message": "it broke"}}
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, MESSAGES, least(MESSAGES), failed)
        assert_error(answer, 502, "api_error", "it broke")


STATUSES = [
    (400, "invalid_request_error"),
    (404, "not_found_error"),
    (413, "request_too_large"),
    (422, None),
    (429, "rate_limit_error"),
    (500, "api_error"),
    (503, "overloaded_error"),
    (504, "timeout_error"),
    (529, None),
]


@pytest.mark.parametrize(("status", "kind"), STATUSES)
async def test_error_of_the_runner_in_anthropics_shape_is_passed_on(
    status: int, kind: str | None
) -> None:
    """Its own type and words are kept, whatever they are."""
    text = "model 'm' not found" if status == 404 else "in words"
    own = {"type": "error", "error": {"type": kind or "own_error", "message": text}}
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, MESSAGES, least(MESSAGES))
        await refuse(await arrival(asked, runner), status, own)
        answer = await asked
        assert answer.status == status
        assert_shape(answer.json(), kind or "own_error", text)


@pytest.mark.parametrize(("status", "kind"), [pair for pair in STATUSES if pair[1]])
@pytest.mark.parametrize("shape", ["openai", "ollama"])
async def test_error_of_the_runner_in_another_shape_becomes_anthropics(
    status: int, kind: str, shape: str
) -> None:
    text = "model 'm' not found" if status == 404 else "in words"
    body: Any = {"error": {"message": text, "type": "x", "code": status}}
    if shape == "ollama":
        body = {"error": text}
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        asked = post(q, MESSAGES, least(MESSAGES))
        await refuse(await arrival(asked, runner), status, body)
        assert_error(await asked, status, kind, text)


@pytest.mark.parametrize("status", [401, 403])
async def test_key_that_the_runner_refuses_is_not_the_clients_fault(status: int) -> None:
    own = {"type": "error", "error": {"type": "authentication_error", "message": "no key"}}
    async with Runner() as runner:
        backends = {"box": {"url": runner.url, "key": "secret-7"}}
        async with running(backends=backends) as q:
            asked = post(q, MESSAGES, least(MESSAGES))
            await refuse(await arrival(asked, runner), status, own)
            assert_error(await asked, 502, "api_error")


@pytest.mark.parametrize("status", [401, 403])
async def test_runners_own_refusal_passes_where_llmq_sends_no_key(status: int) -> None:
    own = {"type": "error", "error": {"type": "authentication_error", "message": "no key"}}
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, MESSAGES, least(MESSAGES))
        await refuse(await arrival(asked, runner), status, own)
        answer = await asked
        assert (answer.status, answer.clean, answer.json()) == (status, True, own)


# ---- Errors in the stream --------------------------------------------------------------------


async def test_error_event_of_the_runner_ends_the_stream_uncleanly() -> None:
    failed = {"type": "error", "error": {"type": "overloaded_error", "message": "out of memory"}}
    sent = b"".join([*BEGIN, delta("one")])
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(
            q,
            runner,
            MESSAGES,
            least(MESSAGES, stream=True),
            [sent, named_event("error", failed)],
            content_type=EVENTS,
        )
        assert_broken(answer, sent, "out of memory")
        (record,) = await ended(q)
        assert record["outcome"] == "backend_error"


@pytest.mark.parametrize("clean", [True, False], ids=["without-stop", "cut"])
async def test_stream_without_message_stop_is_an_error(clean: bool) -> None:
    sent = [*BEGIN, delta("one"), *FINISH[:-1]]
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(
            q,
            runner,
            MESSAGES,
            least(MESSAGES, stream=True),
            sent,
            content_type=EVENTS,
            end=clean,
        )
        assert_broken(answer, b"".join(sent))


async def test_stream_that_is_cut_behind_message_stop_is_an_error() -> None:
    """`message_stop` is shown only when the answer has ended as HTTP says."""
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(
            q,
            runner,
            MESSAGES,
            least(MESSAGES, stream=True),
            GOOD,
            content_type=EVENTS,
            end=False,
        )
        assert_broken(answer, b"".join(GOOD[:-1]))


async def test_stream_that_breaks_inside_an_event_tells_the_error_in_one_of_its_own() -> None:
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(
            q,
            runner,
            MESSAGES,
            least(MESSAGES, stream=True),
            [*BEGIN, delta("one"), delta(" two")[:50]],
            content_type=EVENTS,
            end=False,
        )
        name, document = named_events(answer)[-1]
        assert name == "error", answer
        assert_shape(document, document["error"]["type"])
        assert not answer.clean


async def test_error_inside_a_line_too_long_to_be_held_stands_in_an_event_of_its_own() -> None:
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(
            q,
            runner,
            MESSAGES,
            least(MESSAGES, stream=True),
            [*BEGIN, delta("x" * 300_000)[:200_000]],
            content_type=EVENTS,
            end=False,
        )
        assert not answer.clean
        last = answer.body.rstrip(b"\n").split(b"\n\n")[-1]
        assert last.startswith(b"event: error\ndata: "), last[-500:]
        assert_shape(json.loads(last.partition(b"data: ")[2]), "api_error")


async def test_stream_that_falls_silent_is_a_timeout_in_the_stream() -> None:
    async with Runner() as runner, running(runner.url, upstream__idle_timeout=0.3) as q:
        asked = post(q, MESSAGES, least(MESSAGES, stream=True))
        request = await arrival(asked, runner)
        sent = b"".join([*BEGIN, delta("one")])
        await request.start_stream()
        await request.send(b"%x\r\n%s\r\n" % (len(sent), sent))
        answer = await asked
        assert_broken(answer, sent)
        assert named_events(answer)[-1][1]["error"]["type"] == "timeout_error"


async def test_text_that_only_looks_like_an_end_or_an_error_is_text() -> None:
    text = 'event: message_stop\ndata: {"type":"message_stop"}\n\nevent: error\n"error":{"x":1}'
    async with Runner() as runner, running(runner.url) as q:
        for end in (True, False):
            reply = [*BEGIN, delta(text), *(FINISH if end else [])]
            body = least(MESSAGES, stream=True)
            _, answer = await exchange(q, runner, MESSAGES, body, reply, content_type=EVENTS)
            assert answer.body.startswith(b"".join(reply))
            assert answer.clean is end
            assert (named_events(answer)[-1][0] == "error") is not end


@pytest.mark.deadline(20)
async def test_megabyte_in_one_event_passes() -> None:
    reply = [*BEGIN, delta("x" * (1 << 20)), *FINISH]
    cuts = b"".join(reply)
    pieces = [cuts[at : at + 50_000] for at in range(0, len(cuts), 50_000)]
    async with Runner() as runner, running(runner.url) as q:
        body = least(MESSAGES, stream=True)
        _, answer = await exchange(q, runner, MESSAGES, body, pieces, content_type=EVENTS)
        assert (answer.clean, answer.body) == (True, cuts)


# ---- Counting --------------------------------------------------------------------------------


def counted(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


async def test_runner_that_has_the_route_and_the_model_counts() -> None:
    body = b'{"model":"m", "messages":[{"role":"user","content":"\\u0041"}],"x":1.0}'
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        await told(q)
        answered = b'{ "input_tokens" : 1234 }'
        headers = {**VERSION, "x-api-key": "sk-ant-1"}
        request, answer = await exchange(q, runner, COUNT, body, answered, headers=headers)
        assert (request.path, request.body) == (COUNT, body)
        assert request.headers["anthropic-version"] == VERSION["anthropic-version"]
        assert b"sk-ant" not in request.raw
        assert (answer.status, answer.json()) == (200, {"input_tokens": 1234})


async def test_runner_is_asked_to_count_for_the_model_that_it_knows() -> None:
    async with Runner(["Qwen:latest"], kind="llamacpp") as runner:
        async with running(runner.url, aliases={"claude-*": "qwen"}) as q:
            await told(q)
            for name in ("claude-opus-4", "qwen"):
                body = counted("hi", model=name, priority="high")
                request, answer = await exchange(q, runner, COUNT, body, {"input_tokens": 3})
                assert request.json == counted("hi", model="Qwen:latest")
                assert answer.json() == {"input_tokens": 3}


async def test_counting_does_not_wait_in_the_queue() -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        first = post(q, MESSAGES, least(MESSAGES))
        running_one = await arrival(first, runner)
        await waiting(q, 0)
        request, answer = await exchange(q, runner, COUNT, counted("hi"), {"input_tokens": 3})
        assert (request.path, answer.json()) == (COUNT, {"input_tokens": 3})
        await whole(running_one, MESSAGE)
        assert (await first).status == 200


@pytest.mark.parametrize("kind", ["ollama", "openai", "lmstudio"])
async def test_count_is_estimated_where_the_runner_cannot(kind: str) -> None:
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        await told(q)
        numbers = []
        for text in ("", "word", "w" * 4_000, "w" * 400_000):
            answer = await ask(q.port, "POST", COUNT, json=counted(text), headers=VERSION)
            assert (answer.status, list(answer.json())) == (200, ["input_tokens"])
            numbers.append(answer.json()["input_tokens"])
        assert all(isinstance(number, int) for number in numbers)
        assert numbers == sorted(numbers)
        assert 1 <= numbers[0] <= numbers[1] <= 30
        assert 1_000 <= numbers[2] <= 1_100
        assert 100_000 <= numbers[3] <= 100_100
        assert not runner.requests


async def test_estimate_counts_everything_that_is_text() -> None:
    text = "w" * 4_000
    bodies = [
        counted("hi", system=text),
        counted("hi", system=[{"type": "text", "text": text}]),
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        counted("hi", tools=[{"name": "f", "description": text, "input_schema": {}}]),
    ]
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        for body in bodies:
            answer = await ask(q.port, "POST", COUNT, json=body)
            assert 1_000 <= answer.json()["input_tokens"] <= 1_200, body


@pytest.mark.parametrize("status", [404, 405, 500, 501])
async def test_count_is_estimated_when_the_runner_fails(status: int) -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        await told(q)
        asked = post(q, COUNT, counted("w" * 4_000))
        await refuse(await arrival(asked, runner), status, {"error": {"message": "no"}})
        answer = await asked
        assert answer.status == 200
        assert 1_000 <= answer.json()["input_tokens"] <= 1_100


async def test_count_is_estimated_when_the_runner_is_silent() -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        await told(q)
        asked = post(q, COUNT, counted("w" * 4_000))
        request = await arrival(asked, runner)
        answer = await asked  # the deadline of the test bounds the time
        await asyncio.wait_for(request.left(), 1)
        assert answer.status == 200
        assert 1_000 <= answer.json()["input_tokens"] <= 1_100


async def test_count_is_estimated_when_the_runner_answers_something_else() -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        await told(q)
        for body in (b"<html>", b"{}", b"[]", b""):
            _, answer = await exchange(q, runner, COUNT, counted("w" * 4_000), body)
            assert answer.status == 200, body
            assert 1_000 <= answer.json()["input_tokens"] <= 1_100, body


async def test_count_of_a_bad_body_is_an_invalid_request() -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        assert_error(await ask(q.port, "POST", COUNT, body=b"{"), 400, "invalid_request_error")


# ---- Models ----------------------------------------------------------------------------------


async def test_models_come_in_anthropics_shape_to_those_who_speak_it() -> None:
    async with Runner(["a:latest", "b:7b"]) as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "GET", "/v1/models", headers=VERSION)
        assert answer.status == 200
        page = answer.json()
        assert [one["id"] for one in page["data"]] == ["a:latest", "b:7b"]
        for one in page["data"]:
            assert one["type"] == "model"
            assert isinstance(one["display_name"], str)
            assert one["created_at"].endswith("Z") or "+" in one["created_at"]
        assert (page["first_id"], page["last_id"]) == ("a:latest", "b:7b")
        assert page["has_more"] is False


async def test_models_without_that_header_are_openais() -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "GET", "/v1/models")
        assert answer.json()["object"] == "list"
        assert "has_more" not in answer.json()


async def test_one_model_and_an_unknown_one_in_anthropics_shape() -> None:
    async with Runner(["org/a:7b"]) as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "GET", "/v1/models/org/a:7b", headers=VERSION)
        assert (answer.status, answer.json()["type"]) == (200, "model")
        assert answer.json()["id"] == "org/a:7b"
        answer = await ask(q.port, "GET", "/v1/models/none", headers=VERSION)
        assert_error(answer, 404, "not_found_error", "none")


async def test_no_models_are_an_empty_page() -> None:
    async with Runner([]) as runner, running(runner.url) as q:
        await told(q)
        page = (await ask(q.port, "GET", "/v1/models", headers=VERSION)).json()
        assert page == {"data": [], "has_more": False, "first_id": None, "last_id": None}


# ---- Signs of life ---------------------------------------------------------------------------


async def test_pings_while_waiting_and_an_error_event_after_them() -> None:
    beat = {"server__heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}
    async with Runner() as runner, running(runner.url, **beat) as q:
        first = post(q, "/v1/chat/completions", least("/v1/chat/completions"))
        busy = await arrival(first, runner)
        client = await open_stream(q, MESSAGES, least(MESSAGES, stream=True))
        for _ in range(3):
            ping = await client.until(b"\n\n")
            assert ping.endswith(b'event: ping\ndata: {"type":"ping"}\n\n'), ping
        await whole(busy, {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})
        assert (await first).status == 200
        own = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
        await refuse(await runner.arrived(), 400, own)
        text = await client.until(b"event: error\n")
        assert text.replace(b"\r\n", b"\n").count(b"event: error") == 1
        document = json.loads((await client.until(b"\n\n")).partition(b"data: ")[2])
        assert_shape(document, "invalid_request_error", "too long")
        rest = b""
        while data := await client.read():
            rest += data
        assert b"0\r\n\r\n" not in rest


async def test_stream_after_pings_is_whole() -> None:
    beat = {"server__heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}
    async with Runner() as runner, running(runner.url, **beat) as q:
        client = await open_stream(q, MESSAGES, least(MESSAGES, stream=True))
        request = await runner.arrived()
        answer = await client.head()
        assert answer.status == 200
        assert b"ping" in await client.until(b"\n\n\r\n")
        await stream(request, GOOD, EVENTS)
        answer = await client.response()
        assert answer.clean
        assert answer.body.endswith(b"".join(GOOD)), answer
