"""More of backends: paths, header fields, own limits, those added at run time, pins, all routes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import Answer, FakeBackend, Process, Raw, ask, chat, eventually, http, running

CHAT = "/v1/chat/completions"


def backends(**rows: Any) -> dict[str, Any]:
    """The table [backends], a bare url for a row of nothing else."""
    return {
        "backends": {
            name: {"url": row} if isinstance(row, str) else row for name, row in rows.items()
        }
    }


def at_path(fake: FakeBackend, base: str, *models: str) -> None:
    """Let the fake answer probes below this path alone."""
    rows = [{"id": model, "object": "model"} for model in models]
    fake.probe_answers["/v1/models"] = (404, "404 page not found")
    fake.probe_answers[base + "/v1/models"] = (200, {"object": "list", "data": rows})


async def control(q: running, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    return await ask(q.port, method, path, json=body, headers=headers or None)


async def up(q: running, *names: str) -> None:
    fleet = q.gateway.fleet.backends
    await eventually(lambda: all(name in fleet and fleet[name].usable for name in names))


# ---- Urls with a path --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "base", "chat_at", "tags_at"),
    [
        ("http://box", "", "/v1/chat/completions", "/api/tags"),
        ("http://box/v1/", "", "/v1/chat/completions", "/api/tags"),
        ("http://box/engines/v1", "/engines", "/engines/v1/chat/completions", "/engines/api/tags"),
        ("http://box/api/v1", "/api", "/api/v1/chat/completions", "/api/api/tags"),
        ("http://box/ollama/", "/ollama", "/ollama/v1/chat/completions", "/ollama/api/tags"),
    ],
)
def test_path_of_a_url_goes_before_each_route_and_v1_is_not_doubled(
    written: str, base: str, chat_at: str, tags_at: str
) -> None:
    row = build_settings(backends(box=written)).backends["box"]
    backend = llmq.Backend("box", row, llmq.Device("d", 1))
    assert (backend.origin, backend.base) == ("http://box", base)
    for route, target in ((CHAT, chat_at), ("/api/tags", tags_at)):
        wire = llmq.render_request(backend, "GET", route, b"")
        assert wire.startswith(f"GET {target} HTTP/1.1\r\nHost: box\r\n".encode())


async def test_backend_below_a_path_is_probed_and_asked_there() -> None:
    async with FakeBackend() as fake:
        at_path(fake, "/engines", "m")
        async with running(**backends(box=fake.url + "/engines/v1")) as q:
            await up(q, "box")
            for _ in range(2):  # on a fresh connection, and on one from the pool
                assert (await q.chat("hello")).content == "hello"
            assert [one.path for one in fake.requests] == ["/engines" + CHAT] * 2
            assert (await q.status())["backends"][0]["url"] == fake.url + "/engines"
            assert all(path.startswith("/engines/") for path in fake.probe_paths)


async def test_backends_below_one_origin_share_its_connections() -> None:
    async with FakeBackend() as fake:
        for base in ("/a", "/b"):
            at_path(fake, base, base[1:])
        async with running(**backends(a=fake.url + "/a/v1", b=fake.url + "/b")) as q:
            await up(q, "a", "b")
            for model in "aba":
                assert (await q.chat("hello", model=model)).status == 200
            assert [one.path[:2] for one in fake.requests] == ["/a", "/b", "/a"]
            assert len({one.connection for one in fake.requests}) == 1


# ---- Header fields -----------------------------------------------------------------------------


async def test_headers_of_a_backend_are_on_every_request_in_place_of_others() -> None:
    async with FakeBackend() as fake:
        seen: list[dict[str, str]] = []
        take = fake._take
        fake._take = lambda request: (  # type: ignore[method-assign]
            seen.append({name.lower(): value for name, value in request.headers.items()}),
            take(request),
        )[1]
        headers = {"X-Team": "blue", "authorization": "Basic eDp5", "User-Agent": "ours"}
        row = {"url": fake.url, "key": "unused", "headers": headers}
        async with running(**backends(box=row)) as q:
            await up(q, "box")
            answer = await q.chat("hello", headers={"User-Agent": "theirs", "X-Team": "red"})
            assert answer.status == 200
        assert len(seen) > 1
        for one in seen:
            assert (one["x-team"], one["authorization"]) == ("blue", "Basic eDp5")
            assert one["user-agent"] == "ours"
        assert not [r for r in fake.requests if b"theirs" in r.raw or b"unused" in r.raw]


async def test_headers_and_lists_follow_a_reload() -> None:
    async with FakeBackend() as fake, running(**backends(box=fake.url)) as q:
        await up(q, "box")
        assert (await q.chat("a", headers=SENT)).status == 200
        assert b"X-T" not in fake.requests[-1].raw
        row = {"url": fake.url, "headers": {"X-Team": "blue"}, "models": ["n"]}
        reload_with(q, **backends(box={**row, "relay_headers": ["X-Trace"]}))
        await eventually(lambda: "n" in q.gateway.fleet.backends["box"].models)
        assert (await q.chat("a", model="n", headers=SENT)).status == 200
        assert b"X-Team: blue\r\n" in fake.requests[-1].raw
        assert b"x-trace: 1\r\n" in fake.requests[-1].raw
        assert (await q.chat("a", model="m")).status == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "x"},
        {"Content-Length": "1"},
        {"Transfer-Encoding": "chunked"},
        {"Connection": "close"},
        {"te": "trailers"},
        {"bad name": "x"},
        {"": "x"},
        {"X-A": "s3cret\r\nX-B: y"},
        {"X-A": "s3cret\0"},
        {"X-A": "s3cret€"},
        {"X-A": 7},
        {"X-A": "***"},
        ["X-A: s3cret"],
    ],
)
def test_headers_that_cannot_be_sent_stop_the_start_and_show_no_value(headers: Any) -> None:
    with pytest.raises(llmq.ConfigError, match=r"backends\.box\.headers") as refused:
        build_settings(backends(box={"url": "http://box", "headers": headers}))
    assert "s3cret" not in str(refused.value)


async def test_key_in_the_headers_is_shown_to_nobody() -> None:
    async with FakeBackend(auto=False) as fake:
        row = {"url": fake.url, "headers": {"X-Api-Key": "very-secret"}}
        async with running(**backends(box=row)) as q:
            await up(q, "box")
            asking = asyncio.ensure_future(q.chat("a"))
            await (await fake.arrived()).status(401, {"error": {"message": "bad very-secret"}})
            answer = await asking
            assert (answer.status, b"bad ***" in answer.body) == (502, True)


SENT = {
    "X-Trace": "1",
    "X-Other": "2",
    "Cookie": "c",
    "Authorization": "Bearer k",
    "X-Api-Key": "k",
    "Proxy-Authorization": "k",
    "Accept-Encoding": "gzip",
    "X-Queue-Priority": "high",
    "X-LLMQ-Anything": "x",
    "TE": "trailers",
    "Connection": "X-Hop",
    "X-Hop": "x",
    "Traceparent": "00-1",
}


@pytest.mark.parametrize(
    ("relay", "passed"),
    [
        ([], set()),
        (["X-Trace", "Cookie", "authorization", "te"], {"x-trace", "cookie"}),
        (["*"], {"x-trace", "x-other"}),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_relay_headers_pass_on_what_is_named_but_never_a_key(
    relay: list[str], passed: set[str], waits: bool
) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(**backends(box={"url": fake.url, "relay_headers": relay})) as q:
            await up(q, "box")
            first = asyncio.ensure_future(q.chat("first")) if waits else None
            held = await fake.arrived() if waits else None
            asking = asyncio.ensure_future(q.chat("second", headers=SENT))
            if held is not None and first is not None:
                await eventually(lambda: q.gateway.scheduler.waiting)
                await held.answer("first")
                await first
            request = await fake.arrived()
            await request.answer("second")
            assert (await asking).status == 200
            names = [name.lower() for name, _ in request.header_list]
            assert len(names) == len(set(names))
            got = {name for name in names if name in {one.lower() for one in SENT}}
            assert got == passed | {"traceparent", "accept-encoding"}
            assert b"gzip" not in request.raw


async def test_what_waits_keeps_only_the_header_fields_that_some_backend_gets() -> None:
    async with FakeBackend(auto=False) as fake:
        rows = {"url": fake.url, "relay_headers": ["x-trace"]}
        async with running(**backends(box=rows, plain={"url": "http://127.0.0.1:1"})) as q:
            await up(q, "box")
            tasks = [asyncio.ensure_future(q.chat(str(n), headers=SENT)) for n in range(2)]
            held = await fake.arrived()
            await eventually(lambda: q.gateway.scheduler.waiting)
            assert [call.more for call in q.gateway.calls.values()] == [{"x-trace": "1"}] * 2
            sizes = {len(call.question.body) + 1 for call in q.gateway.calls.values()}
            assert {call.ticket.size for call in q.gateway.calls.values()} == sizes
            await held.answer("a")
            await (await fake.arrived()).answer("b")
            await asyncio.gather(*tasks)


# ---- Static lists, limits, cloud models ---------------------------------------------------------


async def test_models_that_are_listed_are_not_asked_for_and_any_answer_is_health() -> None:
    async with FakeBackend() as fake:
        fake.probe_answers["/v1/models"] = (404, "not here")
        row = {"url": fake.url, "models": ["one", "two"]}
        async with running(**backends(box=row)) as q:
            await up(q, "box")
            listed = (await ask(q.port, "GET", "/v1/models")).json()["data"]
            assert [one["id"] for one in listed] == ["one", "two"]
            assert (await q.chat("hello", model="two")).content == "hello"
            assert (await q.chat("hello", model="three")).status == 404
            await fake.stop_listening()
            fake.drop_connections()
            q.gateway.monitor.probe_now(q.gateway.fleet.backends["box"])
            await eventually(lambda: q.gateway.fleet.backends["box"].state is llmq.State.DOWN)


async def test_weight_of_a_backend_is_kept_and_follows_a_reload() -> None:
    async with FakeBackend() as fake, running(**backends(box={"url": fake.url, "weight": 3})) as q:
        backend = q.gateway.fleet.backends["box"]
        assert backend.weight == 3.0
        reload_with(q, **backends(box={"url": fake.url, "weight": 0.5}))
        assert (q.gateway.fleet.backends["box"], backend.weight) == (backend, 0.5)


def reload_with(q: running, **values: Any) -> None:
    """A reload that finds these settings."""
    q.service.read = lambda: build_settings({**q.values, **values})
    q.service.reload()
    assert q.gateway.config_error is None


@pytest.mark.parametrize(
    "name", ["probe_interval", "probe_timeout", "first_byte_timeout", "idle_timeout"]
)
async def test_limits_of_a_backend_go_before_those_of_all(name: str) -> None:
    settings = {f"upstream__{name}": 7}
    rows = backends(own={"url": "http://127.0.0.1:1", name: 3}, usual="http://127.0.0.1:2")
    async with running(**settings, **rows) as q:
        fleet = q.gateway.fleet.backends
        assert getattr(fleet["own"].limits, name) == 3.0
        assert getattr(fleet["usual"].limits, name) == 7.0
        reload_with(q, **{f"upstream.{name}": 9}, **rows)
        assert getattr(fleet["own"].limits, name) == 3.0
        assert getattr(fleet["usual"].limits, name) == 9.0


async def test_first_byte_timeout_of_a_backend_ends_what_it_does_not_answer() -> None:
    async with FakeBackend(auto=False) as fake:
        row = {"url": fake.url, "first_byte_timeout": 0.2}
        async with running(**backends(box=row)) as q:
            await up(q, "box")
            answer = await q.chat("hello")
            assert answer.status == 504
            assert "0.2 s" in answer.json()["error"]["message"]


async def test_idle_timeout_of_a_backend_ends_a_stream_that_falls_silent() -> None:
    async with FakeBackend(auto=False) as fake:
        row = {"url": fake.url, "idle_timeout": 0.2}
        async with running(**backends(box=row)) as q:
            await up(q, "box")
            asking = asyncio.ensure_future(q.chat("hello", stream=True))
            request = await fake.arrived()
            await request.start_stream()
            await request.piece("a")
            answer = await asking
            assert b"sent nothing for 0.2 s" in answer.body
            assert b"[DONE]" not in answer.body


async def test_probe_timeout_and_interval_of_a_backend_are_its_own() -> None:
    async with FakeBackend() as fake:
        row = {"url": fake.url, "probe_timeout": 0.1, "probe_interval": 0.05}
        async with running(**backends(box=row)) as q:
            await up(q, "box")
            seen = fake.probes
            await eventually(lambda: fake.probes > seen + 1)
            fake.hold_probes()
            await eventually(lambda: q.gateway.fleet.backends["box"].state is llmq.State.DOWN)
            fake.release_probes()
            await up(q, "box")


def backend_of(**row: Any) -> llmq.Backend:
    made = llmq.BackendSettings(url="http://box", **row)
    backend = llmq.Backend("box", made, llmq.Device("d", 1))
    backend.succeeded(0.0, llmq.Report("openai", (), ("m",), (), 0.0), 10.0)
    return backend


@pytest.mark.parametrize("number", [1, 3, 5])
def test_failures_to_open_are_those_in_a_row_after_which_it_is_down(number: int) -> None:
    backend = backend_of(failures_to_open=number)
    for failure in range(1, number + 1):
        assert backend.state is llmq.State.UP
        backend.failed(float(failure), "reset", 10.0)
    assert backend.state is llmq.State.DOWN


@pytest.mark.parametrize("seconds", [0.2, 4.0, 60.0])
def test_reset_after_is_the_longest_until_a_backend_that_is_down_is_tried_again(
    seconds: float,
) -> None:
    backend = backend_of(reset_after=seconds)
    now, gaps = 1.0, []
    for _ in range(12):
        backend.failed(now, "refused", 10.0, refused=True)
        gaps.append(backend.next_probe - now)
        now = backend.next_probe
    assert max(gaps) == gaps[-1] == pytest.approx(seconds)


async def test_models_of_ollamas_cloud_are_known_as_such() -> None:
    async with FakeBackend(["m", "big:cloud"], "ollama") as fake:
        rows = [
            {"name": "m", "model": "m", "details": {}},
            {"name": "Big:cloud", "details": {}, "remote_host": "https://ollama.com:443"},
        ]
        fake.probe_answers["/api/tags"] = (200, {"models": rows})
        async with running(**backends(box=fake.url)) as q:
            await up(q, "box")
            assert q.gateway.fleet.backends["box"].remote == {"big:cloud"}


# ---- What is loaded ----------------------------------------------------------------------------


def test_router_mode_of_llamacpp_says_of_each_model_whether_it_is_loaded() -> None:
    words = ("loaded", "loading", "unloaded", "sleeping")
    rows: list[Any] = [{"id": word, "status": {"value": word, "args": []}} for word in words]
    rows += [{"id": "odd", "status": {}}, {"id": "odder", "status": None}, "no row", {"x": 1}]
    assert llmq.read_loaded("llamacpp", {"data": rows}) == ("loaded",)


def test_one_odd_row_hides_no_other_of_lm_studio() -> None:
    rows = [None, {"id": "a", "state": "loaded"}, {"state": "loaded"}, {"id": "b"}]
    assert llmq.read_loaded("lmstudio", {"data": rows}) == ("a",)


# ---- At run time -------------------------------------------------------------------------------


async def test_backend_is_added_at_run_time_serves_and_is_taken_out() -> None:
    async with FakeBackend() as fake, FakeBackend(["n"]) as other:
        async with running(**backends(box=fake.url)) as q:
            row = {"name": "more", "url": other.url, "device": "gpu2", "weight": 2}
            answer = await control(q, "POST", "/llmq/backends", row)
            assert (answer.status, answer.json()["name"]) == (200, "more")
            await up(q, "more")
            assert (await q.chat("hello", model="n")).content == "hello"
            assert q.gateway.added == {"more": {"url": other.url, "device": "gpu2", "weight": 2}}
            reload_with(q, **backends(box=fake.url))
            assert q.gateway.fleet.backends["more"].weight == 2.0, "it outlives a reload"
            answer = await control(q, "DELETE", "/llmq/backends/more")
            assert answer.status == 200
            assert list(q.gateway.fleet.backends) == ["box"]
            assert not q.gateway.added


async def test_added_backend_may_be_changed_and_the_file_goes_before_it() -> None:
    async with FakeBackend() as fake, FakeBackend(["n"]) as other:
        async with running(**backends(box=fake.url)) as q:
            for slots in (1, 2):
                row = {"name": "more", "url": other.url, "slots": slots}
                assert (await control(q, "POST", "/llmq/backends", row)).status == 200
                assert q.gateway.fleet.backends["more"].slots == slots
            reload_with(q, **backends(box=fake.url, more={"url": other.url, "slots": 7}))
            assert q.gateway.fleet.backends["more"].slots == 7


async def test_backend_of_the_file_is_neither_replaced_nor_deleted() -> None:
    async with FakeBackend() as fake, running(**backends(box=fake.url)) as q:
        row = {"name": "box", "url": "http://127.0.0.1:1"}
        assert (await control(q, "POST", "/llmq/backends", row)).status == 409
        answer = await control(q, "DELETE", "/llmq/backends/box")
        assert answer.status == 409
        assert "draining" in answer.json()["error"]["message"]
        assert (await control(q, "DELETE", "/llmq/backends/none")).status == 404
        assert q.gateway.fleet.backends["box"].url == fake.url


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"name": "a"},
        {"name": "a b", "url": "http://box"},
        {"name": "a", "url": "ftp://box"},
        {"name": "a", "url": "http://box", "slots": "many"},
        {"name": "a", "url": "http://box", "slot": 1},
        {"name": "a", "url": "http://box", "headers": {"Host": "x"}},
        {"name": ["a"], "url": "http://box"},
    ],
)
async def test_what_the_file_may_not_say_the_route_may_not_either(row: Any) -> None:
    async with FakeBackend() as fake, running(**backends(box=fake.url)) as q:
        answer = await control(q, "POST", "/llmq/backends", row)
        assert answer.status == 400
        assert list(q.gateway.fleet.backends) == ["box"]
        assert not q.gateway.added


async def test_what_is_found_does_not_take_the_name_of_what_was_added() -> None:
    async with FakeBackend() as fake, running() as q:
        row = {"name": "vllm", "url": fake.url}
        assert (await control(q, "POST", "/llmq/backends", row)).status == 200
        discovery = q.gateway.discovery
        discovery.found["vllm"] = llmq.BackendSettings(url="http://127.0.0.1:8000", kind="vllm")
        discovery.configure()
        assert q.gateway.fleet.backends["vllm"].url == fake.url


async def test_kind_that_is_said_no_more_is_asked() -> None:
    async with FakeBackend(kind="llamacpp") as fake:
        async with running(**backends(box={"url": fake.url, "kind": "vllm"})) as q:
            await up(q, "box")
            reload_with(q, **backends(box=fake.url))
            await eventually(lambda: q.gateway.fleet.backends["box"].kind == "llamacpp")


async def test_added_backend_outlives_a_kill_with_its_key_and_its_end_does_too(
    tmp_path: Path,
) -> None:
    flags = ("--port", "0", "--backend", "http://127.0.0.1:9", "--state", str(tmp_path / "state"))
    row = {"name": "more", "weight": 2, "key": "sk-added"}
    async with FakeBackend() as fake:
        async with Process(*flags) as p:
            answer = await ask(p.port, "POST", "/llmq/backends", json={**row, "url": fake.url})
            assert answer.status == 200
            assert b"sk-added" not in answer.body
            p.signal(signal.SIGKILL)
            await p.ended(0)
        async with Process(*flags) as p:
            answer = await ask(p.port, "POST", CHAT, json=chat("hello"))
            assert answer.headers["x-llmq-backend"] == "more"
            assert fake.requests[-1].headers["authorization"] == "Bearer sk-added"
            assert (await ask(p.port, "DELETE", "/llmq/backends/more")).status == 200
            p.signal(signal.SIGKILL)
            await p.ended(0)
        async with Process(*flags) as p:
            rows = (await ask(p.port, "GET", "/llmq/status")).json()["backends"]
            assert "more" not in [one["name"] for one in rows]


async def test_looking_around_keeps_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeBackend(["n"], "vllm") as fake, FakeBackend(["a"]) as other:
        for name, kind in llmq.KINDS.items():
            url = {"vllm": fake.url, "ollama": "http://127.0.0.1:1"}.get(name, "")
            monkeypatch.setitem(llmq.KINDS, name, kind._replace(url=url))
        async with running() as q:
            row = {"name": "more", "url": other.url, "device": "far"}
            assert (await control(q, "POST", "/llmq/backends", row)).status == 200
            await q.gateway.discovery.step()
            fleet = q.gateway.fleet.backends
            assert {"vllm", "more"} <= fleet.keys()
            assert fleet["more"].device.name == "far"


async def test_drained_backend_gets_nothing_new_until_it_is_resumed() -> None:
    async with FakeBackend(auto=False) as fake, running(**backends(box=fake.url)) as q:
        await up(q, "box")
        running_one = asyncio.ensure_future(q.chat("first"))
        held = await fake.arrived()
        answer = await control(q, "POST", "/llmq/backends/box", {"draining": True})
        assert (answer.status, answer.json()["state"]) == (200, "draining")
        waiting = asyncio.ensure_future(q.chat("second"))
        await eventually(lambda: q.gateway.scheduler.waiting)
        await held.answer("first")
        assert (await running_one).content == "first", "what runs ends in peace"
        reload_with(q, **backends(box=fake.url))
        assert not fake.has_arrived()
        answer = await control(q, "POST", "/llmq/backends/box", {"draining": False})
        assert answer.json()["state"] == "up"
        await (await fake.arrived()).answer("second")
        assert (await waiting).content == "second"


@pytest.mark.parametrize("body", [{}, {"draining": 1}, {"draining": "yes"}])
async def test_draining_is_true_or_false(body: Any) -> None:
    async with FakeBackend() as fake, running(**backends(box=fake.url)) as q:
        assert (await control(q, "POST", "/llmq/backends/box", body)).status == 400
        assert (await control(q, "POST", "/llmq/backends/no", {"draining": True})).status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/llmq/backends"),
        ("POST", "/llmq/backends/box"),
        ("DELETE", "/llmq/backends/box"),
    ],
)
async def test_foreign_pages_may_not_change_the_backends(method: str, path: str) -> None:
    async with FakeBackend() as fake, running(**backends(box=fake.url)) as q:
        body = {"name": "more", "url": "http://127.0.0.1:1", "draining": True}
        answer = await control(q, method, path, body, Origin="https://evil.example")
        assert answer.status == 403
        assert not q.gateway.fleet.backends["box"].draining


async def test_reload_and_api_changes_under_load_lose_nothing() -> None:
    async with FakeBackend() as fake, FakeBackend() as other:
        async with running(**backends(box=fake.url)) as q:
            await up(q, "box")
            fake.hold()
            asking = [asyncio.ensure_future(q.chat(f"word{n}")) for n in range(101)]
            await eventually(lambda: len(q.gateway.scheduler.waiting) == 100)
            row = {"name": "more", "url": other.url, "device": "gpu2"}
            assert (await control(q, "POST", "/llmq/backends", row)).status == 200
            await eventually(lambda: len(other.requests) > 5)
            reload_with(q, **backends(box={"url": fake.url, "weight": 2}))
            assert (await control(q, "DELETE", "/llmq/backends/more")).status == 200
            fake.release()
            reload_with(q, **backends(box=fake.url + "/v1"))
            answers = await asyncio.gather(*asking)
            assert [one.content for one in answers] == [f"word{n}" for n in range(101)]
            texts = [one.text for one in (*fake.requests, *other.requests)]
            assert sorted(texts) == sorted(f"word{n}" for n in range(101)), "none was asked twice"
            assert fake.max_active == other.max_active == 1


# ---- Pins --------------------------------------------------------------------------------------


async def test_request_may_name_its_backend() -> None:
    async with FakeBackend() as fake, FakeBackend(["n"]) as other:
        async with running(**backends(a=fake.url, b=other.url)) as q:
            await up(q, "a", "b")
            wants = []
            submit = q.gateway.scheduler.start
            q.gateway.scheduler.start = lambda ticket, now: (
                wants.append(ticket.want.backend),
                submit(ticket, now),
            )[1]
            for pin in ("", "a"):
                assert (await q.chat("x", headers={"X-LLMQ-Backend": pin})).status == 200
            assert wants == ["", "a"]
            unknown = await q.chat("x", headers={"X-LLMQ-Backend": "c"})
            assert (unknown.status, unknown.code) == (400, "bad_request")
            lacking = await q.chat("x", headers={"X-LLMQ-Backend": "b"})
            assert (lacking.status, lacking.code) == (404, "model_not_found")


async def test_request_pinned_to_a_drained_backend_waits_for_it() -> None:
    async with FakeBackend() as one, FakeBackend() as other:
        async with running(**backends(a=one.url, b=other.url)) as q:
            await up(q, "a", "b")
            await control(q, "POST", "/llmq/backends/b", {"draining": True})
            asking = asyncio.ensure_future(q.chat("x", headers={"X-LLMQ-Backend": "b"}))
            await eventually(lambda: q.gateway.scheduler.waiting or asking.done())
            await control(q, "POST", "/llmq/backends/b", {"draining": False})
            assert (await asking).headers["x-llmq-backend"] == "b"


async def test_pinned_request_that_unloads_does_so_at_that_backend_alone() -> None:
    two = [FakeBackend(["m"], "ollama", auto=False) for _ in range(2)]
    async with two[0] as one, two[1] as other, running(**backends(a=one.url, b=other.url)) as q:
        await up(q, "a", "b")
        order, headers = {"model": "m", "keep_alive": 0}, {"X-LLMQ-Backend": "b"}
        asking = asyncio.ensure_future(
            ask(q.port, "POST", "/api/generate", json=order, headers=headers)
        )
        await eventually(lambda: one.has_arrived() or other.has_arrived())
        assert not one.has_arrived()
        await (await other.arrived()).status(200, {"done": True, "done_reason": "unload"})
        assert (await asking).status == 200
        assert not one.requests


async def test_pinned_request_waits_for_a_backend_that_drains() -> None:
    """As for one that is down; it has the route, so that 501 would be untrue."""
    async with FakeBackend() as fake, FakeBackend() as other:
        async with running(**backends(a=fake.url, b=other.url)) as q:
            await up(q, "a", "b")
            await control(q, "POST", "/llmq/backends/a", {"draining": True})
            asked = asyncio.ensure_future(q.chat("x", headers={"X-LLMQ-Backend": "a"}))
            await eventually(lambda: asked.done() or q.gateway.scheduler.waiting)
            await control(q, "POST", "/llmq/backends/a", {"draining": False})
            assert (await asked).headers.get("x-llmq-backend") == "a", await asked


async def test_pin_leads_no_model_to_a_backend_that_is_not_named_for_it() -> None:
    """`models.backends` is what the box's owner says; a header is what anybody says."""
    only = {"models": {"m": {"backends": ["a"]}}}
    async with FakeBackend() as fake, FakeBackend() as other:
        async with running(**backends(a=fake.url, b=other.url), **only) as q:
            await up(q, "a", "b")
            answer = await q.chat("x", headers={"X-LLMQ-Backend": "b"})
            assert other.requests == []
            assert answer.status in (400, 404)


