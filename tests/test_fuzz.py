"""Seeded mutations of a kept corpus: no exception, no hang, and no cut of the bytes matters.

`python -m tests.test_fuzz 1000000 7` is the long run, with a seed; a failing input is printed as
bytes together with its number, and `python -m tests.test_fuzz 1 7 12345` runs that one again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from tests import corpus
from tests.derived import build_settings

pytestmark = pytest.mark.untraced

COUNT = int(os.environ.get("LLMQ_FUZZ", "20000"))
SEED = os.environ.get("LLMQ_FUZZ_SEED", "1")
SLOW = 5.0  # seconds of processor time for one input: far above any of them
ALARM = 30  # seconds for one input of the long run
LEFT_OUT = "a tool call of an answer is left out"  # what may be logged: it is no fault of llmq's
BODY_LIMIT = 4096  # small, so that mutations meet it
RECORDINGS = Path(__file__).parent / "real" / "recordings"

TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b'"', b"\\", b"\xa0", b"\xff"),
    *(b"{", b"}", b"[", b"]", b"null", b"NaN", b"1e999", b"\\ud800", b"\\u", b"\xef\xbb\xbf"),
    *(b"0\r\n\r\n", b"\r\n\r\n", b"1\r\nx\r\n", b"F" * 16, b"9" * 19, b"9" * 5000, b"-1", b"+1"),
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0", b"GET / HTTP/1.1\r\n", b"http://h/", b"Host: a\r\n"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n"),
    *(b"Keep-Alive: timeout=5\r\n", b"Content-Type: text/event-stream\r\n", b"Retry-After: 5\r\n"),
    *(b"data: [DONE]\n\n", b"data: ", b"[DONE]", b"error: {}\n\n", b'data: {"error":"x"}\n\n'),
    *(b'"error":', b'"usage":{"completion_tokens":3}', b'"model":"m",', b'"priority":"low",'),
    *(b'"numCtx":1,', b'"stream":true,', b"[" * 120, b'{"a":' * 120, b"A" * 300, b"X: y\r\n" * 101),
    *(
        b'"options":{"num_ctx":9},',
        b'"num_ctx":',
        b'"keep_alive":0,',
        b"null",
        b"true",
        b"7",
        b'"x"',
    ),
    *(b'"done":true', b'{"done":true}\n', b'{"error":"x"}\n', b"event: message_stop\n", b"\n\n"),
    *(b"event: response.completed\n", b"event: response.failed\n", b"event: error\n", b"event: "),
    *(b'"usage":7,', b'"index":"a",', b'"embedding":["a"],', b'"tool_calls":[{}],', b"1e300"),
]

# ---- Mutations -----------------------------------------------------------------------------------


def span(chance: random.Random, data: bytearray) -> slice:
    start = chance.randint(0, len(data))
    return slice(start, min(len(data), start + chance.choice([1, 1, 2, 4, 16, 100, 1000])))


def set_byte(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def insert_token(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    at = chance.randint(0, len(data))
    data[at:at] = chance.choice(TOKENS)


def overwrite(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    data[span(chance, data)] = chance.choice(TOKENS)


def remove(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    del data[span(chance, data)]


def double(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    which = span(chance, data)
    data[which.start : which.start] = data[which]


def move(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    which = span(chance, data)
    piece = data[which]
    del data[which]
    at = chance.randint(0, len(data))
    data[at:at] = piece


def truncate(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    del data[chance.randint(0, len(data)) :]


def splice(chance: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = chance.choice(others)
    data[chance.randint(0, len(data)) :] = other[chance.randint(0, len(other)) :]


def append(chance: random.Random, data: bytearray, others: list[bytes]) -> None:
    data += chance.choice(others)


def count_on(chance: random.Random, data: bytearray, _: list[bytes]) -> None:
    """Another digit in place of one: sizes and lengths that are a little off."""
    digits = [at for at, byte in enumerate(data[:2000]) if 48 <= byte <= 57]
    if digits:
        data[chance.choice(digits)] = chance.choice(b"0123456789aF")


MUTATIONS = [
    *(set_byte, insert_token, insert_token, overwrite, remove, double, move),
    *(truncate, splice, append, count_on, count_on),
]


def mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([0, 1, 1, 1, 2, 2, 3, 5])):
        chance.choice(MUTATIONS)(chance, data, seeds)
    return bytes(data)


def cut(chance: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces, now and then one by one."""
    if len(data) < 2000 and chance.random() < 0.04:
        return [data[at : at + 1] for at in range(len(data))]
    places = sorted(chance.randint(0, len(data)) for _ in range(chance.choice([1, 1, 2, 4, 8])))
    edges = [0, *places, len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:]) if end > start]


