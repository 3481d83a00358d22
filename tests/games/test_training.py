"""One environment of each package trains two adapters on the tiny model, and the same seed gives the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coterie.config import parse_config
from coterie.environment import MultiModelEnvironment

ANIMALS = Path(__file__).parents[2] / "configs" / "games" / "animals.csv"

SCENARIOS: dict[str, dict[str, Any]] = {
    "textarena": {"env_id": "KuhnPoker-v0-raw", "render": "tests.games.test_textarena:newest"},
    "textarena-free": {
        "choices": "none",
        "render": "tests.games.test_textarena:newest",
        "max_tokens": 3,
        "max_turns": 2,
    },
    "pettingzoo": {"max_turns": 5},
    "pettingzoo-parallel": {
        "env": "classic/rps-v2",
        "interface": "parallel",
        "env_options": {"max_cycles": 2},
        "reward_range": [-2, 2],
    },
    "openspiel": {"game": "kuhn_poker"},
    "reasoning_gym": {"dataset": "leg_counting", "required_models": 2, "max_tokens": 4},
    "datasets": {
        "data": str(ANIMALS),
        "template": "A {animal} is a",
        "columns": {"answer": "kind"},
        "choices": ["bird", "fish", "insect", "mammal"],
        "required_models": 2,
    },
}


def trained(tiny_path: Path, name: str, updates: int) -> tuple[MultiModelEnvironment, list[dict[str, float]]]:
    """A run of some updates, and the metrics of each."""
    config = parse_config(
        {
            "base": {"model": str(tiny_path), "threads": 1},
            "mode": "competitive",
            "models": [{"model_id": "a", "lora_rank": 4, "learning_rate": 1e-2}, {"model_id": "b", "lora_rank": 2}],
            "scenario": {"id": name.partition("-")[0], "options": SCENARIOS[name]},
            "rollout": {"tasks_per_update": 2, "group_size": 4, "max_failed_share": 0, "rotate_seats": True},
            "credit": {"scheme": "moving_average"},
            "learner": {"entropy_bonus": 0.01},
            "engine": {"calibration_tasks": 4},
            "evaluation": {"tasks": 4, "every": 1 if name == "openspiel" else 0},
        }
    )
    env = MultiModelEnvironment(config=config)
    records = env.run_training_cycle(updates)
    return env, [dict(record.metrics) for record in records]


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_trains_and_the_same_seed_gives_the_same_run(name: str, tiny_path: Path) -> None:
    env, metrics = trained(tiny_path, name, 2)
    assert [model.weight_updates for model in env.models.values()] == [2, 2]
    for model_id in ("a", "b"):
        assert metrics[0][f"learn/{model_id}/tokens"] > 0
        assert metrics[0][f"learn/{model_id}/grad_norm"] > 0
    weights = env.base.bank.training("a").flat.clone()
    again, repeated = trained(tiny_path, name, 2)
    assert repeated == metrics
    same = again.base.bank.training("a").flat.clone()
    assert bool((weights == same).all())
    if name == "openspiel":
        assert 0 <= metrics[1]["exact/nash_conv"] < 4
        assert metrics[0]["exact/nash_conv"] != metrics[1]["exact/nash_conv"], "the policies have changed"
