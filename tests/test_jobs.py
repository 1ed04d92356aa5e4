"""Jobs: what is asked now and answered later, from its 202 to its result."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.fake_ollama import Ollama, least, told
from tests.fakes import (
    Answer,
    FakeBackend,
    FakeRequest,
    Raw,
    ask,
    chat,
    eventually,
    free_port,
    http,
    run_llmq,
    running,
)
from tests.test_keys import EVIL, bearer, keys

CHAT = "/v1/chat/completions"
ASYNC = {"Prefer": "respond-async"}
JSON = {"Content-Type": "application/json"}
OPEN = ("queued", "running")
Headers = dict[str, str]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for another attempt is tried again soon."""
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.02)


def serving(state: Path, *fakes: FakeBackend, **settings: Any) -> running:
    return running(*[fake.url for fake in fakes], server__state=str(state), **settings)


def user(name: str) -> Headers:
    return {"X-User-ID": name}


def is_there(path: Path | str) -> bool:
    return Path(path).exists()


async def submit(q: running, text: str, headers: Headers | None = None, **more: Any) -> str:
    """The id of a new job."""
    answer = await q.chat(text, {**ASYNC, **(headers or {})}, **more)
    assert answer.status == 202, answer
    return str(answer.json()["id"])


async def look(q: running, ident: str, headers: Headers | None = None) -> dict[str, Any]:
    answer = await ask(q.port, "GET", f"/v1/jobs/{ident}", headers=headers)
    assert answer.status == 200, answer
    return dict(answer.json())


async def result(q: running, ident: str, headers: Headers | None = None) -> Answer:
    return await ask(q.port, "GET", f"/v1/jobs/{ident}/result", headers=headers)


async def cancel(q: running, ident: str, headers: Headers | None = None) -> Answer:
    return await ask(q.port, "DELETE", f"/v1/jobs/{ident}", headers=headers)


async def listed(q: running, query: str = "", headers: Headers | None = None) -> list[str]:
    """The ids of a list of jobs, in its order."""
    answer = await ask(q.port, "GET", f"/v1/jobs{query}", headers=headers)
    assert answer.status == 200, answer
    return [row["id"] for row in answer.json()["data"]]


async def reached(q: running, ident: str, status: str) -> dict[str, Any]:
    """The job once it has this status; the test's deadline ends it otherwise."""
    while (facts := await look(q, ident))["status"] != status:
        assert facts["status"] in OPEN, facts
    return facts


async def held(q: running, number: int) -> None:
    """Return once the scheduler lets exactly so many wait."""
    await eventually(lambda: len(q.gateway.scheduler.waiting) == number)


# ---- How a job is asked for ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "router"),
    [
        (ASYNC, None),
        ({"Prefer": "wait=10, respond-async"}, None),
        ({"prefer": 'handling=lenient,Respond-Async; foo="1"'}, None),
        ({}, {"mode": "async"}),
        ({}, {"mode": "async", "allowAsync": False}),
        (ASYNC, {"mode": "auto"}),
        (ASYNC, {}),
    ],
    ids=["header", "tokens", "cases", "body", "body-over-allowed", "auto", "empty"],
)
async def test_who_asks_so_is_answered_later(headers: Headers, router: Any, state: Path) -> None:
    more = {} if router is None else {"router": router}
    async with FakeBackend() as fake, serving(state, fake) as q:
        answer = await q.chat("hello there", headers, temperature=0.5, **more)
        facts = answer.json()
        assert (answer.status, facts["object"], facts["status"]) == (202, "router.job", "queued")
        assert facts["id"].startswith("job_")
        assert answer.headers["location"] == f"/v1/jobs/{facts['id']}"
        assert answer.headers["preference-applied"] == "respond-async"
        assert answer.headers["x-llmq-class"] == "low"
        job = await reached(q, facts["id"], "succeeded")
        assert (job["attempts"], job["error"], job["model"]) == (1, None, "m")
        later = await result(q, facts["id"])
        assert (later.status, later.content) == (200, "hello there")
        (request,) = fake.requests
        assert request.json == chat("hello there", temperature=0.5)


async def test_a_preference_may_stand_in_a_field_of_its_own(state: Path) -> None:
    pairs = [("Prefer", "wait=1"), ("Prefer", "respond-async"), ("Connection", "close")]
    async with FakeBackend() as fake, serving(state, fake) as q:
        async with await Raw.open(q.port) as raw:
            await raw.send(http("POST", CHAT, pairs, json.dumps(chat("hi")).encode()))
            assert (await raw.response()).status == 202
        await eventually(lambda: fake.requests)


@pytest.mark.parametrize(
    ("headers", "router"),
    [
        ({}, None),
        ({"Prefer": "wait=5, return=minimal"}, None),
        ({"Prefer": "not-respond-async"}, None),
        ({}, {"mode": "sync"}),
        (ASYNC, {"mode": "sync"}),
        ({}, {"mode": "sync", "allowAsync": True}),
        ({}, {"mode": "auto"}),
        ({}, {"allowAsync": True}),
        ({}, {"later": "may be"}),
    ],
)
async def test_all_others_are_answered_now_and_nothing_is_kept(
    headers: Headers, router: Any, state: Path
) -> None:
    more = {} if router is None else {"router": router}
    async with FakeBackend() as fake, serving(state, fake) as q:
        answer = await q.chat("hi", headers, **more)
        assert (answer.status, answer.content) == (200, "hi")
        assert "router" not in fake.requests[0].json
        assert q.gateway.store.is_open is False
        assert not is_there(state)


@pytest.mark.parametrize(
    ("router", "param"),
    [
        ("async", "router"),
        ([], "router"),
        (True, "router"),
        ({"mode": "later"}, "router.mode"),
        ({"mode": True}, "router.mode"),
        ({"mode": []}, "router.mode"),
        ({"allowAsync": "yes"}, "router.allowAsync"),
        ({"allowAsync": 1}, "router.allowAsync"),
    ],
)
async def test_a_router_of_a_wrong_shape_is_refused(router: Any, param: str, state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        answer = await q.chat("hi", ASYNC, router=router)
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)
        assert fake.requests == []
        assert not is_there(state)


@pytest.mark.parametrize("router", [{"allowAsync": True}, {"mode": "auto", "allowAsync": True}])
async def test_where_it_is_allowed_it_is_answered_later_only_if_it_could_not_start(
    router: Any, state: Path
) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        assert (await q.chat("one", router=router)).status == 200
        fake.hold()
        second = asyncio.ensure_future(q.chat("two", router=router))
        await eventually(lambda: len(fake.requests) == 2)
        answer = await q.chat("three", router=router)
        assert answer.status == 202
        fake.release()
        assert (await second).content == "two"
        ident = answer.json()["id"]
        assert (await reached(q, ident, "succeeded"))["class"] == "low"
        assert (await result(q, ident)).content == "three"


