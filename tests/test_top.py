"""`llmq top`: what it shows, what its keys do, and a terminal that is left as it was found."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from llmq import COLOURS, View, brief, cells, fit
from tests.fakes import (
    LLMQ,
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    clean_environment,
    eventually,
    http,
    require,
    run_llmq,
    running,
)

pytestmark = pytest.mark.usefixtures("measured")  # the terminal is handled in them alone

CHAT = "/v1/chat/completions"
NOBODY = "http://127.0.0.1:9"  # where no backend listens
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = [
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[H",
    "a\nb\rc\td",
    "\u202egnp",
    "名前" * 20,
    "e\u0301" * 40,
]


# ---- The picture, without a terminal -----------------------------------------------------------


def request(number: int, **changes: Any) -> dict[str, Any]:
    facts = {
        "id": f"r{number}",
        "client": f"app:c{number}",
        "class": "normal",
        "model": "m",
        "state": "waiting",
        "position": number,
        "waited_s": 1.0 * number,
        "running_s": 0.0,
        "eta_s": 2.0,
        "reason": "local busy (1/1)",
        "backend": None,
        "tokens": 0,
        "tokens_per_s": None,
    }
    return {**facts, **changes}


def ended(**changes: Any) -> dict[str, Any]:
    facts = {
        "outcome": "done",
        "client": "app:x",
        "model": "m",
        "wait_s": 0.5,
        "first_s": 1.5,
        "total_s": 75.0,
        "tokens": 40,
        "tokens_per_s": 12.34,
        "error": None,
    }
    return {**facts, **changes}


def backend(**changes: Any) -> dict[str, Any]:
    facts = {
        "name": "box",
        "url": "http://runner:2",
        "state": "up",
        "busy": 1,
        "slots": 4,
        "device": "local",
        "latency_ms": 3.2,
        "models": ["m", "n"],
        "loaded": ["m"],
        "error": None,
    }
    return {**facts, **changes}


def user(name: str, **changes: Any) -> dict[str, Any]:
    facts = {
        "name": name,
        "class": "",
        "boost": False,
        "blocked": False,
        "address": "10.0.0.7",
        "waiting": 0,
        "running": 0,
        "done": 3,
        "failed": 1,
        "left": 2,
        "share": 12.4,
        "served_s": 5.0,
    }
    return {**facts, **changes}


def snapshot(requests: list[Any], **changes: Any) -> dict[str, Any]:
    facts = {
        "version": "0.0",
        "mode": "open",
        "uptime_s": 3700.0,
        "queue": {"waiting": len(requests), "running": 0, "oldest_wait_s": 9.0},
        "requests": requests,
        "requests_total": {"done": 7, "client_left": 2, "queue_full": 1},
        "backends": [backend()],
        "clients": [],
        "blocked": [],
        "recent": [ended()],
        "config_error": None,
        "trouble": None,
        "draining": False,
    }
    return {**facts, **changes}


def shown(seen: dict[str, Any]) -> View:
    view = View("http://box:1", {})
    view.update(seen)
    return view


def five() -> View:
    return shown(snapshot([request(number) for number in range(1, 6)]))


def order_of(view: View) -> list[str]:
    return [one["id"] for one in view.rows]


def test_picture_shows_who_waits_for_what() -> None:
    runs = request(0, state="running", backend="box", tokens=12, running_s=3.0, eta_s=0)
    runs["tokens_per_s"] = 24.6
    text = "\n".join(shown(snapshot([runs, request(1, priority="low")])).lines(100, 30))
    for words in (
        r"llmq 0\.0  http://box:1 ",
        r" open +waiting 2 .* done 7 .* failed 1  left 2  oldest 9\.0s .* up 1h 01m",
        r"box +up +\[\|\|      \] 1/4 +local +3ms +m +http://runner:2",
        r"run normal +app:c0 +m +0\.0s +ran 3\.0s +box, 25/s, 12 tokens",
        r" 1 normal +app:c1 +m +1\.0s +~ 2\.0s +local busy \(1/1\)",
        r"done +app:x +m +0\.5s +1\.5s +1m 15s +40 +12",
    ):
        assert re.search(words, text), (words, text)


def test_trouble_is_told_on_top() -> None:
    view = shown(snapshot([], config_error="llmq.toml: odd", backends=[]))
    text = "\n".join(view.lines(100, 30, "no answer for 3 s"))
    assert "no answer for 3 s" in text
    assert "not reloaded: llmq.toml: odd" in text


def test_empty_state_says_the_next_step() -> None:
    view = shown(snapshot([], backends=[], recent=[], trouble=llmq.NO_RUNNER))
    lines = [line.strip() for line in view.lines(80, 30)]
    assert "OPENAI_BASE_URL=http://box:1/v1" in "\n".join(lines)
    assert llmq.NO_RUNNER in " ".join(lines)  # over as many lines as it takes


JOBS = {"queued": 2, "running": 1}
CACHE = {"answers": 9, "bytes": 4096, "hit": 30, "joined": 7, "miss": 1200}
USED = {"requests": 1512, "hits": 37, "tokens_in": 12345678, "tokens_out": 345678, "seconds": 9.5}
NONE = {"jobs": dict.fromkeys(JOBS, 0), "cache": dict.fromkeys(CACHE, 0)}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"jobs": JOBS}, "jobs 2 queued, 1 running"),
        ({"cache": CACHE}, "hits 3% of 1,237"),
        ({"cache": {**CACHE, "hit": 0, "joined": 0, "miss": 2}}, "hits 0% of 2"),
        ({"used_today": USED}, "today 1,512 requests, 12.7M tokens"),
        (
            {"used_today": {**USED, "requests": 1, "tokens_in": 1234}},
            "today 1 request, 346,912 tokens",
        ),
        (
            {"jobs": JOBS, "cache": CACHE, "used_today": USED},
            "jobs 2 queued, 1 running  hits 3% of 1,237  today 1,512 requests, 12.7M tokens",
        ),
    ],
)
def test_jobs_hits_and_what_was_used_today_are_told_in_eighty_columns(
    changes: dict[str, Any], line: str
) -> None:
    used = dict.fromkeys(USED, 0)
    seen = snapshot([], **{**NONE, "used_today": used, **changes})
    assert shown(seen).lines(80, 24)[2].strip() == line


def test_where_no_job_no_hit_and_no_use_is_nothing_is_told_of_them() -> None:
    used = dict.fromkeys(USED, 0)
    plain = shown(snapshot([])).lines(80, 24)  # of an llmq that knows none of it
    assert shown(snapshot([], **NONE, used_today=used)).lines(80, 24) == plain


def test_stop_of_llmq_is_told() -> None:
    assert " stopping " in shown(snapshot([], draining=True)).lines(80, 24)[1]


def test_names_have_the_width_there_is() -> None:
    client, model = "app:" + "c" * 60, "registry.example/some/library/" + "m" * 60
    rows = [request(0, client=client, model=model), request(1, client="user:me", model="m")]
    seen = snapshot(rows, recent=[ended(client=client, model=model)], backends=[backend()])
    seen["recent"].append(ended(outcome="backend_error", model=model, error="broke"))
    text = "\n".join(shown(seen).lines(220, 30))
    assert (text.count(f" {client} "), text.count(f" {model} ")) == (2, 3)
    narrow = shown(seen).lines(100, 30)
    assert all(len(line) == 100 for line in narrow)
    (row,) = [line for line in narrow if " app:ccc" in line and " normal " in line]
    assert len(re.search(r"app:c+…", row)[0]) > 15
    assert "local busy (1/1)" in row  # what needs little has it whole


@pytest.mark.parametrize(
    ("needs", "room", "given"),
    [
        ([], 10, []),
        ([3, 4], 10, [3, 4]),
        ([30, 4], 20, [16, 4]),
        ([30, 40, 5], 25, [10, 10, 5]),
        ([5, 5], 0, [0, 0]),
        ([5, 5], -3, [0, 0]),
        ([9, 9, 9], 10, [3, 3, 4]),
    ],
)
def test_room_is_shared_by_need(needs: list[int], room: int, given: list[int]) -> None:
    assert llmq.share(needs, room) == given


def test_failures_have_their_sentence_and_those_who_left_their_figures() -> None:
    failed = ended(outcome="backend_error", error="the runner's words: out of memory")
    left = ended(outcome="client_left", error="the client left")
    lines = shown(snapshot([], recent=[failed, left])).lines(100, 24)
    (row,) = [line for line in lines if "backend_error" in line]
    assert row.rstrip().endswith(" m      after 1m 15s: the runner's words: out of memory")
    (row,) = [line for line in lines if "client_left" in line]
    assert re.search(r"1\.5s +1m 15s +40 +12", row)


def test_rows_that_have_no_room_are_counted() -> None:
    view = shown(snapshot([request(number) for number in range(1, 31)]))
    view.snapshot["queue"]["waiting"] = 1234  # the snapshot shows the first of them
    for keys, words in (("", r"(\S+) more below"), ("G", r"(\S+) more below, (\d+) more")):
        for key in keys:
            view.press(key)
        lines = view.lines(80, 24)
        assert len(lines) == 24
        below, *above = re.search(words, "\n".join(lines)).groups()
        seen = [line for line in lines if " app:c" in line]
        total = int(below.replace(",", "")) + sum(map(int, above)) + len(seen)
        assert total == 1234
    assert below == "1,204"
    few = shown(snapshot([request(1)], backends=[backend(name=f"b{n}") for n in range(20)]))
    few.snapshot["queue"]["waiting"] = 1
    text = "\n".join(few.lines(80, 24))
    assert int(re.search(r"(\d+) more below", text)[1]) == 20 - len(
        re.findall(r"^ b\d+", text, re.M)
    )
    assert "more" not in "\n".join(five().lines(80, 40)[:-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": ["open"]},
        {"queue": []},
        {"queue": {"waiting": "many", "running": 0, "oldest_wait_s": 0}},
        {"requests": [1]},
        {"requests": [request(1, id=[])]},
        {"requests": [request(1, client=5), request(2, client="x")]},
        {"requests": [request(1, waited_s="long")]},
        {"requests": [request(1, eta_s=float("inf"))]},
        {"backends": [{}]},
        {"backends": [backend(busy="x")]},
        {"recent": [ended(total_s=float("nan"))]},
        {"requests_total": None},
        {"uptime_s": 10**400},
        {"clients": [{}]},
        {"clients": [user("a"), user("b", share="much")]},
        {"clients": [user("a", boost="x", waiting="y")]},
        {"clients": None},
        {"blocked": [5, []]},
        {"blocked": None},
        {"backends": [backend(models=None)]},
        {"backends": [backend(models=[[]], loaded=5)]},
        {"backends": [backend(name=[])]},
        {"jobs": [], "cache": None, "used_today": 5},
        {"jobs": {"queued": "many", "running": []}},
        {"cache": {"hit": "x"}},
        {"cache": {"hit": -1, "joined": 0, "miss": 1}},
        {"used_today": {"requests": 5, "tokens_in": [], "tokens_out": None}},
    ],
)
def test_odd_snapshots_are_refused_or_shown_but_never_break(changes: dict[str, Any]) -> None:
    seen = {**snapshot([request(1)]), **changes}
    with contextlib.suppress(llmq.StartError):
        view = shown(llmq.understood(seen, "http://box:1"))
        for key in ("", *">>>>", "x", "n", "+", "p", *"l jjLUdlpbxnXnlu"):
            view.press(key)
            view.update(seen)
            view.lines(80, 24)


def test_number_of_slots_makes_no_endless_meter() -> None:
    seen = snapshot([], backends=[backend(busy=10**12, slots=1)])
    assert "[||||||||] 1000" in "\n".join(shown(seen).lines(120, 24))


def test_class_and_id_that_are_odd_make_no_odd_order() -> None:
    view = shown(snapshot([request(1, id="a/../b\r\n", **{"class": "odd"})]))
    assert view.press("+") == []
    view.press("x")
    assert view.press("y") == [("DELETE", "/llmq/requests/a/../b%0D%0A", None)]


@pytest.mark.parametrize(
    "size", [(200, 60), (140, 40), (80, 24), (40, 12), (20, 5), (1, 1), (3, 2)]
)
@pytest.mark.parametrize("styles", [{}, COLOURS], ids=["plain", "coloured"])
def test_picture_fills_the_terminal_and_no_cell_more(
    size: tuple[int, int], styles: dict[str, str]
) -> None:
    names = [request(n, client=name, model=name, reason=name) for n, name in enumerate(HOSTILE)]
    backends = [backend(name=name, error=name) for name in HOSTILE]
    recent = [ended(outcome=name, client=name, model=name) for name in HOSTILE]
    view = View(HOSTILE[0], styles)
    seen = snapshot(names, backends=backends, recent=recent, config_error=HOSTILE[1])
    seen["clients"] = [user(name, address=name, boost=True) for name in HOSTILE]
    view.update({**seen, "blocked": HOSTILE})
    for key in ("", "?", "", "x", "n", "l", " ", "l", "x", "n", "l", "?"):
        view.press(key)
        lines = view.lines(*size, HOSTILE[2])
        assert len(lines) == size[1]
        for line in lines:
            text = COLOUR.sub("", line)
            assert text.isprintable()
            assert cells(text) <= size[0]
            assert styles or text == line


def test_selected_row_stays_in_sight() -> None:
    view = shown(snapshot([request(number) for number in range(1, 200)]))
    for key in ("G", "page up", "k", "g", "page down"):
        view.press(key)
        view.lines(80, 24)
        text = "\n".join(view.lines(80, 24))
        assert f"app:c{view.rows[view.index]['position']} " in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.0s"),
        (-1, "0.0s"),
        (9.94, "9.9s"),
        (10, "10s"),
        (59.9, "59s"),
        (60, "1m 00s"),
        (3599, "59m 59s"),
        (3600, "1h 00m"),
        (172_799, "47h 59m"),
        (172_800, "2d 00h"),
        (8_640_000, "100d 00h"),
    ],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert brief(seconds) == text


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abc", 5, "abc  "),
        ("abc", -5, "  abc"),
        ("abcdef", 4, "abc…"),
        ("abcdef", -4, "abc…"),
        ("abc", 3, "abc"),
        ("abc", 0, ""),
        ("名前です", 5, "名前…"),
        ("名前です", 6, "名前… "),
        ("e\u0301a", 3, "ea "),
        ("\x1b[2Jx", 8, "?[2Jx   "),
    ],
)
def test_text_takes_the_cells_it_is_given(text: str, width: int, expected: str) -> None:
    assert fit(text, width) == expected


# ---- Keys, without a terminal ------------------------------------------------------------------


def test_selection_stays_with_its_request() -> None:
    view = five()
    view.press("j")
    view.press("j")
    assert view.picked == "r3"
    view.update(snapshot([request(9), *(request(number) for number in range(2, 6))]))
    assert view.picked == "r3"
    view.update(snapshot([request(4), request(5)]))
    assert view.picked == "r5"
    view.update(snapshot([]))
    assert view.press("x") == []
    assert not view.asking


@pytest.mark.parametrize(
    ("keys", "picked"),
    [
        ("j", "r2"),
        ("jjk", "r2"),
        ("k", "r1"),
        ("G", "r5"),
        ("Gj", "r5"),
        ("Gg", "r1"),
    ],
)
def test_keys_select(keys: str, picked: str) -> None:
    view = five()
    assert not any(view.press(key) for key in keys)
    assert view.picked == picked


def test_cancel_is_asked_about_first() -> None:
    view = five()
    view.press("j")
    assert view.press("x") == []
    assert "cancel r2 of app:c2?" in view.lines(80, 24)[-1]
    assert view.press("n") == []
    assert view.press("y") == []
    view.press("x")
    view.update(snapshot([request(7)]))  # another request is selected meanwhile
    assert view.press("y") == [("DELETE", "/llmq/requests/r2", None)]


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("+", "low", "normal"),
        ("+", "normal", "high"),
        ("=", "high", "high"),
        ("-", "high", "normal"),
        ("-", "normal", "low"),
        ("-", "low", "low"),
    ],
)
def test_keys_raise_and_lower(key: str, before: str, after: str) -> None:
    view = shown(snapshot([request(1, **{"class": before})]))
    assert view.press(key) == [("POST", "/llmq/requests/r1", {"priority": after})]


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("p", "open", "paused"),
        ("p", "paused", "open"),
        ("p", "priority", "paused"),
        ("m", "open", "priority"),
        ("m", "priority", "open"),
        ("m", "paused", "priority"),
    ],
)
def test_keys_set_the_mode(key: str, before: str, after: str) -> None:
    view = shown(snapshot([], mode=before))
    assert view.press(key) == [("POST", "/llmq/mode", {"mode": after})]


def test_rows_are_sorted_by_the_column_that_is_marked() -> None:
    rows = [
        request(0, state="running", backend="box", model="c", waited_s=5.0),
        request(1, model="b", client="z", waited_s=9.0, **{"class": "high"}),
        request(2, model="a", client="y", waited_s=1.0, **{"class": "low"}),
    ]
    view = shown(snapshot(rows))
    orders = {}
    for _ in llmq.SORTS:
        (title,) = [line for line in view.lines(100, 30) if "WHERE, WHY" in line]
        orders[re.search(r"(\S+)↓", title)[1]] = order_of(view)
        view.press(">")
        view.update(snapshot(rows))
    assert orders == {
        "#": ["r0", "r1", "r2"],
        "CLIENT": ["r0", "r2", "r1"],
        "MODEL": ["r2", "r1", "r0"],
        "WAITED": ["r1", "r0", "r2"],
    }
    assert view.sort == "#"
    view.press("<")
    assert view.sort == "WAITED"


def test_keys_in_the_last_line_fit_eighty_columns() -> None:
    assert five().lines(80, 24)[-1].rstrip().endswith("q Quit")


def test_help_names_every_key() -> None:
    view = five()
    view.press("?")
    text = "\n".join(view.lines(80, 24))
    for key in ("x", "+", "-", "p", "m", "< >", "?", "q", "F7", "F8", "F9", "F10", "PgUp"):
        assert re.search(rf"(^|[ ,]){re.escape(key)}[ ,]", text, re.MULTILINE), key
    view.press("?")
    assert "WHERE, WHY" in "\n".join(view.lines(80, 24))


@pytest.mark.parametrize("key", ["", "z", "\x1b", "[", "O", "A", "~", "ü", "1", " ", "\n"])
def test_other_keys_do_nothing(key: str) -> None:
    view = five()
    assert view.press(key) == []
    assert not view.over
    assert view.picked == "r1"


# ---- Panels, without a terminal ----------------------------------------------------------------

BOB = user("user:bob/x", running=1, share=60.6, **{"class": "high"})
EVE = user("user:eve", blocked=True, boost=True, share=0.0, address="10.0.0.9")
FLEET = [
    backend(models=["m", "n"]),
    backend(name="far/away", state="draining", models=["n"], loaded=[]),
]


def paneled(keys: str = "", **changes: Any) -> View:
    """A view after these keys, with clients, backends, and somebody who is blocked."""
    facts = {"clients": [EVE, BOB, user("user:idle")], "blocked": ["user:eve", "ip:10.0.0.9"]}
    view = shown(snapshot([request(1)], backends=FLEET, **{**facts, **changes}))
    for key in keys:
        assert view.press(key) == []
    return view


def seen_rows(view: View) -> list[str]:
    return [line.rstrip() for line in view.lines(80, 24)]


@pytest.mark.parametrize(
    ("keys", "panel"),
    [
        ("", "Requests"),
        ("l", "Backends"),
        ("\t\t", "Users"),
        ("lll", "Blocked"),
        ("llll", "Requests"),
        ("h", "Blocked"),
        ("hhl", "Blocked"),
    ],
)
def test_panels_are_walked_both_ways(keys: str, panel: str) -> None:
    assert f"[{panel}]" in seen_rows(paneled(keys))[0]


@pytest.mark.parametrize(("typed", "key"), [("\x1b[Z", "h"), ("\x1b[C", "l"), ("\x1bOD", "h")])
def test_keys_of_terminals_walk_panels_too(typed: str, key: str) -> None:
    (match,) = llmq.KEY.finditer(typed)
    assert llmq.KEY_NAMES[match[1]] == key


def test_users_are_listed_by_share_with_their_marks() -> None:
    rows = seen_rows(paneled("ll"))
    for place, words in enumerate(
        (
            r" ●★ +user:bob/x +high +61% +0 +1 +3 +1 +2 +10\.0\.0\.7$",
            r" ○ +user:idle +- +12% +0 +0 +3 +1 +2 +10\.0\.0\.7$",
            r" ○⚡✖ +user:eve +- +0% +0 +0 +3 +1 +2 +10\.0\.0\.9$",
        ),
        start=4,
    ):
        assert re.match(words, rows[place]), (words, rows[place])


def test_backends_open_to_their_models_with_the_loaded_marked() -> None:
    view = paneled("l")
    assert not any(row.startswith("   m") for row in seen_rows(view))
    view.press(" ")
    rows = seen_rows(view)
    assert [row.split() for row in rows if row.startswith("   ")] == [["m", "loaded"], ["n"]]
    for key in "jj\n":  # from one of its models it is closed, and selected
        view.press(key)
    assert view.picked == "box\n"
    assert not any(row.startswith("   ") for row in seen_rows(view))
    for key in "j\r":
        view.press(key)
    assert [row.split() for row in seen_rows(view) if row.startswith("   ")] == [["n"]]


def test_blocked_are_listed() -> None:
    assert [row.strip() for row in seen_rows(paneled("h"))[3:6]] == [
        "BLOCKED",
        "user:eve",
        "ip:10.0.0.9",
    ]
    assert "nobody" in "\n".join(seen_rows(paneled("h", blocked=[])))


BOX, FAR, MODELS = "/llmq/backends/box", "/llmq/backends/far%2Faway", "/llmq/models"
AS_BOB, AS_EVE = "/llmq/clients/user%3Abob%2Fx", "/llmq/clients/user%3Aeve"
IPS = "/llmq/ips"


@pytest.mark.parametrize(
    ("keys", "key", "orders"),
    [
        ("l", "d", [(BOX, {"draining": True})]),
        ("lj", "d", [(FAR, {"draining": False})]),
        ("l j", "d", [(BOX, {"draining": True})]),
        ("l", "L", []),
        ("l", "U", []),
        ("l jj", "L", [(MODELS, {"action": "load", "model": "n", "backend": "box"})]),
        ("l j", "U", [(MODELS, {"action": "unload", "model": "m", "backend": "box"})]),
        ("ll", "p", [(AS_BOB, {"class": None})]),
        ("llj", "p", [("/llmq/clients/user%3Aidle", {"class": "high"})]),
        ("ll", "b", [(AS_BOB, {"boost": True})]),
        ("llG", "b", [(AS_EVE, {"boost": False})]),
        ("llx", "y", [(AS_BOB, {"blocked": True})]),
        ("llx", "n", []),
        ("llX", "y", [(IPS, {"ip": "10.0.0.7", "blocked": True})]),
        ("ll", "u", []),
        (
            "llG",
            "u",
            [(AS_EVE, {"blocked": False}), (IPS, {"ip": "10.0.0.9", "blocked": False})],
        ),
        ("h", "u", [(AS_EVE, {"blocked": False})]),
        ("hj", "u", [(IPS, {"ip": "10.0.0.9", "blocked": False})]),
        ("h", "x", []),
        ("h", "b", []),
        ("h", "p", [("/llmq/mode", {"mode": "paused"})]),
        ("l", "p", [("/llmq/mode", {"mode": "paused"})]),
        ("ll", "m", [("/llmq/mode", {"mode": "priority"})]),
        ("l", "x", []),
        ("ll", "+", []),
    ],
)
def test_keys_of_a_panel_are_orders(keys: str, key: str, orders: list[Any]) -> None:
    assert paneled(keys).press(key) == [("POST", path, change) for path, change in orders]


def test_a_client_that_is_named_after_its_address_is_a_client() -> None:
    clients = [user("ip:10.0.0.7")]
    assert paneled("ll", clients=clients).press("b")[0][1] == "/llmq/clients/ip%3A10.0.0.7"
    assert paneled("llx", clients=clients).press("y") == [
        ("POST", IPS, {"ip": "10.0.0.7", "blocked": True})
    ]


def test_block_is_asked_about_first() -> None:
    assert "block user:bob/x, and end what waits and runs of it?" in seen_rows(paneled("llx"))[-1]
    words = "block 10.0.0.7, and end what waits and runs from there?"
    assert words in seen_rows(paneled("llX"))[-1]


def test_selection_follows_the_name_in_every_panel() -> None:
    view = paneled("llj")
    assert view.picked == "user:idle"
    rich = user("user:idle", share=99.0)
    view.update({**view.snapshot, "clients": [user("user:new", share=40.0), rich]})
    assert (view.picked, view.index) == ("user:idle", 0)
    assert view.press("b") == [("POST", "/llmq/clients/user%3Aidle", {"boost": True})]
    view = paneled("l jj")
    assert view.picked == "box\nn"
    view.update({**view.snapshot, "backends": [FLEET[1], backend(models=["a", "n", "m"])]})
    assert view.press("L")[0][2] == {"action": "load", "model": "n", "backend": "box"}
    view = paneled("hj")
    view.update({**view.snapshot, "blocked": ["ip:10.0.0.9"]})
    assert view.picked == "ip:10.0.0.9"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("", ["F7 F8", "sort by"]),
        ("l", ["Space, Enter", "L, U", "drain it"]),
        ("ll", ["p, b", "VIP", "x, X, u", "★ VIP"]),
        ("lll", ["unblock it"]),
    ],
)
def test_help_is_of_the_panel(keys: str, words: list[str]) -> None:
    view = paneled(keys)
    foot = view.lines(80, 24)[-1].rstrip()
    assert foot.endswith("  q Quit")
    assert len(foot) < 80
    view.press("?")
    rows = seen_rows(view)
    assert all(any(word in row for row in rows) for word in words)
    assert any("the other panels" in row for row in rows)
    assert not any("…" in row for row in rows)
    others = "sort by" if keys else "unblock"
    assert not any(others in row for row in rows[:-1])


def test_long_lists_show_where_the_selection_is() -> None:
    many = [user(f"user:{number}", share=float(-number)) for number in range(1000)]
    view = paneled("llG", clients=many)
    rows = seen_rows(view)
    assert len(rows) == 24
    assert "user:999" in rows[-3]
    assert "more above" in rows[-2]


# ---- In a terminal -----------------------------------------------------------------------------


class Top:
    """`llmq top` in a terminal of its own, and the screen that a person would see."""

    def __init__(self, url: str, size: tuple[int, int], env: dict[str, str]) -> None:
        pyte = require("pyte")
        self.screen = pyte.Screen(*size)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.home = tempfile.TemporaryDirectory(prefix="llmq-test-")
        self.hand, self.theirs = os.openpty()
        self.resize(*size, screen=False)
        self.before = termios.tcgetattr(self.theirs)
        self.popen = subprocess.Popen(
            [sys.executable, str(LLMQ), "top", "--url", url, "--interval", "0.1"],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={**clean_environment(self.home.name), "TERM": "xterm-256color", **env},
            start_new_session=True,
            preexec_fn=self.settle,  # noqa: PLW1509
        )
        os.set_blocking(self.hand, False)
        asyncio.get_running_loop().add_reader(self.hand, self.read)

    @staticmethod
    def settle() -> None:
        """Have the terminal, and be stopped by it: a shell's background jobs ignore Ctrl-C."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = os.read(self.hand, 65536)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise
                data = b""  # nobody has it open any more
            self.raw += data
            self.stream.feed(data)
            if not data:
                asyncio.get_running_loop().remove_reader(self.hand)

    def resize(self, columns: int, lines: int, *, screen: bool = True) -> None:
        fcntl.ioctl(self.hand, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        if screen:
            self.screen.resize(lines, columns)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def is_filled(self, columns: int, lines: int) -> bool:
        """The titles reach from edge to edge, the keys stand in the last line."""
        display = self.screen.display
        titles = [place for place, line in enumerate(display) if "BACKEND" in line]
        ends = [self.screen.buffer[place][columns - 1].bg for place in titles]
        return ends == ["green"] and len(display) == lines and display[-1].startswith(" ? Help")

    def press(self, keys: str) -> None:
        os.write(self.hand, keys.encode())

    async def shows(self, words: str) -> None:
        try:
            await eventually(lambda: re.search(words, self.text), 8)
        except AssertionError:
            raise AssertionError(f"no {words!r} in\n{self.text}") from None

    async def ended(self) -> int:
        """Its exit code; all that it wrote has been read by then."""
        await eventually(lambda: self.popen.poll() is not None, 8)
        end = b"\x1b[?1049l"
        await eventually(lambda: end in self.raw, 2)
        return int(self.popen.returncode)

    def left_as_found(self) -> bool:
        """The terminal reads keys as before, has its own screen, its cursor and its wrapping."""
        restored = self.raw.rpartition(b"\x1b[?1049l")[0].endswith(b"\x1b[?7h\x1b[?25h")
        return restored and termios.tcgetattr(self.theirs) == self.before

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.hand)
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        for descriptor in (self.hand, self.theirs):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.home.cleanup()


