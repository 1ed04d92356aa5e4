"""Random chats: what llmq asks and retells is what Ollama's own /v1 would, field by field.

The judge is `ollama_v1.py`, which is first held to what a real Ollama was recorded to say.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from llmq import TRANSLATORS
from tests import ollama_v1
from tests.documents import RUNS
from tests.fake_ollama import Recording

CHATS = TRANSLATORS["/v1/chat/completions", "/api/chat"]
WORDS = ["", " 1", "hé", "🦙", "a < b && c", '"quoted"', "line\nbreak", "\\", " \u2028"]
IDENTS = ["call_1", "call_2", "x"]


def bare(document: Any) -> Any:
    """Without what is different each time."""
    if not isinstance(document, dict):
        return document
    return {name: value for name, value in document.items() if name not in ("id", "created")}


def events(data: bytes) -> list[Any]:
    told = [block.removeprefix("data: ") for block in data.decode().split("\n\n") if block]
    return [text if text == "[DONE]" else bare(json.loads(text)) for text in told]


# ---- The judge -----------------------------------------------------------------------------------


def test_judge_makes_of_a_recorded_stream_what_ollama_was_recorded_to_make_of_it() -> None:
    lines = [json.loads(text) for text in Recording("ollama.api-chat-stream").body.splitlines()]
    recorded = [bare(event) for event in Recording("ollama.chat-stream").events()]
    assert ollama_v1.stream(lines, with_usage=False) == recorded


@pytest.mark.parametrize("name", ["chat", "chat-length", "chat-json"])
def test_judge_writes_whole_answers_as_ollama_was_recorded_to(name: str) -> None:
    recorded = Recording(f"ollama.{name}").json()
    (choice,) = recorded["choices"]
    native = {
        "model": recorded["model"],
        "message": choice["message"],
        "done": True,
        "done_reason": choice["finish_reason"],
        "prompt_eval_count": recorded["usage"]["prompt_tokens"],
        "eval_count": recorded["usage"]["completion_tokens"],
    }
    assert ollama_v1.whole(native) == bare(recorded)


# ---- Chats that are valid, of any shape ----------------------------------------------------------


def content(chance: random.Random) -> Any:
    if chance.random() < 0.6:
        return chance.choice(WORDS)
    parts = [
        {"type": "text", "text": chance.choice(WORDS)},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0="}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
    ]
    return chance.choices(parts, k=chance.randint(1, 3))


def arguments(chance: random.Random) -> dict[str, Any]:
    values = [1, -2.5, None, True, [1, {"a": []}], {}, *WORDS]
    return {chance.choice("abc<"): chance.choice(values) for _ in range(chance.randint(0, 3))}


def messages(chance: random.Random) -> list[Any]:
    found: list[Any] = [{"role": "user", "content": content(chance)}]
    for _ in range(chance.randint(0, 4)):
        calls = [
            {
                "id": ident,
                "type": "function",
                "function": {"name": f"f{place}", "arguments": json.dumps(arguments(chance))},
            }
            for place, ident in enumerate(chance.sample(IDENTS, chance.randint(0, 2)))
        ]
        said: dict[str, Any] = {"role": "assistant", "content": chance.choice(WORDS)}
        if calls:
            said.update(tool_calls=calls, content=chance.choice([None, "", *WORDS]))
        elif chance.random() < 0.2:
            said.update(tool_calls=[], content=None)  # some SDKs write an answer back like that
        if chance.random() < 0.3:
            said["reasoning"] = chance.choice(WORDS)
        found.append(said)
        found += [
            {"role": "tool", "tool_call_id": call["id"], "content": chance.choice(WORDS)}
            for call in calls
        ]
        found.append({"role": "user", "content": content(chance)})
    return found


MEMBERS: dict[str, list[Any]] = {
    "temperature": [0, 0.7, 1, 2.0],
    "top_p": [0.1, 1],
    "seed": [7, -1, 7.0],
    "frequency_penalty": [0, -1.5],
    "presence_penalty": [0.5],
    "max_tokens": [1, 128, 128.0],
    "stop": ["x", ["x", "é"]],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    ],
    "reasoning_effort": ["", "none", "minimal", "low", "xhigh"],
    "reasoning": [{"effort": "high"}, {"effort": ""}, {}],
    "tools": [[], [{"type": "function", "function": {"name": "f", "parameters": {}}}]],
    "logprobs": [True, False],
    "top_logprobs": [2, 2.0],
    "user": ["me"],  # which Ollama drops
    "n": [1],
}


def question(chance: random.Random) -> dict[str, Any]:
    names = chance.sample(list(MEMBERS), chance.randint(0, len(MEMBERS)))
    asked = {name: chance.choice(MEMBERS[name]) for name in names}
    return {"model": "Counter", "messages": messages(chance), **asked}


def said(chance: random.Random) -> dict[str, Any]:
    """A message of an answer: text, reasoning, tool calls, or nothing."""
    message: dict[str, Any] = {"role": "assistant", "content": chance.choice(["", *WORDS])}
    if chance.random() < 0.3:
        message["thinking"] = chance.choice(WORDS)
    if chance.random() < 0.2:
        message["tool_calls"] = [
            {
                "id": f"call_{chance.randrange(99)}",
                "function": {"index": place, "name": "f", "arguments": arguments(chance)},
            }
            for place in range(chance.randint(1, 2))
        ]
    return message


def native_line(chance: random.Random, **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"model": "Counter", "message": said(chance), "done": False, **more}
    if chance.random() < 0.2:
        told["logprobs"] = [{"token": "x", "logprob": -0.5}]
    return told


def native_end(chance: random.Random) -> dict[str, Any]:
    told = native_line(chance, done=True, done_reason=chance.choice(["stop", "stop", "length"]))
    if chance.random() < 0.6:
        told["message"] = {"role": "assistant", "content": ""}
    counts = {"prompt_eval_count": 6, "eval_count": 5, "eval_duration": 1236000}
    return {**told, **{name: counts[name] for name in counts if chance.random() < 0.8}}


@pytest.mark.deadline(60)
def test_random_chats_are_asked_as_ollamas_v1_asks_them() -> None:
    chance = random.Random("requests")
    for _ in range(RUNS):
        asked = question(chance)
        told = json.loads(CHATS(asked, "Counter", 0, lambda: 7.5).body())
        assert told == ollama_v1.native_request(asked), asked
        assert "128.0" not in json.dumps(told), "Go's decoder takes no 128.0 for an int"


@pytest.mark.deadline(60)
def test_random_answers_are_retold_as_ollamas_v1_tells_them() -> None:
    chance = random.Random("answers")
    asked = {"model": "Counter", "messages": []}
    for _ in range(RUNS):
        native = native_end(chance)
        one = CHATS(asked, "counter:latest", 0, lambda: 7.5)
        assert bare(json.loads(json.dumps(one.whole(native)))) == ollama_v1.whole(native), native

        lines = [native_line(chance) for _ in range(chance.randint(0, 5))] + [native_end(chance)]
        usage = chance.random() < 0.5
        streamed = {**asked, "stream": True, "stream_options": {"include_usage": usage}}
        one = CHATS(streamed, "counter:latest", 0, lambda: 7.5)
        data = b"".join(one.feed(json.dumps(each).encode() + b"\n") for each in lines)
        assert events(data + one.finish(b"")) == ollama_v1.stream(lines, usage), lines
