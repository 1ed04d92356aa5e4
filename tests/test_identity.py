"""Who asks, over sockets: people and programs, classes by rule, and who is blocked."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import pytest

import llmq
from tests.fakes import FakeBackend, Raw, ask, chat, eventually, http, need, running

NOBODY = "http://127.0.0.1:9"  # where no backend listens
CHAT = "/v1/chat/completions"
OTHER_UID = 65534
PROXIES = ["127.0.0.1", "::1"]
FOREIGN = {"Origin": "https://page.example"}


def as_root() -> None:
    need(hasattr(socket, "AF_NETLINK"), "the user at the other end is known on Linux only")
    need(os.geteuid() == 0, "only root can connect as another user")


async def connect_as_other(port: int, host: str) -> Raw:
    """A connection whose socket another user of this box has made."""
    os.seteuid(OTHER_UID)
    try:
        raw = Raw(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    finally:
        os.seteuid(0)
    raw.socket.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw.socket, (host, port))
    return raw


async def last_client(q: running) -> Any:
    return (await q.status())["recent"][0]["client"]


async def post(raw: Raw, headers: dict[str, str] | None = None) -> Any:
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
    await raw.send(
        http("POST", CHAT, {"Content-Type": "application/json", **(headers or {})}, body)
    )
    return await raw.response()


# ---- Names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"X-User-ID": "alice", "X-OpenWebUI-User-Id": "7"}, "user:alice"),
        ({"X-OpenWebUI-User-Id": "7", "User-Agent": "aiohttp/3"}, "user:7"),
        ({"X-User-ID": "alice", "Origin": "http://localhost:3000"}, "user:alice"),
        ({"X-User-ID": "alice", **FOREIGN}, "app:https://page.example"),
        ({"X-OpenWebUI-User-Id": "7", **FOREIGN}, "app:https://page.example"),
        (FOREIGN, "app:https://page.example"),
        ({"User-Agent": "curl/8"}, "ip:10.0.0.9"),
        ({"Origin": "http://localhost:3000", "User-Agent": "curl/8"}, "ip:10.0.0.9"),
    ],
)
async def test_a_person_goes_before_the_program_and_a_foreign_page_is_neither(
    headers: dict[str, str], name: str
) -> None:
    async with FakeBackend() as fake, running(fake.url, server__trusted_proxies=PROXIES) as q:
        headers = {"X-Forwarded-For": "8.8.8.8, 10.0.0.9", **headers}
        assert (await q.chat("hi", headers)).status == 200
        assert await last_client(q) == name


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("10.0.0.9", "ip:10.0.0.9"),
        ("1.2.3.4,fd00:0::2", "ip:fd00::2"),
        ("::ffff:10.0.0.9", "ip:10.0.0.9"),
        ("127.0.0.1", "app:curl"),  # asked on this box, through its proxy
        ("10.0.0.9, nonsense", "app:curl"),
        ("10.0.0.9:1234", "app:curl"),
        ("10.0.0.9,", "app:curl"),
        ("", "app:curl"),
    ],
)
async def test_trusted_proxies_tell_the_address_in_the_last_entry(told: str, name: str) -> None:
    headers = {"X-Forwarded-For": told, "User-Agent": "curl/8"}
    async with FakeBackend() as fake:
        async with running(fake.url, server__trusted_proxies=PROXIES) as q:
            assert (await q.chat("hi", headers)).status == 200
            assert await last_client(q) == name
        async with running(fake.url, server__trusted_proxies=["10.0.0.2"]) as q:
            assert (await q.chat("hi", headers)).status == 200
            assert await last_client(q) == "app:curl"  # anybody can write that field


async def test_who_comes_through_a_proxy_from_elsewhere_is_not_on_this_box() -> None:
    async with running(NOBODY, server__trusted_proxies=PROXIES) as q:
        for told, status in (("10.0.0.9", 403), ("127.0.0.1", 404)):
            headers = {"X-Forwarded-For": told}
            answer = await ask(
                q.port, "DELETE", "/api/delete", json={"model": "x"}, headers=headers
            )
            assert (answer.status == 403) is (status == 403), answer


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_another_unix_user_is_known_by_name(host: str) -> None:
    as_root()
    import pwd

    async with FakeBackend() as fake, running(fake.url) as q:
        async with await connect_as_other(q.port, host) as raw:
            for headers, name in (
                ({}, "unix:" + pwd.getpwuid(OTHER_UID).pw_name),
                ({"User-Agent": "curl/8"}, "unix:" + pwd.getpwuid(OTHER_UID).pw_name),
                ({"X-User-ID": "alice"}, "user:alice"),
                (FOREIGN, "app:https://page.example"),
            ):
                assert (await post(raw, headers)).status == 200
                assert await last_client(q) == name
        assert (await q.chat("hi", {"User-Agent": "curl/8"})).status == 200
        assert await last_client(q) == "app:curl"


async def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "peer_uid", lambda *_: 4_000_000)
    async with FakeBackend() as fake, running(fake.url) as q:
        assert (await q.chat("hi", {"User-Agent": "curl/8"})).status == 200
        assert await last_client(q) == "unix:4000000"


async def test_the_user_of_a_proxy_is_not_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "peer_uid", lambda *_: 4_000_000)
    async with FakeBackend() as fake:
        async with running(fake.url, server__trusted_proxies=PROXIES) as q:
            headers = {"X-Forwarded-For": "127.0.0.1", "User-Agent": "curl/8"}
            assert (await q.chat("hi", headers)).status == 200
            assert await last_client(q) == "app:curl"


async def test_the_kernel_is_asked_once_for_a_connection_and_only_where_it_matters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def uid(*ends: Any) -> int:
        asked.append(ends)
        return os.geteuid()

    monkeypatch.setattr(llmq, "peer_uid", uid)
    async with FakeBackend() as fake, running(fake.url) as q:
        async with await Raw.open(q.port) as raw:
            assert (await post(raw, {"X-User-ID": "alice"})).status == 200
            assert (await post(raw, FOREIGN)).status == 200
            assert asked == []
            for _ in range(3):
                assert (await post(raw)).status == 200
            assert len(asked) == 1


@pytest.mark.parametrize(
    "error", [OSError(2, "no such socket"), AttributeError("AF_NETLINK"), TypeError("it left")]
)
async def test_where_the_kernel_does_not_tell_the_program_is_the_client(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uid(*_: Any) -> int:
        raise error

    monkeypatch.setattr(llmq, "peer_uid", uid)
    async with FakeBackend() as fake, running(fake.url) as q:
        assert (await q.chat("hi", {"User-Agent": "curl/8"})).status == 200
        assert await last_client(q) == "app:curl"


def test_the_kernel_tells_the_user_of_a_socket_also_of_ipv4_mapped_into_ipv6() -> None:
    need(hasattr(socket, "AF_NETLINK"), "Linux only")
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, peer = server.accept()
            assert peer[0] == "::ffff:127.0.0.1"
            assert llmq.peer_uid(peer, accepted.getsockname()) == os.getuid()
            client.close()  # whose it was is not known any more, and nobody else is named
            with pytest.raises(OSError, match=r".*"):
                llmq.peer_uid(peer, accepted.getsockname())
            accepted.close()


def test_a_socket_of_the_question_is_closed() -> None:
    need(os.path.isdir("/proc/self/fd"), "Linux only")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError, match=r".*"):
            llmq.peer_uid(("127.0.0.1", 1), ("127.0.0.1", 1))
    assert len(os.listdir("/proc/self/fd")) == before


# ---- Class by rule ---------------------------------------------------------------------------


async def test_class_of_a_request_is_asked_for_or_ruled_or_its_clients_or_its_models() -> None:
    settings = {
        "rules": [
            {"header": "X-Task: title*", "class": "low"},
            {"client": "user:boss", "class": "high"},
        ],
        "clients": {"user:boss": {"class": "low"}, "user:bob": {"class": "high"}},
        "models": {"slow*": {"class": "low"}},
    }
    rows: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({"X-User-ID": "boss"}, {}, "high"),  # the rule goes before the client's class
        ({"X-User-ID": "boss", "X-Task": "title gen"}, {}, "low"),  # the first rule counts
        ({"X-User-ID": "boss"}, {"priority": "normal"}, "normal"),
        ({"X-User-ID": "boss", "X-Queue-Priority": "low"}, {}, "low"),
        ({"X-User-ID": "boss", "X-Queue-Priority": "urgent"}, {}, "high"),
        ({"X-User-ID": "boss"}, {"service_tier": "flex"}, "low"),
        ({"X-User-ID": "bob"}, {"model": "slow:1b"}, "high"),  # the client before the model
        ({"X-User-ID": "eve"}, {"model": "slow:1b"}, "low"),
        ({"X-User-ID": "eve"}, {}, "normal"),
    ]
    async with FakeBackend(models=["m", "slow:1b"]) as fake, running(fake.url, **settings) as q:
        for headers, more, word in rows:
            assert (await q.chat("hi", headers, **more)).status == 200
            assert (await q.status())["recent"][0]["class"] == word, (headers, more)


@pytest.mark.parametrize("path", [CHAT, CHAT.removeprefix("/v1")])
async def test_rule_for_a_route_holds_for_its_shorter_spelling(path: str) -> None:
    rules = [{"route": "/v1/chat/*", "class": "low"}]
    async with FakeBackend() as fake, running(fake.url, rules=rules) as q:
        assert (await ask(q.port, "POST", path, json=chat("hi"))).status == 200
        assert (await q.status())["recent"][0]["class"] == "low"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/api/embed", "/api/embeddings"])
async def test_rule_for_a_route_holds_for_all_its_paths(path: str) -> None:
    """The README's own: `/embeddings` is the same as under /v1."""
    settings = {"rules": [{"route": "/*/embed*", "class": "low"}]}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        body = {"model": "m", "input": "x", "prompt": "x"}
        await ask(q.port, "POST", path, json=body)
        assert (await q.status())["recent"][0]["class"] == "low"


