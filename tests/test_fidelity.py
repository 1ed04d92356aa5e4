"""Nothing is changed that need not be: random documents, compared byte for byte at both ends."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fake_ollama import (
    EVENTS,
    NDJSON,
    ROUTES,
    Runner,
    arrival,
    ended,
    exchange,
    least,
    line,
    named_event,
    stream,
    told,
)
from tests.fake_runner import CHAT as OPENAI_CHAT
from tests.fake_runner import DIALECTS, NATIVE_CHAT, Dialect
from tests.fakes import Answer, FakeRequest, Raw, ask, http, running, sse

RUNS = 40  # documents for each route and kind of change
ALL_ROUTES = [*ROUTES["openai"], *ROUTES["anthropic"], *ROUTES["ollama"]]
each_route = pytest.mark.parametrize("path", ALL_ROUTES)
STREAMED = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
]
OWN = ("priority", "numCtx")  # llmq's own fields
PRIORITIES = ['"high"', '"normal"', '"low"', "true", "false", "null", '"\\u0068igh"']

# ---- Documents in every way that JSON can be written -----------------------------------------

SPACE = " \t\n\r"
LETTERS = 'ab01{}[],:"\\/\n\t\b\f\r\0\x1f\x7f éß日\u2028\u2029\ufeff\uffff🦙'
SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\b": "\\b", "\f": "\\f", "\r": "\\r"}
NUMBERS = [
    *("0", "-0", "1", "-1", "7.0", "1.0e+5", "1.0E+5", "1e5", "1E-05", "-1.50", "0e0", "-0.0e-0"),
    *("0.1", "0.10000000000000000000001", "3.141592653589793238462643", "1e-400", "2.5e300"),
    *("123456789012345678901234567890", "-9007199254740993"),
]
WORDS = ["true", "false", "null", "[]", "{}", "[ ]", "{\n}", "[[],{}]"]
TWINS = '{"a":1,"a":2,"a":{"a":1,"a":3}}'  # the same key twice, where llmq has no say
HALF = '"\\ud83e"'  # half of a pair, which JSON allows
LOOKALIKES = ['{"model":"x","priority":7,"numCtx":-1}', '"priority"', '"\\"model\\":\\"x\\""']


def space(chance: random.Random) -> str:
    return "".join(chance.choices(SPACE, k=chance.choice([0, 0, 0, 1, 3])))


def text(chance: random.Random, value: str | None = None) -> str:
    """A string with its letters written in any of the ways there are."""
    if value is None:
        value = "".join(chance.choices(LETTERS, k=chance.choice([0, 1, 4, 20])))
    written = []
    for letter in value:
        units = letter.encode("utf-16-be").hex()
        codes = "".join("\\u" + units[at : at + 4] for at in range(0, len(units), 4))
        plain = SHORT.get(letter, codes if letter < " " else letter)
        if letter == "/":
            plain = chance.choice(["/", "\\/"])
        escaped = codes.upper().replace("\\U", "\\u") if chance.random() < 0.5 else codes
        written.append(escaped if chance.random() < 0.15 else plain)
    return '"' + "".join(written) + '"'


def value(chance: random.Random, depth: int = 0) -> str:
    """Any JSON value, as some program may have written it."""
    kind = chance.randrange(6 if depth > 4 else 10)
    if kind < 2:
        return chance.choice(NUMBERS)
    if kind < 4:
        return text(chance)
    if kind == 4:
        return chance.choice(WORDS)
    if kind == 5:
        return chance.choice([TWINS, HALF, *LOOKALIKES])
    inner = [value(chance, depth + 1) for _ in range(chance.randrange(5))]
    if kind < 8:
        inner = [f"{text(chance)}{space(chance)}:{space(chance)}{one}" for one in inner]
    spaced = f"{space(chance)},{space(chance)}".join(inner)
    opening, closing = "{}" if kind < 8 else "[]"
    return f"{opening}{space(chance)}{spaced}{space(chance)}{closing}"


class Document:
    """A JSON object of known pieces: before, each member as it is written, after."""

    def __init__(self, chance: random.Random, members: list[tuple[str, str]]) -> None:
        self.chance = chance
        self.names = [name for name, _ in members]
        self.gaps = [f"{space(chance)}:{space(chance)}" for _ in members]
        self.keys = [text(chance, name) for name in self.names]
        self.values = [written for _, written in members]
        self.before = f"{space(chance)}{{{space(chance)}"
        self.after = f"{space(chance)}}}{space(chance)}"
        self.commas = [f"{space(chance)},{space(chance)}" for _ in members[1:]]

    def member(self, place: int, instead: str | None = None) -> str:
        return self.keys[place] + self.gaps[place] + (instead or self.values[place])

    def insert(self, place: int, name: str, written: str) -> None:
        """One more member, between any two."""
        for table, one in (
            (self.names, name),
            (self.keys, text(self.chance, name)),
            (self.values, written),
            (self.gaps, ":"),
            (self.commas, f"{space(self.chance)},"),
        ):
            table.insert(place, one)

    def split(self, place: int) -> tuple[bytes, bytes, bytes]:
        """The body before, in and behind the value of a member."""
        members = [self.member(number) for number in range(len(self.names))]
        parts = [part for pair in zip(members, [*self.commas, ""]) for part in pair]
        start = "".join(parts[: 2 * place]) + self.keys[place] + self.gaps[place]
        rest = "".join(parts[2 * place + 1 :])
        pieces = (self.before + start, self.values[place], rest + self.after)
        return tuple(one.encode() for one in pieces)  # type: ignore[return-value]

    @property
    def body(self) -> bytes:
        return b"".join(self.split(0))

    def pattern(self, model: str | None) -> bytes:
        """What a backend that must be told this model's name may get: only commas are open."""
        kept = [
            self.member(place, json.dumps(model) if model and name == "model" else None)
            for place, name in enumerate(self.names)
            if name not in OWN
        ]
        comma = f"[{SPACE}]*,[{SPACE}]*"
        joined = comma.join(re.escape(one) for one in kept)
        return (re.escape(self.before) + joined + re.escape(self.after)).encode()


