"""Who asks: names, web origins, classes, and how many clients are remembered."""

from __future__ import annotations

from typing import Any

import pytest

import llmq
from llmq import Priority

TRUSTED = ("*", "https://chat.example.com", "https://box.example.com:8443")


def client_name(
    user_id: str | None, origin: str | None, agent: str | None, person: str = ""
) -> str:
    return llmq.identify(user_id, origin, agent, False, ("", person)).client


# ---- Names


@pytest.mark.parametrize(
    ("user_id", "origin", "agent", "name"),
    [
        ("alice", "https://page.example", "curl/8.5.0", "user:alice"),
        (None, "https://page.example", "Mozilla/5.0", "app:https://page.example"),
        (None, "http://localhost:3000", None, "app:http://localhost:3000"),
        (None, "null", "Mozilla/5.0", "app:null"),
        (None, None, "curl/8.5.0", "app:curl"),
        (None, None, "OpenAI/Python 1.40.0", "app:OpenAI"),
        (None, None, "Mozilla/5.0 (X11; Linux) Gecko", "app:Mozilla"),
        (None, None, "my-agent", "app:my-agent"),
        (None, None, "two words/3", "app:two"),
        (None, None, "  padded/1", "app:padded"),
        ("", "", "", "anonymous"),
        ("", None, "curl/8", "app:curl"),
        (None, None, None, "anonymous"),
        (None, None, "   ", "anonymous"),
        (None, None, "/1.0", "anonymous"),
        ("a b", None, None, "user:a-b"),
        ("é\n\x00'\"<>{}", None, None, "user:---------"),
        ("A.z_0@9/:-", None, None, "user:A.z_0@9/:-"),
    ],
)
def test_a_client_is_named_by_what_it_says_of_itself(
    user_id: str | None, origin: str | None, agent: str | None, name: str
) -> None:
    assert client_name(user_id, origin, agent) == name


@pytest.mark.parametrize("user_id", ["x" * 59, "x" * 60, "x" * 5000])
def test_a_name_is_at_most_64_characters_long(user_id: str) -> None:
    assert client_name(user_id, None, None) == "user:" + user_id[:59]


def test_no_kind_of_name_can_pass_for_another() -> None:
    as_user = client_name("https://page.example", None, None)
    as_page = client_name(None, "https://page.example", None)
    as_program = client_name(None, None, "https://page.example")
    assert len({as_user, as_page, as_program}) == 3


# ---- Web origins


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://localhost:3000",
        "HTTP://LOCALHOST:3000",
        "http://app.localhost",
        "http://127.0.0.1:8080",
        "http://127.8.9.10",
        "http://[::1]:5173",
        "chrome-extension://abcdefghijklmnop",
        "moz-extension://0c6fa1a6-9d0e-4f5e-8b0a-1d2c3b4a5f60",
        "safari-web-extension://A1B2",
        "vscode-webview://1a2b3c",
        "app://obsidian.md",
        "app://-",
        "tauri://localhost",
        "file://",
        "vscode-file://vscode-app",
        "APP://Obsidian.md",
        "https://chat.example.com",
        "https://box.example.com:8443",
    ],
)
def test_pages_of_this_box_extensions_and_configured_origins_are_at_home(origin: str) -> None:
    assert not llmq.is_foreign(origin, TRUSTED)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "*",
        "https://evil.example",
        "http://192.168.1.20",
        "http://0.0.0.0",
        "http://[2001:db8::1]",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "http://evil-localhost",
        "http://.localhost",
        "http://localhost@evil.example",
        "http://evil.example#localhost",
        "http://localhost:evil",
        "http://localhost:123456",
        "http://localhost/",
        "http://localhost\n",
        " http://localhost",
        "http://localhost, https://evil.example",
        "//localhost",
        "localhost",
        "https://chat.example.com.evil.example",
        "https://chat.example.com:444",
        "http://chat.example.com",
        "ftp://localhost",
        "x-chrome-extension://abc",
    ],
)
def test_any_other_page_is_foreign(origin: str) -> None:
    assert llmq.is_foreign(origin, TRUSTED)


def test_no_setting_makes_a_sandboxed_frame_trusted() -> None:
    assert llmq.is_foreign("null", ("null",))


