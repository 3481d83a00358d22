"""Coterie's engine: many requests at once, under no adapter or several.

spec: model, sets (of prompts, lists of token ids), tokens (each answer's length), adapters (directories in PEFT
format), never (a token id no answer contains), kernels (false: as where there is no C++ compiler). go: {"set": which
prompts, "adapters": how many the requests take turns with}, or the same with "profile".
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from protocol import Facts, Repetition, leave_out_kernels, serve, versions

from coterie.bench.profile import by_kind, profiled
from coterie.config import BaseConfig
from coterie.inference.local.engine import LocalEngine
from coterie.lm.adapters import load_adapter
from coterie.lm.base import load_base
from coterie.lm.cost import Adapters, DecoderShape, Work, forward_flops
from coterie.types import AdapterVersion, GenerateRequest, Generation


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    leave_out_kernels(spec)
    settings = BaseConfig(model=spec["model"])
    base = load_base(settings)
    held, ranks = [], {}
    for number, directory in enumerate(spec["adapters"]):
        version = AdapterVersion(f"adapter_{number}", 0)
        adapter = load_adapter(Path(directory), base)
        base.bank.freeze(version, adapter)
        held.append(version)
        ranks[version.name] = adapter.rank
    engine = LocalEngine(base)
    shape = DecoderShape.of(base.model.config)
    adapters = Adapters(ranks, settings.lora_targets, shape.layers)
    loop = asyncio.new_event_loop()

    def requests(asked: Facts) -> list[GenerateRequest]:
        chosen = held[: asked["adapters"]]
        return [
            GenerateRequest(
                prompt_ids=tuple(ids),
                adapter=chosen[row % len(chosen)] if chosen else None,
                seed=row + 1000 * asked["set"],
                max_tokens=spec["tokens"],
                stop_ids=(spec["never"],),
            )
            for row, ids in enumerate(spec["sets"][asked["set"]])
        ]

    async def answer(asked: Facts) -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(request) for request in requests(asked))))

    def repeat(asked: Facts) -> Facts:
        if asked.get("profile"):
            made, events = loop.run_until_complete(profiled(answer(asked), base))
            return {"profile": {"generation": by_kind(events, asked["seconds"], shape.head_dim)}}
        started = time.perf_counter()
        made = loop.run_until_complete(answer(asked))
        seconds = time.perf_counter() - started
        work = Work()
        for one in made:
            player = one.adapter.name if one.adapter is not None else None
            work.add(player, one.prompt_ids, one.token_ids, one.allowed, shape.vocabulary)
        return {
            "seconds": seconds,
            "answer_tokens": sum(len(one.token_ids) for one in made),
            "distinct": work.distinct,
            "flops": forward_flops(shape, work, adapters),
        }

    warm = repeat({"set": 0, "adapters": len(held)})
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocabulary
    return {
        "versions": versions("coterie", "transformers", "torch"),
        "dtype": str(base.dtype).removeprefix("torch."),
        "weight_bytes": weights * base.head.element_size(),
        "warm_up": warm,
    }, repeat


if __name__ == "__main__":
    serve(prepare)
