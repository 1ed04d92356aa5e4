"""A runner whose every answer is in the test's hand, and its dialects as they look on the wire.

async with Runner(["counter:latest"]) as runner, running(runner.url) as q:
    asked = post(q, "/api/chat", {"model": "counter", "messages": []})
    request = await arrival(asked, runner)
    await whole(request, {"model": "counter:latest", "done": True, "done_reason": "load"})
    assert (await asked).status == 200
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path
from typing import Any, Callable

from tests import ollama_v1
from tests.fakes import (
    Answer,
    FakeBackend,
    FakeRequest,
    Process,
    Raw,
    ask,
    chunk,
    http,
    render_answer,
    render_head,
    running,
    sse,
)

RECORDINGS = Path(__file__).parent / "real" / "recordings"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"
WHOLE = "application/json; charset=utf-8"
ROUTES = {  # each inference route, in the order of the contract
    "openai": (
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/rerank",
    ),
    "anthropic": ("/v1/messages",),
    "ollama": ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings"),
}
ASKS = {  # the least that each of them needs
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/rerank": {"query": "hi", "documents": ["a", "b"]},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "/api/chat": {"messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"prompt": "hi"},
    "/api/embed": {"input": "hi"},
    "/api/embeddings": {"prompt": "hi"},
}


def least(path: str, **more: Any) -> dict[str, Any]:
    """The smallest body for this route, for model m."""
    for end, body in ASKS.items():
        if path.endswith(end):
            return {"model": "m", **body, **more}
    raise KeyError(path)


# ---- The runner ------------------------------------------------------------------------------


class Runner(FakeBackend):
    """A FakeBackend that shows what Ollama shows of its models; `reply` may answer for the test."""

    def __init__(
        self,
        models: Any = ("m",),
        kind: str = "ollama",
        context: int = 32768,
        reply: Callable[[FakeRequest], Any] | None = None,
    ) -> None:
        super().__init__(models, kind, auto=reply is not None)
        self.context = context  # the largest that its models can
        self.contexts: dict[str, int] = {}  # what is loaded, and with which context
        self.reply = reply

    def _take(self, request: FakeRequest) -> None:
        if request.path != "/api/show":
            super()._take(request)
            return
        info = {"general.architecture": "llama", "llama.context_length": self.context}
        shown = {"details": {}, "model_info": info, "capabilities": ["completion"]}
        self._start(self._show(request, shown))

    async def _show(self, request: FakeRequest, shown: Any) -> None:
        known = self.kind == "ollama"
        with contextlib.suppress(ConnectionError):
            await request.status(200 if known else 404, shown if known else {"error": "none"})
            if request.headers.get("connection", "").lower() == "close":
                request.close()

    async def _answer(self, request: FakeRequest) -> None:
        with contextlib.suppress(ConnectionError):
            assert self.reply is not None
            await self.reply(request)
            if request.headers.get("connection", "").lower() == "close":
                request.close()

    def _probe(self, path: str) -> tuple[int, Any]:
        if self.kind == "ollama" and path == "/api/tags":
            details = {"family": "llama", "context_length": self.context}
            rows = [{**self._row(name), "details": details} for name in self.models]
            return 200, {"models": rows}
        if self.kind == "ollama" and path == "/api/ps":
            loaded = {**dict.fromkeys(self.loaded, 4096), **self.contexts}
            rows = [{**self._row(name), "context_length": n} for name, n in loaded.items()]
            return 200, {"models": rows}
        return super()._probe(path)

    def _row(self, name: str) -> dict[str, Any]:
        return {"name": name, "model": name, "size": 1, "digest": "d", "details": {}}


class Ollama(Runner):
    """As the real one behaves by its source, as far as a queue in front of it could tell.

    Names by its rule and echoed as asked; a context that nobody asked for is its own choice, and
    stays; one that is asked for is clamped; another one loads anew, for embeddings also another
    batch; requests without content load and unload; what was created is there at once.
    """

    def __init__(self, models: Any = ("m",), longest: int = 8192) -> None:
        super().__init__([full_name(name) for name in models], context=longest, reply=self.serve)
        self.launched: dict[str, tuple[int, int]] = {}  # asked-for context (0: its own), batch
        self.loads: list[tuple[str, int]] = []  # each load so far

    def _take(self, request: FakeRequest) -> None:
        if request.method == "DELETE" or request.path == "/api/show":
            self.requests.append(request)
            self._start(self._answer(request))
        else:
            super()._take(request)

    async def serve(self, request: FakeRequest) -> None:
        asked, path = request.json or {}, request.path
        named = str(asked.get("model") or asked.get("source") or asked.get("name"))
        name = full_name(named)
        known = name in self.models or path in ("/api/create", "/api/pull")
        kind = WHOLE
        if not known:
            text = f"model '{named}' not found"
            v1 = {"message": text, "type": "not_found_error", "param": None, "code": None}
            await request.status(404, {"error": v1 if path.startswith("/v1/") else text})
            return
        if path in ("/v1/chat/completions", "/api/chat", "/api/generate"):
            document: Any = self.generate(path, asked, name)
        elif "embed" in path:
            document = self.embed(path, asked, name)
        elif path == "/api/show":
            info = {"general.architecture": "llama", "llama.context_length": self.context}
            document = {"details": {}, "model_info": info, "capabilities": ["completion"]}
        else:
            document, kind = self.manage(path, asked, name), NDJSON
        data = document if isinstance(document, bytes) else line(document)
        await request.status(200, data, [("Content-Type", EVENTS if b"data: " in data else kind)])

    def manage(self, path: str, asked: Any, name: str) -> bytes:
        if path == "/api/delete":
            self.models.remove(name)
            self.contexts.pop(name, None)
            return b""
        new = full_name(asked["destination"]) if path == "/api/copy" else name
        if new not in self.models:
            self.models.insert(0, new)
        if path == "/api/copy":
            return b""
        success, layer = {"status": "success"}, {"digest": "sha256:1", "total": 9}
        told = [{"status": f"pulling {done}", **layer, "completed": done} for done in (3, 9)]
        told = told if path == "/api/pull" else [{"status": "x"}]
        return b"".join(map(line, [success] if asked.get("stream") is False else [*told, success]))

    def load(self, name: str, options: Any, *, embeds: bool = False) -> None:
        """Load it where what it is launched with differs from what is wanted."""
        wanted = max(4, int(options["num_ctx"])) if "num_ctx" in options else 0
        batch = (wanted or 4096) if embeds else 0  # of the context as asked for, not as clamped
        wanted = min(wanted, self.context)
        if self.launched.get(name) != (wanted, batch) or name not in self.contexts:
            self.launched[name] = (wanted, batch)
            self.contexts[name] = wanted or min(4096, self.context)
            self.loads.append((name, self.contexts[name]))

    def generate(self, path: str, asked: Any, name: str) -> Any:
        native = ollama_v1.native_request(asked) if path.startswith("/v1/") else asked
        content = native.get("prompt") or (native.get("messages") or [{}])[-1].get("content", "")
        empty = not native.get("prompt") and not native.get("messages")
        unloads = empty and native.get("keep_alive") == 0
        if unloads:
            self.contexts.pop(name, None)
        else:
            self.load(name, native.get("options") or {})
        said = {"role": "assistant", "content": content} if path != "/api/generate" else content
        end = {"done": True, "done_reason": "unload" if unloads else "load" if empty else "stop"}
        member = "response" if path == "/api/generate" else "message"
        facts = {"model": asked["model"], "created_at": "2026-11-21T08:50:35.4Z", member: said}
        told = {**facts, **end, **({} if empty else COUNTS)}
        if path.startswith("/v1/"):
            if native["stream"]:
                usage = (asked.get("stream_options") or {}).get("include_usage") is True
                return b"".join(map(sse, ollama_v1.stream([told], usage)))
            return ollama_v1.whole(told)
        if empty or native.get("stream") is False:
            return told
        nothing = {"role": "assistant", "content": ""} if member == "message" else ""
        return line({**facts, "done": False}) + line({**told, member: nothing})

    def embed(self, path: str, asked: Any, name: str) -> Any:
        self.load(name, asked.get("options") or {}, embeds=True)
        if path == "/api/embeddings":
            return {"embedding": [0.5]}
        if path == "/api/embed":
            return {"model": asked["model"], "embeddings": [[0.5]], "prompt_eval_count": 1}
        row = {"object": "embedding", "embedding": [0.5], "index": 0}
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return {"object": "list", "data": [row], "model": asked["model"], "usage": usage}


def full_name(name: str) -> str:
    """As Ollama lists it: what it takes for granted left out, the tag always there."""
    bare = name.lower()
    for part in ("registry.ollama.ai/", "library/"):
        bare = bare[len(part) :] if bare.startswith(part) else bare
    return bare if ":" in bare.rpartition("/")[2] else bare + ":latest"


# ---- Both ends of one exchange ---------------------------------------------------------------


def post(
    q: running, path: str, body: Any, headers: dict[str, str] | None = None
) -> asyncio.Future[Answer]:
    """One request in the background; `body` bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = {"Content-Type": "application/json", **(headers or {})}
    return asyncio.ensure_future(ask(q.port, "POST", path, body=data, headers=told))