async def test_who_waits_for_a_backend_that_drains_is_not_told_that_it_is_down() -> None:
    async with FakeBackend() as fake, running(**backends(a=fake.url), queue__down_wait=0.5) as q:
        await up(q, "a")
        await control(q, "POST", "/llmq/backends/a", {"draining": True})
        asked = asyncio.ensure_future(q.chat("x"))
        await eventually(lambda: q.gateway.scheduler.waiting)
        (ticket,) = q.gateway.scheduler.waiting.values()
        reason = llmq.forecast(q.gateway.scheduler, q.gateway.now())[ticket.id].reason
        answer = await asked
        assert (answer.status, answer.code) == (503, "backend_down")
        told = answer.json()["error"]["message"]
        assert ("drain" in reason, "drain" in told) == (True, True), (reason, told)


# ---- All routes --------------------------------------------------------------------------------


def all_routes(**rows: Any) -> running:
    return running(server__allow_all_routes=True, **backends(**rows))


async def test_unknown_paths_are_404_unless_all_routes_are_allowed() -> None:
    async with FakeBackend() as fake, running(**backends(box=fake.url)) as q:
        assert (await ask(q.port, "GET", "/metrics/more")).status == 404
        reload_with(q, **{"server.allow_all_routes": True}, **backends(box=fake.url))
        fake.probe_answers["/metrics/more"] = (200, "all is well")
        await up(q, "box")
        answer = await ask(q.port, "GET", "/metrics/more")
        assert (answer.status, answer.body) == (200, b"all is well")


