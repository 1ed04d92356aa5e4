"""What was used: by day, client and model as the runners told it, over restarts and midnight."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from tests.fake_ollama import (
    EVENTS,
    NDJSON,
    Ollama,
    Runner,
    line,
    named_event,
    post,
    stream,
    whole,
)
from tests.fakes import (
    ROOT,
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
    render_head,
    running,
    sse,
)
from tests.test_cli import command
from tests.test_metrics import record
from tests.test_store import names_in

NOBODY = "http://127.0.0.1:9"  # where no backend listens
NUMBERS = ("requests", "hits", "tokens_in", "tokens_out")
JSON = {"Content-Type": "application/json"}
Table = dict[tuple[str, str], list[int]]  # by client and model: NUMBERS


def epoch(text: str) -> float:
    """Seconds since 1970 of a time with its offset."""
    return datetime.fromisoformat(text).timestamp()


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time with a summer, by a rule that needs no data base."""
    need(hasattr(time, "tzset"), "no local time can be set here")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        llmq.day_of.cache_clear()
        yield
    time.tzset()
    llmq.day_of.cache_clear()


@pytest.fixture
def clock(berlin: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:  # noqa: ARG001
    """What sets the time of day that llmq sees."""
    local, shown = time.localtime, [0.0]

    def set_to(text: str) -> None:
        shown[0] = epoch(text)

    def localtime(when: float | None = None) -> time.struct_time:
        return local(shown[0] if when is None else when)

    monkeypatch.setattr(time, "time", lambda: shown[0])
    monkeypatch.setattr(time, "localtime", localtime)
    return set_to


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file and no variable of this machine steers a command."""
    for name in [name for name in os.environ if name.startswith(("LLMQ_", "LLM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(llmq, "CONFIG_PLACES", (str(tmp_path / "nowhere"),))


class Tuned(Process):
    """A process in which constants of llmq's are others, so that nobody waits a minute."""

    def __init__(self, *arguments: str, env: Any = None, **constants: Any) -> None:
        super().__init__(*arguments, env={"PYTHONPATH": str(ROOT), **(env or {})})
        code = f"import sys, llmq; vars(llmq).update({constants!r}); sys.exit(llmq.main())"
        self.command[1:2] = ["-c", code]


async def asked_usage(port: int, query: str = "") -> Answer:
    return await ask(port, "GET", f"/llmq/usage{query}")


async def usage(port: int, query: str = "") -> list[dict[str, Any]]:
    answer = await asked_usage(port, query)
    assert answer.status == 200, answer
    rows: list[dict[str, Any]] = answer.json()["usage"]
    return rows


def table_of(rows: Iterable[dict[str, Any]]) -> Table:
    """All days together."""
    table: Table = {}
    for row in rows:
        sums = table.setdefault((row["client"], row["model"]), [0] * len(NUMBERS))
        sums[:] = [had + row[name] for had, name in zip(sums, NUMBERS)]
    return table


async def told(q: running, text: str, client: str = "eve") -> None:
    answer = await q.chat(text, {"X-User-ID": client})
    assert answer.status == 200, answer


def on_disk(state: Path) -> Table:
    """What the state file holds, read from a copy as it is while llmq has it."""
    copy = state.with_suffix(".copy")
    shutil.copy(state, copy)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(f"{state}-wal", f"{copy}-wal")
    with contextlib.closing(sqlite3.connect(copy)) as database:
        rows = database.execute(f"SELECT client, model, {', '.join(NUMBERS)} FROM usage")  # noqa: S608
        return {(client, model): list(numbers) for client, model, *numbers in rows}


async def flushed(state: Path, table: Table) -> None:
    """Return once the file holds exactly this."""

    def is_there() -> bool:
        with contextlib.suppress(OSError, sqlite3.Error):  # it is being written
            return on_disk(state) == table
        return False

    await eventually(is_there)


# ---- What counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, [1, 0, 5, 3, 1.5]),
        ({"tokens": None, "tokens_in": None}, [1, 0, 0, 0, 1.5]),
        ({"cache": "miss"}, [1, 0, 5, 3, 1.5]),
        ({"cache": "hit", "backend": "", "tokens": None, "tokens_in": None}, [1, 1, 0, 0, 0]),
        ({"cache": "joined", "backend": "", "tokens": None, "tokens_in": None}, [1, 1, 0, 0, 0]),
        ({"outcome": "client_left", "tokens": None, "tokens_in": None}, [1, 0, 0, 0, 1.5]),
        ({"outcome": "backend_error", "status": 502, "tokens": None}, [1, 0, 5, 0, 1.5]),
    ],
    ids=["done", "no usage told", "miss", "hit", "joined", "left", "failed"],
)
def test_what_a_runner_or_the_cache_was_asked_counts(changes: Any, counts: list[float]) -> None:
    used = llmq.usage_of([(epoch("2026-03-01T12:00:00+00:00"), record(**changes))])
    assert list(used.values()) == [counts]


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "", "client": "-", "priority": "-", "outcome": "bad_request", "status": 400},
        {"backend": "", "outcome": "queue_full", "status": 429},
        {"backend": "", "outcome": "queue_full", "status": 429, "cache": "miss"},
        {"backend": "", "outcome": "client_left", "cache": "miss"},
        {"backend": "", "outcome": "done", "status": 202},
        {"route": "/llmq/leases"},
        {"route": "/llmq/models"},
        {"route": "/api/pull", "priority": "-", "tokens": None, "tokens_in": None},
    ],
    ids=[
        "not understood",
        "queue full",
        "queue full behind the cache",
        "left while it waited",
        "kept as a job",
        "lease",
        "load",
        "order",
    ],
)
def test_what_was_refused_or_ordered_counts_for_nothing(changes: Any) -> None:
    assert llmq.usage_of([(epoch("2026-03-01T12:00:00+00:00"), record(**changes))]) == {}