async def test_where_a_model_has_all_that_it_may_run_it_is_answered_later(state: Path) -> None:
    settings = {"queue__slots": 2, "models": {"m": {"max_concurrent": 1}}}
    async with FakeBackend() as fake, serving(state, fake, **settings) as q:
        await told(q)
        fake.hold()
        first = asyncio.ensure_future(q.chat("one"))
        await eventually(lambda: fake.requests)
        answer = await q.chat("two", router={"allowAsync": True})
        assert answer.status == 202  # though a slot is free
        fake.release()
        assert (await first).content == "one"
        await reached(q, answer.json()["id"], "succeeded")


async def test_what_is_wrong_with_a_request_is_told_at_once(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        await told(q)
        assert (await q.chat("hi", ASYNC, model="nobody-has-it")).status == 404
        bad = await ask(q.port, "POST", CHAT, json={"model": "m"}, headers=ASYNC)
        assert bad.status == 400
        assert not is_there(state)


async def test_half_a_character_in_the_name_of_a_model_harms_nobody(state: Path) -> None:
    body = json.dumps(chat("hi", model="\ud800")).encode()
    async with FakeBackend() as fake, serving(state, fake) as q:
        await told(q)
        answer = await ask(q.port, "POST", CHAT, body=body, headers={**JSON, **ASYNC})
        assert answer.status == 404
    async with running("http://127.0.0.1:9", server__state=str(state)) as q:  # may have it
        answer = await ask(q.port, "POST", CHAT, body=body, headers={**JSON, **ASYNC})
        assert answer.status == 202
        assert (await look(q, answer.json()["id"]))["status"] == "queued"
        assert (await cancel(q, answer.json()["id"])).status == 200


class Accepts(FakeBackend):
    """A runner that keeps what it is asked for later, as some do for videos."""

    async def _answer(self, request: FakeRequest) -> None:
        await request.status(202, {"id": "its own"})


async def test_what_a_runner_accepts_for_later_is_no_job_and_has_its_record() -> None:
    async with Accepts() as fake, running(fake.url, server__allow_all_routes=True) as q:
        await told(q)
        answer = await ask(q.port, "POST", "/v1/videos", json={"model": "m"})
        assert (answer.status, answer.json()) == (202, {"id": "its own"})
        (record,) = (await q.status())["recent"]
        assert (record["status"], record["outcome"]) == (202, "done")


# ---- What comes of it ------------------------------------------------------------------------

ALSO_NATIVE = (
    "/v1/chat/completions", "/chat/completions", "/v1/embeddings", "/api/chat", "/api/generate",
    "/api/embed", "/api/embeddings",
)  # fmt: skip


@pytest.mark.parametrize("path", ALSO_NATIVE)
async def test_result_is_what_the_answer_would_have_been(path: str, state: Path) -> None:
    async with Ollama() as fake, serving(state, fake, cache__embeddings=False) as q:
        body = least(path, model="m")
        now = await ask(q.port, "POST", path, json=body)
        answer = await ask(q.port, "POST", path, json={**body, "router": {"mode": "async"}})
        assert answer.status == 202
        ident = answer.json()["id"]
        assert (await reached(q, ident, "succeeded"))["route"] == path
        later = await result(q, ident)
        assert (later.status, later.body) == (now.status, now.body)
        assert later.headers["content-type"] == now.headers["content-type"]
        first, second = fake.requests
        assert (first.path, first.json) == (second.path, second.json)


async def test_a_stream_is_kept_as_its_text(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        now = await q.chat("one two three", stream=True)
        ident = await submit(q, "one two three", stream=True)
        await reached(q, ident, "succeeded")
        later = await result(q, ident)
        assert later.headers["content-type"] == "text/event-stream"
        assert later.content == "one two three"
        assert later.body == now.body


async def test_a_form_is_kept_as_it_came(state: Path) -> None:
    path, kind = "/v1/audio/transcriptions", "multipart/form-data; boundary=xx"
    part = b'--xx\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = part % (b"model", b"m") + part % (b"file", bytes(range(256))) + b"--xx--\r\n"
    headers = {**ASYNC, "Content-Type": kind}
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        answer = await ask(q.port, "POST", path, body=body, headers=headers)
        assert answer.status == 202
        request = await fake.arrived()
        assert (request.path, request.body, request.headers["content-type"]) == (path, body, kind)
        await request.status(200, {"text": "hello"})
        await reached(q, answer.json()["id"], "succeeded")
        assert (await result(q, answer.json()["id"])).json() == {"text": "hello"}


async def test_header_fields_and_query_reach_the_runner(state: Path) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {**ASYNC, "traceparent": trace, "X-LLMQ-Backend": "two", "User-Agent": "mine/1"}
    async with FakeBackend() as one, FakeBackend(auto=False) as two:
        backends = [f"one={one.url}", f"two={two.url}"]
        async with serving(state, backends=backends) as q:
            answer = await ask(q.port, "POST", f"{CHAT}?a=b", json=chat("hi"), headers=headers)
            assert answer.status == 202, answer
            request = await two.arrived()
            assert request.path == f"{CHAT}?a=b"
            assert request.headers["traceparent"] == trace
            assert request.headers["user-agent"] == "mine/1"
            assert "prefer" not in request.headers
            await request.answer("hi")
            await reached(q, answer.json()["id"], "succeeded")


async def test_a_job_tells_how_it_is_from_its_beginning_to_its_end(state: Path) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        before = int(time.time())
        ident = await submit(q, "hi", user("eve"))
        await held(q, 1)
        queued = await look(q, ident, user("eve"))
        assert queued["status"] == "queued"
        assert (queued["position"], queued["attempts"], queued["started_at"]) == (1, 0, None)
        assert (queued["client"], queued["route"]) == ("user:eve", CHAT)
        assert (await q.status())["jobs"] == {"queued": 1, "running": 0}
        early = await result(q, ident)
        assert (early.status, early.json()["status"]) == (202, "queued")
        assert early.headers["retry-after"]
        q.gateway.set_mode(llmq.Mode.OPEN)
        request = await fake.arrived()
        runs = await reached(q, ident, "running")
        assert (runs["attempts"], runs["completed_at"], runs["expires_at"]) == (1, None, None)
        assert runs["started_at"] >= runs["created_at"] >= before
        assert (await q.status())["jobs"] == {"queued": 0, "running": 1}
        assert (await result(q, ident)).status == 202
        await request.answer("well")
        done = await reached(q, ident, "succeeded")
        assert done["expires_at"] == done["completed_at"] + 24 * 3600
        assert (await q.status())["jobs"] == {"queued": 0, "running": 0}
        for _ in range(2):  # it is there as long as it is kept
            assert (await result(q, ident)).content == "well"


@pytest.mark.parametrize("kept_open", [True, False])
async def test_a_job_runs_from_when_its_runner_is_asked(kept_open: bool, state: Path) -> None:
    """Not from the first byte of its answer, which may take minutes."""
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        first, second = await submit(q, "one"), await submit(q, "two")
        for ident in (first, second):
            request = await fake.arrived()
            await eventually(lambda: not q.gateway.jobs.news.is_set())
            for _ in range(20):
                facts = await look(q, ident)
                if facts["status"] == "running":
                    break
            assert (facts["status"], facts["attempts"]) == ("running", 1)
            assert facts["started_at"]
            await request.answer("well")
            if not kept_open:
                request.close()
            await reached(q, ident, "succeeded")
        one, two = fake.requests
        assert (one.connection is two.connection) is kept_open


async def test_each_job_is_asked_once_and_ends_with_its_own_answer(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, queue__slots=3) as q:
        names = [f"job {number}" for number in range(40)]
        idents = await asyncio.gather(*[submit(q, name) for name in names])
        for name, ident in zip(names, idents):
            await reached(q, ident, "succeeded")
            assert (await result(q, ident)).content == name
        assert sorted(request.text for request in fake.requests) == sorted(names)
        assert fake.max_active <= 3


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("kept", [True, False], ids=["with-a-file", "without"])
async def test_a_job_that_is_not_there_is_404(method: str, kept: bool, state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        if kept:
            await submit(q, "hi")
        answer = await ask(q.port, method, "/v1/jobs/job_0")
        assert (answer.status, answer.code) == (404, "not_found")
        assert (await result(q, "job_0")).status == 404
        assert is_there(state) is kept or method == "DELETE"


async def test_a_list_has_the_latest_first_in_pages(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        assert await listed(q) == []
        idents = [await submit(q, str(number)) for number in range(5)][::-1]
        assert await listed(q) == idents
        page = (await ask(q.port, "GET", "/v1/jobs?limit=2")).json()
        assert [row["id"] for row in page["data"]] == idents[:2]
        assert (page["object"], page["has_more"]) == ("list", True)
        page = (await ask(q.port, "GET", f"/v1/jobs?limit=3&after={page['last_id']}")).json()
        assert [row["id"] for row in page["data"]] == idents[2:]
        assert page["has_more"] is False
        assert (await ask(q.port, "GET", "/v1/jobs?limit=0")).status == 400


async def test_a_place_is_told_as_it_is_from_outside(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, server__base_path="/llm") as q:
        answer = await ask(q.port, "POST", f"/llm{CHAT}", json=chat("hi"), headers=ASYNC)
        assert answer.status == 202
        assert (await ask(q.port, "GET", answer.headers["location"])).status == 200


async def test_a_place_is_told_as_it_is_from_outside_of_a_port(state: Path) -> None:
    port = free_port()
    settings: Any = {"server__base_path": "/llm", "ports": {str(port): {}}}
    async with FakeBackend() as fake, serving(state, fake, **settings):
        answer = await ask(port, "POST", CHAT, json=chat("hi"), headers=ASYNC)
        assert answer.status == 202
        place = answer.headers["location"]
        assert place in answer.json()["message"]
        assert (await ask(port, "GET", place)).json()["id"] == answer.json()["id"]


async def test_zeros_before_a_limit_change_nothing(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        idents = [await submit(q, "hi") for _ in range(2)]
        for limit in ("1", "0001", "0000000000001"):
            assert await listed(q, f"?limit={limit}") == idents[1:]
        assert await listed(q, "?limit=0000000000002") == idents[::-1]
        assert (await ask(q.port, "GET", "/v1/jobs?limit=0000")).status == 400


async def test_a_query_is_in_no_line_of_the_log(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "llmq")
    async with FakeBackend() as fake, serving(state, fake) as q:
        path = f"{CHAT}?api_key=sesame"
        answer = await ask(q.port, "POST", path, json=chat("hi"), headers=ASYNC)
        await reached(q, answer.json()["id"], "succeeded")
    assert any(one.message.endswith(f"is kept: {CHAT}") for one in caplog.records)
    assert "sesame" not in caplog.text


async def test_header_fields_are_kept_no_longer_than_a_job_takes(state: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        rows = {"one": {"url": fake.url, "relay_headers": ["x-secret"]}}
        async with serving(state, backends=rows) as q:
            secret = {"X-Secret": "sesame"}
            idents = [await submit(q, "hi", secret) for _ in range(3)]
            request = await fake.arrived()
            assert request.headers["x-secret"] == "sesame"
            await request.answer("hi")
            await reached(q, idents[0], "succeeded")
            await (await fake.arrived()).status(422, {"error": {"message": "no"}})
            await reached(q, idents[1], "failed")
            await cancel(q, idents[2])
            rows_kept = await q.gateway.store.read("SELECT headers FROM jobs")
            assert rows_kept == [("{}",)] * 3


# ---- Failures --------------------------------------------------------------------------------


async def test_what_the_runner_refuses_has_failed_with_its_words(state: Path) -> None:
    refusal = {"error": {"message": "too hot", "type": "invalid_request_error", "code": "hot"}}
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        now = asyncio.ensure_future(q.chat("hi"))
        await (await fake.arrived()).status(422, refusal)
        ident = await submit(q, "hi")
        await (await fake.arrived()).status(422, refusal)
        job = await reached(q, ident, "failed")
        assert job["attempts"] == 1
        later = await result(q, ident)
        assert (later.status, later.body) == (422, (await now).body)
        assert len(fake.requests) == 2


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_runner_that_breaks_is_asked_as_often_as_a_job_may_begin(
    most: int, stream: bool, state: Path
) -> None:
    settings = {"jobs__max_attempts": most, "queue__max_attempts": 1}
    probes = {"upstream__probe_interval": 0.05}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings, **probes) as q:
        ident = await submit(q, "hi", stream=stream)
        for _ in range(most):
            request = await fake.arrived()
            if stream:
                await request.start_stream()
                await request.piece("half")
            request.reset()
        job = await reached(q, ident, "failed")
        assert job["attempts"] == most
        assert job["error"]
        later = await result(q, ident)
        assert later.status == 502  # and of a stream what came of it, and the error behind it
        assert len(fake.requests) == most
        assert later.body.count(b"half") == int(stream)


@pytest.mark.usefixtures("soon")
async def test_a_job_that_broke_once_succeeds_the_next_time(state: Path) -> None:
    settings = {"queue__max_attempts": 1, "upstream__probe_interval": 0.05}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings) as q:
        ident = await submit(q, "hi")
        request = await fake.arrived()
        await request.start_stream()
        request.reset()
        await (await fake.arrived()).answer("hello")
        assert (await reached(q, ident, "succeeded"))["attempts"] == 2
        assert (await result(q, ident)).content == "hello"


@pytest.mark.usefixtures("soon")
async def test_while_its_backend_is_down_a_job_waits(state: Path) -> None:
    settings = {"queue__down_wait": 0.05, "upstream__probe_interval": 0.05}
    async with FakeBackend() as fake, serving(state, fake, **settings) as q:
        await told(q)
        await fake.stop_listening()
        fake.drop_connections()
        ident = await submit(q, "hi")
        recent = q.gateway.journal.recent
        await eventually(lambda: len([one for one in recent if one.outcome == "backend_down"]) > 2)
        assert (await look(q, ident))["status"] == "queued"
        await fake.listen_again()
        assert (await reached(q, ident, "succeeded"))["attempts"] == 1
        assert len(fake.requests) == 1


@pytest.mark.usefixtures("soon")
async def test_a_full_queue_lets_a_job_wait(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, queue__max_depth=2) as q:
        fake.hold()
        idents = [await submit(q, str(number)) for number in range(5)]
        recent = q.gateway.journal.recent
        await eventually(lambda: any(one.outcome == "queue_full" for one in recent))
        fake.release()
        for ident in idents:
            await reached(q, ident, "succeeded")
        assert len(fake.requests) == 5


@pytest.mark.usefixtures("soon")
async def test_a_job_waits_beyond_the_longest_wait_of_its_class(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, queue__max_wait_low=0.01) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        ident = await submit(q, "hi")
        recent = q.gateway.journal.recent
        await eventually(lambda: [one.outcome for one in recent].count("wait_timeout") > 1)
        assert (await look(q, ident))["attempts"] == 0
        q.gateway.set_mode(llmq.Mode.OPEN)
        await reached(q, ident, "succeeded")


async def test_what_waited_long_is_kept_as_the_runner_said_it(state: Path) -> None:
    """Signs of life are for who waits at the line."""
    signs = {"server__heartbeat_after": 0.01, "server__whole_heartbeat_after": 0.01}
    settings = {**signs, "server__heartbeat_interval": 0.01}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings) as q:
        asked = [(False, 200), (True, 200), (False, 422), (True, 422)]
        for stream, status in asked:
            ident = await submit(q, "hi", stream=stream)
            request = await fake.arrived()
            call = q.gateway.calls[ident]
            beats = call.heartbeats
            llmq.send_heartbeats(q.gateway, q.gateway.now() + 3600)  # an hour has passed
            assert call.heartbeats >= beats
            if status == 200:
                await request.answer("hello there")
            else:
                await request.status(status, {"error": {"message": "no", "code": status}})
            await reached(q, ident, "succeeded" if status == 200 else "failed")
            later = await result(q, ident)
            assert later.status == status
            assert b"waiting" not in later.body
            assert later.body[:1] in (b"{", b"d"), later.body


async def test_an_answer_that_is_too_long_to_be_kept_has_failed_and_says_so(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "MOST_KEPT", 1000)
    async with FakeBackend() as fake, serving(state, fake) as q:
        ident = await submit(q, "word " * 1000)
        assert "too long" in (await reached(q, ident, "failed"))["error"]
        later = await result(q, ident)
        assert later.status >= 500
        assert "too long" in later.json()["error"]["message"]


@pytest.mark.usefixtures("soon")
async def test_a_stream_that_broke_off_is_no_good_result(state: Path) -> None:
    settings: Any = {"queue__max_attempts": 1, "jobs__max_attempts": 1}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings) as q:
        ident = await submit(q, "hi", stream=True)
        request = await fake.arrived()
        await request.start_stream()
        await request.piece("half")
        request.reset()
        await reached(q, ident, "failed")
        later = await result(q, ident)
        assert later.status == 502
        assert b"half" in later.body


async def test_a_fault_of_llmq_fails_the_job_that_meets_it(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        met = []

        def broken(call: Any) -> None:
            met.append(call.id)
            raise RuntimeError("a fault")

        monkeypatch.setattr(q.gateway, "enqueue", broken)
        ident = await submit(q, "hi")
        while (facts := await look(q, ident))["status"] in OPEN:
            assert len(met) < 5  # it does not go round in a circle
        assert "a fault" in caplog.text
        assert (facts["status"], met) == ("failed", [ident])
        assert facts["error"]
        assert (await result(q, ident)).status == 500
        assert fake.requests == []


# ---- Cancelling ------------------------------------------------------------------------------


async def cancelled(q: running, ident: str) -> None:
    """Cancel it, once, with all that is to be seen of that."""
    answer = await cancel(q, ident)
    assert (answer.status, answer.json()["status"]) == (200, "cancelled")
    assert (await look(q, ident))["status"] == "cancelled"
    late = await result(q, ident)
    assert (late.status, late.code) == (409, "conflict")
    again = await cancel(q, ident)
    assert (again.status, again.code) == (409, "conflict")


async def test_a_job_that_waits_in_the_store_is_cancelled(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "FED", 2)
    async with FakeBackend() as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        idents = [await submit(q, str(number)) for number in range(4)]
        await held(q, 2)
        await cancelled(q, idents[3])
        await cancelled(q, idents[1])  # which waits in the scheduler
        await held(q, 2)
        q.gateway.set_mode(llmq.Mode.OPEN)
        for ident in (idents[0], idents[2]):
            await reached(q, ident, "succeeded")
        assert [request.text for request in fake.requests] == ["0", "2"]
        assert (await q.status())["jobs"] == {"queued": 0, "running": 0}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_job_that_runs_is_cancelled_and_its_runner_let_go(
    stream: bool, state: Path
) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        ident = await submit(q, "hi", stream=stream)
        request = await fake.arrived()
        if stream:
            await request.start_stream()
            await request.piece("half")
        await cancelled(q, ident)
        await request.left()
        await eventually(lambda: not q.gateway.calls)
        assert (await q.status())["jobs"] == {"queued": 0, "running": 0}


async def test_a_job_between_two_attempts_is_cancelled(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = asyncio.Event()
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.2)
    settings = {"queue__max_attempts": 1, "upstream__probe_interval": 0.05}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings) as q:
        requeue = q.gateway.jobs.requeue

        async def noted(*facts: Any, **more: Any) -> None:
            await requeue(*facts, **more)
            rests.set()

        monkeypatch.setattr(q.gateway.jobs, "requeue", noted)
        ident = await submit(q, "hi")
        (await fake.arrived()).reset()
        await rests.wait()
        await cancelled(q, ident)
        await eventually(lambda: not q.gateway.jobs.active)
        assert not fake.has_arrived()


@pytest.mark.parametrize("answered", [True, False])
async def test_a_job_that_has_ended_is_not_cancelled(answered: bool, state: Path) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        ident = await submit(q, "hi")
        request = await fake.arrived()
        if answered:
            await request.answer("hi")
        else:
            await request.status(422, {"error": {"message": "no"}})
        facts = await reached(q, ident, "succeeded" if answered else "failed")
        answer = await cancel(q, ident)
        assert (answer.status, answer.code) == (409, "conflict")
        assert await look(q, ident) == facts


@pytest.mark.parametrize("runs", [True, False])
async def test_a_job_cancelled_as_the_request_that_it_is_is_a_cancelled_job(
    runs: bool, state: Path
) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.OPEN if runs else llmq.Mode.PAUSED)
        ident = await submit(q, "hi")
        await eventually(lambda: ident in q.gateway.calls)
        if runs:
            await fake.arrived()
        answer = await ask(q.port, "DELETE", f"/llmq/requests/{ident}", json={})
        assert answer.status == 200, answer
        await reached(q, ident, "cancelled")
        assert (await result(q, ident)).status == 409


async def test_a_batch_of_which_the_last_line_is_cancelled_has_ended(state: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat("hi")}
    part = 'Content-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n--xx'
    file = part % ("file", '; filename="f"', json.dumps(line))
    form = "\r\n".join(["--xx", part % ("purpose", "", "batch"), file]) + "--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=xx"}
    async with FakeBackend() as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        kept = await ask(q.port, "POST", "/v1/files", body=form.encode(), headers=kind)
        wanted = {"input_file_id": kept.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch = (await ask(q.port, "POST", "/v1/batches", json=wanted)).json()
        await held(q, 1)
        (ident,) = q.gateway.jobs.active
        assert (await cancel(q, ident)).status == 200
        await eventually(lambda: not q.gateway.jobs.active)
        shown = (await ask(q.port, "GET", f"/v1/batches/{batch['id']}")).json()
        assert shown["status"] == "completed"


# ---- How long it is kept ---------------------------------------------------------------------


async def test_a_result_is_kept_for_its_time_and_its_job_for_as_long_again(state: Path) -> None:
    hour = 3600.0
    async with FakeBackend() as fake, serving(state, fake, jobs__result_ttl=hour) as q:
        ident, other = await submit(q, "hi"), await submit(q, "cancel me")
        facts = await reached(q, ident, "succeeded")
        assert facts["expires_at"] == facts["completed_at"] + hour
        q.gateway.set_mode(llmq.Mode.PAUSED)
        await reached(q, other, "succeeded")
        waits = await submit(q, "later")
        now, jobs = time.time(), q.gateway.jobs
        await jobs.expire(now - hour, hour)
        assert (await result(q, ident)).status == 200
        await jobs.expire(now + 1, hour)  # an hour has passed
        gone = await result(q, ident)
        assert (gone.status, gone.code) == (410, "gone")
        facts = await look(q, ident)
        assert (facts["status"], facts["expires_at"]) == ("expired", None)
        rows = await q.gateway.store.read("SELECT answer, body FROM jobs WHERE id = ?", ident)
        assert rows == [(None, None)]
        assert (await cancel(q, ident)).status == 409
        await jobs.expire(now + hour - 10, hour)
        assert (await look(q, ident))["status"] == "expired"
        await jobs.expire(now + hour + 10, hour)  # and another one
        assert (await result(q, ident)).status == 404
        assert await listed(q) == [waits]  # which is older than all that, and waits


# ---- Class and turn --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "more", "word"),
    [
        ({}, {}, "low"),
        ({"X-Queue-Priority": "high"}, {}, "high"),
        ({"X-Queue-Priority": "normal"}, {}, "normal"),
        ({}, {"priority": "high"}, "high"),
        ({"X-Queue-Priority": "high"}, {"priority": "normal"}, "normal"),
        ({"X-User-ID": "vip"}, {}, "low"),
    ],
)
async def test_a_job_is_low_unless_it_says_otherwise(
    headers: Headers, more: Any, word: str, state: Path
) -> None:
    rows = {"user:vip": {"class": "high"}}
    async with FakeBackend(auto=False) as fake, serving(state, fake, clients=rows) as q:
        answer = await q.chat("hi", {**ASYNC, **headers}, **more)
        assert answer.headers["x-llmq-class"] == word
        ident = answer.json()["id"]
        request = await fake.arrived()
        assert (await look(q, ident))["class"] == word
        assert q.gateway.calls[ident].ticket.priority.word == word
        assert "priority" not in request.json
        await request.answer("hi")
        await reached(q, ident, "succeeded")


