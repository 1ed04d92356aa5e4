"""Ollama's own routes: what passes, passes byte for byte; what fails is told in Ollama's shape."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

import llmq
from tests.fake_ollama import (
    COUNTS,
    EVENTS,
    NDJSON,
    RECORDINGS,
    ROUTES,
    Recording,
    Runner,
    arrival,
    chat_end,
    chat_line,
    ended,
    exchange,
    generate_end,
    generate_line,
    least,
    line,
    lines,
    open_stream,
    post,
    refuse,
    stream,
    told,
    told_to_stop,
    turns,
    waiting,
    whole,
)
from tests.fakes import Answer, FakeRequest, Raw, ask, http, running

MIB = 1024 * 1024
NOBODY = "http://127.0.0.1:9"  # where no backend listens
each_route = pytest.mark.parametrize("path", ROUTES["ollama"])
each_streamed = pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
EMBEDDING = {"model": "m", "embeddings": [[0.5, -1.0e-05]], "total_duration": 14}


def assert_error(answer: Answer, status: int, *parts: str) -> None:
    """A whole error as Ollama writes them: one text."""
    assert (answer.status, answer.clean) == (status, True), answer
    assert answer.headers["content-type"].startswith("application/json"), answer
    error = answer.json()
    assert list(error) == ["error"], answer
    assert isinstance(error["error"], str), answer
    assert error["error"], answer
    for part in parts:
        assert part in error["error"], answer


def assert_broken(answer: Answer, sent: list[Any], *parts: str) -> None:
    """What came was delivered, then one line with the error, and no end as if complete."""
    assert answer.status == 200, answer
    *good, last = lines(answer)
    assert good == sent, answer
    assert list(last) == ["error"], answer
    assert isinstance(last["error"], str), answer
    for part in parts:
        assert part in last["error"], answer
    assert not answer.clean, answer


def piece(path: str, text: str) -> dict[str, Any]:
    return chat_line(text) if path == "/api/chat" else generate_line(text)


def end(path: str, reason: str = "stop") -> dict[str, Any]:
    return chat_end(reason) if path == "/api/chat" else generate_end(reason)


# ---- What the tests stand on -----------------------------------------------------------------


def test_recordings_are_whole_and_read_as_they_were_sent() -> None:
    """The index tells how many bytes each had; json.loads judges what is read from them."""
    index = (RECORDINGS / "ollama.index.txt").read_text()
    told_of = re.findall(r"^(ollama\.\S+)\.response\.txt: .*\n +(\d+) bytes", index, re.MULTILINE)
    assert len(told_of) > 20
    for name, size in told_of:
        recorded = Recording(name)
        assert len(recorded.raw) == int(size), name
        if recorded.content_type.startswith("application/json"):
            assert isinstance(recorded.json(), dict)
        if recorded.content_type == NDJSON:
            said = [json.loads(one) for one in recorded.body.splitlines()]
            assert [one["done"] for one in said] == [False] * (len(said) - 1) + [True]
        if recorded.content_type == EVENTS:
            assert recorded.events()[-1] == "[DONE]"


# ---- What passes -----------------------------------------------------------------------------

CHATS = {
    "plain": b'{"model":"m","messages":[{"role":"user","content":"go 994"}]}',
    "spaced": b' {\n\t"messages" : [ {"role":"user","content":"hi"} ] ,\r\n "model" : "m" } \n',
    "escapes": b'{"model":"\\u006d","messages":[{"role":"user","content":"\\ud83e\\udd99 \\/"}]}',
    "unknown": b'{"model":"m","messages":[{}],"think":"high","shift":false,"x":{"a":1,"a":2}}',
    "numbers": b'{"model":"m","messages":[{"role":"user","content":"x"}],'
    b'"options":{"temperature":1.0e-1,"seed":-0,"top_k":40.0,"num_predict":-1}}',
    "keep alive": b'{"model":"m","messages":[{"role":"user","content":"x"}],"keep_alive":"10m"}',
    "tools": b'{"model":"m","messages":[{"role":"tool","tool_name":"f","content":"1"}],'
    b'"tools":[{"type":"function","function":{"name":"f","parameters":{"b":1,"a":2}}}]}',
    "images": b'{"model":"m","messages":[{"role":"user","content":"x","images":["aGk="]}]}',
    "format": b'{"model":"m","messages":[{"role":"user","content":"x"}],"format":{"type":"x"}}',
}


@pytest.mark.parametrize("body", CHATS.values(), ids=CHATS)
async def test_chat_reaches_the_runner_as_the_same_bytes(body: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, "/api/chat", body, [line(chat_end())])
        assert (request.method, request.path, request.body) == ("POST", "/api/chat", body)
        assert (answer.status, answer.body) == (200, line(chat_end()))


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","prompt":"hi","suffix":"end","options":{"num_predict":4}}',
        b'{"model":"m","prompt":"hi","images":["aGk="],"template":"{{ .Prompt }}","raw":true}',
        b'{"prompt":"hi","context":[1,2,3.0],"system":"be brief","model":"m","format":"json"}',
    ],
)
async def test_generate_reaches_the_runner_as_the_same_bytes(body: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, "/api/generate", body, [line(generate_end())])
        assert (request.path, request.body) == ("/api/generate", body)
        assert (answer.status, answer.body) == (200, line(generate_end()))


@pytest.mark.parametrize("name", ["api-chat-stream", "api-generate-stream"])
async def test_recorded_stream_is_relayed_byte_for_byte(name: str) -> None:
    recorded = Recording(f"ollama.{name}")
    path = "/api/chat" if "chat" in name else "/api/generate"
    async with Runner(["counter:latest"]) as runner, running(runner.url) as q:
        body = least(path, model="counter:latest")
        _, answer = await exchange(q, runner, path, body, recorded.replay)
        assert (answer.status, answer.clean) == (200, True)
        assert answer.headers["content-type"] == NDJSON
        assert answer.body == recorded.body


async def test_recorded_whole_answer_is_relayed_byte_for_byte() -> None:
    recorded = Recording("ollama.api-chat")
    async with Runner(["counter:latest"]) as runner, running(runner.url) as q:
        body = least("/api/chat", model="counter:latest", stream=False)
        _, answer = await exchange(q, runner, "/api/chat", body, recorded.replay)
        assert (answer.status, answer.clean, answer.body) == (200, True, recorded.body)
        assert answer.headers["content-type"] == recorded.content_type


@each_streamed
@pytest.mark.parametrize("asked", [{}, {"stream": True}, {"stream": None}], ids=str)
async def test_stream_is_the_default_and_its_pieces_come_at_once(path: str, asked: Any) -> None:
    async with Runner() as runner, running(runner.url) as q:
        client = await open_stream(q, path, least(path, **asked))
        request = await runner.arrived()
        await request.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for number, text in enumerate(("one", " two")):
            data = line(piece(path, text))
            await request.send(b"%x\r\n%s\r\n" % (len(data), data))
            if number == 0:
                assert (await client.head()).headers["content-type"] == NDJSON
            assert data in await client.until(b"}\n\r\n")
        data = line(end(path))
        request.finished()
        await request.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        assert data.rstrip(b"\n") in await client.until(b"0\r\n\r\n")


@each_streamed
async def test_whole_answer_when_stream_is_false(path: str) -> None:
    async with Runner() as runner, running(runner.url) as q:
        body = json.dumps(end(path), indent=1).encode()
        request, answer = await exchange(q, runner, path, least(path, stream=False), body)
        assert request.json["stream"] is False
        assert (answer.status, answer.body) == (200, body)
        assert "transfer-encoding" not in answer.headers


@pytest.mark.parametrize(
    ("path", "body", "answered"),
    [
        ("/api/embed", b'{"model":"m","input":["a","b"],"truncate":false,"x":1.50}', EMBEDDING),
        ("/api/embed", b'{"input":"a","model":"m","keep_alive":0,"dimensions":2}', EMBEDDING),
        ("/api/embeddings", b'{"model":"m","prompt":"a"}', {"embedding": [1.0, 2.5]}),
    ],
)
async def test_embeddings_pass_both_ways_byte_for_byte(
    path: str, body: bytes, answered: Any
) -> None:
    async with Runner() as runner, running(runner.url) as q:
        data = json.dumps(answered, separators=(" , ", " : ")).encode()
        request, answer = await exchange(q, runner, path, body, data)
        assert (request.path, request.body) == (path, body)
        assert (answer.status, answer.body) == (200, data)


@pytest.mark.deadline(20)
async def test_embeddings_by_the_megabyte_pass() -> None:
    big = {"model": "m", "embeddings": [[0.123456789] * 1000 for _ in range(300)]}
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, "/api/embed", least("/api/embed"), big)
        assert answer.json() == big


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", b'{"model":"m"}'),
        ("/api/chat", b'{"model":"m","messages":[]}'),
        ("/api/chat", b'{"model":"m","messages":[],"keep_alive":0}'),
        ("/api/generate", b'{"model":"m"}'),
        ("/api/generate", b'{"model":"m","prompt":"","keep_alive":-1}'),
        ("/api/generate", b'{"model":"m","keep_alive":0}'),
    ],
)
async def test_request_to_load_or_unload_passes_and_is_answered_whole(
    path: str, body: bytes
) -> None:
    """Ollama answers these whole, though the request says nothing of a stream."""
    reason = "unload" if b":0}" in body else "load"
    answered = {**piece(path, ""), "done_reason": reason, "done": True}
    async with Runner() as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, path, body, answered)
        assert (request.path, request.body) == (path, body)
        assert (answer.status, answer.clean, answer.json()) == (200, True, answered)
        (record,) = await ended(q)
        assert (record["outcome"], record["status"]) == ("done", 200)


@each_streamed
async def test_request_to_unload_goes_beside_the_queue_and_one_to_load_waits(path: str) -> None:
    """To unload needs no slot, and may be what makes room: in every mode, and while one runs."""
    unload = {"model": "m", "keep_alive": 0, "priority": "low"}
    unloaded = {**piece(path, ""), "done_reason": "unload", "done": True}
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        runs = post(q, path, least(path))
        running_one = await arrival(runs, runner)
        request, answer = await exchange(q, runner, path, unload, unloaded)
        assert (request.path, request.json) == (path, {"model": "m", "keep_alive": 0})
        assert (answer.status, answer.json()) == (200, unloaded)
        await stream(running_one, [line({**piece(path, ""), "done_reason": "stop", "done": True})])
        assert (await runs).clean
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        loads = post(q, path, {"model": "m"})
        await waiting(q, 1)
        _, answer = await exchange(q, runner, path, unload, unloaded)
        assert (answer.status, answer.json()) == (200, unloaded)
        assert len(runner.requests) == 3
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "open"})
        loaded = {**unloaded, "done_reason": "load"}
        await whole(await arrival(loads, runner), loaded)
        assert (await loads).json() == loaded


@each_streamed
async def test_stream_is_kept_back_by_no_proxy_and_taken_for_no_other_type(path: str) -> None:
    end = {**piece(path, "x"), "done_reason": "stop", "done": True}
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, path, least(path), [line(end)])
        assert (answer.status, answer.clean) == (200, True)
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_only_own_fields_are_cut_and_the_model_keeps_its_spelling() -> None:
    body = (
        b'{"priority":"high", "messages" : [{"role":"user","content":"\\u0041"}],'
        b' "model":"COUNTER" , "options":{"seed":1.0,"priority":"x"}}'
    )
    wanted = (
        b'{"messages" : [{"role":"user","content":"\\u0041"}],'
        b' "model":"COUNTER" , "options":{"seed":1.0,"priority":"x"}}'
    )
    async with Runner(["counter:latest"]) as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, "/api/chat", body, [line(chat_end())])
        assert request.body == wanted
        assert answer.status == 200


@each_route
@pytest.mark.parametrize("asked", ["counter", "counter:latest", "Counter:Latest"])
async def test_model_is_found_with_and_without_latest_and_in_any_case(
    path: str, asked: str
) -> None:
    answered = {"/api/embed": EMBEDDING, "/api/embeddings": {"embedding": [1]}}.get(path)
    async with Runner(["slow:latest", "counter:latest"]) as runner, running(runner.url) as q:
        reply = answered or [line(end(path))]
        request, answer = await exchange(q, runner, path, least(path, model=asked), reply)
        assert answer.status == 200
        assert request.json == least(path, model=asked), "Ollama takes each of these spellings"


@each_route
async def test_other_tag_is_another_model_and_not_found(path: str) -> None:
    async with Runner(["counter:latest", "qwen3:8b"]) as runner, running(runner.url) as q:
        await told(q)
        for unknown in ("counter:8b", "qwen3", "qwen3:4b", "counte", "no-such-model"):
            answer = await ask(q.port, "POST", path, json=least(path, model=unknown))
            assert_error(answer, 404, unknown, "not found")
        assert not runner.requests


@each_route
async def test_query_string_reaches_the_runner(path: str) -> None:
    answered = {"/api/embed": EMBEDDING, "/api/embeddings": {"embedding": [1]}}.get(path)
    async with Runner() as runner, running(runner.url) as q:
        reply = answered or [line(end(path))]
        request, answer = await exchange(q, runner, f"{path}?a=1&b=%2Fx%20y&&c", least(path), reply)
        assert request.path == f"{path}?a=1&b=%2Fx%20y&&c"
        assert answer.status == 200


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
async def test_body_is_json_whatever_the_client_calls_it(kind: str | None) -> None:
    """`curl -d` calls it a form, and Ollama's own examples use just that."""
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
    async with Runner() as runner, running(runner.url) as q:
        headers = {"Content-Type": kind} if kind else {}
        asked = asyncio.ensure_future(ask(q.port, "POST", "/api/chat", body=body, headers=headers))
        request = await arrival(asked, runner)
        assert request.body == body
        await stream(request, [line(chat_end())])
        assert (await asked).status == 200


