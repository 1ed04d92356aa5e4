"""Settings: each by file, variable and flag; mistakes in one line; each has a tested effect."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import build_settings, settings_markdown
from tests.fakes import ROOT

ROWS = list(llmq.known_settings())
KEYS = [row.key for row in ROWS]
FOREIGN = ["HOST", "PORT", "OLLAMA_URL", "OLLAMA_MODEL", "OLLAMA_NUM_CTX"]
FOREIGN += ["LLM_MAX_ATTEMPTS", "LLM_TIMEOUT_MS"]

# Three values of each type, as people write them, and what they mean.
WRITTEN: dict[str, list[tuple[Any, Any]]] = {
    "int": [("3", 3), ("4", 4), ("5", 5)],
    "Duration": [("3", 3.0), ("1.5s", 1.5), ("2m", 120.0)],
    "Size": [("4096", 4096), ("8MiB", 8 * 2**20), ("1GB", 10**9)],
    "str": [("one", "one"), ("two", "two"), ("three", "three")],
    "bool": [("true", True), ("false", False), ("1", True)],
    "Names": [("a", ("a",)), ("b, c", ("b", "c")), ("d", ("d",))],
    "File": [("one", "one"), ("two", "two"), ("three", "three")],
    "BasePath": [("/a", "/a"), ("a/b/", "/a/b"), ("/c-d.e/", "/c-d.e")],
    "Addresses": [("::1", ("::1",)), ("10.0.0.1, ::2", ("10.0.0.1", "::2")), ("::3", ("::3",))],
}


LISTS = {"Names": ("a", "b"), "Addresses": ("::a", "::b")}


def written(row: Any) -> list[tuple[Any, Any]]:
    """Values that this setting may have, each as text and as what it means."""
    choices = [(str(one), one) for one in row.choices * 2]
    return choices or WRITTEN[row.type]


def value_of(settings: Any, key: str) -> Any:
    table, name = key.split(".")
    return getattr(getattr(settings, table), name)


def write(path: Path, tables: dict[str, Any]) -> Path:
    path.write_text(json.dumps(tables))
    return path


def read(
    environ: dict[str, str] | None = None, file: Path | None = None, **flags: Any
) -> tuple[Any, list[str]]:
    """The settings that these sources give, and the notes; no other file is looked for."""
    given = {key.replace("__", "."): value for key, value in flags.items()}
    environ = dict(environ or {})
    environ["LLMQ_CONFIG"] = str(file) if file else "/dev/null/none"
    if file is None:
        layers, notes = llmq.environment_layers(environ)
        return llmq.merge_layers([*layers, ("command line", given)]), notes
    return llmq.read_settings(given, environ)


def flags_of(*arguments: str) -> dict[str, Any]:
    """What the parser makes of the flags of `serve`."""
    return llmq.given_flags(llmq.build_parser().parse_args(["serve", *arguments]))


def mistake(**sources: Any) -> str:
    """The one line that these sources are refused with."""
    with pytest.raises(llmq.ConfigError) as raised:
        read(**sources)
    (line,) = str(raised.value).splitlines()
    return line


# ---- Each setting, from every source ---------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=KEYS)
def test_setting_comes_from_default_then_file_then_environment_then_flag(
    row: Any, tmp_path: Path
) -> None:
    first, second, third = written(row)[:3]
    table, name = row.key.split(".")
    file = write(tmp_path / "llmq.json", {table: {name: first[0]}})
    environ = {row.variable: second[0]}
    flag = flags_of(row.flag) if row.type == "bool" else flags_of(row.flag, third[0])
    assert list(flag) == [row.key]
    assert value_of(llmq.Settings(), row.key) == row.default
    assert value_of(read()[0], row.key) == row.default
    assert value_of(read(file=file)[0], row.key) == first[1]
    assert value_of(read(environ)[0], row.key) == second[1]
    assert value_of(read(environ, file)[0], row.key) == second[1]
    assert value_of(read(**flag)[0], row.key) == third[1]
    assert value_of(read(environ, file, **flag)[0], row.key) == third[1]


@pytest.mark.parametrize("row", ROWS, ids=KEYS)
def test_setting_changes_nothing_but_itself(row: Any) -> None:
    text, _ = next(one for one in written(row) if one[1] != row.default)
    settings, notes = read({row.variable: text})
    changed = [key for key in KEYS if value_of(settings, key) != value_of(llmq.Settings(), key)]
    assert changed == [row.key]
    assert not notes


@pytest.mark.parametrize("row", [row for row in ROWS if row.type in LISTS], ids=lambda row: row.key)
def test_flag_of_a_list_may_be_repeated(row: Any) -> None:
    one, other = LISTS[row.type]
    flags = flags_of(row.flag, one, row.flag, other)
    assert value_of(read(**flags)[0], row.key) == (one, other)


def test_file_may_say_numbers_switches_and_lists_as_json_has_them(tmp_path: Path) -> None:
    server: dict[str, Any] = {"keep_alive": 1.5, "max_body": 4096, "allow_anonymous_lan": True}
    server["allowed_hosts"] = ["a", "b"]
    settings, _ = read(file=write(tmp_path / "llmq.json", {"server": server}))
    assert {name: getattr(settings.server, name) for name in server} == {
        **server,
        "allowed_hosts": ("a", "b"),
    }


def test_toml_says_the_same_as_json(tmp_path: Path) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    toml = tmp_path / "llmq.toml"
    toml.write_text('[queue]\nslots = 4\n[backends.gpu]\nurl = "http://box:8000"\n')
    tables = {"queue": {"slots": 4}, "backends": {"gpu": {"url": "http://box:8000"}}}
    assert read(file=toml) == read(file=write(tmp_path / "llmq.json", tables))


def test_toml_without_any_parser_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    file = tmp_path / "llmq.toml"
    file.write_text("[queue]\nslots = 4\n")
    line = mistake(file=file)
    assert str(file) in line
    assert "3.11" in line
    assert ".json" in line


def test_file_is_found_at_the_usual_places_and_never_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "home", tmp_path / "etc"]
    monkeypatch.setattr(llmq, "CONFIG_PLACES", [str(place) for place in places])
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "llmq.json", {"queue": {"slots": 9}})
    assert llmq.find_file({}) is None
    for place in places:
        place.mkdir()
    found = []
    for path in ("etc/llmq.json", "etc/llmq.toml", "home/llmq.json", "home/llmq.toml"):
        write(tmp_path / path, {})
        found.append(str(tmp_path / path))
        assert llmq.find_file({}) == found[-1], "the later one goes first"
    given = {"LLMQ_CONFIG": "/elsewhere.json"}
    assert llmq.find_file(given) == "/elsewhere.json"


def test_usual_places_are_the_users_own_and_the_boxs() -> None:
    assert tuple(llmq.CONFIG_PLACES) == ("~/.config/llmq", "/etc/llmq")


# ---- Variables of other programs -------------------------------------------------------------


def test_variables_of_npm_llm_queue_work() -> None:
    environ = {
        "HOST": "127.0.0.2",
        "PORT": "8123",
        "OLLAMA_URL": "http://10.0.0.1:11434",
        "OLLAMA_MODEL": "qwen3:8b",
        "OLLAMA_NUM_CTX": "8192",
        "LLM_MAX_ATTEMPTS": "3",
        "LLM_TIMEOUT_MS": "90000",
    }
    settings, notes = read(environ)
    assert (settings.server.host, settings.server.port) == ("127.0.0.2", 8123)
    assert [one.url for one in settings.backends.values()] == ["http://10.0.0.1:11434"]
    assert (settings.upstream.model, settings.upstream.num_ctx) == ("qwen3:8b", 8192)
    assert settings.queue.max_attempts == 3
    assert settings.upstream.first_byte_timeout == 90.0
    assert not notes
    known = {row.env_alias for row in ROWS if row.env_alias} | {"OLLAMA_URL"}
    assert known == set(FOREIGN), "a foreign variable without a test"


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.env_alias], ids=lambda row: row.env_alias
)
def test_llmqs_own_variable_goes_before_a_foreign_one(row: Any) -> None:
    own, foreign = ("127.0.0.3", "127.0.0.2") if row.env_alias == "HOST" else ("7", "80")
    settings, _ = read({row.env_alias: foreign, row.variable: own})
    assert value_of(settings, row.key) == llmq.TYPES[row.type].parse(own)


def test_llmqs_own_backends_go_before_ollama_url() -> None:
    settings, _ = read({"OLLAMA_URL": "http://a:1", "LLMQ_BACKENDS": "gpu=http://b:2, http://c:3"})
    assert {name: one.url for name, one in settings.backends.items()} == {
        "gpu": "http://b:2",
        "c:3": "http://c:3",
    }


@pytest.mark.parametrize("name", ["OLLAMA_URLS", "BACKEND_URLS"])
def test_urls_of_ollamamq_are_taken_for_backends_with_a_note(name: str, tmp_path: Path) -> None:
    urls = {name: "http://a:1, http://b:2"}
    settings, notes = read(urls)
    assert [one.url for one in settings.backends.values()] == ["http://a:1", "http://b:2"]
    assert notes == [f"{name} is taken for LLMQ_BACKENDS"]
    file = write(tmp_path / "llmq.json", {"backends": {"c": {"url": "http://c:3"}}})
    assert list(read(urls, file)[0].backends) == ["a:1", "b:2"], "over the file"
    for more in ({"LLMQ_BACKENDS": "http://d:4"}, {"OLLAMA_URL": "http://d:4"}):
        assert list(read({**urls, **more})[0].backends) == ["d:4"], "below those of its own names"
    assert list(read(urls, backends=["http://e:5"])[0].backends) == ["e:5"]
    assert name in mistake(environ={name: "http://a:1,ftp://b"})


def test_timeout_of_ollamamq_is_for_the_first_byte_and_between_bytes() -> None:
    settings, notes = read({"TIMEOUT": "90"})
    assert settings.upstream.first_byte_timeout == settings.upstream.idle_timeout == 90.0
    told = "TIMEOUT is taken for upstream.first_byte_timeout and upstream.idle_timeout"
    assert notes == [told]
    more = {"LLMQ_UPSTREAM_IDLE_TIMEOUT": "7", "LLM_TIMEOUT_MS": "8000"}
    settings, _ = read({"TIMEOUT": "90", **more})
    assert (settings.upstream.first_byte_timeout, settings.upstream.idle_timeout) == (8.0, 7.0)


@pytest.mark.parametrize("odd", ["0", "-5", "1.5", "300s", "5m", "soon", " 9", "1e3", "9" * 8, "٣"])
def test_timeout_that_is_none_of_ollamamqs_is_ignored_with_one_line(odd: str) -> None:
    """The name is a common one: what other programs want by it must not stop llmq."""
    settings, (note,) = read({"TIMEOUT": odd})
    assert settings == llmq.Settings()
    assert re.match(r"TIMEOUT=.* ignored: wants seconds", note)


@pytest.mark.parametrize("name", ["OLLAMA_URLS", "BACKEND_URLS", "TIMEOUT"])
def test_empty_variable_of_ollamamq_is_no_variable(name: str) -> None:
    assert read({name: ""}) == (llmq.Settings(), [])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "localhost", "192.0.2.7"])
def test_host_that_is_an_address_counts(host: str) -> None:
    settings, notes = read({"HOST": host})
    assert settings.server.host == host
    assert not notes


@pytest.mark.parametrize("host", ["my-laptop", "x86_64-linux", "127.0.0.1:80", "1.2.3", "a\nb"])
def test_host_that_shells_export_is_ignored_with_one_line(host: str) -> None:
    settings, (note,) = read({"HOST": host})
    assert settings.server.host == ""
    assert re.match(r"HOST=.* ignored", note)
    assert "\n" not in note


@pytest.mark.parametrize("name", FOREIGN)
def test_empty_foreign_variable_is_no_variable(name: str) -> None:
    assert read({name: ""}) == (llmq.Settings(), [])


def test_ollama_host_is_not_read() -> None:
    assert read({"OLLAMA_HOST": "http://127.0.0.1:11500"}) == (llmq.Settings(), [])


# ---- Named tables ----------------------------------------------------------------------------


def test_backends_and_devices_are_tables_with_names(tmp_path: Path) -> None:
    gpu = {"url": "http://box:8000/v1/", "device": "gpu1", "slots": 2, "kind": "vllm", "key": "k"}
    tables = {"backends": {"gpu": gpu, "cpu": {"url": "box:1"}}, "devices": {"gpu1": {"slots": 8}}}
    settings, _ = read(file=write(tmp_path / "llmq.json", tables))
    assert settings.devices == {"gpu1": llmq.DeviceSettings(slots=8)}
    assert settings.backends == {
        "gpu": llmq.BackendSettings("http://box:8000", "gpu1", 2, "vllm", "k"),
        "cpu": llmq.BackendSettings("http://box:1"),
    }


def test_backends_of_a_higher_source_replace_those_below(tmp_path: Path) -> None:
    file = write(tmp_path / "llmq.json", {"backends": {"gpu": {"url": "http://a:1"}}})
    flags = flags_of("--backend", "http://c:3", "--backend", "d=http://d:4")
    assert list(read(file=file)[0].backends) == ["gpu"]
    assert list(read({"LLMQ_BACKENDS": "http://b:2"}, file)[0].backends) == ["b:2"]
    assert list(read({"LLMQ_BACKENDS": "http://b:2"}, file, **flags)[0].backends) == ["c:3", "d"]


@pytest.mark.parametrize(
    ("item", "name", "url"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("127.0.0.1:8080", "127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("box", "box", "http://box"),
        ("http://box:8000/", "box:8000", "http://box:8000"),
        ("http://box:8000/v1", "box:8000", "http://box:8000"),
        ("https://box", "box", "https://box"),
        ("http://[::1]:8080", "[::1]:8080", "http://[::1]:8080"),
        ("gpu=http://box:8000", "gpu", "http://box:8000"),
        ("gpu.1=box:8000", "gpu.1", "http://box:8000"),
    ],
)
def test_backend_is_a_url_or_a_name_and_a_url(item: str, name: str, url: str) -> None:
    settings = build_settings({"backends": [item]})
    assert settings.backends == {name: llmq.BackendSettings(url=url)}


@pytest.mark.parametrize(
    "item",
    [
        "ftp://box",
        "http://",
        "http://box:0",
        "http://box:99999",
        "http://box:port",
        "http://box/a b",
        "http://box/päth",
        "http://box?x=1",
        "http://box/v1?x=1",
        "http://box/v1#x",
        "http://[::1",
        "gpu=",
        "",
    ],
)
def test_backend_that_is_no_base_url_is_refused_with_the_cure(item: str) -> None:
    with pytest.raises(llmq.ConfigError, match=r"url|NAME") as raised:
        build_settings({"backends": [item]})
    assert "\n" not in str(raised.value)


def test_backends_may_be_a_list_with_commas() -> None:
    settings = build_settings({"backends": ["a=http://x:1, http://y:2", "z=http://z:3,"]})
    told = {name: one.url for name, one in settings.backends.items()}
    assert told == {"a": "http://x:1", "y:2": "http://y:2", "z": "http://z:3"}
    with pytest.raises(llmq.ConfigError, match="twice"):
        build_settings({"backends": ["a=http://x:1,a=http://y:2"]})


@pytest.mark.parametrize("none", ["", " ", ",", " , "])
def test_flag_that_names_no_backend_is_a_mistake(none: str) -> None:
    """A script's variable that is not set is not to mean another runner than was meant."""
    assert re.search(r"url|NAME", mistake(backends=[none]))


