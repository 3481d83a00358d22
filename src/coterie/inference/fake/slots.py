"""A queue in front of a fixed number of places."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """`count` places (None: as many as are asked for), given in order of arrival."""

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.running = self.most_running = 0
        self.scoring = 0
        """Of those running, how many score their prompts."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether one who comes now has to wait."""
        return self.count is not None and self.running >= self.count

    @asynccontextmanager
    async def place(self, scores: bool = False) -> AsyncIterator[None]:
        """Hold a place. `scores`: see `scoring`."""
        if self.busy or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()  # the slot was already given
                elif turn in self._waiting:
                    self._waiting.remove(turn)
                raise
        else:
            self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.scoring += scores
        try:
            yield
        finally:
            self.scoring -= scores
            self._release()

    def _release(self) -> None:
        """Give the slot to whoever waits longest, or leave it free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled, and its task has not run since
                turn.set_result(None)
                return
        self.running -= 1
