"""The other side of every test: backends, clients, processes; raw bytes, nothing shared with llmq.

async with FakeBackend() as fake, running(fake.url) as q:
    answer = await ask(q.port, "POST", "/v1/chat/completions", json=chat("hello there"))
    assert answer.json()["choices"][0]["message"]["content"] == "hello there"
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json as jsonlib
import os
import random
import re
import shutil
import signal as signals
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, ClassVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
LLMQ = ROOT / "llmq.py"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST
LOADING = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
REASONS = {200: "OK", 404: "Not Found", 500: "Internal Server Error", 503: "Service Unavailable"}
HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[^\x00-\x08\x0a-\x1f\x7f]*")
REQUEST_LINE = re.compile(rb"([A-Z]+) (/[\x21-\x7e]*) HTTP/1\.1")


# ---- What a machine may lack -----------------------------------------------------------------


def need(condition: object, reason: str) -> None:
    """Skip the test with `reason` unless `condition`; with LLMQ_REQUIRE_ALL=1 fail instead."""
    if condition:
        return
    if os.environ.get("LLMQ_REQUIRE_ALL") == "1":
        pytest.fail(f"this machine must have everything, but: {reason}", pytrace=False)
    pytest.skip(reason)


def require(module: str, reason: str = "") -> Any:
    """Import and return `module`, or skip (fail when everything is required)."""
    try:
        return importlib.import_module(module)
    except ImportError:
        need(False, reason or f"the package {module} is not installed")


def require_command(name: str, reason: str = "") -> str:
    """Return the path of the program `name`, or skip (fail when everything is required)."""
    path = shutil.which(name)
    need(path, reason or f"the program {name} is not installed")
    return str(path)


def free_port() -> int:
    """A port that nobody has, outside the range from which the kernel gives clients theirs."""
    while True:
        port = random.Random(os.urandom(8)).randrange(10240, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def eventually(predicate: Callable[[], Any], seconds: float = 5) -> Any:
    """Return the first true value of `predicate`; the one place that waits by the clock."""
    end = time.monotonic() + seconds
    while not (value := predicate()):
        if time.monotonic() > end:
            raise AssertionError(f"not true within {seconds} s: {predicate_text(predicate)}")
        await asyncio.sleep(0.005)
    return value


def predicate_text(predicate: Callable[[], Any]) -> str:
    code = getattr(predicate, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else repr(predicate)


# ---- Bytes -----------------------------------------------------------------------------------


def http(
    method: str,
    path: str,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    body: bytes | None = None,
) -> bytes:
    """One request as bytes; Host and Content-Length are added where not given."""
    pairs = list(headers.items() if isinstance(headers, dict) else headers or [])
    names = {name.lower() for name, _ in pairs}
    if "host" not in names:
        pairs.insert(0, ("Host", "127.0.0.1"))
    if body is not None and not names & {"content-length", "transfer-encoding"}:
        pairs.append(("Content-Length", str(len(body))))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in pairs)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chat(text: str, stream: bool = False, model: str | None = "m", **more: Any) -> dict[str, Any]:
    """The body of a chat completion; `model=None` leaves the model out."""
    body: dict[str, Any] = {} if model is None else {"model": model}
    body["messages"] = [{"role": "user", "content": text}]
    if stream:
        body["stream"] = True
    return {**body, **more}


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of the chunked transfer coding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def sse(payload: Any) -> bytes:
    """`payload` as one server-sent event."""
    text = payload if isinstance(payload, str) else jsonlib.dumps(payload)
    return f"data: {text}\n\n".encode()


def words(text: str) -> list[str]:
    """`text` cut before each word, nothing lost."""
    return re.findall(r"\s*\S+\s*$|\s*\S+|\s+", text)


def split_head(head: bytes) -> tuple[str, list[tuple[str, str]]]:
    """The first line and the (lower-case name, value) pairs of a head without its empty line."""
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.partition(":")[::2] for line in lines]
    return first, [(name.lower(), value.strip()) for name, value in pairs]


# ---- A client --------------------------------------------------------------------------------


class Answer:
    """One response: .status .headers (lower-case names) .body, and whether its framing ended."""

    def __init__(self, head: bytes) -> None:
        first, self.header_list = split_head(head)
        version, status, *reason = first.split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), first
        self.raw_head = head
        self.status = int(status)
        self.reason = "".join(reason)
        self.headers: dict[str, str] = {}
        for name, value in self.header_list:
            known = self.headers.get(name)
            self.headers[name] = value if known is None else f"{known}, {value}"
        self.body = b""
        self.trailer = b""
        self.clean = False  # True once the body ended as its framing promised

    def __repr__(self) -> str:
        return f"<{self.status} {'clean' if self.clean else 'unclean'} {self.body[:300]!r}>"

    def json(self) -> Any:
        return jsonlib.loads(self.body)

    @property
    def code(self) -> Any:
        """The code inside an OpenAI error object."""
        return self.json()["error"]["code"]

    def events(self) -> list[Any]:
        """Each complete SSE event's data: JSON where it is JSON, else the text (`[DONE]`)."""
        found: list[Any] = []
        for block in self.body.decode(errors="replace").replace("\r\n", "\n").split("\n\n")[:-1]:
            lines = [line[5:].strip() for line in block.split("\n") if line.startswith("data:")]
            if lines:
                text = "\n".join(lines)
                with contextlib.suppress(ValueError):
                    text = jsonlib.loads(text)
                found.append(text)
        return found

    @property
    def content(self) -> str:
        """What the model said, from a whole or a streamed chat completion."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return str(self.json()["choices"][0]["message"]["content"])
        parts = [event for event in self.events() if isinstance(event, dict)]
        deltas = [c.get("delta", {}) for part in parts for c in part.get("choices", [])]
        return "".join(delta.get("content") or "" for delta in deltas)


class Raw:
    """One client socket, nothing sent or read that the test did not ask for."""

    opened: ClassVar[list[Raw]] = []  # by this test

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.buffer = b""  # read from the socket, not yet consumed
        self.ended = ""  # "eof" or "reset" once seen
        self.answer: Answer | None = None  # its head was read, its body not yet
        self.method = "GET"  # of the last request sent: HEAD answers have no body
        self.opened.append(self)

    @classmethod
    async def open(cls, port: int, host: str = "127.0.0.1", receive_buffer: int = 0) -> Raw:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        raw = cls(socket.socket(family))
        raw.socket.setblocking(False)
        if receive_buffer:  # small, and set before connecting: a client that reads slowly
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(raw.socket, (host, port))
        return raw

    async def __aenter__(self) -> Raw:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def send(self, data: bytes) -> None:
        if match := re.match(rb"[A-Z]+(?= )", data):
            self.method = match.group().decode()
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read(self, size: int = 65536) -> bytes:
        """Some bytes as they come; b"" at the end, whether it was clean or a reset."""
        if self.buffer:
            data, self.buffer = self.buffer[:size], self.buffer[size:]
            return data
        return await self._receive(size)

    async def _receive(self, size: int = 65536) -> bytes:
        if self.ended:
            return b""
        try:
            data = await asyncio.get_running_loop().sock_recv(self.socket, size)
        except (ConnectionError, TimeoutError):
            self.ended = "reset"
            return b""
        if not data:
            self.ended = "eof"
        return data

    async def until(self, mark: bytes) -> bytes:
        """The bytes up to and including `mark`; EOFError with what came when the end came first."""
        while mark not in self.buffer:
            data = await self._receive()
            if not data:
                raise EOFError(f"{self.ended} before {mark!r}; got {self.buffer!r}")
            self.buffer += data
        end = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:end], self.buffer[end:]
        return data

    async def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            data = await self._receive()
            if not data:
                raise EOFError(f"{self.ended} after {len(self.buffer)} of {count} bytes")
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    async def head(self) -> Answer:
        """The next response's head only (after any 1xx); `response()` goes on with its body."""
        self.answer = Answer((await self.until(b"\r\n\r\n"))[:-4])
        if self.answer.status == 100:
            return await self.head()
        return self.answer

    async def response(self) -> Answer:
        """The next response; the connection ending before the framing does makes it unclean."""
        answer = self.answer or await self.head()
        self.answer = None
        try:
            await self._body(answer)
            answer.clean = True
        except EOFError:
            answer.body += self.buffer
            self.buffer = b""
        return answer

    async def _body(self, answer: Answer) -> None:
        if self.method == "HEAD" or answer.status in (204, 304):
            return
        length = answer.headers.get("content-length")
        if answer.headers.get("transfer-encoding", "").lower() == "chunked":
            assert length is None, "both framings in one response"
            await self._chunks(answer)
        elif length is not None:
            answer.body = await self.exactly(int(length))
        else:
            while data := await self.read():
                answer.body += data
            if self.ended == "reset":
                raise EOFError("reset")

    async def _chunks(self, answer: Answer) -> None:
        while size := int((await self.until(b"\r\n")).split(b";")[0], 16):
            # Piece by piece, so that a chunk cut short still shows what came of it.
            answer.body += await self.exactly(size)
            assert await self.exactly(2) == b"\r\n", "no CRLF after a chunk"
        while (line := await self.until(b"\r\n")) != b"\r\n":
            answer.trailer += line

    async def events(self) -> Any:
        """Each SSE event's data as it arrives, for a streamed answer (chunked or to the end)."""
        answer = self.answer or await self.head()
        seen = 0
        while True:
            found = answer.events()
            for event in found[seen:]:
                yield event
            seen = len(found)
            if not await self._more(answer):
                return

    async def _more(self, answer: Answer) -> bool:
        """Add the next chunk to a streamed answer; False at its end, clean or not."""
        if answer.headers.get("transfer-encoding", "").lower() != "chunked":
            data = await self.read()
            answer.body += data
            answer.clean = not data and self.ended == "eof"
            return bool(data)
        try:
            size = int((await self.until(b"\r\n")).split(b";")[0], 16)
            answer.body += (await self.exactly(size + 2))[:-2]
        except EOFError:
            return False
        answer.clean = not size
        if not size:
            self.answer = None
        return bool(size)

    async def closed(self) -> str:
        """Read and discard to the end; says how it ended: "eof" or "reset"."""
        while await self._receive():
            pass
        return self.ended

    def fin(self) -> None:
        """Half-close: nothing more to send, still reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def rst(self) -> None:
        """Leave with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    @classmethod
    def close_all(cls) -> None:
        """What the test left open (conftest.py calls this after each test)."""
        while cls.opened:
            cls.opened.pop().close()