@contextlib.asynccontextmanager
async def top(url: str, size: tuple[int, int] = (80, 24), **env: str) -> AsyncIterator[Top]:
    one = Top(url, size, env)
    try:
        await one.shows(r"BACKEND +STATE")
        yield one
    finally:
        one.close()


@contextlib.asynccontextmanager
async def busy(**settings: Any) -> AsyncIterator[tuple[running, FakeBackend, list[Raw]]]:
    """One request runs, `alice`'s; those of `bob` and `carol` wait."""
    async with FakeBackend(auto=False) as fake, running(f"box={fake.url}", **settings) as q:
        clients = []
        for user in ("alice", "bob", "carol"):
            client = await Raw.open(q.port)
            headers = {"Content-Type": "application/json", "X-User-ID": user}
            await client.send(http("POST", CHAT, headers, json.dumps(chat("x")).encode()))
            clients.append(client)
            count = len(clients)
            await eventually(lambda count=count: len(q.gateway.calls) == count)
        yield q, fake, clients
        for client in clients:
            client.close()
        await eventually(lambda: not q.gateway.calls)


async def test_terminal_shows_and_follows_what_goes_on() -> None:
    async with busy() as (q, fake, _), top(q.base) as seen:
        await seen.shows(r"waiting 2 +running 1")
        await seen.shows(r"box +up +\[\|{8}\] 1/1 +local")
        await seen.shows(r"run normal user:alice +m .* ran .*s +box")
        await seen.shows(r"1 normal user:bob +m +\d+\.\ds {3,}local busy \(1/1\)")  # not known
        await (await fake.arrived()).answer("done now")
        await seen.shows(r"run normal user:bob")
        await seen.shows(r"1 normal user:carol +m .* local busy \(1/1\)")
        await seen.shows(r"done +user:alice +m .* 2 +\d+")
        seen.press("q")
        assert await seen.ended() == 0


