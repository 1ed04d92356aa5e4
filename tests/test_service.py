"""From settings to a running llmq: where it listens, what it shares, its log, a reload, the end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import FakeBackend, Process, Raw, ask, chat, eventually, http, run_llmq, running

CHAT = "/v1/chat/completions"
FORMAT = next(row for row in llmq.known_settings() if row.key == "log.format")
NOBODY = "http://127.0.0.1:9"  # where no backend listens


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture
def log() -> Iterator[Any]:
    """llmq's log as it was before, once the test has set it up its own way."""
    before = list(llmq.log.handlers), llmq.log.level, llmq.log.propagate
    flags = logging.logThreads, logging.logProcesses, logging.logMultiprocessing
    yield llmq.log
    llmq.log.handlers[:], llmq.log.propagate = before[0], before[2]
    llmq.log.setLevel(before[1])
    logging.logThreads, logging.logProcesses, logging.logMultiprocessing = flags


async def reread(q: running, **settings: Any) -> None:
    """Let these settings be what a reload reads, and reload."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    q.service.read = lambda: build_settings({**q.values, **values})
    q.service.reload()
    assert q.gateway.config_error is None


# ---- Where it listens ------------------------------------------------------------------------


async def test_host_is_where_it_listens() -> None:
    async with running(NOBODY, server__host="127.0.0.2") as q:
        with pytest.raises(OSError, match=r"."):
            await asyncio.open_connection("127.0.0.1", q.port)
        _, writer = await asyncio.open_connection("127.0.0.2", q.port)
        writer.close()
        assert q.service.addresses == [f"http://127.0.0.2:{q.port}"]


async def test_port_is_where_it_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with running(NOBODY, server__port=port) as q:
        assert q.port == port
        assert (await ask(port, "GET", "/health")).status == 200


async def test_it_listens_on_loopback_of_both_kinds() -> None:
    async with running(NOBODY) as q:
        addresses = [f"http://127.0.0.1:{q.port}"]
        if has_ipv6():
            addresses.append(f"http://[::1]:{q.port}")
            _, writer = await asyncio.open_connection("::1", q.port)
            writer.close()
        assert q.service.addresses == addresses
        for server in q.service._servers[0]._servers:
            for sock in server.sockets:
                assert ipaddress.ip_address(sock.getsockname()[0]).is_loopback


async def test_ipv6_address_is_shown_in_brackets() -> None:
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    async with running(NOBODY, server__host="::1") as q:
        assert q.service.addresses == [f"http://[::1]:{q.port}"]


async def test_port_that_is_taken_is_told() -> None:
    async with running(NOBODY) as q:
        values = {"server.port": q.port, "backends": [NOBODY]}
        second = llmq.Service(build_settings(values))
        with pytest.raises(llmq.StartError, match=f"127.0.0.1:{q.port}"):
            await second.start()
        await second.stop()
        assert (await ask(q.port, "GET", "/health")).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "box.lan"])
async def test_listening_for_the_network_needs_leave_and_then_works(host: str) -> None:
    service = llmq.Service(build_settings({"server.host": host, "server.port": 0}))
    with pytest.raises(llmq.ConfigError, match="--allow-anonymous-lan"):
        await service.start()
    if host == "0.0.0.0":
        async with running(NOBODY, server__host=host, server__allow_anonymous_lan=True) as q:
            for name, status in (("box", 200), ("my.internal", 200), ("evil.example", 403)):
                answer = await ask(q.port, "GET", "/health", headers={"Host": name})
                assert answer.status == status, name


async def test_names_without_a_dot_are_not_its_own_on_loopback() -> None:
    async with running(NOBODY) as q:
        for name, status in (("box", 403), ("my.internal", 200), ("localhost", 200)):
            answer = await ask(q.port, "GET", "/health", headers={"Host": name})
            assert answer.status == status, name


# ---- Devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "device", "name"),
    [
        ("http://127.0.0.1:1", "", "local"),
        ("http://127.0.0.2:1", "", "local"),
        ("http://localhost:1", "", "local"),
        ("http://LOCALHOST:1", "", "local"),
        ("http://[::1]:1", "", "local"),
        (f"http://{socket.gethostname()}:1", "", "local"),
        (f"http://{socket.gethostname().upper()}.local:1", "", "local"),
        ("http://192.0.2.1:1", "", "192.0.2.1"),
        ("http://[2001:db8::1]:1", "", "2001:db8::1"),
        ("http://box.example:1", "", "box.example"),
        ("http://BOX.example:1", "", "box.example"),
        ("http://127.0.0.1:1", "gpu1", "gpu1"),
        ("http://box.example:1", "local", "local"),
    ],
)
def test_all_names_of_this_box_are_one_device(url: str, device: str, name: str) -> None:
    assert llmq.device_name(llmq.BackendSettings(url=url, device=device)) == name


def test_own_address_on_the_network_is_this_box() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; the kernel picks an own address
        except OSError:
            pytest.skip("no network here")
        own = probe.getsockname()[0]
    assert llmq.is_this_box(own)


async def test_slots_of_a_device_are_the_most_at_once_there() -> None:
    async with FakeBackend(auto=False) as one, FakeBackend(auto=False) as two:
        backends = {
            "a": {"url": one.url, "device": "gpu"},
            "b": {"url": two.url, "device": "gpu"},
        }
        async with running(backends=backends, devices={"gpu": {"slots": 3}}) as q:
            known = q.gateway.fleet.backends.values()
            await eventually(lambda: all(backend.usable for backend in known))
            tasks = [asyncio.ensure_future(q.chat(str(n))) for n in range(5)]
            await eventually(lambda: one.active + two.active == 3)
            assert len(q.gateway.scheduler.waiting) == 2
            for _ in range(5):
                fake = one if one.has_arrived() else two
                await (await fake.arrived()).answer("done")
            assert {(await task).content for task in tasks} == {"done"}


# ---- The log ---------------------------------------------------------------------------------


async def test_log_as_json_has_one_object_with_these_facts_a_line() -> None:
    async with FakeBackend() as fake:
        flags = ("--port", "0", "--backend", f"box={fake.url}", FORMAT.flag, "json")
        async with Process(*flags) as p:
            headers = {"X-User-ID": "alice", "X-Request-Id": "mine"}
            path = CHAT + "?key=sk-secret"
            answer = await ask(p.port, "POST", path, json=chat("tell nobody"), headers=headers)
            assert answer.status == 200
            bad = await ask(p.port, "POST", path, body=b"tell nobody")
            assert bad.status == 400
            await p.line(r'"outcome": ?"bad_request"')
            assert await p.ended() == 0
            output = p.output
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert {line["level"] for line in found} == {"info"}
    assert all(line["time"] > 1_700_000_000 for line in found)
    messages = [line["message"] for line in found if "message" in line]
    assert "backend box is up" in messages
    served, refused = [line for line in found if "outcome" in line]
    facts = "id request_id client class model route backend wait_s first_s total_s tokens"
    facts += " tokens_in tokens_per_s error cut cache"
    assert set(served) == {*facts.split(), "time", "level", "status", "outcome"}
    assert set(refused) == set(served)
    assert (served["client"], served["request_id"]) == ("user:alice", "mine")
    assert (served["route"], served["outcome"], refused["status"]) == (CHAT, "done", 400)
    assert served["error"] is None
    assert "JSON" in refused["error"]
    assert served["id"] == answer.headers["x-llmq-id"]
    assert "tell nobody" not in output
    assert "sk-secret" not in output


async def test_log_as_text_has_one_line_for_a_request() -> None:
    async with FakeBackend() as fake:
        async with Process("--port", "0", "--backend", fake.url) as p:
            await ask(p.port, "POST", CHAT + "?key=sk-secret", json=chat("tell nobody"))
            found = await p.line(r"(?m)^\d{4}-\d\d-\d\d .* INFO (200 .*)$")
            assert found.group(1).startswith(f"200 {CHAT} id=")
            assert await p.ended() == 0
            assert p.output.count("outcome=done") == 1
            assert "tell nobody" not in p.output
            assert "sk-secret" not in p.output


@pytest.mark.parametrize("level", llmq.LEVELS)
def test_log_level_is_the_least_that_is_logged(
    level: str, log: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    llmq.set_up_log(llmq.LogSettings(level=level))
    for word in llmq.LEVELS:
        log.log(getattr(logging, word.upper()), "said at %s", word)
    said = [line.rsplit(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == list(llmq.LEVELS[llmq.LEVELS.index(level) :])


def test_log_that_nobody_reads_is_lost_and_counted_not_waited_for(
    log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        llmq.set_up_log(llmq.LogSettings())
        os.set_blocking(reading, False)
        line, number, said = "said ".ljust(1000, "x"), 0, b""
        while number < 200:  # a pipe holds 64 KiB
            number += 1
            log.info("%s %d", line, number)
        while piece := reader.read(1 << 20):
            said += piece
        log.info("heard")
        said += reader.read(1 << 20)
        kept = [one for one in said.decode().splitlines() if line in one]
        assert 20 < len(kept) < number
        assert [int(one.split()[-1]) for one in kept] == list(range(1, len(kept) + 1))
        told, last = said.decode().splitlines()[-2:]
        assert told.endswith(
            f"WARNING {number - len(kept)} lines of the log were lost: nobody took them"
        )
        assert last.endswith("INFO heard")


@pytest.mark.parametrize("gone", ["closed", "unread", "full"])
def test_log_that_cannot_be_written_is_no_failure(
    gone: str, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    full = gone == "full"
    if full:
        os.close(writing)
        writing = os.open("/dev/full", os.O_WRONLY)
    os.close(reading)
    stderr = open(writing, "w")  # noqa: SIM115 - it is gone before it is closed
    if gone == "closed":
        stderr.close()
    monkeypatch.setattr("sys.stderr", stderr)
    llmq.set_up_log(llmq.LogSettings())
    for _ in range(3):
        log.info("said to nobody")
    log.info(llmq.Lines([]))
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        stderr.close()


def test_failure_in_the_json_log_is_one_line_with_its_traceback(
    log: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    llmq.set_up_log(llmq.LogSettings(format="json"))
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("went %s", "wrong")
    (line,) = capsys.readouterr().err.splitlines()
    facts = json.loads(line)
    assert facts["level"] == "error"
    assert facts["message"].startswith("went wrong\nTraceback")
    assert facts["message"].endswith("ValueError: boom")


# ---- A reload --------------------------------------------------------------------------------


async def test_reload_says_which_changes_need_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmq")
    async with running(NOBODY) as q:
        await reread(q, server__host="127.0.0.2", server__port=1, queue__max_depth=7)
        said = [record.getMessage() for record in caplog.records]
        assert "reload: server.host needs restart" in said
        assert "reload: server.port needs restart" in said
        assert not [line for line in said if "max_depth" in line]
        assert (await q.status())["queue"]["full_at"] == 7


async def test_reload_holds_for_all_that_is_decided_later() -> None:
    async with FakeBackend(models=["a", "b"]) as fake, running(fake.url) as q:
        assert (await q.chat("x", model=None)).json()["model"] == "a"
        await reread(
            q,
            upstream__model="b",
            server__max_body=500,
            server__allowed_hosts=["my.box"],
            server__cors_origins=["https://my.page"],
            devices={"local": {"slots": 3}},
        )
        assert (await q.chat("x", model=None)).json()["model"] == "b"
        assert (await q.chat("x" * 600)).status == 413
        answer = await ask(q.port, "GET", "/health", headers={"Host": "my.box"})
        assert answer.status == 200
        origin = {"Origin": "https://my.page"}
        answer = await ask(q.port, "GET", "/health", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://my.page"
        assert (await q.status())["devices"][0]["slots"] == 3


async def test_reload_changes_key_slots_and_kind_of_a_backend() -> None:
    async with FakeBackend() as fake:
        box = {"url": fake.url, "key": "old", "slots": 1}
        async with running(backends={"box": box}, queue__slots=4) as q:
            await q.chat("x")
            more = {"url": fake.url, "key": "new", "slots": 2, "kind": "vllm"}
            await reread(q, backends={"box": more})
            await q.chat("x")
            keys = [request.headers["authorization"] for request in fake.requests]
            assert keys == ["Bearer old", "Bearer new"]
            (row,) = (await q.status())["backends"]
            assert (row["slots"], row["kind"]) == (2, "vllm")


async def test_reload_moves_a_backend_to_another_address_or_device() -> None:
    async with FakeBackend(models=["a"]) as one, FakeBackend(models=["b"]) as two:
        async with running(backends={"box": {"url": one.url}}) as q:
            assert (await q.chat("x", model="a")).status == 200
            await reread(q, backends={"box": {"url": two.url}})
            assert (await q.chat("x", model="b")).status == 200
            assert (await q.chat("x", model="a")).status == 404
            await reread(q, backends={"box": {"url": two.url, "device": "gpu"}})
            assert (await q.chat("x", model="b")).status == 200
            snapshot = await q.status()
            assert [row["name"] for row in snapshot["devices"]] == ["gpu"]


@pytest.mark.usefixtures("log")
async def test_reload_changes_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    llmq.set_up_log(llmq.LogSettings())
    async with FakeBackend() as fake, running(fake.url) as q:
        await reread(q, log__format="json")
        capsys.readouterr()
        await q.chat("x")
        q.gateway.journal.flush()
        *_, line = capsys.readouterr().err.splitlines()
        assert json.loads(line)["outcome"] == "done"
        await reread(q, log__level="error")
        capsys.readouterr()
        await q.chat("x")
        q.gateway.journal.flush()
        assert not capsys.readouterr().err


async def test_reload_without_a_source_changes_nothing() -> None:
    async with running(NOBODY) as q:
        before = q.service.settings
        q.service.reload()
        assert q.service.settings == before


# ---- The log's file ---------------------------------------------------------------------------


def ids_in(path: Path) -> list[str]:
    """The requests that a log tells of, in its order."""
    found = re.findall(r'(?:\bid=|"id": ")([\w-]+)', path.read_text(encoding="utf-8"))
    return [str(one) for one in found]


@pytest.mark.parametrize("form", ["text", "json"])
async def test_log_file_is_opened_anew_on_sighup_and_nothing_is_lost_or_doubled(
    form: str, tmp_path: Path
) -> None:
    file, old = tmp_path / "llmq.log", tmp_path / "llmq.log.1"
    file.write_text("before\n", encoding="utf-8")
    flags = ("--port", "0", "--log-file", str(file), FORMAT.flag, form)
    async with FakeBackend() as fake, Process(*flags, "--backend", fake.url) as p:

        async def some() -> list[str]:
            asked = [ask(p.port, "POST", CHAT, json=chat(str(n))) for n in range(10)]
            return [one.headers["x-llmq-id"] for one in await asyncio.gather(*asked)]

        first = await some()
        file.rename(old)  # what was asked meanwhile is written when it is next looked at
        first += await some()
        p.signal(signal.SIGHUP)
        await eventually(lambda: file.exists() and "reload: done" in file.read_text())
        second = await some()
        assert await p.ended() == 0
        assert not re.search(r"INFO|outcome|reload", p.output)
    assert old.read_text().startswith("before\n"), "what was there stays"
    assert sorted(ids_in(old)) == sorted(first)
    assert sorted(ids_in(file)) == sorted(second)
    lines = [*old.read_text().splitlines()[1:], *file.read_text().splitlines()]
    if form == "json":
        assert all(json.loads(line)["level"] for line in lines)
    else:
        assert all(re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING) ", line) for line in lines)


@pytest.mark.parametrize("name", ["gone/llmq.log", "folder", "file/llmq.log"])
def test_log_file_that_cannot_be_is_told_in_one_line_at_the_start(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    ended = run_llmq("--port", "0", "--demo", "--log-file", str(path))
    (line,) = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (2, "")
    assert line.startswith("llmq: ")
    assert f"log.file: {path}: " in line


def test_log_file_may_be_under_the_users_home(
    log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    llmq.set_up_log(llmq.LogSettings(file="~/llmq.log"))
    log.info("said")
    llmq.set_up_log(llmq.LogSettings())
    assert (tmp_path / "llmq.log").read_text().endswith(" INFO said\n")


async def test_log_file_that_cannot_be_on_reload_leaves_the_old_one(
    log: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    file = folder / "llmq.log"
    llmq.set_up_log(llmq.LogSettings(file=str(file)))
    async with FakeBackend() as fake:
        async with running(fake.url, log__file=str(file)) as q:
            for path in (folder, folder / "gone" / "llmq.log"):
                more = build_settings({**q.values, "log.file": str(path), "queue.max_depth": 7})
                q.service.read = lambda more=more: more
                q.service.reload()
                assert f"log.file: {path}: " in q.gateway.config_error
                assert (await q.status())["queue"]["full_at"] != 7, "nothing was changed"
                assert "log.file" in file.read_text().splitlines()[-1]
            moved = tmp_path / "moved"
            folder.rename(moved)
            q.service.read = lambda: build_settings(q.values)
            q.service.reload()
            assert f"log.file: {file}: " in q.gateway.config_error
            log.info("goes on")
            assert (moved / "llmq.log").read_text().endswith(" INFO goes on\n")
            folder.mkdir()
            await reread(q, log__file=str(file))
            log.info("anew")
            assert file.read_text().endswith(" INFO anew\n")
            assert "anew" not in (moved / "llmq.log").read_text()
            await reread(q, log__file="")
            log.info("to stderr")
            assert "to stderr" not in file.read_text()
    llmq.set_up_log(llmq.LogSettings())


# ---- Open files ------------------------------------------------------------------------------


class Limits:
    """In place of the module `resource`."""

    RLIMIT_NOFILE, RLIM_INFINITY = resource.RLIMIT_NOFILE, -1

    def __init__(self, soft: int, hard: int, fails: bool = False) -> None:
        self.now = soft, hard
        self.fails = fails

    def getrlimit(self, _: int) -> tuple[int, int]:
        return self.now

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        if self.fails:
            raise ValueError("not allowed")
        self.now = limits


@pytest.mark.parametrize(
    ("limits", "holds", "after"),
    [
        (Limits(256, 100000), 10512, 10512),
        (Limits(256, 4096), 4096, 4096),
        (Limits(256, -1), 10512, 10512),
        (Limits(20000, 100000), 20000, 20000),
        (Limits(-1, -1), 10512, -1),
        (Limits(256, 100000, fails=True), 256, 256),
    ],
)
def test_limit_on_open_files_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, limits: Limits, holds: int, after: int
) -> None:
    monkeypatch.setitem(sys.modules, "resource", limits)
    assert llmq.raise_file_limit(10512) == holds
    assert limits.now[0] == after


def test_box_without_limits_on_files_has_as_many_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert llmq.raise_file_limit(10512) == 10512


async def test_banner_says_address_backends_and_what_a_client_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "raise_file_limit", lambda wanted: wanted)
    backends = {"box": {"url": NOBODY, "device": "gpu"}}
    async with running(backends=backends, devices={"gpu": {"slots": 2}}) as q:
        await q.service.first_look()
        said = llmq.banner(q.service)
        assert f"http://127.0.0.1:{q.port}" in said.splitlines()[0]
        assert llmq.__version__ in said.splitlines()[0]
        assert re.search(
            rf"backend box +{NOBODY}  no answer: connection refused  \(device gpu, 2 slots\)", said
        )
        for words in (
            f"page +{q.base}$",
            f"OPENAI_BASE_URL={q.base}/v1$",
            f"OLLAMA_HOST={q.base}$",
            f"ANTHROPIC_BASE_URL={q.base}$",
            f"llmq top --url {q.base}$",
        ):
            assert re.search(words, said, re.MULTILINE), (words, said)
        assert "open files" not in said


async def test_banner_says_what_each_backend_is_and_has() -> None:
    async with FakeBackend(models=["a", "b"], kind="ollama") as fake, FakeBackend(["c"]) as other:
        async with running(f"box={fake.url}", f"more={other.url}") as q:
            await q.service.first_look()
            (box, _) = q.gateway.fleet.backends.values()
            lines = llmq.banner(q.service).splitlines()
            assert box.report.version
            assert f"{fake.url}  ollama {box.report.version}, 2 models  (" in lines[1]
            assert f"{other.url}  {llmq.KINDS['openai'].name}, 1 model  (" in lines[2]
            box.loads(0.0, "loading")
            assert f"{fake.url}  loads its model" in llmq.banner(q.service)


async def test_banner_of_the_usual_address_needs_no_url() -> None:
    service = llmq.Service(build_settings({}))
    service.addresses = ["http://127.0.0.1:11500"]
    assert re.search("  llmq top$", llmq.banner(service), re.MULTILINE)


async def test_first_look_waits_for_what_answers_but_never_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeBackend() as fake, running(f"box={fake.url}") as q:
        (backend,) = q.gateway.fleet.backends.values()
        await q.service.first_look()
        assert backend.state is llmq.State.UP
        backend.state = llmq.State.UNKNOWN  # as if it never told
        monkeypatch.setattr(llmq, "LOOK_SECONDS", 0.0)
        await q.service.first_look()
        assert backend.state is llmq.State.UNKNOWN


async def test_banner_says_when_open_files_limit_the_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "raise_file_limit", lambda _: 256)
    async with running(NOBODY) as q:
        assert 150 < q.service.most_connections < 256
        said = llmq.banner(q.service)
        assert f"open files allow {q.service.most_connections} connections" in said


async def idle_clients(q: running, number: int) -> list[Raw]:
    """Connections that have had an answer and are kept open."""
    clients = []
    for _ in range(number):
        clients.append(await Raw.open(q.port))
        await clients[-1].send(http("GET", "/health"))
        assert (await clients[-1].response()).status == 200
    return clients


async def test_idle_connection_makes_place_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmq, "raise_file_limit", lambda _: 0)
    monkeypatch.setattr(llmq, "IDLE_GRACE", 0.0)
    async with running(NOBODY) as q:
        clients = await idle_clients(q, q.service.most_connections + llmq.SPARE_CONNECTIONS)
        assert (await ask(q.port, "GET", "/health")).status == 200
        assert await clients[0].closed()
        assert not clients[1].ended


async def test_beyond_the_connections_that_it_may_have_only_health_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "raise_file_limit", lambda _: 0)
    async with running(NOBODY) as q:
        most = q.service.most_connections
        clients = await idle_clients(q, most)
        health = await ask(q.port, "GET", "/health")
        assert (health.status, health.headers["connection"]) == (200, "close")
        refused = await q.chat("x")
        assert (refused.status, refused.code) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        clients += [await Raw.open(q.port) for _ in range(llmq.SPARE_CONNECTIONS)]
        one_more = await Raw.open(q.port)
        assert await one_more.closed()
        for client in clients:
            client.close()


# ---- The end ---------------------------------------------------------------------------------


async def test_service_that_stopped_has_let_go_of_its_port() -> None:
    async with running(NOBODY) as q:
        port = q.port
        await q.service.stop()
        async with running(NOBODY, server__port=port) as again:
            assert again.port == port


async def test_second_signal_hurries() -> None:
    async with running(NOBODY) as q:
        q.service.on_signal()
        assert q.service.stopping.is_set()
        assert not q.service.hurry.is_set()
        q.service.on_signal()
        assert q.service.hurry.is_set()


async def test_what_asyncio_complains_about_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    llmq.log_loop_error(loop, {"message": "out of files", "exception": OSError("no more")})
    llmq.log_loop_error(loop, {"message": "odd"})
    assert [record.getMessage() for record in caplog.records] == ["out of files: no more", "odd"]


async def slow_answer(q: running, fake: FakeBackend) -> Raw:
    """A client whose whole answer has left llmq only in part: it reads slowly."""
    client = await Raw.open(q.port, receive_buffer=4096)
    await client.send(http("POST", CHAT, {"Content-Type": "application/json"}, ASKED))
    await (await fake.arrived()).answer("y" * 3_000_000)
    await eventually(lambda: not q.gateway.calls)
    return client


ASKED = json.dumps(chat("a long one")).encode()


async def test_stop_does_not_cut_an_answer_that_is_on_its_way() -> None:
    async with FakeBackend(auto=False) as fake, contextlib.AsyncExitStack() as stack:
        q = await stack.enter_async_context(running(fake.url, server__drain_timeout=5))
        client = await slow_answer(q, fake)
        stopping = asyncio.ensure_future(stack.aclose())
        await eventually(lambda: q.gateway.draining)
        assert (await client.response()).clean
        await stopping


async def test_nobody_takes_the_place_of_an_answer_that_is_on_its_way() -> None:
    async with FakeBackend(auto=False) as fake, running(fake.url) as q:
        client = await slow_answer(q, fake)
        (server,) = q.service._servers
        server.most = 1
        (connection,) = server.connections
        connection.since -= llmq.IDLE_GRACE
        for _ in range(llmq.SPARE_CONNECTIONS + 1):
            await Raw.open(q.port)
        assert (await client.response()).clean


async def test_reload_to_another_device_asks_the_runner_for_no_more_than_its_slots() -> None:
    async with FakeBackend(auto=False) as fake:
        row = {"url": fake.url, "slots": 1}
        async with running(backends={"box": row}) as q:
            fleet = q.gateway.fleet
            first = asyncio.ensure_future(q.chat("first"))
            request = await fake.arrived()
            values = {**q.values, "backends": {"box": {**row, "device": "other"}}}
            q.service.read = lambda: build_settings(values)
            q.service.reload()
            await eventually(lambda: fleet.backends["box"].usable)
            second = asyncio.ensure_future(q.chat("second"))
            await eventually(lambda: fake.has_arrived() or q.gateway.scheduler.waiting)
            assert not fake.has_arrived(), "two at once at a runner of one slot"
            await request.answer("1")
            await (await fake.arrived()).answer("2")
            await asyncio.wait({first, second})
