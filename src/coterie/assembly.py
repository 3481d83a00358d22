"""Putting a run together: from settings and rules, which are light, to a loop that can train, which is not.

    base -> an adapter for every model -> engines -> runner (scenario at tables) -> learner -> TrainingLoop

Importing this imports torch; whoever must answer at once imports it late.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from coterie.credit.base import Magnetised
from coterie.errors import AdapterError
from coterie.evaluation import Evaluator
from coterie.inference.canary import Probe
from coterie.inference.deployment import Deployment, Weights
from coterie.inference.local.engine import LocalEngine
from coterie.inference.simulated import SimulatedEngine
from coterie.lm.adapters import restore_adapter, save_adapter
from coterie.lm.base import BaseModel, load_base
from coterie.lm.forest import pack
from coterie.loop import TaskQueue, TrainingLoop
from coterie.models import LoRAModel
from coterie.monitor.console import Observer
from coterie.monitor.records import CallRecords
from coterie.rollout.runner import Runner
from coterie.rollout.table import TableServices, stable_seed
from coterie.runs.directory import RunDirectory
from coterie.runs.state import Parts
from coterie.scenarios.base import HasScripts, Scenario
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, Observation, TrainingTask

PROBE_TOKENS = 24
"""Of the canary that tells whether a server applies an adapter as the learner does."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """What a run trains with."""

    base: BaseModel
    loop: TrainingLoop
    deployment: Deployment
    calls: CallRecords | None
    """Of runs with servers."""


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
        run: where records of calls go, and adapters for servers to read; None: nowhere, and a temporary directory.

    Raises:
        ConfigError: the settings of a server.
        BaseModelError: the base cannot be found or used.
        AdapterError: the saved adapter of a model that goes on does not fit it or the base.
    """
    config = parts.config
    base = load_base(config.base)
    for model in parts.models.values():
        add_adapter(base, model, config.seed)
    inference = config.inference
    local = LocalEngine(
        base,
        cache_tokens=config.engine.cache_tokens,
        tokens_per_pass=config.engine.tokens_per_pass,
        kept_versions=inference.staleness,
    )
    simulated = SimulatedEngine(lambda text: tuple(base.chat.tokenizer.encode(text, add_special_tokens=False)))
    path = run.calls_path if run is not None else None
    calls = CallRecords(path, inference.metrics_port) if inference.servers else None
    engine = Deployment(
        inference,
        inside=(local, simulated),
        weights=Weights(save=partial(_save, base), probe=partial(_probe, base)),
        calls=calls,
        decode=base.chat.tokenizer.decode,
        root=run.path / "published" if run is not None else None,
        seed=config.seed,
        base=config.base.model,
        on_change=observer.note,
    )
    services = TableServices(
        engine=engine,
        chat=base.chat,
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
    magnet = parts.credit.magnet if isinstance(parts.credit, Magnetised) else None
    tasks = TaskQueue(scenario, config.seed, start * config.rollout.tasks_per_update)
    for task in own_tasks:
        tasks.add(task)
    loop = TrainingLoop(
        config=config,
        models=models,
        mode=parts.mode,
        credit=parts.credit,
        engine=engine,
        learner=Learner(base, [m.config for m in models], config.learner, config.updates, magnet),
        runner=runner,
        tasks=tasks,
        evaluator=Evaluator(runner, models, config.seed, config.rollout.rotate_seats, config.rollout.max_failed_share),
        observer=observer,
        update=start,
        concurrent=engine.remote,
        calls=calls.metrics if calls is not None else None,
    )
    return Assembled(base, loop, engine, calls)


def _save(base: BaseModel, version: AdapterVersion, directory: Path) -> None:
    save_adapter(base.bank.training(version.model_id), directory, base, version)


def _probe(base: BaseModel, version: AdapterVersion) -> Probe:
    """Some tokens, and the log-probability of each after the first under the adapter in training, temperature 1."""
    tokens = base.chat.render(Observation(user="Say which of these is a colour: stone, blue, seven."))[:PROBE_TOKENS]
    forest = pack([(0, tokens)])
    with torch.no_grad():
        hidden = base.hidden(
            torch.from_numpy(forest.token_ids).to(base.device),
            torch.from_numpy(forest.positions).to(base.device),
            forest.plan(),
            [(base.bank.training(version.model_id), 0, len(tokens))],
        )
        logprobs = base.logits(hidden[:-1]).log_softmax(-1)
    after = torch.tensor(tokens[1:], device=logprobs.device)
    return tokens, tuple(logprobs.gather(1, after[:, None])[:, 0].tolist())


def add_adapter(base: BaseModel, model: LoRAModel, seed: int) -> None:
    """Give a model an adapter in training: the one saved where it stands, or, for a new model, one equal to the base.

    Raises:
        AdapterError: the saved one does not fit; the bank is then as it was.
    """
    c = model.config
    adapter = base.bank.add(c.model_id, c.lora_rank, c.lora_alpha, stable_seed(seed, "adapter", c.model_id) % 2**63)
    if model.version and model.adapter_dir is not None:
        try:
            restore_adapter(adapter, model.adapter_dir, base, model.adapter)
        except AdapterError:
            base.bank.remove(c.model_id)
            raise
    base.bank.publish(model.adapter)
