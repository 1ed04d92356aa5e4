"""Keys: what they open, what they cap, how slowly they are guessed, and that nothing shows one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import llmq
from llmq import Account, Accounts, Client, KeySettings, PortSettings, Priority, Ticket, Want
from tests.derived import build_settings
from tests.fakes import (
    Answer,
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    eventually,
    free_port,
    http,
    run_llmq,
    running,
)
from tests.simulation import Simulation
from tests.test_routes import begin, example, told_error

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:9"  # where no backend listens
EVIL = {"Origin": "https://evil.example"}
JSON = {"Content-Type": "application/json"}
NAMES = ("alice", "bob", "carol", "dave")
KEY = {name: f"sk-{name}-5f1d7c0a9b3e" for name in NAMES}
HASH = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEY.items()}
ALL = list(llmq.RIGHTS)
HIGH, NORMAL, LOW = Priority


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str, user: str = "me") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def x_api_key(key: str) -> dict[str, str]:
    return {"x-api-key": key}


WAYS = [bearer, x_api_key, basic]


def keys(**rows: dict[str, Any]) -> dict[str, Any]:
    """[keys] with these rows; each has its key."""
    return {name: {"key": KEY[name], **row} for name, row in rows.items()}


def came_from(address: str) -> dict[str, str]:
    """As if from there: to a llmq that trusts this box as its proxy."""
    return {"X-Forwarded-For": address}


PROXY = ["127.0.0.1"]


def reload_with(q: running, **values: Any) -> None:
    """A reload that finds these settings."""
    q.service.read = lambda: build_settings({**q.values, **values})
    q.service.reload()


async def told(q: running, method: str, path: str, headers: dict[str, str]) -> Answer:
    """An answer, of an endless one its head; a body that no route makes anything of."""
    body = b'{"odd":1}' if method in ("POST", "DELETE") else None
    async with await Raw.open(q.port) as raw:
        await raw.send(http(method, path, {"Connection": "close", **JSON, **headers}, body))
        answer = await raw.head()
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return answer
        return await raw.response()


def books(q: running) -> dict[str, tuple[int, int]]:
    """How many wait and run of each account, as it says itself; which must be what there is."""
    gateway, found = q.gateway, {}
    tickets = gateway.scheduler
    for name, account in gateway.accounts.named.items():
        there = [
            sum(one.client.account is account for one in some.values())
            for some in (tickets.waiting, tickets.running)
        ]
        assert [account.waiting, account.running] == there, name
        found[name] = (account.waiting, account.running)
    return found


def is_clear(q: running) -> bool:
    scheduler = q.gateway.scheduler
    return not (scheduler.waiting or scheduler.running or q.gateway.calls)


# ---- 1. Every row of the table of routes -----------------------------------------------------

ROUTES = llmq.ROUTES
PATHS = [route.path for route in ROUTES]
SHUT = (401, 403, 429)


def rights_for(route: Any) -> set[str]:
    """Those that open this row: `control` opens all that is under /llmq."""
    under = route.path.startswith(("/llmq", "/v1/jobs")) or route.path == "/metrics"
    return {route.right, *(["control"] if under else [])}


def check_401(route: Any, method: str, answer: Answer) -> None:
    assert answer.status == 401, (method, answer)
    assert answer.headers["www-authenticate"].split(" ")[0] in ("Bearer", "Basic")
    assert answer.headers["www-authenticate"].startswith("Basic") == (route.right == "control")
    assert not any(key.encode() in answer.raw_head + answer.body for key in KEY.values())
    if method != "HEAD":
        assert "key" in told_error(route.path, answer)


@pytest.mark.parametrize("route", ROUTES, ids=PATHS)
async def test_every_row_wants_a_key_that_has_its_right(route: Any) -> None:
    lacking = [one for one in ALL if one not in rights_for(route)]
    just = [route.right] if route.right else []
    if route.path == "/llmq/requests/{id}":
        just = ["infer", "control"]  # with `infer` alone only one's own, see section 9
    rows = keys(alice={"rights": ALL}, bob={"rights": lacking}, carol={"rights": just})
    places = (f"10.0.0.{number}" for number in count(1))
    async with running(NOBODY, keys=rows, server__trusted_proxies=PROXY) as q:

        async def status(method: str, *headers: dict[str, str]) -> Answer:
            both = {**came_from(next(places)), **{k: v for one in headers for k, v in one.items()}}
            return await told(q, method, example(route), both)

        for method in route.methods:
            nothing = [{}, EVIL, {"Authorization": "Bearer "}, {"x-api-key": ""}]
            wrong = [way("sk-wrong") for way in WAYS]
            for headers in [*nothing, *wrong, {**EVIL, **bearer("sk-wrong")}]:
                answer = await status(method, headers)
                if route.right:
                    check_401(route, method, answer)
                else:
                    assert answer.status not in SHUT, (method, headers, answer)
            for way in WAYS:
                assert (await status(method, way(KEY["alice"]))).status not in SHUT, (method, way)
                assert (await status(method, way(KEY["carol"]))).status not in SHUT, (method, way)
                answer = await status(method, way(KEY["bob"]))
                if route.right:
                    assert answer.status == 403, (method, way, answer)
                    assert "www-authenticate" not in answer.headers
                    assert method == "HEAD" or "right" in told_error(route.path, answer)
            answer = await status(method, EVIL, bearer(KEY["alice"]))
            if route.access is llmq.Access.OPEN:
                assert answer.status not in SHUT, (method, answer)
            else:
                assert answer.status == 403, (method, answer)
                assert "access-control-allow-origin" not in answer.headers
            answer = await status(method, EVIL, basic(KEY["alice"]))  # a browser sends it unasked
            assert answer.status == (401 if route.right else 200), (method, answer)


@pytest.mark.parametrize("route", ROUTES, ids=PATHS)
async def test_every_row_is_free_for_this_box_where_only_others_need_a_key(route: Any) -> None:
    """`server.require_key`."""
    lacking = [one for one in ALL if one not in rights_for(route)]
    rows = keys(alice={"rights": ALL}, bob={"rights": lacking})
    more = {"server__require_key": "remote", "server__trusted_proxies": PROXY}
    async with running(NOBODY, keys=rows, **more) as q:
        for method in route.methods:
            path = example(route)
            assert (await told(q, method, path, {})).status not in SHUT, method
            assert (await told(q, method, path, bearer(KEY["alice"]))).status not in SHUT, method
            # SDKs send some key in any case: where none is needed, any will do.
            assert (await told(q, method, path, bearer("sk-wrong"))).status not in SHUT
            if not route.right:
                continue
            check_401(route, method, await told(q, method, path, came_from("10.0.0.9")))
            assert (await told(q, method, path, bearer(KEY["bob"]))).status == 403, method
            evil = await told(q, method, path, EVIL)
            allowed = route.access is llmq.Access.OPEN
            assert (evil.status not in SHUT) == allowed, (method, evil)


@pytest.mark.parametrize(
    "route",
    [one for one in ROUTES if one.path.startswith("/llmq") or one.path == "/metrics"],
    ids=lambda route: route.path,
)
async def test_control_is_everything_under_llmq_and_the_metrics(route: Any) -> None:
    """POST /llmq/models and /llmq/requests/{id} ask for another right, and for it alone."""
    async with running(NOBODY, keys=keys(alice={"rights": ["control"]})) as q:
        for method in route.methods:
            answer = await told(q, method, example(route), bearer(KEY["alice"]))
            assert answer.status not in SHUT, (method, answer)


@pytest.mark.parametrize("path", ["/nope", "/llmq/nope", "/v1/nope", "/api/nope", "/v1/../llmq"])
async def test_path_that_is_nowhere_tells_nothing_without_a_key(path: str) -> None:
    async with running(NOBODY, keys=keys(alice={})) as q:
        for method in ("GET", "POST"):
            answer = await told(q, method, path, {})
            assert answer.status == 401
            assert "www-authenticate" in answer.headers
            assert (await told(q, method, path, bearer(KEY["alice"]))).status == 404


@pytest.mark.parametrize("path", [CHAT, "/llmq/status", "/api/pull", "/v1/models", "/health"])
async def test_preflight_needs_no_key(path: str) -> None:
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    async with running(NOBODY, keys=keys(alice={})) as q:
        assert (await told(q, "OPTIONS", path, {})).status == 204
        answer = await told(q, "OPTIONS", path, {"Origin": "http://localhost:3000", **wish})
        assert answer.status == 204
        assert answer.headers["access-control-allow-headers"] == "x-api-key"


async def test_root_is_free_as_text_and_the_page_needs_control() -> None:
    page, rows = {"Accept": "text/html,*/*"}, keys(alice={"rights": ["control"]}, bob={})
    async with running(NOBODY, keys=rows) as q:
        for method in ("GET", "HEAD"):
            assert (await told(q, method, "/", {})).status == 200
            assert (await told(q, method, "/", {"Accept": "text/plain"})).status == 200
            answer = await told(q, method, "/", page)
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic ")
            assert (await told(q, method, "/", {**page, **bearer(KEY["bob"])})).status == 403
            for way in WAYS:
                answer = await told(q, method, "/", {**page, **way(KEY["alice"])})
                assert (answer.status, answer.headers["content-type"][:9]) == (200, "text/html")


async def test_page_elsewhere_can_read_that_a_key_is_needed() -> None:
    async with running(NOBODY, keys=keys(alice={})) as q:
        answer = await told(q, "POST", CHAT, EVIL)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, "*")


async def test_basic_takes_any_user_and_nothing_that_is_no_basic() -> None:
    odd = ["Basic", "Basic !!!", "Basic " + base64.b64encode(b"\xff\xfe").decode(), "Digest x"]
    odd += ["Basic " + base64.b64encode(KEY["alice"].encode()).decode()]  # without a colon
    odd += [f"Basic {KEY['alice']}", KEY["alice"], f"Token {KEY['alice']}"]
    more = {"server__trusted_proxies": PROXY}
    async with running(NOBODY, keys=keys(alice={"rights": ["control"]}), **more) as q:
        for user in ("", "alice", "bob", "é"):
            assert (await told(q, "GET", "/llmq", basic(KEY["alice"], user))).status == 200
        for number, value in enumerate(odd):
            headers = {"Authorization": value, **came_from(f"10.1.0.{number}")}
            assert (await told(q, "GET", "/llmq", headers)).status == 401, value


async def test_key_that_is_nearly_right_is_wrong() -> None:
    key = KEY["alice"]
    near = [key[:-1], key + "x", key.upper(), key[1:], "", "*", "***", HASH["alice"]]
    near += [f"sha256:{HASH['alice']}", key + "\xe9"]
    async with running(NOBODY, keys=keys(alice={}), server__trusted_proxies=PROXY) as q:
        for number, one in enumerate(near):
            headers = {**bearer(one), **came_from(f"10.1.0.{number}")}
            assert (await told(q, "GET", "/v1/models", headers)).status == 401, one
        assert (await told(q, "GET", "/v1/models", bearer(f"  {key}  "))).status == 200


async def test_request_without_a_key_is_refused_before_its_body_is_read() -> None:
    async with running(NOBODY, keys=keys(alice={})) as q, await Raw.open(q.port) as raw:
        await raw.send(http("POST", CHAT, {**JSON, "Content-Length": "30000000"}))
        assert (await raw.response()).status == 401
    async with running(NOBODY, keys=keys(alice={})) as q, await Raw.open(q.port) as raw:
        head = {**JSON, "Content-Length": "30000000", "Expect": "100-continue"}
        await raw.send(http("POST", CHAT, head))
        assert (await raw.until(b"\r\n")).startswith(b"HTTP/1.1 401 ")  # and no 100


# ---- 2. Keys appear nowhere ------------------------------------------------------------------

WRONG = "sk-wrong-77aa66bb55cc"
BOX_KEY, BOX_HEADER, PORT_TOKEN = "sk-box-1a2b3c4d5e", "box-header-9f8e7d", "port-token-6c5b4a"


def forms(secret: str) -> list[str]:
    """What a secret looks like: itself, its hash, as Basic has it."""
    whole = hashlib.sha256(secret.encode())
    coded = [base64.b64encode(one.encode()).decode() for one in (f"me:{secret}", secret)]
    return [secret, whole.hexdigest(), base64.b64encode(whole.digest()).decode(), *coded]


SECRETS = [form for key in (*KEY.values(), WRONG) for form in forms(key)]
OWN_SECRETS = [form for key in (BOX_KEY, BOX_HEADER, PORT_TOKEN) for form in forms(key)]


def secrets_in(*texts: str | bytes) -> list[str]:
    whole = "\n".join(t.decode("latin-1") if isinstance(t, bytes) else t for t in texts)
    return [one for one in (*SECRETS, *OWN_SECRETS) if one.lower() in whole.lower()]


class Listening(FakeBackend):
    """A backend that keeps every byte of a head."""

    heads: bytes = b""

    def _judge(self, connection: Any, head: bytes) -> None:
        self.heads += head + b"\n"
        super()._judge(connection, head)


BROKEN = """
import sys
sys.path.insert(0, {root!r})
import llmq
def fail(*_):
    raise RuntimeError("forced")