async def test_headers_are_relayed_by_name_and_keys_are_not() -> None:
    sent = {"Accept": NDJSON, "User-Agent": "ollama-python/0.6.3", "traceparent": "00-a-b"}
    secret = {
        "Authorization": "Bearer sk-1",
        "x-api-key": "sk-2",
        "Cookie": "sk-3",
        "X-Own": "sk-4",
    }
    async with Runner() as runner, running(runner.url) as q:
        request, _ = await exchange(
            q,
            runner,
            "/api/chat",
            least("/api/chat"),
            [line(chat_end())],
            headers={**sent, **secret},
        )
        for name, value in sent.items():
            assert request.headers[name.lower()] == value
        assert request.headers["host"] == f"127.0.0.1:{runner.port}"
        assert b"sk-" not in request.raw


# ---- The record ------------------------------------------------------------------------------


@each_streamed
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_record_has_the_tokens_that_eval_count_tells(path: str, streamed: bool) -> None:
    async with Runner() as runner, running(runner.url) as q:
        reply = [line(piece(path, "x")), line(end(path))] if streamed else end(path)
        await exchange(q, runner, path, least(path, stream=streamed), reply)
        (record,) = await ended(q)
        assert (record["tokens"], record["outcome"]) == (COUNTS["eval_count"], "done")
        assert record["route"] == path


