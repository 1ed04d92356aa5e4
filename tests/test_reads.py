"""Reads: one list of models from all backends, in the shape each client knows, never queued."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import llmq
from tests.fake_ollama import Ollama
from tests.fake_runner import (
    CHAT,
    DIALECTS,
    EMBED,
    MESSAGES,
    NATIVE_CHAT,
    RERANK,
    Dialect,
    Runner,
    speak,
)
from tests.fakes import Answer, Raw, ask, eventually, http, running

NOBODY = "http://127.0.0.1:9"  # where no backend listens
ANTHROPIC = {"anthropic-version": "2023-06-01"}
RECORDINGS = Path(__file__).parent / "real" / "recordings"
OLLAMA_HAS = [one for one in DIALECTS if one is not RERANK]
ALIASES = {"claude-*": "qwen3-coder:30b", "gpt-4*-mini": "small", "fast": "small"}
each_dialect = pytest.mark.parametrize("dialect", OLLAMA_HAS, ids=repr)


async def up(q: running) -> None:
    """Return once every backend is up; the test's deadline ends it otherwise."""
    while any(one["state"] != "up" for one in (await q.status())["backends"]):
        pass


async def get(q: running, path: str, **headers: str) -> Any:
    answer = await ask(
        q.port, "GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    assert (answer.status, answer.clean) == (200, True), answer
    assert answer.headers["content-type"].startswith("application/json")
    return answer.json()


def body_of(name: str) -> bytes:
    """The body of a recorded answer."""
    return (RECORDINGS / f"{name}.response.txt").read_bytes().partition(b"\r\n\r\n")[2]


async def asks(q: running, dialect: Dialect, model: str) -> Answer:
    return await dialect.ask(q.port, "hello", model=model)


# ---- Lists -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
async def test_anthropics_clients_get_the_models_in_their_shape(path: str) -> None:
    async with (
        Runner(models=["a", "org/b:7b"]) as one,
        Runner(models=["c"], kind="llamacpp") as two,
    ):
        async with running(one.url, two.url) as q:
            await up(q)
            listing = await get(q, path, **ANTHROPIC)
            assert [row["id"] for row in listing["data"]] == ["a", "org/b:7b", "c"]
            for row in listing["data"]:
                assert row["type"] == "model"
                assert row["display_name"]
                assert row["created_at"].endswith("Z") or "+" in row["created_at"]
            assert listing["has_more"] is False
            assert (listing["first_id"], listing["last_id"]) == ("a", "c")
            assert (await get(q, path))["object"] == "list"


async def test_one_model_has_anthropics_shape_too_slashes_and_all() -> None:
    async with Runner(models=["org/model/x:7b"]) as fake, running(fake.url) as q:
        await up(q)
        for path in ("org/model/x:7b", "org%2Fmodel%2Fx%3A7b", "ORG/model/x:7b"):
            row = await get(q, f"/v1/models/{path}", **ANTHROPIC)
            assert (row["type"], row["id"]) == ("model", "org/model/x:7b")
            row = await get(q, f"/v1/models/{path}")
            assert (row["object"], row["id"]) == ("model", "org/model/x:7b")


async def test_empty_list_has_anthropics_shape_too() -> None:
    async with running(NOBODY) as q:
        listing = await get(q, "/v1/models", **ANTHROPIC)
        assert (listing["data"], listing["has_more"]) == ([], False)


async def test_unknown_model_is_told_in_the_dialect_of_who_asks() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        answer = await ask(q.port, "GET", "/v1/models/nobody/has:it", headers=ANTHROPIC)
        assert answer.status == 404
        assert "nobody/has:it" in MESSAGES.whole_error(answer)
        assert answer.json()["error"]["type"] == "not_found_error"
        answer = await ask(q.port, "GET", "/v1/models/nobody/has:it")
        assert (answer.status, answer.code) == (404, "model_not_found")


async def test_tags_are_ollamas_own_rows_and_made_ones_for_others() -> None:
    async with Runner(models=["a:latest", "b:7b"]) as one:
        async with Runner(models=["A", "org/c"], kind="vllm") as two:
            async with running(one.url, two.url) as q:
                await up(q)
                tags = await get(q, "/api/tags")
                assert tags["models"][:2] == [one.tag("a:latest"), one.tag("b:7b")]
                (made,) = tags["models"][2:]
                assert made["name"] == made["model"] == "org/c"
                assert isinstance(made["size"], int)
                assert re.fullmatch("[0-9a-f]{64}", made["digest"]), "Ollama's CLI shows 12"
                again = await get(q, "/api/tags")
                assert again["models"][2]["digest"] == made["digest"] != "0" * 64
                assert isinstance(made["details"], dict)
                assert made["modified_at"][4] == "-"


async def test_tags_and_ps_of_a_real_ollama_pass_unchanged() -> None:
    async with Runner(models=["counter:latest", "slow:latest"]) as fake:
        for path, name in (("/api/tags", "ollama.api-tags"), ("/api/ps", "ollama.api-ps")):
            fake.probe_answers[path] = (200, body_of(name))
        fake.probe_answers["/v1/models"] = (200, body_of("ollama.models"))
        async with running(fake.url) as q:
            await up(q)
            for path in ("/api/tags", "/api/ps", "/v1/models"):
                assert await get(q, path) == json.loads(fake.probe_answers[path][1]), path


async def test_ps_is_what_is_loaded_anywhere() -> None:
    async with Runner(models=["a", "b"]) as one, Runner(models=["c"], kind="llamacpp") as two:
        one.contexts = {"b": 8192}
        async with running(one.url, two.url) as q:
            await up(q)
            rows = (await get(q, "/api/ps"))["models"]
            assert one.loaded_row("b") in rows
            assert {row["name"] for row in rows} == {"b", "c"}
            assert all(row["name"] == row["model"] for row in rows)


async def test_reads_follow_the_probes_and_leave_out_who_is_down() -> None:
    async with Runner(models=["stays"]) as one, Runner(models=["goes"]) as two:
        one.contexts, two.contexts = {"stays": 4096}, {"goes": 4096}
        async with running(one.url, two.url, upstream__probe_interval=0.1) as q:
            await up(q)
            await two.stop_listening()
            two.drop_connections()
            while (await q.status())["backends"][1]["state"] != "down":
                pass
            for path, list_of, name in (
                ("/api/tags", "models", "name"),
                ("/api/ps", "models", "name"),
                ("/v1/models", "data", "id"),
            ):
                assert [row[name] for row in (await get(q, path))[list_of]] == ["stays"], path
            one.models.append("new")
            while len((await get(q, "/api/tags"))["models"]) != 2:
                pass
            two.models = ["came"]
            await two.listen_again()
            await up(q)
            names = [row["name"] for row in (await get(q, "/api/tags"))["models"]]
            assert names == ["stays", "new", "came"]


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/v1/models", "/models"])
async def test_reads_ask_no_backend_and_never_wait(path: str) -> None:
    async with Runner(auto=False) as fake, running(fake.url) as q:
        await up(q)
        running_one = asyncio.ensure_future(CHAT.ask(q.port, "long"))
        request = await fake.arrived()
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        before = fake.connections, fake.probes
        for _ in range(20):
            await get(q, path)
        assert (fake.connections, fake.probes) == before
        await speak(request)
        await running_one


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
async def test_head_is_get_without_its_body_where_ollama_has_it(path: str) -> None:
    async with Runner() as fake, running(fake.url) as q, await Raw.open(q.port) as raw:
        await up(q)
        answers = []
        for method in ("GET", "HEAD", "GET"):
            await raw.send(http(method, path))
            answers.append(await raw.response())
        first, head, last = answers
        assert [one.status for one in answers] == [200, 200, 200]
        assert first.body == last.body != b""
        assert head.body == b""
        assert head.headers["content-length"] == first.headers["content-length"]
        assert head.headers["content-type"] == first.headers["content-type"]


async def test_version_is_that_of_the_ollama_behind_or_a_believable_one() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        assert (await get(q, "/api/version"))["version"] == "0.12.0"
    async with Runner(kind="vllm") as fake, running(fake.url) as q:
        await up(q)
        version = (await get(q, "/api/version"))["version"]
        assert tuple(map(int, version.split("."))) >= (0, 5, 0)


# ---- Show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["model", "name"])
async def test_show_is_what_ollama_says_of_the_model(field: str) -> None:
    async with Runner(models=["a", "b"]) as fake, running(fake.url) as q:
        fake.limits["b"] = 8192
        await up(q)
        answer = await ask(q.port, "POST", "/api/show", json={field: "b"})
        assert answer.status == 200
        shown = answer.json()
        assert shown["model_info"]["llama.context_length"] == 8192
        assert shown["template"] == "{{ . }}"
        assert shown["capabilities"] == ["completion"]


async def test_show_passes_over_members_that_it_does_not_know() -> None:
    async with Runner(models=["a"]) as fake, running(fake.url) as q:
        await up(q)
        body = b'{"model":"a","options":{"temperature":1e999}}'  # which no JSON can be made of
        answer = await ask(q.port, "POST", "/api/show", body=body)
        assert (answer.status, answer.json()["capabilities"]) == (200, ["completion"])


async def test_show_of_a_model_that_no_ollama_has_is_made_up_of_what_is_known() -> None:
    async with Runner(models=["a"]) as one, Runner(models=["org/c"], kind="vllm") as two:
        async with running(one.url, two.url) as q:
            await up(q)
            answer = await ask(q.port, "POST", "/api/show", json={"model": "org/c"})
            assert answer.status == 200
            shown = answer.json()
            assert isinstance(shown["details"], dict)
            assert isinstance(shown["model_info"], dict)
            assert "completion" in shown["capabilities"]
            assert two.shown == []


@pytest.mark.parametrize(
    ("kind", "path", "told"),
    [
        ("vllm", "/v1/models", {"max_model_len": 32768}),
        ("llamacpp", "/v1/models", {"meta": {"n_ctx_train": 32768}}),
        ("lmstudio", "/api/v0/models", {"max_context_length": 32768}),
    ],
)
async def test_show_tells_the_context_length_that_a_runner_tells(
    kind: str, path: str, told: Any
) -> None:
    async with Runner(models=["org/c"], kind=kind) as fake:
        fake.probe_answers[path] = (200, {"data": [{"id": "org/c", "object": "model", **told}]})
        async with running(backends={"a": {"url": fake.url, "kind": kind}}) as q:
            await up(q)
            answer = await ask(q.port, "POST", "/api/show", json={"model": "org/c"})
            assert answer.status == 200
            info = answer.json()["model_info"]
            assert info[f"{info['general.architecture']}.context_length"] == 32768


PROPS = {
    "modalities": {"vision": True, "audio": False},
    "chat_template_caps": {"supports_tools": True},
    "chat_template": "{% if enable_thinking %}",
}


async def test_show_tells_what_llama_cpp_tells_of_its_model() -> None:
    async with Runner(models=["m"], kind="llamacpp") as fake:
        fake.probe_answers["/props"] = (200, PROPS)
        async with running(fake.url) as q:
            await up(q)
            shown = (await ask(q.port, "POST", "/api/show", json={"model": "m"})).json()
            assert shown["capabilities"] == ["completion", "tools", "vision", "thinking"]
        fake.probe_answers["/props"] = (200, {**PROPS, "modalities": None, "chat_template": 7})
        async with running(fake.url) as q:
            await up(q)
            shown = (await ask(q.port, "POST", "/api/show", json={"model": "m"})).json()
            assert shown["capabilities"] == ["completion", "tools"]


@pytest.mark.parametrize(
    ("told", "can"),
    [
        ({"type": "vlm", "capabilities": ["tool_use"]}, ["completion", "tools", "vision"]),
        ({"type": "vlm"}, ["completion", "vision"]),
        ({"type": "llm", "capabilities": ["tool_use", 7]}, ["completion", "tools"]),
        ({"type": "llm", "capabilities": "tool_use"}, ["completion"]),
    ],
)
async def test_show_tells_what_lm_studio_tells_of_its_model(told: Any, can: list[str]) -> None:
    async with Runner(models=["org/c"], kind="lmstudio") as fake:
        rows = [{"id": "org/c", "object": "model", "state": "not-loaded", **told}]
        fake.probe_answers["/api/v0/models"] = (200, {"data": rows})
        async with running(backends={"a": {"url": fake.url, "kind": "lmstudio"}}) as q:
            await up(q)
            shown = (await ask(q.port, "POST", "/api/show", json={"model": "org/c"})).json()
            assert shown["capabilities"] == can


def router(loaded: str) -> dict[str, Any]:
    """The models of llama.cpp in router mode."""
    rows = [
        {
            "id": name,
            "owned_by": "llamacpp",
            "architecture": {"input_modalities": ["text", "image"]},
            "status": {"value": "loaded" if name == loaded else "unloaded"},
        }
        for name in ("a", "b")
    ]
    return {"object": "list", "data": rows}


async def test_what_a_request_has_loaded_is_listed_as_loaded_at_once() -> None:
    """As Ollama's own example of `ps` has it; what is known to be loaded causes no look."""
    async with Ollama(["m", "n"]) as fake, running(fake.url, upstream__probe_interval=60) as q:
        await up(q)
        for loaded in (["m:latest"], ["m:latest", "n:latest"]):
            body = {"model": loaded[-1], "messages": [{"role": "user", "content": "hi"}]}
            assert (await ask(q.port, "POST", "/v1/chat/completions", json=body)).status == 200
            rows = (await get(q, "/api/ps"))["models"]
            assert [row["name"] for row in rows] == loaded
        looks = fake.probes
        assert (await ask(q.port, "POST", "/v1/chat/completions", json=body)).status == 200
        await get(q, "/api/ps")
        assert fake.probes == looks


async def test_models_of_router_mode_are_not_loaded_by_looks() -> None:
    async with Runner(models=["a", "b"], kind="llamacpp") as fake:
        fake.probe_answers["/v1/models"] = (200, router("a"))
        async with running(fake.url) as q:
            await up(q)
            rows = (await ask(q.port, "GET", "/api/ps")).json()["models"]
            assert [row["name"] for row in rows] == ["a"]
            shown = (await ask(q.port, "POST", "/api/show", json={"model": "b"})).json()
            assert shown["capabilities"] == ["completion", "vision"]
            body = {"model": "b", "messages": [{"role": "user", "content": "hi"}]}
            answer = await ask(q.port, "POST", "/v1/messages/count_tokens", json=body)
            assert answer.json()["input_tokens"] >= 1
            assert fake.requests == [], "only asked what it has"
            assert "/props" not in fake.probe_paths, "which are the router's, not a model's"


async def test_show_waits_for_the_ollama_longer_than_a_look() -> None:
    async with Runner() as fake:
        gate = asyncio.Event()
        show = fake._show

        async def later(request: Any) -> None:
            await gate.wait()
            await show(request)

        fake._show = later  # type: ignore[method-assign]
        async with running(fake.url, upstream__probe_timeout=0.1) as q:
            await up(q)
            asked = asyncio.ensure_future(ask(q.port, "POST", "/api/show", json={"model": "m"}))
            done, _ = await asyncio.wait({asked}, timeout=0.5)
            assert not done
            gate.set()
            answer = await asked
            assert (answer.status, answer.json()["template"]) == (200, "{{ . }}")


async def test_show_of_an_ollama_that_cannot_tell_is_its_error_and_no_invention() -> None:
    async with Runner() as fake:
        async with running(fake.url, upstream__first_byte_timeout=0.3) as q:
            await up(q)

            async def refuse(request: Any) -> None:
                await request.status(500, {"error": "no room for a look"})

            async def stay_silent(request: Any) -> None:
                await request.left()

            async def hang_up(request: Any) -> None:
                request.reset()

            for show, status in ((refuse, 500), (stay_silent, 504), (hang_up, 502)):
                fake._show = show  # type: ignore[method-assign]
                answer = await ask(q.port, "POST", "/api/show", json={"model": "m"})
                assert (answer.status, answer.clean) == (status, True), answer
                words = NATIVE_CHAT.whole_error(answer)
                assert show is not refuse or "no room for a look" in words


async def test_show_of_an_unknown_model_is_404_as_ollama_says_it() -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        answer = await ask(q.port, "POST", "/api/show", json={"model": "nobody"})
        assert answer.status == 404
        assert "nobody" in NATIVE_CHAT.whole_error(answer)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"model":3}', b'{"model":""}'])
