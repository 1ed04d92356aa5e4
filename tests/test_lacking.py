"""Backends that lack a dialect or a route: learned from their answers, moved on, told when none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.fake_runner import (
    CHAT,
    COMPLETIONS,
    DIALECTS,
    EMBED,
    EMBEDDINGS,
    GENERATE,
    MESSAGES,
    NATIVE_CHAT,
    NO_ROUTE,
    RERANK,
    RESPONSES,
    STREAMING,
    Dialect,
    Runner,
    speak,
)
from tests.fakes import Answer, ask, running

RECORDINGS = Path(__file__).parent / "real" / "recordings"
V1 = [one for one in DIALECTS if one.path.startswith("/v1/")]
OLLAMA_HAS = [one for one in DIALECTS if one is not RERANK]
WORDS = "no such thing in this house"
LACKING: dict[str, tuple[int, Any]] = {
    "405": (405, {"error": {"message": WORDS, "code": 405}}),
    "405 in plain text": (405, b"405 method not allowed"),
    "501": (501, {"error": {"message": WORDS, "type": "not_supported_error", "code": 501}}),
    "Ollama's 501": (501, {"error": WORDS}),
    "Ollama's 404": (404, NO_ROUTE),
    "llama.cpp's 404": (
        404,
        {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}},
    ),
    "FastAPI's 404": (404, {"detail": "Not Found"}),
    "an empty 404": (404, b""),
    "Go's 404": (404, b"404 page not found\n"),
    "LM Studio's 200": (200, {"error": "Unexpected endpoint or method. (POST /v1/responses)"}),
}
NO_LACK: dict[str, tuple[int, Any]] = {
    "an unknown response": (
        404,
        {"error": {"message": "Response with id 'resp_1' not found.", "code": 404}},
    ),
    "an unknown file": (404, {"error": {"message": "No such File object: file-1", "code": 404}}),
    "an unknown adapter": (404, {"detail": "adapter x not found"}),
    "a page": (404, b"<html><body>Not Found</body></html>"),
    "words of its own": (404, b"nobody is in today"),
}
MODEL_ERRORS: dict[str, Any] = {
    "Ollama, native": {"error": "model 'm' not found"},
    "Ollama, OpenAI": {
        "error": {
            "message": "model 'm' not found",
            "type": "not_found_error",
            "param": None,
            "code": None,
        }
    },
    "vLLM": {
        "object": "error",
        "message": "The model `m` does not exist.",
        "type": "NotFoundError",
        "code": 404,
    },
    "OpenAI": {
        "error": {
            "message": "The model `m` does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    },
    "Anthropic": {"type": "error", "error": {"type": "not_found_error", "message": "model: m"}},
}
each_lack = pytest.mark.parametrize("lack", LACKING.values(), ids=LACKING.keys())
QUICK = {"upstream__probe_interval": 0.1}


def backends(**fakes: Runner) -> dict[str, Any]:
    """Backends of these names, each a device of its own."""
    return {
        name: {"url": fake.url, "kind": fake.kind, "device": name} for name, fake in fakes.items()
    }


async def served(q: running, dialect: Dialect, stream: bool = False, **more: Any) -> Answer:
    answer = await dialect.ask(q.port, "hello there", stream, **more)
    assert dialect.text(answer) == "hello there"
    return answer


async def up(q: running) -> None:
    """Return once every backend is up; the test's deadline ends it otherwise."""
    while any(one["state"] != "up" for one in (await q.status())["backends"]):
        pass


def asked(fake: Runner, dialect: Dialect) -> int:
    return [request.path for request in fake.requests].count(dialect.path)


def recorded(name: str) -> tuple[int, bytes]:
    """Status and body of a recorded answer."""
    head, _, body = (RECORDINGS / f"{name}.response.txt").read_bytes().partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


# ---- Learned, and moved on -------------------------------------------------------------------


@each_lack
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_backend_that_has_no_such_route_is_passed_over_from_then_on(
    lack: Any, stream: bool
) -> None:
    async with Runner(kind="llamacpp") as lacks, Runner(kind="llamacpp") as has:
        lacks.lacks[RESPONSES.path] = lack
        settings = {"queue__max_attempts": 1, "backends": backends(a=lacks, b=has)}
        async with running(**settings) as q:
            await up(q)
            answer = await served(q, RESPONSES, stream)
            assert answer.headers["x-llmq-backend"] == "b"
            for _ in range(3):  # with room at both, each would get some
                await asyncio.gather(*(served(q, RESPONSES, stream) for _ in range(2)))
            assert asked(lacks, RESPONSES) <= 1
            assert asked(has, RESPONSES) == 7


