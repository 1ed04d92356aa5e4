"""Crowds: bursts, ten thousand waiting, no open files left, a history in which nobody is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import re
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fake_runner import CHAT as OPENAI_CHAT
from tests.fake_runner import MESSAGES, NATIVE_CHAT, Dialect, Runner
from tests.fakes import (
    Answer,
    FakeBackend,
    FakeRequest,
    Process,
    Raw,
    ask,
    chat,
    chunk,
    eventually,
    http,
    need,
    running,
)

SECOND = 1.0
GHOST = 0.25  # seconds after its client left in which a request may still have been started
KIB = 1024


def post(text: str, user: str = "", stream: bool = False, **headers: str) -> bytes:
    """A whole chat request as it goes over the wire, on a connection of its own."""
    headers.update({"Content-Type": "application/json", "Connection": "close"})
    headers.update({"X-User-ID": user} if user else {})
    body = json.dumps(chat(text, stream)).encode()
    return http("POST", "/v1/chat/completions", headers, body)


async def begin(port: int, text: str, user: str = "", stream: bool = False, **headers: str) -> Raw:
    """A client that has sent its request and waits."""
    client = await Raw.open(port)
    await client.send(post(text, user, stream, **headers))
    return client


async def queue(port: int) -> dict[str, Any]:
    return dict((await ask(port, "GET", "/llmq/status")).json()["queue"])


async def waiting(port: int, number: int) -> None:
    """Return once exactly so many wait; the test's deadline ends it otherwise."""
    while (await queue(port))["waiting"] != number:
        pass


async def refused(port: int, text: str, user: str = "", **headers: str) -> None:
    """This request meets a full queue, is told so, and when to come again."""
    async with await begin(port, text, user, **headers) as client:
        answer = await client.response()
    assert (answer.status, answer.code, answer.clean) == (429, "queue_full", True), answer
    assert 1 <= int(answer.headers["retry-after"]) <= 60


# ---- Bursts and limits -----------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
async def test_a_burst_of_three_hundred_is_served_each_its_own(slots: int) -> None:
    async with FakeBackend() as fake, running(fake.url, queue__slots=slots) as q:
        texts = [f"number {n}" for n in range(300)]
        chats = [q.chat(text, stream=bool(n % 2)) for n, text in enumerate(texts)]
        answers = await asyncio.gather(*chats)
        assert all(answer.status == 200 and answer.clean for answer in answers)
        assert [answer.content for answer in answers] == texts
        assert sorted(request.text for request in fake.requests) == sorted(texts)
        assert fake.max_active == slots


async def test_a_full_queue_refuses_and_takes_again_when_somebody_left() -> None:
    async with FakeBackend() as fake, running(fake.url, queue__max_depth=4) as q:
        fake.hold()
        clients = {"held": await begin(q.port, "held", "held")}
        await eventually(lambda: fake.requests)
        for user, number in ("alice", 1), ("alice", 2):
            clients[f"{user} {number}"] = await begin(q.port, f"{user} {number}", user)
            await waiting(q.port, number)
        await refused(q.port, "too many", "alice")  # at most half for one
        for number in 1, 2:
            clients[f"bob {number}"] = await begin(q.port, f"bob {number}", "bob")
            await waiting(q.port, 2 + number)
        for user in "alice", "bob", "carol":
            await refused(q.port, "too many", user)
        clients.pop("bob 2").close()
        await waiting(q.port, 3)
        clients["carol 1"] = await begin(q.port, "carol 1", "carol")
        await waiting(q.port, 4)
        fake.release()
        for text, client in clients.items():
            async with client:
                assert (await client.response()).content == text
        assert sorted(request.text for request in fake.requests) == sorted(clients)


