"""The one command, `python3 -m tests`: sets itself up, checks everything, stops when one fails.

Without arguments: the checkers, the smoke on every Python, then pytest with branch coverage.
With arguments: pytest alone, with them (`python3 -m tests -k scheduler -x`).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
SUMMARY = re.compile(r"(=+ )?\d+ (passed|failed|skipped|error|deselected|xfailed|warning)")

# tomllib is imported where a TOML file is read, and its absence has an answer of its own.
VERMIN = "-t=3.9- --no-tips --violations --exclude tomllib llmq.py tray"
# Half of the time goes by waiting for events; who is done takes over what the other has left.
IN_PARALLEL = ("-n", "2", "--dist", "worksteal")
CHECKS: dict[str, list[str]] = {
    "ruff check": ["-m", "ruff", "check", "--quiet", "--output-format=concise"],
    "ruff format": ["-m", "ruff", "format", "--check", "--quiet"],
    "mypy --strict": ["-m", "mypy", "--strict", "--no-error-summary"],
    "vermin 3.9": ["-c", "import vermin; vermin.main()", *VERMIN.split()],
}


def requirements() -> list[str]:
    """The extra `test` of pyproject.toml, read without a TOML parser: Python 3.9 has none."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^test = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    assert found, "no extra `test` in pyproject.toml"
    return [str(line) for line in ast.literal_eval(found.group(1))]


def importable(wanted: list[str]) -> bool:
    """Whether this Python has every package, and the pinned ones as pinned."""
    for line in wanted:
        name, pin = re.findall(r"^([\w.-]+)(?:==([\w.]+))?", line)[0]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        if pin and pin != version:
            return False
    return True


def prepare(wanted: list[str]) -> None:
    """Make .venv, or renew it when the requirements have changed since."""
    stamp = VENV / "llmq-requirements"
    digest = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return
    if VENV.is_symlink():  # `--clear` would empty the folder that others use
        sys.exit(f"{VENV} leads to {VENV.resolve()}, which has other packages than are wanted here")
    print("setting up .venv", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made.returncode:
        sys.exit("python3 -m venv does not work here; on Debian: apt install python3-venv")
    pip = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if code := subprocess.run([*pip, *wanted], check=False).returncode:
        sys.exit(code)
    stamp.write_text(digest, encoding="utf-8")


def check() -> None:
    """Run all checks side by side; the output only of one that fails, and then the end."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = {
        name: subprocess.Popen([sys.executable, *command], **options)
        for name, command in CHECKS.items()
    }
    outputs = {name: process.communicate()[0] for name, process in started.items()}
    for name, process in started.items():
        if process.returncode:
            print(outputs[name].decode(errors="replace"), f"FAILED: {name}", sep="\n", flush=True)
            sys.exit(process.returncode)
        print(f"ok: {name}", flush=True)


def run_pytest() -> tuple[int, str]:
    """Run pytest under coverage, pass its output on as it comes; exit code and last line."""
    command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", *IN_PARALLEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        output = b""
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            output += data
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    lines = output.decode(errors="replace").splitlines()
    return process.returncode, next(filter(SUMMARY.match, reversed(lines)), "")


def never_written(folder: Path) -> list[Path]:
    """The data files of processes that were killed before they had put anything into them.

    `coverage combine` warns of each. Every other file that is not as it should be is left to it.
    """
    return [file for file in sorted(folder.glob(".coverage.*")) if not has_beginning(file)]


def has_beginning(file: Path) -> bool:
    """Whether coverage's first row is there, or something else than its absence is the matter."""
    where = f"{file.resolve().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(where, uri=True)) as database:
            row = database.execute("SELECT version FROM coverage_schema").fetchone()
    except sqlite3.Error as error:
        return "no such table" not in str(error)
    return row is not None


def covered() -> None:
    """Join what all processes covered; the report must reach fail_under."""
    coverage = [sys.executable, "-m", "coverage"]
    killed = never_written(ROOT)  # tests kill processes: no news, unless the report fails
    for file in killed:
        file.unlink()
    subprocess.run([*coverage, "combine", "--quiet"], check=False)
    if code := subprocess.run([*coverage, "report"], check=False).returncode:
        lost = f" (killed processes of which nothing is known: {len(killed)})" if killed else ""
        print(f"FAILED: coverage{lost}", flush=True)
        sys.exit(code)


def main(arguments: list[str]) -> int:
    os.chdir(ROOT)
    wanted = requirements()
    if Path(sys.prefix).resolve() != VENV.resolve() and not importable(wanted):
        prepare(wanted)
        os.execv(PYTHON, [str(PYTHON), "-m", "tests", *arguments])  # noqa: S606
    if arguments:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode
    check()
    if code := subprocess.run([sys.executable, "-m", "tests.smoke"], check=False).returncode:
        return code
    subprocess.run([sys.executable, "-m", "coverage", "erase"], check=False)
    code, summary = run_pytest()
    if code:
        return code
    covered()
    print(summary, flush=True)  # last again: it says how many tests ran
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
