#!/usr/bin/env python3
"""Fake local LLM backend (Ollama + OpenAI dialects) for measuring what stands in front of it.

Raw asyncio.Protocol, standard library only (uvloop is used when --uvloop is given and it is
installed).  It answers as fast as Python can, so that nearly all the time seen by a client
behind a proxy is the proxy's, and it writes down when every request came and went.

Work endpoints (POST):  /v1/chat/completions  /v1/completions  /api/chat  /api/generate
Info endpoints (GET):   /api/tags  /api/version  /api/ps  /v1/models  /
Control endpoints:      GET  /_stats          counters, see Recorder.dump(); ?records=1 adds rows
                        POST /_reset          forget everything recorded
                        POST /_config {json}  change service_ms, tokens, delay_ms, hold, reply_bytes
                        POST /_release        let every held request go (and hold no more)

Model of work: a non-streaming request is answered `service_ms` after its last byte came.  A
streaming request sends `tokens` tokens, the first after `first_ms`, then one each `delay_ms`; at
delay 0 one token is written per event-loop turn.  Each token's text holds the CLOCK_MONOTONIC
time (ns) at which it was written ("t=123;"), so that a client on the same machine can tell how
long it travelled, whatever the proxy in between did to the JSON around it.

A request may carry a marker "#id=TEXT#" anywhere in its body (put it at the start of the prompt);
it is written in the request's record, so a client can follow its requests through any proxy.
"""
import argparse
import asyncio
import contextlib
import json
import sys
import time

now = time.monotonic_ns


class Conf:
    service_ms = 0.0
    tokens = 16
    delay_ms = 0.0
    first_ms = 0.0
    reply_bytes = 24
    hold = False
    html = False      # put <, > and & in replies, escaped the way Go's encoder writes them


conf = Conf()


class Rec:
    __slots__ = ("aborted", "arrive", "conc", "conn", "finish", "ident", "path", "stream")

    def __init__(self, ident, path, stream, arrive, conc, conn):
        self.ident, self.path, self.stream, self.arrive = ident, path, stream, arrive
        self.finish, self.aborted, self.conc, self.conn = 0, 0, conc, conn

    def row(self):
        return [self.ident, self.path, int(self.stream), self.arrive, self.finish,
                self.aborted, self.conc, self.conn]


class Recorder:
    def __init__(self):
        self.connections = 0
        self.active = 0
        self.generation = 0
        self.waiting = []          # held starters
        self.reset()

    def reset(self):
        self.rows = []
        self.max_active = self.active
        self.connections_seen = 0
        self.bad = 0
        self.generation += 1

    def begin(self, ident, path, stream, conn):
        self.active += 1
        self.max_active = max(self.max_active, self.active)
        rec = Rec(ident, path, stream, now(), self.active, conn)
        self.rows.append(rec)
        return rec

    def end(self, rec, aborted=0):
        if rec.finish == 0:
            rec.finish = now()
            rec.aborted = aborted
            self.active -= 1

    def dump(self, rows):
        done = [r for r in self.rows if r.finish]
        out = {"requests": len(self.rows), "finished": len(done),
               "aborted": sum(r.aborted for r in done), "active": self.active,
               "max_concurrency": self.max_active, "held": len(self.waiting),
               "connections_open": self.connections, "connections_new": self.connections_seen,
               "bad_requests": self.bad, "now": now()}
        if rows:
            out["columns"] = ["id", "path", "stream", "arrive", "finish", "aborted", "conc", "conn"]
            out["records"] = [r.row() for r in self.rows]
        return out


rec_all = Recorder()

HEAD_SSE = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n")
HEAD_NDJSON = (b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
               b"transfer-encoding: chunked\r\n\r\n")


def jb(value):
    return json.dumps(value, separators=(",", ":")).encode()


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


MODEL = "mock:1b"
STAMP = "2026-01-01T00:00:00Z"
TAGS = jb({"models": [{"name": MODEL, "model": MODEL, "modified_at": STAMP, "size": 1 << 30,
                       "digest": "0" * 64, "details": {"family": "mock", "format": "gguf"}}]})
PS = jb({"models": [{"name": MODEL, "model": MODEL, "size": 1 << 30, "size_vram": 1 << 30,
                     "digest": "0" * 64, "expires_at": STAMP, "details": {}}]})
MODELS = jb({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0,
                                         "owned_by": "mock"}]})
INFO = {b"/api/tags": TAGS, b"/api/ps": PS, b"/v1/models": MODELS,
        b"/api/version": jb({"version": "0.0.0-mock"}), b"/": b'"Ollama is running"',
        b"/health": b'{"ok":true}'}

