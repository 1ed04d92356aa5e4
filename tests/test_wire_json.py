"""Bodies and header fields over sockets: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_runner import CHAT as OPENAI_CHAT
from tests.fake_runner import DIALECTS, NATIVE_CHAT, Dialect, Runner
from tests.fake_runner import MESSAGES as ANTHROPIC_MESSAGES
from tests.fakes import Answer, FakeBackend, Process, Raw, ask, chat, http, need, running

CHAT = "/v1/chat/completions"
MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'
JSON = {"Content-Type": "application/json"}
DUPLICATES = [
    b'{"model":"m","model":"m",' + MESSAGES + b"}",
    b'{"model":"m",' + MESSAGES + b',"model":"other"}',
    b'{"model":"m",' + MESSAGES + b"," + MESSAGES + b"}",
    b'{"model":"m",' + MESSAGES + b',"\\u006dodel":"other"}',  # the same key once decoded
    b'{"model":"m",' + MESSAGES + b',"priority":"low","priorit\\u0079":"high"}',
    b'{"model":"m",' + MESSAGES + b',"x":1,"y":2,"x":1}',  # a key that llmq does not read
    b'{"model":"m",' + MESSAGES + b',"":1,"":2}',
]


def nested(levels: int, pair: bytes = b"[]", top: bytes = b"1") -> bytes:
    """A chat request that is `levels` deep, its own braces included."""
    opening, closing = (b'{"a":', b"}") if pair == b"{}" else (b"[", b"]")
    value = opening * (levels - 1) + top + closing * (levels - 1)
    return b'{"model":"m",' + MESSAGES + b',"x":' + value + b"}"


def assert_error(answer: Answer, status: int = 400) -> dict[str, Any]:
    """The shape of an OpenAI error, whatever it is about."""
    assert answer.status == status, answer
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["param"], (str, type(None)))
    assert isinstance(error["code"], (str, type(None)))
    return error


REFUSED = {f"duplicate-{i}": body for i, body in enumerate(DUPLICATES)} | {
    "arrays-101": nested(101),
    "objects-101": nested(101, b"{}"),
    "arrays-100000": nested(100_000),
    "unclosed": b"[" * 100_000,
    "objects-unclosed": b'{"a":' * 50_000,
    "array-on-top": b"[]",
    "empty": b"",
    "two-values": b"{}{}",
}


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_body_is_400_and_the_connection_goes_on(name: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(http("POST", CHAT, JSON, REFUSED[name]))
        assert_error(await raw.response())
        await raw.send(http("POST", CHAT, JSON, json.dumps(chat("good")).encode()))
        assert (await raw.response()).content == "good"
        assert [request.text for request in fake.requests] == ["good"]


TAKEN = {
    "arrays-100": nested(100),
    "objects-100": nested(100, b"{}"),
    "brackets-in-a-string": nested(1, top=b'"' + b"[{" * 500 + b'"'),
    "quotes-in-a-string": nested(1, top=b'"\\"' + b"[" * 500 + b'\\\\"'),
    "wide": nested(2, top=b"[]," * 5000 + b"{}"),
    "duplicate-below-the-top": nested(1, top=b'{"a":1,"a":2}'),
    "null-fields": b'{"model":"m",' + MESSAGES + b',"priority":null,"stream":null,"numCtx":null}',
}


@pytest.mark.parametrize("name", TAKEN)
async def test_unusual_but_valid_body_is_taken(name: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        answer = await ask(q.port, "POST", CHAT, body=TAKEN[name], headers=JSON)
        assert (answer.status, answer.content) == (200, "hi")
        if b'"priority"' not in TAKEN[name]:
            assert fake.requests[0].body == TAKEN[name], "passed byte for byte"


@pytest.mark.parametrize("value", [5, 0, 1, -1, 1.0, "urgent", "High!", "", {}, [], ["high"], "5"])
async def test_bad_priority_is_400_and_says_what_it_may_be(value: object) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        error = assert_error(await q.chat("x", priority=value))
        assert error["param"] == "priority"
        for word in ("high", "normal", "low"):
            assert word in error["message"]
        assert not fake.requests


@pytest.mark.parametrize(
    ("fields", "body", "expected"),
    [
        ({}, {}, "normal"),
        ({}, {"priority": True}, "high"),
        ({}, {"priority": "high"}, "high"),
        ({}, {"priority": "normal"}, "normal"),
        ({}, {"priority": "low"}, "low"),
        ({}, {"priority": None}, "normal"),
        ({"X-Queue-Priority": "low"}, {}, "low"),
        ({"X-Queue-Priority": "low"}, {"priority": None}, "low"),
        ({"X-Queue-Priority": "low"}, {"priority": "high"}, "high"),
        ({}, {"service_tier": "priority"}, "high"),
        ({}, {"service_tier": "flex"}, "low"),
        ({}, {"service_tier": "auto"}, "normal"),
        ({}, {"service_tier": 7}, "normal"),
        ({"X-Queue-Priority": "normal"}, {"service_tier": "priority"}, "normal"),
        ({}, {"priority": "low", "service_tier": "priority"}, "low"),
    ],
)
async def test_class_comes_from_body_then_header_then_service_tier(
    fields: dict[str, str], body: dict[str, Any], expected: str
) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        raw = await Raw.open(q.port)
        await raw.send(http("POST", CHAT, fields, json.dumps(chat("x", **body)).encode()))
        request = await fake.arrived()
        assert "priority" not in request.json
        assert request.json.get("service_tier") == body.get("service_tier")
        assert [row["class"] for row in (await q.status())["requests"]] == [expected]
        await request.answer("done")
        assert (await raw.response()).content == "done"


KEPT = ["a", "A-z_0.9", "x" * 128, "0a1b2c3d-0000-4000-8000-0123456789ab", "..", "-"]
REPLACED = ["", "x" * 129, "a b", "a/b", "a,b", 'a"b', "<b>", "a;b", "é", "a\tb", "a:b", "a=b"]


@pytest.mark.parametrize("name", KEPT + REPLACED)
async def test_request_id_is_kept_if_plain_and_made_up_if_not(name: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for method, path, body in (("POST", CHAT, chat("x")), ("GET", "/nowhere", None)):
            answer = await ask(q.port, method, path, json=body, headers={"X-Request-Id": name})
            given = answer.headers["x-request-id"]
            assert (given == name) == (name in KEPT)
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given)
            assert answer.headers["request-id"] == given


async def test_llmqs_own_id_is_unique_and_takes_control_where_request_ids_repeat() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        same = {"X-Request-Id": "same"}
        answers = [await q.chat("x", headers=same) for _ in range(5)]
        assert len({answer.headers["x-llmq-id"] for answer in answers}) == 5
        recent = [row["id"] for row in (await q.status())["recent"]]
        assert set(recent) == {answer.headers["x-llmq-id"] for answer in answers}


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_carries_ours_and_only_the_listed_fields_of_the_backend(stream: bool) -> None:
    relayed = [
        ("Content-Type", "application/json; charset=utf-8"),
        ("OpenAI-Processing-Ms", "12"),
        ("X-RateLimit-Limit-Requests", "100"),
        ("Retry-After", "7"),
    ]
    dropped = [("Set-Cookie", "a=b"), ("Server", "secret"), ("X-Foo", "1"), ("Location", "/x")]
    dropped += [("Access-Control-Allow-Origin", "https://a.b"), ("X-LLMQ-Id", "forged")]
    async with FakeBackend(auto=False) as fake, running(f"one={fake.url}") as q:
        raw = await Raw.open(q.port)
        await raw.send(http("POST", CHAT, JSON, json.dumps(chat("x", stream=stream)).encode()))
        await (await fake.arrived()).status(200, b'{"ok":true}', relayed + dropped)
        answer = await raw.response()
        assert (answer.status, answer.body, answer.clean) == (200, b'{"ok":true}', True)
        for name, value in relayed:
            assert answer.headers[name.lower()] == value
        assert not {"set-cookie", "x-foo", "location"} & answer.headers.keys()
        assert "secret" not in answer.headers.get("server", "")
        assert answer.headers["x-llmq-id"] != "forged"
        assert answer.headers.get("access-control-allow-origin") in (None, "*")
        assert answer.headers["x-llmq-backend"] == "one"
        assert int(answer.headers["x-llmq-wait-ms"]) >= 0
        assert answer.headers["x-request-id"] == answer.headers["request-id"]
        assert answer.headers["date"].endswith(" GMT")


async def test_every_refusal_is_an_error_object() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for method, path, body, status, code in (
            ("GET", "/nowhere", None, 404, "not_found"),
            ("GET", "//health", None, 404, "not_found"),
            ("GET", "/v1/../health", None, 404, "not_found"),
            ("GET", "/%2e%2e/health", None, 404, "not_found"),
            ("PUT", CHAT, {}, 405, "method_not_allowed"),
            ("POST", CHAT, chat("x", model="nobody"), 404, "model_not_found"),
            ("POST", CHAT, {"model": "m"}, 400, "bad_request"),
            ("POST", "/llmq/mode", {"mode": "fast"}, 400, "bad_request"),
            ("DELETE", "/llmq/requests/none", None, 404, "not_found"),
        ):
            error = assert_error(await ask(q.port, method, path, json=body), status)
            assert error["code"] == code, (method, path, error)
            assert "Traceback" not in error["message"]


# ---- Names of members: what a web page can send without being asked --------------------------

MIB = 1 << 20
NAME, MEMBERS = 1024, 1000  # the longest name, in bytes; the most members at the top
FAMILIES = (OPENAI_CHAT, ANTHROPIC_MESSAGES, NATIVE_CHAT)
HUGE = {  # the beginning of a body whose name of a member has about this many bytes
    "letters": lambda size: b'{"' + b"k" * size + b'":1,',
    "escapes": lambda size: b'{"' + b"\\u0061" * (size // 6) + b'":1,',
    "quotes": lambda size: b'{"' + b'\\"' * (size // 2) + b'":1,',
    "no end": lambda size: b'{"' + b"k" * size,
    "behind a space": lambda size: b'{"x" :1,\n "' + b"k" * size + b'" :1,',
}
each_family = pytest.mark.parametrize("dialect", FAMILIES, ids=repr)


def peak(pid: int) -> int:
    """The most bytes of memory that a process has ever had in use."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found
    return int(found.group(1)) * 1024


