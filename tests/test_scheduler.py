"""Who goes next: each rule as a table, then all of them against a slow and plain model."""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Callable

import pytest

import llmq
from llmq import Backend, Client, Fleet, Mode, Priority, Scheduler, Ticket, TicketState, Want

HIGH, NORMAL, LOW = Priority
INTERVAL = 10.0
ILLEGAL = (RuntimeError, KeyError)  # what an illegal move raises


class Box:
    """A scheduler with its fleet, and short words for what tests do to them."""

    def __init__(self, fleet: Fleet | None = None, **limits: Any) -> None:
        self.fleet = fleet or Fleet()
        self.queue = Scheduler(self.fleet, llmq.Settings(queue=llmq.QueueSettings(**limits)))
        self.clients: dict[str, Client] = {}
        self.numbers = count()

    def add(
        self, name: str, *models: str, device: str = "", slots: int = 0, shared: int = 1
    ) -> Backend:
        """A backend that is up with these models; one without models was never asked."""
        settings = llmq.BackendSettings(url=f"http://{name}:1", slots=slots)
        backend = self.fleet.add(name, settings, device or name, shared)
        if models:
            self.told(backend, *models)
        return backend

    def told(self, backend: Backend, *models: str, loaded: tuple[str, ...] = ()) -> None:
        backend.succeeded(0.0, llmq.Report("openai", (), models, loaded, 0.0), INTERVAL)

    def down(self, backend: Backend, now: float) -> None:
        backend.failed(now, "refused", INTERVAL, refused=True)

    def client(self, name: str) -> Client:
        return self.clients.setdefault(name, Client(name))

    def ticket(
        self, priority: Priority = NORMAL, *, client: str = "c", model: str = "m", size: int = 0
    ) -> Ticket:
        ident = f"t{next(self.numbers)}"
        return Ticket(ident, self.client(client), Want(model), priority, size)

    def submit(self, priority: Priority = NORMAL, *, now: float = 0.0, **what: Any) -> Ticket:
        ticket = self.ticket(priority, **what)
        self.queue.submit(ticket, now)
        return ticket

    def started(self, now: float = 0.0) -> list[Ticket]:
        return [ticket for ticket, _ in self.queue.dispatch(now)]

    def run_dry(self, now: float = 0.0) -> list[Ticket]:
        """Let each run a second until nothing is left that can start; the order of the starts."""
        order = []
        while batch := self.started(now):
            order += batch
            now += 1.0
            for ticket in batch:
                self.queue.finish(ticket, now)
        return order


def one_slot(**limits: Any) -> Box:
    box = Box(**limits)
    box.add("a", "m")
    return box


# ---- The order


def test_an_empty_queue_starts_nothing() -> None:
    assert one_slot().queue.dispatch(0.0) == []
    assert Box().queue.dispatch(0.0) == []


def test_a_ticket_starts_at_once_where_there_is_room() -> None:
    box = one_slot()
    ticket = box.submit(now=1.0)
    assert ticket.state is TicketState.WAITING
    assert box.queue.dispatch(2.0) == [(ticket, box.fleet.backends["a"])]
    assert ticket.state is TicketState.RUNNING
    assert (ticket.arrived, ticket.started, ticket.attempts) == (1.0, 2.0, 1)


def test_first_come_first_served_for_one_client() -> None:
    box = one_slot()
    tickets = [box.submit() for _ in range(50)]
    assert box.run_dry() == tickets


def test_first_come_first_served_for_one_client_over_models() -> None:
    box = Box()
    box.add("a", "m", "n", "o")
    rng = random.Random(3)
    tickets = [box.submit(model=rng.choice("mno"), now=float(number)) for number in range(300)]
    assert box.run_dry() == tickets


def test_clients_take_turns_and_who_came_first_is_first_of_equals() -> None:
    """All run as long, so each turn has one of each, in the order of arrival."""
    box = Box()
    box.add("a", "m", "n", "o")
    rng = random.Random(3)
    tickets = [box.submit(client=rng.choice("xyz"), model=rng.choice("mno")) for _ in range(300)]
    assert box.run_dry() == by_turns(tickets)


def by_turns(tickets: list[Ticket]) -> list[Ticket]:
    """As they start in one slot if all came before the first start and run equally long."""
    turns: Counter[object] = Counter()
    places = {}
    for ticket in sorted(tickets, key=lambda one: one.number):
        places[ticket] = (ticket.priority, turns[ticket.client, ticket.priority], ticket.number)
        turns[ticket.client, ticket.priority] += 1
    return sorted(tickets, key=lambda one: places[one])


def test_a_higher_class_goes_before_a_lower_one() -> None:
    box = one_slot()
    tickets = [box.submit(Priority(number * 7 % 3)) for number in range(60)]
    assert box.run_dry() == sorted(tickets, key=lambda one: one.priority)


def test_an_urgent_one_interrupts_nothing_and_is_next() -> None:
    box = one_slot()
    running, _waiting = box.submit(LOW), box.submit(LOW)
    assert box.started() == [running]
    urgent = box.submit(HIGH)
    assert box.started() == []
    assert running.state is TicketState.RUNNING
    box.queue.finish(running, 1.0)
    assert box.started() == [urgent]


def test_a_pause_earns_no_credit_by_what_was_charged_in_vain_before() -> None:
    """Twenty that were refused at once were charged a minute each, for nothing, long ago."""
    box = Box()
    device = box.add("a", "m", shared=20).device
    box.client("x").service.add(60.0)
    failed = [box.submit(client="x") for _ in range(20)]
    assert box.started() == failed
    for ticket in failed:
        box.queue.finish(ticket, 0.0)
    device.slots, now = 1, 0.0

    def run_one() -> str:
        nonlocal now
        (ticket,) = box.started(now)
        now += 60.0
        box.queue.finish(ticket, now)
        return ticket.client.name

    for _ in range(50):
        box.submit(client="y", now=now)
        run_one()
    for _ in range(20):
        box.submit(client="x", now=now)
        box.submit(client="y", now=now)
    assert Counter(run_one() for _ in range(20))["x"] <= 11


def test_who_comes_late_is_not_before_all_because_a_device_is_busy_for_long() -> None:
    """One request has a slot for an hour; what the others had meanwhile counts all the same."""
    box = Box()
    box.add("a", "m")
    box.add("b", "m")
    box.submit(client="one for an hour")
    box.started()
    for number in range(60):
        box.submit(client="y", now=60.0 * number)
        (ticket,) = box.started(60.0 * number)
        box.queue.finish(ticket, 60.0 * (number + 1))
    for _ in range(10):
        box.submit(client="y", now=3600.0)
        box.submit(client="late", now=3600.0)
    names = []
    for number in range(60, 70):
        (ticket,) = box.started(60.0 * number)
        names.append(ticket.client.name)
        box.queue.finish(ticket, 60.0 * (number + 1))
    assert 4 <= names.count("y") <= 6


# ---- Slots


def test_one_slot_runs_one_at_a_time() -> None:
    box = one_slot()
    tickets = [box.submit(client=f"c{number}") for number in range(3)]
    for ticket in tickets:
        assert box.started() == [ticket]
        assert box.started() == []
        box.queue.finish(ticket, 0.0)


def test_all_slots_are_filled_at_once() -> None:
    box = Box()
    box.add("a", "m", shared=3)
    box.add("b", "m", shared=2, slots=1)
    tickets = [box.submit() for _ in range(9)]
    assert box.started() == tickets[:4]
    assert (box.fleet.backends["a"].busy, box.fleet.backends["b"].busy) == (3, 1)


def test_backends_on_one_device_run_one_together() -> None:
    box = Box()
    box.add("a", "m", device="gpu")
    box.add("b", "n", device="gpu")
    first, second = box.submit(model="m"), box.submit(model="n")
    assert box.started() == [first]
    box.queue.finish(first, 1.0)
    assert box.started() == [second]


@pytest.mark.parametrize("end", ["finish", "retry"])
def test_every_way_out_of_running_gives_the_slot_back_once(end: str) -> None:
    box = one_slot()
    backend = box.fleet.backends["a"]
    ticket = box.submit()
    box.started(1.0)
    assert (backend.busy, backend.device.busy, ticket.client.running) == (1, 1, 1)
    getattr(box.queue, end)(ticket, 4.0)
    assert (backend.busy, backend.device.busy, ticket.client.running) == (0, 0, 0)
    assert ticket.client.served == 3.0
    assert not box.queue.running


def test_a_lower_slot_count_cuts_nothing_that_runs() -> None:
    box = Box()
    backend = box.add("a", "m", shared=3)
    tickets = [box.submit() for _ in range(5)]
    assert box.started() == tickets[:3]
    backend.device.slots = 1
    for ticket in tickets[:2]:
        box.queue.finish(ticket, 0.0)
        assert box.started() == []
    box.queue.finish(tickets[2], 0.0)
    assert box.started() == [tickets[3]]


def test_a_device_is_never_overrun_when_its_backend_is_replaced_under_a_running_ticket() -> None:
    box = Box()
    box.add("a", "m", device="gpu")
    running, waiting = box.submit(), box.submit()
    assert box.started() == [running]
    box.fleet.remove("a", 1.0)
    box.add("a", "m", device="gpu")
    assert box.started() == [], "the device's one slot is still taken"
    box.queue.finish(running, 2.0)
    assert box.started() == [waiting]


def test_a_ticket_that_runs_where_its_backend_was_removed_ends_in_peace() -> None:
    box = one_slot()
    ticket = box.submit()
    box.started()
    box.fleet.remove("a", 1.0)
    box.queue.finish(ticket, 2.0)
    assert ticket.state is TicketState.ENDED
    assert ticket.client.running == 0


def test_the_backend_is_picked_by_the_rules() -> None:
    box = Box()
    cold, warm = box.add("cold", "m", shared=2), box.add("warm", "m", shared=2)
    box.told(warm, "m", loaded=("m",))
    for _ in range(5):
        box.submit()
    where = [backend for _, backend in box.queue.dispatch(0.0)]
    assert where == [warm, warm, cold, cold]


# ---- What cannot start holds up nobody


@pytest.mark.parametrize("why", ["down", "loading", "draining", "full", "never asked"])
def test_what_cannot_start_holds_up_nobody_else(why: str) -> None:
    box = Box()
    stuck = box.add("stuck", *(() if why == "never asked" else ("n",)))
    box.add("a", "m")
    if why == "down":
        box.down(stuck, 0.0)
    elif why == "loading":
        stuck.loads(0.0, "loading")
    elif why == "draining":
        stuck.draining = True
    elif why == "full":
        box.submit(model="n")
        box.started()
    held = [box.submit(HIGH, model="n"), box.submit(model="n", client="d")]
    free = [box.submit(LOW), box.submit(LOW, client="d")]
    assert box.run_dry() == free
    assert all(one.state is TicketState.WAITING for one in held)


def test_a_class_of_which_none_can_start_lets_the_next_one_go() -> None:
    box = Box()
    box.add("a", "m")
    box.down(box.add("b", "n"), 0.0)
    box.submit(HIGH, model="n")
    low = box.submit(LOW)
    assert box.started() == [low]


