"""Model management: straight through to the right Ollama, no slot, no limit, for this box alone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_runner import CHAT, MANAGEMENT, NATIVE_CHAT, Runner, line, read_some, speak
from tests.fakes import (
    ROOT,
    Answer,
    FakeRequest,
    Process,
    Raw,
    ask,
    black_hole,
    chunk,
    eventually,
    http,
    need,
    render_head,
    require_command,
    running,
)

MIB = 1 << 20
JSON = {"Content-Type": "application/json"}
DIGEST = "sha256:" + "5" * 64
BLOB = f"/api/blobs/{DIGEST}"
NDJSON = [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")]
ORDERS: dict[str, tuple[str, str, Any]] = {
    "pull": ("POST", "/api/pull", {"model": "new"}),
    "push": ("POST", "/api/push", {"model": "m"}),
    "create": ("POST", "/api/create", {"model": "made", "from": "m"}),
    "copy": ("POST", "/api/copy", {"source": "m", "destination": "n"}),
    "delete": ("DELETE", "/api/delete", {"model": "m"}),
}
BLOBS: dict[str, tuple[str, str, Any]] = {
    "blob asked for": ("HEAD", BLOB, None),
    "blob": ("POST", BLOB, None),
}
each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
ALL = {**ORDERS, **BLOBS}
OTHERS: dict[str, tuple[str, str, Any]] = {  # what only an Ollama knows of itself
    "me": ("POST", "/api/me", None),
    "signout": ("POST", "/api/signout", None),
    "status": ("GET", "/api/status", None),
    "blob read": ("GET", BLOB, None),
}
each_route = pytest.mark.parametrize("order", ALL.values(), ids=ALL.keys())
GROWTH = 48 * MIB  # far below the blobs here, far above what passing one on takes
FOREIGN: list[dict[str, str]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
]


async def up(q: running) -> None:
    """Return once every backend is up; the test's deadline ends it otherwise."""
    while any(one["state"] != "up" for one in (await q.status())["backends"]):
        pass


async def begin(
    port: int, order: tuple[str, str, Any], headers: dict[str, str] | None = None
) -> Raw:
    """A client that has sent this order and waits."""
    method, path, body = order
    raw = await Raw.open(port)
    data = b"a blob" if body is None and method == "POST" else None
    data = data if body is None else json.dumps(body).encode()
    await raw.send(http(method, path, {**JSON, **(headers or {})}, data))
    return raw


async def start_progress(request: FakeRequest) -> None:
    """The head of a stream of progress, as Ollama sends it."""
    await request.send(render_head(200, NDJSON))


async def carry_out(request: FakeRequest, **facts: Any) -> None:
    await start_progress(request)
    request.finished()
    await request.send(chunk(line(status="success", **facts)) + b"0\r\n\r\n")


async def more(raw: Raw, expected: bytes) -> None:
    """The next chunks of the answer, which say just this."""
    answer = raw.answer
    assert answer is not None
    before = len(answer.body)
    while len(answer.body) < before + len(expected):
        size = int((await raw.until(b"\r\n")).split(b";")[0], 16)
        answer.body += (await raw.exactly(size + 2))[:-2]
    assert answer.body[before:] == expected


async def ordered(port: int, fake: Runner, order: Any, **headers: str) -> Answer:
    """Order it, let this backend carry it out; the answer that the client got."""
    raw = await begin(port, order, {name.replace("_", "-"): v for name, v in headers.items()})
    if "/blobs/" not in order[1]:
        await carry_out(await fake.management())
    return await raw.response()


# ---- Straight through ------------------------------------------------------------------------


@each_order
async def test_order_reaches_ollama_as_it_came_and_its_answer_the_client(order: Any) -> None:
    method, path, body = order
    raw_body = b" " + json.dumps(body).encode() + b"\n"
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        await raw.send(http(method, path + "?a=1", JSON, raw_body))
        request = await fake.management()
        assert (request.method, request.path) == (method, path + "?a=1")
        assert request.body == raw_body
        assert request.headers["content-type"] == "application/json"
        assert request.headers["host"] == fake.url.partition("//")[2]
        await carry_out(request, total=3)
        answer = await raw.response()
        assert (answer.status, answer.clean) == (200, True)
        assert answer.body == line(status="success", total=3)
        assert answer.headers["content-type"].startswith("application/x-ndjson")