def unstreamed(path: str) -> dict[str, Any]:
    """The least body that is answered whole; Ollama streams where nothing is said."""
    return least(path, **({"stream": False} if path in ("/api/chat", "/api/generate") else {}))


def documents(
    chance: random.Random, path: str, model: str, own: tuple[str, ...] = (), **fixed: Any
) -> Iterator[Document]:
    """Bodies for this route: what it needs, what llmq may cut, and anything else."""
    for _ in range(RUNS):
        needed = {**unstreamed(path), **fixed}
        needed.pop("model")
        members = [(name, json.dumps(one)) for name, one in needed.items()]
        others = [f"{chance.choice(LETTERS)}{number}" for number in range(chance.randrange(6))]
        members += [(name, value(chance)) for name in others]
        members += [(chance.choice(["Modell", "PRIORITY", "numctx", "", "stream2"]), value(chance))]
        members.append(("model", text(chance, model)))
        if "priority" in own:
            members.append(("priority", chance.choice(PRIORITIES)))
        if "numCtx" in own:
            members.append(("numCtx", "null"))  # a number would ask for a translation
        chance.shuffle(members)
        yield Document(chance, members)


def answers(chance: random.Random) -> bytes:
    """A whole answer that no dialect would call a failure."""
    members = [(f"{chance.choice(LETTERS)}{n}", value(chance)) for n in range(chance.randrange(6))]
    fixed = [
        ("choices", '[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}]'),
        ("type", '"message"'),
        ("done", "true"),
        ("message", '{"role":"assistant","content":"x"}'),
        ("response", '"x"'),
        ("embedding", "[1.0e+0]"),
        ("embeddings", "[[1.0e+0]]"),
        ("data", '[{"index":0,"embedding":[1E0]}]'),
        ("results", "[]"),
        ("output", "[]"),
        ("status", '"completed"'),
        ("usage", '{"completion_tokens":1,"output_tokens":1.0e0}'),
    ]
    members += fixed
    chance.shuffle(members)
    return Document(chance, members).body