async def test_show_without_a_name_is_400(body: bytes) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        answer = await ask(q.port, "POST", "/api/show", body=body)
        assert answer.status == 400
        assert NATIVE_CHAT.whole_error(answer)


async def test_show_does_not_wait_in_the_queue() -> None:
    async with Runner(auto=False) as fake, running(fake.url) as q:
        await up(q)
        long = asyncio.ensure_future(CHAT.ask(q.port, "long"))
        request = await fake.arrived()
        await ask(q.port, "POST", "/llmq/mode", json={"mode": "paused"})
        answer = await ask(q.port, "POST", "/api/show", json={"model": "m"})
        assert answer.status == 200
        await speak(request)
        await long


# ---- Names -----------------------------------------------------------------------------------


@each_dialect
async def test_alias_leads_to_its_model_in_every_dialect(dialect: Dialect) -> None:
    models = ["qwen3-coder:30b", "small"]
    async with Runner(models=models) as fake, running(fake.url, aliases=ALIASES) as q:
        for asked, model in (
            ("claude-sonnet-4-5", "qwen3-coder:30b"),
            ("claude-", "qwen3-coder:30b"),
            ("gpt-4o-mini", "small"),
            ("fast", "small"),
        ):
            answer = await asks(q, dialect, asked)
            assert dialect.text(answer) == "hello"
            assert fake.requests[-1].json == dialect.body("hello", model=model)