@pytest.mark.parametrize("client", ["c", "d"])
def test_a_ticket_that_waits_for_another_backend_holds_up_nobody_else(client: str) -> None:
    """One that failed at `a` waits for `b`; `a` is free, and others may use it."""
    box = Box()
    a, b = box.add("a", "m"), box.add("b", "m")
    first = box.submit()
    assert box.queue.dispatch(0.0) == [(first, a)]
    long = box.submit()
    assert box.queue.dispatch(0.0) == [(long, b)]
    box.queue.retry(first, 1.0)
    assert box.started(1.0) == []
    other = box.submit(client=client)
    assert box.queue.dispatch(1.0) == [(other, a)]
    box.queue.finish(long, 2.0)
    assert box.queue.dispatch(2.0) == [(first, b)]


def test_what_comes_up_again_serves_those_who_waited() -> None:
    box = one_slot()
    backend = box.fleet.backends["a"]
    box.down(backend, 0.0)
    ticket = box.submit()
    assert box.started() == []
    box.told(backend, "m")
    assert box.started() == [ticket]


# ---- Another attempt


def test_another_attempt_goes_before_all_that_its_client_sent_later() -> None:
    """What it ran in vain was served all the same: others who have had less go first."""
    box = one_slot()
    first, second, third = box.submit(now=1.0), box.submit(client="d", now=2.0), box.submit(now=3.0)
    assert box.started(4.0) == [first]
    box.queue.retry(first, 5.0)
    assert first.arrived == 1.0
    assert box.run_dry() == [second, first, third]
    assert first.attempts == 2


def test_another_attempt_of_what_did_not_run_goes_before_all_that_came_later() -> None:
    """Refused at once, it is charged anew what it has been charged before: nothing more."""
    box = one_slot()
    for client in "cd":  # both have run a second on average
        box.submit(client=client)
    box.run_dry()
    first, second = box.submit(), box.submit(client="d")
    assert box.started(2.0) == [first]
    box.queue.retry(first, 2.0)
    assert first.client.tags[NORMAL] + first.client.credits[NORMAL] == second.client.tags[NORMAL]


def test_several_come_back_to_their_places_by_arrival() -> None:
    box = Box()
    backend = box.add("a", "m", shared=4)
    tickets = [box.submit() for _ in range(8)]
    assert box.started() == tickets[:4]
    backend.device.slots = 1
    for index in (2, 0, 3, 1):
        box.queue.retry(tickets[index], 1.0)
    assert box.run_dry() == tickets


def test_another_attempt_avoids_the_backend_that_failed_while_another_can_serve() -> None:
    box = Box()
    a, b = box.add("a", "m"), box.add("b", "m")
    box.told(a, "m", loaded=("m",))
    ticket = box.submit()
    assert box.queue.dispatch(0.0) == [(ticket, a)]
    box.queue.retry(ticket, 1.0)
    assert box.queue.dispatch(1.0) == [(ticket, b)]


def test_another_attempt_goes_to_the_same_backend_when_it_is_alone() -> None:
    box = Box()
    a, b = box.add("a", "m"), box.add("b", "m")
    box.told(a, "m", loaded=("m",))
    ticket = box.submit()
    box.started()
    box.queue.retry(ticket, 1.0)
    box.down(b, 1.0)
    assert box.queue.dispatch(1.0) == [(ticket, a)]


# ---- Modes


def test_paused_starts_none_and_open_starts_them_again() -> None:
    box = one_slot()
    box.queue.mode = Mode.PAUSED
    tickets = [box.submit(LOW), box.submit(HIGH)]
    assert box.started() == []
    box.queue.mode = Mode.OPEN
    assert box.run_dry() == tickets[::-1]


def test_priority_starts_only_what_asked_for_high() -> None:
    box = one_slot()
    box.queue.mode = Mode.PRIORITY
    normal, low, high = box.submit(NORMAL), box.submit(LOW), box.submit(HIGH)
    assert box.run_dry() == [high]
    box.queue.mode = Mode.OPEN
    assert box.run_dry() == [normal, low]


def test_no_mode_touches_what_runs() -> None:
    box = one_slot()
    ticket = box.submit(LOW)
    box.started()
    for mode in (Mode.PAUSED, Mode.PRIORITY):
        box.queue.mode = mode
        assert box.started() == []
        assert ticket.state is TicketState.RUNNING
    box.queue.finish(ticket, 1.0)


# ---- Another class


def test_a_ticket_moved_to_another_class_stands_there_by_its_arrival() -> None:
    box = one_slot()
    early, moved, late = box.submit(HIGH), box.submit(LOW), box.submit(HIGH)
    other = box.submit(HIGH, client="d")
    box.queue.reprioritise(moved, HIGH)
    assert moved.priority is HIGH
    assert box.run_dry() == [early, other, moved, late], "they take turns"


def test_a_ticket_moved_away_and_back_keeps_its_place() -> None:
    box = one_slot()
    tickets = [box.submit() for _ in range(5)]
    for _ in range(3):
        box.queue.reprioritise(tickets[1], HIGH)
        box.queue.reprioritise(tickets[1], NORMAL)
        box.queue.reprioritise(tickets[0], LOW)
        box.queue.reprioritise(tickets[0], NORMAL)
    assert box.run_dry() == tickets


# ---- Legal and illegal moves


def in_state(box: Box, state: TicketState) -> Ticket:
    """A ticket that has come as far as `state`; the box has one slot."""
    if state is TicketState.NEW:
        return box.ticket()
    ticket = box.submit()
    if state is TicketState.WAITING:
        return ticket
    assert box.started() == [ticket]
    if state is TicketState.ENDED:
        box.queue.finish(ticket, 0.0)
    return ticket


MOVES: dict[str, Callable[[Scheduler, Ticket], object]] = {
    "submit": lambda queue, ticket: queue.submit(ticket, 1.0),
    "cancel": lambda queue, ticket: queue.cancel(ticket),
    "finish": lambda queue, ticket: queue.finish(ticket, 1.0),
    "retry": lambda queue, ticket: queue.retry(ticket, 1.0),
    "reprioritise": lambda queue, ticket: queue.reprioritise(ticket, HIGH),
}
LEGAL = {
    ("submit", TicketState.NEW),
    ("cancel", TicketState.WAITING),
    ("finish", TicketState.RUNNING),
    ("retry", TicketState.RUNNING),
    ("reprioritise", TicketState.WAITING),
}


def facts(box: Box, ticket: Ticket) -> object:
    client = ticket.client
    return (
        ticket.state, ticket.number, ticket.arrived, ticket.priority, ticket.attempts,
        dict(box.queue.waiting), dict(box.queue.running), box.queue.queued_bytes,
        client.waiting, client.running, client.queued_bytes,
        [(one.busy, one.device.busy) for one in box.fleet.backends.values()],
    )  # fmt: skip


@pytest.mark.parametrize("state", list(TicketState))
@pytest.mark.parametrize("move", list(MOVES))
def test_a_move_is_legal_or_raises_and_changes_nothing(move: str, state: TicketState) -> None:
    box = one_slot()
    ticket = in_state(box, state)
    if (move, state) in LEGAL:
        MOVES[move](box.queue, ticket)
        return
    before = facts(box, ticket)
    with pytest.raises(ILLEGAL):
        MOVES[move](box.queue, ticket)
    assert facts(box, ticket) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (TicketState.NEW, TicketState.ENDED),
        (TicketState.RUNNING, TicketState.RUNNING),
        (TicketState.ENDED, TicketState.WAITING),
        (TicketState.ENDED, TicketState.RUNNING),
        (TicketState.ENDED, TicketState.ENDED),
    ],
)
def test_a_ticket_itself_refuses_illegal_states(old: TicketState, new: TicketState) -> None:
    ticket = Box().ticket()
    ticket.state = old
    with pytest.raises(RuntimeError, match=ticket.id):
        ticket.move(new)
    assert ticket.state is old


# ---- Limits


def check_full(box: Box, **what: Any) -> None:
    """Submitting raises QueueFull, says when to come again, and leaves nothing behind."""
    ticket = box.ticket(**what)
    before = (len(box.queue.waiting), box.queue.queued_bytes, ticket.client.waiting)
    with pytest.raises(llmq.LlmqError) as caught:
        box.queue.submit(ticket, 0.0)
    assert (caught.value.code, caught.value.status) == ("queue_full", 429)
    assert caught.value.retry_after in range(1, 61)
    assert (len(box.queue.waiting), box.queue.queued_bytes, ticket.client.waiting) == before


def test_the_queue_has_a_depth() -> None:
    box = Box(max_depth=10)
    tickets = [box.submit(client=f"c{number}") for number in range(10)]
    check_full(box, client="late")
    box.queue.cancel(tickets[3])
    box.submit(client="late")
    check_full(box, client="later")


def test_what_runs_takes_no_place_in_the_queue() -> None:
    box = one_slot(max_depth=2)
    box.submit(client="x")
    box.started()
    box.submit(client="y")
    box.submit(client="z")
    check_full(box)


def test_one_client_has_half_the_queue() -> None:
    box = Box(max_depth=10)
    for _ in range(5):
        box.submit(client="greedy")
    check_full(box, client="greedy")
    for _ in range(5):
        box.submit(client="other")


def test_a_queue_of_one_serves_anyone() -> None:
    box = Box(max_depth=1)
    box.submit()
    check_full(box)


def test_the_queue_has_a_size() -> None:
    box = Box(max_queued_bytes=1000)
    first = box.submit(client="x", size=400)
    box.submit(client="y", size=500)
    box.submit(client="z", size=100)
    check_full(box, client="z", size=1)
    box.submit(client="z", size=0)
    box.queue.cancel(first)
    box.submit(client="z", size=400)


def test_one_client_has_half_the_memory() -> None:
    box = Box(max_queued_bytes=1000)
    box.submit(client="greedy", size=400)
    check_full(box, client="greedy", size=101)
    box.submit(client="greedy", size=100)
    check_full(box, client="greedy", size=1)
    box.submit(client="other", size=500)


def test_a_foreign_page_has_sixteen_waiting() -> None:
    box = Box()
    for _ in range(16):
        page = box.ticket(client="app:https://page.example")
        page.foreign = True
        box.queue.submit(page, 0.0)
    late = box.ticket(client="app:https://page.example")
    late.foreign = True
    with pytest.raises(llmq.LlmqError) as caught:
        box.queue.submit(late, 0.0)
    assert caught.value.retry_after in range(1, 61)
    other = box.ticket(client="app:https://other.example")
    other.foreign = True
    box.queue.submit(other, 0.0)
    for _ in range(20):
        box.submit(client="app:curl")
    box.queue.cancel(page)
    box.queue.submit(late, 0.0)


def test_no_limit_stands_in_the_way_of_another_attempt_or_class() -> None:
    box = one_slot(max_depth=2, max_queued_bytes=100)
    first = box.submit(client="x", size=50)
    box.started()
    second = box.submit(client="y", size=50)
    box.submit(client="z", size=50)
    box.queue.retry(first, 1.0)
    box.queue.reprioritise(second, HIGH)
    assert len(box.queue.waiting) == 3
    check_full(box, client="w")


