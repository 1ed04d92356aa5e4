"""The life of one request: its model, its limits, what is said of it, its line in the log."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.fake_ollama import Runner
from tests.fakes import (
    Answer,
    FakeBackend,
    Raw,
    ask,
    black_hole,
    chat,
    chunk,
    eventually,
    http,
    running,
    sse,
)

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOBODY = "http://127.0.0.1:9"  # where no backend listens


async def begin(
    q: running, text: str, headers: dict[str, str] | None = None, path: str = CHAT, **more: Any
) -> Raw:
    """A client that has sent its request and waits."""
    raw = await Raw.open(q.port)
    body = json.dumps(chat(text, **more)).encode()
    await raw.send(http("POST", path, {**JSON, **(headers or {})}, body))
    return raw


async def waiting(q: running, number: int) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


# ---- Which model -----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, "", "  "])
async def test_request_without_a_model_gets_the_one_that_is_set(named: str | None) -> None:
    async with FakeBackend(models=["first", "set"]) as fake:
        async with running(fake.url, upstream__model="set") as q:
            assert (await q.chat("x", model=named)).status == 200
            assert fake.requests[0].json["model"] == "set"
            assert (await q.chat("x", model="first")).status == 200
            assert fake.requests[1].json["model"] == "first"


async def test_request_without_a_model_gets_the_first_that_is_no_embedding_model() -> None:
    async with FakeBackend(models=["nomic-embed-text", "bge-m3", "chatty", "other"]) as fake:
        async with running(fake.url) as q:
            answer = await q.chat("x", model=None, numCtx=None, priority="high")
            assert answer.status == 200
            assert fake.requests[0].json == {**chat("x"), "model": "chatty"}


async def test_request_without_a_model_is_told_when_no_backend_has_any() -> None:
    async with FakeBackend(models=[]) as fake, running(fake.url) as q:
        answer = await q.chat("x", model=None)
        assert (answer.status, answer.code) == (503, "backend_down")
        assert "model" in answer.json()["error"]["message"]


# ---- Limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "limited"),
    [
        ("queue.max_wait_high", "high"),
        ("queue.max_wait_normal", "normal"),
        ("queue.max_wait_low", "low"),
    ],
)
async def test_each_class_has_its_own_longest_wait(setting: str, limited: str) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, **{setting: 0.3}) as q:
            running_one = await begin(q, "runs")
            first = await fake.arrived()
            clients = {name: await begin(q, name, priority=name) for name in llmq.PRIORITY_WORDS}
            answer = await clients.pop(limited).response()
            assert (answer.status, answer.code) == (503, "wait_timeout")
            assert answer.headers["x-should-retry"] == "false"
            assert len(q.gateway.scheduler.waiting) == 2
            await first.answer("done")
            for name, client in clients.items():
                request = await fake.arrived()
                assert request.text == name
                await request.answer(name)
                assert (await client.response()).content == name
            assert (await running_one.response()).content == "done"


async def test_429_and_503_say_when_to_come_again() -> None:
    answers: list[Answer] = []
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, queue__max_depth=2, queue__max_wait_low=0.1) as q:
            first = await begin(q, "runs")
            await fake.arrived()
            held = await begin(q, "waits", {"X-User-ID": "a"})
            await waiting(q, 1)
            answers.append(await q.chat("full", headers={"X-User-ID": "a"}))
            answers.append(await q.chat("late", headers={"X-User-ID": "b"}, priority="low"))
            q.gateway.drain()
            answers += [await held.response(), await q.chat("too late")]
            first.close()
    async with running(NOBODY, queue__down_wait=0.1) as q:
        answers.append(await q.chat("down"))
    assert [answer.code for answer in answers] == [
        "queue_full",
        "wait_timeout",
        "shutting_down",
        "shutting_down",
        "backend_down",
    ]
    for answer in answers:
        assert answer.status in (429, 503)
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_retry_after_is_the_predicted_wait() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__max_depth=8) as q:
        q.gateway.scheduler.service.add(4.0)  # seconds that a request took so far
        clients = [await begin(q, "runs")]
        await fake.arrived()
        clients += [await begin(q, "waits", {"X-User-ID": "a"}) for _ in range(4)]
        await waiting(q, 4)
        answer = await q.chat("one too many", headers={"X-User-ID": "a"})
        assert (answer.status, answer.headers["retry-after"]) == (429, "20")
        q.gateway.scheduler.service.add(1000.0)
        answer = await q.chat("one too many", headers={"X-User-ID": "a"})
        assert (answer.status, answer.headers["retry-after"]) == (429, "60")
        for client in clients:
            client.close()


# ---- What is said of the way it took ---------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_says_backend_and_wait(stream: bool) -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        one, other = await begin(q, "a"), await begin(q, "b", stream=stream)
        await waiting(q, 1)
        request = await fake.arrived()
        arrived = next(iter(q.gateway.scheduler.waiting.values())).arrived
        await eventually(lambda: q.gateway.now() > arrived + 0.02)
        await request.answer("a")
        await (await fake.arrived()).answer("b")
        first, second = await one.response(), await other.response()
        assert first.headers["x-llmq-backend"] == second.headers["x-llmq-backend"] == "box"
        assert int(first.headers["x-llmq-wait-ms"]) >= 0
        assert 20 <= int(second.headers["x-llmq-wait-ms"]) < 10000


async def test_error_of_a_backend_says_which() -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        client = await begin(q, "a")
        await (await fake.arrived()).status(500, {"error": {"message": "out of memory"}})
        answer = await client.response()
        assert answer.status == 500
        assert answer.headers["x-llmq-backend"] == "box"
        waited = await q.chat("a", model="nobody has it")
        assert "x-llmq-backend" not in waited.headers


# ---- One line in the log ---------------------------------------------------------------------

SECRETS = {"Authorization": "Bearer sk-secret", "X-Api-Key": "sk-secret", "Cookie": "a=sk-secret"}
LEAVES_OUT = ("tell nobody", "sk-secret", "api-version", "backend-secret")


def lines(caplog: pytest.LogCaptureFixture) -> list[Any]:
    batches = [one.msg for one in caplog.records if isinstance(one.msg, llmq.Lines)]
    return [record for batch in batches for _, record in batch.rows]


def assert_discreet(caplog: pytest.LogCaptureFixture) -> None:
    text = caplog.text + "".join(json.dumps(line.facts()) for line in lines(caplog))
    assert not [word for word in LEAVES_OUT if word in text]


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """The log, where each line is written at once."""
    keep = llmq.Journal.keep
    monkeypatch.setattr(llmq.Journal, "keep", lambda one, it: (keep(one, it), one.flush()))
    caplog.set_level(logging.DEBUG, "llmq")
    return caplog


async def send(q: running, headers: dict[str, str] | None = None, **more: Any) -> Raw:
    """A request with everything that no log may show."""
    path = CHAT + "?api-version=1&key=sk-secret"
    return await begin(q, "tell nobody", {**SECRETS, **(headers or {})}, path, **more)


@pytest.mark.parametrize("stream", [False, True])
async def test_served_request_has_one_line_with_all_facts(
    log: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with FakeBackend(auto=False) as fake:
        box = {"box": {"url": fake.url, "key": "backend-secret"}}
        async with running(backends=box) as q:
            headers = {"X-User-ID": "alice", "X-Request-Id": "mine"}
            usage = {"stream_options": {"include_usage": True}} if stream else {}
            client = await send(q, headers, stream=stream, priority="high", **usage)
            await (await fake.arrived()).answer("tell nobody three")
            answer = await client.response()
            (line,) = lines(log)
        facts = line.facts()
        assert facts["id"] == answer.headers["x-llmq-id"]
        assert 0 <= facts["wait_s"] <= facts["first_s"] <= facts["total_s"] < 10
        assert facts["tokens_per_s"] > 0
        for name in ("id", "wait_s", "first_s", "total_s", "tokens_per_s"):
            del facts[name]
        assert facts == {
            "request_id": "mine",
            "client": "user:alice",
            "class": "high",
            "model": "m",
            "route": CHAT,
            "backend": "box",
            "tokens_in": 1,
            "tokens": 3,
            "status": 200,
            "outcome": "done",
            "cut": False,
            "cache": "",
            "error": None,
        }
        text = str(line)
        assert text.startswith(f"200 {CHAT} id={answer.headers['x-llmq-id']} ")
        assert text.endswith(" tokens=3 outcome=done")
        for word in ("client=user:alice", "class=high", "model=m", "backend=box"):
            assert f" {word} " in text
        assert re.search(r" wait=\d+\.\d{3} first=\d+\.\d{3} total=\d+\.\d{3} ", text)
        assert_discreet(log)


async def test_request_that_left_or_was_cancelled_has_one_line(
    log: pytest.LogCaptureFixture,
) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        first = await send(q)
        request = await fake.arrived()
        second, third = await send(q), await send(q)
        await waiting(q, 2)
        second.rst()
        await waiting(q, 1)
        (ticket,) = q.gateway.scheduler.waiting
        assert (await ask(q.port, "DELETE", f"/llmq/requests/{ticket}")).status == 200
        assert (await third.response()).status == 499
        first.close()
        await request.left()
        await eventually(lambda: len(lines(log)) == 3)
    outcomes = [(line.status, line.outcome, line.first_s) for line in lines(log)]
    assert outcomes == [
        (499, "client_left", None),
        (499, "cancelled", None),
        (499, "client_left", None),
    ]
    assert [bool(line.backend) for line in lines(log)] == [False, False, True]
    assert_discreet(log)


async def test_failed_request_has_one_line(log: pytest.LogCaptureFixture) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await send(q)
        await (await fake.arrived()).status(500, {"error": {"message": "out of memory"}})
        assert (await client.response()).status == 500
        client = await send(q, stream=True)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("tell nobody ")
        await client.until(b"tell nobody")
        request.reset()
        await client.closed()
        await eventually(lambda: len(lines(log)) == 2)
    outcomes = [(line.status, line.outcome) for line in lines(log)]
    assert outcomes == [(500, "backend_answer"), (200, "backend_error")]
    assert lines(log)[1].first_s is not None
    assert_discreet(log)


REFUSED: dict[str, tuple[bytes, dict[str, str], str]] = {
    "no JSON": (b"tell nobody", {}, "bad_request"),
    "no messages": (b'{"model":"tell nobody"}', {}, "bad_request"),
    "odd class": (b'{"messages":[{}],"priority":"tell nobody"}', {}, "bad_request"),
    "compressed": (b"{}", {"Content-Encoding": "gzip"}, "unsupported_media_type"),
    "too large": (b" " * 2000, {}, "body_too_large"),
    "too large, chunked": (
        b"7d0\r\n" + b" " * 2000 + b"\r\n0\r\n\r\n",
        {"Transfer-Encoding": "chunked"},
        "body_too_large",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
async def test_refused_request_has_one_line(
    log: pytest.LogCaptureFixture, case: tuple[bytes, dict[str, str], str]
) -> None:
    body, headers, code = case
    async with FakeBackend() as fake, running(fake.url, server__max_body=1000) as q:
        path = CHAT + "?api-version=1"
        answer = await ask(q.port, "POST", path, body=body, headers={**SECRETS, **JSON, **headers})
        assert answer.code == code
    (line,) = lines(log)
    assert (line.status, line.outcome, line.route) == (answer.status, code, CHAT)
    assert_discreet(log)


async def test_request_for_a_model_that_nobody_has_or_for_a_full_queue_has_one_line(
    log: pytest.LogCaptureFixture,
) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__max_depth=1) as q:
        assert (await (await send(q, model="nobody")).response()).status == 404
        held = await send(q)
        await fake.arrived()
        other = await send(q)
        await waiting(q, 1)
        assert (await (await send(q)).response()).status == 429
        assert [line.outcome for line in lines(log)] == ["model_not_found", "queue_full"]
        held.close()
        other.close()
    assert_discreet(log)


async def test_client_cannot_write_lines_or_facts_into_the_log(
    log: pytest.LogCaptureFixture,
) -> None:
    async with FakeBackend(models=["m"]) as fake, running(fake.url) as q:
        odd = "m\n200 outcome=done\x1b[31m\u2028"
        assert (await q.chat("x", model=odd, headers={"X-User-ID": "a b=c"})).status == 404
        answer = await q.chat("x", headers={"X-User-ID": "eve class=high"})
        assert answer.status == 200
    for line in lines(log):
        assert str(line).isprintable()
        facts, quoted, error = str(line).partition(" error=")  # which is the last, and one string
        assert facts.count("outcome=") == facts.count("class=") == 1
        assert not quoted or json.loads(error) == line.error


async def test_failed_request_is_told_with_its_sentence_and_a_refused_one_without(
    log: pytest.LogCaptureFixture,
) -> None:
    long = 'out of "memory"\n\x1b[31m' + "y" * 500
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        for status in (500, 400, 404):
            client = await begin(q, "a")
            await (await fake.arrived()).status(status, {"error": {"message": long}})
            assert (await client.response()).status == status
        client = await begin(q, "a", stream=True)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("one")
        await request.send(chunk(sse({"error": {"message": "the slot is gone"}})))
        assert not (await client.response()).clean
        assert (await ask(q.port, "POST", CHAT, body=b"no JSON", headers=JSON)).status == 400
        recent = (await q.status())["recent"]
    ended = lines(log)
    failed = ended[0]
    assert len(failed.error) <= 200
    assert failed.error.startswith('out of "memory"')
    assert failed.error.isprintable()
    assert [line.error for line in ended[1:3]] == [None, None], "a 4xx may quote a prompt"
    assert ended[3].error == "the slot is gone"
    assert ended[4].error
    assert [row["error"] for row in recent] == [line.error for line in reversed(ended)]
    for line in ended:
        text = f" outcome={line.outcome}"
        assert str(line).endswith(text + (f" error={json.dumps(line.error)}" if line.error else ""))
        assert line.facts()["error"] == line.error


async def test_who_left_is_counted_apart_from_failures() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        for give_up in (Raw.rst, Raw.close):
            client = await begin(q, "a", {"X-User-ID": "alice"})
            request = await fake.arrived()
            (call,) = q.gateway.calls.values()
            give_up(client)
            await request.left()
            await eventually(lambda: not q.gateway.calls)
        alice = call.ticket.client
        assert (alice.done, alice.failed, alice.left) == (0, 0, 2)
        client = await begin(q, "a", {"X-User-ID": "alice"})
        await fake.arrived()
        (ticket,) = q.gateway.calls
        await ask(q.port, "DELETE", f"/llmq/requests/{ticket}")
        assert (await client.response()).status == 499
        assert (alice.done, alice.failed, alice.left) == (0, 1, 2), "that was an order"


@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/llmq/events"])
async def test_streams_are_held_back_by_no_proxy_and_sniffed_by_no_browser(path: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        client = await Raw.open(q.port)
        body = json.dumps(chat("one two", stream=True)).encode()
        method = "GET" if path == "/llmq/events" else "POST"
        await client.send(http(method, path, JSON, body if method == "POST" else None))
        head = await client.head()
        assert head.status == 200
        assert head.headers["x-accel-buffering"] == "no"
        assert head.headers["x-content-type-options"] == "nosniff"
        client.close()


async def test_health_and_reads_have_no_line_of_a_request(log: pytest.LogCaptureFixture) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for path in ("/health", "/v1/models", "/llmq/status"):
            assert (await ask(q.port, "GET", path)).status == 200
    assert not lines(log)


# ---- Books -----------------------------------------------------------------------------------


async def test_books_of_clients_and_outcomes_are_kept() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        for answer in ("good", "bad", "good"):
            client = await begin(q, answer, {"X-User-ID": "alice"})
            request = await fake.arrived()
            if answer == "good":
                await request.answer("x")
            else:
                await request.status(500, {})
            await client.response()
        await q.chat("x", model="nobody")
        snapshot = await q.status()
        (alice,) = snapshot["clients"]
        assert (alice["name"], alice["done"], alice["failed"]) == ("user:alice", 2, 1)
        assert (alice["waiting"], alice["running"]) == (0, 0)
        assert alice["served_s"] > 0
        totals = snapshot["requests_total"]
        assert totals == {"done": 2, "backend_answer": 1, "model_not_found": 1}


async def test_request_beyond_the_body_limit_never_reaches_a_backend() -> None:
    async with FakeBackend() as fake, running(fake.url, server__max_body=1000) as q:
        assert (await q.chat("x" * 2000)).status == 413
        assert (await q.chat("small")).content == "small"
        assert [request.text for request in fake.requests] == ["small"]


# ---- What nobody wishes for ------------------------------------------------------------------


async def test_stream_that_breaks_ends_in_a_reset_where_no_chunks_can_show_it() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await Raw.open(q.port)
        body = json.dumps(chat("a", stream=True)).encode()
        old = http("POST", CHAT, JSON, body).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        await client.send(old)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("one ")
        answer = await client.head()
        assert not {"transfer-encoding", "content-length"} & answer.headers.keys()
        await client.until(b"one ")
        request.reset()
        await client.until(b'"error":')
        assert await client.closed() == "reset"


async def test_old_client_gets_its_stream_to_the_end_of_the_connection() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        client = await Raw.open(q.port)
        body = json.dumps(chat("one two", stream=True)).encode()
        await client.send(http("POST", CHAT, JSON, body).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        answer = await client.response()
        assert (answer.content, answer.clean) == ("one two", True)
        assert answer.events()[-1] == "[DONE]"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_answer_beyond_the_largest_is_a_502(framing: str) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, upstream__max_answer=5000) as q:
        client = await begin(q, "a")
        request = await fake.arrived()
        body = b'{"x":"' + b"x" * 6000 + b'"}'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        if framing == "length":
            await request.send(head + b"Content-Length: 7000\r\n\r\n" + body)
        elif framing == "chunked":
            await request.send(head + b"Transfer-Encoding: chunked\r\n\r\n1b58\r\n" + body)
        else:
            await request.send(head + b"\r\n" + body)
        answer = await client.response()
        assert (answer.status, answer.code) == (502, "backend_error")
        await request.left()
        assert not q.gateway.scheduler.running


async def test_answer_of_nothing_but_white_space_is_given_up_and_some_of_it_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "BLANK_LIMIT", 2000)
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await begin(q, "a")
        body = b" " * 1900 + b'{"x":"' + b" " * 2000 + b'"}'
        await (await fake.arrived()).status(200, body, [("Content-Type", "application/json")])
        assert (await client.response()).body == body
        client = await begin(q, "b")
        request = await fake.arrived()
        await request.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 2100
        )
        answer = await client.response()
        assert (answer.status, answer.code) == (502, "backend_error")
        await request.left()


async def test_answer_of_just_the_largest_size_passes() -> None:
    body = b'{"x":"' + b"x" * 4992 + b'"}'
    async with FakeBackend(auto=False) as fake, running(fake.url, upstream__max_answer=5000) as q:
        client = await begin(q, "a")
        await (await fake.arrived()).status(200, body, [("Content-Type", "application/json")])
        answer = await client.response()
        assert (answer.status, answer.body, len(body)) == (200, body, 5000)
    assert llmq.Settings().upstream.max_answer == 1 << 30


async def test_exception_in_mid_stream_ends_unclean_and_frees_the_slot(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    feed = llmq.StreamWatch.feed

    def broken(watch: Any, piece: bytes) -> bytes:
        if b"two" in piece:
            raise ZeroDivisionError("nobody foresaw this")
        return bytes(feed(watch, piece))

    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        monkeypatch.setattr(llmq.StreamWatch, "feed", broken)
        client = await begin(q, "a", stream=True)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("one ")
        await client.head()
        await client.until(b"one ")
        await request.piece("two ")
        assert await client.closed()
        await request.left()
        monkeypatch.undo()
        task = asyncio.ensure_future(q.chat("next"))
        await (await fake.arrived()).answer("next")
        assert (await task).content == "next"
    failed, served = [line.outcome for line in lines(log)]
    assert failed in ("internal_error", "backend_error")
    assert served == "done"


VECTORS = {"embeddings": [[0.5]], "embedding": [0.5], "data": [{"embedding": [0.5], "index": 0}]}


@pytest.mark.parametrize("kind", ["ollama", "llamacpp"])
@pytest.mark.parametrize(
    "asked",
    [
        {"path": "/api/embed", "input": "hi"},
        {"path": "/api/embeddings", "prompt": "hi"},
        {"path": "/v1/embeddings", "input": "hi"},
        {"path": "/v1/embeddings", "input": "hi", "numCtx": 4096},
    ],
    ids=lambda asked: asked["path"],
)
async def test_embeddings_are_whole_although_a_stream_is_asked_for(kind: str, asked: Any) -> None:
    """No runner streams them, and each passes over the wish."""
    path, body = asked["path"], {"model": "m", "stream": True, **asked}
    del body["path"]
    async with Runner(kind=kind) as fake, running(fake.url) as q:
        await eventually(lambda: all(one.models_known for one in q.gateway.fleet.backends.values()))
        client = asyncio.ensure_future(ask(q.port, "POST", path, json=body))
        request = await fake.arrived()
        await request.status(200, VECTORS, [("Content-Type", "application/json")])
        answer = await client
        assert (answer.status, answer.clean) == (200, True), answer
        assert b"0.5" in answer.body


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed"])
async def test_request_of_nothing_at_all_reaches_the_runner_as_json(path: str) -> None:
    async with FakeBackend(auto=False, kind="ollama") as fake:
        async with running(fake.url, upstream__num_ctx=4096) as q:
            await eventually(
                lambda: all(one.models_known for one in q.gateway.fleet.backends.values())
            )
            client = asyncio.ensure_future(ask(q.port, "POST", path, json={}))
            request = await fake.arrived()
            embeds = path == "/api/embed"  # whose context is its own affair unless it asks
            more = {} if embeds else {"options": {"num_ctx": 4096}}
            assert json.loads(request.body) == {"model": "m", **more}
            await request.status(400, {"error": "prompt is required"})
            assert (await client).status == 400


DEEP_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
DEEP = [{"role": "assistant", "content": "", "tool_calls": [DEEP_CALL]}]
TOLD = {"message": {"role": "assistant", "content": "x"}, "done": True}


async def test_request_that_turns_out_untranslatable_holds_up_nobody() -> None:
    """It passed as it was when it came; by its turn a shared context asks for a translation."""
    async with Runner() as fake, running(fake.url) as q:
        await eventually(lambda: all(one.models_known for one in q.gateway.fleet.backends.values()))
        first = await begin(q, "first")
        request = await fake.arrived()
        odd = await begin(q, "odd", messages=DEEP)
        await waiting(q, 1)
        raising = await begin(q, "raising", priority="high", numCtx=4096)
        await waiting(q, 2)
        await request.status(200, {"choices": [{"message": {"content": "x"}}]})
        assert (await first.response()).status == 200
        await (await fake.arrived()).status(200, TOLD)
        assert (await raising.response()).status == 200
        assert 400 <= (await odd.response()).status < 500
        last = await begin(q, "last")
        await (await fake.arrived()).status(200, TOLD)
        assert (await last.response()).status == 200


async def test_route_that_was_answered_before_is_not_lacking_for_a_404() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        for status in (200, 404, 200):
            client = await begin(q, "x")
            request = await fake.arrived()
            await request.status(status, {"error": "gone"} if status == 404 else {"x": 1})
            assert (await client.response()).status == status
        assert not next(iter(q.gateway.fleet.backends.values())).unsupported


async def test_lack_that_is_learned_between_grant_and_sending_is_told() -> None:
    """Two at once, where the first finds out; nothing is sent for the second."""
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, queue__slots=2) as q:
            await eventually(
                lambda: all(one.models_known for one in q.gateway.fleet.backends.values())
            )
            (backend,) = q.gateway.fleet.backends.values()
            answer = llmq.BackendAnswer(404, "not here", b"", None, None)
            begin_call = q.gateway.begin

            def learn(*given: Any) -> None:
                begin_call(*given)
                backend.route_unsupported(CHAT, "m", llmq.RouteUnsupported(answer))

            q.gateway.begin = learn
            client = await begin(q, "x")
            told = await client.response()
            assert (told.status, told.code) == (501, "not_implemented")
            assert not fake.requests


# ---- Backends behind TLS ---------------------------------------------------------------------

# For 127.0.0.1, valid until 2120; known to everybody, so of use to nobody but these tests.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBazCCARKgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsbG1xLXRl
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxsbXEtdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABP7thUreH0+FPEa7
J8N7E+jduqufca0cX3HJvjOZJI3nvnBX2nDUBV8FfiKiNqaMMoFYi8J5l7o/EXvO
WvooCCWjUzBRMA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAOBgNV
HQ8BAf8EBAMCAoQwHQYDVR0OBBYEFOe4FVxERIxun7Acyl0A9GQs9cL9MAoGCCqG
SM49BAMCA0cAMEQCIEuEuQB68hga06lhP/Eq6UtnG1ycxgELRoReIVoIYwBeAiAr
YkxBsSmGHrHEi0Wh9M+JMkYoV40DBhgnBw1bo477ZQ==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg45UJDAEZfZaFzJ1w
ogl6M4cetNG3KLYUbV5DQ2WG8B6hRANCAAT+7YVK3h9PhTxGuyfDexPo3bqrn3Gt
HF9xyb4zmSSN575wV9pw1AVfBX4iojamjDKBWIvCeZe6PxF7zlr6KAgl
-----END PRIVATE KEY-----
"""


