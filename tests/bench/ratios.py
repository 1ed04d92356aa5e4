#!/usr/bin/env python3
"""Hold one target's results against what is asked of it: every ratio paired by round, then median.

    python3 ratios.py FOLDER/results/*.json

Reads the files of run_peers.py and prints a Markdown table: what was measured, over which rounds it
varied, what it must be, what it aims at.  A ratio compares two targets within one round (the same
minutes of the same machine); absolute times of different machines or hours say little.
"""
import argparse
import json
import statistics
from dataclasses import dataclass
from typing import Optional

from bench import dig

STREAM_CPU = "stream.paced_1x400.through.cpu_us_per_token"
REQUEST_CPU = "throughput.c64.cpu_us_per_request"

PROMISES = ("gap", "gaplive", "latency", "throughput", "stream", "priority", "depth", "abandon",
            "fidelity", "memory")
NEVER = ("unanswered", "stayed_unanswered", "lost", "failed", "error", "overlaps")
TALLIES = ("answers", "urgent_answers", "normal_answers", "stayed")


@dataclass(frozen=True)
class Demand:
    """One row: a figure of the target, alone or as a ratio to a peer's or to its own other one."""

    label: str
    key: str
    must: Optional[float]
    aim: float
    peer: str = ""             # a ratio to this target's figure of the same round
    per: str = ""              # ... or of this key instead of `key`
    least: bool = False        # must be at least, not at most
    worst: bool = False        # a promise is as good as its worst round, a cost as its median


DEMANDS = [
    Demand("dispatch gap / direct client", "gap.gap_us.median", 1.5, 1.0, "direct"),
    Demand("dispatch gap / llm-queue", "gap.gap_us.median", 0.45, 0.25, "llm-queue"),
    Demand("gap p99 / own median", "gap.gap_us.p99", 4, 2, per="gap.gap_us.median"),
    Demand("gap at 5,000 waiting / at 100", "depth.ratio", 1.4, 1.1),
    Demand("added latency / nginx", "latency.whole.added_us.median", 2.5, 1.5, "nginx"),
    Demand("added first token / nginx", "latency.first_token.added_us.median", 2.2, 1.5, "nginx"),
    Demand("CPU per paced token / nginx", STREAM_CPU, 2.5, 1.6, "nginx"),
    Demand("requests/s, 64 clients / llm-queue", "throughput.c64.per_second", 2, 3, "llm-queue",
           least=True),
    Demand("CPU per request / llm-queue", REQUEST_CPU, 0.35, 0.2, "llm-queue"),
    Demand("normals started before an urgent one, worst", "priority.normal_started_before_urgent",
           1, 0, worst=True),
    Demand("abandoned while waiting, still run (of 90)", "abandon.still_sent_to_backend", 0, 0,
           worst=True),
    Demand("mid-stream leave reaches the backend, worst, ms", "hangup.stopped_after_ms.max", 20, 5,
           worst=True),
    Demand("... when no token comes, worst, ms", "hangup.silent.stopped_after_ms.max", None, 5,
           worst=True),
    Demand("... leaves never noticed (of 10)", "hangup.ran_to_the_end", 0, 0, worst=True),
    Demand("KB per waiting 8 KB request", "memory.kb_per_waiting", 24, 14),
    Demand("idle RSS, MB", "startup.idle_rss_mb", 32, 28),
    Demand("start-up / llm-queue", "startup.seconds.median", 1.4, 1.0, "llm-queue"),
    Demand("at the backend at once, with time limits", "overrun.max_concurrency", 1, 1,
           worst=True),
]


def read(files):
    """{target name: {round: results}}; files of the same target and round are merged."""
    out = {}
    for path in files:
        with open(path) as src:
            data = json.load(src)
        out.setdefault(data["name"], {}).setdefault(data["round"], {}).update(data["results"])
    return out


def figure(results, key):
    value = dig(results, key)
    if isinstance(value, list):
        return max(value, default=None)
    if key == "hangup.ran_to_the_end" and value is not None:
        return value + dig(results, "hangup.silent.ran_to_the_end")
    return value


def by_round(table, name, demand):
    """The demand's figure in each round that has it."""
    out = []
    for number, results in sorted(table.get(name, {}).items()):
        value = figure(results, demand.key)
        if demand.peer or demand.per:
            other = table.get(demand.peer or name, {}).get(number, {})
            base = figure(other, demand.per or demand.key)
            value = value / base if value is not None and base else None
        if value is not None:
            out.append(value)
    return out


def verdict(value, demand):
    def reached(goal):
        return value >= goal if demand.least else value <= goal

    if reached(demand.aim):
        return "aim"
    if demand.must is None:
        return "aim missed"
    return "must" if reached(demand.must) else "**missed**"


def rows(table, name):
    for demand in DEMANDS:
        values = by_round(table, name, demand)
        if not values:
            continue
        value = max(values) if demand.worst else statistics.median(values)
        sign = ">=" if demand.least else "<="
        must = "-" if demand.must is None else f"{sign} {demand.must:g}"
        spread = f"{value:.3g} ({min(values):.3g}..{max(values):.3g}, n={len(values)})"
        yield [demand.label, spread, must, f"{demand.aim:g}", verdict(value, demand)]


def broken_promises(table, name):
    """Answers other than 200, answers that never came or came changed, two requests at a time."""
    for number, results in sorted(table[name].items()):
        for scenario in PROMISES:
            for key, value in flat(results.get(scenario, {})):
                if not kept(scenario, *key.split("."), value=value):
                    yield f"round {number}, {scenario}: {key} = {value}"


def kept(scenario, *path, value):
    *above, last = path
    if last in NEVER:
        return not value
    if last == "max_concurrency":
        return value == 1
    if any(part in TALLIES for part in above):
        return last == "200"
    if scenario == "fidelity" and last != "took_s":
        return value == "whole"
    return True


def flat(tree, path=""):
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from flat(value, f"{path}.{key}" if path else key)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("files", nargs="+")
    ap.add_argument("--target", default="llmq")
    args = ap.parse_args()
    table = read(args.files)
    if args.target not in table:
        ap.error(f"no results of {args.target} in these files")
    print("| what | measured (min..max over rounds) | must | aim | reached |")
    print("|---|---|---|---|---|")
    for row in rows(table, args.target):
        print("| " + " | ".join(row) + " |")
    tries = sum(dig(r, "priority.urgent_served") or 0 for r in table[args.target].values())
    broken = list(broken_promises(table, args.target))
    print(f"\nUrgent tries: {tries}. Answers lost, refused or changed, or two at a time: "
          f"{len(broken) or 'none'}")
    for line in broken:
        print("- " + line)


if __name__ == "__main__":
    main()