async def test_exact_name_then_latest_and_case_then_alias() -> None:
    aliases = {"*": "other", "exact": "other", "Cased": "other", "tagged": "other"}
    models = ["exact", "cased", "tagged:latest", "other"]
    async with Runner(models=models) as fake, running(fake.url, aliases=aliases) as q:
        for asked, model in (
            ("exact", "exact"),
            ("Cased", "Cased"),
            ("tagged", "tagged"),
            ("EXACT:latest", "EXACT:latest"),
            ("whatever", "other"),
            ("exact:7b", "other"),
        ):
            assert (await asks(q, CHAT, asked)).status == 200
            assert fake.requests[-1].json["model"] == model, asked


async def test_name_never_leads_to_another_tag() -> None:
    async with Runner(models=["m:7b", "n:latest"]) as fake, running(fake.url) as q:
        for name in ("m", "m:latest", "m:7", "m:7b-q4", "n:7b", "7b"):
            answer = await asks(q, CHAT, name)
            assert (answer.status, answer.code) == (404, "model_not_found"), name
        assert fake.requests == []


@pytest.mark.parametrize(
    ("pattern", "not_meant"),
    [
        ("claude-*", ["claude", "my-claude-x", "aclaude-"]),
        ("a.c", ["abc", "a.cd"]),
        ("[ab]", ["a", "b"]),
        ("a?c", ["abc"]),
        ("fast", ["fastest", "fast:7b"]),
    ],
)
async def test_only_a_star_is_a_pattern(pattern: str, not_meant: list[str]) -> None:
    async with Runner(models=["t"]) as fake, running(fake.url, aliases={pattern: "t"}) as q:
        meant = pattern.replace("*", "x-1")
        assert (await asks(q, CHAT, meant)).status == 200
        for name in not_meant:
            assert (await asks(q, CHAT, name)).status == 404, name
        assert len(fake.requests) == 1


