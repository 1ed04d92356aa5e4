"""Requests that leave the model to llmq, or say in `router` how they are to be served."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.fake_ollama import ended, post, told, waiting
from tests.fake_runner import (
    BY_PATH,
    CHAT,
    DIALECTS,
    EMBED,
    EMBEDDINGS,
    GENERATE,
    MESSAGES,
    NATIVE_CHAT,
    RERANK,
    RESPONSES,
    STREAMING,
    WHEN,
    Dialect,
    Runner,
)
from tests.fakes import Answer, FakeBackend, FakeRequest, Raw, ask, eventually, http, running
from tests.test_keys import EVIL, bearer, keys

GIB = 2**30
CLASSIFY = llmq.classify


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prompt asks for is a matter of test_tasks; here nothing tells it, but `taskType`."""
    verdict = llmq.Verdict("unknown", "nobody looked")
    monkeypatch.setattr(llmq, "classify", lambda *_, **__: verdict)


async def test_what_a_prompt_asks_for_is_told_from_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmq, "classify", CLASSIFY)
    rows = {"code_review": ["b"], "summarize": ["c"], "unknown": ["a"]}
    said = {"review this function:\n```\ndef f(x): return x\n```": "b",
            "summarize this article in three sentences": "c"}  # fmt: skip
    async with Runner(("a", "b", "c")) as runner, running(runner.url, routes=rows) as q:
        for text, model in said.items():
            for path in (CHAT.path, NATIVE_CHAT.path, MESSAGES.path):
                body = {"model": "auto", "max_tokens": 9, "stream": False,
                        "messages": [{"role": "user", "content": text}]}  # fmt: skip
                answer = await ask(q.port, "POST", path, json=body)
                assert answer.headers["x-llmq-model"] == model, answer.body