async def test_each_line_of_progress_arrives_when_it_is_sent() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, ORDERS["pull"])
        request = await fake.management()
        await start_progress(request)
        for number in range(5):
            piece = line(status="pulling", completed=number)
            await request.send(chunk(piece))
            raw.answer = raw.answer or await raw.head()
            await more(raw, piece)
        await request.send(b"0\r\n\r\n")
        answer = await raw.response()
        assert answer.clean
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.body == b"".join(line(status="pulling", completed=n) for n in range(5))


@pytest.mark.parametrize("status", [200, 400, 404, 500])
@each_order
async def test_short_answers_pass_as_they_are(order: Any, status: int) -> None:
    body = b'{"error":"model \'x\' not found"}' if status != 200 else b""
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, order)
        await (await fake.management()).status(status, body)
        answer = await raw.response()
        assert (answer.status, answer.body, answer.clean) == (status, body, True)


@each_route
async def test_it_takes_no_slot_and_waits_for_none(order: Any) -> None:
    async with Runner(auto=False) as fake, running(fake.url) as q:
        await up(q)
        runs = asyncio.ensure_future(CHAT.ask(q.port, "runs"))
        request = await fake.arrived()
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        waits = await CHAT.begin(q.port, "waits")
        while (await q.status())["queue"]["waiting"] != 1:
            pass
        answer = await ordered(q.port, fake, order)
        assert answer.status in (200, 201, 404)
        assert (await q.status())["queue"]["running"] == 1
        await speak(request)
        assert CHAT.text(await runs) == "runs"
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "open"})
        await speak(await fake.arrived())
        assert CHAT.text(await waits.response()) == "waits"


async def test_inference_goes_on_while_a_model_is_pulled() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, ORDERS["pull"])
        request = await fake.management()
        await start_progress(request)
        for _ in range(3):
            assert NATIVE_CHAT.text(await NATIVE_CHAT.ask(q.port, "hi")) == "hi"
        await request.send(chunk(line(status="success")) + b"0\r\n\r\n")
        assert (await raw.response()).body == line(status="success")


async def test_pull_is_not_ended_by_the_times_of_inference() -> None:
    """A pull may take hours; what ends here is a chat beside it, after the same silence."""
    limits = {"upstream__first_byte_timeout": 0.5, "upstream__idle_timeout": 0.5}
    async with Runner(auto=False) as fake, running(fake.url, **limits) as q:
        await up(q)
        raw = await begin(q.port, ORDERS["pull"])
        request = await fake.management()
        await start_progress(request)
        await request.send(chunk(line(status="pulling")))
        await raw.head()
        for _ in range(2):
            chat = await CHAT.ask(q.port, "hi")
            assert chat.status == 504
        await request.send(chunk(line(status="success")) + b"0\r\n\r\n")
        answer = await raw.response()
        assert answer.clean
        assert answer.body == line(status="pulling") + line(status="success")


async def test_model_that_was_pulled_can_be_asked_at_once() -> None:
    async with Runner() as fake, running(fake.url, upstream__probe_interval=60) as q:
        await up(q)
        raw = await begin(q.port, ORDERS["pull"])
        request = await fake.management()
        fake.models.append("new")
        await carry_out(request)
        assert (await raw.response()).clean
        answer = await NATIVE_CHAT.ask(q.port, "hi", model="new")
        assert NATIVE_CHAT.text(answer) == "hi"


@each_order
async def test_order_is_followed_by_a_look_at_once(order: Any) -> None:
    async with Runner() as fake, running(fake.url, upstream__probe_interval=60) as q:
        await up(q)
        before = fake.probe_paths.count("/api/tags")
        raw = await begin(q.port, order)
        request = await fake.management()
        await q.status()
        assert fake.probe_paths.count("/api/tags") == before, "not before it has ended"
        fake.models.append("late")
        await request.status(200, b"")
        assert (await raw.response()).clean
        await eventually(lambda: fake.probe_paths.count("/api/tags") > before)
        await eventually(lambda: "late" in next(iter(q.gateway.fleet.backends.values())).models)


