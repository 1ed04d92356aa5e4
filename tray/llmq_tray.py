#!/usr/bin/env python3
"""llmq's tray icon: how deep the queue is, whether it is well, and the switches one wants at hand.

First what is pure: `reduce` (what follows from what happens), `view` (what is to be seen of it),
`draw`.  Then the link to llmq, and what a click may do to this box.  `Shell` alone knows pystray.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import os
import plistlib
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.parse import urlsplit

# ---- State: what is known, and what follows from what happens ------------------------------------

CONFIRM_SECONDS = 10.0  # for the second click, which stops llmq although requests run
FULL_SECONDS = 60.0  # without a refusal, and the queue is no longer full
TROUBLES = {  # seconds of patience (a restart is no death), and what is told then
    "dead": (3.0, "llmq is gone", "It ended or lost its connection, and nobody had asked it to."),
    "runners": (30.0, "No runner answers", "llmq runs, but none of its runners answers."),
    "full": (0.0, "The queue is full", "llmq refuses requests: too many are waiting."),
}


@dataclass(frozen=True)
class State:
    url: str = "http://127.0.0.1:11500"
    local: bool = True  # llmq is on this box: it may be started and stopped from here
    link: str = "connecting"  # "up", "absent" (nothing listens), "down", "foreign", "denied"
    why: str = ""  # it is not up
    mode: str = "open"
    waiting: int = 0
    running: int = 0
    runners_down: bool = False  # there are runners, and none can be used
    refused: int = 0  # requests so far that found the queue full
    full_until: float = 0.0
    busy: str = ""  # what was asked for and is not yet seen: "Pausing…"
    confirm: int = 0  # requests that ran at the first click on Stop
    confirm_until: float = 0.0
    may_start: bool = True  # nobody has tried yet
    stopping: bool = False  # the user wants it
    dead: bool = False  # llmq was up and went unasked
    notify: bool = True
    login: bool = False  # the tray starts at login
    since: tuple[tuple[str, float], ...] = ()  # when each present trouble began
    told: frozenset[str] = frozenset()  # troubles that were told


class Event(NamedTuple):
    kind: str  # "seen" a snapshot, "lost" the link, "click" a command, "done" with it, "tick"
    what: Any = None  # parts of the state, the state of the link, the command
    why: str = ""  # what went wrong
    goodbye: bool = False  # llmq itself ended the link, in good order


Effect = tuple[Any, ...]  # a command that `Shell.perform` knows, and its arguments
Step = tuple[State, list[Effect]]


def reduce(state: State, event: Event, now: float) -> Step:
    """The state after `event`, and what is to be done about it."""
    steps = {"seen": seen, "lost": lost, "click": click, "done": done}
    state, effects = steps[event.kind](state, event, now) if event.kind in steps else (state, [])
    state, notes = judge(state, now)
    state = replace(state, confirm=state.confirm if now < state.confirm_until else 0)
    return state, [one for one in effects + notes if state.notify or one[0] != "tell"]


def seen(state: State, event: Event, now: float) -> Step:
    if state.link != "up":
        state = replace(state, link="up", why="", busy="", dead=False, may_start=False)
    elif event.what["refused"] > state.refused:  # those before we looked are history
        state = replace(state, full_until=now + FULL_SECONDS)
    return replace(state, **event.what), []


def lost(state: State, event: Event, _now: float) -> Step:
    dead = state.dead or (state.link == "up" and not event.goodbye and not state.stopping)
    why = event.why or (state.why if state.link == event.what else "")  # of its start, perhaps
    state = replace(state, why=why, dead=dead, stopping=False)
    if event.what == "absent" and state.busy == "Starting…":
        return state, []  # it does not listen yet
    if event.what == "absent" and state.local and state.may_start:
        return replace(state, may_start=False, busy="Starting…"), [("start",)]
    return replace(state, link=event.what, busy="", confirm=0), []


def click(state: State, event: Event, now: float) -> Step:
    command = event.what
    if command in ("priority", "paused"):
        mode = "open" if state.mode == command else command
        words = {"open": "Opening…", "paused": "Pausing…", "priority": "Making way…"}
        return replace(state, busy=words[mode]), [("mode", mode)]
    if command == "start":
        return replace(state, link="connecting", busy="Starting…", dead=False), [("start",)]
    if command == "stop" and state.running and not state.confirm:
        return replace(state, confirm=state.running, confirm_until=now + CONFIRM_SECONDS), []
    if command == "stop":
        return replace(state, busy="Stopping…", confirm=0, stopping=True), [("stop",)]
    if command == "notify":
        return replace(state, notify=not state.notify), [("save", not state.notify)]
    return state, [("login", not state.login) if command == "login" else (command,)]


def done(state: State, event: Event, _now: float) -> Step:
    failed = [("tell", f"Could not do it: {event.what}", event.why)] if event.why else []
    if event.what == "login" and not event.why:
        state = replace(state, login=not state.login)
    if event.what == "start" and event.why:
        state = replace(state, link="absent", why=event.why)
    if event.what == "stop" and event.why:
        state = replace(state, stopping=False)
    return replace(state, busy=""), [*failed, ("retry",)]


def judge(state: State, now: float) -> Step:
    """Tell of each trouble once, and once that it is over."""
    up, before, told = state.link == "up", dict(state.since), set(state.told)
    full, runners = up and now < state.full_until, up and state.runners_down
    present = {"dead": state.dead, "runners": runners, "full": full}
    since = {name: before.get(name, now) for name, is_so in present.items() if is_so}
    effects: list[Effect] = []
    for name, (patience, title, text) in TROUBLES.items():
        if name in since and name not in told and now - since[name] >= patience:
            told.add(name)
            effects.append(("tell", title, text))
        elif name in told and name not in since:
            told.remove(name)
            effects += [("tell", "llmq is well again", f"Over: {title}.")] if up else []
    return replace(state, since=tuple(since.items()), told=frozenset(told)), effects


# ---- View: what is to be seen --------------------------------------------------------------------


class Face(NamedTuple):
    """A state for the eye: words, and colour and mark, for nobody has to tell red from green."""

    words: str
    mark: str  # a key of MARKS
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
}


class Item(NamedTuple):
    """A line of the menu; one without text is a separator."""

    text: str = ""
    command: str = ""
    checked: bool | None = None
    enabled: bool = True


class View(NamedTuple):
    face: str
    number: int  # that wait
    title: str
    menu: tuple[Item, ...]


def view(state: State) -> View:
    up = state.link == "up"
    face = "working" if state.waiting or state.running else "idle"
    face = state.mode if state.mode in FACES else "runners" if state.runners_down else face
    face = face if up else state.link
    name = "llmq" if state.local else f"llmq at {urlsplit(state.url).hostname}"
    counts = {"waiting": state.waiting * up, "running": state.running * up}
    words = [f"{number} {word}" for word, number in counts.items() if number]
    words += [FACES[face].words] * (face != "working") + [state.why] * bool(state.why)
    title = f"{name}: {', '.join(words)}"[:100]  # Windows has room for 127
    return View(face, counts["waiting"], title, menu(state, face))


def menu(state: State, face: str) -> tuple[Item, ...]:
    """Without numbers of what is going on: a menu that changes closes under the user's hand."""
    up, mode = state.link == "up", state.mode
    free = up and not state.busy
    asked = f" ({state.confirm} running, click again)" if state.confirm else ""
    switch = Item("Stop llmq" + asked, "stop", enabled=free)
    if not up:
        startable = face in ("absent", "down") and not state.busy
        switch = Item("Start llmq", "start", enabled=startable)
    return (
        Item(state.busy or FACES[face].words.capitalize(), enabled=False),
        Item(),
        Item("Priority mode", "priority", up and mode == "priority", free),
        Item("Pause", "paused", up and mode == "paused", free),
        Item(),
        Item("Open dashboard", "dashboard", enabled=up),
        Item("Copy base URL", "copy"),
        *([Item("Open configuration", "config"), Item(), switch] if state.local else [Item()]),
        Item("Start at login", "login", state.login),
        Item("Notifications", "notify", state.notify),
        Item(),
        Item("Quit", "quit"),
    )


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
# In a box of 4 by 8, two figures a point, "/" lifts the pen: no font is as clear at 16 pixels.
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

    unit = pixels / 2  # of a picture 8 times as large
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

    canvas.rounded_rectangle((0, 0, 16 * unit - 1, 16 * unit - 1), 3.4 * unit, face.tile)
    if not number or not (face.band or face.mark == "play"):
        paint(MARKS[face.mark], face.ink, 4, 4)
        number = 0
    elif face.band:
        canvas.rounded_rectangle((0, 0, 16 * unit - 1, 12 * unit), 3.4 * unit, face.band)
        canvas.rectangle((0, 5.4 * unit, 16 * unit - 1, 12 * unit), face.tile)
        paint(MARKS[face.mark], "#ffffff", 4.8, 0.9, 0.8, 0.45, 0.77)
    text = ("99+" if number > 99 else str(number)) if number else ""
    for place, digit in enumerate(text):
        wide, stroke, gap = NUMBERS[len(text)]
        x = 8 - (len(text) * (wide + gap) - gap) / 2 + place * (wide + gap)
        y, high = (7.4, 6.5) if face.band else (3.1, 9.8)
        paint(DIGITS[digit], face.ink, x, y, wide / 4, high / 8, stroke)
    return picture.resize((pixels, pixels), Image.Resampling.LANCZOS)


