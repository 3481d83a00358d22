"""How each mode divides a pool, by numbers worked out by hand."""

import math

import pytest

from coterie.modes.competitive import Competitive
from coterie.modes.cooperative import Cooperative
from coterie.modes.division import pay, rank_shares
from coterie.modes.mixed import Mixed
from coterie.modes.team_battle import TeamBattle
from tests.support.episodes import make_task


def divide(mode, scores, teams=None, **task):
    scores = dict(zip("abcd", scores, strict=False))
    teams = teams or dict.fromkeys(scores)
    return [mode.rewards(make_task(**task), scores, teams)[seat] for seat in scores]


def test_cooperative_pays_everybody_an_equal_part_of_the_mean():
    assert divide(Cooperative(), [1.0, 0.0], reward_pool=8.0) == [2.0, 2.0]
    assert divide(Cooperative(), [0.0, 0.0]) == [0.0, 0.0]
    assert divide(Cooperative(), [1.0, 1.0], reward_pool=8.0) == [4.0, 4.0]


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([0.9, 0.1], [1, 0]),
        ([0.5, 0.5], [1 / 2, 1 / 2]),
        ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
        ([0.2, 0.9, 0.5], [0, 2 / 3, 1 / 3]),
        ([0.9, 0.9, 0.5], [1 / 2, 1 / 2, 0]),
        ([0.9, 0.1, 0.1], [2 / 3, 1 / 6, 1 / 6]),
        ([0.4, 0.3, 0.2, 0.1], [3 / 6, 2 / 6, 1 / 6, 0]),
        ([0.4, 0.3, 0.3, 0.1], [3 / 6, 1.5 / 6, 1.5 / 6, 0]),
    ],
)
def test_competitive_pays_by_rank(scores, shares):
    assert divide(Competitive(), scores, reward_pool=10.0) == pytest.approx([10 * share for share in shares])


def test_only_the_order_of_scores_counts_in_competition():
    assert divide(Competitive(), [0.51, 0.5, 0.1]) == divide(Competitive(), [1.0, 0.2, 0.0])


def test_rounding_noise_does_not_break_a_tie():
    assert 0.1 + 0.2 != 0.3
    assert rank_shares([0.1 + 0.2, 0.3]) == [0.5, 0.5]


def test_the_better_team_takes_the_pool_and_splits_it():
    teams = {"a": "red", "b": "red", "c": "blue", "d": "blue"}
    # blue's mean 0.5 beats red's 0.45, though the best single seat is red's
    assert divide(TeamBattle(), [0.9, 0.0, 0.5, 0.5], teams, reward_pool=6.0) == [0.0, 0.0, 3.0, 3.0]
    assert divide(TeamBattle(), [0.5, 0.5, 0.6, 0.4], teams, reward_pool=6.0) == [1.5, 1.5, 1.5, 1.5]


def test_team_size_does_not_decide_a_battle():
    teams = {"a": "red", "b": "red", "c": "red", "d": "blue"}
    assert divide(TeamBattle(), [0.4, 0.4, 0.4, 0.5], teams) == [0.0, 0.0, 0.0, 1.0]
    assert divide(TeamBattle(), [0.4, 0.4, 0.4, 0.4], teams) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_a_seat_without_team_is_a_team_of_one_even_beside_a_team_of_its_name():
    teams = {"a": "b", "b": None, "c": "b"}
    assert divide(TeamBattle(), [1.0, 0.0, 1.0], teams) == [0.5, 0.0, 0.5]


def test_a_single_team_gets_its_score():
    assert divide(TeamBattle(), [1.0, 0.0], {"a": "red", "b": "red"}, reward_pool=8.0) == [2.0, 2.0]


@pytest.mark.parametrize("level", [0.0, 0.25, 0.5, 1.0])
def test_mixed_blends_sharing_and_rank(level):
    shared, ranked = divide(Cooperative(), [0.8, 0.2]), divide(Competitive(), [0.8, 0.2])
    expected = [level * s + (1 - level) * r for s, r in zip(shared, ranked, strict=True)]
    assert divide(Mixed(), [0.8, 0.2], cooperation_level=level) == pytest.approx(expected)


def test_the_rivalry_in_mixed_is_a_team_battle_with_several_teams_and_competition_inside_one():
    scores = [0.9, 0.0, 0.5]
    several = {"a": "red", "b": "red", "c": "blue"}
    one = {"a": "red", "b": "red", "c": "red"}
    lone_rival = {"a": "red", "b": "red", "c": None}
    assert divide(Mixed(), scores, several, cooperation_level=0.0) == divide(TeamBattle(), scores, several)
    assert divide(Mixed(), scores, lone_rival, cooperation_level=0.0) == divide(TeamBattle(), scores, lone_rival)
    assert divide(Mixed(), scores, one, cooperation_level=0.0) == divide(Competitive(), scores, one)


def test_one_dilemma_three_societies():
    """Payoffs 5/3/1/0 as scores: sharing makes cooperation dominant, rank makes defection dominant."""
    both, victim, traitor, neither = 0.6, 0.0, 1.0, 0.2
    table = {("C", "C"): (both, both), ("C", "D"): (victim, traitor), ("D", "C"): (traitor, victim)}
    table["D", "D"] = (neither, neither)

    def gain_of_defecting(mode, other, level=0.5):
        cooperate = divide(mode, table["C", other], cooperation_level=level)[0]
        return divide(mode, table["D", other], cooperation_level=level)[0] - cooperate

    for other in "CD":
        assert gain_of_defecting(Cooperative(), other) < 0
        assert gain_of_defecting(Competitive(), other) > 0
        by_level = [gain_of_defecting(Mixed(), other, level) for level in (0.0, 0.3, 0.7, 0.85, 1.0)]
        assert by_level == sorted(by_level, reverse=True)
        assert by_level[0] > 0 > by_level[-1]


@pytest.mark.parametrize("pool", [3.0, 1e12, 1e-300, 5e-324])
def test_rounding_never_pays_more_than_the_pool(pool):
    task = make_task(reward_pool=pool)
    for n in range(2, 40):
        rewards = pay(task, {str(i): 1 / n for i in range(n)})
        assert math.fsum(rewards.values()) <= pool
        assert len(set(rewards.values())) == 1


@pytest.mark.parametrize("shares", [{"a": 0.6, "b": 0.6}, {"a": math.nan}])
def test_a_pool_cannot_be_divided_twice(shares):
    with pytest.raises(ValueError, match="sum to"):
        pay(make_task(), shares)
