"""The README says what is: its tables are the derived ones, its commands work.

`python3 -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import llmq
from tests.derived import (
    metrics_markdown,
    routes_markdown,
    row_title,
    rows_markdown,
    settings_markdown,
)
from tests.fakes import (
    ROOT,
    FakeBackend,
    Process,
    Raw,
    ask,
    chat,
    eventually,
    free_port,
    http,
    need,
    require_command,
    run_llmq,
    running,
)
from tests.prompts import tasks_markdown
from tests.real import peers
from tests.test_base_path import CADDY_LINES, NGINX_LINES
from tests.test_client_matrix import clients_markdown

README = ROOT / "README.md"


TABLES = {
    "settings": settings_markdown,
    "routes": routes_markdown,
    "clients": clients_markdown,
    "metrics": metrics_markdown,
    "rows": rows_markdown,
    "tasks": tasks_markdown,
}


def filled(text: str) -> str:
    """The README with its tables as they are derived."""
    for name, derive in TABLES.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL)
        start, end = marks.search(text).span(1)[1], marks.search(text).span(2)[0]
        text = f"{text[:start]}{derive()}\n{text[end:]}"
    return text


def test_tables_are_the_derived_ones():
    text = README.read_text(encoding="utf-8")
    assert text == filled(text), "run python3 -m tests.test_readme"


def test_comparison_is_measured():
    text = README.read_text(encoding="utf-8")
    table = text.partition("<!-- comparison -->")[2].partition("<!-- /comparison -->")[0]
    assert "| dispatch gap" in table
    assert "llm-queue" in table


def test_every_flag_that_is_named_exists():
    known = {row.flag for row in llmq.known_settings()}
    known |= flags_of_commands()
    known |= {"--system-site-packages", "--pictures"}  # of Python's venv, and of the replay
    known |= {
        "--no-install-recommends",
        "--system",
        "--uid",
    }  # of apt and useradd, in the container
    known |= {one for cell, _ in migrations() for one in re.findall(r"--[a-z][a-z-]+", cell)}
    for path in ("install.sh", "tray/llmq_tray.py"):
        known |= set(re.findall(r"--[a-z][a-z-]+", (ROOT / path).read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README.read_text(encoding="utf-8")))
    assert named <= known


def flags_of_commands() -> set[str]:
    """Those that no setting is behind."""
    command = llmq.build_parser().parse_args
    lines = ("serve", "top", "run", "models", "jobs", "usage", "config show")
    parsers = [llmq.build_parser(), *(command(line.split()).parser for line in lines)]
    texts = [parser.format_help() for parser in parsers]
    return {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}


# ---- The example file ------------------------------------------------------------------------


def between(name: str) -> str:
    """What stands between two marks of the README."""
    text = README.read_text(encoding="utf-8")
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


SECRETS = {
    "RACK_KEY": "k-rack",
    "METRICS_KEY": "k-metrics",
    "SEARCH_TOKEN": "t-search",
    "DESK_HOOK": "https://chat.home/hooks/t-desk",
    "DESK_SECRET": "s-desk",
}


def example() -> str:
    return between("example").partition("```toml\n")[2].partition("```")[0]


def as_json(toml: str) -> dict[str, Any]:
    """The same as JSON, of the little of TOML that the example needs; any Python can read it."""
    document: dict[str, Any] = {}
    table = document
    for line in toml.splitlines():
        text = re.sub(r"\s+#.*$", "", line)
        if text.startswith("[["):
            document.setdefault(text.strip("[]"), []).append({})
            table = document[text.strip("[]")][-1]
        elif text.startswith("["):
            table = document
            for quoted, bare in re.findall(r'"([^"]+)"|([\w-]+)', text):
                table = table.setdefault(quoted or bare, {})
        elif text:
            key, _, value = text.partition(" = ")
            value = re.sub(r"\{ ([\w-]+) = (.*) \}", r'{"\1": \2}', value)
            table[key.strip('"')] = json.loads(value)
    return document


@pytest.fixture(params=["toml", "json"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The example as a user has saved it."""
    if request.param == "toml" and sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    path = tmp_path / f"llmq.{request.param}"
    toml = request.param == "toml"
    path.write_text(example() if toml else json.dumps(as_json(example())), encoding="utf-8")
    return path


