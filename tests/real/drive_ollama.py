"""The official Ollama library for Python, as drive.py tells it."""

from __future__ import annotations

from typing import Any, Callable

import drive
import ollama

Tell = Callable[[str], None]
TOOLS = [{"type": "function", "function": drive.WEATHER}]


def request(model: str, text: str, limit: int | None) -> dict[str, Any]:
    options = {"num_predict": limit} if limit else None
    return {"model": model, "messages": drive.user(text), "options": options}


def models(url: str, **_: Any) -> list[str]:
    return [model.model for model in ollama.Client(url).list().models]


def whole(
    url: str,
    model: str,
    text: str,
    limit: int | None = None,
    timeout: float = drive.TIMEOUT,
    **_: Any,
) -> dict[str, Any]:
    answer = ollama.Client(url, timeout=timeout).chat(**request(model, text, limit))
    return ended(answer, answer.message.content)


def ended(last: Any, text: str) -> dict[str, Any]:
    """What matters of an answer; a stream tells it in its last line."""
    return {
        "text": text,
        "finish": last.done_reason if last.done else None,
        "tokens": last.eval_count,
    }


def stream(
    url: str,
    tell: Tell,
    model: str,
    text: str,
    limit: int | None = None,
    timeout: float = drive.TIMEOUT,
) -> dict[str, Any]:
    there, said = ollama.Client(url, timeout=timeout), ""
    for part in there.chat(**request(model, text, limit), stream=True):
        if part.message.content:
            said += part.message.content
            tell(part.message.content)
    return ended(part, said)


def generate(url: str, tell: Tell, model: str, text: str, limit: int) -> dict[str, Any]:
    """The route without messages, streamed."""
    said, options = "", {"num_predict": limit}
    for part in ollama.Client(url).generate(model, text, options=options, stream=True):
        if part.response:
            said += part.response
            tell(part.response)
    return ended(part, said)


def tools(url: str, model: str, stream: bool, **_: Any) -> dict[str, Any]:
    """The model asks for a tool, is told its result, and answers."""
    there, messages = ollama.Client(url), drive.user("How warm is it in Rome?")
    answers = there.chat(model=model, messages=messages, tools=TOOLS, stream=stream)
    parts = list(answers) if stream else [answers]
    [call] = [call for part in parts for call in part.message.tool_calls or []]
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    messages.append({"role": "tool", "tool_name": call.function.name, "content": drive.SUNNY})
    last = there.chat(model=model, messages=messages, tools=TOOLS)
    told = {"name": call.function.name, "arguments": dict(call.function.arguments)}
    return {**told, "finish": parts[-1].done_reason, "text": last.message.content}


def embeddings(url: str, model: str, texts: list[str], **_: Any) -> list[list[float]]:
    return [list(row) for row in ollama.Client(url).embed(model, texts).embeddings]


async def whole_async(url: str, model: str, text: str, **_: Any) -> dict[str, Any]:
    there = ollama.AsyncClient(url, timeout=drive.TIMEOUT)
    answer = await there.chat(**request(model, text, None))
    return ended(answer, answer.message.content)


async def stream_async(url: str, tell: Tell, model: str, text: str) -> dict[str, Any]:
    there, said = ollama.AsyncClient(url, timeout=drive.TIMEOUT), ""
    async for part in await there.chat(**request(model, text, None), stream=True):
        if part.message.content:
            said += part.message.content
            tell(part.message.content)
    return ended(part, said)


if __name__ == "__main__":
    drive.serve(models, whole, stream, generate, tools, embeddings, whole_async, stream_async)
