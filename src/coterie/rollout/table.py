"""The table of one episode: seats to ask for turns, and who may hear whom.

A seat handle renders what it is shown, asks whoever holds the seat (an engine under an adapter version, a script, a
person), and records the `Turn`. Random numbers of a turn depend only on (run seed, episode, seat, turn number).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from coterie.errors import RequestError, ScenarioError
from coterie.inference.base import ChatFormat, Engine
from coterie.modes.base import Mode
from coterie.registry import resolve
from coterie.rollout.calibration import Calibration
from coterie.scenarios.base import Script
from coterie.types import (
    AdapterVersion,
    GenerateRequest,
    Generation,
    ModelId,
    Observation,
    Person,
    Player,
    PlayerCard,
    Scripted,
    SeatId,
    Strategy,
    Tier,
    TrainingTask,
    Turn,
)

Ask = Callable[[SeatId, Observation, Sequence[str] | None], str]
"""Asks a person: (seat, what it is shown, choices) -> the answer's text."""


def stable_seed(*parts: object) -> int:
    """A 64-bit seed that depends only on `parts`, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a seat in one episode."""

    card: PlayerCard
    player: Player
    adapter: AdapterVersion | None
    """The version that generates, for trained and frozen players (None: the bare base)."""
    trained: ModelId | None
    """The model whose learner may use these turns."""


@dataclass(frozen=True, slots=True)
class TableServices:
    """What all tables of a run share."""

    engine: Engine
    chat: ChatFormat
    mode: Mode
    scripts: Mapping[str, Script]
    calibration: Calibration
    temperature: float
    language: str
    seed: int
    ask: Ask | None = None


class EpisodeTable:
    """The `Table` a scenario plays one episode at."""

    def __init__(
        self,
        services: TableServices,
        task: TrainingTask,
        holders: Mapping[SeatId, Holder],
        strategy: Strategy,
        episode_id: str,
        withheld: frozenset[SeatId],
    ) -> None:
        self.services = services
        self.task = task
        self.strategy = strategy
        self.language = services.language
        self.seats: tuple[SeatId, ...] = tuple(holders)
        self.episode_id = episode_id
        self.withheld = withheld
        self._handles = {seat_id: EpisodeSeat(self, holder) for seat_id, holder in holders.items()}
        self._rng: random.Random | None = None

    @property
    def rng(self) -> random.Random:
        """The episode's own generator, made when first used."""
        if self._rng is None:
            self._rng = random.Random(stable_seed(self.services.seed, self.episode_id, "table"))
        return self._rng

    def __getitem__(self, seat_id: SeatId) -> EpisodeSeat:
        try:
            return self._handles[seat_id]
        except KeyError:
            raise ScenarioError(
                f"the scenario asked for seat {seat_id!r}, but this table has {', '.join(self.seats)}"
            ) from None

    def hears(self, listener: SeatId, speaker: SeatId) -> bool:
        """See `Table.hears`."""
        return listener != speaker and self.services.mode.hears(self[listener].card, self[speaker].card, self.task)

    def delivers(self, speaker: SeatId) -> bool:
        """See `Table.delivers`."""
        return speaker not in self.withheld

    def turns(self) -> dict[SeatId, tuple[Turn, ...]]:
        """What has been said so far."""
        return {seat_id: tuple(handle.turns) for seat_id, handle in self._handles.items()}