llmq.reset_context = fail
sys.exit(llmq.main(sys.argv[1:]))
"""


# Where there is no loop: Python 3.9 makes no FakeBackend there.
NO_FAKE: Any = SimpleNamespace(url="http://127.0.0.1:9")


def every_feature(fake: FakeBackend, tmp_path: Path, port: int, form: str) -> dict[str, Any]:
    (tmp_path / "bob.key").write_text(KEY["bob"] + "\n")
    rights = {"rights": ALL}
    rows = {
        "alice": {"key": KEY["alice"], **rights, "rate": "9999/m", "tokens_per_day": 99999},
        "bob": {"key_file": str(tmp_path / "bob.key"), **rights, "max_concurrent": 3},
        "carol": {"key_hash": f"sha256:{HASH['carol']}", **rights, "max_class": "low"},
        "dave": {"key": "${DAVE_KEY}", "ips": ["10.0.0.0/8"], "models": ["n"]},
    }
    box = {"url": fake.url, "key": BOX_KEY, "relay_headers": ["*"], "kind": "ollama"}
    token = {"Authorization": f"Bearer {PORT_TOKEN}"}
    return {
        "server": {
            "port": 0,
            "allow_all_routes": True,
            "trusted_proxies": PROXY,
            "state": str(tmp_path / "state.db"),
        },
        "log": {"format": form, "level": "debug"},
        "keys": rows,
        "backends": {"box": {**box, "headers": {"X-Box": BOX_HEADER}}},
        "ports": {str(port): {"upstream": fake.url, "headers": token}},
        "clients": {"alice": {"weight": 2}},
    }


ORDERS: list[tuple[str, str, Any]] = [
    ("POST", CHAT, chat("hello there")),
    ("POST", CHAT, chat("hello there", stream=True)),
    ("POST", CHAT, chat("hello", model="missing")),
    ("POST", CHAT, chat("hello", priority=7)),
    ("POST", "/api/chat", chat("hello there")),
    ("POST", "/v1/messages", {**chat("hi"), "max_tokens": 5}),
    ("POST", "/v1/messages/count_tokens", chat("hi")),
    ("POST", "/v1/odd", {"model": "m"}),
    ("POST", "/v1/odd", {"no": "model"}),
    ("POST", "/api/show", {"model": "m"}),
    ("POST", "/api/pull", {"model": "m"}),
    ("GET", "/api/status", None),
    ("GET", "/v1/models", None),
    ("GET", "/api/tags", None),
    ("GET", "/", None),
    ("GET", "/nope", None),
    ("GET", "/llmq", None),
    ("GET", "/llmq/events", None),
    ("GET", "/llmq/status?all=1", None),
    ("GET", "/metrics", None),
    ("POST", "/llmq/mode", {"mode": "fast"}),
    ("POST", "/llmq/clients/alice", {"boost": True}),
    ("POST", "/llmq/models", {"action": "load", "model": "m"}),
    ("POST", "/llmq/backends", {"name": "more", "url": NOBODY, "key": BOX_KEY, "models": ["z"]}),
    ("POST", "/llmq/models", {"action": "reset_context", "model": "m"}),
    ("POST", "/llmq/backends", {"name": "odd", "url": f"http://me:{BOX_KEY}@box"}),
    ("DELETE", "/llmq/backends/more", None),
    ("DELETE", "/llmq/requests/none", None),
]


async def order(port: int, one: tuple[str, str, Any], headers: dict[str, str]) -> bytes:
    """All bytes of an answer; of the events the first."""
    method, path, values = one
    body = json.dumps(values).encode() if values is not None else None
    async with await Raw.open(port) as raw:
        await raw.send(http(method, path, {"Connection": "close", **JSON, **headers}, body))
        if path == "/llmq/events" and (answer := await raw.head()).status == 200:
            async for event in raw.events():
                return answer.raw_head + json.dumps(event).encode()
        answer = await raw.response()
        return answer.raw_head + answer.body


def arguments_of(pid: int) -> bytes:
    """What everybody on the box can see of a process, where there is such a place."""
    place = Path(f"/proc/{pid}/cmdline")
    return place.read_bytes() if place.exists() else b""


def state_in(folder: Path) -> bytes:
    return b"".join(one.read_bytes() for one in folder.glob("state.db*"))


@pytest.mark.deadline(30)
@pytest.mark.parametrize("form", ["text", "json"])
async def test_no_key_is_seen_anywhere_after_a_run_with_every_feature_on(
    form: str, tmp_path: Path
) -> None:
    file, shown = tmp_path / "llmq.json", []
    async with Listening(kind="ollama") as fake:
        settings = every_feature(fake, tmp_path, free_port(), form)
        file.write_text(json.dumps(settings))
        process = Process("serve", "--config", str(file), env={"DAVE_KEY": KEY["dave"]})
        process.command[1:2] = ["-c", BROKEN.format(root=str(Path(llmq.__file__).parent))]
        async with process as p:
            callers = [way(KEY[name]) for way in WAYS for name in ("alice", "bob", "carol")]
            callers += [bearer(KEY["dave"]), {**came_from("10.0.0.9"), **bearer(KEY["dave"])}]
            callers += [{**way(WRONG), **came_from("10.0.0.7")} for way in WAYS]
            for headers in callers:
                shown += [await order(p.port, one, headers) for one in ORDERS]
            by_port = ("GET", "/v1/models", None), bearer(KEY["alice"])
            shown.append(await order(int(*settings["ports"]), *by_port))
            for broken in mistakes(settings, tmp_path):
                file.write_text(json.dumps(broken))
                shown.append(await order(p.port, ("POST", "/llmq/reload", {}), callers[0]))
                shown.append(await order(p.port, ("GET", "/llmq/status", None), callers[0]))
            shown.append(arguments_of(p.pid))
            state = state_in(tmp_path)
            await p.ended()
        received = fake.heads + b"".join(one.raw + one.body for one in fake.requests)
    told = b"\n".join(shown)
    assert b'"config_error":"' in told
    assert PORT_TOKEN.encode() in received
    assert b" 500 " in told
    assert "RuntimeError: forced" in p.output
    assert b"llmq_requests_total" in told
    assert told.count(b"HTTP/1.1 401") == 10
    assert told.count(b"HTTP/1.1 429") > 20
    assert secrets_in(told, p.output) == []
    assert [one for one in secrets_in(received) if one in SECRETS] == []
    assert BOX_KEY.encode() in received
    assert [one for one in secrets_in(state) if one in SECRETS] == []


def mistakes(good: dict[str, Any], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Files with one mistake each, all near a secret."""
    secret, digest = KEY["alice"], HASH["carol"]
    rows: list[Any] = [
        secret,
        {"kye": secret},
        {"key": [secret]},
        {"key": {"is": secret}},
        {"key": f"{secret} and more"},
        {"key": secret + "é"},
        {"key": secret, "key_hash": f"sha256:{digest}"},
        {"key_hash": secret},
        {"key_hash": digest},
        {"key_hash": f"sha256:{digest}0"},
        {"key_hash": f"md5:{digest}"},
        {"key": secret, "key_file": str(tmp_path / "bob.key")},
        {"key": secret, "rights": ["all"]},
        {"key": secret, "class": "urgent"},
        {"key": secret, "rate": "often"},
        {"key": secret, "ips": ["here"]},
        {"key": secret, "max_concurrent": "many"},
        {"key": f"${{UNSET}}{secret}"},
        {"key": secret, "models": 5},
        {},
    ]
    yield from ({**good, "keys": {"alice": row}} for row in rows)
    yield {**good, "keys": [secret]}
    yield {**good, "keys": {"two words": {"key": secret}}}
    box = good["backends"]["box"]
    changes = [
        {"key": f"{BOX_KEY} x"},
        {"kye": BOX_KEY},
        {"url": f"http://me:{BOX_KEY}@box"},
        {"url": f"http://box?key={BOX_KEY}"},
        {"headers": {"Bad Name": BOX_HEADER}},
        {"headers": {"X-Box": BOX_HEADER + "\n"}},
        {"headers": BOX_HEADER},
        {"headers": {"Host": BOX_HEADER}},
    ]
    yield from ({**good, "backends": {"box": {**box, **change}}} for change in changes)
    token = f"Bearer {PORT_TOKEN}"
    yield {**good, "ports": {"99999": {"headers": {"Authorization": token}}}}
    yield {**good, "ports": {"11436": {"headers": {"Authorization": token + "\n"}}}}
    yield {**good, "ports": {"11436": {"upstream": f"http://me:{PORT_TOKEN}@box"}}}
    yield {**good, "ports": {"11436": {"headers": {"Authorization": token}, "bind": "0.0.0.0"}}}


def test_no_mistake_in_the_file_repeats_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, file = NO_FAKE, tmp_path / "llmq.json"
    monkeypatch.setenv("DAVE_KEY", KEY["dave"])
    good = every_feature(fake, tmp_path, 11436, "text")
    for number, broken in enumerate(mistakes(good, tmp_path)):
        file.write_text(json.dumps(broken))
        assert llmq.main(["config", "check", "--config", str(file)]) == 2, broken
        said = capsys.readouterr()
        assert secrets_in(said.out, said.err) == [], (number, said.err)
        assert said.err.startswith(f"llmq: {file}: "), said.err
        assert said.err.count("\n") == 1
    file.write_text(json.dumps(good)[:-5])
    assert llmq.main(["config", "check", "--config", str(file)]) == 2
    said = capsys.readouterr()
    assert secrets_in(said.out, said.err) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
@pytest.mark.parametrize("line", ["key = 'SECRET' 'x'", "key = SECRET", "key = 'SECRET", "SECRET"])
def test_no_mistake_of_toml_repeats_a_secret(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llmq.toml"
    file.write_text("[keys.alice]\n" + line.replace("SECRET", KEY["alice"]) + "\n")
    assert llmq.main(["config", "check", "--config", str(file)]) == 2
    said = capsys.readouterr()
    assert secrets_in(said.out, said.err) == []


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_shown_settings_have_stars_for_every_secret(
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DAVE_KEY", KEY["dave"])
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps(every_feature(NO_FAKE, tmp_path, 11436, "text")))
    assert llmq.main(["config", "show", *flags, "--config", str(file)]) == 0
    said = capsys.readouterr().out
    assert secrets_in(said) == []
    assert said.count('"***"') == 4 + 2 + 1  # keys, the box's key and header, the port's header
    if flags:
        rows = json.loads(said)["keys"]
        assert [(rows[one]["key"], rows[one]["key_hash"]) for one in NAMES] == [
            ("***", ""), ("***", ""), ("", "***"), ("***", "")
        ]  # fmt: skip


async def test_internal_error_has_a_traceback_without_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(NOBODY, keys=keys(alice={"rights": ALL})) as q:

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("forced")

        monkeypatch.setattr(llmq, "merge_rows", fail)
        monkeypatch.setattr(llmq, "read_question", fail)
        monkeypatch.setattr(q.gateway.accounts, "of_key", fail)
        seen = [await order(q.port, one, bearer(KEY["alice"])) for one in ORDERS[:1]]
        monkeypatch.undo()
        monkeypatch.setattr(llmq, "merge_rows", fail)
        monkeypatch.setattr(llmq, "read_question", fail)
        for one in (("GET", "/v1/models", None), ORDERS[0]):
            seen += [await order(q.port, one, way(KEY["alice"])) for way in WAYS]
    assert all(b" 500 " in one for one in seen)
    assert caplog.text.count("RuntimeError: forced") >= 7
    assert secrets_in(caplog.text, *seen) == []


async def test_no_caller_account_or_accounts_tells_its_key_in_its_repr() -> None:
    """a dataclass shows its fields, so one log line with `%r` would show a key.

    It costs nothing to have `key`, `key_hash` and `digest` without `repr`.
    """
    row = KeySettings(key=KEY["alice"])
    account = Account("alice", row, hashlib.sha256(KEY["alice"].encode()).digest())
    assert (
        secrets_in(repr(row), repr(account), repr(llmq.Caller("alice", False, "", account))) == []
    )


# ---- 3. Ceilings -----------------------------------------------------------------------------

WISHES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("the body", {"priority": "high"}, {}),
    ("true", {"priority": True}, {}),
    ("the header", {}, {"X-Queue-Priority": "high"}),
    ("the tier", {"service_tier": "priority"}, {}),
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: wish[0])
@pytest.mark.parametrize("most", ["", "high", "normal", "low"])
async def test_class_above_the_ceiling_is_lowered_silently_and_the_answer_tells(
    most: str, wish: Any
) -> None:
    """`max_class` of a key, and X-LLMQ-Class."""
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice={"max_class": most})) as q:
        _, body, headers = wish
        for stream in (False, True):
            answer = await q.chat("hi", {**bearer(KEY["alice"]), **headers}, stream=stream, **body)
            assert answer.status == 200
            assert answer.headers["x-llmq-class"] == (most or "high")
        assert [one.priority for one in q.gateway.journal.recent] == [most or "high"] * 2


