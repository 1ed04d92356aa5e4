"""What bodies mean: byte for byte where llmq has no say, refused where a doubt is left."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

import llmq
from llmq import (
    BackendAnswer,
    BackendError,
    BackendLoading,
    BadRequest,
    ChunkedBody,
    LlmqError,
    Priority,
    ResponseHead,
    StreamWatch,
    body_decoder,
    cut_members,
    error_object,
    locate_members,
    parse_response_head,
    read_chat,
    read_error,
    read_refusal,
    read_usage,
    read_whole,
    render_error,
    render_stream_error,
    response_length,
)

RECORDINGS = Path(__file__).parent / "real" / "recordings"
MESSAGES = '"messages":[{"role":"user","content":"hi"}]'
RUNS = 400  # documents of a property test

# ---- Documents made up of known pieces -----------------------------------------------------------

CHARS = [
    '"',
    "\\",
    "/",
    "\n",
    "\t",
    "\0",
    "\x7f",
    "é",
    "日",
    "\u2028",
    "🦙",
    "{",
    "]",
    ",",
    ":",
    "a",
]
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "/": "\\/"}
NUMBERS = [
    "0",
    "-0",
    "1",
    "-12",
    "1.5",
    "1e9",
    "1E-7",
    "-0.0e+0",
    "1e999",
    "9" * 40,
    "0.1" + "0" * 30,
]


def white(chance):
    return "".join(chance.choices(" \t\n\r", k=chance.choice([0, 0, 0, 1, 2, 5])))


def string(chance, value=None):
    """A string as some other program might have written it."""
    if value is None:
        value = "".join(chance.choices(CHARS, k=chance.choice([0, 1, 3, 12])))
    if chance.random() < 0.05:
        return '"\\ud83e"'  # half a pair, which JSON allows and Unicode does not
    text = ""
    for char in value:
        code = f"{ord(char):04x}" if ord(char) < 0x10000 else ""
        if code and (chance.random() < 0.2 or (char < " " and char not in ESCAPES)):
            text += "\\u" + chance.choice([code, code.upper()])
        else:
            text += ESCAPES[char] if char in '"\\\n\t' else char
    return f'"{text}"'


def value(chance, depth=0):
    kind = chance.randrange(5 if depth > 3 else 8)
    if kind == 0:
        return chance.choice(["true", "false", "null"])
    if kind in (1, 2):
        return chance.choice(NUMBERS)
    if kind in (3, 4):
        return string(chance)
    if kind == 5:
        return chance.choice(
            ["[]", "{}", "[ ]", "{\n}", "[[],{}]", '{"a":1,"a":2}', '{"model":"x"}']
        )
    inner = []
    for _ in range(chance.randrange(4)):
        name = string(chance, chance.choice(["model", "priority", "a", ""])) + white(chance) + ":"
        inner.append(white(chance) + (name if kind == 6 else "") + value(chance, depth + 1))
    opening, closing = "{}" if kind == 6 else "[]"
    return opening + ",".join(inner) + white(chance) + closing


class Document:
    """A JSON object and, for each of its members, its name and its text."""

    def __init__(self, chance, members):
        self.names = [name for name, _ in members]
        self.members, self.gaps = [], []
        for name, text in members:
            written = '"' + name + '"' if name in llmq.EXTENSIONS else string(chance, name)
            if json.loads(written) != name:
                written = json.dumps(name)
            self.members.append(written + white(chance) + ":" + white(chance) + text)
            self.gaps.append(white(chance) + "," + white(chance))
        self.start = white(chance) + "{" + white(chance)
        self.end = white(chance) + "}" + white(chance)

    @property
    def text(self):
        return self.start + self.joined(range(len(self.members))) + self.end

    def joined(self, places):
        """These members with the gaps that followed them, but for the last."""
        places = list(places)
        text = "".join(self.members[place] + self.gaps[place] for place in places[:-1])
        return text + (self.members[places[-1]] if places else "")

    def without(self, names):
        kept = [place for place, name in enumerate(self.names) if name not in names]
        return self.start + self.joined(kept) + self.end


def strict(text):
    """What the text means to json.loads, which llmq does not use to cut it."""
    return json.loads(text, parse_constant=llmq.refuse_constant)


def documents(seed, *fixed):
    """Objects with members of all kinds, and these among them, at any place."""
    chance = random.Random(seed)
    for _ in range(RUNS):
        others = [f"{chance.choice(CHARS)}{number}" for number in range(chance.randrange(5))]
        members = [(name, value(chance)) for name in others]
        for name, texts in fixed:
            if texts:
                members.insert(chance.randint(0, len(members)), (name, chance.choice(texts)))
        yield Document(chance, members), chance


def test_members_are_located_with_their_meaning_and_their_place():
    for document, _ in documents(1, ("model", ['"m"', "null", "[1]"])):
        text = document.text
        members = locate_members(text)
        assert {m.name: m.value for m in members} == strict(text)
        assert [text[m.start : m.end] for m in members] == document.members
        for member in members:
            alone = strict("[" + text[member.value_start : member.end] + "]")
            assert alone == [member.value]


def test_cut_changes_nothing_but_what_is_cut():
    fields = [(name, ['"high"', "7", '{"x":[1,"}"]}', "[]"]) for name in llmq.EXTENSIONS]
    for document, chance in documents(2, *fields):
        names = chance.choice(
            [llmq.EXTENSIONS, llmq.EXTENSIONS[:1], ("none",), tuple(document.names)]
        )
        left = cut_members(document.text, locate_members(document.text), names)
        assert left == document.without(names)
        kept = {key: val for key, val in strict(document.text).items() if key not in names}
        assert strict(left) == kept


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"priority":1,"a":2,"b":3}', '{"a":2,"b":3}'),
        ('{"a":2,"priority":1,"b":3}', '{"a":2,"b":3}'),
        ('{"a":2,"b":3,"priority":1}', '{"a":2,"b":3}'),
        ('{"priority":1}', "{}"),
        ('{"priority":1,"numCtx":2}', "{}"),
        ('{"priority":1,"numCtx":2,"a":3}', '{"a":3}'),
        ('{"a":3,"priority":1,"numCtx":2}', '{"a":3}'),
        ('{"a":3,"priority":1,"numCtx":2,"b":4}', '{"a":3,"b":4}'),
        ('{"priority":1,"a":3,"numCtx":2}', '{"a":3}'),
        ('{"numCtx":1,"a":3,"priority":2,"b":4}', '{"a":3,"b":4}'),
        (' { "priority" : 1 , "a" : 2 } ', ' { "a" : 2 } '),
        (' { "a" : 2 , "priority" : 1 } ', ' { "a" : 2 } '),
        ('{"a":{"priority":1},"x":"priority"}', '{"a":{"priority":1},"x":"priority"}'),
        ('{"\\u0070riority":1,"a":2}', '{"a":2}'),
        ("{}", "{}"),
        ('{"Priority":1}', '{"Priority":1}'),
    ],
)
def test_own_fields_are_cut_wherever_they_stand(text, left):
    assert cut_members(text, locate_members(text), llmq.EXTENSIONS) == left


def test_chat_reaches_the_backend_as_it_came_but_for_own_fields_and_the_models_name():
    models = ['"m"', '"\\u006d"', '"日本"', '""', "null", '" "']
    chats = documents(
        3,
        ("messages", ['[{"role":"user","content":"hi 🦙"}]']),
        ("model", models),
        ("priority", ['"high"', "true", "null"]),
        ("numCtx", ["4096", "null"]),
    )
    for document, chance in chats:
        if chance.random() < 0.3:  # without one of them
            lost = document.names.index(chance.choice(["model", *llmq.EXTENSIONS]))
            for table in (document.names, document.members, document.gaps):
                del table[lost]
        question = read_chat(document.text.encode())
        left = document.without(llmq.EXTENSIONS)
        assert question.body.decode() == left
        assert question.body_for(question.model) == question.body
        named = question.body_for('other "name" é')
        meant = {**strict(left), "model": 'other "name" é'}
        assert strict(named) == meant
        if "model" in document.names:
            member = next(m for m in locate_members(left) if m.name == "model")
            new = json.dumps('other "name" é')
            assert named.decode() == left[: member.value_start] + new + left[member.end :]
        else:
            new = '"model":' + json.dumps('other "name" é') + ","
            assert named.decode() == document.start + new + left[len(document.start) :]


def test_chat_that_needs_no_change_is_passed_on_as_the_same_bytes():
    for document, _ in documents(4, ("messages", ["[{}]"]), ("model", ['"m"', '"\\u006d"'])):
        body = document.text.encode()
        assert read_chat(body).body_for("m") == body


@pytest.mark.parametrize("keys", [20_000, 200_000])
@pytest.mark.deadline(30)
def test_many_keys_are_read_and_cut_in_time_that_grows_with_their_number(keys):
    """All clients wait while one body is read: the bound is far above what one pass takes."""
    many = ",".join(f'"{number}":0' for number in range(keys))
    body = f'{{{many},"priority":"high",{MESSAGES}}}'.encode()
    start = time.process_time()
    question = read_chat(body)
    spent = time.process_time() - start
    assert question.body == f"{{{many},{MESSAGES}}}".encode()
    assert spent < keys * 50e-6, f"{spent:.1f} s for {keys} keys"


# ---- Documents that are refused ------------------------------------------------------------------


def nested(depth, pair="[]"):
    opening, closing = ('{"a":', "}") if pair == "{}" else pair
    return '{"x":' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}"


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_hundred_levels_are_taken_and_one_more_is_not(pair):
    assert locate_members(nested(100, pair))[0].name == "x"
    with pytest.raises(BadRequest, match="nests"):
        locate_members(nested(101, pair))
    wide = nested(2, pair)[:-1] + "," + ",".join(f'"{n}":[[],{{}}]' for n in range(500)) + "}"
    assert len(locate_members(wide)) == 501
    assert locate_members('{"x":"' + "[{" * 1000 + '"}')


@pytest.mark.parametrize("depth", [101, 1_000, 3_000, 100_000, 1_000_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting_is_refused_and_never_a_crash(depth, pair, closed):
    text = nested(depth, pair)
    with pytest.raises(BadRequest):
        locate_members(text if closed else text[: len(text) // 2])


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}',
        '{"a":1,"b":2,"a":3}',
        '{"a":1,"\\u0061":2}',
        '{"":1,"":2}',
        '{"\\ud83e\\udd99":1,"🦙":2}',
        '{"priority":1,"priority":1}',
    ],
)
def test_same_key_twice_is_refused(text):
    with pytest.raises(BadRequest, match="twice"):
        locate_members(text)


BROKEN = [
    "",
    " ",
    "{",
    "}",
    "null",
    "1",
    '"a"',
    "[]",
    "[{}]",
    "{}{}",
    "{}x",
    "{},",
    "{,}",
    '{"a"}',
    '{"a":}',
    '{"a":1,}',
    '{"a":1,,"b":2}',
    '{"a":1 "b":2}',
    '{"a"=1}',
    '{"a":1',
    '{"a":1,',
    '{"a',
    '{"a\\',
    '{"a":"',
    "{a:1}",
    "{'a':1}",
    '{1:"a"}',
    '{"a":01}',
    '{"a":+1}',
    '{"a":.5}',
    '{"a":1.}',
    '{"a":-}',
    '{"a":1e}',
    '{"a":0x1}',
    '{"a":1_0}',
    '{"a":TRUE}',
    '{"a":tru}',
    '{"a":undefined}',
    '{"a":NaN}',
    '{"a":Infinity}',
    '{"a":-Infinity}',
    '{"a":{"b":[NaN]}}',
    '{"a":' + "9" * 10_000 + "}",
    '{"a":"\n"}',
    '{"a":"\t"}',
    '{"a":"\0"}',
    '{"a\x1f":1}',
    '{"a":["\r"]}',
    '{"a":"\\x"}',
    '{"a":"\\u12"}',
    '{"a":"\\u12g4"}',
    '{"a":[1,]}',
    '{"a":{"b":1,}}',
    '\xa0{"a":1}',
    '{"a":\x0c1}',
    '{"a":1}\0',
    '{"a":1}//',
    '/**/{"a":1}',
    '\ufeff{"a":1}',
    '{"a":1\u2028}',
]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: ascii(text)[1:40] or "none")
def test_what_is_no_json_object_is_refused_with_a_reason(text):
    with pytest.raises(BadRequest) as caught:
        locate_members(text)
    assert caught.value.message.startswith("the body is not JSON: ")
    assert len(caught.value.message) < 200
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"\xff"}',
        b'{"a":"\xc3"}',
        b'{"a":"\xc0\xaf"}',  # overlong
        b'{"a":"\xed\xa0\x80"}',  # a surrogate
        b'{"a":"\xf4\x90\x80\x80"}',  # beyond Unicode
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-32"),
        b"\xef\xbb\xbf" + b'{"a":1}',
        b"\x1f\x8b\x08\x00",
        b"\0",
    ],
    ids=ascii,
)
def test_what_is_not_utf_8_is_refused(body):
    with pytest.raises(BadRequest):
        read_chat(body)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1e999}',
        '{"a":-1e999}',
        '{"a":"\\ud800"}',
        '{"\\udc00":1}',
        '{"a":"\\u0000"}',
        '{"":0}',
    ],
)
def test_what_json_allows_is_left_to_the_backend(text):
    assert len(locate_members(text)) == 1
    question = read_chat((text[:-1] + "," + MESSAGES + "}").encode())
    assert question.body.decode() == text[:-1] + "," + MESSAGES + "}"


# ---- Chats ---------------------------------------------------------------------------------------


def chat(members="", messages=MESSAGES):
    return ("{" + ",".join(part for part in (members, messages) if part) + "}").encode()


def test_bare_chat_has_the_defaults():
    question = read_chat(chat())
    assert question.model == ""
    assert question.stream is False
    assert question.priority is Priority.NORMAL
    assert question.body == chat()


@pytest.mark.parametrize(
    ("members", "model", "stream"),
    [
        ('"model":"m"', "m", False),
        ('"model":"m","stream":true', "m", True),
        ('"model":" m "', " m ", False),
        ('"model":"","stream":false', "", False),
        ('"model":"  "', "", False),
        ('"model":null,"stream":null', "", False),
        ('"model":"' + "m" * 512 + '"', "m" * 512, False),
        ('"model":"a\\r\\nX: y\\ud800"', "a\r\nX: y\ud800", False),
    ],
)
def test_chat_names_a_model_and_whether_it_streams(members, model, stream):
    question = read_chat(chat(members))
    assert (question.model, question.stream) == (model, stream)
    assert json.loads(question.body_for("other"))["model"] == "other"


@pytest.mark.parametrize(
    ("members", "header", "expected"),
    [
        ('"priority":"high"', None, Priority.HIGH),
        ('"priority":true', "low", Priority.HIGH),
        ('"priority":"low"', "high", Priority.LOW),
        ('"priority":null', "low", Priority.LOW),
        ("", "high", Priority.HIGH),
        ('"service_tier":"flex"', None, Priority.LOW),
        ('"service_tier":"flex"', "normal", Priority.NORMAL),
    ],
)
def test_priority_is_read_and_the_field_is_cut(members, header, expected):
    question = read_chat(chat(members), header)
    assert question.priority is expected
    assert b'"priority"' not in question.body


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "messages"),
        (chat(messages='"messages":[]'), "messages"),
        (chat(messages='"messages":null'), "messages"),
        (chat(messages='"messages":{}'), "messages"),
        (chat(messages='"messages":"hi"'), "messages"),
        (chat(messages='"messages":["hi"]'), "messages"),
        (chat(messages='"messages":[{},null]'), "messages"),
        (chat('"model":1'), "model"),
        (chat('"model":true'), "model"),
        (chat('"model":{}'), "model"),
        (chat('"model":["m"]'), "model"),
        (chat('"model":"' + "m" * 513 + '"'), "model"),
        (chat('"stream":1'), "stream"),
        (chat('"stream":"true"'), "stream"),
        (chat('"stream":[]'), "stream"),
        (chat('"priority":1'), "priority"),
        (chat('"priority":"urgent"'), "priority"),
        (chat('"numCtx":0'), "numCtx"),
        (chat('"numCtx":-1'), "numCtx"),
        (chat('"numCtx":true'), "numCtx"),
        (chat('"numCtx":4096.0'), "numCtx"),
        (chat('"numCtx":1e999'), "numCtx"),
        (chat('"numCtx":"4096"'), "numCtx"),
    ],
    ids=lambda part: part[:40].decode() if isinstance(part, bytes) else part,
)
def test_bad_member_of_a_chat_is_named(body, param):
    with pytest.raises(BadRequest) as caught:
        read_chat(body)
    assert caught.value.param == param
    assert param in caught.value.message


# ---- Errors --------------------------------------------------------------------------------------


def all_errors(cls=LlmqError):
    return [cls, *(error for sub in cls.__subclasses__() for error in all_errors(sub))]


ERRORS = [error for error in all_errors() if error is not BackendAnswer]


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_is_an_error_object_that_openai_clients_know(cls):
    error = cls('no "x"\n', param="p")
    shown = json.loads(render_error(error))
    assert shown == {"error": error_object(error)}
    assert list(shown["error"]) == ["message", "type", "param", "code"]
    assert shown["error"]["message"] == 'no "x"\n'
    assert shown["error"]["param"] == "p"
    assert shown["error"]["code"] == cls.code
    assert len(render_error(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (403, "invalid_request_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (499, "invalid_request_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "api_error"),
        (504, "api_error"),
    ],
)
def test_type_of_an_error_follows_its_status(status, kind):
    assert error_object(BackendAnswer(status, "x", b"", None))["type"] == kind


def test_error_in_a_stream_is_one_event_and_no_end():
    event = render_stream_error(BackendError("a\n\ndata: [DONE]\n\n"), None)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    watch = StreamWatch()
    watch.feed(b"data: " + b"x" * 100_000)
    assert watch.inside
    assert render_stream_error(BackendError("x"), watch).startswith(b"\n\ndata: {")


def recorded(path):
    """Head and body of a recorded answer."""
    data = path.read_bytes()
    end = data.index(b"\r\n\r\n") + 4
    head = parse_response_head(data[:end])
    body = body_decoder(response_length(head))
    payload = body.feed(data[end:]) if not body.done else b""
    assert not body.surplus
    return head, payload


def recordings(pattern, only=lambda _status: True):
    found = [path for path in sorted(RECORDINGS.glob(pattern)) if only(recorded(path)[0].status)]
    assert found, pattern
    return pytest.mark.parametrize("path", found, ids=[path.name[:-13] for path in found])


def refused(status):
    """Some runners answer all the same what others refuse."""
    return status != 200


@recordings("*.err-*.response.txt", refused)
def test_recorded_error_is_understood_or_passed_on(path):
    head, body = recorded(path)
    message, passed = read_error(head.status, body)
    assert message
    try:
        document = json.loads(body)
    except ValueError:
        assert (message, passed) == (f"the backend answered {head.status}", b"")
        return
    if "error" in document:
        assert (message, passed) == (document["error"]["message"], body)
    else:
        assert (message, passed) == (document["detail"], b"")


@recordings("ollama.api-*-model.response.txt")
def test_recorded_error_that_is_only_a_text_is_put_into_an_error_object(path):
    head, body = recorded(path)
    message, passed = read_error(head.status, body)
    assert (message, passed) == ("model 'no-such-model' not found", b"")
    shown = json.loads(render_error(read_refusal(head, body)))["error"]
    assert (shown["message"], shown["type"]) == (message, "not_found_error")


@recordings("*.err-*.response.txt", refused)
def test_recorded_refusal_keeps_the_runners_words_and_status(path):
    head, body = recorded(path)
    refusal = read_refusal(head, body)
    if head.status == 403:
        assert (type(refusal), refusal.status) == (BackendError, 502)
        return
    assert (type(refusal), refusal.status) == (BackendAnswer, head.status)
    shown = json.loads(render_error(refusal))["error"]
    assert shown["message"] == read_error(head.status, body)[0]


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
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"error":"' + b"x" * 5000 + b'"}', "x" * 1000),
    ],
    ids=lambda part: ascii(part)[:40],
)
def test_whatever_a_backend_says_in_an_error_there_is_a_message(body, message):
    assert read_error(418, body) == (message or "the backend answered 418", b"")


@pytest.mark.parametrize(
    ("status", "body", "kind", "shown"),
    [
        (301, b"", BackendError, 502),
        (307, b'{"error":{"message":"x"}}', BackendError, 502),
        (401, b'{"error":"no"}', BackendError, 502),
        (403, b"", BackendError, 502),
        (400, b"", BackendAnswer, 400),
        (404, b"", BackendAnswer, 404),
        (429, b"", BackendAnswer, 429),
        (500, b"", BackendAnswer, 500),
        (503, b"", BackendAnswer, 503),
        (503, b'{"error":{"message":"Loading model","code":503}}', BackendLoading, 503),
    ],
)
def test_refusal_says_whose_fault_it_is(status, body, kind, shown):
    refusal = read_refusal(ResponseHead(status, 1, {"retry-after": "7"}), body)
    assert (type(refusal), refusal.status) == (kind, shown)
    if kind is BackendAnswer:
        assert refusal.retry_after == 7


@pytest.mark.parametrize(
    "value", ["", "-1", "soon", "1.5", "Sat, 21 Nov 2026 08:50:33 GMT", "\xb2"]
)
def test_retry_after_that_is_no_number_is_dropped(value):
    refusal = read_refusal(ResponseHead(429, 1, {"retry-after": value}), b"")
    assert refusal.retry_after is None


# ---- Whole answers -------------------------------------------------------------------------------


@recordings("*.chat*.response.txt")
def test_recorded_whole_answer_tells_its_tokens(path):
    head, body = recorded(path)
    if "event-stream" in head.headers["content-type"]:
        with pytest.raises(BackendError):
            read_whole(body)
    else:
        assert read_whole(body) == json.loads(body)["usage"]["completion_tokens"]


@recordings("*.err-*.response.txt", lambda status: status == 200)
def test_recorded_answer_to_a_bad_question_is_an_answer(path):
    _, body = recorded(path)
    assert read_whole(body) == json.loads(body)["usage"]["completion_tokens"]


@recordings("*.embeddings.response.txt", lambda status: status == 200)
def test_recorded_embeddings_are_whole_answers(path):
    assert read_whole(recorded(path)[1]) in (None, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"[]",
        b"null",
        b"7",
        b'{"choices":[',
        b'{"error":"x"}',
        b'{"error":{"message":"x"}}',
        b'{"error":{}, "error":7}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
        b'{"a":"\xff"}',
        b"x" * (llmq.PARSED_ANSWER + 1),
        b'{"a":"' + b"x" * llmq.PARSED_ANSWER,
    ],
    ids=lambda body: ascii(body)[:30],
)
def test_what_is_no_answer_is_never_passed_on_as_one(body):
    with pytest.raises(BackendError):
        read_whole(body)


def test_long_answer_is_checked_at_its_ends():
    assert read_whole(b' {"a":"' + b"x" * llmq.PARSED_ANSWER + b'"}\n') is None
    assert read_whole(b'{"error":null}') is None


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"usage": {"completion_tokens": 3}}, 3),
        ({"usage": {"completion_tokens": 0}}, 0),
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
    assert read_usage(document) == tokens


# ---- Streams -------------------------------------------------------------------------------------

STREAMS = sorted(RECORDINGS.glob("*-stream*.response.txt"))
STREAMS = [path for path in STREAMS if b"text/event-stream" in path.read_bytes()]
DONE = b"data: [DONE]\n\n"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
FAILED = b'data: {"error":{"message":"out of memory","code":500}}\n\n'


def stream_of(path):
    data = path.read_bytes()
    body = ChunkedBody()
    payload = body.feed(data[data.index(b"\r\n\r\n") + 4 :])
    return payload, body.done


def watched(pieces):
    """What is shown of a stream piece by piece, then at its end, and how it failed."""
    watch, shown = StreamWatch(), b""
    try:
        for piece in pieces:
            shown += watch.feed(piece)
        shown += watch.finish()
    except BackendError as error:
        return shown, watch, error.message
    return shown, watch, None


def cuts(data, seed=0, most=120):
    """All in one, byte by byte, cut once anywhere, and at random."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    chance = random.Random(seed)
    for _ in range(most):
        places = sorted(chance.sample(range(len(data)), min(len(data), chance.randint(2, 9))))
        edges = [0, *places, len(data)]
        yield [data[start:stop] for start, stop in zip(edges, edges[1:])]


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.name[:-13])
def test_recorded_stream_is_shown_as_it_came_however_it_is_cut(path):
    data, complete = stream_of(path)
    assert DONE in data
    assert complete is ("interrupted" not in path.name)
    tokens = watched([data])[1].tokens
    for pieces in cuts(data):
        shown, watch, failure = watched(pieces)
        assert (shown, failure, watch.tokens) == (data, None, tokens)


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.name[:-13])
def test_end_is_kept_back_and_only_whole_lines_are_shown(path):
    data, _ = stream_of(path)
    for pieces in cuts(data, most=20):
        watch, shown = StreamWatch(), b""
        for piece in pieces:
            shown += watch.feed(piece)
            assert b"[DONE]" not in shown
            assert shown == b"" or shown.endswith(b"\n")
        assert shown == data[: data.index(DONE)]
        assert watch.finish() == DONE


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama-server", 4), ("ollama", 4), ("vllm", 4), ("llama-cpp-python", None)],
)
def test_recorded_usage_is_read_as_it_passes(name, tokens):
    data, _ = stream_of(RECORDINGS / f"{name}.chat-stream-usage.response.txt")
    assert watched([data])[1].tokens == tokens


