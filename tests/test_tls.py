"""HTTPS: every client by a CA of its own, certificates anew, and what comes badly or slowly."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import llmq
from tests.cdp import Browser, Page
from tests.derived import build_settings
from tests.fake_runner import Runner
from tests.fakes import (
    Answer,
    FakeBackend,
    FakeRequest,
    Process,
    Raw,
    ask,
    chat,
    chunk,
    completion,
    eventually,
    http,
    need,
    require_command,
    run_llmq,
    running,
    words,
)
from tests.real import peers
from tests.real.drivers import Driver, Work
from tests.real.wires import events
from tests.test_page import LIVE
from tests.test_routes import told

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
SDKS = ("openai", "anthropic", "ollama")
LARGE = 10 * 1024 * 1024
ROOT_CA = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
LEAF = "basicConstraints=critical,CA:FALSE\nauthorityKeyIdentifier=keyid\n"
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # how a handshake begins


# ---- Certificates ----------------------------------------------------------------------------


class Papers:
    """Certificates in a folder, each NAME.pem with its NAME.key, made by openssl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.openssl = require_command("openssl")

    def run(self, *arguments: str, given: bytes = b"") -> bytes:
        command = [self.openssl, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def make(self, name: str, extensions: str, signer: str = "", subject: str = "") -> str:
        """A new certificate, signed by another one or by itself."""
        config = self.folder / f"{name}.cnf"
        config.write_text(
            f"[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN={subject or name}\n"
            f"[more]\nsubjectKeyIdentifier=hash\n{extensions}"
        )
        made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        made += ["-nodes", "-days", "2", "-config", str(config), "-extensions", "more"]
        made += ["-keyout", self.path(f"{name}.key"), "-out", self.path(f"{name}.pem")]
        if signer:
            made += ["-CA", self.path(f"{signer}.pem"), "-CAkey", self.path(f"{signer}.key")]
        self.run(*made)
        return self.path(f"{name}.pem")

    def server(self, name: str, signer: str = "ca") -> str:
        names = "subjectAltName=IP:127.0.0.1,IP:::1,DNS:localhost,DNS:gpu-box\n"
        return self.make(name, LEAF + names, signer)

    def der(self, name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert((self.folder / f"{name}.pem").read_text())

    def pin(self, name: str) -> str:
        """What Chromium calls this certificate's key."""
        key = self.run("x509", "-in", self.path(f"{name}.pem"), "-noout", "-pubkey")
        data = self.run("pkey", "-pubin", "-outform", "der", given=key)
        return base64.b64encode(hashlib.sha256(data).digest()).decode()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "server__tls_cert": self.path("server.pem"),
            "server__tls_key": self.path("server.key"),
        }

    @property
    def variables(self) -> dict[str, str]:
        return {f"LLMQ_{name.upper().replace('__', '_')}": v for name, v in self.settings.items()}

    @property
    def flags(self) -> list[str]:
        return ["--tls-cert", self.path("server.pem"), "--tls-key", self.path("server.key")]

    def trusting(self, name: str = "ca", own: str = "") -> ssl.SSLContext:
        """What a client needs that trusts this CA, and shows a certificate of its own."""
        context = ssl.create_default_context(cafile=self.path(f"{name}.pem"))
        if own:
            context.load_cert_chain(self.path(f"{own}.pem"), self.path(f"{own}.key"))
        return context


def make_papers(folder: Path) -> Papers:
    made = Papers(folder)
    made.make("ca", ROOT_CA, subject="the CA of a test")
    made.make("other-ca", ROOT_CA, subject="another CA")
    made.server("server")
    made.server("second")
    made.make("client", LEAF, "ca")
    made.make("stranger", LEAF, "other-ca")
    return made


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return make_papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture
def own_papers(papers: Papers, tmp_path: Path) -> Papers:
    """The same in a folder of this test, which may change them."""
    shutil.copytree(papers.folder, tmp_path / "papers")
    return Papers(tmp_path / "papers")


# ---- A client, and llmq ----------------------------------------------------------------------


class Tls(Raw):
    """A client's socket with TLS over it, which may stop anywhere."""

    async def shake(self, context: ssl.SSLContext, name: str = "127.0.0.1") -> Tls:
        """Shake hands; ssl.SSLError or EOFError where the other side does not want to."""
        self.coming, self.going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.coming, self.going, server_hostname=name)
        await self._go(self.tls.do_handshake)
        return self

    async def _go(self, work: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        while True:
            try:
                done = work(*arguments)
            except ssl.SSLWantReadError:
                await self._flush()
                data = await loop.sock_recv(self.socket, 65536)
                if data:
                    self.coming.write(data)
                else:
                    self.coming.write_eof()
                continue
            await self._flush()
            return done

    async def _flush(self) -> None:
        if self.going.pending:
            await asyncio.get_running_loop().sock_sendall(self.socket, self.going.read())

    async def send(self, data: bytes) -> None:
        self.method = data.partition(b" ")[0].decode("latin-1")
        self.tls.write(data)
        await self._flush()

    async def _receive(self, size: int = 65536) -> bytes:
        """As of Raw; "eof" is an end that was said, "reset" any other."""
        if self.ended:
            return b""
        try:
            data = await self._go(self.tls.read, size)
        except (ConnectionError, TimeoutError, ssl.SSLError):
            self.ended = "reset"
            return b""
        if not data:
            self.ended = "eof"
        return bytes(data)

    def fin(self) -> None:
        """Say the end, and read on: TLS's half-close."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.socket.send(self.going.read())

    def hang_up(self) -> None:
        """End the sending side with no word of it."""
        self.socket.shutdown(socket.SHUT_WR)


class serving(running):  # noqa: N801 - reads as its parent does
    """llmq over HTTPS with these papers, or over HTTP without; `ask` and `connect` know how."""

    def __init__(self, papers: Papers | None, *urls: str, **settings: Any) -> None:
        super().__init__(*urls, **{**(papers.settings if papers else {}), **settings})
        self.papers = papers

    @property
    def base(self) -> str:
        return f"http{'s' * bool(self.papers)}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> list[Any]:
        return list(self.service._servers[0].connections)

    async def connect(self, receive_buffer: int = 0, own: str = "") -> Raw:
        return await connect(self.port, self.papers, receive_buffer, own)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        async with await self.connect() as raw:
            data = None if body is None else json.dumps(body).encode()
            await raw.send(http(method, path, {**JSON, "Connection": "close", **headers}, data))
            return await raw.response()

    async def status(self) -> Any:
        return (await self.ask("GET", "/llmq/status")).json()


async def connect(port: int, papers: Papers | None, receive_buffer: int = 0, own: str = "") -> Raw:
    if papers is None:
        return await Raw.open(port, receive_buffer=receive_buffer)
    raw = await Tls.open(port, receive_buffer=receive_buffer)
    assert isinstance(raw, Tls)
    return await raw.shake(papers.trusting(own=own))


async def begin(q: serving, text: str, receive_buffer: int = 0, **more: Any) -> Raw:
    """A client that has sent its request and waits."""
    raw = await q.connect(receive_buffer)
    await raw.send(http("POST", CHAT, JSON, json.dumps(chat(text, **more)).encode()))
    return raw


@pytest.fixture
def way(papers: Papers) -> Papers | None:
    """What must be the same as over plain HTTP; None here, and TLS makes no difference."""
    return papers


@contextlib.contextmanager
def nothing_to_say() -> Iterator[list[str]]:
    """llmq's log holds no warning at the end, and no traceback."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(self.format(record))

    ear = Ear(logging.WARNING)
    llmq.log.addHandler(ear)
    try:
        yield said
    finally:
        llmq.log.removeHandler(ear)
    assert not said, said[0]


async def beside(work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What a call returns that waits for something of this loop."""
    call = functools.partial(work, *arguments, **more)
    return await asyncio.get_running_loop().run_in_executor(None, call)


async def command(*arguments: str, **env: str) -> tuple[int, str, str]:
    """Exit code, output and errors of an llmq command."""
    done = await beside(run_llmq, *arguments, env=env)
    return done.returncode, done.stdout, done.stderr


async def curl(*arguments: str) -> tuple[int, str]:
    """Exit code and output of curl."""
    typed = [require_command("curl"), "-sS", "--max-time", "8", *arguments]
    done = await beside(
        subprocess.run, typed, capture_output=True, text=True, check=False, env={"HOME": "/"}
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def library(name: str, **env: str) -> Iterator[Driver]:
    """The driver of an official library for Python, with these variables."""
    script = Path(peers.HERE) / f"drive_{name}.py"
    try:
        driver = Driver([peers.python(), str(script)], peers.HERE)
        driver.environment.update(env)
        driver.log = peers.CACHE / f"drive_{name}-{os.getpid()}.log"
        with driver:
            yield driver.is_ready(30)
    except peers.Missing as reason:
        need(False, str(reason))
    finally:
        (peers.CACHE / f"drive_{name}-{os.getpid()}.log").unlink(missing_ok=True)


async def done(work: Work) -> Any:
    await eventually(lambda: work.over, 15)
    assert work.raised is None, work
    return work.done


async def assert_library_works(driver: Driver, url: str) -> None:
    """It lists models, gets a whole answer and a stream."""
    text = "one two three four"
    assert await done(driver.start("models", url=url)) in (["m"], ["m:latest"])
    for job in ("whole", "stream", "whole_async", "stream_async"):
        work = driver.start(job, url=url, model="m", text=text)
        assert (await done(work))["text"] == text
        if job.startswith("stream"):
            assert [piece.strip() for piece in work.pieces] == text.split()
    assert not driver.unhandled


@contextlib.asynccontextmanager
async def opened(browser: Browser, url: str) -> AsyncIterator[Page]:
    """The page, live; nothing may go wrong in it."""
    async with browser.page() as page:
        await page.look(1024, 900)
        await page.goto(url)
        await page.until(LIVE)
        yield page
        assert not page.errors


async def assert_page_works(page: Page, q: running, base: str) -> None:
    """Events arrive, orders work, its lines to paste name the base, it asked nobody else."""
    mode = q.gateway.scheduler.mode
    assert mode.value == "open"
    await page.click("#modes label:nth-child(3)")
    await page.until("document.title.includes('paused')")
    assert q.gateway.scheduler.mode.value == "paused"
    waiter = await Raw.open(q.port) if base.startswith("http:") else None
    if waiter is None:
        await page.js(
            f"void fetch('{base}/v1/chat/completions', {{method: 'POST', headers: {{"
            "'Content-Type': 'application/json', 'X-User-ID': 'alice'}, body: "
            + json.dumps(json.dumps(chat("hi")))
            + "})"
        )
    else:
        path = base.split("/", 3)[3] if base.count("/") > 2 else ""
        body = json.dumps(chat("hi")).encode()
        asked = {**JSON, "X-User-ID": "alice"}
        await waiter.send(http("POST", f"{'/' * bool(path)}{path}{CHAT}", asked, body))
    await page.until("document.querySelector('#queue tbody').textContent.includes('alice')")
    await page.js("setMode('open')")
    await page.until("!document.title.includes('paused')")
    await eventually(lambda: not q.gateway.calls)
    assert await page.until("document.querySelector('#base').textContent") == f"{base}/v1"
    await page.until(
        f"document.querySelector('#queue .empty').textContent.includes({json.dumps(base + '/v1')})"
    )
    await page.js("$('filter').value = 'zebra', $('filter').oninput(), search(), 1")
    asked_for = [url for url in page.requests if not url.startswith("data:")]
    assert all(url.startswith(base) for url in asked_for), asked_for
    assert any(url.startswith(f"{base}/llmq/events") for url in asked_for)


# ---- Clients ---------------------------------------------------------------------------------


class Speaker(Runner):
    """A runner whose messages count their tokens, as Anthropic's library wants them to."""

    async def answer(self, request: FakeRequest) -> None:
        if request.path != "/v1/messages":
            await super().answer(request)
            return
        block: dict[str, Any] = {"type": "text", "text": ""}
        usage = {"input_tokens": 1, "output_tokens": 1}
        frame = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
        empty = {**frame, "content": [], "stop_reason": None, "usage": usage}
        if not request.json.get("stream"):
            content = [{**block, "text": request.text}]
            await request.status(200, {**empty, "content": content, "stop_reason": "end_turn"})
            return
        texts = [{"type": "text_delta", "text": word} for word in words(request.text)]
        deltas = [{"type": "content_block_delta", "index": 0, "delta": one} for one in texts]
        end = {"stop_reason": "end_turn", "stop_sequence": None}
        pieces = events(
            {"type": "message_start", "message": empty},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *deltas,
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": end, "usage": usage},
            {"type": "message_stop"},
        )
        await request.start_stream()
        for piece in pieces:
            await request.send(chunk(piece))
        request.finished()
        await request.send(b"0\r\n\r\n")


@pytest.mark.deadline(60)
@pytest.mark.parametrize("name", SDKS)
async def test_official_library_trusts_the_ca_and_chats(name: str, papers: Papers) -> None:
    with library(name, SSL_CERT_FILE=papers.path("ca.pem")) as driver, nothing_to_say():
        async with Speaker() as fake, serving(papers, fake.url) as q:
            await assert_library_works(driver, q.base)


@pytest.mark.deadline(40)
async def test_official_library_that_does_not_know_the_ca_is_told(papers: Papers) -> None:
    with library("openai", SSL_CERT_FILE=papers.path("other-ca.pem")) as driver:
        async with Runner() as fake, serving(papers, fake.url) as q:
            work = driver.start("whole", url=q.base, model="m", text="hi")
            await eventually(lambda: work.over, 15)
            assert work.raised
            assert work.raised["kind"] == "APIConnectionError"
            assert not fake.requests


@pytest.mark.parametrize("more", [(), ("--http2",), ("--tls-max", "1.2")], ids=" ".join)
async def test_curl_chats(more: tuple[str, ...], papers: Papers) -> None:
    trust, body = ("--cacert", papers.path("ca.pem")), json.dumps(chat("hello there"))
    with nothing_to_say():
        async with FakeBackend() as fake, serving(papers, fake.url) as q:
            for host in ("127.0.0.1", "localhost"):
                url = f"https://{host}:{q.port}{CHAT}"
                code, said = await curl(*trust, *more, url, "--json", body)
                assert (code, "hello there" in said) == (0, True), said
            code, said = await curl(*more, q.base + "/health")
            assert code == 60, said  # the CA is not known
            code, said = await curl(*trust, *more, q.base + "/health", q.base + "/health")
            assert (code, said) == (0, "okok")


@pytest.mark.deadline(30)
async def test_page_is_live_and_its_orders_work(papers: Papers) -> None:
    pin = f"--ignore-certificate-errors-spki-list={papers.pin('server')}"
    browser = Browser(require_command("chromium"), pin)
    try:
        with nothing_to_say():
            async with FakeBackend() as fake, serving(papers, fake.url) as q:
                async with opened(browser, q.base + "/") as page:
                    await assert_page_works(page, q, q.base)
    finally:
        browser.close()


@pytest.mark.deadline(30)
async def test_page_works_by_the_name_that_others_call_this_box(
    way: Papers | None, papers: Papers
) -> None:
    pin = f"--ignore-certificate-errors-spki-list={papers.pin('server')}"
    named = "--host-resolver-rules=MAP gpu-box 127.0.0.1"
    browser = Browser(require_command("chromium"), pin, named)
    try:
        more = {"server__allowed_hosts": ["gpu-box"]}
        async with FakeBackend() as fake, serving(way, fake.url, **more) as q:
            base = q.base.replace("127.0.0.1", "gpu-box")
            async with opened(browser, base + "/") as page:
                await page.js("setMode('paused')")
                await page.until("document.querySelector('#toasts').textContent")
                said = await page.js("document.querySelector('#toasts').textContent")
                assert said == "The mode is paused"
    finally:
        browser.close()


# ---- Commands --------------------------------------------------------------------------------

ASKING = [("status",), ("top", "--once"), ("mode", "open"), ("models",), ("status", "--json")]


def own(papers: Papers, port: int, **more: str) -> dict[str, str]:
    """The settings of this box as variables."""
    return {**papers.variables, "LLMQ_SERVER_PORT": str(port), **more}


@pytest.mark.deadline(30)
async def test_commands_find_the_llmq_of_this_box(papers: Papers) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, serving(papers, fake.url) as q:
            for typed in ASKING:
                code, said, errors = await command(*typed, **own(papers, q.port))
                assert (code, errors) == (0, ""), typed
                assert said
            code, said, errors = await command("models", **own(papers, q.port))
            assert "m" in said.split()
            wish = ("run", "--", "echo", "alone")
            code, said, errors = await command(*wish, **own(papers, q.port))
            assert (code, said, errors) == (0, "alone\n", "")


@pytest.mark.deadline(30)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_commands_take_a_url_and_the_usual_variable_for_a_ca(
    host: str, papers: Papers
) -> None:
    async with FakeBackend() as fake, serving(papers, fake.url) as q:
        url, trust = f"https://{host}:{q.port}", {"SSL_CERT_FILE": papers.path("ca.pem")}
        for typed in ASKING if host == "127.0.0.1" else ASKING[:1]:
            code, said, errors = await command(*typed, "--url", url, **trust)
            assert (code, errors) == (0, ""), typed
            assert said
        code, said, errors = await command("status", "--url", url + "/", **trust)
        assert (code, errors) == (0, "")


async def test_commands_say_in_one_line_whom_they_do_not_trust(papers: Papers) -> None:
    async with FakeBackend() as fake, serving(papers, fake.url) as q:
        wrong = {"SSL_CERT_FILE": papers.path("other-ca.pem")}
        code, said, errors = await command("status", "--url", q.base, **wrong)
        assert (code, said, errors.count("\n")) == (1, "", 1)
        assert "certificate" in errors.lower()
        code, said, errors = await command("status", "--url", q.base.replace("https", "http"))
        assert (code, said, errors.count("\n")) == (1, "", 1)


async def test_commands_of_a_box_that_listens_everywhere_trust_its_own_certificate(
    papers: Papers,
) -> None:
    async with FakeBackend() as fake, serving(papers, fake.url) as q:
        settings = own(papers, q.port, LLMQ_SERVER_HOST="0.0.0.0")
        code, _, errors = await command("status", **settings)
        assert (code, errors) == (0, "")


async def test_commands_do_not_trust_another_certificate_on_this_box(own_papers: Papers) -> None:
    async with FakeBackend() as fake, serving(own_papers, fake.url) as q:
        settings = own(own_papers, q.port)
        settings["LLMQ_SERVER_TLS_CERT"] = own_papers.path("second.pem")
        code, said, errors = await command("status", **settings)
        assert (code, said, errors.count("\n")) == (1, "", 1)


async def test_banner_names_the_https_urls_and_a_second_start_the_first(papers: Papers) -> None:
    async with FakeBackend() as fake:
        async with Process("--port", "0", "--backend", fake.url, *papers.flags) as p:
            await p.line("in a terminal")
            url = f"https://127.0.0.1:{p.port}"
            assert f"OPENAI_BASE_URL={url}/v1\n" in p.output
            assert f"OLLAMA_HOST={url}\n" in p.output
            assert f"http://127.0.0.1:{p.port}" not in p.output
            code, _, errors = await command("--port", str(p.port), *papers.flags)
            assert (code, errors.count("\n")) == (78, 1)
            assert "llmq runs there already" in errors
            assert "Traceback" not in p.output


# ---- Client certificates ---------------------------------------------------------------------


async def refused(q: serving, context: ssl.SSLContext) -> bool:
    """Whether nothing is to be had with this context."""
    async with await Tls.open(q.port) as raw:
        assert isinstance(raw, Tls)
        try:
            await raw.shake(context)
            await raw.send(http("GET", "/health"))
            return not await raw.read()
        except (ssl.SSLError, EOFError, ConnectionError):
            return True


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
async def test_only_clients_with_a_certificate_of_the_ca_get_in(
    newest: ssl.TLSVersion, papers: Papers
) -> None:
    more = {"server__tls_client_ca": papers.path("ca.pem")}
    with nothing_to_say():
        async with FakeBackend() as fake, serving(papers, fake.url, **more) as q:
            for name in ("", "stranger"):
                context = papers.trusting(own=name)
                context.maximum_version = newest
                assert await refused(q, context), name
            await eventually(lambda: not q.connections)
            async with await q.connect(own="client") as raw:
                await raw.send(http("POST", CHAT, JSON, json.dumps(chat("hi there")).encode()))
                assert (await raw.response()).content == "hi there"
            assert [request.text for request in fake.requests] == ["hi there"]


async def test_curl_shows_its_certificate(papers: Papers) -> None:
    more = {"server__tls_client_ca": papers.path("ca.pem")}
    async with FakeBackend() as fake, serving(papers, fake.url, **more) as q:
        trust = ("--cacert", papers.path("ca.pem"))
        code, _ = await curl(*trust, q.base + "/health")
        assert code in (35, 52, 56)  # as the end meets it
        shown = ("--cert", papers.path("client.pem"), "--key", papers.path("client.key"))
        assert await curl(*trust, *shown, q.base + "/health") == (0, "ok")


async def test_command_without_a_certificate_is_refused_in_one_line(papers: Papers) -> None:
    more = {"server__tls_client_ca": papers.path("ca.pem")}
    async with FakeBackend() as fake, serving(papers, fake.url, **more) as q:
        trust = {"SSL_CERT_FILE": papers.path("ca.pem")}
        code, said, errors = await command("status", "--url", q.base, **trust)
        assert (code, said, errors.count("\n")) == (1, "", 1)


# ---- Wrong files -----------------------------------------------------------------------------

WRONG = {  # what is wrong: the flags, and the setting that the line names
    "no certificate": ({"cert": "none.pem", "key": "server.key"}, "server.tls_cert"),
    "no key": ({"cert": "server.pem", "key": "none.key"}, "server.tls_key"),
    "a key of another": ({"cert": "server.pem", "key": "second.key"}, "server.tls_key"),
    "a certificate and no key": ({"cert": "server.pem"}, "server.tls_key"),
    "no PEM": ({"cert": "server.cnf", "key": "server.key"}, "server.tls_cert"),
    "a folder": ({"cert": ".", "key": "server.key"}, "server.tls_cert"),
    "an empty file": ({"cert": "empty", "key": "empty"}, "server.tls_cert"),
    "an encrypted key": ({"cert": "server.pem", "key": "locked.key"}, "server.tls_key"),
    "no CA": (
        {"cert": "server.pem", "key": "server.key", "client-ca": "none.pem"},
        "server.tls_client_ca",
    ),
    "a CA that is none": (
        {"cert": "server.pem", "key": "server.key", "client-ca": "server.cnf"},
        "server.tls_client_ca",
    ),
    "an empty CA": (
        {"cert": "server.pem", "key": "server.key", "client-ca": "empty"},
        "server.tls_client_ca",
    ),
    "a key and no certificate": ({"key": "server.key"}, "server.tls_key"),
    "a CA and no certificate": ({"client-ca": "ca.pem"}, "server.tls_client_ca"),
}


@pytest.fixture(scope="module")
def odd_papers(papers: Papers) -> Papers:
    (papers.folder / "empty").touch()
    key, locked = papers.path("server.key"), papers.path("locked.key")
    papers.run("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked)
    return papers


@pytest.mark.parametrize(("files", "named"), WRONG.values(), ids=WRONG.keys())
def test_wrong_files_stop_the_start(files: dict[str, str], named: str, odd_papers: Papers) -> None:
    given = [
        word for name, one in files.items() for word in (f"--tls-{name}", odd_papers.path(one))
    ]
    done = run_llmq("--port", "0", "--state", "", *given, seconds=4)
    assert done.returncode == 2, done
    assert named in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")


def test_certificate_key_and_chain_may_be_in_one_file(own_papers: Papers) -> None:
    own_papers.make("middle", ROOT_CA + "authorityKeyIdentifier=keyid\n", "ca")
    own_papers.server("leaf", "middle")
    parts = [own_papers.folder / name for name in ("leaf.key", "leaf.pem", "middle.pem")]
    one = own_papers.folder / "one.pem"
    one.write_text("".join(part.read_text() for part in parts))

    async def served() -> None:
        more = {"server__tls_cert": str(one), "server__tls_key": ""}
        async with FakeBackend() as fake, serving(own_papers, fake.url, **more) as q:
            assert (await q.ask("GET", "/health")).body == b"ok"  # by the root alone
            settings = {"LLMQ_SERVER_TLS_CERT": str(one), "LLMQ_SERVER_PORT": str(q.port)}
            code, _, errors = await command("status", **settings)
            assert (code, errors) == (0, "")

    asyncio.run(served())


# ---- What comes badly ------------------------------------------------------------------------

GARBAGE = {
    "plain HTTP": http("GET", "/health"),
    "a plain request with a body": http("POST", CHAT, JSON, json.dumps(chat("hi")).encode()),
    "nothing": b"",
    "half a hello": HELLO,
    "a hello of the wrong length": HELLO + bytes(600),
    "noise": bytes(range(256)) * 40,
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a PROXY line": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
}
LEAVING = {"closes": Raw.close, "half-closes": Raw.fin, "resets": Raw.rst}


@pytest.mark.parametrize("leave", LEAVING.values(), ids=LEAVING.keys())
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
async def test_what_is_no_tls_harms_nothing(data: bytes, leave: Any, papers: Papers) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, serving(papers, fake.url) as q:
            raw = await Raw.open(q.port)
            await raw.send(data)
            leave(raw)
            if leave is Raw.fin:
                await raw.closed()
            assert (await q.ask("POST", CHAT, chat("hi"))).content == "hi"
            assert len(fake.requests) == 1
            await eventually(lambda: not q.connections)


async def test_plain_request_is_answered_by_an_end_and_never_served(papers: Papers) -> None:
    async with FakeBackend() as fake, serving(papers, fake.url) as q:
        async with await Raw.open(q.port) as raw:
            await raw.send(GARBAGE["a plain request with a body"])
            assert await raw.closed()
        assert not fake.requests


@pytest.mark.parametrize("data", [b"", HELLO, HELLO[:1]], ids=["nothing", "half", "a byte"])
async def test_handshake_that_does_not_end_is_dropped_in_time(data: bytes, papers: Papers) -> None:
    with nothing_to_say():
        more = {"server__head_timeout": 0.3}
        async with FakeBackend() as fake, serving(papers, fake.url, **more) as q:
            slow = await Raw.open(q.port)
            await slow.send(data)
            assert (await q.ask("POST", CHAT, chat("hi"))).content == "hi"  # others are served
            assert await slow.closed()


async def test_client_that_shook_hands_and_says_nothing_is_dropped_in_time(
    papers: Papers,
) -> None:
    more = {"server__head_timeout": 0.3}
    async with FakeBackend() as fake, serving(papers, fake.url, **more) as q:
        async with await q.connect() as silent:
            assert await silent.closed()
        async with await q.connect() as slow:
            await slow.send(b"GET /heal")
            assert (await slow.response()).status == 408


async def test_slow_handshakes_hold_up_nobody(papers: Papers) -> None:
    async with FakeBackend() as fake, serving(papers, fake.url) as q:
        slow = [await Raw.open(q.port) for _ in range(100)]
        for number, raw in enumerate(slow):
            await raw.send(HELLO[: number % len(HELLO)])
        answers = await asyncio.gather(*[q.ask("POST", CHAT, chat(f"{n}")) for n in range(20)])
        assert [answer.content for answer in answers] == [str(n) for n in range(20)]
        for raw in slow:
            raw.close()
        await eventually(lambda: not q.connections)


def short_of_files(folder: Path, files: int) -> str:
    """A Python for which so few files may be open."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nulimit -n {files}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.deadline(20)
async def test_flood_of_silent_connections_locks_nobody_out(
    way: Papers | None, tmp_path: Path
) -> None:
    """Idle ones give way after a moment; so must those that do not even shake hands."""
    flags = way.flags if way else []
    python = short_of_files(tmp_path, 160)
    async with FakeBackend() as fake:
        async with Process("--port", "0", "--backend", fake.url, *flags, python=python) as p:
            await p.line("in a terminal")
            for _ in range(300):
                await Raw.open(p.port)

            async def served() -> bool:
                try:
                    async with await asyncio.wait_for(connect(p.port, way), 1) as raw:
                        await raw.send(http("GET", "/health"))
                        return (await asyncio.wait_for(raw.response(), 1)).body == b"ok"
                except (OSError, EOFError, asyncio.TimeoutError):
                    return False

            tries: list[asyncio.Task[bool]] = []

            def is_served() -> bool:
                if not tries or (tries[-1].done() and not tries[-1].result()):
                    tries.append(asyncio.ensure_future(served()))
                return tries[-1].done() and tries[-1].result()

            await eventually(is_served, 8)  # of the fifteen that a handshake may take


async def test_unfinished_handshake_does_not_hold_up_the_stop(papers: Papers) -> None:
    async with FakeBackend() as fake:
        async with Process("--port", "0", "--backend", fake.url, *papers.flags) as p:
            await p.line("in a terminal")
            slow = await Raw.open(p.port)
            await slow.send(HELLO)
            async with await connect(p.port, papers) as raw:
                await raw.send(http("GET", "/health"))
                assert (await raw.response()).body == b"ok"
                assert await p.ended(signal.SIGTERM, 6) == 0
            assert "Traceback" not in p.output
            assert "rror" not in p.output


# ---- Requests and answers, byte for byte -----------------------------------------------------


async def test_requests_come_in_any_pieces(papers: Papers) -> None:
    body = json.dumps(chat("piece by piece")).encode()
    whole = http("POST", CHAT, JSON, body)
    with nothing_to_say():
        async with FakeBackend() as fake, serving(papers, fake.url) as q:
            async with await q.connect() as raw:
                for at in range(len(whole)):
                    await raw.send(whole[at : at + 1])  # a record for each byte
                raw.method = "POST"
                assert (await raw.response()).content == "piece by piece"
                await raw.send(whole * 3)  # one record for three requests
                for _ in range(3):
                    assert (await raw.response()).content == "piece by piece"
                await raw.send(http("POST", CHAT, {**JSON, "Expect": "100-continue"}, body))
                assert (await raw.response()).content == "piece by piece"
                await raw.send(http("HEAD", "/health"))
                assert (await raw.response()).status == 200
            await eventually(lambda: not q.connections)


@pytest.mark.parametrize("version", ["1.1, close", "1.0"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_connection_ends_in_good_order_behind_the_answer(
    stream: bool, version: str, way: Papers | None
) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, serving(way, fake.url) as q:
            async with await q.connect() as raw:
                body = json.dumps(chat("one two three", stream=stream)).encode()
                data = http("POST", CHAT, {**JSON, "Connection": "close"}, body)
                if version == "1.0":
                    data = data.replace(b"HTTP/1.1", b"HTTP/1.0", 1)
                await raw.send(data)
                answer = await raw.response()
                assert (answer.content, answer.clean) == ("one two three", True)
                assert await raw.closed() == "eof"
            await eventually(lambda: not q.connections)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_broken_stream_does_not_look_complete(version: str, way: Papers | None) -> None:
    async with FakeBackend(auto=False) as fake, serving(way, fake.url) as q:
        async with await q.connect() as raw:
            data = http("POST", CHAT, JSON, json.dumps(chat("hi", stream=True)).encode())
            await raw.send(data.replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1))
            request = await fake.arrived()
            await request.start_stream()
            await request.piece("one ")
            await raw.head()
            await raw.until(b"one ")
            request.reset()
            rest = b""
            while data := await raw.read():
                rest += data
            assert not rest.endswith(b"0\r\n\r\n")
            assert version == "1.1" or raw.ended == "reset"


async def test_refused_request_is_told_why(way: Papers | None) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, serving(way, fake.url) as q:
            async with await q.connect() as raw:
                await raw.send(b"GARBAGE\r\n\r\n")
                assert (await raw.response()).status == 400
                assert await raw.closed() == "eof"
            async with await q.connect() as raw:
                await raw.send(http("POST", CHAT, {**JSON, "Content-Length": str(1 << 40)}))
                assert (await raw.response()).status == 413
                assert await raw.closed() == "eof"


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long for the other side's end: neither llmq nor asyncio, which waits 30 s."""
    monkeypatch.setattr(llmq, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(asyncio.constants, "SSL_SHUTDOWN_TIMEOUT", 0.2, raising=False)


async def test_refusal_reaches_a_client_that_still_sends(way: Papers | None) -> None:
    async with FakeBackend() as fake, serving(way, fake.url, server__max_body=1000) as q:
        async with await q.connect() as raw:
            await raw.send(http("POST", CHAT, {**JSON, "Content-Length": str(1 << 22)}))
            await eventually(lambda: b"body_too_large" in q.gateway.metrics.render())
            with contextlib.suppress(ConnectionError):
                for _ in range(16):
                    await raw.send(b"x" * 65536)
            answer = await raw.response()
            assert (answer.status, answer.clean) == (413, True)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_client_that_never_hangs_up_holds_no_connection_for_ever(
    way: Papers | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    async with FakeBackend() as fake, serving(way, fake.url) as q:
        await told(q)
        async with await q.connect() as raw:
            held = open_files()
            await raw.send(http("GET", "/health", {"Connection": "close"}))
            assert (await raw.response()).body == b"ok"
            await eventually(lambda: not q.connections)
            await eventually(lambda: open_files() < held)


async def all_of(raw: Raw) -> Answer:
    """As `response()`, of a long answer with its length: without Raw's care for each piece."""
    answer = await raw.head()
    size, pieces = int(answer.headers["content-length"]), []
    while size > 0 and (data := await raw.read(1 << 20)):
        size -= len(data)
        pieces.append(data)
    answer.body, answer.clean = b"".join(pieces), not size
    return answer


@functools.lru_cache(maxsize=4)
def large(size: int = LARGE) -> str:
    """Text that does not repeat, so that bytes lost or doubled are seen."""
    return " ".join(map(str, range(size // 7)))[:size]


@pytest.mark.deadline(20)
async def test_large_uploads_and_answers_pass_byte_for_byte(way: Papers | None) -> None:
    async with FakeBackend(auto=False) as fake, serving(way, fake.url) as q:
        for form, size in (("length", LARGE), ("chunks", LARGE // 4)):
            async with await q.connect() as raw:
                body = json.dumps(chat(large(size))).encode()
                framed = JSON if form == "length" else {**JSON, "Transfer-Encoding": "chunked"}
                pieces = [body[at : at + 100_000] for at in range(0, len(body), 100_000)]
                chunks = b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
                data = http("POST", CHAT, framed, body if form == "length" else chunks)
                sending = asyncio.ensure_future(raw.send(data))
                request = await fake.arrived()
                await sending
                assert request.body == body
                said = json.dumps(completion("m", large(size))).encode()
                await request.status(200, said)
                answer = await all_of(raw)
                assert answer.clean
                assert answer.body == said


@pytest.mark.deadline(20)
@pytest.mark.parametrize("ending", ["close", "keep-alive"])
async def test_slow_reader_gets_all_of_a_large_answer(
    ending: str, way: Papers | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the time of an idle connection is over when it begins to read."""
    hurry(monkeypatch)
    more = {"server__keep_alive": 1.0}
    async with FakeBackend(auto=False) as fake, serving(way, fake.url, **more) as q:
        async with await q.connect(65536) as raw, await q.connect() as witness:
            body = json.dumps(chat("hi")).encode()
            await raw.send(http("POST", CHAT, {**JSON, "Connection": ending}, body))
            said = json.dumps(completion("m", large())).encode()
            await (await fake.arrived()).status(200, said)
            await eventually(lambda: not q.gateway.calls)
            await witness.send(http("GET", "/health"))
            assert (await witness.response()).body == b"ok"
            assert await witness.closed()  # it was idle for too long
            answer = await all_of(raw)
            assert answer.clean, f"{len(answer.body)} of {len(said)} bytes came"
            assert answer.body == said


@pytest.mark.deadline(20)
async def test_reader_that_takes_nothing_of_a_large_answer_is_gone_after_a_while(
    way: Papers | None,
) -> None:
    more = {"server__stall_timeout": 0.4}
    async with FakeBackend(auto=False) as fake, serving(way, fake.url, **more) as q:
        async with await begin(q, "hi", 65536):
            await (await fake.arrived()).status(200, completion("m", large()))
            await eventually(lambda: not q.gateway.calls)
            await eventually(lambda: not q.connections, 4)


@pytest.mark.deadline(20)
async def test_answers_that_nobody_takes_hold_no_more_memory_than_they_may(
    way: Papers | None,
) -> None:
    more = {"queue__max_queued_bytes": 16 * 1024 * 1024, "server__stall_timeout": 600}
    async with FakeBackend(auto=False) as fake, serving(way, fake.url, **more) as q:
        for number in range(3):
            await begin(q, f"{number}", 65536)
            await (await fake.arrived()).status(200, completion("m", large()))
            await eventually(lambda: not q.gateway.calls)
        await eventually(lambda: len(q.connections) < 3)


class Flood:
    """A stream of more than anybody holds; `sent` are its bytes so far."""

    def __init__(self, request: FakeRequest) -> None:
        self.request = request
        self.sent = 0
        self.hash = hashlib.sha256()

    async def run(self, pieces: int) -> None:
        await self.request.start_stream()
        for number in range(pieces):
            word = f" {number} {'x' * 65000}"
            self.hash.update(word.encode())
            await self.request.piece(word)
            self.sent += len(word)
        await self.request.finish_stream()


async def hash_of(raw: Raw) -> str:
    """The SHA-256 of what the model said in a stream, to its end."""
    found, line = hashlib.sha256(), b""
    while size := int((await raw.until(b"\r\n")).split(b";")[0], 16):
        *lines, line = (line + (await raw.exactly(size + 2))[:-2]).split(b"\n")
        for data in [one[5:] for one in lines if one.startswith(b"data: {")]:
            delta = json.loads(data)["choices"][0]["delta"]
            found.update(delta.get("content", "").encode())
    await raw.exactly(2)
    return found.hexdigest()


@pytest.mark.deadline(30)
async def test_slow_reader_of_a_stream_holds_the_runner_back(way: Papers | None) -> None:
    async with FakeBackend(auto=False) as fake, serving(way, fake.url) as q:
        async with await begin(q, "hi", 65536, stream=True) as raw:
            flood = Flood(await fake.arrived())
            sending = asyncio.ensure_future(flood.run(600))
            await raw.head()
            [connection] = q.connections
            await eventually(lambda: connection.stream.full)
            held = flood.sent
            assert held < 600 * 65000 / 2
            assert not sending.done()
            assert connection.unsent <= 2 * llmq.ANSWER_BUFFER
            digest = await hash_of(raw)
            await sending
            assert digest == flood.hash.hexdigest()


@pytest.mark.deadline(20)
async def test_who_is_behind_holds_up_no_other_stream(papers: Papers) -> None:
    async with FakeBackend(auto=False) as fake:
        async with serving(papers, fake.url, queue__slots=2) as q:
            async with await begin(q, "slow", 65536, stream=True) as slow:
                flood = Flood(await fake.arrived())
                sending = asyncio.ensure_future(flood.run(600))
                await slow.head()
                [connection] = q.connections
                await eventually(lambda: connection.stream.full)
                async with await begin(q, "quick", stream=True) as quick:
                    await (await fake.arrived()).answer("quick")
                    assert (await quick.response()).content == "quick"
                slow.rst()
                with contextlib.suppress(ConnectionError):
                    await sending
                await flood.request.left()


LEAVES: dict[str, Callable[[Any], None]] = {
    "says the end and closes": lambda raw: (raw.fin(), raw.close())[0],
    "half-closes": lambda raw: raw.fin(),
    "closes without a word": lambda raw: raw.close(),
    "resets": lambda raw: raw.rst(),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES.keys())
@pytest.mark.parametrize("when", ["waiting", "running", "streaming"])
async def test_client_that_leaves_ends_its_request(
    when: str, leave: Callable[[Any], None], way: Papers | None
) -> None:
    with nothing_to_say():
        async with FakeBackend(auto=False) as fake, serving(way, fake.url) as q:
            first = await begin(q, "first", stream=True)
            request = await fake.arrived()
            raw = first
            if when == "waiting":
                raw = await begin(q, "second", stream=True)
                await eventually(lambda: len(q.gateway.scheduler.waiting) == 1)
            elif when == "streaming":
                await request.start_stream()
                await request.piece("one ")
                await raw.head()
                await raw.until(b"one ")
            leave(raw)
            if when == "waiting":
                await eventually(lambda: not q.gateway.scheduler.waiting)
                assert len(q.gateway.calls) == 1
                await request.answer("done")
                assert (await first.response()).content == "done"
                first.close()
            else:
                await request.left()
            await eventually(lambda: not q.gateway.calls)
            raw.close()
            await eventually(lambda: not q.connections)
            assert len(fake.requests) == 1


async def test_end_of_tcp_without_an_end_of_tls_ends_its_request(papers: Papers) -> None:
    with nothing_to_say():
        async with FakeBackend(auto=False) as fake, serving(papers, fake.url) as q:
            async with await begin(q, "first", stream=True) as raw:
                request = await fake.arrived()
                assert isinstance(raw, Tls)
                raw.hang_up()
                await request.left()
            await eventually(lambda: not q.gateway.calls)


async def test_watcher_gets_each_change_and_is_forgotten_when_it_leaves(papers: Papers) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, serving(papers, fake.url) as q:
            async with await q.connect() as raw:
                await raw.send(http("GET", "/llmq/events"))
                watched = raw.events()
                assert (await watched.__anext__())["mode"] == "open"
                await q.ask("POST", "/llmq/mode", {"mode": "paused"})
                async for event in watched:
                    if event["mode"] == "paused":
                        break
                assert q.service.api.stream.watchers == 1
                await watched.aclose()
            await eventually(lambda: not q.service.api.stream.watchers)


@pytest.mark.deadline(20)
async def test_blob_passes_to_a_runner_as_it_comes(papers: Papers) -> None:
    data = large(3 * 1024 * 1024).encode()
    digest = hashlib.sha256(data).hexdigest()
    async with Runner() as fake, serving(papers, fake.url) as q:
        async with await q.connect() as raw:
            await raw.send(http("POST", f"/api/blobs/sha256:{digest}", {}, data))
            assert (await raw.response()).status in (200, 201)
        assert fake.uploads == [(len(data), digest)]


# ---- Reload ----------------------------------------------------------------------------------


async def seen_by(q: serving) -> bytes:
    """The certificate that a new connection is shown."""
    async with await q.connect() as raw:
        assert isinstance(raw, Tls)
        shown = raw.tls.getpeercert(binary_form=True)
        await raw.send(http("GET", "/health"))
        assert (await raw.response()).body == b"ok"
    return bytes(shown or b"")


def swap(papers: Papers, name: str, *kinds: str) -> None:
    """Put another certificate, or its key, where the server's is."""
    for kind in kinds or ("pem", "key"):
        new = papers.folder / f"{name}.{kind}"
        target = papers.folder / f"server.{kind}"
        (papers.folder / "new").write_bytes(new.read_bytes())
        (papers.folder / "new").replace(target)


async def reload(q: serving) -> Any:
    return (await q.ask("POST", "/llmq/reload", {})).json()["config_error"]


async def test_reload_serves_the_new_certificate_and_drops_nothing(own_papers: Papers) -> None:
    with nothing_to_say():
        async with FakeBackend(auto=False) as fake, serving(own_papers, fake.url) as q:
            assert await seen_by(q) == own_papers.der("server")
            second = own_papers.der("second")
            async with await begin(q, "hi", stream=True) as raw, await q.connect() as idle:
                await idle.send(http("GET", "/health"))
                await idle.response()
                request = await fake.arrived()
                await request.start_stream()
                await request.piece("one ")
                await raw.head()
                await raw.until(b"one ")
                swap(own_papers, "second")
                assert await reload(q) is None
                assert await seen_by(q) == second
                await request.piece("two")
                await request.finish_stream()
                assert b"two" in await raw.until(b"0\r\n\r\n")
                await idle.send(http("GET", "/health"))
                assert (await idle.response()).body == b"ok"


@pytest.mark.deadline(20)
async def test_hangup_signal_rereads_the_certificate_too(own_papers: Papers) -> None:
    second = own_papers.der("second")
    async with FakeBackend() as fake:
        async with Process("--port", "0", "--backend", fake.url, *own_papers.flags) as p:
            await p.line("in a terminal")
            swap(own_papers, "second")
            p.signal(signal.SIGHUP)
            await p.line("reload: done")
            raw = await connect(p.port, own_papers)
            assert isinstance(raw, Tls)
            assert raw.tls.getpeercert(binary_form=True) == second
            code, _, errors = await command("status", **own(own_papers, p.port))
            assert (code, errors) == (0, "")


BAD: dict[str, Callable[[Papers], Any]] = {
    "gone": lambda papers: (papers.folder / "server.pem").unlink(),
    "no PEM": lambda papers: (papers.folder / "server.pem").write_text("nothing"),
    "the key not yet there": lambda papers: swap(papers, "second", "pem"),
    "cut off": lambda papers: (papers.folder / "server.pem").write_bytes(
        (papers.folder / "second.pem").read_bytes()[:300]
    ),
    "a key that is gone": lambda papers: (papers.folder / "server.key").unlink(),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
async def test_bad_new_certificate_changes_nothing_and_is_told(
    spoil: Callable[[Papers], Any], own_papers: Papers
) -> None:
    first, second = own_papers.der("server"), own_papers.der("second")
    async with FakeBackend() as fake, serving(own_papers, fake.url) as q:
        spoil(own_papers)
        mistake = await reload(q)
        assert "server.tls_" in mistake
        assert (await q.status())["config_error"] == mistake
        for _ in range(2):
            assert await seen_by(q) == first
        swap(own_papers, "second")
        assert await reload(q) is None
        assert (await q.status())["config_error"] is None
        assert await seen_by(q) == second


async def test_bad_certificate_keeps_the_other_new_settings_out(own_papers: Papers) -> None:
    async with FakeBackend() as fake, serving(own_papers, fake.url) as q:
        read = build_settings({**q.values, "queue.max_depth": 77})
        q.service.read = lambda: read
        spoiled = own_papers.folder / "server.pem"
        good = spoiled.read_bytes()
        spoiled.write_text("nothing")
        assert await reload(q)
        assert q.service.settings.queue.max_depth != 77
        spoiled.write_bytes(good)
        assert await reload(q) is None
        assert q.service.settings.queue.max_depth == 77


async def test_reload_rereads_who_signs_the_certificates_of_clients(own_papers: Papers) -> None:
    """A CA that is no longer in the file lets nobody in any more; a new one does."""
    trusted = own_papers.folder / "clients.pem"
    trusted.write_bytes((own_papers.folder / "ca.pem").read_bytes())
    more = {"server__tls_client_ca": str(trusted)}
    async with FakeBackend() as fake, serving(own_papers, fake.url, **more) as q:
        ours = own_papers.trusting(own="client")
        theirs = own_papers.trusting(own="stranger")
        assert (await refused(q, ours), await refused(q, theirs)) == (False, True)
        trusted.write_bytes((own_papers.folder / "other-ca.pem").read_bytes())
        q.service.reload()
        assert q.gateway.config_error is None
        assert (await refused(q, ours), await refused(q, theirs)) == (True, False)


@pytest.mark.parametrize("turn", ["on", "off"])
async def test_https_turned_on_or_off_by_a_reload_is_told(
    turn: str, papers: Papers, caplog: pytest.LogCaptureFixture
) -> None:
    """The port keeps what it speaks, and the log says that this needs a restart."""
    way = None if turn == "on" else papers
    async with FakeBackend() as fake, serving(way, fake.url) as q:
        change = {"on": papers.path("server.pem"), "off": ""}[turn]
        key = {"on": papers.path("server.key"), "off": ""}[turn]
        values = {**q.values, "server.tls_cert": change, "server.tls_key": key}
        q.service.read = lambda: build_settings(values)
        with caplog.at_level("WARNING", "llmq"):
            q.service.reload()
        assert "server.tls_cert needs restart" in caplog.text
        assert (await q.ask("GET", "/health")).body == b"ok"


# ---- Stop ------------------------------------------------------------------------------------


async def test_stop_lets_a_running_stream_end(papers: Papers) -> None:
    async with FakeBackend(auto=False) as fake:
        async with Process("--port", "0", "--backend", fake.url, *papers.flags) as p:
            await p.line("in a terminal")
            async with await connect(p.port, papers) as raw:
                body = json.dumps(chat("hi", stream=True)).encode()
                await raw.send(http("POST", CHAT, JSON, body))
                request = await fake.arrived()
                await request.start_stream()
                await request.piece("one ")
                await raw.head()
                await raw.until(b"one ")
                p.signal(signal.SIGTERM)
                await p.line("stopping")
                await request.piece("two")
                await request.finish_stream()
                assert b"two" in await raw.until(b"0\r\n\r\n")
                assert await raw.closed()
                assert await p.ended(0) == 0
            assert "Traceback" not in p.output


@pytest.mark.deadline(20)
async def test_stop_lets_a_slow_reader_have_the_rest_of_its_answer(way: Papers | None) -> None:
    flags = way.flags if way else []
    async with FakeBackend(auto=False) as fake:
        async with Process("--port", "0", "--backend", fake.url, *flags) as p:
            await p.line("in a terminal")
            async with await connect(p.port, way, 65536) as raw:
                body = json.dumps(chat("hi")).encode()
                await raw.send(http("POST", CHAT, JSON, body))
                said = json.dumps(completion("m", large())).encode()
                request = await fake.arrived()
                await request.status(200, said)
                running_now = 1
                while running_now:
                    async with await connect(p.port, way) as asking:
                        await asking.send(http("GET", "/llmq/status"))
                        running_now = (await asking.response()).json()["queue"]["running"]
                p.signal(signal.SIGTERM)
                answer = await all_of(raw)
                assert answer.clean, f"{len(answer.body)} of {len(said)} bytes came"
                assert answer.body == said
            assert await p.ended(0) == 0


async def test_port_of_somebody_is_beside_https(papers: Papers) -> None:
    """What [ports] opens is for programs of this box that can do nothing: it speaks plain HTTP."""
    port = peers.free_port()
    async with FakeBackend() as fake:
        async with serving(papers, fake.url, ports={str(port): {"client": "old"}}) as q:
            assert (await ask(port, "POST", CHAT, json=chat("hi"))).content == "hi"
            assert (await q.ask("POST", CHAT, chat("ho"))).content == "ho"
