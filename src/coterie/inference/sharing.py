"""Identical work asked for at the same time is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Work(Generic[V]):
    task: asyncio.Task[V]
    waiting: int = 0


class InFlight(Generic[K, V]):
    """Work by key. Who asks for a key that is being worked on waits for that; when all who wait are cancelled, so is
    the work. Nothing is kept once it is done."""

    def __init__(self) -> None:
        self._works: dict[K, _Work[V]] = {}

    async def do(self, key: K, begin: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The result of the work under way for `key`, or of `begin()`. Raises what the work raises."""
        loop = asyncio.get_running_loop()
        work = self._works.get(key)
        if work is None or work.task.get_loop() is not loop:  # what an earlier loop left ended with it
            work = self._works[key] = _Work(loop.create_task(begin()))
            work.task.add_done_callback(lambda _: self._forget(key, work))
        work.waiting += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiting -= 1
            if not work.waiting and not work.task.done():
                work.task.cancel()
                self._forget(key, work)

    def _forget(self, key: K, work: _Work[V]) -> None:
        if self._works.get(key) is work:
            del self._works[key]