async def ask(
    port: int,
    method: str,
    path: str,
    *,
    json: Any = None,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request on its own connection, the whole answer."""
    headers = dict(headers or {})
    if json is not None:
        body = jsonlib.dumps(json).encode()
        if "content-type" not in {name.lower() for name in headers}:
            headers["Content-Type"] = "application/json"
    async with await Raw.open(port) as raw:
        await raw.send(http(method, path, {"Connection": "close", **headers}, body))
        return await raw.response()


# ---- A backend -------------------------------------------------------------------------------


class Connection:
    """One connection that a backend accepted; `gone` is set once the peer closed or broke it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: Any) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer
        self.gone = asyncio.Event()
        self.current: FakeRequest | None = None  # the inference request not answered yet

    def peer_closed(self) -> bool:
        """Whether the peer's FIN or RST is here, even if the event loop has not met it yet."""
        if self.gone.is_set() or self.writer.transport.is_closing():
            return True
        with socket.socket(fileno=os.dup(self.writer.get_extra_info("socket").fileno())) as twin:
            try:
                return not twin.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                return True

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        if sock is not None and not self.writer.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()


class FakeRequest:
    """One inference request at a backend, answered by the test's hand."""

    def __init__(self, connection: Connection, head: bytes, body: bytes) -> None:
        self.connection = connection
        self.raw = head
        first, self.header_list = split_head(head)
        self.method, self.path, _ = first.split(" ")
        self.headers = dict(self.header_list)
        self.body = body
        self.done = asyncio.Event()  # answered, or its connection is gone

    def __repr__(self) -> str:
        return f"<{self.method} {self.path} on {self.connection.number} {self.body[:200]!r}>"

    @property
    def json(self) -> Any:
        return jsonlib.loads(self.body)

    @property
    def text(self) -> str:
        """The last user message."""
        said = [m for m in self.json.get("messages", []) if m.get("role") == "user"]
        content = said[-1]["content"] if said else ""
        if isinstance(content, str):
            return content
        return "".join(part.get("text", "") for part in content)

    async def send(self, data: bytes) -> None:
        """These very bytes."""
        self.connection.writer.write(data)
        await self.connection.writer.drain()

    def finished(self) -> None:
        """No longer active; said before the last bytes leave, as a real runner frees its slot."""
        self.done.set()
        if self.connection.current is self:
            self.connection.current = None

    async def status(self, status: int, body: Any, headers: Any = ()) -> None:
        """A whole answer; `body` bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else jsonlib.dumps(body).encode()
        self.finished()
        await self.send(render_answer(status, data, headers))

    async def answer(self, text: str) -> None:
        """The model's text, whole or word by word as the request asked."""
        if not self.json.get("stream"):
            await self.status(200, completion(self.json.get("model"), text))
            return
        await self.start_stream()
        for word in words(text):
            await self.piece(word)
        await self.finish_stream(tokens=len(words(text)))

    async def start_stream(self, headers: Any = ()) -> None:
        """The head of a chunked event stream, and the event that names the role."""
        lines = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"), *headers]
        await self.send(render_head(200, lines))

    async def event(self, payload: Any) -> None:
        await self.send(chunk(sse(payload)))

    async def piece(self, word: str) -> None:
        """One more piece of the model's text."""
        await self.event(completion_chunk(self.json.get("model"), {"content": word}))

    async def finish_stream(self, tokens: int = 0) -> None:
        """The finish reason, usage where asked for, [DONE] and the last chunk."""
        self.finished()
        model = self.json.get("model")
        data = chunk(sse(completion_chunk(model, {}, "stop")))
        if (self.json.get("stream_options") or {}).get("include_usage"):
            usage = completion_chunk(model, None)
            usage["usage"] = usage_of(tokens)
            data += chunk(sse(usage))
        await self.send(data + chunk(sse("[DONE]")) + b"0\r\n\r\n")

    def close(self) -> None:
        """Close the connection in good order, whatever was promised."""
        self.finished()
        self.connection.writer.close()

    def reset(self) -> None:
        """Break the connection with a reset."""
        self.finished()
        self.connection.reset()

    async def left(self) -> None:
        """Wait until llmq has closed this connection."""
        await self.connection.gone.wait()