@pytest.mark.parametrize(
    ("waiting", "seconds", "slots", "expected"),
    [
        (0, None, 1, 1),
        (0, 10.0, 1, 10),
        (5, 2.0, 1, 10),
        (5, 2.0, 5, 2),
        (9, 0.001, 1, 1),
        (100, 30.0, 1, 60),
        (0, 1e9, 1, 60),
    ],
)
def test_the_predicted_wait_is_one_to_sixty_seconds(
    waiting: int, seconds: float | None, slots: int, expected: int
) -> None:
    box = Box()
    box.add("a", "m", shared=slots)
    if seconds is not None:
        box.queue.service.add(seconds)
    for _ in range(waiting):
        box.submit()
    assert box.queue.predicted_wait(box.ticket()) == expected


def test_a_wait_is_predicted_without_a_backend_too() -> None:
    box = Box()
    assert box.queue.predicted_wait(box.ticket()) in range(1, 61)


def test_the_wait_is_predicted_by_model_and_what_runs_as_those_who_wait_are_told() -> None:
    """Retry-After is for the model that was asked for: loads and long ones of others apart."""
    box = Box(max_depth_low=1)
    box.add("a", "slow")
    box.add("b", "fast")
    for _ in range(9):
        box.queue.note_service("fast", 0.1, "b")
    box.queue.note_service("slow", 40.0, "a")
    for model in ("slow", "fast"):
        box.submit(model=model)
    box.started()
    box.submit(LOW, model="slow")
    told = llmq.forecast(box.queue, 0.0)
    assert list(told.etas.values()) == [40.0]
    with pytest.raises(llmq.LlmqError) as full:
        box.submit(LOW, model="slow")
    assert (full.value.retry_after or 0) >= 20, "it comes after one that starts in 40 s"


# ---- Waiting too long


def expired(box: Box, now: float) -> dict[Ticket, str]:
    result = box.queue.expire(now)
    assert len({ticket.id for ticket, _ in result}) == len(result), "each ends once"
    assert all(ticket.state is TicketState.ENDED for ticket, _ in result)
    return {ticket: error.code for ticket, error in result}


def test_each_class_waits_as_long_as_it_may() -> None:
    box = one_slot(max_wait_high=5.0, max_wait_normal=10.0)
    running = box.submit(HIGH, now=0.0)
    box.started()
    high, normal, low = (box.submit(one, now=100.0) for one in Priority)
    assert expired(box, 104.99) == {}
    assert expired(box, 105.0) == {high: "wait_timeout"}
    assert expired(box, 109.99) == {}
    assert expired(box, 110.0) == {normal: "wait_timeout"}
    assert expired(box, 1e9) == {}
    assert low.state is TicketState.WAITING
    assert running.state is TicketState.RUNNING, "what runs has waited enough"


def test_a_wait_that_was_too_long_is_not_to_be_tried_again() -> None:
    box = one_slot(max_wait_normal=1.0)
    box.submit()
    ((_, error),) = box.queue.expire(2.0)
    assert (error.status, error.should_retry) == (503, False)


def test_ended_tickets_do_not_expire() -> None:
    box = one_slot(max_wait_normal=1.0)
    first, second = box.submit(), box.submit()
    assert box.started() == [first]
    box.queue.finish(first, 0.5)
    box.queue.cancel(second)
    assert expired(box, 10.0) == {}


def test_a_ticket_that_waits_for_another_attempt_has_its_limit_still() -> None:
    box = one_slot(max_wait_normal=10.0)
    ticket = box.submit(now=0.0)
    box.started(1.0)
    box.queue.retry(ticket, 2.0)
    assert expired(box, 9.0) == {}
    assert expired(box, 10.0) == {ticket: "wait_timeout"}


def test_a_limit_that_passed_while_it_ran_holds_when_it_waits_again() -> None:
    box = one_slot(max_wait_normal=10.0)
    ticket = box.submit(now=0.0)
    box.started(1.0)
    assert expired(box, 20.0) == {}
    box.queue.retry(ticket, 21.0)
    assert expired(box, 21.0) == {ticket: "wait_timeout"}


def test_a_crowd_that_came_and_left_takes_nobodys_limit_along() -> None:
    box = one_slot(max_wait_normal=10.0)
    ticket = box.submit(now=0.0)
    box.started(0.0)
    for _ in range(300):
        box.queue.cancel(box.submit(now=1.0))
    box.queue.retry(ticket, 2.0)
    assert expired(box, 10.0) == {ticket: "wait_timeout"}


def test_the_limit_is_that_of_the_class_it_is_in() -> None:
    box = one_slot(max_wait_low=5.0, max_wait_normal=20.0)
    freed, hurried, slowed = box.submit(LOW), box.submit(NORMAL), box.submit(LOW)
    box.queue.reprioritise(freed, HIGH)
    box.queue.reprioritise(hurried, LOW)
    box.queue.reprioritise(slowed, NORMAL)
    assert expired(box, 5.0) == {hurried: "wait_timeout"}
    assert expired(box, 20.0) == {slowed: "wait_timeout"}
    assert expired(box, 1e9) == {}


def test_a_model_whose_backends_are_down_is_waited_for_from_the_later_of_both() -> None:
    box = Box(down_wait=60.0)
    a, b = box.add("a", "m"), box.add("b", "m")
    early = box.submit(now=0.0)
    box.down(a, 10.0)
    assert expired(box, 1000.0) == {}, "b is up, if busy"
    box.down(b, 1000.0)
    late = box.submit(now=1030.0)
    assert expired(box, 1059.9) == {}
    assert expired(box, 1060.0) == {early: "backend_down"}
    assert expired(box, 1089.9) == {}
    assert expired(box, 1090.0) == {late: "backend_down"}


def test_a_backend_that_comes_up_or_loads_ends_the_count() -> None:
    box = Box(down_wait=60.0)
    backend = box.add("a", "m")
    box.down(backend, 0.0)
    ticket = box.submit(now=0.0)
    backend.loads(50.0, "loading")
    assert expired(box, 500.0) == {}
    backend.failed(500.0, "refused", INTERVAL, refused=True)
    assert expired(box, 559.0) == {}
    assert expired(box, 560.0) == {ticket: "backend_down"}


def test_only_those_who_want_the_model_that_is_down_are_told() -> None:
    box = Box(down_wait=60.0)
    box.add("a", "m")
    box.down(box.add("b", "n"), 0.0)
    fine, stuck = box.submit(model="m"), box.submit(HIGH, model="n")
    assert expired(box, 60.0) == {stuck: "backend_down"}
    assert box.started() == [fine]


def test_without_any_backend_a_ticket_waits_down_wait() -> None:
    box = Box(down_wait=60.0)
    ticket = box.submit(now=5.0)
    assert expired(box, 64.9) == {}
    assert expired(box, 65.0) == {ticket: "backend_down"}


def test_a_model_is_judged_again_when_its_only_backend_is_removed() -> None:
    box = Box(down_wait=60.0)
    box.add("a", "m")
    box.add("b", "n")
    box.queue.mode = Mode.PAUSED
    ticket, other = box.submit(model="m", now=0.0), box.submit(model="n", now=0.0)
    assert expired(box, 1.0) == {}
    box.fleet.remove("a", 2.0)
    assert expired(box, 2.0) == {ticket: "model_not_found"}
    assert other.state is TicketState.WAITING


def test_a_model_is_judged_again_when_the_last_backend_tells_its_list() -> None:
    box = Box(down_wait=60.0)
    box.add("a", "n")
    late = box.add("late")
    ticket = box.submit(model="m", now=0.0)
    assert expired(box, 1000.0) == {}, "the other one may have it"
    box.told(late, "x")
    assert expired(box, 1000.0) == {ticket: "model_not_found"}


def test_a_model_that_was_deleted_is_gone() -> None:
    box = one_slot()
    box.queue.mode = Mode.PAUSED
    ticket = box.submit(model="m")
    box.told(box.fleet.backends["a"], "n")
    assert expired(box, 0.0) == {ticket: "model_not_found"}


# ---- What the outside may know


def test_positions_are_by_class_and_arrival() -> None:
    box = one_slot()
    low, normal, high, second = (box.submit(one) for one in (LOW, NORMAL, HIGH, NORMAL))
    assert box.queue.in_order() == [high, normal, second, low]
    positions = {
        ident: position for ident, (position, _) in llmq.forecast(box.queue, 0.0).places.items()
    }
    assert positions == {high.id: 1, normal.id: 2, second.id: 3, low.id: 4}


def test_expected_waits_follow_the_slots_of_the_device() -> None:
    box = Box()
    box.add("a", "m", shared=2)
    box.add("b", "n")
    box.queue.note_service("m", 10.0, "a")
    box.queue.note_service("n", 4.0, "b")
    tickets = [box.submit(model=model) for model in "mnmnm"]
    assert [eta_of(box, one) for one in tickets] == [0.0, 0.0, 0.0, 4.0, 10.0]


def eta_of(box: Box, ticket: Ticket, now: float = 0.0) -> float | None:
    return llmq.forecast(box.queue, now)[ticket.id][1]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (4.0, (6.0, 9.0)),
        (9.0, (2.5, 5.5)),
        (20.0, (2.5, 5.5)),
        (20.5, (None, None)),
    ],
    ids=["it has run for a while", "it ends soon", "it is late", "it is twice as late"],
)
def test_expected_waits_are_by_model_and_less_what_runs_has_run_already(
    now: float, expected: tuple[float | None, float | None]
) -> None:
    box = Box()
    box.add("a", "m", "n")
    box.queue.note_service("m", 10.0, "a")
    box.queue.note_service("n", 3.0, "a")
    box.submit(model="m")
    box.started(0.0)
    second, third = box.submit(model="n"), box.submit(model="m")
    assert (eta_of(box, second, now), eta_of(box, third, now)) == expected


def test_expected_wait_is_not_known_behind_a_model_that_was_never_measured() -> None:
    box = Box()
    box.add("a", "m", "n")
    box.add("b", "o")
    box.queue.note_service("m", 10.0, "a")
    box.queue.note_service("o", 2.0, "b")
    tickets = [box.submit(model=model) for model in "mnmoo"]
    assert [eta_of(box, one) for one in tickets] == [0.0, 10.0, None, 0.0, 2.0]
    box.started()
    assert [eta_of(box, one) for one in tickets[1:3]] == [10.0, None]
    box.queue.note_service("n", 1.0, "b")
    assert eta_of(box, tickets[2]) is None, "it was measured elsewhere"
    box.queue.note_service("n", 1.0, "a")
    assert [eta_of(box, one) for one in tickets[1:3]] == [10.0, 11.0]
    assert box.queue.service_of("n", "a") == 1.0
    assert box.queue.service_of("never", "a") is None


def loading_one(slots: int = 1, **limits: Any) -> tuple[Box, Backend]:
    """A runner that loads what it is asked for: m in 4 s, n in 20 s; each request runs 2 s."""
    box = Box(**limits)
    backend = box.add("a", device="gpu", shared=slots)
    news = llmq.Report("ollama", (), ("m", "n", "o"), (), 0.0)
    backend.succeeded(0.0, news, INTERVAL)
    for model, load in (("n", 20.0), ("m", 4.0)):
        box.queue.note_service(model, 2.0, "gpu")
        loader = box.submit(model=model, now=-30.0)
        box.started(-30.0)
        backend.loaded_now(model, load - 30.0)
        box.queue.finish(loader, 2.0 + load - 30.0)
    return box, backend