@pytest.mark.parametrize(
    ("when", "day"),
    [
        ("2026-03-01T23:59:59+01:00", "2026-03-01"),
        ("2026-03-02T00:00:00+01:00", "2026-03-02"),
        ("2026-07-01T22:30:00+00:00", "2026-07-02"),  # summer
        ("2026-12-31T23:00:00+00:00", "2027-01-01"),
        ("2026-10-25T00:30:00+02:00", "2026-10-25"),  # of 25 hours
        ("2026-10-25T23:30:00+01:00", "2026-10-25"),
        ("2026-03-29T23:30:00+02:00", "2026-03-29"),  # of 23
    ],
)
@pytest.mark.usefixtures("berlin")
def test_a_request_counts_for_the_day_here_on_which_it_ended(when: str, day: str) -> None:
    assert list(llmq.usage_of([(epoch(when), record())])) == [(day, "app:curl", "m")]


@pytest.mark.usefixtures("berlin")
def test_midnight_parts_what_is_counted_together() -> None:
    midnight = epoch("2026-03-02T00:00:00+01:00")
    used = llmq.usage_of([(midnight + after, record()) for after in (-0.001, 0, -60, 60, 3600)])
    assert {who[0]: facts[0] for who, facts in used.items()} == {"2026-03-01": 2, "2026-03-02": 3}


def test_sums_are_the_same_however_they_are_put_together() -> None:
    dice = random.Random(7)
    rows = [
        (
            epoch("2026-03-01T12:00:00+00:00") + dice.randrange(4 * 86400),
            record(
                client=dice.choice("abc"),
                model=dice.choice("mn"),
                backend=dice.choice(["", "box"]),
                cache=dice.choice(["", "hit"]),
                tokens=dice.choice([None, 0, 7]),
                total_s=0.5 + dice.randrange(8),  # halves, so that sums are exact
            ),
        )
        for _ in range(400)
    ]
    used: dict[Any, list[float]] = {}
    at = 0
    while at < len(rows):
        step = dice.randrange(1, 40)
        llmq.merge_usage(used, llmq.usage_of(rows[at : at + step]))
        at += step
    assert used == llmq.usage_of(rows)


