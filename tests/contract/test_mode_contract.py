"""What every mode keeps, whoever wrote it: parametrised over all built-in ids."""

import itertools
import json
import math

import pytest

from coterie.errors import RunFolderError, ScenarioError
from coterie.modes.base import MODES, Mode, build_mode
from coterie.types import ModelRole, TrainingMode
from tests.support.episodes import group, make_card, make_task

ROLES = list(ModelRole)
TEAMS = [None, "red", "blue"]
HISTORY = group("g", scores=[{"a": 0.0, "b": 0.3}, {"a": 0.1, "b": 0.0}])


@pytest.fixture(params=sorted(MODES))
def mode(request) -> Mode:
    return build_mode(TrainingMode(request.param))


def pairs_of_cards():
    for roles in itertools.product(ROLES, repeat=2):
        for teams in itertools.product(TEAMS, repeat=2):
            yield make_card("listener", roles[0], teams[0]), make_card("speaker", roles[1], teams[1])


def test_every_training_mode_is_built_in():
    assert set(MODES) == {mode.value for mode in TrainingMode}


def test_a_mode_carries_its_name(mode):
    assert MODES[mode.name.value].endswith(type(mode).__name__)


@pytest.mark.parametrize("level", [0.0, 0.4, 0.6, 1.0])
def test_roles_hold_in_every_mode(mode, level):
    task = make_task(cooperation_level=level)
    for listener, speaker in pairs_of_cards():
        if speaker.role is ModelRole.COMPETITOR or listener.role is ModelRole.NEUTRAL:
            assert not mode.hears(listener, speaker, task), (listener, speaker)


def test_nobody_hears_itself(mode):
    for role, team in itertools.product(ROLES, TEAMS):
        card = make_card("a", role, team)
        assert not mode.hears(card, card, make_task(cooperation_level=1.0))


@pytest.mark.parametrize("teams", [{"a": None, "b": None, "c": None}, {"a": "red", "b": "red", "c": "blue"}])
@pytest.mark.parametrize("scores", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.2, 0.9, 0.2), (1, 0, True)])
def test_every_seat_gets_a_share_and_the_pool_is_not_exceeded(mode, teams, scores):
    rewards = mode.rewards(make_task(reward_pool=7.0), dict(zip("abc", scores, strict=True)), teams)
    assert list(rewards) == ["a", "b", "c"]
    assert all(math.isfinite(reward) and reward >= 0 for reward in rewards.values())
    assert math.fsum(rewards.values()) <= 7.0


def test_scores_and_teams_may_list_the_seats_in_any_order(mode):
    scores = {"a": 0.1, "b": 0.9, "c": 0.5}
    teams = {"a": "red", "b": "blue", "c": "red"}
    assert mode.rewards(make_task(), scores, teams) == mode.rewards(make_task(), scores, dict(reversed(teams.items())))


def test_one_seat_alone_gets_its_score_of_the_pool(mode):
    for team in (None, "red"):
        assert mode.rewards(make_task(reward_pool=4.0), {"a": 0.5}, {"a": team}) == {"a": 2.0}


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan, math.inf, "1", None])
def test_an_impossible_score_is_named(mode, bad):
    with pytest.raises(ScenarioError, match=r"'t9'.*seat 'b'") as caught:
        mode.rewards(make_task("t9"), {"a": 0.5, "b": bad}, {"a": None, "b": None})
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("scores", "teams", "message"),
    [
        ({}, {}, "no seat has a score"),
        ({"a": 0.5, "b": 0.5}, {"a": None}, r"seat 'b'.*no team entry"),
        ({"a": 0.5}, {"a": None, "c": None}, r"seat 'c'.*no score"),
    ],
)
def test_scores_and_teams_must_have_the_same_seats(mode, scores, teams, message):
    with pytest.raises(ScenarioError, match=message):
        mode.rewards(make_task(), scores, teams)


def test_state_survives_json_and_decides_the_same(mode):
    mode.observe(HISTORY)
    mode.observe(HISTORY)
    again = build_mode(mode.name)
    again.restore(json.loads(json.dumps(mode.state())))
    assert again.state() == mode.state()
    for level in (0.3, 0.45, 0.8):
        task = make_task(cooperation_level=level)
        arguments = (task, {"a": 0.2, "b": 0.7}, {"a": None, "b": None})
        assert again.rewards(*arguments) == mode.rewards(*arguments)
        for listener, speaker in pairs_of_cards():
            assert again.hears(listener, speaker, task) == mode.hears(listener, speaker, task)


def test_a_saved_state_does_not_change_with_its_mode(mode):
    mode.observe(HISTORY)
    saved = mode.state()
    kept = json.dumps(saved)
    mode.observe(HISTORY)
    assert json.dumps(saved) == kept


def test_a_foreign_state_is_refused(mode):
    with pytest.raises(RunFolderError, match=mode.name.value):
        mode.restore({"baselines": []})


def test_nothing_observed_changes_nothing(mode):
    before = mode.state()
    mode.observe([])
    assert mode.state() == before
