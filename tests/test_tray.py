"""The tray icon without a desktop: what it decides, shows, draws, hears and does to the box."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import plistlib
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmq
from tests.fakes import (
    FakeBackend,
    Process,
    eventually,
    need,
    render_answer,
    require,
    require_command,
    running,
)
from tests.test_top import recorded
from tests.tray import sheet
from tray import llmq_tray as tray
from tray.llmq_tray import FACES, Event, State, reduce, view

UP = State(link="up")


def snapshot(
    mode: str = "open", waiting: int = 0, running: int = 0, backends: Any = ("up",), full: int = 0
) -> Event:
    facts = {
        "mode": mode,
        "queue": {"waiting": waiting, "running": running, "oldest_wait_s": 1.5},
        "backends": [{"name": "a", "state": state} for state in backends],
        "requests_total": {"done": 7, "queue_full": full} if full else {},
        "of later": [1, 2, 3],
    }
    return tray.read_snapshot(json.dumps(facts).encode())


def queued(*rows: tuple[str, str, float, str], waiting: int = 0, oldest: float = 0) -> Event:
    """A snapshot with these that wait: client, model, seconds, reason; and others unless told."""
    names = ("client", "model", "waited_s", "reason")
    requests = [{"state": "waiting", **dict(zip(names, row))} for row in rows]
    runs = {"state": "running", "client": "r", "model": "m", "waited_s": 9e9, "reason": ""}
    oldest = oldest or max((row[2] for row in rows), default=0)
    facts = {
        "mode": "open",
        "queue": {"waiting": waiting or len(rows), "running": 1, "oldest_wait_s": oldest},
        "backends": [{"name": "a", "state": "up"}],
        "requests_total": {},
        "requests": [runs, *requests],
    }
    return tray.read_snapshot(json.dumps(facts).encode())


def lines(*events: Event) -> tuple[str, ...]:
    """What the menu says of those that wait."""
    return view(play(UP, *enumerate(events))[0]).waits


def play(state: State, *events: tuple[float, Event]) -> tuple[State, list[Any]]:
    """The state after all of them, and every effect on the way."""
    all_of_them: list[Any] = []
    for now, event in events:
        state, effects = reduce(state, event, now)
        all_of_them += effects
    return state, all_of_them


def told(effects: list[Any]) -> list[str]:
    return [effect[1] for effect in effects if effect[0] == "tell"]


TICK = Event("tick")
GONE = Event("lost", "down")
ABSENT = Event("lost", "absent")


# ---- view


SHOWN = [
    (State(), "connecting", 0, "llmq: connecting"),
    (UP, "idle", 0, "llmq: idle"),
    (replace(UP, running=1), "working", 0, "llmq: 1 running"),
    (replace(UP, waiting=3, running=1), "working", 3, "llmq: 3 waiting, 1 running"),
    (replace(UP, mode="paused"), "paused", 0, "llmq: paused"),
    (replace(UP, mode="paused", waiting=8), "paused", 8, "llmq: 8 waiting, paused"),
    (
        replace(UP, mode="priority", waiting=2),
        "priority",
        2,
        "llmq: 2 waiting, only urgent requests start",
    ),
    (replace(UP, runners_down=True, waiting=1), "runners", 1, "llmq: 1 waiting, no runner answers"),
    (replace(UP, mode="paused", runners_down=True), "paused", 0, "llmq: paused"),
    (replace(UP, link="absent", waiting=5), "absent", 0, "llmq: not running"),
    (State(link="down"), "down", 0, "llmq: no answer"),
    (State(link="denied"), "denied", 0, "llmq: not authorised"),
    (State(link="untrusted"), "untrusted", 0, "llmq: its certificate is not trusted"),
    (
        State(url="https://gpu-box:8443/llm", local=False, link="down"),
        "down",
        0,
        "llmq at gpu-box: no answer",
    ),
    (State(link="foreign"), "foreign", 0, "llmq: the port is used by another program"),
]


@pytest.mark.parametrize(("state", "face", "number", "title"), SHOWN, ids=[row[3] for row in SHOWN])
def test_face_number_and_title_tell_the_state(state: State, face: str, number: int, title: str):
    shown = view(state)
    assert (shown.face, shown.number, shown.title) == (face, number, title)
    first = shown.menu[0]
    assert not first.enabled
    assert first.text.lower() == FACES[face].words
    assert not any(char.isdigit() for char in first.text)


def test_titles_fit_on_every_system():
    state = State(url=f"http://{'x' * 300}", local=False)
    assert len(view(state).title) == 100
    assert len(view(State(link="denied", why="x" * 300)).menu[0].text) == 100


def test_llmqs_own_words_tell_why_it_does_not_let_the_tray_in():
    state, _ = play(State(), (0, Event("lost", "denied", "bob has no right to this: control")))
    assert view(state).title == "llmq: not authorised: bob has no right to this: control"
    assert view(state).menu[0].text == "Not authorised: bob has no right to this: control"
    assert not item(state, "start").enabled
    assert not item(state, "dashboard").enabled
    state, _ = play(state, (1, snapshot()))
    assert view(state).title == "llmq: idle"
    assert view(play(state, (2, ABSENT))[0]).title == "llmq: not running"


@pytest.mark.parametrize("link", ["denied", "untrusted"])
def test_an_llmq_that_lets_the_tray_in_no_more_is_not_gone(link: str):
    _, effects = play(UP, (0, GONE), (1, Event("lost", link)), (9, TICK))
    assert told(effects) == []


def test_the_menu_does_not_change_with_the_numbers():
    menus = {
        view(replace(UP, waiting=waiting, running=1)).menu for waiting in (0, 1, 2, 99, 100, 10_000)
    }
    assert len(menus) == 1


BUSY = "local busy (1/1): bob, llama3"
ALICE = ("alice", "qwen3:8b", 750.0, BUSY)


def test_the_menu_tells_who_waits_longest_and_why():
    rows = [("dora", "m", 9.0, "next"), ("carol", "", 75.0, "paused"), ALICE, ("eve", "m", 60, "")]
    assert lines(queued(*rows)) == (
        f"alice, qwen3:8b: 12 min — {BUSY}",
        "carol: 1 min — paused",
        "eve, m: 1 min",
        "and 1 more",
    )
    assert lines(queued(*rows[:3]))[2:] == ("dora, m: under 1 min — next",)
    assert lines(queued(ALICE, waiting=2048))[1:] == ("and 2,047 more",)


def test_nothing_is_said_of_those_that_wait_where_none_does_or_llmq_does_not_tell():
    assert lines(queued()) == lines(queued(ALICE), queued()) == ()
    assert lines(snapshot(waiting=7)) == ()  # an older llmq, maybe
    for lost in (GONE, ABSENT, Event("lost", "denied")):
        assert lines(queued(ALICE), lost) == ()


def test_of_a_long_queue_it_is_said_that_one_waits_longer_than_all_that_llmq_shows():
    hundred = [ALICE] * 100
    assert lines(queued(*hundred, waiting=312))[3] == "and 309 more"
    assert lines(queued(*hundred, waiting=312, oldest=779))[3] == "and 309 more"  # 12 min, too
    hidden = queued(*hundred, waiting=312, oldest=7500)
    assert lines(hidden)[3] == "and 309 more, one of them for 2 h 5 min"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "under 1 min"),
        (59.9, "under 1 min"),
        (60, "1 min"),
        (3599.9, "59 min"),
        (3600, "1 h 0 min"),
        (190_000, "52 h 46 min"),
    ],
)
def test_waits_are_told_in_minutes(seconds: float, words: str):
    assert lines(queued(("a", "m", seconds, "next"))) == (f"a, m: {words} — next",)


def test_the_lines_change_at_most_once_a_minute_with_time_alone():
    events = [queued((*ALICE[:2], 720 + second, BUSY)) for second in range(60)]
    assert len({event.what["waits"] for event in events}) == 1
    assert events[0] == events[-1]  # so that the link does not even tell it
    assert queued((*ALICE[:2], 780, BUSY)) != events[0]


def test_names_of_others_stay_on_one_line_of_bounded_length():
    evil = "a\nb\tc\x1b]0;x\x07d\u202ee\u2028f\x00"
    for name in (evil, "x" * 10_000, "\U0001f600" * 10_000, evil * 10_000):
        (line,) = lines(queued((name, name, 750, f"busy: {name}, {name}")))
        assert line.isprintable()
        assert len(line) <= 100
        assert ": 12 min — busy: " in line  # long names leave room for the reason
    (line,) = lines(queued((evil, "_m & <b>n</b>", 0, "next")))
    assert line == "a?b?c?]0;x?d?e?f?, _m & <b>n</b>: under 1 min — next"


def item(state: State, command: str) -> tray.Item:
    return next(one for one in view(state).menu if one.command == command)


def test_switches_are_checked_as_llmq_says_and_wait_for_its_answer():
    assert item(UP, "paused").checked is item(UP, "priority").checked is False
    assert item(replace(UP, mode="paused"), "paused").checked
    assert item(replace(UP, mode="priority"), "priority").checked
    for state in (replace(UP, busy="Pausing…"), replace(UP, link="down")):
        assert not item(state, "paused").enabled
        assert not item(state, "priority").enabled
    assert view(replace(UP, busy="Pausing…")).menu[0].text == "Pausing…"


def test_start_and_stop_are_offered_where_they_make_sense():
    commands = {one.command for one in view(UP).menu}
    assert "stop" in commands
    assert "start" not in commands
    assert item(replace(UP, link="absent"), "start").enabled
    assert not item(State(link="foreign"), "start").enabled
    assert not item(replace(State(link="absent"), busy="Starting…"), "start").enabled
    elsewhere = {one.command for one in view(replace(UP, local=False)).menu}
    assert not elsewhere & {"start", "stop"}


# ---- reduce


def test_what_a_snapshot_says_is_taken_over():
    state, effects = play(State(), (0, snapshot("paused", 4, 2, ("down", "loading"))))
    assert (state.link, state.mode, state.waiting, state.running) == ("up", "paused", 4, 2)
    assert not state.runners_down
    assert effects == []
    assert play(state, (1, snapshot(backends=("down", "refused"))))[0].runners_down
    assert not play(state, (1, snapshot(backends=())))[0].runners_down


def test_llmq_is_started_once_where_nothing_listens_on_this_box():
    state, effects = play(State(), (0, ABSENT), (1, ABSENT), (2, ABSENT))
    assert effects == [("start",)]
    assert view(state).face == "connecting"
    state, effects = play(state, (3, Event("done", "start")), (4, snapshot()))
    assert effects == [("retry",)]
    assert view(state).face == "idle"
    assert play(State(local=False), (0, ABSENT))[1] == []
    assert play(State(), (0, Event("lost", "foreign")))[1] == []
    assert play(State(), (0, Event("lost", "down")))[1] == []


def test_a_start_that_fails_is_told_and_not_tried_again():
    failed = Event("done", "start", "port taken")
    state, effects = play(State(), (0, ABSENT), (1, failed), (2, ABSENT), (3, ABSENT))
    assert effects == [
        ("start",),
        ("tell", "Could not do it: start", "port taken"),
        ("retry",),
    ]
    assert view(state).title == "llmq: not running"


def test_a_death_is_told_once_and_so_is_the_recovery():
    state, effects = play(UP, (0, GONE), (1, ABSENT))
    assert view(state).face == "absent"
    assert effects == []  # perhaps it only restarts
    state, effects = play(state, (3, TICK), (4, ABSENT), (60, TICK))
    assert told(effects) == ["llmq is gone"]
    state, effects = play(state, (61, snapshot()), (62, TICK), (63, snapshot()))
    assert told(effects) == ["llmq is well again"]


def test_a_quick_restart_a_goodbye_and_a_stop_from_here_are_no_deaths():
    assert told(play(UP, (0, GONE), (2, snapshot()), (9, TICK))[1]) == []
    assert told(play(UP, (0, Event("lost", "down", goodbye=True)), (9, TICK))[1]) == []
    click = Event("click", "stop")
    assert told(play(UP, (0, click), (0, Event("done", "stop")), (1, GONE), (9, TICK))[1]) == []


def test_a_stop_that_failed_excuses_no_death():
    failed = Event("done", "stop", "started elsewhere")
    state, effects = play(UP, (0, Event("click", "stop")), (1, failed))
    assert told(effects) == ["Could not do it: stop"]
    assert told(play(state, (2, GONE), (9, TICK))[1]) == ["llmq is gone"]


def test_silent_runners_are_told_after_half_a_minute():
    down = snapshot(backends=("down", "down"))
    state, effects = play(UP, (0, down), (29, TICK))
    assert effects == []
    state, effects = play(state, (30, TICK), (40, down))
    assert told(effects) == ["No runner answers"]
    assert told(play(state, (50, snapshot()))[1]) == ["llmq is well again"]
    flapping = [(second, (down, snapshot())[second % 2]) for second in range(100)]
    assert play(UP, *flapping)[1] == []


def test_a_full_queue_is_told_once_per_episode():
    state, effects = play(State(), (0, snapshot(full=5)))
    assert effects == []  # it was before the tray came
    state, effects = play(state, (1, snapshot(full=6)), (2, snapshot(full=9)), (50, TICK))
    assert told(effects) == ["The queue is full"]
    state, effects = play(state, (61, TICK), (63, TICK))
    assert told(effects) == ["llmq is well again"]


def test_nothing_is_told_when_notifications_are_off():
    state, effects = play(UP, (0, Event("click", "notify")))
    assert effects == [("notify", False)]
    state, effects = play(
        state,
        (0, Event("done", "notify")),
        (1, GONE),
        (9, TICK),
        (10, Event("done", "start", "no")),
    )
    assert told(effects) == []


@pytest.mark.parametrize(
    ("mode", "command", "wanted"),
    [
        ("open", "paused", "paused"),
        ("paused", "paused", "open"),
        ("priority", "paused", "paused"),
        ("open", "priority", "priority"),
        ("priority", "priority", "open"),
    ],
)
def test_a_click_asks_llmq_and_shows_that_it_did(mode: str, command: str, wanted: str):
    state, effects = play(replace(UP, mode=mode), (0, Event("click", command)))
    assert effects == [("mode", wanted)]
    assert state.mode == mode  # llmq has not said so yet
    assert state.busy.endswith("…")
    state, effects = play(state, (1, Event("done", "mode")))
    assert (state.busy, effects) == ("", [("retry",)])
    failed = play(replace(state, busy="…"), (1, Event("done", "mode", "refused")))[1]
    assert told(failed) == ["Could not do it: mode"]


def texts(state: State) -> list[str]:
    return [one.text for one in view(state).menu]


def test_the_gpu_is_freed_and_given_back():
    assert item(UP, "free").text == "Free the GPU"
    assert not item(replace(UP, link="absent"), "free").enabled
    state, effects = play(UP, (0, Event("click", "free")))
    assert effects == [("free",)]
    assert state.busy == "Freeing the GPU…"
    assert not item(state, "free").enabled
    # An older snapshot may come after the answer: it is no sign that somebody has opened llmq.
    late = (2, snapshot("open"))
    state, effects = play(state, (1, Event("done", "free")), late, (3, snapshot("paused")))
    assert told(effects) == ["The GPU is being freed"]
    assert "Free the GPU" not in texts(state)
    again = next(one for one in view(state).menu if one.text == "Open again")
    assert play(state, (4, Event("click", again.command)))[1] == [("mode", "open")]
    state, _ = play(state, (5, snapshot("open")))
    assert "Open again" not in texts(state)
    state, _ = play(state, (6, snapshot("paused")))  # by somebody else
    assert "Free the GPU" in texts(state)


def test_why_the_gpu_was_not_freed_is_told():
    state, effects = play(UP, (0, Event("click", "free")), (1, Event("done", "free", "no")))
    assert ("tell", "Could not do it: free", "no") in effects
    assert told(effects) == ["Could not do it: free"]
    assert "Free the GPU" in texts(play(state, (2, snapshot("paused")))[0])
    quiet = replace(UP, notify=False)
    assert told(play(quiet, (0, Event("click", "free")), (1, Event("done", "free")))[1]) == []


@pytest.mark.usefixtures("home")
async def test_to_free_the_gpu_is_to_pause_and_to_unload_everything():
    async with FakeBackend() as fake, running(fake.url) as q:
        box, loop = tray.Box(q.base), asyncio.get_running_loop()
        with recorded() as asked:
            assert await loop.run_in_executor(None, box.free) == ""
            assert asked == [{"action": "unload", "model": "*"}]
            assert q.gateway.scheduler.mode.value == "paused"
        with recorded(refuse="unload"):
            why = await loop.run_in_executor(None, box.free)
            assert why == "llmq is paused, but its models stay loaded: box cannot unload models"
    with pytest.raises(OSError, match="refused"):
        await loop.run_in_executor(None, box.free)


def test_stop_wants_a_second_click_while_requests_run():
    busy = replace(UP, running=2)
    state, effects = play(busy, (0, Event("click", "stop")))
    assert effects == []
    assert item(state, "stop").text == "Stop llmq (requests run, click again)"
    assert play(state, (1, snapshot(running=1)), (5, Event("click", "stop")))[1] == [("stop",)]
    late = play(state, (11, TICK), (12, Event("click", "stop")))[1]
    assert late == []
    assert play(UP, (0, Event("click", "stop")))[1] == [("stop",)]


def test_login_is_checked_once_it_is_done():
    state, effects = play(UP, (0, Event("click", "login")))
    assert effects == [("login", True)]
    assert not state.login
    assert play(state, (1, Event("done", "login")))[0].login
    assert not play(state, (1, Event("done", "login", "disk full")))[0].login


def test_every_line_of_the_menu_has_somebody_who_does_it():
    states = [UP, State(link="absent")]
    commands = {one.command for state in states for one in view(state).menu if one.command}
    known = {"quit", "retry", "tell"} | {name for name in dir(tray.Box) if name[0] != "_"}
    for command, state in product(sorted(commands), states):
        for effect in play(state, (0, Event("click", command)))[1]:
            assert effect[0] in known, command


# ---- draw


@pytest.mark.parametrize("pixels", [16, 22, 32, 44, 64])
def test_every_face_and_number_draws_another_picture(pixels: int):
    require("PIL.Image")
    drawn = {}
    for name, number in product(FACES, (0, 1, 8, 9, 10, 88, 99, 100)):
        face = FACES[name]
        picture = tray.draw(face, number, pixels)
        assert picture.size == (pixels, pixels)
        assert picture.mode == "RGBA"
        if number and not (face.band or face.mark == "play"):
            assert picture.tobytes() == tray.draw(face, 0, pixels).tobytes()  # trouble goes first
        else:
            drawn[name, number] = picture.tobytes()
    drawn.pop(("foreign", 0))  # its sentence tells it from `runners`
    drawn.pop(("down", 0))
    drawn.pop(("untrusted", 0))
    assert len(set(drawn.values())) == len(drawn)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    line = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]


@pytest.mark.parametrize("name", FACES)
def test_marks_and_numbers_stand_out_from_their_tile(name: str):
    face = FACES[name]
    pairs = [(face.tile, face.ink), *([(face.band, "#ffffff")] if face.band else [])]
    for pair in pairs:
        dark, light = sorted(luminance(colour) for colour in pair)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair  # WCAG 2, text of any size


def test_the_corners_are_clear_and_the_middle_is_not():
    require("PIL.Image")
    picture = tray.draw(FACES["idle"], 0, 64)
    alpha = picture.getchannel("A")
    assert [alpha.getpixel(at) for at in ((0, 0), (63, 0), (0, 63), (63, 63))] == [0] * 4
    assert alpha.getpixel((32, 32)) == 255


def test_the_picture_of_the_readme_is_the_drawn_one():
    image = require("PIL.Image")
    with image.open(sheet.PICTURE) as kept:
        assert sheet.PICTURE.stat().st_size < 60_000
        now = sheet.sheet()
        assert kept.size == now.size
        difference = require("PIL.ImageChops").difference(kept.convert("RGB"), now)
    # It has fewer colours than were drawn, and another Pillow may shrink a little differently.
    off = [sum(difference.convert("L").histogram()[48:]) / (now.width * now.height)]
    assert off[0] < 0.002, "run python3 -m tests.tray.sheet"


# ---- the link


async def told_by(url: str, until: Any) -> tuple[list[Event], Event]:
    """What `watch` tells from another thread until it ends; `until` makes it end."""
    events: list[Event] = []
    task = asyncio.get_running_loop().run_in_executor(None, tray.watch, url, events.append)
    await until(events)
    return events, await task


async def test_the_link_tells_every_change_and_a_goodbye():
    async with running("http://127.0.0.1:9") as q:

        async def until(events: list[Event]) -> None:
            await eventually(lambda: events)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, tray.ask, q.base + "/llmq/mode", {"mode": "paused"})
            await eventually(lambda: events[-1].what["mode"] == "paused")
            await q.service.stop()

        events, end = await told_by(q.base, until)
    assert events[0].what["mode"] == "open"
    assert end == Event("lost", "down", goodbye=True)


async def test_the_link_tells_who_waits_and_why():
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        asked = []
        for name in ("bob", "alice", "carol"):
            asked.append(asyncio.ensure_future(q.chat("x", {"X-User-ID": name})))
            await eventually(lambda: len(q.gateway.calls) == len(asked))
        busy = "under 1 min — local busy (1/1): user:bob, m"
        wanted = (f"user:alice, m: {busy}", f"user:carol, m: {busy}")

        async def until(events: list[Event]) -> None:
            await eventually(lambda: events and lines(events[-1]) == wanted)
            for _ in asked:
                await (await fake.arrived()).answer("the end")
            await asyncio.gather(*asked)
            await eventually(lambda: lines(events[-1]) == ())
            await q.service.stop()

        await told_by(q.base, until)


async def test_the_link_tells_a_death_from_a_goodbye():
    async with Process("--demo", "--port", "0") as llmq:

        async def until(events: list[Event]) -> None:
            await eventually(lambda: events)
            llmq.popen.kill()

        _, end = await told_by(f"http://127.0.0.1:{llmq.port}", until)
    assert (end.kind, end.what, end.goodbye) == ("lost", "down", False)


async def nothing(_events: list[Event]) -> None:
    pass


async def test_who_else_may_be_there_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is none of its business
    async with FakeBackend() as fake:
        _, end = await told_by(fake.url, nothing)
        assert end == Event("lost", "foreign")
        fake.probe_answers["/llmq/events"] = (401, {"error": {"message": "no key"}})
        _, end = await told_by(fake.url, nothing)
        assert end == Event("lost", "denied")
        url = fake.url
    _, end = await told_by(url, nothing)
    assert end == Event("lost", "absent")


@pytest.mark.parametrize("data", ["no JSON", "[1]", "{}", '{"queue": 7}', "null"])
async def test_events_of_another_program_are_not_taken_for_a_state(data: str):
    async with FakeBackend() as fake:
        stream = [("Content-Type", "text/event-stream")]
        answer = render_answer(200, f"data: {data}\n\n".encode(), stream)

        async def send(request: Any) -> None:
            await request.send(answer)

        fake._answer_probe = send  # type: ignore[method-assign]
        events, end = await told_by(fake.url, nothing)
    assert (events, end) == ([], Event("lost", "foreign"))


async def test_a_server_that_says_nothing_is_no_llmq(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tray, "SILENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # and nobody accepts
        _, end = await told_by(f"http://127.0.0.1:{listening.getsockname()[1]}", nothing)
    assert end == Event("lost", "down")


async def stream(pieces: list[tuple[float, bytes]]) -> tuple[list[Event], Event]:
    """What `watch` makes of an event stream that says each piece so many seconds after the head."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writers.append(writer)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: ping\n\n")
        for seconds, piece in pieces:
            asyncio.get_running_loop().call_later(seconds, writer.write, piece)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        told = await told_by(url, nothing)
        writers[0].close()
    return told


