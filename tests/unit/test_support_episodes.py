"""The builders make what their docstring says; everything else in the tests leans on them."""

from coterie.types import Tier
from tests.support.episodes import episode, group


def test_defaults_are_one_trainable_answer_worth_its_score():
    built = episode(scores={"a": 0.25, "b": 1.0})
    assert built.rewards == {"a": 0.25, "b": 1.0}
    (turn,) = built.trajectories["a"].turns
    assert (turn.kind, turn.model_id, turn.trainable) == ("answer", "model_a", True)


def test_a_script_holds_a_seat_without_model():
    built = episode(scores={"a": 1.0}, models={"a": None}, kinds={"a": ("advice", "answer")})
    assert [turn.kind for turn in built.trajectories["a"].turns] == ["advice", "answer"]
    assert {turn.tier for turn in built.trajectories["a"].turns} == {Tier.SCRIPT}
    assert not any(turn.trainable for turn in built.trajectories["a"].turns)


def test_siblings_share_a_group_and_differ_in_id():
    first, second = group("g", scores=[{"a": 0.0}, {"a": 1.0}], withheld={"a"})
    assert (first.group, second.group) == ("g", "g")
    assert first.episode_id != second.episode_id
    assert second.withheld == {"a"}
