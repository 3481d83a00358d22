"""Four groups of models, each trained together in one environment: what they are, and what training changed.

    python demo/multi_model_single_env_simple.py                  a few cycles of each group
    python demo/multi_model_single_env_simple.py --cycles 20      longer, for figures that mean more

Every model is a LoRA adapter on one shared base, which is fetched once when it is not there. The groups play the same
five tasks, one of each type, in every cycle, so the first cycle can be compared with the last. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coterie import (
    CoterieError,
    ModelConfig,
    ModelPerformance,
    ModelRole,
    MultiModelEnvironment,
    RunConfig,
    TaskType,
    TrainingMode,
    TrainingTask,
    create_competitive_models,
    create_cooperative_team,
    create_team_battle_models,
)
from coterie.config import parse_config
from coterie.monitor.console import Silent
from coterie.monitor.metrics import UpdateRecord
from coterie.monitor.tables import ResultTable, clean


def create_mixed_group() -> list[ModelConfig]:
    """A leader with its follower, a rival, and one who keeps out of it."""
    return [
        ModelConfig(model_id="leader", role=ModelRole.LEADER, team_id="pair", specialization="planning"),
        ModelConfig(model_id="follower", role=ModelRole.FOLLOWER, team_id="pair", specialization="careful reading"),
        ModelConfig(model_id="rival", role=ModelRole.COMPETITOR, lora_rank=4, lora_alpha=8),
        ModelConfig(model_id="loner", role=ModelRole.NEUTRAL, lora_rank=16, lora_alpha=32),
    ]


@dataclass(frozen=True)
class Group:
    """Models that are trained together."""

    title: str
    about: str
    """In plain words."""
    mode: TrainingMode
    models: Callable[[], list[ModelConfig]]
    cooperation_level: float
    """Of its tasks: 0 pure competition .. 1 pure cooperation."""


GROUPS = (
    Group(
        "A cooperative team",
        "A leader and two followers. The leader decides first, its followers hear what it decided before they answer,\n"
        "and all three share one reward.",
        TrainingMode.COOPERATIVE,
        create_cooperative_team,
        0.8,
    ),
    Group(
        "Competitors",
        "Three models, each for itself, with adapters of different size. Nobody tells anybody anything, and rank\n"
        "decides who is paid: what one wins, another loses, so not every reward can rise.",
        TrainingMode.COMPETITIVE,
        create_competitive_models,
        0.0,
    ),
    Group(
        "A team battle",
        "Two teams of two. Team mates advise each other and share what their team earns; the better team earns more.",
        TrainingMode.TEAM_BATTLE,
        create_team_battle_models,
        0.8,
    ),
    Group(
        "A mixed group",
        "A leader with its follower, a rival who shares nothing, and a loner who listens to nobody. About half of the\n"
        "reward is shared by all, the rest is fought for.",
        TrainingMode.MIXED,
        create_mixed_group,
        0.5,
    ),
)

LEGEND = """\
reward        share of the reward pool of 1 that the model earned in an episode, on average
accuracy      how right its answers were, from 0 to 1
cooperation   how much its advice helped the others: their accuracy with it minus without it ("-": it gave none)
updates       steps by which its weights changed; adapter: the version of its adapter that is now in use"""


class Progress(Silent):
    """A line for each long part and each cycle."""

    def __init__(self, cycles: int) -> None:
        self.cycles = cycles

    def stage(self, text: str) -> None:
        print(f"  {clean(text, lines=False)} ...", flush=True)

    def warning(self, text: str) -> None:
        print(f"\n!!! {clean(text)}\n", flush=True)

    def update(self, record: UpdateRecord) -> None:
        print(f"  cycle {record.update} of {self.cycles}: {record.seconds['total']:.1f} s", flush=True)


def make_environment(group: Group, base: str, seed: int, cycles: int) -> MultiModelEnvironment:
    """The group's environment with its five tasks queued; the base is loaded when training begins."""
    config = parse_config(
        {
            "seed": seed,
            "mode": group.mode,
            "base": {"model": base},
            "rollout": {"tasks_per_update": len(TaskType), "group_size": 6, "withhold": 0.3},
            # five tasks say too little about which answers the base prefers anyway
            "engine": {"calibration": False},
        },
        source="demo",
    )
    env = MultiModelEnvironment(config=config, observer=Progress(cycles))
    for model in group.models():
        env.add_model(model)
    for task_type in TaskType:
        env.add_task(
            TrainingTask(
                task_id=f"demo-{task_type}",
                task_type=task_type,
                difficulty=0.4,
                reward_pool=1.0,
                max_steps=2,
                required_models=len(env.models),
                cooperation_level=group.cooperation_level,
            )
        )
    return env


def what_changed(env: MultiModelEnvironment) -> ResultTable:
    """A row for each model: its first cycle compared with its last."""
    rows = []
    for model_id, stats in env.get_environment_stats()["models"].items():
        history = env.models[model_id].performance_history
        first, last = history[0], history[-1]
        rows.append(
            (
                model_id,
                stats["role"],
                stats["team_id"],
                change(first, last, lambda p: p.reward),
                change(first, last, lambda p: p.accuracy),
                change(first, last, lambda p: p.cooperation_score, "+.2f"),
                str(stats["weight_updates"]),
                stats["adapter"],
            )
        )
    columns = ("model", "role", "team", "reward", "accuracy", "cooperation", "updates", "adapter")
    return ResultTable("", columns, tuple(rows))


def change(
    first: ModelPerformance,
    last: ModelPerformance,
    figure: Callable[[ModelPerformance], float | None],
    form: str = ".2f",
) -> str | None:
    """ "0.21 -> 0.34", or None when there is nothing to show."""
    values = [figure(first), figure(last)]
    if values == [None, None]:
        return None
    return " -> ".join("-" if value is None else format(value, form) for value in values)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train four groups of models and print what changed.")
    parser.add_argument("--cycles", type=at_least_one, default=3, help="training cycles of each group (3)")
    parser.add_argument("--base", default=RunConfig().base.model, help="base model: a name, directory or hub id")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (0)")
    return parser.parse_args(given)


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(given: Sequence[str] | None = None) -> int:
    asked = arguments(given)
    for number, group in enumerate(GROUPS, start=1):
        heading = f"{number}. {group.title} (mode {group.mode})"
        print(f"{heading}\n{'=' * len(heading)}\n{group.about}\n", flush=True)
        env = make_environment(group, asked.base, asked.seed, asked.cycles)
        env.run_training_cycle(asked.cycles)
        made_up = " (nothing was trained: see !!! above)" if env.untrained else ""
        print(f"\nCycle 1 -> cycle {asked.cycles}{made_up}:\n\n{what_changed(env).plain()}\n")
    print(LEGEND)
    print(
        f"\n{asked.cycles} cycles on five tasks show how it works, and much of each change is chance. For models that "
        "have really\nlearned, with a table of held-out accuracy: coterie train configs/tasks-cooperative.toml"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CoterieError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)