async def test_a_silent_link_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tray, "SILENCE_SECONDS", 0.1)
    events, end = await stream([])
    assert (events, end) == ([], Event("lost", "down"))


async def test_a_link_is_kept_as_long_as_it_is_not_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tray, "SILENCE_SECONDS", 1.0)
    facts = b'{"mode": "open", "queue": {"waiting": 2, "running": 1}, "backends": [],'
    facts += b' "requests_total": {}}'
    # Cut anywhere, even inside the blank line that ends it.
    pieces = [(0.4, b"data: " + facts[:50]), (0.5, facts[50:] + b"\n"), (0.6, b"\n: ping")]
    events, end = await stream(pieces)
    assert [event.what["waiting"] for event in events] == [2]
    assert end == Event("lost", "down")


class Enough(Exception):
    """Ends a loop that has no end."""


def pauses(monkeypatch: pytest.MonkeyPatch, links: str, woken: list[bool]) -> list[float]:
    """The pauses between links, of which those marked + were good, where nothing spreads them."""
    left, waited = list(links), []

    def live(_url: str, tell: Any, _key_file: str) -> Event:
        if not left:
            raise Enough
        if left.pop(0) == "+":
            tell(snapshot())
        return GONE

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return woken.pop(0)

    monkeypatch.setattr(tray, "watch", live)
    monkeypatch.setattr(tray.random, "uniform", lambda low, high: (low + high) / 2)
    with contextlib.suppress(Enough):
        retry: Any = SimpleNamespace(wait=wait, clear=lambda: None)
        tray.keep_watching("", lambda _event: None, retry)
    return waited


