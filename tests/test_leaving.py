"""A client may leave at any step, by FIN, RST or half-close: no ghost runs, nobody is held up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

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
    running,
)

LEAVING = {"closes": Raw.close, "half-closes": Raw.fin, "resets": Raw.rst}
each_way = pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())
each_shape = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
JSON = {"Content-Type": "application/json"}
SECOND = 1.0  # the contract: noticed, upstream closed and the next one started within a second
MIB = 1 << 20
PIECE = b"data: " + b"x" * (64 * 1024 - 8) + b"\n\n"  # 64 KiB of a stream


def post(text: str, stream: bool = False, **more: Any) -> bytes:
    """A whole chat request as it goes over the wire."""
    body = json.dumps(chat(text, stream, **more)).encode()
    return http("POST", "/v1/chat/completions", JSON, body)


async def begin(q: running, text: str, stream: bool = False, receive_buffer: int = 0) -> Raw:
    """A client that has sent its request and waits."""
    client = await Raw.open(q.port, receive_buffer=receive_buffer)
    await client.send(post(text, stream))
    return client


async def queue_up(q: running, *texts: str, stream: bool = False) -> list[Raw]:
    """Clients that wait behind the running one, in this order."""
    before = (await q.status())["queue"]["waiting"]
    clients = []
    for number, text in enumerate(texts, before + 1):
        clients.append(await begin(q, text, stream))
        await waiting(q, number)
    return clients


async def waiting(q: running, number: int) -> None:
    """Return once exactly so many wait; the test's deadline ends it otherwise."""
    while (await q.status())["queue"]["waiting"] != number:
        pass


async def next_start(fake: FakeBackend) -> FakeRequest:
    """The next request that reaches the backend, which must not take longer than a second."""
    return await asyncio.wait_for(fake.arrived(), SECOND)


async def cut(request: FakeRequest) -> None:
    """The backend sees its connection end, in time."""
    await asyncio.wait_for(request.left(), SECOND)


async def nothing_left(q: running, fake: FakeBackend, *served: str) -> None:
    """One more request is the next and the last to reach the backend: no ghost was before it."""
    last = asyncio.ensure_future(q.chat("the last"))
    request = await next_start(fake)
    await request.answer("served")
    assert (await last).content == "served"
    assert [request.text for request in fake.requests] == [*served, "the last"]
    assert fake.max_active == 1
    queue = (await q.status())["queue"]
    assert (queue["waiting"], queue["running"]) == (0, 0)


# ---- Before the turn -------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_that_is_never_completed_is_never_executed(leave: Any, framing: str) -> None:
    whole = json.dumps(chat("half")).encode()
    if framing == "length":
        request = http("POST", "/v1/chat/completions", JSON, whole)[:-1]
    else:  # the JSON is complete, the framing is not: no last chunk
        headers = {**JSON, "Transfer-Encoding": "chunked"}
        head = http("POST", "/v1/chat/completions", headers)
        request = head + b"%x\r\n%s\r\n" % (len(whole), whole)
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await Raw.open(q.port)
        await client.send(request)
        leave(client)
        await nothing_left(q, fake)


@each_way
@each_shape
async def test_who_leaves_while_waiting_is_never_sent_and_the_order_stays(
    leave: Any, stream: bool
) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        first = await begin(q, "first")
        held = await next_start(fake)
        second, leaver, third = await queue_up(q, "second", "leaver", "third", stream=stream)
        leave(leaver)
        await waiting(q, 2)
        assert not held.connection.peer_closed(), "the running request must not be touched"
        await held.answer("one")
        for client, text in (first, "one"), (second, "two"), (third, "three"):
            if client is not first:
                await (await next_start(fake)).answer(text)
            answer = await client.response()
            assert (answer.status, answer.content, answer.clean) == (200, text, True)
        await nothing_left(q, fake, "first", "second", "third")


async def test_of_ninety_abandoned_requests_none_runs() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        first = await begin(q, "first")
        held = await next_start(fake)
        clients = [await begin(q, f"ghost {n}", stream=bool(n % 2)) for n in range(90)]
        await waiting(q, 90)
        for number, client in enumerate(clients):
            (Raw.close, Raw.fin, Raw.rst)[number % 3](client)
        await waiting(q, 0)
        await held.answer("one")
        assert (await first.response()).content == "one"
        await nothing_left(q, fake, "first")


