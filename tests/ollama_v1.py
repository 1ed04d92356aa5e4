"""Ollama's own /v1 in front of its /api/chat, from its source (openai/openai.go, middleware).

It shares no code with llmq. A test holds it to what the real one was recorded to say on both
routes; what it makes of anything else is what llmq is held to.
"""

from __future__ import annotations

import json
from typing import Any

GO = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}
THINK = {"none": False, "minimal": "low", "xhigh": "max", "ultra": "max"}
TUNED = ("seed", "frequency_penalty", "presence_penalty")


def go_json(value: Any) -> str:
    """As Go's encoder writes it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char, escape in GO.items():
        text = text.replace(char, escape)
    return text


def native_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """FromChatRequest: each part of a content becomes a message."""
    translated: list[dict[str, Any]] = []
    for message in messages:
        calls = [
            {
                "id": call["id"],
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.loads(call["function"]["arguments"]),
                },
            }
            for call in message.get("tool_calls") or ()
        ]
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if message.get("reasoning"):
            more["thinking"] = message["reasoning"]
        content = message["content"]
        if message["role"] == "tool":
            named = [
                call["function"]["name"]
                for other in messages
                for call in other.get("tool_calls") or ()
                if call["id"] == message["tool_call_id"]
            ]
            more["tool_call_id"] = message["tool_call_id"]
            if named:
                more["tool_name"] = named[-1]
        if not isinstance(content, list):
            translated.append({"role": message["role"], "content": content or "", **more})
            continue
        for part in content:
            said: dict[str, Any] = {"role": message["role"], "content": part.get("text", "")}
            if part["type"] == "image_url":
                said["images"] = [part["image_url"]["url"].partition(",")[2]]
            if part["type"] == "input_audio":
                said["images"] = [part["input_audio"]["data"]]
            translated.append(said)
    return translated


def native_request(asked: dict[str, Any]) -> dict[str, Any]:
    """What its /v1 asks of its /api/chat."""
    options = {name: asked[name] for name in TUNED if name in asked}
    options["temperature"], options["top_p"] = (
        asked.get("temperature", 1.0),
        asked.get("top_p", 1.0),
    )
    if "stop" in asked:
        options["stop"] = [asked["stop"]] if isinstance(asked["stop"], str) else asked["stop"]
    if "max_tokens" in asked:
        options["num_predict"] = asked["max_tokens"]
    request = {"model": asked["model"], "messages": native_messages(asked["messages"])}
    request.update(stream=asked.get("stream", False), options=options)
    form = asked.get("response_format", {"type": "text"})
    if form["type"] == "json_object":
        request["format"] = "json"
    elif form["type"] == "json_schema":
        request["format"] = form["json_schema"]["schema"]
    effort = asked.get("reasoning", {"effort": asked.get("reasoning_effort")}).get("effort")
    if effort:
        request["think"] = THINK.get(effort, effort)
    for name in ("tools", "logprobs", "top_logprobs"):
        if name in asked:
            request[name] = asked[name]
    return request


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": call["id"],
            "index": call["function"]["index"],
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": go_json(call["function"]["arguments"]),
            },
        }
        for call in message.get("tool_calls") or ()
    ]


def usage_of(native: dict[str, Any]) -> dict[str, int]:
    prompt, answer = native.get("prompt_eval_count", 0), native.get("eval_count", 0)
    both = prompt + answer
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": both}


def whole(native: dict[str, Any]) -> dict[str, Any]:
    """ToChatCompletion, without id and created."""
    message, calls = native["message"], calls_of(native["message"])
    said = {"role": message["role"], "content": message["content"]}
    if message.get("thinking"):
        said["reasoning"] = message["thinking"]
    if calls:
        said["tool_calls"] = calls
    reason = native["done_reason"]
    reason = "tool_calls" if reason == "stop" and calls else reason
    choice = {"index": 0, "message": said, "finish_reason": reason}
    if native.get("logprobs"):
        choice["logprobs"] = {"content": native["logprobs"]}
    facts = {"object": "chat.completion", "model": native["model"], "choices": [choice]}
    return {**facts, "system_fingerprint": "fp_ollama", "usage": usage_of(native)}


def chunk(native: dict[str, Any], choices: list[Any], **more: Any) -> dict[str, Any]:
    facts = {"object": "chat.completion.chunk", "model": native["model"], "choices": choices}
    return {**facts, "system_fingerprint": "fp_ollama", **more}


def deltas(native: dict[str, Any]) -> list[dict[str, Any]]:
    """ToStreamChunks: one, or two where reasoning stands beside the rest."""
    message, calls = native["message"], calls_of(native["message"])
    probs = {"logprobs": {"content": native["logprobs"]}} if native.get("logprobs") else {}
    reasoning = {"reasoning": message["thinking"]} if message.get("thinking") else {}
    rest: dict[str, Any] = {"content": message["content"]}
    if calls:
        rest["tool_calls"] = calls
    if reasoning and (message["content"] or calls):
        return [{"delta": reasoning, **probs}, {"delta": rest}]
    return [{"delta": {**rest, **reasoning}, **probs}]


def stream(lines: list[dict[str, Any]], with_usage: bool) -> list[Any]:
    """ChatWriter: the events, without id and created."""
    events: list[Any] = []
    called = False
    for native in lines:
        message = native["message"]
        heard = message["content"] or message.get("thinking") or message.get("tool_calls")
        if not (native["done"] and events and not heard and not native.get("logprobs")):
            for one in deltas(native):
                one["delta"] = {**({} if events else {"role": "assistant"}), **one["delta"]}
                events.append(chunk(native, [{"index": 0, "finish_reason": None, **one}]))
            called = called or bool(message.get("tool_calls"))
        if native["done"]:
            reason = native["done_reason"] or "stop"
            reason = "tool_calls" if reason == "stop" and called else reason
            ends = {"index": 0, "delta": {}, "finish_reason": reason}
            events.append(chunk(native, [ends]))
            if with_usage:
                events.append(chunk(native, [], usage=usage_of(native)))
    return [*events, "[DONE]"]
