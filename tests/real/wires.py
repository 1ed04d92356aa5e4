"""What runners say in each dialect, written by hand where no real one was recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


def events(*documents: Any) -> list[bytes]:
    """Server-sent events, named as Anthropic's are when they have a type."""
    named = [f"event: {one['type']}\n" if "type" in one else "" for one in documents]
    return [f"{n}data: {json.dumps(one)}\n\n".encode() for n, one in zip(named, documents)]


@dataclass(frozen=True)
class Wire:
    """How a runner speaks a dialect: a call of the tool, text, and an error, whole or streamed."""

    content_type: str
    call: Any  # a whole answer that calls the tool
    called: list[bytes]  # the same as a stream
    text: Any  # a whole answer
    begun: list[bytes]  # two pieces of a stream, which then breaks
    error: Any
    path: str
    finish: str  # of the call, as its users read it

    @property
    def head(self) -> list[tuple[str, str]]:
        return [("Content-Type", self.content_type), ("Transfer-Encoding", "chunked")]


ROME = '{"place": "Rome"}'
NAMED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ROME}}


def choice(finish: str | None, **more: Any) -> dict[str, Any]:
    """A chat completion or a chunk of one, as OpenAI's clients know them."""
    kind = "chat.completion.chunk" if "delta" in more else "chat.completion"
    choices = [{"index": 0, "finish_reason": finish, **more}]
    return {"id": "c", "object": kind, "created": 1, "model": "counter", "choices": choices}


def delta(finish: str | None = None, **more: Any) -> dict[str, Any]:
    return choice(finish, delta=more)


def call_delta(**more: Any) -> dict[str, Any]:
    return delta(tool_calls=[{"index": 0, **more}])


USAGE = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
IN_OPENAI = Wire(
    content_type="text/event-stream",
    call={
        **choice(
            "tool_calls", message={"role": "assistant", "content": None, "tool_calls": [NAMED]}
        ),
        **USAGE,
    },
    called=[
        *events(
            delta(role="assistant", content=None),
            call_delta(id="call_1", type="function", function={"name": "weather", "arguments": ""}),
            call_delta(function={"arguments": ROME[:7]}),
            call_delta(function={"arguments": ROME[7:]}),
            delta("tool_calls"),
        ),
        b"data: [DONE]\n\n",
    ],
    text={**choice("stop", message={"role": "assistant", "content": "warm"}), **USAGE},
    begun=events(delta(role="assistant", content=" 1"), delta(content=" 2")),
    error={"error": {"message": "out of memory", "type": "server_error", "code": 500}},
    path="/v1/chat/completions",
    finish="tool_calls",
)
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "counter",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 2},
}
TOOL_USE = {"type": "tool_use", "id": "toolu_1", "name": "weather"}
EMPTY = {**MESSAGE, "content": [], "stop_reason": None}
IN_ANTHROPIC = Wire(
    content_type="text/event-stream",
    call={
        **MESSAGE,
        "content": [{**TOOL_USE, "input": {"place": "Rome"}}],
        "stop_reason": "tool_use",
    },
    called=events(
        {"type": "message_start", "message": EMPTY},
        {"type": "content_block_start", "index": 0, "content_block": {**TOOL_USE, "input": {}}},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "input_json_delta", "partial_json": part},
            }
            for part in (ROME[:7], ROME[7:])
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {"output_tokens": 2},
        },
        {"type": "message_stop"},
    ),
    text={**MESSAGE, "content": [{"type": "text", "text": "warm"}], "stop_reason": "end_turn"},
    begun=events(
        {"type": "message_start", "message": EMPTY},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": text},
            }
            for text in (" 1", " 2")
        ),
    ),
    error={"type": "error", "error": {"type": "api_error", "message": "out of memory"}},
    path="/v1/messages",
    finish="tool_use",
)


def native(content: str, **more: Any) -> dict[str, Any]:
    """A line of Ollama's chat; the message is extended by `calls`."""
    message = {"role": "assistant", "content": content}
    if calls := more.pop("calls", None):
        message["tool_calls"] = calls
    created = "2026-11-21T08:50:35.466200792Z"
    return {"model": "counter", "created_at": created, "message": message, "done": False, **more}


LAST = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2}
CALLS = [{"function": {"name": "weather", "arguments": {"place": "Rome"}}}]
IN_LINES = Wire(
    content_type="application/x-ndjson",
    call=native("", calls=CALLS, **LAST),
    called=[
        json.dumps(one).encode() + b"\n" for one in (native("", calls=CALLS), native("", **LAST))
    ],
    text=native("warm", **LAST),
    begun=[json.dumps(native(text)).encode() + b"\n" for text in (" 1", " 2")],
    error={"error": "out of memory"},
    path="/api/chat",
    finish="stop",
)
WIRE = {"openai": IN_OPENAI, "anthropic": IN_ANTHROPIC, "ollama": IN_LINES}
