"""What runs beside the requests: looks at backends, the search for runners, the feed, the sweep."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import FakeBackend, ask, eventually, running

State = llmq.State
KINDS = ["openai", "ollama", "llamacpp", "lmstudio", "vllm"]
NOWHERE = "http://127.0.0.1:9"


def gateway_of(**settings: Any) -> Any:
    """A gateway that nothing runs beside yet."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    return llmq.Gateway(build_settings(values), "0123456789abcdef", time.monotonic, llmq.Store(""))


def listen_at(monkeypatch: pytest.MonkeyPatch, places: dict[str, str]) -> None:
    """Let runners listen here by default, those of other kinds nowhere."""
    for name, kind in llmq.KINDS.items():
        url = places.get(name, NOWHERE if name == "ollama" else "")
        monkeypatch.setitem(llmq.KINDS, name, kind._replace(url=url))


def discovery_of(gateway: Any) -> Any:
    return llmq.Discovery(gateway.monitor, gateway.added)


def add(gateway: Any, fake: FakeBackend, name: str = "box", **settings: Any) -> Any:
    one = llmq.BackendSettings(url=fake.url, **settings)
    backend = gateway.fleet.add(name, one, "local", 1)
    backend.configure(one, gateway.settings.limits_of(one))
    return backend


async def probe(gateway: Any, fake: FakeBackend, **settings: Any) -> Any:
    """A backend that has been looked at once."""
    backend = add(gateway, fake, **settings)
    await gateway.monitor.start_probe(backend)
    return backend


# ---- One look --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_kind_is_told_by_what_a_runner_answers(kind: str) -> None:
    async with FakeBackend(models=["a", "b"], kind=kind) as fake:
        fake.loaded = ["b"]
        gateway = gateway_of()
        backend = await probe(gateway, fake)
        assert (backend.state, backend.kind, backend.error) == (State.UP, kind, None)
        assert backend.report.models == ("a", "b")
        assert backend.report.loaded == (("b",) if kind == "ollama" else ("a", "b"))
        assert 0 < backend.report.latency < 10
        fake.probe_paths.clear()
        await gateway.monitor.start_probe(backend)
        again = {"ollama": ["/api/ps", "/api/tags"], "lmstudio": ["/api/v0/models"]}
        assert fake.probe_paths == ["/v1/models", *again.get(kind, [])], "the kind is known now"


async def test_kind_that_is_set_is_not_asked_for() -> None:
    async with FakeBackend(kind="openai") as fake:
        backend = await probe(gateway_of(), fake, kind="vllm")
        assert (backend.state, backend.kind) == (State.UP, "vllm")
        assert "/api/v0/models" not in fake.probe_paths


async def test_key_is_sent_with_every_look() -> None:
    keys = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        keys.append("authorization: bearer sk-1\r\n" in head)
        writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"object":"list","data":[]}')
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        gateway = gateway_of()
        backend = gateway.fleet.add("b", llmq.BackendSettings(url=url, key="sk-1"), "local", 1)
        await gateway.monitor.start_probe(backend)
        assert backend.state is State.UP
        assert len(keys) >= 2
        assert all(keys)


@pytest.mark.parametrize(
    ("status", "body", "state", "word"),
    [
        (503, {"error": {"message": "Loading model"}}, State.LOADING, "Loading model"),
        (503, {"error": {"message": "busy"}}, State.DOWN, "busy"),
        (500, {"error": {"message": "out of memory"}}, State.DOWN, "out of memory"),
        (401, {"error": {"message": "who?"}}, State.UP, "who?"),
        (404, b"no such page", State.DOWN, "404"),
        (302, b"", State.DOWN, "302"),
        (200, b"<html>hello</html>", State.DOWN, "models"),
        (200, [], State.DOWN, "models"),
        (200, {"data": {}}, State.DOWN, "models"),
        (200, {"data": [{}]}, State.DOWN, "models"),
        (200, {"data": ["m"]}, State.DOWN, "models"),
        (200, {"object": "list", "data": None}, State.UP, ""),
        (200, b"[" * 100000, State.DOWN, "models"),
    ],
)
async def test_answer_to_a_look_tells_the_health(
    status: int, body: Any, state: Any, word: str
) -> None:
    async with FakeBackend() as fake:
        fake.probe_answers["/v1/models"] = (status, body)
        backend = await probe(gateway_of(), fake)
        assert backend.state is state
        assert word in (backend.error or "")