@pytest.mark.parametrize(
    "host",
    ["localhost", "a.localhost", "127.0.0.1", "127.255.0.1", "::1", "[::1]", "0:0:0:0:0:0:0:1"],
)
def test_loopback_is_this_box(host: str) -> None:
    assert llmq.is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".localhost",
        "localhost.example",
        "notlocalhost",
        "127.0.0.1.example",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
        "0.0.0.0",
        "::",
        "::2",
        "10.0.0.1",
        "128.0.0.1",
        "[fe80::1]",
        "box",
    ],
)
def test_nothing_else_is_loopback(host: str) -> None:
    assert not llmq.is_loopback(host)


# ---- Classes


@pytest.mark.parametrize(
    ("value", "priority"),
    [
        (None, None),
        (True, Priority.HIGH),
        (False, Priority.NORMAL),
        ("high", Priority.HIGH),
        ("normal", Priority.NORMAL),
        ("low", Priority.LOW),
    ],
)
def test_a_class_is_asked_for_by_word_or_true(value: object, priority: Priority | None) -> None:
    assert llmq.parse_priority(value) is priority


@pytest.mark.parametrize("value", ["", "urgent", "HIGH", " high", "1", [], ["high"], {}, {"a": 1}])
def test_any_other_value_is_a_bad_request_that_names_the_words(value: object) -> None:
    with pytest.raises(llmq.BadRequest) as caught:
        llmq.parse_priority(value)
    assert caught.value.param == "priority"
    assert all(word in caught.value.message for word in ("true", "high", "normal", "low"))
    assert "number" not in caught.value.message


@pytest.mark.parametrize("value", [0, 1, -1, 10, 0.5, float("nan")])
def test_a_number_is_a_bad_request_with_a_hint(value: float) -> None:
    with pytest.raises(llmq.BadRequest, match="number"):
        llmq.parse_priority(value)


@pytest.mark.parametrize("header", ["urgent", "", "true", "1", "high low"])
def test_another_value_of_the_header_counts_as_absent(header: str) -> None:
    assert llmq.asked_priority({}, header) is None
    assert llmq.asked_priority({"service_tier": "flex"}, header) is Priority.LOW


@pytest.mark.parametrize(
    ("body", "header", "priority"),
    [
        ({}, None, None),
        ({"priority": "low"}, "high", Priority.LOW),
        ({"priority": "low", "service_tier": "priority"}, None, Priority.LOW),
        ({"priority": False}, "high", Priority.NORMAL),
        ({"priority": None}, "high", Priority.HIGH),
        ({"priority": None, "service_tier": None}, None, None),
        ({}, "low", Priority.LOW),
        ({}, "High", Priority.HIGH),
        ({"service_tier": "priority"}, "low", Priority.LOW),
        ({"service_tier": "priority"}, "normal", Priority.NORMAL),
        ({"service_tier": "priority"}, None, Priority.HIGH),
        ({"service_tier": "flex"}, None, Priority.LOW),
        ({"service_tier": "auto"}, None, None),
        ({"service_tier": "default"}, None, None),
        ({"service_tier": ["priority"]}, None, None),
        ({"service_tier": 7}, None, None),
    ],
)
def test_the_body_goes_before_the_header_and_that_before_the_service_tier(
    body: dict[str, Any], header: str | None, priority: Priority | None
) -> None:
    assert llmq.asked_priority(body, header) is priority


def test_a_bad_field_is_told_although_the_header_is_good() -> None:
    with pytest.raises(llmq.BadRequest):
        llmq.asked_priority({"priority": 5}, "high")