async def test_it_is_asked_once_when_it_stands_first() -> None:
    async with Runner(kind="llamacpp") as lacks, Runner(kind="llamacpp", models=["x"]) as other:
        lacks.lacks[RESPONSES.path] = LACKING["405"]
        async with running(backends=backends(a=lacks, b=other)) as q:
            await up(q)
            for _ in range(3):
                assert (await RESPONSES.ask(q.port, "hi")).status == 501
            assert asked(lacks, RESPONSES) == 1
            assert other.requests == []


@each_lack
async def test_what_it_lacks_is_asked_for_again_after_a_minute(lack: Any) -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[RESPONSES.path] = lack
        async with running(backends=backends(a=fake)) as q:
            await up(q)
            for _ in range(2):
                assert (await RESPONSES.ask(q.port, "hi")).status == 501
            assert asked(fake, RESPONSES) == 1
            (backend,) = q.gateway.fleet.backends.values()
            q.gateway.reap(q.gateway.now() + 50)
            assert backend.unsupported
            q.gateway.reap(q.gateway.now() + 60)
            assert not backend.unsupported
            fake.lacks.clear()
            await served(q, RESPONSES)
            assert asked(fake, RESPONSES) == 2


@each_lack
async def test_lack_of_one_route_is_no_lack_of_another_and_no_failure(lack: Any) -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[RESPONSES.path] = lack
        async with running(backends=backends(a=fake)) as q:
            await up(q)
            for _ in range(4):
                assert (await RESPONSES.ask(q.port, "hi")).status == 501
            for dialect in (CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES):
                await served(q, dialect)
            (row,) = (await q.status())["backends"]
            assert (row["state"], row["busy"]) == ("up", 0)


async def test_501_speaks_for_one_model_and_405_and_404_for_all() -> None:
    """A runner without embeddings says 501 for a model; another model may have them."""
    for lack, again in ((LACKING["501"], 2), (LACKING["405"], 1), (LACKING["Ollama's 404"], 1)):
        async with Runner(kind="llamacpp", models=["m", "n"]) as fake:
            fake.lacks[(EMBEDDINGS.path, "m")] = lack
            async with running(backends=backends(a=fake)) as q:
                await up(q)
                assert (await EMBEDDINGS.ask(q.port, "hi")).status == 501
                assert (await EMBEDDINGS.ask(q.port, "hi")).status == 501
                answer = await EMBEDDINGS.ask(q.port, "hi", model="n")
                assert answer.status == (200 if again == 2 else 501)
                assert asked(fake, EMBEDDINGS) == again


async def test_moving_on_counts_no_attempt_and_avoids_nobody() -> None:
    async with Runner(kind="vllm") as one, Runner(kind="vllm") as two, Runner(kind="vllm") as three:
        for fake in (one, two):
            fake.lacks[RERANK.path] = LACKING["an empty 404"]
        settings = {"queue__max_attempts": 1, "backends": backends(a=one, b=two, c=three)}
        async with running(**settings) as q:
            await up(q)
            for _ in range(3):
                await served(q, RERANK)
            assert asked(three, RERANK) == 3
            assert asked(one, RERANK) <= 1
            assert asked(two, RERANK) <= 1


async def test_attempts_are_all_left_after_moving_on() -> None:
    async with Runner(kind="vllm") as lacks, Runner(kind="vllm", auto=False) as breaks:
        lacks.lacks[RERANK.path] = LACKING["405"]
        settings = {"queue__max_attempts": 2, "backends": backends(a=lacks, b=breaks)}
        async with running(**settings) as q:
            await up(q)
            client = asyncio.ensure_future(served(q, RERANK))
            (await breaks.arrived()).reset()
            await speak(await breaks.arrived())
            await client
            assert asked(lacks, RERANK) == 1


async def test_what_a_backend_lacks_is_asked_again_when_it_came_back() -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[RESPONSES.path] = LACKING["Ollama's 404"]
        async with running(backends=backends(a=fake), **QUICK) as q:
            await up(q)
            assert (await RESPONSES.ask(q.port, "hi")).status == 501
            fake.lacks.clear()  # a newer version is installed
            await fake.stop_listening()
            fake.drop_connections()
            while (await q.status())["backends"][0]["state"] != "down":
                pass
            await fake.listen_again()
            await up(q)
            await served(q, RESPONSES)