def test_stream_without_its_end_is_no_success():
    for data in (b"", EVENT, EVENT * 3, EVENT + b"data: [DONE", EVENT + b"data: [DONE] "[:11]):
        for pieces in cuts(data, most=10):
            shown, _, failure = watched(pieces)
            assert failure
            assert (EVENT * 3).startswith(shown)


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n"])
def test_ends_as_runners_write_them(end):
    for start in (b"", EVENT, b": comment\n\n", EVENT.replace(b"\n", b"\r\n")):
        for pieces in cuts(start + end, most=10):
            assert watched(pieces)[::2] == (start + end, None)


@pytest.mark.parametrize(
    "line",
    [
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
    ],
    ids=lambda line: ascii(line)[2:40],
)
def test_what_only_looks_like_the_end_is_none(line):
    for pieces in cuts(line) if len(line) < 1000 else [[line], [line[:70_000], line[70_000:]]]:
        shown, _, failure = watched(pieces)
        assert failure
        assert shown == line
        assert watched([*pieces, DONE])[::2] == (line + DONE, None)


@pytest.mark.parametrize(
    "event",
    [
        FAILED,
        b'data: {"error":"out of memory"}\n\n',
        b'data:{"error":{"message":"out of memory"}}\r\n\r\n',
        b'event: error\ndata: {"error":{"message":"out of memory"}}\n\n',
        b'error: {"code":500,"message":"out of memory","type":"server_error"}\n\n',  # llama.cpp
    ],
    ids=lambda event: ascii(event)[2:40],
)
def test_error_in_a_stream_is_never_taken_for_success(event):
    for before in (b"", EVENT):
        for after in (b"", EVENT, DONE, EVENT + DONE):
            for pieces in cuts(before + event + after, most=10):
                shown, _, failure = watched(pieces)
                assert failure is not None, pieces
                assert DONE not in shown
                if failure != "the backend's answer ended before it was complete":
                    assert "out of memory" in failure