def test_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(llmq.ConfigError, match="key") as raised:
        build_settings({"backends": ["http://me:secret@box:1"]})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a/b", "ä", "a\n"])
def test_name_of_a_backend_is_plain(name: str) -> None:
    with pytest.raises(llmq.ConfigError, match="letters and digits"):
        build_settings({"backends": {name: {"url": "http://a:1"}}})


ALIASES = {"claude-*": "qwen3-coder:30b", "gpt-4o": "M", "*": "m"}


def test_aliases_are_patterns_and_the_models_they_mean(tmp_path: Path) -> None:
    settings, _ = read(file=write(tmp_path / "llmq.json", {"aliases": ALIASES}))
    assert settings.aliases == ALIASES
    assert list(settings.aliases) == list(ALIASES), "the first that fits counts"
    assert llmq.Settings().aliases == {}
    assert build_settings({"aliases": {}}).aliases == {}


@pytest.mark.parametrize(
    "bad",
    [{"a": 1}, {"a": ""}, {"": "m"}, {"a": None}, {"a": {"b": "c"}}, {"a": ["m"]}, {"a": True}],
)
def test_alias_that_means_no_model_is_told_with_the_cure(bad: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "llmq.json", {"aliases": bad})
    line = mistake(file=file)
    assert line.startswith(f"{file}: aliases: ")
    assert '"name-*" = "model"' in line


