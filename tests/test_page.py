"""The web page in a real Chromium: what it shows, what its clicks and keys change, what it bears.

`python3 -m tests.test_page` takes the README's pictures anew; those kept were reduced to 192
colours (Pillow: `quantize(192, dither=Image.Dither.NONE)`, saved with `optimize=True`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmq
from tests.cdp import Browser, Page
from tests.fakes import (
    ROOT,
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    eventually,
    http,
    need,
    require_command,
    running,
)
from tests.real import peers
from tests.test_top import recorded

AXE = "4.14.1"
SECOND = 1.0
LIVE = "document.querySelector('#figures dd')"
HOSTILE = "<img src=x onerror=hit=1><script>hit=1</script>&amp;\"'`${hit=1}"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
REFUSED = "Failed to load resource: net::ERR_CONNECTION_REFUSED"
WIDTHS = (390, 1024, 1600)


async def assert_asks_and_tells_as_text(page: Any) -> None:
    """What is asked before an order and told after it has the hostile name in it, as a text."""
    told = f"textContent.includes({json.dumps(HOSTILE)})"
    await page.until(f"document.querySelector('#ask p').{told}")
    await page.click("#ask [value=go]")
    await page.until(f"document.querySelector('#toasts').{told}")
    assert await page.js("document.querySelectorAll('img, script').length") == 1
    assert await page.js("typeof hit") == "undefined"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser(require_command("chromium"))
    yield started
    started.close()


@contextlib.asynccontextmanager
async def opened(
    browser: Browser, q: running, path: str = "/llmq", bears: str = ""
) -> AsyncIterator[Page]:
    """The page, live; at the end: nothing went wrong in it, and it asked nobody but llmq."""
    async with browser.page() as page:
        await page.look(1024, 900)
        await page.goto(q.base + path)
        await page.until(LIVE)
        yield page
        assert not [one for one in page.errors if not bears or bears not in one]
        asked = [url for url in page.requests if not url.startswith((q.base + "/", "data:"))]
        assert not asked


async def begin(q: running, client: str = "alice", model: str = "m", **more: Any) -> Raw:
    """A client that has sent its request and waits."""
    raw = await Raw.open(q.port)
    headers = {"Content-Type": "application/json", "X-User-ID": client}
    body = json.dumps(chat("hi", model=model, **more)).encode()
    await raw.send(http("POST", "/v1/chat/completions", headers, body))
    return raw


async def waiting(q: running, number: int) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


def in_line(q: running) -> list[str]:
    """Who waits, by the queue's own books."""
    return [ticket.client.name for ticket in q.gateway.scheduler.in_order()]


@contextlib.asynccontextmanager
async def queue_of(*clients: str, **settings: Any) -> AsyncIterator[running]:
    """A queue with one request that runs and one of each of these clients that waits."""
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}", **settings) as q:
        sent = [await begin(q, "first")]
        await fake.arrived()
        for number, client in enumerate(clients, 1):
            sent.append(await begin(q, client))
            await waiting(q, number)
        yield q
        for raw in sent:
            raw.close()
        await eventually(lambda: not q.gateway.calls)


def row(client: str) -> str:
    """An expression: the row of the queue with this client's request."""
    return (
        "[...document.querySelectorAll('#queue tbody tr')].find("
        f"one => one.querySelector('.who b').textContent === {json.dumps('user:' + client)})"
    )


async def press(page: Page, client: str, button: str) -> None:
    """Click the button with this sign in this client's row."""
    await page.js("document.querySelectorAll('[data-here]').forEach(n => delete n.dataset.here)")
    await page.until(
        f"[...{row(client)}.querySelectorAll('button')].some(one => one.textContent === "
        f"{json.dumps(button)} && (one.dataset.here = 'yes'))"
    )
    await page.click("[data-here]")


async def select(page: Page, client: str) -> None:
    """Press j until this client's request is selected."""
    await page.key("Escape")
    place = await page.until(f"{row(client)}.rowIndex")
    for _ in range(place):
        await page.key("j")
    await page.until(f"{row(client)}.ariaCurrent === 'true'")


# ---- How it is served ------------------------------------------------------------------------


async def test_browsers_get_the_page_and_programs_what_ollama_says() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for path, headers in (("/", BROWSER), ("/llmq", {}), ("/llmq", BROWSER)):
            answer = await ask(q.port, "GET", path, headers=headers)
            assert answer.status == 200
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            assert answer.body.startswith(b"<!doctype html>")
            head = await ask(q.port, "HEAD", path, headers=headers)
            assert head.headers["content-length"] == answer.headers["content-length"]
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            answer = await ask(q.port, "GET", "/", headers=accept)
            assert answer.body == b"Ollama is running"
            assert "Accept" in answer.headers["vary"]


async def test_each_page_has_a_policy_and_a_nonce_of_its_own() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        nonces = set()
        for _ in range(3):
            answer = await ask(q.port, "GET", "/llmq")
            policy = dict(
                part.strip().split(" ", 1)
                for part in answer.headers["content-security-policy"].split(";")
            )
            assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
            assert policy["frame-ancestors"] == "'none'"
            assert policy["connect-src"] == "'self'"
            (nonce,) = re.findall(r"^'nonce-([\w-]{20,})'$", policy["script-src"])
            assert policy["style-src"] == f"'nonce-{nonce}'"
            marked = re.findall(r'<(script|style) nonce="(.*?)">', answer.body.decode())
            assert marked == [("style", nonce), ("script", nonce)]
            nonces.add(nonce)
        assert len(nonces) == 3


def test_page_is_one_piece_without_a_foot_in_the_door() -> None:
    assert not re.findall(r"""\son\w+=["']|\sstyle=["']|javascript:""", llmq.PAGE)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", llmq.PAGE)
    assert set(re.findall(r"https?://[\w./]+", llmq.PAGE)) == {"http://www.w3.org/2000/svg"}
    assert llmq.PAGE.count("\n") <= 590


# ---- What it shows ---------------------------------------------------------------------------


@pytest.mark.deadline(20)
async def test_each_change_is_on_the_page_within_a_second(browser: Browser) -> None:
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}") as q:
        async with opened(browser, q, "/llmq") as page:
            text = await page.until("document.querySelector('#queue .empty').innerText")
            assert f"{q.base}/v1" in text
            assert f"curl {q.base}/v1/chat/completions" in text

            async def shows(expression: str, since: float) -> None:
                await page.until(expression)
                assert time.monotonic() - since < SECOND, expression

            began = time.monotonic()
            runs = await begin(q, stream=True)
            request = await fake.arrived()
            await shows(f"{row('alice')}.innerText.includes('on box')", began)
            began = time.monotonic()
            waits = await begin(q, "bob")
            await shows(row("bob"), began)
            await page.until(f"{row('bob')}.innerText.includes('local busy (1/1)')")
            assert await page.js("document.title") == "(1) llmq — working"
            began = time.monotonic()
            await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
            await shows("document.querySelector('#notes').innerText.includes('Paused')", began)
            assert await page.js("document.title") == "(1) llmq — paused"
            await request.start_stream()
            for _ in range(3):
                await request.piece("word ")
            await page.until(f"/on box, 3 tokens, \\d+[/]s/.test({row('alice')}.innerText)")
            began = time.monotonic()
            await request.finish_stream()
            await shows("document.querySelector('#recent tbody').innerText.includes('done')", began)
            assert (await runs.response()).clean
            waits.close()
            await shows("document.querySelectorAll('#queue tbody tr').length === 0", began + SECOND)
            began = time.monotonic()
            await fake.stop_listening()
            await q.gateway.monitor.refresh()
            await shows("document.querySelector('#devices').innerText.includes('refused')", began)
            assert await page.js("document.title") == "llmq — no runner"