OPENAI, COMPLETION, OCHAT, OGEN = range(4)
WORK = {b"/v1/chat/completions": OPENAI, b"/v1/completions": COMPLETION,
        b"/api/chat": OCHAT, b"/api/generate": OGEN}


def full_reply(kind, text):
    if kind == OPENAI:
        return jb({"id": "chatcmpl-mock", "object": "chat.completion", "created": 1, "model": MODEL,
                   "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                                "finish_reason": "stop"}],
                   "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})
    if kind == COMPLETION:
        return jb({"id": "cmpl-mock", "object": "text_completion", "created": 1, "model": MODEL,
                   "choices": [{"index": 0, "text": text, "finish_reason": "stop"}],
                   "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})
    out = {"model": MODEL, "created_at": STAMP}
    if kind == OCHAT:
        out["message"] = {"role": "assistant", "content": text}
    else:
        out["response"] = text
    out.update(done=True, done_reason="stop", total_duration=1, eval_count=1)
    return jb(out)


SSE_A = b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1,"model":"' + \
        MODEL.encode() + b'","choices":[{"index":0,"delta":{"content":"t='
SSE_B = b';"},"finish_reason":null}]}\n\n'
SSE_END = b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1,"model":"' + \
          MODEL.encode() + b'","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n' \
          b'data: [DONE]\n\n'
CHAT_A = b'{"model":"' + MODEL.encode() + b'","created_at":"' + STAMP.encode() + \
         b'","message":{"role":"assistant","content":"t='
CHAT_B = b';"},"done":false}\n'
CHAT_END = b'{"model":"' + MODEL.encode() + b'","created_at":"' + STAMP.encode() + \
           b'","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}\n'
GEN_A = b'{"model":"' + MODEL.encode() + b'","created_at":"' + STAMP.encode() + b'","response":"t='
GEN_B = b';","done":false}\n'
GEN_END = b'{"model":"' + MODEL.encode() + b'","created_at":"' + STAMP.encode() + \
          b'","response":"","done":true,"done_reason":"stop"}\n'
PARTS = {OPENAI: (SSE_A, SSE_B, SSE_END), COMPLETION: (SSE_A, SSE_B, SSE_END),
         OCHAT: (CHAT_A, CHAT_B, CHAT_END), OGEN: (GEN_A, GEN_B, GEN_END)}


class Backend(asyncio.Protocol):
    counter = 0

    def __init__(self, loop):
        self.loop = loop
        self.buf = b""
        self.need = 0
        self.rec = None
        self.timer = None
        Backend.counter += 1
        self.number = Backend.counter

    def connection_made(self, transport):
        self.transport = transport
        rec_all.connections += 1
        rec_all.connections_seen += 1

    def connection_lost(self, _exc):
        rec_all.connections -= 1
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.rec is not None:
            rec_all.end(self.rec, aborted=1)
            self.rec = None

    def data_received(self, data):
        self.buf = self.buf + data if self.buf else data
        if self.rec is None and len(self.buf) >= self.need:
            self.parse()

    def parse(self):
        while self.rec is None and self.buf:
            buf = self.buf
            split = buf.find(b"\r\n\r\n")
            if split < 0:
                return
            head = buf[:split].lower()
            start = split + 4
            spot = head.find(b"\r\ncontent-length:")
            if spot >= 0:
                stop = head.find(b"\r\n", spot + 2)
                size = int(head[spot + 17:stop if stop > 0 else len(head)])
                if len(buf) < start + size:
                    self.need = start + size
                    return
                body, self.buf = buf[start:start + size], buf[start + size:]
            elif head.find(b"\r\ntransfer-encoding: chunked") >= 0:
                body, rest = self.dechunk(buf, start)
                if body is None:
                    return
                self.buf = rest
            else:
                body, self.buf = b"", buf[start:]
            self.need = 0
            line = buf[:buf.find(b"\r\n")].split(b" ")
            if len(line) != 3:
                rec_all.bad += 1
                self.transport.close()
                return
            self.handle(line[0], line[1], body, head.find(b"\r\nconnection: close") >= 0)

    @staticmethod
    def dechunk(buf, at):
        parts = []
        while True:
            end = buf.find(b"\r\n", at)
            if end < 0:
                return None, None
            size = int(buf[at:end].split(b";")[0], 16)
            at = end + 2
            if len(buf) < at + size + 2:
                return None, None
            if size == 0:
                return b"".join(parts), buf[at + 2:]
            parts.append(buf[at:at + size])
            at += size + 2

    def handle(self, method, target, body, close):
        path = target.split(b"?")[0]
        if path in WORK and method == b"POST":
            self.close_after = close
            self.work(WORK[path], path.decode(), body)
        elif path in INFO and method in (b"GET", b"HEAD"):
            self.reply(b"" if method == b"HEAD" else INFO[path])
        elif path in CONTROL:
            self.reply(jb(CONTROL[path](target, body)))
        else:
            self.reply(b'{"error":"not found"}', b"404 Not Found")

    def reply(self, data, status=b"200 OK"):
        self.transport.write(b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n"
                             b"content-length: %d\r\n\r\n%b" % (status, len(data), data))

    def work(self, kind, path, body):
        spot = body.find(b"#id=")
        ident = body[spot + 4:body.find(b"#", spot + 4)].decode("latin-1") if spot >= 0 else ""
        text = body.replace(b" ", b"")
        if kind in (OPENAI, COMPLETION):
            stream = text.find(b'"stream":true') >= 0
        else:
            stream = text.find(b'"stream":false') < 0
        self.rec = rec_all.begin(ident, path, stream, self.number)
        if conf.hold:
            rec_all.waiting.append((self, kind, stream, self.rec))
        else:
            self.start(kind, stream)

    def start(self, kind, stream):
        if stream:
            wait = conf.first_ms / 1e3
            self.left = conf.tokens
            self.due = self.loop.time() + wait
            self.transport.write(HEAD_SSE if kind in (OPENAI, COMPLETION) else HEAD_NDJSON)
            step = self.token
        else:
            wait = conf.service_ms / 1e3
            step = self.answer
        if wait > 0:
            self.timer = self.loop.call_later(wait, step, kind)
        else:
            step(kind)

    def answer(self, kind):
        self.timer = None
        text = f"t={now()};"
        if conf.reply_bytes > len(text):
            text += "x" * (conf.reply_bytes - len(text))
        data = full_reply(kind, text + "<a&b>" if conf.html else text)
        if conf.html:
            for char in b"<>&":
                data = data.replace(bytes([char]), b"\\u%04x" % char)
        rec_all.end(self.rec)
        self.rec = None
        self.reply(data)
        self.after()

    def token(self, kind):
        self.timer = None
        first, last, end = PARTS[kind]
        if self.left > 0:
            self.left -= 1
            self.transport.write(chunk(first + b"%d" % now() + last))
            if conf.delay_ms > 0:
                self.due += conf.delay_ms / 1e3
                self.timer = self.loop.call_at(self.due, self.token, kind)
            else:
                self.timer = self.loop.call_soon(self.token, kind)
            return
        rec_all.end(self.rec)
        self.rec = None
        self.transport.write(chunk(end) + b"0\r\n\r\n")
        self.after()

    def after(self):
        if self.close_after:
            self.transport.close()
        elif self.buf:
            self.loop.call_soon(self.parse)


def control_stats(target, _body):
    return rec_all.dump(b"records=1" in target)


def control_reset(_target, _body):
    rec_all.reset()
    return {}


def control_config(_target, body):
    for key, value in json.loads(body or b"{}").items():
        if not hasattr(Conf, key):
            raise SystemExit("unknown setting " + key)
        setattr(conf, key, value)
    return {k: getattr(conf, k) for k in vars(Conf) if not k.startswith("_")}


def control_release(_target, _body):
    conf.hold = False
    held, rec_all.waiting = rec_all.waiting, []
    for proto, kind, stream, rec in held:
        if proto.rec is rec:
            proto.start(kind, stream)
    return {"released": len(held)}


CONTROL = {b"/_stats": control_stats, b"/_reset": control_reset, b"/_config": control_config,
           b"/_release": control_release}


async def serve(args):
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Backend(loop), "127.0.0.1", args.port, backlog=4096)
    print(f"mock backend on http://127.0.0.1:{args.port}", flush=True)
    if args.max_seconds:
        loop.call_later(args.max_seconds, server.close)
        await asyncio.sleep(args.max_seconds)
    else:
        await server.serve_forever()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--port", type=int, default=18000)
    ap.add_argument("--service-ms", type=float, default=0.0)
    ap.add_argument("--tokens", type=int, default=16)
    ap.add_argument("--delay-ms", type=float, default=0.0)
    ap.add_argument("--uvloop", action="store_true", help="use uvloop when it is installed")
    ap.add_argument("--max-seconds", type=float, default=7200.0, help="stop by itself after this")
    args = ap.parse_args()
    conf.service_ms, conf.tokens, conf.delay_ms = args.service_ms, args.tokens, args.delay_ms
    if args.uvloop:
        try:
            import uvloop
            uvloop.install()
        except ImportError:
            print("uvloop is not installed: plain asyncio", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(serve(args))


if __name__ == "__main__":
    main()