@pytest.mark.parametrize("bad", [None, [], ["a=m"], "a=m", 7])
def test_aliases_are_a_table(bad: Any, tmp_path: Path) -> None:
    assert "write [aliases]" in mistake(file=write(tmp_path / "llmq.json", {"aliases": bad}))
    with pytest.raises(llmq.ConfigError, match=r"write \[aliases\]"):
        build_settings({"aliases": bad})


# ---- Mistakes --------------------------------------------------------------------------------
# tests/test_process.py has one of each kind as a user meets it; here every setting has its own.


def wrong_values(row: Any) -> list[Any]:
    """What this setting may not be, in any source."""
    wrong: dict[str, list[Any]] = {
        "int": ["", "x", "-1", "1.5", "1e3", "0x10", "9" * 16],
        "Duration": ["", "x", "-1s", "5 parsecs", "1h30m"],
        "Size": ["", "x", "-1", "8 elephants", "1TiB"],
        "str": ["other"] if row.choices else [],
        "bool": ["", "maybe", "2"],
        "Names": [],
        "File": [],
        "BasePath": ["/a b", "//a", "/a//b", "/../a", "/a?b", "/%41"],
        "Addresses": ["localhost", "10.0.0.256", "10.0.0.0/8"],
    }
    low = [str(row.minimum - 1)] if row.type in ("int", "Size") and row.minimum >= 1 else []
    low += ["0"] if row.type == "Duration" and row.minimum else []
    return wrong[row.type] + low


