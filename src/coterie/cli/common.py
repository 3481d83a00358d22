"""What the commands share: saying things, refusing a bad config early, opening a run that can be used."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

from coterie.errors import ConfigError, CoterieError, RunFolderError

if TYPE_CHECKING:
    import asyncio

    from coterie.config import RunConfig
    from coterie.runs.directory import RunDirectory


T = TypeVar("T")


def say(text: str) -> None:
    """One line on standard output, as text."""
    from coterie.monitor.tables import clean

    typer.echo(clean(text))


def say_error(error: CoterieError) -> None:
    """ "error: …" and the error's notes on standard error, coloured only on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from coterie.monitor.tables import clean

    notes = getattr(error, "__notes__", [])  # of BaseException.add_note, there once it was called
    message = clean("\n".join([str(error), *notes]))
    if sys.stderr.isatty():
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    else:
        typer.echo(f"error: {message}", err=True)


def check_parts(config: RunConfig) -> None:
    """Build the light parts of a run once, so that their mistakes are found before anything heavy is imported.

    Raises:
        ConfigError: no models; unknown scenario, mode or credit scheme; wrong options of one of them.
    """
    from coterie.credit.base import build_credit
    from coterie.modes.base import build_mode
    from coterie.scenarios.base import build_scenario

    if not config.models:
        raise ConfigError(
            'the config names no models; add [[models]] tables or a preset, for example preset = "cooperative_team"'
        )
    build_scenario(config.scenario.id, config.scenario.options)
    build_mode(config.mode, config.custom_mode)
    build_credit(config.credit, config.mode)


class Closes(Protocol):
    """What holds engines, servers and files until it is closed."""

    async def aclose(self) -> None: ...


def _but_interrupts(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


async def and_close(environment: Closes, work: Awaitable[T]) -> T:
    """Await `work`, then close `environment`, however it ends: adapters are taken down from servers, connections and
    the run's database are closed.

    An interrupt that came while some other task ran is not told of a second time, as that task's failure.
    """
    import asyncio

    asyncio.get_running_loop().set_exception_handler(_but_interrupts)
    async with aclosing(environment):
        return await work


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, but Ctrl-C raises `KeyboardInterrupt` at once.

    asyncio's own handler only cancels the main task, which does nothing while that task waits for a person's line or
    computes; it steps back when another handler is installed.
    """
    import asyncio

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return asyncio.run(work)
    finally:
        signal.signal(signal.SIGINT, before)


def open_trained(path: Path) -> RunDirectory:
    """Open a run that has a checkpoint to load. Raises `RunFolderError` when it is no run or has none."""
    from coterie.runs.directory import RunDirectory, resume_command

    run = RunDirectory.open(path)
    if run.latest_checkpoint() is None:
        raise RunFolderError(f"run {path} has no checkpoint yet; train it first: {resume_command(path)}")
    return run
