"""What happened in each minute of the last day, kept by llmq so that plots are full at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import llmq
from tests.fakes import FakeBackend, ask, eventually, running

NOBODY = (0, 0, 0)
NOTHING = (0, 0, 0, 0)
NOBODY_THERE = "http://127.0.0.1:9"  # where no backend listens
HISTORY = "/llmq/history"
CLASSES = ["high", "normal", "low"]
DAY = 86400


def minutes(history: llmq.History) -> list[tuple[int, ...]]:
    return list(history.minutes)


def waited(history: llmq.History) -> list[int]:
    """Of class high, minute by minute, the one under way last."""
    return [row[0] for row in [*history.minutes, history.latest(NOTHING)]]


# ---- minutes, as a pure object ---------------------------------------------------------------


def test_a_minute_has_the_most_that_waited_and_what_started_and_was_told_in_it() -> None:
    history = llmq.History()
    history.note(600.0, (0, 1, 0), (0, 0, 0, 0))
    history.note(610.0, (2, 0, 5), (1, 2, 0, 30))
    history.note(659.9, NOBODY, (1, 3, 0, 40))
    assert minutes(history) == []
    history.note(660.0, NOBODY, (1, 3, 0, 40))
    assert minutes(history) == [(2, 1, 5, 1, 3, 0, 40)]
    history.note(720.0, (1, 0, 0), (1, 3, 2, 45))
    assert minutes(history)[1:] == [(0, 0, 0, 0, 0, 2, 5)]
    assert history.latest((1, 3, 2, 45)) == (1, 0, 0, 0, 0, 0, 0)


def test_what_was_before_the_first_minute_is_in_none() -> None:
    history = llmq.History()
    history.note(600.0, NOBODY, (7, 8, 9, 1000))
    assert history.latest((7, 8, 9, 1000)) == (0, 0, 0, 0, 0, 0, 0)
    assert history.latest((8, 8, 9, 1001)) == (0, 0, 0, 1, 0, 0, 1)


def test_what_still_waits_at_the_turn_waits_in_both_minutes() -> None:
    history = llmq.History()
    history.note(659.0, (9, 0, 0), NOTHING)
    history.note(660.0, (4, 0, 0), NOTHING)
    history.note(661.0, (1, 0, 0), NOTHING)
    assert waited(history) == [9, 4]


def test_the_minute_under_way_is_told_without_being_ended() -> None:
    history = llmq.History()
    history.note(600.0, (1, 2, 3), NOTHING)
    told = history.latest((1, 1, 1, 5))
    assert told == history.latest((1, 1, 1, 5)) == (1, 2, 3, 1, 1, 1, 5)
    assert minutes(history) == []


def test_minutes_in_which_the_box_slept_are_empty() -> None:
    history = llmq.History()
    history.note(0.0, (3, 0, 0), (0, 0, 0, 0))
    history.note(5 * 60.0, NOBODY, (0, 7, 0, 0))
    assert len(minutes(history)) == 5
    assert sum(row[4] for row in minutes(history)) == 7
    assert [row[0] for row in minutes(history)] == [3, 0, 0, 0, 0]


def test_they_are_empty_also_when_something_waits_after_them() -> None:
    history = llmq.History()
    history.note(0.0, (3, 0, 0), NOTHING)
    history.note(5 * 60.0, (2, 0, 0), NOTHING)
    assert waited(history) == [3, 0, 0, 0, 0, 2]


def test_nothing_is_lost_and_nothing_is_told_twice_over_any_steps() -> None:
    history, now, total = llmq.History(), 0.0, 0
    history.note(now, NOBODY, NOTHING)
    for step in (1, 59, 61, 0.5, 300, 59.5, 3600, 7, 120):
        now, total = now + step, total + 3
        history.note(now, NOBODY, (total, 0, 0, 10 * total))
    rows = [*minutes(history), history.latest((total, 0, 0, 10 * total))]
    assert len(rows) == now // 60 + 1
    assert [sum(row[place] for row in rows) for place in (3, 6)] == [total, 10 * total]


def test_no_more_than_a_day_is_kept_and_a_clock_that_was_set_begins_it_anew() -> None:
    history = llmq.History()
    for minute in range(llmq.MINUTES + 100):
        history.note(minute * 60.0, NOBODY, (minute, 0, 0, 0))
    assert len(minutes(history)) == llmq.MINUTES
    assert {row[3] for row in minutes(history)} == {1}
    for then in (0.0, 1e9):  # back, and far ahead
        history.note(then, NOBODY, (0, 0, 0, 0))
        assert minutes(history) == []


@pytest.mark.parametrize(
    ("ahead", "kept"), [(DAY - 60, llmq.MINUTES - 1), (DAY, llmq.MINUTES), (DAY + 60, 0)]
)
def test_a_box_that_slept_less_than_a_day_has_the_rest_of_it(ahead: int, kept: int) -> None:
    history = llmq.History()
    history.note(600.0, (5, 0, 0), NOTHING)
    history.note(600.0 + ahead, NOBODY, (1, 0, 0, 0))
    assert len(minutes(history)) == kept
    assert history.minute == (600 + ahead) // 60


@pytest.mark.parametrize("then", [-DAY, 10 * DAY], ids=["back", "far ahead"])
def test_after_the_clock_was_set_nothing_of_before_is_in_the_minute(then: int) -> None:
    history = llmq.History()
    history.note(20 * DAY, (5, 5, 5), (9, 9, 9, 99))
    history.note(20 * DAY + then, (0, 1, 0), (10, 10, 10, 100))
    assert history.latest((11, 10, 10, 101)) == (0, 1, 0, 1, 0, 0, 1)


def test_a_clock_that_is_put_right_by_a_moment_costs_nothing() -> None:
    history = llmq.History()
    for minute in range(600):
        history.note(minute * 60.0, NOBODY, (minute, 0, 0, 0))
    history.note(599 * 60.0 - 0.2, NOBODY, (600, 0, 0, 0))  # as time servers do it
    history.note(600 * 60.0, NOBODY, (600, 0, 0, 0))
    rows = [*minutes(history), history.latest((600, 0, 0, 0))]
    assert len(rows) >= 600
    assert sum(row[3] for row in rows) == 600


# ---- as it is told ---------------------------------------------------------------------------


def look(q: running) -> None:
    """The look that llmq takes again and again by itself."""
    llmq.reap(q.gateway, q.service._servers)


async def told(q: running) -> Any:
    answer = await ask(q.port, "GET", HISTORY)
    assert answer.status == 200
    return answer.json()


async def test_history_is_told_by_class_with_the_minute_under_way_last() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await q.chat("one two", priority="high")
        await q.chat("three", priority="low")
        q.gateway.journal.flush()
        facts = await told(q)
        assert {word: sum(row) for word, row in facts["started"].items()} == {
            "high": 1, "normal": 0, "low": 1,
        }  # fmt: skip
        assert sum(facts["tokens"]) == q.gateway.journal.tokens > 0
        rows = [facts["tokens"], *facts["started"].values(), *facts["waiting"].values()]
        assert len({len(row) for row in rows}) == 1
        assert list(facts["started"]) == list(facts["waiting"]) == CLASSES
        assert set(facts) == {"minute", "waiting", "started", "tokens"}


async def test_what_waits_is_counted_by_class_and_remembered_when_it_is_gone() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        fake.hold()
        asking = [asyncio.ensure_future(q.chat("x", priority="normal"))]
        await eventually(lambda: fake.active == 1)
        words = ("high", "low", "low", "normal", "low")
        asking += [asyncio.ensure_future(q.chat("x", priority=word)) for word in words]
        await eventually(lambda: len(q.gateway.scheduler.waiting) == 5)
        look(q)
        before = {"high": 1, "normal": 1, "low": 3}
        facts = await told(q)
        assert {word: max(row) for word, row in facts["waiting"].items()} == before
        fake.release()
        await asyncio.gather(*asking)
        look(q)
        facts = await told(q)
        assert {word: max(row) for word, row in facts["waiting"].items()} == before
        started = {word: sum(row) for word, row in facts["started"].items()}
        assert started == {"high": 1, "normal": 2, "low": 3}


async def test_tokens_are_those_of_the_answers() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        answers = [await q.chat(f"one {text}") for text in ("two", "two three", "x y z")]
        q.gateway.journal.flush()
        many = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
        assert sum((await told(q))["tokens"]) == many > 0


async def test_llmq_looks_by_itself_and_tells_which_minute_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, ahead = llmq.time.time, 0
    monkeypatch.setattr(llmq.time, "time", lambda: real() + ahead)
    async with running(NOBODY_THERE) as q:
        history = q.gateway.journal.history
        await eventually(lambda: history.minute > 0)
        first = history.minute
        assert abs(first - real() // 60) <= 1
        ahead = 120
        await eventually(lambda: history.minute > first)
        facts = await told(q)
        assert facts["minute"] >= first + 2
        assert len(facts["tokens"]) == facts["minute"] - first + 1


async def test_a_whole_day_is_told_in_few_bytes() -> None:
    async with running(NOBODY_THERE) as q:
        history = q.gateway.journal.history = llmq.History()
        for minute in range(llmq.MINUTES + 1):
            many = 10_000 * minute
            history.note(minute * 60.0, (9999, 9999, 9999), (many, many, many, 100 * many))
        answer = llmq.show_history(q.gateway)
        body = llmq.render_json(answer)
        assert len(body) < 80 * 1024
        rows = [answer["tokens"], *answer["started"].values(), *answer["waiting"].values()]
        assert {len(row) for row in rows} == {llmq.MINUTES + 1}, "a day, and the minute under way"


async def test_the_route_sends_all_of_a_day_whole() -> None:
    async with running(NOBODY_THERE) as q:
        history = q.gateway.journal.history
        await eventually(lambda: history.minute > 0)
        history.minutes.extend([(1, 2, 3, 4, 5, 6, 7)] * llmq.MINUTES)
        facts = await told(q)
        assert [len(row) for row in facts["waiting"].values()] == [llmq.MINUTES + 1] * 3
        assert facts["tokens"][:-1] == [7] * llmq.MINUTES


# ---- to whom ---------------------------------------------------------------------------------


async def test_only_who_may_control_sees_it() -> None:
    secret = {name: f"sk-{name}-5f1d7c0a9b3e" for name in ("boss", "user")}
    rows = {
        "boss": {"key": secret["boss"], "rights": ["control"]},
        "user": {"key": secret["user"], "rights": ["infer"]},
    }
    async with running(NOBODY_THERE, keys=rows) as q:
        seen = {}
        for name, key in {**secret, "wrong": "sk-wrong-5f1d7c0a9b3e"}.items():
            headers = {"Authorization": f"Bearer {key}"}
            seen[name] = (await ask(q.port, "GET", HISTORY, headers=headers)).status
        seen["nobody"] = (await ask(q.port, "GET", HISTORY)).status
    assert seen == {"boss": 200, "user": 403, "wrong": 401, "nobody": 401}


async def test_no_foreign_page_sees_it_and_it_is_only_read() -> None:
    async with running(NOBODY_THERE, server__base_path="/llm") as q:
        path = "/llm" + HISTORY
        evil = await ask(q.port, "GET", path, headers={"Origin": "https://evil.example"})
        assert evil.status == 403
        head = await ask(q.port, "HEAD", path)
        assert (head.status, head.body) == (200, b"")
        posted = await ask(q.port, "POST", path, json={})
        assert (posted.status, posted.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert set(json.loads((await ask(q.port, "GET", path)).body)["started"]) == set(CLASSES)
        assert (await ask(q.port, "GET", HISTORY)).status == 404