CHATTING = tuple(one for one in STREAMING)
EMBEDDING = (EMBEDDINGS, EMBED, BY_PATH["/api/embeddings"])
AUTO_DIALECTS = (*CHATTING, *EMBEDDING)
MEMBERS = [
    "mode",
    "taskType",
    "selectedModel",
    "fallbackModels",
    "queueTimeMs",
    "executionTimeMs",
    "decisionReason",
]
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PICTURES: dict[Dialect, dict[str, Any]] = {  # what a request with a picture holds, by dialect
    CHAT: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it?"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
                ],
            }
        ]
    },
    MESSAGES: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what is it?"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
                    },
                ],
            }
        ]
    },
    RESPONSES: {
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "what is it?"},
                    {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"},
                ],
            }
        ]
    },
    NATIVE_CHAT: {"messages": [{"role": "user", "content": "what is it?", "images": [PIXEL]}]},
    GENERATE: {"prompt": "what is it?", "images": [PIXEL]},
}


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphics memory of the box that runs the tests is none of theirs."""

    async def read(_tool: str) -> tuple[str, list[llmq.Card], None]:
        return "none", [], None

    monkeypatch.setattr(llmq, "read_cards", read)


def full(name: str) -> str:
    """As such a Box calls it."""
    return name.lower().replace(":latest", "")


class Box(Runner):
    """An Ollama whose models differ: `gb`, `can`, `context`, `gpu` (per cent, once loaded)."""

    def __init__(self, *names: str, kind: str = "ollama", auto: bool = True, **models: Any) -> None:
        rows = {**{name: {} for name in names}, **models}
        self.rows = {name.replace("_", ":"): facts for name, facts in rows.items()}
        super().__init__(list(self.rows), kind, auto)
        self.digest: dict[str, str] = {}  # where it is another than at first

    def tag(self, model: str) -> dict[str, Any]:
        digest = self.digest.get(model) or hashlib.sha256(model.encode()).hexdigest()
        size = int(self.rows[model].get("gb", 1) * GIB)
        row = {"name": model, "model": model, "modified_at": WHEN, "size": size, "digest": digest}
        return {**row, "details": {"family": "llama"}}

    def loaded_row(self, model: str) -> dict[str, Any]:
        row = {**self.tag(model), "expires_at": WHEN, "context_length": self.contexts[model]}
        return {**row, "size_vram": row["size"] * self.rows[model].get("gpu", 100) // 100}

    async def _show(self, request: FakeRequest) -> None:
        facts = self.rows[full(request.json["model"])]
        if "can" in facts and facts["can"] is None:
            await request.status(500, {"error": "out of order"})
            return
        info: dict[str, Any] = {"general.architecture": "llama"}
        if facts.get("context", 8192):
            info["llama.context_length"] = facts.get("context", 8192)
        can = list(facts.get("can", ["completion"]))
        await request.status(200, {"details": {}, "model_info": info, "capabilities": can})

    def _load(self, request: FakeRequest, model: str) -> None:
        super()._load(request, full(model))

    def remove(self, model: str) -> None:
        self.models.remove(model)
        self.contexts.pop(model, None)
        del self.rows[model]

    def load(self, *models: str) -> Box:
        self.contexts.update(dict.fromkeys(models, 4096))
        return self


def routes(*names: str, task: str = "unknown") -> dict[str, Any]:
    return {task: list(names)}


def auto(
    dialect: Dialect, text: str = "hi there", stream: bool = False, **more: Any
) -> dict[str, Any]:
    return {**dialect.body(text, stream, "auto"), **more}


async def sent(q: running, dialect: Dialect, body: Any, headers: Any = None) -> Answer:
    return await ask(q.port, "POST", dialect.path, json=body, headers=headers)


async def chosen(q: running, dialect: Dialect = CHAT, headers: Any = None, **more: Any) -> str:
    """The model that `auto` is for such a request, which must be answered well."""
    answer = await sent(q, dialect, auto(dialect, **more), headers)
    assert (answer.status, answer.clean) == (200, True), answer
    return answer.headers["x-llmq-model"]


async def refused(q: running, dialect: Dialect = CHAT, headers: Any = None, **more: Any) -> str:
    """Why no model can serve such a request."""
    answer = await sent(q, dialect, auto(dialect, **more), headers)
    assert answer.status == 503, answer
    assert answer.headers["x-should-retry"] == "false"
    return dialect.whole_error(answer)


async def looked(q: running, fake: FakeBackend) -> None:
    """Return when llmq has looked at this runner anew."""
    backend = next(one for one in q.gateway.fleet.backends.values() if one.url == fake.url)
    before = backend.report
    q.gateway.monitor.probe_now(backend)
    await eventually(lambda: backend.report is not before)


# ---- The request's `router` ------------------------------------------------------------------

WRONG: list[tuple[str, list[Any]]] = [
    ("mode", ["later", "", 1, True, [], {}]),
    ("taskType", ["poetry", "", 1, True, [], {}]),
    ("allowAsync", ["yes", 1, 0, "", [], {}]),
    ("requireGpuOnly", ["yes", 1, 0, "", [], {}]),
    ("priority", ["urgent", 1, 0.5, [], {}]),
    ("preferredModels", ["m", 1, True, {}, [1], ["m", None], [["m"]]]),
    ("forbiddenModels", ["m", 1, True, {}, [1], ["m", None], [["m"]]]),
    ("maxQueueTimeMs", ["5", True, [], {}]),
    ("maxExecutionTimeMs", ["5", True, [], {}]),
]


@pytest.mark.parametrize(("member", "values"), WRONG, ids=[name for name, _ in WRONG])
def test_member_of_a_wrong_type_is_refused_by_its_name(member: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(llmq.BadRequest) as refusal:
            llmq.read_wish({"router": {member: value}})
        assert refusal.value.param == f"router.{member}", value
        assert member in refusal.value.message


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, NATIVE_CHAT, EMBED], ids=repr)
async def test_wrong_member_is_a_400_in_the_dialect_of_the_caller(dialect: Dialect) -> None:
    async with Box("m") as box, running(box.url) as q:
        for member, (value, *_) in WRONG:
            body = auto(dialect, router={member: value})
            answer = await sent(q, dialect, body)
            assert answer.status == 400, member
            assert member in dialect.whole_error(answer)
        assert (await sent(q, dialect, auto(dialect, router=[]))).status == 400
        assert not box.requests


def test_what_is_null_or_not_known_asks_for_nothing() -> None:
    nulls = {"router": {member: None for member, _ in WRONG}}
    assert llmq.read_wish(nulls) == llmq.read_wish({"router": {}})
    assert llmq.read_wish({"router": {"later": 1}}) == llmq.read_wish({"router": {}})
    assert llmq.read_wish({"router": {"taskType": "auto"}}).task == ""
    assert llmq.read_wish({"router": None}) == llmq.read_wish({}) == llmq.NO_WISH
    assert llmq.read_wish({"router": {}}).told


@pytest.mark.parametrize("number", [0, 1, 1.5, -3, 1e300, 10**400, -(10**400)], ids=range(7))
def test_any_number_of_milliseconds_is_a_time_or_a_bad_request(number: float) -> None:
    for member in ("maxQueueTimeMs", "maxExecutionTimeMs"):
        with contextlib.suppress(llmq.BadRequest):
            wish = llmq.read_wish({"router": {member: number}})
            assert (wish.max_queue or 0) >= 0
            assert wish.max_run >= 0


async def test_numbers_beyond_all_measure_are_no_error_of_llmq() -> None:
    async with Box("m") as box, running(box.url) as q:
        for number in ("1" + "0" * 400, "1e999", "-1e999"):
            body = json.dumps(auto(CHAT)).replace(
                "{", f'{{"router":{{"maxQueueTimeMs":{number}}},', 1
            )
            answer = await ask(q.port, "POST", CHAT.path, body=body.encode())
            assert answer.status in (200, 400), number


async def test_task_type_picks_the_row() -> None:
    rows = {"code_fix": ["coder"], "summarize": ["small"], "unknown": ["any"]}
    async with Box("any", "coder", "small") as box, running(box.url, routes=rows) as q:
        assert await chosen(q, router={"taskType": "code_fix"}) == "coder"
        assert await chosen(q, router={"taskType": "summarize"}) == "small"
        assert await chosen(q, router={"taskType": "triage"}) == "any"


async def test_the_prompt_tells_the_task_where_the_request_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def classify(*told: Any, **more: Any) -> llmq.Verdict:
        seen.append((*told, more))
        return llmq.Verdict("code_fix", "because")

    monkeypatch.setattr(llmq, "classify", classify)
    rows = {"code_fix": ["coder"], "summarize": ["small"], "unknown": ["any"]}
    messages = [
        {"role": "system", "content": "be terse"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "text", "text": "last"}]},
        {"role": "assistant", "content": "prefilled"},
    ]
    models = {"coder": {"can": ["completion", "tools"]}}
    async with Box("any", "small", **models) as box, running(box.url, routes=rows) as q:
        answer = await sent(q, CHAT, auto(CHAT, messages=messages, tools=[TOOL], router={}))
        assert answer.headers["x-llmq-model"] == "coder"
        assert answer.headers["x-llmq-reason"].startswith("code_fix: because; coder ")
        assert answer.json()["router"]["taskType"] == "code_fix"
        assert await chosen(q, router={"taskType": "auto"}) == "coder"
        assert await chosen(q, router={"taskType": "summarize"}) == "small"
    (text, _, more), *_ = seen
    assert (text, more["tools"], more["images"]) == ("last", True, False)
    assert len(seen) == 2, "what is said is not guessed"


@pytest.mark.parametrize("dialect", CHATTING, ids=repr)
async def test_last_words_of_the_user_are_found_in_every_dialect(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, bool]] = []

    def classify(text: str, tokens: int = 0, *, tools: bool = False, images: bool = False) -> Any:
        seen.append((text, tokens, images))
        return llmq.Verdict("unknown", f"{tools}")

    monkeypatch.setattr(llmq, "classify", classify)
    async with Box("m") as box, running(box.url) as q:
        await chosen(q, dialect, text="fix this, would you " * 10)
    ((text, tokens, images),) = seen
    assert text == "fix this, would you " * 10
    assert 40 <= tokens <= 70
    assert not images


async def test_preferred_models_go_before_the_row_in_their_order() -> None:
    async with Box("a", "b", "c") as box, running(box.url, routes=routes("a")) as q:
        answer = await sent(q, CHAT, auto(CHAT, router={"preferredModels": ["c", "b"]}))
        router = answer.json()["router"]
        assert (router["selectedModel"], router["fallbackModels"]) == ("c", ["b", "a"])
        preferred = {"preferredModels": ["gone", "B:latest"]}
        assert (await chosen(q, router=preferred)).lower().startswith("b")
        assert await chosen(q, router={"preferredModels": ["gone"]}) == "a"


async def test_forbidden_models_are_never_asked_not_even_preferred_ones() -> None:
    async with Box("a", "b") as box, running(box.url, routes=routes("a", "b")) as q:
        assert await chosen(q, router={"forbiddenModels": ["A:latest"]}) == "b"
        both = {"forbiddenModels": ["a"], "preferredModels": ["a"]}
        answer = await sent(q, CHAT, auto(CHAT, router=both))
        assert answer.headers["x-llmq-model"] == "b"
        assert "not a: forbidden by the request" in answer.headers["x-llmq-reason"]
        why = await refused(q, router={"forbiddenModels": ["a", "b"]})
        assert "a: forbidden" in why
        assert "b: forbidden" in why
        assert {request.json["model"] for request in box.requests} == {"b"}


async def test_a_named_model_that_is_forbidden_is_a_bad_request() -> None:
    async with Box("a") as box, running(box.url) as q:
        answer = await q.chat("hi", model="a", router={"forbiddenModels": ["a"]})
        assert answer.status == 400
        assert not box.requests


async def test_priority_of_router_is_the_class_unless_the_body_itself_names_one() -> None:
    async with Box("m", auto=False) as box, running(box.url) as q:
        bodies = [
            auto(CHAT, user="1", router={"priority": "high"}),
            auto(CHAT, user="2", router={"priority": "low"}),
            auto(CHAT, user="3", router={"priority": "low"}, priority="high"),
            auto(CHAT, user="4", model="m", router={"priority": True}),
        ]
        first = asyncio.ensure_future(q.chat("first", model="m"))
        held = await box.arrived()
        asked = []
        for number, body in enumerate(bodies, 1):
            asked.append(post(q, CHAT.path, body))
            await waiting(q, number)
        rows = {row["id"]: row for row in (await q.status())["requests"]}
        found = sorted(row["class"] for row in rows.values() if row["state"] == "waiting")
        assert found == ["high", "high", "high", "low"]
        await held.answer("yes")
        for _ in bodies:
            await (await box.arrived()).answer("yes")
        await asyncio.gather(first, *asked)


@pytest.mark.parametrize("name", ["auto", "m"])
async def test_request_waits_no_longer_than_it_says(name: str) -> None:
    async with Box("m", auto=False) as box, running(box.url) as q:
        first = asyncio.ensure_future(q.chat("first", model="m"))
        held = await box.arrived()
        cases = [(dialect, most) for dialect in (CHAT, MESSAGES, NATIVE_CHAT) for most in (1, 0)]
        bodies = [auto(one, model=name, router={"maxQueueTimeMs": most}) for one, most in cases]
        asked = [post(q, one.path, body) for (one, _), body in zip(cases, bodies)]
        for (dialect, _), answer in zip(cases, await asyncio.gather(*asked)):
            assert answer.status == 503, answer
            assert dialect.whole_error(answer)
            assert answer.headers["x-llmq-model"] == "m"
        await held.answer("yes")
        assert (await first).status == 200
        assert len(box.requests) == 1


@pytest.mark.parametrize("most", [0, 1, 1e12])
async def test_request_that_need_not_wait_starts_however_short_its_time(most: float) -> None:
    async with Box("m") as box, running(box.url) as q:
        assert await chosen(q, router={"maxQueueTimeMs": most}) == "m"


@pytest.mark.parametrize("name", ["auto", "m"])
async def test_answer_that_takes_longer_than_the_request_says_is_ended(name: str) -> None:
    async with Box("m", auto=False) as box, running(box.url) as q:
        body = auto(CHAT, model=name, router={"maxExecutionTimeMs": 1})
        asked = post(q, CHAT.path, body)
        request = await box.arrived()
        answer = await asked
        assert (answer.status, answer.code) == (504, "backend_timeout")
        await request.left()
        again = post(q, CHAT.path, auto(CHAT, router={"maxExecutionTimeMs": 600_000}))
        await (await box.arrived()).answer("yes")
        assert (await again).content == "yes"


async def test_stream_that_takes_longer_than_the_request_says_ends_with_an_error() -> None:
    async with Box("m", auto=False) as box, running(box.url) as q:
        asked = post(q, CHAT.path, auto(CHAT, stream=True, router={"maxExecutionTimeMs": 1}))
        request = await box.arrived()
        with contextlib.suppress(ConnectionError):
            await request.start_stream()
            await request.piece("yes")
        answer = await asked
        assert not (answer.status == 200 and answer.clean)
        assert b"[DONE]" not in answer.body


# ---- The answer's `router` -------------------------------------------------------------------


@pytest.mark.parametrize("dialect", AUTO_DIALECTS, ids=repr)
async def test_answer_tells_how_it_came_about_only_where_the_request_had_router(
    dialect: Dialect,
) -> None:
    models = {"vec": {"can": ["embedding"]}}
    async with Box("a", "b", **models) as box, running(box.url, routes=routes("b", "a")) as q:
        plain = await sent(q, dialect, auto(dialect))
        assert "router" not in plain.json()
        told = await sent(q, dialect, auto(dialect, router={}))
        facts = told.json()
        router = facts.pop("router")
        assert facts == plain.json(), "all else is the runner's"
        assert list(router) == MEMBERS
        embeds = dialect in EMBEDDING
        assert router["mode"] == "sync"
        assert router["taskType"] == "unknown"
        assert router["selectedModel"] == ("vec" if embeds else "b")
        assert router["fallbackModels"] == ([] if embeds else ["a"])
        assert type(router["queueTimeMs"]) is type(router["executionTimeMs"]) is int
        assert 0 <= router["queueTimeMs"] < 10_000
        assert 0 <= router["executionTimeMs"] < 10_000
        assert router["decisionReason"] == told.headers["x-llmq-reason"]
        assert told.headers["content-length"] == str(len(told.body))
        assert told.body.count(b'"router"') == 1


async def test_times_of_the_answer_are_those_of_its_wait_and_its_run() -> None:
    async with Box("m", auto=False) as box, running(box.url) as q:
        first = asyncio.ensure_future(q.chat("first", model="m"))
        held = await box.arrived()
        second = post(q, CHAT.path, auto(CHAT, router={}))
        await waiting(q, 1)
        (call,) = [one for one in q.gateway.calls.values() if one.choice.auto]
        call.ticket.arrived -= 2
        await held.answer("yes")
        request = await box.arrived()
        call.ticket.started -= 3
        await request.answer("yes")
        answer = await second
        router = answer.json()["router"]
        assert 0 <= router["queueTimeMs"] - (2000 - 3000) < 9000
        assert 3000 <= router["executionTimeMs"] < 12_000
        assert answer.headers["x-llmq-wait-ms"] == str(router["queueTimeMs"])
        await first


async def test_answer_to_a_named_model_has_router_too_and_says_so() -> None:
    async with Box("a", "b") as box, running(box.url, aliases={"gpt*": "b"}) as q:
        answer = await q.chat("hi", model="a", router={"taskType": "triage"})
        router = answer.json()["router"]
        assert list(router) == MEMBERS
        assert (router["selectedModel"], router["taskType"]) == ("a", "triage")
        assert (router["fallbackModels"], router["decisionReason"]) == ([], "named")
        answer = await q.chat("hi", model="gpt-5", router={})
        assert answer.json()["router"]["selectedModel"] == "b"
        assert answer.json()["model"] == "gpt-5", "as for any alias"


async def test_reason_of_the_answer_is_the_reason_of_its_header() -> None:
    settings: dict[str, Any] = {"aliases": {"gpt*": "b"}, "upstream__model": "a"}
    async with Box("a", "b") as box, running(box.url, **settings) as q:
        for name in ("a", "gpt-5", None):
            answer = await q.chat("hi", model=name, router={})
            reason = answer.json()["router"]["decisionReason"]
            assert reason == answer.headers["x-llmq-reason"], name


async def test_errors_have_no_member_router() -> None:
    async with Box("a") as box, running(box.url) as q:
        box.lacks[CHAT.path] = (500, {"error": {"message": "out of memory"}})
        answer = await sent(q, CHAT, auto(CHAT, router={}))
        assert answer.status == 500
        assert answer.json() == {"error": {"message": "out of memory"}}


async def test_answer_that_is_no_object_is_left_as_it_is() -> None:
    async with Box("a", auto=False, kind="openai") as box, running(box.url) as q:
        for body in (b'{"choices":[]}', b" {} \n", b'{"a":1 }'):
            asked = post(q, CHAT.path, auto(CHAT, router={}))
            await (await box.arrived()).status(200, body)
            answer = await asked
            assert answer.status == 200, answer
            assert list(answer.json())[-1] == "router"
            facts = answer.json()
            del facts["router"]
            assert facts == json.loads(body)


# ---- What runners and streams see ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ollama", "openai"])
@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_router_never_reaches_a_runner(dialect: Dialect, kind: str) -> None:
    names = ("auto", "m") if dialect is not RERANK else ("m",)
    can = ["embedding"] if dialect in EMBEDDING else ["completion"]
    async with Box(kind=kind, m={"can": can}) as box, running(box.url) as q:
        policy = {"m": {"tags": ["embedding"]}} if dialect in EMBEDDING else {}
        q.service.settings.models.update(llmq.merge_layers([("t", {"models": policy})]).models)
        for name in names:
            for stream in (False, True)[: 1 + dialect.streams]:
                more = {"numCtx": 2048} if dialect is CHAT else {}
                body = {**dialect.body("hi", stream, name), "router": {"mode": "sync"}, **more}
                answer = await sent(q, dialect, body)
                assert answer.status in (200, 501), answer
        for request in box.requests:
            assert b"router" not in request.body
            assert b"numCtx" not in request.body
            assert request.json["model"] == "m"


@pytest.mark.parametrize("dialect", STREAMING, ids=repr)
@pytest.mark.parametrize("name", ["auto", "m"])
async def test_streams_pass_byte_for_byte_with_router_and_auto(dialect: Dialect, name: str) -> None:
    async with Box("m") as box, running(box.url) as q:
        for more in ({}, {"router": {"taskType": "triage"}}):
            body = {**dialect.body("well hello there", True, name), **more}
            answer = await sent(q, dialect, body)
            assert answer.body == b"".join(dialect.pieces("m", "well hello there"))
            assert (answer.status, answer.clean) == (200, True)
            assert answer.headers["x-llmq-model"] == "m"
            assert "x-llmq-reason" in answer.headers
        assert {request.path for request in box.requests} == {dialect.path}


async def test_body_goes_on_byte_for_byte_but_for_the_model_and_router() -> None:
    async with Box("m") as box, running(box.url) as q:
        body = (
            b'{ "router" : {"mode":"auto"},"x":1e2,\t"model" : "auto" ,'
            b'"messages":[{"role":"user","content":"\\u00e9"}]}'
        )
        answer = await ask(q.port, "POST", CHAT.path, body=body)
        assert answer.status == 200
        (request,) = box.requests
        assert request.body == (
            b'{ "x":1e2,\t"model" : "m" ,"messages":[{"role":"user","content":"\\u00e9"}]}'
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("router", [None, {}])
async def test_translated_answers_name_the_chosen_model(stream: bool, router: Any) -> None:
    """An OpenAI client at Ollama's own route, and a client of Ollama at an OpenAI-like runner."""
    more = {} if router is None else {"router": router}
    async with Box("m") as box, Runner(["n"], "openai") as plain:
        async with running(box.url, plain.url, routes=routes("m")) as q:
            answer = await sent(q, CHAT, auto(CHAT, stream=stream, numCtx=2048, **more))
            assert box.requests[-1].path == NATIVE_CHAT.path
            assert box.requests[-1].json["model"] == "m"
            assert models_in(answer) == {"m"}
            assert CHAT.text(answer) == "hi there"
            assert ("router" in answer.body.decode()) is (router is not None and not stream)
        async with running(plain.url) as q:
            for dialect in (NATIVE_CHAT, GENERATE):
                answer = await sent(q, dialect, auto(dialect, stream=stream, **more))
                assert plain.requests[-1].json["model"] == "n"
                assert models_in(answer) == {"n"}
                assert dialect.text(answer) == "hi there"
                told = b"router" in answer.body
                assert told is (router is not None and not stream)


