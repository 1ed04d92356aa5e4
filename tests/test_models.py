"""Models loaded and unloaded on order, and requests as the settings of their model want them."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import date, time
from typing import Any

import pytest

import llmq
from tests.derived import build_settings
from tests.documents import documents, strict
from tests.fake_ollama import (
    Ollama,
    Runner,
    arrival,
    chat_end,
    chat_line,
    ended,
    exchange,
    generate_end,
    least,
    line,
    post,
    refuse,
    staged,
    whole,
)
from tests.fakes import Answer, ask, chat, completion, eventually, run_llmq, running

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
NATIVE_CHAT, GENERATE, EMBED = "/api/chat", "/api/generate", "/api/embed"
ROUTES = (CHAT, COMPLETIONS, MESSAGES, RESPONSES, NATIVE_CHAT, GENERATE, EMBED)
QUICK = {"upstream__probe_interval": 0.1}


def having(**row: Any) -> dict[str, Any]:
    """The settings that give model m this row."""
    return {"models": {"m": row}}


async def order(q: running, action: str, model: str = "m", **more: Any) -> Answer:
    change = {"action": action, "model": model, **more}
    return await ask(q.port, "POST", "/llmq/models", json=change)


async def loaded(q: running, expected: list[str], number: int = 0) -> None:
    """Return once the snapshot shows these models loaded; the deadline ends it otherwise."""
    while (await q.status())["backends"][number]["loaded"] != expected:
        pass


async def known(q: running) -> None:
    """Return once every backend is up."""
    while any(one["state"] != "up" for one in (await q.status())["backends"]):
        pass


async def sent(path: str, body: dict[str, Any], kind: str = "openai", **row: Any) -> Any:
    """What a runner gets of this request for model m, with this row; path and body."""
    async with Runner(kind=kind) as runner, running(runner.url, **having(**row)) as q:
        await known(q)
        asked = post(q, path, body)
        request = await arrival(asked, runner)
        await request.status(400, {"error": {"message": "seen", "type": "x"}})
        await asked
        return request


# ---- Errands: an Ollama ----------------------------------------------------------------------


async def test_order_to_load_is_a_ticket_of_class_high_and_recorded() -> None:
    async with Ollama() as fake, running(fake.url) as q:
        await known(q)
        answer = await order(q, "load", num_ctx=8192, keep_alive="5m")
        facts = answer.json()
        assert (answer.status, facts["action"], facts["model"]) == (202, "load", "m")
        assert facts["backend"] == (await q.status())["backends"][0]["name"]
        await loaded(q, ["m:latest"])
        assert fake.loads == [("m:latest", 8192)]
        (request,) = [one for one in fake.requests if one.path == GENERATE]
        assert request.json["keep_alive"] == "5m"
        assert request.json["options"] == {"num_ctx": 8192}
        assert not request.json.get("prompt")
        (record,) = await ended(q)
        assert (record["id"], record["class"], record["outcome"]) == (facts["id"], "high", "done")
        assert record["route"] == "/llmq/models"


async def test_load_waits_for_its_turn_can_be_seen_and_cancelled_and_is_not_ordered_twice() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await known(q)
        busy = post(q, NATIVE_CHAT, least(NATIVE_CHAT))
        request = await arrival(busy, fake)
        ident = (await order(q, "load")).json()["id"]
        while (await q.status())["queue"]["waiting"] != 1:
            pass
        shown = [one for one in (await q.status())["requests"] if one["state"] == "waiting"]
        assert [(one["id"], one["class"], one["model"]) for one in shown] == [(ident, "high", "m")]
        assert (await order(q, "load")).status == 409
        assert (await ask(q.port, "DELETE", f"/llmq/requests/{ident}")).status == 200
        await whole(request, chat_end())
        await busy
        assert [one["outcome"] for one in await ended(q, 2)] == ["done", "cancelled"]
        assert [one.path for one in fake.requests] == [NATIVE_CHAT]


async def test_of_many_orders_for_the_same_at_once_one_is_taken() -> None:
    """ollamaMQ looked first and noted later: two could load at one backend."""
    async with Runner(["m"], kind="ollama") as fake, running(fake.url) as q:
        await known(q)
        answers = await asyncio.gather(*(order(q, "load") for _ in range(20)))
        assert sorted(one.status for one in answers) == [202, *[409] * 19]
        request = await fake.arrived()
        await request.status(200, {"done": True, "done_reason": "load"})
        await ended(q)
        assert len(fake.requests) == 1


@pytest.mark.parametrize("name", ["", 0, "ox", "http://127.0.0.1"])
async def test_order_for_a_backend_by_less_than_its_name_is_for_none(name: Any) -> None:
    """ollamaMQ took the first whose url has these letters, and of no letters the first."""
    async with Runner(["m"], kind="ollama") as fake:
        async with running(backends={"box": {"url": fake.url}}) as q:
            await known(q)
            assert (await order(q, "load", backend=name)).status == 404
            assert fake.requests == []


async def test_unload_goes_beside_the_queue_in_every_mode() -> None:
    async with Ollama() as fake, running(fake.url) as q:
        await known(q)
        await order(q, "load")
        await loaded(q, ["m:latest"])
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        answer = await order(q, "unload")
        assert answer.status == 202
        await loaded(q, [])
        last = fake.requests[-1]
        assert (last.path, last.json["keep_alive"]) == (GENERATE, 0)
        records = await ended(q, 2)
        assert (records[0]["id"], records[0]["outcome"]) == (answer.json()["id"], "done")
        assert records[0]["backend"] == answer.json()["backend"]


async def test_star_unloads_whatever_is_loaded_anywhere() -> None:
    async with Ollama(["a", "b"]) as one, Ollama(["c"]) as two, running(one.url, two.url) as q:
        await known(q)
        for model in "abc":
            assert (await order(q, "load", model)).status == 202
        await loaded(q, ["a:latest", "b:latest"])
        await loaded(q, ["c:latest"], 1)
        assert (await order(q, "unload", "*")).status == 202
        await loaded(q, [])
        await loaded(q, [], 1)
        assert (await order(q, "unload", "*")).json()["backend"] == ""


async def test_embedding_model_is_loaded_where_it_can_be() -> None:
    async with Ollama(["nomic-embed-text"]) as fake, running(fake.url) as q:
        await known(q)
        await order(q, "load", "nomic-embed-text")
        await loaded(q, ["nomic-embed-text:latest"])
        assert [(one.path, one.json["input"]) for one in fake.requests] == [(EMBED, "")]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"action": "load", "model": "nobody's"}, 404),
        ({"action": "unload", "model": "nobody's"}, 404),
        ({"action": "load", "model": "*"}, 404),
        ({"action": "load", "model": "m", "backend": "nobody"}, 404),
        ({"action": "load", "model": "m", "backend": 7}, 404),
        ({"action": "load"}, 400),
        ({"action": "load", "model": 7}, 400),
        ({"action": "load", "model": "m", "num_ctx": "many"}, 400),
        ({"action": "load", "model": "m", "keep_alive": "a while"}, 400),
        ({"action": "load", "model": "m", "keep_alive": [5]}, 400),
        ({"action": "explode", "model": "m"}, 400),
    ],
)
async def test_order_that_cannot_be_is_told(change: Any, status: int) -> None:
    async with Ollama() as fake, running(fake.url) as q:
        await known(q)
        assert (await ask(q.port, "POST", "/llmq/models", json=change)).status == status
        assert not fake.requests


async def test_order_may_name_its_backend_by_name_or_url() -> None:
    async with Ollama() as fake, running(fake.url) as q:
        await known(q)
        name = (await q.status())["backends"][0]["name"]
        for number, backend in enumerate([name, fake.url, "any"]):
            assert (await order(q, "load", backend=backend)).status == 202
            await ended(q, number + 1)


async def test_load_that_fails_is_recorded_as_it_is() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await known(q)
        assert (await order(q, "load")).status == 202
        await refuse(await fake.arrived(), 500, {"error": "model requires more system memory"})
        (record,) = await ended(q)
        assert (record["outcome"], record["status"]) == ("backend_answer", 500)
        assert "more system memory" in record["error"]


async def test_backend_is_told_once_that_a_model_answers(monkeypatch: Any) -> None:
    told: list[str] = []
    monkeypatch.setattr(llmq.Backend, "loaded_now", lambda _, key, _now, **_more: told.append(key))
    async with Runner() as fake, running(fake.url) as q:
        for number in (1, 2):
            pieces = [line(chat_line("a")), line(chat_line("b")), line(chat_end())]
            await exchange(q, fake, NATIVE_CHAT, least(NATIVE_CHAT), staged(pieces))
            assert told == ["m"] * number


# ---- Errands: other kinds --------------------------------------------------------------------


async def test_lmstudio_loads_and_unloads_at_its_own_routes() -> None:
    rows = {"data": [{"id": "m", "object": "model", "state": "not-loaded"}]}
    async with Runner(kind="lmstudio") as fake, running(fake.url) as q:
        fake.probe_answers["/api/v0/models"] = 200, rows
        await loaded(q, [])
        await known(q)
        await order(q, "load", num_ctx=8192)
        request = await fake.arrived()
        assert request.path == "/api/v1/models/load"
        assert request.json == {"model": "m", "context_length": 8192}
        rows["data"][0]["state"] = "loaded"
        await whole(request, {"type": "llm", "instance_id": "m", "status": "loaded"})
        await loaded(q, ["m"])
        await order(q, "unload")
        request = await fake.arrived()
        assert (request.path, request.json) == ("/api/v1/models/unload", {"instance_id": "m"})
        rows["data"][0]["state"] = "not-loaded"
        await whole(request, {"instance_id": "m"})
        await loaded(q, [])
        assert [one["outcome"] for one in await ended(q, 2)] == ["done", "done"]
        assert (await order(q, "load", keep_alive="5m")).status == 501


async def test_router_of_llamacpp_loads_and_unloads_and_another_says_that_it_cannot() -> None:
    row = {"id": "m", "object": "model", "owned_by": "llamacpp", "status": {"value": "loaded"}}
    async with Runner(kind="llamacpp") as fake, running(fake.url) as q:
        fake.probe_answers["/v1/models"] = 200, {"object": "list", "data": [row]}
        await loaded(q, ["m"])
        assert (await order(q, "load")).status == 409, "it is loaded"
        await order(q, "unload")
        request = await fake.arrived()
        assert (request.path, request.json) == ("/models/unload", {"model": "m"})
        row["status"] = {"value": "unloaded"}
        await whole(request, {"success": True})
        await loaded(q, [])
        await order(q, "load", keep_alive=None)
        request = await fake.arrived()
        assert (request.path, request.json) == ("/models/load", {"model": "m"})
        await request.status(404, {"error": {"message": "File Not Found", "code": 404}})
        assert (await ended(q, 2))[0]["outcome"] == "not_implemented"
        assert (await order(q, "load", num_ctx=8192)).status == 501


@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize("action", ["load", "unload"])
async def test_kind_that_cannot_is_501(kind: str, action: str) -> None:
    async with Runner(kind=kind) as fake, running(fake.url) as q:
        await known(q)
        assert (await order(q, action)).status == 501


# ---- Preload ---------------------------------------------------------------------------------


async def test_preload_loads_at_the_start_and_after_a_return_with_its_own_context() -> None:
    row = having(preload=True, num_ctx=8192, keep_alive=-1)
    async with Ollama() as fake, running(fake.url, **QUICK, **row) as q:
        await loaded(q, ["m:latest"])
        assert fake.loads == [("m:latest", 8192)]
        assert fake.requests[-1].json["keep_alive"] == -1
        (record,) = await ended(q)
        assert (record["client"], record["class"]) == ("llmq", "low")
        await fake.stop_listening()
        fake.drop_connections()
        while (await q.status())["backends"][0]["state"] == "up":
            pass
        fake.contexts.clear()
        await fake.listen_again()
        await loaded(q, ["m:latest"])
        await ended(q, 2)
        assert fake.loads == [("m:latest", 8192)] * 2


async def test_preload_of_what_is_loaded_asks_nothing_unless_its_context_is_too_short() -> None:
    async with Ollama(["m", "n"]) as fake:
        fake.contexts.update({"m:latest": 4096, "n:latest": 4096})
        rows = {"m": {"preload": True, "num_ctx": 8192}, "n": {"preload": True}}
        async with running(fake.url, models=rows) as q:
            await ended(q)
            assert fake.loads == [("m:latest", 8192)]


async def test_preload_follows_a_reload_and_not_an_unload() -> None:
    async with Ollama() as fake, running(fake.url, **having(preload=True)) as q:
        await loaded(q, ["m:latest"])
        await order(q, "unload")
        await loaded(q, [])
        await ended(q, 2)
        assert len(fake.loads) == 1, "whoever unloads it is not contradicted"
        q.service.read = lambda: build_settings({**q.values, **having(preload=True)})
        q.service.reload()
        await loaded(q, ["m:latest"])


async def test_preload_is_where_its_requests_may_go_and_nowhere_else() -> None:
    async with Ollama() as one, Ollama() as other:
        rows = {"a": {"url": one.url, "device": "a"}, "b": {"url": other.url, "device": "b"}}
        async with running(backends=rows) as q:
            await known(q)
            models = {"m": llmq.ModelSettings(preload=True, backends=("b",))}
            q.service.settings.models.update(models)
            q.gateway.discovery.configure()
            llmq.Preloader(q.gateway).step()
            assert list(q.gateway.errands) == [("load", "b", "m")]


async def test_preload_of_what_somebody_has_ordered_is_no_fault() -> None:
    async with Ollama() as fake, running(fake.url) as q:
        await known(q)
        (backend,) = q.gateway.fleet.backends.values()
        errand = llmq.Errand("load", backend, "m")
        llmq.run_errand(q.gateway, errand, llmq.LLMQ, "order", llmq.Priority.LOW)
        q.service.settings.models["m"] = llmq.ModelSettings(preload=True)
        llmq.Preloader(q.gateway).step()
        await ended(q)


async def test_preload_under_a_pattern_loads_what_a_backend_has_of_it() -> None:
    rows = {"qwen*": {"preload": True}, "qwen:1b": {"num_ctx": 8192}}
    async with Ollama(["qwen:1b", "other"]) as fake, running(fake.url, **QUICK, models=rows) as q:
        await known(q)
        await eventually(lambda: fake.loads, 3)
        assert fake.loads == [("qwen:1b", 8192)]


async def test_preload_waits_until_its_backend_is_idle() -> None:
    async with Runner(["m", "n"]) as fake, running(fake.url) as q:
        await known(q)
        busy = post(q, NATIVE_CHAT, least(NATIVE_CHAT))
        request = await arrival(busy, fake)
        preloader = llmq.Preloader(q.gateway)
        q.service.settings.models["n"] = llmq.ModelSettings(preload=True)
        preloader.step()
        assert not q.gateway.errands
        await whole(request, chat_end())
        await busy
        preloader.step()
        assert list(q.gateway.errands) == [("load", (await q.status())["backends"][0]["name"], "n")]
        await whole(await fake.arrived(), generate_end("load"))
        await ended(q, 2)
        preloader.step()
        assert not q.gateway.errands, "once"


# ---- The rows: which one says it -------------------------------------------------------------


def test_exact_row_takes_back_what_a_pattern_says() -> None:
    rows = {
        "*": {"exclusive": True, "max_concurrent": 1, "class": "low", "overflow": "refuse"},
        "tiny": {"exclusive": False, "max_concurrent": 0, "class": ""},
    }
    tiny = llmq.policy_of(build_settings({"models": rows}).models, "tiny")
    assert tiny == llmq.ModelSettings(overflow="refuse")


@pytest.mark.parametrize("value", [date(2026, 1, 1), float("nan"), float("inf"), [{"a": time()}]])
def test_row_sets_only_what_json_can_say(value: Any) -> None:
    with pytest.raises(llmq.ConfigError, match=r"models\.m\.set.*values that JSON has"):
        build_settings({"models": {"m": {"set": {"seed": value}}}})


# ---- The rows: pass-through ------------------------------------------------------------------


def policed(body: str, route: str, **row: Any) -> str:
    return llmq.with_policy(body.encode(), route, llmq.ModelSettings(**row)).decode()


@pytest.mark.parametrize("route", ROUTES)
def test_strip_cuts_its_members_and_keeps_each_other_byte(route: str) -> None:
    for document, _ in documents(11, ("a", ["1", '"x"', "[1, 2]"]), ("b", ["null", ""])):
        assert policed(document.text, route, strip=("a", "b")) == document.without(["a", "b"])


@pytest.mark.parametrize("route", ROUTES)
def test_set_replaces_or_puts_its_members_and_keeps_each_other_byte(route: str) -> None:
    for document, _ in documents(12, ("a", ["1", '"x"', "[1, 2]", ""])):
        made = policed(document.text, route, set={"a": {"b": "é"}})
        assert strict(made) == {**strict(document.text), "a": {"b": "é"}}
        kept = [text for name, text in zip(document.names, document.members) if name != "a"]
        assert all(text in made for text in kept)
        if "a" not in document.names:
            new = '"a":{"b": "\\u00e9"}'
            assert made in (document.text.replace("{", "{" + new, 1),) or new in made
            assert made.replace(new + ",", "", 1) == document.text or not kept


def test_options_are_put_in_one_by_one() -> None:
    body = '{"model":"m", "options" : { "seed":1 , "stop":["x"]} }'
    made = policed(body, NATIVE_CHAT, set={"options": {"seed": 2}, "think": False}, max_output=9)
    inner = '{"num_predict":9, "seed":2 , "stop":["x"]}'
    assert strict(made) == {"think": False, "model": "m", "options": strict(inner)}
    assert '"stop":["x"]} }' in made
    assert '"options"' not in policed('{"model":"m"}', CHAT, set={"options": {"seed": 2}})


def test_model_is_neither_set_nor_cut() -> None:
    body = '{"model":"m"}'
    assert policed(body, CHAT, set={"model": "other"}, strip=("model",)) == body


BOUNDS = {
    CHAT: "max_tokens", COMPLETIONS: "max_tokens", MESSAGES: "max_tokens",
    RESPONSES: "max_output_tokens", NATIVE_CHAT: "num_predict", GENERATE: "num_predict",
}  # fmt: skip


@pytest.mark.parametrize("route", BOUNDS)
@pytest.mark.parametrize("asked", [None, -1, -2, 0, 1, 64, 65, 10**9, 1.5, "99", True, [], ""])
def test_max_output_bounds_what_is_asked_and_is_there_where_nothing_is(
    route: str, asked: Any
) -> None:
    name, native = BOUNDS[route], route.startswith("/api/")
    limits = {} if asked == "" else {name: asked}
    body = json.dumps({"model": "m", "options": limits} if native else {"model": "m", **limits})
    made = policed(body, route, max_output=64)
    found = json.loads(made).get("options") if native else json.loads(made)
    good = type(asked) is int and 0 < asked <= 64
    assert found[name] == (asked if good else 64)
    if good:
        assert made == body


def test_max_output_bounds_each_member_that_asks_and_the_one_that_all_runners_read() -> None:
    body = {"max_completion_tokens": 20, "n_predict": 999}
    made = json.loads(policed(json.dumps(body), CHAT, max_output=64))
    assert made == {"max_tokens": 20, "max_completion_tokens": 20, "n_predict": 20}
    assert policed('{"input":"x"}', EMBED, max_output=64) == '{"input":"x"}'


def test_rows_that_change_nothing_change_no_byte() -> None:
    chance = random.Random(5)
    for route in ROUTES:
        for document, _ in documents(chance.randrange(99), runs=50):
            assert policed(document.text, route, num_ctx="4096", preload=True) == document.text


# ---- The rows: over sockets ------------------------------------------------------------------


async def test_request_without_a_row_is_passed_on_as_it_came() -> None:
    body = b'{ "model":"m","keep_alive" : 5,"messages":[{"role":"user","content":"hi"}] }'
    async with Runner(["m", "n"]) as fake, running(fake.url, models={"n": {"strip": ["x"]}}) as q:
        request, _ = await exchange(q, fake, NATIVE_CHAT, body, chat_end())
        assert request.body == body


async def test_set_and_strip_reach_the_runner() -> None:
    row = {"set": {"temperature": 0}, "strip": ["seed"]}
    body = least(CHAT, seed=1, temperature=1.5)
    request = await sent(CHAT, body, **row)
    assert request.json == {**least(CHAT), "temperature": 0}


async def test_set_and_strip_hold_where_the_request_is_translated() -> None:
    row = {"set": {"temperature": 0, "x": 1}, "strip": ["seed", "tools"], "num_ctx": 8192}
    request = await sent(CHAT, least(CHAT, seed=1, temperature=1.5, tools=[]), "ollama", **row)
    assert request.path == NATIVE_CHAT
    assert request.json["options"] == {"temperature": 0, "top_p": 1.0, "num_ctx": 8192}
    assert request.json["x"] == 1
    back = await sent(NATIVE_CHAT, least(NATIVE_CHAT, options={"seed": 1}), "vllm", **row)
    assert (back.path, back.json["temperature"], "seed" in back.json) == (CHAT, 0, False)


async def test_max_output_holds_in_each_dialect_and_translated() -> None:
    assert (await sent(CHAT, least(CHAT), max_output=7)).json["max_tokens"] == 7
    request = await sent(CHAT, least(CHAT, max_tokens=99), "ollama", max_output=7, num_ctx=8192)
    assert (request.path, request.json["options"]["num_predict"]) == (NATIVE_CHAT, 7)
    request = await sent(NATIVE_CHAT, least(NATIVE_CHAT), "vllm", max_output=7)
    assert (request.path, request.json["max_tokens"]) == (CHAT, 7)


@pytest.mark.parametrize("path", [NATIVE_CHAT, GENERATE, EMBED, CHAT, COMPLETIONS, EMBEDDINGS])
async def test_keep_alive_is_what_ollama_is_told_where_the_request_says_none(path: str) -> None:
    request = await sent(path, least(path), "ollama", keep_alive="30m")
    assert request.path.startswith("/api/")
    assert request.json["keep_alive"] == "30m"
    request = await sent(path, least(path, keep_alive=5), "ollama", keep_alive="30m")
    assert request.json["keep_alive"] == 5


async def test_keep_alive_that_is_forced_holds_over_the_requests_and_lets_it_be_unloaded() -> None:
    row = {"keep_alive": -1, "keep_alive_force": True}
    request = await sent(NATIVE_CHAT, least(NATIVE_CHAT, keep_alive=0), "ollama", **row)
    assert request.json["keep_alive"] == -1
    async with Ollama() as fake, running(fake.url, **having(**row)) as q:
        await known(q)
        await order(q, "load")
        await loaded(q, ["m:latest"])
        answer = await post(q, GENERATE, {"model": "m", "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload"


@pytest.mark.parametrize("row", [{"keep_alive": "30m"}, {"overflow": "refuse"}], ids=str)
async def test_settings_take_nothing_from_who_asks_what_cannot_be_translated(row: Any) -> None:
    body = least(COMPLETIONS, prompt=["one", "two"])
    async with Runner() as fake, running(fake.url, **having(**row)) as q:
        asked = post(q, COMPLETIONS, body)
        request = await arrival(asked, fake)
        assert (request.path, request.json) == (COMPLETIONS, body)
        await whole(request, completion("m", "both"))
        assert (await asked).status == 200


async def test_other_runners_are_told_nothing_of_keep_alive_and_overflow() -> None:
    request = await sent(CHAT, least(CHAT), keep_alive="30m", overflow="refuse")
    assert (request.path, request.json) == (CHAT, least(CHAT))


async def test_num_ctx_of_a_model_is_what_it_starts_with_instead_of_the_usual() -> None:
    async with Runner(["m", "n"]) as fake:
        async with running(fake.url, upstream__num_ctx=4096, **having(num_ctx=8192)) as q:
            for model, context in (("m", 8192), ("n", 4096)):
                body = {**least(CHAT), "model": model}
                request, _ = await exchange(q, fake, CHAT, body, chat_end())
                assert request.json["options"]["num_ctx"] == context


@pytest.mark.parametrize(
    ("row", "wrong"),
    [("num_ctx", "long"), ("num_ctx", -1), ("num_ctx", 0), ("keep_alive", "5 min"), ("set", [])],
)
def test_value_that_means_nothing_stops_the_start(row: str, wrong: Any) -> None:
    with pytest.raises(llmq.ConfigError) as raised:
        llmq.merge_layers([("file", {"models": {"m": {row: wrong}}})])
    assert f"models.m.{row}" in str(raised.value)


# ---- Cut prompts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("the input length exceeds the context length", "the input length"),
        (
            json.dumps({"error": {"code": 400, "message": "request (2622 tokens) exceeds the "
                                  "available context size (512 tokens), try increasing it",
                                  "type": "exceed_context_size_error"}}),
            "request (2622 tokens)",
        ),
    ],
    ids=["older", "newer"],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, NATIVE_CHAT, GENERATE, COMPLETIONS])
async def test_overflow_refused_is_an_error_in_the_callers_dialect(
    path: str, words: str, told: str
) -> None:
    async with Runner() as fake, running(fake.url, **having(overflow="refuse")) as q:
        asked = post(q, path, least(path))
        request = await arrival(asked, fake)
        assert request.path.startswith("/api/")
        assert (request.json["truncate"], request.json["shift"]) == (False, False)
        await refuse(request, 400, {"error": words})
        answer = await asked
        assert answer.status == 400
        error = answer.json()["error"]
        if path.startswith("/v1/"):
            assert error["code"] == "context_length_exceeded"
            error = error["message"]
        assert error.startswith(told)
        assert (await ended(q))[0]["outcome"] == "context_length_exceeded"


async def test_other_refusals_are_the_runners_own() -> None:
    async with Runner() as fake, running(fake.url, **having(overflow="refuse")) as q:
        asked = post(q, NATIVE_CHAT, least(NATIVE_CHAT, truncate=True))
        request = await arrival(asked, fake)
        assert request.json["truncate"] is False
        await refuse(request, 400, {"error": "illegal base64 data at input byte 0"})
        assert (await asked).json() == {"error": "illegal base64 data at input byte 0"}


@pytest.mark.parametrize(
    ("text", "asked", "context"),
    [("x" * 300, 0, None), ("x" * 30_000, 0, 16384), ("x" * 3000, 5000, 8192),
     ("日" * 9000, 0, 16384), ("x" * 900_000, 0, 32768)],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, NATIVE_CHAT])
async def test_num_ctx_fit_is_the_power_of_two_that_holds_prompt_and_answer(
    path: str, text: str, asked: int, context: int | None
) -> None:
    body = chat(text)
    if asked:
        body.update({"options": {"num_predict": asked}} if path == NATIVE_CHAT else {})
        body.update({"max_tokens": asked} if path == CHAT else {})
    request = await sent(path, body, "ollama", num_ctx="fit")
    assert (request.json.get("options") or {}).get("num_ctx") == context


async def test_fit_is_not_for_foreign_pages() -> None:
    async with Runner() as fake, running(fake.url, **having(num_ctx="fit")) as q:
        asked = post(q, CHAT, chat("x" * 30_000), {"Origin": "https://evil.example"})
        request = await arrival(asked, fake)
        assert request.path == CHAT
        await whole(request, completion("m", "no"))
        await asked


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("tokens", "cut"), [(8192, True), (8191, True), (8190, False)])
async def test_prompt_that_fills_its_context_is_told(
    tokens: int, cut: bool, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llmq")
    async with Runner() as fake, running(fake.url) as q:
        end = {**chat_end(), "prompt_eval_count": tokens}
        body = least(NATIVE_CHAT, stream=stream, options={"num_ctx": 8192})
        await exchange(q, fake, NATIVE_CHAT, body, [line(end)] if stream else end)
        (record,) = await ended(q)
        assert record["cut"] is cut
        await eventually(lambda: "outcome=done" in caplog.text)
        assert ("outcome=done cut?" in caplog.text) is cut


async def test_context_of_a_model_as_loaded_tells_it_too_and_embeddings_are_never_cut() -> None:
    async with Runner() as fake, running(fake.url, **QUICK) as q:
        fake.contexts["m"] = 2048
        await loaded(q, ["m"])
        end = {**chat_end(), "prompt_eval_count": 2048}
        await exchange(q, fake, NATIVE_CHAT, least(NATIVE_CHAT, stream=False), end)
        vectors = {"model": "m", "embeddings": [[0.5]], "prompt_eval_count": 9999}
        await exchange(q, fake, EMBED, least(EMBED), vectors)
        assert [one["cut"] for one in await ended(q, 2)] == [False, True]


# ---- The command -----------------------------------------------------------------------------


async def in_thread(*arguments: str) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, run_llmq, *arguments)


async def test_command_shows_loads_and_unloads_models() -> None:
    async with Ollama(["m", "n"]) as fake, running(fake.url) as q:
        await known(q)
        at = ("--url", q.base)
        done = await in_thread("models", "load", "m", *at)
        name = (await q.status())["backends"][0]["name"]
        assert (done.returncode, done.stdout) == (0, f"load m: {name}\n")
        await loaded(q, ["m:latest"])
        done = await in_thread("models", *at)
        head, *rows = [text.split() for text in done.stdout.splitlines()]
        assert head == ["MODEL", "BACKEND", "LOADED", "CONTEXT"]
        assert rows == [["m:latest", name, "yes", "-"], ["n:latest", name, "-", "-"]]
        done = await in_thread("models", "--json", *at)
        facts = {"model": "m:latest", "backend": name, "loaded": True, "gpu_pct": None}
        assert json.loads(done.stdout)[0] == {**facts, "context": None}
        done = await in_thread("models", "unload", "*", "--on", name, *at)
        assert done.stdout == f"unload *: {name}\n"
        await loaded(q, [])
        done = await in_thread("models", "unload", "m", *at)
        assert done.stdout == "unload m: no backend has it loaded\n"
        done = await in_thread("models", "load", "nobody's", *at)
        assert done.returncode == 1
        assert "not found" in done.stderr
