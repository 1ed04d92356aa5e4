"""The test's end of the drivers: real libraries, each in a process of its own.

with Driver(command, folder) as driver:
    work = driver.start("stream", url=url, model="counter", text="hello")
    await eventually(lambda: len(work.pieces) >= 3)
    work.cancel()
    await eventually(lambda: work.over)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable

from tests.real.peers import CACHE, Missing


class Work:
    """One job of a driver: the pieces so far, and at its end what it gave or raised."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel
        self.pieces: list[str] = []
        self.done: Any = None
        self.raised: dict[str, Any] | None = None
        self.over = False

    def __repr__(self) -> str:
        state = f"raised {self.raised}" if self.raised else f"gave {self.done!r}"
        return f"<{len(self.pieces)} pieces, {state if self.over else 'not over'}>"

    def hear(self, news: dict[str, Any]) -> None:
        if "piece" in news:
            self.pieces.append(news["piece"])
            return
        self.done, self.raised = news.get("done"), news.get("raised")
        self.over = True


class Jobs:
    """The jobs of whoever speaks the protocol of drive.py; `send` takes a line to it."""

    def __init__(self) -> None:
        self.works: dict[int, Work] = {}
        self.numbers = itertools.count(1)
        self.unhandled: list[Any] = []  # what failed inside the library with nobody to catch it
        self.ready = threading.Event()

    def send(self, line: str) -> None:
        raise NotImplementedError

    def start(self, job: str, **arguments: Any) -> Work:
        """Begin this job; others may be under way."""
        number = next(self.numbers)
        work = self.works[number] = Work(lambda: self.send(json.dumps({"cancel": number})))
        self.send(json.dumps({"id": number, "job": job, **arguments}))
        return work

    def hear(self, line: str | bytes) -> None:
        """One line from the other side."""
        news = json.loads(line)
        if "ready" in news:
            self.ready.set()
        elif "unhandled" in news:
            self.unhandled.append(news["unhandled"])
        else:
            self.works[news["id"]].hear(news)

    def lost(self, why: str) -> None:
        """The other side is gone: what was under way will never end by itself."""
        self.ready.set()
        for work in self.works.values():
            if not work.over:
                work.hear({"raised": {"kind": "DriverEnded", "kinds": [], "text": why}})


class Driver(Jobs):
    """A driver as a process; it works in `folder` and writes its complaints to `log`."""

    def __init__(self, command: list[str], folder: Path) -> None:
        super().__init__()
        self.command, self.folder = command, folder
        name = Path(command[1]).name
        self.log = CACHE / f"{'-'.join([name, *command[2:]])}.log"
        # A proxy of this machine's user must not come between a library and 127.0.0.1.
        self.environment = {**os.environ, "NO_PROXY": "*", "LANGSMITH_TRACING": "false"}

    def __enter__(self) -> Driver:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env=self.environment,
            )
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.thread.join()
        self.process.stdout.close()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.hear(line)
        self.lost(f"{self.command[1]} ended: {self.log.read_text(errors='replace')[-500:]}")

    def send(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def is_ready(self, seconds: float) -> Driver:
        """Return once its library is loaded."""
        self.ready.wait(seconds)
        if self.process.poll() is not None or not self.ready.is_set():
            raise Missing(f"{self.command[1]}: {self.log.read_text(errors='replace')[-500:]}")
        return self