@pytest.mark.parametrize(
    ("affinity", "expected"), [(30.0, [0.0, 6.0, 2.0, 4.0]), (0.0, [0.0, 2.0, 24.0, 30.0])]
)
def test_expected_waits_know_what_each_model_takes_to_load(
    affinity: float, expected: list[float]
) -> None:
    box, _ = loading_one(affinity=affinity)
    tickets = [box.submit(model=model) for model in "mnmm"]
    assert [eta_of(box, one) for one in tickets] == expected


def passed_over(box: Box, priority: Priority = NORMAL) -> Ticket:
    """One that waits for n since 0.0 and was passed over then for one of m, which runs."""
    waits = box.submit(priority, model="n", client="y")
    box.submit(priority, client="z")
    assert [one.model for one in box.started()] == ["m"]
    return waits


def test_who_was_passed_over_is_told_how_long_a_model_stays() -> None:
    """Not only of those who wait for it now: they come back."""
    box, backend = loading_one()
    waits = passed_over(box)
    assert eta_of(box, waits, 1.0) == 1.0, "nothing is known yet of who comes back"
    box.queue.finish(next(iter(box.queue.running.values())), 2.0)
    for now in range(2, 30, 2):
        box.submit(client="z", now=float(now))
        (runs,) = box.started(float(now))
        box.queue.finish(runs, now + 2.0)
    assert box.started(30.0) == [waits]
    assert backend.stayed.value == 30.0
    backend.loaded_now("n", 50.0)
    box.queue.finish(waits, 52.0)
    box.submit(model="m", now=52.0)
    ((loader, _),) = box.queue.dispatch(52.0)
    backend.loaded_now("m", 56.0)
    box.queue.finish(loader, 58.0)
    later = box.submit(model="n", client="y", now=58.0)
    box.submit(client="z", now=58.0)
    assert box.started(58.0) != [later]
    assert eta_of(box, later, 60.0) == 28.0


@pytest.mark.parametrize(("affinity", "expected"), [(30.0, 19.0), (12.0, 11.0)])
def test_a_model_stays_no_longer_than_it_may(affinity: float, expected: float) -> None:
    box, backend = loading_one(affinity=affinity)
    backend.stayed.add(20.0)
    assert eta_of(box, passed_over(box), 1.0) == expected


def test_who_is_more_urgent_than_those_passed_over_is_told_its_own_wait() -> None:
    box, backend = loading_one()
    backend.stayed.add(20.0)
    passed_over(box)
    urgent = box.submit(HIGH, model="n", client="x")
    assert eta_of(box, urgent, 1.0) == 1.0


def test_a_stay_that_has_begun_is_not_told_as_if_it_began_now() -> None:
    box, _ = loading_one()
    waits = passed_over(box)
    behind = [box.submit(client="z") for _ in range(20)]
    told = [eta_of(box, one, 1.0) for one in (*behind, waits)]
    assert told[:14] == [1.0 + 2.0 * number for number in range(14)]
    assert told[-1] == 29.0
    assert told[14] == 29.0 + 22.0, "after the load of n and its request"


def test_who_waits_for_a_load_is_told_when_it_ends() -> None:
    box, backend = loading_one()
    box.submit(model="n")
    assert box.started()
    waiting = [box.submit(model=model) for model in "nm"]
    for now, left in ((0.0, 22.0), (15.0, 7.0), (22.0, 5.5), (44.5, None)):
        later = None if left is None else left + 2.0
        assert [eta_of(box, one, now) for one in waiting] == [left, later]
        assert reason_of(box, waiting[0]) == "model is loading"
    backend.loaded_now("n", 20.0)
    assert eta_of(box, waiting[0], 21.0) == 1.0, "the load is no part of what it mostly takes"


def test_others_start_beside_a_load_and_who_waits_for_it_starts_after_it() -> None:
    box, _ = loading_one(slots=2)
    box.submit(model="n")
    box.started()
    box.fleet.backends["a"].loaded |= {"m"}
    waiting = [box.submit(model=model) for model in "nm"]
    assert [eta_of(box, one) for one in waiting] == [20.0, 0.0]
    assert eta_of(box, waiting[0], 15.0) == 5.0


def test_nobody_is_told_when_a_first_load_ends() -> None:
    box = Box()
    backend = box.add("a", device="gpu", shared=2)
    backend.succeeded(0.0, llmq.Report("ollama", (), ("m", "n"), ("n",), 0.0), INTERVAL)
    for model in "mn":
        box.queue.note_service(model, 2.0, "gpu")
    box.submit(model="m")
    box.started()
    waiting = [box.submit(model=model) for model in "mn"]
    assert [eta_of(box, one) for one in waiting] == [None, 0.0]


def test_a_slot_whose_request_is_late_is_one_of_the_slots() -> None:
    """Else those who wait for two slots would be told of one."""
    box = Box()
    box.add("a", "m", shared=2)
    box.queue.note_service("m", 4.0, "a")
    box.submit()
    box.started()
    box.submit(now=5.0)
    box.started(5.0)
    waiting = [box.submit(now=5.0) for _ in range(3)]
    assert [eta_of(box, one, 5.0) for one in waiting] == [1.0, 4.0, 5.0]


def test_expected_wait_is_not_known_behind_one_that_runs_and_was_never_measured() -> None:
    box = one_slot()
    box.submit()
    box.started()
    late = box.submit()
    assert eta_of(box, late, 50.0) is None


def test_who_is_held_back_is_told_no_time() -> None:
    box = Box()
    box.add("a", "m")
    down, loading = box.add("b", "n"), box.add("c", "o")
    for model, device in zip("mno", "abc"):
        box.queue.note_service(model, 5.0, device)
    box.down(down, 0.0)
    loading.loads(0.0, "loading")
    tickets = [box.submit(model=model) for model in "mno"]
    assert [eta_of(box, one) for one in tickets] == [0.0, None, None]
    high = box.submit(HIGH)
    box.queue.mode = Mode.PRIORITY
    assert [eta_of(box, one) for one in (high, *tickets)] == [0.0, None, None, None]
    box.queue.mode = Mode.PAUSED
    assert [eta_of(box, one) for one in (high, *tickets)] == [None] * 4


def test_times_of_so_many_models_are_remembered_and_no_more() -> None:
    box, most = one_slot(), llmq.MODELS_MEASURED
    for number in range(most + 100):
        box.queue.note_service(f"m{number}", 1.0, "a")
    assert len(box.queue.services) == most
    assert box.queue.service_of(f"m{most - 1}", "a") == 1.0
    assert box.queue.service_of(f"m{most}", "a") is None


def reason_of(box: Box, ticket: Ticket) -> str:
    return llmq.forecast(box.queue, 0.0)[ticket.id][2]


def test_each_waiting_ticket_has_its_reason() -> None:
    box = Box()
    box.add("a", "m", device="gpu", shared=2)
    down, loading = box.add("b", "n"), box.add("c", "o")
    box.down(down, 0.0)
    loading.loads(0.0, "loading")
    waiting = [box.submit(model=model) for model in "mno"]
    assert [reason_of(box, one) for one in waiting] == [
        "next",
        "b is down, waited for 60 s",
        "model is loading",
    ]
    box.submit()
    box.started()
    late = box.submit()
    assert reason_of(box, late) == "gpu busy (2/2): c, m"


def test_the_mode_is_a_reason() -> None:
    box = one_slot()
    high, low = box.submit(HIGH), box.submit(LOW)
    box.queue.mode = Mode.PAUSED
    assert [reason_of(box, one) for one in (high, low)] == ["paused", "paused"]
    box.queue.mode = Mode.PRIORITY
    assert reason_of(box, high) == "next"
    assert "priority" in reason_of(box, low)


def test_a_ticket_that_waits_for_a_backends_own_slots_is_not_told_that_it_is_next() -> None:
    box = Box()
    box.add("a", "m", device="gpu", slots=1, shared=4)
    box.submit()
    box.started()
    late = box.submit()
    assert box.started() == []
    assert "busy" in reason_of(box, late)


def test_what_runs_is_not_forecast() -> None:
    box = one_slot()
    box.submit()
    box.started()
    assert not llmq.forecast(box.queue, 0.0).order
    assert box.queue.in_order() == []


# ---- Routes: who can be asked where

CHAT, NATIVE_CHAT = "/v1/chat/completions", "/api/chat"


def lack(backend: Backend, route: str, status: int = 404, model: str = "m") -> None:
    answer = llmq.BackendAnswer(status, "no such route here", b"", None, None)
    backend.route_unsupported(route, model, llmq.RouteUnsupported(answer))


def routed(box: Box, *routes: str, now: float = 0.0, **what: Any) -> Ticket:
    ticket = box.ticket(**what)
    ticket.want = ticket.want._replace(routes=routes)
    box.queue.submit(ticket, now)
    return ticket


def test_a_ticket_starts_where_its_route_is_spoken() -> None:
    box = Box()
    a, b = box.add("a", "m"), box.add("b", "m")
    lack(a, CHAT)
    first, second = routed(box, CHAT), routed(box, CHAT)
    assert box.queue.dispatch(0.0) == [(first, b)]
    other = routed(box, "/v1/completions")
    assert box.queue.dispatch(0.0) == [(other, a)], "it holds up nobody else"
    box.queue.finish(first, 1.0)
    assert box.queue.dispatch(1.0) == [(second, b)]


def test_a_route_that_stands_in_is_as_good_for_the_queue() -> None:
    box = Box()
    a = box.add("a", "m")
    lack(a, CHAT)
    ticket = routed(box, CHAT, "/v1/completions")
    assert box.queue.dispatch(0.0) == [(ticket, a)]


def test_moving_on_from_a_lack_is_no_attempt_and_avoids_nobody() -> None:
    box = Box()
    a, b = box.add("a", "m"), box.add("b", "m")
    b.used = 1.0
    ticket = routed(box, CHAT)
    later = routed(box, CHAT, now=1.0)
    assert dict(box.queue.dispatch(1.0))[ticket] is a
    lack(a, CHAT)
    box.queue.retry(ticket, 2.0, counted=False)
    assert (ticket.attempts, ticket.want.avoid, ticket.arrived) == (0, None, 0.0)
    box.queue.finish(later, 3.0)
    assert box.queue.dispatch(3.0) == [(ticket, b)]
    assert ticket.attempts == 1


def test_groups_of_other_routes_keep_the_order_of_arrival() -> None:
    box = one_slot()
    rng = random.Random(5)
    routes = [(CHAT,), ("/v1/completions",), (CHAT, NATIVE_CHAT), ()]
    tickets = [routed(box, *rng.choice(routes), client=rng.choice("xyz")) for _ in range(200)]
    assert box.run_dry() == by_turns(tickets)


def test_a_ticket_that_nobody_is_left_for_is_told_in_the_words_of_the_last() -> None:
    box = Box()
    a = box.add("a", "m", "n")
    busy, ticket, other = routed(box, CHAT), routed(box, CHAT), routed(box, CHAT, model="n")
    box.started()
    assert expired(box, 1.0) == {}
    lack(a, CHAT, status=501)
    ((told, error),) = box.queue.expire(2.0)
    assert (told, type(error), error.status) == (ticket, llmq.Untranslatable, 501)
    assert error.message == "no such route here"
    box.queue.finish(busy, 3.0)
    assert box.started() == [other]


