"""What every credit scheme keeps, whoever wrote it: parametrised over all built-in ids."""

import json
import math
import random
from dataclasses import replace

import pytest

from coterie.config import CreditConfig
from coterie.credit.base import FITTING, SCHEMES, Credit, build_credit
from coterie.errors import ConfigError, RunFolderError, ScenarioError
from coterie.types import Tier, TrainingMode
from tests.support.episodes import episode, group, make_task, make_turn
from tests.support.work import lines

SCORES = [{"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 0.25}, {"a": 1.0, "b": 0.0}, {"a": 0.25, "b": 0.5}]
BOTH_KINDS = {"a": ("advice", "answer")}


@pytest.fixture(params=sorted(SCHEMES))
def scheme(request) -> str:
    return request.param


def build(scheme: str, **options: object) -> Credit:
    return build_credit(CreditConfig(scheme=scheme, options=options), TrainingMode.COOPERATIVE)


def plain(scheme: str) -> Credit:
    """Without division, so that numbers of different batches can be compared."""
    return build(scheme, normalize="none")


def test_every_mode_has_a_fitting_scheme():
    assert set(FITTING) == set(TrainingMode)
    for mode in TrainingMode:
        assert SCHEMES[FITTING[mode]].endswith(type(build_credit(CreditConfig(), mode)).__name__)


def test_every_turn_gets_one_finite_number(scheme):
    turns = {"a": [make_turn("a"), make_turn("a", kind="move"), make_turn("a", kind="advice")], "b": []}
    episodes = group("g", scores=SCORES, turns=turns)
    result = build(scheme).advantages(episodes)
    assert list(result.values) == [e.episode_id for e in episodes]
    for values in result.values.values():
        assert {seat: len(numbers) for seat, numbers in values.items()} == {"a": 3, "b": 0}
        assert all(math.isfinite(number) for number in values["a"])
    assert result.of("g/0", "a", 2) == result.values["g/0"]["a"][2]


def test_better_than_siblings_is_positive(scheme):
    result = build(scheme).advantages(group("g", scores=[{"a": 1.0}, {"a": 0.5}, {"a": 0.0}]))
    first, middle, last = (result.of(f"g/{i}", "a", 0) for i in range(3))
    assert first > 0 > last
    assert middle == pytest.approx(0.0)


def test_nothing_in_nothing_out(scheme):
    assert build(scheme).advantages([]).values == {}
    assert build(scheme).advantages([episode("e", scores={})]).values == {"e": {}}


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("size", [1, 3, 7, 49])
def test_equal_rewards_teach_nothing(scheme, constant, size):
    credit = build(scheme)
    for batch in range(3):
        episodes = group(f"g{batch}", scores=[{"a": constant, "b": constant}] * size, kinds=BOTH_KINDS)
        values = credit.advantages(episodes).values
        assert all(number == 0.0 for seats in values.values() for row in seats.values() for number in row)


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"moving_average"}))
def test_an_equal_group_stays_at_zero_beside_one_that_differs(scheme):
    """Not for the moving average: its baseline is one for all tasks of a type."""
    values = build(scheme).advantages(group("even", scores=[{"a": 0.1}] * 7) + group("g", scores=SCORES)).values
    assert all(values[f"even/{i}"] == {"a": (0.0,)} for i in range(7))
    assert any(values[f"g/{i}"]["a"] != (0.0,) for i in range(4))


@pytest.mark.parametrize("tier", [Tier.SIMULATED, Tier.SCRIPT, Tier.HUMAN])
def test_turns_no_model_in_training_sampled_get_nothing_and_count_nowhere(scheme, tier):
    outsider = make_turn("a", model_id="model_a" if tier is Tier.SIMULATED else None, tier=tier)
    without = group("g", scores=SCORES)
    with_outsider = [*without, episode("x", scores={"a": 0.9, "b": 0.5}, group="g", turns={"a": [outsider]})]
    result = build(scheme).advantages(with_outsider)
    assert result.of("x", "a", 0) == 0.0
    expected = build(scheme).advantages(without)
    for sibling in without:
        assert result.values[sibling.episode_id]["a"] == expected.values[sibling.episode_id]["a"]