async def test_plots_and_figures_count_what_ends(browser: Browser) -> None:
    async with FakeBackend() as fake, running(f"box={fake.url}") as q, opened(browser, q) as page:
        for _ in range(12):
            await q.chat("hi")
        await page.until("document.querySelector('#rate b').textContent === '12'")
        figures = await page.js(
            "[...document.querySelectorAll('#figures dd')].map(n => n.innerText)"
        )
        assert figures[6] == "12"
        assert await page.js("document.querySelectorAll('#recent tbody tr').length") == 10
        await page.key("r")
        await page.until("document.querySelectorAll('#recent tbody tr').length === 12")
        drawn = "document.querySelector('#rate path:nth-of-type(3)').getAttribute('d').length > 10"
        await page.until(drawn)


async def test_what_a_backend_and_the_configuration_lack_is_said(browser: Browser) -> None:
    async with FakeBackend(kind="ollama") as fake, running(f"ollama={fake.url}") as q:
        (backend,) = q.gateway.fleet.backends.values()
        await eventually(lambda: backend.usable)  # the first look at it has ended
        await fake.stop_listening()
        await q.gateway.monitor.refresh()
        q.service.read = lambda: (_ for _ in ()).throw(llmq.ConfigError("llmq.toml: no such key"))
        async with opened(browser, q) as page:
            q.service.reload()
            await page.until("document.querySelector('#notes').innerText.includes('no such key')")
            text = await page.js("document.querySelector('#devices').innerText")
            assert "connection refused; start it: ollama serve. llmq looks again by itself." in text
            assert await page.js("document.title") == "llmq — no runner"
            shown = await page.js("document.querySelector('#notes').innerText")
            assert llmq.NO_RUNNER.replace("`", "") in shown
            commands = await page.js(
                "[...document.querySelectorAll('#notes code')].map(n => n.innerText)"
            )
            assert commands == [*(command for _, command in llmq.STARTERS.values()), "--demo"]


async def test_failures_say_why_and_those_who_left_are_counted_apart(browser: Browser) -> None:
    async with queue_of() as q, opened(browser, q) as page:
        left = await begin(q, "hasty")
        await waiting(q, 1)
        left.close()
        await waiting(q, 0)
        cancelled = await begin(q, "bob")
        await waiting(q, 1)
        (ticket,) = q.gateway.scheduler.waiting.values()
        await ask(q.port, "DELETE", f"/llmq/requests/{ticket.id}")
        cancelled.close()
        await page.until("document.querySelectorAll('#recent tbody tr').length === 2")
        rows = await page.js(
            "[...document.querySelectorAll('#recent tbody tr')].map(n => n.innerText)"
        )
        assert "cancelled" in rows[0]
        assert "client left" in rows[1]
        figures = await page.js(
            "[...document.querySelectorAll('#figures dd')].map(n => n.innerText)"
        )
        assert figures[6:] == ["0", "2 left or cancelled", "0", "none"]
        clients = "document.querySelector('#clients tbody').innerText"
        assert re.search(r"user:hasty\s+0 %, 1 left\s+0\s+0\s+0\s+0", await page.js(clients))
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        async with opened(browser, q) as page:
            failed = await begin(q, "alice")
            request = await fake.arrived()
            await request.status(500, {"error": {"message": "CUDA <b>out</b> of memory"}})
            await failed.response()
            why = "document.querySelector('#recent .alarm')"
            assert await page.until(f"{why}.innerText") == "CUDA <b>out</b> of memory"


@pytest.mark.parametrize("width", WIDTHS)
async def test_names_of_clients_are_readable_at_every_width(browser: Browser, width: int) -> None:
    name = "report-of-the-whole-department/with.a-long-name@example-com"
    async with queue_of(name) as q, opened(browser, q) as page:
        await page.look(width, 900)
        done = await begin(q, name)
        await waiting(q, 2)
        done.close()
        await page.until("document.querySelectorAll('#recent tbody tr').length === 1")
        for place in ("#queue", "#clients", "#recent"):
            room_of = "getComputedStyle(n).textOverflow, n.clientWidth"
            cut = await page.until(
                f"[...document.querySelectorAll('{place} .who b')].filter(n => n.textContent ==="
                f" {json.dumps('user:' + name)}).map(n => [n.scrollWidth - n.clientWidth,"
                f" n.scrollHeight - n.clientHeight, {room_of}])"
            )
            for wide, high, overflow, room in cut:
                assert (wide, high, overflow) == (0, 0, "clip")
                assert room >= 130, "a word of it has no room"
            assert cut


@pytest.mark.deadline(20)
async def test_last_snapshot_says_that_llmq_stops(browser: Browser) -> None:
    async with FakeBackend() as fake, contextlib.AsyncExitStack() as stack:
        async with running(fake.url) as q:
            feed = await Raw.open(q.port)
            await feed.send(http("GET", "/llmq/events"))
            await feed.until(b'"draining":false')
            page = await stack.enter_async_context(opened(browser, q, bears=REFUSED))
        told = await feed.until(b"0\r\n\r\n")
        assert b'"draining":true' in told.rpartition(b"data: ")[2]
        await page.until("document.title === 'llmq — stopping'")
        await page.until("document.querySelector('#notes').innerText.includes('told to stop')")