def test_a_ticket_whose_only_speaker_is_down_waits_for_it() -> None:
    box = Box(down_wait=60.0)
    a, b = box.add("a", "m"), box.add("b", "m")
    lack(a, CHAT)
    box.down(b, 5.0)
    ticket = routed(box, CHAT, now=10.0)
    assert box.started(10.0) == []
    assert expired(box, 69.0) == {}
    assert expired(box, 70.0) == {ticket: "backend_down"}


def test_work_of_a_model_is_counted_at_its_backend() -> None:
    box = Box()
    a = box.add("a", "m", "n", shared=3)
    m, n, again = box.submit(), box.submit(model="n"), box.submit()
    box.started()
    assert a.at_work == {"m": 2, "n": 1}
    box.queue.finish(n, 1.0)
    box.queue.retry(m, 1.0)
    assert a.at_work == {"m": 1}
    box.queue.finish(again, 1.0)
    assert not any(a.at_work.values())


def test_a_ticket_whose_only_backend_was_taken_out_waits_for_it_as_for_one_that_is_down() -> None:
    """Others have its model, but it may go to that one only."""
    box = Box(down_wait=60.0)
    box.add("a", "m")
    box.add("b", "m")
    ticket = box.ticket()
    ticket.want = ticket.want._replace(backend="b")
    box.queue.mode = Mode.PAUSED
    box.queue.submit(ticket, 0.0)
    assert expired(box, 5.0) == {}
    box.fleet.remove("b", 10.0)
    assert expired(box, 69.0) == {}
    assert expired(box, 70.0) == {ticket: "backend_down"}


def test_a_claim_is_over_when_who_made_it_has_left() -> None:
    """Else the next would start elsewhere, where its model is not loaded."""
    box = Box()
    a, b = box.add("a", "m", "n", shared=2), box.add("b", "m")
    box.told(a, "m", "n", loaded=("m",))
    box.fleet.model_settings = {"n": llmq.ModelSettings(exclusive=True)}
    running, alone = box.submit(), box.submit(model="n")
    assert box.started() == [running]
    box.queue.cancel(alone)
    box.queue.finish(running, 1.0)
    assert box.queue.start(box.ticket(), 1.0) is a
    assert b.busy == 0


# ---- What it costs: counted, not timed


class CountingFleet(Fleet):
    """Counts how often the scheduler asks who could serve."""

    asked = 0

    def candidates(self, want: Want, *, urgent: bool = False) -> list[Backend]:
        self.asked += 1
        return super().candidates(want, urgent=urgent)


class CountingTicket(Ticket):
    """Counts how often anybody looks at any ticket."""

    __slots__ = ()
    looks = 0

    def __getattribute__(self, name: str) -> Any:
        CountingTicket.looks += 1
        return super().__getattribute__(name)


class CountingBox(Box):
    def __init__(self) -> None:
        super().__init__(CountingFleet(), max_depth=50_000, max_wait_normal=1e6)

    def ticket(self, priority: Priority = NORMAL, **what: Any) -> Ticket:
        client, model = self.client(what.get("client", "c")), what.get("model", "m")
        return CountingTicket(f"t{next(self.numbers)}", client, Want(model), priority)

    def cost(self, work: Callable[[], object]) -> tuple[int, int]:
        """Looks at tickets, and questions to the fleet, that some work takes."""
        looks, asked = CountingTicket.looks, self.fleet.asked
        work()
        return CountingTicket.looks - looks, self.fleet.asked - asked


def crowded(depth: int, clients: int) -> CountingBox:
    """One runs, `depth` wait."""
    box = CountingBox()
    box.add("a", "m", "n")
    box.submit(client="c0")
    box.started()
    for number in range(depth):
        box.submit(client=f"c{number % clients}", model="mn"[number % 2])
    return box


def turn(box: Box) -> None:
    """One ends, one comes, one starts."""
    (running,) = box.queue.running.values()
    box.queue.finish(running, 0.0)
    box.submit(client="c0")
    assert len(box.started()) == 1


@pytest.mark.parametrize("clients", [1, 50])
def test_a_turn_costs_the_same_at_any_depth(clients: int) -> None:
    costs = set()
    for depth in (100, 5000):
        box = crowded(depth, clients)
        turn(box)
        costs.add(box.cost(lambda box=box: [turn(box) for _ in range(40)]))
    assert len(costs) == 1