# ---- The reading code, without sockets and without turns of the loop -----------------------------


class Transport:
    """All that a connection does to its transport, noted."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.handled: list[Any] = []  # by the handler below
        self.closing = False
        self.paused = False

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.sent.append(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.sent.append(b"(end)")

    def abort(self) -> None:
        self.closing = True

    close = abort

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int = 0) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else None

    def setsockopt(self, *option: Any) -> None:
        pass


class Stream(llmq.Stream):
    def __init__(self) -> None:
        super().__init__()
        self.connection_made(Transport())  # type: ignore[arg-type]

    async def linger(self, timeout: float) -> None:
        """Without a clock: the end of the bytes always comes here."""
        ended = asyncio.get_running_loop().create_future()
        self.room, self.on_end = 0, lambda: ended.set_result(timeout)
        self.transport.resume_reading()
        if not self.ended:
            await ended


def is_over(wait: Any) -> bool:
    """Whether what a coroutine waits for has come."""
    return bool(wait._woken if isinstance(wait, llmq.Waiter) else wait.done())


class Driven:
    """A coroutine that waits for nothing but its stream, run as far as it gets."""

    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine
        self.waits_for: Any = None  # what only more bytes complete
        self.done = False
        self.result: Any = None

    def run(self) -> None:
        try:
            while self.waits_for is None or is_over(self.waits_for):
                self.waits_for = self.coroutine.send(None)
        except StopIteration as end:
            self.done, self.result = True, end.value
        except BaseException:
            self.done = True
            raise

    def feed(self, stream: Stream, pieces: list[bytes]) -> Any:
        """Give it these bytes, then the end; it has to be done by then."""
        try:
            self.run()
            for piece in pieces:
                if not self.done:
                    assert not stream.transport.paused, "it waits, and does not listen"
                    stream.data_received(piece)
                    self.run()
            if not self.done:
                stream.eof_received()
                self.run()
            assert self.done, "it waits for more than there will ever be"
        finally:
            self.coroutine.close()
        return self.result


class Raising(logging.Handler):
    """What the last resort of a connection would log is a failure here."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING and record.getMessage().startswith(LEFT_OUT):
            return
        raise record.exc_info[1] if record.exc_info and record.exc_info[1] else AssertionError


async def handle(exchange: llmq.Exchange) -> None:
    """What routes do to an exchange, in small; a query asks for the other ends."""
    request = exchange.request
    noted = [request.method, request.path, request.query, request.minor]
    transport: Any = exchange.connection.stream.transport
    transport.handled.append((*noted, request.headers))
    try:
        llmq.parse_host(request.headers.get("host", "?"))
        if request.method not in ("POST", "PUT"):
            exchange.respond(200, b"ok", "text/plain")
            return
        await exchange.read_body(BODY_LIMIT)
        transport.handled.append(request.body)
        endpoint = llmq.ENDPOINTS.get(request.path, llmq.ENDPOINTS[llmq.CHAT])
        question, _ = llmq.read_question(
            request.body, endpoint, request.headers.get("x-queue-priority")
        )
        if not question.stream:
            exchange.respond(200, question.body_for("other", 4096))
            return
        exchange.start(200, "text/event-stream")
        exchange.send(b"data: 1\n\n")
        if request.query:
            exchange.fail(b"data: failed\n\n")
        else:
            exchange.finish(b"data: [DONE]\n\n")
    except llmq.ClientLeft:
        raise
    except llmq.LlmqError as error:
        if exchange.connection.phase is llmq.Phase.BODY:
            raise  # its body was broken: nothing behind it can be read
        dialect = llmq.dialect_of(request.path, request.headers)
        exchange.respond(error.status, dialect.render_error(error))