async def test_runner_that_loads_is_looked_at_each_second() -> None:
    async with FakeBackend() as fake:
        fake.probe_status = 503
        backend = await probe(gateway_of(), fake)
        assert backend.state is State.LOADING
        assert backend.failures == 0
        assert 0.5 < backend.next_probe - time.monotonic() <= 1.0


async def test_backend_where_nobody_listens_is_down_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "llmq")
    async with FakeBackend() as fake:
        gateway = gateway_of()
        backend = await probe(gateway, fake)
        assert backend.state is State.UP
        await fake.stop_listening()
        monitor = gateway.monitor
        await monitor.start_probe(backend)
        assert (backend.state, backend.failures) == (State.DOWN, 1)
        await fake.listen_again()
        await monitor.start_probe(backend)
        assert (backend.state, backend.failures, backend.error) == (State.UP, 0, None)
    up, down, up_again = [record.getMessage() for record in caplog.records]
    assert up == up_again == "backend box is up"
    assert down.startswith("backend box is down: ")


async def test_backend_that_resets_is_down_after_three_failures_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def reset(*_: Any) -> Any:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    async with FakeBackend() as fake:
        gateway = gateway_of()
        backend = await probe(gateway, fake)
        monkeypatch.setattr(llmq, "fetch", reset)
        states = []
        for _ in range(3):
            await gateway.monitor.start_probe(backend)
            states.append(backend.state)
        assert states == [State.UP, State.UP, State.DOWN]


async def test_backend_that_does_not_answer_a_look_in_time_is_down() -> None:
    async with FakeBackend() as fake:
        fake.hold_probes()
        began = time.monotonic()
        backend = await probe(gateway_of(upstream__probe_timeout=0.1), fake)
        assert 0.1 <= time.monotonic() - began < 2
        assert backend.state is State.DOWN
        assert "answer" in backend.error
        fake.release_probes()


async def test_list_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "FETCHED", 10_000)
    async with FakeBackend([f"model{number}" for number in range(1000)]) as fake:
        backend = await probe(gateway_of(), fake)
        assert backend.state is State.DOWN
        assert "larger than 10000 bytes" in backend.error
        assert backend.models == {}


async def test_slow_list_delays_no_request_and_no_list() -> None:
    async with FakeBackend(["m"]) as quick, FakeBackend(["slow"]) as slow:
        slow.hold_probes()
        settings = {"upstream__probe_timeout": 60, "upstream__probe_interval": 0.05}
        async with running(quick.url, slow.url, **settings) as q:
            first, second = q.gateway.fleet.backends.values()
            await eventually(lambda: first.state is State.UP and slow.probes)
            assert (await q.chat("a")).status == 200
            assert second.state is State.UNKNOWN, "it is still being looked at"
            slow.release_probes()
            await eventually(lambda: second.state is State.UP)
            slow.hold_probes()
            probes = slow.probes
            await eventually(lambda: slow.probes > probes)
            for path in ("/v1/models", "/api/tags", "/api/ps", "/v1/models/slow"):
                assert (await ask(q.port, "GET", path)).status == 200
            assert (await q.chat("a")).status == 200
            assert (await q.chat("a", model="slow")).status == 200
            slow.release_probes()


async def test_slow_look_says_nothing_of_a_backend_that_delivered_lately() -> None:
    async with FakeBackend() as fake:
        gateway = gateway_of()
        backend = await probe(gateway, fake)
        gateway.settings = gateway_of(upstream__probe_timeout=0.1).settings
        monitor = gateway.monitor
        fake.hold_probes()
        backend.last_received = time.monotonic()
        await monitor.start_probe(backend)
        assert (backend.state, backend.failures) == (State.UP, 0)
        assert backend.next_probe > time.monotonic() + 5
        backend.last_received = time.monotonic() - llmq.LATELY
        await monitor.start_probe(backend)
        assert backend.failures == 1
        fake.release_probes()


