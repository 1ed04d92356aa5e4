"""CORS and origins over sockets: extensions and dev pages just work, foreign pages get little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes import Answer, FakeBackend, Raw, ask, chat, http, running

NOBODY = "http://127.0.0.1:9"  # where no backend is needed
EXTENSION = "chrome-extension://abcdefghijklmnopabcdefghijklmnop"
OWN_ORIGINS = [
    EXTENSION,
    "moz-extension://0a1b2c3d-0000-4000-8000-0123456789ab",
    "safari-web-extension://0A1B2C3D-0000-4000-8000-0123456789AB",
    "http://localhost",
    "http://localhost:5173",
    "https://localhost:8443",
    "http://LOCALHOST:3000",
    "http://127.0.0.1:8000",
    "http://[::1]:3000",
    "http://app.localhost:3000",
    "app://obsidian.md",
    "tauri://localhost",
    "file://",
    "vscode-file://vscode-app",
]
FOREIGN_ORIGINS = [
    "https://evil.example",
    "http://evil.example:11500",
    "null",  # sandboxed frames, data: and file: pages
    "",
    "*",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example",
    "http://evillocalhost",
    "http://localhost@evil.example",
    "http://evil.example@localhost",
    "http://evil.example/localhost",
    "http://evil.example#localhost",
    "http://localhost http://evil.example",
    "http://localhost, http://evil.example",
    "http://localhost:port",
    "http://192.168.1.20",
    "localhost",
    "http://",
    "evil-extension.example",
    "https://chrome-extension.evil.example",
    "https://",
    "apps://obsidian.md",
    "https://app.evil.example",
    "ftp://localhost",
]
ASKED = ["authorization", "content-type", "x-request-id", "x-stainless-lang", "x-stainless-os"]
ASKED += ["x-stainless-retry-count", "x-stainless-package-version", "openai-beta", "x-api-key"]
CHAT = "/v1/chat/completions"
CONTROL = [
    ("POST", "/llmq/mode", {"mode": "paused"}),
    ("DELETE", "/llmq/requests/any", None),
    ("DELETE", "/llmq/requests?state=waiting", None),
    ("POST", "/llmq/requests/any", {"priority": "high"}),
]
MANAGEMENT = [
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("POST", "/api/blobs/sha256:0"),
    ("HEAD", "/api/blobs/sha256:0"),
]


@pytest.fixture(autouse=True)
def _nothing_unexpected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No input makes llmq log a traceback."""
    yield
    assert not [record for record in caplog.get_records("call") if record.exc_info]


async def preflight(port: int, origin: str, path: str = CHAT, **fields: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **named}
    return await ask(port, "OPTIONS", path, headers=headers)