def test_attempts_grow_rarer_until_a_link_is_good_or_a_click_asks(monkeypatch: pytest.MonkeyPatch):
    assert pauses(monkeypatch, "-" * 7, [False] * 7) == [0.5, 1, 2, 4, 8, 10, 10]
    assert pauses(monkeypatch, "--+-", [False] * 4) == [0.5, 1, 0.5, 1]
    assert pauses(monkeypatch, "---", [False, True, False]) == [0.5, 1, 0.5]


async def test_only_the_newest_snapshot_is_told_and_none_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tray, "SILENCE_SECONDS", 1.0)
    facts = b'data: {"mode": "open", "queue": {"waiting": %d, "running": 1}, "backends": [],'
    facts += b' "requests_total": {}}\n\n'
    burst = b"".join(facts % number for number in range(1000))
    events, _ = await stream([(0.0, burst + (facts % 999) * 1000), (0.1, facts % 999)])
    waiting = [event.what["waiting"] for event in events]
    assert waiting[-1] == 999
    assert waiting == sorted(set(waiting))
    assert len(waiting) < 100  # the reads that they came in, at most


def test_snapshots_that_nobody_looked_at_give_way_to_newer_ones():
    events = tray.Events()
    for number in range(1000):
        events.put(snapshot(waiting=number))
    events.put(GONE)
    events.put(snapshot(waiting=7))
    events.put(TICK)
    events.put(snapshot(waiting=8))
    told = [events.get_nowait() for _ in range(events.qsize())]
    assert told == [
        snapshot(waiting=999),
        GONE,
        snapshot(waiting=7),
        TICK,
        snapshot(waiting=8),
    ]


