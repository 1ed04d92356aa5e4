"""Other ways to have llmq: a wheel, and the README's container, whose steps a daemon would take."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmq
from tests.fakes import ROOT, Process, ask, free_port, require

README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(name: str) -> str:
    """What is in the README's block of that name."""
    return README.partition(f"<!-- {name} -->\n")[2].partition("\n")[2].partition("```")[0]


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llmq's wheel, as flit builds it from a copy of what is in the repository."""
    require("flit_core")
    source, place = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("llmq.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build = "import sys, flit_core.buildapi as flit; flit.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(place)], cwd=source, check=True)
    (made,) = place.iterdir()
    return made


def test_the_wheel_holds_the_one_file_and_wants_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        told = archive.read(metadata).decode()
    assert names == {"llmq.py"}
    assert f"Version: {llmq.__version__}\n" in told
    wanted = re.findall(r"Requires-Dist: (.+)", told)
    assert all("extra ==" in one for one in wanted), wanted


def test_the_wheel_is_installed_and_its_command_runs(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    folder = "Scripts" if os.name == "nt" else "bin"
    install = ["-m", "pip", "--python", str(place / folder / "python"), "install", "-q"]
    install += ["--no-index", "--no-deps", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    command = place / folder / "llmq"
    told = subprocess.run([str(command), "-V"], capture_output=True, text=True, check=True)
    assert told.stdout == f"llmq {llmq.__version__}\n"
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    checked = subprocess.run([str(command), "config", "check"], env=home, check=False)
    assert checked.returncode == 0


# ---- the container


def instructions() -> Iterator[tuple[str, str]]:
    for line in fenced("dockerfile").replace("\\\n", "").splitlines():
        yield tuple(line.split(" ", 1))  # type: ignore[misc]


def of(wanted: str) -> list[str]:
    return [rest for name, rest in instructions() if name == wanted]


def test_dockerfile_copies_what_is_here_and_runs_as_somebody_else_than_root() -> None:
    assert next(name for name, _ in instructions()) == "FROM"
    copied = [one.split() for one in of("COPY")]
    assert [source for source, _ in copied] == ["llmq.py"]
    (entry,) = map(json.loads, of("ENTRYPOINT"))
    assert entry == ["python3", copied[0][1]]
    (user,) = of("USER")
    assert f"useradd --system --uid 999 {user}" in of("RUN")[0]
    assert f"install -d -o {user} {of('VOLUME')[0]}" in of("RUN")[0]


@pytest.mark.parametrize(
    "command", [*of("RUN"), *(one[len("CMD ") :] for one in of("HEALTHCHECK"))]
)
def test_commands_of_the_dockerfile_are_sound_shell(command: str) -> None:
    subprocess.run(["sh", "-n", "-c", command], check=True)


def test_variables_of_the_container_are_settings() -> None:
    known = {row.variable for row in llmq.known_settings()} | {"LLMQ_BACKENDS"}
    named = re.findall(r"LLMQ_\w+", fenced("dockerfile") + fenced("compose"))
    assert len(named) == 4
    assert set(named) <= known


async def test_the_container_serves_beyond_itself_and_its_check_tells_whether_it_does(
    tmp_path: Path,
) -> None:
    port = free_port()
    environ = dict(one.split("=", 1) for line in of("ENV") for one in shlex.split(line))
    environ["LLMQ_SERVER_STATE"] = str(tmp_path / Path(environ["LLMQ_SERVER_STATE"]).name)
    compose = dict(re.findall(r'(LLMQ_\w+): "?([^"\n]+)', fenced("compose")))
    environ["LLMQ_SERVER_ALLOW_ANONYMOUS_LAN"] = compose["LLMQ_SERVER_ALLOW_ANONYMOUS_LAN"]
    check = of("HEALTHCHECK")[0][len("CMD ") :].replace("11500", str(port))

    def health() -> int:
        quiet = subprocess.DEVNULL
        return subprocess.run(["sh", "-c", check], stderr=quiet, check=False).returncode

    assert health() == 1
    with Process("--demo", "--port", str(port), env=environ):
        assert health() == 0
        answer = await ask(port, "GET", "/v1/models", headers={"Host": "llmq:11500"})
        assert answer.json()["data"][0]["id"] == "echo"
