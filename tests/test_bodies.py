"""What bodies mean: byte for byte where llmq has no say, refused where a doubt is left."""

from __future__ import annotations

import json
import re
import time

import pytest

import llmq
from llmq import (
    CHAT,
    ENDPOINTS,
    BadRequest,
    Priority,
    read_object,
    read_question,
    rewrite,
    with_num_ctx,
)
from tests.documents import documents, strict

RUNS = 120  # requests for each route in a property test
MESSAGES = '"messages":[{"role":"user","content":"hi"}]'


def read_chat(body, header=None):
    return read(CHAT, body, header)


def read(path, body, *given, **more):
    return read_question(body, ENDPOINTS[path], *given, **more)[0]


def sent(question):
    """What a backend gets that spells the model as the client does and shares no context."""
    return question.body_for(question.model)


def cut(text, names):
    return rewrite(read_object(text), {}, names)


# ---- Members -------------------------------------------------------------------------------------


def test_members_are_located_with_their_meaning_and_their_place():
    for document, _ in documents(1, ("model", ['"m"', "null", "[1]"])):
        text = document.text
        found = read_object(text)
        assert found.text == text
        assert found.values == strict(text)
        assert [text[start:end] for start, _, end in found.places.values()] == document.members
        assert list(found.places) == list(found.values)
        for name, (_, value_start, end) in found.places.items():
            alone = strict("[" + text[value_start:end] + "]")
            assert alone == [found.values[name]]


def test_cut_changes_nothing_but_what_is_cut():
    fields = [(name, ['"high"', "7", '{"x":[1,"}"]}', "[]"]) for name in llmq.EXTENSIONS]
    for document, chance in documents(2, *fields):
        names = chance.choice(
            [llmq.EXTENSIONS, llmq.EXTENSIONS[:1], ("none",), tuple(document.names)]
        )
        left = cut(document.text, names)
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
    assert cut(text, llmq.EXTENSIONS) == left


# ---- Places and changes --------------------------------------------------------------------------


def span_of_change(before, after):
    """Where two texts differ: the start, and the end in each of them."""
    shorter, start, same = min(len(before), len(after)), 0, 0
    while start < shorter and before[start] == after[start]:
        start += 1
    while same < shorter - start and before[-1 - same] == after[-1 - same]:
        same += 1
    return start, len(before) - same, len(after) - same


def rewritten(document, put, names):
    """What `rewrite` has to make of a document, made of its pieces."""
    for place, (name, member) in enumerate(zip(document.names, document.members)):
        if name in put:
            _, value_start, _ = read_object("{" + member + "}").places[name]
            document.members[place] = member[: value_start - 1] + put[name]
    fresh = [
        f"{json.dumps(name)}:{text}" for name, text in put.items() if name not in document.names
    ]
    kept = document.without(names)
    start = len(document.start) if document.names else document.start.index("{") + 1
    comma = "," if fresh and set(document.names) - set(names) else ""
    return kept[:start] + ",".join(fresh) + comma + kept[start:]


def test_rewriting_puts_and_cuts_what_it_is_told_in_any_order_and_nothing_else():
    fields = [(name, ['"high"', "7", '{"x":[1,"}"]}', ""]) for name in ("a", "é", "b", "c")]
    for document, chance in documents(10, *fields):
        names = [*document.names, "new", "neu é", 'q"']
        chance.shuffle(names)
        few, rest = names[: chance.randint(0, 4)], names[4:]
        put = {name: chance.choice(["1", '{"y":2}', '""', "null"]) for name in few}
        lost = tuple(rest[: chance.randint(0, len(rest))])
        text = document.text
        made = rewrite(read_object(text), put, lost)
        kept = {name: value for name, value in strict(text).items() if name not in lost}
        assert strict(made) == {**kept, **{name: strict(value) for name, value in put.items()}}
        assert made == rewritten(document, put, lost)


def test_what_is_put_is_json_in_ascii():
    named = read_chat(chat('"model":"m"')).body_for('é"\n\ud800')
    assert named == chat('"model":"\\u00e9\\"\\n\\ud800"')
    assert rewrite(read_object("{}"), {'é"\n': "7"}) == '{"\\u00e9\\"\\n":7}'


