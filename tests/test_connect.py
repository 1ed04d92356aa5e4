"""What programs are told so that they ask llmq: one table for command, page and README."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.fakes import FakeBackend, Process, ask, need, require_command, running
from tests.real import peers
from tests.real.peers import Missing

BASE = "https://box.example/llm"
NOBODY = "http://127.0.0.1:9"  # where nothing listens
KEY = "sk-mine-5f1d7c0a9b3e"
NAMES = [one.name for one in llmq.RECIPES]
LEFT = re.compile(r"\b(BASE|KEY|MODEL)\b")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file and no variable of this machine steers the command."""
    for name in list(os.environ):
        if name.startswith(("LLMQ_", "LLM_")) or name in ("HOST", "PORT", "OLLAMA_URL"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(llmq, "CONFIG_PLACES", (str(tmp_path / "nowhere"),))


class Told:
    """`llmq connect`, where no llmq runs, or one that has these models."""

    def __init__(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.keys: list[str] = []  # that the running llmq was asked with
        self.has()

    def has(self, *models: str, wants_key: bool = False) -> None:
        def answer(_url: str, order: Any, *_: Any, key: str = "") -> Any:
            self.keys.append(key)
            assert order == ("GET", "/v1/models", None), "nothing is changed"
            if not models:
                raise llmq.StartError("no llmq answers there")
            if wants_key and not key:
                raise llmq.StartError("a key is needed")
            return {"data": [{"id": name} for name in models]}

        self.monkeypatch.setattr(llmq, "ask_llmq", answer)

    def __call__(self, *arguments: str) -> str:
        assert llmq.main(["connect", *arguments]) == 0
        said = self.capsys.readouterr()
        assert not said.err
        return str(said.out)


@pytest.fixture
def connect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(capsys, monkeypatch)


def text_of(name: str, model: str = "m:7b") -> str:
    (recipe,) = llmq.find_recipes(name)
    return llmq.fill_in(recipe.text, BASE, "k-1", model)


# ---- the recipes -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", llmq.RECIPES, ids=lambda one: one.name)
def test_a_recipe_has_nothing_left_to_be_filled_in(recipe: llmq.Recipe) -> None:
    told = llmq.fill_in(recipe.text, BASE, "k-1", "qwen3:8b")
    assert BASE in told
    assert not LEFT.search(told)
    without = llmq.fill_in(recipe.text, BASE)
    assert "k-1" not in without
    assert "Bearer" not in without


@pytest.mark.parametrize("key", ["", KEY])
def test_nothing_that_is_printed_has_anything_left_to_be_filled_in(
    key: str, connect: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMQ_KEY", key)
    connect.has("m:7b")
    told = connect() + connect("--json")
    lines = told.replace("YOUR-KEY", "").splitlines()
    assert [line for line in lines if LEFT.search(line)] == []


def test_what_is_filled_in_is_not_filled_in_again() -> None:
    assert llmq.fill_in("BASE KEY MODEL", "MODEL", "BASE", "KEY") == "MODEL BASE KEY"
    assert llmq.fill_in("BASE", r"\1\g<0>", "k") == r"\1\g<0>"
    assert llmq.fill_in("DATABASE MY_KEY MODELS", "b", "k", "m") == "DATABASE MY_KEY MODELS"


def test_every_name_is_there_once_however_it_is_written() -> None:
    assert len({re.sub(r"\W", "", name.lower()) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", ["opencode", "Zed"])
def test_json_is_json(name: str) -> None:
    assert f"{BASE}/v1" in json.dumps(json.loads(text_of(name)))
    assert f"{BASE}/v1" in json.dumps(json.loads(llmq.fill_in(text_of(name), BASE)))


def test_json_says_where_it_belongs_what_is_filled_in() -> None:
    (provider,) = json.loads(text_of("opencode"))["provider"].values()
    assert provider["options"] == {"baseURL": f"{BASE}/v1", "apiKey": "k-1"}
    assert list(provider["models"]) == ["m:7b"]
    row = json.loads(text_of("Zed"))["language_models"]["openai_compatible"]["llmq"]
    assert row["api_url"] == f"{BASE}/v1"
    assert [one["name"] for one in row["available_models"]] == ["m:7b"]


def test_codex_gets_toml() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    import tomllib

    facts = tomllib.loads(text_of("codex"))
    assert facts["model_providers"]["llmq"]["base_url"] == f"{BASE}/v1"
    assert (facts["model"], facts["model_provider"]) == ("m:7b", "llmq")
    variable = facts["model_providers"]["llmq"]["env_key"]
    assert variable in llmq.find_recipes("codex")[0].where, "who sets it is told to"


def test_continue_gets_one_entry_of_a_list_in_yaml() -> None:
    first, *rest = text_of("Continue").split("\n")
    assert re.fullmatch(r"- name: \S+", first)
    pairs = [re.fullmatch(r"  (\w+): (\S+)", line) for line in rest]
    assert dict(pair.groups() for pair in pairs if pair) == {
        "provider": "openai",
        "model": "m:7b",
        "apiBase": f"{BASE}/v1",
        "apiKey": "k-1",
    }
    assert all(pairs)


@pytest.mark.parametrize("name", ["Python", "LangChain"])
def test_python_is_python(name: str) -> None:
    compile(text_of(name), name, "exec")


@pytest.mark.parametrize(
    "recipe", [one for one in llmq.RECIPES if one.where == llmq.SHELL], ids=lambda one: one.name
)
def test_what_goes_into_a_shell_is_words_of_a_shell(recipe: llmq.Recipe) -> None:
    text = llmq.fill_in(recipe.text, BASE, "k-1", "m:7b")
    subprocess.run(["sh", "-n", "-c", text], check=True, capture_output=True)
    values = dict(word.split("=", 1) for word in shlex.split(text) if re.match(r"[A-Z_]+=", word))
    assert {value for name, value in values.items() if name.endswith(("KEY", "TOKEN"))} <= {"k-1"}
    assert all(value.startswith((BASE, "k-1")) for value in values.values())


# ---- run by whom they are for ----------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    with Process("--demo", "--port", "0", "--base-path", "/llm") as q:
        yield f"http://127.0.0.1:{q.port}/llm"


def printed(demo: str, program: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The text of a program, as the command prints it for that llmq."""
    assert llmq.main(["connect", program, "--url", demo, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    return str(row["text"])


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_line_for_curl_is_answered(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    require_command("curl")
    answer = json.loads(run("sh", "-c", printed(demo, "curl", capsys)))
    assert answer["choices"][0]["message"]["content"] == "hello"


def test_the_program_in_javascript_is_answered(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    node = require_command("node")
    script = printed(demo, "JavaScript", capsys)
    assert run(node, "--input-type=module", "-e", script) == "hi\n"


@pytest.mark.deadline(300)  # the libraries may have to be installed first
def test_the_program_in_python_is_answered(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        python = peers.python()
    except Missing as reason:
        need(False, str(reason))
    assert run(python, "-c", printed(demo, "Python", capsys)) == "hello\n"


def test_the_command_fills_in_this_llmqs_address_and_a_model_that_it_has(
    demo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmq.main(["connect", "--url", demo, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == NAMES
    assert {tuple(row) for row in rows} == {("name", "where", "text")}
    texts = {row["name"]: row["text"] for row in rows}
    assert f"{demo}/v1/chat/completions" in texts["curl"]
    assert '"model": "echo"' in texts["curl"]
    assert all(demo in text for text in texts.values())


# ---- the command -----------------------------------------------------------------------------


def test_all_programs_are_told_each_under_its_name_and_its_place(connect: Told) -> None:
    told = connect()
    assert re.findall(r"(?m)^# (.+?): ", told) == NAMES
    assert told.count("\n\n# ") == len(NAMES) - 1


def test_without_a_running_llmq_it_is_told_all_the_same(connect: Told) -> None:
    assert '"model": "MODEL"' in connect("curl", "--url", NOBODY)


def test_nobody_there_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmq.main(["connect", "curl", "--url", NOBODY]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"curl {NOBODY}/v1/chat/completions" in said.out


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:11500"),
        ({"PORT": "8080"}, "http://127.0.0.1:8080"),
        ({"BASE_PATH": "/llm"}, "http://127.0.0.1:11500/llm"),
        ({"HOST": "0.0.0.0"}, "http://127.0.0.1:11500"),
        ({"HOST": "::"}, "http://[::1]:11500"),
        ({"HOST": "10.1.2.3"}, "http://10.1.2.3:11500"),
        ({"TLS_CERT": "c.pem", "TLS_KEY": "k.pem"}, "https://127.0.0.1:11500"),
    ],
)
def test_the_address_is_that_of_the_settings(
    settings: dict[str, str], url: str, connect: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"LLMQ_SERVER_{name}", value)
    assert f"base_url={json.dumps(url + '/v1')}," in connect("python")
    assert f"OLLAMA_HOST={url}\n" in connect("ollama")


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_an_address_that_is_given_goes_before_the_settings(
    slash: str, connect: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMQ_SERVER_BASE_PATH", "/here")
    assert f"curl {BASE}/v1/chat" in connect("curl", "--url", BASE + slash)


@pytest.mark.parametrize("url", ["box:11500", "nonsense"])
def test_what_is_no_address_is_not_told_to_programs(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmq.main(["connect", "curl", "--url", url]) in (1, 2)
    assert "curl " not in capsys.readouterr().out


def keyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "llmq.json"
    file.write_text(json.dumps({"keys": {"bob": {"key": KEY}}}), encoding="utf-8")
    monkeypatch.setenv("LLMQ_CONFIG", str(file))


WITH_KEYS = {  # what tells that a key is needed there
    "Ollama": "OLLAMA_API_KEY=YOUR-KEY",
    "OpenAI": "OPENAI_API_KEY=YOUR-KEY",
    "curl": "Authorization: Bearer YOUR-KEY",
    "JavaScript": "Authorization: 'Bearer YOUR-KEY'",
    "Claude Code": "ANTHROPIC_AUTH_TOKEN=YOUR-KEY",
    "opencode": '"apiKey": "YOUR-KEY"',
}


def texts(told: str) -> dict[str, str]:
    return {row["name"]: row["text"] for row in json.loads(told)}


def check_keyed(told: str) -> None:
    lacking = [name for name, part in WITH_KEYS.items() if part not in texts(told)[name]]
    assert lacking == []
    assert KEY not in told, "a key is never printed"
    assert "none" not in told


def test_where_keys_are_configured_programs_are_told_to_have_one(
    connect: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keyed(monkeypatch, tmp_path)
    check_keyed(connect("--json"))


def test_whoever_has_a_key_asks_with_it_and_sees_it_nowhere(
    connect: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMQ_KEY", KEY)
    connect.has("m:7b", wants_key=True)
    told = connect("--json", "--url", BASE)
    check_keyed(told)
    assert "m:7b" in texts(told)["curl"]
    monkeypatch.delenv("LLMQ_KEY")
    file = tmp_path / "key"
    file.write_text(KEY + "\n", encoding="utf-8")
    file.chmod(0o600)
    assert connect("--json", "--url", BASE, "--key-file", str(file)) == told
    assert connect.keys == [KEY, KEY]


def test_keys_of_this_box_say_nothing_of_another(
    connect: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keyed(monkeypatch, tmp_path)
    assert "KEY" not in connect("curl", "--url", BASE)


async def test_a_llmq_elsewhere_that_wants_a_key_is_told_with_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with FakeBackend() as fake, running(fake.url, keys={"bob": {"key": KEY}}) as q:
        words = ["connect", "--json", "--url", q.base]
        code = await asyncio.get_running_loop().run_in_executor(None, llmq.main, words)
    assert code == 0
    check_keyed(capsys.readouterr().out)


@pytest.mark.parametrize("word", ["Claude Code", "claude-code", "CLAUDECODE", " claude code "])
def test_a_program_is_found_however_it_is_written(word: str) -> None:
    assert [one.name for one in llmq.find_recipes(word)] == ["Claude Code"]


def test_every_program_is_found_by_its_own_name() -> None:
    assert [llmq.find_recipes(name)[0].name for name in NAMES] == NAMES


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("codx", "did you mean codex?"),
        ("Claude", "did you mean claude code?"),
        ("webui", "did you mean open webui?"),
        ("xyzzy", "known: aider, "),
        ("\x1b[31mcodx", "unknown program "),
        ("!!", "known: aider, "),
    ],
)
def test_a_program_that_is_not_known_is_told_with_the_nearest(
    word: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmq.main(["connect", word]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert cure in said.err
    assert "\x1b" not in said.err


# ---- models with names of all sorts ----------------------------------------------------------

HOSTILE = [
    "x'; touch /tmp/x; '",
    '"}]}',
    "$(touch x)",
    "`id`",
    "a\nb",
    "a\x1b[31m",
    "a b",
    "ä",
    "",
    "x" * 129,
    "a\\",
    "</script>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_would_break_a_text_is_not_in_it(name: str, connect: Told) -> None:
    connect.has(name)
    assert texts(connect("--json")) == {
        one.name: llmq.fill_in(one.text, "http://127.0.0.1:11500") for one in llmq.RECIPES
    }
    connect.has(name, "nice:7b")
    assert "nice:7b" in connect("curl")


@pytest.mark.parametrize("name", ["qwen*", "--dangerous", "@x"])
def test_a_name_that_a_shell_or_yaml_would_take_for_something_else_is_not_in_it(
    name: str, connect: Told
) -> None:
    connect.has(name, "nice:7b")
    told = texts(connect("--json"))
    assert shlex.split(told["Claude Code"])[-1] == "nice:7b"
    assert "model: nice:7b\n" in told["Continue"]


def test_a_model_for_embeddings_is_not_what_a_chat_is_told(connect: Told) -> None:
    connect.has("nomic-embed-text", "bge-m3", "qwen3:8b")
    assert '"model": "qwen3:8b"' in connect("curl")
    connect.has("nomic-embed-text")
    assert '"model": "MODEL"' in connect("curl")


async def test_a_runner_with_hostile_names_breaks_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with FakeBackend([*HOSTILE[:6], "nice:7b"]) as fake, running(fake.url) as q:
        await q.chat("x", model="nice:7b")  # its models are known by now
        words = ["connect", "curl", "--json", "--url", q.base]
        code = await asyncio.get_running_loop().run_in_executor(None, llmq.main, words)
    assert code == 0
    (row,) = json.loads(capsys.readouterr().out)
    data = json.loads(shlex.split(row["text"])[-1])
    assert data["model"] == "nice:7b"


def test_what_is_printed_holds_no_escape(connect: Told) -> None:
    told = connect("--url", "http://box\x1b[31m")
    assert "\x1b" not in told


# ---- the page --------------------------------------------------------------------------------


def test_what_the_page_has_cannot_end_its_script() -> None:
    for keyed in (True, False):
        told = llmq.recipes_json(keyed=keyed)
        assert "</" not in told
        assert [row[0] for row in json.loads(told)] == NAMES
        assert ("Bearer KEY" in told) is keyed


def test_no_text_can_end_the_script_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "</script><script>alert(1)</script><!--\u2028"
    row = llmq.Recipe(odd, odd, odd)
    monkeypatch.setattr(llmq, "RECIPES", (row,))
    told = llmq.recipes_json.__wrapped__(keyed=True)
    assert "</" not in told
    assert "\u2028" not in told
    assert [llmq.Recipe(*one) for one in json.loads(told)] == [row]


async def test_the_page_has_the_recipes_and_whether_a_key_is_needed() -> None:
    for keys, needed in (({}, "false"), ({"bob": {"key": KEY, "rights": ["control"]}}, "true")):
        async with running(NOBODY, keys=keys) as q:
            headers = {"Accept": "text/html"}
            if keys:
                headers["Authorization"] = f"Bearer {KEY}"
            answer = await ask(q.port, "GET", "/llmq", headers=headers)
        page = answer.body.decode()
        assert f"KEYED = {needed}, RECIPES = [[" in page
        assert "RECIPES_HERE" not in page
        assert "KEYED_HERE" not in page
        assert KEY not in page


# ---- completion ------------------------------------------------------------------------------

SHELLS = ("bash", "zsh", "fish")


def flags() -> dict[str, set[str]]:
    """Each command's flags, by the parser itself."""
    (table,) = [
        one for one in llmq.build_parser()._actions if isinstance(one, argparse._SubParsersAction)
    ]
    return {
        name: {
            flag
            for action in parser._actions
            for flag in action.option_strings
            if flag.startswith("--")
        }
        for name, parser in table.choices.items()
    }


def script(shell: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert llmq.main(["completion", shell]) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {shell: script(shell) for shell in SHELLS}


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        *[(shell, {}) for shell in SHELLS],
        ("bash", {"COLUMNS": "20"}),  # help is broken into lines by it
        ("bash", {"FORCE_COLOR": "1"}),  # and coloured, from Python 3.14 on
    ],
    ids=str,
)
def test_completion_has_each_command_and_each_of_its_flags_and_no_other(
    shell: str,
    variables: dict[str, str],
    scripts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told, found = script(shell) if variables else scripts[shell], dict[str, set[str]]()
    if shell == "fish":
        commands = re.findall(r"(?m)^complete -c llmq -n __fish_use_subcommand -a (\S+) -d ", told)
        line = r"(?m)^complete -c llmq -n '__fish_seen_subcommand_from (\S+)' -l (\S+)$"
        for name, flag in re.findall(line, told):
            found.setdefault(name, set()).add("--" + flag)
    else:
        commands = re.findall(r'local words="(.*?)"', told)[0].split()
        for name, words in re.findall(r'(?m)^ +(\S+)\) words="(.*?)" ;;$', told):
            found[name] = set(words.split())
    assert commands == list(llmq.COMMANDS)
    assert found == flags()


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_plain_text_in_the_syntax_of_its_shell(
    shell: str, scripts: dict[str, str], tmp_path: Path
) -> None:
    told = scripts[shell]
    assert told.isascii()
    assert told.isprintable() or set(re.findall(r"[^ -~]", told)) == {"\n"}
    path = shutil.which(shell)
    if path:
        file = tmp_path / "completion"
        file.write_text(told, encoding="utf-8")
        run(path, "--no-execute" if shell == "fish" else "-n", str(file))
    if shell == "fish":
        assert {len(shlex.split(line)) for line in told.splitlines()} == {7, 9}
        assert "$" not in told


def completed(told: str, *lines: str, tmp_path: Path) -> list[list[str]]:
    """What bash, which has read this, makes of these lines, of which the last word is begun."""
    bash = require_command("bash")
    ask = 'COMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=(); _llmq; echo "${{COMPREPLY[@]}}"'
    asked = []
    for line in lines:
        words = line.split(" ")
        asked.append(ask.format(" ".join(map(shlex.quote, words)), len(words) - 1))
    done = subprocess.run(
        [bash, "--norc", "-c", "\n".join([told, *asked])],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr == ""
    return [line.split() for line in done.stdout.split("\n")[:-1]]


def test_bash_completes_commands_and_their_flags(scripts: dict[str, str], tmp_path: Path) -> None:
    wanted = {
        "llmq stat": ["status"],
        "llmq con": ["config", "connect"],
        "llmq ": list(llmq.COMMANDS),
        "llmq xyz": [],
        "llmq dance --u": [],
        "llmq top --int": ["--interval"],
        "llmq connect codex --u": ["--url"],
    }
    told = scripts["bash"]
    assert completed(told, *wanted, tmp_path=tmp_path) == list(wanted.values())
    found = completed(told, *[f"llmq {name} --" for name in llmq.COMMANDS], tmp_path=tmp_path)
    assert dict(zip(llmq.COMMANDS, map(set, found))) == flags()


def test_bash_has_it_for_llmq_once_it_is_read(scripts: dict[str, str]) -> None:
    bash = require_command("bash")
    registered = run(bash, "--norc", "-c", scripts["bash"] + "\ncomplete -p llmq")
    assert "-F _llmq llmq" in registered


@pytest.mark.parametrize("words", [(), ("csh",), ("bash", "zsh")])
def test_completion_for_no_known_shell_is_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        llmq.main(["completion", *words])
    assert raised.value.code == 2
    assert capsys.readouterr().out == ""
