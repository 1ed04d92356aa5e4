"""Every row of the table of routes: methods, paths, reads, and the changes that control makes."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

import llmq
from tests.derived import build_settings, routes_markdown
from tests.fake_ollama import Runner
from tests.fake_runner import DIALECTS, Dialect
from tests.fake_runner import Runner as SpeakingRunner
from tests.fakes import Answer, FakeBackend, Raw, ask, chat, eventually, http, running

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOBODY = "http://127.0.0.1:9"  # where no backend listens
ROUTES = llmq.ROUTES
PATHS = [route.path for route in ROUTES]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE")


def example(route: Any) -> str:
    """A path that leads to this route."""
    path = str(route.path).replace("{id...}", "org/m").replace("{id}", "some-1")
    return path.replace("{digest}", "sha256:0")


def told_error(path: str, answer: Answer) -> str:
    """The words of an error; its shape must be what clients of this path know."""
    error = answer.json()["error"]
    if path.startswith("/api/"):
        assert answer.json() == {"error": error}
        assert isinstance(error, str)
        return str(error)
    if path.startswith(("/v1/messages", "/messages")):
        assert (answer.json()["type"], set(error)) == ("error", {"type", "message"})
        assert answer.json()["request_id"] == answer.headers["request-id"]
    else:
        assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


async def begin(q: running, text: str, headers: dict[str, str] | None = None, **more: Any) -> Raw:
    """A client that has sent its request and waits."""
    raw = await Raw.open(q.port)
    body = json.dumps(chat(text, **more)).encode()
    await raw.send(http("POST", CHAT, {**JSON, **(headers or {})}, body))
    return raw


async def waiting(q: running, number: int) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


async def ids(q: running) -> dict[str, str]:
    """llmq's id of each request in the queue, by the id that its client gave."""
    return {row["request_id"]: row["id"] for row in (await q.status())["requests"]}


async def told(q: running) -> None:
    """Every backend has told what it has, or that it is down."""
    unknown = llmq.State.UNKNOWN
    await eventually(lambda: all(b.state is not unknown for b in q.gateway.fleet.backends.values()))


# ---- The table -------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=PATHS)
async def test_other_methods_get_405_and_are_told_the_right_ones(route: Any) -> None:
    async with running(NOBODY) as q:
        for method in METHODS:
            if method in route.methods:
                continue
            body = b"{}" if method in ("POST", "PUT", "PATCH") else None
            answer = await ask(q.port, method, example(route), body=body, headers=JSON)
            assert answer.status == 405, method
            assert answer.headers["allow"] == ", ".join((*route.methods, "OPTIONS"))
            if method == "HEAD":
                assert answer.body == b""
            else:
                words = told_error(route.path, answer)
                assert words == f"{route.path} takes {', '.join(route.methods)}"


@pytest.mark.parametrize("route", ROUTES, ids=PATHS)
async def test_options_tells_the_methods(route: Any) -> None:
    async with running(NOBODY) as q:
        answer = await ask(q.port, "OPTIONS", example(route))
        assert (answer.status, answer.body) == (204, b"")
        assert set(route.methods) <= set(answer.headers["allow"].split(", "))


# Whose tests make something to be asked for: test_jobs, test_batches; test_management.
WITHOUT_ONE = {
    "/api/blobs/{digest}",
    "/v1/jobs/{id}",
    "/v1/jobs/{id}/result",
    "/v1/files/{id}",
    "/v1/batches/{id}",
}


@pytest.mark.parametrize(
    "route",
    [r for r in ROUTES if {"GET", "HEAD"} <= set(r.methods) and r.path not in WITHOUT_ONE],
    ids=lambda route: route.path,
)
async def test_head_is_get_without_the_body(route: Any) -> None:
    async with FakeBackend(models=["org/m"]) as fake, running(fake.url) as q:
        await told(q)
        heads = []
        raw = await Raw.open(q.port)
        for method in ("GET", "HEAD", "GET"):
            await raw.send(http(method, example(route), {"X-Request-Id": "same"}))
            answer = await raw.response()
            assert (answer.status, answer.clean) == (200, True)
            assert bool(answer.body) == (method == "GET")
            headers = dict(answer.headers)
            assert headers.pop("x-llmq-id")
            del headers["date"]
            headers.pop("content-security-policy", None)  # its nonce is new each time
            if route.path in ("/llmq/status", "/metrics"):  # times pass
                del headers["content-length"]
            heads.append(headers)
        assert heads[0] == heads[1] == heads[2]
        assert "content-length" in answer.headers


