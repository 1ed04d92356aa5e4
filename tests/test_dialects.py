"""What answers and errors mean in each dialect: watched as they pass, never taken for success."""

from __future__ import annotations

import json
import time

import pytest

import llmq
from llmq import (
    ANTHROPIC,
    COUNT_TOKENS,
    ENDPOINTS,
    OLLAMA,
    OPENAI,
    BackendAnswer,
    BackendError,
    BackendLoading,
    LlmqError,
    ResponseHead,
    RouteUnsupported,
    StreamWatch,
    dialect_of,
    estimate_tokens,
    read_refusal,
    read_usage,
    read_whole,
)
from tests.documents import RECORDINGS, cuts, recorded, recordings, stream_of

RESPONSES = ENDPOINTS["/v1/responses"].dialect
DIALECTS = {"openai": OPENAI, "responses": RESPONSES, "ollama": OLLAMA, "anthropic": ANTHROPIC}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
OBJECTS = (OPENAI, RESPONSES)  # whose errors are OpenAI's objects


def refused_with(status, body, **headers):
    return read_refusal(ResponseHead(status, 1, headers), body, "sk-1", ("sk-1",))


# ---- Which dialect a path speaks -----------------------------------------------------------------


def test_every_route_has_the_dialect_of_its_clients():
    for path, endpoint in ENDPOINTS.items():
        expected = OLLAMA if path.startswith("/api/") else OPENAI
        expected = {"/v1/messages": ANTHROPIC, "/v1/responses": RESPONSES}.get(path, expected)
        assert endpoint.dialect is dialect_of(path, {}) is expected


@pytest.mark.parametrize(
    ("path", "headers", "dialect"),
    [
        ("/api/tags", {}, OLLAMA),
        ("/api/nowhere", {}, OLLAMA),
        ("/api/chat", {"anthropic-version": "2023-06-01"}, OLLAMA),
        ("/apis", {}, OPENAI),
        (COUNT_TOKENS, {}, ANTHROPIC),
        ("/v1/messages/batches", {}, ANTHROPIC),
        ("/v1/models", {}, OPENAI),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, ANTHROPIC),
        ("/v1/chat/completions", {"anthropic-version": "2023-06-01"}, OPENAI),
        ("/nowhere", {}, OPENAI),
        ("/llmq/mode", {}, OPENAI),
    ],
)
def test_error_of_any_path_speaks_the_dialect_of_who_asks(path, headers, dialect):
    assert dialect_of(path, headers) is dialect


# ---- Errors --------------------------------------------------------------------------------------


def all_errors(cls=LlmqError):
    return [cls, *(error for sub in cls.__subclasses__() for error in all_errors(sub))]


def answered(status, words="x", body=b"", document=None):
    return BackendAnswer(status, words, body, document, None)


ERRORS = [error for error in all_errors() if error is not BackendAnswer]


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
@each_dialect
def test_every_error_is_shown_as_its_clients_know_it(dialect, cls):
    words = 'no "x"\n'
    error = cls(answered(404, words) if cls is RouteUnsupported else words)
    error.param = "p"
    body = dialect.render_error(error, "id-1")
    shown = json.loads(body)
    assert shown == dialect.error_object(error, "id-1")
    assert len(body.splitlines()) == 1
    if dialect in OBJECTS:
        assert list(shown["error"]) == ["message", "type", "param", "code"]
        assert (shown["error"]["param"], shown["error"]["code"]) == ("p", cls.code)
        assert shown["error"]["message"] == 'no "x"\n'
    elif dialect is ANTHROPIC:
        assert list(shown) == ["type", "error", "request_id"]
        assert (shown["type"], shown["request_id"]) == ("error", "id-1")
        assert shown["error"] == {"type": shown["error"]["type"], "message": 'no "x"\n'}
    else:
        assert shown == {"error": 'no "x"\n'}
    assert dialect.is_error(shown), "llmq behind llmq passes it on"


TYPES = [  # status, OpenAI's type, Anthropic's
    (400, "invalid_request_error", "invalid_request_error"),
    (401, "invalid_request_error", "authentication_error"),
    (403, "invalid_request_error", "permission_error"),
    (404, "not_found_error", "not_found_error"),
    (405, "invalid_request_error", "invalid_request_error"),
    (413, "invalid_request_error", "request_too_large"),
    (415, "invalid_request_error", "invalid_request_error"),
    (422, "invalid_request_error", "invalid_request_error"),
    (429, "rate_limit_error", "rate_limit_error"),
    (499, "invalid_request_error", "invalid_request_error"),
    (500, "api_error", "api_error"),
    (501, "api_error", "api_error"),
    (502, "api_error", "api_error"),
    (503, "api_error", "overloaded_error"),
    (504, "api_error", "timeout_error"),
    (529, "api_error", "api_error"),
]


@pytest.mark.parametrize(("status", "openai", "anthropic"), TYPES)
def test_type_of_an_error_follows_its_status(status, openai, anthropic):
    assert OPENAI.error_object(answered(status))["error"]["type"] == openai
    assert RESPONSES.error_object(answered(status))["error"]["type"] == openai
    assert ANTHROPIC.error_object(answered(status))["error"]["type"] == anthropic


def test_anthropics_error_without_a_request_has_no_id():
    assert ANTHROPIC.error_object(LlmqError("x"))["request_id"] is None


WORDS = {  # of a backend, each as a dialect has it, and no other
    "openai": b'{"error":{"message":"no", "code": 7, "x":[]}}',
    "ollama": b'{ "error" : "no" }',
    "anthropic": b'{"type":"error","error":{"type":"api_error","message":"no"},"x":1}',
}
OWN_WORDS = {"responses": "openai"}


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", DIALECTS)
def test_backends_own_words_pass_byte_for_byte_in_its_dialect_and_are_retold_in_others(name, kind):
    dialect, refusal = DIALECTS[name], refused_with(400, WORDS[kind])
    body = dialect.render_error(refusal, "id-1")
    if OWN_WORDS.get(name, name) == kind:
        assert body == WORDS[kind]
    else:
        assert json.loads(body) == dialect.error_object(refusal, "id-1")
    assert dialect.is_error(json.loads(body))
    assert b"no" in body


