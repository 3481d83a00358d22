"""Playing episodes: who sits where, what a turn records, and what happens to those that go wrong."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from coterie.errors import ConfigError, EngineError, RequestError, ScenarioError
from coterie.models import LoRAModel, ModelConfig
from coterie.modes.base import build_mode
from coterie.rollout.calibration import Calibration
from coterie.rollout.matchmaking import assign, frozen_as, trained, with_person
from coterie.rollout.runner import Plan, Runner, check_outcome, with_services
from coterie.rollout.table import Holder, stable_seed
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import (
    AdapterVersion,
    Episode,
    FailedEpisode,
    Frozen,
    GenerateRequest,
    Generation,
    ModelRole,
    Observation,
    Outcome,
    Person,
    PlayerCard,
    Scripted,
    Seat,
    SeatId,
    Split,
    Tier,
    Trained,
    TrainingMode,
    TrainingTask,
    Turn,
)
from tests.support.engines import LogitEngine, Words, make_services
from tests.support.tables import make_task

Play = Callable[[TrainingTask, Table], Any]


def model(model_id: str, role: str = "teammate", team: str | None = None) -> LoRAModel:
    return LoRAModel(ModelConfig(model_id=model_id, role=ModelRole(role), team_id=team))


MODELS = [model("a"), model("b"), model("c")]


async def all_say_yes_or_no(task: TrainingTask, table: Table) -> Outcome:
    """Each seat answers once; a score is 1 for yes."""
    turns = [await table[seat].act(Observation(user="yes or no"), choices=("yes", "no")) for seat in table.seats]
    return Outcome({seat: float(turn.choice == 0) for seat, turn in zip(table.seats, turns, strict=True)})


class Rules:
    """A scenario of these seats, played by this function."""

    Options = ScenarioOptions

    def __init__(self, play: Play = all_say_yes_or_no, seats: Sequence[Seat | SeatId] = ("one", "two")) -> None:
        self._play = play
        self._seats = [seat if isinstance(seat, Seat) else Seat(seat) for seat in seats]

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        yield make_task(split=split)

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        return self._seats

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        outcome = await self._play(task, table)
        assert isinstance(outcome, Outcome)
        return outcome


def runner(play: Play = all_say_yes_or_no, seats: Sequence[Seat | SeatId] = ("one", "two"), **services: Any) -> Runner:
    return Runner(Rules(play, seats), make_services(**services))


def one(where: Runner, models: Sequence[LoRAModel] = MODELS, task: TrainingTask | None = None, **plan: Any) -> Episode:
    """Play one episode; what the scenario raises comes out."""
    task = task or make_task()
    holders = where.seating(task, models, 0, rotate=False)
    return asyncio.run(where.one(Plan(**{**plan_fields(task, holders), **plan})))


def plan_fields(task: TrainingTask, holders: Mapping[SeatId, Holder]) -> dict[str, Any]:
    return {"task": task, "holders": holders, "episode_id": "e", "group": "g", "update": 1}


def groups(where: Runner, *tasks: TrainingTask, models: Sequence[LoRAModel] = MODELS, **options: Any) -> Any:
    defaults = {"update": 3, "group_size": 4}
    return asyncio.run(where.groups(tasks or [make_task()], models, **{**defaults, **options}))


# -- who sits where -----------------------------------------------------------------------------------------------


def sitting(seats: Sequence[Seat | SeatId], models: Sequence[LoRAModel], **options: Any) -> list[str | None]:
    bound = assign([s if isinstance(s, Seat) else Seat(s) for s in seats], models, **options)
    return [holder.trained for holder in bound.values()]


def test_models_take_the_seats_in_their_order_whatever_the_turn() -> None:
    assert [sitting("xyz", MODELS, turn=turn) for turn in range(3)] == [["a", "b", "c"]] * 3


def test_with_rotation_they_take_turns_at_the_seats() -> None:
    assert [sitting("xyz", MODELS, turn=turn, rotate=True) for turn in range(4)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"],
    ]  # fmt: skip


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_more_models_than_seats_sit_out_in_turn(count: int, rotate: bool) -> None:
    many = [model(f"m{i}") for i in range(count)]
    played = Counter(m for turn in range(count) for m in sitting("xy", many, turn=turn, rotate=rotate))
    assert played == {m.model_id: 2 for m in many}
    if not rotate:  # roles keep their seats: the earlier of two models always sits first
        for turn in range(count):
            first, second = sitting("xy", many, turn=turn)
            assert first is not None
            assert second is not None
            assert first < second


def test_too_few_models_are_counted() -> None:
    with pytest.raises(ConfigError, match="5 seats to fill, but there are 3 models; add 2 more"):
        sitting("vwxyz", MODELS)


def test_bound_seats_keep_their_players_and_the_rest_are_filled() -> None:
    version = AdapterVersion("old", 7)
    seats = [
        Seat("free"), Seat("mine", Trained("c")), Seat("old", Frozen(version)), Seat("bare", Frozen(None)),
        Seat("rule", Scripted("always")), Seat("me", Person()), Seat("last"),
    ]  # fmt: skip
    holders = assign(seats, MODELS[:3], turn=0)
    assert [holder.trained for holder in holders.values()] == ["a", "c", None, None, None, None, "b"]
    assert holders["mine"].adapter == AdapterVersion("c", 0)
    assert holders["old"].adapter == version
    assert holders["bare"].adapter is None
    assert holders["rule"].player == Scripted("always")
    assert holders["free"].card == PlayerCard("free", "a", ModelRole.TEAMMATE)
    with pytest.raises(ConfigError, match="seat 'x' is bound to 'ghost', which is not a model here"):
        assign([Seat("x", Trained("ghost"))], MODELS)


def test_a_seat_is_played_by_the_models_current_version() -> None:
    later = model("a")
    later.version = 4
    assert trained("x", later).adapter == AdapterVersion("a", 4)


def test_frozen_seats_keep_their_cards_and_teach_nobody() -> None:
    holders = assign([Seat("x"), Seat("y")], MODELS)
    frozen = frozen_as(holders, {"a": None})
    assert frozen["x"].card == holders["x"].card
    assert (frozen["x"].trained, frozen["x"].adapter) == (None, None)
    assert frozen["y"] == holders["y"]
    kept = frozen_as(holders, {"b": AdapterVersion("b", 2)})
    assert (kept["y"].trained, kept["y"].adapter) == (None, AdapterVersion("b", 2))


def test_a_person_needs_a_seat_that_is_there() -> None:
    holders = assign([Seat("x"), Seat("y")], MODELS)
    assert isinstance(with_person(holders, "y")["y"].player, Person)
    with pytest.raises(ConfigError, match="there is no seat 'z'; seats: x, y"):
        with_person(holders, "z")


# -- groups of episodes -------------------------------------------------------------------------------------------


def test_every_task_is_played_by_a_group() -> None:
    tasks = [make_task(task_id=name) for name in ("t0", "t1", "t2")]
    episodes, failed = groups(runner(), *tasks)
    assert failed == []
    assert [e.episode_id for e in episodes] == [f"3.{n}.{k}" for n in range(3) for k in range(4)]
    assert [e.group for e in episodes] == [f"3.{n}" for n in range(3) for _ in range(4)]
    assert [e.task for e in episodes] == [task for task in tasks for _ in range(4)]
    assert {e.update for e in episodes} == {3}


def test_siblings_that_are_compared_sit_alike() -> None:
    episodes, _ = groups(runner(), models=MODELS[:2], rotate=True, group_size=6)
    seating = {e.group: {tuple(t.model_id for t in e.trajectories.values())} for e in episodes}
    for e in episodes:
        seating[e.group].add(tuple(t.model_id for t in e.trajectories.values()))
    assert len(seating) == 2
    assert all(len(kinds) == 1 for kinds in seating.values())
    assert {kind for kinds in seating.values() for kind in kinds} == {("a", "b"), ("b", "a")}


def test_episodes_differ_by_their_seeds_and_only_by_them() -> None:
    def answers(**services: Any) -> list[str]:
        episodes, _ = groups(runner(**services), group_size=30)
        return [t.turns[0].text for e in episodes for t in e.trajectories.values()]

    assert answers() == answers()
    assert answers() != answers(seed=1)
    assert set(answers()) == {"yes", "no"}


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert stable_seed(0, "3.1.2", "one", 0) == stable_seed("0/3.1.2", "one", 0) == 7686216165349874617
    assert stable_seed(0, "a", 1) != stable_seed(0, "a", 2)


# -- what a turn records ------------------------------------------------------------------------------------------


def test_a_turn_has_all_a_learner_needs() -> None:
    chat, bias = Words(), {5: 0.25}
    engine = LogitEngine()
    calibration = Calibration({("one", ("yes", "no")): bias})
    shown = Observation(user="well ?", system="be brief", prefix="Answer:")
    turns: list[Turn] = []

    async def play(task: TrainingTask, table: Table) -> Outcome:
        turns.append(await table["one"].act(shown, choices=("yes", "no"), kind="vote"))
        return Outcome({"one": 1.0})

    episode = one(
        runner(play, ("one",), engine=engine, chat=chat, calibration=calibration, temperature=0.7), task=make_task()
    )
    (turn,) = turns
    (request,) = engine.requests
    assert episode.trajectories["one"].turns == (turn,)
    assert (turn.seat_id, turn.model_id, turn.kind) == ("one", "a", "vote")
    assert turn.prompt_ids == request.prompt_ids == chat.render(shown)
    assert turn.bias is bias is request.bias
    assert turn.temperature == request.temperature == 0.7
    assert turn.adapter == request.adapter == AdapterVersion("a", 0)
    assert request.choices == ((chat.id("yes"),), (chat.id("no"),))
    assert request.messages == (("system", "be brief"), ("user", "well ?"), ("assistant", "Answer:"))
    assert request.seed == stable_seed(0, "e", "one", 0)
    assert turn.text == ("yes", "no")[turn.choice or 0]
    assert turn.token_ids == ((chat.id(turn.text)),)
    assert turn.allowed == (tuple(sorted((chat.id("yes"), chat.id("no")))),)
    assert turn.logprobs == pytest.approx((math.log(0.5),), abs=0.2)
    assert (turn.tier, turn.server, turn.latency_s, turn.valid, turn.trainable) == (
        Tier.LOCAL, "nearby", 0.25, True, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "valid", "said"), [(("so", "be", "it", ""), True, "so be it"), (("so", "be"), False, "so be")]
)
def test_free_text_is_valid_when_it_ends_by_itself(text: tuple[str, ...], valid: bool, said: str) -> None:
    chat = Words()
    tokens = [chat.id(word) if word else 0 for word in text]

    async def play(task: TrainingTask, table: Table) -> Outcome:
        turn = await table["one"].act(Observation(user="speak"), max_tokens=4)
        assert (turn.valid, turn.text, turn.choice, turn.allowed) == (valid, said, None, None)
        return Outcome({"one": 1.0})

    one(runner(play, ("one",), engine=LogitEngine(text=tokens), chat=chat))


def test_each_turn_of_a_seat_has_a_seed_of_its_own() -> None:
    engine = LogitEngine()

    async def play(task: TrainingTask, table: Table) -> Outcome:
        for _ in range(2):
            for seat in table.seats:
                await table[seat].act(Observation(user="same"), choices=("yes", "no"))
        return Outcome(dict.fromkeys(table.seats, 0.0))

    one(runner(play, engine=engine), task=make_task(max_steps=2))
    one(runner(play, engine=engine), task=make_task(max_steps=2), episode_id="other")
    assert len({request.seed for request in engine.requests}) == 8


def test_frozen_seats_are_not_trained_on_and_keep_their_version() -> None:
    version = AdapterVersion("old", 3)
    episode = one(runner(seats=[Seat("one", Frozen(version)), Seat("two", Frozen(None)), Seat("three")]))
    turns = [trajectory.turns[0] for trajectory in episode.trajectories.values()]
    assert [turn.trainable for turn in turns] == [False, False, True]
    assert [turn.adapter for turn in turns] == [version, None, AdapterVersion("a", 0)]


def test_distributions_take_no_turn() -> None:
    chat = Words()
    engine = LogitEngine(lambda prefix, token: 1.0 if token == chat.id("yes") else 0.0)

    async def play(task: TrainingTask, table: Table) -> Outcome:
        found = await table["one"].distribution(Observation(user="?"), ("yes", "no"))
        assert found == pytest.approx((math.e / (1 + math.e), 1 / (1 + math.e)))
        return Outcome({"one": 0.0})

    assert one(runner(play, ("one",), engine=engine, chat=chat)).trajectories["one"].turns == ()


# -- advice that is withheld --------------------------------------------------------------------------------------


def withheld(mode: str = "cooperative", level: float = 0.6, **options: Any) -> Counter[SeatId]:
    models = options.pop("models", MODELS)
    where = runner(seats=("one", "two", "three"), mode=mode)
    episodes, _ = groups(
        where, make_task(cooperation_level=level), models=models, group_size=600, **{"withhold": 0.25, **options}
    )
    return Counter(seat for episode in episodes for seat in episode.withheld)


def test_every_speaker_is_withheld_in_its_share_of_the_episodes() -> None:
    for count in (withheld()[seat] for seat in ("one", "two", "three")):
        assert count / 600 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 600))
    assert withheld() == withheld()


def test_advice_that_reaches_nobody_is_not_withheld() -> None:
    assert withheld(withhold=0.0) == {}
    assert withheld(level=0.3) == {}
    assert withheld("competitive") == {}
    teams = [model("a", team="red"), model("b", team="red"), model("c", team="blue")]
    assert set(withheld("team_battle", models=teams)) == {"one", "two"}
    quiet = [model("a", "competitor"), model("b"), model("c", "neutral")]
    assert set(withheld(models=quiet)) == {"two", "three"}


def test_the_table_keeps_what_was_withheld_from_everybody() -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        assert table.hears("two", "one")
        assert not table.hears("one", "one")
        return Outcome({seat: float(table.delivers(seat)) for seat in table.seats})

    episodes, _ = groups(runner(play), make_task(cooperation_level=0.9), group_size=40, withhold=0.5)
    for episode in episodes:
        assert {seat for seat, score in episode.outcome.scores.items() if score == 0.0} == episode.withheld
    assert len({episode.withheld for episode in episodes}) == 4


# -- rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", TrainingMode)
def test_rewards_are_the_modes_division_of_the_scores(mode: TrainingMode) -> None:
    teams = [model("a", team="red"), model("b", team="blue")]
    task = make_task(reward_pool=5.0)
    episodes, _ = groups(runner(mode=mode), task, models=teams)
    for episode in episodes:
        expected = build_mode(mode).rewards(task, episode.outcome.scores, {"one": "red", "two": "blue"})
        assert episode.rewards == expected
        assert {seat: t.team for seat, t in episode.trajectories.items()} == {"one": "red", "two": "blue"}


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_failed_episode_is_recorded_and_the_others_go_on() -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        if task.task_id == "bad":
            await asyncio.sleep(0)
            raise ZeroDivisionError("no way")
        return await all_say_yes_or_no(task, table)

    episodes, failed = groups(runner(play), make_task(task_id="good"), make_task(task_id="bad"))
    assert [e.episode_id for e in episodes] == [f"3.0.{k}" for k in range(4)]
    line = play.__code__.co_firstlineno + 3
    said = f"ZeroDivisionError: no way (test_runner.py:{line} in play)"
    assert failed == [FailedEpisode(f"3.1.{k}", make_task(task_id="bad"), said) for k in range(4)]


def test_a_broken_engine_is_not_the_scenarios_failure() -> None:
    engine = LogitEngine()
    engine.broken = True
    with pytest.raises(EngineError, match="the engine is broken"):
        groups(runner(engine=engine))


class ShortEngine(LogitEngine):
    """Refuses prompts of more than four tokens."""

    async def generate(self, request: GenerateRequest) -> Generation:
        if len(request.prompt_ids) > 4:
            raise RequestError(f"needs {len(request.prompt_ids)} tokens; shorten it")
        return await super().generate(request)


def test_a_request_the_engine_refuses_fails_its_own_episode_and_says_whose_it_was() -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        await table["one"].act(Observation(user="short"), choices=("yes", "no"))
        long = " ".join("word" for _ in range(6))
        await table["one"].act(Observation(user=long if task.task_id == "long" else "short"), choices=("yes", "no"))
        return Outcome({"one": 1.0})

    where = runner(play, ("one",), engine=ShortEngine())
    episodes, failed = groups(where, make_task(task_id="fine"), make_task(task_id="long"), group_size=2)
    assert [e.task.task_id for e in episodes] == ["fine", "fine"]
    said = "RequestError: task 'long', seat 'one', turn 2: needs 6 tokens; shorten it"
    assert [(f.episode_id, f.error) for f in failed] == [("3.1.0", said), ("3.1.1", said)]


def test_a_distribution_the_engine_refuses_says_whose_it_was() -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        await table["one"].distribution(Observation(user="a b c d e"), ("yes", "no"))
        raise AssertionError("it was served")

    with pytest.raises(RequestError, match="task 't', seat 'one', turn 1: needs 5 tokens"):
        one(runner(play, ("one",), engine=ShortEngine()))


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome({"one": 0.5}), r"scores seats \['one'\], but the table has \['one', 'two'\]"),
        (Outcome({"one": 0.5, "two": 0.5, "three": 0.5}), "but the table has"),
        (Outcome({"one": 0.5, "two": 1.5}), "score of seat 'two' is 1.5"),
        (Outcome({"one": -0.5, "two": 0.5}), "score of seat 'one' is -0.5"),
        (Outcome({"one": math.nan, "two": 0.5}), "score of seat 'one' is nan"),
        (Outcome({"one": 0.0, "two": 1.0}, {"one": math.inf}), "accuracy of seat 'one' is inf"),
        (Outcome({"one": 0.0, "two": 1.0}, {"ghost": 1.0}), "accuracy for unknown seat 'ghost'"),
    ],
)
def test_a_broken_outcome_is_a_failure_that_says_why(outcome: Outcome, said: str) -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        return outcome

    with pytest.raises(ScenarioError, match=said):
        check_outcome(outcome, ("one", "two"))
    episodes, failed = groups(runner(play), group_size=1)
    assert episodes == []
    assert failed[0].error.startswith("ScenarioError: ")


def test_a_seat_may_take_as_many_turns_as_the_task_allows() -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        for _ in range(4):
            await table["one"].act(Observation(user="again"), choices=("yes", "no"))
        return Outcome(dict.fromkeys(table.seats, 0.0))

    assert len(one(runner(play), task=make_task(max_steps=4)).trajectories["one"].turns) == 4
    with pytest.raises(ScenarioError, match=r"seat 'one' was asked for more than 3 turns \(task.max_steps\)"):
        one(runner(play), task=make_task(max_steps=3))


def test_a_seat_that_is_not_there_is_named() -> None:
    async def play(task: TrainingTask, table: Table) -> Outcome:
        table["three"]
        return Outcome({})

    with pytest.raises(ScenarioError, match="asked for seat 'three', but this table has one, two"):
        one(runner(play))


# -- scripts and persons ------------------------------------------------------------------------------------------


def stubborn(observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
    """A script of the user's own."""
    return "no"