class TlsBackend(FakeBackend):
    """A runner that is spoken to over TLS."""

    def __init__(self, pem: Path) -> None:
        super().__init__()
        llmq.tls_context.cache_clear()  # what the system trusts is read once
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pem)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def listen_again(self) -> None:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, ssl=self.context
        )
        self.port = self._server.sockets[0].getsockname()[1]


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "both.pem"
    path.write_text(KEY + CERTIFICATE)
    return path


@pytest.mark.parametrize("stream", [False, True])
async def test_backend_behind_tls_is_served_when_its_certificate_is_trusted(
    stream: bool, pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    async with TlsBackend(pem) as fake, running(fake.url) as q:
        for text in ("one two", "three"):
            answer = await q.chat(text, stream=stream)
            assert (answer.status, answer.content) == (200, text)


async def test_backend_behind_tls_that_nobody_vouches_for_is_down(pem: Path) -> None:
    async with TlsBackend(pem) as fake, running(fake.url, queue__down_wait=0.1) as q:
        assert (await q.chat("x")).code == "backend_down"
        assert not fake.requests
        (row,) = (await q.status())["backends"]
        assert row["state"] == "down"
        assert "certificate" in row["error"].lower()


async def test_backend_that_does_not_speak_tls_is_down() -> None:
    async with FakeBackend() as fake:
        fake.hold_probes()
        url = fake.url.replace("http:", "https:")
        async with running(url, queue__down_wait=0.1, upstream__probe_timeout=0.3) as q:
            assert (await q.chat("x")).code == "backend_down"
            (row,) = (await q.status())["backends"]
            assert (row["state"], bool(row["error"])) == ("down", True)


async def test_certificates_of_the_system_are_read_once_and_not_for_each_connection(
    pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    made: list[int] = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(1) or create())
    async with TlsBackend(pem) as fake, running(fake.url) as q:
        for _ in range(3):
            assert (await q.chat("x")).status == 200
            fake.drop_connections()
    assert made == [1]


def alive(kind: type) -> list[Any]:
    return [one for one in gc.get_objects() if type(one) is kind]


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("ending", ["served", "down"])
async def test_call_that_was_tried_again_is_free_when_it_ends(ending: str) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__down_wait=0.3) as q:
        asking = asyncio.ensure_future(q.chat("a"))
        request = await fake.arrived()
        if ending == "down":
            await fake.stop_listening()
        request.close()
        if ending == "served":
            await (await fake.arrived()).answer("served")
        assert ((await asking).status == 200) is (ending == "served")
        await eventually(lambda: not q.service._servers[0].connections)
        assert len(alive(llmq.Call)) == 0