async def test_request_behind_it_is_not_held_up_and_its_slot_is_free() -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[RESPONSES.path] = LACKING["405"]
        async with running(backends=backends(a=fake)) as q:
            await up(q)
            fake.hold()
            waiting = [asyncio.ensure_future(RESPONSES.ask(q.port, "hi")) for _ in range(5)]
            while (await q.status())["queue"]["waiting"] != 4:
                pass
            last = asyncio.ensure_future(served(q, CHAT))
            while (await q.status())["queue"]["waiting"] != 5:
                pass
            fake.release()
            assert {answer.status for answer in await asyncio.gather(*waiting)} == {501}
            await last
            assert fake.max_active == 1
            queue = (await q.status())["queue"]
            assert (queue["waiting"], queue["running"]) == (0, 0)


# ---- When none is left -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["405", "501", "Ollama's 501"])
@pytest.mark.parametrize("dialect", STREAMING[:4], ids=repr)
async def test_backends_own_words_are_told_in_the_clients_dialect(
    dialect: Dialect, name: str
) -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[dialect.path] = LACKING[name]
        async with running(backends=backends(a=fake)) as q:
            for stream in (False, True):
                answer = await dialect.ask(q.port, "hi", stream)
                assert (answer.status, answer.clean) == (501, True)
                assert WORDS in dialect.whole_error(answer)
                if dialect is not MESSAGES:
                    assert answer.code == "not_implemented"
                else:
                    assert answer.json()["error"]["type"] == "api_error"


@pytest.mark.parametrize("kind", ["openai", "llamacpp", "vllm", "lmstudio"])
async def test_native_route_where_no_translation_is_left_says_so(kind: str) -> None:
    async with Runner(kind=kind) as fake:
        fake.lacks[CHAT.path] = LACKING["405"]
        async with running(backends=backends(a=fake)) as q:
            answer = await NATIVE_CHAT.ask(q.port, "hi")
            assert answer.status == 501
            assert NATIVE_CHAT.whole_error(answer)
            assert "/api/chat" not in [request.path for request in fake.requests]


async def test_ollama_is_not_even_asked_for_what_it_never_had() -> None:
    async with Runner() as fake, running(fake.url) as q:
        answer = await RERANK.ask(q.port, "hi")
        assert (answer.status, answer.code) == (501, "not_implemented")
        assert fake.requests == []


async def test_ollama_without_rerank_leaves_it_to_who_has_it() -> None:
    async with Runner() as fake, Runner(kind="llamacpp") as other:
        async with running(backends=backends(a=fake, b=other)) as q:
            await up(q)
            for _ in range(3):
                assert (await served(q, RERANK)).headers["x-llmq-backend"] == "b"
            assert fake.requests == []


async def test_one_that_has_the_route_but_is_down_is_waited_for() -> None:
    """501 is for when nobody can; one that may come back can."""
    async with Runner(kind="llamacpp") as lacks, Runner(kind="llamacpp") as has:
        lacks.lacks[RESPONSES.path] = LACKING["405"]
        settings = {"backends": backends(a=lacks, b=has), "queue__down_wait": 8, **QUICK}
        async with running(**settings) as q:
            await up(q)
            await has.stop_listening()
            has.drop_connections()
            while (await q.status())["backends"][1]["state"] != "down":
                pass
            waits = asyncio.ensure_future(served(q, RESPONSES))
            while asked(lacks, RESPONSES) != 1 or (await q.status())["queue"]["waiting"] != 1:
                assert not waits.done(), waits.result()
                await q.status()
            await has.listen_again()
            assert (await waits).headers["x-llmq-backend"] == "b"


# ---- Translation as the way out --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "native"),
    [(CHAT, NATIVE_CHAT), (COMPLETIONS, GENERATE), (EMBEDDINGS, EMBED)],
    ids=lambda one: one.path,
)
@pytest.mark.parametrize("name", ["Ollama's 404", "405"])
async def test_ollama_without_openais_route_is_asked_in_its_own(
    dialect: Dialect, native: Dialect, name: str
) -> None:
    async with Runner() as fake:
        fake.lacks[dialect.path] = LACKING[name]
        async with running(fake.url, queue__max_attempts=1) as q:
            await served(q, dialect)
            await served(q, dialect)
            if dialect.streams:
                await served(q, dialect, stream=True)
            paths = [request.path for request in fake.requests]
            assert paths == [dialect.path] + [native.path] * (len(paths) - 1)


