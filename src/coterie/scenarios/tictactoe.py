"""Tic-tac-toe against a perfect player, a random one, or another model.

    the seats take cells in turn, "player" first in every other task --> three in a line, or no cell left
    score = 1 for a win, 0.5 for a draw, 0 for a loss

The cells are numbered 1 to 9, row by row, and a board is shown as nine marks: x for own cells, o for the other's, the
numbers of free ones; so each seat sees itself as x, whichever began. A move is one digit, and only free cells can be
chosen. Boards that are equal up to rotation and reflection are shown the same way (`symmetry`), so that what is learned
in one corner is known in all four.

It is one game without further content: training and held-out play share it (`single_task`). How often a policy wins,
draws and loses is not counted from plays but computed by `exact`: a policy sees the board alone, so the boards it
can meet against a given opponent, each with its probability, are followed move by move, and every board is asked once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Final, Literal

from pydantic import Field

from coterie.errors import ScenarioError
from coterie.scenarios.asking import Question, chosen, distributions
from coterie.scenarios.base import ScenarioOptions, Script, Table, at_random
from coterie.scenarios.tictactoe_rules import (
    EMPTY,
    FREE,
    OTHER,
    OWN,
    Board,
    after,
    best_moves,
    free,
    lost,
    over,
    representative,
)
from coterie.types import Observation, Outcome, Scripted, Seat, SeatId, Split, TaskType, TrainingTask

PLAYER: Final = "player"
OPPONENT: Final = "opponent"
SEATS: Final[tuple[SeatId, SeatId]] = (PLAYER, OPPONENT)

MODEL: Final = "model"
"""The opponent that is another model, or the same one."""
HELDOUT_GAMES: Final = 50
"""Held-out games against each opponent as first and as second player; they differ in what the opponent draws."""

_PROMPTS: Final = {
    "en": {"system": "Tic-tac-toe. You are x.", "user": "Your cell?", "prefix": "{board}:"},
    "zh": {"system": "井字棋。你是x。", "user": "占哪格？", "prefix": "{board}："},
}
_MARKS: Final = {OWN: "x", OTHER: "o"}


class TicTacToeOptions(ScenarioOptions):
    """Settings of tic-tac-toe."""

    opponents: tuple[Literal["minimax", "random", "model"], ...] = Field(default=("minimax",), min_length=1)
    """Who holds the seat "opponent"; tasks take these in turn. minimax never errs, model is another
    model of the run."""
    symmetry: bool = True
    """Whether boards equal up to rotation and reflection are shown the same way; a board then turns between moves."""
    exact_floor: float = Field(default=0.0, ge=0, lt=1)
    """Boards less probable than this are not followed by `exact`; what they make up is told as unresolved."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.0, ge=0, le=1)
    """Of each task; matters in mode mixed."""


Move = Callable[[Board], Mapping[int, float]]
"""Of an opponent: the probability of each cell."""


@dataclass
class Results:
    """How games end, as probabilities that sum to 1."""

    win: float = 0.0
    draw: float = 0.0
    loss: float = 0.0
    unresolved: float = 0.0
    """Of what was too improbable to be followed."""
    boards: dict[Board, float] = field(default_factory=dict)
    """Where the policy is to move next, with their probabilities."""

    def end(self, board: Board, probability: float, mover_is_policy: bool) -> None:
        """Take in a board that is over; `mover_is_policy`: whether the policy would be to move."""
        if not lost(board):
            self.draw += probability
        elif mover_is_policy:
            self.loss += probability
        else:
            self.win += probability


