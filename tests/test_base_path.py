"""A base path before every route: alone, behind a real nginx and a real Caddy, by all clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.cdp import Browser
from tests.fake_runner import DIALECTS, Dialect
from tests.fakes import (
    Answer,
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    eventually,
    http,
    need,
    require_command,
    run_llmq,
    running,
)
from tests.real import peers
from tests.test_routes import example, told, told_error
from tests.test_tls import (
    ASKING,
    CHAT,
    JSON,
    SDKS,
    Papers,
    Speaker,
    assert_library_works,
    assert_page_works,
    beside,
    command,
    connect,
    curl,
    large,
    library,
    make_papers,
    nothing_to_say,
    opened,
)
from tray import llmq_tray as tray

pytestmark = pytest.mark.untraced  # others cover the lines behind these

NOBODY = "http://127.0.0.1:9"  # where no backend listens
BASE = "/llm"
HERE = "here every path begins with /llm/"
ROWS = [(method, route) for route in llmq.ROUTES for method in route.methods]
NAMES = [f"{method} {route.path}" for method, route in ROWS]
FOREIGN = {"Origin": "https://evil.example"}


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return make_papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def browser(papers: Papers) -> Iterator[Browser]:
    pin = f"--ignore-certificate-errors-spki-list={papers.pin('server')}"
    names = "--host-resolver-rules=MAP llmq.example 127.0.0.1"
    started = Browser(require_command("chromium"), pin, names)
    yield started
    started.close()


@pytest.fixture(scope="module")
def drivers(papers: Papers) -> Iterator[dict[str, Any]]:
    """The official libraries, each begun when it is first asked for: to import them takes time."""
    with contextlib.ExitStack() as stack:

        class Drivers(dict[str, Any]):
            def __missing__(self, name: str) -> Any:
                began = library(name, SSL_CERT_FILE=papers.path("ca.pem"))
                self[name] = stack.enter_context(began)
                return self[name]

        yield Drivers()


class based(running):  # noqa: N801 - reads as its parent does
    """llmq under /llm, whose `base` ends with it."""

    def __init__(self, *urls: str, **settings: Any) -> None:
        super().__init__(*urls, **{"server__base_path": BASE, **settings})

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}{BASE}"

    async def status(self) -> Any:
        return (await ask(self.port, "GET", f"{BASE}/llmq/status")).json()


# ---- Routes ----------------------------------------------------------------------------------


async def head_of(q: running, method: str, path: str, **headers: str) -> Answer:
    """An answer, of one that has no end only the head."""
    async with await Raw.open(q.port) as raw:
        body = b"{}" if method == "POST" else None
        await raw.send(http(method, path, {**JSON, "Connection": "close", **headers}, body))
        answer = await raw.head()
        if not answer.headers["content-type"].startswith("text/event-stream"):
            answer = await raw.response()
        return answer


@pytest.mark.parametrize(("method", "route"), ROWS, ids=NAMES)
async def test_every_route_is_under_the_base_and_nowhere_else(method: str, route: Any) -> None:
    path = example(route)
    async with based(NOBODY) as q, running(NOBODY) as plain:
        expected = await head_of(plain, method, path)
        answer = await head_of(q, method, BASE + path)
        assert answer.status == expected.status
        assert answer.headers.keys() == expected.headers.keys()
        if answer.headers["content-type"] == "application/json" and answer.status >= 400:
            assert answer.body == b"" or answer.json().keys() == expected.json().keys()
        bare = await head_of(q, method, path)
        assert bare.status == 404
        if method == "HEAD":
            assert bare.body == b""
        else:
            assert told_error(path, bare) == HERE


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
async def test_every_dialect_is_served_under_the_base(dialect: Dialect) -> None:
    kind = "llamacpp" if dialect.path == "/v1/rerank" else "ollama"
    async with Speaker(kind=kind) as fake, based(fake.url) as q:
        async with await Raw.open(q.port) as raw:
            for stream in {False, dialect.streams}:
                data = dialect.request("hello there", stream)
                await raw.send(data.replace(b"POST /", b"POST /llm/", 1))
                assert dialect.text(await raw.response()) == "hello there"
            assert fake.requests[0].path == dialect.path  # the runner knows nothing of it


SPELLINGS = {  # the target of a GET, and the status
    "/llm": 200,
    "/llm/": 200,
    "/llm?x=1": 200,
    "/llm/?x=1": 200,
    "/llm/health": 200,
    "/llm/health?x=/llm": 200,
    "/llm/llmq": 200,
    "/llm/v1/models": 200,
    "/llm/v1%2fmodels": 200,
    "http://127.0.0.1/llm/health": 200,
    "/": 404,
    "/health": 404,
    "/llmq": 404,
    "/llmq/status": 404,
    "/llmx": 404,
    "/llmx/health": 404,
    "/llm-/health": 404,
    "/llm.": 404,
    "/ll": 404,
    "/LLM/health": 404,
    "//llm/health": 404,
    "/llm//health": 404,
    "/llm//v1": 404,
    "/llm//": 404,
    "/llm/llm": 404,
    "/llm/llm/health": 404,
    "/llm/./health": 404,
    "/llm/../llm/health": 404,
    "/llm/..": 404,
    "/x/../llm/health": 404,
    "/llm/%2e/health": 404,
    "/llm/%2e%2e/llm/health": 404,
    "/llm/%2E%2E/health": 404,
    "/llm%2e/health": 404,
    "/llm;x/health": 404,
    "/llm\\health": 404,
    "/llm%00/health": 404,
    "/%2e/llm/health": 404,
}


@pytest.mark.parametrize(("target", "status"), SPELLINGS.items(), ids=SPELLINGS)
async def test_odd_spellings_lead_nowhere(target: str, status: int) -> None:
    async with FakeBackend() as fake, based(fake.url) as q:
        async with await Raw.open(q.port) as raw:
            for _ in range(2):  # and the connection goes on
                await raw.send(http("GET", target))
                answer = await raw.response()
                assert (answer.status, answer.clean) == (status, True), answer
                if status == 404:
                    told_error(target, answer)
                else:
                    assert HERE not in str(answer.body)


@pytest.mark.parametrize("target", ["/llm/%2e%2e/x", "/llm//x", "/llm/../x", "/x", "/llmx/x"])
async def test_no_odd_spelling_reaches_a_backend(target: str) -> None:
    async with FakeBackend() as fake, based(fake.url, server__allow_all_routes=True) as q:
        await told(q)
        assert (await ask(q.port, "POST", target, body=b"{}")).status == 404
        assert (await ask(q.port, "POST", "/llm/x/y", body=b"{}")).status == 404  # the fake's own
        assert [request.path for request in fake.requests] == ["/x/y"]


@pytest.mark.parametrize(
    ("given", "base"),
    [("llm", "/llm"), ("/llm/", "/llm"), ("llm/", "/llm"), ("/a/b-c", "/a/b-c"), ("/v1", "/v1")],
)
async def test_base_may_be_written_with_and_without_slashes(given: str, base: str) -> None:
    async with FakeBackend() as fake, running(fake.url, server__base_path=given) as q:
        assert (await ask(q.port, "GET", f"{base}/health")).body == b"ok"
        assert (await ask(q.port, "GET", f"{base}{base}/health")).status == 404
        answer = await ask(q.port, "POST", base + CHAT, json=chat("hi"))
        assert answer.content == "hi"
        assert (await ask(q.port, "GET", "/health")).status == 404


@pytest.mark.parametrize("given", ["/", ""])
async def test_empty_base_is_none(given: str) -> None:
    async with FakeBackend() as fake, running(fake.url, server__base_path=given) as q:
        assert (await ask(q.port, "GET", "/health")).body == b"ok"
        assert (await ask(q.port, "GET", "/")).body == b"Ollama is running"


@pytest.mark.parametrize(
    "given",
    ["/llm?x", "/l lm", "/a//b", "/../llm", "/a/./b", "/ll%6d", "/llm#x", "/'x", "/é", "/<"],
)
def test_odd_base_stops_the_start(given: str) -> None:
    done = run_llmq("--port", "0", "--state", "", "--base-path", given, seconds=4)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "base_path" in done.stderr or "base-path" in done.stderr


# ---- Who may ---------------------------------------------------------------------------------


async def test_preflights_are_answered_under_the_base_alone() -> None:
    wish = {**FOREIGN, "Access-Control-Request-Method": "POST"}
    wish["Access-Control-Request-Headers"] = "content-type, x-stainless-lang"
    async with FakeBackend() as fake, based(fake.url) as q:
        answer = await ask(q.port, "OPTIONS", BASE + CHAT, headers=wish)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, "*")
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert (await ask(q.port, "OPTIONS", BASE + "/llmq/mode", headers=wish)).status == 403
        ours = {**wish, "Origin": "http://localhost:3000"}
        assert (await ask(q.port, "OPTIONS", BASE + "/llmq/mode", headers=ours)).status == 204
        for path in (CHAT, "/llmq/mode", "/llmx" + CHAT):
            answer = await ask(q.port, "OPTIONS", path, headers=wish)
            assert answer.status == 404
            assert "access-control-allow-methods" not in answer.headers
        assert (await ask(q.port, "OPTIONS", "*")).status == 204


KEYS = {"alice": {"key": "k-alice"}, "boss": {"key": "k-boss", "rights": ["control", "models"]}}


@pytest.mark.parametrize(("method", "route"), ROWS, ids=NAMES)
async def test_rights_hold_under_the_base_too(method: str, route: Any) -> None:
    path = BASE + example(route)
    async with based(NOBODY, keys=KEYS) as q, running(NOBODY, keys=KEYS) as plain:
        for headers in ({}, {"Authorization": "Bearer k-alice"}, {"x-api-key": "k-boss"}, FOREIGN):
            expected = await head_of(plain, method, example(route), **headers)
            answer = await head_of(q, method, path, **headers)
            assert answer.status == expected.status, headers
            fields = (one.headers.get("www-authenticate") for one in (answer, expected))
            assert len(set(fields)) == 1


async def test_page_asks_for_a_key_under_the_base() -> None:
    async with FakeBackend() as fake, based(fake.url, keys=KEYS) as q:
        html = {"Accept": "text/html"}
        for path in ("/llm", "/llm/", "/llm/llmq"):
            answer = await ask(q.port, "GET", path, headers=html)
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic ")


REFUSED = {  # before the path is looked at
    "a foreign host": ({"Host": "evil.example"}, 1, 403),
    "one more guess than allowed": ({"x-api-key": "wrong"}, 12, 429),
}


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/messages", "/api/chat", "/api/tags"])
@pytest.mark.parametrize(("headers", "times", "status"), REFUSED.values(), ids=REFUSED.keys())
async def test_refusals_are_in_the_dialect_of_the_route(
    headers: dict[str, str], times: int, status: int, path: str
) -> None:
    async with FakeBackend() as fake, based(fake.url, keys=KEYS) as q:
        for _ in range(times):
            answer = await ask(q.port, "POST", BASE + path, body=b"{}", headers=headers)
        assert answer.status == status
        assert told_error(path, answer)


async def test_port_of_somebody_has_no_base() -> None:
    port = peers.free_port()
    async with FakeBackend() as fake:
        async with based(fake.url, ports={str(port): {"client": "old"}}) as q:
            assert (await ask(port, "POST", CHAT, json=chat("hi"))).content == "hi"
            assert (await ask(port, "GET", "/health")).body == b"ok"
            assert (await ask(q.port, "POST", BASE + CHAT, json=chat("hi"))).content == "hi"


async def test_rules_and_models_see_the_path_without_the_base() -> None:
    rules = [{"route": "/v1/chat/*", "class": "low"}]
    async with FakeBackend(auto=False) as fake, based(fake.url, rules=rules) as q:
        asking = asyncio.ensure_future(ask(q.port, "POST", BASE + CHAT, json=chat("hi")))
        request = await fake.arrived()
        assert [row["class"] for row in (await q.status())["requests"]] == ["low"]
        await request.answer("hi")
        assert (await asking).content == "hi"


# ---- Clients ---------------------------------------------------------------------------------


@pytest.mark.deadline(60)
@pytest.mark.parametrize("name", SDKS)
async def test_official_library_works_under_the_base(name: str, drivers: dict[str, Any]) -> None:
    driver = drivers[name]
    with nothing_to_say():
        async with Speaker() as fake, based(fake.url) as q:
            await assert_library_works(driver, q.base)


async def test_curl_works_under_the_base() -> None:
    async with FakeBackend() as fake, based(fake.url) as q:
        code, said = await curl(q.base + CHAT, "--json", json.dumps(chat("hello there")))
        assert (code, "hello there" in said) == (0, True), said
        assert await curl(q.base) == (0, "Ollama is running")


@pytest.mark.deadline(20)
@pytest.mark.parametrize("path", ["", "/", "/llmq", "/?x=1"])
async def test_page_works_under_the_base(path: str, browser: Browser) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, based(fake.url) as q:
            async with opened(browser, q.base + path) as page:
                await assert_page_works(page, q, q.base)


@pytest.mark.deadline(20)
async def test_page_finds_and_cancels_under_the_base(browser: Browser) -> None:
    async with FakeBackend(auto=False) as fake, based(fake.url) as q:
        clients = []
        for name in ("first", "second"):
            raw = await Raw.open(q.port)
            clients.append(raw)
            body = json.dumps(chat("hi")).encode()
            await raw.send(http("POST", BASE + CHAT, {**JSON, "X-User-ID": name}, body))
        await eventually(lambda: len(q.gateway.scheduler.waiting) == 1)
        async with opened(browser, q.base) as page:
            await page.until("snap.requests.length === 2")
            await page.js(
                "snap.queue.waiting += 200, $('filter').value = 'second', $('filter').oninput(), 1"
            )
            asked = f"{q.base}/llmq/status?find=second"
            await eventually(lambda: asked in page.requests)
            await page.js("$('filter').value = '', $('filter').oninput(), 1")
            await page.js("cancel(snap.requests.find(one => one.state === 'waiting')), 1")
            await page.click("#ask .danger")
            assert (await clients[1].response()).status == 499 or not q.gateway.scheduler.waiting
            await eventually(lambda: not q.gateway.scheduler.waiting)
        for raw in clients:
            raw.close()


@pytest.mark.deadline(30)
@pytest.mark.parametrize("how", ["url", "slash", "settings"])
async def test_commands_work_under_the_base(how: str) -> None:
    with nothing_to_say():
        async with FakeBackend() as fake, based(fake.url) as q:
            url = {"url": ["--url", q.base], "slash": ["--url", q.base + "/"], "settings": []}[how]
            env = {"LLMQ_SERVER_PORT": str(q.port), "LLMQ_SERVER_BASE_PATH": BASE}
            for typed in ASKING[:1] if how == "slash" else ASKING:
                code, said, errors = await command(*typed, *url, **(env if not url else {}))
                assert (code, errors) == (0, ""), typed
                assert said
            typed = ("run", *url, "--", "echo", "alone")
            code, said, errors = await command(*typed, **(env if not url else {}))
            assert (code, said, errors) == (0, "alone\n", "")


async def test_command_without_the_base_says_what_is_wrong_in_one_line() -> None:
    async with FakeBackend() as fake, based(fake.url) as q:
        for url in (q.base[: -len(BASE)], q.base + "x"):
            code, said, errors = await command("status", "--url", url)
            assert (code, said, errors.count("\n")) == (1, "", 1)
            assert HERE in errors


async def test_banner_shows_the_base_and_a_second_start_finds_the_first() -> None:
    async with FakeBackend() as fake:
        flags = ("--base-path", "llm", "--backend", fake.url)
        async with Process("--port", "0", *flags) as p:
            await p.line("in a terminal")
            url = f"http://127.0.0.1:{p.port}/llm"
            assert f"OPENAI_BASE_URL={url}/v1\n" in p.output
            assert f"OLLAMA_HOST={url}\n" in p.output
            assert f"ANTHROPIC_BASE_URL={url}\n" in p.output
            assert f"llmq top --url {url}\n" in p.output
            code, _, errors = await command("--port", str(p.port), *flags)
            assert (code, errors.count("\n")) == (78, 1)
            assert "llmq runs there already" in errors


# ---- The tray --------------------------------------------------------------------------------


class Enough(Exception):
    """What the test wanted to hear was told."""


async def first_event(url: str, mode: str = "open") -> tray.Event:
    """The first of this mode that the tray's link tells of this llmq, or how it ended."""
    heard: list[tray.Event] = []

    def tell(event: tray.Event) -> None:
        if event.what["mode"] == mode:
            heard.append(event)
            raise Enough

    ended = await beside(tray.watch, url, tell)
    return heard[0] if heard else ended


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this test, and nothing of this machine's settings."""
    for name in list(os.environ):
        if name.startswith(("LLMQ_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("home")
async def test_tray_watches_and_steers_under_the_base() -> None:
    async with Speaker() as fake, based(fake.url) as q:
        event = await first_event(q.base)
        assert (event.kind, event.what["mode"]) == ("seen", "open")
        box = tray.Box(q.base)
        await beside(box.mode, "paused")
        assert q.gateway.scheduler.mode.value == "paused"
        assert (await first_event(q.base, "paused")).kind == "seen"
        assert await beside(box.free) == ""
        assert q.gateway.scheduler.mode.value == "paused"
        assert (await first_event(q.base[: -len(BASE)])).kind == "lost"


@pytest.mark.deadline(20)
@pytest.mark.usefixtures("home")
async def test_tray_starts_llmq_under_the_base_of_its_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    born: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **more: Any) -> Any:
        born.append(popen(*arguments, **more))
        return born[-1]

    monkeypatch.setattr(tray.subprocess, "Popen", start)
    monkeypatch.setattr(tray, "START_SECONDS", 5.0)
    url = f"http://127.0.0.1:{peers.free_port()}{BASE}"
    box = tray.Box(url)
    try:
        assert await beside(box.start) == ""
        assert (await first_event(url)).kind == "seen"
        assert await beside(box.stop) == ""
        await eventually(lambda: born[0].poll() is not None)
    finally:
        for process in born:
            process.kill()
            await beside(process.wait)


# ---- Proxies ---------------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {here}/pid; error_log {here}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {here}/b; proxy_temp_path {here}/p;
  fastcgi_temp_path {here}/f; uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;
  server {{
    listen 127.0.0.1:{port};
    listen 127.0.0.1:{secure} ssl;
    ssl_certificate {cert}; ssl_certificate_key {key};
    {more}
    {lines}
  }}
}}
"""
# What the README says; the port is put in.
NGINX_LINES = """
location /llm/ {
    proxy_pass http://127.0.0.1:11500;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_read_timeout 300s;
    proxy_request_buffering off;
    client_max_body_size 0;
}
"""
NGINX_SHORT = "location /llm/ { proxy_pass http://127.0.0.1:11500; }"
REAL_IP = "set_real_ip_from 127.0.0.1; real_ip_header X-Test-Address;"  # who the test says it is
CADDY_LINES = """
redir /llm /llm/
handle /llm/* {
    reverse_proxy 127.0.0.1:11500
}
"""
CADDY = """
{{
  admin off
  auto_https off
  skip_install_trust
  servers {{
    protocols h1 h2
  }}
}}
http://127.0.0.1:{port} {{
  bind 127.0.0.1
  {lines}
}}
https://127.0.0.1:{secure}, https://llmq.example:{secure} {{
  bind 127.0.0.1
  tls {cert} {key}
  {lines}
}}
"""


class Proxy:
    """A real proxy of this test, at `url` plain and at `secure` over TLS."""

    def __init__(self, port: int, secure: int, log: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}{BASE}"
        self.secure = f"https://127.0.0.1:{secure}{BASE}"
        self.secure_port = secure
        self.log = log


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str:
    """A server's program, also where only root has its folder in the path."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    need(path, f"the program {name} is not installed")
    return str(path)


def start(words: list[str], home: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    with log.open("ab") as out:
        facts: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        return subprocess.Popen(words, env=environment, **facts)


@contextlib.asynccontextmanager
async def behind(
    kind: str, q: running, papers: Papers, folder: Path, lines: str = "", more: str = ""
) -> AsyncIterator[Proxy]:
    """A proxy of this kind before llmq."""
    port, secure = peers.free_port(), peers.free_port()
    forms = {"nginx": (NGINX, NGINX_LINES), "caddy": (CADDY, CADDY_LINES)}
    form, usual = forms[kind]
    place = {"here": folder, "port": port, "secure": secure, "more": more}
    place["lines"] = (lines or usual).replace("11500", str(q.port))
    place.update(cert=papers.path("server.pem"), key=papers.path("server.key"))
    config, log = folder / f"{kind}.conf", folder / f"{kind}.log"
    config.write_text(form.format(**place))
    words = {
        "nginx": ["-p", str(folder), "-e", str(log), "-c", str(config)],
        "caddy": ["run", "--config", str(config), "--adapter", "caddyfile"],
    }[kind]
    process = start([program(kind), *words], folder, log)
    # Caddy listens before that; what it passes on meanwhile it may hang up on in the middle.
    last = {"nginx": "", "caddy": "serving initial configuration"}[kind]

    def is_ready() -> bool:
        return listens(port) and listens(secure) and last in log.read_text()

    try:
        await eventually(lambda: process.poll() is not None or is_ready())
        assert process.poll() is None, log.read_text()
        yield Proxy(port, secure, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["nginx", "caddy"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def proxied(
    kind: str, papers: Papers, folder: Path, fake: FakeBackend, **settings: Any
) -> AsyncIterator[tuple[based, Proxy]]:
    more, lines = settings.pop("more", ""), settings.pop("lines", "")
    trusted = {"server__trusted_proxies": ["127.0.0.1"], **settings}
    async with based(fake.url, **trusted) as q:
        async with behind(kind, q, papers, folder, lines, more) as proxy:
            yield q, proxy


@pytest.mark.deadline(60)
@pytest.mark.parametrize("name", SDKS)
async def test_official_library_works_behind_a_proxy(
    name: str, kind: str, papers: Papers, tmp_path: Path, drivers: dict[str, Any]
) -> None:
    driver = drivers[name]
    async with Speaker() as fake, proxied(kind, papers, tmp_path, fake) as (_, proxy):
        await assert_library_works(driver, proxy.url)
        await assert_library_works(driver, proxy.secure)


@pytest.mark.deadline(20)
async def test_curl_and_commands_work_behind_a_proxy(
    kind: str, papers: Papers, tmp_path: Path
) -> None:
    trust, body = ("--cacert", papers.path("ca.pem")), json.dumps(chat("hello there"))
    async with FakeBackend() as fake, proxied(kind, papers, tmp_path, fake) as (_, proxy):
        for url in (proxy.url, proxy.secure):
            code, said = await curl(*trust, url + CHAT, "--json", body)
            assert (code, "hello there" in said) == (0, True), said
            code, said = await curl(*trust, "-L", url)  # it adds the slash itself
            assert (code, said) == (0, "Ollama is running")
            code, said = await curl(*trust, "-o", "/dev/null", "-w", "%{http_code}", url + "x")
            assert (code, said) in ((0, "404"), (0, "200")), said  # Caddy's own empty 200
            for typed in (("status",), ("mode", "open")):
                env = {"SSL_CERT_FILE": papers.path("ca.pem")}
                code, said, errors = await command(*typed, "--url", url, **env)
                assert (code, errors) == (0, "")


@pytest.mark.deadline(20)
@pytest.mark.parametrize("way", ["plain", "tls"])
async def test_page_works_behind_a_proxy(
    way: str, kind: str, papers: Papers, tmp_path: Path, browser: Browser
) -> None:
    async with FakeBackend() as fake, proxied(kind, papers, tmp_path, fake) as (q, proxy):
        url = proxy.secure if way == "tls" else proxy.url
        async with opened(browser, url) as page:
            await page.js("setMode('paused')")
            await page.until("document.title.includes('paused')")
            assert q.gateway.scheduler.mode.value == "paused"
            await page.js("setMode('open')")
            await page.until("!document.title.includes('paused')")
            assert await page.js("document.querySelector('#base').textContent") == f"{url}/v1"
            asked = [one for one in page.requests if not one.startswith("data:")]
            assert all(one.startswith(url) for one in asked)


@pytest.mark.deadline(20)
async def test_page_behind_a_proxy_with_a_name_works_where_its_origin_is_named(
    kind: str, papers: Papers, tmp_path: Path, browser: Browser
) -> None:
    lines = (
        NGINX_LINES.replace("proxy_http", "proxy_set_header Host $host; proxy_http")
        if kind == "nginx"
        else ""
    )
    async with FakeBackend() as fake:
        more: dict[str, Any] = {"server__allowed_hosts": ["llmq.example"], "lines": lines}
        async with proxied(kind, papers, tmp_path, fake, **more) as (q, proxy):
            origin = f"https://llmq.example:{proxy.secure_port}"
            q.service.settings.server = llmq.replace(
                q.service.settings.server, cors_origins=("*", origin)
            )
            async with opened(browser, f"{origin}{BASE}/") as page:
                await page.js("setMode('paused')")
                await page.until("document.title.includes('paused')")
                assert q.gateway.scheduler.mode.value == "paused"


FORMS = {  # the least of nginx's lines, and what the README says
    "nginx, one line": ("nginx", NGINX_SHORT),
    "nginx": ("nginx", NGINX_LINES),
    "caddy": ("caddy", CADDY_LINES),
}


@pytest.mark.parametrize(("form", "lines"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
async def test_streams_come_piece_by_piece_through_a_proxy(
    path: str, form: str, lines: str, papers: Papers, tmp_path: Path
) -> None:
    """Each is read before the next one is sent."""
    async with FakeBackend(auto=False) as fake:
        async with proxied(form, papers, tmp_path, fake, lines=lines) as (q, proxy):
            recent = q.service.gateway.journal.recent
            for port, way in ((proxy.port, None), (proxy.secure_port, papers)):
                # Debian's Caddy 2.6.2 hangs up in about one of fifty streams of a busy machine,
                # within milliseconds: then llmq's record says so, and it is asked again.
                for left in reversed(range(3 if form == "caddy" else 1)):
                    before = len(recent)
                    try:
                        await assert_comes_piecewise(fake, await connect(port, way), BASE + path)
                        break
                    except (EOFError, OSError):
                        await eventually(lambda seen=before: len(recent) > seen)
                        if not left or recent[-1].outcome != "client_left":
                            raise


async def assert_comes_piecewise(fake: FakeBackend, raw: Raw, path: str) -> None:
    async with raw:
        await raw.send(http("POST", path, JSON, json.dumps(chat("hi", stream=True)).encode()))
        request = await fake.arrived()
        await request.start_stream()
        for word in (" one", " two", " three"):
            await request.piece(word)
            await raw.until(word.encode())
        await request.finish_stream()


async def test_events_come_as_they_happen_through_a_proxy(
    kind: str, papers: Papers, tmp_path: Path
) -> None:
    async with FakeBackend() as fake, proxied(kind, papers, tmp_path, fake) as (q, proxy):
        async with await connect(proxy.secure_port, papers) as raw:
            await raw.send(http("GET", BASE + "/llmq/events"))
            watched = raw.events()
            assert (await watched.__anext__())["mode"] == "open"
            path = f"{BASE}/llmq/mode"
            answer = await ask(proxy.port, "POST", path, json={"mode": "paused"})
            assert answer.status == 200
            async for event in watched:
                if event["mode"] == "paused":
                    break
            await watched.aclose()
        await eventually(lambda: not q.service.api.stream.watchers)


@pytest.mark.parametrize("when", ["waiting", "running", "streaming"])
async def test_client_that_leaves_a_proxy_ends_its_request(
    when: str, kind: str, papers: Papers, tmp_path: Path
) -> None:
    async with FakeBackend(auto=False) as fake:
        async with proxied(kind, papers, tmp_path, fake) as (q, proxy):
            body = json.dumps(chat("hi", stream=True)).encode()
            clients = []
            for _ in range(2 if when == "waiting" else 1):
                raw = await connect(proxy.secure_port, papers)
                clients.append(raw)
                await raw.send(http("POST", BASE + CHAT, JSON, body))
                await eventually(lambda: len(q.gateway.calls) == len(clients))
            request = await fake.arrived()
            if when == "streaming":
                await request.start_stream()
                await request.piece("one ")
                await raw.until(b"one ")
            raw.close()
            if when == "waiting":
                await eventually(lambda: not q.gateway.scheduler.waiting)
                clients[0].close()
            await request.left()
            await eventually(lambda: not q.gateway.calls)


@pytest.mark.parametrize(("form", "lines"), FORMS.values(), ids=FORMS.keys())
async def test_broken_stream_is_broken_behind_a_proxy_too(
    form: str, lines: str, papers: Papers, tmp_path: Path
) -> None:
    async with FakeBackend(auto=False) as fake:
        async with proxied(form, papers, tmp_path, fake, lines=lines) as (_, proxy):
            async with await connect(proxy.secure_port, papers) as raw:
                body = json.dumps(chat("hi", stream=True)).encode()
                await raw.send(http("POST", BASE + CHAT, JSON, body))
                request = await fake.arrived()
                await request.start_stream()
                await request.piece("one ")
                await raw.until(b"one ")
                request.reset()
                rest = b""
                while not rest.endswith(b"0\r\n\r\n") and (data := await raw.read()):
                    rest += data
                assert b"broke the connection" in rest  # an error is the last that comes
                assert b"[DONE]" not in rest
                # Caddy 2.6 ends well whatever it meets; who asks it has the error alone.
                assert rest.endswith(b"0\r\n\r\n") is (form == "caddy")


@pytest.mark.deadline(20)
async def test_large_uploads_and_answers_pass_a_proxy(
    kind: str, papers: Papers, tmp_path: Path
) -> None:
    async with FakeBackend() as fake, proxied(kind, papers, tmp_path, fake) as (_, proxy):
        async with await connect(proxy.secure_port, papers) as raw:
            text = large(5 * 1024 * 1024)
            body = json.dumps(chat(text)).encode()
            await raw.send(http("POST", BASE + CHAT, JSON, body))
            answer = await raw.response()
            assert (answer.status, answer.clean) == (200, True)
            assert answer.content == text


async def test_addresses_are_those_that_the_proxy_tells(papers: Papers, tmp_path: Path) -> None:
    """A client cannot forge one, and who is not of this box does not become so by the proxy."""
    async with FakeBackend(auto=False) as fake:
        async with proxied("nginx", papers, tmp_path, fake, more=REAL_IP) as (q, proxy):
            for forged in ({}, {"X-Forwarded-For": "127.0.0.1"}):
                far = {"X-Test-Address": "203.0.113.9", **forged}
                asking = asyncio.ensure_future(
                    ask(proxy.port, "POST", BASE + CHAT, json=chat("hi"), headers=far)
                )
                request = await fake.arrived()
                assert [row["client"] for row in (await q.status())["requests"]] == [
                    "ip:203.0.113.9"
                ]
                await request.answer("hi")
                assert (await asking).content == "hi"
                for path in ("/api/delete", "/llmq/backends"):
                    method = "DELETE" if path == "/api/delete" else "POST"
                    answer = await ask(proxy.port, method, BASE + path, json={}, headers=far)
                    assert answer.status == 403, path


async def test_this_box_needs_no_key_but_whoever_comes_by_the_proxy_does(
    papers: Papers, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"keys": KEYS, "server__require_key": "remote", "more": REAL_IP}
    async with FakeBackend() as fake, proxied("nginx", papers, tmp_path, fake, **more) as (_, p):
        far = {"X-Test-Address": "203.0.113.9"}
        asked = {"json": chat("hi")}
        assert (await ask(p.port, "POST", BASE + CHAT, **asked)).status == 200
        assert (await ask(p.port, "POST", BASE + CHAT, **asked, headers=far)).status == 401
        keyed = {**far, "Authorization": "Bearer k-alice"}
        assert (await ask(p.port, "POST", BASE + CHAT, **asked, headers=keyed)).status == 200


async def test_nginx_that_decodes_paths_leads_nowhere_else(papers: Papers, tmp_path: Path) -> None:
    async with FakeBackend() as fake, proxied("nginx", papers, tmp_path, fake) as (_, proxy):
        for target in ("/llm/%2e%2e/llmq/status", "/llm/../llmq/status", "/llmq/status", "/health"):
            answer = await ask(proxy.port, "GET", target)
            assert answer.status in (400, 404), target
        for target in ("/llm/health", "//llm/health", "/x/../llm/health", "/%6clm/health"):
            answer = await ask(proxy.port, "GET", target)  # as nginx tidies them up, or not
            assert answer.status in (200, 404), target


async def test_refused_host_is_named_where_nginx_passes_it_on(
    papers: Papers, tmp_path: Path
) -> None:
    lines = NGINX_LINES.replace("proxy_http", "proxy_set_header Host $host; proxy_http")
    async with FakeBackend() as fake:
        async with proxied("nginx", papers, tmp_path, fake, lines=lines) as (_, proxy):
            named = {"Host": "llmq.example"}
            answer = await ask(proxy.port, "GET", BASE + "/health", headers=named)
            assert answer.status == 403
            assert "--allowed-host" in told_error("/health", answer)


@pytest.mark.usefixtures("home")
async def test_tray_works_behind_a_proxy(
    kind: str, papers: Papers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", papers.path("ca.pem"))
    async with FakeBackend() as fake, proxied(kind, papers, tmp_path, fake) as (q, proxy):
        event = await first_event(proxy.url)
        assert (event.kind, event.what["mode"]) == ("seen", "open")
        await beside(tray.Box(proxy.url).mode, "paused")
        assert q.gateway.scheduler.mode.value == "paused"
