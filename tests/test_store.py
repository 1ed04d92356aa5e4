"""What outlives a restart: the state file, and what becomes of it when it cannot be used."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.fakes import Process, ask, eventually, need, running

NOBODY = "http://127.0.0.1:9"  # where no backend listens
EVE = "/llmq/clients/user:eve"


async def change(port: int, path: str = EVE, **values: Any) -> Any:
    """`class_` is `class`, which is a word of Python's."""
    told = {name.rstrip("_"): value for name, value in values.items()}
    return await ask(port, "POST", path, json=told)


def names_in(place: Path) -> list[str]:
    return sorted(one.name for one in place.iterdir())


async def settings_of(q: running, name: str = "user:eve") -> Any:
    return q.gateway.clients.of(name)


def serving(state: Path, **settings: Any) -> running:
    return running(NOBODY, server__state=str(state), **settings)


async def reloaded(q: running, **settings: Any) -> None:
    """What the file says is other now."""
    values = {**q.values, **{key.replace("__", "."): one for key, one in settings.items()}}
    q.service.read = lambda: llmq.merge_layers([("file", values)])
    answer = await ask(q.port, "POST", "/llmq/reload", json={})
    assert answer.json() == {"config_error": None}


# ---- It outlives a restart -------------------------------------------------------------------


