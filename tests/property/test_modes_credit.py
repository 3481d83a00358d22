"""Laws of modes and credit schemes, on data nobody chose."""

import json
import math
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coterie.config import CreditConfig
from coterie.credit.base import SCHEMES, build_credit
from coterie.modes.base import MODES, build_mode
from coterie.modes.mixed import MAX_SHIFT, Mixed
from coterie.types import TaskType, TrainingMode
from tests.support.episodes import episode, make_task

unit = st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0])
pools = st.floats(1e-9, 1e12) | st.sampled_from([1.0, 3.0, 10.0])
team_ids = st.sampled_from([None, "red", "blue", "s1"])
all_modes = pytest.mark.parametrize("name", sorted(MODES))
all_schemes = pytest.mark.parametrize("name", sorted(SCHEMES))
relative = pytest.mark.parametrize("name", ["group_relative", "team_structured"])
thorough = settings(max_examples=25)


@st.composite
def tables(draw):
    """A task, scores and teams of one to six seats."""
    seats = [f"s{i}" for i in range(draw(st.integers(1, 6)))]
    scores = {seat: draw(unit) for seat in seats}
    teams = {seat: draw(team_ids) for seat in seats}
    task = make_task(reward_pool=draw(pools), cooperation_level=draw(unit), task_type=draw(st.sampled_from(TaskType)))
    return task, scores, teams


histories = st.lists(st.lists(st.tuples(st.sampled_from(TaskType), unit), max_size=4), max_size=30)
"""For every update, (task type, score) of its episodes."""


def lived(name, history):
    """A mode that has observed `history`."""
    mode = build_mode(TrainingMode(name))
    for update in history:
        mode.observe([episode(scores={"a": score}, task=make_task(task_type=task_type)) for task_type, score in update])
    return mode


@all_modes
@given(table=tables(), history=histories)
@thorough
def test_rewards_are_finite_and_never_more_than_the_pool(name, table, history):
    task, scores, teams = table
    rewards = lived(name, history).rewards(task, scores, teams)
    assert rewards.keys() == scores.keys()
    assert all(math.isfinite(reward) and reward >= 0.0 for reward in rewards.values())
    assert math.fsum(rewards.values()) <= task.reward_pool


@all_modes
@given(table=tables(), history=histories, data=st.data())
@thorough
def test_permuting_the_seats_permutes_the_rewards(name, table, history, data):
    task, scores, teams = table
    mode = lived(name, history)
    seats = list(scores)
    image = dict(zip(seats, data.draw(st.permutations(seats)), strict=True))
    order = data.draw(st.permutations(seats))
    permuted = mode.rewards(task, {image[s]: scores[s] for s in order}, {image[s]: teams[s] for s in seats})
    assert permuted == {image[s]: reward for s, reward in mode.rewards(task, scores, teams).items()}


@all_modes
@given(table=tables(), raised=unit, data=st.data())
@thorough
def test_doing_better_never_pays_less(name, table, raised, data):
    task, scores, teams = table
    seat = data.draw(st.sampled_from(sorted(scores)))
    better = {**scores, seat: max(scores[seat], raised)}
    mode = build_mode(TrainingMode(name))
    before, after = (mode.rewards(task, s, teams)[seat] for s in (scores, better))
    assert after >= before - 1e-9 * task.reward_pool


@all_modes
@given(history=histories)
@thorough
def test_a_modes_state_goes_through_json_to_the_bit(name, history):
    mode = lived(name, history)
    again = build_mode(TrainingMode(name))
    again.restore(json.loads(json.dumps(mode.state())))
    more = [episode(scores={"a": 1 / 3})]
    mode.observe(more)
    again.observe(more)
    assert again.state() == mode.state()


@given(history=histories, level=unit, task_type=st.sampled_from(TaskType))
@settings(max_examples=100)
def test_the_blend_stays_near_the_level_and_pure_where_it_is_pure(history, level, task_type):
    mode = lived("mixed", history)
    assert isinstance(mode, Mixed)
    blend = mode.blend(make_task(cooperation_level=level, task_type=task_type))
    assert 0.0 <= blend <= 1.0
    assert abs(blend - level) <= MAX_SHIFT + 1e-12
    if level in (0.0, 1.0):
        assert blend == level


# -- credit ------------------------------------------------------------------------------------------------------

kinds = st.lists(st.sampled_from(["advice", "answer", "move"]), max_size=4).map(tuple)


@st.composite
def batches(draw, constant=False):
    """Episodes of up to three groups at two seats, with advice, withholding, and scripts at the table."""
    episodes = []
    everywhere = draw(unit)
    for g in range(draw(st.integers(1, 3))):
        task = make_task(f"t{g}", task_type=draw(st.sampled_from(TaskType)), reward_pool=draw(st.floats(0.5, 20.0)))
        for i in range(draw(st.integers(1, 5))):
            scores = {seat: everywhere if constant else draw(unit) for seat in "ab"}
            episodes.append(
                episode(
                    f"{g}/{i}",
                    scores=scores,
                    rewards=None if constant else {seat: draw(unit) for seat in "ab"},
                    task=replace(task, reward_pool=1.0) if constant else task,
                    group=f"g{g}",
                    teams={"a": "red", "b": draw(st.sampled_from(["red", "blue", None]))} if not constant else None,
                    models={"b": draw(st.sampled_from(["model_b", "model_a", None]))},
                    kinds={seat: draw(kinds) for seat in "ab"},
                    withheld=draw(st.sets(st.sampled_from("ab"))),
                )
            )
    return episodes