SERVER = llmq.HttpServer(handle, build_settings({}), 1024)
SERVER.date = "then"


def serve(pieces: list[bytes]) -> tuple[list[Any], bytes]:
    """The requests on one connection, and all that is answered."""
    stream = Stream()
    connection = llmq.Connection(SERVER, stream)
    Driven(connection.run()).feed(stream, pieces)
    given = sum(map(len, pieces))
    assert 0 <= stream.unread <= stream.received <= given
    bodies = [one for one in stream.transport.handled if isinstance(one, bytes)]
    assert sum(map(len, bodies)) <= given
    return stream.transport.handled, b"".join(stream.transport.sent)


async def ask(upstream: llmq.Upstream) -> Any:
    """An answer; then its connection is kept only if nothing in it is left unread."""
    try:
        return await read(upstream)
    finally:
        if upstream.reusable:
            rest = Driven(upstream.stream.more())
            rest.run()
            rest.coroutine.close()
            assert not rest.done, "a connection with unread bytes is kept for the next request"


async def read(upstream: llmq.Upstream) -> Any:
    """What the gateway does with an answer, in small."""
    head = await upstream.read_head()
    if head.status != 200:
        refusal = llmq.read_refusal(head, await upstream.read_rest(llmq.ERROR_BODY))
        told = [dialect.render_error(refusal, "id") for dialect in DIALECTS.values()]
        return head, type(refusal), refusal.status, told
    kind = head.headers.get("content-type", "")
    for dialect in (llmq.OPENAI, llmq.OLLAMA):
        if kind.startswith(dialect.stream_type):
            watch, shown = llmq.StreamWatch(dialect), []
            while not upstream.body.done:
                shown.append(watch.feed(await upstream.read_piece()))
                assert dialect is llmq.OLLAMA or b"\ndata: [DONE]" not in b"\n" + b"".join(shown)
            return head, b"".join(shown) + watch.finish(), watch.tokens
    body = await upstream.read_rest(SERVER.settings.upstream.max_answer)
    try:
        llmq.check_route_known(body)
    except llmq.RouteUnsupported as lack:
        return head, body, type(lack), lack.message
    document = llmq.read_whole(body)
    for translator in translators():
        with contextlib.suppress(llmq.BackendError):
            llmq.render_json(translator.translate(translator.whole, document))
    return head, body, document, llmq.read_usage(document)


def answer(pieces: list[bytes]) -> Any:
    """An answer as read from a backend, or the kind of error that it is."""
    stream = Stream()
    upstream = llmq.Upstream("http://b", stream)
    upstream.send(b"a request")
    driven = Driven(ask(upstream))
    try:
        result = driven.feed(stream, pieces)
    except llmq.BackendError as error:
        return type(error)
    return result


Check = Callable[[bytes, random.Random], None]


# ---- Checks: each gets an input and says by an exception what is wrong with llmq -----------------


def check_cuts(read: Callable[[list[bytes]], Any], data: bytes, pieces: list[bytes]) -> None:
    parts, whole = read(pieces), read([data] if data else [])
    lengths = [len(piece) for piece in pieces]
    assert parts == whole, f"cut {lengths}: {parts!r:.400}\nwhole: {whole!r:.400}"


def check_requests(data: bytes, chance: random.Random) -> None:
    check_cuts(serve, data, cut(chance, data))


def check_answers(data: bytes, chance: random.Random) -> None:
    check_cuts(answer, data, cut(chance, data))


def decoded(pieces: list[bytes]) -> Any:
    body, payload, behind = llmq.ChunkedBody(), b"", b""
    try:
        for piece in pieces:
            if body.done:
                behind += piece
            else:
                payload += body.feed(piece)
                behind = body.surplus
    except ValueError:
        return ValueError
    assert len(payload) + len(behind) <= sum(map(len, pieces))
    return payload, body.done, behind


def check_chunks(data: bytes, chance: random.Random) -> None:
    check_cuts(decoded, data, cut(chance, data))


