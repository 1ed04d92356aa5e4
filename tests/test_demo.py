"""The built-in model: it says the last message back, as a runner would."""

from __future__ import annotations

import asyncio
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import Answer, Process, Raw, ask, chat, eventually, http, run_llmq

CHAT = "/v1/chat/completions"


class demo:  # noqa: N801 - reads as a sentence: async with demo() as q
    """llmq in this process with its built-in model."""

    def __init__(self, **settings: Any) -> None:
        values = {name.replace("__", "."): value for name, value in settings.items()}
        self.service = llmq.Service(
            build_settings({"server.port": 0, "server.drain_timeout": 1, **values}), demo=True
        )

    async def __aenter__(self) -> demo:
        await self.service.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop()

    async def chat(self, text: Any, **more: Any) -> Answer:
        body = {**chat(""), "messages": [{"role": "user", "content": text}], "model": "echo"}
        return await ask(self.service.port, "POST", CHAT, json={**body, **more})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "DEMO_WORD_SECONDS", 0.001)


async def test_demo_has_one_model_and_looks_for_no_other() -> None:
    async with demo() as q:
        assert (await q.chat("x", model=None)).status == 200
        listing = (await ask(q.service.port, "GET", "/v1/models")).json()
        assert [row["id"] for row in listing["data"]] == ["echo"]
        assert list(q.service.gateway.fleet.backends) == ["demo"]


async def test_demo_says_the_last_message_back_whole() -> None:
    async with demo() as q:
        answer = await q.chat("counting: one  two\nthree ", model=None)
        facts = answer.json()
        assert answer.content == "counting: one  two\nthree "
        assert facts["object"] == "chat.completion"
        assert facts["model"] == "echo"
        assert facts["choices"][0]["message"]["role"] == "assistant"
        assert facts["choices"][0]["finish_reason"] == "stop"
        assert facts["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
        assert facts["created"] > 1_700_000_000
        assert (await q.chat("x")).json()["id"] != facts["id"]


async def test_demo_streams_word_by_word_and_ends_as_a_stream_should() -> None:
    async with demo() as q:
        answer = await q.chat("one  two\nthree", stream=True)
        assert answer.clean
        *parts, last = answer.events()
        assert last == "[DONE]"
        assert {part["object"] for part in parts} == {"chat.completion.chunk"}
        deltas = [part["choices"][0]["delta"] for part in parts]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert [delta["content"] for delta in deltas[1:-1]] == ["one  ", "two\n", "three"]
        assert deltas[-1] == {}
        assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * 4 + ["stop"]
        assert parts[-1]["usage"]["completion_tokens"] == 3
        assert len({part["id"] for part in parts}) == 1


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("most", "said", "reason"),
    [
        (2, "one two ", "length"),
        (0, "", "length"),
        (3, "one two three", "stop"),
        (9, "one two three", "stop"),
        (-1, "one two three", "stop"),
        (None, "one two three", "stop"),
        ("2", "one two three", "stop"),
    ],
)
async def test_demo_honours_the_limit_of_tokens(
    field: str, most: Any, said: str, reason: str
) -> None:
    async with demo() as q:
        whole = await q.chat("one two three", **{field: most})
        assert whole.content == said
        assert whole.json()["choices"][0]["finish_reason"] == reason
        streamed = await q.chat("one two three", stream=True, **{field: most})
        assert streamed.content == said
        assert streamed.events()[-2]["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "a"}], "a"),
        (["odd", {"type": "text", "text": "a"}], "a"),
        ([], ""),
        ("", ""),
        (None, ""),
        (7, ""),
        ("é 日本 \U0001f600", "é 日本 \U0001f600"),
    ],
)
async def test_demo_takes_any_content(content: Any, said: str) -> None:
    async with demo() as q:
        for stream in (False, True):
            answer = await q.chat(content, stream=stream)
            assert (answer.status, answer.content) == (200, said)