RULE = llmq.RuleSettings
ASKS = ("/api/chat", "qwen3:8b", "user:alice")


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        (RULE(), True),
        (RULE(route="/api/*"), True),
        (RULE(route="/api"), False),
        (RULE(model="QWEN3:*"), True),
        (RULE(model="qwen3"), False),
        (RULE(client="user:*"), True),
        (RULE(client="*bob"), False),
        (RULE(route="/api/*", model="qwen*", client="user:alice"), True),
        (RULE(route="/api/*", model="qwen*", client="user:bob"), False),
        (RULE(header="X-OpenWebUI-Task"), True),
        (RULE(header="x-openwebui-task : Title*"), True),
        (RULE(header="X-OpenWebUI-Task: tags*"), False),
        (RULE(header="X-Other"), False),
        (RULE(header="X-Other:*"), False),
        (RULE(header="X-Empty"), True),
        (RULE(header="X-Empty:"), True),
        (RULE(header="X-OpenWebUI-Task:"), False),
        (RULE(header="X-OpenWebUI-Task", client="user:bob"), False),
    ],
)
def test_a_rule_holds_where_all_that_it_says_does(rule: llmq.RuleSettings, holds: bool) -> None:
    headers = {"x-openwebui-task": "title_generation", "x-empty": ""}
    rules = {"1": llmq.replace(rule, class_="low"), "2": RULE(class_="high")}
    assert llmq.find_rule(rules, ASKS, headers) == (("1", "low") if holds else ("2", "high"))


def test_without_a_rule_that_holds_there_is_none() -> None:
    assert llmq.find_rule({}, ASKS, {}) == ("", "")
    assert llmq.find_rule({"1": RULE(client="x", class_="low")}, ASKS, {}) == ("", "")


@pytest.mark.parametrize(
    ("user_id", "origin", "agent", "person", "name"),
    [
        ("alice", None, "curl/8", "ip:10.0.0.9", "user:alice"),
        (None, None, "curl/8", "ip:10.0.0.9", "ip:10.0.0.9"),
        (None, "http://localhost", "curl/8", "unix:bob", "unix:bob"),
        (None, None, "curl/8", "ip:fe80::1%eth0", "ip:fe80::1-eth0"),
        (None, None, None, "unix:bob", "unix:bob"),
    ],
)
def test_a_person_that_the_connection_tells_goes_before_the_program(
    user_id: str | None, origin: str | None, agent: str | None, person: str, name: str
) -> None:
    assert client_name(user_id, origin, agent, person) == name


def test_a_foreign_page_cannot_speak_for_a_person() -> None:
    caller = llmq.identify("alice", "https://page.example", "x", True, ("10.0.0.9", ""))
    assert caller[:3] == ("app:https://page.example", True, "10.0.0.9")


def test_a_smaller_class_goes_first() -> None:
    assert sorted(Priority) == [Priority.HIGH, Priority.NORMAL, Priority.LOW]
    assert [one.word for one in Priority] == ["high", "normal", "low"]


# ---- What is remembered


def test_a_client_is_the_same_one_each_time() -> None:
    clients = llmq.Clients()
    assert clients.named("app:curl") is clients.named("app:curl")
    assert clients.named("app:curl") is not clients.named("app:wget")


def test_at_most_a_thousand_are_remembered_and_the_longest_silent_goes_first() -> None:
    clients = llmq.Clients()
    for number in range(1000):
        clients.named(f"c{number}")
    first = clients.named("c0")  # it asks again, so c1 is now the longest silent
    for number in range(1000, 1500):
        clients.named(f"c{number}")
    assert len(clients.known) == 1000
    assert clients.known["c0"] is first
    assert "c1" not in clients.known
    assert "c500" not in clients.known
    assert "c501" in clients.known


@pytest.mark.untraced
@pytest.mark.parametrize("what", ["waiting", "running"])
def test_a_client_with_something_in_the_queue_is_never_forgotten(what: str) -> None:
    clients = llmq.Clients()
    busy = clients.named("busy")
    setattr(busy, what, 1)
    for number in range(3000):
        clients.named(f"c{number}")
    assert clients.named("busy") is busy
    assert len(clients.known) <= 1000


def test_a_crowd_that_had_to_be_remembered_is_forgotten_once_it_has_gone() -> None:
    clients = llmq.Clients()
    crowd = []
    for number in range(2000):
        crowd.append(clients.named(f"c{number}"))
        crowd[-1].waiting, crowd[-1].running = number % 2, 1 - number % 2
    late = clients.named("late")
    assert all(clients.known[one.name] is one for one in [*crowd, late])
    for client in crowd:
        client.waiting = client.running = 0
    clients.named("the next one")
    assert len(clients.known) <= 1000
    assert clients.known["late"] is late