DIALECTS = {
    "openai": llmq.OPENAI,
    "responses": llmq.ENDPOINTS["/v1/responses"].dialect,
    "ollama": llmq.OLLAMA,
    "anthropic": llmq.ANTHROPIC,
}


def watched(dialect: llmq.Dialect, pieces: list[bytes]) -> Any:
    watch, shown = llmq.StreamWatch(dialect), b""
    try:
        for piece in pieces:
            shown += watch.feed(piece)
        rest = watch.finish()
    except llmq.BackendError:
        return llmq.BackendError
    assert shown + rest == b"".join(pieces), "nothing is lost, nothing made up"
    return shown, rest, watch.tokens


WATCHED = {name: functools.partial(watched, dialect) for name, dialect in DIALECTS.items()}


def is_doubtful(data: bytes) -> bool:
    """Whether a line of Ollama ends well, and then goes on: its end may be seen too early."""
    for line in data.splitlines():
        for at, byte in enumerate(line):
            if byte == ord("}") and line[at + 1 :].strip() and b"true" in line[:at]:
                document = llmq.parse_json(line[: at + 1])
                if isinstance(document, dict) and document.get("done") is True:
                    return True
    return False


def stream_checker(name: str) -> Check:
    def check_streams(data: bytes, chance: random.Random) -> None:
        if name != "ollama" or not is_doubtful(data):
            check_cuts(WATCHED[name], data, cut(chance, data))

    return check_streams


ASKED = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "input": ["hi"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "encoding_format": "base64",
}


def translators() -> list[llmq.Translator]:
    """One of each, in the middle of nowhere in time."""
    return [kind(ASKED, "m", 0, lambda: 7.5) for kind in llmq.TRANSLATORS.values()]


def retold(pieces: list[bytes]) -> list[Any]:
    """What each translator makes of a stream."""
    return [retold_by(one, pieces) for one in translators() if streams(one)]


def streams(translator: llmq.Translator) -> bool:
    return hasattr(translator, "piece")


def retold_by(translator: llmq.Translator, pieces: list[bytes]) -> Any:
    try:
        shown = b"".join([translator.feed(piece) for piece in pieces])
        return shown + translator.finish(b"")
    except llmq.BackendError:
        return llmq.BackendError


def check_retold(data: bytes, chance: random.Random) -> None:
    check_cuts(retold, data, cut(chance, data))


def check_answers_retold(data: bytes, _chance: random.Random) -> None:
    """A whole answer: retold as JSON, or known to be none."""
    document = llmq.parse_json(data)
    for translator in translators():
        try:
            told = llmq.render_json(translator.translate(translator.whole, document))
        except llmq.BackendError:
            continue
        assert isinstance(json.loads(told), dict)


def check_asked(data: bytes, _chance: random.Random) -> None:
    """A request that has to be translated: JSON for the other route, or refused."""
    document = llmq.parse_json(data)
    for (asked, _), kind in llmq.TRANSLATORS.items():
        try:
            llmq.ENDPOINTS[asked].check(document if isinstance(document, dict) else {})
            body = kind(document, "m", 4096, lambda: 7.5).body()
        except (llmq.BadRequest, llmq.Untranslatable):
            continue
        assert json.loads(body)["model"] == "m"


def strict(text: str) -> Any:
    """The members of a JSON object as the standard library reads it; None when it is none."""
    try:
        document = json.loads(text, parse_constant=llmq.refuse_constant)
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or len(document) != len(pairs):
        return None
    return document


def is_too_much(document: dict[str, Any]) -> bool:
    """Whether it has more keys, or a longer one, than llmq reads."""
    return len(document) > 1000 or any(len(name) > 1024 for name in document)


def check_bodies(data: bytes, _chance: random.Random) -> None:
    try:
        text = llmq.decode_json(data)
        found = llmq.read_object(text)
    except llmq.BadRequest as error:
        text = data.decode("utf-8", "replace")
        deep = text.count("{") + text.count("[") > llmq.DEPTH_LIMIT
        document = strict(text)
        refused = deep or text.encode() != data or document is None or is_too_much(document)
        assert refused, error.message  # noqa: PT017 - why a good one was not taken
        return
    meaning = strict(text)
    assert found.values == meaning
    assert not is_too_much(meaning)
    left = llmq.rewrite(found, {}, llmq.EXTENSIONS)
    kept = {name: value for name, value in meaning.items() if name not in llmq.EXTENSIONS}
    assert strict(left) == kept
    for endpoint in llmq.ENDPOINTS.values():
        check_question(data, endpoint, left, kept)