async def test_no_rule_lifts_a_foreign_page_above_normal() -> None:
    settings = {"rules": [{"class": "high"}]}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        assert (await q.chat("hi", FOREIGN)).status == 200
        assert (await q.status())["recent"][0]["class"] == "normal"


async def test_the_reason_of_who_waits_names_the_rule_until_the_class_is_changed() -> None:
    settings = {"rules": [{"route": "/v2/*", "class": "high"}, {"model": "M", "class": "low"}]}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        waiting = asyncio.ensure_future(q.chat("hi"))
        await eventually(lambda: q.gateway.scheduler.waiting)
        shown = (await q.status())["requests"][0]
        assert (shown["class"], shown["rule"]) == ("low", "class low by rule 2")
        assert shown["reason"] == "paused; class low by rule 2"
        await ask(q.port, "POST", f"/llmq/requests/{shown['id']}", json={"priority": "high"})
        shown = (await q.status())["requests"][0]
        assert (shown["class"], shown["rule"], shown["reason"]) == ("high", None, "paused")
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "open"})
        assert (await waiting).status == 200


# ---- Blocked ---------------------------------------------------------------------------------

ROUTES = {
    CHAT: "openai",
    "/v1/embeddings": "openai",
    "/v1/responses": "openai",
    "/v1/messages": "anthropic",
    "/api/chat": "ollama",
    "/api/generate": "ollama",
    "/api/tags": "ollama",
    "/v1/models": "openai",
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("what", ["client", "address"])
async def test_blocked_is_403_in_the_dialect_of_whoever_asks_before_the_body(
    path: str, what: str
) -> None:
    by_client = {"clients": {"user:eve": {"blocked": True}}}
    settings = by_client if what == "client" else {"ips.blocked": ["127.0.0.1"]}
    async with running(NOBODY, **settings) as q, await Raw.open(q.port) as raw:
        get = path in ("/api/tags", "/v1/models")
        headers = {"X-User-ID": "eve"}
        if not get:
            headers["Content-Length"] = "1000000"  # of which nothing comes
        await raw.send(http("GET" if get else "POST", path, headers))
        answer = await raw.response()
        assert answer.status == 403
        document = answer.json()
        error = document["error"]
        message = error if ROUTES[path] == "ollama" else error["message"]
        assert "blocked" in message
        if ROUTES[path] == "anthropic":
            assert (document["type"], error["type"]) == ("error", "permission_error")
        if ROUTES[path] == "openai":
            assert error["code"] == "forbidden"
        assert q.gateway.calls == {}


async def test_blocked_by_the_file_holds_for_that_one_alone() -> None:
    settings = {"clients": {"user:eve": {"blocked": True}}, "ips.blocked": ["10.0.0.9"]}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        assert (await q.chat("hi", {"X-User-ID": "eve"})).status == 403
        assert (await q.chat("hi", {"X-User-ID": "alice"})).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [("/llmq/leases", {}), ("/llmq/models", {"action": "unload", "model": "m"})],
)
async def test_blocked_gives_no_work_by_another_way(path: str, body: dict[str, Any]) -> None:
    settings = {"clients": {"user:eve": {"blocked": True}}}
    async with FakeBackend(kind="ollama") as fake, running(fake.url, **settings) as q:
        answer = await ask(q.port, "POST", path, json=body, headers={"X-User-ID": "eve"})
        assert (answer.status, answer.code) == (403, "forbidden")
        assert not q.gateway.scheduler.running