# ---- keys, HTTPS, a base path

KEYS = {"tray": {"key": "k-tray", "rights": ["control", "models"]}, "bob": {"key": "k-bob"}}


async def beside(work: Any, *arguments: Any) -> Any:
    """What a call returns that waits for this llmq."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


async def link_of(url: str, key_file: str = "") -> tuple[list[Event], Event]:
    """What the link tells first, and how it ends when somebody asks the one who told it."""
    events: list[Event] = []
    task = asyncio.ensure_future(beside(tray.watch, url, events.append, key_file))
    await eventually(lambda: events or task.done())
    return events, await task if task.done() else Event("seen")


@pytest.mark.usefixtures("home")
async def test_the_key_of_a_file_goes_before_that_of_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "key"
    file.write_text("k-tray\n", encoding="utf-8")
    monkeypatch.delenv("LLMQ_KEY", raising=False)
    async with FakeBackend() as fake, running(fake.url, keys=KEYS) as q:
        assert (await link_of(q.base))[1] == Event("lost", "denied", "a key is needed")
        monkeypatch.setenv("LLMQ_KEY", "k-bob")
        words = "bob has no right to this: control"
        assert (await link_of(q.base))[1] == Event("lost", "denied", words)
        monkeypatch.setenv("LLMQ_KEY", "wrong")
        assert (await link_of(q.base))[1] == Event("lost", "denied", "that key is not known")
        told, _ = await link_of(q.base, str(file))
        assert told[0].kind == "seen"
        box = tray.Box(q.base, str(file))
        await beside(box.mode, "paused")
        assert q.gateway.scheduler.mode.value == "paused"
        with pytest.raises(ValueError, match="that key is not known"):
            await beside(tray.Box(q.base).mode, "open")
        monkeypatch.setenv("LLMQ_KEY", "k-tray")
        assert (await link_of(q.base))[0][0].kind == "seen"
        with recorded() as asked:
            assert await beside(tray.Box(q.base).free) == ""
        assert asked == [{"action": "unload", "model": "*"}]
        file.unlink()  # while the tray runs: llmq itself says what is wrong
        assert (await link_of(q.base, str(file)))[1].why == "a key is needed"


async def test_a_refused_key_is_shown_seldom_enough_not_to_count_as_guessing(
    monkeypatch: pytest.MonkeyPatch,
):
    waited = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        if len(waited) > 12:
            raise Enough
        return False

    denied = Event("lost", "denied", "that key is not known")
    monkeypatch.setattr(tray, "watch", lambda *_: denied)
    told: list[Event] = []
    retry: Any = SimpleNamespace(wait=wait, clear=lambda: None)
    with pytest.raises(Enough):
        tray.keep_watching("", told.append, retry)
    assert set(told) == {denied}
    assert min(waited) * (llmq.GUESSES - 1) > llmq.GUESS_SECONDS
    async with running("http://127.0.0.1:9", keys=KEYS) as q:
        monkeypatch.undo()
        monkeypatch.setenv("LLMQ_KEY", "wrong")
        for _ in range(llmq.GUESSES):
            await link_of(q.base)
        ended = (await link_of(q.base))[1]
        assert (ended.what, ended.why) == ("denied", "too many wrong keys came from there")


@pytest.mark.parametrize(
    ("status", "link"), [(401, "denied"), (403, "denied"), (404, "foreign"), (429, "foreign"),
                         (502, "down"), (503, "down"), (504, "down")]
)  # fmt: skip
async def test_what_a_proxy_in_front_says_is_not_taken_for_llmqs_words(status: int, link: str):
    async with FakeBackend() as fake:
        fake.probe_answers["/llmq/events"] = (status, {"error": {"message": "buy\x1b more"}})
        assert (await told_by(fake.url, nothing))[1] == Event("lost", link)


async def test_the_key_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLMQ_KEY", "k-tray")
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        place = f"Location: {url}/elsewhere\r\n".encode() if len(seen) == 1 else b""
        status = b"302 Found" if place else b"401 No"
        writer.write(b"HTTP/1.1 %s\r\n%sContent-Length: 0\r\n\r\n" % (status, place))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert (await told_by(url, nothing))[1] == Event("lost", "denied")
    assert [b"k-tray" in head for head in seen] == [True, False]


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    """One for localhost, signed by itself."""
    files = {"tls_cert": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    subprocess.run(
        [require_command("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", files["tls_key"], "-out", files["tls_cert"]],
        capture_output=True, check=True,
    )  # fmt: skip
    return {**files, "folder": str(tmp_path)}


def trusting(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """As a tray that was started with this variable."""
    monkeypatch.setenv("SSL_CERT_FILE", file)
    monkeypatch.setattr(tray, "OPENER", tray.build_opener(tray.ProxyHandler({})))


async def test_the_link_works_over_https_under_a_base_path_with_a_key(
    certificate: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMQ_KEY", "k-tray")
    monkeypatch.setenv("XDG_RUNTIME_DIR", certificate.pop("folder"))
    server = {f"server__{name}": file for name, file in certificate.items()}
    async with running("http://127.0.0.1:9", keys=KEYS, server__base_path="/llm", **server) as q:
        url = f"https://127.0.0.1:{q.port}/llm"
        assert (await link_of(url))[1] == Event("lost", "untrusted")
        trusting(monkeypatch, certificate["tls_cert"])
        assert (await link_of(url))[0][0].kind == "seen"
        box = tray.Box(url)
        await beside(box.mode, "priority")
        assert q.gateway.scheduler.mode.value == "priority"
        assert await beside(tray.instance_at, url) == q.gateway.instance[:6]
        bare = url.removesuffix("/llm")
        assert (await link_of(bare))[1].what in ("foreign", "denied")
        plain = (await link_of(url.replace("https", "http")))[1]
        assert plain.what in ("down", "foreign")


# ---- this box


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it, and nothing on PATH."""
    for name in [*os.environ]:
        if name.startswith(("XDG_", "LLMQ_", "SSL_")):
            monkeypatch.delenv(name)
    home = tmp_path / 'my "home" 100%'
    (home / "bin").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(home / "bin"))
    return home


