"""Every library by every scenario: the programs that users have get from llmq what they expect."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ClassVar

import pytest

from tests.cdp import Browser, Page
from tests.fake_ollama import Recording, told, turns
from tests.fake_ollama import Runner as Fake
from tests.fakes import (
    FakeBackend,
    FakeRequest,
    ask,
    chunk,
    eventually,
    need,
    render_answer,
    render_head,
    running,
)
from tests.real import peers
from tests.real.drivers import Driver, Jobs, Work
from tests.real.peers import Missing, Runner
from tests.real.wires import WIRE, Wire

REAL = Path(__file__).resolve().parent / "real"
READY = 30  # seconds for all drivers to load their libraries, side by side
LATE = 20  # seconds for one job; the clients' own time-outs are as long
INTERVAL = 0.25  # the shortest that llmq's sweep of its deadlines can keep
BEATING = {
    "server__heartbeat_after": 0.3,
    "server__heartbeat_interval": INTERVAL,
    "server__whole_heartbeat_after": 0.3,
}
SIGNS = 11  # of life, an interval between two: a wait ten times longer than the interval
IMPATIENT = 2  # seconds without a byte that a client bears where a test wants to see it bear them
TOLD = " 995 996 997 998 999"  # after "go 994"
ORIGIN = "page.example"  # the host whose page asks


# ---- Libraries -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A row of the matrix: what a program uses, and the dialect that it speaks."""

    name: str
    package: str
    dialect: str
    raises: dict[str, str]  # what its users catch, by failure

    @property
    def node(self) -> bool:
        return self.name.endswith("-node")

    @property
    def command(self) -> list[str]:
        """Its driver in tests/real/."""
        base, _, more = self.name.partition("-")
        script = REAL / f"drive_{base}.{'mjs' if self.node else 'py'}"
        if self.node:
            return ["node", str(script)]
        return [peers.python(), str(script), *([more] if base == "langchain" else [])]

    def __str__(self) -> str:
        return self.name


STAINLESS = {  # OpenAI's and Anthropic's libraries come from one generator
    "unknown": "NotFoundError",
    "full": "RateLimitError",
    "late stream": "APIError",
    "late whole": "APIConnectionError",
    "broken stream": "APIError",
    "cancelled": "CancelledError",
}
IN_OLLAMA = {
    "unknown": "ResponseError",
    "full": "ResponseError",
    "late stream": "ResponseError",
    "late whole": "RemoteProtocolError",
    "broken stream": "ResponseError",
    "cancelled": "CancelledError",
}
IN_NODE = {**STAINLESS, "late whole": "TypeError", "cancelled": "APIUserAbortError"}
OLLAMA_IN_NODE = {
    **IN_OLLAMA,
    "late stream": "Error",
    "late whole": "TypeError",
    "broken stream": "Error",
    "cancelled": "AbortError",
}
STREAMED = {**IN_OLLAMA, "late whole": "ResponseError"}  # LangChain streams whatever is asked
IN_PAGES = {  # fetch() knows no errors of a dialect: a driver's own, and broken connections
    "unknown": "HttpError",
    "full": "HttpError",
    "late stream": "TypeError",
    "late whole": "TypeError",
    "broken stream": "TypeError",
    "cancelled": "AbortError",
}
PROGRAMS = {  # driver: package, dialect, what it raises
    "openai-python": ("openai", "openai", STAINLESS),
    "openai-node": ("openai", "openai", IN_NODE),
    "ollama-python": ("ollama", "ollama", IN_OLLAMA),
    "ollama-node": ("ollama", "ollama", OLLAMA_IN_NODE),
    "anthropic-python": ("anthropic", "anthropic", STAINLESS),
    "anthropic-node": ("@anthropic-ai/sdk", "anthropic", IN_NODE),
    "langchain-openai": ("langchain-openai", "openai", STAINLESS),
    "langchain-ollama": ("langchain-ollama", "ollama", STREAMED),
    "fetch": ("", "openai", IN_PAGES),
}
LIBRARIES = [Library(name, *facts) for name, facts in PROGRAMS.items()]
LANGCHAIN = "LangChain has no call for it"
NO_EMBEDDINGS = "Anthropic's API has none"
NOT_APPLICABLE = {  # library, scenario: why the cell is empty
    ("langchain-openai", "list"): LANGCHAIN,
    ("langchain-ollama", "list"): LANGCHAIN,
    ("anthropic-python", "embeddings"): NO_EMBEDDINGS,
    ("anthropic-node", "embeddings"): NO_EMBEDDINGS,
    ("fetch", "tools"): "`fetch` carries JSON and knows no tools",
}
SCENARIOS: dict[str, str] = {}  # the columns: those that a test below proves