async def test_a_key_gives_its_jobs_no_more_than_its_class(state: Path) -> None:
    rows = keys(alice={"max_class": "normal"})
    async with FakeBackend(auto=False) as fake, serving(state, fake, keys=rows) as q:
        alice = bearer(rows["alice"]["key"])
        answer = await q.chat("hi", {**ASYNC, **alice, "X-Queue-Priority": "high"})
        assert answer.headers["x-llmq-class"] == "normal"
        request = await fake.arrived()
        ident = answer.json()["id"]
        assert q.gateway.calls[ident].ticket.priority.word == "normal"
        await request.answer("hi")


async def take_all(fake: FakeBackend, number: int) -> list[str]:
    """What so many requests say, each answered as it comes."""
    said = []
    for _ in range(number):
        request: FakeRequest = await fake.arrived()
        said.append(request.text)
        await request.answer("well")
    return said


async def test_long_jobs_of_one_client_do_not_keep_those_of_others_from_the_queue(
    state: Path,
) -> None:
    settings = {"queue__max_queued_bytes": 100_000}
    async with FakeBackend(auto=False) as fake, serving(state, fake, **settings) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        for number in range(20):
            await submit(q, f"eve {number} " + "x" * 10_000, user("eve"))
        jobs = q.gateway.jobs
        await eventually(lambda: len(jobs.active) >= 3 and not jobs.news.is_set())
        names = [f"u{number}" for number in range(8)]
        for name in names:
            await submit(q, name, user(name))
        q.gateway.set_mode(llmq.Mode.OPEN)
        said = await take_all(fake, 28)
        assert max(map(said.index, names)) < 16