def with_members(dialect: Dialect, beginning: bytes) -> bytes:
    """A request of this dialect, these members before its own."""
    return beginning + json.dumps(dialect.body("hi")).encode()[1:]


async def post_body(port: int, dialect: Dialect, body: bytes) -> Answer:
    return await ask(port, "POST", dialect.path, body=body, headers=JSON)


@pytest.mark.deadline(60)
@pytest.mark.parametrize(("size", "room"), [(MIB, 32 * MIB), (30 * MIB, 100 * MIB)], ids=str)
@pytest.mark.parametrize("kind", HUGE)
async def test_endless_name_of_a_member_is_refused_in_little_memory(
    kind: str, size: int, room: int
) -> None:
    need(sys.platform == "linux", "memory is read from /proc")
    async with Runner() as fake, Process("--port", "0", "--backend", fake.url) as p:
        assert (await OPENAI_CHAT.ask(p.port, "good")).status == 200
        resource.prlimit(p.pid, resource.RLIMIT_AS, (2048 * MIB, 2048 * MIB))  # harms no other test
        before = peak(p.pid)
        for dialect in FAMILIES:
            body = HUGE[kind](size)
            body = body if kind == "no end" else with_members(dialect, body)
            answer = await post_body(p.port, dialect, body)
            assert (answer.status, len(answer.body) < 4096) == (400, True), answer
            assert dialect.whole_error(answer)
            assert peak(p.pid) - before < size + room, dialect
        assert OPENAI_CHAT.text(await OPENAI_CHAT.ask(p.port, "good")) == "good"
        assert {request.text for request in fake.requests} == {"good"}