@pytest.mark.deadline(30)
async def test_keys_reach_the_queue() -> None:
    async with busy() as (q, _, clients), top(q.base) as seen:
        await seen.shows("user:carol")
        tickets = {one.client.name: one for one in q.gateway.scheduler.waiting.values()}
        carol, bob = tickets["user:carol"], tickets["user:bob"]
        seen.press("\x1b[B\x1b[B+")  # down, down, raise
        await eventually(lambda: carol.priority is llmq.Priority.HIGH)
        await seen.shows(r"id \S+, class high")
        await seen.shows(r"1 high +user:carol")
        seen.press("\x1b[19~")  # F8
        await eventually(lambda: carol.priority is llmq.Priority.NORMAL)
        await seen.shows(r"2 normal +user:carol")
        seen.press("p")
        await seen.shows(" paused ")
        assert q.gateway.scheduler.mode is llmq.Mode.PAUSED
        seen.press("m")
        await seen.shows(" priority ")
        seen.press("m")
        await seen.shows(" open ")
        seen.press("gjx")
        await seen.shows(rf"cancel {bob.id} of user:bob\?")
        assert bob.state is llmq.TicketState.WAITING
        seen.press("y")
        assert (await clients[1].response()).code == "cancelled"
        await seen.shows("cancelled 1")
        seen.press("gx")
        await seen.shows("of user:alice")
        seen.press("y")  # what runs can be cancelled too
        assert (await clients[0].response()).status == 499
        seen.press("?")
        await seen.shows("priority mode, in which only high starts")


