"""A loop on a thread of its own serves plain code and coroutines of other loops alike."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import pytest

from coterie.inference.loop_thread import LoopThread


async def where() -> tuple[int, int]:
    return threading.get_ident(), id(asyncio.get_running_loop())


def test_plain_code_and_several_loops_share_one_loop() -> None:
    thread = LoopThread("test")
    plain = thread.run(where())
    assert plain == asyncio.run(thread.hop(where())) == asyncio.run(thread.hop(where()))
    assert plain[0] != threading.get_ident()
    thread.close()


def test_errors_come_back() -> None:
    async def fail() -> None:
        raise ValueError("so it is")

    thread = LoopThread("test")
    with pytest.raises(ValueError, match="so it is"):
        thread.run(fail())
    with pytest.raises(ValueError, match="so it is"):
        asyncio.run(thread.hop(fail()))
    thread.close()


def test_cancelling_here_cancels_there() -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def play(thread: LoopThread) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await thread.hop(wait())

    thread = LoopThread("test")
    asyncio.run(play(thread))
    assert cancelled.wait(5)
    thread.close()


def test_closing_ends_the_thread_and_what_is_under_way() -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    thread = LoopThread("coterie-closing")
    waiter = threading.Thread(target=lambda: _swallow(thread, wait()))
    waiter.start()
    while "coterie-closing" not in [t.name for t in threading.enumerate()]:
        time.sleep(0.005)
    time.sleep(0.05)
    thread.close()
    assert ended.wait(5)
    waiter.join(5)
    assert not waiter.is_alive()
    assert "coterie-closing" not in [t.name for t in threading.enumerate()]
    thread.close()  # again is fine
    assert thread.run(where())  # and it can be used again
    thread.close()


def _swallow(thread: LoopThread, work: Coroutine[Any, Any, None]) -> None:
    with suppress(CancelledError):
        thread.run(work)