@pytest.mark.parametrize(
    ("row", "ask_for", "got"),
    [
        ({}, None, "normal"),
        ({"class": "low"}, None, "low"),
        ({"class": "high"}, None, "high"),
        ({"class": "low"}, "high", "high"),
        ({"class": "high"}, "low", "low"),
        ({"class": "high", "max_class": "normal"}, None, "normal"),
        ({"class": "high", "max_class": "normal"}, "high", "normal"),
        ({"max_class": "low"}, None, "low"),
        ({"max_class": "low"}, "normal", "low"),
        ({"max_class": "normal"}, "low", "low"),
        ({"max_class": "high"}, "high", "high"),
    ],
)
async def test_class_of_a_key_is_its_default_and_max_class_its_most(
    row: dict[str, str], ask_for: str | None, got: str
) -> None:
    """`keys.class`."""
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice=row)) as q:
        more = {"priority": ask_for} if ask_for else {}
        answer = await q.chat("hi", bearer(KEY["alice"]), **more)
        assert answer.headers["x-llmq-class"] == got


async def test_rule_and_client_go_before_the_class_of_the_key_and_under_its_ceiling() -> None:
    rules = [{"client": "alice/boss", "class": "high"}]
    rows = keys(alice={"class": "low", "max_class": "normal"}, bob={"class": "low"})
    more = {"rules": rules, "clients": {"bob": {"class": "high"}}}
    async with FakeBackend() as fake, running(fake.url, keys=rows, **more) as q:
        for name, user, got in (
            ("alice", "x", "low"),
            ("alice", "boss", "normal"),
            ("bob", "x", "high"),
        ):
            answer = await q.chat("hi", {**bearer(KEY[name]), "X-User-ID": user})
            assert answer.headers["x-llmq-class"] == got, (name, user)


async def test_foreign_page_with_a_key_gets_at_most_normal() -> None:
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice={"class": "high"})) as q:
        for more in ({}, {"priority": "high"}):
            answer = await q.chat("hi", {**bearer(KEY["alice"]), **EVIL}, **more)
            assert (answer.status, answer.headers["x-llmq-class"]) == (200, "normal")
        answer = await q.chat("hi", {**x_api_key(KEY["alice"]), **EVIL}, priority="low")
        assert answer.headers["x-llmq-class"] == "low"


async def test_ceiling_that_a_reload_lowers_holds_for_the_next_request() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=keys(alice={})) as q:
        raw = await begin(q, "before", bearer(KEY["alice"]))
        first = await fake.arrived()
        reload_with(q, keys=keys(alice={"max_class": "low", "models": ["m"]}))
        asking = asyncio.ensure_future(q.chat("after", bearer(KEY["alice"]), priority="high"))
        await held(q)
        await first.answer("done")
        assert (await raw.response()).headers["x-llmq-class"] == "normal"
        await (await fake.arrived()).answer("done")
        assert (await asking).headers["x-llmq-class"] == "low"


async def test_class_is_told_on_errors_of_a_keyed_request_too() -> None:
    row = {"max_class": "normal"}
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=keys(alice=row)) as q:
        asking = asyncio.ensure_future(q.chat("hi", bearer(KEY["alice"]), priority="high"))
        await (await fake.arrived()).status(500, {"error": {"message": "no"}})
        answer = await asking
        assert (answer.status, answer.headers["x-llmq-class"]) == (500, "normal")


async def test_without_a_key_no_answer_tells_a_class() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        assert "x-llmq-class" not in (await q.chat("hi")).headers


async def test_lease_of_a_key_is_under_its_ceiling() -> None:
    """`POST /llmq/leases` took any class, and not the key's own as its default."""
    row = {"rights": ALL, "class": "low", "max_class": "low"}
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice=row)) as q:
        for wish in ({"class": "high"}, {}):
            lease = await ask(
                q.port, "POST", "/llmq/leases", json=wish, headers=bearer(KEY["alice"])
            )
            assert lease.status == 200
            (ticket,) = q.gateway.scheduler.running.values()
            ident = lease.json()["id"]
            await told(q, "DELETE", f"/llmq/leases/{ident}", bearer(KEY["alice"]))
            assert ticket.priority is LOW, wish


@pytest.mark.parametrize(
    ("patterns", "model", "allowed"),
    [
        ([], "qwen3:8b", True),
        (["qwen3:8b"], "qwen3:8b", True),
        (["qwen3:*"], "qwen3:8b", True),
        (["QWEN3:*"], "qwen3:8b", True),
        (["llama"], "llama", True),
        (["llama:latest"], "llama", True),
        (["llama"], "llama:latest", True),
        (["qwen3"], "qwen3:8b", False),
        (["llama", "qwen3:4*"], "qwen3:8b", False),
        (["qwen3:8b"], "best", True),
        (["best"], "best", False),
    ],
)
async def test_key_may_use_the_models_that_its_patterns_fit(
    patterns: list[str], model: str, allowed: bool
) -> None:
    """`keys.models`: of the model that a name stands for, not of the name."""
    more = {"keys": keys(alice={"models": patterns}), "aliases": {"best": "qwen3:8b"}}
    async with FakeBackend(["qwen3:8b", "llama"]) as fake, running(fake.url, **more) as q:
        answer = await q.chat("hi", bearer(KEY["alice"]), model=model)
        assert answer.status == (200 if allowed else 403), answer
        if not allowed:
            assert answer.json()["error"]["code"] == "forbidden"
            assert not fake.requests


USES = [
    ("/v1/chat/completions", chat("hi", model="secret")),
    ("/v1/completions", {"model": "secret", "prompt": "hi"}),
    ("/v1/embeddings", {"model": "secret", "input": "hi"}),
    ("/v1/responses", {"model": "secret", "input": "hi"}),
    ("/v1/rerank", {"model": "secret", "query": "hi", "documents": ["hi"]}),
    ("/v1/messages", {**chat("hi", model="secret"), "max_tokens": 5}),
    ("/v1/messages/count_tokens", chat("hi", model="secret")),
    ("/api/chat", chat("hi", model="secret")),
    ("/api/generate", {"model": "secret", "prompt": "hi"}),
    ("/api/generate", {"model": "secret"}),  # which loads it
    ("/api/generate", {"model": "secret", "keep_alive": 0}),  # and unloads it
    ("/api/embed", {"model": "secret", "input": "hi"}),
    ("/api/embeddings", {"model": "secret", "prompt": "hi"}),
    ("/v1/images/generations", {"model": "secret", "prompt": "hi"}),  # passed on as it is
    ("/llmq/models", {"action": "load", "model": "secret"}),
    ("/llmq/models", {"action": "unload", "model": "secret"}),
]


@pytest.mark.parametrize(("path", "body"), USES, ids=[f"{u[0]}-{n}" for n, u in enumerate(USES)])
async def test_no_route_uses_a_model_that_is_not_the_keys(path: str, body: Any) -> None:
    """a route that is passed on, count_tokens and POST /llmq/models do not look."""
    rows = keys(alice={"models": ["m"], "rights": ["infer", "models"]})
    models = ["m", "secret"]
    async with FakeBackend(models, kind="ollama", auto=False) as fake:
        async with running(fake.url, keys=rows, server__allow_all_routes=True) as q:
            await eventually(lambda: q.gateway.fleet.lists("secret"))
            asking = asyncio.ensure_future(
                ask(q.port, "POST", path, json=body, headers=bearer(KEY["alice"]))
            )
            meeting = asyncio.ensure_future(fake.arrived())
            await asyncio.wait([asking, meeting], return_when=asyncio.FIRST_COMPLETED)
            used = meeting.done()
            meeting.cancel()
            asking.cancel()
            await asyncio.gather(asking, meeting, return_exceptions=True)
            assert not used, "the backend was asked"
            assert asking.result().status in (403, 404), asking.result()


@pytest.mark.parametrize(
    ("networks", "address", "allowed"),
    [
        ([], "203.0.113.9", True),
        (["10.0.0.0/8"], "10.20.30.40", True),
        (["10.0.0.0/8"], "11.0.0.1", False),
        (["10.0.0.7"], "10.0.0.7", True),
        (["10.0.0.7"], "10.0.0.8", False),
        (["10.0.0.5/8"], "10.9.9.9", True),
        (["192.168.0.0/16", "fd00::/8"], "fd12::1", True),
        (["192.168.0.0/16", "fd00::/8"], "fe80::1", False),
        (["10.0.0.0/8"], "::ffff:10.0.0.9", True),
        (["::/0"], "10.0.0.9", False),
        (["0.0.0.0/0"], "2001:db8::1", False),
    ],
)
async def test_key_counts_only_from_its_networks(
    networks: list[str], address: str, allowed: bool
) -> None:
    """`keys.ips`."""
    rows = keys(alice={"ips": networks, "rights": ALL})
    async with running(NOBODY, keys=rows, server__trusted_proxies=PROXY) as q:
        for path in ("/v1/models", "/llmq/status"):
            headers = {**bearer(KEY["alice"]), **came_from(address)}
            answer = await told(q, "GET", path, headers)
            assert answer.status == (200 if allowed else 403), answer


async def test_address_that_a_client_makes_up_does_not_count() -> None:
    async with running(NOBODY, keys=keys(alice={"ips": ["10.0.0.0/8"]})) as q:
        headers = {**bearer(KEY["alice"]), **came_from("10.0.0.1")}
        assert (await told(q, "GET", "/v1/models", headers)).status == 403


async def test_key_that_comes_back_with_a_lower_ceiling_has_it_at_once() -> None:
    """while what it began before runs, the ceilings that were taken away still counted."""
    mine = bearer(KEY["alice"])
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=keys(alice={}, bob={})) as q:
            first = await begin(q, "before", mine)
            request = await fake.arrived()
            reload_with(q, keys=keys(bob={}))
            reload_with(q, keys=keys(alice={"max_class": "low"}, bob={}))
            second = await begin(q, "after", mine, priority="high")
            (waits,) = await eventually(lambda: list(q.gateway.scheduler.waiting.values()))
            assert waits.priority is LOW
            await request.answer("done")
            await (await fake.arrived()).answer("done")
            assert [(await one.response()).status for one in (first, second)] == [200, 200]


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({}, "alice"),
        ({"X-User-ID": "bob"}, "alice/bob"),
        ({"X-OpenWebUI-User-Id": "42"}, "alice/42"),
        ({"X-User-ID": "a b\xe9"}, "alice/a-b-"),
        ({"X-User-ID": "x" * 99}, "alice/" + "x" * 58),
        ({"X-User-ID": "../bob"}, "alice/../bob"),
        (EVIL, "alice"),
        ({"User-Agent": "curl/8"}, "alice"),
    ],
)
async def test_keyed_client_has_the_name_of_its_key(headers: dict[str, str], name: str) -> None:
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice={})) as q:
        assert (await q.chat("hi", {**bearer(KEY["alice"]), **headers})).status == 200
        assert q.gateway.journal.recent[-1].client == name


async def test_nobody_without_the_key_gets_its_name() -> None:
    more = {"server__require_key": "remote"}
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice={}), **more) as q:
        for headers in ({"X-User-ID": "alice"}, {"X-User-ID": "/bob"}, {"User-Agent": "alice/1"}):
            assert (await q.chat("hi", headers)).status == 200
        names = [one.client for one in q.gateway.journal.recent]
        assert names == ["user:alice", "user:/bob", "app:alice"]


# ---- 4. Caps ---------------------------------------------------------------------------------

CAPS = {  # most at once, most that wait
    "alice": (2, 5),
    "bob": (3, 0),
    "carol": (0, 4),
    "dave": (1, 20),
}


def caps_of(names: Any = NAMES) -> dict[str, Any]:
    rows = {one: {"max_concurrent": CAPS[one][0], "max_waiting": CAPS[one][1]} for one in names}
    return keys(**rows)


def active(fake: FakeBackend) -> Counter[str]:
    """What the backend serves now, by key; of whom its client's end is not here yet."""
    there = [r for r in fake.requests if not (r.done.is_set() or r.connection.peer_closed())]
    return Counter(one.text.split()[0] for one in there)


