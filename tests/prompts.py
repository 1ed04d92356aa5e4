"""Prompts with the task that each is for, written for llmq by several hands.

`heldout.jsonl` is the half that nobody who made the rules looked at; `tuning.jsonl` is what they
were made from, by `tests/tune.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import NamedTuple

import llmq
from tests.fakes import ROOT

FILLER = "The committee met again on Tuesday and went through the figures of the quarter. "


class Labelled(NamedTuple):
    """A prompt, what it is for, and what else is known of it."""

    task: str
    text: str
    tools: bool = False
    images: bool = False
    fill: int = 0  # characters of filler, where the text says <<FILL>>
    trap: str = ""
    lang: str = "en"

    @property
    def whole(self) -> str:
        filler = FILLER * (self.fill // len(FILLER) + 1)
        return self.text.replace("<<FILL>>", filler[: self.fill])


def read_prompts(name: str) -> list[Labelled]:
    path = ROOT / "tests" / "prompts" / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Labelled(**json.loads(line)) for line in lines]


def classified(prompt: Labelled) -> llmq.Verdict:
    """What llmq takes it for, as it would on its way."""
    messages = [{"role": "user", "content": prompt.whole}]
    tokens = llmq.estimate_tokens({"messages": messages})
    return llmq.classify(prompt.whole, tokens, tools=prompt.tools, images=prompt.images)


def confusion(name: str) -> Counter[tuple[str, str]]:
    """How often each task was taken for each."""
    return Counter((one.task, classified(one).task) for one in read_prompts(name))


def tasks_markdown() -> str:
    """The matrix of the half that was held out, for the README."""
    counts = confusion("heldout")
    lines = [f"| | {' | '.join(f'`{task}`' for task in llmq.TASKS)} | right |"]
    lines.append("|---" * (len(llmq.TASKS) + 2) + "|")
    for asked in llmq.TASKS:
        row = [counts[asked, told] for told in llmq.TASKS]
        right = f"{100 * counts[asked, asked] / sum(row):.0f} %"
        lines.append(f"| `{asked}` | {' | '.join(str(one or '') for one in row)} | {right} |")
    every = sum(counts.values())
    share = 100 * sum(counts[task, task] for task in llmq.TASKS) / every
    return "\n".join([*lines, "", f"Right in all: {share:.1f} % of {every}."])
