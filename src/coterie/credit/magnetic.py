"""Magnetic credit: regularised learning whose last iterate converges in two-player zero-sum games.

    advantage of a turn = signal - mean signal of the siblings that saw the same prompt
    objective of a policy = surrogate - magnet * KL(policy || its magnet) - proximal * KL(policy || itself before)

Both divergences are exact, over the allowed tokens of every position that was visited (`coterie.training.anchors`);
"before" is the policy that began the update. The magnet is a copy of the policy: it starts where the policy starts
(version 0: the base with its calibrated choices), and every `every` updates it moves the share `rate` of the way to
where the policy is by then.

Why: plain policy gradients follow the opponent round and round (matching pennies, rock-paper-scissors), and only the
average over all updates comes near an equilibrium, which no adapter is. Pulled towards a fixed magnet, the game has
one equilibrium that attracts both policies, and its distance from an equilibrium of the game itself falls with
`magnet`; each time the magnet is put where the policies came to rest, that distance falls further.

Sources: magnetic mirror descent, Sokota et al. 2023 ("A unified approach to reinforcement learning, quantal response
equilibria, and two-player zero-sum games", arXiv 2206.05825), with `magnet` its alpha and `proximal` its 1 / eta;
moving the magnet to the fixed point it gave, R-NaD, Perolat et al. 2021 and 2022 (arXiv 2002.08456, 2206.15378), whose
reward transformation is the same pull estimated from sampled actions: its expectation at a position is `magnet` times
the divergence computed here without that noise. A uniform magnet is an entropy bonus (`learner.entropy_bonus`).

The baseline is that of the position, not of the seat: what a seat was dealt is nobody's merit, and of thousands of
episodes of a small game each prompt is computed once. Turns nobody else shares a prompt with are compared with the
siblings at their seat.

When it fails: momentum carries a policy past the point where it should turn, and no magnet mends that; set
`learner.betas = [0.0, 0.999]`, a learning rate that falls (`learner.final_learning_rate`), or several passes with
`proximal`, which acts from the second pass of an update on (`learner.passes`). Steps too long for the magnet circle for
ever: where each side's gradient is L times the other's distance from equilibrium, steps of length h contract only for
h < 2 magnet / (magnet^2 + L^2). So whoever lets the magnet's weight fall (`final_magnet`) has to let the learning rate
fall as far or further; magnets that move (`every` above 0) keep their weight, and come nearer by the same steps. A
policy that saturates early, before the other one plays well, hardly comes back: a magnet that stays where it is
(`every = 0`) holds it inside. A magnet that becomes the policy at once (`rate = 1`) remembers the noise of one update;
going a part of the way averages over many. With a strong magnet policies stay near where they began, with none they
cycle; in games of common interest the pull only slows learning.

`signal = "reward"` takes the game the mode makes of the scenario: competitive pays by rank, and poker played for rank
has other equilibria than poker played for chips; `signal = "score"` takes the scenario's own payoffs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from coterie.credit.base import Magnet
from coterie.credit.memory import refuse_state
from coterie.credit.relative import RelativeOptions, relative_advantages
from coterie.types import Advantages, Episode, SeatId


class MagneticOptions(RelativeOptions):
    """What is compared, and what policies are held near."""

    by_state: bool = True
    """Whether turns are compared with siblings at the same prompt, where there are at least two."""
    normalize: Literal["none", "group", "policy"] = "none"
    """What advantages are divided by: nothing, so that the strength of the magnet keeps its unit, the deviation of the
    siblings' numbers, or the deviation of all advantages of the policy in the batch. Below 1e-6 the advantages are
    0."""
    signal: Literal["reward", "score"] = "reward"
    """What is earned: the reward the mode gives, or the scenario's own score in [0, 1], whatever the mode."""
    magnet: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight of KL(policy || magnet), in units of the signal per nat."""
    final_magnet: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The weight at the last update, which it falls to geometrically; unset: it stays what it is."""
    every: int = Field(default=10, ge=0)
    """Updates between moves of the magnet; 0: it stays where it began."""
    rate: float = Field(default=0.3, gt=0, le=1)
    """Share of the way from the magnet's weights to the policy's that a move goes; 1: the magnet becomes the policy."""
    proximal: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of KL(policy || policy before the update), in units of the signal per nat; acts from the second of
    learner.passes on."""


class Magnetic:
    """Signals against those of siblings at the same prompt, and a magnet for every policy."""

    Options = MagneticOptions

    def __init__(self, options: MagneticOptions) -> None:
        self.options = options
        self.magnet = Magnet(options.magnet, options.proximal, options.every, options.rate, options.final_magnet)

    def advantages(self, episodes: Sequence[Episode]) -> Advantages:
        """Raises `ScenarioError` for a missing or non-finite score or reward, or an episode id used twice."""
        return relative_advantages(episodes, _scores if self.options.signal == "score" else _rewards, self.options)

    def state(self) -> dict[str, Any]:
        """Nothing: the magnets are tensors, and stand in the learner's part of a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises `RunFolderError` when there is anything to restore."""
        refuse_state("magnetic", state)


def _rewards(episode: Episode) -> tuple[Mapping[SeatId, float], Mapping[SeatId, float]]:
    return episode.rewards, episode.rewards


def _scores(episode: Episode) -> tuple[Mapping[SeatId, float], Mapping[SeatId, float]]:
    return episode.outcome.scores, episode.outcome.scores
