"""A real Chromium, driven over its debugging pipe with nothing but the standard library.

browser = Browser(require_command("chromium"))          # once; browser.close() at the end
async with browser.page() as page:                      # a tab with storage of its own
    await page.goto(url)
    await page.until("document.title === 'ready'")      # waits inside the page
    await page.click("#button")
    assert not page.errors
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage
--disable-extensions --mute-audio --force-color-profile=srgb --remote-debugging-pipe about:blank"""
START = """import fcntl, os, sys
pair = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(pair[0], 3), os.dup2(pair[1], 4), os.execv(sys.argv[3], sys.argv[3:])"""
WAIT = """new Promise((good, bad) => { const end = Date.now() + %d, look = () => {
  let found; try { found = (%s); } catch (error) { found = false; }
  if (found) good(found); else if (Date.now() > end) bad(new Error('never true'));
  else setTimeout(look, 15); }; look(); })"""
KEYS = {"Escape": 27, "Enter": 13, "Tab": 9, "ArrowDown": 40, "ArrowUp": 38}


class Browser:
    """The process and its two pipes: commands on its descriptor 3, answers on 4."""

    def __init__(self, program: str, *more: str) -> None:
        self.home = tempfile.mkdtemp(prefix="llmq-cdp-")
        commands, self.out = os.pipe()
        self.answers, answers = os.pipe()

        flags = [*FLAGS.split(), *more, f"--user-data-dir={self.home}"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(commands), str(answers), program, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(commands, answers),
        )
        os.close(commands)
        os.close(answers)
        self.number = 0
        self.data = b""
        self.calls: dict[int, asyncio.Future[Any]] = {}
        self.pages: dict[str, Page] = {}  # by session

    def close(self) -> None:
        os.close(self.out)  # it ends when its commands do
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.answers)
        shutil.rmtree(self.home, ignore_errors=True)  # Chromium writes there for a moment

    async def call(self, method: str, session: str = "", **params: Any) -> Any:
        """Send one command; its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        done = self.calls[self.number] = asyncio.get_running_loop().create_future()
        os.write(self.out, json.dumps(message).encode() + b"\0")
        return await done

    def read(self) -> None:
        """Whatever has come: results to who waits for them, events to their page."""
        self.data += os.read(self.answers, 1 << 20)
        *whole, self.data = self.data.split(b"\0")
        for message in map(json.loads, whole):
            if "id" not in message:
                if page := self.pages.get(message.get("sessionId", "")):
                    page.note(message["method"], message["params"])
            elif (done := self.calls.pop(message["id"])) and not done.done():
                if "error" in message:
                    done.set_exception(AssertionError(message["error"]["message"]))
                else:
                    done.set_result(message["result"])

    @contextlib.asynccontextmanager
    async def page(self, beside: Page | None = None) -> AsyncIterator[Page]:
        """A new tab; `beside` another one it shares storage and window with it."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.answers, self.read)
        context = beside.context if beside else (await self.call("Target.createBrowserContext"))
        made = await self.call("Target.createTarget", url="about:blank", **context)
        target = {"targetId": made["targetId"]}
        session = (await self.call("Target.attachToTarget", **target, flatten=True))["sessionId"]
        page = self.pages[session] = Page(self, session, context)
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            yield page
        finally:
            await self.call("Target.closeTarget", **target)
            del self.pages[session]
            if not beside:
                await self.call("Target.disposeBrowserContext", **context)
            if not self.pages:
                loop.remove_reader(self.answers)


class Page:
    """One tab: what it asked for, what went wrong in it, and hands for it."""

    def __init__(self, browser: Browser, session: str, context: dict[str, str]) -> None:
        self.browser = browser
        self.session = session
        self.context = context
        self.errors: list[str] = []
        self.requests: list[str] = []  # the URLs

    def note(self, event: str, facts: Any) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = facts["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.errors.append(facts["entry"]["text"] + " " + facts["entry"].get("url", ""))
        elif event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
            self.errors.append(str([one.get("value") for one in facts["args"]]))

    async def call(self, method: str, **params: Any) -> Any:
        return await self.browser.call(method, self.session, **params)

    async def goto(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def js(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        facts = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = await self.call("Runtime.evaluate", **facts)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            said = details.get("exception", {}).get("description", details["text"])
            raise AssertionError(f"{expression[:500]}: {said}")
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 5) -> Any:
        """The expression's first true value."""
        return await self.js(WAIT % (1000 * seconds, expression))

    async def click(self, selector: str) -> None:
        """Press the mouse in the middle of the first element that the selector finds.

        It is pressed once the element stands still and nothing lies over it: a list that comes
        in between the look and the press would move it away.
        """
        x, y = await self.until(
            f"(e => {{ if (!e || e.hidden) return; e.scrollIntoView({{block: 'nearest'}});"
            " const r = e.getBoundingClientRect(), at = [r.x + r.width / 2, r.y + r.height / 2];"
            " const still = `${at}` === e.stoodAt; e.stoodAt = `${at}`;"
            " const hit = document.elementFromPoint(...at);"
            " return r.width && still && e.contains(hit) && at;"
            f" }})(document.querySelector({json.dumps(selector)}))"
        )
        spot = {"x": x, "y": y, "button": "left", "clickCount": 1}
        press, release = (
            self.call("Input.dispatchMouseEvent", type=kind, **spot)
            for kind in ("mousePressed", "mouseReleased")
        )
        await asyncio.gather(press, release)  # nothing is drawn between the two

    async def key(self, key: str) -> None:
        facts: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, ord(key[0]))}
        if len(key) == 1 or key == "Enter":
            facts["text"] = "\r" if key == "Enter" else key
        await self.call("Input.dispatchKeyEvent", type="keyDown", **facts)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def look(self, width: int, height: int, theme: str = "light", scale: int = 1) -> None:
        """How wide the window is, and what the system's theme."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        await self.call("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)

    async def shot(self, *, whole: bool = True) -> bytes:
        """The page as a PNG, from top to bottom, or what the window shows of it."""
        picture = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(picture["data"])