def test_withheld_advice_gets_nothing_and_counts_in_no_baseline_of_advice(scheme):
    heard = group("g", scores=SCORES, kinds=BOTH_KINDS)
    silent = episode("s", scores={"a": 0.9, "b": 0.9}, group="g", kinds=BOTH_KINDS, withheld={"a"})
    result = plain(scheme).advantages([*heard, silent])
    alone = plain(scheme).advantages(heard)
    assert result.of("s", "a", 0) == 0.0
    assert result.of("s", "a", 1) > 0.0
    for sibling in heard:
        assert result.of(sibling.episode_id, "a", 0) == alone.of(sibling.episode_id, "a", 0)
        assert result.of(sibling.episode_id, "a", 1) < alone.of(sibling.episode_id, "a", 1)


def test_withholding_another_seats_advice_changes_nothing_for_this_one(scheme):
    episodes = group("g", scores=SCORES, kinds=BOTH_KINDS)
    withheld = [replace(e, withheld=frozenset("b")) for e in episodes]
    assert build(scheme).advantages(withheld) == build(scheme).advantages(episodes)


def test_groups_are_compared_apart_and_long_episodes_do_not_weigh_more(scheme):
    short, long = group("g", scores=[{"a": 0.0}, {"a": 1.0}])
    longer = replace(long, trajectories={"a": replace(long.trajectories["a"], turns=(make_turn("a"),) * 9)})
    result = plain(scheme).advantages([short, longer])
    assert result.of("g/0", "a", 0) == -result.of("g/1", "a", 0)
    assert len(set(result.values["g/1"]["a"])) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_bad_reward_is_named(scheme, bad):
    rewards = {"a": 0.5} if bad is None else {"a": 0.5, "b": bad}
    episodes = [episode("fine", scores={"a": 0.5, "b": 1.0}), episode("e3", scores=SCORES[0], rewards=rewards)]
    credit = build(scheme)
    before = credit.state()
    with pytest.raises(ScenarioError, match="episode 'e3', seat 'b': reward is"):
        credit.advantages(episodes)
    assert credit.state() == before


def test_an_episode_id_used_twice_is_refused(scheme):
    credit = build(scheme)
    before = credit.state()
    with pytest.raises(ScenarioError, match="'e' occurs 2 times"):
        credit.advantages([episode("e", scores={"a": 0.0}), episode("e", scores={"a": 1.0})])
    assert credit.state() == before


def test_an_unknown_option_names_the_nearest(scheme):
    with pytest.raises(ConfigError, match=f"{scheme}.*'normalise'.*normalize"):
        build(scheme, normalise="none")


def test_state_survives_json_and_goes_on_the_same(scheme):
    credit = build(scheme)
    credit.advantages(group("g", scores=SCORES, kinds=BOTH_KINDS))
    again = build(scheme)
    again.restore(json.loads(json.dumps(credit.state())))
    assert again.state() == credit.state()
    later = group("h", scores=SCORES[1:3], kinds=BOTH_KINDS)
    assert again.advantages(later) == credit.advantages(later)
    assert again.state() == credit.state()


def test_a_foreign_state_is_refused(scheme):
    with pytest.raises(RunFolderError, match=scheme):
        build(scheme).restore({"progress": {}})


def test_work_grows_no_faster_than_the_batch(scheme):
    rng = random.Random(0)
    tasks = [make_task(f"task{i}") for i in range(32)]

    def work(siblings: int) -> int:
        episodes = [
            episode(f"{t.task_id}/{i}", scores={"a": rng.random(), "b": rng.random()}, group=t.task_id, task=t)
            for t in tasks
            for i in range(siblings)
        ]
        credit = build(scheme)
        return lines(lambda: credit.advantages(episodes))

    few, many = work(16), work(64)
    assert many < 5 * few
