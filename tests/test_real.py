"""llmq before a real runner (llama.cpp), asked by curl and the official OpenAI clients."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import (
    Answer,
    FakeBackend,
    Process,
    ask,
    chat,
    eventually,
    need,
    require_command,
    running,
)
from tests.real import peers
from tests.real.peers import Missing, Runner, Watch, finishes, numbers, pieces

REAL = Path(__file__).resolve().parent / "real"
CHAT = "/v1/chat/completions"
SOON = 1  # second, the contract's word for how fast a runner is freed
LONG = {"model": "counter", "max_tokens": 900}  # 2 s of the quick runner, 12 s of the slow one


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """A runner that counts some hundred numbers a second."""
    try:
        with Runner(peers.python(), "quick") as quick:
            yield quick.ready()
    except Missing as reason:
        need(False, str(reason))


@pytest.fixture
def mortal(runner: Runner) -> Iterator[Runner]:
    """One more, for a test to kill."""
    with Runner(runner.python, "quick") as mortal:
        yield mortal.ready()


@pytest.fixture(scope="module")
def slow(runner: Runner) -> Iterator[Runner]:
    """A runner that loads for seconds and counts some fifty numbers a second; not started yet."""
    with Runner(runner.python, "slow") as slow:
        yield slow


def queue_for(runner: Runner) -> Process:
    """llmq before this runner, as a user starts it; a runner that comes back is met at once."""
    return Process("--port", "0", "--backend", runner.url, "--probe-interval", "0.3s")


class Curl:
    """A client that can be killed: curl, asking for a chat completion."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        json_type = ("-H", "Content-Type: application/json")
        url = f"http://127.0.0.1:{port}{CHAT}"
        self.command = (require_command("curl"), "-sSN", *json_type, "-d", json.dumps(body), url)
        self.lines: list[bytes] = []

    async def __aenter__(self) -> Curl:
        self.process = await asyncio.create_subprocess_exec(
            *self.command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """End the process at once; a second time does nothing."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

    async def counted(self, count: int) -> None:
        """Return once `count` pieces of the stream are here."""
        while len(pieces(peers.events_of(self.lines))) < count:
            line = await self.process.stdout.readline()
            assert line, f"the stream ended: {self.lines}"
            self.lines.append(line)

    async def end(self) -> list[Any]:
        """All events of the stream, which is read to its end."""
        rest, self.complaint = await self.process.communicate()
        self.lines += rest.splitlines(keepends=True)
        return peers.events_of(self.lines)

    @property
    def code(self) -> int | None:
        """0 when curl holds the answer for complete; 18 when it was cut off."""
        return self.process.returncode


def status(port: int) -> dict[str, Any]:
    """The snapshot of /llmq/status."""
    return dict(peers.get(port, "/llmq/status")[1])


def outcomes(port: int) -> list[str]:
    """How the requests of llmq's recent past ended."""
    return sorted(ended["outcome"] for ended in status(port)["recent"])


async def completion(
    port: int, text: str, headers: dict[str, str] | None = None, **more: Any
) -> Answer:
    body = chat(text, model="counter", **more)
    return await ask(port, "POST", CHAT, json=body, headers=headers)


def two_more(port: int) -> list[asyncio.Future[Answer]]:
    """A whole and a streamed request that come later."""
    asked = (completion(port, "go 7", stream=stream, max_tokens=4) for stream in (False, True))
    return [asyncio.ensure_future(one) for one in asked]


def assert_counts(answer: Answer, first: int, last: int) -> None:
    """The answer is complete and counts from `first` to `last`, whole or streamed."""
    assert (answer.status, answer.clean) == (200, True), answer
    wanted = numbers(first, last)
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.events()
        assert pieces(events) == wanted
        assert (finishes(events), events[-1]) == (["length"], "[DONE]")
    else:
        assert answer.content == "".join(wanted)
        assert answer.json()["choices"][0]["finish_reason"] == "length"


# ---- One client ------------------------------------------------------------------------------


async def test_curl_gets_a_whole_answer(runner: Runner) -> None:
    with queue_for(runner) as q:
        async with Curl(q.port, chat("go 990", model="counter")) as curl:
            said, _ = await curl.process.communicate()
            answer = json.loads(said)
    assert curl.code == 0
    assert answer["choices"][0]["message"]["content"] == "".join(numbers(991, 999))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 10


@pytest.mark.deadline(30)
async def test_curl_gets_a_stream_piece_by_piece(runner: Runner) -> None:
    with queue_for(runner) as q:
        async with Curl(q.port, chat("hello", True, **LONG)) as curl:
            await curl.counted(1)
            assert runner.tasks(), "the first pieces came only when the answer was over"
            events = await curl.end()
    assert (curl.code, events[-1]) == (0, "[DONE]")
    assert pieces(events) == numbers(1, 900)
    assert finishes(events) == ["length"]


@pytest.fixture(params=["python", "node"])
def client(request: pytest.FixtureRequest, runner: Runner) -> tuple[list[str], Path]:
    """The command of an official client, and where it runs."""
    if request.param == "python":
        return [runner.python, str(REAL / "client.py")], REAL
    try:
        return ["node", str(REAL / "client.mjs")], peers.node_folder()
    except Missing as reason:
        need(False, str(reason))
        raise


@pytest.mark.deadline(30)
async def test_the_official_client_is_served_and_may_leave(
    client: tuple[list[str], Path], runner: Runner
) -> None:
    command, folder = client
    with queue_for(runner) as q:
        url = f"http://127.0.0.1:{q.port}/v1"
        process = await asyncio.create_subprocess_exec(
            *command, url, stdin=PIPE, stdout=PIPE, cwd=folder
        )
        seen = json.loads(await process.stdout.readline() or b"null")
        assert await process.stdout.readline() == b"left\n"
        await eventually(lambda: not runner.tasks(), SOON)
        assert process.returncode is None, "it ended, and did not only leave its stream"
        await process.communicate(b"")  # the end of its input
    assert process.returncode == 0
    assert seen == {
        "models": ["counter"],
        "whole": {"text": "".join(numbers(991, 999)), "finish": "stop", "tokens": 10},
        "stream": {"pieces": numbers(1, 40), "finish": ["length"], "tokens": [40]},
        "unknown": {"kind": "NotFoundError", "status": 404, "code": "model_not_found"},
    }


def without_chance(answer: Answer) -> bytes:
    """The body less what differs between two equal requests."""
    body = re.sub(rb'"timings":\{[^}]*\}', b"", answer.body)
    return re.sub(rb'"(id|created)":("[^"]*"|\d+)', rb'"\1":?', body)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_the_runners_own_byte_for_byte(stream: bool, runner: Runner) -> None:
    body = chat("go 500", stream, "counter", max_tokens=20, temperature=0)
    with queue_for(runner) as q:
        for _ in range(2):  # the second time the prompt is cached, as it is for llmq
            direct = await ask(runner.port, "POST", CHAT, json=body)
        through = await ask(q.port, "POST", CHAT, json=body)
    assert (through.status, through.clean) == (200, True)
    assert without_chance(through) == without_chance(direct)
    assert through.headers["content-type"] == direct.headers["content-type"]


async def test_an_error_of_the_runner_is_passed_on(runner: Runner) -> None:
    body = chat("a prompt beyond its context " * 2000, model="counter")
    with queue_for(runner) as q:
        direct = await ask(runner.port, "POST", CHAT, json=body)
        through = await ask(q.port, "POST", CHAT, json=body)
        assert (through.status, through.body) == (direct.status, direct.body)
        assert direct.json()["error"]["type"] == "exceed_context_size_error"
        assert_counts(await completion(q.port, "hello", max_tokens=3), 1, 3)


# ---- Many clients ----------------------------------------------------------------------------


@pytest.mark.deadline(30)
async def test_thirty_clients_are_served_one_at_a_time(runner: Runner) -> None:
    with Watch(runner) as watch:
        asked = [completion(runner.port, "go 500", max_tokens=150) for _ in range(2)]
        await asyncio.gather(*asked)
    assert watch.most == 2, "the runner itself would work on two at once"

    async def client(number: int) -> None:
        count = 4 + number % 9
        text, streamed = f"go {30 * number}", number % 2 == 0
        answer = await completion(q.port, text, stream=streamed, max_tokens=count)
        assert_counts(answer, 30 * number + 1, 30 * number + count)

    with queue_for(runner) as q:
        with Watch(runner) as watch:
            await asyncio.gather(*(client(number) for number in range(30)))
        assert watch.most == 1, f"in {watch.looks} looks"
        after = status(q.port)
    assert after["queue"]["waiting"] == after["queue"]["running"] == 0
    assert len(after["recent"]) == 30


@pytest.mark.deadline(60)
async def test_requests_wait_while_the_runner_loads_its_model(slow: Runner) -> None:
    slow.kill()
    with queue_for(slow) as q:
        early = [asyncio.ensure_future(completion(q.port, "go 7", max_tokens=3))]
        await eventually(lambda: status(q.port)["queue"]["waiting"] == 1)
        slow.start()
        await eventually(lambda: slow.health() == 503, 20)
        early.append(asyncio.ensure_future(completion(q.port, "go 7", stream=True, max_tokens=3)))
        await eventually(lambda: status(q.port)["queue"]["waiting"] == 2)
        await eventually(lambda: status(q.port)["backends"][0]["state"] == "loading")
        assert slow.health() == 503, "too quick for this test: use a larger model"
        for answer in await asyncio.gather(*early):
            assert_counts(answer, 8, 10)
        assert outcomes(q.port) == ["done", "done"]


@pytest.fixture
def two_boxes(runner: Runner, mortal: Runner, tmp_path: Path) -> Iterator[Process]:
    """llmq before two runners, each a box of its own."""
    boxes = {
        "one": {"url": runner.url, "device": "one"},
        "two": {"url": mortal.url, "device": "two"},
    }
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps({"backends": boxes}))
    with Process("--port", "0", "--config", str(file), "--probe-interval", "0.3s") as q:
        yield q