@each_dialect
@pytest.mark.parametrize(
    "document",
    [
        *(None, [], "error", 7, {}, {"error": None}, {"error": {}}, {"error": []}, {"error": 7}),
        *({"error": {"message": ""}}, {"error": {"message": 7}}, {"error": {"code": 1}}),
        *({"type": "error"}, {"type": "error", "error": {}}, {"type": "error", "message": "x"}),
        *({"message": "x"}, {"detail": "x"}, [{"error": "x"}]),
    ],
    ids=ascii,
)
def test_what_is_no_error_of_a_dialect_is_not_passed_on_as_one(dialect, document):
    assert not dialect.is_error(document)
    body = json.dumps(document).encode()
    shown = json.loads(dialect.render_error(answered(418, "x", body, document)))
    assert dialect.is_error(shown)


@each_dialect
@pytest.mark.parametrize("inside", [False, True])
def test_error_in_a_stream_is_one_event_and_no_end(dialect, inside):
    words = 'a\n\ndata: [DONE]\n\nevent: message_stop\n\n"done":true\n'
    event = dialect.render_stream_error(BackendError(words), "id-1", inside)
    assert event.startswith(b"\n") is inside, "a line of its own"
    assert dialect.find_end(event) == -1
    document = json.loads(dialect.read_line(event.strip().splitlines()[-1]))
    assert words in (document["error"], document.get("message"), error_words(document))
    if dialect is OLLAMA:
        assert event.strip(b"\n").count(b"\n") == 0
        assert event.endswith(b"}\n")
    else:
        assert event.endswith(b"}\n\n")
        assert event.strip().startswith(
            b"data: {" if dialect is OPENAI else b"event: error\ndata: {"
        )


def error_words(document):
    return document["error"]["message"] if isinstance(document["error"], dict) else ""


@each_dialect
def test_error_that_llmq_writes_into_a_stream_is_understood_by_llmq(dialect):
    for inside in (False, True):
        event = dialect.render_stream_error(BackendError("out of memory"), "id-1", inside)
        watch = StreamWatch(dialect)
        watch.feed(b'{"x":' if inside else b"")
        assert b"memory" not in watch.feed(event)
        with pytest.raises(BackendError, match="out of memory"):
            watch.finish()


def test_error_of_responses_is_an_event_with_the_members_that_its_sdk_reads():
    event = RESPONSES.render_stream_error(BackendError("x", param="p"), "id-1", inside=False)
    document = json.loads(event.splitlines()[1].partition(b":")[2])
    assert document["type"] == "error"
    facts = {name: document[name] for name in ("message", "param", "code")}
    assert facts == {"message": "x", "param": "p", "code": "backend_error"}
    assert isinstance(document["sequence_number"], int)


# ---- What runners answer when they refuse --------------------------------------------------------


def refused(status):
    """Some runners answer all the same what others refuse."""
    return status != 200


def words_of(status, body):
    """A runner's words, wherever it writes them."""
    try:
        document = json.loads(body)
    except ValueError:
        return f"the backend answered {status}"
    error = document.get("error", document.get("detail"))
    return error if isinstance(error, str) else error["message"]


@recordings("*.err-*.response.txt", refused)
def test_recorded_refusal_keeps_the_runners_words_and_status(path):
    head, body = recorded(path)
    refusal = read_refusal(head, body, "sk-1", ("sk-1",))
    kind = {403: BackendError, 404: RouteUnsupported}.get(head.status, BackendAnswer)
    if "unknown-model" in path.name:
        kind = BackendAnswer
    assert type(refusal) is kind
    assert words_of(head.status, body) in refusal.message
    assert refusal.status == {BackendError: 502, RouteUnsupported: 501}.get(kind, head.status)
    if kind is BackendAnswer:
        assert refusal.body == body
        shown = json.loads(OPENAI.render_error(refusal))["error"]
        assert shown["message"] == words_of(head.status, body)


@recordings("*.err-*.response.txt", refused)
def test_recorded_error_object_passes_byte_for_byte_to_openais_clients(path):
    head, body = recorded(path)
    refusal = read_refusal(head, body)
    if b'"error":{' in body and isinstance(refusal, BackendAnswer):
        assert OPENAI.render_error(refusal) == body
    for dialect in (OLLAMA, ANTHROPIC):
        assert dialect.is_error(json.loads(dialect.render_error(refusal)))
        shown = json.loads(dialect.render_error(refusal))
        assert refusal.message in (shown["error"], error_words(shown))


@recordings("ollama.api-*-model.response.txt")
def test_recorded_error_that_is_only_a_text_is_put_into_an_error_object(path):
    head, body = recorded(path)
    refusal = read_refusal(head, body)
    assert (type(refusal), refusal.message) == (BackendAnswer, "model 'no-such-model' not found")
    shown = json.loads(OPENAI.render_error(refusal))["error"]
    assert (shown["message"], shown["type"]) == (refusal.message, "not_found_error")
    assert OLLAMA.render_error(refusal) == body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", None),
        (b"<html>bad</html>", None),
        (b"null", None),
        (b"[]", None),
        (b'["error"]', None),
        (b'"error"', None),
        (b"7", None),
        (b"{}", None),
        (b'{"error":null}', None),
        (b'{"error":""}', None),
        (b'{"error":{}}', None),
        (b'{"error":{"message":""}}', None),
        (b'{"error":{"message":7}}', None),
        (b'{"error":7}', None),
        (b'{"error":["x"]}', None),
        (b'{"detail":[{"msg":"x"}]}', None),
        (b"[" * 100_000, None),
        (b'{"error":' + b"9" * 10_000 + b"}", None),
        (b'{"error":"\xff"}', None),
        (b'{"error":"out of memory"}', "out of memory"),
        (b'{"error":{"message":"out of memory"}}', "out of memory"),
        (b'{"type":"error","error":{"message":"out of memory"}}', "out of memory"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"error":"' + b"x" * 5000 + b'"}', "x" * 1000),
    ],
    ids=lambda part: ascii(part)[:40],
)
def test_whatever_a_backend_says_in_an_error_there_is_a_message(body, message):
    refusal = refused_with(418, body)
    assert type(refusal) is BackendAnswer
    assert refusal.message == (message or "the backend answered 418")
    for dialect in DIALECTS.values():
        assert dialect.is_error(json.loads(dialect.render_error(refusal)))


