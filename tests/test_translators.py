"""Translators by themselves: however a stream is cut, and whatever comes in place of an answer."""

from __future__ import annotations

import functools
import json
import random
import time
from typing import Any, Callable

import pytest

import llmq
from llmq import TRANSLATORS, BackendError, BadRequest, Untranslatable
from tests.documents import RECORDINGS, cuts, recorded, stream_of

ASKED = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "input": ["hi"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "encoding_format": "base64",
}
PAIRS = list(TRANSLATORS)
STREAMED = [pair for pair in PAIRS if "embed" not in pair[0]]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=" at ".join)
each_streamed = pytest.mark.parametrize("pair", STREAMED, ids=" at ".join)
TEXT_AND_TOOLS = {  # by the route that sends it
    "/v1/chat/completions": b"""\
data: {"choices":[{"delta":{"role":"assistant","reasoning_content":"hm \xf0\x9f\xa6\x99"}}]}

: position=1 eta=2

data: {"choices":[{"delta":{"content":"h\\u00e9"},"logprobs":{"content":[{"token":"h"}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":1,"id":"b","function":{"name":"g"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a","function":{"name":"f",\
"arguments":"{\\"x\\":"}}]}}]}

data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"[1]}"}}]}}]}

data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}

data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}

data: [DONE]

""",
    "/v1/completions": b"""\
data: {"choices":[{"text":"h\xc3\xa9"}]}

data: {"choices":[{"text":"","finish_reason":"length"}],"usage":{"prompt_tokens":3}}

data: [DONE]

""",
    "/api/chat": b"""\
{"message":{"role":"assistant","content":"","thinking":"hm \xf0\x9f\xa6\x99"},"done":false}
  {"message":{"content":"h\\u00e9"},"done":false,"logprobs":[{"token":"h"}]}
{"message":{"content":"","tool_calls":[{"function":{"name":"f","arguments":{"x":[1]}}},\
{"id":"b","function":{"index":5,"name":"g"}}]},"done":false}

{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":4,"prompt_eval_count":3}
""",
    "/api/generate": b"""\
{"response":"h\xc3\xa9","done":false}
{"response":"","done":true,"done_reason":"length","eval_count":4}
""",
}


def translator(pair: tuple[str, str], **more: Any) -> Any:
    return TRANSLATORS[pair]({**ASKED, **more}, "m", 0, lambda: 1795251034.25)


def retold(pair: tuple[str, str], pieces: list[bytes]) -> bytes:
    """What becomes of a stream that comes in these pieces."""
    one = translator(pair)
    return b"".join([one.feed(piece) for piece in pieces]) + one.finish(b"")


def unless_refused(run: Callable[[], Any]) -> Any:
    """What comes of it; None where it is refused in words."""
    try:
        return run()
    except (BackendError, BadRequest, Untranslatable):
        return None


# ---- Streams, however they are cut ---------------------------------------------------------------


@each_streamed
def test_stream_is_retold_the_same_however_it_is_cut(pair: tuple[str, str]) -> None:
    data = TEXT_AND_TOOLS[pair[1]]
    expected = retold(pair, [data])
    assert b"h\\u00e9" in expected
    for pieces in cuts(data, most=60):
        assert retold(pair, pieces) == expected, pieces
    windows = data.replace(b"\n", b"\r\n")
    assert retold(pair, [windows]) == expected


@each_streamed
def test_stream_that_was_retold_is_a_good_one_of_its_dialect(pair: tuple[str, str]) -> None:
    data = retold(pair, [TEXT_AND_TOOLS[pair[1]]])
    watch = llmq.StreamWatch(llmq.ENDPOINTS[pair[0]].dialect)
    assert watch.feed(data) + watch.finish() == data
    assert watch.tokens in (4, None)