async def test_two_runners_share_the_work_of_two_people_fairly(
    two_boxes: Process, runner: Runner, mortal: Runner
) -> None:
    async def client(user: str, number: int) -> str:
        headers = {"X-User-ID": user}
        answer = await completion(two_boxes.port, f"go {number}", headers=headers, max_tokens=40)
        assert_counts(answer, number + 1, number + 40)
        ended.append(user)
        return answer.headers["x-llmq-backend"]

    ended: list[str] = []
    await asyncio.gather(client("warm", 0), client("warm", 0))
    ended.clear()
    with Watch(runner) as one, Watch(mortal) as two:
        heavy = [asyncio.ensure_future(client("heavy", n)) for n in range(20)]
        await eventually(lambda: status(two_boxes.port)["queue"]["waiting"] >= 15)
        light = [asyncio.ensure_future(client("light", n)) for n in range(4)]
        served = await asyncio.gather(*heavy, *light)
    assert set(served) == {"one", "two"}
    assert (one.most, two.most) == (1, 1)
    assert "light" not in ended[-4:], ended


@pytest.mark.deadline(60)
async def test_runner_that_dies_under_load_loses_no_request_that_had_no_answer_yet(
    two_boxes: Process, mortal: Runner
) -> None:
    asked = [
        asyncio.ensure_future(completion(two_boxes.port, f"go {n}", max_tokens=30))
        for n in range(40)
    ]
    await eventually(lambda: status(two_boxes.port)["queue"]["running"] == 2)
    mortal.kill()
    for number, answer in enumerate(await asyncio.gather(*asked)):
        assert_counts(answer, number + 1, number + 30)
    mortal.start()
    mortal.ready()
    await eventually(lambda: backend(two_boxes.port, "two")["state"] == "up")
    pinned = {"X-LLMQ-Backend": "two"}
    back = await completion(two_boxes.port, "go 7", headers=pinned, max_tokens=3)
    assert back.headers["x-llmq-backend"] == "two"