async def test_queued_bytes_are_limited_in_all_and_for_one_client() -> None:
    limit = {"queue__max_queued_bytes": 100 * KIB}
    async with FakeBackend() as fake, running(fake.url, **limit) as q:
        fake.hold()
        clients = [await begin(q.port, "held", "held")]
        await eventually(lambda: fake.requests)
        long = "x" * (30 * KIB)
        clients.append(await begin(q.port, long, "alice"))
        await waiting(q.port, 1)
        await refused(q.port, long, "alice")  # past her half
        for number, user in enumerate(("bob", "carol"), 2):
            clients.append(await begin(q.port, long, user))
            await waiting(q.port, number)
        await refused(q.port, long, "dave")  # past the whole
        clients.append(await begin(q.port, "short", "dave"))
        await waiting(q.port, 4)
        fake.release()
        for client in clients:
            async with client:
                assert (await client.response()).status == 200


BUDGET = 1024 * KIB  # of bodies that wait or still arrive
FITTING = 10  # bodies of LONG bytes are within it, one more is not
LONG = 100 * KIB
each_framing = pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
each_way = pytest.mark.parametrize("leave", [Raw.close, Raw.rst, Raw.fin], ids=["c", "r", "h"])


class Upload:
    """A client whose body of LONG bytes has arrived but for its end, until `end()`."""

    def __init__(self, port: int, dialect: Dialect, user: str, chunked: bool) -> None:
        self.port, self.dialect, self.user, self.chunked = port, dialect, user, chunked
        self.text = "x" * (LONG - len(json.dumps(dialect.body(""))))

    async def begin(self) -> Upload:
        body = json.dumps(self.dialect.body(self.text)).encode()
        headers = {"Content-Type": "application/json", "X-User-ID": self.user}
        headers["Transfer-Encoding" if self.chunked else "Content-Length"] = (
            "chunked" if self.chunked else str(len(body))
        )
        first, self.rest = body[:-1], body[-1:]
        if self.chunked:
            first, self.rest = chunk(first), chunk(self.rest) + b"0\r\n\r\n"
        self.raw = await Raw.open(self.port)
        await self.raw.send(http("POST", self.dialect.path, headers) + first)
        return self

    async def end(self) -> Answer:
        await self.raw.send(self.rest)
        answer = await self.raw.response()
        self.raw.close()
        return answer


async def uploads(q: running, dialect: Dialect, chunked: bool) -> list[Upload]:
    """As many as fit, all of whose bytes have been received, when nothing arrives any more."""
    users = [f"user{number}" for number in range(FITTING)]
    server = q.service._servers[0]
    await eventually(lambda: not server.arriving_bytes)  # not even of who was turned away
    found = [await Upload(q.port, dialect, user, chunked).begin() for user in users]
    await eventually(lambda: server.arriving_bytes >= FITTING * (LONG - 1))
    return found


async def received(q: running) -> None:
    """What was sent before has been read: these answers took more turns than that."""
    for _ in range(30):
        assert (await ask(q.port, "GET", "/health")).body == b"ok"


async def answered(uploading: list[Upload]) -> None:
    for one in uploading:
        assert one.dialect.text(await one.end()) == one.text


async def turned_away(q: running, dialect: Dialect, chunked: bool) -> None:
    """One more than fits is told so, in the words of its dialect."""
    with contextlib.suppress(ConnectionError):  # it may be told before it has sent all
        one = Upload(q.port, dialect, "one too many", chunked)
        await one.begin()
        await one.raw.send(one.rest)
    answer = await asyncio.wait_for(one.raw.response(), 5)
    assert answer.status in (429, 503), answer.status
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert dialect.whole_error(answer)
    one.raw.close()


@each_framing
@pytest.mark.parametrize("dialect", [OPENAI_CHAT, MESSAGES, NATIVE_CHAT], ids=repr)
async def test_bodies_that_still_arrive_are_limited_in_all_and_those_within_go_on(
    dialect: Dialect, chunked: bool
) -> None:
    async with Runner() as fake, running(fake.url, queue__max_queued_bytes=BUDGET) as q:
        held = await uploads(q, dialect, chunked)
        await turned_away(q, dialect, chunked)
        await answered(held)
        assert {request.headers.get("x-user-id") for request in fake.requests} == {None}
        assert len(fake.requests) == FITTING
        again = await uploads(q, dialect, chunked)  # all of it is free again
        await turned_away(q, dialect, chunked)
        await answered(again)


