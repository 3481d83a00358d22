"""The system as a user holds it: models, tasks, a mode, and cycles of training.

    env = MultiModelEnvironment(training_mode=TrainingMode.COOPERATIVE)
    for config in create_cooperative_team():
        env.add_model(config)
    env.run_training_cycle(cycles=5)
    print(env.get_environment_stats())

The command line drives the same class: `from_config` for a new run, `resume` for one that goes on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from coterie.config import RunConfig, check_models, parse_config, with_server
from coterie.credit.base import build_credit
from coterie.errors import BaseModelError, ConfigError, RunFolderError
from coterie.inference.deployment import server_specs
from coterie.lm.needed import need_packages
from coterie.models import LoRAModel, ModelConfig
from coterie.modes.base import build_mode
from coterie.monitor.console import Observer, Silent
from coterie.monitor.metrics import UpdateRecord, history_of
from coterie.monitor.tables import ResultTable
from coterie.rollout.calibration import Calibration
from coterie.rollout.matchmaking import check_seats, with_person
from coterie.rollout.runner import Plan, with_services
from coterie.rollout.table import Ask
from coterie.runs.directory import RunDirectory
from coterie.runs.sinks import MetricsFile
from coterie.runs.state import Parts, check_fits
from coterie.scenarios.base import ChecksTasks, ExactlyMeasured, build_scenario, first_tasks, heldout_task
from coterie.types import Episode, ModelId, SeatId, Split, TrainingMode, TrainingTask

if TYPE_CHECKING:
    from coterie.assembly import Assembled
    from coterie.evaluation import Evaluation
    from coterie.lm.base import BaseModel
    from coterie.loop import TrainingLoop


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a training ended."""

    completed: bool
    """False when it was stopped before its last update."""
    update: int
    table: ResultTable | None = None
    results: dict[str, Any] = field(default_factory=dict)
    untrained: str = ""
    """Why nothing was trained; empty: it was."""