async def test_who_is_blocked_while_its_wish_for_a_lease_arrives_gets_none() -> None:
    async with FakeBackend() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        headers = {"X-User-ID": "eve", "Content-Type": "application/json", "Content-Length": "2"}
        await raw.send(http("POST", "/llmq/leases", headers) + b"{")
        await eventually(lambda: q.service._servers[0].arriving_bytes)
        await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
        await raw.send(b"}")
        assert (await raw.response()).status == 403


async def test_blocked_ips_are_refused_also_behind_a_proxy() -> None:
    settings: dict[str, Any] = {"ips.blocked": ["10.0.0.9"], "server.trusted_proxies": PROXIES}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        assert (await q.status())["ips"] == ["10.0.0.9"]
        for told, status in (("10.0.0.9", 403), ("::ffff:10.0.0.9", 403), ("10.0.0.8", 200)):
            assert (await q.chat("hi", {"X-Forwarded-For": told})).status == status
        headers = {"X-Forwarded-For": "10.0.0.9"}  # nor may it undo it
        change = {"ip": "10.0.0.9", "blocked": False}
        answer = await ask(q.port, "POST", "/llmq/ips", json=change, headers=headers)
        assert answer.status == 403


@pytest.mark.parametrize("what", ["client", "address"])
async def test_to_block_ends_what_waits_and_what_runs_with_403(what: str) -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        eve = {"X-User-ID": "eve"}
        running_one = asyncio.ensure_future(q.chat("runs", eve))
        request = await fake.arrived()
        waiting_one = asyncio.ensure_future(q.chat("waits", eve))
        await eventually(lambda: q.gateway.scheduler.waiting)
        if what == "client":
            answer = await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
            assert answer.json()["blocked"] is True
        else:
            change = {"ip": "127.0.0.1", "blocked": True}
            assert (await ask(q.port, "POST", "/llmq/ips", json=change)).json() == change
        for one in (running_one, waiting_one):
            answer = await one
            assert (answer.status, answer.code) == (403, "forbidden")
        await request.connection.gone.wait()  # nothing is generated for it any more
        other = await q.chat("hi", eve)
        assert other.status == 403
        path, undo = "/llmq/clients/user:eve", dict[str, Any](blocked=False)
        if what == "address":
            path, undo = "/llmq/ips", {"ip": "127.0.0.1", "blocked": False}
        assert (await ask(q.port, "POST", path, json=undo)).status == 200
        again = asyncio.ensure_future(q.chat("again", eve))
        await (await fake.arrived()).answer("well")
        assert (await again).status == 200


