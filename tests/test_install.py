"""install.sh on a scratch HOME: what it writes, what it asks for, what it takes away again.

No test reaches a service manager: `systemctl` and its like are stubs that note their arguments.
"""

from __future__ import annotations

import configparser
import importlib.util
import os
import plistlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import ROOT, Process, require_command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a POSIX shell runs it")
TOOLS = ["sh", "cat", "chmod", "cmp", "dirname", "env", "grep", "id", "mkdir", "mktemp", "mv"]
TOOLS += ["printf", "rm", "rmdir", "sed", "uname"]
STUBS = ["systemctl", "systemd-run", "launchctl", "sleep"]
# Notes its arguments. FAIL lists what fails, FAIL_ONCE what fails the first time.
STUB = """#!/bin/sh
call="${0##*/} $*"
printf '%s\\n' "$call" >>"$CALLS"
case $call in ${FAIL:-nothing}) exit 1 ;; esac
case $call in ${FAIL_ONCE:-nothing}) mkdir "$CALLS.failed" 2>/dev/null && exit 1 ;; esac
exit 0
"""
# In the place of llmq.py, which takes half a second to compile and to say its configuration.
STAND_IN = """print('{"server": {"port": 11500, "host": "127.0.0.1"}}')\n"""
TRAY = 'import sys\nprint("tray", sys.executable, *sys.argv[1:])\n'
SHELLS = ["dash", "bash", "busybox sh"]
ASK = "systemctl --user show-environment"
RELOAD = "systemctl --user daemon-reload"
ENABLE = "systemctl --user --quiet enable llmq.service"
START = "systemctl --user start llmq.service"
RESTART = "systemctl --user restart llmq.service"


class Box:
    """A machine with nothing but an empty HOME, a few tools and stubs."""

    def __init__(self, folder: Path, home: str = "home", program: str = "") -> None:
        self.folder = folder
        self.home = folder / home
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.source = folder / "a clone"
        for one in (self.home, self.bin, self.source):
            one.mkdir(parents=True)
        for name in TOOLS:
            (self.bin / name).symlink_to(require_command(name))
        for name in STUBS:
            self.tool(name, STUB)
        self.tool("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for name in ("install.sh", "llmq.py"):
            shutil.copy(ROOT / name, self.source)
        if program:
            (self.source / "llmq.py").write_text(program)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "CALLS": str(self.calls_file),
            "TMPDIR": str(folder),
        }

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def mac(self) -> None:
        (self.bin / "uname").unlink()
        self.tool("uname", "#!/bin/sh\necho Darwin\n")

    def tray(self) -> None:
        (self.source / "tray").mkdir()
        (self.source / "tray" / "llmq_tray.py").write_text(TRAY)
        (self.source / "tray" / "__main__.py").write_text("from tray import llmq_tray\n")

    def run(self, *options: str, code: int = 0, shell: str = "sh", **env: str) -> str:
        """What it said; `code` is what it ends with; `shell` are the words before its name."""
        self.calls_file.write_text("")
        command = [*shlex.split(shell), str(self.source / "install.sh"), *options]
        command[0] = require_command(command[0])
        done = subprocess.run(
            command,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            cwd=self.folder,
            check=False,
        )
        assert done.returncode == code, done
        assert bool(done.stderr) == bool(code), done
        return done.stdout + done.stderr

    @property
    def calls(self) -> list[str]:
        """What the stubs were asked to do, looking alone left out."""
        return [line for line in self.calls_file.read_text().splitlines() if line != ASK]

    @property
    def files(self) -> list[str]:
        """All that is in HOME but folders, as paths from there."""
        found = [path for path in self.home.rglob("*") if path.is_symlink() or not path.is_dir()]
        return sorted(str(path.relative_to(self.home)) for path in found)

    @property
    def library(self) -> Path:
        return self.home / ".local/lib/llmq"

    @property
    def units(self) -> Path:
        return self.home / ".config/systemd/user"

    def state(self) -> dict[str, Any]:
        """Everything in HOME, with what would tell that it was written again."""
        found = {}
        for path in [self.home, *self.home.rglob("*")]:
            facts = path.lstat()
            found[str(path)] = (facts.st_ino, facts.st_mtime_ns, facts.st_mode, facts.st_size)
        return found


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """For what install.sh does whatever the program is."""
    return Box(tmp_path, "home of o'neill", STAND_IN)


@pytest.fixture
def real(box: Box) -> None:
    """What llmq itself has a part in: it runs, is compiled or says how it is configured."""
    shutil.copy(ROOT / "llmq.py", box.source)