async def test_demo_goes_through_the_queue_like_any_runner() -> None:
    async with demo() as q:
        clients = []
        for text in ("one two three four five", "six seven"):
            raw = await Raw.open(q.service.port)
            body = json.dumps(chat(text, stream=True, model="echo")).encode()
            await raw.send(http("POST", CHAT, {"Content-Type": "application/json"}, body))
            clients.append(raw)
        first, second = [await raw.response() for raw in clients]
        assert (first.content, second.content) == ("one two three four five", "six seven")
        ended = list(q.service.gateway.journal.recent)
        assert [record.outcome for record in ended] == ["done", "done"]
        assert ended[1].wait_s >= ended[0].total_s - ended[0].wait_s - 0.05
        assert first.headers["x-llmq-backend"] == "demo"


async def test_client_that_leaves_ends_the_demos_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "DEMO_WORD_SECONDS", 0.02)
    async with demo() as q:
        raw = await Raw.open(q.service.port)
        body = json.dumps(chat("word " * 5000, stream=True, model="echo")).encode()
        await raw.send(http("POST", CHAT, {"Content-Type": "application/json"}, body))
        await raw.until(b"word")
        raw.rst()
        answer = await q.chat("next")
        assert (answer.status, answer.content) == (200, "next")


async def test_demo_itself_has_no_other_route() -> None:
    async with demo() as q:
        port = int(q.service.gateway.fleet.backends["demo"].url.rpartition(":")[2])
        for method, path in (("GET", "/api/tags"), ("GET", CHAT), ("POST", "/v1/embeddings")):
            answer = await ask(port, method, path)
            assert (answer.status, answer.code) == (404, "not_found")


async def test_demo_stays_the_backend_when_the_settings_are_read_again() -> None:
    async with demo() as q:
        more = {"server.port": 0, "server.drain_timeout": 1, "backends": ["http://127.0.0.1:9"]}
        q.service.read = lambda: build_settings(more)
        assert (await ask(q.service.port, "POST", "/llmq/reload", json={})).status == 200
        assert list(q.service.gateway.fleet.backends) == ["demo"]
        assert (await q.chat("still here")).content == "still here"


async def test_the_command_for_the_curious_works() -> None:
    async with Process("--demo", "--port", "0") as p:
        answer = await ask(p.port, "POST", CHAT, json=chat("hello there", model=None))
        assert answer.content == "hello there"
        assert "OPENAI_BASE_URL=" in p.output
        assert await p.ended() == 0


# ---- a busy home -----------------------------------------------------------------------------

CLIENTS = llmq.BUSY_CLIENTS
ALICE, AGENT, BOB, PAPERLESS, REPORT = CLIENTS
DICE = [(one, number) for one in CLIENTS for number in range(one.at_once)]


def test_a_busy_home_is_part_of_the_demo() -> None:
    answer = run_llmq("--busy", "--port", "0")
    assert answer.returncode == 2
    assert "--busy: means nothing without --demo" in answer.stderr


@pytest.mark.parametrize("seed", ["x", "1.5", ""])
def test_a_seed_is_a_number(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        llmq.main(["--demo", "--busy", "--seed", seed])
    assert raised.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_the_home_has_two_boxes_and_three_models_that_somebody_asks_for() -> None:
    models = [model.name for box in llmq.BUSY_BOXES.values() for model in box]
    assert (len(llmq.BUSY_BOXES), len(set(models))) == (2, 3)
    assert {one.model for one in CLIENTS} == set(models)
    assert {one.priority for one in CLIENTS} == {"high", "normal", "low"}
    names = [one.name for one in CLIENTS]
    assert len(set(names)) == len(names)


def test_the_same_seed_gives_the_same_chances() -> None:
    def rolls(*seed: object) -> list[float]:
        dice = llmq.chance(*seed)
        return [dice.random() for _ in range(3)]

    assert rolls(1, "a") == rolls(1, "a")
    different = [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), (1, "a", 1), (-1, "a")]
    assert len({tuple(rolls(*seed)) for seed in different}) == len(different)


class Enough(Exception):
    pass


async def days_of(
    client: llmq.BusyClient, dice: Any, monkeypatch: pytest.MonkeyPatch, many: int = 200
) -> list[tuple[Any, ...]]:
    """What somebody does: for each request how long before, what, and how long it is waited for."""
    paused: list[float] = []
    asked: list[Any] = []
    done: list[tuple[Any, ...]] = []

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    async def fetch(_backend: Any, path: str, body: bytes, lines: bytes) -> None:
        asked.append((path, json.loads(body), lines))

    async def within(seconds: float, task: Any, _late: Exception) -> None:
        await task
        done.append((paused.pop(), *asked.pop(), seconds))
        if len(done) == many:
            raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(llmq.asyncio, "sleep", sleep)
        patch.setattr(llmq, "fetch", fetch)
        patch.setattr(llmq, "within", within)
        with pytest.raises(Enough):
            await llmq.ask_busily(client, "http://127.0.0.1:9", dice)
    return done


