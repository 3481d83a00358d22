"""`coterie check`: whether a scenario keeps its contract, in plain words.

The check runs in this process; a thread watches it, because a play that loops without awaiting can be interrupted by
nobody. What it was at is then told, and the process ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.common import say
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from coterie.scenarios.findings import Findings
    from coterie.types import Observation, SeatId, TeamId, TrainingMode, TrainingTask

_FAILED = 1


def check(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="SCENARIO",
            help='A built-in or installed scenario by name, or "module:Class" importable from here.',
            show_default=False,
        ),
    ],
    options: Annotated[
        list[str] | None, typer.Option("--options", metavar="KEY=VALUE", help="An option of it; may be repeated.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of each side and seed that are played.")] = 20,
    plays: Annotated[int, typer.Option(min=0, help="Plays that put symmetry and exact figures to the test.")] = 1000,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time of one play.")] = 10.0,
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="Base model whose context prompts must fit.")
    ] = "smollm2-135m-instruct",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that a scenario keeps its contract; say what is wrong and how to mend it.

    The same tasks and plays come out for the same seed; held-out tasks are new; scores and rewards are within bounds;
    every seat is asked; seats said to be alike are; a cancelled play ends and leaves nothing running; English and
    Chinese differ in words only; prompts fit; exact figures are what playing gives; scripts answer. Exit code 1 when
    something is wrong.
    """
    from coterie.scenarios.base import build_scenario
    from coterie.scenarios.check import examine
    from coterie.scenarios.check_plays import Hooks

    built = build_scenario(scenario, parse_options(options or []))
    tokens, context, lengths = prompt_tokens(base)
    with StuckWatch(2 * timeout + 60.0, lambda told: _report_stuck(scenario, told, as_json)) as watch:
        hooks = Hooks(tokens=tokens, context=context, divide=divide, progress=watch.progress)
        found = examine(built, tasks=tasks, timeout_s=timeout, plays=plays, hooks=hooks)
    if lengths:
        found.note(lengths)
    if as_json:
        typer.echo(json.dumps({"scenario": scenario, **found.as_dict()}, indent=2, ensure_ascii=False))
    else:
        for line in report(scenario, found):
            say(line)
    if found.problems:
        raise typer.Exit(_FAILED)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of a scenario from ``key=value`` (values are TOML; bare words are text). Raises `ConfigError`."""
    from coterie.config import parse_override

    options: dict[str, Any] = {}
    for pair in pairs:
        key, value = parse_override(pair, "--options")
        options[key] = value
    return options


def report(scenario: str, found: Findings) -> list[str]:
    """What was found, a line each."""
    looked = f"{found.tasks} tasks, {found.plays} plays"
    lines = []
    for number, problem in enumerate(found.problems.values(), start=1):
        lines += [f"{number}. {problem.what}"]
        lines += [f"   seen: {problem.where}"] if problem.where else []
        lines += [f"   mend: {problem.mend}"]
    lines += [f"note: {note}" for note in found.notes]
    if found.problems:
        count = len(found.problems)
        lines.append(f"{scenario}: {count} {'problem' if count == 1 else 'problems'} ({looked})")
    else:
        lines.append(f"{scenario}: keeps its contract ({looked})")
    return lines


def divide(
    mode: TrainingMode,
    task: TrainingTask,
    scores: Mapping[SeatId, float],
    teams: Mapping[SeatId, TeamId | None],
) -> Mapping[SeatId, float]:
    """Rewards as the built-in mode divides them."""
    from coterie.modes.base import build_mode

    return build_mode(mode).rewards(task, scores, teams)


def prompt_tokens(
    base: str,
) -> tuple[Callable[[Observation, Sequence[str] | None, int], int] | None, int, str]:
    """How long a question is in tokens of a base model that is on this machine, and how much that takes.

    Returns:
        The function, the base's context in tokens, and a note when there is no such function.
    """
    from coterie.lm.prompt_length import PromptLength

    try:
        length = PromptLength.of(base)
    except CoterieError as error:
        return None, 0, f"whether prompts fit a base model was not looked at: {error}"
    return length.tokens, length.context, ""


class StuckWatch:
    """While entered, ends the process when nothing is reported for `patience_s` seconds."""

    def __init__(self, patience_s: float, tell: Callable[[Mapping[str, str]], None]) -> None:
        self._patience_s = patience_s
        self._tell = tell
        self._at = "starting"
        self._since = time.monotonic()
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="stuck-watch", daemon=True)

    def progress(self, what: str) -> None:
        """Say what is done next."""
        self._at, self._since = what, time.monotonic()

    def __enter__(self) -> StuckWatch:
        self.progress("starting")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._patience_s / 20):
            if time.monotonic() - self._since > self._patience_s:
                self._tell({"where": self._at, "line": self._line()})
                sys.stdout.flush()
                os._exit(_FAILED)  # the main thread hears of nothing any more

    def _line(self) -> str:
        frame = sys._current_frames().get(self._main)
        steps = traceback.extract_stack(frame)
        return f"{steps[-1].filename}:{steps[-1].lineno} in {steps[-1].name}"


def _report_stuck(scenario: str, told: Mapping[str, str], as_json: bool) -> None:
    what = f"a play loops without ever awaiting, so that nothing can interrupt it; it is at {told['line']}"
    mend = "give the loop an end, or await something in it"
    if as_json:
        problem = {"where": told["where"], "what": what, "mend": mend}
        typer.echo(json.dumps({"scenario": scenario, "passed": False, "problems": [problem], "notes": []}, indent=2))
        return
    for line in (f"1. {what}", f"   seen: {told['where']}", f"   mend: {mend}", f"{scenario}: 1 problem, not finished"):
        say(line)
