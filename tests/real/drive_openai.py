"""The official OpenAI library for Python, as drive.py tells it."""

from __future__ import annotations

from typing import Any, Callable

import drive
import openai

Tell = Callable[[str], None]
STRICT = {**drive.PLACE, "additionalProperties": False}
TOOLS = [{"type": "function", "function": {**drive.WEATHER, "parameters": STRICT, "strict": True}}]


def settings(url: str, timeout: float) -> dict[str, Any]:
    """No attempt is repeated, so that a failure is seen."""
    return {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": timeout}


def client(url: str, timeout: float = drive.TIMEOUT) -> openai.OpenAI:
    return openai.OpenAI(**settings(url, timeout))


def request(model: str, text: str, limit: int | None = None, more: Any = None) -> dict[str, Any]:
    wanted = {"model": model, "messages": drive.user(text), "extra_body": more}
    return {**wanted, "max_tokens": limit} if limit else wanted


def ended(answer: Any) -> dict[str, Any]:
    """What matters of a chat completion."""
    [choice] = answer.choices
    tokens = answer.usage and answer.usage.completion_tokens
    return {"text": choice.message.content, "finish": choice.finish_reason, "tokens": tokens}


def models(url: str, **_: Any) -> list[str]:
    return [model.id for model in client(url).models.list()]


def whole(url: str, tell: Tell, timeout: float = drive.TIMEOUT, **asked: Any) -> dict[str, Any]:  # noqa: ARG001
    return ended(client(url, timeout).chat.completions.create(**request(**asked)))


class Pieces:
    """A streamed answer, put together."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.text, self.finish, self.tokens = "", None, None

    def add(self, chunk: Any) -> None:
        if chunk.usage:
            self.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            self.finish = choice.finish_reason or self.finish
            if choice.delta.content:
                self.text += choice.delta.content
                self.tell(choice.delta.content)

    def ended(self) -> dict[str, Any]:
        return {"text": self.text, "finish": self.finish, "tokens": self.tokens}


USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def stream(url: str, tell: Tell, timeout: float = drive.TIMEOUT, **asked: Any) -> dict[str, Any]:
    pieces = Pieces(tell)
    for chunk in client(url, timeout).chat.completions.create(**request(**asked), **USAGE):
        pieces.add(chunk)
    return pieces.ended()


def tools(url: str, model: str, stream: bool, **_: Any) -> dict[str, Any]:
    """The model asks for a tool, is told its result, and answers."""
    asked, messages = client(url).chat.completions, drive.user("How warm is it in Rome?")
    wanted = {"model": model, "messages": messages, "tools": TOOLS}
    if stream:
        with asked.stream(**wanted) as answer:
            [choice] = answer.get_final_completion().choices
    else:
        [choice] = asked.create(**wanted).choices
    [call] = choice.message.tool_calls
    messages.append(choice.message.model_dump(exclude_unset=True, exclude={"parsed"}))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": drive.SUNNY})
    last = ended(asked.create(**wanted))
    told = {"name": call.function.name, "arguments": call.function.arguments}
    return {**told, "finish": choice.finish_reason, "text": last["text"]}


def embeddings(url: str, model: str, texts: list[str], **_: Any) -> list[list[float]]:
    """The library asks for base64 and decodes it."""
    answer = client(url).embeddings.create(model=model, input=texts)
    return [row.embedding for row in answer.data]


def responses(url: str, tell: Tell, model: str, text: str, limit: int) -> dict[str, Any]:
    """The newer dialect, streamed."""
    wanted = {"model": model, "input": text, "max_output_tokens": limit, "stream": True}
    for event in client(url).responses.create(**wanted):
        if event.type == "response.output_text.delta":
            tell(event.delta)
    last = event.response
    return {"text": last.output_text, "finish": last.status, "tokens": last.usage.output_tokens}


async def whole_async(url: str, model: str, text: str, **_: Any) -> dict[str, Any]:
    async with openai.AsyncOpenAI(**settings(url, drive.TIMEOUT)) as there:
        return ended(await there.chat.completions.create(**request(model, text)))


async def stream_async(url: str, tell: Tell, model: str, text: str) -> dict[str, Any]:
    pieces = Pieces(tell)
    async with openai.AsyncOpenAI(**settings(url, drive.TIMEOUT)) as there:
        async for chunk in await there.chat.completions.create(**request(model, text), **USAGE):
            pieces.add(chunk)
    return pieces.ended()


if __name__ == "__main__":
    drive.serve(models, whole, stream, tools, embeddings, responses, whole_async, stream_async)