def test_scripts_answer_by_their_rule_and_are_not_trained_on() -> None:
    scripts = {
        "last": lambda seen, choices, rng: choices[-1],
        "any": lambda seen, choices, rng: rng.choice(choices),
    }
    seats = [Seat("one", Scripted("last")), Seat("two", Scripted("any")), Seat("three")]
    episodes, failed = groups(runner(seats=seats, scripts=scripts), group_size=30)
    assert not failed
    for episode in episodes:
        turns = {seat: trajectory.turns[0] for seat, trajectory in episode.trajectories.items()}
        assert (turns["one"].text, turns["one"].choice) == ("no", 1)
        assert [turns[seat].tier for seat in ("one", "two", "three")] == [Tier.SCRIPT, Tier.SCRIPT, Tier.LOCAL]
        assert [turns[seat].trainable for seat in ("one", "two", "three")] == [False, False, True]
    assert len({episode.trajectories["two"].turns[0].text for episode in episodes}) == 2


def test_a_script_of_ones_own_is_named_by_module_and_attribute() -> None:
    where = runner(seats=[Seat("one", Scripted("tests.unit.test_runner:stubborn"))])
    assert one(where).trajectories["one"].turns[0].text == "no"


def test_a_script_that_is_not_there_is_named() -> None:
    where = runner(seats=[Seat("one", Scripted("tit_for_tet"))], scripts={"tit_for_tat": stubborn})
    with pytest.raises(ConfigError, match=r"unknown script 'tit_for_tet' \(did you mean 'tit_for_tat'\?\)"):
        one(where)