def able(scenario: str) -> list[Library]:
    """The libraries for which the scenario has a meaning."""
    return [one for one in LIBRARIES if (one.name, scenario) not in NOT_APPLICABLE]


def each(scenario: str) -> Any:
    """A column of the matrix: the test runs once for each library that can."""

    def column(test: Callable[..., Any]) -> Any:
        SCENARIOS[scenario] = test.__name__
        return pytest.mark.parametrize("library", able(scenario), ids=str)(test)

    return column


def version(library: Library) -> str:
    """As tests/real/ pins it."""
    if library.node:
        return str(json.loads((REAL / "package.json").read_text())["dependencies"][library.package])
    pins = (REAL / "requirements.txt").read_text()
    return re.findall(rf"^{re.escape(library.package)}==(\S+)$", pins, re.MULTILINE)[0]


def title(library: Library) -> str:
    """How the README names it."""
    if not library.package:
        return "`fetch` in Chromium, from a page of another origin"
    return f"{library.package} {version(library)} ({'Node' if library.node else 'Python'})"


def clients_markdown() -> str:
    """The matrix for the README: a cell says yes when a test of this file proves it."""
    reasons = list(dict.fromkeys(NOT_APPLICABLE.values()))

    def cell(library: Library, scenario: str) -> str:
        reason = NOT_APPLICABLE.get((library.name, scenario))
        return f"no ({reasons.index(reason) + 1})" if reason else "yes"

    rows = [["", *SCENARIOS], ["---"] * (1 + len(SCENARIOS))]
    rows += [[title(one), *(cell(one, scenario) for scenario in SCENARIOS)] for one in LIBRARIES]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"({number}) {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", " ".join(notes), ""])


# ---- Between them ----------------------------------------------------------------------------


class Listener:
    """A small server; with its block ends all that it has begun."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Any:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for listening in self.server.sockets:  # to close them now could lose a client
            asyncio.get_running_loop().remove_reader(listening.fileno())
        await turns()
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for writer in self.writers:
            writer.transport.abort()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)  # here, for its task may be cancelled before it begins
        self.begin(self.serve(reader, writer))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class EmptyPage(Listener):
    """A site with one page that does nothing."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(render_answer(200, b"<!doctype html>", [("Content-Type", "text/html")]))
        writer.close()


