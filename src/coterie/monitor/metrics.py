"""What is measured in every update, and how to read it.

    episodes of one update -> one pass -> a Tally per model -> metrics by name, one ModelPerformance per model

Names are "<group>/<model_id>/<stat>" or "<group>/<stat>"; `METRICS` explains each. A figure that was not measured
(no right answer in this scenario, no advice withheld) is absent, never zero. Nothing here is drawn at random:
the worth of advice comes from the episodes in which it was withheld by a coin thrown before they were played.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from coterie.models import LoRAModel, ModelPerformance
from coterie.scenarios.teamwork import response_quality
from coterie.types import (
    ADVICE,
    DECISION,
    Episode,
    FailedEpisode,
    ModelId,
    ModelRole,
    SeatId,
    TaskType,
    Tier,
    Trajectory,
)

METRICS: dict[str, str] = {
    "play/<model>/reward": "Mean share of the reward pool; what training raises. In a competition not all can rise.",
    "play/<model>/score": "Mean score in [0, 1] before the mode divides the pool; compare modes by this.",
    "play/<model>/accuracy": "Mean rightness of its answers in [0, 1] on training tasks; evaluation has held-out.",
    "play/<model>/efficiency": "Score per accuracy, [0.5, 1] where tokens cost; falls when answers grow too long.",
    "play/<model>/valid_rate": "Share of its turns that were well formed; below 1 with choices means a broken engine.",
    "play/<model>/entropy": "Mean entropy per token, nats; near 0 it no longer explores, rising late it forgets.",
    "play/<model>/response_tokens": "Mean tokens per turn; a steady climb without reward is length bias.",
    "play/<model>/response_quality": "Keyword bonus of its texts, 0.05 to 0.15; of words used, not of being right.",
    "play/<model>/win_rate": "Share of episodes in which it alone had the highest reward; 0 where rewards are shared.",
    "play/<model>/cooperation_score": "Others' accuracy with its advice minus without; below 0 it misleads them.",
    "play/<model>/episodes": "Seats it held in this update; the figures above are means over them.",
    "accuracy/<model>/<task_type>": "Mean accuracy on one type of training task; shows which type carries the mean.",
    "outcome/<name>": "The scenario's own figure, mean over the episodes that report it.",
    "episodes/played": "Episodes that finished and were trained on.",
    "episodes/failed_share": "Share of episodes that raised; above zero read the failures in the database.",
    "episodes/simulated_share": "Share of turns that were made up because nothing could generate; absent where none.",
    "strategy/communication": "Others' accuracy with advice minus without, over all speakers; what talking is worth.",
    "strategy/central": "The same where a leader advises (central leadership).",
    "strategy/delegated": "The same where there is no leader and all advise (delegated leadership).",
    "exact/<name>": "The scenario's figure computed from the policies without sampling; steadier than outcome/<name>.",
    "learn/<model>/loss": "Loss of its sampled tokens; its size means little, a jump means trouble.",
    "learn/<model>/entropy": "Mean entropy where it had a choice, as the learner computes it, nats; compare to play.",
    "learn/<model>/kl": "Distance KL(policy || base) per token, nats; 0 when kl_coefficient is 0.",
    "learn/<model>/magnet_kl": "Distance KL(policy || magnet) per token, nats; near 0 it came to rest. 0: no magnet.",
    "learn/<model>/mismatch": "Mean gap of learner and engine log-probabilities, nats; rounding error, 0 if recalled.",
    "learn/<model>/max_ratio": "Largest probability ratio to the sampling policy; far above 1 the data is stale.",
    "learn/<model>/grad_norm": "Norm of its gradient before clipping; 0 means no signal, spikes come before collapse.",
    "learn/<model>/learning_rate": "Of this update, after warm-up and decay.",
    "learn/<model>/tokens": "Its sampled tokens that had an alternative; only these carry gradient.",
    "learn/packed_tokens": "Distinct tokens that went through the base, all passes together; what learning cost.",
    "learn/recalled_tokens": "Of these, how many rollout had computed with the same weights: the way back was left.",
    "learn/naive_tokens": "Tokens one sequence at a time would have needed; over packed_tokens it is the saving.",
}
"""Name pattern -> how to read it in one line. Parts in <> stand for any text without "/"."""


def describe(name: str) -> str | None:
    """The line of `METRICS` for a metric's name; None when it has none."""
    for pattern, meaning in METRICS.items():
        literal = re.split(r"<[a-z_]+>", pattern)
        if re.fullmatch("[^/]+".join(map(re.escape, literal)), name):
            return meaning
    return None


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """All that is known of one finished update."""

    update: int
    """1-based."""
    updates: int
    """Planned for the run."""
    metrics: Mapping[str, float]
    """By name; see `METRICS`."""
    performances: tuple[ModelPerformance, ...]
    seconds: Mapping[str, float]
    """Wall time by part: "rollout", "learn", "total"."""


