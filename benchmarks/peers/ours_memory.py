"""Coterie: resident memory of a run by the number of its policies, each of which has been trained.

spec: as for `ours_update.py`, with as many prompts as the largest count. go: {"counts": [1, 5, …]} adds policies up to
each count, updates until every policy has learned, twice at least, and says how much memory the process then holds. A
process answers once.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
import time
from contextlib import suppress

import psutil
from ours_update import run_config
from protocol import Facts, Repetition, serve, versions

from coterie.environment import MultiModelEnvironment
from coterie.lm.cost import Adapters, DecoderShape
from coterie.models import ModelConfig

PATIENCE = 10
"""Updates within which every policy must have learned."""


def resident() -> int:
    """Bytes this process holds, after giving back what it does not use."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library: what it keeps is part of what is measured
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    config = run_config({**spec, "policies": 1})
    environment = MultiModelEnvironment(config=config.model_copy(update={"max_models": len(spec["prompts"])}))
    environment.base.chat.stop_ids = (spec["never"],)
    loop = asyncio.new_event_loop()
    rank = spec["rank"]
    shape = DecoderShape.of(environment.base.model.config)
    weights = rank * shape.layers * Adapters({}, config.base.lora_targets, shape.layers).sizes(shape)

    def repeat(asked: Facts) -> Facts:
        started = time.perf_counter()
        held = {}
        for count in asked["counts"]:
            while len(environment.models) < count:
                name = f"policy_{len(environment.models)}"
                environment.add_model(ModelConfig(model_id=name, lora_rank=rank, lora_alpha=2 * rank))
            loop.run_until_complete(environment.train_cycles(1))
            # a policy whose answers all earn the same has no gradient, and no optimizer state yet
            for _ in range(PATIENCE):
                loop.run_until_complete(environment.train_cycles(1))
                untrained = [m.model_id for m in environment.models.values() if m.weight_updates == 0]
                if not untrained:
                    break
            else:
                raise ValueError(f"with {count} policies, {', '.join(untrained)} did not learn")
            held[str(count)] = resident()
        return {"seconds": time.perf_counter() - started, "resident": held}

    # float32: the adapter, its gradient, and AdamW's two moments
    return {"versions": versions("coterie", "torch"), "state_bytes": 4 * 4 * weights}, repeat


if __name__ == "__main__":
    serve(prepare)