def test_pieces_before_an_error_are_shown_however_they_arrive():
    data = EVENT * 3 + FAILED
    shown = {watched(pieces)[0] for pieces in cuts(data)}
    assert shown == {EVENT * 3}


@pytest.mark.parametrize(
    "line",
    [
        b'data: {"error":null,"choices":[]}\n\n',
        b'data: {"choices":[{"delta":{"content":"\\"error\\""}}]}\n\n',
        b'data: {"choices":[{"delta":{"error":"x"}}]}\n\n',
        b'data: ["error"]\n\n',
        b'data: "error"\n\n',
        b'data: {"error":\n\n',
        b': {"error":{"message":"x"}}\n\n',
        b'id: {"error":1}\n\n',
        b'data: {"usage":{"completion_tokens":' + b"9" * 9999 + b"}}\n\n",
        b'data: {"usage":' + b"[" * 50_000 + b"\n\n",
        b'data: {"usage":"\xff"}\n\n',
        b'data: {"usage":null,"timings":7}\n\n',
    ],
    ids=lambda line: ascii(line)[2:50],
)
def test_what_only_looks_like_an_error_passes(line):
    for pieces in cuts(line + DONE) if len(line) < 200 else [[line + DONE], [line, DONE]]:
        assert watched(pieces)[::2] == (line + DONE, None)


