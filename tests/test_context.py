"""One context for all who share a model: Ollama loads a model anew whenever num_ctx changes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.fake_runner import (
    CHAT,
    COMPLETIONS,
    DEFAULT_CONTEXT,
    EMBED,
    EMBEDDINGS,
    GENERATE,
    MESSAGES,
    NATIVE_CHAT,
    OLD_EMBED,
    RERANK,
    RESPONSES,
    Dialect,
    Runner,
    speak,
)
from tests.fakes import Answer, FakeRequest, Process, Raw, ask, eventually, http, running

QUICK = {"upstream__probe_interval": 0.05}
FOREIGN = {"Origin": "https://evil.example"}
HOME = {"Origin": "http://localhost:3000"}
CARRY = (NATIVE_CHAT, GENERATE, EMBED, OLD_EMBED, CHAT, COMPLETIONS, EMBEDDINGS)
NATIVE = CARRY[:4]
EMBEDS = (EMBED, OLD_EMBED, EMBEDDINGS)  # which carry one only if they ask for one
ASKS_LESS = {"options": {"num_ctx": 2048}}
each_that_carries = pytest.mark.parametrize("dialect", CARRY, ids=repr)
each_native = pytest.mark.parametrize("dialect", NATIVE, ids=repr)
each_embed = pytest.mark.parametrize("dialect", EMBEDS, ids=repr)
ODD = b' {"model":"m" ,\n  "x-unknown":[1.0,1e2,"\\u00e9"],%s "stream": false}\n'  # kept as it is


def context_of(request: FakeRequest) -> Any:
    """The num_ctx that the runner was told; None when it was told none."""
    return (request.json.get("options") or {}).get("num_ctx")


def contexts(fake: Runner) -> list[Any]:
    return [context_of(request) for request in fake.requests]


async def served(q: running, dialect: Dialect, text: str = "hello there", **more: Any) -> Answer:
    answer = await dialect.ask(q.port, text, **more)
    assert dialect.text(answer) == text
    return answer


async def marks(q: running, number: int = 0) -> Any:
    return (await q.status())["backends"][number]["context"]


async def told(q: running, expected: Any, number: int = 0) -> None:
    """Return once the snapshot shows these marks; the test's deadline ends it otherwise."""
    while await marks(q, number) != expected:
        pass


async def up(q: running) -> None:
    """Return once every backend is up; the test's deadline ends it otherwise."""
    while any(one["state"] != "up" for one in (await q.status())["backends"]):
        pass


async def looked(q: running, fake: Runner, times: int = 2) -> None:
    """Return after so many more looks at the backend, begun and ended."""
    seen = fake.probe_paths.count("/api/ps") + times
    await eventually(lambda: fake.probe_paths.count("/api/ps") >= seen)
    await q.status()


# ---- One value for all -----------------------------------------------------------------------


async def test_clients_with_and_without_a_context_share_one_and_one_load() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, CHAT, numCtx=8192)
        await served(q, CHAT)
        await served(q, CHAT, numCtx=4096)
        await served(q, NATIVE_CHAT)
        await served(q, NATIVE_CHAT, numCtx=2048)
        await served(q, NATIVE_CHAT, options={"num_ctx": 4096})
        await served(q, GENERATE)
        await served(q, GENERATE, numCtx=8192)
        await served(q, COMPLETIONS)
        await served(q, EMBED, numCtx=8192)
        await served(q, OLD_EMBED, options={"num_ctx": 1024, "seed": 1})
        await served(q, EMBEDDINGS, numCtx=512)
        assert contexts(fake) == [8192] * 12
        assert fake.loads == [("m", 8192)]
        assert not [request for request in fake.requests if "numCtx" in request.json]


@each_that_carries
async def test_first_context_asked_for_is_carried_to_the_runner(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, dialect, numCtx=8192)
        await served(q, dialect, **({"numCtx": 4096} if dialect in EMBEDS else {}))
        assert contexts(fake) == [8192, 8192]
        assert fake.loads == [("m", 8192)]
        assert await marks(q) == {"m": 8192}