def wrong_types(row: Any) -> list[Any]:
    """What a file may not say."""
    wrong: list[Any] = [None, {}, [1]]
    wrong += [] if row.type in LISTS else [["a"]]
    wrong += [True] if row.type != "bool" else []
    return wrong + ([1.5] if row.type in ("int", "str", "File", *LISTS) else [])


@pytest.mark.parametrize("row", ROWS, ids=KEYS)
def test_bad_value_is_told_with_source_key_and_cure(row: Any, tmp_path: Path) -> None:
    table, name = row.key.split(".")
    cure = r"wants|write|choose one of|at most"
    for bad in wrong_values(row):
        for line, source in (
            (mistake(environ={row.variable: bad}), row.variable),
            (mistake(**{row.key: bad}), row.flag),
        ):
            assert source in line
            assert row.key in line
            assert re.search(cure, line), line
    for bad in wrong_values(row) + wrong_types(row):
        file = write(tmp_path / "llmq.json", {table: {name: bad}})
        line = mistake(file=file)
        assert line.startswith(f"{file}: ")
        assert row.key in line
        assert re.search(cure, line), line


def test_value_beyond_a_bound_is_told_the_bound() -> None:
    assert "at least 1" in mistake(queue__slots="0")
    assert "65535" in mistake(environ={"PORT": "65536"})
    assert "0.01" in mistake(upstream__idle_timeout="1ms")


@pytest.mark.parametrize("row", ROWS, ids=KEYS)
def test_misspelt_key_is_told_the_right_one(row: Any, tmp_path: Path) -> None:
    table, name = row.key.split(".")
    line = mistake(file=write(tmp_path / "llmq.json", {table: {name + "x": 1}}))
    assert f"{table}.{name}x" in line
    assert f"did you mean {row.key}?" in line
    line = mistake(environ={row.variable + "X": "1"})
    assert f"did you mean {row.variable}?" in line