def test_example_file_is_accepted(file: Path) -> None:
    checked = run_llmq("config", "check", "--config", str(file), env=SECRETS)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == "the configuration is good\n"


@pytest.mark.parametrize("name", SECRETS)
def test_example_file_wants_its_variables(file: Path, name: str) -> None:
    env = {**SECRETS, name: ""}
    checked = run_llmq("config", "check", "--config", str(file), env=env)
    assert checked.returncode == 2
    assert f"the variable {name} is not set, or empty" in checked.stderr


def test_example_file_is_shown_without_its_secrets(file: Path) -> None:
    for form in ((), ("--json",)):
        shown = run_llmq("config", "show", *form, "--config", str(file), env=SECRETS)
        assert shown.returncode == 0
        hashes = re.findall("sha256:([0-9a-f]+)", example())
        assert not [one for one in (*SECRETS.values(), *hashes) if one in shown.stdout]
        assert "***" in shown.stdout


def test_example_file_is_the_same_in_both_forms() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    import tomllib

    assert tomllib.loads(example()) == as_json(example())


def test_example_file_shows_every_table_with_rows_and_explains_each_line() -> None:
    shown = as_json(example())
    assert set(llmq.OWN_TABLES) <= set(shown)
    assert len(shown["backends"]) == 3
    lines = [line for line in example().splitlines() if " = " in line and "#" not in line]
    plain = ("url = ", 'class = "', 'device = "', "slots = ")  # said once, or by their own name
    assert [line for line in lines if not line.startswith(plain)] == []


# ---- Who may -----------------------------------------------------------------------------------


def section(title: str) -> str:
    text = README.read_text(encoding="utf-8")
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_lines_that_llmq_key_prints_let_its_key_in(tmp_path: Path) -> None:
    made = run_llmq("key", "alice")
    key = made.stdout.partition("shown only now: ")[2].split()[0]
    lines = made.stdout.partition("for the file:\n\n")[2]
    assert key not in lines
    rows = as_json(lines)["keys"]
    assert llmq.merge_layers([("file", {"keys": rows})]).keys["alice"].rights == ("infer",)
    if sys.version_info >= (3, 11):
        path = tmp_path / "llmq.toml"
        path.write_text(lines, encoding="utf-8")
        assert run_llmq("config", "check", "--config", str(path)).returncode == 0
    accounts = llmq.Accounts()
    accounts.configure(llmq.merge_layers([("file", {"keys": rows})]))
    account = accounts.of_key(key, "127.0.0.1", 0.0)
    assert account is not None
    assert account.name == "alice"


LIBRARIES = {
    "OPENAI_API_KEY": "from openai import OpenAI as C; C(base_url=url + '/v1').models.list()",
    "ANTHROPIC_API_KEY": "from anthropic import Anthropic as C; C(base_url=url).models.list()",
    "OLLAMA_API_KEY": "from ollama import Client as C; C(host=url).list()",
}


@pytest.mark.deadline(40)
@pytest.mark.parametrize("variable", LIBRARIES)
async def test_libraries_take_the_key_from_their_variable(variable: str) -> None:
    assert f"`{variable}`" in section("Who may")
    try:
        python = peers.python()
    except peers.Missing as reason:
        need(False, str(reason))

    async def listed(key: str) -> int:
        program = ["-c", f"import sys; url = sys.argv[1]; {LIBRARIES[variable]}", q.base]
        env = {"PATH": os.environ["PATH"], "HOME": "/nowhere", variable: key}
        quiet = {"stdout": asyncio.subprocess.DEVNULL, "stderr": asyncio.subprocess.DEVNULL}
        process = await asyncio.create_subprocess_exec(python, *program, env=env, **quiet)
        return await process.wait()

    async with running("http://127.0.0.1:9", keys={"alice": {"key": "k-alice"}}) as q:
        assert await listed("k-alice") == 0
        assert await listed("k-bob") == 1


def test_each_piece_of_a_file_in_who_may_is_accepted(tmp_path: Path) -> None:
    pieces = re.findall(r"```toml\n(.*?)```", section("Who may"), re.DOTALL)
    assert len(pieces) == 2
    for piece in pieces:
        path = tmp_path / "llmq.json"
        path.write_text(json.dumps(as_json(piece)), encoding="utf-8")
        checked = run_llmq("config", "check", "--config", str(path), env=SECRETS)
        assert (checked.returncode, checked.stderr) == (0, "")