@pytest.mark.deadline(20)
async def test_hostile_names_stay_text(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = llmq.Caller(HOSTILE, foreign=False)
    monkeypatch.setattr(llmq, "identify", lambda *_facts: hostile)
    monkeypatch.setattr(llmq, "printable", lambda text, _limit=0: text)
    async with FakeBackend(models=[HOSTILE], auto=False) as fake:
        async with running(fake.url) as q:
            (backend,) = q.gateway.fleet.backends.values()
            backend.name = backend.device.name = HOSTILE
            done = await begin(q, model=HOSTILE)
            await (await fake.arrived()).answer("x")
            await done.response()
            sent = [await begin(q, model=HOSTILE) for _ in range(2)]
            await waiting(q, 1)
            async with opened(browser, q) as page:
                await ask(q.port, "POST", "/llmq/clients/user:x", json={"blocked": True})
                settings = q.gateway.clients.settings
                q.gateway.clients.settings = {HOSTILE: settings["user:x"]}
                await page.until(
                    "[...document.querySelectorAll('#blocked span span:not(.tag)')].some(one =>"
                    f" one.textContent === {json.dumps(HOSTILE)})"
                )
                for place in ("#queue .who b", "#queue .who small", "#clients .who b"):
                    shown = await page.until(f"document.querySelector('{place}').textContent")
                    assert shown == HOSTILE
                for place in (
                    "#recent .who b",
                    "#recent .who small",
                    "#devices b",
                    "#devices .tag",
                ):
                    shown = await page.until(f"document.querySelector('{place}').textContent")
                    assert shown == HOSTILE
                await page.key("j")
                await page.key("x")
                await assert_asks_and_tells_as_text(page)
                with pytest.raises(AssertionError, match="TrustedHTML"):
                    await page.js("document.querySelector('#about').innerHTML = '<b>x</b>'")
                page.errors.clear()  # of the last line
            for raw in sent:
                raw.close()
            await eventually(lambda: not q.gateway.calls)


async def test_what_waits_is_filtered_and_the_rest_is_counted(browser: Browser) -> None:
    async with queue_of("alice", "bob", "carol") as q, opened(browser, q) as page:
        await select(page, "bob")
        await page.key("/")
        for letter in "car":
            await page.key(letter)
        await page.until(f"!{row('bob')} && {row('carol')}")
        await page.until(f"{row('carol')}.ariaCurrent === 'true'")  # in the place of bob's
        assert await page.js("document.activeElement.value") == "car"
        await page.key("Escape")
        await page.until(f"{row('bob')}")
        assert (await q.status())["mode"] == "open", "a letter that was typed changed something"


@pytest.mark.deadline(20)
async def test_filter_looks_through_all_that_wait(browser: Browser) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        crowd(q, 300)  # of which the snapshot shows 100, the low none
        async with opened(browser, q) as page:
            await page.until("document.querySelector('#queue small').innerText.includes('of 300')")
            assert not await page.js("snap.requests.some(one => one.class === 'low')")
            await page.key("/")
            for letter in "LOW":
                await page.key(letter)
            shown = "document.querySelectorAll('#queue tbody tr').length"
            await page.until(f"{shown} === 100")
            assert await page.js("document.querySelector('#queue small').innerText") == "100 fit"
            low = [one for one in q.gateway.scheduler.in_order() if one.priority.word == "low"]
            await press(page, low[0].client.name.removeprefix("user:"), "↑")
            await eventually(lambda: low[0].priority is llmq.Priority.NORMAL)
            await page.until(f"{shown} === 99")
            await page.key("Escape")
            await page.until(f"{shown} === 100")
        found = (await ask(q.port, "GET", "/llmq/status?find=X-7")).json()["requests"]
        assert [one["request_id"] for one in found][:2] == ["x-72", "x-75"]
        assert all("x-7" in one["request_id"] for one in found)
        assert len(found) == 11
        everything = await ask(q.port, "GET", "/llmq/status?find=user:3&all=1")
        names = [one["client"] for one in everything.json()["requests"]]
        assert set(names) == {f"user:{number}" for number in (3, *range(30, 40))}
        assert len(names) == 66
        for ticket in list(q.gateway.scheduler.waiting.values()):
            q.gateway.scheduler.cancel(ticket)
        q.gateway.calls.clear()


async def test_all_that_wait_are_told_some_at_a_time() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        crowd(q, 1000)
        loop, turns = asyncio.get_running_loop(), [0]

        def turn() -> None:
            turns[0] += 1
            if len(turns) == 1:
                loop.call_soon(turn)

        turn()
        gone = q.gateway.scheduler.in_order()[500]
        loop.call_soon(q.gateway.scheduler.cancel, gone)  # while they are told
        loop.call_soon(q.gateway.calls.pop, gone.id)
        rows = await llmq.show_all(q.gateway, "")
        turns.append(0)
        assert turns[0] >= 10, "nobody else had a turn"
        assert len({row["id"] for row in rows}) == 999
        for ticket in list(q.gateway.scheduler.waiting.values()):
            q.gateway.scheduler.cancel(ticket)
        q.gateway.calls.clear()


async def test_notices_take_no_clicks_and_a_newer_one_replaces_its_like(browser: Browser) -> None:
    async with queue_of("alice") as q, opened(browser, q) as page:
        texts = "[...document.querySelectorAll('#toasts div')].map(n => n.textContent).join()"
        await page.js("'abcde'.split('').forEach(kind => toast(kind, kind))")
        assert await page.js(texts) == "c,d,e"
        await page.js("toast('D', 'd')")
        assert await page.js(texts) == "c,e,D"
        style = "Object.assign(document.querySelector('#toasts').style, %s)"
        await page.js(style % "{inset: 0, maxWidth: 'none'}")  # over everything
        await page.click("#all")
        await page.until("document.querySelector('#ask[open]')")
        for _ in range(2):
            await page.js("change('POST', 'mode', {mode: 'paused'}, () => 'like')")
        await page.until(f"{texts} === 'e,D,like'")


async def test_what_is_new_is_in_live_regions(browser: Browser) -> None:
    """Screen readers speak what changes there: what an order did, and what everybody must know."""
    async with queue_of("alice") as q, opened(browser, q) as page:
        await page.js("setMode('paused')")
        for place, words in ("#toasts", "The mode is paused"), ("#notes", "Paused: nothing starts"):
            await page.until(f"document.querySelector('{place}').innerText.includes('{words}')")
            live = f"document.querySelector('{place}').matches('[role=status], [aria-live=polite]')"
            assert await page.js(live)


async def test_selection_on_a_phone_covers_nothing(browser: Browser) -> None:
    async with queue_of("alice") as q, opened(browser, q) as page:
        await page.look(390, 844)
        await select(page, "alice")
        shadow = "getComputedStyle(document.querySelector('#queue [aria-current] .pos')).boxShadow"
        assert await page.js(shadow) == "none"
        shadow = f"getComputedStyle({row('alice')}).boxShadow"
        assert "inset" in await page.js(shadow)


# ---- What it changes -------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["click", "key"])
async def test_modes_are_changed(browser: Browser, by: str) -> None:
    async with FakeBackend() as fake, running(fake.url) as q, opened(browser, q) as page:
        mode = lambda: q.gateway.scheduler.mode.value  # noqa: E731
        if by == "click":
            for place, name in ((2, "priority"), (3, "paused"), (1, "open")):
                await page.click(f"#modes label:nth-child({place})")
                await eventually(lambda: mode() == name)  # noqa: B023
                await page.until(
                    f"document.querySelector('#modes :has(:checked)')"
                    f".textContent.toLowerCase() === '{name}'"
                )
                await page.until("document.activeElement === document.body")
            await page.click("#modes label:nth-child(3)")
            await page.click("#notes button")
            await eventually(lambda: mode() == "open")
        for key, name in (("p", "paused"), ("p", "open"), ("m", "priority"), ("m", "paused")):
            if by == "key":
                await page.key(key)
                await eventually(lambda: mode() == name)  # noqa: B023
                await page.until(f"snap.mode === '{name}'")


async def test_modes_are_a_radio_group_that_arrows_walk(browser: Browser) -> None:
    async with queue_of("alice") as q, opened(browser, q) as page:
        mode = lambda: q.gateway.scheduler.mode.value  # noqa: E731
        await page.js("document.querySelector('#modes input').focus()")
        for name in ("priority", "paused", "open"):
            await page.key("ArrowDown")
            await eventually(lambda name=name: mode() == name)
            await page.until(f"snap.mode === '{name}'")
        assert not await page.js("chosen"), "the arrows moved the selection, too"
        tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        roles = [(one["role"]["value"], one.get("name", {}).get("value")) for one in tree]
        assert ("radiogroup", "Mode") in roles
        radios = [
            (one["name"]["value"], one["properties"])
            for one in tree
            if one["role"]["value"] == "radio"
        ]
        checked = [
            name
            for name, facts in radios
            for fact in facts
            if fact["name"] == "checked" and fact["value"]["value"] == "true"
        ]
        assert [name for name, _ in radios] == ["Open", "Priority", "Paused"]
        assert checked == ["Open"]
        for place in ("#notes", "#toasts"):
            live = [one["name"] for one in await live_facts(page, place)]
            assert "live" in live, place


async def live_facts(page: Page, place: str) -> list[dict[str, Any]]:
    """What assistive technology is told of this place."""
    root = (await page.call("DOM.getDocument"))["root"]["nodeId"]
    node = (await page.call("DOM.querySelector", nodeId=root, selector=place))["nodeId"]
    tree = await page.call("Accessibility.getPartialAXTree", nodeId=node, fetchRelatives=False)
    return list(tree["nodes"][0]["properties"])


async def test_shortcuts_of_one_character_can_be_turned_off(browser: Browser) -> None:
    async with queue_of("alice") as q, opened(browser, q) as page:
        await page.key("?")
        await page.click("#single")
        await page.until("!document.querySelector('#single').checked")
        await page.click("#map button")
        for again in (False, True):
            if again:  # it is remembered
                await page.goto(q.base + "/llmq")
                await page.until(f"{LIVE} && {row('alice')}")
            for key in "pmx?t/":
                await page.key(key)
            await page.key("ArrowDown")
            await page.until("chosen")  # which came after them
            assert not await page.js("document.querySelector('[open]')")
            assert await page.js("shade") == "system"
            assert q.gateway.scheduler.mode is llmq.Mode.OPEN
        await page.click("#help")
        await page.click("#single")
        await page.click("#map button")
        await page.key("p")
        await eventually(lambda: q.gateway.scheduler.mode is llmq.Mode.PAUSED)


@pytest.mark.parametrize("by", ["click", "key"])
async def test_class_is_raised_and_lowered(browser: Browser, by: str) -> None:
    async with queue_of("alice", "bob") as q, opened(browser, q) as page:

        async def change(client: str, sign: str, key: str) -> None:
            if by == "click":
                return await press(page, client, sign)
            await select(page, client)
            return await page.key(key)

        await change("bob", "↑", "+")
        await eventually(lambda: in_line(q) == ["user:bob", "user:alice"])
        await page.until(f"{row('bob')}.innerText.includes('high')")
        await change("bob", "↓", "-")
        await page.until(f"{row('bob')}.innerText.includes('normal')")
        await change("alice", "↓", "-")
        await eventually(lambda: in_line(q) == ["user:bob", "user:alice"])
        await page.until(f"{row('alice')}.innerText.includes('low')")


@pytest.mark.deadline(20)
@pytest.mark.parametrize("by", ["click", "key"])
async def test_requests_are_cancelled_once_that_is_confirmed(browser: Browser, by: str) -> None:
    async with queue_of("alice", "bob", "bob", "carol") as q, opened(browser, q) as page:

        async def confirm() -> None:
            await page.until("document.querySelector('#ask').open")
            await (page.click("#ask [value=go]") if by == "click" else page.key("Enter"))

        async def cancel(client: str) -> None:
            if by == "click":
                return await press(page, client, "\u00d7")
            await select(page, client)
            return await page.key("x")

        await cancel("alice")
        if by == "click":
            await page.click("#ask button:not([value])")
        else:
            await page.until("document.querySelector('#ask').open")
            await page.key("Escape")
        await page.until("!document.querySelector('#ask').open")
        assert sorted(in_line(q)) == ["user:alice", "user:bob", "user:bob", "user:carol"]
        await cancel("alice")
        await confirm()
        await eventually(lambda: sorted(in_line(q)) == ["user:bob", "user:bob", "user:carol"])
        await page.until(f"!{row('alice')}")
        if by == "click":
            await page.click("[aria-label='Cancel all that waits of user:bob']")
        else:
            await select(page, "bob")
            await page.key("X")
        await confirm()
        await eventually(lambda: in_line(q) == ["user:carol"])
        await page.until(f"!{row('bob')}")
        await cancel("first")  # which runs
        await confirm()
        await eventually(lambda: not in_line(q))
        await page.until(f"!{row('first')}")


async def test_everything_that_waits_is_cancelled_and_what_runs_goes_on(browser: Browser) -> None:
    async with queue_of("alice", "bob") as q, opened(browser, q) as page:
        await page.click("#all")
        await page.until("document.querySelector('#ask h2').textContent.includes('2 waiting')")
        await page.click("#ask [value=go]")
        await eventually(lambda: not in_line(q))
        assert len(q.gateway.scheduler.running) == 1


async def test_what_is_refused_is_told(browser: Browser) -> None:
    async with queue_of("alice") as q, opened(browser, q, bears="404 (Not Found)") as page:
        await page.js("sure('', '', 'Yes', 'DELETE', 'requests/gone', null, () => '')")
        await page.click("#ask [value=go]")
        await page.until(
            "document.querySelector('#toasts').innerText.includes('Not done: no request')"
        )


def settings_of(q: running, name: str) -> Any:
    return q.gateway.clients.of(name)


def button(name: str) -> str:
    """A selector: the button of this name."""
    return f"[aria-label={json.dumps(name)}]"


def client_row(name: str) -> str:
    """An expression: the row of this client."""
    return (
        "[...document.querySelectorAll('#clients tbody tr')].find("
        f"one => one.querySelector('.who b').textContent === {json.dumps(name)})"
    )


@pytest.mark.deadline(30)
@pytest.mark.parametrize("by", ["click", "shortcut", "focus"])
async def test_clients_are_made_vip_boosted_and_blocked(browser: Browser, by: str) -> None:
    name = "user:bob/b"  # a slash in a name is none in a path
    async with queue_of("alice", "bob/b") as q, opened(browser, q) as page:

        async def do(what: str, key: str) -> None:
            if by == "click":
                return await page.click(button(f"{what}{name}"))
            if by == "shortcut":
                await select(page, "bob/b")
                return await page.key(key)
            await page.js(f"document.querySelector({json.dumps(button(what + name))}).focus()")
            return await page.key("Enter")

        is_on = "document.querySelector({}).ariaPressed === {!r}"
        vip, boost = (json.dumps(button(what + name)) for what in ("VIP: ", "Boost "))
        for wanted in ("high", ""):
            await do("VIP: ", "v")
            await eventually(lambda wanted=wanted: settings_of(q, name).class_ == wanted)
            await page.until(is_on.format(vip, str(wanted == "high").lower()))
            found = f"{client_row(name)}.querySelector('.tag')?.textContent === 'high'"
            assert await page.js(found) == (wanted == "high")
        for wanted in (True, False):
            await do("Boost ", "b")
            await eventually(lambda wanted=wanted: settings_of(q, name).boost is wanted)
            await page.until(is_on.format(boost, str(wanted).lower()))
        await do("Block ", "B")
        await page.until("document.querySelector('#ask').open")
        assert not settings_of(q, name).blocked
        asked = await page.js("document.querySelector('#ask').innerText")
        assert all(one in asked for one in (f"Block {name}?", "Yes, block", "Leave it"))
        await (page.click("#ask [value=go]") if by == "click" else page.key("Enter"))
        await eventually(lambda: settings_of(q, name).blocked)
        await eventually(lambda: in_line(q) == ["user:alice"])
        await page.until(f"{client_row(name)}.innerText.includes('blocked')")
        unblock = "Unblock " + name
        await page.click(button(unblock if by != "click" else f"Block {name}"))  # pressed again
        await eventually(lambda: not settings_of(q, name).blocked)
        await page.until(f"!document.querySelector({json.dumps(button(unblock))})")


async def test_all_who_are_blocked_are_shown_and_unblocked(browser: Browser) -> None:
    settings = {"ips__blocked": ["10.0.0.9"], "clients": {"user:eve": {"blocked": True}}}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        async with opened(browser, q) as page:
            shown = await page.until("document.querySelector('#blocked').innerText")
            assert "user:eve" in shown
            assert "ip:10.0.0.9" in shown
            for name in ("ip:10.0.0.9", "user:eve"):
                await page.click(button(f"Unblock {name}"))
                await eventually(lambda name=name: not settings_of(q, name).blocked)
                await page.until(
                    f"!document.querySelector('#blocked').innerText.includes({json.dumps(name)})"
                )
            for number in range(15):
                path = f"/llmq/clients/user:{number}"
                await ask(q.port, "POST", path, json={"blocked": True})
            await page.until("document.querySelector('#blocked').innerText.includes('and 3 more')")


async def test_shares_are_in_per_cent_and_what_was_served_is_in_the_title(browser: Browser) -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        for name, seconds in ("user:a", 90.0), ("user:b", 10.0):
            q.gateway.clients.named(name).served = seconds
        async with opened(browser, q) as page:
            for name, share, served in ("user:a", "90 %", "1 min 30 s"), ("user:b", "10 %", "10 s"):
                row = await page.until(f"{client_row(name)}.innerText")
                assert share in row
                title = await page.js(f"{client_row(name)}.querySelector('.who').title")
                assert title == f"{name}\n{served} served"
                wide = f"{client_row(name)}.querySelector('.bar i').style.width"
                assert await page.js(wide) == share.replace(" ", "")


@pytest.mark.deadline(20)
async def test_backends_are_drained_and_their_models_loaded(browser: Browser) -> None:
    models = ["loaded", "other", "third"]
    with recorded() as asked:
        async with FakeBackend(kind="ollama", models=models) as fake:
            fake.loaded = models[:1]
            async with running(backends={"box.1": {"url": fake.url}}) as q:
                (box,) = q.gateway.fleet.backends.values()
                await q.gateway.monitor.refresh()
                async with opened(browser, q, bears="501 (Not Implemented)") as page:
                    await page.click(button("Drain box.1"))
                    await eventually(lambda: box.draining)
                    await page.until(
                        "document.querySelector('#devices').innerText.includes('drain')"
                    )
                    await page.click(button("Resume box.1"))
                    await eventually(lambda: not box.draining)
                    await page.click(button("Unload loaded on box.1"))
                    await eventually(lambda: len(asked) == 1)
                    load = json.dumps(button("Load other on box.1"))
                    assert not await page.js(f"document.querySelector({load})")
                    await page.until(
                        "document.querySelector('summary').innerText === '2 models not loaded'"
                    )
                    await page.click("summary")
                    await page.until(f"document.querySelector({load})")
                    await page.key("p")  # what is open is no dialog: keys go on working
                    await eventually(lambda: q.gateway.scheduler.mode is llmq.Mode.PAUSED)
                    await page.click(button("Load other on box.1"))
                    await page.until(
                        "document.querySelector('#toasts').innerText.includes("
                        "'Not done: box cannot load models')"
                    )
                    await page.click("summary")
                    await page.until(f"!document.querySelector({load})")
        assert asked == [
            {"action": "unload", "model": "loaded", "backend": "box.1"},
            {"action": "load", "model": "other", "backend": "box.1"},
        ]


async def test_models_that_are_split_over_cpu_and_gpu_are_marked(browser: Browser) -> None:
    rows = [{"name": "half", "size": 8, "size_vram": 6}, {"name": "whole", "size": 8}]
    rows[1]["size_vram"] = 8
    async with FakeBackend(["half", "whole"], "ollama") as fake:
        fake.probe_answers["/api/ps"] = 200, {"models": rows}
        async with running(f"box={fake.url}") as q, opened(browser, q) as page:
            await page.until(
                "document.querySelector('#devices').innerText.includes('half · 75 % on GPU')"
            )
            text = await page.js("document.querySelector('#devices').innerText")
            assert "whole" in text
            assert text.count("on GPU") == 1


async def test_fingers_find_every_button(browser: Browser) -> None:
    async with queue_of("alice", "bob") as q, opened(browser, q) as page:
        await page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        await page.look(390, 844)
        await page.until("matchMedia('(pointer: coarse)').matches")
        small = await page.js(
            "[...document.querySelectorAll('button, summary, #modes label')].filter(n => {"
            "const r = n.getBoundingClientRect();"
            "return r.width && (r.width < 44 || r.height < 44); }).map(n => n.outerHTML)"
        )
        assert not small
        assert await page.js("document.documentElement.scrollWidth") == 390
        tops = await page.js(
            "[...document.querySelectorAll('#clients tbody tr')].map(n => new Set("
            "[...n.querySelectorAll('.n')].map(e => e.getBoundingClientRect().top)).size)"
        )
        assert set(tops) == {1}, "counts are not in a line"
        overlap = await page.js(
            "[...document.querySelectorAll('#clients tbody tr')].some(n => { const all = "
            "[...n.querySelectorAll('b, small, .n, button')].map(e => e.getBoundingClientRect());"
            "return all.some((a, i) => all.some((b, j) => i < j && a.left < b.right - 1 && b.left <"
            " a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)); })"
        )
        assert not overlap


async def test_selection_and_focus_stay_while_rows_come_and_go(browser: Browser) -> None:
    async with queue_of("alice", "bob", "carol") as q, opened(browser, q) as page:
        await select(page, "bob")
        focused = f"document.activeElement === {row('bob')}"
        assert await page.js(focused)
        call = next(c for c in q.gateway.calls.values() if c.ticket.client.name == "user:carol")
        q.gateway.reprioritise(call, llmq.Priority.HIGH)
        await page.until(f"{row('carol')}.rowIndex < {row('bob')}.rowIndex")
        assert await page.js(focused)
        call = next(c for c in q.gateway.calls.values() if c.ticket.client.name == "user:bob")
        q.gateway.cancel(call)
        await page.until(f"!{row('bob')}")
        assert await page.js("document.querySelector('#queue [aria-current]').innerText")


async def test_theme_is_chosen_and_remembered(browser: Browser) -> None:
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(14, 16, 20)'"
    async with FakeBackend() as fake, running(fake.url) as q, opened(browser, q) as page:
        await page.look(1024, 800, "dark")
        await page.until(dark)
        await page.key("t")
        await page.until(f"!({dark})")
        await page.click("#theme")
        await page.look(1024, 800, "light")
        await page.until(dark)
        await page.goto(q.base + "/llmq")
        await page.until(f"{dark} && document.querySelector('#theme').innerText === 'Theme: dark'")
        await page.key("?")
        await page.until("document.querySelector('#map').innerText.includes('raise its class')")


# ---- Jobs and usage --------------------------------------------------------------------------


async def post_job(q: running, client: str, text: str = "hi", model: str = "m") -> str:
    """Ask for something that may be answered later; the job's id."""
    headers = {"Prefer": "respond-async", "X-User-ID": client}
    path = q.service.settings.server.base_path + "/v1/chat/completions"
    answer = await ask(q.port, "POST", path, json=chat(text, model=model), headers=headers)
    assert answer.status == 202
    return str(answer.json()["id"])


@contextlib.asynccontextmanager
async def jobs_of(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[running, list[str]]]:
    """A job of carol that is done, one of bob that runs and one of dave that waits; a cache hit."""
    kept = {"server__state": str(tmp_path / "s.db"), "cache__chat": True, **settings}
    async with FakeBackend() as fake, running(f"box={fake.url}", **kept) as q:
        path = q.service.settings.server.base_path + "/v1/chat/completions"
        for _ in range(2):
            body, name = chat("hi", temperature=0), {"X-User-ID": "alice"}
            assert (await ask(q.port, "POST", path, json=body, headers=name)).status == 200
        made = [await post_job(q, "carol", "the result")]
        await eventually(lambda: not q.gateway.jobs.queued)
        fake.hold()
        made.append(await post_job(q, "bob"))
        await eventually(lambda: fake.active)
        made.append(await post_job(q, "dave"))
        await waiting(q, 1)
        yield q, made
        fake.release()
        await eventually(lambda: not q.gateway.calls and not q.gateway.jobs.queued)


def text_of(place: str) -> str:
    """An expression: what is read there."""
    return f"document.querySelector({json.dumps(place)}).innerText"


def rows_of(place: str, expression: str = "n.innerText") -> str:
    """An expression: this of each row of the table there."""
    return f"[...document.querySelectorAll('{place} tbody tr')].map(n => {expression})"


async def test_who_has_used_nothing_is_shown_nothing_of_jobs_and_usage(
    browser: Browser, tmp_path: Path
) -> None:
    state = {"server__state": str(tmp_path / "s.db")}
    async with FakeBackend() as fake, running(fake.url, **state) as q:
        async with opened(browser, q) as page:
            await page.until("LISTS.usage.rows")
            assert await page.js("document.querySelector('#used').hidden")
            assert not [url for url in page.requests if "/v1/jobs" in url]
            await q.chat("hi")
            await page.until("!document.querySelector('#used').hidden")
            told = await page.until(text_of("#used .head"))
            assert re.search(r"Today 1 request, 0 hits, 1 token in, 1 out, ran for \d+ ms", told)
            assert "Jobs " not in told.replace("Jobs and usage", "")
            assert "Cache" not in told
        q.gateway.journal.days.clear()  # as on the next morning
        async with opened(browser, q) as page:
            await page.until("LISTS.usage.rows && !document.querySelector('#used').hidden")


async def test_jobs_hits_and_what_was_used_today_are_told(browser: Browser, tmp_path: Path) -> None:
    async with jobs_of(tmp_path) as (q, _), opened(browser, q) as page:
        await page.until(f"{text_of('#used .head')}.includes('Today')")
        told = await page.js(text_of("#used .head"))
        assert "Jobs 1 queued, 1 running" in told
        assert "Cache 1 answer, 1 KiB, 50 % of 2 answered from it" in told
        assert "Today 3 requests, 1 hit, 2 tokens in, 3 out" in told


async def test_usage_is_a_table_with_the_newest_day_first(browser: Browser, tmp_path: Path) -> None:
    async with jobs_of(tmp_path) as (q, _):
        earlier = llmq.day_of(int(time.time()) - 86400)
        await q.gateway.store.write(
            (llmq.ADD_USAGE, [(earlier, "user:eve", "old:8b", 1234, 34, 56789, 9, 65.0)])
        )
        async with opened(browser, q) as page:
            await page.until("document.querySelector('#used .head b')")
            assert not await page.js(rows_of("#usage"))
            await page.js("document.querySelector('#usage summary').focus()")
            await page.key("Enter")
            await page.until(f"{rows_of('#usage')}.length === 3")
            texts = "[...(one.children[0] ? one.children : [one])].map(part => part.textContent)"
            cells = await page.js(rows_of("#usage", f"[...n.cells].map(one => {texts})"))
            today = [llmq.day_of(int(time.time()))]
            assert [row[0] for row in cells] == [today, today, [earlier]]
            assert cells[0][1:3] == [["user:alice", "m"], ["2 requests", cells[0][2][1]]]
            assert cells[0][2][1].startswith("1 hit, ran for ")
            assert cells[2][1:] == [
                ["user:eve", "old:8b"],
                ["1,234 requests", "34 hits, ran for 1 min 5 s"],
                ["56,789 tokens in", "9 out"],
            ]
            assert await page.js(text_of("#usage summary")) == "Usage of the last 7 days"
            heads = "[...document.querySelectorAll('#usage th')].map(n => n.scope)"
            assert set(await page.js(heads)) == {"col"}
            await page.key("Enter")
            await page.until("!document.querySelector('#usage').open")


async def test_without_a_state_file_usage_is_told_since_the_start(browser: Browser) -> None:
    async with FakeBackend() as fake, running(fake.url) as q, opened(browser, q) as page:
        await q.chat("hi")
        await page.until("!document.querySelector('#used').hidden")
        for name, count in ("usage", 1), ("jobs", 0):
            await page.click(f"#{name} summary")
            await page.until(f"LISTS.{name}.rows && {rows_of('#' + name)}.length === {count}")
        await page.until(f"{text_of('#usage summary')} === 'Usage since the start'")
        await page.until(f"{text_of('#jobs .empty')}.includes('Prefer: respond-async')")


@pytest.mark.parametrize("base", ["", "/box"])
async def test_jobs_are_listed_with_their_results(
    browser: Browser, tmp_path: Path, base: str
) -> None:
    async with jobs_of(tmp_path, server__base_path=base) as (q, made):
        async with opened(browser, q, f"{base}/llmq") as page:
            await page.click("#jobs summary")
            await page.until(f"{rows_of('#jobs')}.length === 3")
            shown = await page.js(rows_of("#jobs"))
            for text, words in zip(
                shown,
                (
                    ["user:dave", "queued", "low", "place 1", "Cancel"],
                    ["user:bob", "running", "runs since ", "Cancel"],
                    ["user:carol", "succeeded", "took ", "Result"],
                ),
            ):
                assert all(word in text for word in words), (text, words)
            links = "[...document.querySelectorAll('#jobs a')].map(n => n.href)"
            (link,) = await page.js(links)
            assert link == f"{q.base}{base}/v1/jobs/{made[0]}/result"
            answer = await page.js(f"fetch({json.dumps(link)}).then(one => one.json())")
            assert answer["choices"][0]["message"]["content"] == "the result"
            names = "[...document.querySelectorAll('#jobs :is(a, button)')].map(n => n.ariaLabel)"
            assert await page.js(names) == [
                f"Cancel the job {made[2]} of user:dave",
                f"Cancel the job {made[1]} of user:bob",
                f"Result of the job {made[0]} of user:carol",
            ]


async def test_jobs_are_cancelled_once_that_is_confirmed(browser: Browser, tmp_path: Path) -> None:
    async with jobs_of(tmp_path, server__base_path="/box") as (q, made):
        async with opened(browser, q, "/box/llmq") as page:
            await page.click("#jobs summary")
            for client, ident in ("dave", made[2]), ("bob", made[1]):
                await page.click(button(f"Cancel the job {ident} of user:{client}"))
                asked = await page.until(
                    f"document.querySelector('#ask').open && {text_of('#ask')}"
                )
                assert f"user:{client} wants m." in asked
                (before,) = [
                    row["status"]
                    for row in (await ask(q.port, "GET", "/box/v1/jobs?all=1")).json()["data"]
                    if row["id"] == ident
                ]
                assert before in ("queued", "running")
                await page.click("#ask [value=go]")
                await page.until(
                    f"{rows_of('#jobs')}.some(one => one.includes('user:{client}') &&"
                    " one.includes('cancelled') && !one.includes('Result'))"
                )
                told = f"Cancelled: the job of user:{client}, m"
                await page.until(f"{text_of('#toasts')}.includes({json.dumps(told)})")
            await page.until(f"!{text_of('#used .head')}.includes('queued')")


async def test_what_is_open_follows_what_goes_on_but_asks_seldom(
    browser: Browser, tmp_path: Path
) -> None:
    async with jobs_of(tmp_path) as (q, _), opened(browser, q) as page:
        for name in ("usage", "jobs"):
            await page.click(f"#{name} summary")
        await page.until(f"{rows_of('#jobs')}.length === 3")
        for number, client in enumerate(("erin", "frank", "grace"), 2):
            await post_job(q, client)
            await page.until(f"snap.jobs.queued === {number}")
        await page.until(f"{rows_of('#jobs')}.length === 6")
        for path in ("/v1/jobs", "/llmq/usage"):
            asked = await page.js(
                "performance.getEntriesByType('resource').filter("
                f"one => one.name.includes('{path}')).map(one => one.startTime)"
            )
            assert len(asked) > 1
            assert all(later - one > 2500 for one, later in zip(asked, asked[1:])), path
        for name in ("usage", "jobs"):
            await page.click(f"#{name} summary")
            await page.until(f"!document.querySelector('#{name}').open")
        page.requests.clear()
        await page.js("for (const id in LISTS) LISTS[id].at = -9e9")
        await post_job(q, "heidi")
        await page.until("snap.jobs.queued === 5")
        assert not page.requests


async def test_hostile_names_of_jobs_and_usage_stay_text(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile = llmq.Caller(HOSTILE, foreign=False)
    monkeypatch.setattr(llmq, "identify", lambda *_facts: hostile)
    monkeypatch.setattr(llmq, "printable", lambda text, _limit=0: text)
    state = {"server__state": str(tmp_path / "s.db")}
    async with FakeBackend(models=[HOSTILE], auto=False) as fake, running(fake.url, **state) as q:
        await post_job(q, "x", model=HOSTILE)
        await (await fake.arrived()).status(500, {"error": {"message": HOSTILE}})
        await eventually(lambda: not q.gateway.jobs.queued)
        await post_job(q, "x", model=HOSTILE)
        request = await fake.arrived()
        async with opened(browser, q) as page:
            for name in ("usage", "jobs"):
                await page.click(f"#{name} summary")
                for place in ("b", "small"):
                    shown = await page.until(
                        f"document.querySelector('#{name} .who {place}').textContent"
                    )
                    assert shown == HOSTILE
            why = await page.until("document.querySelector('#jobs .alarm').textContent")
            assert HOSTILE in why
            await page.click("#jobs td button")
            await assert_asks_and_tells_as_text(page)
        await request.left()


async def test_who_may_not_see_all_jobs_is_told_so(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llmq.JobRoutes, "may_steer", lambda *_: False)
    async with jobs_of(tmp_path) as (q, _), opened(browser, q, bears="403 (Forbidden)") as page:
        await page.click("#jobs summary")
        await page.until(f"{text_of('#jobs .empty')}.startsWith('all jobs are shown to who')")


# ---- What it bears ---------------------------------------------------------------------------


@pytest.mark.deadline(20)
async def test_page_is_back_after_a_restart(browser: Browser) -> None:
    async with FakeBackend() as fake, contextlib.AsyncExitStack() as stack:
        async with running(fake.url) as q:
            page = await stack.enter_async_context(opened(browser, q, bears=REFUSED))
        await page.until("document.body.className === 'lost'")
        await page.until("document.querySelector('#notes').innerText.includes('asked again')")
        await page.key("p")
        await page.until("document.querySelector('#toasts').innerText.includes('nothing was')")
        async with running(fake.url, server__port=q.port) as again:
            await ask(again.port, "POST", "/llmq/mode", json={"mode": "paused"})
            await page.until("document.title === 'llmq — paused' && live")
            await eventually(lambda: again.service.api.stream.watchers == 1)


@pytest.mark.deadline(20)
async def test_silence_is_noticed(browser: Browser) -> None:
    async with Process("--demo", "--port", "0") as p, browser.page() as page:
        await page.goto(f"http://127.0.0.1:{p.port}/llmq")
        await page.until(f"live && {LIVE}")
        p.signal(signal.SIGSTOP)
        try:
            await page.js("got -= 20e3")  # as if it had been silent for so long
            await page.until("document.title.includes('reconnecting')", 8)
        finally:
            p.signal(signal.SIGCONT)
        await page.until("live")


@pytest.mark.deadline(20)
async def test_tabs_have_one_stream_each_while_they_are_seen(browser: Browser) -> None:
    async with FakeBackend() as fake, running(fake.url) as q, contextlib.AsyncExitStack() as stack:
        tabs = [await stack.enter_async_context(opened(browser, q)) for _ in range(3)]
        stream = q.service.api.stream
        await eventually(lambda: stream.watchers == 3)
        async with browser.page(beside=tabs[0]) as cover:  # a tab in front of the first one
            await tabs[0].until("document.hidden")
            await eventually(lambda: stream.watchers == 2)
            await cover.goto(q.base + "/llmq")
            await cover.until(LIVE)
            await eventually(lambda: stream.watchers == 3)
            await q.chat("hi")
            assert not await tabs[0].js("snap.recent.length")
        await tabs[0].until("!document.hidden && snap.recent.length")
        await eventually(lambda: stream.watchers == 3)
        for tab in tabs:
            assert sum(url.endswith("/llmq/events") for url in tab.requests) <= 2


def take_times(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, list[float]]:
    """Seconds that each call of these functions takes from now on; none may be inside another."""
    times: dict[str, list[float]] = {name: [] for name in names}
    at_work: list[str] = []

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            assert not at_work, f"{name} inside {at_work[0]}: it has no turn of its own"
            at_work.append(name)
            tracer = sys.gettrace()  # coverage's would double what it takes
            sys.settrace(None)
            began = time.thread_time()  # of this process alone: the machine may be busy
            result = work(*given, **options)
            times[name].append(time.thread_time() - began)
            sys.settrace(tracer)
            at_work.clear()
            return result

        return run

    for name in names:
        monkeypatch.setattr(llmq, name, timed(name, getattr(llmq, name)))
    return times


@pytest.mark.deadline(30)
async def test_ten_thousand_that_wait_and_twenty_that_watch_hold_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend(auto=False) as fake:
        async with running(fake.url, upstream__probe_interval=3600) as q:
            crowd(q, 10000)
            gc.collect()
            gc.freeze()  # as `serve` does: else the collector walks all that other tests left
            times = take_times(monkeypatch, "snapshot", "forecast")
            spent = times["snapshot"]
            gc.collect()
            gc.freeze()  # as `serve` does
            try:
                viewers = [await Raw.open(q.port) for _ in range(20)]
                for viewer in viewers:
                    await viewer.send(http("GET", "/llmq/events"))
                for viewer in viewers:
                    await viewer.until(b"\n\n")
                assert q.service.api.stream.watchers == 20
                assert len(spent) <= 5, "each rendered its own"
                for turn in range(8):
                    before, q.gateway.config_error = len(spent), f"turn {turn}"
                    q.gateway.pump()
                    for viewer in viewers:
                        await viewer.until(b'"config_error":"turn %d"' % turn)
                    assert len(spent) <= before + 3, "each rendered its own"
                    assert (await ask(q.port, "GET", "/health")).status == 200
            finally:
                gc.unfreeze()
                gc.unfreeze()
            assert max(spent) < 0.05, "half of what the design lets the loop be held for"
            assert min(times["forecast"]) < 0.05, "the others beside whatever else runs here"
            for ticket in list(q.gateway.scheduler.waiting.values()):
                q.gateway.scheduler.cancel(ticket)
            q.gateway.calls.clear()


def crowd(q: running, number: int) -> None:
    """Let so many wait, without a connection each."""
    gateway = q.gateway
    gateway.scheduler.mode = llmq.Mode.PAUSED
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"
    request = llmq.parse_request_head(head)
    for at in range(number):
        client = gateway.clients.named(f"user:{at % 50}")
        connection: Any = SimpleNamespace(stream=llmq.Stream(), address="127.0.0.1")
        exchange = llmq.Exchange(connection, request)
        exchange.id = exchange.request_id = f"x-{at}"
        ids, endpoint = (exchange.id, exchange.request_id), llmq.ENDPOINTS[llmq.CHAT]
        call = llmq.Call(exchange, endpoint, request, llmq.NOBODY, ids)
        call.model, priority = "m", list(llmq.Priority)[at % 3]
        call.ticket = llmq.Ticket(call.id, client, llmq.Want("m"), priority, 100)
        gateway.calls[call.id] = call
        gateway.scheduler.submit(call.ticket, gateway.now())


# ---- How it looks ----------------------------------------------------------------------------


def axe() -> str:
    """The checker's source, installed once beside the other peers."""

    def make(target: Path) -> None:
        target.mkdir()
        quiet = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
        npm = peers.found("npm")
        at = f"--prefix={target}"
        peers.run(npm, "install", at, *quiet, "--fetch-retries=1", f"axe-core@{AXE}", cwd=target)

    file = "node_modules/axe-core/axe.min.js"
    try:
        return (peers.made("axe", AXE, make, file) / file).read_text(encoding="utf-8")
    except peers.Missing as missing:
        need(False, f"axe-core: {missing}")
        raise


@contextlib.asynccontextmanager
async def state(name: str) -> AsyncIterator[tuple[running, FakeBackend]]:
    """llmq with nothing to do, with much to do, or in trouble."""
    clients = ("cron", "editor", "open-webui", "alice", "nightly-report", "editor", "cron")
    models = ["qwen3:8b", "llama3.2:3b", "qwen3-coder:30b"]
    async with FakeBackend(kind="ollama", models=models, auto=False) as ollama:
        async with FakeBackend(kind="vllm", models=["mistral-small"], auto=False) as vllm:
            ollama.loaded = models[:1]
            backends = {"ollama": {"url": ollama.url}, "vllm": {"url": vllm.url, "device": "gpu"}}
            more = {"devices": {"gpu": {"slots": 4}}, "upstream.probe_interval": 0.5}
            async with running(backends=backends, **more) as q:
                await q.gateway.monitor.refresh()
                sent = []
                if name != "empty":
                    for at, client in enumerate(clients):
                        await finish(q, ollama, client, models[at % 2], 40 * at)
                    sent.append(await begin(q, "open-webui", models[0], stream=True))
                    request = await ollama.arrived()
                    await request.start_stream()
                    for _ in range(40):
                        await request.piece("word ")
                    sent.append(await begin(q, "alice", "mistral-small"))
                    await vllm.arrived()
                    for at, client in enumerate(clients):
                        urgency = "high" if client == "editor" else "low" if at == 4 else "normal"
                        sent.append(await begin(q, client, models[at % 3], priority=urgency))
                    await waiting(q, len(clients))
                if name == "broken":
                    await ollama.stop_listening()
                    await vllm.stop_listening()
                    q.gateway.config_error = "llmq.toml: [queue] slotz is not known: slots?"
                    await ask(q.port, "POST", "/llmq/mode", json={"mode": "priority"})
                    backends = q.gateway.fleet.backends.values()
                    await eventually(lambda: all(b.state is llmq.State.DOWN for b in backends))
                yield q, vllm
                for raw in sent:
                    raw.close()
                await eventually(lambda: not q.gateway.calls)


async def finish(
    q: running, fake: FakeBackend, client: str, model: str, pieces: int, pace: float = 0
) -> None:
    """A request from beginning to end, `pace` seconds a piece; none but the first is an error."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    raw = await begin(q, client, model, **options)
    request = await fake.arrived()
    if not pieces:
        await request.status(500, {"error": {"message": "out of memory"}})
    else:
        await passed(20 * pace)
        await request.start_stream()
        for _ in range(pieces):
            await passed(pace)
            await request.piece("word ")
        await request.finish_stream(pieces)
    await raw.response()


async def passed(seconds: float) -> None:
    """So much time, for pictures of what takes time."""
    end = time.monotonic() + seconds
    await eventually(lambda: time.monotonic() >= end)


@pytest.mark.deadline(30)
@pytest.mark.parametrize("name", ["empty", "busy", "broken"])
async def test_page_is_for_everybody_at_every_width_in_both_themes(
    browser: Browser, name: str
) -> None:
    async with state(name) as (q, _), opened(browser, q) as page:
        if name == "busy":  # with every mark and control that there is
            await mark(q)
            await page.click("summary")
            await page.until("document.querySelector('#blocked').innerText.includes('eve')")
            await page.until("document.querySelector('details button')")
        await look_at(page, name)


@pytest.mark.deadline(30)
async def test_jobs_and_usage_are_for_everybody_at_every_width_in_both_themes(
    browser: Browser, tmp_path: Path
) -> None:
    async with jobs_of(tmp_path) as (q, _), opened(browser, q) as page:
        for name in ("usage", "jobs"):
            await page.click(f"#{name} summary")
            await page.until(f"{rows_of('#' + name)}.length > 1")
        await look_at(page, "used")
        await page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        await page.until("matchMedia('(pointer: coarse)').matches")
        sizes = await page.js(
            "[...document.querySelectorAll('#used :is(a, button, summary)')].map(n => {"
            "const r = n.getBoundingClientRect(); return Math.min(r.width, r.height); })"
        )
        assert len(sizes) == 5
        assert min(sizes) >= 44, "fingers miss it"


async def look_at(page: Page, name: str) -> None:
    """Whether all of it can be seen and used at every width, in both themes."""
    shots = peers.CACHE / "pictures"  # for people to look at
    shots.mkdir(parents=True, exist_ok=True)
    await page.js(axe() + "; 0")
    for theme in ("light", "dark"):
        for width in WIDTHS:
            await page.look(width, 900, theme)
            await page.until(f"innerWidth === {width}")
            assert await page.js("document.documentElement.scrollWidth") == width
            height = await page.js("document.documentElement.scrollHeight")
            picture = await page.shot()
            assert picture.startswith(b"\x89PNG")
            (shots / f"{name}-{width}-{theme}.png").write_bytes(picture)
            assert height < 6000
            if width == 1024:
                continue
            found = await page.js(
                "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
            )
            assert not found, (width, theme)


async def mark(q: running) -> None:
    """Make one client VIP, boost one, block one."""
    changes = {"editor": {"class": "high"}, "alice": {"boost": True}, "eve": {"blocked": True}}
    for client, change in changes.items():
        await ask(q.port, "POST", f"/llmq/clients/user:{client}", json=change)


async def take_pictures(browser: Browser) -> None:
    """The README's: a busy minute, in three sizes."""
    folder = ROOT / "tests" / "pictures"
    folder.mkdir(exist_ok=True)
    people = ("open-webui", "editor", "cron", "alice", "nightly-report")
    async with state("busy") as (q, vllm), opened(browser, q) as page:
        await page.look(1440, 900)
        for at in range(26):
            pieces = (37 * at) % 90 + 12
            await finish(q, vllm, people[at % 5], "mistral-small", pieces, 0.02 + at % 4 / 100)
        await mark(q)
        sizes = {"wide": (1440, 1180, "light"), "dark": (1024, 800, "dark")}
        for file, look in {**sizes, "phone": (390, 844, "light")}.items():
            await page.look(*look)
            await page.until(f"innerWidth === {look[0]}")
            await passed(1.2)
            (folder / f"page-{file}.png").write_bytes(await page.shot(whole=False))


if __name__ == "__main__":
    chromium = Browser(require_command("chromium"))
    try:
        asyncio.run(take_pictures(chromium))
    finally:
        chromium.close()
