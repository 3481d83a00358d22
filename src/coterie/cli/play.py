"""`coterie play`: a person takes a seat at a trained run's table.

observation -> shown as text -> the person's answer -> the episode goes on -> what everyone said, and what it earned
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.common import and_close, open_trained, run_interruptible, say
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from coterie.monitor.tables import ResultTable
    from coterie.types import Episode, Observation, SeatId


class PersonLeftError(CoterieError):
    """The person's input ended."""

    exit_code = 0


def play(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.", show_default=False)],
    seat: Annotated[str | None, typer.Option(metavar="NAME", help="Seat to take.", show_default="the last")] = None,
    task: Annotated[int, typer.Option(metavar="N", min=0, help="Which held-out task, counted from 0.")] = 0,
) -> None:
    """Take a seat among the trained models for one task."""
    run = open_trained(run_path)
    from coterie.monitor.console import PlainConsole

    person = Person(input)
    with run.lock():
        observer = PlainConsole(sys.stdout)
        observer.stage("loading")
        from coterie.environment import MultiModelEnvironment

        try:
            environment = MultiModelEnvironment.resume(run, observer)
            episode = run_interruptible(and_close(environment, environment.play(seat, person.ask, task)))
        except CoterieError:
            if not person.left:
                raise
            say("\nyou left the table; goodbye")
            return
    for line in transcript(episode):
        say(line)
    say("\n" + results(episode).plain())


class Person:
    """Asks a person for answers through `read` (a prompt in, a line out, `EOFError` at the end)."""

    def __init__(self, read: Callable[[str], str]) -> None:
        self._read = read
        self._rules: str | None = None
        self.left = False

    def ask(self, seat_id: SeatId, observation: Observation, choices: Sequence[str] | None) -> str:
        """Show the observation and return one of `choices` exactly as given, or free text that is not empty.

        Raises:
            PersonLeftError: the input ended; every later call raises it too.
        """
        say(f"\n--- your turn at seat {seat_id} ---")
        if observation.system and observation.system != self._rules:
            say(f"{observation.system}\n")
            self._rules = observation.system
        say(observation.user)
        if choices is None:
            return self._free(observation.prefix)
        return choices[self._choice(choices, observation.prefix)]

    def _free(self, prefix: str) -> str:
        while True:
            answer = self._line(prefix)
            if answer:
                return answer
            say("an empty answer does not count; type some text")

    def _choice(self, choices: Sequence[str], prefix: str) -> int:
        """Index of the choice the person means, by number or by text."""
        shown = [choice.strip() for choice in choices]
        # Where answers are numbers themselves, a number typed must mean the answer and not its place.
        numbered = not any(text.isdecimal() for text in shown)
        wanted = f"a number from 1 to {len(choices)}, or the answer itself" if numbered else "the answer itself"
        for place, text in enumerate(shown, start=1):
            say(f"  {place}) {text}" if numbered else f"  - {text}")
        while True:
            answer = self._line(prefix)
            alike = [at for at, text in enumerate(shown) if text == answer]
            alike = alike or [at for at, text in enumerate(shown) if text.casefold() == answer.casefold()]
            if len(alike) == 1:
                return alike[0]
            if numbered and answer.isdecimal() and 1 <= int(answer) <= len(choices):
                return int(answer) - 1
            say(f"that is not one of the answers; type {wanted}")

    def _line(self, prefix: str) -> str:
        from coterie.monitor.tables import clean

        if self.left:
            raise PersonLeftError("the input has ended")
        try:
            line = self._read(f"{clean(prefix, lines=False)} > " if prefix else "> ")
        except UnicodeDecodeError:
            return ""
        except EOFError:
            self.left = True
            raise PersonLeftError("the input has ended") from None
        return clean(line, lines=False).strip()


def transcript(episode: Episode) -> list[str]:
    """What every seat said, in the order of seats."""
    from coterie.types import ADVICE, DECISION

    lines = ["\n--- what everyone said ---"]
    for seat_id, trajectory in episode.trajectories.items():
        for turn in trajectory.turns:
            kept_back = " (not delivered)" if turn.kind in (ADVICE, DECISION) and seat_id in episode.withheld else ""
            lines.append(f"{seat_id} ({_holder(episode, seat_id)}), {turn.kind}{kept_back}: {turn.text.strip()}")
    return lines


def results(episode: Episode) -> ResultTable:
    """Score, accuracy and reward of every seat."""
    from coterie.monitor.tables import ResultTable

    outcome = episode.outcome
    rows = tuple(
        (seat_id, _holder(episode, seat_id), outcome.scores[seat_id], outcome.accuracy.get(seat_id), reward)
        for seat_id, reward in episode.rewards.items()
    )
    figures = ", ".join(f"{name} {value:.3f}" for name, value in sorted(outcome.metrics.items()))
    title = f"outcome ({figures})" if figures else "outcome"
    return ResultTable(title, ("seat", "held by", "score", "accuracy", "reward"), rows)


def _holder(episode: Episode, seat_id: SeatId) -> str:
    """Who held a seat: the person, an adapter version, the bare base or a script."""
    from coterie.types import Tier

    trajectory = episode.trajectories[seat_id]
    if not trajectory.turns:
        return trajectory.model_id or "nobody who spoke"
    first = trajectory.turns[0]  # a seat keeps its holder; a person may sit in a model's place
    if first.tier in (Tier.HUMAN, Tier.SCRIPT):
        return "you" if first.tier is Tier.HUMAN else "a script"
    return first.adapter.name if first.adapter else "the bare base"
