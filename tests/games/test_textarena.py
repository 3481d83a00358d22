"""TextArena: lists of moves, what a seat is shown, rewards by hand, and episodes that do not disturb each other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.adapters.textarena import Message, TextArena, TextArenaOptions, listed, shown
from coterie.scenarios.base import build_scenario
from coterie.scenarios.practice import PracticeTable
from coterie.types import Outcome, Split, TrainingTask
from tests.support.tables import make_task, play, saying


def game(env_id: str = "TicTacToe-v0-raw", **options: Any) -> TextArena:
    return TextArena(TextArenaOptions.model_validate({"env_id": env_id, **options}))


# -- reading what a game says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("Board\n\nAvailable Moves: '[0]', '[4]', '[8]'", ["[0]", "[4]", "[8]"]),
        ("Your available actions are: '[check]', '[bet]'", ["[check]", "[bet]"]),
        ("Valid moves: [Up], [Down], [Left], [Right]. Tiles combine", ["[Up]", "[Down]", "[Left]", "[Right]"]),
        ("Available Moves: [1]\nlater\nAvailable Moves: [2], [3]", ["[2]", "[3]"]),
        ("Available actions: '[roll]' or '[hold]'", ["[roll]", "[hold]"]),
        ("Available Moves: [a b], [a c], [a b]", ["[a b]", "[a c]"]),
        ("Valid moves: '[check]'  |  '[bet X]'", None),
        ("Valid moves: [bid <amount>]", None),
        ("Available Moves:", None),
        ("[1] and [2] are numbers", None),
        ("Available actions:\n- [offer]", None),
    ],
)
def test_lists_of_moves(text: str, moves: list[str] | None) -> None:
    assert listed(text) == moves


def test_a_seat_is_shown_the_rules_the_last_messages_and_the_newest_board() -> None:
    said = [
        Message(-1, " Rules ", "PROMPT"),
        Message(-1, "board 1", "GAME_BOARD"),
        Message(0, "one", "PLAYER_ACTION"),
        Message(-1, "two", "GAME_MESSAGE"),
        Message(-1, "board 2", "GAME_BOARD"),
        Message(1, "three", "PLAYER_ACTION"),
    ]
    assert shown(said, 2).splitlines() == ["Rules", "two", "[Player 1] three", "board 2"]
    assert shown(said, 0).splitlines() == ["Rules", "board 2"]
    assert shown(said, 9).splitlines() == ["Rules", "[Player 0] one", "two", "[Player 1] three", "board 2"]


# -- playing ----------------------------------------------------------------------------------------------------------


def test_a_game_won_by_hand() -> None:
    outcome, table = play(game(), answer=saying({"player_0": ["0", "1", "2"], "player_1": ["3", "4"]}))
    assert outcome.scores == {"player_0": 1.0, "player_1": 0.0}
    assert outcome.metrics == {"moves": 5, "finished": 1, "invalid_moves": 0, "drawn": 0}
    last = table["player_0"].shown[2]
    assert last.user.startswith("You are Player 0 in Tic Tac Toe.")
    assert last.user.endswith("Available Moves: '[2]', '[5]', '[6]', '[7]', '[8]'")
    assert last.prefix == "Move:"


def test_a_draw_and_a_game_that_takes_too_long() -> None:
    draw = {"player_0": ["0", "2", "3", "7", "8"], "player_1": ["1", "4", "5", "6"]}
    outcome, _ = play(game(), answer=saying(draw))
    assert outcome.scores == {"player_0": 0.5, "player_1": 0.5}
    assert outcome.metrics["drawn"] == outcome.metrics["finished"] == 1
    outcome, _ = play(game(max_turns=2), answer=saying(draw))
    assert outcome.scores == {"player_0": 0.5, "player_1": 0.5}
    assert outcome.metrics["finished"] == 0
    assert outcome.metrics["moves"] == 4


def test_choices_are_the_moves_there_are() -> None:
    offered: list[tuple[str, ...]] = []

    def first(seat: str, seen: Any, choices: Sequence[str] | None, rng: random.Random) -> str:
        assert choices is not None
        offered.append(tuple(choices))
        return choices[0]

    play(game(), answer=first)
    assert offered[:3] == [tuple("012345678"), tuple("12345678"), tuple("2345678")]


def test_free_text_and_what_the_game_makes_of_it() -> None:
    scenario = game(choices="none", max_tokens=5)
    outcome, table = play(scenario, answer=saying({"player_0": ["I take the middle", "really"], "player_1": "[0]"}))
    assert outcome.scores == {"player_0": 0.0, "player_1": 1.0}, "an invalid move, and another try that is none"
    assert outcome.metrics["invalid_moves"] == 0.5
    assert table["player_0"].turns[0].choice is None
    assert "invalid move" in table["player_0"].shown[1].user


def test_moves_of_ones_own() -> None:
    options = {"num_rounds": 2, "communication_turns": 1}
    scenario = game("IteratedPrisonersDilemma-v0-raw", actions=["[cooperate]", "[defect]"], env_options=options)
    words = {"player_0": "cooperate", "player_1": "defect"}
    outcome, table = play(scenario, answer=lambda seat, seen, choices, rng: words[seat])
    assert outcome.scores == {"player_0": 0.0, "player_1": 1.0}
    assert len(table["player_0"].turns) == 4, "a word before each of two decisions"
    scenario = game(choices="tests.games.test_textarena:corners")
    outcome, table = play(scenario, answer=lambda seat, seen, choices, rng: choices[0])
    assert [turn.text for turn in table["player_0"].turns] == ["0", "6", "1", "4"]
    assert outcome.scores == {"player_0": 0.0, "player_1": 1.0}, "2, 8, 3, 5"
    scenario = game(choices="tests.games.test_textarena:nothing")
    with pytest.raises(ScenarioError, match="must be different texts, and at least one"):
        play(scenario)


def corners(env: Any, player: int) -> list[str]:
    board = env.state.game_state["board"]
    free = [f"[{3 * i + j}]" for i in (0, 2) for j in (0, 2) if not board[i][j]]
    return free or [f"[{3 * i + j}]" for i in range(3) for j in range(3) if not board[i][j]]


def nothing(env: Any, player: int) -> list[str]:
    return []


def test_a_prompt_of_ones_own() -> None:
    _, table = play(game(render="tests.games.test_textarena:newest"))
    assert table["player_1"].shown[0].user.startswith("1: Current Board:")


def newest(messages: Sequence[Message], player: int) -> str:
    return f"{player}: {messages[-1].text}"


def test_ids_with_wrappers_show_the_text_these_make() -> None:
    _, table = play(game("TicTacToe-v0"), answer=saying({"player_0": ["0", "1", "2"], "player_1": ["3", "4"]}))
    assert table["player_0"].shown[1].user.startswith("[GAME] You are Player 0")
    assert table["player_0"].turns[1].text == "1"


def test_three_players() -> None:
    scenario = game("ThreePlayerTicTacToe-v0-raw", players=3)
    outcome, table = play(scenario)
    assert set(outcome.scores) == {"player_0", "player_1", "player_2"}
    assert all(table[seat].turns for seat in table.seats)


# -- chance -----------------------------------------------------------------------------------------------------------


def cards(table: PracticeTable) -> dict[str, str]:
    return {seat: table[seat].shown[0].user.split("Your card is: '")[1][0] for seat in table.seats if table[seat].shown}


def test_one_task_deals_the_same_cards_and_other_tasks_others() -> None:
    scenario = game("KuhnPoker-v0-raw")
    deals = set()
    for task in islice(scenario.tasks(Split.TRAIN, 0), 12):
        first, second = (cards(play(scenario, task, seed=seed, answer=_passing)[1]) for seed in (1, 2))
        assert first == second
        deals.add(tuple(sorted(first.items())))
    assert len(deals) > 2


def _passing(seat: str, seen: Any, choices: Sequence[str] | None, rng: random.Random) -> str:
    assert choices is not None
    return "check" if "check" in choices else "call"


def test_episodes_played_at_once_are_those_played_alone() -> None:
    scenario = game("PigDice-v0-raw", max_turns=8)
    tasks = list(islice(scenario.tasks(Split.TRAIN, 0), 6))

    def table(task: TrainingTask) -> PracticeTable:
        return Yielding(task, scenario.seats(task), seed=5)

    async def together() -> list[Outcome]:
        return await asyncio.gather(*(scenario.play(task, table(task)) for task in tasks))

    before = random.getstate()
    at_once = asyncio.run(together())
    alone = [asyncio.run(scenario.play(task, table(task))) for task in tasks]
    assert at_once == alone
    assert random.getstate() == before
    assert len({outcome.metrics["moves"] for outcome in alone} | {tuple(o.scores.values()) for o in alone}) > 1


class Yielding(PracticeTable):
    """Lets the other episodes go on before every turn."""

    def __getitem__(self, seat_id: str) -> Any:
        seat = super().__getitem__(seat_id)

        class Waiting:
            card = seat.card

            async def act(self, *args: Any, **options: Any) -> Any:
                await asyncio.sleep(0)
                return await seat.act(*args, **options)

        return Waiting()


# -- what cannot be played --------------------------------------------------------------------------------------------


def test_an_environment_that_wants_the_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ConfigError, match=r"(?s)cannot be started.*it wanted to reach raw\.githubusercontent\.com"):
        game("Hangman-v0-raw", players=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_id": "TicTacTo-v0"}, "no environment 'TicTacTo-v0'.*did you mean 'TicTacToe-v0"),
        ({"players": 5}, "cannot be started with 5 players"),
        ({"env_options": {"size": 3}}, "cannot be started with 2 players and env_options {'size': 3}"),
        ({"choices": "some"}, '"listed", "none" or "module:attr"'),
        ({"actions": ["[a]"]}, "at least two different moves"),
        ({"reward_range": [1, 1]}, "give the least and the greatest"),
        ({"envid": "x"}, "did you mean 'env_id'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("textarena", options)


def test_rewards_beyond_the_range_fail_the_episode() -> None:
    with pytest.raises(ScenarioError, match="outside reward_range"):
        play(game(reward_range=[0, 1]), answer=saying({"player_0": ["0", "1", "2"], "player_1": ["3", "4"]}))


def test_a_task_of_another_game_is_refused() -> None:
    with pytest.raises(ScenarioError, match="content must be"):
        game().check_task(make_task(content={"game": "chess", "game_seed": 1}))