def models_in(answer: Answer) -> set[str]:
    """Every model that an answer names, whole or streamed."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        found = [event for event in answer.events() if isinstance(event, dict)]
    elif answer.headers["content-type"].startswith("application/x-ndjson"):
        found = [json.loads(line) for line in answer.body.splitlines()]
    else:
        found = [answer.json()]
    return {one["model"] for one in found}


@pytest.mark.parametrize("dialect", EMBEDDING, ids=repr)
async def test_translated_embeddings_name_the_chosen_model(dialect: Dialect) -> None:
    async with Runner(["text-embed", "n"], "openai") as plain, running(plain.url) as q:
        answer = await sent(q, dialect, auto(dialect))
        assert answer.headers["x-llmq-model"] == "text-embed"
        assert b"auto" not in answer.body
        assert plain.requests[-1].json["model"] == "text-embed"


# ---- What every answer says ------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
async def test_answer_to_a_named_model_says_which_it_is_and_that_it_was_named(
    dialect: Dialect,
) -> None:
    kind = "openai" if dialect is RERANK else "ollama"
    async with Box("m", kind=kind) as box, running(box.url, aliases={"gpt-*": "m"}) as q:
        answer = await sent(q, dialect, dialect.body("hi", model="m"))
        found = answer.headers["x-llmq-model"], answer.headers["x-llmq-reason"]
        assert found == ("m", "named")
        answer = await sent(q, dialect, dialect.body("hi", model="gpt-4"))
        found = answer.headers["x-llmq-model"], answer.headers["x-llmq-reason"]
        assert found == ("m", "alias gpt-4")
        body = dialect.body("hi")
        del body["model"]
        answer = await sent(q, dialect, body)
        found = answer.headers["x-llmq-model"], answer.headers["x-llmq-reason"]
        assert found == ("m", "the default")


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, NATIVE_CHAT], ids=repr)
async def test_errors_of_runners_and_waits_say_the_model_and_the_reason(dialect: Dialect) -> None:
    async with Box("m", auto=False) as box, running(box.url, routes=routes("m")) as q:
        asked = post(q, dialect.path, auto(dialect))
        await (await box.arrived()).status(500, {"error": "out of memory"})
        answer = await asked
        assert answer.status == 500
        assert answer.headers["x-llmq-model"] == "m"
        assert "; m " in answer.headers["x-llmq-reason"]


@pytest.mark.parametrize("dialect", EMBEDDING, ids=repr)
async def test_answers_from_the_cache_say_the_model_and_the_reason(dialect: Dialect) -> None:
    models = {"vec": {"can": ["embedding"]}}
    async with Box("m", **models) as box, running(box.url) as q:
        for cache in ("MISS", "HIT"):
            answer = await sent(q, dialect, auto(dialect))
            assert answer.headers["x-cache"] == cache
            assert answer.headers["x-llmq-model"] == "vec"
            assert "vec" in answer.headers["x-llmq-reason"]
        assert len(box.requests) == 1


async def test_answers_of_loads_say_the_model() -> None:
    async with Box("m") as box, running(box.url) as q:
        for keep_alive in (300, 0):
            body = {"model": "m", "keep_alive": keep_alive, "stream": False}
            answer = await ask(q.port, "POST", GENERATE.path, json=body)
            assert answer.status == 200, answer
            assert answer.headers["x-llmq-model"] == "m"


async def test_errors_that_llmq_finds_before_the_wait_say_the_model_too() -> None:
    far = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    messages = [{"role": "user", "content": [far]}]
    async with Box(a={**SEES, "gpu": 60}).load("a") as box, running(box.url) as q:
        for name in ("a", "auto"):
            body = auto(CHAT, model=name, messages=messages, numCtx=2048)
            answer = await sent(q, CHAT, body)
            assert answer.status == 400, answer
            assert answer.headers["x-llmq-model"] == "a", "nothing is fetched"
        answer = await sent(q, CHAT, auto(CHAT, model="a", router={"requireGpuOnly": True}))
        assert (answer.status, answer.headers["x-llmq-model"]) == (503, "a")


async def test_names_and_reasons_in_header_fields_are_plain_ascii() -> None:
    names = ("modèle-été:7b", "模型", "m\u0085x")
    for name in names:
        async with Runner([name], "openai") as plain, running(plain.url) as q:
            for asked in (name, "auto"):
                answer = await q.chat("hi", model=asked, router={})
                assert answer.status == 200, answer
                for field in ("x-llmq-model", "x-llmq-reason"):
                    value = answer.headers[field]
                    assert value
                    assert value.isascii()
                    assert value.isprintable()
                assert answer.json()["router"]["selectedModel"] == name


async def test_alias_of_the_callers_own_words_cannot_forge_a_field() -> None:
    async with Runner(["m"], "openai") as plain, running(plain.url, aliases={"x*": "m"}) as q:
        answer = await q.chat("hi", model="x\r\nX-Evil: 1")
        assert answer.status == 200
        assert "x-evil" not in answer.headers
        assert answer.headers["x-llmq-reason"].startswith("alias x")


async def test_load_for_auto_loads_the_one_that_is_chosen() -> None:
    async with Box("a", "b") as box, running(box.url, routes=routes("b", "a")) as q:
        answer = await ask(q.port, "POST", NATIVE_CHAT.path, json={"model": "auto", "messages": []})
        assert answer.status == 200, answer
        assert [request.json["model"] for request in box.requests] == ["b"]


async def test_long_prompt_for_auto_gets_a_context_that_holds_it() -> None:
    async with Box(a={"context": 131072}) as box, running(box.url) as q:
        await chosen(q, text="word " * 8000)
        (request,) = box.requests
        assert 10_000 <= request.json["options"]["num_ctx"] <= 32768
    settings: dict[str, Any] = {"models": {"a": {"num_ctx": "4096"}}}
    async with Box(a={"context": 131072}) as box, running(box.url, **settings) as q:
        await chosen(q, text="word " * 8000)
        assert box.requests[0].json["options"]["num_ctx"] == 4096, "as configured"


async def test_pages_may_read_the_fields() -> None:
    async with Box("m") as box, running(box.url) as q:
        origin = {"Origin": "http://localhost:3000"}
        answer = await sent(q, CHAT, auto(CHAT), origin)
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert "x-llmq-model" in exposed
        assert "x-llmq-reason" in exposed


# ---- Named, and who is `auto` ----------------------------------------------------------------


async def test_named_model_is_never_second_guessed() -> None:
    models = {
        "vec": {"can": ["embedding"]},
        "tiny": {"context": 16, "gb": 90},
        "good": {"can": ["completion", "vision", "tools"]},
    }
    settings: dict[str, Any] = {
        "routes": routes("good", task="code_fix"),
        "devices": {"local": {"vram_gb": 8}},
        "router__degrade": True,
    }
    async with Box(**models) as box, running(box.url, **settings) as q:
        for name in ("vec", "tiny"):
            router = {"taskType": "code_fix", "preferredModels": ["good"], "maxQueueTimeMs": 9e9}
            more = {**PICTURES[CHAT], "tools": [TOOL], "router": router}
            answer = await sent(q, CHAT, auto(CHAT, model=name, **more))
            assert answer.status == 200
            assert answer.headers["x-llmq-model"] == name
            assert box.requests[-1].json["model"] == name
        assert not box.shown, "nothing is to be learned"


async def test_auto_that_is_a_model_or_an_exact_alias_means_that_one() -> None:
    async with Box("a", "auto") as box, running(box.url, routes=routes("a")) as q:
        await told(q)
        answer = await sent(q, CHAT, auto(CHAT))
        assert answer.headers["x-llmq-model"] == "auto"
        assert answer.headers["x-llmq-reason"] == "named"
        listed = (await ask(q.port, "GET", "/v1/models")).json()["data"]
        assert [row["id"] for row in listed] == ["a", "auto"]
    async with Box("a", "b") as box:
        async with running(box.url, routes=routes("a"), aliases={"auto": "b"}) as q:
            answer = await sent(q, CHAT, auto(CHAT))
            assert answer.headers["x-llmq-model"] == "b"
            assert answer.headers["x-llmq-reason"] == "alias auto"
        async with running(box.url, routes=routes("a"), aliases={"*": "b"}) as q:
            assert await chosen(q) == "a"


async def test_model_called_auto_is_meant_also_by_who_comes_before_the_first_look() -> None:
    async with Box("a", "auto") as box:
        box.hold_probes()
        async with running(box.url, routes=routes("a")) as q:
            asked = post(q, CHAT.path, auto(CHAT))
            await eventually(lambda: box.probe_paths)
            box.release_probes()
            assert (await asked).headers["x-llmq-model"] == "auto"


async def test_default_model_may_be_auto() -> None:
    settings: dict[str, Any] = {"upstream__model": "auto", "routes": routes("b", "a")}
    async with Box("a", "b") as box, running(box.url, **settings) as q:
        for dialect in CHATTING:
            for stream in (False, True):
                body = dialect.body("hi", stream)
                del body["model"]
                answer = await sent(q, dialect, body)
                assert answer.status == 200, answer
                assert answer.headers["x-llmq-model"] == "b"
                assert box.requests[-1].json["model"] == "b"
        body = {"messages": [{"role": "user", "content": "hi"}], "numCtx": 2048}
        answer = await sent(q, CHAT, body)
        assert answer.json()["model"] == "b"


async def test_without_routes_auto_is_the_first_that_can() -> None:
    models = {"vec": {"can": ["embedding"]}, "a": {}, "b": {}}
    async with Box(**models) as box, running(box.url) as q:
        assert await chosen(q) == "a"
        assert await chosen(q, EMBEDDINGS) == "vec"


# ---- Models that cannot ----------------------------------------------------------------------

SEES = {"can": ["completion", "vision"]}


@pytest.mark.parametrize("dialect", PICTURES, ids=repr)
async def test_picture_goes_only_to_a_model_that_sees(dialect: Dialect) -> None:
    models = {"blind": {}, "eyes": SEES}
    async with Box(**models) as box, running(box.url, routes=routes("blind", "eyes")) as q:
        assert await chosen(q, dialect) == "blind"
        answer = await sent(q, dialect, auto(dialect, **PICTURES[dialect]))
        assert answer.headers["x-llmq-model"] == "eyes", answer
        assert "not blind: cannot see pictures" in answer.headers["x-llmq-reason"]
        box.remove("eyes")
        await looked(q, box)
        why = await refused(q, dialect, **PICTURES[dialect])
        assert "blind: cannot see pictures" in why
        assert "eyes: no backend has it" in why


async def test_picture_earlier_in_the_talk_counts_too() -> None:
    ago = [*PICTURES[CHAT]["messages"], {"role": "user", "content": "and now?"}]
    models = {"blind": {}, "eyes": SEES}
    async with Box(**models) as box, running(box.url, routes=routes("blind", "eyes")) as q:
        assert await chosen(q, CHAT, messages=ago) == "eyes"


async def test_picture_that_a_tool_has_given_counts_too() -> None:
    """As Claude's programs send what they have looked at."""
    image = PICTURES[MESSAGES]["messages"][0]["content"][1]
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    models = {"blind": {}, "eyes": SEES}
    async with Box(**models) as box, running(box.url, routes=routes("blind", "eyes")) as q:
        messages = [{"role": "user", "content": [result]}]
        assert await chosen(q, MESSAGES, messages=messages) == "eyes"


