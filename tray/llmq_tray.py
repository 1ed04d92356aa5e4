#!/usr/bin/env python3
"""llmq's tray icon: how deep the queue is, whether it is well, and the switches one wants at hand.

First what is pure: `reduce` (what follows from what happens), `view` (what is to be seen of it),
`draw`.  Then the link to llmq, and what a click may do to this box.  `Shell` alone knows pystray.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import plistlib
import queue
import random
import re
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

# ---- State: what is known, and what follows from what happens ------------------------------------

SHOWN = 3  # requests that wait, in the menu
CONFIRM_SECONDS = 10.0  # for the second click, which stops llmq although requests run
FULL_SECONDS = 60.0  # without a refusal, and the queue is no longer full
TOLD = float("inf")
TROUBLES = {  # seconds of patience (a restart is no death), and what is told then
    "dead": (3.0, "llmq is gone", "It ended or lost its connection, and nobody had asked it to."),
    "runners": (30.0, "No runner answers", "llmq runs, but none of its runners answers."),
    "full": (0.0, "The queue is full", "llmq refuses requests: too many are waiting."),
}
BUSY = {"open": "Opening…", "paused": "Pausing…", "priority": "Making way…"}
FREED = "The GPU is being freed", "llmq is paused, and unloads every model once nothing runs on it."


class Wait(NamedTuple):
    """A request that waits."""

    client: str
    model: str
    minutes: int
    reason: str


@dataclass(frozen=True)
class State:
    url: str = "http://127.0.0.1:11500"
    local: bool = True  # llmq is on this box: it may be started and stopped from here
    link: str = "connecting"  # "up", "absent" (nothing listens), "down", "foreign", "denied", …
    why: str = ""  # llmq's own words where it does not let the tray in
    mode: str = "open"
    waiting: int = 0
    running: int = 0
    waits: tuple[Wait, ...] = ()  # of the first hundred those that wait longest
    oldest: int = 0  # minutes that the oldest waits, which may stand behind the first hundred
    runners_down: bool = False  # there are runners, and none can be used
    refused: int = 0  # requests so far that found the queue full
    full_until: float = 0.0
    busy: str = ""  # what was asked for and is not yet seen: "Pausing…"
    confirm_until: float = 0.0  # a second click on Stop counts
    may_start: bool = True  # nobody has tried yet
    stopping: bool = False  # the user wants it
    freed: bool = False  # llmq was paused from here to free the GPU, and has not been opened since
    dead: bool = False  # llmq was up and went unasked
    notify: bool = True
    login: bool = False  # the tray starts at login
    due: dict[str, float] = field(default_factory=dict)  # when to tell each present trouble


class Event(NamedTuple):
    kind: str  # "seen" a snapshot, "lost" the link, "click" a command, "done" with it, "tick"
    what: Any = None  # parts of the state, the state of the link, the command
    why: str = ""  # what went wrong
    goodbye: bool = False  # llmq itself ended the link, in good order


Effect = tuple[Any, ...]  # a command that `Shell.perform` knows, and its arguments
Step = tuple[State, list[Effect]]


def reduce(state: State, event: Event, now: float) -> Step:
    """The state after `event`, and what is to be done about it."""
    if now >= state.confirm_until:
        state = replace(state, confirm_until=0.0)
    steps = {"seen": seen, "lost": lost, "click": click, "done": done}
    state, effects = steps[event.kind](state, event, now) if event.kind in steps else (state, [])
    state, notes = judge(state, now)
    return state, [one for one in effects + notes if state.notify or one[0] != "tell"]


def seen(state: State, event: Event, now: float) -> Step:
    if state.link != "up":
        state = replace(state, link="up", busy="", dead=False)
    elif event.what["refused"] > state.refused:  # those before we looked are history
        state = replace(state, full_until=now + FULL_SECONDS)
    opened = state.mode == "paused" and event.what["mode"] != "paused"
    return replace(state, freed=state.freed and not opened, **event.what), []


def lost(state: State, event: Event, _now: float) -> Step:
    dead = state.dead or (state.link == "up" and not event.goodbye and not state.stopping)
    dead = dead and event.what not in ("denied", "untrusted")  # somebody answers
    state = replace(state, dead=dead, stopping=False)
    if event.what == "absent" and state.busy == "Starting…":
        return state, []  # it does not listen yet
    if event.what == "absent" and state.link == "connecting" and state.local and state.may_start:
        return replace(state, may_start=False, busy="Starting…"), [("start",)]
    return replace(state, link=event.what, why=event.why, busy="", confirm_until=0.0), []


def click(state: State, event: Event, now: float) -> Step:
    command = event.what
    if command in ("priority", "paused"):
        mode = "open" if state.mode == command else command
        return replace(state, busy=BUSY[mode]), [("mode", mode)]
    if command == "free":
        return replace(state, busy="Freeing the GPU…"), [("free",)]
    if command == "start":
        return replace(state, link="connecting", busy="Starting…", dead=False), [("start",)]
    if command == "stop" and state.running and not state.confirm_until:
        return replace(state, confirm_until=now + CONFIRM_SECONDS), []
    if command == "stop":
        return replace(state, busy="Stopping…", confirm_until=0.0, stopping=True), [("stop",)]
    switches = {"login": (not state.login,), "notify": (not state.notify,)}
    return state, [(command, *switches.get(command, ()))]


def done(state: State, event: Event, _now: float) -> Step:
    command, why, state = event.what, event.why, replace(state, busy="")
    changes: dict[str, Any] = {"start": {"link": "absent"}, "stop": {"stopping": False}}
    if not why:  # a switch is checked once it is done
        changes = {"login": {"login": not state.login}, "notify": {"notify": not state.notify}}
        changes["free"] = {"freed": True}
    state = replace(state, **changes.get(command, {}))
    notes: list[Effect] = [("tell", f"Could not do it: {command}", why)] * bool(why)
    notes += [("tell", *FREED)] * (command == "free" and not why)
    return state, [*notes, ("retry",)]


def judge(state: State, now: float) -> Step:
    """Tell of each trouble once, and once that it is over."""
    up, before = state.link == "up", state.due
    present = {"dead": state.dead, "runners": state.runners_down, "full": now < state.full_until}
    names = [name for name, is_so in present.items() if is_so and (up or name == "dead")]
    due = {name: before.get(name, now + TROUBLES[name][0]) for name in names}
    new = [name for name, when in due.items() if when <= now]
    over = [name for name, when in before.items() if when == TOLD and name not in due and up]
    notes: list[Effect] = [("tell", *TROUBLES[name][1:]) for name in new]
    notes += [("tell", "llmq is well again", f"Over: {TROUBLES[name][1]}.") for name in over]
    return replace(state, due={**due, **dict.fromkeys(new, TOLD)}), notes


# ---- View: what is to be seen --------------------------------------------------------------------


class Face(NamedTuple):
    words: str
    mark: str  # a key of MARKS, for nobody has to tell red from green
    tile: str
    band: str = ""  # the darker one behind the mark when there is a number, too
    ink: str = "#ffffff"


FACES = {
    "connecting": Face("connecting", "dots", "#6b7280"),
    "idle": Face("idle", "bars", "#15803d"),
    "working": Face("working", "play", "#1d4ed8"),
    "priority": Face("only urgent requests start", "up", "#7e22ce", "#4a1178"),
    "paused": Face("paused", "pause", "#f5a80b", "#8a3c06", "#1f2328"),
    "runners": Face("no runner answers", "alarm", "#b91c1c"),
    "absent": Face("not running", "cross", "#b91c1c"),
    "down": Face("no answer", "cross", "#b91c1c"),
    "foreign": Face("the port is used by another program", "alarm", "#b91c1c"),
    "denied": Face("not authorised", "lock", "#b91c1c"),
    "untrusted": Face("its certificate is not trusted", "lock", "#b91c1c"),
}


DASHBOARD = "Open dashboard"


class Item(NamedTuple):
    text: str = ""  # without one it is a separator
    command: str = ""
    checked: bool | None = None
    enabled: bool = True


class View(NamedTuple):
    face: str
    number: int  # that wait
    title: str
    menu: tuple[Item, ...]
    waits: tuple[str, ...]  # lines below the first of the menu


def view(state: State) -> View:
    up = state.link == "up"
    face = "working" if state.waiting or state.running else "idle"
    face = state.mode if state.mode in FACES else "runners" if state.runners_down else face
    face = face if up else state.link
    name = "llmq" if state.local else f"llmq at {urlsplit(state.url).hostname}"
    counts = {"waiting": state.waiting * up, "running": state.running * up}
    words = [f"{number} {word}" for word, number in counts.items() if number]
    words += [words_of(state, face)] * (face != "working")
    title = f"{name}: {', '.join(words)}"[:100]  # Windows has room for 127
    return View(face, counts["waiting"], title, menu(state, face), waits(state) if up else ())


def words_of(state: State, face: str) -> str:
    """What the face says, and llmq's words for why it does not let the tray in."""
    return FACES[face].words + (f": {state.why}" if face == "denied" and state.why else "")


