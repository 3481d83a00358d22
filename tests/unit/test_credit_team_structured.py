"""Team-structured credit: the formula, advice, and the limits its docstring states."""

import pytest

from coterie.config import CreditConfig
from coterie.credit.base import build_credit
from coterie.credit.team_structured import TeamStructured, TeamStructuredOptions
from coterie.errors import ConfigError, ScenarioError
from coterie.modes.cooperative import Cooperative
from coterie.modes.team_battle import TeamBattle
from coterie.types import TrainingMode
from tests.support.episodes import episode, group, make_task

TEAMS = {"a": "red", "b": "red", "c": "blue", "d": None}
SCORES = {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.0}


def scheme(**options):
    return TeamStructured(TeamStructuredOptions(**options))


def test_the_signal_weighs_own_team_all_and_reward():
    played = episode(
        scores=SCORES,
        rewards={"a": 4.0, "b": 3.0, "c": 1.0, "d": 0.0},
        teams=TEAMS,
        task=make_task(reward_pool=8.0),
    )
    turns, advice = scheme(individual=0.5, team=0.3, global_=0.2, reward_weight=2.0).signal(played)
    everyone = 1.75 / 4
    assert turns == pytest.approx(
        {
            "a": 0.5 * 1.0 + 0.3 * 0.75 + 0.2 * everyone + 2.0 * 4 * 4.0 / 8.0,
            "b": 0.5 * 0.5 + 0.3 * 0.75 + 0.2 * everyone + 2.0 * 4 * 3.0 / 8.0,
            "c": 0.5 * 0.25 + 0.3 * 0.25 + 0.2 * everyone + 2.0 * 4 * 1.0 / 8.0,
            "d": 0.5 * 0.0 + 0.3 * 0.0 + 0.2 * everyone,
        }
    )
    others = {"a": 0.75 / 3, "b": 1.25 / 3, "c": 1.5 / 3, "d": 1.75 / 3}
    assert advice == pytest.approx({s: turns[s] + 0.5 * (others[s] - SCORES[s]) for s in SCORES})


def test_advice_is_judged_by_what_the_others_achieved():
    kinds = {"a": ("advice", "answer")}
    helped = episode("helped", scores={"a": 0.5, "b": 1.0}, kinds=kinds)
    misled = episode("misled", scores={"a": 0.5, "b": 0.0}, kinds=kinds)
    result = scheme(individual=1.0, team=0.0, global_=0.0, reward_weight=0.0, normalize="none").advantages(
        [helped, misled]
    )
    assert result.values["helped"] == {"a": (0.5, 0.0), "b": (0.5,)}
    assert result.values["misled"] == {"a": (-0.5, 0.0), "b": (-0.5,)}


def test_alone_own_team_and_all_are_the_same():
    played = episode(scores={"a": 0.5}, rewards={"a": 0.5}, kinds={"a": ("advice", "answer")})
    turns, advice = scheme().signal(played)
    assert turns == advice == pytest.approx({"a": 1.0})


def test_a_free_rider_is_seen_where_the_reward_is_shared():
    """Both are paid alike, but only "a" works."""
    mode, task = Cooperative(), make_task()
    episodes = [
        episode(f"e{i}", scores=scores, rewards=mode.rewards(task, scores, {"a": None, "b": None}), task=task)
        for i, scores in enumerate([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}])
    ]
    by_reward = build_credit(CreditConfig(scheme="group_relative", options={"normalize": "none"}), mode.name)
    by_structure = scheme(normalize="none")
    rewards, structured = by_reward.advantages(episodes), by_structure.advantages(episodes)
    assert rewards.of("e0", "a", 0) == rewards.of("e0", "b", 0)
    assert structured.of("e0", "a", 0) > 2 * structured.of("e0", "b", 0) > 0


def test_in_a_battle_the_reward_makes_the_difference_between_winning_and_losing():
    mode, task = TeamBattle(), make_task()
    teams = {"a": "red", "b": "blue"}
    games = [{"a": 0.5, "b": 0.4}, {"a": 0.5, "b": 0.6}]
    episodes = [
        episode(f"e{i}", scores=s, rewards=mode.rewards(task, s, teams), teams=teams, task=task)
        for i, s in enumerate(games)
    ]
    with_reward = scheme(normalize="none").advantages(episodes)
    without = scheme(normalize="none", reward_weight=0.0).advantages(episodes)
    assert with_reward.of("e0", "a", 0) > 0.9
    assert without.of("e0", "a", 0) < 0  # scores alone even like the game the rival did better in


def payoff_of_defecting(other, team_id, **options):
    """Signal gained by defecting in the prisoner's dilemma under shared reward."""
    scores = {"CC": (0.6, 0.6), "CD": (0.0, 1.0), "DC": (1.0, 0.0), "DD": (0.2, 0.2)}
    mode, task, signals = Cooperative(), make_task(), {}
    for own in "CD":
        played = dict(zip("ab", scores[own + other], strict=True))
        teams = {"a": team_id, "b": team_id}
        rewards = mode.rewards(task, played, teams)
        turns, _ = scheme(**options).signal(episode(scores=played, rewards=rewards, teams=teams, task=task))
        signals[own] = turns["a"]
    return signals["D"] - signals["C"]


@pytest.mark.parametrize(("team_id", "cooperators"), [("red", 0.75), (None, 0.5)])
def test_the_defaults_do_not_sustain_full_cooperation_in_a_dilemma(team_id, cooperators):
    """The docstring's numbers: at this share of cooperators neither move is better."""
    gain = {other: payoff_of_defecting(other, team_id) for other in "CD"}
    assert gain["C"] > 0 > gain["D"]
    assert cooperators * gain["C"] + (1 - cooperators) * gain["D"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("individual", "defects"), [(0.0, False), (0.39, False), (0.41, True)])
def test_cooperation_lasts_in_a_team_while_the_individual_share_is_small(individual, defects):
    gain = payoff_of_defecting("C", "red", individual=individual, team=1 - individual, global_=0.0)
    assert (gain > 0) == defects


def test_global_is_written_plainly_in_a_config():
    credit = build_credit(
        CreditConfig(scheme="team_structured", options={"individual": 0.5, "team": 0.1, "global": 0.4}),
        TrainingMode.TEAM_BATTLE,
    )
    assert isinstance(credit, TeamStructured)
    assert credit.options.global_ == 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"individual": 0.9}, "is 1.3 .* must be 1"),
        ({"individual": -0.2, "team": 1.0}, "individual"),
        ({"reward_weight": -1.0}, "reward_weight"),
        ({"globl": 0.2}, "'globl' .did you mean 'global"),
    ],
)
def test_impossible_weights_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_credit(CreditConfig(scheme="team_structured", options=options), TrainingMode.COOPERATIVE)


@pytest.mark.parametrize("scores", [{"a": 0.5, "b": float("nan")}, {"a": float("inf"), "b": 0.5}])
def test_a_score_that_is_no_number_is_named(scores):
    episodes = [*group("g", scores=[{"a": 0.1, "b": 0.2}]), episode("e5", scores=scores, rewards={"a": 0.1, "b": 0.1})]
    with pytest.raises(ScenarioError, match=r"'e5', seat '[ab]': score is (nan|inf)"):
        scheme().advantages(episodes)