@pytest.mark.parametrize(
    ("text", "put"),
    [
        ("{}", '{"a":1}'),
        (" { } ", ' {"a":1 } '),
        ('{"b":2}', '{"a":1,"b":2}'),
        (' { "b" : 2 } ', ' { "a":1,"b" : 2 } '),
        ('{"b":2,"a":"x","c":3}', '{"b":2,"a":1,"c":3}'),
        ('{"\\u0061" :\n[{"a":2}] }', '{"\\u0061" :\n1 }'),
        ('{"é":"日","a":null}', '{"é":"日","a":1}'),
        ('{"é":{"a":5}}', '{"a":1,"é":{"a":5}}'),
    ],
)
def test_member_is_replaced_where_it_stands_or_put_first(text, put):
    assert rewrite(read_object(text), {"a": "1"}) == put


@pytest.mark.parametrize(
    ("text", "put"),
    [
        ("{}", '{"options":{"num_ctx":1}}'),
        ('{"m":2}', '{"options":{"num_ctx":1},"m":2}'),
        ('{"m":2,"options":null}', '{"m":2,"options":{"num_ctx":1}}'),
        ('{"options":{},"m":2}', '{"options":{"num_ctx":1},"m":2}'),
        ('{"options": { } }', '{"options": {"num_ctx":1 } }'),
        ('{"options":{"é":"}"}}', '{"options":{"num_ctx":1,"é":"}"}}'),
        (
            '{"é":0,"options":{"a":{"num_ctx":7}}}',
            '{"é":0,"options":{"num_ctx":1,"a":{"num_ctx":7}}}',
        ),
        ('{"options":{"a":1,"num_ctx" : 512 }}', '{"options":{"a":1,"num_ctx" : 1 }}'),
        ('{"options":{"num_ctx":null},"m":2}', '{"options":{"num_ctx":1},"m":2}'),
        ('{"options":{"\\u006eum_ctx":9}}', '{"options":{"\\u006eum_ctx":1}}'),
        ('{"num_ctx":3,"options":{}}', '{"num_ctx":3,"options":{"num_ctx":1}}'),
    ],
)
def test_context_is_put_into_the_options_wherever_they_are(text, put):
    question = read("/api/generate", text.encode())
    assert question.body_for("", 1).decode() == put


@pytest.mark.parametrize(
    ("options", "tokens", "made"),
    [
        ("", 5, '{"num_ctx":5}'),
        ("null", 5, '{"num_ctx":5}'),
        ("null", 0, "null"),
        ("{ }", 0, "{ }"),
        ('{"seed":1}', 0, '{"seed":1}'),
        ('{"num_ctx":7}', 0, "{}"),
        ('{"num_ctx":7 , "seed" : 1 }', 0, '{"seed" : 1 }'),
        ('{"seed":1, "\\u006eum_ctx":7 }', 0, '{"seed":1 }'),
        ('{"seed":1, "num_ctx" : null }', 5, '{"seed":1, "num_ctx" : 5 }'),
    ],
)
def test_options_get_the_context_or_lose_it_and_keep_all_else(options, tokens, made):
    assert with_num_ctx(options, tokens) == made


# ---- Requests for every inference route ----------------------------------------------------------

LEAST = {  # the least that each route takes, but for the model
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": '"prompt":"hi"',
    "/v1/embeddings": '"input":["hi"]',
    "/v1/responses": '"input":"hi"',
    "/v1/rerank": '"query":"q","documents":["a"]',
    "/v1/messages": MESSAGES,
    "/api/chat": MESSAGES,
    "/api/generate": '"prompt":"hi"',
    "/api/embed": '"input":"hi"',
    "/api/embeddings": '"prompt":"hi"',
}
CARRIERS = [path for path, endpoint in ENDPOINTS.items() if endpoint.options]
FORMS = {"/v1/audio/transcriptions"}  # what comes there is no JSON
each_route = pytest.mark.parametrize("path", [path for path in ENDPOINTS if path not in FORMS])
each_carrier = pytest.mark.parametrize("path", CARRIERS)


def ask(path, members="", *given, **more):
    """What llmq makes of a request for this route with these members."""
    body = "{" + ",".join(part for part in (members, LEAST[path]) if part) + "}"
    return read(path, body.encode(), *given, **more)


def requests(path, seed, *fixed):
    """Requests for a route with members of all kinds among those that it needs."""
    least = read_object("{" + LEAST[path] + "}").values
    needed = [(name, [json.dumps(value)]) for name, value in least.items()]
    return documents(seed, *needed, *fixed, runs=RUNS)


