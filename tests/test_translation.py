"""Where a runner does not speak the client's dialect, what it gets and gives is what it would be.

Judged against recordings of what Ollama itself answers on its /v1 routes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import re
import struct
from datetime import datetime
from typing import Any

import pytest

from tests.fake_ollama import (
    COUNTS,
    EVENTS,
    NDJSON,
    Recording,
    Runner,
    arrival,
    chat_end,
    chat_line,
    ended,
    exchange,
    generate_end,
    generate_line,
    least,
    line,
    lines,
    open_stream,
    post,
    refuse,
    staged,
    stream,
    told,
    turns,
)
from tests.fakes import Answer, FakeRequest, Raw, ask, chunk, http, render_head, running, sse

CHAT = "/v1/chat/completions"
MIB = 1024 * 1024
USAGE = {
    "prompt_tokens": COUNTS["prompt_eval_count"],
    "completion_tokens": COUNTS["eval_count"],
    "total_tokens": COUNTS["prompt_eval_count"] + COUNTS["eval_count"],
}
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
JPEG = b"\xff\xd8\xff\xe0" + b"\0" * 8
WEBP = b"RIFF\0\0\0\0WEBPVP8 "
DONE = sse("[DONE]")


def asked_chat(*messages: Any, **more: Any) -> dict[str, Any]:
    """A chat completion that Ollama can only be given on its own route: it says numCtx."""
    said = list(messages) or [{"role": "user", "content": "hi"}]
    return {"model": "m", "messages": said, "numCtx": 4096, **more}


async def seen(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """What the Ollama backend is asked for this request."""
    streamed = body.get("stream") is True
    native = {"/v1/embeddings": "/api/embed", "/v1/completions": "/api/generate"}
    async with Runner() as runner, running(runner.url) as q:
        end: Any = {
            CHAT: chat_end(content="x"),
            "/v1/completions": generate_end(text="x"),
            "/v1/embeddings": {"model": "m", "embeddings": [[0.5]], "prompt_eval_count": 1},
        }[path]
        request, answer = await exchange(q, runner, path, body, [line(end)] if streamed else end)
        assert answer.status == 200, answer
        assert request.path == native.get(path, "/api/chat")
        return dict(request.json)


async def refused(body: dict[str, Any], path: str = CHAT, kind: str = "ollama") -> Answer:
    """What the client is told of a request that never reaches the backend."""
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        await told(q)
        answer = await ask(q.port, "POST", path, json=body)
        assert not runner.requests, runner.requests
        return answer


async def options(**more: Any) -> dict[str, Any]:
    return dict((await seen(asked_chat(**more)))["options"])


def assert_error(answer: Answer, status: int, *parts: str) -> None:
    assert (answer.status, answer.clean) == (status, True), answer
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message, answer
    for part in parts:
        assert part in message, answer


# ---- When Ollama is asked on its own route ---------------------------------------------------


async def test_chat_goes_to_ollamas_v1_while_nothing_needs_more() -> None:
    body = json.dumps(least(CHAT, temperature=0.5)).encode()
    recorded = Recording("ollama.chat")
    async with Runner() as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, CHAT, body, recorded.replay)
        assert (request.path, request.body) == (CHAT, body)
        assert answer.body == recorded.body


@pytest.mark.parametrize("more", [{"numCtx": 4096}, {"keep_alive": "10m"}], ids=str)
async def test_num_ctx_or_keep_alive_leads_to_the_native_route(more: dict[str, Any]) -> None:
    async with Runner() as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, CHAT, least(CHAT, **more), chat_end())
        assert request.path == "/api/chat"
        assert request.headers["content-type"].startswith("application/json")
        assert answer.status == 200


async def test_mark_that_another_request_left_leads_to_the_native_route() -> None:
    async with Runner() as runner, running(runner.url) as q:
        first, _ = await exchange(q, runner, CHAT, asked_chat(numCtx=8192), chat_end())
        assert first.json["options"]["num_ctx"] == 8192
        for path in (CHAT, "/chat/completions"):
            request, answer = await exchange(q, runner, path, least(path), chat_end(content="x"))
            assert request.path == "/api/chat"
            assert request.json["options"]["num_ctx"] == 8192
            assert answer.json()["object"] == "chat.completion"


async def test_context_that_the_model_is_loaded_with_by_itself_leads_nowhere() -> None:
    recorded = Recording("ollama.chat")
    async with Runner() as runner:
        runner.contexts = {"m": 16384}
        async with running(runner.url) as q:
            await told(q)
            body = json.dumps(least(CHAT, temperature=0.5), indent=1).encode()
            request, answer = await exchange(q, runner, CHAT, body, recorded.replay)
            assert (request.path, request.body) == (CHAT, body)
            assert answer.body == recorded.body


async def test_context_that_the_model_is_loaded_with_is_what_one_that_asks_for_less_gets() -> None:
    async with Runner() as runner:
        runner.contexts = {"m": 16384}
        async with running(runner.url) as q:
            await told(q)
            request, _ = await exchange(q, runner, CHAT, asked_chat(), chat_end(content="x"))
            assert request.path == "/api/chat"
            assert request.json["options"]["num_ctx"] == 16384
            request, _ = await exchange(
                q, runner, CHAT, asked_chat(numCtx=20000), chat_end(content="x")
            )
            assert request.json["options"]["num_ctx"] == 20000


async def test_num_ctx_means_nothing_to_other_runners() -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        answered = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
        request, answer = await exchange(q, runner, CHAT, asked_chat(), answered)
        assert (request.path, request.json) == (CHAT, least(CHAT))
        assert answer.status == 200


# ---- What Ollama is asked --------------------------------------------------------------------


async def test_plain_chat() -> None:
    system = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": '日本 🦙 \u0000 "\\'}
    said = {"role": "assistant", "content": "ok"}
    document = await seen(asked_chat(system, user, said, user))
    assert document["messages"] == [system, user, said, user]
    assert (document["model"], document["stream"]) == ("m", False)
    assert document["options"] == {"num_ctx": 4096, "temperature": 1.0, "top_p": 1.0}
    assert not document.keys() & {"numCtx", "priority", "tools", "format", "think", "keep_alive"}


@pytest.mark.parametrize("value", [None, False, True])
async def test_stream_is_said_for_ollama_streams_by_default(value: bool | None) -> None:
    document = await seen(asked_chat(**({} if value is None else {"stream": value})))
    assert document["stream"] is (value is True)


async def test_text_parts_are_joined_to_the_same_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    document = await seen(asked_chat({"role": "user", "content": parts}))
    texts = [message["content"] for message in document["messages"]]
    assert {message["role"] for message in document["messages"]} == {"user"}
    assert re.fullmatch(r"one\s*two", "\n".join(texts) if len(texts) > 1 else texts[0])


@pytest.mark.parametrize(
    ("kind", "data"), [("png", PNG), ("jpeg", JPEG), ("jpg", JPEG), ("webp", WEBP)]
)
@pytest.mark.parametrize("form", ["object", "text"])
async def test_images_as_data_urls_become_base64(kind: str, data: bytes, form: str) -> None:
    packed = base64.b64encode(data).decode()
    url = f"data:image/{kind};base64,{packed}"
    image = {"type": "image_url", "image_url": url if form == "text" else {"url": url}}
    parts = [{"type": "text", "text": "what is this?"}, image]
    document = await seen(asked_chat({"role": "user", "content": parts}))
    assert [i for m in document["messages"] for i in m.get("images") or []] == [packed]
    assert "".join(m.get("content") or "" for m in document["messages"]) == "what is this?"
    assert {message["role"] for message in document["messages"]} == {"user"}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x.png",
        "https://example.com/x.png",
        "HTTP://example.com/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/png,notbase64",
        "",
    ],
)
async def test_image_that_is_no_data_url_is_refused_and_never_fetched(url: str) -> None:
    image = {"type": "image_url", "image_url": {"url": url}}
    answer = await refused(asked_chat({"role": "user", "content": [image]}))
    assert_error(answer, 400, "image")


NO_SOUND = {"type": "input_audio", "input_audio": {"format": "wav"}}


@pytest.mark.parametrize("part", [NO_SOUND, {"type": "file"}, "text", {}, None])
async def test_part_that_ollama_has_no_word_for_is_refused(part: Any) -> None:
    answer = await refused(asked_chat({"role": "user", "content": [part]}))
    assert answer.status in (400, 501)
    assert answer.json()["error"]["message"]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Köln"]}},
            "required": ["town"],
        },
    },
}
CALLS = [
    {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"town": "Köln", "n": [1, 2.5, null]}'},
    },
    {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
]


async def test_tools_calls_and_results_in_ollamas_words() -> None:
    document = await seen(
        asked_chat(
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "call_2", "content": "12:00"},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
            {"role": "tool", "tool_call_id": "call_9", "name": "named", "content": "x"},
            tools=[TOOL],
        )
    )
    assert document["tools"] == [TOOL]
    _, said, *results = document["messages"]
    assert said["role"] == "assistant"
    assert said.get("content") in (None, "")
    assert [call["function"]["name"] for call in said["tool_calls"]] == ["weather", "clock"]
    given = [call["function"]["arguments"] for call in said["tool_calls"]]
    assert given == [{"town": "Köln", "n": [1, 2.5, None]}, {}]
    assert [one["role"] for one in results] == ["tool"] * 3
    assert [one["tool_name"] for one in results] == ["clock", "weather", "named"]
    assert [one["content"] for one in results] == ["12:00", "rain", "x"]


async def test_tool_call_id_that_was_used_twice_means_the_last() -> None:
    twice = [
        {"id": "c", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for name in ("old", "new")
    ]
    document = await seen(
        asked_chat(
            {"role": "assistant", "content": "", "tool_calls": twice[:1]},
            {"role": "assistant", "content": "", "tool_calls": twice[1:]},
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        )
    )
    assert document["messages"][-1]["tool_name"] == "new"


@pytest.mark.parametrize("arguments", ["{", "not json", 7])
async def test_tool_arguments_that_are_no_json_are_400(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = await refused(asked_chat({"role": "assistant", "content": "", "tool_calls": [call]}))
    assert_error(answer, 400, "arguments")


async def test_content_that_is_missing_without_tool_calls_is_400() -> None:
    assert_error(await refused(asked_chat({"role": "user", "content": None})), 400, "content")
    assert_error(await refused(asked_chat({"role": "user", "content": 7})), 400, "content")


@pytest.mark.parametrize("calls", [[], CALLS], ids=["none", "some"])
async def test_content_may_be_null_beside_tool_calls_even_none(calls: list[Any]) -> None:
    """SDKs write an answer back as it came: `content: null, tool_calls: []`."""
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    document = await seen(asked_chat({"role": "user", "content": "hi"}, said))
    assert document["messages"][1]["content"] == ""
    assert len(document["messages"][1].get("tool_calls", [])) == len(calls)


async def test_sound_goes_where_ollamas_v1_puts_it() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    document = await seen(asked_chat({"role": "user", "content": [sound]}))
    assert document["messages"] == [{"role": "user", "content": "", "images": ["UklGRg=="]}]


async def test_number_may_be_written_with_a_point_where_a_whole_one_is_meant() -> None:
    document = await seen(asked_chat(max_tokens=128.0, seed=7.0, numCtx=4096.0))
    told = document["options"]
    assert [type(told[name]) for name in ("num_predict", "seed", "num_ctx")] == [int] * 3
    assert (told["num_predict"], told["num_ctx"]) == (128, 4096)


HELD = {"role": "assistant", "content": "x"}


def schema_form(told: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": told}


def wrong_calls(more: Any, name: str) -> list[tuple[dict[str, Any], str]]:
    """A history with one bad tool call in it, and where that is bad."""
    good = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    said = {**HELD, "tool_calls": [good, {**good, **more}]}
    return [({"messages": [HELD, said]}, f"messages[1].tool_calls[1].{name}")]


WRONG_TOOLS: list[tuple[dict[str, Any], str]] = [  # the same in both dialects
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{}, {"type": 7}]}, "tools[1].type"),
    ({"tools": [{"type": "function", "function": "f"}]}, "tools[0].function"),
    ({"tools": [{"function": {"name": ["f"]}}]}, "tools[0].function.name"),
    ({"tools": [{"function": {"name": "f", "parameters": "x"}}]}, "tools[0].function.parameters"),
    *wrong_calls({"function": "f"}, "function"),
    *wrong_calls({"function": {"name": 7}}, "function.name"),
    *(
        one
        for odd in (5, [], False, [{}])
        for one in wrong_calls({"function": {"name": "f", "arguments": odd}}, "function.arguments")
    ),
]
WRONG: list[tuple[dict[str, Any], str]] = [  # with the name that is told
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"seed": True}, "seed"),
    ({"temperature": "hot"}, "temperature"),
    ({"stop": [1]}, "stop"),
    ({"tools": {}}, "tools"),
    ({"logprobs": 1}, "logprobs"),
    ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"reasoning": {"effort": []}}, "reasoning.effort"),
    ({"reasoning": "high"}, "reasoning"),
    ({"response_format": "json"}, "response_format"),
    ({"stream_options": True, "stream": True}, "stream_options"),
    ({"keep_alive": []}, "keep_alive"),
    ({"messages": [{"role": 7, "content": "x"}]}, "messages[0].role"),
    ({"messages": [HELD, {"role": "user", "content": 7}]}, "messages[1].content"),
    ({"messages": [{**HELD, "tool_calls": "f"}]}, "messages[0].tool_calls"),
    ({"messages": [HELD, {**HELD, "tool_calls": [7]}]}, "messages[1].tool_calls[0]"),
    ({"response_format": {"type": ["text"]}}, "response_format.type"),
    ({"response_format": schema_form("x")}, "response_format.json_schema"),
    ({"response_format": schema_form({"schema": "x"})}, "response_format.json_schema.schema"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    *WRONG_TOOLS,
    *wrong_calls({"id": [7]}, "id"),
    *wrong_calls({"id": 7}, "id"),
    *wrong_calls({"type": {}}, "type"),
    (
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": 7}]},
        "messages[0].tool_call_id",
    ),
]
WRONG_NATIVE: list[tuple[dict[str, Any], str]] = [
    ({"options": {"temperature": "hot"}}, "options.temperature"),
    ({"options": {"num_predict": [1]}}, "options.num_predict"),
    ({"options": {"top_k": True}}, "options.top_k"),
    ({"think": 3}, "think"),
    ({"format": "xml"}, "format"),
    ({"tools": "f"}, "tools"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "images": [7]}]}, "messages[0].images"),
    ({"messages": [{**HELD, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    *WRONG_TOOLS,
    *wrong_calls({"id": [7]}, "id"),
]


@pytest.mark.parametrize(("wrong", "name"), WRONG, ids=str)
async def test_wrong_type_is_400_with_the_members_name(wrong: dict[str, Any], name: str) -> None:
    answer = await refused({**asked_chat(), **wrong})
    assert_error(answer, 400, name)
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(("wrong", "name"), WRONG_NATIVE, ids=str)
async def test_wrong_type_is_400_for_ollamas_clients_too(wrong: dict[str, Any], name: str) -> None:
    answer = await refused({"model": "m", **SAY, **wrong}, "/api/chat", kind="llamacpp")
    assert_error(answer, 400, name)
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("odd", [7, 0, True, False, {}, {"a": "x"}, [7], ["x", None], [["x"]]])
@pytest.mark.parametrize(("path", "name"), [("/api/embed", "input"), ("/api/embeddings", "prompt")])
async def test_what_is_embedded_is_a_text_or_texts(path: str, name: str, odd: Any) -> None:
    answer = await refused({"model": "m", name: odd}, path, kind="llamacpp")
    assert_error(answer, 400, f"{name} is a text")


async def test_null_and_empty_members_inside_are_none() -> None:
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": None}}
    tools = [{"type": "custom", "custom": {}}, {"function": None}, {"function": {"name": None}}]
    form = {"type": "json_schema", "json_schema": None}
    said = {"role": "assistant", "content": "ok", "tool_calls": [call]}
    more = {"tools": tools, "response_format": form, "stream_options": {"include_usage": None}}
    document = await seen(asked_chat(said, {"role": "user", "content": "?"}, **more))
    assert document["tools"] == tools
    assert "format" not in document
    assert document["messages"][0]["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]


async def test_reasoning_in_the_history_becomes_thinking() -> None:
    said = {"role": "assistant", "content": "ok", "reasoning": "because"}
    document = await seen(asked_chat(said, {"role": "user", "content": "?"}))
    assert document["messages"][0] == {
        "role": "assistant",
        "content": "ok",
        "thinking": "because",
    }


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, "json"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}},
                }
            },
            {"type": "object"},
        ),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None}, None),
    ],
)
async def test_response_format_becomes_format(asked: dict[str, Any], wanted: Any) -> None:
    assert (await seen(asked_chat(**asked))).get("format") == wanted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": None}, {}),
        ({"seed": 7}, {"seed": 7}),
        ({"frequency_penalty": 0.5, "presence_penalty": -1}, {"frequency_penalty": 0.5}),
        ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
        ({"max_tokens": 5}, {"num_predict": 5}),
        ({"max_completion_tokens": 6}, {"num_predict": 6}),
        ({"max_tokens": None, "max_completion_tokens": 6}, {"num_predict": 6}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": None, "top_p": None}, {"temperature": 1.0, "top_p": 1.0}),
        ({"numCtx": 2048}, {"num_ctx": 2048}),
    ],
    ids=str,
)
async def test_options_in_ollamas_words(asked: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = await options(**asked)
    for name, value in wanted.items():
        assert found[name] == value, name
    if not any(name.startswith("max_") for name in asked):
        assert "num_predict" not in found
    if not asked.get("stop"):
        assert "stop" not in found


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "medium"}, "medium"),
        ({"reasoning_effort": "low"}, "low"),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "xhigh"}, "max"),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning": {"effort": "high"}}, "high"),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "low"),
        ({"reasoning_effort": None, "reasoning": None}, None),
    ],
    ids=str,
)
async def test_reasoning_effort_becomes_think(asked: dict[str, Any], wanted: Any) -> None:
    document = await seen(asked_chat(**asked))
    assert document.get("think") == wanted
    assert ("think" in document) is (wanted is not None)


async def test_logprobs_are_asked_for_as_they_were() -> None:
    document = await seen(asked_chat(logprobs=True, top_logprobs=3))
    assert (document["logprobs"], document["top_logprobs"]) == (True, 3)


async def test_keep_alive_is_passed_on() -> None:
    for value in ("10m", 0, -1, 300):
        document = await seen({**least(CHAT), "keep_alive": value})
        assert document["keep_alive"] == value


async def test_what_openai_says_and_ollama_ignores_is_left_out() -> None:
    ignored = {
        "n": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "store": False,
        "stream_options": {"include_usage": True},
        "priority": "high",
    }
    document = await seen(asked_chat(**ignored))
    assert not document.keys() & ignored.keys()


async def test_big_numbers_and_odd_texts_survive_the_way() -> None:
    content = "".join(map(chr, range(1, 0x300))) + "\u2028\ufeff🦙"
    schema = {"type": "object", "const": 12345678901234567890, "x": 1e-7}
    document = await seen(
        asked_chat(
            {"role": "user", "content": content},
            response_format={"type": "json_schema", "json_schema": {"schema": schema}},
        )
    )
    assert document["messages"][0]["content"] == content
    assert document["format"] == schema


# ---- What the client is answered -------------------------------------------------------------


def whole_native(recorded: Any) -> dict[str, Any]:
    """What Ollama's /api/chat says where its /v1 was recorded to say this."""
    (choice,), usage = recorded["choices"], recorded["usage"]
    counts = {
        "prompt_eval_count": usage["prompt_tokens"],
        "eval_count": usage["completion_tokens"],
    }
    said = chat_end(choice["finish_reason"], choice["message"]["content"])
    return {**said, **counts, "model": recorded["model"]}


