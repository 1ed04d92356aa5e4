#!/usr/bin/env python3
"""llmq: one queue in front of the local LLM runners of a box.

    cron job ─────┐                                   ┌──► Ollama
    browser ──────┤      ┌─────────────────────┐      ├──► llama.cpp
    coding agent ─┼────► │ llmq: urgent first, │ ───► ┼──► LM Studio
    chat window ──┘      │ one at a time       │      └──► vLLM
                         └─────────────────────┘

Everybody asks llmq instead of the runner.  Each request waits its turn, goes to a runner that has
its model and a free slot, and ends in exactly one truthful answer: a failure never looks like a
success, a client that left costs nothing, a runner is never asked for more than its slots.

    python3 llmq.py             serve on http://127.0.0.1:11500
    python3 llmq.py --demo      the same with a built-in model: nothing else is needed to try it
    python3 llmq.py --help      everything else

The map.  A section uses only what stands above it; nothing above 24 awaits, opens a socket or
reads a clock.  Start reading at `Gateway.serve` in section 37: the life of one request.

  A  Words
     1. Errors         what a client is told instead of an answer
     2. Tools          durations, sizes, averages, JSON
     3. Kinds          the routes that requests queue for, and the kinds of runners
     4. Settings       every setting, declared once
     5. Layers         what a file, variables and flags say of them
     6. Metrics        what is counted, and how Prometheus reads it
  B  The queue
     7. Identity       who asks, and how urgently
     8. Backends       who serves: a runner, its device, slots, models and health
     9. Fair share     whose turn it is inside a class
    10. Fleet          all of them: where there is room, and which is picked
    11. Scheduler      who goes next
    12. Forecast       when, and why not yet
    13. Words          by which it tells what a prompt asks for
    14. Tasks          what a prompt asks for
    15. Model choice   which model `auto` is
    16. Cache          what was answered before
  C  HTTP
    17. Messages       bytes to heads and bodies, and back
    18. Bodies         JSON read without losing a byte of it
    19. Dialects       what all of them share: errors, streams, questions
    20. OpenAI         its endpoints, its errors, how its streams end
    21. Ollama         the same for Ollama's own routes
    22. Anthropic      the same for messages
    23. Translation    one dialect in the words of another
    24. Streams        how a coroutine reads a connection, and is woken
    25. Replies        whom a call answers: an exchange, several at once, a store
    26. Server         sockets towards the clients
    27. Upstream       sockets towards the runners
  D  The gateway
    28. Probes         what a backend has and how it does
    29. Cards          what graphics memory there is
    30. Calls          one request on its way, and its answer from a backend
    31. Records        what remains of it: log, metrics, the latest
    32. Store          what outlives a restart: one SQLite file, one thread
    33. Recall         what was answered before, or is being answered
    34. Jobs           what may be answered later, kept until it is
    35. Auto           what a choice of model is made from
    36. Admission      from a request to a call that may wait
    37. Gateway        the life of one request
    38. Models         what there is, and its management
    39. Leases         a device as a whole, for work that is no request
    40. Runs           how jobs run: a few at a time, as calls
    41. Batches        OpenAI's files and batches, of jobs
    42. Changes        what is changed at run time
    43. Background     what runs beside the requests: deadlines, heartbeats
    44. Webhooks       whom else it tells what happens
  E  Doors
    45. Access         which names, pages and keys may use a route
    46. Snapshot       what the outside sees
    47. Job routes     what clients ask of jobs, files and batches
    48. Connect        what programs are told, so that they ask llmq
    49. Handlers       what is answered at once
    50. Routes         which path leads where
    51. Demo           runners that only echo, and a busy home to look at
    52. Terminal view  `llmq top`: the snapshot in a terminal, keys to change it
    53. Service        start, reload, drain, stop
    54. Configuration  which file holds the settings, and what it refers to
    55. Process        a process that serves, and what it tells its service manager
    56. Setup          `llmq config init`: looks, asks, writes a file
    57. Asking         how commands ask a running llmq
    58. Command line   what a person types: serve, status, top, key and the others
    59. Web page       what a browser is shown
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 - 3.8 can parse this file, so that it says so
    sys.stderr.write("llmq needs Python 3.9 or newer, this is " + sys.version.split()[0] + "\n")
    sys.exit(2)

import argparse
import asyncio
import base64
import bisect
import concurrent.futures
import contextlib
import enum
import errno
import functools
import gc
import glob
import hashlib
import heapq
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import select
import shutil
import signal
import socket
import struct
import threading
import time
import unicodedata
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from http import HTTPStatus
from itertools import accumulate, combinations, count, groupby
from operator import attrgetter
from textwrap import wrap
from typing import Any, Callable, ClassVar, NamedTuple, NoReturn, TypeVar, Union, cast
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlsplit

__version__ = "0.1.0"

log = logging.getLogger("llmq")


# ==== 1. Errors ===================================================================================
# What a client is told instead of an answer: each code is one row of a table.  A class of its own
# has only what somebody catches by its type.  Foreign exceptions are translated where they are met;
# `render_error` of section 19 turns errors into bytes.


class ErrorRow(NamedTuple):
    status: int
    retry_after: int | None = None  # seconds, for the Retry-After header
    should_retry: bool = True  # False tells SDKs not to send the same request again


ERRORS = {
    "bad_request": ErrorRow(400),
    "unauthorized": ErrorRow(401),
    "context_length_exceeded": ErrorRow(400),
    "forbidden": ErrorRow(403),
    "forbidden_host": ErrorRow(403),
    "forbidden_origin": ErrorRow(403),
    "model_not_found": ErrorRow(404),
    "not_found": ErrorRow(404),
    "method_not_allowed": ErrorRow(405),
    "request_timeout": ErrorRow(408),
    "conflict": ErrorRow(409),
    "gone": ErrorRow(410, should_retry=False),
    "body_too_large": ErrorRow(413),
    "uri_too_long": ErrorRow(414),
    "unsupported_media_type": ErrorRow(415),
    "queue_full": ErrorRow(429),
    "rate_limited": ErrorRow(429, 60),
    "headers_too_large": ErrorRow(431),
    "no_model": ErrorRow(503, should_retry=False),  # `auto`, and none can serve it
    "cancelled": ErrorRow(499, should_retry=False),
    "client_left": ErrorRow(499),  # nginx's number for it; only the log says so
    "internal_error": ErrorRow(500),
    "not_implemented": ErrorRow(501, should_retry=False),
    "backend_answer": ErrorRow(502),  # in truth the status that the backend gave
    "backend_error": ErrorRow(502),
    "backend_down": ErrorRow(503, 10),
    "backend_loading": ErrorRow(503, 5),
    "overloaded": ErrorRow(503, 1),
    "shutting_down": ErrorRow(503, 5),
    "wait_timeout": ErrorRow(503, 30, should_retry=False),
    "backend_timeout": ErrorRow(504),
    "version_not_supported": ErrorRow(505),
    "insufficient_storage": ErrorRow(507, should_retry=False),
    "loop_detected": ErrorRow(508),
}


class LlmqError(Exception):
    """What a client is told instead of an answer; `code` is a row of ERRORS."""

    code = "internal_error"
    retryable = False  # nothing of an answer arrived, so another attempt is allowed

    def __init__(self, message: str, code: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the member of the request that is at fault
        self.code = code or self.code
        self.status, self.retry_after, self.should_retry = ERRORS[self.code]


class BadRequest(LlmqError):
    code = "bad_request"


class RequestTimeout(LlmqError):
    code = "request_timeout"


class ClientLeft(LlmqError):
    code = "client_left"  # nobody is there to be told


class BackendAnswer(LlmqError):
    """The runner itself answered with an error; its words are passed on."""

    code = "backend_answer"

    def __init__(
        self, status: int, message: str, body: bytes, document: Any, retry_after: str | None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body, self.document = body, document  # as the runner wrote it, and parsed
        if retry_after and retry_after.isdecimal():
            self.retry_after = int(retry_after[:9])


class Untranslatable(LlmqError):
    code = "not_implemented"  # no backend of the model has the route, or one in place of it


class RouteUnsupported(Untranslatable):
    """A backend says that it has no such route: nothing was generated, another may have it."""

    def __init__(self, answer: BackendAnswer) -> None:
        super().__init__(answer.message)
        self.answer = answer
        self.for_model = answer.status == 501  # it said so of this model only


class BackendError(LlmqError):
    code = "backend_error"  # the runner broke the connection, the protocol or its answer
    unhealthy = False  # it says that the runner may be down, not what it thinks of a request


class BackendBroke(BackendError):
    unhealthy = True  # the connection ended inside an answer


class BackendUnreached(BackendError):
    unhealthy = True
    retryable = True  # no byte of an answer came: nothing was generated that anybody has seen


class BackendRefused(BackendUnreached):
    """Nobody listens there."""


class BackendLoading(BackendUnreached):
    code = "backend_loading"


class BackendTimeout(BackendError):
    unhealthy = True
    code = "backend_timeout"


class OutOfFiles(LlmqError):
    """llmq's own limit of open files, which says nothing of a runner."""

    code = "overloaded"


class ConfigError(Exception):
    """A mistake in a file, variable or flag: one line that names place, key and cure."""


class StartError(Exception):
    """It cannot work as configured, and will not by trying again: port taken, nobody there."""


# ==== 2. Tools ====================================================================================
# Small pure helpers that several sections share.

KIB, MIB, GIB = 1024, 1024**2, 1024**3
DAY = 86400.0  # seconds
DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)?")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([KMG])(i?)B?|B)?", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Seconds from `300`, `1.5s`, `2m`, `90000ms`; ValueError otherwise."""
    match = DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError("write a duration like 300, 1.5s or 2m")
    return float(match[1]) * SECONDS[match[2] or "s"]


def parse_size(text: str) -> int:
    """Bytes from `4096`, `512KiB`, `8MiB`, `1GB`; ValueError otherwise."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError("write a size like 4096, 512KiB or 8MiB")
    power = " KMG".index((match[2] or " ").upper())
    return int(float(match[1]) * (1000 if match[2] and not match[3] else KIB) ** power)


def render_json(value: object) -> bytes:
    """Compact JSON in ASCII: no control character, no lone surrogate; ValueError for NaN, 1e999."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


HIDDEN = "***"  # in place of a key
ERROR_SHOWN = 200  # characters of an error's sentence, in the log and to those who watch


def plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def whole_number(value: object) -> int | None:
    """The integer that a number of JSON is, also when it is written 128.0; None for all else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def printable(text: str, limit: int = 128) -> str:
    """What may stand in a log line or a terminal: no control characters, no endless names."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return short if short.isprintable() else "".join(c if c.isprintable() else "?" for c in short)


def fits(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern whose ``*`` is any text; in linear time, as no regex does."""
    first, *parts = pattern.lower().split("*")
    name = name.lower()
    if not parts:
        return name == first
    last = parts.pop()
    if not (name.startswith(first) and name[len(first) :].endswith(last)):
        return False
    place, end = len(first), len(name) - len(last)
    for part in parts:
        place = name.find(part, place, end)
        if place < 0:
            return False
        place += len(part)
    return True


@functools.lru_cache(maxsize=1024)
def plain_address(text: str) -> str:
    """An IP address in its one spelling, IPv4 where it is mapped into IPv6; empty if it is none."""
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return ""
    return str(getattr(address, "ipv4_mapped", None) or address)


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a host name or literal can only be this box itself."""
    if host == "localhost" or (host.endswith(".localhost") and not host.startswith(".")):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass
class Average:
    """A moving average over the last ten or so values; None before the first."""

    value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + 0.2 * (value - self.value)


# ==== 3. Kinds ====================================================================================
# The routes that requests queue for, and one row per kind of runner: where it listens, how it is
# told from the others, which of the routes it has, what says which of its models are loaded.

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, RERANK, MESSAGES = "/v1/responses", "/v1/rerank", "/v1/messages"
COUNT_TOKENS, TRANSCRIPTIONS = "/v1/messages/count_tokens", "/v1/audio/transcriptions"
OLLAMA_CHAT, OLLAMA_GENERATE = "/api/chat", "/api/generate"
OLLAMA_EMBED, OLLAMA_EMBEDDINGS = "/api/embed", "/api/embeddings"
LMSTUDIO = "/api/v0/models"
LMSTUDIO_LOAD, ROUTER_LOAD = "/api/v1/models/load", "/models/load"
COMMON = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, TRANSCRIPTIONS})
EMBEDS = frozenset({OLLAMA_EMBED, OLLAMA_EMBEDDINGS})  # which get a context only if they ask
NATIVE = frozenset({OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_EMBED, OLLAMA_EMBEDDINGS})
EVERY = COMMON | {RERANK, COUNT_TOKENS}  # tried at whatever runner; its answers teach better

# What runners have of Ollama's options on /v1, beyond OpenAI's: Ollama's name, and their own.
USUAL_OPTIONS = {name: name for name in ("top_k", "min_p", "typical_p", "repeat_penalty")}
LLAMACPP_OPTIONS = {**USUAL_OPTIONS, "repeat_last_n": "repeat_last_n", "num_keep": "n_keep"}
VLLM_OPTIONS = {"top_k": "top_k", "min_p": "min_p", "repeat_penalty": "repetition_penalty"}
LMSTUDIO_OPTIONS = {"top_k": "top_k", "repeat_penalty": "repeat_penalty"}


class Kind(NamedTuple):
    name: str
    routes: frozenset[str] = EVERY
    url: str = ""  # where it listens by default
    owner: str = ""  # `owned_by` in its /v1/models, where that tells it from others
    mark: tuple[str, str] = ("", "")  # else a path that it alone has, and a member found there
    loaded_path: str = ""  # what tells the loaded models; none: its list of models does
    on_demand: bool = False  # it loads a model when it is asked for it
    native: bool = False  # it has Ollama's API: a context by request, management, /api/tags
    counts_tokens: bool = False  # of a request for messages
    options: Mapping[str, str] = USUAL_OPTIONS
    # The routes that load and unload a model; its context at the former, its name at the latter.
    errands: tuple[str, ...] = ()


RUNNERS = (
    Kind(
        "ollama",
        COMMON | NATIVE,
        "http://127.0.0.1:11434",
        mark=("/api/version", "version"),
        loaded_path="/api/ps",
        on_demand=True,
        native=True,
        errands=(OLLAMA_GENERATE, OLLAMA_GENERATE, "", "model"),
    ),
    Kind(
        "lmstudio",
        COMMON | {LMSTUDIO_LOAD},
        "http://127.0.0.1:1234",
        mark=(LMSTUDIO, "data"),
        loaded_path=LMSTUDIO,
        on_demand=True,
        options=LMSTUDIO_OPTIONS,
        errands=(LMSTUDIO_LOAD, "/api/v1/models/unload", "context_length", "instance_id"),
    ),
    Kind(
        "llamacpp",
        EVERY | {ROUTER_LOAD},
        url="http://127.0.0.1:8080",
        owner="llamacpp",
        on_demand=True,  # in router mode; else it lists only what is loaded
        counts_tokens=True,
        options=LLAMACPP_OPTIONS,
        errands=(ROUTER_LOAD, "/models/unload", "", "model"),  # it may lack them
    ),
    Kind("vllm", EVERY, "http://127.0.0.1:8000", "vllm", counts_tokens=True, options=VLLM_OPTIONS),
    Kind("openai"),  # whatever else has /v1/models
)
KINDS = {kind.name: kind for kind in RUNNERS}
STARTERS = {  # what people call them, and the command that starts each
    "ollama": ("Ollama", "ollama serve"),
    "lmstudio": ("LM Studio", "lms server start"),
    "llamacpp": ("llama.cpp", "llama-server -m MODEL.gguf"),
    "vllm": ("vLLM", "vllm serve MODEL"),
}
HOW_TO_START = ", ".join(f"{title} (`{command}`)" for title, command in STARTERS.values())
NO_RUNNER = f"no runner answers: start {HOW_TO_START}, or try llmq with `--demo`"


def kind_by_owner(entries: Sequence[Mapping[str, Any]]) -> str:
    """The kind of runner that `owned_by` in its `/v1/models` gives away, or ''."""
    owners = [entry.get("owned_by") for entry in entries]
    return next((kind.name for kind in KINDS.values() if kind.owner and kind.owner in owners), "")


def read_loaded(kind: str, payload: Any) -> tuple[str, ...]:
    """The loaded models, as a runner's answer at its `loaded_path`, or its list of them, tells."""
    name, member = ("name", "models") if KINDS[kind].native else ("id", "data")
    # A list that does not say it is of what is loaded; llama.cpp's router mode says it of each.
    told, unsaid = ("state", "") if kind == "lmstudio" else ("status", "loaded")
    rows = payload.get(member) if isinstance(payload, dict) else None
    found = []
    for row in rows if isinstance(rows, (list, tuple)) else ():
        state = row.get(told, unsaid) if isinstance(row, dict) and name in row else None
        state = state.get("value") if isinstance(state, dict) else state
        found += [str(row[name])] if state == "loaded" else []
    return tuple(found)


# ==== 4. Settings =================================================================================
# Every setting is declared once, as a field of the dataclass of its table; flags, LLMQ_* variables,
# the check of the file, --help and the README's table are derived.

Facts = dict[str, Any]
Duration = float  # seconds
Size = int  # bytes
Names = tuple[str, ...]
Addresses = Names  # of IP, each in its one spelling
Networks = Names  # of IP, likewise: 10.0.0.0/24
Key = str  # a secret: never shown
KeyHash = str  # of one
Rate = str  # so many in a time: 60/m
Tokens = str  # a number of them, or "fit"
KeepAlive = str  # seconds, or a time as Ollama writes it; below 0: for ever
Tasks = Names  # types of tasks, of TASKS
Url = str  # a base URL without query, credentials, /v1 or slash at its end
OptionalUrl = str  # the same, or empty
HookUrl = str  # a whole one, which may have a secret in it
File = str  # where one is
BasePath = str  # empty, or a path with a slash before it and none behind
Sent = dict[str, str]  # header fields by lower-case name, that llmq adds
LEVELS = ("debug", "info", "warning", "error")
CLASSES = ("high", "normal", "low")  # of requests, the most urgent first
RIGHTS = ("infer", "models", "control")  # to use models, to manage them, to see and steer llmq
TASKS = (  # that a request may be for, see section 14
    "triage", "simple_chat", "summarize", "code_generate", "code_review", "code_fix",
    "agentic_reasoning", "large_context", "tool_use", "unknown",
)  # fmt: skip
SHORT = 0.01  # seconds; no deadline makes sense below


def setting(
    default: Any, help: str, env_alias: str = "", *, secret: bool = False, **limits: Any
) -> Any:
    """Declare a setting: its annotation is its type, the rest are facts of a `Setting`."""
    facts = {"help": help, "env_alias": env_alias, **limits}
    if default == {}:
        return field(default_factory=dict, metadata=facts, repr=not secret)
    return field(default=default, metadata=facts, repr=not secret)


@dataclass(frozen=True)
class ServerSettings:
    host: str = setting("", "address to listen on; empty: loopback, IPv4 and IPv6", "HOST")
    port: int = setting(11500, "port to listen on; 0: any free one", "PORT")
    allowed_hosts: Names = setting((), "further names that clients may use for this box")
    cors_origins: Names = setting(("*",), "web origins that may read answers; * is everybody")
    allow_anonymous_lan: bool = setting(False, "listen beyond this box although nobody needs a key")
    require_key: str = setting(
        "all", "who needs a key once there is one; remote: not this box", choices=("all", "remote")
    )
    allow_all_routes: bool = setting(False, "pass paths that llmq does not know on to a backend")
    base_path: BasePath = setting("", "goes before every route, as in /llm")
    tls_cert: File = setting("", "file of the certificate, and what signed it: llmq speaks HTTPS")
    tls_key: File = setting("", "file of its key; empty: the same file")
    tls_client_ca: File = setting("", "file of who signs the certificates that clients must have")
    trusted_proxies: Addresses = setting((), "addresses whose X-Forwarded-For tells who asks")
    watch: bool = setting(True, "read the configuration file again when it changes")
    state: File = setting("$XDG_STATE_HOME/llmq/llmq.db", "keeps changes, jobs, usage; empty: none")
    head_timeout: Duration = setting(15.0, "for a request's head to arrive whole", minimum=SHORT)
    body_timeout: Duration = setting(30.0, "between two pieces of a request body", minimum=SHORT)
    upload_timeout: Duration = setting(300.0, "for a whole request body to arrive", minimum=SHORT)
    keep_alive: Duration = setting(30.0, "an idle client connection is kept open", minimum=SHORT)
    stall_timeout: Duration = setting(60.0, "a client that takes nothing is gone", minimum=SHORT)
    drain_timeout: Duration = setting(30.0, "for running requests to finish when stopping")
    heartbeat_after: Duration = setting(15.0, "a stream that waits shows a sign of life; 0: never")
    heartbeat_interval: Duration = setting(10.0, "between two signs of life", minimum=SHORT)
    whole_heartbeat_after: Duration = setting(240.0, "an unstreamed answer shows a space; 0: never")
    max_body: Size = setting(32 * MIB, "the largest request body", minimum=1)


@dataclass(frozen=True)
class QueueSettings:
    slots: int = setting(1, "requests at once on a device that names no number", minimum=1)
    max_depth: int = setting(10000, "requests that may wait; one client at most half", minimum=1)
    max_queued_bytes: Size = setting(512 * MIB, "their bodies; one client at most half", minimum=1)
    max_attempts: int = setting(2, "attempts in all at a backend", "LLM_MAX_ATTEMPTS", minimum=1)
    max_wait_high: Duration = setting(0.0, "longest wait of class high; 0: no limit")
    max_wait_normal: Duration = setting(0.0, "longest wait of class normal; 0: no limit")
    max_wait_low: Duration = setting(0.0, "longest wait of class low; 0: no limit")
    down_wait: Duration = setting(60.0, "longest wait while all backends of a model are down")
    max_depth_high: int = setting(0, "requests of class high that may wait; 0: as max_depth")
    max_depth_normal: int = setting(0, "the same of class normal")
    max_depth_low: int = setting(0, "the same of class low")
    overflow_status: int = setting(429, "what a full queue answers: 429 or 503", choices=(429, 503))
    aging: Duration = setting(300.0, "wait after which a request is overdue; 0: never")
    affinity: Duration = setting(30.0, "longest that a loaded model's requests go first; 0: never")

    @functools.cached_property
    def waits(self) -> tuple[float, ...]:
        """The longest waits by class."""
        return self.max_wait_high, self.max_wait_normal, self.max_wait_low

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """How many may wait by class."""
        return self.max_depth_high, self.max_depth_normal, self.max_depth_low


@dataclass(frozen=True)
class UpstreamSettings:
    model: str = setting("", "for requests that name none; empty: the first", "OLLAMA_MODEL")
    connect_timeout: Duration = setting(5.0, "to connect to a backend", minimum=SHORT)
    first_byte_timeout: Duration = setting(
        600.0, "to the first byte of an answer's body", "LLM_TIMEOUT_MS", minimum=SHORT
    )
    idle_timeout: Duration = setting(600.0, "between two pieces of an answer", minimum=SHORT)
    max_answer: Size = setting(1024 * MIB, "the largest answer that is not a stream", minimum=1)
    num_ctx: int = setting(0, "context of Ollama's models; 0: its own", "OLLAMA_NUM_CTX")
    max_num_ctx: int = setting(131072, "the largest context that a request may ask for", minimum=1)
    probe_interval: Duration = setting(10.0, "between two looks at a backend", minimum=SHORT)
    probe_timeout: Duration = setting(2.0, "for such a look", minimum=SHORT)


@dataclass(frozen=True)
class LogSettings:
    format: str = setting("text", "of the log: text or json", choices=("text", "json"))
    level: str = setting("info", "least severity logged", choices=LEVELS)
    file: File = setting("", "where it goes, opened anew on reload; empty: stderr")


@dataclass(frozen=True)
class CacheSettings:
    embeddings: bool = setting(True, "answer embeddings from memory that were asked for before")
    chat: bool = setting(False, "the same of unstreamed answers at temperature 0, without tools")
    max_bytes: Size = setting(64 * MIB, "memory for answers")
    embeddings_ttl: Duration = setting(86400.0, "longest that embeddings are kept")
    chat_ttl: Duration = setting(300.0, "longest that other answers are kept")
    persist: bool = setting(False, "keep answers in the state file, over a restart")


@dataclass(frozen=True)
class JobsSettings:
    result_ttl: Duration = setting(86400.0, "results, batches and files are kept", minimum=SHORT)
    max_attempts: int = setting(2, "times that a job is begun, crashes among them", minimum=1)
    max_bytes: Size = setting(1024 * MIB, "the state file, with which new jobs are refused")


@dataclass(frozen=True)
class RouterSettings:
    degrade: bool = setting(False, "auto: a smaller model where memory or time is too short")
    require_gpu: bool = setting(False, "refuse models that are split over CPU and GPU")
    gpu_interval: Duration = setting(10.0, "between two looks at graphics memory", minimum=SHORT)
    nvidia_smi: File = setting("nvidia-smi", "the command that tells of NVIDIA's cards")


@dataclass(frozen=True)
class DeviceSettings:
    """[devices.NAME]: what backends on one host share, one GPU usually."""

    slots: int = setting(1, "requests at once", minimum=1)
    reserve_high: int = setting(0, "of these, slots that only class high or the overdue may take")
    vram_gb: float = setting(0.0, "its graphics memory in GiB; 0: as its cards tell, on this box")
    vram_reserve_gb: float = setting(1.0, "of it, what no model is to take")


@dataclass(frozen=True)
class ClientSettings:
    """[clients.NAME]: what somebody is known for; a name is courtesy, never a grant."""

    class_: str = setting("", "class of requests that name none", choices=("", *CLASSES))
    weight: float = setting(1.0, "share among those of one class", minimum=0.01)
    boost: bool = setting(False, "every second start of its class, while it waits")
    blocked: bool = setting(False, "refused, whatever it asks")
    max_concurrent: int = setting(0, "requests that may run at once; 0: any number")
    max_waiting: int = setting(0, "requests that may wait; 0: as many as all may")


@dataclass(frozen=True)
class GrantSettings:
    """What holds for whoever comes with a key, or to a port of its own."""

    class_: str = setting("", "class of requests that name none", choices=("", *CLASSES))
    max_class: str = setting(
        "", "the most urgent class they get; empty: high", choices=("", *CLASSES)
    )
    max_concurrent: int = setting(0, "requests that may run at once; 0: any number")
    models: Names = setting((), "the models they may use, `*` any text; none: all")
    rights: Names = setting(("infer",), "of infer, models (manage them), control (see and steer)")


@dataclass(frozen=True)
class KeySettings(GrantSettings):
    """[keys.NAME]: somebody, by the secret they send; once there is one, everybody needs one."""

    key: Key = setting("", "the secret", secret=True)
    key_hash: KeyHash = setting(
        "", "in its place sha256: and its hash, see `llmq key NAME`", secret=True
    )
    max_waiting: int = setting(0, "requests that may wait; 0: as many as all may")
    rate: Rate = setting("", "requests in a time, as in 60/m; empty: any number")
    tokens_per_day: int = setting(0, "tokens in and out, from midnight on; 0: any number")
    ips: Networks = setting((), "networks they may come from; none: all")


@dataclass(frozen=True)
class PortSettings(GrantSettings):
    """[ports.NUMBER]: a port of its own, for who can send no key, or for another service."""

    client: str = setting("", "who comes there; empty: `port:` and the number")
    bind: str = setting("127.0.0.1", "address to listen on")
    public: bool = setting(False, "beyond this box, for everybody who reaches it")
    upstream: OptionalUrl = setting("", "another HTTP service, that it passes everything on to")
    headers: Sent = setting({}, "header fields sent there, in place of a client's", secret=True)
    timeout: Duration = setting(300.0, "until that service says something, and between two pieces")


@dataclass(frozen=True)
class ModelSettings:
    """[models.NAME], `*` in it any text: of the rows that fit, the most exact that says it."""

    said: ClassVar[Names] = ()  # of its keys those that a row of the file has
    max_concurrent: int = setting(0, "requests of it at once, everywhere; 0: any number")
    exclusive: bool = setting(False, "nothing else runs on its device meanwhile")
    backends: Names = setting((), "the only backends asked for it; none: all that have it")
    class_: str = setting("", "class of requests that have no other", choices=("", *CLASSES))
    keep_alive: KeepAlive = setting("", "how long Ollama keeps it loaded, unless the request says")
    keep_alive_force: bool = setting(False, "the same, whatever the request says")
    num_ctx: Tokens = setting("", 'its context in tokens, or "fit": as long as the prompt needs')
    preload: bool = setting(False, "loaded from the start, where a backend has it")
    set: Facts = setting({}, "members put into its requests, also over what is there")
    strip: Names = setting((), "members cut out of its requests")
    max_output: int = setting(0, "most tokens of an answer, asked for or not; 0: any number")
    overflow: str = setting("pass", "of prompts beyond the context", choices=("pass", "refuse"))
    size_gb: float = setting(0.0, "graphics memory that it takes, in GiB; 0: as its runner tells")
    purpose: Tasks = setting((), "types of tasks that it is good at, see [routes]")
    tags: Names = setting((), "what it can, where its runner does not tell: vision, tools")
    context: int = setting(0, "the longest prompt that auto gives it, in tokens; 0: as told")


@dataclass(frozen=True)
class RuleSettings:
    """[[rules]]: the class of requests for which all of these hold; the first such rule counts."""

    route: str = setting("", "the path, `*` in it any text")
    model: str = setting("", "the model as asked for, likewise")
    client: str = setting("", "the client's name, likewise")
    header: str = setting("", "a header field that is there, or `Name: value`, likewise")
    class_: str = setting("", "the class that it gives", choices=CLASSES)


EVENTS = (
    "queue.full", "queue.high_watermark", "queue.drained", "host.unhealthy", "host.recovered",
    "job.done",
)  # fmt: skip


@dataclass(frozen=True)
class WebhookSettings:
    """[webhooks.NAME]: a service that is told what happens."""

    url: HookUrl = setting("", "where each event is posted to, as JSON", secret=True)
    events: Names = setting((), "of " + ", ".join(EVENTS) + "; none: all")
    secret: Key = setting("", "signs what is sent: X-LLMQ-Signature", secret=True)


@dataclass(frozen=True)
class IpSettings:
    blocked: Addresses = setting((), "addresses that are refused")


@dataclass(frozen=True)
class BackendSettings:
    """[backends.NAME]: one runner."""

    url: Url = setting("", "http://host:port of the runner; a path goes before each route")
    device: str = setting("", "the device it shares; empty: its host")
    slots: int = setting(0, "requests at once, if fewer than the device's; 0: the device's")
    kind: str = setting("", "what it is; empty: asked", choices=("", *KINDS))
    key: Key = setting("", "sent to it as bearer token; never taken from a client", secret=True)
    headers: Sent = setting({}, "further header fields that it is sent", secret=True)
    relay_headers: Names = setting((), "header fields of clients passed on, no keys; *: nearly all")
    models: Names = setting((), "its models, where it cannot tell them")
    weight: float = setting(1.0, "share among equal backends", minimum=0.01)
    probe_interval: Duration = setting(0.0, "between two looks at it; 0: as for all")
    probe_timeout: Duration = setting(0.0, "for such a look; 0: as for all")
    first_byte_timeout: Duration = setting(0.0, "to an answer's first byte; 0: as for all")
    idle_timeout: Duration = setting(0.0, "between two pieces of an answer; 0: as for all")
    failures_to_open: int = setting(3, "failures in a row until it counts as down", minimum=1)
    reset_after: Duration = setting(10.0, "longest until it is tried again then", minimum=SHORT)


@dataclass
class Settings:
    """All settings, their one owner: who needs one asks here, so that a reload reaches all."""

    server: ServerSettings = field(default_factory=ServerSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    log: LogSettings = field(default_factory=LogSettings)
    ips: IpSettings = field(default_factory=IpSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    jobs: JobsSettings = field(default_factory=JobsSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    devices: dict[str, DeviceSettings] = field(default_factory=dict)
    backends: dict[str, BackendSettings] = field(default_factory=dict)  # none: looked for
    clients: dict[str, ClientSettings] = field(default_factory=dict)
    keys: dict[str, KeySettings] = field(default_factory=dict)
    ports: dict[str, PortSettings] = field(default_factory=dict)  # by number
    models: dict[str, ModelSettings] = field(default_factory=dict)  # by name or pattern
    rules: dict[str, RuleSettings] = field(default_factory=dict)  # by number, the first first
    webhooks: dict[str, WebhookSettings] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # pattern with * -> model
    routes: dict[str, Names] = field(default_factory=dict)  # type of task -> models, best first

    def slots_of(self, device: str) -> int:
        return self.devices[device].slots if device in self.devices else self.queue.slots

    def reserve_of(self, device: str) -> int:
        return self.devices[device].reserve_high if device in self.devices else 0

    def limits_of(self, row: BackendSettings) -> UpstreamSettings:
        """What holds at this backend: what its row says, else what holds at all."""
        names = ("probe_interval", "probe_timeout", "first_byte_timeout", "idle_timeout")
        own = {name: getattr(row, name) for name in names if getattr(row, name)}
        return replace(self.upstream, **own) if own else self.upstream


def policy_of(rows: Mapping[str, ModelSettings], key: str) -> ModelSettings:
    """What holds for a model: of the rows that fit it, the most exact that says a thing."""
    fitting = [name for name in rows if fits(name.removesuffix(":latest"), key)]
    said: Facts = {}
    for name in sorted(fitting, key=lambda one: ("*" not in one, len(one))):
        for fact in fields(ModelSettings):
            value, key_said = getattr(rows[name], fact.name), fact.name.rstrip("_")
            if key_said in rows[name].said or value not in (fact.default, {}):
                said[fact.name] = value
    return ModelSettings(**said)


# ==== 5. Layers ===================================================================================
# From what a file, the variables and the flags say to one Settings: defaults < file < environment <
# flags.  A type of setting is a row with how its values are read; each is read where its source is
# known, so that a mistake names place, key and cure.

ROW_TABLES: dict[str, Any] = {
    "devices": DeviceSettings,
    "backends": BackendSettings,
    "clients": ClientSettings,
    "keys": KeySettings,
    "ports": PortSettings,
    "models": ModelSettings,
    "rules": RuleSettings,
    "webhooks": WebhookSettings,
}
OWN_TABLES = (*ROW_TABLES, "aliases", "routes")  # whose keys are the user's
TABLES: dict[str, Any] = {
    table.name: table.default_factory for table in fields(Settings) if table.name not in OWN_TABLES
}
Layer = tuple[str, dict[str, Any]]  # where values come from, and the raw values by dotted key


def as_document(settings: Settings) -> Facts:
    """The settings as a configuration file has them."""
    document = asdict(settings)
    for table in ROW_TABLES:
        for row in document[table].values():
            if "class_" in row:
                row["class"] = row.pop("class_")
    document["rules"] = list(document["rules"].values())
    for name, row in document["models"].items():  # what is not said, a pattern may say
        document["models"][name] = {key: row[key] for key in settings.models[name].said}
    return document


class Setting(NamedTuple):
    """One row of the table of settings; `key` is dotted, as in `queue.max_depth`."""

    key: str
    type: str
    default: Any
    help: str
    env_alias: str  # a foreign variable that sets it too
    minimum: float = 0
    choices: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        table, _, name = self.key.partition(".")
        if table in ("log", "cache", "jobs", "router"):
            name = f"{table}_{name}"
        elif table == "ips":
            name += "_ips"
        one = re.sub("ie$", "y", name[:-1]) if self.type in ("Names", "Addresses") else name
        return "--" + one.replace("_", "-")

    @property
    def variable(self) -> str:
        return "LLMQ_" + self.key.replace(".", "_").upper()

    @property
    def shown_default(self) -> str:
        return TYPES[self.type].show(self.default)


def known_settings(tables: Mapping[str, Any] = TABLES) -> Iterator[Setting]:
    """Every setting of these tables, in the order of declaration."""
    for table, cls in tables.items():
        for fact in fields(cls):
            name = fact.name.rstrip("_")  # `class` is a word of Python's
            default = {} if fact.default is MISSING else fact.default
            yield Setting(f"{table}.{name}", str(fact.type), default, **fact.metadata)


TEXTS = {  # what may be in a file of its own
    row.key.partition(".")[2]
    for row in known_settings({**TABLES, **ROW_TABLES})
    if row.type in ("str", "Key", "KeyHash", "Url", "OptionalUrl", "HookUrl")
}


def parse_text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("wants a text")
    return raw


def parse_form(form: str, wanted: str, convert: Callable[[str], Any], raw: Any) -> Any:
    """A text of this form, or what a file has as a number."""
    if not re.fullmatch(form, str(raw)):
        raise ValueError(f"wants {wanted}")
    return convert(str(raw))


KEEP_ALIVE = r"|-?[0-9]{1,9}|-?([0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h)){1,9}"
parse_int = functools.partial(parse_form, r"\s*[0-9]{1,15}\s*", "a whole number", int)
parse_number = functools.partial(parse_form, r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*", "a number", float)
parse_tokens = functools.partial(parse_form, "|fit|[1-9][0-9]{0,8}", 'a number, or "fit"', str)
parse_keep_alive = functools.partial(parse_form, KEEP_ALIVE, "seconds, or a time like 5m", str)
RATE = r"([1-9][0-9]{0,8})/(s|m|h|d)"
parse_rate = functools.partial(parse_form, RATE + "|", "a number and a time, as in 60/m", str)
HASH = "sha256:[0-9a-fA-F]{64}|"
parse_hash = functools.partial(parse_form, HASH, "sha256: and 64 digits", str.lower)
BASE = r"/?([A-Za-z0-9._~-]+/)*[A-Za-z0-9._~-]*"


def parse_bool(raw: Any) -> bool:
    word, yes = str(raw).lower(), ("true", "1", "yes", "on")
    if word not in (*yes, "false", "0", "no", "off"):
        raise ValueError("wants true or false")
    return word in yes


def parse_names(raw: Any) -> Names:
    items = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError("wants a list of texts")
    return tuple(item.strip() for item in items if item.strip())


def parse_tasks(raw: Any) -> Tasks:
    names = parse_names(raw)
    odd = [name for name in names if name not in TASKS]
    if odd:
        raise ValueError(misspelt("type of task", odd[0], TASKS))
    return names


def parse_addresses(raw: Any) -> Addresses:
    found = tuple(map(plain_address, parse_names(raw)))
    if not all(found):
        raise ValueError("wants IP addresses")
    return found


def parse_networks(raw: Any) -> Networks:
    try:
        return tuple([str(ipaddress.ip_network(one, strict=False)) for one in parse_names(raw)])
    except ValueError:
        raise ValueError("wants networks like 10.0.0.0/24, or addresses") from None


def parse_base(raw: Any) -> BasePath:
    text: str = parse_form(BASE, "a path like /llm", str, parse_text(raw)).strip("/")
    if set(text.split("/")) & {".", ".."}:
        raise ValueError("wants a path without dots alone")
    return text and "/" + text


def parse_optional_url(raw: Any) -> OptionalUrl:
    return parse_url(raw, ending="") if raw else ""


def parse_hook(raw: Any) -> HookUrl:
    """A whole url as a service gives it out, its path and query as they are."""
    text = parse_text(raw)
    if not re.fullmatch(r"https?://[^/?#\s@]+([/?][\x21-\x7e]*)?", text):
        raise ValueError("wants a url like https://host/path, without a user in it")
    return text


def parse_url(raw: Any, ending: str = "/v1") -> Url:
    """`http://box:8080`, also as `box:8080`; a path is kept, but for the /v1 that routes have."""
    text = parse_text(raw)
    try:
        parts = urlsplit(text if "//" in text else "http://" + text)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError("wants a url like http://host:port") from None
    if parts.username or parts.password:
        raise ValueError("put the password into `key`, not into the url")
    path = parts.path.rstrip("/")
    if parts.query or parts.fragment or not re.fullmatch(r"[\x21-\x7e]*", path):
        raise ValueError("wants a url without a query, its path in visible ASCII")
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix(ending)}"


def parse_key(raw: Any) -> Key:
    """A key as it may stand in a header's line; a number would lose its zeros."""
    text = parse_text(raw)
    if text == HIDDEN or not re.fullmatch(r"[\x21-\x7e]*", text):
        raise ValueError("wants a key: visible ASCII without spaces")
    return text


def parse_facts(raw: Any) -> Facts:
    if not isinstance(raw, dict):
        raise ValueError("wants a table, { name = value }")
    try:
        render_json(raw)
    except (TypeError, ValueError):
        raise ValueError("wants values that JSON has, no date, inf or nan") from None
    return raw


TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110 s.5.6.2
KEY_FIELDS = ("authorization", "proxy-authorization", "x-api-key", "api-key")
OWN_FIELDS = (  # hop-by-hop (RFC 9110 s.7.6.1), or what llmq itself says to a backend
    "accept-encoding", "connection", "content-length", "expect", "host", "keep-alive",
    "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "via",
)  # fmt: skip


def parse_sent(raw: Any) -> Sent:
    """Header fields as a request may carry them beside llmq's own, RFC 9110 s.5."""
    for name, value in parse_facts(raw).items():
        if not re.fullmatch(TOKEN, name) or name.lower() in OWN_FIELDS:
            raise ValueError(f"{printable(name)} is no header field that may be added")
        if value == HIDDEN or not re.fullmatch(r"[\t\x20-\x7e\x80-\xff]*", parse_text(value)):
            raise ValueError(f"the value of {name} is not one that a header field can have")
    return {name.lower(): value.strip() for name, value in raw.items()}


class SettingType(NamedTuple):
    parse: Callable[[Any], Any]  # a text, or what a file has in its place
    flag: dict[str, Any]  # what argparse is told of its flag
    show: Callable[[Any], str] = str  # a default, as it may be written


TYPES = {
    "int": SettingType(parse_int, {"metavar": "N"}),
    "Duration": SettingType(parse_duration, {"metavar": "TIME"}, "{:g}s".format),
    "Size": SettingType(parse_size, {"metavar": "SIZE"}, lambda size: f"{size // MIB}MiB"),
    "float": SettingType(parse_number, {"metavar": "X"}, "{:g}".format),
    "Facts": SettingType(parse_facts, {"metavar": "TABLE"}, json.dumps),
    "bool": SettingType(parse_bool, {"action": "store_true"}, lambda on: "on" if on else "off"),
    "Names": SettingType(parse_names, {"metavar": "NAME", "action": "append"}, ", ".join),
    "Addresses": SettingType(parse_addresses, {"metavar": "IP", "action": "append"}, ", ".join),
    "Tasks": SettingType(parse_tasks, {"metavar": "TYPE", "action": "append"}, ", ".join),
    "Sent": SettingType(parse_sent, {"metavar": "TABLE"}, json.dumps),
    "str": SettingType(parse_text, {"metavar": "TEXT"}),
    "File": SettingType(parse_text, {"metavar": "FILE"}),
    "Tokens": SettingType(parse_tokens, {"metavar": "N"}),
    "KeepAlive": SettingType(parse_keep_alive, {"metavar": "TIME"}),
    "Url": SettingType(parse_url, {"metavar": "URL"}),
    "OptionalUrl": SettingType(parse_optional_url, {"metavar": "URL"}),
    "HookUrl": SettingType(parse_hook, {"metavar": "URL"}),
    "BasePath": SettingType(parse_base, {"metavar": "PATH"}),
    "Networks": SettingType(parse_networks, {"metavar": "NETWORK"}, ", ".join),
    "Rate": SettingType(parse_rate, {"metavar": "N/TIME"}),
    "Key": SettingType(parse_key, {"metavar": "KEY"}),
    "KeyHash": SettingType(parse_hash, {"metavar": "HASH"}),
}


def parse_value(source: str, row: Setting, raw: Any) -> Any:
    """The value of a setting; ConfigError names source, key and cure."""
    try:
        is_number = row.type in ("int", "float", "Duration", "Size")
        value = TYPES[row.type].parse(str(raw) if is_number else raw)  # files may have numbers
        if row.choices and value not in row.choices:
            raise ValueError("choose one of " + ", ".join(str(one) for one in row.choices if one))
        if is_number and value < row.minimum:
            raise ValueError(f"wants at least {row.minimum:g}")
        if row.key == "server.port" and value > 0xFFFF:
            raise ValueError("a port is at most 65535")
    except ValueError as error:
        place = f"{source}: {row.flag}" if source == "command line" else f"{source}:"
        secret = row.type in ("Url", "OptionalUrl", "HookUrl", "Key", "KeyHash", "Sent")
        written = "" if secret else f" = {printable(str(raw), 60)}"
        raise ConfigError(f"{place} {row.key}{written}: {error}") from None
    return value


def misspelt(what: str, word: str, known: Iterable[str]) -> str:
    """The cure for an unknown word: the nearest known one, else all of them."""
    import difflib

    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, 1)
    cure = f"did you mean {near[0]}?" if near else "known: " + ", ".join(choices)
    return f"unknown {what} {printable(word)}; {cure}"


def file_layer(path: str, document: Any) -> Layer:
    """The values of a parsed configuration file, flattened to dotted keys."""
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: wants tables like [server], not a list or a bare value")
    flat: dict[str, Any] = {}
    for table, values in document.items():
        if table not in TABLES and table not in OWN_TABLES:
            raise ConfigError(f"{path}: {misspelt('table', table, (*TABLES, *OWN_TABLES))}")
        shape, brackets = (list, f"[[{table}]]") if table == "rules" else (dict, f"[{table}]")
        if not isinstance(values, shape):
            raise ConfigError(f"{path}: {table}: wants a table, write {brackets}")
        own = table in OWN_TABLES
        flat |= {table: values} if own else {f"{table}.{name}": values[name] for name in values}
    return path, flat


OLD_VARIABLES = {  # of other queues, and the settings that they are here
    "OLLAMA_URLS": ("backends",),
    "BACKEND_URLS": ("backends",),
    "TIMEOUT": ("upstream.first_byte_timeout", "upstream.idle_timeout"),
}


def old_layers(environ: Mapping[str, str]) -> tuple[list[Layer], list[str]]:
    """The values of variables that other queues have, and a note of each."""
    layers: list[Layer] = []
    notes = []
    for name, keys in OLD_VARIABLES.items():
        text = environ.get(name, "")
        if text and name == "TIMEOUT" and not re.fullmatch(r"[1-9][0-9]{0,6}", text):
            notes.append(f"TIMEOUT={printable(text)} ignored: wants seconds, a whole number")
        elif text:
            own = "LLMQ_BACKENDS" if keys == ("backends",) else " and ".join(keys)
            notes.append(f"{name} is taken for {own}")
            value: Any = parse_names(text) if keys == ("backends",) else text
            layers.append((f"variable {name}", dict.fromkeys(keys, value)))
    return layers, notes


def environment_layers(environ: Mapping[str, str]) -> tuple[list[Layer], list[str]]:
    """The values that variables set, llmq's own names above the foreign ones; and what to tell."""
    own = {row.variable: row.key for row in known_settings()}
    foreign = {row.env_alias: row.key for row in known_settings() if row.env_alias}
    for name in environ:
        if name.startswith("LLMQ_") and name.split("_")[1].lower() in TABLES and name not in own:
            raise ConfigError(f"environment: {misspelt('variable', name, own)}")
    layers, notes = old_layers(environ)
    variables = {**foreign, "OLLAMA_URL": "backends", **own, "LLMQ_BACKENDS": "backends"}
    for name, key in variables.items():
        text = environ.get(name, "")
        if name == "HOST" and text and not is_address(text):
            notes.append(f"HOST={printable(text)} ignored: neither an IP address nor localhost")
        elif text or (name in own and name in environ):  # an empty value of our own is one
            text += "ms" if name.endswith("_MS") else ""
            value = parse_names(text) if key == "backends" else text
            layers.append((f"variable {name}", {key: value}))
    return layers, notes


def is_address(host: str) -> bool:
    """An IP literal or `localhost`: what shells do not export by accident."""
    return host == "localhost" or (host == host.strip() and plain_address(host) != "")


def merge_layers(layers: Iterable[Layer]) -> Settings:
    """One Settings from layers in rising precedence; ConfigError names place, key and cure."""
    rows = {row.key: row for row in known_settings()}
    found: dict[str, Any] = {table: {} for table in (*TABLES, *OWN_TABLES)}
    for source, values in layers:
        for key, raw in values.items():
            table, _, name = key.partition(".")
            if key == "aliases":
                found[key] = parse_aliases(source, raw)
            elif key == "routes":
                found[key] = parse_routes(source, raw)
            elif key in ROW_TABLES:
                found[key] = parse_rows(source, key, raw)
            elif key in rows:
                found[table][name] = parse_value(source, rows[key], raw)
            else:
                raise ConfigError(f"{source}: {misspelt('key', key, rows)}")
    tables = {table: cls(**found[table]) for table, cls in TABLES.items()}
    settings = Settings(**{**found, **tables})
    check_doors(settings)
    return settings


def check_doors(settings: Settings) -> None:
    """ConfigError where keys and ports are not told apart."""
    rows = [(f"keys.{name}", digest_of(row), name) for name, row in settings.keys.items()]
    rows += [
        (f"ports.{number}", number.encode(), row.client or f"port:{number}")
        for number, row in settings.ports.items()
    ]
    rows.append(("server.port", str(settings.server.port).encode(), ""))
    for one, other in combinations(rows, 2):
        if one[1] == other[1]:
            raise ConfigError(f"{one[0]} and {other[0]} are the same")
        if one[2] == other[2]:
            raise ConfigError(f"{one[0]} and {other[0]} are both named {one[2]}")


def digest_of(row: KeySettings) -> bytes:
    """The SHA-256 of a key."""
    if row.key_hash:
        return bytes.fromhex(row.key_hash.partition(":")[2])
    return hashlib.sha256(row.key.encode()).digest()


ROW_NAME = re.compile(r"[\w.:\[\]-]{1,64}", re.ASCII)
FREE_NAME = re.compile(r"[\w.:@/*+-]{1,128}", re.ASCII)  # of clients and models


def parse_rows(source: str, table: str, raw: Any) -> dict[str, Any]:
    """[backends.NAME] and the like; [[rules]]; backends also as a list of `URL`, `NAME=URL`."""
    if table == "rules":
        raw = {str(number): row for number, row in enumerate(raw, 1)}
    elif isinstance(raw, (list, tuple)):
        items = [one for item in raw for one in parse_names(str(item)) or [str(item)]]
        named = [named_url(one) for one in items]
        raw = dict(named)
        if len(raw) != len(named):
            raise ConfigError(f"{source}: {table}: a name or url stands there twice")
    return {name: parse_row(source, table, name, values) for name, values in raw.items()}


def parse_row(source: str, table: str, name: str, values: Any) -> Any:
    cls, where = ROW_TABLES[table], f"{source}: {table}.{printable(name)}"
    plain = FREE_NAME if table in ("clients", "models") else ROW_NAME
    if not isinstance(values, dict) or not plain.fullmatch(name):
        raise ConfigError(f"{where}: write a table, [{table}.NAME] of letters and digits")
    rows = {row.key.split(".")[-1]: row for row in known_settings({f"{table}.{name}": cls})}
    for key in values:
        if key not in rows:
            raise ConfigError(f"{where}: {misspelt('key', key, rows)}")
    # Defaults are parsed too: a url has no good one.
    given = {key: (row, values.get(key, row.default)) for key, row in rows.items()}
    row = cls(*[parse_value(source, *facts) for facts in given.values()])
    if cls is DeviceSettings and 0 < row.slots <= row.reserve_high:
        raise ConfigError(f"{where}.reserve_high: wants fewer than its {row.slots} slots")
    if cls is ModelSettings:  # a default that is said goes before what a pattern says
        vars(row)["said"] = tuple(values)
    if isinstance(row, GrantSettings):
        check_grant(where, name, row)
    odd = [one for one in getattr(row, "events", ()) if one not in EVENTS]
    if odd:
        raise ConfigError(f"{where}.events: {misspelt('event', odd[0], EVENTS)}")
    return row


OWN_NAME = r"(?!(anonymous|llmq)$)[A-Za-z0-9._@-]{1,64}"  # that nobody has without a key or a port


def check_grant(where: str, name: str, row: GrantSettings) -> None:
    """ConfigError for a key or a port that cannot be meant."""
    odd = [one for one in row.rights if one not in RIGHTS]
    if odd:
        raise ConfigError(f"{where}.rights: {misspelt('right', odd[0], RIGHTS)}")
    if isinstance(row, PortSettings):
        check_port(where, name, row)
    elif not re.fullmatch(OWN_NAME, name):
        raise ConfigError(f"{where}: wants another name, of letters and digits")
    elif isinstance(row, KeySettings) and bool(row.key) == bool(row.key_hash):
        raise ConfigError(f"{where}: wants `key`, `key_file` or `key_hash`; see `llmq key {name}`")


def check_port(where: str, number: str, row: PortSettings) -> None:
    if not re.fullmatch("[1-9][0-9]{0,4}", number) or int(number) > 0xFFFF:
        raise ConfigError(f"{where}: wants the number of a port")
    if row.client and not re.fullmatch(OWN_NAME, row.client):
        raise ConfigError(f"{where}.client: wants another name, of letters and digits")
    if not is_address(row.bind):
        raise ConfigError(f"{where}.bind: wants an address")
    if not (row.public or is_loopback(row.bind)):
        raise ConfigError(f"{where}.bind: everybody could use it; say public = true if meant")
    usual = GrantSettings()
    said = [one.name for one in fields(usual) if getattr(row, one.name) != getattr(usual, one.name)]
    if row.upstream and said:
        raise ConfigError(f"{where}.{said[0].rstrip('_')}: means nothing beside `upstream`")
    if row.headers and not row.upstream:
        raise ConfigError(f"{where}.headers: means nothing without `upstream`")


def parse_aliases(source: str, raw: Any) -> dict[str, str]:
    """[aliases]: names that clients use, `*` standing for anything, and the models they mean."""
    named = raw.items() if isinstance(raw, dict) else [("", None)]
    if not all(isinstance(model, str) and model and name for name, model in named):
        raise ConfigError(f'{source}: aliases: write [aliases], then "name-*" = "model"')
    return dict(raw)


def parse_routes(source: str, raw: Any) -> dict[str, Names]:
    """[routes]: for a type of task the models that are to be asked, the best first."""
    routes: dict[str, Names] = {}
    for task, models in raw.items():
        if task not in TASKS:
            raise ConfigError(f"{source}: routes: {misspelt('type of task', task, TASKS)}")
        try:
            routes[task] = parse_names(models)
        except ValueError as error:
            raise ConfigError(f"{source}: routes.{task}: {error}") from None
    return routes


def named_url(item: str) -> tuple[str, dict[str, str]]:
    """`gpu=http://box:8000` or a bare URL, which is named after its host and port."""
    name, mark, url = item.partition("=")
    if not mark or "/" in name:
        name, url = "", item
    place = url.partition("//")[2] or url
    return name or place.rpartition("@")[2].partition("/")[0][:64], {"url": url}


# ==== 6. Metrics ==================================================================================
# Each metric is declared once; Prometheus' text and the README's table are derived.  Labels hold
# names that clients choose, so both length and number are bounded: what is too many is counted as
# `other`.

LABEL_BYTES = 128
LABEL_VALUES = 200  # of one label, `other` among them
MOST_SERIES = 2000  # of one metric: labels multiply
OTHER = "other"
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Metric(NamedTuple):
    name: str
    type: str  # counter, gauge or histogram (of seconds)
    labels: Names
    help: str


REQUEST = ("route", "model", "client", "status", "outcome", "backend", "cache")
WHO = ("model", "client")
METRICS = (
    Metric("llmq_requests_total", "counter", REQUEST, "requests that have ended, however they did"),
    Metric("llmq_wait_seconds", "histogram", ("class",), "from arrival to the start, or the end"),
    Metric("llmq_first_token_seconds", "histogram", ("model",), "from arrival to the first byte"),
    Metric("llmq_total_seconds", "histogram", ("model",), "from arrival to a good end"),
    Metric("llmq_tokens_in_total", "counter", WHO, "tokens of prompts, as the runner tells"),
    Metric("llmq_tokens_out_total", "counter", WHO, "tokens of answers, as the runner tells"),
    Metric("llmq_cache_total", "counter", ("result",), "cache: hit, joined or miss"),
    Metric("llmq_rejected_total", "counter", ("reason",), "refused, at the door or as too many"),
    Metric("llmq_cancels_total", "counter", ("by",), "requests given up, by client or order"),
    Metric("llmq_retries_total", "counter", ("backend",), "attempts there that had to be repeated"),
    Metric("llmq_model_loads_total", "counter", ("backend", "model"), "models seen newly loaded"),
    Metric("llmq_waiting", "gauge", ("class",), "requests that wait"),
    Metric("llmq_running", "gauge", ("class",), "requests that run"),
    Metric("llmq_oldest_wait_seconds", "gauge", (), "how long the oldest request has waited"),
    Metric("llmq_mode", "gauge", ("mode",), "1 for the mode that it is in"),
    Metric("llmq_slots", "gauge", ("device",), "requests that may run at once"),
    Metric("llmq_slots_busy", "gauge", ("device",), "slots taken"),
    Metric("llmq_backend_up", "gauge", ("backend",), "1 if it is sent requests"),
    Metric("llmq_uptime_seconds", "gauge", (), "since the start"),
    Metric("process_cpu_seconds_total", "counter", (), "user and system time"),
    Metric("process_resident_memory_bytes", "gauge", (), "memory in use, on Linux"),
    Metric("process_open_fds", "gauge", (), "open files, on Linux"),
)
# By the values of the labels: the labels as text, and one number; of a histogram the number in each
# bucket, that above all of them, and the sum.
Series = dict[Names, tuple[str, list[float]]]


class Metrics:
    """All that is counted: each metric, and its series by the values of its labels."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[Metric, Series]] = {row.name: (row, {}) for row in METRICS}
        self._known: dict[str, set[str]] = {}  # the values that each label has had

    def add(self, name: str, *values: str, amount: float = 1) -> None:
        if amount:
            self._find(name, values)[0] += amount

    def observe(self, name: str, value: str, times: Sequence[float]) -> None:
        """Count in a histogram (of seconds), whose buckets hold what is up to their bound."""
        if times:
            numbers = self._find(name, (value,))
            numbers[-1] += sum(times)
            for seconds in times:
                numbers[bisect.bisect_left(BUCKETS, seconds)] += 1

    def show(self, name: str, rows: Mapping[str, float] | float) -> None:
        """What a gauge stands at now, by its label if it has one."""
        self._families[name][1].clear()
        for value, number in rows.items() if isinstance(rows, Mapping) else [("", rows)]:
            self._find(name, (value,))[0] = number

    def render(self) -> bytes:
        """All of it in Prometheus' text format, version 0.0.4."""
        lines = (line for family in self._families.values() for line in render_metric(*family))
        return "".join(lines).encode()

    def _find(self, name: str, values: Names) -> list[float]:
        metric, series = self._families[name]
        if values not in series:
            values = tuple(map(self._bound, metric.labels, values))
            if len(series) >= MOST_SERIES and values not in series:
                values = (OTHER,) * len(values)
        if values not in series:
            pairs = zip(metric.labels, (value.translate(ESCAPES) for value in values))
            text = ",".join(f'{label}="{value}"' for label, value in pairs)
            size = len(BUCKETS) + 2 if metric.type == "histogram" else 1
            series[values] = text, [0.0] * size
        return series[values][1]

    def _bound(self, label: str, value: str) -> str:
        raw = printable(value).encode("utf-8", "replace")[:LABEL_BYTES]
        short, known = raw.decode("utf-8", "ignore"), self._known.setdefault(label, {OTHER})
        if short not in known and len(known) >= LABEL_VALUES:
            return OTHER
        known.add(short)
        return short


def render_metric(metric: Metric, series: Series) -> Iterator[str]:
    name, kind, _, text = metric
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, numbers in series.values():
        if kind == "histogram":
            totals = list(accumulate(numbers[:-1]))
            for bound, total in zip((*BUCKETS, "+Inf"), totals):
                yield f'{name}_bucket{{{labels},le="{bound}"}} {total:.15g}\n'
            yield f"{name}_sum{{{labels}}} {numbers[-1]!r}\n"
            yield f"{name}_count{{{labels}}} {totals[-1]:.15g}\n"
        else:
            yield f"{name}{labels and f'{{{labels}}}'} {numbers[0]:.15g}\n"


# ==== 7. Identity =================================================================================
# Who asks, and how urgently: found before anything else is read of a request.  Without keys a name
# is courtesy, not protection: it keeps apart the programs of people who trust each other.  Foreign
# web pages are told apart by their Origin, which browsers do not let them choose.

NAME_CHARACTERS = re.compile(r"[^A-Za-z0-9._@/:-]")
NAME_LENGTH = 64
MOST_CLIENTS = 1000  # remembered at once; whoever has nothing waiting is forgotten first
MOST_PER_ORIGIN = 16  # requests of one foreign web page that may wait
ORIGIN = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?"
)
PROGRAM_SCHEMES = (  # of extensions and desktop programs: Ollama's own defaults
    "chrome-extension", "moz-extension", "safari-web-extension", "vscode-webview", "app", "tauri",
    "file", "vscode-file",
)  # fmt: skip


class Priority(enum.IntEnum):
    """The class of a request: a smaller number goes first and never interrupts what runs."""

    HIGH = 0
    NORMAL = 1
    LOW = 2

    def __init__(self, _: int) -> None:
        self.word = self._name_.lower()


PRIORITY_WORDS = {priority.word: priority for priority in Priority}
SERVICE_TIERS = {"priority": Priority.HIGH, "flex": Priority.LOW}


def parse_priority(value: object) -> Priority | None:
    """The class that a `priority` field asks for; None where it asks for none."""
    if value is None:
        return None
    if isinstance(value, bool):
        return Priority.HIGH if value else Priority.NORMAL
    if isinstance(value, str) and value in PRIORITY_WORDS:
        return PRIORITY_WORDS[value]
    hint = ", a number has no meaning here" if isinstance(value, (int, float)) else ""
    raise BadRequest(f'priority is true, "high", "normal" or "low"{hint}', param="priority")


def asked_priority(body: Mapping[str, Any], header: str | None) -> Priority | None:
    """Body field > X-Queue-Priority > service_tier; None where none of them names a class."""
    asked = parse_priority(body.get("priority"))
    if asked is None and header:  # whose other values mean something to somebody else
        asked = PRIORITY_WORDS.get(header.lower())
    if asked is None and isinstance(tier := body.get("service_tier"), str):
        asked = SERVICE_TIERS.get(tier)
    return asked


def find_rule(
    rules: Mapping[str, RuleSettings], facts: Names, headers: Mapping[str, str]
) -> tuple[str, str]:
    """Number and class of the first rule that fits the route, model and client in `facts`."""
    for number, rule in rules.items():
        patterns = zip((rule.route, rule.model, rule.client), facts)
        name, colon, value = rule.header.partition(":")
        told = headers.get(name.strip().lower())
        header = told is not None and (not colon or fits(value.strip(), told))
        if all(fits(one or "*", fact) for one, fact in patterns) and (header or not name):
            return number, rule.class_
    return "", ""


@dataclass(eq=False)
class Account:
    """Somebody with a key or a port: what they may, and what they have had of it.

    It covers all clients of its name: `alice`, `alice/bob`.  The numbers outlive a reload.
    """

    name: str
    settings: KeySettings = KeySettings()  # a port's are told in the same words
    digest: bytes = field(default=b"", repr=False)  # SHA-256 of the key
    waiting: int = 0
    running: int = 0
    left: float = -1.0  # requests that its rate leaves it, as of `left_at`; below 0: all
    left_at: float = 0.0  # monotonic
    tokens: int = 0  # of the day
    day: str = ""

    @property
    def is_metered(self) -> bool:
        """Whether it has a rate or a budget."""
        return bool(self.settings.rate or self.settings.tokens_per_day)

    def may_use(self, key: str) -> bool:
        """Whether it may use the model of this key."""
        wanted = self.settings.models
        return not wanted or any(fits(one.removesuffix(":latest"), key) for one in wanted)

    @property
    def class_line(self) -> list[tuple[str, str]]:
        """What an answer says of the class of what has none of its own."""
        if not self.name:  # it is nobody's
            return []
        usual = self.lowered(PRIORITY_WORDS[self.settings.class_ or Priority.NORMAL.word])
        return [("X-LLMQ-Class", usual.word)]

    def lowered(self, priority: Priority) -> Priority:
        """The class that it gets where it asks for this one."""
        most = self.settings.max_class
        return max(priority, PRIORITY_WORDS[most]) if most else priority

    def refill(self, now: float) -> tuple[int, float]:
        """The most of its rate, and the seconds in which one more comes; (0, 0) without a rate."""
        match = re.fullmatch(RATE, self.settings.rate)
        if not match:
            return 0, 0.0
        most, each = int(match[1]), SECONDS[match[2]] / int(match[1])
        full = self.left < 0
        self.left = most if full else min(most, self.left + max(0.0, now - self.left_at) / each)
        self.left_at = now
        return most, each

    def take(self, now: float, day: str) -> float:
        """Count one request; else the seconds until it may come, and -1.0 for: until midnight."""
        budget = self.settings.tokens_per_day
        if budget and day == self.day and self.tokens >= budget:
            return -1.0
        most, each = self.refill(now)
        if most and self.left < 1:
            return (1 - self.left) * each
        self.left -= bool(most)
        return 0.0

    def give_back(self) -> None:
        """What one request has taken of the rate, where it comes again."""
        self.left += self.left >= 0

    def note_tokens(self, tokens: int, day: str) -> None:
        self.tokens = self.tokens * (day == self.day) + tokens
        self.day = day

    def limits(self, now: float, day: str, until_midnight: float) -> list[tuple[str, str]]:
        """What every answer says of its rate and budget, in OpenAI's header fields."""
        found: list[tuple[str, str]] = []
        most, each = self.refill(now)
        if most:
            found += limit_fields("requests", most, int(self.left), (most - self.left) * each)
        budget = self.settings.tokens_per_day
        if budget:
            left = max(0, budget - self.tokens * (day == self.day))
            found += limit_fields("tokens", budget, left, until_midnight)
        return found


def limit_fields(what: str, most: int, left: int, seconds: float) -> list[tuple[str, str]]:
    told = {"limit": str(most), "remaining": str(left), "reset": f"{math.ceil(seconds)}s"}
    return [(f"x-ratelimit-{name}-{what}", value) for name, value in told.items()]


NO_ACCOUNT = Account("")  # of whoever has none
GUESSES = 10  # bad keys from one address in GUESS_SECONDS; then no new one from there counts
GUESS_SECONDS = 60.0
GUESSERS = 1000  # addresses that are remembered for it


class Accounts:
    """All who have a key or a port."""

    def __init__(self) -> None:
        self.named: dict[str, Account] = {}
        self.present: list[Account] = []  # of them, those of the settings
        self.by_digest: dict[bytes, Account] = {}
        self._guesses: OrderedDict[str, list[float]] = OrderedDict()  # when, by place
        self._proven: OrderedDict[tuple[bytes, str], None] = OrderedDict()  # that were right there

    def configure(self, settings: Settings) -> None:
        """Have those of the settings and no others; who stays keeps their numbers."""
        rows: dict[str, GrantSettings] = dict(settings.keys)
        rows.update({f"port:{number}": row for number, row in settings.ports.items()})
        self.by_digest, self.present = {}, []
        for name, row in rows.items():
            account = self.named.setdefault(name, Account(name))  # also of one that comes back
            self.present.append(account)
            if isinstance(row, PortSettings):
                account.name = row.client or name
                shared = {one.name: getattr(row, one.name) for one in fields(GrantSettings)}
                account.settings = KeySettings(**shared)
            elif isinstance(row, KeySettings):
                account.settings, account.digest = row, digest_of(row)
                self.by_digest[account.digest] = account

    def of_key(self, key: str, address: str, now: float, *, free: bool = False) -> Account | None:
        """Whose key it is, in a time that tells nothing of any; None: nobody's.

        Who guesses is `rate_limited`; then only a key counts that was right there before, so that
        nobody is locked out by others.  Who is `free` to come without one may send any.
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        account, place = self.by_digest.get(digest), guess_place(address)
        right = account is not None and hmac.compare_digest(account.digest, digest)
        bad = [when for when in self._guesses.get(place, ()) if now - when < GUESS_SECONDS]
        if len(bad) >= GUESSES and not free and not (right and (digest, place) in self._proven):
            error = LlmqError("too many wrong keys came from there", "rate_limited")
            error.retry_after = math.ceil(bad[0] + GUESS_SECONDS - now)
            raise error
        if account is not None and right:
            remember(self._proven, (digest, place), None)
            return account
        if free:
            return NO_ACCOUNT
        remember(self._guesses, place, [*bad, now])
        return None


def remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Keep it as the latest of GUESSERS."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > GUESSERS:
        known.popitem(last=False)


@functools.lru_cache(maxsize=1024)
def guess_place(address: str) -> str:
    """Where guesses are counted together: an address, of IPv6 the network that one person has."""
    wide = ":" in address
    return str(ipaddress.ip_network(f"{address}/64", strict=False)) if wide else address


def read_key(headers: Mapping[str, str], *, page: bool) -> str:
    """The key that a request brings: as Bearer, `x-api-key` or, to a page, Basic's password."""
    scheme, _, told = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return told.strip()
    if scheme.lower() == "basic" and page:
        with contextlib.suppress(ValueError):
            return base64.b64decode(told.strip(), validate=True).decode().partition(":")[2]
    return headers.get("x-api-key", "").strip()


@functools.lru_cache(maxsize=1024)
def is_inside(address: str, networks: Names) -> bool:
    """Whether an address is in one of these networks."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(one) for one in networks)


class Caller(NamedTuple):
    client: str  # the name that shares and limits go by
    foreign: bool  # a web page from elsewhere
    address: str = ""
    account: Account = NO_ACCOUNT


NOBODY = Caller("anonymous", foreign=False)  # until it is known
LLMQ = Caller("llmq", foreign=False)  # by itself


@functools.lru_cache(maxsize=1024)
def identify(
    user_id: str | None, origin: str | None, agent: str | None, foreign: bool, peer: Names
) -> Caller:
    """`user:` + X-User-ID, else the person, else `app:` + Origin or first User-Agent word.

    `peer` is the address that it comes from, and the person that the connection tells.
    """
    address, person = peer
    words = (agent or "").partition("/")[0].split()
    name = "user:" + user_id if user_id and not foreign else person
    if not name and (origin or words):
        name = "app:" + (origin or words[0])
    name = NAME_CHARACTERS.sub("-", name)[:NAME_LENGTH] or NOBODY.client
    return Caller(name, foreign, address)


@functools.lru_cache(maxsize=256)
def is_foreign(origin: str, trusted: Names) -> bool:
    """Whether an Origin is a web page from elsewhere; `null` (a sandboxed frame) is."""
    match = ORIGIN.fullmatch(origin)
    if not match:
        return True
    scheme, host = match[1].lower(), match[2].lower()
    local = scheme in ("http", "https") and is_loopback(host)
    return not (local or scheme in PROGRAM_SCHEMES or origin in trusted)


BLOCKED = "this client, or its address, is blocked here"
NOTHING_SET = ClientSettings()


@dataclass(eq=False)
class Client:
    name: str
    settings: ClientSettings = NOTHING_SET
    tags: list[float] = field(default_factory=lambda: [0.0] * len(Priority))  # see section 9
    credits: list[float] = field(default_factory=lambda: [0.0] * len(Priority))  # likewise
    service: Average = field(default_factory=Average)  # seconds that its requests run
    account: Account = NO_ACCOUNT
    address: str = ""  # that it asked from last
    waiting: int = 0
    queued_bytes: int = 0
    running: int = 0
    served: float = 0.0  # seconds of backend time
    done: int = 0
    failed: int = 0
    left: int = 0  # requests that it gave up itself

    @property
    def at_cap(self) -> bool:
        account = self.account
        if 0 < self.settings.max_concurrent <= self.running:
            return True
        return 0 < account.settings.max_concurrent <= account.running

    def charge(self, priority: Priority, seconds: float) -> None:
        """Move its tag by what it is about to be served, less what it was charged too much."""
        owed = seconds / self.settings.weight + self.credits[priority]
        if owed < 0:
            self.credits[priority] = owed
        else:
            self.credits[priority] = 0.0
            self.tags[priority] += owed

    def correct(self, priority: Priority, charged: float, seconds: float) -> float:
        """Where this has brought it; a tag never falls, what it is ahead is a credit."""
        owed = (seconds - charged) / self.settings.weight
        if owed < 0:
            self.credits[priority] += owed
        else:
            self.tags[priority] += owed
        return self.tags[priority] + self.credits[priority]


class Clients:
    """The clients that llmq remembers, the latest to ask last."""

    def __init__(self) -> None:
        self.known: OrderedDict[str, Client] = OrderedDict()
        self.settings: Mapping[str, ClientSettings] = {}  # by name, `ip:` + address among them

    def of(self, name: str) -> ClientSettings:
        """Its own settings, else those of the key that it came with: `alice` for `alice/bob`."""
        own = self.settings.get(name)
        return own or self.settings.get(name.partition("/")[0], NOTHING_SET)

    def is_blocked(self, caller: Caller) -> bool:
        if not self.settings:
            return False
        return self.of(caller.client).blocked or self.of("ip:" + caller.address).blocked

    def asking(self, caller: Caller) -> Client:
        """The client that asks; what it has under way counts for the account that it came with."""
        client = self.named(caller.client)
        client.address = caller.address
        if not (client.waiting or client.running):
            client.account = caller.account
        return client

    def named(self, name: str) -> Client:
        """The client of this name; a new one takes the place of the longest silent."""
        if name not in self.known:
            surplus = len(self.known) + 1 - MOST_CLIENTS
            if surplus > 0:  # whoever waits or runs stays
                known = self.known.values()
                idle = [client.name for client in known if not client.waiting + client.running]
                for silent in idle[:surplus]:
                    del self.known[silent]
            self.known[name] = Client(name, self.of(name))
        self.known.move_to_end(name)
        return self.known[name]


# ==== 8. Backends =================================================================================
# Who serves.  A backend is one runner, a device what runners on one host share: a request starts
# only where both have a free slot.  Probes and requests tell how a backend does, its last probe
# which models it has.  It has the routes of its kind, until its own answers teach better.

LOADING = re.compile(r"loading model|model is loading|still loading", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|\bbge\b|minilm|rerank", re.IGNORECASE)
LATELY = 10.0  # seconds: a slow probe says nothing about a backend that delivered within them
SECRET_LENGTH = 8  # characters; a shorter value of a header field hides nothing
FIRST_BACKOFF = 0.5  # seconds to the second probe of a backend that is down, doubled each time
UNSUPPORTED_SECONDS = 60.0  # that a route which a backend lacks is not tried again there
LOADING_INTERVAL = 1.0  # seconds between probes of a runner that loads its model
Rows = tuple[dict[str, Any], ...]  # models as a runner lists them
NAMES = ("id", "name", "model")  # the members of such a row that name it
REGISTRY = "registry.ollama.ai/"  # Ollama's default, as are `library/` and `:latest`
CLOUD = (":cloud", "-cloud")  # how names end that Ollama sends on, whether it lists them or not


class State(enum.Enum):
    """Of a backend.  Only one that is up is sent requests."""

    UNKNOWN = "unknown"  # not asked yet
    UP = "up"
    LOADING = "loading"  # it answers 503 because it loads a model: no failure
    DOWN = "down"
    REFUSED = "refused"  # never to be used: it is this llmq itself


@dataclass(eq=False)
class Device:
    """What backends share; `busy` never exceeds `slots`."""

    name: str
    slots: int
    busy: int = 0
    reserve_high: int = 0  # slots that only class high and the overdue may take
    held: bool = False  # by what bears nothing beside it
    claimed: bool = False  # by what is next, and waits until the device is empty
    virtual: list[float] = field(default_factory=lambda: [0.0] * len(Priority))  # see section 9

    def room(self, *, urgent: bool = False, alone: bool = False) -> int:
        """Slots for one more request, that may be urgent or bears nothing beside it."""
        if self.held or self.claimed or (alone and self.busy):
            return 0
        return self.slots - self.busy - (0 if urgent else self.reserve_high)


@dataclass(frozen=True)
class Report:
    """What one probe learned of a backend."""

    kind: str
    entries: Rows  # its models as its /v1/models shows them
    models: Names  # their names
    loaded: Names
    latency: float  # seconds
    tags: Rows = ()  # its models as Ollama's /api/tags shows them
    running: Rows = ()  # the loaded ones as /api/ps does
    began: float = 0.0  # monotonic
    version: str = ""  # of Ollama


@functools.lru_cache(maxsize=1024)
def model_key(name: str) -> str:
    """Names mean the same model in any case, with or without what Ollama takes for granted."""
    bare = name.lower()
    if "/" in bare:
        bare = bare.removeprefix(REGISTRY).removeprefix("library/")
    return bare.removesuffix(":latest")


class Want(NamedTuple):
    """What a ticket waits for; tickets that want the same can start at the same backends."""

    model: str  # a model key
    routes: Names = ()  # where a backend may be asked it, the best first; none: anywhere
    avoid: Backend | None = None  # where the last attempt failed
    backend: str = ""  # the name of the only one that may serve it; none: any
    device: str = ""  # that a lease wants for itself, in place of a model


class Contexts:
    """Tokens by model key that its requests share: Ollama loads a model anew for other contexts."""

    def __init__(self) -> None:
        self.start = 0  # what every model starts with, as configured; 0: the backend's choice
        self.policy: Callable[[str], ModelSettings] | None = None
        self.max: dict[str, int] = {}  # the longest that a model can have
        self.loaded: dict[str, int] = {}  # what it is loaded with
        self.requested: dict[str, int] = {}  # the largest that was asked for and started
        self.requested_at: dict[str, float] = {}  # when that was last used, monotonic

    def shared(self, key: str) -> int:
        """What was asked for or configured; what a model is loaded with by itself binds nobody."""
        if self.policy is None and not self.start:
            return self.requested.get(key, 0)
        own = "" if self.policy is None else self.policy(key).num_ctx
        start = int(own) if own.isdecimal() else self.start
        start = min(start, self.max.get(key) or start)
        return max(start, self.requested.get(key, 0))

    def request(self, key: str, tokens: int, now: float) -> int:
        """The context for a request that starts now and asked for this much."""
        shared = max(self.shared(key), tokens)
        if not shared:
            return 0
        loaded = self.loaded.get(key, 0)
        if loaded >= shared:  # the same never loads anew
            if key in self.requested:
                self.requested_at[key] = now
            return loaded
        self.requested[key], self.requested_at[key] = shared, now
        return shared

    def reset(self, key: str) -> None:
        self.requested.pop(key, None)

    def learn(self, report: Report, at_work: Mapping[str, int]) -> None:
        """Take in what is loaded, and how; forget what is neither loaded nor about to be."""
        self.max = {key: most for key, most in self.max.items() if most}  # others are asked anew
        self.loaded = read_contexts(report.running, lambda row: row.get("context_length"))
        longest = read_contexts(report.tags, lambda row: row["details"].get("context_length"))
        self.max.update(longest)
        for key in set(self.requested).difference(map(model_key, report.loaded)):
            if not at_work.get(key) and self.requested_at.get(key, 0.0) < report.began:
                self.requested.pop(key, None)


class Backend:
    """One runner: where it is, what it has, how it does."""

    def __init__(self, name: str, settings: BackendSettings, device: Device) -> None:
        self.name, self.device, self.kind = name, device, ""
        self.configure(settings, UpstreamSettings())
        self.busy, self.draining = 0, False
        self.needs_probe = False  # it hung up without a word: no request before a probe got through
        self.changed = 0.0  # no probe that began before this tells how it is, monotonic
        self.state = State.UNKNOWN
        self.error: str | None = None  # why it is not up, in words
        self.failures = 0  # in a row
        self.since = 0.0  # when it went down, monotonic
        self.backoff = FIRST_BACKOFF
        self.next_probe = 0.0  # when it is to be probed, monotonic
        self.models_known = False  # it has told its models at least once
        self.models: dict[str, list[str]] = {}  # model key -> names as the backend spells them
        self.digests: dict[str, str] = {}  # model key -> what tells its state, as Ollama lists it
        self.generation = 0  # of its models: rises with each other list, and each time it was down
        self.report: Report | None = None
        self.last_received = float("-inf")  # when it last sent bytes of an answer, monotonic
        self.used = 0.0  # when it was last given a request
        self.turn = 0.0  # rises with each, the less the greater its weight
        self.loaded: frozenset[str] = frozenset()  # model keys, as far as is known
        # By model key what makes it load, and since when.
        self.loading: dict[str, tuple[object, float]] = {}
        self.on_load: Callable[[], object] | None = None  # told that others may start now
        self.load_seconds = Average()  # from such a start to the first byte
        self.load_times: dict[str, Average] = {}  # the same by model key
        self.last_load: tuple[object, float] = (None, 0.0)  # whose start it was, and how long
        self.switched = 0.0  # when it last began to load a model, monotonic
        # By number the tickets that it has passed over, and since when: see section 11.
        self.passed: dict[int, tuple[Any, float]] = {}
        self.stayed = Average()  # seconds for which it passed over one that then made it load
        self.remote: frozenset[str] = frozenset()  # model keys that it only passes on to others
        self.gpu_shares: dict[str, int] = {}  # per cent of a loaded model in graphics memory
        self._entries: dict[str, Facts] | None = None  # by model key, once somebody asks
        self._sizes: dict[str, float] | None = None  # likewise, in GiB
        self.shown: dict[str, tuple[str, dict[str, bool]]] = {}  # by model key: version, abilities
        self.at_work: dict[str, int] = {}  # model key -> requests that run
        self.contexts = Contexts()
        # By (route, model key, or "" for any): its words where it said that it has no such route,
        # and where it has answered well, so that it cannot lack it.
        self.unsupported: dict[tuple[str, str], str] = {}
        self.unsupported_until = 0.0  # when they are tried again, monotonic
        self.supported: set[tuple[str, str]] = set()

    def configure(self, settings: BackendSettings, limits: UpstreamSettings) -> None:
        """What its row says and what else holds for it; kept as the lines of each request to it."""
        self.settings, self.limits, self.url = settings, limits, settings.url
        self.slots, self.weight = settings.slots, settings.weight
        self.become_kind(settings.kind or self.kind)
        self.base = urlsplit(self.url).path  # goes before each route
        self.origin = self.url[: len(self.url) - len(self.base)]
        token = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
        self.headers = {"host": self.origin.partition("://")[2], **token, **settings.headers}
        keys = [self.headers[name] for name in KEY_FIELDS if name in self.headers]
        self.key = keys[0].rpartition(" ")[2] if keys else ""
        said = [value.rpartition(" ")[2] for value in settings.headers.values()]
        told = [value for value in said if len(value) >= SECRET_LENGTH]
        self.secrets = tuple(filter(None, [self.key, *told]))  # that no client is to see
        lines = [f"{name.title()}: {value}\r\n" for name, value in self.headers.items()]
        self.request_lines = "".join(lines).encode("latin-1", "replace")

    def become_kind(self, kind: str) -> None:
        """Be of this kind from now on; of none that is known it is taken for the plainest."""
        self.kind, self.traits = kind, KINDS[kind or "openai"]

    @property
    def most(self) -> int:
        """Requests that it may have at once."""
        return min(self.slots or self.device.slots, self.device.slots)

    def room(self, *, urgent: bool = False, alone: bool = False) -> int:
        """Slots for one more request, here and on its device."""
        shared = self.device.room(urgent=urgent, alone=alone)
        own = (self.slots or self.device.slots) - self.busy
        return own if own < shared else shared

    def takes(self, key: str, *, urgent: bool = False, alone: bool = False) -> bool:
        """Whether a request for this model can start here; while one loads it, no other does."""
        if key in self.loading:
            return False
        return key in self.remote or self.room(urgent=urgent, alone=alone) > 0

    @property
    def usable(self) -> bool:
        return self.state is State.UP and not self.draining and not self.needs_probe

    def has(self, key: str) -> bool:
        return key in self.models or (key.endswith(CLOUD) and self.traits.native)

    def may_have(self, key: str) -> bool:
        """Whether it has the model, or has never told which it has."""
        return not self.models_known or self.has(key)

    def version(self, key: str) -> str:
        """Of a model here: its digest, else the generation of all of them."""
        return self.digests.get(key) or f"{self.name}/{self.generation}"

    def entry(self, key: str) -> Facts:
        """What its list of models tells of one."""
        if self._entries is None:
            entries = self.report.entries if self.report else ()
            self._entries = {model_key(str(one["id"])): one for one in entries}
        return self._entries.get(key, {})

    def size(self, key: str) -> float:
        """GiB of a model as it tells: loaded, else on its disk; 0: not known."""
        if self._sizes is None:
            rows = (*self.report.tags, *self.report.running) if self.report else ()
            sizes = [(model_key(str(one.get("name"))), one.get("size")) for one in rows]
            self._sizes = {
                name: size / GIB for name, size in sizes if type(size) is int and size > 0
            }
        return self._sizes.get(key, 0.0)

    def name_for(self, asked: str) -> str:
        """What to call the model here: as the client does, where this backend takes that."""
        names = self.models.get(model_key(asked), [asked])
        return asked if asked in names or self.traits.native else names[0]

    def is_loaded(self, key: str) -> bool:
        return key in self.loaded

    def must_load(self, key: str) -> bool:
        """Whether a request for this model makes it load here, as far as is known."""
        if self.report is None or key in self.loaded:
            return False
        return self.traits.on_demand and key not in self.remote

    def starts(self, key: str, request: object, now: float) -> None:
        """A request starts here; where its model is not loaded, it is from now on alone there."""
        self.used = now
        self.at_work[key] = self.at_work.get(key, 0) + 1
        if self.must_load(key):
            self.loading[key], self.switched = (request, now), now
            self.loaded = frozenset((key,))
            for waiter, since in self.passed.values():
                if waiter is request:
                    self.stayed.add(now - since)
            self.passed.clear()

    def loaded_now(self, key: str, now: float, *, whole: bool = False) -> bool:
        """The first byte of an answer has come; True if it was to load its model, and has.

        Of a whole answer it is the end as well: how long the load took, that does not tell.
        """
        if key not in self.loading:
            return False
        request, began = self.loading.pop(key)
        if not whole:
            self.load_seconds.add(now - began)
            if key in self.load_times or len(self.load_times) < MODELS_LIMIT:
                self.load_times.setdefault(key, Average()).add(now - began)
            self.last_load = (request, now - began)
        self.changed = self.next_probe = now  # another may have gone for it
        if self.on_load is not None:
            self.on_load()
        return True

    def load_time(self, key: str) -> float:
        """Seconds that a load of this model takes, or of any where that is not known."""
        return self.load_times.get(key, self.load_seconds).value or 0.0

    def load_of(self, request: object) -> float:
        """Seconds of a request's time here that went into the load of its model."""
        loader, seconds = self.last_load
        return seconds if loader is request else 0.0

    def ends(self, key: str, request: object) -> None:
        """A request has ended here; if it was to load its model and got no byte, it has not."""
        left = self.at_work.pop(key) - 1
        if left:
            self.at_work[key] = left
        if key in self.loading and self.loading[key][0] is request:
            del self.loading[key]
            self.loaded -= {key}

    def supports(self, route: str, key: str) -> bool:
        """Whether requests for this model can be sent to that route, as far as is known."""
        if self.unsupported and {(route, ""), (route, key)} & self.unsupported.keys():
            return False
        return route in self.traits.routes or not self.models_known

    def route_for(self, routes: Names, key: str) -> str | None:
        """The first of the routes that it supports."""
        if routes and not self.unsupported and routes[0] in self.traits.routes:
            return routes[0]  # as nearly always
        return next((route for route in routes if self.supports(route, key)), None)

    def forget_unsupported(self, now: float) -> None:
        """Try again what it said long ago that it has not."""
        if self.unsupported and now >= self.unsupported_until:
            self.unsupported.clear()

    def route_unsupported(
        self, route: str, key: str, error: RouteUnsupported, now: float = 0.0
    ) -> None:
        """Its answer says that it has no such route, or not for this model."""
        if not self.unsupported:
            self.unsupported_until = now + UNSUPPORTED_SECONDS
        self.unsupported[route, key if error.for_model else ""] = error.message

    def route_supported(self, route: str | None, key: str) -> None:
        """It has answered well there, for this model and so at all."""
        if route is not None and (route, key) not in self.supported:
            self.supported |= {(route, ""), (route, key)}

    def num_ctx(self, key: str) -> int:
        """Tokens of context that the requests for this model share here; 0: the backend's own."""
        return self.contexts.shared(key) if self.traits.native else 0

    def succeeded(self, now: float, report: Report | None, interval: float) -> None:
        """A probe (with its report) or a request got through."""
        self.failures, self.error, self.backoff = 0, None, FIRST_BACKOFF
        if report is None:
            return
        if self.state is not State.UP:  # it may have been started anew, as something else
            self.unsupported.clear()
            self.supported.clear()
        if self.state is not State.UP or self.report is None or self.report.models != report.models:
            self.generation += 1
        self.digests = {
            model_key(str(row.get("name"))): str(row["digest"])
            for row in report.tags
            if row.get("digest")
        }
        self.models_known, self.report = True, report
        self.become_kind(report.kind)
        self.models = {}
        for name in dict.fromkeys(report.models):
            self.models.setdefault(model_key(name), []).append(name)
        sent_on = [row for row in report.tags if row.get("remote_host")]
        self.remote = frozenset(model_key(str(row.get("name"))) for row in sent_on)
        self._become(State.UP, None)
        fresh = report.began >= self.changed  # else it is looked at once more
        self.needs_probe, self.next_probe = self.needs_probe and not fresh, now + interval * fresh
        self.contexts.learn(report, self.at_work)
        self.gpu_shares, self._entries, self._sizes = read_shares(report.running), None, None
        self.shown = {key: one for key, one in self.shown.items() if one[1]}  # others: anew
        if report.began >= self.switched:
            self.loaded = frozenset(map(model_key, report.loaded))
            self.loading = {key: one for key, one in self.loading.items() if key not in self.loaded}
            self.loaded |= self.loading.keys()

    def failed(self, now: float, why: str, interval: float, *, refused: bool = False) -> None:
        """A probe or request failed.  Many in a row, or nobody listening: only probes go there."""
        self.failures += 1
        opens = self.failures >= self.settings.failures_to_open
        self.error, self.next_probe = printable(why, ERROR_SHOWN), now  # look again at once
        if self.state is State.DOWN:
            self.backoff = min(2 * self.backoff, self.settings.reset_after)
            self.next_probe = now + self.backoff
        elif refused or opens or self.state is State.UNKNOWN:
            self._become(State.DOWN, why)
            self.backoff = min(self.backoff, interval, self.settings.reset_after)
            self.since, self.next_probe = now, now + self.backoff

    def answered(self, now: float, why: str, interval: float) -> None:
        """It was asked for its models and said something else: what it serves, it serves still."""
        self._become(State.UP, why)
        self.failures, self.needs_probe, self.next_probe = 0, False, now + interval

    def loads(self, now: float, why: str) -> None:
        self._become(State.LOADING, why)
        self.next_probe = now + LOADING_INTERVAL

    def refuse(self, now: float, why: str, interval: float) -> None:
        self._become(State.REFUSED, why)
        self.since, self.next_probe = now, now + interval

    def _become(self, state: State, why: str | None) -> None:
        """A change of state is one line in the log; a runner's words forge no other (CWE-117)."""
        why = printable(why, ERROR_SHOWN) if why else None
        if state is not self.state:
            log.info("backend %s is %s%s", self.name, state.value, f": {why}" if why else "")
        self.state, self.error = state, why


MODELS_LIMIT = 10_000  # of one runner


def read_models(payload: Any) -> Rows:
    """The entries of a `GET /v1/models` answer; ValueError when it is not one."""
    facts = payload if isinstance(payload, dict) else {}
    data = facts.get("data")
    if data is None and facts.get("object") == "list":
        data = []  # Ollama without a model
    if not isinstance(data, list) or not all(isinstance(row, dict) and "id" in row for row in data):
        raise ValueError("its /v1/models is no list of models")
    return sound_rows(data)


def sound_rows(rows: Any) -> Rows:
    """The models in a list as a runner tells it, the first MODELS_LIMIT.

    Of one that cannot be told on only the names are kept.
    """
    rows = rows[:MODELS_LIMIT] if isinstance(rows, list) else []
    found = [row for row in rows if isinstance(row, dict)]
    return tuple(
        row if is_sound(row) else {name: str(row[name]) for name in NAMES if name in row}
        for row in found
    )


def is_sound(row: dict[str, Any]) -> bool:
    """Whether its numbers are numbers, and the time that it gives is one."""
    created = row.get("created")
    try:
        render_json(row)
    except ValueError:
        return False
    return not isinstance(created, (int, float)) or 0 <= created < 1e10


def read_shares(rows: Iterable[Facts]) -> dict[str, int]:
    """Per cent in graphics memory by model key, as rows of Ollama's /api/ps tell."""
    found = {}
    for row in rows:
        size, there = row.get("size"), row.get("size_vram")
        if type(size) is int and type(there) is int and 0 <= there <= size and size:
            found[model_key(str(row.get("name")))] = 100 * there // size
    return found


def read_abilities(entry: Facts) -> dict[str, bool]:
    """What a runner tells that a model can, and cannot; what it does not tell is left out."""
    told, kind = entry.get("capabilities"), entry.get("type")
    words = {one for one in told if isinstance(one, str)} if isinstance(told, list) else set()
    found = {"tools": bool(words & {"tools", "tool_use"})} if words else {}
    if words and kind is None:
        found["vision"] = "vision" in words
    if words & {"completion", "embedding"}:
        found["embedding"] = "completion" not in words
    if kind in ("llm", "vlm", "embeddings"):  # LM Studio's
        found.update(vision=kind == "vlm", embedding=kind == "embeddings")
    architecture = entry.get("architecture")
    seen = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    if isinstance(seen, list):
        found["vision"] = "image" in seen
    return found


def length_of(entry: Facts) -> int:
    """The longest context that a list of models tells of one; 0: it does not."""
    meta = entry.get("meta")
    trained = meta.get("n_ctx_train") if isinstance(meta, dict) else None
    names = ("loaded_context_length", "max_model_len", "max_context_length")
    told = (*map(entry.get, names), trained)
    return next((one for one in told if type(one) is int and one > 0), 0)


def read_contexts(rows: Iterable[dict[str, Any]], read: Callable[[Any], Any]) -> dict[str, int]:
    """Tokens of context by model key, where a row of Ollama's tells them."""
    found = {}
    for row in rows:
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            tokens = read(row)
            if isinstance(tokens, int) and tokens > 0:
                found[model_key(str(row["name"]))] = tokens
    return found


# ==== 9. Fair share ===============================================================================
# Whose turn it is inside a class: start-time fair queueing (Goyal, Vin, Cheng 1996) by served
# seconds.  A client has a tag for each class, its virtual time: the seconds that it was served
# there, divided by its weight.  The least tag goes first.  A start charges what the client's
# requests take on average, the end corrects that.  Who comes back joins at the virtual time of the
# devices that can serve it, the tag of the latest fair start that could have been there (as in
# SFQ(D), Jin, Chase, Kaur 2004: a long request stops no clock): a pause earns no credit, one
# low request that waits holds nothing up, and what one device had is no debt on another.
#
# A group is all of one class that wants the same, and so can start at the same backends.  In it a
# lane is what one client has waiting, oldest first.  Keys of lanes only rise while they wait, so
# that a stale top is put right where it stands, and picking costs the same at any depth.


class TicketState(enum.IntEnum):
    NEW = 0
    WAITING = 1
    RUNNING = 2
    ENDED = 3

    @property
    def word(self) -> str:
        return self.name.lower()


MOVES = {  # the legal moves of a ticket; it waits again in another class or for another attempt
    TicketState.NEW: (TicketState.WAITING, TicketState.RUNNING),
    TicketState.WAITING: (TicketState.WAITING, TicketState.RUNNING, TicketState.ENDED),
    TicketState.RUNNING: (TicketState.WAITING, TicketState.ENDED),
    TicketState.ENDED: (),
}


class Ticket:
    """One request in the queue."""

    __slots__ = (
        "aged", "arrived", "attempts", "backend", "charged", "client", "deadline", "foreign", "id",
        "longest", "number", "patient", "priority", "session", "size", "started", "state", "took",
        "want",
    )  # fmt: skip

    def __init__(
        self,
        ident: str,
        client: Client,
        want: Want,
        priority: Priority,
        size: int = 0,
        foreign: bool = False,
    ) -> None:
        self.id = ident
        self.client = client
        self.want = want
        self.priority = priority
        self.size = size  # bytes of its body
        self.foreign = foreign  # it came from a web page elsewhere
        self.session = ""  # the conversation that it belongs to, if it says so
        self.patient = False  # nobody waits for it: it is a job
        self.longest: float | None = None  # seconds that it wants to wait at most
        self.number = 0  # order of arrival
        self.arrived = self.started = 0.0  # monotonic
        self.aged = 0.0  # what its group's clock said when it came, less what it had waited before
        self.deadline: float | None = None  # while it waits, if it may not wait for ever
        self.attempts = 0
        self.backend: Backend | None = None
        self.took = 0  # slots that it holds
        self.charged = 0.0  # seconds, when it started
        self.state = TicketState.NEW

    def move(self, state: TicketState) -> None:
        if state not in MOVES[self.state]:
            raise RuntimeError(f"ticket {self.id} cannot go from {self.state} to {state}")
        self.state = state

    def part_of(self, limit: int) -> int:
        """Of so many that may wait, its like: jobs leave half to those who wait at a desk."""
        return limit // 2 or 1 if self.patient else limit

    @property
    def model(self) -> str:
        """The key of its model."""
        return self.want.model

    @property
    def kind(self) -> tuple[str, int]:
        """What takes alike among requests for a model: the same route, a size within four times."""
        return self.want.routes[0] if self.want.routes else "", self.size.bit_length() // 2


@dataclass(eq=False)
class Lane:
    """What one client has waiting in a group, by number, oldest first."""

    client: Client
    head: Ticket  # the oldest
    tickets: OrderedDict[int, Ticket] = field(default_factory=OrderedDict)


class Ranking:
    """The lanes of a group by a key; the least is found without a look at the others."""

    def __init__(self, key: Callable[[Lane], Any]) -> None:
        self.key = key
        self._heap: list[tuple[Any, str]] = []  # (key, client)
        self._latest: dict[str, Any] = {}  # by client the key that counts; others are stale

    def push(self, lane: Lane) -> None:
        name = lane.client.name
        self._latest[name] = key = self.key(lane)
        heapq.heappush(self._heap, (key, name))
        if len(self._heap) > 2 * len(self._latest) + 64:  # mostly stale
            self._heap = [(key, name) for name, key in self._latest.items()]
            heapq.heapify(self._heap)

    def drop(self, lane: Lane) -> None:
        self._latest.pop(lane.client.name, None)

    def first(self, lanes: Mapping[str, Lane]) -> Lane | None:
        """The lane with the least key; cleans the heap as it looks."""
        while self._heap:
            key, name = self._heap[0]
            if self._latest.get(name) != key:
                heapq.heappop(self._heap)
                continue
            lane = lanes[name]
            now = self.key(lane)
            if now == key:
                return lane
            self._latest[name] = now
            heapq.heapreplace(self._heap, (now, name))
        return None


class Group:
    """All of a class that waits with the same candidates, in lanes."""

    def __init__(self, want: Want, priority: Priority) -> None:
        self.want = want
        self.priority = priority
        self.lanes: dict[str, Lane] = {}  # by client
        self.fair = Ranking(lambda lane: (lane.client.tags[priority], lane.head.number))
        self.oldest = Ranking(lambda lane: lane.head.number)
        self.parked: set[str] = set()  # clients at their cap, in neither order
        self.size = 0  # tickets
        self.clock = 0.0  # seconds in which a backend was up for it, and the mode open

    def add(self, ticket: Ticket) -> None:
        name, number = ticket.client.name, ticket.number
        lane = self.lanes.get(name)
        if lane is None:
            lane = self.lanes[name] = Lane(ticket.client, ticket)
        newest = next(reversed(lane.tickets), -1)
        lane.tickets[number] = ticket
        self.size += 1
        ticket.aged += self.clock
        if newest > number:  # it comes back: to its place by arrival
            for later in [later for later in lane.tickets if later > number]:
                lane.tickets.move_to_end(later)
        if number > lane.head.number:
            return
        lane.head = ticket
        if name not in self.parked:
            self.fair.push(lane)
            self.oldest.push(lane)

    def remove(self, ticket: Ticket) -> None:
        lane = self.lanes[ticket.client.name]
        del lane.tickets[ticket.number]
        self.size -= 1
        ticket.aged -= self.clock
        if lane.tickets:
            lane.head = next(iter(lane.tickets.values()))
        else:
            self._drop(lane)
            self.parked.discard(ticket.client.name)
            del self.lanes[ticket.client.name]

    def head(self, order: Ranking) -> Ticket | None:
        """The first ticket of the first lane whose client may have another request running."""
        if len(self.lanes) == 1:  # where there is one, no order is asked
            only = next(iter(self.lanes.values()))
            return None if only.client.at_cap else only.head
        while (lane := order.first(self.lanes)) is not None:
            if not lane.client.at_cap:
                return lane.head
            self._drop(lane)
            self.parked.add(lane.client.name)
        return None

    def overdue(self, aging: float) -> Ticket | None:
        """Its oldest ticket, if that has waited so many seconds; 0: none ever has."""
        head = self.head(self.oldest) if aging else None
        return head if head is not None and self.clock - head.aged >= aging else None

    def heads(self, names: Iterable[str]) -> Iterator[Ticket]:
        """The first tickets of these clients, as far as they may start."""
        for name in names:
            lane = self.lanes.get(name)
            if lane is not None and not lane.client.at_cap:
                yield lane.head

    def unpark_all(self, client: Client) -> None:
        """The client may have more running now, and who else has its key."""
        for name in list(self.parked):
            lane = self.lanes[name]
            if lane.client is client or lane.client.account is client.account is not NO_ACCOUNT:
                self.unpark(name)

    def unpark(self, name: str) -> None:
        """The client may have more running now."""
        if name in self.parked:
            self.parked.remove(name)
            self.fair.push(self.lanes[name])
            self.oldest.push(self.lanes[name])

    def _drop(self, lane: Lane) -> None:
        self.fair.drop(lane)
        self.oldest.drop(lane)


# ==== 10. Fleet ===================================================================================
# All backends: who can serve what, where there is room, and which one is picked.  A start takes
# what it needs in one place, an end gives it back in one; a lease takes a device as a whole.

NO_POLICY = ModelSettings()


def pick_backend(
    candidates: Sequence[Backend], key: str, last: Backend | None = None
) -> Backend | None:
    """Among backends with room: the model loaded, who served it last, most room, longest unused."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None

    def rank(each: Backend) -> tuple[bool, bool, int, float]:
        return not each.is_loaded(key), each is not last, -each.room(urgent=True), each.turn

    return min(candidates, key=rank)


SESSIONS = 1000  # conversations whose backend is remembered, at most


class Fleet:
    """All backends and their devices, as configured or found."""

    def __init__(self) -> None:
        self.model_settings: Mapping[str, ModelSettings] = {}  # by name or pattern
        self._policies: dict[str, ModelSettings] = {}  # by model key, as found so far
        self.backends: dict[str, Backend] = {}
        self.devices: dict[str, Device] = {}
        self.shrunk = 0.0  # when a backend was last removed, monotonic
        self.on_load: Callable[[], object] | None = None  # told that a backend has loaded a model
        self.turn = 0.0  # of the backend that was given the last request
        self.sessions: OrderedDict[tuple[str, str], Backend] = OrderedDict()  # by client and name
        self.lessors: dict[str, Backend] = {}  # by device, what a lease of it runs at
        self.relayed: Names = ()  # header fields of a client that some backend is to get
        self.claimed: list[Device] = []  # those that are to run empty

    def policy(self, key: str) -> ModelSettings:
        """What is configured for a model; a lease has none."""
        if not self.model_settings or not key:
            return NO_POLICY
        if key not in self._policies:
            if len(self._policies) >= MODELS_LIMIT:
                self._policies.clear()
            self._policies[key] = policy_of(self.model_settings, key)
        return self._policies[key]

    def add(self, name: str, settings: BackendSettings, device: str, slots: int) -> Backend:
        """Take in a backend; `device` is the name of what it shares, `slots` are that device's."""
        shared = self.device_of(device, slots)
        self.backends[name] = backend = Backend(name, settings, shared)
        backend.on_load = self.on_load
        return backend

    def device_of(self, name: str, slots: int) -> Device:
        device = self.devices.setdefault(name, Device(name, slots))
        device.slots = slots
        return device

    def move(self, backend: Backend, device: Device) -> None:
        """The backend is on another device from now on, and so is what runs there."""
        old = backend.device
        old.busy -= backend.busy
        device.busy += backend.busy
        if old.held and not old.busy and device is not old:  # what had it whole has gone along
            old.held, device.held = False, True
        backend.device = device

    def remove(self, name: str, now: float) -> None:
        """Take out a backend: what runs there ends in peace, what waited is judged again."""
        self.backends.pop(name).draining = True
        self.shrunk = now
        self.drop_unused()

    def drop_unused(self) -> None:
        used = {backend.device for backend in self.backends.values()}
        kept = [device for device in self.devices.values() if device in used or device.busy]
        self.devices = {device.name: device for device in kept}  # a busy one is not made anew

    def configure(
        self,
        rows: dict[str, BackendSettings],
        places: dict[str, str],
        settings: Settings,
        now: float,
    ) -> None:
        """Have the backends of these rows and no others, on the devices that `places` names."""
        self.model_settings, self._policies = settings.models, {}
        self.relayed = tuple({name for row in rows.values() for name in row.relay_headers})
        for name, backend in list(self.backends.items()):
            row = rows.get(name)
            if row is None or row.url != backend.url:
                self.remove(name, now)
        for name, row in rows.items():
            slots = settings.slots_of(places[name])
            backend = self.backends.get(name) or self.add(name, row, places[name], slots)
            self.move(backend, self.device_of(places[name], slots))
            backend.device.reserve_high = min(settings.reserve_of(places[name]), slots - 1)
            if row != backend.settings:  # its list of models may be another
                backend.changed, backend.next_probe = now, 0.0
                if row.kind != backend.settings.kind:  # it is to be asked again
                    backend.become_kind("")
            backend.configure(row, settings.limits_of(row))
            backend.contexts.start = settings.upstream.num_ctx
            backend.contexts.policy = self.policy if settings.models else None
        self.drop_unused()

    def version(self, key: str) -> str:
        """Tells one state of a model from another, over all backends that may be asked for it."""
        only = self.policy(key).backends
        having = [one for one in self.backends.values() if one.has(key)]
        able = [one for one in having if not only or one.name in only]
        return " ".join(sorted({one.version(key) for one in able}))

    def serving(self, want: Want) -> list[Backend]:
        """Every backend that has the model and a route, or may have them, whatever its state."""
        key, routes, pinned = want.model, want.routes, want.backend
        if want.device:
            return self.lessor(want.device)
        only = (pinned,) if pinned else self.policy(key).backends if self.model_settings else ()
        return [
            each
            for each in self.backends.values()
            if (key in each.models or each.may_have(key))
            and not (each.state is State.REFUSED or each.draining)
            and (not only or each.name in only)
            and (not routes or each.route_for(routes, key))
        ]

    def candidates(self, want: Want, *, urgent: bool = False) -> list[Backend]:
        """Backends where a request could start now, without the one it failed at unless alone."""
        key, able = want.model, self.serving(want)
        if want.avoid is not None:
            able = [each for each in able if each.usable and each is not want.avoid] or able
        alone = bool(want.device) or self.policy(key).exclusive
        return [
            each for each in able if each.usable and each.takes(key, urgent=urgent, alone=alone)
        ]

    def claim(self, want: Want) -> None:
        """Let a device run empty for what is next and bears nothing beside it there."""
        policy = self.policy(want.model)
        if not (policy.exclusive or want.device):
            return
        devices = [backend.device for backend in self.serving(want) if backend.usable]
        if devices:
            emptiest = min(devices, key=lambda device: device.busy)
            emptiest.claimed = True
            self.claimed.append(emptiest)

    def unclaim(self) -> None:
        """Whoever claimed a device has to say so again: it may have left."""
        while self.claimed:
            self.claimed.pop().claimed = False

    def lessor(self, name: str) -> list[Backend]:
        """What stands for the whole of a device when it is leased; none if there is none."""
        device = self.devices.get(name)
        if device is None:
            return []
        lessor = self.lessors.get(name)
        if lessor is None or lessor.device is not device:
            self.lessors[name] = lessor = Backend(name, BackendSettings(url="http://-"), device)
            lessor.state = State.UP
        return [lessor]

    def starts(self, ticket: Ticket, backend: Backend, now: float) -> None:
        """A request starts at a backend: it takes a slot there, and what else it needs."""
        key, device = ticket.want.model, backend.device
        if key not in backend.remote:
            ticket.took = 1
            if ticket.want.device or self.model_settings:
                device.held = bool(ticket.want.device) or self.policy(key).exclusive
            device.busy += 1
            backend.busy += 1
        backend.starts(key, ticket, now)
        self.turn = max(self.turn, backend.turn)
        backend.turn = self.turn + 1 / backend.weight
        if ticket.session:
            self.sessions[ticket.client.name, ticket.session] = backend
            self.sessions.move_to_end((ticket.client.name, ticket.session))
            if len(self.sessions) > SESSIONS:
                self.sessions.popitem(last=False)

    def ends(self, ticket: Ticket, backend: Backend) -> None:
        """It gives back what it took."""
        if ticket.took:
            device, ticket.took = backend.device, 0
            device.busy -= 1
            device.held = device.held and device.busy > 0
            backend.busy -= 1
        backend.ends(ticket.want.model, ticket)
        if ticket.want.device or backend.draining:  # it may have been the last on its device
            self.drop_unused()

    def served_last(self, ticket: Ticket) -> Backend | None:
        """Where the conversation was last: its prompt may be cached there."""
        if not ticket.session:
            return None
        return self.sessions.get((ticket.client.name, ticket.session))

    def startable_models(self, waiting: Iterable[str]) -> set[str]:
        """Of these keys of models those that a request could start for, as far as slots go."""
        free = [one for one in self.backends.values() if one.usable and one.room(urgent=True) > 0]
        if not all(each.models_known for each in free):
            return set(waiting)
        listed = {key for each in free for key in each.models}
        native = any(each.traits.native for each in self.backends.values())
        listed |= {key for each in self.backends.values() for key in each.remote} | {""}  # leases
        return {key for key in waiting if key in listed or (native and key.endswith(CLOUD))}

    def has_room(self) -> bool:
        """Whether any request could start: at a free slot, or beside the slots."""
        for device in self.devices.values():
            if device.busy < device.slots:
                return True
        return any(backend.remote for backend in self.backends.values())

    def trouble(self) -> str | None:
        """What everybody is told while no runner answers."""
        answering, backends = (State.UP, State.LOADING, State.UNKNOWN), self.backends.values()
        if any(backend.state in answering for backend in backends):
            return None
        if not backends or any(is_loopback(urlsplit(one.url).hostname or "") for one in backends):
            return NO_RUNNER
        return "no backend answers: " + ", ".join(f"{one.name} ({one.error})" for one in backends)

    def why_none(self, want: Want) -> str:
        """Why nobody can serve this now."""
        having = [one for one in self.backends.values() if one.may_have(want.model)]
        having = [one for one in having if want.backend in ("", one.name)]
        states = [f"{one.name} is {'draining' if one.draining else 'down'}" for one in having]
        return " and ".join(states) or "its backend is gone"

    def without_keys(self, words: str) -> str:
        """What a backend says, without the keys that it was sent: some repeat them."""
        for secret in {one for backend in self.backends.values() for one in backend.secrets}:
            words = words.replace(secret, HIDDEN)
        return words

    def down_since(self, want: Want) -> float | None:
        """When the last backend of this model went down; None while one is up or loads."""
        serving = self.serving(want)
        down = all(backend.state is State.DOWN for backend in serving)
        return max([self.shrunk, *(backend.since for backend in serving)]) if down else None

    def lists(self, asked: str) -> bool:
        """Whether some backend has told that it has the model."""
        key = model_key(asked)
        return any(key in backend.models for backend in self.backends.values())

    def knows(self, asked: str) -> bool | None:
        """True: some backend has the model.  False: all have told and none has.  None: not sure."""
        key = model_key(asked)
        enabled = [each for each in self.backends.values() if each.state is not State.REFUSED]
        if any(backend.has(key) for backend in enabled):
            return True
        return False if enabled and all(each.models_known for each in enabled) else None

    def check_spelling(self, asked: str) -> None:
        """BadRequest when the name means two models of one backend and equals neither."""
        for backend in self.backends.values():
            names = backend.models.get(model_key(asked), [])
            if len(names) > 1 and asked not in names:
                message = f"model {printable(asked)!r} means {' or '.join(names)}"
                raise BadRequest(message, param="model")

    def named(self, name: str) -> Backend:
        if name not in self.backends:
            raise LlmqError(f"there is no backend {printable(name)}", "not_found")
        return self.backends[name]

    def why_unsupported(self, want: Want) -> str:
        """Why no backend takes these routes for this model."""
        having = [backend for backend in self.backends.values() if backend.may_have(want.model)]
        for (route, model), words in (row for each in having for row in each.unsupported.items()):
            if route in want.routes and model in ("", want.model):
                return words
        return f"no backend of model {printable(want.model)!r} speaks {want.routes[0]}"

    def default_model(self) -> str | None:
        """The first model of the first backend that is not for embeddings."""
        reports = [backend.report for backend in self.backends.values() if backend.report]
        names = (name for report in reports for name in report.models)
        return next((name for name in names if not EMBEDDING.search(name)), None)


# ==== 11. Scheduler ===============================================================================
# Who goes next, as a pure object: plain values in, tickets out, `now` is an argument.  It owns the
# grant: a waiting ticket ends by `cancel` or `expire`, a running one by `finish` or `retry`, each
# exactly once, and each way gives back what the ticket held.
#
# A pick goes class by class, in each to the client with the least tag that can start.  Four things
# bend that: one start in eight goes to the oldest overdue request; a boosted client has every
# second start of its class; what needs a whole device lets it run empty when its turn has come; and
# requests for a model that is loaded go, for a while, before one that would have another loaded.


FEW = 8  # models; with fewer waiting a pick looks at all of them
OVERDUE_SHARE = 8  # of so many starts one may go to an overdue request
AFFINITY_LEAST = 5.0  # seconds that a loaded model's requests may go first, however fast it loads
LOADS_WORTH = 20  # and of the time that a load takes: so at most a twentieth is spent on loads
MODELS_MEASURED = 2000  # models and kinds of requests whose times are known, at most


class Mode(enum.Enum):
    OPEN = "open"
    PRIORITY = "priority"  # only high starts, the rest waits safely
    PAUSED = "paused"  # none starts


Start = tuple[Ticket, Backend]
Facet = tuple[Any, ...]  # what requests for a model may have alike, see `Ticket.kind`


class Backlog:
    """What waits, in its groups and within its limits; what is known of how long it will run."""

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self.fleet = fleet
        self.settings = settings
        self.waiting: dict[str, Ticket] = {}
        self.running: dict[str, Ticket] = {}
        self.queued_bytes = 0
        self.most_waiting = 0  # at once, since somebody looked
        self.service = Average()  # seconds that a request runs
        self.services: dict[tuple[Any, ...], Average] = {}  # by model key, device and kind
        # By class and model key, so that a pick need not look at models that cannot start.
        self._groups: dict[Priority, dict[str, dict[Want, Group]]] = {one: {} for one in Priority}
        self._backlogs: dict[Priority, dict[Client, int]] = {one: {} for one in Priority}
        self._boosted: dict[Priority, set[str]] = {one: set() for one in Priority}  # that wait
        self._ended = dict.fromkeys(Priority, 0.0)  # the furthest that an end has brought anybody
        self._deadlines: list[tuple[float, int, Ticket]] = []

    @property
    def limits(self) -> QueueSettings:
        return self.settings.queue

    def groups(self) -> Iterator[Group]:
        for models in self._groups.values():
            for alike in models.values():
                yield from alike.values()

    def _enter(self, ticket: Ticket) -> None:
        client, priority, want = ticket.client, ticket.priority, ticket.want
        ticket.move(TicketState.WAITING)
        backlog = self._backlogs[priority]
        if client not in backlog:
            self._join(ticket)
            if client.settings.boost:
                self._boosted[priority].add(client.name)
        backlog[client] = backlog.get(client, 0) + 1
        groups = self._groups[priority].setdefault(want.model, {})
        if want not in groups:
            groups[want] = Group(want, priority)
        ticket.want = groups[want].want  # one for all that want the same
        groups[want].add(ticket)
        self.waiting[ticket.id] = ticket
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self.queued_bytes += ticket.size
        client.waiting += 1
        client.account.waiting += 1
        client.queued_bytes += ticket.size
        longest = self.limits.waits[priority] or math.inf
        if ticket.longest is not None:
            longest = min(longest, ticket.longest)
        if longest < math.inf:
            ticket.deadline = ticket.arrived + longest
            heapq.heappush(self._deadlines, (ticket.deadline, ticket.number, ticket))
            if len(self._deadlines) > 2 * len(self.waiting) + 64:  # most are of tickets long gone
                alive = {one for one in self._deadlines if one[0] == one[2].deadline}
                self._deadlines = sorted(alive)

    def _leave(self, ticket: Ticket) -> None:
        client, priority, want = ticket.client, ticket.priority, ticket.want
        models = self._groups[priority]
        groups = models[want.model]
        groups[want].remove(ticket)
        if not groups[want].lanes:
            del groups[want]
        if not groups:
            del models[want.model]
        backlog = self._backlogs[priority]
        backlog[client] -= 1
        if not backlog[client]:
            del backlog[client]
            self._boosted[priority].discard(client.name)
        del self.waiting[ticket.id]
        ticket.deadline = None
        self.queued_bytes -= ticket.size
        client.waiting -= 1
        client.account.waiting -= 1
        client.queued_bytes -= ticket.size

    def _devices(self, want: Want) -> Collection[Device]:
        """What can serve it; where there is one device, that, without a look."""
        devices = self.fleet.devices.values()
        if len(devices) < 2:
            return devices
        return [backend.device for backend in self.fleet.serving(want)]

    def _join(self, ticket: Ticket) -> None:
        """A client that had nothing waiting in its class comes in: a pause has earned nothing."""
        client, priority = ticket.client, ticket.priority
        others = self.running or self.waiting
        reached = None
        for device in self._devices(ticket.want):
            here = device.virtual[priority]
            if not device.busy:  # nobody moves its time: it is where the others, or the last, are
                behind = self._least_tag(priority, client) if others else None
                here = max(here, self._ended[priority] if behind is None else behind)
                device.virtual[priority] = here
            reached = here if reached is None or here < reached else reached
        tag = client.tags[priority]
        if reached is not None and tag < reached:
            tag = client.tags[priority] = reached
        if client.credits[priority]:
            ahead = tag - (reached or 0.0)
            client.credits[priority] = max(client.credits[priority], -ahead)

    def _least_tag(self, priority: Priority, but: Client) -> float | None:
        """The least tag of the others that wait or run in a class."""
        active = {one.client for one in self.running.values() if one.priority is priority}
        active.update(self._backlogs[priority])
        return min((one.tags[priority] for one in active if one is not but), default=None)

    def waiting_in(self, priority: Priority) -> int:
        """How many wait in a class."""
        return sum(self._backlogs[priority].values())

    def in_order(self) -> list[Ticket]:
        """The waiting tickets as they would start if each could: by class, share and arrival."""
        ahead: dict[tuple[Client, Priority], float] = {}
        rows = []
        for ticket in sorted(self.waiting.values(), key=attrgetter("number")):
            client, priority = ticket.client, ticket.priority
            tag = ahead.get((client, priority), client.tags[priority])
            each = client.service.value or self.service.value or 1.0
            ahead[client, priority] = tag + each / client.settings.weight
            rows.append((priority, tag, ticket.number, ticket))
        rows.sort()  # no two have one number
        return [row[3] for row in rows]

    def _check_room(self, ticket: Ticket) -> None:
        limits, client, priority = self.limits, ticket.client, ticket.priority
        in_class, most = limits.depths[priority], limits.max_depth // 2 or 1
        keyed = client.account.settings.max_waiting
        if len(self.waiting) >= ticket.part_of(limits.max_depth):
            message = f"{len(self.waiting)} requests are waiting, the queue is full"
        elif in_class and self.waiting_in(priority) >= in_class:
            message = f"{in_class} requests of class {priority.word} are waiting, as many as may"
        elif self.queued_bytes + ticket.size > limits.max_queued_bytes:
            message = "the waiting requests hold all the memory they may"
        elif client.waiting >= ticket.part_of(min(client.settings.max_waiting or most, most)):
            message = f"{client.name} has {client.waiting} requests waiting, as many as it may"
        elif keyed and client.account.waiting >= ticket.part_of(keyed):
            message = f"{client.account.waiting} requests with that key are waiting, as many as may"
        elif client.queued_bytes + ticket.size > limits.max_queued_bytes // 2:
            message = f"{client.name} holds half the memory of the queue"
        elif ticket.foreign and client.waiting >= MOST_PER_ORIGIN:
            message = f"a web page may have {MOST_PER_ORIGIN} requests waiting"
        else:
            return
        error = LlmqError(message, "queue_full")
        error.status, error.retry_after = limits.overflow_status, self.predicted_wait(ticket)
        raise error

    def note_service(self, key: str, seconds: float, device: str, kind: Facet = ()) -> None:
        """A request has run so long there: so will others for its model, above all its like."""
        self.service.add(seconds)
        for place in ((key, device), (key, device, *kind)) if kind else ((key, device),):
            average = self.services.get(place)
            if average is not None:
                average.add(seconds)
            elif len(self.services) < MODELS_MEASURED:
                self.services[place] = Average(seconds)

    def service_of(self, key: str, device: str, kind: Facet = ()) -> float | None:
        """Seconds that requests like it run there, or those for its model; None if none has yet."""
        average = self.services.get((key, device, *kind)) or self.services.get((key, device))
        return None if average is None else average.value

    def predicted_wait(self, ticket: Ticket) -> int:
        """Whole seconds until this one would start, came it now: 1 to 60, for Retry-After."""
        seconds = self.ahead_of(self.fleet.serving(ticket.want), ticket.priority)[1]
        return max(1, min(60, round(seconds or self.service.value or 1.0)))

    def ahead_of(
        self, able: Sequence[Backend], priority: Priority = Priority.NORMAL
    ) -> tuple[float, float]:
        """What goes before a request of this class at these backends.

        That is how many wait for each slot, and the seconds until it would start, came it now.
        """
        devices = {backend.device for backend in able}
        usual = self.service.value or 1.0

        def takes(model: str) -> float:
            known = [self.service_of(model, device.name) for device in devices]
            return next((seconds for seconds in known if seconds is not None), usual)

        runs = [
            one for one in self.running.values() if one.backend and one.backend.device in devices
        ]
        ahead, waiting = sum(takes(one.want.model) for one in runs), 0
        for group in self.groups():
            if group.priority <= priority and any(one.has(group.want.model) for one in able):
                ahead += group.size * takes(group.want.model)
                waiting += group.size
        slots = sum(device.slots for device in devices) or 1
        return waiting / slots, ahead / slots


class Scheduler(Backlog):
    """The queue: what waits, what runs, and who goes next."""

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        super().__init__(fleet, settings)
        self.mode = Mode.OPEN
        self._numbers = count()
        self._boost_due = dict.fromkeys(Priority, True)  # the last start was of another
        self.started = [0] * len(Priority)  # by class, ever
        self._unaged = 0  # starts since one went to an overdue request
        self._judged: float | None = None  # when the clocks of the groups were last moved
        self._overdue: list[Group] = []  # that had overdue requests then

    # ---- coming and going

    def submit(self, ticket: Ticket, now: float) -> None:
        """Let a new ticket wait; `queue_full` when there is no place for it."""
        self._arrive(ticket, now)
        self._enter(ticket)

    def start(self, ticket: Ticket, now: float) -> Backend | None:
        """Start a new ticket at once, if nobody waits and a backend has room; where it has started.

        So no queue is built for it, to be torn down again; who is boosted takes turns in it.
        """
        backend = None if ticket.client.settings.boost else self.place_now(ticket)
        if backend is not None:
            self._arrive(ticket, now)
            self._join(ticket)
            self._start(ticket, backend, now, fair=True)
        return backend

    def place_now(self, ticket: Ticket) -> Backend | None:
        """Where a new ticket would start at once; None: it would have to wait."""
        if self.waiting or ticket.client.at_cap or not self._may_start(ticket.priority):
            return None
        self.fleet.unclaim()  # nobody waits for a device to run empty
        return self._place(ticket, urgent=ticket.priority is Priority.HIGH)

    def _arrive(self, ticket: Ticket, now: float) -> None:
        if ticket.state is not TicketState.NEW:
            raise RuntimeError(f"ticket {ticket.id} has been submitted before")
        self._check_room(ticket)
        ticket.number, ticket.arrived = next(self._numbers), now

    def cancel(self, ticket: Ticket) -> None:
        """End a waiting ticket."""
        self._leave(ticket)
        ticket.move(TicketState.ENDED)

    def finish(self, ticket: Ticket, now: float) -> None:
        """End a running ticket and give its slot back."""
        self._free(ticket, now)
        ticket.move(TicketState.ENDED)

    def retry(self, ticket: Ticket, now: float, *, counted: bool = True) -> None:
        """Let it wait again, in its place by arrival, for another backend where there is one."""
        self._free(ticket, now)
        if counted:
            ticket.want = ticket.want._replace(avoid=ticket.backend)
        else:
            ticket.attempts -= 1  # the backend merely had no such route
        self._enter(ticket)

    def reprioritise(self, ticket: Ticket, priority: Priority) -> None:
        """Move a waiting ticket to another class, where it stands by its arrival."""
        self._leave(ticket)
        ticket.priority = priority
        self._enter(ticket)

    def reconsider(self) -> None:
        """What the settings say of clients has changed: caps and boosts are judged anew."""
        for group in self.groups():
            for name in list(group.parked):
                group.unpark(name)
        for priority, clients in self._backlogs.items():
            self._boosted[priority] = {one.name for one in clients if one.settings.boost}

    def expire(self, now: float) -> list[tuple[Ticket, LlmqError]]:
        """End the tickets that have waited as long as they may, each with what to say.

        To be called a few times a second: by it the clocks go that make requests overdue.
        """
        ended: list[tuple[Ticket, LlmqError]] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            when, _, ticket = heapq.heappop(self._deadlines)
            if ticket.deadline == when:  # else it has left or moved to another class since
                own = ticket.longest is not None and ticket.longest <= now - ticket.arrived
                limit = "as long as it wants to" if own else "the limit of its class"
                message = f"waited {now - ticket.arrived:.1f} s, {limit}"
                ended.append((ticket, LlmqError(message, "wait_timeout")))
                self.cancel(ticket)
        return ended + self._judge(now)

    def _judge(self, now: float) -> list[tuple[Ticket, LlmqError]]:
        """Let the others grow older; end what no backend will serve: it is gone, down, unable."""
        ended: list[tuple[Ticket, LlmqError]] = []
        still = self._judged is None or self.mode is not Mode.OPEN
        passed = 0.0 if still else now - cast(float, self._judged)
        self._judged, self._overdue = now, []
        for group in list(self.groups()):
            want, error = group.want, self._why_never(group.want)
            since = self.fleet.down_since(want)
            if error is None and since is None:
                group.clock += passed
                if group.overdue(self.limits.aging) is not None:
                    self._overdue.append(group)
                continue
            for lane in list(group.lanes.values()):
                for ticket in list(lane.tickets.values()):
                    late = since is not None and (
                        now - max(since, ticket.arrived) >= self.limits.down_wait
                    )
                    if error or late:
                        ended.append((ticket, (error or self._why_down)(want)))
                        self.cancel(ticket)
        return ended

    def _why_never(self, want: Want) -> Callable[[Want], LlmqError] | None:
        """What to tell those whose want no backend will ever serve, as it seems."""
        fleet = self.fleet
        if want.device:
            return None if want.device in fleet.devices else self._why_gone
        known = fleet.knows(want.model)
        if known is False:
            return self._why_gone
        if known and not fleet.serving(want) and fleet.serving(want._replace(routes=())):
            return lambda want: Untranslatable(fleet.why_unsupported(want))
        return None

    def _why_gone(self, want: Want) -> LlmqError:
        what = f"device {want.device!r}" if want.device else f"model {want.model!r}"
        return LlmqError(f"{what} is gone", "not_found" if want.device else "model_not_found")

    def _why_down(self, want: Want) -> LlmqError:
        message = f"model {want.model!r}: {self.fleet.why_none(want)}"
        return LlmqError(self.fleet.trouble() or message, "backend_down")

    # ---- who goes next

    def dispatch(self, now: float) -> list[Start]:
        """Start every ticket that can start now; the caller sends each to its backend."""
        started: list[Start] = []
        if not self.waiting:
            return started
        self.fleet.unclaim()
        while self.waiting and self.fleet.has_room():
            found = self._pick(now)
            if found is None:
                break
            started.append(found)
        return started

    def _may_start(self, priority: Priority) -> bool:
        """Whether the mode lets requests of this class start."""
        return self.mode is Mode.OPEN or (self.mode is Mode.PRIORITY and priority is Priority.HIGH)

    def _pick(self, now: float) -> Start | None:
        """Start the next one: one that is overdue, where it is due, else by class and share."""
        found = self._pick_overdue(now) if self._overdue else None
        for priority, models in self._groups.items():
            if found is None and models and self._may_start(priority):
                found = self._pick_boosted(priority, now) if self._boosted[priority] else None
                found = found or self._pick_fair(priority, now)
        return found

    def _pick_overdue(self, now: float) -> Start | None:
        """The oldest request that has waited long enough and can start, in whatever class."""
        if self._unaged < OVERDUE_SHARE - 1 or self.mode is not Mode.OPEN:
            return None
        heads = (group.overdue(self.limits.aging) for group in self._overdue)
        for head in sorted(filter(None, heads), key=attrgetter("number")):
            if (found := self._try(head, now, urgent=True)) is not None:
                self._unaged = 0
                return found
        return None

    def _pick_boosted(self, priority: Priority, now: float) -> Start | None:
        """A boosted client's request, every second time."""
        names = self._boosted[priority]
        if not self._boost_due[priority]:
            return None
        groups = self._startable(priority)
        for head in in_turn(head for group in groups for head in group.heads(names)):
            if (found := self._try(head, now)) is not None:
                self._boost_due[priority] = False
                return found
        return None

    def _pick_fair(self, priority: Priority, now: float) -> Start | None:
        """The first by share that can start; what needs a whole device waits for it alone."""
        heads = [group.head(group.fair) for group in self._startable(priority)]
        for head in in_turn(filter(None, heads)):
            if (found := self._try(head, now, fair=True)) is not None:
                return found
            if not self.is_capped(head.want):
                self.fleet.claim(head.want)
        return None

    def _startable(self, priority: Priority) -> list[Group]:
        """The groups of a class, without those that no slot is free for."""
        models = self._groups[priority]
        names = models if len(models) < FEW else self.fleet.startable_models(models)
        return [group for name in names for group in models[name].values()]

    def _try(
        self, head: Ticket, now: float, *, urgent: bool = False, fair: bool = False
    ) -> Start | None:
        """Start this ticket, or one that goes before it because its model is loaded there."""
        urgent = urgent or head.priority is Priority.HIGH
        backend = self._place(head, urgent=urgent)
        if backend is None:
            if urgent and not self.is_capped(head.want):
                self.fleet.claim(head.want)
            return None
        other = self._before(head, backend, now)
        ticket = other or head
        self._leave(ticket)
        self._start(ticket, backend, now, fair=fair and other is None)
        return ticket, backend

    def _place(self, ticket: Ticket, *, urgent: bool) -> Backend | None:
        """The backend where it would start now."""
        if self.is_capped(ticket.want):
            return None
        able = self.fleet.candidates(ticket.want, urgent=urgent)
        return pick_backend(able, ticket.want.model, self.fleet.served_last(ticket))

    def _before(self, head: Ticket, backend: Backend, now: float) -> Ticket | None:
        """Who goes before it for a while: of its class, for a model that the backend has loaded."""
        if not self.limits.affinity or not backend.must_load(head.want.model):
            return None
        bound = self.affinity(backend)
        alike = [self._groups[head.priority].get(key, {}) for key in backend.loaded]
        heads = [group.head(group.fair) for groups in alike for group in groups.values()]
        urgent = head.priority is Priority.HIGH
        for other in in_turn(filter(None, heads)):
            able = (
                []
                if self.is_capped(other.want)
                else self.fleet.candidates(other.want, urgent=urgent)
            )
            if backend in able:
                return other if now - passed_since(backend, head, now) < bound else None
        return None

    def is_capped(self, want: Want) -> bool:
        """Whether as many requests for its model run as may."""
        if not (self.fleet.model_settings and want.model):
            return False
        most = self.fleet.policy(want.model).max_concurrent
        return 0 < most <= sum(one.want.model == want.model for one in self.running.values())

    def affinity(self, backend: Backend) -> float:
        """Seconds for which requests for what it has loaded may go before others."""
        load = backend.load_seconds.value
        bound = self.limits.affinity
        return bound if load is None else min(bound, max(AFFINITY_LEAST, LOADS_WORTH * load))

    def _start(self, ticket: Ticket, backend: Backend, now: float, *, fair: bool) -> None:
        client, priority = ticket.client, ticket.priority
        ticket.move(TicketState.RUNNING)
        ticket.backend, ticket.started = backend, now
        ticket.attempts += 1
        if fair:  # others ran ahead of their turn
            tag = client.tags[priority]
            for device in self._devices(ticket.want):
                device.virtual[priority] = max(device.virtual[priority], tag)
        ticket.charged = client.service.value or self.service.value or 1.0
        client.charge(priority, ticket.charged)
        client.running += 1
        client.account.running += 1
        self.fleet.starts(ticket, backend, now)
        self.running[ticket.id] = ticket
        self.started[priority] += 1
        self._unaged += 1
        self._boost_due[priority] = True

    def _free(self, ticket: Ticket, now: float) -> None:
        client, backend = ticket.client, ticket.backend
        del self.running[ticket.id]
        assert backend is not None  # a running ticket has one
        self.fleet.ends(ticket, backend)
        seconds = now - ticket.started
        reached = client.correct(ticket.priority, ticket.charged, seconds)
        self._ended[ticket.priority] = max(self._ended[ticket.priority], reached)
        client.service.add(seconds)
        client.served += seconds
        if client.at_cap:  # until now
            for group in self.groups():
                group.unpark_all(client)
        client.running -= 1
        client.account.running -= 1


def in_turn(heads: Iterable[Ticket]) -> list[Ticket]:
    """First tickets of several groups: by tag, then by arrival."""
    found = list(heads)
    if len(found) > 1:
        found.sort(key=lambda one: (one.client.tags[one.priority], one.number))
    return found


def passed_since(backend: Backend, ticket: Ticket, now: float) -> float:
    """Since when the backend has passed over somebody who waits still, this one included."""
    passed = backend.passed
    passed.setdefault(ticket.number, (ticket, now))
    for number in list(passed):
        first, since = passed[number]
        if first.state is TicketState.WAITING:
            return since
        del passed[number]
    return now


# ==== 12. Forecast ================================================================================
# What those who wait may know: their position, when they can expect to start, and why not yet.


class Expected(NamedTuple):
    """What a waiting ticket can expect."""

    position: int
    eta: float | None  # seconds
    reason: str


MODEL_LOADS, IS_NEXT, JUST_CAME = "model is loading", "next", "just arrived"


class Forecast:
    """What was foretold in one pass: the order of all that wait, and what each can expect."""

    def __init__(self, order: list[Ticket]) -> None:
        self.order = order
        self.places: dict[str, tuple[int, str]] = {}  # by ticket id its position, and the reason
        self.etas: dict[str, float] = {}  # likewise, where they are known

    def __getitem__(self, ident: str) -> Expected:
        """What a ticket can expect; one that has come since stands last, as far as is known."""
        place = self.places.get(ident)
        if place is None:
            return Expected(len(self.places) + 1, None, JUST_CAME)
        return Expected(place[0], self.etas.get(ident), place[1])


FORESEEN = 10_000  # looks at lines, for starts to be foreseen as they are picked; others add up


class Timetable:
    """When the slots of a device are free: of those that nobody can tell of it knows nothing."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.free = [0.0] * max(0, device.slots - device.busy)  # a heap of seconds from now
        self.loaded: frozenset[str] | None = None  # model keys; None: as it is now
        self.loading: dict[str, float | None] = {}  # by model key when it is loaded, if known
        self.passed: dict[Priority, float] = {}  # when one of a class was first passed over

    def run(self, ticket: Ticket, backend: Backend, scheduler: Scheduler, now: float) -> None:
        """Take in when this one ends, unless it takes more than twice what it mostly does."""
        key, took = ticket.model, scheduler.service_of(ticket.model, self.device.name, ticket.kind)
        loads = key in backend.loading and backend.loading[key][0] is ticket
        load = backend.load_time(key) if loads else 0.0
        passed = now - ticket.started - backend.load_of(ticket)
        if took is not None and passed <= 2 * (load + took):
            left = max(load + took - passed, (load + took) / 4)  # what is late ends soon, not now
            heapq.heappush(self.free, left)
            if load:
                self.loading[key] = max(0.0, left - took)

    def take(self, line: Alike, scheduler: Scheduler) -> float:
        """When the next of this line starts here; from then on it has the slot."""
        backend, took = line.backends[self], line.took[self]
        eta, load = self.free[0], 0.0
        if self.loading:
            eta = max(eta, self.loading.get(line.key) or 0.0)
        if self.must_load(line):
            if line.priority in self.passed:  # what is loaded stays for those who come back
                stays = min(backend.stayed.value or 0.0, scheduler.affinity(backend))
                eta = max(eta, self.passed[line.priority] + stays)
            load, self.loaded = backend.load_time(line.key), frozenset((line.key,))
            self.passed.clear()
        if took is None:
            heapq.heappop(self.free)
        else:
            heapq.heapreplace(self.free, eta + load + took)
        return eta

    def must_load(self, line: Alike) -> bool:
        backend = line.backends[self]
        if self.loaded is None:
            return backend.must_load(line.key)
        return line.key not in self.loaded and backend.traits.on_demand

    def pick(self, lines: Sequence[Alike], scheduler: Scheduler) -> Alike:
        """Whose turn it is here: the first by share, but for a while what is loaded."""
        if self.loading:  # who waits for the load of its model lets others go
            free = self.free[0]
            lines = [one for one in lines if (self.loading.get(one.key) or 0) <= free] or lines
        first = min(lines, key=lambda line: line.tickets[0])
        ready = [line for line in lines if not self.must_load(line)]
        if not ready or first in ready:
            return first
        self.passed.setdefault(first.priority, self.free[0])
        late = self.free[0] - min(self.passed.values()) >= scheduler.affinity(first.backends[self])
        return first if late else min(ready, key=lambda line: line.tickets[0])


class Alike:
    """Tickets of one class that want the same and take alike, in the order of their shares."""

    def __init__(
        self, scheduler: Scheduler, ticket: Ticket, tables: Mapping[Device, Timetable]
    ) -> None:
        able = [one for one in scheduler.fleet.serving(ticket.want) if one.usable]
        self.key, self.priority = ticket.model, ticket.priority
        self.held = why_held(scheduler, ticket, able)
        self.reason = self.held or why_busy(scheduler, ticket, able)
        places = [(tables[one.device], one) for one in able]
        self.backends = {at: one for at, one in places if at.loading.get(self.key, 0) is not None}
        usual = scheduler.service_of
        self.took = {at: usual(self.key, at.device.name, ticket.kind) for at in self.backends}
        self.tickets: deque[tuple[int, str]] = deque()  # (position, id)


def timetables(scheduler: Scheduler, now: float) -> dict[Device, Timetable]:
    """What runs, what loads and who was passed over."""
    tables = {device: Timetable(device) for device in scheduler.fleet.devices.values()}
    for backend in scheduler.fleet.backends.values():
        table = tables[backend.device]
        table.loading.update(dict.fromkeys(backend.loading))
        for ticket, since in backend.passed.values():
            if ticket.state is TicketState.WAITING:
                table.passed.setdefault(ticket.priority, since - now)
    for ticket in scheduler.running.values():
        if ticket.backend is not None and ticket.took and ticket.backend.device in tables:
            tables[ticket.backend.device].run(ticket, ticket.backend, scheduler, now)
    return tables


def forecast(scheduler: Scheduler, now: float) -> Forecast:
    """What every waiting ticket can expect, in one pass.

    The time is when a slot will be free for it, by the averages of what goes before it; None when
    that is not known: it is held back, or behind what was never measured or takes more than twice
    as long as it mostly does.
    """
    tables, result = timetables(scheduler, now), Forecast(scheduler.in_order())
    lines: dict[Priority, dict[Any, Alike]] = {priority: {} for priority in Priority}
    for position, ticket in enumerate(result.order, 1):
        kinds, kind, ident = lines[ticket.priority], (ticket.want, ticket.kind), ticket.id
        line = kinds.get(kind)
        if line is None:
            line = kinds[kind] = Alike(scheduler, ticket, tables)
        result.places[ident] = position, line.reason
        if ticket.client.at_cap and not line.held:
            result.places[ident] = position, f"{ticket.client.name} has as many running as it may"
        elif not line.held:
            line.tickets.append((position, ident))
    for kinds in lines.values():
        foresee(scheduler, list(kinds.values()), tables.values(), result.etas)
    return result


def foresee(
    scheduler: Scheduler,
    lines: Sequence[Alike],
    tables: Iterable[Timetable],
    etas: dict[str, float],
) -> None:
    """When each of one class starts: on the device that is free first, as the scheduler picks."""
    known = [(table.free[0], place, table) for place, table in enumerate(tables) if table.free]
    heapq.heapify(known)
    queues = {table: deque(one for one in lines if table in one.backends) for table in tables}
    looks = FORESEEN
    while known:
        _, place, table = heapq.heappop(known)
        here = queues[table]
        while here and not here[0].tickets:
            here.popleft()
        if here:
            looks -= len(here)
            ready = [one for one in here if one.tickets] if looks >= 0 else []
            line = table.pick(ready, scheduler) if ready else here[0]
            _, ident = line.tickets.popleft()
            etas[ident] = table.take(line, scheduler)
            if table.free:
                heapq.heappush(known, (table.free[0], place, table))


def why_held(scheduler: Scheduler, ticket: Ticket, able: Sequence[Backend]) -> str | None:
    """What keeps it from starting for a time that nobody knows, however many end before it."""
    fleet, want = scheduler.fleet, ticket.want
    if scheduler.mode is Mode.PAUSED:
        return "paused"
    if scheduler.mode is Mode.PRIORITY and ticket.priority is not Priority.HIGH:
        return "priority mode: only high starts"
    if not able:
        serving = fleet.serving(want)
        if any(backend.state is State.LOADING for backend in serving):
            return MODEL_LOADS
        return f"{fleet.why_none(want)}, waited for {scheduler.limits.down_wait:g} s"
    return None


def why_busy(scheduler: Scheduler, ticket: Ticket, able: Sequence[Backend]) -> str:
    """What it waits for where its turn will come by itself; some backend is able."""
    fleet, backend, device = scheduler.fleet, able[0], able[0].device
    policy, key, runs = fleet.policy(ticket.model), ticket.model, who_runs(scheduler, device)
    alone, taken = policy.exclusive or bool(ticket.want.device), device.held
    most = f"for {scheduler.affinity(backend):g} s at most"
    urgent = ticket.priority is Priority.HIGH
    reasons = (  # the first that holds
        (all(key in one.loading for one in able), MODEL_LOADS),
        (scheduler.is_capped(ticket.want), "as many of its model run as may"),
        (taken, f"{device.name} is taken whole: {runs}"),
        (device.busy >= device.slots, f"{device.name} busy ({device.busy}/{device.slots}): {runs}"),
        (alone and device.busy, f"waits until {device.name} is empty: {runs}"),
        (device.claimed, f"{device.name} runs empty for what takes it whole"),
        (backend.room(urgent=True) <= 0, f"{backend.name} busy ({backend.busy}/{backend.most})"),
        (backend.room(urgent=urgent) <= 0, f"what {device.name} has left is for class high"),
        (backend.passed and backend.must_load(key), f"{backend.name} keeps its model {most}"),
    )
    return next((words for holds, words in reasons if holds), IS_NEXT)


def who_runs(scheduler: Scheduler, device: Device) -> str:
    """Whose request has had its slot longest there, and the model of it."""
    for ticket in scheduler.running.values():
        if ticket.backend is not None and ticket.backend.device is device:
            return f"{ticket.client.name}, {printable(ticket.model) or 'a lease'}"
    return "nobody"


# ==== 13. Words ===================================================================================
# The words by which section 15 tells what a prompt asks for, by kind: English, German, French,
# Spanish, Chinese, some Italian, Portuguese, Dutch, Russian, Japanese.  Accents are taken off;
# `stem*` is how a word begins, `two_words` a phrase; Chinese and Japanese are found anywhere.

CUES = {
    "make": """
        make propon* schlag_vor code_a code_an generi write writing implement build_a build_me
        build_an add extend refactor rewrite optimize optimise produce scaffold develop draft
        compose erstell* generier* implementier* programmier* erganz* erweiter* entwickl* ecris
        ecrire ecrivez ecrit_moi redige* cree creer creez implemente* ajout* developpe* complete*
        fais_moi escrib* implementa* anad* agrega* desarrolla* haz hazme redacta* completa_el
        completa_la completa_este scrivi* scrivere aggiung* escrev* crie criar gere gerar adicion*
        faca schrijf* maak maken genereer* voeg bouw напиши* написать создай* создать добав*
        реализу* составь 写 编写 生成 实现 创建 补全 补充 添加 做一个 書いて 書き 作って 作成 実装
        追加 making mocks put_together code_me modify adapt adjust alter enhance finish fill_in
        prototype turn_this_into turn_this turn_these set_up schreib* mach mache macht machen
        bastel* ander* anpass* pass_an vervollstandig* umschreib* fuge entwickeln fais faire modifi*
        realise construis code_moi hacer hagas montame construye fai fammi fare crei realizza*
        sviluppa* faz faz_me fazer desenvolv* schrijven toevoegen pas_aan сделай сделать дополни
        измени* сгенери* разработ* 写一 写个 写段 编一个 做个 做一 帮我写 完善 加一个 加上 加个 改写
        重构 开发 搭建 优化 起草 書い 作り 作れ 補完 リファクタ 書け crea_una code_up hack_together
        whip_up give_me_a autocomplete fill stub extract_into wrap expose write_me bau* genere*
        ajoute* crea* genera* anade* completa* programa* 写一个 增加 封装 写出 добавь* реализуй*
        voeg_toe
    """,
    "port": """
        port translat* convert* port_this port_it rewrite_this ubersetz* konvertier* portier*
        tradui* porte traduc* traduz* convierte vertaal* перевед* перевод* перепиши 转换 转成 改写成
        改成 移植 変換 書き換え 訳し rewrite_in turn_into_a wandle umwandeln ubertrag* pasa_a
        transform* umsetzen in_english in_german auf_englisch auf_deutsch en_anglais en_francais
        al_ingles en_ingles al_espanol in_inglese em_ingles in_het_engels на_английский 译成 改为
        に直し 英訳 和訳
    """,
    "judge": """
        judge 这样写 这么写 那样写 anything_you_would_change would_you_change schauen taugt
        falhas_de fallos_de fallas_de failles_de mauvaises_pratiques sigue_las segue_as convenciones
        conventions analise analiza_el_codigo how_good how_clean how_safe bad_about
        wrong_with_this_design made_better be_made_better can_be_better objections objection
        concerns red_flags gotchas pitfalls edge_cases did_i_forget smell 指出 缺点 优点 不足 写得好
        可以改 更好的 合理吗 安全吗 正确吗 规范吗 code_review_of do_a_code_review haz_una_revision
        fais_une_revue faire_une_revue revue_de_code revision_de 代码审查 review* rate quality
        audit* feedback assess check look_over look_at look_through go_over going_through go_through
        take_a_look have_a_look what_do_you_think thoughts any_issues idiomatic thread_safe safe
        secure security vulnerab* best_practice best_practices readable efficient good_enough clean
        prod_ready faster pruf* uberpruf* begutacht* beurteil* bewert* schau_dir schau_mal schaut
        was_haltst was_haltet was_denkst sicherheits* besser_machen verbesser* lesbar sauber
        effizient meinung relis relire relisez examine* verifi* evalue* penses_tu pensez_vous
        ton_avis votre_avis lisible failles revis* evalua* que_opinas te_parece eficiente legible
        mejorar bien_escrit* controlla* rivedi ne_pensi valuta* avali* que_acha que_voce_acha
        beoordeel* controleer* bekijk vind_je vindt_u netjes nakijken kijk проверь* оцени* ревью
        посмотри что_думаешь безопасн* 审查 评审 点评 看看 看一下 检查 评价 怎么样 规范 レビュー
        査読 評価 チェック 確認して 改善点 見て looks_ok look_ok look_good looks_good cleaner brutal
        pair_of_eyes lgtm would_you_merge would_you_approve any_problems any_bugs any_errors
        any_mistakes any_flaws for_bugs for_errors for_problems for_mistakes for_issues for_security
        possible_bugs potential_bugs potential_issues flaws smells nitpick* roast sanity better_way
        weak_spots weaknesses bottleneck* maintainab* good_practice critici* inspect vet grade
        verify double_check pythonic overkill reasonable sensible improved improvements improve
        could_be_better sloppy hacky elegant production_ready race_conditions thread_safety
        comments_on readability kritisier* saubere* schoner in_ordnung schwach* druberschau* druber
        ruckmeldung qualitat* lucken auf_fehler gibt_es_fehler gut_so ok_so so_okay haltst_du
        haltet_ihr schlecht_an eleganter idiomatisch performan* kritik critique* jette_un
        coup_d_oeil propre bonnes_pratiques qualite des_problemes des_erreurs des_bugs amelior*
        opini* critica* vistazo buenas_practicas calidad mejor mejora mejoras limpio limpia seguro
        rendimiento que_tal algun_error algun_problema problemas_de parere occhiata migliora* pulito
        sicuro leggibil* buone_pratiche olhada melhor* limpo boas_praticas acha_deste acham mening
        kritiek veilig leesbaar verbeter* kijk_naar beter_kan beter мнение как_тебе что_скажешь
        качеств* улучш* посмотрите чист* читаем* уязвим* замечани* 审核 评估 写得 写法 好不好 漏洞
        安全 隐患 改进 意见 建议 可读性 性能 合理 有没有问题 有什么问题 有没有bug 哪些问题 潜在
        有没有 可以吗 地道 指摘 脆弱 読みやす 良い書き方 意見 アドバイス どう思 安全性 問題点
        問題ない もっと良い verdict sanity_check second_pair anything_wrong_with
        what_would_you_change improve_anything is_this_ok is_this_good is_it_ok code_review pruef*
        durchsehen drubersehen relecture avis verifie* juge* que_penses revisa* opina* que_te_parece
        valora* 帮我看 把关 avalie*
    """,
    "fix": """
        fix correct_it fixes fixing repair debug debugging solve correct_the correct_this
        troubleshoot make_it_work get_it_to_work get_this_to_work to_pass it_pass them_pass
        reparier* beheb* korrigier* zum_laufen corrige* repare* debogu* resoud* resous arregl*
        repara* depura* solucion* resuelv* corregir corregg* aggiust* risolv* corrij* conserta*
        resolv* los_op verhelp* исправ* почин* отлад* 修复 修一下 修正 改一下 解决 修好 调试 直して
        直し デバッグ 解決 get_past get_around sort_out work_again track_down get_rid_of unbreak
        where_is_the_bug make_this_work woran_liegt was_mache_ich_falsch wieder_lauft los_das
        lose_das losen fehlersuche d_ou_vient por_que_no_me come_risolv* come_faccio_a_risolv*
        conserte arrume oplossen maak_dit_werkend почему_не 怎么办 怎么改 哪里错 哪错了 哪里有问题
        怎么修 改好 改对 修改 どこが間違 直す 治し 解決し correct mend patch get_this_working
        get_it_to loesen lose hinkriegen corrig* soluciona* resuelve* depur* debogue* 修 怎么解决
        修正して aggiusta* sistem* concert* herstel
    """,
    "shorten": """
        shorten boil_down boil_this boil_it boil_that make_short make_it_short shortened eindampf*
        缩成 缩到 太长 summar* sumar* sum_up condens* shorter tldr tl_dr recap abridge resum*
        zusammenfass* zusammen_fassen kurze_den kurze_das kurzer_fassen fass fasse synthetis*
        abrege* sintetiz* riassu* riepilog* samenvat* vat_dit vat_de vat_het резюм* перескажи*
        кратко вкратце 总结 概括 摘要 归纳 概述 提炼 要約 まとめ short_version shorter_version
        compress trim highlights abbreviat* cut_down wrap_up catch_me_up brief_me kurz_fassen
        verkurz* kurzfass* runterbrechen raccourci* en_bref acorta* abrevia* extracto accorcia*
        sintesi* encurt* kort_samen inkorten verkort обобщи* суммируй* сжато сократ* выдели 压缩
        精简 缩短 缩写 浓缩 简述 一句话说 短くして 短く 要点を 短縮 boil_it_down minutes trim_down
        kurz kuerze kurze kernaussag* auf_den_punkt protokoll resume* en_gros essentiel compte_rendu
        acta en_pocas 一句话 итог* сократи* riassum* kort
    """,
    "sort": """
        sort determina_el classif* klassif* categori* kategori* triage* label tag spam spam_or_not
        route_this route_the assign_this sort_this sort_these sort_the is_this_spam einordn* ordne
        zuordn* stufe etiquet* classe_ce clasif* etiket* определи_тональность классифиц* отнеси 分类
        归类 分到 判断 归为 分類 判定 decide_whether decide_if pick_the pick_one pick_the_folder
        choose_one choose_the assign assign_it route belongs belong goes_to which_tier phishing junk
        scam bucket flag sort_into sort_them output_only answer_only_with answer_with_one
        reply_with_one one_word_only reply_only escalate rank_these rate_the_urgency
        detect_the_language detect_language language_is intent_of einstufen stufe_ein einsort*
        sortiere_diese gehort_das gehort_diese gehort_in weise_zu zuweis* zuteil* markiere relev*
        repartis range_ce affecte oriente attribue signale etichetta* smista* assegna* asigna*
        ordena_estos pertenece deriva rotul* encaminhe atribua pertence indeel* deel_in sorteer*
        labelen hoort_dit распредели* отнести пометь определи_категор* определи_язык это_спам 归到
        归入 打标签 标注 标记 分级 判别 分派 转给哪 仕分け 振り分け ラベル 分けて 判別 prioritize
        prioritise rank_by queue positive_or klassifizier* priorisier* sortier* classe* categoris*
        trie* clasifica* categoriza* etiqueta* prioriza* que_departamento classifica* prioridade
    """,
    "think": """
        think pianific* peser pese le_pour_et show_that zeige_dass montre_que muestra_que mostre_que
        all_the_steps reasons what_to_do_first weighings study_plan vale_mais conclua plan_the
        plan_a plan_an plan_our plan_my plan_out design_a design_an design_the architect_a devise
        lay_out work_out think_through step_by_step prove proof trade_offs tradeoffs tradeoff weigh
        pros_and_cons root_cause root_causes should_we reason investigate strategize entwirf
        entwerf* plane schritt_fur_schritt beweis* abwag* wage vergleich* sollen_wir sollten_wir
        elabor* concois conception planifi* etape_par_etape pas_a_pas prouve* compar* faut_il
        devons_nous cause_racine planea paso_a_paso razona demuestra* debemos progetta*
        passo_dopo_passo dimostra* confront* planej* projete passo_a_passo prove_que ontwerp*
        stap_voor_stap bewijs* vergelijk* спроект* пошаг* по_шагам шаг_за_шагом докажи* сравни* 制定
        设计 规划 一步一步 逐步 证明 比较 权衡 取舍 根本原因 设计方案 設計 計画 一歩ずつ 段階的 証明
        比較 順を追って options speaks_against criteria in_which_order narrow_it_down narrow_down
        hypothes* figure_out derive puzzle riddle reasoning causes systematic* milestones phases
        rollout how_would_you_structure how_would_you_approach how_would_you_design how_should_we
        approach_to what_would_you_choose decision step_for_step one_after_the_other versus
        thought_process think_about_how come_up_with_a_plan erarbeite planen ursache* systematisch*
        vor_und_nachteile pro_und_contra pro_und_kontra ratsel knobel* herleit* leite_her
        wie_wurdest_du meilenstein* entscheidung* konzipier* demarche avantages_et plusieurs_etapes
        raisonne* enigme demontr* tranche hierarchis* etapes causa_raiz ventajas_y pros_y_contras
        acertijo razonando fases hoja_de_ruta esboza decidir decide_cual passaggi pro_e_contro
        causa_radice indovinello ragiona* valutando passos pros_e_contras raciocin* stappenplan
        voor_en_nadelen afweg* raadsel oorzaak redeneer* коренн* причин* обоснуй* взвесь
        плюсы_и_минусы рассужда* разработай_план загадк* продумай* этап* 推理 步骤 分步 利弊 优缺点
        优劣 根因 排查 推导 为什么会变 论证 分析原因 怎样确定 选择哪 推論 手順 原因 メリット
        どちらを選 長所 戦略 検討 design architect trade-offs diagnose migrate migration_plan
        propose approach entwurf architektur strategie abwaeg* schritt_fur analysier* vorgehen
        planifie* etape_par analyse* planifica* disena* diseno estrategia analiza* sopesa* 对比 分析
        排查思路 决策 迁移 段階 спроектир* pianifica* confronta*
    """,
    "explain": """
        what_plan which_plan explain* teach define erklar* beschreib* expliqu* explica* decris
        definis describ* spiega* leg_uit uitleg* объясни* расскажи* 解释 说明 介绍 讲解 説明
        what_does what_do_the tell_me_about mean_by what_is_the_difference difference_between
        whats_the_difference meaning_of eli5 was_bedeutet was_macht unterschied_zwischen was_ist
        qu_est que_fait c_est_quoi difference_entre signifie que_significa significa que_hace
        diferencia_entre cosa_fa cosa_significa differenza_tra o_que_faz o_que_e diferenca_entre
        wat_doet wat_betekent verschil_tussen wat_is что_такое что_значит что_делает разниц*
        чем_отличается поясни* 是什么 什么是 什么意思 区别 有什么用 干什么 とは 違い 意味 how_does
        how_do_the wie_funktioniert comment_fonctionne como_funciona come_funziona hoe_werkt
        как_работает 如何工作 怎么工作 讲一下 讲讲 原理 what_is what_are how_do why_is difference
        between meaning means tell_me erklaer* was_sind unterschied bedeutung explique* qu'est
        c'est_quoi definition que_es que_son diferencia 怎么理解 означает cos'e differenza diferenca
        verschil
    """,
    "act": """
        act search_the_web search_online look_up google_for web_search browse invoke run_the
        run_a_command call_the fetch_the remind_me recherchiere* fuhre_den fuhr_den cherche_sur
        recherche_sur execut* ejecut* busca_en llama_a esegui* cerca_su chiama_l pesquis* zoek_op
        voer_uit выполни_команд* найди_в 搜索 上网 调用 执行 检索 実行 呼び出し ネットで
        search_the_internet search_for use_the query_the run_ping ping curl crawl look_up_the scrape
        use_your nutze_das nutze_die benutze_das such_im suche_im im_internet im_netz im_web googel*
        googl* ruf_die rufe_die fuhre_aus fuhr_aus sur_internet sur_le_web utilise_l utilise_la
        appelle_la appelle_l lance_la_commande en_internet en_la_web en_linea usa_la usa_el
        su_internet online_il usa_lo na_internet use_a op_internet gebruik_de roep в_интернете
        загугли погугли 网上 联网 百度 运行命令 运行一下 検索して ウェブで 呼んで function_schema
        function_call tool_call the_schema as_arguments into_arguments json_schema_of
        fill_the_function function_arguments argumente_fur delete_the create_a_ticket set_a_reminder
        list_files schick loesch losch oeffne lade schalte envoie reserve rappelle* envia reserva
        运行 重启 创建一个 検索 запусти* вызови* найди* открой* удали* cerca invia busque leg_an
        lege_an trag_ein fill_the arguments_of parameter fonds extrae_los list_its
    """,
    "do": """
        do book_a book_me buche turn_on turn_off turn_up turn_down put spiel spiele joue reproduce
        pon_el ring_up lege_in search find send schedule set open save read fetch get list delete
        remove move rename run call download upload cancel order show update post extract remind
        such suche finde schick* sende offne speicher* lies losch* starte ruf rufe stell stelle trag
        zeig zeige cherche trouve envoie* reserve* ouvre lis supprime lance appelle mets rappelle
        extrais busca encuentra envia* reserva* abre lee borra llama pon recuerda* guarda extrae
        trova manda* invia* apri leggi prenota ricorda* procura abra leia envie lembre zoek stuur
        lees найди отправь* открой прочитай закажи напомни* покажи 查一下 查 发一封 发送 发给 打开
        读取 提醒 预订 订 设置 保存 提取 調べて 送って 開いて 読んで 予約 設定 教えて start stop_the
        put_on add_to_my ping_me notify invite mute pause subscribe erinner* stell_mir starte_den
        offnen loesche verschieb* kopier* reservier* mail_an trage leg_einen prends note_dans
        programme_un demarre telecharge eteins allume verifie_mon ponme anota apaga enciende
        descarga programa_una manda_un avisa* imposta metti spegni accendi aggiungi_alla scarica
        desligue ligue baixe marque agende adicione_a zet verzend doe_de herinner* verwijder пришли
        поставь включи выключи забронируй* удали скачай запиши создай_файл добавь_в 关闭 关掉 开启
        发消息 发个 发一 查查 帮我查 帮我订 订一 定个 下载 删除 设一个 设个 添加到 预约 看看明天
        消して つけて セット 登録 追加して リマインド 予約して 送信 restart deploy kill scale paste
        kubectl ssh ls cat grep git_status look_for
    """,
    "want": """
        want 帮我 please pls plz bitte s_il_te s_il_vous svp por_favor per_favore alstublieft graag
        пожалуйста 请 お願い como_hago como_puedo wie_mache_ich comment_faire how_would_i pasame
        hilf_mir do_for_me need give_me show_me gimme how_do_i how_to how_can_i brauche hatte_gern
        gib_mir zeig_mir wie_kann_ich besoin donne_moi je_veux il_me_faut montre_moi necesito quiero
        dame muestrame ho_bisogno vorrei dammi preciso quero ik_wil nodig geef нужен нужна нужно
        需要 给我 想要 欲しい ください i_d_like i_would_like looking_for require get_me
        please_provide provide i_want lets_have ich_mochte mochte benotig* hatte_gerne bitte_um
        ich_will j_aimerais j_ai_besoin il_me_faudrait voudrais souhait* me_gustaria querria
        quisiera busco mi_serve mi_servirebbe voglio gostaria queria heb_een ik_zou_graag ik_zoek
        хочу требуется дай 我要 我想 来一 来个 求 能不能 欲しいです 必要 下さい
    """,
    "code": """
        cron cron_expression snake_game pygame 语言 编程 pseudo_code pseudocode dataframe 作业代码
        言語 codes coding source_code regex* sql javascript typescript js ts kotlin c++ c# php
        golang haskell bash powershell css react vue angular svelte django flask fastapi sqlalchemy
        pandas numpy scikit dockerfile docker_compose compose_yml makefile terraform ansible vba
        pull_request pull_requests pr prs snippet* unit_test unit_tests pytest jest one_liner
        oneliner shell_script cron_job cronjob crontab github_action github_actions compile* codemod
        gradle webpack linux_kernel solidity latex api_client cli_tool algorithm quellcode quelltext
        skript* composant codigos programma functie скрипт* кода коде функци* программ* регуляр*
        函数 脚本 程序 正则 页面 单元测试 查询语句 関数 スクリプト プログラム 正規表現 クラス
        arduino sketch formula formulas macro macros autohotkey spreadsheet_formula google_sheets
        excel_formula webpage web_page html_page landing_page home_assistant automation lua perl
        matlab r_script fortran cobol assembly elixir clojure scala dart flutter swiftui julia
        graphql dax awk jq nginx systemd cmake webhook css_file stylesheet codebase_style helm
        kubernetes_manifest json_schema type_hints docstrings docstring integration_test mock e2e
        selenium playwright discord_bot telegram_bot chatbot_in plugin userscript browser_extension
        stored_procedure trigger_function sql_table migration_script patchset changeset
        merge_request typescript_type interface_in struct recursion_code parser powershell_skript
        makro formel formeln webseite datenbankabfrage unittest* testfall* regularen_ausdruck
        regularer macro_excel formule script_bash page_html requete_sql expression_reguliere
        tests_unitaires depot_git expresion_regular formula_de pagina_web pagina_html
        prueba_unitaria pruebas_unitarias guion_de_bash espressione_regolare foglio_di_stile
        expressao_regular planilha testes_unitarios webpagina sql_запрос макрос* формул* тест* юнит*
        сайт* 爬虫 宏 公式 网页 小程序 接口代码 配置文件 测试用例 算法 源码 マクロ 数式 ソース
        テストコード シェル py cpp rb tsx jsx prometheus grafana alertmanager iptables ggplot
        matplotlib tensorflow pytorch dplyr tidyverse argparse hibernate laravel symfony rails
        nextjs node nodejs tailwind bootstrap jquery ffmpeg git_hook pre_commit playbook
        kubectl_command unit_file dockerfiles eslint redux graphql_schema websocket 命令行
        コマンドライン spring junit table_schema dict hashmap mutex async await lambda decorator
        linter kubernetes exception cargo vite metodo 方法 数据库 表结构
    """,
    "soft": """
        soft function functions script scripts class classes python java ruby rust swift go query
        queries program programs test tests build loop loops config pipeline app module package
        library funktion funktionen klasse klassen programm abfrage methode fonction fonctions
        classe requete programme funcion funciones clase consulta programa prueba funzione classi
        funcao запрос* класс* 类 接口 テスト programa_en snippets bot dashboard server form button
        page cli formular knopf seite schleife schleifen skripte script_en bouton boucle formulaire
        site boton bucle formulario pagina pulsante ciclo botao laco pagina_de knop lus цикл* кнопк*
        страниц* 按钮 循环 网站 表单 ボタン ループ ページ code endpoint index array thread component
        hook ci workflow branch commit merge diff pointer method git npm pip maven yaml json xml
        html 查询 组件 模块 编译 代码 コード код codice codigo codigo_iso
    """,
    "prose": """
        prose thank_you_letter 感谢信 一封信 einen_brief ein_brief den_brief brief_an brief_fur
        netten_brief formellen_brief een_brief letter mail poem haiku story essay speech toast joke
        song lyrics tweet invitation cover_letter message my_resume a_resume gedicht geschichte rede
        witz lied einladung nachricht lettre courriel poeme histoire discours blague carta correo
        poema cuento discurso chiste lettera poesia racconto historia verhaal письмо стих* рассказ
        邮件 信 诗 故事 作文 手紙 詩 メール 物語 text_message e_mail emails resume_for cv caption
        slogan bio paragraph limerick sonnet rhyme recipe birthday wedding_speech apology blog_post
        article eulogy mails aufsatz rezept geburtstag* entschuldigung absage spruch anschreiben
        bewerbung* recette mot_de excuses dissertation remerciement receta disculpa felicitacion
        redaccion brindis frase ricetta biglietto scuse carta_a receita redacao kaartje gedichtje
        recept sollicitatie* поздравлен* речь рецепт сочинени* 情书 短信 祝福 道歉 演讲 文章 菜谱
        标语 俳句 スピーチ お礼 小説 挨拶 email text translation condolence application artikel
        absatz antwort ubersetzung paragraphe reponse traduction chanson anniversaire candidature
        ensayo articulo mensaje respuesta traduccion cancion cumpleanos 段落 句子 消息 回复 翻译 歌
        生日 求职信 请柬 文案 返事 翻訳 текст ответ перевод
    """,
    "digest": """
        digest kurz_und worum_geht_es mas_importantes importantes_de most_important_things plot_of
        main_message summary abstract key_points main_points takeaways gist synopsis minutes_of
        meeting_minutes minutes_please bullet_points in_short zusammenfassung kurzfassung
        stichpunkt* kernaussage* kernpunkte synthese points_cles points_essentiels
        compte_rendu_court resumen sintesis ideas_principales puntos_clave sintesi punti_chiave
        resumo pontos_principais samenvatting hoofdpunten выжимк* тезис* 要点 小结 要旨 recap_of
        one_pager executive_summary minutes_from short_summary nutshell what_happened main_ideas
        main_arguments most_important wesentliche wesentlichen hauptpunkte das_wichtigste
        ergebnisprotokoll protokoll_in kerngedanken idees_principales l_essentiel lo_esencial
        puntos_principales lo_mas_importante ideas_clave punti_principali idee_principali
        principais_pontos pontos_chave kernpunten belangrijkste главн* основн* суть 大意 中心思想
        主要内容 会议纪要 纪要 梗概 主旨 概要 ポイント 議事録 in_brief main_findings findings
        en_pocas_palabras de_que_trata kurz_gesagt core_message de_quoi_parle 核心 观点 核心观点
        di_cosa_parla do_que_trata o_чем
    """,
    "bin": """
        idioma langue_de el_idioma la_lengua sprache_ist 语种 语言是 哪种语言 dringlichkeit
        es_urgente is_it_urgent is_this_urgent ist_das_dringend c_est_urgent es_spam 标签 subject_is
        offensive positief negatief category sentiment urgency priority which_queue which_team
        which_department which_folder right_department right_team yes_or_no yes_no reply_only_yes
        positive_or_negative positive_neutral how_urgent what_language_is kategorie* stimmung
        prioritat welche_abteilung ja_oder_nein positiv_oder categorie* priorite urgence oui_ou_non
        positif_ou quel_service categoria* sentimiento prioridad urgencia departamento si_o_no
        positivo_o positiv* priorita urgenza reparto urgente_ou prioriteit afdeling ja_of_nee
        тональност* категори* срочн* приоритет* 好评还是 差评 类别 优先级 情感 紧急 是否 属于
        カテゴリ 優先度 至急 緊急 感情 tier scale_from scale_of on_a_scale how_angry how_severe
        severity which_label which_class which_topic which_category which_inbox correct_label
        topic_of intent is_it_spam is_this_mail emotion positive_negative spam_ham true_or_false
        toxic_or harmless wie_dringend skala auf_einer_skala welche_kategorie welcher_kategorie
        welches_team welche_sprache in_welcher_sprache dringend welches_postfach zustandig*
        schweregrad quelle_langue quelle_categorie quel_departement degre_d_urgence quelle_file
        gravite echelle que_idioma que_categoria en_que_idioma a_que_equipo grado_de_urgencia
        nivel_de_urgencia escala sentimento gravedad que_lingua in_che_lingua quale_categoria
        quanto_e_urgente qual_categoria qual_setor nivel_de welke_categorie welk_team welke_taal
        hoe_dringend spoed какая_категория какому_отделу к_какому какой_язык насколько_срочно
        какой_отдел 属于哪 哪个部门 哪一类 什么语言 紧急程度 正面 负面 垃圾邮件 情绪 重要性 どの部署
        何語 スパム ポジティブ ネガティブ 種類 重要度 緊急度 yes_/_no spam_/_ham positive_/_negative
        positive_/_neutral ja_/_nein si_/_no oui_/_non sim_/_nao 定级 等级 级别 fit_our
    """,
    "plan": """
        plan plans roadmap strategy architecture migration strategie* architektur* fahrplan
        arquitectura estrategia* strategia architettura arquitetura план плана стратеги* архитектур*
        方案 计划 架构 策略 计划书 concept proposal_for action_plan schedule_for curriculum timeline
        konzept zeitplan massnahmenplan lernplan plan_d feuille_de_route plan_de plan_para
        cronograma piano_di un_piano plano plano_de plannen stappen architectuur дорожн* концепц*
        路线图 计划表 流程 ロードマップ アーキテクチャ 構成 プラン
    """,
    "corpus": """
        corpus kapitel* chapit* capitul* capitol* essays sources_of project_source repo code_base
        codebase monorepo chapters manuscript documents collection contracts transcripts archive
        novel thesis files_in_the repositor* codebasis dokumente vertrage depot roman documentos
        coleccion documenti hoofdstukken documenten репозитор* глав документ* 代码库 仓库 章节
        全部文档 所有文件 文档集 リポジトリ 章 文書 codebases sources source_tree manuscripts
        base_de_code bases_de_code quellcodebasis dokumentensammlung dokumentensammlungen
        dokumentation bucher romans tous_les_fichiers_du base_de_codigo base_de_codice codigo_fonte
        codigo_fuente archivio archivo_completo acervo collectie архив* коллекц* кодов* 代码仓库
        项目源码 整本书 全集 合同 档案 コードベース 全章 原稿 論文集 depositions interviews letters
        statements archives dossier korpus sammlung whole_repo whole_repository entire_repository
        entire_codebase whole_codebase all_files every_file whole_book all_chapters entire_book
        complete_archive all_documents whole_collection full_history gesamte_repository ganzen_code
        alle_dateien alle_kapitel ganze_buch alle_dokumente tout_le_depot tous_les_fichiers
        tous_les_chapitres tout_le_livre toute_la_base todo_el_repositorio todos_los_archivos
        todos_los_capitulos todo_el_libro toda_la_base 整个仓库 整个代码库 全部文件 所有章节
        整个项目 全部章节 リポジトリ全体 全ファイル весь_репозиторий все_файлы все_главы
        intero_repository tutti_i_file todo_o_repositorio ensemble_de tous_les_comptes
        fonds_documentaire tous_les_contrats
    """,
    "pile": """
        pile diaries records notes entries messages surveys responses reviews sessions papers
        studies articles recordings tagebucher protokolle berichte rechnungen journaux rapports
        contrats factures informes diarios actas contratos facturas relazioni contratti relatorios
        verslagen отчет* 报告 记录 论文 日志 記録 報告書 tickets files file manual project projects
        book books reports logs pages akten projekt handbuch buch dateien fichiers projet manuel
        livre archivos proyecto libro progetto manuale arquivos projeto livro bestanden boek проект*
        книг* файлов 项目 文件 手册 书 プロジェクト ファイル 本
    """,
    "thing": """
        thing meetings appointments termine rendezvous citas results_to web internet url api command
        shell terminal calendar appointment meeting alarm reminder reminders ticket event flight
        table lights light tool folder directory inbox database arguments schema datei ordner
        kalender termin wecker befehl fichier agenda rendez_vous rdv commande archivo carpeta
        calendario cita comando alarma documento promemoria appuntamento arquivo bestand afspraak
        файл* папк* календар* команд* встреч* 日历 命令 闹钟 会议 航班 机票 日程 灯 予定 カレンダー
        コマンド timer shopping_list to_do_list todo_list playlist volume thermostat heating
        spreadsheet csv_file log_file slack tracking_number einkaufsliste heizung licht lampe
        liste_de_courses lumiere minuteur chauffage lista_de_la_compra temporizador luz luces
        correo_a lista_della_spesa luce lista_de_compras boodschappenlijst lamp таймер свет
        список_покупок 定时器 购物清单 空调 群 タイマー 電気 エアコン 買い物リスト メール送信
    """,
    "live": """
        live rain snow sunny regnen regnet schneit pleuvoir pleuvra llover llovera piove chover
        regenen дожд* 下雨 下雪 雨 bus train trains opening_hours bitcoin zloty euro_now news_about
        公交 火车 que_tiempo weather forecast temperature stock stocks share_price trading
        exchange_rate price news score traffic wetter kurs meteo temps_qu_il tiempo cotizacion
        tempo_em weer погод* курс 天气 股价 汇率 气温 新闻 天気 気温 株価 ニュース time_is_it
        what_time clock flight_status delay aktie aktien uhrzeit wie_spat borse quelle_heure
        cours_de l_action que_hora hora_es bolsa acciones che_ore che_tempo azioni previsioni
        que_horas cotacao tempo_vai hoe_laat aandeel который_час акци* 几点了 股票 时间 何時
        天気予報
    """,
    "whole": """
        whole entire full at_once across_all all_at_once gesamte* ganze* komplette* vollstandige*
        samtliche* integral* entier entiere ensemble entero entera completo completa intero intera
        inteiro inteira hele volledige весь всю всего целиком полностью целый 整个 整本 全书 全部
        完整 全体 丸ごと totalite totalidad gesamtheit in_all totalita
    """,
    "all": """
        all every each across any_two the_complete alle allen tout toute tous toutes todo toda todos
        todas tutto tutta tutti tutte всех все 所有 すべて 全て 全
    """,
    "fault": """
        fault dies_with gibt_immer eigentlich rauskommen always_returns always_prints always_gives
        always_get toujours_0 devuelve_siempre siempre_devuelve da_siempre broke_after
        since_the_update since_i_upgraded should_be tried_everything i_tried hort_nicht never_stops
        not_show endlos boucle_infinie no_sale no_lo_veo dice_que_falta 总是 输出总 一直 error
        errors bug bugs broken breaks wrong incorrect doesnt_work not_working wont stopped_working
        hangs throws exception* traceback stack_trace segfault* segmentation infinite_loop forever
        never_ends nothing_happens keeps_getting instead_of undefined fehler fehlermeldung*
        abgestur* absturz* sturzt falsch falsche falsches kaputt wirft fehlschl* schlagt erreur*
        bogue* plante plantent echoue* renvoie_des fallo falla fallan errore errori sbagli* erro
        erros falha* quebr* fout fouten foutmelding* kapot vastloopt ошибк* падает сломал* вылетает
        报错 错误 出错 崩溃 不对 失败 异常 有问题 跑不起来 死循环 エラー バグ 動かない 動きません
        失敗 例外 おかしい 落ちる whats_wrong what_s_wrong what_is_wrong what_went_wrong goes_wrong
        going_wrong doing_wrong stuck blank_page is_blank stays_blank stops_working stops_with
        reboots no_output duplicates times_out timing_out refuses weird strange complains
        complaining off_by_one rerenders mistake unable_to cant_get broke nothing_shows crashloop*
        wrong_result wrong_output exits_with returns_none returns_null never_returns gives_me_an
        problem_is isnt_working not_work keeps_failing keeps_crashing is_red ignored deadlock*
        unexpectedly misses nan garbage_output was_ist_falsch was_stimmt geht_nicht klappt_nicht
        falschen hangt haengt bleibt_leer leere_seite abbruch bricht_ab problem ruckelt komisch*
        stimmt_nicht meckert bug_in bloque bloquee planter ne_marche buggue cloche rien_ne probleme
        ca_ne mauvais mauvaise page_blanche vide_au_lieu dysfonction* roto rota esta_mal sale_mal
        va_mal equivocado se_cuelga cuelga se_rompe no_hace no_arranca no_compila no_me fallando
        revienta en_blanco problema non_va si_blocca blocca rotto va_in_errore trava travando errado
        nao_roda nao_compila hapert loopt_vast doet_het_niet doet_niets verkeerd* niets
        не_запускается не_компилируется не_так зависает неправильн* выдает_ошибку пусто_вместо 错了
        错 出问题 没反应 不起作用 卡住 卡死 无法 打不开 空白 不能 不了 不显示 挂了 失效 乱码
        编译不过 没有反应 結果がおかしい 落ちます 出ます 止まる 止まって 動か できません
        表示されない エラーが 間違 うまくいかない なりません is_empty comes_out comes_back cest_vide
        esta_vacio leer_bleibt 退出 不出来 exec_format ist_leer est_vide sale_vacio untangle
        come_out laeuft_nicht lauft_nicht stuerzt hangt_sich bleibt_hangen hangen_bleibt falscher
        obwohl trotzdem sturz fehlschlag* schlagt_fehl endlosschleife rot weiterhin plotzlich
        ploetzlich nicht_mehr verschwindet doppelt ignoriert au_lieu casse cassee reste_bloque
        tourne_en_boucle refuse vide soudain depuis_la ne_fonctionne faux fausse en_lugar
        no_funciona no_anda se_cae colgado mal vacio vacia de_repente desde_ayer duplicado crash*
        fail* hang hanging freez* stalls leak* flak* null nil none_type red_build ci_is_red
        no_longer suddenly stopped stops thrown raises rejected denied timeout timed_out infinite
        endless twice duplicate missing blank empty_page garbled truncated off_by expected
        got_instead unexpected odd mismatch corrupt* incorrectly invalid 跑不通 结果不对 不工作
        起不来 不生效 丢失 重复 变成 却 但是 できない не_работает ломается вместо sbagliat*
        non_funziona invece nao_funciona werkt_niet dies died won't doesn't 两次 502 500 404 报
        处理不了 too_late late_by one_month off zu_spat
    """,
    "works": """
        works work working geht lauft funktioniert fonctionne marche funciona funcionan compila
        compile compilar pasa passe funziona werkt работает kompiliert passes загружается runs
        running starts start_up loads load displays respond responds responding connect connects
        kompilieren startet klappt tut ladt reagiert stimmt charge repond tourne passent arranca
        carga responde anda corre parte gira carica roda laadt запускается компилируется отвечает
    """,
    "system": """
        system latency outage incident intermittent* throughput memory_leak downtime spikes p99
        cluster servers latenz* ausfall* latence panne latencia caida задержк* 延迟 变慢 宕机 遅延
        障害 response_time response_times queue_length cpu_usage memory_usage timeouts bandwidth
        wlan wifi network_drops microservice microservices kafka datacenter antwortzeit* reseau
        temps_de_reponse red_interna tiempo_de_respuesta rete uitval netwerk сеть отказ* 集群
        响应时间 服务器 卡顿 吞吐 レスポンス サーバー
    """,
    "should": """
        should_our should_my should_they should_the should_a should_she should_he devrait deberia_mi
        nuestro_deberia sollte_unser soll_unser soll_meine should_i shall_we shall_i do_we_need
        would_it_be_better soll_ich sollte_ich lohnt dois_je devrais_je devrions_nous deberia
        deberiamos debo conviene devo dovrei dovremmo deveria devemos moet_ik moeten_we zullen_we
        стоит_ли нам_лучше 应该 该不该 要不要 べきか
    """,
    "or": """
        or oder ou o или 还是 或 それとも positive positif positiv negative negatif negativ neutral
        neutre neutro either
    """,
    "pick": """
        pick decide_which choose one_of exactly_one output print only answer reply determine decide
        screen mark type wahle gib nur antworte entscheide choisis reponds indique elige indica di
        scegli rispondi escolha responda kies geef_aan antwoord выбери ответь укажи 选择 回答 输出
        选出 选一个 答え 選んで
    """,
    "brief": """
        brief sentences sentence lines bullets bullet words satz satze satzen zeilen stichpunkte
        stichpunkten stichworten phrase phrases lignes frases lineas parrafo righe frasi linhas
        paragrafo zinnen regels предложени* строк* абзац* 句话 行以内 字以内 三点 几点 文で 行で
        三つ 字で
    """,
    "now": """
        now monday tuesday wednesday thursday friday saturday sunday montag dienstag mittwoch
        donnerstag freitag samstag sonntag lundi mardi mercredi jeudi vendredi samedi dimanche lunes
        martes miercoles jueves viernes domingo lunedi segunda maandag понедельник 周一 周二 周三
        周四 周五 this_week next_week this_afternoon this_evening latest right_now rn currently
        today tonight tomorrow gerade jetzt heute morgen aktuell maintenant actuellement aujourd
        demain ahora hoy manana adesso oggi domani agora hoje amanha nu vandaag сейчас сегодня
        завтра 现在 今天 明天 今晚 目前 今 今日 明日
    """,
    "life": """
        life garden lawn snake film movie movies theatre theater stage play scene actor restaurant
        hotel party wedding hall village island zoo insect school yoga dog pet kitchen house
        dress_code zip_code code_of_conduct discount_code feature_film youtube podcast weekend
        holiday vacation dinner ball garten schlange urlaub hochzeit insel haus wochenende jardin
        serpent vacances mariage maison ile pelicula boda vacaciones casa serpiente giardino festa
        tuin huis vakantie фильм* сад 电影 花园 餐厅 蛇 周末 映画 庭 grandmother grandma mother
        father boss_said cooking tea cake bread music band wine trip_to beach mountain friend
        friends oma opa mutter vater kuchen kochen musik reise freund* gateau grand_mere ami amis
        voyage abuela madre padre amigo* musica viaje nonna amico* viaggio avo mae pai viagem
        vriend* reis бабушк* мам друг* змея 妈妈 朋友 蛋糕 旅行 音乐 猫 狗 母 友達 料理 your_plan
        dein_plan the_plan gentil_plan tu_plan
    """,
    "this": """
        this error_handling fehlerbehandlung gestion_des_erreurs manejo_de_errores
        tratamento_de_erros gestione_degli_errori foutafhandeling 错误处理 异常处理 エラー処理
        this_abstract the_abstract this_summary the_summary diese_zusammenfassung these that below
        following above attached here diese* folgende* unten oben hier ce cet cette ces suivant*
        dessous este esta esto siguiente abajo questo questa seguente esse essa seguinte deze dit
        volgende это этот эту этого следующ* 这 下面 以下 以上 この 次の これ
    """,
    "ask": """
        ask what whats who when where which how can could would do_you do_i do_we do_they should
        shall wer wann wo wie welche* kann kannst konnen konntest konnten gibt_es quel quelle quels
        quelles qui quand comment est_ce peux peut pouvez connais que quien cuando donde cual cuales
        como puedes puede che chi quando dove come qual quale puoi quem onde o_que voce_pode wat
        waar hoe kun kan что кто когда где как какой какая какие можешь можно
    """,
    "be": """
        be is are was were ist sind es est sono son hay hat does did has zijn sao estan will
    """,
    "why": """
        why any_idea any_ideas any_clue warum wieso weshalb pourquoi por_que perche waarom почему
        зачем 为什么 为何 为啥 なぜ どうして
    """,
    "my": """
        my 你 我 your mein meine meinen dein deine mon ma mes mi mis tu mio mia meu minha mijn мой
        моя наш* notre nuestro nuestra our unser* nostra nostro nosso ons
    """,
    "hi": """
        hi hello hey thanks thank good_night good_morning hallo danke moin servus bonjour salut
        merci hola gracias ciao grazie ola obrigad* hoi bedankt dank привет спасибо здравствуйте
        你好 谢谢 您好 嗨 早上好 晚安 こんにちは ありがとう おはよう さようなら haha lol cheers
        good_evening guten_morgen guten_tag guten_abend gute_nacht bonsoir buenos_dias buenas
        bom_dia buongiorno goedemorgen доброе_утро добрый_день 再见 多谢 こんばんは bye goodbye
    """,
    "me": """
        me tienes sabes i_want_to_know i_d_like_to_know tell suggest recommend name advise imagine
        pretend help i ive you ich mir mich du dir sie sag nenn nenne empfiehl je moi vous votre dis
        conseille yo dime ayuda recomienda* tengo io dimmi consigli* eu voce recomend* ik mij
        подскажи я меня мне мы ты вы посоветуй 什么 怎么 如何 吗 呢 哪 谁 推荐 多少 何 どう どこ 誰
        ですか ますか おすすめ us we bist sind_sie uns haben_sie bin habe nous suis ai soy somos he
        siamo noi nos tenho wij ben heb нам хочу_спросить подскажите 请问 我们 咱 私 僕 です_か 教え
        want_to_know like_to_know i_wonder wondering mochte_wissen wuste_gern wurde_gern
    """,
    "no": """
        no do_not bitte_nicht need_not should_not must_not dont without never stop nor kein keine
        keinen keiner ohne nie ne sans jamais aucun aucune sin nunca ninguna ningun non senza niente
        nao sem geen zonder без нет 不要 别 不用 无需 不需要 勿 nothing skip statt anstatt
        au_lieu_de en_vez invece_di
    """,
    "not": """
        not nicht nichts pas rien niet не nada
    """,
    "nt": """
        nt doesnt isnt cant cannot couldnt didnt arent hasnt wasnt werent
    """,
    "end": """
        end but just instead rather sondern aber mais seulement sino solo pero mas apenas maar
        alleen но только 只 而是 但 だけ
    """,
}


# ==== 14. Tasks ===================================================================================
# What a prompt asks for: one of ten types of tasks.  No model is asked, and the same prompt is
# always the same task: what it says, by the kinds of its words, and what is pasted in it add up by
# the table of weights below.  `tests/tune.py` made that table from the prompts in tests/prompts.

LARGE_CONTEXT = 12_000  # tokens: what is longer is that, whatever it says
READ, HEAD, TAIL = 1200, 240, 120  # characters read of a prompt; and of its prose
ORDERS = (  # kinds of words that say what is to be done: the first of them counts once more
    "make", "port", "judge", "fix", "shorten", "sort", "think", "explain", "act", "do", "want",
    "digest", "bin",
)  # fmt: skip
DENIALS = ("no", "not", "nt")  # kinds of words after which a few do not count
DENIED = 4
UNDENIED = ("me", "hi", "this", "works", "fault")  # kinds that do all the same
MARKS = {"asks": "a question", "stop": ""}  # which end that
CODE_LINE = (
    r"(?P<code>\s*(?:[-+@]{1,3} ?)?(?:def |class \w+[:({]|(?:const|let|var|int|void|func|fn|public"
    r"|private|static) \w|return\b|import \w|from \S+ import|#include|#!|@\w+\s*$"
    r"|(?:if|for|while|switch|catch) ?\(|(?:if|for|while|else|elif|try|except|with)\b[^.?!]*:$"
    r"|[{}\])]+[;,]?\s*$|</?\w+[^>]*>|SELECT |INSERT |UPDATE |CREATE |FROM\b|WHERE\b|\$ \w"
    r"|[\w.\"'-]+ ?[:=] ?[\[{\"'\d]))"
)
LOG_LINE = (
    r"(?P<log>\W{0,3}(?:\d{4}[-/]\d\d[-/]\d\d[ T]\d|\d\d:\d\d:\d\d|[A-Z][a-z]{2} [ \d]\d \d\d:"
    r"|(?:INFO|WARN|WARNING|ERROR|DEBUG|FATAL|TRACE)\b|Traceback|File \"|\s*at \w[\w.$]*\())"
)
ERROR_LINE = r"(?P<error>\w*(?:Error|Exception)\b:|error(?:\[\w+\])?:|fatal:|panic:|npm ERR)"
PASTED = re.compile(f"{CODE_LINE}|{LOG_LINE}|{ERROR_LINE}|(?P<quote>>)")
SIGNS = re.compile(r"[{}=<>$;()\[\]]")
QUOTED = re.compile(
    r'"[^"\n]{0,400}"|“[^”]{0,400}”|„[^“”]{0,400}[“”]|«[^»]{0,400}»|「[^」]{0,400}」|`[^`\n]{0,200}`'
)
FAILURES = (  # what programs print when they fail
    "Error:", "rror: ", "Exception", "Traceback", "FAILED", "Segmentation", "panic:",
    "undefined reference", "not defined", "npm ERR", "No such file", "core dumped",
)  # fmt: skip
CALLS = re.compile(r"(?<=[a-z_0-9])\([\w ]+[,:)]")
WORD = re.compile(r"\w+[#+]*|[\n!?,;.:]")
PLAIN = str.maketrans(
    "áàâäãåçéèêëíìîïñóòôöõúùûüýё？！，；、：。",  # noqa: RUF001
    "aaaaaaceeeeiiiinooooouuuuyе?!,,,:.",  # noqa: RUF001
)
CJK = (
    "\u2e80"  # where Chinese and Japanese begin: they are not spaced, so that words are looked for
)
NOT_IN_CHINESE = re.compile("(?:不要|别|不用|无需|不需要|请勿)[\u4e00-\u9fff]{0,4}")


BIAS = (-8, 14, -3, 0, -10, -5, -5, -6, 0, 23)
WEIGHTS = {  # what speaks for and against each of TASKS, in its order
    # what is there
    "tools": ( -4,  -7,  -3,  -5,   1,   3,  -2,  -1,  24,  -5),
    "nothing": ( -2,  -5,  -2,  -2,   2,  -1,  -2,  -2,  -4,  18),
    "error": (  0,  -4,  -2,  -4,  -3,  17,  -1,  -1,  -2,  -2),
    "listing": ( -6, -11,  -6,   4,  16,  14,  -4,  -3,  -4,  -1),
    "asks": (  4,  11,  -2,  -9,   9,   2,   1,  -4,  -1, -11),
    "few": ( -2,   3,  -2,  -5,   1,   2,  -3,  -2,   0,   8),
    "lines": (  8, -10,   7,  -3,   8,   2,  -7,  -4,  -3,   3),
    "log": (  0,  -1,   0,   0,  -1,   7,   0,   0,   0,  -3),
    "many": ( -2,  -2,   5,   1,   0,  -4,   7,  -2,  -1,  -2),
    "quoted": (  7,   0,  -5,   1,  -2,   6,  -3,  -3,   4,  -3),
    "stop": (  4,  -3,   0,  -4,  -5,   5,   7,   3,  -9,   1),
    "call": ( -4,  -3,  -3,  -1,   5,   6,  -2,  -1,   5,  -2),
    "more": (  5,  -4,  -1,   3,  -1,   1,  -1,   1,   1,  -2),
    "quote": ( -1,  -1,   5,   0,  -1,   0,   0,  -1,  -1,   0),
    "images": ( -2,   4,  -1,   0,   0,   0,   0,   0,   0,   0),
    "long": ( -1,  -4,   4,   2,  -1,   3,   0,   0,  -1,  -1),
    "some": ( -1,   4,  -1,   1,   0,   1,  -3,   2,   1,  -3),
    # kinds of words
    "corpus": ( -4,  -8,   0,  -5,  -2,  -2,  -8,  36,  -4,  -3),
    "think": ( -4,  -6,  -3,  -4,  -4,  -3,  31,   2,  -4,  -5),
    "digest": ( -3,  -9,  27,  -2,  -2,  -4,  -3,  -3,  -1,  -1),
    "code": ( -5, -10,  -5,  26,   8,   4,  -6,  -5,  -5,  -3),
    "shorten": ( -4,  -5,  24,  -5,  -2,  -3,  -1,   2,  -1,  -4),
    "judge": (  1,  -5,   1,  -8,  21,  -8,   1,   1,   0,  -4),
    "bin": ( 19,  -5,  -3,  -2,  -2,  -4,  -2,  -1,   2,  -3),
    "fault": (  1,   2,   0,  -5,  -5,  18,  -5,  -3,  -1,  -3),
    "hi": ( -1,  18,  -1,   3,  -2,  -3,  -3,  -2,  -6,  -4),
    "or": ( 16,  -3,  -1,  -1,  -2,  -5,   2,   0,  -2,  -4),
    "thing": (  0,  -5,  -1,   4,  -4,  -6,   2,  -1,  16,  -5),
    "whole": ( -1,  -5,  -1,  -3,  -1,  -1,  -4,  15,   2,  -2),
    "act": ( -3,  -5,   0,  -3,   2,  -1,  -3,   0,  14,  -1),
    "brief": ( -4,   7,  14,  -1,  -2,  -5,  -3,  -2,  -1,  -3),
    "soft": ( -3,  -3,  -3,  14,   2,   4,  -6,   1,   0,  -5),
    "plan": ( -2,  -3,  -1,  -3,  -1,  -2,  13,   0,   1,  -2),
    "sort": ( 13,  -5,  -4,   4,  -2,  -4,  -4,   3,  -1,  -2),
    "now": (  4,   0,   2,  -7,  -7,   0,   0,  -3,  12,   0),
    "pick": ( 11,   2,  -2,   0,  -1,  -4,   2,  -3,  -1,  -5),
    "make": ( -5,   1,   2,  10,   0,  -3,   3,  -1,  -1,  -5),
    "this": ( 10,  -4,   8,   5,   3,  -1,  -6,  -3,  -2, -10),
    "all": ( -1,  -4,  -3,   6,  -1,  -5,   4,   9,  -6,   1),
    "fix": (  0,   1,   2,  -7,  -1,   9,   0,  -2,   0,  -2),
    "live": (  3,  -7,  -2,   2,  -3,  -3,   0,  -2,   9,   3),
    "port": ( -1,   9,  -3,   4,  -1,  -3,  -1,  -1,   1,  -3),
    "works": ( -1,  -5,   0,  -4,  -2,   9,   3,  -1,   3,  -2),
    "nt": ( -1,   7,  -1,  -8,   2,   8,   0,  -2,  -3,  -1),
    "pile": ( -4,  -5,   3,   3,   0,   0,  -5,   8,   3,  -3),
    "prose": (  2,   8,   6,  -2,  -3,  -6,  -4,  -3,   3,  -1),
    "why": (  0,   3,  -2,  -1,  -3,   8,  -1,  -1,  -1,  -1),
    "do": ( -1,  -3,  -1,   3,   1,  -3,   2,   0,   7,  -5),
    "explain": (  0,   7,   1,  -2,  -2,  -3,  -1,   5,  -1,  -3),
    "life": (  0,   7,   0,   1,  -3,  -5,   2,  -2,  -2,   2),
    "ask": ( -1,   6,   2,  -2,  -3,  -1,   4,   6,  -2,  -7),
    "be": (  1,   6,   4,  -3,   2,  -2,   0,  -4,  -1,  -2),
    "me": ( -5,   6,  -1,  -3,   3,   2,   1,   2,   1,  -5),
    "not": (  0,   1,   0,  -1,  -3,   6,   1,  -1,   0,  -3),
    "want": (  2,  -2,   5,   4,   6,  -2,   2,  -5,  -2,  -8),
    "my": ( -3,   5,  -2,  -3,   4,   4,   2,  -3,  -2,  -2),
    "no": (  1,   0,   3,   0,   1,  -1,   5,  -4,  -3,  -3),
    "system": (  1,  -3,   1,   0,   2,  -1,   5,  -2,  -1,  -1),
    "end": (  1,  -1,   1,   2,   2,   3,   1,  -2,  -3,  -3),
    "should": (  0,   0,   0,   0,  -1,  -1,   3,   0,   0,   0),
    # two that mean more together
    "listing judge": ( -2,  -1,  -1,  -4,  11,   0,  -1,  -1,   0,  -1),
    "listing asks": ( -1,  -5,  -1,  -4,  10,   4,  -1,  -1,  -1,  -1),
    "prose make": ( -1,  10,  -1,   0,  -1,  -2,  -2,  -1,  -1,  -2),
    "soft fault": (  1,  -1,   2,  -4,  -5,  10,   0,  -2,   0,  -1),
    "tools some": (  0,   3,  -2,  -2,  -2,  -3,  -2,  -3,  10,  -1),
    "listing fault": (  0,  -2,   0,  -1,  -5,   9,   0,   0,  -1,  -1),
    "hi few": (  0,   8,   0,   0,   0,   0,   0,   0,   0,  -6),
    "lines or": (  8,  -2,  -1,  -1,   2,  -2,  -1,  -1,  -1,  -1),
    "lines sort": (  7,  -3,  -1,   4,  -1,  -2,  -1,  -1,  -1,   0),
    "listing make": ( -1,  -1,  -1,   7,   2,  -3,  -1,   0,   0,  -1),
    "code fault": (  6,  -1,   4,  -4,   0,  -2,  -1,   0,  -2,   0),
    "listing port": (  0,  -1,   0,   6,  -1,  -2,   0,   0,   0,   0),
    "soft make": (  0,  -3,  -1,   6,   2,  -3,   0,   0,  -1,  -1),
    "tools code": (  0,  -1,   0,  -7,   6,   4,  -1,  -1,   0,   0),
    "code nt": (  2,   5,  -2,  -6,  -1,   5,  -1,   0,  -1,   0),
    "listing why": ( -1,  -1,   0,   0,  -2,   5,   0,   0,   0,   0),
    "asks few": (  0,   4,   0,   0,  -1,   0,   0,   0,   0,  -2),
    "code ask": ( -1,  -2,   0,   4,   3,   0,  -2,  -2,   0,  -1),
    "code my": ( -2,  -1,  -1,   1,   3,   4,   0,  -1,  -1,  -2),
    "few nothing": ( -1,  -2,  -1,  -1,   3,   2,  -1,  -1,  -2,   4),
    "life soft": ( -2,   3,   2,   4,   0,  -3,  -2,   0,  -1,  -1),
    "listing my": ( -1,  -1,  -1,  -2,   3,   4,   0,   0,   0,  -1),
    "no make": ( -3,  -1,   0,  -2,  -1,   4,   2,   0,   1,   0),
    "quoted or": (  4,  -2,  -1,   1,   1,  -1,  -1,   0,  -1,  -1),
    "soft my": (  0,  -2,   1,   1,   4,   2,   0,  -2,  -2,  -2),
    "error listing": (  1,   0,   0,  -1,  -2,   3,   0,   0,   0,   0),
    "listing fix": ( -1,  -1,   0,  -1,   1,   3,   0,   0,   0,   0),
    "soft ask": ( -1,   3,   2,   1,   2,  -1,  -2,   0,  -3,  -2),
    "soft explain": (  3,   1,  -1,   2,   0,  -1,  -2,   0,  -1,   0),
    "soft fix": (  2,  -1,   3,  -4,   1,   2,  -2,  -1,  -2,   0),
    "soft judge": ( -2,  -1,   3,   2,   3,  -2,  -1,  -1,  -1,  -1),
    "soft why": (  0,   0,   0,   0,  -1,   3,   0,   0,   0,   0),
    "tools few": (  0,  -1,   0,   0,  -1,   2,  -1,   0,   3,  -1),
    "code asks": ( -2,  -3,   0,   0,   1,   2,   0,  -1,   1,   0),
    "code explain": (  0,   2,   0,   0,   0,  -1,   0,   0,   0,   0),
    "code not": ( -1,  -1,   2,   2,  -2,   1,   0,   0,   0,   0),
    "think code": (  0,   0,   1,  -1,  -1,   1,   2,   0,   0,   0),
    # the first of ORDERS
    "first think": ( -3,   0,  -2,  -3,  -1,  -3,  13,   3,  -1,  -4),
    "first act": ( -3,  -3,  -1,  -3,  -1,   2,  -2,  -1,  12,   0),
    "first shorten": ( -3,  -6,  12,  -1,  -1,  -2,   0,   5,  -1,  -3),
    "first sort": ( 11,  -2,  -2,   0,  -1,  -4,  -1,   1,  -1,  -2),
    "first bin": (  9,  -3,  -1,  -1,  -1,  -1,  -1,   0,   0,  -1),
    "first make": ( -4,   2,   1,   9,  -1,   0,   5,  -2,  -3,  -7),
    "first judge": ( -1,   1,  -3,  -2,   8,  -3,   0,   3,   0,  -3),
    "first digest": ( -1,  -2,   7,   0,   0,  -1,   0,  -2,   0,  -1),
    "first want": ( -1,   0,   2,   7,  -1,   0,   2,  -3,   0,  -6),
    "first do": ( -2,   1,  -3,  -4,   2,   1,   0,   2,   6,  -3),
    "first explain": (  0,   6,   3,  -2,  -2,   1,  -3,   2,  -2,  -2),
    "first fix": ( -2,   5,  -2,  -1,   1,  -1,   2,  -1,   0,  -2),
    "first port": ( -1,   4,  -1,   5,  -1,  -2,  -1,  -1,   1,  -3),
}  # fmt: skip
# Two cues that mean more together than alone.
PAIRED = {cue: cue.split() for cue in WEIGHTS if " " in cue and not cue.startswith("first ")}


class Vocabulary(NamedTuple):
    """The words of CUES, as they are looked up; each gives a kind."""

    words: dict[str, str]
    stems: dict[str, str]
    phrases: dict[str, list[tuple[list[str], str]]]  # by their first word
    unspaced: dict[str, list[tuple[str, str]]]  # by their first character
    lengths: list[int]  # of stems, the longest first


@functools.lru_cache(maxsize=1)
def vocabulary() -> Vocabulary:
    found = Vocabulary({}, {}, {}, {}, [])
    found.words.update({**dict.fromkeys("\n!,;.:", "stop"), "?": "asks"})
    for kind, text in CUES.items():
        for cue in text.split():
            first, *rest = cue.split("_")
            if cue >= CJK:
                found.unspaced.setdefault(cue[0], []).append((cue, kind))
            elif rest:
                found.phrases.setdefault(first, []).append(([first, *rest], kind))
            elif cue.endswith("*"):
                found.stems[cue[:-1]] = kind
            else:
                found.words[cue] = kind
    found.lengths.extend(sorted({len(stem) for stem in found.stems}, reverse=True))
    return found


class Verdict(NamedTuple):
    """Which task it is, and what speaks for it."""

    task: str
    reason: str


def without_pasted(text: str, seen: dict[str, str]) -> str:
    """The lines that somebody says in a prompt, not those that are pasted; `seen` gets what is."""
    if len(text) > READ:
        text = f"{text[: READ * 3 // 5]}\n{text[-READ * 2 // 5 :]}"
    if any(mark in text for mark in FAILURES):
        seen["error"] = "an error in it"
    parts = text.replace("’", "'").split("```")  # noqa: RUF001
    if len(parts) > 2 and any(SIGNS.search(part) for part in parts[1::2]):
        seen["listing"] = "code in it"
    lines, prose = "\n".join(parts[::2]).split("\n"), []
    for line in lines if len(lines) <= 24 else [*lines[:14], *lines[-10:]]:
        pasted = PASTED.match(line)
        if pasted:
            what = pasted.lastgroup or ""
            seen[{"code": "listing"}.get(what, what)] = "code in it"
        elif 12 * len(SIGNS.findall(line)) > len(line) + 6:
            seen["listing"] = "code in it"
            start = SIGNS.split(line, 1)[0]
            prose += [start] if start.count(" ") > 2 else []
        else:
            prose.append(line)
    return "\n".join(prose).strip()


def read_prose(text: str, seen: dict[str, str]) -> str:
    """What somebody says in a prompt, in plain letters; `seen` gets what else there is."""
    told = without_pasted(text, seen)
    if "\n" in told:
        seen["lines"] = ""
    if len(told) > HEAD + TAIL:
        told, seen["long"] = f"{told[:HEAD]}\n{told[-TAIL:]}", ""
    unquoted = QUOTED.sub(" ", told)
    if unquoted != told:
        seen["quoted"] = ""
    if "://" in unquoted or CALLS.search(unquoted):
        seen["call"] = "a call in it"
    return unquoted.lower().replace("n't", " nt").replace("tl;dr", "tldr").translate(PLAIN)


@functools.lru_cache(maxsize=2048)
def look_up_word(word: str) -> tuple[str, Sequence[tuple[list[str], str]]]:
    """The kind of a word, and phrases that begin with it; most words are the same few."""
    book = vocabulary()
    kind, stems = book.words.get(word), book.stems
    if kind is None:
        kind = next((stems[word[:n]] for n in book.lengths if word[:n] in stems), "")
    return kind, book.phrases.get(word, ())


def read_words(prose: str, seen: dict[str, str]) -> int:
    """Note the kinds of the words in it; how many words there are."""
    said, mute, first = WORD.findall(prose), -1, ""
    for at, (alone, phrases) in enumerate(map(look_up_word, said)):
        kind = alone
        if phrases:
            fitting = (one for some, one in phrases if said[at : at + len(some)] == some)
            kind = next(fitting, alone)
        if not kind:
            continue
        if kind in MARKS:
            mute = -1
        elif kind in DENIALS:
            mute = at + DENIED
        elif at <= mute and kind not in UNDENIED:
            continue
        if kind not in seen:
            seen[kind] = MARKS.get(kind, f'"{said[at]}"')
        if not first and kind in ORDERS and at > mute:
            first = seen[f"first {kind}"] = f'"{said[at]}"'
    return len(said)


def read_unspaced(prose: str, seen: dict[str, str]) -> None:
    """The same of Chinese and Japanese."""
    plain = NOT_IN_CHINESE.sub("", prose)
    if plain != prose:
        seen["no"] = ""
    book = vocabulary().unspaced
    cues = [one for sign in book.keys() & set(plain) for one in book[sign]]
    found = [(plain.find(cue), kind) for cue, kind in cues if cue in plain]
    for _, kind in found:
        seen.setdefault(kind, "its words")
    orders = [(at, kind) for at, kind in found if kind in ORDERS]
    if orders and not any(name.startswith("first ") for name in seen):
        seen[f"first {min(orders)[1]}"] = "its words"


def read_cues(text: str, *, tools: bool, images: bool) -> dict[str, str]:
    """What there is in a prompt of the rows of WEIGHTS, each with how to say so."""
    seen: dict[str, str] = {}
    prose = read_prose(text, seen)
    number = read_words(prose, seen)
    if not prose.isascii() and max(prose) >= CJK:
        read_unspaced(prose, seen)
    if not any(kind in CUES for kind in seen):
        seen["nothing"] = ""
    size = "few" if number <= 3 else "some" if number <= 12 else "more" if number <= 40 else "many"
    seen[size] = ""
    seen.update({"tools": "tools at hand"} if tools else {})
    seen.update({"images": "a picture"} if images else {})
    seen.update(
        {pair: "" for pair, (one, other) in PAIRED.items() if one in seen and other in seen}
    )
    return seen


def classify(text: str, tokens: int = 0, *, tools: bool = False, images: bool = False) -> Verdict:
    """The task of a prompt: its last message, with the size and the tools of all of it."""
    if tokens > LARGE_CONTEXT:
        return Verdict("large_context", f"{tokens} tokens")
    seen = read_cues(text, tools=tools, images=images)
    rows = [WEIGHTS[cue] for cue in seen if cue in WEIGHTS]
    sums = [sum(column) for column in zip(BIAS, *rows)]
    best = sums.index(max(sums))
    told = {words: WEIGHTS[cue][best] for cue, words in seen.items() if words and cue in WEIGHTS}
    spoke = sorted((one for one in told if told[one] > 0), key=lambda one: -told[one])[:3]
    return Verdict(TASKS[best], ", ".join(spoke) or "nothing else in it")


# ==== 15. Model choice ============================================================================
# Which model a request for `auto` gets.  What cannot serve it is left out, and why is remembered;
# the rest stand in the order of the row of [routes], and what the table below says moves them up or
# down in it.  A model that is named is never second-guessed.

AUTO = "auto"
PLACES = {  # by how many places of its row what holds for a model moves it; below 0: up
    "loaded": -1.5,  # it passes the one before it
    "purpose": -0.5,  # its `purpose` says so: it goes before another of the same place
    "no room": 1.0,  # others have to make room for it in graphics memory
    "waiting": 0.25,  # for each request that waits for a slot there, up to
    "most waiting": 3.0,
    "taken": 3.0,  # it wants a device for itself that is in use, or another has it so
    "unsure": 100.0,  # nothing tells whether it can see pictures, or use tools
    "down": 1000.0,
}
ROUTER_MODES = ("async", "sync", AUTO)
ESTIMATED = {  # how much work a type of task is, as routers tell it; the others are light
    "large_context": "heavy", "agentic_reasoning": "heavy", "code_generate": "medium",
    "code_review": "medium", "code_fix": "medium", "tool_use": "medium",
}  # fmt: skip
REASON_SHOWN = 300  # characters


class Wish(NamedTuple):
    """What the member `router` of a request asks for; times are seconds."""

    told: bool = False  # there is one
    mode: str = AUTO
    allow_async: bool = False
    task: str = ""  # empty: the prompt tells
    priority: Priority | None = None
    preferred: Names = ()
    forbidden: Names = ()
    max_queue: float | None = None
    max_run: float = 0.0  # 0: any
    gpu_only: bool | None = None  # None: as configured


NO_WISH = Wish()


class VideoMemory(NamedTuple):
    """Graphics memory of a device, in GiB."""

    total: float
    free: float
    reserve: float  # that no model is to take

    def fits(self, size: float) -> bool:
        """Whether a model of this size can be loaded beside what is there."""
        return size + self.reserve <= self.free

    def holds(self, size: float) -> bool:
        """Whether one of this size can be loaded at all, alone."""
        return size + self.reserve <= self.total


class Candidate(NamedTuple):
    """A model that could be meant, as it stands now."""

    name: str
    key: str
    place: int = 0  # in its row, counted from 0
    in_row: bool = True  # it is of the row itself, not merely good at such tasks
    size: float = 0.0  # GiB; 0: not known
    memory: VideoMemory | None = None  # where it has the most room; None: not known
    loaded: bool = False
    purpose: bool = False
    waiting: float = 0.0  # requests that wait for a slot there
    wait: float = 0.0  # seconds until one would start
    taken: bool = False
    unsure: bool = False
    down: bool = False
    backend: str = ""  # the only one that can serve the request with it, of several that have it
    cannot: str = ""  # why it cannot serve the request at all

    @property
    def has_room(self) -> bool:
        """Whether it is loaded, or fits beside what is; what is not known does not keep it."""
        return self.loaded or not self.size or self.memory is None or self.memory.fits(self.size)

    @property
    def standing(self) -> float:
        """Its place in the row after all that moves it; the least is chosen."""
        moves = {
            "loaded": self.loaded,
            "purpose": self.purpose,
            "no room": not self.has_room,
            "taken": self.taken,
            "unsure": self.unsure,
            "down": self.down,
        }
        moved = sum(PLACES[name] for name, holds in moves.items() if holds)
        return self.place + moved + min(PLACES["waiting"] * self.waiting, PLACES["most waiting"])


class Choice(NamedTuple):
    """Which model it is, and why."""

    model: str = ""
    task: str = ""
    fallbacks: Names = ()  # those that would be next
    reason: str = "named"
    auto: bool = False  # it was left to llmq
    backend: str = ""  # the only one where it can serve the request; empty: wherever it is


NO_CHOICE = Choice()  # the request names a model, or none


def choose(
    candidates: Sequence[Candidate], task: str, why: str, longest: float | None, *, degrade: bool
) -> Choice | None:
    """The candidate that stands best, None where none can; `longest` is how long it may wait.

    With `degrade` a smaller one of the row goes before one that memory or that time is too short
    for: without it these never decide alone.
    """
    good = [one for one in candidates if not one.cannot]
    able = sorted(good, key=lambda one: (one.standing, one.place, one.name))
    if not able:
        return None
    best = first = able[0]
    if degrade and is_too_much(first, longest):
        smaller = [
            one
            for one in able
            if one.in_row
            and 0 < one.size < first.size
            and not is_too_much(one, longest)
            and (one.down, one.unsure) <= (first.down, first.unsure)
        ]
        best = next(iter(smaller), first)
    words = [f"{task}: {why}", f"{best.name} {explain(best)}"]
    if best is not first:
        words.append(f"in place of {first.name}, which {is_too_much(first, longest)}")
    words += [f"not {one.name}: {one.cannot}" for one in candidates if one.cannot][:3]
    others = tuple(one.name for one in able if one is not best)
    reason = "; ".join(words)[:REASON_SHOWN]
    return Choice(best.name, task, others, reason, auto=True, backend=best.backend)


def is_too_much(one: Candidate, longest: float | None) -> str:
    """What memory or time is too short for a model, in words; empty: nothing."""
    if not one.has_room and one.memory is not None:
        return f"needs {one.size:.1f} GiB of {max(0.0, one.memory.free):.1f} free"
    if longest is not None and one.wait > longest:
        return f"would wait {one.wait:.0f} s"
    return ""


def explain(one: Candidate) -> str:
    """What speaks for a candidate and against it, in words."""
    told = {
        "is loaded": one.loaded,
        "is good at it": one.purpose,
        "has to be loaded where others are": not one.has_room,
        "waits for its device": one.taken,
        "may not be able to": one.unsure,
        "is down": one.down,
    }
    said = [words for words, holds in told.items() if holds]
    said += [f"has {one.waiting:.0f} waiting"] if one.waiting >= 1 else []
    return ", ".join(said) or "is the first that can"


# ==== 16. Cache ===================================================================================
# What was answered before.  Two requests have the same key where nothing could make their answers
# differ: the route, each member of the body, what is configured for the model, and which model it
# is.  When it is full it lets go of the answer that was asked for the longest time ago.

ENTRY_BYTES = 350  # of memory that an answer takes besides its own
UNTELLING = ("priority", "keep_alive")  # members that change no answer
MOST_OF_CACHE = 8  # one answer takes at most an eighth of the bytes that all may have


class Answer(NamedTuple):
    """The body of an answer with status 200, and until when it is given again."""

    body: bytes
    type: str
    until: float  # seconds since 1970: a restart does not begin them anew


def answer_key(values: Mapping[str, Any], *told: object) -> bytes:
    """The key of the answer to a body, SHA-256; `told` is what else could make it differ."""
    asked = {name: value for name, value in values.items() if name not in UNTELLING}
    parts = [
        hashlib.sha256(one).hexdigest() if isinstance(one, bytes) else str(one) for one in told
    ]
    text = json.dumps([*parts, asked], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_settled(values: Mapping[str, Any], policy: ModelSettings, *, options: bool) -> bool:
    """Whether a chat asks for an answer without chance: at temperature 0, and without tools.

    What is configured for its model counts, and on Ollama's routes what is in its `options`.
    """
    asked = {name: one for name, one in values.items() if name not in policy.strip}
    inner = [asked.get("options"), policy.set.get("options")]
    asked.update(policy.set)
    told = {name: one for each in inner if isinstance(each, dict) for name, one in each.items()}
    temperature = (told if options else asked).get("temperature")
    settled = type(temperature) in (int, float) and temperature == 0
    return settled and not (asked.get("tools") or asked.get("functions"))


GOOD_ENDS = {"stop", "end_turn", "stop_sequence"}


def is_complete(document: Mapping[str, Any]) -> bool:
    """Whether an answer, in whichever dialect, says that it ended because all was said."""
    choices = document.get("choices")
    rows = [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []
    reasons = [row.get("finish_reason") for row in rows]
    reasons += [document[name] for name in ("done_reason", "stop_reason") if name in document]
    return bool(reasons) and GOOD_ENDS.issuperset(map(str, reasons))


class Cache:
    """Answers by key, the last to be asked for at the end; never more bytes than they may have."""

    def __init__(self) -> None:
        self.answers: OrderedDict[bytes, Answer] = OrderedDict()
        self.size = 0  # bytes
        self.noting = False  # whether changes are noted, for whoever keeps them on a disk
        self.changed: dict[bytes, Answer | None] = {}  # since they were kept; None: it is gone

    def get(self, key: bytes, now: float) -> Answer | None:
        """The answer, unless it is too old: from now on the one that was asked for last."""
        answer = self.answers.get(key)
        if answer is None or answer.until <= now:
            return None
        self.answers.move_to_end(key)
        return answer

    def put(self, key: bytes, answer: Answer, most: int) -> None:
        """Keep an answer among at most so many bytes of them; one that is too long is not kept."""
        self.drop(key)
        size = len(answer.body) + ENTRY_BYTES
        if size > most // MOST_OF_CACHE:
            return
        self.answers[key] = answer
        self.size += size
        if self.noting:
            self.changed[key] = answer
        self.fit(most)

    def fit(self, most: int) -> None:
        """Let go of the oldest until there are at most so many bytes."""
        while self.size > most:
            self.drop(next(iter(self.answers)))

    def drop(self, key: bytes) -> None:
        """Let go of the answer, if there is one."""
        answer = self.answers.pop(key, None)
        if answer is not None:
            self.size -= len(answer.body) + ENTRY_BYTES
            if self.noting:
                self.changed[key] = None

    def expire(self, now: float) -> None:
        """Let go of what is too old."""
        for key in [key for key, answer in self.answers.items() if answer.until <= now]:
            self.drop(key)


# ==== 17. Messages ================================================================================
# HTTP/1.1 as RFC 9110 and 9112 have it, bytes in, values out.  Strict where leniency has been a
# hole: what a lenient peer and we would read differently is refused, never repaired.  The three
# body decoders share one manner: feed(bytes) -> payload, `done`, `surplus`.

REQUEST_LINE_LIMIT = 8 * KIB
FIELD_LIMIT = 16 * KIB
HEAD_LIMIT = 64 * KIB
FIELDS_LIMIT = 100
CHUNK_LINE_LIMIT = 256  # size and extension of one chunk
EXTENSIONS_LIMIT = 64 * KIB
TRAILER_LIMIT = 8 * KIB

REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
# No obs-fold (RFC 9112 s.5.2), no control characters (RFC 9110 s.5.5), no space before the colon
# (RFC 9112 s.5.1).
FIELD_LINES = re.compile(rf"(?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n)*")
ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
DIGITS = re.compile(r"[0-9]+")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
PLAIN_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")
CHUNKED = -1  # in place of a length
UNTIL_CLOSE = -2
LAST_CHUNK = b"0\r\n\r\n"
REASONS = {499: "Client Closed Request", **{code.value: code.phrase for code in HTTPStatus}}

Headers = dict[str, str]  # lower-case names; repeated fields are joined by ", "
Pairs = Iterable[tuple[str, str]]  # of a head that is to be rendered
Fields = tuple[tuple[str, str], ...]  # likewise, to be kept


COOKIE_BREAK = "\n"  # of answers: cookies have commas of their own, RFC 6265 s.3


class Request:
    """A request as it came; `body` is filled in when it has arrived whole."""

    __slots__ = ("body", "headers", "method", "minor", "path", "query")

    def __init__(self, method: str, target: str, minor: int, headers: Headers) -> None:
        self.method = method
        self.minor = minor  # 1 for HTTP/1.1 and above
        self.headers = headers
        self.body = b""
        self.path, _, self.query = target.partition("?")

    @property
    def keep_alive(self) -> bool:
        """RFC 9112 s.9.3: `close` ends a connection, HTTP/1.0 needs to ask for another request."""
        options = connection_options(self.headers)
        return "close" not in options and (self.minor >= 1 or "keep-alive" in options)


class ResponseHead(NamedTuple):
    status: int
    minor: int
    headers: Headers


def words_of(headers: Headers, name: str) -> set[str]:
    """What a header field lists, without parameters, in lower case."""
    value = headers.get(name)
    if not value:
        return set()
    return {one.partition(";")[0].strip() for one in value.lower().split(",")}


def connection_options(headers: Headers) -> set[str]:
    return words_of(headers, "connection")


def parse_fields(text: str, cookie_break: str = ", ") -> Headers:
    """Field lines, each ended by CRLF, repeated ones joined; ValueError for anything else."""
    if not FIELD_LINES.fullmatch(text):
        raise ValueError("malformed header line")
    headers: Headers = {}
    for line in text.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name = name.lower()
        value = value.strip(" \t")
        if name in headers:
            value = f"{headers[name]}{cookie_break if name == 'set-cookie' else ', '}{value}"
        headers[name] = value
    return headers


def parse_request_head(head: bytes) -> Request:
    """A request from its head, CRLF CRLF included; raises what the client is to be told."""
    text = head.decode("latin-1").lstrip("\r\n")  # RFC 9112 s.2.2: skip empty lines before it
    line, _, rest = text.partition("\r\n")
    if len(line) > REQUEST_LINE_LIMIT:
        raise LlmqError(f"a request line has at most {REQUEST_LINE_LIMIT} bytes", "uri_too_long")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadRequest("malformed request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise LlmqError("llmq speaks HTTP/1.1", "version_not_supported")
    too_long = len(rest) > FIELD_LIMIT and max(map(len, rest.split("\r\n"))) > FIELD_LIMIT
    if too_long or rest.count("\r\n") > FIELDS_LIMIT + 1:
        message = f"at most {FIELDS_LIMIT} header fields of {FIELD_LIMIT} bytes"
        raise LlmqError(message, "headers_too_large")
    try:
        headers = parse_fields(rest[:-2])
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return Request(method, origin_form(method, target, headers), min(int(minor), 1), headers)


def origin_form(method: str, target: str, headers: Headers) -> str:
    """A target without its authority, which replaces Host; `*` is one for OPTIONS alone."""
    if target.startswith("/") or method == "CONNECT" or (target == "*" and method == "OPTIONS"):
        return target  # CONNECT is refused by its method, later
    match = ABSOLUTE_FORM.fullmatch(target)
    if not match:
        raise BadRequest("malformed request target")
    authority, path = match.groups()
    if "host" in headers:
        parse_host(headers["host"])  # two of them are refused even here
        headers["host"] = authority
    return "/" + path.removeprefix("/")


def parse_host(value: str) -> str:
    """The name in a Host field, lower case, brackets kept; BadRequest when malformed."""
    match = HOST.fullmatch(value)
    if not match:
        raise BadRequest("malformed Host")
    return match[1].lower()


def parse_response_head(head: bytes) -> ResponseHead:
    """A response from its head, CRLF CRLF included; ValueError when it is none."""
    line, _, rest = head.decode("latin-1").partition("\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match:
        raise ValueError("malformed status line")
    return ResponseHead(int(match[2]), int(match[1]), parse_fields(rest[:-2], COOKIE_BREAK))


def request_length(request: Request) -> int:
    """Bytes of the body that follows, or CHUNKED (RFC 9112 s.6.3); never a guess."""
    headers = request.headers
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or request.minor == 0:
            raise BadRequest("Transfer-Encoding beside Content-Length or in HTTP/1.0")
        if coding.lower() != "chunked":
            raise LlmqError("the only transfer coding understood is chunked", "not_implemented")
        return CHUNKED
    if length is None:
        return 0
    if not DIGITS.fullmatch(length):
        raise BadRequest("malformed Content-Length")
    if len(length) > 18:
        raise LlmqError("Content-Length beyond any limit", "body_too_large")
    return int(length)


def response_length(head: ResponseHead) -> int:
    """Bytes of the body that follows, CHUNKED or UNTIL_CLOSE; ValueError when it contradicts."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if head.status in (204, 304):
        return 0
    if length is None and (coding is None or coding.lower() == "chunked"):
        return UNTIL_CLOSE if coding is None else CHUNKED
    if coding is not None or length is None or not DIGITS.fullmatch(length) or len(length) > 18:
        raise ValueError("contradictory framing or malformed Content-Length")
    return int(length)


class LengthBody:
    def __init__(self, length: int) -> None:
        self.wants = length  # bytes
        self.done = length == 0
        self.surplus = b""

    def feed(self, data: bytes) -> bytes:
        if not data and not self.done:
            raise ValueError("the body ends before its length")
        payload, self.surplus = data[: self.wants], data[self.wants :]
        self.wants -= len(payload)
        self.done = self.wants == 0
        return payload


class CloseBody:
    """A body that the end of the connection ends."""

    done, surplus = False, b""

    def feed(self, data: bytes) -> bytes:
        self.done = not data
        return data


def too_large(limit: int) -> LlmqError:
    return LlmqError(f"a request body has at most {limit} bytes here", "body_too_large")


class ChunkedBody:
    """A chunked body (RFC 9112 s.7.1); the same payload, or mistake, however the bytes are cut."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most  # bytes that are taken
        self.done = False
        self.surplus = b""
        self.wants = 0  # bytes of the chunk at hand, its CRLF included; 0: a line comes next
        self._size = 0  # of the chunks announced so far
        self._held = b""  # an incomplete line
        self._line_limit = CHUNK_LINE_LIMIT
        self._in_trailers = False  # the last chunk has come
        self._extensions = 0  # bytes of lines with extensions so far (CVE-2023-39326)

    def feed(self, data: bytes) -> bytes:
        if not data:
            raise ValueError("the body ends before its last chunk")
        if self._held:
            data, self._held = self._held + data, b""
        at = 0
        pieces: list[bytes] = []
        while at < len(data) and not self.done:
            if self.wants:
                payload_end = at + max(0, self.wants - 2)
                payload, ending = data[at:payload_end], data[payload_end : at + self.wants]
                if not b"\r\n"[-self.wants :].startswith(ending):
                    raise ValueError("a chunk is not followed by CRLF")
                pieces.append(payload)
                at += len(payload) + len(ending)
                self.wants -= len(payload) + len(ending)
            elif (at := self._take_whole(data, at, pieces)) < len(data):
                line = data[at : data.find(b"\n", at) + 1 or None]
                at += len(line)
                self._take_line(line)
        self.surplus = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_whole(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """The chunks that are here whole, as most are; where the first that is not begins."""
        while not self._in_trailers and (chunk := PLAIN_CHUNK.match(data, at)):
            start = chunk.end()
            end = start + int(chunk[1], 16)
            if end == start or data[end : end + 2] != b"\r\n":
                break
            self._count(end - start)
            pieces.append(data[start:end])
            at = end + 2
        return at

    def _take_line(self, line: bytes) -> None:
        """A chunk's first line, or one of the trailers, which are read and dropped."""
        if len(line) > self._line_limit:
            raise ValueError("a line of the chunked body is too long")
        if not line.endswith(b"\r\n"):
            if line.endswith(b"\n"):
                raise ValueError("a line of the chunked body does not end in CRLF")
            self._held = line
        elif not self._in_trailers:
            self._begin_chunk(line)
        elif line == b"\r\n":
            self.done = True
        else:
            self._line_limit -= len(line)  # which bounds all trailers together
            parse_fields(line.decode("latin-1"))

    def _begin_chunk(self, line: bytes) -> None:
        if b";" in line:
            self._extensions += len(line)
            if self._extensions > EXTENSIONS_LIMIT:
                raise ValueError("a line of the chunked body is too long")
        match = CHUNK_LINE.fullmatch(line[:-2])
        if not match:
            raise ValueError("malformed chunk size")
        size = int(match[1], 16)
        self._count(size)
        if size:
            self.wants = size + 2
        else:
            self._in_trailers, self._line_limit = True, TRAILER_LIMIT

    def _count(self, size: int) -> None:
        self._size += size
        if self.most is not None and self._size > self.most:
            raise too_large(self.most)


Body = Union[LengthBody, CloseBody, ChunkedBody]


def body_decoder(length: int, most: int | None = None) -> Body:
    """What decodes a body of this length; `most` bounds one whose length nobody tells."""
    if length == CHUNKED:
        return ChunkedBody(most)
    return CloseBody() if length == UNTIL_CLOSE else LengthBody(length)


def render_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


# ==== 18. Bodies ==================================================================================
# JSON objects as clients wrote them.  A request is passed on byte for byte: one scan finds what its
# top-level members are and where they stand, one pass puts in and cuts out what must change: the
# model's name, a shared context, llmq's own fields.

DEPTH_LIMIT = 100  # of nested arrays and objects; Pythons differ in what they survive
NAME_LIMIT = 1024  # characters of a top-level member's name
MEMBERS_LIMIT = 1000  # of the top level
EXTENSIONS = ("priority", "numCtx", "router")  # llmq's own fields, never shown to a backend
REPLACED = ("model", "options")  # what a backend may be told in other words
MODEL_LENGTH = 512
# RFC 8259 s.2 and s.4: an object's brace (and the one that closes an empty one), a member's name
# with its colon, what stands between members, and white space up to the end.  A name with escapes
# is left to the decoder's scanner: `(?:…|\\.)*` keeps state for each character, 136 MiB for a name
# of 1 MiB.
OPENING = re.compile(r"[ \t\n\r]*\{(?:[ \t\n\r]*(\}))?")
MEMBER_HEAD = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]{0,1024})"[ \t\n\r]*:[ \t\n\r]*')
NEXT_HEAD = re.compile(r"[ \t\n\r]*," + MEMBER_HEAD.pattern)
QUOTE = re.compile(r'[ \t\n\r]*"')
COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
DELIMITER = re.compile(r"[ \t\n\r]*([,}])")
WHITE = re.compile(r"[ \t\n\r]*")
# What has nothing in it, or numbers only: 256 KiB of them are read in 5 ms.
AT_ONCE = re.compile(r'\[[ \t\n\r]*\]|\{[ \t\n\r]*\}|\[[^\[\]{}"]{0,262144}\]')
CLOSING = {"[": "]", "{": "}"}
PART_DELIMITER = re.compile(r"[ \t\n\r]*([,\]}])[ \t\n\r]*")
PART = 16_384  # numbers that are written at once, likewise


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


ANY_JSON = json.JSONDecoder()  # as `json.loads` has it, which looks at its arguments each time
JSON = json.JSONDecoder(parse_constant=refuse_constant)
# The decoder's own scanners, in C: (text, index) -> (value, index behind it).
scan_value: Callable[[str, int], tuple[Any, int]] = JSON.scan_once  # type: ignore[attr-defined]
scan_string: Callable[[str, int], tuple[str, int]] = json.decoder.scanstring  # type: ignore[attr-defined]

HEAVY_BODY = MIB  # bytes of JSON that are not read in the event loop
MANY_VALUES = 50_000  # in a body: more are not looked at, 10 ms of work and 5 MB of memory
STAND_INS: Mapping[str, Any] = {"[": [{}], "{": {}}  # stands for what was not looked at
SKIPPED = 64 * KIB  # characters that are skipped at a time
NO_BRACKETS = re.compile(r"[^\[\]{}]+")
PLAIN_STRING = re.compile(r'"[^"\\]*"')
# One with escapes, up to its quote or the end of the text: what never fails is looked at once.
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:(")|\\?\Z)', re.DOTALL)
BRACKET = re.compile(STRING.pattern + r"|[\[\]{}]", re.DOTALL)
NESTING = {"[": 1, "{": 1, "]": -1, "}": -1}

Place = tuple[int, int, int]  # of a member in the text: where its name, its value begin, its end


class JsonObject(NamedTuple):
    """A JSON object as it was written: what its members are, and where they stand."""

    text: str
    values: dict[str, Any]
    places: dict[str, Place]


def decode_json(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None


def count_values(text: str | bytes) -> int:
    """At most so many values are in a piece of JSON; what is in its strings counts too."""
    marks: Any = ",[{" if isinstance(text, str) else b",[{"
    return sum([text.count(mark) for mark in marks])


def is_heavy(body: bytes) -> bool:
    """Whether to read this JSON would hold the event loop for too long."""
    return len(body) > MANY_VALUES and (len(body) > HEAVY_BODY or count_values(body) > MANY_VALUES)


def read_object(text: str) -> JsonObject:
    """The JSON object that `text` is, or BadRequest; what is beyond MANY_VALUES is skipped."""
    try:
        found = scan_object(text)
    except RecursionError:
        raise BadRequest(f"the body nests deeper than {DEPTH_LIMIT}") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if text.count("{") + text.count("[") > DEPTH_LIMIT:
        check_depth(found.values)
    return found


class Scanner:
    """Scans the members of a heavy object: MANY_VALUES in all, what holds more is skipped."""

    def __init__(self) -> None:
        self.left = MANY_VALUES

    def scan(self, text: str, at: int) -> tuple[Any, int]:
        """A value, or what stands for it, and where it ends."""
        if text[at : at + 1] not in STAND_INS:
            return scan_value(text, at)
        end, values = skip_value(text, at)
        if values > self.left:
            return STAND_INS[text[at]], end
        self.left -= values
        return scan_value(text, at)


def was_skipped(values: Mapping[str, Any]) -> bool:
    return any(value is one for value in values.values() for one in STAND_INS.values())


def skip_value(text: str, at: int) -> tuple[int, int]:
    """Where the list or object that begins here ends, and how many values it holds at most."""
    level = values = 0
    while at < len(text):  # by levels and strings alone, in pieces: threads take turns between them
        if text[at] == '"':
            at = scan_string(text, at + 1)[1]
            continue
        piece, stop = without_strings(text, at)
        steps = map(NESTING.__getitem__, NO_BRACKETS.sub("", piece))
        levels = list(accumulate(steps, initial=level))
        if max(levels) > DEPTH_LIMIT:
            raise BadRequest(f"the body nests deeper than {DEPTH_LIMIT}")
        values += count_values(piece)
        if 0 in levels[1:]:
            return find_bracket(text, at, levels.index(0, 1)) + 1, values
        level, at = levels[-1], stop
    raise ValueError("a list or an object is not closed")


def without_strings(text: str, at: int) -> tuple[str, int]:
    """The next piece of JSON without its strings, and where in the text it ends."""
    piece = text[at : at + SKIPPED]
    if "\\" not in piece:
        rest, quote, _ = PLAIN_STRING.sub("", piece).partition('"')
        return rest, at + (piece.rfind('"') if quote else len(piece))
    last = deque(STRING.finditer(piece), maxlen=1)
    if last and last[0][1] is None:  # it goes on behind this piece
        piece = piece[: last[0].start()]
    return STRING.sub("", piece), at + len(piece)


def find_bracket(text: str, at: int, number: int) -> int:
    """Where from here the bracket of this number is, counted from 1, strings left out."""
    for found in BRACKET.finditer(text, at):
        number -= found[0] in NESTING
        if not number:
            return found.start()
    raise ValueError("there are not so many")


def scan_object(text: str) -> JsonObject:
    """The members as the decoder's own scanners see them; ValueError if it is no object."""
    opening = OPENING.match(text)
    if not opening:
        raise ValueError("it is not an object")
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}
    heavy = len(text) > MANY_VALUES and count_values(text) > MANY_VALUES
    scan = Scanner().scan if heavy else scan_value
    at, following = opening.end(), opening[1]
    head = MEMBER_HEAD.match(text, at)
    while following != "}":
        if head:
            name, start, value_at = head[1], head.start(1) - 1, head.end()
        else:
            name, start, value_at = scan_name(text, at)
            if len(name) > NAME_LIMIT:
                raise BadRequest(f"a key of the body is longer than {NAME_LIMIT} characters")
        if name in values or len(values) == MEMBERS_LIMIT:
            why = "more than 1,000 keys" if name not in values else "the same key twice"
            raise BadRequest(f"the body has {why}")
        try:
            values[name], at = scan(text, value_at)
        except StopIteration:
            raise ValueError(f"a value is wanted at character {value_at}") from None
        places[name] = start, value_at, at
        head = NEXT_HEAD.match(text, at)
        if not head:  # this was the last, or the next one's name has escapes
            delimiter = DELIMITER.match(text, at)
            if not delimiter:
                raise ValueError(f"a comma or a brace is wanted at character {at}")
            at, following = delimiter.end(), delimiter[1]
    if not WHITE.fullmatch(text, at):
        raise ValueError(f"something follows it at character {at}")
    return JsonObject(text, values, places)


def scan_name(text: str, at: int) -> tuple[str, int, int]:
    """A member's name that has escapes, where it begins, and where its value does."""
    quote = QUOTE.match(text, at)
    if quote:
        name, end = scan_string(text, quote.end())
        colon = COLON.match(text, end)
        if colon:
            return name, quote.end() - 1, colon.end()
    raise ValueError(f"a name and a colon are wanted at character {at}")


def scan_parts(text: str, at: int) -> tuple[Any, int]:
    """A value as `scan_value` reads it, a part at a time, for threads take turns between them."""
    close = CLOSING.get(text[at : at + 1])
    if close is None or AT_ONCE.match(text, at):
        return scan_value(text, at)
    names: list[str] = []
    items: list[Any] = []
    at, following = WHITE.match(text, at + 1).end(), ","  # type: ignore[union-attr]
    while following == ",":
        if close == "}":
            name, _, at = scan_name(text, at)
            names.append(name)
        item, at = scan_parts(text, at)
        items.append(item)
        delimiter = PART_DELIMITER.match(text, at)
        if not delimiter or delimiter[1] not in (",", close):
            raise ValueError(f"a comma or {close} is wanted at character {at}")
        at, following = delimiter.end(), delimiter[1]
    return (items if close == "]" else dict(zip(names, items))), at


def render_parts(value: Any) -> Iterator[bytes]:
    """JSON as `render_json` makes it, a part at a time, for the same end."""
    first = value[0] if isinstance(value, list) and value else None
    short = isinstance(value, list) and len(value) <= PART and not isinstance(first, (dict, list))
    if short or not isinstance(value, (dict, list)):
        yield render_json(value)
        return
    named, comma = isinstance(value, dict), b""
    yield b"{" if named else b"["
    for one in value:
        yield comma + render_json(one) + b":" if named else comma
        yield from render_parts(value[one] if named else one)
        comma = b","
    yield b"}" if named else b"]"


def check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise BadRequest(f"the body nests deeper than {DEPTH_LIMIT}")
        inner: list[Any] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one
        level = [one for one in inner if isinstance(one, (dict, list))]


class Edits(NamedTuple):
    """Where a JSON object may be changed, in characters; kept small, for as long as it waits."""

    first: int  # where a new member goes
    alone: bool  # then no other follows it
    cuts: tuple[tuple[int, int], ...]
    spots: tuple[tuple[str, int, int], ...]  # values that may be replaced

    def apply(self, text: str, put: Mapping[str, str]) -> str:
        """The object with the cuts made and these members put in, as JSON; all else as it was."""
        changes = [(start, end, "") for start, end in self.cuts]
        changes += [(start, end, put[name]) for name, start, end in self.spots if name in put]
        known = [name for name, _, _ in self.spots]
        fresh = [f"{json.dumps(name)}:{put[name]}" for name in put if name not in known]
        if fresh:
            changes.append((self.first, self.first, ",".join(fresh) + "," * (not self.alone)))
        pieces, at = [], 0
        for start, end, piece in sorted(changes):
            pieces += [text[at:start], piece]
            at = end
        return "".join([*pieces, text[at:]])


def find_edits(found: JsonObject, names: Iterable[str], cut: Names = ()) -> Edits:
    """Where members of these names are, or can be put, once others are cut out."""
    places = found.places
    spots = tuple([(name, *places[name][1:]) for name in names if name in places])
    if not places:
        return Edits(found.text.index("{") + 1, True, (), ())
    first = next(iter(places.values()))[0]
    if places.keys().isdisjoint(cut):
        return Edits(first, False, (), spots)
    order = list(places.items())
    kept = [place for place, (name, _) in enumerate(order) if name not in cut]
    last = kept[-1] if kept else -1
    cuts = [  # each with the comma behind it, those at the end with the comma before them
        (start, order[place + 1][1][0])
        for place, (name, (start, _, _)) in enumerate(order[: max(0, last)])
        if name in cut
    ]
    if last < len(order) - 1:
        cuts.append((order[last][1][2] if kept else first, order[-1][1][2]))
    return Edits(first, not kept, tuple(cuts), spots)


def rewrite(found: JsonObject, put: Mapping[str, str], cut: Names = ()) -> str:
    """The object with these members put in, as JSON, new ones first, and these cut out."""
    return find_edits(found, put, cut).apply(found.text, put)


def with_options(text: str, put: Mapping[str, str], cut: Names = ()) -> str:
    """Ollama's `options` with these members put in, as JSON, and these cut out."""
    there = text.startswith("{")  # else there are none, or null
    return rewrite(read_object(text if there else "{}"), put, cut) if there or put else text


def with_num_ctx(text: str, tokens: int) -> str:
    """Ollama's `options` with this context, with none for 0."""
    put = {"num_ctx": str(tokens)} if tokens else {}
    return with_options(text, put, () if tokens else ("num_ctx",))


class Question(NamedTuple):
    """What a client asks, as far as llmq needs to know."""

    model: str  # as asked for; empty: none was named
    stream: bool
    priority: Priority | None  # None: it asks for none
    body: bytes  # as it came
    edits: Edits  # of its model and options; cuts out llmq's own fields
    context: int = 0  # tokens of context asked for; 0: none
    options: bool = False  # its route can carry a context
    foreign: bool = False  # what it says of a context is cut
    keep_alive: bool = False  # it says how long the model is to stay loaded
    done_reason: str = ""  # "load" or "unload": all that `ollama run` and `ollama stop` ask for
    skipped: bool = False  # some of it was not looked at

    @property
    def long(self) -> bool:
        """Whether to write it in other words would hold the event loop for too long."""
        return len(self.body) > HEAVY_BODY

    def body_for(self, model: str, context: int = 0) -> bytes:
        """The body, naming the model as the backend does, with the context that is shared."""
        put = {"model": json.dumps(model)} if model != self.model else {}
        spans = {name: (start, end) for name, start, end in self.edits.spots}
        changes = self.options and (context or (self.foreign and "options" in spans))
        if not put and not self.edits.cuts and not changes:
            return self.body
        text = self.body.decode()
        if changes:
            put["options"] = with_num_ctx(text[slice(*spans.get("options", (0, 0)))], context)
        return self.edits.apply(text, put).encode()


NO_EDITS = Edits(0, True, (), ())
NO_QUESTION = Question("", stream=False, priority=None, body=b"", edits=NO_EDITS)


def check_case(values: Mapping[str, Any], names: Set[str]) -> None:
    """Ollama reads names in any case, so that one could say two things."""
    for name in values:
        if name not in names and name.casefold() in names:
            raise BadRequest(f"write {name.casefold()} in lower case", param=name)


TYPED = frozenset(("model", "stream", "options"))  # members that llmq itself goes by


def check_common(values: Mapping[str, Any]) -> None:
    """What holds for the requests of all dialects."""
    check_case(values, TYPED)
    model, stream = values.get("model"), values.get("stream")
    if model is not None and not isinstance(model, str):
        raise BadRequest("model is a text", param="model")
    if model and len(model) > MODEL_LENGTH:
        raise BadRequest(f"a model's name has at most {MODEL_LENGTH} characters", param="model")
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("stream is true or false", param="stream")


def check_messages(values: Mapping[str, Any]) -> None:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages is a list of at least one message", param="messages")
    if set(map(type, messages)) != {dict}:
        raise BadRequest("each of messages is an object", param="messages")


def parse_context(value: Any, param: str) -> int:
    """Tokens of context; 0 where none is asked for, as by 0 or less in Ollama."""
    tokens = 0 if value is None else whole_number(value)
    if tokens is None:
        raise BadRequest(f"{param} is a whole number", param=param)
    return max(0, tokens)


# ==== 19. Dialects ================================================================================
# What the dialects have in common.  An answer is watched, not parsed: its end, an error and the
# usage are looked for, the rest passes.

WATCHED_LINE = 64 * KIB  # a longer line of an event stream is passed on without a look
PARSED_LINE = 8 * MIB  # the same where each line must be understood
PARSED_ANSWER = 1 * MIB  # a longer whole answer is checked at its ends only
MOST_TOKENS = 2**53  # a larger count is a runner's mistake
USAGE = (  # where an answer may tell its tokens: a member, and the names for answer and prompt
    ("usage", "completion_tokens", "prompt_tokens"),
    ("usage", "output_tokens", "input_tokens"),
    ("timings", "predicted_n", "prompt_n"),  # llama.cpp's, where there is no usage
    ("", "eval_count", "prompt_eval_count"),
)
RATES = (  # where it may tell what they took: a member, the count, the time and its unit
    ("timings", "predicted_n", "predicted_ms", 1e3),
    ("", "eval_count", "eval_duration", 1e9),
)
UNKNOWN_ROUTE = re.compile(  # what runners answer to a path that they do not have
    r"(404 )?((page|file|path|route|url|endpoint) )?not found\.?|unexpected endpoint.*"
    r"|cannot post .*|(no such|unknown|unsupported|invalid) (page|path|route|url|endpoint).*|",
    re.IGNORECASE | re.DOTALL,
)


class Dialect:
    stream_type = stream_mark = "text/event-stream"  # what llmq writes; what a runner's must hold
    line_limit = end_limit = WATCHED_LINE  # of a stream, and of what its end may be
    line_events = False  # each line is an event; else an empty one ends it
    line_break, error_event = b"\n\n", b"event: error\ndata: %b\n\n"
    error_types: Mapping[int, str] = {}  # by status, where they are special
    typed_errors = False  # an error's body has "type": "error"
    sign_of_life: bytes  # which clients skip; it may tell the position and eta
    piece_mark = b"data:"  # once in each piece of an answer
    end_hint: bytes  # in each end of a good stream
    end_line: re.Pattern[bytes]  # where it begins
    error_object: Callable[[LlmqError, str], dict[str, Any]]  # with the id of the request

    def render_error(self, error: LlmqError, request_id: str = "") -> bytes:
        """The body of an error answer: the runner's own where it wrote one in this dialect."""
        if isinstance(error, BackendAnswer):
            # A sign-in that a runner asks for has members of its own, whoever asks.
            refused = error.status in (401, 403) and isinstance(error.document, dict)
            if refused or self.is_error(error.document):
                return error.body
        return render_json(self.error_object(error, request_id))

    def is_error(self, document: Any) -> bool:
        """Whether clients of the dialect take this parsed body for an error."""
        typed, words = look_up(document, "type") == "error", look_up(document, "error", "message")
        return typed is self.typed_errors and isinstance(words, str) and words != ""

    def error_type(self, error: LlmqError) -> str:
        usual = "api_error" if error.status >= 500 else "invalid_request_error"
        return self.error_types.get(error.status, usual)

    def render_stream_error(self, error: LlmqError, request_id: str, inside: bool) -> bytes:
        """An error after the head of a stream (`inside` a line of it): SDKs raise on it."""
        event = self.error_event % render_json(self.stream_error(error, request_id))
        return self.line_break + event if inside else event

    def stream_error(self, error: LlmqError, request_id: str) -> dict[str, Any]:
        return self.error_object(error, request_id)

    def heartbeat(self, position: int, eta: float | None) -> bytes:
        told = b"" if eta is None else b" eta=%d" % round(eta)
        return self.sign_of_life % {b"position": position, b"eta": told}

    def find_end(self, seen: bytes) -> int:
        """Where the end of a good stream begins in whole and half lines; -1: not yet."""
        match = self.end_line.search(seen) if self.end_hint in seen else None
        return match.start() if match else -1

    def is_stream(self, content_type: str) -> bool:
        return self.stream_mark in content_type

    def find_cut(self, seen: bytes) -> int:
        """Where the last whole event ends."""
        if seen.endswith(b"\n\n"):
            return len(seen)
        plain, crlf = seen.rfind(b"\n\n"), seen.rfind(b"\r\n\r\n")
        return plain + 2 if plain > crlf else crlf + 4 if crlf >= 0 else 0

    def read_line(self, line: bytes) -> bytes:
        """The JSON that a line of a stream carries, or nothing."""
        name, _, value = line.partition(b":")
        if name == b"error":  # llama.cpp has written it so
            return b'{"error":' + value + b"}"
        return value if name == b"data" else b""


def look_up(document: Any, *path: str) -> Any:
    """What stands at this path in a parsed document, None where there is no such member."""
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def error_of(document: Any) -> Any:
    """What a parsed event or answer says went wrong, or None."""
    kind = look_up(document, "type")
    if kind == "response.failed":
        return look_up(document, "response", "error") or document
    return look_up(document, "error") or (document if kind == "error" else None)


def error_text(error: Any) -> str:
    """The words of an error, in whichever dialect; empty where there are none."""
    words = look_up(error, "message") if isinstance(error, dict) else error
    return words if isinstance(words, str) else ""


def parse_json(body: bytes) -> Any:
    """A parsed body, None where it is not JSON."""
    try:
        return ANY_JSON.decode(body.decode()) if body else None
    except (ValueError, RecursionError):
        return None


def parse_parts(body: bytes) -> Any:
    """The same of a long one, a part at a time."""
    try:
        text = body.decode().strip(" \t\n\r")
        value, end = scan_parts(text, 0)
    except (ValueError, StopIteration, RecursionError):
        return None
    return value if end == len(text) else None


def read_refusal(head: ResponseHead, body: bytes, key: Key = "", hidden: Names = ()) -> LlmqError:
    """What a client is told of a backend's answer that is not 200, but none of the secrets."""
    for secret in hidden:
        body = body.replace(secret.encode(), HIDDEN.encode())
    status, document, error = head.status, parse_json(body), None
    if isinstance(document, dict):  # vLLM has written them without a wrapper, and has `detail`
        error = document.get("error") or document.get("detail") or document
    text = error_text(error)
    message = (text if isinstance(error, dict) else text[:1000]) or f"the backend answered {status}"
    if status < 400:
        return BackendError(f"the backend answered {status}; redirects are not followed")
    if key and status in (401, 403):  # llmq's own mistake; without one the runner's own word
        return BackendError(f"the backend refuses llmq's key: {message}")
    if status == 503 and LOADING.search(message):
        return BackendLoading(message)
    answer = BackendAnswer(status, message, body, document, head.headers.get("retry-after"))
    words = text or body.decode("utf-8", "replace").strip('" \r\n')  # JSON without any: all of it
    if status in (405, 501) or (status == 404 and UNKNOWN_ROUTE.fullmatch(words)):
        return RouteUnsupported(answer)
    return answer


def check_route_known(body: bytes) -> None:
    """RouteUnsupported when an answer of status 200 is one to an unknown path (LM Studio's)."""
    if len(body) < KIB and b"error" in body:
        document = parse_json(body)
        words = error_text(error_of(document))
        if words and UNKNOWN_ROUTE.fullmatch(words):
            raise RouteUnsupported(BackendAnswer(404, words, body, document, None))


def read_usage(document: Any) -> tuple[int | None, int | None]:
    """The tokens of an answer and of its prompt, as it tells."""
    tokens = tokens_in = None
    if not isinstance(document, dict):
        return None, None
    for name in ("response", "message"):  # of OpenAI's responses, of Anthropic's streams
        inner = document.get(name)
        document = inner if isinstance(inner, dict) and "usage" in inner else document
    for member, answer, prompt in USAGE:
        place = document.get(member) if member else document
        if isinstance(place, dict):
            tokens = counted(place.get(answer)) if tokens is None else tokens
            tokens_in = counted(place.get(prompt)) if tokens_in is None else tokens_in
            if tokens is not None and tokens_in is not None:
                break
    return tokens, tokens_in


def counted(value: Any) -> int | None:
    """What a runner says that it has counted; None where that cannot be."""
    tokens = whole_number(value)
    return tokens if tokens is not None and 0 <= tokens <= MOST_TOKENS else None


def read_rate(document: Any) -> float | None:
    """Tokens per second of an answer, where its runner tells what it took."""
    for member, count_name, spent, per_second in RATES:
        place = look_up(document, member) if member else document
        if isinstance(place, dict) and count_name in place:
            tokens, took = measured(place[count_name]), measured(place.get(spent))
            if tokens and took:
                return measured(tokens / took * per_second)
    return None


def measured(value: Any) -> float | None:
    """What a runner says that it has counted or timed; None where that cannot be."""
    return value if type(value) in (int, float) and 0 < value < MOST_TOKENS else None


def read_whole(body: bytes) -> dict[str, Any] | None:
    """A whole answer, None where it is too large to parse; BackendError when it says it failed."""
    large = len(body) > PARSED_ANSWER  # embeddings by the megabyte: look at the ends only
    if large and body.lstrip()[:1] == b"{" and body.rstrip()[-1:] == b"}":
        return None
    document = None if large else parse_json(body)
    if document and isinstance(document, list):  # some rerankers answer with a bare list
        return None
    if not isinstance(document, dict):
        raise BackendError("the backend's answer is not a JSON object")
    if (error := error_of(document)) is not None:
        raise BackendError(error_text(error) or "the backend's answer is an error")
    return document


MODEL_NAMED = re.compile(rb'(?m)^([^\n]*?"model" ?: ?)("[^"\\\n]*(?:\\.[^"\\\n]*){0,999}")')


def model_echo(told: str, asked: str) -> Callable[[bytes], bytes]:
    """Puts the model that was asked for in place of the backend's name, once in a line."""
    # Texts have their quotes escaped; a model in a tool's arguments comes behind the first.
    name, shown = json.dumps(told, ensure_ascii=False).encode(), json.dumps(asked).encode()
    return functools.partial(
        MODEL_NAMED.sub, lambda found: found[1] + (shown if found[2] == name else found[2])
    )


def echo_whole(body: bytes, told: str, asked: str) -> bytes:
    """The same for a whole answer, which may have a tool's arguments before its model."""
    with contextlib.suppress(LlmqError, ValueError, RecursionError):  # as the runner wrote it
        found = scan_object(body.decode())
        if found.values.get("model") == told:
            return rewrite(found, {"model": json.dumps(asked)}).encode()
    return body


class StreamWatch:
    """Looks through a stream that passes by, byte for byte, and shows the client whole events.

    Its end and what follows it is kept back until the body has ended as HTTP says it must: a
    runner that is interrupted may send it all the same (llama-cpp-python does).
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.pieces = 0
        self.tokens: int | None = None
        self.tokens_in: int | None = None  # of the prompt
        self.rate: float | None = None  # tokens per second, as the runner tells
        self.ended = bytearray()  # the end and the rest, kept back
        self.failure: BackendError | None = None  # what an error event said
        self.inside = False  # what was shown ends inside an event, too long to be held
        self._shown = b""  # its last bytes then, with which a break may begin
        self._held = bytearray()  # the incomplete last event

    def feed(self, data: bytes) -> bytes:
        """The bytes that may be shown to the client; `failure` is set when more tell of one."""
        if self.failure is not None:
            return b""
        if self.ended:
            self.ended += data
            if len(self.ended) > self.dialect.end_limit:
                raise BackendError("the backend sends on behind the end of its answer")
            return b""
        if b"\n" not in data and not self.inside:  # no event ends here, so none is looked for:
            self._held += data  # a long line in many pieces is searched once
            return self._look() if len(self._held) > self.dialect.line_limit else b""
        return self._look(data)

    def _look(self, data: bytes = b"") -> bytes:
        """The same of all that is held, and of what has come behind it."""
        hidden, seen = len(self._shown), self._shown + data
        if self._held:  # then nothing of its event has been shown
            seen, self._held = bytes(self._held) + data, bytearray()
        end = self.dialect.find_end(seen)
        if end >= 0:
            self.ended += seen[end:]
        else:
            end, cut = len(seen), self.dialect.find_cut(seen)
            self.inside = end - cut > self.dialect.line_limit or (self.inside and not cut)
            self._shown = b"?" + seen[-3:] if self.inside else b""
            if cut < end and not self.inside:
                end, self._held = cut, bytearray(seen[cut:])
        return seen[hidden : self._inspect(seen[:end])]

    def _inspect(self, lines: bytes) -> int:
        """Note pieces and usage; the end of what is good: where an error begins, else all."""
        self.pieces += lines.count(self.dialect.piece_mark)
        # No loop over these five, it would double the cost: most lines have none of them.
        telling = b"error" in lines or b'"usage"' in lines or b'"timings"' in lines
        if not (telling or b'"eval_count"' in lines or b"response.failed" in lines):
            return len(lines)
        at = event = 0
        for line in lines.splitlines(keepends=True):
            document = parse_json(self.dialect.read_line(line))
            if (error := error_of(document)) is not None:
                words = error_text(error) or "the backend's answer broke off with an error"
                self.failure = BackendError(words)
                return event
            tokens, tokens_in = read_usage(document)
            self.tokens, self.tokens_in = tokens or self.tokens, tokens_in or self.tokens_in
            self.rate = read_rate(document) or self.rate
            at += len(line)
            event = at if self.dialect.line_events or not line.strip() else event
        return at

    def finish(self) -> bytes:
        """What was kept back, now that the body has ended; BackendError when it tells of one."""
        # Nothing need follow the last line, not even a break.
        shown = b"" if self.failure or self.ended else self._look()
        if self.failure is None:
            self._inspect(bytes(self.ended or self._held))
        if self.failure is not None:
            raise self.failure
        if not self.ended:
            raise BackendError("the backend's answer ended before it was complete")
        return shown + self.ended


class BlindWatch(StreamWatch):
    """Of an answer of which nothing is known but that it has come when its body has."""

    def feed(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""


def chosen(facts: Facts) -> Facts:
    """The members that are not null."""
    return {name: value for name, value in facts.items() if value is not None}


class Shape(NamedTuple):
    """What a member must be: in words, and as a test of what is not null."""

    words: str
    fits: Callable[[Any], bool]
    inside: Mapping[str, Shape] = {}  # the members of the object, or of each in the list

    def of(self, **inside: Shape) -> Shape:
        return self._replace(inside=inside)


def one_of(words: str, *types: type) -> Shape:
    return Shape(words, lambda value: type(value) in types)


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def shapes(*rows: tuple[Any, ...]) -> Mapping[str, Shape]:
    return {name: Shape(*shape) for *shape, names in rows for name in names.split()}


WHOLE = Shape("a whole number", lambda value: whole_number(value) is not None)
NUMBER, SWITCH = one_of("a number", int, float), one_of("true or false", bool)
TEXT, LIST, OBJECT = one_of("a text", str), one_of("a list", list), one_of("an object", dict)
WRITTEN = one_of("an object, or its text", dict, str)
NAMED = Shape("a list of texts", are_texts)
MEMBERS = shapes(
    (*WHOLE, "max_tokens max_completion_tokens seed top_logprobs dimensions num_predict num_keep"),
    (*WHOLE, "top_k repeat_last_n"),
    (*NUMBER, "temperature top_p frequency_penalty presence_penalty"),
    (*NUMBER, "min_p typical_p repeat_penalty"),
    (*SWITCH, "logprobs"),
    (*one_of("true, false or an effort", bool, str), "think"),
    (*one_of("a text or a number", str, int, float), "keep_alive"),
    ("a text or a list of texts", lambda told: type(told) is str or are_texts(told), "stop input"),
    ('"json" or an object', lambda form: form in ("", "json") or type(form) is dict, "format"),
    ("float or base64", lambda form: str(form).lower() in ("float", "base64"), "encoding_format"),
    (*TEXT, "reasoning_effort prompt suffix"),
    (*LIST, "messages"),
    (*LIST.of(id=TEXT, type=TEXT, function=OBJECT.of(name=TEXT, parameters=OBJECT)), "tools"),
    (*OBJECT, "options"),
    (*OBJECT.of(effort=TEXT), "reasoning"),
    (*OBJECT.of(include_usage=SWITCH), "stream_options"),
    (*OBJECT.of(type=TEXT, json_schema=OBJECT.of(schema=OBJECT)), "response_format"),
)
MESSAGE_MEMBERS = shapes(
    (*TEXT, "role content name tool_call_id tool_name reasoning thinking"),
    (*LIST.of(id=TEXT, type=TEXT, function=OBJECT.of(name=TEXT, arguments=WRITTEN)), "tool_calls"),
    (*NAMED, "images"),
)


def taken(facts: Facts, members: Mapping[str, Shape], *names: str, at: str = "") -> Facts:
    """These members, or all, without the nulls; BadRequest names a wrong one, and where: `at`."""
    found = {}
    for name in names or members:
        value = facts.get(name)
        if value is not None:
            words, fits, inside = members[name]
            if not fits(value):
                raise BadRequest(f"{at}{name} is {words}", param=at + name)
            if inside:
                check_inside(value, inside, at + name)
            found[name] = whole_number(value) if words is WHOLE.words else value
    return found


def check_inside(value: Any, members: Mapping[str, Shape], at: str) -> None:
    """The same of what an object has in it, or each object of a list."""
    listed = isinstance(value, list)
    for number, each in enumerate(value if listed else [value]):
        place = f"{at}[{number}]" if listed else at
        if not isinstance(each, dict):
            raise BadRequest(f"{place} is an object", param=place)
        taken(each, members, at=place + ".")


MILLISECONDS = one_of("a number of milliseconds", int, float)
ROUTER_MEMBERS = shapes(
    ("one of " + ", ".join(ROUTER_MODES), ROUTER_MODES.__contains__, "mode"),
    ("one of " + ", ".join((AUTO, *TASKS)), (AUTO, *TASKS).__contains__, "taskType"),
    (*SWITCH, "allowAsync requireGpuOnly"),
    (*NAMED, "preferredModels forbiddenModels"),
    (*MILLISECONDS, "maxQueueTimeMs maxExecutionTimeMs"),
)


def read_wish(values: Mapping[str, Any]) -> Wish:
    """What the member `router` asks for, or BadRequest; what else is in it means nothing."""
    router = values.get("router")
    if router is None:
        return NO_WISH
    if not isinstance(router, dict):
        raise BadRequest("router is an object", param="router")
    told = taken(router, ROUTER_MEMBERS, at="router.")
    task, longest, most = map(told.get, ("taskType", "maxQueueTimeMs", "maxExecutionTimeMs"))
    try:
        priority = parse_priority(router.get("priority"))
    except BadRequest as error:
        raise BadRequest(f"router.{error.message}", param="router.priority") from None
    return Wish(
        told=True,
        mode=told.get("mode", AUTO),
        allow_async=told.get("allowAsync", False),
        task="" if task in (None, AUTO) else task,
        priority=priority,
        preferred=tuple(told.get("preferredModels", ())),
        forbidden=tuple(told.get("forbiddenModels", ())),
        max_queue=None if longest is None else min(max(0, longest), MOST_TOKENS) / 1000,
        max_run=min(max(0, most or 0), MOST_TOKENS) / 1000,
        gpu_only=told.get("requireGpuOnly"),
    )


class Endpoint(NamedTuple):
    """An inference route: who speaks it, and what a body sent there must hold."""

    routes: Names  # its own, then those that can stand in for it, by translation
    dialect: Dialect
    check: Callable[[Mapping[str, Any]], None] = lambda _: None  # the backend knows best
    streams: bool | None = False  # when a body does not say; None: never
    options: bool = False  # it can carry a context in its `options`
    content: str = ""  # the member without which it only loads or unloads a model
    limits: Names = ()  # what bounds an answer: members, of `options` if it has them

    @property
    def path(self) -> str:
        return self.routes[0]


UNLOADS = (0, "0", "0s", "0m", "0h")  # as `keep_alive`
FORM_PART = rb"--%b\r\n((?:[^\r\n]{1,999}\r\n){1,9})\r\n([^\r\n]{0,999})(?=\r\n--%b)"
FORM_BOUNDARY = 70  # characters, RFC 2046 s.5.1.1; Python keeps hundreds of patterns with them
FORM_END = 64 * KIB  # of a form that is looked at, and as much at its beginning
FORM_NAME = re.compile(rb';[ \t]*name="?([^";\r\n]*)')


def read_question(
    body: bytes, endpoint: Endpoint, priority_header: str | None = None, *, foreign: bool = False
) -> tuple[Question, Mapping[str, Any]]:
    """A request and its members, or BadRequest; what a `foreign` page says of a context is cut."""
    found = read_object(decode_json(body))
    text, values, places = found
    check_common(values)
    empty = endpoint.content != "" and not values.get(endpoint.content)
    if not empty:
        endpoint.check(values)
    options = taken(values, MEMBERS, "options").get("options") if endpoint.options else None
    context = parse_context(values.get("numCtx"), "numCtx")
    if options is not None:
        if options is STAND_INS["{"]:
            raise BadRequest("options holds too many values", param="options")
        check_case(options, {"num_ctx"})
        read_object(text[slice(*places["options"][1:])])  # no member twice: it may be rewritten
        context = max(context, parse_context(options.get("num_ctx"), "options.num_ctx"))
    model, stream = values.get("model") or "", values.get("stream")
    order = ""
    if empty:
        order = "unload" if values.get("keep_alive") in UNLOADS else "load"
    question = Question(
        model=model if model.strip() else "",
        stream=endpoint.streams is not None and (endpoint.streams if stream is None else stream),
        priority=asked_priority(values, priority_header),
        body=body,
        edits=find_edits(found, REPLACED, EXTENSIONS),
        context=0 if foreign else context,
        options=endpoint.options,
        foreign=foreign,
        keep_alive="keep_alive" in values,
        done_reason=order,
        skipped=len(body) > MANY_VALUES and was_skipped(values),
    )
    return question, values


class FormQuestion(Question):
    """What comes as a form, files and all: it is passed on as it is."""

    def body_for(self, model: str, context: int = 0) -> bytes:  # noqa: ARG002 - as of the others
        return self.body


def read_form(body: bytes, content_type: str, priority_header: str | None) -> FormQuestion:
    """A request in a form (RFC 7578): its short members, which stand before or behind the file."""
    media, _, told = content_type.partition("boundary=")
    told = told.partition(";")[0].strip().strip('"')
    if not media.lower().startswith("multipart/form-data") or not 0 < len(told) <= FORM_BOUNDARY:
        raise BadRequest("send a form: Content-Type: multipart/form-data with its boundary")
    boundary = re.escape(told.encode("latin-1"))
    ends = body if len(body) <= 2 * FORM_END else body[:FORM_END] + body[-FORM_END:]
    values = {
        name: value.decode("utf-8", "replace").strip()
        for head, value in re.findall(FORM_PART % (boundary, boundary), ends)
        for name in FORM_NAME.findall(head)
    }
    model, stream = values.get(b"model", ""), values.get(b"stream", "").lower() == "true"
    check_common({"model": model})
    return FormQuestion(model, stream, asked_priority({}, priority_header), body, NO_EDITS)


# ==== 20. OpenAI ==================================================================================
# Chat, completions, embeddings and reranking; the newer responses, whose streams have named events.


class OpenAi(Dialect):
    """Event streams that `data: [DONE]` ends; comments are signs of life."""

    error_event = b"data: %b\n\n"
    error_types: Mapping[int, str] = {404: "not_found_error", 429: "rate_limit_error"}
    # One line, without data: Go's client bears 10,000 of them.
    sign_of_life = b": position=%(position)d%(eta)b\n"
    end_hint, end_line = b"[DONE]", re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)

    def error_object(self, error: LlmqError, _request_id: str = "") -> dict[str, Any]:
        facts = {"message": error.message, "type": self.error_type(error)}
        return {"error": {**facts, "param": error.param, "code": error.code}}


class OpenAiResponses(OpenAi):
    """Event streams whose last event tells how the response ended, and repeats it all."""

    error_event = Dialect.error_event
    end_limit, end_hint = PARSED_LINE, b"response."
    end_line = re.compile(rb"^event: ?response\.(?:completed|incomplete)\r?\ndata:", re.MULTILINE)

    def stream_error(self, error: LlmqError, request_id: str) -> dict[str, Any]:
        facts = self.error_object(error, request_id)["error"]
        return {**facts, "type": "error", "sequence_number": 0, "error": facts}


def check_either(name: str, other: str, values: Mapping[str, Any]) -> None:
    """It has a text or a list, or else what vLLM takes in its place."""
    if not isinstance(values.get(name), (str, list)) and not values.get(other):
        raise BadRequest(f"{name} is a text or a list", param=name)


OPENAI = OpenAi()
LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")  # which llama.cpp has, too
check_prompt = functools.partial(check_either, "prompt", "prompt_embeds")
check_input = functools.partial(check_either, "input", "messages")
OPENAI_ENDPOINTS = (
    Endpoint((CHAT, OLLAMA_CHAT), OPENAI, check_messages, limits=LIMITS),
    Endpoint((COMPLETIONS, OLLAMA_GENERATE), OPENAI, check_prompt, limits=LIMITS),
    Endpoint((EMBEDDINGS, OLLAMA_EMBED), OPENAI, check_input, streams=None),
    Endpoint((RESPONSES,), OpenAiResponses(), limits=("max_output_tokens",)),
    Endpoint((RERANK,), OPENAI),
    Endpoint((TRANSCRIPTIONS,), OPENAI),  # which comes as a form
)


# ==== 21. Ollama ==================================================================================
# Streams of JSON lines, on unless the request says otherwise; `"done":true` in the last.


class Ollama(Dialect):
    """Errors are a text; white space before a line is a sign of life."""

    stream_type, stream_mark = "application/x-ndjson", "json"  # runners name it variously
    line_limit = end_limit = PARSED_LINE
    line_events = True
    line_break, error_event = b"\n", b"%b\n"
    sign_of_life, piece_mark = b" ", b"\n"
    end_line = re.compile(rb'"done" ?: ?true')  # in it, or in the arguments of a tool

    def error_object(self, error: LlmqError, _request_id: str = "") -> dict[str, Any]:
        return {"error": error.message}

    def is_error(self, document: Any) -> bool:
        return isinstance(look_up(document, "error"), str)

    def find_end(self, seen: bytes) -> int:
        if (mark := self.end_line.search(seen)) is None:
            return -1
        at = seen.rfind(b"\n", 0, mark.start()) + 1
        for line in seen[at:].splitlines(keepends=True):
            whole = line.rstrip().endswith(b"}") and self.end_line.search(line)
            if whole and look_up(parse_json(line), "done") is True:
                return at
            at += len(line)
        return -1

    def find_cut(self, seen: bytes) -> int:
        return seen.rfind(b"\n") + 1

    def read_line(self, line: bytes) -> bytes:
        return line


OLLAMA = Ollama()
native = functools.partial(Endpoint, dialect=OLLAMA, options=True)
writes = functools.partial(native, streams=True, limits=("num_predict",))
OLLAMA_ENDPOINTS = (
    writes((OLLAMA_CHAT, CHAT), check=check_messages, content="messages"),
    writes((OLLAMA_GENERATE, COMPLETIONS), content="prompt"),
    native((OLLAMA_EMBED, EMBEDDINGS), streams=None),
    native((OLLAMA_EMBEDDINGS, EMBEDDINGS), streams=None),
)


# ==== 22. Anthropic ===============================================================================
# Messages, as Claude's programs speak them.


class Anthropic(Dialect):
    """Named events that `message_stop` ends; `ping` may come anywhere."""

    error_types: Mapping[int, str] = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
    typed_errors = True
    sign_of_life = b'event: ping\ndata: {"type":"ping"}\n\n'
    end_hint = b"message_stop"
    end_line = re.compile(rb"^event: ?message_stop\r?\ndata:", re.MULTILINE)

    def error_object(self, error: LlmqError, request_id: str = "") -> dict[str, Any]:
        facts = {"type": self.error_type(error), "message": error.message}
        return {"type": "error", "error": facts, "request_id": request_id or None}


PICTURES = ("source", "image_url", "images", "input_audio")  # the members that have them


def count_bytes(value: Any) -> int:
    """UTF-8 bytes of all texts in a request, without pictures."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if name not in PICTURES]
    return sum(map(count_bytes, value)) if isinstance(value, list) else 0


def estimate_tokens(values: Mapping[str, Any]) -> int:
    """What a prompt costs, where no backend can count it."""
    texts = [values.get(name) for name in ("system", "messages", "tools", "prompt", "suffix")]
    return max(1, count_bytes(texts) // 4)  # a token of English prose, roughly


ANTHROPIC = Anthropic()
MESSAGES_ENDPOINT = Endpoint((MESSAGES,), ANTHROPIC, check_messages, limits=("max_tokens",))
COUNT_ENDPOINT = Endpoint((COUNT_TOKENS,), ANTHROPIC, check_messages)  # which never waits
ENDPOINTS = {row.path: row for row in (*OPENAI_ENDPOINTS, *OLLAMA_ENDPOINTS, MESSAGES_ENDPOINT)}
SHORT_PATHS = {  # other paths that clients take to the same
    **{path[len("/v1") :]: path for path in ENDPOINTS if path.startswith("/v1/")},
    "/v2/rerank": RERANK,  # Cohere's
}


def endpoint_of(path: str) -> Endpoint | None:
    return ENDPOINTS.get(SHORT_PATHS.get(path, path))


def dialect_of(path: str, headers: Headers) -> Dialect:
    """In which dialect whoever asks for this path is answered."""
    endpoint = endpoint_of(path)
    if endpoint is not None:
        return endpoint.dialect
    if path.startswith("/api/"):
        return OLLAMA
    return ANTHROPIC if path.startswith(MESSAGES) or "anthropic-version" in headers else OPENAI


# ==== 23. Translation =============================================================================
# Between OpenAI and Ollama, where a backend lacks the dialect or a shared context needs the other
# one.  The result equals, field by field, what Ollama's own /v1 gives (its `openai.go`), ids and
# times aside; what that drops is dropped.  A request that would lose its meaning is refused.

IMAGE_URL = re.compile(r"data:(?:image/(?:jpeg|jpg|png|webp|gif))?;base64,(.*)", re.DOTALL)
IMAGE_TYPES = {"/9j/": "jpeg", "iVBOR": "png", "UklGR": "webp", "R0lGOD": "gif"}  # base64's start
EFFORTS = {"none": False, "minimal": "low", "xhigh": "max", "ultra": "max"}
# OpenAI's and Ollama's names alike.
SAMPLING = ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")
# What Go's encoder escapes; Ollama's /v1 shows it in the arguments of a tool call.
GO_ESCAPES = str.maketrans({each: f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"})
# What a translator raises where a document is not what it must be.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)


def rfc3339(seconds: float) -> str:
    """A time in UTC, as Ollama writes it."""
    return time.strftime(f"%Y-%m-%dT%H:%M:%S.{int(seconds % 1 * 1e6):06}Z", time.gmtime(seconds))


class Translator:
    """Asks one route in place of another and translates the answer; one for each attempt."""

    routes: tuple[str, str]  # asked for, and asked in its place
    source: Dialect = OPENAI  # of the backend's answer
    request: Callable[[], Facts]  # the request to send; what is None is left out
    whole: Callable[[Facts], Facts]  # a whole answer
    piece: Callable[[Facts], bytes]  # one event of a stream
    end: Callable[[], bytes]  # what follows the last event, once the stream has ended well
    runner: Kind = KINDS["openai"]  # what is asked

    def __init__(self, question: Facts, model: str, context: int, now: Callable[[], float]) -> None:
        self.question = question
        self.model = model  # as the backend calls it
        self.told = look_up(question, "model") or model  # as the client does
        self.context = context  # tokens, 0: the backend's own
        self.now = now  # the wall clock
        self.began = now()
        self.id = f"{int(self.began * 1e6):x}"
        self.wants_usage = look_up(question, "stream_options", "include_usage") is True
        self.calls: dict[int, Facts] = {}  # of tools, in the answer so far
        self.gathered = 0  # characters of their arguments
        self.places: dict[Any, int] = {}  # of the calls in it, by the index that a runner gives
        self._line = bytearray()  # the incomplete last line of a stream

    def taken(self, *names: str) -> Facts:
        return taken(self.question, MEMBERS, *names)

    def body(self) -> bytes:
        """The request to send; BadRequest, or Untranslatable where it has no counterpart."""
        try:
            return render_json(chosen(self.request()))
        except MALFORMED as error:
            words = "a member, or the arguments of a tool call, is not what it must be"
            raise BadRequest(f"{words}: {error}") from None

    def feed(self, data: bytes) -> bytes:
        """These bytes of a stream translated, however they are cut."""
        lines, broken, rest = data.rpartition(b"\n")
        if broken:
            lines, self._line = bytes(self._line) + lines, bytearray()
        self._line += rest
        if len(self._line) > PARSED_LINE:
            raise BackendError("a line of the backend's answer is too long to be translated")
        events = [self.source.read_line(line).strip() for line in lines.splitlines()]
        documents = [parse_json(event) for event in events if event not in (b"", b"[DONE]")]
        return b"".join([self.translate(self.piece, document) for document in documents])

    def finish(self, data: bytes) -> bytes:
        return b"".join([self.feed(data + b"\n"), self.translate(self.end)])

    def retell(self, body: bytes) -> bytes:
        """A long whole answer in the caller's dialect; takes its time, and lets others work."""
        parts = self.translate(lambda: list(render_parts(self.whole(parse_parts(body)))))
        return b"".join(parts)

    def translate(self, how: Callable[..., Any], *answer: Any) -> Any:
        try:
            return how(*answer)
        except MALFORMED:
            raise BackendError("the backend's answer is not what its dialect has") from None


def openai_tool_call(call: Facts, place: int, among: str) -> Facts:
    """A tool call of Ollama's; OpenAI has its arguments as a text."""
    function = call["function"]
    text = function.get("arguments") or {}
    if not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False, separators=(",", ":"))
    facts = {"name": called(function), "arguments": text}
    return {"id": call.get("id") or f"call_{among}_{place}", "type": "function", "function": facts}


def ollama_tool_call(call: Facts, place: int | None = None) -> Facts:
    """The reverse; ValueError where its arguments are no object, however they are written."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    for _ in range(2):  # some runners encode them twice
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a tool call are not an object")
    facts = chosen({"index": place, "name": called(function), "arguments": arguments})
    return chosen({"id": call.get("id"), "function": facts})


def called(function: Facts) -> str:
    if not isinstance(function["name"], str):
        raise ValueError("a tool call names no function")
    return function["name"]


def retold(calls: Any, tell: Callable[[Facts, int], Facts], at: str = "") -> list[Facts]:
    """Tool calls in the other words; a bad one is refused `at` its place, or lost of an answer."""
    found: list[Facts] = []
    for place, call in enumerate(calls if isinstance(calls, list) else [calls] if calls else ()):
        try:
            found.append(tell(call, len(found)))
        except MALFORMED:  # noqa: PERF203 - one that is bad costs no other, nor an answer's text
            if at:
                words = f"{at}tool_calls[{place}] has no name, or its arguments are no object"
                raise BadRequest(words, param=f"{at}tool_calls") from None
            log.warning("a tool call of an answer is left out: it was cut, or is not understood")
    return found


# ---- from OpenAI to Ollama: what chats and completions have in common, then each route


class ToOllama(Translator):
    source = OLLAMA
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    blank_usage = False  # each chunk has a usage, of nothing, where one is wanted
    choices: Callable[[Facts, bool], Iterable[Facts]]  # of an event, or of a `whole` answer

    def common(self) -> Facts:
        """Sampling as Ollama's own /v1 sets it; absent temperature and top_p are 1 there."""
        self.taken("stream_options")
        stop = self.taken("stop").get("stop")
        limits = self.taken("max_completion_tokens", "max_tokens")
        options: Facts = {"temperature": 1.0, "top_p": 1.0, **self.taken(*SAMPLING)}
        options["stop"] = [stop] if isinstance(stop, str) else stop
        options["num_predict"] = limits.get("max_tokens", limits.get("max_completion_tokens"))
        options["num_ctx"] = self.context or None
        facts = {"model": self.model, "options": chosen(options), **self.taken("keep_alive")}
        return {**facts, "stream": bool(self.question.get("stream"))}

    def frame(self, kind: str, choices: list[Facts], counts: Facts | None) -> Facts:
        """An answer or a chunk of one; `counts` is what Ollama says with the usage in it."""
        facts: Facts = {"id": f"{self.prefix}-{self.id}", "object": kind}
        facts.update(created=int(self.began), model=self.told)
        facts.update(system_fingerprint="fp_ollama", choices=choices)
        return facts if counts is None else {**facts, "usage": self.usage(counts)}

    def usage(self, counts: Facts) -> Facts:
        prompt, answer = counts.get("prompt_eval_count", 0), counts.get("eval_count", 0)
        facts = {"prompt_tokens": prompt, "completion_tokens": answer}
        return {**facts, "total_tokens": prompt + answer}

    def whole(self, answer: Facts) -> Facts:
        return self.frame(self.kind, [*self.choices(answer, True)], answer)

    def piece(self, event: Facts) -> bytes:
        blank: Facts | None = {} if self.blank_usage and self.wants_usage else None
        choices = self.choices(event, False)
        chunks = [self.frame(self.chunk_kind, [choice], blank) for choice in choices]
        if event.get("done") is True and self.wants_usage:
            chunks.append(self.frame(self.chunk_kind, [], event))
        return b"".join([b"data: " + render_json(chunk) + b"\n\n" for chunk in chunks])

    def end(self) -> bytes:
        return b"data: [DONE]\n\n"


class ChatToOllama(ToOllama):
    routes = (CHAT, OLLAMA_CHAT)
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _first = True  # no delta sent yet

    def request(self) -> Facts:
        asked = self.taken("reasoning", "reasoning_effort", "response_format")
        form, effort = asked.get("response_format", {}), asked.get("reasoning_effort")
        schema = look_up(form, "json_schema", "schema")
        if "reasoning" in asked:
            effort = asked["reasoning"].get("effort")
        return {
            **self.common(),
            **self.taken("tools", "logprobs", "top_logprobs"),
            "messages": ollama_messages(self.question["messages"]),
            "format": {"json_object": "json", "json_schema": schema}.get(form.get("type")),
            "think": EFFORTS.get(effort, effort) if effort else None,
        }

    def choices(self, answer: Facts, whole: bool) -> Iterator[Facts]:
        """Of a stream, a delta for each event, two for reasoning beside the rest, and an end."""
        done = answer.get("done") is True
        message = answer.get("message") or {} if done else answer["message"]
        calls = retold(message.get("tool_calls"), self.tool_call)
        reasoning = chosen({"reasoning": message.get("thinking") or None})
        told = {"content": message.get("content") or "", **chosen({"tool_calls": calls or None})}
        if whole:
            facts = {"role": message.get("role", "assistant"), **reasoning, **told}
            yield self.wrap("message", facts, answer, ends=True)
            return
        heard = bool(told["content"] or calls)
        # What has nothing but the counts is no delta, unless it is all that comes.
        if heard or reasoning or answer.get("logprobs") or self._first or not done:
            deltas = [reasoning, told] if reasoning and heard else [{**reasoning, **told}]
            for place, delta in enumerate(deltas):
                role = {"role": "assistant"} if self._first else {}
                self._first = False
                yield self.wrap("delta", {**role, **delta}, {} if place else answer)
        if done:
            yield self.wrap("delta", {}, answer, ends=True)

    def wrap(self, name: str, message: Facts, answer: Facts, *, ends: bool = False) -> Facts:
        reason = answer.get("done_reason") or "stop"
        reason = "tool_calls" if self.calls and reason == "stop" else reason
        choice: Facts = {"index": 0, name: message, "finish_reason": reason if ends else None}
        if message and answer.get("logprobs"):
            choice["logprobs"] = {"content": answer["logprobs"]}
        return choice

    def tool_call(self, call: Facts, _: int) -> Facts:
        place = len(self.calls)
        facts = self.calls[place] = openai_tool_call(call, place, self.id)
        facts["function"]["arguments"] = facts["function"]["arguments"].translate(GO_ESCAPES)
        return {**facts, "index": call["function"].get("index", place)}


def ollama_messages(messages: Sequence[Facts]) -> list[Facts]:
    """Messages as Ollama's /v1 makes them: each part of a content is a message of its own."""
    translated: list[Facts] = []
    places = [f"messages[{index}]." for index in range(len(messages))]
    members = ("role", "name", "reasoning", "tool_calls")
    told = [taken(one, MESSAGE_MEMBERS, *members, at=at) for one, at in zip(messages, places)]
    names = {  # of the functions called; of two calls with one id the last counts
        call.get("id"): look_up(call, "function", "name")
        for facts in told
        for call in facts.get("tool_calls", ())
    }
    for message, facts, place in zip(messages, told, places):
        role, content, calls = facts.get("role"), message.get("content"), facts.get("tool_calls")
        more = {"thinking": facts.get("reasoning") or None}
        if calls:
            more["tool_calls"] = retold(calls, lambda call, _: ollama_tool_call(call), place)
        if role == "tool":
            more.update(taken(message, MESSAGE_MEMBERS, "tool_call_id", at=place))
            more["tool_name"] = facts.get("name") or names.get(message.get("tool_call_id"))
        if not isinstance(content, (str, list)) and (calls is None or content is not None):
            raise BadRequest(f"{place}content is a text or a list", param=f"{place}content")
        if not content or not isinstance(content, list):
            content = [{"type": "text", "text": content or ""}]
        translated += [{"role": role, **ollama_part(part, place)} for part in content]
        translated[-1].update(chosen(more))
    return translated


def ollama_part(part: Any, at: str) -> Facts:
    """A part of a content; Ollama has sounds among the images."""
    kind, text = look_up(part, "type"), look_up(part, "text")
    url, sound = look_up(part, "image_url"), look_up(part, "input_audio", "data")
    if kind == "text" and isinstance(text, str):
        return {"content": text}
    if kind == "input_audio" and isinstance(sound, str):
        return {"content": "", "images": [sound]}
    if kind != "image_url":
        words = "a part of a content is a text, an image_url or an input_audio with its data"
        raise BadRequest(words, param=f"{at}content")
    url = url.get("url") if isinstance(url, dict) else url
    match = IMAGE_URL.fullmatch(url) if isinstance(url, str) else None
    if not match:
        raise BadRequest("an image is a data: url; llmq fetches nothing", param=f"{at}content")
    return {"content": "", "images": [match[1]]}


class CompletionToOllama(ToOllama):
    routes = (COMPLETIONS, OLLAMA_GENERATE)
    blank_usage = True

    def request(self) -> Facts:
        prompt = self.question.get("prompt")
        probs = taken(self.question, {"logprobs": WHOLE}, "logprobs").get("logprobs") or None
        if not isinstance(prompt, str):
            raise Untranslatable("Ollama takes one prompt, a text", param="prompt")
        facts = {**self.common(), **self.taken("suffix"), "prompt": prompt}
        facts["options"] = {"frequency_penalty": 0, "presence_penalty": 0, **facts["options"]}
        return {**facts, "logprobs": probs and True, "top_logprobs": probs}

    def choices(self, answer: Facts, _whole: bool) -> list[Facts]:
        reason = answer.get("done_reason") or ("stop" if answer.get("done") is True else None)
        return [{"text": answer["response"], "index": 0, "finish_reason": reason}]


class EmbeddingsToOllama(Translator):
    routes = (EMBEDDINGS, OLLAMA_EMBED)
    source = OLLAMA

    def request(self) -> Facts:
        texts = self.question.get("input")
        if not isinstance(texts, str) and not are_texts(texts):
            raise Untranslatable("Ollama embeds texts, not tokens", param="input")
        self.taken("encoding_format")
        options = {"num_ctx": self.context} if self.context else None
        facts = {**self.taken("dimensions", "keep_alive"), "input": texts or [""]}
        return {**facts, "model": self.model, "options": options}

    def whole(self, answer: Facts) -> Facts:
        packed = str(self.question.get("encoding_format")).lower() == "base64"
        vectors = map(pack_floats, answer["embeddings"]) if packed else answer["embeddings"]
        data = [
            {"object": "embedding", "embedding": vector, "index": place}
            for place, vector in enumerate(vectors)
        ]
        tokens = answer.get("prompt_eval_count", 0)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.told, "usage": usage}


def pack_floats(numbers: Sequence[float]) -> str:
    """Little-endian 32-bit floats in base64, as OpenAI's SDKs ask for by default."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *map(float, numbers))).decode()


# ---- from Ollama to OpenAI: what all routes have in common, then each route


class ToOpenAi(Translator):
    content: tuple[str, Any]  # the member of a whole choice that has it, and an empty one
    said: Callable[[Facts, Any], Facts]  # a choice and its content in Ollama's words
    finish_reason: str | None = None  # once it has come
    usage: Mapping[str, Any] = {}  # likewise
    timings: Mapping[str, Any] = {}  # likewise, llama.cpp's

    def need(self, name: str) -> Any:
        """What is asked about; a request without it is no question."""
        found = self.taken(name).get(name)
        if not found:
            raise Untranslatable("only Ollama loads and unloads a model on request")
        return found

    def common(self) -> Facts:
        options, names = self.question.get("options") or {}, self.runner.options
        told = taken(options, MEMBERS, "num_predict", "stop", *SAMPLING, *names, at="options.")
        limit, stream = told.pop("num_predict", -1), self.question.get("stream", True) is not False
        return {
            "model": self.model,
            "stream": stream,
            "stream_options": {"include_usage": True} if stream else None,
            "max_tokens": limit if limit >= 0 else None,
            **{names.get(name, name): value for name, value in told.items()},
        }

    def head(self) -> Facts:
        return {"model": self.told, "created_at": rfc3339(self.now())}

    def tail(self) -> Facts:
        """How it ended, and what its parts took where the runner tells it."""
        reason = "length" if self.finish_reason == "length" else "stop"
        facts = {"done": True, "done_reason": reason, "total_duration": self.spent()}
        facts["prompt_eval_count"] = self.usage.get("prompt_tokens", 0)
        facts["eval_count"] = self.usage.get("completion_tokens", 0)
        took = {"prompt_eval_duration": "prompt_ms", "eval_duration": "predicted_ms"}
        told = {name: measured(look_up(self.timings, spent)) for name, spent in took.items()}
        return {**facts, **{name: int(spent * 1e6) for name, spent in told.items() if spent}}

    def spent(self) -> int:
        return int((self.now() - self.began) * 1e9)  # nanoseconds, as all durations of Ollama

    def line(self, facts: Facts) -> bytes:
        return render_json({**self.head(), "done": False, **facts}) + b"\n"

    def note(self, answer: Facts) -> Facts:
        """The choice that it carries; how that ended and what it cost is noted."""
        choice = cast(Facts, (answer.get("choices") or [None])[0] or {})
        self.usage = answer.get("usage") or self.usage
        self.timings = answer.get("timings") or self.timings
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return choice

    def whole(self, answer: Facts) -> Facts:
        choice = self.note(answer)
        return {**self.head(), **self.said(choice, choice[self.content[0]]), **self.tail()}

    def end(self) -> bytes:
        return self.line({**self.said({}, self.content[1]), **self.tail()})


class ChatToOpenAi(ToOpenAi):
    routes = (OLLAMA_CHAT, CHAT)
    content = ("message", {})

    def request(self) -> Facts:
        asked = self.taken("think", "format")
        think, form = asked.get("think"), asked.get("format")
        switch = {"enable_thinking": think} if isinstance(think, bool) else None
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}
        free_form = {"type": "json_object"} if form == "json" else None
        return {
            **self.common(),
            **self.taken("tools", "logprobs", "top_logprobs"),
            "messages": openai_messages(self.need("messages")),
            "response_format": schema if isinstance(form, dict) else free_form,
            "chat_template_kwargs": switch,
            "reasoning_effort": None if switch else think,
        }

    def said(self, choice: Facts, content: Facts) -> Facts:
        thinking = content.get("reasoning_content") or content.get("reasoning") or None
        calls = retold(content.get("tool_calls"), ollama_tool_call) or None
        message: Facts = {"role": "assistant", "content": content.get("content") or ""}
        message = chosen({**message, "thinking": thinking, "tool_calls": calls})
        logprobs = choice.get("logprobs") and choice["logprobs"].get("content")
        return chosen({"message": message, "logprobs": logprobs or None})

    def piece(self, event: Facts) -> bytes:
        choice = self.note(event)
        delta = choice.get("delta") or {}
        retold(delta.get("tool_calls"), self.gather)
        facts = self.said(choice, {**delta, "tool_calls": None})
        told = facts["message"]
        heard = told["content"] or "thinking" in told or "logprobs" in facts
        return self.line(facts) if heard else b""

    def gather(self, part: Facts, _: int) -> Facts:
        """A bit of a tool call, which Ollama tells at once; by its id, index or a new name."""
        index = part["index"] if isinstance(part.get("index"), int) else None
        ident, function = part.get("id"), part.get("function") or {}
        name, more = function.get("name"), function.get("arguments")
        place = self.places.get(index, len(self.calls) - 1 if index is None else -1)
        call = self.calls.get(place)
        again = call is not None and index is None and name
        if call is None or again or (ident and call.get("id") not in (None, ident)):
            place = len(self.calls)
            call = {"index": place if index is None else index, "function": {"arguments": []}}
            self.calls[place] = call
        self.places[index] = place
        call["id"] = ident or call.get("id")
        whole = call["function"]
        whole["name"] = name or whole.get("name")
        if isinstance(more, str) and isinstance(whole["arguments"], list):
            self.gathered += len(more)
            if self.gathered > PARSED_LINE:
                raise BackendError("the tool calls of the backend's answer are too long")
            whole["arguments"].append(more)  # bits of a text
        elif more:
            whole["arguments"] = more if isinstance(more, dict) else json.dumps(more)
        return call

    def end(self) -> bytes:
        calls = sorted(self.calls.values(), key=lambda call: call["index"])
        for function in [call["function"] for call in calls]:
            if isinstance(function["arguments"], list):
                function["arguments"] = "".join(function["arguments"])
        return (self.line(self.said({}, {"tool_calls": calls})) if calls else b"") + super().end()


class OpenCalls:
    """Tool calls without a result yet, in order. Each is found in constant time, however many."""

    def __init__(self) -> None:
        self.names: OrderedDict[str, Any] = OrderedDict()  # the function's, by the call's id
        self.by_name: dict[str, deque[str]] = {}

    def add(self, ident: Any, name: Any) -> None:
        if isinstance(ident, str) and isinstance(name, str):
            self.names[ident] = name
            self.by_name.setdefault(name, deque()).append(ident)

    def take(self, name: Any, ident: Any = None) -> Any:
        """The call's id: as told, else of the first open one of that function; else the name."""
        if ident and isinstance(ident, str):
            self.names.pop(ident, None)
            return ident
        if name is None:
            return self.names.popitem(last=False)[0] if self.names else None
        idents = self.by_name.get(name, ()) if isinstance(name, str) else ()
        while idents:
            ident = idents.popleft()
            if self.names.pop(ident, None) is not None:
                return ident
        return name


def openai_messages(messages: Sequence[Facts]) -> list[Facts]:
    """Messages as OpenAI has them; a tool's result names the call that it answers."""
    translated: list[Facts] = []
    unanswered = OpenCalls()
    for index, message in enumerate(messages):
        at = f"messages[{index}]."
        told = taken(message, MESSAGE_MEMBERS, at=at)
        tell = functools.partial(openai_tool_call, among=str(index))
        calls = retold(told.get("tool_calls"), tell, at)
        for call in calls:
            unanswered.add(call["id"], call["function"]["name"])
        facts = {"role": told.get("role"), "content": openai_content(told)}
        facts.update(reasoning_content=told.get("thinking") or None, tool_calls=calls or None)
        if facts["role"] == "tool":
            facts["tool_call_id"] = unanswered.take(told.get("tool_name"), told.get("tool_call_id"))
        translated.append(chosen(facts))
    return translated


def openai_content(message: Facts) -> Any:
    text, images = message.get("content") or "", message.get("images")
    if not images:
        return text
    parts: list[Facts] = [{"type": "text", "text": text}] if text else []
    for image in images:
        kinds = (kind for start, kind in IMAGE_TYPES.items() if image.startswith(start))
        url = f"data:image/{next(kinds, 'png')};base64,{image}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


BESIDE_A_PROMPT = (
    "system", "template", "context", "images", "format", "suffix", "think", "logprobs",
)  # fmt: skip


class GenerateToOpenAi(ToOpenAi):
    routes = (OLLAMA_GENERATE, COMPLETIONS)  # for a plain prompt
    content = ("text", "")

    def request(self) -> Facts:
        prompt = self.need("prompt")
        for name in BESIDE_A_PROMPT:
            if self.question.get(name):
                raise Untranslatable(f"only Ollama takes {name} beside a prompt", param=name)
        return {**self.common(), "prompt": prompt}

    def said(self, _choice: Facts, content: str) -> Facts:
        return {"response": content}

    def piece(self, event: Facts) -> bytes:
        text = self.note(event).get("text")
        return self.line({"response": text}) if text else b""


class EmbedToOpenAi(ToOpenAi):
    routes = (OLLAMA_EMBED, EMBEDDINGS)
    texts = "input"  # the member that has them

    def request(self) -> Facts:
        facts = {"model": self.model, "input": self.need(self.texts), "encoding_format": "float"}
        return {**facts, **self.taken("dimensions")}

    def whole(self, answer: Facts) -> Facts:
        rows = sorted(answer["data"], key=lambda row: row.get("index", 0))
        return {
            "model": self.told,
            "embeddings": [row["embedding"] for row in rows],
            "total_duration": self.spent(),
            "load_duration": 0,
            "prompt_eval_count": (answer.get("usage") or {}).get("prompt_tokens", 0),
        }


class EmbeddingsToOpenAi(EmbedToOpenAi):
    routes = (OLLAMA_EMBEDDINGS, EMBEDDINGS)
    texts = "prompt"

    def whole(self, answer: Facts) -> Facts:
        return {"embedding": answer["data"][0]["embedding"]}


TO_OLLAMA = (ChatToOllama, CompletionToOllama, EmbeddingsToOllama)
TO_OPENAI = (ChatToOpenAi, GenerateToOpenAi, EmbedToOpenAi, EmbeddingsToOpenAi)
TRANSLATORS = {kind.routes: kind for kind in (*TO_OLLAMA, *TO_OPENAI)}


# ==== 24. Streams =================================================================================
# The first section that awaits: TCP streams, as both sides use them.  One coroutine reads and one
# writes a stream.  Whoever wants to end a wait gives the stream an error (`interrupt`), so that it
# surfaces where the wait is.  (`wait_for` around a read swallows cancels on some Pythons.)

READ_AHEAD = 64 * KIB  # kept of what a client sends while its request is in flight
UNREAD_LIMIT = 128 * KIB  # that nobody has read; then the peer is not listened to for a while
HEAD_END = b"\r\n\r\n"
READING = threading.Lock()  # one at a time: more threads would only wait for each other
T = TypeVar("T")


@functools.lru_cache(maxsize=1)
def done_future(loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """What a task is woken with.

    Of another type than asyncio's own a task asks the result by a name that it makes each time, and
    CPython's cache of attributes keeps 4,096 of those: after a crowd of 5,000 they held 12 MB.
    """
    done: asyncio.Future[None] = loop.create_future()
    done.set_result(None)
    return done


class Waiter:
    """What one coroutine awaits until it is woken; it may be woken for nothing, so it looks again.

    The coroutine goes on in the very turn of the loop that wakes it.  A future of asyncio's would
    let it go on a turn later: two turns of each request, one of each token, a third of what a token
    costs (measured).  Tasks await anything that has `_asyncio_future_blocking`, see
    `asyncio.isfuture`; but no task may be entered from another, so one of those wakes it a turn
    later.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_done", "_loop", "_woken")

    def __init__(self) -> None:
        self._asyncio_future_blocking = False
        self._loop = asyncio.get_running_loop()
        self._done = done_future(self._loop)
        self._callback: Callable[[Any], object] | None = None  # the waiting task's
        self._woken = False

    def wake(self) -> None:
        callback, self._callback, self._woken = self._callback, None, True
        if callback is not None and asyncio.current_task(self._loop) is None:
            callback(self._done)
        elif callback is not None:
            self._loop.call_soon(callback, self._done)

    def __await__(self) -> Generator[Any, None, None]:
        if not self._woken:
            self._asyncio_future_blocking = True
            yield self
        self._woken = False

    # ---- what a task asks of a future, beside its `_loop`

    def add_done_callback(self, callback: Callable[[Any], object], *, context: object) -> None:
        del context  # no context variable is used here
        self._callback = callback

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - as of every future
        callback, self._callback = self._callback, None
        if callback is not None:
            self._loop.call_soon(callback, self._done)
        return False  # not by itself: the task that goes on is cancelled


class Stream(asyncio.Protocol):
    """One TCP connection: what one coroutine reads of it, and what one writes.

    It tells unasked that the peer left.  In place of asyncio's four objects (reader, writer, their
    protocol and its queue), which cost a waiting client 2 KiB more and each piece three calls.
    """

    __slots__ = (
        "_data", "_opened", "_tls", "_writing", "broken", "ended", "error", "full", "lost",
        "on_end", "overrun", "received", "room", "transport", "waiter", "written",
    )  # fmt: skip

    def __init__(self, opened: Callable[[Stream], None] | None = None) -> None:
        self.transport: Any = None
        self.waiter = Waiter()  # of whoever reads
        self.received = self.written = 0  # bytes, ever
        self.room: int | None = None  # bytes that may still be read ahead; None: any number
        self.overrun = False  # more came than that, and was dropped
        self.ended = False  # the peer has closed, or reset
        self.broken = False  # it was a reset
        self.lost = False  # neither side can send any more
        self.full = False  # the transport's limit is unsent, or the peer has not caught up since
        self.error: LlmqError | None = None  # what whoever reads is to meet
        self.on_end: Callable[[], object] | None = None
        self._opened = opened
        self._data = b""  # what came and was not read: never much, so it is simply joined
        self._writing: Waiter | None = None  # of whoever writes

    @property
    def unread(self) -> int:
        return len(self._data)

    @property
    def unsent(self) -> int:
        """Bytes that were written and that the kernel has not taken."""
        size = int(self.transport.get_write_buffer_size())
        if self._tls and sys.version_info >= (3, 11):  # it counts what TLS itself holds, no more
            below = getattr(getattr(self.transport, "_ssl_protocol", None), "_transport", None)
            size += below.get_write_buffer_size() if below is not None else 0
        return size

    # ---- what the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._tls = transport.get_extra_info("sslcontext") is not None  # which is gone at the end
        if self._opened is not None:
            self._opened(self)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.room is not None:
            self.room -= len(data)
            if self.room < 0:
                self.overrun = True
                return
        elif len(self._data) > UNREAD_LIMIT:
            self.transport.pause_reading()
        self._data = self._data + data if self._data else data
        self.waiter.wake()

    def eof_received(self) -> bool:
        """The peer sends no more; it may still read, except over TLS."""
        self._end()
        return not self._tls

    def connection_lost(self, exc: Exception | None) -> None:
        """By a reset, where there is an error: what came before is still read."""
        self.lost, self.broken = True, exc is not None
        self._end()
        self.resume_writing()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self._writing is not None:
            self._writing.wake()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            if self.on_end is not None:
                self.on_end()
            self.waiter.wake()

    # ---- writing

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer has taken enough; ConnectionResetError when it never will."""
        self._writing = self._writing or Waiter()
        while self.full and not self.lost:
            await self._writing
        if self.lost:
            raise ConnectionResetError("the connection is lost")

    def close(self) -> None:
        """Close when all has been sent."""
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    async def closed(self) -> None:
        self._writing = self._writing or Waiter()
        while not self.lost:
            await self._writing

    # ---- reading

    def interrupt(self, error: LlmqError) -> None:
        """Whoever reads, now or later, meets this error instead."""
        self.error = error
        self.waiter.wake()

    async def more(self) -> bytes:
        """What has come, waiting until there is something; b"" once the peer has ended."""
        while not self._data and not self.ended and self.error is None:
            await self.waiter
        if self.error is not None:
            raise self.error
        return self.take(len(self._data))

    def take(self, size: int) -> bytes:
        """So many bytes of what has come."""
        data = self._data
        if len(data) > UNREAD_LIMIT and not self.ended:
            self.transport.resume_reading()
        self._data = data[size:]
        return data[:size]

    def put_back(self, data: bytes) -> None:
        """Let this be what comes next."""
        self._data = data + self._data if self._data else data

    async def read_head(self, partly: Callable[[], None] | None = None) -> bytes:
        """A head with the empty line behind it; without that line where it is too long or cut off.

        `partly` is called once, when only a part of it has come.
        """
        seen = 0  # bytes in which it does not end
        while seen <= HEAD_LIMIT:
            while len(self._data) == seen and not self.ended and self.error is None:
                await self.waiter
            end = self._data.find(HEAD_END, max(0, seen - len(HEAD_END) + 1))
            if 0 <= end <= HEAD_LIMIT:
                return self.take(end + len(HEAD_END))
            if self.error is not None:
                raise self.error
            if len(self._data) == seen:  # and the peer has ended
                break
            if partly is not None and not seen:
                partly()
            seen = len(self._data)
        return self.take(len(self._data)).rstrip(b"\r\n")

    def bound(self) -> None:
        """Never pause again: the peer's end is seen at once, what exceeds the room is dropped."""
        if self.unread > READ_AHEAD:
            self._data, self.overrun = b"", True
        self.room = READ_AHEAD - self.unread
        self.transport.resume_reading()

    async def linger(self, timeout: float) -> None:
        """Drop what still comes, until the peer has closed or the time is up."""
        ended = asyncio.get_running_loop().create_future()
        self.room, self.on_end = 0, functools.partial(ended.set_result, None)
        self.transport.resume_reading()
        if not self.ended:
            await asyncio.wait({ended}, timeout=timeout)
        self.on_end = None


async def in_thread(work: Callable[[], T]) -> T:
    """What a function gives that would hold the event loop, from a thread of its own.

    Unlike those of asyncio's executor it keeps no other work waiting, nor the end of the program.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()  # whoever awaits it may leave, the thread goes on

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:  # noqa: BLE001 - whoever awaits it meets it
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


async def beside(work: Callable[[], T], *, heavy: bool = True) -> T:
    """What a function gives that reads or writes JSON; the event loop goes on where it is heavy."""
    if not heavy:
        return work()

    def work_alone() -> T:
        with READING:
            return work()

    return await in_thread(work_alone)


async def within(seconds: float, task: asyncio.Future[T], late: Exception) -> T:
    """What the task gives within a time; else it is cancelled, and `late` is raised."""
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done() or task.cancelled():
            raise late
        return task.result()
    finally:
        task.cancel()  # which does nothing to one that is done
        del task, late  # an error that leaves here holds this frame, and may be one of them


# ==== 25. Replies =================================================================================
# Whom a call answers: it never sees a connection.  An exchange is one request of a connection and
# its answer; other replies are kept, are for several who asked the same, or for nobody.

UNREAD_BODY = 64 * KIB  # a refused request's body up to here is read and dropped, not cut off
COPIED = 64 * KIB  # of an answer that leaves in one write with its head; a longer one in two
STREAM_LINES = "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"  # or nginx holds it back
NO_SNIFFING = "X-Content-Type-Options: nosniff\r\n"  # what is sent is never anything but its type


class Phase(enum.Enum):
    IDLE = "idle"  # between requests
    HEAD = "head"  # a part of one is here
    BODY = "body"
    BUSY = "busy"  # the request is being answered
    LINGER = "linger"


class Exchange:
    """One HTTP request, and the one way to answer it."""

    __slots__ = (
        "_chunked", "_head", "_head_status", "caller", "connection", "finished", "headers", "id",
        "is_plain", "keep_alive", "length", "request", "request_id", "status", "told_length",
        "unread", "wrong_key",
    )  # fmt: skip

    def __init__(self, connection: Any, request: Request) -> None:
        self.connection = connection  # of the next section
        self.request = request
        self.caller = NOBODY
        self.is_plain = False  # the answer is another service's: llmq says nothing of its own
        self.told_length = ""  # of that answer, as the service tells it
        self.wrong_key: LlmqError | None = None  # what is wrong with the one that it came with
        self.length = request_length(request)
        self.headers: Fields = ()  # for the head of whatever answer comes
        self.id = self.request_id = ""  # llmq's own, and the client's where it gave one
        self.keep_alive = request.keep_alive
        self.status = 0  # of the head that has left; 0: none has
        self.finished = False
        self._head, self._head_status = b"", 0  # waits for the first bytes of its body
        self._chunked = False
        self.unread = self.length != 0

    @property
    def waiter(self) -> Waiter:
        waiter: Waiter = self.connection.stream.waiter  # of the coroutine that a call runs in
        return waiter

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def gone(self) -> bool:
        """The client has left: on TCP a half-close looks the same, and counts the same."""
        return bool(self.connection.stream.ended)

    def watch(self, left: Callable[[], object] | None = None) -> None:
        """Until the answer's end nothing hides that the client leaves: that wakes the waiter.

        It also calls `left`, at once where the client has left already.
        """
        stream = self.connection.stream
        if stream.room is None:  # it was not watched so far
            self.connection.let_go()
            stream.bound()
        stream.on_end = left
        if stream.ended and left is not None:
            left()

    async def read_body(self, limit: int) -> bytes:
        """The request's body; `body_too_large` before anything is read where its length tells."""
        if self.length > limit:
            self.keep_alive = False
            raise too_large(limit)
        stream = self.connection.stream
        if not self.unread:  # it is here: what is behind it belongs to the next request
            return self.request.body
        if 0 < self.length <= stream.unread and not self.expects_continue:
            self.request.body = stream.take(self.length)
        else:
            self._invite()
            keep_alive, self.keep_alive = self.keep_alive, False  # where a broken one ends: unknown
            self.request.body = await self.connection.read_body(self.length, limit)
            self.keep_alive = keep_alive
        self.unread = False
        return self.request.body

    async def pieces(self) -> AsyncIterator[bytes]:
        """The request's body as it comes, however long it is; only its pieces have a deadline."""
        connection, decoder = self.connection, body_decoder(self.length if self.unread else 0)
        self._invite()
        while not decoder.done:
            connection.enter(Phase.BODY)
            piece = await connection.read_piece(decoder)
            connection.enter(Phase.BUSY)  # whoever takes the piece may take its time
            if piece:
                yield piece
        self.unread = False

    def _invite(self) -> None:
        if self.unread and self.expects_continue:
            self.connection.stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    @property
    def expects_continue(self) -> bool:
        expected = self.request.headers.get("expect", "")
        return self.request.minor >= 1 and expected.lower() == "100-continue"

    @property
    def address(self) -> str:
        """Of whoever asks: that of the connection, unless a proxy told another."""
        return self.caller.address or self.connection.address

    @property
    def is_local(self) -> bool:
        """Whether the client is on this box: it has the address that it has reached us at."""
        if is_loopback(self.address):
            return True
        own = self.connection.stream.transport.get_extra_info("sockname")[0]
        return self.address == plain_address(own)

    def respond(
        self, status: int, body: bytes, content_type: str = "application/json", headers: Pairs = ()
    ) -> None:
        if self.unread and (self.expects_continue or not 0 < self.length <= UNREAD_BODY):
            self.keep_alive = False
        length = self.told_length or len(body)
        framing = f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n"
        self.finished = True
        self.status = status
        shown = b"" if self.request.method == "HEAD" else body
        head = self._render_head(status, framing if status != 204 else "", headers)
        if len(shown) > COPIED:
            self.connection.stream.write(head)
            self.connection.stream.write(shown)
            if self.connection.unsent:
                self.connection.server.limit_unsent()
        else:
            self.connection.stream.write(head + shown)

    def start(self, status: int, content_type: str, headers: Pairs = ()) -> None:
        """An answer in pieces; its head leaves with the first of them, or gives way to an error."""
        self._chunked = self.request.minor >= 1 and status not in (204, 304)
        framing = f"Content-Type: {content_type}\r\n{'' if self.is_plain else STREAM_LINES}"
        if self.told_length:
            self._chunked = False
            framing += f"Content-Length: {self.told_length}\r\n"
        elif self._chunked:
            framing += "Transfer-Encoding: chunked\r\n"
        else:
            self.keep_alive = False
        self._head = self._render_head(status, framing, headers)
        self._head_status = status

    def _render_head(self, status: int, framing: str, headers: Pairs) -> bytes:
        server, ending = self.connection.server, ""
        if not self.keep_alive or server.closing:
            self.keep_alive = False
            ending = "Connection: close\r\n"
        elif self.request.minor == 0:
            ending = "Connection: keep-alive\r\n"
        if self.is_plain:
            lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
            first = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nDate: {server.date}\r\n"
            return f"{first}{framing}{lines}{ending}\r\n".encode("latin-1", "replace")
        more = "".join([f"{name}: {value}\r\n" for name, value in (*self.headers, *headers)])
        head = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nDate: {server.date}\r\n"
            f"{framing}X-Request-Id: {self.request_id}\r\nrequest-id: {self.request_id}\r\n"
            f"X-LLMQ-Id: {self.id}\r\n{NO_SNIFFING}{more}{ending}\r\n"
        )
        return head.encode("latin-1", "replace")

    def send(self, data: bytes, end: bytes = b"") -> None:
        payload = render_chunk(data) if self._chunked and data else data
        if self._head:
            payload, self._head, self.status = self._head + payload, b"", self._head_status
        self.connection.stream.write(payload + end)

    def finish(self, data: bytes = b"") -> None:
        """The end of an answer in pieces, as its framing says a complete one ends."""
        self.finished = True
        self.send(data, LAST_CHUNK if self._chunked else b"")

    def fail(self, data: bytes) -> None:
        """A last word in the stream, then an end that no client can take for a complete one."""
        self.send(data)
        self.finished, self.keep_alive = True, False
        self.connection.reset_at_end = not self._chunked

    @property
    def blocked(self) -> bool:
        """More than ANSWER_BUFFER is unsent, or the client has not caught up since."""
        return bool(self.connection.stream.full)

    async def catch_up(self) -> None:
        """Wait until a client that is far behind has caught up; ClientLeft when it does not."""
        try:
            await self.connection.stream.drain()
        except ConnectionError:
            raise ClientLeft("the client left") from None

    def abort(self) -> None:
        self.connection.stream.abort()


class Nobody:
    """A Reply to nobody: of what llmq asks a runner by itself."""

    status, gone, started, blocked = 0, False, False, False

    def __init__(self) -> None:
        self.waiter = Waiter()

    def ignore(self, *_: object, **__: object) -> None: ...

    watch = start = send = finish = fail = respond = abort = ignore

    async def nothing(self, *_: object) -> Any: ...

    read_body = catch_up = nothing


MOST_KEPT = 64 * MIB  # of the answer of a job


class Kept:
    """A Reply that is kept: the answer of a job, which nobody waits for."""

    blocked = False

    def __init__(self, body: bytes, begin: Callable[[], object]) -> None:
        self.waiter = Waiter()
        self.status, self.type = 0, ""
        self.body = body  # of the request
        self.begin = begin  # called when a runner is asked
        self.gone = False  # it is not wanted any more
        self.size = 0  # bytes that were sent
        self._answer: list[bytes] = []  # in the pieces that have come
        self._head = (0, "")  # status and type, until the first bytes of the body
        self._left: Callable[[], object] | None = None

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def answer(self) -> bytes:
        return b"".join(self._answer)

    def watch(self, left: Callable[[], object] | None = None) -> None:
        self._left = left

    def leave(self) -> None:
        """Nobody wants it any more, as when a client leaves."""
        self.gone = True
        self.waiter.wake()
        if self._left is not None:
            self._left()

    async def read_body(self, _limit: int) -> bytes:
        return self.body

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Pairs = (),  # noqa: ARG002 - a result has none of its own
    ) -> None:
        self.status, self.type, self._answer = status, content_type, [body]

    def start(self, status: int, content_type: str, headers: Pairs = ()) -> None:  # noqa: ARG002
        self._head = status, content_type

    def send(self, data: bytes) -> None:
        self.status, self.type = self._head
        self.size += len(data)
        if self.size > MOST_KEPT:
            self._answer.clear()
            raise LlmqError("the answer is too long to be kept")
        self._answer.append(data)

    def finish(self, data: bytes = b"") -> None:
        self.send(data)

    def fail(self, data: bytes) -> None:
        self._answer.append(data)

    async def catch_up(self) -> None: ...

    def abort(self) -> None: ...


class Shared:
    """A Reply to several clients that asked the same: one call runs for all of them.

    The first client is answered as it would be alone.  The others wait in `join` for the end of the
    run, and are then sent its answer.  A client that leaves harms no other; the last one that
    leaves ends the run.
    """

    blocked = False  # it is no stream

    def __init__(self, first: Exchange, call: Any) -> None:
        self.first = first
        self.call = call  # that runs for all
        self.waiter = first.waiter
        self.others: list[Exchange] = []
        self.answer: tuple[bytes, str] | None = None  # body and type, once it is whole and good
        self.error: LlmqError | None = None
        self.ended = False
        self._left: Callable[[], object] | None = None
        self._head: tuple[int, str] | None = None  # status and type of an answer that has begun
        if first.started:  # with a sign of life: it has shared another run, which was ended
            self._head = first.status, "application/json"

    @property
    def status(self) -> int:
        return self.first.status

    @property
    def started(self) -> bool:
        return self._head is not None

    @property
    def gone(self) -> bool:
        return self.first.gone and all(other.gone for other in self.others)

    def watch(self, left: Callable[[], object] | None = None) -> None:
        self._left = left
        self.first.watch(self.look)

    def look(self) -> None:
        """Somebody may have left."""
        if self.gone and self._left is not None:
            self._left()
        elif self.gone:  # it waits for its turn, and looks when it is woken
            self.waiter.wake()

    async def join(self, other: Exchange, call: Any) -> None:
        """Wait with the others until the run has ended; ClientLeft when this one leaves."""
        self.others.append(other)
        try:
            other.watch(self.look)
            if self._head is not None and not other.started:
                other.start(*self._head)
            while not self.ended:
                await other.waiter
                if other.gone:
                    raise ClientLeft("the client left")
                if call.error is not None:  # it was stopped
                    raise call.error
        finally:
            self.others.remove(other)
            self.look()

    def end(self, error: LlmqError | None) -> None:
        """The run has ended, with the answer or with this error."""
        self.error, self.ended = error, True
        for other in self.others:
            other.waiter.wake()

    async def read_body(self, limit: int) -> bytes:
        return await self.first.read_body(limit)

    def respond(
        self, status: int, body: bytes, content_type: str = "application/json", headers: Pairs = ()
    ) -> None:
        if status == HTTPStatus.OK:
            self.answer = body, content_type
        if not self.first.gone:
            self.first.respond(status, body, content_type, headers)

    def start(self, status: int, content_type: str, headers: Pairs = ()) -> None:
        self._head = status, content_type
        self.first.start(status, content_type, headers)
        for other in self.others:
            if not other.started:
                other.start(status, content_type)

    def send(self, data: bytes) -> None:
        """A sign of life: nothing else comes in pieces."""
        for each in (self.first, *self.others):
            if not each.gone:
                each.send(data)

    def finish(self, data: bytes = b"") -> None:
        self.answer = data, self._head[1] if self._head else ""
        if not self.first.gone:
            self.first.finish(data)

    def fail(self, data: bytes) -> None:
        self.first.fail(data)

    async def catch_up(self) -> None: ...

    def abort(self) -> None: ...


Reply = Union[Exchange, Nobody, Kept, Shared]
Handler = Callable[[Exchange], Awaitable[None]]


# ==== 26. Server ==================================================================================
# The clients' side.  A connection serves one request after the other, an exchange is one of them
# and its answer.  Deadlines are numbers on the connection that the reaper compares with the clock
# four times a second: a timer per request costs more and says no more.

ANSWER_BUFFER = 4 * MIB  # of an answer that a slow client may leave here before the runner waits
HANDSHAKE_SECONDS = 3.0  # of TLS: until it has ended, a connection is in no count
TLS_LOOK_SECONDS = 0.1  # between two looks at what TLS has sent
LINGER_SECONDS = 2.0  # for a client to hang up first, so that no reset destroys its answer
SPARE_CONNECTIONS = 8  # above the cap, for /health and to say 503
IDLE_GRACE = 0.5  # seconds in which a connection may be idle although others want its place
BACKLOG = 1024  # connections that the kernel holds for us
ACCEPT_BURST = 4  # accepted in one turn of the loop; hanging up on one takes a few turns


async def other_user(transport: asyncio.BaseTransport) -> str:
    """`unix:` + the user at the other end of a connection on this box, if it is not our own."""
    uid = own = -1
    with contextlib.suppress(AttributeError, KeyError, OSError, TypeError, ValueError):
        uid, own = peer_uid(*map(transport.get_extra_info, ("peername", "sockname"))), os.geteuid()
        if uid != own:
            import pwd  # which may ask a directory on another box

            return "unix:" + (await in_thread(functools.partial(pwd.getpwuid, uid))).pw_name
    return "" if uid == own else f"unix:{uid}"  # no Linux, or it left; one without a name


def peer_uid(peer: Sequence[Any], own: Sequence[Any]) -> int:
    """The user whose socket is at `peer`, asked of the kernel: 20 µs, see sock_diag(7)."""
    ends = [ipaddress.ip_address(plain_address(end[0])) for end in (peer, own)]
    family = socket.AF_INET if ends[0].version == 4 else socket.AF_INET6
    packed = [end.packed.ljust(16, b"\0") for end in ends]
    request = struct.pack("=IHHIIBBBBI", 72, 20, 1, 0, 0, family, socket.IPPROTO_TCP, 0, 0, 2)
    request += struct.pack("!HH16s16siii", peer[1], own[1], *packed, 0, -1, -1)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4) as kernel:
        kernel.setblocking(False)
        kernel.send(request)
        state, uid = struct.unpack_from("=17xB62xI", kernel.recv(KIB).ljust(84, b"\0"))
    if state != 1:  # whose it was is not known of what is no longer connected
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    return int(uid)


class Connection:
    """A client's connection: requests one after the other, each answered before the next."""

    __slots__ = (
        "above_cap", "address", "arrived", "deadline", "last_drained", "last_received", "person",
        "phase", "reset_at_end", "seen", "sent", "server", "since", "stream", "used",
    )  # fmt: skip

    def __init__(self, server: HttpServer, stream: Stream) -> None:
        self.server = server
        self.stream = stream
        self.above_cap = len(server.connections) >= server.most  # when it came
        self.address = ""  # of the client
        self.person: str | None = None  # `unix:NAME` of another user, once that was asked for
        self.arrived = 0  # bytes of the body at hand, until its request waits in the queue
        self.reset_at_end = False
        self.used = False  # it has sent a request
        self.sent, self.last_drained = 0, 0.0  # what the client had taken when it last took any
        self.enter(Phase.IDLE, server.settings.server.head_timeout)

    @property
    def unsent(self) -> int:
        return self.stream.unsent

    @property
    def idle(self) -> bool:
        return self.phase is Phase.IDLE and not self.stream.unread and not self.unsent

    @property
    def arriving(self) -> bool:
        """Part of a request is here, or none yet of the first one."""
        part = self.phase is Phase.IDLE and not (self.idle and self.used)
        return part or self.phase in (Phase.HEAD, Phase.BODY)

    def enter(self, phase: Phase, limit: float = 0.0) -> None:
        self.phase = phase
        self.since = self.last_received = now = time.monotonic()
        self.seen = self.stream.received  # what the client had sent by then
        self.deadline = now + limit if limit else 0.0

    async def run(self) -> None:
        """Until the client leaves, misbehaves, or nothing more is wanted of it."""
        try:
            while await self.serve_one():
                self.enter(Phase.IDLE, self.server.settings.server.keep_alive)
                if self.stream.unread:  # the next one is here already: others have their turn first
                    await asyncio.sleep(0)
            await self.close()
        except (OSError, LlmqError):
            self.stream.abort()
        except Exception:
            log.exception("connection failed")
            self.stream.abort()
        finally:
            self.stream.close()
            self.server.connections.pop(self, None)

    async def serve_one(self) -> bool:
        """One request; False when the connection is done."""
        exchange = None
        try:
            request = await self.read_request()
            if request is None:
                return False
            exchange = Exchange(self, request)
            self.enter(Phase.BUSY)
            await self.server.handler(exchange)
            self.stream.on_end = None  # which may hold the whole answer
            if exchange.blocked:  # who asks on and on, and reads nothing, is not read either
                await exchange.catch_up()
        except LlmqError as error:  # while it was read: where the next would begin is not known
            if not isinstance(error, ClientLeft) and (exchange is None or not exchange.started):
                self.refuse(error)
            error.__traceback__ = error.__context__ = None  # the stream keeps the error
            return False
        finally:
            self.let_go()
            self.stream.on_end, self.stream.room = None, None
        if exchange.finished and exchange.keep_alive and not self.stream.overrun:
            if exchange.unread:
                try:
                    await self.read_body(exchange.length, UNREAD_BODY)
                finally:
                    self.let_go()
            return not (self.stream.ended or self.server.closing)
        return False

    async def read_request(self) -> Request | None:
        """The next request, without its body; None when the client wants no more."""
        head_timeout = self.server.settings.server.head_timeout
        partly, skipped = functools.partial(self.enter, Phase.HEAD, head_timeout), 0
        while skipped <= HEAD_LIMIT:
            head = await self.stream.read_head(partly)
            if head.endswith(HEAD_END) and head.strip(b"\r\n"):
                self.used = True
                return parse_request_head(head)
            if not head.endswith(HEAD_END):
                if len(head) <= HEAD_LIMIT:
                    return None
                if b"\r\n" in head[:REQUEST_LINE_LIMIT].lstrip(b"\r\n"):
                    message = f"the header fields are limited to {HEAD_LIMIT} bytes"
                    raise LlmqError(message, "headers_too_large")
                message = f"the request line is limited to {REQUEST_LINE_LIMIT} bytes"
                raise LlmqError(message, "uri_too_long")
            skipped += len(head)
            await asyncio.sleep(0)  # many may be here: others have their turn
        raise BadRequest("nothing but empty lines")

    async def read_body(self, length: int, limit: int) -> bytes:
        """A body that is wanted whole; it counts as arriving until `let_go`."""
        server, pieces = self.server, []
        decoder = body_decoder(length, limit)
        self.enter(Phase.BODY, server.settings.server.upload_timeout)
        while not decoder.done:
            piece = await self.read_piece(decoder)
            self.arrived += len(piece)
            server.arriving_bytes += len(piece)
            if server.arriving_bytes > server.settings.queue.max_queued_bytes:
                words = "the requests that arrive hold all the memory they may"
                error = LlmqError(words, "queue_full")
                error.retry_after = 1
                raise error
            pieces.append(piece)
        self.enter(Phase.BUSY)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def let_go(self) -> None:
        """The body at hand counts elsewhere from now on, or is gone."""
        if self.arrived:
            self.server.arriving_bytes -= self.arrived
            self.arrived = 0

    async def read_piece(self, decoder: Body) -> bytes:
        """What the next bytes add to a body."""
        data = await self.stream.more()
        if not data:
            raise ClientLeft("the client left before its request was complete")
        try:
            piece = decoder.feed(data)
        except ValueError as error:
            raise BadRequest(f"malformed body: {error}") from None
        self.stream.put_back(decoder.surplus)
        return piece

    def refuse(self, error: LlmqError) -> None:
        """Answer what could not be read as a request; nothing behind it will be."""
        body, ending = OPENAI.render_error(error), "Connection: close\r\n"
        if "*" in self.server.settings.server.cors_origins:
            ending += "Access-Control-Allow-Origin: *\r\n"
        head = (
            f"HTTP/1.1 {error.status} {REASONS[error.status]}\r\nDate: {self.server.date}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{NO_SNIFFING}{ending}\r\n"
        )
        self.stream.write(head.encode() + body)

    async def close(self) -> None:
        """Send what is left, then wait a little for the client to hang up first."""
        if self.stream.ended or self.stream.transport.is_closing():
            self.stream.abort()  # nobody is there to take what is left
            return
        self.enter(Phase.LINGER)
        if self.unsent:
            self.stream.transport.set_write_buffer_limits(high=0)
            await self.stream.drain()  # for as long as the client takes something
        while self.unsent and not self.stream.lost:  # noqa: ASYNC110 - TLS tells nobody what is below
            await asyncio.sleep(TLS_LOOK_SECONDS)
        if self.reset_at_end:
            raw = self.stream.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.stream.abort()
            return
        if self.stream.transport.can_write_eof():  # over TLS there is no half of a close
            self.stream.transport.write_eof()  # to close with input unread would destroy the answer
            await self.stream.linger(LINGER_SECONDS)
        else:  # asyncio waits 30 s for the client's word, before Python 3.11 without end
            loop = asyncio.get_running_loop()
            loop.call_later(LINGER_SECONDS, self.stream.transport.abort)

    def reap(self, now: float) -> None:
        """End what has taken too long; called four times a second."""
        unsent, settings = self.unsent, self.server.settings.server
        if unsent:
            sent = self.stream.written - unsent
            if sent != self.sent or not self.last_drained:
                self.sent, self.last_drained = sent, now
            elif now - self.last_drained >= settings.stall_timeout:
                self.stream.abort()
            return
        self.last_drained = 0.0
        if self.phase is Phase.BODY:
            if self.stream.received != self.seen:
                self.seen, self.last_received = self.stream.received, now
            elif now - self.last_received >= settings.body_timeout:
                late = RequestTimeout("the request body did not arrive in time")
                self.stream.interrupt(late)
        if self.deadline and now >= self.deadline:
            if self.phase is Phase.IDLE:
                self.stream.abort()
            else:
                self.stream.interrupt(RequestTimeout("the request did not arrive in time"))


class HttpServer:
    """Listens, and lets a handler answer each request."""

    def __init__(self, handler: Handler, settings: Settings, most: int) -> None:
        self.handler = handler
        self.settings = settings
        self.most = most  # connections that are served; a few more are told so
        self.connections: dict[Connection, asyncio.Task[None]] = {}
        self.arriving_bytes = 0  # bytes of bodies that are not here whole yet
        self.account = NO_ACCOUNT  # of whoever comes here, if it is somebody's own port
        self.tls: Any = None  # the `ssl.SSLContext` for it, if it speaks HTTPS
        self.closing = False
        self.date = ""
        self._servers: list[asyncio.Server] = []
        self.reap(time.monotonic())

    async def listen(self, host: str, port: int) -> int:
        """Open one listening socket; the port, which is new where 0 was asked for."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return await self.listen_on(socket.create_server((host, port), family=family))

    async def listen_on(self, listening: socket.socket) -> int:
        """Let in whom this socket brings; its port."""
        loop, opening = asyncio.get_running_loop(), functools.partial(Stream, self._opened)
        limit = min(HANDSHAKE_SECONDS, self.settings.server.head_timeout) if self.tls else None
        server = await loop.create_server(
            opening,
            sock=listening,
            backlog=ACCEPT_BURST,
            ssl=self.tls,
            ssl_handshake_timeout=limit,
        )
        listening.listen(BACKLOG)  # asyncio takes one number for both
        self._servers.append(server)
        return int(listening.getsockname()[1])

    def _opened(self, stream: Stream) -> None:
        stream.transport.set_write_buffer_limits(high=ANSWER_BUFFER)
        raw = stream.transport.get_extra_info("socket")  # asyncio does not know that ours are TCP
        with contextlib.suppress(OSError):  # it has gone already
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) >= self.most + SPARE_CONNECTIONS and not self._make_room():
            stream.abort()
            return
        connection = Connection(self, stream)
        peer = stream.transport.get_extra_info("peername") or ("",)  # it may have gone
        connection.address = plain_address(peer[0])
        task = asyncio.get_running_loop().create_task(connection.run())
        self.connections[connection] = task

    def _make_room(self) -> bool:
        """Hang up on the oldest connection on which nothing has been going on for a moment."""
        now = time.monotonic()
        for connection in self.connections:
            if connection.idle and now - connection.since >= IDLE_GRACE:
                del self.connections[connection]
                connection.stream.abort()
                return True
        return False

    def reap(self, now: float) -> None:
        self.date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        for connection in list(self.connections):
            connection.reap(now)
        self.limit_unsent()

    def limit_unsent(self) -> None:
        """Hang up on those furthest behind when all answers on their way hold more than they may.

        Then a quarter is free again, so that not each answer that follows costs somebody theirs.
        """
        unsent = {each: each.unsent for each in self.connections if each.unsent}
        most = self.settings.queue.max_queued_bytes * 7 // 8  # asyncio's buffers keep room to spare
        total = sum(unsent.values())
        if total <= most:
            return
        for connection in sorted(unsent, key=unsent.__getitem__, reverse=True):
            if total > most - most // 4:
                total -= unsent[connection]
                log.warning("hung up on a client that took too little of its answer")
                connection.stream.abort()

    def stop_accepting(self) -> None:
        """Leave who comes now to whoever else holds the sockets; those inside are answered."""
        self.closing = True
        loop = asyncio.get_running_loop()
        for server in self._servers:
            if os.name == "nt":  # its loop has no readers to remove
                server.close()
            for listening in server.sockets:  # closing them could lose one just being accepted
                loop.remove_reader(listening.fileno())

    def stop_listening(self) -> None:
        """Give the port back; those inside are answered, and each then goes."""
        self.stop_accepting()
        for server in self._servers:
            server.close()
        self.quiesce()

    def quiesce(self) -> None:
        """Answer what is being answered, then close each connection; idle ones at once."""
        self.closing = True
        for connection in list(self.connections):
            if connection.idle or (connection.phase is Phase.LINGER and not connection.unsent):
                connection.stream.abort()

    async def close(self) -> None:
        """Stop listening and end every connection, whatever it does."""
        self.stop_accepting()
        for _ in range(2):  # turns of the loop, in which one just accepted becomes a connection
            await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.stream.abort()
        tasks = list(self.connections.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=LINGER_SECONDS)
            for task in late:
                task.cancel()


# ==== 27. Upstream ================================================================================
# The runners' side: connections to backends, one request at a time on each, kept for the next while
# they are known to be clean.  What breaks is translated here, where it is met.  Every request to a
# runner, llmq's own included, is rendered in one place.

POOL_SECONDS = 4.0  # an idle backend connection is kept; llama.cpp closes at 5
BLANK_LIMIT = MIB  # bytes of white space in front of an answer
HEADS_LIMIT = 100  # of one answer, interim ones and its own
FETCHED = 8 * MIB  # of an answer that llmq itself asked for
FETCH_LINES = b"Accept: application/json\r\nConnection: close\r\n"


def render_request(
    backend: Backend, method: str, target: str, lines: bytes, body: bytes | None = None
) -> bytes:
    """A request to this backend, with these header lines; without a body it has no length."""
    length = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
    first = f"{method} {backend.base}{target} HTTP/1.1\r\n".encode("latin-1")
    if backend.settings.headers:  # they go in place of any other of the same names
        named = [(line, line.partition(b":")[0].decode()) for line in lines.splitlines(True)]
        lines = b"".join(line for line, name in named if name.lower() not in backend.headers)
    return b"".join([first, backend.request_lines, lines, length, b"\r\n", body or b""])


class Upstream:
    """A connection to a backend; one request at a time, kept for the next if all went well."""

    def __init__(self, url: str, stream: Stream) -> None:
        self.url = url
        self.stream = stream
        self.body: Body = CloseBody()
        self.keep_for = 0.0  # seconds that the backend keeps it idle
        self.keep_until = 0.0  # monotonic, while idle
        self._keep_alive = False
        self._mark = 0  # bytes received before the request at hand was sent

    def send(self, wire: bytes) -> None:
        """One request, in one write."""
        self._mark, self._keep_alive = self.stream.received, False
        self.stream.write(wire)

    async def push(self, piece: bytes, limit: float) -> None:
        """More of a request; a backend that takes nothing for so many seconds is hung up on."""

        def give_up() -> None:
            self.stream.interrupt(BackendTimeout(f"the backend took nothing for {limit:g} s"))
            self.stream.abort()

        self.stream.write(piece)
        timer = asyncio.get_running_loop().call_later(limit, give_up)
        try:
            await self.stream.drain()
        except ConnectionError:
            pass  # its answer, or the lack of one, says why it takes no more
        finally:
            timer.cancel()

    @property
    def answered(self) -> bool:
        """Whether any byte of an answer has come."""
        return self.stream.received > self._mark

    async def read_head(self) -> ResponseHead:
        """The head of the answer, interim ones skipped; raises what broke it."""
        try:
            for _ in range(HEADS_LIMIT):
                raw = await self.stream.read_head()
                if not raw.endswith(HEAD_END):
                    raise self._broken_head(raw)
                head = parse_response_head(raw)
                if head.status >= 200 or head.status == 101:
                    break
            else:
                raise ValueError("one interim answer after the other")
            self.body = body_decoder(response_length(head))
        except ValueError as error:
            raise BackendError(f"the backend's answer is not HTTP: {error}") from None
        self._keep_alive = head.minor >= 1 and "close" not in connection_options(head.headers)
        announced = head.headers.get("keep-alive")
        seconds = re.search(r"timeout=(\d{1,6})", announced) if announced else None
        self.keep_for = min(POOL_SECONDS, int(seconds[1]) - 1.0) if seconds else POOL_SECONDS
        return head

    def _broken_head(self, raw: bytes) -> BackendError:
        if len(raw) > HEAD_LIMIT:
            return BackendError("the head of the backend's answer is too large")
        if self.answered:
            return BackendBroke("the backend broke off inside the head of its answer")
        return BackendUnreached("the backend closed the connection without an answer")

    async def read_piece(self) -> bytes:
        """The next bytes of the body, b'' at its end; BackendError when it is cut or malformed."""
        body = self.body
        while not body.done:
            data = await self.stream.more()
            if not data and self.stream.broken:
                raise BackendBroke("the backend broke the connection")
            try:
                payload = body.feed(data)
            except ValueError as error:
                broken = BackendError if data else BackendBroke
                raise broken(f"the backend's answer is broken: {error}") from None
            if payload:
                return payload
        return b""

    async def read_rest(self, limit: int, received: Callable[[], None] | None = None) -> bytes:
        """The rest of the body, at once; `received` is called for each piece."""
        body = self.body
        if isinstance(body, LengthBody) and 0 < body.wants <= min(limit, self.stream.unread):
            if received is not None:  # it is here whole, as most are
                received()
            return body.feed(self.stream.take(body.wants))
        pieces: list[bytes] = []
        size, blank = 0, True
        while not self.body.done:
            piece = await self.read_piece()
            size += len(piece)
            blank = blank and (not piece or piece.isspace())
            if received is not None:
                received()
            if size > limit:
                raise BackendError(f"the backend's answer is larger than {limit} bytes")
            if blank and size > BLANK_LIMIT:
                raise BackendError("the backend's answer is nothing but white space")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def reusable(self) -> bool:
        stream, body = self.stream, self.body
        whole = body.done and not body.surplus and not stream.unread
        return self._keep_alive and whole and not stream.ended and stream.error is None

    async def close(self) -> None:
        """Close, and return when it is closed: only then may the slot be handed on."""
        self.stream.abort()
        await self.stream.closed()


@functools.lru_cache(maxsize=1)
def tls_context() -> Any:
    """Made once: it reads every certificate of the system, for 30 ms."""
    import ssl

    return ssl.create_default_context()


async def addresses(host: str, port: int) -> list[str]:
    """The addresses of a name: a name that is slow to be found delays nothing else."""
    if is_address(host):
        return [host]
    find = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys([str(found[4][0]) for found in await in_thread(find)]))


async def dial(url: str, tls: Any = None) -> Upstream:
    """A fresh connection to where a url says; OSError when nobody is there, OutOfFiles."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        tls = tls or tls_context()
    host, port = parts.hostname or "", parts.port or (443 if tls else 80)
    failure = OSError(f"{host} has no address")
    for address in await addresses(host, port):
        try:
            return await dial_address(url, address, port, tls, host)
        except OSError as error:  # noqa: PERF203 - the next address may do
            failure = error
    raise failure


async def dial_address(url: str, address: str, port: int, tls: Any, host: str) -> Upstream:
    loop, name = asyncio.get_running_loop(), host if tls else None
    try:
        _, stream = await loop.create_connection(
            Stream, address, port, ssl=tls, server_hostname=name
        )
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OutOfFiles("llmq has no more open files: raise their limit") from None
        raise
    return Upstream(url, stream)


def os_error_text(error: Exception) -> str:
    """What the system says of a failed connection, without the address that everybody knows."""
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno).lower()
    return (isinstance(error, OSError) and error.strerror) or str(error)


async def connect_within(
    seconds: float, dialling: asyncio.Task[Upstream], backend: Backend
) -> Upstream:
    """The connection that is being made, within a time; BackendUnreached where none comes."""
    try:
        late = BackendUnreached(f"connecting to {backend.name} timed out")
        return await within(seconds, dialling, late)
    except (OSError, UnicodeError) as error:
        words = f"cannot connect to {backend.name}: {os_error_text(error)}"
        raise BackendRefused(words) from None


async def fetch(
    backend: Backend, path: str, body: bytes | None = None, lines: bytes = b"", tls: Any = None
) -> tuple[ResponseHead, bytes]:
    """What a GET, or a POST of this JSON, is answered with; raises OSError, BackendError."""
    upstream = await dial(backend.origin, tls)
    try:
        method = "GET" if body is None else "POST"
        lines += FETCH_LINES + (b"" if body is None else b"Content-Type: application/json\r\n")
        upstream.send(render_request(backend, method, path, lines, body))
        return await upstream.read_head(), await upstream.read_rest(FETCHED)
    finally:
        await upstream.close()


async def fetch_json(backend: Backend, path: str) -> Any:
    """The JSON that a GET is answered with, None for all else; raises OSError, BackendError."""
    head, body = await fetch(backend, path)
    return await parse_answer(body) if head.status == HTTPStatus.OK else None


async def parse_answer(body: bytes) -> Any:
    """A body parsed, None where it is not JSON; a long one beside the event loop."""
    if not is_heavy(body):
        return parse_json(body)
    return await beside(functools.partial(parse_parts, body))


class Pool:
    """Idle connections to the backends by origin, the latest used first."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Upstream]] = {}

    def take(self, url: str, now: float) -> Upstream | None:
        """A connection that is open as far as can be known."""
        idle = self._idle.get(url, [])
        while idle:
            upstream = idle.pop()
            upstream.stream.on_end = None
            if now < upstream.keep_until and upstream.reusable:  # what came meanwhile is no answer
                return upstream
            upstream.stream.close()
        return None

    def give(self, upstream: Upstream, now: float) -> None:
        upstream.keep_until = now + upstream.keep_for
        idle = self._idle.setdefault(upstream.url, [])
        idle.append(upstream)
        upstream.stream.on_end = functools.partial(self._drop, idle, upstream)

    def _drop(self, idle: list[Upstream], upstream: Upstream) -> None:
        if upstream in idle:
            idle.remove(upstream)
        upstream.stream.close()

    def reap(self, now: float) -> None:
        for url, idle in list(self._idle.items()):
            for upstream in [one for one in idle if now >= one.keep_until]:
                self._drop(idle, upstream)
            if not idle:
                del self._idle[url]

    def close(self) -> None:
        self.reap(float("inf"))


# ==== 28. Probes ==================================================================================
# What a backend has and how it does, found by asking: from time to time, at once after trouble, and
# when a request names a model that nobody has.

REFRESH_SECONDS = 1.0  # between two looks that requests for unknown models cause
LOCAL = "local"  # the device of this box's backends that name none
BESIDE = 8  # questions to a runner at once that no slot counts


class SelfFound(Exception):
    """The backend is this very llmq."""


async def inspect(backend: Backend, instance: str) -> Report:
    """One look at a backend; raises OSError, LlmqError, ValueError or SelfFound."""
    began = time.monotonic()
    version = backend.report.version if backend.report else ""
    if backend.state is not State.UP:
        answer = await fetch_json(backend, "/api/version")
        if look_up(answer, "instance") == instance:
            raise SelfFound("this is llmq itself")
        version = printable(str(look_up(answer, "version") or ""))
    head, body = await fetch(backend, "/v1/models")
    latency = time.monotonic() - began
    facts = {"object": "model", "created": 0, "owned_by": "llmq"}
    fixed = tuple({"id": name, **facts} for name in backend.settings.models)
    if head.status != HTTPStatus.OK and not fixed:  # else whatever it answers will do
        raise read_refusal(head, body, backend.key, backend.secrets)
    entries = fixed or read_models(await parse_answer(body))
    models = tuple(str(entry["id"]) for entry in entries)
    kind = backend.kind or kind_by_owner(entries) or await identify_kind(backend)
    path = KINDS[kind].loaded_path
    shown = await fetch_json(backend, path) if path else {"data": entries}
    loaded = read_loaded(kind, shown)
    if path == LMSTUDIO:  # which tells at its own route only what its models can
        details = {str(row.get("id")): row for row in sound_rows(look_up(shown, "data"))}
        entries = tuple({**details.get(str(entry["id"]), {}), **entry} for entry in entries)
    if kind == "llamacpp" and len(entries) == 1:  # in router mode that would tell of the router
        props = await fetch_json(backend, "/props")
        told, slot = read_props(props), look_up(props, "default_generation_settings", "n_ctx")
        entries = ({"capabilities": told, **entries[0]},) if told else entries
        if type(slot) is int and slot > 0:  # of the context that it was trained for
            entries = ({**entries[0], "max_model_len": slot},)
    if not KINDS[kind].native:
        return Report(kind, entries, models, loaded, latency, began=began)
    tags = sound_rows(look_up(await fetch_json(backend, "/api/tags"), "models"))
    running = sound_rows(look_up(shown, "models"))
    return Report(kind, entries, models, loaded, latency, tags, running, began, version)


def read_props(props: Any) -> list[str]:
    """What llama.cpp's model can, in Ollama's words."""
    caps, template = look_up(props, "chat_template_caps"), look_up(props, "chat_template")
    thinks = isinstance(template, str) and "enable_thinking" in template
    told = {
        "tools": look_up(caps, "supports_tools"),
        "vision": look_up(props, "modalities", "vision"),
        "thinking": look_up(caps, "supports_preserve_reasoning") or thinks,
    }
    known = ["completion"] if {type(told["tools"]), type(told["vision"])} & {bool} else []
    return known + [word for word, can in told.items() if can is True]


async def identify_kind(backend: Backend) -> str:
    """The kind of a runner whose list of models does not give it away."""
    for kind in KINDS.values():
        path, member = kind.mark
        payload = await fetch_json(backend, path) if path else None
        if isinstance(payload, dict) and member in payload:
            return kind.name
    return "openai"


class Asked:
    """A question to a runner, and how many wait for its answer."""

    def __init__(self, doing: Coroutine[Any, Any, tuple[ResponseHead, bytes]]) -> None:
        self.task = asyncio.ensure_future(doing)
        self.askers = 0

    async def answer(self, reply: Reply | None) -> tuple[ResponseHead, bytes]:
        """The answer; ClientLeft when the client of this reply leaves, and the last ends it."""
        mine = asyncio.shield(self.task)
        self.askers += 1
        try:
            if reply is not None:
                reply.watch(mine.cancel)
            return await mine
        except asyncio.CancelledError:
            if reply is not None and reply.gone:
                raise ClientLeft("the client left") from None
            raise
        finally:
            self.askers -= 1
            if not self.askers:
                self.task.cancel()
            del mine


def is_answer(error: Exception, backend: Backend) -> bool:
    """Whether it is the answer of a runner that is no worse for it: that is up, or wants a key."""
    if isinstance(error, BackendAnswer) and error.status in (401, 403):
        return True
    broke = isinstance(error, BackendError) and error.unhealthy
    said = isinstance(error, (LlmqError, ValueError)) and not broke
    return backend.state is State.UP and said


class Monitor:
    """Keeps what llmq knows of its backends fresh."""

    def __init__(self, settings: Settings, fleet: Fleet, metrics: Metrics, instance: str) -> None:
        self.settings = settings
        self.fleet = fleet
        self.metrics = metrics
        self.instance = instance  # of this llmq
        self.news = asyncio.Event()  # some probe has ended
        self.refreshed = float("-inf")
        self.closed = False
        self._flights: dict[Backend, asyncio.Task[None]] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}  # by origin
        self._asked: dict[Any, Asked] = {}  # by all that is said

    def probe_due(self) -> None:
        """Start a probe of each backend that is due and has none under way."""
        now = time.monotonic()
        for backend in list(self.fleet.backends.values()):
            if now >= backend.next_probe and not self.closed:
                self.start_probe(backend)

    def probe_now(self, backend: Backend) -> None:
        """What it has, has changed: no look that began before tells of it."""
        backend.changed = time.monotonic()
        backend.next_probe = 0.0
        self.probe_due()

    def start_probe(self, backend: Backend) -> asyncio.Task[None]:
        if backend not in self._flights:
            self._flights[backend] = asyncio.ensure_future(self.probe(backend))
        return self._flights[backend]

    async def refresh(self) -> None:
        """A fresh look at every backend, shared by all who want one, at most one a second."""
        now = time.monotonic()
        fresh = now - self.refreshed < REFRESH_SECONDS
        self.refreshed = self.refreshed if fresh else now
        backends = list(self.fleet.backends.values())
        due = [self._flights.get(each) if fresh else self.start_probe(each) for each in backends]
        flights = {flight for flight in due if flight is not None}
        if flights:
            await asyncio.wait(flights)
        await self.catch_up()

    async def catch_up(self) -> None:
        """A look at each backend that was never looked at, or not since what it has was changed."""
        for _ in range(2):  # one may be under way that began before
            behind = [
                self.start_probe(each)
                for each in self.fleet.backends.values()
                if (each.state is State.UNKNOWN and not each.failures)
                or (each.usable and each.report and each.report.began < each.changed)
            ]
            if behind:
                await asyncio.wait(behind)

    async def probe(self, backend: Backend) -> None:
        limit, interval = backend.limits.probe_timeout, backend.limits.probe_interval
        looking = asyncio.ensure_future(inspect(backend, self.instance))
        try:
            report = await within(limit, looking, BackendTimeout("does not answer"))
            for name in set(report.loaded).difference((backend.report or report).loaded):
                self.metrics.add("llmq_model_loads_total", backend.name, name)
            backend.succeeded(time.monotonic(), report, interval)
        except (OSError, LlmqError, ValueError, SelfFound) as error:
            now = time.monotonic()
            if isinstance(error, BackendTimeout) and now - backend.last_received < LATELY:
                backend.next_probe = now if backend.needs_probe else now + interval  # at work
            elif isinstance(error, OutOfFiles):
                backend.next_probe = now + interval
            else:
                self.record_failure(backend, error, now)
        except Exception:
            log.exception("probe failed")
            backend.failed(time.monotonic(), "cannot be understood; the log says how", interval)
        finally:
            self._flights.pop(backend, None)
            self.news.set()

    async def ask(
        self,
        seconds: float,
        backend: Backend,
        path: str,
        body: bytes,
        lines: bytes = b"",
        reply: Reply | None = None,
    ) -> Facts:
        """The JSON object that a POST beside the queue is answered with; LlmqError for all else.

        What is asked twice at a time is asked once, and ends when all who wait for it have left.
        """
        turns = self._turns.setdefault(backend.origin, asyncio.Semaphore(BESIDE))

        async def take_turn() -> tuple[ResponseHead, bytes]:
            async with turns:
                return await fetch(backend, path, body, lines)

        key = (backend, path, body, lines)
        asked = self._asked.get(key)
        if asked is None:
            late = BackendTimeout(f"{backend.name} did not answer {path} in {seconds:g} s")
            doing = within(seconds, asyncio.ensure_future(take_turn()), late)
            asked = self._asked[key] = Asked(doing)
            del late, doing
        try:
            head, answer = await asked.answer(reply)
        except (OSError, LlmqError) as error:
            error.__traceback__ = None  # its frames hold the body
            if isinstance(error, LlmqError):
                raise error  # noqa: TRY201 - a bare one has its frames again on Python 3.9
            raise BackendUnreached(f"{backend.name}: {os_error_text(error)}") from None
        finally:
            if not asked.askers:  # nobody may join a question that has been given up
                self._asked.pop(key, None)
            del asked  # an error that leaves here holds this frame, and this frame the error
        if head.status != HTTPStatus.OK:
            raise read_refusal(head, answer, backend.key, backend.secrets)
        facts = parse_json(answer)
        if not isinstance(facts, dict):
            raise BackendError("the backend's answer is not a JSON object")
        return facts

    async def learn(self, backend: Backend, model: str) -> None:
        """Ask an Ollama once what a model can, and the longest context that it can have."""
        key, version = model_key(model), backend.version(model_key(model))
        before = backend.shown.get(key, ("",))[0]
        if before == version:
            return
        body, facts = render_json({"model": backend.name_for(model)}), {}
        with contextlib.suppress(LlmqError):
            facts = await self.ask(backend.limits.probe_timeout, backend, "/api/show", body)
        info = facts.get("model_info")
        told = info.items() if isinstance(info, dict) else ()
        lengths = [one for name, one in told if name.endswith(".context_length")]
        longest = max([0, *(one for one in lengths if type(one) is int)])
        if before or not backend.contexts.max.get(key):  # else its list has told
            backend.contexts.max[key] = longest
        if key in backend.shown or len(backend.shown) < MODELS_LIMIT:
            backend.shown[key] = version, read_abilities(facts)

    def record_outcome(self, backend: Backend, failure: LlmqError | None, now: float) -> None:
        """What a request's end says about the health of its backend."""
        if failure is None:
            backend.succeeded(now, None, backend.limits.probe_interval)
        elif isinstance(failure, BackendError) and failure.unhealthy:
            if not isinstance(failure, BackendLoading):
                backend.needs_probe |= isinstance(failure, BackendUnreached)
                backend.changed = now
            self.record_failure(backend, failure, now)
            self.probe_due()

    def record_failure(self, backend: Backend, error: Exception, now: float) -> None:
        interval = backend.limits.probe_interval
        if isinstance(error, SelfFound):
            backend.refuse(now, str(error), interval)
        elif isinstance(error, BackendLoading):
            backend.loads(now, error.message)
        elif is_answer(error, backend):
            backend.answered(now, str(error), interval)
        else:
            refused = isinstance(error, (ConnectionRefusedError, BackendRefused))
            backend.failed(now, os_error_text(error), interval, refused=refused)

    def close(self) -> None:
        self.closed = True
        for flight in self._flights.values():
            flight.cancel()


def is_this_box(host: str) -> bool:
    """Whether a backend's host is a name or address of this very box."""
    own = socket.gethostname().lower()
    if is_loopback(host) or host.lower() in (own, own + ".local"):
        return True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        if is_address(host):  # looking up a name could take long
            probe.bind((host, 0))  # only an address of one's own can be bound
            return True
    return False


def device_name(settings: BackendSettings) -> str:
    """Backends on one host share one device, all names of this box are one host."""
    host = urlsplit(settings.url).hostname or ""
    return settings.device or (LOCAL if is_this_box(host) else host)


class Discovery:
    """Looks for runners on this box while none is configured."""

    def __init__(self, monitor: Monitor, added: Mapping[str, Facts]) -> None:
        self.monitor, self.added = monitor, added  # raw rows of [backends], at run time
        self.settings, self.fleet = monitor.settings, monitor.fleet
        # An Ollama may come at any time; the others must identify themselves.
        self.found = {"ollama": BackendSettings(url=KINDS["ollama"].url)}

    def configure(self) -> None:
        """Have the backends that are configured, else those found, and those that were added."""
        own = self.settings.backends
        rows = {**(own or self.found), **parse_rows("added", "backends", self.added), **own}
        places = {name: device_name(row) for name, row in rows.items()}
        self.fleet.configure(rows, places, self.settings, time.monotonic())

    async def step(self) -> None:
        """One round over the places where runners listen by default."""
        known = {backend.url for backend in self.fleet.backends.values()}
        kinds = [kind for kind in KINDS.values() if kind.url and kind.url not in known]
        if self.settings.backends or not kinds:
            return
        tasks = [asyncio.ensure_future(self.try_place(kind)) for kind in kinds]
        try:
            await asyncio.wait(tasks, timeout=self.settings.upstream.probe_timeout)
        finally:
            for task in tasks:
                task.cancel()

    async def try_place(self, kind: Kind) -> None:
        probe = Backend(kind.name, BackendSettings(url=kind.url), Device("", 1))
        try:
            report = await inspect(probe, self.monitor.instance)
        except (OSError, LlmqError, ValueError, SelfFound):
            return
        if report.kind == kind.name and not self.settings.backends:  # else configured since
            self.found[kind.name] = BackendSettings(url=kind.url, kind=kind.name)
            self.configure()


# ==== 29. Cards ===================================================================================
# The graphics memory of this box, as a tool or the files of its system tell it.  It is looked at in
# the background, and only while somebody may want to know: never for a request.

NVIDIA_QUERY = (
    "--query-gpu=name,memory.total,memory.used,utilization.gpu", "--format=csv,noheader,nounits"
)  # fmt: skip
SYSFS = "/sys/class/drm"
# Older systems do not know the last, and end with an error there.
APPLE_QUERY = ("hw.memsize", "machdep.cpu.brand_string", "iogpu.wired_limit_mb")
APPLE_SHARE = ((36 * 1024, 2 / 3), (math.inf, 3 / 4))  # of memory that the GPU may have, MiB
CARDS_SECONDS = 1.0  # between two looks at whether they are due to be looked at
TOOL_SECONDS = 5.0  # for such a tool to answer: a hanging driver makes it hang
KILL_SECONDS = 1.0  # for one that is killed to end
CARDS_WANTED = 300.0  # seconds that cards are looked at after somebody asked


class Card(NamedTuple):
    """A graphics card; memory in MiB."""

    name: str
    total: int
    used: int | None = None  # None: not told
    busy: int | None = None  # per cent


def parse_nvidia(text: str) -> list[Card]:
    """What nvidia-smi answers to NVIDIA_QUERY, a line for each card; ValueError for other words."""
    cards = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.rsplit(",", 3)]
        if len(cells) != 4:
            raise ValueError(printable(line, ERROR_SHOWN))
        name, *told = cells
        total, used, busy = [int(cell) if cell.isdecimal() else None for cell in told]
        if total:  # one that shares the box's memory does not tell it
            cards.append(Card(printable(name), total, used, busy))
    return cards


def parse_apple(text: str) -> list[Card]:
    """What sysctl tells of APPLE_QUERY: memory that processor and GPU share."""
    facts = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    memory, name, limit = (facts.get(name, "") for name in APPLE_QUERY)
    if not memory.isdecimal():
        raise ValueError("sysctl does not tell of memory")
    if "Intel" in name:  # whose GPU no runner uses
        return []
    total = int(memory) // MIB
    share = next(share for most, share in APPLE_SHARE if total <= most)
    wired = int(limit) if limit.isdecimal() else 0
    return [Card(printable(name or "Apple"), wired or int(total * share))]


def read_amd(root: str = SYSFS) -> list[Card]:
    """The cards whose driver tells of their memory in files, as amdgpu does."""
    cards = []
    for path in sorted(glob.glob(os.path.join(root, "card[0-9]*", "device"))):

        def number(name: str, path: str = path) -> int | None:
            with contextlib.suppress(OSError, ValueError), open(os.path.join(path, name)) as file:
                return int(file.read(64))
            return None

        total, used = number("mem_info_vram_total"), number("mem_info_vram_used")
        if total:
            name = f"AMD {os.path.basename(os.path.dirname(path))}"
            held = None if used is None else used // MIB
            cards.append(Card(name, total // MIB, held, number("gpu_busy_percent")))
    return cards


async def output_of(*argv: str, checked: bool = True) -> str:
    """What a command prints; OSError or ValueError where it hangs, or fails if that is checked."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # so that its children can be ended with it
    )
    late = ValueError(f"{argv[0]} does not answer")
    try:
        told, _ = await within(TOOL_SECONDS, asyncio.ensure_future(process.communicate()), late)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=KILL_SECONDS)
    text = told.decode("utf-8", "replace")
    if process.returncode and checked:
        raise ValueError(printable(text.strip().partition("\n")[0], ERROR_SHOWN) or "failed")
    return text


async def read_cards(tool: str) -> tuple[str, list[Card], str | None]:
    """Who makes the cards of this box, what they tell, and what went wrong in asking."""
    maker, error = "none", None
    try:
        if sys.platform == "darwin":
            return (
                "apple",
                parse_apple(await output_of("sysctl", *APPLE_QUERY, checked=False)),
                None,
            )
        path = shutil.which(tool)
        if path:
            maker = "nvidia"
            return maker, parse_nvidia(await output_of(path, *NVIDIA_QUERY)), None
    except (OSError, ValueError) as failure:
        error = str(failure)
    cards = read_amd()
    return ("amd", cards, None) if cards else (maker, [], error)


class Cards:
    """What is known of graphics memory: what cards tell, what is configured, what is loaded."""

    def __init__(self, settings: Settings, fleet: Fleet) -> None:
        self.settings, self.fleet = settings, fleet
        self.maker = "none"
        self.cards: list[Card] = []
        self.error: str | None = None
        self.looked = self.wanted = float("-inf")  # monotonic
        self.flight: asyncio.Future[None] | None = None  # a look that is under way

    async def step(self) -> None:
        """Look at the cards, if that is due and somebody may want to know; all share one look."""
        now = time.monotonic()
        wanted = bool(self.settings.routes) or now - self.wanted < CARDS_WANTED
        due = wanted and now - self.looked >= self.settings.router.gpu_interval
        if due and self.flight is None:
            self.flight = asyncio.ensure_future(self.look())
        if self.flight is not None:
            await asyncio.shield(self.flight)

    async def look(self) -> None:
        try:
            self.maker, self.cards, error = await read_cards(self.settings.router.nvidia_smi)
        finally:
            self.looked, self.flight = time.monotonic(), None
        if error and error != self.error:
            log.warning("graphics memory: %s", error)
        self.error = error

    async def close(self) -> None:
        """End a look that is under way, and what it runs."""
        if self.flight is not None:
            self.flight.cancel()
            await asyncio.wait({self.flight})

    def want(self) -> None:
        """Somebody may want to know soon."""
        self.wanted = time.monotonic()

    def memory_of(self, device: str) -> VideoMemory | None:
        """The graphics memory of a device, None where nothing tells it."""
        row = self.settings.devices.get(device, DeviceSettings())
        cards = self.cards if device == LOCAL and not row.vram_gb else []
        total = row.vram_gb or sum(card.total for card in cards) / KIB
        if not total:
            return None
        used = [card.used for card in cards if card.used is not None]
        if cards and len(used) == len(cards):
            free = total - sum(used) / KIB
        else:
            free = total - self.loaded_at(device)
        return VideoMemory(total, free, row.vram_reserve_gb)

    def loaded_at(self, device: str) -> float:
        """GiB that the models loaded there take, as far as their runners tell."""
        here = [one for one in self.fleet.backends.values() if one.device.name == device]
        rows = [row for one in here if one.report for row in one.report.running]
        sizes = [measured(row.get("size_vram")) or 0 for row in rows]
        return sum(sizes) / GIB


# ==== 30. Calls ===================================================================================
# A call is one request on its way: who asked, what for, and how far it has come.  What happens at
# the backend that it was given to is told here, from the bytes sent there to the end of its answer.

RELAYED_REQUEST = (
    "accept", "content-type", "user-agent", "openai-beta", "anthropic-version", "anthropic-beta",
    "traceparent",
)  # fmt: skip
RELAYED_ANSWER = frozenset(("openai-processing-ms", "retry-after"))
RATE_LIMITS = "x-ratelimit-"
ERROR_BODY = 1 * MIB  # of a backend's error answer that is read
NEVER = float("inf")
NO_HEADERS: Headers = {}


def relayed_lines(headers: Headers, names: Names = RELAYED_REQUEST) -> bytes:
    """What a backend is told of a request's own header fields."""
    lines = [f"{name}: {headers[name]}\r\n" for name in names if name in headers]
    return "".join(lines).encode("latin-1")


SESSION_HEADERS = {
    "x-claude-code-session-id", "x-session-id", "session-id", "x-session-affinity",
    "x-openwebui-chat-id",
}  # fmt: skip
NEVER_RELAYED = {*KEY_FIELDS, *OWN_FIELDS, *RELAYED_REQUEST}  # or in any case
UNASKED = re.compile("cookie|origin|x-llmq-.*|x-queue-priority")  # which `*` does not mean


def more_names(headers: Headers, wanted: Names) -> Names:
    """The names of the header fields that are relayed because `relay_headers` says so."""
    never = NEVER_RELAYED | connection_options(headers)
    every = {name for name in headers if "*" in wanted and not UNASKED.fullmatch(name)}
    return tuple(name for name in every.union(map(str.lower, wanted)) - never if name in headers)


@functools.lru_cache(maxsize=64)
def common_lines(via: bytes, values: tuple[str | None, ...]) -> bytes:
    """The same for the usual fields, by their values: one object for all that send the same."""
    told = {name: value for name, value in zip(RELAYED_REQUEST, values) if value is not None}
    return via + relayed_lines(told)


RELAYED_TYPES = ("application/json", "application/x-ndjson", "text/event-stream", "text/plain")


def relayed_type(head: ResponseHead) -> str:
    """What an answer is passed on as: of any other type a browser might run what is in it."""
    told = head.headers.get("content-type", RELAYED_TYPES[0])
    if told in RELAYED_TYPES:
        return told
    plain = told.partition(";")[0].strip().lower()
    return told if plain in RELAYED_TYPES else "application/octet-stream"


ERRAND = Request("POST", "/llmq/models", 1, NO_HEADERS)  # of models to be loaded or unloaded
TOO_MANY = "the request holds more values than llmq translates"
TOO_LONG = re.compile("exceeds the (available )?context")  # how Ollama refuses a prompt


class Errand(NamedTuple):
    """Of a backend to load or unload a model."""

    action: str
    backend: Backend
    model: str  # as it is called there
    context: int = 0  # tokens asked for
    keep_alive: str = ""

    def request(self, usual: str) -> tuple[str, Facts]:
        """Where it is asked, and what; `usual` is how long an Ollama keeps the model."""
        kind, loads = self.backend.traits, self.action == "load"
        load, unload, length, instance = kind.errands
        path = load if loads else unload
        facts: Facts = {"model" if loads else instance: self.model}
        if kind.native:
            path = OLLAMA_EMBED if loads and EMBEDDING.search(self.model) else path
            keep_alive = as_keep_alive(self.keep_alive or usual) if loads else 0
            facts.update(stream=False, input="" if path in EMBEDS else None, keep_alive=keep_alive)
        elif loads and length:
            shared = self.backend.contexts.shared(model_key(self.model))
            facts[length] = self.context or shared or None
        return path, facts


def bounded(asked: Facts, limits: Names, most: int) -> Facts:
    """What those limits are to be that ask for more tokens than this, or for any number."""
    counts = {name: whole_number(asked.get(name)) or 0 for name in limits}
    good = [tokens for tokens in counts.values() if 0 < tokens <= most]
    odd = [name for name in limits if counts[name] not in good]
    return {name: min([*good, most]) for name in odd if name in (*asked, limits[0])}


def with_policy(body: bytes, route: str, policy: ModelSettings) -> bytes:
    """A request for this route as the settings of its model want it; all else as it was."""
    wished = policy.set or policy.strip or policy.max_output or policy.keep_alive
    if not wished and policy.overflow != "refuse":
        return body
    found, endpoint, put = read_object(decode_json(body)), ENDPOINTS[route], dict(policy.set)
    inner = put.get("options") if endpoint.options else None
    options = dict(inner) if isinstance(inner, dict) else {}
    if policy.max_output and endpoint.limits:
        place = options if endpoint.options else put
        asked = (found.values.get("options") or {}) if endpoint.options else found.values
        place.update(bounded({**asked, **place}, endpoint.limits, policy.max_output))
    said = "keep_alive" in found.values and not policy.keep_alive_force
    if route in NATIVE and policy.keep_alive and not said:
        put["keep_alive"] = as_keep_alive(policy.keep_alive)
    if route in NATIVE and policy.overflow == "refuse":
        put.update(truncate=False, shift=False)
    texts = {name: json.dumps(put[name]) for name in put if name not in ("model", "options")}
    if options:
        old = found.text[slice(*found.places.get("options", (0, 0, 0))[1:])]
        new = {name: json.dumps(options[name]) for name in options}
        texts["options"] = with_options(old, new)
    return rewrite(found, texts, tuple({*policy.strip}.difference(texts, ["model"]))).encode()


def as_keep_alive(text: str) -> int | str | None:
    """Ollama takes seconds as a number, all else as a text."""
    return int(text) if text.lstrip("-").isdecimal() else text or None


def reason_of(model: str, asked: str, reason: str) -> str:
    """Why it is that model, in words."""
    if reason == NO_CHOICE.reason and asked != model:
        return f"alias {asked}" if asked else "the default"
    return reason


@functools.lru_cache(maxsize=256)
def model_fields(model: str, asked: str, reason: str) -> Fields:
    """What an answer says of its model, and of why it is that one; in ASCII, as fields are."""
    reason = reason_of(model, asked, reason)
    rows = [("X-LLMQ-Model", model), ("X-LLMQ-Reason", reason)] if model else []
    return tuple(
        (name, printable(text, 1000).encode("ascii", "replace").decode()) for name, text in rows
    )


def show_choice(call: Call) -> Facts:
    """The member `router` of an answer, as agent-router's users know it."""
    ticket, choice = call.ticket, call.choice
    return {
        "mode": "sync",
        "taskType": choice.task,
        "selectedModel": call.model,
        "fallbackModels": choice.fallbacks,
        "queueTimeMs": round(1000 * (ticket.started - ticket.arrived)),
        "executionTimeMs": round(1000 * (time.monotonic() - ticket.started)),
        "decisionReason": reason_of(call.model, call.question.model, choice.reason),
    }


def why_late(call: Call, now: float) -> LlmqError | None:
    """What ends a call that runs: its backend sent nothing for too long, or it ran too long."""
    backend = call.ticket.backend
    if now >= call.deadline and backend is not None:
        limits = backend.limits
        limit = limits.idle_timeout if call.first_byte else limits.first_byte_timeout
        return BackendTimeout(f"the backend sent nothing for {limit:g} s")
    if call.wish.max_run and now - call.ticket.started >= call.wish.max_run:
        return LlmqError("it ran for as long as it may", "backend_timeout")
    return None


def with_router(body: bytes, call: Call) -> bytes:
    """A whole answer with the member `router`, where it is an object; all else as it was."""
    whole = body.strip()
    if whole[:1] != b"{" or call.question.stream:
        return body
    told, inside = b'"router":' + render_json(show_choice(call)), whole[:-1].rstrip()
    return inside + (b"" if inside == b"{" else b",") + told + b"}"


class Call:
    """One request on its way, and the Reply that it answers."""

    blind = False  # llmq knows nothing of its route: what goes and comes stays as it is
    rule = ""  # that gave it its class
    more: Headers = NO_HEADERS  # the header fields that some backend gets besides
    deadline = NEVER  # for the backend's next byte, monotonic
    heartbeats = 0  # that it got
    error: LlmqError | None = None  # why it was stopped or failed
    job = ""  # the job that it is
    later = ""  # when it may be answered later as a job: ALWAYS or BUSY
    asked: tuple[Headers, bytes] = (NO_HEADERS, b"")  # fields and body, to be asked anew then
    answer_key = b""  # of its answer in the cache; empty: it is not kept
    recalled = ""  # what the cache did for it: hit, joined or miss
    wish = NO_WISH  # what its member `router` asks for
    choice = NO_CHOICE  # of its model
    # At the backend at hand:
    route_asked: str | None = None
    translator: Translator | None = None  # if that is not the route of the client
    policy = NO_POLICY  # the settings of its model
    context = 0  # tokens that it was told to have
    told = ""  # the name that the backend knows the model by, where it is another
    echo: Callable[[bytes], bytes] | None = None  # then puts the client's in its place
    upstream: Upstream | None = None
    connecting: asyncio.Task[Upstream] | None = None
    # Its answer:
    watch: StreamWatch | None = None  # if it is streamed
    answer: bytes | None = None  # whole, or a stream's last bytes; ends the loop of `serve`
    answer_type = ""
    answer_headers: Fields = ()
    first_byte = 0.0  # monotonic
    tokens: int | None = None
    tokens_in: int | None = None  # of its prompt
    rate: float | None = None  # tokens per second, as the runner tells

    def __init__(
        self,
        reply: Reply,
        endpoint: Endpoint,
        request: Request,
        caller: Caller,
        ids: tuple[str, str],
    ) -> None:
        self.reply = reply
        self.turn = reply.waiter
        self.endpoint = endpoint
        self.request: Request | None = request  # until it is admitted
        self.caller = caller
        self.id, self.request_id = ids  # llmq's own, and the client's where it gave one
        self.route, self.query = request.path, request.query
        # What every call is given while it waits stands here too, so that all share the keys of
        # their dictionary (PEP 412): 400 bytes of each on Python 3.9.
        self.question, self.model = NO_QUESTION, ""  # the model as resolved, in the client's words
        self.lines = b""  # of the head of a request to a backend, those that every backend gets
        self.ticket: Ticket = cast(Any, None)  # once it is admitted
        self.patience = 0.0  # seconds without a byte after which the client gets one; 0: none
        self.heartbeat_at = NEVER  # when it is to get a sign of life, monotonic

    @property
    def admitted(self) -> bool:
        return self.request is None

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What an answer says of the way it took."""
        account, ticket = self.caller.account, self.ticket
        told = [*model_fields(self.model, self.question.model, self.choice.reason)]
        if not self.admitted:
            return told + account.class_line
        if ticket.backend is not None:
            waited = str(round(1000 * (ticket.started - ticket.arrived)))
            told += [("X-LLMQ-Backend", ticket.backend.name), ("X-LLMQ-Wait-Ms", waited)]
        if account is not NO_ACCOUNT:
            told += [("X-LLMQ-Class", ticket.priority.word)]
        return told

    # ---- what is sent

    def route_at(self, backend: Backend) -> str | None:
        """Where to ask: at the client's own route, or at Ollama's where only that can carry it."""
        question, key, routes = self.question, self.ticket.model, self.ticket.want.routes
        if self.blind:
            return self.route
        if backend.traits.native:
            policy, needs = self.policy, bool(question.context or question.keep_alive)
            if policy is not NO_POLICY and (policy.keep_alive or policy.overflow == "refuse"):
                needs = True
            if needs or (EMBEDDINGS not in routes and backend.contexts.shared(key)):
                routes = (*(one for one in routes if one in NATIVE), *routes)
        return backend.route_for(routes, key)

    def writer(self, backend: Backend) -> Callable[[], bytes]:
        """What writes the request as this backend is to get it; Untranslatable or BadRequest."""
        question, key, name = self.question, self.ticket.model, backend.name_for(self.model)
        route = self.route_asked = self.route_at(backend)
        if route is None:
            raise Untranslatable(f"{backend.name} does not speak {self.endpoint.path}")
        context = 0
        if route in NATIVE and (question.context or route not in EMBEDS):
            context = backend.contexts.request(key, question.context, backend.used)
        if context or self.context:
            self.context = context
        self.translator = self.echo = None
        if route == self.endpoint.path:
            if question.model not in ("", name) and not (self.blind or self.choice.auto):
                self.told, self.echo = name, model_echo(name, question.model)
            target = route + (f"?{self.query}" if self.query else "")
            body = functools.partial(question.body_for, name, context)
        else:
            if question.skipped:
                raise Untranslatable(TOO_MANY)
            target = route
            body = functools.partial(self.translated, route, name, context, backend.traits)
        lines = self.lines
        if self.more:
            lines += relayed_lines(self.more, more_names(self.more, backend.settings.relay_headers))

        def write() -> bytes:
            wanted = body()
            if self.policy is not NO_POLICY:
                wanted = with_policy(wanted, route, self.policy)
            return render_request(backend, "POST", target, lines, wanted)

        return write

    def translated(self, route: str, name: str, context: int, runner: Kind) -> bytes:
        """The body for another route."""
        translator = TRANSLATORS[self.endpoint.path, route]
        asked = json.loads(with_policy(self.question.body, self.endpoint.path, self.policy))
        asked.update({"model": self.model} if self.choice.auto else {})
        self.translator = translator(asked, name, context, time.time)
        self.translator.runner = runner
        return self.translator.body()

    # ---- what is answered

    async def ask(self, backend: Backend, limits: UpstreamSettings) -> None:
        """Ask the backend, and take its answer: pass a stream on, read a whole one.

        A pooled connection that turns out dead is replaced by a fresh one: nobody has read the
        request there, so that is no attempt.
        """
        head = None
        if self.upstream is not None:  # from the pool, and the request is sent
            try:
                head = await self.upstream.read_head()
            except BackendUnreached:
                await self.upstream.close()
                self.upstream = None
        if self.upstream is None:
            await self.connect(backend, limits.connect_timeout)
        assert self.upstream is not None  # by now
        await self.read_answer(head or await self.upstream.read_head(), backend, limits)

    async def connect(self, backend: Backend, seconds: float) -> None:
        """Send the request on a fresh connection; the call's own error where it was stopped."""
        write = self.writer(backend)
        wire = await beside(write, heavy=self.question.long)
        if self.error is not None:  # nobody waits for it any more
            raise self.error
        self.connecting = asyncio.ensure_future(dial(backend.origin))
        self.upstream = await connect_within(seconds, self.connecting, backend)
        if self.error is not None:
            raise self.error
        self.upstream.send(wire)

    async def read_answer(
        self, head: ResponseHead, backend: Backend, limits: UpstreamSettings
    ) -> None:
        """The answer behind a head: a stream passes by here, a whole one is read first."""
        upstream, received = self.upstream, functools.partial(self.received, backend, limits)
        assert upstream is not None  # `ask` has it
        if self.blind:  # whatever it is, it passes by
            self.watch = BlindWatch(self.endpoint.dialect)
            self.reply.start(head.status, relayed_type(head), self.headers)
            self.answer = await self.relay(self.watch, upstream, received)
            return
        if head.status != HTTPStatus.OK:
            raise self.refusal(backend, head, await upstream.read_rest(ERROR_BODY))
        if head.headers.get("content-encoding", "identity").lower() != "identity":
            raise BackendError("the backend's answer is compressed, unasked")
        kind = relayed_type(head)
        told, most = head.headers, len(RATE_LIMITS)
        relayed = [name for name in told if name in RELAYED_ANSWER or name[:most] == RATE_LIMITS]
        if self.caller.account.is_metered:  # which is told its own
            relayed = [name for name in relayed if name in RELAYED_ANSWER]
        self.answer_headers = tuple([(name, told[name]) for name in relayed])
        source = self.translator.source if self.translator else self.endpoint.dialect
        if self.question.stream and source.is_stream(kind):
            backend.route_supported(self.route_asked, self.ticket.model)
            self.watch = StreamWatch(source)
            kind = self.endpoint.dialect.stream_type if self.translator else kind
            if not self.reply.started:  # by a heartbeat
                self.reply.start(200, kind, [*self.answer_headers, *self.headers])
            self.answer = await self.relay(self.watch, upstream, received)
        else:
            answer = await upstream.read_rest(limits.max_answer, received)
            check_route_known(answer)
            backend.route_supported(self.route_asked, self.ticket.model)
            self.answer = answer
        self.answer_type = kind

    def refusal(self, backend: Backend, head: ResponseHead, body: bytes) -> LlmqError:
        """What an answer that is not 200 means."""
        error = read_refusal(head, body, backend.key, backend.secrets)
        if isinstance(error, RouteUnsupported):
            model = self.ticket.model if error.for_model else ""
            if (self.route_asked, model) in backend.supported:
                return error.answer  # something else is meant
        elif self.policy.overflow == "refuse" and TOO_LONG.search(error.message):
            words = error_text(error_of(parse_json(error.message.encode())))
            return LlmqError(words or error.message, "context_length_exceeded")
        return error

    async def relay(
        self, watch: StreamWatch, upstream: Upstream, received: Callable[[], None]
    ) -> bytes:
        """Pass a stream on, piece by piece; its last bytes are returned, not sent."""
        reply, translator = self.reply, self.translator
        change = translator.feed if translator else self.echo
        finish = translator.finish if translator else self.echo
        while piece := await upstream.read_piece():
            shown, silent = watch.feed(piece), self.heartbeat_at
            received()
            if upstream.body.done and watch.ended and watch.failure is None:
                rest = shown + watch.finish()
                return finish(rest) if finish else rest
            shown = change(shown) if change else shown
            if shown:
                reply.send(shown)
            else:
                self.heartbeat_at = silent  # what is held back is no sign of life
            if watch.failure is not None:
                break
            if reply.blocked and not upstream.body.done:
                self.deadline = NEVER  # the client is slow, not the backend
                await reply.catch_up()
                received()
        rest = watch.finish()  # or it says what is wrong
        return finish(rest) if finish else rest

    def received(self, backend: Backend, limits: UpstreamSettings) -> None:
        """A piece of the answer's body has come."""
        now = backend.last_received = time.monotonic()
        if not self.first_byte:
            self.first_byte = now
            backend.loaded_now(self.ticket.model, now, whole=self.watch is None)
        self.deadline = now + limits.idle_timeout
        self.heartbeat_at = now + self.patience if self.watch and self.patience else NEVER

    # ---- how it ends

    async def deliver(self) -> None:
        """The end of the answer to the client; its slot has been handed on by now."""
        reply, body, kind = self.reply, self.answer or b"", self.answer_type
        if self.watch is not None:
            reply.finish(body)
            return
        plain = isinstance(self.question, FormQuestion) and kind.startswith("text/plain")
        document = None if plain else read_whole(body)  # BackendError if it is not what it must be
        self.tokens, self.tokens_in = read_usage(document)
        self.rate = read_rate(document)
        translator = self.translator
        if translator is not None:
            kind = "application/json"
            if document is None:
                body = await beside(functools.partial(translator.retell, body))
            else:
                body = translator.translate(lambda: render_json(translator.whole(document)))
        elif self.echo is not None and document is not None:
            body = echo_whole(body, self.told, self.question.model)
        elif self.echo is not None:  # in the first part of a very long one
            body = self.echo(body[:PARSED_ANSWER]) + body[PARSED_ANSWER:]
        if self.wish.told and not self.job:
            body = with_router(body, self)
        if not reply.started:
            reply.respond(200, body, kind, [*self.answer_headers, *self.headers])
        elif self.question.stream:
            raise BackendError("the backend answered whole where a stream was asked for")
        else:
            reply.finish(body)

    def send_error(self, error: LlmqError) -> None:
        """The truth about a call that failed, before the head or after it."""
        self.error = error.with_traceback(None)
        error.__context__ = None  # the frames of both hold the request
        reply, dialect = self.reply, self.endpoint.dialect
        if reply.started and self.question.stream:
            inside = self.watch is not None and self.watch.inside and self.translator is None
            reply.fail(dialect.render_stream_error(error, self.request_id, inside))
        elif reply.started:
            reply.fail(dialect.render_error(error, self.request_id))
        elif not isinstance(error, ClientLeft):
            body = dialect.render_error(error, self.request_id)
            reply.respond(error.status, body, headers=error_headers(error) + self.headers)


def has_other_route(call: Call, fleet: Fleet, error: Untranslatable, now: float) -> bool:
    """Remember which route it was not; whether another, or another backend, is left."""
    ticket, route = call.ticket, call.route_asked
    if isinstance(error, RouteUnsupported) and route is not None and ticket.backend is not None:
        ticket.backend.route_unsupported(route, ticket.model, error, now)
    elif route is not None:  # what it asks cannot be translated
        left = tuple(one for one in ticket.want.routes if one != route)
        ticket.want = ticket.want._replace(routes=left)
    return bool(ticket.want.routes) and bool(fleet.serving(ticket.want))


def error_headers(error: LlmqError) -> list[tuple[str, str]]:
    headers = []
    if error.retry_after is not None:
        headers.append(("Retry-After", str(max(1, error.retry_after))))
    if not error.should_retry:
        headers.append(("x-should-retry", "false"))
    return headers


# ==== 31. Records =================================================================================
# What remains of a request when it has ended: a line in the log, its part of the metrics, a row for
# those who watch; never a word of a prompt or an answer.

EVENTS_KEPT = 1000  # until webhooks send them
RECENT = 50  # ended requests that the snapshot shows
CANCELS = {"client_left": "client", "cancelled": "order"}  # who gave a request up


class Record(NamedTuple):
    """What remains of a request when it has ended; also its line in the log."""

    id: str
    request_id: str
    client: str
    priority: str  # a class, `-` where it was refused before it had one
    model: str
    route: str
    backend: str
    wait_s: float
    first_s: float | None  # from arrival to the first byte of the answer's body
    total_s: float
    tokens: int | None
    status: int
    outcome: str  # `done`, or the code of the error
    error: str | None = None  # its sentence: llmq's own, a runner's for 5xx
    tokens_in: int | None = None
    tokens_per_s: float | None = None
    cut: bool = False  # the prompt fills its context: it may have lost its front
    cache: str = ""  # hit, joined or miss

    def facts(self) -> dict[str, Any]:
        facts = self._asdict()
        facts["class"] = facts.pop("priority")
        for name in ("wait_s", "first_s", "total_s", "tokens_per_s"):
            facts[name] = facts[name] and round(facts[name], 4)
        return facts

    def __str__(self) -> str:
        first = "-" if self.first_s is None else f"{self.first_s:.3f}"
        tokens_in = "-" if self.tokens_in is None else self.tokens_in
        tokens = "-" if self.tokens is None else self.tokens
        rate = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"
        error = f" error={json.dumps(self.error)}" if self.error else ""
        return (
            f"{self.status} {self.route} id={self.id} client={self.client} class={self.priority} "
            f"model={self.model or '-'} backend={self.backend or '-'} wait={self.wait_s:.3f} "
            f"first={first} total={self.total_s:.3f} tokens_in={tokens_in} tokens_per_s={rate} "
            f"tokens={tokens} outcome={self.outcome}{error}{' cut?' * self.cut}"
            f"{self.cache and ' cache=' + self.cache}"
        )


def record_of(call: Call, now: float) -> Record:
    """The record of a call that ends now."""
    ticket, error = call.ticket if call.admitted else None, call.error
    arrived = (ticket.arrived if ticket else now) or now
    started = (ticket.started if ticket else now) or now
    source = call.watch or call
    tokens, since = source.tokens, call.first_byte if call.watch else started
    return Record(
        id=call.id,
        request_id=call.request_id,
        client=ticket.client.name if ticket else "-",
        priority=ticket.priority.word if ticket else "-",
        model=printable(call.model),
        route=call.route,
        backend=ticket.backend.name if ticket and ticket.backend else "",
        wait_s=started - arrived,
        first_s=call.first_byte - arrived if call.first_byte else None,
        total_s=now - arrived,
        tokens=tokens,
        status=call.reply.status or (error.status if error else 200),
        outcome=error.code if error else "done",
        error=error_in_sight(error),
        tokens_in=source.tokens_in,
        # The runner's own word; else of a stream while it came, of a whole answer since its start.
        tokens_per_s=source.rate
        or (tokens / (now - since) if tokens and since and now > since else None),
        cut=may_be_cut(call, source.tokens_in or 0),
        cache=call.recalled,
    )


def may_be_cut(call: Call, tokens_in: int) -> bool:
    """Whether the prompt fills its context: Ollama drops the front of what is longer, unsaid."""
    backend = call.ticket.backend if tokens_in else None
    if backend is None or not (call.context or backend.contexts.loaded):
        return False
    context = call.context or backend.contexts.loaded.get(call.ticket.model, 0)
    return 0 < context <= tokens_in + 1 and EMBEDDINGS not in call.endpoint.routes


def order_record(
    exchange: Exchange, model: str, backend: str, seconds: float, error: LlmqError | None
) -> Record:
    """The record of an order that went to a backend beside the queue."""
    return Record(
        id=exchange.id,
        request_id=exchange.request_id,
        client=exchange.caller.client,
        priority="-",
        model=printable(model),
        route=exchange.request.path,
        backend=backend,
        wait_s=0.0,
        first_s=None,
        total_s=seconds,
        tokens=None,
        status=exchange.status or (error.status if error else 200),
        outcome=error.code if error else "done",
        error=error_in_sight(error),
    )


def error_in_sight(error: LlmqError | None) -> str | None:
    """What may be shown of an error: a runner's words may quote a prompt, unless it failed."""
    if error is None or (isinstance(error, BackendAnswer) and error.status < 500):
        return None
    return printable(error.message, ERROR_SHOWN)


def count_records(metrics: Metrics, records: Iterable[Record]) -> None:
    """What records add to the metrics; those that are alike are counted together."""
    alike: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        who = (record.route, record.model, record.client, record.status, record.outcome)
        where = (record.backend, record.cache)
        alike.setdefault((record.priority, *who, *where), []).append(record)
    for (priority, *kind), group in alike.items():
        add, number = metrics.add, len(group)
        _, model, client, _, outcome, *_ = kind
        add("llmq_requests_total", *map(str, kind), amount=number)
        if priority == "-" and client != "-":  # an order, which neither waited nor told anything
            continue
        if outcome in CANCELS:
            add("llmq_cancels_total", CANCELS[outcome], amount=number)
        if outcome == "queue_full" or (client == "-" and outcome != "client_left"):
            add("llmq_rejected_total", outcome, amount=number)
        elif client != "-":  # else it was refused before it could wait
            metrics.observe("llmq_wait_seconds", priority, [one.wait_s for one in group])
        first = [one.first_s for one in group if one.first_s is not None]
        metrics.observe("llmq_first_token_seconds", model, first)
        if outcome == "done":
            metrics.observe("llmq_total_seconds", model, [one.total_s for one in group])
        add("llmq_tokens_in_total", model, client, amount=sum(one.tokens_in or 0 for one in group))
        add("llmq_tokens_out_total", model, client, amount=sum(one.tokens or 0 for one in group))


def tokens_of(call: Call, record: Record) -> int:
    """What counts for a budget: as the runner tells, else by the size and pieces of what passed."""
    given = call.ticket.size // 4 if call.admitted and call.first_byte else 0
    pieces = call.watch.pieces if call.watch else 0
    told, asked = record.tokens, record.tokens_in
    return (given if asked is None else asked) + (pieces if told is None else told)


USED = ("requests", "hits", "tokens_in", "tokens_out", "seconds")
MOST_USED = 10_000  # clients and models whose use waits to be written; all others are one
Usage = dict[Names, list[float]]  # an amount for each name in USED, by day, client and model


def usage_of(rows: Iterable[tuple[float, Record]]) -> Usage:
    """What was used.  Each row is a record and when it was written, in seconds since 1970."""
    used: Usage = {}
    for when, record in rows:
        hit = int(record.cache in ("hit", "joined"))
        order = record.priority == "-" or record.route.startswith("/llmq")  # or a lease
        if order or not (record.backend or hit):  # else it has used nothing
            continue
        ran = record.total_s - record.wait_s if record.backend else 0.0
        facts = [1, hit, record.tokens_in or 0, record.tokens or 0, ran]
        merge_usage(used, {(day_of(int(when)), record.client, record.model): facts})
    return used


def merge_usage(used: Usage, more: Usage) -> None:
    """Add what was used besides; client and model that would be one too many are `other`."""
    for who, amounts in more.items():
        known = who in used or len(used) < MOST_USED
        row = used.setdefault(who if known else (who[0], OTHER, OTHER), [0] * len(USED))
        row[:] = [had + one for had, one in zip(row, amounts)]


@functools.lru_cache(maxsize=4)
def day_of(when: int) -> str:
    """The day here of a time in seconds since 1970."""
    return time.strftime("%Y-%m-%d", time.localtime(when))


def first_day(when: float, days: int) -> str:
    """The first of so many days of which the last one is that of `when`."""
    at = time.localtime(when)  # by noon, which each day has, though some have 23 or 25 hours
    noon = (at.tm_year, at.tm_mon, at.tm_mday - days + 1, 12, 0, 0, 0, 0, -1)
    return day_of(int(time.mktime(noon)))


def today() -> tuple[str, float]:
    """The day here, and the seconds that are left of it."""
    at = time.localtime()
    left = DAY - (at.tm_hour * 3600 + at.tm_min * 60 + at.tm_sec)
    return time.strftime("%Y-%m-%d", at), max(1.0, left)


class Lines(NamedTuple):
    """Request lines for the log, each with the time at which its request ended."""

    rows: list[tuple[float, Record]]

    def __str__(self) -> str:
        return "\n".join(str(record) for _, record in self.rows)


MINUTES = 24 * 60  # of history


class History:
    """What happened in each of the last day's minutes, so that plots are full at once."""

    def __init__(self) -> None:
        # By class how many waited at most, how many started; and the tokens of what ended.
        self.minutes: deque[tuple[int, ...]] = deque(maxlen=MINUTES)
        self.minute = -MINUTES - 1  # that is under way, since 1970; before the first, long ago
        self.waited = [0] * len(Priority)
        self.before = [0] * (len(Priority) + 1)  # started, by class, and tokens when it began

    def note(self, now: float, waiting: Sequence[int], counts: Sequence[int]) -> None:
        """What waits now, and what has started and was told in all; to be called each second."""
        minute, nobody = int(now // 60), [0] * len(Priority)
        if not -2 <= minute - self.minute <= MINUTES:  # it begins, or the clock was set
            self.minutes.clear()
            self.minute, self.before, self.waited = minute, list(counts), nobody
        while self.minute < minute:
            self.minutes.append(self.latest(counts))
            self.minute, self.before, self.waited = self.minute + 1, list(counts), nobody
        self.waited = list(map(max, self.waited, waiting))

    def latest(self, counts: Sequence[int]) -> tuple[int, ...]:
        """The minute that is under way."""
        return (*self.waited, *[now - then for now, then in zip(counts, self.before)])


class Journal:
    """Keeps the records: the latest to be shown, all in the metrics, each in the log."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.outcomes: Counter[str] = Counter()
        self.history = History()
        self.tokens = 0  # of all answers
        self.events: deque[Facts] = deque(maxlen=EVENTS_KEPT)  # that webhooks are told
        self.used: Usage = {}  # since it was last written to the state file
        self.days: Usage = {}  # of all clients and models together, by the day alone
        self._lines: list[tuple[float, Record]] = []

    def keep(self, record: Record) -> None:
        """Show it from now on; what is counted and written of it waits for `flush`."""
        self.recent.append(record)
        self.outcomes[record.outcome] += 1
        self._lines.append((time.time(), record))

    def happened(self, event: str, **facts: Any) -> None:
        """Something that webhooks are told."""
        self.events.append({"event": event, "timestamp": rfc3339(time.time()), **facts})

    def flush(self) -> None:
        """Count and write the latest: together, as each by itself is a tenth of what it costs."""
        if self._lines:
            lines, self._lines = self._lines, []
            self.tokens += sum(record.tokens or 0 for _, record in lines)
            count_records(self.metrics, [record for _, record in lines])
            used = usage_of(lines)
            merge_usage(self.used, used)
            for who, facts in used.items():
                merge_usage(self.days, {who[:1]: facts})
            log.info(Lines(lines))


# ==== 32. Store ===================================================================================
# What outlives a restart: one SQLite file, opened once there is something to keep.  One thread has
# it, so that the event loop never waits for a disk, and one llmq at a time.

Statement = tuple[str, Any]  # SQL and a tuple of values, or an iterable of such for many rows
UPGRADES = (  # what makes a file of each schema one of the next: nothing of it is ever changed
    "CREATE TABLE changes (kind TEXT, name TEXT, facts TEXT, PRIMARY KEY (kind, name));",
    """CREATE TABLE usage (
        day TEXT, client TEXT, model TEXT, requests INTEGER, hits INTEGER, tokens_in INTEGER,
        tokens_out INTEGER, seconds REAL, PRIMARY KEY (day, client, model)) WITHOUT ROWID;
    CREATE TABLE answers (key BLOB PRIMARY KEY, body BLOB, type TEXT, until REAL) WITHOUT ROWID;
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, batch TEXT, custom TEXT,
        client TEXT, account TEXT, address TEXT, priority INTEGER, target TEXT, headers TEXT,
        model TEXT, state TEXT, attempts INTEGER, created REAL, started REAL, ended REAL,
        status INTEGER, type TEXT, error TEXT, body BLOB, answer BLOB);
    CREATE INDEX jobs_by_state ON jobs (state, priority, client, number);
    CREATE INDEX jobs_by_batch ON jobs (batch, state, number);
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, client TEXT, account TEXT,
        name TEXT, purpose TEXT, created REAL, bytes INTEGER, batch TEXT, content BLOB);
    CREATE TABLE batches (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, client TEXT, account TEXT,
        created REAL, ended REAL, state TEXT, input TEXT, facts TEXT);""",
)
ALONE = f"""PRAGMA journal_mode = WAL; PRAGMA journal_size_limit = {16 * MIB};
    BEGIN EXCLUSIVE; COMMIT;"""
KEEP = "REPLACE INTO changes VALUES (?, ?, ?)"
FORGET = "DELETE FROM changes WHERE kind = ? AND name = ?"
FILLED = """SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count, pragma_freelist_count, pragma_page_size"""
NO_STATE = "that is kept in a state file, and this llmq was started without one, see --state"


def insert_into(table: str, columns: Sequence[str]) -> str:
    """The statement that adds a row with these columns."""
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def no_row(what: str, ident: str) -> LlmqError:
    """What is said of a row that is not there, and of one that is somebody else's."""
    return LlmqError(f"there is no {what} {printable(ident)}", "not_found")


class Store:
    """The file; `insufficient_storage` where something cannot be kept.

    What is to be `safe` is on the disk when its method returns.  All else is there as soon as the
    system writes it: a crash of llmq does not lose it, one of the box may lose the last seconds.
    """

    def __init__(self, path: str) -> None:
        home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        self.path = os.path.expanduser(path.replace("$XDG_STATE_HOME", home))  # empty: no file
        self._thread = ThreadPoolExecutor(1)
        self._database: Any = None

    async def load(self) -> dict[str, dict[str, Facts]]:
        """What was kept, by kind and name; nothing where one line says what is wrong with it."""
        kept: dict[str, dict[str, Facts]] = {}
        if self.path and os.path.exists(self.path):  # noqa: ASYNC240 - before anything runs
            try:
                for kind, name, facts in await self.read("SELECT * FROM changes"):
                    kept.setdefault(kind, {})[name] = json.loads(facts)
            except (LlmqError, ValueError) as error:
                log.warning("state: %s", error)
        return kept

    @property
    def is_open(self) -> bool:
        return self._database is not None

    async def put(self, kind: str, name: str, facts: Facts | None) -> None:
        """Keep this of a name, or forget it where that is nothing: on disk when it returns."""
        told = (KEEP, (kind, name, json.dumps(facts))) if facts else (FORGET, (kind, name))
        if self.path:
            await self.write(told, safe=True)

    async def read(self, sql: str, *values: Any) -> list[Any]:
        """The rows that are found; none where there is no file."""
        return await self._do([(sql, values)]) if self.path else []

    async def find(self, what: str, sql: str, ident: str) -> Any:
        """The one row that has this id; LlmqError `not_found` where none has."""
        rows = await self.read(sql, ident)
        if not rows:
            raise no_row(what, ident)
        return rows[0]

    async def write(self, *statements: Statement, safe: bool = False) -> list[Any]:
        """Carry these out, all or none; the rows that the last one gives."""
        if not self.path:
            raise LlmqError(NO_STATE, "insufficient_storage")
        return await self._do(statements, make=True, safe=safe)

    async def close(self) -> None:
        """Close the file after all that was asked for before, and end the thread."""
        if self._database is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    async def _do(self, statements: Sequence[Statement], **wanted: bool) -> list[Any]:
        work = functools.partial(self._execute, statements, **wanted)
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await asyncio.shield(doing)  # who waits may be cancelled: it is kept all the same

    # ---- in its thread

    def _execute(
        self, statements: Sequence[Statement], *, make: bool = False, safe: bool = False
    ) -> list[Any]:
        import sqlite3

        try:
            if self._database is None:
                if not (make or os.path.exists(self.path)):
                    return []
                os.makedirs(os.path.dirname(self.path) or ".", 0o700, exist_ok=True)
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
                # No cached statements: one keeps the values it had last, which may be a whole file.
                how: Any = {"timeout": 0, "isolation_level": None, "cached_statements": 0}
                self._database = sqlite3.connect(self.path, **how)
                self._open()
            return self._transact(statements, safe=safe)
        except (OSError, sqlite3.Error) as error:
            self._close()  # which undoes what had begun
            why = str(error).replace("database is locked", "another llmq has it")
            if type(error) is sqlite3.DatabaseError:  # it is broken
                why += ", set aside as " + self._set_aside()
        raise LlmqError(f"{self.path}: {why}", "insufficient_storage")

    def _transact(self, statements: Sequence[Statement], *, safe: bool) -> list[Any]:
        database, rows = self._database, []
        database.execute(f"PRAGMA synchronous = {'FULL' if safe else 'NORMAL'}")
        database.execute("BEGIN")
        try:
            for sql, values in statements:
                if isinstance(values, tuple):
                    rows = database.execute(sql, values).fetchall()
                else:
                    database.executemany(sql, values)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return rows

    def _open(self) -> None:
        """Have it alone, with its tables; OSError where it is not ours to change."""
        self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
        ((version,),) = self._database.execute("PRAGMA user_version")
        ((tables,),) = self._database.execute("SELECT count(*) FROM sqlite_master")
        if version > len(UPGRADES) or (tables and not version):
            raise OSError("a newer llmq wrote it, or another program")
        self._database.executescript(ALONE)
        for number, sql in enumerate(UPGRADES[version:], version + 1):
            self._database.executescript(f"BEGIN; PRAGMA user_version = {number}; {sql} COMMIT;")

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _set_aside(self) -> str:
        """Another name for a broken file, and for what SQLite keeps beside it."""
        names = (f"{self.path}.broken-{number}" for number in count(1))
        free = next(name for name in names if not os.path.exists(name))
        for end in ("", "-wal"):
            with contextlib.suppress(OSError):
                os.replace(self.path + end, free + end)
        return free


# ==== 33. Recall ==================================================================================
# A request that was answered before is answered from the cache, without waiting.  Of several that
# ask the same at one time the first one runs, and the others have joined its run.  Only whole and
# good answers are kept.

BETAS = ("openai-beta", "anthropic-version", "anthropic-beta")  # header fields that runners get
CHATS = (CHAT, COMPLETIONS, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE)
# Errors of the first client alone, after which one that has joined runs itself: `forbidden` is a
# client that was blocked meanwhile.
OWN_ENDS = ("cancelled", "client_left", "forbidden", "wait_timeout")


class Recall:
    """Answers of the cache, and runs that are shared."""

    def __init__(
        self, settings: Settings, scheduler: Scheduler, metrics: Metrics, instance: str
    ) -> None:
        self.settings = settings
        self.scheduler = scheduler
        self.metrics = metrics
        self.instance = instance  # of this llmq
        self.cache = Cache()
        self.runs: dict[bytes, Shared] = {}  # that may be joined, by the key of their answer
        self.joined: dict[str, Call] = {}  # by id, calls that have joined another's run
        self.held = 0  # bytes of their requests
        self.counts: Counter[str] = Counter()  # of hit, joined and miss

    def is_wanted(self, call: Call, values: Mapping[str, Any], headers: Headers) -> bool:
        """Whether the call's answer may come from the cache, and go into it."""
        limits, question, path = self.settings.cache, call.question, call.endpoint.path
        chats = limits.chat and path in CHATS and not question.stream
        chats = chats and is_settled(values, call.policy, options=call.endpoint.options)
        wanted = chats or (limits.embeddings and EMBEDDINGS in call.endpoint.routes)
        if not wanted or question.skipped or question.done_reason or not values:
            return False
        if call.wish.told:  # its answer tells how it came about
            return False
        if call.caller.foreign:  # or a web page could find out what others have asked
            return False
        return "no-store" not in words_of(headers, "cache-control")

    async def find_key(self, call: Call, values: Mapping[str, Any], headers: Headers) -> None:
        """Give the call the key of its answer; none where it is not known which model it is."""
        question, ticket = call.question, call.ticket
        version = self.scheduler.fleet.version(ticket.model)
        if not version:  # no runner has told of it yet
            return
        # Without a digest: after a restart it may be another model.
        own = self.instance if "/" in version else ""
        usual = (call.policy, self.settings.upstream.num_ctx)
        asked = (call.endpoint.path, call.query, question.model, question.context, call.more)
        # A runner may take the first of two members of one name, and their order for an order.
        exact = question.body if call.endpoint.path in CHATS else b""
        of_model = (call.model, version, own, ticket.want.backend)
        told = (*asked, *usual, *of_model, *map(headers.get, BETAS), exact)
        find = functools.partial(answer_key, dict(values), *told)
        call.answer_key = await beside(find, heavy=len(question.body) > WATCHED_LINE)
        if "no-cache" in words_of(headers, "cache-control"):
            call.recalled = "miss"  # whatever is there

    async def answer(self, call: Call) -> bool:
        """Answer from the cache, or as a run that the call joins; False where it has to run."""
        exchange, key = call.reply, call.answer_key
        assert isinstance(exchange, Exchange)  # jobs have no key
        while not call.recalled:
            known, run = self.cache.get(key, time.time()), self.runs.get(key)
            if known is not None:
                self.tell(call, exchange, "hit", known.body, known.type)
                return True
            if run is None or not self.may_join(call.ticket, run.call.ticket):
                break
            await self.join(call, exchange, run)
            if run.answer is not None:
                self.tell(call, exchange, "joined", *run.answer)
                return True
            if run.error is not None and run.error.code not in OWN_ENDS:
                raise run.error
        call.recalled = "miss"
        self.count("miss")
        exchange.headers += (("X-Cache", "MISS"),)
        call.reply = Shared(exchange, call)
        self.runs.setdefault(key, call.reply)
        return False

    async def join(self, call: Call, exchange: Exchange, run: Shared) -> None:
        """Wait until the run has ended; it becomes as urgent as the call that joins it."""
        ticket, shared = call.ticket, run.call.ticket
        if shared.priority > ticket.priority and shared.state is TicketState.WAITING:
            self.scheduler.reprioritise(shared, ticket.priority)
        own = exchange.headers
        exchange.headers += (("X-Cache", "JOINED"),)  # a sign of life may come first
        self.joined[call.id], self.held = call, self.held + ticket.size
        try:
            await run.join(exchange, call)
        finally:
            del self.joined[call.id]
            self.held -= ticket.size
        exchange.headers = own

    def may_join(self, ticket: Ticket, shared: Ticket) -> bool:
        """Whether a request may join a run.

        Not one that waits where it would not: for the cap of another client, or longer than its own
        class does.  And all that have joined hold at most a quarter of the bytes that may wait.
        """
        limits, same = self.settings.queue, ticket.client is shared.client
        if self.held + ticket.size > limits.max_queued_bytes // 4:
            return False
        waits = limits.waits[ticket.priority] == limits.waits[shared.priority]
        free = same or not shared.client.at_cap
        return shared.state is not TicketState.WAITING or (waits and free)

    def count(self, how: str) -> None:
        """Count a request that was a hit, joined or a miss."""
        self.counts[how] += 1
        self.metrics.add("llmq_cache_total", how)

    def tell(self, call: Call, exchange: Exchange, how: str, body: bytes, kind: str) -> None:
        """Answer with a body of this type, and say how it was found: hit or joined."""
        call.recalled = how
        self.count(how)
        exchange.headers += (("X-Cache", how.upper()),)
        if exchange.started:
            exchange.finish(body)
        else:
            exchange.respond(200, body, kind, call.headers)

    def end(self, call: Call) -> None:
        """The call has ended: keep a good answer, and tell all who have joined its run."""
        run, limits = call.reply, self.settings.cache
        if not isinstance(run, Shared):
            return
        if self.runs.get(call.answer_key) is run:
            del self.runs[call.answer_key]
        if call.error is not None:
            run.answer = None
        if run.answer is not None:
            chats = call.endpoint.path in CHATS
            ttl = limits.chat_ttl if chats else limits.embeddings_ttl
            if not chats or is_complete(parse_json(run.answer[0]) or {}):
                answer = Answer(*run.answer, time.time() + ttl)
                self.cache.put(call.answer_key, answer, limits.max_bytes)
        run.end(call.error)
        call.reply = run.first  # each would hold the other, and the request


# ==== 34. Jobs ====================================================================================
# What may be answered later: each job is a row of the store, from before its client is told 202
# until its result has been kept long enough.  The statements that move it to another state name the
# states that it may come from, so that it ends once.  Jobs of one class and client are a lane: they
# begin in the order in which they came.

ALWAYS, BUSY = "always", "busy"  # when a request may be answered later
QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED, EXPIRED = (
    "queued", "running", "succeeded", "failed", "cancelled", "expired",
)  # fmt: skip
OPEN_JOB = f"state IN ('{QUEUED}', '{RUNNING}')"
JOB_HEADERS = (*RELAYED_REQUEST, *sorted(SESSION_HEADERS), "x-llmq-backend")
JobLane = tuple[int, str]  # class and client


class Job(NamedTuple):
    """A row of the table of jobs; times are seconds since 1970."""

    id: str
    batch: str  # id of the batch that it is a line of, or empty
    custom: str  # the batch's own name for that line
    client: str
    account: str  # name of the key that it was asked with, or empty
    address: str
    priority: int
    target: str  # path and query
    headers: str  # as JSON
    model: str
    created: float
    body: bytes
    state: str = QUEUED
    attempts: int = 0
    started: float | None = None
    ended: float | None = None
    status: int = 0  # of its answer
    type: str = ""
    error: str | None = None

    @property
    def lane(self) -> JobLane:
        return self.priority, self.client


class JobEnd(NamedTuple):
    """How a job has ended, and what its request was answered with."""

    state: str
    status: int
    type: str
    answer: bytes
    error: str | None = None  # in words to be shown

    @classmethod
    def by_error(cls, error: LlmqError, state: str = FAILED) -> JobEnd:
        """The end of a job that llmq itself answers, with this error."""
        body = OPENAI.render_error(error)
        return cls(state, error.status, "application/json", body, error.message)


class Work(NamedTuple):
    """What a job is to ask: path and query, header fields, body."""

    target: str
    headers: Headers
    body: bytes
    model: str
    priority: Priority


def new_job(caller: Caller, work: Work, batch: str = "", custom: str = "") -> Job:
    """The row of a job that a caller has just asked for."""
    return Job(
        id="job_" + secrets.token_hex(12),
        batch=batch,
        custom=custom,
        client=caller.client,
        account=caller.account.name,
        address=caller.address,
        priority=caller.account.lowered(work.priority),
        target=work.target,
        headers=json.dumps(work.headers),
        model=printable(work.model, 1024),
        created=time.time(),
        body=work.body,
    )


def render_line(job: Job, answer: bytes, status: int) -> bytes:
    """The line of a batch's output that says what one of its jobs was answered with."""
    response = {"status_code": status, "request_id": job.id, "body": parse_json(answer)}
    ident = "batch_req_" + job.id.partition("_")[2]
    facts = {"id": ident, "custom_id": job.custom, "response": response, "error": None}
    if response["body"] is not None:
        with contextlib.suppress(ValueError, RecursionError):  # NaN, 1e999
            return render_json(facts) + b"\n"
    # It is no JSON, or not to be written as such: as a text.
    response["body"] = answer.decode("utf-8", "replace")
    return render_json(facts) + b"\n"


SHOWN_JOB = ", ".join(name for name in Job._fields if name != "body")


def job_of_row(row: Sequence[Any]) -> Job:
    """A job from a row with the columns of SHOWN_JOB: all but its body, which may be long."""
    return Job(**{"body": b"", **dict(zip(SHOWN_JOB.split(", "), row))})


def read_later(headers: Headers, wish: Wish) -> str:
    """When a request allows to be answered later: ALWAYS, while it is BUSY here, or never ("")."""
    asked = words_of(headers, "prefer")
    if wish.mode == "async" or (wish.mode != "sync" and "respond-async" in asked):
        return ALWAYS
    return BUSY if wish.allow_async and wish.mode != "sync" else ""


ADD_JOB = insert_into("jobs", Job._fields)
NEXT_JOB = f"""SELECT {", ".join(Job._fields)} FROM jobs WHERE state = '{QUEUED}'
    AND priority = ? AND client = ? AND id NOT IN ({{}}) ORDER BY number LIMIT 1"""
BEGIN_JOB = f"""UPDATE jobs SET state = '{RUNNING}', attempts = attempts + 1, started = ?
    WHERE id = ? AND state = '{QUEUED}'"""
REQUEUE_JOB = f"""UPDATE jobs SET state = '{QUEUED}', attempts = attempts - ?
    WHERE id = ? AND state = '{RUNNING}'"""
END_JOB = f"""UPDATE jobs SET state = ?, status = ?, type = ?, answer = ?, error = ?, ended = ?,
    body = NULL, headers = '{{}}' WHERE id = ? AND {OPEN_JOB}"""
EXPIRE_JOBS = f"""UPDATE jobs SET state = '{EXPIRED}', answer = NULL
    WHERE batch = '' AND NOT {OPEN_JOB} AND state != '{EXPIRED}' AND ended < ?"""
FORGET_JOBS = f"DELETE FROM jobs WHERE state = '{EXPIRED}' AND ended < ?"
CHANGED = ("SELECT changes()", ())  # how many rows the statement before it has changed


class Jobs:
    """The jobs of the store, and those of them that the scheduler has."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self.store = store
        self.lanes: set[JobLane] = set()  # that may have jobs which wait in the store alone
        self.active: dict[str, tuple[Job, Kept]] = {}  # by id, those that the scheduler has
        self.news = asyncio.Event()  # a lane may have one to run
        self.queued = 0  # jobs of the store that have not ended
        self.room = asyncio.Lock()  # held from a look at how full the file is to the write

    async def accept(self, call: Call) -> None:
        """Make a job of the call, and tell its client 202 and where to ask for the result."""
        exchange, ticket, (headers, body) = call.reply, call.ticket, call.asked
        assert isinstance(exchange, Exchange)  # of a client
        if ticket.size > self.settings.queue.max_queued_bytes // 2:
            raise LlmqError("the request is longer than one client may have waiting", "queue_full")
        priority = Priority.LOW if call.question.priority is None else ticket.priority
        target = call.route + (f"?{call.query}" if call.query else "")
        job = new_job(call.caller, Work(target, headers, body, call.model, priority))
        await self.add([job], len(job.body))
        on_port = exchange.connection.server.account is not NO_ACCOUNT  # it has no base path
        place = f"{'' if on_port else self.settings.server.base_path}/v1/jobs/{job.id}"
        told = {"message": f"ask GET {place} how it is, and {place}/result what came of it"}
        facts = {"id": job.id, "object": "router.job", "status": QUEUED, **told}
        choice = call.choice
        router: Facts = {"mode": "async", "position": self.queued}
        if choice is not NO_CHOICE:
            router.update(taskType=choice.task, preferredModel=call.model)
            router["estimatedClass"] = ESTIMATED.get(choice.task, "light")
        lines = [("Location", place), ("Preference-Applied", "respond-async")]
        lines += model_fields(call.model, call.question.model, choice.reason)
        lines.append(("X-LLMQ-Class", Priority(job.priority).word))
        log.info("%s of %s is kept: %s", job.id, job.client, call.route)
        exchange.respond(202, render_json({**facts, "router": router}), headers=lines)

    async def add(self, jobs: Iterable[Job], size: int, *more: Statement) -> None:
        """Keep new jobs, of so many bytes together, after more statements that they belong to.

        All of it is on the disk when this returns, or LlmqError says why nothing is.
        """
        lanes: Counter[JobLane] = Counter()

        def rows() -> Iterator[Job]:
            for job in jobs:
                lanes[job.lane] += 1
                yield job

        async with self.room:
            await self.check_room(size)
            await self.store.write(*more, (ADD_JOB, rows()), safe=True)
        self.queued += sum(lanes.values())
        self.wanted(lanes)

    async def check_room(self, size: int) -> None:
        """LlmqError where the state file is not to grow by so many bytes."""
        if not self.store.path:
            raise LlmqError(NO_STATE, "insufficient_storage")
        most = self.settings.jobs.max_bytes
        filled = sum(row[0] for row in await self.store.read(FILLED))
        if filled + size > most:
            message = f"jobs and files fill the {most // MIB} MiB that they may, see jobs.max_bytes"
            raise LlmqError(message, "insufficient_storage")

    def wanted(self, lanes: Iterable[JobLane]) -> None:
        """Have these lanes looked at: they may have a job to run."""
        self.lanes.update(lanes)
        self.news.set()

    async def load(self) -> None:
        """Take up the jobs of an earlier llmq: those that ran there run again, if they may."""
        most = self.settings.jobs.max_attempts
        if not (self.store.is_open and await self.store.read("SELECT 1 FROM jobs LIMIT 1")):
            return
        ran = f"FROM jobs WHERE state = '{RUNNING}' AND attempts >= ?"
        spent = await self.store.read(f"SELECT {SHOWN_JOB} {ran}", most)
        sql = f"UPDATE jobs SET state = '{QUEUED}' WHERE state = '{RUNNING}' AND attempts < ?"
        await self.store.write((sql, (most,)))
        count_lanes = "SELECT priority, client, count(*) FROM jobs WHERE state = ? GROUP BY 1, 2"
        rows = await self.store.read(count_lanes, QUEUED)
        self.queued = sum(row[2] for row in rows) + len(spent)
        error = LlmqError("llmq ended while it ran, as often as it may be begun")
        for job in map(job_of_row, spent):
            await self.end(job, JobEnd.by_error(error))
        self.wanted((row[0], row[1]) for row in rows)

    async def next(self, lane: JobLane) -> Job | None:
        """The oldest of a lane that waits in the store alone."""
        fed = [job.id for job, _ in self.active.values() if job.lane == lane]
        sql = NEXT_JOB.format(", ".join("?" * len(fed)))
        rows = await self.store.read(sql, *lane, *fed)
        return Job(*rows[0]) if rows else None

    async def begin(self, job: Job) -> None:
        """A runner is asked: an attempt counts from here on."""
        await self.store.write((BEGIN_JOB, (time.time(), job.id)))

    async def requeue(self, job: Job, *, counted: bool) -> None:
        """It waits again; an attempt that ended for no fault of its own does not count."""
        await self.store.write((REQUEUE_JOB, (int(not counted), job.id)))

    async def end(self, job: Job, end: JobEnd) -> bool:
        """Keep how a job has ended; False where it had ended before, and nothing is changed."""
        answer = render_line(job, end.answer, end.status) if job.batch else end.answer
        values = (*end._replace(answer=answer), time.time(), job.id)
        ((ended,),) = await self.store.write((END_JOB, values), CHANGED)
        self.queued -= ended
        return bool(ended)

    async def expire(self, before: float, kept: float) -> None:
        """Let go of the results of jobs that ended before this; so many seconds later of the rest.

        Lines of batches stay until their batch goes.
        """
        await self.store.write((EXPIRE_JOBS, (before,)), (FORGET_JOBS, (before - kept,)))

    async def find(self, ident: str) -> Job:
        """The job of this id, without its body; LlmqError `not_found`."""
        sql = f"SELECT {SHOWN_JOB} FROM jobs WHERE id = ?"
        return job_of_row(await self.store.find("job", sql, ident))


# ==== 35. Auto ====================================================================================
# What section 15 chooses from: what a request for `auto` asks, and how the models stand that could
# be meant by it.  What a model can is told by its runner, or by the settings.

PREFERRED = 10  # places that a model goes up which the request prefers
EMBED = "embedding"  # what a model is for that makes no text, in Ollama's words
LACKING = {
    "vision": "cannot see pictures", "tools": "cannot use tools", EMBED: "is not for embeddings",
}  # fmt: skip
SPLIT = "is, or would be, split over CPU and GPU"
IMAGES = ("image_url", "input_image", "image")  # types of the parts that are pictures
TEXT_PARTS = ("text", "input_text")
AUTO_ROUTES = (*CHATS, RESPONSES)  # and those of embeddings


class Prompt(NamedTuple):
    """What a request says of its task."""

    text: str  # the last thing that its user says
    tokens: int = 0  # of all of it, estimated
    tools: bool = False
    images: bool = False


def read_prompt(values: Mapping[str, Any]) -> Prompt:
    """The prompt in the members of a request, in whichever dialect."""
    messages = values.get("messages", values.get("input"))
    rows = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    asked = [row for row in rows if row.get("role", "user") == "user"]
    texts = [text for row in asked for text in (read_text(row.get("content")),) if text]
    plain = [values.get("prompt"), messages]
    texts += [one for one in plain if isinstance(one, str)]
    parts = [part for row in rows for part in parts_of(row.get("content"))]
    seen = any(part.get("type") in IMAGES for part in parts)
    pictures = [row.get("images") for row in (*rows, values)]
    return Prompt(
        text=texts[-1] if texts else "",
        tokens=estimate_tokens({**values, "messages": messages}),
        tools=bool(values.get("tools") or values.get("functions")),
        images=seen or any(isinstance(one, list) and one for one in pictures),
    )


def parts_of(content: Any) -> list[Facts]:
    """The parts that a message is made of, those of a tool's result too; none of a text."""
    parts = [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []
    inner = [one.get("content") for one in parts if one.get("type") == "tool_result"]
    held = [part for one in inner if isinstance(one, list) for part in one]
    return parts + [part for part in held if isinstance(part, dict)]


def read_text(content: Any) -> str:
    """The texts of a message."""
    if isinstance(content, str):
        return content
    told = [one.get("text") for one in parts_of(content) if one.get("type") in TEXT_PARTS]
    return "\n".join(text for text in told if isinstance(text, str))


def find_alias(aliases: Mapping[str, str], asked: str) -> str | None:
    """The model that a name stands for: the alias that equals it, else the first that fits."""
    for pattern in sorted(aliases, key=lambda one: one != asked):
        if fits(pattern, asked):
            return aliases[pattern]
    return None


class Brief(NamedTuple):
    """What a model is chosen for."""

    call: Call
    priority: Priority
    pinned: str  # the only backend that may serve it; empty: any
    prompt: Prompt
    task: str
    why: str  # it is that task
    needs: dict[str, bool]  # abilities that the model must have, or must not
    row: frozenset[str] = frozenset()  # keys of the models of the row itself


class Chooser:
    """Chooses models for requests that leave it to llmq."""

    def __init__(self, settings: Settings, monitor: Monitor, scheduler: Scheduler) -> None:
        self.settings, self.monitor, self.scheduler = settings, monitor, scheduler
        self.fleet = monitor.fleet
        self.cards = Cards(settings, monitor.fleet)

    async def choose(
        self, call: Call, values: Mapping[str, Any], pinned: str, priority: Priority
    ) -> Choice:
        """The model that serves the call best; `no_model` says why none can."""
        if call.endpoint.path not in AUTO_ROUTES and EMBEDDINGS not in call.endpoint.routes:
            raise BadRequest(f"name a model: {AUTO} chooses none for {call.route}", param="model")
        self.cards.want()
        trouble = self.fleet.trouble()
        if trouble and not any(one.models for one in self.fleet.backends.values()):
            raise LlmqError(trouble, "backend_down")
        prompt, (task, why) = await self.read(call, values)
        needs = {EMBED: EMBEDDINGS in call.endpoint.routes}
        needs.update({"vision": True} if prompt.images else {})
        needs.update({"tools": True} if prompt.tools else {})
        brief = Brief(call, priority, pinned, prompt, task, why, needs)
        names, row = self.row(brief)
        await asyncio.gather(*map(self.learn, names))
        brief = brief._replace(row=row)
        rows = [self.stand(brief, place, name) for place, name in enumerate(names)]
        choice = choose(rows, task, why, call.wish.max_queue, degrade=self.settings.router.degrade)
        if choice is None:
            words = "; ".join(f"{one.name}: {one.cannot}" for one in rows) or "there is none"
            raise LlmqError(f"no model can serve this ({task}): {words}", "no_model")
        return choice

    async def read(self, call: Call, values: Mapping[str, Any]) -> tuple[Prompt, Verdict]:
        """What the call asks for; beside the event loop where that takes its time."""

        def look() -> tuple[Prompt, Verdict]:
            if EMBEDDINGS in call.endpoint.routes:
                return Prompt(""), Verdict("unknown", "embeddings")
            prompt = read_prompt(values)
            if call.question.skipped:
                prompt = prompt._replace(tokens=len(call.question.body) // 4)
            if call.wish.task:
                return prompt, Verdict(call.wish.task, "as the request says")
            text, tokens, tools, images = prompt
            return prompt, classify(text, tokens, tools=tools, images=images)

        return await beside(look, heavy=is_heavy(call.question.body))

    def row(self, brief: Brief) -> tuple[list[str], frozenset[str]]:
        """The names of the models that may be meant, the best first; and which are of the row.

        To embed it is whatever can: rows are of tasks.
        """
        routes, wish, embeds = self.settings.routes, brief.call.wish, brief.needs[EMBED]
        row = () if embeds else routes.get(brief.task) or routes.get("unknown") or ()
        having = [(one, key) for one in self.fleet.backends.values() for key in one.models]
        good = [
            one.models[key][0]
            for one, key in having
            if brief.task in self.fleet.policy(key).purpose
        ]
        # What a runner sends on to somebody else's computer is only meant where a row says so.
        every = [one.models[key][0] for one, key in having if key not in one.remote]
        wanted = [self.meant(name) for name in (*wish.preferred, *row)]
        found: dict[str, str] = {}  # by key
        for name in (*wanted, *good, *(() if row or good else every)):
            found.setdefault(model_key(name), name)
        may_use = brief.call.caller.account.may_use
        return [found[key] for key in found if may_use(key)], frozenset(map(model_key, wanted))

    def meant(self, name: str) -> str:
        """The model that a name of a row means, which may be an alias."""
        return name if self.fleet.lists(name) else find_alias(self.settings.aliases, name) or name

    async def learn(self, name: str) -> None:
        """Have each Ollama asked what the model can, where that is not known."""
        key = model_key(name)
        for backend in list(self.fleet.backends.values()):
            if backend.traits.native and backend.usable and key in backend.models:
                await self.monitor.learn(backend, name)

    def stand(self, brief: Brief, place: int, name: str) -> Candidate:
        """How a model stands, by its place among those that may be meant."""
        key = model_key(name)
        policy, preferred = self.fleet.policy(key), map(self.meant, brief.call.wish.preferred)
        serving, able, cannot = self.able(brief, key)
        up = [one for one in able if one.usable] or able
        devices = [one.device for one in up]
        known = [one for one in (self.cards.memory_of(at.name) for at in devices) if one]
        ahead = [self.scheduler.ahead_of([one], brief.priority) for one in up]
        waiting, wait = min(ahead, key=lambda one: one[1], default=(0.0, 0.0))
        told = [abilities_of(one, key, policy) for one in able]
        return Candidate(
            name=name,
            key=key,
            place=place - PREFERRED * (key in map(model_key, preferred)),
            in_row=not brief.row or key in brief.row,
            size=self.size_of(key, up),
            memory=max(known, key=lambda one: one.free, default=None),
            loaded=any(one.is_loaded(key) for one in up),
            purpose=brief.task in policy.purpose,
            waiting=waiting,
            wait=wait,
            taken=all(one.held or (policy.exclusive and one.busy) for one in devices),
            unsure=not any(brief.needs.items() <= one.items() for one in told),
            down=not any(one.usable for one in up),
            backend="" if len(able) == len(serving) else up[0].name if up else "",
            cannot=cannot,
        )

    def able(self, brief: Brief, key: str) -> tuple[list[Backend], list[Backend], str]:
        """The backends that have a model, those that can serve the request, and why none can."""
        only, pinned = self.fleet.policy(key).backends, brief.pinned
        if key in map(model_key, map(self.meant, brief.call.wish.forbidden)):
            return [], [], "forbidden by the request"
        if only and pinned and pinned not in only:
            return [], [], f"is asked of {', '.join(only)} only"
        serving = self.fleet.serving(Want(key, brief.call.endpoint.routes, backend=pinned))
        if not serving:
            lists = any(key in one.models for one in self.fleet.backends.values())
            return [], [], "has no backend for this" if lists else "no backend has it"
        lacks = [self.lack(brief, key, one) for one in serving]
        able = [one for one, lack in zip(serving, lacks) if not lack]
        return serving, able, "" if able else lacks[0]

    def lack(self, brief: Brief, key: str, backend: Backend) -> str:
        """What keeps a model from serving the request at a backend, in words; empty: nothing."""
        told = abilities_of(backend, key, self.fleet.policy(key))
        for word, needed in brief.needs.items():
            if told.get(word, needed) is not needed:
                return LACKING[word] if needed else "is for embeddings"
        context = self.context_of(key, backend)
        if context and brief.prompt.tokens > context:
            return f"{brief.prompt.tokens} tokens do not fit into {context}"
        return SPLIT if self.off_gpu(backend, key, brief.call.wish) else ""

    def context_of(self, key: str, backend: Backend) -> int:
        """The longest prompt that the model takes there, as configured or told; 0: not known."""
        told = backend.contexts.max.get(key, 0) or length_of(backend.entry(key))
        return self.fleet.policy(key).context or told

    def size_of(self, key: str, able: Sequence[Backend]) -> float:
        """GiB of a model, as configured or told; 0: not known."""
        told = max((one.size(key) for one in able), default=0.0)
        return self.fleet.policy(key).size_gb or told

    def off_gpu(self, backend: Backend, key: str, wish: Wish) -> bool:
        """Whether the model must be on the GPU, and is or would be on the CPU in part there."""
        only = self.settings.router.require_gpu if wish.gpu_only is None else wish.gpu_only
        if not only:
            return False
        share = backend.gpu_shares.get(key)
        if share is not None:
            return share < 100
        memory, size = self.cards.memory_of(backend.device.name), self.size_of(key, [backend])
        return memory is not None and size > 0 and not memory.holds(size)

    def place_on_gpu(self, call: Call, want: Want) -> Want:
        """What the call wants, at a backend that has its model on the GPU, if it must be there."""
        if not (self.settings.router.require_gpu or call.wish.gpu_only):
            return want
        able = [one for one in self.fleet.serving(want) if one.usable]
        good = [one for one in able if not self.off_gpu(one, want.model, call.wish)]
        if able and not good:
            raise LlmqError(f"{call.model} {SPLIT}", "no_model")
        return want._replace(backend=good[0].name) if good != able else want

    def is_busy(self, call: Call) -> bool:
        """Whether the call would have to wait; longer than it wants to, where it says so."""
        ticket, longest = call.ticket, call.wish.max_queue
        if self.scheduler.place_now(ticket) is not None:
            return False
        ahead = self.scheduler.ahead_of(self.fleet.serving(ticket.want), ticket.priority)
        return longest is None or ahead[1] > longest


def abilities_of(backend: Backend, key: str, policy: ModelSettings) -> dict[str, bool]:
    """What a model can there, and what it cannot; what is not known is left out."""
    told = read_abilities(backend.entry(key))
    told.update(backend.shown.get(key, ("", {}))[1])
    told.setdefault(EMBED, bool(EMBEDDING.search(key)))
    return {**told, **dict.fromkeys(policy.tags, True)}


# ==== 36. Admission ===============================================================================
# From a request to a call that may wait: what it asks, of which model, whether any backend could
# make something of it.  What is wrong with it is told now, not when its turn comes.


def check_way(request: Request, instance: str) -> None:
    """What is refused of a body that goes on to a backend, and of a way that it has come."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise LlmqError("send the body without Content-Encoding", "unsupported_media_type")
    check_loop(request, instance)


def check_loop(request: Request, instance: str) -> None:
    if f"llmq-{instance}" in request.headers.get("via", ""):
        raise LlmqError("this request has been through this llmq before", "loop_detected")


def read_session(headers: Headers, values: Mapping[str, Any]) -> str:
    """The conversation that a request belongs to, as far as it says so."""
    for name in SESSION_HEADERS & headers.keys():
        return headers[name][:NAME_LENGTH]
    told = values.get("prompt_cache_key")
    return told[:NAME_LENGTH] if isinstance(told, str) else ""


def usual_class(client: Client, policy: ModelSettings, by_rule: str = "") -> Priority:
    """The class of requests that name none: by a rule > the client's > its key's > the model's."""
    words = (by_rule, client.settings.class_, client.account.settings.class_, policy.class_)
    return PRIORITY_WORDS[next(filter(None, words), Priority.NORMAL.word)]


LEAST_CONTEXT = 4096  # that an Ollama gives a model by itself


class Admission:
    """Reads requests and gives them tickets."""

    def __init__(
        self, settings: Settings, clients: Clients, recall: Recall, chooser: Chooser
    ) -> None:
        self.settings = settings
        self.chooser = chooser
        self.monitor = chooser.monitor
        self.fleet = chooser.fleet
        self.clients = clients
        self.recall = recall
        via = f"Via: 1.1 llmq-{self.monitor.instance}\r\nAccept-Encoding: identity\r\n"
        self.via_lines = via.encode()

    async def admit(self, call: Call) -> None:
        """Give the call a ticket; raises what is wrong with its request."""
        request, caller = call.request, call.caller
        assert request is not None  # it is new
        check_way(request, self.monitor.instance)
        body = await call.reply.read_body(self.settings.server.max_body)
        values = await self.read(call, request, body)
        pinned = request.headers.get("x-llmq-backend", "")
        await self.find_model(call, values, pinned, request.headers)
        policy = self.fleet.policy(model_key(call.model))
        if policy is not NO_POLICY and values and call.question.done_reason != "unload":
            call.policy = policy
        fit = policy.num_ctx == "fit" or (call.choice.auto and not policy.num_ctx)
        if call.question.context or fit:
            await self.find_context(call, values, fit=fit)
        if pinned:
            self.check_pin(pinned, call.model)
        routes = () if call.blind else call.endpoint.routes
        want = Want(model_key(call.model), routes, backend=pinned or call.choice.backend)
        want = self.chooser.place_on_gpu(call, want)
        client = self.client_of(call)
        priority = self.class_of(call, client, policy, request.headers)
        call.lines = common_lines(self.via_lines, tuple(map(request.headers.get, RELAYED_REQUEST)))
        if self.fleet.relayed:
            names = more_names(request.headers, self.fleet.relayed)
            call.more = {name: request.headers[name] for name in names}
        size = len(body) + sum(map(len, call.more.values()))
        call.ticket = Ticket(call.id, client, want, priority, size, caller.foreign)
        call.ticket.session = read_session(request.headers, values)
        call.ticket.patient = bool(call.job)
        call.ticket.longest = None if call.job else call.wish.max_queue
        if not (call.question.done_reason or call.blind):
            await self.check_supported(call, values)
        if self.clients.is_blocked(caller):  # since it came
            raise LlmqError(BLOCKED, "forbidden")
        if not (call.job or call.blind):
            await self.look_for_shortcut(call, request, values)
        request.body, request.headers = b"", NO_HEADERS  # what waits keeps little memory
        call.request = None

    async def find_model(
        self, call: Call, values: Mapping[str, Any], pinned: str, headers: Headers
    ) -> None:
        """The model that is named, or that serves the call best where that is left to llmq."""
        asked = call.question.model or self.settings.upstream.model
        if pinned and pinned not in self.fleet.backends:
            raise BadRequest(f"there is no backend {printable(pinned)}")
        if asked == AUTO:
            await self.monitor.catch_up()
        if asked == AUTO and not (self.fleet.lists(AUTO) or AUTO in self.settings.aliases):
            client = self.clients.asking(call.caller)
            priority = self.class_of(call, client, NO_POLICY, headers)
            call.choice = await self.chooser.choose(call, values, pinned, priority)
            call.model = call.choice.model
            return
        call.model = await self.resolve_model(call.question.model)
        if call.wish.told:
            forbidden = map(self.chooser.meant, call.wish.forbidden)
            if model_key(call.model) in map(model_key, forbidden):
                raise BadRequest("the model that it names is one of router.forbiddenModels")
            _, (task, _) = await self.chooser.read(call, values)
            call.choice = Choice(call.model, task)

    async def look_for_shortcut(
        self, call: Call, request: Request, values: Mapping[str, Any]
    ) -> None:
        """Whether the call may be answered later, or from the cache."""
        if call.wish.told or "prefer" in request.headers:
            self.look_for_later(call, request)
        if not call.later and self.recall.is_wanted(call, values, request.headers):
            await self.recall.find_key(call, values, request.headers)

    def look_for_later(self, call: Call, request: Request) -> None:
        """Whether the call may be answered later, and what is then asked anew."""
        call.later = read_later(request.headers, call.wish)
        if call.caller.foreign:
            call.later = ""
        told = {name: request.headers[name] for name in JOB_HEADERS if name in request.headers}
        call.asked = {**told, **call.more}, request.body

    async def find_context(self, call: Call, values: Mapping[str, Any], *, fit: bool) -> None:
        """The context that the call is to have: as asked for, or as its prompt needs."""
        context = call.question.context
        if fit and call.endpoint.limits and not call.caller.foreign:
            look = functools.partial(fitting, values, call.endpoint)
            context = max(context, await beside(look, heavy=is_heavy(call.question.body)))
        if context:
            context = await self.clamp_context(call.model, context)
            call.question = call.question._replace(context=context)

    def client_of(self, call: Call) -> Client:
        """Who asks; `forbidden` where the model is none of theirs."""
        if call.model:
            check_model(call.caller, call.model)
        return self.clients.asking(call.caller)

    async def read(self, call: Call, request: Request, body: bytes) -> Mapping[str, Any]:
        """The call's question; and the members of its body, as far as it has such."""
        header = request.headers.get("x-queue-priority")
        values: Mapping[str, Any] = {}
        if call.endpoint.path == TRANSCRIPTIONS:
            call.question = read_form(body, request.headers.get("content-type", ""), header)
        elif not call.blind:  # else it was read to find that out
            foreign = call.caller.foreign
            read = functools.partial(read_question, body, call.endpoint, header, foreign=foreign)
            call.question, values = await beside(read, heavy=is_heavy(body))
        if "router" in values:
            call.wish = read_wish(values)
            if call.question.priority is None:
                call.question = call.question._replace(priority=call.wish.priority)
        return values

    def check_pin(self, pinned: str, model: str) -> None:
        """Refuse a pin to a backend that has not the model, or is not to serve it."""
        only = self.fleet.policy(model_key(model)).backends
        if not self.fleet.named(pinned).may_have(model_key(model)):
            raise model_not_found(f"{model} at {pinned}")
        if only and pinned not in only:
            raise BadRequest(f"{model} is asked of {', '.join(only)} only")

    def class_of(
        self, call: Call, client: Client, policy: ModelSettings, headers: Headers
    ) -> Priority:
        """As asked for > by a rule > the client's > the model's; at most normal for a stranger."""
        priority, word = call.question.priority, ""
        if call.job:  # its class was found when it was accepted
            priority = PRIORITY_WORDS[headers["x-queue-priority"]]
        if priority is None and self.settings.rules:
            facts = (call.endpoint.path, call.question.model or call.model, client.name)
            number, word = find_rule(self.settings.rules, facts, headers)
            call.rule = number and f"class {word} by rule {number}"
        if priority is None:
            priority = usual_class(client, policy, word)
        priority = client.account.lowered(priority)
        return max(priority, Priority.NORMAL) if call.caller.foreign else priority

    async def answer_load(self, call: Call) -> bool:
        """Answer what only loads or unloads a model, where it need not wait: False where it does.

        Only an Ollama loads on request; to unload needs no slot, and may be what makes room.
        """
        reason, want = call.question.done_reason, call.ticket.want
        serving = self.fleet.serving(Want(want.model, backend=want.backend))
        natives = [backend for backend in serving if backend.traits.native]
        able = [backend for backend in natives if backend.usable]
        if call.ticket.backend is not None:  # it is an errand there
            serving = natives = able = [call.ticket.backend]
        if not serving or (natives and (reason == "load" or not able)):
            return False
        named = call.question.model or call.model
        facts: Facts = {"model": named, "created_at": rfc3339(time.time()), "done": True}
        empty: Facts = {"message": {"role": "assistant", "content": ""}}
        facts.update(empty if call.route == OLLAMA_CHAT else {"response": ""}, done_reason=reason)
        for backend in able:
            limit, lines = backend.limits.first_byte_timeout, self.via_lines
            body = call.question.body_for(backend.name_for(call.model))
            path = call.endpoint.path
            facts = await self.monitor.ask(limit, backend, path, body, lines, call.reply)
            self.monitor.probe_now(backend)
        call.reply.respond(200, render_json({**facts, "model": named}), headers=call.headers)
        return True

    async def resolve_model(self, asked: str) -> str:
        """The model that is meant; `model_not_found` only when no backend can have it."""
        fleet = self.fleet
        if asked and fleet.lists(asked):
            fleet.check_spelling(asked)
            return asked
        if any(one.state is State.UNKNOWN for one in fleet.backends.values()):
            await self.monitor.refresh()
        asked = asked or self.settings.upstream.model or fleet.default_model() or ""
        if not asked:
            message = "no backend has told its models yet; name one in `model`"
            raise LlmqError(fleet.trouble() or message, "backend_down")
        if not fleet.lists(asked):
            asked = find_alias(self.settings.aliases, asked) or asked
        if fleet.knows(asked) is False:
            await self.monitor.refresh()
        if fleet.knows(asked) is False:
            raise model_not_found(asked)
        fleet.check_spelling(asked)
        return asked

    async def clamp_context(self, model: str, asked: int) -> int:
        """What is asked for, but no more than the settings and the model allow, as Ollama does."""
        most = min(asked, self.settings.upstream.max_num_ctx)
        for backend in self.fleet.serving(Want(model_key(model))):
            if backend.traits.native:
                most = min(most, await self.longest_context(backend, model) or most)
        return most

    async def longest_context(self, backend: Backend, model: str) -> int:
        """What the model itself can have there, asked for once; 0: not known."""
        key, longest = model_key(model), backend.contexts.max
        if key not in longest and backend.usable:
            await self.monitor.learn(backend, model)
        return longest.get(key, 0)

    async def check_supported(self, call: Call, values: Mapping[str, Any]) -> None:
        """Untranslatable or BadRequest when no backend could make anything of the request."""
        want, question = call.ticket.want, call.question
        able = self.fleet.serving(want)
        if not able and self.fleet.serving(want._replace(routes=())):
            raise Untranslatable(self.fleet.why_unsupported(want))
        routes = set()
        for backend in able:
            route = call.route_at(backend)
            if route is None or route == want.routes[0]:
                return
            wanted = question.context or question.keep_alive or backend.num_ctx(want.model)
            if not wanted and backend.supports(want.routes[0], want.model):
                return  # it need not be translated: only the model's settings have it so
            routes.add(route)
        if question.skipped:
            raise Untranslatable(TOO_MANY)
        for route in routes:  # it has to be translated, wherever it goes
            translator = TRANSLATORS[want.routes[0], route]
            write = translator(dict(values), call.model, 0, time.time).body
            await beside(write, heavy=question.long)


def fitting(values: Mapping[str, Any], endpoint: Endpoint) -> int:
    """The power of two that holds the prompt as estimated and the answer asked for; 0: any does."""
    asked = (values.get("options") or {}) if endpoint.options else values
    answer = max(whole_number(asked.get(name)) or 0 for name in endpoint.limits)
    tokens = estimate_tokens(values) * 4 // 3 + answer  # by a third more: code and Chinese need it
    return 1 << (tokens - 1).bit_length() if tokens > LEAST_CONTEXT else 0


def check_model(caller: Caller, model: str) -> None:
    """Refuse a model that is none of those that whoever asks may use."""
    if not caller.account.may_use(model_key(model)):
        raise LlmqError(f"{caller.account.name} may not use {printable(model)}", "forbidden")


def model_not_found(asked: str) -> LlmqError:
    return LlmqError(f"model {printable(asked)!r} not found", "model_not_found", param="model")


# ==== 37. Gateway =================================================================================
# The story.  `Gateway.serve` is one request from its arrival to its one answer; its steps are the
# methods below it, in that order.  Two rules hold everything together: whoever wants to end a call
# early calls `Gateway.stop` with the reason, or the scheduler expires its ticket; and a slot is
# given back in `give_back` alone, after the connection to the backend is closed or back in the
# pool, on every way out.

FORECAST_SECONDS = 1.0  # between two passes over all that wait, for positions and expectations
FORECAST_AHEAD = 0.3  # seconds before that in which whoever shows them has the next one made


class Gateway:
    """Lets calls wait, sends them on, and answers them."""

    def __init__(
        self, settings: Settings, instance: str, now: Callable[[], float], store: Store
    ) -> None:
        self.settings = settings
        self.store = store
        self.instance = instance  # random, tells this llmq from others
        self.now = now
        self.started = now()
        self.fleet = Fleet()
        self.clients = Clients()
        self.accounts = Accounts()
        self.metrics = Metrics()
        self.journal = Journal(self.metrics)
        self.scheduler = Scheduler(self.fleet, settings)
        self.monitor = Monitor(settings, self.fleet, self.metrics, instance)
        self.fleet.on_load = self.monitor.news.set
        self.added: dict[str, Facts] = {}  # raw rows of [backends], at run time
        self.discovery = Discovery(self.monitor, self.added)
        self.recall = Recall(settings, self.scheduler, self.metrics, instance)
        self.jobs = Jobs(settings, store)
        self.chooser = Chooser(settings, self.monitor, self.scheduler)
        self.admission = Admission(settings, self.clients, self.recall, self.chooser)
        self.pool = Pool()
        self.calls: dict[str, Call] = {}  # waiting and running
        self.changes = 0  # counts up with everything that a snapshot shows
        self.errands: dict[Names, asyncio.Future[None]] = {}  # by action, backend and model key
        self.draining = False
        self.config_error: str | None = None  # what the last reload complained about
        self._forecast = Forecast([])
        self._forecast_at = float("-inf")

    # ---- the story

    async def serve(self, call: Call) -> None:
        """The life of one request: read it, wait, ask, answer; again where that is allowed."""
        done = False
        try:
            if not call.admitted:
                await self.admission.admit(call)
            shortcut = call.question.done_reason or call.later or call.answer_key
            if shortcut and await self.answer_at_once(call):
                done = True
                return
            self.enqueue(call)
            while call.answer is None:
                while call.ticket.state is TicketState.WAITING:
                    await call.turn
                    if call.reply.gone:
                        self.leave(call)
                await self.attempt(call)
            await call.deliver()
            done = True
        except LlmqError as error:
            error.message = self.fleet.without_keys(error.message)
            call.send_error(error)
        finally:
            self.settle(call, done=done)

    async def answer_at_once(self, call: Call) -> bool:
        """Answer what need not run now: what is kept for later, or known, or only loads a model."""
        if call.question.done_reason:
            return await self.admission.answer_load(call)
        busy = call.later == BUSY and self.chooser.is_busy(call)
        if busy or call.later == ALWAYS:
            await self.jobs.accept(call)
            return True
        return bool(call.answer_key) and await self.recall.answer(call)

    def enqueue(self, call: Call) -> None:
        """Let the call wait for its turn, and watch whether its client does."""
        call.reply.watch()
        if call.reply.gone:
            raise ClientLeft("the client left")
        if self.draining:
            raise LlmqError("llmq is shutting down", "shutting_down")
        now, limits = self.now(), self.settings.server
        stream = call.question.stream
        call.patience = limits.heartbeat_after if stream else limits.whole_heartbeat_after
        call.heartbeat_at = now + call.patience if call.patience else NEVER
        backend = self.scheduler.start(call.ticket, now)
        if backend is not None:
            self.calls[call.id] = call
            self.begin(call, backend, now)
            self.changes += 1
            return
        self.scheduler.submit(call.ticket, now)
        self.calls[call.id] = call
        self.pump()

    async def attempt(self, call: Call) -> None:
        """Ask the granted backend; without an answer the call waits again for another attempt."""
        if call.ticket.state is TicketState.ENDED:
            raise call.error or LlmqError("the call broke off")
        backend = call.ticket.backend
        assert backend is not None  # its turn has come
        failure: LlmqError | None = LlmqError("the call broke off")
        again = False
        try:
            call.reply.watch(functools.partial(self.leave, call))
            await call.ask(backend, backend.limits)
            failure = None
        except LlmqError as error:
            failure = call.error or error
            error.__traceback__ = None  # its frames hold the error, and the call
        finally:
            again = await self.give_back(call, backend, failure)
        if failure is not None and not again:
            raise call.error or failure
        if failure is not None:
            failure.__traceback__ = failure.__context__ = None  # their frames hold the call

    async def give_back(self, call: Call, backend: Backend, failure: LlmqError | None) -> bool:
        """The one place where a slot is given back; True when the call waits again."""
        ticket, upstream = call.ticket, call.upstream
        call.upstream, call.deadline = None, NEVER
        if upstream is not None and upstream.reusable:
            self.pool.give(upstream, self.now())
        elif upstream is not None:
            await upstream.close()
        now = self.now()
        self.monitor.record_outcome(backend, failure, now)
        again = failure is not None and self.may_retry(call, failure)
        if again:
            self.scheduler.retry(ticket, now, counted=not isinstance(failure, Untranslatable))
            self.metrics.add("llmq_retries_total", backend.name)
        else:
            if call.route == ERRAND.path:
                self.monitor.probe_now(backend)
            elif failure is None:
                device = backend.device.name
                took = now - ticket.started - backend.load_of(ticket)
                self.scheduler.note_service(ticket.model, took, device, ticket.kind)
            self.scheduler.finish(ticket, now)
        self.pump()
        return again

    def settle(self, call: Call, *, done: bool) -> None:
        """One record and one line in the log for every call, however it ended."""
        self.calls.pop(call.id, None)
        if call.later and call.reply.status == HTTPStatus.ACCEPTED:  # a job has them at its end
            return
        if done:
            call.error = None
        else:
            call.error = call.error or LlmqError("the call broke off")
        if call.admitted and done:
            call.ticket.client.done += 1
        elif call.admitted:
            left = isinstance(call.error, ClientLeft)
            call.ticket.client.left += left
            call.ticket.client.failed += not left
        self.changes += 1
        if call.answer_key:
            self.recall.end(call)
        record, account = record_of(call, self.now()), call.caller.account
        self.journal.keep(record)
        if account.is_metered:
            account.note_tokens(tokens_of(call, record), today()[0])

    def end_lease(self, call: Call) -> None:
        """The device is everybody's again."""
        self.scheduler.finish(call.ticket, self.now())
        self.settle(call, done=call.error is None)
        self.pump()

    # ---- what the steps share

    def pump(self) -> None:
        """Something has changed: start whatever can start."""
        self.changes += 1
        self.start_ready(self.now())

    def start_ready(self, now: float) -> None:
        for ticket, backend in self.scheduler.dispatch(now):
            self.begin(self.calls[ticket.id], backend, now)

    def begin(self, call: Call, backend: Backend, now: float) -> None:
        """The call's turn has come.

        On a connection from the pool its request is sent right here, so that no runner idles for a
        turn of the loop; the call is woken by the first bytes of the answer.  A fresh connection it
        makes itself.
        """
        call.deadline = now + backend.limits.first_byte_timeout
        if isinstance(call.reply, Kept):  # its note is on its way before an answer is
            call.reply.begin()
        upstream = None if call.question.long else self.pool.take(backend.origin, now)
        if upstream is not None:
            try:
                upstream.send(call.writer(backend)())
            except Exception:  # noqa: BLE001 - the attempt meets it again, and harms nobody else
                upstream.stream.close()
            else:
                call.upstream, upstream.stream.waiter = upstream, call.turn
                return
        call.turn.wake()

    def may_retry(self, call: Call, failure: LlmqError) -> bool:
        """Whether the call may wait for another attempt, or for another route."""
        if isinstance(failure, Untranslatable):
            again = has_other_route(call, self.fleet, failure, self.now())
        else:
            again = failure.retryable
            again = again and call.ticket.attempts < self.settings.queue.max_attempts
        return again and call.error is None and not self.draining

    def forecast(self, now: float) -> Forecast:
        """What all that wait can expect, as of one pass for one `now`, at most a second old."""
        if now - self._forecast_at >= FORECAST_SECONDS:
            self._forecast, self._forecast_at = Forecast([]), now  # one at a time in memory
            self._forecast = forecast(self.scheduler, now)
        return self._forecast

    async def foresee(self) -> None:
        """Forecast in a turn of the loop by itself, before it is due: of 10,000 it takes 25 ms."""
        now = self.now()
        if now - self._forecast_at >= FORECAST_SECONDS - FORECAST_AHEAD:
            self._forecast_at = float("-inf")
            self.forecast(now)
            await asyncio.sleep(0)

    def drop_caches(self) -> None:
        """Let go of what was kept of many that have gone."""
        self.journal.flush()
        self._forecast, self._forecast_at = Forecast([]), float("-inf")

    # ---- ending calls early

    def stop(self, call: Call, error: LlmqError) -> None:
        """End a call for this reason, wherever it is; does nothing to one that has ended."""
        if call.error is not None or not call.admitted:
            return
        if call.ticket.state is TicketState.WAITING:
            self.scheduler.cancel(call.ticket)
            self.end_wait(call, error)
        elif call.id in self.recall.joined:
            self.end_wait(call, error)
        elif call.ticket.state is TicketState.RUNNING:
            call.error = error
            if call.ticket.want.device:
                self.end_lease(call)
            if call.upstream is not None:
                call.upstream.stream.interrupt(error)
            if call.connecting is not None:
                call.connecting.cancel()
            if call.reply.blocked:  # nothing could reach a client that far behind
                call.reply.abort()

    def leave(self, call: Call) -> None:
        self.stop(call, ClientLeft("the client left"))

    def end_wait(self, call: Call, error: LlmqError) -> None:
        """The ticket is out of the queue: wake its call with the reason."""
        call.error = error
        call.turn.wake()
        self.changes += 1

    def reap(self, now: float) -> None:
        """End what has waited too long, for a slot or for a backend's next byte."""
        for ticket, why in self.scheduler.expire(now):
            self.end_wait(self.calls[ticket.id], why)
        for ticket in list(self.scheduler.running.values()):
            call = self.calls[ticket.id]
            if now >= call.deadline and ticket.want.device:
                self.end_lease(call)
            elif error := why_late(call, now):
                self.stop(call, error)
        for backend in self.fleet.backends.values():
            backend.forget_unsupported(now)
        self.pool.reap(now)
        self.journal.flush()
        if self.scheduler.waiting:
            self.start_ready(now)  # what an event should have started, and time alone has

    # ---- orders from outside

    def set_mode(self, mode: Mode) -> None:
        self.scheduler.mode = mode
        self.pump()

    def cancel(self, call: Call) -> None:
        self.stop(call, LlmqError("cancelled on request", "cancelled"))

    def reprioritise(self, call: Call, priority: Priority) -> None:
        if call.ticket.state is not TicketState.WAITING:
            raise LlmqError("only a waiting request can change its class", "conflict")
        self.scheduler.reprioritise(call.ticket, priority)
        call.rule = ""
        self.pump()

    def drain(self) -> None:
        """Let nothing new in; what waits is told, what runs may finish."""
        self.draining = True
        leases = [one for one in self.scheduler.running.values() if one.want.device]
        for ticket in (*self.scheduler.waiting.values(), *leases):
            self.stop(self.calls[ticket.id], LlmqError("llmq is shutting down", "shutting_down"))


# ==== 38. Models ==================================================================================
# What the outside may ask about models, never queued: lists merged from what the probes keep fresh,
# and the management of Ollama's, which streams straight through, bodies of gigabytes included.

NO_DETAILS = {
    "parent_model": "", "format": "gguf", "family": "", "families": None, "parameter_size": "",
    "quantization_level": "",
}  # fmt: skip
LONG_AGO, LONG_AFTER = "1970-01-01T00:00:00Z", "2318-01-01T00:00:00Z"
# What there must be a model for, and the member that names it, here and elsewhere.
HAVING = ("/api/push", "/api/copy", "/api/delete")
MANAGED_BY = {
    **dict.fromkeys((*HAVING, "/api/pull", "/api/create"), "model"),
    "/api/copy": "source",
}
Lister = Callable[[Report], Sequence[Facts]]


def reports_of(fleet: Fleet) -> list[Report]:
    backends = fleet.backends.values()
    return [each.report for each in backends if each.report and each.state is State.UP]


def tag_rows(report: Report) -> Sequence[Facts]:
    """As `/api/tags` has them; of other runners than Ollama little is known."""
    if KINDS[report.kind].native and report.tags:
        return report.tags
    return [bare_tag(str(entry["id"]), since(entry)) for entry in report.entries]


def running_rows(report: Report) -> Sequence[Facts]:
    """The loaded ones, as `/api/ps` has them."""
    if KINDS[report.kind].native:
        return report.running
    return [bare_tag(name, expires_at=LONG_AFTER, size_vram=0) for name in report.loaded]


def merge_rows(fleet: Fleet, rows_of: Lister = lambda report: report.entries) -> dict[str, Facts]:
    """The models of all healthy backends, each once, as its first backend describes it."""
    merged: dict[str, Facts] = {}
    for report in reports_of(fleet):
        for row in rows_of(report):
            merged.setdefault(model_key(str(row.get("id") or row.get("name"))), row)
    return merged


def usable_rows(rows: Mapping[str, Facts], caller: Caller) -> list[Facts]:
    """Those of the models that whoever asks may use."""
    return [row for key, row in rows.items() if caller.account.may_use(key)]


def since(entry: Facts) -> str:
    created = entry.get("created")
    return rfc3339(created) if isinstance(created, (int, float)) else LONG_AGO


def bare_tag(name: str, modified: str = LONG_AGO, **more: Any) -> Facts:
    """A model that Ollama does not have, in Ollama's words; its CLI shows 12 digits of a digest."""
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()
    facts = {"name": name, "model": name, "modified_at": modified, "size": 0, "digest": digest}
    return {**facts, "details": NO_DETAILS, **more}


def bare_show(fleet: Fleet, model: str) -> Facts:
    """What the lists of models tell of one that Ollama does not have, as its /api/show would."""
    entries = [entry for report in reports_of(fleet) for entry in report.entries]
    facts = {"modelfile": "", "parameters": "", "template": "", "details": NO_DETAILS}
    capabilities, info = ["embedding" if EMBEDDING.search(model) else "completion"], {}
    for entry in [one for one in entries if model_key(str(one["id"])) == model_key(model)]:
        told = entry.get("capabilities")
        words = [each for each in told if isinstance(each, str)] if isinstance(told, list) else []
        capabilities += [{"tool_use": "tools"}.get(word, word) for word in words]
        capabilities += ["vision"] if read_abilities(entry).get("vision") else []
        length = length_of(entry)
        if length:
            info = {"general.architecture": "unknown", "unknown.context_length": length}
    return {**facts, "model_info": info, "capabilities": list(dict.fromkeys(capabilities))}


def anthropic_model(entry: Facts) -> Facts:
    name = entry["id"]
    return {"type": "model", "id": name, "display_name": name, "created_at": since(entry)}


def anthropic_list(entries: Sequence[Facts]) -> Facts:
    ids = [entry["id"] for entry in entries] or [None]
    data = [anthropic_model(entry) for entry in entries]
    return {"data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}


def only_members(values: Mapping[str, Any], *names: str) -> None:
    """BadRequest for a member that an order does not know: it may be one that was misspelt."""
    for name in values:
        if name not in names:
            raise BadRequest(misspelt("member", name, names), param=printable(name))


def pick_manager(fleet: Fleet, path: str, values: Mapping[str, Any], named: str | None) -> Backend:
    asked = [fleet.named(named)] if named is not None else list(fleet.backends.values())
    ollamas = [backend for backend in asked if backend.traits.native]
    if not ollamas and all(backend.models_known for backend in asked):
        raise Untranslatable("that is no Ollama, which alone manages its models")
    able = [backend for backend in ollamas if backend.usable]
    if not able:
        raise LlmqError("every Ollama is down", "backend_down")
    if path in HAVING and not named:
        model = read_name(values, MANAGED_BY[path])
        able = [backend for backend in able if model_key(model) in backend.models]
        if not able:
            raise model_not_found(model)
    return able[0]


def pick_errands(fleet: Fleet, action: str, model: str, named: object, *how: Any) -> list[Errand]:
    """To load a model where one is that has it; to unload it, `*` any, wherever it is loaded."""
    able = [one for one in fleet.backends.values() if named in (None, "any", one.name, one.url)]
    if not able:
        raise LlmqError(f"there is no backend {printable(str(named))}", "not_found")
    key = model_key(model)
    able = [one for one in able if model == "*" or one.has(key)]
    if not able:
        raise model_not_found(model)
    able = [one for one in able if one.traits.errands]
    if not able:
        raise Untranslatable("no backend that has it loads and unloads models on request")
    if action == "load":
        best = min(able, key=lambda one: (not one.usable, one.is_loaded(key)))
        return [Errand(action, best, best.name_for(model), *how)]
    loaded = [(one, name) for one in able if one.report for name in one.report.loaded]
    return [Errand(action, *one) for one in loaded if model == "*" or model_key(one[1]) == key]


def run_errand(
    gateway: Gateway, errand: Errand, caller: Caller, ident: str, priority: Priority
) -> Call:
    """Have a model loaded by a ticket like any other, or unloaded beside the queue."""
    action, backend, model, context, keep_alive = errand
    kind, same = backend.traits, (action, backend.name, key := model_key(model))
    again = action == "load" and not kind.native and backend.is_loaded(key)  # it would be a second
    if again or same in gateway.errands:
        raise LlmqError(f"{backend.name} was told to {action} {model} already", "conflict")
    path, facts = errand.request(gateway.fleet.policy(key).keep_alive)
    if not kind.native and (keep_alive or (context and not kind.errands[2])):
        raise Untranslatable(f"{backend.name} takes no such keep_alive or num_ctx")
    found = read_object(render_json(chosen(facts)).decode())
    body, edits = found.text.encode(), find_edits(found, REPLACED)
    endpoint = ENDPOINTS.get(path) or Endpoint((path,), OPENAI, lambda _: None)
    call = Call(Nobody(), endpoint, ERRAND, caller, (ident, ident))
    asked = Question(model, False, priority, body, edits, context, kind.native)
    call.question, call.model, call.request = asked._replace(done_reason=action), model, None
    call.lines = gateway.admission.via_lines + b"Content-Type: application/json\r\n"
    client, want = gateway.clients.asking(caller), Want(key, (path,), backend=backend.name)
    call.ticket = Ticket(ident, client, want, priority, len(body))
    call.ticket.backend = backend
    task = gateway.errands[same] = asyncio.ensure_future(gateway.serve(call))
    task.add_done_callback(lambda _: gateway.errands.pop(same))
    return call


def reset_context(fleet: Fleet, model: str) -> int:
    """Forget the context that the requests for a model share; the backends it has been at."""
    if fleet.knows(model) is False:
        raise model_not_found(model)
    serving = fleet.serving(Want(model_key(model)))
    for backend in serving:
        backend.contexts.reset(model_key(model))
    return len(serving)


async def order_models(gateway: Gateway, values: Facts, caller: Caller, ident: str) -> Facts:
    """Send the errands that somebody orders; what was ordered where."""
    only_members(values, "action", "model", "backend", "num_ctx", "keep_alive")
    action, model, named = map(values.get, ("action", "model", "backend"))
    if action not in ("load", "unload") or not isinstance(model, str) or not model:
        raise BadRequest('action is "load", "unload" or "reset_context", model a name')
    told = values.get("keep_alive")
    keep_alive = "" if told is None else str(told)
    if not re.fullmatch(KEEP_ALIVE, keep_alive):
        raise BadRequest("keep_alive is seconds, or a time like 5m", param="keep_alive")
    context = parse_context(values.get("num_ctx"), "num_ctx")
    if model != "*" or action == "load":
        model = await gateway.admission.resolve_model(model)
        check_model(caller, model)
        context = context and await gateway.admission.clamp_context(model, context)
    if action == "unload":
        await gateway.monitor.catch_up()  # what has just been loaded is in no list yet
    errands = pick_errands(gateway.fleet, action, model, named, context, keep_alive)
    for errand in errands:
        check_model(caller, errand.model)
    for number, errand in enumerate(errands):
        own = ident + f".{number}" * (number > 0)
        run_errand(gateway, errand, caller, own, Priority.HIGH)
    names = ", ".join(dict.fromkeys(errand.backend.name for errand in errands))
    return {"action": action, "model": model, "backend": names}


def read_name(values: Mapping[str, Any], member: str = "model") -> str:
    """The model that a request is about; `name` is the older name of the member."""
    model = values.get(member) or values.get("name")
    if not isinstance(model, str):
        raise BadRequest(f"{member} is the name of a model", param=member)
    return model


async def count_tokens(gateway: Gateway, exchange: Exchange) -> Facts:
    """Tokens of a request for messages: counted where the model is loaded, else estimated."""
    body = await exchange.read_body(gateway.settings.server.max_body)
    read = functools.partial(read_question, body, COUNT_ENDPOINT)
    question, values = await beside(read, heavy=is_heavy(body))
    monitor = gateway.monitor
    estimate = len(body) // 4 if question.skipped else estimate_tokens(values)
    if question.model == AUTO and not gateway.fleet.lists(AUTO):  # which it will be, nobody knows
        return {"input_tokens": estimate}
    model = await gateway.admission.resolve_model(question.model)
    check_model(exchange.caller, model)
    key = model_key(model)
    lines = relayed_lines(exchange.request.headers, ("anthropic-version", "anthropic-beta"))
    for backend in gateway.fleet.serving(Want(key, (COUNT_TOKENS,))):
        if backend.usable and backend.traits.counts_tokens and backend.is_loaded(key):
            body = question.body_for(backend.name_for(model))
            limit = backend.limits.probe_timeout
            with contextlib.suppress(LlmqError):
                counted = await monitor.ask(limit, backend, COUNT_TOKENS, body, lines, exchange)
                if isinstance(counted.get("input_tokens"), int):
                    return counted
    return {"input_tokens": estimate}


@dataclass
class Passthrough:
    """A request that goes to one backend and back as it is, both bodies piece by piece."""

    exchange: Exchange
    backend: Backend
    path: str
    gateway: Gateway
    ended: Callable[[], object]  # called as soon as it has ended, well or not
    limit: float = NEVER  # seconds for which the backend may be silent
    inside: bool = False  # what the client was shown ends inside a line

    async def run(self) -> None:
        """The whole way; there is no limit on its length, only on silence."""
        exchange, dialling = self.exchange, asyncio.ensure_future(dial(self.backend.origin))
        limit = self.gateway.settings.upstream.connect_timeout
        upstream = await connect_within(limit, dialling, self.backend)
        try:
            await self.relay(upstream, await self.ask(upstream))
        except LlmqError as error:
            if not exchange.started:
                raise
            exchange.fail(self.last_words(error))
        finally:
            self.ended()
            await upstream.close()

    async def ask(self, upstream: Upstream) -> ResponseHead:
        """Send it all, unless the answer comes before: then what is left is not wanted."""
        sending = asyncio.ensure_future(self.send(upstream))
        heading = asyncio.ensure_future(upstream.read_head())
        try:
            await asyncio.wait({sending, heading}, return_when=asyncio.FIRST_COMPLETED)
            self.exchange.keep_alive = self.exchange.keep_alive and sending.done()
            sending.cancel()
            await asyncio.wait({sending})
            if not sending.cancelled():
                sending.result()  # or what it met
            left = ClientLeft("the client left")
            self.exchange.watch(functools.partial(upstream.stream.interrupt, left))
            with self.patience(upstream):
                return await heading
        finally:
            sending.cancel()
            heading.cancel()

    @contextlib.contextmanager
    def patience(self, upstream: Upstream) -> Iterator[None]:
        """Inside, BackendTimeout ends a silence of more than `limit` seconds."""
        late = BackendTimeout(f"{self.backend.name} said nothing for {self.limit:g} s")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.limit, upstream.stream.interrupt, late)
        try:
            yield
        finally:
            timer.cancel()

    async def send(self, upstream: Upstream) -> None:
        exchange, request = self.exchange, self.exchange.request
        length = len(request.body) if request.body else exchange.length
        chunked = length == CHUNKED
        coding = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"
        instance = self.gateway.instance
        lines = f"Connection: close\r\nVia: 1.1 llmq-{instance}\r\n".encode()
        if length or request.method in ("POST", "PUT", "PATCH"):
            lines += f"{coding}\r\n".encode()
        lines += relayed_lines(request.headers, self.relayed(request.headers))
        target = f"{self.path}?{request.query}" if request.query else self.path
        upstream.send(render_request(self.backend, request.method, target, lines) + request.body)
        limit = self.gateway.settings.server.stall_timeout
        async for piece in exchange.pieces():  # none of a body that is here already
            await upstream.push(render_chunk(piece) if chunked else piece, limit)
        if chunked:
            upstream.stream.write(LAST_CHUNK)

    async def relay(self, upstream: Upstream, head: ResponseHead) -> None:
        exchange = self.exchange
        if exchange.request.method == "HEAD":
            exchange.respond(head.status, b"", *self.told(head))
            return
        exchange.start(head.status, *self.told(head))
        if (
            exchange.is_plain
        ):  # its head is the service's own word, and may come long before the rest
            exchange.send(b"")
        while True:
            with self.patience(upstream):
                piece = await upstream.read_piece()
            if not piece:
                break
            exchange.send(piece)
            self.inside = not piece.endswith(b"\n")
            if exchange.blocked and not upstream.body.done:
                await exchange.catch_up()
        exchange.finish()

    # ---- in which a way to another service differs

    def relayed(self, headers: Headers) -> Names:
        """The header fields that the backend gets."""
        return (*RELAYED_REQUEST, *more_names(headers, self.backend.settings.relay_headers))

    def told(self, head: ResponseHead) -> tuple[str, Pairs]:
        """The type of the answer, and the header fields that the client gets."""
        return relayed_type(head), [("X-LLMQ-Backend", self.backend.name)]

    def last_words(self, error: LlmqError) -> bytes:
        """What the client is told inside an answer that breaks off."""
        request = self.exchange.request
        dialect = dialect_of(request.path, request.headers)
        return dialect.render_stream_error(error, self.exchange.request_id, self.inside)


class PlainPassthrough(Passthrough):
    """The same to any HTTP service: all header fields but those of one hop, RFC 9110 s.7.6.1."""

    def relayed(self, headers: Headers) -> Names:
        own = {*OWN_FIELDS, *connection_options(headers)} - {"accept-encoding"}
        return tuple(name for name in headers if name not in own)

    def told(self, head: ResponseHead) -> tuple[str, Pairs]:
        if head.status == HTTPStatus.SWITCHING_PROTOCOLS:
            raise BackendError("the service switches to a protocol that nobody asked for")
        self.exchange.is_plain = True
        self.exchange.told_length = head.headers.get("content-length", "")
        own = {*OWN_FIELDS, *connection_options(head.headers), "content-type", "date"}
        kind = head.headers.get("content-type", "application/octet-stream")
        told = [(name, head.headers[name]) for name in head.headers if name not in own]
        return kind, [(name, one) for name, value in told for one in value.split(COOKIE_BREAK)]

    def last_words(self, error: LlmqError) -> bytes:  # noqa: ARG002 - it is another's answer
        return b""


# ==== 39. Leases ==================================================================================
# A device as a whole, for work that is no request: image generation, training.  It waits its turn
# like a request, and holds until it is ended or nobody renews it.

LEASE = Endpoint(("/llmq/leases",), OPENAI, check_common)  # what it is shown as


def read_seconds(values: Facts) -> float:
    seconds = values.get("ttl_s", 60)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= DAY:
        raise BadRequest("ttl_s is a number of seconds, at most a day", param="ttl_s")
    return float(seconds)


def find_lease(gateway: Gateway, ident: str) -> Call:
    """That has started and not ended; while it waits it is a request like any other."""
    ticket = gateway.scheduler.running.get(ident)
    if ticket is None or not ticket.want.device:
        raise LlmqError(f"there is no lease {printable(ident)}", "not_found")
    return gateway.calls[ident]


async def await_device(gateway: Gateway, call: Call) -> None:
    """The life of a lease up to its start: it waits like a request, and has no answer."""
    try:
        gateway.enqueue(call)
        call.heartbeat_at = NEVER
        while call.ticket.state is TicketState.WAITING:
            await call.turn
            if call.reply.gone:
                gateway.leave(call)
    finally:
        if not call.ticket.started:  # else it is settled where it ends
            gateway.settle(call, done=False)
    if call.ticket.state is TicketState.ENDED:
        raise call.error or LlmqError("the lease broke off")


def renew(gateway: Gateway, call: Call, seconds: float) -> None:
    """The lease ends that long from now, unless it is renewed again."""
    call.deadline = gateway.now() + seconds


async def grant_lease(gateway: Gateway, exchange: Exchange, values: Facts) -> Facts:
    only_members(values, "device", "class", "ttl_s", "unload")
    if not isinstance(values.get("unload", False), bool):
        raise BadRequest("unload is true or false", param="unload")
    seconds, devices = read_seconds(values), gateway.fleet.devices
    device = values.get("device") or (next(iter(devices)) if len(devices) == 1 else "")
    if not isinstance(device, str) or device not in devices:
        raise BadRequest("device is one of " + ", ".join(devices), param="device")
    client, want = gateway.clients.asking(exchange.caller), Want("", device=device)
    word = values.get("class") or usual_class(client, NO_POLICY).word
    if word not in CLASSES:
        raise BadRequest("class is one of " + ", ".join(CLASSES), param="class")
    priority = client.account.lowered(PRIORITY_WORDS[word])
    if gateway.clients.is_blocked(exchange.caller):  # since it came
        raise LlmqError(BLOCKED, "forbidden")
    call = Call(exchange, LEASE, exchange.request, exchange.caller, (exchange.id, exchange.id))
    call.ticket = Ticket(call.id, client, want, priority)
    call.request = None
    await await_device(gateway, call)
    renew(gateway, call, seconds)
    if values.get("unload"):
        renew(gateway, call, NEVER)  # its time begins when it has the device empty
        try:
            await empty_device(gateway, device, exchange.caller, call.id)
        except BaseException as error:  # or nobody would ever give the device back
            broke_off = LlmqError("the lease broke off")
            gateway.stop(call, error if isinstance(error, LlmqError) else broke_off)
            raise
        if call.ticket.state is TicketState.ENDED:  # somebody has cancelled it meanwhile
            raise call.error or LlmqError("the lease was ended while it unloaded", "cancelled")
        renew(gateway, call, seconds)
    if exchange.gone:
        gateway.end_lease(call)
    return {"id": call.id, "device": device, "expires_s": seconds}


async def empty_device(gateway: Gateway, device: str, caller: Caller, ident: str) -> None:
    """Unload all that a device has loaded; raises what stands in the way."""
    await gateway.monitor.catch_up()  # what has just been loaded is in no list yet
    backends = [one for one in gateway.fleet.backends.values() if one.device.name == device]
    loaded = [one for one in backends if one.loaded and one.usable]
    fleet = gateway.fleet
    errands = [each for one in loaded for each in pick_errands(fleet, "unload", "*", one.name)]
    calls = []
    for number, errand in enumerate(errands):
        own = f"{ident}.{number}"
        try:
            calls.append(run_errand(gateway, errand, caller, own, Priority.HIGH))
        except LlmqError as error:
            if error.code != "conflict":  # else somebody has ordered it already
                raise
    names, orders = {errand.backend.name for errand in errands}, gateway.errands.items()
    unloading = [task for (what, at, _), task in orders if what == "unload" and at in names]
    await asyncio.gather(*unloading)
    for call in calls:
        if call.error is not None:
            raise call.error


# ==== 40. Runs ====================================================================================
# How jobs run.  The scheduler has the oldest few of each lane to choose from; all others are in the
# store alone, where they cost no memory.  A job is a call like any other, whose reply is kept.

FED, MOST_FED = 16, 500  # jobs of a lane that the scheduler has; with many slots up to the second
JOB_RETRY_SECONDS = 5.0
# Errors that say nothing of the job itself: it waits on, and the attempt does not count.
PATIENT = frozenset((
    "backend_down", "backend_loading", "overloaded", "queue_full", "shutting_down", "wait_timeout",
))  # fmt: skip


class JobRunner:
    """Runs the jobs of the store."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.jobs = gateway.jobs
        self.on_end: list[Callable[[Job], Awaitable[None]]] = []  # told once its end is kept
        self.ending = asyncio.Event()  # llmq ends: nothing waits for a better time
        self._tasks: set[asyncio.Future[None]] = set()
        self._begun: dict[str, asyncio.Future[None]] = {}  # by id, the note that a job has begun
        self._resting: Counter[JobLane] = Counter()  # jobs of a lane, until they are retried

    async def feed(self) -> None:
        """Wait for news, then give the scheduler what it may choose from."""
        jobs, devices = self.jobs, self.gateway.fleet.devices.values()
        await jobs.news.wait()
        jobs.news.clear()
        most = min(max(FED, 2 * sum(device.slots for device in devices)), MOST_FED)
        lanes, jobs.lanes = jobs.lanes, set()  # what comes meanwhile is news
        try:
            fed = Counter(job.lane for job, _ in jobs.active.values())
            for lane in sorted(lanes, key=lambda lane: (lane[0], fed[lane])):  # who has least first
                if not await self.feed_lane(lane, most):
                    break
                lanes.discard(lane)
        except LlmqError as error:
            log.warning("jobs wait: %s", error)
            await self.pause()
            jobs.news.set()
        finally:
            jobs.lanes |= lanes  # of which there may be more

    async def feed_lane(self, lane: tuple[int, str], most: int) -> bool:
        """Start the next jobs of a lane; False where the memory that jobs may take is full."""
        if self._resting[lane]:
            return True  # the later ones do not go before those that rest, whose end is news
        active = self.jobs.active.values()
        fed = sum(job.lane == lane for job, _ in active)
        for _ in range(most - fed):
            waiting = sum(len(job.body) for job, _ in active)
            if waiting > self.gateway.settings.queue.max_queued_bytes // 4:
                return False
            job = await self.jobs.next(lane)
            if job is None or self.gateway.draining:
                break
            self.start(job)
        return True

    async def pause(self) -> None:
        """Wait until something is worth another try, or until llmq ends."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.ending.wait(), JOB_RETRY_SECONDS)

    async def persist(self, what: str, keep: Callable[[], Awaitable[T]]) -> T | None:
        """Keep the end of something as soon as the disk has room; None where llmq ends before."""
        while True:
            try:
                return await keep()
            except LlmqError as full:
                log.warning("%s has ended, and cannot be kept: %s", what, full)
            if self.ending.is_set():
                return None  # after a restart it is found as it was before
            await self.pause()

    def start(self, job: Job) -> None:
        """Hand a job to the scheduler."""

        def begun() -> None:
            if job.id not in self._begun:
                self._begun[job.id] = asyncio.ensure_future(self.jobs.begin(job))

        reply = Kept(job.body, begun)
        self.jobs.active[job.id] = job, reply
        task = asyncio.ensure_future(self.run(job, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, job: Job, reply: Kept) -> None:
        """The life of a job from its queue to its end, or to another wait."""
        try:
            error = await self.serve(job, reply)
            reply.watch()  # or it would hold the call, which holds it
            began = self._begun.pop(job.id, None)
            if began is not None:
                with contextlib.suppress(LlmqError):  # a full disk: it runs all the same
                    await began
            if error is not None and not reply.gone and self.waits_on(job, error):
                await self.wait_on(job, error, began=began is not None)
            else:
                await self.keep_end(job, self.end_of(job, reply, error))
        except Exception:
            log.exception("a job failed")
        finally:
            self.jobs.active.pop(job.id, None)
            self.jobs.wanted([job.lane])

    async def serve(self, job: Job, reply: Kept) -> LlmqError | None:
        """Run the call that a job is; what went wrong, which its answer says too."""
        try:
            call = self.call_of(job, reply)
            await self.gateway.serve(call)
        except LlmqError as failure:
            error = failure.with_traceback(None)
        except Exception:
            log.exception("job %s failed", job.id)
            error = LlmqError("llmq failed; its log says how")
        else:
            return call.error
        reply.respond(error.status, OPENAI.render_error(error))
        return error

    def call_of(self, job: Job, reply: Kept) -> Call:
        """The call that a job is; LlmqError where it may not be made any more."""
        account, headers = self.account_of(job), json.loads(job.headers)
        if job.account and account is NO_ACCOUNT:
            raise LlmqError(f"the key of {job.account} has been taken away", "forbidden")
        headers["x-queue-priority"] = Priority(job.priority).word
        request = Request("POST", job.target, 1, headers)
        endpoint = endpoint_of(request.path)
        if endpoint is None:
            raise LlmqError(f"there is no {printable(request.path)}", "not_found")
        if account is not NO_ACCOUNT and "infer" not in account.settings.rights:
            raise LlmqError(f"{account.name} has no right to this: infer", "forbidden")
        if account.is_metered:
            self.meter(account, counts=bool(job.batch))
        caller = Caller(job.client, False, job.address, account)
        call = Call(reply, endpoint, request, caller, (job.id, job.id))
        call.job = job.id
        return call

    def account_of(self, job: Job) -> Account:
        """The key or port that a job came with; NO_ACCOUNT where there is none, or no longer."""
        accounts = self.gateway.accounts.present
        return next((one for one in accounts if one.name == job.account), NO_ACCOUNT)

    def meter(self, account: Account, *, counts: bool) -> None:
        """LlmqError where the key has no tokens left for today, or a line of a batch no rate."""
        now, (day, _) = self.gateway.now(), today()
        spent = account.tokens >= account.settings.tokens_per_day > 0 and account.day == day
        if spent or (counts and account.take(now, day)):
            raise LlmqError(f"{account.name} has had all that it may for now", "rate_limited")

    def waits_on(self, job: Job, error: LlmqError) -> bool:
        """Whether a job that has ended so is tried again."""
        own_limit = type(error) is LlmqError and error.code == "rate_limited"
        if own_limit or error.code in PATIENT:
            return True
        broke = isinstance(error, BackendError) and error.unhealthy
        return broke and job.attempts + 1 < self.gateway.settings.jobs.max_attempts

    async def wait_on(self, job: Job, error: LlmqError, *, began: bool) -> None:
        """Let a job wait again, and its lane rest for a while."""
        if job.batch and error.code != "rate_limited":
            self.account_of(job).give_back()  # it counts when it comes again
        if began:
            with contextlib.suppress(LlmqError):  # then it runs again after a restart
                await self.jobs.requeue(job, counted=error.code not in PATIENT)
        if not self.gateway.draining:
            self._resting[job.lane] += 1
            await self.pause()
            self._resting[job.lane] -= 1
            self._resting += Counter()  # without those that rest no more

    def end_of(self, job: Job, reply: Kept, error: LlmqError | None) -> JobEnd:
        """How a job ends whose call has ended so."""
        answer, status = reply.answer, reply.status
        if error is not None and status == HTTPStatus.OK:  # a stream had begun
            status = error.status
        state = FAILED if error else SUCCEEDED
        if reply.gone or (error is not None and error.code == "cancelled" and not job.batch):
            state = CANCELLED
        elif len(answer) > MOST_KEPT:
            return JobEnd.by_error(LlmqError("the answer is too long to be kept"))
        words = error_in_sight(error) or (f"the backend answered {status}" if error else None)
        return JobEnd(state, status, reply.type, answer, words)

    async def keep_end(self, job: Job, end: JobEnd) -> None:
        """Keep how a job has ended, as soon as there is room for it, and tell of it."""
        if await self.persist(f"job {job.id}", lambda: self.jobs.end(job, end)):
            await self.tell_end(job)

    async def tell_end(self, job: Job) -> None:
        for tell in self.on_end:
            await tell(job)

    async def cancel(self, job: Job) -> bool:
        """End a job that has not ended; whether it was this that ended it."""
        end = JobEnd.by_error(LlmqError("cancelled on request", "cancelled"), CANCELLED)
        ended = await self.jobs.end(job, end._replace(error=None))  # it is no failure to be shown
        self.drop(job)
        if ended:
            await self.tell_end(job)
        return ended

    def drop(self, job: Job) -> None:
        """Stop the call of a job whose end is kept already."""
        if job.id in self.jobs.active:
            if job.id in self.gateway.calls:
                self.gateway.cancel(self.gateway.calls[job.id])
            self.jobs.active[job.id][1].leave()

    async def stop(self) -> None:
        """Wait until the end of each job that ran is kept, or the job waits again."""
        self.ending.set()
        if self._tasks:
            await asyncio.wait(self._tasks)


# ==== 41. Batches =================================================================================
# OpenAI's files and batches: the lines of a file are jobs, what comes of them is a file again.  The
# answers are not stored a second time for it: the content of such an output is the state that its
# lines have, succeeded or failed, and their answers are put together whenever it is read.

BATCH_PATHS = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)
MOST_LINES = 50_000  # of one batch, as OpenAI has it
MOST_MISTAKES = 100  # that are told of one file
CUSTOM_LENGTH = 512
PORTION = 2000  # lines that are let go at once
HALF = re.compile("[\ud800-\udfff]")  # of a character, which no database takes


class BatchLine(NamedTuple):
    """A line of the file that a batch is made of: the request that a job is to make."""

    custom: str  # the client's own name for it, which no other line of the file has
    model: str
    body: bytes


def read_line(text: bytes, path: str) -> BatchLine:
    """A line of a batch for this path; BadRequest says what is wrong with it."""
    facts = parse_json(text)
    if not isinstance(facts, dict):
        raise BadRequest("the line is no JSON object")
    custom, body = facts.get("custom_id"), facts.get("body")
    if not isinstance(custom, str) or not 0 < len(custom) <= CUSTOM_LENGTH or HALF.search(custom):
        raise BadRequest("custom_id is a text", param="custom_id")
    if facts.get("method") != "POST":
        raise BadRequest("method is POST", param="method")
    if facts.get("url") != path:
        raise BadRequest(f"url is {path}, as the batch's endpoint", param="url")
    if not isinstance(body, dict):
        raise BadRequest("body is an object", param="body")
    if body.get("stream"):
        raise BadRequest("stream: a batch has no streams", param="body.stream")
    model = body.get("model")
    if isinstance(model, str) and HALF.search(model):
        raise BadRequest("model is a text", param="body.model")
    try:
        return BatchLine(custom, model if isinstance(model, str) else "", render_json(body))
    except (ValueError, RecursionError):
        raise BadRequest("body has what is not JSON: NaN, 1e999", param="body") from None


def find_mistakes(content: bytes, path: str) -> tuple[int, list[Facts]]:
    """How many lines a batch's file has, and what is wrong with them; not beyond the limits."""
    number, mistakes, seen = 0, [], set()
    for place, text in enumerate(io.BytesIO(content), 1):
        if not text.strip():
            continue
        number += 1
        try:
            line = read_line(text, path)
            if line.custom in seen:
                raise BadRequest(f"custom_id {printable(line.custom)} is there twice")
            seen.add(line.custom)
        except BadRequest as error:
            facts = {"code": "invalid_line", "message": error.message, "param": error.param}
            mistakes.append({**facts, "line": place})
        if number > MOST_LINES or len(mistakes) >= MOST_MISTAKES:
            break
    if not 0 < number <= MOST_LINES:
        message = f"a batch has 1 to {MOST_LINES} lines"
        mistakes.append({"code": "invalid_file", "message": message, "param": None, "line": None})
    return number, mistakes


class Batch(NamedTuple):
    """A row of the table of batches; times are seconds since 1970."""

    id: str
    client: str
    account: str
    created: float
    ended: float | None
    state: str
    input: str  # the file that its lines came from
    facts: str  # what else there is to show, as JSON


class StoredFile(NamedTuple):
    """A row of the table of files, without what is in it."""

    id: str
    client: str
    account: str
    name: str
    purpose: str
    created: float
    bytes: int
    batch: str  # whose output it is, or empty


def new_file(
    client: str, account: str, name: str, purpose: str, size: int, batch: str = ""
) -> StoredFile:
    """The row of a file that is added now."""
    ident = "file-" + secrets.token_hex(12)
    return StoredFile(ident, client, account, name, purpose, time.time(), size, batch)


BATCH_ROW, FILE_ROW = ", ".join(Batch._fields), ", ".join(StoredFile._fields)
ADD_BATCH = insert_into("batches", Batch._fields)
ADD_FILE = insert_into("files", (*StoredFile._fields, "content"))
END_BATCH = "UPDATE batches SET state = ?, ended = ?, facts = ? WHERE id = ?"
CANCEL_BATCH = "UPDATE batches SET state = 'cancelling' WHERE id = ? AND ended IS NULL"
CANCEL_LINES = f"""UPDATE jobs SET state = '{CANCELLED}', ended = ?, body = NULL, headers = '{{}}'
    WHERE batch = ? AND {OPEN_JOB}"""
CONTENT = "SELECT content FROM files WHERE id = ?"
NEXT_ANSWER = """SELECT number, answer FROM jobs WHERE batch = ? AND state = ? AND number > ?
    ORDER BY number LIMIT 1"""
OLD_BATCHES = "SELECT id FROM batches WHERE ended < ?"
OLD_LINES = f"SELECT number FROM jobs WHERE batch IN ({OLD_BATCHES}) LIMIT {PORTION}"
OLD_INPUTS = "batch = '' AND created < ? AND id NOT IN (SELECT input FROM batches)"
OUTPUTS = {SUCCEEDED: "output_file_id", FAILED: "error_file_id"}  # by the state of its lines


class Batches:
    """The batches of the store, and its files."""

    def __init__(self, jobs: Jobs, runner: JobRunner) -> None:
        self.jobs, self.runner, self.store = jobs, runner, jobs.store
        self.open: set[str] = set()  # ids of batches whose end is not kept yet
        self._turn = asyncio.Lock()  # one file at a time is read into memory

    async def load(self) -> None:
        """Take up what an earlier llmq has left."""
        if self.store.is_open:
            sql = "SELECT id FROM batches WHERE ended IS NULL"
            self.open = {row[0] for row in await self.store.read(sql)}
            for ident in list(self.open):
                await self.look(ident)

    async def add_file(self, caller: Caller, name: str, content: bytes) -> StoredFile:
        """Keep what a client has sent: on the disk when it returns."""
        file = new_file(caller.client, caller.account.name, name, "batch", len(content))
        async with self.jobs.room:
            await self.jobs.check_room(len(content))
            await self.store.write((ADD_FILE, (*file, content)), safe=True)
        return file

    async def add(self, caller: Caller, file: StoredFile, path: str, metadata: Any) -> Batch:
        """Make jobs of a file's lines; where one of them has a mistake, the batch has failed."""
        async with self._turn:
            rows = await self.store.read(CONTENT, file.id)
            content = rows[0][0] if rows else b""
            find = functools.partial(find_mistakes, content, path)
            number, mistakes = await beside(find, heavy=len(content) > WATCHED_LINE)
            facts = {"endpoint": path, "metadata": metadata, "total": number, "errors": mistakes}
            batch = Batch(
                id="batch_" + secrets.token_hex(12),
                client=caller.client,
                account=caller.account.name,
                created=time.time(),
                ended=None,
                state="in_progress",
                input=file.id,
                facts=json.dumps(facts),
            )
            if mistakes:
                batch = batch._replace(ended=batch.created, state="failed")
                await self.store.write((ADD_BATCH, batch), safe=True)
            else:
                await self.add_lines(caller, batch, path, content)
            return batch

    async def add_lines(self, caller: Caller, batch: Batch, path: str, content: bytes) -> None:
        """Keep a batch and its jobs, all of them or nothing."""
        headers = {"content-type": "application/json"}

        def jobs() -> Iterator[Job]:
            for text in filter(bytes.strip, io.BytesIO(content)):
                line = read_line(text, path)
                work = Work(path, headers, line.body, line.model, Priority.LOW)
                yield new_job(caller, work, batch.id, line.custom)

        self.open.add(batch.id)
        try:
            await self.jobs.add(jobs(), len(content), (ADD_BATCH, batch))
        except LlmqError:
            self.open.discard(batch.id)
            raise

    async def counts(self, ident: str) -> Counter[str]:
        """How many of its lines are in which state."""
        sql = "SELECT state, count(*) FROM jobs WHERE batch = ? GROUP BY state"
        return Counter(dict(await self.store.read(sql, ident)))

    async def line_ended(self, job: Job) -> None:
        """A job has ended: if it was the last line of a batch, so has that."""
        if job.batch:
            await self.persist_end(job.batch)

    async def persist_end(self, ident: str) -> None:
        """End a batch if it has no line left to run, as soon as the disk has room."""
        await self.runner.persist(f"batch {ident}", lambda: self.look(ident))

    async def look(self, ident: str) -> None:
        """End a batch if it has no line left to run."""
        sql = f"SELECT 1 FROM jobs WHERE batch = ? AND {OPEN_JOB} LIMIT 1"
        if ident not in self.open or await self.store.read(sql, ident):
            return
        if ident not in self.open:  # another line that has just ended was quicker
            return
        self.open.discard(ident)
        try:
            await self.keep_end(ident)
        except LlmqError:
            self.open.add(ident)
            raise

    async def keep_end(self, ident: str) -> None:
        """Add the files of its output, and tell that it has ended."""
        batch = await self.find(ident)
        statements: list[Statement] = []
        facts = json.loads(batch.facts)
        for state, member in OUTPUTS.items():
            sql = "SELECT sum(length(answer)) FROM jobs WHERE batch = ? AND state = ?"
            ((size,),) = await self.store.read(sql, ident, state)
            if size:
                name = f"{ident}_{member.partition('_')[0]}.jsonl"
                file = new_file(batch.client, batch.account, name, "batch_output", size, ident)
                facts[member] = file.id
                statements.append((ADD_FILE, (*file, state)))
        state = "cancelled" if batch.state == "cancelling" else "completed"
        statements.append((END_BATCH, (state, time.time(), json.dumps(facts), ident)))
        await self.store.write(*statements)
        done = {"id": ident, "object": "batch", "status": state, "client": batch.client}
        self.runner.gateway.journal.happened("job.done", job=done)

    async def find(self, ident: str) -> Batch:
        """The batch of this id; LlmqError `not_found`."""
        sql = f"SELECT {BATCH_ROW} FROM batches WHERE id = ?"
        return Batch(*await self.store.find("batch", sql, ident))

    async def find_file(self, ident: str) -> StoredFile:
        """The file of this id, without what is in it; LlmqError `not_found`."""
        sql = f"SELECT {FILE_ROW} FROM files WHERE id = ?"
        return StoredFile(*await self.store.find("file", sql, ident))

    async def cancel(self, batch: Batch) -> None:
        """End the lines that run, and let those that wait never begin."""
        if batch.ended is not None:
            raise LlmqError(f"batch {batch.id} has ended: {batch.state}", "conflict")
        lines = (CANCEL_LINES, (time.time(), batch.id))
        ((ended,),) = await self.store.write((CANCEL_BATCH, (batch.id,)), lines, CHANGED)
        self.jobs.queued -= ended
        for job, _ in list(self.jobs.active.values()):  # in one go, so that none of them begins
            if job.batch == batch.id:
                self.runner.drop(job)
        await self.persist_end(batch.id)

    async def expire(self, before: float) -> None:
        """Let go of batches that ended before this, and of files that none of the others needs."""
        while await self.store.read(OLD_LINES, before):  # in portions: others use the thread too
            await self.store.write((f"DELETE FROM jobs WHERE number IN ({OLD_LINES})", (before,)))
        await self.store.write(
            (f"DELETE FROM files WHERE batch IN ({OLD_BATCHES})", (before,)),
            ("DELETE FROM batches WHERE ended < ?", (before,)),
            (f"DELETE FROM files WHERE {OLD_INPUTS}", (before,)),
        )

    async def content(self, file: StoredFile) -> AsyncIterator[bytes]:
        """What is in a file, in pieces; an output is put together line by line."""
        (content,) = await self.store.find("file", CONTENT, file.id)
        if not file.batch:
            yield content
            return
        state, last = content, 0
        while found := await self.store.read(NEXT_ANSWER, file.batch, state, last):
            last, line = found.pop()
            yield line


# ==== 42. Changes =================================================================================
# What people change of clients at run time.  It is kept on the disk, then it holds, also after a
# restart, until somebody writes another value for the same setting into the file.

CLIENT = {fact.name.rstrip("_"): fact.default for fact in fields(ClientSettings)}


class Changes:
    """The changes of clients, and of addresses, which are clients whose name begins with `ip:`."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.store = gateway, gateway.store
        self.file: dict[str, ClientSettings] = {}  # what the file says
        self.kept: dict[str, Facts] = {}  # by name and field: [value, what the file said then]
        self._turn = asyncio.Lock()  # changes are made one after the other
        self._forgetting: Any = None  # the last write of `apply`, or nothing would hold it

    async def change(self, name: str, values: Facts) -> None:
        """Change settings of a client, by their names in the file; None: as the file has it."""
        given = {key: CLIENT.get(key) if one is None else one for key, one in values.items()}
        try:
            row = parse_rows("request", "clients", {name: given})[name]
        except ConfigError as error:
            raise BadRequest(str(error)) from None
        async with self._turn:
            own, facts = self.file.get(name, NOTHING_SET), dict(self.kept.get(name, {}))
            for key in values:
                fact = "class_" if key == "class" else key
                facts[fact] = [getattr(row, fact), getattr(own, fact)]
                if values[key] is None or facts[fact][0] == facts[fact][1]:
                    del facts[fact]
            if facts and name not in self.kept and len(self.kept) >= MOST_CLIENTS:
                raise LlmqError("too many clients are changed already", "conflict")
            await self.store.put("clients", name, facts)
            self.kept[name] = facts
        self.apply()

    def apply(self) -> None:
        """Let hold what the file says, and each change since which it says the same."""
        settings, clients = self.gateway.settings, self.gateway.clients
        self.file = dict(settings.clients)
        for name in map("ip:{}".format, settings.ips.blocked):
            self.file[name] = replace(self.file.get(name, NOTHING_SET), blocked=True)
        found = dict(self.file)
        for name, facts in self.kept.items():
            row = self.file.get(name, NOTHING_SET)
            own = vars(row)
            holds = {key: one for key, one in facts.items() if one[1] == own.get(key, MISSING)}
            found[name] = replace(row, **{key: one[0] for key, one in holds.items()})
            if holds != facts:
                self.kept[name] = holds
                self._forgetting = asyncio.ensure_future(self.store.put("clients", name, holds))
        self.kept = {name: facts for name, facts in self.kept.items() if facts}
        clients.settings = found
        moved = set()
        for client in clients.known.values():
            before, client.settings = client.settings, clients.of(client.name)
            moved.update([client] if client.settings.class_ != before.class_ else [])
        for call in (*self.gateway.calls.values(), *self.gateway.recall.joined.values()):
            if clients.is_blocked(call.caller):
                self.gateway.stop(call, LlmqError(BLOCKED, "forbidden"))
            elif call.ticket.client in moved:
                self.move(call)
        self.gateway.scheduler.reconsider()
        self.gateway.pump()

    def move(self, call: Call) -> None:
        """Give a call that waits the class which its client has now, unless it asked for one."""
        ticket = call.ticket
        said = call.question.priority is not None or call.rule or call.job
        if ticket.state is TicketState.WAITING and not said:
            policy = self.gateway.fleet.policy(ticket.model)
            priority = ticket.client.account.lowered(usual_class(ticket.client, policy))
            highest = Priority.NORMAL if ticket.foreign else Priority.HIGH
            self.gateway.reprioritise(call, max(highest, priority))


# ==== 43. Background ==============================================================================
# What runs beside the requests: loops around one step each.  What goes wrong in a step is logged,
# and the next one comes all the same.

REAP_SECONDS = 0.25
DISCOVERY_SECONDS = 60.0
MEMORY_SECONDS = 1.0
PRELOAD_SECONDS = 0.5
CROWD = 500  # calls at once, after which their memory is worth giving back


async def every(seconds: float, step: Callable[[], Awaitable[None] | None]) -> None:
    while True:
        try:
            doing = step()
            if doing is not None:
                await doing
        except Exception:
            log.exception("what runs in the background failed, and goes on")
        await asyncio.sleep(seconds)


async def dispatch_on_news(gateway: Gateway) -> None:
    news = gateway.monitor.news
    await news.wait()
    news.clear()
    gateway.pump()


class Preloader:
    """Has models loaded that are to be from the start: once a backend is up, or a reload is."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.rows: Mapping[str, ModelSettings] = {}
        self.seen: set[tuple[Backend, str]] = set()  # with a model that it was seen to need, or not

    def step(self) -> None:
        """Order what is not loaded, or with less context than it is to have, where all is idle."""
        scheduler, rows = self.gateway.scheduler, self.gateway.settings.models
        up = [one for one in self.gateway.fleet.backends.values() if one.usable]
        self.seen = {one for one in self.seen if one[0] in up and rows is self.rows}
        self.rows = rows
        if not any(row.preload for row in rows.values()):
            return
        for backend, key in [(one, key) for one in up for key in one.models]:
            policy = self.gateway.fleet.policy(key)
            idle = policy.preload and not (backend.device.busy or scheduler.waiting)
            idle = idle and (not policy.backends or backend.name in policy.backends)
            if idle and backend.traits.errands and (backend, key) not in self.seen:
                self.seen.add((backend, key))
                known = backend.contexts.loaded.get(key, NEVER)
                if not backend.is_loaded(key) or known < backend.num_ctx(key):
                    errand = Errand("load", backend, backend.models[key][0])
                    with contextlib.suppress(LlmqError):  # somebody else has ordered it
                        run_errand(self.gateway, errand, LLMQ, secrets.token_hex(6), Priority.LOW)


KEEP_SECONDS = 60.0  # between two writes: a crash of llmq loses what was used since
USAGE_DAYS, MEMORY_DAYS = 400, 7  # of usage in the state file, and in memory without one
ADD_USAGE = """INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (day, client, model) DO UPDATE SET requests = requests + excluded.requests,
    hits = hits + excluded.hits, tokens_in = tokens_in + excluded.tokens_in,
    tokens_out = tokens_out + excluded.tokens_out, seconds = seconds + excluded.seconds"""
KEEP_ANSWER = "REPLACE INTO answers (key, body, type, until) VALUES (?, ?, ?, ?)"


class Keeper:
    """Writes usage to the store, and answers where `cache.persist` says so; drops what is old."""

    def __init__(self, gateway: Gateway, batches: Batches) -> None:
        self.gateway, self.batches = gateway, batches
        self.store, self.cache = gateway.store, gateway.recall.cache
        self.named: set[Names] = set()  # who of today has rows: days, clients and models

    @property
    def keeps_answers(self) -> bool:
        return self.gateway.settings.cache.persist and bool(self.store.path)

    async def load(self) -> None:
        """Take up what an earlier llmq has kept: what was used today, and answers."""
        limits, now = self.gateway.settings.cache, time.time()
        if self.store.is_open:
            day = day_of(int(now))
            sums = ", ".join(f"sum({name})" for name in USED)
            (row,) = await self.store.read(f"SELECT {sums} FROM usage WHERE day = ?", day)
            self.gateway.journal.days[day,] = [one or 0 for one in row]
        self.cache.noting = self.keeps_answers
        if self.cache.noting and self.store.is_open:
            sql = "SELECT key, body, type, until FROM answers WHERE until > ? ORDER BY until"
            for key, *answer in await self.store.read(sql, now):
                self.cache.put(key, Answer(*answer), limits.max_bytes)
            changed = self.cache.changed.items()  # those without room have to leave the file
            self.cache.changed = {key: answer for key, answer in changed if answer is None}
            await self.store.write(("DELETE FROM answers WHERE until <= ?", (now,)))

    async def step(self) -> None:
        """Write what is new and let go of what is old, in memory and in the file."""
        limits, journal = self.gateway.settings.cache, self.gateway.journal
        journal.flush()
        day = (day_of(int(time.time())),)
        journal.days = {day: journal.days.get(day, [0] * len(USED))}
        if not self.store.path:
            oldest = first_day(time.time(), MEMORY_DAYS)
            journal.used = {who: one for who, one in journal.used.items() if who[0] >= oldest}
        self.cache.expire(time.time())
        self.cache.fit(limits.max_bytes if limits.embeddings or limits.chat else 0)
        self.cache.noting = self.keeps_answers
        ttl = self.gateway.settings.jobs.result_ttl
        try:
            if self.store.path:
                await self.keep_usage()
                await self.keep_answers()
            if self.store.is_open:
                await self.gateway.jobs.expire(time.time() - ttl, ttl)
                await self.batches.expire(time.time() - ttl)
        except LlmqError as error:
            log.warning("state: %s; it is tried again", error)

    async def keep_usage(self) -> None:
        """Add what was used to the rows of the file; to what is in memory where that fails."""
        journal, day = self.gateway.journal, day_of(int(time.time()))
        self.named = {who for who in self.named if who[0] == day}
        used, journal.used = journal.used, {}
        rows: Usage = {}
        for who, amounts in used.items():  # a client may call itself something else each time
            known = who in self.named or len(self.named) < MOST_USED
            named = who if known else (who[0], OTHER, OTHER)
            self.named.add(named)
            merge_usage(rows, {named: amounts})
        oldest = first_day(time.time(), USAGE_DAYS)
        try:
            if rows:
                drop = ("DELETE FROM usage WHERE day < ?", (oldest,))
                await self.store.write(drop, (ADD_USAGE, [(*who, *rows[who]) for who in rows]))
        except LlmqError:
            merge_usage(journal.used, used)
            raise

    async def keep_answers(self) -> None:
        """Write the answers that are new, and drop those that have gone."""
        changed, self.cache.changed = self.cache.changed, {}
        new = [(key, *answer) for key, answer in changed.items() if answer is not None]
        old = [(key,) for key, answer in changed.items() if answer is None]
        try:
            if changed:
                drop = ("DELETE FROM answers WHERE key = ?", old)
                await self.store.write(drop, (KEEP_ANSWER, new))
        except LlmqError:
            self.cache.changed = {**changed, **self.cache.changed}
            if len(self.cache.changed) > len(self.cache.answers) + MOST_USED:
                self.cache.changed = {}  # the file takes nothing: these are not kept
            raise

    async def usage(self, days: int) -> list[Facts]:
        """What was used in the last days, today among them: a row for each client and model."""
        journal, first = self.gateway.journal, first_day(time.time(), days)
        journal.flush()
        # A copy: while the rows are read, the original may be written and be among the next ones.
        used = {who: list(amounts) for who, amounts in journal.used.items()}
        # The latest and the greatest first: where there are too many, these keep their names.
        sql = "SELECT * FROM usage WHERE day >= ? ORDER BY day DESC, requests DESC"
        rows = await self.store.read(sql, first)

        def merge() -> None:
            for row in rows:
                merge_usage(used, {tuple(row[:3]): list(row[3:])})

        await beside(merge, heavy=len(rows) > 1000)
        names = ("day", "client", "model", *USED)
        return [
            dict(zip(names, (*who, *amounts[:-1], round(amounts[-1], 3))))
            for who, amounts in sorted(used.items())
            if who[0] >= first
        ]


def reap(gateway: Gateway, servers: Sequence[HttpServer]) -> None:
    now = time.monotonic()
    for server in servers:
        server.reap(now)
    gateway.reap(now)
    send_heartbeats(gateway, now)
    waiting = [gateway.scheduler.waiting_in(priority) for priority in Priority]
    gateway.journal.history.note(time.time(), waiting, total_counts(gateway))


def total_counts(gateway: Gateway) -> list[int]:
    """Requests that have started, by class, and tokens of answers, since the start."""
    return [*gateway.scheduler.started, gateway.journal.tokens]


def glibc(function: str, *arguments: int) -> None:
    """Tell the C library about memory, where it is glibc."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(AttributeError):
            getattr(ctypes.CDLL(None), function)(*arguments)


def keep_memory_small() -> None:
    """One heap for all threads, and large blocks go back to the system at once, mallopt(3)."""
    m_mmap_threshold, m_arena_max = -3, -8
    glibc("mallopt", m_mmap_threshold, MIB)
    glibc("mallopt", m_arena_max, 1)


def release_memory() -> None:
    """Give the system back what is free: Python and the C library would keep it."""
    gc.collect()  # connections and their transports are cycles
    glibc("malloc_trim", 0)


class MemoryKeeper:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.most = 0  # calls at once, since memory was last given back
        self.calls = 0

    def step(self) -> None:
        before, self.calls = self.calls, len(self.gateway.calls)
        self.most = max(self.most, self.calls)
        if self.most < CROWD or self.calls > self.most // 16 or self.calls < before:
            return  # no crowd, or it is still going: what leaves later would pin what is free now
        self.most = 0
        self.gateway.drop_caches()
        release_memory()


def send_heartbeats(gateway: Gateway, now: float) -> None:
    """Keep clients patient that wait long: after 1, 1.5, 2 … and at most 6 times the interval."""
    interval = gateway.settings.server.heartbeat_interval
    for call in list(gateway.calls.values()):
        if call.job or call.blind:  # what is kept, or passed on, is what the runner says
            continue
        if now >= call.heartbeat_at and call.error is None:
            call.heartbeats += 1
            call.heartbeat_at = now + interval * min(6.0, 1 + (call.heartbeats - 1) / 2)
            send_heartbeat(gateway, call, now)


def send_heartbeat(gateway: Gateway, call: Call, now: float) -> None:
    reply, dialect, stream = call.reply, call.endpoint.dialect, call.question.stream
    if call.watch is not None and call.watch.inside:  # of an event too long to be held
        return
    if not reply.started:  # from here on whatever comes is a body under status 200
        reply.start(200, dialect.stream_type if stream else "application/json")
    expected = Expected(0, None, "")
    if call.ticket.state is TicketState.WAITING:
        expected = gateway.forecast(now)[call.ticket.id]
    reply.send(dialect.heartbeat(expected.position, expected.eta) if stream else b" ")


# ==== 44. Webhooks ================================================================================
# Other services are told what happens.  What there is to tell is found by looking four times a
# second, so that no request waits for it; each service has a thread and a short queue of its own.

HOOK_SECONDS = 5.0  # for a service to answer
HOOK_TRIES = (0.0, 1.0, 4.0)  # seconds before each attempt to post an event
HOOK_QUEUE = 100  # events that wait for one service; more are lost, and counted
HIGH_WATERMARK, LOW_WATERMARK = 0.8, 0.6  # of a limit: above is told, once it was below again
BUSY_QUEUE = 10  # requests: when so many have waited, it is told that none does any more
FULL_SECONDS = 10.0  # without a refusal, after which the next one is told


class Watch:
    """What has happened since the last look, each once for each cause; numbers in, events out."""

    def __init__(self) -> None:
        self.most = 0  # that waited at once, since the queue was last empty
        self.refused = 0  # requests, because the queue was full
        self.refused_at = float("-inf")
        self.high: set[str] = set()  # limits that are nearly reached
        self.down: set[str] = set()

    def look_at_queue(self, now: float, most: int, waiting: int, refused: int) -> Iterator[str]:
        """`most` waited at once since the last look, so many wait now, all in all `refused`."""
        self.most = max(self.most, most)
        if refused > self.refused:
            if now - self.refused_at >= FULL_SECONDS:
                yield "queue.full"
            self.refused, self.refused_at = refused, now
        if not waiting:
            if self.most >= BUSY_QUEUE:
                yield "queue.drained"
            self.most = 0

    def look_at_limit(self, name: str, most: int, waiting: int, limit: int) -> bool:
        """Whether the mark below this limit has been reached, since waiting fell below another."""
        reached = limit > 0 and name not in self.high and most >= HIGH_WATERMARK * limit
        if reached:
            self.high.add(name)
        if waiting <= LOW_WATERMARK * limit:
            self.high.discard(name)
        return reached

    def look_at_hosts(self, states: Mapping[str, State]) -> Iterator[tuple[str, str]]:
        """The event of each backend whose state is another."""
        for name, state in states.items():
            if state is State.DOWN and name not in self.down:
                self.down.add(name)
                yield "host.unhealthy", name
            elif state is State.UP and name in self.down:
                self.down.discard(name)
                yield "host.recovered", name
        self.down &= states.keys()


class Postman:
    """Posts events to one service, in a thread that ends with the program."""

    def __init__(self, name: str, row: WebhookSettings) -> None:
        self.name, self.row = name, row
        self.lost = 0
        self.closed = threading.Event()
        self._events: queue.Queue[bytes | None] = queue.Queue(HOOK_QUEUE)
        threading.Thread(target=self.run, daemon=True).start()

    @property
    def is_idle(self) -> bool:
        return not self._events.unfinished_tasks

    def give(self, body: bytes) -> None:
        """Let an event wait to be posted; it is lost where too many do."""
        try:
            self._events.put_nowait(body)
        except queue.Full:
            self.lost += 1
            if self.lost == 1:
                log.warning("webhook %s: events are lost, it takes them too slowly", self.name)

    def close(self) -> None:
        """End the thread; events that still wait are not posted."""
        self.closed.set()
        with contextlib.suppress(queue.Full):  # then its thread does not wait for one
            self._events.put_nowait(None)

    def run(self) -> None:
        while not self.closed.is_set() and (body := self._events.get()) is not None:
            error = ""
            for pause in HOOK_TRIES:
                error = "" if self.closed.wait(pause) else self.post(body)
                if not error:
                    break
            if error:
                log.warning("webhook %s: %s", self.name, error)
            self._events.task_done()

    def post(self, body: bytes) -> str:
        """Post it once, without a detour; what went wrong, or nothing."""
        from http.client import HTTPConnection, HTTPException, HTTPSConnection

        until, parts = time.monotonic() + HOOK_SECONDS, urlsplit(self.row.url)
        headers = {"Content-Type": "application/json", "User-Agent": f"llmq/{__version__}"}
        headers["Connection"] = "close"
        if self.row.secret:
            digest = hmac.new(self.row.secret.encode(), body, "sha256").hexdigest()
            headers["X-LLMQ-Signature"] = f"sha256={digest}"
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        path = (parts.path or "/") + (parts.query and f"?{parts.query}")
        try:
            with contextlib.closing(kind(parts.netloc, timeout=HOOK_SECONDS)) as connection:
                connection.request("POST", path, body, headers)
                answer = first_line(connection.sock, until)
        except OSError as error:
            return str(error)
        except (ValueError, HTTPException):  # whose words may have the url in them
            return "its url leads nowhere"
        found = re.match(rb"HTTP/1\.[01] ([1-5][0-9][0-9])\b", answer)
        if found is None:
            return "what it answers is no HTTP"
        return "" if found[1].startswith(b"2") else f"it answers {found[1].decode()}"


def first_line(connection: socket.socket, until: float) -> bytes:
    """The beginning of an answer: whatever follows, nobody waits for it."""
    answer = b""
    while b"\n" not in answer and len(answer) < KIB:
        connection.settimeout(max(0.001, until - time.monotonic()))
        more = connection.recv(KIB)
        if not more:
            raise ConnectionResetError("it hung up")
        answer += more
    return answer


class Webhooks:
    """Finds what there is to tell, and hands it on."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.watch = Watch()
        self.postmen: dict[str, Postman] = {}  # by the name of the service

    def step(self) -> None:
        gateway, rows = self.gateway, self.gateway.settings.webhooks
        for name in [one for one, at in self.postmen.items() if rows.get(one) != at.row]:
            self.postmen.pop(name).close()
        happened = list(self.look())
        if not rows:  # what happens now is never told
            gateway.journal.events.clear()
            return
        for event, facts in happened:
            gateway.journal.happened(event, **facts)
        while gateway.journal.events:
            self.send(gateway.journal.events.popleft())

    def look(self) -> Iterator[tuple[str, Facts]]:
        """What has happened since the last look: the name of each event, and what is told of it."""
        gateway, watch, scheduler = self.gateway, self.watch, self.gateway.scheduler
        most, scheduler.most_waiting = scheduler.most_waiting, len(scheduler.waiting)
        waiting, limits = len(scheduler.waiting), scheduler.limits
        refused, before = gateway.journal.outcomes["queue_full"], max(watch.most, most)
        facts = {"waiting": waiting, "most_waiting": before, "full_at": limits.max_depth}
        for event in watch.look_at_queue(gateway.now(), most, waiting, refused):
            yield event, facts
        limited = [("all", most, waiting, limits.max_depth)]
        for priority in Priority if any(limits.depths) else ():
            here = scheduler.waiting_in(priority)
            limited.append((priority.word, here, here, limits.depths[priority]))
        for name, *numbers in limited:
            if watch.look_at_limit(name, *numbers):
                yield "queue.high_watermark", {**facts, "class": name}
        backends = gateway.fleet.backends
        states = {name: backend.state for name, backend in backends.items()}
        for event, name in watch.look_at_hosts(states):
            yield event, {"host": name, "error": backends[name].error}

    def send(self, facts: Facts) -> None:
        """Hand an event to each service that wants such."""
        body = render_json(facts)
        for name, row in self.gateway.settings.webhooks.items():
            if not row.events or facts["event"] in row.events:
                if name not in self.postmen:
                    self.postmen[name] = Postman(name, row)
                self.postmen[name].give(body)

    @property
    def is_idle(self) -> bool:
        return all(postman.is_idle for postman in self.postmen.values())

    def close(self) -> None:
        for postman in self.postmen.values():
            postman.close()


# ==== 45. Access ==================================================================================
# Who may use a route: Host names against DNS rebinding, keys and their rights, origins against
# pages from elsewhere.  Who asks is found once, before anything else is read of a request.

EXPOSED = (
    "Access-Control-Expose-Headers",
    "X-Request-Id, request-id, X-LLMQ-Id, X-LLMQ-Backend, X-LLMQ-Class, X-LLMQ-Model, "
    "X-LLMQ-Reason, X-LLMQ-Wait-Ms, X-Cache, Location, Retry-After",
)


class Access(enum.Enum):
    OPEN = "everybody"  # also pages from elsewhere
    OWNER = "no foreign page"  # shows or changes what belongs to others
    LOCAL = "no foreign page, this box only"  # changes what is on its disk


def check_host(exchange: Exchange, names: frozenset[str]) -> None:
    """DNS rebinding makes a page same-origin with us, but it cannot hide the name it used."""
    value = exchange.request.headers.get("host")
    keep_alive, exchange.keep_alive = exchange.keep_alive, False  # for who is refused here
    if value is None and exchange.request.minor >= 1:
        raise BadRequest("an HTTP/1.1 request needs a Host")
    if value is not None and not is_own_host(value, names):
        message = f"host {printable(value)!r} is not llmq's; start it with --allowed-host NAME"
        raise LlmqError(message, "forbidden_host")
    exchange.keep_alive = keep_alive


@functools.lru_cache(maxsize=256)
def grant(origin: str | None, access: Access, trusted: Names) -> Fields:
    """CORS headers: no cookies can be misused, so any page may read what is open to everybody."""
    if access is Access.OPEN and "*" in trusted:
        return (("Access-Control-Allow-Origin", "*"), EXPOSED)
    if origin is None or is_foreign(origin, trusted):
        return (("Vary", "Origin"),)
    return (("Vary", "Origin"), ("Access-Control-Allow-Origin", origin), EXPOSED)


@functools.lru_cache(maxsize=256)
def is_own_host(value: str, names: frozenset[str]) -> bool:
    """IP literals have no DNS record to flip; `*` among names is any without a dot."""
    name = parse_host(value)
    if name in names or is_loopback(name) or plain_address(name.strip("[]")):
        return True
    first, dot, _ = name.partition(".")
    return bool(first) and ("*." + name.rpartition(".")[2] if dot else "*") in names


async def find_caller(exchange: Exchange, gateway: Gateway) -> Caller:
    """Who asks; the connection is asked only where the request says nothing better."""
    settings, accounts = gateway.settings.server, gateway.accounts
    headers, connection, told = exchange.request.headers, exchange.connection, ""
    if settings.trusted_proxies and exchange.address in settings.trusted_proxies:
        told = plain_address(headers.get("x-forwarded-for", "").rpartition(",")[2])  # its own word
        exchange.caller = NOBODY._replace(address=told)
    user = headers.get("x-user-id") or headers.get("x-openwebui-user-id")
    origin, agent, person = headers.get("origin"), headers.get("user-agent"), ""
    own = origin is not None and origin.partition("://")[2] == headers.get("host")  # our own page
    foreign = origin is not None and not own and is_foreign(origin, settings.cors_origins)
    account = connection.server.account
    if account is not NO_ACCOUNT:  # by its own port: what it says of itself does not count
        return Caller(account.name, foreign, exchange.address, account)
    if accounts.by_digest and (key := read_key(headers, page=not foreign)):
        free = settings.require_key == "remote" and exchange.is_local  # where any word will do
        try:
            found = accounts.of_key(key, exchange.address, gateway.now(), free=free)
            account = found or NO_ACCOUNT
            if found is None:
                exchange.wrong_key = LlmqError("that key is not known", "unauthorized")
        except LlmqError as error:  # told only where a key is needed
            exchange.wrong_key = error.with_traceback(None)
    if account is not NO_ACCOUNT:
        name = f"{account.name}/{user}" if user else account.name
        name = NAME_CHARACTERS.sub("-", name)[:NAME_LENGTH]
        return Caller(name, foreign, exchange.address, account)
    if not (user or foreign or exchange.is_local):
        person = "ip:" + exchange.address
    elif not (user or foreign or told):  # else the connection is the proxy's
        if connection.person is None:
            connection.person = await other_user(connection.stream.transport)
        person = connection.person
    return identify(user, origin, agent, foreign, (exchange.address, person))


CHALLENGE = ("Bearer", 'Basic realm="llmq", charset="UTF-8"')  # which a browser asks its user for


def check_right(exchange: Exchange, right: str, gateway: Gateway, *, own: bool = False) -> None:
    """Refuse who has no key, a wrong one, or one without this right; an empty one everybody has.

    Of llmq's `own` routes the right `control` is enough.
    """
    settings, keyed = gateway.settings.server, bool(gateway.accounts.by_digest)
    account = exchange.caller.account
    if not (keyed or account is not NO_ACCOUNT) or not right:
        return
    if account is NO_ACCOUNT:
        if settings.require_key == "remote" and exchange.is_local:
            return
        error = exchange.wrong_key or LlmqError("a key is needed", "unauthorized")
        if error.code != "unauthorized":
            raise error
        exchange.headers += (("WWW-Authenticate", CHALLENGE[right == "control"]),)
        raise error
    networks = account.settings.ips
    if networks and not is_inside(exchange.address, networks):
        raise LlmqError(f"{account.name} may not come from {exchange.address}", "forbidden")
    rights = account.settings.rights
    if right not in rights and not (own and "control" in rights):
        raise LlmqError(f"{account.name} has no right to this: {right}", "forbidden")


def meter(exchange: Exchange, now: float, *, counts: bool = False) -> None:
    """Tell what is left of a key's rate and budget; `rate_limited` where that is nothing."""
    account, (day, rest) = exchange.caller.account, today()
    wait = account.take(now, day) if counts else 0.0
    told = account.limits(now, day, rest)
    shown = ", ".join(name for name, _ in told)  # to pages too
    exchange.headers += (*told, ("Access-Control-Expose-Headers", shown))
    if wait:
        what = "tokens of the day" if wait < 0 else "requests"
        error = LlmqError(f"{account.name} has had all {what} that it may", "rate_limited")
        error.retry_after = math.ceil(rest if wait < 0 else wait)
        raise error


def strip_base(exchange: Exchange, base: str) -> bool:
    """Take the base path from the path, but on a port of somebody; False where it is not there."""
    request, own = exchange.request, exchange.connection.server.account is not NO_ACCOUNT
    if base and not own and request.path != "*":
        if request.path != base and not request.path.startswith(base + "/"):
            return False
        request.path = request.path[len(base) :] or "/"
    return True


def check_method(exchange: Exchange, methods: Names, path: str) -> None:
    method = exchange.request.method
    if method not in METHODS:
        raise LlmqError(f"method {printable(method, 20)} is not known", "not_implemented")
    if method not in methods:
        exchange.headers += (("Allow", ", ".join((*methods, "OPTIONS"))),)
        raise LlmqError(f"{path} takes {', '.join(methods)}", "method_not_allowed")


def check_blocked(exchange: Exchange, path: str, clients: Clients) -> None:
    """Refuse who is blocked; on this box they can still undo it, but give no work."""
    if not clients.settings:
        return
    works = path.startswith(("/llmq/leases", "/llmq/models"))
    undone_here = path.startswith("/llmq") and not works and exchange.is_local
    if clients.is_blocked(exchange.caller) and not undone_here:
        raise LlmqError(BLOCKED, "forbidden")


def check_origin(exchange: Exchange, access: Access) -> None:
    if access is Access.OPEN:
        return
    request = exchange.request
    safe = request.method in ("GET", "HEAD") and access is Access.OWNER
    unnamed = "origin" not in request.headers  # else what its preflight was granted holds
    cross_site = unnamed and request.headers.get("sec-fetch-site") == "cross-site"
    if exchange.caller.foreign or (cross_site and not safe):
        raise LlmqError("pages from elsewhere may not use this route", "forbidden_origin")
    keyed = exchange.caller.account is not NO_ACCOUNT  # with the right to it
    if access is Access.LOCAL and not (exchange.is_local or keyed):
        raise LlmqError("this route is for this box only", "forbidden")


# ==== 46. Snapshot ================================================================================
# What the outside may see: names, numbers and states, never a word of a prompt or an answer; once
# as a whole, and as a stream that is rendered once for all who watch.

SHOWN_WAITING = 100  # waiting requests that it shows unless asked for all
STREAM_SECONDS = 0.25  # between two snapshots that watchers get
TIME_SECONDS = 1.0  # while requests are here, time alone is news


def members(source: object, *names: str) -> Facts:
    return {name: getattr(source, name) for name in names}


def snapshot(gateway: Gateway, word: str = "") -> Facts:
    """The state of it all; of those that wait the first, or the first that have the word."""
    scheduler, fleet, now = gateway.scheduler, gateway.fleet, gateway.now()
    known = gateway.clients.settings.items()
    waiting, running = in_order(gateway, now), scheduler.running.values()
    tickets = (*running, *having(gateway, waiting, word)[:SHOWN_WAITING])
    jobs = [ticket for ticket in running if gateway.calls[ticket.id].job]
    return {
        "version": __version__,
        "mode": scheduler.mode.value,
        "uptime_s": round(now - gateway.started, 1),
        "draining": gateway.draining,
        "queue": {
            "waiting": len(waiting),
            "running": len(running),
            "oldest_wait_s": round(oldest_wait(waiting, now), 3),
            "by_class": count_classes(waiting),
            "full_at": scheduler.limits.max_depth,
        },
        "requests": [show_call(gateway, gateway.calls[ticket.id], now) for ticket in tickets],
        "requests_total": dict(gateway.journal.outcomes),
        "devices": [show_device(gateway, device) for device in fleet.devices.values()],
        "backends": [show_backend(backend) for backend in fleet.backends.values()],
        "clients": show_clients(gateway, now),
        "blocked": [name for name, row in known if row.blocked],
        "ips": [name[3:] for name, row in known if name.startswith("ip:") and row.blocked],
        "recent": [record.facts() for record in reversed(gateway.journal.recent)],
        "jobs": {"queued": gateway.jobs.queued - len(jobs), "running": len(jobs)},
        "cache": show_cache(gateway.recall),
        "used_today": show_today(gateway.journal),
        "config_error": gateway.config_error,
        "trouble": fleet.trouble(),
    }


def show_cache(recall: Recall) -> Facts:
    facts = {"answers": len(recall.cache.answers), "bytes": recall.cache.size}
    return {**facts, **{name: recall.counts[name] for name in ("hit", "joined", "miss")}}


def show_today(journal: Journal) -> Facts:
    """What was used since midnight, as far as it is written in the log."""
    used = journal.days.get((today()[0],), [0] * len(USED))
    return dict(zip(USED, (*used[:-1], round(used[-1], 1))))


def in_order(gateway: Gateway, now: float) -> list[Ticket]:
    """What waits, in the order of the last forecast; who has come since stands last."""
    told = gateway.forecast(now)
    known = [one for one in told.order if one.state is TicketState.WAITING]
    new = [one for one in gateway.scheduler.waiting.values() if one.id not in told.places]
    return known + new


def having(gateway: Gateway, tickets: Sequence[Ticket], word: str) -> Sequence[Ticket]:
    """Those that wait of which a name, the class or why they wait has the word in it."""

    def names(ticket: Ticket) -> str:
        call, why = gateway.calls[ticket.id], gateway.forecast(now)[ticket.id].reason
        told = (ticket.client.name, call.model, call.request_id, ticket.priority.word, why)
        return "\n".join(told).lower()

    now = gateway.now()
    return [one for one in tickets if word in names(one)] if word else tickets


async def show_all(gateway: Gateway, word: str) -> list[Facts]:
    """All that wait and run, some at a time: ten thousand would hold up everybody else."""
    scheduler, rows = gateway.scheduler, []
    waiting = having(gateway, in_order(gateway, gateway.now()), word)
    tickets = [*scheduler.running.values(), *waiting]
    for first in range(0, len(tickets), SHOWN_WAITING):
        some = [gateway.calls.get(one.id) for one in tickets[first : first + SHOWN_WAITING]]
        rows += [show_call(gateway, call, gateway.now()) for call in some if call]
        await asyncio.sleep(0)
    return rows


def show_call(gateway: Gateway, call: Call, now: float) -> Facts:
    ticket = call.ticket
    waits = ticket.state is TicketState.WAITING
    expected = gateway.forecast(now)[ticket.id] if waits else Expected(0, 0, "")
    started = now if waits else ticket.started
    tokens, since = (call.watch.pieces if call.watch else 0), call.first_byte
    return {
        **members(call, "id", "request_id", "route"),
        "client": ticket.client.name,
        "class": ticket.priority.word,
        "model": printable(call.model),
        "state": ticket.state.word,
        "tokens": tokens,
        "tokens_per_s": round(tokens / (now - since), 1) if tokens and since < now else None,
        "position": expected.position,
        "reason": f"{expected.reason}; {call.rule}" if waits and call.rule else expected.reason,
        "rule": call.rule or None,
        "eta_s": expected.eta and round(expected.eta, 1),
        "backend": ticket.backend.name if ticket.backend and not waits else None,
        "waited_s": round(started - ticket.arrived, 3),
        "running_s": round(now - started, 3),
    }


def oldest_wait(tickets: Iterable[Ticket], now: float) -> float:
    return now - min((ticket.arrived for ticket in tickets), default=now)


def count_classes(tickets: Iterable[Ticket]) -> dict[str, int]:
    found = Counter(ticket.priority for ticket in tickets)
    return {priority.word: found[priority] for priority in Priority}


def show_device(gateway: Gateway, device: Device) -> Facts:
    memory = show_memory(gateway.chooser.cards.memory_of(device.name))
    return {**members(device, "name", "slots", "busy"), "vram": memory}


def show_backend(backend: Backend) -> Facts:
    report, error = backend.report, backend.error
    shared = (*backend.contexts.requested, *backend.contexts.loaded)
    contexts = {backend.models.get(key, [key])[0]: backend.num_ctx(key) for key in shared}
    _, command = STARTERS.get(backend.kind or backend.name, ("", ""))
    if error and command and error.endswith("refused"):
        error = f"{error}; start it: {command}"
    return {
        "name": backend.name,
        "state": "draining" if backend.draining else backend.state.value,
        **members(backend, "url", "busy"),
        "error": error,
        "kind": backend.kind or None,
        "orders": bool(backend.traits.errands),  # to load and unload its models
        "device": backend.device.name,
        "slots": backend.most,
        "models": [name for names in backend.models.values() for name in names],
        "loaded": list(report.loaded) if report else [],
        "gpu_pct": {  # of what is loaded, where it is split over CPU and GPU
            backend.models.get(key, [key])[0]: share
            for key, share in backend.gpu_shares.items()
            if share < 100
        },
        "context": {name: tokens for name, tokens in contexts.items() if tokens},
        "latency_ms": round(1000 * report.latency, 1) if report else None,
    }


def show_memory(memory: VideoMemory | None) -> Facts | None:
    """Graphics memory of a device, in GiB."""
    if memory is None:
        return None
    return {f"{name}_gb": round(value, 2) for name, value in memory._asdict().items()}


def show_gpu(gateway: Gateway) -> Facts:
    """The cards of this box, and the graphics memory of each device."""
    cards, fleet = gateway.chooser.cards, gateway.fleet
    rows = [
        {
            "name": card.name,
            "vramTotalMb": card.total,
            "vramUsedMb": card.used,
            "vramFreeMb": None if card.used is None else card.total - card.used,
            "utilizationPct": card.busy,
        }
        for card in cards.cards
    ]
    age = gateway.now() - cards.looked
    return {
        "provider": cards.maker,
        "available": bool(rows),
        "gpus": rows,
        "age_s": round(age, 1) if age < math.inf else None,
        "error": cards.error,
        "devices": {name: show_memory(cards.memory_of(name)) for name in fleet.devices},
    }


def show_models(gateway: Gateway) -> Facts:
    """Each model once, with all that speaks for it where llmq is to choose."""
    fleet, chooser, rows = gateway.fleet, gateway.chooser, []
    for key in dict.fromkeys(key for one in fleet.backends.values() for key in one.models):
        having = [one for one in fleet.backends.values() if key in one.models]
        policy = fleet.policy(key)
        can = {
            name for one in having for name, can in abilities_of(one, key, NO_POLICY).items() if can
        }
        shares = [one.gpu_shares[key] for one in having if key in one.gpu_shares]
        rows.append(
            {
                "name": having[0].models[key][0],
                "backends": [one.name for one in having],
                "loaded": any(one.is_loaded(key) for one in having),
                "gpuPct": min(shares, default=None),
                "sizeGb": round(chooser.size_of(key, having), 2) or None,
                "context": max(chooser.context_of(key, one) for one in having) or None,
                "capabilities": sorted(can),
                **members(policy, "purpose", "tags", "exclusive"),
                "maxConcurrent": policy.max_concurrent,
            }
        )
    return {"models": rows}


def show_router(gateway: Gateway) -> Facts:
    """Routes, what is loaded, and for each model what waits and runs."""
    fleet, scheduler, settings = gateway.fleet, gateway.scheduler, gateway.settings
    up = any(one.usable for one in fleet.backends.values())
    queues: dict[str, Counter[str]] = {}
    for tickets in (scheduler.waiting, scheduler.running):
        for ticket in tickets.values():
            queues.setdefault(printable(ticket.model), Counter())[ticket.state.word] += 1
    models = show_models(gateway)["models"]
    troubled = gateway.config_error or gateway.chooser.cards.error
    return {
        "status": "unavailable" if not up else "degraded" if troubled else "ok",
        "mode": scheduler.mode.value,
        "routes": settings.routes,
        "degrade": settings.router.degrade,
        "requireGpu": settings.router.require_gpu,
        "loadedModels": [row["name"] for row in models if row["loaded"]],
        "queues": [
            {"model": name, "queued": row["waiting"], "running": row["running"]}
            for name, row in queues.items()
        ],
        "jobs": {"queued": gateway.jobs.queued},
        "gpu": show_gpu(gateway),
    }


def show_client(client: Client) -> Facts:
    return {
        "name": client.name,
        **{key.rstrip("_"): value for key, value in vars(client.settings).items()},
        **members(client, "address", "waiting", "running", "done", "failed", "left"),
        "served_s": round(client.served, 3),
    }


def show_clients(gateway: Gateway, now: float) -> list[Facts]:
    """Each client, with its per cent of what all had, what runs now among it."""
    had = {name: client.served for name, client in gateway.clients.known.items()}
    for ticket in gateway.scheduler.running.values():
        had[ticket.client.name] += now - ticket.started
    part, known = sum(had.values()) / 100 or 1.0, gateway.clients.known.values()
    return [{**show_client(one), "share": round(had[one.name] / part, 1)} for one in known]


def show_gauges(gateway: Gateway) -> None:
    show, fleet, scheduler = gateway.metrics.show, gateway.fleet, gateway.scheduler
    gateway.journal.flush()
    now, waiting = gateway.now(), scheduler.waiting.values()
    show("llmq_waiting", count_classes(waiting))
    show("llmq_running", count_classes(scheduler.running.values()))
    show("llmq_oldest_wait_seconds", oldest_wait(waiting, now))
    show("llmq_mode", {mode.value: mode is scheduler.mode for mode in Mode})
    show("llmq_slots", {name: device.slots for name, device in fleet.devices.items()})
    show("llmq_slots_busy", {name: device.busy for name, device in fleet.devices.items()})
    show("llmq_backend_up", {name: backend.usable for name, backend in fleet.backends.items()})
    show("llmq_uptime_seconds", now - gateway.started)
    show("process_cpu_seconds_total", time.process_time())
    with contextlib.suppress(OSError):  # a system without /proc
        show("process_open_fds", len(os.listdir("/proc/self/fd")) - 1)  # one was for looking
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
        show("process_resident_memory_bytes", pages * os.sysconf("SC_PAGE_SIZE"))


def show_history(gateway: Gateway) -> Facts:
    """The last day by minutes, the one under way last."""
    history, words = gateway.journal.history, [one.word for one in Priority]
    rows = [*history.minutes, history.latest(total_counts(gateway))]
    columns = list(zip(*rows))
    return {
        "minute": history.minute,  # since 1970, of the last
        "waiting": dict(zip(words, columns)),
        "started": dict(zip(words, columns[len(words) :])),
        "tokens": columns[-1],
    }


class SnapshotStream:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.latest = b""
        self.version = 0  # rises with each rendering that is news for those who watch
        self.watchers = 0
        self._changes = -1  # of the gateway's, as far as they are rendered
        self._rendered = float("-inf")  # when `latest` was
        self._wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def step(self) -> None:
        """Render if anybody watches and anything changed; while requests are here, time does."""
        gateway = self.gateway
        aged = gateway.calls and gateway.now() - self._rendered >= TIME_SECONDS
        if self.watchers and (aged or self._changes != gateway.changes):
            await gateway.foresee()
            self.tell()

    def tell(self) -> None:
        self._changes = self.gateway.changes
        self.version += 1
        self._render()
        self.wake()

    async def first(self) -> bytes:
        """What a new watcher sees; those who come at one time share it, as they do all else."""
        await self.gateway.foresee()
        if self.gateway.now() - self._rendered >= STREAM_SECONDS:
            self._render()
        return self.latest

    def _render(self) -> None:
        self._rendered = self.gateway.now()
        self.latest = render_json(snapshot(self.gateway))

    def wake(self) -> None:
        """Let everybody who waits look again: there is news, or somebody left, or the end."""
        self._wake.set_result(None)
        self._wake = asyncio.get_running_loop().create_future()

    async def wait(self, timeout: float) -> None:
        await asyncio.wait({self._wake}, timeout=timeout)


# ==== 47. Job routes ==============================================================================
# What clients ask of jobs, files and batches.  They see their own: what was asked for with their
# key, or without keys what has their name.  Everybody's are seen with the right `control`, without
# keys from this box.

MOST_SHOWN = 1000  # rows of one list
NO_PAGE = (("Content-Security-Policy", "default-src 'none'; sandbox"),)  # whatever a browser thinks
CONTROL_BODY = 64 * KIB
OWN_ROWS = "account = ? AND (? OR client = ?)"  # asks for what `owner` gives


async def read_values(exchange: Exchange, limit: int) -> Facts:
    """The members of the object that is the request's body, of at most so many bytes."""
    body = await exchange.read_body(limit)
    read = functools.partial(read_object, decode_json(body))
    return (await beside(read, heavy=is_heavy(body))).values


def owner(exchange: Exchange) -> tuple[str, bool, str]:
    """Name of the caller's key, whether there is one, and the caller's own name."""
    account, client = exchange.caller.account, exchange.caller.client
    return account.name, account is not NO_ACCOUNT, client


def times(**seconds: float | None) -> Facts:
    """Times as OpenAI tells them: whole seconds since 1970."""
    return {name: None if when is None else int(when) for name, when in seconds.items()}


class Page(NamedTuple):
    """The part of a list that is asked for."""

    limit: int  # rows
    after: str  # id of the row behind which it begins, or empty
    upwards: bool  # the oldest first

    def of(self, rows: list[Facts]) -> Facts:
        """A list as OpenAI has it, of the rows that `JobRoutes.rows_of` has found."""
        shown = rows[: self.limit]
        ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
        return {"object": "list", "data": shown, **ends, "has_more": len(rows) > self.limit}


def read_page(query: Mapping[str, str], usual: int) -> Page:
    """The page that a query asks for; of `usual` rows where it does not say how many."""
    limit = query.get("limit", str(usual))
    if not re.fullmatch("0*[1-9][0-9]*", limit):
        raise BadRequest("limit is a number above 0", param="limit")
    most = min(int(limit.lstrip("0")[:9]), MOST_SHOWN)
    return Page(most, query.get("after", ""), query.get("order") == "asc")


FORM_TYPE = re.compile(
    r'multipart/form-data[ \t]*;(?:.*?;)??[ \t]*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))',
    re.IGNORECASE,
)
MOST_PARTS, PART_HEAD = 100, 8 * KIB  # parts of a form, bytes of the header fields of one
PART_FIELD = re.compile(rb"\r\ncontent-disposition:[ \t]*form-data([^\r\n]*)", re.IGNORECASE)
PART_MEMBER = re.compile(r';[ \t]*([\w*-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')


def read_part(head: bytes) -> tuple[str, str]:
    """Name and file name of a part, from its header fields."""
    field = PART_FIELD.search(head)
    text = field[1].decode("utf-8", "replace") if field else ""
    told = {
        name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain
        for name, quoted, plain in PART_MEMBER.findall(text)
    }
    charset, _, rest = told.get("filename*", "").partition("'")  # RFC 5987
    coding = "latin-1" if charset.lower() == "iso-8859-1" else "utf-8"
    name = unquote_to_bytes(rest.partition("'")[2]).decode(coding, "replace")
    return told.get("name", ""), name or told.get("filename", "")


def read_file_form(body: bytes, content_type: str) -> tuple[str, str, bytes]:
    """Purpose, name and content of a file that comes in a form, RFC 7578."""
    media = FORM_TYPE.match(content_type)
    if media is None:
        raise BadRequest("send a form: Content-Type: multipart/form-data with its boundary")
    mark = b"\r\n--" + (media[1] or media[2]).encode("latin-1", "replace")
    found: dict[str, tuple[str, bytes]] = {}
    end = -2 if body.startswith(mark[2:]) else body.find(mark)
    for _ in range(MOST_PARTS):
        if end == -1:
            break
        start, end = end + len(mark), body.find(mark, end + len(mark))
        middle = body.find(b"\r\n\r\n", start, end) if end != -1 else -1
        if middle - start > PART_HEAD:
            raise BadRequest("a part of the form has too long a head")
        name, filename = read_part(body[start:middle]) if middle != -1 else ("", "")
        if name in ("file", "purpose"):
            found[name] = filename, body[middle + 4 : end]
    if "file" not in found:
        raise BadRequest("the form has no file", param="file")
    return found.get("purpose", ("", b""))[1].decode("utf-8", "replace"), *found["file"]


Owned = TypeVar("Owned", Job, StoredFile, Batch)


@dataclass(eq=False)
class JobRoutes:
    """Answers what is asked of jobs, files and batches."""

    gateway: Gateway
    runner: JobRunner
    batches: Batches

    def may_steer(self, exchange: Exchange) -> bool:
        """Whether the caller may see everybody's rows."""
        if not (self.gateway.accounts.by_digest or exchange.caller.account is not NO_ACCOUNT):
            return exchange.is_local
        with contextlib.suppress(LlmqError):
            check_right(exchange, "control", self.gateway)
            return True
        return False

    def seen(self, exchange: Exchange, what: str, row: Owned) -> Owned:
        """The row; a caller who may not see it is told that it is not there."""
        account, keyed, client = owner(exchange)
        own = row.account == account and (keyed or row.client == client)
        if not own and not self.may_steer(exchange):
            raise no_row(what, row.id)
        return row

    async def rows_of(
        self, table: str, columns: str, page: Page, where: str, *values: Any
    ) -> list[Any]:
        """The rows of a page, and one more where there is one: so a list tells that it goes on."""
        beyond, order = (">", "ASC") if page.upwards else ("<", "DESC")
        return await self.gateway.store.read(
            f"SELECT {columns} FROM {table} WHERE {where}"
            f" AND (? = '' OR number {beyond} (SELECT number FROM {table} WHERE id = ?))"
            f" ORDER BY number {order} LIMIT ?",
            *values, page.after, page.after, page.limit + 1,
        )  # fmt: skip

    # ---- jobs

    async def job_of(self, exchange: Exchange, ident: str) -> Job:
        return self.seen(exchange, "job", await self.gateway.jobs.find(ident))

    def show_job(self, job: Job) -> Facts:
        ended, ttl = job.ended, self.gateway.settings.jobs.result_ttl
        expires = None if ended is None or job.state == EXPIRED else ended + ttl
        facts = {
            "id": job.id,
            "object": "router.job",
            "status": job.state,
            **times(created_at=job.created, started_at=job.started, completed_at=ended),
            **times(expires_at=expires),
            "model": printable(job.model),
            "route": job.target.partition("?")[0],
            "client": job.client,
            "class": Priority(job.priority).word,
            "attempts": job.attempts,
            "error": job.error,
        }
        call = self.gateway.calls.get(job.id)
        if call is not None and call.ticket.state is TicketState.WAITING:
            expected = self.gateway.forecast(self.gateway.now())[job.id]
            facts.update(position=expected.position, eta_s=expected.eta, reason=expected.reason)
        return facts

    async def list_jobs(self, exchange: Exchange, _: str) -> Facts:
        query = dict(parse_qsl(exchange.request.query))
        page = read_page(query, 100)._replace(upwards=False)
        everybody = query.get("all") == "1"
        if everybody and not self.may_steer(exchange):
            raise LlmqError("all jobs are shown to who has the right: control", "forbidden")
        where, values = ("true", ()) if everybody else (OWN_ROWS, owner(exchange))
        rows = await self.rows_of("jobs", SHOWN_JOB, page, f"batch = '' AND {where}", *values)
        return page.of([self.show_job(job_of_row(row)) for row in rows])

    async def get_job(self, exchange: Exchange, ident: str) -> Facts:
        return self.show_job(await self.job_of(exchange, ident))

    async def get_result(self, exchange: Exchange, ident: str) -> None:
        """What the request would have been answered with, once that is known."""
        job = await self.job_of(exchange, ident)
        if job.state in (QUEUED, RUNNING):
            exchange.respond(202, render_json(self.show_job(job)), headers=[("Retry-After", "5")])
        elif job.state == CANCELLED:
            raise LlmqError(f"job {ident} was cancelled", "conflict")
        elif job.state == EXPIRED:
            raise LlmqError(f"the result of job {ident} was kept long enough", "gone")
        else:
            rows = await self.gateway.store.read("SELECT answer FROM jobs WHERE id = ?", ident)
            told = (rows[0][0] or b"", job.type or "application/json", NO_PAGE)
            exchange.respond(job.status or 500, *told)

    async def delete_job(self, exchange: Exchange, ident: str) -> Facts:
        job = await self.job_of(exchange, ident)
        if not await self.runner.cancel(job):
            raise LlmqError(f"job {ident} has ended already", "conflict")
        return self.show_job(await self.gateway.jobs.find(ident))

    # ---- files

    async def file_of(self, exchange: Exchange, ident: str) -> StoredFile:
        return self.seen(exchange, "file", await self.batches.find_file(ident))

    def show_file(self, file: StoredFile) -> Facts:
        facts = {"id": file.id, "object": "file", "bytes": file.bytes, "filename": file.name}
        expires = file.created + self.gateway.settings.jobs.result_ttl
        facts.update(times(created_at=file.created, expires_at=expires))
        return {**facts, "purpose": file.purpose, "status": "processed", "status_details": None}

    async def post_file(self, exchange: Exchange, _: str) -> Facts:
        body = await exchange.read_body(self.gateway.settings.server.max_body)
        media = exchange.request.headers.get("content-type", "")
        read = functools.partial(read_file_form, body, media)
        purpose, name, content = await beside(read, heavy=is_heavy(body))
        if purpose != "batch":
            raise BadRequest("purpose is batch: llmq has no use for other files", param="purpose")
        file = await self.batches.add_file(exchange.caller, printable(name, 200), content)
        return self.show_file(file)

    async def list_files(self, exchange: Exchange, _: str) -> Facts:
        query = dict(parse_qsl(exchange.request.query))
        page, purpose = read_page(query, MOST_SHOWN), query.get("purpose", "")
        where = f"{OWN_ROWS} AND (? = '' OR purpose = ?)"
        values = (*owner(exchange), purpose, purpose)
        rows = await self.rows_of("files", FILE_ROW, page, where, *values)
        return page.of([self.show_file(StoredFile(*row)) for row in rows])

    async def get_file(self, exchange: Exchange, ident: str) -> Facts:
        return self.show_file(await self.file_of(exchange, ident))

    async def get_content(self, exchange: Exchange, ident: str) -> None:
        """What is in a file, as fast as the client takes it: it may be longer than memory."""
        file = await self.file_of(exchange, ident)
        exchange.watch()
        exchange.start(200, "application/octet-stream", NO_PAGE)
        left = file.bytes
        async for piece in self.batches.content(file):
            if exchange.gone:
                raise ClientLeft("the client left")
            left -= len(piece)
            exchange.send(piece)
            if exchange.blocked:
                exchange.connection.server.limit_unsent()
                await exchange.catch_up()
        if left:  # its lines were let go meanwhile
            exchange.fail(b"")
        else:
            exchange.finish()

    async def delete_file(self, exchange: Exchange, ident: str) -> Facts:
        file = await self.file_of(exchange, ident)
        await self.gateway.store.write(("DELETE FROM files WHERE id = ?", (file.id,)))
        return {"id": file.id, "object": "file", "deleted": True}

    # ---- batches

    async def batch_of(self, exchange: Exchange, ident: str) -> Batch:
        return self.seen(exchange, "batch", await self.batches.find(ident))

    async def show_batch(self, batch: Batch) -> Facts:
        facts, counts = json.loads(batch.facts), await self.batches.counts(batch.id)
        mistakes = facts["errors"]
        ends: Facts = {
            f"{state}_at": None for state in ("completed", "failed", "expired", "cancelled")
        }
        if batch.ended is not None:
            ends[f"{batch.state}_at"] = int(batch.ended)
        cancelled = batch.ended if batch.state == "cancelled" else None
        done = {"completed": counts[SUCCEEDED], "failed": counts[FAILED]}
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": facts["endpoint"],
            "errors": {"object": "list", "data": mistakes} if mistakes else None,
            "input_file_id": batch.input,
            "completion_window": "24h",  # as OpenAI's clients ask for; llmq sets no limit
            "status": batch.state,
            "output_file_id": facts.get("output_file_id"),
            "error_file_id": facts.get("error_file_id"),
            **times(created_at=batch.created, in_progress_at=batch.created, finalizing_at=None),
            **times(expires_at=None, cancelling_at=cancelled),
            **ends,
            "request_counts": {"total": facts["total"], **done},
            "metadata": facts["metadata"],
        }

    async def post_batch(self, exchange: Exchange, _: str) -> Facts:
        values = await read_values(exchange, CONTROL_BODY)
        path, file, metadata = map(values.get, ("endpoint", "input_file_id", "metadata"))
        if path not in BATCH_PATHS:
            message = "endpoint is one of " + ", ".join(BATCH_PATHS)
            raise BadRequest(message, param="endpoint")
        if not isinstance(file, str):
            raise BadRequest("input_file_id is the id of a file", param="input_file_id")
        texts = metadata.values() if isinstance(metadata, dict) else [None]
        if metadata is not None and not all(isinstance(one, str) for one in texts):
            raise BadRequest("metadata is an object of texts", param="metadata")
        found = await self.file_of(exchange, file)
        if found.purpose != "batch":
            raise BadRequest("input_file_id is an output", param="input_file_id")
        return await self.show_batch(await self.batches.add(exchange.caller, found, path, metadata))

    async def list_batches(self, exchange: Exchange, _: str) -> Facts:
        page = read_page(dict(parse_qsl(exchange.request.query)), 20)
        rows = await self.rows_of("batches", BATCH_ROW, page, OWN_ROWS, *owner(exchange))
        return page.of([await self.show_batch(Batch(*row)) for row in rows])

    async def get_batch(self, exchange: Exchange, ident: str) -> Facts:
        return await self.show_batch(await self.batch_of(exchange, ident))

    async def cancel_batch(self, exchange: Exchange, ident: str) -> Facts:
        batch = await self.batch_of(exchange, ident)
        await self.batches.cancel(batch)
        return await self.show_batch(await self.batches.find(ident))


# ==== 48. Connect =================================================================================
# What a program is told so that it asks llmq: one table, for `llmq connect`, the page and the
# README.  BASE stands for llmq's address, KEY for a key of one's own, MODEL for a model.

NO_KEY = "none"  # some programs insist on one
PLAIN_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,127}")  # to a shell and YAML, too


class Recipe(NamedTuple):
    """How one program is connected."""

    name: str
    where: str  # what the text goes into
    text: str


SHELL = "a shell"
RECIPES = (
    Recipe("Ollama", SHELL, "export OLLAMA_HOST=BASE OLLAMA_API_KEY=KEY"),
    Recipe("OpenAI", SHELL, "export OPENAI_BASE_URL=BASE/v1 OPENAI_API_KEY=KEY"),
    Recipe("Anthropic", SHELL, "export ANTHROPIC_BASE_URL=BASE ANTHROPIC_API_KEY=KEY"),
    Recipe(
        "curl", SHELL,
        "curl BASE/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        "  -H 'Authorization: Bearer KEY' \\\n"
        '  -d \'{"model": "MODEL", "messages": [{"role": "user", "content": "hello"}]}\'',
    ),
    Recipe(
        "Python", "a program",
        "from openai import OpenAI\n"
        'client = OpenAI(base_url="BASE/v1", api_key="KEY")\n'
        'messages = [{"role": "user", "content": "hello"}]\n'
        'answer = client.chat.completions.create(model="MODEL", messages=messages)\n'
        "print(answer.choices[0].message.content)",
    ),
    Recipe(
        "JavaScript", "a program",
        "const answer = await fetch('BASE/v1/chat/completions', {method: 'POST',\n"
        "  headers: {'Content-Type': 'application/json', Authorization: 'Bearer KEY'},\n"
        "  body: JSON.stringify({model: 'MODEL', messages: [{role: 'user', content: 'hi'}]})});\n"
        "console.log((await answer.json()).choices[0].message.content);",
    ),
    Recipe(
        "Claude Code", SHELL,
        "export ANTHROPIC_BASE_URL=BASE ANTHROPIC_AUTH_TOKEN=KEY\nclaude --model MODEL",
    ),
    Recipe(
        "Codex", "~/.codex/config.toml; and LLMQ_KEY=KEY in its environment",
        'model = "MODEL"\nmodel_provider = "llmq"\n\n[model_providers.llmq]\nname = "llmq"\n'
        'base_url = "BASE/v1"\nenv_key = "LLMQ_KEY"\nwire_api = "responses"',
    ),
    Recipe(
        "aider", SHELL,
        "export OPENAI_API_BASE=BASE/v1 OPENAI_API_KEY=KEY\naider --model openai/MODEL",
    ),
    Recipe(
        "opencode", "opencode.json",
        '{"provider": {"llmq": {"npm": "@ai-sdk/openai-compatible",\n'
        '  "options": {"baseURL": "BASE/v1", "apiKey": "KEY"}, "models": {"MODEL": {}}}}}',
    ),
    Recipe(
        "Continue", "~/.continue/config.yaml, under models:",
        "- name: MODEL\n  provider: openai\n  model: MODEL\n  apiBase: BASE/v1\n  apiKey: KEY",
    ),
    Recipe(
        "Cline", "its settings",
        "API Provider: OpenAI Compatible\nBase URL: BASE/v1\nAPI Key: KEY\nModel ID: MODEL",
    ),
    Recipe(
        "Open WebUI", "its environment",
        "OLLAMA_BASE_URL=BASE\nENABLE_FORWARD_USER_INFO_HEADERS=true",
    ),
    Recipe(
        "Zed", "settings.json; and LLMQ_API_KEY=KEY in its environment",
        '{"language_models": {"openai_compatible": {"llmq": {"api_url": "BASE/v1",\n'
        '  "available_models": [{"name": "MODEL", "max_tokens": 32768}]}}}}',
    ),
    Recipe("n8n", "a credential of the type OpenAI", "Base URL: BASE/v1\nAPI Key: KEY"),
    Recipe(
        "LangChain", "a program",
        "from langchain_openai import ChatOpenAI\n"
        'chat = ChatOpenAI(base_url="BASE/v1", api_key="KEY", model="MODEL")',
    ),
)  # fmt: skip


KEY_PARTS = (  # of the texts above, which nobody needs where no key is needed
    "  -H 'Authorization: Bearer KEY' \\\n", ", Authorization: 'Bearer KEY'", " OLLAMA_API_KEY=KEY",
)  # fmt: skip


def without_key(text: str) -> str:
    """The text of a recipe for an llmq that needs no key."""
    for part in KEY_PARTS:
        text = text.replace(part, "")
    return text.replace("KEY=KEY", f"KEY={NO_KEY}")


def fill_in(text: str, base: str, key: str = NO_KEY, model: str = "MODEL") -> str:
    """The text of a recipe for one llmq."""
    filled = {"BASE": base, "KEY": key, "MODEL": model}
    text = without_key(text) if key == NO_KEY else text
    return re.sub(r"\b(BASE|KEY|MODEL)\b", lambda found: filled[found[0]], text)


@functools.lru_cache(maxsize=2)
def recipes_json(*, keyed: bool) -> str:
    """All recipes as the page's script holds them, which no text in them can end."""
    rows = RECIPES if keyed else [one._replace(text=without_key(one.text)) for one in RECIPES]
    return json.dumps(rows).replace("</", "<\\/")


def find_recipes(name: str) -> list[Recipe]:
    """The recipe of a program, or all; ConfigError with the nearest where there is none."""
    plain = {re.sub(r"\W", "", one.name.lower()): one for one in RECIPES}
    wanted = re.sub(r"\W", "", name.lower())
    if not name:
        return list(RECIPES)
    if wanted not in plain:
        raise ConfigError(misspelt("program", name.lower(), [one.name.lower() for one in RECIPES]))
    return [plain[wanted]]


# ==== 49. Handlers ================================================================================
# What stands behind the routes that do not wait in the queue.  What is checked before a handler
# runs is a matter of the next section.

EVENT_PING_SECONDS = 10.0
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS = (("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"))
AUTO_ENTRY = {"id": AUTO, "object": "model", "created": 0, "owned_by": "llmq"}
OLLAMA_VERSION = "0.30.0"  # told where no Ollama is: some clients choose features by it


def find_call(gateway: Gateway, ident: str) -> Call:
    call = gateway.calls.get(ident) or gateway.recall.joined.get(ident)
    if call is None:
        raise LlmqError(f"no request {printable(ident)} is waiting or running", "not_found")
    return call


@dataclass(eq=False)
class Api:
    """What is behind the routes: a handler for each, and what they need."""

    gateway: Gateway
    names: frozenset[str]  # of this box, lower case
    reload: Callable[[], None]
    changes: Changes
    jobs: JobRoutes
    keeper: Keeper

    def __post_init__(self) -> None:
        self.settings = self.gateway.settings
        self.stream = SnapshotStream(self.gateway)

    # ---- handlers: they get what fills the path's {...}, to change something under /llmq also the
    # members of the body, and return the JSON to answer, if any

    async def get_health(self, exchange: Exchange, _: str) -> None:
        """Whether llmq serves; with `ready=1` whether any runner does, too."""
        trouble = None
        if dict(parse_qsl(exchange.request.query)).get("ready") == "1":
            up = any(one.usable for one in self.gateway.fleet.backends.values())
            trouble = None if up else self.gateway.fleet.trouble() or "no runner is up yet"
        body = (trouble or "ok").encode("utf-8", "replace")
        exchange.respond(503 if trouble else 200, body, "text/plain; charset=utf-8")

    async def get_root(self, exchange: Exchange, _: str) -> None:
        """What clients of Ollama look for, to a browser the page."""
        exchange.headers += (("Vary", "Accept"),)
        if "text/html" in exchange.request.headers.get("accept", "").lower():
            check_right(exchange, "control", self.gateway)
            await self.get_page(exchange, "")
        else:
            exchange.respond(200, b"Ollama is running", "text/plain; charset=utf-8")

    async def get_page(self, exchange: Exchange, _: str) -> None:
        """The page, with a nonce that no earlier response had."""
        nonce = secrets.token_urlsafe(16)
        headers = [("Content-Security-Policy", PAGE_POLICY.replace("NONCE", nonce)), *PAGE_HEADERS]
        page = PAGE.replace("NONCE", nonce).replace("BASEPATH", self.settings.server.base_path)
        keyed = bool(self.settings.keys)
        page = page.replace("RECIPES_HERE", recipes_json(keyed=keyed))
        page = page.replace("KEYED_HERE", json.dumps(keyed))
        exchange.respond(200, page.encode(), "text/html; charset=utf-8", headers)

    async def get_version(self, _exchange: Exchange, _: str) -> Facts:
        versions = [report.version for report in reports_of(self.gateway.fleet) if report.version]
        version = versions[0] if versions else OLLAMA_VERSION
        return {"version": version, "llmq": __version__, "instance": self.gateway.instance}

    async def fresh(self, look: Callable[[], T]) -> T:
        """What a look finds; for a model that it does not find the backends are asked once more."""
        await self.gateway.monitor.catch_up()
        try:
            return look()
        except LlmqError as error:
            if error.code != "model_not_found":
                raise
        await self.gateway.monitor.refresh()
        return look()

    async def get_models(self, exchange: Exchange, _: str) -> Facts:
        await self.gateway.monitor.catch_up()
        entries = usable_rows(merge_rows(self.gateway.fleet), exchange.caller)
        if self.settings.routes and not self.gateway.fleet.lists(AUTO):  # so that it can be picked
            entries.append(AUTO_ENTRY)
        if "anthropic-version" in exchange.request.headers:
            return anthropic_list(entries)
        return {"object": "list", "data": entries}

    async def get_model(self, exchange: Exchange, name: str) -> Facts:
        alias = find_alias(self.settings.aliases, name)

        def look() -> Facts:
            entries = merge_rows(self.gateway.fleet)
            if self.settings.routes:
                entries.setdefault(AUTO, AUTO_ENTRY)
            entry = entries.get(model_key(name)) or entries.get(model_key(alias or name))
            if entry is None or not exchange.caller.account.may_use(model_key(alias or name)):
                raise model_not_found(name)
            return entry

        entry = await self.fresh(look)
        return anthropic_model(entry) if "anthropic-version" in exchange.request.headers else entry

    async def get_rows(self, exchange: Exchange, _: str) -> Facts:
        await self.gateway.monitor.catch_up()
        rows = running_rows if exchange.request.path == "/api/ps" else tag_rows
        return {"models": usable_rows(merge_rows(self.gateway.fleet, rows), exchange.caller)}

    async def post_show(self, exchange: Exchange, _: str) -> Facts:
        """What an Ollama shows of its model, asked now; of other runners what their list tells."""
        values = await read_values(exchange, self.settings.server.max_body)
        monitor = self.gateway.monitor
        model = await self.gateway.admission.resolve_model(read_name(values))
        check_model(exchange.caller, model)
        failure: LlmqError | None = None
        serving = self.gateway.fleet.serving(Want(model_key(model)))
        for backend in serving:
            if backend.traits.native and backend.usable:
                asked = {"model": backend.name_for(model), "verbose": values.get("verbose") is True}
                limit, body = backend.limits.first_byte_timeout, render_json(asked)
                try:
                    return await monitor.ask(limit, backend, "/api/show", body, b"", exchange)
                except LlmqError as error:
                    failure = error.with_traceback(None)
        if serving and not any(backend.usable for backend in serving):
            raise BackendUnreached(f"{serving[0].name}, which has it, is down")
        if failure is not None:
            raise failure
        return bare_show(self.gateway.fleet, model)

    async def manage(self, exchange: Exchange, digest: str) -> None:
        """Straight to an Ollama and back, beside the queue; what changes something is recorded."""
        request, gateway = exchange.request, self.gateway
        check_way(request, gateway.instance)
        named, path = request.headers.get("x-llmq-backend"), quote(request.path, safe="/:")
        values: Facts = {}
        if path in MANAGED_BY:
            values = await read_values(exchange, self.settings.server.max_body)
        model = values.get(MANAGED_BY.get(path, "")) or values.get("name") or digest
        name, began = "", gateway.now()

        def keep(error: LlmqError | None = None) -> None:
            if request.method not in ("GET", "HEAD"):
                took = gateway.now() - began
                gateway.journal.keep(order_record(exchange, str(model), name, took, error))

        try:
            backend = await self.fresh(lambda: pick_manager(gateway.fleet, path, values, named))
            name, look = backend.name, functools.partial(gateway.monitor.probe_now, backend)
            await Passthrough(exchange, backend, path, gateway, look).run()
        except LlmqError as error:
            keep(error)
            raise
        keep()

    def enqueue(self, exchange: Exchange, _: str) -> Awaitable[None]:
        request, ids = exchange.request, (exchange.id, exchange.request_id)
        endpoint = endpoint_of(request.path)
        assert endpoint is not None  # its route says so
        return self.gateway.serve(Call(exchange, endpoint, request, exchange.caller, ids))

    async def get_status(self, exchange: Exchange, _: str) -> Facts:
        query = dict(parse_qsl(exchange.request.query))
        word, facts = query.get("find", "").lower(), {}
        if query.get("all") == "1":
            facts["requests"] = await show_all(self.gateway, word)
        await self.gateway.foresee()
        return {**snapshot(self.gateway, word), **facts}

    async def get_events(self, exchange: Exchange, _: str) -> None:
        """The snapshot as server-sent events: now, then on change, at most four a second."""
        stream = self.stream
        stream.watchers += 1
        try:
            exchange.watch(stream.wake)
            exchange.start(200, "text/event-stream")
            newest, seen = await stream.first(), stream.version
            while not exchange.gone:
                exchange.send(b"data: " + newest + b"\n\n" if newest else b": ping\n\n")
                if self.gateway.draining:
                    break  # which was the last news
                if exchange.blocked:
                    await exchange.catch_up()
                if stream.version == seen:
                    await stream.wait(EVENT_PING_SECONDS)
                newest, seen = stream.latest if stream.version != seen else b"", stream.version
            exchange.finish()
        finally:
            stream.watchers -= 1

    async def get_metrics(self, exchange: Exchange, _: str) -> None:
        show_gauges(self.gateway)
        text = self.gateway.metrics.render()
        exchange.respond(200, text, "text/plain; version=0.0.4; charset=utf-8")

    async def post_mode(self, _exchange: Exchange, _: str, values: Facts) -> Facts:
        wanted, modes = values.get("mode"), [mode.value for mode in Mode]
        if wanted not in modes:
            raise BadRequest("mode is one of " + ", ".join(modes), param="mode")
        self.gateway.set_mode(Mode(wanted))
        return {"mode": wanted}

    async def post_reload(self, _exchange: Exchange, _: str, _values: Facts) -> Facts:
        self.reload()
        return {"config_error": self.gateway.config_error}

    async def post_model(self, exchange: Exchange, _: str, values: Facts) -> Facts | None:
        if values.get("action") == "reset_context":
            return {"reset": reset_context(self.gateway.fleet, read_name(values))}
        told = await order_models(self.gateway, values, exchange.caller, exchange.id)
        exchange.respond(202, render_json({"id": exchange.id, **told}))
        return None

    async def delete_request(self, exchange: Exchange, ident: str, _: Facts) -> Facts:
        call, account = find_call(self.gateway, ident), exchange.caller.account
        if account is NO_ACCOUNT or account is not call.caller.account:  # else it is its own
            check_right(exchange, "control", self.gateway)
        self.gateway.cancel(call)
        return {"cancelled": 1}

    async def post_request(self, exchange: Exchange, ident: str, values: Facts) -> Facts:
        check_right(exchange, "control", self.gateway)
        priority = parse_priority(values.get("priority"))
        if priority is None:
            raise BadRequest('priority is "high", "normal" or "low"', param="priority")
        self.gateway.reprioritise(find_call(self.gateway, ident), priority)
        return {"id": ident, "class": priority.word}


async def post_count(api: Api, exchange: Exchange, _: str) -> Facts:
    return await count_tokens(api.gateway, exchange)


async def post_client(api: Api, _exchange: Exchange, name: str, values: Facts) -> Facts:
    await api.changes.change(name, values)
    return show_client(api.gateway.clients.named(name))


async def post_ip(api: Api, _exchange: Exchange, _: str, values: Facts) -> Facts:
    address = plain_address(str(values.get("ip")))
    if not address or set(values) != {"ip", "blocked"}:
        raise BadRequest('say {"ip":ADDRESS,"blocked":true}', param="ip")
    await api.changes.change("ip:" + address, {"blocked": values["blocked"]})
    return {"ip": address, "blocked": api.gateway.clients.of("ip:" + address).blocked}


async def get_history(api: Api, _exchange: Exchange, _: str) -> Facts:
    return show_history(api.gateway)


async def get_router(api: Api, exchange: Exchange, _: str) -> Facts:
    """What is shown of the choice of models; the cards are looked at where that is due."""
    gateway = api.gateway
    gateway.chooser.cards.want()
    await gateway.monitor.catch_up()
    await gateway.chooser.cards.step()
    show = {"status": show_router, "models": show_models, "gpu": show_gpu}
    return show[exchange.request.path.rpartition("/")[2]](gateway)


async def read_control(exchange: Exchange) -> Facts:
    """The JSON object that changes something; DELETE may come without."""
    if exchange.request.method == "DELETE" and not exchange.length:
        return {}
    media = exchange.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # which no page from elsewhere can send without a preflight
        raise LlmqError("send Content-Type: application/json", "unsupported_media_type")
    return await read_values(exchange, CONTROL_BODY)


SAME_SITES = ("none", "same-origin")  # as `Sec-Fetch-Site`: no page, or the service's own


async def pass_to(api: Api, exchange: Exchange, service: Backend) -> None:
    """To the other service that a port is for; no page may use its secrets."""
    check_host(exchange, api.names)
    exchange.caller = await find_caller(exchange, api.gateway)
    exchange.headers = grant(None, Access.OWNER, ())
    check_origin(exchange, Access.OWNER)
    headers = exchange.request.headers
    if "origin" not in headers and headers.get("sec-fetch-site", "none") not in SAME_SITES:
        raise LlmqError("pages from elsewhere may not use this port", "forbidden_origin")
    check_blocked(exchange, "", api.gateway.clients)
    path, method = exchange.request.path, exchange.request.method
    limit = service.settings.idle_timeout or NEVER
    if method in ("TRACE", "CONNECT") or method not in METHODS:
        raise LlmqError(f"method {printable(method, 20)} is not passed on", "not_implemented")
    if {".", ".."}.intersection(re.split(r"[/\\]", unquote(path))):
        raise LlmqError("dot segments lead nowhere", "not_found")
    check_loop(exchange.request, api.gateway.instance)
    await PlainPassthrough(exchange, service, path, api.gateway, lambda: None, limit).run()


async def pass_on(api: Api, exchange: Exchange, _: str) -> None:
    """To a backend and back as it is; what names a model waits in the queue."""
    request, gateway, headers = exchange.request, api.gateway, exchange.request.headers
    check_way(request, gateway.instance)
    values, named = {}, headers.get("x-llmq-backend")
    if request.method == "POST" and "multipart/" not in headers.get("content-type", "").lower():
        limit = api.settings.server.max_body
        if re.match(rb"\s*\{", (await exchange.read_body(limit))[:KIB]):
            values = await read_values(exchange, limit)
            check_common(values)
    if values.get("model"):
        endpoint = Endpoint((request.path,), dialect_of(request.path, headers), check_common)
        ids = (exchange.id, exchange.request_id)
        call = Call(exchange, endpoint, request, exchange.caller, ids)
        priority = asked_priority({}, headers.get("x-queue-priority"))
        call.question = FormQuestion(values["model"], False, priority, request.body, NO_EDITS)
        call.blind = True
        values.clear()  # what waits keeps little memory
        await gateway.serve(call)
        return
    backends = [gateway.fleet.named(named)] if named else gateway.fleet.backends.values()
    backend = next((each for each in backends if each.usable), None)
    if backend is None:
        raise LlmqError(gateway.fleet.trouble() or "that backend is down", "backend_down")
    await Passthrough(exchange, backend, request.path, gateway, lambda: None).run()


async def delete_requests(api: Api, exchange: Exchange, _: str, _values: Facts) -> Facts:
    query = dict(parse_qsl(exchange.request.query, keep_blank_values=True))
    if query.get("state") != "waiting" or set(query) - {"state", "client"}:
        raise BadRequest("say ?state=waiting, and &client=NAME for those of one client")
    gateway, client = api.gateway, query.get("client")
    waiting = list(gateway.scheduler.waiting.values())
    found = [one for one in waiting if client is None or one.client.name == client]
    for ticket in found:
        gateway.cancel(gateway.calls[ticket.id])
    return {"cancelled": len(found)}


async def post_lease(api: Api, exchange: Exchange, _: str, values: Facts) -> Facts:
    return await grant_lease(api.gateway, exchange, values)


async def renew_lease(api: Api, _exchange: Exchange, ident: str, values: Facts) -> Facts:
    only_members(values, "ttl_s")
    seconds = read_seconds(values)
    renew(api.gateway, find_lease(api.gateway, ident), seconds)
    return {"id": ident, "expires_s": seconds}


async def end_lease(api: Api, _exchange: Exchange, ident: str, _: Facts) -> Facts:
    api.gateway.end_lease(find_lease(api.gateway, ident))
    return {"ended": ident}


async def get_usage(api: Api, exchange: Exchange, _: str) -> Facts:
    days = dict(parse_qsl(exchange.request.query)).get("days", "7")
    if not re.fullmatch("[1-9][0-9]{0,3}", days):
        raise BadRequest("days is a number above 0", param="days")
    return {"usage": await api.keeper.usage(int(days)), "kept": bool(api.gateway.store.path)}


async def post_backends(api: Api, _exchange: Exchange, _: str, values: Facts) -> Facts:
    """Add a backend, or change one that was added."""
    row = dict(values)
    name, added = str(row.pop("name", "")), api.gateway.added
    if name in api.gateway.fleet.backends.keys() - added or name in api.settings.backends:
        raise LlmqError(f"backend {name} is there already, and not by this route", "conflict")
    try:
        parse_rows("request", "backends", {name: row})
    except ConfigError as error:
        raise BadRequest(str(error)) from None
    await api.changes.store.put("backends", name, row)
    added[name] = row
    api.gateway.discovery.configure()
    api.gateway.monitor.probe_due()
    return show_backend(api.gateway.fleet.named(name))


async def delete_backend(api: Api, _exchange: Exchange, name: str, _: Facts) -> Facts:
    if api.gateway.fleet.named(name) and name not in api.gateway.added:
        cure = 'take it out of the file, or drain it: POST {"draining":true}'
        raise LlmqError(f"backend {name} was not added at run time; {cure}", "conflict")
    await api.changes.store.put("backends", name, None)
    api.gateway.added.pop(name, None)
    api.gateway.discovery.configure()
    return {"deleted": name}


async def post_backend(api: Api, _exchange: Exchange, name: str, values: Facts) -> Facts:
    only_members(values, "draining")
    draining = values.get("draining")
    if not isinstance(draining, bool):
        raise BadRequest('say {"draining":true}, or false', param="draining")
    backend = api.gateway.fleet.named(name)
    if draining and not backend.draining:
        api.gateway.fleet.shrunk = api.gateway.now()
    backend.draining = draining
    api.gateway.pump()
    return show_backend(backend)


# ==== 50. Routes ==================================================================================
# A table of rows.  404, 405, `Allow`, preflights and the README's table come from it.  Before a
# row's handler runs, one place has checked Host, Origin and method: there is no path around it.

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PREFLIGHT_SECONDS = "600"
RouteHandler = Callable[..., Awaitable[Union[Facts, None]]]


class Route(NamedTuple):
    methods: Names
    path: str  # {id} stands for one segment, {id...} for the rest
    access: Access
    right: str  # of RIGHTS, that a key must have for it; empty: it needs none
    summary: str
    handlers: Mapping[str, RouteHandler]  # by method

    @property
    def is_own(self) -> bool:
        """Whether it shows or steers llmq itself: then the right `control` is enough for it."""
        return self.path.startswith(("/llmq", "/v1/jobs", "/v1/router"))


def row(access: Access, right: str, what: str, summary: str, *handlers: RouteHandler) -> Route:
    *methods, path = what.split()
    if len(handlers) == 1:
        handlers *= len(methods)
    elif "HEAD" in methods:  # which is answered as GET is
        handlers = (handlers[0], *handlers)
    return Route(tuple(methods), path, access, right, summary, dict(zip(methods, handlers)))


def of(handler: Callable[..., Awaitable[Facts | None]]) -> RouteHandler:
    """A handler of JobRoutes as one of the API."""
    return lambda api, *rest: handler(api.jobs, *rest)


free, public = (functools.partial(row, Access.OPEN, right) for right in ("", "infer"))
owned, own = (functools.partial(row, Access.OWNER, right) for right in ("control", "infer"))
managed, local = (functools.partial(row, Access.LOCAL, right) for right in ("models", "control"))
ROUTES = (
    public(f"POST {CHAT}",
           f"OpenAI chat; this and {len((*ENDPOINTS, *SHORT_PATHS)) - 1} more wait in the queue",
           Api.enqueue),
    public(f"POST {COMPLETIONS}", "OpenAI completion", Api.enqueue),
    public(f"POST {EMBEDDINGS}", "OpenAI embeddings", Api.enqueue),
    public(f"POST {RESPONSES}", "OpenAI response", Api.enqueue),
    public(f"POST {RERANK}", "reranking, where a backend can", Api.enqueue),
    public(f"POST {TRANSCRIPTIONS}", "speech to text, where a backend can", Api.enqueue),
    public(f"POST {MESSAGES}", "Anthropic message", Api.enqueue),
    public(f"POST {OLLAMA_CHAT}", "Ollama chat", Api.enqueue),
    public(f"POST {OLLAMA_GENERATE}", "Ollama completion", Api.enqueue),
    public(f"POST {OLLAMA_EMBED}", "Ollama embeddings", Api.enqueue),
    public(f"POST {OLLAMA_EMBEDDINGS}", "the older form", Api.enqueue),
    *[public(f"POST {path}", f"the same as `{long}`", Api.enqueue)
      for path, long in SHORT_PATHS.items()],
    public(f"POST {COUNT_TOKENS}", "a message's tokens, counted or estimated", post_count),
    public("GET HEAD /v1/models", "the models of all backends", Api.get_models),
    public("GET HEAD /models", "the same", Api.get_models),
    public("GET HEAD /v1/models/{id...}", "one model", Api.get_model),
    public("GET HEAD /api/tags", "the models, as Ollama lists them", Api.get_rows),
    public("GET /api/ps", "the loaded ones", Api.get_rows),
    public("POST /api/show", "one model, as its Ollama shows it", Api.post_show),
    managed("POST /api/pull", "to the first Ollama, straight through", Api.manage),
    managed("POST /api/create", "the same", Api.manage),
    managed("GET HEAD POST /api/blobs/{digest}", "the same, a body of any size", Api.manage),
    managed("POST /api/push", "to the Ollama that has the model", Api.manage),
    managed("POST /api/copy", "the same", Api.manage),
    managed("DELETE /api/delete", "the same", Api.manage),
    managed("POST /api/me", "the account that the first Ollama is signed in with", Api.manage),
    managed("POST /api/signout", "ends that", Api.manage),
    public("GET /api/status", "what the first Ollama says of its cloud", Api.manage),
    free("GET HEAD /health", "`ok` while serving; `?ready=1`: 503 while no runner is up",
         Api.get_health),
    free("GET HEAD /",
         "`Ollama is running`, as its clients expect; to a browser the page", Api.get_root),
    row(Access.OPEN, "control", "GET HEAD /llmq", "the page", Api.get_page),
    public("GET HEAD /api/version",
           "a version for clients of Ollama, and llmq's own", Api.get_version),
    owned("GET HEAD /llmq/status",
          "the snapshot; `?all=1`: with all that wait, `?find=WORD`: those that have it",
          Api.get_status),
    owned("GET /llmq/events", "the snapshot on every change, server-sent events", Api.get_events),
    owned("GET HEAD /metrics", "figures for Prometheus", Api.get_metrics),
    owned("POST /llmq/mode", '`{"mode":"open"}`, `"priority"` or `"paused"`', Api.post_mode),
    own("GET HEAD /v1/jobs", "your jobs, the latest first; `?all=1`: everybody's",
        of(JobRoutes.list_jobs)),
    own("GET HEAD DELETE /v1/jobs/{id}", "one job; end it",
        of(JobRoutes.get_job), of(JobRoutes.delete_job)),
    own("GET HEAD /v1/jobs/{id}/result", "what came of it; 202 while nothing has",
        of(JobRoutes.get_result)),
    own("GET HEAD POST /v1/files", "your files; keep one, for a batch",
        of(JobRoutes.list_files), of(JobRoutes.post_file)),
    own("GET HEAD DELETE /v1/files/{id}", "one file; forget it",
        of(JobRoutes.get_file), of(JobRoutes.delete_file)),
    own("GET /v1/files/{id}/content", "what is in it", of(JobRoutes.get_content)),
    own("GET HEAD POST /v1/batches", "your batches; make one of a file's lines",
        of(JobRoutes.list_batches), of(JobRoutes.post_batch)),
    own("GET HEAD /v1/batches/{id}", "one batch", of(JobRoutes.get_batch)),
    own("POST /v1/batches/{id}/cancel", "end it", of(JobRoutes.cancel_batch)),
    owned("GET HEAD /v1/router/status", "what `auto` goes by: routes, queues, what is loaded",
          get_router),
    owned("GET HEAD /v1/router/models", "the models: sizes, purposes, what they can, how loaded",
          get_router),
    owned("GET HEAD /v1/router/gpu", "graphics cards and the memory of each device", get_router),
    owned("GET HEAD /llmq/history",
          "the last day by minutes: waiting and started by class, tokens", get_history),
    owned("GET HEAD /llmq/usage", "what was used, by day, client and model; `?days=30`", get_usage),
    row(Access.OWNER, "models", "POST /llmq/models",
        '`{"action":"load","model":NAME}`, `"unload"`; `"reset_context"`: forget the shared one',
          Api.post_model),
    local("POST /llmq/backends",
          '`{"name":NAME,"url":URL}` and what else `[backends.NAME]` has: add one', post_backends),
    owned("DELETE POST /llmq/backends/{name}",
          'take out one that was added; `{"draining":true}`: it gets nothing new, until `false`',
          delete_backend, post_backend),
    owned("POST /llmq/clients/{id...}",
          "change its `class`, `weight`, `boost`, `blocked`, `max_concurrent`, `max_waiting`; "
          "`null`: as in the file", post_client),
    owned("POST /llmq/ips", '`{"ip":ADDRESS,"blocked":true}`: refuse who comes from there',
          post_ip),
    owned("POST /llmq/reload", "`{}`: read the configuration file again", Api.post_reload),
    owned("DELETE /llmq/requests",
          "`?state=waiting`, and `&client=NAME`: cancel what waits", delete_requests),
    own("DELETE POST /llmq/requests/{id}",
        'cancel it, or with `{"priority":"high"}` change its class while it waits',
          Api.delete_request, Api.post_request),
    owned("POST /llmq/leases",
          '`{"device":NAME,"class":"low","ttl_s":60}`: the whole device, when its turn has come',
          post_lease),
    owned("DELETE POST /llmq/leases/{id}",
          'end it, or with `{"ttl_s":60}` renew it', end_lease, renew_lease),
)  # fmt: skip
OTHER_ROUTE = row(
    Access.OWNER, "models", "GET HEAD POST /{path...}", "with --allow-all-routes: as it is", pass_on
)
EXACT_ROUTES = {route.path: route for route in ROUTES if "{" not in route.path}
PREFIX_ROUTES = [(route.path.partition("{")[0], route) for route in ROUTES if "{" in route.path]


def match_route(request: Request) -> tuple[Route | None, str]:
    """The row of a path, and what fills its {...}.

    Paths match exactly, once decoded, and go by that spelling from here on; dot segments and empty
    ones match nothing; a path without a row is given back.  A model's name may be a path itself,
    with its first slash encoded.
    """
    path = request.path
    if path in EXACT_ROUTES:
        request.path = EXACT_ROUTES[path].path  # one text for all that wait
        return EXACT_ROUTES[path], ""
    try:
        decoded = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        return None, ""
    dotted = any(segment in (".", "..") for segment in decoded.split("/"))
    dotted = dotted or "" in path.split("/")[1:]
    if dotted or "%2e" in path.lower() or not decoded.isprintable():
        return None, ""
    route, rest = EXACT_ROUTES.get(decoded), ""
    for prefix, longer in PREFIX_ROUTES:
        suffix = longer.path.rpartition("}")[2]
        fitting = decoded.startswith(prefix) and decoded.endswith(suffix)
        tail = decoded[len(prefix) : len(decoded) - len(suffix)] if fitting else ""
        if tail and (longer.path.endswith("...}") or "/" not in tail):
            route, rest = longer, tail
            break
    if route is None:
        own_or_odd = decoded.startswith("/llmq/") or "" in decoded.split("/")[1:]
        return None, "" if own_or_odd else decoded
    request.path = decoded
    return route, rest


class Door:
    """Where every request comes in: checked before its handler runs, told what went wrong."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self._numbers = count(1)

    async def handle(self, exchange: Exchange, service: Backend | None = None) -> None:
        """Answer one request, with what its handler returns or with what went wrong.

        `service` is another one, that a port is for.
        """
        given = exchange.request.headers.get("x-request-id")
        exchange.id = f"{self.api.gateway.instance[:6]}-{next(self._numbers)}"
        exchange.request_id = given if given and REQUEST_ID.fullmatch(given) else exchange.id
        try:
            handler: RouteHandler
            if service is not None:
                handler, arguments = pass_to, (service,)
            else:
                handler, arguments = await self.enter(exchange)
            facts = await handler(self.api, exchange, *arguments)
            if facts is not None:
                exchange.respond(200, render_json(facts))
        except LlmqError as error:
            if not isinstance(error, ClientLeft):
                self.api.gateway.metrics.add("llmq_rejected_total", error.code)
            if isinstance(error, (ClientLeft, RequestTimeout)) or exchange.started:
                raise
            self.send_error(exchange, error)
            error.__traceback__ = error.__context__ = None  # the frames of both hold the body
        except Exception:
            log.exception("request failed")
            if exchange.started:
                exchange.abort()
                return
            exchange.keep_alive = False
            self.send_error(exchange, LlmqError("llmq failed; its log says how"))

    def send_error(self, exchange: Exchange, error: LlmqError) -> None:
        request = exchange.request
        body = dialect_of(request.path, request.headers).render_error(error, exchange.request_id)
        exchange.respond(error.status, body, headers=error_headers(error))

    async def enter(self, exchange: Exchange) -> tuple[RouteHandler, tuple[Any, ...]]:
        """Everything that is checked before a handler runs; it, and what it is given."""
        request, headers = exchange.request, exchange.request.headers
        trusted, origin = self.api.settings.server.cors_origins, headers.get("origin")
        base = self.api.settings.server.base_path
        inside = strip_base(exchange, base)
        check_host(exchange, self.api.names)
        exchange.caller = await find_caller(exchange, self.api.gateway)
        if not inside:
            raise LlmqError(f"here every path begins with {base}/", "not_found")
        route, argument = match_route(request)
        if argument and route is None and self.api.settings.server.allow_all_routes:
            route = OTHER_ROUTE
        account = exchange.caller.account
        granted = grant(origin, route.access if route else Access.OPEN, trusted)
        waits = route is not None and route.handlers.get(request.method) is Api.enqueue
        if not waits:  # else its answer tells its class
            granted += tuple(account.class_line)
        exchange.headers, now = granted, self.api.gateway.now()
        if account.is_metered:
            meter(exchange, now)
        if request.method == "OPTIONS":
            return self.preflight, (argument,)
        own = route is not None and route.is_own
        check_right(exchange, route.right if route else "infer", self.api.gateway, own=own)
        if route is None:
            raise LlmqError(f"there is no {printable(request.path)}", "not_found")
        check_method(exchange, route.methods, route.path)
        check_origin(exchange, route.access)
        check_blocked(exchange, route.path, self.api.gateway.clients)
        if exchange.connection.above_cap:
            exchange.keep_alive = False
            if route.path != "/health":
                raise LlmqError("too many connections", "overloaded")
        if account.is_metered and (waits or route is OTHER_ROUTE):
            exchange.headers = granted
            meter(exchange, now, counts=True)
        handler = route.handlers[request.method]
        changes = route.path.startswith("/llmq") and request.method in ("POST", "DELETE")
        arguments = (argument, await read_control(exchange)) if changes else (argument,)
        return handler, arguments

    async def preflight(self, _api: Api, exchange: Exchange, _: str) -> None:
        """Grant the method and the header names asked for, by name: `*` does not cover them all."""
        headers, route = exchange.request.headers, match_route(exchange.request)[0]
        own = route.methods if route else ()
        methods = ", ".join(dict.fromkeys(("GET", "POST", *own, "OPTIONS")))
        granted = [("Allow", methods)]
        if "origin" in headers and "access-control-request-method" in headers:
            if "Access-Control-Allow-Origin" not in dict(exchange.headers):
                raise LlmqError("pages from there may not use this route", "forbidden_origin")
            asked = headers.get("access-control-request-headers", "").split(",")
            names = [name.strip() for name in asked if re.fullmatch(TOKEN, name.strip())]
            granted.append(("Access-Control-Allow-Methods", methods))
            granted.append(("Access-Control-Allow-Headers", ", ".join(names) or "content-type"))
            granted.append(("Access-Control-Max-Age", PREFLIGHT_SECONDS))
            if headers.get("access-control-request-private-network") == "true":
                granted.append(("Access-Control-Allow-Private-Network", "true"))
        exchange.respond(204, b"", headers=granted)


# ==== 51. Demo ====================================================================================
# A runner that only echoes, for `--demo`: llmq's own HTTP server on a second port, spoken to like
# any other backend, so that what is tried with it is the real thing.

DEMO_MODEL = "echo"
DEMO_CLIENT = "demo"  # the key of those who live in the simulated home
DEMO_NUMBERS = count(1)  # of its answers
DEMO_WORD_SECONDS = 0.02
BUSY_PATIENCE = 600.0  # seconds that a simulated client waits
BUSY_WORDS, MOST_BUSY_WORDS = 50, 2000  # of an answer that nobody limits, and at most


def demo_words(question: Mapping[str, Any]) -> tuple[list[str], str]:
    """The words that the demo answers with, and its finish reason."""
    content = question["messages"][-1].get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    words = re.findall(r"\S+\s*|\s+", content if isinstance(content, str) else "")
    most = question.get("max_tokens", question.get("max_completion_tokens"))
    cut = isinstance(most, int) and 0 <= most < len(words)
    return (words[:most], "length") if cut else (words, "stop")


async def answer_demo(exchange: Exchange) -> None:
    """Answer with the last message, word by word."""
    request = exchange.request
    if request.path == "/v1/models":
        exchange.respond(200, render_json({"object": "list", "data": [demo_entry(DEMO_MODEL)]}))
    elif request.path != CHAT or request.method != "POST":
        error = LlmqError("the demo has no such route", "not_found")
        exchange.respond(404, OPENAI.render_error(error))
    else:
        question = json.loads(await exchange.read_body(64 * MIB))
        await answer_words(exchange, question, DEMO_MODEL, *demo_words(question), DEMO_WORD_SECONDS)


def demo_entry(name: str) -> Facts:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llmq"}


async def answer_words(
    exchange: Exchange,
    question: Mapping[str, Any],
    model: str,
    words: list[str],
    reason: str,
    seconds: float,
) -> None:
    """Answer a chat with these words, in a stream one after each so many seconds."""
    asked, told = estimate_tokens(question), len(words)
    usage = {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
    ident = f"chatcmpl-demo-{next(DEMO_NUMBERS)}"
    common = {"id": ident, "created": int(time.time()), "model": model}

    def event(delta: dict[str, str], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        facts = {**common, "object": "chat.completion.chunk", "choices": [choice], **more}
        return b"data: " + render_json(facts) + b"\n\n"

    if not question.get("stream"):
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        answer = {**common, "object": "chat.completion", "choices": [choice], "usage": usage}
        return exchange.respond(200, render_json(answer))
    exchange.start(200, "text/event-stream")
    exchange.send(event({"role": "assistant", "content": ""}))
    for word in words:
        await asyncio.sleep(seconds)
        if exchange.gone:
            return None
        exchange.send(event({"content": word}))
    return exchange.finish(event({}, reason, usage=usage) + b"data: [DONE]\n\n")


# ---- with --busy: two boxes of a home, and who uses them


class DemoModel(NamedTuple):
    """A model on a simulated box."""

    name: str
    size: float  # GiB
    load: float  # seconds
    rate: float  # tokens per second


BUSY_BOXES = {
    "tower": (DemoModel("qwen3:32b", 20, 5, 24), DemoModel("qwen3:8b", 5, 2, 60)),
    "laptop": (DemoModel("qwen3:8b", 5, 3, 20), DemoModel("gemma3:4b", 3, 2, 30)),
}


class BusyClient(NamedTuple):
    """Somebody who asks again and again."""

    name: str
    model: str
    priority: str
    tokens: int  # of an answer, about
    pause: float  # seconds after an answer, about
    at_once: int = 1
    leaves: float = 0.0  # of its requests, so many it gives up


BUSY_CLIENTS = (
    BusyClient("alice", "qwen3:8b", "high", 40, 8),
    BusyClient("coding-agent", "qwen3:32b", "normal", 120, 4),
    BusyClient("bob", "gemma3:4b", "normal", 60, 6, leaves=0.2),
    BusyClient("paperless", "qwen3:8b", "low", 80, 2, at_once=2),
    BusyClient("nightly-report", "qwen3:32b", "low", 150, 30, at_once=4),
)


def chance(*seed: object) -> random.Random:
    """What is left to chance, and is the same each time for one seed."""
    return random.Random(" ".join(map(str, seed)))  # noqa: S311 - nothing is kept secret by it


class BusyBox:
    """A simulated Ollama, which loads one model at a time and takes its time for it."""

    def __init__(self, models: Sequence[DemoModel], dice: random.Random) -> None:
        self.models = {model.name: model for model in models}
        self.loaded = ""
        self.dice = dice

    async def answer(self, exchange: Exchange) -> None:
        path, rows = exchange.request.path, [self.row(one) for one in self.models.values()]
        told: dict[str, Facts] = {
            "/api/version": {"version": OLLAMA_VERSION},
            "/v1/models": {"object": "list", "data": [demo_entry(name) for name in self.models]},
            "/api/tags": {"models": rows},
            "/api/ps": {"models": [row for row in rows if row["name"] == self.loaded]},
            "/api/show": {"capabilities": ["completion", "tools"]},
        }
        if path not in (CHAT, OLLAMA_GENERATE):
            if path in told:
                exchange.respond(200, render_json(told[path]))
            else:  # so that llmq asks where it can be answered
                exchange.respond(404, b"404 page not found", "text/plain")
            return
        question = json.loads(await exchange.read_body(64 * MIB))
        model = self.models.get(question.get("model"))
        if model is None:
            error = LlmqError("there is no such model", "model_not_found")
            exchange.respond(404, OPENAI.render_error(error))
        elif question.get("keep_alive") == 0:
            self.loaded = ""
            exchange.respond(200, render_json({"model": model.name, "done": True}))
        else:
            await self.load(model)
            await self.chat(exchange, question, model)

    def row(self, model: DemoModel) -> Facts:
        size = int(model.size * GIB)
        facts = {"name": model.name, "model": model.name, "size": size, "size_vram": size}
        return {**facts, "digest": hashlib.sha256(model.name.encode()).hexdigest(), "details": {}}

    async def load(self, model: DemoModel) -> None:
        if self.loaded != model.name:
            self.loaded = ""
            await asyncio.sleep(model.load)
            self.loaded = model.name

    async def chat(self, exchange: Exchange, question: Facts, model: DemoModel) -> None:
        if exchange.request.path == OLLAMA_GENERATE:  # without a prompt no more than a load
            words = "a word" if question.get("prompt") else ""
            told = {"model": model.name, "response": words, "done": True, "done_reason": "stop"}
            exchange.respond(200, render_json(told) + b"\n", "application/x-ndjson")
            return
        asked = question.get("max_tokens") or question.get("max_completion_tokens")
        most = min(max(1, whole_number(asked) or BUSY_WORDS), MOST_BUSY_WORDS)
        many = max(1, round(most * self.dice.uniform(0.6, 1.4)))
        await answer_words(exchange, question, model.name, ["word "] * many, "stop", 1 / model.rate)


async def ask_busily(
    client: BusyClient, url: str, dice: random.Random, key: str = "", tls: Any = None
) -> None:
    """Ask llmq what this one asks, for ever."""
    llmq = Backend("llmq", BackendSettings(url=url), Device("", 1))
    lines = f"X-User-ID: {client.name}\r\n" + (f"X-API-Key: {key}\r\n" if key else "")
    more = {"tls": tls} if tls else {}
    while True:
        await asyncio.sleep(dice.expovariate(1 / client.pause))
        asked = {"model": client.model, "priority": client.priority, "stream": True}
        message = {"role": "user", "content": "something to think about"}
        body = render_json({**asked, "max_tokens": client.tokens, "messages": [message]})
        seconds = dice.uniform(2, 8) if dice.random() < client.leaves else NEVER
        late = BackendTimeout("it was not waited for")
        with contextlib.suppress(LlmqError, OSError):
            asking = asyncio.ensure_future(fetch(llmq, CHAT, body, lines.encode(), **more))
            await within(min(seconds, BUSY_PATIENCE), asking, late)


def demo_runners(seed: int | None) -> dict[str, tuple[Handler, str]]:
    """The simulated runners by name, and their kinds: with a seed a home's, else an echo."""
    if seed is None:
        return {"demo": (answer_demo, "openai")}
    boxes = BUSY_BOXES.items()
    return {name: (BusyBox(models, chance(seed, name)).answer, "ollama") for name, models in boxes}


def start_busy_clients(seed: int, url: str, key: str, tls: Any) -> list[asyncio.Future[None]]:
    """Let those ask who use the simulated home, with this key if llmq wants one."""
    return [
        asyncio.ensure_future(ask_busily(one, url, chance(seed, one.name, number), key, tls))
        for one in BUSY_CLIENTS
        for number in range(one.at_once)
    ]


# ==== 52. Terminal view ===========================================================================
# `llmq top`: a client like any other, which asks for the snapshot and sends the orders that keys
# stand for.  `View` is pure: snapshot and keys in, lines and orders out.  A thread asks, so that a
# slow llmq holds up no key.  Plain ANSI; consoles without termios get the picture once, as text.

Row = Mapping[str, Any]
Line = tuple[str, str]  # what it tells of, which makes its colour, and its text
Told = tuple[str, list[str]]  # the same of a row, and its cells
Order = tuple[str, str, Union[dict[str, Any], None]]  # method, path, JSON to send
Ask = Callable[[Order], Any]  # raises StartError when nobody answers, or not as wished
STATUS: Order = ("GET", "/llmq/status", None)
EVERYTHING: Order = ("GET", "/llmq/status?all=1", None)
ODD_JSON = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
LOST_SECONDS = 2.0  # without an answer, and what is shown is old
KEY_SECONDS = 0.1  # to wait for a key before the picture is drawn anew
COLOURS = {  # what is not here is bad
    "": "", "up": "", "normal": "", "done": "", "running": "32", "high": "33", "loading": "33",
    "draining": "33", "dim": "2", "unknown": "2", "low": "2", "client_left": "2", "cancelled": "2",
    "bad": "31", "title": "1", "head": "30;42", "bar": "30;46", "alarm": "30;43", "lost": "30;43",
}  # fmt: skip
NO_COLOURS = {  # with NO_COLOR
    "dim": "2", "bad": "1", "title": "1", "head": "4", "bar": "7", "alarm": "7", "lost": "7",
}  # fmt: skip
KEY = re.compile(r"\x1b[\[O]([0-9;]*[A-Za-z~])|(.)", re.DOTALL)
KEY_NAMES = {  # by what terminals send behind ESC [ and ESC O
    "A": "k", "B": "j", "5~": "page up", "6~": "page down", "H": "g", "1~": "g", "F": "G",
    "4~": "G", "3~": "x", "20~": "x", "P": "?", "17~": ">", "18~": "+", "19~": "-", "21~": "q",
    "C": "l", "D": "h", "Z": "h",
}  # fmt: skip
STEPS = {"k": -1, "j": 1, "page up": -10, "page down": 10, "g": -9999, "G": 9999}
SIDES = {"h": -1, "l": 1, "\t": 1}  # to another panel
MODES = {"p": "paused", "m": "priority"}
LOADS = {"L": "load", "U": "unload"}
ASKED = {  # what cannot be undone
    ("Requests", "x"): "cancel {id} of {client}?",
    ("Users", "x"): "block {name}, and end what waits and runs of it?",
    ("Users", "X"): "block {address}, and end what waits and runs from there?",
}
KEY_HELP = """
  Tab, h l        the other panels; also left, right and Shift-Tab
  up down, k j    select; also PgUp, PgDn, Home, End
  p               pause, so that nothing starts; again to go on; not in Users
  m               priority mode, in which only high starts; again to leave it
  ?, F1           this help
  q, F10          leave; llmq goes on

  x, F9, Del      cancel it
  + -, F7 F8      raise or lower its class: low, normal, high
  < >, F6         sort by another column

  Space, Enter    show its models, or no longer
  L, U            load or unload the selected model
  d               drain it: nothing new starts there; again to resume

  p, b            VIP (class high), boost (every second start); again: no longer
  x, X, u         block it; block the address it asks from; unblock both
  ★ VIP  ⚡ boosted  ✖ blocked  ● waits or runs  ○ idle

  u               unblock it"""  # first of all panels, then of each
# Titles, and cells: to the right if negative, 0: as it needs of what the others leave.
BACKENDS = {"BACKEND": 0, "STATE": 8, "BUSY": 16, "DEVICE": 0, "PING": -6, " LOADED, URL": 0}
QUEUE = {"#": -4, "CLASS": 6, "CLIENT": 0, "MODEL": 0, "WAITED": -7, "ETA": -10, " WHERE, WHY": 0}
MODELS = {"MODEL": 0, "BACKEND": 0, "LOADED": 8, " CONTEXT": 0}
CARDS = {"CARD": 0, "MEMORY": -12, "USED": -12, "FREE": -12, " BUSY": 0}
MEMORIES = {"DEVICE": 0, "MEMORY": -12, "FREE": -12, " RESERVE": 0}
JOBS = {"JOB": 0, "STATUS": 9, "CLASS": 6, "CLIENT": 0, "MODEL": 0, "AGE": -7, " ERROR": 0}
USAGE_TABLE = {"DAY": 10, "CLIENT": 0, "MODEL": 0, "REQUESTS": -8, "HITS": -6, "TOKENS IN": -12,
               "OUT": -10, " SECONDS": 0}  # fmt: skip
ENDED = {"ENDED": 15, "CLIENT": 0, "MODEL": 0, "WAITED": -7, "FIRST": -7, "TOTAL": -7,
         "TOKENS": -6, "TOK/S": 5}  # fmt: skip
USERS = {"": 5, "USER": 0, "CLASS": 6, "SHARE": -5, "WAITS": -5, "RUNS": -4, "DONE": -5,
         "FAILED": -6, "LEFT": -4, " ADDRESS": 0}  # fmt: skip
SORTS = {"#": "", "CLIENT": "client", "MODEL": "model", "WAITED": "waited_s"}  # else as llmq tells


def brief(seconds: float | None) -> str:
    """A duration in at most seven characters."""
    if seconds is None or seconds < 10:
        return "-" if seconds is None else f"{max(0.0, seconds):.1f}s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 60:
        return f"{minutes}m {int(seconds) % 60:02}s" if minutes else f"{int(seconds)}s"
    return f"{hours}h {minutes % 60:02}m" if hours < 48 else f"{hours // 24}d {hours % 24:02}h"


def cells(text: str) -> int:
    """The columns that a terminal takes for it."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def fit(text: str, width: int) -> str:
    """The text in so many cells, at their right if negative; nothing in it moves the cursor."""
    room, text = abs(width), printable(text, 1000)
    if not text.isascii():  # terminals do not agree on marks that combine
        text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    if cells(text) > room:
        while text and cells(text) >= room:
            text = text[:-1]
        text += "…" * (room > 0)
    space = " " * (room - cells(text))
    return space + text if width < 0 else text + space


def backend_row(backend: Row) -> Told:
    """A backend, or one of its models."""
    if model := backend.get("model"):
        loaded = model in backend["loaded"]
        return "up" if loaded else "dim", [f"  {model}", "loaded" if loaded else ""]
    state, busy, latency = backend["state"], backend["busy"], backend["latency_ms"]
    meter = "|" * min(8, -(-8 * busy // max(1, backend["slots"])))
    shares = [f"[{meter:8}] {busy}/{backend['slots']}", backend["device"]]
    ping = "-" if latency is None else f"{latency:.0f}ms"
    split = backend.get("gpu_pct") or {}  # an older llmq does not tell
    shown = [f"{one} ({split[one]}% on GPU)" if one in split else one for one in backend["loaded"]]
    words = backend["error"] or ", ".join(shown)
    last = f" {words}  {backend['url']}" if words else f" {backend['url']}"
    return state, [backend["name"], state, *shares, ping, last]


def client_row(client: Row) -> Told:
    vip, boost, blocked = client["class"] == "high", client["boost"], client["blocked"]
    kind = "blocked" if blocked else "high" if vip else "running" if client["running"] else ""
    works = "●" if client["waiting"] + client["running"] > 0 else "○"
    marks = f"{works}{'★' * vip}{'⚡' * boost}{'✖' * blocked}"
    names = [marks, client["name"], client["class"] or "-", f"{client['share']:.0f}%"]
    counts = [str(client[name]) for name in ("waiting", "running", "done", "failed", "left")]
    return kind, [*names, *counts, f" {client['address']}"]


def change_client(name: str, change: Facts) -> Order:
    if name.startswith("ip:") and "blocked" in change:
        return "POST", "/llmq/ips", {"ip": name[3:], **change}
    return "POST", f"/llmq/clients/{quote(name, safe='')}", change


def request_row(request: Row) -> Told:
    kind, number, where = request["class"], str(request["position"]), request["reason"]
    when = "" if request["eta_s"] is None else f"~ {brief(request['eta_s'])}"
    if request["state"] != "waiting":
        kind, number, when = "running", "run", f"ran {brief(request['running_s'])}"
        rate, tokens = request.get("tokens_per_s") or 0, request["tokens"]
        where = f"{request['backend']}{f', {rate:.0f}/s, {tokens} tokens' if tokens else ''}"
    names = [request["class"], request["client"], request["model"], brief(request["waited_s"])]
    return kind, [number, *names, when, f" {where}"]


def ended_row(record: Row) -> Told:
    """How a request ended; what failed has its sentence in place of figures."""
    outcome, error, took = record["outcome"], record.get("error"), brief(record["total_s"])
    names = [str(record[name]) for name in ("outcome", "client", "model")]
    if error and outcome not in CANCELS:
        return outcome, [*names, f" after {took}: {error}"]
    times = [brief(record[name]) for name in ("wait_s", "first_s", "total_s")]
    rate = f"{record['tokens_per_s']:.0f}" if record["tokens_per_s"] else "-"
    return outcome, [*names, *times, str(record["tokens"] or "-"), f"{rate:>5}"]


def share(needs: Sequence[int], room: int) -> list[int]:
    """The cells that each gets: what it needs, but where they are too few no more than others."""
    given = list(needs)
    for done, place in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        given[place] = min(needs[place], max(0, room) // (len(needs) - done))
        room -= given[place]
    return given


def table(columns: Mapping[str, int], told: Iterable[Told], width: int, empty: str) -> list[Line]:
    """Titles and rows; the last cell of each is as long as it is."""
    sizes, rows = list(columns.values()), [("head", list(columns)), *told]
    free = [place for place, size in enumerate(sizes) if not size]
    own = [row if len(row) == len(columns) else row[:-1] for _, row in rows]  # or its last spans
    needs = [max(cells(row[place][:1000]) for row in own if row[place:]) for place in free]
    left = width - sum(1 + abs(size) for size in sizes)
    for place, room in zip(free, share(needs, left)):
        sizes[place] = room
    lines = [("", "")]
    for kind, (*texts, last) in rows:
        text = "".join(f" {fit(text, size)}" for text, size in zip(texts, sizes))
        lines.append((kind, f"{text} {last}"))
    return lines if lines[2:] else [*lines, ("dim", f" {empty}")]


def window(
    rows: Sequence[Row], most: int, index: int = 0, beyond: int = 0
) -> tuple[Sequence[Row], list[Line]]:
    """As many rows around the index as there is room for, and a line of how many more there are."""
    most = max(1, most - (len(rows) > most or beyond > 0))
    first = max(0, min(index - most // 2, len(rows) - most))
    more = {"below": max(0, len(rows) - first - most) + beyond, "above": first}
    words = ", ".join(f"{number:,} more {where}" for where, number in more.items() if number)
    return rows[first : first + most], [("dim", f" {words}")] * bool(words)


PANELS = {  # what their keys do, columns, what makes cells, what is said where there is none
    "Requests": ("x Cancel  + - Class  p Pause  m Priority  < > Sort", QUEUE, request_row,
                 "nobody waits; for clients: OPENAI_BASE_URL={}/v1"),
    "Backends": ("Space Models  L Load  U Unload  d Drain, resume", BACKENDS, backend_row, "none"),
    "Users": ("p VIP  b Boost  x Block  X Block address  u Unblock", USERS, client_row, "nobody"),
    "Blocked": ("u Unblock", {"BLOCKED": 0}, lambda row: ("", [row["name"]]), "nobody"),
}  # fmt: skip


class View:
    def __init__(self, url: str, styles: Mapping[str, str]) -> None:
        self.url, self.styles = url, styles
        self.snapshot: Row = {}
        self.panel, self.rows = "Requests", list[Row]()  # each has an id
        self.index, self.picked = 0, ""  # of the selected row: its place, its id
        self.opened: set[str] = set()  # backends whose models are shown
        self.sort, self.note = "#", ""
        self.help = self.over = self.old = False  # old: what is shown, for llmq does not answer
        self.asking: tuple[str, list[Order]] | None = None  # what is done if the answer is yes

    def update(self, snapshot: Row) -> None:
        """Take in what llmq says now; the selection stays with its row."""
        self.snapshot, by = snapshot, SORTS[self.sort]
        if self.panel == "Requests":
            rows, longest_first = snapshot["requests"], by == "waited_s"
            self.rows = sorted(rows, key=lambda row: row.get(by, 0), reverse=longest_first)
        elif self.panel == "Backends":
            self.rows = [
                {**one, "model": model, "id": f"{one['name']}\n{model}"}
                for one in snapshot["backends"]
                for model in ("", *one["models"])
                if not model or one["name"] in self.opened
            ]
        elif self.panel == "Users":
            rows = sorted(snapshot["clients"], key=lambda row: -row["share"])
            self.rows = [{"id": row["name"], **row} for row in rows]
        else:
            self.rows = [{"id": name, "name": name} for name in snapshot["blocked"]]
        places = {row["id"]: place for place, row in enumerate(self.rows)}
        self.select(places.get(self.picked, self.index))

    def select(self, index: int) -> None:
        self.index = max(0, min(index, len(self.rows) - 1))
        self.picked = self.rows[self.index]["id"] if self.rows else ""

    def press(self, key: str) -> list[Order]:
        if self.asking:
            orders, self.asking = self.asking[1], None
            return orders if key in ("y", "Y") else []
        self.note, self.help, self.over = "", key == "?" and not self.help, key == "q"
        if key in MODES and (key, self.panel) != ("p", "Users"):
            mode = "open" if self.snapshot["mode"] == MODES[key] else MODES[key]
            return [("POST", "/llmq/mode", {"mode": mode})]
        if key in ("<", ">"):
            place = list(SORTS).index(self.sort) + (1 if key == ">" else -1)
            self.sort = list(SORTS)[place % len(SORTS)]
        if key in SIDES:
            place = list(PANELS).index(self.panel) + SIDES[key]
            self.panel, self.picked, self.index = list(PANELS)[place % len(PANELS)], "", 0
            self.update(self.snapshot)
        self.select(self.index + STEPS.get(key, 0))
        return self.press_on(self.rows[self.index], key) if self.rows else []

    def press_on(self, row: Row, key: str) -> list[Order]:
        """What a key does to the selected row; what cannot be undone is asked about."""
        if self.panel == "Backends" and key in (" ", "\n", "\r"):
            self.opened, self.picked = self.opened ^ {row["name"]}, f"{row['name']}\n"
            self.update(self.snapshot)
        about = {"Requests": self.of_request, "Backends": self.of_backend}
        orders = about.get(self.panel, self.of_client)(row, key)
        if orders and (self.panel, key) in ASKED:
            self.asking, orders = (ASKED[self.panel, key].format_map(row), orders), []
        return orders

    def of_request(self, request: Row, key: str) -> list[Order]:
        path, classes = f"/llmq/requests/{quote(str(request['id']))}", list(PRIORITY_WORDS)
        if key == "x":
            return [("DELETE", path, None)]
        if key not in ("+", "=", "-") or request["class"] not in classes:
            return []
        place = classes.index(request["class"]) + (1 if key == "-" else -1)
        return [("POST", path, {"priority": classes[max(0, min(place, len(classes) - 1))]})]

    def of_backend(self, row: Row, key: str) -> list[Order]:
        name, model = row["name"], row["model"]
        if key == "d":
            change = {"draining": row["state"] != "draining"}
            return [("POST", f"/llmq/backends/{quote(name, safe='')}", change)]
        load = {"action": LOADS.get(key), "model": model, "backend": name}
        return [("POST", "/llmq/models", load)] if key in LOADS and model else []

    def of_client(self, row: Row, key: str) -> list[Order]:
        names, refused = (row["name"], f"ip:{row.get('address')}"), self.snapshot["blocked"]
        if key == "u":
            return [change_client(one, {"blocked": False}) for one in names if one in refused]
        if key not in ("p", "b", "x", "X") or self.panel == "Blocked":
            return []
        vip = {"class": None if row["class"] == "high" else "high"}
        changes: dict[str, Facts] = {"p": vip, "b": {"boost": not row["boost"]}}
        return [change_client(names[key == "X"], changes.get(key, {"blocked": True}))]

    # ---- the picture

    def lines(self, width: int, height: int, trouble: str = "") -> list[str]:
        panels = "  ".join(f"[{one}]" if one == self.panel else one for one in PANELS)
        lines = self.head(width, trouble, f"{panels}   ")
        if self.help:
            parts = KEY_HELP.split("\n\n")
            text = f"{parts[0]}\n\n{parts[1 + list(PANELS).index(self.panel)]}"
            lines += [("", line) for line in text.split("\n")]
        else:
            lines += self.tables(width, height - len(lines) - 1)
        foot = self.note or f"? Help  Tab Panel  {PANELS[self.panel][0]}  q Quit"
        foot = f"{self.asking[0]}  y: yes, any other key: no" if self.asking else foot
        lines = [*lines, *[("", "")] * height][: height - 1]
        return [self.paint(*line, width) for line in (*lines, ("bar", f" {foot}"))]

    def head(self, width: int, trouble: str = "", panels: str = "") -> list[Line]:
        now, total, waits = self.snapshot, self.snapshot["requests_total"], self.snapshot["queue"]
        done, left, error = total.get("done", 0), total.get("client_left", 0), now["config_error"]
        mode = "stopping" if now.get("draining") else now["mode"]
        title = f" {panels}llmq {now['version']}  {self.url}"
        figures = (
            f" {mode}  waiting {waits['waiting']}  running {waits['running']}  done {done}  "
            f"failed {sum(total.values()) - done - left}  left {left}  "
            f"oldest {brief(waits['oldest_wait_s'])}  up {brief(now['uptime_s'])}"
        )
        lines = [("title", title), ("" if mode == "open" else "alarm", figures)]
        kept = kept_figures(now)
        lines += [("dim", kept)] * bool(kept)
        lines += [("lost", f" {trouble}")] * bool(trouble)
        wrong = (now.get("trouble"), error and f"not reloaded: {error}")
        texts = [line for text in wrong if text for line in wrap(text[:1000], max(40, width - 1))]
        return lines + [("bad", f" {text}") for text in texts]

    def tables(self, width: int, room: int) -> list[Line]:
        """The panel; requests come with backends and what has ended, each with its share."""
        if self.panel != "Requests":
            return self.panel_table(width, room - 2)
        backends, ended = self.snapshot["backends"], self.snapshot["recent"]
        waiting = sum(row["state"] == "waiting" for row in self.rows)
        beyond = max(0, self.snapshot["queue"]["waiting"] - waiting)  # what the snapshot left out
        few = min(len(backends), max(1, room // 5))
        room -= few + 7  # titles, and lines between
        needed = len(self.rows) + bool(beyond)
        most = max(1, min(needed, max(room * 2 // 3, room - len(ended))))
        runners, more_runners = window(backends, few)
        return [
            *table(BACKENDS, map(backend_row, runners), width, "none"),
            *more_runners,
            *self.panel_table(width, most, beyond),
            *table(ENDED, map(ended_row, ended[: max(0, room - most)]), width, "nothing yet"),
        ]

    def panel_table(self, width: int, most: int, beyond: int = 0) -> list[Line]:
        _, columns, tell, empty = PANELS[self.panel]
        seen, more = window(self.rows, most, self.index, beyond)
        told = [(row["id"] == self.picked, *tell(row)) for row in seen]
        rows = [("bar" if picked else kind, cells) for picked, kind, cells in told]
        titles = {f"{name}↓" if name == self.sort else name: columns[name] for name in columns}
        return [*table(titles, rows, width, empty.format(self.url)), *more]

    def paint(self, kind: str, text: str, width: int) -> str:
        kind = "dim" if self.old and kind not in ("bar", "lost") else kind
        code = self.styles.get(kind if kind in COLOURS else "bad")
        return f"\x1b[{code}m{fit(text, width)}\x1b[0m" if code else fit(text, width)


def kept_figures(now: Row) -> str:
    """Jobs, how often the cache knew the answer, what was used today: as far as there is any."""
    jobs, cache, used = (now.get(name) or {} for name in ("jobs", "cache", "used_today"))
    told = []
    if any(jobs.values()):
        told.append(f"jobs {jobs['queued']:,} queued, {jobs['running']:,} running")
    hits = cache.get("hit", 0) + cache.get("joined", 0)
    looked = hits + cache.get("miss", 0)
    if looked:
        told.append(f"hits {hits / looked:.0%} of {looked:,}")
    if used.get("requests"):
        tokens = used["tokens_in"] + used["tokens_out"]
        many = f"{tokens / 1e6:,.1f}M tokens" if tokens >= 1e6 else plural(tokens, "token")
        told.append(f"today {plural(used['requests'], 'request')}, {many}")
    return "".join(f" {text} " for text in told)


def plain_top(snapshot: Row, url: str, width: int) -> str:
    """The picture once, all of it and without a trace of a terminal."""
    view = View(url, {})
    for sort in reversed(SORTS):  # the last is the usual one
        view.sort = sort
        view.update(snapshot)
    lines = [*view.head(width), *view.tables(width, 99999)]
    for view.panel in PANELS:
        view.update(snapshot)
        if view.panel in ("Users", "Blocked") and view.rows:
            lines += view.tables(width, 99999)
    return "\n".join(printable(text, 4000).rstrip() for _, text in lines)


def understood(snapshot: Row, url: str) -> Row:
    """The snapshot, if there is nothing in it that cannot be shown; else StartError."""
    try:
        plain_top(snapshot, url, 80)
    except ODD_JSON:
        raise StartError(f"{url} tells what this llmq does not understand") from None
    return snapshot


@contextlib.contextmanager
def own_screen() -> Iterator[None]:
    """Have the terminal; on every way out it is as it was."""
    import termios
    import tty

    saved = termios.tcgetattr(0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would leave its picture behind
    try:
        tty.setcbreak(0)
        os.write(1, b"\x1b[?1049h\x1b[?25l\x1b[?7l")  # own screen, no cursor, no wrapping
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, saved)
            os.write(1, b"\x1b[?7h\x1b[?25h\x1b[?1049l")


def read_keys() -> list[str]:
    if not select.select([0], [], [], KEY_SECONDS)[0]:
        return []
    typed = os.read(0, 1024).decode("utf-8", "ignore") or "q"  # nothing: the terminal is gone
    return [match[2] or KEY_NAMES.get(match[1], "") for match in KEY.finditer(typed)]


def run_top(ask: Ask, url: str, interval: float) -> None:
    """Show and obey until `q` or a signal; what is old is dimmed until llmq answers again."""
    view = View(url, NO_COLOURS if os.environ.get("NO_COLOR") else COLOURS)
    orders: queue.SimpleQueue[list[Order]] = queue.SimpleQueue()
    snapshot, heard, shown = understood(ask(STATUS), url), time.monotonic(), ""

    def follow() -> None:
        nonlocal snapshot, heard
        while True:
            some, order = [STATUS], STATUS
            with contextlib.suppress(queue.Empty):
                some = orders.get(timeout=interval)
            try:
                for order in some:
                    answer = ask(order)
                    if order is STATUS:
                        snapshot, heard = understood(answer, url), time.monotonic()
                    else:
                        view.note = ", ".join(f"{name} {text}" for name, text in answer.items())
            except StartError as error:
                view.note = view.note if order is STATUS else str(error)

    threading.Thread(target=follow, daemon=True).start()
    with contextlib.suppress(OSError), own_screen():  # the terminal may go away
        while not view.over:
            silent = time.monotonic() - heard - interval
            view.update(snapshot)
            view.old = silent > LOST_SECONDS
            since = f"{silent:.0f} s" if silent < 60 else brief(silent)
            trouble = f"no answer for {since}: this is how it was; llmq is asked on" * view.old
            lines = view.lines(*os.get_terminal_size(1), trouble)
            picture = "\r\n".join(f"\x1b[K{line}" for line in lines)
            if picture != shown:  # drawn at once, where terminals know how
                drawn = f"\x1b[?2026h\x1b[H{picture}\x1b[?2026l"
                os.write(1, drawn.encode(sys.stdout.encoding, "replace"))
                shown = picture
            for some in filter(None, map(view.press, read_keys())):
                orders.put([*some, STATUS])


# ==== 53. Service =================================================================================
# From settings to a running llmq and back: what is wired to what, listening, reload and drain.

STOP_SECONDS = 0.02  # between two looks at what still runs while stopping
LOOK_SECONDS = 1.0  # for the runners to say what they are, before the banner tells it
HANDOVER_SECONDS = 0.5  # for requests to arrive on connections that were just accepted
FIRST_INHERITED = 3  # file descriptor, sd_listen_fds(3)
RESERVED_FILES = 16  # open files that are not client connections, besides two per slot
LOG_PIECE = 1024  # characters: a pipe that has room takes 4,096 bytes without waiting
LOG_PATIENCE = 0.05  # seconds in which the loop may wait for whoever reads the log
WATCH_SECONDS = 2.0  # between two looks at whether the file has changed
CONFIG_PLACES = ("~/.config/llmq", "/etc/llmq")


class LogHandler(logging.Handler):
    """Writes to stderr or a file, as text or JSON; what nobody takes is lost, never waited for."""

    def __init__(self, form: str, path: str = "") -> None:
        self.file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115 - see close
        super().__init__()
        self.form = form
        self.lost = 0  # lines, since the last one that was written

    @property
    def stream(self) -> Any:
        """Where the lines go; None where llmq was started without an stderr."""
        return self.file or sys.stderr

    def close(self) -> None:
        super().close()
        if self.file is not None:
            self.file.close()

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is None:
            return
        rows: Sequence[tuple[float, str | Record]]
        if isinstance(record.msg, Lines):
            rows = record.msg.rows
        else:
            rows = [(record.created, self.format(record))]
        lines = [self.line(when, record.levelname, what) for when, what in rows]
        if self.lost and self.has_room(0):
            words = f"{self.lost} lines of the log were lost: nobody took them"
            lines.insert(0, self.line(record.created, "WARNING", words))
            self.lost = 0
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            self.write(lines)

    def write(self, lines: list[str]) -> None:
        """Write lines while there is room, in all with LOG_PATIENCE: a terminal may be paused."""
        until = time.monotonic() + (0 if self.lost else LOG_PATIENCE)
        text, at = "".join(lines), 0
        while at < len(text):
            if not self.has_room(max(0.0, until - time.monotonic())):
                self.lost += text.count("\n", at)
                return
            end = at + LOG_PIECE
            end = text.rfind("\n", at, end) + 1 or end  # whole lines, where they are that short
            self.stream.write(text[at:end])
            at = end
        self.stream.flush()

    def has_room(self, seconds: float) -> bool:
        try:
            return bool(select.select([], [self.stream], [], seconds)[1])
        except (OSError, ValueError):  # no file of the system, or one that cannot be asked
            return True

    def line(self, when: float, level: str, what: str | Record) -> str:
        if self.form == "json":
            facts = {"time": round(when, 3), "level": level.lower()}
            more = what.facts() if isinstance(what, Record) else {"message": what}
            return json.dumps({**facts, **more}) + "\n"
        return f"{stamp(int(when))},{int(when % 1 * 1000):03} {level} {what}\n"


@functools.lru_cache(maxsize=2)
def stamp(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def set_up_log(settings: LogSettings) -> None:
    """Have the log as it is to be; its file is opened anew, as whoever rotates it wants.

    ConfigError where that cannot be opened; then the log stays as it was.
    """
    try:
        handler = LogHandler(settings.format, os.path.expanduser(settings.file))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"log.file: {printable(settings.file)}: {why}") from None
    for old in log.handlers:
        old.close()
    log.handlers[:] = [handler]
    log.setLevel(settings.level.upper())
    log.propagate = False


def base_url(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def raise_file_limit(wanted: int) -> int:
    """Raise the soft limit on open files towards `wanted`; the limit that holds now."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in limits)
    best = min(wanted, hard)
    if soft < best:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (best, limits[1]))
            return best
    return soft


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets that a service manager opened for this process, sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    asked = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    numbers = range(FIRST_INHERITED, FIRST_INHERITED + (int(asked) if asked.isdecimal() else 0))
    try:
        found = [socket.socket(fileno=number) for number in numbers]
        listening = (socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        kinds = {(given.family, given.getsockopt(*listening)) for given in found}
    except OSError as error:
        raise StartError(f"LISTEN_FDS: {error.strerror}") from None
    if kinds - {(socket.AF_INET, 1), (socket.AF_INET6, 1)}:
        raise StartError("LISTEN_FDS: llmq takes listening TCP sockets, and got something else")
    return found


def unchecked_tls() -> Any:
    """How somebody is asked over TLS who is told nothing that matters."""
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def who_listens(url: str) -> str:
    """Who has the port already, and what to do."""
    there, late = Backend("", BackendSettings(url=url), Device("", 1)), BackendTimeout("silent")
    context = unchecked_tls() if url.startswith("https:") else None
    with contextlib.suppress(OSError, LlmqError, ValueError):
        asking = asyncio.ensure_future(fetch(there, "/api/version", tls=context))
        if "x-llmq-id" in (await within(LOOK_SECONDS, asking, late))[0].headers:
            return "llmq runs there already: see `llmq status`, stop it, or add --port N"
    return "another program listens there: add --port N"


def server_tls(settings: ServerSettings) -> Any:
    """An `ssl.SSLContext` to serve with, None for HTTP; ConfigError where its files are none."""
    if not settings.tls_cert:
        for name in ("tls_key", "tls_client_ca"):
            if getattr(settings, name):
                raise ConfigError(f"server.{name}: means nothing without server.tls_cert")
        return None
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, password=str)
    except OSError as error:  # which an SSLError is too
        raise ConfigError(f"server.tls_cert, server.tls_key: {error.strerror or error}") from None
    if settings.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except OSError as error:
            raise ConfigError(f"server.tls_client_ca: {error.strerror or error}") from None
    return context


def port_service(number: str, row: PortSettings) -> Backend:
    """The other service that a port is for, as what is asked like a backend."""
    settings = BackendSettings(url=row.upstream, headers=row.headers, idle_timeout=row.timeout)
    return Backend(f"port {number}", settings, Device("", 1))


def own_names(settings: Settings, is_public: bool) -> frozenset[str]:
    """What clients may call this box, see `is_own_host`."""
    host = socket.gethostname().lower()
    allowed = map(str.lower, settings.server.allowed_hosts)
    ports = any(row.public for row in settings.ports.values())
    public = "*" if is_public or ports else ()
    return frozenset((host, host + ".local", "*.internal", *allowed, *public))


def tell_what_runs(gateway: Gateway) -> None:
    """Say what stopping waits for."""
    running = list(gateway.scheduler.running.values())
    names = ", ".join(ticket.client.name for ticket in running[:3]) + ", …" * bool(running[3:])
    what = f"{plural(len(running), 'running request')} ({names})"
    limit = gateway.settings.server.drain_timeout
    if running:
        log.warning("stopping: waits %g s for %s; asked again it stops now", limit, what)


@dataclass(eq=False)
class Service:
    settings: Settings
    demo: bool = False
    seed: int | None = None  # of the simulated home; None: there is none
    read: Callable[[], Settings] | None = None  # reads the settings again
    stamp: Callable[[], object] | None = None  # tells one state of the file from another
    sockets: Sequence[socket.socket] = ()  # that a service manager holds too, in place of our own

    def __post_init__(self) -> None:
        hosts = [held.getsockname()[0] for held in self.sockets] or [self.settings.server.host]
        self.host: str = min(hosts, key=is_loopback)  # as bound: a reload does not move it
        self.is_public = bool(self.host) and not is_loopback(self.host)
        self.port = 0
        self.addresses: list[str] = []
        self.most_connections = 0
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.has_looked = False  # around this box, for runners
        self.seen = self.stamp() if self.stamp else None
        self.store = Store("" if self.demo else self.settings.server.state)
        self.gateway = Gateway(self.settings, secrets.token_hex(8), time.monotonic, self.store)
        self.changes = Changes(self.gateway)
        self.runner = JobRunner(self.gateway)
        self.batches = Batches(self.gateway.jobs, self.runner)
        self.runner.on_end = [self.batches.line_ended, self.tell_job]
        self.keeper = Keeper(self.gateway, self.batches)
        self.webhooks = Webhooks(self.gateway)
        jobs = JobRoutes(self.gateway, self.runner, self.batches)
        names, reload = own_names(self.settings, self.is_public), self.reload
        self.api = Api(self.gateway, names, reload, self.changes, jobs, self.keeper)
        self.door = Door(self.api)
        self._servers: list[HttpServer] = []
        self._ports: dict[str, tuple[PortSettings, HttpServer]] = {}  # by number
        self._moving: asyncio.Future[None] | None = None  # opens and closes them
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: list[asyncio.Future[None]] = []  # of the simulated home
        self.tls: Any = None  # what each connection begins with, and what it goes on with
        self.newest_tls: Any = None

    def renew_tls(self, connection: Any, _name: str | None, _context: Any) -> None:
        """Let a new connection have what the files hold since the last reload."""
        connection.context = self.newest_tls

    async def start(self) -> None:
        """Listen and let everything run; ConfigError or StartError says why not."""
        self.check_public(self.settings)
        self.newest_tls = server_tls(self.settings.server)
        self.tls = server_tls(self.settings.server)
        if self.tls is not None:
            self.tls.sni_callback = self.renew_tls
        limits = self.settings.queue
        spare = RESERVED_FILES + SPARE_CONNECTIONS + 4 * ACCEPT_BURST + 2 * limits.slots
        self.most_connections = max(4, raise_file_limit(limits.max_depth + 512) - spare)
        server = HttpServer(self.door.handle, self.settings, self.most_connections)
        server.tls = self.tls
        self._servers.append(server)
        if self.demo:
            await self.start_demo()
        gateway = self.gateway
        kept = await self.store.load()
        self.changes.kept = kept.get("clients", {})
        for name, row in kept.get("backends", {}).items():
            try:
                parse_rows(self.store.path, "backends", {name: row})
                gateway.added[name] = row
            except ConfigError as error:  # noqa: PERF203 - a later llmq may know more of it
                log.warning("state: %s; it is left out", error)
        self.apply()
        for kept_there in (gateway.jobs, self.batches, self.keeper):
            try:
                await kept_there.load()
            except LlmqError as error:  # noqa: PERF203 - one is broken, the others may be whole
                log.warning("state: %s", error)
        await self.listen(server)
        await self.move_ports()
        loops = (
            (REAP_SECONDS, gateway.monitor.probe_due),
            (REAP_SECONDS, functools.partial(reap, gateway, self._servers)),
            (STREAM_SECONDS, self.api.stream.step),
            (DISCOVERY_SECONDS, self.look_around),
            (MEMORY_SECONDS, MemoryKeeper(gateway).step),
            (WATCH_SECONDS, self.watch),
            (PRELOAD_SECONDS, Preloader(gateway).step),
            (CARDS_SECONDS, gateway.chooser.cards.step),
            (0.0, functools.partial(dispatch_on_news, gateway)),
            (0.0, self.runner.feed),
            (KEEP_SECONDS, self.keeper.step),
            (REAP_SECONDS, self.webhooks.step),
        )
        self._tasks = [asyncio.ensure_future(every(*loop)) for loop in loops]
        if self.seed is not None:
            tls = unchecked_tls() if self.tls else None
            rows = self.settings.keys
            key = rows[DEMO_CLIENT].key if DEMO_CLIENT in rows else ""
            self._clients = start_busy_clients(self.seed, self.addresses[0], key, tls)

    async def start_demo(self) -> None:
        """Have simulated runners in place of any other."""
        self.settings.backends = {}
        if self.settings.keys and self.seed is not None:  # who lives there needs one, too
            self.settings.keys[DEMO_CLIENT] = KeySettings(key=secrets.token_urlsafe(32))
        for name, (handler, kind) in demo_runners(self.seed).items():
            runner = HttpServer(handler, Settings(), 64)
            self._servers.append(runner)
            url = base_url("127.0.0.1", await runner.listen("127.0.0.1", 0))
            self.settings.backends[name] = BackendSettings(url=url, kind=kind, device=name)

    async def listen(self, server: HttpServer) -> None:
        for inherited in self.sockets:
            self.port = await server.listen_on(inherited)
            self.addresses.append(self.url_of(inherited.getsockname()[0]))
        if self.sockets:
            return
        wanted, port = self.settings.server.host, self.settings.server.port
        host = wanted or "127.0.0.1"
        try:
            self.port = await server.listen(host, port)
        except OSError as error:
            self.gateway.monitor.close()
            taken = error.errno == errno.EADDRINUSE
            self.port = port
            why = await who_listens(self.url_of(host)) if taken else error.strerror or error
            raise StartError(f"cannot listen on {host}:{port}: {why}") from None
        self.addresses = [self.url_of(host)]
        if not wanted:
            with contextlib.suppress(OSError):  # a box without IPv6
                await server.listen("::1", self.port)
                self.addresses.append(self.url_of("::1"))

    def url_of(self, host: str) -> str:
        """Where llmq is by this name, as clients write it."""
        scheme = "https" if self.tls else "http"
        return base_url(host, self.port, scheme) + self.settings.server.base_path

    def check_public(self, settings: Settings) -> None:
        """ConfigError where the whole network could use the runners without a key."""
        if self.is_public and not (settings.keys or settings.server.allow_anonymous_lan):
            raise ConfigError(
                f"host {self.host}: nobody needs a key, so the whole network could use your runner;"
                " make one, see `llmq key NAME`, or add --allow-anonymous-lan if that is meant"
            )

    async def move_ports(self) -> None:
        """Have the ports of the settings open and no others; what runs on one ends in peace."""
        for number, (row, server) in list(self._ports.items()):
            if self.settings.ports.get(number) != row:
                del self._ports[number]
                server.stop_listening()
        gone = [one for one in self._servers if one.closing and not one.connections]
        self._servers[:] = [one for one in self._servers if one not in gone]
        for number, row in self.settings.ports.items():
            if number in self._ports:
                continue
            handler: Handler = self.door.handle
            if row.upstream:
                service = port_service(number, row)
                handler = functools.partial(self.door.handle, service=service)
            server = HttpServer(handler, self.settings, max(4, self.most_connections // 4))
            server.account = self.gateway.accounts.named[f"port:{number}"]
            try:
                await server.listen(row.bind, int(number))
            except OSError as error:
                why = f"cannot listen on {row.bind}:{number}: {error.strerror or error}"
                if not self._tasks:
                    raise StartError(why) from None
                log.warning("%s", why)
                continue
            self._ports[number] = row, server
            self._servers.append(server)

    async def look_around(self) -> None:
        await self.gateway.discovery.step()
        self.has_looked = True

    async def first_look(self) -> None:
        """Wait a moment for what the runners say first."""
        backends = self.gateway.fleet.backends  # which grow while llmq looks around

        def told() -> bool:
            known = all(one.state is not State.UNKNOWN for one in backends.values())
            return (known and self.has_looked) or self.stopping.is_set()

        await self.until(told, LOOK_SECONDS)

    def apply(self) -> None:
        """Let the settings hold for what was made after them."""
        self.api.names = own_names(self.settings, self.is_public)
        self.gateway.accounts.configure(self.settings)
        self.gateway.discovery.configure()
        self.gateway.monitor.probe_due()
        self.changes.apply()

    def reload(self) -> None:
        """Read the settings again; a mistake changes nothing and is shown."""
        try:
            settings = self.read() if self.read else self.settings
            self.check_public(settings)
            tls = server_tls(settings.server)
            if settings.log != self.settings.log or settings.log.file:
                self.gateway.journal.flush()
                set_up_log(settings.log)
        except ConfigError as error:
            self.gateway.config_error = str(error)
            self.gateway.changes += 1
            log.warning("reload: %s; nothing was changed", error)
            return
        self.gateway.config_error = None
        if self.demo:
            settings.backends = self.settings.backends
        for name in ("host", "port", "state"):  # which stay as they are
            if getattr(settings.server, name) != getattr(self.settings.server, name):
                log.warning("reload: server.%s needs restart", name)
        for name in ("tls_cert", "tls_client_ca"):  # others are taken; a first one is not, nor none
            if bool(getattr(settings.server, name)) != bool(getattr(self.settings.server, name)):
                log.warning("reload: server.%s needs restart", name)
        self.newest_tls = tls or self.newest_tls
        vars(self.settings).update(vars(settings))  # its one owner, which everybody asks
        self.apply()
        if self._tasks:
            self._moving = asyncio.ensure_future(self.move_ports())
        log.info("reload: done")

    async def watch(self) -> None:
        """Reload when the file is another; while it is gone, a new one is on its way."""
        if self.settings.server.watch and self.stamp is not None:
            stamp = await in_thread(self.stamp)  # its disk may be far away
            if stamp not in (None, self.seen):
                self.seen = stamp
                self.reload()

    def on_signal(self) -> None:
        (self.hurry if self.stopping.is_set() else self.stopping).set()

    async def stop(self) -> None:
        """Drain and close: what runs may finish, what waits is told, nothing is left open."""
        self.stopping.set()
        for client in self._clients:
            client.cancel()
        if self.sockets:
            await self.hand_over()
        if self._moving is not None:
            await asyncio.wait({self._moving})  # or a port would open behind us
        self.gateway.drain()
        self.api.stream.tell()
        tell_what_runs(self.gateway)
        for server in (self._servers[0], *(server for _, server in self._ports.values())):
            server.quiesce()
        await self.until(self.idle, self.settings.server.drain_timeout)
        for call in list(self.gateway.calls.values()):
            self.gateway.stop(call, LlmqError("llmq is shutting down", "shutting_down"))
        await self.until(self.settled, LINGER_SECONDS)
        for task in self._tasks:
            task.cancel()
        self.gateway.monitor.close()
        await self.gateway.chooser.cards.close()
        for server in self._servers:
            await server.close()
        self.gateway.pool.close()
        await self.runner.stop()
        await self.last_words()
        await self.store.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.gateway.journal.flush()

    async def tell_job(self, job: Job) -> None:
        if not job.batch:
            ended = await self.gateway.jobs.find(job.id)  # with its times
            self.gateway.journal.happened("job.done", job=self.api.jobs.show_job(ended))

    async def last_words(self) -> None:
        """What is to be kept, and what is to be told, before all ends."""
        await self.keeper.step()
        self.webhooks.step()
        await self.until(lambda: self.webhooks.is_idle, LINGER_SECONDS)
        self.webhooks.close()

    async def hand_over(self) -> None:
        """Leave new connections in the sockets, for the next llmq; let those accepted speak."""
        server = self._servers[0]
        server.stop_accepting()
        await asyncio.sleep(STOP_SECONDS)  # so that what was just accepted is a connection
        open_now = server.connections
        await self.until(lambda: not any(client.arriving for client in open_now), HANDOVER_SECONDS)

    def idle(self) -> bool:
        """Nothing runs any more, nor is anything passed on at a port."""
        ports = [server for _, server in self._ports.values()]
        busy = [one for server in ports for one in server.connections if one.phase is Phase.BUSY]
        return not self.gateway.calls and not busy

    def settled(self) -> bool:
        quiet = (Phase.IDLE, Phase.LINGER)
        clients = [client for server in self._servers for client in server.connections]
        return all(client.phase in quiet and not client.unsent for client in clients)

    async def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for this, but not beyond the time, nor when it has to go fast."""
        deadline = time.monotonic() + seconds
        while not (condition() or self.hurry.is_set() or time.monotonic() >= deadline):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.hurry.wait(), STOP_SECONDS)


# ==== 54. Configuration ===========================================================================
# Where settings come from: a file, with what it refers to, the variables and the flags.


def load_document(path: str) -> Any:
    """What a file holds, JSON or TOML by its name; ConfigError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            if path.endswith(".json"):
                return json.load(file)
            import tomllib  # novm

            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ImportError:
        raise ConfigError(f"{path}: TOML needs Python 3.11; write the same as .json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None


def read_file(path: str) -> Layer:
    """A configuration file as a layer; ConfigError when it cannot be read or trusted."""
    try:
        if os.name == "posix" and os.stat(path).st_mode & 0o002:
            raise ConfigError(f"{path}: everybody may write to it; chmod o-w it first")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return file_layer(path, resolved(path, load_document(path)))


REFERENCE = re.compile(r"\$\{([^}]*)\}")
SECRET_FILE = 64 * KIB


def resolved(place: str, value: Any) -> Any:
    """A value of the file, with variables for `${NAME}`, and what it has for NAME_file."""

    def variable(found: re.Match[str]) -> str:
        text = os.environ.get(found[1], "")
        if not text:
            raise ConfigError(f"{place}: the variable {printable(found[1])} is not set, or empty")
        return text

    if isinstance(value, str):
        return REFERENCE.sub(variable, value)
    if isinstance(value, list):
        return [resolved(place, one) for one in value]
    if not isinstance(value, dict):
        return value
    facts: Facts = {}
    for name, raw in value.items():
        here, told, one = f"{place}: {name}", name, resolved(f"{place}: {name}", raw)
        if name.endswith("_file") and name[: -len("_file")] in TEXTS and isinstance(one, str):
            told, one = name[: -len("_file")], secret_of(here, one)
        if told in facts:
            raise ConfigError(f"{here}: {told} is said twice")
        facts[told] = one
    return facts


def secret_of(place: str, path: str) -> str:
    try:
        return read_secret(path)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def read_secret(path: str) -> str:
    """The text of a file without what ends its line; ValueError where there is none."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            text = file.read(SECRET_FILE).strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    if not text:
        raise ValueError(f"{path}: is empty")
    return text


def usual_files() -> list[str]:
    """Where a configuration file is looked for, the first first."""
    places = [os.path.expanduser(place) for place in CONFIG_PLACES]
    return [os.path.join(place, f"llmq.{kind}") for place in places for kind in ("toml", "json")]


def find_file(environ: Mapping[str, str]) -> str | None:
    return environ.get("LLMQ_CONFIG") or next(filter(os.path.isfile, usual_files()), None)


def read_settings(flags: dict[str, Any], environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Defaults < file < environment < flags; and what there is to tell about it."""
    given = dict(flags)
    path = given.pop("config", None) or find_file(environ)
    layers, notes = environment_layers(environ)
    file = [read_file(path)] if path else []
    return merge_layers([*file, *layers, ("command line", given)]), notes


def file_stamp(flags: Mapping[str, Any]) -> object:
    """What tells one state of the configuration file from another; None while there is none."""
    with contextlib.suppress(OSError):
        facts = os.stat(flags.get("config") or find_file(os.environ) or "")
        return facts.st_mtime_ns, facts.st_size, facts.st_ino
    return None


# ==== 55. Process =================================================================================
# A process that serves: what it says when it starts, and what a service manager is told.  All words
# to people go through `say`.

READY_SECONDS = 5.0  # at most, for a busy service manager to take that llmq is ready
REPORT_SECONDS = 1.0  # between two looks at what there is to tell the service manager
EXTENSION_USEC = 10_000_000  # from each report on, for stopping: a drain may last longer than this


def say(text: str, *, error: bool = False) -> None:
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def given_flags(options: argparse.Namespace) -> dict[str, Any]:
    settings = vars(options).items()
    return {key: value for key, value in settings if "." in key or key in ("backends", "config")}


async def serve(options: argparse.Namespace) -> int:
    flags = given_flags(options)
    settings, notes = read_settings(flags, os.environ)
    for note in notes:
        say(note)
    set_up_log(settings.log)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    sockets, stamp = inherited_sockets(), functools.partial(file_stamp, flags)
    if options.busy and not options.demo:
        raise ConfigError("--busy: means nothing without --demo")
    seed = options.seed if options.busy else None
    service = Service(
        settings, options.demo, seed, lambda: read_settings(flags, os.environ)[0], stamp, sockets
    )
    await service.start()
    if os.name == "posix":
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.on_signal)
        loop.add_signal_handler(signal.SIGHUP, service.reload)
    await service.first_look()
    with contextlib.suppress(OSError):  # who only wants the service may have no room for words
        say(banner(service))
    keep_memory_small()
    release_memory()
    sys.setswitchinterval(0.001)  # so long the loop waits for a thread that reads a large body
    gc.freeze()  # what is here now stays: later collections need not look at it
    gc.set_threshold(50_000, 20, 20)
    reports = asyncio.ensure_future(keep_informed(service))
    notify("READY=1", patience=READY_SECONDS)
    try:
        await service.stopping.wait()
    finally:
        notify("STOPPING=1")
        await service.stop()
        reports.cancel()
    return 1 if service.hurry.is_set() else 0


def notify(*facts: str, patience: float = 0.0) -> None:
    """Tell the service manager that wants to hear it, sd_notify(3); without one do nothing."""
    place = os.environ.get("NOTIFY_SOCKET")
    if not place or not facts:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(patience)
        sender.sendto("\n".join(facts).encode(), re.sub("^@", "\0", place))


def watchdog_seconds() -> float:
    """How soon the service manager wants each next sign of life; 0: it wants none."""
    asked, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    return int(asked) / 1e6 if asked.isdecimal() and pid in (None, str(os.getpid())) else 0.0


async def keep_informed(service: Service) -> None:
    """Tell the service manager what goes on, and, from the event loop itself, that it turns."""
    limit = watchdog_seconds()
    if limit:
        import faulthandler

        faulthandler.enable()  # the watchdog ends what hangs by SIGABRT: then the log says where
    last, scheduler = "", service.gateway.scheduler
    while os.environ.get("NOTIFY_SOCKET"):
        stopping = service.stopping.is_set()
        mode = "stopping" if stopping else scheduler.mode.value
        work = f"{len(scheduler.waiting)} waiting, {len(scheduler.running)} running"
        status = f"STATUS={service.addresses[0]}, {mode}: {work}"
        extend = f"EXTEND_TIMEOUT_USEC={EXTENSION_USEC}"
        due = {"WATCHDOG=1": limit, status: status != last, extend: stopping}
        notify(*[fact for fact, is_due in due.items() if is_due])
        last = status
        await asyncio.sleep(min(REPORT_SECONDS, limit / 3 or REPORT_SECONDS))


def log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio has to say, in one line: out of files while accepting, mostly."""
    error = context.get("exception")
    log.warning("%s%s", context["message"], f": {error}" if error else "")


def banner(service: Service) -> str:
    at, fleet = service.addresses[0], service.gateway.fleet
    if service.host and not service.host.strip("0.:"):  # on each box these zeros are another's
        at = service.url_of(socket.gethostname())
    usual = at == base_url("127.0.0.1", ServerSettings().port)
    rows = {
        **{f"backend {backend.name}": describe(backend) for backend in fleet.backends.values()},
        "page": at,
        "OpenAI clients": f"OPENAI_BASE_URL={at}/v1",
        "Ollama clients": f"OLLAMA_HOST={at}",
        "Anthropic clients": f"ANTHROPIC_BASE_URL={at}",
        "in a terminal": "llmq top" + f" --url {at}" * (not usual),
    }
    lines = [f"llmq {__version__} on {' and '.join(service.addresses)}"]
    lines += [f"  {name:<17}  {words}" for name, words in rows.items()]
    if service.most_connections < service.settings.queue.max_depth:
        lines.append(f"  open files allow {service.most_connections} connections at once")
    trouble = fleet.trouble()
    return "\n".join([*lines, *[f"  {trouble}"] * bool(trouble)])


def describe(backend: Backend) -> str:
    report, words = backend.report, f"no answer{f': {backend.error}' if backend.error else ''}"
    if backend.state is State.UP and report:
        words = f"{report.kind} {report.version}".strip()
        words += ", " + plural(len(report.models), "model")
    elif backend.state is State.LOADING:
        words = "loads its model"
    shared = f"device {backend.device.name}, {plural(backend.most, 'slot')}"
    return f"{backend.url}  {words}  ({shared})"


# ==== 56. Setup ===================================================================================
# `llmq config init`: looks at what is here, asks what it cannot see, and writes a file that `config
# check` accepts.  What it writes is a configuration as any other; nothing else is kept of it.

BIG_MODEL = 12.0  # GiB; what is larger is for heavy work, whatever its name
ROLES = (  # of a model by its name, the first that fits; agent-router's words
    ("review", re.compile(r"review", re.IGNORECASE)),
    ("code", re.compile(r"code|codestral|devstral|deepseek-v", re.IGNORECASE)),
    ("heavy", re.compile(r"gpt-oss|reason|qwq|\br1\b|think", re.IGNORECASE)),
    ("tool", re.compile(r"tool|function|hermes", re.IGNORECASE)),
    ("vision", re.compile(r"llava|vision|moondream|[-.\d]vl\b|minicpm-v", re.IGNORECASE)),
)
PURPOSES = {
    "fast": ("triage", "simple_chat", "summarize"),
    "code": ("code_generate", "code_fix", "tool_use"),
    "review": ("code_review", "code_generate", "code_fix"),
    "heavy": ("agentic_reasoning", "large_context", "tool_use"),
    "tool": ("tool_use", "code_generate"),
    "vision": (),  # chosen where there are pictures
}
ROW_ROLES = {  # the roles of a row of [routes], the best first; all others follow
    "code_generate": ("code", "tool", "heavy"),
    "code_fix": ("code", "review", "heavy"),
    "code_review": ("review", "code", "heavy"),
    "agentic_reasoning": ("heavy", "code"),
    "large_context": ("heavy", "code"),
    "tool_use": ("tool", "code", "heavy"),
}
SETUP_NOTES = {  # above the tables of the file
    "server": "Where llmq listens.",
    "backends": "The runners; without this table llmq looks for them by itself.",
    "devices": "What the backends of one host share, one GPU usually.",
    "models": "What is known of the models, for requests that ask for `auto`.",
    "routes": "Which models `auto` means for a type of task, the best first.",
    "router": "How it chooses.",
    "keys": "Who may use llmq from elsewhere.",
}


class Found(NamedTuple):
    """What is on this box."""

    runners: tuple[tuple[str, str, Report], ...] = ()  # kind, url, what it has
    maker: str = "none"
    cards: tuple[Card, ...] = ()
    cores: int = 1
    memory: float = 0.0  # GiB
    installed: bool = False  # Ollama's command is here

    @property
    def models(self) -> dict[str, float]:
        """The models that make texts, each with its GiB, 0 where that is not known."""
        sizes: dict[str, float] = {}
        for _, _, report in self.runners:
            told = {str(row.get("name")): measured(row.get("size")) or 0 for row in report.tags}
            for name in report.models:
                sizes.setdefault(name, round(told.get(name, 0) / GIB, 1))
        named = {name: size for name, size in sizes.items() if FREE_NAME.fullmatch(name)}
        return {name: size for name, size in named.items() if not EMBEDDING.search(name)}

    @property
    def video_memory(self) -> float:
        return sum(card.total for card in self.cards) / KIB

    def __str__(self) -> str:
        lines = [f"this box: {plural(self.cores, 'core')}, {self.memory:.0f} GiB of memory"]
        lines += [
            f"graphics: {card.name} ({self.maker}), {card.total / KIB:.1f} GiB"
            for card in self.cards
        ] or ["graphics: no card that tells its memory"]
        lines += [
            f"runner: {STARTERS[kind][0]} at {url}, {plural(len(report.models), 'model')}"
            for kind, url, report in self.runners
        ]
        if not self.runners:
            known = "Ollama is installed, but does not answer" if self.installed else "none answers"
            lines.append(f"runner: {known}; start {HOW_TO_START}")
        return "\n".join(lines)


PORTS = {"http": 80, "https": 443, "": 11434}  # where OLLAMA_HOST names none, by its scheme
PLACE = re.compile(r"(\[[^\]]*\]|[^:/]*|[^/]*:[^/]*:[^/]*?)(?::([0-9]+))?(?:/.*)?")


def place_of_ollama(host: str) -> str:
    """The URL that OLLAMA_HOST means, as Ollama's own command reads it; empty: none."""
    scheme, _, rest = host.strip().strip("\"'").rpartition("://")
    found = PLACE.fullmatch(rest)
    if not host.strip() or not found:
        return ""
    name, port = found[1].strip("[]"), found[2] or PORTS.get(scheme, PORTS[""])
    if name in ("", "0.0.0.0", "::", "localhost"):  # noqa: S104 - where it listens: to be asked
        name = "127.0.0.1"
    return base_url(name, int(port), scheme or "http")


async def look_at(url: str, kind: str) -> tuple[str, str, Report] | None:
    """What a runner of this kind has there; None where none answers, or it is an llmq."""
    backend, late = Backend(kind, BackendSettings(url=url), Device("", 1)), BackendTimeout("late")

    async def look() -> tuple[str, str, Report] | None:
        if look_up(await fetch_json(backend, "/api/version"), "llmq"):
            return None
        report = await inspect(backend, "setup")
        return (kind, url, report) if report.kind == kind else None

    with contextlib.suppress(OSError, LlmqError, ValueError):
        return await within(LOOK_SECONDS, asyncio.ensure_future(look()), late)
    return None


async def survey(environ: Mapping[str, str]) -> Found:
    """Look at this box: runners at their usual places and at OLLAMA_HOST, cards, memory."""
    places = {kind.url: kind.name for kind in RUNNERS if kind.url}
    places.setdefault(
        place_of_ollama(environ.get("OLLAMA_HOST", "")) or KINDS["ollama"].url, "ollama"
    )
    seen = await asyncio.gather(*[look_at(*place) for place in places.items()])
    maker, cards, _ = await read_cards(RouterSettings().nvidia_smi)
    memory = 0.0
    with contextlib.suppress(ValueError, OSError, AttributeError):  # Windows does not tell
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    installed = shutil.which("ollama") is not None
    runners = tuple(one for one in seen if one is not None)
    return Found(runners, maker, tuple(cards), os.cpu_count() or 1, memory, installed)


def role_of(name: str, size: float) -> str:
    """What a model is for, by its name and size."""
    if size >= BIG_MODEL:
        return "heavy"
    return next((role for role, pattern in ROLES if pattern.search(name)), "fast")


def rows_for(roles: Mapping[str, tuple[str, float]]) -> Facts:
    """The tables [models] and [routes] for models of these roles and sizes."""
    models: Facts = {}
    for name, (role, size) in roles.items():
        told = {"size_gb": size} if size else {}
        models[name] = {**told, "purpose": list(PURPOSES[role])}
    by_size = sorted(roles, key=lambda name: roles[name][1])
    routes = {}
    for task in TASKS:
        order = (*ROW_ROLES.get(task, ()), *PURPOSES)
        routes[task] = sorted(by_size, key=lambda name: order.index(roles[name][0]))
    return {"models": models, "routes": routes} if models else {}


def propose(found: Found) -> Facts:
    """A configuration for what was found."""
    document: Facts = {"server": {"port": ServerSettings().port}}
    for kind, url, _ in found.runners:
        rows = document.setdefault("backends", {})
        rows[kind if kind not in rows else named_url(url)[0]] = {"url": url, "kind": kind}
    document["devices"] = {LOCAL: {"slots": 1}}
    if found.cards:
        total = found.video_memory
        reserve = 1.0 if total < 8 else 1.5 if total <= 24 else 2.0
        document["devices"][LOCAL]["vram_reserve_gb"] = reserve
        fits_all = all(0 < size <= total - reserve for size in found.models.values())
        document["router"] = {"require_gpu": found.maker == "nvidia" and fits_all}
    return {**document, **rows_of(found)}


def rows_of(found: Found) -> Facts:
    """The tables [models] and [routes] for what the runners have."""
    return rows_for({name: (role_of(name, size), size) for name, size in found.models.items()})


MODEL_TABLES = ("models", "routes")


def merge_answers(document: Facts, answers: Any, place: str) -> Facts:
    """What is proposed with what was answered: in the words of the file, or agent-router's."""
    if not isinstance(answers, dict):
        raise ConfigError(f"{place}: wants tables as a configuration file has them")
    answers = dict(answers)
    told = answers.get("models")
    if isinstance(told, dict) and {"items", "mode"} & told.keys():  # agent-router's
        del answers["models"]
        items = told.get("items")
        if not isinstance(items, list):
            raise ConfigError(f"{place}: models.items wants a list")
        document = {name: document[name] for name in document if name not in MODEL_TABLES}
        document.update(rows_for(dict(read_item(place, item) for item in items)))
    for table, values in answers.items():
        known = document.get(table, {})
        both = isinstance(known, dict) and isinstance(values, dict)
        document[table] = merge_rows_of(known, values) if both else values
    return document


def merge_rows_of(known: Facts, values: Facts) -> Facts:
    """A table with these values over what it has, row by row."""
    merged = dict(known)
    for name, value in values.items():
        both = isinstance(value, dict) and isinstance(known.get(name), dict)
        merged[name] = {**known[name], **value} if both else value
    return merged


def read_item(place: str, item: Any) -> tuple[str, tuple[str, float]]:
    """A model as agent-router's answers have it: name, role and size."""
    name, size = look_up(item, "name"), measured(look_up(item, "sizeGb")) or 0.0
    role = look_up(item, "role") or (role_of(name, size) if isinstance(name, str) else "")
    if not isinstance(name, str) or not isinstance(role, str) or role not in PURPOSES:
        raise ConfigError(
            f"{place}: models.items wants a name, and a role of {', '.join(PURPOSES)}"
        )
    return name, (role, size)


# ---- the questions


def ask_word(question: str, default: str, good: Callable[[str], str]) -> str:
    """An answer that `good` takes (it says what is wrong); what is left empty is the default."""
    while True:
        say("\n" + wrapped(question))
        told = input(f"  [{default}] > ").strip() or default
        wrong = good(told)
        if not wrong:
            return told
        say(wrapped(f"  {wrong}"))


def wrapped(text: str) -> str:
    """The text in lines that the terminal has room for."""
    width = max(20, shutil.get_terminal_size().columns - 1)
    cut: Any = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    lines = [wrap(line, width, **cut) or [""] for line in text.split("\n")]
    return "\n".join(part for parts in lines for part in parts)


def ask_yes(question: str, *, default: bool) -> bool:
    def good(word: str) -> str:
        return "" if word.lower() in ("y", "yes", "n", "no") else "say yes or no"

    return ask_word(question, "yes" if default else "no", good).lower().startswith("y")


ANY_RUNNER = "look for them"


def wrong_urls(text: str) -> str:
    names = parse_names("" if text == ANY_RUNNER else text)
    try:
        for name in names:
            parse_url(named_url(name)[1]["url"])
        parse_rows("these", "backends", names)
    except ValueError as error:
        return str(error)
    except ConfigError as error:
        twice = "twice" in str(error)
        return str(error) if twice else "wants a url like http://host:port, or NAME=URL"
    return ""


def wrong_number(text: str) -> str:
    return "" if re.fullmatch("[1-9][0-9]{0,2}", text) else "say a number from 1 to 999"


def wrong_place(text: str) -> str:
    return "" if text in ("box", "network") else "say box or network"


def ask_runners(question: str, document: Facts, found: Found) -> Found:
    """Have the runners that a person names in the proposal; what is left of what was found."""
    known = document.pop("backends", {})
    urls = ", ".join(row["url"] for row in known.values()) or ANY_RUNNER
    told = ask_word(question, urls, wrong_urls)
    if told == ANY_RUNNER:
        return found
    named = dict(named_url(one) for one in parse_names(told))
    names = {row["url"]: (name, row) for name, row in known.items()}  # which keep what was found
    document["backends"] = dict(names.get(row["url"], (name, row)) for name, row in named.items())
    kept = {row["url"] for row in document["backends"].values()}
    found = found._replace(runners=tuple(one for one in found.runners if one[1] in kept))
    for table in MODEL_TABLES:
        document.pop(table, None)
    document.update(rows_of(found))
    return found


def ask_all(document: Facts, found: Found) -> str:
    """Put what a person answers into the proposal; the key that was made, if any."""
    number = count(1)
    question = "Which runners? Their URLs, with commas between them; NAME=URL names one."
    found = ask_runners(f"{next(number)}. {question}", document, found)
    question = "How many requests at once on this box?"
    slots = ask_word(f"{next(number)}. {question}", "1", wrong_number)
    document["devices"][LOCAL]["slots"] = int(slots)
    if "models" in document:
        rows = document["models"].items()
        say(
            "\n"
            + "\n".join(
                f"  {name}: {', '.join(row['purpose']) or 'pictures'}" for name, row in rows
            )
        )
        question = "May `auto` choose among these models, by what they are good at?"
        if not ask_yes(f"{next(number)}. {question}", default=True):
            del document["models"], document["routes"]
    router, memory = document.get("router"), f"{found.video_memory:.0f} GiB"
    if router:
        question = f"Refuse models that would run in part on the CPU? The card has {memory}."
        router["require_gpu"] = ask_yes(
            f"{next(number)}. {question}", default=router["require_gpu"]
        )
    question = "Who may use llmq: this box, or the network with a key?"
    who = ask_word(f"{next(number)}. {question}", "box", wrong_place)
    return open_to_network(document) if who == "network" else ""


def open_to_network(document: Facts) -> str:
    """Let everybody in who has a key; the one key that was made, of which the file has the hash."""
    key = new_key()
    document["server"].update(host="0.0.0.0", require_key="remote")  # noqa: S104 - as was asked
    document["keys"] = {"me": {"key_hash": f"sha256:{hash_of(key)}", "rights": list(RIGHTS)}}
    return key


def new_key() -> str:
    return "llmq-" + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


# ---- the file


def toml_value(value: Any) -> str:
    """A value as TOML writes it: as JSON does, but for tables, and for what is never bare there."""
    if isinstance(value, dict):
        rows = [f"{toml_key(name)} = {toml_value(one)}" for name, one in value.items()]
        return f"{{ {', '.join(rows)} }}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else toml_value(name)


def toml_tables(table: str, values: Any) -> list[tuple[str, Facts]]:
    """A table of the configuration as TOML has it: headers, and what stands below each."""
    if table == "rules":
        return [("[[rules]]", row) for row in values]
    if table in ROW_TABLES:
        return [(f"[{table}.{toml_key(name)}]", row) for name, row in values.items()]
    return [(f"[{table}]", values)]


def render_toml(document: Facts) -> str:
    """The configuration as a TOML file, with what each key is for beside its first use."""
    lines = [
        f"# llmq's configuration, made by `llmq config init` of llmq {__version__}.",
        "# `llmq config check` checks it, `llmq config show` shows every setting there is.",
    ]
    for table, values in document.items():
        lines += ["", f"# {SETUP_NOTES[table]}"] if table in SETUP_NOTES else [""]
        cls = {**TABLES, **ROW_TABLES}.get(table)
        rows = known_settings({table: cls}) if cls else ()
        helps = {row.key.partition(".")[2]: row.help for row in rows}
        for header, row in toml_tables(table, values):
            lines.append(header)
            for name, value in row.items():
                about = helps.pop(name, "")
                lines.append(f"{toml_key(name)} = {toml_value(value)}{about and '  # ' + about}")
    return "\n".join(lines) + "\n"


def setup_path(options: argparse.Namespace) -> str:
    """Where the file is to be: where one is used already, else TOML where this Python reads it."""
    reads_toml = sys.version_info >= (3, 11)
    usual = os.path.join(CONFIG_PLACES[0], "llmq.toml" if reads_toml else "llmq.json")
    used = find_file(os.environ) or ""
    if used.endswith(".toml") and not reads_toml:
        used = ""
    return os.path.expanduser(options.output or used or usual)


def write_file(path: str, text: str, *, anew: bool) -> None:
    """Put a file in its place as a whole, readable by its owner alone; over another if `anew`."""
    target = os.path.realpath(path)
    draft = f"{target}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        made = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(made, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if anew:
            os.replace(draft, target)
        else:
            os.link(draft, target)  # which fails where one has come meanwhile
    except OSError as error:
        there = os.path.isfile(target) and not anew
        why = " is there already" if there else f": {error.strerror}"
        raise ConfigError(path + why) from None
    except ValueError as error:  # half a character
        raise ConfigError(f"{path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def with_flags(document: Facts, flags: Mapping[str, Any]) -> Facts:
    """The configuration with what is said on the command line."""
    known = {row.key: row for row in known_settings()}
    for key, value in flags.items():
        table, dot, name = key.partition(".")
        if dot:
            document.setdefault(table, {})[name] = parse_value("command line", known[key], value)
        elif key == "backends":
            document[key] = dict(named_url(one) for text in value for one in parse_names(text))
    return document


def compose(options: argparse.Namespace, path: str, *, silent: bool) -> tuple[str, str]:
    """The text of the file, and the key that was made with it, if any."""
    found = asyncio.run(survey(os.environ))
    say(str(found) if silent else wrapped(str(found)), error=silent)
    document, key, place = propose(found), "", options.answers or path
    if options.answers:
        document = merge_answers(document, load_document(options.answers), options.answers)
    if not silent:
        key = ask_all(document, found)
    document = with_flags(document, given_flags(options))
    settings = merge_layers([file_layer(place, resolved(place, document))])
    server_tls(settings.server)
    if path.endswith(".json"):
        return json.dumps(document, indent=2) + "\n", key
    return render_toml(document), key


def set_up(options: argparse.Namespace) -> int:
    """Look, ask and write; 1 where the person gave up, and nothing is written."""
    path, silent = setup_path(options), options.non_interactive or bool(options.answers)
    if not silent and not (os.isatty(0) and os.isatty(1)):
        raise ConfigError("config init: there is no terminal to ask in; add --non-interactive")
    there = os.path.exists(path) and not (options.overwrite or options.dry_run)
    if there and silent:
        raise ConfigError(f"{path} is there already: add --overwrite, or --output FILE")
    if not silent:
        with contextlib.suppress(ImportError):  # so that arrow keys move in a line
            import readline  # noqa: F401
    try:
        if there and not ask_yes(f"{path} is there already. Write it anew?", default=False):
            return give_up()
        text, key = compose(options, path, silent=silent)
        if options.dry_run:
            say(text.rstrip())
        elif not silent and not ask_yes(f"Write {path}?", default=True):
            return give_up()
    except (KeyboardInterrupt, EOFError):
        return give_up()
    if not options.dry_run:
        write_file(path, text, anew=there or options.overwrite)
        used = os.path.realpath(find_file(os.environ) or "") == os.path.realpath(path)
        say(f"wrote {path}; `llmq` uses it from now on" if used else f"wrote {path}")
    if key:
        say(f"the key for the network, shown only now:\n{key}", error=options.dry_run)
    return 0


def give_up() -> int:
    say("\nnothing was written")
    return 1


# ==== 57. Asking ==================================================================================
# How commands ask a running llmq: where it is, with which key, and what it answers.

ANSWER_SECONDS = 10.0  # for a running llmq to answer a command
MOST_ANSWERED = 16 * MIB  # of what it answers: ten thousand that wait are 3 MiB


def llmq_url(url: str | None) -> str:
    if url:
        return url.rstrip("/")
    server = read_settings({}, os.environ)[0].server
    scheme = "https" if server.tls_cert else "http"
    everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to be asked
    host = everywhere.get(server.host, server.host)
    return base_url(host, server.port, scheme) + server.base_path


def own_key(path: str | None) -> str:
    """The key that commands send: from --key-file or LLMQ_KEY, as command lines are seen by all."""
    key = secret_of("--key-file", path) if path else os.environ.get("LLMQ_KEY", "")
    try:
        return parse_key(key)
    except ValueError as error:
        raise ConfigError(f"{'--key-file' if path else 'LLMQ_KEY'}: {error}") from None


def trusted_tls(url: str) -> Any:
    """How whoever answers over TLS is checked: on this box by the certificate in its settings."""
    import ssl

    context, server = ssl.create_default_context(), read_settings({}, os.environ)[0].server
    if is_loopback(urlsplit(url).hostname or "") and server.tls_cert:
        context.check_hostname = False  # it is made for the name that others call this box
        context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0x80000)
        context.load_verify_locations(server.tls_cert)
    return context


def ask_llmq(
    url: str,
    order: Order,
    seconds: float | None = ANSWER_SECONDS,
    *,
    key: str = "",
    raw: bool = False,
) -> Any:
    """What a running llmq answers; StartError in plain words when there is none.

    It is an object; `raw` is the status and the body, whatever that is.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

    method, path, change = order
    data = None if change is None else render_json(change)
    headers = {"Content-Type": "application/json", "User-Agent": f"llmq/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = Request(url + path, data, headers, method=method)  # noqa: S310 - the user's own
        tls = [HTTPSHandler(context=trusted_tls(url))] if url.startswith("https:") else []
        with build_opener(ProxyHandler({}), *tls).open(request, timeout=seconds) as answer:
            body = read_bounded(answer, MOST_KEPT + KIB if raw else MOST_ANSWERED)
        facts = {} if raw else json.loads(body)
        if not isinstance(facts, dict) or "X-LLMQ-Id" not in answer.headers:
            raise ValueError("what answers is no llmq")
    except HTTPError as error:
        if "X-LLMQ-Id" in error.headers:
            with contextlib.suppress(*ODD_JSON, OSError, HTTPException):
                raise StartError(json.loads(read_bounded(error))["error"]["message"]) from None
        raise StartError(f"{url} answers {error.code}: is that llmq?") from None
    except (*ODD_JSON, OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or reason
        cure = "`llmq` starts one on this box, --url names another"
        raise StartError(f"no llmq answers at {url}: {why}; {cure}") from None
    return (answer.status, bytes(body)) if raw else facts


def read_bounded(answer: Any, most: int = MOST_ANSWERED) -> bytearray:
    """The body of an answer; ValueError or TimeoutError where it has no end."""
    until, data = time.monotonic() + ANSWER_SECONDS, bytearray()
    while more := answer.read1(64 * KIB):
        data += more
        if len(data) > most:
            raise ValueError("the answer is too long")
        if time.monotonic() > until:
            raise TimeoutError("the answer does not end")
    return data


def asked(options: argparse.Namespace) -> tuple[str, Callable[..., Any]]:
    """Where the llmq is that a command asks, and what asks it."""
    url = llmq_url(options.url)
    return url, functools.partial(ask_llmq, url, key=own_key(options.key_file))


# ==== 58. Command line ============================================================================
# What a person types: a table of commands, and what each does.  The words of other queues are taken
# for llmq's own, with a note.

LEASE_SECONDS = 60.0  # that a command has the device for without a word


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, of which only those that are given become options."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--config", metavar="FILE", help="configuration file")
    text = "a runner, as URL or NAME=URL; repeatable (default: look for those on this box)"
    parser.add_argument("--backend", dest="backends", action="append", metavar="URL", help=text)
    for row in known_settings():
        text = f"{row.help} (default: {row.shown_default or 'none'})".replace("%", "%%")
        parser.add_argument(row.flag, dest=row.key, help=text, **TYPES[row.type].flag)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmq",
        usage="llmq [COMMAND] [OPTIONS]",
        description="One queue in front of the local LLM runners of a box.",
        epilog=list_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"llmq {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="", prog="llmq", help=argparse.SUPPRESS
    )
    made = {name: commands.add_parser(name, help=row.help) for name, row in COMMANDS.items()}
    switch: Any = {"action": "store_true"}
    made["serve"].add_argument("--demo", **switch, help="with a built-in model that echoes")
    text = "with --demo: two simulated boxes, and people who use them"
    made["serve"].add_argument("--busy", **switch, help=text)
    text = "of what they do (default: 1)"
    made["serve"].add_argument("--seed", type=int, default=1, metavar="N", help=text)
    made["status"].set_defaults(once=True)
    made["mode"].add_argument("mode", **one_word_of("mode", [mode.value for mode in Mode]))
    made["top"].add_argument("--once", **switch, help="print it once, as where it is piped")
    text = "between looks (default: 1s)"
    made["top"].add_argument(
        "--interval", type=parse_duration, default=1.0, metavar="TIME", help=text
    )
    made["key"].add_argument("name", help="of whoever gets it")
    add_run(made["run"])
    add_models(made["models"])
    add_kept(made)
    add_config(made["config"])
    made["connect"].add_argument("program", nargs="?", default="", help="(default: all)")
    made["completion"].add_argument("shell", choices=("bash", "zsh", "fish"))
    for name, row in COMMANDS.items():
        if row.asks:
            text = "of the llmq to ask (default: the one on this box)"
            made[name].add_argument("--url", help=text)
            text = "with the key that it wants (default: the variable LLMQ_KEY)"
            made[name].add_argument("--key-file", metavar="FILE", help=text)
        if row.json:
            made[name].add_argument("--json", **switch, help=row.json)
        made[name].set_defaults(parser=made[name])
    add_flags(made["serve"])
    add_flags(made["config"])
    return parser


def list_commands() -> str:
    """The commands in their groups, for --help."""
    lines = ["Without a command it serves."]
    for group, rows in groupby(COMMANDS.items(), lambda item: item[1].group):
        lines += ["", f"{group}:", *[f"  {name:<10} {row.help}" for name, row in rows]]
    lines += ["", "`llmq COMMAND --help` tells more; `llmq serve --help` lists what has a flag."]
    return "\n".join(
        [*lines, "Clients, rules, models, devices, keys are tables of the file: see the README."]
    )


def one_word_of(what: str, known: Sequence[str]) -> dict[str, Any]:
    """What argparse is told of an argument that is one of these words."""

    def parse(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(misspelt(what, word, known))
        return word

    return {"type": parse, "metavar": "{" + ",".join(known) + "}"}


def add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("--device", metavar="NAME", help="(default: the only one)")
    text = "its class (default: as configured)"
    run.add_argument("--class", dest="priority", help=text, **one_word_of("class", CLASSES))
    run.add_argument("--unload", action="store_true", help="unload the device's models first")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")


def add_models(models: argparse.ArgumentParser) -> None:
    models.add_argument("action", nargs="?", **one_word_of("action", ("load", "unload")))
    models.add_argument("name", nargs="?", default="", help="of the model; to unload: * is any")
    models.add_argument("--on", default="any", metavar="BACKEND", help="where (default: any)")


def add_kept(made: Mapping[str, argparse.ArgumentParser]) -> None:
    """What the commands take that show what is kept: jobs, and what was used."""
    made["jobs"].add_argument("--mine", action="store_true", help="your own, not everybody's")
    for name in ("job", "result", "cancel"):
        made[name].add_argument("id", help="of the job")
    text = "how many, today among them (default: 7)"
    made["usage"].add_argument("--days", type=int, default=7, metavar="N", help=text)


def add_config(config: argparse.ArgumentParser) -> None:
    words = one_word_of("word", ("check", "show", "init"))
    config.add_argument("what", help="init: make a file", **words)
    group = config.add_argument_group("for init, which looks around, asks, and writes a file")
    group.add_argument("--non-interactive", action="store_true", help="ask nothing")
    text = "take what it says over what was found; JSON or TOML, and ask nothing"
    group.add_argument("--answers", metavar="FILE", help=text)
    text = "where to write (default: ~/.config/llmq/llmq.toml, below Python 3.11 .json)"
    group.add_argument("-o", "--output", metavar="FILE", help=text)
    group.add_argument("--overwrite", action="store_true", help="a file that is there")
    group.add_argument("--dry-run", action="store_true", help="print it, write nothing")


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace, odd: list[str]) -> None:
    """End with what there is in place of a word that is not known, and the nearest of it."""
    flag = next((word for word in odd if word.startswith("-")), "")
    if flag:
        known = re.findall(r"--[\w-]+", options.parser.format_usage())
        options.parser.error(misspelt("flag", flag.partition("=")[0], known))
    parser.error(misspelt("command", odd[0], COMMANDS))


OLD_COMMANDS = {
    "validate-config": ("config", "check"),
    "init": ("config", "init"),
    "configure": ("config", "init"),
}
OLD_FLAGS = {  # of `serve` in other queues, and what they are here
    "-p": ("--port",),
    "-H": ("--host",),
    "-b": ("--backend",),
    "-c": ("--config",),
    "-o": ("--backend",),
    "--backend-urls": ("--backend",),
    "--ollama-urls": ("--backend",),
    "-t": ("--first-byte-timeout", "--idle-timeout"),
    "--timeout": ("--first-byte-timeout", "--idle-timeout"),
    "--no-tui": (),
    "--wizard": (),
    "--detect": (),
}
WITHOUT_VALUE = ("--no-tui", "--wizard", "--detect")


def modernised(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line in the words of other queues in llmq's own; and a note of each word."""
    words, notes = command_first(arguments), []
    if words[0] in OLD_COMMANDS:
        notes.append(f"{words[0]} is {' '.join(OLD_COMMANDS[words[0]])} here")
        words[:1] = OLD_COMMANDS[words[0]]
    if words[0] == "run":  # what follows are the words of another program
        return words, notes
    usual: Mapping[str, Names] = {"-u": ("--url",), **dict.fromkeys(WITHOUT_VALUE, ())}
    known = OLD_FLAGS if words[0] == "serve" else usual
    if words[0] == "config":
        known = {**known, "-c": ("--config",)}
    told, rest = words[:1], iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if word[:2] in known and word[1:2] != "-" and len(name) > 2:  # -p8080
            name, equals, value = word[:2], "=", word[2:]
        if name not in known:
            told.append(word)
            continue
        notes.append(f"{name} is {' and '.join(known[name]) or 'not needed'} here")
        if name not in WITHOUT_VALUE:
            value = value if equals else next(rest, "")
            told += [f"{flag}={value}" for flag in known[name]]
    return told, notes


def command_first(arguments: Sequence[str]) -> list[str]:
    """The words with the command before all else; `serve` where there is none."""
    words, ahead = list(arguments), list[str]()
    if words[:1] == ["help"]:
        about = words[1:2]
        words = about if about and about[0] not in (*COMMANDS, "help") else [*about, "--help"]
        words = [word for word in words if word != "help"]
    while len(words) > 1 and re.fullmatch("(-u|--url)(=.*)?", words[0]):
        many = 1 if "=" in words[0] else 2
        if not words[many:] or words[many] not in COMMANDS:
            break
        ahead, words = [*ahead, *words[:many]], words[many:]
    late = [word for word in words[1:] if word == "serve" or word in OLD_COMMANDS]
    if words and words[0].startswith("-") and late:
        words.remove(late[0])
        words.insert(0, late[0])
    if not words or words[0] not in (*COMMANDS, *OLD_COMMANDS, "-h", "--help", "-V", "--version"):
        words.insert(0, "serve")
    return [words[0], *ahead, *words[1:]]


def cmd_key(options: argparse.Namespace) -> None:
    """A new key, which is shown this once, and the lines that let it in."""
    key = new_key()
    name, digest = options.name, hash_of(key)
    parse_rows("key", "keys", {name: {"key_hash": f"sha256:{digest}"}})
    if options.json:
        say(json.dumps({"name": name, "key": key, "key_hash": f"sha256:{digest}"}))
        return
    say(f"the key of {name}, shown only now: {key}\n")
    say(f'for the file:\n\n[keys."{name}"]\nkey_hash = "sha256:{digest}"\nrights = ["infer"]')


def cmd_mode(options: argparse.Namespace) -> None:
    answer = asked(options)[1](("POST", "/llmq/mode", {"mode": options.mode}))
    if options.json:
        say(json.dumps(answer))
        return
    say(f"mode is {printable(str(answer.get('mode')))}")


def show_rows(columns: Mapping[str, int], rows: Iterable[Sequence[Any]], empty: str) -> None:
    """Print a table, whatever is in it."""
    told = [("", [str(cell) for cell in row]) for row in rows]
    for _, text in table(columns, told, 140, empty)[1:]:
        say(printable(text.strip(), 1000))


def cmd_models(options: argparse.Namespace) -> None:
    url, ask = asked(options)
    if options.action and not options.name:
        raise ConfigError(f"models {options.action}: write the model's name behind it")
    if options.action:
        change = {"action": options.action, "model": options.name, "backend": options.on}
        answer = ask(("POST", "/llmq/models", change))
        if options.json:
            say(json.dumps(answer))
            return
        where = answer.get("backend") or "no backend has it loaded"
        say(printable(f"{options.action} {answer.get('model')}: {where}"))
        return
    snapshot = understood(ask(STATUS), url)
    backends, none = snapshot["backends"], snapshot["trouble"] or "none"
    pairs = [(name, one["name"], one) for one in backends for name in one["models"]]
    rows = [
        (
            name,
            at,
            name in one["loaded"],
            one.get("gpu_pct", {}).get(name),
            one["context"].get(name),
        )
        for name, at, one in pairs
    ]
    if options.json:
        titles = ("model", "backend", "loaded", "gpu_pct", "context")
        say(json.dumps([dict(zip(titles, row)) for row in rows], indent=2))
        return
    shown = [
        [name, at, "-" if not up else "yes" if part is None else f"{part}% GPU", f" {size or '-'}"]
        for name, at, up, part, size in rows
    ]
    show_rows(MODELS, shown, none)


def cmd_connect(options: argparse.Namespace) -> None:
    """Print what a program is to be told; nothing is changed."""
    recipes, key = find_recipes(options.program), own_key(options.key_file)
    url = llmq_url(options.url)
    if not re.match(r"https?://[^/\s]", url):
        raise ConfigError(f"--url: {printable(url)}: wants a url like http://box:11500")
    keyed = bool(key or (not options.url and read_settings({}, os.environ)[0].keys))
    model = "MODEL"
    try:
        listed = ask_llmq(url, ("GET", "/v1/models", None), key=key)["data"]
        names = [str(row["id"]) for row in listed if PLAIN_MODEL.fullmatch(str(row["id"]))]
        model = next((name for name in names if not EMBEDDING.search(name)), model)
    except StartError as error:  # it need not run for this
        keyed = keyed or "key" in str(error)
    fill = functools.partial(fill_in, base=url, key="YOUR-KEY" if keyed else NO_KEY, model=model)
    rows = [{"name": one.name, "where": fill(one.where), "text": fill(one.text)} for one in recipes]
    if options.json:
        say(json.dumps(rows, indent=2))
        return
    for number, row in enumerate(rows):
        say("\n" * bool(number) + f"# {row['name']}: {row['where']}")
        say(printable_lines(row["text"]))


def printable_lines(text: str) -> str:
    """A text of several lines as it may be shown, whatever is in it."""
    return "\n".join(printable(line, 1000) for line in text.split("\n"))


def cmd_completion(options: argparse.Namespace) -> None:
    """Print what a shell has to read to complete llmq's commands and flags."""
    parser = build_parser()
    flags = {
        name: re.findall(r"(?<![\w-])--[a-z][a-z-]+", one.format_help())
        for name in COMMANDS
        for one in [parser.parse_known_args([name, *ENOUGH.get(name, ())])[0].parser]
    }
    words = {name: " ".join(dict.fromkeys(some)) for name, some in flags.items()}
    if options.shell == "fish":
        for name, row in COMMANDS.items():
            say(f"complete -c llmq -n __fish_use_subcommand -a {name} -d {json.dumps(row.help)}")
            seen = f"'__fish_seen_subcommand_from {name}'"
            for flag in words[name].split():
                say(f"complete -c llmq -n {seen} -l {flag[2:]}")
        return
    cases = "\n".join(f'    {name}) words="{some}" ;;' for name, some in words.items())
    if options.shell == "zsh":
        say("autoload -U +X bashcompinit && bashcompinit")
    say(COMPLETION.replace("CASES", cases).replace("COMMANDS", " ".join(COMMANDS)))


ENOUGH = {  # the words without which a command is not understood
    "config": ("show",), "key": ("name",), "job": ("id",), "result": ("id",), "cancel": ("id",),
    "mode": ("open",), "completion": ("bash",),
}  # fmt: skip
COMPLETION = """_llmq() {
  local words="COMMANDS" word=${COMP_WORDS[COMP_CWORD]}
  if [ "$COMP_CWORD" -gt 1 ]; then case ${COMP_WORDS[1]} in
CASES
  esac; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _llmq llmq"""


def cmd_gpu(options: argparse.Namespace) -> None:
    """Show the graphics cards, and the memory of each device."""
    facts = asked(options)[1](("GET", "/v1/router/gpu", None))
    if options.json:
        say(json.dumps(facts, indent=2))
        return

    def of(value: Any, unit: str) -> str:
        return "-" if value is None else f"{value}{unit}"

    names = ("vramTotalMb", "vramUsedMb", "vramFreeMb")
    rows = [
        [
            card["name"],
            *(of(card[name], " MiB") for name in names),
            f" {of(card['utilizationPct'], ' %')}",
        ]
        for card in facts["gpus"]
    ]
    show_rows(CARDS, rows, facts["error"] or "no card that tells its memory")
    rows = [
        [
            name,
            *(of(row and row[f"{fact}_gb"], " GiB") for fact in ("total", "free")),
            f" {of(row and row['reserve_gb'], ' GiB')}",
        ]
        for name, row in facts["devices"].items()
    ]
    say("")
    show_rows(MEMORIES, rows, "none")


def cmd_jobs(options: argparse.Namespace) -> None:
    """Show the jobs that are kept: everybody's, or those of the key that asks."""
    query = "" if options.mine else "?all=1"
    jobs = asked(options)[1](("GET", f"/v1/jobs{query}", None))["data"]
    if options.json:
        say(json.dumps(jobs, indent=2))
        return
    names, now = ("id", "status", "class", "client", "model"), time.time()
    rows = [
        [*(job[name] for name in names), brief(now - job["created_at"]), f" {job['error'] or ''}"]
        for job in jobs
    ]
    show_rows(JOBS, rows, "none")


def job_path(options: argparse.Namespace) -> str:
    return f"/v1/jobs/{quote(options.id, safe='')}"


def cmd_result(options: argparse.Namespace) -> int:
    """Print what a job was answered with; 1 where it has not ended."""
    status, body = asked(options)[1](("GET", f"{job_path(options)}/result", None), raw=True)
    text = body.decode("utf-8", "replace")
    if status == HTTPStatus.ACCEPTED:
        say(f"job {options.id} is {json.loads(text)['status']}", error=True)
        return 1
    say(text)
    return 0


def cmd_job(options: argparse.Namespace) -> None:
    """Show or cancel one job."""
    method = "DELETE" if options.command == "cancel" else "GET"
    job = asked(options)[1]((method, job_path(options), None))
    if options.json:
        say(json.dumps(job, indent=2))
        return
    for name, value in job.items():
        shown = stamp(value) if name.endswith("_at") and value else value
        say(printable(f"{name:<13} {'-' if shown is None else shown}", 1000))


def cmd_usage(options: argparse.Namespace) -> None:
    """Show what was used, a row for each day, client and model."""
    rows = asked(options)[1](("GET", f"/llmq/usage?days={options.days}", None))["usage"]
    if options.json:
        say(json.dumps(rows, indent=2))
        return
    names = ("day", "client", "model", "requests", "hits", "tokens_in", "tokens_out")
    show_rows(
        USAGE_TABLE,
        [[*(row[name] for name in names), f" {row['seconds']:.1f}"] for row in rows],
        "nothing yet",
    )


def cmd_top(options: argparse.Namespace) -> None:
    url, ask = asked(options)
    plain = options.once or options.json or os.name != "posix" or os.environ.get("TERM") == "dumb"
    if plain or not (os.isatty(0) and os.isatty(1)):
        seen = os.isatty(1)  # else a program reads it, and gets all of it
        snapshot = ask(STATUS if seen else EVERYTHING)
        width = max(80, shutil.get_terminal_size((140, 0)).columns) if seen else 4000
        cast(Any, sys.stdout).reconfigure(errors="replace")  # a terminal may know fewer characters
        if options.json:
            say(json.dumps(snapshot, indent=2))
        else:
            say(plain_top(understood(snapshot, url), url, width))
    else:
        run_top(ask, url, max(0.1, options.interval))


def cmd_run(options: argparse.Namespace) -> int:
    import subprocess

    argv = options.argv[options.argv[:1] == ["--"] :]
    if not argv:
        raise ConfigError("run: write the command behind --")
    ask, place = asked(options)[1], "/llmq/leases"
    wish = {"class": options.priority, "ttl_s": LEASE_SECONDS, "unload": options.unload}
    wish["device"] = options.device
    lease = ask(("POST", place, wish), None)
    place = f"{place}/{lease['id']}"
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS / 4):
            try:
                ask(("POST", place, {"ttl_s": LEASE_SECONDS}))
            except StartError as error:  # noqa: PERF203 - the next one may get through
                say(f"llmq: the device may be in use by others: {error}", error=True)

    try:
        with subprocess.Popen(argv) as process:  # noqa: S603 - the user's own
            threading.Thread(target=renew, daemon=True).start()
            with forwarded_signals(process.pid):
                code = process.wait()
    except OSError as error:
        raise StartError(f"{argv[0]}: {error.strerror}") from None
    finally:
        ended.set()
        with contextlib.suppress(StartError):  # else it ends by itself
            ask(("DELETE", place, None))
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def forwarded_signals(pid: int) -> Iterator[None]:
    """A wish to stop goes to that process, which has Ctrl-C from the terminal itself."""

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    wanted: dict[int, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: forward}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hide_secrets(document: Facts) -> None:
    """Leave of each secret setting of a configuration only that it is there."""
    for table, cls in ROW_TABLES.items():
        for name in [fact.name for fact in fields(cls) if not fact.repr]:  # declared `secret`
            for row in document[table].values():
                many, value = isinstance(row[name], dict), row[name]
                row[name] = dict.fromkeys(value, HIDDEN) if many else value and HIDDEN


def cmd_config(options: argparse.Namespace) -> int:
    if options.what == "init":
        return set_up(options)
    settings, notes = read_settings(given_flags(options), os.environ)
    for note in notes:
        say(note, error=True)
    tables = as_document(settings)
    if options.what == "check":
        server_tls(settings.server)
        say(json.dumps({"good": True}) if options.json else "the configuration is good")
        return 0
    hide_secrets(tables)
    if options.json:
        say(json.dumps(tables, indent=2))
    else:
        for table, values in tables.items():
            rows = values.items() if isinstance(values, dict) else enumerate(values, 1)
            for name, value in rows:
                say(f"{table}.{name} = {json.dumps(value)}")
    return 0


class Command(NamedTuple):
    """One row of the table of commands."""

    group: str
    help: str
    run: Callable[[argparse.Namespace], int | None]
    json: str = ""  # what --json prints, where it has it
    asks: bool = True  # a running llmq


AS_TOLD = "print what llmq tells, as JSON"
RUN, SEE, STEER = "Run it", "See what it does", "Steer it"
COMMANDS = {
    "serve": Command(RUN, "run the queue", lambda options: asyncio.run(serve(options)), asks=False),
    "config": Command(
        RUN, "make, check or show the settings", cmd_config,
        "as a JSON configuration file, but for the keys", asks=False,
    ),
    "connect": Command(
        RUN, "what programs are told, so that they ask llmq", cmd_connect, "print it as JSON",
    ),
    "completion": Command(
        RUN, "what bash, zsh or fish read to complete commands", cmd_completion, asks=False,
    ),
    "key": Command(
        RUN, "make a key, and the lines of the file that let it in", cmd_key,
        "print it as JSON", asks=False,
    ),
    "status": Command(SEE, "what a running llmq does: top --once", cmd_top, AS_TOLD),
    "top": Command(SEE, "watch and steer it in the terminal", cmd_top, AS_TOLD),
    "models": Command(SEE, "the models; load or unload one", cmd_models, AS_TOLD),
    "gpu": Command(SEE, "graphics cards and their memory", cmd_gpu, AS_TOLD),
    "jobs": Command(SEE, "the jobs that are kept, the latest first", cmd_jobs, AS_TOLD),
    "job": Command(SEE, "one job", cmd_job, AS_TOLD),
    "result": Command(SEE, "what came of a job, as it was answered", cmd_result),
    "usage": Command(SEE, "what was used, by day, client and model", cmd_usage, AS_TOLD),
    "mode": Command(STEER, "open, priority (only class high starts) or paused", cmd_mode, AS_TOLD),
    "cancel": Command(STEER, "end a job that waits or runs", cmd_job, AS_TOLD),
    "run": Command(STEER, "run a command that has a whole device meanwhile", cmd_run),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit code 0 done, 2 configuration, 78 not startable so, 1 anything else."""
    arguments, notes = modernised(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options, odd = parser.parse_known_args(arguments)
    if odd:
        refuse(parser, options, odd)
    try:
        for note in notes:
            say(note, error=True)
        return COMMANDS[options.command].run(options) or 0
    except (ConfigError, StartError) as error:
        say(f"llmq: {printable(str(error), 1000)}", error=True)
        refused = 78 if options.command == "serve" else 1
        return 2 if isinstance(error, ConfigError) else refused
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        pass
    return 0


# ==== 59. Web page ================================================================================
# What browsers get at `/` and `/llmq`: no build step, nothing from elsewhere, a client of events
# and control routes like any other.  Names are hostile until shown as text: nothing here parses
# markup (the response's policy forbids it), nothing runs without the response's own nonce.

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llmq</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'
><rect width='16' height='16' rx='4' fill='%232a62d4'/><path d='M4 5h8M4 8h8M4 11h4'
stroke='%23fff' stroke-width='1.6' stroke-linecap='round'/></svg>">
<style nonce="NONCE">
:root { color-scheme: light dark; --bg: light-dark(#f4f5f7, #0e1014);
  --card: light-dark(#fff, #16191f); --line: light-dark(#e4e7eb, #272c35);
  --fill: light-dark(#eef0f3, #22262e); --ink: light-dark(#171a1f, #e7e9ed);
  --soft: light-dark(#586070, #9ba4b2); --blue: light-dark(#2a62d4, #83b1ff);
  --green: light-dark(#1b7a45, #62cf91); --amber: light-dark(#8a5700, #efbb60);
  --red: light-dark(#b3261e, #ff938a); --wait: light-dark(#b3bac6, #566072) }
:root[data-theme=light] { color-scheme: light } :root[data-theme=dark] { color-scheme: dark }
.blue { --tone: var(--blue) } .green { --tone: var(--green) } .amber { --tone: var(--amber) }
.red { --tone: var(--red) } .grey { --tone: var(--soft) } .word { flex: none; color: var(--tone) }
* { box-sizing: border-box; margin: 0 } [hidden] { display: none !important }
body { background: var(--bg); color: var(--ink); overflow-wrap: anywhere; font: 14px/1.45 Inter,
  system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums }
.wide { max-width: 1600px; margin: 0 auto; padding: 0 20px } h1 { font-size: 17px }
h2 { font-size: 14px } h2, b { font-weight: 600 } .tags { flex-wrap: wrap; gap: 4px }
small, dt, figcaption, footer, th { font-size: 12px; color: var(--soft); font-weight: 400 }
code { font: 12px/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace }
.clip { overflow: hidden; white-space: nowrap; text-overflow: ellipsis } .lost main { opacity: .6 }
.line { display: flex; gap: 8px; align-items: center; min-width: 0 } .push { margin-left: auto }
.dot { flex: none; width: 8px; height: 8px; border-radius: 50%; background: var(--tone) }
button, input { height: 30px; padding: 0 11px; font: inherit; color: inherit; background: none;
  border: 1px solid var(--line); border-radius: 7px } .note button { border-color: var(--tone) }
button { cursor: pointer; white-space: nowrap } button:hover { background: var(--fill) }
[aria-disabled=true] { opacity: .35 } .top.wide { flex-wrap: wrap; gap: 10px; padding-block: 14px }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px } tr:focus { outline: 0 }
.icon { width: 30px; padding: 0; border-color: transparent; color: var(--soft) }
.danger, .danger:hover { background: var(--red); border-color: var(--red); color: var(--card) }
svg { fill: none; stroke-width: 1.7; stroke-linecap: round; stroke-linejoin: round }
h1 svg { width: 22px; height: 22px; border-radius: 6px; background: #2a62d4; stroke: #fff }
#modes { gap: 0; padding: 3px; border-radius: 9px; background: var(--fill); position: relative }
#modes label { line-height: 28px; padding: 0 14px; border-radius: 7px; color: var(--soft);
  cursor: pointer; text-align: center } #modes input { position: absolute; opacity: 0 }
#modes :has(:checked) { background: var(--card); color: var(--ink); font-weight: 600;
  box-shadow: 0 1px 2px #0002, 0 0 0 1px var(--line) }
#modes :has(:focus-visible) { outline: 2px solid var(--blue) } [type=checkbox] { height: auto }
.note { padding: 8px 14px; margin-bottom: 12px; border-radius: 10px;
  border: 1px solid color-mix(in srgb, var(--tone) 35%, var(--card)) } .note, .high, [aria-current] {
  background: color-mix(in srgb, var(--tone, var(--blue)) 10%, var(--card)) !important }
main, aside { display: grid; gap: 14px; grid-template-columns: repeat(12, minmax(0, 1fr)) }
main > *, aside > * { grid-column: span 12 } main > figure, aside > * { grid-column: span 6 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
#figures { display: grid; grid-template-columns: repeat(5, 1fr); padding: 14px 0 }
#figures div { padding: 0 18px; border-left: 1px solid var(--line); min-width: 0 }
#figures div:first-child { border: 0 } dd + dd { font: inherit; font-size: 12px; color: var(--soft) }
dd { font-size: 28px; line-height: 1.25; font-weight: 600; letter-spacing: -.02em }
figure { padding: 14px 18px 10px } figcaption b { color: var(--ink) }
figure svg { display: block; width: 100%; height: 46px; margin: 6px 0 4px; overflow: visible }
figure path { vector-effect: non-scaling-stroke; stroke: var(--blue) }
.area { stroke: none; fill: var(--blue); opacity: .13 } .base { stroke: var(--line) }
.head { flex-wrap: wrap; min-height: 50px; padding: 9px 18px } .head input { width: 190px }
table { width: 100%; border-collapse: collapse; table-layout: fixed } td :is(b, small) { display: block }
th, td { padding: 7px 9px; border-top: 1px solid var(--line); text-align: left }
:is(th, td):first-child { padding-left: 18px } :is(th, td):last-child { padding-right: 14px }
.n, .acts { text-align: right !important } .n, .acts, figure { white-space: nowrap }
.runs .pos { color: var(--blue) } tr[aria-current] .pos { box-shadow: inset 3px 0 var(--blue) }
.tag { display: inline-block; padding: 0 8px; border-radius: 6px; font-size: 12px; color: var(--soft);
  line-height: 20px; white-space: nowrap; background: var(--fill) } .tag.high { color: var(--blue) }
.bar { display: flex; height: 7px; border-radius: 4px; overflow: hidden; background: var(--fill) }
.thin { height: 4px; margin-top: 3px } .bar i, .key { background: var(--blue) }
.key { width: 9px; height: 9px; margin-left: 8px; border-radius: 3px } .w.w { background: var(--wait) }
.f.f { background: #d79b2c } .empty code { flex: 1; padding: 6px 10px; border-radius: 7px;
  background: var(--fill); color: var(--ink); overflow-wrap: anywhere }
.empty { padding: 18px 18px 22px; border-top: 1px solid var(--line); color: var(--soft) }
.empty b { color: var(--ink) } .empty .line { margin-top: 12px; max-width: 820px }
.device { border-top: 1px solid var(--line); padding: 10px 18px 12px } .slots { gap: 3px }
.slots i { width: 14px; height: 8px; border-radius: 3px; box-shadow: inset 0 0 0 1px var(--wait) }
.slots .on { background: var(--blue); box-shadow: none } .backend { padding-top: 9px }
.backend > * + * { margin-left: 16px } .backend > :not(.line) { display: block }
.alarm.alarm { color: var(--red); white-space: normal } .backend .tags { margin-block: 4px }
dialog { width: min(430px, 92vw); margin: auto; padding: 20px 22px; border-radius: 14px;
  border: 1px solid var(--line); background: var(--card); color: var(--ink) }
footer.wide { flex-wrap: wrap; padding-block: 16px 24px } dialog::backdrop { background: #0008 }
dialog p, dialog table { margin: 8px 0 16px } #connect { width: min(760px, 94vw) }
pre { padding: 10px 12px; margin-bottom: 16px; border-radius: 8px; background: var(--fill); overflow: auto;
  font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace } select { font: inherit; height: 30px } dialog td { border: 0; padding: 4px 0 !important }
kbd { margin-right: 4px; padding: 1px 6px; border: 1px solid var(--line); border-radius: 5px }
#toasts { position: fixed; right: 0; bottom: 0; max-width: 440px; padding: 16px; color: var(--bg);
  pointer-events: none }
#toasts div { margin-top: 8px; padding: 9px 14px; border-radius: 9px; background: var(--ink) }
.pos { width: 66px } .time { width: 140px } .class { width: 84px } .reason { width: 26% }
.acts { width: 124px } .how { width: 152px } .bars { width: 36% } .n { width: 78px }
.day { width: 112px } .did { width: 24% } .made { width: 32% } #jobs .how { width: 200px }
#used b { color: var(--ink) } a { color: var(--blue) }
#used .head { column-gap: 22px } #used summary { padding: 4px 18px; border-top: 1px solid var(--line) }
#clients tr { display: grid; grid-template-columns: minmax(0, 1fr) repeat(4, 45px);
  align-items: center; padding: 7px 14px 7px 18px; border-top: 1px solid var(--line) }
#clients :is(td, th) { width: auto; padding: 0; border: 0 } #clients .who { display: contents }
#clients b { grid-area: 1 / 1 / 2 / 3 } #clients td.acts { grid-area: 1 / 3 / 2 / 6 }
#clients small { grid-area: 2 / 1 } #clients td.n { grid-row: 2 } #clients .bar { grid-column: 1 / -1; order: 1 }
#clients thead tr { align-items: baseline } #clients thead .acts { display: none }
[aria-pressed=true] { color: var(--blue); background: var(--fill) } #blocked:empty { display: none }
#blocked { padding: 4px 18px 12px } .backend .line + .line { margin-top: 4px }
summary { cursor: pointer; color: var(--soft); font-size: 12px; line-height: 30px }
@media (pointer: coarse) { button, input, summary, td a, #modes label { min-height: 44px;
  min-width: 44px; line-height: 44px } td a { display: inline-block }
  #clients td.acts { grid-area: 4 / 1 / 5 / -1; order: 2 } }
@media (min-width: 1100px) {
  main > #figures { grid-column: span 6 } main > figure { grid-column: span 3 } }
@media (min-width: 1440px) { main { align-items: start; grid-template-rows: auto auto auto 1fr }
  main > :nth-child(-n + 3) { align-self: stretch } aside > * { grid-column: span 12 }
  main > #queue, main > #used, main > #recent { grid-column: span 9 }
  main > aside { grid-area: 2 / 10 / span 3 / span 3 } }
@media (max-width: 720px) { .wide { padding-inline: 12px } main, aside { gap: 10px }
  main > *, aside > * { grid-column: span 12 !important } .top > :last-child { margin-left: auto }
  main > figure { grid-column: span 6 !important; padding: 12px 14px 8px } #about { width: 100% }
  #modes { order: 1; width: 100% } #modes label { flex: 1 } .head, .empty, .device, #used summary {
  padding-inline: 14px } .head input { flex: 1; width: 90px } .empty .line { flex-wrap: wrap }
  #figures { grid-template-columns: repeat(6, 1fr); row-gap: 12px } #figures div {
  grid-column: span 2; padding: 0 14px } #figures div:nth-child(n + 4) { grid-column: span 3 }
  #figures div:nth-child(4) { border: 0 } main thead, #recent .n, #help { display: none }
  main tr { display: grid; gap: 4px 10px; align-items: center; padding: 9px 14px; border-top:
  1px solid var(--line); grid-template-columns: 60px minmax(0, 1fr) auto } main td { border: 0;
  width: auto !important; min-width: 0; padding: 0 !important } .time, .how { text-align: right }
  :is(#recent, #used) tr { grid-template-columns: minmax(0, 1fr) auto } .bars { grid-column: span 2 }
  #used h2 { width: 100% } .day { grid-area: 1 / 2 } .day, .did + .did { text-align: right }
  #clients thead { display: block } #clients tr { gap: 0; padding-inline: 14px }
  main [aria-current] { box-shadow: inset 3px 0 var(--blue) }
  main [aria-current] .pos.pos { box-shadow: none } }
</style></head>
<body>
<header class="wide line top"><h1 class="line"><svg viewBox="0 0 16 16" aria-hidden="true"><path
  d="M4 5h8M4 8h8M4 11h4"/></svg>llmq</h1><p class="line" id="state"></p>
  <div class="line push" id="modes" role="radiogroup" aria-label="Mode"></div>
  <div class="line"><button id="connecting">Connect</button>
  <button id="theme">Theme</button><button id="help">Keys</button></div></header>
<section class="wide" id="notes" aria-label="Notices" aria-live="polite"></section>
<main class="wide"><dl class="card" id="figures"></dl>
  <figure class="card" id="rate"><figcaption class="line">Requests per minute<b class="push"></b>
    </figcaption><svg viewBox="0 0 100 40" preserveAspectRatio="none"><path class="base"
    d="M0 40H100"/><path class="area"/><path/></svg><small class="line"></small></figure>
  <figure class="card" id="wait"><figcaption class="line">Oldest wait<b class="push"></b>
    </figcaption><svg viewBox="0 0 100 40" preserveAspectRatio="none"><path class="base"
    d="M0 40H100"/><path class="area"/><path/></svg><small class="line"></small></figure>
  <section class="card" id="queue" aria-label="Queue"><div class="line head"><h2>Queue</h2>
    <small></small><input class="push" id="filter" type="search" placeholder="Filter"
    aria-label="Filter"><button id="all">Cancel all waiting</button></div>
    <table role="table"></table><div class="empty"></div></section>
  <aside aria-label="Runners and clients"><section class="card" aria-label="Devices and backends">
    <div class="line head"><h2>Devices and backends</h2></div><div id="devices"></div></section>
    <section class="card" id="clients" aria-label="Clients"><div class="line head"><h2>Clients</h2>
    <small></small></div><table role="table"></table><div class="empty"></div>
    <div class="line tags" id="blocked"></div></section></aside>
  <section class="card" id="used" aria-label="Jobs and usage" hidden><div class="line head"></div>
    <details id="jobs"><summary></summary><table role="table"></table><div class="empty"></div></details>
    <details id="usage"><summary></summary><table role="table"></table><div class="empty"></div></details>
  </section>
  <section class="card" id="recent" aria-label="Recent requests"><div class="line head"><h2>Recent
    requests</h2><small class="line push"><i class="key w"></i>waited<i class="key f"></i>to the
    first token<i class="key"></i>answering</small><button id="more"></button></div>
    <table role="table"></table><div class="empty"></div></section></main>
<footer class="wide line"><span id="about"></span><span class="push">Clients use</span>
  <code id="base"></code><button id="copy">Copy</button><noscript>This page needs JavaScript.</noscript>
</footer>
<dialog id="connect" aria-label="Connect a client"><h2>Connect a client</h2><p></p><pre></pre><form
  class="line" method="dialog"><button type="button" id="take">Copy</button><button class="push">Close
  </button></form></dialog><div id="toasts" role="status"></div>
<dialog id="ask" aria-label="Confirm"><h2></h2><p></p><form class="line" method="dialog"><button
  class="push">Leave it</button><button class="danger" value="go" autofocus></button></form></dialog>
<dialog id="map" aria-label="Keys"><h2>Keys</h2><table></table><form class="line" method="dialog">
  <label class="line"><input type="checkbox" id="single">Shortcuts of one character</label>
  <button class="push">Close</button></form></dialog>
<script nonce="NONCE">
'use strict';
const $ = id => document.getElementById(id), q = (id, what) => $(id).querySelector(what);
const BASE = 'BASEPATH', KEYED = KEYED_HERE, RECIPES = RECIPES_HERE;  // BASE goes before every route
const MODES = ['open', 'priority', 'paused'], CLASSES = ['low', 'normal', 'high'];
const THEMES = ['system', 'light', 'dark'], SPAN = 15 * 60e3;  // ms that the plots show at most
const TONES = {up: 'green', loading: 'amber', draining: 'amber', unknown: 'grey'};
let snap, got, live, stream, again, shade, whole = false, chosen = '', place = 0;
let found = [];  // by the filter, of those that wait beyond what the snapshot shows
const opened = new Set();  // backends whose models are shown
const LISTS = {usage: {path: '/llmq/usage?days=7'}, jobs: {path: '/v1/jobs?all=1'}};  // by section
const CLOCK = new Intl.DateTimeFormat([], {dateStyle: 'short', timeStyle: 'medium'});
let past = [], day;  // [when, ended so far, oldest wait], as far as this page saw it; llmq's history
// `h` describes an element and `render` makes the page so; a node stays while its key does, and
// with it the focus.  Text is only ever set as text: whatever a client calls itself is a name.
const h = (tag, className = '', kids = '', props) => ({tag, kids, props: {...props, className}});
function render(at, kids) {
  if (!Array.isArray(kids)) return void (at.textContent === `${kids}` || (at.textContent = kids));
  const old = at.nodes ?? new Map(), focus = document.activeElement;
  const list = kids.map((kid, i) => kid && [kid.props.key ?? i + kid.tag, kid]).filter(Boolean);
  at.nodes = new Map(list.map(([k, kid]) => [k, old.get(k) ?? document.createElement(kid.tag)]));
  for (const [key, node] of old) if (!at.nodes.has(key)) node.remove();
  list.forEach(([key, {props, kids: inner}], i) => {
    const node = at.nodes.get(key);
    for (const name in props) if (node[name] !== props[name]) node[name] = props[name];
    render(node, inner);
    if (at.children[i] !== node) at.insertBefore(node, at.children[i] ?? null); });
  if (focus !== document.activeElement && at.contains(focus)) focus.focus();
}
const td = (cls, kids, props) => h('td', cls, kids, {role: 'cell', ...props}), dot = h('i', 'dot');
const two = (first, second) => [h('b', '', first), h('small', 'clip', second)];
const act = (sign, title, onclick, off = false, more) =>
  h('button', 'icon', sign, {title, ariaLabel: title, onclick, ariaDisabled: `${off}`, ...more});
const button = (verb, what, onclick, cls = '') =>
  h('button', cls, verb, {ariaLabel: `${verb} ${what}`, onclick});
const tags = words => words.map(word => word && h('span', `tag ${word}`, word));
const bar = (cls, parts) => h('div', `bar ${cls}`, parts.map((part, i) =>
  h('i', 'wf '[i + 3 - parts.length], '', {style: `width: ${100 * part}%`})));
function table(id, heads, rows, empty) {
  const columns = Object.entries(heads).map(([cls, text]) => h(text ? 'th' : 'td', cls, text,
    text && {scope: 'col'}));
  render(q(id, 'table'), [h('thead', '', [h('tr', '', columns)]), h('tbody', '', rows)]);
  render(q(id, '.empty'), empty);
  q(id, 'table').hidden = !(q(id, '.empty').hidden = rows.length > 0);
}
const num = value => value.toLocaleString('en-US'), age = () => (performance.now() - got) / 1000;
const plural = (n, word) => `${num(n)} ${word}${n === 1 ? '' : 's'}`;
const bytes = n => n < 2 ** 20 ? `${Math.ceil(n / 1024)} KiB` : `${(n / 2 ** 20).toFixed(1)} MiB`;
const sum = all => all.reduce((a, b) => a + b, 0), brief = s => dur(s).split(' ', 2).join(' ');
function dur(s, fine) {
  const t = Math.max(0, Math.round(s)), m = Math.floor(t / 60), hours = Math.floor(m / 60);
  return fine && s < 0.95 ? `${Math.round(1000 * s)} ms` : fine && s < 10 ? `${s.toFixed(1)} s` :
    t < 60 ? `${t} s` : m < 60 ? `${m} min ${t % 60} s` : `${hours} h ${m % 60} min`;
}
function toast(text, kind) {  // the latest of its kind, and of all kinds the latest three
  const made = Object.assign(document.createElement('div'), {kind, textContent: text});
  const others = [...$('toasts').children].filter(one => one.kind !== kind);
  $('toasts').replaceChildren(...others.slice(-2), made), setTimeout(() => made.remove(), 5000);
}
async function change(method, path, body, said) {
  const headers = {'Content-Type': 'application/json'}, sent = body && JSON.stringify(body);
  try {
    const url = BASE + (path[0] === '/' ? path : `/llmq/${path}`);
    const answer = await fetch(url, {method, headers, body: sent});
    toast((told => answer.ok ? said(told) : `Not done: ${told.error.message}`)(await answer.json()),
      method);
  } catch { toast('llmq does not answer: nothing was changed', method); }
}
function sure(title, text, verb, ...order) {  // what cannot be undone
  render(q('ask', 'h2'), title), render(q('ask', 'p'), text), render(q('ask', '.danger'), verb);
  $('ask').onclose = () => $('ask').returnValue && change(...order);
  $('ask').returnValue = '', $('ask').showModal();
}
const find = id => [...snap.requests, ...found].find(one => one.id === id);
const setMode = mode => change('POST', 'mode', {mode}, told => `The mode is ${told.mode}`);
function move(id, by) {
  const one = find(id), priority = one && CLASSES[CLASSES.indexOf(one.class) + by];
  if (priority && one.state === 'waiting')
    change('POST', `requests/${id}`, {priority}, told => `${one.client}: class ${told.class}`);
}
const cancel = one => one && sure('Cancel this request?', `${one.client} wants ${one.model}, and is ` +
  'told. This cannot be undone.', 'Yes, cancel', 'DELETE', `requests/${one.id}`, null,
  () => `Cancelled: ${one.client}, ${one.model}`);
const cancelAll = ({name = '', waiting: many} = {}) => many && sure(  // the queue has no name
  `Cancel ${plural(many, 'waiting request')}?`, `${name ? `All of ${name}` : 'Everything'} that ` +
  'waits; what runs goes on. This cannot be undone.', 'Yes, cancel', 'DELETE',
  'requests?state=waiting' + (name && '&client=') + encodeURIComponent(name), null,
  told => `Cancelled ${plural(told.cancelled, 'request')}`);
const cancelJob = ({id, client, model}) => sure('Cancel this job?', `${client} wants ${model}. This ` +
  'cannot be undone.', 'Yes, cancel', 'DELETE', `/v1/jobs/${encodeURIComponent(id)}`, null,
  () => (look(true), `Cancelled: the job of ${client}, ${model}`));
const steer = (name, body) => ['POST', ...'blocked' in body && name.startsWith('ip:') ?
  ['ips', {ip: name.slice(3), ...body}] : [`clients/${encodeURIComponent(name)}`, body],
  told => `${name}: ${Object.keys(body).map(key => `${key} ${told[key] === '' ? 'none' : told[key]}`)}`];
const vip = one => one && change(...steer(one.name, {class: one.class === 'high' ? null : 'high'}));
const boost = one => one && change(...steer(one.name, {boost: !one.boost}));
const unblock = name => change(...steer(name, {blocked: false}));
const block = one => one && (one.blocked ? unblock(one.name) : sure(`Block ${one.name}?`,
  'What waits and runs of it is ended, and nothing of it is let in until you unblock it.',
  'Yes, block', ...steer(one.name, {blocked: true})));
const drain = ({name, state}) => change('POST', `backends/${encodeURIComponent(name)}`,
  {draining: state !== 'draining'}, told => `${told.name} is ${told.state}`);
const load = (action, model, backend) => change('POST', 'models', {action, model, backend},
  () => `Asked for: ${action} ${model} on ${backend}`);
function connect(at = 0) {  // what a program is told, with this page's own address
  const models = snap?.backends.flatMap(one => one.models) ?? [], [, where, text] = RECIPES[at];
  const model = models.find(name => /^[a-z0-9][\w.:/+-]*$/i.test(name) && !/embed/i.test(name)) ?? 'MODEL';
  const told = {BASE: location.origin + BASE, KEY: KEYED ? 'YOUR-KEY' : 'none', MODEL: model};
  const fill = words => words.replace(/\b(BASE|KEY|MODEL)\b/g, word => told[word]);
  render(q('connect', 'p'), [h('label', 'line', [h('span', '', 'Program'), h('select', '',
    RECIPES.map(([name], i) => h('option', '', name, {value: i, selected: i === at})),
    {onchange: event => connect(+event.target.value)})]), h('small', '', `It goes into ${fill(where)}.`)]);
  render(q('connect', 'pre'), fill(text));
  if (!$('connect').open) $('connect').showModal();
}
async function copy(code) {
  try { await navigator.clipboard.writeText(code.textContent); toast('Copied', 'copy'); } catch {
    getSelection().selectAllChildren(code);  // a page that came by plain HTTP may not write there
    toast('Marked: copy it with Ctrl+C', 'copy'); }
}
function draw() {
  if (!snap) return;
  const {queue, mode, recent, trouble, draining, config_error: wrong} = snap;
  const down = snap.backends.filter(one => one.state === 'down').map(one => one.name);
  const ready = snap.backends.some(one => one.state === 'up'), notes = [  // the first names it all
    [draining, 'amber', 'stopping', 'llmq was told to stop: what runs may finish, nothing new is let ' +
      'in.' + (live ? '' : ' It is asked again each second.')],
    [!live, 'grey', 'reconnecting', !draining &&
      'llmq does not answer: this is how it was. It is asked again each second.'],
    [trouble, 'red', 'no runner', trouble],
    [mode === 'paused', 'amber', mode, 'Paused: nothing starts, what waits is safe.', 'Resume'],
    [mode === 'priority', 'amber', 'priority only', 'Only high starts; the rest is safe.', 'Open'],
    [!ready, 'amber', 'backend starts'], [queue.running, 'blue', 'working'], [true, 'green', 'idle'],
    [!trouble && down.length, 'amber', '', `${down.join(' and ')} ${down.length > 1 ? 'are' : 'is'} ` +
      'down: what only they have waits.'], [wrong, 'red', '', `The configuration was not read again: ${wrong}`]].filter(one => one[0]);
  const [, tone, word] = notes[0], {waiting} = queue;
  document.title = `${waiting ? `(${waiting}) ` : ''}llmq — ${word}`;
  document.body.className = live ? '' : 'lost';
  render($('state'), [h('i', `dot ${tone}`), h('b', `word ${tone}`, word)]);
  render($('modes'), MODES.map(name => h('label', '', [h('input', '', '', {type: 'radio',
    name: 'mode', checked: name === mode, onchange: () => setMode(name)}),
    h('span', '', name[0].toUpperCase() + name.slice(1))],  // a click leaves the arrows to the queue
    {onpointerup: () => setTimeout(() => document.activeElement.blur())})));
  render($('notes'), notes.filter(one => one[3]).slice(0, 3).map(([, color, key, text, verb]) =>
    h('div', `line note ${color}`, [dot, h('span', '', text.split('`').map((part, i) => h(i % 2 ?
      'code' : 'span', '', part))), verb && h('button', 'push', verb,
      {onclick: () => setMode('open')})], {key})));
  drawFigures(snap), drawQueue(snap), drawBackends(snap), drawClients([...snap.clients]);
  drawUsed(snap), drawUsage(LISTS.usage), drawJobs(LISTS.jobs);
  drawRecent(recent.slice(0, whole ? 50 : 10), recent.length);
  render($('about'), `llmq ${snap.version}, up ${dur(snap.uptime_s + age())}`);
}
function drawFigures({queue, devices, requests, requests_total: {done = 0, client_left: gone = 0,
  cancelled = 0, ...failed}}) {
  const rate = sum(requests.map(one => one.tokens_per_s ?? 0)), left = gone + cancelled;
  const {waiting, running, by_class: {high, low}} = queue, list = counts => Object.entries(counts)
    .filter(one => one[1]).sort((a, b) => b[1] - a[1]).map(([word, n]) => `${num(n)} ${word}`)
    .join(', ').replaceAll('_', ' ');
  render($('figures'), [
    ['Waiting', num(waiting), list({high, low}) || (waiting ? 'all normal' : 'nobody')],
    ['Running', num(running), rate ? `${num(Math.round(rate))} tokens/s` :
      `of ${plural(sum(devices.map(one => one.slots)), 'slot')}`],
    ['Oldest wait', waiting ? brief(queue.oldest_wait_s + age()) : '–',
      `room for ${num(queue.full_at - waiting)}`], ['Done', num(done),
      left ? `${num(left)} left or cancelled` : 'since the start'],
    ['Failed', num(sum(Object.values(failed))), list(failed) || 'none'],
  ].map(([name, value, title]) => h('div', '', [h('dt', '', name), h('dd', '', value),
    h('dd', 'clip', title, {title})])));
}
function drawQueue({requests, queue}) {
  const want = wanted(), shown = requests.length - queue.running;
  const base = `${location.origin}${BASE}/v1`, pastes = [base, `curl ${base}/chat/completions -H 'Content-` +
    `Type: application/json' -d '{"messages": [{"role": "user", "content": "hello"}]}'`];
  const heads = {pos: 'Place', who: 'Client, model', time: 'Waited, starts in', class: 'Class',
    reason: 'Why', acts: ''}, known = new Set(requests.map(one => one.id)), all = !want ? requests :
    [...requests, ...found.filter(one => !known.has(one.id))], rows = all.filter(one => ['client',
    'model', 'class', 'request_id', 'reason'].some(name => one[name].toLowerCase().includes(want)));
  table('queue', heads, rows.map(one => {
    const {id, client, model, tokens, tokens_per_s: rate, reason} = one, here = id === chosen;
    const runs = one.state === 'running', eta = one.eta_s - age();
    const when = /pause|priority|down/.test(reason) ? 'held back' : one.eta_s == null ? '–' :
      eta < 1 ? 'starts soon' : `in ~ ${dur(eta)}`;
    return h('tr', runs ? 'runs' : '', [td('pos', runs ? 'runs' : num(one.position)),
      td('who', two(client, model), {title: [client, model, one.route, one.request_id].join('\n')}),
      td('time', two(dur(one.waited_s + (runs ? 0 : age())), runs ? `runs for ${dur(one.running_s +
        age())}` : when)),
      td('class', [h('span', `tag ${one.class}`, one.class)]), td('reason', !runs ? reason :
        `on ${one.backend}${tokens ? `, ${plural(tokens, 'token')}` : ''}${rate ? `, ${num(
          Math.round(rate))}/s` : ''}`),
      td('acts', [!runs && act('↑', `Raise ${client}`, () => move(id, 1), one.class === 'high'),
        !runs && act('↓', `Lower ${client}`, () => move(id, -1), one.class === 'low'),
        act('×', `Cancel ${client}`, () => cancel(one))])], {key: id, role: 'row',
      tabIndex: here - 1, ariaCurrent: here ? 'true' : null, onclick: () => here || choose(id)});
  }), want ? [h('b', '', 'Nothing here fits the filter.'), h('p', '', 'Esc clears it.')] : [
    h('b', '', 'Nothing waits, nothing runs.'), h('p', '', 'Point a client here instead of at the ' +
      'runner, or try it:'), ...pastes.map(text => h('div', 'line', [h('code', '', text),
      h('button', '', 'Copy', {onclick: event => copy(event.target.previousSibling)})]))]);
  const at = rows.findIndex(one => one.id === chosen);
  if (at >= 0) place = at;  // once it has gone, what moved up there is selected
  else if (chosen) choose(rows[Math.min(place, rows.length - 1)]?.id ?? '');
  render(q('queue', 'small'), want ? `${num(rows.length)} fit` : shown < queue.waiting ?
    `the first ${shown} of ${num(queue.waiting)}` : '');
  [$('all').hidden, $('filter').hidden] = [!queue.waiting, !requests.length];
}
const wanted = () => $('filter').value.trim().toLowerCase();
async function search() {  // the snapshot shows the first that wait: llmq looks through the rest
  const want = wanted(), {waiting, running} = snap.queue, url = `${BASE}/llmq/status?find=`;
  if (!want || snap.requests.length - running >= waiting) return void (found = []);
  const told = await fetch(url + encodeURIComponent(want)).then(answer => answer.json(), () => {});
  if (told && want === wanted()) found = told.requests, draw();
}
function choose(id) {
  chosen = id, draw();
  if (document.activeElement !== $('filter')) q('queue', '[aria-current]')?.focus();
}
function step(by) {
  const ids = [...q('queue', 'tbody').children].map(node => node.key), at = ids.indexOf(chosen);
  if (ids.length) choose(ids[at < 0 ? 0 : Math.min(ids.length - 1, Math.max(0, at + by))]);
}
function drawBackends({devices, backends}) {
  const line = (model, name, text, verb) => h('div', 'line', [h('span', 'tag clip', text), verb &&
    button(verb, `${model} on ${name}`, () => load(verb.toLowerCase(), model, name), 'push')], {key: model});
  const show = ({name, state, loaded, models, kind, error, busy, ...one}) => {
    const well = state === 'up' || state === 'draining', open = opened.has(name);
    const rest = models.filter(model => !loaded.includes(model));
    return h('div', `backend ${TONES[state] ?? 'red'}`, [h('div', 'line', [dot, h('b', 'clip', name),
      h('small', 'clip', kind ?? ''), h('b', 'word push', state === 'up' && busy ? 'busy' : state),
      button(state === 'draining' ? 'Resume' : 'Drain', name, () => drain({name, state}))]),
    h('code', 'clip', one.url), well && h('div', '', loaded.map(m => line(m, name, m +
      (one.context?.[m] ? ` · ${num(one.context[m])} ctx` : '') +
      (one.gpu_pct?.[m] >= 0 ? ` · ${one.gpu_pct[m]} % on GPU` : ''), one.orders && 'Unload'))),
    well && h('small', '', `${loaded.length || 'nothing'} loaded of ${plural(models.length,
      'model')}, answers in ${dur(one.latency_ms / 1000, true)}`, {title: models.join('\n')}),
    well && rest.length && h('details', '', [h('summary', '', plural(rest.length, 'model') +
      ' not loaded', {onclick: event => {  // not by a toggle event: a snapshot may come before it
      event.preventDefault(), opened.delete(name) || opened.add(name), draw(); }}),
    h('div', '', open ? rest.map(m => line(m, name, m, one.orders && 'Load')) : [])], {open}),
    error && h('small', 'alarm', state !== 'down' ? error : `${error}. llmq looks again by itself.`)],
    {key: name}); };
  render($('devices'), devices.map(({name, slots, busy}) => h('div', 'device', [h('div', 'line', [
    h('b', 'clip', name), h('span', 'line slots push', Array.from({length: Math.min(12, slots)},
      (_, at) => h('i', at < busy ? 'on' : ''))), h('small', '', `${busy} of ${slots} busy`)]),
    ...backends.filter(one => one.device === name).map(show)], {key: name})));
}
function drawClients(all) {
  all.sort((a, b) => b.waiting + b.running - a.waiting - a.running || b.share - a.share);
  const heads = {who: 'Client', 'n waiting': 'Waits', 'n running': 'Runs', 'n done': 'Done',
    'n failed': 'Failed', acts: ''};
  const mark = (on, sign, title, run) => act(sign, title, run, false, {ariaPressed: `${on}`});
  table('clients', heads, all.slice(0, 12).map(one => h('tr', '', [td('who', [h('b', '', one.name),
    h('small', '', [h('span', '', `${one.share} %${one.left ? `, ${num(one.left)} left` : ''} `),
      ...tags([one.class, one.boost && 'boosted', one.blocked && 'blocked'])]),
    bar('thin', [one.share / 100])], {title: `${one.name}\n${dur(one.served_s, true)} served`}),
    ...Object.keys(heads).slice(1, 5).map(cls => td('n', num(one[cls.slice(2)]))), td('acts', [
      one.waiting && act('×', `Cancel all that waits of ${one.name}`, () => cancelAll(one)),
      mark(one.class === 'high', one.class === 'high' ? '★' : '☆', `VIP: ${one.name}`, () => vip(one)),
      mark(one.boost, '⚡\ufe0e', `Boost ${one.name}`, () => boost(one)),
      mark(one.blocked, '⊘', `Block ${one.name}`, () => block(one))])],
    {key: one.name, role: 'row'})), 'Who asks shows here, named by X-User-ID or by its program.');
  render(q('clients', 'small'), all.length > 12 ? `12 of ${num(all.length)}` : '');
  const {blocked} = snap, more = blocked.length - 12;
  render($('blocked'), [...blocked.slice(0, 12).map(name => h('span', 'line', [...tags(['blocked']),
    h('span', '', name), button('Unblock', name, () => unblock(name))], {key: name})),
  more > 0 && h('small', '', `and ${num(more)} more`)]);
}
function drawUsed({jobs, cache, used_today: used}) {  // nothing of it while there is nothing
  const saved = cache.hit + cache.joined, looked = saved + cache.miss, share = looked ?
    `, ${Math.round(100 * saved / looked)} % of ${num(looked)} answered from it` : '', figures = [
    jobs.queued + jobs.running && ['Jobs', `${num(jobs.queued)} queued, ${num(jobs.running)} running`],
    looked + cache.answers && ['Cache', `${plural(cache.answers, 'answer')}, ${bytes(cache.bytes)}${share}`],
    used.requests && ['Today', `${plural(used.requests, 'request')}, ${plural(used.hits, 'hit')}, ${
      plural(used.tokens_in, 'token')} in, ${num(used.tokens_out)} out, ran for ${dur(used.seconds, true)}`],
  ].filter(Boolean);
  $('used').hidden = !figures.length && !LISTS.usage.rows?.length && !q('used', '[open]');
  render(q('used', '.head'), [h('h2', '', 'Jobs and usage'), ...figures.map(([name, text]) =>
    h('small', '', [h('b', '', `${name} `), h('span', '', text)], {key: name}))]);
}
const pair = (first, second) => [h('span', '', first), h('small', '', second)];
const missing = ({rows, why}, none) => why ?? (rows ? none : 'llmq is asked for it.');
function drawUsage(list) {
  const {rows = [], kept} = list;
  render(q('usage', 'summary'), (kept === false ? 'Usage since the start' : 'Usage of the last 7 days') +
    (rows.length > 100 ? `, the first 100 of ${num(rows.length)} rows` : ''));
  if ($('usage').open) table('usage', {day: 'Day', who: 'Client, model', 'did 1': 'Requests', 'did 2':
    'Tokens'}, rows.slice(0, 100).map(one => h('tr', '', [td('day', one.day),
    td('who', two(one.client, one.model || '–')), td('did', pair(plural(one.requests, 'request'),
      `${plural(one.hits, 'hit')}, ran for ${dur(one.seconds, true)}`)),
    td('did', pair(`${plural(one.tokens_in, 'token')} in`, `${num(one.tokens_out)} out`))],
  {key: [one.day, one.client, one.model].join('\n'), role: 'row'})), missing(list, 'Nothing was used.'));
}
function drawJobs(list) {
  const {rows = [], more, at} = list;
  render(q('jobs', 'summary'), more ? `Jobs, the latest ${rows.length}` : 'Jobs');
  if ($('jobs').open) table('jobs', {who: 'Client, model', how: 'Status', made: 'Made', acts: ''},
    rows.map(one => {
      const {id, client, status, error, started_at: began, completed_at: ended} = one;
      const tone = {running: 'blue', succeeded: 'green', failed: 'red'}[status] ?? 'grey';
      const starts = one.eta_s == null ? '' : `, in ~ ${dur(one.eta_s - (performance.now() - at) / 1000)}`;
      const how = one.position ? `place ${num(one.position)}${starts}` : !began ? '' : !ended ?
        `runs since ${CLOCK.format(1000 * began)}` : `took ${dur(ended - began)}`;
      return h('tr', '', [td('who', two(client, one.model), {title: [client, one.model, one.route,
        id].join('\n')}), td(`how ${tone}`, [h('div', 'line', [dot, h('span', 'clip', status),
        ...tags([one.class])])]), td('made', [...pair(CLOCK.format(1000 * one.created_at), how),
        error && h('small', 'alarm', error)]), td('acts', [
        ['queued', 'running'].includes(status) && button('Cancel', `the job ${id} of ${client}`,
          () => cancelJob(one)), ['succeeded', 'failed'].includes(status) && h('a', '', 'Result', {
          href: `${location.origin}${BASE}/v1/jobs/${encodeURIComponent(id)}/result`, target: '_blank',
          rel: 'noopener', ariaLabel: `Result of the job ${id} of ${client}`})])], {key: id, role: 'row'});
    }), missing(list, 'There is no job: a request with the header Prefer: respond-async is one.'));
}
function look(anew) {  // into what is open, once its figures change, but not at each change
  const news = JSON.stringify([snap?.jobs, snap?.used_today]), now = performance.now();
  for (const [id, list] of Object.entries(LISTS)) {  // past days of use show that there is something
    const wanted = $(id).open ? anew || list.news !== news : id === 'usage' && !list.rows;
    if (!live || !wanted || (!anew && now - list.at < 3000)) continue;
    Object.assign(list, {news, at: now});
    fetch(BASE + list.path).then(answer => answer.json()).then(told => now === list.at &&
      (Object.assign(list, {rows: told.usage?.sort((a, b) => b.day.localeCompare(a.day) ||
        b.requests - a.requests) ?? told.data ?? [], kept: told.kept, more: told.has_more,
      why: told.error?.message}), draw()), () => { list.news = ''; });
  }
}
function drawRecent(recent, count) {
  const speeds = recent.map(one => one.tokens_per_s ?? one.tokens / ([one.first_s, one.wait_s].map(
    since => one.total_s - since).find(s => s > 0.05) ?? Infinity));  // what was quicker tells nothing
  const most = Math.max(1e-3, ...recent.map(one => one.total_s)), fastest = Math.max(1, ...speeds);
  table('recent', {who: 'Client, model', how: 'Outcome', bars: 'Time', 'n 1': 'Tokens', 'n 2':
    'Tokens/s'}, recent.map(({wait_s: wait, total_s: total, tokens, outcome, ...one}, i) => {
    const first = one.first_s ?? total, word = outcome.replaceAll('_', ' ');
    const tone = outcome === 'done' ? 'green' : one.status === 499 ? 'grey' : 'red';
    return h('tr', '', [td('who', two(one.client, one.model || one.route), {title: one.request_id}),
      td(`how ${tone}`, [h('div', 'line', [dot, h('span', 'clip', word)])]),
      td('bars', [bar('', [wait, first - wait, total - first].map(s => s / most)),
        h('small', 'clip', `${dur(wait, true)} waited, ${dur(total, true)} in all`),
        tone === 'red' && one.error && h('small', 'alarm', one.error)]),
      td('n', tokens == null ? '–' : num(tokens)), td('n', [h('span', '', speeds[i] ? num(Math.round(
        speeds[i])) : '–'), speeds[i] && bar('thin', [speeds[i] / fastest])])], {key: one.id, role: 'row'});
  }), 'What has ended shows here: how long it waited, and how fast it was.');
  render($('more'), whole ? 'Last 10' : `All ${count}`), $('more').hidden = count <= 10;
}
function drawPlots() {
  const now = Date.now(), ended = sum(Object.values(snap.requests_total));
  if (past.at(-1)?.[1] > ended) past = [];  // llmq has started anew
  if (live) past.push([now, ended, snap.queue.waiting ? snap.queue.oldest_wait_s + age() : 0]);
  past = past.filter(one => one[0] > now - SPAN - 60e3);
  const span = Math.min(SPAN, Math.max(120e3, now - (past[0]?.[0] ?? now)));
  let at = 0, rates = past.map(([when, count]) => {  // `at`: the last sample a minute before
    while (past[at + 1]?.[0] <= when - 60e3) at += 1;
    return [when, Math.round((count - past[at][1]) / Math.max(1, (when - past[at][0]) / 60e3))]; });
  for (const [id, all, text] of [['rate', rates, num], ['wait', past.map(p => [p[0], p[2]]), brief]]) {
    const most = Math.max(1, ...all.map(one => one[1])), [, area, line] = $(id).querySelectorAll(
      'path'), seen = all.filter(one => one[0] >= now - span).map(([when, y]) =>
      [(100 - 100 * (now - when) / span).toFixed(2), (40 - 38 * y / most).toFixed(2)].join(' '));
    line.setAttribute('d', seen.length ? `M${seen.join('L')}` : '');
    area.setAttribute('d', seen.length ? `M${seen.join('L')}V40H${seen[0].split(' ')[0]}Z` : '');
    render(q(id, 'b'), text(all.at(-1)?.[1] ?? 0));
    render(q(id, 'small'), [h('span', '', `${Math.round(span / 60e3)} min ago`), h('span', 'push',
      `most ${text(most)}`)]); }
}
function listen() {  // one stream while the page is seen, none while it is hidden
  clearTimeout(again);
  if (stream || document.hidden) return;
  stream = Object.assign(new EventSource(`${BASE}/llmq/events`), {onerror: lost});
  stream.onmessage = event => {
    [snap, got, live] = [JSON.parse(event.data), performance.now(), true];
    draw(), look(), past.length || drawPlots(); };
}
const leave = () => { stream = stream?.close(); };
function lost() { leave(), live = false, again = setTimeout(listen, 1000), draw(); }
function tick() {
  if (!snap || document.hidden) return;
  draw(), drawPlots(), search(), look();
  if (live && age() > 15) fetch(`${BASE}/health`, {signal: AbortSignal.timeout(2000)}).catch(lost);
}
function kept(name, value) {  // where a page may keep nothing, it lasts as long as the page
  try { return value ? localStorage.setItem(name, value) : localStorage.getItem(name); } catch { }
}
function theme(name) {
  shade = document.documentElement.dataset.theme = THEMES.includes(name) ? name : 'system';
  render($('theme'), `Theme: ${shade}`), kept('llmq-theme', shade);
}
function shortcuts(on) {  // of one character, which speech input may type by mistake
  $('single').checked = on, kept('llmq-keys', on ? 'on' : 'off');
}
const next = (all, one) => all[(all.indexOf(one) + 1) % all.length];
const owner = () => snap.clients.find(one => one.name === find(chosen)?.client);
const KEYS = {
  'j ArrowDown': ['the next request', () => step(1)], 'k ArrowUp': ['the one before', () => step(-1)],
  x: ['cancel it', () => cancel(find(chosen))], '+ =': ['raise its class', () => move(chosen, 1)],
  '-': ['lower it', () => move(chosen, -1)], X: ['cancel all of its client', () => cancelAll(owner())],
  v: ['VIP: its client is of class high', () => vip(owner())],
  b: ['boost its client', () => boost(owner())], B: ['block it', () => block(owner())],
  p: ['pause, resume', () => setMode(snap.mode === 'paused' ? 'open' : 'paused')],
  m: ['next mode', () => setMode(next(MODES, snap.mode))], '/': ['filter', () => $('filter').focus()],
  r: ['all recent requests, or the last 10', () => { whole = !whole; draw(); }],
  c: ['connect a client', () => connect()], t: ['theme', () => theme(next(THEMES, shade))], '?': ['these keys', () => $('map').showModal()],
  Escape: ['clear filter and selection', () => { $('filter').value = chosen = ''; draw(); }],
};
document.onkeydown = event => {
  const off = event.ctrlKey || event.altKey || event.metaKey || document.querySelector('dialog[open]') ||
    (event.key.length === 1 && !$('single').checked);
  const typing = event.key !== 'Escape' && ['search', 'radio'].includes(event.target.type) &&
    (event.target === $('filter') || event.key.startsWith('Arrow'));
  const found = Object.entries(KEYS).find(([names]) => names.split(' ').includes(event.key));
  if (!snap || !found || typing || off) return;
  event.preventDefault(), $('filter').blur(), found[1][1]();
};
document.onvisibilitychange = () => document.hidden ? leave() : listen();
render(q('map', 'table'), Object.entries(KEYS).map(([names, [what]]) => h('tr', '', [h('td', '',
  names.split(' ').map(name => h('kbd', '', name.replace('Arrow', '')))), h('td', '', what)])));
for (const [id, run] of Object.entries({help: KEYS['?'][1], theme: KEYS.t[1], more: KEYS.r[1],
  all: () => cancelAll(snap.queue), copy: () => copy($('base')), take: () => copy(q('connect', 'pre')), connecting: () => connect()})) $(id).onclick = run;
$('filter').oninput = () => { draw(), search(); }, render($('base'), `${location.origin}${BASE}/v1`);
for (const id in LISTS) $(id).ontoggle = () => { draw(), look(); };
$('single').onchange = event => shortcuts(event.target.checked);
theme(kept('llmq-theme')), shortcuts(kept('llmq-keys') !== 'off');
listen(), setInterval(tick, 1000);
</script></body></html>
"""  # noqa: E501, RUF001


if __name__ == "__main__":
    sys.exit(main())
