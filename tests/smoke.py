"""A new user's first minute, on each Python: llmq.py alone in a folder, an empty environment.

    python3 tests/smoke.py [PYTHON ...]     without arguments: every python3.X that is found

It shares no code with the other tests, so that it runs wherever llmq.py itself runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

LLMQ = Path(__file__).resolve().parent.parent / "llmq.py"
MINORS = range(8, 16)
TEXT = "one two  three"
CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": TEXT}]}
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


def version_of(python: str) -> str:
    """Its version as "3.11", or "" when it does not run (a shim without an interpreter)."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=20, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_pythons() -> dict[str, str]:
    """One interpreter per version: this one, those on PATH, those that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [sys.executable, shutil.which("python3") or ""]
    candidates += [shutil.which(f"python3.{minor}") or "" for minor in MINORS]
    for minor in MINORS:
        candidates += sorted(str(path) for path in kept.glob(f"3.{minor}.*/bin/python3"))
    found: dict[str, str] = {}
    for python in filter(None, candidates):
        found.setdefault(version_of(python), python)
    wanted = {f"3.{minor}" for minor in MINORS}
    return {version: found[version] for version in sorted(wanted & set(found), key=sort_key)}


def sort_key(version: str) -> int:
    return int(version.split(".")[1])


def check(version: str, python: str) -> None:
    """Raise AssertionError with what went wrong."""
    with tempfile.TemporaryDirectory(prefix="llmq-smoke-") as folder:
        shutil.copy(LLMQ, folder)
        real = subprocess.check_output([python, "-c", "import sys; print(sys.executable)"])
        command = ["env", "-i", real.decode().strip(), "llmq.py"]
        if sort_key(version) < 9:
            check_refusal(command, folder)
        else:
            check_demo(command, folder)
        left = sorted(path.name for path in Path(folder).iterdir())
        assert left == ["llmq.py"], f"it left {left} in the working directory"


def check_refusal(command: list[str], folder: str) -> None:
    """Too old: exit code 2 and one sentence."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=20, check=False
    )
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 2, (done.returncode, said)
    assert len(said) == 1, said
    assert "3.9" in said[0], said


def check_demo(command: list[str], folder: str) -> None:
    """It starts, answers whole and streamed, and stops with 0 when asked to."""
    process = subprocess.Popen(
        [*command, "--demo", "--port", "0"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    rescue = threading.Timer(30, process.kill)  # a hang becomes an end of the output
    rescue.start()
    try:
        output = []
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if found := ADDRESS.search(line):
                break
        else:
            raise AssertionError(f"no address in its output: {''.join(output)!r}")
        ask_both_ways(f"http://127.0.0.1:{found.group(1)}")
        process.send_signal(signal.SIGTERM)
        output.append(process.stdout.read())
        assert process.wait() == 0, (process.returncode, "".join(output))
        assert "Traceback" not in "".join(output), "".join(output)
    finally:
        rescue.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def ask_both_ways(base: str) -> None:
    whole = json.loads(post(base, CHAT))
    assert whole["choices"][0]["message"]["content"] == TEXT, whole
    lines = post(base, {**CHAT, "stream": True}).decode().splitlines()
    events = [line[len("data: ") :] for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    pieces = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(pieces) == TEXT, pieces
    assert len([piece for piece in pieces if piece]) > 1, f"not word by word: {pieces}"


def post(base: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(  # noqa: S310 - a fixed http address
        base + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
        return bytes(answer.read())


def main(arguments: list[str]) -> int:
    pythons = {version_of(python): python for python in arguments} or find_pythons()
    passed = []
    for version, python in pythons.items():
        try:
            check(version, python)
        except (AssertionError, OSError, subprocess.SubprocessError, ValueError) as error:
            print(f"smoke on Python {version} ({python}): {type(error).__name__}: {error}")
            return 1
        passed.append(version)
    print("smoke on Python " + ", ".join(passed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