async def test_the_same_seed_makes_everybody_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def everybody(seed: int) -> list[Any]:
        chances = [(one, llmq.chance(seed, one.name, number)) for one, number in DICE]
        return [await days_of(one, dice, monkeypatch, 20) for one, dice in chances]

    first, again, other = await everybody(7), await everybody(7), await everybody(8)
    assert first == again
    assert all(one != two for one, two in zip(first, other))
    pauses = [tuple(row[0] for row in one) for one in first]
    assert len(set(pauses)) == len(DICE), "no two do the same at once"


@pytest.mark.parametrize("client", CLIENTS, ids=lambda one: one.name)
async def test_somebody_asks_what_is_said_of_them(
    client: llmq.BusyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await days_of(client, llmq.chance(1, client.name, 0), monkeypatch)
    assert {path for _, path, _, _, _ in done} == {CHAT}
    assert {lines for _, _, _, lines, _ in done} == {f"X-User-ID: {client.name}\r\n".encode()}
    for _, _, body, _, _ in done:
        assert (body["model"], body["priority"]) == (client.model, client.priority)
        assert (body["max_tokens"], body["stream"]) == (client.tokens, True)
    mean = sum(row[0] for row in done) / len(done)
    assert 0.75 * client.pause < mean < 1.3 * client.pause
    left = [row[4] for row in done if row[4] < llmq.BUSY_PATIENCE]
    assert all(2 <= seconds <= 8 for seconds in left)
    assert abs(len(left) / len(done) - client.leaves) < 0.1
    assert bool(left) == bool(client.leaves)


async def test_whoever_is_not_answered_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([OSError("refused"), llmq.LlmqError("full", "queue_full"), Enough()])

    async def fetch(*_: object) -> None:
        raise next(errors)

    async def sleep(_: float) -> None:
        return

    with monkeypatch.context() as patch:
        patch.setattr(llmq.asyncio, "sleep", sleep)
        patch.setattr(llmq, "fetch", fetch)
        with pytest.raises(Enough):
            await llmq.ask_busily(ALICE, "http://127.0.0.1:9", llmq.chance(1))


class Asked:
    """One request to a simulated box, and what it was answered."""

    gone = False

    def __init__(self, path: str, question: Any = None) -> None:
        self.request = SimpleNamespace(path=path, method="POST" if question else "GET")
        self.question = json.dumps(question).encode()
        self.status, self.sent = 0, b""

    async def read_body(self, _most: int) -> bytes:
        return self.question

    def respond(self, status: int, body: bytes, _kind: str = "") -> None:
        self.status, self.sent = status, body

    def start(self, status: int, _kind: str) -> None:
        self.status = status

    def send(self, data: bytes) -> None:
        self.sent += data

    finish = send

    @property
    def answer(self) -> Any:
        return json.loads(self.sent)


class Box:
    """A simulated box, the time that passes in it, and what it is asked."""

    def __init__(self, name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept: list[float] = []
        self.box = llmq.BusyBox(llmq.BUSY_BOXES[name], llmq.chance(seed, name))
        monkeypatch.setattr(llmq.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def ask(self, path: str, **question: Any) -> Asked:
        asked = Asked(path, question)
        await self.box.answer(asked)  # type: ignore[arg-type]
        return asked

    async def chat(self, model: str, **more: Any) -> int:
        """How many tokens it was answered with."""
        asked = await self.ask(CHAT, model=model, messages=[{"role": "user"}], **more)
        assert asked.status == 200
        return int(asked.answer["usage"]["completion_tokens"])

    async def loaded(self) -> list[str]:
        return [row["name"] for row in (await self.ask("/api/ps")).answer["models"]]


async def test_the_same_seed_makes_answers_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lengths(seed: int) -> list[int]:
        box = Box("tower", seed, monkeypatch)
        return [await box.chat("qwen3:8b", max_tokens=100) for _ in range(30)]

    first, again, other = await lengths(1), await lengths(1), await lengths(2)
    assert first == again != other
    assert len(set(first)) > 10
    assert all(60 <= many <= 140 for many in first)


async def test_a_box_has_one_model_loaded_and_takes_its_time_to_load_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = Box("tower", 1, monkeypatch)
    large, small = llmq.BUSY_BOXES["tower"]
    assert await box.loaded() == []
    for model in (large, large, small, small, large):
        await box.chat(model.name)
        assert await box.loaded() == [model.name]
    assert box.slept == [large.load, small.load, large.load]
    assert large.load > small.load


async def test_a_box_streams_at_the_speed_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, models in llmq.BUSY_BOXES.items():
        box = Box(name, 1, monkeypatch)
        for model in models:
            box.slept.clear()
            body = {"model": model.name, "messages": [{"role": "user"}], "max_tokens": 20}
            answer = await box.ask(CHAT, stream=True, **body)
            load, *words = box.slept
            assert load == model.load
            assert set(words) == {1 / model.rate}
            *parts, last = answer.sent.strip().split(b"\n\n")
            assert last == b"data: [DONE]"
            said = [json.loads(part[6:])["choices"][0]["delta"].get("content") for part in parts]
            assert len([word for word in said if word]) == len(words)
            usage = json.loads(parts[-1][6:])["usage"]
            assert usage["completion_tokens"] == len(words)


async def test_a_box_is_an_ollama_to_whoever_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box("laptop", 1, monkeypatch)
    names = [model.name for model in llmq.BUSY_BOXES["laptop"]]
    tags = (await box.ask("/api/tags")).answer["models"]
    assert [row["name"] for row in tags] == names
    assert len({row["digest"] for row in tags}) == len(names)
    assert all(row["size"] > 2**30 for row in tags)
    assert [row["id"] for row in (await box.ask("/v1/models")).answer["data"]] == names
    assert "completion" in (await box.ask("/api/show", model=names[0])).answer["capabilities"]
    assert (await box.ask("/api/version")).answer["version"]
    assert (await box.ask("/api/nowhere")).status == 404
    assert (await box.ask(CHAT, model="gpt-4", messages=[])).status == 404
    assert box.slept == [], "nothing was loaded for it"


async def test_a_box_loads_and_unloads_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box("laptop", 1, monkeypatch)
    generate = llmq.OLLAMA_GENERATE
    answer = (await box.ask(generate, model="gemma3:4b")).answer
    assert (answer["model"], answer["done"]) == ("gemma3:4b", True)
    assert (await box.loaded(), box.slept) == (["gemma3:4b"], [2])
    await box.ask(generate, model="gemma3:4b", keep_alive=0)
    assert (await box.loaded(), box.slept) == ([], [2])


# ---- a busy home, behind llmq ----------------------------------------------------------------


class home:  # noqa: N801 - reads as a sentence: async with home(monkeypatch) as q
    """llmq in this process with a busy home that is quick, or where nobody is at home."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, empty: bool = False, **more: Any
    ) -> None:
        clients = () if empty else tuple(one._replace(pause=0.01) for one in CLIENTS)
        boxes = {
            name: tuple(one._replace(load=0.01, rate=5000.0) for one in models)
            for name, models in llmq.BUSY_BOXES.items()
        }
        monkeypatch.setattr(llmq, "BUSY_CLIENTS", clients)
        monkeypatch.setattr(llmq, "BUSY_BOXES", boxes)
        values = {name.replace("__", "."): value for name, value in more.items()}
        settings = build_settings({"server.port": 0, "server.drain_timeout": 1, **values})
        self.service = llmq.Service(settings, demo=True, seed=1)

    async def __aenter__(self) -> Any:
        await self.service.start()
        fleet = self.service.gateway.fleet
        await eventually(lambda: all(one.usable for one in fleet.backends.values()))
        return self.service

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop()
        assert all(task.done() for task in self.service._clients)
        assert not self.service.gateway.calls


NAMES = {f"user:{one.name}" for one in CLIENTS}


async def test_a_busy_home_has_its_clients_served_and_shows_them_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with home(monkeypatch, server__base_path="/llm") as service:
        fleet, known = service.gateway.fleet, service.gateway.clients.known
        assert set(fleet.backends) == set(fleet.devices) == set(llmq.BUSY_BOXES)
        assert {one.kind for one in fleet.backends.values()} == {"ollama"}
        assert not service.store.path, "nothing is kept of a demo"
        await eventually(lambda: all(name in known and known[name].done for name in NAMES), 8)
        snapshot = (await ask(service.port, "GET", "/llm/llmq/status")).json()
        assert {row["name"] for row in snapshot["clients"]} >= NAMES
        words = ["status", "--url", f"http://127.0.0.1:{service.port}/llm"]
        assert await asyncio.get_running_loop().run_in_executor(None, llmq.main, words) == 0
        said = capsys.readouterr().out
        assert all(one.name in said for one in CLIENTS)
        assert {one.outcome for one in service.gateway.journal.recent} <= {"done", "client_left"}


async def test_a_busy_home_is_served_where_keys_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"me": {"key": "sk-mine-5f1d7c0a9b3e"}}
    async with home(monkeypatch, keys=keys) as service:
        await eventually(lambda: service.gateway.journal.recent, 3)


async def test_a_busy_home_is_served_wherever_llmq_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with home(monkeypatch, server__host="127.0.0.2") as service:
        await eventually(lambda: service.gateway.journal.recent, 3)


async def test_models_of_the_home_are_loaded_and_unloaded_by_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with home(monkeypatch, empty=True) as service:
        backends = service.gateway.fleet.backends
        loop, url = asyncio.get_running_loop(), f"http://127.0.0.1:{service.port}"

        async def command(action: str, model: str, on: str) -> None:
            words = ["models", action, model, "--on", on, "--url", url]
            assert await loop.run_in_executor(None, llmq.main, words) == 0
            assert f"{action} {model}: {on}" in capsys.readouterr().out

        def loaded(name: str) -> set[str]:
            return set(backends[name].report.loaded)

        await command("load", "qwen3:8b", "laptop")
        await eventually(lambda: loaded("laptop") == {"qwen3:8b"})
        assert loaded("tower") == set()
        await command("unload", "qwen3:8b", "laptop")
        await eventually(lambda: loaded("laptop") == set())


@pytest.mark.parametrize("most", [None, "5", 10**15, -1, 0], ids=str)
async def test_anybody_may_ask_the_home_with_any_limit_of_tokens(
    most: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with home(monkeypatch, empty=True) as service:
        body = {**chat("hello", model="gemma3:4b"), "max_tokens": most}
        answer = await ask(service.port, "POST", CHAT, json=body)
        assert answer.status in (200, 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}], "stream": False}),
        ("/api/generate", {"prompt": "hi", "stream": False}),
    ],
)
async def test_clients_of_ollama_are_answered_by_the_home_too(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with home(monkeypatch, empty=True) as service:
        answer = await ask(service.port, "POST", path, json={"model": "gemma3:4b", **body})
        assert answer.status == 200
        assert b"word" in answer.body


def eager_seed() -> int:
    """One with which somebody asks at once."""

    def first(seed: int) -> float:
        return min(
            llmq.chance(seed, one.name, number).expovariate(1 / one.pause) for one, number in DICE
        )

    return next(seed for seed in range(1000) if first(seed) < 0.1)


async def test_a_busy_demo_ends_cleanly_while_it_is_busy_and_leaves_no_file() -> None:
    words = ("--demo", "--busy", "--seed", str(eager_seed()), "--port", "0")
    async with Process(*words, "--state", "state.db", "--drain-timeout", "300s") as p:
        ports = [int(port) for port in re.findall(r"backend \w+ +http://127.0.0.1:(\d+)", p.output)]
        assert len(ports) == 2

        async def running() -> bool:
            return bool((await ask(p.port, "GET", "/llmq/status")).json()["queue"]["running"])

        while not await running():
            pass
        assert await p.ended() == 0, "long before those who run would be waited for"
        assert "Traceback" not in p.output
        assert "ERROR" not in p.output
        assert [names for _, _, names in os.walk(p.home.name) if names] == []
        for port in (*ports, p.port):
            with pytest.raises(ConnectionRefusedError):
                await Raw.open(port)
