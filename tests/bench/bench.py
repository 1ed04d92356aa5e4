#!/usr/bin/env python3
"""Benchmark of a queue or proxy before a local LLM backend: its price, and if it keeps its word.

    bench.py run --url http://127.0.0.1:11500 --profile llmq --pid 1234 --out results/llmq.1.json
    bench.py startup --url http://127.0.0.1:11500 --profile llmq --cmd 'python3 llmq.py'
    bench.py report results/*.json

`run` needs mock_backend.py running (--backend) and the target running in front of it; run_peers.py
starts both, for several targets in turn.  Standard library only.  It talks to 127.0.0.1 only, and
every scenario is bounded in time.  All clocks are CLOCK_MONOTONIC, which the processes of one
machine share, so a time taken in the backend can be subtracted from one taken here.

Scenarios (--only a,b,...):
  memory     RSS idle, with 2,000 requests of 8 KB waiting, and after they are done
  latency    one request at a time on an idle queue, alternating with direct to the backend
  gap        N queued requests of --service-ms: idle time of the backend between two requests
  gaplive    the same work, but 32 clients that each ask again as soon as they are answered
  throughput closed loop, no service time, concurrency 1, 16, 64
  stream     tokens relayed: 1 stream flat out, 1 stream paced, 50 streams paced
  priority   normal requests of 20 ms queued; --urgent urgent ones come in while they are run
  depth      the gap with 100 and with --deep requests waiting
  abandon    100 waiting, 90 of those clients hang up: how many of the 90 still reach the backend
  hangup     a client leaves in mid-stream, between tokens and in a silence: when the backend knows
  fidelity   an answer with <, > and & escaped the way Go's JSON encoder does (as Ollama sends
             them), and non-ASCII text in the question: does it come through whole?
  overrun    (not by default) five requests of --overrun-ms to a target that was started with a
             shorter time limit: does it let a second one in while the first is still running?
"""
import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from urllib.parse import urlsplit

now = time.monotonic_ns
MARK = re.compile(rb"t=(\d+);")
# How each target is spoken to.  path: where chat requests go; body/headers: what every request
# carries; urgent_*: what makes one urgent (None: the target knows no priority); queue: it holds
# requests back itself; stream/fanout: it streams / it can run 50 requests at once.
PROFILES = {
    "direct": {"health": "/api/version", "queue": False},
    "nginx": {"health": "/api/version", "queue": False},
    "llm-queue": {"urgent_body": {"priority": True}, "fanout": False},
    "llmq": {"urgent_body": {"priority": True}, "fanout": False},
    "llmq-50": {"urgent_body": {"priority": True}, "queue": False},
    "generic": {},
}
DEFAULTS = {"path": "/v1/chat/completions", "health": "/health", "body": {}, "headers": {},
            "urgent_body": None, "urgent_headers": None, "queue": True, "stream": True,
            "fanout": True, "model": "mock:1b"}


def profile_of(args):
    out = dict(DEFAULTS)
    out.update(PROFILES[args.profile])
    for key in ("path", "health", "model"):
        if getattr(args, key, None):
            out[key] = getattr(args, key)
    for key in ("body", "headers", "urgent_body", "urgent_headers"):
        if getattr(args, key, None):
            out[key] = json.loads(getattr(args, key))
    return out


def local(url):
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost"):
        raise SystemExit(f"only 127.0.0.1 is measured, not {parts.hostname!r}")
    return "127.0.0.1", parts.port or 80


# ---------------------------------------------------------------- figures

def pct(values, share):
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values, unit=1.0, digits=1):
    """Median and tail of a list, divided by unit."""
    if not values:
        return {"n": 0}
    out = {"n": len(values), "median": statistics.median(values), "p90": pct(values, .9),
           "p99": pct(values, .99), "max": max(values), "mean": statistics.fmean(values)}
    return {k: (v if k == "n" else round(v / unit, digits)) for k, v in out.items()}


def family(pid):
    """pid and all its descendants."""
    out, todo = [], [pid]
    while todo:
        one = todo.pop()
        out.append(one)
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children") as src:
                    todo += [int(x) for x in src.read().split()]
        except OSError:
            pass
    return out


def cpu_ns(pid):
    """CPU time in ns of a process, its threads and its descendants, dead children included.

    /proc/PID/stat counts in 10 ms ticks, which is too coarse here, so living threads are read
    from schedstat (ns); only reaped children come from stat.  Falls back to stat throughout."""
    if not pid:
        return None
    total = 0
    tick = 1e9 / os.sysconf("SC_CLK_TCK")
    for one in family(pid):
        try:
            with open(f"/proc/{one}/stat") as src:
                stat = src.read().rsplit(")", 1)[1].split()
            total += (int(stat[13]) + int(stat[14])) * tick
            try:
                for task in os.listdir(f"/proc/{one}/task"):
                    with open(f"/proc/{one}/task/{task}/schedstat") as src:
                        total += int(src.read().split()[0])
            except OSError:
                total += (int(stat[11]) + int(stat[12])) * tick
        except (OSError, IndexError):
            pass
    return total