def stub(home: Path, name: str, script: str) -> Path:
    """A program on PATH that notes how it was called, then does what `script` says."""
    log = home / f"{name}.log"
    path = home / "bin" / name
    path.write_text(f"#!/bin/sh\necho \"$*\" >>'{log}'\n{script}\n")
    path.chmod(0o755)
    return log


URL = "http://127.0.0.1:11500"


def install(home: Path, *units: str) -> None:
    folder = home / ".config" / "systemd" / "user"
    folder.mkdir(parents=True, exist_ok=True)
    for unit in units:
        (folder / unit).touch()


def test_an_installed_unit_is_started_and_stopped_by_its_manager(home: Path):
    log = stub(home, "systemctl", "true")
    install(home, "llmq.service")
    box = tray.Box(URL)
    assert box.start() == box.stop() == ""
    install(home, "llmq.socket")  # which would start it again
    assert box.stop() == ""
    calls = ["start llmq.service", "stop llmq.service", "stop llmq.socket llmq.service"]
    assert log.read_text().splitlines() == [f"--user {call}" for call in calls]


def test_what_a_service_manager_cannot_do_is_told(home: Path):
    stub(home, "systemctl", "exit 1")
    install(home, "llmq.service")
    assert tray.Box(URL).start() == "systemctl --user start llmq.service failed"