async def test_picture_costs_no_tokens_of_the_context() -> None:
    for dialect, more in PICTURES.items():
        text = json.dumps(more).replace(PIXEL, "A" * 400_000)
        async with Box(eyes={**SEES, "context": 4096}) as box, running(box.url) as q:
            assert await chosen(q, dialect, **json.loads(text)) == "eyes"
            assert "num_ctx" not in box.requests[-1].body[-400:].decode()
            assert box.requests[-1].path == dialect.path, "so that nothing is loaded anew"


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, NATIVE_CHAT, RESPONSES], ids=repr)
async def test_tools_go_only_to_a_model_that_uses_them(dialect: Dialect) -> None:
    models = {"plain": {}, "hands": {"can": ["completion", "tools"]}}
    async with Box(**models) as box, running(box.url, routes=routes("plain", "hands")) as q:
        assert await chosen(q, dialect, tools=[]) == "plain"
        assert await chosen(q, dialect, tools=[TOOL]) == "hands"
        box.remove("hands")
        await looked(q, box)
        assert "plain: cannot use tools" in await refused(q, dialect, tools=[TOOL])


async def test_chats_never_go_to_models_for_embeddings_nor_embeddings_to_others() -> None:
    models = {"vec": {"can": ["embedding"]}, "chat": {}}
    async with Box(**models) as box, running(box.url, routes=routes("vec", "chat")) as q:
        for dialect in CHATTING:
            answer = await sent(q, dialect, auto(dialect))
            assert answer.headers["x-llmq-model"] == "chat"
            assert "not vec: is for embeddings" in answer.headers["x-llmq-reason"]
        for dialect in EMBEDDING:
            assert await chosen(q, dialect) == "vec"
        assert "chat: is not for embeddings" in await refused(
            q, EMBED, router={"forbiddenModels": ["vec"]}
        )