@each_way
async def test_who_leaves_on_a_kept_alive_connection_is_noticed_too(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await begin(q, "answered")
        await (await next_start(fake)).answer("done")
        assert (await client.response()).content == "done"
        other = await begin(q, "other")
        held = await next_start(fake)
        await client.send(post("ghost"))
        await waiting(q, 1)
        leave(client)
        await waiting(q, 0)
        await held.answer("two")
        assert (await other.response()).content == "two"
        await nothing_left(q, fake, "answered", "other")


@each_way
async def test_who_leaves_while_its_runner_loads_is_not_sent_again(leave: Any) -> None:
    async with FakeBackend(auto=False, kind="llamacpp") as fake, running(fake.url) as q:
        client = await begin(q, "ghost")
        request = await next_start(fake)
        fake.probe_status = 503  # it says LOADING, as llama.cpp does while it reads the file
        await request.status(503, LOADING)
        await waiting(q, 1)
        leave(client)
        await waiting(q, 0)
        fake.probe_status = 200
        last = asyncio.ensure_future(q.chat("the last"))
        await (await fake.arrived()).answer("served")  # at the next probe, a second away
        assert (await last).content == "served"
        assert [request.text for request in fake.requests] == ["ghost", "the last"]


# ---- While it runs ---------------------------------------------------------------------------


@each_way
@each_shape
async def test_who_leaves_before_the_first_byte_frees_the_slot(leave: Any, stream: bool) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        leaver = await begin(q, "leaver", stream)
        held = await next_start(fake)
        (client,) = await queue_up(q, "next")
        leave(leaver)
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "leaver", "next")


@each_way
async def test_who_leaves_between_head_and_body_frees_the_slot(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        leaver = await begin(q, "leaver", stream=True)
        held = await next_start(fake)
        await held.start_stream()
        (client,) = await queue_up(q, "next")
        leave(leaver)
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "leaver", "next")


@each_way
@pytest.mark.parametrize("tokens", [False, True], ids=["silent", "speaking"])
async def test_who_leaves_in_mid_stream_frees_the_slot(leave: Any, tokens: bool) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        leaver = await begin(q, "leaver", stream=True)
        held = await next_start(fake)
        await held.start_stream()
        await held.piece("one ")
        await leaver.until(b"one ")
        (client,) = await queue_up(q, "next")
        leave(leaver)
        with contextlib.suppress(ConnectionError):
            if tokens:
                await held.piece("two ")
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "leaver", "next")


@each_way
async def test_who_leaves_in_the_middle_of_a_whole_answer_frees_the_slot(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        leaver = await begin(q, "leaver")
        held = await next_start(fake)
        await held.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        await held.send(b'Content-Length: 1000\r\n\r\n{"choices": [')
        (client,) = await queue_up(q, "next")
        leave(leaver)
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "leaver", "next")


async def test_others_go_on_undisturbed_when_one_of_two_running_leaves() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__slots=2) as q:
        leaver = await begin(q, "leaver", stream=True)
        stayer = await begin(q, "stayer", stream=True)
        held = {request.text: request for request in (await fake.arrived(), await fake.arrived())}
        for text, request in held.items():
            await request.start_stream()
            await request.piece(text)
        await leaver.until(b"leaver")
        leaver.rst()
        await cut(held["leaver"])
        await held["stayer"].piece(" to the end")
        await held["stayer"].finish_stream()
        answer = await stayer.response()
        assert (answer.content, answer.clean) == ("stayer to the end", True)
        assert answer.events()[-1] == "[DONE]"


# ---- Pipelined requests ----------------------------------------------------------------------


@each_way
async def test_who_leaves_while_waiting_takes_its_pipelined_request_along(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        first = await begin(q, "first")
        held = await next_start(fake)
        client = await Raw.open(q.port)
        await client.send(post("ghost 1") + post("ghost 2"))
        await waiting(q, 1)
        leave(client)
        await waiting(q, 0)
        await held.answer("one")
        assert (await first.response()).content == "one"
        await nothing_left(q, fake, "first")


@each_way
async def test_who_leaves_while_running_takes_its_pipelined_request_along(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        leaver = await Raw.open(q.port)
        await leaver.send(post("leaver", stream=True) + post("ghost"))
        held = await next_start(fake)
        (client,) = await queue_up(q, "next")
        leave(leaver)
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "leaver", "next")


@each_way
@pytest.mark.parametrize("ahead", [100_000, 3 * MIB], ids=["100 kB", "3 MiB"])
async def test_leaving_is_seen_behind_any_amount_of_bytes_sent_ahead(
    leave: Any, ahead: int
) -> None:
    """More than is read ahead must not pause the reading, or the end behind it is never met."""
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        leaver = await Raw.open(q.port)
        await leaver.send(post("leaver", stream=True))
        held = await next_start(fake)
        await leaver.send(post("x" * ahead))
        (client,) = await queue_up(q, "next")
        leave(leaver)
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "leaver", "next")