async def test_record_of_a_broken_stream_says_so() -> None:
    async with Runner() as runner, running(runner.url) as q:
        await exchange(q, runner, "/api/chat", least("/api/chat"), [line(chat_line("a"))])
        (record,) = await ended(q)
        assert record["outcome"] == "backend_error"


# ---- Errors before the head ------------------------------------------------------------------


@each_route
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"model":}',
        b'{"model":"m","model":"m"}',
        b'{"model":"\xff"}',
        b'{"model":7}',
        b'{"model":"m","priority":3}',
    ],
    ids=ascii,
)
async def test_bad_body_is_400_in_ollamas_shape(path: str, body: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "POST", path, body=body)
        assert_error(answer, 400)
        assert not runner.requests


@each_route
async def test_too_large_and_packed_bodies_are_refused_in_ollamas_shape(path: str) -> None:
    async with Runner() as runner, running(runner.url, server__max_body=1000) as q:
        await told(q)
        large = json.dumps(least(path, x="y" * 2000)).encode()
        assert_error(await ask(q.port, "POST", path, body=large), 413)
        packed = await ask(q.port, "POST", path, body=b"{}", headers={"Content-Encoding": "gzip"})
        assert_error(packed, 415)


@each_route
async def test_other_method_is_405_in_ollamas_shape(path: str) -> None:
    async with running(NOBODY) as q:
        assert_error(await ask(q.port, "GET", path), 405)