def test_every_inference_route_is_tried_here():
    assert set(LEAST) | FORMS == set(ENDPOINTS)
    assert [path for path in ENDPOINTS if path.startswith("/api/")] == CARRIERS


@each_route
def test_request_reaches_the_backend_as_it_came_but_for_own_fields_and_the_models_name(path):
    models = ['"m"', '"\\u006d"', '"日本"', '""', "null", '" "']
    own = [("priority", ['"high"', "true", "null"]), ("numCtx", ["4096", "null"])]
    own += [("router", ['{"mode":"auto"}', "null"])]
    for document, chance in requests(path, 3, ("model", models), *own):
        if chance.random() < 0.3:  # without one of them
            lost = document.names.index(chance.choice(["model", *llmq.EXTENSIONS]))
            for table in (document.names, document.members, document.gaps):
                del table[lost]
        question, values = read_question(document.text.encode(), ENDPOINTS[path])
        assert values == strict(document.text)
        assert question.body.decode() == document.text
        left = document.without(llmq.EXTENSIONS)
        assert sent(question).decode() == left
        named = question.body_for('other "name" é')
        assert strict(named) == {**strict(left), "model": 'other "name" é'}
        new = json.dumps('other "name" é')
        if "model" in document.names:
            _, value_start, end = read_object(left).places["model"]
            assert named.decode() == left[:value_start] + new + left[end:]
        else:
            put = '"model":' + new + ","
            assert named.decode() == document.start + put + left[len(document.start) :]


@each_route
def test_request_that_needs_no_change_is_passed_on_as_the_same_bytes(path):
    for document, _ in requests(path, 4, ("model", ['"m"', '"\\u006d"'])):
        body = document.text.encode()
        question = read(path, body)
        assert question.body_for("m") is question.body
        assert question.body == body


OPTIONS = [
    *("null", "{}", "{ }", '{"num_ctx":512}', '{ "num_ctx" : null }', '{"seed":1e2,"num_ctx":1}'),
    *('{"日":"\\"num_ctx\\":1","a":{"num_ctx":3}}', '{"stop":["}"],\n"num_ctx"\t:\r99,"x":[]}'),
]


@each_carrier
def test_shared_context_is_put_in_and_all_else_stays_as_it_came(path):
    fixed = [("model", ['"m"', '"é"', "null"]), ("options", [*OPTIONS, ""]), ("numCtx", ["7", ""])]
    for document, chance in requests(path, 5, *fixed):
        question = read(path, document.text.encode())
        before = strict(sent(question))
        named = chance.choice(["m", "é", "other"])
        plain, carrying = question.body_for(named), question.body_for(named, 8192)
        options = {**(before.get("options") or {}), "num_ctx": 8192}
        assert strict(carrying) == {**before, "model": named, "options": options}
        start, end, new_end = span_of_change(plain.decode(), carrying.decode())
        assert plain.decode()[start:end] in ("", "null", "51", "1", "99"), "no more"
        assert new_end - start <= len('"options":{"num_ctx":8192},')
        asked = [before.get("options") or {}, {"num_ctx": 7 if "numCtx" in document.names else 0}]
        assert question.context == max(one.get("num_ctx") or 0 for one in asked)


@each_route
def test_context_never_goes_where_it_cannot_be_carried(path):
    question = ask(path, '"model":"m","numCtx":4096')
    carried = question.body_for("m", 4096)
    assert question.context == 4096
    assert (b"4096" in carried) == (path in CARRIERS)
    if path not in CARRIERS:
        assert carried == ask(path, '"model":"m"').body
        odd = ask(path, '"model":"m","options":{"num_ctx":"many"}')
        assert (odd.context, odd.options) == (0, False), "not llmq's to judge there"
        assert odd.body_for("m", 4096) is odd.body


@each_carrier
def test_foreign_page_asks_for_no_context_and_what_it_says_of_one_is_cut(path):
    fixed = [("model", ['"m"']), ("options", [*OPTIONS, ""]), ("numCtx", ["7", ""])]
    for document, _ in requests(path, 6, *fixed):
        ours = read(path, document.text.encode())
        question = read(path, document.text.encode(), foreign=True)
        meant = strict(sent(ours))
        if meant.get("options"):
            meant["options"] = {k: v for k, v in meant["options"].items() if k != "num_ctx"}
        assert strict(sent(question)) == meant
        assert question.context == 0
        if "num_ctx" not in (strict(sent(ours)).get("options") or {}):
            assert sent(question) == sent(ours)
        carrying = strict(question.body_for("m", 8192))
        options = {**(meant.get("options") or {}), "num_ctx": 8192}
        assert carrying == {**meant, "options": options}, "the shared one is for it too"