async def test_backend_that_is_this_llmq_is_refused_and_asked_nothing_more() -> None:
    async with FakeBackend() as fake:
        gateway = gateway_of()
        version = {"version": "0.1", "instance": gateway.instance}
        fake.probe_answers["/api/version"] = (200, version)
        backend = await probe(gateway, fake)
        assert backend.state is State.REFUSED
        assert "itself" in backend.error
        assert fake.probe_paths == ["/api/version"]
        assert gateway.fleet.serving(llmq.Want("m")) == []


async def test_another_llmq_is_a_backend_like_any() -> None:
    async with FakeBackend() as fake, running(fake.url) as inner:
        assert (await inner.chat("through one")).content == "through one"
        async with running(inner.base) as outer:
            assert (await outer.chat("through both")).content == "through both"


# ---- When to look ----------------------------------------------------------------------------


async def test_step_looks_at_what_is_due_and_not_twice_at_once() -> None:
    async with FakeBackend() as one, FakeBackend() as two:
        gateway = gateway_of()
        monitor = gateway.monitor
        due, later = add(gateway, one, "due"), add(gateway, two, "later")
        later.next_probe = time.monotonic() + 60
        one.hold_probes()
        monitor.probe_due()
        monitor.probe_due()
        await eventually(lambda: one.probes)
        flight = monitor.start_probe(due)
        assert monitor.start_probe(due) is flight
        one.release_probes()
        await flight
        assert due.state is State.UP
        assert one.probe_paths.count("/v1/models") == 1
        assert two.probes == 0
        assert monitor.start_probe(due) is not flight
        monitor.close()


async def test_backend_is_looked_at_again_after_a_while() -> None:
    async with FakeBackend(models=["old"]) as fake:
        async with running(fake.url, upstream__probe_interval=0.05) as q:
            (backend,) = q.gateway.fleet.backends.values()
            await eventually(lambda: backend.models == {"old": ["old"]})
            fake.models = ["new", "New"]
            await eventually(lambda: backend.models == {"new": ["new", "New"]})


async def test_failed_request_makes_the_monitor_look_at_once() -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__probe_interval=3600) as q:
            (backend,) = q.gateway.fleet.backends.values()
            await eventually(lambda: backend.state is State.UP)
            before = fake.probes
            task = asyncio.ensure_future(q.chat("x"))
            (await fake.arrived()).reset()
            (await fake.arrived()).reset()
            assert (await task).status == 502
            await eventually(lambda: fake.probes > before)


async def test_look_is_shared_and_at_most_one_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeBackend(kind="vllm") as fake:
        gateway = gateway_of()
        monitor = gateway.monitor
        add(gateway, fake)
        await asyncio.gather(*(monitor.refresh() for _ in range(20)))
        assert fake.probe_paths.count("/v1/models") == 1
        await monitor.refresh()
        assert fake.probe_paths.count("/v1/models") == 1
        monkeypatch.setattr(llmq, "REFRESH_SECONDS", 0.0)
        await monitor.refresh()
        assert fake.probe_paths.count("/v1/models") == 2


async def test_unknown_models_cost_a_backend_one_look_a_second() -> None:
    async with FakeBackend(kind="vllm") as fake:
        async with running(fake.url, upstream__probe_interval=3600) as q:
            await q.chat("x")
            before = fake.probe_paths.count("/v1/models")
            answers = await asyncio.gather(*(q.chat("x", model=f"no{n}") for n in range(30)))
            assert {answer.status for answer in answers} == {404}
            assert fake.probe_paths.count("/v1/models") - before <= 2


async def test_first_request_waits_for_the_first_look_and_not_for_the_next() -> None:
    async with FakeBackend(models=["only"]) as fake:
        fake.hold_probes()
        async with running(fake.url) as q:
            task = asyncio.ensure_future(q.chat("x", model=None))
            await eventually(lambda: fake.probes)
            fake.release_probes()
            answer = await task
            assert (answer.status, answer.json()["model"]) == (200, "only")


# ---- Runners that nobody named ---------------------------------------------------------------