def test_a_launch_agent_is_started_and_stopped_by_launchd(home: Path):
    log = stub(home, "launchctl", "true")
    agents = home / "Library" / "LaunchAgents"
    agents.mkdir(parents=True)
    (agents / "local.llmq-tray.plist").touch()  # its own
    box = tray.Box(URL)
    assert box.service("start") == []
    (agents / "local.llmq.plist").touch()
    assert box.start() == box.stop() == ""
    target = f"gui/{os.getuid()}/local.llmq"
    assert log.read_text().splitlines() == [f"kickstart {target}", f"kill SIGTERM {target}"]


def test_on_wayland_the_url_is_copied_by_wl_copy(home: Path):
    stub(home, "wl-copy", f"/bin/cat >'{home}/copied'; /bin/sleep 2 &")  # it serves the text on
    assert tray.Box(URL).copy() == ""
    assert (home / "copied").read_text() == URL + "/v1"
    stub(home, "wl-copy", "exit 1")
    assert tray.Box(URL).copy() == "wl-copy failed"


@pytest.mark.parametrize("url", ["gpu-box:11500", "ftp://box", "http://", "http://u:p@box"])
def test_a_url_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        tray.main(["--url", url])
    assert caught.value.code == 2
    assert "--url wants http://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "No such file or directory"),
        (b"", "there is no key: visible ASCII without spaces"),
        (b"two words\n", "there is no key: visible ASCII without spaces"),
        (b"\xff\n", "is no text"),
    ],
)
def test_a_key_file_without_a_key_is_named_and_its_text_is_not(
    data: bytes | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "key"
    if data is not None:
        file.write_bytes(data)
    assert tray.main(["--key-file", str(file)]) == 2
    assert capsys.readouterr().err == f"llmq tray: --key-file {file}: {why}\n"


def test_a_variable_without_a_key_is_named_and_its_text_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LLMQ_KEY", "k\x1by")
    assert tray.main([]) == 2
    why = "there is no key: visible ASCII without spaces"
    assert capsys.readouterr().err == f"llmq tray: LLMQ_KEY: {why}\n"


class Stand:
    """In place of a process that is started: it notes the command, and never listens."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.command = command
        Stand.last = self

    last: Any = None
    pid = 1

    def poll(self) -> int:
        return 1

    def wait(self) -> int:
        return 1


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://127.0.0.1:11500", ["--port", "11500"]),
        ("http://localhost", ["--port", "80"]),
        ("https://localhost/llm", ["--port", "443", "--base-path", "/llm"]),
        ("https://127.0.0.1:8443/a/b", ["--port", "8443", "--base-path", "/a/b"]),
    ],
)
def test_llmq_is_started_where_the_url_has_it_and_its_command_holds_no_key(
    url: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "key"
    file.write_text("k-tray", encoding="utf-8")
    monkeypatch.setenv("LLMQ_KEY", "k-tray")
    monkeypatch.setattr(tray.subprocess, "Popen", Stand)
    tray.Box(url, str(file)).start()
    assert Stand.last.command[2:] == ["serve", *wanted]
    parser = llmq.build_parser()
    options = llmq.given_flags(parser.parse_args(Stand.last.command[2:]))
    assert options["server.base_path"] if "--base-path" in wanted else "server.port" in options


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.usefixtures("home")
async def test_an_llmq_that_wants_keys_is_started_and_stopped_from_here(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also by a tray whose key may see it, but not use it."""
    config = home / ".config" / "llmq"
    config.mkdir(parents=True)
    rows = {"keys": {"tray": {"key": "k-tray", "rights": ["control"]}}}
    (config / "llmq.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setenv("LLMQ_KEY", "k-tray")
    monkeypatch.setenv("LLMQ_BACKENDS", "http://127.0.0.1:9")
    monkeypatch.setattr(tray, "HERE", sheet.ROOT / "tray" / "llmq_tray.py")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    box = tray.Box(f"http://127.0.0.1:{port}/llm")
    assert await beside(box.start) == ""
    pid = json.loads(box.born.read_text(encoding="utf-8"))[0]
    with contextlib.suppress(FileNotFoundError):  # where there is no /proc
        assert b"k-tray" not in await beside(Path(f"/proc/{pid}/cmdline").read_bytes)
    assert (await link_of(box.url))[0][0].kind == "seen"
    assert await beside(box.stop) == ""
    await eventually(lambda: is_free(port))


@pytest.mark.usefixtures("home")
def test_at_login_the_key_comes_from_the_same_file(tmp_path: Path):
    require("PIL.Image")
    file = tmp_path / "key"
    file.write_text("k-tray", encoding="utf-8")
    box = tray.Box(URL, str(file))
    if box.entry.suffix != ".desktop":
        pytest.skip("another kind of entry here")
    box.login(True)
    written = box.entry.read_text(encoding="utf-8")
    assert f'"--key-file" "{file}"' in written
    assert "k-tray" not in written


def test_nothing_to_start_and_nothing_of_ours_to_stop_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tray, "HERE", home / "tray" / "llmq_tray.py")
    box = tray.Box("http://127.0.0.1:9")
    assert f"can't open file '{home}/llmq.py'" in box.start()
    assert box.stop() == "it was not started from here"
    # A number of old, that may be anybody's by now: nobody answers with that instance.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as anybody:
        box.born.write_text(json.dumps([anybody.pid, "old"]), encoding="utf-8")
        assert box.stop() == "it was not started from here"
        anybody.communicate(b"\n")
    assert anybody.returncode == 0


@pytest.mark.usefixtures("home")
def test_only_one_tray_looks_after_one_llmq():
    box = tray.Box(URL)
    look = f"import sys; sys.path.insert(0, {str(sheet.ROOT)!r}); from tray.llmq_tray import Box; "
    first, other = tray.Box(URL), "http://gpu-box:11500"
    assert first.alone()
    for url, alone in ((URL, "False"), (other, "True")):
        command = [sys.executable, "-c", f"{look}print(Box({url!r}).alone())"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == alone
    first.lock.close()
    assert box.alone()
    box.lock.close()


@pytest.mark.usefixtures("home")
def test_start_at_login_on_a_mac_is_a_launch_agent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tray.sys, "platform", "darwin")
    box = tray.Box(URL)
    box.login(True)
    facts = plistlib.loads(box.entry.read_bytes())
    assert facts["ProgramArguments"] == [
        sys.executable,
        str(tray.HERE),
        "--autostart",
        "--url",
        URL,
    ]
    assert facts["RunAtLoad"] is True
    assert facts["Label"] == box.entry.stem
    box.login(False)
    assert not box.entry.exists()


# ---- the shell, on pystray's dummy


@pytest.fixture
def dummy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pystray without a desktop."""
    for package in ("PIL", "pystray"):
        need(importlib.util.find_spec(package), f"the package {package} is not installed")
    monkeypatch.setenv("PYSTRAY_BACKEND", "dummy")
    for name in [name for name in sys.modules if name.split(".")[0] == "pystray"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("pystray")


@pytest.mark.usefixtures("home")
def test_the_menu_becomes_pystrays_and_clicks_become_events(dummy: Any):
    box = tray.Box(URL)
    state = replace(UP, mode="paused", login=True)
    shell = tray.Shell(dummy, state, box)
    wanted = view(state)
    assert shell.icon.title == wanted.title
    assert shell.icon.icon.tobytes() == tray.draw(FACES["paused"], 0, 64).tobytes()
    items = shell.icon.menu.items
    assert len(items) == len(wanted.menu)
    for shown, line in zip(items, wanted.menu):
        if not line.text:
            assert shown is dummy.Menu.SEPARATOR
            continue
        assert (shown.text, shown.checked, shown.enabled) == (line.text, line.checked, line.enabled)
        assert shown.default == (line.command == "dashboard")
        shown(shell.icon)
        assert shell.events.get_nowait() == Event("click", line.command)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("system", ["linux", "win32"])
def test_what_waits_stands_below_the_first_line_and_opens_the_dashboard(
    dummy: Any, monkeypatch: pytest.MonkeyPatch, system: str
):
    state, _ = play(UP, (0, queued(("a&b", "_m", 750, "next"), ALICE, waiting=9)))
    monkeypatch.setattr(tray.sys, "platform", system)
    shell = tray.Shell(dummy, state, tray.Box(URL))
    items = shell.icon.menu.items
    ands = "&&" if system == "win32" else "&"  # there one would underline what follows
    assert [one.text for one in items[:4]] == [
        "Working",
        f"a{ands}b, _m: 12 min — next",
        f"alice, qwen3:8b: 12 min — {BUSY}",
        "and 7 more",
    ]
    assert items[4] is dummy.Menu.SEPARATOR
    for one in items[1:4]:
        assert (one.enabled, one.checked) == (True, None)
        one(shell.icon)
        assert shell.events.get_nowait() == Event("click", "dashboard")
    assert [one.text for one in items if one.default] == ["Open dashboard"]


@pytest.mark.usefixtures("home")
def test_a_failure_in_a_command_is_an_event_with_its_words(dummy: Any):
    box = tray.Box("http://127.0.0.1:9")
    shell = tray.Shell(dummy, UP, box)
    shell.go("mode", "paused")
    event = shell.events.get_nowait()
    assert (event.kind, event.what) == ("done", "mode")
    assert "refused" in event.why
    shell.perform("notify", False)
    assert shell.events.get(timeout=5) == Event("done", "notify", "")
    assert box.quiet.exists()
    shell.perform("notify", True)
    assert shell.events.get(timeout=5) == Event("done", "notify", "")
    assert not box.quiet.exists()


@pytest.mark.usefixtures("home")
def test_where_pystray_has_no_notifications_nothing_is_told(
    dummy: Any, monkeypatch: pytest.MonkeyPatch
):
    shell = tray.Shell(dummy, UP, tray.Box(URL))
    with pytest.raises(NotImplementedError):
        shell.perform("tell", "llmq is gone", "It ended.")
    monkeypatch.setattr(dummy.Icon, "HAS_NOTIFICATION", False)
    shell.perform("tell", "llmq is gone", "It ended.")
    shell.perform("notify", False)
    assert shell.events.get(timeout=5).what == "notify"


def changes(
    shell: tray.Shell, script: list[tuple[float, Event]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, tuple[str, ...]]]:
    """When the shell changes what of the icon, until the script ends."""
    done: list[Any] = []
    clock = [0.0]

    def get(**_: float) -> Event:
        if not script:
            raise Enough
        clock[0], event = script.pop(0)
        return event

    monkeypatch.setattr(tray.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(shell, "on_ui", lambda *call: done.append((clock[0], call[2:][:1])))
    monkeypatch.setattr(shell.events, "get", get)
    with pytest.raises(Enough):
        shell.think()
    assert done[-1] == (clock[0], ())  # a shell that has failed takes its icon away
    return done


@pytest.mark.usefixtures("home")
def test_icon_and_title_follow_at_most_twice_a_second(dummy: Any, monkeypatch: pytest.MonkeyPatch):
    shell = tray.Shell(dummy, UP, tray.Box(URL))
    script = [(0.1 * step, snapshot(waiting=step)) for step in range(1, 31)]
    done = changes(shell, script, monkeypatch)
    icons = [when for when, name in done if name == ("icon",)]
    assert len(icons) >= 5
    assert all(later - sooner >= 0.5 for sooner, later in zip(icons, icons[1:]))
    assert [name for _, name in done].count(("menu",)) == 1  # from idle to working


@pytest.mark.usefixtures("home")
def test_the_menu_follows_the_queue_more_rarely(dummy: Any, monkeypatch: pytest.MonkeyPatch):
    shell = tray.Shell(dummy, UP, tray.Box(URL))
    monkeypatch.setattr(tray, "WAITS_SECONDS", 10.0)
    grows = [(step / 2, queued(ALICE, waiting=step)) for step in range(2, 91)]
    still = [(46 + step, queued(ALICE, waiting=90)) for step in range(60)]
    done = changes(shell, [*grows, *still], monkeypatch)
    menus = [when for when, name in done if name == ("menu",)]
    assert menus[0] == 1  # from idle to working, and who waits then
    assert all(later - sooner >= 10 for sooner, later in zip(menus[1:], menus[2:]))
    assert menus[-2] <= 45 < menus[-1] <= 55  # the last news, and no more without any
    assert [name for when, name in done if when < 45].count(("icon",)) > 3 * len(menus)


class Endless:
    """An answer that goes on and on: fast, or a byte at a time."""

    def __init__(self, piece: bytes) -> None:
        self.piece, self.given = piece, 0

    def read1(self, _: int) -> bytes:
        self.given += len(self.piece)
        return self.piece


def test_an_answer_that_floods_is_given_up() -> None:
    answer = Endless(b"x" * 65_536)
    with pytest.raises(ValueError, match="too long"):
        tray.read_bounded(answer)
    assert answer.given < 2 * tray.MOST_BYTES + 65_536


def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(tray.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(TimeoutError):
        tray.read_bounded(Endless(b"x"))
