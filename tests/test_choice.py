"""Which model `auto` is: pure choices, from candidates as they stand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

import llmq
from llmq import PLACES, Candidate, Choice, VideoMemory, choose, explain, is_too_much

SEEDS = range(3000)
FLAGS = ("loaded", "purpose", "taken", "unsure", "down")
TINY = 2.0**-10  # GiB; sums with it are exact


def model(name: str, place: int = 0, **more: Any) -> Candidate:
    return Candidate(name, name.lower(), place, **more)


def pick(
    *candidates: Candidate, longest: float | None = None, degrade: bool = False
) -> Choice | None:
    return choose(candidates, "code_fix", "it says so", longest, degrade=degrade)


def chosen(*candidates: Candidate, **more: Any) -> str:
    choice = pick(*candidates, **more)
    assert choice is not None
    return choice.model


def memory(rng: random.Random) -> VideoMemory | None:
    total = rng.choice([8.0, 16.0, 24.0])
    known = VideoMemory(total, rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) * total, rng.choice([0, 1]))
    return rng.choice([None, known, known])


def row(rng: random.Random) -> list[Candidate]:
    """A row as it may stand; of most models little holds, as in life."""
    often = rng.choice([0.0, 0.1, 0.5])

    def one(place: int) -> Candidate:
        return Candidate(
            f"m{place}",
            f"m{place}",
            place - 10 * (rng.random() < 0.05),
            in_row=rng.random() < 0.8,
            size=rng.choice([0.0, 0.5, 2.0, 6.5, 14.0, 30.0]),
            memory=memory(rng),
            waiting=rng.choice([0.0, 0.0, 0.5, 1.0, 3.0, 40.0]),
            wait=rng.choice([0.0, 0.0, 0.5, 5.0, 90.0]),
            cannot=rng.choice(["cannot see pictures", "is for embeddings"])
            if rng.random() < often
            else "",
            **{name: rng.random() < often for name in FLAGS},
        )

    return [one(place) for place in range(rng.randrange(9))]


def rows() -> Iterator[tuple[random.Random, list[Candidate]]]:
    for seed in SEEDS:
        rng = random.Random(seed)
        yield rng, row(rng)


def fits(one: Candidate) -> bool:
    """Whether it needs nobody else's memory, said in other words than llmq's."""
    if one.loaded or one.size == 0 or one.memory is None:
        return True
    return one.memory.free - one.memory.reserve - one.size >= 0


def places(one: Candidate) -> float:
    """Where the table puts it."""
    moved = float(one.place)
    for name in FLAGS:
        moved += PLACES[name] if getattr(one, name) else 0
    moved += 0 if fits(one) else PLACES["no room"]
    return moved + min(PLACES["most waiting"], one.waiting * PLACES["waiting"])


def standings(candidates: Sequence[Candidate]) -> list[str]:
    """The names of those that can, the best first."""
    able = [one for one in candidates if not one.cannot]
    return [one.name for one in sorted(able, key=lambda one: (places(one), one.place))]


def too_much(one: Candidate, longest: float | None) -> bool:
    return not fits(one) or (longest is not None and one.wait > longest)


# ---- Who is chosen ---------------------------------------------------------------------------


def test_one_that_cannot_is_never_chosen_and_none_is_where_none_can() -> None:
    nobody = 0
    for rng, candidates in rows():
        able = {one.name for one in candidates if not one.cannot}
        for degrade in (False, True):
            choice = pick(*candidates, longest=rng.choice([None, 0.0, 1.0]), degrade=degrade)
            assert (choice is None) is (not able)
            if choice is not None:
                assert {choice.model, *choice.fallbacks} == able
            nobody += choice is None
    assert nobody


def test_the_one_that_stands_best_by_the_table_is_chosen_and_the_others_follow() -> None:
    for rng, candidates in rows():
        choice = pick(*candidates, longest=rng.choice([None, 0.0, 1.0]))
        found = [] if choice is None else [choice.model, *choice.fallbacks]
        assert found == standings(candidates)


def test_the_same_is_chosen_each_time_whatever_the_order_in_which_they_are_told() -> None:
    for rng, candidates in rows():
        shuffled = rng.sample(candidates, len(candidates))
        for degrade in (False, True):
            longest = rng.choice([None, 0.0, 1.0])
            one = pick(*candidates, longest=longest, degrade=degrade)
            assert one == pick(*candidates, longest=longest, degrade=degrade)
            other = pick(*shuffled, longest=longest, degrade=degrade)
            assert (one and one[:3]) == (other and other[:3])


def test_of_two_that_stand_alike_the_one_further_up_in_its_row_goes_first() -> None:
    busy = model("first", 0, waiting=4)
    assert busy.standing == model("second", 1).standing
    assert chosen(busy, model("second", 1)) == "first"
    assert chosen(model("second", 1), busy) == "first"


def test_without_anything_that_moves_them_the_order_of_the_row_counts() -> None:
    candidates = [model(f"m{place}", place) for place in range(30)]
    choice = pick(*candidates)
    assert choice is not None
    assert [choice.model, *choice.fallbacks] == [one.name for one in candidates]


@pytest.mark.parametrize(("place", "wins"), [(1, True), (2, False), (5, False)])
def test_loaded_model_passes_the_one_before_it_and_no_more(place: int, wins: bool) -> None:
    others = [model(f"m{number}", number) for number in range(place)]
    assert (chosen(*others, model("loaded", place, loaded=True)) == "loaded") is wins


def test_loaded_model_wins_exactly_where_the_order_differs_by_less_than_its_weight() -> None:
    for rng, candidates in rows():
        alike = [
            model(one.name, rng.randrange(20), loaded=one.loaded)
            for one in candidates
            if not one.cannot
        ]
        if not alike:
            continue
        best = next(one for one in alike if one.name == chosen(*alike))
        for one in alike:
            if one.loaded and not best.loaded:
                assert one.place - best.place >= -PLACES["loaded"]
            if best.loaded and not one.loaded:
                assert best.place - one.place <= -PLACES["loaded"]
            if one.loaded is best.loaded:
                assert best.place <= one.place


def test_purpose_decides_between_a_model_and_one_beside_it_and_passes_no_other() -> None:
    good = model("good", 1, purpose=True)
    assert chosen(model("first", 0), good) == "first"
    assert chosen(model("first", 0, waiting=3), good) == "good"


def test_a_queue_moves_a_model_down_but_never_beyond_its_most() -> None:
    last = int(PLACES["most waiting"])
    others = [model(f"m{place}", place) for place in range(1, last + 2)]
    assert chosen(model("busy", 0, waiting=3), *others) == "busy"
    assert chosen(model("busy", 0, waiting=5), *others) == "m1"
    choice = pick(model("busy", 0, waiting=1e9), *others)
    assert choice is not None
    assert choice.fallbacks.index("busy") < choice.fallbacks.index(f"m{last + 1}")


def test_a_device_that_is_taken_moves_a_model_down_as_the_table_says() -> None:
    taken = model("alone", 0, taken=True)
    assert chosen(taken, model("far", int(PLACES["taken"]) - 1)) == "far"
    assert chosen(taken, model("farther", int(PLACES["taken"]) + 1)) == "alone"


def test_unsure_ones_come_after_all_others_and_those_that_are_down_last() -> None:
    for _, candidates in rows():
        choice = pick(*candidates)
        if choice is None:
            continue
        by_name = {one.name: one for one in candidates}
        order = [by_name[name] for name in (choice.model, *choice.fallbacks)]
        ranks = [(one.down, one.unsure) for one in order]
        assert ranks == sorted(ranks)


def test_that_which_is_down_is_chosen_where_it_alone_can() -> None:
    assert chosen(model("down", down=True), model("no", cannot="cannot use tools")) == "down"


# ---- Graphics memory -------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [0.0, 1.0, 2.5])
def test_a_model_fits_up_to_the_last_byte_beside_the_reserve(reserve: float) -> None:
    room = VideoMemory(total=24.0, free=10.0, reserve=reserve)
    assert room.fits(10.0 - reserve)
    assert not room.fits(10.0 - reserve + TINY)
    assert room.holds(24.0 - reserve)
    assert not room.holds(24.0 - reserve + TINY)


def test_what_fits_is_held_too_and_more_free_memory_never_fits_less() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        total, reserve, size = rng.uniform(0, 48), rng.uniform(0, 4), rng.uniform(0, 48)
        free = rng.uniform(0, total)
        room = VideoMemory(total, free, reserve)
        assert not room.fits(size) or room.holds(size)
        assert not room.fits(size) or VideoMemory(total, total, reserve).fits(size)
        assert room.fits(size) == (free >= size + reserve)
        assert room.holds(size) == (total >= size + reserve)


def test_memory_that_others_have_by_now_less_than_nothing_fits_nothing() -> None:
    over = VideoMemory(total=8.0, free=-2.0, reserve=0.0)
    assert not over.fits(TINY)
    assert "of 0.0 free" in is_too_much(model("m", size=4.0, memory=over), None)


FULL = VideoMemory(total=24.0, free=4.0, reserve=1.0)


@pytest.mark.parametrize(
    ("facts", "room"),
    [
        ({"size": 3.0, "memory": FULL}, True),
        ({"size": 3.0 + TINY, "memory": FULL}, False),
        ({"size": 99.0, "memory": FULL, "loaded": True}, True),
        ({"size": 0.0, "memory": FULL}, True),
        ({"size": 99.0, "memory": None}, True),
    ],
    ids=["edge", "beyond", "loaded", "size not known", "memory not known"],
)
def test_what_is_not_known_or_loaded_already_has_room(facts: dict[str, Any], room: bool) -> None:
    one = model("m", **facts)
    assert one.has_room is room
    assert bool(is_too_much(one, None)) is not room


def test_want_of_room_moves_a_model_down_by_as_much_as_the_table_says() -> None:
    big = model("big", 0, size=14.0, memory=FULL)
    small = {"size": 2.0, "memory": FULL}
    assert chosen(big, model("small", 1, **small)) == "big", "one place is not beyond the weight"
    assert chosen(big, model("small", 1, purpose=True, **small)) == "small"
    assert chosen(big, model("small", 2, purpose=True, **small)) == "big"


# ---- A smaller one ---------------------------------------------------------------------------


def test_without_degrade_no_time_is_too_short_and_memory_counts_by_the_table_alone() -> None:
    for _, candidates in rows():
        results = {chosen_name(candidates, longest) for longest in (None, 0.0, 1.0, 1e9)}
        assert results == {(standings(candidates) or [None])[0]}


def chosen_name(candidates: Sequence[Candidate], longest: float | None) -> str | None:
    choice = pick(*candidates, longest=longest)
    return choice.model if choice else None


def test_degrade_takes_only_a_smaller_one_of_the_row_that_is_not_too_much_itself() -> None:
    taken = 0
    for rng, candidates in rows():
        longest = rng.choice([None, 0.0, 1.0])
        choice = pick(*candidates, longest=longest, degrade=True)
        if choice is None:
            continue
        by_name = {one.name: one for one in candidates}
        first, got = by_name[standings(candidates)[0]], by_name[choice.model]
        if got is first:
            continue
        taken += 1
        assert too_much(first, longest)
        assert 0 < got.size < first.size
        assert got.in_row
        assert not too_much(got, longest)
        better = standings(candidates)[: standings(candidates).index(got.name)]
        for one in map(by_name.__getitem__, better[1:]):  # each of them has something against it
            small = one.in_row and 0 < one.size < first.size
            assert not small or too_much(one, longest)
        assert first.name in choice.fallbacks
    assert taken > 50


def test_degrade_changes_nothing_where_neither_memory_nor_time_is_too_short() -> None:
    for rng, candidates in rows():
        longest = rng.choice([None, 0.0, 1.0])
        by_name = {one.name: one for one in candidates}
        order = standings(candidates)
        if order and not too_much(by_name[order[0]], longest):
            assert pick(*candidates, longest=longest, degrade=True) == pick(*candidates)


def test_degrade_never_leaves_a_model_that_is_up_for_one_that_is_down() -> None:
    big = model("big", 0, size=14.0, memory=FULL)
    assert chosen(big, model("small", 1, size=2.0, down=True), degrade=True) == "big"


def test_degrade_never_leaves_a_model_that_can_for_one_that_may_not_be_able_to() -> None:
    big = model("big", 0, size=14.0, memory=FULL)
    assert chosen(big, model("small", 1, size=2.0, unsure=True), degrade=True) == "big"


def test_degrade_by_time_leaves_one_for_which_a_request_would_wait_too_long() -> None:
    big = model("big", 0, size=14.0, wait=30.0)
    small = model("small", 4, size=2.0, wait=3.0)
    assert chosen(big, small, longest=30.0, degrade=True) == "big"
    assert chosen(big, small, longest=29.0, degrade=True) == "small"
    assert chosen(big, small, longest=3.0, degrade=True) == "small"
    assert chosen(big, small, longest=2.0, degrade=True) == "big", "it would wait there as well"
    assert chosen(big, small, longest=2.0) == "big"


@pytest.mark.parametrize("size", [0.0, 14.0, 20.0])
def test_degrade_takes_none_that_is_not_known_to_be_smaller(size: float) -> None:
    big = model("big", 0, size=14.0, wait=30.0)
    assert chosen(big, model("other", 1, size=size), longest=1.0, degrade=True) == "big"


def test_degrade_takes_none_that_is_merely_good_at_it() -> None:
    big = model("big", 0, size=14.0, wait=30.0)
    good = model("good", 1, size=2.0, purpose=True, in_row=False)
    assert chosen(big, good, longest=1.0, degrade=True) == "big"


# ---- The reason ------------------------------------------------------------------------------


def test_reason_names_the_task_why_it_is_that_what_was_chosen_and_what_was_left_out() -> None:
    left = [model("no1", 0, cannot="cannot see pictures"), model("no2", 1, cannot="is not there")]
    choice = pick(*left, model("yes", 2, loaded=True))
    assert choice is not None
    assert choice.auto
    assert choice.task == "code_fix"
    for words in ("code_fix", "it says so", "yes is loaded", "not no1: cannot see pictures"):
        assert words in choice.reason
    assert "not no2: is not there" in choice.reason


def test_reason_names_what_a_smaller_one_stands_in_for_and_what_was_too_short() -> None:
    big = model("big", 0, size=14.0, memory=FULL)
    choice = pick(big, model("small", 3, size=2.0, memory=FULL), degrade=True)
    assert choice is not None
    assert choice.model == "small"
    assert "in place of big, which needs 14.0 GiB of 4.0 free" in choice.reason
    late = model("late", 0, size=14.0, wait=30.0)
    choice = pick(late, model("small", 3, size=2.0), longest=1.0, degrade=True)
    assert choice is not None
    assert "in place of late, which would wait 30 s" in choice.reason


def test_reason_always_names_its_model_and_is_never_long() -> None:
    for rng, candidates in rows():
        choice = pick(*candidates, longest=rng.choice([None, 0.0]), degrade=True)
        if choice is not None:
            assert f"; {choice.model} " in choice.reason
            assert len(choice.reason) <= llmq.REASON_SHOWN
    endless = [model("x" * 512 + str(one), one, cannot="y" * 512) for one in range(50)]
    choice = pick(*endless, model("z" * 512, 99))
    assert choice is not None
    assert len(choice.reason) <= llmq.REASON_SHOWN


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "is the first that can"),
        ({"loaded": True}, "is loaded"),
        ({"purpose": True}, "is good at it"),
        ({"loaded": True, "purpose": True}, "is loaded, is good at it"),
        ({"size": 9.0, "memory": FULL}, "has to be loaded where others are"),
        ({"taken": True}, "waits for its device"),
        ({"unsure": True}, "may not be able to"),
        ({"down": True}, "is down"),
        ({"waiting": 3.0}, "has 3 waiting"),
        ({"waiting": 0.4}, "is the first that can"),
    ],
)
def test_what_holds_for_a_model_is_told_in_words(facts: dict[str, Any], words: str) -> None:
    assert explain(model("m", **facts)) == words


def test_time_that_is_not_limited_is_never_too_short() -> None:
    assert is_too_much(model("m", wait=1e9), None) == ""
    assert is_too_much(model("m", wait=0.0), 0.0) == ""
    assert is_too_much(model("m", wait=1.0), 0.5) == "would wait 1 s"


def test_row_of_the_table_exists_for_each_thing_that_moves_a_model() -> None:
    assert {*FLAGS, "no room", "waiting", "most waiting"} == PLACES.keys()
    up = {name for name, weight in PLACES.items() if weight < 0}
    assert up == {"loaded", "purpose"}
    assert 1 < -PLACES["loaded"] < 2, "it goes one place up"
    assert -PLACES["purpose"] < 1