async def test_the_more_urgent_goes_first_and_of_one_client_the_older(state: Path) -> None:
    urgent = {"X-Queue-Priority": "high"}
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        for number in range(3):
            await submit(q, f"low {number}", user("eve"))
        for number in range(2):
            await submit(q, f"high {number}", {**urgent, **user("eve")})
        await held(q, 5)
        q.gateway.set_mode(llmq.Mode.OPEN)
        assert await take_all(fake, 5) == ["high 0", "high 1", "low 0", "low 1", "low 2"]


async def test_the_scheduler_has_a_few_of_each_client_and_class_and_keeps_their_order(
    state: Path,
) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        few = llmq.FED
        for number in range(few + 5):
            await submit(q, f"eve {number}", user("eve"))
        await held(q, few)
        await submit(q, "bob", user("bob"))
        await held(q, few + 1)  # nobody stands behind all that eve has
        await submit(q, "eve, now", {**user("eve"), "X-Queue-Priority": "high"})
        await held(q, few + 2)
        assert (await q.status())["jobs"] == {"queued": few + 7, "running": 0}
        q.gateway.set_mode(llmq.Mode.OPEN)
        said = await take_all(fake, few + 7)
        assert said[0] == "eve, now"
        assert said.index("bob") < 3
        assert [text for text in said if text[:4] == "eve "] == [
            f"eve {number}" for number in range(few + 5)
        ]