@pytest.mark.parametrize("kind", ["openai", "llamacpp", "vllm", "lmstudio"])
@pytest.mark.parametrize(
    ("dialect", "theirs"),
    [(NATIVE_CHAT, CHAT), (GENERATE, COMPLETIONS), (EMBED, EMBEDDINGS)],
    ids=lambda one: one.path,
)
async def test_runner_that_speaks_openai_alone_serves_ollamas_clients(
    kind: str, dialect: Dialect, theirs: Dialect
) -> None:
    async with Runner(kind=kind) as fake, running(backends=backends(a=fake)) as q:
        await served(q, dialect)
        if dialect.streams:
            await served(q, dialect, stream=True)
        assert {request.path for request in fake.requests} == {theirs.path}


async def test_one_that_speaks_the_dialect_goes_before_translation() -> None:
    """Both can; either is right, and each answer is whole."""
    async with Runner(kind="openai") as openai, Runner() as ollama:
        async with running(backends=backends(a=openai, b=ollama)) as q:
            await up(q)
            await asyncio.gather(*(served(q, NATIVE_CHAT) for _ in range(6)))
            assert {request.path for request in openai.requests} <= {CHAT.path}
            assert {request.path for request in ollama.requests} <= {NATIVE_CHAT.path}


# ---- What is no lack -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("answer", NO_LACK.values(), ids=NO_LACK.keys())
async def test_404_in_other_words_than_an_unknown_paths_marks_nothing(
    answer: tuple[int, Any], stream: bool
) -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[RESPONSES.path] = answer
        async with running(backends=backends(a=fake)) as q:
            await up(q)
            for number in (1, 2):
                told = await RESPONSES.ask(q.port, "hi", stream)
                assert (told.status, told.clean) == (404, True)
                assert asked(fake, RESPONSES) == number
            fake.lacks.clear()
            await served(q, RESPONSES, stream)


@pytest.mark.parametrize("words", ["Not Found", "404 page not found", ""])
async def test_what_has_been_answered_well_is_not_lacking_whatever_a_404_says(words: str) -> None:
    """One client's unknown response id must not take the route from the others."""
    async with Runner(kind="llamacpp") as fake, running(backends=backends(a=fake)) as q:
        await up(q)
        await served(q, RESPONSES)
        fake.lacks[RESPONSES.path] = (404, {"error": {"message": words}} if words else b"")
        assert (await RESPONSES.ask(q.port, "hi")).status == 404
        fake.lacks.clear()
        await served(q, RESPONSES)
        assert asked(fake, RESPONSES) == 3


async def test_answer_that_only_speaks_of_an_unexpected_endpoint_is_one() -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[CHAT.path] = (200, CHAT.whole("m", "Unexpected endpoint or method. error"))
        async with running(backends=backends(a=fake)) as q:
            for _ in range(2):
                answer = await CHAT.ask(q.port, "hi")
                assert CHAT.text(answer) == "Unexpected endpoint or method. error"
            assert asked(fake, CHAT) == 2


@pytest.mark.parametrize("body", MODEL_ERRORS.values(), ids=MODEL_ERRORS.keys())
@pytest.mark.parametrize("dialect", V1, ids=repr)
async def test_404_that_speaks_of_the_model_passes_through_and_marks_nothing(
    dialect: Dialect, body: Any
) -> None:
    async with Runner(kind="llamacpp") as fake:
        fake.lacks[dialect.path] = (404, body)
        async with running(backends=backends(a=fake)) as q:
            answer = await dialect.ask(q.port, "hi")
            assert answer.status == 404
            assert "m" in dialect.relayed_error(answer)
            fake.lacks.clear()
            await served(q, dialect)
            assert asked(fake, dialect) == 2


