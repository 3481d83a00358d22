"""How the blend of MIXED follows learning progress."""

import json

import pytest

from coterie.errors import RunFolderError, ScenarioError
from coterie.modes.mixed import MAX_SHIFT, Mixed
from coterie.types import TaskType, Tier
from tests.support.episodes import episode, group, make_card, make_task, make_turn

LEVEL = make_task(cooperation_level=0.6)


def after(scores, task=LEVEL):
    """A mode that has seen one update for every entry of `scores`, all at that score."""
    mode = Mixed()
    for score in scores:
        mode.observe([episode(scores={"a": score, "b": score}, task=task)])
    return mode


def test_the_blend_starts_at_the_level():
    assert Mixed().blend(LEVEL) == 0.6


def test_one_update_is_no_evidence_of_standing_still():
    assert after([0.0]).blend(LEVEL) == 0.6


def test_a_group_stuck_at_nothing_goes_to_the_furthest_shift():
    blends = [after([0.0] * n).blend(LEVEL) for n in (2, 5, 20, 200)]
    assert blends == sorted(blends)
    assert blends[0] > 0.6
    assert blends[-1] == pytest.approx(0.6 + MAX_SHIFT, abs=1e-4)


def test_the_shift_follows_the_formula():
    mode = after([0.2, 0.3])
    fast, slow = 0.2 + 0.2 * 0.1, 0.2 + 0.05 * 0.1
    stall = 1 - (fast - slow) / 0.05
    assert mode.blend(LEVEL) == pytest.approx(0.6 + 0.1 * (1 - 0.95) * stall * (1 - fast), abs=1e-12)


def test_a_group_that_learns_stays_at_the_level():
    learning = [0.0] * 10 + [0.01 * n for n in range(60)]
    assert after(learning).blend(LEVEL) == 0.6


def test_the_shift_returns_once_learning_sets_in():
    stuck = [0.1] * 40
    assert after(stuck).blend(LEVEL) > 0.67
    assert after(stuck + [0.1 + 0.02 * n for n in range(10)]).blend(LEVEL) == 0.6


def test_falling_back_counts_as_stuck():
    assert after([0.9] * 40 + [0.3] * 5).blend(LEVEL) > after([0.9] * 45).blend(LEVEL)


def test_a_group_that_stands_still_at_the_top_is_left_alone():
    assert after([1.0] * 100).blend(LEVEL) == 0.6


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_pure_levels_stay_pure(level):
    task = make_task(cooperation_level=level)
    assert after([0.0] * 50, task).blend(task) == level


def test_the_shift_dies_out_towards_the_pure_levels():
    mode = after([0.0] * 500)
    for level in (0.02, 0.98):
        task = make_task(cooperation_level=level)
        assert 0.0 < mode.blend(task) - level <= 0.02


def test_task_types_are_followed_apart():
    other = make_task(task_type=TaskType.REASONING, cooperation_level=0.6)
    mode = after([0.0] * 20)
    assert mode.blend(other) == 0.6
    mode.observe([episode(scores={"a": 1.0}, task=other)])
    assert set(mode.state()["progress"]) == {"classification", "reasoning"}


def test_a_group_stuck_near_the_border_starts_to_share_advice():
    task = make_task(cooperation_level=0.45)
    listener, speaker = make_card("a"), make_card("b")
    assert not Mixed().hears(listener, speaker, task)
    assert after([0.0] * 100, task).hears(listener, speaker, task)


def test_every_episode_weighs_the_same_whatever_its_seats_and_order():
    episodes = group("g", scores=[{"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 0.3}, {"a": 0.77, "b": 0.13}])
    forward, backward = Mixed(), Mixed()
    for _ in range(3):
        forward.observe(episodes)
        backward.observe(episodes[::-1])
    assert forward.state() == backward.state()
    assert forward.state()["progress"]["classification"]["fast"] == pytest.approx((1 / 3 + 0.3 + 0.45) / 3)


def test_simulated_answers_say_nothing_of_the_models():
    mode = Mixed()
    turns = {"a": [make_turn("a"), make_turn("a", tier=Tier.SIMULATED)]}
    mode.observe([episode(scores={"a": 1.0}, turns=turns)])
    assert mode.state() == {"progress": {}}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"progress": {"poetry": {"fast": 0.1, "slow": 0.1, "updates": 1}}},
        {"progress": {"reasoning": {"fast": 0.1, "slow": 0.1}}},
        {"progress": {"reasoning": {"fast": float("nan"), "slow": 0.1, "updates": 1}}},
        {"progress": {"reasoning": {"fast": "0.1", "slow": 0.1, "updates": 1}}},
        {"progress": {"reasoning": {"fast": 0.1, "slow": 0.1, "updates": 0}}},
        {"progress": [1]},
    ],
)
def test_a_damaged_state_is_refused_and_leaves_the_mode_as_it_was(state):
    mode = after([0.0] * 5)
    before = json.dumps(mode.state())
    with pytest.raises(RunFolderError, match="mixed"):
        mode.restore(state)
    assert json.dumps(mode.state()) == before


def test_an_episode_without_scores_is_refused():
    with pytest.raises(ScenarioError, match="'e7'"):
        Mixed().observe([episode("e7", scores={})])