async def test_unknown_route_below_api_is_404_in_ollamas_shape() -> None:
    async with running(NOBODY) as q:
        assert_error(await ask(q.port, "POST", "/api/nope", json={}), 404)


@each_route
async def test_full_queue_is_429_in_ollamas_shape(path: str) -> None:
    async with Runner() as runner, running(runner.url, queue__max_depth=2) as q:
        first = post(q, path, least(path))
        await arrival(first, runner)
        second = post(q, path, least(path, user="two"))  # what is alike shares one run
        await waiting(q, 1)
        full = await ask(q.port, "POST", path, json=least(path, user="three"))
        assert_error(full, 429)
        assert 1 <= int(full.headers["retry-after"]) <= 60
        first.cancel()
        second.cancel()


async def test_end_of_service_is_503_in_ollamas_shape() -> None:
    async with Runner() as runner:
        answer = await told_to_stop(runner, "/api/generate", least("/api/generate"))
        assert_error(answer, 503)
        assert 1 <= int(answer.headers["retry-after"]) <= 60


@each_route
async def test_backend_that_is_down_is_503_in_ollamas_shape(path: str) -> None:
    async with running(NOBODY, queue__down_wait=0.1) as q:
        assert_error(await ask(q.port, "POST", path, json=least(path)), 503)


async def test_wait_that_is_too_long_is_503_in_ollamas_shape() -> None:
    async with Runner() as runner, running(runner.url, queue__max_wait_normal=0.1) as q:
        first = post(q, "/api/chat", least("/api/chat"))
        await arrival(first, runner)
        late = await ask(q.port, "POST", "/api/chat", json=least("/api/chat"))
        assert_error(late, 503)
        assert late.headers["x-should-retry"] == "false"
        first.cancel()


async def test_cancelled_request_is_499_in_ollamas_shape() -> None:
    async with Runner() as runner, running(runner.url) as q:
        first = post(q, "/api/chat", least("/api/chat"))
        await arrival(first, runner)
        second = post(q, "/api/chat", least("/api/chat"), {"X-Request-Id": "mine"})
        await waiting(q, 1)
        rows = (await q.status())["requests"]
        ident = next(row["id"] for row in rows if row["request_id"] == "mine")
        await ask(q.port, "DELETE", f"/llmq/requests/{ident}", json={})
        assert_error(await second, 499)
        first.cancel()