TAG = sys.implementation.cache_tag
PROGRAM = [
    ".local/bin/llmq",
    ".local/lib/llmq/__main__.py",
    f".local/lib/llmq/__pycache__/__main__.{TAG}.pyc",
    f".local/lib/llmq/__pycache__/llmq.{TAG}.pyc",
    ".local/lib/llmq/llmq.py",
]
PLAIN = [".config/systemd/user/llmq.service", *PROGRAM]
DROP_IN = ".config/systemd/user/llmq.service.d/10-sandbox.conf"
SOCKET = ".config/systemd/user/llmq.socket"
WITH_SANDBOX = sorted([*PLAIN, DROP_IN])


def words(said: str) -> set[str]:
    """What the lines about files begin with."""
    return set(re.findall(r"(?m)^(wrote|unchanged|removed|would \w+) +/", said))


# ---- Install ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_files_are_put_in_place_and_the_service_started(tmp_path: Path, shell: str) -> None:
    box = Box(tmp_path, "a home")
    said = box.run(shell=shell)
    assert box.files == WITH_SANDBOX
    for file in box.files:
        assert f"wrote         {box.home}/{file}\n" in said
    assert box.calls[0].startswith("systemd-run --user ")
    assert box.calls[1:] == [RELOAD, ENABLE, RESTART, START]
    assert (box.library / "llmq.py").read_bytes() == (ROOT / "llmq.py").read_bytes()
    assert "OPENAI_BASE_URL=http://127.0.0.1:11500/v1" in said
    assert "loginctl enable-linger" in said
    assert f"not on your PATH: {box.home}/.local/bin" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a clone", "a home", "bin", "calls"]


@pytest.mark.parametrize("shell", SHELLS)
def test_second_run_changes_nothing(tmp_path: Path, shell: str) -> None:
    box = Box(tmp_path)
    options = ("--socket-activated", "--sandbox", "yes")
    box.run(*options, shell=shell)
    before = box.state()
    said = box.run(*options, shell=shell)
    assert words(said) == {"unchanged"}
    assert box.state() == before
    assert box.calls == [f"{one} llmq.socket" for one in (ENABLE, START)]


def test_what_others_may_do_with_the_files_does_not_hang_on_the_umask(box: Box) -> None:
    command = f'umask 000; exec sh "{box.source}/install.sh" --no-start'
    subprocess.run([box.bin / "sh", "-c", command], env=box.env, check=True, capture_output=True)
    for file in box.files:
        mode = 0o755 if "/bin/" in file else 0o644
        assert stat.S_IMODE((box.home / file).stat().st_mode) == mode
    folders = [path for path in box.home.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o755}


def test_new_llmq_is_restarted_once(box: Box) -> None:
    box.run()
    with (box.source / "llmq.py").open("a") as file:
        file.write("# newer\n")
    said = box.run()
    assert words(said) == {"wrote", "unchanged"}
    assert said.count("wrote") == 2  # itself and what it is compiled to
    assert box.calls[1:] == [ENABLE, RESTART, START]
    assert RESTART not in (box.run(), *box.calls)


def test_lost_permission_and_changed_file_are_mended(box: Box) -> None:
    box.run()
    (box.home / ".local/bin/llmq").chmod(0o644)
    (box.units / "llmq.service").write_text("mine\n")
    assert box.run().count("wrote") == 2
    assert os.access(box.home / ".local/bin/llmq", os.X_OK)
    assert "mine" not in (box.units / "llmq.service").read_text()
    assert RELOAD in box.calls


def test_service_that_does_not_start_is_told(box: Box) -> None:
    said = box.run(code=1, FAIL="*restart*")
    assert "journalctl --user -u llmq" in said


def test_dry_run_writes_nothing_and_asks_nobody(box: Box) -> None:
    box.tray()
    said = box.run("--dry-run", "--tray", "--socket-activated", "--sandbox=yes")
    assert words(said) == {"would write"}
    assert box.files == []
    assert box.calls_file.read_text() == ""
    box.run()
    before = box.state()
    assert words(box.run("--dry-run")) == {"unchanged"}
    assert words(box.run("--dry-run", "--uninstall")) == {"would remove"}
    assert box.state() == before
    assert box.calls_file.read_text() == ""


def test_no_start_touches_no_service(box: Box) -> None:
    said = box.run("--no-start")
    assert box.files == PLAIN
    assert box.calls_file.read_text() == ""
    assert "systemctl --user daemon-reload && systemctl --user enable --now llmq.service" in said
    box.run("--uninstall", "--no-start")
    assert box.files == []
    assert box.calls_file.read_text() == ""


@pytest.mark.parametrize("lacking", ["session", "systemd"])
def test_without_a_session_files_are_written_and_the_command_said(box: Box, lacking: str) -> None:
    if lacking == "systemd":
        (box.bin / "systemctl").unlink()
        (box.bin / "systemd-run").unlink()
    said = box.run("--socket-activated", FAIL="*show-environment*")
    assert box.files == sorted([*PLAIN, SOCKET])
    assert box.calls == []
    command = "systemctl --user enable --now llmq.service llmq.socket"
    assert f"to start it: {RELOAD} && {command}\n" in said