async def test_prompt_goes_only_to_a_model_that_holds_it() -> None:
    models = {"short": {"context": 2048}, "long": {"context": 131072}}
    long = "word " * 4000
    async with Box(**models) as box, running(box.url, routes=routes("short", "long")) as q:
        for dialect in CHATTING:
            assert await chosen(q, dialect) == "short"
        for dialect in CHATTING:
            answer = await sent(q, dialect, auto(dialect, long))
            assert answer.headers["x-llmq-model"] == "long"
            assert "tokens do not fit into 2048" in answer.headers["x-llmq-reason"]
        why = await refused(q, text=long, router={"forbiddenModels": ["long"]})
        assert "do not fit into 2048" in why


async def test_long_list_of_messages_counts_against_the_context_too() -> None:
    """Of so many values only their bytes are looked at."""
    messages = [{"role": "user", "content": "some words of many"}] * 30_000
    models = {"short": {"context": 2048}, "long": {"context": 131072 * 4}}
    async with Box(**models) as box, running(box.url, routes=routes("short", "long")) as q:
        assert await chosen(q, messages=messages) == "long"
        assert len(box.requests[-1].json["messages"]) == 30_000


async def test_routes_without_a_choice_want_a_name() -> None:
    async with Box("m") as box, running(box.url) as q:
        answer = await sent(q, RERANK, auto(RERANK))
        assert (answer.status, answer.json()["error"]["param"]) == (400, "model")
        assert not box.requests


# ---- What is known of models -----------------------------------------------------------------


async def test_ollama_is_asked_once_what_a_model_can_and_again_when_its_digest_changes() -> None:
    models = {"a": {}, "b": SEES}
    async with Box(**models) as box, running(box.url, routes=routes("a", "b")) as q:
        for _ in range(3):
            await chosen(q)
            await looked(q, box)
        assert sorted(one.json["model"] for one in box.shown) == ["a", "b"]
        box.rows["a"]["can"] = ["completion", "vision"]
        assert await chosen(q, **PICTURES[CHAT]) == "b", "it is not asked each time"
        box.digest["a"] = "f" * 64
        await looked(q, box)
        assert await chosen(q, router={"forbiddenModels": ["b"]}, **PICTURES[CHAT]) == "a"
        assert await chosen(q, router={"forbiddenModels": ["b"]}) == "a"
        assert [one.json["model"] for one in box.shown[2:]] == ["a"]


async def test_context_of_a_model_is_learned_anew_when_its_digest_changes() -> None:
    async with Box(a={"context": 2048}) as box, running(box.url) as q:
        long = "word " * 4000
        await refused(q, text=long)
        box.rows["a"]["context"] = 131072
        box.digest["a"] = "f" * 64
        await looked(q, box)
        assert await chosen(q, text=long) == "a"


@pytest.mark.parametrize("facts", [{"context": 0}, {"can": None}], ids=["no context", "no answer"])
async def test_model_of_which_little_is_told_is_not_asked_for_each_request(facts: Any) -> None:
    async with Box(a=facts).load("a") as box, running(box.url) as q:
        for _ in range(3):
            assert await chosen(q) == "a"
        assert len(box.shown) == 1


async def test_model_without_a_context_is_not_asked_again_after_each_look() -> None:
    async with Box(a={"context": 0}) as box, running(box.url) as q:
        for _ in range(3):
            await looked(q, box)
            assert await chosen(q) == "a"
        assert len(box.shown) == 1, "nothing of it has changed"


def lmstudio(**rows: Any) -> dict[str, Any]:
    facts = [
        {"id": name, "object": "model", "state": "not-loaded", **row} for name, row in rows.items()
    ]
    return {"object": "list", "data": facts}


async def test_list_of_lm_studio_tells_what_its_models_can() -> None:
    rows = lmstudio(
        plain={"type": "llm", "max_context_length": 2048},
        hands={"type": "llm", "max_context_length": 99999, "capabilities": ["tool_use"]},
        eyes={"type": "vlm", "max_context_length": 2048},
        vec={"type": "embeddings"},
    )
    async with Runner(["vec", "plain", "hands", "eyes"], "lmstudio") as fake:
        fake.probe_answers["/api/v0/models"] = (200, rows)
        async with running(fake.url) as q:
            assert await chosen(q) == "plain"
            assert await chosen(q, text="word " * 4000) == "hands"
            assert await chosen(q, **PICTURES[CHAT]) == "eyes"
            assert await chosen(q, EMBEDDINGS) == "vec"
            assert await chosen(q, tools=[TOOL]) == "hands"


def llamacpp(slot: int = 8192, **more: Any) -> dict[str, Any]:
    return {"total_slots": 1, "default_generation_settings": {"n_ctx": slot}, **more}


async def test_props_of_llama_cpp_tell_what_its_model_can() -> None:
    """Two of them; the first in the row has less."""
    less = llamacpp(2048, modalities={"vision": False}, chat_template_caps={"supports_tools": True})
    more = llamacpp(modalities={"vision": True}, chat_template_caps={"supports_tools": True})
    async with Runner(["less"], "llamacpp") as first, Runner(["more"], "llamacpp") as second:
        first.probe_answers["/props"] = (200, less)
        second.probe_answers["/props"] = (200, more)
        async with running(first.url, second.url, routes=routes("less", "more")) as q:
            assert await chosen(q) == "less"
            assert await chosen(q, text="word " * 4000) == "more"
            assert await chosen(q, **PICTURES[CHAT]) == "more"
            router = {"forbiddenModels": ["more"]}
            assert "cannot see pictures" in await refused(q, router=router, **PICTURES[CHAT])


async def test_llama_cpp_that_says_it_can_neither_is_believed() -> None:
    props = llamacpp(modalities={"vision": False}, chat_template_caps={"supports_tools": False})
    async with Runner(["m"], "llamacpp") as fake:
        fake.probe_answers["/props"] = (200, props)
        async with running(fake.url) as q:
            assert await chosen(q) == "m"
            assert "cannot see pictures" in await refused(q, **PICTURES[CHAT])
            assert "cannot use tools" in await refused(q, tools=[TOOL])


async def test_model_of_which_nothing_is_known_is_tried_last() -> None:
    async with Box(eyes=SEES) as box, Runner(["who"], "openai") as plain:
        async with running(plain.url, box.url, routes=routes("who", "eyes")) as q:
            assert await chosen(q) == "who"
            assert await chosen(q, **PICTURES[CHAT]) == "eyes"
            answer = await sent(
                q, CHAT, auto(CHAT, router={"forbiddenModels": ["eyes"]}, **PICTURES[CHAT])
            )
            assert answer.headers["x-llmq-model"] == "who"
            assert "may not be able to" in answer.headers["x-llmq-reason"]


async def test_tags_say_what_a_runner_does_not() -> None:
    models = {"who": {"tags": ["vision"]}}
    async with Box(eyes=SEES) as box, Runner(["who"], "openai") as plain:
        async with running(plain.url, box.url, routes=routes("who", "eyes"), models=models) as q:
            assert await chosen(q, **PICTURES[CHAT]) == "who"


async def test_context_of_the_settings_goes_over_what_a_runner_tells() -> None:
    models = {"a": {"context": 1000}}
    async with Box("a", "b") as box, running(box.url, models=models) as q:
        assert await chosen(q) == "a"
        assert await chosen(q, text="word " * 1200) == "b"
        rows = (await ask(q.port, "GET", "/v1/router/models")).json()["models"]
        assert {row["name"]: row["context"] for row in rows} == {"a": 1000, "b": 8192}


async def test_purpose_says_what_a_model_is_good_at() -> None:
    models = {"b": {"purpose": ["code_fix"]}}
    async with Box("a", "b") as box, running(box.url, models=models) as q:
        assert await chosen(q, router={"taskType": "code_fix"}) == "b"
        answer = await sent(q, CHAT, auto(CHAT, router={"taskType": "code_fix"}))
        assert "is good at it" in answer.headers["x-llmq-reason"]
    async with Box("a", "b") as box:
        async with running(box.url, models=models, routes=routes("a", task="code_fix")) as q:
            answer = await sent(q, CHAT, auto(CHAT, router={"taskType": "code_fix"}))
            router = answer.json()["router"]
            assert (router["selectedModel"], router["fallbackModels"]) == ("a", ["b"])
    async with Box("a", "b") as box, running(box.url, models=models) as q:
        assert await chosen(q, router={"taskType": "triage"}) == "a"


async def test_size_of_the_settings_goes_over_what_a_runner_tells() -> None:
    settings: dict[str, Any] = {
        "models": {"a": {"size_gb": 20}},
        "devices": {"local": {"vram_gb": 16, "vram_reserve_gb": 1}},
        "router__require_gpu": True,
    }
    async with Box(a={"gb": 1}, b={"gb": 15}) as box, running(box.url, **settings) as q:
        answer = await sent(q, CHAT, auto(CHAT))
        assert answer.headers["x-llmq-model"] == "b"
        assert "not a: is, or would be, split" in answer.headers["x-llmq-reason"]


# ---- Rows ------------------------------------------------------------------------------------


async def test_task_without_a_row_goes_by_the_row_of_unknown_and_else_by_all() -> None:
    rows = {"code_fix": ["coder"], "unknown": ["any", "coder"]}
    async with Box("other", "coder", "any") as box:
        async with running(box.url, routes=rows) as q:
            assert await chosen(q, router={"taskType": "summarize"}) == "any"
            assert await chosen(q) == "any"
        async with running(box.url, routes={"code_fix": ["coder"]}) as q:
            assert await chosen(q, router={"taskType": "summarize"}) == "other"
            assert await chosen(q, router={"taskType": "code_fix"}) == "coder"