async def test_alias_that_equals_the_name_counts_and_then_the_first_that_fits() -> None:
    aliases = {"claude-opus": "a", "claude-*": "b", "*": "c", "claude-haiku": "a"}
    async with Runner(models=["a", "b", "c"]) as fake, running(fake.url, aliases=aliases) as q:
        for asked, model in (
            ("claude-opus", "a"),
            ("claude-opus-4", "b"),
            ("claude-haiku", "a"),
            ("claude-haiku-4", "b"),
            ("gpt-5", "c"),
        ):
            assert (await asks(q, CHAT, asked)).status == 200
            assert fake.requests[-1].json["model"] == model, asked


@each_dialect
async def test_alias_to_a_model_that_nobody_has_is_unknown(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url, aliases={"ghost-*": "nobody-has"}) as q:
        answer = await asks(q, dialect, "ghost-1")
        assert answer.status == 404
        assert dialect.whole_error(answer)
        assert fake.requests == []


async def test_alias_may_lead_to_a_name_in_another_case() -> None:
    aliases = {"a": "M"}
    async with Runner(models=["m:latest"]) as fake, running(fake.url, aliases=aliases) as q:
        assert (await asks(q, CHAT, "a")).status == 200
        assert fake.requests[-1].json["model"] == "M", "which Ollama takes"


