"""One update, measured: its seconds, the least that had to be computed for it, and where the time went.

`Meter` watches the loop through what the loop offers (its records, its `keep` callback, its credit scheme), so it does
not depend on how engine and learner work. Nothing is written to disk; training moves the adapters in memory only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coterie.bench.profile import by_kind, profiled
from coterie.credit.base import Magnetised
from coterie.environment import MultiModelEnvironment
from coterie.monitor.metrics import UpdateRecord
from coterie.types import Advantages, Episode, FailedEpisode, Tier

if TYPE_CHECKING:
    from coterie.credit.base import Credit
    from coterie.lm.cost import Adapters, DecoderShape, Work

ROLLOUT, LEARNING = "rollout", "learning"
PHASES = (ROLLOUT, LEARNING)

_BORDER = "coterie: learning begins"


@dataclass(frozen=True, slots=True)
class PhaseMeasure:
    """One phase of one update."""

    seconds: float
    flops: float
    """Least floating-point operations, where rollout hands its forward pass on to learning."""
    separate_flops: float
    """Least floating-point operations of a phase that computes all it needs itself."""
    sampled: int
    """Tokens sampled, or trained on."""
    distinct: int
    """Tokens that must be computed."""
    naive: int
    """Tokens that one sequence at a time would compute."""

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class UpdateMeasure:
    """One update."""

    seconds: float
    phases: Mapping[str, PhaseMeasure]
    turns: int


class _Recorded:
    """A credit scheme whose last advantages can be looked at; its call marks where learning begins."""

    def __init__(self, credit: Credit) -> None:
        self.credit = credit
        self.last: Advantages | None = None

    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        from torch.profiler import record_function

        with record_function(_BORDER):
            self.last = self.credit.advantages(episodes)
        return self.last

    def state(self) -> dict[str, Any]:
        return self.credit.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.credit.restore(state)


class Meter:
    """Measures updates of one environment, which must not have a run folder and must not be built yet."""

    def __init__(self, environment: MultiModelEnvironment) -> None:
        from coterie.lm.cost import Adapters, DecoderShape

        self.environment = environment
        self.loop = environment.build()
        self.base = environment.base
        self._credit = _Recorded(self.loop.credit)
        self.loop.credit = self._credit
        self.loop.keep = self._keep
        self._episodes: Sequence[Episode] = ()
        config = environment.config
        self.shape: DecoderShape = DecoderShape.of(self.base.model.config)
        adapted = max(1, round(self.shape.layers * config.base.lora_layers))
        self._adapters = Adapters({}, config.base.lora_targets, adapted)

    async def update(self) -> UpdateMeasure:
        """One more update, measured."""
        (record,) = await self.environment.train_cycles(1)
        return self._measured(record)

    async def profiled(self, typical: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Seconds by phase and kind of one more update.

        `typical`: seconds each phase takes without a profiler, which slows down what stands between operations.
        """
        (record,), recorded = await profiled(self.environment.train_cycles(1), self.base)
        walls = {ROLLOUT: record.seconds["rollout"], LEARNING: record.seconds["learn"]}
        border = min((event.time_range.start for event in recorded if event.name == _BORDER), default=math.inf)
        found = {}
        for phase in PHASES:
            events = [event for event in recorded if (event.time_range.start >= border) == (phase == LEARNING)]
            found[phase] = by_kind(events, min(walls[phase], typical[phase]), self.shape.head_dim)
        return found

    def _keep(
        self, update: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode], record: UpdateRecord | None
    ) -> None:
        self._episodes = episodes

    def _measured(self, record: UpdateRecord) -> UpdateMeasure:
        rollout, learning = self._work()
        played, learned = self._rollout_flops(rollout), self._learning_flops(learning)
        recalled = self._recalled_flops(learning, record)
        turns = sum(len(t.turns) for e in self._episodes for t in e.trajectories.values())
        phases = {
            ROLLOUT: self._phase(record.seconds["rollout"], rollout, played, played),
            LEARNING: self._phase(record.seconds["learn"], learning, learned - recalled, learned),
        }
        return UpdateMeasure(record.seconds["total"], phases, turns)

    @staticmethod
    def _phase(seconds: float, work: Work, flops: float, separate: float) -> PhaseMeasure:
        return PhaseMeasure(seconds, flops, separate, work.sampled, work.distinct, work.naive)

    def _work(self) -> tuple[Work, Work]:
        """What the last update's rollout and learning had to compute."""
        from coterie.lm.cost import Work

        rollout, learning = Work(), Work()
        models, vocabulary = self.environment.models, self.shape.vocabulary
        advantages, keep_zero = self._credit.last, self.loop.learner.keep_zero
        assert advantages is not None
        for episode in self._episodes:
            for seat, trajectory in episode.trajectories.items():
                for number, turn in enumerate(trajectory.turns):
                    if turn.tier is Tier.LOCAL:
                        player = turn.adapter.name if turn.adapter is not None else None
                        rollout.add(player, turn.prompt_ids, turn.token_ids, turn.allowed, vocabulary)
                    trained = turn.trainable and turn.model_id in models
                    if trained and (keep_zero or advantages.of(episode.episode_id, seat, number) != 0.0):
                        learning.add(turn.model_id, turn.prompt_ids, turn.token_ids, turn.allowed, vocabulary)
        return rollout, learning

    def _rollout_flops(self, work: Work) -> float:
        from coterie.lm.cost import forward_flops

        return forward_flops(self.shape, work, self._ranked(work))

    def _learning_flops(self, work: Work) -> float:
        from coterie.lm.cost import backward_flops, forward_flops

        learner, adapters = self.environment.config.learner, self._ranked(work)
        flops = forward_flops(self.shape, work, adapters) + backward_flops(self.shape, work, adapters)
        flops *= learner.passes
        # anchors are computed once, whatever the passes; those that stay know the choices of earlier updates
        known = all(
            turn.allowed is not None for e in self._episodes for tr in e.trajectories.values() for turn in tr.turns
        )
        if learner.kl_coefficient > 0 and not known:
            flops += forward_flops(self.shape, work, self._adapters)
        credit = self.loop.credit
        if isinstance(credit, Magnetised) and credit.magnet.strength > 0 and not (known and credit.magnet.every == 0):
            flops += forward_flops(self.shape, work, adapters)
        return flops

    def _recalled_flops(self, work: Work, record: UpdateRecord) -> float:
        """Of the forward pass over tokens that rollout had computed."""
        from coterie.lm.cost import forward_flops

        packed = record.metrics["learn/packed_tokens"]
        if not packed:
            return 0.0
        share = record.metrics["learn/recalled_tokens"] / packed * self.environment.config.learner.passes
        return share * forward_flops(self.shape, work, self._ranked(work))

    def _ranked(self, work: Work) -> Adapters:
        from dataclasses import replace

        ranks = {m.model_id: m.config.lora_rank for m in self.environment.models.values()}
        names = [policy for policy in work.tokens if policy is not None]
        return replace(self._adapters, ranks={name: ranks.get(name.split("@v")[0], 0) for name in names})
