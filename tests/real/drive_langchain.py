"""LangChain's classes for OpenAI or Ollama, as drive.py tells it: drive_langchain.py openai."""

from __future__ import annotations

import functools
import operator
import sys
from typing import Any, Callable

import drive

Tell = Callable[[str], None]
OLLAMA = sys.argv[1] == "ollama"
TOOL = {"type": "function", "function": drive.WEATHER}

if OLLAMA:
    from langchain_ollama import ChatOllama, OllamaEmbeddings
else:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings


def chat(url: str, model: str, limit: int | None, timeout: float) -> Any:
    """The chat model; no attempt is repeated, so that a failure is seen."""
    if OLLAMA:
        kept = {"timeout": timeout}
        return ChatOllama(model=model, base_url=url, num_predict=limit, client_kwargs=kept)
    return ChatOpenAI(
        model=model,
        base_url=f"{url}/v1",
        api_key="none",
        max_tokens=limit,
        timeout=timeout,
        max_retries=0,
        stream_usage=True,
        stream_chunk_timeout=None,  # else astream() gives up 120 s after the last piece: no sign of
        # life counts for it, and before Python 3.12 its wait_for() may lose a cancellation
    )


def ended(message: Any) -> dict[str, Any]:
    """What matters of a message."""
    details = message.response_metadata
    finish = details.get("done_reason" if OLLAMA else "finish_reason")
    tokens = message.usage_metadata and message.usage_metadata["output_tokens"]
    return {"text": message.content, "finish": finish, "tokens": tokens}


def whole(
    url: str,
    model: str,
    text: str,
    limit: int | None = None,
    timeout: float = drive.TIMEOUT,
    **_: Any,
) -> dict[str, Any]:
    return ended(chat(url, model, limit, timeout).invoke(text))


def stream(
    url: str,
    tell: Tell,
    model: str,
    text: str,
    limit: int | None = None,
    timeout: float = drive.TIMEOUT,
) -> dict[str, Any]:
    parts = []
    for part in chat(url, model, limit, timeout).stream(text):
        parts.append(part)
        if part.content:
            tell(part.content)
    return ended(functools.reduce(operator.add, parts))


def tools(url: str, model: str, stream: bool, **_: Any) -> dict[str, Any]:
    """The model asks for a tool, is told its result, and answers."""
    there = chat(url, model, None, drive.TIMEOUT).bind_tools([TOOL])
    messages: list[Any] = [("user", "How warm is it in Rome?")]
    if stream:
        first = functools.reduce(operator.add, there.stream(messages))
    else:
        first = there.invoke(messages)
    [call] = first.tool_calls
    result = {"role": "tool", "tool_call_id": call["id"], "content": drive.SUNNY}
    last = there.invoke([*messages, first, result])
    told = {"name": call["name"], "arguments": call["args"]}
    return {**told, "finish": ended(first)["finish"], "text": last.content}


def embeddings(url: str, model: str, texts: list[str], **_: Any) -> list[list[float]]:
    if OLLAMA:
        return OllamaEmbeddings(model=model, base_url=url).embed_documents(texts)
    kept = {"check_embedding_ctx_length": False}  # else it fetches a tokenizer from the network
    there = OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key="none", **kept)
    return there.embed_documents(texts)


async def whole_async(url: str, model: str, text: str, **_: Any) -> dict[str, Any]:
    return ended(await chat(url, model, None, drive.TIMEOUT).ainvoke(text))


async def stream_async(url: str, tell: Tell, model: str, text: str) -> dict[str, Any]:
    parts = []
    async for part in chat(url, model, None, drive.TIMEOUT).astream(text):
        parts.append(part)
        if part.content:
            tell(part.content)
    return ended(functools.reduce(operator.add, parts))


if __name__ == "__main__":
    drive.serve(whole, stream, tools, embeddings, whole_async, stream_async)
