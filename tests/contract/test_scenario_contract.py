"""Every built-in scenario keeps the contract of `scenarios/base.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import ConfigError
from coterie.scenarios.base import SCENARIOS, build_scenario
from coterie.scenarios.check import check
from coterie.scenarios.oasis.loading import require

ROWS = "@rows"
"""Stands for the path of a file of tasks."""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tasks", {}),
    ("tasks", {"models": 2, "difficulty": [0.9, 1.0], "cooperation_level": 0.2}),
    ("tasks", {"types": ["collaboration", "generation"], "models": 4, "max_steps": 2}),
    ("signaling", {}),
    ("signaling", {"symbols": 2, "states": 3, "receivers": 3}),
    ("signaling", {"symbols": ["up", "down"], "states": ["sun", "rain"], "cooperation_level": 0.0}),
    ("matrix", {}),
    ("matrix", {"game": "prisoners_dilemma", "rounds": 5, "memory": 2}),
    ("matrix", {"game": "stag_hunt", "rounds": 3, "memory": 0}),
    ("matrix", {"game": "matching_pennies", "cooperation_level": 1.0}),
    ("matrix", {"game": "rock_paper_scissors", "rounds": 2}),
    ("matrix", {"game": "coordination", "rounds": 2, "labels": ["left", "right"]}),
    ("oasis", {"groups": [{"name": "red", "agents": 2}, {"name": "blue", "agents": 1}], "rounds": 2}),
    ("matrix", {"payoffs": [[[0, 1], [2, -3], [4, 4]], [[1, 1], [0.5, 0], [-1, 2]]], "rounds": 2}),
    ("kuhn", {}),
    ("leduc", {"reward_pool": 2.0}),
    ("tictactoe", {}),
    ("tictactoe", {"opponents": ["random", "model"], "symmetry": False, "exact_floor": 0.001}),
    ("jsonl", {"path": ROWS}),
    ("jsonl", {"path": ROWS, "scorer": "contains", "required_models": 3, "cooperation_level": 0.9}),
    ("public_goods", {}),
    ("public_goods", {"players": 2, "endowment": 2, "rounds": 3, "memory": 2, "multiplier": 1.5}),
    ("public_goods", {"endowment": [3, 1, 3], "rounds": 2}),
    ("commons", {}),
    ("commons", {"demands": [[0, 1], [0, 1], [0, 1, 3]], "rounds": 3}),
    ("commons", {"players": 2, "capacity": 12, "demands": [0, 1, 2, 4], "growth": 1.5, "rounds": 4}),
    ("blotto", {}),
    ("blotto", {"fields": 4, "troops": 3, "score": "fields"}),
    ("team_blotto", {"battles": 2}),
    ("team_blotto", {"fields": 3, "troops": 3, "battles": 1, "cooperation_level": 0.0}),
    ("team_signaling", {}),
    ("team_signaling", {"symbols": 2, "states": 3, "intercept": True}),
    ("guess_number", {"numbers": 9, "guesses": 5}),
    ("guess_number", {"numbers": 5, "players": 3, "together": True}),
    ("guess_number", {"numbers": 12, "players": 1}),
    ("taboo", {}),
    ("taboo", {"teams": 1, "taboo": "excluded", "targets": 3, "rounds": 1}),
    ("bargaining", {}),
    ("bargaining", {"values": [1, 2], "offers": 3, "discount": 0.9}),
]


@pytest.mark.parametrize(("scenario_id", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_keeps_the_contract(scenario_id: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(12):
            file.write(json.dumps({"prompt": f"{number} + 1 =", "answer": str(number + 1)}) + "\n")
            choices = {
                "prompt": f"Is {number} even?",
                "choices": ["yes", "no"],
                "answer": "no" if number % 2 else "yes",
            }
            file.write(json.dumps({**choices, "required_models": 2, "cooperation_level": number / 11}) + "\n")
    if scenario_id == "oasis":
        try:
            require()
        except ConfigError as error:
            pytest.skip(str(error).partition(";")[0])  # tests/external/test_oasis.py does this where OASIS is
    filled = {key: str(rows) if value == ROWS else value for key, value in options.items()}
    problems = check(build_scenario(scenario_id, filled))
    assert not problems, "\n".join(problems)


def test_no_built_in_is_left_out() -> None:
    """Scenarios of other packages' environments stand in tests/games/test_contract.py, but for OASIS, which cannot be
    installed with them: it is here, and skipped where it is not."""
    covered = {name for name, _ in CASES}
    assert covered == {name for name, target in SCENARIOS.items() if ".adapters." not in target or name == "oasis"}
