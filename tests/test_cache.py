"""What was answered before is answered at once, and never to whom it does not belong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, Callable

import pytest

import llmq
from tests.fake_ollama import (
    Runner,
    arrival,
    chat_end,
    generate_end,
    least,
    post,
    refuse,
    staged,
    told,
    whole,
)
from tests.fakes import Answer, FakeRequest, ask, chat, completion, running, sse

EMBED, CHAT, MESSAGES = "/v1/embeddings", "/v1/chat/completions", "/v1/messages"
COLD: dict[str, Any] = {"temperature": 0}
NATIVE_COLD: dict[str, Any] = {"options": COLD, "stream": False}
CHATS = {  # each route of chats, and what makes its answer one that may be kept
    CHAT: COLD,
    "/v1/completions": COLD,
    MESSAGES: COLD,
    "/api/chat": NATIVE_COLD,
    "/api/generate": NATIVE_COLD,
}
STREAMED = "text/event-stream"


def embed(text: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "m", "input": text, **more}


def document(path: str, text: str, reason: str | None = "") -> dict[str, Any]:
    """A whole answer of this route that says `text`; `reason` is why it ended."""
    vector = [float(text) if text.isdecimal() else 0.5]
    if path in ("/api/chat", "/api/generate"):
        return (chat_end if path == "/api/chat" else generate_end)(reason or "stop", text)
    if path == MESSAGES:
        said = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": text}]}
        usage = {"input_tokens": 1, "output_tokens": 1}
        return {"id": "msg_1", "stop_reason": reason or "end_turn", "usage": usage, **said}
    if path in ("/api/embed", "/api/embeddings"):
        return {"model": "m", "embeddings": [vector]} if path[-1] == "d" else {"embedding": vector}
    if path in (CHAT, "/v1/completions"):
        found = completion("m", text)
        found["choices"][0].update(text=text, finish_reason="stop" if reason == "" else reason)
        return found
    row = {"object": "embedding", "index": 0, "embedding": vector}
    return {"object": "list", "data": [row], "model": "m", "usage": {"prompt_tokens": 1}}


def numbered(reason: str | None = "") -> Callable[[FakeRequest], Any]:
    """A reply for a Runner: no two of its answers are the same."""
    runs = count(1)

    async def reply(request: FakeRequest) -> None:
        await whole(request, document(request.path, str(next(runs)), reason))

    return reply


@contextlib.asynccontextmanager
async def counting(
    kind: str = "ollama", models: Any = ("m",), reason: str | None = "", **settings: Any
) -> AsyncIterator[tuple[Any, running]]:
    """A runner whose answers are numbered, and llmq in front of it."""
    async with Runner(models, kind, reply=numbered(reason)) as runner:
        async with running(runner.url, **settings) as q:
            yield runner, q


@contextlib.asynccontextmanager
async def by_hand(kind: str = "ollama", **settings: Any) -> AsyncIterator[tuple[Any, running]]:
    async with Runner(kind=kind) as runner, running(runner.url, **settings) as q:
        await told(q)
        yield runner, q


def how(answer: Answer) -> str:
    """What the cache did for it."""
    assert answer.status == 200, answer
    return answer.headers.get("x-cache", "")


async def asked(q: running, body: Any, path: str = EMBED, **headers: str) -> Answer:
    """`headers` with _ in place of -."""
    return await post(q, path, body, {name.replace("_", "-"): v for name, v in headers.items()})


async def twice(q: running, body: Any, path: str = EMBED, **headers: str) -> list[str]:
    return [how(await asked(q, body, path, **headers)) for _ in range(2)]


async def looked_at(q: running) -> None:
    """Every backend has been asked anew what it has."""
    monitor, backends = q.gateway.monitor, q.gateway.fleet.backends.values()
    await asyncio.wait([monitor.start_probe(one) for one in backends])


async def reloaded(q: running, **settings: Any) -> None:
    values = {**q.values, **{key.replace("__", "."): one for key, one in settings.items()}}
    q.service.read = lambda: llmq.merge_layers([("file", values)])
    answer = await ask(q.port, "POST", "/llmq/reload", json={})
    assert answer.json() == {"config_error": None}


# ---- The key ---------------------------------------------------------------------------------

NAMES = ["input", "dimensions", "options", "truncate", "user", "ü", "temperature", "seed", "tools"]
LEAVES = [None, True, False, 0, 1, -1, 0.0, 1.0, -0.0, 1e300, 2**70, "", "1", "hi", "ü", "\ud800"]


def anything(chance: random.Random, depth: int = 0) -> Any:
    if depth < 3 and chance.random() < 0.4:
        inner = [anything(chance, depth + 1) for _ in range(chance.randint(0, 3))]
        names = chance.sample([*NAMES, *llmq.UNTELLING], len(inner))
        return dict(zip(names, inner)) if chance.random() < 0.5 else inner
    return chance.choice(LEAVES)


def another(chance: random.Random, value: Any) -> Any:
    """What is not the same JSON: one place of it is changed, added or gone."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        at = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        if chance.random() < 0.3:
            del changed[at]
        else:
            changed[at] = another(chance, value[at])
        return changed
    if isinstance(value, dict):
        return {**value, "new": None}
    return chance.choice([[value], *(one for one in LEAVES if repr(one) != repr(value))])