# ---- The link ------------------------------------------------------------------------------------

ANSWER_SECONDS, SILENCE_SECONDS = 3.0, 20.0  # llmq pings every 10 s
FIRST_DELAY, LAST_DELAY = 0.5, 10.0  # between two attempts
WELL_SECONDS = 5.0  # a link that lived so long was a good one
MOST_BYTES = 1 << 24  # of one snapshot


def connect(url: str) -> http.client.HTTPConnection:
    """No proxy comes between, whatever the environment says."""
    parts, client = urlsplit(url), http.client
    kind = client.HTTPSConnection if parts.scheme == "https" else client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=ANSWER_SECONDS)


def ask(url: str, path: str, body: Any = None) -> Any:
    """What llmq answers; an exception with its words when it refuses."""
    with contextlib.closing(connect(url)) as connection:
        data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
        order = ("POST", data, head) if body else ("GET", None, {})
        connection.request(order[0], urlsplit(url).path + path, *order[1:])
        answer = connection.getresponse()
        facts = json.loads(answer.read())
    if answer.status != 200:
        raise ValueError(facts["error"]["message"])
    return facts


def read_snapshot(data: bytes) -> Event:
    snapshot = json.loads(data)
    usable = [one["state"] in ("up", "loading", "unknown") for one in snapshot["backends"]]
    facts = {name: int(snapshot["queue"][name]) for name in ("waiting", "running")}
    facts["refused"] = int(snapshot["requests_total"].get("queue_full", 0))
    mode, down = str(snapshot["mode"]), bool(usable) and not any(usable)
    return Event("seen", {**facts, "mode": mode, "runners_down": down})