def settings_of(q: running, name: str) -> Any:
    return q.gateway.clients.of(name)


@pytest.mark.deadline(30)
async def test_keys_of_users_change_what_holds_for_them() -> None:
    async with busy() as (q, _, clients), top(q.base) as seen:
        await seen.shows("user:carol")
        seen.press("\t\t")
        await seen.shows(r"\[Users\]")
        await seen.shows(r"● +user:alice +- +100% +0 +1 +0 +0 +0 +127\.0\.0\.1")
        await seen.shows(r"● +user:bob +- +0% +1 +0")
        seen.press("jp")
        await eventually(lambda: settings_of(q, "user:bob").class_ == "high")
        await seen.shows(r"●★ +user:bob +high")
        await seen.shows(r"name user:bob, class high")
        seen.press("b")
        await eventually(lambda: settings_of(q, "user:bob").boost)
        await seen.shows("●★⚡ +user:bob")
        seen.press("p")
        await seen.shows("●⚡ +user:bob +-")
        seen.press("x")
        await seen.shows("block user:bob, and end what waits")
        seen.press("y")
        assert (await clients[1].response()).status == 403
        await seen.shows("○⚡✖ +user:bob")
        seen.press("\t")
        await seen.shows(r"\[Blocked\]")
        await seen.shows(r"\n user:bob ")
        seen.press("u")
        await eventually(lambda: not settings_of(q, "user:bob").blocked)
        await seen.shows("nobody")