def native_lines(recorded: list[Any]) -> list[dict[str, Any]]:
    """What Ollama's /api/chat streams where its /v1 was recorded to stream this."""
    found: list[dict[str, Any]] = []
    for event in recorded[:-1]:
        if not event["choices"]:  # the usage
            usage = event["usage"]
            found[-1]["prompt_eval_count"] = usage["prompt_tokens"]
            found[-1]["eval_count"] = usage["completion_tokens"]
        elif event["choices"][0]["finish_reason"]:
            found.append({**chat_end(event["choices"][0]["finish_reason"]), "model": "counter"})
        else:
            content = event["choices"][0]["delta"]["content"]
            found.append({**chat_line(content), "model": "counter"})
    return found


def bare(document: Any) -> Any:
    """Without what is different each time."""
    if not isinstance(document, dict):
        return document
    assert isinstance(document["id"], str)
    assert isinstance(document["created"], int)
    return {name: value for name, value in document.items() if name not in ("id", "created")}


async def counter(path: str, body: dict[str, Any], reply: Any) -> Answer:
    """The answer for the model of the recordings; the native route is asked."""
    async with Runner(["counter"]) as runner, running(runner.url) as q:
        asked = {"model": "counter", **body, "numCtx": 4096}
        request, answer = await exchange(q, runner, path, asked, reply)
        assert request.path.startswith("/api/")
        return answer


