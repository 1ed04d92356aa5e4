"""The tray icon on a real session bus and X server, in front of a real llmq."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeBackend, Process, Raw, ask, eventually, http, require_command, running
from tests.test_top import recorded
from tests.tray.desktop import TRAY, Desktop, Tray
from tray.llmq_tray import DESKTOP, exec_line


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def waiting(port: int, count: int, **headers: str) -> None:
    """`count` more requests in the queue, their clients left hanging."""
    for _ in range(count):
        body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
        raw = await Raw.open(port)
        fields = {"Content-Type": "application/json", **headers}
        await raw.send(http("POST", "/v1/chat/completions", fields, body))


async def mode_of(port: int) -> str:
    return str((await ask(port, "GET", "/llmq/status")).json()["mode"])


async def until_mode(port: int, mode: str) -> None:
    while await mode_of(port) != mode:
        await eventually(lambda: True)


@pytest.mark.deadline(40)
async def test_icon_shows_state_and_depth_and_the_menu_steers_a_real_llmq():
    with Desktop() as desktop:
        async with FakeBackend(auto=False) as fake:
            async with Process("--port", "0", "--backend", fake.url) as llmq:
                tray = desktop.tray("--url", url_of(llmq.port))
                await desktop.shows("llmq: idle")
                idle = desktop.pixels()
                assert len(idle) == 64 * 64 * 4
                assert not desktop.checked("Pause")

                await waiting(llmq.port, 1)
                await desktop.shows("llmq: 1 running")
                await waiting(llmq.port, 3)
                await desktop.shows("llmq: 3 waiting, 1 running")
                three = await eventually(desktop.pixels)
                await waiting(llmq.port, 1)
                await desktop.shows("llmq: 4 waiting, 1 running")
                four = await eventually(desktop.pixels)
                assert len({idle, three, four}) == 3
                await eventually(lambda: "and 1 more" in desktop.menu())
                menu = desktop.menu()

                await desktop.click("Pause")
                await until_mode(llmq.port, "paused")
                await eventually(lambda: desktop.checked("Pause"))
                await desktop.shows("llmq: 4 waiting, 1 running, paused")
                assert await eventually(desktop.pixels) not in (idle, three, four)
                assert "Paused" in desktop.menu()

                await desktop.click("Priority mode")
                await until_mode(llmq.port, "priority")
                await eventually(lambda: desktop.checked("Priority mode"))
                assert not desktop.checked("Pause")
                await desktop.click("Priority mode")
                await until_mode(llmq.port, "open")
                await desktop.shows("llmq: 4 waiting, 1 running")
                assert not desktop.checked("Priority mode")

                await eventually(lambda: [*desktop.menu()] == [*menu])
                assert menu["Working"]["enabled"] is False
                assert desktop.notes() == []
                assert tray.said == []


@pytest.mark.deadline(40)
async def test_who_waits_comes_and_goes_in_a_menu_that_may_stay_open():
    def labels() -> list[Any]:
        return [one.get("label") for one in desktop.ask("lines")]

    with Desktop() as desktop:
        async with FakeBackend(auto=False) as fake, running(fake.url) as q:
            tray = desktop.tray("--url", q.base)
            await waiting(q.port, 1)
            await desktop.shows("llmq: 1 running")
            await eventually(lambda: "Working" in desktop.menu())
            before = desktop.menu()

            await waiting(q.port, 4, **{"X-User-ID": "al_ice"})
            # In a menu two underscores are one, and one alone would underline what follows.
            line = "user:al__ice, m: under 1 min — local busy (1/1): anonymous, m"
            told = ["Working", line, line, line, "and 1 more", None]
            await eventually(lambda: labels()[:6] == told)
            now = desktop.menu()
            # Menus that are built anew have new numbers, and close under the user's hand.
            assert [now[name]["id"] for name in before] == [one["id"] for one in before.values()]

            await (await fake.arrived()).answer("the end")
            line = "user:al__ice, m: under 1 min — local busy (1/1): user:al__ice, m"
            await eventually(lambda: labels()[:5] == ["Working", line, line, line, None])
            await desktop.click(line)
            await eventually(lambda: desktop.opened() == [q.base + "/"])
            await eventually(lambda: labels()[:5] == ["Working", line, line, line, None])
            for _ in range(4):
                await (await fake.arrived()).answer("the end")
            await eventually(lambda: labels()[:2] == ["Idle", None])
            assert tray.said == []


@pytest.mark.deadline(60)
async def test_a_killed_llmq_is_shown_told_once_started_again_and_stopped_after_a_second_click():
    with Desktop() as desktop:
        async with FakeBackend(auto=False) as fake:
            env = {"LLMQ_BACKENDS": fake.url}
            async with Process("--port", "0", env=env) as llmq:
                port = llmq.port
                tray = desktop.tray("--url", url_of(port), **env)
                await desktop.shows("llmq: idle")
                idle = desktop.pixels()
                os.kill(llmq.pid, signal.SIGKILL)
                await desktop.shows("llmq: not running")
                assert await eventually(desktop.pixels) != idle
                await eventually(lambda: desktop.notes() == ["llmq is gone"])
                assert "Stop llmq" not in desktop.menu()
            await desktop.click("Start llmq")
            await desktop.shows("llmq: idle", seconds=20)
            assert desktop.notes() == ["llmq is gone"]

            await waiting(port, 1)
            await desktop.shows("llmq: 1 running")
            await desktop.click("Stop llmq")
            await desktop.click("Stop llmq (requests run, click again)")
            await (await fake.arrived()).answer("the end")  # what runs may finish
            await desktop.shows("llmq: not running")
            pid = desktop.born()[0]
            await eventually(lambda: not Path(f"/proc/{pid}").exists())
            # Asked for, so nothing to tell; the next trouble would have come after it.
            await desktop.click("Start llmq")
            await desktop.shows("llmq: idle", seconds=20)
            os.kill(desktop.born()[0], signal.SIGKILL)
            await eventually(lambda: desktop.notes() == ["llmq is gone"] * 2)
            assert tray.process.poll() is None


@pytest.mark.deadline(40)
async def test_llmq_is_started_where_none_runs_and_outlives_the_tray():
    with Desktop() as desktop:
        port = free_port()
        tray = desktop.tray("--url", url_of(port), LLMQ_BACKENDS="m=http://127.0.0.1:9")
        await desktop.shows("llmq: no runner answers", seconds=20)
        await desktop.click("Quit")
        assert await tray.ended() == 0
        assert await mode_of(port) == "open"
        # The next one attaches to it, and may stop it, for it is the one that was born here.
        again = desktop.tray("--url", url_of(port), LLMQ_BACKENDS="m=http://127.0.0.1:9")
        await eventually(lambda: len(desktop.ask("items")) == 2)
        await desktop.shows("llmq: no runner answers")
        await desktop.click("Stop llmq")
        await desktop.shows("llmq: not running")
        assert tray.said == again.said == []


@pytest.mark.deadline(40)
async def test_the_gpu_is_freed_from_the_menu_and_llmq_opened_again():
    with Desktop() as desktop, recorded() as asked:
        async with FakeBackend() as fake, running(fake.url) as q:
            desktop.tray("--url", q.base)
            await desktop.shows("llmq: idle")
            await desktop.click("Free the GPU")
            await eventually(lambda: desktop.notes() == ["The GPU is being freed"])
            assert asked == [{"action": "unload", "model": "*"}]
            await desktop.shows("llmq: paused")
            await eventually(lambda: "Open again" in desktop.menu())
            await desktop.click("Open again")
            await until_mode(q.port, "open")
            await eventually(lambda: "Free the GPU" in desktop.menu())


@pytest.mark.deadline(40)
async def test_why_llmq_did_not_start_is_told_in_its_own_words():
    with Desktop() as desktop:
        url = url_of(free_port())
        desktop.tray("--url", url, LLMQ_QUEUE_SLOTS="many")
        await eventually(desktop.notes, 20)
        told = desktop.ask("notes")[0]
        assert told[0] == "Could not do it: start"
        assert "LLMQ_QUEUE_SLOTS" in told[1]
        await desktop.shows("llmq: not running")


@pytest.mark.deadline(40)
async def test_a_second_tray_opens_the_dashboard_and_leaves():
    with Desktop() as desktop, Process("--demo", "--port", "0") as llmq:
        first = desktop.tray("--url", url_of(llmq.port))
        await desktop.shows("llmq: idle")
        second = desktop.tray("--url", url_of(llmq.port))
        assert await second.ended() == 0
        assert second.said == [
            f"llmq tray: one is already running for {url_of(llmq.port)}; here is the dashboard"
        ]
        assert desktop.opened() == [url_of(llmq.port) + "/"]
        await desktop.click("Open dashboard")
        await eventually(lambda: len(desktop.opened()) == 2)
        assert len(desktop.ask("items")) == 1
        assert first.process.poll() is None


@pytest.mark.parametrize("way", ["Quit", signal.SIGTERM, signal.SIGINT], ids=str)
@pytest.mark.deadline(40)
async def test_the_tray_ends_well_and_leaves_no_picture(way: str | signal.Signals):
    with Desktop() as desktop, Process("--demo", "--port", "0") as llmq:
        tray = desktop.tray("--url", url_of(llmq.port))
        await desktop.shows("llmq: idle")
        assert desktop.pictures()
        if isinstance(way, str):
            await desktop.click(way)
        else:
            tray.process.send_signal(way)
        assert await tray.ended() == 0
        assert desktop.pictures() == []
        assert "Traceback" not in tray.output
        assert await mode_of(llmq.port) == "open"


@pytest.mark.deadline(40)
async def test_a_killed_tray_leaves_its_place_and_the_next_one_clears_up():
    with Desktop() as desktop, Process("--demo", "--port", "0") as llmq:
        killed = desktop.tray("--url", url_of(llmq.port))
        await desktop.shows("llmq: idle")
        killed.process.kill()
        killed.process.wait()
        assert desktop.pictures()
        tray = desktop.tray("--url", url_of(llmq.port))
        await eventually(lambda: len(desktop.ask("items")) == 2)
        await desktop.shows("llmq: idle")
        await desktop.click("Quit")
        assert await tray.ended() == 0
        assert desktop.pictures() == []


@pytest.mark.deadline(40)
async def test_without_a_notification_service_the_tray_works_and_ends_well():
    with Desktop("watcher") as desktop, Process("--demo", "--port", "0") as llmq:
        tray = desktop.tray("--url", url_of(llmq.port))
        await desktop.shows("llmq: idle")
        await desktop.click("Quit")
        assert await tray.ended() == 0
        assert desktop.pictures() == []


@pytest.mark.deadline(40)
def test_the_autostart_entry_survives_any_path():
    with Desktop() as desktop:
        entry = desktop.folder / "odd.desktop"
        command = ["/usr/bin/env", 'a "b"', "c$d`e`", "f\\g", "100%", "ünter"]
        entry.write_text(DESKTOP.format(exec_line(command), "/icon.png"), encoding="utf-8")
        assert complaints(require_command("desktop-file-validate"), str(entry)) == ""
        assert desktop.ask("command_of", str(entry)) == command


def complaints(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.deadline(40)
async def test_the_base_url_is_copied_and_the_switches_are_remembered():
    with Desktop() as desktop, Process("--demo", "--port", "0") as llmq:
        tray = desktop.tray("--url", url_of(llmq.port))
        await desktop.shows("llmq: idle")
        await desktop.click("Copy base URL")
        await eventually(lambda: desktop.ask("clipboard") == url_of(llmq.port) + "/v1")

        assert desktop.checked("Notifications")
        await desktop.click("Notifications")
        await eventually(lambda: not desktop.checked("Notifications"))
        await desktop.click("Start at login")
        await eventually(lambda: desktop.checked("Start at login"))
        entry = desktop.home / ".config" / "autostart" / "llmq-tray.desktop"
        validate = require_command("desktop-file-validate")
        assert complaints(validate, str(entry)) == ""
        await desktop.click("Quit")
        assert await tray.ended() == 0

        command = desktop.ask("command_of", str(entry))
        assert command[1:] == [str(TRAY), "--autostart", "--url", url_of(llmq.port)]
        desktop.trays.append(Tray(desktop.env, *command[2:], python=command[0]))
        await eventually(lambda: len(desktop.ask("items")) == 2)
        await desktop.shows("llmq: idle")
        assert not desktop.checked("Notifications")
        await desktop.click("Start at login")
        await eventually(lambda: not entry.exists())
        await eventually(lambda: not desktop.checked("Start at login"))


@pytest.mark.deadline(40)
async def test_another_program_on_the_port_is_named_and_left_alone():
    async with FakeBackend() as fake:
        with Desktop() as desktop:
            desktop.tray("--url", fake.url)
            await desktop.shows("llmq: the port is used by another program")
            menu = desktop.menu()
            assert menu["Start llmq"]["enabled"] is False
            assert desktop.born() == []


@pytest.mark.deadline(40)
async def test_a_panel_that_comes_late_gets_the_icon():
    with Desktop("notifier") as desktop, Process("--demo", "--port", "0") as llmq:
        tray = desktop.tray("--url", url_of(llmq.port), "--autostart", "--panel-wait", "0")
        await eventually(lambda: tray.said)
        assert "GNOME needs" in tray.said[0]
        assert tray.said[0].endswith("; waiting for one")
        desktop.ask("watch")
        await desktop.shows("llmq: idle")


CASES = {
    "no place": ({"XDG_RUNTIME_DIR": "/proc"}, "[Errno"),
    "no display": ({"DISPLAY": ""}, "there is no desktop session here"),
    "dead display": ({"DISPLAY": ":4095"}, "there is no desktop session here"),
    "no bus": ({"DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere"}, "there is no D-Bus session"),
    "no panel": ({}, "no panel here shows tray icons"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.deadline(40)
async def test_what_is_missing_is_said_in_one_sentence(case: str):
    env, sentence = CASES[case]
    with Desktop("notifier") as desktop, Process("--demo", "--port", "0") as llmq:
        arguments = ("--url", url_of(llmq.port), "--panel-wait", "0.3")
        tray = desktop.tray(*arguments, **env)
        assert await tray.ended() == 2
        assert tray.said[0].startswith(f"llmq tray: {sentence}")
        assert len(tray.said) == 1
        assert "Traceback" not in tray.output
        if "display" in case:
            quiet = desktop.tray(*arguments, "--autostart", **env)
            assert await quiet.ended() == 0


@pytest.mark.deadline(40)
async def test_without_pystray_it_says_what_to_install():
    with Desktop() as desktop:
        for package in ("pystray", "PIL"):
            blocked = desktop.folder / package
            blocked.mkdir()
            (blocked / f"{package}.py").write_text(
                f"raise ModuleNotFoundError('no', name={package!r})"
            )
            path = f"{blocked}{os.pathsep}{desktop.env['PYTHONPATH']}"
            tray = desktop.tray(PYTHONPATH=path)
            assert await tray.ended() == 2
            assert tray.said == ["llmq tray: it needs: pip install pystray pillow (no)"]


@pytest.mark.deadline(40)
async def test_without_appindicator_it_says_what_is_missing_and_goes_on_as_a_badge():
    called = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        writer.close()

    with Desktop() as desktop:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = url_of(server.sockets[0].getsockname()[1])
            tray = desktop.tray("--url", url, PYSTRAY_BACKEND="xorg")
            await called.wait()
            assert [line[:32] for line in tray.said] == ["llmq tray: a badge without menu,"]
            assert tray.process.poll() is None


@pytest.mark.deadline(40)
async def test_it_runs_as_a_module_too():
    with Desktop() as desktop, Process("--demo", "--port", "0") as llmq:
        tray = desktop.tray("--url", url_of(llmq.port), module=True)
        await desktop.shows("llmq: idle")
        await desktop.click("Quit")
        assert await tray.ended() == 0
