"""A desktop of the test's own: X server, session bus, panel, home; nothing outlives it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fakes import ROOT, clean_environment, eventually, need, require, require_command

TRAY = ROOT / "tray" / "llmq_tray.py"
BUS = """<busconfig><type>session</type><listen>unix:path={path}</listen>
<auth>EXTERNAL</auth><policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"""
BROWSER = '#!/bin/sh\necho "$1" >>"{log}"\n'
NO_PICTURES = (".lock", ".lock-journal", ".json")  # what else the tray keeps there
GI_OF = "import gi, sys; print(sys.version_info[1], gi.__path__[0])"


def link_gi(folder: Path) -> Path:
    """A directory that gives this Python the system's `gi`, which pip cannot install unaided."""
    python = require_command("/usr/bin/python3")
    done = subprocess.run([python, "-c", GI_OF], capture_output=True, text=True, check=False)
    need(done.returncode == 0, "python3-gi is not installed")
    minor, path = done.stdout.split(maxsplit=1)
    need(int(minor) == sys.version_info[1], f"gi is for Python 3.{minor}, this is another")
    folder.mkdir()
    (folder / "gi").symlink_to(path.strip())
    return folder


def require_desktop() -> None:
    """Skip, or fail when all is required, unless this machine can show a tray icon."""
    for module in ("PIL", "pystray"):  # not imported: pystray looks for a display then
        need(importlib.util.find_spec(module), f"the package {module} is not installed")
    for program in ("Xvfb", "dbus-daemon"):
        require_command(program)
    look = "import gi; gi.require_version('AyatanaAppIndicator3', '0.1')"
    done = subprocess.run(["/usr/bin/python3", "-c", look], capture_output=True, check=False)
    need(done.returncode == 0, "gir1.2-ayatanaappindicator3-0.1 is not installed")


