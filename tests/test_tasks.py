"""What a prompt asks for: the same each time, told from what is said, not from what is pasted."""

from __future__ import annotations

import random
from collections import Counter

import pytest

import llmq
from tests.prompts import classified, confusion, read_prompts

# ---- the prompts


@pytest.mark.parametrize("name", ["heldout", "tuning"])
def test_prompts_are_many_of_each_task_in_many_languages_and_full_of_traps(name: str) -> None:
    prompts = read_prompts(name)
    tasks, languages = (Counter(getattr(one, fact) for one in prompts) for fact in ("task", "lang"))
    assert set(tasks) == set(llmq.TASKS)
    assert min(tasks.values()) >= 20
    assert len(prompts) >= 200
    assert all(languages[lang] >= 18 for lang in ("en", "de", "fr", "es", "zh"))
    assert sum(bool(one.trap) for one in prompts) >= 60
    assert len({one.text for one in prompts}) == len(prompts)


def test_no_prompt_is_in_both_halves() -> None:
    halves = [
        {one.text.strip().lower() for one in read_prompts(name)} for name in ("heldout", "tuning")
    ]
    assert not halves[0] & halves[1]


LEAST = 0.80  # of the half that was held out
LEAST_OF_TASK = 0.60


def test_the_half_that_nobody_looked_at_is_told_as_well_as_the_readme_says() -> None:
    counts = confusion("heldout")
    right = {task: counts[task, task] for task in llmq.TASKS}
    asked = {task: sum(counts[task, told] for told in llmq.TASKS) for task in llmq.TASKS}
    assert sum(right.values()) / sum(asked.values()) >= LEAST
    assert min(right[task] / asked[task] for task in llmq.TASKS) >= LEAST_OF_TASK


def test_the_half_that_the_table_was_made_from_is_nearly_all_told() -> None:
    counts = confusion("tuning")
    assert sum(counts[task, task] for task in llmq.TASKS) / sum(counts.values()) >= 0.95


# ---- the rules


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("summarize this article in three sentences:", "summarize"),
        ("Schreib mir eine Python-Funktion, die Primzahlen zählt", "code_generate"),
        (
            "Peux-tu relire ce code et me donner ton avis ?\n```\ndef f(x): return x\n```",
            "code_review",
        ),
        ("mi script falla con un error: KeyError: 'id'", "code_fix"),
        ("hello, how are you?", "simple_chat"),
        ("", "unknown"),
        ("   \n\n", "unknown"),
        ("42", "unknown"),
    ],
)
def test_plain_prompts_are_what_anybody_would_say(text: str, task: str) -> None:
    assert llmq.classify(text).task == task


@pytest.mark.parametrize(
    ("text", "not_this"),
    [
        ("Where can I buy a stool?", "tool_use"),
        ("The prefix of the suffix is odd", "code_fix"),
        ("Don't write any code, just tell me what a mutex is.", "code_generate"),
        ("no summary please, only a poem about rain", "summarize"),
    ],
)
def test_words_inside_words_and_what_is_denied_do_not_count(text: str, not_this: str) -> None:
    assert llmq.classify(text).task != not_this


def test_what_is_longer_than_a_large_context_is_that() -> None:
    assert llmq.classify("hi", llmq.LARGE_CONTEXT + 1).task == "large_context"
    assert llmq.classify("hi", llmq.LARGE_CONTEXT).task == "simple_chat"


def test_the_same_prompt_is_always_the_same_task() -> None:
    prompts = read_prompts("heldout")
    told = [classified(one) for one in prompts]
    shuffled = list(enumerate(prompts))
    random.Random(5).shuffle(shuffled)
    llmq.look_up_word.cache_clear()
    assert all(classified(one) == told[at] for at, one in shuffled)


def test_tools_and_pictures_are_seen() -> None:
    asked = "what is the weather in Oslo now?"
    assert llmq.classify(asked, tools=True).task == "tool_use"
    assert llmq.classify(asked).task != "tool_use"
    assert "a picture" in llmq.read_cues("look", tools=False, images=True).values()


# ---- the reason


def test_reasons_are_short_plain_and_never_what_was_pasted() -> None:
    for one in read_prompts("heldout"):
        reason = classified(one).reason
        assert 0 < len(reason) <= 200
        assert reason.isprintable()
    secret = "hunter2secret"
    told = llmq.classify(f"please review\n```\npassword = '{secret}'\n```\nand \"{secret}\"")
    assert secret not in told.reason


def test_the_reason_names_the_words_that_spoke_for_it() -> None:
    assert '"summarize"' in llmq.classify("summarize the minutes of the meeting").reason
    assert "code in it" in llmq.classify("review this\n```\nx = {}\n```").reason


# ---- bounds


@pytest.mark.parametrize("sign", ["a", "`", '"', "\n", "不", "a: ", "([", "“", "> ", "é"])
def test_of_a_huge_prompt_only_the_ends_are_looked_at(sign: str) -> None:
    huge = sign * (2_000_000 // len(sign))
    inner = f"{huge[: llmq.READ]}{'x' * 1_000_000}{huge[-llmq.READ :]}"
    outer = f"{huge[: llmq.READ]}{huge[-llmq.READ :]}"
    assert llmq.classify(inner) == llmq.classify(outer)
    assert llmq.classify(huge).task in llmq.TASKS


def test_every_cue_of_the_table_can_be_met_and_has_a_weight_for_each_task() -> None:
    met = {cue for name in ("heldout", "tuning") for one in read_prompts(name)
           for cue in llmq.read_cues(one.whole, tools=one.tools, images=one.images)}  # fmt: skip
    assert set(llmq.WEIGHTS) <= met
    assert {len(row) for row in (*llmq.WEIGHTS.values(), llmq.BIAS)} == {len(llmq.TASKS)}


def test_words_are_plain_as_what_is_looked_up() -> None:
    for kind, text in llmq.CUES.items():
        for cue in text.split():
            assert cue == cue.lower().translate(llmq.PLAIN), (kind, cue)