async def test_silent_backend_is_504_in_ollamas_shape() -> None:
    async with Runner() as runner, running(runner.url, upstream__first_byte_timeout=0.2) as q:
        asked = post(q, "/api/chat", least("/api/chat"))
        await arrival(asked, runner)
        assert_error(await asked, 504)


@each_route
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"error":"registry.ollama.ai/library/m:latest does not support thinking"}'),
        (400, b'{ "error" : "invalid options: \\u00e9" }\n'),
        (404, b'{"error":"model \'m\' not found"}'),
        (500, b'{"error":"model runner has unexpectedly stopped"}'),
        (
            503,
            b'{"error":"server busy, please try again.  maximum pending requests exceeded"}',
        ),
    ],
)
async def test_error_of_the_runner_is_passed_on_as_it_is(
    path: str, status: int, body: bytes
) -> None:
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, path, least(path))
        await refuse(await arrival(asked, runner), status, body)
        answer = await asked
        assert_error(answer, status, json.loads(body)["error"])
        assert answer.body == body
        assert len(runner.requests) == 1


async def test_openai_error_of_a_runner_becomes_ollamas_shape() -> None:
    body = {"error": {"message": "context is full", "type": "exceed_context_size_error"}}
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, "/api/chat", least("/api/chat"))
        await refuse(await arrival(asked, runner), 400, body)
        assert_error(await asked, 400, "context is full")


@pytest.mark.parametrize("status", [401, 403])
async def test_runners_own_refusal_passes_where_llmq_sends_no_key(status: int) -> None:
    """As it came, with the link to sign in; and it says nothing of the runner's health."""
    said = b'{"error": "unauthorized", "signin_url":"https://ollama.com/connect?name=x"}'
    async with Runner() as runner, running(runner.url) as q:
        for _ in range(4):
            asked = post(q, "/api/chat", least("/api/chat"))
            await refuse(await arrival(asked, runner), status, said)
            answer = await asked
            assert (answer.status, answer.clean, answer.body) == (status, True, said)
        assert (await q.status())["backends"][0]["state"] == "up"


@pytest.mark.parametrize("status", [401, 403])
async def test_key_that_the_runner_refuses_is_502_in_ollamas_shape(status: int) -> None:
    async with Runner() as runner:
        backends = {"box": {"url": runner.url, "key": "secret-7"}}
        async with running(backends=backends) as q:
            asked = post(q, "/api/chat", least("/api/chat"))
            await refuse(await arrival(asked, runner), status, {"error": "unauthorized"})
            answer = await asked
            assert_error(answer, 502)
            assert b"secret-7" not in answer.body


async def test_recorded_refusals_are_passed_on_as_they_are() -> None:
    async with Runner(["counter:latest"]) as runner, running(runner.url) as q:
        for name in ("ollama.api-chat-badjson", "ollama.api-unknown-model"):
            recorded = Recording(name)
            body = least("/api/chat", model="counter:latest")
            _, answer = await exchange(q, runner, "/api/chat", body, recorded.replay)
            assert_error(answer, recorded.status)
            assert answer.body == recorded.body


@each_streamed
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b'{"error":"it broke"}', b'{"model":"m","done":tr', b"[]", b'"text"'],
    ids=ascii,
)
async def test_whole_answer_that_is_none_is_502(path: str, body: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, path, least(path, stream=False), body)
        assert_error(answer, 502)


# ---- Errors in the stream --------------------------------------------------------------------


@each_streamed
async def test_error_line_of_the_runner_ends_the_stream_uncleanly(path: str) -> None:
    async with Runner() as runner, running(runner.url) as q:
        sent = [piece(path, "one"), piece(path, " two")]
        failed = {"error": "an error was encountered while running the model: out of memory"}
        reply = [line(sent[0]), line(sent[1]), line(failed)]
        _, answer = await exchange(q, runner, path, least(path), reply)
        assert_broken(answer, sent, "out of memory")
        (record,) = await ended(q)
        assert record["outcome"] == "backend_error"


@each_streamed
async def test_error_as_the_first_line_is_no_success(path: str) -> None:
    """The head may be out already or not: an error status, or a stream that breaks off."""
    async with Runner() as runner, running(runner.url) as q:
        reply = [line({"error": "no luck today"})]
        _, answer = await exchange(q, runner, path, least(path), reply)
        if answer.status == 200:
            assert_broken(answer, [], "no luck today")
        else:
            assert_error(answer, 502, "no luck today")