async def test_to_block_an_address_ends_nothing_of_others_who_share_its_name() -> None:
    """ollamaMQ looked at the last address of a name and dropped what others had queued."""
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, server__trusted_proxies=PROXIES) as q:
            clients = []
            for number in (1, 2, 3):
                headers = {"X-User-ID": "shared", "X-Forwarded-For": f"10.0.0.{number}"}
                clients.append(asyncio.ensure_future(q.chat(f"{number}", headers)))
                await eventually(lambda count=number: len(q.gateway.calls) == count)
            change = {"ip": "10.0.0.3", "blocked": True}
            assert (await ask(q.port, "POST", "/llmq/ips", json=change)).json() == change
            assert (await clients[2]).status == 403
            for client in clients[:2]:
                await (await fake.arrived()).answer("well")
                assert (await client).status == 200


async def test_to_block_ends_a_stream_that_runs_as_a_failure() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        async with await Raw.open(q.port) as raw:
            body = json.dumps(chat("hi", stream=True)).encode()
            headers = {"Content-Type": "application/json", "X-User-ID": "eve"}
            await raw.send(http("POST", CHAT, headers, body))
            request = await fake.arrived()
            await request.start_stream()
            await request.piece("one")
            await raw.until(b"one")
            await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
            rest = await raw.until(b'"code":"forbidden"}}')
            rest += await rest_of(raw)
            assert b"[DONE]" not in rest
            assert not rest.endswith(b"0\r\n\r\n")
            await request.left()


async def rest_of(raw: Raw) -> bytes:
    found = b""
    while data := await raw.read():
        found += data
    return found


