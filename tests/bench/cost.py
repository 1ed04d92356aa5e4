#!/usr/bin/env python3
"""What one turn of the queue costs: submit + dispatch + finish, with many waiting.

    python3 -m tests.bench.cost [--turns 3000] [--rounds 3]

Each turn one request comes, one that runs ends, and whoever is next starts.  With 1,000 or 10,000
waiting, of 100 clients and 10 models at 8 backends, with weights, a boost and caps; and with one
client, one model and one backend.  Microseconds of CPU, so that a busy neighbour counts for little; compare within one run only.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import llmq
from llmq import Client, ClientSettings, ModelSettings, Priority, Scheduler, Ticket, Want

SHAPES = {  # clients, models, backends, caps
    "100 clients, 10 models, 8 backends, caps": (100, 10, 8, True),
    "100 clients, 10 models, 8 backends": (100, 10, 8, False),
    "1 client, 1 model, 1 backend": (1, 1, 1, False),
}
DEPTHS = (0, 1000, 10_000)


def build(clients: int, models: int, backends: int, caps: bool) -> tuple[Scheduler, list[Client]]:
    """A queue whose backends are up, and those who ask."""
    rows = {"m0": ModelSettings(max_concurrent=2)} if caps else {}
    settings = llmq.Settings(queue=llmq.QueueSettings(max_depth=50_000), models=rows)
    fleet = llmq.Fleet()
    fleet.model_settings = rows
    names = tuple(f"m{number}" for number in range(models))
    for number in range(backends):
        name = f"b{number}"
        row = llmq.BackendSettings(url=f"http://{name}:1", kind="ollama" if caps else "openai")
        loaded = names[number % models : number % models + 2] if caps else names
        news = llmq.Report(row.kind, (), names, loaded, 0.0)
        fleet.add(name, row, name, 2).succeeded(0.0, news, 10.0)
    people = [Client(f"c{number}") for number in range(clients)]
    if caps:
        for place, client in enumerate(people):
            cap = 1 if place % 5 == 0 else 0
            client.settings = ClientSettings(
                weight=1.0 + place % 3, boost=place == 7, max_concurrent=cap
            )
    return Scheduler(fleet, settings), people


def turns(shape: str, depth: int, number: int) -> list[float]:
    """Microseconds of so many turns, each with so many waiting."""
    clients, models, backends, caps = SHAPES[shape]
    queue, people = build(clients, models, backends, caps)
    rng = random.Random(depth)
    now = 0.0

    def ticket(ident: int) -> Ticket:
        client, model = rng.choice(people), f"m{rng.randrange(models)}"
        priority = Priority(rng.choice((0, 1, 1, 1, 2))) if caps else Priority.NORMAL
        return Ticket(f"t{ident}", client, Want(model, (llmq.CHAT,)), priority, 1000)

    for ident in range(depth):
        queue.submit(ticket(ident), now)
    queue.dispatch(now)
    took = []
    for ident in range(depth, depth + number):
        now += rng.uniform(0.1, 2.0)
        new = ticket(ident)
        ending = queue.running[rng.choice(list(queue.running))] if queue.running else None
        if ending is not None and ending.backend is not None:
            ending.backend.last_received = now
            ending.backend.loaded_now(ending.model, now)
        begin = time.thread_time_ns()
        if ending is not None:
            queue.finish(ending, now)
        queue.submit(new, now)
        queue.dispatch(now)
        took.append((time.thread_time_ns() - begin) / 1000)
        if ident % 50 == 0:
            queue.expire(now)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=3000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    gc.collect()
    gc.freeze()  # as the service does
    gc.set_threshold(50_000)
    print(f"{'µs a turn':44}{'waiting':>9}{'median':>9}{'p99':>9}")
    for shape in SHAPES:
        for depth in DEPTHS:
            rounds = [turns(shape, depth, options.turns) for _ in range(options.rounds)]
            best = min(rounds, key=statistics.median)
            p99 = statistics.quantiles(best, n=100)[-1]
            print(f"{shape:44}{depth:9,}{statistics.median(best):9.1f}{p99:9.1f}")


if __name__ == "__main__":
    main()
