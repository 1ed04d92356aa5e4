#!/usr/bin/env python3
"""What would another order have done?  Traces and llmq's own log, through its real scheduler.

    python3 -m tests.bench.replay                          # the traces below, three policies
    python3 -m tests.bench.replay LOG --weight user:alice=2   # last night, with other weights
    python3 -m tests.bench.replay --pictures FOLDER        # the plots of the README

LOG is what `llmq --log-format json` writes.  Of each request it knows client, class, model, when it
came, how long it ran and how it ended; what a load costs is the median first byte of requests that
changed their backend's model, less that of those that did not (or --load SECONDS).  A request that
came within 5 s of its client's previous end is closed loop: here too it comes so long after that
end.  Who gave up while waiting does so after the same time; what failed holds its slot as long.

Policies: `arrival` takes class and arrival alone; `grouping` lets the loaded model's requests go
first without bound; `llmq` is llmq.  Everything runs in virtual time and seeded: no clock is read.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import llmq
from llmq import Backend, Fleet, Mode, Settings, Ticket, TicketState
from tests.simulation import Job, Simulation, percentile

DAY = 86400.0
AGAIN = 900.0  # seconds: a model that comes back within them should have stayed
CLOSED = 5.0  # seconds after its client's previous end: that end was the cause


# ---- Policies


class Plain:
    """Class, then arrival; with `grouping` the loaded model's requests first, without bound."""

    def __init__(self, fleet: Fleet, settings: Settings, grouping: bool = False) -> None:
        self.fleet, self.settings, self.grouping = fleet, settings, grouping
        self.mode = Mode.OPEN
        self.waiting: dict[str, Ticket] = {}
        self.running: dict[str, Ticket] = {}
        self.count = 0

    def start(self, _ticket: Ticket, _now: float) -> Backend | None:
        return None

    def submit(self, ticket: Ticket, now: float) -> None:
        self.count += 1
        ticket.number, ticket.arrived = self.count, now
        ticket.move(TicketState.WAITING)
        self.waiting[ticket.id] = ticket

    def cancel(self, ticket: Ticket) -> None:
        del self.waiting[ticket.id]
        ticket.move(TicketState.ENDED)

    def finish(self, ticket: Ticket, _now: float) -> None:
        self._free(ticket)
        ticket.move(TicketState.ENDED)

    def retry(self, ticket: Ticket, _now: float) -> None:
        self._free(ticket)
        ticket.move(TicketState.WAITING)
        self.waiting[ticket.id] = ticket

    def _free(self, ticket: Ticket) -> None:
        del self.running[ticket.id]
        assert ticket.backend is not None
        ticket.backend.busy -= 1
        ticket.backend.device.busy -= 1

    def note_service(self, _key: str, _seconds: float, _device: str) -> None:
        """It measures nothing."""

    def expire(self, _now: float) -> list[Any]:
        return []

    def dispatch(self, now: float) -> list[tuple[Ticket, Backend]]:
        started = []
        while (found := self._pick()) is not None:
            ticket, backend = found
            del self.waiting[ticket.id]
            self.running[ticket.id] = ticket
            ticket.move(TicketState.RUNNING)
            ticket.backend, ticket.started, backend.used = backend, now, now
            ticket.attempts += 1
            backend.busy += 1
            backend.device.busy += 1
            started.append(found)
        return started

    def _pick(self) -> tuple[Ticket, Backend] | None:
        free = [each for each in self.fleet.backends.values() if each.usable and self._room(each)]
        if not free or not self.waiting:
            return None
        order = sorted(self.waiting.values(), key=lambda one: (one.priority, one.number))
        if self.grouping:
            for ticket in order:
                for backend in free:
                    if ticket.priority is order[0].priority and backend.is_loaded(ticket.model):
                        return ticket, backend
        for ticket in order:
            able = [each for each in free if each.may_have(ticket.model)]
            if able:
                key = ticket.model
                return ticket, min(able, key=lambda one: (not one.is_loaded(key), one.used))
        return None

    @staticmethod
    def _room(backend: Backend) -> bool:
        return backend.busy < backend.most and backend.device.busy < backend.device.slots


