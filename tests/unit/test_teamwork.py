"""Who advises, who hears it, and how tokens become efficiency."""

from __future__ import annotations

from typing import Any

import pytest

from coterie.errors import ScenarioError
from coterie.scenarios.teamwork import (
    advice_speakers,
    efficiency,
    heard_by,
    response_quality,
    team_scores,
    token_pools,
)
from coterie.types import ModelRole, PlayerCard
from tests.support.tables import cards, make_table, make_task

TEAM = {"a": "leader", "b": "follower", "c": "follower"}


def from_leaders(listener: PlayerCard, speaker: PlayerCard) -> bool:
    return speaker.role is ModelRole.LEADER


def inside_teams(listener: PlayerCard, speaker: PlayerCard) -> bool:
    return listener.team == speaker.team


def table(level: float = 0.9, roles: Any = None, teams: Any = None, **options: Any) -> Any:
    roles = TEAM if roles is None else roles
    return make_table(make_task(cooperation_level=level), list(roles), cards=cards(roles, teams), **options)


def test_under_central_leadership_only_leaders_advise() -> None:
    assert advice_speakers(table()) == ["a"]
    assert advice_speakers(table(roles={"a": "follower", "b": "leader", "c": "leader"})) == ["b", "c"]


def test_delegated_everybody_advises_in_table_order() -> None:
    assert advice_speakers(table(roles=dict.fromkeys("bca", "teammate"))) == ["b", "c", "a"]


def test_nobody_advises_without_communication_or_without_listeners_or_without_a_turn_to_spare() -> None:
    assert advice_speakers(table(level=0.3)) == []
    assert advice_speakers(table(level=0.31)) == ["a"]
    assert advice_speakers(table(hearing=lambda listener, speaker: False)) == []
    assert advice_speakers(make_table(make_task(max_steps=1, cooperation_level=1.0), "ab")) == []
    only_b = table(roles=dict.fromkeys("abc", "teammate"), hearing=lambda li, sp: sp.seat_id == "b")
    assert advice_speakers(only_b) == ["b"]


def test_withheld_advice_is_still_asked_for_and_not_heard() -> None:
    at = table(withheld=["a"])
    assert advice_speakers(at) == ["a"]
    assert heard_by(at, "b", {"a": "left"}) == []


def test_advice_is_heard_in_table_order_and_never_from_oneself() -> None:
    at = table(roles=dict.fromkeys("abc", "teammate"))
    assert heard_by(at, "b", {"c": "three", "b": "two", "a": "one"}) == [("a", "one"), ("c", "three")]
    assert heard_by(at, "b", {}) == []
    assert heard_by(table(hearing=from_leaders), "c", {"a": "one", "b": "two"}) == [("a", "one")]


def test_efficiency() -> None:
    assert [efficiency(used, 10) for used in (0, 5, 10, 15)] == [1.0, 0.75, 0.5, 0.5]
    for used, budget in ((1, 0), (-1, 5)):
        with pytest.raises(ScenarioError, match="positive token budget"):
            efficiency(used, budget)


def test_own_budgets_without_resource_sharing() -> None:
    at = table(level=0.7)
    scores = team_scores(at, {"a": 1.0, "b": 0.5, "c": 0.0}, {"a": 4, "b": 8}, 8)
    assert scores == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert team_scores(at, dict.fromkeys("abc", 1.0), {"a": 4}, {"a": 4, "b": 1, "c": 1}) == {"a": 0.5, "b": 1, "c": 1}


def test_one_pool_with_resource_sharing() -> None:
    scores = team_scores(table(level=0.71), {"a": 1.0, "b": 0.5, "c": 0.0}, {"a": 12}, 8)
    assert scores == {"a": 0.75, "b": 0.375, "c": 0.0}
    unequal = team_scores(table(level=0.71), dict.fromkeys("abc", 1.0), {"b": 5}, {"a": 6, "b": 2, "c": 2})
    assert unequal == dict.fromkeys("abc", 0.75)


def test_pools_keep_to_teams_and_to_those_who_hear_each_other() -> None:
    four = dict.fromkeys("abcd", "teammate")
    teams = {"a": "red", "c": "red", "b": "blue", "d": "blue"}
    assert token_pools(table(roles=four, teams=teams, hearing=inside_teams)) == [["a", "c"], ["b", "d"]]
    assert token_pools(table(roles=four, teams=teams)) == [["a", "c"], ["b", "d"]], "teams part the pools by themselves"
    assert token_pools(table(roles=four, hearing=lambda li, sp: False)) == [["a"], ["b"], ["c"], ["d"]]
    assert token_pools(table(hearing=from_leaders)) == [["a", "b", "c"]], "followers are linked by their leader"
    last_leads = {"a": "follower", "b": "follower", "c": "leader"}
    assert token_pools(table(roles=last_leads, hearing=from_leaders)) == [["a", "b", "c"]]
    assert token_pools(table(level=0.5)) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("accuracy", "tokens", "budget", "message"),
    [
        ({"a": 1.0, "b": 1.0}, {}, 8, "accuracy lacks seat 'c'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, {}, 8, "accuracy names the unknown seat 'd'"),
        ({"a": 1.0, "b": 1.2, "c": 1.0}, {}, 8, "accuracy of seat 'b' is 1.2"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"e": 1}, 8, "tokens_used names the unknown seat 'e'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {}, {"a": 8}, "budget lacks seat 'b'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {}, 0, "positive token budget"),
    ],
)
def test_bad_accounts_are_errors(accuracy: Any, tokens: Any, budget: Any, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        team_scores(table(), accuracy, tokens, budget)


@pytest.mark.parametrize(
    ("text", "bonus"),
    [
        ("", 0.05),
        ("we plan", 0.05),
        ("let us Cooperate", 0.1),
        ("collaboration", 0.1),
        ("协同工作", 0.1),
        ("合作", 0.1),
        ("竞争", 0.1),
        ("optimize", 0.1),
        ("合作并优化", 0.15),
        ("cooperative competition", 0.15),
    ],
)
def test_response_quality(text: str, bonus: float) -> None:
    assert response_quality(text) == pytest.approx(bonus)
