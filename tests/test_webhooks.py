"""Webhooks: each event once to whom it is for, signed, and nobody waits for who takes them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import json
import random
import re
import signal
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from llmq import State, Watch
from tests.fakes import (
    RESET,
    FakeBackend,
    Raw,
    ask,
    chat,
    eventually,
    free_port,
    http,
    running,
)
from tests.test_store import reloaded
from tests.test_tls import ROOT_CA, Papers
from tests.test_usage import Tuned

NOBODY = "http://127.0.0.1:9"  # where no backend listens
CHAT = "/v1/chat/completions"
SECRET = "whsec-5f1d7c0a9b3e"
TOKEN = "T0KEN-a8f3"  # in the path of a url, as many services have it
FULL, HIGH, DRAINED = "queue.full", "queue.high_watermark", "queue.drained"
DOWN, UP, DONE = "host.unhealthy", "host.recovered", "job.done"
Writer = Any  # asyncio.StreamWriter


# ---- The watch: numbers in, events out -------------------------------------------------------


def looked(
    watch: Watch, now: float, most: int, waiting: int, refused: int, limit: int
) -> list[str]:
    """One look at the queue and at its limit."""
    told = list(watch.look_at_queue(now, most, waiting, refused))
    high = [HIGH] * watch.look_at_limit("all", most, waiting, limit)
    return [one for one in (FULL, HIGH, DRAINED) if one in told + high]


def test_each_limit_has_its_own_mark() -> None:
    watch = Watch()
    assert watch.look_at_limit("low", 8, 8, 10)
    assert watch.look_at_limit("all", 8, 8, 10)
    assert not watch.look_at_limit("low", 9, 9, 10)
    assert not watch.look_at_limit("high", 9, 9, 0)  # which has no limit


def looks(*rows: tuple[float, int, int, int], limit: int = 20) -> list[list[str]]:
    """The events of each look; a row is the time, the most that waited, who waits, refusals."""
    watch = Watch()
    return [
        list(looked(watch, now, most, waiting, refused, limit))
        for now, most, waiting, refused in rows
    ]


def waits(*numbers: int, limit: int = 20) -> list[list[str]]:
    """The events while so many wait at each look, and never more between two."""
    return looks(*((float(at), one, one, 0) for at, one in enumerate(numbers)), limit=limit)


@pytest.mark.parametrize(
    ("numbers", "events"),
    [
        ([0, 0, 0], [[], [], []]),
        ([15, 16, 17, 20], [[], [HIGH], [], []]),
        ([16, 13, 16], [[HIGH], [], []]),  # 65 %: not yet told again
        ([16, 12, 16], [[HIGH], [], [HIGH]]),
        ([16, 12, 15, 16, 16], [[HIGH], [], [], [HIGH], []]),
        ([16, 0, 16, 0], [[HIGH], [DRAINED], [HIGH], [DRAINED]]),
        ([9, 0], [[], []]),
        ([10, 0, 0], [[], [DRAINED], []]),
        ([10, 1, 0, 1, 0], [[], [], [DRAINED], [], []]),
        ([9, 1, 9, 0], [[], [], [], []]),
    ],
)
def test_high_once_until_few_wait_and_drained_once_after_ten(
    numbers: list[int], events: list[list[str]]
) -> None:
    assert waits(*numbers) == events


def test_what_came_and_went_between_two_looks_is_told() -> None:
    assert looks((0, 0, 0, 0), (1, 18, 0, 0), (2, 0, 0, 0)) == [[], [HIGH, DRAINED], []]
    assert looks((0, 18, 3, 0), (1, 3, 0, 0)) == [[HIGH], [DRAINED]]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 10, 35, 9999, 10000])
def test_watermarks_are_shares_of_the_limit(limit: int) -> None:
    high, low = -(-4 * limit // 5), 3 * limit // 5  # the least that is 80 %, the most that is 60
    told = waits(high - 1, high, low + 1, high, low, high, limit=limit)
    again = [] if low + 1 <= high - 1 or low + 1 == high else [HIGH]
    assert [HIGH in one for one in told] == [False, True, False, bool(again), False, True]


@pytest.mark.parametrize(
    ("rows", "events"),
    [
        ([(0, 1)], [1]),
        ([(0, 0), (1, 3), (2, 3)], [0, 1, 0]),
        ([(0, 1), (1, 2), (9, 3), (18, 4)], [1, 0, 0, 0]),  # one long refusal
        ([(0, 1), (9, 1), (10, 2)], [1, 0, 1]),
        ([(0, 1), (9, 2), (10, 3), (20, 4)], [1, 0, 0, 1]),
        ([(5, 1), (100, 2), (300, 2)], [1, 1, 0]),
    ],
)
def test_full_is_told_once_until_nobody_was_refused_for_a_while(
    rows: list[tuple[float, int]], events: list[int]
) -> None:
    told = looks(*((now, 0, 0, refused) for now, refused in rows))
    assert [len(one) for one in told] == events
    assert set(itertools.chain(*told)) <= {FULL}


@pytest.mark.parametrize("seed", range(20))
def test_each_event_has_a_cause_of_its_own(seed: int) -> None:
    dice, watch = random.Random(seed), Watch()
    limit = dice.choice([5, 20, 100])
    armed, peak, refused, refused_at = True, 0, 0, -1e9
    now, waiting = 0.0, 0
    for _ in range(500):
        now += dice.choice([0.25, 0.25, 4.0])
        before, waiting = waiting, max(0, min(limit, waiting + dice.randrange(-9, 10)))
        waiting = dice.choice([waiting] * 9 + [0])
        most = max(before, waiting, dice.choice([0] * 5 + [dice.randrange(limit + 1)]))
        more = dice.choice([0] * 4 + [2])
        expected: Counter[str] = Counter()
        if more and now - refused_at >= llmq.FULL_SECONDS:
            expected[FULL] += 1
        refused, refused_at = refused + more, now if more else refused_at
        if armed and most * 5 >= limit * 4:
            expected[HIGH] += 1
            armed = False
        armed = armed or waiting * 5 <= limit * 3
        peak = max(peak, most)
        if not waiting:
            expected[DRAINED] += peak >= 10
            peak = 0
        told = Counter(looked(watch, now, most, waiting, refused, limit))
        assert told == +expected


@pytest.mark.parametrize(
    ("states", "events"),
    [
        ("unknown up up", []),
        ("unknown down down down", [(1, DOWN)]),
        ("up down up up down", [(1, DOWN), (2, UP), (4, DOWN)]),
        ("up loading up", []),  # no failure
        ("down loading down up", [(0, DOWN), (3, UP)]),
        ("down refused up", [(0, DOWN), (2, UP)]),
        ("up - up", []),
        ("down - up", [(0, DOWN)]),  # another one of that name
        ("down - down", [(0, DOWN), (2, DOWN)]),
    ],
)
def test_host_is_unhealthy_once_and_recovered_once(
    states: str, events: list[tuple[int, str]]
) -> None:
    watch, told = Watch(), []
    for at, word in enumerate(states.split()):
        here = {} if word == "-" else {"box": State(word)}
        told += [(at, *one) for one in watch.look_at_hosts({**here, "other": State.UP})]
    assert told == [(at, event, "box") for at, event in events]


# ---- A service that is told ------------------------------------------------------------------


class Post:
    """One request as it came."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.line, *lines = head.decode("latin-1").split("\r\n")
        pairs = [text.partition(":") for text in lines if text]
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def event(self) -> str:
        return str(self.json["event"])