@each_streamed
@pytest.mark.parametrize("clean", [True, False], ids=["without-done", "cut"])
async def test_stream_that_ends_without_done_is_an_error(path: str, clean: bool) -> None:
    async with Runner() as runner, running(runner.url) as q:
        sent = [piece(path, "one"), piece(path, " two")]
        _, answer = await exchange(
            q, runner, path, least(path), [line(one) for one in sent], end=clean
        )
        assert_broken(answer, sent)


@each_streamed
async def test_stream_that_breaks_inside_a_line_tells_the_error_on_a_line_of_its_own(
    path: str,
) -> None:
    async with Runner() as runner, running(runner.url) as q:
        reply = [line(piece(path, "one")), line(piece(path, " two"))[:40]]
        _, answer = await exchange(q, runner, path, least(path), reply, end=False)
        *_, last = answer.body.rstrip(b"\n").split(b"\n")
        assert list(json.loads(last)) == ["error"], answer
        assert json.loads(answer.body.split(b"\n")[0]) == piece(path, "one")
        assert not answer.clean


@each_streamed
async def test_stream_that_breaks_behind_done_but_before_its_end_is_an_error(path: str) -> None:
    """`done` is shown to the client only when the answer has ended as HTTP says."""
    async with Runner() as runner, running(runner.url) as q:
        sent = [piece(path, "one")]
        reply = [line(sent[0]), line(end(path))]
        _, answer = await exchange(q, runner, path, least(path), reply, end=False)
        assert_broken(answer, sent)


@each_streamed
async def test_stream_that_falls_silent_is_an_error(path: str) -> None:
    async with Runner() as runner, running(runner.url, upstream__idle_timeout=0.3) as q:
        asked = post(q, path, least(path))
        request = await arrival(asked, runner)
        data = line(piece(path, "one"))
        await request.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(data), data)
        )
        assert_broken(await asked, [piece(path, "one")])


@pytest.mark.parametrize("form", ["close", "chunked"])
async def test_stream_of_http_1_0_ends_with_the_connection(form: str) -> None:
    """An old client without chunks: the end is the connection's, a failure is a reset."""
    async with Runner() as runner, running(runner.url) as q:
        for good in (True, False):
            raw = await Raw.open(q.port)
            body = json.dumps(least("/api/chat")).encode()
            head = b"POST /api/chat HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            await raw.send(head % len(body) + body)
            request = await runner.arrived()
            pieces = [line(chat_line("one"))] + [line(chat_end())] * good
            if form == "chunked":
                await stream(request, pieces)
            else:
                request.finished()
                start = b"HTTP/1.0 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n"
                await request.send(start + b"".join(pieces))
                request.close()
            answer = await raw.response()
            assert "transfer-encoding" not in answer.headers
            if good:
                assert (answer.clean, answer.body) == (True, b"".join(pieces))
            else:
                assert not answer.clean
                assert b'"done":true' not in answer.body


# ---- What only looks like the end ------------------------------------------------------------

LOOKALIKES = {
    "in tool arguments": chat_line(
        "",
        message={
            "tool_calls": [
                {"function": {"name": "f", "arguments": {"done": True, "done_reason": "stop"}}}
            ]
        },
    ),
    "as text": chat_line('"done":true}\n{"done":true}'),
    "as thinking": chat_line("", message={"thinking": ',"done":true,"done_reason":"stop"}'}),
    "in something new": chat_line("x", extra={"done": True}),
    "before the real one": {"extra": [{"done": True}], **chat_line("x")},
}


@pytest.mark.parametrize("lookalike", LOOKALIKES.values(), ids=LOOKALIKES)
async def test_what_only_looks_like_done_does_not_end_a_stream(lookalike: Any) -> None:
    async with Runner() as runner, running(runner.url) as q:
        for number, reply in enumerate(([lookalike, chat_end()], [lookalike])):
            data = [line(one) for one in reply]
            _, answer = await exchange(q, runner, "/api/chat", least("/api/chat"), data)
            if number == 0:
                assert (answer.clean, answer.body) == (True, b"".join(data))
            else:
                assert_broken(answer, [lookalike])