def watch(url: str, tell: Callable[[Event], None]) -> Event:
    """Tell each snapshot that comes, until the link ends; how it ended."""
    heard = False
    try:
        with contextlib.closing(connect(url)) as connection:
            connection.connect()
            line = connection.sock  # the answer takes it over, its time limit stays ours
            connection.request("GET", urlsplit(url).path + "/llmq/events")
            answer = connection.getresponse()
            if answer.status in (401, 403):
                return Event("lost", "denied")
            heard = answer.headers.get_content_type() == "text/event-stream"
            line.settimeout(SILENCE_SECONDS)
            buffer = b""
            while heard and len(buffer) < MOST_BYTES and (data := answer.read1(1 << 16)):
                *blocks, buffer = (buffer + data).split(b"\n\n")
                if found := [one[6:] for one in blocks if one.startswith(b"data: ")]:
                    tell(read_snapshot(found[-1]))
        return Event("lost", "down", goodbye=True) if heard else Event("lost", "foreign")
    except ConnectionRefusedError:
        return Event("lost", "absent")
    except (http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        broke = heard and isinstance(error, http.client.HTTPException)
        return Event("lost", "down" if broke else "foreign")
    except OSError as error:
        return Event("lost", "down", error.strerror or str(error))


def keep_watching(url: str, tell: Callable[[Event], None], retry: threading.Event) -> None:
    """For ever, with growing pauses between attempts; `retry` ends a pause."""
    delay = FIRST_DELAY
    while True:
        began = time.monotonic()
        tell(watch(url, tell))
        delay = FIRST_DELAY if time.monotonic() - began > WELL_SECONDS else delay
        early = retry.wait(delay * random.uniform(0.8, 1.2))  # noqa: S311 - it only spreads
        retry.clear()
        delay = FIRST_DELAY if early else min(2 * delay, LAST_DELAY)


# ---- This box ------------------------------------------------------------------------------------

HERE = Path(__file__).resolve()
UNITS = ("llmq.socket", "llmq.service")
START_SECONDS = 15.0
LOG_BYTES = 1 << 22
DESKTOP = """[Desktop Entry]\nType=Application\nName=llmq tray\nExec={}\nIcon={}
Comment=One queue in front of the local LLM runners\nX-GNOME-Autostart-Delay=5\n"""


def place(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def run(*command: str) -> str:
    """What the program complains about, nothing if it succeeds."""
    pipes: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, check=False, **pipes)  # noqa: S603 - none from outside
    return done.stderr.strip()[-200:] or f"{command[0]} failed" if done.returncode else ""


def exec_line(command: list[str]) -> str:
    """Quoted as a desktop entry wants it: by the rules of Exec, then by those of any line."""
    for char in '\\"`$':
        command = [word.replace(char, "\\" + char) for word in command]
    return " ".join(f'"{word}"' for word in command).replace("\\", "\\\\").replace("%", "%%")


class Box:
    """What a click may do: methods named like their commands return what went wrong."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = "".join(char if char.isalnum() else "-" for char in url)
        self.private = place("XDG_RUNTIME_DIR", ".cache") / "llmq-tray"
        self.private.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.born = self.private / f"{self.name}.json"  # the llmq that was started from here
        self.state = place("XDG_STATE_HOME", ".local/state") / "llmq"
        self.home = place("XDG_CONFIG_HOME", ".config") / "llmq"
        self.entry = self.home.parent / "autostart/llmq-tray.desktop"
        if sys.platform == "darwin":
            self.entry = Path.home() / "Library/LaunchAgents/local.llmq-tray.plist"
        elif sys.platform == "win32":
            programs = place("APPDATA", ".") / "Microsoft/Windows/Start Menu/Programs"
            self.entry = programs / "Startup/llmq-tray.cmd"
        self.lock: Any = None

    def alone(self) -> bool:
        """Whether no other tray looks after this llmq; a crash frees the lock."""
        self.lock = (self.private / f"{self.name}.lock").open("a")
        try:
            if sys.platform == "win32":
                windows = importlib.import_module("msvcrt")
                windows.locking(self.lock.fileno(), windows.LK_NBLCK, 1)
            else:
                unix = importlib.import_module("fcntl")
                unix.flock(self.lock, unix.LOCK_EX | unix.LOCK_NB)
        except OSError:
            return False
        return True

    def mode(self, mode: str) -> str:
        return "" if ask(self.url, "/llmq/mode", {"mode": mode}) else "no answer"

    def dashboard(self) -> str:
        return "" if webbrowser.open(self.url + "/") else f"no browser opens {self.url}/"

    def config(self) -> str:
        found = [*self.home.glob("llmq.toml"), *self.home.glob("llmq.json"), self.home][0]
        return "" if webbrowser.open(found.as_uri()) else f"no program opens {found}"

    def copy(self) -> str:
        program = {"darwin": "pbcopy", "win32": "clip"}.get(sys.platform, "wl-copy")
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # wl-copy leaves a process behind that serves the text, and would hold a pipe open.
        done = subprocess.run([program], input=f"{self.url}/v1".encode(), check=False, **quiet)  # noqa: S603
        return f"{program} failed" if done.returncode else ""

    def save(self, notify: bool) -> None:
        write(self.home / "tray.json", json.dumps({"notify": notify}))

    def service(self, action: str) -> list[str]:
        """The command that starts or stops llmq where a service manager has it."""
        systemctl = ["systemctl", "--user"]
        if units := [one for one in UNITS if shutil.which("systemctl")]:
            units = [one for one in units if not run(*systemctl, "cat", one)]
        for agent in Path.home().glob("Library/LaunchAgents/*llmq.plist"):
            verb = {"start": ["kickstart"], "stop": ["kill", "SIGTERM"]}[action]
            return ["launchctl", *verb, f"gui/{os.getuid()}/{agent.stem}"]
        return [*systemctl, action, *units] if units else []

    def start(self) -> str:
        if command := self.service("start"):
            return run(*command)
        places = [folder / "llmq.py" for folder in (HERE.parent, HERE.parent.parent)]
        beside = [path for path in places if path.exists()]
        command = [sys.executable, str(beside[0])] if beside else [shutil.which("llmq") or ""]
        if not command[-1]:
            return "llmq.py is neither beside the tray nor on PATH"
        command += ["serve", "--port", str(urlsplit(self.url).port or 80)]
        log = self.state / "llmq.log"
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        apart: Any = {"start_new_session": True, "cwd": Path.home(), "stdin": subprocess.DEVNULL}
        if sys.platform == "win32":
            apart["creationflags"] = 0x08000008  # detached, without a window
        with log.open("ab" if log.exists() and log.stat().st_size < LOG_BYTES else "wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, **apart)  # noqa: S603
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie
        end = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            if instance := self.instance():
                write(self.born, json.dumps([process.pid, instance]))
                return ""
            time.sleep(0.05)
        return log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]

    def instance(self) -> str:
        with contextlib.suppress(Exception):
            return str(ask(self.url, "/api/version")["instance"])
        return ""

    def stop(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            pid, instance = json.loads(self.born.read_text(encoding="utf-8"))
            if instance == self.instance():  # else the number may be somebody else's by now
                os.kill(pid, signal.SIGTERM)
                return ""
        elsewhere = "it was not started from here; stop it where it was started"
        command = self.service("stop")
        return run(*command) if command else elsewhere

    def login(self, on: bool) -> None:
        """Start at login, or no longer."""
        command = [sys.executable, str(HERE), "--autostart", "--url", self.url]
        if not on:
            self.entry.unlink()
        elif sys.platform == "darwin":
            facts = {"Label": self.entry.stem, "ProgramArguments": command, "RunAtLoad": True}
            write(self.entry, plistlib.dumps({**facts, "ProcessType": "Interactive"}).decode())
        elif sys.platform == "win32":
            command[0] = command[0].replace("python.exe", "pythonw.exe")
            write(self.entry, f'@start "" {subprocess.list2cmdline(command)}\n')
        else:
            write(self.entry, DESKTOP.format(exec_line(command), self.state / "llmq.png"))
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            draw(FACES["idle"], 0, 256).save(self.state / "llmq.png")


# ---- The shell -----------------------------------------------------------------------------------

ICON_SECONDS = 0.5  # at least, between two pictures
WORK = 0x0400 + 77  # a message of Windows: WM_USER and a number that pystray leaves free
WATCHER = "org.kde.StatusNotifierWatcher"
PACKAGES = "python3-gi and gir1.2-ayatanaappindicator3-0.1, and --system-site-packages in a venv"
NO_MENU = f"a badge without menu, for there is no AppIndicator: it needs {PACKAGES}"
NO_PANEL = "no panel here shows tray icons; GNOME needs gnome-shell-extension-appindicator"


class Unable(Exception):
    """There can be no icon, and why."""


def say(text: str) -> None:
    if sys.stderr:  # pythonw has none
        print(f"llmq tray: {text}", file=sys.stderr, flush=True)  # noqa: T201


def load_pystray() -> Any:
    try:
        importlib.import_module("PIL.Image")
        return importlib.import_module("pystray")
    except Exception as error:  # noqa: BLE001 - Xlib raises kinds of its own without a display
        missing = str(getattr(error, "name", "") or "").partition(".")[0]
        lacking = missing in ("PIL", "pystray", "six")
        reason = f"there is no desktop session here: {error}"
        raise Unable("it needs: pip install pystray pillow" if lacking else reason) from None


class Shell:
    """pystray's loop is the main thread; `think` owns the state; `keep_watching` the link."""

    def __init__(self, pystray: Any, state: State, box: Box) -> None:
        self.pystray, self.state, self.box = pystray, state, box
        self.events: queue.Queue[Event] = queue.Queue()
        self.work: queue.Queue[Callable[[], Any]] = queue.Queue()
        self.retry = threading.Event()
        self.quitting = False
        first = view(state)
        self.icon = pystray.Icon("llmq", self.picture(first), first.title, self.menu(first))
        self.kind = type(self.icon).__module__.rpartition("._")[2]  # of pystray's backends
        self.glib: Any = None
        if self.kind in ("appindicator", "gtk"):
            self.glib = importlib.import_module("gi.repository.GLib")
        elif self.kind == "darwin":  # no icon in the Dock
            self.icon._app.setActivationPolicy_(1)
        elif self.kind == "win32":
            self.icon._message_handlers[WORK] = lambda *_: self.work.get()()

    def picture(self, shown: View) -> Any:
        return draw(FACES[shown.face], shown.number, 44 if sys.platform == "darwin" else 64)

    def menu(self, shown: View) -> Any:
        return self.pystray.Menu(*map(self.item, shown.menu))

    def item(self, item: Item) -> Any:
        if not item.text:
            return self.pystray.Menu.SEPARATOR
        return self.pystray.MenuItem(
            item.text,
            lambda: self.events.put(Event("click", item.command)),
            checked=None if item.checked is None else lambda _: bool(item.checked),
            default=item.command == "dashboard",
            enabled=item.enabled,
        )

    def on_ui(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Let the main thread call it: no toolkit but Xlib allows another to."""
        if self.glib:
            self.glib.idle_add(work, *arguments)  # once, as it returns None
        elif self.kind == "darwin":
            importlib.import_module("PyObjCTools.AppHelper").callAfter(work, *arguments)
        elif self.kind == "win32":
            self.work.put(lambda: work(*arguments))
            win32 = importlib.import_module("pystray._util.win32")
            win32.PostMessage(self.icon._hwnd, WORK, 0, 0)
        else:
            work(*arguments)

    def has_panel(self) -> bool:
        """Whether somebody shows icons: a StatusNotifier host, or an old tray on X."""
        if self.kind not in ("appindicator", "gtk", "xorg"):
            return True
        try:
            if self.glib and self.has_watcher():
                return True
        except self.glib.Error as error:
            raise Unable(f"there is no D-Bus session here: {error.message}") from None
        with contextlib.suppress(Exception):  # Wayland alone
            display = importlib.import_module("Xlib.display").Display()
            tray = display.intern_atom(f"_NET_SYSTEM_TRAY_S{display.get_default_screen()}")
            owned = display.get_selection_owner(tray)
            display.close()
            return bool(owned)
        return False

    def has_watcher(self) -> bool:
        bus = importlib.import_module("gi.repository.Gio").bus_get_sync(2)  # the session's
        asked, name = self.glib.Variant("(s)", (WATCHER,)), "org.freedesktop.DBus"
        about = (name, "/org/freedesktop/DBus", name, "NameHasOwner", asked)
        return bool(bus.call_sync(*about, None, 0, 1000, None).unpack()[0])

    def run(self) -> int:
        try:
            self.icon.run(self.ready)
        except KeyboardInterrupt:
            return 0
        except Exception as error:  # noqa: BLE001 - GLib's, at the end, if nobody takes notes
            if not self.quitting:
                raise Unable(f"the icon cannot be shown: {error}") from None
        return 0 if self.quitting else 1

    def ready(self, _icon: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT) if self.glib else ():
            self.glib.unix_signal_add(0, number, self.quit)  # they would leave pictures behind
        self.on_ui(setattr, self.icon, "visible", True)
        threading.Thread(target=self.think, daemon=True).start()
        link = (self.box.url, self.events.put, self.retry)
        threading.Thread(target=keep_watching, args=link, daemon=True).start()

    def quit(self) -> None:
        self.quitting = True
        self.events.put(Event("tick"))

    def think(self) -> None:
        """Every event in turn; what is shown follows the state, the icon not too often."""
        shown, changed = view(self.state), time.monotonic()
        blinks = [changed + 5, changed + 30] if self.kind == "win32" else []
        try:
            while not self.quitting:
                now = self.take_one()
                wanted = view(self.state)
                if wanted.menu != shown.menu:
                    self.on_ui(setattr, self.icon, "menu", self.menu(wanted))
                    shown = shown._replace(menu=wanted.menu)
                if wanted != shown and now - changed >= ICON_SECONDS:
                    if wanted[:2] != shown[:2]:  # the face, the number
                        self.on_ui(setattr, self.icon, "icon", self.picture(wanted))
                    self.on_ui(setattr, self.icon, "title", wanted.title)
                    changed, shown = now, wanted
                if blinks and now > blinks[0]:  # Explorer may have come late
                    for visible in (False, True):
                        self.on_ui(setattr, self.icon, "visible", visible)
                    blinks.pop(0)
        finally:  # also when this has failed: better no icon than one that lies
            self.on_ui(self.icon.stop)

    def take_one(self) -> float:
        event = Event("tick")
        with contextlib.suppress(queue.Empty):
            event = self.events.get(timeout=ICON_SECONDS)
        now = time.monotonic()
        self.state, effects = reduce(self.state, event, now)
        for effect in effects:
            self.perform(*effect)
        return now

    def perform(self, command: str, *arguments: Any) -> None:
        if command == "quit":
            self.quit()
        elif command == "retry":
            self.retry.set()
        elif command == "tell":
            title, text = arguments
            self.on_ui(self.icon.notify, text[:250], title[:60])
        elif command == "copy" and self.glib and not os.environ.get("WAYLAND_DISPLAY"):
            self.on_ui(self.copy)
        else:
            threading.Thread(target=self.go, args=(command, *arguments), daemon=True).start()

    def go(self, command: str, *arguments: Any) -> None:
        try:
            why = getattr(self.box, command)(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user is told
            why = str(error) or type(error).__name__
        self.events.put(Event("done", command, why or ""))

    def copy(self) -> None:
        gtk, gdk = (importlib.import_module(f"gi.repository.{name}") for name in ("Gtk", "Gdk"))
        gtk.Clipboard.get(gdk.SELECTION_CLIPBOARD).set_text(self.box.url + "/v1", -1)


def start(options: argparse.Namespace) -> int:
    pystray, box = load_pystray(), Box(options.url.rstrip("/"))
    if not box.alone():
        say(f"one is already running for {box.url}; here is the dashboard")
        box.dashboard()
        return 0
    for old in box.private.glob(f"{box.name}.pictures*"):  # of one that was killed
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{box.name}.pictures", dir=box.private) as scratch:
        tempfile.tempdir = scratch  # where pystray puts them
        notify = True
        with contextlib.suppress(OSError, ValueError, KeyError):
            notify = json.loads((box.home / "tray.json").read_text(encoding="utf-8"))["notify"]
        local = urlsplit(box.url).hostname in ("127.0.0.1", "::1", "localhost")
        state = State(box.url, local, notify=bool(notify), login=box.entry.exists())
        shell = Shell(pystray, state, box)
        if not shell.icon.HAS_MENU:
            say(NO_MENU)
        end = time.monotonic() + options.panel_wait
        while not (found := shell.has_panel()) and time.monotonic() < end:
            time.sleep(0.2)
        if not found and not options.autostart:
            raise Unable(NO_PANEL)
        if not found:
            say(NO_PANEL + "; waiting for one")
        return shell.run()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmq_tray", description="llmq's tray icon.")
    add = parser.add_argument
    add("--url", default=State.url, help="of the llmq (default: %(default)s)")
    add("--autostart", action="store_true", help="started at login: to show nothing is no failure")
    add("--panel-wait", type=float, default=10.0, help="seconds for a panel to appear")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"https?://[^/?#@]+(/[^?#]*)?", options.url):
        parser.error(f"--url wants http://HOST:PORT, not {options.url}")
    try:
        return start(options)
    except (Unable, OSError) as error:
        say(str(error))
        return 0 if options.autostart else 2


if __name__ == "__main__":
    sys.exit(main())
