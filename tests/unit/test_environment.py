"""The system as a user holds it: models come and go, tasks queue up, cycles train, and mistakes are told."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.errors import AdapterError, ConfigError, RunFolderError, ScenarioError
from coterie.loop import TrainingLoop
from coterie.models import (
    LoRAModel,
    ModelConfig,
    create_competitive_models,
    create_cooperative_team,
    create_team_battle_models,
)
from coterie.monitor.console import Silent
from coterie.monitor.metrics import UpdateRecord
from coterie.runs.directory import RunDirectory
from coterie.scenarios.base import ScenarioOptions, Table
from coterie.types import (
    Observation,
    Outcome,
    Seat,
    Split,
    TaskType,
    TrainingMode,
    TrainingTask,
)
from tests.support.disk import no_file_above

MakeEnvironment = Callable[..., MultiModelEnvironment]


@pytest.fixture
def settings(tiny_path: Path) -> Callable[..., RunConfig]:
    """A small run config on the tiny base; keyword arguments replace its tables."""

    def make(**changes: Any) -> RunConfig:
        small = {
            "base": {"model": str(tiny_path), "threads": 1},
            "scenario": {"options": {"models": 2, "types": ["classification", "optimization"]}},
            "rollout": {"tasks_per_update": 2, "group_size": 4},
            "engine": {"calibration_tasks": 6},
        }
        return parse_config({**small, **changes})

    return make


@pytest.fixture
def make(settings: Callable[..., RunConfig]) -> MakeEnvironment:
    def make(*models: ModelConfig | str, **changes: Any) -> MultiModelEnvironment:
        env = MultiModelEnvironment(config=settings(**changes))
        for model in models:
            env.add_model(ModelConfig(model_id=model) if isinstance(model, str) else model)
        return env

    return make


A: dict[str, Any] = {"model_id": "a", "lora_rank": 4}
B: dict[str, Any] = {"model_id": "b"}


def own(task_id: str, **fields: Any) -> TrainingTask:
    return TrainingTask(**{"task_id": task_id, "task_type": TaskType.CLASSIFICATION, "required_models": 2, **fields})


class Log(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.records: list[UpdateRecord] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, record: UpdateRecord) -> None:
        self.records.append(record)


class Recorder:
    """A scenario that keeps which tasks were played at which seats."""

    Options = ScenarioOptions
    played: list[tuple[str, tuple[str | None, ...]]] = []  # noqa: RUF012 - shared on purpose, the fixture empties it

    def __init__(self, options: ScenarioOptions) -> None: ...

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        number = 0
        while True:
            yield TrainingTask(f"{split}-{number}", TaskType.REASONING, content={"n": number}, split=split)
            number += 1

    def seats(self, task: TrainingTask) -> list[Seat]:
        return [Seat(f"s{i}") for i in range(task.required_models)]

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        if task.content.get("broken"):
            raise ArithmeticError("cannot count")
        self.played.append((task.task_id, tuple(table[seat].card.model_id for seat in table.seats)))
        turns = [await table[seat].act(Observation(user="yes or no?"), choices=("yes", "no")) for seat in table.seats]
        return Outcome({seat: float(turn.choice == 0) for seat, turn in zip(table.seats, turns, strict=True)})


RECORDER = {"id": "tests.unit.test_environment:Recorder"}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str | None, ...]]]:
    found: list[tuple[str, tuple[str | None, ...]]] = []
    monkeypatch.setattr(Recorder, "played", found)
    return found


# -- models -------------------------------------------------------------------------------------------------------


def test_adding_and_removing_before_anything_is_loaded() -> None:
    env = MultiModelEnvironment(training_mode="competitive", max_models=3)
    added = [env.add_model(config) for config in create_competitive_models()]
    assert all(isinstance(model, LoRAModel) for model in added)
    assert list(env.models) == ["competitor_1", "competitor_2", "competitor_3"]
    with pytest.raises(ConfigError, match="4 models, but max_models is 3"):
        env.add_model(ModelConfig(model_id="one_more"))
    env.remove_model("competitor_2")
    env.add_model(ModelConfig(model_id="one_more"))
    assert list(env.models) == ["competitor_1", "competitor_3", "one_more"]
    with pytest.raises(ConfigError, match="model_id 'one_more' is used 2 times"):
        env.add_model(ModelConfig(model_id="one_more"))
    with pytest.raises(ConfigError, match="no model 'ghost'; models: competitor_1, competitor_3, one_more"):
        env.remove_model("ghost")


def test_a_model_of_another_base_is_refused() -> None:
    env = MultiModelEnvironment()
    env.add_model(ModelConfig(model_id="a", model_name="smollm2-135m-instruct"))
    with pytest.raises(ConfigError, match="all policies of a run share one base"):
        env.add_model(ModelConfig(model_id="b", model_name="other"))
    with pytest.raises(ConfigError, match=r"names base 'other'.*set base\.model"):
        MultiModelEnvironment().add_model(ModelConfig(model_id="b", model_name="other"))


def test_a_model_may_be_given_as_a_lora_model() -> None:
    env = MultiModelEnvironment()
    mine = LoRAModel(ModelConfig(model_id="mine", lora_rank=4))
    assert env.add_model(mine).config == mine.config
    assert env.get_environment_stats()["models"]["mine"]["lora_rank"] == 4


def test_a_trained_model_goes_on_in_another_environment(
    settings: Callable[..., RunConfig], make: MakeEnvironment, tmp_path: Path
) -> None:
    config = settings(models=[A, B], updates=2, evaluation={"tasks": 0})
    first = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(first.train())
    given = first.models["a"]
    weights = first.base.bank.training("a").flat.clone()
    assert given.version == 2
    second = make("c")
    moved = second.add_model(given)
    second.run_training_cycle(1)
    assert (moved.version, moved.weight_updates, moved.lora_adaptations) == (3, 3, 3)
    assert [p.update for p in moved.performance_history] == [1, 2, 1]
    assert second.get_environment_stats()["models"]["a"]["adapter"] == "a@v3"
    # the one given stays as it was, and where it was
    assert (given.version, len(given.performance_history)) == (2, 2)
    assert torch.equal(first.base.bank.training("a").flat, weights)
    # a new environment that has not trained yet begins with these weights, and so does one that is training
    third, fourth = make("c"), make("c", "d")
    third.add_model(given)
    fourth.run_training_cycle()
    fourth.add_model(given)
    for env in (third, fourth):
        assert torch.equal(env.base.bank.training("a").flat, weights)
        env.run_training_cycle()
    asyncio.run(first.aclose())


def test_a_resumed_model_can_be_taken_along(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings(models=[A, B], updates=1, evaluation={"tasks": 0})
    first = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(first.train())
    asyncio.run(first.aclose())
    resumed = MultiModelEnvironment.resume(RunDirectory.open(tmp_path / "run"))
    other = MultiModelEnvironment(config=settings())
    for model in resumed.models.values():
        other.add_model(model)
    for model_id in ("a", "b"):
        before, after = (env.base.bank.training(model_id).flat for env in (resumed, other))
        assert torch.equal(before, after)
    asyncio.run(resumed.aclose())


def test_a_trained_model_that_is_saved_nowhere_brings_no_weights(make: MakeEnvironment) -> None:
    first = make("a", "b")
    first.run_training_cycle()
    with pytest.raises(
        ConfigError, match=r"model a@v1 brings no weights: .* saved nowhere.* or add its config to start"
    ):
        make("c").add_model(first.models["a"])
    assert make("c").add_model(first.models["a"].config).version == 0


@pytest.mark.parametrize("training", [False, True])
def test_a_saved_adapter_that_does_not_fit_is_refused(
    settings: Callable[..., RunConfig], make: MakeEnvironment, tmp_path: Path, training: bool
) -> None:
    config = settings(models=[A, B], updates=1, evaluation={"tasks": 0})
    first = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(first.train())
    asyncio.run(first.aclose())
    folder = first.models["a"].adapter_dir
    wrong = {
        r"holds a@v1, not a@v2": LoRAModel(first.models["a"].config, version=2, adapter_dir=folder),
        r"holds a@v1, not c@v1": LoRAModel(ModelConfig(model_id="c", lora_rank=4), version=1, adapter_dir=folder),
        r"has rank 4 and alpha 16, but model 'a' has lora_rank 5": LoRAModel(
            ModelConfig(model_id="a", lora_rank=5), version=1, adapter_dir=folder
        ),
        r"nowhere is not a PEFT LoRA adapter": LoRAModel(
            first.models["a"].config, version=1, adapter_dir=tmp_path / "nowhere"
        ),
    }
    for said, model in wrong.items():
        env = make("x", "y")
        if training:
            env.run_training_cycle()
        if not training:
            env.add_model(model)
        with pytest.raises(AdapterError, match=said):
            env.add_model(model) if training else env.run_training_cycle()
        if training:  # and nothing of it is left behind
            assert list(env.models) == ["x", "y"]
            env.run_training_cycle()
            assert env.add_model(ModelConfig(model_id=model.model_id)).version == 0


def test_a_run_does_not_give_an_id_to_a_second_model(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Its version 1 would be the other's."""
    config = settings(models=[A, B], updates=1, evaluation={"tasks": 0})
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(env.train())
    env.remove_model("a")
    with pytest.raises(ConfigError, match=r"'a' was used earlier in run .*; choose another id"):
        env.add_model(ModelConfig(model_id="a"))
    env.add_model(ModelConfig(model_id="a2"))
    assert list(env.models) == ["b", "a2"]
    asyncio.run(env.aclose())