@pytest.mark.parametrize("starting", [0, 8192])
@each_embed
async def test_embeddings_carry_none_unless_they_ask(dialect: Dialect, starting: int) -> None:
    """An explicit one made every embedding model of a shorter context load again and again."""
    plain = ODD % (json.dumps(dialect.asked("hi"))[1:-1] + ",").encode()
    async with Runner() as fake, running(fake.url, upstream__num_ctx=starting) as q:
        await served(q, CHAT, numCtx=8192)
        assert await marks(q) == {"m": 8192}
        assert (await ask(q.port, "POST", dialect.path, body=plain)).status == 200
        assert (fake.requests[-1].path, fake.requests[-1].body) == (dialect.path, plain)
        for none in (None, 0, -1):
            await served(q, dialect, numCtx=none)
            assert fake.requests[-1].path == dialect.path
            assert fake.requests[-1].json == dialect.body("hello there")
        await served(q, dialect, numCtx=512)
        assert contexts(fake) == [8192, None, None, None, None, 8192]
        assert await marks(q) == {"m": 8192}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS, NATIVE_CHAT, GENERATE], ids=repr)
async def test_streams_carry_it_and_end_as_they_should(dialect: Dialect, stream: bool) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, dialect, "one two three", stream=stream, numCtx=8192)
        await served(q, dialect, "one two three", stream=stream)
        assert contexts(fake) == [8192, 8192]


async def test_larger_one_raises_it_for_all_with_one_more_load() -> None:
    async with Runner() as fake, running(fake.url) as q:
        for number in (8192, 4096, 16384, 8192, None):
            await served(q, CHAT, **({} if number is None else {"numCtx": number}))
        assert contexts(fake) == [8192, 8192, 16384, 16384, 16384]
        assert fake.loads == [("m", 8192), ("m", 16384)]


async def test_each_model_has_its_own() -> None:
    async with Runner(models=["a", "b", "c"]) as fake, running(fake.url) as q:
        await served(q, CHAT, model="a", numCtx=8192)
        await served(q, CHAT, model="b", numCtx=16384)
        await served(q, NATIVE_CHAT, model="a")
        await served(q, NATIVE_CHAT, model="B:latest")
        await served(q, NATIVE_CHAT, model="c")
        assert contexts(fake) == [8192, 16384, 8192, 16384, None]
        assert await marks(q) == {"a": 8192, "b": 16384}


@each_native
async def test_native_clients_own_option_is_a_request_for_it(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, dialect, options={"num_ctx": 8192, "temperature": 0.25})
        await served(q, CHAT)
        await served(q, dialect, options={"temperature": 0.5, "num_ctx": 2048, "seed": 7})
        await served(q, dialect, options={"seed": 7})
        await served(q, dialect, options={})
        embeds = dialect in EMBEDS
        assert contexts(fake) == [8192] * 3 + [None if embeds else 8192] * 2
        assert fake.requests[2].json["options"] == {"temperature": 0.5, "num_ctx": 8192, "seed": 7}
        shared = {} if embeds else {"num_ctx": 8192}
        assert fake.requests[3].json["options"] == {**shared, "seed": 7}
        assert fake.requests[4].json["options"] == shared


async def test_both_ways_of_asking_count_and_the_larger_one_wins() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, NATIVE_CHAT, numCtx=4096, options={"num_ctx": 8192})
        await served(q, NATIVE_CHAT, numCtx=16384, options={"num_ctx": 8192})
        assert contexts(fake) == [8192, 16384]


@each_native
async def test_request_that_asks_for_just_the_mark_passes_byte_for_byte(dialect: Dialect) -> None:
    fields = json.dumps({**dialect.asked("hi"), "options": {"num_ctx": 8192}})[1:-1] + ","
    body = ODD % fields.encode()
    async with Runner() as fake, running(fake.url, cache__embeddings=False) as q:
        for _ in range(2):
            answer = await ask(q.port, "POST", dialect.path, body=body)
            assert answer.status == 200
        assert [request.body for request in fake.requests] == [body, body]