@pytest.mark.parametrize("body", ["{}", " { }", '{"numCtx":5}', '{"priority":"low" , "numCtx":5} '])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"])
def test_request_without_any_member_gets_model_and_context(path, body):
    question = read(path, body.encode())
    assert strict(question.body_for("m", 4096)) == {"model": "m", "options": {"num_ctx": 4096}}
    assert strict(question.body_for("m")) == {"model": "m"}
    assert strict(question.body_for("", 4096)) == {"options": {"num_ctx": 4096}}


@each_route
def test_foreign_page_is_served_as_its_bytes_where_it_asks_for_no_context(path):
    question = ask(path, '"model":"m","options":{"a":"é"}', foreign=True)
    assert sent(question) == sent(ask(path, '"model":"m","options":{"a":"é"}'))
    assert sent(question) == question.body
    assert ask(path, '"numCtx":4096', foreign=True).context == 0


@each_carrier
@pytest.mark.parametrize(
    "value", ["true", "false", "4096.5", "-0.5", '"4096"', '"0"', "[]", "{}", "1e999", "-1e999"]
)
def test_bad_context_among_the_options_is_named(path, value):
    for foreign in (False, True):
        with pytest.raises(BadRequest) as caught:
            ask(path, f'"options":{{"num_ctx":{value}}}', foreign=foreign)
        assert caught.value.param == "options.num_ctx"


@each_carrier
@pytest.mark.parametrize("value", ["0", "-1", "-0", "0.0", "-4096.0", "-" + "9" * 30, "null"])
def test_context_of_0_or_less_among_the_options_is_the_default(path, value):
    plain = ask(path, f'"model":"m","options":{{"num_ctx":{value},"seed":1}}')
    assert plain.context == 0
    assert sent(plain) == plain.body
    options = strict(plain.body_for("m", 8192))["options"]
    assert options == {"num_ctx": 8192, "seed": 1}, "the shared one, where there is one"
    both = ask(path, f'"numCtx":4096,"options":{{"num_ctx":{value}}}')
    assert both.context == 4096


@each_route
@pytest.mark.parametrize("value", ["0", "-1", "-" + "9" * 30, "null"])
def test_own_context_of_0_or_less_is_the_default_and_is_cut(path, value):
    question = ask(path, f'"model":"m","numCtx":{value}')
    assert question.context == 0
    assert sent(question) == ask(path, '"model":"m"').body


@pytest.mark.parametrize(
    ("path", "members", "says"),
    [
        ("/api/chat", "", "load"),
        ("/api/chat", '"messages":[]', "load"),
        ("/api/chat", '"messages":null,"keep_alive":"5m"', "load"),
        ("/api/chat", '"messages":[],"keep_alive":0', "unload"),
        ("/api/chat", '"messages":[],"keep_alive":"0s"', "unload"),
        ("/api/chat", '"messages":[{"role":"user","content":"hi"}],"keep_alive":0', ""),
        ("/api/generate", "", "load"),
        ("/api/generate", '"prompt":"","keep_alive":-1', "load"),
        ("/api/generate", '"prompt":"","keep_alive":0', "unload"),
        ("/api/generate", '"prompt":"hi","keep_alive":0', ""),
        ("/api/embed", '"keep_alive":0', ""),
        ("/api/embeddings", '"prompt":"","keep_alive":0', ""),
        ("/v1/responses", '"keep_alive":0', ""),
        ("/v1/chat/completions", '"messages":[{"role":"user"}],"keep_alive":0', ""),
    ],
)
def test_request_that_only_loads_or_unloads_a_model_is_known(path, members, says):
    question = read(path, f"{{{members}}}".encode())
    assert question.done_reason == says


@each_carrier
@pytest.mark.parametrize("options", ["[]", '"x"', "7", "true", '[{"num_ctx":1}]'])
def test_options_that_are_no_object_are_refused(path, options):
    with pytest.raises(BadRequest) as caught:
        ask(path, f'"options":{options}')
    assert caught.value.param == "options"