def check_question(data: bytes, endpoint: llmq.Endpoint, left: str, kept: Any) -> None:
    """The same bytes but for own fields; the model and the context where they belong."""
    try:
        question, values = llmq.read_question(data, endpoint)
        foreign, _ = llmq.read_question(data, endpoint, foreign=True)
    except llmq.BadRequest:
        return
    assert question.body == data
    assert {**kept, **values} == values
    assert question.body_for(question.model).decode() == left
    assert strict(question.body_for("other").decode()) == {**kept, "model": "other"}
    carried = json.loads(question.body_for("other", 4096))
    if endpoint.options:
        assert carried["options"]["num_ctx"] == 4096
        carried["options"].pop("num_ctx")
        meant = {**(kept.get("options") or {}), "num_ctx": 0}
        meant.pop("num_ctx")
        assert carried == {**kept, "model": "other", "options": meant}
        passed_on = json.loads(foreign.body_for(foreign.model))
        assert "num_ctx" not in (passed_on.get("options") or {})
    else:
        assert carried == {**kept, "model": "other"}
    assert foreign.context == 0


# ---- The corpus ----------------------------------------------------------------------------------

MESSAGES = b'"messages":[{"role":"user","content":"hi \xf0\x9f\xa6\x99"}]'
BODIES = [
    b"{" + MESSAGES + b"}",
    b'{"model":"m",' + MESSAGES + b',"stream":true,"priority":"low","numCtx":4096}',
    b' { "priority" : true ,\n"model" : "\\u006d\\n" , ' + MESSAGES + b' , "numCtx" : 1 }\r\n',
    b'{"numCtx":null,"priority":null,"model":null,' + MESSAGES + b',"stop":[],"x":{}}',
    b'{"a":[1,-0.5e+9,true,null,"\\"\\\\\\/\\ud83e\\udd99",{"model":{"priority":[[]]}}],'
    + MESSAGES
    + b"}",
    b'{"x":' + b"[" * 98 + b"]" * 98 + b"," + MESSAGES + b"}",
    b"{" + b"".join(b'"%d":0,' % number for number in range(998)) + MESSAGES + b"}",
    b'{"' + b"a" * 1023 + b'":0,' + MESSAGES + b',"\\n' + b"b" * 1022 + b'":1}',
    b"{}",
    b"{"
    + MESSAGES
    + b',"model":"m","options":{"temperature":0.5,"num_ctx":4096,"a":{"num_ctx":1}}}',
    b"{" + MESSAGES + b',"options":null,"keep_alive":-1,"numCtx":7}',
    b'{"prompt":"hi","input":["hi"],"options":{ } ,"stream":null,"model":"\xc3\xa9"}',
    *(corpus.saying(text) for text in (b"first", b"\\u0000", b"[DONE]")),
]
CALL = b'{"id":"a","type":"function","function":{"name":"f","arguments":"{\\"x\\":1}"}}'
NATIVE_CALL = b'{"id":"a","function":{"index":0,"name":"f","arguments":{"x":1}}}'
IMAGE = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo="}}'
ASKING = [
    *BODIES,
    b'{"messages":[{"role":"system","content":"x"},{"role":"user","content":[{"type":"text",'
    b'"text":"hi"},'
    + IMAGE
    + b']},{"role":"assistant","content":null,"tool_calls":['
    + CALL
    + b']},{"role":"tool","tool_call_id":"a","content":"7"}],"tools":[{"type":"function"}],'
    b'"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"type":"object"'
    b'}}},"stop":"x","max_tokens":7,"seed":1,"reasoning_effort":"high","logprobs":true}',
    b'{"messages":[{"role":"user","content":"hi","images":["iVBORw0KGgo="]},{"role":"assistant",'
    b'"content":"","thinking":"hm","tool_calls":[' + NATIVE_CALL + b']},{"role":"tool","tool_name":'
    b'"f","content":"7"}],"format":{"type":"object"},"think":true,"options":{"num_predict":7,'
    b'"stop":["x"],"top_k":3},"stream":false}',
    b'{"prompt":"hi","suffix":"x","logprobs":2,"max_tokens":1,"options":{"num_predict":-1}}',
    b'{"prompt":["hi"],"input":[[1,2]],"encoding_format":"base64","dimensions":3}',
]
ANSWERS = [
    b'{"message":{"role":"assistant","content":"hi","thinking":"hm","tool_calls":['
    + NATIVE_CALL
    + b']},"done":true,"done_reason":"stop","prompt_eval_count":3,"eval_count":4,"logprobs":[{}]}',
    b'{"response":"hi","done":true,"done_reason":"length","prompt_eval_count":3,"eval_count":4}',
    b'{"embeddings":[[0.5,-1,1e10],[0.25]],"prompt_eval_count":3}',
    b'{"choices":[{"message":{"content":"hi","reasoning_content":"hm","tool_calls":['
    + CALL
    + b']},"finish_reason":"tool_calls","logprobs":{"content":[{}]}}],"usage":{"prompt_tokens":3,'
    b'"completion_tokens":4}}',
    b'{"choices":[{"text":"hi","finish_reason":"length"}],"usage":{"prompt_tokens":3}}',
    b'{"data":[{"embedding":[0.5,1],"index":0}],"usage":{"prompt_tokens":3}}',
]
CHUNKS = [
    corpus.CHUNKS,
    *(case for name, case, _ in corpus.rows(corpus.GOOD_CHUNKS) if name),
    b"5;a=b\r\nhello\r\n0\r\nX: y\r\nZ:\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"1\r\n\r\r\n1\r\n\n\r\n2\r\n\r\n\r\n0\r\n\r\n",
    b"1;" + b"a" * 250 + b"\r\nx\r\n0\r\nA: " + b"b" * 8000 + b"\r\n\r\n",
]