# ---- Slow bodies -----------------------------------------------------------------------------


async def test_a_slow_body_is_queued_only_when_complete() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        first = await begin(q, "first")
        held = await next_start(fake)
        request = post("slow")
        slow = await Raw.open(q.port)
        await slow.send(request[:-10])
        (fast,) = await queue_up(q, "fast")  # one waits, not two
        await slow.send(request[-10:])
        await waiting(q, 2)
        await held.answer("one")
        for client, text in (first, "one"), (fast, "fast"), (slow, "slow"):
            if client is not first:
                started = await next_start(fake)
                assert started.text == text
                await started.answer(text)
            assert (await client.response()).content == text


async def test_a_slow_body_does_not_hold_an_idle_slot() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        request = post("slow")
        slow = await Raw.open(q.port)
        await slow.send(request[:-1])
        for n in range(5):
            assert (await q.chat(f"fast {n}")).content == f"fast {n}"
        await slow.send(request[-1:])
        assert (await slow.response()).content == "slow"


# ---- Slow readers ----------------------------------------------------------------------------


class Pouring:
    """A backend that writes a long stream as fast as it is taken; `.sent` counts its bytes."""

    def __init__(self, request: FakeRequest, size: int) -> None:
        self.request = request
        self.size = size
        self.sent = 0
        self.task = asyncio.ensure_future(self._pour())

    async def _pour(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self.request.start_stream()
            while self.sent < self.size:
                await self.request.send(b"%x\r\n%s\r\n" % (len(PIECE), PIECE))
                self.sent += len(PIECE)
            await self.request.finish_stream()


def all_of_it(answer: Answer, size: int) -> bool:
    """Whether the slow reader got every piece, and the end of the stream, as they were sent."""
    pieces, rest = answer.body[:size], answer.body[size:]
    return answer.clean and pieces == PIECE * (size // len(PIECE)) and b"[DONE]" in rest


async def test_a_slow_reader_of_a_short_answer_does_not_hold_the_slot() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        slow = await begin(q, "slow", stream=True, receive_buffer=4096)
        pouring = Pouring(await next_start(fake), 3 * MIB)
        (client,) = await queue_up(q, "next")
        await (await fake.arrived()).answer("mine")  # though nothing of the 3 MiB was read
        assert (await client.response()).content == "mine"
        await pouring.task
        assert all_of_it(await slow.response(), 3 * MIB)


async def test_a_slow_reader_of_a_whole_answer_does_not_hold_the_slot() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        slow = await begin(q, "slow", receive_buffer=4096)
        text = "word " * (3 * MIB // 5)
        answering = asyncio.ensure_future((await next_start(fake)).answer(text))
        (client,) = await queue_up(q, "next")
        await (await fake.arrived()).answer("mine")
        assert (await client.response()).content == "mine"
        await answering
        answer = await slow.response()
        assert answer.clean
        assert answer.content == text


async def test_a_reader_that_comes_back_in_time_gets_everything() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        slow = await begin(q, "slow", stream=True, receive_buffer=4096)
        size = 12 * MIB
        pouring = Pouring(await next_start(fake), size)
        await eventually(lambda: pouring.sent > 5 * MIB)  # more than is buffered: it is held up
        answer = await slow.response()
        await pouring.task
        assert all_of_it(answer, size)
        await nothing_left(q, fake, "slow")


@pytest.mark.deadline(20)
async def test_a_client_that_takes_nothing_meets_back_pressure_then_counts_as_gone() -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, server__stall_timeout=0.5) as q:
            stuck = await begin(q, "stuck", stream=True, receive_buffer=4096)
            held = await next_start(fake)
            pouring = Pouring(held, 64 * MIB)
            (client,) = await queue_up(q, "next")
            await held.left()
            await (await next_start(fake)).answer("mine")
            assert (await client.response()).content == "mine"
            await pouring.task
            # 4 MiB in llmq; the rest stands in the kernel's buffers of two connections.
            assert pouring.sent < 32 * MIB, "the backend was read without a bound"
            answer = await stuck.response()
            assert not answer.clean
            assert b"[DONE]" not in answer.body
            await nothing_left(q, fake, "stuck", "next")


@each_way
async def test_who_leaves_under_back_pressure_frees_the_slot(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        stuck = await begin(q, "stuck", stream=True, receive_buffer=4096)
        held = await next_start(fake)
        pouring = Pouring(held, 64 * MIB)
        (client,) = await queue_up(q, "next")
        await eventually(lambda: pouring.sent > 5 * MIB)
        leave(stuck)
        await cut(held)
        await (await next_start(fake)).answer("mine")
        assert (await client.response()).content == "mine"
        await pouring.task
        await nothing_left(q, fake, "stuck", "next")


@each_way
async def test_a_slow_reader_that_leaves_does_not_disturb_the_next(leave: Any) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        slow = await begin(q, "slow", stream=True, receive_buffer=4096)
        pouring = Pouring(await next_start(fake), 3 * MIB)
        (client,) = await queue_up(q, "next", stream=True)
        held = await fake.arrived()
        await pouring.task
        await held.start_stream()
        await held.piece("before ")
        await client.until(b"before ")
        leave(slow)
        await held.piece("after")
        await held.finish_stream()
        await client.until(b"after")
        await client.until(b"[DONE]")
        await nothing_left(q, fake, "slow", "next")


async def test_what_a_client_that_half_closed_did_not_take_is_dropped() -> None:
    """Nothing may stand in memory, with an open file, for somebody who counts as gone."""
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        size = 6 * MIB  # more than the kernel keeps of it
        slow = await begin(q, "slow", stream=True, receive_buffer=4096)
        pouring = Pouring(await next_start(fake), size)
        (client,) = await queue_up(q, "next")
        held = await fake.arrived()  # so all of it is in llmq's hands
        await pouring.task
        slow.fin()
        await held.answer("mine")
        assert (await client.response()).content == "mine"
        await nothing_left(q, fake, "slow", "next")
        taken = 0
        while data := await slow.read():
            taken += len(data)
        assert taken < size


async def test_who_is_cancelled_while_far_behind_frees_the_slot_however_far() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await begin(q, "slow", stream=True, receive_buffer=4096)
        request = await next_start(fake)
        await request.start_stream()

        async def flood() -> None:
            while True:
                await request.send(chunk(PIECE))

        def unsent() -> int:
            return max(connection.unsent for connection in q.service._servers[0].connections)

        flooding = asyncio.ensure_future(flood())
        await eventually(lambda: unsent() > llmq.ANSWER_BUFFER)
        while unsent() > 3 * MIB:  # it takes a little, too little for the runner to go on
            await client.read()
        (ident,) = q.gateway.calls
        await ask(q.port, "DELETE", f"/llmq/requests/{ident}")
        try:
            await cut(request)
        finally:
            flooding.cancel()
            client.close()


async def test_who_is_stopped_just_when_its_turn_comes_does_not_dial() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, upstream__connect_timeout=3) as q:
        await eventually(lambda: all(each.usable for each in q.gateway.fleet.backends.values()))
        q.gateway.set_mode(llmq.Mode.PAUSED)
        asking = asyncio.ensure_future(q.chat("a"))
        await eventually(lambda: q.gateway.calls)
        await fake.stop_listening()
        with black_hole(fake.port):
            q.gateway.set_mode(llmq.Mode.OPEN)
            q.gateway.cancel(next(iter(q.gateway.calls.values())))
            assert (await asyncio.wait_for(asking, SECOND)).status == 499


BESIDE = {  # what is asked of a runner beside the queue, and of which kind
    "/api/show": ("ollama", {"model": "m"}),
    "/v1/messages/count_tokens": ("llamacpp", chat("x", model="m")),
    "/api/generate": ("ollama", {"model": "m", "keep_alive": 0}),
}


@each_way
@pytest.mark.parametrize("path", BESIDE)
async def test_who_leaves_beside_the_queue_takes_the_question_along(path: str, leave: Any) -> None:
    kind, asked = BESIDE[path]
    limits = {"upstream__probe_timeout": 9, "upstream__first_byte_timeout": 9}
    async with FakeBackend(kind=kind, auto=False) as fake, running(fake.url, **limits) as q:
        await eventually(lambda: all(one.models_known for one in q.gateway.fleet.backends.values()))
        client = await Raw.open(q.port)
        await client.send(http("POST", path, JSON, json.dumps(asked).encode()))
        request = await fake.arrived()
        leave(client)
        await cut(request)
        await eventually(lambda: not q.service._servers[0].connections, SECOND + 2)
        client.close()