@pytest.mark.parametrize(
    "name",
    ["ollama.err-unknown-model", "ollama.api-unknown-model", "vllm.err-unknown-model"],
)
async def test_recorded_error_of_an_unknown_model_is_no_lack(name: str) -> None:
    status, body = recorded(name)
    assert status == 404
    dialect = NATIVE_CHAT if ".api" in name else CHAT
    async with Runner(kind="ollama" if name.startswith("ollama") else "vllm") as fake:
        fake.lacks[dialect.path] = (status, body)
        async with running(backends=backends(a=fake)) as q:
            for number in (1, 2):
                answer = await dialect.ask(q.port, "hi")
                assert answer.status == 404
                assert "no-such-model" in dialect.relayed_error(answer)
                assert len(fake.requests) == number


@pytest.mark.parametrize("runner", ["ollama", "llama-server", "vllm", "llama-cpp-python"])
async def test_recorded_answer_of_a_route_that_is_not_there_is_a_lack(runner: str) -> None:
    status, body = recorded(f"{runner}.err-404")
    assert status == 404
    async with Runner(kind="vllm") as fake:
        fake.lacks[RESPONSES.path] = (status, body)
        async with running(backends=backends(a=fake)) as q:
            for _ in range(2):
                assert (await RESPONSES.ask(q.port, "hi")).status == 501
            assert asked(fake, RESPONSES) == 1


async def test_recorded_501_of_a_runner_without_embeddings_is_told_in_its_words() -> None:
    for dialect in (EMBEDDINGS, EMBED):
        async with Runner() as fake:
            fake.lacks[EMBEDDINGS.path] = recorded("ollama.embeddings")
            fake.lacks[EMBED.path] = recorded("ollama.api-embed")
            async with running(fake.url) as q:
                answer = await dialect.ask(q.port, "hi")
                assert answer.status == 501
                assert "does not support embeddings" in dialect.whole_error(answer)


@pytest.mark.parametrize("status", [400, 409, 422, 429, 500])
async def test_other_errors_are_answers_and_teach_nothing(status: int) -> None:
    async with Runner(kind="llamacpp") as fake, Runner(kind="llamacpp") as other:
        for one in (fake, other):
            one.lacks[RESPONSES.path] = (status, {"error": {"message": "odd", "code": status}})
        async with running(backends=backends(a=fake, b=other)) as q:
            await up(q)
            answer = await RESPONSES.ask(q.port, "hi")
            assert answer.status == status
            assert "odd" in RESPONSES.relayed_error(answer)
            assert asked(fake, RESPONSES) + asked(other, RESPONSES) == 1
            fake.lacks.clear()
            other.lacks.clear()
            await served(q, RESPONSES)


# ---- With signs of life ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_request_moves_on_although_its_head_has_gone(stream: bool) -> None:
    soon = dict.fromkeys(("heartbeat_after", "heartbeat_interval", "whole_heartbeat_after"), 0.2)
    settings = {f"server__{name}": value for name, value in soon.items()}
    async with Runner(kind="llamacpp") as lacks, Runner(kind="llamacpp") as has:
        lacks.lacks[RESPONSES.path] = LACKING["405"]
        lacks.hold()
        has.hold()
        async with running(backends=backends(a=lacks, b=has), **settings) as q:
            await up(q)
            raw = await RESPONSES.begin(q.port, "hello there", stream)
            head = await raw.head()
            assert head.status == 200
            lacks.release()
            has.release()
            assert RESPONSES.text(await raw.response()) == "hello there"


# ---- Which kind speaks what at first ---------------------------------------------------------

KINDS: dict[str, list[Dialect]] = {
    "ollama": OLLAMA_HAS,
    "llamacpp": V1,
    "vllm": V1,
    "lmstudio": [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES],
    "openai": V1,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_kind_is_asked_in_every_dialect_it_speaks(kind: str) -> None:
    async with Runner(kind=kind) as fake, running(backends=backends(a=fake)) as q:
        for dialect in KINDS[kind]:
            await served(q, dialect)
            assert fake.requests[-1].path == dialect.path
        for dialect in V1:
            if dialect not in KINDS[kind]:
                answer = await dialect.ask(q.port, "hi")
                assert answer.status == 501
                assert dialect.whole_error(answer)


async def test_both_spellings_of_chat_completions_share_what_was_learned() -> None:
    async with Runner(kind="openai") as fake:
        fake.lacks[CHAT.path] = LACKING["Ollama's 404"]
        async with running(backends=backends(a=fake)) as q:
            for path in (CHAT.path, "/chat/completions"):
                answer = await ask(q.port, "POST", path, json=CHAT.body("hi"))
                assert (answer.status, answer.code) == (501, "not_implemented")
            assert len(fake.requests) == 1