class Tray:
    """One tray process."""

    def __init__(
        self,
        env: dict[str, str],
        *arguments: str,
        python: str = sys.executable,
        module: bool = False,
    ) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in finish()
        program = ["-m", "tray"] if module else [str(TRAY)]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [python, *program, *arguments],
            env=env,
            cwd=ROOT if module else env["HOME"],
            stdin=null,
            stdout=self.log,
            stderr=self.log,
        )

    @property
    def output(self) -> str:
        return os.pread(self.log.fileno(), 1 << 16, 0).decode(errors="replace")

    @property
    def said(self) -> list[str]:
        """Its own lines; GTK and AppIndicator have theirs."""
        return [line for line in self.output.splitlines() if line.startswith("llmq tray: ")]

    async def ended(self, seconds: float = 10) -> int:
        """Its exit code, once it has ended by itself."""
        await eventually(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def finish(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Desktop:
    """`with Desktop() as desktop: tray = desktop.tray("--url", url)`."""

    def __init__(self, *services: str) -> None:
        self.services = services or ("watcher", "notifier")
        self.ending = contextlib.ExitStack()
        self.trays: list[Tray] = []

    def __enter__(self) -> Desktop:
        require_desktop()
        with contextlib.ExitStack() as ending:
            self.folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
            ending.callback(self.kill_llmq)
            self.home = self.folder / "a home"
            self.runtime = self.folder / "run"
            for path in (self.home, self.runtime):
                path.mkdir(mode=0o700)
            browser = self.folder / "browser"
            browser.write_text(BROWSER.format(log=self.folder / "opened"))
            browser.chmod(0o755)
            self.env = {
                **clean_environment(str(self.home)),
                "HOME": str(self.home),
                "XDG_RUNTIME_DIR": str(self.runtime),
                "TMPDIR": str(self.runtime),
                "PYTHONPATH": str(link_gi(self.folder / "gi")),
                "BROWSER": f"{browser} %s",
                "NO_AT_BRIDGE": "1",
                "GSETTINGS_BACKEND": "memory",
            }
            homes = [f"XDG_{name}_HOME" for name in ("CONFIG", "CACHE", "STATE", "DATA")]
            for name in (*homes, "WAYLAND_DISPLAY", "PYSTRAY_BACKEND"):
                self.env.pop(name, None)
            self.start_display(ending)
            self.start_bus(ending)
            command = [sys.executable, str(Path(__file__).with_name("panel.py")), *self.services]
            pipe = subprocess.PIPE
            self.panel = subprocess.Popen(command, env=self.env, stdin=pipe, stdout=pipe, text=True)
            ending.callback(self.end, self.panel)
            assert self.read_panel() == "ready\n"
            ending.callback(self.finish_trays)
            self.ending = ending.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.close()

    def end(self, process: subprocess.Popen[Any]) -> None:
        for stream in (process.stdin, process.stdout):
            if isinstance(stream, io.IOBase):
                stream.close()
        process.kill()
        process.wait()

    def start_display(self, ending: contextlib.ExitStack) -> None:
        reading, writing = os.pipe()
        command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "640x200x24"]
        quiet = subprocess.DEVNULL
        server = subprocess.Popen(
            [*command, "-nolisten", "tcp"], pass_fds=[writing], stdout=quiet, stderr=quiet
        )
        ending.callback(self.end, server)
        os.close(writing)
        with open(reading, encoding="ascii") as pipe:
            self.env["DISPLAY"] = f":{pipe.readline().strip()}"

    def start_bus(self, ending: contextlib.ExitStack) -> None:
        config, path = self.folder / "bus.conf", self.folder / "bus"
        config.write_text(BUS.format(path=path))
        command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"]
        bus = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        ending.callback(self.end, bus)
        assert bus.stdout is not None
        self.env["DBUS_SESSION_BUS_ADDRESS"] = bus.stdout.readline().strip()

    # ---- the tray and what it left

    def tray(self, *arguments: str, module: bool = False, **env: str) -> Tray:
        self.trays.append(Tray({**self.env, **env}, *arguments, module=module))
        return self.trays[-1]

    def finish_trays(self) -> None:
        for tray in self.trays:
            tray.finish()

    def born(self) -> list[int]:
        """The process ids of the llmqs that trays have started."""
        return [json.loads(path.read_text())[0] for path in self.runtime.rglob("*.json")]

    def kill_llmq(self) -> None:
        for pid in self.born():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def opened(self) -> list[str]:
        """What the browser was asked to show."""
        log = self.folder / "opened"
        return log.read_text().split() if log.exists() else []

    def pictures(self) -> list[str]:
        """Files that hold pictures, wherever the tray may put them for a while."""
        found = [path for path in self.runtime.rglob("*") if path.is_file()]
        return [path.name for path in found if path.suffix not in NO_PICTURES]

    # ---- the panel

    def read_panel(self) -> str:
        assert self.panel.stdout is not None
        return str(self.panel.stdout.readline())

    def ask(self, command: str, *arguments: Any) -> Any:
        assert self.panel.stdin is not None
        self.panel.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.panel.stdin.flush()
        return json.loads(self.read_panel())

    def title(self) -> str:
        return str((self.ask("item") or {}).get("Title", ""))

    def notes(self) -> list[str]:
        """The titles of all notifications so far."""
        return [title for title, _ in self.ask("notes")]

    def pixels(self) -> bytes:
        """The picture that the icon shows now; none while it changes."""
        name = (self.ask("item") or {}).get("IconName", "")
        with contextlib.suppress(OSError):
            with require("PIL.Image").open(name) as image:
                return bytes(image.convert("RGBA").tobytes())
        return b""

    def menu(self) -> dict[str, dict[str, Any]]:
        """The lines that have a text."""
        lines = self.ask("lines")
        return {one["label"]: one for one in lines if "label" in one and isinstance(lines, list)}

    def checked(self, label: str) -> bool:
        return bool(self.menu().get(label, {}).get("toggle-state"))

    async def click(self, label: str, seconds: float = 5) -> None:
        await eventually(lambda: self.ask("click", label) is True, seconds)

    async def shows(self, title: str, seconds: float = 10) -> None:
        await eventually(lambda: self.title() == title, seconds)