async def test_who_is_blocked_while_its_request_arrives_does_not_get_in() -> None:
    async with FakeBackend() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        headers = {"X-User-ID": "eve", "Content-Type": "application/json"}
        whole = http("POST", CHAT, headers, str(chat("hi")).replace("'", '"').encode())
        await raw.send(whole[:-5])
        server = q.service._servers[0]
        await eventually(lambda: any(one.phase is llmq.Phase.BODY for one in server.connections))
        await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
        await raw.send(whole[-5:])
        assert (await raw.response()).status == 403
        assert fake.requests == []


# ---- Changed at run time ---------------------------------------------------------------------


async def test_a_client_is_told_its_settings_before_it_has_asked_and_shown_them() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        change = {"class": "low", "weight": 2.5, "boost": True, "max_concurrent": 1}
        path = "/llmq/clients/app:https:%2F%2Fpage.example"
        answer = await ask(q.port, "POST", path, json=change)
        assert answer.status == 200
        assert {key: answer.json()[key] for key in change} == change
        assert answer.json()["name"] == "app:https://page.example"
        assert (await q.chat("hi", FOREIGN)).status == 200
        (client,) = (await q.status())["clients"]
        assert {key: client[key] for key in change} == change
        assert (client["address"], client["blocked"], client["done"]) == ("127.0.0.1", False, 1)
        assert (await q.status())["recent"][0]["class"] == "low"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"wieght": 2}, "did you mean weight?"),
        ({"wieght": None}, "did you mean weight?"),
        ({"weight": 0}, "at least 0.01"),
        ({"weight": "much"}, "wants a number"),
        ({"class": "urgent"}, "choose one of high, normal, low"),
        ({"blocked": "perhaps"}, "true or false"),
        ({"max_waiting": -1}, "whole number"),
        ({"boost": True, "max_waiting": [1]}, "whole number"),
    ],
)
async def test_a_change_that_says_nothing_good_changes_nothing(
    change: dict[str, Any], told: str
) -> None:
    async with running(NOBODY) as q:
        answer = await ask(q.port, "POST", "/llmq/clients/user:eve", json=change)
        assert answer.status == 400
        assert told in answer.json()["error"]["message"]
        assert q.gateway.clients.settings == {}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ip": "10.0.0.9"},
        {"blocked": True},
        {"ip": "box", "blocked": True},
        {"ip": 7, "blocked": True},
        {"ip": "10.0.0.9", "blocked": "x"},
        {"ip": "10.0.0.9", "blocked": True, "more": 1},
    ],
)
async def test_an_address_is_an_address(change: dict[str, Any]) -> None:
    async with running(NOBODY) as q:
        assert (await ask(q.port, "POST", "/llmq/ips", json=change)).status == 400
        assert (await q.status())["ips"] == []


async def test_changes_at_run_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "MOST_CLIENTS", 3)
    async with running(NOBODY) as q:
        for number in range(5):
            path = f"/llmq/clients/user:{number}"
            answer = await ask(q.port, "POST", path, json={"weight": 2})
            assert answer.status == (200 if number < 3 else 409)
        answer = await ask(q.port, "POST", "/llmq/clients/user:0", json={"weight": 3})
        assert answer.json()["weight"] == 3
        await ask(q.port, "POST", "/llmq/clients/user:1", json={"weight": None})
        answer = await ask(q.port, "POST", "/llmq/clients/user:4", json={"weight": 2})
        assert answer.status == 200  # there is room again


async def test_a_name_that_no_client_can_have_and_a_foreign_page_are_refused() -> None:
    async with running(NOBODY) as q:
        path = "/llmq/clients/user:%20eve"
        assert (await ask(q.port, "POST", path, json={"weight": 2})).status == 400
        answer = await ask(
            q.port, "POST", "/llmq/clients/user:eve", json={"weight": 2}, headers=FOREIGN
        )
        assert answer.status == 403


def test_addresses_in_the_settings_are_addresses() -> None:
    with pytest.raises(llmq.ConfigError, match=r"ips\.blocked = box: wants IP addresses"):
        llmq.merge_layers([("file", {"ips.blocked": "box"})])
    settings = llmq.merge_layers([("file", {"server.trusted_proxies": "fd00:0::2,::ffff:1.2.3.4"})])
    assert settings.server.trusted_proxies == ("fd00::2", "1.2.3.4")


def test_a_rule_without_a_class_stops_the_start() -> None:
    with pytest.raises(llmq.ConfigError, match=r"rules\.1\.class.*high, normal, low"):
        llmq.merge_layers([("file", {"rules": [{"route": "/api/*"}]})])