async def test_loaded_model_of_the_row_passes_the_one_before_it() -> None:
    row = routes("a", "b", "c")
    async with Box("a", "b", "c").load("b") as box, running(box.url, routes=row) as q:
        answer = await sent(q, CHAT, auto(CHAT, router={}))
        router = answer.json()["router"]
        assert (router["selectedModel"], router["fallbackModels"]) == ("b", ["a", "c"])
        assert "b is loaded" in router["decisionReason"]
    async with Box("a", "b", "c").load("c") as box, running(box.url, routes=row) as q:
        assert await chosen(q) == "a"


async def test_names_of_a_row_mean_models_as_requests_name_them() -> None:
    async with Box("qwen3") as box, running(box.url, routes=routes("Qwen3:latest", "m")) as q:
        answer = await sent(q, CHAT, auto(CHAT))
        assert answer.status == 200
    async with Runner(["Org/Model-X"], "openai") as plain:
        async with running(plain.url, routes=routes("org/model-x")) as q:
            assert (await sent(q, CHAT, auto(CHAT))).status == 200
            assert plain.requests[-1].json["model"] == "Org/Model-X"


async def test_row_of_models_that_nobody_has_says_so() -> None:
    async with Box("a") as box, running(box.url, routes=routes("gone", "lost")) as q:
        why = await refused(q)
        assert "gone: no backend has it" in why
        assert "lost: no backend has it" in why


async def test_rows_change_with_a_reload_of_the_settings() -> None:
    async with Box("a", "b") as box, running(box.url, routes=routes("a")) as q:
        assert await chosen(q) == "a"
        q.gateway.settings.routes = {"unknown": ("b",)}
        assert await chosen(q) == "b"


# ---- Whose models ----------------------------------------------------------------------------


async def test_key_neither_gets_nor_sees_a_model_that_is_none_of_its_own() -> None:
    rows = keys(alice={"models": ["mine*"]}, bob={"rights": ["infer", "control"]})
    models = {"secret": SEES, "mine": {}, "mine-vec": {"can": ["embedding"]}}
    row = routes("secret", "mine")
    async with Box(**models) as box, running(box.url, keys=rows, routes=row) as q:
        alice, bob = bearer(rows["alice"]["key"]), bearer(rows["bob"]["key"])
        assert await chosen(q, CHAT, bob) == "secret"
        for more in ({}, {"router": {"preferredModels": ["secret"]}}):
            answer = await sent(q, CHAT, auto(CHAT, **more), alice)
            assert answer.headers["x-llmq-model"] == "mine"
            assert "secret" not in str(answer.headers) + answer.body.decode()
        assert await chosen(q, EMBED, alice) == "mine-vec"
        for more in (PICTURES[CHAT], {"router": {"forbiddenModels": ["mine"]}}):
            answer = await sent(q, CHAT, auto(CHAT, **more), alice)
            assert answer.status == 503, answer
            assert b"secret" not in answer.body
        listed = (await ask(q.port, "GET", "/v1/models", headers=alice)).json()["data"]
        assert [one["id"] for one in listed] == ["mine", "mine-vec", "auto"]
        for route in ("status", "models", "gpu"):
            assert (await ask(q.port, "GET", f"/v1/router/{route}", headers=alice)).status == 403
            assert (await ask(q.port, "GET", f"/v1/router/{route}", headers=bob)).status == 200
            assert (await ask(q.port, "GET", f"/v1/router/{route}")).status == 401
        used = [one.json["model"] for one in box.requests]
        assert used[0] == "secret"
        assert "secret" not in used[1:]


async def test_key_without_any_model_here_is_told_that_there_is_none() -> None:
    rows = keys(alice={"models": ["gone"]})
    async with Box("a") as box, running(box.url, keys=rows, routes=routes("a")) as q:
        why = await refused(q, CHAT, bearer(rows["alice"]["key"]))
        assert "there is none" in why
        assert not box.requests


# ---- Where ------------------------------------------------------------------------------------


def two(first: FakeBackend, second: FakeBackend, **settings: Any) -> running:
    return running(backends={"one": {"url": first.url}, "two": {"url": second.url}}, **settings)


async def test_pinned_request_gets_a_model_of_that_backend() -> None:
    async with Box("a", "b") as one, Box("b", "c") as other:
        async with two(one, other, routes=routes("a", "c", "b")) as q:
            assert await chosen(q) == "a"
            answer = await sent(q, CHAT, auto(CHAT), {"X-LLMQ-Backend": "two"})
            assert answer.headers["x-llmq-backend"] == "two"
            assert answer.headers["x-llmq-model"] == "c"
            answer = await sent(q, CHAT, auto(CHAT), {"X-LLMQ-Backend": "three"})
            assert answer.status == 400


async def test_pinned_request_gets_no_model_that_the_settings_keep_from_that_backend() -> None:
    async with Box("a") as one, Box("a", "b") as other:
        async with two(
            one, other, models={"a": {"backends": ["one"]}}, routes=routes("a", "b")
        ) as q:
            assert await chosen(q, CHAT, {"X-LLMQ-Backend": "two"}) == "b"


async def test_backend_that_is_down_has_its_models_chosen_last() -> None:
    async with Box("a") as one, Box("b") as other:
        async with two(one, other, routes=routes("a", "b"), queue__down_wait=0.05) as q:
            assert await chosen(q) == "a"
            await one.stop_listening()
            one.drop_connections()
            backend = q.gateway.fleet.backends["one"]
            q.gateway.monitor.probe_now(backend)
            await eventually(lambda: not backend.usable)
            assert await chosen(q) == "b"
            draining = {"draining": True}
            await ask(q.port, "POST", "/llmq/backends/two", json=draining)
            answer = await sent(q, CHAT, auto(CHAT, router={}))
            assert answer.status == 503
            assert answer.headers["x-llmq-model"] == "a"
            assert "is down" in answer.headers["x-llmq-reason"]


async def test_request_that_comes_before_the_first_look_waits_for_it() -> None:
    async with Box("a", "b") as box:
        box.hold_probes()
        async with running(box.url, routes=routes("b", "a")) as q:
            asked = post(q, CHAT.path, auto(CHAT))
            await eventually(lambda: box.probe_paths)
            box.release_probes()
            assert (await asked).headers["x-llmq-model"] == "b"


async def test_without_any_runner_auto_is_told_so() -> None:
    box = Box("a")
    async with box:
        url = box.url
    async with running(url) as q:
        answer = await sent(q, CHAT, auto(CHAT))
        assert (answer.status, answer.code) == (503, "backend_down")


# ---- Graphics memory -------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
async def test_split_model_is_refused_where_it_must_be_on_the_gpu(whole: bool) -> None:
    """By the setting or by the request itself, whether it was named or not."""
    rows = {"a": {"gpu": 100 if whole else 60}}
    for settings, router in (({"router__require_gpu": True}, None), ({}, {"requireGpuOnly": True})):
        async with Box(**rows).load("a") as box, running(box.url, **settings) as q:
            more = {} if router is None else {"router": router}
            for name in ("auto", "a"):
                for dialect in (CHAT, MESSAGES, NATIVE_CHAT):
                    answer = await sent(q, dialect, auto(dialect, model=name, **more))
                    assert answer.status == (200 if whole else 503), answer
                    if not whole:
                        assert "split over CPU and GPU" in dialect.whole_error(answer)
            assert bool(box.requests) is whole


async def test_split_model_is_served_where_nobody_minds() -> None:
    async with Box(a={"gpu": 60}).load("a") as box, running(box.url) as q:
        assert await chosen(q) == "a"
        assert await chosen(q, router={"requireGpuOnly": False}) == "a"
        assert (await q.chat("hi", model="a")).status == 200


async def test_another_model_goes_where_the_first_would_be_split() -> None:
    settings: dict[str, Any] = {
        "devices": {"local": {"vram_gb": 16, "vram_reserve_gb": 2}},
        "routes": routes("big", "split", "edge"),
        "router__require_gpu": True,
    }
    models = {"big": {"gb": 14.5}, "split": {"gb": 3, "gpu": 50}, "edge": {"gb": 14}}
    async with Box(**models).load("split") as box, running(box.url, **settings) as q:
        answer = await sent(q, CHAT, auto(CHAT))
        assert answer.headers["x-llmq-model"] == "edge"
        for name in ("big", "split"):
            assert f"not {name}: is, or would be, split" in answer.headers["x-llmq-reason"]
        answer = await q.chat("hi", model="big")
        assert answer.status == 503
        assert (await q.chat("hi", model="edge")).status == 200


async def test_request_goes_to_the_backend_where_its_model_is_whole() -> None:
    async with Box(a={"gpu": 40}).load("a") as one, Box(a={"gpu": 100}).load("a") as other:
        async with two(one, other) as q:
            for name in ("a", "auto"):
                for _ in range(3):
                    body = auto(CHAT, model=name, router={"requireGpuOnly": True})
                    answer = await sent(q, CHAT, body)
                    assert (answer.status, answer.headers["x-llmq-backend"]) == (200, "two")


