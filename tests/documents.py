"""JSON documents made up of known pieces, recorded answers, and all the ways to cut a stream."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import llmq
from llmq import ChunkedBody, body_decoder, parse_response_head, response_length

RECORDINGS = Path(__file__).parent / "real" / "recordings"
RUNS = 400  # documents of a property test

# ---- Documents made up of known pieces -----------------------------------------------------------

CHARS = [
    '"',
    "\\",
    "/",
    "\n",
    "\t",
    "\0",
    "\x7f",
    "é",
    "日",
    "\u2028",
    "🦙",
    "{",
    "]",
    ",",
    ":",
    "a",
]
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "/": "\\/"}
NUMBERS = [
    "0",
    "-0",
    "1",
    "-12",
    "1.5",
    "1e9",
    "1E-7",
    "-0.0e+0",
    "1e999",
    "9" * 40,
    "0.1" + "0" * 30,
]


def white(chance):
    return "".join(chance.choices(" \t\n\r", k=chance.choice([0, 0, 0, 1, 2, 5])))


def string(chance, value=None):
    """A string as some other program might have written it."""
    if value is None:
        value = "".join(chance.choices(CHARS, k=chance.choice([0, 1, 3, 12])))
    if chance.random() < 0.05:
        return '"\\ud83e"'  # half a pair, which JSON allows and Unicode does not
    text = ""
    for char in value:
        code = f"{ord(char):04x}" if ord(char) < 0x10000 else ""
        if code and (chance.random() < 0.2 or (char < " " and char not in ESCAPES)):
            text += "\\u" + chance.choice([code, code.upper()])
        else:
            text += ESCAPES[char] if char in '"\\\n\t' else char
    return f'"{text}"'


def value(chance, depth=0):
    kind = chance.randrange(5 if depth > 3 else 8)
    if kind == 0:
        return chance.choice(["true", "false", "null"])
    if kind in (1, 2):
        return chance.choice(NUMBERS)
    if kind in (3, 4):
        return string(chance)
    if kind == 5:
        return chance.choice(
            ["[]", "{}", "[ ]", "{\n}", "[[],{}]", '{"a":1,"a":2}', '{"model":"x"}']
        )
    inner = []
    for _ in range(chance.randrange(4)):
        name = string(chance, chance.choice(["model", "priority", "a", ""])) + white(chance) + ":"
        inner.append(white(chance) + (name if kind == 6 else "") + value(chance, depth + 1))
    opening, closing = "{}" if kind == 6 else "[]"
    return opening + ",".join(inner) + white(chance) + closing


class Document:
    """A JSON object and, for each of its members, its name and its text."""

    def __init__(self, chance, members):
        self.names = [name for name, _ in members]
        self.members, self.gaps = [], []
        for name, text in members:
            written = '"' + name + '"' if name in llmq.EXTENSIONS else string(chance, name)
            if json.loads(written) != name:
                written = json.dumps(name)
            self.members.append(written + white(chance) + ":" + white(chance) + text)
            self.gaps.append(white(chance) + "," + white(chance))
        self.start = white(chance) + "{" + white(chance)
        self.end = white(chance) + "}" + white(chance)

    @property
    def text(self):
        return self.start + self.joined(range(len(self.members))) + self.end

    def joined(self, places):
        """These members with the gaps that followed them, but for the last."""
        places = list(places)
        text = "".join(self.members[place] + self.gaps[place] for place in places[:-1])
        return text + (self.members[places[-1]] if places else "")

    def without(self, names):
        kept = [place for place, name in enumerate(self.names) if name not in names]
        return self.start + self.joined(kept) + self.end


def strict(text):
    """What the text means to json.loads, which llmq does not use to cut it."""
    return json.loads(text, parse_constant=llmq.refuse_constant)


def documents(seed, *fixed, runs=RUNS):
    """Objects with members of all kinds, and these among them, at any place."""
    chance = random.Random(seed)
    for _ in range(runs):
        others = [f"{chance.choice(CHARS)}{number}" for number in range(chance.randrange(5))]
        members = [(name, value(chance)) for name in others]
        for name, texts in fixed:
            text = chance.choice(texts) if texts else ""
            if text:  # else this one is left out
                members.insert(chance.randint(0, len(members)), (name, text))
        yield Document(chance, members), chance


# ---- Recorded answers ----------------------------------------------------------------------------


def recorded(path):
    """Head and body of a recorded answer."""
    data = path.read_bytes()
    end = data.index(b"\r\n\r\n") + 4
    head = parse_response_head(data[:end])
    body = body_decoder(response_length(head))
    payload = body.feed(data[end:]) if not body.done else b""
    assert not body.surplus
    return head, payload


def recordings(pattern, only=lambda _status: True):
    found = [path for path in sorted(RECORDINGS.glob(pattern)) if only(recorded(path)[0].status)]
    assert found, pattern
    return pytest.mark.parametrize("path", found, ids=[path.name[:-13] for path in found])


def stream_of(path):
    data = path.read_bytes()
    body = ChunkedBody()
    payload = body.feed(data[data.index(b"\r\n\r\n") + 4 :])
    return payload, body.done


def cuts(data, seed=0, most=120):
    """All in one, byte by byte, cut once anywhere, and at random."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    chance = random.Random(seed)
    for _ in range(most):
        places = sorted(chance.sample(range(len(data)), min(len(data), chance.randint(2, 9))))
        edges = [0, *places, len(data)]
        yield [data[start:stop] for start, stop in zip(edges, edges[1:])]