def test_prefix_says_where_to(box: Box) -> None:
    for option in (["--prefix", f"{box.folder}/else where"], [f"--prefix={box.folder}/opt/"]):
        prefix = option[-1].partition("=")[2].rstrip("/") or option[-1]
        box.run(*option)
        assert (Path(prefix) / "lib/llmq/llmq.py").exists()
        assert f'"{prefix}/lib/llmq" serve' in (box.units / "llmq.service").read_text()
        box.run(*option, "--uninstall")
        assert not Path(prefix).exists()
        assert box.files == []


@pytest.mark.usefixtures("real")
def test_command_llmq_and_its_path(box: Box) -> None:
    said = box.run("--no-start", PATH=f"{box.home}/.local/bin:{box.bin}")
    assert "PATH" not in said
    done = subprocess.run(
        [box.home / ".local/bin/llmq", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"llmq {llmq.__version__}\n"
    words_of_help = subprocess.check_output([box.home / ".local/bin/llmq", "--help"], text=True)
    assert words_of_help.startswith("usage: llmq ")


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["--prefix", "relative"], {}),
        (["--prefix"], {}),
        (["--prefix", ""], {}),
        (["--prefix", '/a"b'], {}),
        (["--prefix", "/a$b"], {}),
        (["--prefix", "/a\nb"], {}),
        (["--sandbox=maybe"], {}),
        (["--sandbox", "maybe"], {}),
        (["--purge"], {}),
        (["--frobnicate"], {}),
        (["install"], {}),
        ([], {"DESTDIR": "relative"}),
        ([], {"HOME": "relative"}),
        ([], {"HOME": ""}),
    ],
)
def test_odd_option_or_path_ends_with_2(box: Box, options: list[str], env: dict[str, str]) -> None:
    said = box.run(*options, code=2, **env)
    assert said.startswith("install.sh: ")
    assert box.files == []
    assert box.calls_file.read_text() == ""


def test_help_has_every_option(box: Box) -> None:
    text = (ROOT / "install.sh").read_text()
    said = box.run("--help")
    for option in set(re.findall(r"(?m)^ {8}(?:-h \| )?(--[a-z-]+)\)", text)) - {"--help"}:
        assert option in said
    assert said == box.run("-h")
    assert box.files == []


def test_xdg_folder_of_the_configuration_has_the_unit(box: Box) -> None:
    box.run(XDG_CONFIG_HOME=f"{box.home}/cfg")
    assert "cfg/systemd/user/llmq.service" in box.files
    box.run("--uninstall", XDG_CONFIG_HOME=f"{box.home}/cfg")
    assert box.files == []
    box.run(XDG_CONFIG_HOME="relative")  # which the specification says to ignore
    assert box.files == WITH_SANDBOX


# ---- Where it cannot -------------------------------------------------------------------------


def test_home_that_cannot_be_written_is_one_sentence(box: Box) -> None:
    (box.home / ".local").write_text("in the way")
    said = box.run(code=1)
    assert said.startswith(f"install.sh: cannot write {box.library}/llmq.py: ")
    assert len(said.splitlines()) == 1
    assert box.files == [".local"]
    assert box.calls == []


def test_read_only_home_is_one_sentence(box: Box) -> None:
    shell = "sh"
    if os.geteuid() == 0:  # to whom permissions do not matter, but for this
        shell = f"{require_command('setpriv')} --bounding-set -dac_override {box.bin}/sh"
    box.home.chmod(0o555)
    said = box.run(code=1, shell=shell)
    box.home.chmod(0o755)
    assert said == (f"install.sh: cannot write {box.library}/llmq.py: Permission denied\n")
    assert box.files == []


def test_install_that_failed_half_way_is_completed_by_the_next(box: Box) -> None:
    (box.home / ".config").write_text("in the way")
    assert "cannot write" in box.run(code=1)
    assert box.calls == []
    (box.home / ".config").unlink()
    box.run()
    assert box.files == WITH_SANDBOX
    assert RESTART in box.calls
    assert not [path for path in box.folder.rglob("*") if path.name.startswith(".llmq.")]


OLD = "#!/bin/sh\nprintf '/old/python3.8\\n/old/python3.8\\n3.8.18\\n'\nexit 1\n"


def test_old_python_is_refused_by_name(box: Box) -> None:
    box.tool("python3", OLD)
    said = box.run(code=1)
    assert "Python 3.9 or newer" in said
    assert "python3 is 3.8.18" in said
    assert box.files == []
    box.tool("mine", OLD)
    assert "mine is 3.8.18" in box.run(code=1, PYTHON=str(box.bin / "mine"))


