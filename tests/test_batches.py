"""OpenAI's files and batches: a night's work for the local runner, and what comes of it.

`LLMQ_BATCH_LINES=50000 python -m pytest tests/test_batches.py -k memory -s` is the long run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from tests.fake_ollama import Ollama, turns
from tests.fakes import (
    Answer,
    FakeBackend,
    FakeRequest,
    Process,
    Raw,
    ask,
    chat,
    eventually,
    free_port,
    http,
    need,
    running,
)
from tests.real import peers
from tests.real.drivers import Driver, Jobs
from tests.real.peers import Missing
from tests.test_jobs import refusals
from tests.test_keys import reload_with

CHAT = "/v1/chat/completions"
MIB = 1024 * 1024
REAL = Path(__file__).resolve().parent / "real"
READY = 30  # seconds for the drivers to load their libraries
LATE = 20  # seconds for one job of a driver
LINES = int(os.environ.get("LLMQ_BATCH_LINES", "5000"))  # of the batch whose memory is measured
MANY_SECONDS = 20 + LINES / 20  # for them, on a busy machine
ROOM = 20 * MIB  # that llmq may grow by meanwhile
EVIL = {"Origin": "https://evil.example"}
ENDS = ("completed", "failed", "cancelled", "expired")
KEYS = {name: f"sk-{name}-5f1d7c0a9b3e" for name in ("alice", "bob", "root")}

# ---- A client ------------------------------------------------------------------------------------


def row(custom: str, text: str | None = None, url: str = CHAT, **more: Any) -> dict[str, Any]:
    """A line of a batch; it asks for its own name where it is to ask for nothing else."""
    body = chat(custom if text is None else text, **more)
    return {"custom_id": custom, "method": "POST", "url": url, "body": body}


def jsonl(*rows: Any) -> bytes:
    """Lines of a file; bytes as they are."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    return b"".join(line + b"\n" for line in lines)


def named(*customs: str) -> bytes:
    """A file with these lines."""
    return jsonl(*map(row, customs))


def part(disposition: str | bytes, content: bytes, *more: bytes) -> bytes:
    told = disposition.encode() if isinstance(disposition, str) else disposition
    head = [b"Content-Disposition: form-data; " + told, *more]
    return b"\r\n".join([*head, b"", content])


PURPOSE = part('name="purpose"', b"batch")


def form(*parts: bytes, boundary: bytes = b"B") -> bytes:
    return b"".join(b"--%s\r\n%s\r\n" % (boundary, one) for one in parts) + b"--%s--\r\n" % boundary


FORM = {"Content-Type": "multipart/form-data; boundary=B"}


async def post_file(
    port: int, content: bytes, headers: dict[str, str] | None = None, *, purpose: str = "batch"
) -> Answer:
    body = form(
        part('name="purpose"', purpose.encode()), part('name="file"; filename="a.jsonl"', content)
    )
    return await ask(port, "POST", "/v1/files", body=body, headers={**FORM, **(headers or {})})


async def upload(port: int, content: bytes, headers: dict[str, str] | None = None) -> str:
    """The id of a new file."""
    answer = await post_file(port, content, headers)
    assert answer.status == 200, answer
    return str(answer.json()["id"])


async def post_batch(
    port: int, file: Any, headers: dict[str, str] | None = None, **more: Any
) -> Answer:
    facts = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **more}
    return await ask(port, "POST", "/v1/batches", json=facts, headers=headers)


async def begin(
    port: int, content: bytes, headers: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """A new batch of these lines."""
    answer = await post_batch(port, await upload(port, content, headers), headers, **more)
    assert answer.status == 200, answer
    return dict(answer.json())


async def get(port: int, path: str, headers: dict[str, str] | None = None) -> Any:
    answer = await ask(port, "GET", path, headers=headers)
    assert answer.status == 200, answer
    return answer.json()


async def until(port: int, ident: str, is_true: Callable[[Any], object]) -> Any:
    """The batch once that is true of it; the test's deadline ends it otherwise."""
    while not is_true(found := await get(port, f"/v1/batches/{ident}")):
        pass
    return found


async def ended(port: int, ident: str) -> Any:
    return await until(port, ident, lambda batch: batch["status"] in ENDS)


async def content_of(port: int, file: str) -> Answer:
    return await ask(port, "GET", f"/v1/files/{file}/content")


async def lines_of(port: int, batch: Any, member: str = "output_file_id") -> list[Any]:
    """What a file of a batch holds; nothing where it has none."""
    if batch[member] is None:
        return []
    answer = await content_of(port, batch[member])
    assert (answer.status, answer.clean) == (200, True)
    return [json.loads(line) for line in answer.body.splitlines()]


def customs(lines: list[Any]) -> list[str]:
    return [line["custom_id"] for line in lines]


def said(line: Any) -> str:
    """The text in a line of an output."""
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def serving(place: Path, *urls: str, **settings: Any) -> running:
    return running(*urls, server__state=str(place / "state.db"), **settings)


@contextlib.asynccontextmanager
async def at_work(
    place: Path, *, auto: bool = True, models: Any = ("m",), **settings: Any
) -> AsyncIterator[tuple[running, FakeBackend]]:
    """llmq with a runner that says what it is told, by itself or by the test's hand."""
    async with FakeBackend(models, auto=auto) as fake, serving(place, fake.url, **settings) as q:
        backends = q.gateway.fleet.backends.values()
        await eventually(lambda: all(one.usable for one in backends))
        yield q, fake


async def answer_all(fake: FakeBackend) -> None:
    """From now on the runner answers by itself, also what has come already."""
    fake.auto = True
    while fake.has_arrived():
        request = await fake.arrived()
        await request.answer(request.text)


# ---- By OpenAI's own libraries -------------------------------------------------------------------


def python_command() -> tuple[list[str], Path]:
    return [peers.python(), str(REAL / "drive_batches.py")], REAL


def node_command() -> tuple[list[str], Path]:
    return ["node", str(REAL / "drive_batches.mjs")], peers.node_folder()


@pytest.fixture(scope="module", params=[python_command, node_command], ids=["python", "node"])
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    with contextlib.ExitStack() as stack:
        driver: Any = None
        try:
            command, folder = request.param()
            driver = stack.enter_context(Driver(command, folder)).is_ready(READY)
        except Missing as reason:
            need(False, str(reason))
        yield driver
        assert not driver.unhandled


async def done(jobs: Jobs, job: str, url: str, **arguments: Any) -> Any:
    """What a job gives."""
    work = jobs.start(job, url=url, **arguments)
    await eventually(lambda: work.over, LATE)
    assert work.raised is None, work
    return work.done


async def raised(jobs: Jobs, job: str, url: str, **arguments: Any) -> Any:
    """What a job raises."""
    work = jobs.start(job, url=url, **arguments)
    await eventually(lambda: work.over, LATE)
    assert work.raised is not None, work
    return work.raised


def texts(raw: str) -> list[Any]:
    return [json.loads(line) for line in raw.splitlines()]


@pytest.mark.deadline(40)
async def test_a_library_runs_a_batch_from_its_file_to_its_output(
    jobs: Jobs, tmp_path: Path
) -> None:
    content = jsonl(row("a"), row("b", model="nope"), row("c", "größer"))
    async with at_work(tmp_path) as (q, _):
        do = functools.partial(done, jobs, url=q.base)
        file = await do("upload", name="Größe.jsonl", text=content.decode())
        assert (file["object"], file["purpose"]) == ("file", "batch")
        assert (file["filename"], file["bytes"]) == ("Größe.jsonl", len(content))
        assert await do("file", ident=file["id"]) == file
        assert (await do("content", ident=file["id"])).encode() == content
        metadata = {"night": "1", "whose": "eve"}
        batch = await do("create", file=file["id"], metadata=metadata)
        assert (batch["object"], batch["input_file_id"]) == ("batch", file["id"])
        batch = await do("poll", batch=batch["id"])
        assert (batch["status"], batch["metadata"]) == ("completed", metadata)
        assert (batch["completion_window"], batch["expires_at"]) == ("24h", None)
        counts = {name: batch["request_counts"][name] for name in ("total", "completed", "failed")}
        assert counts == {"total": 3, "completed": 2, "failed": 1}
        assert batch["completed_at"] >= batch["in_progress_at"] == batch["created_at"]
        output = texts(await do("content", ident=batch["output_file_id"]))
        assert [(line["custom_id"], said(line)) for line in output] == [("a", "a"), ("c", "größer")]
        errors = texts(await do("content", ident=batch["error_file_id"]))
        assert customs(errors) == ["b"]
        assert errors[0]["response"]["status_code"] == 404
        assert errors[0]["response"]["body"]["error"]["code"] == "model_not_found"
        result = await do("file", ident=batch["output_file_id"])
        assert result["purpose"] == "batch_output"


@pytest.mark.deadline(40)
async def test_a_library_is_told_what_is_wrong_with_a_file(jobs: Jobs, tmp_path: Path) -> None:
    async with serving(tmp_path, "http://127.0.0.1:9") as q:
        do = functools.partial(done, jobs, url=q.base)
        file = await do("upload", name="a.jsonl", text=jsonl(row("a"), row("a")).decode())
        batch = await do("create", file=file["id"], metadata=None)
        assert batch["status"] == "failed"
        assert batch["failed_at"]
        assert [one["line"] for one in batch["errors"]["data"]] == [2]
        assert batch["request_counts"]["completed"] == 0
        error = await raised(jobs, "create", q.base, file="file-none", metadata=None)
        assert "NotFoundError" in error["kinds"]
        error = await raised(jobs, "retrieve", q.base, batch="batch_none")
        assert "NotFoundError" in error["kinds"]


@pytest.mark.deadline(40)
async def test_a_library_pages_through_lists_by_itself(jobs: Jobs, tmp_path: Path) -> None:
    async with serving(tmp_path, "http://127.0.0.1:9") as q:
        do = functools.partial(done, jobs, url=q.base)
        one = {"name": "a.jsonl", "text": "no lines"}
        files = [(await do("upload", **one))["id"] for _ in range(5)]
        batches = [(await do("create", file=file, metadata=None))["id"] for file in files]
        for what, there in (("files", files), ("batches", batches)):
            for limit in (1, 2, 5, 100):
                ids = await do("listed", what=what, query={"limit": limit})
                assert ids == there[::-1], (what, limit)
        after = {"limit": 2, "after": files[2]}
        assert await do("listed", what="files", query=after) == files[1::-1]


@pytest.mark.deadline(40)
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"purpose": "batch"}, ["in"]),
        ({"purpose": "batch_output"}, ["out"]),
        ({"order": "asc", "limit": 1}, ["in", "out"]),
        ({"order": "desc", "limit": 1}, ["out", "in"]),
    ],
    ids=str,
)
async def test_a_library_is_given_the_files_that_it_asks_for(
    query: Any, expected: list[str], jobs: Jobs, tmp_path: Path
) -> None:
    async with at_work(tmp_path) as (q, _):
        do = functools.partial(done, jobs, url=q.base)
        file = await do("upload", name="a.jsonl", text=named("a").decode())
        batch = await do("create", file=file["id"], metadata=None)
        batch = await do("poll", batch=batch["id"])
        names = {batch["input_file_id"]: "in", batch["output_file_id"]: "out"}
        ids = await do("listed", what="files", query=query)
    assert [names[one] for one in ids] == expected


