"""How a coroutine reads a connection and is woken: at once, never lost, or ended by an error."""

from __future__ import annotations

import asyncio
import socket
from itertools import accumulate
from typing import Any, Callable

import pytest

import llmq
from tests.fakes import eventually


def in_a_callback(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Do this where the event loop calls, as transports do: in no task."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    loop.call_soon(lambda: done.set_result(work()))
    return done


async def pair() -> tuple[llmq.Reader, asyncio.StreamWriter, socket.socket]:
    """One side as llmq reads it, the other as a plain socket."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop, reader = asyncio.get_running_loop(), llmq.Reader()
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, sock=ours)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop), theirs


# ---- Waiter


async def test_who_waits_goes_on_in_the_very_turn_that_wakes_it() -> None:
    waiter, went_on = llmq.Waiter(), []

    async def wait() -> None:
        await waiter
        went_on.append(True)

    task = asyncio.ensure_future(wait())
    await asyncio.wait([task], timeout=0)

    def wake() -> list[bool]:
        waiter.wake()
        return list(went_on)  # within the same callback

    assert await in_a_callback(wake) == [True]
    await task


async def test_who_is_woken_out_of_another_task_goes_on_a_turn_later() -> None:
    waiter, went_on = llmq.Waiter(), []

    async def wait() -> None:
        await waiter
        went_on.append(True)

    task = asyncio.ensure_future(wait())
    await asyncio.wait([task], timeout=0)
    waiter.wake()
    assert went_on == [], "no task may be entered from another"
    await task
    assert went_on == [True]


async def test_wake_before_the_wait_is_not_lost_and_counts_once() -> None:
    waiter = llmq.Waiter()
    waiter.wake()
    waiter.wake()
    await waiter
    task = asyncio.ensure_future(asyncio.wait([asyncio.ensure_future(forever(waiter))], timeout=0))
    _, waiting = await task
    assert waiting
    waiting.pop().cancel()


async def forever(waiter: llmq.Waiter) -> None:
    await waiter


@pytest.mark.parametrize("woken", [False, True])
async def test_wait_can_be_cancelled_and_the_waiter_used_again(woken: bool) -> None:
    waiter = llmq.Waiter()
    task = asyncio.ensure_future(forever(waiter))
    await asyncio.wait([task], timeout=0)
    if woken:
        waiter.wake()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    waiter.wake()
    await waiter


# ---- Reader


async def test_all_that_has_come_is_read_at_once_and_the_end_is_empty() -> None:
    reader, writer, peer = await pair()
    peer.send(b"one ")
    assert await reader.more() == b"one "
    peer.send(b"two ")
    await eventually(lambda: reader.unread)
    reader.put_back(b"and ")
    assert await reader.more() == b"and two "
    peer.close()
    assert await reader.more() == b""
    assert reader.ended
    writer.close()


async def test_error_that_interrupts_a_read_is_met_there_and_before_what_has_come() -> None:
    reader, writer, peer = await pair()
    reading = asyncio.ensure_future(reader.more())
    await asyncio.wait([reading], timeout=0)
    reader.interrupt(llmq.RequestTimeout("too late"))
    with pytest.raises(llmq.RequestTimeout):
        await reading
    peer.send(b"more")
    with pytest.raises(llmq.RequestTimeout):
        await reader.more()
    peer.close()
    writer.close()


@pytest.mark.parametrize("pieces", [[b"a: b\r\n\r\nrest"], [b"a: b\r", b"\n\r", b"\nrest"]])
async def test_head_is_read_to_its_empty_line_and_what_follows_stays(pieces: list[bytes]) -> None:
    reader, writer, peer = await pair()
    partly: list[int] = []
    reading = asyncio.ensure_future(reader.read_head(lambda: partly.append(1)))
    for sent, piece in zip(accumulate(map(len, pieces)), pieces):
        peer.send(piece)
        await eventually(lambda all_sent=sent: reader.received == all_sent)
    assert await reading == b"a: b\r\n\r\n"
    assert partly == [1] * (len(pieces) > 1)
    assert await reader.more() == b"rest"
    peer.close()
    writer.close()


async def test_who_sends_more_than_is_read_is_not_listened_to_for_a_while() -> None:
    reader, writer, peer = await pair()
    loop, data = asyncio.get_running_loop(), b"x" * (8 * llmq.UNREAD_LIMIT)
    sending = asyncio.ensure_future(loop.sock_sendall(peer, data))
    await eventually(lambda: reader.unread > llmq.UNREAD_LIMIT)
    held = reader.unread
    assert held < 4 * llmq.UNREAD_LIMIT
    received = 0
    while received < len(data):
        received += len(await reader.more())
    await sending
    peer.close()
    writer.close()


async def test_what_is_read_ahead_is_bounded_and_the_end_behind_it_still_seen() -> None:
    reader, writer, peer = await pair()
    left = asyncio.Event()
    reader.bound()
    reader.on_end = left.set
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(peer, b"x" * (4 * llmq.READ_AHEAD))
    peer.close()
    await left.wait()
    assert reader.overrun
    assert reader.unread <= llmq.READ_AHEAD
    writer.close()


async def test_time_is_up_for_what_does_not_come_and_it_is_cancelled() -> None:
    task = asyncio.ensure_future(forever(llmq.Waiter()))
    with pytest.raises(llmq.BackendTimeout):
        await llmq.within(0.0, task, llmq.BackendTimeout("late"))
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("end", [b"", llmq.HEAD_END], ids=["cut off", "whole"])
async def test_head_that_is_too_long_is_given_up_when_it_is_not_when_more_comes(end: bytes) -> None:
    reader, writer, peer = await pair()
    loop, head = asyncio.get_running_loop(), b"x" * (llmq.HEAD_LIMIT + 2000) + end
    reading = asyncio.ensure_future(reader.read_head())
    await loop.sock_sendall(peer, head)
    await eventually(lambda: reader.received == len(head))
    assert not (await asyncio.wait_for(reading, 1)).endswith(llmq.HEAD_END)
    peer.close()
    writer.close()


async def test_what_came_is_read_though_the_transport_is_lost() -> None:
    class Lost:  # a TLS transport of Python 3.9 and 3.10, once its connection is lost
        def resume_reading(self) -> None:
            raise AttributeError("'NoneType' object has no attribute 'resume_reading'")

    reader = llmq.Reader()
    reader.set_transport(Lost())  # type: ignore[arg-type]
    data = b"x" * (llmq.UNREAD_LIMIT + 1)
    reader.feed_data(data)
    reader.feed_eof()
    assert await reader.more() == data