class Hundred:
    """A hundred clients of four keys in one queue, and what must be true of them."""

    def __init__(self, q: running, fake: FakeBackend) -> None:
        self.q, self.fake, self.rng = q, fake, random.Random(12)
        self.raws: dict[str, Raw] = {}  # by text, as is what follows
        self.arrived: dict[str, Any] = {}
        self.left = {"alice": 2 + 5, "bob": 25, "carol": 25, "dave": 1 + 20}  # of 25 each

    def expected(self) -> dict[str, tuple[int, int]]:
        runs = {one: min(CAPS[one][0] or 99, self.left[one]) for one in NAMES}
        return {one: (self.left[one] - runs[one], runs[one]) for one in NAMES}

    def call_of(self, text: str) -> Any:
        calls = {call.request_id: call for call in self.q.gateway.calls.values()}
        return calls.get("r" + text.split()[1])

    async def come(self) -> None:
        who = [name for name in NAMES for _ in range(25)]
        self.rng.shuffle(who)
        for number, name in enumerate(who):
            text = f"{name} {number}"
            user = {"X-User-ID": f"u{number % 5}"} if number % 6 else {}
            headers = {**bearer(KEY[name]), **user, "X-Request-Id": f"r{number}"}
            self.raws[text] = await begin(self.q, text, headers)
        await eventually(lambda: books(self.q) == self.expected())

    async def are_refused(self) -> None:
        """Those that find as many waiting as may."""
        refused = [text for text in self.raws if self.call_of(text) is None]
        assert len(refused) == 100 - sum(self.left.values())
        for text in refused:
            answer = await self.raws.pop(text).response()
            assert (answer.status, answer.code) == (429, "queue_full"), answer
            assert answer.headers["retry-after"]

    async def meet(self) -> None:
        """At the backend, where no key ever has more than it may."""
        scheduler = self.q.gateway.scheduler
        await eventually(lambda: sum(active(self.fake).values()) == len(scheduler.running))
        while self.fake.has_arrived():
            request = await self.fake.arrived()
            self.arrived[request.text] = request
            name = request.text.split()[0]
            assert active(self.fake)[name] <= (CAPS[name][0] or 99)

    async def end_one(self) -> None:
        """In whatever way; the places that it leaves are taken."""
        text = self.rng.choice(sorted(self.raws))
        raw, name, call = self.raws.pop(text), text.split()[0], self.call_of(text)
        runs = call.id in self.q.gateway.scheduler.running
        way = self.rng.choice(("answer", "error", "broken", "leave", "cancel"))
        if way == "cancel":
            answer = await told(self.q, "DELETE", f"/llmq/requests/{call.id}", bearer(KEY[name]))
            assert answer.status == 200, answer
            assert (await raw.response()).status == 499
        elif way == "leave" or not runs:
            raw.close()
        else:
            await END[way](self.arrived[text])
            assert (await raw.response()).status == {"answer": 200, "error": 500, "broken": 502}[
                way
            ]
        self.left[name] -= 1
        await eventually(lambda: books(self.q) == self.expected())


async def end_well(request: Any) -> None:
    await request.answer("done")


async def end_badly(request: Any) -> None:
    await request.status(500, {"error": {"message": "no"}})


async def break_off(request: Any) -> None:
    await request.send(b"what is this?\r\n\r\n")
    request.reset()


END = {"answer": end_well, "error": end_badly, "broken": break_off}


@pytest.mark.deadline(30)
async def test_caps_hold_exactly_for_a_hundred_clients_of_four_keys() -> None:
    """`keys.max_concurrent`, `keys.max_waiting`: over all names of a key, on every way out."""
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=caps_of(), queue__slots=100) as q:
            hundred = Hundred(q, fake)
            await hundred.come()
            await hundred.are_refused()
            while hundred.raws:
                await hundred.meet()
                await hundred.end_one()
            assert set(books(q).values()) == {(0, 0)}


async def held(q: running, number: int = 1) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


class Two:
    """One request of alice runs, one waits, a third found no place; bob may do everything."""

    LIMITS: ClassVar[dict[str, Any]] = {
        "queue__slots": 8, "queue__max_wait_low": 0.3, "queue__down_wait": 0.3,
    }  # fmt: skip
    first: Raw
    second: Raw
    request: Any  # the first, at the backend

    def __init__(self, q: running, fake: FakeBackend) -> None:
        self.q, self.fake = q, fake
        self.mine, self.boss = bearer(KEY["alice"]), bearer(KEY["bob"])

    async def begin(self) -> None:
        q, mine = self.q, self.mine
        self.first = await begin(q, "first", {**mine, "X-User-ID": "one"})
        self.request = await self.fake.arrived()
        self.second = await begin(q, "second", {**mine, "X-User-ID": "two"})
        await held(q)
        assert books(q)["alice"] == (1, 1)
        assert (await q.chat("third", {**mine, "X-User-ID": "three"})).status == 429
        (self.waits,), (self.runs,) = q.gateway.scheduler.waiting, q.gateway.scheduler.running

    async def cancel(self, what: str, headers: dict[str, str]) -> None:
        answer = await told(self.q, "DELETE", f"/llmq/requests{what}", headers)
        assert answer.status in (200, 400), answer

    async def block(self, value: bool | None) -> None:
        change = {"blocked": value}
        await ask(self.q.port, "POST", "/llmq/clients/alice", json=change, headers=self.boss)

    async def statuses(self) -> list[int]:
        return [(await self.first.response()).status, (await self.second.response()).status]

    # the first ends, the second has its turn

    async def second_runs(self, status: int) -> None:
        if status:
            assert (await self.first.response()).status == status
        request = await self.fake.arrived()
        assert request.text == "second"
        assert books(self.q)["alice"] == (0, 1)
        await request.answer("done")
        assert (await self.second.response()).status == 200

    async def answer(self) -> None:
        await self.request.answer("done")
        await self.second_runs(200)

    async def error(self) -> None:
        await end_badly(self.request)
        await self.second_runs(500)

    async def refused(self) -> None:
        await self.request.status(400, {"error": {"message": "no"}})
        await self.second_runs(400)

    async def broken(self) -> None:
        await break_off(self.request)
        await self.second_runs(502)

    async def client_leaves(self) -> None:
        self.first.close()
        await self.second_runs(0)

    async def cancelled(self) -> None:
        await self.cancel(f"/{self.runs}", self.mine)
        await self.second_runs(499)

    async def backend_is_too_slow(self) -> None:
        self.q.gateway.calls[self.runs].deadline = 0.0
        await self.second_runs(504)

    # the second ends, the first goes on

    async def first_goes_on(self, status: int) -> None:
        if status:
            assert (await self.second.response()).status == status
        await eventually(lambda: books(self.q)["alice"] == (0, 1))
        await self.request.answer("done")
        assert (await self.first.response()).status == 200

    async def waiting_client_leaves(self) -> None:
        self.second.close()
        await self.first_goes_on(0)

    async def waiting_is_cancelled(self) -> None:
        await self.cancel(f"/{self.waits}", self.mine)
        await self.first_goes_on(499)

    async def waiting_is_cancelled_with_all(self) -> None:
        path = "/llmq/requests?state=waiting"
        answer = await ask(self.q.port, "DELETE", path, headers=self.boss)
        assert answer.json() == {"cancelled": 1}
        await self.first_goes_on(499)

    async def waits_too_long(self) -> None:
        path, low = f"/llmq/requests/{self.waits}", {"priority": "low"}
        assert (await ask(self.q.port, "POST", path, json=low, headers=self.boss)).status == 200
        await self.first_goes_on(503)

    # both

    async def lost_twice(self) -> None:
        self.request.reset()
        for _ in range(3):
            request = await self.fake.arrived()
            assert sum(books(self.q)["alice"]) in (1, 2)
            assert sum(active(self.fake).values()) == 1
            request.reset()
        assert await self.statuses() == [502, 502]

    async def key_goes(self) -> None:
        reload_with(self.q, keys=keys(bob={"rights": ALL}))
        await self.request.answer("done")
        await (await self.fake.arrived()).answer("done")
        assert await self.statuses() == [200, 200]

    async def blocked(self) -> None:
        await self.block(True)
        assert await self.statuses() == [403, 403]
        await self.block(None)

    async def backend_goes(self) -> None:
        await self.fake.stop_listening()
        self.fake.drop_connections()
        assert {*await self.statuses()} <= {502, 503}
        await self.fake.listen_again()


WAYS_OUT = [
    Two.answer, Two.error, Two.refused, Two.broken, Two.client_leaves, Two.cancelled,
    Two.backend_is_too_slow, Two.waiting_client_leaves, Two.waiting_is_cancelled,
    Two.waiting_is_cancelled_with_all, Two.waits_too_long, Two.lost_twice, Two.key_goes,
    Two.blocked, Two.backend_goes,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS_OUT, ids=lambda way: way.__name__)
async def test_every_way_out_frees_what_the_key_had(way: Any) -> None:
    rows = keys(alice={"max_concurrent": 1, "max_waiting": 1}, bob={"rights": ALL})
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=rows, **Two.LIMITS) as q:
        two = Two(q, fake)
        await two.begin()
        await way(two)
        await eventually(lambda: is_clear(q))
        assert set(books(q).values()) == {(0, 0)}
        assert not [one for one in q.gateway.clients.known.values() if one.waiting or one.running]


async def test_caps_of_a_key_are_kept_over_a_reload_and_follow_it() -> None:
    def rows(most: int, waiting: int) -> dict[str, Any]:
        return keys(alice={"max_concurrent": most, "max_waiting": waiting})

    mine = bearer(KEY["alice"])
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=rows(1, 2), queue__slots=8) as q:
            raws = [await begin(q, f"alice {n}", {**mine, "X-User-ID": f"u{n}"}) for n in range(3)]
            await held(q, 2)
            for _ in range(3):
                reload_with(q, keys=rows(1, 2))
            assert books(q)["alice"] == (2, 1)
            assert (await q.chat("one too many", mine)).status == 429
            reload_with(q, keys=rows(3, 1))
            await held(q, 0)
            assert books(q)["alice"] == (0, 3), "a higher cap holds at once"
            reload_with(q, keys=rows(2, 1))
            raws.append(await begin(q, "alice 3", mine))
            await held(q)
            assert (await q.chat("one too many", mine)).status == 429
            for _ in range(4):
                assert active(fake)["alice"] <= 3
                await (await fake.arrived()).answer("done")
            assert [(await raw.response()).status for raw in raws] == [200] * 4
            assert books(q)["alice"] == (0, 0)


async def test_rotated_key_works_at_once_and_nothing_is_dropped() -> None:
    row = {"max_concurrent": 1, "max_waiting": 2}
    old, new = bearer(KEY["alice"]), bearer(KEY["dave"])
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=keys(alice=row), queue__slots=8) as q:
            raws = [await begin(q, "alice 1", old)]
            first = await fake.arrived()
            raws.append(await begin(q, "alice 2", {**old, "X-User-ID": "bob"}))
            await held(q)
            kept = await Raw.open(q.port)
            await kept.send(http("GET", "/v1/models", old))
            assert (await kept.response()).status == 200
            reload_with(q, keys={"alice": {**row, "key": KEY["dave"]}})
            await kept.send(http("GET", "/v1/models", old))
            assert (await kept.response()).status == 401, "also on a connection that is open"
            assert (await told(q, "GET", "/v1/models", new)).status == 200
            raws.append(await begin(q, "alice 3", new))
            await held(q, 2)
            assert books(q)["alice"] == (2, 1), "the cap is over the old one's too"
            ident = next(iter(q.gateway.scheduler.waiting))
            assert (await told(q, "DELETE", f"/llmq/requests/{ident}", old)).status == 401
            await first.answer("done")
            for _ in range(2):
                await (await fake.arrived()).answer("done")
            assert [(await raw.response()).status for raw in raws] == [200] * 3
            assert books(q)["alice"] == (0, 0)


async def test_removed_key_is_out_at_once_and_what_it_began_ends_in_peace() -> None:
    mine = bearer(KEY["alice"])
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=keys(alice={"max_concurrent": 1}, bob={})) as q:
            raws = [await begin(q, f"alice {n}", mine, stream=True) for n in range(2)]
            await held(q)
            reload_with(q, keys=keys(bob={}))
            assert (await q.chat("more", mine)).status == 401
            for _ in range(2):
                await (await fake.arrived()).answer("done now")
            assert [(await raw.response()).content for raw in raws] == ["done now"] * 2