async def test_order_whose_client_left_is_followed_by_a_look_too() -> None:
    async with Runner() as fake, running(fake.url, upstream__probe_interval=60) as q:
        await up(q)
        before = fake.probe_paths.count("/api/tags")
        raw = await begin(q.port, ORDERS["pull"])
        request = await fake.management()
        raw.close()
        await request.left()
        await eventually(lambda: fake.probe_paths.count("/api/tags") > before)


# ---- To whom ---------------------------------------------------------------------------------


def boxes(**fakes: Runner) -> dict[str, Any]:
    return {name: {"url": fake.url, "kind": fake.kind} for name, fake in fakes.items()}


def managed(*fakes: Runner) -> list[int]:
    return [len(fake.managed) for fake in fakes]


@each_route
async def test_other_runners_are_passed_over_for_the_first_ollama(order: Any) -> None:
    async with Runner(kind="vllm") as vllm, Runner() as one, Runner() as two:
        async with running(backends=boxes(v=vllm, one=one, two=two)) as q:
            await up(q)
            answer = await ordered(q.port, one, order)
            assert managed(vllm, one, two) == [0, 1, 0]
            assert answer.status in (200, 201, 404)
            assert answer.headers["x-llmq-backend"] == "one"


@pytest.mark.parametrize("name", ["push", "copy", "delete"])
async def test_what_there_is_goes_to_the_first_that_has_the_model(name: str) -> None:
    method, path, body = ORDERS[name]
    field = "source" if name == "copy" else "model"
    async with Runner(models=["a"]) as one, Runner(models=["m:latest", "b"]) as two:
        async with Runner(models=["m"]) as three:
            async with running(backends=boxes(one=one, two=two, three=three)) as q:
                await up(q)
                for model in ("m", "M:latest", "b"):
                    await ordered(q.port, two, (method, path, {**body, field: model}))
                if name != "copy":
                    await ordered(q.port, two, (method, path, {"name": "b"}))
                assert managed(one, three) == [0, 0]


@pytest.mark.parametrize("name", ["push", "copy", "delete"])
async def test_what_nobody_has_is_404_in_ollamas_words(name: str) -> None:
    method, path, body = ORDERS[name]
    field = "source" if name == "copy" else "model"
    async with Runner(models=["a"]) as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, (method, path, {**body, field: "nobody"}))
        answer = await raw.response()
        assert answer.status == 404
        assert "nobody" in NATIVE_CHAT.whole_error(answer)
        assert fake.managed == []


@each_route
async def test_header_names_the_backend(order: Any) -> None:
    async with Runner() as one, Runner() as two:
        async with running(backends=boxes(one=one, two=two)) as q:
            await up(q)
            answer = await ordered(q.port, two, order, X_LLMQ_Backend="two")
            assert answer.headers["x-llmq-backend"] == "two"
            assert managed(one, two) == [0, 1]


async def refusal(raw: Raw, *fakes: Runner) -> Answer:
    """The answer of llmq itself, none of the backends having been asked."""
    answer = asyncio.ensure_future(raw.response())
    asked = [asyncio.ensure_future(fake.management()) for fake in fakes]
    await asyncio.wait({answer, *asked}, return_when=asyncio.FIRST_COMPLETED)
    for task in asked:
        task.cancel()
    assert [len(fake.managed) for fake in fakes] == [0] * len(fakes)
    return await answer


@each_route
@pytest.mark.parametrize("name", ["nobody", "no name"])
async def test_header_that_names_nobody_is_an_error(order: Any, name: str) -> None:
    async with Runner() as one, running(backends=boxes(one=one)) as q:
        await up(q)
        answer = await refusal(await begin(q.port, order, {"X-LLMQ-Backend": name}), one)
        assert answer.status in (400, 404)
        assert order[0] == "HEAD" or NATIVE_CHAT.whole_error(answer)


@each_route
async def test_header_that_names_another_runner_is_501(order: Any) -> None:
    """Ollama alone manages models; to any other these would be strange requests."""
    async with Runner() as one, Runner(kind="vllm") as two:
        async with running(backends=boxes(one=one, v=two)) as q:
            await up(q)
            answer = await refusal(await begin(q.port, order, {"X-LLMQ-Backend": "v"}), one, two)
            assert answer.status == 501
            assert order[0] == "HEAD" or NATIVE_CHAT.whole_error(answer)