async def test_order_is_kept_where_a_client_may_have_less_waiting(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "FED", 3)
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 0.2)
    rows = {"user:eve": {"max_waiting": 1}}
    async with FakeBackend(auto=False) as fake, serving(state, fake, clients=rows) as q:
        for number in range(6):
            await submit(q, str(number), user("eve"))
        recent = q.gateway.journal.recent
        await eventually(lambda: any(one.outcome == "queue_full" for one in recent))
        assert await take_all(fake, 6) == [str(number) for number in range(6)]


async def test_jobs_that_had_no_room_beside_long_ones_run_when_those_have_ended(
    state: Path,
) -> None:
    async with FakeBackend() as fake, serving(state, fake, queue__max_queued_bytes=100_000) as q:
        fake.hold()
        long = await submit(q, "x" * 30_000, user("eve"))
        await eventually(lambda: fake.requests)
        short = await submit(q, "short", user("bob"))
        await eventually(lambda: not q.gateway.jobs.news.is_set())  # it was looked at
        fake.release()
        await reached(q, long, "succeeded")
        await eventually(lambda: len(fake.requests) == 2, 2)
        await reached(q, short, "succeeded")


async def test_what_is_too_long_to_wait_at_all_is_no_job_either(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake, queue__max_queued_bytes=100_000) as q:
        assert (await q.chat("x" * 60_000)).status == 429
        answer = await q.chat("x" * 60_000, ASYNC)
        assert (answer.status, answer.code) == (429, "queue_full")


