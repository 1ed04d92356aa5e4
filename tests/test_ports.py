"""Ports: who can send no key is known by their port, another service is reached through one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fake_runner import (
    CHAT,
    DEFAULT_CONTEXT,
    EMBED,
    GENERATE,
    NATIVE_CHAT,
    Dialect,
    Runner,
    read_pieces,
    speak,
    vector,
)
from tests.fakes import (
    RESET,
    Answer,
    Connection,
    FakeBackend,
    FakeRequest,
    Process,
    Raw,
    ask,
    chunk,
    eventually,
    free_port,
    http,
    need,
    render_head,
    run_llmq,
    running,
)
from tests.real import peers
from tests.real.drivers import Driver

pytestmark = pytest.mark.untraced  # others cover the lines behind these

MIB = 1 << 20
REAL = Path(__file__).resolve().parent / "real"
ROOT_KEY = "sk-root-0123456789abcdef"
ALICES = "sk-alice-0123456789abcdef"
KEYS: dict[str, Any] = {
    "root": {"key": ROOT_KEY, "rights": ["infer", "models", "control"]},
    "alice": {"key": ALICES},
}
AS_ALICE = {"Authorization": f"Bearer {ALICES}"}
AS_ROOT = {"Authorization": f"Bearer {ROOT_KEY}"}
JSON = {"Content-Type": "application/json"}
TOKEN = "Bearer tok-injected-0123456789"
FOREIGN: list[dict[str, str]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
]
BAD_HOSTS = ("evil.example", "evil.example:80", "localhost.evil.example")
leaving = pytest.mark.parametrize("leave", [Raw.close, Raw.rst], ids=["closes", "resets"])


# ---- Helpers ---------------------------------------------------------------------------------


def with_keys(*fakes: FakeBackend, **settings: Any) -> running:
    """An llmq that wants keys; these settings more."""
    return running(*[fake.url for fake in fakes], **{"keys": KEYS, **settings})


async def snapshot(q: running) -> Any:
    return (await ask(q.port, "GET", "/llmq/status", headers=AS_ROOT)).json()


async def up(q: running) -> None:
    """Return once every backend is up; the test's deadline ends it otherwise."""
    while any(one["state"] != "up" for one in (await snapshot(q))["backends"]):
        pass