def reordered(chance: random.Random, value: Any) -> Any:
    """The same JSON, its members in another order."""
    if isinstance(value, list):
        return [reordered(chance, one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: reordered(chance, value[name]) for name in chance.sample([*value], len(value))}


@pytest.mark.parametrize("seed", range(5))
def test_keys_differ_with_each_place_of_a_body_and_not_with_its_order(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(400):
        body = {name: anything(chance) for name in chance.sample(NAMES, 4)}
        key = llmq.answer_key(body, "route", "model", "digest")
        again = {**reordered(chance, body), chance.choice(llmq.UNTELLING): anything(chance)}
        assert llmq.answer_key(again, "route", "model", "digest") == key, (body, again)
        name = chance.choice([*body])
        for other in ({**body, name: another(chance, body[name])}, {**body, "new": None}):
            assert llmq.answer_key(other, "route", "model", "digest") != key, (body, other)


def test_keys_differ_with_all_that_is_told_besides() -> None:
    facts = [("r", "m", "d"), ("r", "m", "e"), ("r", "x", "d"), ("r", "md"), ("r", "m d"), ("rmd",)]
    facts += [("r", "m", ""), ("r", "m"), ("r", '"m', 'd"'), ("r", "m,d"), ("r", 'm","d')]
    assert len({llmq.answer_key({"input": "hi"}, *one) for one in facts}) == len(facts)
    assert {len(llmq.answer_key({"input": "hi"}, *one)) for one in facts} == {32}  # SHA-256


async def test_an_answer_that_tells_how_it_came_about_is_not_kept() -> None:
    async with counting() as (_, q):
        body = b'{"model":"m","input":"hi","router":{"any":"thing"}}'
        answers = [await asked(q, body, EMBED) for _ in range(2)]
        assert ["x-cache" in one.headers for one in answers] == [False, False]
        assert answers[0].body != answers[1].body


SAME = [
    b'{"input":"hi","model":"m","dimensions":3}',
    b' {\n"dimensions" : 3 ,\t"model": "m", "input": "\\u0068i" }\r\n',
    b'{"priority":"low","model":"m","input":"hi","dimensions":3}',
    b'{"keep_alive":"5m","model":"m","input":"hi","dimensions":3}',
]


@pytest.mark.parametrize("path", [EMBED, "/api/embed"])
async def test_order_space_and_members_that_change_no_answer_do_not_matter(path: str) -> None:
    async with counting() as (runner, q):
        answers = [await asked(q, body, path) for body in SAME]
        assert [how(one) for one in answers] == ["MISS", *["HIT"] * 3]
        assert {one.body for one in answers} == {answers[0].body}
        assert {one.headers["content-type"] for one in answers} == {
            answers[0].headers["content-type"]
        }
        assert len({one.headers["x-llmq-id"] for one in answers}) == len(answers)
        assert len(runner.requests) == 1


async def test_each_member_route_name_and_pin_that_may_change_an_answer_has_its_own() -> None:
    bodies: list[Any] = [
        *(embed("a"), embed("b"), embed(["a"]), embed(["a", "b"]), embed(["b", "a"]), embed("A")),
        *(embed("a", dimensions=8), embed("a", dimensions=9), embed("a", user="u")),
        *(embed("a", encoding_format="base64"), embed("a", truncate=False), embed([1, 2])),
        *(embed("a", options={"num_ctx": 64}), embed("a", options={"num_ctx": 65})),
        {**embed("a"), "model": "m:latest"},
    ]
    cases: list[Any] = [
        (body, EMBED, {}) for body in bodies if not isinstance(body.get("options"), dict)
    ]
    cases += [(body, "/api/embed", {}) for body in bodies if body["input"] != [1, 2]]
    cases += [({"model": "m", "prompt": "a"}, "/api/embeddings", {})]
    async with counting(backends={}) as (runner, q):
        await reloaded(q, backends={"box": {"url": runner.url}})
        cases += [(embed("a"), EMBED, {"X_LLMQ_Backend": "box"})]
        first = [await asked(q, body, path, **headers) for body, path, headers in cases]
        again = [await asked(q, body, path, **headers) for body, path, headers in cases]
        assert [how(one) for one in first] == ["MISS"] * len(cases)
        assert [how(one) for one in again] == ["HIT"] * len(cases)
        assert [one.body for one in first] == [one.body for one in again]
        assert len(runner.requests) == len(cases)


# ---- The bounds ------------------------------------------------------------------------------


def test_there_are_never_more_bytes_than_may_be_and_who_was_asked_for_last_stays() -> None:
    chance, cache, most = random.Random(1), llmq.Cache(), 20_000
    order: list[bytes] = []  # as it must be
    for now in range(2000):
        key = b"%d" % chance.randrange(60)
        if chance.random() < 0.5:
            found = cache.get(key, now)
            assert (found is not None) == (key in order)
        else:
            cache.put(key, llmq.Answer(bytes(chance.randrange(2000)), "t", 1e9), most)
        order = [one for one in order if one != key] + [key] * (key in cache.answers)
        order = order[len(order) - len(cache.answers) :]
        assert list(cache.answers) == order
        size = sum(len(one.body) + llmq.ENTRY_BYTES for one in cache.answers.values())
        assert cache.size == size <= most
    assert len(order) > 5
    cache.fit(0)
    assert (cache.size, len(cache.answers)) == (0, 0)


def test_an_answer_that_would_displace_all_others_is_not_kept() -> None:
    cache, small, large = llmq.Cache(), llmq.Answer(b"x", "t", 9), llmq.Answer(b"x" * 2000, "t", 9)
    cache.put(b"a", small, 8000)
    cache.put(b"b", small, 8000)
    cache.put(b"c", large, 8000)
    assert list(cache.answers) == [b"a", b"b"]
    cache.put(b"a", large, 8000)  # and what it had said before holds no more
    assert list(cache.answers) == [b"b"]
    cache.put(b"b", small, 0)
    assert (cache.size, len(cache.answers)) == (0, 0)


def test_an_answer_holds_for_its_time_and_not_a_moment_longer() -> None:
    cache = llmq.Cache()
    cache.put(b"a", llmq.Answer(b"x", "t", 10.0), 9999)
    cache.put(b"b", llmq.Answer(b"y", "t", 20.0), 9999)
    assert cache.get(b"a", 9.9) == (b"x", "t", 10.0)
    assert cache.get(b"a", 10.0) is None
    cache.expire(10.0)
    assert list(cache.answers) == [b"b"]
    cache.expire(20.0)
    assert (cache.size, len(cache.answers)) == (0, 0)


async def test_answers_are_kept_as_long_as_their_route_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = [1e9]
    monkeypatch.setattr(time, "time", lambda: times[-1])
    async with counting(cache__chat=True) as (_, q):
        limits = q.service.settings.cache
        assert (limits.embeddings_ttl, limits.chat_ttl) == (86_400, 300)
        for at, embedded, said in (0, "MISS", "MISS"), (299, "HIT", "HIT"), (301, "HIT", "MISS"):
            times.append(1e9 + at)
            assert how(await asked(q, embed())) == embedded
            assert how(await asked(q, chat("hi", **COLD), CHAT)) == said
        for at, embedded in (86_399, "HIT"), (86_401, "MISS"):
            times.append(1e9 + at)
            assert how(await asked(q, embed())) == embedded


async def test_the_setting_bounds_what_is_in_memory_also_after_a_reload() -> None:
    async with counting(cache__max_bytes="8000") as (_, q):
        for number in range(40):
            assert how(await asked(q, embed(f"{number}"))) == "MISS"
            assert (await q.status())["cache"]["bytes"] <= 8000
        assert await twice(q, embed("39")) == ["HIT"] * 2
        assert how(await asked(q, embed("0"))) == "MISS"
        await reloaded(q, cache__max_bytes="1000")
        await q.service.keeper.step()
        assert 0 < (await q.status())["cache"]["bytes"] <= 1000


# ---- Before the queue ------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True])
async def test_what_is_known_is_answered_though_the_only_slot_is_taken(paused: bool) -> None:
    async with by_hand() as (runner, q):
        first = post(q, EMBED, embed("known"))
        await whole(await arrival(first, runner), document(EMBED, "1"))
        busy = post(q, EMBED, embed("new"))
        held = await arrival(busy, runner)
        if paused:
            q.gateway.set_mode(llmq.Mode.PAUSED)
        answer = await asked(q, embed("known"))  # which would never come, were it to wait
        assert (how(answer), answer.body) == ("HIT", (await first).body)
        assert "x-llmq-backend" not in answer.headers
        queue = (await q.status())["queue"]
        assert (queue["running"], queue["waiting"]) == (1, 0)
        assert not held.done.is_set()
        await whole(held, document(EMBED, "2"))
        assert how(await busy) == "MISS"
        assert len(runner.requests) == 2


# ---- What is kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHATS)
async def test_chat_that_leaves_nothing_to_chance_is_kept_where_that_is_wanted(path: str) -> None:
    kind = "llamacpp" if path == MESSAGES else "ollama"
    body = least(path, **CHATS[path])
    async with counting(kind) as (_, q):
        assert await twice(q, body, path) == ["", ""]
    async with counting(kind, cache__chat=True) as (runner, q):
        assert await twice(q, body, path) == ["MISS", "HIT"]
        for more in {"seed": 1}, {"stop": ["x"]}, {"system": "x"}, {"max_tokens": 3}:
            assert how(await asked(q, {**body, **more}, path)) == "MISS"
        assert how(await asked(q, body, path, traceparent="x", User_Agent="x")) == "HIT"
        assert len(runner.requests) == 5


@pytest.mark.parametrize("field", ["OpenAI_Beta", "anthropic_beta", "anthropic_version"])
async def test_fields_that_say_what_a_body_means_are_told_apart(field: str) -> None:
    async with counting("llamacpp", cache__chat=True) as (_, q):
        body = least(MESSAGES, **COLD)
        assert await twice(q, body, MESSAGES) == ["MISS", "HIT"]
        assert await twice(q, body, MESSAGES, **{field: "x"}) == ["MISS", "HIT"]


def chance_of(path: str) -> list[Any]:
    """Bodies for this route whose answers are not kept."""
    body, native = least(path, **CHATS[path]), path.startswith("/api")
    warm: list[Any] = [1, 0.01, None, "0", False]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    found = [{**body, "stream": True}]
    if native:  # where `temperature` beside the options says nothing
        found += [{**body, "options": {"temperature": heat}} for heat in warm if heat != "0"]
        found += [{**body, "options": {}, "temperature": 0}]
        found += [{**body, "options": {"temperature": 1}, "temperature": 0}]
        found += [{name: one for name, one in body.items() if name != "stream"}]
    else:
        found += [{**body, "temperature": heat} for heat in (1, 0.01, None)]
        found += [{**least(path), "options": {"temperature": 0}}]
    if path in (CHAT, MESSAGES, "/api/chat"):
        found += [{**body, "tools": tools}]
    return found


@pytest.mark.parametrize("path", CHATS)
async def test_chat_that_leaves_something_to_chance_or_streams_is_never_kept(path: str) -> None:
    kind = "llamacpp" if path == MESSAGES else "ollama"
    async with counting(kind, cache__chat=True) as (_, q):
        kept = []
        for body in chance_of(path):
            answers = [await asked(q, body, path) for _ in range(2)]
            kept += [body for one in answers if "x-cache" in one.headers]
        assert kept == []
        assert (await q.status())["cache"] == {
            "answers": 0, "bytes": 0, "hit": 0, "joined": 0, "miss": 0
        }  # fmt: skip


async def test_chat_whose_temperature_the_models_settings_raise_is_not_kept() -> None:
    rows = {"m": {"set": {"temperature": 0.8}}}
    async with counting(cache__chat=True, models=("m",)) as (_, q):
        await reloaded(q, models=rows)
        assert await twice(q, chat("hi", **COLD), CHAT) == ["", ""]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *((path, "length") for path in CHATS if path != MESSAGES),
        *((MESSAGES, "max_tokens"), (CHAT, None), (CHAT, "abort")),
    ],
)
async def test_what_was_cut_or_is_only_a_part_is_never_kept(path: str, reason: str | None) -> None:
    kind = "llamacpp" if path == MESSAGES else "ollama"
    async with counting(kind, reason=reason, cache__chat=True) as (runner, q):
        assert await twice(q, least(path, **CHATS[path]), path) == ["MISS", "MISS"]
        assert len(runner.requests) == 2