def kind_for(path: str, chance: random.Random) -> str:
    """A runner that speaks the route's dialect."""
    if path.startswith("/api/"):
        return "ollama"
    return chance.choice(["openai", "llamacpp", "vllm"])


class Talk:
    """One client connection to llmq and one runner behind it, for many requests."""

    def __init__(
        self, q: running, runner: Runner, raw: Raw, headers: dict[str, str] | None = None
    ) -> None:
        self.q, self.runner, self.raw = q, runner, raw
        self.headers = {"Content-Type": "application/json", **(headers or {})}

    async def ask(self, path: str, body: bytes, reply: Any) -> tuple[FakeRequest, Answer]:
        """Send the body, let `reply` answer it at the runner, return both ends."""
        already = len(self.runner.requests)
        self.runner.reply = reply
        await self.raw.send(http("POST", path, self.headers, body))
        answer = await self.raw.response()
        assert len(self.runner.requests) == already + 1, (answer, body)
        return self.runner.requests[-1], answer


async def nothing(_: FakeRequest) -> None:
    """Until a test says what the runner replies."""


# ---- What the backend receives ---------------------------------------------------------------


@each_route
@pytest.mark.deadline(60)
async def test_body_that_needs_no_change_arrives_as_the_same_bytes(path: str) -> None:
    chance = random.Random(f"same {path}")
    async with Runner(kind=kind_for(path, chance), reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw)
            for document in documents(chance, path, "m"):
                sent = answers(chance)

                async def reply(request: FakeRequest, sent: bytes = sent) -> None:
                    await request.status(200, sent)

                request, answer = await talk.ask(path, document.body, reply)
                assert request.body == document.body
                assert (answer.status, answer.body) == (200, sent), document.body


ALIASES = {"friend-*": "räuber/🦙:7b"}
ARGUMENTS = json.dumps({"model": "räuber/🦙:7b"})


@each_route
@pytest.mark.parametrize("spaced", [True, False])
async def test_answer_names_the_model_that_was_asked_for(path: str, spaced: bool) -> None:
    """Where the runner had to be told another name; each other byte of the answer stays."""
    kind = "ollama" if path.startswith("/api/") else "vllm"
    name = ALIASES["friend-*"]
    marks = (", ", ": ") if spaced else (",", ":")
    facts = {"id": "1", "model": name, "text": ARGUMENTS, "choices": []}
    sent = json.dumps(facts, ensure_ascii=False, separators=marks).encode()
    told_name = json.dumps(name, ensure_ascii=False).encode()
    async with Runner([name], kind) as runner, running(runner.url, aliases=ALIASES) as q:
        body = least(path, model="friend-1", stream=False)
        request, answer = await exchange(q, runner, path, body, sent)
        assert request.json["model"] == name
        assert answer.body == sent.replace(told_name, b'"friend-1"', 1)


async def test_what_a_tool_is_told_of_a_model_stays_where_it_comes_before_the_models_name() -> None:
    """As llama.cpp writes its messages."""
    name, call = ALIASES["friend-*"], {"type": "tool_use", "name": "x", "input": {"model": "@"}}
    facts = {"type": "message", "content": [call, {"type": "text", "text": "\n"}], "model": "@"}
    for indent in (None, 1):
        text = json.dumps(facts, indent=indent).replace('"@"', json.dumps(name))
        async with Runner([name], "vllm") as runner, running(runner.url, aliases=ALIASES) as q:
            body = least("/v1/messages", model="friend-1", stream=False)
            _, answer = await exchange(q, runner, "/v1/messages", body, text.encode())
            shown = '"friend-1"'.join(text.rsplit(json.dumps(name), 1))
            assert answer.body == shown.encode()