@each_route
async def test_without_an_ollama_it_is_501(order: Any) -> None:
    async with Runner(kind="vllm") as fake, running(backends=boxes(v=fake)) as q:
        await up(q)
        raw = await begin(q.port, order)
        answer = await raw.response()
        assert answer.status == 501
        assert order[0] == "HEAD" or NATIVE_CHAT.whole_error(answer)
        assert fake.managed == []


@each_route
async def test_ollama_that_is_down_is_told_at_once(order: Any) -> None:
    async with Runner() as fake, running(fake.url, upstream__probe_interval=0.1) as q:
        await up(q)
        await fake.stop_listening()
        fake.drop_connections()
        while (await q.status())["backends"][0]["state"] != "down":
            pass
        raw = await begin(q.port, order)
        answer = await raw.response()
        assert answer.status in (502, 503)
        assert order[0] == "HEAD" or NATIVE_CHAT.whole_error(answer)


@pytest.mark.parametrize("order", OTHERS.values(), ids=OTHERS.keys())
async def test_what_only_an_ollama_knows_comes_from_the_first(order: Any) -> None:
    method, path, _ = order
    async with Runner(kind="vllm") as vllm, Runner() as one, Runner() as two:
        one.probe_answers[path] = (200, {"read": path})
        async with running(backends=boxes(v=vllm, one=one, two=two)) as q:
            await up(q)
            raw = await Raw.open(q.port)
            await raw.send(http(method, path, JSON))
            if method == "POST":
                await (await one.management()).status(200, {"read": path})
            answer = await raw.response()
            assert (answer.status, answer.json()) == (200, {"read": path})
            assert answer.headers["x-llmq-backend"] == "one"


# ---- What is told of it ----------------------------------------------------------------------


@each_order
async def test_order_has_its_line_in_the_log_and_its_row(
    order: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llmq")
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        await ordered(q.port, fake, order, user_agent="ollama/0.30")
        await eventually(lambda: len(q.gateway.journal.recent) == 1)
        (record,) = (await q.status())["recent"]
        model = order[2].get("model") or order[2]["source"]
        told = (record["route"], record["model"], record["status"], record["outcome"])
        assert told == (order[1], model, 200, "done")
        assert (record["client"], record["backend"]) == ("app:ollama", fake.url[len("http://") :])
        await eventually(lambda: any(order[1] in text for text in map(str, caplog.messages)))
        figures = (await ask(q.port, "GET", "/metrics")).body.decode()
        assert "llmq_wait_seconds_count" not in figures, "it never waited"


async def test_order_that_fails_has_its_line_too() -> None:
    async with Runner(models=["a"]) as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, ORDERS["delete"])
        assert (await raw.response()).status == 404
        (record,) = (await q.status())["recent"]
        assert (record["status"], record["outcome"]) == (404, "model_not_found")
        assert "not found" in record["error"]


@pytest.mark.parametrize("name", ["push", "copy", "delete"])
async def test_model_that_came_just_now_is_looked_for_before_a_404(name: str) -> None:
    async with Runner(models=["a"]) as fake, running(fake.url, upstream__probe_interval=60) as q:
        await up(q)
        fake.models.append("m")
        answer = await ordered(q.port, fake, ORDERS[name])
        assert answer.status == 200


# ---- Blobs -----------------------------------------------------------------------------------


async def test_blob_is_asked_for_and_uploaded() -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        await raw.send(http("HEAD", BLOB))
        answer = await raw.response()
        assert (answer.status, answer.body, answer.clean) == (404, b"", True)
        data = bytes(range(256)) * 9
        await raw.send(http("POST", BLOB, {}, data))
        assert (await raw.response()).status == 201
        assert fake.uploads == [(len(data), hashlib.sha256(data).hexdigest())]
        await raw.send(http("HEAD", BLOB))
        answer = await raw.response()
        assert (answer.status, answer.clean) == (200, True)
        assert [request.path for request in fake.managed] == [BLOB] * 3