@pytest.mark.deadline(30)
async def test_keys_of_backends_drain_and_load() -> None:
    with recorded() as asked:
        async with busy() as (q, _, _), top(q.base) as seen:
            (box,) = q.gateway.fleet.backends.values()
            seen.press("l")
            await seen.shows(r"\[Backends\]")
            seen.press("d")
            await eventually(lambda: box.draining)
            await seen.shows("box +draining")
            seen.press("d")
            await eventually(lambda: not box.draining)
            await seen.shows("name box, state up")
            seen.press(" ")
            await seen.shows(r"\n   m +loaded")
            seen.press("jU")
            await seen.shows("queued yes")
            assert asked == [{"action": "unload", "model": "m", "backend": "box"}]
            seen.press("L")
            await seen.shows("box cannot load models")
            assert len(asked) == 2


@contextlib.contextmanager
def recorded(refuse: str = "load") -> Iterator[list[Any]]:
    """What llmq is asked of models, in place of what it would do; one action is refused."""
    asked: list[Any] = []

    async def post(_api: Any, exchange: Any, _rest: str, values: Any) -> None:
        asked.append(values)
        if asked[-1]["action"] == refuse:
            raise llmq.LlmqError(f"box cannot {refuse} models", "not_implemented")
        exchange.respond(202, b'{"queued":"yes"}')

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llmq.EXACT_ROUTES["/llmq/models"].handlers, "POST", post)
        yield asked


