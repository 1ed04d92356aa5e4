"""How tests run: async ones without a plugin, each inside one deadline, nothing left open."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import Raw

DEADLINE = 10.0  # seconds for one test; @pytest.mark.deadline(30) gives another
GRACE = 5.0  # more, before a test that does not even stop is interrupted
STDERR = pytest.StashKey[int]()  # the real one, for a last traceback while output is captured
MEASURING = {name: os.environ[name] for name in os.environ if name.startswith("COVERAGE_")}
if TRACER := sys.gettrace():  # coverage's; all that it is to see outside of tests is this import
    importlib.import_module("llmq")


def pytest_configure(config: pytest.Config) -> None:
    sys.settrace(None)  # see `traced`
    config.stash[STDERR] = os.dup(sys.stderr.fileno())
    config.addinivalue_line("markers", "deadline(seconds): fail the test after so long (10)")
    config.addinivalue_line("markers", "untraced: coverage looks away; others cover these lines")


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Coverage looks at tests and their fixtures alone: pytest's own lines are the most of all."""
    sys.settrace(TRACER)
    try:
        yield
    finally:
        sys.settrace(None)


@pytest.fixture(scope="session", autouse=True)
def unmeasured() -> None:
    """Coverage begins in no process that a test starts: it takes a while in each."""
    for name in MEASURING:
        os.environ.pop(name, None)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does, for what no test of this process comes to."""
    for name, value in MEASURING.items():
        monkeypatch.setenv(name, value)


def deadline_of(item: pytest.Item) -> float:
    mark = item.get_closest_marker("deadline")
    return float(mark.args[0]) if mark else DEADLINE


async def within(test: Any, seconds: float) -> None:
    """Run the coroutine; fail when it hangs, or when a callback or task failed unseen."""
    unseen: list[str] = []

    def note(_loop: object, context: dict[str, Any]) -> None:
        unseen.append(f"{context.get('message')}: {context.get('exception')!r}")

    asyncio.get_running_loop().set_exception_handler(note)
    task = asyncio.ensure_future(test)
    done, _ = await asyncio.wait([task], timeout=seconds)
    if not done:
        where = "".join(f"\n  {line}" for line in stack_of(task))
        task.cancel()
        await asyncio.wait([task], timeout=GRACE / 2)
        pytest.fail(f"not done within {seconds:g} s; it waited at:{where}", pytrace=False)
    task.result()
    unseen += [f"still running: {name}" for name in tasks_of_llmq()]
    if unseen:
        pytest.fail("failed unseen: " + "; ".join(unseen), pytrace=False)


def tasks_of_llmq() -> list[str]:
    """What a stopped service has left in the loop."""
    coroutines = [task.get_coro() for task in asyncio.all_tasks()]
    codes = [getattr(coroutine, "cr_code", None) for coroutine in coroutines]
    return [code.co_name for code in codes if code and Path(code.co_filename).name == "llmq.py"]


def stack_of(task: asyncio.Task[Any]) -> list[str]:
    """The chain of awaits of a task, outermost first."""
    lines, waiting = [], task.get_coro()
    while frame := getattr(waiting, "cr_frame", None) or getattr(waiting, "ag_frame", None):
        name = Path(frame.f_code.co_filename).name
        lines.append(f"{name}:{frame.f_lineno} in {frame.f_code.co_name}")
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "ag_await", None)
    return lines


def interrupted(*_: object) -> None:
    raise TimeoutError("the test's deadline has passed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """One alarm for every test: past it the test is interrupted, past twice that the run ends."""
    seconds = deadline_of(item)
    if inspect.iscoroutinefunction(getattr(item, "function", None)):
        seconds += GRACE  # its own deadline comes first and tells more
    before = signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    stderr = item.config.stash[STDERR]
    faulthandler.dump_traceback_later(2 * seconds + GRACE, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        Raw.close_all()
        gc.collect(1)  # what was forgotten open warns now, in its own test


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Any:
    with traced():
        return (yield)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Call the test; what is `async def test_...` runs in an event loop of its own."""
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    untraced = pyfuncitem.get_closest_marker("untraced")
    with contextlib.nullcontext() if untraced else traced():
        result = pyfuncitem.obj(**arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(within(result, deadline_of(pyfuncitem)))
    assert result is None, "a test that returns something may have meant to assert it"
    return True
