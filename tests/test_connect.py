"""What programs are told so that they ask llmq: one table for command, page and README."""

from __future__ import annotations

import json
import re
import sys

import pytest

import llmq
from tests.fakes import Process, free_port, run_llmq

BASE = "https://box.example/llm"


@pytest.mark.parametrize("recipe", llmq.RECIPES, ids=lambda one: one.name)
def test_a_recipe_has_nothing_left_to_be_filled_in(recipe: llmq.Recipe) -> None:
    told = llmq.fill_in(recipe.text, BASE, "k-1", "qwen3:8b")
    assert BASE in told
    assert not re.search(r"\b(BASE|KEY|MODEL)\b", told)
    without = llmq.fill_in(recipe.text, BASE)
    assert "k-1" not in without
    assert "Bearer" not in without


def text_of(name: str) -> str:
    (recipe,) = llmq.find_recipes(name)
    return llmq.fill_in(recipe.text, BASE, "k-1", "m:7b")


@pytest.mark.parametrize("name", ["opencode", "Zed"])
def test_json_is_json(name: str) -> None:
    assert f"{BASE}/v1" in json.dumps(json.loads(text_of(name)))


def test_codex_gets_toml() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    import tomllib

    facts = tomllib.loads(text_of("codex"))
    assert facts["model_providers"]["llmq"]["base_url"] == f"{BASE}/v1"
    assert (facts["model"], facts["model_provider"]) == ("m:7b", "llmq")


@pytest.mark.parametrize("name", ["Python", "LangChain"])
def test_python_is_python(name: str) -> None:
    compile(text_of(name), name, "exec")


@pytest.mark.parametrize("word", ["Claude Code", "claude-code", "CLAUDECODE"])
def test_a_program_is_found_however_it_is_written(word: str) -> None:
    assert [one.name for one in llmq.find_recipes(word)] == ["Claude Code"]


def test_a_program_that_is_not_known_is_told_with_the_nearest() -> None:
    answer = run_llmq("connect", "codx")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "did you mean codex?" in answer.stderr


def test_the_command_fills_in_this_llmqs_address_and_a_model_that_it_has() -> None:
    with Process("--demo", "--port", str(free_port()), "--base-path", "/llm") as q:
        url = f"http://127.0.0.1:{q.port}/llm"
        rows = json.loads(run_llmq("connect", "--url", url, "--json").stdout)
    assert [row["name"] for row in rows] == [one.name for one in llmq.RECIPES]
    assert f"{url}/v1/chat/completions" in rows[3]["text"]
    assert '"model": "echo"' in rows[3]["text"]


def test_without_a_running_llmq_it_is_told_all_the_same() -> None:
    answer = run_llmq("connect", "curl", "--url", f"http://127.0.0.1:{free_port()}")
    assert answer.returncode == 0
    assert '"model": "MODEL"' in answer.stdout


def test_what_the_page_has_cannot_end_its_script() -> None:
    for keyed in (True, False):
        told = llmq.recipes_json(keyed=keyed)
        assert "</" not in told
        assert [row[0] for row in json.loads(told)] == [one.name for one in llmq.RECIPES]
        assert ("Bearer KEY" in told) is keyed


# ---- completion and help


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_has_every_command(shell: str) -> None:
    told = run_llmq("completion", shell).stdout
    assert all(name in told for name in llmq.COMMANDS)
    assert "no-such" not in told


def test_bash_completes_commands_and_their_flags() -> None:
    import subprocess

    script = run_llmq("completion", "bash").stdout
    ask = 'COMP_WORDS=({}); COMP_CWORD={}; _llmq; echo "${{COMPREPLY[@]}}"\n'
    lines = ask.format("llmq stat", 1) + ask.format("llmq top --int", 2)
    done = subprocess.run(
        ["bash", "-c", script + "\n" + lines], capture_output=True, text=True, check=True
    )
    assert done.stdout == "status\n--interval\n"


def test_help_is_help() -> None:
    assert run_llmq("help").stdout == run_llmq("--help").stdout
    assert run_llmq("help", "top").stdout == run_llmq("top", "--help").stdout