def test_every_read_but_the_endless_one_and_one_of_ollamas_takes_head() -> None:
    assert [r.path for r in ROUTES if "GET" in r.methods and "HEAD" not in r.methods] == [
        "/api/ps",  # as in Ollama, whose router gives HEAD to /api/tags and /api/version alone
        "/api/status",
        "/llmq/events",
        "/v1/files/{id}/content",
    ]


def test_what_changes_the_disk_of_a_runner_is_for_this_box_only() -> None:
    local = {r.path for r in ROUTES if r.access is llmq.Access.LOCAL}
    managed = {"pull", "push", "create", "copy", "delete", "blobs/{digest}", "me", "signout"}
    assert local == {f"/api/{name}" for name in managed} | {"/llmq/backends"}
    owned = {r.path for r in ROUTES if r.access is llmq.Access.OWNER}
    theirs = ("/llmq/", "/metrics", "/v1/jobs", "/v1/files", "/v1/batches", "/v1/router/")
    assert owned == {r.path for r in ROUTES if r.path.startswith(theirs)} - local


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/v1",
        "/v1/",
        "/v1/chat",
        "/v1/chat/completions/",
        "/v1/messages/",
        "/v1/messages/count",
        "/api",
        "/api/",
        "/api/chats",
        "/api/blobs/",
        "/api/blobs/a/b",
        "/api/blobs/a%2fb",
        "/api/blobs/..",
        "/api/./chat",
        "/api/%2e/chat",
        "/V1/models",
        "/v1/models/",
        "/health/",
        "/healthz",
        "//health",
        "/v1//models",
        "/./health",
        "/v1/../health",
        "/%2e/health",
        "/v1/%2E%2e/health",
        "/v1/models/%2e%2e",
        "/v1/models/..",
        "/v1/models/a//b",
        "/v1%2f%2fmodels",
        "/%ff",
        "/v1/models/%00",
        "/v1/models/a%0ab",
        "/llmq/",
        "/llmq/requests/",
        "/llmq/requests/a/b",
        "/llmq/requests/a%2fb",
    ],
)
async def test_other_paths_are_404_for_every_method(method: str, path: str) -> None:
    async with running(NOBODY) as q:
        answer = await ask(q.port, method, path)
        assert answer.status == 404
        assert method == "HEAD" or told_error(path, answer) == f"there is no {path}"


async def test_encoded_path_means_what_it_decodes_to() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await told(q)
        for path in ("/%68ealth", "/v1%2Fmodels", "/v1/models/%6d", "/v1/models/m?x=1"):
            assert (await ask(q.port, "GET", path)).status == 200, path
        for path in ("/v1/chat%2Fcompletions", "/%76%31/chat/completions", "/chat%2Fcompletions"):
            answer = await ask(q.port, "POST", path, json=chat("hi"))
            assert (answer.status, answer.content) == (200, "hi"), path
        assert [request.path for request in fake.requests] == [CHAT] * 3
        for path in ("/api/ch%61t", "/v1%2Fmessages"):
            answer = await ask(q.port, "POST", path, json=chat("hi", model="unknown"))
            assert (answer.status, b"unknown" in answer.body) == (404, True), path


def spellings(path: str, number: int) -> list[str]:
    """So many other ways to write a path, slashes and letters as %XX."""
    places = [at for at, letter in enumerate(path) if at and letter != "."]
    found = []
    for pattern in range(1, number + 1):
        odd = {at for bit, at in enumerate(places[::-1]) if pattern >> bit & 1}
        pieces = [f"%{ord(c):02x}" if at in odd else c for at, c in enumerate(path)]
        found.append("".join(pieces))
    return found


def slashed(path: str) -> str:
    return path[0] + path[1:].replace("/", "%2f")


def labels(text: str) -> set[str]:
    """Every route that the metrics count requests of."""
    return set(re.findall(r'llmq_requests_total\{[^}]*route="([^"]*)"', text))