@pytest.mark.parametrize(
    "last",
    [
        b'{"done":true,"done_reason":"stop","eval_count":5}\n',
        b'{ "model" : "m", "done" : true , "eval_count" : 5 }\n',
        b'{"model":"m","done":true,"eval_count":5}\r\n',
        b'{"model":"m","done":true,"eval_count":5}',
        b'{"model":"m","done":true,"eval_count":5}\n\n',
    ],
    ids=ascii,
)
async def test_done_is_known_however_it_is_written(last: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        reply = [line(chat_line("x")), last]
        _, answer = await exchange(q, runner, "/api/chat", least("/api/chat"), reply)
        assert (answer.clean, answer.body) == (True, b"".join(reply)), answer
        (record,) = await ended(q)
        assert (record["outcome"], record["tokens"]) == ("done", 5)


@pytest.mark.parametrize(
    "line_of_error",
    [
        b'{"error":"boom"}\n',
        b'{ "error" : "boom" }\n',
        b'{"model":"m","error":"boom"}\n',
        b'{"error":"boom"}',
        b'{"error":{"message":"boom"}}\n',
    ],
    ids=ascii,
)
async def test_error_is_known_however_it_is_written(line_of_error: bytes) -> None:
    async with Runner() as runner, running(runner.url) as q:
        reply = [line(chat_line("x")), line_of_error]
        _, answer = await exchange(q, runner, "/api/chat", least("/api/chat"), reply)
        assert_broken(answer, [chat_line("x")], "boom")


async def test_talk_of_errors_is_no_error() -> None:
    reply = [
        line(chat_line('{"error":"boom"}')),
        line(chat_line("", message={"tool_calls": [{"function": {"arguments": {"error": "x"}}}]})),
        line(chat_line("x", error=None)),
        line(chat_end()),
    ]
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, "/api/chat", least("/api/chat"), reply)
        assert (answer.clean, answer.body) == (True, b"".join(reply))


# ---- Sizes and cuts --------------------------------------------------------------------------


@pytest.mark.deadline(30)
@pytest.mark.parametrize("size", [MIB, 9 * MIB])
async def test_very_long_lines_pass(size: int) -> None:
    """No limit where llmq relays; the end is known all the same."""
    long, last = line(chat_line("é" * (size // 2))), line(chat_end())
    cuts = [long[at : at + 50_000] for at in range(0, len(long), 50_000)]
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(
            q, runner, "/api/chat", least("/api/chat"), [line(chat_line("a")), *cuts, last]
        )
        assert answer.clean
        assert answer.body == line(chat_line("a")) + long + last
        (record,) = await ended(q)
        assert (record["outcome"], record["tokens"]) == ("done", COUNTS["eval_count"])


@pytest.mark.deadline(20)
async def test_very_long_last_line_passes_and_ends_the_stream() -> None:
    """/api/generate tells the whole context in its last line: a hundred thousand numbers."""
    last = line(generate_end(context=list(range(150_000))))
    cuts = [last[at : at + 50_000] for at in range(0, len(last), 50_000)]
    async with Runner() as runner, running(runner.url) as q:
        reply = [line(generate_line("a")), *cuts]
        _, answer = await exchange(q, runner, "/api/generate", least("/api/generate"), reply)
        assert (answer.clean, answer.body) == (True, b"".join(reply))
        (record,) = await ended(q)
        assert record["outcome"] == "done"


@pytest.mark.deadline(20)
async def test_very_long_line_without_done_is_an_error() -> None:
    long = line(chat_line("x" * MIB))
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, "/api/chat", least("/api/chat"), [long])
        assert not answer.clean
        *_, last = answer.body.rstrip(b"\n").split(b"\n")
        assert list(json.loads(last)) == ["error"]


@pytest.mark.deadline(30)
async def test_error_inside_a_line_too_long_to_be_held_stands_on_a_line_of_its_own() -> None:
    long = line(chat_line("x" * (9 * MIB)))[: -MIB // 2]
    cuts = [long[at : at + 50_000] for at in range(0, len(long), 50_000)]
    async with Runner() as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, "/api/chat", least("/api/chat"), cuts, end=False)
        assert not answer.clean
        *_, last = answer.body.rstrip(b"\n").split(b"\n")
        assert list(json.loads(last)) == ["error"]


@pytest.mark.untraced
@pytest.mark.deadline(30)
async def test_stream_cut_at_any_byte_is_the_same_stream() -> None:
    data = line(chat_line("日🦙é")) + line(chat_line("b")) + line(chat_end())
    async with Runner() as runner, running(runner.url) as q:
        raw = await Raw.open(q.port)
        body = json.dumps(least("/api/chat")).encode()
        for at in range(1, len(data)):
            await raw.send(http("POST", "/api/chat", {"Content-Type": "application/json"}, body))
            await two_halves(await runner.arrived(), data[:at], data[at:])
            answer = await raw.response()
            assert (answer.clean, answer.body) == (True, data), at


async def two_halves(request: FakeRequest, first: bytes, second: bytes) -> None:
    """Two chunks, the second sent when the first has surely been read."""
    await request.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(first), first)
    )
    await turns()
    request.finished()
    await request.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(second), second))


# ---- Clients and slots -----------------------------------------------------------------------