FAULTS: dict[str, Any] = {
    "an error": lambda request: refuse(request, 500, {"error": "no"}),
    "an error with status 200": lambda request: whole(request, {"error": {"message": "no"}}),
    "no JSON": lambda request: whole(request, b"hello"),
    "half": staged([b'{"object":"list",', b'"data":['], "application/json", end=False),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("path", [EMBED, CHAT])
async def test_what_failed_or_broke_off_is_never_kept(path: str, fault: Any) -> None:
    async with by_hand(queue__max_attempts=1, cache__chat=True) as (runner, q):
        first = post(q, path, least(path, **COLD))
        await fault(await arrival(first, runner))
        assert (await first).status >= 500
        again = post(q, path, least(path, **COLD))
        await whole(await arrival(again, runner), document(path, "1"))
        assert how(await again) == "MISS"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/responses", "/v1/audio/transcriptions"])
async def test_rerank_responses_and_speech_are_never_kept(path: str) -> None:
    body, headers = least(path, temperature=0) if "audio" not in path else FORM, {}
    if path.endswith("transcriptions"):
        headers = {"Content_Type": "multipart/form-data; boundary=b"}
    async with counting("vllm", cache__chat=True) as (runner, q):
        assert await twice(q, body, path, **headers) == ["", ""]
        assert len(runner.requests) == 2


FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'


async def test_embeddings_that_ask_for_a_stream_are_kept_whole_or_not_at_all() -> None:
    async with counting() as (_, q):
        answers = [await asked(q, embed(stream=True)) for _ in range(2)]
        assert [one.json() for one in answers] == [document(EMBED, "1")] * 2
    async with by_hand() as (runner, q):
        for _ in range(2):
            first = post(q, EMBED, embed(stream=True))
            request = await arrival(first, runner)
            await staged([sse({"a": 1}), sse("[DONE]")], STREAMED)(request)
            assert "x-cache" not in (await first).headers or (await first).status >= 500
        assert (await q.status())["cache"]["answers"] == 0


@pytest.mark.deadline(20)
async def test_heavy_body_is_not_kept_nor_read_for_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bool] = []
    make_key = llmq.answer_key

    def noted(*facts: Any) -> bytes:
        read.append(threading.current_thread() is threading.main_thread())
        return make_key(*facts)

    monkeypatch.setattr(llmq, "answer_key", noted)
    async with counting() as (runner, q):
        body = json.dumps(embed(["x" * 90] * 60_000)).encode()
        assert await twice(q, body) == ["", ""]
        assert read == []
        assert await twice(q, embed("x" * 3_000_000)) == ["MISS", "HIT"]
        assert read == [False, False]  # while the event loop goes on
        assert len(runner.requests) == 3