def test_word_that_is_near_to_none_is_told_them_all(tmp_path: Path) -> None:
    line = mistake(file=write(tmp_path / "llmq.json", {"zzz": {}}))
    assert all(table in line for table in (*llmq.TABLES, *llmq.OWN_TABLES))


def test_values_in_a_message_are_short_and_printable() -> None:
    line = mistake(environ={"PORT": "7\x1b[31m\n" + "9" * 500})
    assert line.isprintable()
    assert len(line) < 200


# ---- Shown and written -----------------------------------------------------------------------


def test_settings_that_were_shown_are_read_the_same(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    for row in ROWS:
        values[row.key] = next(text for text, value in written(row) if value != row.default)
    values["backends"] = {"a": {"url": "http://a:1", "key": "k", "kind": "ollama", "slots": 2}}
    values["devices"] = {"a": {"slots": 3}}
    values["clients"] = {"user:alice": {"class": "low", "weight": 2.5}}
    values["models"] = {"qwen3:*": {"exclusive": True, "set": {"seed": 1}}}
    values["rules"] = [{"route": "/api/*", "class": "low"}]
    values["aliases"] = ALIASES
    settings = build_settings(values)
    shown = write(tmp_path / "llmq.json", llmq.as_document(settings))
    assert read(file=shown)[0] == settings
    default = write(tmp_path / "default.json", llmq.as_document(llmq.Settings()))
    assert read(file=default)[0] == llmq.Settings()


@pytest.mark.parametrize("row", ROWS, ids=KEYS)
def test_default_that_is_shown_may_be_written(row: Any) -> None:
    assert value_of(read({row.variable: row.shown_default})[0], row.key) == row.default


def test_markdown_has_one_row_for_each_setting() -> None:
    _, _, *lines = settings_markdown().splitlines()
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS):
        assert line.startswith(f"| `{row.flag}` | `{row.variable}`")
        assert line.endswith(f" | {row.help} |")
        assert f"| {row.shown_default} |" in line
        assert not row.env_alias or f"`{row.env_alias}`" in line
        assert line.count("|") == 5


def test_no_two_settings_share_a_name() -> None:
    for names in ([r.key for r in ROWS], [r.flag for r in ROWS], [r.variable for r in ROWS]):
        assert len(set(names)) == len(names)


# ---- Every setting has an effect that a test sees --------------------------------------------

