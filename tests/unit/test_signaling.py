"""The signalling game: what is shown, who is paid, and exact success against independent computation."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice, product
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.signaling import SYMBOLS, TARGETS, Signaling, SignalingOptions, mutual_information_bits
from coterie.types import Observation, SeatId, Split, TaskType
from tests.support.tables import exact, first_task, make_task, play, saying


def game(**options: Any) -> Signaling:
    return Signaling(SignalingOptions.model_validate(options))


def word_in(seen: Observation) -> str:
    return seen.user.split()[-1]


def sure(index: int, choices: Sequence[str]) -> list[float]:
    return [float(i == index) for i in range(len(choices))]


def test_success_pays_sender_and_receiver() -> None:
    task = make_task(content={"target": 1}, max_steps=1, required_models=2)
    outcome, _ = play(game(), task, answer=saying({"sender": "pink", "receiver": "clock"}))
    assert outcome.scores == {"sender": 1.0, "receiver": 1.0}
    assert outcome.metrics == {"success": 1.0}
    outcome, _ = play(game(), task, answer=saying({"sender": "pink", "receiver": "chair"}))
    assert outcome.scores == {"sender": 0.0, "receiver": 0.0}


def test_sender_earns_the_mean_over_receivers() -> None:
    task = make_task(content={"target": 0}, max_steps=1, required_models=4)
    said = {"sender": "red", "receiver_1": "chair", "receiver_2": "clock", "receiver_3": "chair"}
    outcome, _ = play(game(receivers=3), task, answer=saying(said))
    assert outcome.scores == {"sender": 2 / 3, "receiver_1": 1.0, "receiver_2": 0.0, "receiver_3": 1.0}


def test_receivers_see_the_symbol_alone() -> None:
    for target in range(4):
        task = make_task(content={"target": target}, max_steps=1, required_models=3)
        said = {"sender": "blue", "receiver_1": "chair", "receiver_2": "chair"}
        _, table = play(game(receivers=2), task, answer=saying(said))
        assert table["sender"].shown[0].user == f"Object: {TARGETS['en'][target]}"
        assert [table[f"receiver_{i}"].shown[0].user for i in (1, 2)] == ["Signal: blue", "Signal: blue"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_prompts_are_short_have_a_system_text_and_repeat(language: str) -> None:
    scenario = game()
    seen = set()
    for seed, task in enumerate(islice(scenario.tasks(Split.TRAIN, 0), 60)):
        _, table = play(scenario, task, seed=seed, language=language)
        seen |= {(seat, table[seat].shown[0]) for seat in table.seats}
    assert len(seen) == 8, "one prompt for each target and each symbol"
    assert all(o.system and o.prefix and len(o.system + o.user + o.prefix) < 45 for _, o in seen)
    assert all(o.user.isascii() == (language == "en") for _, o in seen)


def test_built_in_words_are_distinct_and_of_two_kinds() -> None:
    for language in ("en", "zh"):
        words = [*SYMBOLS[language], *TARGETS[language]]
        assert len(words) == len(set(words)) == 32


def test_targets_come_evenly_in_a_seeded_order() -> None:
    scenario = game(symbols=5)
    drawn = [task.content["target"] for task in islice(scenario.tasks(Split.TRAIN, 3), 50)]
    assert Counter(drawn) == dict.fromkeys(range(5), 10)
    assert all(sorted(drawn[i : i + 5]) == list(range(5)) for i in range(0, 50, 5))
    assert drawn != [task.content["target"] for task in islice(scenario.tasks(Split.TRAIN, 4), 50)]
    assert sorted(task.content["target"] for task in scenario.tasks(Split.HELDOUT, 0)) == list(range(5))


def test_tasks_carry_the_options() -> None:
    task = first_task(game(receivers=2, cooperation_level=0.25, reward_pool=3.0))
    assert (task.task_type, task.required_models, task.max_steps) == (TaskType.COLLABORATION, 3, 1)
    assert (task.cooperation_level, task.reward_pool, task.difficulty) == (0.25, 3.0, 0.5)


def test_receivers_are_marked_as_alike_and_the_sender_is_not() -> None:
    seats = game(receivers=3).seats(make_task())
    assert [(seat.seat_id, seat.symmetric_with) for seat in seats] == [
        ("sender", None), ("receiver_1", None), ("receiver_2", "receiver_1"), ("receiver_3", "receiver_1"),
    ]  # fmt: skip


def test_a_task_without_content_has_one_target_that_its_id_decides() -> None:
    targets = set()
    for number in range(20):
        task = make_task(task_id=f"mine-{number}", required_models=2)
        shown = {play(game(), task, seed=seed)[1]["sender"].shown[0].user for seed in range(3)}
        assert len(shown) == 1
        targets |= shown
    assert len(targets) == 4


@pytest.mark.parametrize("target", [4, -1, "chair", None])
def test_a_target_that_does_not_exist_is_an_error(target: object) -> None:
    with pytest.raises(ScenarioError, match=r"content\['target'\].*0\.\.3"):
        play(game(), make_task(content={"target": target}, required_models=2))


def test_exact_of_a_perfect_code() -> None:
    def code(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        words = TARGETS["en"] if seat == "sender" else SYMBOLS["en"]
        place = words.index(word_in(seen))
        return sure((place + 1) % 4 if seat == "sender" else (place - 1) % 4, choices)

    assert exact(game(), probabilities=code) == {"success": 1.0, "all_correct": 1.0, "mutual_information_bits": 2.0}


def test_exact_of_a_sender_nobody_understands() -> None:
    def code(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        return sure(TARGETS["en"].index(word_in(seen)), choices) if seat == "sender" else [1 / len(choices)] * 4

    figures = exact(game(receivers=2), probabilities=code)
    assert figures["success"] == pytest.approx(0.25)
    assert figures["all_correct"] == pytest.approx(1 / 16)
    assert figures["mutual_information_bits"] == pytest.approx(2.0)


def test_exact_equals_the_sum_over_all_plays() -> None:
    rng = random.Random(5)
    memo: dict[tuple[SeatId, str], list[float]] = {}

    def policy(seat: SeatId, seen: Observation, choices: Sequence[str]) -> list[float]:
        if (seat, seen.user) not in memo:
            weights = [rng.random() for _ in choices]
            memo[seat, seen.user] = [w / sum(weights) for w in weights]
        return memo[seat, seen.user]

    scenario = game(symbols=2, states=3, receivers=2)
    figures = exact(scenario, probabilities=policy)
    symbols, targets = SYMBOLS["en"][:2], TARGETS["en"][:3]
    success = together = 0.0
    for target, symbol, one, two in product(range(3), range(2), range(3), range(3)):
        p = (
            memo["sender", f"Object: {targets[target]}"][symbol]
            * memo["receiver_1", f"Signal: {symbols[symbol]}"][one]
            * memo["receiver_2", f"Signal: {symbols[symbol]}"][two]
        ) / 3
        success += p * ((one == target) + (two == target)) / 2
        together += p * (one == two == target)
    assert figures["success"] == pytest.approx(success, abs=1e-12)
    assert figures["all_correct"] == pytest.approx(together, abs=1e-12)

    played = [
        play(scenario, task, seed=seed, probabilities=policy)[0].metrics["success"]
        for seed, task in enumerate(islice(scenario.tasks(Split.TRAIN, 0), 3000))
    ]
    assert sum(played) / len(played) == pytest.approx(success, abs=4 * 0.5 / math.sqrt(3000))


def test_mutual_information() -> None:
    assert mutual_information_bits([[0.5, 0.5], [0.5, 0.5]]) == 0.0
    assert mutual_information_bits([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1.0)
    noise = 0.11  # of a binary symmetric channel, whose capacity is 1 - H(noise)
    capacity = 1 + noise * math.log2(noise) + (1 - noise) * math.log2(1 - noise)
    assert mutual_information_bits([[1 - noise, noise], [noise, 1 - noise]]) == pytest.approx(capacity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symbols": 17}, "symbols: must be 2 to 16"),
        ({"symbols": 1}, "symbols: must be 2 to 16"),
        ({"symbols": ["a"]}, "at least two words"),
        ({"symbols": ["a", "a"]}, "'a' stands twice"),
        ({"symbols": ["a", " b"]}, "begin or end with a space"),
        ({"symbols": ["a", "chair"]}, "'chair' is both a symbol and a state"),
        ({"symbols": ["a", "钟"]}, "'钟' is both a symbol and a state"),
        ({"symbols": [f"w{i}" for i in range(17)]}, "need a list of states"),
        ({"receivers": 0}, "receivers"),
        ({"reciever": 2}, "did you mean 'receivers'"),
        ({"cooperation_level": 1.5}, "cooperation_level"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("signaling", options)
