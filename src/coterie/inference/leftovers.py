"""Adapters that a process could not take down before it ended: killed, aborted, or without an answer from a server.

A published adapter stands in a directory of its own, named as it is served, until every server has let go of it
(`publisher`). What stands there when a run goes on is therefore on some server still, and of no use to anybody.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from coterie.inference.wire import ServerControl, ServerFault, ServerSpec


async def take_down(root: Path, servers: Sequence[ServerSpec], control: ServerControl) -> tuple[str, ...]:
    """Unload every adapter that has a directory in `root` from all servers, then delete the directory.

    Returns:
        Names whose directories stay, because a server did not say that it has let go of them.
    """
    names = sorted(path.name for path in root.glob("*/"))
    gone = await asyncio.gather(*(_unloaded(name, servers, control) for name in names))
    for name, confirmed in zip(names, gone, strict=True):
        if confirmed:
            await asyncio.to_thread(shutil.rmtree, root / name, ignore_errors=True)
    return tuple(name for name in names if (root / name).exists())


async def _unloaded(name: str, servers: Sequence[ServerSpec], control: ServerControl) -> bool:
    """Whether every server says that it does not hold `name`."""
    answers = await asyncio.gather(
        *(control.unload_adapter(server, name) for server in servers), return_exceptions=True
    )
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, ServerFault):
            raise answer
    return not any(answers)