EFFECTS = {
    "router.degrade": "test_auto.py::test_smaller_model_of_the_row_goes_where_memory_is_too_short",
    "router.require_gpu": "test_auto.py::test_split_model_is_refused_where_it_must_be_on_the_gpu",
    "devices.vram_gb": "test_cards.py::test_memory_that_is_configured_counts_in_place_of_cards",
    "devices.vram_reserve_gb": "test_cards.py::test_reserve_may_be_said_of_what_cards_tell",
    "models.size_gb": "test_auto.py::test_size_of_the_settings_goes_over_what_a_runner_tells",
    "models.purpose": "test_auto.py::test_purpose_says_what_a_model_is_good_at",
    "models.tags": "test_auto.py::test_tags_say_what_a_runner_does_not",
    "models.context": "test_auto.py::test_context_of_the_settings_goes_over_what_a_runner_tells",
    "routes": "test_auto.py::test_task_without_a_row_goes_by_the_row_of_unknown_and_else_by_all",
    "cache.embeddings": "test_cache.py"
    "::test_reload_switches_it_off_and_frees_its_memory_and_on_again",
    "cache.chat": "test_cache.py"
    "::test_chat_that_leaves_nothing_to_chance_is_kept_where_that_is_wanted",
    "cache.max_bytes": "test_cache.py"
    "::test_the_setting_bounds_what_is_in_memory_also_after_a_reload",
    "cache.embeddings_ttl": "test_cache.py::test_answers_are_kept_as_long_as_their_route_says",
    "cache.chat_ttl": "test_cache.py::test_answers_are_kept_as_long_as_their_route_says",
    "cache.persist": "test_cache_file.py"
    "::test_answers_of_a_runner_with_digests_outlive_a_restart_where_wanted",
    "jobs.result_ttl": "test_jobs.py"
    "::test_a_result_is_kept_for_its_time_and_its_job_for_as_long_again",
    "jobs.max_attempts": "test_jobs.py"
    "::test_a_runner_that_breaks_is_asked_as_often_as_a_job_may_begin",
    "jobs.max_bytes": "test_durable.py::test_a_file_that_has_all_bytes_it_may_is_507",
    "webhooks.url": "test_webhooks.py::test_new_row_is_told_and_a_removed_one_is_not",
    "webhooks.events": "test_webhooks.py"
    "::test_each_service_gets_what_it_wants_and_all_without_a_word",
    "webhooks.secret": "test_webhooks.py"
    "::test_what_is_sent_is_signed_json_with_event_and_timestamp",
    "server.require_key": "test_keys.py"
    "::test_every_row_is_free_for_this_box_where_only_others_need_a_key",
    "server.base_path": "test_base_path.py::test_every_route_is_under_the_base_and_nowhere_else",
    "server.tls_cert": "test_tls.py::test_official_library_trusts_the_ca_and_chats",
    "server.tls_key": "test_tls.py::test_certificate_key_and_chain_may_be_in_one_file",
    "server.tls_client_ca": "test_tls.py::test_only_clients_with_a_certificate_of_the_ca_get_in",
    "keys.class": "test_keys.py::test_class_of_a_key_is_its_default_and_max_class_its_most",
    "keys.max_class": "test_keys.py::test_class_of_a_key_is_its_default_and_max_class_its_most",
    "keys.max_concurrent": "test_keys.py"
    "::test_caps_hold_exactly_for_a_hundred_clients_of_four_keys",
    "keys.models": "test_keys.py::test_key_may_use_the_models_that_its_patterns_fit",
    "keys.rights": "test_keys.py::test_every_row_wants_a_key_that_has_its_right",
    "keys.key": "test_keys.py::test_every_row_wants_a_key_that_has_its_right",
    "keys.key_hash": "test_keys.py::test_keys_by_hash_file_and_variable_let_in",
    "keys.max_waiting": "test_keys.py::test_caps_hold_exactly_for_a_hundred_clients_of_four_keys",
    "keys.rate": "test_keys.py::test_rate_allows_a_burst_and_then_one_per_its_share_of_the_time",
    "keys.tokens_per_day": "test_keys.py"
    "::test_budget_ends_with_the_tokens_and_the_day_gives_it_back",
    "keys.ips": "test_keys.py::test_key_counts_only_from_its_networks",
    "ports.class": "test_ports.py"
    "::test_class_of_a_port_is_the_default_and_its_max_class_the_ceiling",
    "ports.max_class": "test_ports.py"
    "::test_class_of_a_port_is_the_default_and_its_max_class_the_ceiling",
    "ports.max_concurrent": "test_ports.py"
    "::test_max_concurrent_of_a_port_holds_and_is_freed_on_every_way_out",
    "ports.models": "test_ports.py::test_models_of_a_port_are_the_only_ones_it_may_use",
    "ports.rights": "test_ports.py::test_rights_of_a_port_open_what_they_name_and_nothing_else",
    "ports.client": "test_ports.py::test_who_comes_to_a_port_is_its_client_and_needs_no_key",
    "ports.bind": "test_ports.py::test_mistake_in_a_port_on_reload_changes_nothing",
    "ports.public": "test_ports.py::test_mistake_in_a_port_on_reload_changes_nothing",
    "ports.upstream": "test_ports.py::test_header_fields_of_the_row_go_in_place_of_the_clients",
    "ports.headers": "test_ports.py::test_header_fields_of_the_row_go_in_place_of_the_clients",
    "ports.timeout": "test_ports.py::test_service_that_says_nothing_is_a_504_after_its_timeout",
    "server.host": "test_service.py::test_host_is_where_it_listens",
    "server.port": "test_service.py::test_port_is_where_it_listens",
    "server.allowed_hosts": "test_wire_host.py"
    "::test_allowed_hosts_are_exact_names_and_the_cure_that_the_403_gives_works",
    "server.cors_origins": "test_wire_cors.py::test_cors_origins_narrow_the_grant_to_those_named",
    "server.allow_anonymous_lan": "test_service.py"
    "::test_listening_for_the_network_needs_leave_and_then_works",
    "server.allow_all_routes": "test_fleet.py"
    "::test_unknown_paths_are_404_unless_all_routes_are_allowed",
    "server.watch": "test_fleet.py::test_watch_off_leaves_the_file_alone",
    "server.trusted_proxies": "test_identity.py"
    "::test_trusted_proxies_tell_the_address_in_the_last_entry",
    "server.state": "test_store.py::test_changes_at_run_time_outlive_a_kill",
    "server.head_timeout": "test_wire_deadlines.py"
    "::test_heads_that_are_never_complete_end_at_the_deadline",
    "server.body_timeout": "test_wire_deadlines.py::test_body_timeout_counts_from_the_last_byte",
    "server.upload_timeout": "test_wire_deadlines.py"
    "::test_whole_upload_has_a_deadline_that_dripping_does_not_move",
    "server.keep_alive": "test_wire_deadlines.py::test_idle_connection_is_closed_in_good_order",
    "server.stall_timeout": "test_leaving.py"
    "::test_a_client_that_takes_nothing_meets_back_pressure_then_counts_as_gone",
    "server.drain_timeout": "test_process.py"
    "::test_a_drain_ends_at_its_limit_and_what_still_runs_is_told",
    "server.heartbeat_after": "test_heartbeat.py"
    "::test_waiting_request_hears_signs_of_life_and_then_its_whole_answer",
    "server.heartbeat_interval": "test_heartbeat.py::test_interval_is_the_time_between_two_signs",
    "server.whole_heartbeat_after": "test_heartbeat.py"
    "::test_streams_and_whole_bodies_begin_at_their_own_times",
    "server.max_body": "test_wire_framing.py"
    "::test_body_up_to_the_limit_passes_and_one_byte_more_is_413",
    "queue.slots": "test_load.py::test_a_burst_of_three_hundred_is_served_each_its_own",
    "queue.max_depth": "test_load.py::test_a_full_queue_refuses_and_takes_again_when_somebody_left",
    "queue.max_queued_bytes": "test_load.py"
    "::test_queued_bytes_are_limited_in_all_and_for_one_client",
    "queue.max_attempts": "test_upstream_faults.py::test_attempts_end_at_their_number",
    "queue.max_wait_high": "test_gateway.py::test_each_class_has_its_own_longest_wait",
    "queue.max_wait_normal": "test_gateway.py::test_each_class_has_its_own_longest_wait",
    "queue.max_wait_low": "test_gateway.py::test_each_class_has_its_own_longest_wait",
    "queue.down_wait": "test_upstream_faults.py"
    "::test_a_backend_that_stays_down_is_told_after_the_wait",
    "upstream.model": "test_gateway.py::test_request_without_a_model_gets_the_one_that_is_set",
    "upstream.connect_timeout": "test_upstream_faults.py"
    "::test_a_connection_that_is_not_answered_is_a_502_in_time",
    "upstream.first_byte_timeout": "test_upstream_faults.py"
    "::test_a_silent_backend_is_a_504_and_is_cut_off_before_the_next_starts",
    "upstream.idle_timeout": "test_upstream_faults.py"
    "::test_a_stream_that_falls_silent_ends_in_an_error",
    "upstream.max_answer": "test_gateway.py::test_answer_beyond_the_largest_is_a_502",
    "upstream.num_ctx": "test_context.py::test_starting_context_is_what_models_begin_with",
    "upstream.max_num_ctx": "test_context.py::test_max_num_ctx_is_the_most",
    "upstream.probe_interval": "test_background.py::test_backend_is_looked_at_again_after_a_while",
    "upstream.probe_timeout": "test_background.py"
    "::test_backend_that_does_not_answer_a_look_in_time_is_down",
    "log.file": "test_service.py"
    "::test_log_file_is_opened_anew_on_sighup_and_nothing_is_lost_or_doubled",
    "router.gpu_interval": "test_cards.py"
    "::test_cards_are_looked_at_once_in_each_interval_while_they_are_wanted",
    "router.nvidia_smi": "test_cards.py::test_requests_cause_no_look_of_their_own",
    "log.format": "test_service.py::test_log_as_json_has_one_object_with_these_facts_a_line",
    "log.level": "test_service.py::test_log_level_is_the_least_that_is_logged",
    "ips.blocked": "test_identity.py::test_blocked_ips_are_refused_also_behind_a_proxy",
    "clients.class": "test_identity.py"
    "::test_class_of_a_request_is_asked_for_or_ruled_or_its_clients_or_its_models",
    "clients.blocked": "test_identity.py::test_blocked_by_the_file_holds_for_that_one_alone",
    "models.class": "test_identity.py"
    "::test_class_of_a_request_is_asked_for_or_ruled_or_its_clients_or_its_models",
    "rules.route": "test_identity.py"
    "::test_the_reason_of_who_waits_names_the_rule_until_the_class_is_changed",
    "rules.model": "test_identity.py"
    "::test_the_reason_of_who_waits_names_the_rule_until_the_class_is_changed",
    "rules.client": "test_identity.py"
    "::test_class_of_a_request_is_asked_for_or_ruled_or_its_clients_or_its_models",
    "rules.header": "test_identity.py"
    "::test_class_of_a_request_is_asked_for_or_ruled_or_its_clients_or_its_models",
    "rules.class": "test_identity.py"
    "::test_class_of_a_request_is_asked_for_or_ruled_or_its_clients_or_its_models",
    "devices.slots": "test_service.py::test_slots_of_a_device_are_the_most_at_once_there",
    "backends.url": "test_upstream_faults.py::test_two_backends_on_one_host_share_one_slot",
    "backends.device": "test_upstream_faults.py"
    "::test_the_device_setting_splits_backends_on_one_host",
    "backends.slots": "test_upstream_faults.py"
    "::test_a_backend_may_have_fewer_slots_than_its_device",
    "backends.kind": "test_background.py::test_kind_that_is_set_is_not_asked_for",
    "backends.key": "test_upstream_faults.py::test_the_key_of_a_backend_comes_from_the_settings",
    "queue.max_depth_high": "test_fair.py::test_each_class_has_its_own_depth",
    "queue.max_depth_normal": "test_fair.py::test_each_class_has_its_own_depth",
    "queue.max_depth_low": "test_fair.py::test_each_class_has_its_own_depth",
    "queue.overflow_status": "test_fair.py::test_each_class_has_its_own_depth",
    "queue.aging": "test_fair.py"
    "::test_overdue_request_starts_within_eight_starts_and_keeps_its_class",
    "queue.affinity": "test_fair.py::test_affinity_lets_the_loaded_model_go_first_for_so_long",
    "devices.reserve_high": "test_fair.py::test_reserved_slots_are_for_class_high",
    "backends.weight": "test_fair.py::test_equal_backends_share_by_their_weights",
    "clients.weight": "test_fair.py::test_weight_two_is_two_starts_of_three",
    "clients.boost": "test_fair.py::test_boosted_client_has_every_second_start_of_its_class",
    "clients.max_concurrent": "test_fair.py::test_client_at_its_max_concurrent_holds_up_nobody",
    "clients.max_waiting": "test_fair.py::test_client_may_have_max_waiting_and_no_more",
    "models.max_concurrent": "test_fair.py::test_model_at_its_max_concurrent_holds_up_nobody",
    "models.exclusive": "test_fair.py"
    "::test_exclusive_model_runs_alone_on_its_device_and_gets_its_turn",
    "models.backends": "test_fair.py::test_model_goes_only_to_the_backends_that_are_named_for_it",
    "backends.headers": "test_fleet.py"
    "::test_headers_of_a_backend_are_on_every_request_in_place_of_others",
    "backends.relay_headers": "test_fleet.py"
    "::test_relay_headers_pass_on_what_is_named_but_never_a_key",
    "backends.models": "test_fleet.py"
    "::test_models_that_are_listed_are_not_asked_for_and_any_answer_is_health",
    "backends.probe_interval": "test_fleet.py"
    "::test_probe_timeout_and_interval_of_a_backend_are_its_own",
    "backends.probe_timeout": "test_fleet.py"
    "::test_probe_timeout_and_interval_of_a_backend_are_its_own",
    "backends.first_byte_timeout": "test_fleet.py"
    "::test_first_byte_timeout_of_a_backend_ends_what_it_does_not_answer",
    "backends.idle_timeout": "test_fleet.py"
    "::test_idle_timeout_of_a_backend_ends_a_stream_that_falls_silent",
    "backends.failures_to_open": "test_fleet.py"
    "::test_failures_to_open_are_those_in_a_row_after_which_it_is_down",
    "backends.reset_after": "test_fleet.py"
    "::test_reset_after_is_the_longest_until_a_backend_that_is_down_is_tried_again",
    "models.keep_alive": "test_models.py"
    "::test_keep_alive_is_what_ollama_is_told_where_the_request_says_none",
    "models.keep_alive_force": "test_models.py"
    "::test_keep_alive_that_is_forced_holds_over_the_requests_and_lets_it_be_unloaded",
    "models.num_ctx": "test_models.py"
    "::test_num_ctx_of_a_model_is_what_it_starts_with_instead_of_the_usual",
    "models.preload": "test_models.py"
    "::test_preload_loads_at_the_start_and_after_a_return_with_its_own_context",
    "models.set": "test_models.py::test_set_and_strip_reach_the_runner",
    "models.strip": "test_models.py::test_set_and_strip_reach_the_runner",
    "models.max_output": "test_models.py::test_max_output_holds_in_each_dialect_and_translated",
    "models.overflow": "test_models.py::test_overflow_refused_is_an_error_in_the_callers_dialect",
    "aliases": "test_reads.py::test_alias_leads_to_its_model_in_every_dialect",
}