@each_dialect
async def test_ambiguous_name_is_400_and_names_both(dialect: Dialect) -> None:
    async with Runner(models=["Twin", "twin:latest"]) as fake, running(fake.url) as q:
        for name in ("twin", "TWIN:latest"):
            answer = await asks(q, dialect, name)
            assert answer.status == 400
            message = dialect.whole_error(answer)
            assert "Twin" in message
            assert "twin:latest" in message
        for name in ("Twin", "twin:latest"):
            assert (await asks(q, dialect, name)).status == 200
            assert fake.requests[-1].json["model"] == name


async def test_alias_is_good_for_reads_of_one_model() -> None:
    models = ["qwen3-coder:30b", "small"]
    async with Runner(models=models) as fake, running(fake.url, aliases=ALIASES) as q:
        await up(q)
        for headers in ({}, ANTHROPIC):
            answer = await ask(q.port, "GET", "/v1/models/claude-opus", headers=headers)
            assert answer.status == 200
        answer = await ask(q.port, "POST", "/api/show", json={"model": "claude-opus"})
        assert answer.status == 200


async def test_alias_is_one_with_its_model_for_context_and_books() -> None:
    async with Runner(models=["small"]) as fake, running(fake.url, aliases=ALIASES) as q:
        assert (await CHAT.ask(q.port, "a", model="fast", numCtx=8192)).status == 200
        assert (await NATIVE_CHAT.ask(q.port, "a", model="small")).status == 200
        assert fake.loads == [("small", 8192)]