async def test_changes_at_run_time_outlive_a_kill(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state.db"
    flags = ("--port", "0", "--backend", NOBODY, "--state", str(state))
    async with Process(*flags) as p:
        assert names_in(tmp_path) == []  # nothing is to be kept yet
        assert (await change(p.port, class_="high", weight=2)).status == 200
        assert (await change(p.port, EVE, weight=3, boost=True)).status == 200
        assert (await change(p.port, "/llmq/ips", ip="10.0.0.9", blocked=True)).status == 200
        assert (await change(p.port, "/llmq/ips", ip="10.0.0.8", blocked=True)).status == 200
        assert (await change(p.port, "/llmq/ips", ip="10.0.0.8", blocked=False)).status == 200
        assert state.stat().st_mode & 0o777 == 0o600
        modes = [(state.parent / name).stat().st_mode & 0o077 for name in names_in(state.parent)]
        assert not any(modes)
        p.signal(signal.SIGKILL)
        assert await p.ended(0) == -signal.SIGKILL
    async with Process(*flags) as p:
        assert (await ask(p.port, "GET", "/llmq/status")).json()["ips"] == ["10.0.0.9"]
        facts = (await change(p.port, blocked=False)).json()
        assert [facts[key] for key in ("class", "weight", "boost")] == ["high", 3, True]
        assert await p.ended() == 0
    assert names_in(state.parent) == ["state.db"]


async def test_the_usual_place_is_that_of_xdg(tmp_path: Path) -> None:
    for env, place in (
        ({"XDG_STATE_HOME": str(tmp_path)}, tmp_path),
        ({"HOME": str(tmp_path / "home")}, tmp_path / "home" / ".local" / "state"),
    ):
        async with Process("--port", "0", "--backend", NOBODY, env=env) as p:
            assert (await change(p.port, boost=True)).status == 200
            assert (place / "llmq" / "llmq.db").exists()


@pytest.mark.parametrize("flags", [("--state", ""), ("--demo",)])
async def test_without_a_state_file_changes_hold_until_the_end(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    more = () if "--demo" in flags else ("--backend", NOBODY)
    async with Process("--port", "0", *more, *flags, env=env) as p:
        assert (await change(p.port, boost=True)).json()["boost"] is True
        assert names_in(tmp_path) == []


async def test_any_kind_of_facts_is_kept_and_forgotten(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    store = llmq.Store(path)
    assert await store.load() == {}
    assert names_in(tmp_path) == []
    await store.put("backends", "gpu", {"url": "http://box:1"})
    await store.put("backends", "old", {"url": "http://box:2"})
    await store.put("clients", "gpu", {"weight": [2, 1]})
    await store.put("backends", "gpu", {"url": "http://box:3"})
    await store.put("backends", "old", None)
    await store.close()
    store = llmq.Store(path)
    kept = {"backends": {"gpu": {"url": "http://box:3"}}, "clients": {"gpu": {"weight": [2, 1]}}}
    assert await store.load() == kept
    await store.close()


# ---- The file's own word ---------------------------------------------------------------------


async def test_a_change_holds_until_the_files_own_value_changes(tmp_path: Path) -> None:
    state = tmp_path / "state.db"
    first: Any = {"user:eve": {"weight": 2, "class": "low"}}
    other: Any = {"user:eve": {"weight": 3, "class": "low"}}
    async with serving(state, clients=first) as q:
        await change(q.port, weight=5, blocked=True)
        await reloaded(q, clients={**first, "user:bob": {"weight": 9}})
        eve = await settings_of(q)
        assert (eve.weight, eve.blocked, eve.class_) == (5, True, "low")
        await reloaded(q, clients=other)
        eve = await settings_of(q)
        assert (eve.weight, eve.blocked) == (3, True)
        await reloaded(q, clients=first)
        assert (await settings_of(q)).weight == 2
    async with serving(state, clients=first) as q:  # nor does it come back with a restart
        eve = await settings_of(q)
        assert (eve.weight, eve.blocked) == (2, True)
        await change(q.port, weight=7)
    async with serving(state, clients=other) as q:  # the file changed while nothing ran
        assert (await settings_of(q)).weight == 3


async def test_null_is_as_in_the_file(tmp_path: Path) -> None:
    async with serving(tmp_path / "state.db", clients={"user:eve": {"weight": 2}}) as q:
        await change(q.port, weight=5, class_="high")
        answer = await change(q.port, weight=None, class_=None)
        assert (answer.json()["weight"], answer.json()["class"]) == (2, "")


async def test_blocked_in_the_file_may_be_undone_until_the_file_says_otherwise(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path / "state.db", ips__blocked=["10.0.0.9", "10.0.0.8"]) as q:
        await change(q.port, "/llmq/ips", ip="10.0.0.9", blocked=False)
        assert (await q.status())["ips"] == ["10.0.0.8"]
        await reloaded(q, ips__blocked=["10.0.0.9"])
        assert (await q.status())["ips"] == []
        await reloaded(q, ips__blocked=[])
        await reloaded(q, ips__blocked=["10.0.0.9"])
        assert (await q.status())["ips"] == ["10.0.0.9"]


async def test_address_that_is_not_blocked_any_more_has_its_own_row_still(tmp_path: Path) -> None:
    rows = {"ip:10.0.0.9": {"weight": 3, "class": "low"}}
    settings: dict[str, Any] = {"clients": rows, "ips__blocked": ["10.0.0.9"]}
    async with serving(tmp_path / "state.db", **settings) as q:
        await change(q.port, "/llmq/ips", ip="10.0.0.9", blocked=False)
        address = await settings_of(q, "ip:10.0.0.9")
        assert (address.blocked, address.weight, address.class_) == (False, 3, "low")


async def test_a_reload_that_blocks_ends_what_waits() -> None:
    async with running(NOBODY) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        waiting = asyncio.ensure_future(q.chat("hi", {"X-User-ID": "eve"}))
        await eventually(lambda: q.gateway.scheduler.waiting)
        await reloaded(q, clients={"user:eve": {"blocked": True}})
        assert (await waiting).status == 403


# ---- A file of no use ------------------------------------------------------------------------


async def refused(q: running, why: str) -> None:
    """A change is refused with the reason, and nothing of it holds."""
    answer = await change(q.port, weight=9)
    assert answer.status == 507
    assert answer.code == "insufficient_storage"
    assert why in answer.json()["error"]["message"]
    assert (await settings_of(q)).weight == 1
    assert (await ask(q.port, "GET", "/health")).status == 200


@pytest.mark.parametrize("what", ["noise", "torn", "rows"])
async def test_a_broken_file_is_set_aside_with_one_line(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.db"
    async with serving(state) as q:
        for number in range(100):
            await change(q.port, f"/llmq/clients/user:{number}", weight=2)
    content = state.read_bytes()
    if what == "noise":
        content = b"noise" * 1000
    elif what == "torn":
        content = content[:4096] + b"\xff" * (len(content) - 4096)
    else:
        content = content[:100] + b"\x00" * 3996 + content[4096:]
    state.write_bytes(content)
    (tmp_path / "state.db.broken-1").write_bytes(b"of before")
    caplog.clear()
    async with serving(state) as q:
        (line,) = [one.message for one in caplog.records if "state.db" in one.message]
        assert "set aside as" in line
        assert (tmp_path / "state.db.broken-2").read_bytes() == content
        assert (await settings_of(q, "user:1")).weight == 1
        assert (await change(q.port, weight=2)).status == 200
    async with serving(state) as q:
        assert (await settings_of(q)).weight == 2


@pytest.mark.parametrize(
    "sql", ["PRAGMA user_version = 99", "CREATE TABLE theirs (a)"], ids=["newer", "foreign"]
)
async def test_a_file_of_a_newer_llmq_or_another_program_is_left_alone(
    sql: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.db"
    with closing(sqlite3.connect(state)) as database:
        database.execute(sql)
    before = state.read_bytes()
    async with serving(state) as q:
        assert len([one for one in caplog.records if "state.db" in one.message]) == 1
        await refused(q, "a newer llmq wrote it, or another program")
    assert state.read_bytes() == before
    with closing(sqlite3.connect(state)) as database:
        tables = database.execute("SELECT name FROM sqlite_master").fetchall()
        assert ("changes",) not in tables
        ((version,),) = database.execute("PRAGMA user_version")
        assert version == (99 if "99" in sql else 0)


async def test_a_second_llmq_leaves_the_file_to_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.db"
    async with serving(state) as q:
        await change(q.port, weight=2)
        async with Process("--port", "0", "--backend", NOBODY, "--state", str(state)) as p:
            answer = await change(p.port, weight=9)
            assert (answer.status, answer.code) == (507, "insufficient_storage")
            assert "another llmq has it" in answer.json()["error"]["message"]
            assert p.output.count("another llmq has it") == 1  # one line, at the start
        assert (await change(q.port, boost=True)).status == 200
    async with serving(state) as q:
        eve = await settings_of(q)
        assert (eve.weight, eve.boost) == (2, True)
    assert not [one for one in caplog.records if "state.db" in one.message]


async def test_where_nothing_can_be_written_a_change_is_507(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with serving(tmp_path / "file" / "state.db") as q:
        await refused(q, "File exists")
    (tmp_path / "directory").mkdir()
    async with serving(tmp_path / "directory") as q:
        await refused(q, "")


async def test_a_full_disk_is_507_until_there_is_room_again(tmp_path: Path) -> None:
    need(sys.platform == "linux", "limits of another process are Linux's")
    import resource

    state = tmp_path / "state.db"
    async with Process("--port", "0", "--backend", NOBODY, "--state", str(state)) as p:
        assert (await change(p.port, weight=2)).status == 200
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        for number in range(3):
            answer = await change(p.port, f"/llmq/clients/user:{number}", weight=2)
            assert answer.status == 507, answer
        assert (await ask(p.port, "GET", "/health")).status == 200
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, unlimited)
        assert (await change(p.port, boost=True)).status == 200
        p.signal(signal.SIGKILL)
        await p.ended(0)
    async with serving(state) as q:
        eve = await settings_of(q)
        assert (eve.weight, eve.boost) == (2, True)
        assert (await settings_of(q, "user:0")).weight == 1


async def test_rows_that_nobody_wrote_are_not_read(tmp_path: Path) -> None:
    state = tmp_path / "state.db"
    async with serving(state) as q:
        await change(q.port, weight=2)
    with closing(sqlite3.connect(state)) as database:
        facts = json.dumps({"weight": [4, 1.0], "colour": ["red", None]})
        database.execute("REPLACE INTO changes VALUES ('clients', 'user:eve', ?)", (facts,))
        database.execute("REPLACE INTO changes VALUES ('later', 'x', '{}')")
        database.commit()
    async with serving(state) as q:
        assert (await settings_of(q)).weight == 4


async def test_backend_of_a_later_llmq_is_left_out_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state.db"
    async with serving(state) as q:
        row = {"name": "good", "url": NOBODY}
        assert (await ask(q.port, "POST", "/llmq/backends", json=row)).status == 200
    with closing(sqlite3.connect(state)) as database, database:
        facts = json.dumps({"url": NOBODY, "shards": 2})
        database.execute("INSERT INTO changes VALUES ('backends', 'newer', ?)", (facts,))
    async with serving(state) as q:
        assert "good" in q.gateway.fleet.backends
        assert "newer" not in q.gateway.fleet.backends
    assert f"{state}: backends.newer: unknown key shards" in caplog.text


async def test_change_that_the_file_has_overtaken_is_remembered_no_more(tmp_path: Path) -> None:
    async with serving(tmp_path / "state.db", clients={"user:eve": {"weight": 2}}) as q:
        await change(q.port, weight=3)
        await reloaded(q, clients={"user:eve": {"weight": 5}})
        assert (await settings_of(q)).weight == 5
        assert q.service.changes.kept == {}