@each_carrier
def test_context_that_stands_twice_among_the_options_is_refused_or_shared_all_the_same(path):
    """Runners take the last of two; so a first one alone must not be what is changed."""
    try:
        question = ask(path, '"model":"m","options":{"num_ctx":1,"num_ctx":2}')
    except BadRequest:
        return
    assert strict(question.body_for("m", 8192))["options"] == {"num_ctx": 8192}


@each_route
@pytest.mark.parametrize(("member", "says"), [("", False), ('"keep_alive":-1', True)])
def test_request_that_says_how_long_its_model_stays_is_known(path, member, says):
    assert ask(path, member).keep_alive is says


STREAMS = {"/api/chat", "/api/generate"}  # when they do not say; embeddings never are one


@each_route
@pytest.mark.parametrize("said", ["", '"stream":null', '"stream":true', '"stream":false'])
def test_stream_is_what_its_clients_mean_when_they_say_nothing(path, said):
    wanted = {'"stream":true': "embed" not in path, '"stream":false': False}
    assert ask(path, said).stream is wanted.get(said, path in STREAMS)


def keys(number):
    return ",".join(f'"{one}":0' for one in range(number))


@pytest.mark.parametrize("number", [20_000, 200_000])
@pytest.mark.deadline(30)
def test_many_keys_inside_are_read_and_kept_in_time_that_grows_with_their_number(number):
    """All clients wait while one body is read: the bound is far above what one pass takes."""
    many = keys(number)
    body = f'{{"x":{{{many}}},"priority":"high",{MESSAGES}}}'.encode()
    start = time.process_time()
    passed_on = sent(read_chat(body))
    spent = time.process_time() - start
    assert passed_on == f'{{"x":{{{many}}},{MESSAGES}}}'.encode()
    assert spent < number * 50e-6, f"{spent:.1f} s for {number} keys"


def test_thousand_keys_are_taken_and_one_more_is_not():
    most = read_object("{" + keys(1000) + "}")
    assert len(most.values) == len(most.places) == 1000
    with pytest.raises(BadRequest, match="1,000 keys"):
        read_object("{" + keys(1001) + "}")
    with pytest.raises(BadRequest, match="twice"):
        read_object("{" + keys(1000) + ',"0":0}')
    question = read_chat(f'{{{keys(998)},"priority":"high",{MESSAGES}}}'.encode())
    assert sent(question) == f"{{{keys(998)},{MESSAGES}}}".encode()


@pytest.mark.parametrize("letter", ["a", "é", "🦙", "\\n", "\\u0061", "\\ud83e\\udd99"])
def test_key_of_1024_characters_is_taken_and_one_more_is_not(letter):
    assert len(next(iter(read_object('{"' + letter * 1024 + '":0}').values))) == 1024
    with pytest.raises(BadRequest, match="longer than 1024"):
        read_object('{"' + letter * 1025 + '":0}')
    inside = read_object('{"x":{"' + letter * 1025 + '":0}}').values["x"]
    assert [len(name) for name in inside] == [1025], "inside it is left to the backend"


@pytest.mark.parametrize("number", [20_000, 200_000])
@pytest.mark.parametrize(
    "write",
    [
        keys,
        lambda number: '"' + "a" * 8 * number + '":0',
        lambda number: '"' + "\\n" * 4 * number + '":0',
        lambda number: '"' + "\\n" * 4 * number,
    ],
    ids=["keys", "long", "escapes", "endless"],
)
@pytest.mark.deadline(30)
def test_too_many_or_too_long_keys_are_refused_no_slower(number, write):
    body = f"{{{write(number)},{MESSAGES}}}".encode()
    start = time.process_time()
    with pytest.raises(BadRequest):
        read_chat(body)
    spent = time.process_time() - start
    assert spent < number * 50e-6, f"{spent:.1f} s for {number} keys"


# ---- Documents that are refused ------------------------------------------------------------------


def nested(depth, pair="[]"):
    opening, closing = ('{"a":', "}") if pair == "{}" else pair
    return '{"x":' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}"


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_hundred_levels_are_taken_and_one_more_is_not(pair):
    assert list(read_object(nested(100, pair)).values) == ["x"]
    with pytest.raises(BadRequest, match="nests"):
        read_object(nested(101, pair))
    wide = nested(2, pair)[:-1] + "," + ",".join(f'"{n}":[[],{{}}]' for n in range(500)) + "}"
    assert len(read_object(wide).values) == 501
    assert read_object('{"x":"' + "[{" * 1000 + '"}').values == {"x": "[{" * 1000}


