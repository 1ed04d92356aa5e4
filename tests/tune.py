"""Make the table of weights of section Tasks anew from tests/prompts/tuning.jsonl, and print it.

    pip install scikit-learn; python3 -m tests.tune

A multinomial logistic regression over the cues that llmq reads from a prompt; its coefficients,
ten times and rounded, are the weights.  Rows that say next to nothing are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import llmq
from tests.prompts import Labelled, read_prompts

PAIRS = (  # cues that may mean more together than alone
    "code why", "code my", "code not", "code nt", "code works", "code asks", "soft fault",
    "code fault", "soft why", "soft my", "listing asks", "listing why", "listing my",
    "listing fault", "listing make", "listing port", "listing judge", "listing fix",
    "error listing", "hi few", "asks few", "few nothing", "tools code", "tools listing",
    "tools few", "tools some", "quoted or", "lines or", "soft make", "soft judge", "soft fix",
    "life soft", "life code", "prose make", "no make", "soft explain", "code explain",
    "code ask", "soft ask", "think code", "think listing", "lines sort",
)  # fmt: skip
LEAST = 2  # a row without a weight of this size is left out


def cues_of(prompt: Labelled) -> dict[str, int]:
    """The cues of a prompt, all pairs among them."""
    seen = llmq.read_cues(prompt.whole, tools=prompt.tools, images=prompt.images)
    pairs = [pair for pair in PAIRS if set(pair.split()) <= seen.keys()]
    return dict.fromkeys([*[cue for cue in seen if cue not in llmq.PAIRED], *pairs], 1)


def fit(prompts: list[Labelled], strength: float = 0.5) -> tuple[list[int], dict[str, list[int]]]:
    """The bias and the weights, for each of llmq.TASKS in their order."""
    vectors: Any = __import__("sklearn.feature_extraction", fromlist=["DictVectorizer"])
    linear: Any = __import__("sklearn.linear_model", fromlist=["LogisticRegression"])
    short = [one for one in prompts if len(one.whole.encode()) // 4 <= llmq.LARGE_CONTEXT]
    vectorizer = vectors.DictVectorizer()
    rows = vectorizer.fit_transform([cues_of(one) for one in short])
    model = linear.LogisticRegression(C=strength, max_iter=3000).fit(
        rows, [one.task for one in short]
    )
    order = [list(model.classes_).index(task) for task in llmq.TASKS]
    names = vectorizer.get_feature_names_out()
    weights = {
        str(name): [round(10 * model.coef_[at][column]) for at in order]
        for column, name in enumerate(names)
    }
    kept = {name: row for name, row in weights.items() if max(map(abs, row)) >= LEAST}
    return [round(10 * model.intercept_[at]) for at in order], kept


def group_of(cue: str) -> int:
    if cue.startswith("first "):
        return 3
    return 2 if " " in cue else int(cue in llmq.CUES)


def render(bias: list[int], weights: dict[str, list[int]]) -> Iterator[str]:
    """The lines of the table, as they stand in llmq.py."""
    titles = (
        "what is there",
        "kinds of words",
        "two that mean more together",
        "the first of ORDERS",
    )
    yield f"BIAS = ({', '.join(map(str, bias))})"
    yield "WEIGHTS = {  # what speaks for and against each of TASKS, in its order"
    for number, title in enumerate(titles):
        yield f"    # {title}"
        rows = [one for one in weights.items() if group_of(one[0]) == number]
        for name, row in sorted(rows, key=lambda one: -max(one[1])):
            yield f'    "{name}": ({", ".join(f"{one:3}" for one in row)}),'
    yield "}  # fmt: skip"


def main() -> None:
    prompts = read_prompts("tuning")
    print(f"# from {len(prompts)} prompts: {dict(Counter(one.task for one in prompts))}")  # noqa: T201
    print("\n".join(render(*fit(prompts))))  # noqa: T201


if __name__ == "__main__":
    main()