@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_every_spelling_of_an_inference_route_is_that_route(dialect: Dialect) -> None:
    kind = "vllm" if dialect.path == "/v1/rerank" else "ollama"
    async with SpeakingRunner(kind=kind) as fake, running(fake.url) as q:
        await told(q)
        for path in (*spellings(dialect.path, 3), slashed(dialect.path)):
            body = dialect.body("hi")
            answer = await ask(q.port, "POST", path, json=body)
            assert dialect.text(answer) == "hi", path
            answer = await ask(q.port, "POST", path, json={**body, "model": "unknown"})
            assert answer.status == 404
            assert "unknown" in dialect.whole_error(answer), path
            answer = await ask(q.port, "POST", path, body=b"{")
            assert answer.status == 400
            assert dialect.whole_error(answer), path
            answer = await ask(q.port, "GET", path)
            assert answer.status == 405
            assert told_error(dialect.path, answer), path
        assert {row["route"] for row in (await q.status())["recent"]} == {dialect.path}
        text = (await ask(q.port, "GET", "/metrics")).body.decode()
        assert labels(text) == {dialect.path}


async def test_request_that_waits_or_runs_is_shown_with_its_route_however_it_was_spelled() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        clients = []
        for path in ("/v1/chat%2Fcompletions", "/v1/%63hat/completions"):
            clients.append(await Raw.open(q.port))
            await clients[-1].send(http("POST", path, JSON, json.dumps(chat("x")).encode()))
        await waiting(q, 1)
        assert [row["route"] for row in (await q.status())["requests"]] == [CHAT, CHAT]
        for client in clients:
            await (await fake.arrived()).answer("done")
            assert (await client.response()).content == "done"