STREAMS_OF = {  # events that name the model, each as its dialect has them
    "/v1/chat/completions": (
        b'data: {"id":"1","choices":[],"model":@}\n\n' * 2,
        b"data: [DONE]\n\n",
    ),
    "/v1/messages": (
        b'event: message_start\ndata: {"type":"message_start","message":{"model": @}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
    "/api/chat": (
        b'{"model":@,"message":{"tool_calls":[{"function":{"arguments":{"model":#}}}]}}\n',
        b'{"model":"small:latest","message":{"tool_calls":[{"function":{"arguments":{"model":#}}}]}}\n'
        b'{"model":@,"done":true}\n',
    ),
}


@pytest.mark.parametrize("path", STREAMS_OF)
async def test_stream_names_the_model_that_was_asked_for(path: str) -> None:
    def named(pieces: Any, name: bytes) -> bytes:
        return b"".join(pieces).replace(b"@", name).replace(b"#", b'"small"')

    kind = "application/x-ndjson" if path == "/api/chat" else "text/event-stream"
    async with Runner(["small"]) as runner, running(runner.url, aliases={"fast": "small"}) as q:
        body = least(path, model="fast", stream=True)
        sent = named(STREAMS_OF[path], b'"small"')
        reply = [sent[:30], sent[30:90], sent[90:]]
        _, answer = await exchange(q, runner, path, body, reply, content_type=kind)
        assert answer.body == named(STREAMS_OF[path], b'"fast"')


@pytest.mark.untraced
@each_route
@pytest.mark.deadline(60)
async def test_only_own_fields_and_the_models_name_are_touched(path: str) -> None:
    """Each member keeps its bytes and its place; only the commas around a cut are llmq's."""
    chance = random.Random(f"cut {path}")
    name = "Räuber/🦙\\Model:7B"
    kind = kind_for(path, chance)
    renamed = name if kind != "ollama" else None  # which takes it as it comes
    async with Runner([name], kind=kind, reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw)
            for own in (("priority",), ("numCtx",), ("priority", "numCtx"), ()):
                for document in documents(chance, path, name.lower(), own):

                    async def reply(request: FakeRequest) -> None:
                        await request.status(200, answers(random.Random(1)))

                    request, answer = await talk.ask(path, document.body, reply)
                    assert answer.status == 200, (answer, document.body)
                    assert_only_cut(document, request.body, renamed)


def assert_only_cut(document: Document, got: bytes, model: str | None) -> None:
    """`model` may be written with or without escapes; all else is the document's."""
    for ascii_only in (True, False):
        name = json.dumps(model, ensure_ascii=ascii_only).encode()
        ours = json.dumps(model).encode()
        pattern = document.pattern(model).replace(re.escape(ours), re.escape(name))
        if re.fullmatch(pattern, got):
            return
    raise AssertionError(f"{document.body!r} became {got!r}")


OPTIONS = [  # and where the context stands in them
    '{"num_ctx":%s}',
    '{ "seed" : 1.0 ,"num_ctx" :\t%s ,"x":[1,1.0,{"num_ctx":1}]}',
    '{"stop":["é\\u00e9"],"num_\\u0063tx":%s}',
    "{}",
    '{"seed":1.0e0 }',
    '{"x":{"num_ctx":7}}',
    "null",
]


@pytest.mark.parametrize("path", ROUTES["ollama"])
@pytest.mark.parametrize("how", ["configured", "loaded"])
@pytest.mark.deadline(60)
async def test_shared_context_changes_one_number_and_nothing_else(path: str, how: str) -> None:
    """Of 16384: it goes into `options`, every other byte stays.

    One that is only what the model is loaded with is for those who ask for one, and so is any for
    embeddings; the others stay as they are.
    """
    chance = random.Random(f"context {path}")
    binds_all = how == "configured" and "embed" not in path
    async with Runner(reply=nothing) as runner:
        runner.contexts = {"m": 16384} if how == "loaded" else {}
        start = 16384 if how == "configured" else 0
        async with running(runner.url, upstream__num_ctx=start) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw)
            for document in documents(chance, path, "m"):
                options = chance.choice(OPTIONS)
                place = chance.randrange(len(document.names) + 1)
                document.insert(place, "options", options.replace("%s", "4096"))

                async def reply(request: FakeRequest) -> None:
                    await request.status(200, answers(random.Random(1)))

                request, answer = await talk.ask(path, document.body, reply)
                assert answer.status == 200, answer
                got, meant = json.loads(request.body), json.loads(document.body)
                if not binds_all and "%s" not in options:
                    assert request.body == document.body
                    continue
                wanted = {**(meant["options"] or {}), "num_ctx": 16384}
                assert got == {**meant, "options": wanted}, document.body
                if "%s" in options:
                    document.values[place] = options.replace("%s", "16384")
                    assert request.body == document.body
                else:
                    assert_others_kept(document, request.body, place)


