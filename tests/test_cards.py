"""Graphics memory: what tools and files tell of it, when they are asked, and where it is shown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import llmq
from llmq import Card, VideoMemory
from tests.derived import build_settings
from tests.fake_ollama import told, turns
from tests.fakes import Answer, FakeBackend, ask, chat, eventually, running
from tests.test_cli import command

GIB = 2**30
READ_AMD = llmq.read_amd
CARD = Card("NVIDIA GeForce RTX 4090", 24564, 1042, 3)
PRINTED = "NVIDIA GeForce RTX 4090, 24564, 1042, 3\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\n"
MISMATCH += "NVML library version: 535.183\n"
NO_DEVICES = "No devices were found\n"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards of the machine that runs the tests are none of theirs."""
    monkeypatch.setattr(llmq, "read_amd", list)


class Tool:
    """A command in place of nvidia-smi (or sysctl), which notes each time that it is called."""

    def __init__(self, folder: Path, name: str = "nvidia-smi") -> None:
        self.path, self.said = folder / name, folder / "said"
        self.notes = folder / "called"
        self.notes.touch()
        self.says(PRINTED)

    def says(self, text: str | bytes, code: int = 0) -> None:
        """What it prints from now on, and how it ends."""
        self.said.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.runs(f"cat {self.said}\nexit {code}\n")

    def runs(self, script: str) -> None:
        draft = self.path.with_suffix(".new")
        draft.write_text(f'#!/bin/sh\necho "$@" >> {self.notes}\n{script}', encoding="utf-8")
        draft.chmod(0o755)
        draft.replace(self.path)  # never open for writing while it is run

    @property
    def called(self) -> list[str]:
        """What it was called with, each time."""
        return self.notes.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path)


async def look(tool: Tool) -> tuple[str, list[Card], str | None]:
    return await llmq.read_cards(str(tool.path))


# ---- NVIDIA's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        (PRINTED, [CARD]),
        (
            "NVIDIA GeForce RTX 3090, 24576, 18231, 97\nTesla P40, 23040, 137, 0\n",
            [
                Card("NVIDIA GeForce RTX 3090", 24576, 18231, 97),
                Card("Tesla P40", 23040, 137, 0),
            ],
        ),
        ("GeForce GT 710, 1999, 312, [Not Supported]\n", [Card("GeForce GT 710", 1999, 312)]),
        ("NVIDIA A100-SXM4-40GB, 40960, 39, [N/A]\n", [Card("NVIDIA A100-SXM4-40GB", 40960, 39)]),
        ("Quadro K620, 2000, [Unknown Error], 1\n", [Card("Quadro K620", 2000, None, 1)]),
        ("NVIDIA GB10, [N/A], [N/A], 0\n", []),  # it shares the box's memory
        ("NVIDIA GB10, [N/A], [N/A], 0\n" + PRINTED, [CARD]),
        ("Graphics Device, rev. A1, 8192, 5, 0\n", [Card("Graphics Device, rev. A1", 8192, 5, 0)]),
        (PRINTED.replace("\n", "\r\n"), [CARD]),
        (PRINTED + "\n\n", [CARD]),
        ("", []),
    ],
    ids=[
        "one card",
        "two cards",
        "use not supported",
        "use not told",
        "used memory not told",
        "memory of its own not told",
        "one of two not told",
        "a comma in a name",
        "lines as on Windows",
        "empty lines",
        "nothing",
    ],
)
def test_cards_are_those_that_nvidia_smi_prints(text: str, cards: list[Card]) -> None:
    assert llmq.parse_nvidia(text) == cards


@pytest.mark.parametrize(
    "text",
    [
        NO_DRIVER,
        MISMATCH,
        NO_DEVICES,
        "24564, 1042, 3\n",
        "{}",
        "\x1b[2J\x00\n",
        PRINTED + "WARNING: infoROM is corrupted at gpu 0000:01:00.0\n",
    ],
)
def test_other_words_are_no_cards(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        llmq.parse_nvidia(text)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) <= 200


def test_names_of_cards_are_printable() -> None:
    (card,) = llmq.parse_nvidia("\x1b[31mRTX\x07, 10, 1, 0\n")
    assert card.name.isprintable()


