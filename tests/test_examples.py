"""The examples of Ollama's own library for Python print through llmq what they print at Ollama."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_ollama import COUNTS, Ollama, line, told
from tests.fakes import eventually, need, running
from tests.real import peers
from tests.real.drivers import Driver
from tests.real.peers import Missing

DRIVER = Path(__file__).resolve().parent / "real" / "drive_examples.py"
LATE = 20  # seconds for one example
JOBS = [
    one.name
    for one in ast.parse(DRIVER.read_text(encoding="utf-8")).body
    if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))
    and [argument.arg for argument in one.args.args] == ["url", "model"]
]


class Able(Ollama):
    """One whose model also calls tools, thinks, sees, and answers in a form."""

    def generate(self, path: str, asked: Any, name: str) -> Any:
        if not asked.get("prompt") and not asked.get("messages"):
            return super().generate(path, asked, name)
        self.load(name, asked.get("options") or {})
        last = (asked.get("messages") or [{}])[-1]
        seen = {key: asked[key] for key in ("suffix", "format", "images") if asked.get(key)}
        words = f"{asked.get('prompt') or last.get('content')} {sorted(seen)} {last.get('images')}"
        thought = {"thinking": f"hm, {asked['think']}"} if asked.get("think") else {}
        facts: Any = {"model": asked["model"], "created_at": "2026-11-21T08:50:35.4Z"}
        if asked.get("logprobs"):
            facts["logprobs"] = [{"token": "x", "logprob": -0.5, "top_logprobs": []}]
        message: Any = {"role": "assistant", "content": words, **thought}
        if asked.get("tools") and last["role"] != "tool":
            function = {"name": "add_two_numbers", "arguments": {"a": 3, "b": 1}}
            message["tool_calls"] = [{"function": function}]
        said: Any = {"message": message} if path == "/api/chat" else {"response": words, **thought}
        end = {"done": True, "done_reason": "stop", **COUNTS}
        if asked.get("stream") is False:
            return {**facts, **said, **end}
        nothing = {"message": {"role": "assistant", "content": ""}}
        last_line = nothing if path == "/api/chat" else {"response": ""}
        return line({**facts, **said, "done": False}) + line({**facts, **last_line, **end})

    def embed(self, path: str, asked: Any, name: str) -> Any:
        if path == "/api/embeddings":
            return super().embed(path, asked, name)
        texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
        rows = [[0.5, float(place)] for place in range(len(texts))]
        return {**super().embed(path, asked, name), "embeddings": rows}


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    try:
        with Driver([peers.python(), str(DRIVER)], DRIVER.parent) as examples:
            yield examples.is_ready(30)
    except Missing as reason:
        need(False, str(reason))


async def printed(driver: Driver, example: str, url: str) -> Any:
    work = driver.start(example, url=url, model="m")
    await eventually(lambda: work.over, LATE)
    assert work.raised is None, work
    return work.done


@pytest.mark.deadline(60)
@pytest.mark.parametrize("example", JOBS)
async def test_example_prints_through_llmq_what_it_prints_at_ollama(
    example: str, driver: Driver
) -> None:
    async with Able(["m", "other"]) as alone, Able(["m", "other"]) as behind:
        direct = await printed(driver, example, alone.url)
        async with running(behind.url) as q:
            await told(q)
            assert await printed(driver, example, q.base) == direct
        assert direct
        assert (behind.models, behind.contexts) == (alone.models, alone.contexts)
        assert behind.loads == alone.loads, "nothing was loaded more often"


def test_the_examples_are_there() -> None:
    assert len(JOBS) >= 16