@pytest.mark.parametrize("size", [60_000, 65_530, 65_536, 65_600, 200_000, 3_000_000])
def test_long_line_passes_with_bounded_memory_and_its_end_is_found(size):
    data = b'data: "' + b"x" * size + b'"\n\n'
    for step in (1000, 65_536, 100_000, len(data)):
        pieces = [data[at : at + step] for at in range(0, len(data), step)]
        watch, given, shown = StreamWatch(), 0, b""
        for piece in pieces:
            given += len(piece)
            shown += watch.feed(piece)
            assert given - len(shown) <= 64 * 1024 + step, "held back"
        assert shown == data
        assert not watch.inside
        assert watch.feed(DONE) == b""
        assert watch.finish() == DONE


def test_end_inside_a_line_that_passes_in_pieces_is_none():
    pieces = [b"data: " + b"x" * 70_000, b"data: [DONE]\n", b"data: [DONE]\n\n"]
    watch = StreamWatch()
    shown = [watch.feed(piece) for piece in pieces]
    assert shown == [pieces[0], pieces[1], b""]
    assert watch.finish() == pieces[2]


def test_what_a_backend_sends_behind_the_end_is_bounded():
    watch, size = StreamWatch(), 0
    watch.feed(EVENT + DONE)
    try:
        for _ in range(256):
            assert watch.feed(EVENT * 1000) == b""
            size += len(EVENT) * 1000
        size = len(watch.finish())
    except BackendError:
        size = 0
    assert size <= 2 * 1024 * 1024


def test_events_are_counted():
    data = b": x\n\n" + EVENT * 3 + DONE
    for pieces in cuts(data, most=10):
        assert watched(pieces)[1].events == 3


def test_stream_documents_of_the_property_tests_are_json():
    """The generator itself: json.loads takes all that it makes, and it makes what is promised."""
    texts = [document.text for document, _ in documents(9)]
    assert all(isinstance(strict(text), dict) for text in texts)
    joined = "".join(texts)
    for wanted in ("\\u", "{}", "[]", "[ ]", "null", "1e999", '\\"', "🦙", "\r", '{"a":1,"a":2}'):
        assert wanted in joined
    assert re.search(r'"\s+:\s+', joined)