async def test_what_llmq_refuses_is_told() -> None:
    async with busy() as (q, _, _), top(q.base) as seen:
        await seen.shows("run normal user:alice")
        seen.press("+")
        await seen.shows("only a waiting request can change its class")


async def test_picture_follows_the_size_of_the_terminal() -> None:
    async with busy() as (q, _, _), top(q.base) as seen:
        await seen.shows("user:alice")
        for size in ((140, 40), (60, 16), (100, 30)):
            seen.resize(*size)
            await eventually(lambda size=size: seen.is_filled(*size))
            await seen.shows("2 normal user:car")


@pytest.mark.parametrize("way", ["q", "\x1b[21~", "\x03", signal.SIGTERM, signal.SIGHUP])
async def test_terminal_is_left_as_it_was_found(way: str | int) -> None:
    async with running(NOBODY) as q, top(q.base) as seen:
        assert not seen.left_as_found()
        if isinstance(way, str):
            seen.press(way)
        else:
            seen.popen.send_signal(way)
        assert await seen.ended() == 0
        assert seen.left_as_found()
        assert b"Traceback" not in seen.raw


@pytest.mark.deadline(30)
async def test_lost_llmq_is_dimmed_told_and_waited_for() -> None:
    async with Process("--demo", "--port", "0") as first:
        async with top(f"http://127.0.0.1:{first.port}") as seen:
            await seen.shows("nobody waits")
            seen.raw = b""
            assert await first.ended() == 0
            await seen.shows(r"no answer for \d s")
            await seen.shows(r"no answer for [6-9] s")  # longer than it once took to give up
            assert seen.popen.poll() is None
            row = next(
                row for row in seen.raw.rpartition(b"\x1b[H")[2].split(b"\r\n") if b"open" in row
            )
            assert row.startswith(b"\x1b[K\x1b[2m")
            assert b"\x1b[30;43m no answer" in seen.raw  # which is not dimmed
            async with Process("--demo", "--port", str(first.port)):
                await eventually(lambda: "no answer" not in seen.text, 8)
                assert b"\x1b[2m open" not in seen.raw.rpartition(b"\x1b[H")[2]
                seen.press("p")
                await seen.shows(" paused ")


