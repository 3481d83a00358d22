"""Group-relative credit, by numbers worked out by hand."""

import pytest

from coterie.credit.group_relative import GroupRelative
from coterie.credit.normalize import deviation, inverse_deviation, mean
from coterie.credit.relative import RelativeOptions
from tests.support.episodes import episode, group, make_turn


def first_advantages(episodes, seat="a", **options):
    result = GroupRelative(RelativeOptions(**options)).advantages(episodes)
    return [result.of(e.episode_id, seat, 0) for e in episodes]


def test_reward_minus_the_mean_of_siblings():
    episodes = group("g", scores=[{"a": 0.0}, {"a": 0.0}, {"a": 1.0}, {"a": 1.0}, {"a": 0.5}])
    assert first_advantages(episodes, normalize="none") == [-0.5, -0.5, 0.5, 0.5, 0.0]


def test_leaving_oneself_out():
    episodes = group("g", scores=[{"a": 0.0}, {"a": 0.5}, {"a": 1.0}])
    values = first_advantages(episodes, normalize="none", baseline="leave_one_out")
    assert values == pytest.approx([0.0 - 0.75, 0.5 - 0.5, 1.0 - 0.25])
    assert first_advantages(group("one", scores=[{"a": 1.0}]), baseline="leave_one_out") == [0.0]


def test_the_reward_counts_and_not_the_score():
    episodes = [
        episode("x", scores={"a": 0.0}, rewards={"a": 2.0}),
        episode("y", scores={"a": 1.0}, rewards={"a": 1.0}),
    ]
    assert first_advantages(episodes, normalize="none") == [0.5, -0.5]


def test_seats_and_groups_have_their_own_mean():
    episodes = group("easy", scores=[{"a": 1.0, "b": 0.1}, {"a": 0.8, "b": 0.3}])
    episodes += group("hard", scores=[{"a": 0.0, "b": 0.0}, {"a": 0.2, "b": 0.0}])
    assert first_advantages(episodes, "a", normalize="none") == pytest.approx([0.1, -0.1, -0.1, 0.1])
    assert first_advantages(episodes, "b", normalize="none") == pytest.approx([-0.1, 0.1, 0.0, 0.0])


def test_divided_by_the_deviation_of_the_group():
    episodes = group("g", scores=[{"a": 0.0}, {"a": 1.0}]) + group("h", scores=[{"a": 0.4}, {"a": 0.6}])
    assert first_advantages(episodes, normalize="group") == pytest.approx([-1, 1, -1, 1])


def test_divided_by_the_deviation_of_the_policy_keeps_groups_in_proportion():
    episodes = group("g", scores=[{"a": 0.0}, {"a": 1.0}]) + group("h", scores=[{"a": 0.4}, {"a": 0.6}])
    values = first_advantages(episodes, normalize="policy")
    assert values[1] / values[3] == pytest.approx(5.0)
    assert deviation(values) == pytest.approx(1.0)


def test_one_policys_scale_does_not_touch_anothers():
    small = group("g", scores=[{"a": 0.0, "b": 0.1}, {"a": 1.0, "b": 0.2}])
    large = group("g", scores=[{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}])
    assert first_advantages(small, "a") == first_advantages(large, "a")
    assert first_advantages(small, "b") == pytest.approx(first_advantages(large, "b"))


def test_one_policy_at_two_seats_has_one_deviation():
    models = {"a": "m", "b": "m"}
    episodes = group("g", scores=[{"a": 0.0, "b": 0.4}, {"a": 1.0, "b": 0.6}], models=models)
    values = first_advantages(episodes, "a") + first_advantages(episodes, "b")
    assert deviation(values) == pytest.approx(1.0)
    assert values[1] / values[3] == pytest.approx(5.0)


def test_the_deviation_is_over_turns_and_leaves_withheld_advice_out():
    kinds = {"a": ("advice", "answer")}
    episodes = group("g", scores=[{"a": 0.0}, {"a": 1.0}], kinds=kinds)
    episodes.append(episode("s", scores={"a": 0.5}, group="g", kinds=kinds, withheld={"a"}))
    result = GroupRelative(RelativeOptions()).advantages(episodes)
    credited = [*result.values["g/0"]["a"], *result.values["g/1"]["a"], result.of("s", "a", 1)]
    assert deviation(credited) == pytest.approx(1.0)
    assert result.of("s", "a", 0) == 0.0


@pytest.mark.parametrize("normalize", ["group", "policy"])
def test_a_deviation_that_is_only_noise_gives_zero(normalize):
    episodes = group("g", scores=[{"a": 0.5}, {"a": 0.5 + 1e-9}, {"a": 0.5 - 1e-9}])
    assert first_advantages(episodes, normalize=normalize) == [0.0, 0.0, 0.0]


def two_steps(first_prompt, second_prompt):
    return {"a": [make_turn("a", prompt_ids=first_prompt), make_turn("a", prompt_ids=second_prompt)]}


def test_by_state_compares_turns_at_the_same_prompt_and_falls_back_where_none_share_it():
    rewards = [0.0, 0.4, 1.0]
    second = [(2,), (2,), (3,)]
    episodes = [
        episode(f"e{i}", scores={"a": r}, turns=two_steps((1,), state))
        for i, (r, state) in enumerate(zip(rewards, second, strict=True))
    ]
    result = GroupRelative(RelativeOptions(by_state=True, normalize="none")).advantages(episodes)
    overall = sum(rewards) / 3
    assert [result.of(f"e{i}", "a", 0) for i in range(3)] == pytest.approx([r - overall for r in rewards])
    assert [result.of(f"e{i}", "a", 1) for i in range(3)] == pytest.approx([-0.2, 0.2, 1.0 - overall])


def test_by_state_a_prompt_seen_twice_in_one_episode_is_no_sibling():
    episodes = [
        episode("e0", scores={"a": 1.0}, turns=two_steps((2,), (2,))),
        episode("e1", scores={"a": 0.0}, turns=two_steps((3,), (3,))),
    ]
    result = GroupRelative(RelativeOptions(by_state=True, normalize="none")).advantages(episodes)
    assert result.values == {"e0": {"a": (0.5, 0.5)}, "e1": {"a": (-0.5, -0.5)}}


def test_by_state_does_not_mix_groups_or_seats():
    turns = {"a": [make_turn("a", prompt_ids=(1,))], "b": [make_turn("b", prompt_ids=(1,))]}
    episodes = group("g", scores=[{"a": 0.0, "b": 1.0}, {"a": 0.2, "b": 0.8}], turns=turns)
    episodes += group("h", scores=[{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}], turns=turns)
    values = first_advantages(episodes, "a", by_state=True, normalize="none")
    assert values == pytest.approx([-0.1, 0.1, 0.0, 0.0])


def test_mean_and_deviation_are_exact_where_naive_sums_are_not():
    values = [0.1] * 10
    assert sum(values) / 10 != 0.1
    assert mean(values) == 0.1
    assert deviation(values) == 0.0
    assert mean([1e16, 1.0, -1e16]) == mean([1.0, -1e16, 1e16]) == pytest.approx(1 / 3, abs=1.0)
    assert deviation([0.0, 2.0]) == 1.0
    assert inverse_deviation([0.0, 4.0]) == 0.5
    assert inverse_deviation([1.0, 1.0 + 1e-7]) == 0.0