@pytest.mark.parametrize("size", [0, 1, 65536, 3 * MIB])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_blob_arrives_whole_however_it_is_sent(size: int, chunked: bool) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        if chunked:
            pieces = [data[at : at + 70000] for at in range(0, size, 70000)]
            await raw.send(http("POST", BLOB, {"Transfer-Encoding": "chunked"}))
            for piece in pieces:
                await raw.send(chunk(piece))
            await raw.send(b"0\r\n\r\n")
        else:
            await raw.send(http("POST", BLOB, {}, data))
        assert (await raw.response()).status == 201
        assert fake.uploads == [(size, hashlib.sha256(data).hexdigest())]
        await raw.send(http("GET", "/health"))
        assert (await raw.response()).body == b"ok"


async def test_blob_begins_to_arrive_before_it_is_complete() -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        await raw.send(http("POST", BLOB, {"Content-Length": "20"}) + b"0123456789")
        await eventually(lambda: fake.received == 10)
        await raw.send(b"0123456789")
        assert (await raw.response()).status == 201


async def test_client_that_asks_first_is_told_to_go_on() -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        await raw.send(http("POST", BLOB, {"Content-Length": "3", "Expect": "100-continue"}))
        assert (await raw.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await raw.send(b"abc")
        assert (await raw.response()).status == 201
        assert fake.uploads[0][0] == 3


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert found
    return int(found.group(1)) * 1024


@pytest.mark.deadline(90)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_blob_of_256_mib_takes_no_memory(chunked: bool) -> None:
    need(sys.platform == "linux", "memory is read from /proc")
    piece, number = bytes(MIB), 256
    async with Runner() as fake:
        async with Process("--port", "0", "--backend", fake.url) as p:
            while (await ask(p.port, "GET", "/api/tags")).json()["models"] == []:
                pass
            raw = await Raw.open(p.port)
            size = {"Content-Length": str(MIB * number)}
            before, most = resident(p.pid), 0
            await raw.send(
                http("POST", BLOB, {"Transfer-Encoding": "chunked"} if chunked else size)
            )
            for _ in range(number):
                await raw.send(chunk(piece) if chunked else piece)
                most = max(most, resident(p.pid))
            if chunked:
                await raw.send(b"0\r\n\r\n")
            assert (await raw.response()).status == 201
            digest = hashlib.sha256()
            for _ in range(number):
                digest.update(piece)
            assert fake.uploads == [(MIB * number, digest.hexdigest())]
            assert max(most, resident(p.pid)) - before < GROWTH
            assert await p.ended() == 0


@pytest.mark.deadline(30)
async def test_backend_that_reads_nothing_holds_the_client_back_until_it_counts_as_stuck() -> None:
    need(sys.platform == "linux", "memory is read from /proc")
    async with Runner() as fake:
        fake.hearing.clear()
        flags = ["--port", "0", "--backend", fake.url, "--stall-timeout", "4"]
        async with Process(*flags) as p:
            while (await ask(p.port, "GET", "/api/tags")).json()["models"] == []:
                pass
            raw = await Raw.open(p.port)
            before = resident(p.pid)
            await raw.send(http("POST", BLOB, {"Content-Length": str(1 << 40)}))
            sending = asyncio.ensure_future(pour(raw))
            await eventually(lambda: fake.managed)
            sent = -1
            while sent != pour.sent:  # it stands still between two answers of llmq
                sent = pour.sent
                for _ in range(50):
                    assert (await ask(p.port, "GET", "/health")).body == b"ok"
            assert sent < 256 * MIB, "nobody holds it back"
            assert resident(p.pid) - before < GROWTH
            answer = await raw.response()
            assert answer.status in (502, 504)
            assert NATIVE_CHAT.whole_error(answer)
            sending.cancel()
            await asyncio.wait({sending})
            fake.hearing.set()
            await asyncio.wait_for(fake.managed[0].left(), 5)
            assert fake.uploads == []
            assert (await ask(p.port, "GET", "/health")).body == b"ok"


async def pour(raw: Raw) -> None:
    """Send without end; `pour.sent` is how much went."""
    piece = bytes(65536)
    pour.sent = 0
    while True:
        await raw.send(piece)
        pour.sent += len(piece)


async def test_neither_the_body_limit_nor_the_uploads_deadlines_hold_for_blobs() -> None:
    limits = {"server__max_body": 1000, "server__upload_timeout": 0.3}
    async with Runner() as fake, running(fake.url, **limits) as q, await Raw.open(q.port) as raw:
        await up(q)
        await raw.send(http("POST", BLOB, {"Content-Length": str(2 * MIB)}) + bytes(MIB))
        other = await Raw.open(q.port)  # whose upload ends by the deadline, begun later
        await other.send(http("POST", "/api/chat", {"Content-Length": "500"}) + b"{")
        assert (await other.response()).status == 408
        await raw.send(bytes(MIB))
        assert (await raw.response()).status == 201
        assert fake.uploads[0][0] == 2 * MIB


async def test_answer_that_comes_before_the_blob_is_whole_reaches_the_client() -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        fake.refuses = (400, {"error": "bad digest"})
        await raw.send(http("POST", BLOB, {"Content-Length": str(8 * MIB)}) + bytes(MIB))
        answer = await raw.response()
        assert (answer.status, answer.json()) == (400, {"error": "bad digest"})
        assert (await ask(q.port, "GET", "/health")).body == b"ok"


# ---- Those who leave -------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [Raw.close, Raw.rst], ids=["closes", "resets"])
async def test_client_that_leaves_in_mid_upload_ends_it_at_the_backend(leave: Any) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await Raw.open(q.port)
        await raw.send(http("POST", BLOB, {"Content-Length": "1000"}) + b"some")
        await eventually(lambda: fake.received == 4)
        leave(raw)
        await asyncio.wait_for(fake.managed[0].left(), 1)
        assert fake.uploads == []


@pytest.mark.parametrize("begun", [False, True], ids=["before its answer", "in its middle"])
@pytest.mark.parametrize("leave", [Raw.close, Raw.rst, Raw.fin], ids=["closes", "resets", "halves"])
@each_order
async def test_client_that_leaves_ends_its_order_at_the_backend(
    order: Any, leave: Any, begun: bool
) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, order)
        request = await fake.management()
        if begun:
            await start_progress(request)
            await request.send(chunk(line(status="pulling")))
            await raw.head()
        leave(raw)
        await asyncio.wait_for(request.left(), 1)


