"""The peers of the tests: a real runner, its model, the libraries of clients, made on demand.

Everything is kept in `.real/` beside tests/ (ignored by git; `LLMQ_REAL_CACHE` names another
folder), complete or not at all, and made anew when its recipe here changes. What cannot be had
raises `Missing` with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("LLMQ_REAL_CACHE") or HERE.parents[1] / ".real")
PYTHONS = ("python3", "python3.13", "python3.12", "python3.11", "python3.10")
INSTALL_SECONDS = 240
READY_SECONDS = 60  # a busy machine loads the slow model in ten
MODELS = {  # numbers counted in a second on one core, megabytes, seconds to load
    "quick": ("--layers=8", "--dim=512", "--ffn=1408", "--heads=8"),  # 450, 30, 0.5
    "slow": ("--preset=slow",),  # 75, 224, 4
}


class Missing(Exception):
    """A peer that cannot be had on this machine, and why."""


# ---- Making ----------------------------------------------------------------------------------


def made(name: str, recipe: str, make: Callable[[Path], None], proof: str = ".") -> Path:
    """The file or folder `name` of the cache, made now unless it was made by this very recipe.

    `proof` is the path inside a folder that tells that it is still whole."""
    CACHE.mkdir(parents=True, exist_ok=True)
    target, stamp = CACHE / name, CACHE / f"{name}.recipe"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be making it
        whole = (target / proof).exists() and stamp.exists()
        if not (whole and stamp.read_text() == recipe):
            stamp.unlink(missing_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            make(target)
            stamp.write_text(recipe)
    return target


def run(*command: str, cwd: Path | None = None) -> str:
    """Run to the end and return what it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise Missing(f"{' '.join(command[:4])}: {said[-1]}")
    return done.stdout


def found(program: str) -> str:
    """The path of a program of this machine."""
    path = shutil.which(program)
    if path is None:
        raise Missing(f"the program {program} is not installed")
    return path


def base_python() -> str:
    """A Python that the runner's wheel works on: 3.10 or newer."""
    check = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))"
    for name in (sys.executable, *PYTHONS):
        path = shutil.which(name)
        with contextlib.suppress(Missing):
            if path and not run(path, "-c", check):
                return path
    raise Missing("the real runner needs Python 3.10 or newer with the module venv")


def python() -> str:
    """The Python of a venv with the runner and the libraries for Python."""
    wanted = HERE / "requirements.txt"

    def make(target: Path) -> None:
        run(base_python(), "-m", "venv", str(target))
        pip = (str(target / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
        run(*pip, "install", "--quiet", "--retries=1", "--timeout=20", "-r", str(wanted))

    return str(made("venv", wanted.read_text(), make, "bin/python") / "bin" / "python")


def node_folder() -> Path:
    """A folder whose node_modules holds the libraries for Node."""
    wanted = HERE / "package.json"
    found("node")
    npm = found("npm")

    def make(target: Path) -> None:
        target.mkdir()
        shutil.copy(wanted, target)
        quiet = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
        run(npm, "install", *quiet, "--loglevel=error", "--fetch-retries=1", cwd=target)

    return made("node", wanted.read_text(), make, "node_modules/openai")


def model(name: str) -> str:
    """A GGUF file of the counting model, with the cost that MODELS names."""
    maker = HERE / "make_tiny_gguf.py"

    def make(target: Path) -> None:
        run(sys.executable, str(maker), str(target), *MODELS[name])

    return str(made(f"{name}.gguf", f"{MODELS[name]}\n{maker.read_text()}", make))


# ---- Asking ----------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, Any]:
    """Status and JSON of one GET; status 0 when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Runner:
    """llama.cpp's server with room for two requests; its port stays over restarts."""

    def __init__(self, python: str, model_name: str, *options: str) -> None:
        self.python = python
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        script = str(HERE / "serve_xllamacpp.py")
        self.command = [python, script, model(model_name), str(self.port), *options]
        self.log = CACHE / f"{'-'.join([model_name, *options])}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it; it loads its model from now on."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )

    def kill(self) -> None:
        """End it at once, open answers and all."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ready(self) -> Runner:
        """Return once its model is loaded, started now if need be."""
        if self.process is None:
            self.start()
        if self.health() != 200:
            select.select([self.process.stdout], [], [], READY_SECONDS)
        if self.health() != 200:
            raise Missing(f"the runner does not work here: {self.log.read_text()[-300:]}")
        return self

    def health(self) -> int:
        """200 when it serves, 503 while it loads, 0 when it is not there."""
        return get(self.port, "/health")[0]

    def tasks(self) -> list[int]:
        """The runner's own numbers of the requests that it works on now."""
        return working(get(self.port, "/slots")[1])


def working(slots: list[dict[str, Any]] | None) -> list[int]:
    return [slot["id_task"] for slot in slots or [] if slot["is_processing"]]


class Watch:
    """Asks the runner for its slots without pause: `most` were seen at work at once."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.most = 0
        self.looks = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _look(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.runner.port, timeout=10)
        with contextlib.closing(connection):
            while not self.stop.is_set():
                connection.request("GET", "/slots")
                slots = json.loads(connection.getresponse().read())
                self.most = max(self.most, len(working(slots)))
                self.looks += 1


# ---- A client that can be killed -------------------------------------------------------------


def numbers(first: int, last: int) -> list[str]:
    """The pieces in which the model counts from `first` to `last`."""
    return [f" {number}" for number in range(first, last + 1)]


def pieces(events: list[Any]) -> list[str]:
    """What the model said in the events of a stream, piece by piece."""
    choices = [c for event in events if isinstance(event, dict) for c in event.get("choices", [])]
    return [c["delta"]["content"] for c in choices if c["delta"].get("content")]


def finishes(events: list[Any]) -> list[str]:
    """The finish reasons in the events of a stream."""
    choices = [c for event in events if isinstance(event, dict) for c in event.get("choices", [])]
    return [c["finish_reason"] for c in choices if c.get("finish_reason")]


def events_of(lines: Iterator[bytes] | list[bytes]) -> list[Any]:
    """The data of each event: JSON, or the text `[DONE]`."""
    data = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    return [d.decode() if d == b"[DONE]" else json.loads(d) for d in data]
