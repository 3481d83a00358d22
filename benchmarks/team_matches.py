"""Play the teams of a trained run against the untrained base and with swapped partners, exactly.

    python benchmarks/team_matches.py runs/team-blotto [more runs of other seeds]

Any scenario with seats "red_…" and "blue_…" that has exact odds (team_blotto, team_signaling, taboo). Nothing is
sampled: the scenario's `exact` is asked with the seats held by

    trained against trained     both teams as they were trained
    trained against untrained   one team as trained, the other the base under the run's calibration
    partner of the other team   one member of a trained team replaced by who holds the same seat in the other team,
                                against the untrained base: a partner as good, trained elsewhere
    untrained partner           one member replaced by the base, against the untrained base

Every figure is given for both teams, since either may be the trained one: wins, draws and losses of the team named
first, their mean, the lowest and the highest of all runs and teams. With --json a file for documentation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.environment import MultiModelEnvironment
from coterie.errors import CoterieError, ScenarioError
from coterie.models import LoRAModel
from coterie.rollout.matchmaking import frozen_as
from coterie.rollout.runner import Plan
from coterie.runs.directory import RunDirectory
from coterie.scenarios.base import ExactlyMeasured
from coterie.scenarios.contests import SIDES
from coterie.types import AdapterVersion, ModelId, SeatId, Split

Versions = dict[ModelId, AdapterVersion | None]
"""Who holds a model's seat; None: the base."""


def matches(seats: Mapping[SeatId, LoRAModel], side: str) -> dict[str, list[Versions]]:
    """The seatings of every kind of match of the team `side`; several where either member may be replaced."""
    team = {seat: model for seat, model in seats.items() if seat.startswith(side + "_")}
    rivals = {seat: model for seat, model in seats.items() if seat not in team}
    untrained: Versions = {model.model_id: None for model in rivals.values()}
    swaps: list[Versions] = []
    alone: list[Versions] = []
    for seat, model in team.items():
        other = next(m for s, m in rivals.items() if s.partition("_")[2] == seat.partition("_")[2])
        swaps.append({**untrained, model.model_id: other.adapter})
        alone.append({**untrained, model.model_id: None})
    return {
        "trained against trained": [{}],
        "trained against untrained": [untrained],
        "partner of the other team": swaps,
        "untrained partner": alone,
    }


async def measure(env: MultiModelEnvironment) -> dict[str, list[dict[str, float]]]:
    """Every kind of match of both teams: wins, draws, losses. Raises `ScenarioError` for a game without teams."""
    loop = env._ready()
    runner, scenario = loop.runner, env.scenario
    if not isinstance(scenario, ExactlyMeasured):
        raise ScenarioError(f"scenario {env.config.scenario.id!r} has no exact odds")
    task = next(iter(scenario.tasks(Split.HELDOUT, env.config.seed)))
    holders = runner.seating(task, loop.models, 0, rotate=False)
    by_id = {model.model_id: model for model in loop.models}
    seats = {seat: by_id[holder.trained] for seat, holder in holders.items() if holder.trained is not None}
    if {seat.partition("_")[0] for seat in holders} != set(SIDES) or len(seats) < len(holders):
        raise ScenarioError(
            f"scenario {env.config.scenario.id!r} has seats {', '.join(holders)}; two teams of trained models are "
            f"needed, in seats that begin with red_ and blue_"
        )
    found: dict[str, list[dict[str, float]]] = {}
    for side, other in (SIDES, SIDES[::-1]):
        for kind, seatings in matches(seats, side).items():
            for versions in seatings:
                plan = Plan(task, frozen_as(holders, versions), "matches", "matches", 0)
                figures = await scenario.exact(runner.table(plan))
                odds = {"wins": figures[f"{side}_wins"], "draws": figures["draws"], "losses": figures[f"{other}_wins"]}
                found.setdefault(kind, []).append(odds)
    return found


def summary(runs: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, dict[str, Any]]:
    """Mean, lowest and highest of every kind of match over runs and teams."""
    table: dict[str, dict[str, Any]] = {}
    for kind in runs[0]:
        odds = [match for run in runs for match in run[kind]]
        table[kind] = {
            name: {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
            for name in ("wins", "draws", "losses")
            for values in [[match[name] for match in odds]]
        }
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of trained runs of one scenario")
    parser.add_argument("--json", type=Path, help="write the summary here")
    options = parser.parse_args(arguments)
    found = []
    try:
        for path in options.runs:
            run = RunDirectory.open(path)
            with run.lock():
                found.append(asyncio.run(measure(MultiModelEnvironment.resume(run))))
    except CoterieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    table = summary(found)
    print(f"{'match':28}{'wins':>8}{'draws':>8}{'losses':>8}")
    for kind, odds in table.items():
        print(f"{kind:28}" + "".join(f"{odds[name]['mean']:8.3f}" for name in ("wins", "draws", "losses")))
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