def backend(port: int, name: str) -> Any:
    (row,) = (row for row in status(port)["backends"] if row["name"] == name)
    return row


@pytest.mark.deadline(60)
async def test_a_runner_that_dies_in_mid_stream_fails_only_that_one(mortal: Runner) -> None:
    with queue_for(mortal) as q:
        async with Curl(q.port, chat("hello", True, **LONG)) as curl:
            await curl.counted(3)
            waiting = two_more(q.port)
            await eventually(lambda: status(q.port)["queue"]["waiting"] == 2)
            mortal.kill()
            events = await curl.end()
        mortal.start()
        assert_cut_off(events, curl)
        for answer in await asyncio.gather(*waiting):
            assert_counts(answer, 8, 11)
        assert_counts(await completion(q.port, "go 20", max_tokens=5), 21, 25)
        assert outcomes(q.port) == ["backend_error", "done", "done", "done"]


def assert_cut_off(events: list[Any], curl: Curl) -> None:
    """All that came is true, then an error; nothing looks complete."""
    *told, last = events
    assert last["error"]["code"] == "backend_error", last
    count = len(pieces(told))
    assert 3 <= count < 900
    assert pieces(told) == numbers(1, count)
    assert finishes(events) == []
    assert curl.code in (18, 56), curl.complaint  # a partial file, a reset