def menu(state: State, face: str) -> tuple[Item, ...]:
    """What is no news of the queue: a menu that is built anew closes under the user's hand."""
    up, mode, free = state.link == "up", state.mode, not state.busy
    words, asked = words_of(state, face), " (requests run, click again)" * bool(state.confirm_until)
    again, free_it = ("Open again", "paused"), ("Free the GPU", "free")
    switch = Item("Start llmq", "start", None, free and face in ("absent", "down"))
    if up:
        switch = Item("Stop llmq" + asked, "stop", None, free)
    return (
        Item(state.busy or words[:1].upper() + words[1:100], enabled=False),
        Item(),
        Item("Priority mode", "priority", up and mode == "priority", up and free),
        Item("Pause", "paused", up and mode == "paused", up and free),
        Item(*again if state.freed and mode == "paused" else free_it, None, up and free),
        Item(),
        Item(DASHBOARD, "dashboard", enabled=up),
        Item("Copy base URL", "copy"),
        *[switch] * state.local,
        Item(),
        Item("Start at login", "login", state.login),
        Item("Notifications", "notify", state.notify),
        Item(),
        Item("Quit", "quit"),
    )


def waits(state: State) -> tuple[str, ...]:
    """Who waits longest and why, and of the others how many and whether one waits longer."""
    lines = [words_of_wait(one) for one in state.waits]
    more = state.waiting - len(lines)
    if lines and more > 0:
        one = f", one of them for {words_of_time(state.oldest)}"
        lines += [f"and {more:,} more" + one * (state.oldest > state.waits[0].minutes)]
    return tuple(lines)