# ---- What clients say of it ------------------------------------------------------------------


async def test_no_cache_asks_anew_and_keeps_what_comes() -> None:
    async with counting() as (runner, q):
        one, two = [await asked(q, embed(), Cache_Control="no-cache") for _ in range(2)]
        assert [how(one), how(two)] == ["MISS", "MISS"]
        three = await asked(q, embed())
        assert (how(three), three.body) == ("HIT", two.body)
        assert two.body != one.body
        assert len(runner.requests) == 2


async def test_no_cache_joins_nobody() -> None:
    async with by_hand("vllm", queue__slots=2) as (runner, q):
        first = post(q, EMBED, embed())
        held = await arrival(first, runner)
        second = post(q, EMBED, embed(), {"Cache-Control": "no-cache"})
        await whole(await arrival(second, runner), document(EMBED, "2"))
        await whole(held, document(EMBED, "1"))
        assert [how(await one) for one in (first, second)] == ["MISS", "MISS"]


STORE_NOTHING = ["no-store", "No-Store", "no-store, no-cache", "no-cache, no-store"]
STORE_NOTHING += ["max-age=0, no-cache, no-store, must-revalidate", "no-cache,no-store"]


@pytest.mark.parametrize("words", STORE_NOTHING)
async def test_no_store_neither_reads_nor_keeps(words: str) -> None:
    async with counting() as (runner, q):
        assert await twice(q, embed(), Cache_Control=words) == ["", ""]
        assert (await q.status())["cache"]["answers"] == 0
        assert how(await asked(q, embed())) == "MISS"
        assert how(await asked(q, embed(), Cache_Control=words)) == ""
        assert len(runner.requests) == 4


