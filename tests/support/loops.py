"""Running a scene of a test in an event loop of its own, with an end even where the code under test has none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

Runs = Callable[[Coroutine[Any, Any, Any]], Any]
"""Such as `asyncio.run` and `tests.support.virtual.run_hasty`."""


def run(work: Coroutine[Any, Any, Any], loop: Runs = asyncio.run, *, within_s: float = 60.0) -> Any:
    """What `work` gives. Raises `TimeoutError` past `within_s` seconds of the loop's clock."""

    async def bounded() -> Any:
        async with asyncio.timeout(within_s):
            return await work

    return loop(bounded())