def recorded() -> list[bytes]:
    return [path.read_bytes() for path in sorted(RECORDINGS.glob("*.response.txt"))]


def request_seeds() -> list[bytes]:
    """Every request of the corpus; the good ones, which are few, as often as the others."""
    absolute = corpus.get(target=b"http://localhost/health")
    streams = corpus.post(b"Content-Length: %d\r\n" % len(BODIES[1]), BODIES[1])
    failing = streams.replace(b" HTTP/1.1", b"?x HTTP/1.1")
    old = streams.replace(b"HTTP/1.1", b"HTTP/1.0")
    chunked = corpus.post(corpus.CHUNKED, corpus.chunk(BODIES[1]) + corpus.LAST)
    long = [BODIES[0] + b" " * (size - len(BODIES[0])) for size in (BODY_LIMIT, BODY_LIMIT + 1)]
    return [
        *corpus.REQUESTS.values(),
        absolute,
        streams + absolute,
        failing,
        old,
        chunked + chunked,
        *(corpus.post(corpus.CHUNKED, corpus.chunk(body) + corpus.LAST) for body in long),
        corpus.post(corpus.CHUNKED, corpus.chunk(long[1]) + b"zz\r\n"),
        corpus.post(corpus.CHUNKED, b"9" * 400 + b"\n"),
    ]


def answer_seeds() -> list[bytes]:
    plain = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    return [
        *recorded(),
        plain + b"Content-Length: 2\r\n\r\n{}" + plain,
        plain + b"Content-Length: 0\r\n\r\n" + plain + b"Content-Length: 2\r\n\r\n{}",
        plain + b"\r\n{}",
        plain + b"Keep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + plain + b"Content-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 503 Unavailable\r\nRetry-After: 5\r\nContent-Length: 17\r\n\r\n"
        b'{"error":"later"}',
    ]


def payloads(kind: bytes) -> list[bytes]:
    """The bodies of recorded streams of this type."""
    return [
        llmq.ChunkedBody().feed(data[data.index(b"\r\n\r\n") + 4 :])
        for data in recorded()
        if kind in data.partition(b"\r\n\r\n")[0]
    ]