class Tap(Listener):
    """A wire that keeps a copy: whoever connects to its port is led to `target`."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = target
        self.up = self.down = b""

    @property
    def body(self) -> bytes:
        """What came of the answer to the last request so far, its chunks put together."""
        *_, last = re.split(rb"(?=HTTP/1\.1 \d)", self.down)
        head, _, rest = last.partition(b"\r\n\r\n")
        if b"chunked" not in head.lower():
            return rest
        body = b""
        while match := re.match(rb"([0-9a-f]+)\r\n", rest):
            size = int(match[1], 16)
            body += rest[match.end() : match.end() + size]
            rest = rest[match.end() + size + 2 :]
        return body

    @property
    def complete(self) -> bool:
        """Whether the last chunk came."""
        return self.down.endswith(b"0\r\n\r\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers.append(back)
        ways = [self.copy(reader, back, "up"), self.copy(there, writer, "down")]
        await asyncio.wait(map(self.begin, ways), return_when=asyncio.FIRST_COMPLETED)
        writer.close()  # what was written still goes out
        back.close()

    async def copy(self, reader: asyncio.StreamReader, writer: Any, way: str) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                setattr(self, way, getattr(self, way) + data)
                writer.write(data)
                await writer.drain()


# ---- The drivers and the runner --------------------------------------------------------------


Drivers = dict[str, "Driver | Browser | str"]


@pytest.fixture(scope="module")
def drivers() -> Iterator[Drivers]:
    """A driver for each library, or the reason why there is none."""
    with contextlib.ExitStack() as stack:
        browser = attempt(functools.partial(begin_browser, stack))
        started: Drivers = {
            one.name: attempt(functools.partial(begin, one, stack)) if one.package else browser
            for one in LIBRARIES
        }
        for name, driver in started.items():
            if isinstance(driver, Driver):
                started[name] = attempt(functools.partial(driver.is_ready, READY))
        yield started


def attempt(start: Callable[[], Any]) -> Any:
    """What `start` gives, or the reason why this machine cannot."""
    try:
        return start()
    except Missing as reason:
        return str(reason)


def begin(library: Library, stack: contextlib.ExitStack) -> Driver:
    """Its driver, which ends with the stack."""
    folder = peers.node_folder() if library.node else REAL
    return stack.enter_context(Driver(library.command, folder))


def begin_browser(stack: contextlib.ExitStack) -> Browser:
    """A browser for which every page of ORIGIN is served by this machine."""
    browser = Browser(peers.found("chromium"), f"--host-resolver-rules=MAP {ORIGIN} 127.0.0.1")
    stack.callback(browser.close)
    return browser


@contextlib.asynccontextmanager
async def at_work(library: Library, drivers: Drivers) -> AsyncIterator[Jobs]:
    """The jobs of this library; without its driver the test is skipped."""
    driver = drivers[library.name]
    if isinstance(driver, str):
        need(False, driver)
    elif isinstance(driver, Driver):
        yield driver
        assert not driver.unhandled
    else:
        async with EmptyPage() as site, driver.page() as page:
            yield await InPage.at(f"http://{ORIGIN}:{site.port}/", page)


class InPage(Jobs):
    """What a page does with fetch(); its script speaks the protocol of drive.py."""

    @classmethod
    async def at(cls, url: str, page: Page) -> InPage:
        jobs = cls()
        jobs.page, jobs.note, jobs.sent = page, page.note, set()
        page.note = jobs.listen
        await page.call("Runtime.addBinding", name="say")
        await page.goto(url)
        await page.js((REAL / "drive_fetch.js").read_text())
        return jobs

    def listen(self, event: str, facts: Any) -> None:
        if event == "Runtime.bindingCalled":
            self.hear(facts["payload"])
        else:
            self.note(event, facts)

    def send(self, line: str) -> None:
        self.sent.add(asyncio.ensure_future(self.page.js(f"obey({line})")))


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """llama.cpp's server, which speaks OpenAI's and Anthropic's dialects and can embed."""
    try:
        with Runner(peers.python(), "quick", "--embeddings") as quick:
            yield quick.ready()
    except Missing as reason:
        need(False, str(reason))


class Replay(Fake):
    """An Ollama that answers with what the real one answered, byte for byte.

    Asked for anything else it sends three pieces, and then nothing until its client leaves.
    """

    RECORDED: ClassVar = {  # what is asked for, how it was recorded
        ("/api/chat", "go 994", True): "ollama.api-chat-stream",
        ("/api/chat", "go 994", False): "ollama.api-chat",
        ("/api/generate", "hello", True): "ollama.api-generate-stream",
    }

    def __init__(self) -> None:
        super().__init__(["counter:latest", "slow:latest"], reply=self.replay)
        for name in ("version", "tags", "ps"):
            self.probe_answers[f"/api/{name}"] = (200, Recording(f"ollama.api-{name}").body)

    async def replay(self, request: FakeRequest) -> None:
        body = request.json
        asked = (request.path, body.get("prompt") or request.text, body.get("stream", True))
        if asked in self.RECORDED:
            await Recording(self.RECORDED[asked]).replay(request)
            return
        [start, *_] = Recording("ollama.api-chat-stream").pieces
        await request.send(render_head(200, WIRE["ollama"].head))
        for number in (1, 2, 3):
            await request.send(chunk(start.replace(b" 995", b" %d" % number)))
        await request.left()