class TicTacToe:
    """Seats "player" and "opponent" take cells in turn.

    Metrics of `play`, of seat "player": ``win``, ``draw``, ``loss``; ``first``, whether it began.

    Scripts: ``minimax``, which plays perfectly and draws among equally good moves; ``random``.
    """

    Options = TicTacToeOptions
    single_task = True

    def __init__(self, options: TicTacToeOptions) -> None:
        self.options = options
        self.scripts: Mapping[str, Script] = {"minimax": _minimax, "random": at_random}

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Every opponent, with seat "player" first and second; in turns, endlessly for TRAIN."""
        # the exact figures are of the seats of the first held-out task: games of two models come first
        opponents = sorted(dict.fromkeys(self.options.opponents), key=lambda name: name != MODEL)
        kinds = [(name, first) for name in opponents for first in SEATS]
        if split is Split.TRAIN:
            kinds = [(name, first) for name in self.options.opponents for first in SEATS]
        number = None if split is Split.TRAIN else HELDOUT_GAMES * len(kinds)
        for game, (opponent, first) in enumerate(islice(cycle(kinds), number)):
            yield TrainingTask(
                task_id=f"tictactoe-{opponent}-{first}" + (f"-{game}" if split is Split.HELDOUT else ""),
                task_type=TaskType.REASONING,
                reward_pool=self.options.reward_pool,
                max_steps=5,
                required_models=len(SEATS),
                cooperation_level=self.options.cooperation_level,
                content={"opponent": opponent, "first": first},
                split=split,
            )

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        opponent, _ = self._content(task)
        return [Seat(PLAYER), Seat(OPPONENT, None if opponent == MODEL else Scripted(opponent))]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for an unknown opponent or first seat."""
        self._content(task)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        _, first = self._content(task)
        mover = SEATS.index(first)
        board = self._view(EMPTY)
        while not over(board):
            shown = self.shown(board, table.language)
            turn = await table[SEATS[mover]].act(shown, choices=self.choices(board), kind="move")
            board = self._view(after(board, free(board)[chosen(turn)]))
            mover = 1 - mover
        score = 0.5 if not lost(board) else float(SEATS[mover] == OPPONENT)
        return Outcome(
            scores={PLAYER: score, OPPONENT: 1.0 - score},
            metrics={
                "win": float(score == 1.0),
                "draw": float(score == 0.5),
                "loss": float(score == 0.0),
                "first": float(first == PLAYER),
            },
        )

    async def exact(self, table: Table) -> dict[str, float]:
        """How the games of the policy at seat "player" end against minimax (every best move equally likely) and against
        random moves, without sampling; where a model holds the other seat too, also its games.

        Returns:
            For both opponents, over games begun and not begun in equal parts: ``minimax_win``, ``minimax_draw``,
            ``minimax_loss``; ``minimax_unbeaten``, win or draw; ``minimax_loss_first`` and ``minimax_loss_second``,
            losses of the games begun and not begun; the same for random. The figures of seat "opponent" begin with
            ``opponent_``. ``unresolved``: the greatest probability of what was not followed (`exact_floor`); no
            figure is further than this below the truth, and none is above it.
        """
        opponent, _ = self._content(table.task)
        figures = await self._measure(table, PLAYER)
        if opponent == MODEL:
            other = await self._measure(table, OPPONENT)
            unresolved = max(figures["unresolved"], other["unresolved"])
            figures |= {f"{OPPONENT}_{name}": number for name, number in other.items()}
            del figures[f"{OPPONENT}_unresolved"]
            figures["unresolved"] = unresolved
        return figures

    async def _measure(self, table: Table, seat: SeatId) -> dict[str, float]:
        asked: dict[Board, Sequence[float]] = {}
        figures: dict[str, float] = {}
        unresolved = 0.0
        for name, move in OPPONENTS.items():
            first, second = [await self._results(table, seat, move, begins, asked) for begins in (True, False)]
            figures |= {
                f"{name}_win": (first.win + second.win) / 2,
                f"{name}_draw": (first.draw + second.draw) / 2,
                f"{name}_loss": (first.loss + second.loss) / 2,
                f"{name}_unbeaten": (first.win + first.draw + second.win + second.draw) / 2,
                f"{name}_loss_first": first.loss,
                f"{name}_loss_second": second.loss,
            }
            unresolved = max(unresolved, first.unresolved, second.unresolved)
        return {**figures, "unresolved": unresolved}

    async def _results(
        self, table: Table, seat: SeatId, opponent: Move, begins: bool, asked: dict[Board, Sequence[float]]
    ) -> Results:
        """Follow all games of a seat against `opponent`; `asked` keeps what the policy said of each board."""
        results = Results()
        if begins:
            results.boards[self._view(EMPTY)] = 1.0
        else:
            self._reply(results, self._view(EMPTY), 1.0, opponent)
        while results.boards:
            here, results.boards = results.boards, {}
            results.unresolved += sum(p for p in here.values() if p < self.options.exact_floor)
            here = {board: p for board, p in here.items() if p >= self.options.exact_floor}
            new = [board for board in here if board not in asked]
            questions = {b: Question(seat, self.shown(b, table.language), self.choices(b)) for b in new}
            asked.update(await distributions(table, questions))
            for board, probability in here.items():
                for cell, share in zip(free(board), asked[board], strict=True):
                    if share > 0:
                        self._reply(results, self._view(after(board, cell)), probability * share, opponent)
        return results

    def _reply(self, results: Results, board: Board, probability: float, opponent: Move) -> None:
        """What comes of a board at which the opponent is to move."""
        if over(board):
            results.end(board, probability, mover_is_policy=False)
            return
        for cell, share in opponent(board).items():
            then = self._view(after(board, cell))
            if over(then):
                results.end(then, probability * share, mover_is_policy=True)
            else:
                results.boards[then] = results.boards.get(then, 0.0) + probability * share

    def shown(self, board: Board, language: str) -> Observation:
        """What the seat to move sees."""
        text = _PROMPTS[language]
        cells = "".join(_MARKS.get(mark, _digit(cell)) for cell, mark in enumerate(board))
        return Observation(system=text["system"], user=text["user"], prefix=text["prefix"].format(board=cells))

    def choices(self, board: Board) -> tuple[str, ...]:
        """The free cells, as digits."""
        return tuple(map(_digit, free(board)))

    def _view(self, board: Board) -> Board:
        return representative(board) if self.options.symmetry else board

    def _content(self, task: TrainingTask) -> tuple[str, SeatId]:
        """Opponent and first seat; a task without content is of the first opponent and begun by "player"."""
        opponent = task.content.get("opponent", self.options.opponents[0])
        first = task.content.get("first", PLAYER)
        known = (*self.scripts, MODEL)
        if opponent not in known or first not in SEATS:
            raise ScenarioError(
                f"task {task.task_id!r}: content has opponent {opponent!r} and first {first!r}; opponent must be one "
                f"of {', '.join(known)}, first one of {', '.join(SEATS)}"
            )
        return opponent, first


def board_of(observation: Observation) -> Board:
    """The board an observation shows. Raises `ScenarioError` when it shows none."""
    found = re.match(r"[xo1-9]{9}", observation.prefix)
    if found:
        marks = {mark: number for number, mark in _MARKS.items()}
        return tuple(marks.get(mark, FREE) for mark in found[0])
    raise ScenarioError(f"there is no board in {observation.prefix!r}")


def _digit(cell: int) -> str:
    return str(cell + 1)


def _even(cells: Sequence[int]) -> dict[int, float]:
    return {cell: 1 / len(cells) for cell in cells}


OPPONENTS: Final[Mapping[str, Move]] = {
    "minimax": lambda board: _even(best_moves(board)),
    "random": lambda board: _even(free(board)),
}
"""What `exact` measures against."""


def _minimax(observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
    return _digit(rng.choice(best_moves(board_of(observation))))