@pytest.mark.parametrize("again", [False, True], ids=["new account", "the same account"])
async def test_key_that_goes_and_comes_back_keeps_its_cap_and_its_books(again: bool) -> None:
    """By two reloads, while it has something under way.

    Before it was another account then, with a cap of its own beside that of the first; while its
    name stayed busy it had the first one's. `Accounts.configure` forgets who still has something.
    """
    mine, row = bearer(KEY["alice"]), {"max_concurrent": 1}
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=keys(alice=row, bob={}), queue__slots=8) as q:
            raws = [await begin(q, "alice 1", mine)]
            first = await fake.arrived()
            reload_with(q, keys=keys(alice=row, bob={}) if again else keys(bob={}))
            reload_with(q, keys=keys(alice=row, bob={}))
            for number in (2, 3, 4):
                headers = {**mine, **({"X-User-ID": "eve"} if number % 2 else {})}
                raws.append(await begin(q, f"alice {number}", headers))
            await eventually(lambda: len(q.gateway.calls) == 4)
            running_now = q.gateway.scheduler.running
            await first.answer("done")
            for _ in range(3):
                request = await fake.arrived()
                await eventually(lambda: sum(active(fake).values()) == len(running_now))
                assert active(fake)["alice"] == 1, "its cap"
                books(q)
                await request.answer("done")
            assert [(await raw.response()).status for raw in raws] == [200] * 4
            await eventually(lambda: is_clear(q))
            assert set(books(q).values()) == {(0, 0)}


@pytest.mark.parametrize(
    "tables",
    [
        {"keys": keys(alice={}), "ports": {"11436": {"client": "alice"}}},
        {"ports": {"11436": {"client": "tv"}, "11437": {"client": "tv"}}},
    ],
)
def test_one_name_for_two_doors_is_refused(tables: dict[str, Any]) -> None:
    """Else nobody could say whose caps hold."""
    with pytest.raises(llmq.ConfigError, match="11436"):
        build_settings(tables)


OTHERS = ["user:alice", "app:curl", "ip:10.0.0.9", "unix:bob", "anonymous", "llmq"]


@pytest.mark.parametrize("name", [*OTHERS, "alice/tv"])
def test_port_is_for_nobody_who_may_come_otherwise(name: str) -> None:
    with pytest.raises(llmq.ConfigError, match="11436"):
        build_settings({"ports": {"11436": {"client": name}}})


@pytest.mark.parametrize("name", OTHERS)
def test_key_has_no_name_that_somebody_without_one_may_have(name: str) -> None:
    """where only others need a key, this box shares that name, its caps and ceilings."""
    with pytest.raises(llmq.ConfigError, match=name):
        build_settings({"keys": {name: {"key": KEY["alice"]}}})


async def test_lease_of_a_key_is_in_its_books() -> None:
    mine = bearer(KEY["alice"])
    async with FakeBackend(auto=False) as fake:
        rows = keys(alice={"rights": ALL, "max_concurrent": 2})
        async with running(fake.url, keys=rows) as q:
            lease = await ask(q.port, "POST", "/llmq/leases", json={}, headers=mine)
            assert lease.status == 200
            assert books(q)["alice"] == (0, 1)
            raw = await begin(q, "alice 1", mine)
            await held(q)
            assert books(q)["alice"] == (1, 1)
            ident = lease.json()["id"]
            assert (await told(q, "DELETE", f"/llmq/leases/{ident}", mine)).status == 200
            await (await fake.arrived()).answer("done")
            assert (await raw.response()).status == 200
            assert books(q)["alice"] == (0, 0)


# ---- 4b. The same, pure: a scheduler, many stories -------------------------------------------


class Crowd:
    """Clients of four accounts, and of none, at two devices; random orders, all recounted."""

    PEOPLE: ClassVar[dict[str, str]] = {
        "alice": "alice", "alice/bob": "alice", "alice/eve": "alice", "carol": "carol",
        "carol/x": "carol", "carol/y": "carol", "dave/x": "dave", "dave/y": "dave",
        "port": "port:1", "user:solo": "", "app:curl": "",
    }  # fmt: skip

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        limits = llmq.QueueSettings(aging=rng.choice((0.0, 5.0)), affinity=rng.choice((0.0, 9.0)))
        self.sim = Simulation(llmq.Settings(queue=limits))
        load = {"m": 1.0, "n": 2.0, "o": 1.0}
        self.sim.add("a", ("m", "n"), slots=3, load=load if seed % 2 else None)
        self.sim.add("b", ("n", "o"), slots=2, load=load if seed % 3 else None)
        self.queue, self.now, self.numbers = self.sim.queue, 100.0, count()
        self.accounts = Accounts()
        self.reload()
        named = self.accounts.named
        self.clients = {name: Client(name) for name in self.PEOPLE}
        for name, of in self.PEOPLE.items():
            self.clients[name].account = named[of] if of else llmq.NO_ACCOUNT
        self.done: Counter[str] = Counter()

    def reload(self) -> None:
        """Other caps for the same accounts, as a reload sets them."""
        rng = self.rng
        rows = {
            name: KeySettings(
                key=name, max_concurrent=rng.choice((0, 1, 1, 2)), max_waiting=rng.choice((0, 3, 6))
            )
            for name in ("alice", "carol", "dave")
        }
        ports = {"1": PortSettings(client="port", max_concurrent=rng.choice((0, 1)))}
        self.accounts.configure(llmq.Settings(keys=rows, ports=ports))
        for client in getattr(self, "clients", {}).values():
            caps = llmq.ClientSettings(max_concurrent=rng.choice((0, 0, 1)))
            client.settings = llmq.replace(caps, boost=rng.random() < 0.1)
        self.queue.reconsider()

    def ticket(self) -> Ticket:
        rng = self.rng
        client = self.clients[rng.choice(list(self.PEOPLE))]
        want, priority = Want(rng.choice("mno"), (llmq.CHAT,)), rng.choice(list(Priority))
        return Ticket(f"t{next(self.numbers)}", client, want, priority)

    def submit(self) -> None:
        ticket = self.ticket()
        account = ticket.client.account
        most = account.settings.max_waiting if account is not llmq.NO_ACCOUNT else 0
        if 0 < most <= self.of(account, self.queue.waiting):
            with pytest.raises(llmq.LlmqError, match="as many as may"):
                self.queue.submit(ticket, self.now)
            self.done["full"] += 1
            return
        before = self.runs()
        if self.rng.random() < 0.5 and self.queue.start(ticket, self.now):
            self.may_have_started(before, ticket)
            self.done["at once"] += 1
        else:
            self.queue.submit(ticket, self.now)

    def finish(self) -> None:
        if running_now := list(self.queue.running.values()):
            self.queue.finish(self.rng.choice(running_now), self.now)

    def finish_all(self) -> None:
        """A quiet moment: all that waits gives up, all that runs is done."""
        for ticket in list(self.queue.waiting.values()):
            self.queue.cancel(ticket)
        while self.queue.running:
            self.finish()

    def retry(self) -> None:
        if running_now := list(self.queue.running.values()):
            ticket = self.rng.choice(running_now)
            self.queue.retry(ticket, self.now, counted=self.rng.random() < 0.5)

    def cancel(self) -> None:
        if waiting := list(self.queue.waiting.values()):
            self.queue.cancel(self.rng.choice(waiting))

    def reprioritise(self) -> None:
        if waiting := list(self.queue.waiting.values()):
            self.queue.reprioritise(self.rng.choice(waiting), self.rng.choice(list(Priority)))

    def expire(self) -> None:
        self.queue.expire(self.now)

    STEPS = (
        ("submit", 40),
        ("finish", 26),
        ("finish_all", 1),
        ("retry", 5),
        ("cancel", 6),
        ("reprioritise", 6),
        ("expire", 8),
        ("reload", 2),
    )

    def step(self) -> None:
        names, weights = zip(*self.STEPS)
        (name,) = self.rng.choices(names, weights)
        self.now += self.rng.choice((0.01, 0.3, 1.0))
        self.sim.now = self.now
        getattr(self, name)()
        self.recount()
        before = self.runs()
        for ticket, _ in self.queue.dispatch(self.now):
            self.may_have_started(before, ticket)
            self.done["started"] += 1
        self.recount()
        self.nobody_idles()

    def of(self, account: Account, some: dict[str, Ticket]) -> int:
        return sum(one.client.account is account for one in some.values())

    def runs(self) -> Counter[Any]:
        """How many run, by account and by client, counted from the tickets."""
        found: Counter[Any] = Counter(one.client for one in self.queue.running.values())
        found.update(one.client.account for one in self.queue.running.values())
        return found

    def may_have_started(self, before: Counter[Any], ticket: Ticket) -> None:
        for one in (ticket.client, ticket.client.account):
            most = one.settings.max_concurrent
            before[one] += 1
            assert one is llmq.NO_ACCOUNT or not most or before[one] <= most, "above its cap"

    def recount(self) -> None:
        queue = self.queue
        for account in self.accounts.named.values():
            assert account.waiting == self.of(account, queue.waiting)
            assert account.running == self.of(account, queue.running)
        for client in self.clients.values():
            assert client.running == sum(one.client is client for one in queue.running.values())
            assert client.waiting == sum(one.client is client for one in queue.waiting.values())

    def nobody_idles(self) -> None:
        """Whoever waits is at a cap, or there is no room: nobody is parked for ever."""
        runs = self.runs()
        for ticket in self.queue.waiting.values():
            pairs = (ticket.client, ticket.client.account)
            capped = any(
                0 < one.settings.max_concurrent <= runs[one]
                for one in pairs
                if one is not llmq.NO_ACCOUNT
            )
            if not capped:
                able = self.queue.fleet.candidates(ticket.want, urgent=True)
                assert not able, f"{ticket.client.name} could start and does not"
            else:
                self.done["capped"] += 1


@pytest.mark.untraced
@pytest.mark.deadline(30)
@pytest.mark.parametrize("seed", range(12))
def test_in_any_story_caps_of_accounts_hold_and_nobody_is_parked_for_ever(seed: int) -> None:
    crowd = Crowd(seed)
    for _ in range(2500):
        crowd.step()
    for name in ("started", "at once", "capped", "full"):
        assert crowd.done[name] > 20, crowd.done
    while crowd.queue.waiting or crowd.queue.running:  # in the end everybody has had a turn
        assert crowd.queue.running, "they wait and nothing runs"
        crowd.finish()
        crowd.queue.dispatch(crowd.now)
    crowd.recount()


def test_shared_cap_wakes_the_other_names_of_the_key() -> None:
    """Whoever is parked because of bob starts when bob ends."""
    sim = Simulation()
    sim.add("a", slots=4)
    account = Account("alice", KeySettings(key="k", max_concurrent=1))
    clients = [Client(name, account=account) for name in ("alice/bob", "alice/eve", "alice")]
    other = Account("other", KeySettings(key="x", max_concurrent=1))
    clients += [Client("other", account=other), Client("other/x", account=other)]
    tickets = [Ticket(c.name, c, Want("m", (llmq.CHAT,)), NORMAL) for c in clients]
    for ticket in tickets:
        sim.queue.submit(ticket, 0.0)
    started = []
    for now in range(1, 9):
        new = [ticket for ticket, _ in sim.queue.dispatch(now)]
        started += [ticket.id for ticket in new]
        assert account.running <= 1
        assert other.running <= 1
        if runs := list(sim.queue.running.values()):
            sim.queue.finish(runs[0], now)
    assert sorted(started) == sorted(client.name for client in clients)
    assert (account.waiting, account.running, other.running) == (0, 0, 0)


# ---- 5. Rates and budgets --------------------------------------------------------------------

DAY = 86400.0
RATES = [("60/m", 60, 60.0), ("1/s", 1, 1.0), ("7/s", 7, 1.0), ("5/h", 5, 3600.0), ("3/d", 3, DAY)]


def metered(**row: Any) -> Account:
    return Account("alice", KeySettings(key="k", **row))


@pytest.mark.parametrize(("rate", "most", "period"), RATES)
def test_rate_allows_a_burst_and_then_one_per_its_share_of_the_time(
    rate: str, most: int, period: float
) -> None:
    """`keys.rate`."""
    account, now, each = metered(rate=rate), 1000.0, period / most
    assert [account.take(now, "") for _ in range(most)] == [0.0] * most
    assert account.take(now, "") == pytest.approx(each)
    assert account.take(now + each / 2, "") == pytest.approx(each / 2), "to ask costs nothing"
    assert account.take(now + each * 1.0001, "") == 0.0
    assert account.take(now + each * 1.0002, "") > 0.0
    later = now + 100 * period  # no more is saved up than the burst
    assert [account.take(later, "") for _ in range(most)] == [0.0] * most
    assert account.take(later, "") > 0.0