class Home:
    """llmq, and behind it the runner that speaks this library's dialect."""

    def __init__(self, q: running, runner: Runner | Replay) -> None:
        self.q = q
        self.runner = runner

    def busy(self) -> bool:
        """What the runner itself says."""
        return bool(self.runner.tasks() if isinstance(self.runner, Runner) else self.runner.active)

    async def mode(self, name: str) -> None:
        answer = await ask(self.q.port, "POST", "/llmq/mode", json={"mode": name})
        assert answer.status == 200, answer

    async def wait(self, number: int) -> None:
        """Return once exactly so many wait in the queue."""
        waiting = -1
        while waiting != number:
            waiting = (await self.q.status())["queue"]["waiting"]

    async def outcomes(self) -> list[str]:
        return [ended["outcome"] for ended in (await self.q.status())["recent"]]


@contextlib.asynccontextmanager
async def at_home(library: Library, runner: Runner, **settings: Any) -> AsyncIterator[Home]:
    """llama.cpp where it speaks the dialect, else the replayed Ollama."""
    async with contextlib.AsyncExitStack() as stack:
        here: Runner | Replay = runner
        if library.dialect == "ollama":
            here = await stack.enter_async_context(Replay())
        q = await stack.enter_async_context(running(here.url, **settings))
        await told(q)
        yield Home(q, here)


async def over(work: Work) -> Work:
    """The job once it has ended."""
    await eventually(lambda: work.over, LATE)
    return work


async def done(work: Work) -> Any:
    """What the job gave."""
    await over(work)
    assert work.raised is None, work
    return work.done


async def raised(work: Work) -> dict[str, Any]:
    """What the job raised; it must have given nothing."""
    await over(work)
    assert work.raised is not None, work
    return work.raised


def assert_kind(library: Library, failure: str, error: dict[str, Any]) -> None:
    """The exception is the one that this library's users catch."""
    assert library.raises[failure] in error["kinds"], error


# ---- Plain requests --------------------------------------------------------------------------

ENDS = {"openai": "stop", "anthropic": "end_turn", "ollama": "stop"}


@each("list")
async def test_it_lists_the_models(library: Library, drivers: Drivers, runner: Runner) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        models = await done(jobs.start("models", url=home.q.base))
    replayed = ["counter:latest", "slow:latest"]
    assert models == (replayed if library.dialect == "ollama" else ["counter"])


@each("whole")
async def test_it_gets_a_whole_answer(library: Library, drivers: Drivers, runner: Runner) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        wanted = {"url": home.q.base, "model": "counter", "text": "go 994"}
        for job in ("whole", "whole_async"):
            answer = await done(jobs.start(job, **wanted))
            assert answer == {"text": TOLD, "finish": ENDS[library.dialect], "tokens": 6}