async def test_endless_name_inside_the_options_takes_little_memory_too() -> None:
    need(sys.platform == "linux", "memory is read from /proc")
    async with Runner() as fake, Process("--port", "0", "--backend", fake.url) as p:
        assert (await NATIVE_CHAT.ask(p.port, "good", numCtx=8192)).status == 200
        before = peak(p.pid)
        options = {"k" * MIB: 1, "num_ctx": 8192}
        body = json.dumps(NATIVE_CHAT.body("hi", options=options)).encode()
        assert (await post_body(p.port, NATIVE_CHAT, body)).status in (200, 400)
        assert peak(p.pid) - before < 32 * MIB


@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_name_of_a_member_has_a_kibibyte_at_most(dialect: Dialect) -> None:
    async with Runner(kind="vllm") as fake, running(fake.url) as q:
        for name, refused in (
            ("k" * NAME, False),
            ("k" * (NAME + 1), True),
            ("\\u0061" * (NAME // 6), False),  # within it raw, and more so decoded
            ("\\u0061" * (NAME + 1), True),  # beyond it decoded, and more so raw
            ("ü" * (NAME + 1), True),
        ):
            body = with_members(dialect, f'{{"{name}":1,'.encode())
            answer = await post_body(q.port, dialect, body)
            assert (answer.status == 400) == refused, (name[:9], len(name), answer)
            if refused:
                assert dialect.whole_error(answer)


@each_family
async def test_body_has_a_thousand_members_at_most(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        own = len(dialect.body("hi"))
        for number, status in ((MEMBERS, 200), (MEMBERS + 1, 400)):
            more = b"".join(b'"%d":0,' % n for n in range(number - own))
            answer = await post_body(q.port, dialect, with_members(dialect, b"{" + more))
            assert answer.status == status, (number, answer)
        assert dialect.whole_error(answer)
        assert len(fake.requests) == 1


async def test_name_that_is_written_with_escapes_means_what_it_decodes_to() -> None:
    async with FakeBackend(["m", "other"]) as fake, running(fake.url) as q:
        body = b'{"m\\u006fdel":"other",' + MESSAGES + b',"prior\\u0069ty":"low"}'
        answer = await ask(q.port, "POST", CHAT, body=body, headers=JSON)
        assert (answer.status, answer.json()["model"]) == (200, "other")
        assert fake.requests[0].json.keys() == {"model", "messages"}
        assert (await q.status())["recent"][0]["class"] == "low"
