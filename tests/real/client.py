"""What the official OpenAI client for Python gets from a counting model: client.py BASE_URL.

One JSON line with all that it saw; then it leaves a stream in its middle, says `left`, and lives
on until its standard input ends: the closed stream must free the runner, not the end of a process.
client.mjs is the same for Node.
"""

import json
import sys

import openai


def ask(text: str, **more: object) -> dict:
    """The arguments of one chat request."""
    return {"model": "counter", "messages": [{"role": "user", "content": text}], **more}


def whole(client: openai.OpenAI) -> dict:
    """A whole answer that ends by itself."""
    answer = client.chat.completions.create(**ask("go 990"))
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish": choice.finish_reason,
        "tokens": answer.usage.completion_tokens,
    }


def stream(client: openai.OpenAI) -> dict:
    """A streamed answer that ends at its limit, with usage."""
    wanted = ask("hello", max_tokens=40, stream=True, stream_options={"include_usage": True})
    pieces, finish, tokens = [], [], []
    for chunk in client.chat.completions.create(**wanted):
        if chunk.usage:
            tokens.append(chunk.usage.completion_tokens)
        for choice in chunk.choices:
            if choice.delta.content:
                pieces.append(choice.delta.content)
            if choice.finish_reason:
                finish.append(choice.finish_reason)
    return {"pieces": pieces, "finish": finish, "tokens": tokens}


def unknown(client: openai.OpenAI) -> dict:
    """The error that a model which nobody serves gives."""
    try:
        client.chat.completions.create(**{**ask("hello"), "model": "nobody"})
    except openai.APIStatusError as error:
        return {"kind": type(error).__name__, "status": error.status_code, "code": error.code}
    return {}


def leave(client: openai.OpenAI) -> None:
    """Close a long stream after its third piece."""
    with client.chat.completions.create(**ask("hello", max_tokens=900, stream=True)) as answer:
        seen = 0
        for chunk in answer:
            seen += bool(chunk.choices and chunk.choices[0].delta.content)
            if seen == 3:
                break


def main() -> None:
    """Everything in turn; no attempt is repeated, so that a failure is seen."""
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=20)
    seen = {
        "models": [model.id for model in client.models.list()],
        "whole": whole(client),
        "stream": stream(client),
        "unknown": unknown(client),
    }
    print(json.dumps(seen), flush=True)
    leave(client)
    print("left", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