LARGE = ("POST", "/api/create", {"model": "made", "from": "m", "template": "x" * (4 * MIB)})
AT_ONCE = {name: ORDERS[name] for name in ("pull", "push", "create", "copy")} | {"large": LARGE}
each_leave = pytest.mark.parametrize(
    "leave", [Raw.close, Raw.rst, Raw.fin], ids=["closes", "resets", "halves"]
)


async def nothing_runs_on(q: running, fake: Runner) -> None:
    """Whatever came before an order given now has not come, or is cut off at the backend."""
    raw = await begin(q.port, ORDERS["delete"])
    while (request := await fake.management()).method != "DELETE":
        await asyncio.wait_for(request.left(), 1)
    await carry_out(request)
    assert (await raw.response()).clean
    before = [one for one in fake.managed if one is not request]
    await eventually(lambda: all(one.connection.gone.is_set() for one in before), 1)


@each_leave
@pytest.mark.parametrize("order", AT_ONCE.values(), ids=AT_ONCE.keys())
async def test_client_that_hangs_up_as_soon_as_it_has_asked_starts_nothing_that_runs_on(
    order: Any, leave: Any
) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        leave(await begin(q.port, order))
        await nothing_runs_on(q, fake)


@pytest.mark.parametrize("name", ["pull", "create"])
async def test_client_that_hangs_up_while_its_backend_is_connected_to_starts_nothing(
    name: str,
) -> None:
    async with Runner() as fake, running(fake.url, upstream__probe_interval=3600) as q:
        await up(q)
        await fake.stop_listening()
        fake.drop_connections()
        with black_hole(fake.port):
            raw = await begin(q.port, ORDERS[name])
            await up(q)  # the order was read before this was
            stays = await begin(q.port, ORDERS["copy"])
            await up(q)
            raw.close()
            await up(q)
        await fake.listen_again()
        while (request := await fake.management()).path != "/api/copy":  # it connected later
            await asyncio.wait_for(request.left(), 1)
        await carry_out(request)
        assert (await stays.response()).clean
        before = [one for one in fake.managed if one is not request]
        await eventually(lambda: all(one.connection.gone.is_set() for one in before), 1)