def build(name, **options):
    return build_credit(CreditConfig(scheme=name, options=options), TrainingMode.COOPERATIVE)


def numbers(advantages):
    return [x for seats in advantages.values.values() for row in seats.values() for x in row]


@all_schemes
@given(updates=st.lists(batches(), min_size=1, max_size=3), normalize=st.sampled_from(["none", "policy"]))
@thorough
def test_every_turn_has_one_finite_advantage(name, updates, normalize):
    credit = build(name, normalize=normalize)
    for episodes in updates:
        values = credit.advantages(episodes).values
        assert {e.episode_id: {s: len(t.turns) for s, t in e.trajectories.items()} for e in episodes} == {
            i: {s: len(row) for s, row in seats.items()} for i, seats in values.items()
        }
        assert all(math.isfinite(x) for seats in values.values() for row in seats.values() for x in row)


@all_schemes
@given(episodes=batches(constant=True), normalize=st.sampled_from(["none", "policy"]))
@thorough
def test_constant_rewards_give_exactly_nothing(name, episodes, normalize):
    credit = build(name, normalize=normalize)
    for _ in range(3):
        assert set(numbers(credit.advantages(episodes))) <= {0.0}


@relative
@given(
    episodes=batches(),
    normalize=st.sampled_from(["none", "group", "policy"]),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    by_state=st.booleans(),
    data=st.data(),
)
@thorough
def test_permuting_the_episodes_permutes_the_advantages(name, episodes, normalize, baseline, by_state, data):
    credit = build(name, normalize=normalize, baseline=baseline, by_state=by_state)
    shuffled = data.draw(st.permutations(episodes))
    assert credit.advantages(shuffled) == credit.advantages(episodes)


@given(updates=st.lists(batches(), min_size=1, max_size=3), data=st.data())
@thorough
def test_permuting_the_episodes_does_not_move_the_moving_average(updates, data):
    one, other = build("moving_average"), build("moving_average")
    for episodes in updates:
        assert one.advantages(episodes) == other.advantages(data.draw(st.permutations(episodes)))
    assert one.state() == other.state()


@relative
@given(episodes=batches(), baseline=st.sampled_from(["mean", "leave_one_out"]))
@thorough
def test_siblings_advantages_cancel(name, episodes, baseline):
    values = build(name, normalize="none", baseline=baseline).advantages(episodes).values
    per_pool = defaultdict(list)
    for e in episodes:
        for seat, trajectory in e.trajectories.items():
            first = {turn.kind == "advice": n for n, turn in reversed(list(enumerate(trajectory.turns)))}
            for advice, n in first.items():
                per_pool[e.group, seat, advice].append(values[e.episode_id][seat][n])
    for pool in per_pool.values():
        assert math.fsum(pool) == pytest.approx(0.0, abs=1e-9)


@given(updates=st.lists(batches(), min_size=1, max_size=4), decay=st.floats(0.0, 0.99))
@thorough
def test_the_moving_average_subtracts_the_baseline_of_before_the_batch(updates, decay):
    credit = build("moving_average", decay=decay, initial=0.25)
    for episodes in updates:
        before = {tuple(key): value for *key, value in credit.state()["baselines"]}
        values = credit.advantages(episodes).values
        after = {tuple(key): value for *key, value in credit.state()["baselines"]}
        rewards = defaultdict(list)
        for e in episodes:
            for seat, trajectory in e.trajectories.items():
                for n, turn in enumerate(trajectory.turns):
                    if turn.model_id is None or (turn.kind == "advice" and seat in e.withheld):
                        assert values[e.episode_id][seat][n] == 0.0
                        continue
                    key = (e.task.task_type.value, seat, "advice" if turn.kind == "advice" else "other")
                    assert values[e.episode_id][seat][n] == e.rewards[seat] - before.get(key, 0.25)
                    rewards[key].append((e.episode_id, e.rewards[seat]))
        for key, seen in rewards.items():
            batch = [reward for _, reward in dict.fromkeys(seen)]
            expected = decay * before.get(key, 0.25) + (1 - decay) * math.fsum(batch) / len(batch)
            assert after[key] == pytest.approx(expected, abs=1e-9)
        assert all(after[key] == before[key] for key in before.keys() - rewards.keys())


@all_schemes
@given(updates=st.lists(batches(), max_size=3), later=batches())
@thorough
def test_a_schemes_state_goes_through_json_to_the_bit(name, updates, later):
    credit, again = build(name), build(name)
    for episodes in updates:
        credit.advantages(episodes)
    again.restore(json.loads(json.dumps(credit.state())))
    assert again.advantages(later) == credit.advantages(later)
    assert again.state() == credit.state()


@relative
@given(episodes=batches(), factor=st.floats(0.01, 100.0))
@thorough
def test_division_takes_the_scale_of_the_numbers_out(name, episodes, factor):
    """A pool and rewards of another size give the same advantages, where anything differs at all."""
    scaled = [
        replace(
            e,
            task=replace(e.task, reward_pool=e.task.reward_pool * (factor if name == "team_structured" else 1.0)),
            rewards={seat: reward * factor for seat, reward in e.rewards.items()},
        )
        for e in episodes
    ]
    plain = numbers(build(name, normalize="none").advantages(episodes))
    smallest = min((abs(x) for x in plain if x), default=1.0) * min(1.0, factor)
    assume(smallest > 1e-4)  # nearer to the guard one side may count as noise
    first, second = (numbers(build(name).advantages(batch)) for batch in (episodes, scaled))
    assert second == pytest.approx(first, rel=1e-6, abs=1e-6)