async def test_reserve_is_kept_free_of_models() -> None:
    settings: dict[str, Any] = {"routes": routes("big"), "router__require_gpu": True}
    for reserve, status in ((1.0, 200), (1.5, 503)):
        row = {"vram_gb": 16, "vram_reserve_gb": reserve}
        async with Box(big={"gb": 15}) as box:
            async with running(box.url, devices={"local": row}, **settings) as q:
                assert (await sent(q, CHAT, auto(CHAT))).status == status


async def test_model_that_needs_room_of_others_goes_one_place_down() -> None:
    settings: dict[str, Any] = {
        "devices": {"local": {"vram_gb": 16, "vram_reserve_gb": 1}},
        "routes": routes("big", "small"),
        "models": {"small": {"purpose": ["unknown"]}},
    }
    models = {"other": {"gb": 8}, "big": {"gb": 10}, "small": {"gb": 2}}
    async with Box(**models) as box, running(box.url, **settings) as q:
        assert await chosen(q) == "big"
    async with Box(**models).load("other") as box, running(box.url, **settings) as q:
        assert await chosen(q) == "small"


@pytest.mark.parametrize("degrade", [True, False])
async def test_smaller_model_of_the_row_goes_where_memory_is_too_short(degrade: bool) -> None:
    settings: dict[str, Any] = {
        "devices": {"local": {"vram_gb": 16, "vram_reserve_gb": 1}},
        "routes": routes("big", "other", "middle", "small"),
        "router__degrade": degrade,
    }
    models = {
        "other": {"gb": 12, "can": ["embedding"]},
        "big": {"gb": 14},
        "middle": {"gb": 9},
        "small": {"gb": 2},
    }
    async with Box(**models).load("other") as box, running(box.url, **settings) as q:
        answer = await sent(q, CHAT, auto(CHAT, router={}))
        assert answer.headers["x-llmq-model"] == ("small" if degrade else "big")
        if degrade:
            assert "in place of big, which needs 14.0 GiB of 4.0" in answer.headers["x-llmq-reason"]
            assert answer.json()["router"]["fallbackModels"][0] == "big"
        assert (await q.chat("hi", model="big")).headers["x-llmq-model"] == "big"


@pytest.mark.parametrize("degrade", [True, False])
async def test_smaller_model_goes_where_the_first_would_wait_too_long(degrade: bool) -> None:
    models = {"big": {"gb": 14}}
    settings: dict[str, Any] = {"routes": routes("big", "small"), "router__degrade": degrade}
    async with Box(auto=False, **models) as one, Box(small={"gb": 2}) as other:
        backends = {
            "one": {"url": one.url, "device": "x"},
            "two": {"url": other.url, "device": "y"},
        }
        async with running(backends=backends, **settings) as q:
            first = asyncio.ensure_future(q.chat("first", model="big"))
            held = await one.arrived()
            body = auto(CHAT, router={"maxQueueTimeMs": 1})
            answer = await sent(q, CHAT, body)
            if degrade:
                assert answer.headers["x-llmq-model"] == "small"
                assert "in place of big, which would wait" in answer.headers["x-llmq-reason"]
            else:
                assert (answer.status, answer.headers["x-llmq-model"]) == (503, "big")
            await held.answer("yes")
            await first


async def test_request_of_class_high_is_not_thought_to_wait_for_others() -> None:
    settings: dict[str, Any] = {"routes": routes("big", "small"), "router__degrade": True}
    async with Box(big={"gb": 14}, auto=False) as one, Box(small={"gb": 2}) as other:
        backends = {
            "one": {"url": one.url, "device": "x"},
            "two": {"url": other.url, "device": "y"},
        }
        async with running(backends=backends, **settings) as q:
            await told(q)
            asked = [post(q, CHAT.path, {**CHAT.body(str(n)), "model": "big"}) for n in range(4)]
            held = await one.arrived()
            await waiting(q, 3)
            _, seconds = q.gateway.scheduler.ahead_of([q.gateway.fleet.backends["one"]])
            # Too short only for whoever waits for those three.
            router = {"maxQueueTimeMs": 900 * seconds, "priority": "high"}
            last = post(q, CHAT.path, auto(CHAT, router=router))
            await eventually(lambda: last.done() or len(q.gateway.scheduler.waiting) == 4)
            assert not last.done(), last.result().headers["x-llmq-reason"]
            await held.answer("yes")
            for _ in range(4):
                await (await one.arrived()).answer("yes")
            assert (await last).headers["x-llmq-model"] == "big"
            await asyncio.gather(*asked)


async def test_degrade_stays_in_the_row_that_stands_in_for_the_one_of_the_task() -> None:
    settings: dict[str, Any] = {
        "devices": {"local": {"vram_gb": 16, "vram_reserve_gb": 1}},
        "routes": routes("big", "middle"),
        "models": {"good": {"purpose": ["code_fix"]}},
        "router__degrade": True,
    }
    models = {"other": {"gb": 12}, "big": {"gb": 14}, "middle": {"gb": 13}, "good": {"gb": 2}}
    async with Box(**models).load("other") as box, running(box.url, **settings) as q:
        answer = await sent(q, CHAT, auto(CHAT, router={"taskType": "code_fix"}))
        assert answer.headers["x-llmq-model"] == "big"


# ---- Later -----------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> str:
    return str(tmp_path / "state.db")


async def job_of(q: running, answer: Answer) -> Answer:
    """The result of the job that a request became."""
    assert answer.status == 202, answer
    path = f"/v1/jobs/{answer.json()['id']}"
    while (await ask(q.port, "GET", path)).json()["status"] in ("queued", "running"):
        pass
    return await ask(q.port, "GET", path + "/result")


@pytest.mark.parametrize("name", ["auto", "coder"])
async def test_job_tells_the_task_and_its_result_is_what_the_runner_answered(
    name: str, state: str
) -> None:
    rows = {"code_fix": ["coder"], "unknown": ["any"]}
    async with Box("any", "coder") as box, running(box.url, routes=rows, server__state=state) as q:
        router = {"mode": "async", "taskType": "code_fix"}
        answer = await sent(q, CHAT, auto(CHAT, model=name, router=router))
        facts = answer.json()["router"]
        assert facts["mode"] == "async"
        assert facts["taskType"] == "code_fix"
        assert facts["preferredModel"] == "coder"
        assert facts["estimatedClass"] == "medium"
        assert facts["position"] >= 1
        result = await job_of(q, answer)
        assert (result.status, result.content) == (200, "hi there")
        assert "router" not in result.json()
        assert result.json()["model"] == "coder"
        assert b"router" not in box.requests[-1].body


async def test_job_says_its_model_and_the_reason_at_once(state: str) -> None:
    async with Box("m") as box, running(box.url, server__state=state) as q:
        answer = await sent(q, CHAT, auto(CHAT, router={"mode": "async"}))
        assert answer.status == 202
        assert answer.headers["x-llmq-model"] == "m"
        assert answer.headers["x-llmq-reason"]


async def test_model_of_a_job_is_chosen_anew_when_it_runs(state: str) -> None:
    async with Box("a", "b") as box:
        async with running(box.url, routes=routes("a", "b"), server__state=state) as q:
            asked = asyncio.ensure_future(q.chat("first", model="a"))
            await asked
            box.hold()
            held = asyncio.ensure_future(q.chat("second", model="a"))
            await eventually(lambda: len(box.requests) == 2)
            q.gateway.set_mode(llmq.Mode.PAUSED)
            box.release()
            await held
            accepted = await sent(q, CHAT, auto(CHAT, router={"mode": "async"}))
            assert accepted.json()["router"]["preferredModel"] == "a"
            ident = accepted.json()["id"]
            await eventually(lambda: ident in q.gateway.calls)
        # After a restart it is chosen again.
        async with running(box.url, routes=routes("b"), server__state=state) as q:
            result = await job_of(q, accepted)
            assert (result.status, result.json()["model"]) == (200, "b")


async def test_request_that_allows_it_becomes_a_job_where_it_would_wait_too_long(
    state: str,
) -> None:
    async with Box("m", auto=False) as box, running(box.url, server__state=state) as q:
        first = asyncio.ensure_future(q.chat("first", model="m"))
        held = await box.arrived()
        router = {"allowAsync": True, "maxQueueTimeMs": 1}
        later = await sent(q, CHAT, auto(CHAT, router=router))
        assert later.status == 202
        patient = {"allowAsync": True, "maxQueueTimeMs": 3_600_000}
        second = post(q, CHAT.path, auto(CHAT, router=patient))
        await eventually(lambda: len(q.gateway.scheduler.waiting) == 2)
        assert not second.done()
        await held.answer("yes")
        for _ in range(2):
            await (await box.arrived()).answer("yes")
        answer = await second
        assert (answer.status, answer.json()["router"]["mode"]) == (200, "sync")
        assert (await job_of(q, later)).content == "yes"
        await first


# ---- What is shown ---------------------------------------------------------------------------


async def test_auto_is_in_the_list_of_models_only_where_there_are_routes() -> None:
    async with Box("a") as box:
        async with running(box.url, routes=routes("a")) as q:
            listed = (await ask(q.port, "GET", "/v1/models")).json()["data"]
            assert [row["id"] for row in listed] == ["a", "auto"]
            version = {"anthropic-version": "2023-06-01"}
            listed = (await ask(q.port, "GET", "/v1/models", headers=version)).json()["data"]
            assert [row["id"] for row in listed] == ["a", "auto"]
        async with running(box.url) as q:
            listed = (await ask(q.port, "GET", "/v1/models")).json()["data"]
            assert [row["id"] for row in listed] == ["a"]