Policy = Callable[[Fleet, Settings], Any]
POLICIES: dict[str, Policy] = {
    "arrival": lambda fleet, settings: Plain(fleet, settings),
    "grouping": lambda fleet, settings: Plain(fleet, settings, grouping=True),
    "llmq": llmq.Scheduler,
}


# ---- Traces


@dataclass
class Trace:
    """Jobs, and the runners that they meet."""

    name: str
    jobs: Callable[[], list[Job]]  # made anew for every policy
    load: dict[str, float]  # seconds, by model
    backends: dict[str, tuple[str, ...]]  # the models of each
    slots: dict[str, int] = field(default_factory=dict)  # of a backend, if not 1
    settings: Settings = field(default_factory=Settings)


@dataclass
class Served:
    """One request, as it was served or simulated; seconds since the beginning."""

    client: str
    model: str
    backend: str
    arrived: float
    started: float
    ended: float
    outcome: str = "done"


MODELS = ("embed", "small", "large", "code")
LOADS = {"embed": 1.0, "small": 4.0, "large": 12.0, "code": 20.0}  # seconds
LENGTHS = {"embed": (0.1, 0.6), "small": (0.5, 3.0), "large": (1.0, 6.0), "code": (2.0, 7.0)}


def length(rng: random.Random, model: str) -> float:
    return rng.uniform(*LENGTHS[model])


def chain(jobs: Sequence[Job], think: Callable[[], float]) -> Job:
    """The first of these; each of the others comes some seconds after the one before has ended."""
    for job, follower in zip(jobs, jobs[1:]):
        job.followers.append((think(), follower))
    return jobs[0]


def batch(rng: random.Random, client: str, model: str, number: int, at: float) -> list[Job]:
    """A program that has so many requests to ask, a few at a time."""
    jobs = [Job(client, model, length(rng, model), arrives=at) for _ in range(number)]
    several = min(number, rng.randint(3, 8))
    return [chain(jobs[place::several], lambda: rng.uniform(0.01, 0.3)) for place in range(several)]


def conversation(rng: random.Random, client: str, model: str, turns: int, at: float) -> Job:
    """Somebody who reads what came and asks again."""
    jobs = [Job(client, model, length(rng, model), arrives=at) for _ in range(turns)]
    return chain(jobs, lambda: rng.uniform(4.0, 40.0))


def homelab(seed: int, hours: float = 4.0) -> list[Job]:
    """Two who chat, an agent, and batches of three programs that want other models."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    at = 0.0
    while at < hours * 3600.0:
        for place, model in enumerate(rng.sample(("embed", "small", "large"), rng.choice((2, 3)))):
            jobs += batch(rng, f"batch{place}", model, rng.randint(40, 90), at + rng.uniform(0, 20))
        for client, model in (("alice", "large"), ("bob", "small")):
            if rng.random() < 0.6:
                start = at + rng.uniform(0.0, 200.0)
                jobs.append(conversation(rng, client, model, rng.randint(2, 6), start))
        if rng.random() < 0.4:
            turns = [Job("agent", "large", length(rng, "large"), arrives=at) for _ in range(15)]
            jobs.append(chain(turns, lambda: rng.uniform(0.1, 1.0)))
        at += rng.uniform(700.0, 1200.0)
    return unsure(rng, jobs)


def lab(seed: int, hours: float = 4.0) -> list[Job]:
    """Five people with four models, each with a batch now and then, and one who only chats."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    models = ("embed", "small", "large", "code", "small")
    for client, model in zip(("ann", "ben", "cleo", "dan", "eve"), models):
        at = rng.uniform(0.0, 60.0)
        while at < hours * 3600.0:
            jobs += batch(rng, client, model, rng.randint(20, 70), at)
            at += rng.uniform(300.0, 700.0)
    for start in range(100, int(hours * 3600.0), 900):
        jobs.append(conversation(rng, "fay", "large", rng.randint(2, 6), start))
    return unsure(rng, jobs)