@each_framing
@each_way
async def test_uploads_whose_clients_leave_give_their_room_back(leave: Any, chunked: bool) -> None:
    async with Runner() as fake, running(fake.url, queue__max_queued_bytes=BUDGET) as q:
        for _ in range(3):
            for one in await uploads(q, OPENAI_CHAT, chunked):
                leave(one.raw)
            await received(q)
        held = await uploads(q, OPENAI_CHAT, chunked)
        await turned_away(q, OPENAI_CHAT, chunked)
        await answered(held)
        assert len(fake.requests) == FITTING


@each_framing
async def test_uploads_that_end_in_an_error_give_their_room_back(chunked: bool) -> None:
    limits = {"queue__max_queued_bytes": BUDGET, "server__body_timeout": 0.3}
    async with Runner() as fake, running(fake.url, **limits) as q:
        for one in await uploads(q, OPENAI_CHAT, chunked):
            assert (await one.raw.response()).status == 408
        patient = build_settings({**q.values, "server.body_timeout": 30})
        q.service.read = lambda: patient
        assert (await ask(q.port, "POST", "/llmq/reload", json={})).status == 200
        wrong = b"{" + b"x" * LONG  # whole, and no JSON
        for _ in range(2 * FITTING):
            assert (await ask(q.port, "POST", OPENAI_CHAT.path, body=wrong)).status == 400
        held = await uploads(q, OPENAI_CHAT, chunked)
        await turned_away(q, OPENAI_CHAT, chunked)
        await answered(held)
        assert len(fake.requests) == FITTING


async def test_body_in_two_byte_chunks_takes_the_memory_of_its_size() -> None:
    body = json.dumps(chat("x" * 200_000)).encode()
    data = b"".join(chunk(body[at : at + 2]) for at in range(0, len(body), 2))
    async with FakeBackend() as fake, running(fake.url) as q, await Raw.open(q.port) as client:
        head = http("POST", "/v1/chat/completions", {"Transfer-Encoding": "chunked"})
        tracemalloc.start()
        try:
            await client.send(head + data)
            await eventually(lambda: q.service._servers[0].arriving_bytes == len(body))
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 2 * len(body) + len(head + data)
        finally:
            tracemalloc.stop()
        await client.send(b"0\r\n\r\n")
        assert (await client.response()).status == 200
        assert fake.requests[0].body == body


async def test_bodies_that_wait_to_be_read_take_room_as_those_that_arrive_do() -> None:
    body = json.dumps(chat("x" * llmq.HEAVY_BODY)).encode()
    limits = {"queue__max_queued_bytes": 4 * len(body)}
    async with FakeBackend() as fake, running(fake.url, **limits) as q:
        (server,) = q.service._servers
        with llmq.READING:  # as if another body were being read
            asking = [
                asyncio.ensure_future(
                    ask(
                        q.port,
                        "POST",
                        OPENAI_CHAT.path,
                        body=body,
                        headers={"X-User-ID": f"u{number}"},
                    )
                )
                for number in range(4)
            ]
            await eventually(lambda: server.arriving_bytes == 4 * len(body))
            refused = await ask(q.port, "POST", OPENAI_CHAT.path, body=body)
            assert refused.status == 429
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 4
        assert server.arriving_bytes == 0