def test_models_may_join_and_leave_while_training(make: MakeEnvironment) -> None:
    env = make("a", "b")
    env.run_training_cycle()
    late = env.add_model(ModelConfig(model_id="late", lora_rank=3, learning_rate=1e-3))
    env.run_training_cycle(3)
    # three models for two seats: they take turns, so the newcomer has played and learned
    assert late.weight_updates >= 1
    assert env.base.bank.training("late").flat.abs().sum() > 0
    env.remove_model("a")
    records = env.run_training_cycle()
    assert {p.model_id for p in records[0].performances} == {"b", "late"}
    assert "learn/a/loss" not in records[0].metrics
    env.remove_model("late")
    with pytest.raises(ConfigError, match="2 seats to fill, but there are 1 models; add 1 more"):
        env.run_training_cycle()
    env.remove_model("b")
    with pytest.raises(ConfigError, match="no models to train"):
        env.run_training_cycle()


def test_a_newcomer_starts_as_the_base(make: MakeEnvironment) -> None:
    env = make("a", "b")
    env.run_training_cycle()
    env.add_model(ModelConfig(model_id="late"))
    adapter = env.base.bank.training("late")
    assert all(not b.any() for b in adapter.b.values())
    assert env.models["late"].adapter.version == 0
    assert any(b.any() for b in env.base.bank.training("a").b.values())


