"""What happened in each minute of the last day, kept by llmq so that plots are full at once."""

from __future__ import annotations

import llmq
from tests.fakes import FakeBackend, ask, eventually, running

NOBODY = (0, 0, 0)


def minutes(history: llmq.History) -> list[tuple[int, ...]]:
    return list(history.minutes)


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


def test_minutes_in_which_the_box_slept_are_empty() -> None:
    history = llmq.History()
    history.note(0.0, (3, 0, 0), (0, 0, 0, 0))
    history.note(5 * 60.0, NOBODY, (0, 7, 0, 0))
    assert len(minutes(history)) == 5
    assert sum(row[4] for row in minutes(history)) == 7
    assert [row[0] for row in minutes(history)] == [3, 0, 0, 0, 0]


def test_no_more_than_a_day_is_kept_and_a_clock_that_was_set_begins_it_anew() -> None:
    history = llmq.History()
    for minute in range(llmq.MINUTES + 100):
        history.note(minute * 60.0, NOBODY, (minute, 0, 0, 0))
    assert len(minutes(history)) == llmq.MINUTES
    assert {row[3] for row in minutes(history)} == {1}
    for then in (0.0, 1e9):  # back, and far ahead
        history.note(then, NOBODY, (0, 0, 0, 0))
        assert minutes(history) == []


async def test_history_is_told_by_class_with_the_minute_under_way_last() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await q.chat("one two", priority="high")
        await q.chat("three", priority="low")

        def told() -> bool:
            facts = llmq.show_history(q.gateway)
            started = {word: sum(row) for word, row in facts["started"].items()}
            return started == {"high": 1, "normal": 0, "low": 1} and sum(facts["tokens"]) > 0

        await eventually(told)
        facts = (await ask(q.port, "GET", "/llmq/history")).json()
        rows = [facts["tokens"], *facts["started"].values(), *facts["waiting"].values()]
        assert len({len(row) for row in rows}) == 1