def is_refused(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def listens(port: int) -> None:
    await eventually(lambda: not is_refused(port))


async def moved(q: running) -> None:
    """Return once a reload has opened and closed its ports."""
    await eventually(lambda: q.service._moving is None or q.service._moving.done())


async def told(port: int, text: str, dialect: Dialect = CHAT, **more: Any) -> str:
    """What comes back from the model, asked there."""
    return dialect.text(await dialect.ask(port, text, **more))


async def reread(q: running, **settings: Any) -> None:
    """Let these settings be what a reload reads, and reload."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    q.service.read = lambda: build_settings({**q.values, **values})
    q.service.reload()
    assert q.gateway.config_error is None


class Other(FakeBackend):
    """Another HTTP service: requests come as soon as their head is here, the body as it comes."""

    async def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await connection.reader.readuntil(b"\r\n\r\n"))[:-4]
            self._judge(connection, head)
            request = FakeRequest(connection, head, b"")
            self.requests.append(request)
            self._queue.put_nowait(request)
            async for piece in read_pieces(request):
                request.body += piece
            request.done.set()  # it is here whole
            await connection.reader.read(1)
        connection.gone.set()
        self.open.discard(connection)
        connection.writer.transport.abort()


class through:  # noqa: N801 - reads as a sentence: async with through(row) as (port, other)
    """A pass-through port with this row, and the service behind it."""

    def __init__(self, base: str = "", settings: Any = (), **row: Any) -> None:
        self.base, self.settings, self.row = base, dict(settings), row
        self.stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> tuple[int, Other]:
        other = await self.stack.enter_async_context(Other())
        port = free_port()
        row = {"upstream": other.url + self.base, **self.row}
        values = {"keys": KEYS, "ports": {str(port): row}, **self.settings}
        nobody = "http://127.0.0.1:9"
        self.q = await self.stack.enter_async_context(running(nobody, **values))
        return port, other

    async def __aexit__(self, *failure: Any) -> None:
        await self.stack.__aexit__(*failure)


async def sent(port: int, *request: Any, **more: Any) -> Raw:
    raw = await Raw.open(port)
    await raw.send(http(*request, **more))
    return raw


async def begun(other: Other, *headers: tuple[str, str], status: int = 200) -> FakeRequest:
    """The next request there, its chunked answer begun."""
    request = await other.arrived()
    await request.send(render_head(status, [("Transfer-Encoding", "chunked"), *headers]))
    return request


async def end(request: FakeRequest) -> None:
    await request.send(b"0\r\n\r\n")


async def more(raw: Raw, expected: bytes) -> None:
    """The next bytes of the chunked answer are just these."""
    answer = raw.answer
    assert answer is not None
    before = len(answer.body)
    while len(answer.body) < before + len(expected):
        size = int((await raw.until(b"\r\n")).split(b";")[0], 16)
        assert size, f"it ended after {answer.body!r}"
        answer.body += (await raw.exactly(size + 2))[:-2]
    assert answer.body[before:] == expected


async def reply(port: int, other: Other, answer: bytes, *request: Any, **more: Any) -> Answer:
    """What the client gets when the service sends these very bytes, and closes."""
    raw = await sent(port, *(request or ("GET", "/")), **more)
    asked = await other.arrived()
    with contextlib.suppress(ConnectionError):
        await asked.send(answer)
    asked.close()
    return await raw.response()


# ---- Somebody's own port ---------------------------------------------------------------------


async def test_who_comes_to_a_port_is_its_client_and_needs_no_key() -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake, ports={str(port): {"client": "memsearch"}}) as q:
        assert (await CHAT.ask(q.port, "hi")).status == 401
        fake.hold()
        raw = await CHAT.begin(port, "hello there")
        await eventually(lambda: fake.active)
        (row,) = (await snapshot(q))["requests"]
        assert (row["client"], row["state"]) == ("memsearch", "running")
        fake.release()
        assert CHAT.text(await raw.response()) == "hello there"
        seen = await snapshot(q)
        assert [one["client"] for one in seen["recent"] if one["outcome"] == "done"] == [
            "memsearch"
        ]
        assert {"memsearch"} <= {one["name"] for one in seen["clients"]}
        assert (await CHAT.ask(q.port, "hi")).status == 401, "on its own port a key is needed still"


async def test_port_without_a_name_is_one_by_its_number() -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake, ports={str(port): {}}) as q:
        assert await told(port, "hello") == "hello"
        assert (await snapshot(q))["recent"][0]["client"] == f"port:{port}"


async def test_port_works_without_any_key_in_the_file() -> None:
    port = free_port()
    async with Runner() as fake, running(fake.url, ports={str(port): {"client": "a"}}) as q:
        assert await told(port, "hello") == "hello"
        assert await told(q.port, "hello", headers={"X-User-ID": "bob"}) == "hello"
        clients = [one["client"] for one in (await q.status())["recent"]]
        assert sorted(clients) == ["a", "user:bob"]


@pytest.mark.parametrize(
    "claim",
    [
        {"X-User-ID": "mallory"},
        {"X-OpenWebUI-User-Id": "mallory"},
        AS_ROOT,
        {"x-api-key": ROOT_KEY},
        {"Authorization": f"Bearer {ALICES}", "X-User-ID": "mallory"},
        {"Authorization": "Bearer wrong"},
        {"x-api-key": "wrong"},
        {"Authorization": "Basic cm9vdDp3cm9uZw=="},
        {"Proxy-Authorization": AS_ROOT["Authorization"]},
        {"X-Forwarded-For": "10.0.0.9"},
        {"Origin": "http://localhost:3000"},
    ],
    ids=str,
)
async def test_what_a_client_says_of_itself_on_a_port_counts_for_nothing(
    claim: dict[str, str],
) -> None:
    port = free_port()
    row = {"client": "memsearch", "max_class": "normal"}
    async with Runner() as fake, with_keys(fake, ports={str(port): row}) as q:
        for dialect in (CHAT, NATIVE_CHAT, EMBED):
            assert await told(port, "hello", dialect, headers=claim) == "hello"
        clients = {one["client"] for one in (await snapshot(q))["recent"]}
        assert clients == {"memsearch"}
        answer = await ask(port, "GET", "/llmq/status", headers=claim)
        assert answer.status == 403, "no right comes with a key there"
        for request in fake.requests:
            wire = request.raw.decode().lower()
            assert "authorization" not in request.headers
            assert "x-api-key" not in request.headers
            assert "mallory" not in wire
            assert "sk-" not in wire
            assert "wrong" not in wire


async def test_wrong_keys_on_a_port_are_no_guesses() -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake, ports={str(port): {}}) as q:
        for number in range(15):
            bad = {"Authorization": f"Bearer guess-{number}"}
            assert (await CHAT.ask(port, "hi", headers=bad)).status == 200
        good = {"Authorization": f"Bearer {ALICES}"}
        assert (await CHAT.ask(q.port, "hi", headers=good)).status == 200


@pytest.mark.parametrize(
    ("row", "asked", "given"),
    [
        ({}, "", "normal"),
        ({}, "high", "high"),
        ({"class": "low"}, "", "low"),
        ({"class": "low"}, "high", "high"),
        ({"class": "low", "max_class": "normal"}, "high", "normal"),
        ({"max_class": "low"}, "", "low"),
        ({"max_class": "low"}, "high", "low"),
        ({"class": "high", "max_class": "normal"}, "", "normal"),
        ({"class": "high"}, "", "high"),
        ({"class": "high"}, "low", "low"),
        ({"class": "low"}, "urgent", "low"),
    ],
    ids=str,
)
async def test_class_of_a_port_is_the_default_and_its_max_class_the_ceiling(
    row: dict[str, str], asked: str, given: str
) -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake, ports={str(port): row}) as q:
        headers = {"X-Queue-Priority": asked} if asked else {}
        answer = await CHAT.ask(port, "hello", headers=headers)
        assert CHAT.text(answer) == "hello"
        assert answer.headers["x-llmq-class"] == given
        assert (await snapshot(q))["recent"][0]["class"] == given
        if asked in llmq.CLASSES:
            answer = await CHAT.ask(port, "hello", priority=asked)
            assert answer.headers["x-llmq-class"] == given


async def test_max_concurrent_of_a_port_holds_and_is_freed_on_every_way_out() -> None:
    port, wide = free_port(), free_port()
    ports = {str(port): {"client": "few", "max_concurrent": 1}, str(wide): {"client": "many"}}
    async with Runner(auto=False) as fake, with_keys(fake, ports=ports, queue__slots=4) as q:
        fake.contexts["m"] = DEFAULT_CONTEXT  # loaded: a burst starts at once
        await up(q)
        first, second, third = [await CHAT.begin(port, str(n)) for n in range(3)]
        one = await fake.arrived()
        others = [await CHAT.begin(wide, "beside") for _ in range(2)]
        for _ in others:
            request = await fake.arrived()
            assert request.text == "beside", "those who wait for the cap hold up nobody"
            await speak(request)
        assert [CHAT.text(await raw.response()) for raw in others] == ["beside"] * 2
        account = q.gateway.accounts.named[f"port:{port}"]
        await eventually(lambda: account.waiting == 2)
        first.rst()  # a running one that leaves
        await one.left()
        two = await fake.arrived()
        two.reset()  # one that its backend gives up
        two = await fake.arrived()
        rest = {two.text}
        await speak(two)
        three = await fake.arrived()
        rest.add(three.text)
        await speak(three)
        assert rest == {"1", "2"}
        assert {(await raw.response()).status for raw in (second, third)} <= {200, 502}
        await eventually(lambda: (account.running, account.waiting) == (0, 0))
        assert fake.max_active <= 3


async def test_models_of_a_port_are_the_only_ones_it_may_use() -> None:
    port = free_port()
    row = {"client": "some", "models": ["a", "qwen*"]}
    models = ["a:latest", "b:latest", "qwen3:8b"]
    async with Runner(models=models) as fake, with_keys(fake, ports={str(port): row}) as q:
        await up(q)
        for model in ("a", "a:latest", "A", "qwen3:8b"):
            assert (await CHAT.ask(port, "hi", model=model)).status == 200, model
        before = len(fake.requests)
        for dialect in (CHAT, NATIVE_CHAT, GENERATE, EMBED):
            answer = await dialect.ask(port, "hi", model="b")
            assert answer.status in (403, 404), answer
            assert dialect.whole_error(answer)
        assert len(fake.requests) == before
        everybody = {"Authorization": f"Bearer {ALICES}"}
        assert (await CHAT.ask(q.port, "hi", model="b", headers=everybody)).status == 200


async def test_models_of_a_port_hold_on_routes_that_llmq_does_not_know_too() -> None:
    port = free_port()
    ports = {str(port): {"models": ["a"]}}
    more = {"server__allow_all_routes": True, "ports": ports}
    async with Runner(models=["a", "b"]) as fake, with_keys(fake, **more) as q:
        await up(q)
        answer = await ask(port, "POST", "/v1/other", json={"model": "b"})
        assert answer.status == 403
        assert fake.requests == []


CONTROL: list[tuple[str, str, Any]] = [
    ("GET", "/llmq/status", None),
    ("GET", "/llmq/events", None),
    ("GET", "/metrics", None),
    ("GET", "/llmq", None),
    ("POST", "/llmq/mode", {"mode": "paused"}),
    ("POST", "/llmq/reload", {}),
    ("POST", "/llmq/clients/bob", {"blocked": True}),
    ("POST", "/llmq/ips", {"ip": "10.0.0.9", "blocked": True}),
    ("POST", "/llmq/leases", {"device": "local"}),
    ("POST", "/llmq/backends", {"name": "x", "url": "http://127.0.0.1:9"}),
    ("DELETE", "/llmq/requests?state=waiting", None),
]
MANAGED: list[tuple[str, str, Any]] = [
    ("POST", "/api/pull", {"model": "new"}),
    ("POST", "/api/create", {"model": "made", "from": "m"}),
    ("DELETE", "/api/delete", {"model": "m"}),
    ("POST", "/llmq/models", {"action": "unload", "model": "m"}),
]


@pytest.mark.parametrize("order", [*CONTROL, *MANAGED], ids=lambda order: " ".join(order[:2]))
async def test_port_may_only_infer_unless_it_has_more_rights(order: Any) -> None:
    port, method, path, body = free_port(), *order
    async with Runner() as fake, with_keys(fake, ports={str(port): {"client": "bob"}}) as q:
        await up(q)
        for headers in ({}, AS_ROOT, {"Accept": "text/html"}):
            answer = await ask(port, method, path, json=body, headers=headers)
            assert answer.status == 403, answer
        assert fake.managed == []
        assert (await snapshot(q))["mode"] == "open"
        assert await told(port, "still") == "still"


async def test_page_is_only_for_a_port_with_the_right_to_control() -> None:
    port, steers = free_port(), free_port()
    ports = {str(port): {}, str(steers): {"rights": ["control"]}}
    async with Runner() as fake, with_keys(fake, ports=ports):
        page = {"Accept": "text/html"}
        assert (await ask(port, "GET", "/", headers=page)).status == 403
        assert (await ask(port, "GET", "/")).body == b"Ollama is running"
        assert b"<html" in (await ask(steers, "GET", "/", headers=page)).body


async def test_rights_of_a_port_open_what_they_name_and_nothing_else() -> None:
    steers, manages, none = free_port(), free_port(), free_port()
    ports = {
        str(steers): {"client": "desk", "rights": ["control"]},
        str(manages): {"client": "cook", "rights": ["infer", "models"]},
        str(none): {"rights": []},
    }
    async with Runner() as fake, with_keys(fake, ports=ports) as q:
        await up(q)
        assert (await ask(steers, "GET", "/llmq/status")).status == 200
        assert (await ask(steers, "GET", "/metrics")).status == 200
        assert (await ask(steers, "POST", "/llmq/mode", json={"mode": "open"})).status == 200
        assert (await CHAT.ask(steers, "hi")).status == 403
        assert (await ask(steers, "POST", "/api/pull", json={"model": "n"})).status == 403
        assert (await ask(manages, "GET", "/llmq/status")).status == 403
        assert await told(manages, "hi") == "hi"
        raw = await sent(manages, "POST", "/api/pull", JSON, b'{"model": "n"}')
        await (await fake.management()).status(200, {"status": "success"})
        assert (await raw.response()).status == 200
        assert (await CHAT.ask(none, "hi")).status == 403
        assert (await ask(none, "GET", "/health")).body == b"ok"


async def test_port_may_cancel_its_own_requests_and_no_others() -> None:
    port, other = free_port(), free_port()
    ports = {str(port): {"client": "one"}, str(other): {"client": "two"}}
    async with Runner() as fake, with_keys(fake, ports=ports) as q:
        await up(q)
        fake.hold()
        mine, theirs = await CHAT.begin(port, "mine"), await CHAT.begin(other, "theirs")
        await eventually(lambda: len(q.gateway.calls) == 2)
        ids = {one["client"]: one["id"] for one in (await snapshot(q))["requests"]}
        refused = await ask(port, "DELETE", f"/llmq/requests/{ids['two']}")
        assert refused.status in (403, 404)
        raised = await ask(port, "POST", f"/llmq/requests/{ids['one']}", json={"priority": "high"})
        assert raised.status == 403
        assert (await ask(port, "DELETE", f"/llmq/requests/{ids['one']}")).status == 200
        assert (await mine.response()).status == 499
        fake.release()
        assert CHAT.text(await theirs.response()) == "theirs"


async def test_reads_and_health_are_answered_on_a_port() -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake, ports={str(port): {}}) as q:
        await up(q)
        assert (await ask(port, "GET", "/health")).body == b"ok"
        assert (await ask(port, "GET", "/api/tags")).json()["models"][0]["name"] == "m"
        assert (await ask(port, "GET", "/v1/models")).json()["data"][0]["id"] == "m"
        assert (await ask(port, "GET", "/api/version")).status == 200
        assert (await ask(port, "HEAD", "/")).status == 200
        assert (await ask(port, "GET", "/nothing")).status == 404


async def test_base_path_is_not_needed_on_a_port() -> None:
    port = free_port()
    more = {"ports": {str(port): {}}, "server__base_path": "/llm"}
    async with Runner() as fake, with_keys(fake, **more) as q:
        assert await told(port, "hello") == "hello"
        assert (await ask(q.port, "GET", "/llm/health")).body == b"ok"


async def test_client_of_a_port_that_is_blocked_is_refused_there() -> None:
    port = free_port()
    more = {"ports": {str(port): {"client": "bob"}}, "clients": {"bob": {"blocked": True}}}
    async with Runner() as fake, with_keys(fake, **more):
        assert (await CHAT.ask(port, "hi")).status == 403
        assert fake.requests == []


async def test_settings_of_a_client_hold_for_who_comes_to_its_port() -> None:
    port = free_port()
    more = {"ports": {str(port): {"client": "bob"}}, "clients": {"bob": {"class": "high"}}}
    async with Runner() as fake, with_keys(fake, **more):
        assert (await CHAT.ask(port, "hi")).headers["x-llmq-class"] == "high"


NAMESAKES = ["alice/bob", "user:bob", "app:curl", "ip:10.0.0.9", "anonymous", "llmq"]


@pytest.mark.parametrize("name", NAMESAKES)
def test_client_of_a_port_has_no_name_that_somebody_else_may_have(name: str) -> None:
    """Or the ceilings and caps of one would be the other's."""
    with pytest.raises(llmq.ConfigError, match=r"ports\.11436\.client"):
        build_settings({"ports": {"11436": {"client": name}}})


@pytest.mark.parametrize(
    "client",
    ["mem search", "a\nb", "<b>x</b>", "x" * 100],
    ids=["space", "line break", "markup", "long"],
)
async def test_client_of_a_port_is_a_name_like_any_other(client: str) -> None:
    """As it says of all names: other characters become `-`, and 64 are the most."""
    port = free_port()
    ports = {str(port): {"client": client}}
    try:
        build_settings({"ports": ports})
    except llmq.ConfigError as error:
        assert f"ports.{port}" in str(error)  # noqa: PT017 - it may be refused as well
        return
    async with Runner() as fake, with_keys(fake, ports=ports) as q:
        assert await told(port, "hello") == "hello"
        name = (await snapshot(q))["recent"][0]["client"]
        assert name == llmq.NAME_CHARACTERS.sub("-", client)[:64]


@pytest.mark.parametrize("host", BAD_HOSTS)
async def test_wrong_host_is_refused_on_a_port(host: str) -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake, ports={str(port): {}}):
        for path in ("/health", "/v1/models", "/api/tags"):
            assert (await ask(port, "GET", path, headers={"Host": host})).status == 403
        assert (await CHAT.ask(port, "hi", headers={"Host": host})).status == 403
        assert fake.requests == []


