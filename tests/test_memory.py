"""What is held in memory: no more than may be, no longer than it is needed, and by no cycle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.fake_ollama import arrival, open_stream, post, refuse, turns, whole
from tests.fakes import FakeBackend, Raw, ask, eventually, http, running
from tests.test_batches import begin, ended, named, post_batch, post_file, upload
from tests.test_cache import EMBED, asked, by_hand, document, embed, how
from tests.test_jobs import ASYNC, cancel, held, reached, result, serving, submit, user
from tests.test_twins import there, twins

MIB = 1024 * 1024
LONG = "x" * 2 * MIB  # so long that it is read beside the event loop


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


# ---- Nothing is left for the collector ---------------------------------------------------------

HOLDERS = (llmq.Call, llmq.Shared, llmq.Kept, llmq.Ticket, llmq.Job)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Cycles stay: what is in one is held until somebody looks for it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left() -> list[str]:
    """What holds a request and is still there."""
    return sorted(type(one).__name__ for one in gc.get_objects() if type(one) in HOLDERS)


async def nothing_left(q: running) -> None:
    """Return once nobody is served, and nothing of what was is held."""
    await eventually(lambda: not (q.gateway.calls or q.gateway.jobs.active))
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not left(), 2)
    assert left() == []


async def misses(q: running, runner: Any) -> None:
    for text in ("one", LONG):
        one = post(q, EMBED, embed(text))
        await whole(await arrival(one, runner), document(EMBED, "1"))
        assert how(await one) == "MISS"


async def hits(q: running, runner: Any) -> None:
    one = post(q, EMBED, embed())
    await whole(await arrival(one, runner), document(EMBED, "1"))
    await one
    assert [how(await asked(q, embed())) for _ in range(3)] == ["HIT"] * 3


async def joined_ones(q: running, runner: Any) -> None:
    clients = await twins(q, 3, embed())
    await whole(await runner.arrived(), document(EMBED, "1"))
    for client in clients:
        assert (await client.response()).status == 200
        client.close()


async def joined_ones_that_fail(q: running, runner: Any) -> None:
    clients = await twins(q, 3, embed())
    await refuse(await runner.arrived(), 422, {"error": {"message": "no"}})
    for client in clients:
        assert (await client.response()).status == 422
        client.close()


async def joined_ones_that_leave(q: running, runner: Any) -> None:
    clients = await twins(q, 3, embed())
    request = await runner.arrived()
    for client in clients:
        client.rst()
    await request.left()


async def cancelled_ones(q: running, runner: Any) -> None:
    clients = await twins(q, 2, embed())
    request = await runner.arrived()
    (ident,) = q.gateway.calls
    await ask(q.port, "DELETE", f"/llmq/requests/{ident}")
    await request.left()
    await whole(await runner.arrived(), document(EMBED, "1"))
    for client, status in zip(clients, (499, 200)):
        assert (await client.response()).status == status
        client.close()


async def broken_ones(q: running, runner: Any) -> None:
    one = post(q, EMBED, embed())
    for _ in range(2):
        (await arrival(one, runner)).reset()
    assert (await one).status == 502


async def refused_ones(q: running, _runner: Any) -> None:
    for body in (b"{", embed(model="nobody-has-it"), {"model": "m"}):
        assert (await post(q, EMBED, body)).status in (400, 404)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "served",
    [
        misses,
        hits,
        joined_ones,
        joined_ones_that_fail,
        joined_ones_that_leave,
        cancelled_ones,
        broken_ones,
        refused_ones,
    ],
)
async def test_of_a_request_that_has_ended_nothing_is_held_by_a_cycle(served: Any) -> None:
    async with by_hand() as (runner, q):
        await served(q, runner)
        await nothing_left(q)


async def done_jobs(q: running, fake: FakeBackend) -> None:
    for text, stream in (("hi", False), ("hi", True), (LONG, False)):
        ident = await submit(q, text, stream=stream)
        request = await fake.arrived()
        await request.answer("well")
        await reached(q, ident, "succeeded")


async def failed_jobs(q: running, fake: FakeBackend) -> None:
    ident = await submit(q, "hi")
    await (await fake.arrived()).status(422, {"error": {"message": "no"}})
    await reached(q, ident, "failed")


async def retried_jobs(q: running, fake: FakeBackend) -> None:
    ident = await submit(q, "hi")
    (await fake.arrived()).reset()
    await (await fake.arrived()).answer("well")
    assert (await reached(q, ident, "succeeded"))["attempts"] == 2


async def cancelled_jobs(q: running, fake: FakeBackend) -> None:
    idents = [await submit(q, "hi") for _ in range(2)]
    request = await fake.arrived()
    await held(q, 1)
    for ident in idents[::-1]:
        assert (await cancel(q, ident)).status == 200
    await request.left()


async def lines_of_a_batch(q: running, fake: FakeBackend) -> None:
    batch = await begin(q.port, named("a", "b"))
    await (await fake.arrived()).answer("a")
    await (await fake.arrived()).status(422, {"error": {"message": "no"}})
    await ended(q.port, batch["id"])


async def refused_jobs(q: running, _fake: FakeBackend) -> None:
    assert (await q.chat(2 * LONG, ASYNC)).status == 507
    assert (await post_file(q.port, 2 * LONG.encode())).status == 507


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "served",
    [done_jobs, failed_jobs, retried_jobs, cancelled_jobs, lines_of_a_batch, refused_jobs],
)
async def test_of_a_job_that_has_ended_nothing_is_held_by_a_cycle(
    served: Any, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.02)
    settings: Any = {"queue__max_attempts": 1, "jobs__max_bytes": 3 * MIB}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings) as q:
        await served(q, fake)
        await nothing_left(q)


# ---- Those who share a run ---------------------------------------------------------------------


async def test_who_joins_a_run_has_a_quarter_of_the_queues_memory_and_runs_alone_beyond_it() -> (
    None
):
    body = embed("x" * 3000)
    async with by_hand(queue__max_queued_bytes=4 * 10_000) as (runner, q):
        clients = [await open_stream(q, EMBED, body)]
        first = await runner.arrived()
        for number in range(1, 8):
            clients.append(await open_stream(q, EMBED, body, user(str(number))))
            await there(q, 1, min(number, 3))
            await held(q, max(0, number - 3))
        assert q.gateway.recall.held <= 10_000
        one_leaves = clients.pop(2)
        one_leaves.rst()
        await there(q, 1, 2)
        clients.append(await open_stream(q, EMBED, body, user("late")))
        await there(q, 1, 3)  # there is room again
        await whole(first, document(EMBED, "1"))
        for _ in range(4):
            await whole(await runner.arrived(), document(EMBED, "2"))
        answers = [await client.response() for client in clients]
        hows = [how(one) for one in answers]
        assert {one: hows.count(one) for one in set(hows)} == {"MISS": 5, "JOINED": 3}
        assert (q.gateway.recall.held, q.gateway.recall.joined) == (0, {})


# ---- Answers that are kept ---------------------------------------------------------------------


async def test_a_streamed_answer_that_is_too_long_to_be_kept_is_let_go_as_it_comes(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "MOST_KEPT", 64 * 1024)
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        ident = await submit(q, "hi", stream=True)
        request = await fake.arrived()
        _, reply = q.gateway.jobs.active[ident]
        await request.start_stream()
        most = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                await request.piece("x" * 16 * 1024)
                await turns(8)
                most = max(most, len(reply.answer))
        await request.left()  # nobody reads it to its end
        assert 16 * 1024 < most <= llmq.MOST_KEPT
        assert "too long to be kept" in (await reached(q, ident, "failed"))["error"]
        later = await result(q, ident)
        assert later.status == 500
        assert b"too long to be kept" in later.body
        assert len(later.body) < 1024


async def test_of_batches_that_are_begun_at_once_one_file_at_a_time_is_read(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(server__state=str(state)) as q:
        file = await upload(q.port, named("a", "b"))
        read, add, open_files = q.gateway.store.read, q.gateway.jobs.add, []

        async def reading(sql: str, *values: Any) -> Any:
            open_files.extend(["file"] * ("content FROM files" in sql))
            return await read(sql, *values)

        async def adding(*facts: Any) -> None:
            assert open_files == ["file"]
            await add(*facts)
            open_files.pop()

        monkeypatch.setattr(q.gateway.store, "read", reading)
        monkeypatch.setattr(q.gateway.jobs, "add", adding)
        answers = await asyncio.gather(*[post_batch(q.port, file) for _ in range(5)])
        assert [one.status for one in answers] == [200] * 5


async def test_who_reads_a_long_file_slowly_holds_no_more_than_all_answers_may(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(server__state=str(state), queue__max_queued_bytes=16 * MIB) as q:
        file = await upload(q.port, b"x" * 2 * llmq.ANSWER_BUFFER)
        catch_up, unsent = llmq.Exchange.catch_up, []

        async def waits(exchange: llmq.Exchange) -> None:
            connections = exchange.connection.server.connections
            unsent.append(sum(one.unsent for one in connections))
            await catch_up(exchange)

        monkeypatch.setattr(llmq.Exchange, "catch_up", waits)
        clients = []
        for number in range(5):
            clients.append(await Raw.open(q.port, receive_buffer=4096))
            await clients[-1].send(http("GET", f"/v1/files/{file}/content"))
            await eventually(lambda: len(unsent) > number)  # noqa: B023 - it is called at once
        assert llmq.ANSWER_BUFFER < max(unsent) <= 16 * MIB
        for client in clients:
            client.close()


async def test_what_the_state_file_does_not_take_is_not_noted_without_end(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "MOST_USED", 10)
    settings: Any = {"cache__max_bytes": 10_000, "cache__persist": True}
    async with running(server__state=str(state), **settings) as q:
        keeper = q.service.keeper

        async def full(*_: Any, **__: Any) -> Any:
            raise llmq.LlmqError("the disk is full")

        monkeypatch.setattr(q.gateway.store, "write", full)
        await keeper.step()
        assert keeper.cache.noting
        for number in range(200):
            answer = llmq.Answer(b"x" * 500, "t", 1e12)
            keeper.cache.put(number.to_bytes(32, "big"), answer, 10_000)  # the oldest goes
            if number % 5 == 0:
                await keeper.step()
        assert 0 < len(keeper.cache.answers) <= 20
        assert len(keeper.cache.changed) <= len(keeper.cache.answers) + 20


# ---- What holds the loop -----------------------------------------------------------------------


async def test_while_jobs_have_all_the_memory_they_may_not_every_client_is_looked_at(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeBackend() as fake, serving(state, fake, queue__max_queued_bytes=100_000) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        runner, looks = q.service.runner, []
        idents = [await submit(q, "x" * 10_000, user(str(number))) for number in range(20)]
        await eventually(
            lambda: len(q.gateway.jobs.active) >= 3 and not q.gateway.jobs.news.is_set()
        )
        feed_lane = runner.feed_lane

        async def looked(*facts: Any) -> bool:
            looks.append(facts)
            return bool(await feed_lane(*facts))

        monkeypatch.setattr(runner, "feed_lane", looked)
        await submit(q, "x", user("one more"))
        await eventually(lambda: looks and not q.gateway.jobs.news.is_set())
        assert len(looks) == 1
        q.gateway.set_mode(llmq.Mode.OPEN)
        for ident in idents:
            await reached(q, ident, "succeeded")


async def test_use_of_many_is_summed_beside_the_loop(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(server__state=str(state)) as q:
        day = llmq.today()[0]
        rows = [(day, f"user:{number}", "m", 1, 0, 1, 1, 0.1) for number in range(2000)]
        await q.gateway.store.write((llmq.ADD_USAGE, rows))
        merge, here = llmq.merge_usage, []

        def merged(used: Any, more: Any) -> None:
            here.extend(list(more) * (threading.current_thread() is threading.main_thread()))
            merge(used, more)

        monkeypatch.setattr(llmq, "merge_usage", merged)
        answer = await ask(q.port, "GET", "/llmq/usage")
        assert len(answer.json()["usage"]) == 2000
        assert len(here) < 1000