@pytest.mark.parametrize("model", ["m", "unknown"])
async def test_two_hundred_spellings_of_a_route_are_one_label(model: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await told(q)
        paths = spellings(CHAT, 200)
        assert len(set(paths)) == 200
        for path in paths:
            await ask(q.port, "POST", path, json=chat("x", model=model))
        text = (await ask(q.port, "GET", "/metrics")).body.decode()
        assert labels(text) == {CHAT}
        assert len(re.findall("^llmq_requests_total", text, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/messages/count_tokens", 400),
        ("GET", "/v1/messages/count_tokens", 405),
        ("POST", "/api/show", 400),
        ("POST", "/api/pull", 501),
        ("GET", "/api/pull", 405),
        ("POST", "/api/tags", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/llmq/mode", 405),
    ],
)
async def test_error_is_in_the_dialect_of_the_route_however_it_is_spelled(
    method: str, path: str, status: int
) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await told(q)
        for spelled in (path, *spellings(path, 2), slashed(path)):
            body = b'{"model":3}' if status == 400 else b'{"model":"x"}'
            sent = body if method == "POST" else None
            answer = await ask(q.port, method, spelled, body=sent, headers=JSON)
            assert answer.status == status, spelled
            assert told_error(path, answer), spelled


async def test_unknown_method_is_501_and_unknown_everywhere() -> None:
    async with running(NOBODY) as q:
        for path in (CHAT, "/health"):
            answer = await ask(q.port, "BREW", path)
            assert (answer.status, answer.code) == (501, "not_implemented")


def test_markdown_has_one_row_for_each_route() -> None:
    _, _, *lines = routes_markdown().splitlines()
    assert len(lines) == len(ROUTES)
    for line, route in zip(lines, ROUTES):
        assert line.startswith(f"| `{' '.join(route.methods)} {route.path}` |")
        assert line.endswith(f"| {route.summary} |")
        assert route.summary


# ---- Reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/chat/completions"])
async def test_both_paths_of_chat_completions_are_served_alike(path: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for stream in (False, True):
            answer = await ask(q.port, "POST", path, json=chat("one two", stream))
            assert (answer.status, answer.content) == (200, "one two")
        assert {request.path for request in fake.requests} == {CHAT}


V1 = {one.path: one for one in DIALECTS if one.path.startswith("/v1/")}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/completions", "/v1/completions"),
        ("/embeddings", "/v1/embeddings"),
        ("/responses", "/v1/responses"),
        ("/messages", "/v1/messages"),
        ("/rerank", "/v1/rerank"),
        ("/v2/rerank", "/v1/rerank"),
    ],
)
async def test_paths_without_v1_are_the_same_as_under_it(path: str, meant: str) -> None:
    dialect = V1[meant]
    async with SpeakingRunner(kind="vllm") as fake, running(fake.url) as q:
        await told(q)
        for stream in (False, True) if dialect.streams else (False,):
            for asked in (path, meant):
                body = dialect.body("one two", stream)
                anew = {"Cache-Control": "no-store"}
                answer = await ask(q.port, "POST", asked, json=body, headers=anew)
                assert dialect.text(answer) == "one two"
            one, other = fake.requests[-2:]
            assert one.path == other.path == meant
            assert one.body == other.body
        (row, *_) = (await q.status())["recent"]
        assert row["route"] == meant
        bad, known = [
            await ask(q.port, "POST", asked, body=b"[]", headers=JSON) for asked in (path, meant)
        ]
        assert (bad.status, told_error(meant, bad)) == (known.status, told_error(meant, known))


async def test_root_says_what_programs_look_for_and_health_is_ok() -> None:
    async with running(NOBODY) as q:
        root = await ask(q.port, "GET", "/")
        assert (root.status, root.body) == (200, b"Ollama is running")
        assert root.headers["content-type"].startswith("text/plain")
        health = await ask(q.port, "GET", "/health")
        assert (health.status, health.body) == (200, b"ok")


async def health(q: running, query: str = "", method: str = "GET") -> tuple[int, str]:
    answer = await ask(q.port, method, f"/health{query}")
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.status, answer.body.decode()


async def test_llmq_is_ready_while_a_runner_is_up_and_healthy_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "REFRESH_SECONDS", 0.0)  # each fresh look is one
    async with FakeBackend() as fake, FakeBackend() as other:
        for one in (fake, other):
            one.hold_probes()
        async with running(fake.url, other.url) as q:
            status, why = await health(q, "?ready=1")
            assert (status, bool(why)) == (503, True), "nobody has answered yet"
            for one in (fake, other):
                await one.stop_listening()
                one.drop_connections()
            await q.gateway.monitor.refresh()
            status, why = await health(q, "?ready=1")
            assert (status, why) == (503, (await q.status())["trouble"])
            assert await health(q, "?ready=1", "HEAD") == (503, "")
            assert await health(q) == (200, "ok")
            fake.release_probes()
            await fake.listen_again()
            await q.gateway.monitor.refresh()
            assert await health(q, "?ready=1") == (200, "ok")
            assert await health(q, "?x=y&ready=1") == (200, "ok")
            fake.probe_status = 503  # it loads a model
            await q.gateway.monitor.refresh()
            assert (await health(q, "?ready=1"))[0] == 503
            for query in ("", "?ready=0", "?ready=", "?ready", "?READY=1", "?%ff"):
                assert await health(q, query) == (200, "ok"), query


async def test_whether_it_is_ready_needs_no_key() -> None:
    async with FakeBackend() as fake:
        async with running(fake.url, keys={"alice": {"key": "sk-1"}}) as q:
            await told(q)
            assert await health(q, "?ready=1") == (200, "ok")
            assert (await ask(q.port, "GET", "/v1/models")).status == 401


async def test_version_is_one_that_ollamas_clients_believe_and_tells_llmqs_own() -> None:
    async with running(NOBODY) as q, running(NOBODY) as other:
        facts = (await ask(q.port, "GET", "/api/version")).json()
        assert tuple(map(int, facts["version"].split("."))) >= (0, 5, 0)
        assert facts["llmq"] == llmq.__version__
        assert (
            facts["instance"] != (await ask(other.port, "GET", "/api/version")).json()["instance"]
        )


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
async def test_models_of_all_backends_are_listed_once_as_their_backend_shows_them(
    path: str,
) -> None:
    async with FakeBackend(models=["a", "Both:latest"]) as one:
        async with FakeBackend(models=["both", "org/c"], kind="llamacpp") as two:
            async with running(one.url, two.url) as q:
                await told(q)
                listing = (await ask(q.port, "GET", path)).json()
                assert listing["object"] == "list"
                assert [(row["id"], row["owned_by"]) for row in listing["data"]] == [
                    ("a", "fake"),
                    ("Both:latest", "fake"),
                    ("org/c", "llamacpp"),
                ]


