"""Putting a run together: from settings and rules, which are light, to a loop that can train, which is not.

    policies (base, an adapter for every model, learner) -> engines -> runner (scenario at tables) -> TrainingLoop

torch is imported where policies that can be trained are made, and where it is missing they are ones that cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from coterie.config import RunConfig
from coterie.credit.base import Magnet, Magnetised
from coterie.errors import BaseModelError
from coterie.evaluation import Evaluator
from coterie.inference.deployment import Deployment
from coterie.inference.simulated import SimulatedEngine
from coterie.lm.needed import missing_packages
from coterie.loop import TaskQueue, TrainingLoop
from coterie.models import LoRAModel
from coterie.monitor.console import Observer
from coterie.monitor.records import CallRecords
from coterie.rollout.runner import Runner
from coterie.rollout.table import TableServices, stable_seed
from coterie.runs.directory import RunDirectory
from coterie.runs.state import Parts
from coterie.runs.writer import RunWriter
from coterie.scenarios.base import HasScripts, Scenario
from coterie.training.base import Policies
from coterie.types import ModelId, TrainingTask

if TYPE_CHECKING:
    from coterie.training.policies import TrainedPolicies


@dataclass(frozen=True, slots=True)
class Assembled:
    """What a run trains with."""

    policies: Policies
    loop: TrainingLoop
    deployment: Deployment
    calls: CallRecords | None
    """Of runs with servers."""
    writer: RunWriter | None
    """Of runs that are kept."""

    @property
    def trained(self) -> TrainedPolicies:
        """The models as weights. Raises `BaseModelError` where there are none."""
        if self.policies.untrained:
            raise BaseModelError(self.policies.untrained)
        return cast("TrainedPolicies", self.policies)

    async def close(self) -> None:
        """Let go of engines, servers, records and the run's database. Closing twice is fine."""
        await self.deployment.close()
        if self.calls is not None:
            self.calls.close()
        if self.writer is not None:
            self.writer.close()


def policies_of(config: RunConfig, models: Iterable[LoRAModel], magnet: Magnet | None = None) -> Policies:
    """Models that are trained, or, without torch, models that only play.

    Raises:
        BaseModelError: the base cannot be found or used.
        AdapterError: the saved adapter of a model that goes on does not fit it or the base.
    """
    if missing := missing_packages():
        from coterie.training.untrained import UntrainedPolicies

        return UntrainedPolicies(config, missing)

    from coterie.training.policies import TrainedPolicies

    def seed_of(model_id: ModelId) -> int:
        return stable_seed(config.seed, "adapter", model_id) % 2**63

    return TrainedPolicies(config, models, seed_of, magnet)


def assemble(
    scenario: Scenario,
    parts: Parts,
    own_tasks: Iterable[TrainingTask],
    observer: Observer,
    start: int,
    run: RunDirectory | None = None,
) -> Assembled:
    """Load the base and put the parts together.

    Args:
        parts: they stay the caller's, and the loop changes them.
        own_tasks: the user's queue; empty: the scenario's tasks are trained on.
        start: updates that are done already.
        run: where the run is kept, with records of calls and adapters for servers to read; None: nowhere, and adapters
            in a temporary directory.

    Raises:
        ConfigError: the settings of a server.
        BaseModelError: the base cannot be found or used.
        AdapterError: the saved adapter of a model that goes on does not fit it or the base.
    """
    config = parts.config
    magnet = parts.credit.magnet if isinstance(parts.credit, Magnetised) else None
    policies = policies_of(config, parts.models.values(), magnet)
    chat = policies.chat
    inference = config.inference
    simulated = SimulatedEngine(lambda text: tuple(chat.tokenizer.encode(text, add_special_tokens=False)))
    path = run.calls_path if run is not None else None
    calls = CallRecords(path, inference.metrics_port) if inference.servers else None
    engine = Deployment(
        inference,
        inside=(simulated,) if policies.local is None else (policies.local, simulated),
        weights=policies.weights,
        calls=calls,
        decode=chat.tokenizer.decode,
        root=run.path / "published" if run is not None else None,
        seed=config.seed,
        base=config.base.model,
        on_change=observer.note,
    )
    services = TableServices(
        engine=engine,
        chat=chat,
        mode=parts.mode,
        scripts=scenario.scripts if isinstance(scenario, HasScripts) else {},
        calibration=parts.calibration,
        temperature=config.rollout.temperature,
        language=config.rollout.language,
        seed=config.seed,
        episode_timeout_s=config.rollout.episode_timeout_s,
    )
    runner = Runner(scenario, services)
    models = list(parts.models.values())
    tasks = TaskQueue(scenario, config.seed, start * config.rollout.tasks_per_update)
    for task in own_tasks:
        tasks.add(task)
    loop = TrainingLoop(
        config=config,
        models=models,
        mode=parts.mode,
        credit=parts.credit,
        engine=engine,
        learner=policies.learner,
        runner=runner,
        tasks=tasks,
        evaluator=Evaluator(
            runner,
            models,
            config.seed,
            config.rollout.rotate_seats,
            config.rollout.max_failed_share,
            config.evaluation.temperature,
        ),
        observer=observer,
        update=start,
        concurrent=engine.remote,
        calls=calls.metrics if calls is not None else None,
    )
    made = Assembled(policies, loop, engine, calls, RunWriter(run, start) if run is not None else None)
    if made.writer is not None:
        loop.keep = made.writer.keep
    if policies.untrained:
        observer.warning(policies.untrained)
    elif run is not None:
        loop.save = _saving(run, parts, made.trained, observer)
    return made


def _saving(run: RunDirectory, parts: Parts, trained: TrainedPolicies, observer: Observer) -> Callable[[int], None]:
    """What saves the run after an update."""
    from coterie.runs.checkpoint import RunSaver

    saver = RunSaver(run, parts, trained)
    return lambda update: observer.note(f"saved {saver.save(update)}")