@pytest.mark.parametrize("depth", [101, 1_000, 3_000, 100_000, 1_000_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting_is_refused_and_never_a_crash(depth, pair, closed):
    text = nested(depth, pair)
    with pytest.raises(BadRequest):
        read_object(text if closed else text[: len(text) // 2])


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
        read_object(text)


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
        read_object(text)
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
    assert len(read_object(text).values) == 1
    question = read_chat((text[:-1] + "," + MESSAGES + "}").encode())
    assert sent(question).decode() == text[:-1] + "," + MESSAGES + "}"


# ---- Chats ---------------------------------------------------------------------------------------


def chat(members="", messages=MESSAGES):
    return ("{" + ",".join(part for part in (members, messages) if part) + "}").encode()


def test_bare_chat_has_the_defaults():
    question = read_chat(chat())
    assert question.model == ""
    assert question.stream is False
    assert question.priority is None
    assert question.body == sent(question) == chat()


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
    assert b'"priority"' not in sent(question)


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
        (chat('"numCtx":true'), "numCtx"),
        (chat('"numCtx":false'), "numCtx"),
        (chat('"numCtx":-1.5'), "numCtx"),
        (chat('"numCtx":4096.5'), "numCtx"),
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


NEEDED = [
    ("/v1/chat/completions", ["{}", '{"messages":[]}', '{"messages":"hi"}'], "messages"),
    ("/v1/messages", ["{}", '{"messages":null}', '{"messages":[1]}'], "messages"),
    ("/v1/completions", ["{}", '{"prompt":null}', '{"prompt":7}', '{"prompt":{}}'], "prompt"),
    ("/v1/embeddings", ["{}", '{"input":null}', '{"input":true}', '{"input":{}}'], "input"),
    ("/api/chat", ['{"messages":"hi"}', '{"messages":["hi"]}', '{"messages":{"a":1}}'], "messages"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(path, body, param) for path, bodies, param in NEEDED for body in bodies],
)
def test_what_a_route_needs_is_named(path, body, param):
    with pytest.raises(BadRequest) as caught:
        read_question(body.encode(), ENDPOINTS[path])
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(("/api/chat", body) for body in ("{}", '{"messages":[]}', '{"messages":null}')),
        *((path, "{}") for path in ("/api/generate", "/api/embed", "/v1/responses", "/v1/rerank")),
        ("/api/generate", '{"model":"m","keep_alive":0}'),
        *(("/v1/completions", body) for body in ('{"prompt":[1,2]}', '{"prompt":["a","b"]}')),
        *(("/v1/embeddings", body) for body in ('{"input":[[1,2]]}', '{"input":""}')),
    ],
)
def test_what_some_runner_may_take_is_left_to_it(path, body):
    assert sent(read(path, body.encode())) == body.encode()


@each_route
@pytest.mark.parametrize(
    ("members", "param"),
    [
        ('"model":1', "model"),
        ('"model":"' + "m" * 513 + '"', "model"),
        ('"stream":"no"', "stream"),
        ('"priority":7', "priority"),
        ('"numCtx":"many"', "numCtx"),
    ],
    ids=["model", "long", "stream", "priority", "numCtx"],
)
def test_bad_member_is_named_on_every_route(path, members, param):
    with pytest.raises(BadRequest) as caught:
        ask(path, members)
    assert caught.value.param == param


@each_route
def test_class_is_read_on_every_route(path):
    assert ask(path, '"priority":"low"', "high").priority is Priority.LOW
    assert ask(path, "", "high").priority is Priority.HIGH
    assert b"priority" not in sent(ask(path, '"priority":"low"'))
    for body in (b"", b"[]", b"\xff", b'{"a":1,"a":2}'):
        with pytest.raises(BadRequest):
            read_question(body, ENDPOINTS[path])


def test_stream_documents_of_the_property_tests_are_json():
    """The generator itself: json.loads takes all that it makes, and it makes what is promised."""
    texts = [document.text for document, _ in documents(9)]
    assert all(isinstance(strict(text), dict) for text in texts)
    joined = "".join(texts)
    for wanted in ("\\u", "{}", "[]", "[ ]", "null", "1e999", '\\"', "🦙", "\r", '{"a":1,"a":2}'):
        assert wanted in joined
    assert re.search(r'"\s+:\s+', joined)
