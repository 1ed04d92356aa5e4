"""Leases: a whole device for work that is no request, and `llmq run`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.fakes import Answer, FakeBackend, Process, Raw, ask, eventually, http, running

LEASES = "/llmq/leases"
JSON = {"Content-Type": "application/json"}


async def wish(q: running, **values: Any) -> Raw:
    """Somebody who has asked for a lease and waits for it."""
    raw = await Raw.open(q.port)
    await raw.send(http("POST", LEASES, JSON, json.dumps(values).encode()))
    return raw


async def lease(q: running, **values: Any) -> Any:
    """A lease that has been granted."""
    return (await ask(q.port, "POST", LEASES, json=values)).json()


async def end(q: running, ident: str) -> Answer:
    return await ask(q.port, "DELETE", f"{LEASES}/{ident}")


async def waiting(q: running, number: int) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


def settings(slots: int = 1) -> dict[str, Any]:
    return {"devices": {"gpu": {"slots": slots}}}


def on_gpu(fake: FakeBackend, **more: Any) -> dict[str, Any]:
    return {"backends": {"box": {"url": fake.url, "device": "gpu"}}, **more}


# ---- Its turn, and its end -------------------------------------------------------------------


async def test_lease_is_granted_at_once_where_nothing_runs_and_keeps_others_waiting() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        granted = await lease(q)
        assert granted == {"id": granted["id"], "device": "gpu", "expires_s": 60.0}
        asked = q.chat("hello")
        (row,) = (await q.status())["requests"]
        assert (row["id"], row["route"], row["state"]) == (granted["id"], LEASES, "running")
        assert (await end(q, granted["id"])).json() == {"ended": granted["id"]}
        assert (await asked).status == 200


async def test_lease_waits_until_the_whole_device_is_empty_and_nothing_starts_beside_it() -> None:
    async with FakeBackend(auto=False) as fake, running(**on_gpu(fake, **settings(2))) as q:
        first, second = [await Raw.open(q.port) for _ in range(2)]
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]}).encode()
        for client in (first, second):
            await client.send(http("POST", "/v1/chat/completions", JSON, body))
        requests = [await fake.arrived(), await fake.arrived()]
        wisher = await wish(q)
        await waiting(q, 1)
        late = await Raw.open(q.port)
        await late.send(http("POST", "/v1/chat/completions", JSON, body))
        await waiting(q, 2)
        await requests[0].answer("one")
        await first.response()
        assert len(q.gateway.scheduler.waiting) == 2, "a slot is free, and kept for the lease"
        await requests[1].answer("two")
        ident = (await wisher.response()).json()["id"]
        assert len(q.gateway.scheduler.waiting) == 1, "the late one waits for the lease's end"
        await end(q, ident)
        await (await fake.arrived()).answer("three")
        assert (await late.response()).status == 200
        for client in (first, second, late, wisher):
            client.close()


async def test_lease_that_is_not_renewed_ends_and_one_that_is_does_not() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        ident = (await lease(q, ttl_s=0.01))["id"]
        assert (await q.chat("after it")).status == 200
        assert (await end(q, ident)).code == "not_found"
        ident = (await lease(q, ttl_s=0.3))["id"]
        renewed = await ask(q.port, "POST", f"{LEASES}/{ident}", json={"ttl_s": 3600})
        assert renewed.json() == {"id": ident, "expires_s": 3600.0}
        deadline = q.gateway.calls[ident].deadline
        assert deadline > q.gateway.now() + 3500
        await end(q, ident)


async def test_client_that_leaves_while_it_waits_for_a_lease_is_out_of_the_queue() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        ident = (await lease(q))["id"]
        second = await wish(q)
        await waiting(q, 1)
        second.close()
        await waiting(q, 0)
        await end(q, ident)
        assert (await q.chat("free")).status == 200
        assert q.gateway.journal.outcomes["client_left"] == 1


async def test_lease_has_a_class_and_is_cancelled_like_a_request() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        held = (await lease(q))["id"]
        low, high = await wish(q, **{"class": "low"}), await wish(q, **{"class": "high"})
        await waiting(q, 2)
        rows = {row["class"]: row for row in (await q.status())["requests"]}
        await ask(q.port, "DELETE", f"/llmq/requests/{held}")
        assert (await high.response()).json()["id"] == rows["high"]["id"]
        await ask(q.port, "DELETE", f"/llmq/requests/{rows['low']['id']}")
        assert (await low.response()).status == 499
        await end(q, rows["high"]["id"])
        for client in (low, high):
            client.close()


async def test_stop_ends_leases_at_once() -> None:
    async with FakeBackend() as fake:
        async with running(**on_gpu(fake), server__drain_timeout=30) as q:
            await lease(q, ttl_s=3600)
        assert not q.gateway.calls


async def test_lease_that_is_ended_as_soon_as_it_is_granted_has_one_record() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        first = await lease(q)
        waits = await wish(q)
        await waiting(q, 1)
        q.gateway.end_lease(q.gateway.calls[first["id"]])  # the other one is granted
        (ident,) = q.gateway.scheduler.running
        q.gateway.cancel(q.gateway.calls[ident])
        assert (await waits.response()).status == 499
        assert [one.id for one in q.gateway.journal.recent] == [first["id"], ident]
        waits.close()


async def test_device_that_has_no_backend_left_goes_with_its_lease() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        granted = await lease(q)
        rows = {"box": {"url": fake.url, "device": "other"}}
        q.service.read = lambda: build_settings({**q.values, "backends": rows})
        q.service.reload()
        assert {"gpu", "other"} == q.gateway.fleet.devices.keys()
        await end(q, granted["id"])
        assert {"other"} == q.gateway.fleet.devices.keys()


# ---- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": 1}, "device"),
        ({"device": ["gpu"]}, "device"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": True}, "ttl_s"),
        ({"ttl_s": "60"}, "ttl_s"),
        ({"ttl_s": 1e9}, "ttl_s"),
        ({"class": "vip"}, "class"),
        ({"class": 3}, "class"),
    ],
)
async def test_bad_wish_is_told_what_is_wrong(values: dict[str, Any], param: str) -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        answer = await ask(q.port, "POST", LEASES, json=values)
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)
        assert not q.gateway.calls


async def test_device_must_be_named_where_there_are_several() -> None:
    async with FakeBackend() as one, FakeBackend() as two:
        rows = {"a": {"url": one.url, "device": "left"}, "b": {"url": two.url, "device": "right"}}
        async with running(backends=rows) as q:
            answer = await ask(q.port, "POST", LEASES, json={})
            assert answer.status == 400
            assert "left, right" in answer.json()["error"]["message"]
            ident = (await lease(q, device="right"))["id"]
            assert (await q.chat("to the left")).headers["x-llmq-backend"] == "a"
            await end(q, ident)


@pytest.mark.parametrize("path", ["nobody", "../../etc", "x" * 200])
async def test_lease_that_is_not_there_can_neither_be_renewed_nor_ended(path: str) -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        assert (await end(q, path)).status == 404
        assert (await ask(q.port, "POST", f"{LEASES}/{path}", json={})).status == 404


async def test_request_that_runs_is_no_lease() -> None:
    async with FakeBackend(auto=False) as fake, running(**on_gpu(fake)) as q:
        asked = await Raw.open(q.port)
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]}).encode()
        await asked.send(http("POST", "/v1/chat/completions", JSON, body))
        request = await fake.arrived()
        (ident,) = q.gateway.scheduler.running
        assert (await end(q, ident)).status == 404
        await request.answer("still here")
        assert (await asked.response()).status == 200
        asked.close()


# ---- llmq run --------------------------------------------------------------------------------


def command(q: running, *words: str, flags: tuple[str, ...] = ()) -> Process:
    return Process("run", "--url", q.base, *flags, "--", *words, ready=False)


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-uc", code


async def test_run_has_the_device_while_its_command_runs_and_passes_its_exit_code_on() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        held = await lease(q)
        async with command(q, *python("print('ran'); raise SystemExit(7)")) as p:
            await waiting(q, 1)
            assert "ran" not in p.output, "it waits its turn"
            await end(q, held["id"])
            await p.line("ran")
            assert await p.ended(0) == 7
        assert not q.gateway.scheduler.running
        assert (await q.chat("the device is free")).status == 200


async def test_run_forwards_a_wish_to_stop_and_gives_the_device_back() -> None:
    wait = "import signal; print('begun'); signal.pause()"
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        async with command(q, *python(wait)) as p:
            await p.line("begun")
            assert len(q.gateway.scheduler.running) == 1
            assert await p.ended(signal.SIGTERM) == 128 + signal.SIGTERM
        assert not q.gateway.scheduler.running


async def test_run_of_what_is_not_there_says_so_and_gives_the_device_back() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        async with command(q, "no-such-command-here") as p:
            assert await p.ended(0) == 1
            assert "no-such-command-here: No such file" in p.output
        assert not q.gateway.scheduler.running


async def test_run_without_a_command_or_a_device_says_what_to_write() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        async with command(q) as p:
            assert await p.ended(0) == 2
            assert "write the command behind --" in p.output
        async with command(q, "true", flags=("--device", "tpu")) as p:
            assert await p.ended(0) == 1
            assert "device is one of gpu" in p.output


def test_run_without_llmq_runs_nothing() -> None:
    words = python("print('ran')")
    with Process("run", "--url", "http://127.0.0.1:9", "--", *words, ready=False) as p:
        assert p.stop(0) == 1
        assert "no llmq answers" in p.output
        assert "ran" not in p.output


async def test_unload_frees_the_device_before_the_lease_is_granted() -> None:
    async with FakeBackend(["m", "n"], "ollama", auto=False) as fake, running(**on_gpu(fake)) as q:
        fake.loaded = ["m", "n"]
        (backend,) = q.gateway.fleet.backends.values()
        await eventually(lambda: backend.loaded == {"m", "n"})
        waits = await wish(q, unload=True)
        asked = [await fake.arrived(), await fake.arrived()]
        assert sorted(one.json["model"] for one in asked) == ["m", "n"]
        assert {one.json["keep_alive"] for one in asked} == {0}
        for request in asked:
            await request.status(200, {"done": True, "done_reason": "unload"})
        granted = (await waits.response()).json()
        assert granted["device"] == "gpu"
        await end(q, granted["id"])
        waits.close()


@pytest.mark.parametrize("path", ["/llmq/requests", LEASES])
async def test_lease_that_is_ended_while_it_unloads_is_not_told_as_granted(path: str) -> None:
    async with FakeBackend(["m"], "ollama", auto=False) as fake, running(**on_gpu(fake)) as q:
        fake.loaded = ["m"]
        (backend,) = q.gateway.fleet.backends.values()
        await eventually(lambda: backend.loaded == {"m"})
        waits = await wish(q, unload=True, ttl_s=0.01)
        request = await fake.arrived()
        q.service.gateway.reap(q.gateway.now() + 100)
        (ident,) = q.gateway.scheduler.running
        assert (await ask(q.port, "DELETE", f"{path}/{ident}")).status == 200
        await request.status(200, {"done": True, "done_reason": "unload"})
        answer = await waits.response()
        assert (answer.status, answer.code) == (499, "cancelled")
        waits.close()


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_lease_whose_unloading_failed_is_an_error_and_holds_nothing(kind: str) -> None:
    """Who was promised an empty device would run out of its memory."""
    async with FakeBackend(["m"], kind, auto=False) as fake, running(**on_gpu(fake)) as q:
        fake.loaded = ["m"]
        (backend,) = q.gateway.fleet.backends.values()
        await eventually(lambda: backend.loaded == {"m"})
        waits = await wish(q, unload=True)
        if kind == "ollama":
            await (await fake.arrived()).status(500, {"error": "it is stuck"})
        answer = await waits.response()
        for ident in list(q.gateway.scheduler.running):
            await end(q, ident)
        waits.close()
        assert answer.status >= 400, answer


@pytest.mark.parametrize("wrong", [{"unload": "no"}, {"unload": 1}, {"devise": "gpu"}])
async def test_wish_that_means_nothing_unloads_nothing(wrong: dict[str, Any]) -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        answer = await ask(q.port, "POST", LEASES, json=wrong)
        for ident in list(q.gateway.scheduler.running):
            await end(q, ident)
        assert answer.status == 400, answer


async def test_lease_whose_unloading_breaks_down_gives_the_device_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        monkeypatch.setattr(llmq, "empty_device", broken)
        answer = await ask(q.port, "POST", LEASES, json={"unload": True})
        assert answer.status == 500
        assert not q.gateway.scheduler.running
        assert (await q.chat("the device is free")).status == 200


async def test_what_has_just_been_loaded_is_unloaded_too() -> None:
    async with FakeBackend(["m"], "ollama", auto=False) as fake, running(**on_gpu(fake)) as q:
        (backend,) = q.gateway.fleet.backends.values()
        await eventually(lambda: backend.usable)
        asked = asyncio.ensure_future(q.chat("load it"))
        request = await fake.arrived()
        fake.loaded = ["m"]
        await request.answer("loaded")
        await asked
        assert backend.report.loaded == (), "no look has told of it yet"
        waits = await wish(q, unload=True)
        unload = await fake.arrived()
        assert unload.json["keep_alive"] == 0
        await unload.status(200, {"done": True, "done_reason": "unload"})
        await end(q, (await waits.response()).json()["id"])
        waits.close()


async def test_renewal_with_a_word_that_it_does_not_know_renews_nothing() -> None:
    async with FakeBackend() as fake, running(**on_gpu(fake)) as q:
        ident = (await lease(q, ttl_s=3600))["id"]
        before = q.gateway.calls[ident].deadline
        answer = await ask(q.port, "POST", f"{LEASES}/{ident}", json={"ttl": 5})
        assert (answer.status, answer.json()["error"]["param"]) == (400, "ttl")
        assert q.gateway.calls[ident].deadline == before
        await end(q, ident)
