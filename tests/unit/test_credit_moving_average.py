"""Moving-average credit: the baseline of before the batch, one for each task type, seat and kind of turn."""

import json

import pytest

from coterie.config import CreditConfig
from coterie.credit.base import build_credit
from coterie.credit.moving_average import MovingAverage, MovingAverageOptions
from coterie.credit.normalize import deviation
from coterie.errors import ConfigError, RunFolderError
from coterie.types import TaskType, TrainingMode
from tests.support.episodes import episode, group, make_task


def batch(name, *rewards, **fields):
    return group(name, scores=[{"a": reward} for reward in rewards], **fields)


def advantages(credit, episodes, seat="a"):
    result = credit.advantages(episodes)
    return [result.of(e.episode_id, seat, 0) for e in episodes]


def test_the_first_batch_is_centred():
    credit = MovingAverage(MovingAverageOptions())
    assert advantages(credit, batch("g", 0.0, 1.0)) == [-0.5, 0.5]
    assert credit.state() == {"baselines": [["classification", "a", "other", 0.5]]}


def test_a_batch_is_compared_with_what_was_before_it():
    credit = MovingAverage(MovingAverageOptions(decay=0.75))
    advantages(credit, batch("g", 0.5))
    assert advantages(credit, batch("h", 1.0, 0.8)) == pytest.approx([0.5, 0.3])
    assert advantages(credit, batch("i", 0.6)) == pytest.approx([0.0])  # 0.5 + 0.25 * (0.9 - 0.5)


def test_a_given_start_is_the_first_baseline():
    credit = MovingAverage(MovingAverageOptions(initial=0.25, decay=0.5))
    assert advantages(credit, batch("g", 1.0)) == [0.75]
    assert credit.state()["baselines"][0][-1] == 0.625


def test_an_edge_of_the_seat_is_no_merit():
    credit = MovingAverage(MovingAverageOptions())
    zero_sum = [{"a": 0.7, "b": 0.3}] * 4
    credit.advantages(group("g", scores=zero_sum))
    result = credit.advantages(group("h", scores=[{"a": 0.5, "b": 0.5}]))
    assert result.of("h/0", "a", 0) == pytest.approx(-0.2)
    assert result.of("h/0", "b", 0) == pytest.approx(0.2)


def test_a_seat_has_one_baseline_whoever_holds_it():
    credit = MovingAverage(MovingAverageOptions())
    credit.advantages(batch("g", 0.5, models={"a": "one"}))
    assert advantages(credit, batch("h", 1.0, models={"a": "other"})) == [0.5]


def test_task_types_have_their_own_baseline():
    credit = MovingAverage(MovingAverageOptions())
    advantages(credit, batch("g", 1.0))
    assert advantages(credit, batch("h", 0.2, 0.4, task=make_task(task_type=TaskType.REASONING))) == pytest.approx(
        [-0.1, 0.1]
    )


def test_what_is_not_seen_is_not_moved():
    credit = MovingAverage(MovingAverageOptions(decay=0.5))
    credit.advantages(group("g", scores=[{"a": 0.2, "b": 0.8}]))
    credit.advantages(batch("h", 1.0))
    assert [(seat, value) for _, seat, _, value in credit.state()["baselines"]] == [
        ("a", pytest.approx(0.6)),
        ("b", 0.8),
    ]


def test_division_by_the_policys_deviation_does_not_centre():
    credit = MovingAverage(MovingAverageOptions(initial=0.0, normalize="policy"))
    values = advantages(credit, batch("g", 0.5, 1.0))
    assert deviation(values) == pytest.approx(1.0)
    assert values == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize(
    "options", [{"decay": 1.0}, {"decay": -0.1}, {"initial": float("nan")}, {"normalize": "group"}]
)
def test_impossible_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build_credit(CreditConfig(scheme="moving_average", options=options), TrainingMode.MIXED)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"baselines": [["classification", "a", 0.5]]},
        {"baselines": [["poetry", "a", "other", 0.5]]},
        {"baselines": [["classification", "a", "other", "0.5"]]},
        {"baselines": [["classification", "a", "other", float("inf")]]},
        {"baselines": None},
    ],
)
def test_a_damaged_state_is_refused_and_leaves_the_scheme_as_it_was(state):
    credit = MovingAverage(MovingAverageOptions())
    credit.advantages([episode(scores={"a": 0.3})])
    before = json.dumps(credit.state())
    with pytest.raises(RunFolderError, match=r"moving.average"):
        credit.restore(state)
    assert json.dumps(credit.state()) == before
