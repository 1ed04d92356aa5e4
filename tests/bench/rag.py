#!/usr/bin/env python3
"""What the cache saves where documents are searched: embeddings of chunks, asked for again and again.

    python3 -m tests.bench.rag [--seed N] [--requests N]

A real llmq, in this process, before a fake runner that charges what an embedding model would take of
a GPU: CALL seconds for each request and CHUNK for each text in it.  It sleeps that long too, SPEED
times faster, so that twins meet in flight as they would.  The traces are seeded; only which of the
twins came first is left to chance.  Needs Python alone, talks to 127.0.0.1, takes 10 to 20 s.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time

import llmq
from tests.derived import build_settings

CALL, CHUNK = 0.008, 0.012      # seconds of a GPU
SPEED = 100
CLIENTS = 8                     # at once
CORPUS = 1000                   # chunks
BATCH = 32
VECTOR = json.dumps([round(random.Random(0).uniform(-0.1, 0.1), 9) for _ in range(768)]).encode()


class Gpu:
    """A runner with one model, which answers embeddings and counts what they take."""

    def __init__(self):
        self.seconds, self.requests = 0.0, 0

    async def serve(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(length_of(head))
                answer = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
                if head.startswith(b"POST"):
                    answer = await self.embed(json.loads(body)["input"])
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                             b"Content-Length: %d\r\n\r\n%b" % (len(answer), answer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def embed(self, texts):
        took = charge(texts)
        self.seconds, self.requests = self.seconds + took, self.requests + 1
        await asyncio.sleep(took / SPEED)
        rows = b",".join(b'{"object":"embedding","index":%d,"embedding":%b}' % (number, VECTOR)
                         for number in range(len(texts)))
        return b'{"object":"list","model":"m","data":[%b],"usage":{"prompt_tokens":1}}' % rows


def charge(texts):
    return CALL + CHUNK * len(texts)


def length_of(head):
    fields = [line.partition(b":") for line in head.lower().split(b"\r\n")]
    return next((int(value) for name, _, value in fields if name == b"content-length"), 0)


# ---- Traces: lists of what is asked, each a list of texts ---------------------------------------


def text_of(number, edition=0):
    return f"chunk {number}, edition {edition}: " + "lorem ipsum " * 40


def zipf(chance, requests, slope):
    """One chunk each, the n-th in popularity asked for in proportion to 1 / n ** slope."""
    weights = list(itertools.accumulate(1 / rank ** slope for rank in range(1, CORPUS + 1)))
    return [[text_of(number)] for number in chance.choices(range(CORPUS), cum_weights=weights,
                                                           k=requests)]


def indexed(batch, changed=()):
    texts = [text_of(number, number in changed) for number in range(CORPUS)]
    return [texts[at:at + batch] for at in range(0, CORPUS, batch)]


def again(chance, batch, share):
    """The corpus is indexed, a share of its chunks is edited, it is indexed once more."""
    return indexed(batch) + indexed(batch, {*chance.sample(range(CORPUS), int(CORPUS * share))})


def traces(seed, requests):
    def fresh():
        return random.Random(seed)

    return [
        (f"{requests} of {CORPUS} chunks, Zipf 1.0", zipf(fresh(), requests, 1.0), {}),
        (f"{requests} of {CORPUS} chunks, Zipf 0.8", zipf(fresh(), requests, 0.8), {}),
        ("Zipf 1.0, a cache of 2 MiB", zipf(fresh(), requests, 1.0), {"cache.max_bytes": "2MiB"}),
        ("indexed twice, one by one, 2% edited", again(fresh(), 1, 0.02), {}),
        (f"indexed twice by {BATCH}, nothing edited", again(fresh(), BATCH, 0), {}),
        (f"indexed twice by {BATCH}, 0.2% edited", again(fresh(), BATCH, 0.002), {}),
        (f"indexed twice by {BATCH}, 2% edited", again(fresh(), BATCH, 0.02), {}),
    ]


# ---- A run --------------------------------------------------------------------------------------


async def client(port, left, sink):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for texts in left:
        body = json.dumps({"model": "m", "input": texts}).encode()
        writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                     % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(length_of(head))
        sink.append(head.split(b" ", 2)[1] == b"200")
    writer.close()


async def play(trace, settings):
    """The GPU that was used, and what the cache counted."""
    gpu, sink = Gpu(), []
    server = await asyncio.start_server(gpu.serve, "127.0.0.1", 0, limit=1 << 24)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    row = {"gpu": {"url": url, "kind": "vllm"}}
    values = {"server.port": 0, "server.state": "", "server.drain_timeout": 1, "backends": row}
    service = llmq.Service(build_settings({**values, **settings}))
    await service.start()
    try:
        left = iter(trace)
        await asyncio.gather(*(client(service.port, left, sink) for _ in range(CLIENTS)))
        assert len(sink) == len(trace) and all(sink), "not all were answered"
        recall = service.gateway.recall
        return gpu, dict(recall.counts), recall.cache.size
    finally:
        await service.stop()
        server.close()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--limit", type=float, default=28, help="seconds, then the rest is left out")
    told = parser.parse_args(arguments)
    begun = time.monotonic()
    print("| trace | requests | hit | joined | ran | share | GPU s without | with | saved | kept |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, trace, settings in traces(told.seed, told.requests):
        budget = told.limit - (time.monotonic() - begun)
        try:
            gpu, counts, size = asyncio.run(asyncio.wait_for(play(trace, settings), budget))
        except asyncio.TimeoutError:
            print("the rest is left out: the time is up", file=sys.stderr)
            return 1
        hit, joined = counts.get("hit", 0), counts.get("joined", 0)
        without = sum(map(charge, trace))
        print(f"| {name} | {len(trace)} | {hit} | {joined} | {gpu.requests} "
              f"| {(hit + joined) / len(trace):.1%} | {without:.1f} | {gpu.seconds:.1f} "
              f"| {1 - gpu.seconds / without:.1%} | {size / 2**20:.1f} MiB |", flush=True)
    print(f"\n{time.monotonic() - begun:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
