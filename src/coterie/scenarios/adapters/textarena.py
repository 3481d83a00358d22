"""TextArena: its games for one, two or many players, by free text or, where a game lists its moves, by choice.

    env.reset(players, seed) -> whose turn, what was said -> a text -> env.step(text) -> … -> rewards
    score of a seat = its reward, moved to [0, 1]; TextArena pays -1 to losers, 0 for a draw and 1 to winners

Many games end their messages with the moves there are ("Available Moves: '[0]', '[4]'"). With `choices = "listed"` the
newest such list becomes the choices of the turn, so that a small model cannot answer beside the rules; turns without a
list are free text, and what the game makes of an invalid one stands in ``invalid_moves``. Ids that end in "-raw" give
single messages, of which a seat is shown the rules, the last `memory` messages and the newest board; other ids give a
text that TextArena's own wrappers made.

Players take turns and share nothing beside the game: who hears what is said in it, the game decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import Field

from coterie.errors import ConfigError, ScenarioError, nearest
from coterie.scenarios.adapters.foreign import (
    GameOptions,
    Sandbox,
    attribute,
    distinct,
    game_seed,
    game_tasks,
    load,
    scored,
)
from coterie.scenarios.asking import chosen
from coterie.scenarios.base import Table
from coterie.types import Observation, Outcome, Seat, SeatId, Split, TrainingTask

_LIST: Final = re.compile(r"\b(?:available|valid|legal|possible)\s+(?:moves|actions)\b[^:\n]*:([^\n]*)", re.IGNORECASE)
_MOVE: Final = re.compile(r"\[[^\[\]\n]+\]")
_PLACEHOLDER: Final = re.compile(r"\[(?:[^\]]*\b[A-Z]\b[^\]]*|.*\.\.\..*|[^\]]*[<{].*)\]")
"""Stands for something to be filled in: "[bet X]", "[bid <amount>]"."""

Legal = Callable[[Any, int], Sequence[str]]
"""A user's function: (environment, player) -> the moves there are, as texts the game understands."""


class TextArenaOptions(GameOptions):
    """Settings of a TextArena game."""

    env_id: str = "TicTacToe-v0-raw"
    """As in textarena.make."""
    env_options: dict[str, Any] = Field(default_factory=dict)
    """More arguments of textarena.make, for example { max_rounds = 3 }."""
    players: int = Field(default=2, ge=1)
    """Seats; the game says how many it can have."""
    choices: str = "listed"
    """How a turn's moves become choices. listed: those the game itself lists in its newest message; none: every turn
    is free text; "module:attr": a function (environment, player) -> texts."""
    actions: tuple[str, ...] | None = None
    """The same moves in every turn, as texts the game understands, instead of `choices`."""
    memory: int = Field(default=6, ge=0)
    """Messages a seat is shown besides the rules and the newest board, where the game gives single messages."""
    render: str | None = None
    """"module:attr" of a function (messages, player) -> text, which makes the prompt; each message has `sender` (-1 is
    the game), `text` and `kind` ("PROMPT", "GAME_BOARD", …)."""
    max_tokens: int = Field(default=32, ge=1, le=4096)
    """Of a turn of free text."""


@dataclass(frozen=True, slots=True)
class Message:
    """Something a player was told."""

    sender: int
    """The player who said it; -1: the game."""
    text: str
    kind: str
    """Name of TextArena's ObservationType."""


class TextArena:
    """Seats "player_0", "player_1", … play one game.

    Metrics: ``moves``, turns of all seats together; ``finished``, whether the game came to its end within `max_turns`
    (else every reward is 0); ``invalid_moves``, the share of the seats that the game marked for an invalid move;
    ``drawn``, whether all got the same reward.

    Raises:
        ConfigError: the extra is missing, there is no such environment, or it cannot be made or started like this.
    """

    Options = TextArenaOptions

    def __init__(self, options: TextArenaOptions) -> None:
        self.options = options
        self._package = load("textarena", extra="textarena", scenario="textarena")
        registered = load("textarena.envs.registration", extra="textarena", scenario="textarena").ENV_REGISTRY
        if options.env_id not in registered:
            raise ConfigError(f"TextArena has no environment {options.env_id!r}{nearest(options.env_id, registered)}")
        if options.actions is not None and not (len(options.actions) > 1 and distinct(_short(options.actions))):
            raise ConfigError("options.actions must be at least two different moves")
        named = ":" in options.choices
        if not named and options.choices not in ("listed", "none"):
            raise ConfigError(f'options.choices {options.choices!r} must be "listed", "none" or "module:attr"')
        self._legal: Legal | None = attribute("choices", options.choices) if named else None
        self._render = attribute("render", options.render) if options.render is not None else None
        self._seats = [f"player_{player}" for player in range(options.players)]
        try:
            _Game(self, 0).observe()
        except ScenarioError as error:
            raise ConfigError(
                f"{options.env_id} cannot be started with {options.players} players and env_options "
                f"{options.env_options}: {error}"
            ) from error

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Endless starts of the game; see `game_tasks`."""
        return game_tasks("textarena", self.options.env_id, len(self._seats), self.options, split, seed)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return [Seat(seat) for seat in self._seats]

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that is of another game."""
        game_seed(task, self.options.env_id)

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        game = _Game(self, game_seed(task, self.options.env_id))
        turns = dict.fromkeys(self._seats, 0)
        finished = False
        while not finished:
            player = game.observe()
            seat = self._seats[player]
            if turns[seat] >= task.max_steps:
                break
            seen = self._shown(game.told(player), table.language)
            moves = game.moves(player)
            if moves is None:
                turn = await table[seat].act(seen, max_tokens=self.options.max_tokens, kind="move")
                text = turn.text
            else:
                turn = await table[seat].act(seen, choices=_short(moves), kind="move")
                text = moves[chosen(turn)]
            turns[seat] += 1
            finished = game.step(text)
        rewards, invalid = game.close(finished)
        return Outcome(
            scores=scored(rewards, self.options.reward_range or (-1.0, 1.0)),
            metrics={
                "moves": float(sum(turns.values())),
                "finished": float(finished),
                "invalid_moves": invalid,
                "drawn": float(len(set(rewards.values())) == 1),
            },
        )

    def _shown(self, told: str, language: str) -> Observation:
        system, prefix = self.options.opening(language)
        return Observation(system=system, user=told, prefix=prefix)