def test_more_than_ten_thousand_clients_and_models_are_other_day_by_day() -> None:
    day = epoch("2026-03-01T12:00:00+00:00")
    rows = [(day, record(client=f"c{number}")) for number in range(llmq.MOST_USED + 50)]
    rows += [(day, record(client="c0"))]  # who is known stays known
    rows += [(day + 86400, record(client=f"d{number}", model="n")) for number in range(7)]
    used = llmq.usage_of(rows)
    assert len(used) == llmq.MOST_USED + 2
    first, second = (next(who for who in used if f"c{n}" in who) for n in (0, 1))
    others = {who[0]: facts[0] for who, facts in used.items() if who[1:] == ("other", "other")}
    assert (used[first][0], used[second][0]) == (2, 1)
    assert sorted(others.values()) == [7, 50]
    assert sum(facts[2] for facts in used.values()) == 5 * len(rows)


# ---- As the runners told ---------------------------------------------------------------------


class Counting:
    """Answers every route of a runner, and keeps a book of what it has told.

    The first word of a prompt says who asks, the second what is to become of it.
    """

    def __init__(self) -> None:
        self.dice = random.Random(11)
        self.told: Counter[tuple[str, str, str]] = Counter()  # by client, model, and "in" or "out"
        self.paths: set[str] = set()

    def number(self, who: tuple[str, str], way: str) -> int:
        """So many tokens, and they are in the book."""
        tokens = self.dice.randrange(1, 90)
        self.told[(*who, way)] += tokens
        return tokens

    async def reply(self, request: FakeRequest) -> None:
        asked = request.json
        said = asked.get("prompt") or asked.get("input") or asked["messages"][-1]["content"]
        said = said if isinstance(said, str) else "".join(part["text"] for part in said)
        client, fate, *_ = said.split()
        who = (client, asked["model"].partition(":")[0])
        self.paths.add(request.path)
        if fate == "fail":
            await request.status(500, {"error": {"message": "out of memory"}})
        elif fate == "leave":
            await self.begin(request)
        elif "embed" in request.path:
            await whole(request, self.embedding(request.path, who))
        elif request.path.startswith("/api/"):
            await self.native(request, asked, who)
        elif request.path.endswith("/messages"):
            await self.message(request, asked, who)
        else:
            await self.completion(request, asked, who)

    async def begin(self, request: FakeRequest) -> None:
        """The first piece of a stream, whose client does not wait for more."""
        native = request.path.startswith("/api/")
        said = {"message": {"role": "assistant", "content": "x"}, "response": "x"}
        event = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "x"}}]}
        data = line({"model": "m", "done": False, **said}) if native else sse(event)
        kind = NDJSON if native else EVENTS
        head = [("Content-Type", kind), ("Transfer-Encoding", "chunked")]
        await request.send(render_head(200, head) + chunk(data))
        await request.left()

    def embedding(self, path: str, who: tuple[str, str]) -> Any:
        tokens = self.number(who, "in")
        if path == "/api/embed":
            return {"model": who[1], "embeddings": [[0.5]], "prompt_eval_count": tokens}
        row = {"object": "embedding", "embedding": [0.5], "index": 0}
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": [row], "model": who[1], "usage": usage}

    async def native(self, request: FakeRequest, asked: Any, who: tuple[str, str]) -> None:
        counts = {"prompt_eval_count": self.number(who, "in")}
        counts["eval_count"] = self.number(who, "out")
        said = {"message": {"role": "assistant", "content": "x"}, "response": "x"}
        piece = {"model": who[1], "created_at": "2026-11-21T08:50:35.4Z", **said}
        end = {**piece, "done": True, "done_reason": "stop", **counts}
        if asked.get("stream") is False:
            await whole(request, end)
        else:
            await stream(request, [line({**piece, "done": False}), line(end)])

    async def message(self, request: FakeRequest, asked: Any, who: tuple[str, str]) -> None:
        usage = {"input_tokens": self.number(who, "in"), "output_tokens": self.number(who, "out")}
        text = [{"type": "text", "text": "x"}]
        common = {"type": "message", "id": "1", "role": "assistant", "model": who[1]}
        if not asked.get("stream"):
            facts = {"content": text, "stop_reason": "end_turn", "usage": usage}
            await whole(request, {**common, **facts})
            return
        begun = {**common, "content": [], "usage": {**usage, "output_tokens": 1}}
        told_last = {"output_tokens": usage["output_tokens"]}
        end = {"delta": {"stop_reason": "end_turn"}, "usage": told_last}
        events: list[tuple[str, Any]] = [("message_start", {"message": begun})]
        events += [("message_delta", end), ("message_stop", {})]
        data = [named_event(name, {"type": name, **facts}) for name, facts in events]
        await stream(request, data, EVENTS)

    async def completion(self, request: FakeRequest, asked: Any, who: tuple[str, str]) -> None:
        streams = bool(asked.get("stream"))
        common = {"id": "1", "created": 1, "model": who[1]}
        said = {"role": "assistant", "content": "x"}
        choice = {"index": 0, "finish_reason": "stop", "delta" if streams else "message": said}
        document: dict[str, Any] = {**common, "choices": [choice]}
        usage: dict[str, Any] = {}
        if not streams or asked.get("stream_options"):  # else it tells nothing
            counts = {"prompt_tokens": self.number(who, "in")}
            counts["completion_tokens"] = self.number(who, "out")
            usage = {"usage": {**counts, "total_tokens": sum(counts.values())}}
        if not streams:
            await whole(request, {"object": "chat.completion", **document, **usage})
            return
        event = {"object": "chat.completion.chunk", **document}
        last = [sse({**event, "choices": [], **usage})] if usage else []
        await stream(request, [sse(event), *last, sse("[DONE]")], EVENTS)