@pytest.mark.parametrize(
    "path",
    [
        *("/a/../b", "/a/%2e%2e/b", "/./a", "/llmq/nothing", "//a", "/a%00b", "/%ff"),
        *("/api/%2fpull", "/api/pull%2F"),  # some servers take both for /api/pull
    ],
)
async def test_dot_segments_and_llmqs_own_stay_404(path: str) -> None:
    async with FakeBackend() as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        before = [one for one in fake.probe_paths if one == path]
        assert (await ask(q.port, "GET", path)).status == 404
        assert [one for one in fake.probe_paths if one == path] == before


async def test_reads_go_beside_the_queue_to_the_first_or_the_named_backend() -> None:
    async with FakeBackend(auto=False) as fake, FakeBackend(["n"]) as other:
        async with all_routes(a=fake.url, b=other.url) as q:
            await up(q, "a", "b")
            busy = asyncio.ensure_future(q.chat("x"))
            held = await fake.arrived()
            for one, word in ((fake, "first"), (other, "second")):
                one.probe_answers["/slots"] = (200, word)
            assert (await ask(q.port, "GET", "/slots?a=b%20c")).body == b"first"
            assert fake.probe_paths[-1] == "/slots?a=b%20c"
            named = await ask(q.port, "GET", "/slots", headers={"X-LLMQ-Backend": "b"})
            assert (named.body, named.headers["x-llmq-backend"]) == (b"second", "b")
            unknown = await ask(q.port, "GET", "/slots", headers={"X-LLMQ-Backend": "c"})
            assert unknown.status == 404
            head = await ask(q.port, "HEAD", "/slots")
            assert (head.status, head.body) == (200, b"")
            await held.answer("x")
            await busy