PATHS = ["/models/x.gguf", "org/model-GGUF/q4.gguf", "C:\\models\\x.gguf", "a b/ü"]


@pytest.mark.parametrize("name", PATHS)
async def test_model_whose_name_is_a_path_is_known_on_every_route(name: str) -> None:
    async with Runner(models=[name], kind="llamacpp") as fake, running(fake.url) as q:
        await up(q)
        answer = await ask(q.port, "GET", f"/v1/models/{quote(name, safe='')}")
        assert (answer.status, answer.json()["id"]) == (200, name)
        if not name.startswith("/"):  # an empty segment is none
            answer = await ask(q.port, "GET", f"/v1/models/{quote(name)}")
            assert (answer.status, answer.json()["id"]) == (200, name)
        answer = await ask(q.port, "POST", "/api/show", json={"model": name})
        assert answer.status == 200
        for dialect in (CHAT, NATIVE_CHAT, MESSAGES):
            assert dialect.text(await dialect.ask(q.port, "hi", model=name)) == "hi"


@pytest.mark.parametrize("asked", ["library/m", "registry.ollama.ai/library/m", "Library/M:latest"])
async def test_model_may_be_named_in_full_as_at_ollama(asked: str) -> None:
    async with Runner(models=["m:latest"]) as fake, running(fake.url) as q:
        answer = await NATIVE_CHAT.ask(q.port, "hi", model=asked)
        assert NATIVE_CHAT.text(answer) == "hi"
        assert fake.requests[-1].json["model"] == asked == answer.json()["model"]
    async with Runner(models=["m"], kind="vllm") as fake, running(fake.url) as q:
        answer = await CHAT.ask(q.port, "hi", model=asked)
        assert fake.requests[-1].json["model"] == "m", "vLLM knows it by this name alone"
        assert answer.json()["model"] == asked


@pytest.mark.parametrize("asked", ["qwen3:cloud", "gpt-oss:120b-cloud"])
async def test_cloud_model_goes_to_the_ollama_that_does_not_list_it(asked: str) -> None:
    async with Runner(models=["m"], kind="vllm") as vllm, Runner(models=["n"]) as fake:
        async with running(backends={"v": {"url": vllm.url}, "o": {"url": fake.url}}) as q:
            await up(q)
            answer = await CHAT.ask(q.port, "hi", model=asked)
            assert CHAT.text(answer) == "hi"
            assert fake.requests[-1].json["model"] == asked
            assert vllm.requests == []
    async with Runner(models=["n"]) as fake, running(fake.url, aliases={"qwen*": "n"}) as q:
        await CHAT.ask(q.port, "hi", model="qwen3:cloud")
        assert fake.requests[-1].json["model"] == "n", "an alias goes first"


# ---- Unknown or down -------------------------------------------------------------------------


@each_dialect
async def test_unknown_model_is_404_at_once_in_each_dialect(dialect: Dialect) -> None:
    async with Runner() as fake, running(fake.url) as q:
        for stream in (False, True):
            answer = await dialect.ask(q.port, "x", stream, model="nobody")
            assert (answer.status, answer.clean) == (404, True)
            assert "nobody" in dialect.whole_error(answer)
        assert fake.requests == []


