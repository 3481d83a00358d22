"""What all runners of a benchmark share, made once: prompts of exact length, and adapters in PEFT format.

spec: model, folder, sets (of 64 prompts for generation), sequences (of a set), prompt_tokens (of them), update_prompts
({name: [count, tokens, whether they share nothing]}), adapters (how many), rank.

Words are single tokens of the model's own vocabulary, drawn by seeded generators, so lengths are exact and every
machine gets the same prompts.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from protocol import Facts, Repetition, serve, versions
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from coterie.config import BaseConfig
from coterie.lm.chat import TokenizerChat
from coterie.lm.cost import DecoderShape
from coterie.lm.embedded import resolve_base
from coterie.types import Observation

TARGETS = BaseConfig().lora_targets


class Prompts:
    """Chat prompts of an exact number of tokens."""

    def __init__(self, chat: TokenizerChat) -> None:
        self.chat = chat
        tokenizer = chat.tokenizer
        words = sorted({tokenizer.decode([i]) for i in range(len(tokenizer))})
        plain = [word for word in words if re.fullmatch(r" [a-z]{3,9}", word)]
        self.words = [w for w in plain if len(tokenizer.encode(w, add_special_tokens=False)) == 1]

    def make(self, tokens: int, rng: random.Random, *, own_system: bool = False) -> dict[str, Any]:
        """A prompt of `tokens` tokens; with `own_system` no other prompt begins with the same words."""
        system = "".join(rng.sample(self.words, 4)).strip() if own_system else ""
        start = "Write about:"
        spare = tokens - len(self.chat.render(Observation(user=start, system=system)))
        if spare < 1:
            raise ValueError(f"{tokens} tokens are too few for a prompt of this chat format")
        user = start + "".join(rng.choices(self.words, k=spare))
        ids = self.chat.render(Observation(user=user, system=system))
        if len(ids) != tokens:
            raise ValueError(f"a prompt came out at {len(ids)} tokens instead of {tokens}")
        return {"system": system, "user": user, "ids": list(ids)}


def write_adapter(directory: Path, base: Path, shape: DecoderShape, rank: int, seed: int) -> None:
    """A random adapter on every linear layer, in PEFT's format."""
    if (directory / "adapter_model.safetensors").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.layers):
        for name, (fan_in, fan_out) in shape.linear.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            path = f"base_model.model.model.layers.{layer}.{block}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, fan_in, generator=generator) * fan_in**-0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(fan_out, rank, generator=generator) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(TARGETS),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    path = resolve_base(spec["model"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = TokenizerChat(tokenizer)
    prompts = Prompts(chat)
    sets = []
    for number in range(spec["sets"]):
        rng = random.Random(f"generation {number}")
        sets.append([prompts.make(spec["prompt_tokens"], rng)["ids"] for _ in range(spec["sequences"])])
    updates = {
        name: [prompts.make(tokens, rng, own_system=apart) for rng in [random.Random(name)] for _ in range(count)]
        for name, (count, tokens, apart) in spec["update_prompts"].items()
    }
    shape = DecoderShape.of(AutoConfig.from_pretrained(path))
    folders = [Path(spec["folder"]) / f"adapter-{spec['rank']}-{number}" for number in range(spec["adapters"])]
    for number, folder in enumerate(folders):
        write_adapter(folder, path, shape, spec["rank"], number)
    never = max(i for i in tokenizer.get_added_vocab().values() if i not in chat.stop_ids)
    return {
        "versions": versions("coterie", "torch", "transformers"),
        "model": str(path),
        "sets": sets,
        "updates": updates,
        "adapters": [str(folder) for folder in folders],
        "never": never,
    }, lambda asked: {}


if __name__ == "__main__":
    serve(prepare)
