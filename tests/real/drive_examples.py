"""What the examples of the official Ollama library for Python do, as drive.py tells it.

Each job is one of them, or a family of them (github.com/ollama/ollama-python, examples/): it does
their calls in their order and gives what they would have printed.
"""

from __future__ import annotations

import base64
from typing import Any

import drive
import ollama

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SKY = drive.user("Why is the sky blue?")
SCHEMA = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"]}
TIMES = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "created_at")


def printed(answer: Any) -> Any:
    """All that an answer has, without its times."""
    facts = answer.model_dump(mode="json", exclude_none=True)
    return {name: value for name, value in facts.items() if name not in TIMES}


def all_printed(answers: Any) -> list[Any]:
    return [printed(answer) for answer in answers]


def add_two_numbers(a: int, b: int) -> int:
    """Add two numbers.

    Args:
      a (int): The first number
      b (int): The second number

    Returns:
      int: The sum of the two numbers
    """
    return int(a) + int(b)


def chat(url: str, model: str, **_: Any) -> Any:
    """chat, chat-stream, chat-with-history, chat-logprobs."""
    there = ollama.Client(url)
    first = there.chat(model, messages=SKY)
    history = [*SKY, first.message, *drive.user("And at night?")]
    return [
        printed(first),
        *all_printed(there.chat(model, messages=SKY, stream=True)),
        printed(there.chat(model, messages=history, options={"temperature": 0})),
        printed(there.chat(model, messages=SKY, logprobs=True, top_logprobs=3)),
    ]


async def chat_async(url: str, model: str, **_: Any) -> Any:
    """async-chat, async-generate."""
    there = ollama.AsyncClient(url)
    parts = [part async for part in await there.chat(model, messages=SKY, stream=True)]
    whole = await there.chat(model, messages=SKY)
    return all_printed([*parts, whole, await there.generate(model, "Why?")])


def generate(url: str, model: str, **_: Any) -> Any:
    """generate, generate-stream, generate-logprobs, fill-in-middle."""
    there = ollama.Client(url)
    middle = {"num_predict": 128, "temperature": 0, "top_p": 0.9, "stop": ["<EOT>"]}
    prompt, suffix = "def remove_non_ascii(s: str) -> str:\n", "\nreturn result\n"
    return [
        printed(there.generate(model, "Why is the sky blue?")),
        *all_printed(there.generate(model, "Why is the sky blue?", stream=True)),
        printed(there.generate(model, "Why?", logprobs=True, top_logprobs=3)),
        printed(there.generate(model=model, prompt=prompt, suffix=suffix, options=middle)),
    ]


def multimodal(url: str, model: str, **_: Any) -> Any:
    """multimodal-chat, multimodal-generate, structured-outputs-image."""
    there = ollama.Client(url)
    messages = [{"role": "user", "content": "What is it?", "images": [PIXEL]}]
    return [
        printed(there.chat(model, messages=messages)),
        *all_printed(there.generate(model, "explain", images=[PIXEL], stream=True)),
        printed(there.chat(model, messages=messages, format=SCHEMA, options={"temperature": 0})),
    ]


def tools(url: str, model: str, **_: Any) -> Any:
    """tools, multi-tool, gpt-oss-tools: called, told the result, and asked once more."""
    there, messages, seen = ollama.Client(url), drive.user("What is three plus one?"), []
    for stream in (False, True):
        given = [add_two_numbers, {"type": "function", "function": drive.WEATHER}]
        answers = there.chat(model, messages=messages, tools=given, think=True, stream=stream)
        parts = list(answers) if stream else [answers]
        calls = [call for part in parts for call in part.message.tool_calls or []]
        for call in calls:
            result = add_two_numbers(**call.function.arguments)
            said = {"role": "assistant", "tool_calls": [call]}
            told = {"role": "tool", "content": str(result), "tool_name": call.function.name}
            last = there.chat(model, messages=[*messages, said, told], tools=given)
            seen += [*all_printed(parts), printed(last)]
    return seen


async def tools_async(url: str, model: str, **_: Any) -> Any:
    """async-tools."""
    there = ollama.AsyncClient(url)
    return printed(await there.chat(model, messages=SKY, tools=[add_two_numbers]))