async def test_runners_on_this_box_are_found_where_their_own_routes_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend(["a"], "ollama") as ollama, FakeBackend(["b"], "lmstudio") as studio:
        async with FakeBackend(["c"], "openai") as stranger, FakeBackend(["d"], "vllm") as vllm:
            places = {
                "ollama": ollama.url,
                "lmstudio": studio.url,
                "llamacpp": stranger.url,
                "vllm": vllm.url,
            }
            listen_at(monkeypatch, places)
            async with running() as q:
                fleet = q.gateway.fleet
                await eventually(lambda: len(fleet.backends) == 3)
                await eventually(lambda: all(b.usable for b in fleet.backends.values()))
                kinds = {name: one.kind for name, one in fleet.backends.items()}
                assert kinds == {"ollama": "ollama", "lmstudio": "lmstudio", "vllm": "vllm"}
                assert set(fleet.devices) == {"local"}, "one machine, one slot"
                assert fleet.devices["local"].slots == 1
                for model in ("a", "b", "d"):
                    assert (await q.chat("x", model=model)).status == 200
                assert (await q.chat("x", model="c")).status == 404
                assert not stranger.requests


async def test_runner_that_starts_later_is_found_and_none_is_found_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend(["b"], "vllm") as vllm:
        await vllm.stop_listening()
        places = {"ollama": NOWHERE, "vllm": vllm.url}
        listen_at(monkeypatch, places)
        gateway = gateway_of()
        finder = discovery_of(gateway)
        await finder.step()
        assert not gateway.fleet.backends
        await vllm.listen_again()
        await finder.step()
        await finder.step()
        assert list(gateway.fleet.backends) == ["ollama", "vllm"]


async def test_llmq_does_not_find_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeBackend(kind="ollama") as fake, running(fake.url) as q:
        listen_at(monkeypatch, {"openai": q.base})
        before = list(q.gateway.fleet.backends)
        await discovery_of(q.gateway).step()
        assert list(q.gateway.fleet.backends) == before


async def test_place_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeBackend(["a"], "llamacpp") as silent, FakeBackend(["b"], "vllm") as vllm:
        silent.hold_probes()
        listen_at(monkeypatch, {"llamacpp": silent.url, "vllm": vllm.url})
        gateway = gateway_of(upstream__probe_timeout=0.2)
        await discovery_of(gateway).step()
        assert list(gateway.fleet.backends) == ["ollama", "vllm"]
        silent.release_probes()


async def test_found_runner_gets_the_slots_that_are_set_for_this_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend(["a"], "ollama") as ollama, FakeBackend(["b"], "vllm") as vllm:
        places = {"ollama": ollama.url, "vllm": vllm.url}
        listen_at(monkeypatch, places)
        async with running(devices={"local": {"slots": 3}}, queue__slots=2) as q:
            await eventually(lambda: len(q.gateway.fleet.backends) == 2)
            assert q.gateway.fleet.devices["local"].slots == 3


async def test_stop_ends_the_search_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeBackend(kind="vllm") as fake:
        fake.hold_probes()
        places = {"ollama": "http://127.0.0.1:9", "vllm": fake.url}
        listen_at(monkeypatch, places)
        async with running(upstream__probe_timeout=8):
            await eventually(lambda: fake.probes)
        await eventually(lambda: not [c for c in fake.open if not c.peer_closed()])
        fake.release_probes()


async def test_ollama_is_used_though_it_starts_later_and_nothing_is_sought_with_a_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend(["a"], "ollama") as ollama, FakeBackend(["b"], "vllm") as vllm:
        places = {"ollama": ollama.url, "vllm": vllm.url}
        listen_at(monkeypatch, places)
        await ollama.stop_listening()
        async with running(upstream__probe_interval=0.1) as q:
            await eventually(lambda: "vllm" in q.gateway.fleet.backends)
            assert list(q.gateway.fleet.backends) == ["ollama", "vllm"]
            await ollama.listen_again()
            assert (await q.chat("x", model="a")).status == 200
        async with running(ollama.url) as q:
            assert (await q.chat("x", model="a")).status == 200
            assert len(q.gateway.fleet.backends) == 1


async def reload_with(q: running, **backends: FakeBackend) -> None:
    """Let a file that names these backends be read."""
    named = {name: {"url": fake.url} for name, fake in backends.items()}
    q.service.read = lambda: build_settings({**q.values, "backends": named})
    answer = await ask(q.port, "POST", "/llmq/reload", json={})
    assert answer.json() == {"config_error": None}