async def test_nvidia_smi_is_asked_once_for_what_is_shown(tool: Tool) -> None:
    assert await look(tool) == ("nvidia", [CARD], None)
    wanted = "--query-gpu=name,memory.total,memory.used,utilization.gpu"
    assert tool.called == [f"{wanted} --format=csv,noheader,nounits"]


async def test_nvidia_smi_is_found_on_the_path(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tool.path.parent}:{os.environ['PATH']}")
    assert await llmq.read_cards(llmq.RouterSettings().nvidia_smi) == ("nvidia", [CARD], None)


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        (NO_DRIVER, 9, NO_DRIVER.strip()),
        (MISMATCH, 18, "Failed to initialize NVML: Driver/library version mismatch"),
        (NO_DEVICES, 6, "No devices were found"),
        (NO_DEVICES, 0, "No devices were found"),
        ("", 1, "failed"),
        ("<html>not at all</html>", 0, "<html>not at all</html>"),
        (b"\xff\xfe\x00N\x00V", 0, "N"),
        ("9" * 5000 + ", " * 3 + "9" * 5000, 0, ""),
    ],
    ids=["no driver", "mismatch", "none found", "none, good", "silent", "garbage", "bytes", "long"],
)
async def test_tool_that_fails_is_told_in_one_short_line(
    tool: Tool, text: str | bytes, code: int, told: str
) -> None:
    tool.says(text, code)
    maker, cards, error = await look(tool)
    assert (maker, cards) == ("nvidia", [])
    assert error
    assert told in error
    assert error.isprintable()
    assert len(error) <= 300


async def test_name_of_a_card_that_is_not_utf8_is_shown_as_far_as_it_can(tool: Tool) -> None:
    tool.says(b"RTX \xb5 4090, 24564, 1042, 3\n")
    _, (card,), error = await look(tool)
    assert (card[1:], error) == (CARD[1:], None)
    assert card.name.startswith("RTX ")
    assert card.name.endswith(" 4090")


async def test_no_such_command_is_no_failure(tmp_path: Path) -> None:
    assert await llmq.read_cards(str(tmp_path / "nvidia-smi")) == ("none", [], None)
    (tmp_path / "notes").write_text("no program")
    assert await llmq.read_cards(str(tmp_path / "notes")) == ("none", [], None)


async def test_command_that_is_no_program_is_told(tool: Tool) -> None:
    tool.path.write_bytes(b"\x7fELF, but not really")
    maker, cards, error = await look(tool)
    assert (maker, cards) == ("nvidia", [])
    assert error