@each("stream")
async def test_it_reads_a_stream_piece_by_piece(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        wanted = {"url": home.q.base, "model": "counter", "text": "go 994"}
        for job in ("stream", "stream_async"):
            work = jobs.start(job, **wanted)
            answer = await done(work)
            assert answer == {"text": TOLD, "finish": ENDS[library.dialect], "tokens": 6}
            assert "".join(work.pieces) == TOLD
            assert len(work.pieces) > 1


@each("embeddings")
async def test_it_gets_embeddings(library: Library, drivers: Drivers, runner: Runner) -> None:
    async with at_work(library, drivers) as jobs, running(runner.url) as q:
        wanted = {"model": "counter", "texts": ["hello", "go 7"]}
        rows = await done(jobs.start("embeddings", url=q.base, **wanted))
        direct = await ask(runner.port, "POST", "/v1/embeddings", json={"input": wanted["texts"]})
    expected = [row["embedding"] for row in direct.json()["data"]]
    assert [len(row) for row in rows] == [512, 512]
    for row, right in zip(rows, expected):
        assert row == pytest.approx(right, abs=1e-5)


# ---- Tools -----------------------------------------------------------------------------------


def scripted(library: Library) -> FakeBackend:
    """A runner that speaks the library's dialect, every answer in the test's hand."""
    if library.dialect == "ollama":
        return Fake(["counter:latest"])
    return FakeBackend(["counter"], kind="llamacpp", auto=False)


async def arrived(fake: FakeBackend, path: str, *works: Work) -> FakeRequest:
    """The next request at the runner; fails when all of these jobs have ended without one."""
    await eventually(lambda: fake.has_arrived() or all(work.over for work in works), LATE)
    assert fake.has_arrived(), works
    request = await fake.arrived()
    assert request.path.split("?")[0] == path
    return request


async def send(request: FakeRequest, wire: Wire, pieces: list[bytes]) -> None:
    """A stream without its end."""
    await request.send(render_head(200, wire.head) + b"".join(map(chunk, pieces)))


@each("tools")
async def test_it_calls_a_tool_and_is_told_its_result(library: Library, drivers: Drivers) -> None:
    wire = WIRE[library.dialect]
    async with at_work(library, drivers) as jobs, scripted(library) as fake, running(fake.url) as q:
        for stream in (False, True):
            work = jobs.start("tools", url=q.base, model="counter", stream=stream)
            first = await arrived(fake, wire.path, work)
            assert streams(first) is (stream or library.raises is STREAMED)
            await tell(first, wire, wire.call, wire.called)
            second = await arrived(fake, wire.path, work)
            await tell(second, wire, wire.text, [json.dumps(wire.text).encode() + b"\n"])
            answer = await done(work)
            if isinstance(answer["arguments"], str):
                answer["arguments"] = json.loads(answer["arguments"])
            told = {"name": "weather", "arguments": {"place": "Rome"}}
            assert answer == {**told, "finish": wire.finish, "text": "warm"}
            assert_tool_told(library, first.json, second.json)


def streams(request: FakeRequest) -> bool:
    """Whether a stream is asked for; all of these libraries say so if it is."""
    return request.json.get("stream") is True


async def tell(request: FakeRequest, wire: Wire, whole: Any, streamed: list[bytes]) -> None:
    """An answer as it was asked for."""
    if not streams(request):
        await request.status(200, whole)
        return
    await send(request, wire, streamed)
    request.finished()
    await request.send(b"0\r\n\r\n")


def assert_tool_told(library: Library, first: Any, second: Any) -> None:
    """The runner knew the tool, and then its result."""
    [tool] = first["tools"]
    assert tool.get("function", tool)["name"] == "weather"
    *_, call, result = second["messages"]
    if library.dialect == "anthropic":
        [block] = call["content"]
        assert (block["type"], block["input"]) == ("tool_use", {"place": "Rome"})
        [told] = result["content"]
        assert (told["type"], told["tool_use_id"]) == ("tool_result", "toolu_1")
    else:
        [one] = call["tool_calls"]
        given = one["function"]["arguments"]
        assert (json.loads(given) if isinstance(given, str) else given) == {"place": "Rome"}
        assert (result["role"], result["content"]) == ("tool", "22 degrees")


# ---- Errors ----------------------------------------------------------------------------------


@each("errors")
async def test_errors_are_raised_as_its_users_catch_them(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    few = {"queue__max_depth": 2}  # of which one client may fill half
    async with at_work(library, drivers) as jobs, at_home(library, runner, **few) as home:
        wanted = {"url": home.q.base, "text": "go 994"}
        for job in ("whole", "stream"):
            unknown = await raised(jobs.start(job, model="nobody", **wanted))
            assert_kind(library, "unknown", unknown)
            assert unknown.get("status_code", 404) == 404
            assert "nobody" in unknown["text"]
            if library.raises["unknown"] == "NotFoundError":  # where an error can tell whose it is
                assert unknown["request_id"]
        await home.mode("paused")
        waiting = jobs.start("whole", model="counter", **wanted)
        await home.wait(1)
        for job in ("whole", "stream"):
            full = await raised(jobs.start(job, model="counter", **wanted))
            assert_kind(library, "full", full)
            assert full.get("status_code", 429) == 429
        await home.mode("open")
        assert (await done(waiting))["text"] == TOLD


# ---- Leaving ---------------------------------------------------------------------------------


@each("cancel")
async def test_a_cancelled_request_leaves_the_queue_or_the_runner(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        wanted = {"url": home.q.base, "model": "counter"}
        await home.mode("paused")
        for count, job in enumerate(("whole_async", "stream_async"), 1):
            work = jobs.start(job, text="go 994", **wanted)
            await home.wait(1)
            work.cancel()
            assert_kind(library, "cancelled", await raised(work))
            await home.wait(0)
            assert await home.outcomes() == ["client_left"] * count
        assert not home.busy()
        await home.mode("open")
        work = jobs.start("stream_async", text="hello", **wanted)
        await eventually(lambda: len(work.pieces) >= 2, LATE)
        assert home.busy()
        work.cancel()
        assert_kind(library, "cancelled", await raised(work))
        await eventually(lambda: not home.busy(), 1)  # second, the contract's word
        assert len(work.pieces) < 900
        assert await home.outcomes() == ["client_left"] * 3


# ---- Waiting ---------------------------------------------------------------------------------


def signs(library: Library, job: str, body: bytes) -> int:
    """Signs of life before the answer, and nothing else before it."""
    if job == "whole" or library.dialect == "ollama":
        return len(body) - len(body.lstrip(b" "))
    sign = {
        "openai": rb": position=\d+(?: eta=\d+)?\n",
        "anthropic": rb'event: ping\ndata: \{"type":"ping"\}\n\n',
    }[library.dialect]
    return len(re.findall(sign, re.match(rb"(?:%s)*" % sign, body)[0]))


def signs_of(library: Library, taps: dict[str, Tap]) -> list[int]:
    """The signs of life that each job has been shown so far."""
    return [signs(library, job, tap.body) for job, tap in taps.items()]


@dataclass
class Waited:
    """How a request that waited long went."""

    work: Work
    signs: int


async def wait_long(library: Library, drivers: Drivers, runner: Runner) -> dict[str, Waited]:
    """A whole and a streamed request wait side by side until each has seen its signs of life."""
    async with at_work(library, drivers) as jobs, at_home(library, runner, **BEATING) as home:
        await home.mode("paused")
        async with Tap(home.q.port) as whole, Tap(home.q.port) as stream:
            wanted = {"model": "counter", "text": "go 994", "timeout": IMPATIENT}
            taps = {"whole": whole, "stream": stream}
            works = {job: jobs.start(job, url=tap.url, **wanted) for job, tap in taps.items()}

            def enough() -> bool:
                over = any(work.over for work in works.values())
                return over or min(signs_of(library, taps)) >= SIGNS

            with contextlib.suppress(AssertionError):  # then too few are counted below
                await eventually(enough, LATE)
            counted = signs_of(library, taps)
            await home.mode("open")
            for work in works.values():
                with contextlib.suppress(AssertionError):
                    await over(work)
    return {job: Waited(work, seen) for (job, work), seen in zip(works.items(), counted)}


@pytest.fixture(scope="module")
def waits(drivers: Drivers, runner: Runner) -> dict[str, dict[str, Waited]]:
    """Every library waits at the same time, for it takes long."""
    there = [one for one in able("wait") if not isinstance(drivers[one.name], str)]

    async def all_of_them() -> list[dict[str, Waited]]:
        return await asyncio.gather(*(wait_long(one, drivers, runner) for one in there))

    return {one.name: waited for one, waited in zip(there, asyncio.run(all_of_them()))}


@each("wait")
def test_it_bears_a_wait_ten_times_longer_than_between_two_signs_of_life(
    library: Library, drivers: Drivers, waits: dict[str, dict[str, Waited]]
) -> None:
    if library.name not in waits:
        need(False, str(drivers[library.name]))
    for job, waited in waits[library.name].items():
        assert waited.work.raised is None, (job, waited)
        assert waited.work.done == {"text": TOLD, "finish": ENDS[library.dialect], "tokens": 6}
        assert waited.signs >= SIGNS, (job, waited)


# ---- Failing late ----------------------------------------------------------------------------


@each("late failure")
async def test_a_failure_after_the_early_head_is_raised(library: Library, drivers: Drivers) -> None:
    wire = WIRE[library.dialect]
    async with at_work(library, drivers) as jobs, scripted(library) as fake:
        async with running(fake.url, **BEATING) as q, Tap(q.port) as whole, Tap(q.port) as stream:
            taps = {"whole": whole, "stream": stream}
            wanted = {"model": "counter", "text": "hello"}
            works = {job: jobs.start(job, url=tap.url, **wanted) for job, tap in taps.items()}
            for _ in works:  # one of them runs, the other one waits for it
                request = await arrived(fake, wire.path, *works.values())
                await eventually(lambda: min(signs_of(library, taps)) >= 2)
                await request.status(500, wire.error)
            for job, work in works.items():
                assert_kind(library, f"late {job}", await raised(work))
                assert work.pieces == []
                assert b"out of memory" in taps[job].body
                assert_incomplete(taps[job])


@each("broken stream")
async def test_a_stream_that_breaks_is_raised(library: Library, drivers: Drivers) -> None:
    wire = WIRE[library.dialect]
    async with at_work(library, drivers) as jobs, scripted(library) as fake:
        async with running(fake.url) as q, Tap(q.port) as tap:
            work = jobs.start("stream", url=tap.url, model="counter", text="hello")
            request = await arrived(fake, wire.path, work)
            await send(request, wire, wire.begun)
            await eventually(lambda: work.pieces == [" 1", " 2"] or work.over)
            request.reset()
            error = await raised(work)
            assert_kind(library, "broken stream", error)
            assert work.pieces == [" 1", " 2"]
            assert_incomplete(tap)


def assert_incomplete(tap: Tap) -> None:
    """Nothing in it could be taken for the end of a good answer."""
    assert not tap.complete
    for mark in (b"[DONE]", b'"done":true', b'"done": true', b"message_stop", b'"stop"'):
        assert mark not in tap.body


# ---- What only some of them do ---------------------------------------------------------------


def only(*names: str) -> Any:
    """The test runs for these libraries."""
    return pytest.mark.parametrize(
        "library", [one for one in LIBRARIES if one.name in names], ids=str
    )


@only("openai-python", "openai-node")
async def test_the_responses_dialect_is_streamed(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        wanted = {"url": home.q.base, "model": "counter", "text": "hello", "limit": 4}
        work = jobs.start("responses", **wanted)
        answer = await done(work)
    assert work.pieces == [" 1", " 2", " 3", " 4"]
    assert answer == {"text": " 1 2 3 4", "finish": "completed", "tokens": 4}


@only("openai-python", "openai-node")
async def test_a_late_failure_in_the_responses_dialect_is_raised(
    library: Library, drivers: Drivers
) -> None:
    async with at_work(library, drivers) as jobs, scripted(library) as fake:
        async with running(fake.url, **BEATING) as q, Tap(q.port) as tap:
            work = jobs.start("responses", url=tap.url, model="counter", text="hello", limit=4)
            request = await arrived(fake, "/v1/responses", work)
            await eventually(lambda: signs(library, "stream", tap.body) >= 2)
            await request.status(500, WIRE["openai"].error)
            assert_kind(library, "late stream", await raised(work))
            assert b"out of memory" in tap.body
            assert_incomplete(tap)


@only("anthropic-python", "anthropic-node")
async def test_tokens_are_counted_as_the_runner_counts_them(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        wanted = {"model": "counter", "text": "hello"}
        through = await done(jobs.start("count", url=home.q.base, **wanted))
        direct = await done(jobs.start("count", url=runner.url, **wanted))
    assert through == direct > 0


@only("ollama-python", "ollama-node")
async def test_text_is_generated_without_messages(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        wanted = {"url": home.q.base, "model": "counter", "text": "hello", "limit": 4}
        work = jobs.start("generate", **wanted)
        answer = await done(work)
    assert work.pieces == [" 1", " 2", " 3", " 4"]
    assert answer == {"text": " 1 2 3 4", "finish": "length", "tokens": 4}


@only("ollama-python", "ollama-node", "langchain-ollama")
async def test_a_runner_that_does_not_speak_ollamas_dialect_serves_it_too(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, running(runner.url) as q:
        await told(q)
        wanted = {"url": q.base, "model": "counter", "text": "hello", "limit": 4}
        for job in ("whole", "stream"):
            answer = await done(jobs.start(job, **wanted))
            assert answer == {"text": " 1 2 3 4", "finish": "length", "tokens": 4}, job
        if library.name.startswith("ollama"):
            assert await done(jobs.start("models", url=q.base)) == ["counter"]
            work = jobs.start("generate", **wanted)
            answer = await done(work)
            assert (answer["finish"], len(work.pieces)) == ("length", 4)


@only("openai-python", "openai-node")
async def test_an_answer_translated_from_ollamas_dialect_is_read_like_any_other(
    library: Library, drivers: Drivers
) -> None:
    async with at_work(library, drivers) as jobs, Replay() as replay, running(replay.url) as q:
        await told(q)
        wanted = {"url": q.base, "model": "counter", "text": "go 994", "more": {"numCtx": 6000}}
        for job in ("whole", "stream"):
            answer = await done(jobs.start(job, **wanted))
            assert answer == {"text": TOLD, "finish": "stop", "tokens": 6}, job
    assert [one.path for one in replay.requests] == ["/api/chat", "/api/chat"]
    assert [one.json["options"]["num_ctx"] for one in replay.requests] == [6000, 6000]


@only("fetch")
async def test_a_page_of_another_origin_is_granted_what_its_browser_asks_for(
    library: Library, drivers: Drivers, runner: Runner
) -> None:
    async with at_work(library, drivers) as jobs, at_home(library, runner) as home:
        async with Tap(home.q.port) as tap:
            wanted = {"url": tap.url, "model": "counter", "text": "go 994"}
            headers = await done(jobs.start("headers", **wanted))
            listed = (await home.q.status())["clients"]
    preflight, request = re.findall(
        rb"(OPTIONS|POST) /v1/chat/completions HTTP/1.1(.*?)\r\n\r\n", tap.up, re.DOTALL
    )
    assert (preflight[0], request[0]) == (b"OPTIONS", b"POST")
    assert b"Access-Control-Request-Headers: content-type" in preflight[1]
    for asked in (preflight, request):
        assert f"Origin: http://{ORIGIN}:".encode() in asked[1]
    for name in ("x-llmq-backend", "x-llmq-wait-ms", "x-llmq-id", "x-request-id"):
        assert headers[name], "a page can read it"
    assert any(ORIGIN in client["name"] for client in listed)


# ---- The table -------------------------------------------------------------------------------


def test_every_cell_of_the_matrix_is_proved_or_has_its_reason() -> None:
    table = clients_markdown()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [1 + len(SCENARIOS)] * (2 + len(LIBRARIES))
    proved = {
        (one.name, scenario)
        for scenario, name in SCENARIOS.items()
        for mark in globals()[name].pytestmark
        for one in mark.args[1]
        if mark.name == "parametrize"
    }
    assert table.count("yes") == len(proved)
    cells = {(one.name, scenario) for one in LIBRARIES for scenario in SCENARIOS}
    assert cells - proved == set(NOT_APPLICABLE)