def event(kind: str, **facts: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n".encode()


def stream_seeds() -> dict[str, list[bytes]]:
    """Good and bad streams of each dialect."""
    piece = b'data: {"choices":[{"delta":{"content":"[DONE]"}}]}\n\n'
    failed = b'data: {"error":{"message":"x"}}\n\n'
    answer = event("response.output_text.delta", delta="event: response.completed\n")
    said = event("content_block_delta", delta={"type": "text_delta", "text": "message_stop"})
    lines = ["", " hi", '"done":true']
    chat = [{"message": {"role": "assistant", "content": line}, "done": False} for line in lines]
    lined = "".join(json.dumps(line) + "\n" for line in chat).encode()
    last = b'{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":4}\n'
    return {
        "openai": [
            *payloads(b"text/event-stream"),
            piece + failed,
            piece.replace(b"\n", b"\r\n") + b"data: [DONE]\r\n\r\n",
            failed,
        ],
        "responses": [
            answer + event("response.completed", response={"usage": {"output_tokens": 4}}),
            answer + event("response.incomplete", response={}) + b"data: [DONE]\n\n",
            answer + event("response.failed", response={"error": {"message": "x"}}),
            answer + event("error", message="x"),
        ],
        "ollama": [
            *payloads(b"application/x-ndjson"),
            lined + last,
            (lined + last).replace(b"\n", b"\r\n") + b"\n",
            b" " + lined + b'  {"error":"x"}\n' + last,
        ],
        "anthropic": [
            event("ping")
            + said
            + event("message_delta", usage={"output_tokens": 4})
            + event("message_stop"),
            (said + event("message_stop")).replace(b"\n", b"\r\n"),
            said + event("error", error={"type": "overloaded_error", "message": "x"}),
        ],
    }


def retold_seeds() -> list[bytes]:
    """Streams that a translator gets: what both sides send, tool calls in bits, thoughts, usage."""
    seeds = stream_seeds()
    delta = (
        b'data: {"choices":[{"delta":{"reasoning_content":"hm","tool_calls":[{"index":0,"id":"a",'
    )
    delta += b'"function":{"name":"f","arguments":"{\\"x\\":"}}]}}]}\n\n'
    more = b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1}"}}]},'
    more += b'"finish_reason":"tool_calls","text":"hi"}],"usage":{"completion_tokens":4}}\n\n'
    native = b'{"message":{"content":"","thinking":"hm","tool_calls":[' + NATIVE_CALL
    native += b']},"response":"hi","done":false}\n{"message":{"content":""},"response":"",'
    native += b'"done":true,"done_reason":"stop","eval_count":4,"prompt_eval_count":3}\n'
    return [*seeds["openai"], *seeds["ollama"], delta + more + b"data: [DONE]\n\n", native]


STREAMS = stream_seeds()
TARGETS: dict[str, tuple[Check, list[bytes]]] = {
    "requests": (check_requests, request_seeds()),
    "answers": (check_answers, answer_seeds()),
    "chunks": (check_chunks, CHUNKS),
    "bodies": (check_bodies, BODIES),
    "asked": (check_asked, ASKING),
    "retold": (check_retold, retold_seeds()),
    "answers retold": (check_answers_retold, ANSWERS),
    **{name: (stream_checker(name), seeds) for name, seeds in STREAMS.items()},
}
TURNS = ["requests"] * 6 + ["answers"] * 3 + ["chunks", "chunks", "bodies", "bodies"]
TURNS += [*STREAMS, "asked", "retold", "answers retold"]


def check(name: str, data: bytes, chance: random.Random) -> None:
    """One input; whatever is wrong with it is told with its bytes."""
    start = time.process_time()
    try:
        TARGETS[name][0](data, chance)
        spent = time.process_time() - start
        assert spent < SLOW, f"it took {spent:.1f} s"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} {error}\n{name} = {data!r}") from error