def test_tool_calls_that_come_in_bits_are_told_whole_and_in_their_order() -> None:
    lines = retold(("/api/chat", "/v1/chat/completions"), [TEXT_AND_TOOLS["/v1/chat/completions"]])
    told = [json.loads(line)["message"] for line in lines.splitlines()]
    (calls,) = [message["tool_calls"] for message in told if "tool_calls" in message]
    assert calls == [
        {"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": [1]}}},
        {"id": "b", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]


def shred(**part: Any) -> bytes:
    """A bit of a tool call in a stream of OpenAI's; its name and arguments are its function's."""
    function = {name: part.pop(name) for name in ("name", "arguments") if name in part}
    delta = {"tool_calls": [{**part, "function": function}]}
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    "bits",
    [
        [
            {"index": 0, "id": "a", "name": "f", "arguments": '{"x":1}'},
            {"index": 0, "id": "b", "name": "g", "arguments": "{}"},
        ],
        [{"id": "a", "name": "f", "arguments": '{"x":1}'}, {"id": "b", "name": "g"}],
        [
            {"id": "a", "name": "f"},
            {"arguments": '{"x"'},
            {"arguments": ":1}"},
            {"id": "b", "name": "g", "arguments": ""},
        ],
        [
            {"index": 0, "id": "a", "name": "f", "arguments": ""},
            {"index": 1, "id": "b", "name": "g", "arguments": ""},
            {"index": 0, "arguments": '{"x":'},
            {"index": 1, "arguments": "{}"},
            {"index": 0, "arguments": "1}"},
        ],
        [
            {"index": 0, "id": "a", "name": "f", "arguments": '{"x":'},
            {"index": 0, "id": "a", "arguments": "1}"},
            {"index": 0, "id": "b", "name": "g"},
        ],
        [
            {"index": 0, "id": "a", "name": "f", "arguments": {"x": 1}},
            {"index": 1, "id": "b", "name": "g", "arguments": {}},
        ],
        [
            {"index": 0, "id": "a", "name": "f", "arguments": '"{\\"x\\":1}"'},
            {"index": 1, "id": "b", "name": "g", "arguments": '"{}"'},
        ],
        [
            {"index": 0, "id": "a", "name": "f", "arguments": {"x": 1}},
            {"index": 0},
            {"index": 1, "id": "b", "name": "g"},
        ],
    ],
    ids=[
        "index repeats",
        "no index",
        "no index, in bits",
        "interleaved",
        "id repeats",
        "objects",
        "encoded twice",
        "object and an empty bit",
    ],
)
def test_tool_calls_are_told_apart_however_their_runner_marks_them(bits: list[Any]) -> None:
    data = b"".join(shred(**one) for one in bits) + b"data: [DONE]\n\n"
    told = retold(("/api/chat", "/v1/chat/completions"), [data])
    messages = [json.loads(line)["message"] for line in told.splitlines()]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert calls == [
        {"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}},
        {"id": "b", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]


def test_tool_calls_without_ids_and_indices_are_told_apart_by_a_new_name() -> None:
    bits = [{"name": "f", "arguments": '{"x":'}, {"arguments": "1}"}, {"name": "g"}]
    data = b"".join(shred(**one) for one in bits) + b"data: [DONE]\n\n"
    told = retold(("/api/chat", "/v1/chat/completions"), [data])
    messages = [json.loads(line)["message"] for line in told.splitlines()]
    calls = [call["function"] for one in messages for call in one.get("tool_calls", [])]
    assert calls == [
        {"index": 0, "name": "f", "arguments": {"x": 1}},
        {"index": 1, "name": "g", "arguments": {}},
    ]


def test_tool_calls_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "PARSED_LINE", 200)
    bits = [shred(index=0, name="f", arguments='{"x":"'), *[shred(index=0, arguments="a" * 50)] * 3]
    with pytest.raises(BackendError, match="too long"):
        retold(("/api/chat", "/v1/chat/completions"), [*bits, *bits])
    told = retold(("/api/chat", "/v1/chat/completions"), [*bits, shred(arguments='"}')])
    assert b'"x":"' + b"a" * 150 + b'"' in told


@pytest.mark.untraced
@pytest.mark.parametrize("name", ["chat-stream", "chat-stream-usage", "completion-stream"])
@pytest.mark.parametrize("runner", ["llama-server", "vllm", "ollama", "llama-cpp-python"])
def test_recorded_stream_of_openai_is_retold_the_same_however_it_is_cut(
    runner: str, name: str
) -> None:
    data, _ = stream_of(RECORDINGS / f"{runner}.{name}.response.txt")
    route = "/api/generate" if "completion" in name else "/api/chat"
    pair = next(pair for pair in PAIRS if pair[0] == route)
    expected = retold(pair, [data])
    lines = [json.loads(line) for line in expected.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    for pieces in cuts(data, most=10):
        assert retold(pair, pieces) == expected


@pytest.mark.parametrize("name", ["api-chat-stream", "api-generate-stream"])
def test_recorded_stream_of_ollama_is_retold_the_same_however_it_is_cut(name: str) -> None:
    data, _ = stream_of(RECORDINGS / f"ollama.{name}.response.txt")
    pair = next(pair for pair in PAIRS if pair[1] == f"/api/{name.split('-')[1]}")
    expected = retold(pair, [data])
    assert expected.endswith(b"data: [DONE]\n\n")
    for pieces in cuts(data, most=10):
        assert retold(pair, pieces) == expected


def test_line_that_is_too_long_to_be_understood_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "PARSED_LINE", 1000)
    for pair in STREAMED:
        one = translator(pair)
        one.feed(b'{"x":"' + b"y" * 900)
        with pytest.raises(BackendError):
            one.feed(b"y" * 900)


# ---- What is no answer ---------------------------------------------------------------------------

CALL = {"function": {"name": "f", "arguments": "{}"}}
NO_ANSWERS: list[Any] = [
    *(None, [], {}, "x", 7, [[]], {"error": "x"}),
    *({"choices": []}, {"choices": None}, {"choices": 7}, {"choices": [None]}, {"choices": [{}]}),
    *({"choices": [{"message": 7}]}, {"choices": [{"text": None, "message": None}]}),
    {"choices": [{"message": {"tool_calls": [{}]}}]},
    {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]},
    {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": 7}}]}}]},
    *({"message": None}, {"message": 7}, {"message": []}, {"message": {"content": "x"}}),
    {"message": {"role": "assistant", "tool_calls": [{}]}},
    {"message": {"role": "assistant", "tool_calls": 7}},
    {"message": {"role": "assistant"}, "response": "x", "eval_count": "many"},
    *({"response": None, "eval_count": []}, {"embeddings": None}, {"embeddings": 7}),
    *({"embeddings": [7]}, {"embeddings": [["x"]]}, {"embeddings": [[1e300]]}),
    *({"embeddings": [[None]]}, {"embeddings": [[1]], "prompt_eval_count": {}, "data": []}),
    *({"data": None}, {"data": [7]}, {"data": [{}]}, {"data": {}}, {"data": [[]]}),
    {"data": [{"embedding": [1]}], "usage": 7, "choices": [{"text": "x"}]},
    {"choices": [{"message": {}, "text": "x"}], "usage": [7]},
    {"choices": [{"message": {"content": "x"}, "text": "x", "logprobs": 7}], "usage": "x"},
]


@each_pair
@pytest.mark.parametrize("answer", NO_ANSWERS, ids=ascii)
def test_what_is_no_answer_is_a_backends_error_or_retold_in_json(
    pair: tuple[str, str], answer: Any
) -> None:
    one = translator(pair)
    told = unless_refused(lambda: one.translate(one.whole, answer))
    assert told is None or isinstance(json.loads(llmq.render_json(told)), dict)


@each_streamed
@pytest.mark.parametrize("event", NO_ANSWERS, ids=ascii)
def test_event_that_makes_no_sense_is_a_backends_error_or_retold(
    pair: tuple[str, str], event: Any
) -> None:
    mark = b"data: " if pair[1].startswith("/v1") else b""
    deltas = json.dumps(event).replace("message", "delta") if mark else json.dumps(event)
    for line in (mark + deltas.encode() + b"\n\n", mark + b"{\n", mark + b"\xff\n", mark + b"x\n"):
        told = unless_refused(functools.partial(retold, pair, [line]))
        assert told is None or isinstance(told, bytes)


@pytest.mark.parametrize(
    "events",
    [
        [{"usage": 7}],
        [{"usage": [1], "choices": []}],
        [{"choices": [{"delta": {"tool_calls": [{"index": "a"}, {"index": 0}]}}]}],
        [{"choices": [{"delta": {"tool_calls": [{"index": []}]}}]}],
        [{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]}],
        [{"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]}],
        [{"choices": [{"delta": {}, "finish_reason": []}]}],
    ],
    ids=ascii,
)
def test_nonsense_that_shows_at_the_end_only_is_a_backends_error_too(events: list[Any]) -> None:
    for pair in STREAMED:
        data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        told = unless_refused(functools.partial(retold, pair, [data, b"data: [DONE]\n\n"]))
        assert told is None or isinstance(told, bytes)


DEEP = "[" * 100_000


@each_pair
def test_arguments_of_a_tool_that_nest_without_end_are_no_crash(pair: tuple[str, str]) -> None:
    call = {"function": {"name": "f", "arguments": DEEP}}
    one = translator(pair)
    answer = {"choices": [{"message": {"content": "hi", "tool_calls": [call]}}]}
    if pair == ("/api/chat", "/v1/chat/completions"):
        told = one.translate(one.whole, answer)  # without the call
        assert told["message"] == {"role": "assistant", "content": "hi"}
    else:
        with pytest.raises(BackendError):
            one.translate(one.whole, answer)
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    body = unless_refused(translator(pair, messages=messages).body)
    assert body is None or json.loads(body)["model"] == "m"


# ---- What cannot be asked ------------------------------------------------------------------------

ODD: list[Any] = [None, True, 7, -1.5, "x", [], [7], [None], {}, {"a": 1}, [{}], [[]], {"type": 7}]


@each_pair
@pytest.mark.parametrize(
    "name",
    [
        *("messages", "prompt", "input", "stream", "options", "tools", "format", "think", "stop"),
        *("response_format", "reasoning", "reasoning_effort", "stream_options", "max_tokens"),
        *("temperature", "logprobs", "keep_alive", "dimensions", "suffix", "images", "system"),
    ],
)
def test_odd_member_is_passed_on_or_refused_and_never_a_crash(
    pair: tuple[str, str], name: str
) -> None:
    for odd in ODD:
        asked = {**ASKED, name: odd}
        if unless_refused(lambda: llmq.ENDPOINTS[pair[0]].check(asked) or True):  # noqa: B023
            body = unless_refused(translator(pair, **{name: odd}).body)
            assert body is None or json.loads(body)["model"] == "m"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
@pytest.mark.parametrize("member", ["role", "content", "tool_calls", "images", "thinking", "name"])
def test_odd_member_of_a_message_is_passed_on_or_refused(path: str, member: str) -> None:
    pair = next(pair for pair in PAIRS if pair[0] == path)
    for odd in ODD:
        for role in ("user", "assistant", "tool"):
            messages = [{"role": role, "content": "hi", member: odd}]
            body = unless_refused(translator(pair, messages=messages).body)
            assert body is None or json.loads(body)["messages"]


@pytest.mark.parametrize("pair", PAIRS, ids=" at ".join)
def test_question_is_asked_of_the_backends_model_and_left_as_it_is(pair: tuple[str, str]) -> None:
    asked = json.loads(json.dumps(ASKED))
    body = json.loads(TRANSLATORS[pair](asked, "other", 0, lambda: 7.5).body())
    assert body["model"] == "other"
    assert "num_ctx" not in body.get("options", {})
    if pair[1].startswith("/api/"):
        carrying = json.loads(TRANSLATORS[pair](asked, "other", 4096, lambda: 7.5).body())
        assert carrying["options"]["num_ctx"] == 4096
    assert asked == ASKED


# ---- Small parts ---------------------------------------------------------------------------------


def test_floats_are_packed_as_openais_sdks_unpack_them() -> None:
    assert llmq.pack_floats([]) == ""
    assert llmq.pack_floats([1.0, -2.5]) == "AACAPwAAIMA="


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000000Z"),
        (1795251034.25, "2026-11-21T08:50:34.250000Z"),
        (0.9999999, "1970-01-01T00:00:00.999999Z"),
    ],
)
def test_times_are_written_as_ollama_writes_them(seconds: float, text: str) -> None:
    assert llmq.rfc3339(seconds) == text