@each_native
async def test_all_but_the_context_stays_as_the_client_wrote_it(dialect: Dialect) -> None:
    own = ASKS_LESS if dialect in EMBEDS else {}
    fields = json.dumps({**dialect.asked("hi"), **own})[1:-1] + ","
    body = ODD % fields.encode()
    async with Runner() as fake, running(fake.url) as q:
        await served(q, dialect, numCtx=8192)
        await ask(q.port, "POST", dialect.path, body=body)
        sent = fake.requests[-1]
        assert context_of(sent) == 8192
        assert {**sent.json, "options": None} == {**json.loads(body), "options": None}
        assert b'"x-unknown":[1.0,1e2,"\\u00e9"]' in sent.body


# ---- Without a mark --------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [*CARRY, RESPONSES, MESSAGES], ids=repr)
async def test_nothing_is_added_where_nobody_asked(dialect: Dialect) -> None:
    fields = json.dumps(dialect.asked("hi"))[1:-1] + ","
    body = ODD % fields.encode()
    async with Runner() as fake, running(fake.url) as q:
        answer = await ask(q.port, "POST", f"{dialect.path}?a=1&b=%20", body=body)
        assert (answer.status, dialect.text(answer)) == (200, "hi")
        (request,) = fake.requests
        assert (request.path, request.body) == (f"{dialect.path}?a=1&b=%20", body)
        assert await marks(q) == {}


@pytest.mark.parametrize("starting", [0, 4096])
@pytest.mark.parametrize("kind", ["openai", "llamacpp", "vllm", "lmstudio"])
async def test_other_runners_never_see_it(kind: str, starting: int) -> None:
    for dialect in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, RERANK):
        plain = ODD % (json.dumps(dialect.asked("hi"))[1:-1] + ",").encode()
        marked = plain.replace(b'"model":"m" ,', b'"model":"m" ,"numCtx": 8192,')
        async with Runner(kind=kind) as fake:
            backends = {"box": {"url": fake.url, "kind": kind}}
            async with running(backends=backends, upstream__num_ctx=starting) as q:
                answer = await ask(q.port, "POST", dialect.path, body=marked)
                if (dialect, kind) == (RERANK, "lmstudio"):
                    assert answer.status == 501
                    continue
                assert answer.status == 200, (dialect, answer)
                (request,) = fake.requests
                assert (request.path, json.loads(request.body)) == (dialect.path, json.loads(plain))
                assert b'"x-unknown":[1.0,1e2,"\\u00e9"]' in request.body
                assert not await marks(q)


@pytest.mark.parametrize("dialect", [RESPONSES, MESSAGES], ids=repr)
async def test_route_that_cannot_carry_it_passes_without_it(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, CHAT, numCtx=8192)
        await served(q, dialect, numCtx=8192)
        assert fake.requests[-1].path == dialect.path
        assert fake.requests[-1].json == dialect.body("hello there")


# ---- What is loaded --------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [1, 8192, 16384])
@each_that_carries
async def test_one_that_asks_for_no_more_than_is_loaded_is_sent_with_just_that(
    dialect: Dialect, asked: int
) -> None:
    async with Runner() as fake, running(fake.url) as q:
        fake.contexts = {"m": 16384}
        await served(q, dialect, numCtx=asked)
        if dialect in NATIVE:
            await served(q, dialect, options={"num_ctx": asked})
        assert set(contexts(fake)) == {16384}
        assert fake.loads == []
        assert await marks(q) == {}