@pytest.mark.untraced
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rate", "most", "period"), RATES)
def test_no_window_has_more_than_the_burst_and_what_came_in_it(
    rate: str, most: int, period: float, seed: int
) -> None:
    """Of N per T: in any window of w seconds at most N + w/T·N, so in one of T at most 2 N."""
    rng, account, now = random.Random(seed), metered(rate=rate), 12345.678
    taken: list[float] = []
    refused = 0
    for _ in range(3000):
        now += rng.choice((0.0, 0.0, rng.expovariate(2 * most / period)))
        if rng.random() < 0.002:
            now += 3 * period
        wait = account.take(now, "")
        if rng.random() < 0.1:
            account.limits(now, "", 1.0)
        if wait:
            refused += 1
            assert 0 < wait <= period / most + 1e-6
        else:
            taken.append(now)
    assert refused > 100
    for first in range(len(taken)):
        for last in range(first, min(len(taken), first + 4 * most + 2)):
            window = taken[last] - taken[first]
            assert last - first + 1 <= most + window * most / period + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_who_waits_as_long_as_told_is_let_in(seed: int) -> None:
    rng = random.Random(seed)
    account, now = metered(rate=rng.choice(("60/m", "7/s", "11/m", "3/h"))), rng.random() * 1e6
    for _ in range(2000):
        now += rng.random() * rng.choice((0.01, 1.0, 30.0))
        wait = account.take(now, "")
        if wait:
            now += wait + 1e-6  # no less than a Retry-After of whole seconds
            assert account.take(now, "") == 0.0


def test_rate_that_a_reload_changes_holds_from_then_on() -> None:
    account = metered(rate="60/m")
    assert [account.take(0.0, "") for _ in range(50)] == [0.0] * 50
    account.settings = KeySettings(key="k", rate="5/m")
    assert [bool(account.take(0.0, "")) for _ in range(6)] == [False] * 5 + [True]
    account.settings = KeySettings(key="k", rate="600/m")
    assert account.take(0.0, "") == pytest.approx(0.1), "nothing is given for the change"
    account.settings = KeySettings(key="k")
    assert all(account.take(0.0, "") == 0.0 for _ in range(1000))
    assert account.limits(0.0, "", 1.0) == []


def test_budget_ends_with_the_tokens_and_the_day_gives_it_back() -> None:
    """`keys.tokens_per_day`."""
    account = metered(tokens_per_day=100)
    assert account.take(0.0, "mon") == 0.0
    account.note_tokens(99, "mon")
    assert account.take(0.0, "mon") == 0.0, "what runs may go over it"
    account.note_tokens(50, "mon")
    assert account.take(0.0, "mon") == -1.0
    told_now = dict(account.limits(0.0, "mon", 3600.0))
    assert told_now["x-ratelimit-remaining-tokens"] == "0"
    assert account.take(0.0, "tue") == 0.0
    assert dict(account.limits(0.0, "tue", 9.0))["x-ratelimit-remaining-tokens"] == "100"
    account.note_tokens(100, "tue")
    assert account.take(0.0, "tue") == -1.0
    account.settings = KeySettings(key="k", tokens_per_day=101)
    assert account.take(0.0, "tue") == 0.0, "a reload keeps what was used"
    account.note_tokens(1, "tue")
    assert account.take(0.0, "tue") == -1.0


def test_budget_that_is_used_up_costs_nothing_of_the_rate() -> None:
    account = metered(rate="2/h", tokens_per_day=10)
    account.note_tokens(10, "mon")
    assert [account.take(0.0, "mon") for _ in range(5)] == [-1.0] * 5
    assert [account.take(0.0, "tue") for _ in range(2)] == [0.0, 0.0]
    assert account.take(0.0, "tue") > 0


@pytest.mark.parametrize("seed", range(4))
def test_budget_counts_every_token_of_its_day_and_no_other(seed: int) -> None:
    rng, account = random.Random(seed), metered(tokens_per_day=1000)
    for day in range(300):
        used = 0
        for _ in range(rng.randrange(40)):
            assert (account.take(0.0, str(day)) == -1.0) == (used >= 1000)
            tokens = rng.randrange(100)
            account.note_tokens(tokens, str(day))
            used += tokens
            left = dict(account.limits(0.0, str(day), 1.0))["x-ratelimit-remaining-tokens"]
            assert int(left) == max(0, 1000 - used)


@pytest.mark.parametrize(
    "text",
    [
        "60", "60/", "/m", "0/m", "60/y", "-1/m", "60 per m", "6.5/m", "60/mm", "60/m ", 60,
        "9999999999/s",
    ],
)  # fmt: skip
def test_rate_is_a_number_and_a_time(text: Any) -> None:
    with pytest.raises(llmq.ConfigError, match="60/m"):
        build_settings({"keys": keys(alice={"rate": text})})


LIMITS = [f"x-ratelimit-{fact}-{of}" for of in ("requests", "tokens") for fact in (
    "limit", "remaining", "reset")]  # fmt: skip


async def test_over_the_rate_is_429_with_what_openai_says() -> None:
    rows = keys(alice={"rate": "3/h"}, bob={})
    async with FakeBackend() as fake, running(fake.url, keys=rows) as q:
        for left in (2, 1, 0):
            answer = await q.chat("hi", {**bearer(KEY["alice"]), "X-User-ID": f"u{left}"})
            assert answer.status == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert re.fullmatch(r"\d+s", answer.headers["x-ratelimit-reset-requests"])
            assert "x-ratelimit-limit-tokens" not in answer.headers
        for path, body in ((CHAT, chat("hi")), ("/v1/messages", {**chat("hi"), "max_tokens": 5})):
            answer = await ask(q.port, "POST", path, json=body, headers=bearer(KEY["alice"]))
            assert answer.status == 429
            assert 1190 <= int(answer.headers["retry-after"]) <= 1200
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert "alice" in told_error(path, answer)
        answer = await q.chat("hi", bearer(KEY["bob"]))
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        later = q.gateway.now() + 1300
        q.gateway.now = lambda: later
        assert (await q.chat("hi", bearer(KEY["alice"]))).status == 200


@pytest.mark.deadline(20)
async def test_rate_is_exact_for_a_hundred_clients_at_once() -> None:
    rows = keys(alice={"rate": "10/h"}, bob={"rate": "25/d"}, carol={"rate": "1/h"}, dave={})
    async with FakeBackend() as fake, running(fake.url, keys=rows, queue__slots=20) as q:
        who = [NAMES[number % 4] for number in range(120)]
        asking = [
            q.chat("hi", {**bearer(KEY[name]), "X-User-ID": f"u{number % 7}"})
            for number, name in enumerate(who)
        ]
        answers = await asyncio.gather(*asking)
        passed = Counter(name for name, one in zip(who, answers) if one.status == 200)
        assert passed == {"alice": 10, "bob": 25, "carol": 1, "dave": 30}
        assert {one.status for one in answers} == {200, 429}
        reload_with(q, keys=rows)
        reload_with(q, keys={name: {**row, "class": "low"} for name, row in rows.items()})
        for name in ("alice", "bob", "carol"):
            answer = await q.chat("hi", bearer(KEY[name]))
            assert answer.status == 429, "kept over a reload"


MET: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/api/tags", None),
    ("POST", CHAT, chat("hi")),
    ("POST", CHAT, chat("hi", stream=True)),
    ("POST", CHAT, chat("hi", model="missing")),
    ("POST", CHAT, {"messages": 5}),
    ("POST", CHAT, chat("hi", priority=7)),
    ("GET", "/nope", None),
    ("GET", CHAT, None),
    ("POST", "/v1/models", {}),
    ("GET", "/llmq/status", None),
    ("GET", "/health", None),
    ("GET", "/", None),
]


@pytest.mark.parametrize("one", MET, ids=[f"{n}-{one[0]}-{one[1]}" for n, one in enumerate(MET)])
async def test_every_answer_of_a_metered_key_tells_what_is_left(one: Any) -> None:
    """403, 404 and 405 did not."""
    row = {"rate": "100/h", "tokens_per_day": 1000}
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice=row)) as q:
        method, path, body = one
        answer = await ask(q.port, method, path, json=body, headers=bearer(KEY["alice"]))
        assert set(LIMITS) <= set(answer.headers), answer
        assert [answer.header_list.count((name, answer.headers[name])) for name in LIMITS] == [
            1
        ] * 6


async def test_metered_key_is_told_its_own_limits_and_not_the_backends() -> None:
    row = {"rate": "100/h"}
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=keys(alice=row)) as q:
        asking = asyncio.ensure_future(q.chat("hi", bearer(KEY["alice"])))
        theirs = [("x-ratelimit-limit-requests", "7"), ("x-ratelimit-limit-tokens", "8")]
        request = await fake.arrived()
        await request.status(200, {"choices": [{"message": {"content": "x"}}]}, theirs)
        answer = await asking
        assert answer.headers["x-ratelimit-limit-requests"] == "100"
        assert "x-ratelimit-limit-tokens" not in answer.headers


async def test_budget_is_429_until_midnight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "today", lambda: ("2026-07-01", 1234.5))
    rows = keys(alice={"tokens_per_day": 10})
    async with FakeBackend() as fake, running(fake.url, keys=rows) as q:
        mine, account = bearer(KEY["alice"]), q.gateway.accounts.named["alice"]
        answer = await q.chat("one two three", {**mine, "X-User-ID": "a"})
        assert answer.headers["x-ratelimit-limit-tokens"] == "10"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "10"
        assert account.tokens == 1 + 3, "in and out"
        await q.chat("one two three", {**mine, "X-User-ID": "b"})
        assert account.tokens == 8
        reload_with(q, keys=rows)
        assert (await q.chat("one two three", mine)).headers["x-ratelimit-remaining-tokens"] == "2"
        answer = await q.chat("hi", {**mine, "X-User-ID": "c"})
        assert (answer.status, answer.headers["retry-after"]) == (429, "1235")
        assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
        assert answer.headers["x-ratelimit-reset-tokens"] == "1235s"
        reload_with(q, keys=rows)
        assert (await q.chat("hi", mine)).status == 429, "kept over a reload"
        assert (await told(q, "GET", "/v1/models", mine)).status == 200
        monkeypatch.setattr(llmq, "today", lambda: ("2026-07-02", 86400.0))
        assert (await q.chat("hi", mine)).status == 200


async def test_stream_counts_for_the_budget_also_where_the_runner_tells_no_usage() -> None:
    """without `stream_options.include_usage` nothing was counted: a budget for nobody."""
    rows = keys(alice={"tokens_per_day": 1000})
    async with FakeBackend() as fake, running(fake.url, keys=rows) as q:
        mine, account = bearer(KEY["alice"]), q.gateway.accounts.named["alice"]
        told_usage = {"stream_options": {"include_usage": True}}
        assert (await q.chat("one two three", mine, stream=True, **told_usage)).status == 200
        await eventually(lambda: is_clear(q))
        assert account.tokens == 1 + 3
        assert (await q.chat("one two three", mine, stream=True)).status == 200
        await eventually(lambda: is_clear(q))
        assert account.tokens >= 4 + 3


async def test_stream_that_its_client_leaves_counts_for_the_budget() -> None:
    """who hangs up before the last event has had it all for nothing."""
    rows = keys(alice={"tokens_per_day": 1000})
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=rows) as q:
        mine, account = bearer(KEY["alice"]), q.gateway.accounts.named["alice"]
        raw = await begin(q, "hi", mine, stream=True)
        request = await fake.arrived()
        await request.start_stream()
        for word in ("one ", "two ", "three "):
            await request.piece(word)
        await raw.until(b"three")
        raw.close()
        await request.left()
        await eventually(lambda: is_clear(q))
        assert account.tokens >= 3


async def test_budget_under_concurrency_lets_nobody_start_once_it_is_used() -> None:
    rows = keys(alice={"tokens_per_day": 20, "max_concurrent": 2})
    async with FakeBackend() as fake, running(fake.url, keys=rows, queue__slots=4) as q:
        mine, account = bearer(KEY["alice"]), q.gateway.accounts.named["alice"]
        for _ in range(30):
            await q.chat("one two three", mine)
        assert account.tokens == 20
        assert len(fake.requests) == 5


async def test_rate_counts_what_is_passed_on_too() -> None:
    """With --allow-all-routes: else a path that llmq does not know has no rate at all."""
    rows = keys(alice={"rate": "1/h", "rights": ALL})
    async with FakeBackend() as fake:
        async with running(fake.url, keys=rows, server__allow_all_routes=True) as q:
            body, mine = {"model": "m", "prompt": "hi"}, bearer(KEY["alice"])
            path = "/v1/images/generations"
            first = await ask(q.port, "POST", path, json=body, headers=mine)
            assert first.status == 404  # the backend's
            assert (await ask(q.port, "POST", path, json=body, headers=mine)).status == 429


# ---- 6. Guessing -----------------------------------------------------------------------------