def test_recorded_pair_of_answers_differs_by_id_and_time_alone() -> None:
    """The same question at both routes of one Ollama."""
    native = recorded(RECORDINGS / "ollama.api-chat.response.txt")[1]
    one = translator(("/v1/chat/completions", "/api/chat"))
    told = one.translate(one.whole, json.loads(native))
    shape = json.loads(recorded(RECORDINGS / "ollama.chat.response.txt")[1])
    assert list(told) == list(shape)
    assert list(told["choices"][0]) == list(shape["choices"][0])
    assert list(told["usage"]) == list(shape["usage"])


@pytest.mark.parametrize("seed", range(50))
def test_results_find_the_first_open_call_of_their_function(seed: int) -> None:
    chance = random.Random(seed)
    calls, naive = llmq.OpenCalls(), []
    for number in range(200):
        name = chance.choice(["a", "b", None])
        if chance.random() < 0.5:
            calls.add(f"id{number}", name or "c")
            naive.append((name or "c", f"id{number}"))
            continue
        found = next((call for call in naive if name in (None, call[0])), (name, name))
        naive = [call for call in naive if call is not found]
        assert calls.take(name) == found[1]


def test_a_result_that_names_its_call_takes_that_one_out() -> None:
    calls = llmq.OpenCalls()
    for ident in "123":
        calls.add(ident, "f")
    assert calls.take("f", "2") == "2"
    assert [calls.take("f"), calls.take("f"), calls.take("f")] == ["1", "3", "f"]