@pytest.mark.parametrize("path", ROUTES["ollama"])
@pytest.mark.deadline(60)
async def test_page_of_another_origin_loses_its_num_ctx_and_nothing_else(path: str) -> None:
    chance = random.Random(f"foreign {path}")
    async with Runner(reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw, {"Origin": "https://page.example"})
            for document in documents(chance, path, "m"):
                options = chance.choice(OPTIONS)
                place = chance.randrange(len(document.names) + 1)
                document.insert(place, "options", options.replace("%s", "4096"))

                async def reply(request: FakeRequest) -> None:
                    await request.status(200, answers(random.Random(1)))

                request, answer = await talk.ask(path, document.body, reply)
                assert answer.status == 200, answer
                got, meant = json.loads(request.body), json.loads(document.body)
                if "%s" in options:
                    del meant["options"]["num_ctx"]
                    assert_others_kept(document, request.body, place)
                else:
                    assert request.body == document.body
                assert got == meant, document.body


@pytest.mark.parametrize("path", ROUTES["ollama"])
@pytest.mark.deadline(60)
async def test_all_changes_at_once_touch_nothing_else(path: str) -> None:
    """Fields cut, a context put in: all else keeps its bytes, the model's spelling too."""
    chance = random.Random(f"all {path}")
    async with Runner(["Räuber:7B"], reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw)
            for document in documents(chance, path, "räuber:7b", ("priority",)):
                options = chance.choice([*OPTIONS, None])
                if options is not None:
                    place = chance.randrange(len(document.names) + 1)
                    document.insert(place, "options", options.replace("%s", "2048"))
                document.insert(chance.randrange(len(document.names) + 1), "numCtx", "8192")

                async def reply(request: FakeRequest) -> None:
                    await request.status(200, answers(random.Random(1)))

                request, answer = await talk.ask(path, document.body, reply)
                assert answer.status == 200, (answer, document.body)
                meant = json.loads(document.body)
                wanted = {name: one for name, one in meant.items() if name not in OWN}
                wanted["options"] = {**(meant.get("options") or {}), "num_ctx": 8192}
                assert json.loads(request.body) == wanted, document.body
                at = 0
                for number, name in enumerate(document.names):
                    if name not in (*OWN, "model", "options"):
                        at = request.body.index(document.member(number).encode(), at)


def assert_others_kept(document: Document, got: bytes, changed: int) -> None:
    """Every byte before and behind the value of one member is the document's."""
    before, _, behind = document.split(changed)
    assert got.startswith(before), (document.body, got)
    assert got.endswith(behind), (document.body, got)


@each_route
@pytest.mark.deadline(60)
async def test_query_string_arrives_as_it_was_sent(path: str) -> None:
    chance = random.Random(f"query {path}")
    letters = "abc019-._~!$&'()*+,;=:@/?"
    async with Runner(kind=kind_for(path, chance), reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw)
            body = json.dumps(unstreamed(path)).encode()
            for _ in range(RUNS):
                query = "".join(chance.choices(letters, k=chance.randrange(40)))
                query += chance.choice(["", "%2F", "%00", "%20%zz", "%E6%97%A5", "+"])

                async def reply(request: FakeRequest) -> None:
                    await request.status(200, answers(random.Random(1)))

                request, answer = await talk.ask(f"{path}?{query}", body, reply)
                assert answer.status == 200, query
                assert request.path.partition("?")[2] == query


# ---- What the client receives ----------------------------------------------------------------