# -- tasks --------------------------------------------------------------------------------------------------------


def test_a_users_queue_is_played_in_order_over_and_over(make: MakeEnvironment, played: list[Any]) -> None:
    env = make("a", "b", scenario=RECORDER, engine={"calibration": False})
    for name in ("first", "second", "third"):
        env.add_task(own(name))
    env.run_training_cycle(2)
    env.add_task(own("fourth"))
    env.run_training_cycle(2)
    order = [task for task, _ in played]
    each = [order[i] for i in range(0, len(order), 4)]  # four episodes of each
    assert each == ["first", "second", "third", "first", "second", "third", "first", "fourth"]
    assert env.get_environment_stats()["queued_tasks"] == 4
    assert {seats for _, seats in played} == {("a", "b")}


def test_without_a_queue_the_scenarios_tasks_are_played(make: MakeEnvironment, played: list[Any]) -> None:
    env = make("a", scenario=RECORDER, engine={"calibration": False})
    env.run_training_cycle(2)
    assert Counter(task for task, _ in played) == {f"train-{n}": 4 for n in range(4)}


@pytest.mark.parametrize("task_type", TaskType)
def test_a_task_without_content_trains(make: MakeEnvironment, task_type: TaskType) -> None:
    env = make("a", "b")
    env.add_task(own("mine", task_type=task_type, difficulty=0.3, reward_pool=2.0, cooperation_level=0.9))
    (record,) = env.run_training_cycle()
    for performance in record.performances:
        assert performance.episodes == 8
        assert list(performance.by_task_type) == [task_type]
        assert 0 <= performance.reward <= 1.0  # half the pool of two
        assert performance.score <= performance.accuracy