def test_an_answer_that_is_none_of_the_choices_is_refused() -> None:
    where = runner(seats=[Seat("one", Scripted("odd"))], scripts={"odd": lambda seen, choices, rng: "maybe"})
    with pytest.raises(ScenarioError, match="seat 'one' answered 'maybe', which is none of 'yes', 'no'"):
        one(where)


def test_a_person_is_asked() -> None:
    asked: list[tuple[SeatId, str, Sequence[str] | None]] = []

    def ask(seat: SeatId, seen: Observation, choices: Sequence[str] | None) -> str:
        asked.append((seat, seen.user, choices))
        return "yes"

    where = with_services(runner(seats=[Seat("one"), Seat("two", Person())]), ask=ask)
    episode = one(where)
    assert asked == [("two", "yes or no", ("yes", "no"))]
    turn = episode.trajectories["two"].turns[0]
    assert (turn.text, turn.choice, turn.tier, turn.trainable) == ("yes", 0, Tier.HUMAN, False)
    assert episode.rewards["two"] > 0  # a person's score counts


def test_nobody_at_the_terminal_is_said() -> None:
    where = runner(seats=[Seat("one", Person())])
    with pytest.raises(ScenarioError, match="held by a person, but nobody is at the terminal"):
        one(where)
    for player in (Person(), Scripted("x")):

        async def play(task: TrainingTask, table: Table) -> Outcome:
            await table["one"].distribution(Observation(user="?"), ("yes", "no"))
            return Outcome({"one": 0.0})

        with pytest.raises(ScenarioError, match="held by no model; it has no distribution"):
            one(runner(play, [Seat("one", player)]))


def test_services_are_replaced_without_touching_the_first_runner() -> None:
    first = runner()
    second = with_services(first, temperature=0.0)
    assert (first.services.temperature, second.services.temperature) == (1.0, 0.0)
    assert second.services == replace(first.services, temperature=0.0)
    assert second.scenario is first.scenario