async def test_slot_is_free_for_the_next_at_once_whatever_the_dialect() -> None:
    async with Runner() as runner, running(runner.url) as q:
        first = post(q, "/api/chat", least("/api/chat"))
        request = await arrival(first, runner)
        asked = {path: post(q, path, least(path)) for path in ("/api/generate", "/v1/completions")}
        await waiting(q, 2)
        await stream(request, [line(chat_end())])
        assert (await first).status == 200
        for _ in range(2):
            request = await runner.arrived()
            if request.path == "/api/generate":
                await stream(request, [line(generate_end())])
            else:
                await whole(request, {"choices": [{"text": "x", "finish_reason": "stop"}]})
        assert [(await one).status for one in asked.values()] == [200, 200]
        assert runner.max_active == 1


async def test_client_that_leaves_ends_the_work_of_the_runner() -> None:
    async with Runner() as runner, running(runner.url) as q:
        client = await open_stream(q, "/api/chat", least("/api/chat"))
        request = await runner.arrived()
        client.close()
        await asyncio.wait_for(request.left(), 1)
        (record,) = await ended(q)
        assert record["outcome"] == "client_left"


# ---- Signs of life ---------------------------------------------------------------------------

BEAT = {"server__heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}


@each_streamed
async def test_spaces_while_waiting_and_a_whole_stream_after_them(path: str) -> None:
    """Go's client reads lines, and a line may begin with spaces; an empty line would end it."""
    sent = [line(piece(path, "one")), line(end(path))]
    async with Runner() as runner, running(runner.url, **BEAT) as q:
        first = post(q, path, least(path, stream=False))
        busy = await arrival(first, runner)
        client = await open_stream(q, path, least(path))
        answer = await client.head()
        assert (answer.status, answer.headers["content-type"]) == (200, NDJSON)
        assert await client.until(b" \r\n")
        await whole(busy, end(path))
        assert (await first).status == 200
        await stream(await runner.arrived(), sent)
        answer = await client.response()
        assert answer.clean
        assert answer.body.lstrip(b" ") == b"".join(sent)


@each_streamed
async def test_error_after_signs_of_life_is_a_line_of_its_own(path: str) -> None:
    async with Runner() as runner, running(runner.url, **BEAT) as q:
        client = await open_stream(q, path, least(path))
        request = await runner.arrived()
        await client.head()
        await client.until(b" \r\n")
        await refuse(request, 400, {"error": "does not support thinking"})
        answer = await client.response()
        assert not answer.clean
        assert json.loads(answer.body) == {"error": "does not support thinking"}
        assert answer.body.endswith(b"}\n")


@each_streamed
@pytest.mark.parametrize(
    ("status", "told_back", "becomes"),
    [(404, {"error": "model 'm' not found"}, 404), (200, b"no JSON", 502), (200, b"[]", 502)],
)
async def test_unloading_that_failed_never_looks_like_success(
    path: str, status: int, told_back: Any, becomes: int
) -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        asked = post(q, path, {"model": "m", "keep_alive": 0})
        request = await arrival(asked, runner)
        assert "llmq-" in request.headers["via"], "so that a circle is found"
        await request.status(status, told_back)
        answer = await asked
        assert answer.status == becomes
        assert isinstance(answer.json()["error"], str)
        (record,) = await ended(q)
        assert record["outcome"] != "done"
        assert record["status"] == becomes


@each_streamed
async def test_unloading_is_asked_of_the_ollamas_that_are_up_and_waits_for_one(path: str) -> None:
    unload = {"model": "m", "keep_alive": 0}
    unloaded = {**piece(path, ""), "done_reason": "unload", "done": True}
    async with Runner() as runner, Runner() as other, running(runner.url, other.url) as q:
        await told(q)
        first, second = q.gateway.fleet.backends.values()
        first.state = llmq.State.DOWN
        _, answer = await exchange(q, other, path, unload, unloaded)
        assert (answer.status, answer.json()) == (200, unloaded)
        assert runner.requests == []
        second.state, second.next_probe = llmq.State.DOWN, float("inf")
        first.next_probe = float("inf")
        asked = post(q, path, unload)
        await waiting(q, 1)
        q.gateway.monitor.probe_now(second)
        await whole(await arrival(asked, other), unloaded)
        assert (await asked).json() == unloaded


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_order_to_unload_is_answered_in_the_name_that_was_asked_for(kind: str) -> None:
    async with Runner(["m"], kind) as runner, running(runner.url, aliases={"fast": "m"}) as q:
        await told(q)
        asked = post(q, "/api/chat", {"model": "fast", "messages": [], "keep_alive": 0})
        if kind == "ollama":
            request = await arrival(asked, runner)
            assert request.json["model"] == "m"
            await whole(request, chat_end("unload", model="m"))
        answer = (await asked).json()
        assert (answer["model"], answer["done_reason"]) == ("fast", "unload")