def accounts_of(*names: str) -> Accounts:
    found = Accounts()
    found.configure(build_settings({"keys": keys(**{name: {} for name in names})}))
    return found


def guess(accounts: Accounts, key: str, address: str, now: float) -> str:
    try:
        account = accounts.of_key(key, address, now)
    except llmq.LlmqError as error:
        return "limited" if told_right(error) else "odd"
    return account.name if account else "wrong"


def told_right(error: llmq.LlmqError) -> bool:
    return error.code == "rate_limited" and 1 <= (error.retry_after or 0) <= 60


def test_ten_wrong_keys_in_a_minute_and_no_more() -> None:
    accounts = accounts_of("alice", "bob")
    assert [guess(accounts, f"x{n}", "10.0.0.1", 100.0 + n) for n in range(10)] == ["wrong"] * 10
    assert guess(accounts, "x", "10.0.0.1", 110.0) == "limited"
    assert guess(accounts, KEY["alice"], "10.0.0.1", 110.0) == "limited", "nor a right one"
    assert guess(accounts, KEY["alice"], "10.0.0.2", 110.0) == "alice", "from elsewhere"
    assert guess(accounts, "x", "10.0.0.1", 159.9) == "limited"
    assert guess(accounts, KEY["alice"], "10.0.0.1", 160.0) == "alice"
    assert guess(accounts, "x", "10.0.0.1", 160.0) == "wrong"


def test_right_keys_do_not_make_guesses_cheaper() -> None:
    """Who has a key of their own cannot clear the count with it."""
    accounts = accounts_of("alice", "bob")
    seen = []
    for number in range(40):
        seen.append(guess(accounts, f"x{number}", "10.0.0.1", 100.0 + number / 10))
        guess(accounts, KEY["alice"], "10.0.0.1", 100.0 + number / 10)
    assert Counter(seen) == {"wrong": 10, "limited": 30}
    assert guess(accounts, KEY["bob"], "10.0.0.1", 105.0) == "limited", "it was never right there"


@pytest.mark.parametrize("seed", range(4))
def test_no_minute_has_more_than_ten_guesses(seed: int) -> None:
    """a minute that began with one guess let 9 through at its end and 10 right after."""
    rng, accounts, now = random.Random(seed), accounts_of("alice"), 100.0
    looked: list[float] = []
    for _ in range(5000):
        now += rng.choice((0.0, 0.05, 0.05, 3.0, 20.0))
        if guess(accounts, "wrong", "10.0.0.1", now) == "wrong":
            looked.append(now)
    worst = max(
        sum(first <= one < first + 60 for one in looked[at : at + 40])
        for at, first in enumerate(looked)
    )
    assert worst <= 10


def test_over_a_long_time_no_more_than_ten_a_minute_are_looked_at() -> None:
    accounts, looked = accounts_of("alice"), 0
    for tick in range(36_000):  # an hour, ten a second
        looked += guess(accounts, "wrong", "10.0.0.1", 100.0 + tick / 10) == "wrong"
    assert looked <= 600


def test_memory_of_addresses_that_guess_is_bounded() -> None:
    accounts = accounts_of("alice")
    for number in range(5000):
        address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        assert guess(accounts, "wrong", address, 100.0) == "wrong"
        assert guess(accounts, KEY["alice"], address, 100.0) == "alice"
    sizes = [len(one) for one in vars(accounts).values() if hasattr(one, "__len__")]
    assert max(sizes) == 1000, sizes


def test_address_that_goes_on_guessing_is_not_forgotten_for_others() -> None:
    """The oldest to guess is forgotten first, not the one that came first."""
    accounts, now = accounts_of("alice"), 100.0
    for number in range(3000):
        guess(accounts, "wrong", f"10.1.{number >> 8}.{number & 255}", now)
        if number % 300 == 0 and number < 2701:
            guess(accounts, "wrong", "10.9.9.9", now)
    assert guess(accounts, "wrong", "10.9.9.9", now) == "limited"


def test_key_that_was_right_there_before_is_not_locked_out_by_others() -> None:
    """Behind one address there may be many; who guesses learns nothing by it."""
    accounts = accounts_of("alice", "bob")
    assert guess(accounts, KEY["alice"], "10.0.0.1", 99.0) == "alice"
    for number in range(12):
        guess(accounts, f"x{number}", "10.0.0.1", 100.0)
    assert guess(accounts, KEY["alice"], "10.0.0.1", 101.0) == "alice"
    assert guess(accounts, KEY["bob"], "10.0.0.1", 101.0) == "limited"
    assert guess(accounts, "x", "10.0.0.1", 101.0) == "limited"
    accounts.configure(build_settings({"keys": keys(bob={})}))
    assert guess(accounts, KEY["alice"], "10.0.0.1", 102.0) == "limited", "it is right no more"


def test_guesses_are_counted_for_an_address_and_of_ipv6_for_its_network() -> None:
    accounts = accounts_of("alice")
    for number in range(1, 11):
        assert guess(accounts, "x", f"2001:db8:1:2::{number:x}", 100.0) == "wrong"
        assert guess(accounts, "x", f"10.0.1.{number}", 100.0) == "wrong"
        assert guess(accounts, "x", f"fe80::{number:x}%eth0", 100.0) == "wrong"
    assert guess(accounts, "x", "2001:db8:1:2:ffff::1", 100.0) == "limited"
    assert guess(accounts, "x", "2001:db8:1:3::1", 100.0) == "wrong"
    assert guess(accounts, "x", "10.0.1.1", 100.0) == "wrong"
    assert guess(accounts, "x", "fe80::ffff%eth1", 100.0) == "limited"


def test_keys_are_compared_as_digests_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare_digest(one, other)

    compare_digest = hmac.compare_digest
    monkeypatch.setattr(llmq.hmac, "compare_digest", compare)
    accounts = accounts_of("alice", "bob")
    assert guess(accounts, KEY["bob"], "10.0.0.1", 0.0) == "bob"
    assert guess(accounts, "wrong", "10.0.0.1", 0.0) == "wrong"
    assert compared
    assert all(type(one) is bytes and len(one) == 32 for pair in compared for one in pair)
    digest = bytes.fromhex(HASH["bob"])
    assert (digest, digest) in compared


async def test_guesses_over_sockets_are_429_until_the_minute_is_over() -> None:
    mine = {**bearer(KEY["alice"]), **came_from("10.0.0.1")}
    async with running(NOBODY, keys=keys(alice={}), server__trusted_proxies=PROXY) as q:
        path, bad = "/v1/models", came_from("10.0.0.1")
        for number in range(10):
            way = WAYS[number % 3]
            answer = await told(q, "GET", path, {**bad, **way(f"sk-{number}")})
            assert answer.status == 401, number
        for headers in (mine, {**bad, **bearer("sk-x")}):
            answer = await told(q, "GET", path, headers)
            assert (answer.status, answer.code) == (429, "rate_limited")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        for path_2 in ("/api/tags", "/v1/messages"):
            answer = await told(q, "POST", path_2, mine)
            assert answer.status == 429
            told_error(path_2, answer)
        assert (await told(q, "GET", path, bad)).status == 401, "without a key nothing is guessed"
        assert (await told(q, "GET", path, {**mine, **came_from("10.0.0.2")})).status == 200
        assert (await told(q, "GET", path, bearer(KEY["alice"]))).status == 200
        later = q.gateway.now() + 61
        q.gateway.now = lambda: later
        assert (await told(q, "GET", path, mine)).status == 200


@pytest.mark.parametrize("path", ["/health", "/"])
async def test_what_needs_no_key_is_there_also_for_who_guesses(path: str) -> None:
    """whoever watches /health through a proxy that sends a key saw llmq as gone."""
    async with running(NOBODY, keys=keys(alice={})) as q:
        for number in range(12):
            await told(q, "GET", "/v1/models", bearer(f"sk-{number}"))
        assert (await told(q, "GET", path, {})).status == 200
        assert (await told(q, "GET", path, bearer("sk-x"))).status == 200
        assert (await told(q, "OPTIONS", path, bearer("sk-x"))).status == 204


async def test_keys_of_foreign_pages_by_basic_are_not_even_looked_at() -> None:
    """Else any page could have a browser's address locked out, or use what the browser kept."""
    async with running(NOBODY, keys=keys(alice={"rights": ALL})) as q:
        for _ in range(12):
            assert (await told(q, "POST", CHAT, {**EVIL, **basic("sk-x")})).status == 401
        assert (await told(q, "POST", CHAT, {**EVIL, **basic(KEY["alice"])})).status == 401
        assert (await told(q, "GET", "/llmq", basic(KEY["alice"]))).status == 200


# ---- 7. Secrets by variable and file; the commands -------------------------------------------


@pytest.fixture
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file and no variable of this machine steers a command."""
    for name in list(os.environ):
        foreign = name in ("HOST", "PORT", "OLLAMA_URL", "OLLAMA_MODEL") or name.startswith("LLM_")
        if foreign or name.startswith("LLMQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(llmq, "CONFIG_PLACES", (str(tmp_path / "nowhere"),))


def checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tables: dict[str, Any]
) -> tuple[int, str]:
    """Exit code and words of `config check`."""
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps(tables))
    code = llmq.main(["config", "check", "--config", str(file)])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("value", [None, "", "set"])
def test_variable_that_is_unset_or_empty_ends_with_2_and_is_named(
    value: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ALICE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ALICE_KEY", value)
    places: list[dict[str, Any]] = [
        {"keys": {"alice": {"key": "${ALICE_KEY}"}}},
        {"keys": {"alice": {"key": "sk-${ALICE_KEY}-x"}}},
        {"backends": {"box": {"url": "http://box:1", "headers": {"X-Key": "a ${ALICE_KEY}"}}}},
        {"ports": {"11436": {"upstream": NOBODY, "headers": {"X": "${ALICE_KEY}"}}}},
        {"server": {"allowed_hosts": ["${ALICE_KEY}"]}},
        {"rules": [{"header": "X: ${ALICE_KEY}", "class": "low"}]},
    ]
    for tables in places:
        code, said = checked(tmp_path, capsys, tables)
        assert code == (0 if value else 2), (tables, said)
        if not value:
            assert "ALICE_KEY" in said
            assert said.startswith(f"llmq: {tmp_path}/llmq.json: ")


@pytest.mark.usefixtures("_clean")
def test_file_that_is_missing_empty_or_no_text_ends_with_2_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"empty": b"", "blank": b" \n\n", "binary": b"\xff\xfe\x00"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    for name in (*contents, "missing", "folder"):
        for key in ("key_file", "key_hash_file"):
            tables = {"keys": {"alice": {key: str(tmp_path / name)}}}
            code, said = checked(tmp_path, capsys, tables)
            assert code == 2, said
            assert str(tmp_path / name) in said
            assert key in said
            assert said.count("\n") == 1


@pytest.mark.usefixtures("_clean")
def test_what_is_said_twice_ends_with_2_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "k").write_text(KEY["bob"])
    rows: list[dict[str, Any]] = [
        {"key": KEY["alice"], "key_file": str(tmp_path / "k")},
        {"key_file": str(tmp_path / "k"), "key": KEY["alice"]},
        {"key": KEY["alice"], "key_hash": f"sha256:{HASH['alice']}"},
        {"key_file": str(tmp_path / "k"), "key_hash": f"sha256:{HASH['alice']}"},
        {},
    ]
    for row in rows:
        code, said = checked(tmp_path, capsys, {"keys": {"alice": row}})
        assert code == 2, row
        assert "alice" in said
        assert "key" in said
        assert secrets_in(said) == []


def test_one_key_for_two_names_is_refused() -> None:
    """the later name silently took the key away from the first."""
    rows = {"alice": {"key": KEY["alice"]}, "bob": {"key_hash": f"sha256:{HASH['alice']}"}}
    with pytest.raises(llmq.ConfigError) as refused:
        build_settings({"keys": rows})
    assert secrets_in(str(refused.value)) == []


@pytest.mark.usefixtures("_clean")
async def test_keys_by_hash_file_and_variable_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keys.key_hash`."""
    (tmp_path / "bob").write_text(f"  {KEY['bob']}\r\n\n")
    (tmp_path / "hash").write_text(f"sha256:{HASH['carol'].upper()}\n")
    monkeypatch.setenv("DAVE_KEY", KEY["dave"])
    rows = {
        "alice": {"key_hash": f"sha256:{HASH['alice']}"},
        "bob": {"key_file": str(tmp_path / "bob")},
        "carol": {"key_hash_file": str(tmp_path / "hash")},
        "dave": {"key": "${DAVE_KEY}"},
    }
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps({"keys": rows}))
    settings, _ = llmq.read_settings({"config": str(file)}, {})
    async with FakeBackend() as fake, running(fake.url) as q:
        q.service.read = lambda: llmq.replace(build_settings(q.values), keys=settings.keys)
        q.service.reload()
        for name in NAMES:
            answer = await q.chat("hi", bearer(KEY[name]))
            assert answer.status == 200, name
            assert q.gateway.journal.recent[-1].client == name
            assert (await told(q, "GET", "/v1/models", bearer(HASH[name]))).status == 401