@pytest.mark.usefixtures("_no_collector")
async def test_call_is_free_when_its_client_leaves_while_llmq_dials() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await eventually(lambda: all(each.usable for each in q.gateway.fleet.backends.values()))
        await fake.stop_listening()
        q.gateway.pool.close()
        with black_hole(fake.port):
            client = await begin(q, "a")
            await eventually(lambda: any(call.connecting for call in q.gateway.calls.values()))
            client.close()
            await eventually(lambda: not q.service._servers[0].connections)
            await eventually(lambda: not alive(llmq.Call))


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/api/show"])
async def test_body_that_is_late_is_free_when_it_is_refused(path: str) -> None:
    async with running(NOBODY, server__body_timeout=0.3) as q, await Raw.open(q.port) as raw:
        await raw.send(http("POST", path, {**JSON, "Content-Length": "100000"}) + b"x" * 50_000)
        assert (await raw.response()).status == 408
        raw.close()
        await eventually(lambda: not q.service._servers[0].connections)
        assert len(alive(llmq.Exchange)) == 0


async def end_by_error(q: running, fake: FakeBackend) -> None:
    asking = asyncio.ensure_future(q.chat("a"))
    await (await fake.arrived()).status(500, {"error": {"message": "oops"}})
    assert (await asking).status == 500