@each_that_carries
async def test_one_that_asks_for_more_than_is_loaded_raises_it(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        fake.contexts = {"m": 4096}
        await served(q, dialect, numCtx=8192)
        assert contexts(fake) == [8192]
        assert fake.loads == [("m", 8192)]
        assert await marks(q) == {"m": 8192}


@pytest.mark.parametrize("dialect", [*CARRY, RESPONSES, MESSAGES], ids=repr)
async def test_what_a_model_is_loaded_with_by_itself_binds_nobody(dialect: Dialect) -> None:
    """An ordinary request passes byte for byte, whatever is loaded."""
    body = ODD % (json.dumps(dialect.asked("hi"))[1:-1] + ",").encode()
    async with Runner() as fake, running(fake.url, **QUICK) as q:
        fake.contexts = {"m": 16384}
        await looked(q, fake)
        assert await marks(q) == {}
        answer = await ask(q.port, "POST", dialect.path, body=body)
        assert (answer.status, dialect.text(answer)) == (200, "hi")
        (request,) = fake.requests
        assert (request.path, request.body) == (dialect.path, body)
        assert await marks(q) == {}


async def test_model_that_loads_by_itself_is_seen_and_not_loaded_again() -> None:
    body = ODD % (json.dumps(CHAT.asked("hi"))[1:-1] + ",").encode()
    async with Runner() as fake, running(fake.url, **QUICK) as q:
        await served(q, CHAT)
        await looked(q, fake)
        assert (await ask(q.port, "POST", CHAT.path, body=body)).status == 200
        assert (fake.requests[-1].path, fake.requests[-1].body) == (CHAT.path, body)
        await served(q, NATIVE_CHAT, numCtx=2048)
        assert contexts(fake) == [None, None, DEFAULT_CONTEXT]
        assert fake.loads == [("m", DEFAULT_CONTEXT)]
        assert await marks(q) == {}


async def test_mark_is_forgotten_when_the_model_unloads() -> None:
    async with Runner(models=["m", "n"]) as fake, running(fake.url, **QUICK) as q:
        await served(q, CHAT, numCtx=8192)
        await served(q, CHAT, model="n", numCtx=16384)
        await looked(q, fake)
        assert await marks(q) == {"m": 8192, "n": 16384}
        fake.unload("m")
        await told(q, {"n": 16384})
        body = json.dumps(CHAT.body("as it is")).encode()
        assert (await ask(q.port, "POST", CHAT.path, body=body)).content == "as it is"
        assert fake.requests[-1].body == body
        await served(q, NATIVE_CHAT, model="n")
        assert contexts(fake)[-1] == 16384


async def test_mark_is_forgotten_though_another_model_is_always_at_work() -> None:
    async with Runner(models=["m", "n"]) as fake, running(fake.url, **QUICK) as q:
        await served(q, CHAT, numCtx=8192)
        fake.hold()
        other = asyncio.ensure_future(served(q, CHAT, model="n", numCtx=4096))
        while len(fake.requests) != 2:
            await q.status()
        fake.unload("m")  # as Ollama does to make room
        await told(q, {"n": 4096})
        fake.release()
        await other


async def test_mark_is_kept_by_looks_while_the_model_is_still_loading() -> None:
    """It is asked for and started; not loaded yet is not unloaded."""
    async with Runner(auto=False) as fake, running(fake.url, queue__slots=2, **QUICK) as q:
        first = asyncio.ensure_future(served(q, CHAT, numCtx=8192))
        loading = await fake.arrived()
        await looked(q, fake, 4)
        assert await marks(q) == {"m": 8192}
        second = asyncio.ensure_future(served(q, NATIVE_CHAT))
        await speak(loading)
        request = await fake.arrived()  # once the model is loaded: until then one request is enough
        assert context_of(request) == 8192
        await speak(request)
        await first
        await second


async def test_runner_that_tells_no_context_is_no_reason_to_forget() -> None:
    async with Runner() as fake, running(fake.url, **QUICK) as q:
        fake.tells_context = False
        await served(q, CHAT, numCtx=8192)
        await looked(q, fake, 3)
        await served(q, CHAT)
        assert contexts(fake) == [8192, 8192]


async def test_request_that_never_started_has_raised_nothing() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        raw = await CHAT.begin(q.port, "gone", numCtx=16384)
        while (await q.status())["queue"]["waiting"] != 1:
            pass
        assert await marks(q) == {}
        await ask(q.port, "DELETE", "/llmq/requests?state=waiting")
        assert (await raw.response()).status == 499
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "open"})
        await served(q, CHAT, numCtx=8192)
        assert contexts(fake) == [8192]