async def test_pages_in_a_browser_of_this_box_may_use_models_where_it_needs_no_key() -> None:
    port, evil = free_port(), {"Origin": "https://evil.example"}
    more: Any = {"keys": {"alice": {"key": "k"}}, "server__require_key": "remote"}
    async with running("http://127.0.0.1:9", ports={str(port): {}}, **more) as q:
        for one in (q.port, port):
            assert (await ask(one, "GET", "/v1/models", headers=evil)).status == 200
            assert (await ask(one, "GET", "/llmq/status", headers=evil)).status == 403


def test_guesses_from_ipv6_count_for_their_network() -> None:
    accounts = llmq.Accounts()
    accounts.configure(llmq.merge_layers([("file", {"keys": {"alice": {"key": "k"}}})]))
    for number in range(llmq.GUESSES):
        assert accounts.of_key("wrong", f"2001:db8::{number}", 0.0) is None
    with pytest.raises(llmq.LlmqError, match="too many wrong keys"):
        accounts.of_key("k", "2001:db8::abcd", 0.0)
    assert accounts.of_key("k", "2001:db8:0:1::1", 0.0)


async def test_what_goes_to_another_service_is_not_in_the_log(tmp_path: Path) -> None:
    port, path = free_port(), tmp_path / "llmq.json"
    async with FakeBackend() as other:
        path.write_text(json.dumps({"ports": {str(port): {"upstream": other.url}}}))
        async with Process("--demo", "--port", "0", "--config", str(path)) as p:
            assert (await ask(port, "GET", "/v1/models?of=another")).status == 200
            assert (await ask(p.port, "POST", "/v1/chat/completions", json=chat("x"))).status == 404
            await p.line("404 /v1/chat/completions")
            assert "/v1/models" not in p.output


# ---- Behind a reverse proxy


def lines_for(name: str) -> str:
    return between(name).partition("\n")[2].partition("```")[0]


def test_the_lines_for_proxies_are_the_tried_ones() -> None:
    assert lines_for("nginx").strip() == NGINX_LINES.strip()
    assert lines_for("caddy").strip() == CADDY_LINES.strip()


PROXIES = {
    "nginx": """daemon off; user root; pid {folder}/pid; error_log {folder}/log; events {{ }}
        http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
        fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
        server {{ listen 127.0.0.1:{port};\n{lines} }} }}""",
    "caddy": """{{\nadmin off\nauto_https off\n}}
        http://:{port} {{\nbind 127.0.0.1\n{lines}\n}}""",
}