async def end_by_a_broken_head(q: running, fake: FakeBackend) -> None:
    asking = asyncio.ensure_future(q.chat("a"))
    await (await fake.arrived()).send(b"HTTP/1.1 nonsense\r\n\r\n")
    assert (await asking).status == 502


async def end_by_what_is_no_answer(q: running, fake: FakeBackend) -> None:
    asking = asyncio.ensure_future(q.chat("a"))
    await (await fake.arrived()).status(200, 7)
    assert (await asking).status == 502


async def end_by_what_cannot_be_translated(q: running, fake: FakeBackend) -> None:
    body = {"model": "m", "stream": False, "messages": [{"role": "user", "content": "a"}]}
    asking = asyncio.ensure_future(ask(q.port, "POST", "/api/chat", json=body))
    await (await fake.arrived()).status(200, {"choices": 7})
    assert (await asking).status == 502


async def end_by_a_stream_that_breaks(q: running, fake: FakeBackend) -> None:
    asking = asyncio.ensure_future(q.chat("a", stream=True))
    request = await fake.arrived()
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n")
    request.reset()
    assert not (await asking).clean


async def end_by_silence(q: running, fake: FakeBackend) -> None:
    asking = asyncio.ensure_future(q.chat("a"))
    await fake.arrived()
    assert (await asking).status == 504