async def test_models_are_those_of_healthy_backends() -> None:
    async with FakeBackend(models=["stays"]) as one, FakeBackend(models=["goes"]) as two:
        async with running(one.url, two.url, upstream__probe_interval=0.1) as q:
            await told(q)
            await two.stop_listening()
            gone = list(q.gateway.fleet.backends.values())[1]
            await eventually(lambda: gone.state is llmq.State.DOWN)
            listing = (await ask(q.port, "GET", "/v1/models")).json()
            assert [row["id"] for row in listing["data"]] == ["stays"]
            await two.listen_again()
            await eventually(lambda: gone.state is llmq.State.UP)
            listing = (await ask(q.port, "GET", "/v1/models")).json()
            assert [row["id"] for row in listing["data"]] == ["stays", "goes"]


async def test_no_models_are_an_empty_list() -> None:
    async with running(NOBODY) as q:
        assert (await ask(q.port, "GET", "/v1/models")).json() == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("m", "m"),
        ("M", "m"),
        ("m:latest", "m"),
        ("org/model/x:7b", "org/model/x:7b"),
        ("org%2Fmodel%2Fx%3A7b", "org/model/x:7b"),
        ("%C3%A9", "é"),
        ("a%20b", "a b"),
    ],
)
async def test_one_model_is_found_by_its_name_slashes_and_all(path: str, name: str) -> None:
    async with FakeBackend(models=["m", "org/model/x:7b", "é", "a b"]) as fake:
        async with running(fake.url) as q:
            await told(q)
            answer = await ask(q.port, "GET", f"/v1/models/{path}")
            assert (answer.status, answer.json()["id"]) == (200, name)


@pytest.mark.parametrize("path", ["n", "m:7b", "org/model", "org/model/x:7b/y", "%22"])
async def test_model_that_nobody_has_is_404(path: str) -> None:
    async with FakeBackend(models=["m", "org/model/x:7b"]) as fake, running(fake.url) as q:
        await told(q)
        answer = await ask(q.port, "GET", f"/v1/models/{path}")
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert answer.json()["error"]["param"] == "model"


# ---- Changes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["open", "priority", "paused"])
async def test_mode_is_set_and_says_so(mode: str) -> None:
    async with running(NOBODY) as q:
        answer = await ask(q.port, "POST", "/llmq/mode", json={"mode": mode})
        assert (answer.status, answer.json()) == (200, {"mode": mode})
        assert (await q.status())["mode"] == mode


async def test_modes_say_what_starts() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        urgent = await begin(q, "urgent", priority="high")
        usual = await begin(q, "usual")
        await waiting(q, 2)
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "priority"})
        assert (await urgent.response()).content == "urgent"
        assert (await q.chat("urgent too", priority=True)).content == "urgent too"
        assert [request.text for request in fake.requests] == ["urgent", "urgent too"]
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "open"})
        assert (await usual.response()).content == "usual"


@pytest.mark.parametrize("leave", [False, True], ids=["waits", "runs"])
@pytest.mark.parametrize("stream", [False, True])
async def test_cancelled_request_is_told_and_makes_room(leave: bool, stream: bool) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        runs = await begin(q, "runs", {"X-Request-Id": "runs"}, stream=stream)
        request = await fake.arrived()
        waits = await begin(q, "waits", {"X-Request-Id": "waits"}, stream=stream)
        await waiting(q, 1)
        name, client, other = ("runs", runs, waits) if leave else ("waits", waits, runs)
        answer = await ask(q.port, "DELETE", f"/llmq/requests/{(await ids(q))[name]}")
        assert (answer.status, answer.json()) == (200, {"cancelled": 1})
        cancelled = await client.response()
        assert (cancelled.status, cancelled.code, cancelled.clean) == (499, "cancelled", True)
        assert cancelled.headers["x-should-retry"] == "false"
        if leave:
            await request.left()
            request = await fake.arrived()
        await request.answer("done")
        assert (await other.response()).content == "done"