# ---- Programs that can send no header --------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """The official `ollama` library for Python, in a process of its own."""
    try:
        python = peers.python()
        script = tmp_path_factory.mktemp("ollama") / "drive_ports.py"  # its log is its own
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(REAL)!r})\nimport runpy\n"
            f"runpy.run_path({str(REAL / 'drive_ollama.py')!r}, run_name='__main__')\n"
        )
        with Driver([python, str(script)], REAL) as driver:
            yield driver.is_ready(30)
    except peers.Missing as reason:
        need(False, str(reason))


@pytest.mark.deadline(25)
async def test_plain_ollama_clients_side_by_side_are_told_apart_by_their_ports(
    library: Driver,
) -> None:
    names = ("talks", "streams", "embeds")
    ports = {name: free_port() for name in names}
    rows = {str(port): {"client": name} for name, port in ports.items()}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    fake = Runner(models=["m:latest"], auto=False)
    fake.contexts["m:latest"] = DEFAULT_CONTEXT  # loaded: a burst starts at once
    async with fake, with_keys(fake, ports=rows, queue__slots=3) as q:
        await up(q)
        works = {
            "talks": library.start("whole", url=urls["talks"], model="m", text="one whole"),
            "streams": library.start("stream", url=urls["streams"], model="m", text="a b c"),
            "embeds": library.start("embeddings", url=urls["embeds"], model="m", texts=["x", "y"]),
        }
        arrived = [await fake.arrived() for _ in names]
        seen = (await snapshot(q))["requests"]
        routes = {one["client"]: one["route"] for one in seen if one["state"] == "running"}
        assert routes == {"talks": "/api/chat", "streams": "/api/chat", "embeds": "/api/embed"}
        for request in arrived:
            assert "authorization" not in request.headers
            if request.path == "/api/embed":
                facts = {"model": "m", "embeddings": [vector("x"), vector("y")]}
                await request.status(200, facts)
            else:
                await speak(request)
        await eventually(lambda: all(work.over for work in works.values()), 20)
        assert works["talks"].done["text"] == "one whole"
        assert works["streams"].pieces == ["a", " b", " c"]
        assert works["embeds"].done == [vector("x"), vector("y")]
        recent = (await snapshot(q))["recent"]
        assert sorted(one["client"] for one in recent) == sorted(names)
        refused = library.start("whole", url=q.base, model="m", text="without a key")
        await eventually(lambda: refused.over, 20)
        assert refused.raised
        assert refused.raised["status_code"] == 401


@pytest.mark.deadline(25)
async def test_plain_ollama_client_sees_only_what_its_port_may_use(library: Driver) -> None:
    port = free_port()
    row = {"client": "some", "models": ["m"], "class": "low"}
    models = ["m:latest", "n:latest"]
    async with Runner(models=models) as fake, with_keys(fake, ports={str(port): row}) as q:
        await up(q)
        url = f"http://127.0.0.1:{port}"
        listed = library.start("models", url=url)
        good = library.start("stream", url=url, model="m", text="as it may")
        bad = library.start("whole", url=url, model="n", text="as it may not")
        works = (listed, good, bad)
        await eventually(lambda: all(work.over for work in works), 20)
        assert listed.done == ["m:latest"]
        assert good.done["text"] == "as it may"
        assert bad.raised
        assert bad.raised["status_code"] in (403, 404)
        assert [request.json["model"] for request in fake.requests] == ["m"]


# ---- Another service: on the way there -------------------------------------------------------


def lines_of(request: FakeRequest, name: str) -> list[str]:
    return [value for key, value in request.header_list if key == name]


async def test_header_fields_of_the_row_go_in_place_of_the_clients() -> None:
    headers = {"Authorization": TOKEN, "X-Client-Name": "librechat", "x-tenant": "7"}
    async with through(headers=headers) as (port, other):
        claims = [
            ("authorization", f"Bearer {ALICES}"),
            ("X-CLIENT-NAME", "mallory"),
            ("X-Tenant", "8"),
            ("X-Tenant", "9"),
            ("X-Other", "kept"),
        ]
        raw = await sent(port, "GET", "/v1/models", claims)
        request = await other.arrived()
        assert lines_of(request, "authorization") == [TOKEN]
        assert lines_of(request, "x-client-name") == ["librechat"]
        assert lines_of(request, "x-tenant") == ["7"]
        assert lines_of(request, "x-other") == ["kept"]
        assert b"mallory" not in request.raw
        assert ALICES.encode() not in request.raw
        await request.status(200, {})
        answer = await raw.response()
        assert answer.status == 200
        assert b"tok-injected" not in answer.raw_head


async def test_header_fields_of_the_client_pass_but_those_of_one_hop() -> None:
    passed = {
        "User-Agent": "curl/8",
        "Accept": "image/png",
        "Accept-Language": "de",
        "Cookie": "a=b; c=d",
        "Range": "bytes=0-9",
        "If-None-Match": '"x"',
        "X-API-Key": "own-of-the-service",
        "Authorization": "Bearer own-of-the-service",
        "X-User-ID": "u1",
        "X-Queue-Priority": "high",
        "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "Content-Type": "application/x-odd; v=1",
    }
    hop = {
        "Connection": "keep-alive, X-Hop, x-hop-too",
        "X-Hop": "no",
        "X-Hop-Too": "no",
        "Keep-Alive": "timeout=5",
        "Proxy-Connection": "keep-alive",
        "TE": "trailers",
        "Upgrade": "websocket",
    }
    async with through() as (port, other):
        raw = await sent(port, "POST", "/x", {**passed, **hop}, b"body")
        request = await other.arrived()
        for name, value in passed.items():
            assert lines_of(request, name.lower()) == [value], name
        for name in ("x-hop", "x-hop-too", "keep-alive", "proxy-connection", "te", "upgrade"):
            assert lines_of(request, name) == [], name
        assert lines_of(request, "host") == [other.url[len("http://") :]]
        assert lines_of(request, "content-length") == ["4"]
        assert "llmq" in request.headers["via"]
        await request.done.wait()
        assert request.body == b"body"
        await request.status(200, {})
        assert (await raw.response()).status == 200


async def test_what_codings_the_client_takes_is_told_to_the_service() -> None:
    """Accept-Encoding goes from end to end, RFC 9110 s.12.5.3; the answer is passed as it is."""
    async with through() as (port, other):
        raw = await sent(port, "GET", "/x", {"Accept-Encoding": "gzip, br"})
        request = await other.arrived()
        packed = bytes(range(256))
        headers = [("Content-Encoding", "gzip"), ("Content-Type", "text/plain")]
        await request.status(200, packed, headers)
        answer = await raw.response()
        assert (answer.headers["content-encoding"], answer.body) == ("gzip", packed)
        assert lines_of(request, "accept-encoding") == ["gzip, br"]


@pytest.mark.parametrize("base", ["", "/base", "/deep/base/v2", "/v1", "/engines/v1"])
async def test_path_goes_behind_the_base_path_of_the_upstream_with_its_query(base: str) -> None:
    paths = ("/", "/v1/models", "/a%2Fb?x=%20&y=1", "/d/?", "/llmq/status", "/health", "/c//d")
    async with through(base) as (port, other):
        for path in paths:
            answer = asyncio.ensure_future(ask(port, "GET", path))
            request = await other.arrived()
            assert request.path in (base + path, base + path.rstrip("?"))
            await request.status(200, {})
            assert (await answer).status == 200