async def end_by_a_bad_body(q: running, _: FakeBackend) -> None:
    for body in (b"{", b'{"model":7}', b'{"model":"m","messages":[7]}', b'{"numCtx":"x"}'):
        assert (await ask(q.port, "POST", CHAT, body=body)).status == 400


async def end_by_an_order(q: running, fake: FakeBackend) -> None:
    asking = [asyncio.ensure_future(q.chat("a")) for _ in range(2)]
    await fake.arrived()
    await eventually(lambda: len(q.gateway.calls) == 2)
    for ident in list(q.gateway.calls):
        await ask(q.port, "DELETE", f"/llmq/requests/{ident}")
    assert [answer.status for answer in await asyncio.gather(*asking)] == [499, 499]


async def end_by_leaving(q: running, fake: FakeBackend) -> None:
    clients = [await begin(q, "a"), await begin(q, "b")]
    await fake.arrived()
    await eventually(lambda: len(q.gateway.calls) == 2)
    for client in reversed(clients):
        client.close()
    await eventually(lambda: not q.gateway.calls)


ENDS = (
    end_by_error, end_by_a_broken_head, end_by_what_is_no_answer, end_by_what_cannot_be_translated,
    end_by_a_stream_that_breaks, end_by_silence, end_by_a_bad_body, end_by_an_order, end_by_leaving,
)  # fmt: skip


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("end", ENDS, ids=[end.__name__ for end in ENDS])
async def test_call_is_free_however_it_ends(end: Any) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__first_byte_timeout=0.3) as q:
            await eventually(lambda: all(one.usable for one in q.gateway.fleet.backends.values()))
            await end(q, fake)
            await eventually(lambda: not q.service._servers[0].connections)
            await eventually(lambda: not alive(llmq.Call), 1)
            assert not alive(llmq.Exchange)


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/api/show", "/api/create"])
async def test_heavy_body_is_free_when_it_is_refused(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "is_heavy", lambda _body: True)
    async with running(NOBODY) as q:
        assert (await ask(q.port, "POST", path, body=b'{"model":"m",}')).status == 400
        await eventually(lambda: not q.service._servers[0].connections)
        await eventually(lambda: not alive(llmq.Exchange))