async def test_post_that_names_a_model_waits_in_the_queue_and_passes_unchanged() -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        busy = asyncio.ensure_future(q.chat("x"))
        held = await fake.arrived()
        body = b'{ "model":"m",  "priority": 7, "numCtx":1, "input":"\\u00e9" }'
        headers = {"Content-Type": "application/json"}
        asking = asyncio.ensure_future(
            ask(q.port, "POST", "/v1/audio/speech?x=1", body=body, headers=headers)
        )
        await eventually(lambda: q.gateway.scheduler.waiting)
        assert not fake.has_arrived()
        await held.answer("x")
        await busy
        request = await fake.arrived()
        assert (request.path, request.body) == ("/v1/audio/speech?x=1", body)
        await request.status(201, b"\x00\xffsound", [("Content-Type", "text/plain")])
        answer = await asking
        assert (answer.status, answer.body) == (201, b"\x00\xffsound")
        assert answer.headers["x-llmq-backend"] == "box"
        (record,) = [r for r in (await q.status())["recent"] if r["route"] != CHAT]
        assert (record["route"], record["outcome"]) == ("/v1/audio/speech", "done")


async def test_stream_of_an_unknown_route_passes_piece_by_piece() -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        asking = asyncio.ensure_future(
            ask(q.port, "POST", "/completion", json={"model": "M", "stream": True})
        )
        request = await fake.arrived()
        assert request.json["model"] == "M"
        await request.start_stream()
        await request.event({"content": "a", "model": "m"})
        await eventually(lambda: any(c.reply.started for c in q.gateway.calls.values()))
        await request.event({"stop": True})
        request.finished()
        await request.send(b"0\r\n\r\n")
        answer = await asking
        assert answer.body == b'data: {"content": "a", "model": "m"}\n\ndata: {"stop": true}\n\n'