class MultiModelEnvironment:
    """Several LoRA policies on one base, trained together in one scenario."""

    def __init__(
        self,
        vllm_url: str | None = None,
        training_mode: TrainingMode | str = TrainingMode.COOPERATIVE,
        max_models: int = 10,
        *,
        config: RunConfig | None = None,
        observer: Observer | None = None,
        run_dir: RunDirectory | None = None,
    ) -> None:
        """
        Args:
            vllm_url: a vLLM server that generates turns; more, and everything else about them, go into
                config.inference. Without any the engine inside the process generates.
            training_mode: who hears whom and how rewards are divided.
            max_models: most models `add_model` accepts.
            config: everything else (scenario, base, rollout, learner, …); its mode and max_models are used
                instead of the two arguments above.
            observer: is told what happens; None: nobody.
            run_dir: where to keep the run; None: nothing is written.

        Raises:
            ConfigError: an impossible setting, or servers in both vllm_url and config.
        """
        if config is None:
            config = parse_config({"mode": training_mode, "max_models": max_models}, source="arguments")
        if vllm_url is not None:
            config = with_server(config, vllm_url)
        server_specs(config.inference.servers)  # a bad url or a missing key is said before anything long starts
        self.config = config
        self.observer: Observer = observer or Silent()
        self.run_dir = run_dir
        self.scenario = build_scenario(config.scenario.id, config.scenario.options)
        if config.evaluation.until and not isinstance(self.scenario, ExactlyMeasured):
            raise ConfigError(f"evaluation.until: scenario {config.scenario.id!r} has no exact metrics; leave it out")
        self.mode = build_mode(config.mode, config.custom_mode)
        self.credit = build_credit(config.credit, config.mode)
        self.calibration = Calibration()
        self.models: dict[ModelId, LoRAModel] = {}
        self._own_tasks: list[TrainingTask] = []
        self._loop: TrainingLoop | None = None
        self._made: Assembled | None = None
        self._stopping = False
        self._seats_fit = False
        for model in config.models:
            self.add_model(model)

    @classmethod
    def from_config(
        cls, config: RunConfig, *, run_dir: RunDirectory | None = None, observer: Observer | None = None
    ) -> MultiModelEnvironment:
        """The environment of a whole run config, with its base loaded."""
        env = cls(config=config, observer=observer, run_dir=run_dir)
        env._ready()
        return env

    @classmethod
    def resume(cls, run_dir: RunDirectory, observer: Observer | None = None) -> MultiModelEnvironment:
        """A stopped run, at its latest checkpoint.

        Raises:
            RunFolderError: it has no checkpoint, or a damaged one.
            ConfigError: its config.toml was edited where the checkpoint's adapters do not allow it.
            BaseModelError: its base is another one now.
        """
        need_packages(f"going on with run {run_dir.path}, whose checkpoint holds weights,")
        from coterie.runs.checkpoint import load_checkpoint

        folder = run_dir.latest_checkpoint()
        if folder is None:
            raise RunFolderError(f"run {run_dir.path} has no checkpoint to go on from")
        checkpoint = load_checkpoint(folder)
        check_fits(run_dir, checkpoint.update, checkpoint.state)
        env = cls(config=run_dir.config, observer=observer, run_dir=run_dir)
        env._parts().restore(checkpoint.state)
        env.build(start=checkpoint.update)
        made = env._assembled
        if made.trained.base.fingerprint != checkpoint.state["base_fingerprint"]:
            raise BaseModelError(
                f"run {run_dir.path} was trained on another base model than {made.trained.base.path}; "
                "put the original back, or start a new run"
            )
        made.trained.learner.restore(checkpoint.tensors)
        entries = MetricsFile.read(run_dir.metrics_path)  # building cut off what is past the checkpoint
        for model in env.models.values():
            model.performance_history = history_of(model.model_id, entries)
            model.adapter_dir = run_dir.adapter_dir(model.adapter)
        return env

    # -- models and tasks ---------------------------------------------------------------------------------------

    def add_model(self, model: ModelConfig | LoRAModel) -> LoRAModel:
        """Add a policy, and return it as this environment trains it.

        A `ModelConfig` is a new policy: version 0, equal to the base. A `LoRAModel` goes on where it stands: version,
        counters, history (whose updates are numbered as they were) and the weights saved in its `adapter_dir`; the
        optimizer starts afresh. The object given is not changed.

        Raises:
            ConfigError: id in use, or used before in this run; more than max_models, another base, no team in a
                battle, or a trained model whose current version is saved nowhere.
            AdapterError: the saved adapter does not fit the model or this base; when the base is loaded already,
                else when it is.
        """
        added = LoRAModel(model) if isinstance(model, ModelConfig) else replace(model)
        added.performance_history = [*added.performance_history]
        config = added.config
        others = [m.config for m in self.models.values()]
        try:
            check_models([*others, config], self.config.max_models, self.config.mode, complete=False)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if config.model_name not in (None, self.config.base.model):
            raise ConfigError(
                f"model {config.model_id!r} names base {config.model_name!r}, but this run's base is "
                f"{self.config.base.model!r}; all policies of a run share one base (set base.model)"
            )
        if added.version and added.adapter_dir is None:
            raise ConfigError(
                f"model {added.adapter.name} brings no weights: this version is saved nowhere. Train it in a run "
                "folder (run_dir) and add it after it was saved, set its adapter_dir, or add its config to start anew"
            )
        if self._loop is not None:
            if self.run_dir is not None and self.run_dir.holds_adapters(config.model_id):
                raise ConfigError(
                    f"model_id {config.model_id!r} was used earlier in run {self.run_dir.path}, which keeps its "
                    "adapter versions; choose another id"
                )
            self._assembled.policies.add(added)
            self._loop.models.append(added)
        self.models[config.model_id] = added
        self._seats_fit = False
        return added

    def remove_model(self, model_id: ModelId) -> None:
        """Take a policy out of training. Raises `ConfigError` when there is none of that id."""
        if model_id not in self.models:
            raise ConfigError(f"there is no model {model_id!r}; models: {', '.join(self.models) or 'none'}")
        model = self.models.pop(model_id)
        self._seats_fit = False
        if self._loop is not None:
            self._loop.models.remove(model)
            self._assembled.policies.remove(model_id)

    def add_task(self, task: TrainingTask) -> None:
        """Put a task into the user's queue; once it has one, training plays only the queue, over and over.

        Raises:
            ConfigError: it needs more models than there may be.
            ScenarioError: its content is not what the scenario can play; says which key, and what is expected.
        """
        if task.required_models > self.config.max_models:
            raise ConfigError(
                f"task {task.task_id!r} needs {task.required_models} models, but max_models is {self.config.max_models}"
            )
        if isinstance(self.scenario, ChecksTasks):
            self.scenario.check_task(task)
        self._own_tasks.append(task)
        self._seats_fit = False
        if self._loop is not None:
            self._loop.tasks.add(task)

    # -- training -----------------------------------------------------------------------------------------------

    def run_training_cycle(self, cycles: int = 1) -> list[UpdateRecord]:
        """Train for `cycles` updates and return their records. Inside a running event loop await `train_cycles`."""

        async def train() -> list[UpdateRecord]:
            try:
                return await self.train_cycles(cycles)
            finally:
                if self._made is not None:
                    await self._made.deployment.rest()  # connections do not outlive their event loop

        return asyncio.run(train())

    async def train_cycles(self, cycles: int = 1) -> list[UpdateRecord]:
        """Train for `cycles` updates and return their records."""
        if cycles < 1:
            raise ConfigError(f"cycles is {cycles}; it must be at least 1")
        loop = await self._training()
        before = len(loop.records)
        try:
            await loop.run(loop.update + cycles)
        finally:
            self._stopping = loop.stopping = False
        return loop.records[before:]

    async def train(self) -> TrainSummary:
        """Do what is left of the config's updates, then evaluate."""
        loop = await self._training()
        try:
            if not await loop.run(self.config.updates):
                return TrainSummary(False, loop.update)
            stopped = self._stopping
        finally:
            self._stopping = loop.stopping = False
        if self.untrained:
            self.observer.warning(self.untrained)  # again: the first one is far up by now
            return TrainSummary(True, loop.update, untrained=self.untrained)
        count = self.config.evaluation.tasks
        if count == 0 or stopped:
            return TrainSummary(True, loop.update)
        found = await self._evaluate(count, Split.HELDOUT)
        results = found.as_dict()
        if self.run_dir is not None:
            self.run_dir.write_results("heldout", results)
        return TrainSummary(True, loop.update, found.table(), results)

    def request_stop(self) -> None:
        """Finish the current update, save, and return from `train` or `train_cycles`; the next call goes on."""
        self._stopping = True
        if self._loop is not None:
            self._loop.stopping = True

    async def evaluate(self, tasks: int, split: Split = Split.HELDOUT) -> ResultTable:
        """Measure the bare base, the calibrated base and the trained models on `tasks` tasks."""
        return (await self.measure(tasks, split)).table()

    async def measure(self, tasks: int, split: Split = Split.HELDOUT) -> Evaluation:
        """As `evaluate`, but the figures themselves."""
        loop = self._ready()
        await self._calibrate(loop)
        await loop.announce()
        return await self._evaluate(tasks, split)

    async def play(self, seat: SeatId | None, ask: Ask, task_index: int) -> Episode:
        """Play held-out task `task_index` with a person in `seat` (None: the last seat); `ask` gets the answers."""
        loop = self._ready()
        task = heldout_task(self.scenario, self.config.seed, task_index)
        await loop.announce()
        holders = loop.runner.seating(task, list(self.models.values()), 0, rotate=False)
        holders = with_person(holders, seat if seat is not None else list(holders)[-1])
        runner = with_services(loop.runner, ask=ask)
        return await runner.one(Plan(task, holders, f"play.{task_index}", "play", loop.update))

    def get_environment_stats(self) -> dict[str, Any]:
        """What there is and how it has done: mode, scenario, updates, why nothing is trained ("untrained", empty where
        it is), tiers, and every model's settings and last figures."""
        return {
            "training_mode": str(self.config.mode),
            "scenario": self.config.scenario.id,
            "base": self.config.base.model,
            "updates": self._loop.update if self._loop else 0,
            "untrained": self.untrained,
            "total_models": len(self.models),
            "max_models": self.config.max_models,
            "queued_tasks": len(self._own_tasks),
            "tiers": {
                str(status.tier): "up" if status.up else f"down: {status.why}"
                for status in (self._made.deployment.status() if self._made is not None else ())
            },
            "calls": self._made.calls.metrics() if self._made is not None and self._made.calls is not None else {},
            "models": {model_id: model.stats() for model_id, model in self.models.items()},
        }

    async def aclose(self) -> None:
        """Take adapters down from servers, let go of engine and database. Training again builds nothing new, so this
        comes last."""
        if self._made is not None:
            await self._made.close()

    def close(self) -> None:
        """As `aclose`, outside an event loop."""
        asyncio.run(self.aclose())

    # -- building -----------------------------------------------------------------------------------------------

    @property
    def base(self) -> BaseModel:
        """The loaded base model. Raises `BaseModelError` where there is none, because torch is missing."""
        self._ready()
        return self._assembled.trained.base

    @property
    def untrained(self) -> str:
        """Why no weight can move in this run; empty: weights are trained, or it is not known before the first cycle."""
        return self._made.policies.untrained if self._made is not None else ""

    def build(self, start: int = 0) -> TrainingLoop:
        """Load the base and put the parts together; `start` updates are done already. Without torch the run only plays,
        and says so."""
        from coterie.assembly import assemble

        self.observer.stage(f"loading base {self.config.base.model}")
        parts = self._parts()
        made = assemble(self.scenario, parts, self._own_tasks, self.observer, start, self.run_dir)
        self._loop, self._made = made.loop, made
        self._loop.stopping = self._stopping
        return self._loop

    @property
    def _assembled(self) -> Assembled:
        assert self._made is not None
        return self._made

    def _parts(self) -> Parts:
        return Parts(self.config, self.models, self.mode, self.credit, self.calibration)

    def _ready(self) -> TrainingLoop:
        if not self._seats_fit:
            self._check_seats()
            self._seats_fit = True
        if self._loop is None:
            self.build()
        assert self._loop is not None
        return self._loop

    def _check_seats(self) -> None:
        """Before anything long: enough models for the tasks, teams where the mode needs them."""
        if not self.models:
            raise ConfigError("there are no models to train; add_model(ModelConfig(...)), or a preset in the config")
        try:
            check_models([m.config for m in self.models.values()], self.config.max_models, self.config.mode)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        check_seats(
            self.scenario, self._own_tasks or first_tasks(self.scenario, self.config.seed), list(self.models.values())
        )

    async def _training(self) -> TrainingLoop:
        """The loop, ready for an update."""
        loop = self._ready()
        scarce = self._assembled.policies.scarce
        if scarce and not loop.records:
            self.observer.warning(scarce)
        await self._calibrate(loop)
        return loop

    async def _calibrate(self, loop: TrainingLoop) -> None:
        """Find the biases of choices, once and before the first update."""
        if not self.config.engine.calibration or self.calibration.biases or loop.update:
            return
        self.observer.stage("calibrating choices")
        tasks = loop.tasks.peek(self.config.engine.calibration_tasks)
        count = await loop.runner.calibrate(tasks, list(self.models.values()), self.config.rollout.rotate_seats)
        self.observer.note(f"calibrated {count} choice sets on {len(tasks)} training tasks")

    async def _evaluate(self, count: int, split: Split) -> Evaluation:
        loop = self._ready()
        self.observer.stage("evaluating")
        return await loop.evaluator.all(count, split, self.observer.progress)