def render_head(status: int, headers: Any) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def render_answer(status: int, body: bytes, headers: Any = ()) -> bytes:
    pairs = list(headers)
    if "content-type" not in {name.lower() for name, _ in pairs}:
        pairs.append(("Content-Type", "application/json"))
    return render_head(status, [*pairs, ("Content-Length", str(len(body)))]) + body


def usage_of(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def completion(model: Any, text: str) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [choice],
        "usage": usage_of(len(words(text))),
    }


def completion_chunk(model: Any, delta: Any, finish: str | None = None) -> dict[str, Any]:
    """One event of a stream; `delta=None` makes the one without choices."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [] if delta is None else [choice],
    }


class FakeBackend:
    """A runner on a real socket: probes answered as its kind does, inference alone or by hand."""

    def __init__(
        self, models: Any = ("m",), kind: str = "openai", auto: bool = True, port: int = 0
    ) -> None:
        self.models = list(models)
        self.kind = kind
        self.auto = auto
        self.port = port
        self.requests: list[FakeRequest] = []  # every inference request so far
        self.max_active = 0  # the most that were being served at once
        self.probe_paths: list[str] = []  # every GET and HEAD so far
        self.probe_status = 200  # of every probe that would succeed
        self.probe_answers: dict[str, tuple[int, Any]] = {}  # path -> status, body: goes first
        self.loaded: list[str] = []  # what /api/ps says
        self.connections = 0  # accepted so far
        self.faults: list[str] = []  # where llmq broke HTTP; checked when the block ends
        self.open: set[Connection] = set()
        self._queue: asyncio.Queue[FakeRequest] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate = asyncio.Event()  # auto answers pass when it is set
        self._gate.set()
        self._probe_gate = asyncio.Event()
        self._probe_gate.set()
        self._server: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def probes(self) -> int:
        return len(self.probe_paths)

    @property
    def active(self) -> int:
        """Inference requests being served now; one whose client's end is here counts no more."""
        current = [c.current for c in self.open if c.current and not c.peer_closed()]
        return len([request for request in current if not request.done.is_set()])

    async def __aenter__(self) -> FakeBackend:
        await self.listen_again()
        return self

    async def __aexit__(self, failure: Any, *_: object) -> None:
        await self.stop_listening()
        self.drop_connections()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if failure is None:
            assert not self.faults, self.faults

    async def stop_listening(self) -> None:
        """Refuse new connections; those there go on."""
        if self._server is not None:
            loop = asyncio.get_running_loop()
            for listening in self._server.sockets:  # to close them now could lose a connection
                loop.remove_reader(listening.fileno())
            turn = loop.create_future()
            loop.call_soon(turn.set_result, None)
            await turn  # who was just accepted is known now
            self._server.close()
            self._server = None

    async def listen_again(self) -> None:
        """Accept connections (again, on the same port)."""
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=1 << 28, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def drop_connections(self) -> None:
        """Reset every open connection, as a killed runner does."""
        for connection in list(self.open):
            connection.reset()

    def hold(self) -> None:
        """Let automatic answers wait until `release()`."""
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    def hold_probes(self) -> None:
        """Let probes hang until `release_probes()`."""
        self._probe_gate.clear()

    def release_probes(self) -> None:
        self._probe_gate.set()

    async def arrived(self) -> FakeRequest:
        """The next inference request that the test has not taken yet."""
        return await self._queue.get()

    def has_arrived(self) -> bool:
        """Whether `arrived()` would return at once."""
        return not self._queue.empty()

    def _start(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = Connection(self.connections, reader, writer)
        self.open.add(connection)  # here, for its task may be cancelled before it begins
        self._start(self._serve(connection))

    async def _serve(self, connection: Connection) -> None:
        """Read requests to the end of the connection, also while one is being answered."""
        try:
            while True:
                head = (await connection.reader.readuntil(b"\r\n\r\n"))[:-4]
                self._judge(connection, head)
                body = await self._read_body(connection.reader, dict(split_head(head)[1]))
                self._take(FakeRequest(connection, head, body))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass  # the peer left
        finally:
            if connection.current:
                connection.current.finished()
            connection.gone.set()
            self.open.discard(connection)
            connection.writer.transport.abort()  # nobody is there for what is still unsent

    def _judge(self, connection: Connection, head: bytes) -> None:
        """Note where the head breaks the rules of HTTP/1.1 for a client."""
        first, *lines = head.split(b"\r\n")
        if not REQUEST_LINE.fullmatch(first):
            self.faults.append(f"bad request line {first!r}")
        self.faults += [f"bad line {line!r}" for line in lines if not HEADER_LINE.fullmatch(line)]
        names = [line.split(b":")[0].lower() for line in lines]
        if names.count(b"host") != 1:
            self.faults.append(f"{names.count(b'host')} Host lines in {head!r}")
        if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
            self.faults.append(f"more than one framing in {head!r}")
        if connection.current is not None:
            self.faults.append(f"pipelined: {first!r}")

    async def _read_body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await reader.readexactly(int(headers.get("content-length", "0")))
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return body

    def _take(self, request: FakeRequest) -> None:
        if request.method != "POST":
            self.probe_paths.append(request.path)
            self._start(self._answer_probe(request))
            return
        request.connection.current = request
        self.requests.append(request)
        self.max_active = max(self.max_active, self.active)
        if self.auto:
            self._start(self._answer(request))
        else:
            self._queue.put_nowait(request)

    async def _answer(self, request: FakeRequest) -> None:
        await self._gate.wait()
        with contextlib.suppress(ConnectionError):
            if request.path.split("?")[0].endswith("/chat/completions"):
                await request.answer(request.text)
            else:
                await request.status(404, {"error": {"message": "no such route", "code": 404}})
            if request.headers.get("connection", "").lower() == "close":
                request.close()

    async def _answer_probe(self, request: FakeRequest) -> None:
        await self._probe_gate.wait()
        path = request.path.split("?")[0]
        status, body = self.probe_answers.get(path) or self._probe(path)
        headers = [("Server", "llama.cpp")] if self.kind == "llamacpp" else []
        if isinstance(body, str):
            body, headers = body.encode(), [*headers, ("Content-Type", "text/plain")]
        data = body if isinstance(body, bytes) else jsonlib.dumps(body).encode()
        answer = render_answer(status, data, headers)
        with contextlib.suppress(ConnectionError):
            await request.send(
                answer[: len(answer) - len(data)] if request.method == "HEAD" else answer
            )
            if request.headers.get("connection", "").lower() == "close":
                request.close()

    def _probe(self, path: str) -> tuple[int, Any]:
        """Status and body of a probe, as this kind of runner answers it."""
        body = PROBES.get((self.kind, path)) or PROBES.get(("", path))
        if body is None:
            return 404, {"error": {"message": f"{path} not found", "code": 404}}
        if self.probe_status != 200:
            return self.probe_status, LOADING
        return 200, body(self)


@contextlib.contextmanager
def black_hole(port: int) -> Iterator[None]:
    """A listener whose queue of connections is full: the next SYN is not answered."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield


def openai_models(owner: str) -> Callable[[FakeBackend], Any]:
    def listing(fake: FakeBackend) -> Any:
        rows = [{"id": m, "object": "model", "created": 1, "owned_by": owner} for m in fake.models]
        return {"object": "list", "data": rows}

    return listing


def ollama_models(names: Callable[[FakeBackend], list[str]]) -> Callable[[FakeBackend], Any]:
    def listing(fake: FakeBackend) -> Any:
        rows = [
            {"name": n, "model": n, "size": 1, "digest": "d", "details": {}} for n in names(fake)
        ]
        return {"models": rows}

    return listing


def lmstudio_models(fake: FakeBackend) -> Any:
    rows = [{"id": m, "object": "model", "type": "llm", "state": "loaded"} for m in fake.models]
    return {"object": "list", "data": rows}


PROBES: dict[tuple[str, str], Callable[[FakeBackend], Any]] = {
    ("", "/v1/models"): openai_models("fake"),
    ("ollama", "/v1/models"): openai_models("library"),
    ("ollama", "/"): lambda _: "Ollama is running",
    ("ollama", "/api/version"): lambda _: {"version": "0.12.0"},
    ("ollama", "/api/tags"): ollama_models(lambda fake: fake.models),
    ("ollama", "/api/ps"): ollama_models(lambda fake: fake.loaded),
    ("llamacpp", "/v1/models"): openai_models("llamacpp"),
    ("llamacpp", "/health"): lambda _: {"status": "ok"},
    ("llamacpp", "/props"): lambda fake: {"total_slots": 1, "model_path": fake.models[0]},
    ("lmstudio", "/v1/models"): openai_models("organization_owner"),
    ("lmstudio", "/api/v0/models"): lmstudio_models,
    ("vllm", "/v1/models"): openai_models("vllm"),
    ("vllm", "/version"): lambda _: {"version": "0.6.0"},
    ("vllm", "/health"): lambda _: "",
}


# ---- llmq itself -----------------------------------------------------------------------------


class running:  # noqa: N801 - reads as a sentence: async with running(fake.url) as q
    """llmq in this process, on a free port; `server__keep_alive=1` sets `server.keep_alive`."""

    def __init__(self, *urls: str, **settings: Any) -> None:
        self.values: dict[str, Any] = {"server.port": 0, "server.drain_timeout": 1}
        self.values["server.state"] = ""  # not the user's own
        if urls:
            self.values["backends"] = list(urls)
        self.values.update({name.replace("__", "."): value for name, value in settings.items()})
        self.service: Any = None
        self.port = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def gateway(self) -> Any:
        return self.service.gateway

    async def __aenter__(self) -> running:
        llmq, derived = map(importlib.import_module, ("llmq", "tests.derived"))
        self.service = llmq.Service(derived.build_settings(self.values))
        await self.service.start()
        self.port = self.service.port
        return self

    async def __aexit__(self, failure: Any, *_: object) -> None:
        await self.service.stop()
        if failure is None:
            assert not (left := self.left_over()), f"left in the scheduler after the stop: {left}"

    async def chat(self, text: str, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        """One chat completion on its own connection."""
        body = chat(text, **more)
        return await ask(self.port, "POST", "/v1/chat/completions", json=body, headers=headers)

    async def status(self) -> Any:
        """The snapshot of /llmq/status."""
        return (await ask(self.port, "GET", "/llmq/status")).json()

    def left_over(self) -> dict[str, Any]:
        """What still waits, runs or holds room by the scheduler's own books."""
        scheduler = self.gateway.scheduler
        names = ("waiting", "running", "queued_bytes")
        left = {name: getattr(scheduler, name) for name in names}
        rooms = {**scheduler.fleet.devices, **scheduler.fleet.backends}
        left.update({f"busy {name}": room.busy for name, room in rooms.items()})
        return {name: value for name, value in left.items() if value}


class Process:
    """llmq.py as a subprocess: `with` in a plain test, `async with` beside a fake backend.

    In an async test use `await p.line(...)` and `await p.ended(...)`: `wait_for` and `stop`
    block, and a fake backend in the same loop could not answer meanwhile.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        cwd: Any = None,
        ready: bool = True,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.command = [python, str(LLMQ), *arguments]
        self.home = tempfile.TemporaryDirectory(prefix="llmq-test-")
        self.cwd = cwd or self.home.name
        self.env = {**clean_environment(self.home.name), **(env or {})}
        self.ready = ready  # wait for the address in the banner before the block begins
        self.pass_fds = pass_fds
        self.port = 0
        self.text = ""
        self.news = threading.Condition()
        self.over = False  # the output ended
        self.popen: Any = None

    @property
    def pid(self) -> int:
        return int(self.popen.pid)

    @property
    def output(self) -> str:
        """Everything printed so far, both streams."""
        with self.news:
            return self.text

    def __enter__(self) -> Process:
        self.popen = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.cwd,
            env=self.env,
            pass_fds=self.pass_fds,
        )
        self.thread = threading.Thread(target=self._collect, daemon=True)
        self.thread.start()
        try:
            if self.ready:
                found = self.wait_for(r"https?://(?:\[[0-9a-f:.]+\]|[\w.-]+):(\d+)")
                self.port = int(found.group(1))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.thread.join()
        self.popen.stdout.close()
        self.home.cleanup()

    async def __aenter__(self) -> Process:
        return await asyncio.get_running_loop().run_in_executor(None, self.__enter__)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.__exit__)

    def _collect(self) -> None:
        for line in self.popen.stdout:
            with self.news:
                self.text += line.decode(errors="replace")
                self.news.notify_all()
        with self.news:
            self.over = True
            self.news.notify_all()

    def wait_for(self, pattern: str, seconds: float = 8) -> Any:
        """The first match of `pattern` in the output, once it is there."""
        with self.news:
            self.news.wait_for(lambda: self.over or re.search(pattern, self.text), seconds)
            found = re.search(pattern, self.text)
        assert found, f"no {pattern!r} in the output of {self.command}:\n{self.text}"
        return found

    async def line(self, pattern: str, seconds: float = 8) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            None, self.wait_for, pattern, seconds
        )

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def stop(self, number: int = signals.SIGTERM, seconds: float = 8) -> int:
        """Send a signal (0: none) and return the exit code."""
        if number:
            self.signal(number)
        code = self.popen.wait(seconds)
        self.thread.join()
        return int(code)

    async def ended(self, number: int = signals.SIGTERM, seconds: float = 8) -> int:
        return await asyncio.get_running_loop().run_in_executor(None, self.stop, number, seconds)


def clean_environment(home: str) -> dict[str, str]:
    """Nothing that could steer llmq; coverage's own variables, so that subprocesses count."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return {"PATH": os.environ["PATH"], "HOME": home, "LANG": "C.UTF-8", **kept}


def run_llmq(
    *arguments: str,
    env: dict[str, str] | None = None,
    python: str = sys.executable,
    seconds: float = 8,
) -> subprocess.CompletedProcess[str]:
    """Run llmq.py to its end: .returncode .stdout .stderr."""
    with tempfile.TemporaryDirectory(prefix="llmq-test-") as home:
        return subprocess.run(
            [python, str(LLMQ), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=home,
            env={**clean_environment(home), **(env or {})},
            check=False,
        )
