"""`coterie train`: a config file, or a run to go on with -> a trained run.

Everything that can be wrong with the config or the folder is found before torch is imported. The first Ctrl-C (or
SIGTERM, or a terminal that is closed) lets the current step finish and saves; the second ends at once, leaving the
last checkpoint.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from coterie.cli.common import and_close, check_parts, say
from coterie.errors import ConfigError

if TYPE_CHECKING:
    from coterie.monitor.console import Observer
    from coterie.monitor.tables import ResultTable
    from coterie.runs.directory import RunDirectory


class Summary(Protocol):
    """What a training says at its end."""

    @property
    def completed(self) -> bool: ...
    @property
    def update(self) -> int: ...
    @property
    def table(self) -> ResultTable | None: ...
    @property
    def results(self) -> Mapping[str, Any]: ...
    @property
    def untrained(self) -> str: ...


class Trainable(Protocol):
    """What this command needs of an environment."""

    async def train(self) -> Summary: ...

    def request_stop(self) -> None: ...

    async def aclose(self) -> None: ...


Build = Callable[["RunDirectory", "Observer"], Trainable]


def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="TOML file that describes the run.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting, like rollout.group_size=8; may be repeated."
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="New folder for the run.", show_default="runs/NAME-TIME")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", show_default="the config's")] = None,
) -> None:
    """Train the models of a config, or go on with a run."""
    build: Build
    if resume is None:
        run, build = _new_run(config, set_ or [], folder, seed), _start
    else:
        if config is not None or set_ or folder is not None or seed is not None:
            raise ConfigError(
                "--resume goes on with the run's own config; leave out CONFIG, --set, --folder and --seed"
            )
        run, build = _old_run(resume)
    from coterie.monitor.console import observer_for

    try:
        with run.lock():
            drive(run, build, observer_for(sys.stdout))
    finally:
        with suppress(OSError):
            run.path.rmdir()  # only an empty folder goes: one whose run never began


def _new_run(config_path: Path | None, overrides: Sequence[str], folder: Path | None, seed: int | None) -> RunDirectory:
    from datetime import datetime

    from coterie.config import load_config
    from coterie.runs.directory import RunDirectory, default_folder

    if config_path is None:
        raise ConfigError(
            "give a config file (coterie train CONFIG), or a run to go on with (coterie train --resume RUN)"
        )
    seeded = [f"seed={seed}"] if seed is not None else []
    config = load_config(config_path, [*overrides, *seeded])
    check_parts(config)
    return RunDirectory.create(folder or config.run.folder or default_folder(config, datetime.now()), config)


def _old_run(path: Path) -> tuple[RunDirectory, Build]:
    from coterie.runs.directory import RunDirectory

    run = RunDirectory.open(path)
    check_parts(run.config)
    return run, _resume if run.latest_checkpoint() else _start_again


def _start(run: RunDirectory, observer: Observer) -> Trainable:
    try:
        from coterie.environment import MultiModelEnvironment

        return MultiModelEnvironment.from_config(run.config, run_dir=run, observer=observer)
    except BaseException:
        run.discard_unused()  # a mended config may then use the same folder
        raise


def _start_again(run: RunDirectory, observer: Observer) -> Trainable:
    """A run that ended before its first checkpoint: nothing to load, so it begins anew in its folder."""
    from coterie.environment import MultiModelEnvironment
    from coterie.runs.sinks import MetricsFile
    from coterie.runs.store import Store

    observer.note("this run has no checkpoint yet: starting from the beginning")
    MetricsFile(run.metrics_path).truncate_after(0)
    with Store(run.database_path) as store:
        store.delete_after(0)
    return MultiModelEnvironment.from_config(run.config, run_dir=run, observer=observer)


def _resume(run: RunDirectory, observer: Observer) -> Trainable:
    from coterie.environment import MultiModelEnvironment

    return MultiModelEnvironment.resume(run, observer)


def drive(run: RunDirectory, build: Build, observer: Observer) -> None:
    """Build, train, and say what there is now and how to go on. An error of the training says so in a note of its own.

    Raises:
        typer.Exit: 128 and the number of the signal that stopped the training (130 after Ctrl-C), 1 when it stopped by
            itself before its end.
    """
    import asyncio

    stopping = StopSignals(observer.note)
    summary: Summary | None = None
    try:
        with stopping:
            observer.note(f"run folder: {run.path}")
            observer.stage("loading")
            environment = build(run, observer)
            stopping.request_stop = environment.request_stop
            try:
                summary = asyncio.run(and_close(environment, environment.train()))
            except Exception as error:
                error.add_note(_how_to_go_on(run))
                raise
        if summary.table is not None:
            observer.table(summary.table)
    except KeyboardInterrupt:
        pass
    finally:
        observer.close()
    _say_end(run, summary)
    if summary is None or not summary.completed:
        raise typer.Exit(128 + stopping.received if stopping.received is not None else 1)


def _how_to_go_on(run: RunDirectory) -> str:
    """What there is of a run that has not ended, and what to type."""
    from coterie.runs.directory import resume_command

    saved = run.checkpoints()
    what = f"saved up to update {saved[-1]} in {run.path}" if saved else f"no checkpoint yet in {run.path}"
    return f"{what}\ngo on: {resume_command(run.path)}"


def _say_end(run: RunDirectory, summary: Summary | None) -> None:
    from coterie.runs.directory import command

    if summary is not None and summary.untrained:
        say(f"\nrun: {run.path} (episodes and metrics only: nothing was trained, so there is nothing to go on from)")
    elif summary is not None and summary.completed:
        say(f"\nrun: {run.path}")
        say(f"measure it again: {command('eval', run.path)}")
        say(f"take a seat yourself: {command('play', run.path)}")
    elif not run.path.exists() or not (run.path / "run.json").exists():
        say("\nstopped before the training began; nothing was saved")
    else:
        how = "aborted" if summary is None else f"stopped after update {summary.update} of {run.config.updates}"
        say(f"\n{how}; {_how_to_go_on(run)}")


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP asks the training to stop after its step, the second
    interrupts it. Where SIGHUP is to be ignored (nohup), it is.

    Before `request_stop` is set there is nothing to save, and the first one interrupts.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.request_stop: Callable[[], None] | None = None
        self.received: int | None = None
        """Number of the first signal."""
        self._note = note
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = self.received or number
        if again or self.request_stop is None:
            raise KeyboardInterrupt
        self.request_stop()
        # The interrupted code may itself be in the middle of a print; another thread waits for its lock, we cannot.
        text = "stopping after this step… (once more to abort)"
        threading.Thread(target=self._note, args=(text,), daemon=True).start()