@pytest.mark.parametrize("name", ["chat", "chat-length", "chat-json"])
async def test_whole_answer_is_what_ollamas_v1_was_recorded_to_say(name: str) -> None:
    recorded = Recording(f"ollama.{name}")
    answer = await counter(CHAT, ASK, whole_native(recorded.json()))
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/json")
    assert bare(answer.json()) == bare(recorded.json())
    assert answer.json()["id"].startswith("chatcmpl-")


ASK = {"messages": [{"role": "user", "content": "go 994"}]}


@pytest.mark.parametrize("name", ["chat-stream", "chat-stream-usage"])
async def test_stream_is_what_ollamas_v1_was_recorded_to_say(name: str) -> None:
    recorded = Recording(f"ollama.{name}")
    usage = {"stream_options": {"include_usage": True}} if "usage" in name else {}
    reply = [line(one) for one in native_lines(recorded.events())]
    answer = await counter(CHAT, {**ASK, "stream": True, **usage}, reply)
    assert_same_events(answer, recorded)


async def test_stream_recorded_on_both_routes_is_the_same() -> None:
    """The same question, asked of Ollama's two routes: nothing here was made up."""
    native, recorded = Recording("ollama.api-chat-stream"), Recording("ollama.chat-stream")
    answer = await counter(CHAT, {**ASK, "stream": True}, native.replay)
    assert_same_events(answer, recorded)


def assert_same_events(answer: Answer, recorded: Recording) -> None:
    """Event for event, field for field, but for id and created, which is one each."""
    assert (answer.status, answer.clean) == (200, True), answer
    assert answer.headers["content-type"].startswith(EVENTS)
    events, wanted = answer.events(), recorded.events()
    assert [bare(event) for event in events] == [bare(event) for event in wanted]
    assert events[-1] == "[DONE]"
    assert len({event["id"] for event in events[:-1]}) == 1


async def test_ids_are_unique_though_ollamas_are_not() -> None:
    ids = set()
    async with Runner() as runner, running(runner.url) as q:
        for _ in range(20):
            _, answer = await exchange(q, runner, CHAT, asked_chat(), chat_end(content="x"))
            ids.add(answer.json()["id"])
    assert len(ids) == 20


async def test_created_is_a_time_of_today() -> None:
    answer = await counter(CHAT, ASK, chat_end(content="x"))
    assert 1_700_000_000 < answer.json()["created"] < 4_000_000_000


async def test_whole_tool_calls_in_openais_words() -> None:
    arguments = {"town": "Köln", "n": 1, "deep": {"b": [1.5, None], "a": '"'}, "done": True}
    calls = [
        {"id": "call_abc", "function": {"index": 0, "name": "weather", "arguments": arguments}},
        {"function": {"index": 1, "name": "clock", "arguments": {}}},
    ]
    native = chat_end("stop", "", message={"tool_calls": calls, "thinking": "hm"})
    answer = await counter(CHAT, ASK, native)
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["reasoning"]) == ("assistant", "hm")
    assert message["content"] == ""
    first, second = message["tool_calls"]
    assert (first["id"], first["type"]) == ("call_abc", "function")
    assert [one["function"]["name"] for one in (first, second)] == ["weather", "clock"]
    assert isinstance(first["function"]["arguments"], str)
    assert json.loads(first["function"]["arguments"]) == arguments
    assert second["function"]["arguments"] == "{}"
    assert isinstance(second["id"], str)
    assert second["id"] not in ("", first["id"])
    assert [one["index"] for one in (first, second)] == [0, 1]
    assert answer.json()["usage"] == USAGE


async def test_streamed_tool_calls_in_openais_words() -> None:
    """Each whole, with its index and id; the finish reason says that there were some."""
    calls = [
        {"function": {"index": 0, "name": "weather", "arguments": {"town": "Köln"}}},
        {"function": {"index": 1, "name": "clock", "arguments": {}}},
    ]
    reply = [
        line(chat_line("", message={"thinking": "hm"})),
        line(chat_line("", message={"tool_calls": calls[:1]})),
        line(chat_line("", message={"tool_calls": calls[1:]})),
        line(chat_end()),
    ]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    assert answer.clean
    *chunks, done = answer.events()
    assert done == "[DONE]"
    choices = [one["choices"][0] for one in chunks]
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert choices[-1]["delta"] == {}
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(one["delta"].get("reasoning") or "" for one in choices) == "hm"
    found = [call for one in choices for call in one["delta"].get("tool_calls", [])]
    assert [call["index"] for call in found] == [0, 1]
    assert [call["function"]["name"] for call in found] == ["weather", "clock"]
    texts = [call["function"]["arguments"] for call in found]
    assert texts == ['{"town":"Köln"}', "{}"]  # as Go writes JSON
    assert [call["type"] for call in found] == ["function"] * 2
    assert len({call["id"] for call in found} | {""}) == 3


async def test_thinking_becomes_reasoning() -> None:
    answer = await counter(CHAT, ASK, chat_end(content="4", message={"thinking": "2+2"}))
    assert answer.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": "4",
        "reasoning": "2+2",
    }
    reply = [
        line(chat_line("", message={"thinking": "2"})),
        line(chat_line("", message={"thinking": "+2"})),
        line(chat_line("4")),
        line(chat_end()),
    ]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    deltas = [one["choices"][0]["delta"] for one in answer.events()[:-1]]
    assert [one.get("reasoning") or "" for one in deltas] == ["2", "+2", "", ""]
    assert "".join(one.get("content") or "" for one in deltas) == "4"