class _Game:
    """One running game, in a sandbox of its own."""

    def __init__(self, scenario: TextArena, seed: int) -> None:
        """Raises `ScenarioError` when the environment cannot be made or started."""
        self._scenario = scenario
        self._options = scenario.options
        self._sandbox = Sandbox(seed)
        self._messages: dict[int, list[Message]] = {player: [] for player in range(self._options.players)}
        self._text: dict[int, str] = {}
        """What wrappers made of the messages, where there are some."""
        with self._running():
            self._env = scenario._package.make(self._options.env_id, **self._options.env_options)
            self._env.reset(num_players=self._options.players, seed=seed % 2**31)

    def _running(self) -> Any:
        return self._sandbox.running(self._options.env_id)

    def observe(self) -> int:
        """Whose turn it is, after taking in what that player was told."""
        with self._running():
            player, told = self._env.get_observation()
            if isinstance(told, str):
                self._text[player] = told
            else:
                self._messages[player].extend(Message(sender, text, kind.name) for sender, text, kind in told)
        if player not in self._messages:
            raise ScenarioError(f"{self._options.env_id} says it is the turn of player {player}, who has no seat")
        return int(player)

    def told(self, player: int) -> str:
        """What the player is shown now."""
        messages = self._messages[player]
        if self._scenario._render is not None:
            return str(self._scenario._render(messages, player))
        return self._text[player].strip() if player in self._text else shown(messages, self._options.memory)

    def moves(self, player: int) -> list[str] | None:
        """The moves to choose from, as the game understands them; None: say anything."""
        if self._options.actions is not None:
            return list(self._options.actions)
        if self._scenario._legal is not None:
            with self._running():
                found = list(self._scenario._legal(self._env, player))
            if not found or not distinct(_short(found)):
                raise ScenarioError(
                    f"{self._options.choices} gave {found} as the moves of player {player}; they must be different "
                    "texts, and at least one"
                )
            return found
        if self._options.choices == "none":
            return None
        texts = (
            [self._text[player]] if player in self._text else [m.text for m in self._messages[player] if m.sender < 0]
        )
        return next((moves for text in reversed(texts) if (moves := listed(text)) is not None), None)

    def step(self, text: str) -> bool:
        """Make a move; whether the game is over."""
        with self._running():
            done, _ = self._env.step(action=text)
        return bool(done)

    def close(self, finished: bool) -> tuple[dict[SeatId, float], float]:
        """Rewards by seat, 0 for all if the game is not over; and the share of seats marked for an invalid move."""
        with self._running():
            rewards, info = self._env.close()
        seats = self._scenario._seats
        if finished and (rewards is None or set(rewards) != set(range(len(seats)))):
            raise ScenarioError(f"{self._options.env_id} ended with the rewards {rewards}, not one for every player")
        earned = {seat: float(rewards[player]) if finished else 0.0 for player, seat in enumerate(seats)}
        invalid = sum(bool(info.get(player, {}).get("invalid_move")) for player in range(len(seats)))
        return earned, invalid / len(seats)


def shown(messages: Sequence[Message], memory: int) -> str:
    """The rules, then the last `memory` other messages in order, then the newest board."""
    rules = [m for m in messages if m.kind == "PROMPT"]
    boards = [m for m in messages if m.kind == "GAME_BOARD"]
    others = [m for m in messages if m.kind not in ("PROMPT", "GAME_BOARD")]
    latest = others[len(others) - min(memory, len(others)) :]
    lines = [*map(_said, rules), *map(_said, latest), *map(_said, boards[-1:])]
    return "\n".join(line for line in lines if line)


def _said(message: Message) -> str:
    text = message.text.strip()
    return text if message.sender < 0 else f"[Player {message.sender}] {text}"


def listed(text: str) -> list[str] | None:
    """The moves a message lists last, for example after "Available Moves:"; None if it lists none, or patterns."""
    lists = [match.group(1) for match in _LIST.finditer(text)]
    moves = list(dict.fromkeys(_MOVE.findall(lists[-1]))) if lists else []
    if not moves or any(_PLACEHOLDER.fullmatch(move) for move in moves) or not distinct(_short(moves)):
        return None
    return moves


def _short(moves: Sequence[str]) -> tuple[str, ...]:
    """Without the brackets, when all have them: fewer tokens to say."""
    bare = tuple(move[1:-1].strip() if _MOVE.fullmatch(move) else "" for move in moves)
    return bare if all(bare) and len(set(bare)) == len(bare) else tuple(moves)
