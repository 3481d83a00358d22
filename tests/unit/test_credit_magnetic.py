"""Magnetic credit: what is compared with what, by numbers worked out by hand, and what it asks of the learner."""

from __future__ import annotations

import pytest

from coterie.config import CreditConfig
from coterie.credit.base import Magnet, Magnetised, build_credit
from coterie.credit.magnetic import Magnetic, MagneticOptions
from coterie.errors import ConfigError
from coterie.types import Episode, TrainingMode
from tests.support.episodes import episode, make_turn

KING, JACK = (1, 13), (1, 11)


def dealt(name: str, card: tuple[int, ...], score: float, reward: float | None = None) -> Episode:
    rewards = {"a": score if reward is None else reward}
    return episode(name, scores={"a": score}, rewards=rewards, turns={"a": [make_turn("a", prompt_ids=card)]})


def first(episodes: list[Episode], **options: object) -> list[float]:
    found = Magnetic(MagneticOptions.model_validate(options)).advantages(episodes)
    return [found.of(e.episode_id, "a", 0) for e in episodes]


def test_a_good_card_is_nobodys_merit() -> None:
    episodes = [dealt("k1", KING, 1.0), dealt("k2", KING, 0.5), dealt("j1", JACK, 0.0), dealt("j2", JACK, 0.5)]
    assert first(episodes) == pytest.approx([0.25, -0.25, -0.25, 0.25])
    assert first(episodes, by_state=False) == pytest.approx([0.5, 0.0, -0.5, 0.0])


def test_what_nobody_else_saw_is_compared_at_the_seat() -> None:
    episodes = [dealt("k1", KING, 1.0), dealt("k2", KING, 0.5), dealt("j1", JACK, 0.0)]
    assert first(episodes) == pytest.approx([0.25, -0.25, -0.5])


def test_the_game_the_mode_makes_or_the_scenarios_own() -> None:
    episodes = [dealt("small", KING, 0.75, reward=1.0), dealt("large", KING, 1.0, reward=1.0)]
    assert first(episodes) == [0.0, 0.0]
    assert first(episodes, signal="score") == pytest.approx([-0.125, 0.125])


def test_later_turns_have_states_of_their_own() -> None:
    def two(name: str, second: tuple[int, ...], score: float) -> Episode:
        turns = [make_turn("a", prompt_ids=KING), make_turn("a", prompt_ids=second)]
        return episode(name, scores={"a": score}, turns={"a": turns})

    episodes = [
        two("x", (1, 13, 5), 1.0),
        two("y", (1, 13, 5), 0.0),
        two("z", (1, 13, 6), 0.8),
        two("w", (1, 13, 6), 0.6),
    ]
    found = Magnetic(MagneticOptions()).advantages(episodes)
    assert [found.of(e.episode_id, "a", 0) for e in episodes] == pytest.approx([0.4, -0.6, 0.2, 0.0])
    assert [found.of(e.episode_id, "a", 1) for e in episodes] == pytest.approx([0.5, -0.5, 0.1, -0.1])


def test_the_learner_is_told_of_the_magnet() -> None:
    options = {"magnet": 0.2, "every": 7, "rate": 0.5, "proximal": 0.3, "final_magnet": 0.1}
    credit = build_credit(CreditConfig(scheme="magnetic", options=options), TrainingMode.COMPETITIVE)
    assert isinstance(credit, Magnetised)
    assert credit.magnet == Magnet(strength=0.2, proximal=0.3, every=7, rate=0.5, final=0.1)
    other = build_credit(CreditConfig(scheme="group_relative"), TrainingMode.COMPETITIVE)
    assert not isinstance(other, Magnetised)


def test_a_magnets_weight_falls_geometrically_to_its_last() -> None:
    falling = Magnet(strength=0.4, proximal=0.0, every=0, rate=1.0, final=0.1)
    assert [falling.strength_at(done) for done in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.4, 0.2, 0.1, 0.1])
    assert Magnet(strength=0.4, proximal=0.0, every=0, rate=1.0).strength_at(0.7) == 0.4
    assert Magnet(strength=0.0, proximal=0.0, every=0, rate=1.0, final=0.1).strength_at(0.7) == 0.0


@pytest.mark.parametrize(
    "bad", [{"magnet": -1}, {"rate": 0}, {"rate": 2}, {"every": -1}, {"final_magnet": 0}, {"proximal": "inf"}]
)
def test_an_impossible_magnet_is_refused(bad: dict[str, object]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=name):
        build_credit(CreditConfig(scheme="magnetic", options=bad), TrainingMode.COMPETITIVE)
