"""Who sits where: scenario seats bound to players, by data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coterie.errors import ConfigError, CoterieError, ScenarioError, cause
from coterie.models import LoRAModel
from coterie.rollout.table import Holder
from coterie.scenarios.base import Scenario
from coterie.types import (
    AdapterVersion,
    Frozen,
    ModelId,
    Person,
    PlayerCard,
    Seat,
    SeatId,
    Trained,
    TrainingTask,
)


def assign(
    seats: Sequence[Seat], models: Sequence[LoRAModel], *, turn: int = 0, rotate: bool = False
) -> dict[SeatId, Holder]:
    """Bind every free seat to a model, in order; seats that already name a player keep it.

    Args:
        turn: which models sit out when there are more models than free seats; with `rotate`, also who sits where.

    Raises:
        ConfigError: fewer models than free seats.
    """
    free = [seat for seat in seats if seat.player is None]
    if len(models) < len(free):
        raise ConfigError(
            f"the scenario has {len(free)} seats to fill, but there are {len(models)} models; "
            f"add {len(free) - len(models)} more"
        )
    shift = turn % len(models) if models and (rotate or len(models) > len(free)) else 0
    order = [models[(shift + i) % len(models)] for i in range(len(models))]
    if not rotate:
        # the models that play keep their configured order, so that roles keep their seats
        playing = {m.model_id for m in order[: len(free)]}
        order = [m for m in models if m.model_id in playing]
    by_id = {m.model_id: m for m in models}
    holders: dict[SeatId, Holder] = {}
    queue = iter(order)
    for seat in seats:
        player = seat.player
        if player is None:
            model = next(queue)
            holders[seat.seat_id] = trained(seat.seat_id, model)
        elif isinstance(player, Trained):
            if player.model_id not in by_id:
                raise ConfigError(f"seat {seat.seat_id!r} is bound to {player.model_id!r}, which is not a model here")
            holders[seat.seat_id] = trained(seat.seat_id, by_id[player.model_id])
        elif isinstance(player, Frozen):
            holders[seat.seat_id] = Holder(PlayerCard(seat.seat_id, None), player, player.adapter, None)
        else:
            holders[seat.seat_id] = Holder(PlayerCard(seat.seat_id, None), player, None, None)
    return holders


def seats_of(scenario: Scenario, task: TrainingTask) -> Sequence[Seat]:
    """The scenario's seats for a task. Raises `ScenarioError` when it raises, or when they cannot be sat on."""
    try:
        seats = list(scenario.seats(task))
    except CoterieError:
        raise
    except Exception as error:
        raise ScenarioError(f"task {task.task_id!r}: seats() raised {cause(error)}") from error
    odd = [seat for seat in seats if not isinstance(seat, Seat)]
    if odd or not seats:
        raise ScenarioError(f"task {task.task_id!r}: seats() gave {odd[0] if odd else 'nothing'!r}; give Seat(…)s")
    ids = [seat.seat_id for seat in seats]
    doubled = sorted({seat_id for seat_id in ids if ids.count(seat_id) > 1})
    if doubled:
        raise ScenarioError(
            f"task {task.task_id!r}: seats() gave the seat {doubled[0]!r} {ids.count(doubled[0])} times"
        )
    return seats


def check_seats(scenario: Scenario, tasks: Sequence[TrainingTask], models: Sequence[LoRAModel]) -> None:
    """Before anything long: whether the models can take the seats of these tasks.

    A task whose seats cannot be had at all fails its episodes when it is played; here only if that is so of every task.

    Raises:
        ConfigError: names the first task for whose seats there are too few models, or not the right ones.
        ScenarioError: no task has seats that can be sat on.
    """
    kinds: dict[tuple[Seat, ...], TrainingTask] = {}  # most tasks have the same seats
    broken: list[ScenarioError] = []
    for task in tasks:
        try:
            kinds.setdefault(tuple(seats_of(scenario, task)), task)
        except ScenarioError as error:
            broken.append(error)
    if broken and not kinds:
        raise broken[0]
    for seats, task in kinds.items():
        try:
            assign(seats, models)
        except ConfigError as error:
            raise ConfigError(f"task {task.task_id!r}: {error}") from error


def trained(seat_id: SeatId, model: LoRAModel) -> Holder:
    """A seat held by a model's current version."""
    return Holder(model.card(seat_id), Trained(model.model_id), model.adapter, model.model_id)


def frozen_as(
    holders: Mapping[SeatId, Holder], versions: Mapping[ModelId, AdapterVersion | None]
) -> dict[SeatId, Holder]:
    """The same seating with models replaced by fixed versions (None: the bare base); cards stay."""
    out = dict(holders)
    for seat_id, holder in holders.items():
        if holder.trained is not None and holder.trained in versions:
            version = versions[holder.trained]
            out[seat_id] = Holder(holder.card, Frozen(version), version, None)
    return out


def with_person(holders: Mapping[SeatId, Holder], seat_id: SeatId) -> dict[SeatId, Holder]:
    """The same seating with a person in one seat. Raises ConfigError for an unknown seat."""
    if seat_id not in holders:
        raise ConfigError(f"there is no seat {seat_id!r}; seats: {', '.join(holders)}")
    return {**holders, seat_id: Holder(holders[seat_id].card, Person(), None, None)}