async def places(q: running) -> dict[str, str]:
    """The backends that there are, by name."""
    return {one["name"]: one["url"] for one in (await q.status())["backends"]}


@pytest.mark.parametrize("name", ["vllm", "box"])
async def test_reload_that_names_a_backend_ends_the_search_and_what_it_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "DISCOVERY_SECONDS", 0.02)
    async with FakeBackend(["a"], "ollama") as ollama, FakeBackend(["b"], "vllm") as vllm:
        async with FakeBackend(["c"]) as box, FakeBackend(["d"], "openai") as stranger:
            where = {"ollama": ollama.url, "vllm": vllm.url, "llamacpp": stranger.url}
            listen_at(monkeypatch, where)
            async with running() as q:
                while await places(q) != {"ollama": ollama.url, "vllm": vllm.url}:
                    pass
                await reload_with(q, **{name: box})
                assert await places(q) == {name: box.url}
                async with running():  # looks on, as often as the first one would
                    seen = stranger.probes
                    await eventually(lambda: stranger.probes > seen + 40)
                assert await places(q) == {name: box.url}
                assert (await q.chat("x", model="c")).status == 200
                for model in ("a", "b"):
                    assert (await q.chat("x", model=model)).status == 404, model


async def test_search_that_is_under_way_at_a_reload_adds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend(["b"], "vllm") as vllm, FakeBackend(["c"]) as box:
        listen_at(monkeypatch, {"ollama": NOWHERE, "vllm": vllm.url})
        vllm.hold_probes()
        async with running(upstream__probe_timeout=8) as q:
            await eventually(lambda: vllm.probes)
            await reload_with(q, vllm=box)
            vllm.release_probes()
            async with running() as later:
                while "vllm" not in await places(later):
                    pass
            assert await places(q) == {"vllm": box.url}
            assert (await q.chat("x", model="b")).status == 404
            assert (await q.chat("x", model="c")).status == 200


# ---- The feed and the sweep ------------------------------------------------------------------


async def test_snapshot_is_rendered_once_for_all_who_watch_and_only_when_it_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = gateway_of()
    stream = llmq.SnapshotStream(gateway)
    rendered = []
    snapshot = llmq.snapshot
    monkeypatch.setattr(llmq, "snapshot", lambda one: rendered.append(1) or snapshot(one))
    await stream.step()
    assert not rendered, "nobody watches"
    stream.watchers = 3
    watchers = [asyncio.ensure_future(stream.wait(60)) for _ in range(3)]
    await asyncio.wait(watchers, timeout=0)
    await stream.step()
    await asyncio.gather(*watchers)  # all are woken
    assert len(rendered) == 1
    await stream.step()
    assert len(rendered) == 1, "nothing changed"
    gateway.set_mode(llmq.Mode.PAUSED)
    await stream.step()
    assert len(rendered) == 2
    assert b'"mode":"paused"' in stream.latest


async def test_reaper_compares_every_deadline_with_one_look_at_the_clock() -> None:
    gateway = gateway_of()
    reaped: list[tuple[str, float]] = []

    class Server:
        def reap(self, now: float) -> None:
            reaped.append(("server", now))

    gateway.reap = lambda now: reaped.append(("gateway", now))
    llmq.reap(gateway, [Server(), Server()])
    assert [who for who, _ in reaped] == ["server", "server", "gateway"]
    assert len({now for _, now in reaped}) == 1


