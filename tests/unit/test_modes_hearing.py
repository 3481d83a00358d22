"""Who hears whom: the tables of the docstrings, row by row."""

import pytest

from coterie.modes.competitive import Competitive
from coterie.modes.cooperative import Cooperative
from coterie.modes.mixed import Mixed
from coterie.modes.team_battle import TeamBattle
from coterie.types import ModelRole
from tests.support.episodes import make_card, make_task

LEADER, FOLLOWER, TEAMMATE = ModelRole.LEADER, ModelRole.FOLLOWER, ModelRole.TEAMMATE
SAME, ACROSS, TEAMLESS, HALF = ("red", "red"), ("red", "blue"), (None, None), ("red", None)


def hears(mode, teams, speaker=TEAMMATE, listener=TEAMMATE, level=0.5):
    return mode.hears(
        make_card("listener", listener, teams[0]),
        make_card("speaker", speaker, teams[1]),
        make_task(cooperation_level=level),
    )


@pytest.mark.parametrize("teams", [SAME, ACROSS, TEAMLESS, HALF])
def test_all_share_in_cooperation_and_nobody_in_competition(teams):
    for speaker, listener in [(TEAMMATE, TEAMMATE), (LEADER, FOLLOWER), (FOLLOWER, LEADER)]:
        assert hears(Cooperative(), teams, speaker, listener, level=0.0)
        assert not hears(Competitive(), teams, speaker, listener, level=1.0)


def test_advice_stays_inside_a_team_in_battle():
    assert hears(TeamBattle(), SAME)
    for teams in (ACROSS, TEAMLESS, HALF):
        assert not hears(TeamBattle(), teams, LEADER, FOLLOWER, level=1.0)


@pytest.mark.parametrize("level", [0.0, 0.5, 0.51, 1.0])
def test_mixed_shares_inside_a_team_always_and_beyond_it_when_mostly_cooperative(level):
    assert hears(Mixed(), SAME, level=level)
    for teams in (ACROSS, TEAMLESS, HALF, HALF[::-1]):
        assert hears(Mixed(), teams, level=level) == (level > 0.5)


@pytest.mark.parametrize("teams", [SAME, TEAMLESS, HALF, HALF[::-1]])
def test_a_leader_reaches_its_followers_in_mixed_under_any_blend(teams):
    assert hears(Mixed(), teams, LEADER, FOLLOWER, level=0.0)
    if teams != SAME:
        assert not hears(Mixed(), teams, FOLLOWER, LEADER, level=0.0)
        assert not hears(Mixed(), teams, LEADER, TEAMMATE, level=0.0)


def test_a_leader_does_not_lead_another_team():
    assert not hears(Mixed(), ACROSS, LEADER, FOLLOWER, level=0.5)
    assert hears(Mixed(), ACROSS, LEADER, FOLLOWER, level=0.6)


def test_a_model_at_two_seats_may_advise_its_other_seat():
    one, other = make_card("one", model_id="m"), make_card("other", model_id="m")
    assert Cooperative().hears(one, other, make_task())
