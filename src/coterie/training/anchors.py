"""What a policy is held near while it learns.

    the base            kl_coefficient * KL(policy || base)                     stays where it is
    its magnet          strength * KL(policy || magnet)                         moves every few updates
    itself              proximal * KL(policy || policy before the update)       moves every update

An anchor is known by its last hidden states: from them come log-probabilities under exactly the mask, bias and
temperature a turn was sampled with, so a divergence is exact and 0 where the two policies agree. Base and magnets cost
one forward pass without gradient each, all policies together, whatever the number of passes over an update's
episodes; where all that is learned from are choices, only of what no update since the anchor's last move asked
(`coterie.training.remembered`). The policy before the update is what the first pass computed anyway. Switched off,
they cost nothing.

A magnet is an adapter without a version: nobody plays it, and no engine knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coterie.credit.base import Magnet
from coterie.errors import RunFolderError
from coterie.lm.adapter import Adapter
from coterie.lm.attention import Plan
from coterie.lm.base import BaseModel
from coterie.training.remembered import Remembered, Segments, Site
from coterie.types import ModelId

Distance = Literal["kl", "magnet_kl", "step_kl"]
"""Which divergence. The first two are fields of `StepStats`; the last is 0 in the pass that fills those."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """One thing the policies of a pass are held near."""

    distance: Distance
    coefficient: float
    """In units of an advantage per nat."""
    hidden: Tensor
    """(tokens, hidden): last hidden states of the packed tokens of the pass; of all, or where terms stand."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Tokens of one pass."""

    ids: Tensor
    """int64 (tokens,)"""
    positions: Tensor
    """int64 (tokens,)"""
    plan: Plan
    segments: Segments
    choices: Mapping[int, Site] | None
    """Packed tokens where terms stand, if all of them are choices; None: some are not, and hardly come again."""


class Anchors:
    """The anchors of one learner's policies, and the magnets among them."""

    def __init__(self, base: BaseModel, kl_coefficient: float, magnet: Magnet | None, *, passes: int) -> None:
        """
        Args:
            passes: over every update's episodes; what is computed in the first is kept for the others.
        """
        self.base, self.kl_coefficient, self.passes = base, kl_coefficient, passes
        self.magnet = magnet or Magnet(strength=0.0, proximal=0.0, every=0, rate=1.0)
        self._strength = self.magnet.strength
        self._magnets: dict[ModelId, Adapter] = {}
        self._of_base = Remembered(
            "base", lambda ids, positions, plan, _: base.hidden(ids, positions, plan, []), base.device
        )
        self._of_magnets = Remembered("magnet", self._attracted, base.device)
        self._kept: dict[int, tuple[Anchor, ...]] = {}
        """Anchors of each pass over a part of the update's tokens, from the first time they were computed."""

    def __bool__(self) -> bool:
        """Whether anything is held near anything."""
        return self.kl_coefficient > 0 or self.magnet.strength > 0 or self.magnet.proximal > 0

    def add(self, model_id: ModelId) -> None:
        """Put the magnet of a policy where the policy is now."""
        if self.magnet.strength > 0:
            self._of_magnets.forget()
            self._magnets[model_id] = self.base.bank.copy(model_id)

    def remove(self, model_id: ModelId) -> None:
        self._of_magnets.forget()
        self._magnets.pop(model_id, None)

    # -- one update ---------------------------------------------------------------------------------------------

    def weigh(self, done: float) -> None:
        """Give the magnets the weight they have when the share `done` of all updates lies behind."""
        self._strength = self.magnet.strength_at(done)

    def begin(self) -> None:
        """Forget what the last update computed."""
        self._kept.clear()

    def of(self, part: int, packed: Packed) -> tuple[Anchor, ...]:
        """The anchors of the `part`-th share of the update's tokens."""
        if part not in self._kept:
            with torch.no_grad():
                made = tuple(self._computed(packed))
            if self.passes == 1:
                return made
            self._kept[part] = made
        return self._kept[part]

    def _computed(self, packed: Packed) -> Iterator[Anchor]:
        if self.kl_coefficient > 0:
            yield Anchor("kl", self.kl_coefficient, self._hidden(self._of_base, packed))
        if self.magnet.strength > 0:
            yield Anchor("magnet_kl", self._strength, self._hidden(self._of_magnets, packed))

    @staticmethod
    def _hidden(remembered: Remembered, packed: Packed) -> Tensor:
        """What is known of choices is not computed again."""
        if packed.choices is not None:
            return remembered.of(packed.choices, len(packed.ids))
        return remembered.compute(packed.ids, packed.positions, packed.plan, packed.segments)

    def _attracted(self, ids: Tensor, positions: Tensor, plan: Plan, segments: Segments) -> Tensor:
        """Last hidden states under the magnets."""
        routed = [(self._magnets[model_id], start, end) for model_id, start, end in segments]
        return self.base.hidden(ids, positions, plan, routed)

    def passed(self, part: int, hidden: Tensor) -> None:
        """Keep what the policies computed in the first pass over `part`: they are held near it in the next ones."""
        if self.magnet.proximal > 0 and self.passes > 1:
            before = Anchor("step_kl", self.magnet.proximal, hidden.detach())
            self._kept[part] = (*self._kept[part], before)

    @torch.no_grad()
    def move(self, update: int) -> None:
        """After `update` (from 1): let the magnets follow where it is their turn."""
        if self.magnet.every == 0 or update % self.magnet.every:
            return
        self._of_magnets.forget()
        for model_id, magnet in self._magnets.items():
            magnet.flat.lerp_(self.base.bank.training(model_id).flat, self.magnet.rate)
            magnet.touch()

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Magnets by name, and what is remembered, for a checkpoint."""
        magnets = {f"{name}/magnet": magnet.flat.detach().cpu().clone() for name, magnet in self._magnets.items()}
        return magnets | self._of_base.state() | self._of_magnets.state()

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state()`. Raises `RunFolderError` when a policy's magnet is not in it."""
        for model_id, magnet in self._magnets.items():
            if f"{model_id}/magnet" not in state:
                raise RunFolderError(
                    f"the checkpoint has no magnet of model {model_id!r}: it was made with another credit scheme; "
                    "resume with that one, or start a new run"
                )
            magnet.flat.copy_(state[f"{model_id}/magnet"])
            magnet.touch()
        self._of_base.restore(state)
        self._of_magnets.restore(state)
