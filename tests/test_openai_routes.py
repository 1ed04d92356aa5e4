"""All OpenAI routes: completions, embeddings, responses, rerank; who lacks one is passed by."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llmq
from tests.fake_ollama import (
    EVENTS,
    ROUTES,
    Recording,
    Runner,
    arrival,
    ended,
    exchange,
    least,
    named_event,
    named_events,
    post,
    refuse,
    told,
    told_to_stop,
    waiting,
    whole,
)
from tests.fakes import Answer, FakeRequest, Raw, ask, chunk, completion, http, running, sse

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
NOBODY = "http://127.0.0.1:9"  # where no backend listens
each_route = pytest.mark.parametrize("path", ROUTES["openai"])
DONE = sse("[DONE]")
USAGE = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
WHOLE_ANSWERS: dict[str, Any] = {
    "/v1/chat/completions": {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": USAGE,
    },
    COMPLETIONS: {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}],
        "usage": USAGE,
    },
    "/v1/embeddings": {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -1e-05]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    },
    RESPONSES: {
        "object": "response",
        "status": "completed",
        "error": None,
        "output": [],
        "usage": {"input_tokens": 3, "output_tokens": 7, "total_tokens": 10},
    },
    "/v1/rerank": {"results": [{"index": 1, "relevance_score": 0.25}], "usage": {}},
}
WHOLE_ANSWERS["/chat/completions"] = WHOLE_ANSWERS["/v1/chat/completions"]


def text_piece(text: str, finish: str | None = None, **more: Any) -> bytes:
    """One event of a streamed completion."""
    choice = {"text": text, "index": 0, "finish_reason": finish}
    return sse({"object": "text_completion", "choices": [choice], **more})


def response_event(name: str, **more: Any) -> bytes:
    """One event of a streamed response; its data names it again."""
    return named_event(f"response.{name}", {"type": f"response.{name}", **more})


def response_object(status: str, **more: Any) -> dict[str, Any]:
    usage = WHOLE_ANSWERS[RESPONSES]["usage"] if status == "completed" else None
    return {"id": "resp_1", "object": "response", "status": status, "usage": usage, **more}


RESPONSE_PIECES = [
    response_event("created", response=response_object("in_progress"), sequence_number=0),
    response_event("output_text.delta", delta="one", sequence_number=1),
    response_event("output_text.delta", delta=" two", sequence_number=2),
]
COMPLETED = response_event("completed", response=response_object("completed"), sequence_number=3)


def assert_error(answer: Answer, status: int, *parts: str) -> None:
    """A whole error as OpenAI writes them: always an object."""
    assert (answer.status, answer.clean) == (status, True), answer
    assert answer.headers["content-type"].startswith("application/json"), answer
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys(), answer
    for part in parts:
        assert part in error["message"], answer


def assert_broken(answer: Answer, sent: bytes, *parts: str) -> None:
    """What came was delivered, then an error and no end as if complete."""
    assert answer.status == 200, answer
    assert answer.body.startswith(sent), answer
    last = named_events(answer)[-1][1]
    message = (last.get("error") or last)["message"]
    assert isinstance(message, str), answer
    for part in parts:
        assert part in message, answer
    assert not answer.clean, answer
    assert b"[DONE]" not in answer.body
    assert b'"stop"' not in answer.body
    assert b"response.completed" not in answer.body


# ---- What passes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (path, kind)
        for path in ROUTES["openai"]
        for kind in ("openai", "llamacpp", "ollama")
        if (path, kind) != ("/v1/rerank", "ollama")  # which has no such route
    ],
)
async def test_body_and_answer_pass_byte_for_byte(path: str, kind: str) -> None:
    fixed = json.dumps(least(path), separators=(" ,", " : ")).encode()[:-1]
    body = fixed + b', "\\u0061":[1.0e+5,-0, {"b":1,"b":2}] ,"\\/":"\\ud83e\\udd99"} \n'
    answered = json.dumps(WHOLE_ANSWERS[path], indent=3).encode() + b"\r\n"
    async with Runner(kind=kind) as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, path, body, answered)
        assert request.path == ("/v1" + path if path == "/chat/completions" else path)
        assert request.body == body
        assert (answer.status, answer.clean, answer.body) == (200, True, answered)


@each_route
async def test_query_string_reaches_the_runner(path: str) -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        asked = f"{path}?api-version=2024-10-21&x=%2F%20y&&z"
        request, answer = await exchange(q, runner, asked, least(path), WHOLE_ANSWERS[path])
        assert request.path.endswith(asked)
        assert answer.status == 200


@each_route
async def test_own_fields_are_cut_and_the_model_is_named_as_the_runner_does(path: str) -> None:
    fixed = {name: value for name, value in least(path).items() if name != "model"}
    rest = json.dumps(fixed)[1:].encode()
    async with Runner(["Org/M"], kind="openai") as runner, running(runner.url) as q:
        body = b'{"priority":"low","model":"org/m",' + rest
        request, answer = await exchange(q, runner, path, body, WHOLE_ANSWERS[path])
        assert request.body == b'{"model":"Org/M",' + rest
        assert answer.status == 200


@each_route
async def test_request_without_a_model_gets_one(path: str) -> None:
    body = {name: value for name, value in least(path).items() if name != "model"}
    async with Runner(["first", "second"], kind="openai") as runner, running(runner.url) as q:
        await told(q)
        request, answer = await exchange(q, runner, path, body, WHOLE_ANSWERS[path])
        assert (request.json, answer.status) == ({"model": "first", **body}, 200)


async def test_recorded_completion_stream_is_relayed_byte_for_byte() -> None:
    for name in ("ollama", "llama-server", "llama-cpp-python", "vllm"):
        recorded = Recording(f"{name}.completion-stream")
        async with Runner(kind="openai") as runner, running(runner.url) as q:
            body = least(COMPLETIONS, stream=True)
            _, answer = await exchange(q, runner, COMPLETIONS, body, recorded.replay)
            assert (answer.status, answer.clean) == (200, True), name
            assert answer.body == recorded.body, name


async def test_recorded_embeddings_are_relayed_byte_for_byte() -> None:
    recorded, path = Recording("llama-server.embeddings"), "/v1/embeddings"
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, path, least(path), recorded.replay)
        assert (answer.status, answer.clean, answer.body) == (200, True, recorded.body)


async def test_prompt_may_be_tokens_or_a_list() -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        for prompt in ([1, 2, 3], ["a", "b"], [[1], [2]], ""):
            body = least(COMPLETIONS, prompt=prompt)
            request, answer = await exchange(q, runner, COMPLETIONS, body, {"choices": []})
            assert (request.json, answer.status) == (body, 200)


# ---- Streams and their ends ------------------------------------------------------------------


async def test_streamed_completion_ends_with_done_and_tells_its_tokens() -> None:
    pieces = [
        text_piece("one"),
        text_piece(" two", usage=None),
        text_piece("", "stop"),
        sse({"object": "text_completion", "choices": [], "usage": USAGE}),
        DONE,
    ]
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body = least(COMPLETIONS, stream=True, stream_options={"include_usage": True})
        request, answer = await exchange(q, runner, COMPLETIONS, body, pieces, content_type=EVENTS)
        assert request.json == body
        assert (answer.status, answer.clean, answer.body) == (200, True, b"".join(pieces))
        (record,) = await ended(q)
        assert (record["tokens"], record["outcome"]) == (7, "done")
        assert record["route"] == COMPLETIONS


async def test_streamed_response_ends_with_completed_and_without_done() -> None:
    pieces = [*RESPONSE_PIECES, COMPLETED]
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body = least(RESPONSES, stream=True)
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert (answer.status, answer.clean, answer.body) == (200, True, b"".join(pieces))
        (record,) = await ended(q)
        assert (record["tokens"], record["outcome"]) == (7, "done")


async def test_streamed_response_with_done_behind_its_end_passes_too() -> None:
    """Some runners say [DONE] on every route."""
    pieces = [*RESPONSE_PIECES, COMPLETED, DONE]
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body = least(RESPONSES, stream=True)
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert (answer.status, answer.clean, answer.body) == (200, True, b"".join(pieces))


async def test_streamed_response_may_end_incomplete() -> None:
    """As at max_output_tokens: an end that is proper, and says what it is."""
    reason = {"incomplete_details": {"reason": "max_output_tokens"}}
    last = response_event("incomplete", response=response_object("incomplete", **reason))
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body, pieces = least(RESPONSES, stream=True), [*RESPONSE_PIECES, last]
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert (answer.status, answer.clean, answer.body) == (200, True, b"".join(pieces))


async def test_response_that_failed_is_never_shown_as_a_success() -> None:
    error = {"code": "server_error", "message": "out of memory"}
    last = response_event("failed", response=response_object("failed", error=error))
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body, pieces = least(RESPONSES, stream=True), [*RESPONSE_PIECES, last]
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert answer.body.startswith(b"".join(RESPONSE_PIECES))
        name, document = named_events(answer)[-1]
        assert name in ("response.failed", "error")
        assert "out of memory" in json.dumps(document)
        assert b"response.completed" not in answer.body


async def test_error_event_in_a_response_ends_it_uncleanly() -> None:
    failed = named_event("error", {"type": "error", "code": "x", "message": "out of memory"})
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body, pieces = least(RESPONSES, stream=True), [*RESPONSE_PIECES, failed]
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert_broken(answer, b"".join(RESPONSE_PIECES), "out of memory")
        assert named_events(answer)[-1][0] == "error"


@pytest.mark.parametrize("clean", [True, False], ids=["without-end", "cut"])
@pytest.mark.parametrize("path", [COMPLETIONS, RESPONSES])
async def test_stream_that_does_not_come_to_its_end_is_an_error(path: str, clean: bool) -> None:
    sent = RESPONSE_PIECES if path == RESPONSES else [text_piece("one"), text_piece(" two")]
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body = least(path, stream=True)
        _, answer = await exchange(q, runner, path, body, sent, content_type=EVENTS, end=clean)
        assert_broken(answer, b"".join(sent))
        assert named_events(answer)[-1][0] == ("error" if path == RESPONSES else "")


@pytest.mark.parametrize("path", [COMPLETIONS, RESPONSES])
async def test_stream_that_is_cut_behind_its_end_is_an_error(path: str) -> None:
    sent = RESPONSE_PIECES if path == RESPONSES else [text_piece("one")]
    last = COMPLETED if path == RESPONSES else DONE
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body, pieces = least(path, stream=True), [*sent, last]
        _, answer = await exchange(q, runner, path, body, pieces, content_type=EVENTS, end=False)
        assert_broken(answer, b"".join(sent))


@pytest.mark.parametrize("path", [COMPLETIONS, RESPONSES])
async def test_error_inside_a_line_too_long_to_be_held_stands_in_an_event_of_its_own(
    path: str,
) -> None:
    long = text_piece("x" * 300_000)
    if path == RESPONSES:
        long = response_event("output_text.delta", delta="x" * 300_000)
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body = least(path, stream=True)
        _, answer = await exchange(
            q, runner, path, body, [long[:200_000]], content_type=EVENTS, end=False
        )
        assert not answer.clean
        last = answer.body.rstrip(b"\n").split(b"\n\n")[-1]
        name = b"event: error\n" if path == RESPONSES else b""
        assert last.startswith(name + b"data: "), last[-500:]
        assert "message" in json.loads(last.partition(b"data: ")[2])["error"]


async def test_done_does_not_end_a_response() -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body, pieces = least(RESPONSES, stream=True), [*RESPONSE_PIECES, DONE]
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert not answer.clean
        assert named_events(answer)[-1][0] == "error"


async def test_what_only_looks_like_completed_does_not_end_a_response() -> None:
    text = 'event: response.completed\ndata: {"type":"response.completed"}\n\n'
    pieces = [*RESPONSE_PIECES, response_event("output_text.delta", delta=text)]
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        body = least(RESPONSES, stream=True)
        _, answer = await exchange(q, runner, RESPONSES, body, pieces, content_type=EVENTS)
        assert not answer.clean
        assert named_events(answer)[-1][0] == "error"
        _, answer = await exchange(
            q, runner, RESPONSES, body, [*pieces, COMPLETED], content_type=EVENTS
        )
        assert (answer.clean, answer.body) == (True, b"".join([*pieces, COMPLETED]))


async def test_whole_response_that_failed_keeps_its_words() -> None:
    """`error` is a member of every response object, null in a good one."""
    failed = response_object("failed", error={"code": "server_error", "message": "out of memory"})
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        _, answer = await exchange(q, runner, RESPONSES, least(RESPONSES), failed)
        assert b"out of memory" in answer.body
        (record,) = await ended(q)
        assert record["outcome"] != "done"


# ---- Errors before the head ------------------------------------------------------------------


@each_route
async def test_errors_are_objects_on_every_route(path: str) -> None:
    async with Runner(kind="openai") as runner:
        async with running(runner.url, queue__max_depth=2, server__max_body=1000) as q:
            await told(q)
            for body in (b"", b"{", b"[]", b'{"model":"m","model":"m"}', b'{"model":7}'):
                assert_error(await ask(q.port, "POST", path, body=body), 400)
            unknown = await ask(q.port, "POST", path, json=least(path, model="none"))
            assert_error(unknown, 404, "none")
            large = json.dumps(least(path, x="y" * 2000)).encode()
            assert_error(await ask(q.port, "POST", path, body=large), 413)
            first = post(q, path, least(path))
            await arrival(first, runner)
            second = post(q, path, least(path, user="two"))  # what is alike shares one run
            await waiting(q, 1)
            full = await ask(q.port, "POST", path, json=least(path, user="three"))
            assert_error(full, 429)
            assert 1 <= int(full.headers["retry-after"]) <= 60
            first.cancel()
            second.cancel()


@each_route
async def test_error_of_the_runner_is_passed_on_as_it_is(path: str) -> None:
    own = b'{"error" : {"message":"too long","type":"exceed_context_size_error","n_ctx":64}}\n'
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        asked = post(q, path, least(path))
        await refuse(await arrival(asked, runner), 400, own)
        answer = await asked
        assert (answer.status, answer.body) == (400, own)


async def test_end_of_service_is_told_on_other_routes_too() -> None:
    async with Runner(kind="openai") as runner:
        answer = await told_to_stop(runner, "/v1/embeddings", least("/v1/embeddings"))
        assert_error(answer, 503)
        assert 1 <= int(answer.headers["retry-after"]) <= 60


# ---- Runners that lack a route ---------------------------------------------------------------

LACKS = {
    "405": (405, {"error": {"message": "method not allowed"}}),
    "501": (501, {"error": {"message": "This server does not support this"}}),
    "404 of Go": (404, b"404 page not found"),
    "404 of FastAPI": (404, {"detail": "Not Found"}),
    "404 of llama-server": (404, {"error": {"code": 404, "message": "File Not Found"}}),
}


@pytest.mark.parametrize("lack", LACKS.values(), ids=LACKS)
async def test_runner_that_lacks_a_route_is_passed_by(lack: tuple[int, Any]) -> None:
    """That is no attempt, and the runner is not asked again."""
    async with Runner(kind="openai") as one, Runner(kind="openai") as two:
        async with running(one.url, two.url, queue__max_attempts=1) as q:
            await told(q)
            asked = post(q, "/v1/rerank", least("/v1/rerank"))
            request = await arrival(asked, one, two)
            lacking = one if request in one.requests else two
            other = two if lacking is one else one
            await refuse(request, *lack)
            await whole(await arrival(asked, other), WHOLE_ANSWERS["/v1/rerank"])
            answer = await asked
            assert (answer.status, answer.json()) == (200, WHOLE_ANSWERS["/v1/rerank"])
            for _ in range(3):
                _, answer = await exchange(
                    q, other, "/v1/rerank", least("/v1/rerank"), WHOLE_ANSWERS["/v1/rerank"]
                )
                assert answer.status == 200
            assert len(lacking.requests) == 1
            assert (await q.status())["backends"][0]["state"] == "up"


async def test_passing_by_is_no_attempt_when_another_then_breaks() -> None:
    """Two attempts are allowed: the answer that says 405 takes none of them."""
    async with Runner(kind="openai") as one, Runner(kind="openai") as two:
        async with running(one.url, two.url, queue__max_attempts=2) as q:
            await told(q)
            asked = post(q, "/v1/rerank", least("/v1/rerank"))
            request = await arrival(asked, one, two)
            other = two if request in one.requests else one
            await refuse(request, 405, b"")
            (await arrival(asked, other)).reset()
            await whole(await arrival(asked, other), WHOLE_ANSWERS["/v1/rerank"])
            assert (await asked).status == 200


async def test_404_on_a_route_that_has_worked_is_about_the_request() -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        answered = WHOLE_ANSWERS[COMPLETIONS]
        await exchange(q, runner, COMPLETIONS, least(COMPLETIONS), answered)
        asked = post(q, COMPLETIONS, least(COMPLETIONS))
        await refuse(await arrival(asked, runner), 404, {"error": {"message": "no such adapter"}})
        assert_error_keeps(await asked, 404, "no such adapter")
        _, answer = await exchange(q, runner, COMPLETIONS, least(COMPLETIONS), answered)
        assert answer.status == 200


async def test_lack_of_one_route_says_nothing_of_the_others() -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        asked = post(q, "/v1/rerank", least("/v1/rerank"))
        await refuse(await arrival(asked, runner), 404, b"404 page not found")
        assert_error(await asked, 501)
        for path in (COMPLETIONS, "/v1/chat/completions", "/v1/embeddings"):
            _, answer = await exchange(q, runner, path, least(path), WHOLE_ANSWERS[path])
            assert answer.status == 200


async def test_nobody_left_is_501_in_the_words_of_the_last() -> None:
    own = {"error": {"message": "This server does not support reranking. Start it with `--rerank`"}}
    async with Runner(kind="openai") as one, Runner(kind="openai") as two:
        async with running(one.url, two.url) as q:
            await told(q)
            asked = post(q, "/v1/rerank", least("/v1/rerank"))
            await refuse(await arrival(asked, one, two), 501, own)
            await refuse(await arrival(asked, one, two), 501, own)
            answer = await asked
            assert_error(answer, 501, "--rerank")
            assert answer.code == "not_implemented"
            again = await ask(q.port, "POST", "/v1/rerank", json=least("/v1/rerank"))
            assert_error(again, 501)
            assert len(one.requests) + len(two.requests) == 2


async def test_501_is_about_that_model_alone() -> None:
    """llama-server without --embeddings, Ollama with a model for chats: others may do."""
    own = Recording("ollama.embeddings").json()
    path = "/v1/embeddings"
    async with Runner(["m", "embedder"], kind="openai") as runner, running(runner.url) as q:
        asked = post(q, path, least(path))
        await refuse(await arrival(asked, runner), 501, own)
        assert_error(await asked, 501, "does not support embeddings")
        body = least(path, model="embedder")
        _, answer = await exchange(q, runner, path, body, WHOLE_ANSWERS[path])
        assert answer.status == 200


async def test_405_is_about_every_model() -> None:
    async with Runner(["m", "other"], kind="openai") as runner, running(runner.url) as q:
        asked = post(q, "/v1/rerank", least("/v1/rerank"))
        await refuse(await arrival(asked, runner), 405, b"")
        assert_error(await asked, 501)
        answer = await ask(q.port, "POST", "/v1/rerank", json=least("/v1/rerank", model="other"))
        assert_error(answer, 501)
        assert len(runner.requests) == 1


async def test_404_about_the_model_is_the_clients_answer() -> None:
    async with Runner(kind="openai") as one, Runner(kind="openai") as two:
        async with running(one.url, two.url) as q:
            await told(q)
            own = {"error": {"message": "model 'm' not found", "type": "not_found_error"}}
            asked = post(q, COMPLETIONS, least(COMPLETIONS))
            await refuse(await arrival(asked, one, two), 404, own)
            assert_error_keeps(await asked, 404, "model 'm' not found")
            assert len(one.requests) + len(two.requests) == 1


def assert_error_keeps(answer: Answer, status: int, text: str) -> None:
    assert (answer.status, answer.json()["error"]["message"]) == (status, text), answer


async def test_runner_that_came_back_is_asked_for_its_routes_again() -> None:
    """It may be a newer one now."""
    async with Runner(kind="openai") as runner:
        async with running(runner.url, upstream__probe_interval=0.1) as q:
            asked = post(q, "/v1/rerank", least("/v1/rerank"))
            await refuse(await arrival(asked, runner), 405, b"")
            assert_error(await asked, 501)
            await runner.stop_listening()
            runner.drop_connections()
            while (await q.status())["backends"][0]["state"] != "down":
                pass
            await runner.listen_again()
            while (await q.status())["backends"][0]["state"] != "up":
                pass
            _, answer = await exchange(
                q, runner, "/v1/rerank", least("/v1/rerank"), WHOLE_ANSWERS["/v1/rerank"]
            )
            assert answer.status == 200


async def test_ollama_is_not_asked_to_rerank() -> None:
    async with Runner(kind="ollama") as ollama, Runner(kind="llamacpp") as other:
        async with running(ollama.url, other.url) as q:
            await told(q)
            body, answered = least("/v1/rerank"), WHOLE_ANSWERS["/v1/rerank"]
            _, answer = await exchange(q, other, "/v1/rerank", body, answered)
            assert answer.status == 200
            assert not ollama.requests
    async with Runner(kind="ollama") as ollama, running(ollama.url) as q:
        await told(q)
        answer = await ask(q.port, "POST", "/v1/rerank", json=least("/v1/rerank"))
        assert_error(answer, 501)
        assert answer.code == "not_implemented"
        assert not ollama.requests


async def test_error_for_lack_of_a_route_speaks_the_clients_dialect() -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        asked = post(q, "/v1/messages", least("/v1/messages"))
        await refuse(await arrival(asked, runner), 404, b"404 page not found")
        answer = await asked
        assert (answer.status, answer.json()["type"]) == (501, "error")
        assert answer.json()["error"]["type"] == "api_error"
        again = await ask(q.port, "POST", "/v1/messages", json=least("/v1/messages"))
        assert (again.status, again.json()["type"]) == (501, "error")


async def test_waiting_requests_move_on_when_the_route_turns_out_to_be_lacking() -> None:
    async with Runner(kind="openai") as runner, running(runner.url) as q:
        await told(q)
        first = post(q, "/v1/rerank", least("/v1/rerank"))
        request = await arrival(first, runner)
        second = post(q, "/v1/rerank", least("/v1/rerank"))
        await waiting(q, 1)
        await refuse(request, 405, b"")
        assert [(await one).status for one in (first, second)] == [501, 501]
        assert len(runner.requests) == 1


# ---- Signs of life ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", COMPLETIONS, RESPONSES])
async def test_comments_while_waiting_and_a_whole_stream_after_them(path: str) -> None:
    beat = {"server__heartbeat_after": 0.05, "server__heartbeat_interval": 0.05}
    sent = [*RESPONSE_PIECES, COMPLETED] if path == RESPONSES else [text_piece("a", "stop"), DONE]
    async with Runner(kind="openai") as runner, running(runner.url, **beat) as q:
        first = post(q, path, least(path))
        busy = await arrival(first, runner)
        raw = await Raw.open(q.port)
        data = json.dumps(least(path, stream=True)).encode()
        await raw.send(http("POST", path, {"Content-Type": "application/json"}, data))
        answer = await raw.head()
        assert (answer.status, answer.headers["content-type"][: len(EVENTS)]) == (200, EVENTS)
        beats = await raw.until(b"\n\r\n")
        assert b": position=1" in beats, beats
        await whole(busy, WHOLE_ANSWERS[path])
        assert (await first).status == 200
        request: FakeRequest = await runner.arrived()
        request.finished()
        await request.start_stream()
        await request.send(b"".join(chunk(one) for one in sent) + b"0\r\n\r\n")
        answer = await raw.response()
        assert answer.clean
        comments, _, rest = answer.body.partition(sent[0])
        assert rest == b"".join(sent[1:])
        assert all(one.startswith(b": position=") for one in comments.split(b"\n\n") if one)


# ---- What vLLM takes beside OpenAI's members -----------------------------------------------------

SPOKEN = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/embeddings", {"messages": SPOKEN}),
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
        ("/v1/completions", {"prompt": None, "prompt_embeds": ["AAAA"]}),
    ],
)
async def test_what_vllm_takes_in_place_of_a_text_is_not_refused(path: str, more: Any) -> None:
    body = {"model": "m", "max_tokens": 1, **more}
    async with Runner(kind="vllm") as runner, running(runner.url) as q:
        request, answer = await exchange(q, runner, path, body, {"object": "x", "data": []})
        assert (request.path, request.json, answer.status) == (path, body, 200)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions"])
async def test_neither_of_them_is_400_with_the_name(path: str) -> None:
    async with Runner(kind="vllm") as runner, running(runner.url) as q:
        answer = await post(q, path, {"model": "m"})
        assert answer.status == 400
        assert answer.json()["error"]["param"] == ASKS[path]
        assert runner.requests == []


ASKS = {"/v1/embeddings": "input", "/v1/completions": "prompt"}

# ---- Speech to text, which comes as a form -------------------------------------------------------

SPEECH = "/v1/audio/transcriptions"
FORM = {"Content-Type": "multipart/form-data; boundary=----a+b(c"}
DECOY = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nother\r\n'  # in the sound


def form(*, model: str | None = "m", sound: bytes = DECOY) -> bytes:
    """A form as browsers and SDKs write it."""
    file = b'Content-Disposition: form-data; name="file"; filename="model"\r\nContent-Type: a/b'
    parts = [(file, sound)]
    if model is not None:
        parts.append((b'Content-Disposition: form-data; name="model"', model.encode()))
    parts.append((b'Content-Disposition: form-data; name="language"', b"en"))
    told = b"".join(
        b"------a+b(c\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts
    )
    return told + b"------a+b(c--\r\n"


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
@pytest.mark.parametrize("path", [SPEECH, SPEECH.removeprefix("/v1")])
async def test_speech_goes_byte_for_byte_to_the_runner_of_its_model(kind: str, path: str) -> None:
    async with Runner(["x"]) as other, Runner(["m"], kind) as runner:
        async with running(backends={"x": {"url": other.url}, "y": {"url": runner.url}}) as q:
            await told(q)
            asked = post(q, path, form(), FORM)
            request = await arrival(asked, runner)
            assert (request.path, request.body) == (SPEECH, form())
            assert request.headers["content-type"] == FORM["Content-Type"]
            await whole(request, {"text": "hello"})
            assert (await asked).json() == {"text": "hello"}
            (record,) = (await q.status())["recent"]
            assert (record["model"], record["outcome"]) == ("m", "done")


async def test_speech_may_be_answered_in_plain_text() -> None:
    async with Runner() as runner, running(runner.url) as q:
        asked = post(q, SPEECH, form(sound=bytes(range(256)) * 999), FORM)
        await whole(await arrival(asked, runner), b"hello\n", "text/plain; charset=utf-8")
        answer = await asked
        assert (answer.status, answer.body) == (200, b"hello\n")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"


async def test_speech_waits_in_the_queue_as_all_that_needs_the_runner() -> None:
    async with Runner() as runner, running(runner.url) as q:
        first = post(q, "/v1/chat/completions", least("/v1/chat/completions"))
        request = await arrival(first, runner)
        second = post(q, SPEECH, form(), FORM)
        await waiting(q, 1)
        await whole(request, completion("m", "x"))
        await whole(await arrival(second, runner), {"text": "hello"})
        assert [(await one).status for one in (first, second)] == [200, 200]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (form(model="nobody"), FORM["Content-Type"], 404),
        (form(), "multipart/form-data", 400),
        (form(), "application/json", 400),
        (form(model="m" * 600), FORM["Content-Type"], 400),
        (form(), "multipart/form-data; boundary=" + "b" * 71, 400),
    ],
    ids=["unknown", "no boundary", "no form", "long", "long boundary"],
)
async def test_speech_that_cannot_be_sent_on_is_refused(
    body: bytes, kind: str, status: int
) -> None:
    async with Runner() as runner, running(runner.url) as q:
        answer = await post(q, SPEECH, body, {"Content-Type": kind})
        assert answer.status == status
        assert answer.json()["error"]["message"]
        assert runner.requests == []


@pytest.mark.deadline(20)
@pytest.mark.parametrize("piece", [b"------a+b(c\r\n", b"A: b\r\n", b'name="model"', b"\r\n\r\n"])
def test_forms_are_read_in_linear_time(piece: bytes) -> None:
    """Work that grows with the square of 8 MB would not end within the deadline."""
    body = form(sound=piece * ((8 << 20) // len(piece)))
    assert llmq.read_form(body, FORM["Content-Type"], None).model == "m"