async def test_answer_of_an_unknown_route_that_breaks_off_ends_uncleanly() -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        asking = asyncio.ensure_future(ask(q.port, "POST", "/completion", json={"model": "m"}))
        request = await fake.arrived()
        await request.start_stream()
        await request.event({"content": "a"})
        await eventually(lambda: any(c.reply.started for c in q.gateway.calls.values()))
        request.reset()
        answer = await asking
        assert not answer.clean


@pytest.mark.parametrize(
    ("path", "error"),
    [("/v1/threads", b'data: {"error":{'), ("/v1/messages/x", b"event: error"), ("/api/x", b"{")],
)
async def test_what_breaks_off_beside_the_queue_says_so_in_the_words_of_its_path(
    path: str, error: bytes
) -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        async with await Raw.open(q.port) as raw:
            await raw.send(http("POST", path, {"Content-Type": "application/json"}, b"{}"))
            request = await fake.arrived()
            await request.start_stream()
            await request.event({"content": "a"})
            begun = await raw.until(b"\n\n\r\n")
            request.reset()
            while data := await raw.read():
                begun += data
        assert b"\r\n" + error in begun.partition(b'a"}\n\n')[2]


@pytest.mark.parametrize("status", [204, 404, 501, 503])
async def test_status_of_an_unknown_route_is_the_backends_own(status: int) -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        asking = asyncio.ensure_future(ask(q.port, "POST", "/completion", json={"model": "m"}))
        request = await fake.arrived()
        if status == 204:
            request.finished()
            await request.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            await request.status(status, {"detail": "Not Found"})
        answer = await asking
        assert answer.status == status
        assert ("transfer-encoding" in answer.headers) == (status != 204)
        backend = q.gateway.fleet.backends["box"]
        assert not backend.unsupported, "nothing is learned of routes that llmq does not know"
        assert not backend.supported