@pytest.mark.parametrize("awaits", [False, True])
async def test_loop_whose_step_fails_says_so_and_goes_on(
    awaits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    steps, third = [], asyncio.Event()

    async def later() -> None:
        fail()

    def fail() -> None:
        raise ZeroDivisionError("nobody thought of this")

    def step() -> Any:
        steps.append(1)
        if len(steps) == 3:
            return third.set()
        return later() if awaits else fail()

    task = asyncio.ensure_future(llmq.every(0.0, step))
    await third.wait()
    assert len(caplog.records) == 2
    assert "nobody thought of this" in caplog.text
    task.cancel()
    await asyncio.wait([task])


async def test_look_that_goes_wrong_unforeseen_counts_as_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(llmq, "inspect", broken)
    async with FakeBackend() as fake:
        backend = await probe(gateway_of(), fake)
        assert (backend.state, backend.failures) == (State.DOWN, 1)
        assert "log" in backend.error
        assert "nobody thought of this" in caplog.text


async def test_monitor_that_is_closed_leaves_nothing_behind() -> None:
    async with FakeBackend() as fake:
        fake.hold_probes()
        gateway = gateway_of()
        monitor = gateway.monitor
        backend = add(gateway, fake)
        flight = monitor.start_probe(backend)
        await eventually(lambda: fake.probes)
        monitor.close()
        await asyncio.wait([flight])
        assert flight.cancelled()
        await eventually(lambda: not [c for c in fake.open if not c.peer_closed()])
        fake.release_probes()


async def test_watchers_are_told_of_a_request_that_starts_at_once() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        await eventually(lambda: all(each.usable for each in q.gateway.fleet.backends.values()))
        changes = q.gateway.changes
        asking = asyncio.ensure_future(q.chat("a"))
        request = await fake.arrived()
        assert q.gateway.changes > changes, "it runs, and no snapshot is rendered for that"
        await request.answer("served")
        await asking


# ---- Memory ----------------------------------------------------------------------------------


async def test_memory_is_given_back_once_and_when_the_whole_crowd_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway, given_back = gateway_of(), []
    keeper = llmq.MemoryKeeper(gateway)
    monkeypatch.setattr(llmq, "release_memory", lambda: given_back.append(len(gateway.calls)))
    for calls in (20, 20, llmq.CROWD, llmq.CROWD // 2, 20, 5, 5, 5, 0, 0):
        gateway.calls = dict.fromkeys(range(calls))
        keeper.step()
    assert given_back == [5]


async def test_giving_memory_back_loses_nothing_that_was_foretold_of_who_still_waits() -> None:
    gateway = gateway_of()
    gateway.scheduler.mode = llmq.Mode.PAUSED
    client, want = gateway.clients.named("user:a"), llmq.Want("m")
    tickets = [llmq.Ticket(i, client, want, llmq.Priority.NORMAL, 1) for i in ("one", "two")]
    for ticket in tickets:
        gateway.scheduler.submit(ticket, 0.0)
    before = gateway.forecast(0.0)
    gateway.drop_caches()
    told = gateway.forecast(0.0)
    assert told.order == before.order == tickets
    assert [told[one.id] for one in tickets] == [before[one.id] for one in tickets]


# ---- What a look is answered with ------------------------------------------------------------


@pytest.mark.parametrize("answer", [(500, b"oops"), (401, b"{}"), (200, b"<html>"), (404, b"")])
async def test_runner_that_was_up_and_answers_a_look_stays_up(answer: tuple[int, bytes]) -> None:
    async with FakeBackend() as fake:
        gateway = gateway_of()
        backend = await probe(gateway, fake)
        fake.probe_answers["/v1/models"] = answer
        for _ in range(4):
            await gateway.monitor.start_probe(backend)
        assert (backend.state, backend.failures) == (State.UP, 0)
        assert backend.error
        assert backend.models == {"m": ["m"]}


async def test_word_of_a_runner_that_wants_a_key_reaches_the_client() -> None:
    async with FakeBackend(auto=False) as fake:
        fake.probe_status = 401
        await answered_by_its_runner(fake)


async def answered_by_its_runner(fake: FakeBackend) -> None:
    async with running(fake.url) as q:
        asking = asyncio.ensure_future(q.chat("a"))
        request = await fake.arrived()
        await request.status(401, {"error": "sign in"})
        answer = await asking
        assert (answer.status, answer.json()) == (401, {"error": "sign in"})


async def test_runner_with_endless_models_is_told_with_the_first_ten_thousand() -> None:
    async with FakeBackend() as fake:
        names = [f"m{number}" for number in range(llmq.MODELS_LIMIT + 500)]
        data = [{"id": name, "object": "model"} for name in names]
        fake.probe_answers["/v1/models"] = (200, {"object": "list", "data": data})
        backend = await probe(gateway_of(), fake)
        assert backend.state is State.UP
        assert list(backend.report.models) == names[: llmq.MODELS_LIMIT]
