"""What the README shows to be typed works as typed: its commands, and its example file."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.fake_ollama import Ollama
from tests.fakes import (
    LLMQ,
    Answer,
    FakeBackend,
    Process,
    ask,
    chat,
    eventually,
    free_port,
    require_command,
)
from tests.test_readme import README, as_json, example

pytestmark = pytest.mark.usefixtures("measured")  # commands as they are typed

HERE = "http://127.0.0.1:11500"
PYTHON = f"{shlex.quote(sys.executable)} {shlex.quote(str(LLMQ))}"


def typed(heading: str) -> list[str]:
    """The lines to type under a heading."""
    text = (
        README.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    )
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return "".join(blocks).replace("\\\n", " ").splitlines()


async def shell(p: Process, *lines: str) -> tuple[int, str]:
    """What these lines print, typed where that llmq is the one on this box."""
    script = "\n".join(lines).replace(HERE, f"http://127.0.0.1:{p.port}")
    script = re.sub(r"(?m)^python3 llmq\.py", lambda _: PYTHON, script)
    doing = await asyncio.create_subprocess_exec(
        "sh", "-c", script, cwd=p.home.name, env={**p.env, "LLMQ_SERVER_PORT": str(p.port)},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await doing.communicate()
    return int(doing.returncode or 0), printed.decode()


async def status(p: Process) -> Any:
    return (await ask(p.port, "GET", "/llmq/status")).json()


async def seen(p: Process, holds: Callable[[Any], Any]) -> Any:
    """The first snapshot of which this holds; the deadline of the test ends the wait."""
    while not holds(facts := await status(p)):
        pass
    return facts


async def up(p: Process, number: int) -> None:
    """So many backends answer."""
    await seen(p, lambda facts: [one["state"] for one in facts["backends"]].count("up") == number)


# ---- Commands --------------------------------------------------------------------------------


async def test_client_is_steered_as_shown() -> None:
    require_command("curl")
    names, *lines = typed("See and steer")
    async with FakeBackend() as fake, Process("--port", "0", "--backend", fake.url) as p:
        for line in lines:
            quiet = line.replace("curl ", "curl -sSf ", 1)
            code, printed = await shell(p, names, quiet)
            assert code == 0, (line, printed)
        facts = await status(p)
        rows = {row["name"]: row for row in facts["clients"]}
        assert rows["user:bob"]["class"] == "high"
        batch = rows["app:batch"]
        assert (batch["boost"], batch["weight"], batch["blocked"]) == (True, 2.0, True)
        assert facts["ips"] == ["10.0.0.9"]
        assert [one["name"] for one in facts["backends"]] != ["gpu"], "it has been taken out"
        kept = Path(p.home.name) / ".local/state/llmq/llmq.db"
        assert kept.exists()


async def test_models_are_loaded_and_unloaded_as_shown() -> None:
    async with Ollama(["qwen3:8b"]) as tower:
        async with Process("--port", "0", "--backend", f"tower={tower.url}") as p:
            await up(p, 1)
            load, unload = typed("Models")
            assert await shell(p, load) == (0, "load qwen3:8b: tower\n")
            await eventually(lambda: tower.loads)
            await seen(p, lambda facts: facts["backends"][0]["loaded"])
            _, listed = await shell(p, "python3 llmq.py models")
            assert listed.splitlines()[1].split()[:3] == ["qwen3:8b", "tower", "yes"]
            assert await shell(p, unload) == (0, "unload *: tower\n")
            await seen(p, lambda facts: not facts["backends"][0]["loaded"])


def make_programs(folder: Path) -> None:
    """What the README runs as examples of work."""
    (folder / "train.py").write_text("print('trained'); raise SystemExit(3)", encoding="utf-8")
    images = folder / "make-images"
    images.write_text("#!/bin/sh\necho painted\n", encoding="utf-8")
    images.chmod(0o755)


async def test_work_that_is_no_request_runs_as_shown() -> None:
    async with Ollama() as tower, Process("--port", "0", "--backend", tower.url) as p:
        await up(p, 1)
        make_programs(Path(p.home.name))
        train, paint = typed("Who goes next")
        assert await shell(p, train) == (3, "trained\n")
        assert await shell(p, paint) == (0, "painted\n")
        ended = (await status(p))["recent"]
        assert [(one["client"], one["class"]) for one in ended] == [
            ("app:llmq", "normal"),
            ("app:llmq", "low"),
        ]


async def test_first_request_is_answered_as_shown() -> None:
    require_command("curl")
    async with Process("--demo", "--port", "0") as p:
        (line,) = typed("Connect a client")
        code, printed = await shell(p, line.replace("curl ", "curl -sS ", 1))
        assert code == 0
        assert json.loads(printed)["choices"][0]["message"]["content"] == "hello"


# ---- The example file ------------------------------------------------------------------------

ALICE, PAPERLESS = {"Authorization": "Bearer alice-key"}, {"User-Agent": "paperless"}
NEAR = {"X-Forwarded-For": "192.168.1.21"}  # as the proxy tells
CHAT = {"x-api-key": "chat-key", "X-OpenWebUI-User-Id": "bob", **NEAR}
ASKS: list[tuple[dict[str, str], str, str]] = [  # headers, class, client
    (ALICE, "normal", "alice"),
    ({**ALICE, **NEAR, "X-Queue-Priority": "high"}, "high", "alice"),
    (CHAT, "normal", "chat/bob"),
    ({**CHAT, "X-OpenWebUI-Task": "title"}, "low", "chat/bob"),
    ({**CHAT, "X-Queue-Priority": "high"}, "normal", "chat/bob"),
    (PAPERLESS, "low", "app:paperless"),
    ({"User-Agent": "photo-tagger"}, "low", "app:photo-tagger"),
]
SECRETS = {
    "METRICS_KEY": "metrics",
    "SEARCH_TOKEN": "search",
    "RACK_KEY": "sk-0123456789",
    "DESK_HOOK": "http://127.0.0.1:9/hook",  # where nobody listens
    "DESK_SECRET": "signed",
}


async def post(p: Process, body: Any, headers: dict[str, str]) -> Answer:
    return await ask(p.port, "POST", "/v1/chat/completions", json=body, headers=headers)


def on_this_box(urls: dict[str, str]) -> dict[str, Any]:
    """The example with other addresses: those that a test has."""
    document = as_json(example())
    document["server"].update(host="127.0.0.1", port=0, trusted_proxies=["127.0.0.1"])
    for name, url in urls.items():
        document["backends"][name]["url"] = url
    for name in ("alice", "chat"):  # whose keys nobody has
        del document["keys"][name]["key_hash"]
        document["keys"][name]["key"] = f"{name}-key"
    document["ports"] = {str(free_port()): row for row in document["ports"].values()}
    return document


@pytest.mark.deadline(30)
async def test_example_file_does_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "llmq.json"
    async with Ollama(["qwen3:32b", "llama3.3:70b"]) as tower, Ollama(["qwen3:8b"]) as mini:
        async with FakeBackend(models=["big"]) as rack:
            urls = {"tower": tower.url, "mini": mini.url, "rack": rack.url}
            document = on_this_box(urls)
            path.write_text(json.dumps(document), encoding="utf-8")
            async with Process("--config", str(path), env=SECRETS) as p:
                await up(p, 3)
                await eventually(lambda: "qwen3:32b" in tower.contexts)  # by preload
                for headers, priority, client in ASKS:
                    answer = await post(p, chat("hello", model="gpt-5"), headers)
                    assert answer.headers["x-llmq-backend"] == "tower", answer
                    record = (await status(p))["recent"][0]
                    assert (record["client"], record["class"]) == (client, priority)
                embed = {"model": "qwen3:8b", "input": "a"}
                await ask(p.port, "POST", "/v1/embeddings", json=embed, headers=PAPERLESS)
                assert (await status(p))["recent"][0]["class"] == "normal"
                await post(p, chat("hi", model="big"), {**ALICE, "X-User-ID": "bob"})
                sent = rack.requests[-1]
                own = ("authorization", "x-tenant", "x-user-id")
                assert [sent.headers[name] for name in own] == [
                    "Bearer sk-0123456789",
                    "home",
                    "bob",
                ]
                assert sent.json["max_tokens"] == 8192
                blocked = {**ALICE, "X-Forwarded-For": "192.168.1.66"}
                assert (await post(p, chat("hi", model="big"), blocked)).status == 403
                assert (await post(p, chat("hi", model="big"), NEAR)).status == 401
                assert (await post(p, chat("hi", model="big"), CHAT)).status == 403
                home = next(port for port, row in document["ports"].items() if "client" in row)
                hi = chat("hi", model="qwen3:8b")
                await ask(int(home), "POST", "/v1/chat/completions", json=hi)
                record = (await status(p))["recent"][0]
                assert (record["client"], record["class"]) == ("home-assistant", "high")
                assert (await post(p, chat("hi", model="big"), {"Host": "llm.home"})).status == 200
                devices = {one["name"]: one["slots"] for one in (await status(p))["devices"]}
                assert devices["tower"] == 2
                assert devices["rack"] == 8