@pytest.mark.deadline(30)
async def test_llmq_that_hangs_holds_up_no_key() -> None:
    async with Process("--demo", "--port", "0") as p:
        async with top(f"http://127.0.0.1:{p.port}") as seen:
            p.signal(signal.SIGSTOP)
            try:
                await seen.shows(r"no answer for \d s")
                seen.press("q")
                assert await seen.ended() == 0
            finally:
                p.signal(signal.SIGCONT)


async def test_terminal_that_goes_away_ends_it() -> None:
    async with running(NOBODY) as q, top(q.base) as seen:
        asyncio.get_running_loop().remove_reader(seen.hand)
        os.close(seen.theirs)
        os.close(seen.hand)
        await eventually(lambda: seen.popen.poll() is not None, 8)
        seen.hand = os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize("wish", ["", "1"])
async def test_no_color_is_honoured(wish: str) -> None:
    async with busy() as (q, _, _), top(q.base, NO_COLOR=wish) as seen:
        await seen.shows("user:carol")
        coloured = re.search(rb"\x1b\[[0-9;]*(?:[34][0-7])[0-9;]*m", seen.raw)
        assert bool(coloured) == (not wish)
        (row,) = [n for n, line in enumerate(seen.screen.display) if " run " in line]
        assert seen.screen.buffer[row][5].reverse == bool(wish)


async def test_hostile_names_cannot_draw() -> None:
    async with FakeBackend(["m", *HOSTILE]) as fake, running(fake.url) as q:
        for name in HOSTILE:
            assert (await q.chat("x", model=name)).status == 200
        async with top(q.base, (100, 30)) as seen:
            await seen.shows(r"done +anonymous +名前")
            await eventually(lambda: seen.screen.display[-1].startswith(" ? Help"))
            assert b"owned\x07" not in seen.raw
            assert b"\x1b]" not in seen.raw
            assert seen.screen.title == ""


# ---- Without a terminal ------------------------------------------------------------------------


async def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, lambda: run_llmq(*arguments, env=env))


@pytest.mark.parametrize("more", [[], ["--once"]])
async def test_piped_it_prints_one_plain_table(more: list[str]) -> None:
    async with busy() as (q, _, _):
        done = await run("top", "--url", q.base, *more, COLUMNS="120")
    assert done.returncode == 0
    assert not done.stderr
    assert "\x1b" not in done.stdout
    assert re.search(r"run normal user:alice +m .* box", done.stdout)
    assert re.search(r" 2 normal user:carol ", done.stdout)
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())
    assert re.search(r"USER +CLASS +SHARE", done.stdout)
    assert re.search(r"\n ● +user:alice +- +100% +0 +1 +0", done.stdout)
    assert "BLOCKED" not in done.stdout