def check_number(number: int, seed: str) -> None:
    """One input by its number: the same in every run with this seed."""
    chance = random.Random(f"{seed} {number}")
    name = TURNS[number % len(TURNS)]
    try:
        check(name, mutated(chance, TARGETS[name][1]), chance)
    except AssertionError as error:
        raise AssertionError(f"input {number} of seed {seed}: {error}") from error.__cause__


def raising(run: Callable[[], None]) -> None:
    """With a loop for the futures, and with nothing swallowed into the log."""
    handler = Raising()

    async def inside() -> None:
        run()

    llmq.log.addHandler(handler)
    try:
        asyncio.run(inside())
    finally:
        llmq.log.removeHandler(handler)


# ---- Tests ---------------------------------------------------------------------------------------


@pytest.mark.deadline(60)
@pytest.mark.parametrize("name", TARGETS)
def test_kept_input_is_the_same_whole_and_byte_by_byte(name):
    def run() -> None:
        apart = {
            "requests": serve,
            "answers": answer,
            "chunks": decoded,
            "retold": retold,
            **WATCHED,
        }
        for data in set(TARGETS[name][1]):
            check(name, data, random.Random(0))
            if name in apart and len(data) < 10_000:
                pieces = [data[at : at + 1] for at in range(len(data))]
                check_cuts(apart[name], data, pieces)

    raising(run)


@pytest.mark.deadline(60 + COUNT / 200)
def test_mutated_input_is_never_an_exception_a_hang_or_a_matter_of_its_cuts():
    def run() -> None:
        for number in range(COUNT):
            check_number(number, SEED)

    raising(run)


NOTHING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
STRAY = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
FULL = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % llmq.UNREAD_LIMIT


@pytest.mark.parametrize("first", [NOTHING, FULL + b"x" * llmq.UNREAD_LIMIT], ids=["empty", "full"])
def test_connection_with_an_answer_that_nobody_asked_for_is_not_kept(first):
    raising(lambda: answer([first + STRAY]) and None)


@pytest.mark.parametrize(
    "planted",
    [
        "parse_request_head",
        "parse_response_head",
        "read_question",
        "read_usage",
        "read_object",
        "find_edits",
    ],
)
def test_planted_fault_is_found(planted, monkeypatch):
    """The fuzz test itself: an exception that nobody may see is told with its input."""

    def broken(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(llmq, planted, broken)
    with pytest.raises(AssertionError, match=r"KeyError 'planted'\n\w+ = b'"):
        raising(lambda: [check_number(number, "x") for number in range(200)] and None)


def test_planted_hang_is_found():
    async def waits() -> None:
        await asyncio.get_running_loop().create_future()

    def run() -> None:
        with pytest.raises(AssertionError, match="waits"):
            Driven(waits()).feed(Stream(), [b"x"])

    raising(run)


def test_planted_dependence_on_the_cuts_is_found(monkeypatch):
    class Forgetful(llmq.ChunkedBody):
        def feed(self, data: bytes) -> bytes:
            self._held = b""
            return super().feed(data)

    monkeypatch.setattr(llmq, "ChunkedBody", Forgetful)
    with pytest.raises(AssertionError, match=r"chunks = b'"):
        raising(
            lambda: (
                [
                    check_number(number, "x")
                    for number in range(TURNS.index("chunks"), 4000, len(TURNS))
                ]
                and None
            )
        )


# ---- The long run --------------------------------------------------------------------------------


def overdue(*_: object) -> None:
    raise TimeoutError("it hangs")


def main(arguments: list[str]) -> int:
    count, seed, first = [*arguments, *("1000000", "1", "0")[len(arguments) :]]
    numbers = range(int(first), int(first) + int(count))
    start = time.monotonic()

    def run() -> None:
        for number in numbers:
            signal.alarm(ALARM)
            check_number(number, seed)
            if number % 100_000 == 99_999:
                print(f"{number + 1} inputs, {time.monotonic() - start:.0f} s", flush=True)  # noqa: T201
        signal.alarm(0)

    signal.signal(signal.SIGALRM, overdue)
    try:
        raising(run)
    except AssertionError as error:
        print(f"FAILED: {error}", flush=True)  # noqa: T201
        return 1
    print(f"ok: {count} inputs of seed {seed}, {time.monotonic() - start:.0f} s")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
