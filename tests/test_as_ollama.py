"""The same orders and questions to an Ollama, and to llmq in front of its twin: no difference.

The twins are `fake_ollama.Ollama`, which does what the real one's source says.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.fake_ollama import Ollama
from tests.fakes import Answer, ask, running

SAY = [{"role": "user", "content": "hi"}]
Step = tuple[str, str, Any]
BREATH: list[Step] = [  # what `ollama create`, `show`, `run`, `cp`, `ls`, `ps`, `rm` send
    ("POST", "/api/create", {"model": "made", "from": "m"}),
    ("POST", "/api/show", {"model": "made"}),
    ("GET", "/api/tags", None),
    ("POST", "/api/generate", {"model": "made"}),
    ("POST", "/api/chat", {"model": "made", "messages": SAY}),
    ("POST", "/v1/chat/completions", {"model": "made", "messages": SAY}),
    ("POST", "/api/copy", {"source": "made", "destination": "me/copy"}),
    ("POST", "/api/show", {"model": "me/copy"}),
    ("POST", "/api/generate", {"model": "me/copy", "prompt": "hi", "stream": False}),
    ("GET", "/v1/models", None),
    ("POST", "/api/chat", {"model": "made", "messages": [], "keep_alive": 0}),
    ("GET", "/api/ps", None),
    ("DELETE", "/api/delete", {"model": "made"}),
    ("GET", "/api/tags", None),
    ("DELETE", "/api/delete", {"model": "me/copy"}),
    ("POST", "/api/show", {"model": "me/copy"}),
    ("POST", "/api/chat", {"model": "made", "messages": SAY}),
    ("DELETE", "/api/delete", {"model": "made"}),
    ("POST", "/api/pull", {"model": "registry.ollama.ai/library/new"}),
    ("POST", "/api/embed", {"model": "library/new", "input": "hi"}),
    ("GET", "/api/tags", None),
]


async def answered(port: int, step: Step) -> Answer:
    method, path, body = step
    return await ask(port, method, path, json=body) if body else await ask(port, method, path)


def told(answer: Answer) -> Any:
    """What was answered, without what is different each time."""
    documents = []
    for text in answer.body.decode().splitlines():
        data = text.removeprefix("data: ").strip()
        document = json.loads(data) if data and data != "[DONE]" else data
        if isinstance(document, dict):
            for name in ("id", "created", "created_at"):
                document.pop(name, None)
            if isinstance(document.get("error"), dict):  # whose code and param llmq adds
                document["error"] = document["error"]["message"]
        documents += [document] if document else []
    return answer.status, documents


async def test_orders_and_questions_in_one_breath_are_answered_as_by_ollama_itself() -> None:
    """Nothing is waited for between them, and llmq looks by itself once a minute only."""
    async with Ollama() as alone, Ollama() as behind:
        async with running(behind.url, upstream__probe_interval=60) as q:
            for place, step in enumerate(BREATH):
                mine, its = await answered(q.port, step), await answered(alone.port, step)
                assert told(mine) == told(its), (place, step)
    assert behind.models == alone.models
    assert behind.loads == alone.loads


def question(chance: random.Random) -> Step:
    """Any of the questions that the clients of a box ask, with any context."""
    model = chance.choice(["m", "M:latest", "library/m", "n"])
    context = chance.choice([None, None, 0, -1, 512, 4096.0, 6000, 8192, 10**6])
    path = chance.choice(["/api/chat", "/api/generate", "/api/embed", "/v1/chat/completions"])
    body: dict[str, Any] = {"model": model, "stream": chance.random() < 0.5}
    if path == "/api/embed":
        body = {"model": model, "input": "hi"}
    else:
        body.update({"prompt": "hi"} if path == "/api/generate" else {"messages": SAY})
    if chance.random() < 0.1 and path == "/api/chat":
        body.update(messages=[], keep_alive=chance.choice([0, 60]))
    if context is not None and path != "/v1/chat/completions":
        body["options"] = {"num_ctx": context}
    return "POST", path, body


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.deadline(60)
async def test_random_questions_are_answered_as_by_ollama_and_never_load_it_more_often(
    seed: int,
) -> None:
    chance = random.Random(f"questions {seed}")
    async with Ollama(["m", "n"]) as alone, Ollama(["m", "n"]) as behind:
        async with running(behind.url) as q:
            for _ in range(60):
                step = question(chance)
                mine, its = await answered(q.port, step), await answered(alone.port, step)
                assert told(mine) == told(its), step
    assert len(behind.loads) <= len(alone.loads), "a context is shared, so that less is loaded"
    assert {name for name, _ in behind.loads} == {name for name, _ in alone.loads}
    assert max(context for _, context in behind.loads) <= 8192, "clamped"
