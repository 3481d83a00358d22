"""Kuhn and Leduc poker: rules against hand-computed cases, prompts, and exact figures of known policies."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.poker import Kuhn, Leduc, Poker, PokerOptions, kuhn_equilibrium
from coterie.scenarios.poker_rules import KUHN, LEDUC, Hand, PokerRules, View
from coterie.scenarios.sequential import CHANCE, TERMINAL, game_tree, nash_conv, uniform
from coterie.types import Observation, SeatId, Split
from tests.support.tables import exact, make_task, play

J, Q, K = 0, 1, 2
BOTH = [Kuhn, Leduc]


def kuhn() -> Kuhn:
    return Kuhn(PokerOptions())


def leduc() -> Leduc:
    return Leduc(PokerOptions())


def hand(scenario: Poker, deal: Sequence[int], *moves: str, **options: Any) -> Any:
    """Play these words in turn with this deal."""
    said = iter(moves)
    task = make_task(content={"deal": list(deal)}, max_steps=5, required_models=2)
    outcome, table = play(scenario, task, answer=lambda seat, seen, choices, rng: next(said), **options)
    assert not list(said), "the game ended early"
    return outcome, table


@pytest.mark.parametrize(
    ("deal", "moves", "antes"),
    [
        ((K, Q), ["pass", "pass"], 1),
        ((J, Q), ["pass", "pass"], -1),
        ((J, K), ["bet", "pass"], 1),
        ((J, K), ["bet", "bet"], -2),
        ((K, J), ["bet", "bet"], 2),
        ((K, J), ["pass", "bet", "pass"], -1),
        ((K, J), ["pass", "bet", "bet"], 2),
    ],
)
def test_kuhn_pays_by_the_rules(deal: tuple[int, int], moves: list[str], antes: float) -> None:
    outcome, _ = hand(kuhn(), deal, *moves)
    assert outcome.metrics["first_antes"] == antes
    assert outcome.scores == {"first": (antes + 2) / 4, "second": (2 - antes) / 4}
    assert outcome.metrics["showdown"] == float(abs(antes) == 2 or moves == ["pass", "pass"])


@pytest.mark.parametrize(
    ("deal", "moves", "antes"),
    [
        ((K, J, Q), "check check check check", 1),
        ((K, J, J), "check check check check", -1),
        ((Q, Q, K), "check raise raise call raise raise call", 0),
        ((J, Q, K), "raise fold", 1),
        ((J, Q, K), "raise raise fold", -3),
        ((J, Q, J), "raise raise call raise raise call", 13),
        ((J, Q, J), "raise call check raise fold", -3),
        ((Q, K, J), "check raise call raise call", -7),
    ],
)
def test_leduc_pays_by_the_rules(deal: tuple[int, int, int], moves: str, antes: float) -> None:
    outcome, _ = hand(leduc(), deal, *moves.split())
    assert outcome.metrics["first_antes"] == antes
    assert outcome.scores["first"] == pytest.approx((antes + 13) / 26)
    assert sum(outcome.scores.values()) == pytest.approx(1.0)
    assert outcome.metrics["showdown"] == float(not moves.endswith("fold"))


def test_legal_moves() -> None:
    def moves(*rounds: str) -> tuple[str, ...]:
        return LEDUC.actions(Hand((J, Q), None, rounds))

    assert moves("") == moves("c") == moves("rc", "") == ("c", "r")
    assert moves("r") == moves("cr") == moves("cc", "r") == ("f", "c", "r")
    assert moves("rr") == moves("crr") == ("f", "c")
    assert KUHN.actions(Hand((J, Q), None, ("r",))) == ("f", "c")


@dataclass(frozen=True)
class Suited(PokerRules):
    """Leduc with six different cards, as OpenSpiel has it."""

    def rank(self, card: int) -> int:
        return card // 2


def test_telling_suits_apart_changes_nothing_but_the_size() -> None:
    suited = game_tree(Suited(deck=tuple(range(6)), bets=(2, 4), cap=2, value=LEDUC.value))
    ranks = game_tree(LEDUC)
    assert len(suited.information_states) == 936
    assert len(ranks.information_states) == 288
    assert nash_conv(suited, uniform(suited)) == pytest.approx(nash_conv(ranks, uniform(ranks)), abs=1e-9)


@pytest.mark.parametrize("rules", [KUHN, LEDUC])
def test_deals_have_the_probabilities_of_chance(rules: PokerRules) -> None:
    listed = Counter(rules.deals)
    for deal, count in listed.items():
        state, probability = rules.initial(), 1.0
        for drawn in (deal[:2], deal[2]) if len(deal) > 2 else (deal,):
            probability *= dict(rules.chances(state))[drawn]
            state = rules.dealt(state, deal)
            while rules.mover(state) not in (CHANCE, TERMINAL) and rules.bets[1:] and len(state.rounds) == 1:
                state = rules.after(state, "c")
        assert probability == pytest.approx(count / len(rules.deals))
    assert len(rules.deals) == {1: 6, 2: 30}[len(rules.bets)]


def test_the_stake_is_the_most_that_can_be_lost() -> None:
    for rules in (KUHN, LEDUC):
        lowest = min(row[0] for row in game_tree(rules).returns if row)
        assert lowest == -rules.stake


@pytest.mark.parametrize("game", BOTH)
def test_training_takes_all_deals_in_turn_and_held_out_play_has_each_once(game: type[Poker]) -> None:
    scenario = game(PokerOptions(reward_pool=2.0, cooperation_level=0.25))
    deals = sorted(map(list, scenario.rules.deals))
    n = len(deals)
    heldout = list(scenario.tasks(Split.HELDOUT, 3))
    assert sorted(task.content["deal"] for task in heldout) == deals
    drawn = list(islice(scenario.tasks(Split.TRAIN, 3), 3 * n))
    passes = [[task.content["deal"] for task in drawn[i : i + n]] for i in range(0, 3 * n, n)]
    assert all(sorted(one) == deals for one in passes)
    assert passes[0] != passes[1]
    assert {(task.reward_pool, task.cooperation_level) for task in drawn + heldout} == {(2.0, 0.25)}
    assert scenario.single_task


@pytest.mark.parametrize("game", BOTH)
@pytest.mark.parametrize("seed", range(20))
def test_no_seat_needs_more_turns_than_the_task_allows(game: type[Poker], seed: int) -> None:
    scenario = game(PokerOptions())
    play(scenario, seed=seed)
    scenario_task = next(scenario.tasks(Split.TRAIN, 0))
    assert scenario_task.max_steps == {"kuhn": 2, "leduc": 4}[scenario.name]


def test_a_seat_that_takes_every_turn_uses_them_all() -> None:
    _, table = hand(leduc(), (J, Q, J), *["check", "raise", "raise", "call"] * 2)
    assert [len(table[seat].turns) for seat in ("first", "second")] == [4, 4]


def test_kuhn_shows_the_own_card_and_all_moves_and_nothing_else() -> None:
    _, table = hand(kuhn(), (K, J), "pass", "bet", "bet")
    assert [seen.prefix for seen in table["first"].shown] == [
        "With my King",
        "I pass. You bet. With my King",
    ]
    assert [seen.prefix for seen in table["second"].shown] == ["You pass. With my Jack"]
    assert {seen.user for seat in table.seats for seen in table[seat].shown} == {"Pass or bet?"}
    chinese = kuhn().shown(1, View(Q, None, ("r",)), "zh")
    assert chinese.prefix == "你押。我用中"


def test_leduc_shows_the_public_card_when_it_is_there() -> None:
    _, table = hand(leduc(), (K, J, Q), "raise", "call", "check", "raise", "fold")
    assert table["first"].shown[-1].prefix == (
        "I raise. You call. The table card is Queen. I check. You raise. With my King"
    )
    assert table["second"].shown[0].prefix == "You raise. With my Jack"
    assert leduc().choices(View(K, None, ("cr",)), "en") == ("fold", "call", "raise")
    assert leduc().choices(View(K, Q, ("cc", "rr")), "en") == ("fold", "call")
    assert leduc().choices(View(K, Q, ("cc", "c")), "en") == ("check", "raise")


@pytest.mark.parametrize("game", BOTH)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_information_state_has_a_prompt_of_its_own(game: type[Poker], language: str) -> None:
    scenario = game(PokerOptions())
    views = [(found.player, found.information) for found in scenario.tree.information_states]
    shown = [scenario.shown(player, view, language) for player, view in views]  # type: ignore[arg-type]
    assert len(set(shown)) == len(views) == {"kuhn": 12, "leduc": 288}[scenario.name]
    assert [scenario.seen(seen) for seen in shown] == views


def policy_of(scenario: Poker, policies: Sequence[Any]) -> Any:
    def probabilities(seat: SeatId, seen: Observation, choices: Sequence[str]) -> Sequence[float]:
        player, view = scenario.seen(seen)
        assert seat == ("first", "second")[player]
        assert choices == scenario.choices(view, "en")
        row: Sequence[float] = policies[player][view]
        return row

    return probabilities


def test_exact_of_uniform_kuhn() -> None:
    figures = exact(kuhn())
    assert figures["nash_conv"] == pytest.approx(11 / 12)
    assert figures["first_value"] == pytest.approx(1 / 8)
    assert figures["exploitability_first"] + figures["exploitability_second"] == pytest.approx(11 / 12)
    assert {figures[f"{seat}_bluff"] for seat in ("first", "second")} == {0.5}


def test_exact_of_an_equilibrium_of_kuhn() -> None:
    figures = exact(kuhn(), probabilities=policy_of(kuhn(), kuhn_equilibrium(0.2)))
    assert figures == pytest.approx(
        {
            "nash_conv": 0.0, "first_value": -1 / 18, "exploitability_first": 0.0, "exploitability_second": 0.0,
            "first_bluff": 0.2, "first_value_bet": 0.6, "first_call": 0.2 + 1 / 3, "second_bluff": 1 / 3,
            "second_call": 1 / 3,
        },
        abs=1e-12,
    )  # fmt: skip


def test_exploitability_is_told_for_the_seat_that_is_exploitable() -> None:
    always_bets = dict.fromkeys(kuhn_equilibrium(0)[0], (0.0, 1.0))
    figures = exact(kuhn(), probabilities=policy_of(kuhn(), (always_bets, kuhn_equilibrium(0)[1])))
    # against someone who always bets: fold the Jack, call with the King, and call with the Queen (no worse):
    # K wins 2, Q wins or loses 2 in equal parts, J loses 1: (2 + 0 - 1) / 3 a game
    assert figures["exploitability_first"] == pytest.approx(1 / 3 - 1 / 18)
    assert figures["exploitability_second"] == pytest.approx(0.0, abs=1e-12)


def test_exact_of_uniform_leduc() -> None:
    figures = exact(leduc())
    assert figures["nash_conv"] == pytest.approx(4.747222222222222)
    assert figures["exploitability_first"] + figures["exploitability_second"] == pytest.approx(figures["nash_conv"])


def mean_antes(scenario: Poker, scripts: Sequence[str], plays: int) -> float:
    players = dict(zip(("first", "second"), (scenario.scripts[name] for name in scripts), strict=True))
    total = 0.0
    for number in range(plays):
        for task in scenario.tasks(Split.HELDOUT, 0):
            outcome, _ = play(
                scenario, task, seed=number, answer=lambda seat, seen, choices, rng: players[seat](seen, choices, rng)
            )
            total += outcome.metrics["first_antes"] / len(scenario.rules.deals)
    return total / plays


def test_scripts_play_what_they_are_named_after() -> None:
    _, table = play(kuhn(), answer=lambda seat, seen, choices, rng: kuhn().scripts["caller"](seen, choices, rng))
    assert [turn.text for seat in table.seats for turn in table[seat].turns] == ["pass", "pass"]
    assert mean_antes(kuhn(), ("equilibrium", "equilibrium"), 400) == pytest.approx(-1 / 18, abs=0.05)
    said = Counter(
        leduc().scripts["caller"](seen, choices, random.Random(0))
        for seen, choices in (
            (leduc().shown(f.player, f.information, "en"), leduc().choices(f.information, "en"))  # type: ignore[arg-type]
            for f in leduc().tree.information_states
        )
    )
    assert set(said) == {"check", "call"}


def test_scripts_refuse_what_the_game_never_shows() -> None:
    with pytest.raises(ScenarioError, match="kuhn never shows 'With my Ace"):
        kuhn().scripts["caller"](Observation("Pass or bet?", prefix="With my Ace"), ("pass", "bet"), random.Random(0))


def test_a_task_without_content_is_dealt_by_the_table() -> None:
    shown = {play(kuhn(), make_task(max_steps=2), seed=seed)[1]["first"].shown[0].prefix for seed in range(20)}
    assert shown == {f"With my {card}" for card in ("Jack", "Queen", "King")}


@pytest.mark.parametrize(
    "content", [{"deal": [0, 0]}, {"deal": [0, 3]}, {"deal": [0]}, {"deal": "01"}, {"cards": [0, 1]}]
)
def test_deals_the_deck_does_not_allow_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match=r"task 't': content\['deal'\] is .*; it must be a list like \[0, 1\]"):
        kuhn().check_task(make_task(content=content))


def test_bad_options_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="did you mean 'reward_pool'"):
        build_scenario("kuhn", {"reward_pol": 2})


@pytest.mark.parametrize("bluff", [-0.1, 0.4])
def test_there_is_no_other_equilibrium(bluff: float) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1/3"):
        kuhn_equilibrium(bluff)


@pytest.mark.parametrize("rules", BOTH)
def test_a_turn_makes_no_task_and_renders_no_prompt_twice(rules: type[Poker]) -> None:
    scenario = rules(PokerOptions())
    shown = set[int]()

    def first(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        shown.add(id(seen))
        assert len(asyncio.all_tasks()) == 1
        return (choices or ())[0]

    for _ in range(3):
        play(scenario, answer=first)
    assert len(shown) == 2 * len(scenario.rules.bets)  # both check in every round, in every play the same