def unsure(rng: random.Random, firsts: list[Job]) -> list[Job]:
    """A few give up, and a few attempts fail halfway; of chains too."""
    todo = list(firsts)
    while todo:
        job = todo.pop()
        todo += [follower for _, follower in job.followers]
        if rng.random() < 0.03:
            job.patience = rng.uniform(20.0, 200.0)
        job.fails = int(rng.random() < 0.02)
    return firsts


TRACES = {
    "homelab": lambda seed: Trace("homelab", lambda: homelab(seed), LOADS, {"a": MODELS}),
    "lab": lambda seed: Trace("lab", lambda: lab(seed), LOADS, {"a": MODELS, "b": MODELS}),
}


def simulate(trace: Trace, policy: str, *, foretell: bool = False) -> Simulation:
    """The trace under that policy, to its end."""
    sim = Simulation(trace.settings, POLICIES[policy], foretell and policy == "llmq")
    for name, models in trace.backends.items():
        sim.add(name, models, slots=trace.slots.get(name, 1), load=trace.load)
    sim.plan(trace.jobs())
    sim.run()
    return sim


def served_of(sim: Simulation) -> list[Served]:
    """What started and ended, as a log would have it."""
    return [
        Served(one.job.client, one.job.model, one.backend, one.arrived, one.started, one.ended,
               one.outcome)
        for one in sim.visits
        if one.started is not None and one.ended is not None
    ]  # fmt: skip


# ---- What is counted


@dataclass
class Figures:
    """What a policy did; seconds."""

    waits: dict[str, list[float]]  # by client
    behind: dict[str, float]  # by client: waited while others were served
    loads: int
    again: int  # loads of a model that was put out less than 15 minutes before, A-B-A
    span: float  # from the first arrival to the last end
    seconds: dict[str, float]  # by client: served
    given_up: int = 0

    @property
    def loads_a_day(self) -> float:
        return self.loads * DAY / self.span if self.span else 0.0


def figures(served: Sequence[Served], given_up: int = 0) -> Figures:
    """The same figures for what was observed and for what was simulated."""
    waits: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for one in served:
        waits[one.client].append(one.started - one.arrived)
        seconds[one.client] += one.ended - one.started
    loads, again = changes(served)
    begin = min((one.arrived for one in served), default=0.0)
    span = max((one.ended for one in served), default=0.0) - begin
    return Figures(dict(waits), behind_others(served), loads, again, span, dict(seconds), given_up)


def changes(served: Sequence[Served]) -> tuple[int, int]:
    """How often a backend changed its model, and how often it changed back within 15 minutes."""
    loads = again = 0
    last: dict[str, str] = {}
    left: dict[tuple[str, str], float] = {}  # when a model was last put out
    for one in sorted(served, key=lambda each: each.started):
        before = last.get(one.backend, "")
        if one.model == before:
            continue
        loads += 1
        left[one.backend, before] = one.started
        again += one.started - left.get((one.backend, one.model), -math.inf) <= AGAIN
        last[one.backend] = one.model
    return loads, again


def behind_others(served: Sequence[Served]) -> dict[str, float]:
    """By client: the waits, less the time in which its own requests ran at the same backend."""
    own: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for one in sorted(served, key=lambda each: each.started):
        spans = own[one.client, one.backend]
        if spans and one.started <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], one.ended))
        else:
            spans.append((one.started, one.ended))
    found: dict[str, float] = defaultdict(float)
    for one in served:
        spans = own[one.client, one.backend]
        mine = sum(max(0.0, min(b, one.started) - max(a, one.arrived)) for a, b in spans)
        found[one.client] += max(0.0, one.started - one.arrived - mine)
    return dict(found)


def eta_hits(sim: Simulation) -> tuple[int, int]:
    """Starts whose wait was foretold within a factor of 2 (or a second), and all foretold."""
    told = [(one.eta, one.wait) for one in sim.visits if one.eta is not None and one.started]
    good = [
        wait / 2 <= eta <= 2 * wait or abs(eta - wait) <= 1.0 for eta, wait in told
    ]
    return sum(good), len(good)


# ---- llmq's log