async def set_mode(port: int, mode: str, **fields: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return await ask(port, "POST", "/llmq/mode", json={"mode": mode}, headers=named)


def names(answer: Answer, field: str) -> set[str]:
    return {name.strip().lower() for name in answer.headers.get(field, "").split(",")}


def assert_readable(answer: Answer) -> Answer:
    """Any page may read this answer, and no page may send credentials along."""
    assert answer.headers.get("access-control-allow-origin") == "*", answer.raw_head
    assert "access-control-allow-credentials" not in answer.headers
    return answer


@pytest.mark.parametrize("origin", [*OWN_ORIGINS[:8], *FOREIGN_ORIGINS[:3]])
async def test_preflight_grants_what_an_sdk_asks_by_name(origin: str) -> None:
    async with running(NOBODY) as q:
        asked = ",".join(ASKED)
        answer = await preflight(q.port, origin, Access_Control_Request_Headers=asked)
        assert (answer.status, answer.body, answer.clean) == (204, b"", True)
        assert_readable(answer)
        assert names(answer, "access-control-allow-methods") >= {"get", "post", "options"}
        assert names(answer, "access-control-allow-headers") >= set(ASKED)  # `*` covers no key
        assert answer.headers["access-control-max-age"] == "600"
        assert "access-control-allow-private-network" not in answer.headers
        answer = await preflight(q.port, origin, Access_Control_Request_Private_Network="true")
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert "content-length" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/nowhere", "/chat/completions"])
async def test_every_public_path_answers_preflights(path: str) -> None:
    async with running(NOBODY) as q:
        assert assert_readable(await preflight(q.port, EXTENSION, path)).status == 204


async def test_preflight_echoes_only_header_names() -> None:
    junk = ["x y", "a:b", "<script>", 'q"q', "\xe9", "a/b", "", "x\ty", "(c)", "*;q=1"]
    asked = ",".join(["authorization", *junk, "x-good"])
    async with running(NOBODY) as q:
        answer = await preflight(q.port, EXTENSION, Access_Control_Request_Headers=asked)
        assert names(answer, "access-control-allow-headers") >= {"authorization", "x-good"}
        assert not names(answer, "access-control-allow-headers") & set(junk)
        many = ",".join(f"x-{i}" for i in range(2000))
        answer = await preflight(q.port, EXTENSION, Access_Control_Request_Headers=many)
        assert answer.status == 204
        assert len(answer.raw_head) < 2 * 16384


@pytest.mark.parametrize("origin", [EXTENSION, "https://evil.example", "null"])
async def test_answers_and_errors_are_readable_by_pages(origin: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:

        async def got(method: str, path: str, status: int, **more: Any) -> Answer:
            answer = await ask(q.port, method, path, headers={"Origin": origin}, **more)
            assert answer.status == status, answer
            return assert_readable(answer)

        await got("GET", "/health", 200)
        await got("GET", "/v1/models", 200)
        await got("GET", "/nowhere", 404)
        await got("PUT", CHAT, 405, json={})
        await got("POST", CHAT, 400, body=b"{nope")
        await got("POST", CHAT, 404, json=chat("x", model="unknown"))
        await got("GET", "/v1/models/unknown", 404)
        answer = await got("POST", CHAT, 200, json=chat("hello"))
        ours = {"x-llmq-id", "x-llmq-backend", "x-llmq-wait-ms", "x-request-id", "retry-after"}
        assert names(answer, "access-control-expose-headers") >= ours
        stream = await got("POST", CHAT, 200, json=chat("one two", stream=True))
        assert stream.content == "one two"


async def test_backend_errors_and_a_full_queue_are_readable_by_pages() -> None:
    page = {"Origin": EXTENSION}  # one client, so it may fill half of the queue
    async with FakeBackend(auto=False) as fake, running(fake.url, queue__max_depth=2) as q:
        first = await enqueue(q.port, "first", page)
        request = await fake.arrived()
        second = await enqueue(q.port, "second", page)
        await waiting(q.port, "second")
        full = assert_readable(await (await enqueue(q.port, "third", page)).response())
        assert (full.status, full.code) == (429, "queue_full")
        await request.status(400, {"error": {"message": "no"}})
        assert assert_readable(await first.response()).status == 400
        request = await fake.arrived()
        await request.send(b"garbage\r\n\r\n")
        request.close()
        assert assert_readable(await second.response()).status == 502
        Raw.close_all()


async def test_cors_origins_narrow_the_grant_to_those_named() -> None:
    mine, other = "https://app.example", "https://evil.example"
    async with FakeBackend() as fake, running(fake.url, server__cors_origins=[mine]) as q:
        for method, path in (("GET", "/v1/models"), ("GET", "/nowhere"), ("POST", CHAT)):
            body = chat("x") if method == "POST" else None
            answer = await ask(q.port, method, path, json=body, headers={"Origin": mine})
            assert answer.headers["access-control-allow-origin"] == mine
            assert "origin" in names(answer, "vary")
            answer = await ask(q.port, method, path, json=body, headers={"Origin": other})
            assert "access-control-allow-origin" not in answer.headers
        granted = await preflight(q.port, mine)
        assert granted.headers["access-control-allow-origin"] == mine
        assert "origin" in names(granted, "vary")
        assert "access-control-allow-origin" not in (await preflight(q.port, other)).headers
        configured = await set_mode(q.port, "open", Origin=mine)
        assert configured.status == 200, "a configured origin is not foreign"


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_foreign_origin_changes_nothing(origin: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for method, path, body in CONTROL:
            answer = await ask(q.port, method, path, json=body, headers={"Origin": origin})
            assert (answer.status, answer.code) == (403, "forbidden_origin"), (path, answer)
        granted = await preflight(q.port, origin, "/llmq/mode")
        assert granted.status == 403 or "access-control-allow-origin" not in granted.headers
        for method, path in MANAGEMENT:
            fields = {"Origin": origin, "Content-Type": "text/plain"}
            answer = await ask(q.port, method, path, body=b'{"model":"m"}', headers=fields)
            assert answer.status == 403, (path, answer)
            assert "access-control-allow-origin" not in answer.headers
            granted = await preflight(q.port, origin, path)
            assert granted.status == 403 or "access-control-allow-origin" not in granted.headers
        assert (await q.status())["mode"] == "open"
        assert (await q.chat("good")).status == 200
        assert [request.path for request in fake.requests] == [CHAT]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS[:3])
async def test_foreign_origin_does_not_see_who_waits(origin: str) -> None:
    async with running(NOBODY) as q:
        for path in ("/llmq/status", "/llmq/events"):
            answer = await ask(q.port, "GET", path, headers={"Origin": origin})
            assert (answer.status, answer.code) == (403, "forbidden_origin"), (path, answer)


@pytest.mark.parametrize("origin", OWN_ORIGINS)
async def test_own_pages_and_extensions_control_the_queue(origin: str) -> None:
    async with running(NOBODY) as q:
        assert (await set_mode(q.port, "paused", Origin=origin)).status == 200
        assert (await q.status())["mode"] == "paused"
        assert (await ask(q.port, "GET", "/llmq/status", headers={"Origin": origin})).status == 200


async def test_sec_fetch_site_tells_a_foreign_page_that_hides_its_origin() -> None:
    async with running(NOBODY) as q:
        for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
            assert (await set_mode(q.port, "open", Sec_Fetch_Site=site)).status == status, site
        managed = [(method, path, {"model": "m"}) for method, path in MANAGEMENT]
        for method, path, body in CONTROL + managed[:-1]:  # a HEAD changes nothing
            fields = {"Sec-Fetch-Site": "cross-site"}
            assert (await ask(q.port, method, path, json=body, headers=fields)).status == 403


@pytest.mark.parametrize("origin", OWN_ORIGINS)
async def test_what_a_page_gets_at_its_preflight_it_gets_at_the_request(origin: str) -> None:
    """A browser calls each request of an extension or a desktop program cross-site."""
    async with running(NOBODY) as q:
        assert (await preflight(q.port, origin, "/llmq/mode")).status == 204
        fields = {"Origin": origin, "Sec_Fetch_Site": "cross-site"}
        assert (await set_mode(q.port, "paused", **fields)).status == 200


async def test_foreign_page_is_refused_whatever_sec_fetch_site_says() -> None:
    async with running(NOBODY) as q:
        for site in ("cross-site", "same-site", "same-origin", "none"):
            fields = {"Origin": "https://evil.example", "Sec_Fetch_Site": site}
            assert (await set_mode(q.port, "paused", **fields)).status == 403, site


async def test_control_wants_json_by_name_so_that_no_form_can_send_it() -> None:
    async with running(NOBODY) as q:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "", "text/json", None):
            fields = {} if kind is None else {"Content-Type": kind}
            body = b'{"mode":"paused"}'
            answer = await ask(q.port, "POST", "/llmq/mode", body=body, headers=fields)
            assert (answer.status, answer.code) == (415, "unsupported_media_type"), kind
        assert (await q.status())["mode"] == "open"


async def waiting(port: int, *expected: str) -> dict[str, str]:
    """The class of each waiting request by its X-Request-Id, once all `expected` wait."""
    raw = await Raw.open(port)
    await raw.send(http("GET", "/llmq/events"))
    async for snapshot in raw.events():
        rows = [r for r in snapshot.get("requests", ()) if r["state"] == "waiting"]
        classes = {row["request_id"]: row["class"] for row in rows}
        if classes.keys() >= set(expected):
            return classes
    raise AssertionError("the event stream ended")


async def enqueue(port: int, name: str, headers: dict[str, str], **more: Any) -> Raw:
    raw = await Raw.open(port)
    body = json.dumps(chat(name, **more)).encode()
    await raw.send(http("POST", CHAT, {"X-Request-Id": name, **headers}, body))
    return raw


async def test_foreign_pages_ask_for_high_and_get_normal() -> None:
    evil, mine = {"Origin": "https://evil.example"}, {"Origin": "http://localhost:5173"}
    async with FakeBackend(auto=False) as fake, running(fake.url, server__drain_timeout=0) as q:
        await enqueue(q.port, "running", {})
        await fake.arrived()
        await enqueue(q.port, "body", evil, priority="high")
        await enqueue(q.port, "true", evil, priority=True)
        await enqueue(q.port, "header", {**evil, "X-Queue-Priority": "high"})
        await enqueue(q.port, "tier", evil, service_tier="priority")
        await enqueue(q.port, "null", {"Origin": "null"}, priority="high")
        await enqueue(q.port, "low", evil, priority="low")
        await enqueue(q.port, "mine", mine, priority="high")
        await enqueue(q.port, "no-origin", {}, priority="high")
        expected = dict.fromkeys(("body", "true", "header", "tier", "null"), "normal")
        expected |= {"low": "low", "mine": "high", "no-origin": "high"}
        assert await waiting(q.port, *expected) == expected
        Raw.close_all()


async def test_at_most_16_of_one_foreign_origin_wait() -> None:
    evil = {"Origin": "https://evil.example"}
    async with FakeBackend(auto=False) as fake, running(fake.url, server__drain_timeout=0) as q:
        await enqueue(q.port, "running", {})
        request = await fake.arrived()
        sixteen = [f"evil-{i}" for i in range(16)]
        for name in sixteen:  # user names that a page makes up do not help it
            await enqueue(q.port, name, {**evil, "X-User-ID": name})
        await waiting(q.port, *sixteen)
        full = assert_readable(await (await enqueue(q.port, "evil-16", evil)).response())
        assert (full.status, full.code) == (429, "queue_full")
        assert 1 <= int(full.headers["retry-after"]) <= 60
        await enqueue(q.port, "other", {"Origin": "https://other.example"})
        await enqueue(q.port, "extension", {"Origin": EXTENSION})
        await waiting(q.port, "other", "extension")
        await request.answer("done")
        await fake.arrived()  # one of the sixteen started, so there is room for one
        await enqueue(q.port, "evil-17", evil)
        await waiting(q.port, "evil-17")
        Raw.close_all()


async def test_own_pages_may_have_more_than_16_waiting() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, server__drain_timeout=0) as q:
        await enqueue(q.port, "running", {})
        await fake.arrived()
        twenty = [f"mine-{i}" for i in range(20)]
        for name in twenty:
            await enqueue(q.port, name, {"Origin": "http://localhost:5173"})
        await waiting(q.port, *twenty)
        Raw.close_all()