def structured(url: str, model: str, **_: Any) -> Any:
    """structured-outputs."""
    there = ollama.Client(url)
    return all_printed(there.chat(model, messages=SKY, format=form) for form in (SCHEMA, "json"))


async def structured_async(url: str, model: str, **_: Any) -> Any:
    """async-structured-outputs."""
    return printed(await ollama.AsyncClient(url).chat(model, messages=SKY, format=SCHEMA))


def thinking(url: str, model: str, **_: Any) -> Any:
    """thinking, thinking-generate, thinking-levels."""
    there = ollama.Client(url)
    return [
        *all_printed(there.chat(model, messages=SKY, think=how) for how in (True, False, "high")),
        *all_printed(there.chat(model, messages=SKY, think=True, stream=True)),
        printed(there.generate(model, "Why?", think=True)),
    ]


def embed(url: str, model: str, **_: Any) -> Any:
    """embed, alone and as a batch; the older route too."""
    there = ollama.Client(url)
    alone, batch = there.embed(model=model, input="Hello"), there.embed(model, ["a", "b", "c"])
    return [*all_printed([alone, batch]), printed(there.embeddings(model, "Hello"))]


def show(url: str, model: str, **_: Any) -> Any:
    """list, show."""
    there = ollama.Client(url)
    shown = there.show(model)
    return [
        [(one.model, one.size, one.digest) for one in there.list().models],
        [shown.capabilities, shown.modelinfo, printed(shown.details)],
    ]


def loaded(url: str, model: str, **_: Any) -> Any:
    """ps, and around it how a model is loaded and unloaded."""
    there = ollama.Client(url)

    def now() -> list[Any]:
        return [(one.model, one.context_length) for one in there.ps().models]

    seen: list[Any] = []
    for ask in (there.generate, there.chat):
        seen += [printed(ask(model)), now(), printed(ask(model, keep_alive=0)), now()]
    there.generate(model, "Why is the sky blue?", keep_alive="10m")
    return [*seen, now()]


def pull(url: str, model: str, **_: Any) -> Any:
    """pull, as ps does it too: with its progress, and used at once."""
    there = ollama.Client(url)
    told = all_printed(there.pull("gemma3", stream=True))
    whole = there.pull(model)
    answer = there.chat("gemma3", messages=SKY)
    return [*told, printed(whole), printed(answer), [one.model for one in there.list().models]]


def create(url: str, model: str, **_: Any) -> Any:
    """create in its two ways, then all that one does with what is new, in one breath."""
    there = ollama.Client(url)
    made = [printed(there.create(model="mine", from_=model, system="You are Mario."))]
    made += all_printed(there.create(model="mine2", from_=model, stream=True))
    made += [there.show("mine").capabilities, printed(there.chat("mine", messages=SKY))]
    made += [printed(there.copy("mine", "user/copied"))]
    made += [printed(there.generate("user/copied", "Why?")), *rows(there)]
    made += [printed(there.delete(name)) for name in ("mine", "mine2", "user/copied")]
    return [*made, *rows(there)]


def rows(there: Any) -> list[Any]:
    return sorted(one.model for one in there.list().models)


async def create_async(url: str, model: str, **_: Any) -> Any:
    there = ollama.AsyncClient(url)
    made: list[Any] = [printed(await there.create(model="mine", from_=model))]
    made += [printed(await there.copy("mine", "theirs")), printed(await there.delete("mine"))]
    return [*made, sorted(one.model for one in (await there.list()).models)]


def unknown(url: str, model: str, **_: Any) -> Any:
    """The library's README: an unknown model is an error with its status."""
    there, seen = ollama.Client(url), []
    wanted = (there.chat, there.generate, there.embed, there.show, there.delete)
    for ask in wanted:
        try:
            ask("does-not-yet-exist")
        except ollama.ResponseError as error:  # noqa: PERF203 - each has one
            seen.append([error.status_code, error.error])
    assert len(seen) == len(wanted), model
    return seen


EXAMPLES = (
    *(chat, chat_async, generate, multimodal, tools, tools_async, structured, structured_async),
    *(thinking, embed, show, loaded, pull, create, create_async, unknown),
)

if __name__ == "__main__":
    drive.serve(*EXAMPLES)