class Receiver:
    """A server of a few lines; `behave` answers each request, with 200 unless told otherwise."""

    def __init__(self, behave: Callable[[Receiver, Writer, Post], Awaitable[None]] | None = None):
        self.behave = behave or accept
        self.posts: list[Post] = []
        self.released = asyncio.Event()
        self.open = 0  # connections
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self._tasks: set[Any] = set()

    @property
    def url(self) -> str:
        scheme = "https" if self.tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}/hook/{TOKEN}?x=1"

    async def __aenter__(self) -> Receiver:
        here = ("127.0.0.1", 0)
        self._server = await asyncio.start_server(self._accept, *here, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.open += 1
        self._tasks.add(asyncio.ensure_future(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
            post = Post(head, b"")
            post.body = await reader.readexactly(int(post.headers.get("content-length", "0")))
            self.posts.append(post)
            await self.behave(self, writer, post)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # llmq hung up
        finally:
            self.open -= 1
            writer.close()

    async def has(self, number: int) -> list[Post]:
        """The posts, once there are so many."""
        await eventually(lambda: len(self.posts) >= number)
        return self.posts

    @property
    def events(self) -> list[str]:
        return [post.event for post in self.posts]


def answer(status: str, *lines: str) -> Any:
    """What a receiver does that answers so."""
    told = "\r\n".join([f"HTTP/1.1 {status}", *lines, "Content-Length: 0", "", ""]).encode()

    async def behave(_receiver: Receiver, writer: Writer, _post: Post) -> None:
        writer.write(told)
        await writer.drain()

    return behave


accept = answer("200 OK")


async def hang(receiver: Receiver, writer: Writer, post: Post) -> None:
    await receiver.released.wait()
    await accept(receiver, writer, post)


def drip(start: bytes) -> Any:
    """One that goes on sending single bytes until somebody hangs up."""

    async def behave(receiver: Receiver, writer: Writer, _post: Post) -> None:
        writer.write(start)
        while not receiver.released.is_set():
            writer.write(b"a")
            await writer.drain()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(receiver.released.wait(), 0.02)  # until the next drop

    return behave


async def reset(_receiver: Receiver, writer: Writer, _post: Post) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def hang_up(_receiver: Receiver, writer: Writer, _post: Post) -> None:
    writer.close()


async def echo(_receiver: Receiver, writer: Writer, post: Post) -> None:
    writer.write(f"{post.line}\r\nX-Copy: {post.headers}\r\n\r\n".encode())
    await writer.drain()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, tries again at once."""
    monkeypatch.setattr(llmq, "REAP_SECONDS", 0.01)
    monkeypatch.setattr(llmq, "HOOK_TRIES", (0.0, 0.001, 0.002))


def telling(receiver: Receiver, *events: str, secret: str = SECRET) -> dict[str, Any]:
    """[webhooks] with one row."""
    return {"ops": {"url": receiver.url, "secret": secret, "events": list(events)}}


def happen(q: running, number: int = 1) -> None:
    """Something to tell."""
    for one in range(number):
        q.gateway.journal.happened(DONE, job={"id": f"job_{one}"})


async def marked(q: running, *receivers: Receiver) -> None:
    """Return once all that has happened was told; what one look finds may follow the first mark."""
    for mark in (1, 2):
        q.gateway.journal.happened(DONE, mark=mark)
        for one in receivers:
            await eventually(lambda one=one, mark=mark: mark in map(mark_of, one.posts))
    for one in receivers:
        one.posts[:] = [post for post in one.posts if not mark_of(post)]


def mark_of(post: Post) -> int:
    return int(post.json.get("mark", 0))


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


# ---- What happens is told once ---------------------------------------------------------------


async def test_queue_that_fills_and_empties_is_told_once_of_each() -> None:
    async with FakeBackend() as fake, Receiver() as receiver:
        hooks = telling(receiver)
        async with running(fake.url, queue__max_depth=20, webhooks=hooks) as q:
            for turn in (1, 2):
                q.gateway.set_mode(llmq.Mode.PAUSED)
                names = [f"{client}{n}" for client in "ab" for n in range(10)]
                asked = [
                    asyncio.ensure_future(q.chat(name, {"X-User-ID": name[0]})) for name in names
                ]
                await eventually(lambda q=q: len(q.gateway.scheduler.waiting) == 20)
                refused = await q.chat("c", {"X-User-ID": "c"})
                assert refused.code == "queue_full"
                await marked(q, receiver)
                q.gateway.set_mode(llmq.Mode.OPEN)
                assert {one.status for one in await asyncio.gather(*asked)} == {200}
                await eventually(lambda turn=turn: receiver.events.count(DRAINED) == turn)
                await marked(q, receiver)
                # Within seconds the refusals are one.
                assert Counter(receiver.events) == {FULL: 1, HIGH: turn, DRAINED: turn}
            facts = next(post.json for post in receiver.posts if post.event == HIGH)
            assert facts["full_at"] == 20
            assert facts["most_waiting"] >= 16


async def test_runner_that_goes_down_and_comes_back_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "FIRST_BACKOFF", 0.02)
    async with FakeBackend() as fake, Receiver() as receiver:
        hooks = telling(receiver, DOWN, UP)
        settings = {"upstream__probe_interval": 0.02, "webhooks": hooks}
        backends = {"box": {"url": fake.url}, "good": {"url": fake.url + "/v1"}}
        async with running(backends=backends, **settings) as q:
            await eventually(lambda: q.gateway.fleet.backends["box"].usable)
            for turn in (1, 2):
                await fake.stop_listening()
                fake.drop_connections()
                await receiver.has(4 * turn - 2)
                await fake.listen_again()
                await receiver.has(4 * turn)
            told = Counter((post.event, post.json["host"]) for post in receiver.posts)
            assert told == {(event, host): 2 for event in (DOWN, UP) for host in ("box", "good")}
            down = next(post.json for post in receiver.posts if post.event == DOWN)
            assert down["error"]


async def kept_job(q: running, text: str = "hi") -> str:
    headers = {"Prefer": "respond-async", "X-User-ID": "eve"}
    answered = await q.chat(text, headers)
    assert answered.status == 202, answered
    return str(answered.json()["id"])


@pytest.mark.parametrize(
    ("status", "state"), [(200, "succeeded"), (400, "failed"), (0, "cancelled"), (-1, "cancelled")]
)
async def test_job_is_told_once_as_it_is_shown(status: int, state: str, tmp_path: Path) -> None:
    async with FakeBackend(auto=False) as fake, Receiver() as receiver:
        settings = {"server__state": str(tmp_path / "s.db"), "webhooks": telling(receiver)}
        async with running(fake.url, **settings) as q:
            if status == -1:  # it never runs
                q.gateway.set_mode(llmq.Mode.PAUSED)
            job = await kept_job(q)
            request = await fake.arrived() if status >= 0 else None
            if request is not None and status:
                await request.status(status, {"error": {"message": "no"}} if status > 200 else {})
            else:
                assert (await ask(q.port, "DELETE", f"/v1/jobs/{job}")).status == 200
            (post,) = await receiver.has(1)
            await marked(q, receiver)
            assert receiver.events == [DONE]
            assert (post.json["job"]["id"], post.json["job"]["status"]) == (job, state)
            shown = (await ask(q.port, "GET", f"/v1/jobs/{job}")).json()
            assert post.json["job"] == shown


async def test_batch_is_told_as_a_whole_and_not_line_by_line(tmp_path: Path) -> None:
    async with FakeBackend() as fake, Receiver() as receiver:
        settings = {"server__state": str(tmp_path / "s.db"), "webhooks": telling(receiver)}
        async with running(fake.url, queue__slots=8, **settings) as q:
            fake.hold()  # so that all lines end at once
            rows = [
                {"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": chat("a")}
                for n in range(8)
            ]
            content = b"\n".join(json.dumps(row).encode() for row in rows)
            named = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            form = named % (b"purpose", b"", b"batch")
            form += named % (b"file", b'; filename="x.jsonl"', content) + b"--b--\r\n"
            kind = {"Content-Type": "multipart/form-data; boundary=b"}
            file = (await ask(q.port, "POST", "/v1/files", body=form, headers=kind)).json()["id"]
            asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
            batch = (await ask(q.port, "POST", "/v1/batches", json=asked)).json()["id"]
            await eventually(lambda: fake.active == len(rows))
            fake.release()
            await receiver.has(1)
            await marked(q, receiver)
            (post,) = receiver.posts
            assert post.json["job"]["id"] == batch
            assert (post.json["job"]["object"], post.json["job"]["status"]) == (
                "batch",
                "completed",
            )


async def test_what_is_sent_is_signed_json_with_event_and_timestamp() -> None:
    async with Receiver() as receiver, running(NOBODY, webhooks=telling(receiver, DONE)) as q:
        q.gateway.journal.happened(DONE, job={"name": "名前"})
        (post,) = await receiver.has(1)
        assert post.line == f"POST /hook/{TOKEN}?x=1 HTTP/1.1"
        assert post.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert post.headers["content-type"] == "application/json"
        assert not {"authorization", "cookie"} & post.headers.keys()
        digest = hmac.new(SECRET.encode(), post.body, hashlib.sha256).hexdigest()
        assert post.headers["x-llmq-signature"] == f"sha256={digest}"
        assert post.json["job"] == {"name": "名前"}
        assert post.event == DONE
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", post.json["timestamp"])


async def test_without_a_secret_nothing_is_signed() -> None:
    async with Receiver() as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE, secret="")) as q:
            happen(q)
            (post,) = await receiver.has(1)
            assert "x-llmq-signature" not in post.headers


@pytest.mark.parametrize("trusted", [True, False])
async def test_https_is_for_who_has_a_certificate_that_is_trusted(
    trusted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    papers = Papers(tmp_path)
    ca = papers.make("ca", ROOT_CA)
    certificate = papers.server("server")
    monkeypatch.setenv("SSL_CERT_FILE", ca if trusted else str(tmp_path / "none"))
    receiver = Receiver()
    receiver.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    receiver.tls.load_cert_chain(certificate, papers.path("server.key"))
    async with receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            if trusted:
                assert (await receiver.has(1))[0].event == DONE
            else:
                await eventually(lambda: "webhook ops: " in caplog.text)
                assert "certificate" in caplog.text
                assert receiver.posts == []
                assert TOKEN not in caplog.text


async def test_each_service_gets_what_it_wants_and_all_without_a_word() -> None:
    async with (
        FakeBackend() as fake,
        Receiver() as one,
        Receiver() as two,
        Receiver() as everything,
    ):
        hooks = {
            "one": {"url": one.url, "events": [DONE]},
            "two": {"url": two.url, "events": [FULL, DRAINED]},
            "everything": {"url": everything.url, "secret": SECRET},
        }
        async with running(fake.url, webhooks=hooks) as q:
            for event in llmq.EVENTS:
                q.gateway.journal.happened(event)
            await everything.has(len(llmq.EVENTS))
            await two.has(2)
            await marked(q, one, everything)
            assert one.events == [DONE]
            assert two.events == [FULL, DRAINED]
            assert everything.events == list(llmq.EVENTS)
            assert "x-llmq-signature" not in one.posts[0].headers


async def test_without_webhooks_there_is_no_thread_and_no_memory() -> None:
    before = threads()
    async with FakeBackend() as fake, running(fake.url) as q:
        happen(q, 100)
        await q.chat("a")
        await eventually(lambda: not q.gateway.journal.events)
        assert not q.service.webhooks.postmen
        new = [one.name for one in threads() - before if "run" in one.name]
        assert new == []


# ---- Who does not take them ------------------------------------------------------------------


FAULTS = [
    (answer("500 Internal Server Error"), "500"),
    (answer("404 Not Found"), "404"),
    (reset, ""),
    (hang_up, ""),
    (hang, "timed out"),
    (drip(b""), ""),
    (drip(b"HTTP/1.1 "), ""),
    (echo, ""),
]
FAULT_NAMES = ["500", "404", "reset", "hang up", "hang", "drip", "drip a status", "no http"]


@pytest.mark.parametrize(("behave", "why"), FAULTS, ids=FAULT_NAMES)
async def test_what_fails_is_tried_three_times_and_told_in_one_line(
    behave: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llmq, "HOOK_SECONDS", 0.2)
    async with Receiver(behave) as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(3)
            receiver.behave = accept  # what comes next is taken
            await eventually(lambda: "webhook ops: " in caplog.text)
            happen(q, 2)
            await receiver.has(5)
            await marked(q, receiver)
        first, *more = [post.body for post in receiver.posts]
        assert more[:2] == [first, first]
        assert len(more) == 4
        lines = [one.getMessage() for one in caplog.records if "webhook" in one.getMessage()]
        assert len(lines) == 1
        assert why in lines[0]
        assert TOKEN not in caplog.text
        assert SECRET not in caplog.text


async def test_one_that_drips_the_rest_of_its_head_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "HOOK_SECONDS", 0.2)
    async with Receiver(drip(b"HTTP/1.1 200 OK\r\nX-Long: ")) as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(1)
            await eventually(lambda: q.service.webhooks.is_idle)


async def test_second_try_that_is_taken_is_the_last(caplog: pytest.LogCaptureFixture) -> None:
    async def behave(receiver: Receiver, writer: Writer, post: Post) -> None:
        good = len(receiver.posts) > 1
        await (accept if good else answer("503 Service Unavailable"))(receiver, writer, post)

    async with Receiver(behave) as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(2)
            await marked(q, receiver)
            assert len(receiver.posts) == 2
        assert "webhook" not in caplog.text


async def test_where_nobody_listens_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    hooks = {"ops": {"url": f"http://127.0.0.1:{free_port()}/{TOKEN}", "secret": SECRET}}
    async with running(NOBODY, webhooks=hooks) as q:
        happen(q)
        await eventually(lambda: "webhook ops: " in caplog.text)
        await eventually(lambda: q.service.webhooks.is_idle)
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("status", "how"),
    [(301, "Location"), (302, "Location"), (307, "location"), (308, "Location"), (503, "Refresh")],
)
async def test_it_goes_nowhere_else_whatever_the_answer_says(status: int, how: str) -> None:
    async with Receiver() as other:
        place = f"0; url={other.url}" if how == "Refresh" else other.url
        async with Receiver(answer(f"{status} Elsewhere", f"{how}: {place}")) as receiver:
            async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
                happen(q)
                await receiver.has(3)
                receiver.behave = accept
                await marked(q, receiver)
                assert len(receiver.posts) == 3
            assert (other.posts, other.open) == ([], 0)


async def test_proxies_of_the_environment_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Receiver() as receiver, Receiver() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(1)
        assert proxy.posts == []


@pytest.mark.parametrize("port", ["0", "65536", "99999", "x", "-1", ""])
async def test_url_with_a_port_that_is_none_is_refused_or_harms_nobody(
    port: str, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = {"ops": {"url": f"http://127.0.0.1:{port}/{TOKEN}", "events": [DONE]}}
    with contextlib.suppress(llmq.ConfigError):
        async with running(NOBODY, webhooks=hooks) as q:
            happen(q)
            await eventually(lambda: "webhook ops: " in caplog.text)
            await eventually(lambda: q.service.webhooks.is_idle)
    assert TOKEN not in caplog.text


# ---- Nobody waits ----------------------------------------------------------------------------


async def test_requests_are_served_while_a_receiver_holds_its_connection() -> None:
    async with FakeBackend() as fake, Receiver(hang) as receiver:
        async with running(fake.url, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(1)
            async with await Raw.open(q.port) as raw:
                body = json.dumps(chat("a")).encode()
                for _ in range(200):
                    await raw.send(http("POST", CHAT, {"Content-Type": "application/json"}, body))
                    assert (await raw.response()).status == 200
            assert (len(receiver.posts), receiver.open) == (1, 1)  # the first is held still
            receiver.released.set()
            await eventually(lambda: q.service.webhooks.is_idle)


async def test_one_that_hangs_keeps_no_other_waiting() -> None:
    async with Receiver(hang) as receiver, Receiver() as good:
        hooks = {**telling(receiver, DONE), "good": {"url": good.url, "events": [DONE]}}
        async with running(NOBODY, webhooks=hooks) as q:
            happen(q, 20)
            assert len(await good.has(20)) == 20
            assert len(receiver.posts) == 1
            receiver.released.set()


async def test_what_is_too_much_is_lost_counted_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Receiver(hang) as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(1)
            postman = q.service.webhooks.postmen["ops"]
            for turn in range(1, 4):
                happen(q, 300)
                await eventually(lambda: not q.gateway.journal.events)
                assert postman.lost == 300 * turn - llmq.HOOK_QUEUE
            receiver.released.set()
            await receiver.has(1 + llmq.HOOK_QUEUE)
            await marked(q, receiver)
            assert len(receiver.posts) == 1 + llmq.HOOK_QUEUE
        assert caplog.text.count("events are lost") == 1


def test_what_happens_between_two_looks_is_bounded() -> None:
    journal = llmq.Journal(llmq.Metrics())
    for number in range(5 * llmq.EVENTS_KEPT):
        journal.happened(DONE, job=number)
    assert len(journal.events) == llmq.EVENTS_KEPT


# ---- The stop --------------------------------------------------------------------------------


async def test_what_happened_last_is_told_before_the_end() -> None:
    async with Receiver() as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q, 3)
        assert receiver.events == [DONE] * 3


@pytest.mark.parametrize("behave", [hang, drip(b"HTTP")], ids=["hangs", "drips"])
async def test_a_receiver_does_not_hold_the_stop(
    behave: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "HOOK_SECONDS", 3600.0)
    async with Receiver(behave) as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q, 3)
            await receiver.has(1)
            monkeypatch.setattr(llmq, "LINGER_SECONDS", 0.1)
        assert receiver.open == 1  # it would have held it for an hour


async def test_a_pause_between_two_tries_does_not_hold_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "HOOK_TRIES", (0.0, 3600.0))
    async with Receiver(answer("500 No")) as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(1)
            monkeypatch.setattr(llmq, "LINGER_SECONDS", 0.1)
        assert len(receiver.posts) == 1


# ---- A process, and what it shows ------------------------------------------------------------


@pytest.mark.parametrize("behave", [hang, echo, answer("302 Found", "Location: /x")])
async def test_process_ends_beside_one_that_fails_and_shows_no_secret(
    behave: Any, tmp_path: Path
) -> None:
    async with Receiver(behave) as receiver:
        file = tmp_path / "llmq.json"
        document = {"backends": {"box": {"url": NOBODY}}, "webhooks": telling(receiver)}
        file.write_text(json.dumps(document))
        constants = {"HOOK_TRIES": (0.0, 0.01), "HOOK_SECONDS": 60.0, "LINGER_SECONDS": 0.2}
        flags = ("--port", "0", "--state", "", "--config", str(file), "--log-level", "debug")
        async with Tuned(*flags, **constants) as p:
            await receiver.has(1)  # the host is down
            if behave is not hang:
                await p.line("webhook ops: ")
            for path in ("/llmq/status", "/metrics", "/"):
                shown = await ask(p.port, "GET", path)
                assert shown.status == 200
                assert TOKEN.encode() not in shown.body
                assert SECRET.encode() not in shown.body
            document["webhooks"]["ops"]["events"] = ["no"]
            file.write_text(json.dumps(document))
            await ask(p.port, "POST", "/llmq/reload", json={})
            await p.line("nothing was changed")
            assert await p.ended(signal.SIGTERM) == 0
            assert TOKEN not in p.output
            assert SECRET not in p.output


@pytest.mark.parametrize("flags", [("show",), ("show", "--json"), ("check",)])
def test_config_shows_no_secret(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llmq.json"
    row = {"url": f"https://example.com/{TOKEN}", "secret": SECRET, "events": [DONE]}
    file.write_text(json.dumps({"webhooks": {"ops": row}}))
    assert not llmq.main(["config", *flags, "--config", str(file)])
    said = capsys.readouterr()
    assert (DONE in said.out) == ("show" in flags)
    assert TOKEN not in said.out + said.err
    assert SECRET not in said.out + said.err


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"url": f"ftp://example.com/{TOKEN}"}, "url"),
        ({"url": f"https://me:{TOKEN}@example.com/"}, "url"),
        ({"url": f"https://example.com/{TOKEN} x"}, "url"),
        ({"url": [f"https://example.com/{TOKEN}"]}, "url"),
        ({"url": f"https://example.com/{TOKEN}\n"}, "url"),
        ({"secret": SECRET}, "url"),
        ({"url": f"https://example.com/{TOKEN}", "secret": 5170915}, "secret"),
        ({"url": f"https://example.com/{TOKEN}", "secret": f"{SECRET}\n"}, "secret"),
        ({"url": f"https://example.com/{TOKEN}", "secret": [SECRET]}, "secret"),
        ({"url": f"https://example.com/{TOKEN}", "events": ["queue.ful"]}, "queue.full"),
        ({"url": f"https://example.com/{TOKEN}", "event": DONE}, "events"),
    ],
)
def test_mistake_is_named_without_the_secret(row: Any, why: str) -> None:
    with pytest.raises(llmq.ConfigError) as caught:
        llmq.parse_rows("file", "webhooks", {"ops": row})
    said = str(caught.value)
    assert said.startswith("file: webhooks.ops")
    assert why in said
    assert TOKEN not in said
    assert SECRET not in said
    assert "5170915" not in said


@pytest.mark.parametrize(
    "url",
    [
        "http://box",
        "http://box:8080",
        "https://box/hook?token=x&y=1#z",
        "https://box?token=x",
        "http://[::1]:80/x",
    ],
)
def test_whole_url_is_taken_as_it_is(url: str) -> None:
    (row,) = llmq.parse_rows("file", "webhooks", {"ops": {"url": url}}).values()
    assert row.url == url


# ---- A reload --------------------------------------------------------------------------------


async def test_new_row_is_told_and_a_removed_one_is_not() -> None:
    async with Receiver() as one, Receiver() as two:
        async with running(NOBODY, webhooks=telling(one, DONE)) as q:
            happen(q)
            await one.has(1)
            await reloaded(q, webhooks={"two": {"url": two.url, "events": [DONE]}})
            happen(q)
            await two.has(1)
            await marked(q, two)
            assert (one.events, two.events) == ([DONE], [DONE])
            await reloaded(q, webhooks={})
            happen(q)
            await eventually(lambda: not q.gateway.journal.events)
            await reloaded(q, webhooks=telling(one, DONE))
            happen(q)
            await one.has(2)
            assert (len(one.posts), len(two.posts)) == (2, 1)


async def test_row_that_is_changed_goes_where_it_says_now() -> None:
    async with Receiver() as one, Receiver() as two:
        async with running(NOBODY, webhooks=telling(one, DONE)) as q:
            happen(q)
            await one.has(1)
            await reloaded(q, webhooks=telling(two, DONE, secret="another-5f1d7c0a9b3e"))
            happen(q)
            (post,) = await two.has(1)
            digest = hmac.new(b"another-5f1d7c0a9b3e", post.body, hashlib.sha256).hexdigest()
            assert post.headers["x-llmq-signature"] == f"sha256={digest}"
            assert len(one.posts) == 1


@pytest.mark.parametrize("name", ["other", "ops"])
async def test_what_waited_for_a_row_goes_nowhere_that_is_not_configured_any_more(
    name: str,
) -> None:
    async with Receiver(hang) as receiver, Receiver() as other:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q, 5)
            await receiver.has(1)
            postman = q.service.webhooks.postmen["ops"]
            await eventually(lambda: not q.gateway.journal.events)
            await reloaded(q, webhooks={name: {"url": other.url, "events": [DONE]}})
            happen(q)
            await eventually(lambda: not q.gateway.journal.events)
            receiver.released.set()
            await other.has(1)
            await eventually(lambda: postman.is_idle or postman.closed.is_set())
            await marked(q, other)
            assert len(receiver.posts) == 1


async def test_removed_row_has_no_thread_any_more() -> None:
    before = threads()
    async with Receiver() as receiver:
        async with running(NOBODY, webhooks=telling(receiver, DONE)) as q:
            happen(q)
            await receiver.has(1)
            await reloaded(q, webhooks={})
            await eventually(lambda: not [one for one in threads() - before if "run" in one.name])


async def test_new_row_is_not_told_of_what_was_before_it() -> None:
    async with FakeBackend() as fake, Receiver() as receiver:
        async with running(fake.url, queue__max_depth=2) as q:
            q.gateway.set_mode(llmq.Mode.PAUSED)
            asked = asyncio.ensure_future(q.chat("a"))
            await eventually(lambda: q.gateway.scheduler.waiting)
            assert (await q.chat("b")).code == "queue_full"
            q.gateway.set_mode(llmq.Mode.OPEN)
            assert (await asked).status == 200
            happen(q)
            await eventually(lambda: not q.gateway.journal.events)  # there was a look
            await reloaded(q, webhooks=telling(receiver))
            await marked(q, receiver)
            assert receiver.events == []