async def test_request_cancelled_in_mid_stream_ends_in_an_error_and_unclean() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await begin(q, "a", {"X-Request-Id": "a"}, stream=True)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("one ")
        await client.head()
        await client.until(b"one ")
        await ask(q.port, "DELETE", f"/llmq/requests/{(await ids(q))['a']}")
        rest = await client.until(b"}}\n\n")
        assert b'"code":"cancelled"' in rest
        assert b"[DONE]" not in rest
        await request.left()
        assert await client.closed()


async def test_request_whose_reader_is_stuck_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "ANSWER_BUFFER", 64 * 1024)
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await Raw.open(q.port, receive_buffer=4096)
        body = json.dumps(chat("a", stream=True)).encode()
        await client.send(http("POST", CHAT, {**JSON, "X-Request-Id": "a"}, body))
        request = await fake.arrived()
        await request.start_stream()
        (call,) = q.gateway.calls.values()

        async def flood() -> None:
            while True:
                await request.piece("x" * 65536)

        flooding = asyncio.ensure_future(flood())
        await eventually(lambda: call.reply.blocked)
        await ask(q.port, "DELETE", f"/llmq/requests/{(await ids(q))['a']}")
        await request.left()
        await eventually(lambda: not q.gateway.calls)
        flooding.cancel()
        client.close()


async def test_many_are_cancelled_by_state_and_client() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        runs = await begin(q, "runs", {"X-User-ID": "a"})
        request = await fake.arrived()
        clients = {}
        for number, name in enumerate(("a", "b", "a", "c/d")):
            clients[number] = await begin(q, "x", {"X-User-ID": name})
            await waiting(q, number + 1)
        for query, cancelled, gone in (
            ("&client=nobody", 0, []),
            ("&client=user:a", 2, [0, 2]),
            ("&client=user%3Ac%2Fd", 1, [3]),
            ("&client=", 0, []),
            ("", 1, [1]),
            ("", 0, []),
        ):
            answer = await ask(q.port, "DELETE", f"/llmq/requests?state=waiting{query}")
            assert (answer.status, answer.json()) == (200, {"cancelled": cancelled}), query
            for number in gone:
                assert (await clients.pop(number).response()).code == "cancelled"
        await request.answer("done")
        assert (await runs.response()).content == "done"


@pytest.mark.parametrize("query", ["", "?state=running", "?client=a", "?state=waiting&clients=a"])
async def test_cancelling_many_wants_to_be_told_which(query: str) -> None:
    async with running(NOBODY) as q:
        client = await begin(q, "a")
        await waiting(q, 1)
        answer = await ask(q.port, "DELETE", f"/llmq/requests{query}")
        assert (answer.status, answer.code) == (400, "bad_request")
        assert "state=waiting" in answer.json()["error"]["message"]
        assert len(q.gateway.scheduler.waiting) == 1
        client.close()


async def test_waiting_request_changes_its_class_and_goes_where_it_belongs() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        clients = [await begin(q, "first")]
        request = await fake.arrived()
        for number, name in enumerate(("a", "b", "c")):
            clients.append(await begin(q, name, {"X-Request-Id": name}))
            await waiting(q, number + 1)
        for name, value, word in (
            ("a", "low", "low"),
            ("c", True, "high"),
            ("b", "normal", "normal"),
        ):
            ident = (await ids(q))[name]
            answer = await ask(q.port, "POST", f"/llmq/requests/{ident}", json={"priority": value})
            assert (answer.status, answer.json()) == (200, {"id": ident, "class": word})
        await request.answer("done")
        order = []
        for _ in range(3):
            request = await fake.arrived()
            order.append(request.text)
            await request.answer("done")
        assert order == ["c", "b", "a"]
        for client in clients:
            assert (await client.response()).content == "done"


async def test_running_request_keeps_its_class() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await begin(q, "a", {"X-Request-Id": "a"})
        request = await fake.arrived()
        ident = (await ids(q))["a"]
        answer = await ask(q.port, "POST", f"/llmq/requests/{ident}", json={"priority": "high"})
        assert (answer.status, answer.code) == (409, "conflict")
        await request.answer("done")
        assert (await client.response()).content == "done"
        answer = await ask(q.port, "POST", f"/llmq/requests/{ident}", json={"priority": "high"})
        assert (answer.status, answer.code) == (404, "not_found")
        answer = await ask(q.port, "DELETE", f"/llmq/requests/{ident}")
        assert (answer.status, answer.code) == (404, "not_found")


