"""Host over sockets: a web page whose name was turned to 127.0.0.1 (DNS rebinding) gets nothing."""

from __future__ import annotations

import socket

import pytest

from tests import corpus
from tests.corpus import BODY, LENGTH, Case
from tests.fakes import Answer, FakeBackend, Process, Raw, ask, running

EVIL = {"Host": "evil.example:11500"}
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
NOBODY = "http://127.0.0.1:9"  # where no backend is needed


def named(case: Case) -> str:
    return case.name


def assert_refused(answer: Answer) -> None:
    """The 403 of a foreign host: an error object with the cure, and nothing for a page to read."""
    assert answer.status == 403, answer
    assert "--allowed-host" in answer.json()["error"]["message"]
    assert answer.code == "forbidden_host"
    assert answer.headers["content-type"].startswith("application/json")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("case", corpus.HOSTS + corpus.ABSOLUTE, ids=named)
async def test_host_decides_and_is_taken_from_an_absolute_target_first(case: Case) -> None:
    async with running(NOBODY) as q:
        raw = await Raw.open(q.port)
        await raw.send(case.sent)
        answer = await raw.response()
        assert answer.status in case.answers, (case.why, answer)
        if answer.status == 400:
            assert await raw.closed() == "eof"
        elif answer.status == 403:
            assert_refused(answer)
        raw.close()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])
async def test_no_route_and_no_method_is_open_to_a_foreign_host(method: str) -> None:
    fields = {**EVIL, "Origin": "http://evil.example:11500", **JSON}
    fields["Access-Control-Request-Method"] = "POST"
    async with FakeBackend() as fake, running(fake.url) as q:
        for path in ("/", "/health", "/v1/models", "/llmq/status", "/llmq/mode", CHAT, "/nowhere"):
            body = b'{"mode":"paused"}' if path == "/llmq/mode" else BODY
            answer = await ask(q.port, method, path, body=body, headers=fields)
            assert answer.status == 403, path
            if method != "HEAD":
                assert_refused(answer)
        assert (await q.chat("good")).status == 200
        assert [request.text for request in fake.requests] == ["good"]
        assert (await q.status())["mode"] == "open"


async def test_origin_equal_to_host_proves_nothing() -> None:
    # ocp 446, dbhub 340, DFIR 305: after rebinding the page's origin equals its Host.
    async with running(NOBODY) as q:
        for name in ("evil.example", f"evil.example:{q.port}"):
            fields = {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}
            assert_refused(await ask(q.port, "GET", "/v1/models", headers=fields))


async def test_forwarding_fields_are_ignored() -> None:
    local = {"X-Forwarded-Host": "localhost", "X-Forwarded-For": "127.0.0.1", "X-Host": "localhost"}
    local["Forwarded"] = "host=localhost"
    evil = {"X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"}
    async with running(NOBODY) as q:
        assert_refused(await ask(q.port, "GET", "/health", headers={**EVIL, **local}))
        assert (await ask(q.port, "GET", "/health", headers=evil)).status == 200


async def test_own_host_name_is_allowed_and_no_part_of_it() -> None:
    own = socket.gethostname().split(".")[0]
    async with running(NOBODY) as q:
        for name in (own, own.upper(), f"{own}.local", f"{own}.local:11500"):
            assert (await ask(q.port, "GET", "/health", headers={"Host": name})).status == 200
        for name in (f"x{own}", f"{own}x", f"{own}.evil.example", f"{own}.local.evil.example"):
            assert_refused(await ask(q.port, "GET", "/health", headers={"Host": name}))


async def test_allowed_hosts_are_exact_names_and_the_cure_that_the_403_gives_works() -> None:
    flags = ("--allowed-host", "my.box", "--allowed-host", "Other.Example")
    async with Process("--port", "0", "--demo", *flags) as p:
        for name in ("my.box", "MY.BOX:8080", "other.example", "127.0.0.1"):
            assert (await ask(p.port, "GET", "/health", headers={"Host": name})).status == 200
        for name in ("a.my.box", "xmy.box", "my.box.evil.example", "box", "evil.example"):
            assert_refused(await ask(p.port, "GET", "/health", headers={"Host": name}))


async def test_a_well_framed_request_of_a_foreign_host_leaves_the_connection_in_step() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(corpus.post(LENGTH, BODY).replace(b"127.0.0.1", b"evil.example"))
        first = await raw.response()
        assert_refused(first)
        if "close" in first.headers.get("connection", ""):
            assert await raw.closed()
        else:
            await raw.send(corpus.whole(b"mine"))
            assert (await raw.response()).content == "mine"
            assert [request.text for request in fake.requests] == ["mine"]
        raw.close()