@pytest.mark.parametrize(
    ("status", "body", "kind", "shown"),
    [
        (301, b"", BackendError, 502),
        (307, b'{"error":{"message":"x"}}', BackendError, 502),
        (401, b'{"error":"no"}', BackendError, 502),
        (403, b"", BackendError, 502),
        (400, b"", BackendAnswer, 400),
        (422, b'{"error":{"message":"x"}}', BackendAnswer, 422),
        (429, b"", BackendAnswer, 429),
        (500, b"", BackendAnswer, 500),
        (503, b"", BackendAnswer, 503),
        (503, b'{"error":{"message":"Loading model","code":503}}', BackendLoading, 503),
        (404, b"", RouteUnsupported, 501),
        (404, b"404 page not found", RouteUnsupported, 501),
        (404, b'{"detail":"Not Found"}', RouteUnsupported, 501),
        (404, b'{"error":{"message":"File Not Found"}}', RouteUnsupported, 501),
        (404, b'{"error":"Unexpected endpoint or method. (POST /v1/x)"}', RouteUnsupported, 501),
        (404, b'{"error":{"message":"Cannot POST /v1/rerank"}}', RouteUnsupported, 501),
        (404, b'{"error":{"message":"unknown path /v1/x"}}', RouteUnsupported, 501),
        (404, b"Not Found\r\n", RouteUnsupported, 501),
        (404, b'"Not Found"', RouteUnsupported, 501),
        (404, b'{"message":"Not Found"}', RouteUnsupported, 501),
        (404, b'{"error":{"code":404}}', BackendAnswer, 404),
        (404, b'{"error":{"message":""}}', BackendAnswer, 404),
        (404, b'{"msg":"Response resp_1 not found"}', BackendAnswer, 404),
        (404, b'{"id":"resp_1","found":false}', BackendAnswer, 404),
        (404, b'{"detail":[{"msg":"not found"}]}', BackendAnswer, 404),
        (404, b'["resp_1"]', BackendAnswer, 404),
        (404, b"{}", BackendAnswer, 404),
        (404, b'{"error":"remodeling"}', BackendAnswer, 404),
        (404, b'{"error":"not here"}', BackendAnswer, 404),
        (404, b'{"error":"Not found: the answer"}', BackendAnswer, 404),
        (
            404,
            b'{"error":{"message":"Response with id \'resp_1\' not found."}}',
            BackendAnswer,
            404,
        ),
        (404, b'{"error":{"message":"file-7 not found"}}', BackendAnswer, 404),
        (404, b'{"error":"no such model"}', BackendAnswer, 404),
        (404, b'{"error":{"message":"Model \'x\' not found"}}', BackendAnswer, 404),
        (404, b'{"type":"error","error":{"message":"model: x"}}', BackendAnswer, 404),
        (405, b"", RouteUnsupported, 501),
        (405, b'{"error":"model"}', RouteUnsupported, 501),
        (501, b'{"error":{"message":"no embeddings for this model"}}', RouteUnsupported, 501),
    ],
)
def test_refusal_says_whose_fault_it_is(status, body, kind, shown):
    refusal = refused_with(status, body, **{"retry-after": "7"})
    assert (type(refusal), refusal.status) == (kind, shown)
    if kind is BackendAnswer:
        assert refusal.retry_after == 7


@pytest.mark.parametrize(
    ("status", "says", "for_model"),
    [(404, "Not Found", False), (405, "not here", False), (501, "not here", True)],
)
def test_lack_of_a_route_is_of_the_backend_or_of_one_model(status, says, for_model):
    lack = refused_with(status, json.dumps({"error": says}).encode())
    assert (lack.message, lack.for_model, lack.should_retry) == (says, for_model, False)


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_is_the_runners_word_where_llmq_sends_none(status):
    body = b'{"error":"sign in","signin_url":"https://ollama.com/connect"}'
    refusal = read_refusal(ResponseHead(status, 1, {}), body)
    assert (type(refusal), refusal.status, refusal.message) == (BackendAnswer, status, "sign in")
    assert refusal.body == body
    assert type(read_refusal(ResponseHead(status, 1, {}), body, "sk-1")) is BackendError


@pytest.mark.parametrize(
    ("body", "lacks"),
    [
        (b'{"error":"Unexpected endpoint or method. (POST /v1/rerank)"}', True),
        (
            b'{"error":{"message":"Unexpected endpoint or method. (POST /v1/x). Returning 200"}}',
            True,
        ),
        (b'{"error":"Not Found"}', True),
        (b'{"error":"out of memory"}', False),
        (b'{"error":"the file was not found"}', False),
        (b'{"error":null,"choices":[]}', False),
        (b'{"choices":[{"text":"Unexpected endpoint or method. error"}]}', False),
        (b'"error: not found"', False),
        (b"error", False),
        (b"{}", False),
        (b"", False),
    ],
)
def test_answer_of_status_200_may_say_that_its_route_is_unknown(body, lacks):
    """LM Studio's do."""
    if lacks:
        with pytest.raises(RouteUnsupported) as caught:
            llmq.check_route_known(body)
        assert not caught.value.for_model
    else:
        llmq.check_route_known(body)


