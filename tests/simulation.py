"""A world in virtual time: requests that come and go, runners that load models, a real scheduler.

`test_fair.py` proves rules with it, `bench/replay.py` asks it what a policy would have done.  No
clock is read: a day of a homelab takes seconds, and a seed tells the same story each time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Callable

import llmq
from llmq import Backend, Client, ClientSettings, Fleet, Priority, Scheduler, Settings, Ticket, Want

PROBE = 10.0  # seconds between two looks at a runner
TICK = 0.5  # seconds between two looks at who has waited too long


@dataclass(eq=False)
class Job:
    """One request as its client means it."""

    client: str
    model: str = "m"
    seconds: float = 1.0  # that it runs, without the load of its model
    priority: Priority = Priority.NORMAL
    arrives: float = 0.0
    patience: float = math.inf  # seconds that it waits before it gives up
    fails: int = 0  # of its attempts, so many break off halfway
    device: str = ""  # a lease of this device, in place of a model
    pin: str = ""  # the only backend that may serve it
    # Closed loop: these come so many seconds after this one has ended.
    followers: list[tuple[float, Job]] = field(default_factory=list)


@dataclass(eq=False)
class Visit:
    """What became of a job."""

    job: Job
    ticket: Ticket
    arrived: float
    eta: float | None = None  # as foretold when it came, if it had to wait
    started: float | None = None  # its last attempt
    ended: float | None = None
    backend: str = ""
    loads: int = 0  # of models that it caused
    outcome: str = ""  # done, cancelled or the code of an error

    @property
    def wait(self) -> float:
        """Seconds until it started, or until it gave up."""
        until = self.started if self.started is not None else self.ended
        return (until or self.arrived) - self.arrived


class Memory:
    """The one model that a runner holds: another one waits for what runs, then loads."""

    def __init__(self, load: Callable[[str], float]) -> None:
        self.load = load
        self.model = ""
        self.ready = self.busy_until = 0.0
        self.loads: list[tuple[float, str]] = []

    def use(self, model: str, now: float, seconds: float) -> float:
        """When a request that is sent now, and runs so long, begins to be answered."""
        if model != self.model:
            begins = max(now, self.busy_until)
            self.loads.append((begins, model))
            self.model, self.ready = model, begins + self.load(model)
        ready = max(now, self.ready)
        self.busy_until = max(self.busy_until, ready + seconds)
        return ready


class Simulation:
    """Events in order of their time; after each, the queue starts what it can."""

    def __init__(
        self,
        settings: Settings | None = None,
        queue: Callable[[Fleet, Settings], Any] = Scheduler,
        foretell: bool = False,
    ) -> None:
        self.settings = settings or Settings()
        self.fleet = Fleet()
        self.fleet.model_settings = self.settings.models
        self.queue = queue(self.fleet, self.settings)
        self.now = self._ticked = 0.0
        self.clients: dict[str, Client] = {}
        self.memories: dict[str, Memory] = {}
        self.models: dict[str, tuple[str, ...]] = {}
        self.visits: list[Visit] = []
        self.by_id: dict[str, Visit] = {}  # those that wait or run
        self.order: list[Visit] = []  # one for every start
        self.on_start: list[Callable[[Visit, Backend], None]] = []
        self.on_end: list[Callable[[Visit], None]] = []
        self.on_pump: list[Callable[[], None]] = []
        self._foretell = foretell
        self._probes = 0  # that are planned
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    # ---- the fleet

    def add(
        self,
        name: str,
        models: Sequence[str] = ("m",),
        *,
        device: str = "",
        slots: int = 1,
        weight: float = 1.0,
        load: Mapping[str, float] | None = None,
    ) -> Backend:
        """A backend that is up; with `load` (seconds by model) it holds one model at a time."""
        kind = "openai" if load is None else "ollama"
        row = llmq.BackendSettings(url=f"http://{name}:1", kind=kind, weight=weight)
        backend = self.fleet.add(name, row, device or name, slots)
        place = self.settings.devices.get(device or name)
        if place is not None:
            backend.device.reserve_high = place.reserve_high
        self.models[name] = tuple(models)
        if load is not None:
            self.memories[name] = Memory(lambda model: load.get(model, 0.0))
            self._probes += 1
            self.after(PROBE, self._probe, name)
        self.told(name)
        return backend

    def told(self, name: str) -> None:
        """A probe of this backend gets through."""
        if name not in self.fleet.backends:
            return
        memory = self.memories.get(name)
        backend, models = self.fleet.backends[name], self.models[name]
        loaded = models
        if memory is not None:
            loaded = (memory.model,) if memory.model and memory.ready <= self.now else ()
        news = llmq.Report(backend.kind, (), models, loaded, 0.0, began=self.now)
        backend.succeeded(self.now, news, PROBE)

    def _probe(self, name: str) -> None:
        self.told(name)
        self._probes -= 1
        if name in self.fleet.backends and (self.by_id or len(self._events) > self._probes):
            self._probes += 1
            self.after(PROBE, self._probe, name)

    # ---- what happens

    def after(self, seconds: float, act: Callable[..., None], *what: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), act, what))

    def client(self, name: str) -> Client:
        if name not in self.clients:
            row = self.settings.clients.get(name, ClientSettings())
            self.clients[name] = Client(name, row)
        return self.clients[name]

    def plan(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.after(job.arrives - self.now, self.arrive, job)

    def arrive(self, job: Job) -> Visit:
        """Start the job at once if nobody is before it, else let it wait."""
        want = Want(job.model, (llmq.CHAT,), backend=job.pin)
        if job.device:
            want = Want("", device=job.device)
        ticket = Ticket(f"t{next(self._numbers)}", self.client(job.client), want, job.priority)
        visit = Visit(job, ticket, self.now)
        self.visits.append(visit)
        self.by_id[ticket.id] = visit
        backend = self.queue.start(ticket, self.now)
        if backend is not None:
            self._begin(visit, backend)
            return visit
        try:
            self.queue.submit(ticket, self.now)
        except llmq.LlmqError as error:
            self._end(visit, error.code)
            return visit
        if job.patience < math.inf:
            self.after(job.patience, self._give_up, visit)
        return visit

    def run(self, until: float = math.inf) -> None:
        """Go on until that time, or until nothing is left to happen."""
        self.pump()
        while self._events and self._events[0][0] <= until:
            when, _, act, what = heapq.heappop(self._events)
            self._tick(when)
            self.now = when
            visit = act(*what)
            self.pump()
            if self._foretell and isinstance(visit, Visit) and visit.started is None:
                visit.eta = llmq.forecast(self.queue, self.now)[visit.ticket.id].eta
        if until < math.inf:
            self._tick(until)
            self.now = until

    def _tick(self, until: float) -> None:
        """Let those who wait grow older."""
        if not self.settings.queue.aging:
            return
        while self._ticked + TICK <= until:
            self._ticked += TICK
            self.now = max(self.now, self._ticked)
            self.expire()

    def set_mode(self, mode: llmq.Mode) -> None:
        self.expire()
        self.queue.mode = mode
        self.pump()

    def pump(self) -> None:
        for ticket, backend in self.queue.dispatch(self.now):
            self._begin(self.by_id[ticket.id], backend)
        for look in self.on_pump:
            look()

    def _begin(self, visit: Visit, backend: Backend) -> None:
        visit.started, visit.backend = self.now, backend.name
        self.order.append(visit)
        job, memory, key = visit.job, self.memories.get(backend.name), visit.ticket.model
        ready = self.now
        if memory is not None and not job.device:
            loads = len(memory.loads)
            ready = memory.use(key, self.now, job.seconds)
            visit.loads += len(memory.loads) - loads
            self.after(ready - self.now, self._first_byte, backend, key)
        for look in self.on_start:
            look(visit, backend)
        if job.fails >= visit.ticket.attempts:
            self.after(ready - self.now + job.seconds / 2, self._retry, visit)
        else:
            self.after(ready - self.now + job.seconds, self._finish, visit, backend)

    def _first_byte(self, backend: Backend, key: str) -> None:
        if backend.loaded_now(key, self.now):
            self.after(0.01, self.told, backend.name)

    def _finish(self, visit: Visit, backend: Backend) -> None:
        ticket = visit.ticket
        if not visit.job.device:
            ran = self.now - ticket.started - backend.load_of(ticket)
            self.queue.note_service(ticket.model, ran, backend.device.name)
        self.queue.finish(ticket, self.now)
        self._end(visit, "done")

    def _retry(self, visit: Visit) -> None:
        visit.started = None
        self.queue.retry(visit.ticket, self.now)

    def _give_up(self, visit: Visit) -> None:
        if visit.ticket.state is llmq.TicketState.WAITING:
            self.queue.cancel(visit.ticket)
            self._end(visit, "cancelled")

    def expire(self) -> None:
        for ticket, error in self.queue.expire(self.now):
            self._end(self.by_id[ticket.id], error.code)

    def _end(self, visit: Visit, outcome: str) -> None:
        assert not visit.outcome, "a ticket ends once"
        visit.ended, visit.outcome = self.now, outcome
        del self.by_id[visit.ticket.id]
        for seconds, job in visit.job.followers:
            self.after(seconds, self.arrive, job)
        for look in self.on_end:
            look(visit)

    # ---- what is counted

    def served(self, name: str, since: float = 0.0, until: float | None = None) -> float:
        """Seconds that this client's requests ran in that time, those that run still too."""
        end = self.now if until is None else until
        mine = (one for one in self.visits if one.job.client == name and one.started is not None)
        spans = ((one.started, self.now if one.ended is None else one.ended) for one in mine)
        return sum(max(0.0, min(stop, end) - max(start, since)) for start, stop in spans)

    def loads(self) -> int:
        return sum(len(memory.loads) for memory in self.memories.values())


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all have the same, 1/n where one has all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def percentile(values: Sequence[float], part: float) -> float:
    """The nearest-rank percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0