@pytest.mark.parametrize("what", ["cancel", "submit", "dispatch"])
def test_a_step_costs_the_same_at_any_depth(what: str) -> None:
    costs = set()
    for depth in (100, 5000):
        box = crowded(depth, 10)
        ticket = list(box.queue.waiting.values())[depth // 2]
        steps: dict[str, Callable[[], object]] = {
            "cancel": lambda box=box, ticket=ticket: box.queue.cancel(ticket),
            "submit": lambda box=box: box.submit(),
            "dispatch": lambda box=box: box.started(),
        }
        costs.add(box.cost(steps[what]))
    assert len(costs) == 1


def test_a_full_box_is_not_asked_about_at_all() -> None:
    box = crowded(1000, 10)
    assert box.cost(box.started) == (0, 0)


def test_a_thousand_models_that_are_down_are_swept_in_one_pass() -> None:
    """Names of models come from clients: a backend that never told may have any."""
    box = CountingBox()
    box.down(box.add("a"), 0.0)
    for number in range(1000):
        box.submit(model=f"m{number}")
    looks, _ = box.cost(lambda: box.queue.expire(1.0))
    assert looks <= 20 * 1000
    looks, _ = box.cost(lambda: box.queue.expire(1000.0))
    assert looks <= 100 * 1000
    assert not box.queue.waiting


@pytest.mark.parametrize("what", ["forecast", "in_order", "expire"])
def test_what_looks_at_all_that_wait_is_one_pass(what: str) -> None:
    box = crowded(1000, 10)
    works = {"forecast": lambda: llmq.forecast(box.queue, 0.0), "in_order": box.queue.in_order}
    looks, _ = box.cost(works.get(what, lambda: box.queue.expire(1.0)))
    assert looks <= 20 * 1000


@pytest.mark.parametrize("models", [1, 2000])
def test_a_forecast_costs_no_more_for_many_models_than_for_many_requests(models: int) -> None:
    """Each of the lines that want the same is looked at a few times, not once for every start."""
    box = Box(max_depth=50_000)
    box.add("a", *[f"m{number}" for number in range(models)])
    box.submit(client="runs", model="m0")
    box.started()
    for number in range(2000):
        box.queue.note_service(f"m{number % models}", 1.0, "a")
        box.submit(client=f"c{number % 50}", model=f"m{number % models}")
    forecast = llmq.forecast(box.queue, 0.0)
    assert len(forecast.etas) == 2000
    assert calls_of(lambda: llmq.forecast(box.queue, 0.0)) <= 150 * 2000


def invented(names: int) -> Box:
    """As many wait for models that only a backend which never told might have; `a` has a slot."""
    box = Box(max_depth=50_000)
    box.down(box.add("silent"), 0.0)
    box.add("a", "m")
    for number in range(names):
        box.submit(model=f"no{number}", client=f"c{number % 100}")
    return box


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, ours and built-in ones."""
    calls = 0

    def count_one(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count_one)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def one_goes_through(box: Box) -> None:
    """A request for a real model comes, starts at once, and ends."""
    ticket = box.submit(now=1.0)
    assert box.started(1.0) == [ticket]
    box.queue.finish(ticket, 2.0)
    assert box.started(2.0) == []


def one_more_comes(box: Box) -> None:
    box.submit(model="nobody has it", now=1.0)
    assert box.started(1.0) == []


def one_of_a_capped_client_goes_through(box: Box) -> None:
    box.client("c").settings = llmq.ClientSettings(max_concurrent=2)
    one_goes_through(box)


@pytest.mark.parametrize(
    "step", [one_goes_through, one_more_comes, one_of_a_capped_client_goes_through]
)
def test_names_of_models_that_were_invented_cost_others_nothing(step: Any) -> None:
    calls = []
    for names in (50, 5000):
        box = invented(names)
        step(box)
        calls.append(calls_of(lambda box=box: [step(box) for _ in range(5)]))
    few, many = calls
    assert many <= 5 * few


def test_model_that_nobody_had_told_of_starts_when_a_backend_tells() -> None:
    """What waits at no cost is found again."""
    box = invented(50)
    silent = box.fleet.backends["silent"]
    box.told(silent, "no7", "no3")
    order = box.run_dry()
    assert [ticket.model for ticket in order] == ["no3", "no7"]
    box.fleet.add("late", llmq.BackendSettings(url="http://late:1"), "late", 1)
    box.told(box.fleet.backends["late"], "no5")
    assert [ticket.model for ticket in box.run_dry()] == ["no5"]


# ---- What it keeps


def blocks_kept(work: Callable[[int], object], times: int) -> int:
    """Blocks of memory that so many rounds of work leave behind, after as many to warm up."""
    for number in range(times):
        work(number)
    gc.collect()
    before = sys.getallocatedblocks()
    for number in range(times, 2 * times):
        work(number)
    gc.collect()
    return sys.getallocatedblocks() - before


ROUNDS = 5000


@pytest.mark.untraced
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("what", ["same lane", "new client", "new model", "new class"])
@pytest.mark.parametrize("alone", [True, False])
def test_who_came_and_left_leaves_nothing_behind(what: str, mode: Mode, alone: bool) -> None:
    box = Box(max_wait_normal=60.0)
    box.add("a")  # it never told, so every model may be its
    if not alone:
        box.submit(client="one who stays")
    box.queue.mode = mode

    def come_and_leave(number: int) -> None:
        client = Client(f"c{number}" if what == "new client" else "c")
        model = f"m{number}" if what == "new model" else "m"
        ticket = Ticket(f"t{number}", client, Want(model), NORMAL)
        box.queue.submit(ticket, float(number))
        if what == "new class":
            for priority in (LOW, HIGH, NORMAL):
                box.queue.reprioritise(ticket, priority)
        assert box.started() == []
        box.queue.cancel(ticket)

    assert blocks_kept(come_and_leave, ROUNDS) < ROUNDS // 5


@pytest.mark.untraced
def test_attempts_without_end_leave_nothing_behind() -> None:
    box = one_slot(max_wait_normal=1e9)
    ticket = box.submit()

    def attempt(number: int) -> None:
        assert box.started() == [ticket]
        box.queue.retry(ticket, float(number))

    assert blocks_kept(attempt, ROUNDS) < ROUNDS // 5
    assert box.run_dry() == [ticket]


@pytest.mark.untraced
def test_models_that_were_invented_and_ran_leave_nothing_behind() -> None:
    """Ollama sends on whatever is named as its cloud models are."""
    box = Box()
    box.add("a").succeeded(0.0, llmq.Report("ollama", (), (), (), 0.0), INTERVAL)

    def run(number: int) -> None:
        ticket = Ticket(f"r{number}", Client("c"), Want(f"m{number}:cloud"), NORMAL)
        box.queue.submit(ticket, 0.0)
        assert box.started() == [ticket]
        box.queue.finish(ticket, 0.0)

    assert blocks_kept(run, ROUNDS) < ROUNDS // 5


@pytest.mark.untraced
def test_who_ran_leaves_nothing_behind_while_others_wait() -> None:
    box = Box(max_wait_normal=60.0)
    box.add("a", "m")
    box.down(box.add("b", "n"), 0.0)
    waiting = [box.submit(model="n", client=f"w{number}") for number in range(100)]

    def run(number: int) -> None:
        ticket = Ticket(f"r{number}", Client(f"c{number}"), Want("m"), NORMAL)
        box.queue.submit(ticket, 0.0)
        assert box.started() == [ticket]
        box.queue.finish(ticket, 0.0)

    assert blocks_kept(run, ROUNDS) < ROUNDS // 5
    assert list(box.queue.waiting.values()) == waiting


# ---- All of it at once, against a slow and plain model
#
# `World` is a scheduler with its fleet, and beside them a second account of everything in plain
# lists, kept by the words of the contract.  Each operation happens to both; after each, every
# number is counted again.


@dataclass(eq=False)
class Entry:
    """What the model knows of a ticket."""

    ticket: Ticket
    priority: Priority
    client: str
    model: str
    size: int
    order: int
    arrived: float
    session: str = ""
    avoid: Backend | None = None
    backend: Backend | None = None
    began: float = 0.0
    charged: float = 0.0
    age: float = 0.0  # seconds that it has waited while it could have been served

    @property
    def group(self) -> tuple[Priority, str, Backend | None]:
        """What is the same of those that can start at the same backends."""
        return self.priority, self.model, self.avoid


@dataclass(eq=False)
class Runner:
    """What the model knows of a backend."""

    backend: Backend
    device: str
    own: int
    weight: float = 1.0
    state: str = "unknown"
    models: tuple[str, ...] | None = None  # None: it never told
    loaded: set[str] = field(default_factory=set)
    loading: dict[str, Entry] = field(default_factory=dict)  # what makes it load, by model
    down: float = 0.0
    turn: float = 0.0
    load_takes: float | None = None
    passed: list[tuple[Entry, float]] = field(default_factory=list)  # over, and since when


@dataclass
class Person:
    """What the model knows of a client."""

    weight: float = 1.0
    boost: bool = False
    cap: int = 0
    takes: float | None = None  # seconds, on average
    tags: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))
    credit: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))


def averaged(before: float | None, seconds: float) -> float:
    return seconds if before is None else before + 0.2 * (seconds - before)


Pick = tuple[Entry, Backend, str]  # who, where, by which rule


@dataclass
class Account:
    """The second account."""

    slots: dict[str, int] = field(default_factory=dict)  # of devices
    reserve: dict[str, int] = field(default_factory=dict)
    virtual: dict[tuple[str, Priority], float] = field(default_factory=dict)
    ended: dict[Priority, float] = field(default_factory=dict)  # where the last ends have come to
    runners: list[Runner] = field(default_factory=list)
    devices: dict[Backend, str] = field(default_factory=dict)  # of all that ever were
    known: set[str] = field(default_factory=set)  # devices that there are now
    waiting: list[Entry] = field(default_factory=list)
    running: list[Entry] = field(default_factory=list)
    removed: float = 0.0  # when a backend was last taken out
    people: dict[str, Person] = field(default_factory=dict)
    takes: float | None = None  # seconds that requests run on average
    caps: dict[str, int] = field(default_factory=dict)  # of models
    alone: tuple[str, ...] = ()  # models that bear nothing beside them
    on_demand: bool = False  # whether runners load what they are asked for
    aging: float = 0.0
    affinity: float = 0.0
    turn: float = 0.0
    sessions: dict[tuple[str, str], Backend] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    boost_due: dict[Priority, bool] = field(default_factory=lambda: dict.fromkeys(Priority, True))
    starts: int = 0  # since one was given to the overdue
    judged: float | None = None
    ripe: set[Any] = field(default_factory=set)  # groups that had overdue ones when last judged

    # shares

    def estimate(self, person: Person) -> float:
        return person.takes or self.takes or 1.0

    def least_of_others(self, name: str, priority: Priority) -> float:
        others = {one.client for one in self.waiting + self.running if one.priority is priority}
        tags = [self.people[one].tags[priority] for one in others - {name}]
        return min(tags, default=self.ended.get(priority, 0.0))

    def enter(self, entry: Entry) -> None:
        """It waits; who had nothing waiting in the class joins where the class has come to."""
        mine = [one for one in self.waiting if one.client == entry.client]
        if all(one.priority is not entry.priority for one in mine):
            devices = self.places(entry)
            for device in devices:
                if not self.busy(device):
                    least = self.least_of_others(entry.client, entry.priority)
                    place = (device, entry.priority)
                    self.virtual[place] = max(self.virtual.get(place, 0.0), least)
            reached = [self.virtual.get((one, entry.priority), 0.0) for one in devices]
            person, least = self.people[entry.client], min(reached, default=0.0)
            if person.tags[entry.priority] + person.credit[entry.priority] < least:
                tag = person.tags[entry.priority] = max(person.tags[entry.priority], least)
                person.credit[entry.priority] = least - tag
        self.waiting.append(entry)

    def leave(self, entry: Entry) -> None:
        self.waiting.remove(entry)
        self.ripe &= {one.group for one in self.waiting}

    def start(self, entry: Entry, backend: Backend, now: float, rule: str) -> None:
        """Charge it, and note where it runs."""
        (runner,) = [one for one in self.runners if one.backend is backend]
        person, priority = self.people[entry.client], entry.priority
        self.leave(entry)
        if rule == "share":
            for device in self.places(entry):
                reached = self.virtual.get((device, priority), 0.0)
                self.virtual[device, priority] = max(reached, person.tags[priority])
        entry.charged = self.estimate(person)
        owed = entry.charged / person.weight + person.credit[priority]
        person.credit[priority] = min(0.0, owed)
        person.tags[priority] += max(0.0, owed)
        entry.backend, entry.began = backend, now
        self.running.append(entry)
        self.turn = max(self.turn, runner.turn)
        runner.turn = self.turn + 1 / runner.weight
        if entry.session:
            self.sessions[entry.client, entry.session] = backend
        if self.must_load(runner, entry.model):
            runner.loading[entry.model] = entry
            runner.loaded, runner.passed = {entry.model}, []
        self.starts = 0 if rule == "overdue" else self.starts + 1
        self.boost_due[priority] = rule != "boost"

    def stop(self, entry: Entry, now: float) -> None:
        """It has run: what it took counts in place of what it was charged."""
        person, seconds = self.people[entry.client], now - entry.began
        owed = (seconds - entry.charged) / person.weight
        person.credit[entry.priority] += min(0.0, owed)
        person.tags[entry.priority] += max(0.0, owed)
        here = person.tags[entry.priority] + person.credit[entry.priority]
        self.ended[entry.priority] = max(self.ended.get(entry.priority, 0.0), here)
        person.takes = averaged(person.takes, seconds)
        self.running.remove(entry)
        for runner in self.runners:
            if runner.loading.get(entry.model) is entry:
                del runner.loading[entry.model]
                runner.loaded.discard(entry.model)

    # who can start where

    def busy(self, device: str) -> int:
        return sum(self.devices[one.backend] == device for one in self.running if one.backend)

    def room(self, runner: Runner, *, urgent: bool, alone: bool = False) -> int:
        here = sum(one.backend is runner.backend for one in self.running)
        beside = [one for one in self.running if self.devices.get(one.backend) == runner.device]
        if runner.device in self.claimed or any(one.model in self.alone for one in beside):
            return 0
        if alone and beside:
            return 0
        shared = self.slots[runner.device]
        kept = 0 if urgent else min(self.reserve.get(runner.device, 0), shared - 1)
        return min((runner.own or shared) - here, shared - len(beside) - kept)

    def must_load(self, runner: Runner, model: str) -> bool:
        return self.on_demand and runner.models is not None and model not in runner.loaded

    def capped(self, entry: Entry) -> bool:
        cap = self.people[entry.client].cap
        return 0 < cap <= sum(one.client == entry.client for one in self.running)

    def model_capped(self, model: str) -> bool:
        return 0 < self.caps.get(model, 0) <= sum(one.model == model for one in self.running)

    def serving(self, entry: Entry) -> list[Runner]:
        return [one for one in self.runners if one.models is None or entry.model in one.models]

    def places(self, entry: Entry) -> set[str]:
        """The devices that can serve it; where there is only one, that."""
        able = {one.device for one in self.serving(entry)}
        return self.known if len(self.known) == 1 else able

    def options(self, entry: Entry, *, urgent: bool) -> list[Runner]:
        """The backends where it could start now."""
        if self.model_capped(entry.model):
            return []
        able = [one for one in self.serving(entry) if one.state == "up"]
        able = [one for one in able if one.backend is not entry.avoid] or able
        alone = entry.model in self.alone
        return [
            one
            for one in able
            if self.room(one, urgent=urgent, alone=alone) > 0 and entry.model not in one.loading
        ]

    def best(self, entry: Entry, options: list[Runner]) -> Runner:
        last = self.sessions.get((entry.client, entry.session)) if entry.session else None

        def rank(one: Runner) -> tuple[bool, bool, int, float]:
            room = self.room(one, urgent=True)
            return entry.model not in one.loaded, one.backend is not last, -room, one.turn

        return min(options, key=rank)

    # who goes next

    def in_turn(self, priority: Priority) -> list[Entry]:
        """Those of a class that may start, by tag and arrival."""
        able = [one for one in self.waiting if one.priority is priority and not self.capped(one)]
        return sorted(able, key=lambda one: (self.people[one.client].tags[priority], one.order))

    def overdue(self) -> list[Entry]:
        """The oldest of each group, if it has waited long enough, the oldest of them first."""
        able = sorted((one for one in self.waiting if not self.capped(one)), key=lambda e: e.order)
        oldest = {one.group: one for one in reversed(able)}
        ripe = [one for one in able if one.group in self.ripe and oldest[one.group] is one]
        return [one for one in ripe if one.age >= self.aging]

    def claim(self, entry: Entry) -> None:
        """What bears nothing beside it lets the emptiest of its devices run empty."""
        devices = [one.device for one in self.serving(entry) if one.state == "up"]
        if entry.model in self.alone and devices and not self.model_capped(entry.model):
            self.claimed.add(min(devices, key=self.busy))

    def next(self, mode: Mode, now: float) -> Pick | None:
        """Who goes next."""
        ways: list[tuple[str, list[Entry]]] = []
        if mode is Mode.OPEN and self.starts >= 7:
            ways.append(("overdue", self.overdue()))
        for priority in Priority:
            if mode is Mode.OPEN or (mode is Mode.PRIORITY and priority is HIGH):
                order = self.in_turn(priority)
                if self.boost_due[priority]:
                    boosted = [one for one in order if self.people[one.client].boost]
                    ways.append(("boost", boosted))
                ways.append(("share", order))
        for rule, entries in ways:
            for entry in entries:
                urgent = rule == "overdue" or entry.priority is HIGH
                options = self.options(entry, urgent=urgent)
                if options:
                    return self.or_another(entry, self.best(entry, options), rule, now)
                if urgent or rule == "share":
                    self.claim(entry)
        return None

    def or_another(self, entry: Entry, runner: Runner, rule: str, now: float) -> Pick:
        """It, or for a while one whose model is loaded where it would have to load its own."""
        if self.affinity and self.must_load(runner, entry.model):
            bound = self.affinity
            if runner.load_takes is not None:
                bound = min(bound, max(5.0, 20 * runner.load_takes))
            for other in self.in_turn(entry.priority):
                if other.model in runner.loaded and runner in self.options(
                    other, urgent=entry.priority is HIGH
                ):
                    if now - self.passed_since(runner, entry, now) < bound:
                        return other, runner.backend, "affinity" if rule == "share" else rule
                    break
        return entry, runner.backend, rule

    def passed_since(self, runner: Runner, entry: Entry, now: float) -> float:
        if entry not in [one for one, _ in runner.passed]:
            runner.passed.append((entry, now))
        while runner.passed[0][0] not in self.waiting:
            del runner.passed[0]
        return runner.passed[0][1]

    # how they grow old and end

    def grow(self, now: float, mode: Mode) -> None:
        """Those that are left grow older while they could be served."""
        passed = now - self.judged if self.judged is not None and mode is Mode.OPEN else 0.0
        self.judged = now
        up = {
            one for one in self.waiting if any(each.state != "down" for each in self.serving(one))
        }
        for entry in up:
            entry.age += passed
        self.ripe = {one.group for one in up}
        self.ripe = {one.group for one in self.overdue()} if self.aging else set()

    def order(self) -> list[Entry]:
        """All in the order in which they would start if each could."""
        places: dict[Entry, tuple[Priority, float, int]] = {}
        for entry in sorted(self.waiting, key=lambda one: one.order):
            person = self.people[entry.client]
            tag = person.tags[entry.priority]
            for before in places:
                if (before.client, before.priority) == (entry.client, entry.priority):
                    tag += self.estimate(person) / person.weight
            places[entry] = (entry.priority, tag, entry.order)
        return sorted(places, key=lambda one: places[one])

    def fits(self, entry: Entry, limits: llmq.QueueSettings) -> bool:
        mine = [one for one in self.waiting if one.client == entry.client]
        held = sum(one.size for one in self.waiting)
        alike = sum(one.priority is entry.priority for one in self.waiting)
        return (
            len(self.waiting) < limits.max_depth
            and alike < (getattr(limits, f"max_depth_{entry.priority.word}") or limits.max_depth)
            and len(mine) < limits.max_depth // 2
            and held + entry.size <= limits.max_queued_bytes
            and sum(one.size for one in mine) + entry.size <= limits.max_queued_bytes // 2
            and not (entry.ticket.foreign and len(mine) >= 16)
        )

    def ends(self, entry: Entry, now: float, limits: llmq.QueueSettings) -> set[str | None]:
        """How a waiting ticket may end by now: mostly one way, or None for not at all."""
        longest = getattr(limits, f"max_wait_{entry.priority.word}")
        if longest and now >= entry.arrived + longest:
            return {"wait_timeout"}
        told = [one.models for one in self.runners]
        if told and all(one is not None and entry.model not in one for one in told):
            return {"model_not_found"}
        serving = self.serving(entry)
        if any(one.state != "down" for one in serving):
            return {None}
        since = max([entry.arrived, *(one.down for one in serving)])
        if not serving:
            since = max(since, self.removed)
        # A backend that was taken out may have been the last one that could serve it, or not.
        surely = now >= max(since, self.removed) + limits.down_wait
        maybe = now >= since + limits.down_wait
        return {"backend_down"} if surely else {"backend_down", None} if maybe else {None}


SECONDS = {"m": 2.0, "n": 5.0, "o": 0.5}  # that they are said to run; of the fourth nothing is


class World(Box):
    """Random operations, done to the scheduler and to the account."""

    MODELS = ("m", "n", "o", "p")
    DEVICES = ("gpu0", "gpu1", "gpu2")

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        limits = {
            "max_depth": rng.choice((24, 60)),
            "max_depth_low": rng.choice((0, 10)),
            "max_queued_bytes": rng.choice((2000, 100_000)),
            "max_wait_high": rng.choice((0.0, 30.0)),
            "max_wait_normal": rng.choice((0.0, 15.0)),
            "max_wait_low": rng.choice((0.0, 60.0)),
            "down_wait": rng.choice((5.0, 20.0)),
            "aging": rng.choice((0.0, 7.03, 40.03)),
            "affinity": rng.choice((0.0, 2.03, 30.03)),
        }
        super().__init__(**limits)
        self.now = 1000.0
        self.kind = rng.choice(("openai", "ollama", "ollama"))
        self.account = Account(aging=limits["aging"], affinity=limits["affinity"])
        self.account.on_demand = self.kind == "ollama"
        self.account.caps = {"n": rng.choice((0, 0, 2))}
        self.account.alone = rng.choice(((), (), ("p",)))
        self.account.reserve = {"gpu1": rng.choice((0, 1))}
        self.fleet.model_settings = {
            "n": llmq.ModelSettings(max_concurrent=self.account.caps["n"]),
            **{name: llmq.ModelSettings(exclusive=True) for name in self.account.alone},
        }
        self.crowd = rng.choice((12, 30))  # how often one comes
        self.orders = count()
        self.outcomes: dict[str, str] = {}
        self.done: Counter[str] = Counter()
        for name in ("x", "y", "z", "page"):
            self.account.people[name] = Person()
        self.change_client()
        self.add_backend()

    # what happens

    OPERATIONS = (
        ("submit_one", 30),
        ("start", 18),
        ("finish_one", 14),
        ("retry_one", 5),
        ("cancel_one", 5),
        ("reprioritise_one", 5),
        ("expire_some", 6),
        ("move_wrongly", 3),
        ("forecast_all", 1),
        ("change_mode", 1),
        ("change_slots", 1),
        ("change_client", 1),
        ("first_byte", 5),
        ("tell", 5),
        ("go_down", 2),
        ("load", 1),
        ("add_backend", 1),
        ("remove_backend", 1),
    )

    def step(self) -> None:
        names, weights = zip(*self.OPERATIONS)
        (name,) = self.rng.choices(names, (self.crowd, *weights[1:]))
        self.now += self.rng.choice((0.001, 0.1, 0.1, 1.0))
        self.done[name] += 1
        getattr(self, name)()
        self.recount()

    def submit_one(self) -> None:
        """One comes; where nobody waits it may start at once, as if it had waited."""
        rng = self.rng
        client, model = rng.choice(("x", "y", "z", "page")), rng.choice(self.MODELS)
        priority, size = rng.choice(list(Priority)), rng.choice((0, 10, 200))
        ticket = self.ticket(priority, client=client, model=model, size=size)
        ticket.foreign, ticket.session = client == "page", rng.choice(("", "", "s", "t"))
        order, session = next(self.orders), ticket.session
        entry = Entry(ticket, priority, client, model, size, order, self.now, session)
        if not self.account.fits(entry, self.queue.limits):
            self.done["full"] += 1
            with pytest.raises(llmq.LlmqError) as caught:
                self.queue.submit(ticket, self.now)
            assert caught.value.retry_after in range(1, 61)
            return
        backend = self.queue.start(ticket, self.now) if rng.random() < 0.5 else None
        if backend is None:
            self.queue.submit(ticket, self.now)
        self.account.enter(entry)
        if backend is not None:
            self.done["at once"] += 1
            self.account.claimed = set()
            self.has_started(ticket, backend)

    def start(self) -> None:
        """Everything that starts is the one that the rules name, to the last."""
        self.account.claimed = set()
        for ticket, backend in self.queue.dispatch(self.now):
            self.has_started(ticket, backend)
        right = self.account.next(self.queue.mode, self.now)
        assert right is None, "nobody idles while one can start"

    def has_started(self, ticket: Ticket, backend: Backend) -> None:
        account = self.account
        right = account.next(self.queue.mode, self.now)
        assert right is not None, "nothing could start"
        entry, where, rule = right
        assert (ticket.id, backend.name) == (entry.ticket.id, where.name), rule
        account.start(entry, backend, self.now, rule)
        assert account.busy(account.devices[backend]) <= account.slots[account.devices[backend]]
        assert backend.busy <= backend.most
        assert ticket.state is TicketState.RUNNING
        self.done["started"] += 1
        self.done[rule] += 1

    def finish_one(self) -> None:
        if self.account.running:
            entry = self.rng.choice(self.account.running)
            if entry.model in SECONDS:
                self.queue.service.add(SECONDS[entry.model])
                self.account.takes = averaged(self.account.takes, SECONDS[entry.model])
            self.queue.finish(entry.ticket, self.now)
            self.account.stop(entry, self.now)
            self.forget_devices()
            self.end(entry, "finished")

    def retry_one(self) -> None:
        if self.account.running:
            entry = self.rng.choice(self.account.running)
            self.queue.retry(entry.ticket, self.now)
            self.account.stop(entry, self.now)
            self.forget_devices()
            entry.avoid, entry.backend = entry.backend, None
            self.account.enter(entry)

    def cancel_one(self) -> None:
        if self.account.waiting:
            entry = self.rng.choice(self.account.waiting)
            self.queue.cancel(entry.ticket)
            self.account.leave(entry)
            self.end(entry, "cancelled")

    def reprioritise_one(self) -> None:
        if self.account.waiting:
            entry = self.rng.choice(self.account.waiting)
            priority = self.rng.choice(list(Priority))
            self.queue.reprioritise(entry.ticket, priority)
            self.account.leave(entry)
            entry.priority = priority
            self.account.enter(entry)

    def expire_some(self) -> None:
        ended = {ticket: error.code for ticket, error in self.queue.expire(self.now)}
        for entry in list(self.account.waiting):
            outcome = ended.pop(entry.ticket, None)
            assert outcome in self.account.ends(entry, self.now, self.queue.limits)
            if outcome is not None:
                self.account.leave(entry)
                self.end(entry, outcome)
        assert not ended, "only waiting tickets expire, each once"
        self.account.grow(self.now, self.queue.mode)

    def move_wrongly(self) -> None:
        wrong = {TicketState.WAITING: ("finish",), TicketState.RUNNING: ("cancel", "reprioritise")}
        entries = self.account.waiting + self.account.running
        if entries:
            ticket = self.rng.choice(entries).ticket
            with pytest.raises(ILLEGAL):
                MOVES[self.rng.choice(wrong[ticket.state])](self.queue, ticket)

    def forecast_all(self) -> None:
        """Its times have their own tests."""
        right = [one.ticket.id for one in self.account.order()]
        assert [one.id for one in self.queue.in_order()] == right
        forecast = llmq.forecast(self.queue, self.now)
        assert [forecast[one].position for one in right] == list(range(1, len(right) + 1))
        assert [one.id for one in forecast.order] == right
        assert all(forecast[one].reason for one in right)

    def change_mode(self) -> None:
        self.queue.mode = self.rng.choice((Mode.OPEN, Mode.OPEN, Mode.PRIORITY, Mode.PAUSED))

    def change_slots(self) -> None:
        if self.account.runners:
            runner = self.rng.choice(self.account.runners)
            runner.own = runner.backend.slots = self.rng.choice((0, 0, 1, 2))
            slots = self.rng.randint(1, 4)
            self.account.slots[runner.device] = runner.backend.device.slots = slots
            kept = min(self.account.reserve.get(runner.device, 0), slots - 1)
            runner.backend.device.reserve_high = kept

    def change_client(self) -> None:
        for name, person in self.account.people.items():
            person.weight = self.rng.choice((0.5, 1.0, 1.0, 3.0))
            person.boost, person.cap = self.rng.random() < 0.2, self.rng.choice((0, 0, 0, 2))
            facts = {"weight": person.weight, "boost": person.boost, "max_concurrent": person.cap}
            self.client(name).settings = llmq.ClientSettings(**facts)
        self.queue.reconsider()

    def first_byte(self) -> None:
        loading = [one for one in self.account.runners if one.loading]
        if loading:
            runner = self.rng.choice(loading)
            model = self.rng.choice(sorted(runner.loading))
            runner.backend.loaded_now(model, self.now)
            began = runner.loading.pop(model).began
            runner.load_takes = averaged(runner.load_takes, self.now - began)

    def tell(self) -> None:
        if self.account.runners:
            runner = self.rng.choice(self.account.runners)
            models = tuple(one for one in self.MODELS if self.rng.random() < 0.6)
            loaded = tuple(one for one in models if self.rng.random() < 0.3)
            self.bring_up(runner, models, loaded)

    def bring_up(self, runner: Runner, models: tuple[str, ...], loaded: tuple[str, ...]) -> None:
        """What it says is loaded counts beside what it is about to load."""
        news = llmq.Report(self.kind, (), models, loaded, 0.0, began=self.now)
        runner.backend.succeeded(self.now, news, INTERVAL)
        runner.state, runner.models = "up", models
        runner.loading = {key: one for key, one in runner.loading.items() if key not in loaded}
        runner.loaded = {*loaded, *runner.loading}

    def go_down(self) -> None:
        if self.account.runners:
            runner = self.rng.choice(self.account.runners)
            runner.backend.failed(self.now, "refused", INTERVAL, refused=True)
            if runner.state != "down":
                runner.state, runner.down = "down", self.now

    def load(self) -> None:
        if self.account.runners:
            runner = self.rng.choice(self.account.runners)
            runner.backend.loads(self.now, "loading")
            runner.state = "loading"

    def add_backend(self) -> None:
        if len(self.account.runners) < 5:
            device, slots = self.rng.choice(self.DEVICES), self.rng.randint(1, 3)
            own, name = self.rng.choice((0, 0, 1, 2)), f"b{next(self.numbers)}"
            backend = self.add(name, device=device, slots=own, shared=slots)
            backend.weight = self.rng.choice((1.0, 3.0))
            kept = min(self.account.reserve.get(device, 0), backend.device.slots - 1)
            backend.device.reserve_high = kept  # a reserve leaves a slot
            self.account.runners.append(Runner(backend, device, own, backend.weight))
            self.account.devices[backend] = device
            self.account.slots[device] = slots
            self.account.known.add(device)

    def remove_backend(self) -> None:
        """A device that nobody uses any more is forgotten, and so is how far it had come."""
        account = self.account
        if len(account.runners) > 1:
            runner = self.rng.choice(account.runners)
            account.runners.remove(runner)
            self.fleet.remove(runner.backend.name, self.now)
            account.removed = self.now
            self.forget_devices()

    def forget_devices(self) -> None:
        """What has no backend left and runs nothing."""
        account = self.account
        used = {one.device for one in account.runners}
        account.known &= used | {one for one in self.DEVICES if account.busy(one)}
        for place in list(account.virtual):
            if place[0] not in account.known:
                del account.virtual[place]

    # what must hold

    def end(self, entry: Entry, outcome: str) -> None:
        assert entry.ticket.id not in self.outcomes, "a ticket ends once"
        assert entry.ticket.state is TicketState.ENDED
        self.outcomes[entry.ticket.id] = outcome

    def recount(self) -> None:
        """Every number that the scheduler keeps, counted again."""
        queue, waiting, running = self.queue, self.account.waiting, self.account.running
        assert set(queue.waiting) == {one.ticket.id for one in waiting}
        assert set(queue.running) == {one.ticket.id for one in running}
        assert queue.queued_bytes == sum(one.size for one in waiting)
        for name, client in self.clients.items():
            mine, person = [one for one in waiting if one.client == name], self.account.people[name]
            assert client.waiting == len(mine)
            assert client.queued_bytes == sum(one.size for one in mine)
            assert client.running == sum(one.client == name for one in running)
            assert client.tags == pytest.approx(list(person.tags.values()))
            assert client.credits == pytest.approx(list(person.credit.values()))
        for backend in self.account.devices:
            assert backend.busy == sum(one.backend is backend for one in running)
        for name, device in self.fleet.devices.items():
            assert device.busy == self.account.busy(name)
            reached = [self.account.virtual.get((name, each), 0.0) for each in Priority]
            assert device.virtual == pytest.approx(reached)
        for runner in self.account.runners:
            assert runner.backend.loaded == runner.loaded
            assert runner.backend.loading.keys() == runner.loading.keys()
        for one in waiting:
            assert one.ticket.state is TicketState.WAITING
            assert (one.ticket.arrived, one.ticket.priority) == (one.arrived, one.priority)

    def settle(self) -> None:
        """Let everything end: all backends up with all models, nothing in the way."""
        self.queue.mode = Mode.OPEN
        for runner in self.account.runners:
            self.bring_up(runner, self.MODELS, ())
        while self.account.waiting or self.account.running:
            self.start()
            assert self.account.running, "what waits can start"
            while self.account.running:
                self.finish_one()
        self.recount()


@pytest.mark.untraced
@pytest.mark.deadline(60)
@pytest.mark.parametrize("seed", range(12))
def test_any_story_keeps_every_rule(seed: int) -> None:
    world = World(seed)
    for _ in range(2500):
        world.step()
    world.settle()
    submitted = world.done["submit_one"] - world.done["full"]
    assert len(world.outcomes) == submitted, "every ticket ended, once"
    assert not world.queue.waiting
    assert not world.queue.running
    assert world.queue.queued_bytes == 0
    assert all(one.busy == 0 for one in world.account.devices)
    assert not any(one.held for one in world.fleet.devices.values())
    assert world.done["started"] > 100, "a story in which nothing happens proves nothing"


@pytest.mark.untraced
@pytest.mark.deadline(60)
def test_the_stories_know_every_ending_and_every_rule() -> None:
    endings: Counter[str] = Counter()
    for seed in range(100, 112):
        world = World(seed)
        for _ in range(600):
            world.step()
        endings.update(world.outcomes.values())
        endings.update(world.done)
    wanted = {"finished", "cancelled", "full", "wait_timeout", "backend_down", "model_not_found"}
    wanted |= {"at once", "share", "boost", "overdue", "affinity"}
    assert wanted <= set(+endings)


@pytest.mark.untraced
@pytest.mark.deadline(60)
def test_a_deep_queue_of_many_clients_and_models_keeps_the_order() -> None:
    """Few rules, great depth: 10,000 tickets, cancelled and moved at random."""
    rng = random.Random(4)
    box = Box(max_depth=20_000)
    models = [f"m{number}" for number in range(10)]
    for name in "abcd":
        box.add(name, *models, shared=2)
    alive: dict[str, Ticket] = {}
    for _ in range(10_000):
        client, model = f"c{rng.randrange(100)}", rng.choice(models)
        ticket = box.submit(rng.choice(list(Priority)), client=client, model=model)
        alive[ticket.id] = ticket
    for ticket in rng.sample(list(alive.values()), 4000):
        if rng.random() < 0.5:
            box.queue.cancel(ticket)
            del alive[ticket.id]
        else:
            box.queue.reprioritise(ticket, rng.choice(list(Priority)))
    assert box.run_dry() == by_turns(list(alive.values()))


# ---- Starting at once is the same as waiting and being picked


def twins(rng: random.Random) -> list[Box]:
    """Two queues alike, with every rule at work that a start may have to do with."""
    facts: dict[str, Any] = {
        "x": {"weight": 3.0},
        "y": {"boost": rng.random() < 0.5},
        "z": {"max_concurrent": rng.choice((0, 2))},
    }
    alone, kind, reserve = rng.random() < 0.5, rng.choice(("openai", "ollama")), rng.choice((0, 1))
    boxes = [Box(aging=20.0, affinity=15.0) for _ in range(2)]
    for box in boxes:
        for name, device, *models in (("a", "", *"mn"), ("b", "g", *"no"), ("c", "g", *"mp")):
            backend = box.add(name, device=device, shared=2)
            backend.succeeded(0.0, llmq.Report(kind, (), tuple(models), (), 0.0), INTERVAL)
            backend.device.reserve_high = min(reserve, backend.device.slots - 1)
        box.fleet.model_settings = {
            "p": llmq.ModelSettings(exclusive=alone),
            "m": llmq.ModelSettings(max_concurrent=2),
        }
        for name, settings in facts.items():
            box.client(name).settings = llmq.ClientSettings(**settings)
    return boxes


def memory(box: Box) -> object:
    """All that has a say in what starts next."""
    queue, fleet = box.queue, box.fleet
    return (
        list(queue.waiting), list(queue.running), queue.queued_bytes, queue._unaged,
        queue._boost_due, [sorted(one) for one in queue._boosted.values()],
        {name: (one.tags, one.credits, one.running, one.waiting, one.service.value)
         for name, one in box.clients.items()},
        {name: (one.busy, one.virtual, one.held) for name, one in fleet.devices.items()},
        {name: (one.busy, one.turn, one.used, one.loaded, list(one.loading), list(one.passed),
                one.switched, one.at_work) for name, one in fleet.backends.items()},
        fleet.turn, {key: one.name for key, one in fleet.sessions.items()},
        {ident: (one.number, one.charged, one.took, one.attempts, one.started)
         for ident, one in queue.running.items()},
    )  # fmt: skip


@pytest.mark.untraced
@pytest.mark.parametrize("seed", range(20))
def test_start_at_once_is_what_a_dispatch_would_have_done(seed: int) -> None:
    """Two queues get the same requests; one may start them at once, the other lets them wait."""
    rng = random.Random(seed)
    fast, slow = twins(rng)
    rush = rng.choice((0.25, 0.4))
    at_once = 0
    now = 0.0
    for _ in range(800):
        now += rng.choice((0.25, 1.0))
        running = sorted(fast.queue.running)
        choice = rng.random()
        started: list[tuple[str, str]] = []
        if choice < rush:
            what = {"client": rng.choice("wxyz"), "model": rng.choice("mnop")}
            priority, session = rng.choice(list(Priority)), rng.choice(("", "s"))
            ticket, same = fast.ticket(priority, **what), slow.ticket(priority, **what)
            ticket.session = same.session = session
            backend = fast.queue.start(ticket, now)
            if backend is None:
                fast.queue.submit(ticket, now)
            else:
                at_once += 1
                started.append((ticket.id, backend.name))
            slow.queue.submit(same, now)
        elif choice < 0.9 and running:
            ident = rng.choice(running)
            how = "retry" if rng.random() < 0.1 else "finish"
            for box in (fast, slow):
                getattr(box.queue, how)(box.queue.running[ident], now)
        else:
            mode = rng.choice((*[Mode.OPEN] * 5, *Mode))
            for box in (fast, slow):
                box.queue.mode = mode
                box.queue.expire(now)
        started += [(one.id, on.name) for one, on in fast.queue.dispatch(now)]
        assert started == [(one.id, on.name) for one, on in slow.queue.dispatch(now)]
        assert memory(fast) == memory(slow)
    assert at_once >= 5