@pytest.mark.usefixtures("_clean")
async def test_made_key_is_shown_once_and_its_lines_let_it_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = set()
    for name in ("alice", "alice", "a.b-c_d"):
        assert llmq.main(["key", name]) == 0
        said = capsys.readouterr().out
        (key,) = re.findall(r"llmq-[\w-]+", said)
        assert said.count(key) == 1
        assert len(key) >= 40
        made.add(key)
        digest = hashlib.sha256(key.encode()).hexdigest()
        assert f'key_hash = "sha256:{digest}"' in said
        assert f'[keys."{name}"]' in said
        if sys.version_info >= (3, 11):
            tables = __import__("tomllib").loads(said.partition("for the file:")[2])
            assert tables == {"keys": {name: {"key_hash": f"sha256:{digest}", "rights": ["infer"]}}}
    assert len(made) == 3
    rows = {"x": {"key_hash": f"sha256:{digest}"}}
    async with FakeBackend() as fake, running(fake.url, keys=rows) as q:
        assert (await q.chat("hi", bearer(key))).status == 200


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("name", ["", "a/b", "two words", "x" * 65, 'a"b', "a\nb", "é"])
def test_key_is_made_for_a_good_name_only(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmq.main(["key", name]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("llmq: ")


async def command(*arguments: str) -> int:
    """A command that asks a llmq in this very loop, in a thread of its own."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, llmq.main, list(arguments))


ASKING = [
    ("status",),
    ("status", "--json"),
    ("top", "--once"),
    ("mode", "open"),
    ("models",),
    ("models", "--json"),
]


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("words", ASKING, ids=" ".join)
async def test_commands_bring_the_key_of_a_file_or_a_variable(
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text(KEY["alice"] + "\n")
    wrong.write_text(WRONG)
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice={"rights": ALL})) as q:
        await eventually(lambda: q.gateway.fleet.lists("m"))

        async def run(*flags: str) -> int:
            return await command(words[0], "--url", q.base, *flags, *words[1:])

        assert await run() == 1
        assert "a key is needed" in capsys.readouterr().err
        assert await run("--key-file", str(wrong)) == 1
        assert "not known" in capsys.readouterr().err
        assert await run("--key-file", str(right)) == 0
        monkeypatch.setenv("LLMQ_KEY", KEY["alice"])
        assert await run() == 0
        assert await run("--key-file", str(wrong)) == 1, "the flag goes before the variable"
        monkeypatch.setenv("LLMQ_KEY", WRONG)
        assert await run("--key-file", str(right)) == 0
        said = capsys.readouterr()
        assert secrets_in(said.out, said.err) == []


async def test_command_that_runs_another_brings_the_key_and_keeps_it_to_itself(
    tmp_path: Path,
) -> None:
    (tmp_path / "key").write_text(KEY["alice"])
    loop = asyncio.get_running_loop()
    async with FakeBackend() as fake, running(fake.url, keys=keys(alice={"rights": ALL})) as q:
        await eventually(lambda: q.gateway.fleet.devices)

        async def run(*flags: str, env: dict[str, str]) -> Any:
            words = ("run", "--url", q.base, *flags, "--", "echo", "done")
            return await loop.run_in_executor(None, lambda: run_llmq(*words, env=env))

        for flags, env, code in (
            ((), {}, 1),
            ((), {"LLMQ_KEY": KEY["alice"]}, 0),
            (("--key-file", str(tmp_path / "key")), {"LLMQ_KEY": WRONG}, 0),
        ):
            ended = await run(*flags, env=env)
            assert ended.returncode == code, ended
            assert ended.stdout == ("done\n" if code == 0 else "")
            assert secrets_in(ended.stdout, ended.stderr) == []


@pytest.mark.usefixtures("_clean")
def test_key_file_that_cannot_be_read_ends_with_2_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("missing", "empty"):
        assert llmq.main(["status", "--url", NOBODY, "--key-file", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert "--key-file" in said
        assert str(tmp_path / name) in said


@pytest.mark.usefixtures("_clean")
@pytest.mark.parametrize("key", [KEY["alice"] + "\nX-Evil: 1", "é" + KEY["alice"]])
def test_odd_key_of_a_file_ends_in_plain_words(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """http.client's ValueError or UnicodeEncodeError, with the key in it, came through."""
    (tmp_path / "odd").write_text(key, encoding="utf-8")
    assert llmq.main(["status", "--url", NOBODY, "--key-file", str(tmp_path / "odd")]) in (1, 2)
    said = capsys.readouterr()
    assert secrets_in(said.out, said.err) == []
    assert said.err.startswith("llmq: ")


def test_no_flag_of_any_command_takes_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    for name in llmq.COMMANDS:
        with pytest.raises(SystemExit):
            llmq.main([name, "--help"])
        flags = set(re.findall(r"--[\w-]*key[\w-]*", capsys.readouterr().out))
        assert flags <= {"--key-file", "--tls-key", "--require-key"}, name


# ---- 8. Public binds, and the first key ------------------------------------------------------


class Bound(Exception):
    """In place of listening."""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
async def test_public_bind_needs_a_key_or_the_word(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def listen(_: Any, at: str, _port: int) -> int:
        raise Bound(at)

    monkeypatch.setattr(llmq.HttpServer, "listen", listen)

    async def start(**more: Any) -> None:
        values = {"server.host": host, "server.port": 0, "server.state": "", **more}
        service = llmq.Service(build_settings({**values, "backends": [NOBODY]}))
        try:
            await service.start()
        finally:
            service.gateway.monitor.close()

    with pytest.raises(llmq.ConfigError, match="llmq key NAME"):
        await start()
    with pytest.raises(llmq.ConfigError, match="llmq key NAME"):
        await start(ports={"11436": {}})
    with pytest.raises(Bound, match=re.escape(host)):
        await start(keys=keys(alice={}))
    with pytest.raises(Bound, match=re.escape(host)):
        await start(**{"server.allow_anonymous_lan": True})


async def test_reload_that_brings_the_first_key_closes_the_door_at_once() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        raw = await begin(q, "before", stream=True)
        request = await fake.arrived()
        waits = await begin(q, "before too")
        await held(q)
        kept = await Raw.open(q.port)
        await kept.send(http("GET", "/llmq/status"))
        assert (await kept.response()).status == 200
        reload_with(q, keys=keys(alice={"rights": ALL}))
        await kept.send(http("GET", "/llmq/status"))
        assert (await kept.response()).status == 401
        assert (await q.chat("after")).status == 401
        assert (await told(q, "POST", "/llmq/reload", {})).status == 401
        assert (await told(q, "GET", "/llmq/status", bearer(KEY["alice"]))).status == 200
        await request.answer("one two")
        assert (await raw.response()).content == "one two", "what runs ends in peace"
        await (await fake.arrived()).answer("done")
        assert (await waits.response()).status == 200


async def test_reload_that_takes_the_last_key_does_not_open_a_public_llmq() -> None:
    """it refused to start so, but a reload made it so."""
    async with running(NOBODY, keys=keys(alice={})) as q:
        q.service.is_public = True  # as if it were bound to 0.0.0.0
        reload_with(q, keys={})
        assert (await told(q, "GET", "/v1/models", {})).status == 401
        assert q.gateway.config_error
        reload_with(q, **{"keys": {}, "server.allow_anonymous_lan": True})
        assert (await told(q, "GET", "/v1/models", {})).status == 200


async def test_reload_that_takes_the_last_key_opens_a_llmq_of_this_box() -> None:
    async with running(NOBODY, keys=keys(alice={})) as q:
        reload_with(q, keys={})
        assert (await told(q, "GET", "/v1/models", {})).status == 200


async def test_reload_with_a_mistake_changes_no_key() -> None:
    async with running(NOBODY, keys=keys(alice={})) as q:
        for rows in ({"bob": {}}, {"bob": {"key": KEY["bob"], "rights": ["x"]}}):
            reload_with(q, keys=rows)
            assert q.gateway.config_error
            assert (await told(q, "GET", "/v1/models", bearer(KEY["alice"]))).status == 200
            assert (await told(q, "GET", "/v1/models", bearer(KEY["bob"]))).status == 401
            assert (await told(q, "GET", "/v1/models", {})).status == 401
            reload_with(q, keys=q.values["keys"])


async def test_require_key_follows_a_reload() -> None:
    async with running(NOBODY, keys=keys(alice={})) as q:
        assert (await told(q, "GET", "/llmq/status", {})).status == 401
        reload_with(q, **{"server.require_key": "remote"})
        assert (await told(q, "GET", "/llmq/status", {})).status == 200
        reload_with(q, **{"server.require_key": "all"})
        assert (await told(q, "GET", "/llmq/status", {})).status == 401


# ---- 9. Own requests -------------------------------------------------------------------------


async def change(q: running, ident: str, headers: dict[str, str]) -> int:
    path, body = f"/llmq/requests/{ident}", {"priority": "high"}
    return (await ask(q.port, "POST", path, json=body, headers=headers)).status


async def drop(q: running, ident: str, headers: dict[str, str]) -> int:
    return (await ask(q.port, "DELETE", f"/llmq/requests/{ident}", headers=headers)).status


async def test_key_may_cancel_its_own_requests_and_nothing_else() -> None:
    rows = keys(alice={}, bob={}, carol={"rights": ["infer", "control"]}, dave={"rights": []})
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=rows) as q:
        alice, bob, boss = bearer(KEY["alice"]), bearer(KEY["bob"]), bearer(KEY["carol"])
        runs = await begin(q, "alice runs", {**alice, "X-User-ID": "x"})
        await fake.arrived()
        waits = await begin(q, "alice waits", {**alice, "X-User-ID": "y"})
        await held(q)
        bobs = await begin(q, "bob waits", bob)
        await held(q, 2)
        first, second = q.gateway.scheduler.waiting
        (third,) = q.gateway.scheduler.running
        for ident in (first, third):
            assert await drop(q, ident, bob) == 403
            assert await drop(q, ident, {}) == 401
            assert await drop(q, ident, bearer(KEY["dave"])) == 403
            assert await drop(q, ident, {**alice, **EVIL}) == 403
        assert await drop(q, second, alice) == 403
        for headers, status in ((alice, 403), (bob, 403), ({}, 401), (boss, 200)):
            assert await change(q, first, headers) == status
        path = "/llmq/requests?state=waiting&client=alice"
        assert (await ask(q.port, "DELETE", path, headers=alice)).status == 403
        assert len(q.gateway.calls) == 3
        assert await drop(q, first, {**alice, "X-User-ID": "z"}) == 200
        assert (await waits.response()).status == 499
        assert await drop(q, third, alice) == 200
        assert (await runs.response()).status == 499
        assert await drop(q, third, alice) == 404
        assert await drop(q, second, boss) == 200
        assert (await bobs.response()).status == 499


async def test_this_box_may_cancel_all_where_only_others_need_a_key() -> None:
    rows = keys(alice={})
    more = {"server__require_key": "remote", "server__trusted_proxies": PROXY}
    async with FakeBackend(auto=False) as fake, running(fake.url, keys=rows, **more) as q:
        raw = await begin(q, "of this box")
        await fake.arrived()
        (ident,) = q.gateway.calls
        assert await drop(q, ident, came_from("10.0.0.1")) == 401
        assert await drop(q, ident, {**came_from("10.0.0.1"), **bearer(KEY["alice"])}) == 403
        assert await drop(q, ident, bearer(KEY["alice"])) == 403, "a key that came is who asks"
        assert await drop(q, ident, {}) == 200
        assert (await raw.response()).status == 499


async def test_who_came_by_a_port_may_cancel_what_came_by_it() -> None:
    port = free_port()
    ports = {str(port): {"client": "tv"}}
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, keys=keys(alice={}), ports=ports) as q:
            own = asyncio.ensure_future(ask(port, "POST", CHAT, json=chat("tv")))
            await fake.arrived()
            other = await begin(q, "alice", bearer(KEY["alice"]))
            await held(q)
            (first,), (second,) = q.gateway.scheduler.running, q.gateway.scheduler.waiting
            for ident, status in ((second, 403), (first, 200)):
                answer = await ask(port, "DELETE", f"/llmq/requests/{ident}")
                assert answer.status == status
            assert (await own).status == 499
            await (await fake.arrived()).answer("done")
            assert (await other.response()).status == 200
