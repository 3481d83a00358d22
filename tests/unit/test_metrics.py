"""What an update's figures mean, each against a case worked out by hand."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from coterie.models import LoRAModel, ModelConfig
from coterie.monitor.metrics import METRICS, UpdateRecord, describe, measure
from coterie.runs.sinks import MetricsFile
from coterie.types import Episode, FailedEpisode, ModelId, ModelRole, TaskType, Tier
from tests.support.episodes import episode, group, make_task, make_turn


def models(*names: str, leader: str | None = None) -> list[LoRAModel]:
    roles = {name: ModelRole.LEADER if name == leader else ModelRole.NEUTRAL for name in names}
    return [LoRAModel(ModelConfig(model_id=name, role=role)) for name, role in roles.items()]


AB = models("model_a", "model_b")


def advised(accuracy: float, *, withheld: bool, group_id: str = "g", name: str = "e", seats: str = "ab") -> Episode:
    """Seat "a" advises; every other seat has this accuracy."""
    others = dict.fromkeys(seats[1:], accuracy)
    return episode(
        name,
        scores={"a": 1.0, **others},
        accuracy={"a": 1.0, **others},
        kinds={"a": ("advice", "answer")},
        group=group_id,
        withheld={"a"} if withheld else (),
    )


# -- means --------------------------------------------------------------------------------------------------------


def test_means_are_over_the_seats_a_model_held() -> None:
    episodes = [
        episode("1", scores={"a": 1.0, "b": 0.0}, rewards={"a": 0.6, "b": 0.1}, accuracy={"a": 1.0, "b": 0.5}),
        episode("2", scores={"a": 0.5, "b": 0.5}, rewards={"a": 0.2, "b": 0.2}, accuracy={"a": 1.0, "b": 1.0}),
    ]
    metrics, performances = measure(3, episodes, [], AB)
    assert metrics["play/model_a/reward"] == pytest.approx(0.4)
    assert metrics["play/model_a/score"] == pytest.approx(0.75)
    assert metrics["play/model_a/accuracy"] == 1.0
    assert metrics["play/model_a/efficiency"] == pytest.approx(0.75)
    assert metrics["play/model_b/accuracy"] == pytest.approx(0.75)
    assert metrics["play/model_b/efficiency"] == pytest.approx(0.5 / 1.5)
    assert metrics["play/model_a/win_rate"] == 0.5
    assert metrics["play/model_b/win_rate"] == 0.0  # a tie has no winner
    assert [p.model_id for p in performances] == ["model_a", "model_b"]
    first = performances[0]
    assert (first.update, first.episodes, first.accuracy, first.cooperation_score) == (3, 2, 1.0, None)
    assert first.reward == metrics["play/model_a/reward"]


def test_one_model_at_two_seats_counts_twice() -> None:
    held = {"a": "model_a", "b": "model_a"}
    [played] = [episode("1", scores={"a": 1.0, "b": 0.0}, models=held)]
    metrics, [performance] = measure(1, [played], [], AB)
    assert performance.episodes == 2
    assert metrics["play/model_a/win_rate"] == 0.5


def test_turn_figures_are_per_turn_and_per_token() -> None:
    long = make_turn("a", token_ids=(1, 2, 3), entropy=(0.9, 0.6, 0.3))
    short = make_turn("a", token_ids=(1,), entropy=(0.2,), valid=False)
    metrics, [performance] = measure(1, [episode("1", scores={"a": 1.0}, turns={"a": [long, short]})], [], AB)
    assert metrics["play/model_a/entropy"] == pytest.approx(2.0 / 4)
    assert metrics["play/model_a/response_tokens"] == 2.0
    assert metrics["play/model_a/valid_rate"] == 0.5
    assert performance.entropy == metrics["play/model_a/entropy"]


def test_what_was_not_measured_is_absent_not_zero() -> None:
    metrics, [performance] = measure(1, [episode("1", scores={"a": 0.4}, rewards={"a": 0.1})], [], AB)
    for stat in ("accuracy", "efficiency", "win_rate", "cooperation_score"):
        assert f"play/model_a/{stat}" not in metrics
    assert not [name for name in metrics if name.startswith(("strategy/", "accuracy/", "play/model_b"))]
    assert (performance.accuracy, performance.efficiency) == (0.4, 1.0)


def test_scores_that_are_not_accuracy_times_efficiency_have_no_efficiency() -> None:
    metrics, _ = measure(1, [episode("1", scores={"a": 1.0}, accuracy={"a": 0.5})], [], AB)
    assert "play/model_a/efficiency" not in metrics


def test_seats_of_others_are_not_measured() -> None:
    played = episode("1", scores={"a": 0.0, "b": 1.0, "c": 0.0}, models={"b": None, "c": "gone"})
    metrics, [performance] = measure(1, [played], [], AB)
    assert performance.model_id == "model_a"
    assert not [name for name in metrics if "model_b" in name or "gone" in name]
    assert metrics["play/model_a/win_rate"] == 0.0


def test_accuracy_per_task_type() -> None:
    reasoning = make_task("r", task_type=TaskType.REASONING)
    episodes = [
        episode("1", scores={"a": 1.0}, accuracy={"a": 1.0}),
        episode("2", scores={"a": 0.0}, accuracy={"a": 0.5}, task=reasoning),
        episode("3", scores={"a": 0.0}, accuracy={"a": 0.0}, task=reasoning),
    ]
    metrics, [performance] = measure(1, episodes, [], AB)
    assert metrics["accuracy/model_a/classification"] == 1.0
    assert metrics["accuracy/model_a/reasoning"] == 0.25
    assert performance.by_task_type == {TaskType.CLASSIFICATION: 1.0, TaskType.REASONING: 0.25}


def test_episode_figures() -> None:
    episodes = [
        episode("1", scores={"a": 1.0}, metrics={"cooperation": 1.0, "rare": 0.25}),
        episode("2", scores={"a": 1.0}, metrics={"cooperation": 0.0}),
        episode("3", scores={"a": 1.0}),
    ]
    metrics, _ = measure(1, episodes, [FailedEpisode("x", make_task(), "boom")], AB)
    assert metrics["outcome/cooperation"] == 0.5
    assert metrics["outcome/rare"] == 0.25
    assert metrics["episodes/played"] == 3.0
    assert metrics["episodes/failed_share"] == 0.25


def test_an_update_without_episodes_has_figures_too() -> None:
    assert measure(1, [], [], AB) == ({"episodes/played": 0.0, "episodes/failed_share": 0.0}, ())


# -- the worth of advice ------------------------------------------------------------------------------------------


def cooperation_score(episodes: Sequence[Episode], model_id: ModelId) -> float | None:
    metrics, _ = measure(1, episodes, [], [LoRAModel(ModelConfig(model_id=model_id))])
    return metrics.get(f"play/{model_id}/cooperation_score")


def test_cooperation_score_is_the_difference_advice_made() -> None:
    episodes = [
        advised(1.0, withheld=False),
        advised(0.6, withheld=False),
        advised(0.3, withheld=True),
    ]
    assert cooperation_score(episodes, "model_a") == pytest.approx(0.5)
    assert cooperation_score(episodes, "model_b") is None  # it never advised
    metrics, performances = measure(1, episodes, [], AB)
    assert metrics["play/model_a/cooperation_score"] == pytest.approx(0.5)
    assert performances[0].cooperation_score == pytest.approx(0.5)
    assert performances[1].cooperation_score is None


def test_misleading_advice_is_negative() -> None:
    episodes = [advised(0.0, withheld=False), advised(1.0, withheld=True)]
    assert cooperation_score(episodes, "model_a") == -1.0


def test_one_side_alone_says_nothing() -> None:
    assert cooperation_score([advised(1.0, withheld=False)] * 3, "model_a") is None
    assert cooperation_score([advised(1.0, withheld=True)] * 3, "model_a") is None
    # Both sides exist, but never for the same task.
    apart = [advised(1.0, withheld=False, group_id="g"), advised(0.0, withheld=True, group_id="h")]
    assert cooperation_score(apart, "model_a") is None


def test_groups_are_compared_within_and_weighted_by_the_smaller_side() -> None:
    easy = [advised(1.0, withheld=False, group_id="easy")] * 6 + [advised(0.9, withheld=True, group_id="easy")] * 2
    hard = [advised(0.4, withheld=False, group_id="hard")] * 1 + [advised(0.0, withheld=True, group_id="hard")] * 5
    # Pooled without groups this would be (6.4 / 7) - (1.8 / 7) = 0.66; within groups it is 0.1 (twice) and 0.4 (once).
    assert cooperation_score(easy + hard, "model_a") == pytest.approx((2 * 0.1 + 1 * 0.4) / 3)


def test_only_the_others_count() -> None:
    """The speaker's own accuracy moves with the coin here, the others' does not."""
    episodes = [
        episode(
            str(own), scores={"a": own, "b": 0.5}, accuracy={"a": own, "b": 0.5}, kinds={"a": ("advice",)}, withheld=w
        )
        for own, w in ((1.0, ()), (0.0, {"a"}))
    ]
    assert cooperation_score(episodes, "model_a") == 0.0


def test_a_seat_without_a_right_answer_may_advise() -> None:
    episodes = [
        episode(str(right), scores={"a": 1.0, "b": right}, accuracy={"b": right}, kinds={"a": ("advice",)}, withheld=w)
        for right, w in ((1.0, ()), (0.25, {"a"}))
    ]
    assert cooperation_score(episodes, "model_a") == 0.75


def test_silent_episodes_are_left_out() -> None:
    silent = group("g", scores=[{"a": 0.0, "b": 0.0}] * 9, accuracy={"a": 0.0, "b": 0.0})
    heard = [advised(1.0, withheld=False), advised(0.5, withheld=True)]
    assert cooperation_score([*silent, *heard], "model_a") == 0.5


def test_withheld_advice_that_was_never_spoken_still_counts_as_withheld() -> None:
    mute = episode("m", scores={"a": 1.0, "b": 0.25}, accuracy={"a": 1.0, "b": 0.25}, withheld={"a"}, group="g")
    assert cooperation_score([advised(1.0, withheld=False), mute], "model_a") == 0.75


def test_it_stays_in_range_and_ignores_useless_advice() -> None:
    rng = random.Random(3)
    episodes = [
        advised(float(rng.random() < 0.5), withheld=rng.random() < 0.2, group_id=str(at % 64), name=str(at))
        for at in range(4096)
    ]
    score = cooperation_score(episodes, "model_a")
    assert score is not None
    assert abs(score) < 0.07  # three standard errors of a difference of 800 and 3,300 coins, stratified


def test_strategy_effectiveness_by_leadership() -> None:
    led = [advised(1.0, withheld=False, group_id="g"), advised(0.2, withheld=True, group_id="g")]
    metrics, _ = measure(1, led, [], models("model_a", "model_b", leader="model_a"))
    assert metrics["strategy/communication"] == pytest.approx(0.8)
    assert metrics["strategy/central"] == pytest.approx(0.8)
    assert "strategy/delegated" not in metrics
    metrics, _ = measure(1, led, [], AB)
    assert metrics["strategy/delegated"] == pytest.approx(0.8)
    assert "strategy/central" not in metrics


def test_seat_permutation_permutes_the_figures() -> None:
    rng = random.Random(5)
    plays = [(rng.random(), rng.random(), rng.random() < 0.5) for _ in range(40)]

    def told(first: str, second: str) -> list[Episode]:
        return [
            episode(
                str(at),
                scores={first: x, second: y},
                accuracy={first: x, second: y},
                kinds={first: ("advice", "answer")},
                withheld={first} if coin else (),
            )
            for at, (x, y, coin) in enumerate(plays)
        ]

    straight, _ = measure(1, told("a", "b"), [], AB)
    swapped, _ = measure(1, told("b", "a"), [], AB)
    names = str.maketrans({"a": "b", "b": "a"})
    for name, value in straight.items():
        head, _, tail = name.partition("model_")
        mirrored = head + "model_" + tail[0].translate(names) + tail[1:] if tail else name
        assert swapped[mirrored] == pytest.approx(value), name


# -- documentation and speed --------------------------------------------------------------------------------------


def rich_update() -> list[Episode]:
    """Episodes that bring out every figure."""
    led = [advised(1.0, withheld=False, group_id="g"), advised(0.2, withheld=True, group_id="g")]
    free = [
        episode(
            str(coin),
            scores={"b": 0.5, "c": 0.5},
            accuracy={"b": 0.5, "c": 0.5},
            metrics={"agreement": 1.0},
            kinds={"b": ("advice", "answer")},
            withheld={"b"} if coin else (),
        )
        for coin in (False, True)
    ]
    made_up = episode("made up", scores={"c": 0.5}, turns={"c": [make_turn("c", tier=Tier.SIMULATED)]})
    return [*led, *free, made_up]


def test_every_metric_is_documented_and_every_document_has_a_metric() -> None:
    who = models("model_a", "model_b", "model_c", leader="model_a")
    metrics, _ = measure(1, rich_update(), [FailedEpisode("x", make_task(), "boom")], who)
    unknown = [name for name in metrics if describe(name) is None]
    assert unknown == []
    measured = {line for pattern, line in METRICS.items() if not pattern.startswith(("learn/", "exact/"))}
    assert {describe(name) for name in metrics} == measured
    assert len(set(METRICS.values())) == len(METRICS)
    assert all("\n" not in line and len(line) > 20 for line in METRICS.values())


def test_describe_knows_patterns_and_nothing_else() -> None:
    assert describe("play/red.1/reward") == METRICS["play/<model>/reward"]
    assert describe("play/red/x/reward") is None
    assert describe("play//reward") is None
    assert describe("playx/red/reward") is None


def test_metrics_are_finite_numbers_a_file_can_hold(tmp_path: Path) -> None:
    metrics, performances = measure(1, rich_update(), [], AB)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(UpdateRecord(1, 9, metrics, performances, {"total": 0.5}))
    assert MetricsFile.read(file.path)[0]["metrics"] == metrics


def test_a_large_update_is_measured_in_milliseconds() -> None:
    episodes = [
        advised(float(at % 3 == 0), withheld=at % 5 == 0, group_id=str(at % 256), name=str(at)) for at in range(4096)
    ]

    def fastest(work: object) -> float:
        times = []
        for _ in range(5):
            began = time.thread_time()
            work()  # type: ignore[operator]
            times.append(time.thread_time() - began)
        return min(times)

    assert fastest(lambda: measure(1, episodes, [], AB)) < 0.15
