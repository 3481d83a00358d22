"""Builders of the loop's frozen data with plain defaults, so that a test states only what it is about.

    episodes = group("g", scores=[{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}])
    episode("e", scores={"a": 1.0}, kinds={"a": ("advice", "answer")}, withheld={"a"})

Unless told otherwise, seat "a" is held by the model "model_a", takes one turn of kind "answer" on the in-process
engine, belongs to no team, and earns its score as its reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coterie.training.batch import Batch, build_batch
from coterie.types import (
    AdapterVersion,
    Advantages,
    Episode,
    Generation,
    ModelId,
    ModelRole,
    Outcome,
    PlayerCard,
    SeatId,
    TaskType,
    TeamId,
    Tier,
    TrainingTask,
    Trajectory,
    Turn,
)


def make_task(task_id: str = "task", **fields: Any) -> TrainingTask:
    """A classification task worth 1.0; any field of `TrainingTask` may be given."""
    return TrainingTask(**{"task_id": task_id, "task_type": TaskType.CLASSIFICATION, **fields})


def make_card(
    seat_id: SeatId, role: ModelRole = ModelRole.TEAMMATE, team: TeamId | None = None, model_id: ModelId | None = None
) -> PlayerCard:
    """Who holds `seat_id`; the model is "model_<seat>" unless named."""
    return PlayerCard(seat_id, model_id or f"model_{seat_id}", role, team)


def make_turn(seat_id: SeatId = "a", *, model_id: ModelId | None = "", kind: str = "answer", **fields: Any) -> Turn:
    """One turn of one token. `model_id` "" stands for "model_<seat>", None for a script (its tier follows)."""
    if model_id == "":
        model_id = f"model_{seat_id}"
    tokens = fields.get("token_ids", (7,))
    defaults: dict[str, Any] = {
        "adapter": None if model_id is None else AdapterVersion(model_id, 0),
        "prompt_ids": (1, 2, 3),
        "token_ids": tokens,
        "logprobs": (-0.5,) * len(tokens),
        "allowed": None,
        "bias": None,
        "temperature": 1.0,
        "entropy": (0.7,) * len(tokens),
        "text": "text",
        "choice": None,
        "valid": True,
        "tier": Tier.SCRIPT if model_id is None else Tier.LOCAL,
    }
    return Turn(seat_id=seat_id, model_id=model_id, kind=kind, **{**defaults, **fields})


def make_trajectory(
    seat_id: SeatId = "a",
    turns: Sequence[Turn] | None = None,
    *,
    kinds: Sequence[str] = ("answer",),
    team: TeamId | None = None,
    model_id: ModelId | None = "",
) -> Trajectory:
    """The turns given, or one turn of each kind in `kinds`."""
    if model_id == "":
        model_id = f"model_{seat_id}"
    if turns is None:
        turns = [make_turn(seat_id, model_id=model_id, kind=kind) for kind in kinds]
    return Trajectory(seat_id, model_id, team, tuple(turns))


def episode(
    episode_id: str = "episode",
    *,
    scores: Mapping[SeatId, float],
    rewards: Mapping[SeatId, float] | None = None,
    accuracy: Mapping[SeatId, float] | None = None,
    metrics: Mapping[str, float] | None = None,
    task: TrainingTask | None = None,
    group: str = "group",
    teams: Mapping[SeatId, TeamId | None] | None = None,
    models: Mapping[SeatId, ModelId | None] | None = None,
    kinds: Mapping[SeatId, Sequence[str]] | None = None,
    turns: Mapping[SeatId, Sequence[Turn]] | None = None,
    withheld: Iterable[SeatId] = (),
    update: int = 0,
) -> Episode:
    """One episode with a seat for every key of `scores`.

    Args:
        rewards: by seat; None: equal to the scores (no mode has divided anything).
        models: who holds a seat, where it is not "model_<seat>"; None as a value: a script.
        kinds: by seat, one turn of each kind; absent: one "answer". `turns` gives whole turns instead.
    """
    trajectories = {
        seat: make_trajectory(
            seat,
            (turns or {}).get(seat),
            kinds=(kinds or {}).get(seat, ("answer",)),
            team=(teams or {}).get(seat),
            model_id=(models or {}).get(seat, ""),
        )
        for seat in scores
    }
    return Episode(
        episode_id=episode_id,
        task=task or make_task(),
        group=group,
        trajectories=trajectories,
        outcome=Outcome(scores=dict(scores), accuracy=dict(accuracy or {}), metrics=dict(metrics or {})),
        rewards=dict(scores if rewards is None else rewards),
        withheld=frozenset(withheld),
        update=update,
    )


def group(group_id: str, *, scores: Sequence[Mapping[SeatId, float]], **fields: Any) -> list[Episode]:
    """Sibling episodes "<group>/0", "<group>/1", … of one task, one for each entry of `scores`."""
    return [episode(f"{group_id}/{i}", scores=entry, group=group_id, **fields) for i, entry in enumerate(scores)]


def batch_of(answers: Sequence[Generation], policies: Sequence[ModelId]) -> Batch:
    """What a learner is given for answers of these policies, an episode each; every other advantage is negative."""
    episodes = []
    for n, made in enumerate(answers):
        assert made.adapter is not None
        name = made.adapter.model_id
        turn = make_turn(
            "seat", model_id=name, prompt_ids=made.prompt_ids, token_ids=made.token_ids, allowed=made.allowed,
            logprobs=made.logprobs,
        )  # fmt: skip
        episodes.append(episode(f"e{n}", scores={"seat": 1.0}, turns={"seat": [turn]}, models={"seat": name}))
    advantages = Advantages({e.episode_id: {"seat": (0.3 - n % 2,)} for n, e in enumerate(episodes)})
    return build_batch(policies, episodes, advantages, keep_zero=False)
