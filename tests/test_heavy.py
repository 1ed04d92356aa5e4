"""What is large and legal: read beside the event loop, in little memory; unread answers bounded."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.documents import documents, strict
from tests.fakes import FakeBackend, Raw, ask, chat, eventually, http, running

MIB = 1024 * 1024
SIZE = 4 * MIB  # of each heavy body
CHAT_START = b'{"model":"m","messages":[{"role":"user","content":"x"}],"x":'


def filled(unit: bytes, before: bytes = CHAT_START + b"[", after: bytes = b"]}") -> bytes:
    return before + b",".join([unit] * (SIZE // (len(unit) + 1))) + after


def members() -> bytes:
    return b"{" + b",".join([b'"%x":1' % number for number in range(SIZE // 10)]) + b"}"


def in_text(unit: bytes) -> bytes:
    start = b'{"model":"m","messages":[{"role":"user","content":"'
    return start + unit * (SIZE // len(unit)) + b'"}]}'


SHAPES = {
    "members": members(),
    "empty lists": filled(b"[]"),
    "empty objects": filled(b"{}"),
    "numbers": filled(b"1.5"),
    "lists in lists": filled(b"[[1],[2]]"),
    "messages": filled(b'{"role":"user","content":"x"}', b'{"model":"m","messages":[', b"]}"),
    "an object of many members": CHAT_START + members() + b"}",
    "two thousand lists": filled(b"[" + b"1," * 1000 + b"1]"),
    "escapes": in_text(b"\\u00e9"),
    "line breaks": in_text(b"\\n"),
    "a text": in_text(b"a"),
    "emoji": in_text("😀".encode()),
    "white space": CHAT_START + b"1" + b" " * SIZE + b"}",
    "an open text": CHAT_START + b'"' + b"a" * SIZE,
    "an open list": CHAT_START + b"[" * SIZE,
    "a name": b'{"' + b"a" * SIZE,
    "digits": CHAT_START + b"1" * SIZE + b"}",
    "brackets in a text": in_text(b"[{,"),
    "texts": filled(b'"n"'),
    "texts with escapes": filled(b'"\\n"'),
    "texts, a few with escapes": filled(b",".join([b'"n"'] * 15_000) + b',"\\n"'),
}


class Held:
    """The CPU time that the loop's thread has taken in one turn, at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0.0
        run = asyncio.Handle._run

        def measured(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.most = max(self.most, time.thread_time() - began)

        monkeypatch.setattr(asyncio.Handle, "_run", measured)


async def admit(body: bytes) -> Any:
    """What admission makes of a body: the question, or the error."""
    gateway = llmq.Gateway(build_settings({}), "0123456789abcdef", time.monotonic, llmq.Store(""))

    async def read_body(_limit: int) -> bytes:
        return body

    request = llmq.parse_request_head(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
    reply = SimpleNamespace(read_body=read_body, waiter=llmq.Waiter())
    call = llmq.Call(reply, llmq.ENDPOINTS[llmq.CHAT], request, llmq.NOBODY, ("1", "1"))  # type: ignore[arg-type]
    gateway.fleet.add("b", llmq.BackendSettings(url="http://127.0.0.1:9"), "local", 1)
    gateway.fleet.backends["b"].state = llmq.State.DOWN
    try:
        await gateway.admission.admit(call)
    except llmq.LlmqError as error:
        return error
    return call.question


# ---- Requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
async def test_no_shape_of_a_body_holds_the_loop(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    await admit(SHAPES[shape])
    assert 0 < held.most < 0.1


@pytest.mark.parametrize("shape", ["empty lists", "numbers", "an object of many members", "emoji"])
async def test_no_shape_of_a_body_takes_much_more_memory_than_its_size(shape: str) -> None:
    body = SHAPES[shape]
    gc.collect()
    tracemalloc.start()
    try:
        await admit(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB


async def test_what_is_large_and_legal_is_passed_on_as_it_came() -> None:
    body = SHAPES["numbers"]
    async with FakeBackend() as fake, running(fake.url) as q:
        answer = await ask(q.port, "POST", "/v1/chat/completions", body=body)
        assert answer.status == 200
        assert fake.requests[0].body == body


async def test_who_leaves_while_its_request_is_written_costs_no_connection() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await eventually(lambda: all(one.usable for one in q.gateway.fleet.backends.values()))
        before = fake.connections
        text = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 2 * MIB}]})
        raw = await Raw.open(q.port)
        await raw.send(http("POST", "/v1/chat/completions", body=text.encode()))
        writing = llmq.Call.writer
        started = asyncio.Event()

        def written(call: Any, backend: Any) -> Any:
            started.set()
            return writing(call, backend)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llmq.Call, "writer", written)
            q.gateway.set_mode(llmq.Mode.PAUSED)
            await eventually(lambda: q.gateway.scheduler.waiting)
            with llmq.READING:  # as if another request were being written
                q.gateway.set_mode(llmq.Mode.OPEN)
                await started.wait()
                raw.close()
                await eventually(lambda: all(call.error for call in q.gateway.calls.values()))
            await eventually(lambda: not q.gateway.calls)
        assert fake.connections == before
        assert not q.gateway.scheduler.running