def test_a_tool_call_without_a_name_is_left_out() -> None:
    good = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    bad = {"id": "2", "function": {"name": None, "arguments": "{}"}}
    (kept,) = llmq.retold([bad, good], llmq.ollama_tool_call)
    assert kept["function"]["name"] == "f"


# ---- How much work -------------------------------------------------------------------------------


def cpu(work: Any) -> float:
    """The least CPU time of a few runs."""
    times = []
    for _ in range(3):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def calls_and_results(number: int) -> dict[str, Any]:
    """A conversation of as many tool calls, and as many results that name their function only."""
    calls = [{"function": {"name": f"f{n}", "arguments": {}}} for n in range(number)]
    results = [{"role": "tool", "tool_name": f"f{n}", "content": "x"} for n in range(number)]
    return {"model": "m", "messages": [{"role": "assistant", "tool_calls": calls}, *results]}


def test_results_are_matched_with_calls_in_time_that_grows_with_their_number() -> None:
    def asked(number: int) -> float:
        question = calls_and_results(number)
        translate = llmq.TRANSLATORS["/api/chat", "/v1/chat/completions"]
        return cpu(lambda: translate(question, "m", 0, float).body())

    assert asked(8_000) < 24 * asked(1_000), "8 times as many; 64 times would be quadratic"


def test_bits_of_a_tool_call_are_joined_in_time_that_grows_with_their_number() -> None:
    def told(number: int) -> float:
        bits = [shred(index=0, name="f", arguments="["), shred(index=0, arguments="1" * 200)]
        data = bits[0] + bits[1] * number + b"data: [DONE]\n\n"
        return cpu(lambda: retold(("/api/chat", "/v1/chat/completions"), [data]))

    assert told(16_000) < 24 * told(2_000), "8 times as many; 64 times would be quadratic"