@pytest.mark.usefixtures("_no_collector")
async def test_body_is_free_when_the_runner_refuses_what_it_asks_to_be_shown() -> None:
    async with FakeBackend(kind="ollama") as fake, running(fake.url) as q:
        await eventually(lambda: all(one.models_known for one in q.gateway.fleet.backends.values()))
        assert (await ask(q.port, "POST", "/api/show", json={"model": "m"})).status == 501
        await eventually(lambda: not q.service._servers[0].connections)
        await eventually(lambda: not alive(llmq.Exchange))


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("how", ["is silent", "breaks off", "refuses"])
async def test_body_is_free_when_a_runner_does_not_count_its_tokens(how: str) -> None:
    async with (
        FakeBackend(kind="llamacpp", auto=False) as fake,
        running(fake.url, upstream__probe_timeout=0.3) as q,
    ):
        await eventually(lambda: all(one.models_known for one in q.gateway.fleet.backends.values()))
        if how == "refuses":
            await fake.stop_listening()
        asked = chat("x", model="m")
        asking = asyncio.ensure_future(ask(q.port, "POST", "/v1/messages/count_tokens", json=asked))
        if how == "breaks off":
            (await fake.arrived()).close()
        assert (await asking).status == 200
        await eventually(lambda: not q.service._servers[0].connections)
        await eventually(lambda: not alive(llmq.Exchange))


# ---- What a runner may make of an answer -----------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_of_a_type_that_browsers_run_is_passed_on_as_bytes(stream: bool) -> None:
    body = b'{"choices":[{"message":{"content":"<script>"}}]}'
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await begin(q, "a", stream=stream)
        kind = "text/html; x=text/event-stream"
        await (await fake.arrived()).status(200, body, [("Content-Type", kind)])
        answer = await client.response()
        assert "html" not in answer.headers["content-type"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_key_that_a_runner_repeats_is_shown_to_nobody(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llmq")
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        (backend,) = q.gateway.fleet.backends.values()
        backend.configure(replace(backend.settings, key="sk-very-secret"), backend.limits)
        asking = asyncio.ensure_future(q.chat("a"))
        request = await fake.arrived()
        assert request.headers["authorization"] == "Bearer sk-very-secret"
        await request.status(status, {"error": {"message": "bad key sk-very-secret"}})
        answer = await asking
        assert answer.status >= 400
        assert b"bad key ***" in answer.body
        told = [answer.body.decode(), json.dumps(await q.status()), caplog.text]
        assert not [text for text in told if "very-secret" in text]