async def test_sync_requests_go_before_jobs(state: Path) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        await submit(q, "job", user("bob"))
        await held(q, 1)
        now = asyncio.ensure_future(q.chat("now", user("eve")))
        await held(q, 2)
        q.gateway.set_mode(llmq.Mode.OPEN)
        assert await take_all(fake, 2) == ["now", "job"]
        assert (await now).status == 200


async def test_a_job_stays_of_its_class_when_its_clients_class_is_changed(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        ident = await submit(q, "hi", user("ann"))
        await held(q, 1)
        now = asyncio.ensure_future(q.chat("now", user("ann")))
        await held(q, 2)
        await ask(q.port, "POST", "/llmq/clients/user:ann", json={"class": "high"})
        words = {one.id: one.priority.word for one in q.gateway.scheduler.waiting.values()}
        assert words.pop(ident) == (await look(q, ident))["class"] == "low"
        assert list(words.values()) == ["high"]
        q.gateway.set_mode(llmq.Mode.OPEN)
        await now
        await reached(q, ident, "succeeded")


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("whose", ["all", "client", "key"])
async def test_jobs_leave_half_of_those_who_may_wait_to_who_waits_for_an_answer(
    whose: str, state: Path
) -> None:
    rows = keys(alice={"max_waiting": 6 if whose == "key" else 0})
    settings: Any = {
        "all": {"queue__max_depth": 6},
        "client": {"clients": {"alice/eve": {"max_waiting": 6}}},
        "key": {},
    }
    async with FakeBackend() as fake, serving(state, fake, keys=rows, **settings[whose]) as q:
        alice = bearer(rows["alice"]["key"])
        q.gateway.set_mode(llmq.Mode.PAUSED)
        names = ["eve"] * 8 if whose == "client" else [f"u{number}" for number in range(8)]
        idents = [await submit(q, "hi", {**alice, **user(name)}) for name in names]
        recent = q.gateway.journal.recent
        await eventually(lambda: [one.outcome for one in recent].count("queue_full") > 3)
        assert len(q.gateway.scheduler.waiting) == 3
        desks = ["eve"] * 3 if whose == "client" else ["x", "y", "z"]
        asked = [asyncio.ensure_future(q.chat("now", {**alice, **user(one)})) for one in desks]
        await held(q, 6)
        assert (await q.chat("now", {**alice, **user(desks[0])})).status == 429
        q.gateway.set_mode(llmq.Mode.OPEN)
        assert [(await one).status for one in asked] == [200] * 3
        for ident in idents:
            while (await look(q, ident, alice))["status"] in OPEN:
                pass
            assert (await look(q, ident, alice))["status"] == "succeeded"


# ---- Whose it is -----------------------------------------------------------------------------

AWAY = {"X-Forwarded-For": "192.0.2.7"}  # not this box, to who trusts this box as a proxy
PROXY = ["127.0.0.1"]


async def unseen(q: running, ident: str, headers: Headers) -> None:
    """It is not there, whatever is asked of it."""
    for method, end in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        answer = await ask(q.port, method, f"/v1/jobs/{ident}{end}", headers=headers)
        assert (answer.status, answer.code) == (404, "not_found")
    assert ident not in await listed(q, "", headers)


async def test_with_keys_a_job_is_its_accounts(state: Path) -> None:
    rows = keys(alice={}, bob={}, carol={"rights": ["infer", "control"]})
    alice, bob, carol = [bearer(rows[name]["key"]) for name in ("alice", "bob", "carol")]
    settings: Any = {"keys": rows, "server__trusted_proxies": PROXY}
    async with FakeBackend() as fake, serving(state, fake, **settings) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        ident = await submit(q, "hi", {**alice, **user("one")})
        other = await submit(q, "hi", bob)
        assert (await look(q, ident, {**alice, **user("two")}))["client"] == "alice/one"
        assert await listed(q, "", alice) == [ident]
        await unseen(q, ident, bob)
        await unseen(q, ident, {**bob, **user("alice")})
        for headers in (alice, bob):
            assert (await ask(q.port, "GET", "/v1/jobs?all=1", headers=headers)).status == 403
        assert (await ask(q.port, "GET", "/v1/jobs")).status == 401
        assert (await ask(q.port, "GET", f"/v1/jobs/{ident}", headers=AWAY)).status == 401
        assert await listed(q, "", carol) == []
        assert await listed(q, "?all=1", carol) == [other, ident]
        assert (await look(q, ident, carol))["status"] == "queued"
        assert (await cancel(q, ident, carol)).status == 200
        assert (await cancel(q, other, bob)).status == 200


async def test_without_keys_a_job_is_its_names_and_on_this_box_everybodys(state: Path) -> None:
    settings: Any = {"server__trusted_proxies": PROXY}
    async with FakeBackend() as fake, serving(state, fake, **settings) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        eve, bob = {**AWAY, **user("eve")}, {**AWAY, **user("bob")}
        ident = await submit(q, "hi", eve)
        assert await listed(q, "", eve) == [ident]
        await unseen(q, ident, bob)
        await unseen(q, ident, AWAY)
        assert (await ask(q.port, "GET", "/v1/jobs?all=1", headers=eve)).status == 403
        assert await listed(q) == []
        assert await listed(q, "?all=1") == [ident]
        assert (await look(q, ident))["client"] == "user:eve"
        assert (await cancel(q, ident)).status == 200


@pytest.mark.parametrize("rights", [["infer"], ["infer", "control"]])
async def test_a_port_without_the_right_to_control_sees_its_own_jobs_alone(
    rights: list[str], state: Path
) -> None:
    port = free_port()
    ports = {str(port): {"client": "guest", "rights": rights}}
    async with FakeBackend() as fake, serving(state, fake, ports=ports) as q:
        ident = await submit(q, "secret words", user("ann"))
        await reached(q, ident, "succeeded")
        answer = await ask(port, "POST", CHAT, json=chat("hi"), headers=ASYNC)
        own = answer.json()["id"]
        while (await ask(port, "GET", f"/v1/jobs/{own}/result")).status != 200:
            pass
        assert [row["id"] for row in (await ask(port, "GET", "/v1/jobs")).json()["data"]] == [own]
        paths = ("?all=1", f"/{ident}", f"/{ident}/result")
        seen = [(await ask(port, "GET", f"/v1/jobs{path}")).status for path in paths]
        seen.append((await ask(port, "DELETE", f"/v1/jobs/{ident}")).status)
        assert seen == ([200, 200, 200, 409] if "control" in rights else [403, 404, 404, 404])


async def test_a_page_from_elsewhere_sees_no_job_and_makes_none(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        for headers, more in ((ASYNC, {}), ({}, {"router": {"mode": "async"}})):
            answer = await q.chat("hi", {**EVIL, **headers}, **more)
            assert (answer.status, answer.content) == (200, "hi")
            assert "router" not in fake.requests[-1].json
        assert not is_there(state)
        ident = await submit(q, "hi")
        await reached(q, ident, "succeeded")
        for method, path in (
            ("GET", ""),
            ("GET", "?all=1"),
            ("GET", f"/{ident}"),
            ("GET", f"/{ident}/result"),
            ("DELETE", f"/{ident}"),
        ):
            answer = await ask(q.port, method, f"/v1/jobs{path}", headers=EVIL)
            assert (answer.status, answer.code) == (403, "forbidden_origin")
            assert "access-control-allow-origin" not in answer.headers


async def test_a_job_counts_once_for_the_rate_of_its_key(state: Path) -> None:
    rows = keys(alice={"rate": "3/h"})
    async with FakeBackend() as fake, serving(state, fake, keys=rows) as q:
        alice = bearer(rows["alice"]["key"])
        for left in ("2", "1", "0"):
            answer = await q.chat("hi", {**ASYNC, **alice})
            assert answer.status == 202
            assert answer.headers["x-ratelimit-remaining-requests"] == left
        await eventually(lambda: len(fake.requests) == 3)
        assert (await q.chat("hi", {**ASYNC, **alice})).status == 429
        for ident in await listed(q, "", alice):  # to ask for it is free
            while (await result(q, ident, alice)).status != 200:
                pass
        assert len(fake.requests) == 3


async def test_a_jobs_tokens_count_for_the_budget_of_its_key_once_it_has_run(state: Path) -> None:
    rows = keys(alice={"tokens_per_day": 5})
    async with FakeBackend() as fake, serving(state, fake, keys=rows) as q:
        alice = bearer(rows["alice"]["key"])
        fake.hold()
        first = await q.chat("one two three four", {**ASYNC, **alice})  # 5, as the runner counts
        account = q.gateway.accounts.named["alice"]
        assert (first.status, account.tokens) == (202, 0)
        fake.release()
        await eventually(lambda: account.tokens)
        assert account.tokens == 5
        assert (await q.chat("hi", {**ASYNC, **alice})).status == 429


@pytest.mark.usefixtures("soon")
async def test_jobs_wait_while_the_budget_of_their_key_is_spent_and_none_is_lost(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "FED", 2)
    rows = keys(alice={"tokens_per_day": 5})
    async with FakeBackend() as fake, serving(state, fake, keys=rows) as q:
        alice = bearer(rows["alice"]["key"])
        fake.hold()
        idents = [await submit(q, "one two three four", alice) for _ in range(8)]
        await held(q, 1)
        refused = refusals(q, monkeypatch)
        fake.release()
        await eventually(lambda: len(refused) > 3)
        assert len(fake.requests) <= 4  # those that were fed already
        assert (await look(q, idents[-1], alice))["status"] == "queued"
        assert (await look(q, idents[-1], alice))["attempts"] == 0
        await reloaded(q, keys=keys(alice={}))
        for ident in idents:
            while (facts := await look(q, ident, alice))["status"] in OPEN:
                pass
            assert (facts["status"], facts["attempts"]) == ("succeeded", 1)
        assert len(fake.requests) == 8


def refusals(q: running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The accounts whose jobs may not run now, as often as it is found."""
    meter, refused = q.service.runner.meter, []

    def metered(account: Any, *, counts: bool) -> None:
        try:
            meter(account, counts=counts)
        except llmq.LlmqError:
            refused.append(account.name)
            raise

    monkeypatch.setattr(q.service.runner, "meter", metered)
    return refused


async def test_who_is_blocked_gives_no_job_and_those_that_wait_have_failed(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        ident = await submit(q, "hi", user("eve"))
        other = await submit(q, "hi", user("bob"))
        await held(q, 2)
        await ask(q.port, "POST", "/llmq/clients/user:eve", json={"blocked": True})
        assert (await q.chat("hi", {**ASYNC, **user("eve")})).status == 403
        await reached(q, ident, "failed")
        assert (await result(q, ident)).status == 403
        q.gateway.set_mode(llmq.Mode.OPEN)
        await reached(q, other, "succeeded")
        assert len(fake.requests) == 1


async def reloaded(q: running, **settings: Any) -> None:
    """What the file says is other now."""
    values = {**q.values, **settings}
    q.service.read = lambda: llmq.merge_layers([("file", values)])
    q.service.reload()


@pytest.mark.parametrize("how", ["reload", "restart"])
async def test_a_job_whose_key_was_taken_away_has_failed(
    how: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "FED", 1)
    rows = keys(alice={}, bob={"rights": ["infer", "control"]})
    left = {"bob": rows["bob"]}
    alice, bob = (bearer(rows[name]["key"]) for name in ("alice", "bob"))

    async def fails(q: running, ident: str) -> None:
        while (facts := await look(q, ident, bob))["status"] in OPEN:
            pass
        assert facts["status"] == "failed", facts
        assert "taken away" in facts["error"]
        assert (await result(q, ident, bob)).status == 403

    async with FakeBackend() as fake:
        async with serving(state, fake, keys=rows) as q:
            q.gateway.set_mode(llmq.Mode.PAUSED)
            idents = [await submit(q, str(number), alice) for number in range(4)]
            await held(q, 2)  # the others wait in the store
            if how == "reload":
                await reloaded(q, keys=left)
                q.gateway.set_mode(llmq.Mode.OPEN)
                await fails(q, idents[-1])
        if how == "restart":
            async with serving(state, fake, keys=left) as q:
                for ident in idents:
                    await fails(q, ident)
                assert fake.requests == []


async def test_a_job_whose_key_may_ask_nothing_any_more_has_failed(state: Path) -> None:
    rows = keys(alice={}, bob={"rights": ["infer", "control"]})
    async with FakeBackend() as fake:
        async with serving(state, fake, keys=rows) as q:
            q.gateway.set_mode(llmq.Mode.PAUSED)
            ident = await submit(q, "hi", bearer(rows["alice"]["key"]))
        rows["alice"]["rights"] = ["control"]
        async with serving(state, fake, keys=rows) as q:
            bob = bearer(rows["bob"]["key"])
            while (facts := await look(q, ident, bob))["status"] in OPEN:
                pass
            assert facts["status"] == "failed"
            assert "no right to this: infer" in facts["error"]
            assert (await result(q, ident, bob)).status == 403
            assert fake.requests == []


# ---- Stopping --------------------------------------------------------------------------------


async def test_a_stop_lets_what_runs_finish_and_keeps_what_waits(state: Path) -> None:
    async with FakeBackend(auto=False) as fake:
        async with serving(state, fake, server__drain_timeout=5) as q:
            first, second = await submit(q, "one"), await submit(q, "two")
            request = await fake.arrived()
            await held(q, 1)
            stop = asyncio.ensure_future(q.service.stop())
            await eventually(lambda: q.gateway.draining)
            await request.answer("done")
            await stop
            assert len(fake.requests) == 1
        async with serving(state, fake) as q:
            assert (await look(q, first))["status"] == "succeeded"
            assert (await result(q, first)).content == "done"
            await (await fake.arrived()).answer("too")
            assert (await reached(q, second, "succeeded"))["attempts"] == 1
            assert len(fake.requests) == 2


async def test_what_a_stop_cuts_off_waits_for_the_next_start_and_that_does_not_count(
    state: Path,
) -> None:
    async with FakeBackend(auto=False) as fake:
        settings = {"server__drain_timeout": 0.01, "jobs__max_attempts": 1}
        for _ in range(3):
            async with serving(state, fake, **settings) as q:
                idents = await listed(q) or [await submit(q, "hi")]
                request = await fake.arrived()
                await reached(q, idents[0], "running")
            await request.left()
        async with serving(state, fake, **settings) as q:
            await (await fake.arrived()).answer("at last")
            facts = await reached(q, idents[0], "succeeded")
            assert facts["attempts"] == 1
            assert len(fake.requests) == 4


async def test_a_stop_does_not_wait_for_what_rests_between_two_attempts(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmq, "JOB_RETRY_SECONDS", 3600.0)
    settings = {"queue__max_attempts": 1}
    async with FakeBackend(auto=False) as fake:
        async with serving(state, fake, **settings) as q:
            ident = await submit(q, "hi")
            (await fake.arrived()).reset()
            while (await look(q, ident))["attempts"] != 1 or q.gateway.calls:
                pass
            while (await look(q, ident))["status"] != "queued":
                pass
        async with serving(state, fake, **settings) as q:
            await (await fake.arrived()).answer("hi")
            await reached(q, ident, "succeeded")


# ---- With nothing of it used -----------------------------------------------------------------


async def test_where_none_is_used_there_is_no_file_no_thread_and_no_store(state: Path) -> None:
    before = set(threading.enumerate())
    async with FakeBackend() as fake, serving(state, fake) as q:
        assert (await q.chat("hi")).status == 200
        assert (await q.status())["jobs"] == {"queued": 0, "running": 0}
        assert q.gateway.store.is_open is False
        assert not is_there(state)
        assert q.gateway.store._thread._threads == set()
        assert q.gateway.jobs.active == {}
        names = {one.name for one in set(threading.enumerate()) - before}
        assert not [name for name in names if "sqlite" in name.lower()]


# ---- Commands --------------------------------------------------------------------------------


class Commands:
    """Commands at the llmq of the test, and what they say."""

    def __init__(self, q: running, capsys: pytest.CaptureFixture[str]) -> None:
        self.q, self.capsys = q, capsys

    async def say(self, *words: str, code: int = 0) -> str:
        run = functools.partial(llmq.main, [*words, "--url", self.q.base])
        self.capsys.readouterr()
        ended = await asyncio.get_running_loop().run_in_executor(None, run)
        told = self.capsys.readouterr()
        assert ended == code, told
        return told.err if code else told.out

    async def facts(self, *words: str) -> Any:
        return json.loads(await self.say(*words, "--json"))


async def test_commands_show_jobs_and_what_came_of_them(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        commands = Commands(q, capsys)
        assert "none" in await commands.say("jobs")
        assert await commands.facts("jobs") == []
        first = await submit(q, "hi", user("eve"))
        request = await fake.arrived()
        await reached(q, first, "running")
        second = await submit(q, "two", user("bob"))
        shown = await commands.say("jobs")
        assert shown.index(second) < shown.index(first)
        for word in ("user:eve", "running", "queued", "low"):
            assert word in shown
        assert [row["id"] for row in await commands.facts("jobs")] == [second, first]
        assert await commands.facts("jobs", "--mine") == []
        assert f"job {first} is running" in await commands.say("result", first, code=1)
        await request.answer("hello there")
        facts = await reached(q, first, "succeeded")
        assert await commands.facts("job", first) == facts
        shown = await commands.say("job", first)
        assert [line.split()[0] for line in shown.splitlines()] == list(facts)
        assert "succeeded" in shown
        answer = await result(q, first)
        assert json.loads(await commands.say("result", first)) == answer.json()
        assert "has ended already" in await commands.say("cancel", first, code=1)


async def test_commands_cancel_jobs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        q.gateway.set_mode(llmq.Mode.PAUSED)
        commands = Commands(q, capsys)
        first, second = await submit(q, "one", user("eve")), await submit(q, "two")
        assert "cancelled" in await commands.say("cancel", first)
        assert (await commands.facts("cancel", second))["status"] == "cancelled"
        for ident in (first, second):
            assert (await look(q, ident))["status"] == "cancelled"
            assert "was cancelled" in await commands.say("result", ident, code=1)
        for command in ("job", "result", "cancel"):
            assert "there is no job job_0" in await commands.say(command, "job_0", code=1)


async def test_with_keys_commands_show_all_to_who_may_steer(
    state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = keys(alice={}, carol={"rights": ["infer", "control"]})
    async with FakeBackend() as fake, serving(state, fake, keys=rows) as q:
        commands = Commands(q, capsys)
        ident = await submit(q, "hi", bearer(rows["alice"]["key"]))
        assert "a key is needed" in await commands.say("jobs", code=1)
        monkeypatch.setenv("LLMQ_KEY", rows["alice"]["key"])
        assert "control" in await commands.say("jobs", code=1)
        assert [row["id"] for row in await commands.facts("jobs", "--mine")] == [ident]
        monkeypatch.setenv("LLMQ_KEY", rows["carol"]["key"])
        assert [row["id"] for row in await commands.facts("jobs")] == [ident]


async def test_a_result_is_printed_as_it_is(state: Path) -> None:
    async with FakeBackend() as fake, serving(state, fake) as q:
        ident = await submit(q, "grün \x1b[31m", stream=True)
        await reached(q, ident, "succeeded")
        run = functools.partial(run_llmq, "result", ident, "--url", q.base)
        done = await asyncio.get_running_loop().run_in_executor(None, run)
        assert done.returncode == 0
        assert done.stdout.rstrip("\n").encode() == (await result(q, ident)).body.rstrip(b"\n")


async def test_a_result_that_is_long_is_printed_too(state: Path) -> None:
    """Longer than anything else that a command is answered with."""
    text = "x" * (llmq.MOST_ANSWERED + 1)
    async with FakeBackend(auto=False) as fake, serving(state, fake) as q:
        ident = await submit(q, "hi")
        await (await fake.arrived()).answer(text)
        await reached(q, ident, "succeeded")
        order = ("GET", f"/v1/jobs/{ident}/result", None)
        asking = functools.partial(llmq.ask_llmq, q.base, order, raw=True)
        status, body = await asyncio.get_running_loop().run_in_executor(None, asking)
        assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, text)
