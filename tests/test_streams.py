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


async def pair() -> tuple[llmq.Stream, socket.socket]:
    """One side as llmq reads it, the other as a plain socket."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(llmq.Stream, sock=ours)
    return stream, theirs


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


# ---- Stream


async def test_all_that_has_come_is_read_at_once_and_the_end_is_empty() -> None:
    stream, peer = await pair()
    peer.send(b"one ")
    assert await stream.more() == b"one "
    peer.send(b"two ")
    await eventually(lambda: stream.unread)
    stream.put_back(b"and ")
    assert await stream.more() == b"and two "
    peer.close()
    assert await stream.more() == b""
    assert stream.ended
    stream.close()


async def test_error_that_interrupts_a_read_is_met_there_and_before_what_has_come() -> None:
    stream, peer = await pair()
    reading = asyncio.ensure_future(stream.more())
    await asyncio.wait([reading], timeout=0)
    stream.interrupt(llmq.RequestTimeout("too late"))
    with pytest.raises(llmq.RequestTimeout):
        await reading
    peer.send(b"more")
    with pytest.raises(llmq.RequestTimeout):
        await stream.more()
    peer.close()
    stream.close()


@pytest.mark.parametrize("pieces", [[b"a: b\r\n\r\nrest"], [b"a: b\r", b"\n\r", b"\nrest"]])
async def test_head_is_read_to_its_empty_line_and_what_follows_stays(pieces: list[bytes]) -> None:
    stream, peer = await pair()
    partly: list[int] = []
    reading = asyncio.ensure_future(stream.read_head(lambda: partly.append(1)))
    for sent, piece in zip(accumulate(map(len, pieces)), pieces):
        peer.send(piece)
        await eventually(lambda all_sent=sent: stream.received == all_sent)
    assert await reading == b"a: b\r\n\r\n"
    assert partly == [1] * (len(pieces) > 1)
    assert await stream.more() == b"rest"
    peer.close()
    stream.close()


async def test_who_sends_more_than_is_read_is_not_listened_to_for_a_while() -> None:
    stream, peer = await pair()
    loop, data = asyncio.get_running_loop(), b"x" * (8 * llmq.UNREAD_LIMIT)
    sending = asyncio.ensure_future(loop.sock_sendall(peer, data))
    await eventually(lambda: stream.unread > llmq.UNREAD_LIMIT)
    held = stream.unread
    assert held < 4 * llmq.UNREAD_LIMIT
    received = 0
    while received < len(data):
        received += len(await stream.more())
    await sending
    peer.close()
    stream.close()


async def test_what_is_read_ahead_is_bounded_and_the_end_behind_it_still_seen() -> None:
    stream, peer = await pair()
    left = asyncio.Event()
    stream.bound()
    stream.on_end = left.set
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(peer, b"x" * (4 * llmq.READ_AHEAD))
    peer.close()
    await left.wait()
    assert stream.overrun
    assert stream.unread <= llmq.READ_AHEAD
    stream.close()


async def test_time_is_up_for_what_does_not_come_and_it_is_cancelled() -> None:
    task = asyncio.ensure_future(forever(llmq.Waiter()))
    with pytest.raises(llmq.BackendTimeout):
        await llmq.within(0.0, task, llmq.BackendTimeout("late"))
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("end", [b"", llmq.HEAD_END], ids=["cut off", "whole"])
async def test_head_that_is_too_long_is_given_up_when_it_is_not_when_more_comes(end: bytes) -> None:
    stream, peer = await pair()
    loop, head = asyncio.get_running_loop(), b"x" * (llmq.HEAD_LIMIT + 2000) + end
    reading = asyncio.ensure_future(stream.read_head())
    await loop.sock_sendall(peer, head)
    await eventually(lambda: stream.received == len(head))
    assert not (await asyncio.wait_for(reading, 1)).endswith(llmq.HEAD_END)
    peer.close()
    stream.close()


async def test_what_came_is_read_though_the_transport_is_lost() -> None:
    class Lost:  # a TLS transport of Python 3.9 and 3.10, once its connection is lost
        def get_extra_info(self, name: str) -> object:
            return name  # whatever is asked for, TLS included, it has

        def resume_reading(self) -> None:
            raise AttributeError("'NoneType' object has no attribute 'resume_reading'")

    stream = llmq.Stream()
    stream.connection_made(Lost())  # type: ignore[arg-type]
    data = b"x" * (llmq.UNREAD_LIMIT + 1)
    stream.data_received(data)
    stream.connection_lost(None)
    assert await stream.more() == data


async def test_whoever_writes_waits_until_the_peer_has_taken_it() -> None:
    stream, peer = await pair()
    loop, sent = asyncio.get_running_loop(), b"x" * (4 * llmq.MIB)
    stream.transport.set_write_buffer_limits(high=0)
    stream.write(sent)
    draining = asyncio.ensure_future(stream.drain())
    taken = 0
    while taken < len(sent):
        assert not draining.done() or not stream.unsent
        taken += len(await loop.sock_recv(peer, llmq.MIB))
    await draining
    assert stream.unsent == 0
    peer.close()
    stream.close()


async def test_whoever_writes_and_whoever_reads_learn_that_the_connection_is_lost() -> None:
    stream, peer = await pair()
    stream.transport.set_write_buffer_limits(high=0)
    stream.write(b"x" * (4 * llmq.MIB))
    draining = asyncio.ensure_future(stream.drain())
    reading = asyncio.ensure_future(stream.more())
    stream.abort()
    with pytest.raises(ConnectionResetError):
        await draining
    assert await reading == b""
    await stream.closed()
    assert stream.lost
    peer.close()