def named_settings() -> list[str]:
    """What is set in tables whose keys are the user's."""
    rows = [row.key for row in llmq.known_settings(llmq.ROW_TABLES)]
    return rows + [table for table in llmq.OWN_TABLES if table not in llmq.ROW_TABLES]


def test_every_setting_has_a_tested_effect() -> None:
    assert sorted(EFFECTS) == sorted(KEYS + named_settings())


@pytest.mark.parametrize("key", EFFECTS)
def test_test_of_an_effect_exists_and_its_file_uses_the_setting(key: str) -> None:
    name, _, test = EFFECTS[key].partition("::")
    source = (ROOT / "tests" / name).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE)
    table, _, setting = key.rpartition(".")
    spellings = [f"{table}__{setting}", f"{table}.{setting}", setting, setting.replace("_", "-")]
    spellings += [setting[:-1].replace("_", "-")] if setting.endswith("s") else []
    assert re.search("|".join(map(re.escape, spellings)), source)


BOX = llmq.known_settings({"backends.box": llmq.BackendSettings})
BOX_KEY = next(row for row in BOX if row.key == "backends.box.key")


@pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "schlüssel", "two words", 12345, "***", "\x7f"])
def test_key_that_no_header_can_carry_is_refused_and_not_shown(key: Any) -> None:
    with pytest.raises(llmq.ConfigError) as refused:
        llmq.parse_value("file", BOX_KEY, key)
    assert str(key) not in str(refused.value)


def test_shown_model_rows_hold_what_was_said_and_no_more(tmp_path: Path) -> None:
    """Else a row would take back, read again, what a pattern says."""
    models = {"*": {"exclusive": True}, "m": {"max_concurrent": 2}, "n": {"exclusive": False}}
    shown = llmq.as_document(build_settings({"models": models}))
    assert shown["models"] == models
    again = read(file=write(tmp_path / "llmq.json", shown))[0]
    alone = [llmq.policy_of(again.models, key).exclusive for key in "mn"]
    assert alone == [True, False]


def test_reserve_leaves_a_slot_for_others(tmp_path: Path) -> None:
    file = write(tmp_path / "llmq.json", {"devices": {"gpu": {"slots": 2, "reserve_high": 2}}})
    line = mistake(file=file)
    assert "devices.gpu.reserve_high: wants fewer than its 2 slots" in line
