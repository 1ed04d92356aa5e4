"""A runner that speaks every dialect, loads models with a context, and takes models in and out.

async with Runner(models=["m"]) as fake, running(fake.url) as q:
    answer = await NATIVE_CHAT.ask(q.port, "hello there")
    assert NATIVE_CHAT.text(answer) == "hello there"
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from typing import Any

from tests.fakes import (
    Answer,
    Connection,
    FakeBackend,
    FakeRequest,
    Raw,
    chunk,
    completion,
    completion_chunk,
    http,
    render_head,
    sse,
    words,
)

DEFAULT_CONTEXT = 4096  # what this runner loads a model with when it is told nothing
MANAGEMENT = (
    *("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/"),
    *("/api/me", "/api/signout"),
)
JSON = {"Content-Type": "application/json"}
WHEN = "2026-11-21T08:50:35.466200792Z"
NO_ROUTE = b"404 page not found"  # what Ollama says where it has no route


# ---- Dialects, from both sides ---------------------------------------------------------------


def named(event: str, **payload: Any) -> bytes:
    """A server-sent event with its name, as Anthropic and the responses route write it."""
    return f"event: {event}\n".encode() + sse({"type": event, **payload})


def line(**payload: Any) -> bytes:
    """One line of NDJSON."""
    return json.dumps(payload).encode() + b"\n"


def parse_events(body: bytes) -> list[tuple[str, Any]]:
    """(name, data) of each event, read by the letter of the specification of server-sent events.

    Comments vanish, an event without data is none, and what no empty line ended is dropped.
    """
    found: list[tuple[str, Any]] = []
    name, data = "", []
    for text in body.decode().split("\n")[:-1]:
        if not text:
            if data:
                found.append((name, read("\n".join(data))))
            name, data = "", []
        field, _, value = text.partition(":")
        if field == "event":
            name = value.removeprefix(" ")
        elif field == "data":
            data.append(value.removeprefix(" "))
        else:
            assert not field, f"neither a comment nor a field that SDKs bear: {text!r}"
    return found


def parse_lines(body: bytes) -> list[Any]:
    """The objects of an NDJSON stream, as Ollama's clients read it: an empty line is an error."""
    lines = body.split(b"\n")
    return [json.loads(one) for one in (lines if lines[-1] else lines[:-1])]


def read(text: str) -> Any:
    return text if text == "[DONE]" else json.loads(text)