async def test_raised_request_starts_at_once_in_mode_priority() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "priority"})
        client = await begin(q, "a", {"X-Request-Id": "a"})
        await waiting(q, 1)
        ident = (await ids(q))["a"]
        await ask(q.port, "POST", f"/llmq/requests/{ident}", json={"priority": "high"})
        assert (await client.response()).content == "a"


BODIES = ("/llmq/mode", "/llmq/reload", "/llmq/models", "/llmq/requests/x")


@pytest.mark.parametrize("path", BODIES)
async def test_change_without_the_right_content_type_is_415(path: str) -> None:
    async with running(NOBODY) as q:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
            headers = {"Content-Type": kind}
            answer = await ask(q.port, "POST", path, body=b"{}", headers=headers)
            assert (answer.status, answer.code) == (415, "unsupported_media_type")
        answer = await ask(q.port, "POST", path, body=b"{}")
        assert answer.status == 415
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        answer = await ask(q.port, "POST", path, body=b'{"mode":"open"}', headers=headers)
        assert answer.status != 415


@pytest.mark.parametrize("path", ["/llmq/requests/x", "/llmq/requests?state=waiting"])
async def test_body_of_a_cancel_must_be_json_if_there_is_one(path: str) -> None:
    async with running(NOBODY) as q:
        plain = {"Content-Type": "text/plain"}
        assert (await ask(q.port, "DELETE", path, body=b"{}", headers=plain)).status == 415
        answer = await ask(q.port, "DELETE", path, body=b"{}", headers=JSON)
        assert answer.status == (404 if path.endswith("/x") else 200)


BAD = [b"", b"[]", b"{", b'{"mode":"fast"}', b'{"mode":1}', b'{"mode":null}', b'{"mode":["open"]}']
BAD += [b'{"priority":1}', b'{"priority":"urgent"}', b'{"priority":null}', b"{}", b"\xff"]
BAD += [b'{"mode":"paused","mode":"open"}', b'{"priority":"low","priority":"high"}']


@pytest.mark.parametrize("body", BAD, ids=repr)
async def test_bad_value_is_400_and_changes_nothing(body: bytes) -> None:
    async with running(NOBODY) as q:
        client = await begin(q, "a", {"X-Request-Id": "a"})
        await waiting(q, 1)
        for path in ("/llmq/mode", f"/llmq/requests/{(await ids(q))['a']}"):
            answer = await ask(q.port, "POST", path, body=body, headers=JSON)
            assert (answer.status, answer.code) == (400, "bad_request"), path
        snapshot = await q.status()
        assert snapshot["mode"] == "open"
        assert snapshot["requests"][0]["class"] == "normal"
        client.close()


async def test_huge_control_body_is_413() -> None:
    async with running(NOBODY) as q:
        body = b'{"mode":"paused","x":"' + b"x" * 70000 + b'"}'
        answer = await ask(q.port, "POST", "/llmq/mode", body=body, headers=JSON)
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert (await q.status())["mode"] == "open"


async def test_reload_reads_the_settings_again_and_tells_a_mistake() -> None:
    async with running(NOBODY) as q:
        answer = await ask(q.port, "POST", "/llmq/reload", json={})
        assert (answer.status, answer.json()) == (200, {"config_error": None})
        more = build_settings({**q.values, "queue.max_depth": 7})
        q.service.read = lambda: more
        assert (await ask(q.port, "POST", "/llmq/reload", json={})).json() == {"config_error": None}
        assert (await q.status())["queue"]["full_at"] == 7

        def bad() -> None:
            raise llmq.ConfigError("llmq.json: no good")

        q.service.read = bad
        answer = await ask(q.port, "POST", "/llmq/reload", json={})
        assert answer.json() == {"config_error": "llmq.json: no good"}
        snapshot = await q.status()
        assert snapshot["config_error"] == "llmq.json: no good"
        assert snapshot["queue"]["full_at"] == 7
        q.service.read = lambda: more
        assert (await ask(q.port, "POST", "/llmq/reload", json={})).json() == {"config_error": None}