async def test_answers_are_shared_with_those_only_who_may_use_the_model() -> None:
    keys: Any = {name: f"sk-{name}-5f1d7c0a9b3e" for name in ("alice", "bob", "carol")}
    rows = {name: {"key": key, "models": ["m"]} for name, key in keys.items()}
    rows["bob"]["models"] = ["other"]
    async with counting(keys=rows) as (runner, q):
        answers = [await asked(q, embed(), Authorization=f"Bearer {key}") for key in keys.values()]
        alice, bob, carol = answers
        assert [one.status for one in answers] == [200, 403, 200]
        assert [how(alice), how(carol)] == ["MISS", "HIT"]
        assert carol.body == alice.body
        assert "x-cache" not in bob.headers
        assert (await asked(q, embed())).status == 401
        counts = q.gateway.recall.counts
        assert (counts["hit"], counts["miss"], len(runner.requests)) == (1, 1, 1)


# ---- Whose answer it was ---------------------------------------------------------------------


def tagged(digest: str) -> tuple[int, Any]:
    row = {"name": "m:latest", "model": "m:latest", "size": 1, "digest": digest, "details": {}}
    return 200, {"models": [row, {**row, "name": "n:latest", "digest": "other"}]}


async def test_another_digest_is_another_model_and_others_keep_theirs() -> None:
    async with Runner(["m:latest", "n:latest"], reply=numbered()) as runner:
        runner.probe_answers["/api/tags"] = tagged("one")
        async with running(runner.url) as q:
            assert await twice(q, embed()) == ["MISS", "HIT"]
            assert await twice(q, {**embed(), "model": "n"}) == ["MISS", "HIT"]
            runner.probe_answers["/api/tags"] = tagged("two")
            await looked_at(q)
            assert await twice(q, embed()) == ["MISS", "HIT"]
            assert how(await asked(q, {**embed(), "model": "n"})) == "HIT"