@pytest.mark.deadline(30)
async def test_a_stream_ends_well_when_llmq_is_asked_to_stop(runner: Runner) -> None:
    with queue_for(runner) as q:
        async with Curl(q.port, chat("hello", True, **LONG)) as curl:
            await curl.counted(3)
            waiting = asyncio.ensure_future(completion(q.port, "hello", max_tokens=3))
            await eventually(lambda: status(q.port)["queue"]["waiting"] == 1)
            q.signal(signal.SIGTERM)
            assert (await waiting).code == "shutting_down"
            events = await curl.end()
        assert await q.ended(0) == 0
    assert (curl.code, events[-1]) == (0, "[DONE]")
    assert pieces(events) == numbers(1, 900)


# ---- Clients that leave ----------------------------------------------------------------------


@pytest.mark.deadline(60)
async def test_a_client_killed_in_mid_stream_frees_the_runner(slow: Runner) -> None:
    slow.ready()
    with queue_for(slow) as q:
        async with Curl(q.port, chat("hello", True, **LONG)) as killed:
            await killed.counted(2)
            [task] = slow.tasks()
            others = two_more(q.port)
            await eventually(lambda: status(q.port)["queue"]["waiting"] == 2)
            assert slow.tasks() == [task]
            await killed.kill()
            await eventually(lambda: task not in slow.tasks(), SOON)
        for answer in await asyncio.gather(*others):
            assert_counts(answer, 8, 11)
        assert outcomes(q.port) == ["client_left", "done", "done"]


@pytest.mark.deadline(30)
async def test_a_client_killed_before_its_answer_makes_room_for_the_others(runner: Runner) -> None:
    """This runner goes on with a whole answer that nobody waits for; llmq does not."""
    try:
        with queue_for(runner) as q:
            async with Curl(q.port, chat("hello", **LONG)) as killed:
                await eventually(runner.tasks)
                others = two_more(q.port)
                await eventually(lambda: status(q.port)["queue"]["waiting"] == 2)
                await killed.kill()
                await eventually(lambda: "client_left" in outcomes(q.port), SOON)
            for answer in await asyncio.gather(*others):
                assert_counts(answer, 8, 11)
            assert outcomes(q.port) == ["client_left", "done", "done"]
    finally:
        await eventually(lambda: not runner.tasks(), 20)  # nothing is left for the next test


# ---- Modes -----------------------------------------------------------------------------------


async def test_nothing_starts_while_llmq_is_paused(runner: Runner) -> None:
    async def mode(name: str) -> None:
        answer = await ask(q.port, "POST", "/llmq/mode", json={"mode": name})
        assert answer.status == 200

    with queue_for(runner) as q:
        async with Curl(q.port, chat("hello", True, "counter", max_tokens=150)) as curl:
            await curl.counted(1)
            await mode("paused")
            held = asyncio.ensure_future(completion(q.port, "go 7", max_tokens=5))
            await eventually(lambda: status(q.port)["queue"]["waiting"] == 1)
            events = await curl.end()
        assert pieces(events) == numbers(1, 150), "what runs goes on"
        await eventually(lambda: status(q.port)["queue"]["running"] == 0)  # and its slot is free
        with Watch(runner) as watch:
            models = await ask(q.port, "GET", "/v1/models")
            await eventually(lambda: watch.looks > 20)
        assert [model["id"] for model in models.json()["data"]] == ["counter"]
        assert (watch.most, held.done()) == (0, False)
        assert status(q.port)["queue"]["waiting"] == 1
        await mode("open")
        assert_counts(await held, 8, 12)