@dataclass(slots=True)
class _Tally:
    """Running sums of one model over one update."""

    seats: int = 0
    reward: float = 0.0
    score: float = 0.0
    judged: int = 0
    """Seats with a right answer to compare to."""
    judged_score: float = 0.0
    accuracy: float = 0.0
    turns: int = 0
    valid: int = 0
    tokens: int = 0
    entropy: float = 0.0
    entropies: int = 0
    contests: int = 0
    """Seats in episodes of more than one seat."""
    wins: int = 0
    by_type: dict[TaskType, list[float]] = field(default_factory=dict)
    """[sum of accuracy, seats]."""
    quality: float = 0.0


Sides = list[float]
"""[sum of others' accuracy where delivered, episodes, sum where withheld, episodes]."""


def measure(
    update: int, episodes: Sequence[Episode], failed: Sequence[FailedEpisode], models: Sequence[LoRAModel]
) -> tuple[dict[str, float], tuple[ModelPerformance, ...]]:
    """Measure one update.

    Args:
        update: 1-based, copied to the performances.
        episodes: all finished episodes of the update.
        failed: all that raised.
        models: the policies in training; seats held by anyone else are not measured.

    Returns:
        Metrics by name, and one `ModelPerformance` for each model that held a seat, in the order of `models`.
        Where a scenario knows no right answers, a performance has its score as `accuracy` and 1 as `efficiency`
        (the metrics leave both out).
    """
    tallies = {model.model_id: _Tally() for model in models}
    leaders = {model.model_id for model in models if model.config.role is ModelRole.LEADER}
    outcomes: dict[str, list[float]] = {}
    worth: dict[tuple[ModelId | None, SeatId, str, bool], Sides] = {}
    for episode in episodes:
        _count(episode, tallies)
        for name, value in episode.outcome.metrics.items():
            total = outcomes.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += 1.0
        _weigh_advice(episode, leaders, worth)

    metrics = {"episodes/played": float(len(episodes))}
    attempts = len(episodes) + len(failed)
    metrics["episodes/failed_share"] = len(failed) / attempts if attempts else 0.0
    if simulated := simulated_share(episodes):
        metrics["episodes/simulated_share"] = simulated
    for name in sorted(outcomes):
        metrics[f"outcome/{name}"] = outcomes[name][0] / outcomes[name][1]
    for name, sides in (
        ("communication", worth.values()),
        ("central", [side for key, side in worth.items() if key[3]]),
        ("delegated", [side for key, side in worth.items() if not key[3]]),
    ):
        _set(metrics, f"strategy/{name}", _stratified(sides))

    performances = []
    for model_id, tally in tallies.items():
        if tally.seats:
            cooperation = _stratified(side for key, side in worth.items() if key[0] == model_id)
            performances.append(_report(update, model_id, tally, cooperation, metrics))
    return metrics, tuple(performances)


def simulated_share(episodes: Iterable[Episode]) -> float:
    """Of all turns, the share that nothing generated."""
    tiers = [turn.tier for e in episodes for trajectory in e.trajectories.values() for turn in trajectory.turns]
    return tiers.count(Tier.SIMULATED) / len(tiers) if tiers else 0.0


def _count(episode: Episode, tallies: Mapping[ModelId, _Tally]) -> None:
    """Add one episode to the tallies of the models at its table."""
    rewards, outcome = episode.rewards, episode.outcome
    accuracies, scores, task_type = outcome.accuracy, outcome.scores, episode.task.task_type
    winner = _winner(rewards) if len(rewards) > 1 else None
    for seat_id, trajectory in episode.trajectories.items():
        tally = tallies.get(trajectory.model_id) if trajectory.model_id is not None else None
        if tally is None:
            continue
        tally.seats += 1
        tally.reward += rewards[seat_id]
        score = scores[seat_id]
        tally.score += score
        if seat_id in accuracies:
            accuracy = accuracies[seat_id]
            tally.judged += 1
            tally.judged_score += score
            tally.accuracy += accuracy
            of_type = tally.by_type.get(task_type)
            if of_type is None:
                of_type = tally.by_type[task_type] = [0.0, 0.0]
            of_type[0] += accuracy
            of_type[1] += 1.0
        if len(rewards) > 1:
            tally.contests += 1
            if winner == seat_id:
                tally.wins += 1
        for turn in trajectory.turns:
            tally.turns += 1
            if turn.valid:
                tally.valid += 1
            tally.tokens += len(turn.token_ids)
            tally.entropy += sum(turn.entropy)
            tally.entropies += len(turn.entropy)
            tally.quality += response_quality(turn.text)


def _winner(rewards: Mapping[SeatId, float]) -> SeatId | None:
    """The seat with strictly the highest reward."""
    best = max(rewards.values())
    at_best = [seat_id for seat_id, reward in rewards.items() if reward == best]
    return at_best[0] if len(at_best) == 1 else None


def _spoke(trajectory: Trajectory) -> bool:
    for turn in trajectory.turns:  # noqa: SIM110 - a generator here costs a third of the whole measurement
        if turn.kind in (ADVICE, DECISION):
            return True
    return False