class Crowd:
    """Clients that ask all kinds of things, and a book of what must have been counted."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.requests: Counter[tuple[str, str]] = Counter()
        self.hits: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[int] = Counter()

    def question(self, client: str, number: int) -> tuple[str, str, Any]:
        """Its fate, and what is asked."""
        dice = self.dice
        model = dice.choice(["first", "second", "third"])
        fate = dice.choice(["go"] * 8 + ["fail", "leave", "refused", "unknown"])
        said = f"{client} {fate} {number}"
        messages = [{"role": "user", "content": said}]
        routes: list[tuple[str, Any]] = [
            ("/v1/chat/completions", {"messages": messages}),
            ("/v1/messages", {"messages": messages, "max_tokens": 9}),
            ("/api/chat", {"messages": messages}),
        ]
        if model == "first":  # the others are translated to what they have
            routes.append(("/api/generate", {"prompt": said}))
        path, body = dice.choice(routes)
        body["stream"] = fate == "leave" or dice.random() < 0.5
        if path == "/v1/chat/completions" and body["stream"] and dice.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        if fate == "go" and dice.random() < 0.25:
            path = dice.choice(["/v1/embeddings", "/api/embed"])
            body = {"input": f"{client} go {dice.randrange(3)}"}  # the same again and again
        if fate == "refused":
            body["stream"] = "yes"
        return fate, path, {"model": "nobody" if fate == "unknown" else model, **body}

    async def client(self, q: running, client: str, number: int) -> None:
        raw = await Raw.open(q.port)
        told = {"X-User-ID": client, **JSON}
        for turn in range(number):
            fate, path, body = self.question(client, turn)
            who = (f"user:{client}", body["model"])
            request = http("POST", path, told, json.dumps(body).encode())
            if fate == "leave":
                async with await Raw.open(q.port) as leaver:
                    await leaver.send(request)
                    await leaver.head()
                self.requests[who] += 1
                continue
            await raw.send(request)
            answer = await raw.response()
            self.statuses[answer.status] += 1
            hit = answer.headers.get("x-cache") in ("HIT", "JOINED")
            self.hits[who] += hit
            self.requests[who] += fate not in ("refused", "unknown")
            if answer.headers.get("connection", "").lower() == "close":
                raw = await Raw.open(q.port)
        raw.close()

    def table(self, *runners: Counting) -> Table:
        told: Counter[tuple[str, str, str]] = sum((one.told for one in runners), Counter())
        return {
            who: [n, self.hits[who], *(told[who[0][5:], who[1], way] for way in ("in", "out"))]
            for who, n in self.requests.items()
            if n
        }


@pytest.mark.untraced
@pytest.mark.deadline(30)
async def test_a_thousand_requests_of_all_kinds_count_as_the_runners_told(tmp_path: Path) -> None:
    books, crowd = [Counting(), Counting()], Crowd(5)
    settings: dict[str, Any] = {"server__state": str(tmp_path / "state.db"), "queue__slots": 4}
    native = Runner(["first:latest", "second:latest"], reply=books[0].reply)
    other = Runner(["third"], "llamacpp", reply=books[1].reply)
    async with native, other:
        for _ in range(2):  # a restart between the halves
            async with running(native.url, other.url, **settings) as q:
                await q.status()
                await asyncio.gather(*(crowd.client(q, f"c{n}", 100) for n in range(5)))
                await eventually(lambda q=q: not q.gateway.calls)
                expected, rows = crowd.table(*books), await usage(q.port)
                assert table_of(rows) == expected
                assert all((row["seconds"] > 0) == (row["requests"] > row["hits"]) for row in rows)
                today = (await q.status())["used_today"]
                sums = [sum(column) for column in zip(*expected.values())]
                assert [today[name] for name in NUMBERS] == sums
    native_paths = {"/api/chat", "/api/generate", "/api/embed", "/v1/embeddings"}
    assert books[0].paths == native_paths | {"/v1/chat/completions", "/v1/messages"}
    assert books[1].paths == {"/v1/chat/completions", "/v1/messages", "/v1/embeddings"}
    assert sum(crowd.statuses.values()) < 1000  # some have left
    assert min(crowd.statuses[status] for status in (200, 400, 404)) > 20
    assert sum(crowd.hits.values()) > 20


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_what_was_used_outlives_a_stop_and_after_a_flush_a_kill(
    end: signal.Signals, tmp_path: Path
) -> None:
    state = tmp_path / "state.db"
    before: Table = {("user:eve", "m"): [2, 0, 2, 5], ("user:bob", "m"): [1, 0, 1, 1]}
    async with FakeBackend() as fake:
        flags = ("--port", "0", "--backend", fake.url, "--state", str(state))
        seconds = 0.05 if end == signal.SIGKILL else 3600.0
        async with Tuned(*flags, KEEP_SECONDS=seconds) as p:
            for client, text in (("eve", "a b"), ("bob", "a"), ("eve", "a b c")):
                await ask(
                    p.port,
                    "POST",
                    "/v1/chat/completions",
                    json=chat(text),
                    headers={"X-User-ID": client},
                )
            assert table_of(await usage(p.port)) == before
            if end == signal.SIGKILL:
                await flushed(state, before)
            await p.ended(end)
        async with running(fake.url, server__state=str(state)) as q:
            assert table_of(await usage(q.port)) == before
            assert (await q.status())["used_today"]["tokens_out"] == 6
            await told(q, "a b c d")
            after = table_of(await usage(q.port))
            assert after == {**before, ("user:eve", "m"): [3, 0, 3, 9]}
            assert (await q.status())["used_today"]["requests"] == 4


async def test_orders_leases_and_what_was_refused_count_for_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"server__state": str(tmp_path / "state.db"), "queue__max_depth": 2}
    async with Ollama() as runner, running(runner.url, **settings) as q:
        for method, path, body in (
            ("POST", "/api/pull", {"model": "new", "stream": False}),
            ("POST", "/api/copy", {"source": "m", "destination": "n"}),
            ("DELETE", "/api/delete", {"model": "n"}),
            ("POST", "/llmq/models", {"action": "load", "model": "m"}),
            ("GET", "/v1/models", None),
        ):
            answer = await ask(q.port, method, path, json=body)
            assert answer.status in (200, 202), answer
        await eventually(lambda: not q.gateway.errands)
        lease = (await ask(q.port, "POST", "/llmq/leases", json={})).json()["id"]
        waits = post(q, "/v1/embeddings", {"model": "m", "input": "a"})
        await eventually(lambda: q.gateway.scheduler.waiting)
        full = await ask(q.port, "POST", "/v1/embeddings", json={"model": "m", "input": "b"})
        assert full.code == "queue_full"
        (ticket,) = q.gateway.scheduler.waiting
        q.gateway.cancel(q.gateway.calls[ticket])
        assert (await waits).status >= 400
        assert (await ask(q.port, "DELETE", f"/llmq/leases/{lease}")).status == 200
        assert (await q.chat("hi", model="nobody")).status == 404
        assert await usage(q.port) == []
        assert (await q.status())["used_today"]["requests"] == 0


# ---- Midnight --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
async def test_a_new_day_begins_at_midnight_here(
    kept: bool, clock: Callable[[str], None], tmp_path: Path
) -> None:
    clock("2026-03-01T23:59:59+01:00")
    state = str(tmp_path / "state.db") if kept else ""
    async with FakeBackend() as fake, running(fake.url, server__state=state) as q:
        await told(q, "a b")
        clock("2026-03-02T00:00:00+01:00")
        await told(q, "a b c")
        for _ in range(2):  # before it is written, and after
            rows = await usage(q.port)
            assert [(row["day"], row["tokens_out"]) for row in rows] == [
                ("2026-03-01", 2),
                ("2026-03-02", 3),
            ]
            assert [row["day"] for row in await usage(q.port, "?days=1")] == ["2026-03-02"]
            assert (await q.status())["used_today"]["tokens_out"] == 3
            await q.service.keeper.step()
        clock("2026-03-03T00:00:00+01:00")
        assert await usage(q.port, "?days=1") == []
        assert len(await usage(q.port, "?days=2")) == 1
        assert (await q.status())["used_today"]["requests"] == 0


@pytest.mark.parametrize(
    ("now", "days"),
    [
        ("2026-10-25T00:10:00+02:00", ["2026-10-24", "2026-10-25"]),
        ("2026-10-25T23:50:00+01:00", ["2026-10-24", "2026-10-25"]),  # the 25th hour
        ("2026-10-26T00:10:00+01:00", ["2026-10-25", "2026-10-26"]),
        ("2026-03-29T23:50:00+02:00", ["2026-03-28", "2026-03-29"]),
        ("2026-03-30T00:10:00+02:00", ["2026-03-29", "2026-03-30"]),  # 23 hours behind
    ],
)
async def test_days_are_those_of_the_calendar_however_long(
    now: str, days: list[str], clock: Callable[[str], None]
) -> None:
    clock(now)
    async with running(NOBODY) as q:
        used = q.gateway.journal.used
        for day in ("10-23", "10-24", "10-25", "10-26", "03-27", "03-28", "03-29", "03-30"):
            if f"2026-{day}" <= days[-1]:
                used[f"2026-{day}", "user:eve", "m"] = [1, 0, 1, 1, 0.5]
        assert [row["day"] for row in await usage(q.port, "?days=2")] == days


async def test_of_more_than_can_be_shown_the_latest_days_and_who_asked_most_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "MOST_USED", 20)
    state = {"server__state": str(tmp_path / "state.db")}
    async with FakeBackend() as fake, running(fake.url, **state) as q:
        days = [llmq.day_of(int(time.time() - ago * 86400)) for ago in range(5)]
        rows = [(day, f"user:{n}", "m", n + 1, 0, 1, 1, 0.1) for day in days for n in range(8)]
        await q.gateway.store.write((llmq.ADD_USAGE, rows))
        await told(q, "a b", "eve")
        found = await usage(q.port, "?days=5")
        assert sum(row["requests"] for row in found) == 5 * sum(range(1, 9)) + 1
        names = {day: {row["client"] for row in found if row["day"] == day} for day in days}
        everybody = {f"user:{n}" for n in range(8)}
        assert names[days[0]] == {*everybody, "user:eve"}
        assert names[days[1]] == everybody
        assert names[days[2]] == {"user:7", "user:6", "user:5", "other"}
        assert names[days[3]] == names[days[4]] == {"other"}


# ---- A store that fails ----------------------------------------------------------------------


async def test_while_another_has_the_file_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.db"
    other = sqlite3.connect(state, isolation_level=None)
    async with FakeBackend() as fake:
        with contextlib.closing(other):
            other.execute("BEGIN EXCLUSIVE")
            async with running(fake.url, server__state=str(state)) as q:
                for number in range(3):
                    await told(q, "a b")
                    caplog.clear()
                    await q.service.keeper.step()
                    lines = [one.message for one in caplog.records if one.levelname == "WARNING"]
                    assert len(lines) == 1
                    assert "another llmq has it; it is tried again" in lines[0]
                    assert (await q.status())["used_today"]["requests"] == number + 1
                other.execute("ROLLBACK")
                await q.service.keeper.step()
                await told(q, "a b")
                expected: Table = {("user:eve", "m"): [4, 0, 4, 8]}
                assert table_of(await usage(q.port)) == expected
        assert on_disk(state) == expected


async def test_a_full_disk_keeps_nobody_waiting_and_loses_nothing(tmp_path: Path) -> None:
    need(sys.platform == "linux", "limits of another process are Linux's")
    import resource

    state = tmp_path / "state.db"
    async with FakeBackend() as fake:
        flags = ("--port", "0", "--backend", fake.url, "--state", str(state))
        async with Tuned(*flags, KEEP_SECONDS=0.05) as p:
            resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            for _ in range(3):
                told_client = {"X-User-ID": "eve"}
                answer = await ask(
                    p.port, "POST", "/v1/chat/completions", json=chat("a b"), headers=told_client
                )
                assert answer.status == 200
                await p.line(r"state: \S*state\.db: .*; it is tried again")
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(p.pid, resource.RLIMIT_FSIZE, unlimited)
            await flushed(state, {("user:eve", "m"): [3, 0, 3, 6]})
            assert table_of(await usage(p.port)) == {("user:eve", "m"): [3, 0, 3, 6]}
            assert "Traceback" not in p.output


async def test_what_is_just_being_written_is_shown_once(tmp_path: Path) -> None:
    settings = {"server__state": str(tmp_path / "state.db")}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        keeper = q.service.keeper
        for number in range(1, 4):
            await told(q, "a b")
            first, _, second = await asyncio.gather(keeper.usage(1), keeper.step(), keeper.usage(1))
            expected: Table = {("user:eve", "m"): [number, 0, number, 2 * number]}
            assert table_of(second) == expected
            assert table_of(first) == expected


async def test_a_file_whose_usage_is_broken_keeps_llmq_from_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.db"
    async with FakeBackend() as fake:
        async with running(fake.url, server__state=str(state)) as q:
            await told(q, "a b")
        with contextlib.closing(sqlite3.connect(state)) as database:
            sql = "SELECT rootpage FROM sqlite_master WHERE name = 'usage'"
            ((root,),) = database.execute(sql)
            ((size,),) = database.execute("PRAGMA page_size")
        content = bytearray(state.read_bytes())
        content[(root - 1) * size : root * size] = b"\xff" * size
        state.write_bytes(content)
        caplog.clear()
        async with running(fake.url, server__state=str(state)) as q:
            assert any("set aside as" in one.message for one in caplog.records)
            await told(q, "a b c")
            assert table_of(await usage(q.port)) == {("user:eve", "m"): [1, 0, 1, 3]}


# ---- Where it is shown -----------------------------------------------------------------------


async def test_without_a_file_it_is_kept_in_memory_and_said_to_be() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for number in range(1, 4):
            await told(q, "a b")
            await q.service.keeper.step()
            answer = (await asked_usage(q.port)).json()
            assert answer["kept"] is False
            assert table_of(answer["usage"]) == {("user:eve", "m"): [number, 0, number, 2 * number]}


async def test_with_a_file_it_is_kept(tmp_path: Path) -> None:
    async with running(NOBODY, server__state=str(tmp_path / "state.db")) as q:
        assert (await asked_usage(q.port)).json() == {"usage": [], "kept": True}
    assert names_in(tmp_path) == []  # nothing was used, so nothing is kept


async def test_days_that_are_no_number_above_nothing_are_400() -> None:
    async with running(NOBODY) as q:
        for days in ("0", "x", "-1", "1.5", "07", "99999", "%C2%B2", "1%0A"):
            answer = await asked_usage(q.port, f"?days={days}")
            assert answer.status == 400, days
            assert answer.json()["error"]["param"] == "days"


@pytest.mark.parametrize("query", ["", "?days=1", "?days=9999", "?other=x"])
async def test_days_are_seven_unless_said_otherwise(query: str, tmp_path: Path) -> None:
    async with running(NOBODY, server__state=str(tmp_path / "state.db")) as q:
        now = time.time()
        days = [llmq.day_of(int(now - back * 86400)) for back in (0, 5, 8, 400)]
        q.gateway.journal.used.update({(day, "c", "m"): [1, 0, 0, 0, 0.25] for day in days})
        for _ in range(2):
            found = [row["day"] for row in await usage(q.port, query)]
            number = {"?days=1": 1, "?days=9999": 4}.get(query, 2)
            assert found == sorted(days[:number])
            await q.service.keeper.step()


@pytest.mark.parametrize(
    ("rights", "status"), [(["infer"], 403), (["infer", "models"], 403), (["control"], 200)]
)
async def test_with_keys_the_right_control_is_needed(rights: list[str], status: int) -> None:
    rows = {"own": {"key": "sk-own-5f1d7c0a9b3e", "rights": rights}}
    async with running(NOBODY, keys=rows) as q:
        assert (await asked_usage(q.port)).status == 401
        bearer = {"Authorization": "Bearer sk-own-5f1d7c0a9b3e"}
        assert (await ask(q.port, "GET", "/llmq/usage", headers=bearer)).status == status


async def test_pages_from_elsewhere_may_not_see_it() -> None:
    async with running(NOBODY) as q:
        evil = {"Origin": "https://evil.example"}
        answer = await ask(q.port, "GET", "/llmq/usage", headers=evil)
        assert answer.status == 403
        assert "access-control-allow-origin" not in answer.headers


async def test_the_command_prints_a_table_or_json(
    clean: None,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:

        async def printed(*flags: str) -> str:
            assert not await command("usage", "--url", q.base, *flags)
            return capsys.readouterr().out

        assert (await printed()).splitlines()[1:] == ["nothing yet"]
        await told(q, "a b c")
        await told(q, "a", "bob")
        titles, *rows = (await printed()).splitlines()
        assert titles.split()[:5] == ["DAY", "CLIENT", "MODEL", "REQUESTS", "HITS"]
        today = time.strftime("%Y-%m-%d")
        assert [row.split()[:7] for row in rows] == [
            [today, "user:bob", "m", "1", "0", "1", "1"],
            [today, "user:eve", "m", "1", "0", "1", "3"],
        ]
        assert json.loads(await printed("--json", "--days", "1")) == await usage(q.port)


@pytest.mark.parametrize("days", ["0", "-3", "123456"])
async def test_the_command_says_what_days_are(
    days: str,
    clean: None,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running(NOBODY) as q:
        assert await command("usage", "--url", q.base, "--days", days)
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("llmq: days is a number above 0")


async def test_the_command_passes_on_that_it_may_not(
    clean: None,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running(NOBODY, keys={"own": {"key": "sk-own-5f1d7c0a9b3e"}}) as q:
        assert await command("usage", "--url", q.base)
        assert "key" in capsys.readouterr().err