def test_a_task_that_needs_too_many_models_is_refused(make: MakeEnvironment) -> None:
    env = make("a", "b", max_models=2)
    with pytest.raises(ConfigError, match="task 'big' needs 3 models, but max_models is 2"):
        env.add_task(own("big", required_models=3))
    env = make("a")
    env.add_task(own("fine", required_models=1))
    env.run_training_cycle()
    env.add_task(own("pair"))
    with pytest.raises(ConfigError, match="task 'pair': the scenario has 2 seats"):
        env.run_training_cycle()


def test_a_task_that_cannot_be_played_is_refused_when_it_is_queued(make: MakeEnvironment) -> None:
    env = make("a", "b")
    with pytest.raises(ScenarioError, match=r"task 'wrong', content of a classification task: form is None"):
        env.add_task(own("wrong", content={"text": "The soup was awful."}))
    assert env.get_environment_stats()["queued_tasks"] == 0
    other = make("a", "b", scenario={"id": "signaling"})
    with pytest.raises(ScenarioError, match=r"task 'wrong': content\['target'\] is 'sun'; it must be a number 0\.\.3"):
        other.add_task(own("wrong", content={"target": "sun"}))
    other.add_task(own("right", content={"target": 3}))


def test_too_few_models_are_noticed_before_the_base_is_loaded(
    make: MakeEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.lm.base.load_base", lambda config: pytest.fail("loaded"))
    rows = tmp_path / "rows.jsonl"
    sizes = [1] * 30 + [3]
    rows.write_text(
        "\n".join(f'{{"prompt": "{i}?", "answer": "{i}", "required_models": {n}}}' for i, n in enumerate(sizes))
    )
    # one row among many needs three; whichever side it falls on and wherever it is drawn
    for seed in range(3):
        env = make("a", "b", seed=seed, scenario={"id": "jsonl", "options": {"path": str(rows)}})
        with pytest.raises(ConfigError, match="task 'line-31': the scenario has 3 seats to fill, but there are 2"):
            env.run_training_cycle()


# -- cycles -------------------------------------------------------------------------------------------------------


def test_cycles_return_their_records_and_count_what_they_did(make: MakeEnvironment) -> None:
    env = make("a", "b", learner={"loss": "clipped", "passes": 2})
    first = env.run_training_cycle(2)
    second = env.run_training_cycle()
    assert [record.update for record in (*first, *second)] == [1, 2, 3]
    for model_id, model in env.models.items():
        assert model.weight_updates == 2 * model.lora_adaptations  # two optimizer steps an update
        assert 1 <= model.lora_adaptations == model.version <= 3
        assert [p.update for p in model.performance_history] == [1, 2, 3]
        assert {p.model_id for p in model.performance_history} == {model_id}
        assert model.performance_history[-1] in second[0].performances


def test_a_model_that_learned_nothing_publishes_nothing(make: MakeEnvironment) -> None:
    """One seat always loses, another has nobody to compare with: no signal, no step, no version."""
    env = make("a", scenario=RECORDER, rollout={"tasks_per_update": 1, "group_size": 1}, mode="competitive")
    records = env.run_training_cycle(2)
    assert [record.metrics["learn/a/grad_norm"] for record in records] == [0, 0]
    assert (env.models["a"].version, env.models["a"].weight_updates, env.models["a"].lora_adaptations) == (0, 0, 0)


def test_versions_are_announced_once_before_each_update(make: MakeEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    announce, announced = TrainingLoop.announce, []

    async def noted(loop: TrainingLoop) -> None:
        announced.append(loop.update)
        await announce(loop)

    monkeypatch.setattr(TrainingLoop, "announce", noted)
    make("a", "b").run_training_cycle(3)
    assert announced == [0, 1, 2]


@pytest.mark.parametrize("cycles", [0, -1])
def test_there_is_no_less_than_one_cycle(make: MakeEnvironment, cycles: int) -> None:
    with pytest.raises(ConfigError, match=f"cycles is {cycles}"):
        make("a", "b").run_training_cycle(cycles)


def test_cycles_can_be_awaited(make: MakeEnvironment) -> None:
    env = make("a", "b")

    async def go() -> int:
        return len(await env.train_cycles(2))

    assert asyncio.run(go()) == 2


def test_it_goes_on_after_a_stop(make: MakeEnvironment) -> None:
    env = make("a", "b", updates=4, evaluation={"tasks": 0})

    class StopAtTwo(Silent):
        def update(self, record: UpdateRecord) -> None:
            if record.update == 2:
                env.request_stop()

    env.observer = StopAtTwo()
    stopped = asyncio.run(env.train())
    assert (stopped.completed, stopped.update) == (False, 2)
    done = asyncio.run(env.train())
    assert (done.completed, done.update) == (True, 4)
    assert len(env.run_training_cycle()) == 1


def test_stats_say_what_there_is_and_how_it_has_done(make: MakeEnvironment, tiny_path: Path) -> None:
    env = make(*create_team_battle_models(), mode="team_battle", scenario={"options": {"models": 4}}, max_models=6)
    stats = env.get_environment_stats()
    assert stats["training_mode"] == "team_battle"
    assert stats["scenario"] == "tasks"
    assert stats["base"] == str(tiny_path)
    assert (stats["updates"], stats["total_models"], stats["max_models"], stats["queued_tasks"]) == (0, 4, 6, 0)
    assert stats["models"]["red_1"]["last"] is None
    env.run_training_cycle()
    stats = env.get_environment_stats()
    assert stats["updates"] == 1
    red = stats["models"]["red_1"]
    assert (red["role"], red["team_id"], red["adapter"]) == ("teammate", "red", f"red_1@v{red['lora_adaptations']}")
    assert set(red["last"]) >= {"accuracy", "reward", "cooperation_score", "efficiency", "score"}
    assert red["last"]["reward"] == env.models["red_1"].performance_history[-1].reward


def test_evaluation_in_between_changes_nothing_of_the_training(make: MakeEnvironment) -> None:
    plain, watched = make("a", "b"), make("a", "b")
    expected = plain.run_training_cycle(3)
    found = watched.run_training_cycle()
    table = asyncio.run(watched.evaluate(4))
    assert table.columns[:2] == ("task type", "model")
    asyncio.run(watched.play(None, lambda seat, seen, choices: choices[0] if choices else "x", 1))
    found += watched.run_training_cycle(2)
    assert [record.metrics for record in found] == [record.metrics for record in expected]


def test_the_observer_is_told(make: MakeEnvironment) -> None:
    env = make("a", "b")
    env.observer = log = Log()
    records = env.run_training_cycle(2)
    assert log.records == records
    assert log.stages[0].startswith("loading base")
    assert any("calibrated" in note and "6 training tasks" in note for note in log.notes)


def test_a_person_takes_a_seat(make: MakeEnvironment) -> None:
    env = make("a", "b", scenario=RECORDER)
    asked: list[str] = []

    def ask(seat: str, seen: Observation, choices: Any) -> str:
        asked.append(seat)
        return "no"

    episode = asyncio.run(env.play("s0", ask, 3))
    assert asked == ["s0"]
    assert episode.task.task_id == "heldout-3"
    assert episode.trajectories["s0"].turns[0].text == "no"
    assert not episode.trajectories["s0"].turns[0].trainable
    with pytest.raises(ConfigError, match="there is no seat 'nowhere'; seats: s0"):
        asyncio.run(env.play("nowhere", ask, 0))


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_a_server_url_is_a_server_of_the_run(settings: Callable[..., RunConfig]) -> None:
    url = "http://localhost:8000/v1"
    for env in (MultiModelEnvironment(url), MultiModelEnvironment(url, config=settings())):
        assert [server.url for server in env.config.inference.servers] == [url]
    twice = settings(inference={"servers": [{"url": url}]})
    with pytest.raises(ConfigError, match=r"servers are named in both vllm_url and config\.inference\.servers"):
        MultiModelEnvironment(url, config=twice)
    with pytest.raises(ConfigError, match="server url 'localhost:8000'"):
        MultiModelEnvironment("localhost:8000")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"training_mode": "cooperating"}, r"mode: .*'cooperating'"),
        ({"max_models": 0}, "max_models: .*got 0"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MultiModelEnvironment(**arguments)


def test_no_models() -> None:
    with pytest.raises(ConfigError, match=r"no models to train; add_model\(ModelConfig"):
        MultiModelEnvironment().run_training_cycle()


def test_a_team_battle_needs_teams() -> None:
    env = MultiModelEnvironment(training_mode=TrainingMode.TEAM_BATTLE)
    with pytest.raises(ConfigError, match="needs a team_id for every model; 'alone' has none"):
        env.add_model(ModelConfig(model_id="alone"))
    for config in create_cooperative_team():
        env.add_model(config)
    with pytest.raises(ConfigError, match="at least two different team_id"):
        env.run_training_cycle()


def test_failed_episodes_are_counted_and_too_many_end_the_training(make: MakeEnvironment, played: list[Any]) -> None:
    def with_failures(share: float) -> MultiModelEnvironment:
        env = make(
            "a",
            scenario=RECORDER,
            rollout={"tasks_per_update": 2, "group_size": 3, "max_failed_share": share},
            engine={"calibration": False},
        )
        env.add_task(own("good", required_models=1, content={"n": 1}))
        env.add_task(own("bad", required_models=1, content={"broken": True}))
        return env

    (record,) = with_failures(0.5).run_training_cycle()
    assert record.metrics["episodes/failed_share"] == 0.5
    assert record.metrics["episodes/played"] == 3
    with pytest.raises(ScenarioError, match=r"3 of 6 episodes failed.*3 times: ArithmeticError: cannot count"):
        with_failures(0.4).run_training_cycle()


def test_an_overlong_task_costs_its_own_episodes_only(make: MakeEnvironment, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}?", "answer": "{n}"}}\n' for n in range(20)))
    env = make(
        "a",
        scenario={"id": "jsonl", "options": {"path": str(rows)}},
        rollout={"tasks_per_update": 2, "group_size": 3, "max_failed_share": 0.5},
        engine={"calibration": False, "cache_tokens": 256},
    )
    env.add_task(own("short", required_models=1, content={"prompt": "Well?", "answer": "yes"}))
    env.add_task(own("long", required_models=1, content={"prompt": "and so on " * 300, "answer": "yes"}))
    (record,) = env.run_training_cycle()
    assert (record.metrics["episodes/played"], record.metrics["episodes/failed_share"]) == (3, 0.5)


def test_a_scenario_without_training_tasks_is_named(make: MakeEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "tasks", lambda self, split, seed: iter(()))
    with pytest.raises(ScenarioError, match="no training task"):
        make("a", scenario=RECORDER).run_training_cycle()


@pytest.mark.parametrize("scenario", [{}, {"id": "matrix"}])  # with right answers, and without
def test_a_resumed_run_has_its_history(
    settings: Callable[..., RunConfig], tmp_path: Path, scenario: dict[str, Any]
) -> None:
    models = [{"model_id": "a"}, {"model_id": "a.b"}, {"model_id": "c"}]  # more than seats: not all play every update
    tables = {"scenario": scenario} if scenario else {}
    rollout = {"tasks_per_update": 1, "group_size": 4}
    config = settings(models=models, updates=3, evaluation={"tasks": 0}, rollout=rollout, **tables)
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(env.train())
    asyncio.run(env.aclose())
    assert [len(model.performance_history) for model in env.models.values()] == [2, 2, 2]
    run = RunDirectory.open(tmp_path / "run")
    with run.metrics_path.open("a") as file:  # past the checkpoint: done again, so no part of the history yet
        file.write(json.dumps({"update": 4, "seconds": {}, "metrics": {"play/a/episodes": 1.0}}) + "\n")
    again = MultiModelEnvironment.resume(run)
    for model_id, model in env.models.items():
        assert again.models[model_id].performance_history == model.performance_history
    assert again.get_environment_stats()["models"]["a"] == env.get_environment_stats()["models"]["a"]
    asyncio.run(again.aclose())


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"models": [{"model_id": "a", "lora_rank": 16}, B]}, "lora_rank of model 'a' is 16, in the checkpoint 4"),
    "alpha": ({"models": [A, {"model_id": "b", "lora_alpha": 1.0}]}, "lora_alpha of model 'b' is 1.0, in the ch"),
    "targets": (
        {"base": {"lora_targets": ["v_proj"]}},
        r"base.lora_targets is ['v_proj'], in the checkpoint ['k_proj', 'q_proj']; put the old values back",
    ),
    "layers": ({"base": {"lora_layers": 0.5}}, "base.lora_layers is 0.5, in the checkpoint 1.0"),
    "another model": ({"models": [A, B, {"model_id": "c"}]}, "models is a, b, c, in the checkpoint a, b"),
    "several": (
        {"models": [{"model_id": "a", "lora_rank": 5}], "base": {"lora_layers": 0.5}},
        "models is a, in the checkpoint a, b; base.lora_layers is 0.5, in the checkpoint 1.0; lora_rank of model 'a'",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_config_that_no_longer_fits_the_checkpoint_is_told_before_loading(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: str
) -> None:
    config = settings(models=[A, B], updates=1, evaluation={"tasks": 0})
    base = config.base.model_copy(update={"lora_targets": ("q_proj", "k_proj")})
    config = config.model_copy(update={"base": base})
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(env.train())
    asyncio.run(env.aclose())
    changes, said = EDITS[edit]
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    changed = {**written, **changes, "base": {**written["base"], **changes.get("base", {})}}
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(changed))
    monkeypatch.setattr("coterie.lm.base.load_base", lambda config: pytest.fail("loaded"))
    with pytest.raises(ConfigError) as refused:
        MultiModelEnvironment.resume(RunDirectory.open(tmp_path / "run"))
    assert "config.toml no longer fits the checkpoint after update 1: " in str(refused.value)
    assert said in str(refused.value)


