"""Steps of scenarios.py, each in a process of its own: training some models alone, measuring models of several runs.

    python benchmarks/scenario_steps.py SPEC.json

The spec says what to do ("alone", "together" or "matches"), with which config, and where what it came to is written.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
"""{"mean": …, "by_model": {…}, "exact": {…}, "outcome": {…}} of one condition."""


def work(spec: Mapping[str, Any]) -> None:
    """Do what a step's file says, and write what it came to."""
    from coterie.config import load_config

    config = load_config(Path(spec["config"]), spec["changes"])
    figures: Any
    if spec["do"] == "alone":
        figures = asyncio.run(learn_alone(config, spec["learners"], Path(spec["folder"])))
    elif spec["do"] == "matches":
        figures = asyncio.run(play_matches(Path(spec["folder"])))
    else:
        origin = {model: Path(folder) for model, folder in spec["origin"].items()}
        figures = asyncio.run(play_together(config, origin))
    out = Path(spec["out"])
    aside = out.with_suffix(".part")
    aside.write_text(json.dumps(figures), encoding="utf-8")
    aside.rename(out)


async def learn_alone(config: Any, learners: Sequence[str], folder: Path) -> Figures:
    """Train a run in which all others hold their seats as the base, and measure it so."""
    from coterie.environment import MultiModelEnvironment
    from coterie.monitor.console import observer_for
    from coterie.rollout.matchmaking import frozen_as
    from coterie.rollout.runner import Runner
    from coterie.runs.directory import RunDirectory

    shutil.rmtree(folder, ignore_errors=True)
    observer = observer_for(sys.stdout)
    env = MultiModelEnvironment.from_config(config, run_dir=RunDirectory.create(folder, config), observer=observer)
    others = {model: None for model in env.models if model not in learners}

    class Alone(Runner):
        def seating(self, task: Any, models: Any, turn: int, rotate: bool) -> Any:
            return frozen_as(super().seating(task, models, turn, rotate), others)

    loop = env.build()
    loop.runner = Alone(loop.runner.scenario, loop.runner.services)
    try:
        summary = await env.train()
    finally:
        observer.close()
        await env.aclose()
    moved = [model for model in others if env.models[model].version]
    assert not moved, f"{moved} were to stay the base"
    figures: Figures = summary.results["players"]["trained"]
    return figures


async def play_together(config: Any, origin: Mapping[str, Path]) -> Figures:
    """Measure models that each come from the last checkpoint of a run of their own."""
    from coterie.environment import MultiModelEnvironment
    from coterie.models import LoRAModel
    from coterie.runs.directory import RunDirectory
    from coterie.types import AdapterVersion

    env = MultiModelEnvironment(config=config.model_copy(update={"models": ()}))
    for model in config.models:
        run = RunDirectory.open(origin[model.model_id])
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None, f"{run.path} has no checkpoint"
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        version = AdapterVersion(model.model_id, state["models"][model.model_id]["version"])
        env.add_model(LoRAModel(model, version=version.version, adapter_dir=run.adapter_dir(version)))
    try:
        measured = (await env.measure(config.evaluation.tasks)).as_dict()
    finally:
        await env.aclose()
    figures: Figures = measured["players"]["trained"]
    return figures


async def play_matches(folder: Path) -> Any:
    """Odds of a run's teams against the base and with swapped partners; see team_matches.py."""
    from team_matches import measure as odds

    from coterie.environment import MultiModelEnvironment
    from coterie.runs.directory import RunDirectory

    run = RunDirectory.open(folder)
    with run.lock():
        found = await odds(MultiModelEnvironment.resume(run))
    return {kind: [{name: round(p, 6) for name, p in match.items()} for match in found[kind]] for kind in found}


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
