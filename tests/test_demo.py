"""The built-in model: it says the last message back, as a runner would."""

from __future__ import annotations

import json
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


# ---- a busy home


def test_a_busy_home_is_part_of_the_demo() -> None:
    answer = run_llmq("--busy", "--port", "0")
    assert answer.returncode == 2
    assert "--busy: means nothing without --demo" in answer.stderr


def test_the_same_seed_gives_the_same_chances() -> None:
    rolls = [
        [llmq.chance(*seed).random() for _ in range(3)] for seed in ((1, "a"), (1, "a"), (2, "a"))
    ]
    assert rolls[0] == rolls[1] != rolls[2]


async def test_a_busy_home_has_its_clients_served_and_ends_cleanly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients = tuple(one._replace(pause=0.01) for one in llmq.BUSY_CLIENTS)
    boxes = {
        name: tuple(one._replace(load=0.01, rate=5000.0) for one in models)
        for name, models in llmq.BUSY_BOXES.items()
    }
    monkeypatch.setattr(llmq, "BUSY_CLIENTS", clients)
    monkeypatch.setattr(llmq, "BUSY_BOXES", boxes)
    settings = build_settings({"server.port": 0, "server.drain_timeout": 1})
    service = llmq.Service(settings, demo=True, seed=1)
    await service.start()
    try:
        fleet, known = service.gateway.fleet, service.gateway.clients.known
        assert set(fleet.backends) == set(llmq.BUSY_BOXES)
        names = {f"user:{one.name}" for one in clients}
        await eventually(lambda: all(name in known and known[name].done for name in names), 20)
        assert {one.kind for one in fleet.backends.values()} == {"ollama"}
        assert not service.store.path, "nothing is kept of a demo"
    finally:
        await service.stop()
    assert all(task.done() for task in service._clients)
    assert not service.gateway.calls