@pytest.mark.parametrize("broken", [FakeRequest.close, FakeRequest.reset], ids=["closes", "resets"])
@each_order
async def test_backend_that_breaks_in_mid_stream_ends_the_answer_unclean(
    order: Any, broken: Any
) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, order)
        request = await fake.management()
        await start_progress(request)
        await request.send(chunk(line(status="pulling")))
        raw.answer = await raw.head()
        await more(raw, line(status="pulling"))
        broken(request)
        answer = await raw.response()
        assert not answer.clean
        assert b"success" not in answer.body
        assert b"\n\n" not in answer.body, "ollama-python takes an empty line for broken JSON"


@pytest.mark.parametrize("broken", [FakeRequest.close, FakeRequest.reset], ids=["closes", "resets"])
@each_order
async def test_backend_that_breaks_before_its_answer_is_a_502_and_asked_once(
    order: Any, broken: Any
) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, order)
        broken(await fake.management())
        answer = await raw.response()
        assert (answer.status, answer.clean) == (502, True)
        assert NATIVE_CHAT.whole_error(answer)
        assert len(fake.managed) == 1


async def test_backend_that_breaks_behind_its_head_is_a_502_still() -> None:
    """Nothing of an answer has come: a failure has a status, as long as it can have one."""
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, ORDERS["pull"])
        request = await fake.management()
        await request.send(render_head(200, NDJSON))
        request.close()
        answer = await raw.response()
        assert (answer.status, answer.clean) == (502, True)


async def test_stop_ends_a_pull_after_the_drain() -> None:
    async with Runner() as fake:
        async with running(fake.url, server__drain_timeout=0.3) as q:
            await up(q)
            raw = await begin(q.port, ORDERS["pull"])
            request = await fake.management()
            await start_progress(request)
            await request.send(chunk(line(status="pulling")))
            await raw.head()
        assert not (await raw.response()).clean
        await asyncio.wait_for(request.left(), 1)


# ---- For whom --------------------------------------------------------------------------------


@each_route
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_foreign_page_is_refused(order: Any, headers: dict[str, str]) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        raw = await begin(q.port, order, headers)
        answer = await raw.response()
        assert answer.status == 403
        assert "access-control-allow-origin" not in answer.headers
        assert fake.managed == []


@each_route
@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1"])
async def test_page_of_this_box_is_served(order: Any, origin: str) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        answer = await ordered(q.port, fake, order, Origin=origin)
        assert answer.status in (200, 201, 404)
        assert len(fake.managed) == 1


async def test_foreign_page_is_refused_before_its_upload_is_read() -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        headers = {"Content-Length": str(1 << 40), "Origin": "https://evil.example"}
        await raw.send(http("POST", BLOB, headers) + b"some")
        assert (await raw.response()).status == 403
        assert fake.managed == []


THERE = r"""
import socket, sys

print("here", flush=True)
sys.stdin.readline()
for asked in ("POST /api/pull", "DELETE /api/delete", "HEAD /api/blobs/sha256:5", "GET /health"):
    with socket.create_connection(("10.99.0.1", 11500), 5) as one:
        lines = [f"{asked} HTTP/1.1", "Host: 10.99.0.1", "Content-Length: 2", "Connection: close"]
        one.sendall("\r\n".join([*lines, "", "{}"]).encode())
        print(asked, one.makefile("rb").readline().split()[1].decode(), flush=True)
"""
HERE = r"""
import subprocess, sys

python, there, llmq = sys.executable, *sys.argv[1:]
def run(*command):
    subprocess.run(command, check=True)

run("ip", "link", "set", "lo", "up")
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
other = subprocess.Popen(["unshare", "--net", python, there], **pipes)
other.stdout.readline()
run("ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(other.pid))
run("ip", "address", "add", "10.99.0.1/24", "dev", "here")
run("ip", "link", "set", "here", "up")
inside = ["nsenter", "-t", str(other.pid), "-n", "ip"]
run(*inside, "address", "add", "10.99.0.2/24", "dev", "there")
run(*inside, "link", "set", "there", "up")
flags = ["--host", "0.0.0.0", "--allow-anonymous-lan", "--backend", "http://127.0.0.1:9"]
service = subprocess.Popen([python, llmq, *flags], stdout=subprocess.PIPE, text=True)
while "http://" not in (said := service.stdout.readline()):
    assert said, "llmq did not start"
print(other.communicate("go\n", 20)[0])
"""