class EpisodeSeat:
    """The `SeatHandle` of one seat."""

    __slots__ = ("card", "holder", "table", "turns")

    def __init__(self, table: EpisodeTable, holder: Holder) -> None:
        self.table = table
        self.holder = holder
        self.card = holder.card
        self.turns: list[Turn] = []

    async def act(
        self,
        observation: Observation,
        *,
        choices: Sequence[str] | None = None,
        max_tokens: int = 16,
        kind: str = "answer",
    ) -> Turn:
        """See `SeatHandle.act`."""
        table = self.table
        if len(self.turns) >= table.task.max_steps:
            raise ScenarioError(
                f"seat {self.card.seat_id!r} was asked for more than {table.task.max_steps} turns (task.max_steps)"
            )
        player = self.holder.player
        if isinstance(player, Scripted | Person):
            turn = self._told(observation, choices, kind, player)
        else:
            turn = await self._generated(observation, choices, max_tokens, kind)
        self.turns.append(turn)
        return turn

    async def distribution(self, observation: Observation, choices: Sequence[str]) -> tuple[float, ...]:
        """See `SeatHandle.distribution`. Raises `ScenarioError` for a seat that no model holds."""
        if isinstance(self.holder.player, Scripted | Person):
            raise ScenarioError(f"seat {self.card.seat_id!r} is held by no model; it has no distribution")
        request = self._request(observation, choices, 1, temperature=1.0, distribution=True)
        generation = await self._generate(request)
        assert generation.choice_probs is not None
        return generation.choice_probs

    def _request(
        self,
        observation: Observation,
        choices: Sequence[str] | None,
        max_tokens: int,
        *,
        temperature: float,
        distribution: bool = False,
    ) -> GenerateRequest:
        services = self.table.services
        return GenerateRequest(
            prompt_ids=services.chat.render(observation),
            adapter=self.holder.adapter,
            seed=stable_seed(services.seed, self.table.episode_id, self.card.seat_id, len(self.turns)),
            max_tokens=max_tokens,
            temperature=temperature,
            choices=services.chat.encode_choices(observation, choices) if choices is not None else None,
            bias=services.calibration.bias(self.card.seat_id, tuple(choices)) if choices is not None else None,
            stop_ids=services.chat.stop_ids,
            distribution=distribution,
            messages=_messages(observation),
        )

    async def _generate(self, request: GenerateRequest) -> Generation:
        """Ask the engine. Raises `RequestError` saying whose turn of which task it refuses."""
        try:
            return await self.table.services.engine.generate(request)
        except RequestError as error:
            where = f"task {self.table.task.task_id!r}, seat {self.card.seat_id!r}, turn {len(self.turns) + 1}"
            raise RequestError(f"{where}: {error}") from error

    async def _generated(
        self, observation: Observation, choices: Sequence[str] | None, max_tokens: int, kind: str
    ) -> Turn:
        services = self.table.services
        request = self._request(observation, choices, max_tokens, temperature=services.temperature)
        services.calibration.saw(self.card.seat_id, choices, request)
        made = await self._generate(request)
        if choices is not None and made.choice is not None:
            text = choices[made.choice]
        else:
            text = services.chat.decode(made.token_ids)
        return Turn(
            seat_id=self.card.seat_id,
            model_id=self.holder.trained,
            adapter=made.adapter,
            kind=kind,
            prompt_ids=made.prompt_ids,
            token_ids=made.token_ids,
            logprobs=made.logprobs,
            allowed=made.allowed,
            bias=request.bias,
            temperature=services.temperature,
            entropy=made.entropy,
            text=text,
            choice=made.choice,
            valid=made.finish_reason != "length",
            tier=made.tier,
            server=made.server,
            latency_s=made.latency_s,
        )

    def _told(
        self, observation: Observation, choices: Sequence[str] | None, kind: str, player: Scripted | Person
    ) -> Turn:
        services = self.table.services
        if isinstance(player, Person):
            if services.ask is None:
                raise ScenarioError(f"seat {self.card.seat_id!r} is held by a person, but nobody is at the terminal")
            text = services.ask(self.card.seat_id, observation, choices)
            tier = Tier.HUMAN
        else:
            rng = random.Random(stable_seed(services.seed, self.table.episode_id, self.card.seat_id, len(self.turns)))
            script: Script | None = services.scripts.get(player.name)
            if script is None:
                script = resolve("script", player.name, dict.fromkeys(services.scripts, ""))
            text = script(observation, choices or (), rng)
            tier = Tier.SCRIPT
        choice = list(choices).index(text) if choices is not None and text in choices else None
        if choices is not None and choice is None:
            raise ScenarioError(
                f"seat {self.card.seat_id!r} answered {text!r}, which is none of {', '.join(map(repr, choices))}"
            )
        return Turn(
            seat_id=self.card.seat_id, model_id=None, adapter=None, kind=kind, prompt_ids=(), token_ids=(),
            logprobs=(), allowed=None, bias=None, temperature=1.0, entropy=(), text=text, choice=choice,
            valid=True, tier=tier,
        )  # fmt: skip


@lru_cache(maxsize=65536)
def _messages(observation: Observation) -> tuple[tuple[str, str], ...]:
    told = (("system", observation.system), ("user", observation.user), ("assistant", observation.prefix))
    return tuple((role, text) for role, text in told if text or role == "user")