class Dialect:
    """One inference route: what a client sends, what a runner answers, what the client reads."""

    path = ""
    streams = True
    default_stream = False  # when the request does not say
    media = "text/event-stream"
    sign = rb": position=\d+(?: eta=\d+)?\n"  # of life, in a stream that waits

    def __repr__(self) -> str:
        return self.path

    def body(self, text: str, stream: bool = False, model: str = "m", **more: Any) -> Any:
        """The request's body as an object."""
        asked = {"model": model, **self.asked(text), **more}
        return {**asked, "stream": stream} if self.streams else asked

    def request(
        self,
        text: str,
        stream: bool = False,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> bytes:
        """The request as bytes."""
        body = json.dumps(self.body(text, stream, **more)).encode()
        return http("POST", self.path, {**JSON, **(headers or {})}, body)

    async def begin(self, port: int, text: str, stream: bool = False, **more: Any) -> Raw:
        """A client that has sent its request."""
        raw = await Raw.open(port)
        await raw.send(self.request(text, stream, **more))
        return raw

    async def ask(self, port: int, text: str, stream: bool = False, **more: Any) -> Answer:
        raw = await self.begin(port, text, stream, **more)
        try:
            return await raw.response()
        finally:
            raw.close()

    def text(self, answer: Answer) -> str:
        """What the model said; the answer must be a complete and clean one."""
        assert (answer.status, answer.clean) == (200, True), answer
        media = answer.headers["content-type"]
        if not media.startswith(self.media):
            assert media.startswith("application/json"), answer
            return self.whole_text(answer.json())
        assert self.complete(answer.body), answer
        return "".join(self.stream_texts(answer.body))

    def asked(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def said(self, body: Any) -> str:
        """The text of a request."""
        last = body.get("messages") or [{"content": body.get("prompt", body.get("input", ""))}]
        content = last[-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(one if isinstance(one, str) else one.get("text", "") for one in content)

    def whole(self, model: str, text: str) -> Any:
        raise NotImplementedError

    def pieces(self, model: str, text: str) -> list[bytes]:
        """The parts of a streamed answer, as they are sent; the last one ends it."""
        raise NotImplementedError

    def whole_text(self, answer: Any) -> str:
        raise NotImplementedError

    def stream_texts(self, body: bytes) -> list[str]:
        raise NotImplementedError

    def complete(self, body: bytes) -> bool:
        """Whether a stream says of itself that it ended well."""
        raise NotImplementedError

    def error(self, answer: Answer) -> str:
        """The message of an error, whole or the last thing in a stream."""
        if answer.headers["content-type"].startswith("application/json"):
            return self.relayed_error(answer)
        return self.stream_error(answer.body)

    def whole_error(self, answer: Answer) -> str:
        """The message of an error that llmq wrote itself."""
        error = answer.json()["error"]
        assert {"message", "type", "param", "code"} <= error.keys(), answer
        return str(error["message"])

    def relayed_error(self, answer: Answer) -> str:
        """The message of an error that may be the backend's own, as it wrote it."""
        payload = answer.json()
        error = payload.get("error", payload)
        return str(error["message"] if isinstance(error, dict) else error)

    def stream_error(self, body: bytes) -> str:
        name, data = parse_events(body)[-1]
        assert not name, body
        return str(data["error"]["message"])


class Chat(Dialect):
    path = "/v1/chat/completions"

    def asked(self, text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    def whole(self, model: str, text: str) -> Any:
        return completion(model, text)

    def pieces(self, model: str, text: str) -> list[bytes]:
        deltas = [{"content": word} for word in words(text)]
        found = [sse(completion_chunk(model, delta)) for delta in deltas]
        return [*found, sse(completion_chunk(model, {}, "stop")) + sse("[DONE]")]

    def whole_text(self, answer: Any) -> str:
        return str(answer["choices"][0]["message"]["content"])

    def stream_texts(self, body: bytes) -> list[str]:
        events = [data for _, data in parse_events(body) if data != "[DONE]"]
        choices = [choice for data in events for choice in data["choices"]]
        return [choice["delta"].get("content") or "" for choice in choices]

    def complete(self, body: bytes) -> bool:
        return b"[DONE]" in body or b'"finish_reason": "' in body or b'"finish_reason":"' in body


class Completions(Chat):
    path = "/v1/completions"

    def asked(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def whole(self, model: str, text: str) -> Any:
        choice = {"index": 0, "text": text, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {"object": "text_completion", "model": model, "choices": [choice], "usage": usage}

    def pieces(self, model: str, text: str) -> list[bytes]:
        frame = {"id": "c", "object": "text_completion", "created": 1, "model": model}
        choices = [{"index": 0, "text": word, "finish_reason": None} for word in words(text)]
        last = {"index": 0, "text": "", "finish_reason": "stop"}
        found = [sse({**frame, "choices": [choice]}) for choice in (*choices, last)]
        return [*found[:-1], found[-1] + sse("[DONE]")]

    def whole_text(self, answer: Any) -> str:
        return str(answer["choices"][0]["text"])

    def stream_texts(self, body: bytes) -> list[str]:
        events = [data for _, data in parse_events(body) if data != "[DONE]"]
        return [choice["text"] for data in events for choice in data["choices"]]


class Responses(Dialect):
    path = "/v1/responses"

    def asked(self, text: str) -> dict[str, Any]:
        return {"input": text}

    def whole(self, model: str, text: str) -> Any:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        output = [{"type": "message", "role": "assistant", "content": content}]
        frame = {"id": "r", "object": "response", "status": "completed", "model": model}
        return {**frame, "output": output}

    def pieces(self, model: str, text: str) -> list[bytes]:
        begun = named("response.created", response={"id": "r", "status": "in_progress"})
        deltas = [named("response.output_text.delta", delta=word) for word in words(text)]
        return [begun, *deltas, named("response.completed", response=self.whole(model, text))]

    def whole_text(self, answer: Any) -> str:
        return str(answer["output"][0]["content"][0]["text"])

    def stream_texts(self, body: bytes) -> list[str]:
        events = parse_events(body)
        return [data["delta"] for name, data in events if name == "response.output_text.delta"]

    def complete(self, body: bytes) -> bool:
        return b"response.completed" in body or b"[DONE]" in body

    def stream_error(self, body: bytes) -> str:
        name, data = parse_events(body)[-1]
        assert name == "error", body
        return str(data["error"]["message"])


class Messages(Dialect):
    path = "/v1/messages"
    sign = rb'event: ping\ndata: \{"type": ?"ping"\}\n\n'

    def asked(self, text: str) -> dict[str, Any]:
        return {"max_tokens": 16, "messages": [{"role": "user", "content": text}]}

    def whole(self, model: str, text: str) -> Any:
        content = [{"type": "text", "text": text}]
        return {"type": "message", "role": "assistant", "model": model, "content": content}

    def pieces(self, model: str, text: str) -> list[bytes]:
        message = {"type": "message", "role": "assistant", "model": model, "content": []}
        begun = named("message_start", message=message)
        begun += named("content_block_start", index=0, content_block={"type": "text", "text": ""})
        deltas = [
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
            for word in words(text)
        ]
        end = named("content_block_stop", index=0)
        end += named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1})
        return [begun, *deltas, end + named("message_stop")]

    def whole_text(self, answer: Any) -> str:
        return str(answer["content"][0]["text"])

    def stream_texts(self, body: bytes) -> list[str]:
        events = parse_events(body)
        return [data["delta"]["text"] for name, data in events if name == "content_block_delta"]

    def complete(self, body: bytes) -> bool:
        return b"message_stop" in body or b"end_turn" in body or b"[DONE]" in body

    def whole_error(self, answer: Answer) -> str:
        payload = answer.json()
        assert payload["type"] == "error", answer
        assert payload["request_id"], answer
        return str(payload["error"]["message"])

    def stream_error(self, body: bytes) -> str:
        name, data = parse_events(body)[-1]
        assert (name, data["type"]) == ("error", "error"), body
        assert data["error"]["type"].endswith("_error"), body
        return str(data["error"]["message"])


class NativeChat(Dialect):
    path = "/api/chat"
    default_stream = True
    media = "application/x-ndjson"
    sign = rb" "

    def asked(self, text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    def part(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def whole(self, model: str, text: str) -> Any:
        counts = {"total_duration": 4, "prompt_eval_count": 1, "eval_count": 1, "eval_duration": 2}
        end = {"done": True, "done_reason": "stop", **counts}
        return {"model": model, "created_at": WHEN, **self.part(text), **end}

    def pieces(self, model: str, text: str) -> list[bytes]:
        frame = {"model": model, "created_at": WHEN}
        parts = [line(**frame, **self.part(word), done=False) for word in words(text)]
        return [*parts, line(**self.whole(model, ""))]

    def whole_text(self, answer: Any) -> str:
        assert answer["done"] is True
        return str(answer["message"]["content"])

    def stream_texts(self, body: bytes) -> list[str]:
        return [one["message"]["content"] for one in parse_lines(body)]

    def complete(self, body: bytes) -> bool:
        return b'"done":true' in body.replace(b" ", b"") or b"[DONE]" in body

    def whole_error(self, answer: Answer) -> str:
        payload = answer.json()
        assert payload.keys() == {"error"}, answer
        assert isinstance(payload["error"], str), answer
        return str(payload["error"])

    def stream_error(self, body: bytes) -> str:
        last = parse_lines(body)[-1]
        assert isinstance(last["error"], str), body
        return str(last["error"])


class Generate(NativeChat):
    path = "/api/generate"

    def asked(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def part(self, text: str) -> dict[str, Any]:
        return {"response": text}

    def whole_text(self, answer: Any) -> str:
        assert answer["done"] is True
        return str(answer["response"])

    def stream_texts(self, body: bytes) -> list[str]:
        return [one["response"] for one in parse_lines(body)]


def vector(text: str) -> list[float]:
    """A text as numbers that tell it again."""
    return [float(byte) for byte in text.encode()]


def unvector(numbers: list[float]) -> str:
    return bytes(int(number) for number in numbers).decode()


class Embeddings(Dialect):
    path = "/v1/embeddings"
    streams = False

    def asked(self, text: str) -> dict[str, Any]:
        return {"input": text}

    def whole(self, model: str, text: str) -> Any:
        row = {"object": "embedding", "index": 0, "embedding": vector(text)}
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return {"object": "list", "data": [row], "model": model, "usage": usage}

    def whole_text(self, answer: Any) -> str:
        return unvector(answer["data"][0]["embedding"])


class Rerank(Dialect):
    path = "/v1/rerank"
    streams = False

    def asked(self, text: str) -> dict[str, Any]:
        return {"query": "q", "documents": [text]}

    def said(self, body: Any) -> str:
        return str(body["documents"][0])

    def whole(self, model: str, text: str) -> Any:
        row = {"index": 0, "relevance_score": 0.5, "document": {"text": text}}
        return {"model": model, "results": [row]}

    def whole_text(self, answer: Any) -> str:
        return str(answer["results"][0]["document"]["text"])


class NativeEmbed(Embeddings):
    path = "/api/embed"
    whole_error = NativeChat.whole_error

    def whole(self, model: str, text: str) -> Any:
        return {"model": model, "embeddings": [vector(text)], "prompt_eval_count": 1}

    def whole_text(self, answer: Any) -> str:
        return unvector(answer["embeddings"][0])


class NativeEmbeddings(NativeEmbed):
    path = "/api/embeddings"

    def asked(self, text: str) -> dict[str, Any]:
        return {"prompt": text}

    def whole(self, _model: str, text: str) -> Any:
        return {"embedding": vector(text)}

    def whole_text(self, answer: Any) -> str:
        return unvector(answer["embedding"])


CHAT, COMPLETIONS, RESPONSES, MESSAGES = Chat(), Completions(), Responses(), Messages()
NATIVE_CHAT, GENERATE = NativeChat(), Generate()
EMBEDDINGS, RERANK, EMBED, OLD_EMBED = Embeddings(), Rerank(), NativeEmbed(), NativeEmbeddings()
STREAMING: tuple[Dialect, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, NATIVE_CHAT, GENERATE)
DIALECTS: tuple[Dialect, ...] = (*STREAMING, EMBEDDINGS, RERANK, EMBED, OLD_EMBED)
BY_PATH = {one.path: one for one in DIALECTS}


# ---- The runner ------------------------------------------------------------------------------


class Runner(FakeBackend):
    """A runner that answers every dialect with the text it was asked, and keeps books.

    A request whose context differs from the loaded one loads the model anew, as Ollama does; one
    that names none means the default, whatever is loaded.
    """

    def __init__(
        self, models: Any = ("m",), kind: str = "ollama", auto: bool = True, port: int = 0
    ) -> None:
        super().__init__(models, kind, auto, port)
        self.limits: dict[str, int] = {}  # a model's own longest context: in /api/tags
        self.hidden_limits: dict[str, int] = {}  # ... or told by /api/show alone
        self.contexts: dict[str, int] = {}  # what each loaded model is loaded with
        self.tells_context = True  # in /api/ps; older ones do not
        self.loads: list[tuple[str, int]] = []  # each load so far
        self.lacks: dict[Any, tuple[int, Any]] = {}  # path, or (path, model) -> the answer there
        self.shown: list[FakeRequest] = []  # /api/show
        self.managed: list[FakeRequest] = []  # model management, as each head arrived
        self.uploads: list[tuple[int, str]] = []  # bytes and digest of each blob
        self.received = 0  # bytes of the blobs so far
        self.refuses: tuple[int, Any] | None = None  # answered to a blob before it is read
        self.hearing = asyncio.Event()  # it reads nothing of a blob while this is not set
        self.hearing.set()
        self.blobs: set[str] = set()
        self._managed: asyncio.Queue[FakeRequest] = asyncio.Queue()

    async def management(self) -> FakeRequest:
        """The next request of model management, its body read; answered by the test."""
        return await self._managed.get()

    def unload(self, model: str) -> None:
        del self.contexts[model]

    # ---- what it tells of itself

    def _probe(self, path: str) -> tuple[int, Any]:
        if self.kind == "ollama" and self.probe_status == 200:
            if path == "/api/tags":
                return 200, {"models": [self.tag(model) for model in self.models]}
            if path == "/api/ps":
                return 200, {"models": [self.loaded_row(model) for model in self.contexts]}
        return super()._probe(path)

    def tag(self, model: str) -> dict[str, Any]:
        """A model's row of /api/tags."""
        details: dict[str, Any] = {"format": "gguf", "family": "llama", "parameter_size": "1B"}
        if model in self.limits:
            details["context_length"] = self.limits[model]
        size = {"size": 7, "digest": hashlib.sha256(model.encode()).hexdigest()}
        return {"name": model, "model": model, "modified_at": WHEN, **size, "details": details}

    def loaded_row(self, model: str) -> dict[str, Any]:
        """A model's row of /api/ps."""
        row = {**self.tag(model), "expires_at": WHEN, "size_vram": 5}
        del row["modified_at"]
        return {**row, "context_length": self.contexts[model]} if self.tells_context else row

    async def _show(self, request: FakeRequest) -> None:
        model = request.json.get("model") or request.json.get("name")
        if model not in self.models:
            await request.status(404, {"error": f"model '{model}' not found"})
            return
        info: dict[str, Any] = {"general.architecture": "llama"}
        limit = {**self.limits, **self.hidden_limits}.get(model)
        if limit is not None:
            info["llama.context_length"] = limit
        told = {"details": self.tag(model)["details"], "model_info": info, "template": "{{ . }}"}
        await request.status(200, {**told, "capabilities": ["completion"], "modified_at": WHEN})

    # ---- inference

    async def _serve(self, connection: Connection) -> None:
        try:
            while True:
                head = (await connection.reader.readuntil(b"\r\n\r\n"))[:-4]
                self._judge(connection, head)
                request = FakeRequest(connection, head, b"")
                if request.path.startswith(MANAGEMENT):
                    await self._manage(request)
                else:
                    request.body = await self._read_body(connection.reader, request.headers)
                    self._take(request)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass  # the peer left
        finally:
            if connection.current:
                connection.current.finished()
            connection.gone.set()
            self.open.discard(connection)
            connection.writer.transport.abort()

    def _take(self, request: FakeRequest) -> None:
        if request.path == "/api/show":
            self.shown.append(request)
            self._start(self._show(request))
        else:
            super()._take(request)

    async def _answer(self, request: FakeRequest) -> None:
        await self._gate.wait()
        with contextlib.suppress(ConnectionError):
            await self.answer(request)
            if request.headers.get("connection", "").lower() == "close":
                request.close()

    async def answer(self, request: FakeRequest) -> None:
        """Answer as this runner would: the text it was asked, or what it says where it lacks."""
        path = request.path.split("?")[0]
        model = request.json.get("model")
        lacking = self.lacks.get(path) or self.lacks.get((path, model))
        if path not in BY_PATH and lacking is None:
            lacking = (404, NO_ROUTE)
        if lacking is not None:
            plain = isinstance(lacking[1], bytes)
            await request.status(*lacking, [("Content-Type", "text/plain")] if plain else ())
            return
        self._load(request, model)
        await speak(request)

    def _load(self, request: FakeRequest, model: str) -> None:
        if self.kind != "ollama":
            return
        options = request.json.get("options") or {} if request.path.startswith("/api/") else {}
        context = options.get("num_ctx", DEFAULT_CONTEXT)
        if self.contexts.get(model) != context:
            self.loads.append((model, context))
            self.contexts[model] = context

    # ---- model management

    async def _manage(self, request: FakeRequest) -> None:
        """Take a request whose body may be endless; a blob is answered here, others by the test."""
        self.managed.append(request)
        request.connection.current = request
        path = request.path.split("?")[0]
        if request.method == "HEAD":
            known = path.rpartition("/")[2] in self.blobs
            request.finished()
            await request.send(render_head(200 if known else 404, [("Content-Length", "0")]))
        elif request.method == "GET":
            await request.status(200, {"read": path})
        elif path.startswith("/api/blobs/"):
            await self._take_blob(request)
        else:
            request.body = await self._read_body(request.connection.reader, request.headers)
            self._managed.put_nowait(request)

    async def _take_blob(self, request: FakeRequest) -> None:
        if self.refuses is not None:
            await request.status(*self.refuses)
            return
        if not self.hearing.is_set():
            request.connection.writer.transport.pause_reading()
            await self.hearing.wait()
            request.connection.writer.transport.resume_reading()
        digest, before = hashlib.sha256(), self.received
        async for piece in read_pieces(request):
            digest.update(piece)
            self.received += len(piece)
        self.uploads.append((self.received - before, digest.hexdigest()))
        self.blobs.add(request.path.rpartition("/")[2])
        request.finished()
        await request.send(render_head(201, [("Content-Length", "0")]))


async def read_pieces(request: FakeRequest) -> Any:
    """A request's body as it comes, never more than a piece of it in memory."""
    reader, headers = request.connection.reader, request.headers
    if headers.get("transfer-encoding", "").lower() != "chunked":
        left = int(headers.get("content-length", "0"))
        while left:
            piece = await read_some(reader, left)
            left -= len(piece)
            yield piece
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        while size:
            piece = await read_some(reader, size)
            size -= len(piece)
            yield piece
        await reader.readexactly(2)
    await reader.readexactly(2)


async def read_some(reader: asyncio.StreamReader, most: int) -> bytes:
    piece = await reader.read(min(most, 1 << 20))
    if not piece:
        raise asyncio.IncompleteReadError(b"", most)
    return piece


async def speak(request: FakeRequest, text: str | None = None) -> None:
    """A good answer to a request in its own dialect, whole or in pieces as it asks."""
    dialect, asked = BY_PATH[request.path.split("?")[0]], request.json
    text = dialect.said(asked) if text is None else text
    model = asked.get("model")
    if not dialect.streams or not asked.get("stream", dialect.default_stream):
        await request.status(200, dialect.whole(model, text))
        return
    await start_speaking(request)
    *pieces, last = dialect.pieces(model, text)
    for piece in pieces:
        await request.send(chunk(piece))
    request.finished()
    await request.send(chunk(last) + b"0\r\n\r\n")


async def start_speaking(request: FakeRequest) -> None:
    """The head of a stream in the request's dialect, and nothing of its body."""
    media = BY_PATH[request.path.split("?")[0]].media
    await request.send(
        render_head(200, [("Content-Type", media), ("Transfer-Encoding", "chunked")])
    )
