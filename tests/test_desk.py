"""What the outside sees: snapshots with names, numbers and states, and the feed of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llmq
from tests.fakes import FakeBackend, Raw, ask, chat, eventually, http, running

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOBODY = "http://127.0.0.1:9"  # where no backend listens
SECOND = 1.0

SNAPSHOT = {
    "": "version mode uptime_s draining queue requests requests_total devices backends clients "
    "recent config_error trouble ips blocked jobs cache used_today",
    "jobs": "queued running",
    "cache": "answers bytes hit joined miss",
    "used_today": "requests hits tokens_in tokens_out seconds",
    "queue": "waiting running oldest_wait_s by_class full_at",
    "requests": "id request_id client class model route state position waited_s running_s eta_s "
    "reason rule backend tokens tokens_per_s",
    "devices": "name slots busy vram",
    "backends": "name url kind device state slots busy models loaded gpu_pct context latency_ms "
    "error orders",
    "clients": "name address waiting running served_s done failed left class weight boost blocked "
    "max_concurrent max_waiting share",
    "recent": "id request_id client class model route backend wait_s first_s total_s tokens "
    "status outcome error tokens_in tokens_per_s cut cache",
}


async def begin(q: running, text: str, headers: dict[str, str] | None = None, **more: Any) -> Raw:
    """A client that has sent its request and waits."""
    raw = await Raw.open(q.port)
    body = json.dumps(chat(text, **more)).encode()
    await raw.send(http("POST", CHAT, {**JSON, **(headers or {})}, body))
    return raw


async def waiting(q: running, number: int) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


async def settled(q: running, done: Any) -> Any:
    """The first snapshot in which `done` is true; positions are told once a second."""
    while not done(snapshot := await q.status()):
        pass
    return snapshot


async def watch(q: running, **options: Any) -> Raw:
    raw = await Raw.open(q.port, **options)
    await raw.send(http("GET", "/llmq/events"))
    return raw


# ---- The snapshot ----------------------------------------------------------------------------


async def test_snapshot_has_the_fields_of_the_contract() -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        first = await begin(q, "done")
        await (await fake.arrived()).answer("done")
        await first.response()
        clients = [await begin(q, "runs"), await begin(q, "waits")]
        await waiting(q, 1)
        snapshot = await q.status()
        assert set(snapshot) == set(SNAPSHOT.pop("").split())
        for name in ("queue", "jobs", "cache", "used_today"):
            assert set(snapshot[name]) == set(SNAPSHOT.pop(name).split())
        for name, keys in SNAPSHOT.items():
            assert snapshot[name], name
            for row in snapshot[name]:
                assert set(row) == set(keys.split()), name
        assert snapshot["version"] == llmq.__version__
        assert snapshot["mode"] == "open"
        assert snapshot["uptime_s"] >= 0
        assert snapshot["config_error"] is None
        assert snapshot["devices"] == [{"name": "local", "slots": 1, "busy": 1, "vram": None}]
        for client in clients:
            client.close()


async def test_rows_say_who_waits_for_what_and_where_it_runs() -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        headers = {"X-User-ID": "alice", "X-Request-Id": "mine"}
        clients = [await begin(q, "a", headers, stream=True)]
        request = await fake.arrived()
        clients.append(await begin(q, "b", {"User-Agent": "curl/8.1"}, priority="low"))
        clients.append(await begin(q, "c", {"User-Agent": "curl/8.1"}))
        clients.append(await begin(q, "d", {"X-User-ID": "bob"}, priority="high"))
        await waiting(q, 3)
        snapshot = await settled(q, lambda seen: seen["requests"][-1]["reason"] != "just arrived")
        runs, *waits = snapshot["requests"]
        assert runs["request_id"] == "mine"
        assert (runs["client"], runs["class"], runs["model"]) == ("user:alice", "normal", "m")
        assert (runs["state"], runs["backend"], runs["route"]) == ("running", "box", CHAT)
        assert (runs["position"], runs["eta_s"], runs["tokens"]) == (0, 0, 0)
        assert [row["class"] for row in waits] == ["high", "normal", "low"]
        assert [row["client"] for row in waits] == ["user:bob", "app:curl", "app:curl"]
        assert [row["position"] for row in waits] == [1, 2, 3]
        assert {row["state"] for row in waits} == {"waiting"}
        assert {row["backend"] for row in waits} == {None}
        assert all(row["waited_s"] >= 0 for row in waits)
        assert {row["reason"] for row in waits} == {"local busy (1/1): user:alice, m"}
        assert len({row["id"] for row in snapshot["requests"]}) == 4
        queue = snapshot["queue"]
        assert (queue["waiting"], queue["running"]) == (3, 1)
        assert queue["by_class"] == {"high": 1, "normal": 1, "low": 1}
        assert queue["oldest_wait_s"] >= waits[2]["waited_s"]
        assert queue["full_at"] == 10000
        await request.start_stream()
        await request.piece("one ")
        await request.piece("two ")
        await clients[0].until(b"two")
        runs = (await q.status())["requests"][0]
        assert runs["tokens"] >= 2
        assert runs["tokens_per_s"] >= runs["tokens"] / (runs["running_s"] + 0.01)
        assert waits[0]["tokens_per_s"] is None
        for client in clients:
            client.close()


async def test_shares_are_of_what_all_had_and_what_runs_is_among_it() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        raw = await begin(q, "runs", {"X-User-ID": "runs"})
        await fake.arrived()
        clients = {name: q.gateway.clients.named(f"user:{name}") for name in ("had", "runs", "new")}
        clients["had"].served, clients["runs"].served = 60.0, 20.0
        (ticket,) = q.gateway.scheduler.running.values()
        rows = llmq.show_clients(q.gateway, ticket.started + 20.0)
        shares = {row["name"]: (row["share"], row["served_s"]) for row in rows}
        assert shares == {"user:runs": (40, 20), "user:had": (60, 60), "user:new": (0, 0)}
        raw.close()
    assert llmq.show_clients(q.gateway, 0.0)[-1]["share"] == 0.0
    q.gateway.clients.known.clear()
    assert llmq.show_clients(q.gateway, 0.0) == []


async def test_blocked_are_named_though_they_have_not_asked_yet() -> None:
    settings = {"clients": {"user:eve": {"blocked": True}}, "ips.blocked": ["10.0.0.9"]}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        snapshot = await q.status()
        assert snapshot["clients"] == []
        assert snapshot["blocked"] == ["user:eve", "ip:10.0.0.9"]
        await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": False})
        assert (await q.status())["blocked"] == ["ip:10.0.0.9"]


async def test_row_says_why_it_waits() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        clients = [await begin(q, "a")]
        await fake.arrived()
        clients.append(await begin(q, "b"))
        await waiting(q, 1)
        for mode, reason in (
            ("open", "local busy (1/1): anonymous, m"),
            ("priority", "priority mode: only high starts"),
            ("paused", "paused"),
        ):
            await ask(q.port, "POST", "/llmq/mode", json={"mode": mode})
            await settled(q, lambda seen, reason=reason: reasons(seen) == [reason])
        for client in clients:
            client.close()


def reasons(snapshot: Any) -> list[str]:
    return [row["reason"] for row in snapshot["requests"] if row["state"] == "waiting"]


async def test_row_says_that_its_backend_loads_or_is_down() -> None:
    async with FakeBackend() as fake:
        async with running(fake.url, upstream__probe_interval=0.1) as q:
            (backend,) = q.gateway.fleet.backends.values()
            await eventually(lambda: backend.state is llmq.State.UP)
            fake.probe_status = 503
            await eventually(lambda: backend.state is llmq.State.LOADING)
            client = await begin(q, "a")
            await settled(q, lambda seen: reasons(seen) == ["model is loading"])
            await fake.stop_listening()
            await settled(q, lambda seen: "is down, waited for 60 s" in reasons(seen)[0])
            (row,) = (await q.status())["backends"]
            assert row["state"] == "down"
            assert "connect" in row["error"].lower()
            client.close()


async def test_no_runner_is_said_in_the_same_words_everywhere() -> None:
    async with running(f"ollama={NOBODY}", queue__down_wait=0) as q:
        snapshot = await settled(q, lambda seen: seen["trouble"])
        assert snapshot["trouble"] == llmq.NO_RUNNER
        for _, command in llmq.STARTERS.values():
            assert command in llmq.NO_RUNNER
        assert "--demo" in llmq.NO_RUNNER
        assert snapshot["backends"][0]["error"] == "connection refused; start it: ollama serve"
        for model in ("m", None):
            answer = await q.chat("x", model=model)
            assert (answer.status, answer.code) == (503, "backend_down")
            assert answer.json()["error"]["message"] == llmq.NO_RUNNER
        assert llmq.NO_RUNNER in llmq.banner(q.service)


async def test_one_runner_that_answers_is_no_trouble() -> None:
    async with FakeBackend(models=["m"]) as fake:
        async with running(f"box={fake.url}", f"away={NOBODY}", queue__down_wait=0) as q:
            snapshot = await settled(
                q, lambda seen: [row["state"] for row in seen["backends"]] == ["up", "down"]
            )
            assert snapshot["trouble"] is None
            assert llmq.NO_RUNNER not in llmq.banner(q.service)


async def test_version_of_a_runner_forges_no_line_of_the_banner() -> None:
    odd = "1\x1b[31m\nllmq: all is well" + "x" * 1000
    async with FakeBackend(kind="ollama") as fake:
        fake.probe_answers["/api/version"] = (200, {"version": odd})
        async with running(f"box={fake.url}") as q:
            await settled(q, lambda seen: seen["backends"][0]["state"] == "up")
            (line,) = [one for one in llmq.banner(q.service).split("\n") if "1?[31m?llmq" in one]
            assert line.isprintable()
            assert len(line) < 300


async def test_row_says_that_it_is_next() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        client = await begin(q, "a")
        await waiting(q, 1)
        q.gateway.scheduler.mode = llmq.Mode.OPEN  # and nothing has been started yet
        await settled(q, lambda seen: reasons(seen) == ["next"])
        q.gateway.pump()
        assert (await client.response()).content == "a"


async def test_backends_are_shown_with_their_models_and_health_but_without_keys() -> None:
    async with FakeBackend(models=["a", "b"], kind="ollama") as fake:
        fake.loaded = ["b"]
        backends = {
            "box": {"url": fake.url, "key": "backend-secret", "device": "gpu", "slots": 2},
            "away": {"url": NOBODY, "kind": "vllm"},
        }
        async with running(backends=backends, devices={"gpu": {"slots": 4}}) as q:
            states = {"box": "up", "away": "down"}
            snapshot = await settled(
                q, lambda seen: {r["name"]: r["state"] for r in seen["backends"]} == states
            )
            box, away = snapshot["backends"]
            assert box["latency_ms"] > 0
            del box["latency_ms"]
            assert box == {
                "name": "box",
                "url": fake.url,
                "kind": "ollama",
                "device": "gpu",
                "state": "up",
                "slots": 2,
                "busy": 0,
                "models": ["a", "b"],
                "loaded": ["b"],
                "gpu_pct": {},
                "context": {},
                "error": None,
                "orders": True,
            }
            assert (away["orders"], box["orders"]) == (False, True)
            assert (away["kind"], away["models"], away["latency_ms"]) == ("vllm", [], None)
            assert "connect" in away["error"].lower()
            assert snapshot["devices"] == [
                {"name": "gpu", "slots": 4, "busy": 0, "vram": None},
                {"name": "local", "slots": 1, "busy": 0, "vram": None},
            ]
            assert "backend-secret" not in json.dumps(snapshot)


async def test_first_hundred_waiting_are_shown_and_all_where_asked() -> None:
    async with running(NOBODY) as q:
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        clients = []
        for number in range(103):
            clients.append(await begin(q, "x", {"X-Request-Id": f"r{number}"}, model="m"))
            await waiting(q, number + 1)
        shown = (await q.status())["requests"]
        assert [row["request_id"] for row in shown] == [f"r{number}" for number in range(100)]
        for query, count in (("all=1", 103), ("x=1&all=1", 103), ("all=0", 100), ("all", 100)):
            rows = (await ask(q.port, "GET", f"/llmq/status?{query}")).json()["requests"]
            assert len(rows) == count, query
        assert (await q.status())["queue"]["waiting"] == 103
        for client in clients:
            client.close()


async def test_last_fifty_that_ended_are_shown_newest_first() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for number in range(53):
            await q.chat("x", headers={"X-Request-Id": f"r{number}"})
        recent = (await q.status())["recent"]
        assert [row["request_id"] for row in recent] == [f"r{n}" for n in range(52, 2, -1)]
        row = recent[0]
        assert (row["status"], row["outcome"], row["tokens"]) == (200, "done", 1)
        assert 0 <= row["wait_s"] <= row["first_s"] <= row["total_s"]


async def test_time_until_a_start_is_told_when_it_is_known_and_none_when_it_is_not() -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        clients = [await begin(q, "runs")]
        request = await fake.arrived()
        clients += [await begin(q, text) for text in "abc"]
        await waiting(q, 3)
        snapshot = await settled(q, lambda seen: seen["requests"][-1]["reason"] != "just arrived")
        assert [row["eta_s"] for row in snapshot["requests"][1:]] == [None] * 3
        q.gateway.scheduler.note_service("m", 30.0, "local")
        snapshot = await settled(q, lambda seen: seen["requests"][-1]["eta_s"] is not None)
        etas = [row["eta_s"] for row in snapshot["requests"][1:]]
        assert 0 < etas[0] <= 30
        assert [round(one - etas[0]) for one in etas] == [0, 30, 60]
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        held = lambda seen: [row["reason"] for row in seen["requests"][1:]] == ["paused"] * 3  # noqa: E731
        snapshot = await settled(q, held)  # what is told may be a second old
        assert [row["eta_s"] for row in snapshot["requests"][1:]] == [None] * 3
        for client in clients:
            client.close()
        await request.left()


async def test_no_word_of_a_prompt_or_an_answer_is_shown() -> None:
    secret = "tell-nobody"
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        viewer = await watch(q)
        clients = [await begin(q, secret, stream=True, user=secret, metadata={"a": secret})]
        request = await fake.arrived()
        await request.start_stream()
        await request.piece(secret)
        await clients[0].until(secret.encode())
        clients.append(await begin(q, secret))
        bad = await ask(q.port, "POST", CHAT, body=secret.encode(), headers=JSON)
        assert bad.status == 400
        await waiting(q, 1)
        shown = (await ask(q.port, "GET", "/llmq/status?all=1")).body
        await request.finish_stream()
        second = await fake.arrived()
        await second.status(400, {"error": {"message": secret}})
        await clients[1].response()
        shown += (await ask(q.port, "GET", "/llmq/status")).body
        await viewer.head()
        shown += await viewer.until(b'"backend_answer":1')
        assert secret.encode() not in shown
        assert shown.count(b'"backend_answer"') >= 2


async def test_positions_come_from_at_most_one_pass_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        clients = [await begin(q, text) for text in ("a", "b")]
        await waiting(q, 2)
        passes = []
        forecast = llmq.forecast
        monkeypatch.setattr(llmq, "forecast", lambda *what: passes.append(1) or forecast(*what))
        clock = [q.gateway.now() + 100]
        monkeypatch.setattr(q.gateway, "now", lambda: clock[0])
        for _ in range(3):
            shown = llmq.snapshot(q.gateway)
            assert [one["position"] for one in shown["requests"]] == [1, 2]
        assert len(passes) == 1
        clock[0] += 0.9 * SECOND
        llmq.snapshot(q.gateway)
        assert len(passes) == 1
        clock[0] += 0.2 * SECOND
        llmq.snapshot(q.gateway)
        assert len(passes) == 2
        for client in clients:
            client.close()


# ---- The feed --------------------------------------------------------------------------------


async def test_watcher_gets_the_snapshot_at_once_and_each_change_within_a_second() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        viewer = await watch(q)
        events = viewer.events()
        first = await events.__anext__()
        assert (first["mode"], first["queue"]["running"]) == ("open", 0)
        assert viewer.answer is not None
        assert viewer.answer.headers["content-type"] == "text/event-stream"
        assert viewer.answer.headers["cache-control"] == "no-cache"
        began = q.gateway.now()
        client = await begin(q, "a")
        async for snapshot in events:
            if snapshot["queue"]["running"]:
                break
        assert q.gateway.now() - began < SECOND
        began = q.gateway.now()
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        async for snapshot in events:
            if snapshot["mode"] == "paused":
                break
        assert q.gateway.now() - began < SECOND
        await (await fake.arrived()).answer("a")
        async for snapshot in events:
            if snapshot["recent"]:
                break
        assert (await client.response()).content == "a"
        viewer.close()


async def test_watcher_is_pinged_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "EVENT_PING_SECONDS", 0.05)
    async with FakeBackend() as fake, running(fake.url) as q:
        viewer = await watch(q)
        await viewer.until(b"data: ")
        await viewer.until(b": ping\n\n")
        await viewer.until(b": ping\n\n")
        viewer.close()
        await eventually(lambda: not q.service.api.stream.watchers)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_watchers_end_in_good_order_and_at_once_when_llmq_stops(version: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await q.chat("x")  # which tells all that changes by itself
        viewer = await Raw.open(q.port)
        asked = http("GET", "/llmq/events").replace(b"HTTP/1.1", b"HTTP/" + version.encode())
        await viewer.send(asked)
        await viewer.until(b"data: ")
        await viewer.until(b"data: ")  # the first that the feed had; now all is quiet
        began = q.gateway.now()
        await q.service.stop()
        assert q.gateway.now() - began < SECOND
        assert (await rest_of(viewer)).endswith(b"" if version == "1.0" else b"\r\n0\r\n\r\n")
        assert viewer.ended == "eof"


async def rest_of(raw: Raw) -> bytes:
    rest = b""
    while data := await raw.read():
        rest += data
    return rest


@pytest.mark.parametrize("leave", [Raw.close, Raw.rst, Raw.fin])
async def test_watcher_that_leaves_is_forgotten_at_once(leave: Any) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await q.chat("x")
        viewer = await watch(q)
        await viewer.until(b"data: ")
        await viewer.until(b"data: ")
        assert q.service.api.stream.watchers == 1
        leave(viewer)
        await eventually(lambda: not q.service.api.stream.watchers, SECOND)


async def test_slow_watcher_gets_the_latest_and_not_the_backlog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "ANSWER_BUFFER", 64 * 1024)
    monkeypatch.setattr(llmq, "EVENT_PING_SECONDS", 0.5)
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__probe_interval=3600) as q:
            q.gateway.config_error = "x" * 200000  # to make snapshots large
            viewer = await watch(q, receive_buffer=4096)
            await viewer.until(b"data: ")

            async def change(mode: llmq.Mode) -> None:
                q.gateway.set_mode(mode)
                await q.service.api.stream.step()
                assert (await ask(q.port, "GET", "/health")).status == 200

            for _ in range(100):  # 20 MB: more than any socket and llmq hold
                await change(llmq.Mode.PAUSED)
            for _ in range(20):
                await change(llmq.Mode.OPEN)
            await change(llmq.Mode.PRIORITY)
            read = await viewer.until(b": ping\n\n")
            assert read.count(b'"mode":"open"') <= 2, "it got the backlog"
            assert b'"mode":"priority"' in read, "the latest was there and did not come"
            viewer.close()