@pytest.mark.parametrize("sent", [50_000, 20_000], ids=["whole", "cut off"])
async def test_body_of_a_refused_request_gives_its_room_back(sent: int) -> None:
    async with running("http://127.0.0.1:9") as q, await Raw.open(q.port) as raw:
        (server,) = q.service._servers
        await raw.send(http("POST", "/nowhere", {"Content-Length": "50000"}))
        assert (await raw.response()).status == 404
        await raw.send(b"x" * sent)
        await eventually(lambda: next(iter(server.connections)).stream.received > sent)
        raw.close()
        await eventually(lambda: not server.connections)
        assert server.arriving_bytes == 0


@each_framing
async def test_blobs_that_pass_through_need_no_room(chunked: bool) -> None:
    """They are relayed piece by piece."""
    size, piece = 4 * BUDGET, b"x" * (64 * KIB)
    framing = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
    async with Runner() as fake, running(fake.url, queue__max_queued_bytes=BUDGET) as q:
        while (await q.status())["backends"][0]["state"] != "up":
            pass
        raw = await Raw.open(q.port)
        await raw.send(http("POST", f"/api/blobs/sha256:{'5' * 64}", framing))
        for number in range(size // len(piece)):
            await raw.send(chunk(piece) if chunked else piece)
            if number == size // len(piece) // 2:
                await answered(await uploads(q, OPENAI_CHAT, chunked))
        await raw.send(b"0\r\n\r\n" if chunked else b"")
        assert (await raw.response()).status == 201
        assert [length for length, _ in fake.uploads] == [size]


async def test_a_web_page_elsewhere_may_have_sixteen_waiting() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        fake.hold()
        page = {"Origin": "https://example.com"}
        held = asyncio.ensure_future(q.chat("held"))
        await eventually(lambda: fake.requests)
        chats = [asyncio.ensure_future(q.chat(f"page {n}", headers=page)) for n in range(16)]
        await waiting(q.port, 16)
        await refused(q.port, "one more", **page)
        chats.append(asyncio.ensure_future(q.chat("mine")))
        await waiting(q.port, 17)
        fake.release()
        assert all(answer.status == 200 for answer in await asyncio.gather(held, *chats))


# ---- Ten thousand ----------------------------------------------------------------------------

CROWD = 10_000
TEXT = "x" * 1000


class Cheap(asyncio.Protocol):
    """A client without streams: sends on connecting, keeps what comes until the end."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.received = b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


@contextlib.contextmanager
def many_files(number: int) -> Iterator[None]:
    """Room for so many open files here; llmq raises its own limit by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need(hard >= number, f"only {hard} open files allowed here, {number} needed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident(pid: int) -> int:
    """Bytes of memory that the process has now."""
    need(Path("/proc/self/status").exists(), "no /proc here")
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KIB
    raise AssertionError(f"no VmRSS of {pid}")


async def gather_crowd(port: int) -> list[Cheap]:
    """All the clients, of two users, opened a hundred at a time."""
    loop = asyncio.get_running_loop()
    crowd: list[Cheap] = []
    for first in range(0, CROWD, 100):
        requests = [post(f"{n} {TEXT}", f"user{n % 2}") for n in range(first, first + 100)]
        clients = [Cheap(request) for request in requests]
        each = [loop.create_connection(lambda c=c: c, "127.0.0.1", port) for c in clients]
        await asyncio.gather(*each)
        crowd += clients
    return crowd


async def watch_health(port: int, seconds: list[float]) -> None:
    """Ask for /health again and again until cancelled."""
    while True:
        begun = time.monotonic()
        assert (await ask(port, "GET", "/health")).status == 200
        seconds.append(time.monotonic() - begun)


@pytest.mark.untraced
@pytest.mark.deadline(60)
async def test_ten_thousand_wait_in_little_memory_while_health_stays_quick() -> None:
    with many_files(CROWD + 512):
        async with (
            FakeBackend() as fake,
            Process("--port", "0", "--backend", fake.url) as p,
        ):
            fake.hold()
            held = await begin(p.port, "held")
            await eventually(lambda: fake.requests)
            before = resident(p.pid)
            seconds: list[float] = []
            watcher = asyncio.ensure_future(watch_health(p.port, seconds))
            crowd = await gather_crowd(p.port)
            await waiting(p.port, CROWD)
            each = (resident(p.pid) - before) / CROWD
            for user in "user0", "user1", "user2":
                await refused(p.port, "one more", user)
            fake.release()
            await asyncio.wait([client.ended for client in crowd])
            watcher.cancel()
            assert (await held.response()).content == "held"
            for number, client in enumerate(crowd):
                head, _, body = client.received.partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 "), client.received[:300]
                text = json.loads(body)["choices"][0]["message"]["content"]
                assert text == f"{number} {TEXT}"
            assert len(fake.requests) == CROWD + 1
            assert fake.max_active == 1
            assert each <= 8 * KIB + len(crowd[-1].request), f"{each:.0f} bytes for each waiting"
            assert len(seconds) >= 100
            assert sorted(seconds)[len(seconds) * 99 // 100] < SECOND
            rest = await queue(p.port)
            assert (rest["waiting"], rest["running"]) == (0, 0)


# ---- No file descriptors left ----------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Processor time that the process has used so far."""
    need(Path("/proc/self/stat").exists(), "no /proc here")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # utime and stime, in ticks of USER_HZ


@pytest.fixture
def python_with_64_files(tmp_path: Path) -> str:
    """A Python that may have 64 files open and no more."""
    script = tmp_path / "python64"
    script.write_text(f'#!/bin/sh\nulimit -n 64\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


async def healthy(port: int) -> None:
    """Return once /health says 200; refused or 503 is tried again."""
    while True:
        with contextlib.suppress(OSError, EOFError):
            if (await ask(port, "GET", "/health")).status == 200:
                return


@pytest.mark.deadline(25)
async def test_it_survives_a_hundred_idle_sockets_with_sixty_four_files(
    python_with_64_files: str,
) -> None:
    async with FakeBackend(auto=False) as fake:
        arguments = "--port", "0", "--backend", fake.url, "--head-timeout", "3s"
        async with Process(*arguments, python=python_with_64_files) as p:
            stream = await begin(p.port, "before", stream=True)
            request = await fake.arrived()
            await request.start_stream()
            await request.piece("one ")
            await stream.until(b"one ")
            idle = [await Raw.open(p.port) for _ in range(100)]
            used, begun = cpu_seconds(p.pid), time.monotonic()
            await asyncio.wait_for(healthy(p.port), 2)
            await request.piece("two ")
            await asyncio.wait_for(stream.until(b"two "), SECOND)
            for client in idle:  # those that nobody needed the place of: three seconds have passed
                await client.closed()
            share = (cpu_seconds(p.pid) - used) / (time.monotonic() - begun)
            assert share < 0.5, f"busy for {share:.0%} of the time with nothing to do"
            await request.finish_stream()
            await stream.until(b"[DONE]")
            for client in idle:
                client.close()
            served = asyncio.ensure_future(recovered(p.port))
            await (await asyncio.wait_for(fake.arrived(), 2)).answer("well")
            assert (await served).content == "well"


async def recovered(port: int) -> Answer:
    """One chat, tried again while connections are still turned away."""
    while True:
        with contextlib.suppress(OSError, EOFError):
            answer = await (await begin(port, "after")).response()
            if answer.status != 503:
                return answer


async def test_connections_past_the_limit_do_not_cut_those_that_run(
    python_with_64_files: str,
) -> None:
    async with FakeBackend() as fake:
        arguments = "--port", "0", "--backend", fake.url
        async with Process(*arguments, python=python_with_64_files) as p:
            assert re.search(r"(?i)open files|connections", p.output), "the banner must say so"
            fake.hold()
            clients = [await begin(p.port, f"number {n}") for n in range(100)]
            await eventually(lambda: fake.requests)
            fake.release()
            answers = []
            for client in clients:
                with contextlib.suppress(EOFError, ConnectionError):
                    answers.append(await client.response())
            statuses = Counter(answer.status for answer in answers)
            assert statuses.keys() <= {200, 503}, statuses
            assert statuses[200] >= 8, statuses
            served = [answer.content for answer in answers if answer.status == 200]
            assert len(served) == len(set(served))
            assert fake.max_active == 1
            await asyncio.wait_for(healthy(p.port), 2)


# ---- A history -------------------------------------------------------------------------------


class History:
    """Five hundred requests of fifty clients; a fifth leaves, each at a moment of its own."""

    LEAVES = ("at once", "soon", "when started", "in mid-stream")

    def __init__(self, q: running, fake: FakeBackend, seed: int) -> None:
        self.q, self.fake = q, fake
        self.random = random.Random(seed)
        self.plans: dict[str, str] = {}  # text -> when its client leaves, "" never
        self.began: dict[str, asyncio.Event] = {}
        self.starts: list[tuple[str, float]] = []
        self.left: dict[str, float] = {}
        self.answers: dict[str, Answer] = {}
        self.serving: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        backend = asyncio.ensure_future(self.backend())
        await asyncio.gather(*(self.client(number) for number in range(50)))
        while (await queue(self.q.port))["running"] + (await queue(self.q.port))["waiting"]:
            pass
        backend.cancel()
        await asyncio.gather(*self.serving)

    async def backend(self) -> None:
        while True:
            request = await self.fake.arrived()
            task = asyncio.ensure_future(self.serve(request))
            self.serving.add(task)

    async def serve(self, request: FakeRequest) -> None:
        self.starts.append((request.text, time.monotonic()))
        self.began[request.text].set()
        plan = self.plans[request.text]
        with contextlib.suppress(ConnectionError):
            if plan == "in mid-stream":
                await request.start_stream()
                await request.piece(request.text)
            if plan in ("when started", "in mid-stream"):
                await asyncio.wait_for(request.left(), SECOND)
            else:
                await request.answer(request.text)

    async def client(self, number: int) -> None:
        for turn in range(10):
            text = f"client {number} turn {turn} says {self.random.random()}"
            leaves = self.random.random() < 0.2
            self.plans[text] = self.random.choice(self.LEAVES) if leaves else ""
            self.began[text] = asyncio.Event()
            stream = self.plans[text] == "in mid-stream" or self.random.random() < 0.5
            client = await begin(self.q.port, text, f"user{number % 7}", stream=stream)
            if not leaves:
                self.answers[text] = await client.response()
                client.close()
                continue
            await self.moment(client, text)
            self.random.choice([Raw.close, Raw.rst, Raw.fin])(client)
            self.left[text] = time.monotonic()

    async def moment(self, client: Raw, text: str) -> None:
        """Return when this client is to leave."""
        if self.plans[text] == "soon":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.until(b"\r\n\r\n"), self.random.uniform(0, 0.1))
        elif self.plans[text] == "when started":
            await self.began[text].wait()
        elif self.plans[text] == "in mid-stream":
            await client.until(b"says")


@pytest.mark.deadline(40)
@pytest.mark.parametrize(("seed", "slots"), [(1, 1), (2, 3)])
async def test_of_five_hundred_mixed_requests_each_ends_as_it_should(seed: int, slots: int) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__slots=slots) as q:
        history = History(q, fake, seed)
        await history.run()
        stayed = [text for text, plan in history.plans.items() if not plan]
        assert len(history.plans) == 500
        assert 60 <= len(history.left) <= 140
        for text in stayed:
            answer = history.answers[text]
            assert (answer.status, answer.content, answer.clean) == (200, text, True)
        starts = Counter(text for text, _ in history.starts)
        assert all(starts[text] == 1 for text in stayed)
        assert max(starts.values()) == 1, "sent twice, though the backend never failed"
        ghosts = [t for t, at in history.starts if at > history.left.get(t, at) + GHOST]
        assert not ghosts
        assert fake.max_active <= slots
        assert fake.active == 0