def test_box_without_python_is_told_so(box: Box) -> None:
    (box.bin / "python3").unlink()
    assert "Python 3.9 or newer" in box.run(code=1)
    assert "/no/python" in box.run(code=1, PYTHON="/no/python")


def test_newer_python_is_found_beside_an_old_one(box: Box) -> None:
    (box.bin / "python3").rename(box.bin / "python3.12")
    box.tool("python3", OLD)
    box.tool("python3.13", "#!/bin/sh\nexit 127\n")  # a shim with nothing behind it
    box.run()
    assert exec_start(box)[0] == os.path.realpath(sys.executable)


@pytest.mark.usefixtures("real")
def test_folder_that_it_is_run_from_has_no_say(box: Box) -> None:
    evil_folder(box.folder)
    box.tray()
    box.run("--tray")
    assert set(box.files) > set(WITH_SANDBOX)
    box.run("--uninstall")
    box.mac()
    box.run(FAIL="launchctl print*")
    assert AGENT in box.files


@pytest.mark.usefixtures("real")
def test_mistake_in_the_configuration_is_told_before_anything_is_changed(box: Box) -> None:
    file = box.home / ".config/llmq/llmq.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"queue": {"slotz": 2}}')
    said = box.run(code=1)
    assert "slotz" in said.splitlines()[0]
    assert box.files == [".config/llmq/llmq.json"]


def test_clone_that_lacks_something_is_told(box: Box) -> None:
    assert "tray/ is not beside install.sh" in box.run("--tray", code=1)
    (box.source / "llmq.py").unlink()
    assert "llmq.py is not beside install.sh" in box.run(code=1)
    assert box.files == []


# ---- The compiled form -----------------------------------------------------------------------

VERSION = f"llmq {llmq.__version__}\n"


def evil_folder(folder: Path) -> None:
    """A working directory whose modules must not be taken for Python's own or for llmq."""
    names = ("argparse", "asyncio", "importlib", "json", "llmq", "plistlib", "py_compile", "runpy")
    for name in names:
        (folder / f"{name}.py").write_text("raise SystemExit('imported from here')\n")


def command_of(box: Box) -> list[str]:
    """The words that the command `llmq` runs."""
    lines = (box.home / ".local/bin/llmq").read_text().splitlines()
    assert lines[0] == "#!/bin/sh"
    first, *command, last = shlex.split(lines[1])
    assert (first, last) == ("exec", "$@")
    return command