@pytest.mark.deadline(60)
def test_client_elsewhere_on_the_network_may_not_manage_models(tmp_path: Path) -> None:
    """In a network of two made-up boxes, of which this one cannot be told from real ones."""
    unshare, _ = require_command("unshare"), require_command("ip")
    box = [unshare, "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc"]
    possible = subprocess.run([*box, "true"], capture_output=True, check=False)
    need(possible.returncode == 0, "no network namespaces may be made here")
    here, there = tmp_path / "here.py", tmp_path / "there.py"
    here.write_text(HERE)
    there.write_text(THERE)
    done = subprocess.run(
        [*box, sys.executable, str(here), str(there), str(ROOT / "llmq.py")],
        capture_output=True,
        text=True,
        timeout=40,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.stdout.split("\n")[:4] == [
        "POST /api/pull 403",
        "DELETE /api/delete 403",
        "HEAD /api/blobs/sha256:5 403",
        "GET /health 200",
    ], done


async def test_client_of_this_box_may_use_any_of_its_addresses() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        own = probe.getsockname()[0]
    need(not own.startswith(("0.", "127.")), "this box has no address but loopback")
    lan = {"server__host": "0.0.0.0", "server__allow_anonymous_lan": True}
    async with Runner() as fake, running(fake.url, **lan) as q:
        await up(q)
        for host in ("127.0.0.1", own):
            async with await Raw.open(q.port, host) as raw:
                await raw.send(http("HEAD", BLOB, {"Host": host}))
                assert (await raw.response()).status == 404


# ---- Paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/api/blobs",
        "/api/blobs/",
        "/api/blobs//sha256:5",
        "/api/blobs/../pull",
        "/api/blobs/sha256:5/../../tags",
        "/api/blobs/%2e%2e/pull",
        "/api/blobs/%2E%2e/tags",
        "/api/blobs/..%2fpull",
        "/api/blobs/.",
        "/api/blobs/sha256:5/more",
        "/api/blobs/sha256:5%2fmore",
        "/api/blobs/a%0d%0ab",
        "/api/blobs/%00",
        "/api//pull",
        "//api/pull",
        "/api/./pull",
        "/api/pull/",
        "/api/%2e/pull",
        "/x/../api/pull",
        "/API/pull",
        "/api/pull%00",
        "/api/user/keys/x",
        "/api/generate/../delete",
    ],
)
async def test_tricks_with_paths_are_404(path: str) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        for method in ("POST", "HEAD", "DELETE"):
            body = b"{}" if method == "POST" else None
            answer = await ask(q.port, method, path, body=body, headers=JSON)
            assert answer.status == 404, method
        assert fake.managed == []
        assert fake.requests == []


@pytest.mark.parametrize("path", [one.rstrip("/") for one in MANAGEMENT[:5]])
async def test_other_methods_are_405(path: str) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        right = "DELETE" if path == "/api/delete" else "POST"
        for method in ("GET", "HEAD", "PUT", "PATCH", "POST", "DELETE"):
            if method != right:
                answer = await ask(q.port, method, path, headers=JSON)
                assert answer.status == 405, method
                assert right in answer.headers["allow"]
        assert fake.managed == []


async def test_fake_backend_reads_a_blob_piece_by_piece() -> None:
    """The measure of memory above is llmq's; this keeps the fake's own way of reading honest."""
    reader = asyncio.StreamReader()
    reader.feed_data(b"12345")
    reader.feed_eof()
    assert await read_some(reader, 3) == b"123"
    assert await read_some(reader, 3) == b"45"
    with pytest.raises(asyncio.IncompleteReadError):
        await read_some(reader, 3)