def rss_mb(pid):
    """Resident MB of a process and its descendants (rss), and with shared pages split (pss)."""
    if not pid:
        return None
    rss = pss = 0
    for one in family(pid):
        try:
            with open(f"/proc/{one}/smaps_rollup") as src:
                text = src.read()
            rss += int(re.search(r"^Rss:\s+(\d+)", text, re.M).group(1))
            pss += int(re.search(r"^Pss:\s+(\d+)", text, re.M).group(1))
        except (OSError, AttributeError):
            pass
    return {"rss": round(rss / 1024, 1), "pss": round(pss / 1024, 1)}


# ---------------------------------------------------------------- client

class Answer:
    __slots__ = ("body", "done", "error", "first", "lags", "sent", "status", "token")

    def __init__(self):
        self.sent = self.first = self.token = self.done = self.status = 0
        self.lags, self.body, self.error = [], b"", ""

    @property
    def ok(self):
        return self.status == 200 and not self.error


class Conn(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection, one request at a time."""

    def __init__(self):
        self.answer = None
        self.future = None
        self.closed = False

    def connection_made(self, transport):
        self.transport = transport

    def request(self, data):
        self.answer = Answer()
        self.future = asyncio.get_running_loop().create_future()
        self.buf = b""
        self.read = self.read_head
        self.tail = b""
        self.pieces = []
        if self.closed:
            self.fail("connection was closed")
        else:
            self.answer.sent = now()
            self.transport.write(data)
        return self.future

    def fail(self, text):
        if self.future is not None and not self.future.done():
            self.answer.error = text
            self.answer.done = now()
            self.future.set_result(self.answer)

    def connection_lost(self, exc):
        self.closed = True
        if self.future is not None and not self.future.done():
            if self.read == self.read_rest:
                self.finish(now())
            else:
                self.fail("connection lost " + (str(exc) if exc else "(closed by peer)"))

    def finish(self, stamp):
        self.answer.done = stamp
        self.answer.body = b"".join(self.pieces)[-400:]
        if self.keep is False:
            self.closed = True
            self.transport.close()
        if not self.future.done():
            self.future.set_result(self.answer)

    def take(self, data, stamp):
        ans = self.answer
        if not ans.first:
            ans.first = stamp
        self.pieces.append(data)
        text = self.tail + data
        end = 0
        for hit in MARK.finditer(text):
            ans.lags.append(stamp - int(hit.group(1)))
            end = hit.end()
        if end and not ans.token:
            ans.token = stamp
        self.tail = text[end:][-32:]

    def data_received(self, data):
        stamp = now()
        if self.future is not None and not self.future.done():
            self.read(data, stamp)

    def read_head(self, data, stamp):
        self.buf += data
        split = self.buf.find(b"\r\n\r\n")
        if split < 0:
            return
        head = self.buf[:split].lower()
        rest, self.buf = self.buf[split + 4:], b""
        self.answer.status = int(head[9:12])
        self.keep = b"connection: close" not in head
        size = re.search(rb"\r\ncontent-length:\s*(\d+)", head)
        if b"transfer-encoding: chunked" in head:
            self.read = self.read_chunked
        elif size:
            self.read, self.left = self.read_sized, int(size.group(1))
        else:
            self.read, self.keep = self.read_rest, False
        self.read(rest, stamp)

    def read_sized(self, data, stamp):
        if data:
            self.take(data, stamp)
            self.left -= len(data)
        if self.left <= 0:
            self.finish(stamp)

    def read_chunked(self, data, stamp):
        buf, at, got, last = self.buf + data, 0, [], False
        while not last:
            end = buf.find(b"\r\n", at)
            if end < 0:
                break
            size = int(buf[at:end].split(b";")[0], 16)
            if len(buf) < end + 4 + size:
                break
            got.append(buf[end + 2:end + 2 + size])
            at = end + 4 + size
            last = size == 0
        self.buf = buf[at:]
        if any(got):
            self.take(b"".join(got), stamp)
        if last:
            self.finish(stamp)

    def read_rest(self, data, stamp):
        if data:
            self.take(data, stamp)


class Side:
    """One HTTP address with its way of being asked."""

    def __init__(self, url, profile):
        self.addr = local(url)
        self.profile = profile

    async def connect(self):
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Conn, *self.addr))[1]

    def message(self, ident="0", stream=False, size=0, urgent=False):
        prof = self.profile
        text = f"#id={ident}# Say something."
        text += "y" * max(0, size - len(text))
        body = {"model": prof["model"], "messages": [{"role": "user", "content": text}],
                "stream": stream}
        body.update(prof["body"])
        headers = dict(prof["headers"])
        if urgent:
            body.update(prof["urgent_body"] or {})
            headers.update(prof["urgent_headers"] or {})
        data = json.dumps(body).encode()
        extra = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        host, port = self.addr
        head = (f"POST {prof['path']} HTTP/1.1\r\nHost: {host}:{port}\r\n"
                f"Content-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n")
        return head.encode() + data


async def plain(addr, method, path, body=b""):
    loop = asyncio.get_running_loop()
    conn = (await loop.create_connection(Conn, *addr))[1]
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    data = head.encode() + body
    conn.request(data)
    await conn.future
    whole = b"".join(conn.pieces)
    conn.transport.close()
    return conn.answer.status, whole


class Bench:
    def __init__(self, args, profile):
        self.args = args
        self.back = Side(args.backend, dict(DEFAULTS, **PROFILES["direct"]))
        self.side = Side(args.url, profile)
        self.profile = profile
        self.pid = args.pid

    async def control(self, path, **settings):
        _, body = await plain(self.back.addr, "POST" if settings else "GET", path,
                              json.dumps(settings).encode() if settings else b"")
        return json.loads(body)

    async def fresh(self, **settings):
        base = {"service_ms": 0, "tokens": 16, "delay_ms": 0, "first_ms": 0, "hold": False,
                "reply_bytes": 24, "html": False, **settings}
        for _ in range(100):                       # let leftovers of the last scenario drain
            if (await self.control("/_stats"))["active"] == 0:
                break
            await asyncio.sleep(0.1)
        await self.control("/_config", **base)
        await self.control("/_reset")

    async def records(self):
        stats = await self.control("/_stats?records=1")
        cols = stats.pop("columns")
        return stats, [dict(zip(cols, row)) for row in stats.pop("records")]

    async def settle(self, least=0.4, most=25.0):
        """Wait until the target has stopped working on what it was sent."""
        began = time.monotonic()
        if not self.pid:
            await asyncio.sleep(max(least, 1.5))
            return
        await asyncio.sleep(least)
        calm = 0
        while time.monotonic() - began < most:
            before = cpu_ns(self.pid)
            await asyncio.sleep(0.1)
            calm = calm + 1 if cpu_ns(self.pid) - before < 6e6 else 0
            if calm >= 3:
                return

    async def flood(self, count, size=0, start=0, batch=32):
        """Open `count` connections and put one request on each; returns futures, connections."""
        conns, futures = [], []
        for at in range(0, count, batch):
            some = await asyncio.gather(*[self.side.connect()
                                          for _ in range(min(batch, count - at))])
            for conn in some:
                conns.append(conn)
                ident = str(start + len(futures))
                futures.append(conn.request(self.side.message(ident, size=size)))
            await asyncio.sleep(0)
        return futures, conns

    @staticmethod
    def tally(answers):
        out = {}
        for one in answers:
            key = one.error or str(one.status)
            out[key] = out.get(key, 0) + 1
        return out

    @staticmethod
    def close(conns):
        for conn in conns:
            conn.transport.close()

    def gaps(self, rows):
        """Idle times of the backend: from one finish to the next arrival, in time order."""
        rows = sorted((r for r in rows if r["finish"]), key=lambda r: r["arrive"])
        idle, overlaps, edge = [], 0, None
        for row in rows:
            if edge is not None:
                if row["arrive"] < edge:
                    overlaps += 1
                else:
                    idle.append(row["arrive"] - edge)
            edge = max(edge or 0, row["finish"])
        return rows, idle, overlaps

    async def backlog(self, count, service_ms, size=0):
        await self.fresh(service_ms=service_ms, hold=True)
        t0 = now()
        futures, conns = await self.flood(count, size)
        sent = now()
        await self.settle()
        cpu = cpu_ns(self.pid)
        ready = await self.control("/_stats")
        await self.control("/_release")
        limit = 20 + count * service_ms / 1e3 * 3 + count * 0.01
        _, pending = await asyncio.wait(futures, timeout=limit)
        used = cpu_ns(self.pid)
        answers = [f.result() for f in futures if f.done()]
        stats, rows = await self.records()
        self.close(conns)
        rows, idle, overlaps = self.gaps(rows)
        work = rows[1:]                                       # the first one was held
        busy = sum(r["finish"] - r["arrive"] for r in work)
        span = rows[-1]["finish"] - rows[0]["finish"] if len(rows) > 1 else 0
        order = [int(r["id"]) for r in rows if r["id"].isdigit()]
        out = {"waiting": count, "service_ms": service_ms, "gap_us": spread(idle, 1e3),
               "share_of_ideal": round(busy / span, 4) if span and not overlaps else None,
               "per_second": round(len(work) / (span / 1e9), 1) if span else None,
               "overlaps": overlaps, "max_concurrency": stats["max_concurrency"],
               "at_backend_while_held": ready["requests"], "answers": self.tally(answers),
               "unanswered": len(pending), "reached_backend": len(rows),
               "out_of_order": sum(1 for a, b in zip(order, order[1:]) if b < a),
               "enqueue_seconds": round((sent - t0) / 1e9, 3)}
        if self.pid:
            out["cpu_us_per_request"] = round((used - cpu) / 1e3 / max(1, len(work)), 1)
        return out, idle

    # ------------------------------------------------------------ scenarios

    async def gap(self):
        if self.profile["queue"]:
            out, _ = await self.backlog(self.args.waiting, self.args.service_ms)
            return out
        return await self.closed_gap(1, self.args.waiting)

    async def closed_gap(self, clients, count):
        """For what has no queue: the same idle time, with the client asking again at once."""
        await self.fresh(service_ms=self.args.service_ms)
        conns = [await self.side.connect() for _ in range(clients)]
        cpu = cpu_ns(self.pid)
        answers = []
        todo = iter(range(count))

        async def client(conn):
            for number in todo:
                answers.append(await conn.request(self.side.message(str(number))))
                if conn.closed:
                    conn = await self.side.connect()
                    conns.append(conn)

        await asyncio.gather(*[client(c) for c in conns])
        used = cpu_ns(self.pid)
        stats, rows = await self.records()
        self.close(conns)
        rows, idle, overlaps = self.gaps(rows)
        span = rows[-1]["finish"] - rows[0]["arrive"]
        busy = sum(r["finish"] - r["arrive"] for r in rows)
        out = {"waiting": clients, "closed_loop": True, "service_ms": self.args.service_ms,
               "gap_us": spread(idle, 1e3), "overlaps": overlaps,
               "share_of_ideal": round(busy / span, 4) if not overlaps else None,
               "per_second": round(len(rows) / (span / 1e9), 1),
               "max_concurrency": stats["max_concurrency"], "answers": self.tally(answers)}
        if self.pid:
            out["cpu_us_per_request"] = round((used - cpu) / 1e3 / max(1, len(rows)), 1)
        return out

    async def gaplive(self):
        if not self.profile["queue"]:
            return None
        return await self.closed_gap(32, self.args.waiting)

    async def latency(self):
        out = {}
        pairs = self.args.pairs
        for kind, stream in (("whole", False), ("first_token", True)):
            if stream and not self.profile["stream"]:
                continue
            # a stream's later tokens come 5 ms apart, so a relay that waits for the end shows
            await self.fresh(tokens=4, delay_ms=5 if stream else 0)
            a, b = await self.back.connect(), await self.side.connect()
            direct, through, diff, bad = [], [], [], 0
            rounds = pairs if not stream else max(50, pairs // 4)
            for i in range(rounds + 20):
                one = await a.request(self.back.message("d", stream))
                two = await b.request(self.side.message("p", stream))
                if b.closed:
                    b = await self.side.connect()
                if i < 20:
                    continue
                if not two.ok or (stream and not two.token):
                    bad += 1
                    continue
                x = (one.token if stream else one.done) - one.sent
                y = (two.token if stream else two.done) - two.sent
                direct.append(x)
                through.append(y)
                diff.append(y - x)
            out[kind] = {"direct_us": spread(direct, 1e3), "through_us": spread(through, 1e3),
                         "added_us": spread(diff, 1e3), "failed": bad}
            self.close([a, b])
        return out

    async def streams(self, side, count, tokens, delay_ms, pid):
        await self.fresh(tokens=tokens, delay_ms=delay_ms)
        conns = await asyncio.gather(*[side.connect() for _ in range(count)])
        cpu = cpu_ns(pid)
        t0 = now()
        answers = await asyncio.gather(*[c.request(side.message("s", True)) for c in conns])
        took = now() - t0
        used = cpu_ns(pid)
        self.close(conns)
        got = sum(len(a.lags) for a in answers)
        out = {"tokens": got, "expected": count * tokens, "seconds": round(took / 1e9, 3),
               "tokens_per_second": round(got / (took / 1e9)),
               "lag_us": spread([x for a in answers for x in a.lags], 1e3),
               "answers": self.tally(answers)}
        if pid and got:
            out["cpu_us_per_token"] = round((used - cpu) / 1e3 / got, 2)
        return out

    async def stream(self):
        if not self.profile["stream"]:
            return None
        plan = [("flat_out_1x2000", 1, 2000, 0), ("paced_1x400", 1, 400, 2.5)]
        if self.profile["fanout"]:
            plan += [("paced_50x100", 50, 100, 20.0)]
        out = {}
        for name, count, tokens, delay in plan:
            runs = {"direct": [], "through": []}
            for _ in range(self.args.stream_runs):
                runs["direct"].append(await self.streams(self.back, count, tokens, delay, None))
                runs["through"].append(
                    await self.streams(self.side, count, tokens, delay, self.pid))
            best = {}
            for key, many in runs.items():
                best[key] = {"tokens": min(m["tokens"] for m in many),
                             "expected": count * tokens,
                             "tokens_per_second": statistics.median(
                                 m["tokens_per_second"] for m in many),
                             "lag_us_median": statistics.median(
                                 m["lag_us"].get("median") or 0 for m in many),
                             "lag_us_p99": statistics.median(
                                 m["lag_us"].get("p99") or 0 for m in many),
                             "answers": many[0]["answers"]}
                cpu = [m["cpu_us_per_token"] for m in many if "cpu_us_per_token" in m]
                if cpu:
                    best[key]["cpu_us_per_token"] = statistics.median(cpu)
            best["added_lag_us_median"] = round(best["through"]["lag_us_median"]
                                                - best["direct"]["lag_us_median"], 1)
            out[name] = best
        return out

    async def throughput(self):
        return {f"c{clients}": await self.closed_loop(clients) for clients in (1, 16, 64)}

    async def closed_loop(self, clients):
        """Every client asks again as soon as it is answered, for --seconds."""
        await self.fresh()
        conns = list(await asyncio.gather(*[self.side.connect() for _ in range(clients)]))
        data = self.side.message("t")
        answers = []
        cpu = cpu_ns(self.pid)
        end = time.monotonic() + self.args.seconds
        t0 = now()

        async def client(conn):
            while time.monotonic() < end:
                try:
                    answers.append(await asyncio.wait_for(conn.request(data), 20))
                except asyncio.TimeoutError:
                    return 1
                if conn.closed:
                    conn = await self.side.connect()
                    conns.append(conn)
            return 0

        lost = sum(await asyncio.gather(*[client(c) for c in list(conns)]))
        took = now() - t0
        used = cpu_ns(self.pid)
        stats = await self.control("/_stats")
        self.close(conns)
        good = [a for a in answers if a.ok]
        out = {"per_second": round(len(good) / (took / 1e9), 1),
               "latency_us": spread([a.done - a.sent for a in good], 1e3),
               "answers": self.tally(answers), "lost": lost,
               "max_concurrency": stats["max_concurrency"]}
        if self.pid and good:
            out["cpu_us_per_request"] = round((used - cpu) / 1e3 / len(good), 1)
        return out

    async def priority(self):
        prof = self.profile
        if not prof["queue"] or (prof["urgent_body"] is None and prof["urgent_headers"] is None):
            return None
        pause = random.Random(7)                   # urgent ones come at any point of a normal's run
        await self.fresh(service_ms=20, hold=True)
        futures, conns = await self.flood(max(500, 20 * self.args.urgent))
        await self.settle()
        await self.control("/_release")
        await asyncio.sleep(0.3)
        urgent = []
        for number in range(self.args.urgent):
            conn = await self.side.connect()
            try:
                urgent.append(await asyncio.wait_for(
                    conn.request(self.side.message(f"u{number}", urgent=True)), 25))
            except asyncio.TimeoutError:
                urgent.append(conn.answer)
            conns.append(conn)
            await asyncio.sleep(pause.uniform(0.15, 0.35))
        await asyncio.wait(futures, timeout=30 + len(futures) * 0.05)
        stats, rows = await self.records()
        self.close(conns)
        came = {r["id"]: r["arrive"] for r in rows}
        ahead, took = [], []
        for number, ans in enumerate(urgent):
            stamp = came.get(f"u{number}")
            if stamp is None or not ans.done:
                continue
            ahead.append(sum(1 for r in rows if not r["id"].startswith("u")
                             and ans.sent < r["arrive"] < stamp))
            took.append(ans.done - ans.sent)
        order = [int(r["id"]) for r in sorted(rows, key=lambda r: r["arrive"])
                 if r["id"].isdigit()]
        return {"normal_started_before_urgent": ahead, "urgent_ms": spread(took, 1e6),
                "urgent_served": len(ahead), "urgent_answers": self.tally(urgent),
                "normal_answers": self.tally([f.result() for f in futures if f.done()]),
                "max_concurrency": stats["max_concurrency"],
                "normal_out_of_order": sum(1 for a, b in zip(order, order[1:]) if b < a)}

    async def memory(self):
        if not self.pid:
            return None
        idle = rss_mb(self.pid)
        out, _ = await self.backlog(self.args.memory_waiting, 0, size=8192) \
            if self.profile["queue"] else (None, None)
        if out is None:
            return {"idle_mb": idle}
        # backlog() has let them all through by now, so measure the waiting state again
        await self.fresh(hold=True)
        futures, conns = await self.flood(self.args.memory_waiting, 8192)
        await self.settle()
        waiting = rss_mb(self.pid)
        await self.control("/_release")
        _, pending = await asyncio.wait(futures, timeout=60)
        answers = [f.result() for f in futures if f.done()]
        self.close(conns)
        await asyncio.sleep(1)
        return {"idle_mb": idle, "waiting_mb": waiting, "after_mb": rss_mb(self.pid),
                "waiting": self.args.memory_waiting,
                "kb_per_waiting": round((waiting["rss"] - idle["rss"]) * 1024
                                        / self.args.memory_waiting, 1),
                "answers": self.tally(answers), "unanswered": len(pending),
                "first_drain": {k: out[k] for k in ("answers", "per_second", "max_concurrency")}}

    async def depth(self):
        if not self.profile["queue"]:
            return None
        out = {}
        for count in (100, self.args.deep):
            one, idle = await self.backlog(count, 1.0)
            one["gap_us_first_90"] = spread(idle[:90], 1e3)
            one["gap_us_last_90"] = spread(idle[-90:], 1e3)
            out[str(count)] = one
        low = out["100"]["gap_us"].get("median")
        high = out[str(self.args.deep)]["gap_us"].get("median")
        out["ratio"] = round(high / low, 2) if low and high else None
        return out

    async def abandon(self):
        await self.fresh(service_ms=2, hold=True)
        futures, conns = await self.flood(100)
        await self.settle()
        for number in range(5, 95):
            conns[number].transport.abort()
        await self.settle()
        await self.control("/_release")
        stay = futures[:5] + futures[95:]
        _, pending = await asyncio.wait(stay, timeout=20)
        await asyncio.sleep(1.0)
        stats, rows = await self.records()
        self.close(conns)
        gone = [r for r in rows if r["id"].isdigit() and 5 <= int(r["id"]) < 95]
        return {"hung_up": 90, "still_sent_to_backend": len(gone),
                "max_concurrency": stats["max_concurrency"],
                "stayed": self.tally([f.result() for f in stay if f.done()]),
                "stayed_unanswered": len(pending)}

    async def hangup(self):
        if not self.profile["stream"]:
            return None
        out = await self.leave(tokens=150, delay_ms=20)
        out["silent"] = await self.leave(tokens=2, delay_ms=3000)
        return out

    async def leave(self, **pace):
        """Five clients leave in mid-stream: how long the backend goes on before it knows."""
        lags, never = [], 0
        for _ in range(5):
            await self.fresh(**pace)
            conn = await self.side.connect()
            conn.request(self.side.message("h", True))
            await asyncio.sleep(0.5)
            conn.transport.abort()
            left = now()
            for _ in range(80):
                await asyncio.sleep(0.05)
                _, rows = await self.records()
                if rows and rows[0]["finish"]:
                    break
            if rows and rows[0]["aborted"]:
                lags.append(rows[0]["finish"] - left)
            else:
                never += 1
        return {"stopped_after_ms": spread(lags, 1e6), "ran_to_the_end": never}

    async def overrun(self):
        await self.fresh(service_ms=self.args.overrun_ms)
        futures, conns = await self.flood(5)
        await asyncio.wait(futures, timeout=self.args.overrun_ms / 1e3 * 30)
        await asyncio.sleep(self.args.overrun_ms / 1e3 + 0.5)
        stats = await self.control("/_stats")
        self.close(conns)
        return {"asked": 5, "sent_to_backend": stats["requests"],
                "max_concurrency": stats["max_concurrency"], "aborted": stats["aborted"],
                "answers": self.tally([f.result() for f in futures if f.done()])}

    async def fidelity(self):
        out = {}
        for name, html in (("plain", False), ("escaped", True)):
            await self.fresh(html=html)
            conn = await self.side.connect()
            try:
                ans = await asyncio.wait_for(conn.request(self.side.message("1\u00e9")), 10)
                text = json.loads(b"".join(conn.pieces))["choices"][0]["message"]["content"]
                good = ans.ok and text.endswith("<a&b>" if html else "x")
                out[name] = "whole" if good else f"broken: {ans.status} {ans.error or text}"
            except (asyncio.TimeoutError, ValueError, KeyError) as err:
                out[name] = f"broken: {type(err).__name__} {conn.answer.error}"
            conn.transport.close()
        await self.fresh()
        return out


# memory comes first: what a process has once used it may keep, and then waiting looks free
SCENARIOS = ["memory", "latency", "gap", "gaplive", "throughput", "stream", "priority", "depth",
             "abandon", "hangup", "fidelity"]


async def run(args):
    profile = profile_of(args)
    bench = Bench(args, profile)
    chosen = args.only.split(",") if args.only else SCENARIOS
    result = {"name": args.name or args.profile, "profile": args.profile, "round": args.round,
              "when": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version(),
              "load_before": os.getloadavg()[0], "results": {}}
    if args.pid:
        result["idle_mb"] = rss_mb(args.pid)
    # wake the target up: first requests load code
    await bench.fresh()
    conn = await bench.side.connect()
    for _ in range(args.warmup):
        ans = await asyncio.wait_for(conn.request(bench.side.message("w")), 30)
        if not ans.ok:
            print(f"warm-up answered {ans.status} {ans.error} {ans.body!r}", file=sys.stderr)
            break
        if conn.closed:
            conn = await bench.side.connect()
    conn.transport.close()
    for name in chosen:
        t0 = time.monotonic()
        try:
            value = await asyncio.wait_for(getattr(bench, name)(), args.limit)
        except asyncio.TimeoutError:
            value = {"error": f"not finished in {args.limit:g} s"}
            await bench.control("/_release")
        except (OSError, ValueError, IndexError, KeyError) as err:
            value = {"error": f"{type(err).__name__}: {err}"}
            await bench.control("/_release")
        if value is not None:
            value["took_s"] = round(time.monotonic() - t0, 2)
            result["results"][name] = value
            print(f"{result['name']:<12} {name:<10} {brief(name, value)}", flush=True)
    result["load_after"] = os.getloadavg()[0]
    return result


def save(result, path):
    if path:
        with open(path, "w") as out:
            json.dump(result, out, indent=1)


# ---------------------------------------------------------------- start-up

def startup(args):
    profile = profile_of(args)
    host, port = local(args.url)
    times, sizes = [], []
    for _ in range(args.runs):
        t0 = time.monotonic()
        with open(os.devnull, "w") as null:
            child = subprocess.Popen(shlex.split(args.cmd), stdout=null, stderr=null,
                                     start_new_session=True)
        try:
            while time.monotonic() - t0 < args.limit and child.poll() is None:
                try:
                    status, _ = asyncio.run(plain((host, port), "GET", profile["health"]))
                    if status == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.003)
            else:
                raise SystemExit(f"no answer from {args.url}: {args.cmd}")
            times.append(time.monotonic() - t0)
            time.sleep(0.7)
            sizes.append(rss_mb(child.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        time.sleep(0.3)
    out = {"name": args.name or args.profile, "profile": args.profile, "round": args.round,
           "results": {"startup": {"seconds": spread(times, 1, 3),
                                   "min": round(min(times), 3),
                                   "idle_rss_mb": statistics.median(s["rss"] for s in sizes),
                                   "idle_pss_mb": statistics.median(s["pss"] for s in sizes)}}}
    print(json.dumps(out))
    save(out, args.out)


# ---------------------------------------------------------------- report

def dig(tree, path):
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def brief(name, value):
    if "error" in value:
        return value["error"]
    keys = {"gap": ["gap_us.median", "gap_us.p99", "share_of_ideal", "max_concurrency", "answers"],
            "gaplive": ["gap_us.median", "gap_us.p99", "share_of_ideal", "max_concurrency"],
            "latency": ["whole.added_us.median", "first_token.added_us.median"],
            "throughput": ["c1.per_second", "c16.per_second", "c64.per_second",
                           "c64.cpu_us_per_request", "c64.answers"],
            "stream": ["flat_out_1x2000.through.cpu_us_per_token",
                       "flat_out_1x2000.through.tokens_per_second",
                       "paced_1x400.through.cpu_us_per_token", "paced_1x400.added_lag_us_median",
                       "paced_50x100.through.cpu_us_per_token",
                       "paced_50x100.added_lag_us_median"],
            "priority": ["normal_started_before_urgent", "urgent_ms.median", "urgent_answers",
                         "normal_answers", "max_concurrency"],
            "memory": ["idle_mb.rss", "waiting_mb.rss", "kb_per_waiting", "answers"],
            "depth": ["ratio", "100.gap_us.median", "5000.gap_us.median", "5000.answers",
                      "5000.unanswered"],
            "abandon": ["still_sent_to_backend", "stayed"],
            "hangup": ["stopped_after_ms.median", "ran_to_the_end",
                       "silent.stopped_after_ms.median", "silent.ran_to_the_end"],
            "overrun": ["sent_to_backend", "max_concurrency", "aborted", "answers"],
            "fidelity": ["plain", "escaped"]}
    return "  ".join(f"{k}={dig(value, k)}" for k in keys.get(name, []))


ROWS = [
    ("dispatch gap, median us", "gap.gap_us.median"),
    ("dispatch gap, p99 us", "gap.gap_us.p99"),
    ("share of ideal (5 ms)", "gap.share_of_ideal"),
    ("gap, live arrivals, median us", "gaplive.gap_us.median"),
    ("gap, live arrivals, p99 us", "gaplive.gap_us.p99"),
    ("added latency, median us", "latency.whole.added_us.median"),
    ("added latency, p99 us", "latency.whole.added_us.p99"),
    ("added first token, median us", "latency.first_token.added_us.median"),
    ("stream flat out, tokens/s", "stream.flat_out_1x2000.through.tokens_per_second"),
    ("stream flat out, CPU us/token", "stream.flat_out_1x2000.through.cpu_us_per_token"),
    ("stream paced, added us/token", "stream.paced_1x400.added_lag_us_median"),
    ("stream paced, CPU us/token", "stream.paced_1x400.through.cpu_us_per_token"),
    ("50 streams, added us/token", "stream.paced_50x100.added_lag_us_median"),
    ("50 streams, p99 lag us", "stream.paced_50x100.through.lag_us_p99"),
    ("50 streams, CPU us/token", "stream.paced_50x100.through.cpu_us_per_token"),
    ("requests/s, 1 client", "throughput.c1.per_second"),
    ("requests/s, 16 clients", "throughput.c16.per_second"),
    ("requests/s, 64 clients", "throughput.c64.per_second"),
    ("CPU us/request, 64 clients", "throughput.c64.cpu_us_per_request"),
    ("p99 latency us, 64 clients", "throughput.c64.latency_us.p99"),
    ("normals run before urgent, max", "priority.normal_started_before_urgent"),
    ("urgent tries", "priority.urgent_served"),
    ("urgent latency, median ms", "priority.urgent_ms.median"),
    ("normals out of order", "priority.normal_out_of_order"),
    ("gap at 100 waiting, us", "depth.100.gap_us.median"),
    ("gap at 5000 waiting, us", "depth.5000.gap_us.median"),
    ("gap 5000 / gap 100", "depth.ratio"),
    ("idle RSS, MB", "startup.idle_rss_mb"),
    ("RSS 2000 x 8 KB waiting, MB", "memory.waiting_mb.rss"),
    ("KB per waiting request", "memory.kb_per_waiting"),
    ("RSS after, MB", "memory.after_mb.rss"),
    ("start-up, s", "startup.seconds.median"),
    ("abandoned still run, of 90", "abandon.still_sent_to_backend"),
    ("hang-up stops backend, ms", "hangup.stopped_after_ms.median"),
    ("hang-ups never noticed, of 5", "hangup.ran_to_the_end"),
    ("hang-up in a silence, ms", "hangup.silent.stopped_after_ms.median"),
    ("... never noticed, of 5", "hangup.silent.ran_to_the_end"),
    ("max concurrency seen", "gap.max_concurrency"),
    ("max concurrency, overrun", "overrun.max_concurrency"),
]


def collect(files):
    table = {}
    for path in files:
        with open(path) as src:
            data = json.load(src)
        for _, key in ROWS:
            value = dig(data["results"], key)
            if isinstance(value, list):
                value = max(value) if value else None
            if value is not None:
                table.setdefault(data["name"], {}).setdefault(key, []).append(value)
    return table


def show(values, wide):
    if not values:
        return "-"
    mid = statistics.median(values)
    text = f"{mid:.4g}" if abs(mid) < 1000 else f"{mid:.0f}"
    if wide and len(values) > 1:
        text += " ({}..{})".format(*tuple(f"{v:.4g}" if abs(v) < 1000 else f"{v:.0f}"
                                    for v in (min(values), max(values))))
    return text


def report(args):
    table = collect(args.files)
    names = args.names.split(",") if args.names else list(table)
    head = ["metric", *names]
    lines = []
    for label, key in ROWS:
        cells = [show(table.get(name, {}).get(key), args.spread) for name in names]
        if any(c != "-" for c in cells):
            lines.append([label, *cells])
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = ap.add_subparsers(dest="what", required=True)

    def common(one):
        one.add_argument("--url", required=True)
        one.add_argument("--profile", choices=sorted(PROFILES), default="generic")
        one.add_argument("--name")
        one.add_argument("--out")
        one.add_argument("--round", type=int, default=0, help="kept in the result, to pair by")
        for key in ("path", "health", "model", "body", "headers", "urgent-body", "urgent-headers"):
            one.add_argument("--" + key, help="override of the profile (JSON where it is a dict)")
        one.add_argument("--limit", type=float, default=120.0, help="seconds a step may take")

    one = sub.add_parser("run", help="measure a running target")
    common(one)
    one.add_argument("--backend", default="http://127.0.0.1:18000")
    one.add_argument("--pid", type=int, help="the target's process, for CPU and memory")
    one.add_argument("--only", help="comma-separated scenarios of: " + ",".join(SCENARIOS))
    one.add_argument("--waiting", type=int, default=500)
    one.add_argument("--service-ms", type=float, default=5.0)
    one.add_argument("--pairs", type=int, default=400)
    one.add_argument("--seconds", type=float, default=3.0)
    one.add_argument("--stream-runs", type=int, default=3)
    one.add_argument("--memory-waiting", type=int, default=2000)
    one.add_argument("--deep", type=int, default=5000)
    one.add_argument("--overrun-ms", type=float, default=1000.0)
    one.add_argument("--warmup", type=int, default=1000)
    one.add_argument("--urgent", type=int, default=10, help="tries of the scenario priority")
    one = sub.add_parser("startup", help="time from start until the health path answers")
    common(one)
    one.add_argument("--cmd", required=True)
    one.add_argument("--runs", type=int, default=5)
    one = sub.add_parser("report", help="one table from many result files (median over files)")
    one.add_argument("files", nargs="+")
    one.add_argument("--names")
    one.add_argument("--spread", action="store_true", help="add min..max over the files")
    args = ap.parse_args()
    if args.what == "run":
        save(asyncio.run(run(args)), args.out)
    elif args.what == "startup":
        startup(args)
    else:
        report(args)


if __name__ == "__main__":
    main()
