"""Those who ask the same at one time share one run: each has its own answer, none can harm it."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llmq
from tests.fake_ollama import arrival, ended, open_stream, post, refuse, whole
from tests.fakes import Answer, FakeBackend, Raw, ask, eventually, running
from tests.test_cache import EMBED, asked, by_hand, document, embed, how
from tests.test_jobs import held as waits
from tests.test_keys import bearer, keys

LEAVING = {"closes": Raw.close, "half-closes": Raw.fin, "resets": Raw.rst}
each_way = pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())
SOON: dict[str, Any] = {"server__whole_heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}


def joined(q: running) -> int:
    """How many wait for what another has asked."""
    return sum(len(run.others) for run in q.gateway.recall.runs.values())


async def twins(q: running, number: int, body: Any, path: str = EMBED) -> list[Raw]:
    """So many clients that ask the same: the first runs, or waits, and the others join it."""
    clients, runs = [], len(q.gateway.recall.runs)
    for before in range(number):
        clients.append(await open_stream(q, path, body))
        await there(q, runs + 1, before)
    return clients


async def there(q: running, runs: int, others: int) -> None:
    await eventually(lambda: (len(q.gateway.recall.runs), joined(q)) == (runs, others))


# ---- Twins -----------------------------------------------------------------------------------


def check_all(answers: list[Answer], count_of: dict[str, int]) -> None:
    """All are whole and say the same, each with an id of its own."""
    assert {(one.status, one.clean) for one in answers} == {(200, True)}
    assert len({one.body for one in answers}) == 1
    assert len({one.headers["x-llmq-id"] for one in answers}) == len(answers)
    hows = [how(one) for one in answers]
    assert {one: hows.count(one) for one in set(hows)} == count_of


@each_way
async def test_twenty_twins_are_one_run_and_who_leaves_harms_no_other(leave: Any) -> None:
    async with by_hand() as (runner, q):
        clients = await twins(q, 20, embed())
        held = await runner.arrived()
        for gone in (clients.pop(0), clients.pop(7)):
            leave(gone)
        await eventually(lambda: joined(q) == 18)
        assert not held.connection.peer_closed()
        await whole(held, document(EMBED, "7"))
        check_all([await one.response() for one in clients], {"JOINED": 18})
        assert len(runner.requests) == 1
        assert how(await asked(q, embed())) == "HIT"


@each_way
async def test_the_last_of_the_twins_to_leave_ends_their_run(leave: Any) -> None:
    async with by_hand() as (runner, q):
        clients = await twins(q, 4, embed())
        held = await runner.arrived()
        for client in clients:
            assert not held.connection.peer_closed()
            leave(client)
        await held.left()
        await eventually(lambda: not q.gateway.calls)
        assert q.gateway.recall.runs == {}
        again = post(q, EMBED, embed())
        await whole(await arrival(again, runner), document(EMBED, "1"))
        assert how(await again) == "MISS"


@each_way
async def test_twins_that_all_leave_while_they_wait_wait_no_more(leave: Any) -> None:
    async with by_hand() as (runner, q):
        busy = post(q, EMBED, embed("busy"))
        held = await arrival(busy, runner)
        clients = await twins(q, 3, embed())
        for client in clients:
            leave(client)
        try:
            await eventually(lambda: not q.gateway.scheduler.waiting, 1)
        finally:
            await whole(held, document(EMBED, "1"))
            await busy
        assert len(runner.requests) == 1


async def order_of_cancel(q: running) -> None:
    (ident,) = q.gateway.calls
    assert (await ask(q.port, "DELETE", f"/llmq/requests/{ident}")).status == 200


async def order_of_block(q: running) -> None:
    answer = await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
    assert answer.status == 200


@pytest.mark.parametrize(
    ("order", "status"), [(order_of_cancel, 499), (order_of_block, 403)], ids=["cancel", "block"]
)
async def test_twin_that_is_ended_by_order_does_not_fail_the_others(
    order: Any, status: int
) -> None:
    async with by_hand() as (runner, q):
        first = post(q, EMBED, embed(), {"X-User-ID": "eve"})
        held = await arrival(first, runner)
        others = [post(q, EMBED, embed(), {"X-User-ID": "bob"}) for _ in range(5)]
        await eventually(lambda: joined(q) == 5)
        await order(q)
        await held.left()
        assert (await first).status == status
        request = await arrival(others[0], runner)
        await eventually(lambda: joined(q) == 4)
        await whole(request, document(EMBED, "2"))
        check_all([await one for one in others], {"MISS": 1, "JOINED": 4})
        assert len(runner.requests) == 2


@pytest.mark.parametrize("status", [400, 500])
async def test_run_that_fails_fails_all_its_twins_with_the_runners_words(status: int) -> None:
    async with by_hand(queue__max_attempts=1) as (runner, q):
        clients = await twins(q, 5, embed())
        await refuse(await runner.arrived(), status, {"error": {"message": "out of tune"}})
        answers = [await one.response() for one in clients]
        assert {one.status for one in answers} == {status}
        assert {one.json()["error"]["message"] for one in answers} == {"out of tune"}
        again = post(q, EMBED, embed())
        await whole(await arrival(again, runner), document(EMBED, "1"))
        assert how(await again) == "MISS"


@pytest.mark.parametrize("leaves", [False, True])
async def test_twins_of_a_whole_answer_are_kept_patient_and_told_the_same(leaves: bool) -> None:
    async with by_hand(**SOON) as (runner, q):
        clients = await twins(q, 3, embed())
        held = await runner.arrived()
        heads = [await one.head() for one in clients]  # which come with the first sign of life
        clients += [await open_stream(q, EMBED, embed())]
        await eventually(lambda: joined(q) == 3)
        if leaves:
            clients[0].rst()
            clients, heads = clients[1:], heads[1:]
        await whole(held, document(EMBED, "7"))
        answers = [await one.response() for one in clients]
        assert {one.status for one in answers} == {200}
        assert [one.json() for one in answers] == [document(EMBED, "7")] * len(answers)
        known = await asked(q, embed())
        assert how(known) == "HIT"
        assert known.json() == document(EMBED, "7")
        assert not known.body.startswith(b" ")  # nor are signs of life kept


async def test_twin_says_that_it_is_one_though_a_sign_of_life_came_first() -> None:
    async with by_hand(**SOON) as (runner, q):
        clients = await twins(q, 2, embed())
        held = await runner.arrived()
        heads = [await one.head() for one in clients]
        await whole(held, document(EMBED, "7"))
        answers = [await one.response() for one in clients]
        assert [one.json() for one in answers] == [document(EMBED, "7")] * 2
        assert [how(one) for one in heads] == ["MISS", "JOINED"]


async def test_who_was_kept_patient_by_a_run_that_was_cancelled_gets_one_answer() -> None:
    async with by_hand(**SOON) as (runner, q):
        clients = await twins(q, 3, embed())
        held = await runner.arrived()
        for client in clients:
            await client.head()
        await order_of_cancel(q)
        await held.left()
        await whole(await runner.arrived(), document(EMBED, "2"))
        answers = [await one.response() for one in clients[1:]]
        assert {one.clean for one in answers} == {True}
        assert [one.json() for one in answers] == [document(EMBED, "2")] * 2


async def test_run_that_fails_after_signs_of_life_tells_all_its_twins() -> None:
    async with by_hand(queue__max_attempts=1, **SOON) as (runner, q):
        clients = await twins(q, 3, embed())
        held = await runner.arrived()
        for client in clients:
            await client.head()
        clients[0].rst()
        await refuse(held, 500, {"error": {"message": "out of tune"}})
        for client in clients[1:]:
            answer = await client.response()
            assert answer.json()["error"]["message"] == "out of tune"


async def test_who_may_start_does_not_wait_for_one_who_has_all_that_its_key_may() -> None:
    rows = keys(alice={"max_concurrent": 1}, bob={})
    alice, bob = (bearer(rows[name]["key"]) for name in ("alice", "bob"))
    async with FakeBackend(auto=False) as runner:
        async with running(runner.url, keys=rows, queue__slots=2) as q:
            backends = q.gateway.fleet.backends.values()
            await eventually(lambda: all(one.usable for one in backends))
            long = post(q, EMBED, embed("long"), alice)
            first = await arrival(long, runner)
            same = post(q, EMBED, embed("same"), alice)
            await waits(q, 1)
            other = post(q, EMBED, embed("same"), bob)  # a slot is free
            second = await arrival(other, runner)
            await whole(second, document(EMBED, "2"))
            assert how(await other) == "MISS"
            await whole(first, document(EMBED, "1"))
            await whole(await arrival(same, runner), document(EMBED, "3"))
            assert (await long).status == (await same).status == 200


async def test_one_that_may_wait_less_ends_alone_and_not_with_whom_it_could_have_joined() -> None:
    async with by_hand(queue__max_wait_high=0.05) as (runner, q):
        q.gateway.set_mode(llmq.Mode.PAUSED)
        patient = post(q, EMBED, embed(), {"X-Queue-Priority": "low"})
        await waits(q, 1)
        urgent = post(q, EMBED, embed(), {"X-Queue-Priority": "high"})
        assert (await urgent).code == "wait_timeout"
        assert not patient.done()
        q.gateway.set_mode(llmq.Mode.OPEN)
        await whole(await arrival(patient, runner), document(EMBED, "1"))
        assert how(await patient) == "MISS"


async def test_who_has_joined_a_run_is_blocked_as_if_it_were_its_own() -> None:
    async with by_hand() as (runner, q):
        first = post(q, EMBED, embed(), {"X-User-ID": "bob"})
        held = await arrival(first, runner)
        joins = post(q, EMBED, embed(), {"X-User-ID": "eve"})
        await there(q, 1, 1)
        await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
        assert (await joins).status == 403  # now, not when the run ends
        await there(q, 1, 0)
        await whole(held, document(EMBED, "1"))
        assert how(await first) == "MISS"


@pytest.mark.parametrize("settings", [{}, SOON], ids=["silent", "told to wait"])
async def test_who_has_joined_a_run_is_cancelled_by_its_own_id(settings: Any) -> None:
    async with by_hand(**settings) as (runner, q):
        first, joins = await twins(q, 2, embed())
        held = await runner.arrived()
        (ident,) = q.gateway.recall.joined
        if settings:
            assert (await joins.head()).headers["x-llmq-id"] == ident
        assert (await ask(q.port, "DELETE", f"/llmq/requests/{ident}")).status == 200
        answer = await joins.response()
        assert answer.status == (200 if settings else 499)
        assert "cancelled" in answer.json()["error"]["message"]
        assert (await ask(q.port, "DELETE", f"/llmq/requests/{ident}")).status == 404
        await there(q, 1, 0)
        await whole(held, document(EMBED, "7"))
        assert (await first.response()).json() == document(EMBED, "7")
        recent = await ended(q, 2)
        assert {one["id"]: one["outcome"] for one in recent}[ident] == "cancelled"


async def test_hits_misses_and_joined_ones_are_counted_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with by_hand() as (runner, q):
        clients = await twins(q, 2, embed())
        await whole(await runner.arrived(), document(EMBED, "1"))
        for client in clients:
            await client.response()
        await asked(q, embed())
        status = await q.status()
        cache = status["cache"]
        assert {name: cache[name] for name in ("hit", "joined", "miss", "answers")} == {
            "hit": 1, "joined": 1, "miss": 1, "answers": 1
        }  # fmt: skip
        assert cache["bytes"] > len(json.dumps(document(EMBED, "1")))
        recent = {one["cache"]: one for one in await ended(q, 3)}
        assert sorted(recent) == ["hit", "joined", "miss"]
        assert [recent[name]["backend"] != "" for name in sorted(recent)] == [False, False, True]
        assert {one["outcome"] for one in recent.values()} == {"done"}
        text = (await ask(q.port, "GET", "/metrics")).body.decode()
        for name in recent:
            assert f'llmq_cache_total{{result="{name}"}} 1\n' in text
    for name in recent:
        assert sum(f" cache={name}" in one.getMessage() for one in caplog.records) == 1
