"""The official Anthropic library for Python, as drive.py tells it."""

from __future__ import annotations

from typing import Any, Callable

import anthropic
import drive

Tell = Callable[[str], None]
TOOLS = [
    {
        "name": drive.WEATHER["name"],
        "description": drive.WEATHER["description"],
        "input_schema": drive.PLACE,
    }
]


def settings(url: str, timeout: float) -> dict[str, Any]:
    """No attempt is repeated, so that a failure is seen."""
    return {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": timeout}


def client(url: str, timeout: float = drive.TIMEOUT) -> anthropic.Anthropic:
    return anthropic.Anthropic(**settings(url, timeout))


def request(model: str, text: str, limit: int | None) -> dict[str, Any]:
    return {"model": model, "messages": drive.user(text), "max_tokens": limit or 2000}


def ended(answer: Any) -> dict[str, Any]:
    """What matters of a message."""
    text = "".join(block.text for block in answer.content if block.type == "text")
    return {"text": text, "finish": answer.stop_reason, "tokens": answer.usage.output_tokens}


def models(url: str, **_: Any) -> list[str]:
    return [model.id for model in client(url).models.list()]


def whole(
    url: str,
    model: str,
    text: str,
    limit: int | None = None,
    timeout: float = drive.TIMEOUT,
    **_: Any,
) -> dict[str, Any]:
    return ended(client(url, timeout).messages.create(**request(model, text, limit)))


def stream(
    url: str,
    tell: Tell,
    model: str,
    text: str,
    limit: int | None = None,
    timeout: float = drive.TIMEOUT,
) -> dict[str, Any]:
    with client(url, timeout).messages.stream(**request(model, text, limit)) as answer:
        for piece in answer.text_stream:
            tell(piece)
        return ended(answer.get_final_message())


def count(url: str, model: str, text: str, **_: Any) -> int:
    answer = client(url).messages.count_tokens(model=model, messages=drive.user(text))
    return answer.input_tokens


def tools(url: str, model: str, stream: bool, **_: Any) -> dict[str, Any]:
    """The model asks for a tool, is told its result, and answers."""
    asked, messages = client(url).messages, drive.user("How warm is it in Rome?")
    wanted = {"model": model, "messages": messages, "tools": TOOLS, "max_tokens": 100}
    if stream:
        with asked.stream(**wanted) as answer:
            first = answer.get_final_message()
    else:
        first = asked.create(**wanted)
    [call] = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": drive.SUNNY}
    messages.append({"role": "assistant", "content": first.content})
    messages.append({"role": "user", "content": [result]})
    last = ended(asked.create(**wanted))
    told = {"name": call.name, "arguments": call.input}
    return {**told, "finish": first.stop_reason, "text": last["text"]}


async def whole_async(url: str, model: str, text: str, **_: Any) -> dict[str, Any]:
    async with anthropic.AsyncAnthropic(**settings(url, drive.TIMEOUT)) as there:
        return ended(await there.messages.create(**request(model, text, None)))


async def stream_async(url: str, tell: Tell, model: str, text: str) -> dict[str, Any]:
    async with anthropic.AsyncAnthropic(**settings(url, drive.TIMEOUT)) as there:
        async with there.messages.stream(**request(model, text, None)) as answer:
            async for piece in answer.text_stream:
                tell(piece)
            return ended(await answer.get_final_message())


if __name__ == "__main__":
    drive.serve(models, whole, stream, count, tools, whole_async, stream_async)