def compiled(command: list[str], version: str = VERSION, before: str = "") -> set[str]:
    """Which files of llmq Python compiles when the command starts: `-v` says where code is from.

    `before` are words before the command's own.
    """
    python, *more = command
    command = [*shlex.split(before), python, "-v", *more, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    assert (done.returncode, done.stdout) == (0, version), done.stderr[-2000:]
    found = re.findall(r"""(?m)^# code object from ["']?(.*?)["']?$""", done.stderr)
    names = {Path(path).name for path in found if "/lib/llmq/" in path}
    for name in ("llmq", "__main__"):  # each from one place
        assert len(names & {f"{name}.py", f"{name}.{TAG}.pyc"}) == 1, found
    return {name for name in names if name.endswith(".py")}


@pytest.mark.parametrize("home", ["home", "a home", "größe"])
def test_nothing_is_compiled_when_it_starts(tmp_path: Path, home: str) -> None:
    box = Box(tmp_path, home)
    box.run("--no-start")
    before = box.state()
    assert compiled(command_of(box)) == set()
    *service, serve = exec_start(box)
    assert serve == "serve"
    assert compiled(service) == set()
    assert box.state() == before  # nor written


@pytest.mark.usefixtures("real")
def test_compiled_form_is_mended_by_the_next_install(box: Box) -> None:
    box.run()
    file = box.library / f"__pycache__/llmq.{TAG}.pyc"
    whole = file.read_bytes()
    file.write_bytes(whole[:99])
    assert f"wrote         {file}\n" in box.run()
    assert RESTART not in box.calls  # what runs has its code
    assert file.read_bytes() == whole


@pytest.mark.usefixtures("real")
def test_file_put_in_place_by_hand_is_what_starts_whatever_its_date(box: Box) -> None:
    box.run("--no-start")
    program = box.library / "llmq.py"
    facts = program.stat()
    version = "9" * len(llmq.__version__)
    line = '__version__ = "{}"'.format
    text = program.read_text()
    assert line(llmq.__version__) in text
    program.write_text(text.replace(line(llmq.__version__), line(version)))
    os.utime(program, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert program.stat().st_size == facts.st_size
    assert compiled(command_of(box), f"llmq {version}\n") == {"llmq.py"}
    assert compiled(command_of(box), f"llmq {version}\n") == set()  # it has mended it itself


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("state", ["missing", "empty", "stale", "of another Python", "in the way"])
@pytest.mark.parametrize("writable", [True, False], ids=["", "read-only"])
def test_it_starts_without_a_good_compiled_form(box: Box, state: str, writable: bool) -> None:
    box.run("--no-start")
    cache = box.library / "__pycache__"
    for file in list(cache.iterdir()):
        if state == "empty":
            file.write_bytes(b"")
        elif state == "stale":
            file.write_bytes(file.read_bytes()[:8] + bytes(8) + file.read_bytes()[16:])
        elif state == "of another Python":
            file.write_bytes(bytes(4) + file.read_bytes()[4:])
        else:
            file.unlink()
    if state in ("missing", "in the way"):
        cache.rmdir()
    if state == "in the way":
        cache.write_text("")
    before = "" if writable else read_only(box)
    every = {"llmq.py", "__main__.py"}
    assert compiled(command_of(box), before=before) == every
    again = set() if writable and state != "in the way" else every
    assert compiled(command_of(box), before=before) == again
    for path in filter(Path.is_dir, (box.library, cache)):
        path.chmod(0o755)
    box.run("--uninstall")
    assert box.files == []


def read_only(box: Box) -> str:
    """Make what is installed read-only; the words that make it so for root, too."""
    for path in filter(Path.is_dir, (box.library, box.library / "__pycache__")):
        path.chmod(0o555)
    return f"{require_command('setpriv')} --bounding-set -dac_override" * (os.geteuid() == 0)


@pytest.mark.usefixtures("real")
def test_nothing_is_imported_from_where_it_is_called(box: Box) -> None:
    box.run("--no-start")
    evil_folder(box.folder)
    done = subprocess.run(
        [box.home / ".local/bin/llmq", "--version"],
        cwd=box.folder,
        env={"PYTHONPATH": f":{box.folder}"},  # the empty word is the working directory
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (VERSION, "")


# ---- The unit --------------------------------------------------------------------------------


def unit(file: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(file)
    return parser


def exec_start(box: Box) -> list[str]:
    """The command of the unit, its quotes and % undone."""
    line = unit(box.units / "llmq.service")["Service"]["ExecStart"]
    return [word.replace("%%", "%") for word in shlex.split(line)]


def verify(box: Box, *files: Path) -> str:
    """What systemd-analyze has against them: it says so and may still end with 0."""
    runtime = box.folder / "run"
    runtime.mkdir(exist_ok=True)
    env = {**box.env, "PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime)}
    command = [require_command("systemd-analyze"), "verify", "--user", "--man=no", *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.stderr + done.stdout + (f"ended with {done.returncode}" if done.returncode else "")


@pytest.mark.parametrize("home", ["home", "o'neill's home", "100%", "größe;&(#)"])
@pytest.mark.parametrize("sandbox", ["yes", "no"])
@pytest.mark.parametrize("socket", [False, True], ids=["", "socket"])
def test_systemd_has_nothing_against_any_variant_of_the_unit(
    tmp_path: Path, home: str, sandbox: str, socket: bool
) -> None:
    box = Box(tmp_path, home, STAND_IN)
    box.run("--sandbox", sandbox, *["--socket-activated"][: int(socket)])
    units = [path for path in box.units.iterdir() if path.is_file()]
    assert len(units) == 1 + socket
    assert (box.home / DROP_IN).exists() == (sandbox == "yes")
    assert verify(box, *units) == ""
    python, *flags, program, command = exec_start(box)
    assert (python, command) == (os.path.realpath(sys.executable), "serve")
    assert flags == ["-I", "-u"]
    assert Path(program) == box.library
    assert (box.library / "__main__.py").exists()


def test_systemd_would_have_something_against_a_mistake(box: Box) -> None:
    box.run("--sandbox=yes")
    text = (box.units / "llmq.service").read_text()
    broken = box.folder / "llmq.service"
    for mistake, found in [("Frobnicate=1", "Frobnicate"), ("WatchdogSec=soon", "soon")]:
        broken.write_text(text.replace("[Service]", f"[Service]\n{mistake}"))
        assert found in verify(box, broken)
    (box.home / DROP_IN).write_text("[Service]\nProtectEverything=yes\n")
    assert "ProtectEverything" in verify(box, box.units / "llmq.service")


def test_unit_does_not_loop_on_a_mistake_and_outlasts_the_drain(box: Box) -> None:
    box.run()
    service = unit(box.units / "llmq.service")["Service"]
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "78"]
    drain = build_settings({}).server.drain_timeout
    assert int(service["TimeoutStopSec"]) > drain + 2 * llmq.LINGER_SECONDS
    assert int(service["WatchdogSec"]) >= 10
    assert int(service["LimitNOFILE"]) > build_settings({}).queue.max_depth + 512
    assert unit(box.units / "llmq.service")["Install"]["WantedBy"] == "default.target"


@pytest.mark.usefixtures("real")
def test_command_of_the_unit_serves_and_reloads(box: Box) -> None:
    box.run("--no-start")
    p = Process()
    p.command = [*exec_start(box), "--demo", "--port", "0"]
    with p:
        reload = unit(box.units / "llmq.service")["Service"]["ExecReload"]
        line = shlex.split(reload.replace("${MAINPID}", str(p.pid)))
        subprocess.run(line, check=True, timeout=5)
        p.wait_for("reload: done")
        assert p.stop() == 0


# ---- The sandbox -----------------------------------------------------------------------------


def test_sandbox_is_there_where_a_trial_works(box: Box) -> None:
    box.run()
    assert DROP_IN in box.files
    (trial,) = [call for call in box.calls if call.startswith("systemd-run")]
    assert trial.startswith("systemd-run --user --quiet --wait --collect ")
    for setting in ("PrivateUsers=yes", "ProtectSystem=strict", "PrivateTmp=yes"):
        assert f"-p {setting}" in trial
        assert setting in (box.home / DROP_IN).read_text()


def test_sandbox_goes_where_the_trial_fails_by_now(box: Box) -> None:
    box.run(FAIL="systemd-run*")
    assert box.files == PLAIN
    box.run()
    assert DROP_IN in box.files
    said = box.run(FAIL="systemd-run*")
    assert f"removed       {box.home}/{DROP_IN}" in said
    assert box.files == PLAIN
    assert box.calls[1:] == [RELOAD, ENABLE, RESTART, START]


def test_sandbox_that_cannot_be_tried_stays_as_it_is(box: Box) -> None:
    box.run("--no-start")
    assert box.files == PLAIN
    box.run("--no-start", "--sandbox")
    assert DROP_IN in box.files
    assert words(box.run("--no-start")) == {"unchanged"}
    box.run("--no-start", "--sandbox", "no")
    assert box.files == PLAIN
    assert box.calls_file.read_text() == ""


# ---- The socket ------------------------------------------------------------------------------


@pytest.mark.usefixtures("real")
def test_socket_listens_where_the_configuration_says(box: Box) -> None:
    file = box.home / ".config/llmq/llmq.json"
    file.parent.mkdir(parents=True)
    lines = {
        '{"server": {"port": 12345}}': ["127.0.0.1:12345"],
        '{"server": {"host": "localhost"}}': ["127.0.0.1:11500"],
        '{"server": {"host": "::1", "port": 1234}}': ["[::1]:1234"],
        '{"server": {"host": "192.0.2.7"}}': ["192.0.2.7:11500"],
    }
    for text, expected in lines.items():
        file.write_text(text)
        said = box.run("--socket-activated", PORT="999", LLMQ_SERVER_PORT="998")
        written = (box.units / "llmq.socket").read_text()
        found = re.findall("ListenStream=(.*)", written)
        more = [] if "host" in text or not ipv6() else ["[::1]:12345"]
        assert found == [*expected, *more]
        assert "BindIPv6Only=ipv6-only" in written
        assert f"OPENAI_BASE_URL=http://127.0.0.1:{expected[0].rpartition(':')[2]}/v1" in said


def ipv6() -> bool:
    """Whether this box has ::1."""
    file = Path("/proc/net/if_inet6")
    return file.exists() and bool(re.search("(?m)^0{31}1 ", file.read_text()))


def test_service_gives_the_port_to_a_new_socket_and_takes_it_from_there(box: Box) -> None:
    box.run()
    box.run("--socket-activated")
    names = "llmq.service llmq.socket"
    assert box.calls[1:] == [
        RELOAD,
        "systemctl --user stop llmq.service",
        f"systemctl --user --quiet enable {names}",
        "systemctl --user restart llmq.socket",
        f"systemctl --user start {names}",
    ]
    service = unit(box.units / "llmq.service")["Unit"]
    assert service["Requires"] == service["After"] == "llmq.socket"


def test_socket_stays_open_while_a_new_llmq_is_installed(box: Box) -> None:
    box.run("--socket-activated")
    with (box.source / "llmq.py").open("a") as file:
        file.write("# newer\n")
    box.run()  # what is installed is remembered
    assert SOCKET in box.files
    assert RESTART in box.calls
    assert not [call for call in box.calls if "restart llmq.socket" in call or " stop " in call]


# ---- The tray --------------------------------------------------------------------------------


def test_tray_is_a_command_and_an_entry_in_the_menu(box: Box) -> None:
    box.tray()
    said = box.run("--tray")
    entry = ".local/share/applications/llmq-tray.desktop"
    added = {".local/bin/llmq-tray", entry, *(f".local/lib/llmq/tray/{n}" for n in tray_files(box))}
    assert set(box.files) == {*WITH_SANDBOX, *added}
    command = [box.home / ".local/bin/llmq-tray", "--url", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"tray {sys.executable} --url a b\n"
    assert ("pip install pystray pillow" in said) != has_pystray()
    (box.source / "tray" / "llmq_tray.py").write_text(TRAY + "# newer\n")
    assert box.run().count("wrote") == 1  # what is installed is remembered
    assert RESTART not in box.calls  # and is none of the service's business


def tray_files(box: Box) -> list[str]:
    return [path.name for path in (box.source / "tray").iterdir()]


def has_pystray() -> bool:
    return all(importlib.util.find_spec(name) for name in ("pystray", "PIL"))


@pytest.mark.parametrize("home", ["home", "a home", "100%"])
def test_entry_in_the_menu_is_a_good_one(tmp_path: Path, home: str) -> None:
    validate = require_command("desktop-file-validate")
    box = Box(tmp_path, home, STAND_IN)
    box.tray()
    box.run("--tray", "--no-start")
    file = box.home / ".local/share/applications/llmq-tray.desktop"
    done = subprocess.run([validate, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (line,) = re.findall("Exec=(.*)", file.read_text())
    assert shlex.split(line)[0].replace("%%", "%") == f"{box.home}/.local/bin/llmq-tray"


def test_tray_needs_no_login_entry_but_uninstall_takes_its_own_away(box: Box) -> None:
    box.tray()
    box.run("--tray")
    assert not (box.home / ".config/autostart").exists()
    by_the_tray = [".config/autostart/llmq-tray.desktop", ".cache/llmq-tray/lock"]
    by_the_tray += [".local/state/llmq/llmq.log", ".local/state/llmq/llmq.png"]
    by_the_tray += [".local/lib/llmq/tray/__pycache__/a.pyc", ".config/llmq/tray.json"]
    for name in by_the_tray:
        (box.home / name).parent.mkdir(parents=True, exist_ok=True)
        (box.home / name).write_text("")
    box.run("--uninstall")
    assert box.files == [".config/llmq/tray.json"]  # what was chosen in its menu
    box.run("--uninstall", "--purge")
    assert list(box.home.iterdir()) == []


# ---- Uninstall -------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_uninstall_leaves_nothing_of_its_own_and_keeps_the_configuration(
    tmp_path: Path, shell: str
) -> None:
    box = Box(tmp_path, "a home")
    box.tray()
    box.run("--tray", "--socket-activated", shell=shell)
    for name in ("llmq.toml", "llmq.env", "mine.txt"):
        (box.home / ".config/llmq").mkdir(exist_ok=True)
        (box.home / ".config/llmq" / name).write_text("")
    for target, name in [("default", "llmq.service"), ("sockets", "llmq.socket")]:
        wants = box.units / f"{target}.target.wants"
        wants.mkdir()
        (wants / name).symlink_to(box.units / name)  # as `systemctl enable` does
    kept = [f".config/llmq/{name}" for name in ("llmq.env", "llmq.toml", "mine.txt")]
    said = box.run("--uninstall", shell=shell)
    assert words(said) == {"removed"}
    assert box.files == kept
    assert box.calls == [
        "systemctl --user --quiet disable --now llmq.service llmq.socket",
        "systemctl --user reset-failed llmq.service",
        RELOAD,
    ]
    assert {path.name for path in box.home.iterdir()} == {".config"}
    assert "nothing of llmq is here" in box.run("--uninstall", shell=shell)
    assert box.calls == []
    box.run("--uninstall", "--purge", shell=shell)
    assert box.files == [".config/llmq/mine.txt"]
    (box.home / ".config/llmq/mine.txt").unlink()


def test_uninstall_leaves_alone_what_is_not_its_own(box: Box) -> None:
    mine = [".local/bin/mine", ".config/systemd/user/mine.service"]
    mine.append(".config/systemd/user/llmq.service.d/override.conf")  # by `systemctl edit`
    for name in mine:
        (box.home / name).parent.mkdir(parents=True, exist_ok=True)
        (box.home / name).write_text("")
    box.run()
    box.run("--uninstall", "--purge")
    assert box.files == sorted(mine)


def test_link_in_the_place_of_the_library_leads_to_what_is_anothers(box: Box) -> None:
    others = box.folder / "other" / "tray"
    others.mkdir(parents=True)
    (others / "precious").write_text("")
    library = box.home / ".local/lib/llmq"
    library.parent.mkdir(parents=True)
    library.symlink_to(others.parent)
    assert "is a link" in box.run(code=1)
    box.run("--uninstall")
    assert (others / "precious").exists()
    assert not library.is_symlink()


def test_folder_in_the_place_of_the_command_stays_as_it_is(box: Box) -> None:
    command = box.home / ".local/bin/llmq"
    command.mkdir(parents=True)
    assert "is a folder" in box.run(code=1)
    assert list(command.iterdir()) == []


@pytest.mark.parametrize("folder", ['a"b', "a$(touch PWNED)", "a`id`"])
def test_python_in_a_folder_that_cannot_be_quoted_is_refused(box: Box, folder: str) -> None:
    place = box.folder / folder
    place.mkdir()
    shutil.copy(os.path.realpath(sys.executable), place / "python3")
    said = box.run(code=2, PYTHON=str(place / "python3"), PYTHONHOME=sys.base_prefix)
    assert "quote the path" in said
    assert not list(box.folder.rglob("PWNED"))
    assert box.files == []


def test_uninstall_needs_neither_python_nor_a_session(box: Box) -> None:
    box.run()
    (box.bin / "python3").unlink()
    box.run("--uninstall", FAIL="*show-environment*")
    assert box.calls == []
    assert list(box.home.iterdir()) == []


def test_uninstall_goes_on_where_the_service_cannot_be_stopped(box: Box) -> None:
    box.run()
    box.run("--uninstall", FAIL="*disable*")
    assert list(box.home.iterdir()) == []


# ---- Staging ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("real")
def test_destdir_stages_and_touches_no_service(box: Box) -> None:
    stage = box.folder / "a stage"
    for slash in ("", "/"):
        said = box.run("--prefix", "/opt/llmq", "--socket-activated", DESTDIR=f"{stage}{slash}")
        assert f" {stage}/opt/llmq/lib/llmq/llmq.py\n" in said
    assert box.files == []
    assert box.calls_file.read_text() == ""
    assert (stage / "opt/llmq/lib/llmq/llmq.py").exists()
    staged = Path(f"{stage}{box.units}/llmq.service")
    assert str(stage) not in staged.read_text()
    assert '"/opt/llmq/lib/llmq" serve' in staged.read_text()
    assert str(stage) not in (stage / "opt/llmq/bin/llmq").read_text()
    library = (stage / "opt/llmq").rename(box.folder / "unpacked") / "lib/llmq"
    os.utime(library / "llmq.py", (0, 0))  # as packages do
    assert str(stage).encode() not in (library / f"__pycache__/llmq.{TAG}.pyc").read_bytes()
    assert not compiled([sys.executable, "-I", str(library)])
    library.parent.parent.rename(stage / "opt/llmq")
    box.run("--prefix", "/opt/llmq", "--uninstall", DESTDIR=str(stage))
    assert list(stage.iterdir()) == []
    assert box.calls_file.read_text() == ""


# ---- macOS: stubs are all that it was tried with ----------------------------------------------

AGENT = "Library/LaunchAgents/local.llmq.plist"


def test_mac_gets_a_launch_agent(box: Box) -> None:
    box.mac()
    box.run(FAIL="launchctl print*")
    assert box.files == sorted([*PROGRAM, AGENT])
    with (box.home / AGENT).open("rb") as file:
        agent = plistlib.load(file)
    python = os.path.realpath(sys.executable)
    assert agent["ProgramArguments"] == [python, "-I", "-u", str(box.library), "serve"]
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] > build_settings({}).server.drain_timeout
    domain = f"gui/{os.getuid()}"
    bootout = f"launchctl bootout {domain}/local.llmq"
    bootstrap = f"launchctl bootstrap {domain} {box.home}/{AGENT}"
    assert box.calls == [bootout, bootstrap]
    box.run()
    assert box.calls == [f"launchctl print {domain}/local.llmq"]
    (box.home / "Library/Logs").mkdir()
    (box.home / "Library/Logs/llmq.log").write_text("")  # by launchd
    box.run("--uninstall")
    assert box.calls == [bootout]
    assert list(box.home.iterdir()) == []


def test_mac_waits_for_the_old_one_to_end(box: Box) -> None:
    box.mac()
    said = box.run(code=1, FAIL="launchctl bootstrap*")
    assert "Library/Logs/llmq.log" in said
    assert [call.split()[0] for call in box.calls].count("sleep") == 4
    box.run("--uninstall")
    box.run(FAIL_ONCE="launchctl bootstrap*")
    assert [call.split()[1] for call in box.calls] == ["bootout", "bootstrap", "1", "bootstrap"]


def test_mac_has_no_socket_activation(box: Box) -> None:
    box.mac()
    assert "needs systemd" in box.run("--socket-activated", code=2)


def test_mac_tray_is_a_command(box: Box) -> None:
    box.mac()
    box.tray()
    box.run("--tray", "--no-start")
    assert box.calls == []
    assert ".local/bin/llmq-tray" in box.files
    assert not [name for name in box.files if name.endswith(".desktop")]


# ---- The script itself -----------------------------------------------------------------------


def test_shellcheck_has_nothing_against_it() -> None:
    command = [require_command("shellcheck"), "-s", "sh", str(ROOT / "install.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_is_short_and_fetches_nothing() -> None:
    text = (ROOT / "install.sh").read_text()
    assert len(text.splitlines()) <= 320
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"\b(curl|wget|git|sudo)\b", text)
