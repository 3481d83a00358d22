"""Every adapter keeps the contract of `scenarios/base.py` on real environments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coterie.scenarios.base import SCENARIOS, build_scenario
from coterie.scenarios.check import check

ROWS = "@rows"
"""Stands for the path of a file of questions."""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("textarena", {}),
    ("textarena", {"env_id": "KuhnPoker-v0-raw", "env_options": {"max_rounds": 2}, "memory": 2}),
    ("textarena", {"env_id": "IteratedPrisonersDilemma-v0-raw", "choices": "none", "max_turns": 4}),
    ("textarena", {"env_id": "ThreePlayerTicTacToe-v0-raw", "players": 3, "cooperation_level": 1.0}),
    ("textarena", {"env_id": "PigDice-v0-raw", "max_turns": 6}),
    ("pettingzoo", {}),
    ("pettingzoo", {"env": "classic/connect_four-v3", "max_turns": 4}),
    (
        "pettingzoo",
        {
            "env": "classic/rps-v2",
            "interface": "parallel",
            "env_options": {"max_cycles": 3},
            "reward_range": [-3, 3],
            "actions": ["blue", "green", "white"],
        },
    ),
    ("openspiel", {}),
    ("openspiel", {"game": "kuhn_poker(players=3)", "view": "observation"}),
    ("openspiel", {"game": "tic_tac_toe", "exact": False, "cooperation_level": 1.0}),
    ("openspiel", {"game": "matrix_rps", "actions": ["blue", "green", "white"]}),
    ("openspiel", {"game": "goofspiel(num_cards=3,imp_info=true)"}),
    ("reasoning_gym", {}),
    ("reasoning_gym", {"dataset": "leg_counting", "required_models": 2, "cooperation_level": 0.9}),
    ("reasoning_gym", {"dataset": "gsm_symbolic", "suffix": "\nGive the number only."}),
    ("datasets", {"data": ROWS}),
    ("datasets", {"data": ROWS, "scorer": "number", "required_models": 3, "cooperation_level": 0.9}),
]


@pytest.mark.parametrize(("scenario_id", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_keeps_the_contract(scenario_id: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "answer": n + 1}) + "\n" for n in range(24)))
    filled = {key: str(rows) if value == ROWS else value for key, value in options.items()}
    problems = check(build_scenario(scenario_id, filled), tasks=4)
    assert not problems, "\n".join(problems)


def test_no_adapter_is_left_out() -> None:
    """But for OASIS, which cannot be installed with the others: tests/external/test_oasis.py."""
    adapters = {name for name, target in SCENARIOS.items() if ".adapters." in target} - {"oasis"}
    assert {name for name, _ in CASES} == adapters
