"""Who goes next, over sockets: each rule once, with runners that load models and that die."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import llmq
from tests.fakes import Answer, FakeBackend, FakeRequest, Raw, ask, chat, eventually, http, running

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


class OneModel(FakeBackend):
    """An Ollama that holds one model at a time; it counts how often it loads another."""

    def __init__(self, *models: str) -> None:
        super().__init__(models, "ollama")
        self.loads = 0

    async def _answer(self, request: FakeRequest) -> None:
        model = request.json["model"]
        if self.loaded != [model]:
            self.loaded, self.loads = [model], self.loads + 1
        await super()._answer(request)


async def send(q: running, text: str, user: str, **more: Any) -> Raw:
    """A client that has sent its request and waits."""
    raw = await Raw.open(q.port)
    headers = {**JSON, "X-User-ID": user, **more.pop("headers", {})}
    await raw.send(http("POST", CHAT, headers, json.dumps(chat(text, **more)).encode()))
    return raw


async def waiting(q: running, number: int) -> None:
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


async def one_runs(q: running, fake: FakeBackend) -> Raw:
    """The one slot is taken until `fake.release()`."""
    fake.hold()
    first = await send(q, "first", "nobody")
    await eventually(lambda: len(q.gateway.scheduler.running) == 1)
    return first


async def let_go(fake: FakeBackend, *clients: Raw) -> list[str]:
    """Let all be answered; the texts in the order of their starts, without the first."""
    fake.release()
    for client in clients:
        assert (await client.response()).status == 200
        client.close()
    return [request.text for request in fake.requests[1:]]


def rows(**settings: Any) -> dict[str, Any]:
    return {f"user:{name}": row for name, row in settings.items()}


# ---- One device ------------------------------------------------------------------------------


async def test_who_has_many_requests_does_not_go_before_who_has_few() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        clients = [await one_runs(q, fake)]
        clients += [await send(q, "heavy", "heavy") for _ in range(12)]
        clients += [await send(q, "light", "light") for _ in range(3)]
        await waiting(q, 15)
        assert (await let_go(fake, *clients)).index("light") <= 1
        assert [request.text for request in fake.requests[1:8]].count("light") == 3


async def test_boosted_client_has_every_second_start_while_it_waits() -> None:
    clients_table = rows(boosted={"boost": True})
    async with FakeBackend() as fake, running(fake.url, clients=clients_table) as q:
        clients = [await one_runs(q, fake)]
        for name in "abc":
            clients += [await send(q, name, name) for _ in range(4)]
        clients += [await send(q, "boosted", "boosted") for _ in range(4)]
        await waiting(q, 16)
        order = await let_go(fake, *clients)
        assert [order[place : place + 2].count("boosted") for place in (0, 2, 4, 6)] == [1] * 4


async def test_vip_goes_before_all_and_who_is_low_after_all() -> None:
    table = rows(vip={"class": "high"}, night={"class": "low"})
    async with FakeBackend() as fake, running(fake.url, clients=table) as q:
        clients = [await one_runs(q, fake)]
        for name in ("night", "anybody", "vip"):
            clients += [await send(q, name, name) for _ in range(2)]
        await waiting(q, 6)
        order = await let_go(fake, *clients)
        assert order == ["vip"] * 2 + ["anybody"] * 2 + ["night"] * 2


async def test_an_overdue_request_starts_within_eight() -> None:
    async with FakeBackend() as fake, running(fake.url, queue__aging=0.01) as q:
        clients = [await one_runs(q, fake)]
        clients.append(await send(q, "low", "patient", priority="low"))
        clients += [await send(q, "high", f"u{n}", priority="high") for n in range(20)]
        await waiting(q, 21)
        (low,) = (one for one in q.gateway.scheduler.waiting.values() if one.priority == 2)
        group = next(one for one in q.gateway.scheduler.groups() if one.priority == 2)
        await eventually(lambda: group.clock - low.aged > 0.01)
        assert (await let_go(fake, *clients)).index("low") < 8


async def test_client_has_no_more_running_than_its_cap_and_holds_up_nobody() -> None:
    table, gpu = rows(capped={"max_concurrent": 1}), {"gpu": {"slots": 3}}
    async with FakeBackend() as fake:
        backends = {"box": {"url": fake.url, "device": "gpu"}}
        async with running(backends=backends, devices=gpu, clients=table) as q:
            fake.hold()
            clients = [await send(q, "capped", "capped") for _ in range(3)]
            clients += [await send(q, "other", "other") for _ in range(2)]
            await waiting(q, 2)
            running_now = [one.client.name for one in q.gateway.scheduler.running.values()]
            assert Counter(running_now) == {"user:capped": 1, "user:other": 2}
            fake.release()
            for client in clients:
                assert (await client.response()).status == 200
                client.close()


# ---- Loading costs ---------------------------------------------------------------------------


async def test_two_models_that_alternate_are_loaded_seldom_and_nobody_is_forgotten() -> None:
    fake = OneModel("m", "n")
    async with fake, running(fake.url) as q:
        clients = [await one_runs(q, fake)]
        clients += [await send(q, f"{n}", f"u{n}", model="nm"[n % 2]) for n in range(20)]
        await waiting(q, 20)
        order = await let_go(fake, *clients)
        assert sorted(order) == sorted(map(str, range(20)))
        assert fake.loads == 2, "in order of arrival it would be 21"


async def test_affinity_that_is_off_keeps_the_order() -> None:
    fake = OneModel("m", "n")
    async with fake, running(fake.url, queue__affinity=0) as q:
        clients = [await one_runs(q, fake)]
        clients += [await send(q, f"{n}", f"u{n}", model="nm"[n % 2]) for n in range(8)]
        await waiting(q, 8)
        await let_go(fake, *clients)
        assert fake.loads == 9


async def test_burst_for_a_model_that_is_not_loaded_sends_one_first() -> None:
    async with FakeBackend(["m"], "ollama", auto=False) as fake:
        async with running(fake.url, queue__slots=4) as q:
            clients = [await send(q, f"{number}", "u", stream=True) for number in range(4)]
            first = await fake.arrived()
            await waiting(q, 3)
            await first.start_stream()
            await first.piece("loaded ")
            others = [await fake.arrived() for _ in range(3)]
            assert len(q.gateway.scheduler.running) == 4
            await first.finish_stream()
            for request in others:
                await request.answer("too")
            for client in clients:
                assert (await client.response()).clean
                client.close()


# ---- Several boxes ---------------------------------------------------------------------------


def boxes(*fakes: FakeBackend) -> dict[str, Any]:
    return {name: {"url": fake.url, "device": name} for name, fake in zip(("one", "two"), fakes)}


async def test_conversation_goes_back_to_the_backend_that_has_its_prompt() -> None:
    async with FakeBackend() as one, FakeBackend() as two, running(backends=boxes(one, two)) as q:
        mine = {"X-Session-Id": "mine"}
        first = (await q.chat("hello", mine)).headers["x-llmq-backend"]
        other = (await q.chat("somebody else")).headers["x-llmq-backend"]
        assert other != first
        for _ in range(4):
            assert (await q.chat("again", mine)).headers["x-llmq-backend"] == first
        keyed = await q.chat("by its body", prompt_cache_key="key")
        for _ in range(4):
            again = await q.chat("again", prompt_cache_key="key")
            assert again.headers["x-llmq-backend"] == keyed.headers["x-llmq-backend"]


async def test_weight_is_the_share_among_equal_backends() -> None:
    async with FakeBackend() as one, FakeBackend() as two:
        table = boxes(one, two)
        table["two"]["weight"] = 3
        async with running(backends=table) as q:
            for _ in range(12):
                await q.chat("hello")
            assert (len(one.requests), len(two.requests)) == (3, 9)


async def test_backend_that_is_killed_under_load_loses_nobody_and_is_used_again() -> None:
    quick = {"upstream__probe_interval": 0.2, "queue__slots": 2}
    async with FakeBackend() as one, FakeBackend() as two:
        async with running(backends=boxes(one, two), **quick) as q:
            await eventually(lambda: all(b.usable for b in q.gateway.fleet.backends.values()))
            one.hold()
            two.hold()
            clients = [await send(q, f"{n}", f"u{n % 5}") for n in range(200)]
            await waiting(q, 196)
            await one.stop_listening()
            one.drop_connections()
            two.release()
            answers = await asyncio.gather(*(client.response() for client in clients))
            assert [answer.status for answer in answers] == [200] * 200
            assert sorted(said(answer) for answer in answers) == sorted(map(str, range(200)))
            assert Counter(request.text for request in two.requests).most_common(1)[0][1] == 1
            one.release()
            await one.listen_again()
            await eventually(lambda: q.gateway.fleet.backends["one"].usable)
            used = len(one.requests)
            for _ in range(4):
                await q.chat("again")
            assert len(one.requests) > used
            for client in clients:
                client.close()


def said(answer: Answer) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


async def test_exclusive_model_has_its_device_to_itself() -> None:
    models, gpu = {"big": {"exclusive": True}}, {"gpu": {"slots": 2}}
    async with FakeBackend(["m", "big"], auto=False) as fake:
        backends = {"box": {"url": fake.url, "device": "gpu"}}
        async with running(backends=backends, devices=gpu, models=models) as q:
            clients = [await send(q, "a", "a"), await send(q, "b", "b")]
            requests = [await fake.arrived(), await fake.arrived()]
            clients += [await send(q, "big", "c", model="big"), await send(q, "d", "d")]
            await waiting(q, 2)
            await requests[0].answer("a")
            await clients[0].response()
            assert len(q.gateway.scheduler.running) == 1, "one slot runs empty for the big one"
            await requests[1].answer("b")
            big = await fake.arrived()
            assert big.text == "big"
            assert len(q.gateway.scheduler.running) == 1
            await big.answer("big")
            await (await fake.arrived()).answer("d")
            for client in clients[1:]:
                assert (await client.response()).status == 200
            for client in clients:
                client.close()


async def test_reserved_slot_is_for_class_high() -> None:
    gpu = {"gpu": {"slots": 2, "reserve_high": 1}}
    async with FakeBackend(auto=False) as fake:
        backends = {"box": {"url": fake.url, "device": "gpu"}}
        async with running(backends=backends, devices=gpu) as q:
            clients = [await send(q, "a", "a"), await send(q, "b", "b")]
            await waiting(q, 1)
            clients.append(await send(q, "urgent", "c", priority="high"))
            texts = {(await fake.arrived()).text, (await fake.arrived()).text}
            assert texts == {"a", "urgent"}
            (row,) = (row for row in (await q.status())["requests"] if row["state"] == "waiting")
            assert row["client"] == "user:b"
            for request in fake.requests:
                await request.answer("done")
            await (await fake.arrived()).answer("b")
            for client in clients:
                assert (await client.response()).status == 200
                client.close()


def test_names_of_the_classes_are_the_same_everywhere() -> None:
    assert list(llmq.CLASSES) == [priority.word for priority in llmq.Priority]


async def test_who_is_made_vip_goes_first_with_what_waits_already() -> None:
    async with FakeBackend() as fake, running(fake.url) as q:
        clients = [await one_runs(q, fake)]
        clients += [await send(q, "other", "other") for _ in range(2)]
        clients += [await send(q, "vip", "vip"), await send(q, "said", "vip", priority="low")]
        await waiting(q, 4)
        vip = await ask(q.port, "POST", "/llmq/clients/user:vip", json={"class": "high"})
        assert vip.json()["class"] == "high"
        assert await let_go(fake, *clients) == ["vip", "other", "other", "said"]