@pytest.mark.parametrize(
    "path", ["/../secret", "/x/../../secret", "/%2e%2e/secret", "/..%2fsecret"]
)
async def test_dot_segments_do_not_lead_out_of_the_base_path(path: str) -> None:
    async with through("/base") as (port, other):
        raw = await sent(port, "GET", path)
        asked = asyncio.ensure_future(other.arrived())
        answer = asyncio.ensure_future(raw.response())
        await asyncio.wait({asked, answer}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        assert other.requests == []
        assert (await answer).status in (400, 404)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_methods_pass_with_and_without_a_body(method: str) -> None:
    async with through(headers={"Authorization": TOKEN}) as (port, other):
        for body in (None, b"", b"a body"):
            raw = await sent(port, method, "/thing?q=1", {}, body)
            request = await other.arrived()
            await request.done.wait()
            assert (request.method, request.path) == (method, "/thing?q=1")
            assert request.body == (body or b"")
            assert request.headers["authorization"] == TOKEN
            await request.status(200, {"did": method})
            answer = await raw.response()
            assert (answer.status, answer.json()) == (200, {"did": method})


@pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
async def test_methods_that_would_show_the_secret_or_tunnel_are_refused(method: str) -> None:
    """TRACE is answered with what came: with the header fields put in."""
    async with through(headers={"Authorization": TOKEN}) as (port, other):
        target = "evil.example:80" if method == "CONNECT" else "/"
        raw = await sent(port, method, target)
        asked = asyncio.ensure_future(other.arrived())
        answer = asyncio.ensure_future(raw.response())
        await asyncio.wait({asked, answer}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        other.faults.clear()  # this says it better
        assert other.requests == []
        assert (await answer).status in (400, 403, 405, 501)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_upload_of_several_mib_arrives_byte_for_byte(chunked: bool) -> None:
    data = random.Random(7).randbytes(5 * MIB + 123)
    async with through() as (port, other):
        raw = await Raw.open(port)
        if chunked:
            await raw.send(http("POST", "/up", {"Transfer-Encoding": "chunked"}))
            for at in range(0, len(data), 70_001):
                await raw.send(chunk(data[at : at + 70_001]))
            await raw.send(b"0\r\n\r\n")
        else:
            await raw.send(http("POST", "/up", {}, data))
        request = await other.arrived()
        await request.done.wait()
        assert hashlib.sha256(request.body).digest() == hashlib.sha256(data).digest()
        told = request.headers.get("content-length", request.headers.get("transfer-encoding"))
        assert told == ("chunked" if chunked else str(len(data)))
        await request.status(201, {"size": len(data)})
        answer = await raw.response()
        assert (answer.status, answer.json()) == (201, {"size": len(data)})


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_upload_arrives_piece_by_piece_as_it_is_sent(chunked: bool) -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        pieces = [bytes([number]) * 1000 for number in range(6)]
        size = {"Content-Length": str(1000 * len(pieces))}
        framing = {"Transfer-Encoding": "chunked"} if chunked else size
        await raw.send(http("PUT", "/up", framing))
        request = await other.arrived()
        so_far = b""
        for piece in pieces:
            await raw.send(chunk(piece) if chunked else piece)
            so_far += piece
            await eventually(lambda now=so_far: request.body == now)
        await raw.send(b"0\r\n\r\n" if chunked else b"")
        await request.done.wait()
        await request.status(200, {})
        assert (await raw.response()).status == 200


async def test_limits_of_bodies_do_not_hold_for_another_service() -> None:
    limits = {"server__max_body": 1000, "server__upload_timeout": 0.3}
    async with through(settings=limits) as (port, other), await Raw.open(port) as raw:
        await raw.send(http("POST", "/up", {"Content-Length": str(2 * MIB)}) + bytes(MIB))
        request = await other.arrived()
        await eventually(lambda: len(request.body) == MIB)
        await raw.send(bytes(MIB))
        await request.done.wait()
        await request.status(200, {})
        assert (await raw.response()).status == 200


async def test_upload_with_another_coding_passes_as_it_is() -> None:
    async with through() as (port, other):
        packed = bytes(range(256))
        raw = await sent(port, "POST", "/up", {"Content-Encoding": "gzip"}, packed)
        request = await other.arrived()
        await request.done.wait()
        assert (request.headers["content-encoding"], request.body) == ("gzip", packed)
        await request.status(200, {})
        assert (await raw.response()).status == 200


async def test_client_that_asks_first_is_told_to_go_on() -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        await raw.send(http("POST", "/", {"Content-Length": "3", "Expect": "100-continue"}))
        assert (await raw.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await raw.send(b"abc")
        request = await other.arrived()
        await request.done.wait()
        assert request.body == b"abc"
        await request.status(200, {})
        assert (await raw.response()).status == 200


async def test_answer_that_comes_before_the_upload_is_whole_reaches_the_client() -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        await raw.send(http("POST", "/up", {"Content-Length": str(8 * MIB)}) + bytes(MIB))
        request = await other.arrived()
        await request.status(413, {"error": "too much"})
        answer = await raw.response()
        assert (answer.status, answer.json()) == (413, {"error": "too much"})


async def test_one_connection_of_a_client_carries_one_request_after_the_other() -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        for number in range(3):
            await raw.send(http("POST", f"/{number}", {}, b"x" * number))
            request = await other.arrived()
            await request.done.wait()
            await request.status(200, {"number": number})
            answer = await raw.response()
            assert (answer.json(), answer.clean) == ({"number": number}, True)


async def test_pass_through_waits_for_no_slot_and_shows_in_no_queue() -> None:
    async with Runner() as fake, Other() as other:
        port = free_port()
        async with with_keys(fake, ports={str(port): {"upstream": other.url}}) as q:
            await up(q)
            fake.hold()
            raw = await CHAT.begin(q.port, "busy", headers=AS_ROOT)
            await eventually(lambda: fake.active)
            through_it = asyncio.ensure_future(ask(port, "GET", "/v1/chat/completions"))
            request = await other.arrived()
            assert len((await snapshot(q))["requests"]) == 1
            await request.status(200, {})
            assert (await through_it).status == 200
            fake.release()
            assert CHAT.text(await raw.response()) == "busy"


# ---- Another service: on the way back --------------------------------------------------------


async def test_event_stream_passes_event_by_event_and_byte_for_byte() -> None:
    async with through() as (port, other):
        raw = await sent(port, "GET", "/events")
        kind = "text/event-stream; charset=utf-8"
        request = await begun(other, ("Content-Type", kind), ("Cache-Control", "no-store"))
        events = [
            b": comment\n\n",
            b"event: a\r\ndata: 1\r\n\r\n",
            b"data: half of",
            b" a line\n\n",
            b"id: 7\nretry: 10\ndata: \xc3\xa9\xff\n\n",
        ]
        for number, event in enumerate(events):
            await request.send(chunk(event))
            if not number:
                head = await raw.head()
                assert (head.status, head.headers["content-type"]) == (200, kind)
                assert head.headers["cache-control"] == "no-store"
            await more(raw, event)
        await end(request)
        answer = await raw.response()
        assert answer.clean
        assert answer.body == b"".join(events)


async def test_head_of_a_stream_reaches_the_client_before_its_first_event() -> None:
    """A browser's EventSource is open only then, and some services wait for what it does next."""
    async with through() as (port, other):
        raw = await sent(port, "GET", "/events")
        request = await begun(other, ("Content-Type", "text/event-stream"))
        head = await asyncio.wait_for(raw.head(), 3)
        assert head.status == 200
        await request.send(chunk(b"data: 1\n\n"))
        await more(raw, b"data: 1\n\n")
        await end(request)
        assert (await raw.response()).clean


async def test_no_sign_of_life_of_llmqs_own_gets_into_anothers_stream() -> None:
    beats = {
        "server__heartbeat_after": 0.25,
        "server__heartbeat_interval": 0.25,
        "server__whole_heartbeat_after": 0.25,
    }
    async with through(settings=beats, timeout=1) as (port, other):
        raw = await sent(port, "GET", "/events")
        request = await begun(other, ("Content-Type", "text/event-stream"))
        await request.send(chunk(b"data: 1\n\n"))
        answer = await raw.response()  # it is silent until its time is over
        assert (answer.body, answer.clean) == (b"data: 1\n\n", False)


@pytest.mark.parametrize(
    "kind",
    [
        "text/html; charset=utf-8",
        "image/png",
        "application/octet-stream",
        "application/javascript",
        "application/grpc-web+proto",
        'multipart/mixed; boundary="x"',
        "audio/mpeg",
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked", "until close"])
async def test_answer_of_any_type_passes_byte_for_byte(kind: str, framing: str) -> None:
    data = random.Random(3).randbytes(300_000)
    type_line = [("Content-Type", kind)]
    async with through() as (port, other):
        if framing == "length":
            wire = render_head(200, [*type_line, ("Content-Length", str(len(data)))]) + data
        elif framing == "chunked":
            wire = render_head(200, [*type_line, ("Transfer-Encoding", "chunked")])
            wire += chunk(data[:7]) + chunk(data[7:]) + b"0\r\n\r\n"
        else:
            wire = render_head(200, type_line) + data
        answer = await reply(port, other, wire)
        assert (answer.status, answer.clean) == (200, True)
        assert answer.headers["content-type"] == kind
        assert answer.body == data


async def test_header_fields_of_the_answer_pass_but_those_of_one_hop() -> None:
    passed = {
        "ETag": '"abc"',
        "Location": "/elsewhere?x=1",
        "Content-Disposition": 'attachment; filename="a b.bin"',
        "X-Own": "v",
        "Server": "other/1",
        "Cache-Control": "max-age=60",
        "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
    }
    hop = {"Connection": "X-Hop", "X-Hop": "no", "Keep-Alive": "timeout=5"}
    async with through() as (port, other):
        raw = await sent(port, "GET", "/")
        await (await other.arrived()).status(200, b"{}", [*passed.items(), *hop.items()])
        answer = await raw.response()
        for name, value in passed.items():
            found = [told for key, told in answer.header_list if key == name.lower()]
            assert found == [value], name
        assert "x-hop" not in answer.headers
        assert "keep-alive" not in answer.headers


async def test_what_the_service_says_stands_once_and_as_it_says_it() -> None:
    """Where llmq would say the same of an answer of its own."""
    told = {"X-Request-Id": "theirs", "request-id": "theirs", "X-Content-Type-Options": "nosniff"}
    async with through() as (port, other):
        raw = await sent(port, "GET", "/", {"X-Request-Id": "mine"})
        request = await other.arrived()
        assert lines_of(request, "x-request-id") == ["mine"]
        await request.status(200, b"{}", [*told.items(), ("Vary", "Accept")])
        answer = await raw.response()
        for name, value in told.items():
            found = [each for key, each in answer.header_list if key == name.lower()]
            assert found == [value], name
        assert "Accept" in answer.headers["vary"]


async def test_cookies_are_told_one_line_each() -> None:
    """Set-Cookie is the field that must not be joined, RFC 9110 s.5.3."""
    cookies = ["a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT", "b=2; Path=/"]
    async with through() as (port, other):
        raw = await sent(port, "GET", "/")
        await (await other.arrived()).status(200, b"{}", [("Set-Cookie", one) for one in cookies])
        answer = await raw.response()
        assert [told for name, told in answer.header_list if name == "set-cookie"] == cookies


@pytest.mark.parametrize(
    "status",
    [
        *(200, 201, 202, 206, 299, 300, 301, 302, 303, 307, 308, 400, 401, 402, 403, 404, 405),
        *(409, 418, 422, 429, 451, 500, 501, 502, 503, 504, 599),
    ],
)
async def test_status_passes_as_it_is_and_redirects_are_not_followed(status: int) -> None:
    headers = [("Location", "/there"), ("WWW-Authenticate", "Basic"), ("Retry-After", "7")]
    async with through() as (port, other):
        raw = await sent(port, "POST", "/x", {}, b"body")
        request = await other.arrived()
        await request.done.wait()
        await request.status(status, b"told so", headers)
        answer = await raw.response()
        assert (answer.status, answer.body, answer.clean) == (status, b"told so", True)
        for name, value in headers:
            assert answer.headers[name.lower()] == value
        assert len(other.requests) == 1, "asked once"


@pytest.mark.parametrize("status", [204, 304])
async def test_status_without_a_body_passes_without_one(status: int) -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        await raw.send(http("GET", "/x", {"If-None-Match": '"e"'}))
        request = await other.arrived()
        await request.send(render_head(status, [("ETag", '"e"')]))
        answer = await raw.response()
        assert (answer.status, answer.headers["etag"]) == (status, '"e"')
        assert "transfer-encoding" not in answer.headers
        assert "content-length" not in answer.headers
        raw.fin()
        assert await raw.read() == b"", "nothing behind the head"


async def test_interim_answers_do_not_disturb_the_final_one() -> None:
    async with through() as (port, other):
        wire = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        wire += render_head(200, [("Content-Length", "2")]) + b"ok"
        raw = await sent(port, "GET", "/")
        await (await other.arrived()).send(wire)
        answer = await raw.head()
        while answer.status < 200:
            answer = await raw.head()
        answer = await raw.response()
        assert (answer.status, answer.body) == (200, b"ok")


async def test_switch_of_protocols_that_nobody_asked_for_is_a_502() -> None:
    async with through() as (port, other):
        wire = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n?"
        answer = await reply(port, other, wire)
        assert (answer.status, answer.clean) == (502, True)


@pytest.mark.parametrize("status", [200, 404])
async def test_head_is_answered_by_a_head_alone_that_tells_the_length(status: int) -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        await raw.send(http("HEAD", "/file"))
        request = await other.arrived()
        assert (request.method, request.path) == ("HEAD", "/file")
        headers = [("Content-Type", "image/png"), ("Content-Length", "12345"), ("ETag", '"e"')]
        await request.send(render_head(status, headers))
        answer = await raw.response()
        assert (answer.status, answer.headers["content-type"]) == (status, "image/png")
        assert answer.headers["etag"] == '"e"'
        assert answer.headers.get("content-length") == "12345"
        assert answer.clean


async def test_client_of_http_1_0_gets_the_answer_up_to_the_end() -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        await raw.send(b"GET /old HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        request = await begun(other, ("Content-Type", "text/plain"))
        await request.send(chunk(b"some ") + chunk(b"more") + b"0\r\n\r\n")
        answer = await raw.response()
        assert (answer.status, answer.body, answer.clean) == (200, b"some more", True)
        assert "transfer-encoding" not in answer.headers


async def test_slow_client_holds_the_service_back_and_loses_nothing() -> None:
    data = random.Random(5).randbytes(MIB)
    number = 40
    async with through() as (port, other):
        raw = await Raw.open(port, receive_buffer=4096)
        await raw.send(http("GET", "/big"))
        request = await begun(other, ("Content-Type", "application/zip"))
        sent_so_far = 0

        async def pour() -> None:
            nonlocal sent_so_far
            for _ in range(number):
                await request.send(chunk(data))
                sent_so_far += 1
            await end(request)

        pouring = asyncio.ensure_future(pour())
        seen = -1
        while seen != sent_so_far:  # it stands still between two answers of llmq
            seen = sent_so_far
            for _ in range(50):
                refused = await ask(port, "GET", "/", headers={"Host": "evil.example"})
                assert refused.status == 403
        assert seen < number, "nobody holds it back"
        answer = await raw.response()
        await pouring
        assert answer.clean
        assert len(answer.body) == number * MIB
        assert answer.body == data * number


# ---- Another service that fails --------------------------------------------------------------


def is_failure(answer: Answer, status: int) -> bool:
    """Whether it is this error of llmq's own, in words."""
    return answer.status == status and answer.clean and bool(answer.json()["error"])


async def test_service_that_is_down_is_a_502() -> None:
    async with through() as (port, other):
        await other.stop_listening()
        for method in ("GET", "POST", "DELETE"):
            assert is_failure(await ask(port, method, "/v1/x", body=b"some"), 502)
        await other.listen_again()
        answer = asyncio.ensure_future(ask(port, "GET", "/"))
        await (await other.arrived()).status(200, {})
        assert (await answer).status == 200


async def test_service_that_says_nothing_is_a_504_after_its_timeout() -> None:
    async with through(timeout=0.3) as (port, other):
        answer = await ask(port, "POST", "/v1/slow", body=b"some")
        assert is_failure(answer, 504)
        (request,) = other.requests
        assert len(other.requests) == 1, "asked once"
        await asyncio.wait_for(request.left(), 2)


async def test_service_that_says_nothing_after_its_head_ends_in_no_clean_answer() -> None:
    async with through(timeout=0.3) as (port, other):
        raw = await sent(port, "GET", "/")
        await begun(other)
        answer = await raw.response()
        assert answer.status == 504 or not answer.clean


@pytest.mark.parametrize("framing", ["chunked", "length", "until close"])
@pytest.mark.parametrize("minor", [0, 1])
async def test_service_that_falls_silent_in_mid_answer_ends_it_unclean(
    framing: str, minor: int
) -> None:
    async with through(timeout=0.3) as (port, other), await Raw.open(port) as raw:
        await raw.send(b"GET / HTTP/1.%d\r\nHost: 127.0.0.1\r\n\r\n" % minor)
        request = await other.arrived()
        line = {"chunked": [("Transfer-Encoding", "chunked")], "length": [("Content-Length", "9")]}
        part = chunk(b"some") if framing == "chunked" else b"some"
        await request.send(render_head(200, line.get(framing, [])) + part)
        answer = await raw.response()
        assert (answer.status, answer.body, answer.clean) == (200, b"some", False)
        await asyncio.wait_for(request.left(), 2)


async def test_service_that_goes_on_is_not_ended_by_its_timeout() -> None:
    """Between two pieces, not for the whole: what ends meanwhile is one that is silent."""
    async with through(timeout=0.4) as (port, other):
        raw = await sent(port, "GET", "/long")
        request = await begun(other)
        for number in range(8):
            await request.send(chunk(b"%d" % number))
            if not number:
                await raw.head()
            await more(raw, b"%d" % number)
            if number % 3 == 1:
                silent = asyncio.ensure_future(ask(port, "GET", "/silent"))
                await other.arrived()
                for _ in range(20):
                    await request.send(chunk(b"."))
                    await more(raw, b".")
                await asyncio.wait({silent}, timeout=0.25)
                silent.cancel()
        await end(request)
        assert (await raw.response()).clean


@pytest.mark.parametrize("broken", [FakeRequest.close, FakeRequest.reset], ids=["closes", "resets"])
@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_service_that_breaks_off_in_mid_answer_ends_it_unclean(
    framing: str, broken: Any
) -> None:
    async with through() as (port, other):
        raw = await sent(port, "GET", "/")
        request = await other.arrived()
        if framing == "chunked":
            wire = render_head(200, [("Transfer-Encoding", "chunked")]) + chunk(b"some")
        else:
            wire = render_head(200, [("Content-Length", "1000")]) + b"some"
        await request.send(wire)
        if framing == "chunked":
            await raw.head()
            await more(raw, b"some")
        else:  # its length is told on, and so is what came
            await raw.until(b"\r\n\r\nsome")
        broken(request)
        if framing == "length":
            with pytest.raises(EOFError, match="0 of 1 bytes"):  # no more than came, then the end
                await raw.exactly(1)
            return
        answer = await raw.response()
        assert (answer.body, answer.clean) == (b"some", False)


@pytest.mark.parametrize("broken", [FakeRequest.close, FakeRequest.reset], ids=["closes", "resets"])
@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nX-A: b\r\n"])
async def test_service_that_breaks_off_before_its_answer_is_a_502_and_asked_once(
    part: bytes, broken: Any
) -> None:
    async with through() as (port, other):
        raw = await sent(port, "POST", "/", {}, b"once")
        request = await other.arrived()
        await request.done.wait()
        await request.send(part)
        broken(request)
        assert is_failure(await raw.response(), 502)
        assert len(other.requests) == 1


@pytest.mark.parametrize(
    "answer",
    {
        "no http": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "odd status": b"HTTP/1.1 2000 OK\r\n\r\n",
        "both framings": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        "length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
        "folded": b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 0\r\n\r\n",
        "huge head": b"HTTP/1.1 200 OK\r\n" + b"X-A: %s\r\n" % (b"a" * 8000) * 20 + b"\r\n",
        "endless head": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000,
        "bare": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    }.items(),
    ids=lambda answer: answer[0],
)
async def test_service_that_speaks_no_http_is_a_502(answer: tuple[str, bytes]) -> None:
    async with through() as (port, other):
        got = await reply(port, other, answer[1])
        assert is_failure(got, 502)
        ok = render_head(200, [("Content-Length", "2")]) + b"ok"
        assert (await reply(port, other, ok)).body == b"ok", "the next is served"


async def test_header_field_with_a_line_break_gets_through_in_neither_direction() -> None:
    async with through() as (port, other):
        wire = b"HTTP/1.1 200 OK\r\nX-A: b\rX-Evil: c\r\nContent-Length: 0\r\n\r\n"
        assert is_failure(await reply(port, other, wire), 502)
        raw = await Raw.open(port)
        await raw.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: b\rX-Evil: c\r\n\r\n")
        assert (await raw.response()).status == 400


async def test_cookies_of_a_request_put_no_line_break_into_its_head() -> None:
    """Only those of an answer are told a line each: what a client sends ends no head early."""
    async with through() as (port, other):
        raw = await Raw.open(port)
        await raw.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nSet-Cookie: a\r\nSet-Cookie:\r\n\r\n")
        request = await other.arrived()
        assert lines_of(request, "set-cookie") == ["a,"]
        await request.status(200, b"ok")
        assert (await raw.response()).body == b"ok"


async def test_answer_shorter_than_it_says_is_unclean() -> None:
    async with through() as (port, other):
        wire = render_head(200, [("Content-Length", "10")]) + b"some"
        answer = await reply(port, other, wire)
        assert (answer.body, answer.clean) == (b"some", False)


async def test_answer_longer_than_it_says_ends_where_it_says() -> None:
    """What is behind it must not become an answer to the next request."""
    async with through() as (port, other), await Raw.open(port) as raw:
        await raw.send(http("GET", "/one"))
        wire = render_head(200, [("Content-Length", "4")]) + b"some"
        await (await other.arrived()).send(wire + render_head(200, [("Content-Length", "4")]))
        assert (await raw.response()).body == b"some"
        await raw.send(http("GET", "/two"))
        await (await other.arrived()).status(200, b"next")
        assert (await raw.response()).body == b"next"


@pytest.mark.parametrize("junk", [b"xyz\r\n", b"-1\r\n", b"5\r\nab\r\n", b"2\r\nabc\r\n"])
async def test_broken_chunks_end_the_answer_unclean(junk: bytes) -> None:
    async with through() as (port, other):
        raw = await sent(port, "GET", "/")
        request = await begun(other)
        await request.send(chunk(b"some"))
        await raw.head()
        await more(raw, b"some")
        await request.send(junk)
        request.close()
        answer = await raw.response()
        assert answer.body.startswith(b"some")
        assert not answer.clean


@pytest.mark.deadline(5)
async def test_port_that_leads_to_itself_ends_as_a_loop() -> None:
    port = free_port()
    row = {"upstream": f"http://127.0.0.1:{port}"}
    few = {"ports": {str(port): row}, "queue__max_depth": 20}
    async with running("http://127.0.0.1:9", **few) as q:
        answer = await ask(port, "GET", "/")
        assert answer.status == 508
        assert (await ask(q.port, "GET", "/health")).body == b"ok"


# ---- Clients that leave ----------------------------------------------------------------------


@leaving
async def test_client_that_leaves_in_mid_answer_ends_it_at_the_service(leave: Any) -> None:
    async with through() as (port, other):
        raw = await sent(port, "GET", "/")
        request = await begun(other)
        await request.send(chunk(b"some"))
        await raw.head()
        await more(raw, b"some")
        leave(raw)
        await asyncio.wait_for(request.left(), 1)


@leaving
async def test_client_that_leaves_before_the_answer_ends_it_at_the_service(leave: Any) -> None:
    async with through() as (port, other):
        raw = await sent(port, "POST", "/", {}, b"body")
        request = await other.arrived()
        await request.done.wait()
        leave(raw)
        await asyncio.wait_for(request.left(), 1)


@leaving
async def test_client_that_leaves_in_mid_upload_ends_it_at_the_service(leave: Any) -> None:
    async with through() as (port, other):
        raw = await Raw.open(port)
        await raw.send(http("POST", "/", {"Content-Length": str(1 << 40)}) + bytes(1000))
        request = await other.arrived()
        await eventually(lambda: len(request.body) == 1000)
        leave(raw)
        await asyncio.wait_for(request.left(), 1)
        assert not request.done.is_set()


async def test_upload_cut_off_is_never_a_complete_one() -> None:
    async with through() as (port, other):
        raw = await Raw.open(port)
        await raw.send(http("POST", "/", {"Transfer-Encoding": "chunked"}) + chunk(b"some"))
        request = await other.arrived()
        await eventually(lambda: request.body == b"some")
        raw.close()
        await asyncio.wait_for(request.left(), 1)
        assert not request.done.is_set(), "no last chunk was sent for the client"


# ---- Pages from elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
async def test_foreign_page_is_refused_at_another_service(
    method: str, headers: dict[str, str]
) -> None:
    """What the port puts in is a secret of this box: an image in a page must not use it."""
    async with through(headers={"Authorization": TOKEN}) as (port, other):
        raw = await sent(port, method, "/delete-all?really=1", headers)
        asked = asyncio.ensure_future(other.arrived())
        answer = asyncio.ensure_future(raw.response())
        await asyncio.wait({asked, answer}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        assert other.requests == []
        assert (await answer).status == 403
        assert "access-control-allow-origin" not in (await answer).headers


async def test_foreign_page_is_refused_before_its_upload_is_read() -> None:
    async with through() as (port, other), await Raw.open(port) as raw:
        headers = {"Content-Length": str(1 << 40), "Origin": "https://evil.example"}
        await raw.send(http("POST", "/", headers) + b"some")
        assert (await raw.response()).status == 403
        assert other.requests == []


async def test_foreign_page_is_refused_although_origins_are_trusted_elsewhere() -> None:
    trusting = {"server__cors_origins": ["*"]}
    async with through(settings=trusting) as (port, other):
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        answer = await ask(port, "OPTIONS", "/", headers=headers)
        assert answer.status == 403
        assert "access-control-allow-origin" not in answer.headers
        assert other.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
async def test_page_of_this_box_is_served_by_another_service(headers: dict[str, str]) -> None:
    async with through() as (port, other):
        raw = await sent(port, "POST", "/", headers, b"x")
        request = await other.arrived()
        if "Origin" in headers:
            assert request.headers["origin"] == headers["Origin"]
        await request.status(200, {}, [("Access-Control-Allow-Origin", "http://localhost:3000")])
        answer = await raw.response()
        assert answer.status == 200
        allowed = [told for name, told in answer.header_list if "allow-origin" in name]
        assert allowed == ["http://localhost:3000"], "it is the service that says so"


@pytest.mark.parametrize("host", BAD_HOSTS)
async def test_wrong_host_is_refused_at_another_service(host: str) -> None:
    async with through(headers={"Authorization": TOKEN}) as (port, other):
        answer = await ask(port, "GET", "/", headers={"Host": host})
        assert answer.status == 403
        assert other.requests == []
        raw = await Raw.open(port)
        await raw.send(f"GET http://{host}/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert (await raw.response()).status == 403
        raw = await Raw.open(port)
        await raw.send(b"GET / HTTP/1.1\r\n\r\n")
        assert (await raw.response()).status == 400
        assert other.requests == []


async def test_blocked_client_is_refused_at_another_service() -> None:
    blocked = {"clients": {"bob": {"blocked": True}}}
    async with through(settings=blocked, client="bob") as (port, other):
        assert (await ask(port, "GET", "/")).status == 403
        assert other.requests == []


# ---- Secrets ---------------------------------------------------------------------------------


async def test_secret_of_a_port_is_shown_nowhere(tmp_path: Path) -> None:
    port = free_port()
    secret = "tok-0123456789-never-shown"
    async with Other() as other:
        row = {"upstream": other.url, "headers": {"Authorization": "Bearer ${SECRET}"}}
        file = write(tmp_path, ports={str(port): row}, log={"level": "debug"})
        flags = ("--port", "0", "--config", file, "--backend", "http://127.0.0.1:9")
        async with Process(*flags, env={"SECRET": secret}) as p:
            answers = [asyncio.ensure_future(ask(port, "GET", "/a"))]
            request = await other.arrived()
            assert request.headers["authorization"] == f"Bearer {secret}"
            await request.status(200, {})
            await other.stop_listening()
            answers += [asyncio.ensure_future(ask(port, "GET", "/b"))]
            for path in ("/llmq/status?all=1", "/metrics"):
                answers.append(asyncio.ensure_future(ask(p.port, "GET", path)))
            for answer in answers:
                found = await answer
                assert secret.encode() not in found.body + found.raw_head
            assert await p.ended() == 0
            assert secret not in p.output
    for more_flags in ((), ("--json",)):
        shown = run_llmq("config", "show", "--config", file, *more_flags, env={"SECRET": secret})
        assert shown.returncode == 0, shown.stderr
        assert secret not in shown.stdout + shown.stderr
        assert str(port) in shown.stdout


# ---- Settings --------------------------------------------------------------------------------


def write(folder: Path, name: str = "llmq.json", **tables: Any) -> str:
    """Write the configuration as JSON, which every Python can read; return its name."""
    path = folder / name
    path.write_text(json.dumps(tables))
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("0", {}, "port"),
        ("65536", {}, "port"),
        ("99999", {}, "port"),
        ("-1", {}, ""),
        ("http", {}, "port"),
        ("011436", {}, "port"),
        ("11436.5", {}, "port"),
        ("11436", {"bind": "0.0.0.0"}, "public = true"),
        ("11436", {"bind": "::"}, "public = true"),
        ("11436", {"bind": "192.0.2.7"}, "public = true"),
        ("11436", {"bind": "2001:db8::1"}, "public = true"),
        ("11436", {"bind": "box.lan"}, "address"),
        ("11436", {"bind": ""}, "address"),
        ("11436", {"rights": ["infer", "controll"]}, "did you mean control"),
        ("11436", {"rights": ["admin"]}, "infer"),
        ("11436", {"rights": "everything"}, "infer"),
        ("11436", {"class": "urgent"}, "high, normal, low"),
        ("11436", {"max_class": "urgent"}, "high, normal, low"),
        ("11436", {"max_concurrent": -1}, ""),
        ("11436", {"max_concurrent": "many"}, "whole number"),
        ("11436", {"inject_as": "x"}, "known:"),
        ("11436", {"clients": "x"}, "did you mean client"),
        ("11436", {"upstream": "ftp://x"}, "http"),
        ("11436", {"upstream": "http://"}, "http"),
        ("11436", {"upstream": "http://u:p@127.0.0.1:1"}, ""),
        ("11436", {"upstream": "http://127.0.0.1:1/x?y=1"}, "query"),
        ("11436", {"headers": "Authorization: x"}, "table"),
        ("11436", {"headers": {"Connection": "x"}}, "Connection"),
        ("11436", {"headers": {"Host": "x"}}, "Host"),
        ("11436", {"headers": {"Content-Length": "3"}}, "Content-Length"),
        ("11436", {"headers": {"X A": "x"}}, "X A"),
        ("11436", {"headers": {"X-A": "x\r\nX-B: y"}}, "X-A"),
        ("11436", {"headers": {"X-A": 7}}, ""),
        ("11436", {"timeout": "soon"}, ""),
        ("11436", "http://127.0.0.1:1", "table"),
    ],
    ids=str,
)
def test_row_of_a_port_that_cannot_be_meant_is_refused_with_its_place(
    name: str, row: Any, words: str
) -> None:
    with pytest.raises(llmq.ConfigError) as found:
        build_settings({"ports": {name: row}})
    message = str(found.value)
    assert f"ports.{name}" in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "row",
    [
        {"bind": "localhost"},
        {"bind": "127.0.0.2"},
        {"bind": "::1"},
        {"bind": "0.0.0.0", "public": True},
        {"bind": "192.0.2.7", "public": True},
        {"upstream": "https://127.0.0.1:1/deep/path"},
        {"upstream": "", "headers": {}},
    ],
    ids=str,
)
def test_row_of_a_port_that_can_be_meant_is_taken(row: Any) -> None:
    (found,) = build_settings({"ports": {"11436": row}}).ports.values()
    assert found.bind == row.get("bind", "127.0.0.1")


def test_key_and_port_of_one_name_are_refused_with_both_places() -> None:
    """What holds for the one would hold for the other, or not, as they come."""
    ports = {"11436": {"client": "alice", "max_class": "low"}}
    with pytest.raises(llmq.ConfigError, match=r"keys\.alice.*ports\.11436"):
        build_settings({"keys": KEYS, "ports": ports})


def test_mistake_in_a_port_stops_the_start(tmp_path: Path) -> None:
    file = write(tmp_path, ports={"11436": {"bind": "0.0.0.0"}})
    done = run_llmq("--port", "0", "--demo", "--config", file)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert file in line
    assert "ports.11436.bind" in line
    assert "public = true" in line


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_secret_that_is_not_there_stops_the_start(tmp_path: Path, value: str | None) -> None:
    row = {"upstream": "http://127.0.0.1:9", "headers": {"Authorization": "Bearer ${NOT_THERE}"}}
    file = write(tmp_path, ports={"11436": row})
    env = {} if value is None else {"NOT_THERE": value}
    done = run_llmq("--port", "0", "--demo", "--config", file, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "NOT_THERE" in line
    assert "11436" in line


def taken(port: int) -> socket.socket:
    """Somebody else who listens there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", port))
    held.listen()
    return held


def test_port_that_is_taken_stops_the_start_and_is_named(tmp_path: Path) -> None:
    port, free = free_port(), free_port()
    file = write(tmp_path, ports={str(free): {}, str(port): {"client": "x"}})
    with taken(port):
        done = run_llmq("--port", "0", "--demo", "--config", file)
    assert done.returncode == 78
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "use" in done.stderr
    assert is_refused(free)


def test_port_that_is_llmqs_own_stops_the_start_and_is_named(tmp_path: Path) -> None:
    port = free_port()
    file = write(tmp_path, ports={str(port): {}})
    done = run_llmq("--port", str(port), "--demo", "--config", file)
    assert done.returncode in (2, 78)
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


async def test_ports_that_cannot_open_leave_nothing_open() -> None:
    port, free = free_port(), free_port()
    values = {"server.port": 0, "server.state": "", "backends": ["http://127.0.0.1:9"]}
    with taken(port):
        service = llmq.Service(build_settings({**values, "ports": {str(free): {}, str(port): {}}}))
        with pytest.raises(llmq.StartError, match=f"127.0.0.1:{port}"):
            await service.start()
        await service.stop()
    assert is_refused(free)
    assert is_refused(service.port)


# ---- Reload ----------------------------------------------------------------------------------


async def test_port_appears_on_reload() -> None:
    port = free_port()
    async with Runner() as fake, with_keys(fake) as q:
        assert is_refused(port)
        await reread(q, ports={str(port): {"client": "late", "class": "low"}})
        await listens(port)
        answer = await CHAT.ask(port, "hello")
        assert CHAT.text(answer) == "hello"
        assert answer.headers["x-llmq-class"] == "low"
        assert (await snapshot(q))["recent"][0]["client"] == "late"


async def test_port_disappears_on_reload_and_what_runs_there_ends_in_peace() -> None:
    port, stays = free_port(), free_port()
    row = {str(stays): {"client": "stays"}}
    more_rows = {**row, str(port): {"client": "leaves", "max_concurrent": 1}}
    async with Runner(auto=False) as fake, with_keys(fake, ports=more_rows, queue__slots=2) as q:
        fake.contexts["m"] = DEFAULT_CONTEXT  # loaded: a burst starts at once
        await up(q)
        raw = await CHAT.begin(port, "a b c", stream=True)
        request = await fake.arrived()
        waits = await CHAT.begin(port, "waits")
        idle = await sent(port, "GET", "/health")
        assert (await idle.response()).body == b"ok"
        await reread(q, ports=row)
        await eventually(lambda: is_refused(port), 2)
        assert await idle.closed() in ("eof", "reset"), "an idle connection is closed"
        beside = await CHAT.begin(stays, "beside")
        await speak(await fake.arrived())
        assert CHAT.text(await beside.response()) == "beside"
        await speak(request)
        assert CHAT.text(await raw.response()) == "a b c"
        await speak(await fake.arrived())
        assert CHAT.text(await waits.response()) == "waits"
        clients = [one["client"] for one in (await snapshot(q))["recent"]]
        assert clients.count("leaves") == 2


async def test_pass_through_port_disappears_on_reload_and_its_stream_ends_in_peace() -> None:
    passing = through()
    async with passing as (port, other):
        raw = await sent(port, "GET", "/")
        request = await begun(other)
        await request.send(chunk(b"some"))
        await raw.head()
        await more(raw, b"some")
        await reread(passing.q, ports={})
        await eventually(lambda: is_refused(port), 2)
        await request.send(chunk(b"more"))
        await more(raw, b"more")
        await end(request)
        assert (await raw.response()).clean
        ending = asyncio.wait_for(raw.closed(), 3)
        assert await ending == "eof", "who was there could go on to use it"


@pytest.mark.deadline(5)
async def test_port_that_changes_its_row_is_another_for_who_comes_next() -> None:
    port = free_port()
    ports = {str(port): {"client": "old", "max_class": "low"}}
    async with Runner(auto=False) as fake, with_keys(fake, ports=ports, queue__slots=2) as q:
        fake.contexts["m"] = DEFAULT_CONTEXT  # loaded: a burst starts at once
        await up(q)
        raw = await CHAT.begin(port, "begun before")
        request = await fake.arrived()
        await reread(q, ports={str(port): {"client": "new", "class": "high"}})
        fake.auto = True
        await moved(q)
        await listens(port)
        answer = await CHAT.ask(port, "after")
        assert CHAT.text(answer) == "after"
        assert answer.headers["x-llmq-class"] == "high"
        await speak(request)
        answer = await raw.response()
        assert CHAT.text(answer) == "begun before"
        recent = {one["client"]: one["class"] for one in (await snapshot(q))["recent"]}
        assert recent == {"new": "high", "old": "low"}


@pytest.mark.deadline(5)
async def test_port_that_changes_its_upstream_leads_elsewhere_for_who_comes_next() -> None:
    passing = through(headers={"Authorization": TOKEN})
    async with passing as (port, other), Other() as second:
        raw = await sent(port, "GET", "/before")
        request = await begun(other)
        row = {"upstream": second.url, "headers": {"Authorization": "Bearer rotated"}}
        await reread(passing.q, ports={str(port): row})
        await moved(passing.q)
        await listens(port)
        answer = asyncio.ensure_future(ask(port, "GET", "/after"))
        after = await second.arrived()
        assert (after.path, after.headers["authorization"]) == ("/after", "Bearer rotated")
        await after.status(200, b"second")
        assert (await answer).body == b"second"
        await request.send(chunk(b"first"))
        await end(request)
        assert (await raw.response()).body == b"first"


async def test_port_that_did_not_change_keeps_its_connections_on_reload() -> None:
    port, late = free_port(), free_port()
    row = {str(port): {"client": "same"}}
    async with Runner() as fake, with_keys(fake, ports=row) as q, await Raw.open(port) as raw:
        await raw.send(CHAT.request("one"))
        assert CHAT.text(await raw.response()) == "one"
        await reread(q, ports={**row, str(late): {}})
        await listens(late)
        await raw.send(CHAT.request("two"))
        assert CHAT.text(await raw.response()) == "two"


async def test_port_comes_back_and_reloads_on_each_others_heels_leave_one_of_each() -> None:
    port, other = free_port(), free_port()
    one, both = {str(port): {}}, {str(port): {}, str(other): {}}
    async with Runner() as fake, with_keys(fake, ports=both) as q:
        for ports in (one, both, {}, both, one, {}, both):
            await reread(q, ports=ports)
        await moved(q)
        for each in (port, other):
            await listens(each)
            assert await told(each, "hello") == "hello"
        for _ in range(3):
            await reread(q, ports={})
            await eventually(lambda: is_refused(port), 2)
            await reread(q, ports=one)
            await listens(port)
            assert await told(port, "again") == "again"
    assert is_refused(port)
    assert is_refused(other)


async def test_port_that_is_taken_on_reload_is_one_line_and_the_rest_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, good = free_port(), free_port()
    async with Runner() as fake, with_keys(fake) as q:
        with taken(port):
            caplog.set_level(logging.INFO, "llmq")
            await reread(q, ports={str(port): {}, str(good): {"client": "good"}})
            await listens(good)
            await moved(q)
            lines = [one for one in caplog.records if str(port) in one.getMessage()]
            assert len(lines) == 1
            assert lines[0].levelno >= logging.WARNING
            assert not lines[0].exc_info
            assert await told(good, "hello") == "hello"
            assert (await ask(q.port, "GET", "/health")).body == b"ok"
        await reread(q, ports={str(port): {}, str(good): {"client": "good"}})
        await listens(port)
        assert await told(port, "now") == "now"


async def test_mistake_in_a_port_on_reload_changes_nothing(tmp_path: Path) -> None:
    port, late = free_port(), free_port()
    async with Runner() as fake:
        backends = {"one": {"url": fake.url}}
        file = write(tmp_path, ports={str(port): {"client": "a"}}, backends=backends)
        async with Process("--port", "0", "--config", file) as p:
            assert await told(port, "hello") == "hello"
            ports = {str(late): {"client": "b"}, str(port): {"bind": "0.0.0.0"}}
            write(tmp_path, ports=ports, backends=backends)
            p.signal(signal.SIGHUP)
            await p.line("public = true")
            assert await told(port, "still") == "still"
            assert is_refused(late)
            write(tmp_path, ports={str(late): {"client": "b"}}, backends=backends)
            p.signal(signal.SIGHUP)
            await eventually(lambda: is_refused(port), 2)
            await listens(late)
            assert await told(late, "hello") == "hello"
            assert await p.ended() == 0


async def test_first_key_does_not_close_the_ports() -> None:
    port = free_port()
    async with Runner() as fake, running(fake.url, ports={str(port): {"client": "a"}}) as q:
        assert await told(q.port, "open") == "open"
        await reread(q, keys=KEYS)
        assert (await CHAT.ask(q.port, "closed")).status == 401
        assert await told(port, "hello") == "hello"


# ---- The end ---------------------------------------------------------------------------------


async def test_sigterm_lets_what_runs_on_the_ports_finish(tmp_path: Path) -> None:
    mine, service = free_port(), free_port()
    async with Runner(auto=False) as fake, Other() as other:
        ports = {str(mine): {"client": "a"}, str(service): {"upstream": other.url}}
        file = write(tmp_path, ports=ports, backends={"one": {"url": fake.url}})
        async with Process("--port", "0", "--config", file, "--drain-timeout", "8") as p:
            asked = await CHAT.begin(mine, "a b c", stream=True)
            request = await fake.arrived()
            passed = await sent(service, "GET", "/events")
            stream = await begun(other, ("Content-Type", "text/event-stream"))
            await stream.send(chunk(b"data: 1\n\n"))
            await passed.head()
            await more(passed, b"data: 1\n\n")
            idle = await sent(mine, "GET", "/health")
            assert (await idle.response()).body == b"ok"
            p.signal(signal.SIGTERM)
            await idle.closed()  # it is stopping
            await stream.send(chunk(b"data: 2\n\n"))
            await more(passed, b"data: 2\n\n")
            await end(stream)
            assert (await passed.response()).clean
            await speak(request)
            assert CHAT.text(await asked.response()) == "a b c"
            assert await p.ended(0) == 0
    assert is_refused(mine)
    assert is_refused(service)


async def test_stop_waits_for_a_pass_through_as_long_as_for_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where nothing else runs, and beyond what connections are given to hang up."""
    monkeypatch.setattr(llmq, "LINGER_SECONDS", 0.05)
    passing = through(settings={"server__drain_timeout": 8})
    async with passing as (port, other):
        raw = await sent(port, "GET", "/events")
        request = await begun(other)
        await request.send(chunk(b"."))
        await raw.head()
        await more(raw, b".")
        idle = await sent(port, "GET", "/", {"Host": "evil.example"})
        watch = await Raw.open(passing.q.port)
        stopping = asyncio.ensure_future(passing.q.service.stop())
        await watch.closed()
        await idle.closed()
        await asyncio.wait({stopping}, timeout=0.5)  # ten times longer
        assert not stopping.done(), "it did not wait for what runs on a port"
        await request.send(chunk(b"!"))
        await more(raw, b"!")
        await end(request)
        assert (await raw.response()).clean
        await stopping


async def test_stop_cuts_a_pass_through_when_its_time_is_over() -> None:
    passing = through(settings={"server__drain_timeout": 0.3})
    async with passing as (port, other):
        raw = await sent(port, "GET", "/events")
        request = await begun(other)
        await request.send(chunk(b"."))
        await raw.head()
        await more(raw, b".")
        await passing.q.service.stop()
        assert not (await raw.response()).clean
        await asyncio.wait_for(request.left(), 1)


async def test_what_waits_on_a_port_is_told_that_it_stops() -> None:
    port = free_port()
    ports = {str(port): {"client": "a"}}
    async with Runner(auto=False) as fake:
        async with with_keys(fake, ports=ports, server__drain_timeout=8) as q:
            await up(q)
            runs = await CHAT.begin(port, "runs")
            request = await fake.arrived()
            waits = await CHAT.begin(port, "waits")
            await eventually(lambda: len(q.gateway.scheduler.waiting) == 1)
            stopping = asyncio.ensure_future(q.service.stop())
            answer = await waits.response()
            assert (answer.status, answer.code) == (503, "shutting_down")
            await speak(request)
            assert CHAT.text(await runs.response()) == "runs"
            await stopping
        assert is_refused(port)


async def test_stop_in_the_middle_of_a_reload_leaves_no_port_open() -> None:
    port = free_port()
    async with running("http://127.0.0.1:9", ports={}) as q:
        await reread(q, ports={str(port): {}})
        await q.service.stop()
    assert is_refused(port)


# ---- What it replaces ------------------------------------------------------------------------


async def test_one_file_replaces_the_listeners_of_ollama_queue_proxy(tmp_path: Path) -> None:
    """Its auth.keys and client_injection.listeners:

    keys:
      - {key: ..., client_id: memsearch-watch, max_priority: low, max_concurrent: 1}
      - {key: ..., client_id: open-webui, max_priority: high}
      - {key: ..., client_id: agent}
      - {key: ..., client_id: ops, management: true}
    client_injection.listeners:
      - {listen_port: 11436, inject_as: memsearch-watch}
      - {listen_port: 11437, inject_as: open-webui}

    Who has a port needs no key here.
    """
    watch, webui = free_port(), free_port()
    low = {"class": "low", "max_class": "low", "max_concurrent": 1}
    ops = {"Authorization": "Bearer key-of-ops-0123456789"}
    async with Runner(models=["nomic-embed-text", "qwen3:8b"], auto=False) as fake:
        file = write(
            tmp_path,
            server={"port": 0},
            backends={"ollama": {"url": fake.url, "kind": "ollama"}},
            keys={
                "agent": {"key": "${AGENT_KEY}", "max_class": "normal"},
                "ops": {"key": "${OPS_KEY}", "rights": ["infer", "control"]},
            },
            ports={
                str(watch): {"client": "memsearch-watch", **low},
                str(webui): {"client": "open-webui", "max_class": "high"},
            },
        )
        env = {
            "AGENT_KEY": "key-of-agent-0123456789",
            "OPS_KEY": "key-of-ops-0123456789",
        }
        async with Process("--config", file, "--slots", "2", env=env) as p:
            while (await ask(watch, "GET", "/api/tags")).json()["models"] == []:
                pass
            assert (await EMBED.ask(p.port, "no key")).status == 401
            asks = {"model": "nomic-embed-text", "headers": {"X-Queue-Priority": "high"}}
            jobs = [await EMBED.begin(watch, f"job {number}", **asks) for number in range(3)]
            running_job = await fake.arrived()

            async def rows() -> list[tuple[str, str, str]]:
                found = (await ask(p.port, "GET", "/llmq/status", headers=ops)).json()["requests"]
                return [(one["client"], one["class"], one["state"]) for one in found]

            name = "memsearch-watch"
            expected = [(name, "low", "running"), *[(name, "low", "waiting")] * 2]
            while await rows() != expected:
                pass
            talk = await NATIVE_CHAT.begin(
                webui, "hello", model="qwen3:8b", headers={"X-Queue-Priority": "high"}
            )
            chat = await fake.arrived()
            assert chat.path == "/api/chat", "the cap of one holds up nobody else"
            assert ("open-webui", "high", "running") in await rows()
            await speak(chat)
            assert NATIVE_CHAT.text(await talk.response()) == "hello"
            assert not fake.has_arrived(), "its own next job waits for the cap"
            await speak(running_job)
            for _ in jobs[1:]:
                await speak(await fake.arrived())
            answers = [await raw.response() for raw in jobs]
            assert [EMBED.text(one) for one in answers] == ["job 0", "job 1", "job 2"]
            assert {one.headers["x-llmq-class"] for one in answers} == {"low"}
            for port in (watch, webui):
                for path in ("/llmq/status", "/metrics"):
                    assert (await ask(port, "GET", path)).status == 403
                assert (await ask(port, "POST", "/api/pull", json={"model": "x"})).status == 403
            assert all("authorization" not in request.headers for request in fake.requests)
            assert fake.managed == []
            assert await p.ended() == 0
            assert "key-of-" not in p.output


async def test_one_file_replaces_the_services_of_ollama_auth_sidecar(tmp_path: Path) -> None:
    """Its services:

    - {name: librechat, listen: 11436, upstream: http://gated:11435, timeout: 300s,
       headers: {Authorization: "Bearer ${LIBRECHAT_KEY}"}}
    - {name: reranker, listen: 11437, upstream: http://reranker:8080/api, timeout: 1s,
       headers: {X-API-Key: "${RERANK_KEY}", X-Tenant-ID: "42"}}
    """
    first, second = free_port(), free_port()
    async with Other() as gated, Other() as reranker:
        file = write(
            tmp_path,
            ports={
                str(first): {
                    "client": "librechat",
                    "upstream": gated.url,
                    "timeout": "300s",
                    "headers": {
                        "Authorization": "Bearer ${LIBRECHAT_KEY}",
                        "X-Client-Name": "librechat",
                    },
                },
                str(second): {
                    "client": "reranker",
                    "upstream": reranker.url + "/api",
                    "timeout": "1s",
                    "headers": {
                        "X-API-Key": "${RERANK_KEY}",
                        "X-Tenant-ID": "42",
                        "X-Client-Name": "reranker",
                    },
                },
            },
        )
        env = {"LIBRECHAT_KEY": "a/b&c-0123456789=", "RERANK_KEY": "rerank-$ecret-0123456789"}
        flags = ("--port", "0", "--backend", "http://127.0.0.1:9", "--config", file)
        for name in env:
            one_less = {key: value for key, value in env.items() if key != name}
            done = run_llmq(*flags, env=one_less)
            assert (done.returncode, name in done.stderr) == (2, True)
        async with Process(*flags, env=env) as p:
            mallory = {"Authorization": "Bearer own", "X-Client-Name": "mallory", **JSON}
            body = json.dumps(NATIVE_CHAT.body("a b c d e", stream=True)).encode()
            raw = await sent(first, "POST", "/api/chat", mallory, body)
            request = await gated.arrived()
            await request.done.wait()
            injected = [lines_of(request, name) for name in ("authorization", "x-client-name")]
            assert injected == [["Bearer a/b&c-0123456789="], ["librechat"]]
            assert request.body == body
            lines = [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")]
            await request.send(render_head(200, lines))
            for number, piece in enumerate(NATIVE_CHAT.pieces("m", "a b c d e")):
                await request.send(chunk(piece))
                if not number:
                    assert (await raw.head()).headers["content-type"] == "application/x-ndjson"
                await more(raw, piece)
            await end(request)
            assert NATIVE_CHAT.text(await raw.response()) == "a b c d e"
            upload = bytes(2 * MIB)  # nginx took one
            asking = asyncio.ensure_future(ask(second, "POST", "/rerank?k=3", body=upload))
            request = await reranker.arrived()
            await request.done.wait()
            assert (request.path, len(request.body)) == ("/api/rerank?k=3", len(upload))
            told = [request.headers[name] for name in ("x-api-key", "x-tenant-id")]
            assert told == [env["RERANK_KEY"], "42"]
            await request.status(200, {"results": []})
            assert (await asking).json() == {"results": []}
            assert (await ask(second, "GET", "/slow")).status == 504
            await reranker.stop_listening()
            assert (await ask(second, "GET", "/down")).status == 502
            assert await p.ended() == 0
            for secret in env.values():
                assert secret not in p.output
