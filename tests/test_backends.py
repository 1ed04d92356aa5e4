"""Who serves: names of models, health, room, the choice of a backend, what a runner tells."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmq
from llmq import Backend, BackendSettings, Device, Fleet, Report, State, Want

RECORDINGS = Path(__file__).parent / "real" / "recordings"
INTERVAL = 10.0


def report(*models: str, loaded: tuple[str, ...] = (), kind: str = "openai") -> Report:
    return Report(kind, tuple({"id": name} for name in models), models, loaded, 0.001)


def backend(*models: str, slots: int = 0, device: Device | None = None) -> Backend:
    """A backend; one that is up when models are given."""
    settings = BackendSettings(url="http://127.0.0.1:1", slots=slots)
    made = Backend("b", settings, device or Device("d", 1))
    if models:
        made.succeeded(0.0, report(*models), INTERVAL)
    return made


def fleet(**models: tuple[str, ...]) -> Fleet:
    """A fleet of backends that are up with these models, each on its own device of one slot."""
    made = Fleet()
    for name, names in models.items():
        add(made, name, device=f"device of {name}").succeeded(0.0, report(*names), INTERVAL)
    return made


def add(to: Fleet, name: str, *, device: str = "d", slots: int = 0, shared: int = 1) -> Backend:
    return to.add(name, BackendSettings(url=f"http://{name}:1", slots=slots), device, shared)


def recorded(name: str) -> Any:
    """The JSON body of a recorded answer of a real runner."""
    text = (RECORDINGS / f"{name}.response.txt").read_bytes().replace(b"\r\n", b"\n")
    return json.loads(text.partition(b"\n\n")[2])


# ---- Names of models


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("qwen3:4b", "qwen3:4b"),
        ("Qwen3:4B", "qwen3:4b"),
        ("llama3", "llama3:latest"),
        ("LLaMA3", "llama3:Latest"),
        ("hf.co/Org/Model-GGUF", "hf.co/org/model-gguf:latest"),
    ],
)
def test_case_and_latest_make_no_other_model(one: str, other: str) -> None:
    assert llmq.model_key(one) == llmq.model_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("qwen3:4b", "qwen3:8b"),
        ("qwen3", "qwen3:4b"),
        ("qwen3:latest", "qwen3:4b"),
        ("qwen3", "qwen3.5"),
        ("latest", "model:latest"),
        ("a/b", "b"),
        ("qwen3latest", "qwen3"),
    ],
)
def test_a_name_never_reaches_across_tags(one: str, other: str) -> None:
    assert llmq.model_key(one) != llmq.model_key(other)


@pytest.mark.parametrize(
    ("has", "asked", "sent"),
    [
        (["llama3:latest"], "llama3:latest", "llama3:latest"),
        (["llama3:latest"], "llama3", "llama3:latest"),
        (["Qwen3-4B.gguf"], "qwen3-4b.gguf", "Qwen3-4B.gguf"),
        (["llama3"], "LLAMA3:LATEST", "llama3"),
        (["m", "M"], "M", "M"),
        (["m", "M"], "m", "m"),
        (["m:latest", "m"], "m", "m"),
        (["other"], "mine", "mine"),
    ],
)
def test_a_backend_is_asked_in_its_own_spelling(has: list[str], asked: str, sent: str) -> None:
    assert backend(*has).name_for(asked) == sent


def test_a_backend_that_never_told_is_asked_in_the_words_of_the_client() -> None:
    assert backend().name_for("LLama3") == "LLama3"


@pytest.mark.parametrize("asked", ["m:latest", "M:LATEST"])
def test_a_name_that_means_two_models_is_a_bad_request(asked: str) -> None:
    several = fleet(a=("other",), b=("m", "M"))
    with pytest.raises(llmq.BadRequest) as caught:
        several.check_spelling(asked)
    assert caught.value.param == "model"
    assert "m or M" in caught.value.message


@pytest.mark.parametrize("asked", ["m", "M", "other", "OTHER:latest", "nobody's"])
def test_an_exact_or_single_spelling_is_never_ambiguous(asked: str) -> None:
    fleet(a=("other",), b=("m", "M")).check_spelling(asked)


def test_a_model_that_a_runner_lists_twice_is_one_model() -> None:
    fleet(a=("m", "m")).check_spelling("M")


# ---- Health


def test_a_new_backend_is_unknown_and_not_sent_requests() -> None:
    new = backend()
    assert new.state is State.UNKNOWN
    assert not new.usable
    assert new.may_have("anything")


def test_a_report_makes_it_up_and_names_its_models() -> None:
    up = backend()
    up.succeeded(5.0, report("A", "b:latest", loaded=("A",), kind="vllm"), INTERVAL)
    assert up.state is State.UP
    assert up.usable
    assert up.kind == "vllm"
    assert up.error is None
    assert [up.may_have(key) for key in ("a", "b", "c")] == [True, True, False]
    assert [up.is_loaded(key) for key in ("a", "b", "c")] == [True, False, False]
    assert up.next_probe == 5.0 + INTERVAL


def test_each_report_replaces_the_one_before() -> None:
    up = backend("a", "b")
    up.succeeded(1.0, report("b", "c", loaded=("c",)), INTERVAL)
    assert [up.may_have(key) for key in ("a", "b", "c")] == [False, True, True]
    assert up.is_loaded("c")


@pytest.mark.parametrize("refused", [False, True])
def test_the_first_look_that_fails_makes_it_down(refused: bool) -> None:
    new = backend()
    new.failed(3.0, "no answer", INTERVAL, refused=refused)
    assert new.state is State.DOWN
    assert new.since == 3.0
    assert new.error == "no answer"


def test_three_failures_in_a_row_open_the_breaker() -> None:
    up = backend("m")
    for now in (1.0, 2.0):
        up.failed(now, "reset", INTERVAL)
        assert up.usable
        assert up.next_probe <= now, "it is looked at again at once"
    up.failed(3.0, "reset", INTERVAL)
    assert up.state is State.DOWN
    assert not up.usable
    assert up.since == 3.0
    assert up.next_probe > 3.0


def test_a_success_between_failures_starts_the_row_anew() -> None:
    up = backend("m")
    for now in range(20):
        up.failed(now, "reset", INTERVAL)
        up.failed(now, "reset", INTERVAL)
        up.succeeded(now, None, INTERVAL)
        assert up.usable
        assert up.error is None


def test_where_nobody_listens_it_is_down_at_once() -> None:
    up = backend("m")
    up.failed(1.0, "connection refused", INTERVAL, refused=True)
    assert up.state is State.DOWN
    assert up.since == 1.0


@pytest.mark.parametrize("interval", [0.1, 0.5, 3.0, 10.0, 60.0])
def test_a_backend_that_is_down_is_looked_at_later_and_later_up_to_reset_after(
    interval: float,
) -> None:
    down, now, gaps = backend("m"), 100.0, []
    down.configure(replace(down.settings, reset_after=interval), down.limits)
    down.failed(now, "refused", interval, refused=True)
    for _ in range(12):
        gaps.append(down.next_probe - now)
        now = down.next_probe
        down.failed(now, "refused", interval, refused=True)
    assert all(gap > 0 for gap in gaps)
    assert max(gaps) <= interval + 1e-9
    assert gaps[-1] == pytest.approx(interval)
    for gap, longer in zip(gaps, gaps[1:]):
        assert longer == pytest.approx(min(2 * gap, interval))
    assert down.since == 100.0, "it went down once"


def test_a_success_forgets_the_back_off() -> None:
    down = backend("m")
    down.failed(0.0, "refused", INTERVAL, refused=True)
    first = down.next_probe
    for now in range(1, 9):
        down.failed(now, "refused", INTERVAL, refused=True)
    down.succeeded(20.0, report("m"), INTERVAL)
    assert down.state is State.UP
    down.failed(30.0, "refused", INTERVAL, refused=True)
    assert down.next_probe - 30.0 == first
    assert down.since == 30.0


def test_only_a_probe_brings_back_one_that_is_down() -> None:
    down = backend("m")
    down.failed(0.0, "refused", INTERVAL, refused=True)
    down.succeeded(1.0, None, INTERVAL)  # a request that had begun before got through
    assert down.state is State.DOWN
    down.succeeded(2.0, report("m"), INTERVAL)
    assert down.state is State.UP


def test_loading_a_model_is_no_failure() -> None:
    slow = backend("m")
    for now in range(50):
        slow.loads(now, "Loading model")
        assert slow.state is State.LOADING
        assert slow.next_probe == now + 1.0, "probed each second"
    assert not slow.usable
    slow.failed(50.0, "reset", INTERVAL)
    assert slow.state is State.LOADING, "one failure is not three"
    slow.succeeded(51.0, report("m"), INTERVAL)
    assert slow.usable


def test_one_that_was_down_may_load() -> None:
    down = backend("m")
    down.failed(0.0, "refused", INTERVAL, refused=True)
    down.loads(1.0, "Loading model")
    assert down.state is State.LOADING


def test_llmq_itself_is_refused_and_serves_nothing() -> None:
    alone = Fleet()
    mirror = add(alone, "mirror")
    mirror.refuse(1.0, "this is llmq itself", INTERVAL)
    assert mirror.state is State.REFUSED
    assert not mirror.usable
    assert alone.serving(Want("m")) == []
    assert alone.candidates(Want("m")) == []
    mirror.succeeded(20.0, report("m"), INTERVAL)  # another program took its place
    assert alone.candidates(Want("m")) == [mirror]


def test_a_draining_backend_is_given_nothing_new() -> None:
    one = fleet(a=("m",))
    one.backends["a"].draining = True
    assert not one.backends["a"].usable
    assert one.candidates(Want("m")) == []


def test_any_story_of_health_keeps_the_rules() -> None:
    """Random stories against the rules, told once more in the plainest way."""
    rng = random.Random(1)
    for _ in range(300):
        one, row, now = backend(), 0, 0.0
        for _ in range(60):
            now += rng.choice((0.0, 0.1, 3.0))
            before = one.state
            step = rng.choice(("report", "request", "reset", "reset", "refused", "loads"))
            if step == "report":
                one.succeeded(now, report("m"), INTERVAL)
                row, wanted = 0, State.UP
            elif step == "request":
                one.succeeded(now, None, INTERVAL)
                row, wanted = 0, before
            elif step == "loads":
                one.loads(now, "loading")
                wanted = State.LOADING
            else:
                one.failed(now, step, INTERVAL, refused=step == "refused")
                row += 1
                down = step == "refused" or row >= 3 or before in (State.UNKNOWN, State.DOWN)
                wanted = State.DOWN if down else before
            assert one.state is wanted
            assert one.usable == (wanted is State.UP)
            assert one.next_probe <= now + INTERVAL
            if wanted is State.DOWN and before is not State.DOWN:
                assert one.since == now


# ---- Room


@pytest.mark.parametrize(
    ("own", "shared", "busy_here", "busy_device", "most", "room"),
    [
        (0, 1, 0, 0, 1, 1),
        (0, 1, 1, 1, 1, 0),
        (0, 8, 3, 3, 8, 5),
        (2, 8, 0, 0, 2, 2),
        (2, 8, 2, 2, 2, 0),
        (2, 8, 0, 7, 2, 1),
        (2, 8, 0, 8, 2, 0),
        (9, 4, 0, 0, 4, 4),
        (0, 4, 1, 3, 4, 1),
    ],
)
def test_room_is_what_backend_and_device_both_leave(
    own: int, shared: int, busy_here: int, busy_device: int, most: int, room: int
) -> None:
    device = Device("d", shared)
    one = backend("m", slots=own, device=device)
    one.busy, device.busy = busy_here, busy_device
    assert (one.most, one.room()) == (most, room)


def test_a_lower_slot_count_leaves_no_room_and_cuts_nothing() -> None:
    two = Fleet()
    one = add(two, "a", shared=4)
    one.succeeded(0.0, report("m"), INTERVAL)
    one.busy = one.device.busy = 3
    one.device.slots = 2
    assert one.room() <= 0
    assert two.candidates(Want("m")) == []
    assert not two.has_room()
    one.busy = one.device.busy = 1
    assert two.candidates(Want("m")) == [one]
    assert two.has_room()


def test_backends_on_one_device_share_its_slots() -> None:
    both = Fleet()
    first, second = add(both, "a"), add(both, "b")
    for one in (first, second):
        one.succeeded(0.0, report("m"), INTERVAL)
    assert first.device is second.device
    assert both.candidates(Want("m")) == [first, second]
    first.busy = first.device.busy = 1
    assert both.candidates(Want("m")) == []


def test_what_still_runs_on_a_device_counts_after_its_backend_was_replaced() -> None:
    replaced = Fleet()
    old = add(replaced, "a", device="gpu")
    old.succeeded(0.0, report("m"), INTERVAL)
    old.busy = old.device.busy = 1
    replaced.remove("a", 1.0)
    new = add(replaced, "a", device="gpu")
    new.succeeded(2.0, report("m"), INTERVAL)
    assert replaced.candidates(Want("m")) == [], "the device's one slot is still taken"
    old.busy = old.device.busy = 0
    assert replaced.candidates(Want("m")) == [new]


def test_a_device_stays_while_one_of_its_backends_does() -> None:
    both = Fleet()
    add(both, "a", device="gpu")
    kept = add(both, "b", device="gpu")
    both.remove("a", 1.0)
    assert both.devices["gpu"] is kept.device
    both.remove("b", 2.0)
    assert "gpu" not in both.devices
    assert both.backends == {}


def test_a_removed_backend_is_given_nothing_new() -> None:
    both = fleet(a=("m",), b=("m",))
    gone = both.backends["a"]
    both.remove("a", 1.0)
    assert gone.draining
    assert both.candidates(Want("m")) == [both.backends["b"]]


# ---- What it speaks

CHAT, NATIVE_CHAT, RERANK = "/v1/chat/completions", "/api/chat", "/v1/rerank"
COMMON = {CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"}
NATIVE = {NATIVE_CHAT, "/api/generate", "/api/embed", "/api/embeddings"}
ROUTES = (*COMMON, *NATIVE, RERANK, "/v1/messages/count_tokens")
SPOKEN = {
    "ollama": COMMON | NATIVE,
    "lmstudio": COMMON,
    "llamacpp": set(ROUTES) - NATIVE,
    "vllm": set(ROUTES) - NATIVE,
    "openai": set(ROUTES) - NATIVE,
}


def lack(status: int = 404) -> llmq.RouteUnsupported:
    answer = llmq.BackendAnswer(status, "no such route here", b"", None, None)
    return llmq.RouteUnsupported(answer)


def of_kind(kind: str, *models: str, **more: Any) -> Backend:
    """A backend of this kind that is up."""
    made = backend()
    made.succeeded(0.0, Report(kind, (), models or ("m",), (), 0.001, **more), INTERVAL)
    return made


@pytest.mark.parametrize("kind", SPOKEN)
def test_each_kind_speaks_what_its_runners_do(kind: str) -> None:
    one = of_kind(kind)
    assert {route for route in ROUTES if one.supports(route, "m")} == SPOKEN[kind]


def test_every_kind_that_can_be_set_is_tried_here() -> None:
    assert set(llmq.KINDS) == set(SPOKEN)
    assert all(kind.name == name for name, kind in llmq.KINDS.items())
    rows = llmq.known_settings({"backends": BackendSettings})
    (row,) = [row for row in rows if row.key == "backends.kind"]
    assert set(row.choices) == {"", *SPOKEN}


def test_a_backend_that_never_told_may_speak_anything() -> None:
    assert all(backend().supports(route, "m") for route in ROUTES)


def test_a_backend_of_unknown_kind_is_like_one_that_is_only_known_to_have_models() -> None:
    assert backend().kind == ""
    assert backend().traits is of_kind("openai").traits is llmq.KINDS["openai"]


def test_the_first_route_that_it_speaks_is_asked() -> None:
    one = of_kind("llamacpp")
    assert one.route_for((NATIVE_CHAT, CHAT), "m") == CHAT
    assert one.route_for((NATIVE_CHAT,), "m") is None
    assert one.route_for((), "m") is None
    assert of_kind("ollama").route_for((NATIVE_CHAT, CHAT), "m") == NATIVE_CHAT


def test_a_route_that_it_lacks_is_asked_for_no_model() -> None:
    one = of_kind("ollama", "m", "n")
    one.route_unsupported(CHAT, "m", lack(404))
    assert not one.supports(CHAT, "m")
    assert not one.supports(CHAT, "n")
    assert one.supports("/v1/completions", "m")
    assert one.route_for((CHAT, NATIVE_CHAT), "m") == NATIVE_CHAT


def test_a_501_is_about_one_model() -> None:
    one = of_kind("vllm", "m", "n")
    one.route_unsupported(CHAT, "m", lack(501))
    assert not one.supports(CHAT, "m")
    assert one.supports(CHAT, "n")


def test_what_it_lacks_is_forgotten_when_it_comes_back_and_not_before() -> None:
    one = of_kind("vllm")
    one.route_unsupported(CHAT, "m", lack())
    one.succeeded(1.0, report("m"), INTERVAL)
    one.succeeded(2.0, None, INTERVAL)
    assert not one.supports(CHAT, "m")
    one.failed(3.0, "refused", INTERVAL, refused=True)
    assert not one.supports(CHAT, "m")
    one.succeeded(4.0, None, INTERVAL)
    assert not one.supports(CHAT, "m"), "a request is no look"
    one.succeeded(5.0, report("m"), INTERVAL)
    assert one.supports(CHAT, "m")


def test_what_it_lacks_is_tried_again_after_a_minute() -> None:
    one = of_kind("vllm", "m", "n")
    one.route_unsupported(CHAT, "m", lack(404), 100.0)
    one.route_unsupported(RERANK, "n", lack(501), 130.0)
    one.forget_unsupported(159.9)
    assert not one.supports(CHAT, "m")
    assert not one.supports(RERANK, "n")
    one.forget_unsupported(160.0)
    assert one.supports(CHAT, "m")
    one.route_unsupported(CHAT, "m", lack(404), 200.0)
    one.forget_unsupported(259.9)
    assert not one.supports(CHAT, "m"), "a minute each time"
    one.forget_unsupported(260.0)
    assert one.supports(CHAT, "m")


def test_only_backends_that_speak_a_route_serve_and_are_candidates_for_it() -> None:
    both = fleet(a=("m",), b=("m",))
    a, b = both.backends.values()
    a.route_unsupported(CHAT, "m", lack())
    for routes, able in (((CHAT,), [b]), ((CHAT, "/v1/completions"), [a, b]), ((), [a, b])):
        assert both.serving(Want("m", routes)) == able
        assert both.candidates(Want("m", routes)) == able
    assert both.candidates(Want("m", (CHAT,), b)) == [b], "avoided, but alone"
    assert both.candidates(Want("m", (NATIVE_CHAT,), b)) == []


def test_a_route_is_down_when_all_that_speak_it_are() -> None:
    both = fleet(a=("m",), b=("m",))
    a, b = both.backends.values()
    a.route_unsupported(CHAT, "m", lack())
    b.failed(7.0, "refused", INTERVAL, refused=True)
    assert both.down_since(Want("m")) is None
    assert both.down_since(Want("m", (CHAT,))) == 7.0


def test_words_of_a_lack_are_those_of_the_backend_that_was_asked() -> None:
    both = fleet(a=("m",), b=("n",))
    a, b = both.backends.values()
    assert "speaks /v1/rerank" in both.why_unsupported(Want("m", (RERANK,)))
    b.route_unsupported(RERANK, "n", lack())
    assert "speaks /v1/rerank" in both.why_unsupported(Want("m", (RERANK,))), (
        "that one has not the model"
    )
    a.route_unsupported(RERANK, "other", lack(501))
    assert "speaks /v1/rerank" in both.why_unsupported(Want("m", (RERANK,)))
    a.route_unsupported(RERANK, "m", lack(501))
    assert both.why_unsupported(Want("m", (RERANK,))) == "no such route here"
    assert "speaks /v1/chat/completions" in both.why_unsupported(Want("m", (CHAT,)))


# ---- The context that requests share


def ollama(**held: int) -> Backend:
    """An Ollama that has m and n, with these loaded so."""
    made = backend()
    look(made, 0.0, **held)
    return made


def look(one: Backend, began: float, **held: int) -> None:
    """What /api/ps and /api/tags show it now."""
    running = tuple({"name": name, "context_length": tokens} for name, tokens in held.items())
    tags = tuple({"name": name, "details": {"context_length": 65536}} for name in "mn")
    facts = ("ollama", (), ("m", "n"), tuple(held), 0.001, tags, running, began)
    one.succeeded(began, Report(*facts), INTERVAL)


def test_the_context_is_the_largest_that_was_asked_for_and_started() -> None:
    one = ollama()
    assert one.num_ctx("m") == 0
    assert one.contexts.request("m", 0, 0.0) == 0
    assert one.contexts.request("m", 4096, 0.0) == 4096
    assert one.contexts.request("m", 2048, 0.0) == 4096
    assert one.contexts.request("m", 0, 0.0) == 4096
    assert one.contexts.request("m", 8192, 0.0) == 8192
    assert (one.num_ctx("m"), one.num_ctx("n")) == (8192, 0)
    assert one.contexts.shared("m") == 8192


def test_what_it_is_loaded_with_by_its_own_choice_binds_nobody() -> None:
    one = ollama(m=4096)
    assert (one.num_ctx("m"), one.num_ctx("n")) == (0, 0)
    assert one.contexts.request("m", 0, 0.0) == 0
    assert one.contexts.requested == {}


def test_who_asks_for_no_more_than_it_is_loaded_with_gets_just_that_and_leaves_no_mark() -> None:
    one = ollama(m=4096)
    for asked in (1, 2048, 4096):
        assert one.contexts.request("m", asked, 0.0) == 4096
    assert (one.num_ctx("m"), one.contexts.requested) == (0, {})
    assert one.contexts.request("m", 4097, 0.0) == 4097
    assert one.num_ctx("m") == 4097
    assert one.contexts.request("m", 0, 0.0) == 4097


def test_what_was_asked_for_and_is_loaded_with_more_is_sent_as_it_is_loaded() -> None:
    one = ollama()
    one.contexts.request("m", 4096, 0.0)
    look(one, 1.0, m=8192)
    assert one.contexts.request("m", 0, 1.0) == 8192
    assert one.num_ctx("m") == 4096


def test_the_configured_one_is_the_least_but_no_more_than_the_model_can() -> None:
    one = ollama()
    one.contexts.start = 16384
    assert (one.num_ctx("m"), one.contexts.request("n", 1024, 0.0)) == (16384, 16384)
    one.contexts.start = 99999
    assert one.num_ctx("m") == 65536


@pytest.mark.parametrize("kind", ["llamacpp", "vllm", "lmstudio", "openai"])
async def test_other_kinds_have_no_context_to_share(kind: str) -> None:
    one = of_kind(kind)
    one.contexts.start = 4096
    assert one.num_ctx("m") == 0
    client = llmq.Client("c")
    endpoint = llmq.ENDPOINTS[CHAT]
    question, _ = llmq.read_question(b'{"messages":[{}],"numCtx":8192}', endpoint)
    request = llmq.Request("POST", CHAT, 1, {})
    reply: Any = SimpleNamespace(waiter=None)
    call = llmq.Call(reply, endpoint, request, llmq.NOBODY, ("1", "1"))
    call.model, call.question = "m", question
    call.ticket = llmq.Ticket("1", client, Want("m", endpoint.routes), llmq.Priority.NORMAL)
    assert b"8192" not in call.writer(one)()
    assert one.num_ctx("m") == 0
    assert one.contexts.requested == {}


def test_the_context_is_forgotten_when_the_model_is_not_loaded_any_more() -> None:
    one = ollama()
    one.contexts.request("m", 4096, 1.0)
    look(one, 0.5)
    assert one.num_ctx("m") == 4096, "asked after that look had begun"
    one.at_work["m"] = 1
    look(one, 2.0)
    assert one.num_ctx("m") == 4096, "it is about to be loaded"
    one.at_work["m"] = 0
    look(one, 3.0, m=4096)
    assert one.num_ctx("m") == 4096
    look(one, 4.0)
    assert one.num_ctx("m") == 0


def test_work_for_another_model_keeps_nothing() -> None:
    one = ollama()
    one.contexts.request("m", 4096, 1.0)
    one.at_work["n"] = 1
    look(one, 2.0)
    assert one.num_ctx("m") == 0


def test_a_reset_forgets_what_was_asked_for_whatever_is_held() -> None:
    one = ollama(m=4096)
    one.contexts.request("m", 8192, 0.0)
    one.contexts.reset("m")
    assert one.num_ctx("m") == 0
    for number, held in enumerate((4096, 2048, 16384), 1):
        look(one, float(number), m=held)
        assert one.num_ctx("m") == 0
        assert one.contexts.request("m", 0, float(number)) == 0
        assert one.contexts.request("m", 1024, float(number)) == held
    one.contexts.request("m", 32768, 4.0)
    one.contexts.reset("n")
    assert one.num_ctx("m") == 32768, "that was another's"


def test_a_reset_is_over_with_the_next_that_asks() -> None:
    one = ollama(m=4096)
    one.contexts.request("m", 8192, 0.0)
    one.contexts.reset("m")
    look(one, 1.0)
    look(one, 2.0, m=4096)
    assert one.num_ctx("m") == 0
    assert one.contexts.request("m", 8192, 3.0) == 8192
    assert one.num_ctx("m") == 8192


@pytest.mark.parametrize(
    "entry",
    [
        *({}, {"name": "m"}, {"name": "m", "context_length": None}, {"context_length": 4096}),
        *({"name": "m", "context_length": "4096"}, {"name": "m", "context_length": -1}),
        *({"name": "m", "context_length": 0}, {"name": "m", "context_length": [1]}),
    ],
    ids=str,
)
def test_odd_news_of_contexts_are_no_news(entry: dict[str, Any]) -> None:
    assert llmq.read_contexts([entry], lambda one: one.get("context_length")) == {}
    good = {"name": "M:latest", "context_length": 4096}
    assert llmq.read_contexts([entry, good], lambda one: one.get("context_length")) == {"m": 4096}


@pytest.mark.parametrize("details", [None, [], "x", 7, {}, {"context_length": None}], ids=str)
def test_odd_details_of_a_model_are_no_crash(details: Any) -> None:
    one = backend()
    tags = ({"name": "m", "details": details}, {"name": "n"}, {"details": {"context_length": 1}})
    one.succeeded(0.0, Report("ollama", (), ("m",), (), 0.001, tags, ({"name": "m"},)), INTERVAL)
    assert (one.contexts.max, one.contexts.loaded) == ({}, {})


def test_the_context_of_a_recorded_ollama_is_read() -> None:
    rows = recorded("ollama.api-ps")["models"]
    held = llmq.read_contexts(rows, lambda one: one.get("context_length"))
    assert held == {"counter": rows[0]["context_length"]}


# ---- The choice


def choose(last: str = "", **facts: tuple[bool, int, float]) -> str | None:
    """The name of the picked backend among those with (loaded, room, turn).

    `last` is the one that served the conversation before.
    """
    options = {}
    for name, (loaded, room, turn) in facts.items():
        one = backend("m", device=Device(name, 8))
        one.name, one.turn, one.busy = name, turn, 8 - room
        one.device.busy = one.busy
        one.succeeded(0.0, report("m", loaded=("m",) if loaded else ()), INTERVAL)
        options[name] = one
    picked = llmq.pick_backend(list(options.values()), "m", options.get(last))
    return picked.name if picked else None


def test_there_may_be_none() -> None:
    assert choose() is None


def test_one_that_has_the_model_loaded_goes_before_all() -> None:
    assert choose(empty=(False, 8, 0.0), warm=(True, 1, 99.0)) == "warm"
    assert choose("empty", empty=(False, 8, 0.0), warm=(True, 1, 99.0)) == "warm"


def test_then_the_one_that_served_the_conversation_last() -> None:
    assert choose("same", free=(True, 5, 0.0), same=(True, 1, 9.0)) == "same"
    assert choose("same", free=(False, 5, 0.0), same=(False, 1, 9.0)) == "same"


def test_then_the_one_with_most_room() -> None:
    assert choose(full=(True, 1, 0.0), free=(True, 5, 99.0), cold=(False, 8, 0.0)) == "free"


def test_then_the_one_whose_turn_it_is() -> None:
    assert choose(late=(True, 3, 20.0), early=(True, 3, 10.0), less=(True, 2, 1.0)) == "early"


def test_any_choice_keeps_the_order_of_the_rules() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        facts = {
            f"b{number}": (rng.random() < 0.4, rng.randint(1, 4), float(number * 7 % 5))
            for number in range(rng.randint(1, 5))
        }
        last = rng.choice(("", "b0", "b3", "gone"))
        name = choose(last, **facts) or ""
        loaded, room, turn = facts[name]
        for each, other in facts.items():
            assert loaded or not other[0]
            if loaded == other[0]:
                assert each != last or name == last
                if name != last:
                    assert room >= other[1]
                    assert room > other[1] or turn <= other[2]


def run_one(at: Fleet, client: str = "c", session: str = "") -> str:
    """Where a request goes that ends at once."""
    ticket = llmq.Ticket("t", llmq.Client(client), Want("m"), llmq.Priority.NORMAL)
    ticket.session = session
    picked = llmq.pick_backend(at.candidates(ticket.want), "m", at.served_last(ticket))
    assert picked is not None
    at.starts(ticket, picked, 0.0)
    at.ends(ticket, picked)
    return picked.name


def test_equal_backends_take_turns_by_their_weight() -> None:
    three = fleet(a=("m",), b=("m",), c=("m",))
    three.backends["b"].weight = 3.0
    turns = [run_one(three) for _ in range(500)]
    assert [turns.count(name) for name in "abc"] == [100, 300, 100]


def test_a_backend_that_comes_late_has_no_turns_to_make_up_for() -> None:
    both = fleet(a=("m",), b=("m",))
    for _ in range(100):
        run_one(both)
    add(both, "late", device="late").succeeded(0.0, report("m"), INTERVAL)
    turns = [run_one(both) for _ in range(30)]
    assert 10 <= turns.count("late") <= 11


def test_a_conversation_goes_back_to_where_its_prompt_is_cached() -> None:
    both = fleet(a=("m",), b=("m",))
    where = run_one(both, session="s")
    assert {run_one(both), run_one(both)} == {"a", "b"}, "others take turns"
    assert [run_one(both, session="s") for _ in range(5)] == [where] * 5
    other = run_one(both, "d", session="s")
    assert both.sessions["d", "s"].name == other, "another's conversation of that name is its own"


def test_a_thousand_conversations_are_remembered_and_no_more() -> None:
    both = fleet(a=("m",), b=("m",))
    for number in range(1100):
        run_one(both, session=f"s{number}")
        run_one(both, session="the first, still going on")
    assert len(both.sessions) == 1000
    assert ("c", "the first, still going on") in both.sessions
    assert ("c", "s0") not in both.sessions


def test_a_request_may_want_one_backend_only() -> None:
    both = fleet(a=("m",), b=("m",))
    assert both.candidates(Want("m", backend="b")) == [both.backends["b"]]
    assert both.candidates(Want("m", (), both.backends["b"], "b")) == [both.backends["b"]]
    assert both.candidates(Want("m", backend="no such")) == []


def test_a_model_may_be_asked_for_at_some_backends_only() -> None:
    both = fleet(a=("m", "n"), b=("m", "n"))
    both.model_settings = {"m": llmq.ModelSettings(backends=("b",))}
    assert both.candidates(Want("m")) == [both.backends["b"]]
    assert both.candidates(Want("n")) == [*both.backends.values()]


@pytest.mark.parametrize(
    ("key", "of_all", "of_one"),
    [
        ("exclusive", True, False),
        ("max_concurrent", 1, 0),
        ("max_output", 5, 0),
        ("preload", True, False),
        ("keep_alive_force", True, False),
        ("overflow", "refuse", "pass"),
        ("class", "low", "normal"),
    ],
)
def test_the_most_exact_row_that_says_a_thing_counts_also_if_it_says_the_usual(
    key: str, of_all: Any, of_one: Any
) -> None:
    """`"*"` for all, and one that is an exception."""
    values = {"models": {"*": {key: of_all}, "m": {key: of_one}}}
    rows = llmq.merge_layers([("file", values)]).models
    found = llmq.policy_of(rows, "m"), llmq.policy_of(rows, "n")
    name = "class_" if key == "class" else key
    assert [getattr(one, name) for one in found] == [of_one, of_all]


# ---- Models that are loaded when they are asked for


def on_demand(*models: str, loaded: tuple[str, ...] = (), slots: int = 4) -> tuple[Fleet, Backend]:
    made = Fleet()
    one = add(made, "a", shared=slots)
    one.succeeded(0.0, report(*models, loaded=loaded, kind="ollama"), INTERVAL)
    return made, one


def begin(at: Fleet, one: Backend, model: str = "m", now: float = 1.0) -> llmq.Ticket:
    ticket = llmq.Ticket("t", llmq.Client("c"), Want(model), llmq.Priority.NORMAL)
    at.starts(ticket, one, now)
    return ticket


def test_one_request_loads_the_model_and_the_others_wait_for_it() -> None:
    made, one = on_demand("m", "n", loaded=("n",))
    first = begin(made, one)
    assert made.candidates(Want("m")) == []
    assert one.is_loaded("m"), "it is about to be"
    one.loaded_now("m", 4.0)
    assert made.candidates(Want("m")) == [one]
    assert one.load_seconds.value == 3.0
    made.ends(first, one)
    assert one.is_loaded("m")


def test_whole_answer_does_not_tell_how_long_its_load_took() -> None:
    made, one = on_demand("m", "n", loaded=("n",))
    first = begin(made, one)
    assert one.loaded_now("m", 60.0, whole=True)
    assert one.load_seconds.value is None
    assert one.load_of(first) == 0.0


def test_a_request_that_ended_without_a_byte_has_loaded_nothing() -> None:
    made, one = on_demand("m")
    first = begin(made, one)
    made.ends(first, one)
    assert made.candidates(Want("m")) == [one]
    assert not one.is_loaded("m")
    assert one.load_seconds.value is None


@pytest.mark.parametrize(("began", "loaded"), [(0.5, ()), (2.0, ("m",))], ids=["before", "after"])
def test_a_look_at_what_is_loaded_counts_if_it_began_after_the_load(
    began: float, loaded: tuple[str, ...]
) -> None:
    made, one = on_demand("m", "n", loaded=("n",))
    begin(made, one)
    news = dataclasses.replace(report("m", "n", loaded=("n", *loaded), kind="ollama"), began=began)
    one.succeeded(3.0, news, INTERVAL)
    assert one.is_loaded("m")
    assert made.candidates(Want("m")) == ([one] if loaded else [])
    assert one.is_loaded("n") == bool(loaded)


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_what_loads_nothing_by_itself_lets_all_start(kind: str) -> None:
    made = Fleet()
    one = add(made, "a", shared=4)
    one.succeeded(0.0, report("m", kind=kind), INTERVAL)
    begin(made, one)
    assert made.candidates(Want("m")) == [one]
    assert one.loading == {}


# ---- What takes a whole device


def test_what_bears_nothing_beside_it_waits_until_its_device_is_empty() -> None:
    made, one = on_demand("m", "n", loaded=("m", "n"))
    made.model_settings = {"m": llmq.ModelSettings(exclusive=True)}
    other = begin(made, one, "n")
    assert made.candidates(Want("m")) == []
    made.ends(other, one)
    alone = begin(made, one, "m")
    assert made.candidates(Want("n")) == made.candidates(Want("m")) == []
    made.ends(alone, one)
    assert made.candidates(Want("n")) == [one]


def test_a_device_is_free_again_though_what_took_it_whole_was_moved_to_another() -> None:
    """By a reload that names another device for the backend while it runs."""
    made = fleet(a=("m",))
    made.model_settings = {"m": llmq.ModelSettings(exclusive=True)}
    a, old = made.backends["a"], made.backends["a"].device
    ticket = begin(made, a)
    made.move(a, made.device_of("new", 2))
    assert (old.room(), a.device.room()) == (1, 0), "it has the other one for itself now"
    made.ends(ticket, a)
    assert (old.room(), a.device.room()) == (1, 2)


def test_a_cap_under_a_pattern_is_none_for_leases() -> None:
    """A lease is of a device, whatever model; `*` means every model, each by itself."""
    both = fleet(a=("m",), b=("n",))
    both.model_settings = {"*": llmq.ModelSettings(max_concurrent=1)}
    first, second = (Want("", device=f"device of {name}") for name in "ab")
    (lessor,) = both.candidates(first)
    ticket = llmq.Ticket("t", llmq.Client("c"), first, llmq.Priority.NORMAL)
    both.starts(ticket, lessor, 0.0)
    assert both.candidates(first) == []
    assert len(both.candidates(second)) == 1


def test_candidates_are_up_have_the_model_and_room() -> None:
    several = fleet(up=("m",), other=("x",), busy=("m",), down=("m",), loading=("m",))
    add(several, "unknown", device="u")
    several.backends["busy"].busy = several.backends["busy"].device.busy = 1
    several.backends["down"].failed(1.0, "refused", INTERVAL, refused=True)
    several.backends["loading"].loads(1.0, "loading")
    assert [one.name for one in several.candidates(Want("m"))] == ["up"]


def test_the_backend_that_failed_is_avoided_unless_it_is_alone() -> None:
    both = fleet(a=("m",), b=("m",))
    a, b = both.backends.values()
    assert both.candidates(Want("m", (), a)) == [b]
    b.failed(1.0, "refused", INTERVAL, refused=True)
    assert both.candidates(Want("m", (), a)) == [a]


# ---- What is known of models


def test_a_model_is_known_when_any_backend_has_it() -> None:
    both = fleet(a=("x",), b=("M:latest",))
    assert both.knows("m") is True
    both.backends["b"].failed(1.0, "refused", INTERVAL, refused=True)
    assert both.knows("m") is True, "down, but known"


def test_a_model_is_unknown_only_when_every_backend_has_told() -> None:
    both = fleet(a=("x",))
    late = add(both, "late")
    assert both.knows("m") is None
    late.failed(1.0, "refused", INTERVAL, refused=True)
    assert both.knows("m") is None, "it may have it, once it comes up"
    late.succeeded(2.0, report("y"), INTERVAL)
    assert both.knows("m") is False
    late.succeeded(3.0, report("y", "m"), INTERVAL)
    assert both.knows("m") is True


def test_without_a_backend_nothing_is_known() -> None:
    assert Fleet().knows("m") is None


def test_llmq_itself_knows_no_models() -> None:
    both = fleet(a=("x",))
    add(both, "mirror").refuse(0.0, "this is llmq itself", INTERVAL)
    assert both.knows("m") is False


def test_a_model_is_down_since_its_last_backend_went_down() -> None:
    both = fleet(a=("m",), b=("m",), other=("x",))
    assert both.down_since(Want("m")) is None
    both.backends["a"].failed(5.0, "refused", INTERVAL, refused=True)
    assert both.down_since(Want("m")) is None
    both.backends["b"].failed(7.0, "refused", INTERVAL, refused=True)
    assert both.down_since(Want("m")) == 7.0
    both.backends["a"].failed(9.0, "refused", INTERVAL, refused=True)
    assert both.down_since(Want("m")) == 7.0, "it was down already"
    assert both.down_since(Want("x")) is None
    both.backends["a"].loads(11.0, "loading")
    assert both.down_since(Want("m")) is None, "one that loads is on its way"


def test_a_backend_that_was_never_asked_is_not_down() -> None:
    both = fleet(a=("m",))
    both.backends["a"].failed(5.0, "refused", INTERVAL, refused=True)
    add(both, "new")
    assert both.down_since(Want("m")) is None


def test_a_model_is_down_since_its_last_backend_was_removed() -> None:
    alone = fleet(a=("m",))
    alone.remove("a", 30.0)
    assert alone.down_since(Want("m")) == 30.0


def test_a_removed_backend_counts_like_one_that_went_down_last() -> None:
    both = fleet(a=("m",), b=("m",))
    both.backends["a"].failed(5.0, "refused", INTERVAL, refused=True)
    both.remove("b", 30.0)
    assert both.down_since(Want("m")) == 30.0


@pytest.mark.parametrize(
    ("backends", "model"),
    [
        ({"a": ("llama3:latest", "qwen3:4b")}, "llama3:latest"),
        ({"a": ("nomic-embed-text", "qwen3:4b")}, "qwen3:4b"),
        ({"a": ("bge-m3", "all-minilm"), "b": ("mxbai-embed-large", "phi4")}, "phi4"),
        ({"a": ("nomic-embed-text",)}, None),
        ({"a": ()}, None),
        ({}, None),
    ],
)
def test_the_default_model_is_the_first_that_is_not_for_embeddings(
    backends: dict[str, tuple[str, ...]], model: str | None
) -> None:
    assert fleet(**backends).default_model() == model


def test_a_backend_that_never_told_has_no_default_model() -> None:
    both = Fleet()
    add(both, "silent")
    add(both, "b").succeeded(0.0, report("m"), INTERVAL)
    assert both.default_model() == "m"


# ---- What runners tell


@pytest.mark.parametrize(
    ("recording", "models", "kind"),
    [
        ("ollama.models", ["counter:latest", "slow:latest"], ""),
        ("llama-server.models", ["counter"], "llamacpp"),
        ("llama-cpp-python.models", ["counter"], ""),
        ("vllm.models", ["counter"], "vllm"),
    ],
)
def test_the_models_of_real_runners_are_read(recording: str, models: list[str], kind: str) -> None:
    entries = llmq.read_models(recorded(recording))
    assert [one["id"] for one in entries] == models
    assert llmq.kind_by_owner(entries) == kind


def test_an_ollama_without_a_model_is_no_mistake() -> None:
    assert llmq.read_models({"object": "list", "data": None}) == ()
    assert llmq.read_models({"object": "list", "data": []}) == ()
    assert llmq.kind_by_owner(()) == ""


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "models",
        3,
        {},
        {"data": {}},
        {"data": "m"},
        {"data": [1]},
        {"data": ["m"]},
        {"data": [None]},
        {"data": [{}]},
        {"data": [{"name": "m"}]},
        {"data": [{"id": "m"}, {"name": "n"}]},
        {"error": {"message": "no"}},
        {"models": [{"name": "m"}]},
    ],
)
def test_what_is_no_list_of_models_is_told_so(payload: object) -> None:
    with pytest.raises(ValueError, match="models"):
        llmq.read_models(payload)


@pytest.mark.parametrize("recording", ["llama-server.err-404", "vllm.err-404", "ollama.api-tags"])
def test_other_answers_of_real_runners_are_no_list_of_models(recording: str) -> None:
    with pytest.raises(ValueError, match="models"):
        llmq.read_models(recorded(recording))


@pytest.mark.parametrize("owner", [None, 1, "", [], ["vllm"], {}, {"name": "vllm"}, "somebody"])
def test_an_odd_owner_gives_no_kind_away(owner: object) -> None:
    entries = llmq.read_models({"data": [{"id": "m", "owned_by": owner}]})
    assert llmq.kind_by_owner(entries) == ""


def test_the_loaded_models_of_a_real_ollama_are_read() -> None:
    assert llmq.read_loaded("ollama", recorded("ollama.api-ps")) == ("counter:latest",)


def test_lm_studio_tells_the_state_of_each_model() -> None:
    payload = {"data": [{"id": "a", "state": "loaded"}, {"id": "b", "state": "not-loaded"}]}
    assert llmq.read_loaded("lmstudio", payload) == ("a",)


@pytest.mark.parametrize("kind", ["llamacpp", "vllm", "openai"])
def test_other_runners_have_loaded_what_they_list(kind: str) -> None:
    assert llmq.read_loaded(kind, {"data": [{"id": "a"}, {"id": "b"}]}) == ("a", "b")


def test_router_mode_tells_of_each_model_whether_it_is_loaded() -> None:
    states = ("unloaded", "loaded", "loading", "failed")
    rows = [{"id": state, "status": {"value": state, "args": []}} for state in states]
    assert llmq.read_loaded("llamacpp", {"data": rows}) == ("loaded",)


@pytest.mark.parametrize("name", ["x", "X:latest", "library/x", "registry.ollama.ai/library/x"])
def test_names_mean_the_same_model_as_ollama_has_it(name: str) -> None:
    assert llmq.model_key(name) == "x"


@pytest.mark.parametrize("name", ["x:7b", "me/x", "hf.co/library/x", "/models/x.gguf", "x/library"])
def test_names_of_other_models_mean_others(name: str) -> None:
    assert llmq.model_key(name) == name


@pytest.mark.parametrize("name", ["x:cloud", "x:120b-cloud", "x-cloud"])
def test_cloud_models_are_an_ollamas_though_it_lists_them_not(name: str) -> None:
    box = fleet_of("ollama", "vllm")
    assert box.knows(name) is True
    assert not box.lists(name)
    want = Want(llmq.model_key(name))
    assert [one.kind for one in box.serving(want)] == ["ollama"]
    assert [one.kind for one in box.candidates(want)] == ["ollama"]
    assert box.startable_models([want.model, "other"]) == {want.model}
    assert fleet_of("vllm").knows(name) is False


def fleet_of(*kinds: str) -> Fleet:
    """A backend of each of these kinds, with no models."""
    fleet = Fleet()
    for kind in kinds:
        settings = llmq.BackendSettings(url=f"http://{kind}:1", kind=kind)
        report = llmq.Report(kind, (), (), (), 0.0)
        fleet.add(kind, settings, kind, 1).succeeded(0.0, report, 10.0)
    return fleet


@pytest.mark.parametrize("kind", ["ollama", "lmstudio"])
@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "x",
        3,
        {},
        {"models": None, "data": None},
        {"models": 5, "data": 5},
        {"models": [1], "data": [1]},
        {"models": [None], "data": [None]},
        {"models": ["m"], "data": ["m"]},
        {"models": [{}], "data": [{"state": "loaded"}]},
        {"models": [[]], "data": [[]]},
    ],
)
def test_odd_news_of_loaded_models_is_no_news(kind: str, payload: object) -> None:
    assert llmq.read_loaded(kind, payload) == ()


def test_a_runners_words_forge_no_line_and_are_not_endless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "llmq")
    one = backend("m")
    for end in (one.loads, one.failed):
        more = () if end == one.loads else (5.0,)
        end(0.0, "loading\n2026-01-01 INFO forged\x1b[2J" + "x" * 100_000, *more)
        assert one.error is not None
        assert one.error.isprintable()
        assert len(one.error) <= llmq.ERROR_SHOWN
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize(
    "odd",
    [
        {"created": 10**400},
        {"created": float("nan")},
        {"created": -1},
        {"created": 1_700_000_000_000_000_000},
        {"id": float("nan")},
        {"size": float("inf")},
    ],
)
def test_a_model_whose_numbers_are_none_is_known_by_its_name_only(odd: dict[str, Any]) -> None:
    good = {"id": "good", "created": 1_700_000_000, "owned_by": "x"}
    others = [good, {"id": "n", "created": None}, {"id": "t", "created": "2026-11-30"}]
    entries = llmq.read_models({"data": [{"id": "m", **odd}, *others]})
    assert entries == ({"id": str(odd.get("id", "m"))}, *others)
    assert llmq.render_json(entries)


def test_a_look_that_began_before_a_change_tells_nothing_of_it() -> None:
    one = backend("m")
    one.needs_probe, one.changed = True, 50.0
    one.succeeded(60.0, dataclasses.replace(report("m"), began=40.0), 10.0)
    assert one.needs_probe
    assert one.next_probe == 60.0, "it is looked at once more"
    one.succeeded(61.0, dataclasses.replace(report("m"), began=60.0), 10.0)
    assert not one.needs_probe
    assert one.next_probe == 71.0