@each_dialect
async def test_known_model_whose_backend_is_down_waits_then_is_503(dialect: Dialect) -> None:
    quick = {"upstream__probe_interval": 0.1, "queue__down_wait": 0.5}
    async with Runner(models=["m"]) as one, Runner(models=["other"]) as two:
        async with running(one.url, two.url, **quick) as q:
            await up(q)
            await one.stop_listening()
            one.drop_connections()
            while (await q.status())["backends"][0]["state"] != "down":
                pass
            answer = await asks(q, dialect, "m")
            assert (answer.status, answer.clean) == (503, True)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert dialect.whole_error(answer)
            if dialect is MESSAGES:
                assert answer.json()["error"]["type"] == "overloaded_error"
            assert two.requests == []


async def test_model_that_a_silent_backend_may_have_is_not_called_unknown() -> None:
    async with Runner(models=["m"]) as fake:
        async with running(fake.url, NOBODY, queue__down_wait=0.3) as q:
            assert (await asks(q, CHAT, "m")).status == 200
            answer = await asks(q, EMBED, "perhaps")
            assert answer.status == 503


@each_dialect
async def test_model_that_was_pulled_just_now_is_found_by_one_fresh_look(dialect: Dialect) -> None:
    async with Runner(models=["m"]) as fake, running(fake.url, upstream__probe_interval=60) as q:
        await up(q)
        fake.models.append("new")
        answer = await asks(q, dialect, "new")
        assert dialect.text(answer) == "hello"


# ---- The front door --------------------------------------------------------------------------


async def test_root_says_that_ollama_is_running_to_programs() -> None:
    async with running(NOBODY) as q, await Raw.open(q.port) as raw:
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            await raw.send(http("GET", "/", accept))
            answer = await raw.response()
            assert (answer.status, answer.body) == (200, b"Ollama is running")
            await raw.send(http("HEAD", "/", accept))
            answer = await raw.response()
            assert (answer.status, answer.body, answer.clean) == (200, b"", True)


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/api/show", "/v1/models"])
async def test_web_pages_may_read(path: str) -> None:
    async with Runner() as fake, running(fake.url) as q:
        await up(q)
        page = {"Origin": "https://chat.example"}
        if path == "/api/show":
            answer = await ask(q.port, "POST", path, json={"model": "m"}, headers=page)
        else:
            answer = await ask(q.port, "GET", path, headers=page)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "*"


async def test_few_questions_beside_the_queue_run_at_once() -> None:
    asked, go = [0], asyncio.Event()

    async def show(request: Any) -> None:
        asked[0] += 1
        await go.wait()
        await request.status(200, {"capabilities": ["completion"], "model_info": {}})

    names = [f"m{number}" for number in range(30)]
    async with Runner(names) as fake, running(fake.url) as q:
        fake._show = show  # type: ignore[method-assign]
        asking = [
            asyncio.ensure_future(ask(q.port, "POST", "/api/show", json={"model": name}))
            for name in names
        ]
        await eventually(lambda: asked[0] == llmq.BESIDE)
        for _ in range(5):
            assert (await ask(q.port, "GET", "/health")).status == 200
        assert asked[0] == llmq.BESIDE
        go.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 30


async def test_what_is_asked_twice_at_a_time_is_asked_once() -> None:
    asked, go = [0], asyncio.Event()

    async def show(request: Any) -> None:
        asked[0] += 1
        await go.wait()
        await request.status(200, {"capabilities": ["completion"], "model_info": {}})

    async with Runner(["m"]) as fake, running(fake.url) as q:
        fake._show = show  # type: ignore[method-assign]
        asking = [
            asyncio.ensure_future(ask(q.port, "POST", "/api/show", json={"model": "m"}))
            for _ in range(20)
        ]
        await eventually(lambda: asked[0])
        for _ in range(5):
            assert (await ask(q.port, "GET", "/health")).status == 200
        go.set()
        assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 20
        assert asked[0] == 1
        await ask(q.port, "POST", "/api/show", json={"model": "m"})
        assert asked[0] == 2


async def test_who_asks_just_when_the_last_asker_leaves_has_an_answer() -> None:
    asked, go = [0], asyncio.Event()

    async def show(request: Any) -> None:
        asked[0] += 1
        await go.wait()
        await request.status(200, {"capabilities": ["completion"]})

    async with Runner(["m"]) as fake, running(fake.url) as q:
        await up(q)
        fake._show = show  # type: ignore[method-assign]
        (backend,) = q.gateway.fleet.backends.values()
        question = functools.partial(q.gateway.monitor.ask, 5, backend, "/api/show", b"{}")

        async def ask_again() -> Any:
            with contextlib.suppress(asyncio.CancelledError):
                await question()
            return await question()  # in the same turn of the loop

        asking = asyncio.ensure_future(ask_again())
        await eventually(lambda: asked[0])
        asking.cancel()
        go.set()
        assert await asking == {"capabilities": ["completion"]}