async def test_context_is_decided_when_a_request_starts() -> None:
    async with Runner(auto=False) as fake, running(fake.url) as q:
        first = asyncio.ensure_future(served(q, CHAT, numCtx=8192))
        request = await fake.arrived()
        second = asyncio.ensure_future(served(q, NATIVE_CHAT, "second"))
        while (await q.status())["queue"]["waiting"] != 1:
            pass
        third = asyncio.ensure_future(served(q, CHAT, "third", numCtx=4096, priority="high"))
        while (await q.status())["queue"]["waiting"] != 2:
            pass
        for text in ("hello there", "third", "second"):
            assert request.text == text
            assert context_of(request) == 8192
            await speak(request)
            if text != "second":
                request = await fake.arrived()
        await asyncio.gather(first, second, third)


# ---- Limits ----------------------------------------------------------------------------------


async def refused(q: running, dialect: Dialect, **more: Any) -> str:
    answer = await dialect.ask(q.port, "too much", **more)
    assert (answer.status, answer.clean) == (400, True), answer
    return dialect.error(answer)


@pytest.mark.parametrize("told_by", ["limits", "hidden_limits"], ids=["tags", "show"])
@each_that_carries
async def test_models_own_limit_is_the_most(dialect: Dialect, told_by: str) -> None:
    async with Runner() as fake:
        getattr(fake, told_by)["m"] = 8192
        async with running(fake.url) as q:
            for asked in (8193, 10**30, 8192):
                await served(q, dialect, numCtx=asked)
            assert contexts(fake) == [8192] * 3
            assert fake.loads == [("m", 8192)]
            assert await marks(q) == {"m": 8192}


@each_that_carries
async def test_max_num_ctx_is_the_most(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url, upstream__max_num_ctx=6000) as q:
        fake.limits["m"] = 8192
        for asked in (6001, 8193, 6000):
            await served(q, dialect, numCtx=asked)
        assert contexts(fake) == [6000] * 3
        assert fake.loads == [("m", 6000)]
        assert await marks(q) == {"m": 6000}


async def test_max_num_ctx_is_131072_by_default() -> None:
    async with Runner() as fake, running(fake.url) as q:
        for asked in (131073, 10**30, 131072):
            await served(q, CHAT, numCtx=asked)
        assert contexts(fake) == [131072] * 3
        assert fake.loads == [("m", 131072)]


@each_native
async def test_limit_holds_for_native_clients_own_option(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        fake.limits["m"] = 8192
        await served(q, dialect, options={"num_ctx": 8193, "seed": 1})
        (request,) = fake.requests
        assert request.path == dialect.path
        assert request.json["options"] == {"num_ctx": 8192, "seed": 1}
        assert await marks(q) == {"m": 8192}


@pytest.mark.parametrize(
    "bad", ["8192", "", "0", 1.5, -1.5, True, False, [], [8192], {}, {"a": 1}, 1e999]
)
@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, NATIVE_CHAT, EMBED], ids=repr)
async def test_context_that_is_no_good_number_is_told(dialect: Dialect, bad: Any) -> None:
    async with Runner() as fake, running(fake.url) as q:
        assert await refused(q, dialect, numCtx=bad)
        assert fake.requests == []
        answer = await CHAT.ask(q.port, "x", numCtx=bad)
        assert bad == 1e999 or answer.json()["error"]["param"] == "numCtx"