@pytest.fixture
def hanging(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Has the tool hang, as with a driver that does; itself, or in a process that it started."""
    fifo, child = tool.path.with_name("fifo"), tool.path.with_name("child")
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)  # so that who reads it waits until this is closed
    monkeypatch.setattr(llmq, "TOOL_SECONDS", 0.1)

    def hang(deep: bool) -> None:
        tool.runs(f"cat {fifo} & echo $! > {child}; wait" if deep else f"exec cat {fifo}")

    yield hang
    os.close(held)
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(child.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("deep", [False, True], ids=["itself", "its child"])
async def test_tool_that_hangs_is_ended_and_told(
    tool: Tool, hanging: Callable[[bool], None], deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = asyncio.create_subprocess_exec

    async def starting(*argv: Any, **options: Any) -> Any:
        started.append(await start(*argv, **options))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", starting)
    monkeypatch.setattr(llmq, "KILL_SECONDS", 0.5)
    hanging(deep)
    before = set(os.listdir("/dev/fd"))
    told = await look(tool)
    await turns()
    left = set(os.listdir("/dev/fd")) - before
    (process,) = started
    process._transport.close()
    assert told == ("nvidia", [], f"{tool.path} does not answer")
    assert process.returncode == -signal.SIGKILL
    assert not left, "a pipe is left open at each look"


# ---- AMD's -------------------------------------------------------------------------------------


def make_card(root: Path, number: int, **files: str) -> Path:
    """A card as the kernel shows it, with the connectors and the other node that it has."""
    device = root / f"pci{number}"
    device.mkdir(parents=True)
    for name, text in files.items():
        (device / name).write_text(text)
    drm = root / "drm"
    for name in (f"card{number}", f"card{number}-DP-1", f"renderD{128 + number}"):
        (drm / name).mkdir(parents=True)
    (drm / f"card{number}" / "device").symlink_to(device)
    (drm / f"renderD{128 + number}" / "device").symlink_to(device)
    (drm / f"card{number}-DP-1" / "device").symlink_to(drm / f"card{number}")
    (drm / "version").write_text("drm 1.1.0 20060810\n")
    return device


def amd(total: int, used: int = 0, busy: int = 0) -> dict[str, str]:
    """The files of amdgpu."""
    facts = {"mem_info_vram_total": total, "mem_info_vram_used": used, "gpu_busy_percent": busy}
    return {name: f"{number}\n" for name, number in facts.items()}


def test_amds_cards_are_told_by_files_each_once(tmp_path: Path) -> None:
    make_card(tmp_path, 1, **amd(17163091968, 310767616, 12))
    one = Card("AMD card1", 16368, 296, 12)
    assert READ_AMD(str(tmp_path / "drm")) == [one]
    make_card(tmp_path, 2, **amd(25753026560, 0, 0))
    assert READ_AMD(str(tmp_path / "drm")) == [one, Card("AMD card2", 24560, 0, 0)]


def test_integrated_graphics_without_memory_of_its_own_is_no_card(tmp_path: Path) -> None:
    make_card(tmp_path, 0, vendor="0x8086\n")  # Intel's driver has none of these files
    assert READ_AMD(str(tmp_path / "drm")) == []
    make_card(tmp_path, 1, **amd(17163091968))
    assert [card.name for card in READ_AMD(str(tmp_path / "drm"))] == ["AMD card1"]


@pytest.mark.parametrize("odd", ["", "\n", "lots\n", "-1\n", "0x10\n", "1.5\n", "9" * 100])
def test_files_that_tell_nothing_are_as_if_they_were_not_there(tmp_path: Path, odd: str) -> None:
    facts = amd(17163091968)
    make_card(tmp_path, 0, **{**facts, "mem_info_vram_used": odd, "gpu_busy_percent": odd})
    make_card(tmp_path, 1, **{**facts, "mem_info_vram_total": odd[:64]})
    first, *others = READ_AMD(str(tmp_path / "drm"))
    if odd[:2] not in ("99", "-1"):
        assert first == Card("AMD card0", 16368)
    assert not [card for card in others if odd[:1] not in ("9", "-")]


def test_files_that_cannot_be_read_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    device = make_card(tmp_path, 0, **amd(17163091968, 7, 7))
    (device / "mem_info_vram_used").unlink()
    (device / "mem_info_vram_used").mkdir()  # root may read any file, but no folder
    (device / "gpu_busy_percent").write_bytes(b"\xff\n")
    assert READ_AMD(str(tmp_path / "drm")) == [Card("AMD card0", 16368)]
    (device / "mem_info_vram_total").unlink()
    (device / "mem_info_vram_total").symlink_to(device / "mem_info_vram_total")
    assert READ_AMD(str(tmp_path / "drm")) == []


def test_box_without_such_files_has_no_cards(tmp_path: Path) -> None:
    assert READ_AMD(str(tmp_path / "nowhere")) == []
    assert llmq.SYSFS == "/sys/class/drm"


async def test_amds_cards_are_told_where_nvidias_tool_is_not_or_fails(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_card(tmp_path, 0, **amd(17163091968))
    cards = READ_AMD(str(tmp_path / "drm"))
    monkeypatch.setattr(llmq, "read_amd", lambda: cards)
    assert await llmq.read_cards(str(tmp_path / "nowhere")) == ("amd", cards, None)
    tool.says(NO_DRIVER, 9)
    assert await look(tool) == ("amd", cards, None)
    tool.says(PRINTED)
    assert await look(tool) == ("nvidia", [CARD], None)


# ---- Apple's -----------------------------------------------------------------------------------


def sysctl(memory: int, limit: int | None, brand: str) -> str:
    """What it prints; where a name is not known it says so, and fails in the end."""
    told = f"iogpu.wired_limit_mb: {limit}\n"
    told = "sysctl: unknown oid 'iogpu.wired_limit_mb'\n" if limit is None else told
    return f"hw.memsize: {memory}\n{told}machdep.cpu.brand_string: {brand}\n"


M1 = sysctl(16 * GIB, 0, "Apple M1")
INTEL = sysctl(32 * GIB, None, "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz")


@pytest.mark.parametrize(
    ("text", "name", "total"),
    [
        (M1, "Apple M1", 10922),
        (sysctl(36 * GIB, 0, "Apple M3 Pro"), "Apple M3 Pro", 24576),
        (sysctl(64 * GIB, 0, "Apple M2 Max"), "Apple M2 Max", 49152),
        (sysctl(64 * GIB, 57344, "Apple M2 Max"), "Apple M2 Max", 57344),
        (f"hw.memsize: {16 * GIB}\n", "Apple", 10922),
    ],
    ids=["M1", "36 GB", "64 GB", "a limit that is set", "no name"],
)
def test_apples_memory_is_shared_as_its_system_would(text: str, name: str, total: int) -> None:
    assert llmq.parse_apple(text) == [Card(name, total)]


def test_a_mac_of_intel_has_no_card_that_runners_use() -> None:
    assert llmq.parse_apple(INTEL) == []


@pytest.mark.parametrize("text", ["", "hw.memsize:\n", "hw.memsize: lots\n", "\x00", "sysctl: no"])
def test_sysctl_that_tells_no_memory_is_a_failure(text: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        llmq.parse_apple(text)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """A Mac, whose sysctl is this."""
    monkeypatch.setattr(llmq, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Tool(tmp_path, "sysctl")


async def test_sysctl_is_asked_on_a_mac_and_nothing_else(mac: Tool) -> None:
    mac.says(M1)
    elsewhere = mac.path.parent / "elsewhere"
    elsewhere.mkdir()
    other = Tool(elsewhere)
    assert await look(other) == ("apple", [Card("Apple M1", 10922)], None)
    assert mac.called == ["hw.memsize machdep.cpu.brand_string iogpu.wired_limit_mb"]
    assert not other.called


async def test_mac_that_does_not_know_of_a_limit_is_no_failure(mac: Tool) -> None:
    """Older systems and those of Intel: sysctl tells the rest, and ends with 1."""
    mac.says(M1.replace("iogpu", "#"), 1)
    _, (card,), error = await llmq.read_cards("nvidia-smi")
    assert (card.total, error) == (10922, None)


async def test_mac_without_sysctl_is_told(mac: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    mac.path.unlink()
    monkeypatch.setenv("PATH", str(mac.path.parent))
    _, cards, error = await llmq.read_cards("nvidia-smi")
    assert not cards
    assert error


# ---- When they are looked at -------------------------------------------------------------------


class Clock:
    """In place of the module `time`: as late as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(llmq, "time", clock)
    return clock


def cards_of(fleet: llmq.Fleet | None = None, **settings: Any) -> llmq.Cards:
    values = {name.replace("__", "."): value for name, value in settings.items()}
    return llmq.Cards(build_settings(values), fleet or llmq.Fleet())


async def test_cards_are_looked_at_once_in_each_interval_while_they_are_wanted(
    tool: Tool, clock: Clock
) -> None:
    cards = cards_of(router__nvidia_smi=str(tool.path), router__gpu_interval=10)

    async def calls_within(seconds: float) -> int:
        """How often it is called in that time, with a step in each second."""
        before = len(tool.called)
        for _ in range(int(seconds)):
            clock.now += 1
            await cards.step()
        return len(tool.called) - before

    assert await calls_within(50) == 0, "nobody has asked"
    cards.want()
    assert await calls_within(1) == 1
    assert await calls_within(9) == 0
    assert await calls_within(1) == 1
    cards.settings.router = llmq.RouterSettings(gpu_interval=2, nvidia_smi=str(tool.path))
    assert await calls_within(10) == 5
    clock.now += llmq.CARDS_WANTED
    assert await calls_within(50) == 0, "nobody has asked for long"
    cards.settings.routes = {"unknown": ("m",)}
    assert await calls_within(4) == 2
    assert cards.cards == [CARD]


async def test_failing_tool_is_logged_once_and_again_when_it_had_worked(
    tool: Tool, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    cards = cards_of(router__nvidia_smi=str(tool.path), routes={"unknown": ["m"]})
    told = f"graphics memory: {NO_DRIVER.strip()}"

    async def looks(number: int) -> list[str]:
        """What is logged in so many looks."""
        caplog.clear()
        for _ in range(number):
            clock.now += 10
            await cards.step()
        return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]

    tool.says(NO_DRIVER, 9)
    assert await looks(5) == [told]
    assert (cards.cards, cards.error) == ([], NO_DRIVER.strip())
    tool.says(MISMATCH, 18)
    assert await looks(3) == [f"graphics memory: {MISMATCH.splitlines()[0]}"]
    tool.says(PRINTED)
    assert await looks(2) == []
    assert (cards.cards, cards.error) == ([CARD], None)
    tool.says(NO_DRIVER, 9)
    assert await looks(2) == [told]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One more for each time that the background asks whether the cards are due; which is often."""
    done: list[float] = []
    step = llmq.Cards.step

    async def counted(self: llmq.Cards) -> None:
        await step(self)
        done.append(self.looked)

    monkeypatch.setattr(llmq, "CARDS_SECONDS", 0.005)
    monkeypatch.setattr(llmq.Cards, "step", counted)
    return done


async def some(steps: list[float]) -> None:
    """Return when the background has asked some times more."""
    number = len(steps) + 5
    await eventually(lambda: len(steps) >= number)


async def hundreds(q: running, model: str) -> None:
    """Three hundred requests, some at a time, all of them served."""
    for _ in range(6):
        answers = await asyncio.gather(*[q.chat("hi", model=model) for _ in range(50)])
        assert {one.status for one in answers} == {200}


async def gpu(q: running) -> Any:
    return (await ask(q.port, "GET", "/v1/router/gpu")).json()


async def test_requests_cause_no_look_of_their_own(tool: Tool, steps: list[float]) -> None:
    settings: dict[str, Any] = {"router__nvidia_smi": str(tool.path), "router__gpu_interval": 3600}
    async with FakeBackend() as fake, running(fake.url, routes={"unknown": ["m"]}, **settings) as q:
        cards = q.gateway.chooser.cards
        await eventually(lambda: cards.cards)
        await hundreds(q, "auto")
        await some(steps)
        for _ in range(3):
            assert (await gpu(q))["available"]
        assert len(tool.called) == 1, "once in an interval"
        cards.looked -= 3600
        await eventually(lambda: len(tool.called) == 2)
        await hundreds(q, "auto")
        await some(steps)
        cards.looked -= 3600
        await eventually(lambda: cards.looked > 0 and len(tool.called) == 3)


async def test_nothing_is_looked_at_where_nothing_is_routed_and_nobody_asks(
    tool: Tool, steps: list[float]
) -> None:
    settings: dict[str, Any] = {"router__nvidia_smi": str(tool.path), "router__gpu_interval": 3600}
    async with FakeBackend() as fake, running(fake.url, **settings) as q:
        cards = q.gateway.chooser.cards
        await hundreds(q, "m")
        await q.status()
        await some(steps)
        assert not tool.called
        assert (await gpu(q))["gpus"][0]["name"] == CARD.name
        assert len(tool.called) == 1
        cards.looked -= 3600  # an interval later
        await eventually(lambda: len(tool.called) == 2 and cards.flight is None)
        cards.looked, cards.wanted = cards.looked - 3600, cards.wanted - llmq.CARDS_WANTED
        await some(steps)
        await hundreds(q, "m")
        await some(steps)
        assert len(tool.called) == 2, "nobody has asked for long"
        await gpu(q)
        assert len(tool.called) == 3


async def test_all_who_ask_at_once_are_told_the_cards(tool: Tool) -> None:
    """Also those who come while somebody else's question is on its way to the tool."""
    async with FakeBackend() as fake, running(fake.url, router__nvidia_smi=str(tool.path)) as q:
        told = await asyncio.gather(*[gpu(q) for _ in range(5)])
        assert [one["available"] for one in told] == [True] * 5
        assert len(tool.called) == 1


async def test_tool_that_hangs_holds_up_no_request(
    tool: Tool, hanging: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "TOOL_SECONDS", 3600.0)
    monkeypatch.setattr(llmq, "CARDS_SECONDS", 0.005)
    hanging(False)
    settings: dict[str, Any] = {"router__nvidia_smi": str(tool.path)}
    async with FakeBackend() as fake, running(fake.url, routes={"unknown": ["m"]}, **settings) as q:
        await eventually(lambda: tool.called)
        assert (await q.chat("hi", model="auto")).content == "hi"
        assert (await q.status())["devices"][0]["vram"] is None


# ---- The memory of a device --------------------------------------------------------------------

GPU = {"name": "a", "size": 12 * GIB, "size_vram": 12 * GIB}
SPLIT = {"name": "b", "size": 8 * GIB, "size_vram": 6 * GIB}


def backend(
    fleet: llmq.Fleet, name: str, device: str = llmq.LOCAL, *loaded: dict[str, Any]
) -> llmq.Backend:
    """An Ollama which tells that these are loaded, as rows of its /api/ps."""
    row = llmq.BackendSettings(url=f"http://{name}:1", kind="ollama")
    made = fleet.add(name, row, device, 1)
    tell(made, *loaded)
    return made


def tell(one: llmq.Backend, *loaded: dict[str, Any]) -> None:
    names = tuple(str(row["name"]) for row in loaded)
    one.succeeded(0.0, llmq.Report("ollama", (), ("a", "b"), names, 0.0, running=loaded), 10.0)


def test_memory_of_this_box_is_what_its_cards_tell() -> None:
    cards = cards_of()
    assert cards.memory_of("local") is None
    cards.cards = [Card("x", 24576, 4096)]
    assert cards.memory_of("local") == VideoMemory(24.0, 20.0, 1.0)
    cards.cards += [Card("y", 8192, 1024)]
    assert cards.memory_of("local") == VideoMemory(32.0, 27.0, 1.0), "of both cards"


def test_memory_where_a_card_does_not_tell_what_is_used_is_less_what_is_loaded() -> None:
    fleet = llmq.Fleet()
    cards = cards_of(fleet)
    cards.cards = [Card("x", 24576, 4096), Card("y", 8192)]
    assert cards.memory_of("local") == VideoMemory(32.0, 32.0, 1.0)
    backend(fleet, "one", "local", GPU)
    backend(fleet, "two", "local", SPLIT)
    assert cards.memory_of("local") == VideoMemory(32.0, 14.0, 1.0)


def test_memory_that_is_configured_counts_in_place_of_cards() -> None:
    fleet = llmq.Fleet()
    row = {"vram_gb": 20, "vram_reserve_gb": 2.5}
    cards = cards_of(fleet, devices={"local": row})
    cards.cards = [Card("x", 24576, 4096)]
    one = backend(fleet, "one")
    assert cards.memory_of("local") == VideoMemory(20.0, 20.0, 2.5)
    tell(one, SPLIT)
    assert cards.memory_of("local") == VideoMemory(20.0, 14.0, 2.5)
    tell(one, GPU, SPLIT)
    assert cards.memory_of("local") == VideoMemory(20.0, 2.0, 2.5)
    tell(one)
    assert cards.memory_of("local") == VideoMemory(20.0, 20.0, 2.5)


def test_reserve_may_be_said_of_what_cards_tell() -> None:
    cards = cards_of(devices={"local": {"vram_reserve_gb": 0}})
    cards.cards = [Card("x", 1024, 0)]
    assert cards.memory_of("local") == VideoMemory(1.0, 1.0, 0.0)


def test_memory_elsewhere_and_of_devices_with_a_name_is_only_as_configured() -> None:
    fleet = llmq.Fleet()
    cards = cards_of(fleet, devices={"gpu1": {"vram_gb": 12}, "box": {"slots": 2}})
    cards.cards = [Card("x", 24576, 4096)]
    backend(fleet, "one", "gpu1", SPLIT)
    backend(fleet, "two", "box", GPU)
    backend(fleet, "three", "gpu2", GPU)
    assert cards.memory_of("gpu1") == VideoMemory(12.0, 6.0, 1.0)
    for name in ("box", "gpu2", "nowhere"):
        assert cards.memory_of(name) is None


@pytest.mark.parametrize("odd", [None, "6", -1, 1.5e300, True, [], {}])
def test_odd_sizes_of_what_is_loaded_count_as_none(odd: Any) -> None:
    fleet = llmq.Fleet()
    cards = cards_of(fleet, devices={"local": {"vram_gb": 20}})
    backend(fleet, "one", "local", {**GPU, "size_vram": odd}, SPLIT)
    assert cards.memory_of("local") == VideoMemory(20.0, 14.0, 1.0)


@pytest.mark.parametrize(
    ("size", "there", "share"),
    [
        (8 * GIB, 6 * GIB, 75),
        (8 * GIB, 8 * GIB, 100),
        (8 * GIB, 0, 0),
        (1000, 999, 99),
        (8 * GIB, 9 * GIB, None),
        (0, 0, None),
        (8 * GIB, None, None),
        (None, 6 * GIB, None),
        (8 * GIB, -1, None),
        ("8", "6", None),
    ],
)
def test_share_on_the_gpu_is_in_whole_per_cent_where_it_is_told(
    size: Any, there: Any, share: int | None
) -> None:
    rows = [{"name": "A:latest", "size": size, "size_vram": there}]
    assert llmq.read_shares(rows) == ({} if share is None else {"a": share})


def test_share_of_a_model_is_as_it_was_last_told_at_each_backend() -> None:
    fleet = llmq.Fleet()
    one = backend(fleet, "one", "local", {**GPU, "size": 12 * GIB})
    other = backend(fleet, "other", "box", {**GPU, "size_vram": 3 * GIB})
    assert (one.gpu_shares, other.gpu_shares) == ({"a": 100}, {"a": 25})
    tell(one, {**GPU, "size_vram": 6 * GIB})  # loaded anew, with less room
    assert (one.gpu_shares, other.gpu_shares) == ({"a": 50}, {"a": 25})
    tell(one)
    assert one.gpu_shares == {}


# ---- Where it is shown -------------------------------------------------------------------------


class Loaded(FakeBackend):
    """An Ollama which tells so of what it has loaded."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        super().__init__(["a", "b", "c"], "ollama")
        self.probe_answers["/api/ps"] = 200, {"models": list(rows)}


class Shown:
    """llmq with two cards, a runner on this box, and one in a device with memory of its own."""

    def __init__(self, tool: Tool) -> None:
        tool.says("RTX 3090, 24576, 18432, 97\nTesla P40, 8192, 2048, [N/A]\n")
        self.stack = contextlib.AsyncExitStack()
        self.tool = str(tool.path)

    async def __aenter__(self) -> running:
        here = await self.stack.enter_async_context(Loaded(GPU, SPLIT))
        there = await self.stack.enter_async_context(
            Loaded({**SPLIT, "size_vram": 0}, {"name": "c", "size": 5, "size_vram": 5})
        )
        rows = {"here": {"url": here.url}, "there": {"url": there.url, "device": "gpu1"}}
        devices = {"gpu1": {"vram_gb": 12, "vram_reserve_gb": 0.5}}
        settings: dict[str, Any] = {"backends": rows, "devices": devices}
        settings["router__nvidia_smi"] = self.tool
        q = await self.stack.enter_async_context(running(**settings))
        await told(q)
        return q

    async def __aexit__(self, *failure: Any) -> None:
        await self.stack.__aexit__(*failure)


async def said(q: running, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints that asks this llmq."""
    assert await command(*words, "--url", q.base) == 0
    told = capsys.readouterr()
    assert not told.err
    return told.out


MEMORY = {
    "local": {"total_gb": 32.0, "free_gb": 12.0, "reserve_gb": 1.0},
    "gpu1": {"total_gb": 12.0, "free_gb": 12.0, "reserve_gb": 0.5},
}
GPUS = [
    {
        "name": "RTX 3090",
        "vramTotalMb": 24576,
        "vramUsedMb": 18432,
        "vramFreeMb": 6144,
        "utilizationPct": 97,
    },
    {
        "name": "Tesla P40",
        "vramTotalMb": 8192,
        "vramUsedMb": 2048,
        "vramFreeMb": 6144,
        "utilizationPct": None,
    },
]


async def test_cards_and_memory_are_told_by_the_route_and_by_the_command(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Shown(tool) as q:
        facts = await gpu(q)
        assert (facts["gpus"], facts["devices"]) == (GPUS, MEMORY)
        assert (facts["provider"], facts["available"], facts["error"]) == ("nvidia", True, None)
        told = json.loads(await said(q, capsys, "gpu", "--json"))
        assert {**told, "age_s": 0} == {**facts, "age_s": 0}
        head, one, other, empty, title, here, there = (await said(q, capsys, "gpu")).splitlines()
        assert head.split() == ["CARD", "MEMORY", "USED", "FREE", "BUSY"]
        assert re.split(r"\s{2,}", one) == [
            "RTX 3090",
            "24576 MiB",
            "18432 MiB",
            "6144 MiB",
            "97 %",
        ]
        assert re.split(r"\s{2,}", other) == ["Tesla P40", "8192 MiB", "2048 MiB", "6144 MiB", "-"]
        assert (empty, title.split()) == ("", ["DEVICE", "MEMORY", "FREE", "RESERVE"])
        assert re.split(r"\s{2,}", here) == ["local", "32.0 GiB", "12.0 GiB", "1.0 GiB"]
        assert re.split(r"\s{2,}", there) == ["gpu1", "12.0 GiB", "12.0 GiB", "0.5 GiB"]


async def test_memory_of_devices_and_split_models_are_in_the_snapshot(tool: Tool) -> None:
    async with Shown(tool) as q:
        before = await q.status()
        assert {one["name"]: one["vram"] for one in before["devices"]} == {**MEMORY, "local": None}
        await gpu(q)
        snapshot = await q.status()
        assert {one["name"]: one["vram"] for one in snapshot["devices"]} == MEMORY
        shares = {one["name"]: one["gpu_pct"] for one in snapshot["backends"]}
        assert shares == {"here": {"b": 75}, "there": {"b": 0}}, "only what is split"


async def test_split_models_are_marked_where_models_are_listed(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Shown(tool) as q:
        _, *rows = (await said(q, capsys, "models")).splitlines()
        listed = {tuple(row.split()[:2]): re.split(r"\s{2,}", row)[2] for row in rows}
        assert listed == {
            ("a", "here"): "yes",
            ("b", "here"): "75% GPU",
            ("c", "here"): "-",
            ("a", "there"): "-",
            ("b", "there"): "0% GPU",
            ("c", "there"): "yes",
        }
        told = json.loads(await said(q, capsys, "models", "--json"))
        shares = {(one["model"], one["backend"]): one["gpu_pct"] for one in told}
        assert shares == {
            **dict.fromkeys(listed),
            ("b", "here"): 75,
            ("b", "there"): 0,
        }
        rows = (await ask(q.port, "GET", "/v1/router/models")).json()["models"]
        told = {one["name"]: (one["loaded"], one["gpuPct"]) for one in rows}
        assert told == {"a": (True, 100), "b": (True, 0), "c": (True, 100)}, "where it is least"


async def test_split_models_are_marked_in_status(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Shown(tool) as q:
        table = await said(q, capsys, "status")
        assert re.search(r"^ here .* a, b \(75% on GPU\)  http", table, re.MULTILINE)
        assert re.search(r"^ there .* b \(0% on GPU\), c  http", table, re.MULTILINE)


async def test_command_says_why_there_is_no_card(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeBackend() as fake:
        missing = {"router__nvidia_smi": str(tool.path.with_name("nowhere"))}
        async with running(fake.url, **missing) as q:
            _, told, _, _, device = (await said(q, capsys, "gpu")).splitlines()
            assert told == "no card that tells its memory"
            assert re.split(r"\s{2,}", device) == ["local", "-", "-", "-"]
        tool.says(NO_DRIVER, 9)
        async with running(fake.url, router__nvidia_smi=str(tool.path)) as q:
            printed = await said(q, capsys, "gpu")
            assert NO_DRIVER.partition(".")[0] in printed
            facts: Answer = await ask(q.port, "GET", "/v1/router/status")
            assert facts.json()["status"] == "degraded"
            assert (await q.chat("hi")).status == 200


async def test_model_auto_goes_by_the_cards_that_are_told(tool: Tool) -> None:
    """The second of the row, as the first one would not fit into them."""
    tool.says("RTX, 8192, 1024, 0\n")
    rows = {"big": {"size_gb": 10}, "small": {"size_gb": 4}}
    settings: dict[str, Any] = {"models": rows, "routes": {"unknown": ["big", "small"]}}
    settings["router__require_gpu"] = True
    async with FakeBackend(["big", "small"], "ollama") as fake:
        async with running(fake.url, **settings, router__nvidia_smi=str(tool.path)) as q:
            await gpu(q)
            body = chat("hi", model="auto")
            answer = await ask(q.port, "POST", "/v1/chat/completions", json=body)
            assert answer.headers["x-llmq-model"] == "small"