async def test_line_with_thinking_and_content_loses_neither() -> None:
    reply = [line(chat_line("4", message={"thinking": "2+2"})), line(chat_end(content="!"))]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    deltas = [one["choices"][0]["delta"] for one in answer.events()[:-1]]
    assert "".join(one.get("reasoning") or "" for one in deltas) == "2+2"
    assert "".join(one.get("content") or "" for one in deltas) == "4!"
    assert answer.events()[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_reason_for_the_end_is_kept(reason: str) -> None:
    answer = await counter(CHAT, ASK, chat_end(reason, "x"))
    assert answer.json()["choices"][0]["finish_reason"] == reason
    answer = await counter(CHAT, {**ASK, "stream": True}, [line(chat_end(reason))])
    assert answer.events()[-2]["choices"][0]["finish_reason"] == reason


async def test_reason_that_is_missing_is_a_stop() -> None:
    """Old versions say none."""
    native = chat_end(content="x")
    del native["done_reason"]
    answer = await counter(CHAT, ASK, native)
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", None)


async def test_end_without_a_message_is_an_end() -> None:
    reply = [line(chat_line("x")), line({"model": "m", "done": True})]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    assert (answer.status, answer.clean) == (200, True), answer
    assert answer.events()[-2]["choices"][0]["finish_reason"] == "stop"


async def test_completion_whose_reason_is_missing_is_a_stop() -> None:
    native = generate_end(text="x")
    del native["done_reason"]
    answer = await counter("/v1/completions", {"prompt": "hi"}, native)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("reason", ["length", "load"])
async def test_only_a_stop_becomes_tool_calls(reason: str) -> None:
    call = {"id": "a", "function": {"index": 0, "name": "f", "arguments": {}}}
    answer = await counter(CHAT, ASK, chat_end(reason, message={"tool_calls": [call]}))
    assert answer.json()["choices"][0]["finish_reason"] == reason
    reply = [line(chat_line("", message={"tool_calls": [call]})), line(chat_end(reason))]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    assert answer.events()[-2]["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("bad", ["f", {}, {"function": {"name": 7}}, {"function": None}])
async def test_tool_call_of_ollama_that_is_not_understood_costs_no_text(
    bad: Any, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    message = {"tool_calls": [bad]}
    pieces = [line(chat_line("one", message=message)), line(chat_end())]
    reply: Any = pieces if streamed else chat_end(content="one", message=message)
    answer = await counter(CHAT, {**ASK, "stream": streamed}, reply)
    assert (answer.status, answer.clean) == (200, True), answer
    choices = [one["choices"][0] for one in (answer.events()[:-1] if streamed else [answer.json()])]
    messages = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    assert "".join(message.get("content", "") for message in messages) == "one"
    assert choices[-1]["finish_reason"] == "stop"
    assert any("tool call" in text for text in caplog.messages)


async def test_answer_without_counts_has_zeros() -> None:
    """Ollama leaves a count of zero out: a cached prompt has no prompt_eval_count."""
    native = {name: value for name, value in chat_end(content="x").items() if "count" not in name}
    answer = await counter(CHAT, ASK, native)
    zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert answer.json()["usage"] == zero


async def test_logprobs_of_the_runner_come_through() -> None:
    probs = [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}]
    answer = await counter(CHAT, ASK, chat_end(content="x", logprobs=probs))
    assert answer.json()["choices"][0]["logprobs"] == {"content": probs}
    reply = [line(chat_line("x", logprobs=probs)), line(chat_end())]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    assert answer.events()[0]["choices"][0]["logprobs"] == {"content": probs}


async def test_logprobs_without_a_text_are_no_less_an_answer() -> None:
    probs = [{"token": "", "logprob": -0.5}]
    reply = [line(chat_line("x")), line(chat_line("", logprobs=probs)), line(chat_end())]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    told_probs = [event["choices"][0].get("logprobs") for event in answer.events()[:-1]]
    assert told_probs == [None, {"content": probs}, None]
    reply = [said({"content": "x"}), said({}), sse(EMPTY_WITH_PROBS), said({}, "stop"), DONE]
    answer = await native("/api/chat", {**SAY, "logprobs": True}, reply)
    assert [one.get("logprobs") for one in lines(answer)] == [None, [{"token": ""}], None]


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_record_of_a_translated_answer_has_its_tokens(streamed: bool) -> None:
    async with Runner() as runner, running(runner.url) as q:
        body = asked_chat(stream=streamed)
        reply = [line(chat_line("x")), line(chat_end())] if streamed else chat_end(content="x")
        await exchange(q, runner, CHAT, body, reply)
        (record,) = await ended(q)
        assert (record["tokens"], record["outcome"]) == (COUNTS["eval_count"], "done")
        assert (record["route"], record["status"]) == (CHAT, 200)


async def test_pieces_are_translated_as_they_come() -> None:
    async with Runner() as runner, running(runner.url) as q:
        client = await open_stream(q, CHAT, asked_chat(stream=True))
        request = await runner.arrived()
        head = [("Content-Type", NDJSON), ("Transfer-Encoding", "chunked")]
        await request.send(render_head(200, head))
        for text in ("one", " two"):
            await request.send(chunk(line(chat_line(text))))
            got = await client.until(b"\n\n")
            assert json.dumps(text).encode() in got
        request.finished()
        await request.send(chunk(line(chat_end())) + b"0\r\n\r\n")
        assert b"[DONE]" in await client.until(b"0\r\n\r\n")


# ---- Cuts, sizes, failures -------------------------------------------------------------------


@pytest.mark.deadline(30)
async def test_stream_cut_at_any_byte_is_translated_to_the_same() -> None:
    data = line(chat_line("日🦙é")) + line(chat_line("b")) + line(chat_end())
    body = json.dumps(asked_chat(stream=True)).encode()
    async with Runner() as runner, running(runner.url) as q:
        raw = await Raw.open(q.port)
        for at in range(1, len(data)):
            await raw.send(http("POST", CHAT, {"Content-Type": "application/json"}, body))
            request = await runner.arrived()
            head = [("Content-Type", NDJSON), ("Transfer-Encoding", "chunked")]
            await request.send(render_head(200, head) + chunk(data[:at]))
            await turns()
            request.finished()
            await request.send(chunk(data[at:]) + b"0\r\n\r\n")
            answer = await raw.response()
            assert (answer.clean, answer.content) == (True, "日🦙éb"), at
            assert [bare(event) for event in answer.events()[2:]] == FINISH, at


FINISH = [
    {
        "object": "chat.completion.chunk",
        "model": "m",
        "system_fingerprint": "fp_ollama",
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    },
    "[DONE]",
]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n", b""], ids=ascii)
async def test_lines_may_end_as_they_like(ending: bytes) -> None:
    reply = [line(chat_line("x"))[:-1] + (ending or b"\n"), line(chat_end())[:-1] + ending]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    assert (answer.clean, answer.content, answer.events()[-1]) == (True, "x", "[DONE]")


@pytest.mark.deadline(30)
async def test_line_of_a_megabyte_is_translated() -> None:
    long = line(chat_line("é" * (MIB // 2)))
    cuts = [long[at : at + 50_000] for at in range(0, len(long), 50_000)]
    answer = await counter(CHAT, {**ASK, "stream": True}, [*cuts, line(chat_end())])
    assert answer.clean
    assert answer.content == "é" * (MIB // 2)


@pytest.mark.deadline(60)
async def test_line_that_is_too_long_to_be_translated_is_an_error() -> None:
    long = line(chat_line("x" * (9 * MIB)))
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, CHAT, asked_chat(stream=True))
        request = await arrival(asked, runner)
        head = [("Content-Type", NDJSON), ("Transfer-Encoding", "chunked")]
        await request.send(render_head(200, head) + chunk(line(chat_line("one"))))
        with contextlib.suppress(ConnectionError):  # which is what it deserves
            await request.send(chunk(long) + chunk(line(chat_end())) + b"0\r\n\r\n")
        request.finished()
        assert_broken(await asked, "one")


def assert_broken(answer: Answer, text: str, *parts: str) -> None:
    assert answer.status == 200, answer
    assert answer.content == text
    *_, last = answer.events()
    assert isinstance(last, dict), answer
    assert isinstance(last["error"]["message"], str), answer
    for part in parts:
        assert part in last["error"]["message"], answer
    assert not answer.clean, answer
    assert b"[DONE]" not in answer.body
    assert b'"stop"' not in answer.body


async def test_end_that_is_cut_behind_done_is_not_translated() -> None:
    """`done` counts when the answer has ended as HTTP says."""
    reply = staged([line(chat_line("one")), line(chat_end())], end=False)
    assert_broken(await counter(CHAT, {**ASK, "stream": True}, reply), "one")
    cut = staged(GOOD_STREAM, EVENTS, end=False)
    assert_broken_native(await native("/api/chat", SAY, cut), "hello 🦙")


async def test_error_line_breaks_the_translated_stream() -> None:
    """Ollama's own /v1 hides it: an empty chunk and a clean end."""
    reply = [line(chat_line("one")), line({"error": "out of memory"})]
    assert_broken(await counter(CHAT, {**ASK, "stream": True}, reply), "one", "out of memory")


@pytest.mark.parametrize(
    "reply",
    [
        [line(chat_line("one"))],
        [line(chat_line("one")), line(chat_end())[:50]],
        [line(chat_line("one")), line(chat_line("")), line(chat_line(""))],
        [line(chat_line("one")), b"<html>\n"],
        [line(chat_line("one")), b"[]\n", line(chat_end())],
        [line(chat_line("one")), b'{"message":7}\n', line(chat_end())],
        [line(chat_line("one")), b'{"message":{"content":"\xff"}}\n', line(chat_end())],
    ],
    ids=["no end", "cut", "empty", "a page", "a list", "no message", "no UTF-8"],
)
@pytest.mark.parametrize("clean", [True, False])
async def test_stream_that_goes_wrong_is_told_so(reply: list[bytes], clean: bool) -> None:
    async with Runner() as runner, running(runner.url) as q:
        body = asked_chat(stream=True)
        _, answer = await exchange(q, runner, CHAT, body, staged(reply, end=clean))
        assert_broken(answer, "one")
        (record,) = await ended(q)
        assert record["outcome"] == "backend_error"


async def test_done_inside_tool_arguments_does_not_end_the_translated_stream() -> None:
    call = {"function": {"name": "f", "arguments": {"done": True, "done_reason": "stop"}}}
    reply = [line(chat_line("one")), line(chat_line("", message={"tool_calls": [call]}))]
    answer = await counter(CHAT, {**ASK, "stream": True}, reply)
    assert not answer.clean
    assert b"[DONE]" not in answer.body
    assert "error" in answer.events()[-1]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, "registry.ollama.ai/library/m does not support tools"),
        (404, "model 'm' not found"),
        (500, "model runner has unexpectedly stopped"),
        (503, "server busy, please try again.  maximum pending requests exceeded"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_error_before_the_answer_has_its_status_and_openais_shape(
    status: int, text: str, streamed: bool
) -> None:
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, CHAT, asked_chat(stream=streamed))
        await refuse(await arrival(asked, runner), status, {"error": text})
        answer = await asked
        assert_error(answer, status, text)
        types = {400: "invalid_request_error", 404: "not_found_error"}
        assert {"type", "param", "code"} <= answer.json()["error"].keys()
        if status in types:
            assert answer.json()["error"]["type"] in (types[status], "invalid_request_error")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"error":"broke"}', b'{"message":7,"done":true}', b'{"mess'],
    ids=ascii,
)
async def test_whole_answer_that_is_none_is_502(body: bytes) -> None:
    assert_error(await counter(CHAT, ASK, body), 502)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
async def test_number_that_json_cannot_hold_is_not_written_into_an_answer(number: str) -> None:
    """A client in JavaScript cannot read it; what llmq writes itself is JSON or an error."""
    vector = f"[0.5,{number}]"
    reply: Any = f'{{"model":"m","embeddings":[{vector}]}}'.encode()
    assert_error(await counter("/v1/embeddings", {"input": "x"}, reply), 502)
    reply = f'{{"data":[{{"index":0,"embedding":{vector}}}]}}'.encode()
    assert_error(await native("/api/embed", {"input": "x"}, reply), 502)
    last = json.dumps({**chat_end(), "logprobs": ["?"]}).replace('"?"', number).encode()
    said_so = json.dumps({**chat_line("x"), "logprobs": ["?"]}).replace('"?"', number).encode()
    reply = staged([line(chat_line("one")), said_so + b"\n", last + b"\n"])
    assert_broken(await counter(CHAT, {**ASK, "stream": True}, reply), "one")


@pytest.mark.parametrize("member", ["temperature", "seed", "top_p"])
async def test_number_that_json_cannot_hold_is_not_asked_of_a_runner(member: str) -> None:
    async with Runner() as runner, running(runner.url) as q:
        await told(q)
        body = json.dumps(asked_chat(**{member: "?"})).replace('"?"', "1e999").encode()
        assert_error(await ask(q.port, "POST", CHAT, body=body), 400)
        assert not runner.requests


@pytest.mark.deadline(30)
async def test_random_streams_lose_nothing_on_the_way_from_ollama() -> None:
    chance = random.Random(11)
    async with Runner() as runner, running(runner.url) as q:
        for _ in range(60):
            pieces = [random_piece(chance) for _ in range(chance.randrange(8))]
            counts = {"prompt_eval_count": chance.randrange(99), "eval_count": chance.randrange(99)}
            native = [chat_line(one.get("content", ""), message=one) for one in pieces]
            reason = chance.choice(["length", "stop", None])
            last = {**chat_end(reason or ""), **counts}
            if reason is None:
                del last["done_reason"]
            sent = b"".join(map(line, [*native, last]))
            body = asked_chat(stream=True, stream_options={"include_usage": True})
            _, answer = await exchange(q, runner, CHAT, body, cuts(chance, sent))
            assert answer.clean
            *chunks, usage, done = answer.events()
            assert (done, usage["choices"]) == ("[DONE]", [])
            assert usage["usage"]["completion_tokens"] == counts["eval_count"]
            assert usage["usage"]["prompt_tokens"] == counts["prompt_eval_count"]
            deltas = [one["choices"][0]["delta"] for one in chunks]
            for theirs, ours in (("content", "content"), ("thinking", "reasoning")):
                wanted = "".join(one.get(theirs) or "" for one in pieces)
                assert "".join(one.get(ours) or "" for one in deltas) == wanted
            calls = [call["function"] for one in deltas for call in one.get("tool_calls", [])]
            wanted_calls = [call for one in pieces for call in one.get("tool_calls", [])]
            assert [
                {"name": one["name"], "arguments": json.loads(one["arguments"])} for one in calls
            ] == [one["function"] for one in wanted_calls]
            finish = [one["choices"][0]["finish_reason"] for one in chunks]
            assert finish[:-1] == [None] * len(finish[:-1])
            natural = "tool_calls" if calls else "stop"
            assert finish[-1] == ("length" if reason == "length" else natural)


LETTERS = 'ab {}[],:"\\/\n\t\r\0\x7f\x85\u2028éß日🦙'


def random_text(chance: random.Random) -> str:
    return "".join(chance.choices(LETTERS, k=chance.randrange(1, 12)))


def random_piece(chance: random.Random) -> dict[str, Any]:
    """What one line of Ollama's stream says."""
    piece: dict[str, Any] = {"content": random_text(chance) if chance.random() < 0.7 else ""}
    if chance.random() < 0.3:
        piece["thinking"] = random_text(chance)
    if chance.random() < 0.2:
        arguments = {random_text(chance): [random_text(chance), 1.5, None, {"done": True}]}
        piece["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}]
    return piece


def cuts(chance: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces of any size, also in the midst of a letter."""
    marks = sorted(chance.randrange(len(data)) for _ in range(chance.randrange(12)))
    return [data[start:stop] for start, stop in zip([0, *marks], [*marks, len(data)])]


@pytest.mark.deadline(30)
@pytest.mark.parametrize("size", [1 << 20, 3 << 20])
async def test_large_whole_answers_are_translated(size: int) -> None:
    text = "é" * (size // 2)
    answer = await counter(CHAT, ASK, chat_end(content=text))
    assert answer.json()["choices"][0]["message"]["content"] == text
    whole = {**GOOD, "choices": [{"index": 0, "message": {"content": text}}]}
    answer = await native("/api/chat", {**SAY, "stream": False}, whole)
    assert answer.json()["message"]["content"] == text


@pytest.mark.deadline(30)
async def test_embeddings_by_the_megabyte_are_translated() -> None:
    vectors = [[0.123456789] * 1000 for _ in range(300)]
    told_native = {"model": "m", "embeddings": vectors}
    answer = await counter("/v1/embeddings", {"input": ["a"] * 300}, told_native)
    assert [one["embedding"] for one in answer.json()["data"]] == vectors
    told_openai = {"data": [{"index": n, "embedding": v} for n, v in enumerate(vectors)]}
    answer = await native("/api/embed", {"input": ["a"] * 300}, told_openai)
    assert answer.json()["embeddings"] == vectors


# ---- Completions and embeddings for Ollama ---------------------------------------------------


async def test_completion_with_a_context_goes_to_generate() -> None:
    document = await seen(
        least("/v1/completions", numCtx=4096, max_tokens=5, stop="x", seed=1, temperature=0.5),
        "/v1/completions",
    )
    assert (document["model"], document["prompt"], document["stream"]) == ("m", "hi", False)
    wanted = {"num_ctx": 4096, "num_predict": 5, "stop": ["x"], "seed": 1, "temperature": 0.5}
    assert {name: document["options"].get(name) for name in wanted} == wanted
    assert document["options"]["top_p"] == 1.0


async def test_streamed_completion_is_what_ollamas_v1_was_recorded_to_say() -> None:
    recorded = Recording("ollama.completion-stream")
    choices = [event["choices"][0] for event in recorded.events()[:-1]]
    said_so = [generate_line(one["text"]) for one in choices[:-1]]
    ends = generate_end(choices[-1]["finish_reason"])
    native = [line({**one, "model": "counter"}) for one in (*said_so, ends)]
    answer = await counter("/v1/completions", {"prompt": "go 996", "stream": True}, native)
    assert_same_events(answer, recorded)
    assert answer.events()[0]["id"].startswith("cmpl-")


async def test_whole_completion_in_openais_words() -> None:
    answer = await counter("/v1/completions", {"prompt": "x"}, generate_end("length", " 1 2"))
    assert bare(answer.json()) == {
        "object": "text_completion",
        "model": "counter",
        "system_fingerprint": "fp_ollama",
        "choices": [{"text": " 1 2", "index": 0, "finish_reason": "length"}],
        "usage": USAGE,
    }


async def test_streamed_completion_tells_its_usage_where_asked() -> None:
    reply = [line(generate_line("x")), line(generate_end())]
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    answer = await counter("/v1/completions", body, reply)
    *pieces, usage, done = answer.events()
    assert (usage["choices"], usage["usage"], done) == ([], USAGE, "[DONE]")
    assert [one["usage"] for one in pieces] == [dict.fromkeys(USAGE, 0)] * 2


@pytest.mark.parametrize("prompt", [[1, 2], ["a", "b"], [[1]]], ids=str)
async def test_completion_that_generate_cannot_do_is_501_with_the_reason(prompt: Any) -> None:
    """Only a plain prompt can be translated."""
    answer = await refused(least("/v1/completions", numCtx=4096, prompt=prompt), "/v1/completions")
    assert_error(answer, 501, "prompt")
    assert answer.code == "not_implemented"


@pytest.mark.parametrize("given", ["hi", ["a", "b"]])
async def test_embeddings_with_a_context_go_to_embed(given: Any) -> None:
    body = least("/v1/embeddings", input=given, numCtx=2048, dimensions=2)
    document = await seen(body, "/v1/embeddings")
    assert (document["model"], document["input"], document["dimensions"]) == ("m", given, 2)
    assert document["options"] == {"num_ctx": 2048}


@pytest.mark.parametrize("form", [None, "float", "base64"])
async def test_embeddings_in_openais_words(form: str | None) -> None:
    native = {"model": "m", "embeddings": [[0.5, -0.25], [1, 2]], "prompt_eval_count": 3}
    more = {"encoding_format": form} if form else {}
    answer = await counter("/v1/embeddings", {"input": ["a", "b"], **more}, native)
    document = answer.json()
    assert (document["object"], document["model"]) in (("list", "m"), ("list", "counter"))
    assert document["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [(one["object"], one["index"]) for one in document["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    found = [one["embedding"] for one in document["data"]]
    if form == "base64":
        unpacked = [list(struct.unpack("<2f", base64.b64decode(one))) for one in found]
        assert unpacked == native["embeddings"]
    else:
        assert found == native["embeddings"]


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2], [3]]])
async def test_embeddings_of_tokens_are_501_with_the_reason(given: Any) -> None:
    answer = await refused(least("/v1/embeddings", input=given, numCtx=2048), "/v1/embeddings")
    assert_error(answer, 501, "token")
    assert answer.code == "not_implemented"


# ---- Ollama's routes on a runner that speaks OpenAI ------------------------------------------

GOOD = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1795251035,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello 🦙"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11},
}


def said(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return sse({"object": "chat.completion.chunk", "model": "m", "choices": [choice], **more})


EMPTY_WITH_PROBS = {
    "choices": [{"index": 0, "delta": {"content": ""}, "logprobs": {"content": [{"token": ""}]}}]
}
GOOD_STREAM = [
    said({"role": "assistant", "content": None}),
    said({"content": "hello"}),
    said({"content": " 🦙"}),
    said({}, "stop"),
    sse({"object": "chat.completion.chunk", "choices": [], "usage": GOOD["usage"]}),
    DONE,
]


async def forwarded(body: dict[str, Any], path: str = "/api/chat") -> dict[str, Any]:
    """What the OpenAI backend is asked for this native request."""
    body = {"model": "m", "stream": False, **body}
    native = {"/api/chat": CHAT, "/api/generate": "/v1/completions"}
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        answered: Any = GOOD
        if path == "/api/generate":
            answered = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": USAGE}
        if path.startswith("/api/embed"):
            answered = {"data": [{"index": 0, "embedding": [0.5]}], "usage": {"prompt_tokens": 1}}
        request, answer = await exchange(q, runner, path, body, answered)
        assert answer.status == 200, answer
        assert request.path == native.get(path, "/v1/embeddings")
        return dict(request.json)


async def native(path: str, body: dict[str, Any], reply: Any) -> Answer:
    """What the native client is answered when the OpenAI backend replies so."""
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        kind = {} if callable(reply) else {"content_type": "application/json"}
        kind = {"content_type": EVENTS} if isinstance(reply, list) else kind
        _, answer = await exchange(q, runner, path, {"model": "m", **body}, reply, **kind)
        return answer


SAY = {"messages": [{"role": "user", "content": "hi"}]}


async def test_native_chat_in_openais_words() -> None:
    chosen = {
        "num_predict": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["a", "b"],
        "presence_penalty": 0.25,
        "frequency_penalty": -1,
    }
    document = await forwarded({**SAY, "options": chosen, "keep_alive": "5m"})
    assert document["messages"] == SAY["messages"]
    assert document["model"] == "m"
    assert document["max_tokens"] == 5
    for name in chosen.keys() - {"num_predict"}:
        assert document[name] == chosen[name], name
    assert not document.get("stream")
    assert not document.keys() & {"options", "keep_alive", "num_predict", "numCtx"}


@pytest.mark.parametrize("asked", [{"stream": True}, {"stream": None}, {}])
async def test_native_stream_is_asked_for_as_a_stream_with_its_usage(asked: Any) -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        body = {"model": "m", **SAY, **asked}
        request, answer = await exchange(
            q, runner, "/api/chat", body, GOOD_STREAM, content_type=EVENTS
        )
        assert request.json["stream"] is True
        assert request.json["stream_options"]["include_usage"] is True
        assert answer.headers["content-type"] == NDJSON


OPTIONS = {
    "num_predict": 5.0,
    "top_k": 40,
    "min_p": 0.1,
    "typical_p": 0.9,
    "repeat_penalty": 1.1,
    "repeat_last_n": 64,
    "num_keep": 4,
    "num_gpu": 99,
}
OPTIONS_OF = {  # what each kind of runner has of them, by its own name
    "llamacpp": {
        "top_k": 40,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.1,
        "repeat_last_n": 64,
        "n_keep": 4,
    },
    "vllm": {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1},
    "lmstudio": {"top_k": 40, "repeat_penalty": 1.1},
    "openai": {"top_k": 40, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.1},
}


@pytest.mark.parametrize("kind", OPTIONS_OF)
async def test_options_have_the_names_that_the_runner_has(kind: str) -> None:
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        body = {"model": "m", **SAY, "stream": False, "options": OPTIONS}
        request, _ = await exchange(q, runner, "/api/chat", body, GOOD)
    wanted = {"model": "m", **SAY, "stream": False, "max_tokens": 5, **OPTIONS_OF[kind]}
    assert request.json == wanted
    assert type(request.json["max_tokens"]) is int


async def test_what_the_runner_says_it_took_is_told() -> None:
    timings = {"prompt_n": 3, "prompt_ms": 1.5, "predicted_n": 4, "predicted_ms": 2.0}
    answer = await native("/api/chat", {**SAY, "stream": False}, {**GOOD, "timings": timings})
    assert answer.json()["prompt_eval_duration"] == 1_500_000
    assert answer.json()["eval_duration"] == 2_000_000
    answer = await native("/api/chat", {**SAY, "stream": False}, GOOD)
    assert not answer.json().keys() & {"eval_duration", "prompt_eval_duration"}, "not known"
    for odd in ([], "x", {"prompt_ms": "x", "predicted_ms": -1}, {"prompt_ms": 10**400}):
        answer = await native("/api/chat", {**SAY, "stream": False}, {**GOOD, "timings": odd})
        assert answer.json()["message"]["content"], "an odd number costs no answer"


async def test_logprobs_of_a_plain_prompt_are_501_not_dropped() -> None:
    asked = {"model": "m", "prompt": "hi", "logprobs": True}
    assert_error(await refused(asked, "/api/generate", kind="llamacpp"), 501, "logprobs")


@pytest.mark.parametrize("number", [-1, -2])
async def test_no_limit_is_no_limit(number: int) -> None:
    document = await forwarded({**SAY, "options": {"num_predict": number}})
    assert not document.keys() & {"max_tokens", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("json", {"type": "json_object"}),
        ({"type": "object"}, {"type": "object"}),
        ("", None),
        (None, None),
    ],
)
async def test_format_becomes_response_format(asked: Any, wanted: Any) -> None:
    found = (await forwarded({**SAY, "format": asked})).get("response_format")
    if isinstance(asked, dict):
        assert found["type"] == "json_schema"
        assert found["json_schema"]["schema"] == wanted
        assert found["json_schema"]["name"]
    else:
        assert found == wanted


@pytest.mark.parametrize(("kind", "data"), [("png", PNG), ("jpeg", JPEG), ("webp", WEBP)])
async def test_images_become_data_urls(kind: str, data: bytes) -> None:
    packed = base64.b64encode(data).decode()
    message = {"role": "user", "content": "what?", "images": [packed, packed]}
    document = await forwarded({"messages": [message]})
    (found,) = document["messages"]
    assert "images" not in found
    texts = [part["text"] for part in found["content"] if part["type"] == "text"]
    urls = [part["image_url"]["url"] for part in found["content"] if part["type"] == "image_url"]
    assert texts == ["what?"]
    assert urls == [f"data:image/{kind};base64,{packed}"] * 2


async def test_native_tools_calls_and_results_in_openais_words() -> None:
    calls = [
        {"function": {"name": "weather", "arguments": {"town": "Köln", "n": [1, 2.5]}}},
        {"function": {"name": "clock", "arguments": {}}},
    ]
    document = await forwarded(
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "", "tool_calls": calls},
                {"role": "tool", "tool_name": "weather", "content": "rain"},
                {"role": "tool", "tool_name": "clock", "content": "12:00"},
            ],
            "tools": [TOOL],
        }
    )
    assert document["tools"] == [TOOL]
    _, asked, *results = document["messages"]
    assert [call["type"] for call in asked["tool_calls"]] == ["function"] * 2
    texts = [call["function"]["arguments"] for call in asked["tool_calls"]]
    assert [json.loads(text) for text in texts] == [{"town": "Köln", "n": [1, 2.5]}, {}]
    ids = [call["id"] for call in asked["tool_calls"]]
    assert len({*ids, ""}) == 3
    assert [one["tool_call_id"] for one in results] == ids
    assert [one["content"] for one in results] == ["rain", "12:00"]
    assert all("tool_name" not in one for one in results)


async def test_native_results_without_a_name_follow_the_order_of_the_calls() -> None:
    """Clients from before tool_name say only the role."""
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b")]
    document = await forwarded(
        {
            "messages": [
                {"role": "assistant", "content": "", "tool_calls": calls},
                {"role": "tool", "content": "1"},
                {"role": "tool", "content": "2"},
            ]
        }
    )
    asked, *results = document["messages"]
    assert [one["tool_call_id"] for one in results] == [one["id"] for one in asked["tool_calls"]]


async def test_whole_native_answer() -> None:
    answer = await native("/api/chat", {**SAY, "stream": False}, GOOD)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/json")
    document = answer.json()
    assert_native_end(document, "stop")
    assert document["message"] == {"role": "assistant", "content": "hello 🦙"}


def assert_native_end(document: dict[str, Any], reason: str) -> None:
    assert (document["model"], document["done"], document["done_reason"]) == ("m", True, reason)
    assert (document["prompt_eval_count"], document["eval_count"]) == (6, 5)
    assert isinstance(document["total_duration"], int)
    assert 0 < document["total_duration"] < 60e9
    assert_time(document["created_at"])


def assert_time(text: str) -> None:
    """RFC 3339, as Go reads it."""
    pattern = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)"
    match = re.fullmatch(pattern, text)
    assert match, text
    assert datetime.fromisoformat(match[1]).year > 2000


async def test_streamed_native_answer() -> None:
    answer = await native("/api/chat", SAY, GOOD_STREAM)
    assert (answer.status, answer.clean) == (200, True)
    assert answer.headers["content-type"] == NDJSON
    *pieces, last = lines(answer)
    assert "".join(one["message"]["content"] for one in pieces) == "hello 🦙"
    for one in pieces:
        assert (one["model"], one["done"], one["message"]["role"]) == ("m", False, "assistant")
        assert_time(one["created_at"])
    assert_native_end(last, "stop")
    assert last["message"] == {"role": "assistant", "content": ""}
    assert answer.body.endswith(b"}\n")
    assert b"\n\n" not in answer.body


async def test_recorded_streams_of_other_runners_become_native() -> None:
    for name, text in (
        ("llama-server.chat-stream-usage", None),
        ("llama-server.chat-stream", None),
        ("vllm.chat-stream-usage", None),
        ("llama-cpp-python.chat-stream", None),
        ("ollama.chat-stream", " 995 996 997 998 999"),
    ):
        recorded = Recording(name)
        chunks = [one for one in recorded.events() if isinstance(one, dict)]
        deltas = [one["choices"][0]["delta"] for one in chunks if one["choices"]]
        wanted = "".join(one.get("content") or "" for one in deltas)
        answer = await native("/api/chat", SAY, recorded.replay)
        assert answer.clean, name
        *pieces, last = lines(answer)
        assert "".join(one["message"]["content"] for one in pieces) == (text or wanted), name
        assert last["done"] is True
        assert last["done_reason"] in ("stop", "length")


@pytest.mark.parametrize("member", ["reasoning_content", "reasoning"])
async def test_reasoning_becomes_thinking(member: str) -> None:
    message = {"role": "assistant", "content": "4", member: "2+2"}
    whole = {**GOOD, "choices": [{"index": 0, "message": message, "finish_reason": "length"}]}
    document = (await native("/api/chat", {**SAY, "stream": False}, whole)).json()
    assert document["message"] == {"role": "assistant", "content": "4", "thinking": "2+2"}
    assert_native_end(document, "length")
    reply = [said({member: "2"}), said({member: "+2"}), said({"content": "4"}), *GOOD_STREAM[3:]]
    *pieces, _ = lines(await native("/api/chat", SAY, reply))
    assert "".join(one["message"].get("thinking") or "" for one in pieces) == "2+2"
    assert "".join(one["message"]["content"] for one in pieces) == "4"


async def test_whole_tool_calls_become_objects() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": CALLS}
    whole = {**GOOD, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    document = (await native("/api/chat", {**SAY, "stream": False}, whole)).json()
    assert document["message"]["content"] == ""
    found = [call["function"] for call in document["message"]["tool_calls"]]
    assert [one["name"] for one in found] == ["weather", "clock"]
    assert [one["arguments"] for one in found] == [{"town": "Köln", "n": [1, 2.5, None]}, {}]
    assert_native_end(document, "stop")


async def test_streamed_tool_calls_are_put_together_from_their_pieces() -> None:
    """OpenAI streams their arguments in shreds; Ollama's clients want each call whole."""

    def shred(index: int, **more: Any) -> bytes:
        return said({"tool_calls": [{"index": index, **more}]})

    reply = [
        said({"role": "assistant", "content": None}),
        shred(0, id="a", type="function", function={"name": "weather", "arguments": ""}),
        shred(0, function={"arguments": '{"town": "K'}),
        shred(0, function={"arguments": 'öln", "done": true}'}),
        shred(1, id="b", type="function", function={"name": "clock", "arguments": "{}"}),
        said({}, "tool_calls"),
        *GOOD_STREAM[4:],
    ]
    answer = await native("/api/chat", SAY, reply)
    assert answer.clean
    found = [
        call["function"] for one in lines(answer) for call in one["message"].get("tool_calls", [])
    ]
    assert [one["name"] for one in found] == ["weather", "clock"]
    assert [one["arguments"] for one in found] == [{"town": "Köln", "done": True}, {}]
    assert_native_end(lines(answer)[-1], "stop")


async def test_native_request_to_load_is_answered_for_a_runner_that_always_has_its_model() -> None:
    """There is nothing to load; the client must not fail for that."""
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        await told(q)
        for path, member in (("/api/chat", "message"), ("/api/generate", "response")):
            body = {"model": "m", "messages": []} if member == "message" else {"model": "m"}
            empty: Any = {"role": "assistant", "content": ""} if member == "message" else ""
            for more, reason in ({}, "load"), ({"keep_alive": 0}, "unload"):
                answer = await post(q, path, {**body, **more})
                assert answer.status == 200, answer
                told_of = answer.json()
                assert (told_of["done"], told_of["done_reason"]) == (True, reason)
                assert (told_of["model"], told_of[member]) == ("m", empty)
        assert not runner.requests


# ---- Native failures -------------------------------------------------------------------------


def assert_broken_native(answer: Answer, text: str, *parts: str) -> None:
    assert answer.status == 200, answer
    *pieces, last = lines(answer)
    said_so_far = [one.get("message", {}).get("content", one.get("response")) for one in pieces]
    assert "".join(said_so_far) == text
    assert list(last) == ["error"], answer
    for part in parts:
        assert part in last["error"], answer
    assert not answer.clean, answer
    assert b'"done":true' not in answer.body.replace(b" ", b"")


@pytest.mark.parametrize(
    "tail",
    [
        [],
        [said({}, "stop")],
        [sse({"error": {"message": "out of memory"}})],
        [b'error: {"message":"out of memory"}\n\n'],
        [b"data: <html>\n\n", DONE],
        [b"data: []\n\n", DONE],
        [b'data: {"choices":7}\n\n', DONE],
        [b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', DONE],
    ],
    ids=[
        "no end",
        "no [DONE]",
        "error",
        "llama.cpp's error",
        "page",
        "list",
        "no list",
        "no UTF-8",
    ],
)
async def test_native_stream_that_goes_wrong_is_told_so(tail: list[bytes]) -> None:
    reply = staged([said({"content": "one"}), *tail], EVENTS)
    answer = await native("/api/chat", SAY, reply)
    assert_broken_native(answer, "one", *(["out of memory"] if b"memory" in b"".join(tail) else []))


@pytest.mark.deadline(30)
async def test_random_streams_lose_nothing_on_the_way_to_ollamas_clients() -> None:
    chance = random.Random(12)
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        for _ in range(60):
            pieces = [random_piece(chance) for _ in range(chance.randrange(8))]
            made = [said({"role": "assistant", "content": None})]
            for one in pieces:
                made += [said({"content": one["content"]}), *shreds(made, one)]
                if "thinking" in one:
                    made.append(said({"reasoning_content": one["thinking"]}))
            reply = cuts(chance, b"".join([*made, *GOOD_STREAM[3:]]))
            body = {"model": "m", **SAY}
            _, answer = await exchange(q, runner, "/api/chat", body, reply, content_type=EVENTS)
            assert answer.clean
            messages = [one["message"] for one in lines(answer)]
            for name in ("content", "thinking"):
                wanted = "".join(one.get(name) or "" for one in pieces)
                assert "".join(one.get(name) or "" for one in messages) == wanted
            calls = [call["function"] for one in messages for call in one.get("tool_calls", [])]
            wanted_calls = [call for one in pieces for call in one.get("tool_calls", [])]
            assert [{"name": one["name"], "arguments": one["arguments"]} for one in calls] == [
                one["function"] for one in wanted_calls
            ]
            assert_native_end(lines(answer)[-1], "stop")


def shreds(made: list[bytes], piece: dict[str, Any]) -> list[bytes]:
    """The tool calls of a piece as OpenAI streams them, the arguments in bits."""
    found = []
    index = sum(b'"name"' in one for one in made)
    for number, call in enumerate(piece.get("tool_calls", []), index):
        function = {"name": call["function"]["name"], "arguments": ""}
        found.append(said({"tool_calls": [{"index": number, "id": "x", "function": function}]}))
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        for at in range(0, len(text), 7):
            shred = {"index": number, "function": {"arguments": text[at : at + 7]}}
            found.append(said({"tool_calls": [shred]}))
    return found


async def test_native_stream_that_is_cut_is_told_so() -> None:
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        _, answer = await exchange(
            q,
            runner,
            "/api/chat",
            {"model": "m", **SAY},
            [said({"content": "one"}), said({"content": " two"})[:30]],
            content_type=EVENTS,
            end=False,
        )
        assert_broken_native(answer, "one")


@pytest.mark.parametrize("arguments", ['{"cut', "[1]", "7", "x", '"x"', '"\\"x\\""'])
@pytest.mark.parametrize("whole", [False, True])
async def test_tool_call_that_is_not_understood_is_left_out_and_the_text_stays(
    arguments: str, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"index": 0, "id": "a", "function": {"name": "g", "arguments": '{"x":1}'}}
    cut = {"index": 1, "id": "b", "function": {"name": "f", "arguments": arguments}}
    if whole:
        message = {"content": "one", "tool_calls": [cut, good]}
        reply: Any = {**GOOD, "choices": [{"message": message, "finish_reason": "tool_calls"}]}
    else:
        calls = [said({"tool_calls": [cut]}), said({"tool_calls": [good]})]
        reply = staged([said({"content": "one"}), *calls, said({}, "tool_calls"), DONE], EVENTS)
    answer = await native("/api/chat", {**SAY, "stream": not whole}, reply)
    assert (answer.status, answer.clean) == (200, True), answer
    told_lines = lines(answer)
    assert "".join(one["message"]["content"] for one in told_lines) == "one"
    calls = [call for one in told_lines for call in one["message"].get("tool_calls", [])]
    assert calls == [{"id": "a", "function": {"index": 0, "name": "g", "arguments": {"x": 1}}}]
    assert told_lines[-1]["done_reason"] == "stop"
    warned = [one for one in caplog.records if "tool call" in one.getMessage()]
    assert [one.levelname for one in warned] == ["WARNING"]
    logged = caplog.messages  # not its text, in which a line's number could be one of them
    assert not any(arguments in one for one in logged), "an answer's words are not for the log"


ODD_CALLS: list[Any] = [
    *("f", 7, True, {"function": "f"}, [None], ["f"], [[]], [{"function": "f"}]),
    *([{"index": 0, "function": ["f"]}], [{"function": {"name": 7}}], {"function": 7}, [7, {}]),
]


@pytest.mark.parametrize("odd", ODD_CALLS, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
async def test_tool_calls_that_are_none_cost_neither_the_text_nor_those_that_are_some(
    odd: Any, whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"id": "a", "function": {"name": "g", "arguments": '{"x":1}'}}
    if whole:
        message = {"content": "one", "tool_calls": odd}
        reply: Any = {**GOOD, "choices": [{"message": message, "finish_reason": "stop"}]}
    else:
        calls = [said({"tool_calls": [good]}), said({"content": "on", "tool_calls": odd})]
        reply = staged([*calls, said({"content": "e"}), said({}, "tool_calls"), DONE], EVENTS)
    answer = await native("/api/chat", {**SAY, "stream": not whole}, reply)
    assert (answer.status, answer.clean) == (200, True), answer
    messages = [one["message"] for one in lines(answer)]
    assert "".join(message["content"] for message in messages) == "one"
    names = [call["function"]["name"] for one in messages for call in one.get("tool_calls", [])]
    assert names == ([] if whole else ["g"])
    assert any("tool call" in text for text in caplog.messages)


@pytest.mark.parametrize(("status", "passed"), [(400, 400), (404, 404), (500, 500), (503, 503)])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"])
async def test_native_errors_before_the_answer(path: str, status: int, passed: int) -> None:
    text = "model 'm' not found" if status == 404 else "in words"
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        asked = post(q, path, least(path))
        await refuse(await arrival(asked, runner), status, {"error": {"message": text}})
        answer = await asked
        assert (answer.status, answer.json()) == (passed, {"error": text})


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'{"choices":[]}'], ids=ascii)
async def test_native_answer_made_of_none_is_502(body: bytes) -> None:
    answer = await native("/api/chat", {**SAY, "stream": False}, body)
    assert answer.status == 502
    assert list(answer.json()) == ["error"]


@pytest.mark.untraced
@pytest.mark.deadline(30)
async def test_events_cut_at_any_byte_are_translated_to_the_same() -> None:
    data = b": ping\n\n" + b"".join(GOOD_STREAM)
    body = json.dumps({"model": "m", **SAY}).encode()
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        raw = await Raw.open(q.port)
        for at in range(1, len(data)):
            await raw.send(http("POST", "/api/chat", {"Content-Type": "application/json"}, body))
            request: FakeRequest = await runner.arrived()
            head = [("Content-Type", EVENTS), ("Transfer-Encoding", "chunked")]
            await request.send(render_head(200, head) + chunk(data[:at]))
            await turns()
            request.finished()
            await request.send(chunk(data[at:]) + b"0\r\n\r\n")
            answer = await raw.response()
            *pieces, last = lines(answer)
            assert answer.clean, at
            assert "".join(one["message"]["content"] for one in pieces) == "hello 🦙", at
            assert last["eval_count"] == 5, at


@pytest.mark.parametrize("ending", ["\r\n", "\n"], ids=ascii)
async def test_events_may_be_written_in_any_way_the_standard_allows(ending: str) -> None:
    text = "".join(
        f"{one}{ending}"
        for one in (
            ": hello",
            "id: 7",
            'data:{"choices":[{"index":0,"delta":{"content":"hello"}}]}',
            "",
            "event: message",
            'data: {"choices":[{"index":0,"delta":{"content":" 🦙"},"finish_reason":null}]}',
            "",
            'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
            "",
            "data: [DONE]",
            "",
        )
    )
    answer = await native("/api/chat", SAY, [text.encode()])
    assert answer.clean, answer
    *pieces, last = lines(answer)
    assert "".join(one["message"]["content"] for one in pieces) == "hello 🦙"
    assert (last["done"], last["done_reason"]) == (True, "stop")


# ---- Generate and embeddings on a runner that speaks OpenAI ----------------------------------


async def test_generate_of_a_plain_prompt_becomes_a_completion() -> None:
    chosen = {"num_predict": 5, "temperature": 0.5, "stop": ["a"], "seed": 1}
    document = await forwarded({"prompt": "hi", "options": chosen}, "/api/generate")
    assert (document["model"], document["prompt"], document["max_tokens"]) == ("m", "hi", 5)
    assert (document["temperature"], document["stop"], document["seed"]) == (0.5, ["a"], 1)
    assert not document.keys() & {"options", "messages"}


async def test_whole_and_streamed_generate() -> None:
    whole = {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "hello 🦙", "finish_reason": "length"}],
        "usage": GOOD["usage"],
    }
    document = (await native("/api/generate", {"prompt": "x", "stream": False}, whole)).json()
    assert document["response"] == "hello 🦙"
    assert "message" not in document
    assert_native_end(document, "length")

    def piece(text: str, finish: str | None = None) -> bytes:
        return sse({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})

    reply = [
        piece("hello"),
        piece(" 🦙"),
        piece("", "stop"),
        sse({"choices": [], "usage": GOOD["usage"]}),
        DONE,
    ]
    answer = await native("/api/generate", {"prompt": "x"}, reply)
    assert answer.clean
    *pieces, last = lines(answer)
    assert "".join(one["response"] for one in pieces) == "hello 🦙"
    assert all(one["done"] is False for one in pieces)
    assert last["response"] == ""
    assert_native_end(last, "stop")


@pytest.mark.parametrize(
    "more",
    [
        {"images": ["aGk="]},
        {"template": "{{ .Prompt }}"},
        {"context": [1, 2, 3]},
    ],
    ids=str,
)
async def test_generate_that_cannot_be_translated_is_501_with_the_reason(
    more: dict[str, Any],
) -> None:
    answer = await refused(least("/api/generate", **more), "/api/generate", "llamacpp")
    assert_error(answer, 501, next(iter(more)))
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    "more",
    [{"images": []}, {"template": ""}, {"context": None}, {"raw": False}, {"system": ""}],
    ids=str,
)
async def test_generate_with_empty_members_is_a_plain_one(more: dict[str, Any]) -> None:
    document = await forwarded({"prompt": "hi", **more}, "/api/generate")
    assert document["prompt"] == "hi"
    assert not document.keys() & more.keys()


@pytest.mark.parametrize("given", ["hi", ["a", "b"]])
async def test_embed_becomes_embeddings(given: Any) -> None:
    document = await forwarded({"input": given, "dimensions": 2}, "/api/embed")
    assert (document["input"], document["dimensions"]) == (given, 2)
    assert not document.get("stream")


async def test_embed_answers_in_order() -> None:
    whole = {
        "object": "list",
        "data": [{"index": 1, "embedding": [1, 2]}, {"index": 0, "embedding": [0.5, -1e-05]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    document = (await native("/api/embed", {"input": ["a", "b"]}, whole)).json()
    assert document["embeddings"] == [[0.5, -1e-05], [1, 2]]
    assert (document["model"], document["prompt_eval_count"]) == ("m", 3)
    assert isinstance(document["total_duration"], int)


async def test_old_embeddings_give_one() -> None:
    document = await forwarded({"prompt": "hi"}, "/api/embeddings")
    assert document["input"] == "hi"
    assert "prompt" not in document
    whole = {"data": [{"index": 0, "embedding": [0.5, 1]}], "usage": {"prompt_tokens": 1}}
    answer = await native("/api/embeddings", {"prompt": "hi"}, whole)
    assert answer.json() == {"embedding": [0.5, 1]}


@pytest.mark.parametrize("body", [{}, {"data": [{"index": 0}]}, {"data": 7}, []])
async def test_embeddings_that_are_none_are_502(body: Any) -> None:
    answer = await native("/api/embed", {"input": "hi"}, body)
    assert answer.status == 502
    assert list(answer.json()) == ["error"]


# ---- Which way is taken ----------------------------------------------------------------------


async def test_client_is_answered_in_its_dialect_whoever_serves_it() -> None:
    """The one that has the model loaded goes first, translated or not."""
    async with Runner(kind="llamacpp") as one, Runner(kind="ollama") as two:
        async with running(one.url, two.url) as q:
            await told(q)
            asked = post(q, "/api/chat", {**least("/api/chat"), "stream": False})
            request = await arrival(asked, one, two)
            if request in two.requests:
                assert request.path == "/api/chat"
                await stream(request, [json.dumps(chat_end()).encode()], "application/json")
            else:
                assert request.path == CHAT
                await request.status(200, GOOD)
            assert (await asked).json()["done"] is True


async def test_ollama_without_v1_is_asked_on_its_own_routes() -> None:
    """An old one: what it lacks is learned from its answer, and translated from then on."""
    async with Runner() as runner, running(runner.url, queue__max_attempts=1) as q:
        asked = post(q, CHAT, least(CHAT))
        request = await arrival(asked, runner)
        assert request.path == CHAT
        await refuse(request, 404, b"404 page not found")
        request = await arrival(asked, runner)
        assert request.path == "/api/chat"
        await request.status(200, chat_end(content="x"))
        assert (await asked).content == "x"
        request, answer = await exchange(q, runner, CHAT, least(CHAT), chat_end(content="y"))
        assert (request.path, answer.content) == ("/api/chat", "y")


async def test_what_one_backend_cannot_be_told_goes_to_another_that_can() -> None:
    """The 501 is for when nobody is left."""
    async with Runner(kind="llamacpp") as one, Runner(kind="ollama") as two:
        async with running(one.url, two.url) as q:
            await told(q)
            body = least("/api/generate", images=["aGk="], stream=False)
            request, answer = await exchange(q, two, "/api/generate", body, generate_end(text="x"))
            assert (request.path, request.json) == ("/api/generate", body)
            assert answer.status == 200
            assert not one.requests
            tokens = least("/v1/embeddings", input=[1, 2], numCtx=2048)
            vectors = {"data": [{"index": 0, "embedding": [0.5]}]}
            request, answer = await exchange(q, one, "/v1/embeddings", tokens, vectors)
            assert request.json == least("/v1/embeddings", input=[1, 2])
            assert (answer.status, answer.json()) == (200, vectors)


async def test_keep_alive_is_none_of_llmqs_fields_where_nothing_is_translated() -> None:
    body = json.dumps({**least(CHAT), "keep_alive": "5m", "options": {"num_ctx": 7}}).encode()
    async with Runner(kind="llamacpp") as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, CHAT, body, GOOD)
        assert (request.path, request.body, answer.status) == (CHAT, body, 200)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_context_is_cut_where_no_route_can_carry_it(path: str) -> None:
    async with Runner() as runner, running(runner.url) as q:
        body = least(path, numCtx=4096)
        answered = {"type": "message", "status": "completed"}
        request, answer = await exchange(q, runner, path, body, answered)
        assert (request.path, request.json, answer.status) == (path, least(path), 200)


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [("ollama", CHAT, asked_chat(stream=True)), ("llamacpp", "/api/chat", least("/api/chat"))],
)
async def test_client_that_leaves_a_translated_stream_ends_the_work(
    kind: str, path: str, body: dict[str, Any]
) -> None:
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        client = await open_stream(q, path, body)
        request = await runner.arrived()
        first = line(chat_line("one")) if kind == "ollama" else said({"content": "one"})
        content_type = NDJSON if kind == "ollama" else EVENTS
        head = [("Content-Type", content_type), ("Transfer-Encoding", "chunked")]
        await request.send(render_head(200, head) + chunk(first))
        assert b"one" in await client.until(b"one")
        client.close()
        await asyncio.wait_for(request.left(), 1)
        (record,) = await ended(q)
        assert record["outcome"] == "client_left"


# ---- Signs of life and broken documents ------------------------------------------------------


async def test_signs_of_life_are_in_the_dialect_of_the_client_not_of_the_runner() -> None:
    beat = {"server__heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}
    async with Runner() as runner, running(runner.url, **beat) as q:
        client = await open_stream(q, CHAT, asked_chat(stream=True))
        request = await runner.arrived()
        assert (await client.head()).headers["content-type"] == EVENTS
        assert b"\r\n: position=0\n\r\n" in await client.until(b"=0\n\r\n")
        await stream(request, [line(chat_line("x")), line(chat_end())])
        answer = await client.response()
        assert (answer.clean, answer.content, answer.events()[-1]) == (True, "x", "[DONE]")
    async with Runner(kind="llamacpp") as runner, running(runner.url, **beat) as q:
        client = await open_stream(q, "/api/chat", least("/api/chat"))
        request = await runner.arrived()
        assert (await client.head()).headers["content-type"] == NDJSON
        assert await client.until(b" \r\n")
        await stream(request, GOOD_STREAM, EVENTS)
        answer = await client.response()
        assert answer.clean
        assert answer.body.lstrip(b" ")[:1] == b"{"
        assert lines(answer)[-1]["done"] is True


JUNK = [None, True, -1, 1.5, 1e308, 10**30, "", "x", "\ud83e", [], {}, [[]], [{}], [None], {"a": 1}]


def broken(chance: random.Random, document: Any, depth: int = 0) -> Any:
    """The document with some place, at any depth, become something else or nothing."""
    if not isinstance(document, (dict, list)) or not document or (depth and chance.random() < 0.25):
        return chance.choice(JUNK)
    copy: Any = document.copy()
    place = chance.choice(list(copy)) if isinstance(copy, dict) else chance.randrange(len(copy))
    if chance.random() < 0.15:
        del copy[place]
    else:
        copy[place] = broken(chance, document[place], depth + 1)
    return copy


TOLD = {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}]}
FULL_CHAT = {
    **asked_chat(
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ),
    "tools": [TOOL],
    "stop": ["a"],
    "seed": 1,
    "temperature": 0.5,
    "max_tokens": 5,
    "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
    "reasoning": {"effort": "low"},
    "stream_options": {"include_usage": True},
}
FULL_NATIVE = {
    "model": "m",
    "messages": [
        {"role": "user", "content": "x", "images": ["aGk="]},
        {"role": "assistant", "content": "", "thinking": "t", **TOLD},
        {"role": "tool", "tool_name": "f", "content": "1"},
    ],
    "tools": [TOOL],
    "format": {"type": "object"},
    "think": True,
    "keep_alive": 5,
    "options": {"num_ctx": 4096, "num_predict": 5, "stop": ["a"], "temperature": 0.5},
}
EVERY_WAY: dict[str, Any] = {  # runner, route, what is asked, what a stream and a whole answer say
    "chat": (
        *("ollama", CHAT, FULL_CHAT),
        *([chat_line("a", message={**TOLD, "thinking": "b"}), chat_end()],),
        chat_end(content="x", message={**TOLD, "thinking": "b"}),
    ),
    "completion": (
        *("ollama", "/v1/completions", least("/v1/completions", numCtx=9, stop="a", suffix="b")),
        *([generate_line("a"), generate_end()], generate_end(text="a")),
    ),
    "embeddings": (
        *("ollama", "/v1/embeddings", least("/v1/embeddings", numCtx=9, encoding_format="base64")),
        *(None, {"embeddings": [[0.5], [1]], "prompt_eval_count": 1}),
    ),
    "native chat": (
        *("llamacpp", "/api/chat", FULL_NATIVE),
        *([json.loads(one[6:]) for one in GOOD_STREAM[:-1]], GOOD),
    ),
    "native generate": (
        *("llamacpp", "/api/generate", least("/api/generate", options={"stop": ["a"]})),
        [
            {"choices": [{"index": 0, "text": "a", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": USAGE},
        ],
        {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}], "usage": USAGE},
    ),
    "native embed": (
        *("llamacpp", "/api/embed", least("/api/embed", options={"num_ctx": 9})),
        *(None, {"data": [{"index": 0, "embedding": [0.5]}], "usage": USAGE}),
    ),
    "native embeddings": (
        *("llamacpp", "/api/embeddings", least("/api/embeddings")),
        *(None, {"data": [{"index": 0, "embedding": [0.5]}], "usage": USAGE}),
    ),
}


def written(kind: str, documents: list[Any]) -> bytes:
    """A stream of this runner's dialect."""
    if kind == "ollama":
        return b"".join(json.dumps(one).encode() + b"\n" for one in documents)
    return b"".join(sse(json.dumps(one)) for one in documents) + DONE


async def tried(q: running, path: str, body: Any) -> Answer:
    data = json.dumps(body).encode()
    answer = await post(q, path, data)
    assert answer.status != 500, (answer, data)
    return answer


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.deadline(60)
async def test_requests_with_a_broken_place_are_answered_with_thought(way: str) -> None:
    """Served, or refused with a reason; never a failure of llmq or of its backend."""
    kind, path, asked, streamed, whole = EVERY_WAY[way]
    chance = random.Random(f"asked {way}")

    async def reply(request: FakeRequest) -> None:
        if request.json.get("stream"):
            await stream(request, [written(kind, streamed)], NDJSON if kind == "ollama" else EVENTS)
        else:
            await request.status(200, whole)

    async with Runner(kind=kind, reply=reply) as runner, running(runner.url) as q:
        await told(q)
        statuses = set()
        for _ in range(80):
            body = broken(chance, asked)
            answer = await tried(q, path, body)
            assert answer.status in (200, 400, 404, 501), (answer, body)
            assert answer.clean, (answer, body)
            statuses.add(answer.status)
        assert {200, 400} <= statuses


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.deadline(60)
async def test_answers_with_a_broken_place_are_told_as_good_or_as_broken(way: str) -> None:
    """Never a failure of llmq, and what is cut off never looks complete."""
    kind, path, asked, streamed, whole = EVERY_WAY[way]
    chance = random.Random(f"answered {way}")
    async with Runner(kind=kind, reply=told) as runner:
        async with running(runner.url, upstream__probe_interval=0.1) as q:
            await told(q)
            for number in range(80):
                as_stream = streamed is not None and number % 2 == 0
                sent = broken(chance, streamed if as_stream else whole)
                documents = sent if isinstance(sent, list) else [sent]

                async def reply(
                    request: FakeRequest,
                    as_stream: bool = as_stream,
                    sent: Any = sent,
                    documents: list[Any] = documents,
                ) -> None:
                    if as_stream:
                        content_type = NDJSON if kind == "ollama" else EVENTS
                        await stream(request, [written(kind, documents)], content_type)
                    else:
                        await request.status(200, sent)

                runner.reply = reply
                answer = await tried(q, path, {**asked, "stream": as_stream})
                assert answer.status in (200, 502), (answer, sent)
                if answer.status == 502 or not answer.clean:
                    assert b'"error"' in answer.body, (answer, sent)
                    assert b"[DONE]" not in answer.body, (answer, sent)
                elif not as_stream:
                    assert isinstance(answer.json(), dict), (answer, sent)
                elif path == CHAT:
                    assert answer.events()[-1] == "[DONE]", (answer, sent)
                elif path.startswith("/api/"):
                    assert lines(answer)[-1]["done"] is True, (answer, sent)