@pytest.mark.parametrize("none", [None, 0, -1, -(10**30)])
async def test_null_and_0_and_less_are_the_default(none: int | None) -> None:
    async with Runner() as fake, running(fake.url) as q:
        for dialect in CARRY:
            await served(q, dialect, numCtx=none)
            assert fake.requests[-1].path == dialect.path
            assert fake.requests[-1].json == dialect.body("hello there")
        assert contexts(fake) == [None] * len(CARRY)
        assert await marks(q) == {}


@pytest.mark.parametrize("none", [None, 0, -1])
@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS, NATIVE_CHAT, GENERATE], ids=repr)
async def test_default_is_the_shared_one_where_there_is_one(
    dialect: Dialect, none: int | None
) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, CHAT, numCtx=8192)
        await served(q, dialect, numCtx=none)
        if dialect in NATIVE:
            await served(q, dialect, options={"num_ctx": none})
        assert set(contexts(fake)) == {8192}
        assert fake.loads == [("m", 8192)]


@pytest.mark.parametrize("none", [0, -1])
@each_native
async def test_native_option_of_0_or_less_sets_no_mark(dialect: Dialect, none: int) -> None:
    fields = json.dumps({**dialect.asked("hi"), "options": {"num_ctx": none}})[1:-1] + ","
    body = ODD % fields.encode()
    async with Runner() as fake, running(fake.url) as q:
        assert (await ask(q.port, "POST", dialect.path, body=body)).status == 200
        assert [(one.path, one.body) for one in fake.requests] == [(dialect.path, body)]
        assert await marks(q) == {}


@pytest.mark.parametrize("odd", [None, "x", 0, -5, 1.5, [], {"num_ctx": None}, {"num_ctx": "x"}])
async def test_odd_options_never_break_llmq(odd: Any) -> None:
    async with Runner(auto=False) as fake, running(fake.url) as q:
        for options in (odd, {"num_ctx": odd}):
            for mark in ({}, {"numCtx": 8192}):
                asked = asyncio.ensure_future(NATIVE_CHAT.ask(q.port, "x", options=options, **mark))
                arrived = asyncio.ensure_future(fake.arrived())
                await asyncio.wait({asked, arrived}, return_when=asyncio.FIRST_COMPLETED)
                if arrived.done():
                    await arrived.result().status(400, {"error": "options are odd"})
                arrived.cancel()
                answer = await asked
                assert answer.status == 400 or arrived.done(), answer


# ---- Web pages -------------------------------------------------------------------------------


@each_that_carries
@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
async def test_page_of_a_foreign_origin_cannot_raise_it(dialect: Dialect, origin: str) -> None:
    page = {"headers": {"Origin": origin}}
    native = dialect in NATIVE
    async with Runner() as fake, running(fake.url) as q:
        await served(q, dialect, numCtx=32768, **page)
        assert contexts(fake) == [None], "it cannot set one either"
        await served(q, CHAT, numCtx=8192)
        await served(q, dialect, numCtx=32768, **page)
        await served(q, dialect, numCtx=4096, **page)
        await served(q, dialect, **page)
        if native:
            await served(q, dialect, options={"num_ctx": 32768}, **page)
        assert contexts(fake)[1] == 8192
        assert set(contexts(fake)[2:]) == {None if dialect in EMBEDS else 8192}
        assert await marks(q) == {"m": 8192}


@each_native
async def test_native_option_of_a_foreign_page_sets_none(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, dialect, options={"num_ctx": 32768, "seed": 1}, headers=FOREIGN)
        assert (fake.requests[-1].json.get("options") or {}) == {"seed": 1}
        assert await marks(q) == {}


async def test_page_of_this_box_can_raise_it() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, CHAT, numCtx=8192, headers=HOME)
        assert contexts(fake) == [8192]


# ---- The starting context --------------------------------------------------------------------


