"""Small helpers: what they take, what they refuse, and that nothing odd gets through them."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from coverage import CoverageData

import llmq
from llmq import Average, parse_duration, parse_size, printable, render_json
from tests.__main__ import never_written


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300", 300.0),
        ("0", 0.0),
        ("1.5s", 1.5),
        ("2m", 120.0),
        ("90000ms", 90.0),
        ("1h", 3600.0),
        ("2d", 172800.0),
        (" 10 s ", 10.0),
    ],
)
def test_durations_are_seconds_or_name_their_unit(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "-1", "+1", "1.", ".5", "1e3", "1 2", "5 weeks", "1m30s", "1_0", "inf", "nan"]
)
def test_anything_else_is_no_duration(text):
    with pytest.raises(ValueError, match="2m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("12B", 12),
        ("512KiB", 512 * 1024),
        ("8MiB", 8 * 1024**2),
        ("8mib", 8 * 1024**2),
        ("8 MiB", 8 * 1024**2),
        ("2Gi", 2 * 1024**3),
        ("1GB", 10**9),
        ("1.5kB", 1500),
        (" 1K ", 1000),
    ],
)
def test_sizes_are_bytes_or_name_their_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "B", "-1", "1e9", "0x10", "1TB", "1 iB", "8MiBs", "1,5MB"])
def test_anything_else_is_no_size(text):
    with pytest.raises(ValueError, match="8MiB"):
        parse_size(text)


@pytest.mark.parametrize("parse", [parse_duration, parse_size])
def test_number_beyond_any_float_is_refused_as_any_other_mistake(parse):
    with pytest.raises(ValueError):  # noqa: PT011 - its words are free
        parse("9" * 400)


def test_rendered_json_is_compact_ascii_on_one_line():
    value = {"a": "line\nbreak\u2028\x7f", "é": ["\ud800", 1.5, None, True]}
    rendered = render_json(value)
    assert rendered.isascii()
    assert len(rendered.splitlines()) == 1
    assert b", " not in rendered
    assert b": " not in rendered
    assert json.loads(rendered) == value


@pytest.mark.parametrize("text", ["", "qwen3:8b", "日本語", "naïve café", "a" * 128, "🦙", "'\"\\"])
def test_printable_text_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.untraced
def test_whatever_character_comes_what_is_shown_is_printable_and_one_line():
    codes = [*range(0x30000), *range(0xE0000, 0xE0200), 0xF0000, sys.maxunicode]
    shown = {chr(code): printable(f"a{chr(code)}b") for code in codes}
    odd = [ascii(char) for char, text in shown.items() if not text.isprintable()]
    assert not odd, f"{len(odd)} characters, such as {odd[:5]} and {odd[-5:]}"
    assert all(text[0] == "a" and text[-1] == "b" for text in shown.values())
    for char in "\n\r\t\0\x1b\x7f\x85\ud800\udfff":
        assert shown[char] == "a?b"


def test_endless_names_are_cut_and_show_it():
    assert printable("x" * 129) == "x" * 127 + "…"
    assert printable("x" * 10_000_000, 10) == "x" * 9 + "…"
    assert len(printable("\n" * 500)) == 128


def test_average_starts_with_the_first_value_and_follows_the_later_ones():
    average = Average()
    assert average.value is None
    average.add(10.0)
    assert average.value == 10.0
    seen = [average.value]
    for _ in range(30):
        average.add(20.0)
        seen.append(average.value)
    assert seen == sorted(seen)
    assert all(value <= 20.0 for value in seen)
    assert average.value == pytest.approx(20.0, abs=0.1)


def test_one_odd_value_does_not_move_an_average_far():
    average = Average()
    for value in [1.0] * 10 + [11.0]:
        average.add(value)
    assert 1.0 < (average.value or 0.0) < 5.0


def test_only_data_files_without_a_beginning_are_left_out_of_the_coverage(tmp_path):
    whole = CoverageData(str(tmp_path / ".coverage"), suffix=True)
    whole.add_arcs({"llmq.py": [(1, 2)]})
    whole.write()
    whole.close()
    of_killed = [tmp_path / f".coverage.box.pid{number}.X" for number in range(3)]
    for file, statement in zip(of_killed, ["", "t (a)", "coverage_schema (version integer)"]):
        file.touch()  # the first was killed before it wrote a byte
        with closing(sqlite3.connect(file)) as database, database:
            database.execute(f"CREATE TABLE {statement}" if statement else "SELECT 1")
    of_another_version = tmp_path / ".coverage.box.pid3.X"
    with closing(sqlite3.connect(of_another_version)) as database, database:
        database.execute("CREATE TABLE coverage_schema (version integer)")
        database.execute("INSERT INTO coverage_schema VALUES (99)")
    of_disk_trouble = tmp_path / ".coverage.box.pid4.X"
    of_disk_trouble.write_bytes(b"no database" * 999)
    of_nowhere = tmp_path / ".coverage.box.pid5.X"
    of_nowhere.symlink_to(tmp_path / "nowhere")
    assert never_written(tmp_path) == of_killed
    of_nowhere.unlink()  # the last coverage for Python 3.9 fails at it, and mends what it looks at
    warned = combine(tmp_path)
    assert of_killed[2].name in warned
    for file in of_killed:
        file.unlink()
    assert never_written(tmp_path) == []
    warned = combine(tmp_path)
    assert not [file for file in of_killed if file.name in warned]
    assert of_another_version.name in warned
    assert of_disk_trouble.name in warned


def combine(folder):
    command = [sys.executable, "-m", "coverage", "combine", "--keep", "--quiet"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.untraced
@pytest.mark.parametrize("seed", range(20))
def test_stars_of_an_alias_are_any_text(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(500):
        pattern = "".join(chance.choices("aB*.", k=chance.randrange(8)))
        name = "".join(chance.choices("aAbB.", k=chance.randrange(10)))
        regex = re.escape(pattern).replace(r"\*", ".*")
        assert llmq.fits(pattern, name) == bool(re.fullmatch(regex, name, re.IGNORECASE))


def test_many_stars_and_a_long_name_take_no_time_to_speak_of() -> None:
    assert not llmq.fits("*a" * 30 + "*b", "a" * 100_000)  # a regex would be at it for ages


def test_log_without_a_stderr_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it when started with 2>&-
    llmq.LogHandler("text").emit(logging.makeLogRecord({"msg": "said to nobody"}))