def read_log(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The records of requests in it, the first to arrive first; other lines are passed over."""
    records = []
    for line in lines:
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        if isinstance(facts, dict) and "outcome" in facts and facts.get("class") in llmq.CLASSES:
            facts["arrived"] = facts["time"] - facts["total_s"]
            records.append(facts)
    return sorted(records, key=lambda facts: facts["arrived"])


def observed(records: Sequence[dict[str, Any]]) -> list[Served]:
    """What the log says of those that reached a backend."""
    found = []
    for facts in records:
        if facts["backend"]:
            began = facts["arrived"] + facts["wait_s"]
            model = llmq.model_key(facts["model"])
            found.append(Served(facts["client"], model, facts["backend"], facts["arrived"], began,
                                facts["time"], facts["outcome"]))  # fmt: skip
    return found


def load_costs(records: Sequence[dict[str, Any]]) -> tuple[dict[str, float], set[str]]:
    """Seconds that a load takes, by model; and the ids of the requests that paid for one."""
    last: dict[str, str] = {}
    firsts: dict[tuple[str, bool], list[float]] = defaultdict(list)
    paid: set[str] = set()
    for facts in sorted(records, key=lambda one: one["arrived"] + one["wait_s"]):
        if not facts["backend"]:
            continue
        model = llmq.model_key(facts["model"])
        changed = last.get(facts["backend"]) != model
        last[facts["backend"]] = model
        if changed:
            paid.add(facts["id"])
        if facts["first_s"] is not None:
            firsts[model, changed].append(facts["first_s"] - facts["wait_s"])
    models = {model for model, _ in firsts}
    cold = {model: percentile(firsts[model, True], 0.5) for model in models}
    warm = {model: percentile(firsts[model, False], 0.5) for model in models}
    return {model: max(0.0, cold[model] - warm[model]) for model in models}, paid


def jobs_of_log(
    records: Sequence[dict[str, Any]],
    load: dict[str, float],
    paid: set[str],
    classes: dict[str, str],
) -> list[Job]:
    """The requests of the log as jobs; closed-loop ones follow the one that they followed."""
    first = records[0]["arrived"]
    ended: dict[str, list[tuple[float, Job]]] = defaultdict(list)  # by client
    jobs = []
    for facts in records:
        model = llmq.model_key(facts["model"])
        ran = facts["total_s"] - facts["wait_s"] if facts["backend"] else 0.0
        ran -= load.get(model, 0.0) if facts["id"] in paid else 0.0
        word = classes.get(facts["client"], facts["class"])
        job = Job(facts["client"], model, max(0.01, ran), llmq.PRIORITY_WORDS[word])
        job.arrives = facts["arrived"] - first
        if not facts["backend"]:
            job.patience = facts["total_s"]
        before = [(end, one) for end, one in ended[job.client] if end <= facts["arrived"]]
        cause = max(before, key=lambda pair: pair[0], default=None)
        if cause is not None and facts["arrived"] - cause[0] <= CLOSED:
            cause[1].followers.append((facts["arrived"] - cause[0], job))
        else:
            jobs.append(job)
        recent = [pair for pair in ended[job.client] if pair[0] > facts["arrived"] - CLOSED]
        ended[job.client] = [*recent, (facts["time"], job)]
    return jobs


def most_at_once(served: Sequence[Served], backend: str) -> int:
    """The most requests that ran at once there: that many slots it had, at least."""
    events = [(one.started, 1) for one in served if one.backend == backend]
    events += [(one.ended, -1) for one in served if one.backend == backend]
    most = running = 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    return max(1, most)


def trace_of_log(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> Trace:
    """The log as a trace; models that never shared a backend with another cost no load."""
    load, paid = load_costs(records)
    if options.load is not None:
        load = dict.fromkeys(load, options.load)
    served = observed(records)
    models: dict[str, set[str]] = defaultdict(set)
    for one in served:
        models[one.backend].add(one.model)
    every = {llmq.model_key(facts["model"]) for facts in records}
    spare = every - {one.model for one in served}  # that never ran: whoever asked gave up
    for names in models.values():
        names.update(spare)
    rows = {}
    for name in {*options.weight, *options.boost}:
        weight = float(options.weight.get(name, 1.0))
        rows[name] = llmq.ClientSettings(weight=weight, boost=name in options.boost)
    queue = llmq.QueueSettings(affinity=options.affinity, aging=options.aging, max_depth=10**6)
    return Trace(
        "the log",
        lambda: jobs_of_log(records, load, paid, options.priority),
        load,
        {name: tuple(sorted(names)) for name, names in sorted(models.items())},
        {name: most_at_once(served, name) for name in models},
        Settings(queue=queue, clients=rows),
    )


# ---- Words


def show(title: str, by_policy: dict[str, Figures]) -> None:
    """One block: a line for the whole, then one for each client and policy."""
    print(f"\n{title}")
    print(f"  {'policy':10}{'loads':>7}{'a day':>8}{'A-B-A':>7}{'span':>10}{'given up':>10}")
    for name, figure in by_policy.items():
        print(f"  {name:10}{figure.loads:7}{figure.loads_a_day:8.0f}{figure.again:7}"
              f"{figure.span:9.0f}s{figure.given_up:10}")  # fmt: skip
    clients = sorted({one for figure in by_policy.values() for one in figure.waits})
    print(f"\n  {'client':18}{'policy':10}{'n':>6}{'p50':>9}{'p90':>9}{'p99':>9}{'served':>10}"
          f"{'behind others':>15}")  # fmt: skip
    for client in clients[:40]:
        for name, figure in by_policy.items():
            waits = figure.waits.get(client, [])
            cells = [f"{percentile(waits, part):8.1f}s" for part in (0.5, 0.9, 0.99)]
            served, behind = figure.seconds.get(client, 0.0), figure.behind.get(client, 0.0)
            label = client if name == next(iter(by_policy)) else ""
            print(f"  {label:18.18}{name:10}{len(waits):6}{''.join(cells)}{served:9.0f}s"
                  f"{behind:14.0f}s")  # fmt: skip


def run_trace(trace: Trace, policies: Iterable[str]) -> dict[str, Figures]:
    found = {}
    for policy in policies:
        sim = simulate(trace, policy, foretell=True)
        left = sum(one.outcome == "cancelled" for one in sim.visits)
        found[policy] = figures(served_of(sim), left)
        hits, told = eta_hits(sim)
        if told:
            print(f"  {trace.name}: of {told} expected waits {100 * hits / told:.0f} % were within"
                  f" a factor of 2")  # fmt: skip
    return found


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE of an option; the name may hold a colon."""
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("log", nargs="?", type=Path, help="llmq's log, written as json")
    parser.add_argument("--weight", type=pair, action="append", default=[], metavar="CLIENT=N")
    parser.add_argument("--boost", action="append", default=[], metavar="CLIENT")
    parser.add_argument("--class", type=pair, action="append", default=[], metavar="CLIENT=CLASS",
                        dest="priority")  # fmt: skip
    parser.add_argument("--affinity", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--aging", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--load", type=float, metavar="SECONDS", help="that a load takes")
    parser.add_argument("--seed", type=int, default=1, help="of the traces")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where to put the plots")
    options = parser.parse_args()
    options.weight, options.priority = dict(options.weight), dict(options.priority)
    if options.log is None:
        found = {name: run_trace(make(options.seed), POLICIES) for name, make in TRACES.items()}
        for name, by_policy in found.items():
            show(f"{name}, seed {options.seed}", by_policy)
        if options.pictures:
            from tests.bench import plots

            plots.draw(found, options.pictures)
        return
    with options.log.open(encoding="utf-8", errors="replace") as lines:
        records = read_log(lines)
    if not records:
        sys.exit(f"{options.log}: no record of a request; llmq writes them with --log-format json")
    trace = trace_of_log(records, options)
    left = sum(not facts["backend"] for facts in records)
    costs = ", ".join(f"{model} {seconds:.1f} s" for model, seconds in sorted(trace.load.items()))
    print(f"{len(records)} requests; a load takes: {costs or 'nothing'}")
    seen = {"observed": figures(observed(records), left)}
    show(str(options.log), {**seen, **run_trace(trace, POLICIES)})


if __name__ == "__main__":
    main()