def words_of_wait(wait: Wait) -> str:
    names = ", ".join(name for name in (cut(wait.client, 24), cut(wait.model, 32)) if name)
    why = f" — {wait.reason}" if wait.reason else ""
    return cut(f"{names}: {words_of_time(wait.minutes)}{why}", 100)


def words_of_time(minutes: int) -> str:
    """No seconds: the menu would change with each."""
    if minutes < 60:
        return f"{minutes} min" if minutes else "under 1 min"
    return f"{minutes // 60} h {minutes % 60} min"


def cut(text: str, most: int) -> str:
    """Others gave it: nothing in it breaks the line, turns it around or makes it endless."""
    text = "".join(one if one.isprintable() else "?" for one in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


# ---- Drawing: a tile of 16 by 16 units, painted large and shrunk ---------------------------------

Lines = list[tuple[float, ...]]  # each: width (0 fills the shape), then x, y, x, y …
MARKS: dict[str, Lines] = {  # in a square of 8 by 8
    "dots": [(2.4, 0.2, 4, 0.3, 4), (2.4, 4, 4, 4.1, 4), (2.4, 7.7, 4, 7.8, 4)],
    "bars": [(1.9, 0.3, 0.9, 7.7, 0.9), (1.9, 0.3, 4, 5.5, 4), (1.9, 0.3, 7.1, 3.3, 7.1)],
    "play": [(0, 1, -0.4, 8.4, 4, 1, 8.4)],
    "up": [(0, 4, -0.6, 8.4, 4.6, -0.4, 4.6), (2.8, 4, 4, 4, 7)],
    "pause": [(2.6, 1.5, 1.3, 1.5, 6.7), (2.6, 6.5, 1.3, 6.5, 6.7)],
    "cross": [(2.4, 0.9, 0.9, 7.1, 7.1), (2.4, 7.1, 0.9, 0.9, 7.1)],
    "alarm": [(2.6, 4, 0.7, 4, 4.1), (2.8, 4, 7.4, 4, 7.5)],
    "lock": [(0, 0.7, 3, 7.3, 3, 7.3, 8, 0.7, 8), (1.5, 2, 3, 2, 1, 3, 0, 5, 0, 6, 1, 6, 3)],
}
# In a box of 4 by 8, two figures a point, "/" lifts the pen: no font is as clear at 16 pixels,
# and the Pillow of Debian 12 brings none that can be large.
PENS = """011030414738180701,022028,01103041430848,004023334447381807,38300646,40000434454738
08,30100207183847453404,004018,103041433414030110/1405071838474534,18284641301001031444,0545/2327"""
DIGITS: dict[str, Lines] = {
    digit: [(1, *map(int, line)) for line in lines.split("/")]
    for digit, lines in zip("0123456789+", PENS.replace("\n", "").split(","))
}
NUMBERS = {1: (4.6, 2.0, 0.0), 2: (3.9, 1.7, 2.0), 3: (2.7, 1.3, 1.5)}  # width, stroke, gap


def draw(face: Face, number: int, pixels: int) -> Any:
    """The mark of the face; or the number alone, when it works; or the number below a band."""
    from PIL import Image, ImageDraw

    unit, side = pixels / 2, 8 * pixels - 1  # of a picture 8 times as large
    picture = Image.new("RGBA", (8 * pixels, 8 * pixels), (0, 0, 0, 0))
    canvas = ImageDraw.Draw(picture)

    def paint(lines: Lines, ink: str, x: float, y: float, *scale: float) -> None:
        wide, high, thick = scale or (1, 1, 1)
        for width, *numbers in lines:
            points = zip(numbers[::2], numbers[1::2])
            path = [((x + a * wide) * unit, (y + b * high) * unit) for a, b in points]
            half = width * thick * unit / 2
            if not width:
                canvas.polygon(path, fill=ink)
                continue
            canvas.line(path, fill=ink, width=round(2 * half), joint="curve")
            for a, b in path:  # round ends
                canvas.ellipse((a - half, b - half, a + half, b + half), fill=ink)

    canvas.rounded_rectangle((0, 0, side, side), 3.4 * unit, face.tile)
    text = "99+" if number > 99 else str(number)
    if not number or not (face.band or face.mark == "play"):
        paint(MARKS[face.mark], face.ink, 4, 4)
        text = ""
    elif face.band:
        canvas.rounded_rectangle((0, 0, side, 12 * unit), 3.4 * unit, face.band)
        canvas.rectangle((0, 5.4 * unit, side, 12 * unit), face.tile)
        paint(MARKS[face.mark], "#ffffff", 4.8, 0.9, 0.8, 0.45, 0.77)
    y, high = (7.4, 6.5 / 8) if face.band else (3.1, 9.8 / 8)
    for place, digit in enumerate(text):
        wide, stroke, gap = NUMBERS[len(text)]
        x = 8 - (len(text) * (wide + gap) - gap) / 2 + place * (wide + gap)
        paint(DIGITS[digit], face.ink, x, y, wide / 4, high, stroke)
    return picture.resize((pixels, pixels), Image.Resampling.LANCZOS)


# ---- The link ------------------------------------------------------------------------------------

ANSWER_SECONDS, SILENCE_SECONDS = 3.0, 20.0  # llmq pings every 10 s
FIRST_DELAY, LAST_DELAY = 0.5, 10.0  # between two attempts
DENIED_DELAY = 30.0  # after ten wrong keys in a minute llmq looks at none from this address
MOST_BYTES = 1 << 24  # of one snapshot
OPENER = build_opener(ProxyHandler({}))  # no proxy, whatever the environment says


def read_key(path: str) -> str:
    """From the file, else from LLMQ_KEY: everybody on this box can read command lines."""
    text = os.environ.get("LLMQ_KEY", "")
    if path:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "is no text"
            raise ValueError(f"{path}: {why}") from None
    if not re.fullmatch(r"[\x21-\x7e]*", text) or (path and not text):
        raise ValueError(f"{path or 'LLMQ_KEY'}: there is no key: visible ASCII without spaces")
    return text


def request_of(url: str, key_file: str, body: Any = None) -> Request:
    data = json.dumps(body).encode() if body else None
    request = Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - see main()
    with contextlib.suppress(ValueError):  # the file is gone: llmq says that it wants a key
        if key := read_key(key_file):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
    return request


def ask(url: str, body: Any = None, key_file: str = "") -> Any:
    """What llmq answers; an exception with its words when it refuses."""
    try:
        with OPENER.open(request_of(url, key_file, body), timeout=ANSWER_SECONDS) as answer:
            return json.loads(read_bounded(answer))
    except HTTPError as error:
        raise ValueError(refusal(error) or f"it answers {error.code}") from None


def refusal(error: HTTPError) -> str:
    """The words of llmq for it; none where another program answers."""
    with contextlib.suppress(Exception):  # who knows what another program answers
        if "X-LLMQ-Id" in error.headers:
            words = str(json.loads(read_bounded(error))["error"]["message"])
            return "".join(one for one in words if one.isprintable())
    return ""


def instance_at(url: str) -> str:
    """What tells one run of llmq from another; no key is needed for it."""
    with OPENER.open(url + "/health", timeout=ANSWER_SECONDS) as answer:
        told = answer.headers["X-LLMQ-Id"]
    if not told:
        raise ValueError("what answers is no llmq")
    return str(told).partition("-")[0]


def read_bounded(answer: Any) -> bytes:
    """The answer's body; ValueError or TimeoutError where it has no end."""
    until, data = time.monotonic() + ANSWER_SECONDS, bytearray()
    while more := answer.read1(1 << 16):
        data += more
        if len(data) > MOST_BYTES:
            raise ValueError("the answer is too long")
        if time.monotonic() > until:
            raise TimeoutError("the answer does not end")
    return bytes(data)


def read_snapshot(data: bytes) -> Event:
    snapshot = json.loads(data)
    usable = [one["state"] in ("up", "loading", "unknown") for one in snapshot["backends"]]
    facts = {name: int(snapshot["queue"][name]) for name in ("waiting", "running")}
    facts["refused"] = int(snapshot["requests_total"].get("queue_full", 0))
    facts["oldest"] = int(snapshot["queue"].get("oldest_wait_s", 0) // 60)
    mode, down = str(snapshot["mode"]), bool(usable) and not any(usable)
    waits = longest(snapshot.get("requests", []))
    return Event("seen", {**facts, "mode": mode, "runners_down": down, "waits": waits})


def longest(requests: Any) -> tuple[Wait, ...]:
    """Those that wait longest, as far as llmq tells: of a long queue it shows the first hundred."""
    waiting = [one for one in requests if one["state"] == "waiting"]
    waiting.sort(key=lambda one: float(one["waited_s"]), reverse=True)
    return tuple(
        Wait(str(one["client"]), str(one["model"]), int(one["waited_s"] // 60), str(one["reason"]))
        for one in waiting[:SHOWN]
    )


def watch(url: str, tell: Callable[[Event], None], key_file: str = "") -> Event:
    """Tell the newest snapshot whenever it is another, until the link ends; how it ended."""
    heard, told = False, None
    try:
        asked = request_of(url + "/llmq/events", key_file)
        with OPENER.open(asked, timeout=SILENCE_SECONDS) as answer:
            heard = answer.headers.get_content_type() == "text/event-stream"
            buffer = b""
            # Not readline(), which takes a broken stream for one that has ended well.
            while heard and len(buffer) < MOST_BYTES and (data := answer.read1(1 << 16)):
                *lines, buffer = (buffer + data).split(b"\n")
                newest = next((one for one in reversed(lines) if one.startswith(b"data: ")), None)
                if newest and (event := read_snapshot(newest[6:])) != told:
                    tell(told := event)
        return Event("lost", "down" if heard else "foreign", goodbye=heard)
    except HTTPError as error:
        words = refusal(error)
        if error.code in (401, 403) or (error.code == 429 and words):
            return Event("lost", "denied", words)
        return Event("lost", "down" if error.code in (502, 503, 504) else "foreign")
    except Exception as error:  # noqa: BLE001 - who knows what another program answers
        cause = getattr(error, "reason", error)  # urllib wraps what comes before the answer
        if isinstance(cause, ConnectionRefusedError):
            return Event("lost", "absent")
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Event("lost", "untrusted")
        broke = heard and isinstance(error, HTTPException)
        return Event("lost", "down" if broke or isinstance(cause, OSError) else "foreign")


def keep_watching(
    url: str, tell: Callable[[Event], None], retry: threading.Event, key_file: str = ""
) -> None:
    """For ever, with pauses that grow until a link is good; `retry` ends a pause."""
    delay = FIRST_DELAY

    def hear(event: Event) -> None:
        nonlocal delay
        delay = FIRST_DELAY  # llmq itself was there
        tell(event)

    while True:
        ended = watch(url, hear, key_file)
        tell(ended)
        pause = DENIED_DELAY if ended.what == "denied" else delay
        early = retry.wait(pause * random.uniform(0.8, 1.2))  # noqa: S311 - it only spreads
        retry.clear()
        delay = FIRST_DELAY if early else min(2 * delay, LAST_DELAY)


# ---- This box ------------------------------------------------------------------------------------

HERE = Path(__file__).resolve()
START_SECONDS = 15.0
ENTRIES = {  # what starts at login, where it is no autostart/llmq-tray.desktop
    "darwin": "Library/LaunchAgents/local.llmq-tray.plist",
    "win32": "AppData/Roaming/Microsoft/Windows/Start Menu/Programs/Startup/llmq-tray.cmd",
}
DESKTOP = """[Desktop Entry]\nType=Application\nName=llmq tray\nExec={}\nIcon={}
Comment=One queue in front of the local LLM runners\nX-GNOME-Autostart-Delay=5\n"""


def place(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(data)


def run(*command: str, given: bytes = b"") -> str:
    """What failed, if it did; no pipe, for wl-copy leaves a process that would hold it open."""
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 60}
    done = subprocess.run(command, input=given, check=False, **quiet)  # noqa: S603 - ours
    return f"{' '.join(command)} failed" if done.returncode else ""


def exec_line(command: list[str]) -> str:
    """Quoted as a desktop entry wants it: by the rules of Exec, then by those of any line."""
    for char in '\\"`$':
        command = [word.replace(char, "\\" + char) for word in command]
    return " ".join(f'"{word}"' for word in command).replace("\\", "\\\\").replace("%", "%%")


class Box:
    """What a click may do: methods named like their commands return what went wrong."""

    def __init__(self, url: str, key_file: str = "") -> None:
        self.url, self.key_file = url, key_file
        self.private = place("XDG_RUNTIME_DIR", ".cache") / "llmq-tray" / re.sub(r"\W", "-", url)
        self.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.born = self.private / "llmq.json"  # the llmq that was started from here
        self.state = place("XDG_STATE_HOME", ".local/state") / "llmq"
        self.config = place("XDG_CONFIG_HOME", ".config")
        self.quiet = self.config / "llmq/tray.json"  # there when notifications are off
        desktop = self.config / "autostart/llmq-tray.desktop"
        self.entry = Path.home() / ENTRIES.get(
            sys.platform, desktop
        )  # there when it starts at login
        self.lock: Any = None

    def alone(self) -> bool:
        """Whether no other tray looks after this llmq; SQLite's locks end with their process."""
        self.lock = sqlite3.connect(self.private / "tray.lock", timeout=0)
        with contextlib.suppress(sqlite3.OperationalError):  # it is taken
            self.lock.execute("BEGIN EXCLUSIVE")
        return bool(self.lock.in_transaction)

    def mode(self, mode: str) -> None:
        ask(self.url + "/llmq/mode", {"mode": mode}, self.key_file)

    def free(self) -> str:
        """Pause llmq and let it unload every model."""
        self.mode("paused")
        try:
            order = {"action": "unload", "model": "*"}
            ask(self.url + "/llmq/models", order, self.key_file)
        except Exception as error:  # noqa: BLE001 - whatever it is, half of it is done
            return f"llmq is paused, but its models stay loaded: {error}"
        return ""

    def dashboard(self) -> str:
        return "" if webbrowser.open(self.url + "/") else f"no browser opens {self.url}/"

    def copy(self) -> str:
        program = {"darwin": "pbcopy", "win32": "clip"}.get(sys.platform, "wl-copy")
        return run(program, given=f"{self.url}/v1".encode())

    def notify(self, on: bool) -> None:
        self.quiet.unlink() if on else write(self.quiet, b'{"notify": false}\n')

    def login(self, on: bool) -> None:
        command, data = [sys.executable, str(HERE), "--autostart", "--url", self.url], b""
        command += ["--key-file", self.key_file] if self.key_file else []
        if sys.platform == "darwin":
            facts = {"Label": self.entry.stem, "ProgramArguments": command, "RunAtLoad": True}
            data = plistlib.dumps({**facts, "ProcessType": "Interactive"})
        elif sys.platform == "win32":
            command[0] = command[0].replace("python.exe", "pythonw.exe")
            data = f'@start "" {subprocess.list2cmdline(command)}\n'.encode()
        else:
            icon = self.state / "llmq.png"
            data = DESKTOP.format(exec_line(command), icon).encode()
            write(icon, b"")
            draw(FACES["idle"], 0, 256).save(icon)
        write(self.entry, data) if on else self.entry.unlink()

    def service(self, action: str) -> list[str]:
        """The command that starts or stops llmq where it is installed as a service."""
        for agent in Path.home().glob("Library/LaunchAgents/*llmq.plist"):
            verb = {"start": ["kickstart"], "stop": ["kill", "SIGTERM"]}[action]
            return ["launchctl", *verb, f"gui/{os.getuid()}/{agent.stem}"]
        units = [self.config / "systemd/user" / name for name in ("llmq.socket", "llmq.service")]
        names = [unit.name for unit in units if unit.exists()]
        return ["systemctl", "--user", action, *names] if names else []

    def start(self) -> str:
        if command := self.service("start"):
            return run(*command)
        command = [sys.executable, str(HERE.parent.parent / "llmq.py"), "serve"]
        parts = urlsplit(self.url)
        command += ["--port", str(parts.port or (443 if parts.scheme == "https" else 80))]
        command += ["--base-path", parts.path] if parts.path else []
        apart: Any = {"start_new_session": True, "cwd": Path.home(), "stdin": subprocess.DEVNULL}
        apart["creationflags"] = 0x08000008 * (sys.platform == "win32")  # detached, no window
        log = self.state / "llmq.log"
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("ab" if log.exists() and log.stat().st_size < 1 << 22 else "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, **apart)  # noqa: S603
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie
        end = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(Exception):  # it does not listen yet
                write(self.born, json.dumps([process.pid, instance_at(self.url)]).encode())
                return ""
            time.sleep(0.05)
        return log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]

    def stop(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            pid, instance = json.loads(self.born.read_bytes())
            # Another llmq answers there? Then the number may be somebody else's by now.
            if instance == instance_at(self.url):
                os.kill(pid, signal.SIGTERM)
                return ""
        command = self.service("stop")
        return run(*command) if command else "it was not started from here"


# ---- The shell -----------------------------------------------------------------------------------

SHOW_SECONDS = 0.5  # at least, between two pictures
# At least, between two lists of what waits: where it is not GTK's, each builds the menu anew.
WAITS_SECONDS = 10.0 if sys.platform in ("darwin", "win32") else 1.0
PIXELS = 44 if sys.platform == "darwin" else 64
GTK = ("appindicator", "gtk")
WATCHER = "org.kde.StatusNotifierWatcher"
NO_MENU = """a badge without menu, for there is no AppIndicator: it needs python3-gi and \
gir1.2-ayatanaappindicator3-0.1, and --system-site-packages in a venv"""
NO_PANEL = "no panel here shows tray icons; GNOME needs gnome-shell-extension-appindicator"


def say(text: str) -> None:
    print(f"llmq tray: {text}", file=sys.stderr, flush=True)  # noqa: T201


def load_pystray() -> Any:
    try:
        importlib.import_module("PIL.Image")
        return importlib.import_module("pystray")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"it needs: pip install pystray pillow ({error})") from None
    except Exception as error:  # noqa: BLE001 - Xlib raises kinds of its own without a display
        raise RuntimeError(f"there is no desktop session here: {error}") from None


def gi(name: str) -> Any:
    return importlib.import_module(f"gi.repository.{name}")


class Events(queue.Queue[Event]):
    """What happens, in turn; of snapshots in a row that nobody has looked at only the latest."""

    def _put(self, item: Event) -> None:
        if item.kind == "seen" and self.queue and self.queue[-1].kind == "seen":
            self.queue.pop()
        self.queue.append(item)


class Shell:
    """pystray's loop is the main thread; `think` owns the state; `keep_watching` the link."""

    def __init__(self, pystray: Any, state: State, box: Box) -> None:
        self.pystray, self.state, self.box = pystray, state, box
        self.events = Events()
        self.retry = threading.Event()
        self.quitting = False
        first = view(state)
        picture = draw(FACES[first.face], first.number, PIXELS)
        self.icon = pystray.Icon("llmq", picture, first.title, self.menu(first))
        self.kind = type(self.icon).__module__.rpartition("._")[2]  # of pystray's backends
        if self.kind == "darwin":  # no icon in the Dock
            self.icon._app.setActivationPolicy_(1)

    def menu(self, shown: View) -> Any:
        first, *others = shown.menu
        items = [first, *[Item(text, "dashboard") for text in shown.waits], *others]
        separator = self.pystray.Menu.SEPARATOR
        return self.pystray.Menu(*[self.item(one) if one.text else separator for one in items])

    def item(self, item: Item) -> Any:
        mnemonics = sys.platform == "win32"  # GTK's menus have none that are not asked for
        return self.pystray.MenuItem(
            item.text.replace("&", "&&") if mnemonics else item.text,
            lambda: self.events.put(Event("click", item.command)),
            lambda _: item.checked,
            default=item.text == DASHBOARD,
            enabled=item.enabled,
        )

    def show_waits(self, shown: View) -> None:
        """Change the lines below the first; those that GTK draws, in the menu as it is."""
        menu = self.menu(shown)
        if self.kind in GTK:
            self.icon._menu = menu  # from which pystray builds it anew after each click
            gi("GLib").idle_add(self.change_lines)
        else:
            self.on_ui(setattr, self.icon, "menu", menu)

    def change_lines(self) -> None:
        menu, separators = self.icon._menu_handle, gi("Gtk").SeparatorMenuItem
        wanted = self.icon.menu.items[1:]
        wanted = wanted[: wanted.index(self.pystray.Menu.SEPARATOR)]
        lines = menu.get_children()[1:]
        lines = lines[: [isinstance(one, separators) for one in lines].index(True)]
        for line, item in zip(lines, wanted):
            line.get_child().set_label(item.text)  # line.set_label() lets "_" be a mnemonic
        for line in lines[len(wanted) :]:
            menu.remove(line)
        for place, item in enumerate(wanted[len(lines) :], 1 + len(lines)):
            line = self.icon._create_menu_item(item)
            menu.insert(line, place)
            line.show_all()

    def on_ui(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Let the main thread call it, where pystray does not see to that itself."""
        if self.kind == "darwin":
            importlib.import_module("PyObjCTools.AppHelper").callAfter(work, *arguments)
        else:
            work(*arguments)

    def has_panel(self) -> bool:
        """Whether somebody shows AppIndicator's icons; the other kinds just try."""
        if self.kind != "appindicator":
            return True
        bus, watcher = "org.freedesktop.DBus", gi("GLib").Variant("(s)", (WATCHER,))
        asked = (bus, "/org/freedesktop/DBus", bus, "NameHasOwner", watcher, None, 0, 1000, None)
        try:
            return bool(gi("Gio").bus_get_sync(2).call_sync(*asked).unpack()[0])  # the session's
        except gi("GLib").Error as error:
            raise RuntimeError(f"there is no D-Bus session here: {error.message}") from None

    def ready(self, _icon: Any) -> None:
        if self.kind in GTK:
            for number in (signal.SIGTERM, signal.SIGINT):  # they would leave pictures behind
                gi("GLib").unix_signal_add(0, number, self.events.put, Event("click", "quit"))
        self.on_ui(setattr, self.icon, "visible", True)
        threading.Thread(target=self.think, daemon=True).start()
        link = (self.box.url, self.events.put, self.retry, self.box.key_file)
        threading.Thread(target=keep_watching, args=link, daemon=True).start()

    def think(self) -> None:
        """Every event in turn; what is shown follows the state, but not too often."""
        shown, changed, listed = view(self.state), 0.0, 0.0
        try:
            while not self.quitting:
                event = Event("tick")
                with contextlib.suppress(queue.Empty):
                    event = self.events.get(timeout=SHOW_SECONDS)
                now = time.monotonic()
                self.state, effects = reduce(self.state, event, now)
                for effect in effects:
                    self.perform(*effect)
                wanted = view(self.state)
                if wanted.menu == shown.menu and now - listed < WAITS_SECONDS:
                    wanted = wanted._replace(waits=shown.waits)
                if wanted != shown and now - changed >= SHOW_SECONDS:
                    if wanted.menu != shown.menu:
                        self.on_ui(setattr, self.icon, "menu", self.menu(wanted))
                    elif wanted.waits != shown.waits:
                        self.show_waits(wanted)
                        listed = now
                    if wanted[:2] != shown[:2]:  # the face, the number
                        picture = draw(FACES[wanted.face], wanted.number, PIXELS)
                        self.on_ui(setattr, self.icon, "icon", picture)
                    self.on_ui(setattr, self.icon, "title", wanted.title)
                    shown, changed = wanted, now
        finally:  # also when this has failed: better no icon than one that lies
            self.on_ui(self.icon.stop)

    def perform(self, command: str, *arguments: Any) -> None:
        if command == "quit":
            self.quitting = True
        elif command == "retry":
            self.retry.set()
        elif command == "tell" and self.icon.HAS_NOTIFICATION:
            title, text = arguments
            self.on_ui(self.icon.notify, text[:250], title[:60])
        elif command == "copy" and self.kind in GTK and not os.environ.get("WAYLAND_DISPLAY"):
            board, text = gi("Gdk").SELECTION_CLIPBOARD, self.box.url + "/v1"
            gi("GLib").idle_add(lambda: gi("Gtk").Clipboard.get(board).set_text(text, -1))
        elif command != "tell":
            threading.Thread(target=self.go, args=(command, *arguments), daemon=True).start()

    def go(self, command: str, *arguments: Any) -> None:
        try:
            why = getattr(self.box, command)(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user is told
            why = str(error) or type(error).__name__
        self.events.put(Event("done", command, why or ""))


def start(options: argparse.Namespace) -> int:
    pystray = load_pystray()
    key_file = str(Path(options.key_file).expanduser().absolute()) if options.key_file else ""
    box = Box(options.url.rstrip("/"), key_file)
    if not box.alone():
        say(f"one is already running for {box.url}; here is the dashboard")
        box.dashboard()
        return 0
    pictures = box.private / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)  # of one that was killed
    pictures.mkdir(mode=0o700)
    tempfile.tempdir = str(pictures)  # where pystray puts them
    local = urlsplit(box.url).hostname in ("127.0.0.1", "::1", "localhost")
    notify, login = not box.quiet.exists(), box.entry.exists()
    shell = Shell(pystray, State(box.url, local, notify=notify, login=login), box)
    if not shell.icon.HAS_MENU:
        say(NO_MENU)
    end = time.monotonic() + options.panel_wait
    while not (found := shell.has_panel()) and time.monotonic() < end:
        time.sleep(0.2)
    if not found and not options.autostart:
        raise RuntimeError(NO_PANEL)
    if not found:
        say(NO_PANEL + "; waiting for one")
    try:
        shell.icon.run(shell.ready)
    except Exception as error:  # noqa: BLE001 - GLib's, at the end, if nobody takes notes
        if not shell.quitting:
            raise RuntimeError(f"the icon cannot be shown: {error}") from None
    return 0 if shell.quitting else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmq_tray", description="llmq's tray icon.")
    add = parser.add_argument
    add("--url", default=State.url, help="of the llmq (default: %(default)s)")
    text = "with the key that it wants (default: the variable LLMQ_KEY)"
    add("--key-file", default="", metavar="FILE", help=text)
    add("--autostart", action="store_true", help="started at login: to show nothing is no failure")
    add("--panel-wait", type=float, default=10.0, help="seconds for a panel to appear")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"https?://[^/?#@]+(/[^?#]*)?", options.url):
        parser.error(f"--url wants http://HOST:PORT, not {options.url}")
    try:
        read_key(options.key_file)
    except ValueError as error:
        say(f"--key-file {error}" if options.key_file else str(error))
        return 0 if options.autostart else 2
    try:
        return start(options)
    except (RuntimeError, OSError) as error:
        say(str(error))
        return 0 if options.autostart else 2


if __name__ == "__main__":
    sys.exit(main())