async def test_what_is_too_large_to_be_translated_is_refused() -> None:
    body = SHAPES["messages"].replace(b'"model"', b'"stream":false,"model"', 1)
    async with FakeBackend() as fake, running(fake.url) as q:
        answer = await ask(q.port, "POST", "/api/chat", body=body)
        assert (answer.status, fake.requests) == (501, [])
        assert answer.json()["error"] == llmq.TOO_MANY


async def test_long_request_is_translated_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "HEAVY_BODY", 10)
    threads, body = [], llmq.Translator.body

    def noted(translator: llmq.Translator) -> bytes:
        threads.append(threading.current_thread())
        return body(translator)

    monkeypatch.setattr(llmq.Translator, "body", noted)
    async with FakeBackend() as fake, running(fake.url) as q:
        for _ in range(2):  # with and without a connection in the pool
            answer = await ask(q.port, "POST", "/api/chat", json=chat("x"))
            assert (answer.status, fake.requests[-1].text) == (200, "x")
    assert len(threads) == 4, "to know that it can be, and to send it"
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("left", [0, 3, 1000])
def test_members_that_are_skipped_end_where_they_end(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "MANY_VALUES", left)
    monkeypatch.setattr(llmq, "SKIPPED", 7)
    skipped = 0
    for document, _ in documents(3, ("model", ['"m"', "[1,[2,[]]]", '{"a":["]}"]}'])):
        found, whole = llmq.read_object(document.text), strict(document.text)
        assert list(found.values) == list(whole)
        for name, (_, start, end) in found.places.items():
            assert strict(f"[{document.text[start:end]}]") == [whole[name]]
            large = any(found.values[name] is one for one in llmq.STAND_INS.values())
            skipped += large
            assert large or found.values[name] == whole[name]
    assert bool(skipped) == (left < 1000)


@pytest.mark.parametrize("shape", ["texts", "texts with escapes", "texts, a few with escapes"])
def test_texts_are_skipped_in_time_that_grows_with_their_size(shape: str) -> None:
    """All heavy bodies wait while one is read: the bound is far above what one pass takes."""
    text = SHAPES[shape].decode()
    start = time.process_time()
    assert llmq.was_skipped(llmq.read_object(text).values)
    spent = time.process_time() - start
    assert spent < len(text) * 0.3e-6, f"{spent:.1f} s for {len(text)} characters"


@pytest.mark.parametrize("body", ['{"x":[[1,2]', '{"x":["a]}', '{"x":{"a":"\\"]}', '{"x":[\\'])
def test_what_is_skipped_and_does_not_end_is_refused(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "MANY_VALUES", 0)
    with pytest.raises(llmq.BadRequest):
        llmq.read_object(body)