def _weigh_advice(
    episode: Episode,
    leaders: Set[ModelId],
    worth: dict[tuple[ModelId | None, SeatId, str, bool], Sides],
) -> None:
    """Add the others' accuracy to the side (delivered or withheld) of each speaker of the episode.

    The key is (model, seat, group, whether a leader sits at the table).
    """
    accuracies, withheld = episode.outcome.accuracy, episode.withheld
    if not accuracies:
        return
    trajectories = episode.trajectories
    total, count = sum(accuracies.values()), len(accuracies)
    central: bool | None = None
    for seat_id, trajectory in trajectories.items():
        silenced = seat_id in withheld
        if not silenced and not _spoke(trajectory):
            continue
        own = accuracies.get(seat_id)
        others = count if own is None else count - 1
        if others == 0:
            continue
        if central is None:
            central = any(other.model_id is not None and other.model_id in leaders for other in trajectories.values())
        mean = (total if own is None else total - own) / others
        key = (trajectory.model_id, seat_id, episode.group, central)
        sides = worth.get(key)
        if sides is None:
            sides = worth[key] = [0.0, 0.0, 0.0, 0.0]
        at = 2 if silenced else 0
        sides[at] += mean
        sides[at + 1] += 1.0


def _stratified(strata: Iterable[Sides]) -> float | None:
    """How much the others' accuracy changed because of advice, in [-1, 1]; a model's strata give its cooperation score.

    Within each group (same task, same start) the mean accuracy of all other seats where the advice was delivered
    minus where it was withheld; groups are averaged with weight min(n_delivered, n_withheld). Only episodes in which
    the speaker's seat had an advice turn, or is among `episode.withheld`, count. Advice is withheld at random, so the
    difference is causal (a stratified difference in means). None when either side is missing in every group.
    """
    difference = weights = 0.0
    for delivered, n_delivered, silenced, n_silenced in strata:
        weight = min(n_delivered, n_silenced)
        if weight:
            difference += weight * (delivered / n_delivered - silenced / n_silenced)
            weights += weight
    return difference / weights if weights else None


def _report(
    update: int, model_id: ModelId, tally: _Tally, cooperation: float | None, metrics: dict[str, float]
) -> ModelPerformance:
    """Write one model's figures into `metrics` and return them as a performance."""
    reward, score = tally.reward / tally.seats, tally.score / tally.seats
    accuracy = tally.accuracy / tally.judged if tally.judged else None
    efficiency = tally.judged_score / tally.accuracy if tally.accuracy > 0 else None
    if efficiency is not None and efficiency > 1.0 + 1e-9:
        efficiency = None  # the scenario's scores are not accuracy times efficiency
    valid_rate = tally.valid / tally.turns if tally.turns else None
    entropy = tally.entropy / tally.entropies if tally.entropies else None
    by_type = {task_type: total / seats for task_type, (total, seats) in tally.by_type.items()}
    for stat, value in (
        ("reward", reward),
        ("score", score),
        ("accuracy", accuracy),
        ("efficiency", efficiency),
        ("valid_rate", valid_rate),
        ("entropy", entropy),
        ("response_tokens", tally.tokens / tally.turns if tally.turns else None),
        ("response_quality", tally.quality / tally.turns if tally.turns else None),
        ("win_rate", tally.wins / tally.contests if tally.contests else None),
        ("cooperation_score", cooperation),
        ("episodes", float(tally.seats)),
    ):
        _set(metrics, f"play/{model_id}/{stat}", value)
    for task_type in sorted(by_type):
        metrics[f"accuracy/{model_id}/{task_type}"] = by_type[task_type]
    performance = performance_of(update, model_id, metrics)
    assert performance is not None
    return performance


def performance_of(update: int, model_id: ModelId, metrics: Mapping[str, float]) -> ModelPerformance | None:
    """One model's part of an update's metrics as a performance; None where it held no seat.

    The metrics of a run are kept, so this also brings back its history.
    """
    own = f"play/{model_id}/"
    found = {name.removeprefix(own): value for name, value in metrics.items() if name.startswith(own)}
    if "episodes" not in found:
        return None
    types = f"accuracy/{model_id}/"
    return ModelPerformance(
        update=update,
        model_id=model_id,
        accuracy=found.get("accuracy", found["score"]),
        efficiency=found.get("efficiency", 1.0),
        score=found["score"],
        reward=found["reward"],
        cooperation_score=found.get("cooperation_score"),
        valid_rate=found.get("valid_rate", 1.0),
        entropy=found.get("entropy", 0.0),
        episodes=round(found["episodes"]),
        by_task_type={
            TaskType(name.removeprefix(types)): value for name, value in metrics.items() if name.startswith(types)
        },
    )


def history_of(model_id: ModelId, entries: Iterable[Mapping[str, Any]]) -> list[ModelPerformance]:
    """A model's performances from the lines of a metrics file, in which null stands for what was not finite."""
    history = []
    for entry in entries:
        metrics = {name: math.nan if value is None else value for name, value in entry["metrics"].items()}
        performance = performance_of(entry["update"], model_id, metrics)
        if performance is not None:
            history.append(performance)
    return history


def _set(metrics: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        metrics[name] = value