@pytest.mark.parametrize(
    "value", ["", "-1", "soon", "1.5", "Sat, 21 Nov 2026 08:50:33 GMT", "\xb2"]
)
def test_retry_after_that_is_no_number_is_dropped(value):
    assert refused_with(429, b"", **{"retry-after": value}).retry_after is None


# ---- Whole answers -------------------------------------------------------------------------------


@recordings("*.chat*.response.txt")
def test_recorded_whole_answer_tells_its_tokens(path):
    head, body = recorded(path)
    if "event-stream" in head.headers["content-type"]:
        with pytest.raises(BackendError):
            read_whole(body)
    else:
        assert read_whole(body) == json.loads(body)
        assert read_usage(read_whole(body))[0] == json.loads(body)["usage"]["completion_tokens"]


@recordings("ollama.api-chat.response.txt")
def test_recorded_native_answer_tells_its_tokens(path):
    document = read_whole(recorded(path)[1])
    assert read_usage(document)[0] == document["eval_count"] > 0


@recordings("*.err-*.response.txt", lambda status: status == 200)
def test_recorded_answer_to_a_bad_question_is_an_answer(path):
    _, body = recorded(path)
    assert read_usage(read_whole(body))[0] == json.loads(body)["usage"]["completion_tokens"]


@recordings("*.embeddings.response.txt", lambda status: status == 200)
def test_recorded_embeddings_are_whole_answers(path):
    assert read_usage(read_whole(recorded(path)[1]))[0] in (None, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b'{"choices":[',
        b'{"error":"x"}',
        b'{"error":{"message":"x"}}',
        b'{"error":{}, "error":7}',
        b'{"type":"error"}',
        b'{"type":"error","error":{"message":"x"}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
        b'{"a":"\xff"}',
        b'{"done":false}\n{"done":true}',
        b"x" * (llmq.PARSED_ANSWER + 1),
        b'{"a":"' + b"x" * llmq.PARSED_ANSWER,
        b"[" + b"1," * llmq.PARSED_ANSWER + b"1]",
    ],
    ids=lambda body: ascii(body)[:30],
)
def test_what_is_no_answer_is_never_passed_on_as_one(body):
    with pytest.raises(BackendError):
        read_whole(body)


def test_long_answer_is_checked_at_its_ends():
    assert read_whole(b' {"a":"' + b"x" * llmq.PARSED_ANSWER + b'"}\n') is None


def test_answer_that_denies_an_error_is_none():
    assert read_whole(b'{"error":null}') == {"error": None}
    assert read_whole(b'{"error":"","type":"message"}') == {"error": "", "type": "message"}


def test_bare_list_of_a_reranker_is_an_answer_without_usage():
    assert read_whole(b'[{"index":0,"score":0.5}]') is None
    assert read_usage(None)[0] is None


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"usage": {"completion_tokens": 3}}, 3),
        ({"usage": {"completion_tokens": 0}}, 0),
        ({"usage": {"output_tokens": 5}}, 5),
        ({"usage": {"completion_tokens": 3, "output_tokens": 5}}, 3),
        ({"usage": {"completion_tokens": None, "output_tokens": 5}}, 5),
        ({"response": {"usage": {"output_tokens": 6}}}, 6),
        ({"response": {"usage": None}, "usage": {"output_tokens": 5}}, None),
        ({"response": "text", "eval_count": 7}, 7),
        ({"eval_count": 7, "prompt_eval_count": 9}, 7),
        ({"eval_count": "7"}, None),
        ({"timings": {"predicted_n": 4}}, 4),
        ({"usage": {"completion_tokens": 3}, "timings": {"predicted_n": 4}}, 3),
        ({"usage": None, "timings": {"predicted_n": 4}}, 4),
        ({"usage": {"completion_tokens": None}}, None),
        ({"usage": {"completion_tokens": "3"}}, None),
        ({"usage": {"completion_tokens": 3.5}}, None),
        ({"usage": [3]}, None),
        ({"usage": 3}, None),
        ({}, None),
        ([], None),
        (None, None),
        ("usage", None),
    ],
    ids=ascii,
)
def test_usage_is_a_number_or_nothing(document, tokens):
    assert read_usage(document)[0] == tokens


# ---- Streams: a good one of each dialect ---------------------------------------------------------