def test_depth_is_limited_in_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "MANY_VALUES", 0)
    deep = "[" * (llmq.DEPTH_LIMIT + 1) + "]" * (llmq.DEPTH_LIMIT + 1)
    with pytest.raises(llmq.BadRequest, match="deeper"):
        llmq.read_object(f'{{"x":{deep}}}')
    llmq.read_object(f'{{"x":{deep[1:-1]}}}')


# ---- Answers -------------------------------------------------------------------------------------


@pytest.mark.untraced
def test_parts_are_read_and_written_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "PART", 3)
    numbers = "[" + ", ".join(map(str, range(3000))) + "]"
    values = [numbers, "[]", "{}", '[ [1] , {"a" : [] } ]', "[1.5e3,2,null,true]", '["x",[1,2]]']
    for document, _ in documents(5, ("data", values)):
        value, end = llmq.scan_parts(document.text, document.text.index("{"))
        assert (value, document.text[end:].strip()) == (strict(document.text), "")
        if "1e999" not in document.text:  # which no JSON can say
            assert json.loads(b"".join(llmq.render_parts(value))) == value


@pytest.mark.parametrize(
    "text", ["[1,]", "[ ,1]", "[[1], ,2]", "[1 2]", "[,1]", '{"a":}', '{"a":1', "[1", '{"a" 1}', ""]
)
def test_parts_of_what_is_no_json_are_refused(text: str) -> None:
    with pytest.raises((ValueError, StopIteration)):
        llmq.scan_parts(text, 0)


def embeddings(rows: int) -> bytes:
    numbers = random.Random(1)
    row = [numbers.random() for _ in range(2000)]
    data = [{"object": "embedding", "index": at, "embedding": row} for at in range(rows)]
    return json.dumps({"object": "list", "data": data, "model": "m"}).encode()


async def test_long_answer_is_translated_whole_and_without_holding_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = embeddings(100)
    assert len(answer) > 2 * llmq.PARSED_ANSWER
    translator = llmq.TRANSLATORS[llmq.OLLAMA_EMBED, llmq.EMBEDDINGS]
    body = translator({"model": "m", "input": "x"}, "m", 0, lambda: 1.0)
    held = Held(monkeypatch)
    told = json.loads(await llmq.beside(lambda: body.retell(answer)))
    assert held.most < 0.1
    assert told["embeddings"] == [row["embedding"] for row in json.loads(answer)["data"]]
    for odd in answer[:-2], answer[:-1] + b',"data":1}', b"[" + answer + b"]":
        with pytest.raises(llmq.BackendError):  # the runner's fault, and no other's
            body.retell(odd)


@pytest.mark.deadline(30)
async def test_unread_answers_hold_no_more_than_their_budget() -> None:
    answer, budget = embeddings(300), 30 * MIB
    async with (
        FakeBackend(auto=False) as fake,
        running(fake.url, queue__max_queued_bytes=budget, server__stall_timeout=60) as q,
    ):
        clients = []
        for number in range(8):
            raw = await Raw.open(q.port, receive_buffer=65536)
            body = json.dumps({"model": "m", "input": "x"}).encode()
            await raw.send(
                http("POST", "/v1/embeddings", {"Content-Length": str(len(body))}) + body
            )
            clients.append(raw)
            await (await fake.arrived()).status(200, answer)
            await eventually(lambda sent=number + 1: len(q.gateway.journal.recent) == sent)
            assert sum(one.unsent for one in q.service._servers[0].connections) <= budget
        read = [await whole(raw, answer) for raw in clients]
        assert 0 < sum(read) < len(clients)


async def whole(raw: Raw, answer: bytes) -> bool:
    """Whether the client gets all of its answer, now that it reads; if not, it is told so."""
    got = await raw.response()
    assert answer.startswith(got.body)
    assert got.body == answer or raw.ended
    return got.body == answer