def test_what_may_change_between_two_processes_does_not_hinder_resume(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = settings(models=[A, B], updates=1, evaluation={"tasks": 0})
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    asyncio.run(env.train())
    asyncio.run(env.aclose())
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    written["updates"], written["models"][0]["learning_rate"] = 2, 1e-4
    written["base"]["lora_targets"].reverse()
    (tmp_path / "run" / "config.toml").write_text(tomli_w.dumps(written))
    env = MultiModelEnvironment.resume(RunDirectory.open(tmp_path / "run"))
    assert asyncio.run(env.train()).update == 2
    asyncio.run(env.aclose())


def test_a_run_whose_disk_is_full_says_so_and_goes_on_from_what_was_saved(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = settings(models=[A, B], updates=3, evaluation={"tasks": 0}, run={"checkpoint_every": 1})
    path = tmp_path / "run"

    class Full(Silent):
        def update(self, record: UpdateRecord) -> None:
            if record.update == 2:
                # checkpoints are the largest files, adapters the next
                largest = max(file.stat().st_size for file in path.rglob("*.safetensors"))
                limit.enter_context(no_file_above(largest - 1))

    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(path, config), observer=Full())
    with ExitStack() as limit, pytest.raises(RunFolderError, match=r"cannot write checkpoint .*000002: .*; make room"):
        asyncio.run(env.train())
    env.close()
    run = RunDirectory.open(path)
    assert run.checkpoints() == [1]
    assert not run.checkpoint_dir(2).exists()
    again = MultiModelEnvironment.resume(run)
    assert asyncio.run(again.train()).update == 3
    again.close()
    assert run.checkpoints() == [1, 2, 3]


def test_a_closed_environment_lets_go_of_its_run(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings(models=[{"model_id": "a"}, {"model_id": "b"}])
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(tmp_path / "run", config))
    env.run_training_cycle()
    env.close()
    asyncio.run(env.aclose())
    again = MultiModelEnvironment.resume(RunDirectory.open(tmp_path / "run"))
    assert [record.update for record in again.run_training_cycle()] == [2]
    asyncio.run(again.aclose())
