"""Answers that are to outlive a restart: in the state file, and only as long as they hold."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fake_ollama import Runner, post, turns
from tests.fakes import eventually, running
from tests.test_cache import EMBED, asked, counting, embed, how, looked_at, numbered, tagged, twice


def rows_in(state: Path, sql: str = "SELECT count(*) FROM answers") -> Any:
    with contextlib.closing(sqlite3.connect(state)) as database, database:
        return database.execute(sql).fetchall()


@pytest.mark.parametrize("persist", [False, True])
@pytest.mark.parametrize("kind", ["ollama", "llamacpp"])
async def test_answers_of_a_runner_with_digests_outlive_a_restart_where_wanted(
    kind: str, persist: bool, tmp_path: Path
) -> None:
    kept = {"server__state": str(tmp_path / "state.db"), "cache__persist": persist}
    async with Runner(kind=kind, reply=numbered()) as runner:
        async with running(runner.url, **kept) as q:
            first = await asked(q, embed())
            assert await twice(q, embed("b")) == ["MISS", "HIT"]
        async with running(runner.url, **kept) as q:
            again = await asked(q, embed())
            survives = persist and kind == "ollama"
            assert how(again) == ("HIT" if survives else "MISS")
            assert (again.body == first.body) == survives
            runner.probe_answers["/api/tags"] = tagged("changed")
        if persist and kind == "ollama":
            async with running(runner.url, **kept) as q:
                assert how(await asked(q, embed())) == "MISS"


async def test_what_is_too_old_or_too_much_leaves_the_state_file_too(tmp_path: Path) -> None:
    state = tmp_path / "state.db"
    kept: dict[str, Any] = {"server__state": str(state), "cache__persist": True}
    async with Runner(reply=numbered()) as runner:
        async with running(runner.url, **kept) as q:
            for number in range(20):
                await asked(q, embed(f"{number}"))
        assert rows_in(state) == [(20,)]
        rows_in(
            state, "UPDATE answers SET until = 1 WHERE key IN (SELECT key FROM answers LIMIT 5)"
        )
        async with running(runner.url, **kept) as q:
            assert (await q.status())["cache"]["answers"] == 15
        assert rows_in(state) == [(15,)]
        async with running(runner.url, **kept, cache__max_bytes="4000") as q:
            await q.service.keeper.step()
            left = (await q.status())["cache"]["answers"]
            assert 0 < left < 15
        assert rows_in(state) == [(left,)]


@pytest.mark.parametrize(
    ("what", "sql"),
    [("answers", "SELECT count(*) FROM answers"), ("usage", "SELECT sum(requests) - 1 FROM usage")],
)
async def test_what_is_on_its_way_into_the_state_file_at_the_stop_gets_there(
    what: str, sql: str, tmp_path: Path
) -> None:
    state, disk = tmp_path / "state.db", threading.Event()
    async with counting(server__state=str(state), cache__persist=True) as (_, q):
        assert await twice(q, embed()) == ["MISS", "HIT"]
        await q.service.store.read("SELECT 1")
        q.gateway.journal.flush()
        q.service.store._thread.submit(disk.wait, 5)  # it is slow
        keep = getattr(q.service.keeper, f"keep_{what}")
        keeping = asyncio.ensure_future(keep())
        await turns()
        keeping.cancel()  # as at the stop all that runs in the background
        await asyncio.wait([keeping])
        disk.set()
    assert rows_in(state, sql) == [(1,)]


async def test_answers_that_the_state_file_does_not_take_are_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept: dict[str, Any] = {"server__state": str(tmp_path / "file" / "state.db")}
    async with counting(**kept, cache__persist=True) as (_, q):
        assert await twice(q, embed()) == ["MISS", "HIT"]
        await q.service.keeper.step()
        assert how(await asked(q, embed())) == "HIT"
    assert [one.exc_info for one in caplog.records if one.exc_info] == []


async def waits_or_ends(q: running, asking: asyncio.Future[Any]) -> None:
    await eventually(lambda: asking.done() or q.gateway.scheduler.waiting)


async def test_what_was_asked_before_any_runner_has_told_its_models_is_not_kept(
    tmp_path: Path,
) -> None:
    kept = {"server__state": str(tmp_path / "state.db"), "cache__persist": True}
    async with Runner(kind="llamacpp", reply=numbered()) as runner:
        answers = []
        for _ in range(2):  # a restart between them: by then it may be another model
            await runner.stop_listening()
            runner.drop_connections()
            async with running(runner.url, **kept) as q:
                first = post(q, EMBED, embed())
                await waits_or_ends(q, first)
                await runner.listen_again()
                await looked_at(q)
                answers.append((await first).body)
        assert answers[0] != answers[1]
