"""Coterie: whole updates, rollout and learning, of one policy or of several.

spec: model, prompts (each {"system", "user", "ids"}), answers (per prompt), tokens (most of an answer), forced
(answers never end early), rank, policies (how many), dtype (of the base; unset: what fits this processor), kernels
(false: as where there is no C++ compiler). go:
{"profile": true} profiles the update instead of timing it.
"""

from __future__ import annotations

import asyncio
from statistics import median

from protocol import Facts, Repetition, check_ids, leave_out_kernels, serve, versions

from coterie.bench.meter import PHASES, Meter
from coterie.config import RunConfig, parse_config
from coterie.environment import MultiModelEnvironment
from coterie.types import Observation


def run_config(spec: Facts) -> RunConfig:
    """One update is `answers` episodes of each prompt."""
    names = [f"policy_{number}" for number in range(spec["policies"])]
    prompts = [[prompt.get("system", ""), prompt["user"]] for prompt in spec["prompts"]]
    return parse_config(
        {
            "updates": 10_000,
            "max_models": len(names),
            "base": {"model": spec["model"], "dtype": spec.get("dtype", "auto")},
            "models": [
                {"model_id": n, "lora_rank": spec["rank"], "lora_alpha": 2 * spec["rank"], "learning_rate": 1e-5}
                for n in names
            ],
            "scenario": {
                "id": "even_tokens:EvenTokens",
                "options": {"prompts": prompts, "tokens": spec["tokens"]},
            },
            "rollout": {"tasks_per_update": len(prompts), "group_size": spec["answers"], "withhold": 0.0},
            "credit": {"scheme": "group_relative"},
            "evaluation": {"tasks": 0},
        }
    )


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    leave_out_kernels(spec)
    environment = MultiModelEnvironment(config=run_config(spec))
    meter = Meter(environment)
    chat = meter.base.chat
    seen = [chat.render(Observation(user=p["user"], system=p.get("system", ""))) for p in spec["prompts"]]
    check_ids([prompt["ids"] for prompt in spec["prompts"]], [list(ids) for ids in seen])
    if spec["forced"]:
        # a token that no answer contains, so that none ends early
        chat.stop_ids = (spec["never"],)
    loop = asyncio.new_event_loop()
    past: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def repeat(asked: Facts) -> Facts:
        if asked.get("profile"):
            # a process of which nothing else was wanted knows the time of its warm-up
            typical = {phase: median(past[phase] or [warm["phases"][phase]["seconds"]]) for phase in PHASES}
            return {"profile": loop.run_until_complete(meter.profiled(typical))}
        measured = loop.run_until_complete(meter.update())
        for phase in PHASES:
            past[phase].append(measured.phases[phase].seconds)
        phases = {phase: measured.phases[phase].as_dict() for phase in PHASES}
        answered = measured.phases["rollout"].sampled
        return {"seconds": measured.seconds, "phases": phases, "answer_tokens": answered / measured.turns}

    warm = repeat({})
    for seconds in past.values():
        seconds.clear()
    return {
        "versions": versions("coterie", "transformers", "torch"),
        "dtype": str(meter.base.dtype).removeprefix("torch."),
        "warm_up": warm,
    }, repeat


if __name__ == "__main__":
    serve(prepare)