async def test_piped_output_is_not_cut() -> None:
    client, model = "user:" + "c" * 59, "m" * 100
    async with FakeBackend(["m", model], auto=False) as fake, running(f"box={fake.url}") as q:
        clients = []
        for number in range(130):
            clients.append(await Raw.open(q.port))
            name = client if number else "first"
            headers = {"Content-Type": "application/json", "X-User-ID": name.removeprefix("user:")}
            body = json.dumps(chat("x", model=model)).encode()
            await clients[-1].send(http("POST", CHAT, headers, body))
            await eventually(lambda: len(q.gateway.calls) == len(clients))
        done = await run("status", "--url", q.base, COLUMNS="80")
        for raw in clients:
            raw.close()
        await eventually(lambda: not q.gateway.calls)
    rows = [line for line in done.stdout.splitlines() if f" {client} {model} " in line]
    assert len(rows) == 129
    assert "more below" not in done.stdout


async def test_json_is_the_snapshot() -> None:
    async with busy() as (q, _, _):
        done = await run("top", "--url", q.base, "--json")
        now = await q.status()
    told = json.loads(done.stdout)
    assert set(told) == set(now)
    assert [one["id"] for one in told["requests"]] == [one["id"] for one in now["requests"]]


async def test_terminal_without_a_cursor_gets_the_plain_table() -> None:
    async with running(NOBODY) as q:
        seen = Top(q.base, (80, 24), {"TERM": "dumb"})
        try:
            await eventually(lambda: seen.popen.poll() is not None, 8)
            await eventually(lambda: b"nobody waits" in seen.raw)
            assert b"\x1b" not in seen.raw
        finally:
            seen.close()


def run_for_nobody(*arguments: str) -> tuple[int, bytes]:
    """Exit code and standard error of llmq whose output is read by nobody any more."""
    there, here = os.pipe()
    os.close(there)
    with tempfile.TemporaryDirectory(prefix="llmq-test-") as home:
        command = [sys.executable, str(LLMQ), *arguments]
        environment = clean_environment(home)
        done = subprocess.run(
            command, stdout=here, stderr=subprocess.PIPE, env=environment, timeout=8, check=False
        )
    os.close(here)
    return done.returncode, done.stderr


async def test_reader_that_has_seen_enough_is_no_failure() -> None:
    async with running(NOBODY) as q:
        arguments = ("top", "--once", "--url", q.base)
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, run_for_nobody, *arguments) == (0, b"")


def test_nobody_there_is_said_in_one_plain_line() -> None:
    done = run_llmq("top", "--url", NOBODY)
    assert done.returncode == 1
    assert not done.stdout
    assert re.fullmatch(rf"llmq: no llmq answers at {NOBODY}: .+\n", done.stderr)


async def test_somebody_else_there_is_said() -> None:
    async with FakeBackend() as fake:
        done = await run("top", "--url", fake.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is that llmq?" in done.stderr


@pytest.mark.parametrize("value", ["soon", "-1", ""])
def test_interval_that_is_none_is_refused(value: str) -> None:
    done = run_llmq("top", "--interval", value)
    assert done.returncode == 2
    assert "--interval" in done.stderr


async def test_control_routes_stay_as_they_are_for_it() -> None:
    """`top` sends what any script would: the order of a key is a plain control request."""
    async with busy() as (q, _, clients):
        (row,) = [one for one in (await q.status())["requests"] if one["client"] == "user:carol"]
        view = shown(await q.status())
        view.press("G")
        [(method, path, change)] = view.press("-")
        assert (await ask(q.port, method, path, json=change)).json() == {
            "id": row["id"],
            "class": "low",
        }
        view.press("x")
        [(method, path, _)] = view.press("y")
        assert (await ask(q.port, method, path)).status == 200
        assert (await clients[2].response()).code == "cancelled"


# ---- The README's picture --------------------------------------------------------------------

PAPER, INK = (24, 26, 32), (222, 224, 228)
INKS = {"green": (90, 190, 120), "red": (235, 110, 110), "cyan": (95, 180, 215),
        "brown": (225, 175, 75), "black": (16, 18, 22), "default": INK}  # fmt: skip


def draw(screen: Any, font: Any) -> Any:
    """A screen as a person sees it."""
    image, paper = require("PIL.Image"), require("PIL.ImageDraw")
    box = font.getbbox("M")
    wide, high = box[2], int(font.size * 1.3)
    picture = image.new("RGB", (wide * screen.columns, high * screen.lines), PAPER)
    pen = paper.Draw(picture)
    for line, column in itertools.product(range(screen.lines), range(screen.columns)):
        cell = screen.buffer[line][column]
        ink, ground = INKS.get(cell.fg, INK), INKS.get(cell.bg, PAPER)
        ground = PAPER if cell.bg == "default" else ground
        ink, ground = (ground, ink) if cell.reverse else (ink, ground)
        place = (column * wide, line * high)
        pen.rectangle([place, (place[0] + wide - 1, place[1] + high - 1)], fill=ground)
        pen.text(place, cell.data, fill=ink, font=font, stroke_width=0)
    return picture


async def take_picture() -> None:
    """A busy minute: the same as the page's."""
    from tests.test_page import finish, mark, state

    font = require("PIL.ImageFont").truetype("DejaVuSansMono.ttf", 15)
    people = ("open-webui", "editor", "cron", "alice", "nightly-report")
    async with state("busy") as (q, vllm):
        for at in range(26):
            pieces = (37 * at) % 90 + 12
            await finish(q, vllm, people[at % 5], "mistral-small", pieces, 0.02 + at % 4 / 100)
        await mark(q)
        folder = Path(__file__).parent / "pictures"
        for file, keys, size in ("top", "", (110, 30)), ("top-users", "ll", (80, 12)):
            async with top(q.base, size) as seen:
                seen.press(keys)
                await seen.shows(r"\[Users\]" if keys else "waiting 7")
                picture = draw(seen.screen, font)
            picture.quantize(64).save(folder / f"{file}.png", optimize=True)


if __name__ == "__main__":
    asyncio.run(take_picture())
