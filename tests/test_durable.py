"""Jobs outlive what may happen: a kill, a full disk, a broken file, another llmq."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import sqlite3
import sys
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from tests.fakes import FakeBackend, FakeRequest, Process, ask, chat, eventually, need, running
from tests.test_jobs import (
    ASYNC,
    CHAT,
    OPEN,
    cancel,
    is_there,
    listed,
    look,
    reached,
    result,
    serving,
    state,
    submit,
)

__all__ = ["state"]  # a fixture
# By hand: LLMQ_KILL_LOOPS=100 LLMQ_KILL_FIGURES=figures.txt python -m pytest tests/test_durable.py
LOOPS = int(os.environ.get("LLMQ_KILL_LOOPS", "3"))  # of fifty jobs, with a kill or more in each
SEED = int(os.environ.get("LLMQ_KILL_SEED", "13"))
JOBS = 50
MOST = 2  # times that a job is begun
SPENT = "llmq ended while it ran"


def bytes_of(path: Path | str) -> bytes:
    return Path(path).read_bytes()


def write(path: Path | str, content: bytes) -> None:
    Path(path).write_bytes(content)


def names_in(place: Path) -> list[str]:
    return sorted(one.name for one in place.iterdir())


# ---- Killed ----------------------------------------------------------------------------------


class Slow(FakeBackend):
    """A runner that takes a little for each request, and remembers what it was asked.

    A job is known by the number in its query.
    """

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.asked: Counter[int] = Counter()
        self.finished: Counter[int] = Counter()
        self.total = 0  # requests so far

    async def _answer(self, request: FakeRequest) -> None:
        number = int(request.path.partition("?job=")[2])
        self.asked[number] += 1
        self.total += 1
        await self._gate.wait()
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(self.chance.uniform(0, 0.02), over.set)
        await over.wait()
        if not request.connection.peer_closed():
            with contextlib.suppress(ConnectionError):
                await request.answer(request.text)
                self.finished[number] += 1


class Kills:
    """Fifty jobs, and again fifty, and an llmq that is killed at any moment of them."""

    def __init__(self, file: Path, runner: Slow, chance: random.Random) -> None:
        self.file, self.runner, self.chance = file, runner, chance
        self.owner: dict[int, str] = {}  # the job of a number, as its 202 said
        self.number = 0
        self.ends: dict[str, tuple[str, float]] = {}  # state and time of those seen to have ended
        self.unnoted: Counter[int] = Counter()  # begins of which the file knew nothing after a kill
        self.kills = self.open_at_kill = self.running_at_kill = 0

    def start(self) -> Process:
        flags = ("--slots", "3", "--state", str(self.file), "--log-level", "warning")
        return Process("--port", "0", "--backend", self.runner.url, *flags)

    async def submit(self, port: int, most: int) -> None:
        """Give it jobs, as long as it lives."""
        for _ in range(most):
            number, self.number = self.number, self.number + 1
            body = chat(f"job {number}")
            headers = {**ASYNC, "X-User-ID": f"owner{number % 3}"}
            try:
                path = f"{CHAT}?job={number}"
                answer = await ask(port, "POST", path, json=body, headers=headers)
            except (OSError, EOFError):
                return  # it was killed: nobody was told that this one is kept
            if answer.clean:
                assert answer.status == 202, answer
                self.owner[number] = answer.json()["id"]

    def read(self) -> dict[int, tuple[str, str, int, float, bytes]]:
        """What the file says of each job while nobody has it: id, state, attempts, end, answer."""
        sql = "SELECT target, client, id, state, attempts, ended, answer FROM jobs"
        with closing(sqlite3.connect(self.file)) as database:
            rows = database.execute(sql).fetchall()
        found = {int(target.partition("?job=")[2]): tuple(rest) for target, _, *rest in rows}
        owners = {int(target.partition("?job=")[2]): client for target, client, *_ in rows}
        assert len(found) == len(rows)
        assert owners == {number: f"user:owner{number % 3}" for number in found}
        return found  # type: ignore[return-value]

    def judge(self, *, killed: bool) -> None:
        """Nothing that was promised is lost, nothing that has ended ends again or runs again."""
        jobs = self.read()
        for number, ident in self.owner.items():
            assert jobs[number][0] == ident
        for number, (ident, status, attempts, ended, answer) in jobs.items():
            asked = self.runner.asked[number] - self.unnoted[number]
            if killed and asked > attempts:
                self.unnoted[number] += asked - attempts
            else:
                assert asked <= attempts, (number, asked, attempts)
            assert attempts <= MOST
            if status in OPEN:
                assert ident not in self.ends
                continue
            assert self.ends.setdefault(ident, (status, ended)) == (status, ended)
            if status == "succeeded":
                said = json.loads(answer)["choices"][0]["message"]["content"]
                assert said == f"job {number}"
        if killed:
            states = Counter(row[1] for row in jobs.values())
            self.kills += 1
            self.open_at_kill += states["queued"] + states["running"]
            self.running_at_kill += states["running"]

    async def kill(self, process: Process, moment: Callable[[], bool]) -> None:
        """Kill it a little after a moment."""
        await eventually(moment, 20)
        loop = asyncio.get_running_loop()
        loop.call_later(self.chance.uniform(0, 0.02), process.signal, signal.SIGKILL)
        assert await process.ended(0) == -signal.SIGKILL
        rows = self.read().items()
        self.done = {
            number: self.runner.asked[number] for number, row in rows if row[1] not in OPEN
        }
        self.judge(killed=True)

    def within(self, open_jobs: int) -> Callable[[], bool]:
        """A moment in which some of so many jobs have been asked, and others not."""
        target = self.runner.total + self.chance.randrange(max(1, open_jobs))
        return lambda: self.runner.total >= target

    def nothing_again(self) -> None:
        """What had ended before the last kill was asked no more."""
        assert {number: self.runner.asked[number] for number in self.done} == self.done

    async def loop(self) -> None:
        """Fifty jobs, one kill or more, and their end."""
        first = self.number
        async with self.start() as process:
            if self.chance.random() < 0.7:  # all are there, and none has ended
                self.runner.hold()
                await self.submit(process.port, JOBS)
                moment = self.within(JOBS - 6)
                self.runner.release()
                await self.kill(process, moment)
            else:  # while they come, the first of them at the runner for ever or not
                if self.chance.random() < 0.5:
                    self.runner.hold()
                giving = asyncio.ensure_future(self.submit(process.port, JOBS))
                target = len(self.owner) + self.chance.randrange(JOBS)
                await self.kill(process, lambda: len(self.owner) >= target)
                self.runner.release()
                await giving
        while self.chance.random() < 0.5:
            rows = self.read().values()
            left = [row for row in rows if row[1] == "queued" or (row[1] in OPEN and row[2] < MOST)]
            moment = self.within(len(left))
            async with self.start() as process:
                await self.kill(process, moment)
            self.nothing_again()
        async with self.start() as process:
            await self.submit(process.port, first + JOBS - self.number)
            q = running()
            q.port = process.port
            while (await q.status())["jobs"] != {"queued": 0, "running": 0}:
                pass
            self.nothing_again()
            assert await process.ended() == 0
        self.judge(killed=False)

    def figures(self) -> str:
        jobs, asked, finished = self.read(), self.runner.asked, self.runner.finished
        states = Counter(row[1] for row in jobs.values())
        over = [number for number in asked if asked[number] > MOST]
        told = {
            "kills": self.kills,
            "jobs": len(jobs),
            "open at a kill": round(self.open_at_kill / self.kills, 1),
            "of these running": round(self.running_at_kill / self.kills, 1),
            **states,
            "asked": sum(asked.values()),
            "asked for 50 jobs": round(50 * sum(asked.values()) / len(jobs), 2),
            "asked twice": len([number for number in asked if asked[number] == MOST]),
            "asked more often than max_attempts": len(over),
            "begins not noted": sum(self.unnoted.values()),
            "finished twice by the runner": len([one for one in finished.values() if one > 1]),
        }
        return ", ".join(f"{name}: {value}" for name, value in told.items())


@pytest.mark.deadline(30 + 10 * LOOPS)
async def test_killed_at_any_moment_no_job_is_lost_and_none_ends_twice(state: Path) -> None:
    need(os.name == "posix", "signals as POSIX has them")
    chance = random.Random(SEED)
    async with Slow(chance) as runner:
        kills = Kills(state, runner, chance)
        for number in range(1, LOOPS + 1):
            await kills.loop()
            figures = f"loops: {number}, {kills.figures()}"
            if place := os.environ.get("LLMQ_KILL_FIGURES"):
                write(place, figures.encode())
        assert kills.open_at_kill >= kills.kills
        for number, (_, status, attempts, _, _) in kills.read().items():
            assert status in ("succeeded", "failed")
            assert status == "succeeded" or attempts == MOST
            assert runner.asked[number] <= MOST + kills.unnoted[number], figures


async def killed_while_it_runs(state: Path, fake: FakeBackend, *flags: str) -> str:
    """The id of the one job there is, of which an llmq has been killed that ran it."""
    common = ("--port", "0", "--backend", fake.url, "--state", str(state))
    async with Process(*common, *flags) as process:
        q = running()
        q.port = process.port
        idents = await listed(q) or [await submit(q, "hi")]
        request = await fake.arrived()
        await reached(q, idents[0], "running")
        assert await process.ended(signal.SIGKILL) == -signal.SIGKILL
    await request.left()
    return idents[0]


async def test_what_ran_at_a_kill_runs_again(state: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        ident = await killed_while_it_runs(state, fake)
        async with serving(state, fake) as q:
            await (await fake.arrived()).answer("at last")
            assert (await reached(q, ident, "succeeded"))["attempts"] == 2
            assert (await result(q, ident)).content == "at last"


async def test_what_ran_at_as_many_kills_as_it_may_begin_has_failed_and_says_why(
    state: Path,
) -> None:
    async with FakeBackend(auto=False) as fake:
        for _ in range(2):
            ident = await killed_while_it_runs(state, fake)
        async with serving(state, fake) as q:
            facts = await look(q, ident)
            assert (facts["status"], facts["attempts"]) == ("failed", 2)
            assert SPENT in facts["error"]
            answer = await result(q, ident)
            assert answer.status == 500
            assert SPENT in answer.json()["error"]["message"]
            assert (await q.status())["jobs"] == {"queued": 0, "running": 0}
            assert len(fake.requests) == 2


async def test_what_a_job_asks_is_kept_no_longer_than_it_takes(state: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        for _ in range(2):
            spent = await killed_while_it_runs(state, fake)
        async with serving(state, fake) as q:
            idents = [await submit(q, "secret one"), await submit(q, "secret two"), spent]
            await (await fake.arrived()).answer("well")
            await cancel(q, idents[1])
            await reached(q, idents[0], "succeeded")
            for ident in idents:
                rows = await q.gateway.store.read("SELECT body FROM jobs WHERE id = ?", ident)
                assert rows == [(None,)], ident


# ---- Stopped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("patient", [True, False])
async def test_asked_to_stop_it_waits_for_a_job_as_for_a_request(
    patient: bool, state: Path
) -> None:
    flags = ("--drain-timeout", "5s" if patient else "100ms")
    common = ("--port", "0", "--state", str(state), *flags)
    async with FakeBackend(auto=False) as fake:
        async with Process(*common, "--backend", fake.url) as process:
            q = running()
            q.port = process.port
            ident = await submit(q, "hi")
            request = await fake.arrived()
            await reached(q, ident, "running")
            process.signal(signal.SIGTERM)
            await process.line("waits .* for 1 running request")
            if patient:
                await request.answer("done")
            assert await process.ended(0) == 0
        async with serving(state, fake) as q:
            if not patient:
                await (await fake.arrived()).answer("done")
            facts = await reached(q, ident, "succeeded")
            assert facts["attempts"] == 1
            assert (await result(q, ident)).content == "done"
            assert len(fake.requests) == (1 if patient else 2)


# ---- Nowhere to keep anything ----------------------------------------------------------------


async def cannot(q: running, why: str = "") -> None:
    """A job is refused with the reason, and the rest goes on."""
    for headers, more in ((ASYNC, {}), ({}, {"router": {"mode": "async"}})):
        answer = await q.chat("later", headers, **more)
        assert (answer.status, answer.code) == (507, "insufficient_storage")
        assert answer.headers["x-should-retry"] == "false"
        assert why in answer.json()["error"]["message"]
    now = await q.chat("now")
    assert (now.status, now.content) == (200, "now")
    assert (await ask(q.port, "GET", "/health")).status == 200


async def test_without_a_state_file_there_are_no_jobs() -> None:
    async with FakeBackend() as fake, running(fake.url, server__state="") as q:
        await cannot(q, "--state")
        assert await listed(q) == []
        assert (await ask(q.port, "GET", "/v1/jobs/job_0")).status == 404
        assert (await cancel(q, "job_0")).status == 404
        assert [request.text for request in fake.requests] == ["now"]


async def test_where_it_may_be_answered_later_and_cannot_be_kept_it_is_507(state: Path) -> None:
    async with FakeBackend() as fake, running(fake.url, server__state="") as q:
        router = {"allowAsync": True}
        assert (await q.chat("one", router=router)).status == 200
        fake.hold()
        first = asyncio.ensure_future(q.chat("two"))
        await eventually(lambda: len(fake.requests) == 2)
        assert (await q.chat("three", router=router)).status == 507
        fake.release()
        assert (await first).status == 200
        assert not is_there(state)


async def test_the_demo_has_no_jobs(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    async with Process("--port", "0", "--demo", env=env) as process:
        headers = {**ASYNC, "Content-Type": "application/json"}
        body = chat("hi", model=llmq.DEMO_MODEL)
        answer = await ask(process.port, "POST", CHAT, json=body, headers=headers)
        assert (answer.status, answer.code) == (507, "insufficient_storage")
        assert names_in(tmp_path) == []


async def test_where_nothing_can_be_written_a_job_is_507(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    places = [tmp_path / "file" / "state.db", tmp_path / "directory"]
    if sys.platform == "linux":
        places += [Path("/sys/llmq.db"), Path("/sys/llmq/state.db")]  # read-only also to root
    async with FakeBackend() as fake:
        for place in places:
            async with serving(place, fake) as q:
                await cannot(q)


async def test_a_file_that_is_read_only_is_left_as_it_is(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeBackend() as fake:
        async with serving(state, fake) as q:
            await reached(q, await submit(q, "hi"), "succeeded")
        before, really_open = bytes_of(state), os.open

        def refusing(path: Any, flags: int, *more: Any, **also: Any) -> int:
            if str(path) == str(state) and flags & (os.O_RDWR | os.O_WRONLY):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return really_open(path, flags, *more, **also)

        monkeypatch.setattr(os, "open", refusing)  # modes say nothing to root
        caplog.clear()
        async with serving(state, fake) as q:
            lines = [one.message for one in caplog.records if "state.db" in one.message]
            assert len(lines) == 1
            await cannot(q, os.strerror(errno.EROFS))
        assert bytes_of(state) == before
        assert names_in(state.parent) == [state.name]


async def test_a_full_disk_is_507_until_there_is_room_again_and_loses_nothing(
    state: Path,
) -> None:
    need(sys.platform == "linux", "limits of another process are Linux's")
    import resource

    everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    async with FakeBackend(auto=False) as fake:
        common = ("--port", "0", "--backend", fake.url, "--state", str(state))
        async with Process(*common) as process:
            q = running()
            q.port = process.port
            first, second = await submit(q, "one"), await submit(q, "two")
            request = await fake.arrived()
            await reached(q, first, "running")
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
            for _ in range(2):
                answer = await q.chat("later", ASYNC)
                assert (answer.status, answer.code) == (507, "insufficient_storage")
                assert str(state) in answer.json()["error"]["message"]
            await request.answer("done")  # cannot be kept yet
            await process.line("has ended, and cannot be kept")
            now = asyncio.ensure_future(q.chat("now"))
            for _ in range(
                2
            ):  # what was asked for now, and the second job, which runs all the same
                request = await fake.arrived()
                await request.answer(request.text)
            assert (await now).content == "now"
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, everything)
            third = await submit(q, "three")
            await (await fake.arrived()).answer("three")
            for ident, text in ((third, "three"), (first, "done"), (second, "two")):
                await reached(q, ident, "succeeded")  # no later than it is tried again
                assert (await result(q, ident)).content == text
            assert len(fake.requests) == 4


async def test_a_disk_that_is_full_from_the_start_keeps_nobody_from_being_served(
    state: Path, tmp_path: Path
) -> None:
    need(os.name == "posix", "limits as POSIX has them")
    python = tmp_path / "python"
    write(python, f'#!/bin/sh\nulimit -f 1\nexec {sys.executable} "$@"\n'.encode())
    python.chmod(0o700)
    async with FakeBackend(auto=False) as fake:
        ident = await killed_while_it_runs(state, fake)
        fake.auto = True
        flags = ("--port", "0", "--backend", fake.url, "--state", str(state))
        async with Process(*flags, python=str(python)) as process:
            q = running()
            q.port = process.port
            await cannot(q)
        async with serving(state, fake) as q:
            await reached(q, ident, "succeeded")


async def test_a_file_that_may_not_grow_is_full(state: Path) -> None:
    """As SQLite itself says it: `database or disk is full`."""
    async with FakeBackend() as fake, serving(state, fake) as q:
        await reached(q, await submit(q, "hi"), "succeeded")
        store = q.gateway.store

        def bound() -> None:
            ((pages,),) = store._database.execute("PRAGMA page_count")
            store._database.execute(f"PRAGMA max_page_count = {pages}")

        await asyncio.get_running_loop().run_in_executor(store._thread, bound)
        answer = await q.chat("x" * 200_000, ASYNC)
        assert (answer.status, answer.code) == (507, "insufficient_storage")
        assert "full" in answer.json()["error"]["message"]
        assert (await q.chat("now")).status == 200
        ident = await submit(q, "small")
        await reached(q, ident, "succeeded")


async def test_a_file_that_has_all_bytes_it_may_is_507(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, jobs__max_bytes=300_000) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        idents = []
        while (answer := await q.chat("x" * 50_000, ASYNC)).status == 202:
            idents.append(answer.json()["id"])
        assert (answer.status, answer.code) == (507, "insufficient_storage")
        assert "jobs.max_bytes" in answer.json()["error"]["message"]
        assert 2 <= len(idents) <= 6
        assert (await q.chat("x" * 400_000, ASYNC)).status == 507
        for ident in idents:  # what has ended makes room
            assert (await cancel(q, ident)).status == 200
        assert (await q.chat("x" * 50_000, ASYNC)).status == 202


async def test_jobs_that_come_at_once_fill_no_more_than_all_may(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, jobs__max_bytes=300_000) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        answers = await asyncio.gather(*[q.chat("x" * 120_000, ASYNC) for _ in range(6)])
        assert sorted(answer.status for answer in answers) == [202] * 2 + [507] * 4
        for answer in answers:
            if answer.status == 202:
                await cancel(q, answer.json()["id"])


# ---- Files of others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [f"PRAGMA user_version = {len(llmq.UPGRADES) + 1}", "CREATE TABLE jobs (a)"],
    ids=["newer", "foreign"],
)
async def test_a_file_of_a_newer_llmq_or_another_program_is_not_touched(
    sql: str, state: Path
) -> None:
    with closing(sqlite3.connect(state)) as database:
        database.execute(sql)
    before = bytes_of(state)
    async with FakeBackend() as fake, serving(state, fake) as q:
        await cannot(q, "a newer llmq wrote it, or another program")
        assert (await ask(q.port, "GET", "/v1/jobs")).status == 507
    assert bytes_of(state) == before


async def test_a_broken_file_is_set_aside_and_new_jobs_run(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeBackend() as fake:
        async with serving(state, fake) as q:
            lost = await submit(q, "hi")
            await reached(q, lost, "succeeded")
        content = b"noise" * 5000
        write(state, content)
        caplog.clear()
        async with serving(state, fake) as q:
            lines = [one.message for one in caplog.records if "state.db" in one.message]
            assert len(lines) == 1
            assert "set aside as" in lines[0]
            assert (await result(q, lost)).status == 404
            ident = await submit(q, "again")
            await reached(q, ident, "succeeded")
        assert bytes_of(f"{state}.broken-1") == content
        async with serving(state, fake) as q:
            assert (await result(q, ident)).content == "again"


async def test_a_file_that_breaks_meanwhile_is_set_aside_and_serving_goes_on(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        for number in range(30):
            await submit(q, f"{number} " + "x" * 5000)
        jobs, store = q.gateway.jobs, q.gateway.store
        await eventually(lambda: not (jobs.queued or jobs.active or jobs.news.is_set()))
        await store.read("SELECT 1")  # behind the last look for a job that waits
        await asyncio.get_running_loop().run_in_executor(store._thread, store._close)
        content = bytes_of(state)
        write(state, content[:4096] + b"\xff" * (len(content) - 4096))
        answer = await ask(q.port, "GET", "/v1/jobs")
        assert (answer.status, answer.code) == (507, "insufficient_storage")
        assert is_there(f"{state}.broken-1")
        assert (await q.chat("now")).status == 200
        await reached(q, await submit(q, "again"), "succeeded")


async def test_a_file_of_the_first_schema_is_upgraded_and_keeps_its_rows(state: Path) -> None:
    row = ("clients", "user:eve", json.dumps({"weight": [7, 1.0]}))
    with closing(sqlite3.connect(state)) as database, database:
        database.execute(
            "CREATE TABLE changes (kind TEXT, name TEXT, facts TEXT, PRIMARY KEY (kind, name))"
        )
        database.execute("PRAGMA user_version = 1")
        database.execute("INSERT INTO changes VALUES (?, ?, ?)", row)
    async with FakeBackend() as fake:
        async with serving(state, fake) as q:
            assert q.gateway.clients.of("user:eve").weight == 7
            await reached(q, await submit(q, "hi"), "succeeded")
        with closing(sqlite3.connect(state)) as database:
            assert database.execute("SELECT * FROM changes").fetchall() == [row]
            assert database.execute("PRAGMA user_version").fetchone() == (len(llmq.UPGRADES),)
            assert database.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
        async with serving(state, fake) as q:
            assert len(await listed(q)) == 1


async def test_a_second_llmq_has_no_jobs_and_leaves_those_of_the_first(state: Path) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        ident = await submit(q, "hi")
        request = await fake.arrived()
        await reached(q, ident, "running")
        waits = await submit(q, "two")
        flags = ("--backend", fake.url, "--state", str(state))
        async with Process("--port", "0", *flags) as process:
            assert process.output.count("another llmq has it") == 1
            other = running()
            other.port = process.port
            answer = await other.chat("later", ASYNC)
            assert (answer.status, answer.code) == (507, "insufficient_storage")
            assert "another llmq has it" in answer.json()["error"]["message"]
            assert await process.ended() == 0
        assert (await look(q, ident))["attempts"] == 1
        await request.answer("one")
        await (await fake.arrived()).answer("two")
        for one in (ident, waits):
            await reached(q, one, "succeeded")
        assert len(fake.requests) == 2


async def test_the_file_is_for_its_owner_alone_and_waits_for_the_first_job(state: Path) -> None:
    place = state.parent / "deep" / "state.db"
    async with FakeBackend() as fake, serving(place, fake) as q:
        assert await listed(q, "?all=1") == []
        assert (await q.chat("now")).status == 200
        assert not place.parent.exists()
        await submit(q, "later")
        files = [*place.parent.iterdir()]
        assert {file.name for file in files} == {"state.db", "state.db-wal"}
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert place.parent.stat().st_mode & 0o777 == 0o700
        ((mode,),) = await q.gateway.store.read("PRAGMA journal_mode")
        assert mode == "wal"


async def test_the_disk_is_never_waited_for_by_those_who_ask_for_something_else(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every statement is carried out in the one thread of the store."""
    async with FakeBackend() as fake, serving(state, fake) as q:
        seen: set[str] = set()
        slow = threading.Event()
        execute = q.gateway.store._execute

        def noted(*facts: Any, **more: Any) -> Any:
            seen.add(threading.current_thread().name)
            assert slow.wait(5)
            return execute(*facts, **more)

        monkeypatch.setattr(q.gateway.store, "_execute", noted)
        later = asyncio.ensure_future(q.chat("later", ASYNC))
        await eventually(lambda: seen)
        assert (await q.chat("now")).content == "now"
        assert not later.done()
        slow.set()
        assert (await later).status == 202
        await reached(q, (await later).json()["id"], "succeeded")
        assert len(seen) == 1
        assert threading.main_thread().name not in seen