async def down_and_up(q: running, runner: Runner) -> None:
    (backend,) = q.gateway.fleet.backends.values()
    await runner.stop_listening()
    runner.drop_connections()
    await looked_at(q)
    assert not backend.usable
    await runner.listen_again()
    await looked_at(q)
    assert backend.usable


@pytest.mark.parametrize(("kind", "after"), [("ollama", "HIT"), ("llamacpp", "MISS")])
async def test_runner_that_was_down_has_other_models_unless_it_tells_digests(
    kind: str, after: str
) -> None:
    async with counting(kind) as (runner, q):
        assert await twice(q, embed()) == ["MISS", "HIT"]
        await looked_at(q)
        assert how(await asked(q, embed())) == "HIT"
        await down_and_up(q, runner)
        assert how(await asked(q, embed())) == after


async def test_other_list_of_models_is_another_model_where_no_digest_is_told() -> None:
    async with counting("llamacpp", ["m"]) as (runner, q):
        assert await twice(q, embed()) == ["MISS", "HIT"]
        runner.models.append("n")
        await looked_at(q)
        assert await twice(q, embed()) == ["MISS", "HIT"]


# ---- What is told of it ----------------------------------------------------------------------


async def test_pages_from_elsewhere_may_read_what_the_cache_did() -> None:
    async with counting(server__cors_origins=["https://page.example"]) as (_, q):
        answer = await asked(q, embed(), Origin="https://page.example")
        shown = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert "x-llmq-backend" in shown
        assert "x-cache" in shown


async def test_reload_switches_it_off_and_frees_its_memory_and_on_again() -> None:
    async with counting() as (runner, q):
        assert await twice(q, embed()) == ["MISS", "HIT"]
        await reloaded(q, cache__embeddings=False)
        assert await twice(q, embed()) == ["", ""]
        await q.service.keeper.step()
        cache = (await q.status())["cache"]
        assert (cache["answers"], cache["bytes"]) == (0, 0)
        await reloaded(q, cache__embeddings=True)
        assert await twice(q, embed()) == ["MISS", "HIT"]
        assert len(runner.requests) == 4


async def test_chats_are_told_apart_by_each_byte_as_runners_may_read_them_otherwise() -> None:
    """One may take the first of two members of one name, and keeps to the order of a schema."""
    said = '{"model":"m","stream":false,"temperature":0,"messages":[{"role":"user",%s}]}'
    one, other = '"content":"other","content":"hi"', '"content":"hi"'
    async with counting(cache__chat=True) as (_, q):
        for content in (one, other):
            answer = await asked(q, (said % content).encode(), CHAT)
            assert how(answer) == "MISS"
        assert how(await asked(q, (said % other).encode(), CHAT)) == "HIT"