@contextlib.asynccontextmanager
async def proxy(name: str, llmq_port: int, folder: Path) -> AsyncIterator[int]:
    """The port of a proxy that has the README's lines, but for the port of its llmq."""
    program, port, config = require_command(name), free_port(), folder / f"{name}.conf"
    lines = lines_for(name).replace("127.0.0.1:11500", f"127.0.0.1:{llmq_port}")
    text = PROXIES[name].format(folder=folder, port=port, lines=lines)
    config.write_text(text, encoding="utf-8")
    run = ["run", "--adapter", "caddyfile", "--config"] if name == "caddy" else ["-p", folder, "-c"]
    process = await asyncio.create_subprocess_exec(
        program,
        *run,
        config,
        env={"HOME": str(folder), "PATH": os.environ["PATH"]},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await eventually(lambda: listens(port) or process.returncode is not None)
        assert process.returncode is None, name
        yield port
    finally:
        process.terminate()
        await process.wait()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


async def from_second(port: int, headers: dict[str, str]) -> int:
    """The status that a client gets whose address is another one of this box."""
    sock = socket.socket()
    sock.bind(("127.0.0.2", 0))
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    async with Raw(sock) as raw:
        await raw.send(http("GET", "/llm/api/tags", {"Connection": "close", **headers}))
        return (await raw.response()).status


@pytest.mark.parametrize("name", PROXIES)
async def test_who_asks_is_told_by_the_proxy_whatever_the_client_says(
    name: str, tmp_path: Path
) -> None:
    settings: Any = {"server__base_path": "/llm", "server__trusted_proxies": ["127.0.0.1"]}
    keys = {"second": {"key": "k-second", "ips": ["127.0.0.2"]}}
    async with running("http://127.0.0.1:9", keys=keys, **settings) as q:
        async with proxy(name, q.port, tmp_path) as port:
            assert (await ask(port, "GET", "/llm/health")).body == b"ok"
            key = {"Authorization": "Bearer k-second"}
            lie = {**key, "X-Forwarded-For": "127.0.0.2"}
            for headers in (key, lie):
                assert (await ask(port, "GET", "/llm/api/tags", headers=headers)).status == 403
            assert await from_second(port, key) == 200


# ---- The ways from others --------------------------------------------------------------------

OTHERS = """false class action model backend load unload models llmq top q true mode paused open
    control json waiting config init check router server unknown url""".split()  # noqa: SIM905


def migration(name: str = "migration") -> list[tuple[str, str]]:
    """What another queue has, and what llmq has in its place."""
    rows = [line.strip("| ").split(" | ") for line in between(name).splitlines()[2:]]
    return [(theirs, ours) for theirs, ours in rows]


TABLES_OF_QUEUES = ("migration", "migration-oqp", "migration-sidecar", "migration-router")


def migrations() -> list[tuple[str, str]]:
    return [row for name in TABLES_OF_QUEUES for row in migration(name)]


# Of ollamaMQ 0.3: what its command line, its entry point, its file, its screen and HTTP have.
THEIRS = """
    -p --port -H --host -b -o --backend-urls --ollama-urls -t --timeout --no-tui --allow-all-routes
    --load-keep-alive -c --model-config -h -V --version
    OLLAMA_MQ_API_KEY RUST_LOG BACKEND_URLS OLLAMA_URLS PORT HOST TIMEOUT
    backends settings port host timeout load_keep_alive allow_all_routes settings.stuck_timeout
    models name identifier max_ctx keep_alive max_concurrent_requests blocked_items.json
    j k Tab h l a L U r p b x X u ? q Esc
    X-User-ID X-API-Key Authorization /admin/models /admin/models/load /unload /health
""".split()  # noqa: SIM905 - a list of 60 words is no easier to read


@pytest.mark.parametrize("name", THEIRS)
def test_whatever_ollamamq_has_is_in_the_table(name: str) -> None:
    told = [one for theirs, _ in migration() for one in re.findall(r"`([^`]+)`", theirs)]
    assert name in " ".join(told).split(), name


# Of ollama-queue-proxy 0.2 and ollama-auth-sidecar 0.1: every key of their files, every variable,
# what their HTTP has.
OTHER_QUEUES = {
    "migration-oqp": """
        proxy.host proxy.port proxy.max_concurrent proxy.allow_model_management proxy.drain_timeout
        proxy.max_request_body_mb ollama.hosts[].url ollama.hosts[].name ollama.hosts[].weight
        ollama.hosts[].model_sync_interval ollama.health_check_interval ollama.request_timeout
        queue.high.max_depth queue.normal.max_depth queue.low.max_depth max_wait high_watermark_pct
        queue.overflow_status_code webhooks.enabled webhooks.url webhooks.events
        webhooks.allowed_hosts auth.enabled auth.keys[].key auth.keys[].client_id
        auth.keys[].description auth.keys[].max_priority auth.keys[].management
        auth.keys[].max_concurrent auth.rate_limit.max_failures auth.rate_limit.window_seconds
        client_injection.listeners[].listen_port client_injection.listeners[].inject_as
        client_injection.listeners[].bind client_injection.allow_public_injection
        routing.strategy routing.fallback routing.model_poll_timeout embedding_cache.enabled
        embedding_cache.backend embedding_cache.ttl embedding_cache.max_entry_bytes
        embedding_cache.key_prefix embedding_cache.connect_timeout keep_alive.default
        keep_alive.override logging.level logging.format OQP_CONFIG OQP_SECTION__KEY
        X-Queue-Priority X-Client-ID X-Queue-Wait-Time X-Queue-Position X-Failover-Host
        X-Failover-Exhausted X-Cache X-Request-ID Retry-After /queue/pause /queue/resume
        /queue/drain /queue/flush /queue/status /health /metrics""",
    "migration-sidecar": """
        services[].name services[].listen services[].upstream services[].timeout services[].headers
        ${NAME} CONFIG_PATH NGINX_BIND TEMPLATE_DIR X-Client-Name /health""",
}


def test_whatever_the_others_have_is_in_their_tables() -> None:
    for table, names in OTHER_QUEUES.items():
        told: set[str] = set()
        for theirs, _ in migration(table):
            tables = [""]
            for one in re.findall(r"`([^`]+)`", theirs):
                word = one.split()[-1]
                is_table = re.fullmatch(r"[a-z_.]+(\[\])?", word) and word in TABLES_OF_OTHERS
                tables = [*(tables if tables[-1] else []), word + "."] if is_table else tables
                told |= {word} if is_table else {f"{table}{word}" for table in tables}
        missing = set(names.split()) - told
        assert not missing, table


TABLES_OF_OTHERS = """proxy ollama ollama.hosts[] queue queue.high queue.normal queue.low webhooks
    auth auth.keys[] auth.rate_limit client_injection client_injection.listeners[] routing
    embedding_cache keep_alive logging services[]""".split()  # noqa: SIM905


# Of ollama-agent-router 0.1.9: its commands and flags, what its file has, its routes.
ROUTER = """
    serve -c --config init configure --wizard --detect -o --output --non-interactive
    --answers --dry-run --overwrite models.items name role sizeGb validate-config status
    models gpu jobs job result cancel -u --url -v --base-path server host port basePath
    requestBodyLimit server.https enabled certPath keyPath caPath ollama baseUrl
    openAiCompatiblePath nativeApiBasePath keepAlive requestTimeoutMs provider vramTotalMb
    vramSafetyReserveMb maxGpuUtilizationPct requireGpuOnlyByDefault intervalMs
    nvidiaSmiPath router defaultMode syncMaxQueueTimeMs heavyLoadQueueDepth
    heavyLoadGpuFreeMbThreshold defaultTaskType classification store resultTtlSeconds
    maxAttempts cleanupIntervalMs models[] purpose tags maxConcurrent exclusive priority
    costClass allowWhenBusy defaultContext maxContext timeoutMs routes queue
    globalMaxConcurrent globalMaxQueued perUserMaxQueued defaultPriority /v1/jobs
    /v1/jobs/{id}/result /v1/router/status /v1/router/models /v1/router/gpu
    /v1/router/execute /v1/router/jobs access /v1/admin /health /metrics LOG_LEVEL
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", ROUTER)
def test_whatever_agent_router_has_is_in_its_table(name: str) -> None:
    theirs = [one for one, _ in migration("migration-router")]
    told = re.findall(r"`([^`]+)`", " ".join(theirs))
    assert name in " ".join(told).split()


def test_what_the_tables_name_of_llmq_exists() -> None:
    told = [one for _, ours in migrations() for one in re.findall(r"`([^`]+)`", ours)]
    words = [word for one in told for word in re.split(r"[\s=]+", one)]
    rows = list(llmq.known_settings())
    settings = {row.flag: row for row in rows}
    variables = {row.variable for row in rows} | {row.env_alias for row in rows}
    variables |= {"LLMQ_BACKENDS", "OLLAMA_URL"}
    keys = {row.key.partition(".")[2] for row in rows}
    keys |= {row.key.partition(".")[2] for row in llmq.known_settings(llmq.ROW_TABLES)}
    tables = {f"[{name}]" for name in (*llmq.TABLES, "aliases", "routes")}
    tables |= {row_title(name) for name in llmq.ROW_TABLES} | {'[models."*"]'}
    for word in words:
        if word.startswith("--"):
            assert word in {*settings, *flags_of_commands()}, word
        elif word.isupper() and "_" in word:
            assert word in variables | {"LLMQ_CONFIG"}, word
        elif word.startswith("["):
            assert word in tables | {'["*"]'}, word
        elif word.startswith("/"):
            paths = {re.sub(r"\{.*", "NAME", route.path) for route in llmq.ROUTES}
            assert word in paths, word
        elif re.fullmatch(r"[a-z_]+", word):
            assert word in {*keys, *OTHERS}, word
    commands = {one.split()[1] for one in told if one.startswith("llmq ")}
    assert commands <= set(llmq.COMMANDS)


async def test_first_question_is_answered_as_shown():
    async with Process("--demo", "--port", "0") as p:
        body = chat("hello")
        del body["model"]
        answer = await ask(p.port, "POST", "/v1/chat/completions", json=body)
    assert answer.content == "hello"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