async def arrival(asked: asyncio.Future[Answer], *runners: FakeBackend) -> FakeRequest:
    """The request at one of these runners; fails at once if llmq has answered by itself."""
    waiting = [asyncio.ensure_future(runner.arrived()) for runner in runners]
    done, _ = await asyncio.wait({asked, *waiting}, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()
    arrived = [one for one in waiting if one in done]
    assert arrived, f"answered without the backend: {asked.result()}"
    return arrived[0].result()


async def whole(request: FakeRequest, body: Any, content_type: str = WHOLE) -> None:
    """A whole answer; `body` bytes as they are, anything else as JSON."""
    await request.status(200, body, [("Content-Type", content_type)])


async def stream(
    request: FakeRequest, pieces: Any, content_type: str = NDJSON, end: bool = True
) -> None:
    """A chunked answer, each piece one chunk; without its end when `end` is False."""
    head = [("Content-Type", content_type), ("Transfer-Encoding", "chunked")]
    data = render_head(200, head) + b"".join(chunk(piece) for piece in pieces if piece)
    request.finished()
    await request.send(data + (b"0\r\n\r\n" if end else b""))
    if not end:
        request.close()


def staged(pieces: list[bytes], content_type: str = NDJSON, end: bool = True) -> Any:
    """A reply in chunks, the first surely read and passed on before the others come."""

    async def reply(request: FakeRequest) -> None:
        head = [("Content-Type", content_type), ("Transfer-Encoding", "chunked")]
        await request.send(render_head(200, head) + chunk(pieces[0]))
        await turns(8)
        request.finished()
        await request.send(b"".join(map(chunk, pieces[1:])) + (b"0\r\n\r\n" if end else b""))
        if not end:
            request.close()

    return reply


async def exchange(
    q: running, runner: FakeBackend, path: str, body: Any, reply: Any, **more: Any
) -> tuple[FakeRequest, Answer]:
    """Ask, let the runner `reply`: a coroutine function, a list of pieces, or a whole body."""
    asked = post(q, path, body, more.pop("headers", None))
    request = await arrival(asked, runner)
    if callable(reply):
        await reply(request)
    elif isinstance(reply, list):
        await stream(request, reply, **more)
    else:
        await whole(request, reply, **more)
    return request, await asked


async def turns(count: int = 4) -> None:
    """Let the event loop go round, so that what was sent is received by itself."""
    for _ in range(count):
        turn = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(turn.set_result, None)
        await turn


async def told(q: running) -> None:
    """Return once every backend has told what it has; the test's deadline ends it otherwise."""
    while any(one["state"] == "unknown" for one in (await q.status())["backends"]):
        pass


async def waiting(q: running, number: int) -> None:
    """Return once exactly so many wait; the test's deadline ends it otherwise."""
    while (await q.status())["queue"]["waiting"] != number:
        pass


async def told_to_stop(runner: Runner, path: str, body: Any) -> Answer:
    """What a waiting request is told by an llmq that is asked to stop while another runs."""
    async with Process("serve", "--port", "0", "--backend", runner.url) as process:
        q = running()
        q.port = process.port
        first = post(q, path, body)
        request = await arrival(first, runner)
        second = post(q, path, {**body, "user": "two"})  # what is alike shares one run
        await waiting(q, 1)
        process.signal(signal.SIGTERM)
        answer = await second
        request.reset()
        await first
        await process.ended(0)
    return answer


async def ended(q: running, number: int = 1) -> list[dict[str, Any]]:
    """The records of the ended requests, newest or oldest first, once there are so many."""
    while len(recent := (await q.status())["recent"]) < number:
        pass
    return list(recent)


async def open_stream(q: running, path: str, body: Any, headers: Any = None) -> Raw:
    """A client that has sent its request and reads by the test's hand."""
    raw = await Raw.open(q.port)
    told = {"Content-Type": "application/json", **(headers or {})}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    await raw.send(http("POST", path, told, data))
    return raw


# ---- Dialects on the wire --------------------------------------------------------------------


def line(document: Any) -> bytes:
    """One line of NDJSON, as Go writes it."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def lines(answer: Answer) -> list[Any]:
    """Every line of an NDJSON answer, read."""
    return [json.loads(text) for text in answer.body.split(b"\n") if text.strip()]


def chat_line(content: str, **more: Any) -> dict[str, Any]:
    """A piece of an answer of /api/chat; what `message` holds is added to its own."""
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    document = {"model": "m", "created_at": "2026-11-21T08:50:35.466200792Z", "message": message}
    return {**document, "done": False, **more}


COUNTS = {
    "total_duration": 6671544,
    "load_duration": 548805,
    "prompt_eval_count": 6,
    "prompt_eval_duration": 403000,
    "eval_count": 5,
    "eval_duration": 1236000,
}


def chat_end(reason: str = "stop", content: str = "", **more: Any) -> dict[str, Any]:
    """The last line of /api/chat, or the whole answer with its content."""
    said = chat_line(content, **more)
    return {**said, "done": True, "done_reason": reason, **COUNTS}


def generate_line(text: str, **more: Any) -> dict[str, Any]:
    created = "2026-11-21T08:50:35.480813537Z"
    return {"model": "m", "created_at": created, "response": text, "done": False, **more}


def generate_end(reason: str = "stop", text: str = "", **more: Any) -> dict[str, Any]:
    return {**generate_line(text), "done": True, "done_reason": reason, **COUNTS, **more}


def named_event(name: str, document: Any) -> bytes:
    """One server-sent event with a name."""
    return b"event: " + name.encode() + b"\n" + sse(document)


def named_events(answer: Answer) -> list[tuple[str, Any]]:
    """The (name, data) of each complete event of a stream; data read where it is JSON.

    Of two names in one event the last counts, as the standard has it.
    """
    found = []
    for block in answer.body.decode(errors="replace").split("\n\n")[:-1]:
        fields = [text.partition(":")[::2] for text in block.split("\n")]
        name = next((value.strip() for field, value in fields[::-1] if field == "event"), "")
        data = "\n".join(value.strip() for field, value in fields if field == "data")
        with contextlib.suppress(ValueError):
            data = json.loads(data)
        if name or data:
            found.append((name, data))
    return found


class Recording:
    """What the real Ollama once answered: .raw as it came, .status, .headers, .body decoded."""

    def __init__(self, name: str) -> None:
        self.raw = (RECORDINGS / f"{name}.response.txt").read_bytes()
        head, _, rest = self.raw.partition(b"\r\n\r\n")
        answer = Answer(head)
        self.status, self.headers = answer.status, answer.headers
        self.content_type = self.headers.get("content-type", "")
        self.pieces = [rest]
        if self.headers.get("transfer-encoding") == "chunked":
            self.pieces = []
            while size := int(rest[: rest.index(b"\r\n")], 16):
                start = rest.index(b"\r\n") + 2
                self.pieces.append(rest[start : start + size])
                rest = rest[start + size + 2 :]
        self.body = b"".join(self.pieces)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of each event; [DONE] as text."""
        answer = Answer(self.raw.partition(b"\r\n\r\n")[0])
        answer.body = self.body
        return answer.events()

    async def replay(self, request: FakeRequest) -> None:
        """These very bytes."""
        request.finished()
        await request.send(self.raw)


async def refuse(request: FakeRequest, status: int, body: Any, **headers: str) -> None:
    """An error answer of the runner."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    pairs = [("Content-Type", WHOLE), *((n.replace("_", "-"), v) for n, v in headers.items())]
    request.finished()
    await request.send(render_answer(status, data, pairs))