async def test_model_that_is_listed_can_be_looked_up() -> None:
    async with Box("a") as box, running(box.url, routes=routes("a")) as q:
        answer = await ask(q.port, "GET", "/v1/models/auto")
        assert (answer.status, answer.json()["id"]) == (200, "auto")


async def test_tokens_of_a_request_for_auto_are_counted_as_for_any_other() -> None:
    async with Box("a") as box, running(box.url, routes=routes("a")) as q:
        body = auto(MESSAGES, "word " * 100)
        answer = await ask(q.port, "POST", "/v1/messages/count_tokens", json=body)
        assert answer.status == 200, answer
        assert 100 <= answer.json()["input_tokens"] <= 200


async def test_status_of_the_router_tells_what_auto_goes_by() -> None:
    settings: dict[str, Any] = {
        "routes": routes("a", "b", task="code_fix"),
        "router__degrade": True,
    }
    async with Box("a", "b", auto=False).load("b") as box, running(box.url, **settings) as q:
        asked = [post(q, CHAT.path, {**CHAT.body(str(n)), "model": "b"}) for n in range(2)]
        held = await box.arrived()
        await waiting(q, 1)
        facts = (await ask(q.port, "GET", "/v1/router/status")).json()
        assert (facts["status"], facts["mode"]) == ("ok", "open")
        assert facts["routes"] == {"code_fix": ["a", "b"]}
        assert (facts["degrade"], facts["requireGpu"]) == (True, False)
        assert facts["loadedModels"] == ["b"]
        assert facts["queues"] == [{"model": "b", "queued": 1, "running": 1}]
        assert facts["jobs"] == {"queued": 0}
        assert facts["gpu"]["provider"] == "none"
        await held.answer("yes")
        await (await box.arrived()).answer("yes")
        await asyncio.gather(*asked)


async def test_models_of_the_router_tell_all_that_speaks_for_each() -> None:
    models = {"a": {"purpose": ["code_fix"], "max_concurrent": 2, "tags": ["tools"]}}
    boxes = {"a": {"gb": 3, "gpu": 50, "context": 4096}, "b": {**SEES, "gb": 2}}
    async with Box(**boxes).load("a") as box, running(box.url, models=models) as q:
        await chosen(q)
        rows = (await ask(q.port, "GET", "/v1/router/models")).json()["models"]
        first, second = rows
        assert first == {
            "name": "a",
            "backends": list(q.gateway.fleet.backends),
            "loaded": True,
            "gpuPct": 50,
            "sizeGb": 3.0,
            "context": 4096,
            "capabilities": [],
            "purpose": ["code_fix"],
            "tags": ["tools"],
            "exclusive": False,
            "maxConcurrent": 2,
        }
        assert (second["name"], second["loaded"], second["gpuPct"]) == ("b", False, None)
        assert (second["sizeGb"], second["capabilities"]) == (2.0, ["vision"])


async def test_gpu_of_the_router_tells_cards_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(_tool: str) -> tuple[str, list[llmq.Card], None]:
        return "nvidia", [llmq.Card("RTX", 20480, 4096, 7)], None

    monkeypatch.setattr(llmq, "read_cards", read)
    async with Box("a") as box, running(box.url) as q:
        facts = (await ask(q.port, "GET", "/v1/router/gpu")).json()
        assert (facts["provider"], facts["available"], facts["error"]) == ("nvidia", True, None)
        assert facts["gpus"] == [
            {
                "name": "RTX",
                "vramTotalMb": 20480,
                "vramUsedMb": 4096,
                "vramFreeMb": 16384,
                "utilizationPct": 7,
            }
        ]
        memory = {"total_gb": 20.0, "free_gb": 16.0, "reserve_gb": 1.0}
        assert facts["devices"] == {"local": memory}
        assert facts["age_s"] >= 0


async def test_memory_of_a_device_is_as_configured_less_what_is_loaded() -> None:
    devices = {"local": {"vram_gb": 24, "vram_reserve_gb": 2}}
    async with Box(a={"gb": 10, "gpu": 50}, b={"gb": 4}).load("a", "b") as box:
        async with running(box.url, devices=devices) as q:
            facts = (await ask(q.port, "GET", "/v1/router/gpu")).json()
            memory = {"total_gb": 24.0, "free_gb": 15.0, "reserve_gb": 2.0}
            assert facts["devices"] == {"local": memory}
            assert (facts["available"], facts["gpus"]) == (False, [])


@pytest.mark.parametrize("route", ["status", "models", "gpu"])
async def test_routes_of_the_router_are_no_foreign_pages(route: str) -> None:
    async with Box("a") as box, running(box.url) as q:
        path = f"/v1/router/{route}"
        assert (await ask(q.port, "GET", path, headers=EVIL)).status == 403
        head = await ask(q.port, "HEAD", path)
        assert (head.status, head.body) == (200, b"")
        assert (await ask(q.port, "POST", path, json={})).status == 405


async def test_records_name_the_model_that_was_chosen() -> None:
    async with Box("a") as box, running(box.url) as q:
        await chosen(q)
        (record,) = await ended(q)
        assert record["model"] == "a"


# ---- Odd bodies ------------------------------------------------------------------------------

ODD: list[Any] = [None, True, 1, 1.5, "text", [], {}, [None], [1], ["a"], [[]], [{}], [[{}]]]


FEW = [None, 1, "text", [], {}, [None]]


def odd_bodies(odds: list[Any] = ODD) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for odd in odds:
        part = {"type": "text", "text": "hi"}
        found += [
            {"messages": odd},
            {"messages": [{"role": odd, "content": "hi"}]},
            {"messages": [{"role": "user", "content": odd}]},
            {"messages": [{"role": "user", "content": [odd, part]}]},
            {"messages": [{"role": "user", "content": [{"type": odd, "text": "hi"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": odd}]}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": odd}]}]},
            {"messages": [{"role": "user", "content": "hi", "images": odd}]},
            {"messages": [{"role": "user", "content": "hi"}], "tools": odd},
            {"messages": [{"role": "user", "content": "hi"}], "functions": odd},
            {"messages": [{"role": "user", "content": "hi"}], "system": odd},
            {"messages": [{"role": "user", "content": "hi"}], "options": odd},
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": odd},
            {"prompt": odd},
            {"prompt": "hi", "images": odd},
            {"input": odd},
            {"input": [{"role": "user", "content": odd}]},
            {"input": [{"type": odd, "role": "user", "content": [{"type": odd}]}]},
        ]
    return found


@pytest.mark.parametrize(
    "dialect", [CHAT, MESSAGES, NATIVE_CHAT, RESPONSES, GENERATE, EMBED], ids=repr
)
async def test_odd_bodies_are_a_clear_error_or_an_answer(dialect: Dialect) -> None:
    async def reply(request: FakeRequest) -> None:
        box.contexts[full(request.json["model"])] = 4096
        await request.status(200, dialect.whole("m", "yes"))

    async with Box("m", vec={"can": ["embedding"]}) as box:
        box.answer = reply  # type: ignore[method-assign]
        settings: dict[str, Any] = {"routes": routes("m"), "cache__embeddings": False}
        async with running(box.url, **settings) as q:
            async with client(q) as one:
                (member,) = {"messages", "prompt", "input"} & dialect.body("hi").keys()
                for body in [one for one in odd_bodies(FEW) if member in one]:
                    status, told = await one(dialect, {"model": "auto", "stream": False, **body})
                    assert status in (200, 400, 501, 503), (body, told)
                    if status == 503:
                        assert b"no model can serve this" in told, (body, told)


@contextlib.asynccontextmanager
async def client(q: running) -> AsyncIterator[Any]:
    """Asks one after the other on one connection: many bodies cost little."""
    async with await Raw.open(q.port) as raw:

        async def one(dialect: Dialect, body: Any) -> tuple[int, bytes]:
            data = json.dumps(body).encode()
            await raw.send(http("POST", dialect.path, {"Content-Type": "application/json"}, data))
            answer = await raw.response()
            return answer.status, answer.body

        yield one


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each prompt that is classified, whether the main thread does it."""
    noted: list[bool] = []

    def classify(*_: Any, **__: Any) -> llmq.Verdict:
        noted.append(threading.current_thread() is threading.main_thread())
        return llmq.Verdict("unknown", "monkey")

    monkeypatch.setattr(llmq, "classify", classify)
    return noted


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, NATIVE_CHAT], ids=repr)
async def test_huge_bodies_are_read_beside_the_loop_and_answered(
    dialect: Dialect, threads: list[bool]
) -> None:
    row = {"role": "user", "content": "hi"}
    bodies = [[row] * 30_000, [{"role": "user", "content": "word " * (1 << 20)}], [row]]
    async with Box(m={"context": 1 << 24}) as box, running(box.url) as q:
        for messages in bodies:
            answer = await sent(q, dialect, auto(dialect, messages=messages))
            assert answer.status == 200, answer
        assert [len(request.json["messages"]) for request in box.requests] == [30_000, 1, 1]
    assert threads == [False, False, True]


async def test_huge_named_bodies_with_router_are_read_beside_the_loop_too(
    threads: list[bool],
) -> None:
    messages = [{"role": "user", "content": "hi"}] * 30_000
    async with Box("m") as box, running(box.url) as q:
        answer = await sent(q, CHAT, auto(CHAT, model="m", messages=messages, router={}))
        assert answer.status == 200, answer
    assert threads == [False]


def test_prompt_is_read_from_every_shape_without_an_error() -> None:
    for body in odd_bodies():
        prompt = llmq.read_prompt(body)
        assert isinstance(prompt.text, str)
        assert prompt.tokens >= 1