async def test_context_that_a_runner_does_not_tell_is_asked_for_once() -> None:
    asked = [0]

    async def show(request: Any) -> None:
        asked[0] += 1
        await request.status(500, {"error": "no"})

    async with Runner(["m"], kind="ollama") as fake, running(fake.url) as q:
        fake._show = show  # type: ignore[method-assign]
        body = {"model": "m", "stream": False, "messages": [{"role": "user", "content": "x"}]}
        body["options"] = {"num_ctx": 4096}
        for _ in range(5):
            assert (await ask(q.port, "POST", "/api/chat", json=body)).status == 200
        assert asked[0] == 1


async def test_model_whose_runner_is_down_is_not_made_up() -> None:
    quick = {"upstream__probe_interval": 0.1}
    async with Runner(["m"], kind="ollama") as fake, running(fake.url, **quick) as q:
        await up(q)
        await fake.stop_listening()
        fake.drop_connections()
        await eventually(lambda: not any(b.usable for b in q.gateway.fleet.backends.values()))
        answer = await ask(q.port, "POST", "/api/show", json={"model": "m"})
        assert answer.status == 502
        assert "is down" in answer.json()["error"]


async def test_runner_that_answers_nothing_beside_the_queue_holds_up_no_other() -> None:
    asked, go = [0], asyncio.Event()

    async def show(request: Any) -> None:
        asked[0] += 1
        await go.wait()
        await request.status(200, {"capabilities": ["completion"]})

    names = [f"slow{number}" for number in range(2 * llmq.BESIDE)]
    async with Runner(names) as fake, Runner(["quick"]) as other:
        async with running(fake.url, other.url) as q:
            fake._show = show  # type: ignore[method-assign]
            asking = [
                asyncio.ensure_future(ask(q.port, "POST", "/api/show", json={"model": name}))
                for name in names
            ]
            await eventually(lambda: asked[0] == llmq.BESIDE)
            answer = await ask(q.port, "POST", "/api/show", json={"model": "quick"})
            assert answer.status == 200
            go.set()
            await asyncio.gather(*asking)


@pytest.mark.parametrize("status", [401, 403])
async def test_show_that_the_runner_itself_refuses_is_no_matter_of_a_key(status: int) -> None:
    async def show(request: Any) -> None:
        await request.status(status, {"error": "unauthorized", "signin_url": "https://x"})

    async with Runner(["m"]) as fake, running(fake.url) as q:
        fake._show = show  # type: ignore[method-assign]
        answer = await ask(q.port, "POST", "/api/show", json={"model": "m"})
        assert (answer.status, answer.json()["signin_url"]) == (status, "https://x")


async def test_length_that_is_none_is_no_context() -> None:
    async def show(request: Any) -> None:
        told = {"a.context_length": -5, "b.context_length": True, "c.context_length": "long"}
        await request.status(200, {"model_info": told})

    async with Runner(["m"]) as fake, running(fake.url) as q:
        fake._show = show  # type: ignore[method-assign]
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "numCtx": 4096}
        assert (await ask(q.port, "POST", "/v1/chat/completions", json=body)).status == 200
        assert fake.requests[-1].json["options"]["num_ctx"] == 4096


@pytest.mark.parametrize("route", ["/api/tags", "/api/ps"])
async def test_rows_with_numbers_that_are_none_break_no_list(route: str) -> None:
    odd = b'{"models":[{"name":"m","model":"m","size":NaN,"details":{}},{"name":"n","size":1}]}'
    async with Runner(["m", "n"]) as fake, Runner(["other"]) as other:
        fake.probe_answers[route] = (200, odd)
        async with running(fake.url, other.url) as q:
            await q.gateway.monitor.refresh()
            answer = await ask(q.port, "GET", route)
            assert answer.status == 200
            rows = {row["name"]: row for row in answer.json()["models"]}
            assert rows["m"] == {"name": "m", "model": "m"}
            assert rows["n"]["size"] == 1