# ---- Models, at their odd ends ---------------------------------------------------------------


async def test_show_is_asked_of_the_next_ollama_where_one_cannot_tell() -> None:
    names = [Runner(["m"]) for _ in range(3)]
    async with names[0] as deaf, names[1] as odd, names[2] as good:
        urls = [one.url for one in names]
        async with running(*urls, upstream__probe_interval=60) as q:
            await told(q)
            await deaf.stop_listening()

            async def refuse(request: Any, _shown: Any) -> None:
                await request.status(500, {"error": "no"})

            odd._show = refuse  # type: ignore[method-assign]
            answer = await ask(q.port, "POST", "/api/show", json={"model": "m"})
            assert answer.json()["capabilities"] == ["completion"]
            assert answer.json()["model_info"]["llama.context_length"] == good.context
            await good.stop_listening()
            answer = await ask(q.port, "POST", "/api/show", json={"model": "m"})
            assert answer.status in (500, 502), "nothing is made up where an Ollama has it"
            assert answer.json()["error"]


async def test_context_of_a_model_that_nobody_has_cannot_be_reset() -> None:
    async with FakeBackend(kind="ollama") as fake, running(fake.url) as q:
        await told(q)
        order = {"action": "reset_context", "model": "nobody's"}
        answer = await ask(q.port, "POST", "/llmq/models", json=order)
        assert (answer.status, answer.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "values"),
    [
        ("POST", "/api/push", {}),
        ("POST", "/api/push", {"model": ""}),
        ("POST", "/api/push", {"name": 7}),
        ("POST", "/api/copy", {"destination": "m"}),
        ("POST", "/api/copy", {"source": ["m"]}),
        ("DELETE", "/api/delete", {"model": None}),
    ],
)
async def test_order_that_names_no_model_is_told(method: str, path: str, values: Any) -> None:
    async with FakeBackend(kind="ollama", auto=False) as fake, running(fake.url) as q:
        await told(q)
        answer = await ask(q.port, method, path, json=values)
        assert answer.status == 400
        assert "is the name of a model" in told_error(path, answer)
        assert not fake.requests


async def test_key_of_a_backend_goes_with_an_order_and_the_clients_does_not() -> None:
    async with FakeBackend(kind="ollama", auto=False) as fake:
        async with running(backends={"box": {"url": fake.url, "key": "secret"}}) as q:
            await told(q)
            client = await Raw.open(q.port)
            mine = {**JSON, "Authorization": "Bearer mine", "X-Api-Key": "mine"}
            await client.send(http("POST", "/api/pull", mine, b'{"model":"m"}'))
            request = await fake.arrived()
            assert request.headers["authorization"] == "Bearer secret"
            assert b"mine" not in request.raw
            await request.status(200, {"status": "success"})
            assert (await client.response()).json() == {"status": "success"}


async def test_slow_client_of_an_order_holds_its_backend_back_and_gets_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "ANSWER_BUFFER", 64 * 1024)
    size = 8 * 2**20
    async with FakeBackend(kind="ollama", auto=False) as fake, running(fake.url) as q:
        await told(q)
        client = await Raw.open(q.port, receive_buffer=4096)
        await client.send(http("POST", "/api/pull", JSON, b'{"model":"m"}'))
        request = await fake.arrived()
        sending = asyncio.ensure_future(request.status(200, b"x" * size))
        await client.head()
        (connection,) = q.service._servers[0].connections
        await eventually(lambda: connection.unsent > llmq.ANSWER_BUFFER)
        answer = await client.response()
        assert (len(answer.body), answer.clean) == (size, True)
        await sending


@pytest.mark.parametrize("sent", [b"5\r\nab", b"5\r\nabcde\r\n7", b"5", b""])
async def test_client_that_leaves_inside_a_blob_ends_it(sent: bytes) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await told(q)
        client = await Raw.open(q.port)
        chunked = {"Transfer-Encoding": "chunked"}
        await client.send(http("POST", "/api/blobs/sha256:0", chunked, b"") + sent)
        await eventually(lambda: fake.connections > 0 and q.service._servers[0].connections)
        client.close()
        await eventually(lambda: not q.service._servers[0].connections)
        assert not fake.requests