def events(chance: random.Random, path: str) -> bytes:
    """A stream of this route's dialect, in any way it may be written."""
    if path.startswith("/api/"):
        return ndjson(chance)
    named = path in ("/v1/responses", "/v1/messages")
    ending = chance.choice(["\n", "\n", "\r\n"])
    blocks = []
    for number in range(chance.randrange(1, 12)):
        if chance.random() < 0.2:
            blocks.append(f":{chance.choice(['', ' ping', ' position=3'])}{ending}")
        member = f'"n":{number},"x":' + value(chance).replace("\n", " ").replace("\r", " ")
        kind = chance.choice(["response.output_text.delta", "content_block_delta"])
        name = f"event: {kind}{ending}" if named else ""
        blocks.append(f'{name}data:{chance.choice(["", " "])}{{"type":"{kind}",{member}}}{ending}')
    if named:
        kind = "response.completed" if path == "/v1/responses" else "message_stop"
        blocks.append(f'event: {kind}{ending}data: {{"type":"{kind}"}}{ending}')
    else:
        blocks.append(f"data: [DONE]{ending}")
    return "".join(block + ending for block in blocks).encode()


def ndjson(chance: random.Random) -> bytes:
    written = []
    for number in range(chance.randrange(1, 12)):
        member = value(chance).replace("\n", " ").replace("\r", " ")
        written.append(f'{{"n":{number},"x":{member},"done":false}}\n'.encode())
    return b"".join(written) + line({"done": True, "done_reason": "stop", "eval_count": 3})