def named(name, **facts):
    """An event as Anthropic and OpenAI's responses write them."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **facts})}\n\n".encode()


def content(text, **facts):
    message = {"role": "assistant", "content": text}
    facts = {"model": "m", "created_at": "2026-11-21T08:50:35Z", "message": message, **facts}
    return json.dumps(facts, separators=(",", ":")).encode() + b"\n"


DONE = b"data: [DONE]\n\n"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
DELTA = {"type": "text_delta", "text": "hi"}
PIECE = {  # of an answer
    "openai": EVENT,
    "responses": named("response.output_text.delta", delta="hi", sequence_number=3),
    "ollama": content("hi 🦙", done=False),
    "anthropic": named("content_block_delta", index=0, delta=DELTA),
}
END = {  # where a good stream ends: these bytes are kept back
    "openai": DONE,
    "responses": named("response.completed", response={"usage": {"output_tokens": 7}}),
    "ollama": content("", done=True, done_reason="stop", eval_count=7),
    "anthropic": named("message_stop"),
}
USAGE = {  # shortly before it
    "openai": b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n',
    "responses": named("response.output_text.done", text="hihi"),
    "ollama": b"",
    "anthropic": named(
        "message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7}
    ),
}
FAILED = {  # as a runner tells it
    "openai": b'data: {"error":{"message":"out of memory","code":500}}\n\n',
    "responses": named("error", message="out of memory", code="server_error"),
    "ollama": b'{"error":"out of memory"}\n',
    "anthropic": named("error", error={"type": "api_error", "message": "out of memory"}),
}
GOOD = {name: PIECE[name] * 2 + USAGE[name] + END[name] for name in DIALECTS}
each_name = pytest.mark.parametrize("name", DIALECTS)
INCOMPLETE = "the backend's answer ended before it was complete"


def watched(pieces, dialect=OPENAI):
    """What is shown of a stream piece by piece, then at its end, and how it failed."""
    watch, shown = StreamWatch(dialect), b""
    try:
        for piece in pieces:
            shown += watch.feed(piece)
        shown += watch.finish()
    except BackendError as error:
        return shown, watch, error.message
    return shown, watch, None


@each_name
def test_stream_is_shown_as_it_came_however_it_is_cut(name):
    for pieces in cuts(GOOD[name]):
        shown, watch, failure = watched(pieces, DIALECTS[name])
        assert (shown, failure, watch.tokens) == (GOOD[name], None, 7), pieces
        assert watch.dialect.find_end(GOOD[name]) == GOOD[name].index(END[name])


@each_name
def test_end_is_kept_back_until_the_body_has_ended(name):
    for pieces in cuts(GOOD[name], most=20):
        watch, shown = StreamWatch(DIALECTS[name]), b""
        for piece in pieces:
            shown += watch.feed(piece)
            assert shown == b"" or shown.endswith(b"\n" if name == "ollama" else b"\n\n")
        assert shown == GOOD[name][: -len(END[name])]
        assert watch.ended == watch.finish() == END[name]


@each_name
def test_stream_without_its_end_is_no_success(name):
    good, end = GOOD[name], END[name]
    before = good[: -len(end)]
    for data in (b"", PIECE[name], before, before + end[: len(end) // 2].rpartition(b"\n")[0]):
        for pieces in cuts(data, most=10):
            shown, _, failure = watched(pieces, DIALECTS[name])
            assert failure == INCOMPLETE
            assert good.startswith(shown)


@each_name
def test_stream_that_is_cut_anywhere_before_its_end_is_no_success(name):
    good = GOOD[name]
    edge = good.index(END[name])
    for at in range(edge + 1):
        shown, _, failure = watched([good[:at]], DIALECTS[name])
        assert failure == INCOMPLETE
        assert good.startswith(shown)


@each_name
def test_error_in_a_stream_is_never_taken_for_success(name):
    for before in (b"", PIECE[name], GOOD[name][: -len(END[name])]):
        for after in (b"", PIECE[name], END[name], PIECE[name] + END[name]):
            for pieces in cuts(before + FAILED[name] + after, most=10):
                shown, _, failure = watched(pieces, DIALECTS[name])
                assert failure == "out of memory", pieces
                assert shown == before, "all of it, and nothing of the error"


@each_name
def test_error_behind_the_end_is_no_success_either(name):
    for pieces in cuts(GOOD[name] + FAILED[name], most=10):
        shown, _, failure = watched(pieces, DIALECTS[name])
        assert failure == "out of memory", pieces
        assert END[name] not in shown


@each_name
def test_signs_of_life_in_a_runners_stream_change_nothing(name):
    """As llmq in front of llmq has them."""
    dialect = DIALECTS[name]
    beats = dialect.heartbeat(3, 12.4) + dialect.heartbeat(0, None)
    data = beats + GOOD[name].replace(PIECE[name], beats + PIECE[name])
    for pieces in cuts(data, most=20):
        shown, watch, failure = watched(pieces, dialect)
        assert (shown, failure, watch.tokens) == (data, None, 7)


def test_signs_of_life_are_what_each_dialects_clients_pass_over():
    for dialect in (OPENAI, RESPONSES):
        assert dialect.heartbeat(3, 12.4) == b": position=3 eta=12\n"
        assert dialect.heartbeat(0, 0.0) == b": position=0 eta=0\n"
        assert dialect.heartbeat(3, None) == b": position=3\n"
    for dialect in (ANTHROPIC, OLLAMA):
        assert dialect.heartbeat(3, None) == dialect.heartbeat(3, 12.4)
    assert ANTHROPIC.heartbeat(3, 12.4) == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert OLLAMA.heartbeat(3, 12.4) == b" "


@each_name
def test_pieces_are_counted(name):
    for pieces in cuts(GOOD[name], most=10):
        watch = watched(pieces, DIALECTS[name])[1]
        assert watch.pieces >= 2
        assert watch.pieces == GOOD[name].count(DIALECTS[name].piece_mark)


@each_name
def test_line_breaks_of_windows_end_a_line_too(name):
    data = GOOD[name].replace(b"\n", b"\r\n")
    for pieces in cuts(data, most=10):
        shown, watch, failure = watched(pieces, DIALECTS[name])
        assert (shown, failure, watch.tokens) == (data, None, 7)
    failed = (PIECE[name] + FAILED[name]).replace(b"\n", b"\r\n")
    for pieces in cuts(failed, most=10):
        assert watched(pieces, DIALECTS[name])[2] == "out of memory"


LOOKALIKES = {
    "openai": [
        b'data: {"content":"data: [DONE]"}\n\n',
        b'data: {"content":"\\ndata: [DONE]\\n\\n"}\n\n',
        b"data: data: [DONE]\n\n",
        b": data: [DONE]\n\n",
        b"xdata: [DONE]\n\n",
        b"event: [DONE]\n\n",
        b"[DONE]\n\n",
        b'data: "[DONE]"\n\n',
        b"data: [done]\n\n",
        b"data: " + b"x" * 100_000 + b"data: [DONE]\n\n",
        *(END["anthropic"], END["responses"], END["ollama"] + b"\n"),
    ],
    "responses": [
        named("response.output_text.delta", delta="event: response.completed\n\n"),
        b"data: event: response.completed\n\n",
        b": event: response.completed\n\n",
        b"xevent: response.completed\n\n",
        b'data: {"type":"response.completed"}\n\n',
        b"event: response.completedness\ndata: {}\n\n",
        b"event: response.complete\ndata: {}\n\n",
        b"event: xresponse.completed\ndata: {}\n\n",
        b"event: response.in_progress\ndata: {}\n\n",
        *(END["openai"], END["anthropic"], END["ollama"] + b"\n"),
    ],
    "anthropic": [
        named("content_block_delta", delta={"text": "event: message_stop\n\n"}),
        b"data: event: message_stop\n\n",
        b": event: message_stop\n\n",
        b"xevent: message_stop\n\n",
        b'data: {"type":"message_stop"}\n\n',
        b"event: message_stopped\ndata: {}\n\n",
        b"event: message_sto\ndata: {}\n\n",
        named("content_block_stop", index=0),
        *(END["openai"], END["responses"], END["ollama"] + b"\n"),
    ],
    "ollama": [
        content('"done":true', done=False),
        content("x", done=False, other={"done": True}),
        content("x", done=None),
        content("x", done=1),
        content("x", done="true"),
        content("x", done=False, tool_calls=[{"arguments": {"done": True}}]),
        b'["done":true]\n',
        b'"done":true\n',
        b'[{"done":true}]\n',
        b'{"done":true\n}\n',
        b'data: {"done":true}\n',
        b'{"done":true}x\n',
        *(END["openai"], END["responses"], END["anthropic"]),
    ],
}


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, lines in LOOKALIKES.items() for line in lines],
    ids=lambda part: ascii(part)[2:50] if isinstance(part, bytes) else part,
)
def test_what_only_looks_like_the_end_is_none(name, line):
    dialect = DIALECTS[name]
    for pieces in cuts(line) if len(line) < 1000 else [[line], [line[:70_000], line[70_000:]]]:
        if b"}x" in line and any(b"".join(pieces[:n])[-1:] == b"}" for n in range(len(pieces))):
            continue  # it was complete, as far as anybody could tell
        shown, _, failure = watched(pieces, dialect)
        assert failure, pieces
        assert shown == line
        assert watched([*pieces, END[name]], dialect)[::2] == (line + END[name], None)


ENDS = {
    "openai": [
        b"data: [DONE]",
        b"data:[DONE]\n\n",
        b"data: [DONE]\r\n\r\n",
        b"data: [DONE]\n\n: x\n\n",
    ],
    "responses": [
        *(named(f"response.{word}", response={}) for word in ("completed", "incomplete")),
        b"event:response.completed\ndata: {}\n\n",
        b'event: response.completed\r\ndata: {"type":"response.completed"}\r\n\r\n',
        named("response.completed", response={}) + DONE,
    ],
    "anthropic": [
        b'event:message_stop\ndata: {"type":"message_stop"}\n\n',
        b'event: message_stop\r\ndata: {"type":"message_stop"}\r\n\r\n',
        named("message_stop") + named("ping"),
    ],
    "ollama": [
        b'{"done":true}',
        b'{"done":true}\n',
        b'{"done": true}\r\n',
        b' {"done" : true , "x":"}"} \n',
        b'  {"a":{"done":false},"done":true}\n\n',
        b'{"message":{"content":"\\"done\\":false"},"done":true}\n',
    ],
}


@pytest.mark.parametrize(
    ("name", "end"),
    [(name, end) for name, ends in ENDS.items() for end in ends],
    ids=lambda part: ascii(part)[2:50] if isinstance(part, bytes) else part,
)
def test_ends_as_runners_write_them(name, end):
    for start in (b"", PIECE[name], PIECE[name].replace(b"\n", b"\r\n")):
        for pieces in cuts(start + end, most=10):
            shown, watch, failure = watched(pieces, DIALECTS[name])
            assert (shown, failure) == (start + end, None), pieces
            assert watch.ended == end


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("openai", b'data: {"error":"out of memory"}\n\n'),
        ("openai", b'data:{"error":{"message":"out of memory"}}\r\n\r\n'),
        ("openai", b'event: error\ndata: {"error":{"message":"out of memory"}}\n\n'),
        # llama.cpp has written this
        ("openai", b'error: {"code":500,"message":"out of memory","type":"server_error"}\n\n'),
        ("responses", b'data: {"error":{"message":"out of memory"}}\n\n'),
        ("responses", b'event: error\ndata: {"type":"error","message":"out of memory"}\n\n'),
        ("responses", named("response.failed", response={"error": {"message": "out of memory"}})),
        ("anthropic", b'data: {"type":"error","error":{"message":"out of memory"}}\n\n'),
        ("anthropic", b'event: error\r\ndata: {"error":"out of memory"}\r\n\r\n'),
        ("ollama", b'{"error": "out of memory"}\r\n'),
        ("ollama", b' {"error":{"message":"out of memory"},"done":false}\n'),
    ],
    ids=lambda part: ascii(part)[2:50] if isinstance(part, bytes) else part,
)
def test_error_is_known_however_it_is_written(name, event):
    for before in (b"", PIECE[name]):
        for after in (b"", PIECE[name], END[name]):
            for pieces in cuts(before + event + after, most=10):
                shown, _, failure = watched(pieces, DIALECTS[name])
                assert failure == "out of memory", pieces
                assert END[name] not in shown


def test_error_without_words_is_an_error():
    for name, line in (
        ("openai", b'data: {"error":{"code":500}}\n\n'),
        ("openai", b'data: {"error":true}\n\n'),
        ("anthropic", b'event: error\ndata: {"type":"error"}\n\n'),
        ("responses", named("response.failed", response={"error": None})),
        ("responses", named("response.failed", response=None)),
        ("ollama", b'{"error":[1]}\n'),
    ):
        failure = watched([line, END[name]], DIALECTS[name])[2]
        assert failure == "the backend's answer broke off with an error"


@each_name
def test_pieces_before_an_error_are_shown_however_they_arrive(name):
    before = PIECE[name] * 3
    shown = {watched(pieces, DIALECTS[name])[0] for pieces in cuts(before + FAILED[name])}
    assert shown == {before}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("openai", b'data: {"error":null,"choices":[]}\n\n'),
        ("openai", b'data: {"choices":[{"delta":{"content":"\\"error\\""}}]}\n\n'),
        ("openai", b'data: {"choices":[{"delta":{"error":"x"}}]}\n\n'),
        ("openai", b'data: ["error"]\n\n'),
        ("openai", b'data: "error"\n\n'),
        ("openai", b'data: {"error":\n\n'),
        ("openai", b': {"error":{"message":"x"}}\n\n'),
        ("openai", b'id: {"error":1}\n\n'),
        ("openai", b'data: {"usage":{"completion_tokens":' + b"9" * 9999 + b"}}\n\n"),
        ("openai", b'data: {"usage":' + b"[" * 50_000 + b"\n\n"),
        ("openai", b'data: {"usage":"\xff"}\n\n'),
        ("openai", b'data: {"usage":null,"timings":7}\n\n'),
        ("responses", named("response.created", response={"error": None, "usage": None})),
        ("responses", named("response.output_text.delta", delta='{"type":"error","error":"x"}')),
        ("anthropic", named("content_block_delta", delta={"text": '"type":"error"'})),
        ("anthropic", named("content_block_start", content_block={"type": "error", "error": 1})),
        ("ollama", content('{"error":"x"}', done=False)),
        ("ollama", content("x", done=False, error="")),
        ("ollama", content("x", done=False, tool_calls=[{"error": "x"}])),
        ("ollama", b'{"error":\n'),
        ("ollama", b'["error"]\n'),
    ],
    ids=lambda part: ascii(part)[2:50] if isinstance(part, bytes) else part,
)
def test_what_only_looks_like_an_error_passes(name, line):
    data = line + END[name]
    for pieces in cuts(data) if len(data) < 400 else [[data], [line, END[name]]]:
        assert watched(pieces, DIALECTS[name])[::2] == (data, None)


# ---- Streams: recorded ones ----------------------------------------------------------------------

STREAMS = sorted(RECORDINGS.glob("*-stream*.response.txt"))
each_stream = pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.name[:-13])


def dialect_and_end(path, data):
    """The dialect of a recorded stream, and where its end begins."""
    if b"application/x-ndjson" in path.read_bytes():
        return OLLAMA, data.rindex(b"\n", 0, -1) + 1
    return OPENAI, data.index(DONE)


def test_streams_of_both_kinds_are_recorded():
    kinds = {dialect_and_end(path, stream_of(path)[0])[0] for path in STREAMS}
    assert kinds == {OPENAI, OLLAMA}


@pytest.mark.untraced
@each_stream
def test_recorded_stream_is_shown_as_it_came_however_it_is_cut(path):
    data, complete = stream_of(path)
    dialect, edge = dialect_and_end(path, data)
    assert complete is ("interrupted" not in path.name)
    assert dialect.find_end(data) == edge
    tokens = watched([data], dialect)[1].tokens
    for pieces in cuts(data):
        shown, watch, failure = watched(pieces, dialect)
        assert (shown, failure, watch.tokens) == (data, None, tokens)


@each_stream
def test_end_of_a_recorded_stream_is_found_at_every_cut_and_only_there(path):
    data, _ = stream_of(path)
    dialect, edge = dialect_and_end(path, data)
    mark = len(b"data: [DONE]") if dialect is OPENAI else len(data[edge:].rstrip())
    for at in range(len(data) + 1):
        assert dialect.find_end(data[:at]) == (edge if at >= edge + mark else -1), at


@pytest.mark.untraced
@each_stream
def test_end_is_kept_back_and_only_whole_lines_are_shown(path):
    data, _ = stream_of(path)
    dialect, edge = dialect_and_end(path, data)
    for pieces in cuts(data, most=20):
        watch, shown = StreamWatch(dialect), b""
        for piece in pieces:
            shown += watch.feed(piece)
            assert len(shown) <= edge
            assert shown == b"" or shown.endswith(b"\n")
        assert shown == data[:edge]
        assert watch.finish() == data[edge:]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama-server.chat-stream-usage", 4),
        ("ollama.chat-stream-usage", 4),
        ("vllm.chat-stream-usage", 4),
        ("llama-cpp-python.chat-stream-usage", None),
        ("ollama.api-chat-stream", 6),
        ("ollama.api-generate-stream", 4),
    ],
)
def test_recorded_usage_is_read_as_it_passes(name, tokens):
    path = RECORDINGS / f"{name}.response.txt"
    data, _ = stream_of(path)
    assert watched([data], dialect_and_end(path, data)[0])[1].tokens == tokens


# ---- Streams: long lines -------------------------------------------------------------------------


def long_line(name, size):
    start, end = (b'{"x":"', b'"}\n') if name == "ollama" else (b'data: "', b'"\n\n')
    return start + b"x" * size + end


@pytest.mark.untraced
@pytest.mark.parametrize("size", [60_000, 65_530, 65_536, 65_600, 200_000, 3_000_000])
@pytest.mark.parametrize("name", ["openai", "responses", "anthropic"])
def test_long_line_passes_with_bounded_memory_and_its_end_is_found(name, size):
    data = long_line(name, size)
    for step in (1000, 65_536, 100_000, len(data)):
        pieces = [data[at : at + step] for at in range(0, len(data), step)]
        watch, given, shown = StreamWatch(DIALECTS[name]), 0, b""
        for piece in pieces:
            given += len(piece)
            shown += watch.feed(piece)
            assert given - len(shown) <= 64 * 1024 + step, "held back"
        assert shown == data
        assert not watch.inside
        assert watch.feed(END[name]) == b""
        assert watch.finish() == END[name]


@pytest.mark.deadline(30)
def test_long_line_of_ollama_passes_and_only_one_that_nobody_could_parse_in_parts(monkeypatch):
    monkeypatch.setattr(llmq.Ollama, "line_limit", 300_000)
    for size, whole in ((200_000, True), (299_000, True), (900_000, False), (2_000_000, False)):
        data = long_line("ollama", size)
        for step in (65_536, 100_000):
            pieces = [data[at : at + step] for at in range(0, len(data), step)]
            watch, given, shown = StreamWatch(OLLAMA), 0, []
            for piece in pieces:
                given += len(piece)
                shown.append(watch.feed(piece))
                assert given - sum(map(len, shown)) <= 300_000 + step, "held back"
            assert b"".join(shown) == data
            assert (len([one for one in shown if one]) == 1) is whole
            assert watch.feed(END["ollama"]) == b""
            assert watch.finish() == END["ollama"]


@pytest.mark.parametrize(
    ("start", "take"),
    [
        (b"", lambda: StreamWatch(OLLAMA).feed),
        (named("response.completed").rstrip(), lambda: StreamWatch(RESPONSES).feed),
        (b"", lambda: llmq.ChatToOllama({}, "m", 0, float).feed),
    ],
    ids=["held", "behind the end", "translated"],
)
def test_long_line_in_many_pieces_takes_time_that_grows_with_its_size(start, take):
    def spent(size):
        piece, times = b"x" * 500, []
        for _ in range(3):
            feed, began = take(), time.thread_time()
            feed(start)
            for _ in range(size // len(piece)):
                feed(piece)
            times.append(time.thread_time() - began)
        return min(times)

    # 27 times was seen: the longer one has its memory mapped anew.
    assert spent(6_400_000) < 40 * spent(800_000), "8 times as long; 64 times would be quadratic"


@each_name
def test_last_line_needs_no_break_behind_it(name):
    data = GOOD[name].rstrip()
    for pieces in cuts(data):
        assert watched(pieces, DIALECTS[name])[::2] == (data, None), pieces


def test_a_line_of_ollama_may_be_some_megabytes_long():
    assert llmq.PARSED_LINE == OLLAMA.line_limit == 8 * 2**20


@each_name
def test_end_inside_a_line_that_passes_in_pieces_is_none(name, monkeypatch):
    monkeypatch.setattr(llmq.Ollama, "line_limit", 65_536)
    inner = b'"done":true}' if name == "ollama" else END[name].strip().split(b"\n")[0]
    pieces = [b"data: " + b"x" * 70_000, inner + b"\n\n", END[name]]
    watch = StreamWatch(DIALECTS[name])
    shown = [watch.feed(piece) for piece in pieces]
    assert shown == [pieces[0], pieces[1], b""]
    assert watch.finish() == pieces[2]


@pytest.mark.parametrize("name", ["openai", "responses", "anthropic"])
@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"], ids=ascii)
def test_end_is_found_behind_a_long_event_however_the_break_between_them_is_cut(name, ending):
    event = b"data: " + b"x" * 70_000 + ending
    for first in range(len(event) - 5, len(event) + 1):
        for second in range(first, len(event) + 1):
            pieces = [event[:first], event[first:second], event[second:], END[name]]
            shown, _, failure = watched(filter(None, pieces), DIALECTS[name])
            assert (shown, failure) == (event + END[name], None), (first, second)


@pytest.mark.parametrize("size", [60_000, 70_000, 700_000])
def test_last_event_of_a_response_holds_all_of_it_and_may_be_large(size):
    last = named("response.completed", response={"output": "x" * size})
    for step in (1000, 65_536):
        pieces = [last[at : at + step] for at in range(0, len(last), step)]
        assert watched([PIECE["responses"], *pieces], RESPONSES)[::2] == (
            PIECE["responses"] + last,
            None,
        )


def test_error_after_half_a_line_stands_on_a_line_of_its_own():
    watch = StreamWatch(OPENAI)
    shown = watch.feed(b"data: " + b"x" * 100_000)
    assert watch.inside
    event = OPENAI.render_stream_error(BackendError("x"), "", watch.inside)
    assert b"\n\ndata: {" in shown + event


@each_name
def test_what_a_backend_sends_behind_the_end_is_bounded(name):
    watch, many = StreamWatch(DIALECTS[name]), PIECE[name] * 10_000
    watch.feed(PIECE[name] + END[name])

    def send_on():
        for _ in range(32 * 2**20 // len(many)):
            assert watch.feed(many) == b""

    with pytest.raises(BackendError, match="sends on"):
        send_on()
    assert len(watch.ended) <= 9 * 2**20 + len(many)


# ---- Counting ------------------------------------------------------------------------------------


def said(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({}, 1),
        ({"messages": []}, 1),
        ({"messages": [{"content": "x" * 400}]}, 100),
        ({"messages": [{"content": [{"type": "text", "text": "x" * 396}]}]}, 100),
        ({"messages": [{"content": "日" * 400}]}, 300),
        ({"messages": [{"content": "\ud800" * 400}]}, 100),
        ({"prompt": "x" * 396, "suffix": "x" * 4, "images": ["x" * 4000]}, 100),
        ({"system": "x" * 400}, 100),
        ({"system": [{"text": "x" * 400}]}, 100),
        ({"tools": [{"input_schema": {"a": {"b": [["x" * 400]]}}}]}, 100),
        ({"system": "x" * 400, "messages": [{"content": "x" * 400}], "tools": ["x" * 400]}, 300),
        ({"messages": [{"content": [{"source": {"data": "x" * 4000}, "text": "x" * 40}]}]}, 10),
        ({"messages": [{"content": [7, None, True, 1.5, {"text": "x" * 40}]}]}, 10),
        ({"metadata": {"user_id": "x" * 400}, "model": "x" * 400}, 1),
    ],
)
def test_estimate_is_a_quarter_of_the_bytes_of_all_that_is_text(values, tokens):
    assert estimate_tokens(values) == tokens


def test_estimate_of_what_nests_as_deep_as_may_be_is_no_crash():
    value = "x" * 40
    for _ in range(llmq.DEPTH_LIMIT):
        value = [value]
    assert estimate_tokens({"messages": value}) == 10