@pytest.mark.deadline(40)
async def test_a_library_cancels_and_deletes(jobs: Jobs, tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        do = functools.partial(done, jobs, url=q.base)
        file = await do("upload", name="a.jsonl", text=named("a", "b", "c").decode())
        batch = await do("create", file=file["id"], metadata=None)
        await (await fake.arrived()).answer("one")
        running_one = await fake.arrived()
        told = await do("cancel", batch=batch["id"])
        assert told["status"] in ("cancelling", "cancelled")
        await running_one.left()
        batch = await do("poll", batch=batch["id"])
        assert batch["status"] == "cancelled"
        assert batch["cancelled_at"] >= batch["cancelling_at"] >= batch["created_at"]
        assert customs(texts(await do("content", ident=batch["output_file_id"]))) == ["a"]
        for ident in (file["id"], batch["output_file_id"]):
            gone = await do("delete", ident=ident)
            assert (gone["id"], gone["deleted"]) == (ident, True)
            error = await raised(jobs, "content", q.base, ident=ident)
            assert "NotFoundError" in error["kinds"]
        assert await do("listed", what="files", query={}) == []


@pytest.mark.deadline(60)
async def test_a_batch_goes_on_after_llmq_was_killed_and_has_every_line_once(
    jobs: Jobs, tmp_path: Path
) -> None:
    names = [f"line-{number}" for number in range(8)]
    port, state = free_port(), str(tmp_path / "state.db")
    async with FakeBackend(auto=False) as fake:
        flags = ("--port", str(port), "--backend", fake.url, "--state", state)
        do = functools.partial(done, jobs, url=f"http://127.0.0.1:{port}")
        async with Process(*flags) as p:
            file = await do("upload", name="a.jsonl", text=named(*names).decode())
            batch = await do("create", file=file["id"], metadata={"night": "2"})
            for _ in range(3):
                request = await fake.arrived()
                await request.answer(request.text)
            broken = await fake.arrived()
            await until(port, batch["id"], lambda one: one["request_counts"]["completed"] == 3)
            p.signal(signal.SIGKILL)
            assert await p.ended(0) == -signal.SIGKILL
            await broken.left()
        await answer_all(fake)
        async with Process(*flags):
            batch = await do("poll", batch=batch["id"])
            assert (batch["status"], batch["metadata"]) == ("completed", {"night": "2"})
            output = texts(await do("content", ident=batch["output_file_id"]))
    assert [(line["custom_id"], said(line)) for line in output] == [(one, one) for one in names]
    assert batch["error_file_id"] is None
    asked = [request.text for request in fake.requests]
    assert asked[:4] == names[:4]
    assert sorted(asked[4:]) == names[3:]  # only what was cut off was asked again


# ---- Many lines ----------------------------------------------------------------------------------


def memory(pid: int, name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def forget_peak(pid: int) -> None:
    """VmHWM begins anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.fixture
def proc() -> None:
    need(Path("/proc/self/clear_refs").exists(), "memory is read from /proc")


async def run_many(port: int, number: int, fake: FakeBackend) -> float:
    """Run a batch of so many lines; how many a second."""
    last = len(fake.requests) + number
    content = jsonl(*(row(f"line-{one}", "x" * 200) for one in range(number)))
    began = time.monotonic()
    batch = await begin(port, content)
    await eventually(lambda: len(fake.requests) == last, MANY_SECONDS)
    batch = await ended(port, batch["id"])
    took = time.monotonic() - began
    assert batch["request_counts"] == {"total": number, "completed": number, "failed": 0}
    output = await lines_of(port, batch)
    assert customs(output) == [f"line-{one}" for one in range(number)]
    return number / took


@pytest.mark.untraced
@pytest.mark.deadline(MANY_SECONDS + 20)
@pytest.mark.usefixtures("proc")
async def test_thousands_of_lines_take_no_memory(tmp_path: Path) -> None:
    flags = ("--port", "0", "--state", str(tmp_path / "state.db"))
    async with Ollama() as fake, Process(*flags, "--backend", fake.url) as p:
        await run_many(p.port, min(LINES, 1000), fake)  # what is kept of the latest is full now
        before = memory(p.pid, "VmRSS")
        forget_peak(p.pid)
        a_second = await run_many(p.port, LINES, fake)
        grown = memory(p.pid, "VmHWM") - before
    print(f"{LINES} lines: {grown / MIB:.1f} MiB more at its peak, {a_second:.0f} lines/s")  # noqa: T201
    assert grown < ROOM


@pytest.mark.usefixtures("proc")
async def test_a_file_is_on_the_disk_and_not_in_memory(tmp_path: Path) -> None:
    content = b"x" * (30 * MIB)
    async with Process("--port", "0", "--state", str(tmp_path / "state.db")) as p:
        await upload(p.port, b"x")
        before = memory(p.pid, "VmRSS")
        await upload(p.port, content)
        await eventually(lambda: memory(p.pid, "VmRSS") - before < ROOM)


# ---- Lines ---------------------------------------------------------------------------------------

GOOD = json.dumps(row("a")).encode()
DEPTHS = (*range(900, 1010), 5000, 200_000)  # around what Pythons survive, and far above


def mistake(line: bytes, path: str = CHAT) -> llmq.BadRequest:
    """What is wrong with a line."""
    with pytest.raises(llmq.BadRequest) as caught:
        llmq.read_line(line, path)
    return caught.value


def without(name: str, **more: Any) -> bytes:
    facts = {**row("a"), **more}
    del facts[name]
    return json.dumps(facts).encode()


def with_(**more: Any) -> bytes:
    return json.dumps({**row("a"), **more}).encode()


MISTAKES = {  # what is wrong: the line, the member that is told
    "nothing": (b"", None),
    "no JSON": (b"{'custom_id'", None),
    "cut off": (GOOD[:-1], None),
    "two in one": (GOOD + GOOD, None),
    "a list": (b"[" + GOOD + b"]", None),
    "a text": (b'"a"', None),
    "null": (b"null", None),
    "not UTF-8": (GOOD.replace(b'"a"', b'"\xff"'), None),
    "UTF-16": (GOOD.decode().encode("utf-16"), None),
    "no custom_id": (without("custom_id"), "custom_id"),
    "an empty custom_id": (with_(custom_id=""), "custom_id"),
    "a number as custom_id": (with_(custom_id=7), "custom_id"),
    "an endless custom_id": (with_(custom_id="x" * 513), "custom_id"),
    "half a character as custom_id": (with_(custom_id="\ud800"), "custom_id"),
    "no method": (without("method"), "method"),
    "another method": (with_(method="GET"), "method"),
    "no url": (without("url"), "url"),
    "another url": (with_(url="/v1/embeddings"), "url"),
    "a whole url": (with_(url="http://127.0.0.1" + CHAT), "url"),
    "no body": (without("body"), "body"),
    "a text as body": (with_(body="{}"), "body"),
    "a stream": (with_(body=chat("a", stream=True)), "body.stream"),
    "half a character as model": (with_(body=chat("a", model="\ud800")), "body.model"),
    "NaN": (GOOD.replace(b'"m"', b"NaN"), "body"),
    "a number beyond all": (GOOD.replace(b'"m"', b"1e999"), "body"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_a_line_is_named(what: str) -> None:
    line, param = MISTAKES[what]
    error = mistake(line)
    assert error.message
    assert error.param == param


@pytest.mark.parametrize("what", [what for what in MISTAKES if what != "nothing"])
def test_a_mistake_is_told_with_its_line(what: str) -> None:
    line, param = MISTAKES[what]
    if what == "UTF-16":
        line = line.replace(b"\n", b"")
    number, mistakes = llmq.find_mistakes(jsonl(row("0"), line, row("2")), CHAT)
    assert number == 3
    ((told, at, member),) = [(one["message"], one["line"], one["param"]) for one in mistakes]
    assert (bool(told), at, member) == (True, 2, param)


@pytest.mark.parametrize("more", [{}, {"stream": False}, {"stream": None}], ids=str)
def test_a_good_line_is_read(more: Any) -> None:
    line = llmq.read_line(with_(body={**chat("größer"), **more}), CHAT)
    assert (line.custom, line.model) == ("a", "m")
    assert json.loads(line.body) == {**chat("größer"), **more}


def test_a_line_of_several_megabytes_is_read() -> None:
    line = llmq.read_line(with_(body=chat("ä" * 4 * MIB)), CHAT)
    assert json.loads(line.body)["messages"][0]["content"] == "ä" * 4 * MIB


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'], ids=str)
@pytest.mark.parametrize("where", ["line", "body", "open"])
def test_a_deeply_nested_line_is_read_or_a_mistake_and_nothing_else(
    where: str, opening: bytes
) -> None:
    closing = opening.replace(b'"a":', b"").translate(bytes.maketrans(b"[{", b"]}"))[::-1]
    for depth in DEPTHS:
        deep = opening * depth + b"1" + (b"" if where == "open" else closing * depth)
        line = deep if where == "line" else GOOD.replace(b'"m"', deep)
        with contextlib.suppress(llmq.BadRequest):
            assert llmq.read_line(line, CHAT).custom == "a"
        number, mistakes = llmq.find_mistakes(line, CHAT)
        assert (number, len(mistakes)) in ((1, 0), (1, 1))


# ---- Files of lines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        jsonl(row("a"), row("b")),
        jsonl(row("a"), row("b"))[:-1],
        jsonl(row("a"), row("b")).replace(b"\n", b"\r\n"),
        b"\n\n" + jsonl(row("a"), b"", b"  ", row("b"), b"\t", b""),
        b"\r\n" + jsonl(row("a"), b"\r", row("b")) + b" ",
    ],
    ids=["lines", "no final newline", "CRLF", "empty lines", "empty lines with CRLF"],
)
def test_lines_may_end_as_they_like(content: bytes) -> None:
    assert llmq.find_mistakes(content, CHAT) == (2, [])


def test_a_line_is_numbered_as_an_editor_numbers_it() -> None:
    content = b"\n" + jsonl(row("a"), b"", b"{", b"\r", b"[")
    number, mistakes = llmq.find_mistakes(content, CHAT)
    assert number == 3
    assert [one["line"] for one in mistakes] == [4, 6]


def test_a_byte_order_mark_is_no_mistake_or_one_of_the_first_line() -> None:
    number, mistakes = llmq.find_mistakes(b"\xef\xbb\xbf" + named("a", "b"), CHAT)
    assert number == 2
    assert [one["line"] for one in mistakes] in ([], [1])


def test_a_custom_id_is_there_once() -> None:
    number, mistakes = llmq.find_mistakes(named("a", "b", "a", "c", "a"), CHAT)
    assert number == 5
    assert [one["line"] for one in mistakes] == [3, 5]
    assert all("a" in one["message"] for one in mistakes)


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n\n"], ids=repr)
def test_a_file_without_lines_is_a_mistake(content: bytes) -> None:
    number, (told,) = llmq.find_mistakes(content, CHAT)
    assert (number, told["line"]) == (0, None)


@pytest.mark.parametrize("more", [0, 1])
def test_a_batch_has_50000_lines_at_most(more: int) -> None:
    end = GOOD.partition(b'"a"')[2]
    content = b"".join(b'{"custom_id": "%d"%s\n' % (one, end) for one in range(50_000 + more))
    number, mistakes = llmq.find_mistakes(content, CHAT)
    assert number == 50_000 + more
    assert [one["code"] for one in mistakes] == ["invalid_file"] * more


def test_of_many_mistakes_the_first_are_told() -> None:
    _, mistakes = llmq.find_mistakes(b"{\n" * 10_000, CHAT)
    assert 1 < len(mistakes) <= 1000
    assert [one["line"] for one in mistakes] == list(range(1, len(mistakes) + 1))


# ---- Forms ---------------------------------------------------------------------------------------

FILE = part('name="file"; filename="a.jsonl"', b"x")
TYPE = "multipart/form-data; boundary="


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'name="file"; filename="a.jsonl"', "a.jsonl"),
        (b"name=file; filename=a.jsonl", "a.jsonl"),
        (b'filename="a.jsonl"; name="file"', "a.jsonl"),
        (b'NAME="file"; FileName="a.jsonl"', "a.jsonl"),
        (b'name="file";filename="a;b = c.jsonl"', "a;b = c.jsonl"),
        (b'name="file"; filename="a \\"b\\".jsonl"', 'a "b".jsonl'),
        ('name="file"; filename="größe 日本.jsonl"'.encode(), "größe 日本.jsonl"),
        (b"name=\"file\"; filename*=UTF-8''gr%C3%B6%C3%9Fe.jsonl", "größe.jsonl"),
        (b"name=\"file\"; filename*=utf-8'de'a%20b.jsonl", "a b.jsonl"),
        (b"name=\"file\"; filename*=iso-8859-1''gr%F6.jsonl", "grö.jsonl"),
        (b'name="file"', ""),
        (b'name="file"; filename=""', ""),
    ],
    ids=repr,
)
def test_a_files_name_is_read_as_clients_write_it(disposition: bytes, name: str) -> None:
    body = form(PURPOSE, part(disposition, b"content"))
    assert llmq.read_file_form(body, TYPE + "B") == ("batch", name, b"content")


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (TYPE + "B", b"B"),
        (TYPE + '"B"', b"B"),
        (TYPE + '"a b:c=d/e"', b"a b:c=d/e"),
        ("Multipart/Form-Data; charset=utf-8; Boundary=B", b"B"),
        (TYPE + "----formdata-undici-0123; charset=utf-8", b"----formdata-undici-0123"),
        (TYPE + "'()+_,-./:=?'".join('""'), b"'()+_,-./:=?'"),
    ],
    ids=repr,
)
def test_a_boundary_is_read_as_clients_write_it(content_type: str, boundary: bytes) -> None:
    body = form(PURPOSE, FILE, boundary=boundary)
    assert llmq.read_file_form(body, content_type) == ("batch", "a.jsonl", b"x")


BINARY = (  # with what is almost a boundary
    bytes(range(256)),
    b"\r\n",
    b"",
    b"-B--B",
    b"\r\n--A\r\n\r\n--\r\n-B\r\n--b\r\n --B",
    b"\n--B\n\r--B\r",
    b"\r\n\r\n--",
    b'\r\n\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune',
)


@pytest.mark.parametrize("content", BINARY, ids=repr)
def test_a_files_bytes_are_kept_as_they_are(content: bytes) -> None:
    parts = [PURPOSE, part('name="file"; filename="a"', content, b"Content-Type: a/b")]
    for ordered in (parts, parts[::-1]):
        assert llmq.read_file_form(form(*ordered), TYPE + "B") == ("batch", "a", content)


@pytest.mark.parametrize("before", [b"", b"\r\n", b"a preamble\r\n", b"--b\r\n"], ids=repr)
@pytest.mark.parametrize("behind", [b"", b"\r\n", b"an epilogue", b"\r\n--b--"], ids=repr)
def test_what_stands_around_a_form_does_not_count(before: bytes, behind: bytes) -> None:
    body = before + form(PURPOSE, FILE)[:-2] + behind
    assert llmq.read_file_form(body, TYPE + "B") == ("batch", "a.jsonl", b"x")


def test_other_parts_do_not_count() -> None:
    other = part('name="expires_after[anchor]"', b"created_at")
    bare = b"\r\nno head"
    body = form(bare, other, PURPOSE, other, FILE, bare)
    assert llmq.read_file_form(body, TYPE + "B") == ("batch", "a.jsonl", b"x")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", TYPE + "B"),
        (form(), TYPE + "B"),
        (form(PURPOSE), TYPE + "B"),
        (form(part('name="files"', b"x")), TYPE + "B"),
        (form(b"\r\nx"), TYPE + "B"),
        (form(PURPOSE, FILE)[:-10], TYPE + "B"),
        (form(PURPOSE, FILE), TYPE + "C"),
        (form(PURPOSE, FILE), TYPE),
        (form(PURPOSE, FILE), TYPE + '""'),
        (form(PURPOSE, FILE), TYPE + '"'),
        (form(PURPOSE, FILE), "multipart/form-data"),
        (form(PURPOSE, FILE), "multipart/form-data; boundary*"),
        (form(PURPOSE, FILE), 'multipart/form-data; boundary*="'),
        (form(PURPOSE, FILE), "multipart/mixed; boundary=B"),
        (form(PURPOSE, FILE), "application/json"),
        (form(PURPOSE, FILE), ""),
        (form(PURPOSE, part(b"name*", b"x")), TYPE + "B"),
        (form(PURPOSE, part(b"na\0me=file", b"x")), TYPE + "B"),
        (form(PURPOSE, part(b"name=" + b"(" * 5000, b"x")), TYPE + "B"),
    ],
    ids=lambda one: repr(one[-40:]),
)
def test_what_is_no_form_with_a_file_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(llmq.BadRequest):
        llmq.read_file_form(body, content_type)


ENDLESS = (b";", b"a=b;", b"a ", b"\r\n a", b'"', b'"\\', b"filename*0=a;", b"=?utf-8?q?x?= ", b"(")


@pytest.mark.deadline(3)
@pytest.mark.parametrize("unit", ENDLESS, ids=repr)
def test_an_endless_content_type_is_read_or_refused_at_once(unit: bytes) -> None:
    told = TYPE + "B; " + (unit * (60_000 // len(unit))).decode().replace("\r\n", "")
    with contextlib.suppress(llmq.BadRequest):
        assert llmq.read_file_form(form(PURPOSE, FILE), told) == ("batch", "a.jsonl", b"x")


@pytest.mark.deadline(3)
@pytest.mark.parametrize("unit", ENDLESS, ids=repr)
def test_an_endless_head_of_a_part_is_refused_at_once(unit: bytes) -> None:
    body = form(PURPOSE, part(b'name="file"; ' + unit * (MIB // len(unit)), b"x"))
    with pytest.raises(llmq.BadRequest):
        llmq.read_file_form(body, TYPE + "B")


TOKENS = (
    *(b'"', b"'", b";", b"=", b"*", b"*0", b"*0*", b"*1*=", b"%", b"%ff", b"utf-8''", b"nope''"),
    *(b" ", b"\t", b"\r\n", b"\n", b"\r", b"\0", b"\xff", b"\xc3\xa9", b"\\", b"(", b")", b"<"),
    *(b">", b"@", b",", b":", b"/", b"[", b"]", b"?", b"=?utf-8?q?=ff?=", b"=?utf-8?b?!?=", b"--"),
    *(b"--B", b"\r\n--B", b"\r\n\r\n", b"name", b"filename", b"boundary", b"charset", b"A" * 99),
)


def mutated(chance: random.Random, data: bytes) -> bytes:
    """With a few tokens put in or over what is there, and a few bytes less."""
    new = bytearray(data)
    for _ in range(chance.randint(0, 5)):
        at, token = chance.randint(0, len(new)), chance.choice(TOKENS)
        end = at + chance.choice([0, len(token), chance.randint(1, 6)])
        new[at:end] = token if chance.random() < 0.7 else b""
    return bytes(new)


@pytest.mark.untraced
@pytest.mark.parametrize("seed", range(4))
def test_any_form_is_read_or_refused(seed: int) -> None:
    rfc5987 = part("name*=utf-8''file; filename*0*=utf-8''%41; filename*1=\"b\"", b"x")
    bodies = [form(PURPOSE, FILE), form(rfc5987, PURPOSE)]
    types = [b"B", b'"B"; charset=utf-8', b"B; boundary*=utf-8''B"]
    for number in range(1500):
        chance = random.Random(1500 * seed + number)
        body = mutated(chance, chance.choice(bodies))
        told = mutated(chance, TYPE.encode() + chance.choice(types)).decode("latin-1")
        told = re.sub("[\r\n\0]", "", told)  # no header field has such
        try:
            llmq.read_file_form(body, told)
        except llmq.LlmqError:
            pass
        except Exception as error:
            raise AssertionError(f"number {number}: {told!r} {body!r}") from error


# ---- What is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["fine-tune", "batch_output", "Batch", "", "\xff"])
async def test_a_file_for_another_purpose_is_refused(purpose: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as q:
        answer = await post_file(q.port, named("a"), purpose=purpose)
        assert (answer.status, answer.code) == (400, "bad_request")
        assert answer.json()["error"]["param"] == "purpose"
        assert (await get(q.port, "/v1/files"))["data"] == []


@pytest.mark.parametrize(
    ("facts", "param"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"endpoint": "/v1/audio/transcriptions"}, "endpoint"),
        ({"endpoint": "/api/chat"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"endpoint": [CHAT]}, "endpoint"),
        ({"endpoint": {}}, "endpoint"),
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": "text"}, "metadata"),
        ({"metadata": ["a"]}, "metadata"),
    ],
    ids=str,
)
async def test_a_batch_that_cannot_be_is_refused(facts: Any, param: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as q:
        file = await upload(q.port, named("a"))
        answer = await post_batch(q.port, **{"file": file, **rename(facts)})
        assert (answer.status, answer.code) == (400, "bad_request")
        assert answer.json()["error"]["param"] == param
        assert (await get(q.port, "/v1/batches"))["data"] == []


def rename(facts: dict[str, Any]) -> dict[str, Any]:
    return {{"input_file_id": "file"}.get(name, name): value for name, value in facts.items()}


async def test_metadata_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as q:
        file = await upload(q.port, named("a"))
        facts = {"input_file_id": file, "endpoint": CHAT, "metadata": {"a": "?"}}
        body = json.dumps(facts).replace('"?"', "1e999").encode()
        answer = await ask(q.port, "POST", "/v1/batches", body=body)
        assert answer.status == 400
        assert (await get(q.port, "/v1/batches"))["data"] == []


async def test_metadata_is_kept_as_it_is(tmp_path: Path) -> None:
    metadata = {"whose": "größer", "half": "\ud800", "": "x" * 512}
    async with serving(tmp_path) as q:
        batch = await begin(q.port, b"no lines", metadata=metadata)
        assert batch["metadata"] == metadata
        assert (await get(q.port, f"/v1/batches/{batch['id']}"))["metadata"] == metadata


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/embeddings", "/v1/responses"])
async def test_a_batch_is_of_one_endpoint(endpoint: str, tmp_path: Path) -> None:
    """What its runner makes of it comes back as it is."""
    async with at_work(tmp_path, auto=False) as (q, fake):
        lines = jsonl(row("a", url=endpoint, input="hi", prompt="hi"))
        wrong = await begin(q.port, lines)
        assert (wrong["status"], wrong["errors"]["data"][0]["param"]) == ("failed", "url")
        batch = await begin(q.port, lines, endpoint=endpoint)
        request = await fake.arrived()
        assert (request.path, request.json["input"]) == (endpoint, "hi")
        await request.status(200, {"object": "it"})
        batch = await ended(q.port, batch["id"])
        (line,) = await lines_of(q.port, batch)
        assert line["response"]["body"] == {"object": "it"}
        assert batch["endpoint"] == endpoint


async def test_an_output_is_no_input(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (q, _):
        batch = await begin(q.port, named("a"))
        batch = await ended(q.port, batch["id"])
        answer = await post_batch(q.port, batch["output_file_id"])
        assert (answer.status, answer.code) == (400, "bad_request")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/file-none",
        "/v1/files/file-none/content",
        "/v1/batches/batch_none",
        "DELETE /v1/files/file-none",
        "POST /v1/batches/batch_none/cancel",
    ],
)
async def test_what_is_not_there_is_404(path: str, tmp_path: Path) -> None:
    method, _, path = path.rpartition(" ")
    async with serving(tmp_path) as q:
        for _ in range(2):  # without a state file, and with one
            answer = await ask(q.port, method or "GET", path)
            assert (answer.status, answer.code) == (404, "not_found")
            await upload(q.port, b"x")


# ---- Whose it is ---------------------------------------------------------------------------------


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def keyed(**rows: Any) -> dict[str, Any]:
    return {name: {"key": KEYS[name], **more} for name, more in rows.items()}


def from_elsewhere(user: str) -> dict[str, str]:
    """As if from another box: to a llmq that trusts this one as its proxy."""
    return {"X-Forwarded-For": "10.0.0.9", "X-User-ID": user}


def asked_of(file: str, batch: str) -> list[tuple[str, str]]:
    """All that can be asked of a file and a batch, the harmless first."""
    return [
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{file}/content"),
        ("GET", f"/v1/batches/{batch}"),
        ("POST", f"/v1/batches/{batch}/cancel"),
        ("DELETE", f"/v1/files/{file}"),
    ]


async def cannot_be_seen(q: running, batch: Any, headers: dict[str, str]) -> None:
    file = batch["input_file_id"]
    for method, path in asked_of(file, batch["id"]):
        answer = await ask(q.port, method, path, headers=headers)
        assert (answer.status, answer.code) == (404, "not_found"), path
    assert (await post_batch(q.port, file, headers)).status == 404
    for what in ("files", "batches"):
        assert (await get(q.port, f"/v1/{what}", headers))["data"] == []
        more = await get(q.port, f"/v1/{what}?after={batch['id']}", headers)
        assert more["data"] == []


async def can_be_seen(q: running, batch: Any, headers: dict[str, str]) -> None:
    statuses = [
        (await ask(q.port, method, path, headers=headers)).status
        for method, path in asked_of(batch["input_file_id"], batch["id"])
    ]
    assert statuses == [200] * len(statuses)


@pytest.mark.parametrize("user", [{}, {"X-User-ID": "a-guest"}], ids=["alice", "a guest of hers"])
async def test_with_keys_a_batch_is_of_who_has_the_key(
    user: dict[str, str], tmp_path: Path
) -> None:
    keys = keyed(alice={}, bob={}, root={"rights": ["infer", "control"]})
    async with at_work(tmp_path, auto=False, keys=keys) as (q, fake):
        batch = await begin(q.port, named("a", "b"), {**key("alice"), **user})
        await cannot_be_seen(q, batch, key("bob"))
        await cannot_be_seen(q, batch, {**key("bob"), "X-User-ID": "alice"})
        for headers in ({}, {"X-User-ID": "alice"}):
            for method, path in asked_of(batch["input_file_id"], batch["id"]):
                assert (await ask(q.port, method, path, headers=headers)).status == 401
        assert (await get(q.port, f"/v1/batches/{batch['id']}", key("root"))) == batch | {
            "request_counts": {"total": 2, "completed": 0, "failed": 0}
        }
        request = await fake.arrived()
        await can_be_seen(q, batch, key("alice"))
        await request.left()


async def test_without_keys_a_batch_is_of_who_has_the_name_and_of_this_box(tmp_path: Path) -> None:
    proxied = {"server__trusted_proxies": ["127.0.0.1"], "server__allow_anonymous_lan": True}
    eve, bob = from_elsewhere("eve"), from_elsewhere("bob")
    async with at_work(tmp_path, auto=False, **proxied) as (q, fake):
        for seeing in (eve, {"X-User-ID": "bob"}):
            batch = await begin(q.port, named("a", "b"), eve)
            await cannot_be_seen(q, batch, bob)
            request = await fake.arrived()
            await can_be_seen(q, batch, seeing)
            await request.left()


@pytest.mark.parametrize("fetch", [{}, {"Sec-Fetch-Site": "cross-site"}], ids=str)
async def test_pages_from_elsewhere_are_refused(fetch: dict[str, str], tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("a"))
        request = await fake.arrived()
        asked = asked_of(batch["input_file_id"], batch["id"])
        asked += [(method, path) for path in LISTS for method in ("GET", "POST")]
        for method, path in asked:
            answer = await ask(q.port, method, path, headers={**EVIL, **fetch}, body=b"{}")
            assert (answer.status, answer.code) == (403, "forbidden_origin"), path
            assert "access-control-allow-origin" not in answer.headers
        assert (await post_file(q.port, b"x", EVIL)).status == 403
        assert len((await get(q.port, "/v1/files"))["data"]) == 1
        await request.answer("a")
        assert (await ended(q.port, batch["id"]))["status"] == "completed"


LISTS = ("/v1/files", "/v1/batches")


# ---- Room ----------------------------------------------------------------------------------------


async def test_a_file_longer_than_a_body_may_be_is_413(tmp_path: Path) -> None:
    async with serving(tmp_path, server__max_body=4096) as q:
        answer = await post_file(q.port, b"x" * 4096)
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert (await post_file(q.port, b"x" * 2048)).status == 200


async def test_a_full_store_is_507(tmp_path: Path) -> None:
    async with serving(tmp_path, jobs__max_bytes=512 * 1024) as q:
        file = await upload(q.port, named(*(f"line-{one}" for one in range(2000))))
        for answer in (await post_file(q.port, b"x" * 512 * 1024), await post_batch(q.port, file)):
            assert (answer.status, answer.code) == (507, "insufficient_storage")
            assert "jobs.max_bytes" in answer.json()["error"]["message"]
        assert (await ask(q.port, "DELETE", f"/v1/files/{file}")).status == 200
        assert (await post_file(q.port, b"x" * 100 * 1024)).status == 200
        assert (await get(q.port, "/v1/batches"))["data"] == []


async def test_uploads_at_once_fill_no_more_than_all_may(tmp_path: Path) -> None:
    most = 512 * 1024
    async with serving(tmp_path, jobs__max_bytes=most) as q:
        answers = await asyncio.gather(*[post_file(q.port, b"x" * 200 * 1024) for _ in range(8)])
        assert sorted(answer.status for answer in answers) == [200] * 2 + [507] * 6
        assert sum(row[0] for row in await q.gateway.store.read(llmq.FILLED)) <= most


async def test_a_batch_for_which_there_was_no_room_is_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path, jobs__max_bytes=400_000) as q:
        file = await upload(q.port, jsonl(*[row(f"l{one}", "x" * 900) for one in range(150)]))
        answers = await asyncio.gather(*[post_batch(q.port, file) for _ in range(4)])
        assert sorted(answer.status for answer in answers) == [200] + [507] * 3
        (kept,) = (await get(q.port, "/v1/batches"))["data"]
        assert q.service.batches.open == {kept["id"]}


async def test_without_a_state_file_there_are_no_batches() -> None:
    async with running() as q:
        answer = await post_file(q.port, named("a"))
        assert (answer.status, answer.code) == (507, "insufficient_storage")
        for what in LISTS:
            assert (await get(q.port, what))["data"] == []
        answer = await post_batch(q.port, "file-none")
        assert answer.status == 404


# ---- What comes of the lines ---------------------------------------------------------------------


async def test_lines_stand_in_the_order_of_the_input_however_they_ended(tmp_path: Path) -> None:
    names = list("abcd")
    async with at_work(tmp_path, auto=False, queue__slots=4) as (q, fake):
        batch = await begin(q.port, named(*names))
        requests = [await fake.arrived() for _ in names]
        for request in reversed(requests):
            await request.answer(request.text.upper())
        batch = await ended(q.port, batch["id"])
        output = await lines_of(q.port, batch)
    assert [(line["custom_id"], said(line)) for line in output] == [(n, n.upper()) for n in names]
    assert len({line["id"] for line in output}) == 4
    assert all(line["error"] is None for line in output)
    assert {line["response"]["status_code"] for line in output} == {200}


async def test_lines_that_fail_are_in_the_error_file_in_order_with_their_status(
    tmp_path: Path,
) -> None:
    lines = jsonl(
        row("good"),
        row("unknown", model="nope"),
        row("not hers", model="m2"),
        row("refused"),
        row("wrong", messages="text"),
        row("deep", x=json.loads("[" * 500 + "]" * 500)),
        row("good too"),
    )
    keys = keyed(alice={"models": ["m", "nope"]})
    models = ("m", "m2")
    async with at_work(tmp_path, auto=False, models=models, keys=keys) as (q, fake):
        batch = await begin(q.port, lines, key("alice"))
        ends = asyncio.ensure_future(answering(fake))
        path = f"/v1/batches/{batch['id']}"
        while batch["status"] not in ENDS:
            batch = await get(q.port, path, key("alice"))
        ends.cancel()
        files = [batch["output_file_id"], batch["error_file_id"]]
        got = [
            (await ask(q.port, "GET", f"/v1/files/{one}/content", headers=key("alice"))).body
            for one in files
        ]
        sizes = [(await get(q.port, f"/v1/files/{one}", key("alice")))["bytes"] for one in files]
    assert sizes == [len(one) for one in got]
    output, errors = ([json.loads(line) for line in one.splitlines()] for one in got)
    told_wrong = [line for line in output if line["custom_id"] == "wrong"]  # its runner's matter
    assert [one for one in customs(output) if one != "wrong"] == ["good", "good too"]
    expected = ["unknown", "not hers", "refused", "wrong", "deep"]
    assert customs(errors) == [one for one in expected if one != "wrong" or not told_wrong]
    statuses = {line["custom_id"]: line["response"]["status_code"] for line in errors}
    assert statuses["unknown"] == 404
    assert statuses["not hers"] == 403
    assert statuses["refused"] == 422
    assert statuses["deep"] == 400
    assert all(line["response"]["body"]["error"]["message"] for line in errors)
    assert batch["request_counts"] == {"total": 7, "completed": len(output), "failed": len(errors)}


async def answering(fake: FakeBackend) -> None:
    """By hand: one text is refused."""
    while True:
        request = await fake.arrived()
        if b'"refused"' in request.body:
            await request.status(422, {"error": {"message": "not that"}})
        else:
            await request.status(200, {"choices": []})


ODD_ANSWERS = {  # what a runner says under status 200
    "HTML": b"<html>oops</html>",
    "nothing": b"",
    "cut off": b'{"choices": [',
    "not UTF-8": b'{"a":"\xff"}',
    "NaN": b'{"a":NaN}',
    "a number beyond all": b'{"a":1e999}',
    "half a character": b'{"a":"\\ud800"}',
    "deep": b"[" * 5000 + b"]" * 5000,
    "a list": b"[1]",
    "lines": b'{"a":1}\n{"a":2}\n',
}


@pytest.mark.parametrize("what", ODD_ANSWERS)
async def test_a_line_ends_whatever_its_runner_says(what: str, tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("odd", "next"))
        await (await fake.arrived()).status(200, ODD_ANSWERS[what])
        await (await fake.arrived()).answer("next")
        batch = await ended(q.port, batch["id"])
        output = await lines_of(q.port, batch)
        errors = await lines_of(q.port, batch, "error_file_id")
    assert batch["status"] == "completed"
    assert (customs(output), customs(errors)) in ((["odd", "next"], []), (["next"], ["odd"]))
    counts = {"total": 2, "completed": len(output), "failed": len(errors)}
    assert batch["request_counts"] == counts
    for line in output + errors:
        assert type(line["response"]["status_code"]) is int


@pytest.mark.parametrize("body", [b"<html>oops</html>", b"", b"[]"], ids=repr)
async def test_an_error_of_a_runner_that_is_no_json_is_told(body: bytes, tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("a"))
        await (await fake.arrived()).status(422, body)
        batch = await ended(q.port, batch["id"])
        (line,) = await lines_of(q.port, batch, "error_file_id")
    assert line["response"]["status_code"] == 422
    assert line["response"]["body"]["error"]["message"]


async def test_lines_are_of_class_low_whatever_they_say(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False, queue__slots=2) as (q, fake):
        headers = {"X-Queue-Priority": "high"}
        lines = jsonl(row("a"), row("b", priority="high"))
        batch = await begin(q.port, lines, headers)
        requests = [await fake.arrived() for _ in range(2)]
        tickets = q.gateway.scheduler.running.values()
        assert {ticket.priority for ticket in tickets} == {llmq.Priority.LOW}
        for request in requests:
            await request.answer("done")
        await ended(q.port, batch["id"])


async def test_who_waits_at_the_desk_goes_before_the_lines(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("a", "b", "c"))
        first = await fake.arrived()
        urgent = asyncio.ensure_future(q.chat("now"))
        await eventually(lambda: any(not call.job for call in q.gateway.calls.values()))
        await first.answer("a")
        request = await fake.arrived()
        assert request.text == "now"
        await request.answer("yes")
        assert (await urgent).content == "yes"
        await answer_all(fake)
        assert (await ended(q.port, batch["id"]))["status"] == "completed"


async def test_half_a_character_in_a_line_harms_nobody(tmp_path: Path) -> None:
    """No database takes it as text."""
    async with at_work(tmp_path) as (q, _):
        for odd in (row("\ud800"), row("b", model="\ud800"), row("c", "\ud800")):
            answer = await post_batch(q.port, await upload(q.port, jsonl(row("a"), odd)))
            assert answer.status == 200, answer
            assert (await ended(q.port, answer.json()["id"]))["status"] in ("failed", "completed")
        batch = await begin(q.port, named("a", "b"))
        assert (await ended(q.port, batch["id"]))["request_counts"]["completed"] == 2


async def test_what_cannot_be_written_undoes_what_was_begun_with_it(tmp_path: Path) -> None:
    store = llmq.Store(str(tmp_path / "state.db"))
    await store.put("kind", "name", {"a": 1})
    forget: llmq.Statement = ("DELETE FROM changes", ())

    def rows() -> Iterator[tuple[str]]:
        yield ("name",)
        raise ValueError

    with contextlib.suppress(ValueError, llmq.LlmqError):
        await store.write(forget, ("DELETE FROM changes WHERE name = ?", rows()))
    assert await store.read("SELECT name FROM changes") == [("name",)]
    await store.close()


# ---- Two at once, and the disk -------------------------------------------------------------------


async def test_a_batch_whose_last_lines_end_at_once_ends_once(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False, queue__slots=2) as (q, fake):
        told_end = q.service.runner.on_end[:]
        q.service.runner.on_end.clear()  # nobody looks until both have ended
        batch = await begin(q.port, named("a", "b"))
        for request in [await fake.arrived() for _ in range(2)]:
            await request.answer("done")
        two = {"total": 2, "completed": 2, "failed": 0}
        await until(q.port, batch["id"], lambda one: one["request_counts"] == two)
        q.service.runner.on_end.extend(told_end)
        batches = q.service.batches
        await asyncio.gather(*(batches.look(batch["id"]) for _ in range(2)))
        batch = await ended(q.port, batch["id"])
        files = (await get(q.port, "/v1/files"))["data"]
    assert [one["id"] for one in files] == [batch["output_file_id"], batch["input_file_id"]]


async def test_a_batch_that_ends_while_it_is_cancelled_has_ended(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (q, _):
        ident = (await begin(q.port, named("a")))["id"]
        found = (await q.service.batches.find(ident))._replace(ended=None)  # as it was just now
        assert (await ended(q.port, ident))["status"] == "completed"
        with contextlib.suppress(llmq.LlmqError):
            await q.service.batches.cancel(found)
        assert (await get(q.port, f"/v1/batches/{ident}"))["status"] == "completed"


async def test_a_batch_whose_end_could_not_be_kept_ends_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.01)
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("a"))
        write, refused = q.gateway.store.write, list[Any]()

        async def full(*statements: Any, **more: Any) -> Any:
            if any("INTO files" in sql for sql, _ in statements) and len(refused) < 2:
                refused.append(statements)
                raise llmq.LlmqError("the disk is full", "insufficient_storage")
            return await write(*statements, **more)

        monkeypatch.setattr(q.gateway.store, "write", full)
        await (await fake.arrived()).answer("a")
        batch = await ended(q.port, batch["id"])
        assert customs(await lines_of(q.port, batch)) == ["a"]
        assert len(refused) == 2


async def test_lines_that_could_not_be_looked_up_once_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.01)
    async with at_work(tmp_path) as (q, _):
        read, refused = q.gateway.store.read, list[str]()

        async def broken(sql: str, *values: Any) -> Any:
            if "AND priority = ?" in sql and not refused:
                refused.append(sql)
                raise llmq.LlmqError("another llmq has it", "insufficient_storage")
            return await read(sql, *values)

        monkeypatch.setattr(q.gateway.store, "read", broken)
        batch = await begin(q.port, named("a"))
        assert (await ended(q.port, batch["id"]))["status"] == "completed"
        assert len(refused) == 1
    assert "another llmq has it" in caplog.text


@pytest.mark.parametrize(
    ("limit", "most"), [({"rate": "2/h"}, 2), ({"tokens_per_day": 3}, 4)], ids=["rate", "budget"]
)
async def test_lines_wait_for_what_their_key_may_have_and_none_is_lost(
    limit: Any, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(llmq, "FED", 2)
    texts_ = [f"line-{number}" for number in range(8)]
    async with at_work(tmp_path, auto=False, keys=keyed(alice=limit)) as (q, fake):
        alice, refused = key("alice"), refusals(q, monkeypatch)
        batch = await begin(q.port, named(*texts_), alice)
        while len(refused) < 3:
            if fake.has_arrived():
                await answer_all(fake)
            await turns()
        assert 0 < len(fake.requests) <= most  # those that were fed already may run
        now = await get(q.port, f"/v1/batches/{batch['id']}", alice)
        assert (now["status"], now["request_counts"]["failed"]) == ("in_progress", 0)
        reload_with(q, keys=keyed(alice={}))
        while (now := await get(q.port, f"/v1/batches/{batch['id']}", alice))["status"] not in ENDS:
            pass
        assert now["request_counts"] == {"total": 8, "completed": 8, "failed": 0}
        assert len(fake.requests) == 8


# ---- Its end before its time ---------------------------------------------------------------------


async def test_a_cancelled_batch_keeps_what_was_done(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False, queue__slots=2) as (q, fake):
        batch = await begin(q.port, named("a", "b", "c", "d"))
        first, second = await fake.arrived(), await fake.arrived()
        await first.answer("done")
        third = await fake.arrived()
        one = {"total": 4, "completed": 1, "failed": 0}
        await until(q.port, batch["id"], lambda now: now["request_counts"] == one)
        answer = await ask(q.port, "POST", f"/v1/batches/{batch['id']}/cancel")
        assert answer.status == 200
        assert answer.json()["status"] in ("cancelling", "cancelled")
        await second.left()
        await third.left()
        batch = await ended(q.port, batch["id"])
        assert (batch["status"], batch["request_counts"]) == ("cancelled", one)
        assert batch["cancelled_at"] >= batch["cancelling_at"]
        assert batch["completed_at"] is None
        (line,) = await lines_of(q.port, batch)
        assert (line["custom_id"], said(line)) == ("a", "done")
        assert batch["error_file_id"] is None
        again = await ask(q.port, "POST", f"/v1/batches/{batch['id']}/cancel")
        assert (again.status, again.code) == (409, "conflict")
        other = await begin(q.port, named("e"))  # what waited has gone
        request = await fake.arrived()
        assert request.text == "e"
        await request.answer("e")
        assert (await ended(q.port, other["id"]))["status"] == "completed"
    assert not q.gateway.jobs.queued


async def test_of_a_cancelled_batch_nothing_more_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("a", "b", "c"))
        running_one, end = await fake.arrived(), q.gateway.jobs.end

        async def late(job: llmq.Job, *facts: Any) -> bool:
            if job.custom != "a":  # the disk takes its time
                await running_one.left()
                await turns(20)
            return bool(await end(job, *facts))

        monkeypatch.setattr(q.gateway.jobs, "end", late)
        await ask(q.port, "POST", f"/v1/batches/{batch['id']}/cancel")
        assert (await ended(q.port, batch["id"]))["status"] == "cancelled"
        await eventually(lambda: not q.gateway.jobs.active)
        other = await begin(q.port, named("d"))
        request = await fake.arrived()
        assert request.text == "d"
        await request.answer("d")
        await ended(q.port, other["id"])


async def test_a_batch_of_which_nothing_began_can_be_cancelled(tmp_path: Path) -> None:
    async with serving(tmp_path, "http://127.0.0.1:9") as q:
        batch = await begin(q.port, named("a", "b"))
        await ask(q.port, "POST", f"/v1/batches/{batch['id']}/cancel")
        batch = await ended(q.port, batch["id"])
        files = [batch["output_file_id"], batch["error_file_id"]]
        assert (batch["status"], files) == ("cancelled", [None, None])


async def test_of_a_cancelled_batch_no_body_and_no_header_field_is_kept(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        sql = "SELECT DISTINCT body, headers FROM jobs"
        batch = await begin(q.port, named("a", "b"))
        request = await fake.arrived()
        assert "application/json" in str(await q.gateway.store.read(sql))
        await ask(q.port, "POST", f"/v1/batches/{batch['id']}/cancel")
        await request.left()
        await ended(q.port, batch["id"])
        assert await q.gateway.store.read(sql) == [(None, "{}")]


@pytest.mark.parametrize("state", ["failed", "completed"])
async def test_a_batch_that_has_ended_cannot_be_cancelled(state: str, tmp_path: Path) -> None:
    async with at_work(tmp_path) as (q, _):
        batch = await begin(q.port, named("a") if state == "completed" else b"no lines")
        before = await ended(q.port, batch["id"])
        answer = await ask(q.port, "POST", f"/v1/batches/{batch['id']}/cancel")
        assert (answer.status, answer.code) == (409, "conflict")
        assert await get(q.port, f"/v1/batches/{batch['id']}") == before
        assert before["status"] == state


async def test_a_batch_cancelled_before_a_kill_stays_cancelled(tmp_path: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        flags = ("--port", "0", "--backend", fake.url, "--state", str(tmp_path / "state.db"))
        async with Process(*flags) as p:
            batch = await begin(p.port, named("a", "b"))
            request = await fake.arrived()
            await ask(p.port, "POST", f"/v1/batches/{batch['id']}/cancel")
            p.signal(signal.SIGKILL)
            await p.ended(0)
            await request.left()
        async with Process(*flags) as p:
            assert (await ended(p.port, batch["id"]))["status"] == "cancelled"
            other = await begin(p.port, named("c"))
            await (await fake.arrived()).answer("c")
            await ended(p.port, other["id"])
    assert [one.text for one in fake.requests] == ["a", "c"]


# ---- What is deleted -----------------------------------------------------------------------------


async def test_a_batch_goes_on_without_its_input_file(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        batch = await begin(q.port, named("a", "b"))
        file = batch["input_file_id"]
        first = await fake.arrived()
        assert (await ask(q.port, "DELETE", f"/v1/files/{file}")).status == 200
        assert (await content_of(q.port, file)).status == 404
        assert (await post_batch(q.port, file)).status == 404
        await first.answer("a")
        await (await fake.arrived()).answer("b")
        batch = await ended(q.port, batch["id"])
        assert batch["input_file_id"] == file
        assert customs(await lines_of(q.port, batch)) == ["a", "b"]


async def test_a_deleted_output_is_gone_and_its_batch_is_not(tmp_path: Path) -> None:
    async with at_work(tmp_path) as (q, _):
        batch = await begin(q.port, named("a"))
        batch = await ended(q.port, batch["id"])
        output = batch["output_file_id"]
        assert (await ask(q.port, "DELETE", f"/v1/files/{output}")).json() == {
            "id": output,
            "object": "file",
            "deleted": True,
        }
        for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert (await ask(q.port, method, f"/v1/files/{output}{end}")).status == 404
        assert await get(q.port, f"/v1/batches/{batch['id']}") == batch


async def test_a_file_deleted_just_before_it_is_read_is_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as q:
        file = await q.service.batches.find_file(await upload(q.port, b"x"))
        await ask(q.port, "DELETE", f"/v1/files/{file.id}")
        with pytest.raises(llmq.LlmqError) as caught:
            [piece async for piece in q.service.batches.content(file)]
        assert caught.value.code == "not_found"


async def test_what_was_kept_long_enough_is_let_go(tmp_path: Path) -> None:
    async with at_work(tmp_path, auto=False) as (q, fake):
        unused = await upload(q.port, b"x")
        old, going = await begin(q.port, named("a")), await begin(q.port, named("b", "c"))
        await (await fake.arrived()).answer("a")
        old = await ended(q.port, old["id"])
        request = await fake.arrived()
        expire = q.service.batches.expire
        await expire(min(old["created_at"], old["completed_at"]) - 1)
        assert len((await get(q.port, "/v1/files"))["data"]) == 4
        await expire(time.time() + 1)
        gone = [old["input_file_id"], old["output_file_id"], unused]
        for ident in gone:
            assert (await content_of(q.port, ident)).status == 404
        assert (await ask(q.port, "GET", f"/v1/batches/{old['id']}")).status == 404
        assert [one["id"] for one in (await get(q.port, "/v1/batches"))["data"]] == [going["id"]]
        assert (await content_of(q.port, going["input_file_id"])).body == named("b", "c")
        await request.answer("b")
        await (await fake.arrived()).answer("c")
        going = await ended(q.port, going["id"])
        assert customs(await lines_of(q.port, going)) == ["b", "c"]
        rows = await q.gateway.store.read("SELECT DISTINCT batch FROM jobs")
        assert rows == [(going["id"],)]


# ---- Who reads slowly ----------------------------------------------------------------------------

PIECES = 40  # lines of an output, each of
PIECE = 512 * 1024  # bytes


class Reads:
    """How many lines of outputs llmq has read so far, and whether it waits for its client."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, q: running) -> None:
        self.count = 0
        self.waits = asyncio.Event()
        read, catch_up = q.gateway.store.read, llmq.Exchange.catch_up

        async def counted(sql: str, *values: Any) -> Any:
            self.count += "answer FROM jobs" in sql
            return await read(sql, *values)

        async def waited(exchange: llmq.Exchange) -> None:
            self.waits.set()
            await catch_up(exchange)

        monkeypatch.setattr(q.gateway.store, "read", counted)
        monkeypatch.setattr(llmq.Exchange, "catch_up", waited)


async def slow_reader(q: running) -> tuple[Raw, int]:
    """A client that has asked for a long output and reads nothing of it; how long that is."""
    batch = await begin(q.port, named(*(f"line-{one}" for one in range(PIECES))))
    batch = await ended(q.port, batch["id"])
    output = await get(q.port, f"/v1/files/{batch['output_file_id']}")
    raw = await Raw.open(q.port, receive_buffer=4096)
    await raw.send(http("GET", f"/v1/files/{output['id']}/content"))
    return raw, int(output["bytes"])


async def test_of_an_output_no_more_is_read_than_its_client_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Talker() as fake, serving(tmp_path, fake.url) as q:
        reads = Reads(monkeypatch, q)
        raw, size = await slow_reader(q)
        await reads.waits.wait()
        assert reads.count < PIECES * 3 // 4
        assert (await ask(q.port, "GET", "/health")).status == 200
        answer = await raw.response()
        assert (answer.status, answer.clean, len(answer.body)) == (200, True, size)
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert customs(lines) == [f"line-{one}" for one in range(PIECES)]


async def test_an_output_whose_client_leaves_is_read_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Talker() as fake, serving(tmp_path, fake.url) as q:
        reads = Reads(monkeypatch, q)
        raw, _ = await slow_reader(q)
        await reads.waits.wait()
        raw.rst()
        await eventually(lambda: len(connections(q)) == 0)
        assert reads.count < PIECES * 3 // 4
        assert (await ask(q.port, "GET", "/health")).status == 200


async def test_an_output_that_is_let_go_while_it_is_read_does_not_seem_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Talker() as fake, serving(tmp_path, fake.url) as q:
        reads = Reads(monkeypatch, q)
        raw, size = await slow_reader(q)
        await reads.waits.wait()
        await q.service.batches.expire(time.time() + 1)
        answer = await raw.response()
        assert (answer.status, answer.clean) == (200, False)
        assert len(answer.body) < size


def connections(q: running) -> list[Any]:
    return [one for server in q.service._servers for one in server.connections]


class Talker(FakeBackend):
    """A runner that says a lot."""

    async def _answer(self, request: FakeRequest) -> None:
        with contextlib.suppress(ConnectionError):
            await request.answer("x" * PIECE)


async def test_a_line_that_waits_again_counts_once_for_the_rate_of_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.02)
    settings = {"queue__down_wait": 0.05, "upstream__probe_interval": 0.05}
    keys = keyed(alice={"rate": "100/h"})
    async with at_work(tmp_path, keys=keys, **settings) as (q, fake):
        await fake.stop_listening()
        fake.drop_connections()
        await begin(q.port, named("a"), key("alice"))
        recent, alice = q.gateway.journal.recent, q.gateway.accounts.named["alice"]
        await eventually(lambda: [one.outcome for one in recent].count("backend_down") > 5)
        assert not fake.requests
        await fake.listen_again()
        await eventually(lambda: fake.requests and not q.gateway.jobs.active)
        assert 99 <= alice.left < 99.9  # of 100: its one line