def cuts(chance: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces of any size, also in the midst of a letter."""
    marks = sorted(chance.randrange(len(data)) for _ in range(chance.randrange(12)))
    return [data[start:end] for start, end in zip([0, *marks], [*marks, len(data)])]


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.deadline(60)
async def test_stream_arrives_as_the_same_bytes(path: str) -> None:
    chance = random.Random(f"stream {path}")
    kind = NDJSON if path.startswith("/api/") else EVENTS
    body = json.dumps(least(path, stream=True)).encode()
    async with Runner(kind=kind_for(path, chance), reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk = Talk(q, runner, raw)
            for _ in range(RUNS):
                sent = events(chance, path)

                async def reply(request: FakeRequest, sent: bytes = sent) -> None:
                    await stream(request, cuts(chance, sent), kind)

                _, answer = await talk.ask(path, body, reply)
                assert (answer.status, answer.clean, answer.body) == (200, True, sent)
                assert answer.headers["content-type"] == kind
            outcomes = {record["outcome"] for record in await ended(q, min(RUNS, 50))}
            assert outcomes == {"done"}


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.deadline(60)
async def test_stream_without_its_end_is_the_same_bytes_and_then_an_error(path: str) -> None:
    """Wherever it is cut: what was complete comes through, and it never looks like the end."""
    chance = random.Random(f"cut stream {path}")
    kind = NDJSON if path.startswith("/api/") else EVENTS
    body = json.dumps(least(path, stream=True)).encode()
    async with Runner(kind=kind_for(path, chance), reply=nothing) as runner:
        async with running(runner.url) as q:
            await told(q)
            for _ in range(RUNS):
                whole = events(chance, path)
                sent = whole[: chance.randrange(1, end_of(whole, path))]

                async def reply(request: FakeRequest, sent: bytes = sent) -> None:
                    await stream(request, cuts(chance, sent), kind)

                async with await Raw.open(q.port) as raw:
                    _, answer = await Talk(q, runner, raw).ask(path, body, reply)
                if answer.status != 200:  # nothing was shown before the failure was known
                    assert answer.status == 502, answer
                    continue
                assert not answer.clean, sent
                good = complete(sent, path)
                assert answer.body.startswith(good), (sent, answer)
                assert b"error" in answer.body[len(good) :], (sent, answer)


def complete(sent: bytes, path: str) -> bytes:
    """The lines or events that are there to their end."""
    marks = [b"\n"] if path.startswith("/api/") else [b"\n\n", b"\r\n\r\n"]
    return sent[: max(sent.rfind(mark) + len(mark) if mark in sent else 0 for mark in marks)]


def end_of(whole: bytes, path: str) -> int:
    """Where the line that makes the stream complete begins."""
    marks = {"/v1/responses": b"event: response.completed", "/v1/messages": b"event: message_stop"}
    mark = b'{"done":true' if path.startswith("/api/") else marks.get(path, b"data: [DONE]")
    return whole.rindex(mark)


@each_route
async def test_answers_headers_are_relayed_by_name(path: str) -> None:
    chance = random.Random(path)
    relayed = {
        "openai-processing-ms": "12",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-reset-tokens": "6m0s",
        "retry-after": "1",
    }
    hidden = {"Set-Cookie": "a=b", "Server": "secret/1.0", "X-Other": "x"}
    async with Runner(kind=kind_for(path, chance), reply=nothing) as runner:
        async with running(runner.url) as q, await Raw.open(q.port) as raw:

            async def reply(request: FakeRequest) -> None:
                body = answers(random.Random(1))
                await request.status(200, body, [*relayed.items(), *hidden.items()])

            body = json.dumps(unstreamed(path)).encode()
            _, answer = await Talk(q, runner, raw).ask(path, body, reply)
            assert {name: answer.headers.get(name) for name in relayed} == relayed
            for name in ("set-cookie", "x-other"):
                assert name not in answer.headers
            assert b"secret" not in answer.raw_head


@each_route
async def test_every_answer_says_who_it_is_and_the_way_it_took(path: str) -> None:
    """Whole, refused by the runner or by llmq: the ids are there, the client's is kept."""
    chance = random.Random(path)
    async with Runner(kind=kind_for(path, chance), reply=nothing) as runner:
        never = {"cache__embeddings": False}
        async with running(runner.url, **never) as q, await Raw.open(q.port) as raw:
            await told(q)
            talk, ids = Talk(q, runner, raw, {"X-Request-Id": "mine-1.a_b"}), set()
            for status in (200, 400):

                async def reply(request: FakeRequest, status: int = status) -> None:
                    good = status == 200
                    await request.status(status, answers(chance) if good else {"error": "no"})

                _, answer = await talk.ask(path, json.dumps(unstreamed(path)).encode(), reply)
                assert answer.status == status
                assert answer.headers["x-llmq-backend"]
                assert int(answer.headers["x-llmq-wait-ms"]) >= 0
                ids.add(answer.headers["x-llmq-id"])
                assert answer.headers["request-id"] == "mine-1.a_b"
                assert answer.headers["x-request-id"] == "mine-1.a_b"
            await raw.send(http("POST", path, {"X-Request-Id": "bad id"}, b"{"))
            answer = await raw.response()
            assert answer.status == 400
            ids.add(answer.headers["x-llmq-id"])
            assert answer.headers["request-id"] == answer.headers["x-request-id"] != "bad id"
            assert len(ids) == 3


COUNT = 424242  # stands for a count until the odd one is put there, which json could not write
NAMES = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
COUNTED = {
    "usage": dict.fromkeys(NAMES, COUNT),
    "prompt_eval_count": COUNT,
    "eval_count": COUNT,
    "timings": {"predicted_n": COUNT, "prompt_n": COUNT},
}
ODD_COUNTS = {
    "400 digits": "9" * 400,
    "-400 digits": "-" + "9" * 400,
    "negative": "-7",
    "true": "true",
    "false": "false",
    "float": "2.5",
    "huge": "1e300",
    "infinite": "1e999",
    "text": '"7"',
    "list": "[7]",
    "null": "null",
}


def counting(dialect: Dialect, count: str) -> tuple[bytes, list[bytes]]:
    """A whole answer and a streamed one that tell this count wherever one may stand."""
    answer = json.dumps({**dialect.whole("m", "hi"), **COUNTED}).encode()
    pieces: list[bytes] = []
    if dialect.streams:
        *pieces, last = dialect.pieces("m", "hi")
        frame = {"model": "m", "choices": [], "type": "message_delta", **COUNTED}
        if dialect.path == "/v1/responses":
            whole = {**dialect.whole("m", "hi"), **COUNTED}
            last = named_event("response.completed", {"type": "x", "response": whole})
        elif dialect.path.startswith("/api/"):
            last = line({**dialect.whole("m", ""), **COUNTED})
        elif dialect.path == "/v1/messages":
            pieces.append(named_event("message_delta", frame))
        else:
            pieces.append(sse(frame))
        pieces.append(last)
    digits = str(COUNT).encode(), count.encode()
    return answer.replace(*digits), [piece.replace(*digits) for piece in pieces]


async def sound_books(q: running, number: int) -> None:
    """So many requests have ended well, and no figure anywhere is absurd."""
    rows = await ended(q, number)
    assert [row["outcome"] for row in rows] == ["done"] * number
    for row in rows:
        for tokens in (row["tokens"], row["tokens_in"]):
            assert tokens is None or (type(tokens) is int and 0 <= tokens < 2**63), tokens
    text = (await ask(q.port, "GET", "/metrics")).body.decode()
    for name, value in re.findall(r"^(llmq_\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        assert 0 <= float(value) < 2**63, (name, value)


@pytest.mark.parametrize("count", ODD_COUNTS.values(), ids=ODD_COUNTS)
@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_odd_count_of_tokens_harms_neither_answer_nor_books(
    dialect: Dialect, count: str
) -> None:
    kind = "vllm" if dialect.path == "/v1/rerank" else "ollama"
    answer, pieces = counting(dialect, count)
    settings = {"cache__embeddings": False}  # each is asked twice
    async with (
        Runner(kind=kind) as fake,
        running(fake.url, **settings) as q,
        await Raw.open(q.port) as raw,
    ):
        await told(q)
        for streamed in [False, True] * 2 if pieces else [False] * 2:  # one connection for all
            await raw.send(dialect.request("hi", streamed))
            answering = asyncio.ensure_future(raw.response())
            request = await arrival(answering, fake)
            if streamed:
                await stream(request, pieces, dialect.media)
            else:
                await request.status(200, answer)
            got = await asyncio.wait_for(answering, 5)
            assert (got.status, got.clean) == (200, True)
            assert got.body == (b"".join(pieces) if streamed else answer)
        await sound_books(q, 4 if pieces else 2)


@pytest.mark.parametrize("count", list(ODD_COUNTS.values())[:7], ids=list(ODD_COUNTS)[:7])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_odd_count_of_tokens_harms_no_answer_that_is_translated(
    streamed: bool, count: str
) -> None:
    answer, pieces = counting(NATIVE_CHAT, count)
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await told(q)
        for _ in range(2):
            usage = {"stream_options": {"include_usage": True}} if streamed else {}
            await raw.send(OPENAI_CHAT.request("hi", streamed, numCtx=8192, **usage))
            answering = asyncio.ensure_future(raw.response())
            request = await arrival(answering, fake)
            assert request.path == "/api/chat"
            if streamed:
                await stream(request, pieces)
            else:
                await request.status(200, answer)
            got = await asyncio.wait_for(answering, 5)
            assert OPENAI_CHAT.text(got) == "hi"
        await sound_books(q, 2)


def test_generator_makes_what_it_says() -> None:
    """The documents are JSON, and say what their pieces say: json.loads is the judge."""
    chance = random.Random(5)
    for path in ALL_ROUTES:
        for document in documents(chance, path, "m", OWN):
            meant = json.loads(document.body)
            assert list(meant) == document.names
            assert meant["model"] == "m"
            alone = [json.loads(one) for one in document.values]
            assert [repr(one) for one in meant.values()] == [repr(one) for one in alone]
    for path in STREAMED:
        for _ in range(RUNS):
            made = events(chance, path)
            assert b"".join(cuts(chance, made)) == made
            said = [one for one in made.splitlines() if one.startswith((b"data:", b"{"))]
            for one in said:
                assert b"[DONE]" in one or json.loads(one.partition(b"data:")[2] or one)
    for _ in range(RUNS):
        assert json.loads(answers(chance))["done"] is True