# ---- Recorded runners ------------------------------------------------------------------------

SERVERS = {  # whose recordings there are, and what they are to llmq
    "llama-server": "llamacpp",
    "llama-cpp-python": "openai",
    "ollama": "ollama",
    "vllm": "vllm",
}


def recording(server: str, name: str) -> bytes:
    """A response of that server as it came over the wire."""
    return (REAL / "recordings" / f"{server}.{name}.response.txt").read_bytes()


def recorded_chats(server: str) -> list[str]:
    """The names of all recorded answers to chat completions."""
    index = (REAL / "recordings" / f"{server}.index.txt").read_text()
    row = rf"^{re.escape(server)}\.([\w-]+)\.response\.txt: (?:POST {CHAT}|a 900-token stream)"
    return re.findall(row, index, re.MULTILINE)


def as_recorded(server: str) -> FakeBackend:
    """A backend that lists its models in that server's own bytes."""
    fake = FakeBackend(models=("counter",), kind=SERVERS[server], auto=False)
    paths = {"models": "/v1/models"}
    if server == "ollama":
        # Not what it had loaded: a chat would keep to that context, and be translated.
        paths.update({f"api-{name}": f"/api/{name}" for name in ("version", "tags")})
    for name, path in paths.items():
        fake.probe_answers[path] = (200, recording(server, name).partition(b"\r\n\r\n")[2])
    return fake


async def play(fake: FakeBackend, data: bytes, port: int, body: dict[str, Any]) -> Answer:
    """Ask at `port`, and let the backend answer with `data`."""
    asked = asyncio.ensure_future(ask(port, "POST", CHAT, json=body))
    request = await fake.arrived()
    await request.send(data)
    request.finished()
    if re.search(rb"(?i)\r\nconnection: close\r\n", data.partition(b"\r\n\r\n")[0] + b"\r\n"):
        request.close()
    return await asked


def assert_same(through: Answer, direct: Answer) -> None:
    """Nothing was added, lost or changed."""
    assert (through.status, through.clean, through.body) == (200, True, direct.body)
    for name in ("content-type", "openai-processing-ms"):
        assert through.headers.get(name) == direct.headers.get(name), name


def assert_broken_off(through: Answer, direct: Answer) -> None:
    """llama-cpp-python says [DONE] to a client that it drops for the next one: llmq does not."""
    assert direct.events()[-1] == "[DONE]"
    *told, last = through.events()
    assert (through.clean, told) == (False, direct.events()[:-1])
    assert last["error"]["code"] == "backend_error"


def assert_same_error(through: Answer, direct: Answer) -> None:
    """An error object passes as it is, with its status; what is none becomes one."""
    assert through.clean
    assert through.headers["content-type"].startswith("application/json")
    assert through.status == direct.status
    if b"message" in direct.body:
        assert through.body == direct.body
    else:
        assert through.json()["error"]["message"]


@pytest.mark.parametrize("server", SERVERS)
async def test_the_recorded_answers_of_real_runners_pass_unchanged(server: str) -> None:
    assert len(recorded_chats(server)) >= 7
    async with as_recorded(server) as fake, running(fake.url) as q:
        for name in recorded_chats(server):
            body = chat("hello", "stream" in name, "counter")
            direct = await play(fake, recording(server, name), fake.port, body)
            through = await play(fake, recording(server, name), q.port, body)
            if direct.status == 200 and direct.clean:
                assert_same(through, direct)
            elif direct.status == 200:
                assert_broken_off(through, direct)
            else:
                assert_same_error(through, direct)
        listed = await ask(q.port, "GET", "/v1/models")
    assert "counter" in {model["id"].removesuffix(":latest") for model in listed.json()["data"]}