@each_that_carries
async def test_starting_context_is_what_models_begin_with(dialect: Dialect) -> None:
    unasked = None if dialect in EMBEDS else 8192
    settings = {"upstream__num_ctx": 8192, "cache__embeddings": False, **QUICK}
    async with Runner() as fake, running(fake.url, **settings) as q:
        await served(q, dialect)
        await served(q, dialect, numCtx=4096)
        assert contexts(fake) == [unasked, 8192]
        await looked(q, fake)
        fake.unload("m")
        await looked(q, fake)
        await served(q, dialect)
        assert contexts(fake) == [unasked, 8192, unasked]
        await served(q, dialect, numCtx=16384)
        assert contexts(fake)[-1] == 16384


async def test_starting_context_beyond_a_models_own_is_no_mistake_of_the_client() -> None:
    async with Runner() as fake:
        fake.limits["m"] = 4096
        async with running(fake.url, upstream__num_ctx=8192) as q:
            await served(q, CHAT)
            assert contexts(fake) in ([4096], [None])


@pytest.mark.parametrize(
    ("flags", "env"),
    [(["--num-ctx", "8192"], {}), ([], {"OLLAMA_NUM_CTX": "8192"})],
    ids=["flag", "OLLAMA_NUM_CTX"],
)
async def test_starting_context_is_a_flag_and_ollamas_variable(
    flags: list[str], env: dict[str, str]
) -> None:
    async with Runner() as fake:
        async with Process("--port", "0", "--backend", fake.url, *flags, env=env) as p:
            assert CHAT.text(await CHAT.ask(p.port, "one two")) == "one two"
            assert contexts(fake) == [8192]
            assert await p.ended() == 0


# ---- Control ---------------------------------------------------------------------------------


async def test_reset_forgets_what_was_asked_for() -> None:
    async with Runner(models=["m", "n"]) as fake, running(fake.url) as q:
        await served(q, CHAT, numCtx=8192)
        await served(q, CHAT, model="n", numCtx=8192)
        order = {"action": "reset_context", "model": "m"}
        answer = await ask(q.port, "POST", "/llmq/models", json=order)
        assert answer.status in (200, 202), answer
        assert await marks(q) == {"n": 8192}
        await served(q, CHAT)
        assert fake.requests[-1].path == CHAT.path
        await served(q, CHAT, numCtx=4096)
        assert contexts(fake) == [8192, 8192, None, 4096]


@pytest.mark.parametrize(
    ("order", "status"),
    [
        ({"action": "reset_context"}, 400),
        ({"action": "reset_context", "model": 3}, 400),
        ({"action": "explode", "model": "m"}, 400),
        ({"model": "m"}, 400),
        ([], 400),
    ],
)
async def test_order_that_makes_no_sense_is_told(order: Any, status: int) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        assert (await ask(q.port, "POST", "/llmq/models", json=order)).status == status


@pytest.mark.parametrize(
    "headers", [FOREIGN, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}], ids=str
)
async def test_foreign_page_cannot_reset(headers: dict[str, str]) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await served(q, CHAT, numCtx=8192)
        order = {"action": "reset_context", "model": "m"}
        answer = await ask(q.port, "POST", "/llmq/models", json=order, headers=headers)
        assert answer.status == 403
        assert await marks(q) == {"m": 8192}


async def test_order_needs_its_media_type() -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        body = b'{"action":"reset_context","model":"m"}'
        await raw.send(http("POST", "/llmq/models", {"Content-Type": "text/plain"}, body))
        assert (await raw.response()).status == 415


async def test_two_backends_keep_their_own_marks_in_the_snapshot() -> None:
    async with Runner(models=["a"]) as one, Runner(models=["b"]) as two:
        async with running(one.url, two.url) as q:
            await served(q, CHAT, model="a", numCtx=8192)
            await served(q, CHAT, model="b", numCtx=16384)
            assert [await marks(q, 0), await marks(q, 1)] == [{"a": 8192}, {"b": 16384}]
