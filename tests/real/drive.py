"""What the drivers in Python share: jobs come in as lines of JSON, and what they saw goes out so.

In:  {"id": 1, "job": "stream", "url": "http://127.0.0.1:1", ... its arguments}, {"cancel": 1}
Out: {"id": 1, "piece": " 1"} for each piece, then {"id": 1, "done": ...}, or "raised" for "done"

A job that is a plain function uses the library's blocking client in a thread; one that is `async`
uses its other client and can be cancelled. One process does many jobs, several at once.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import threading
from typing import Any, Callable

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = {"name": "weather", "description": "The weather of a place", "parameters": PLACE}
SUNNY = "22 degrees"  # what the tool says
TIMEOUT = 20.0  # seconds, of every client that a test gives no other

output = threading.Lock()


def user(text: str) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def say(**news: Any) -> None:
    """One line for the test."""
    with output:
        sys.stdout.write(json.dumps(news) + "\n")
        sys.stdout.flush()


def told(error: BaseException) -> dict[str, Any]:
    """What a caller of the library could know of this error."""
    names = [kind.__name__ for kind in type(error).__mro__[:-2]]
    known = {name: getattr(error, name, None) for name in ("status_code", "code", "request_id")}
    plain = {name: value for name, value in known.items() if isinstance(value, (int, str))}
    return {"kind": names[0], "kinds": names, "text": str(error)[:500], **plain}


async def perform(number: int, jobs: dict[str, Callable[..., Any]], arguments: Any) -> None:
    """Do one job and say how it ended."""

    def tell(piece: str) -> None:
        say(id=number, piece=piece)

    try:
        job = jobs[arguments.pop("job")]
        if inspect.iscoroutinefunction(job):
            done = await job(tell=tell, **arguments)
        else:
            done = await asyncio.to_thread(job, tell=tell, **arguments)
    except asyncio.CancelledError as error:
        say(id=number, raised=told(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the test judges it
        say(id=number, raised=told(error))
    else:
        say(id=number, done=done)


async def obey(jobs: dict[str, Callable[..., Any]]) -> None:
    tasks: dict[int, asyncio.Task[None]] = {}
    say(ready=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        wanted = json.loads(line)
        if "cancel" in wanted:
            tasks[wanted["cancel"]].cancel()
            continue
        number = wanted.pop("id")
        tasks[number] = asyncio.create_task(perform(number, jobs, wanted))
    os._exit(0)  # a thread may still be in a call


def serve(*jobs: Callable[..., Any], **named: Callable[..., Any]) -> None:
    """Do what comes in until the input ends; a job has its function's name or the one given."""
    asyncio.run(obey({**{job.__name__: job for job in jobs}, **named}))