async def test_answer_of_an_unknown_route_gets_no_sign_of_life() -> None:
    async with FakeBackend(auto=False) as fake:
        early = {"server__whole_heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}
        more = {**early, **backends(box=fake.url)}
        async with running(server__allow_all_routes=True, queue__slots=2, **more) as q:
            await up(q, "box")
            blind = asyncio.ensure_future(ask(q.port, "POST", "/completion", json={"model": "m"}))
            request = await fake.arrived()
            usual = asyncio.ensure_future(q.chat("x"))
            other = await fake.arrived()
            await eventually(lambda: max(c.heartbeats for c in q.gateway.calls.values()) > 2)
            await request.status(404, {"detail": "nothing"})
            assert ((await blind).status, (await blind).body) == (404, b'{"detail": "nothing"}')
            await other.answer("x")
            assert (await usual).body.startswith(b" ")


async def test_each_of_two_posts_that_come_at_one_time_has_its_own_body() -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        bodies = [b'{"model":"m","input":1}', b'{"model":"m","input":2}']
        headers = {"Content-Type": "application/json"}
        async with await Raw.open(q.port) as raw:
            await raw.send(b"".join(http("POST", "/speak", headers, body) for body in bodies))
            for body in bodies:
                request = await fake.arrived()
                assert request.body == body
                await request.status(200, {})
                assert (await raw.response()).status == 200


async def test_post_without_a_model_goes_beside_the_queue() -> None:
    async with FakeBackend(auto=False) as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        busy = asyncio.ensure_future(q.chat("x"))
        held = await fake.arrived()
        asking = asyncio.ensure_future(ask(q.port, "POST", "/tokenize", json={"content": "a"}))
        request = await fake.arrived()
        assert (request.path, request.json) == ("/tokenize", {"content": "a"})
        await request.status(200, {"tokens": [1]})
        assert (await asking).json() == {"tokens": [1]}
        await held.answer("x")
        await busy


async def test_foreign_pages_reach_no_unknown_route() -> None:
    async with FakeBackend() as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        for method, body in (("GET", None), ("POST", {"model": "m"})):
            headers = {"Origin": "https://evil.example"}
            answer = await ask(q.port, method, "/completion", json=body, headers=headers)
            assert answer.status == 403
        assert not fake.requests


async def test_unknown_route_of_an_unknown_model_is_told() -> None:
    async with FakeBackend() as fake, all_routes(box=fake.url) as q:
        await up(q, "box")
        answer = await ask(q.port, "POST", "/completion", json={"model": "none"})
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert (await ask(q.port, "POST", "/completion", json={"model": 7})).status == 400


# ---- The file is watched ------------------------------------------------------------------------


def write(path: Path, text: str, number: int) -> None:
    """A file that no look can take for the one before."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (number, number))


def watched(path: Path, **values: Any) -> llmq.Service:
    def read() -> llmq.Settings:
        document = llmq.read_file(str(path))
        return llmq.merge_layers([document, ("test", {"server.port": 0, **values})])

    return llmq.Service(read(), read=read, stamp=lambda: llmq.file_stamp({"config": str(path)}))


async def test_file_that_changes_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "WATCH_SECONDS", 0.02)
    path = tmp_path / "llmq.json"
    write(path, json.dumps({"queue": {"max_depth": 7}}), 1)
    service = watched(path, backends=["http://127.0.0.1:1"])
    await service.start()
    try:
        write(path, json.dumps({"queue": {"max_depth": 8}}), 2)
        await eventually(lambda: service.settings.queue.max_depth == 8)
        path.unlink()
        await service.watch()
        assert service.gateway.config_error is None, "a file that is gone is not read"
        write(path, '{"queue": {"max_de', 3)  # half-written
        await eventually(lambda: service.gateway.config_error)
        assert service.settings.queue.max_depth == 8
        write(path, json.dumps({"queue": {"max_depth": 9}}), 4)
        await eventually(lambda: service.settings.queue.max_depth == 9)
        assert service.gateway.config_error is None
    finally:
        await service.stop()


async def test_watch_off_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "llmq.json"
    write(path, "{}", 1)
    service = watched(path, **{"server.watch": False})
    write(path, json.dumps({"queue": {"max_depth": 8}}), 2)
    await service.watch()
    assert service.settings.queue.max_depth == 10000
    service.settings.server = llmq.ServerSettings(port=0)
    await service.watch()
    assert service.settings.queue.max_depth == 8
    service.gateway.monitor.close()


async def test_no_secret_that_a_backend_repeats_reaches_a_client() -> None:
    said = {"x-api-key": "key-0123456789", "x-token": "token-0123456789", "x-team": "red"}
    async with FakeBackend(auto=False) as fake:
        async with running(**backends(a={"url": fake.url, "headers": said})) as q:
            asked = asyncio.ensure_future(q.chat("x"))
            request = await fake.arrived()
            assert request.headers["x-token"] == "token-0123456789"
            words = "the red team sent key-0123456789 and token-0123456789"
            await request.status(500, {"error": {"message": words}})
            told = (await asked).json()["error"]["message"]
            assert told == "the red team sent *** and ***"
            assert b"0123456789" not in json.dumps(await q.status()).encode()
