"""The fake's language model: a distribution anyone can recompute.

    logit(token | context) = 3 u(seed, context, token) + u(weights, context, token),      u uniform in [-1, 1]

The second term is there under an adapter only and depends on the adapter's content, so every adapter answers in its
own way, equal content answers equally wherever it is loaded, and an adapter whose B matrices are all zero (every
untrained one) answers as the base does. Log-probabilities are those of the softmax over what may be sampled, after
bias, allowed set and temperature, in float64, which JSON carries without loss: tests compare them exactly.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.errors import AdapterError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FakePolicy:
    """One set of weights over `vocabulary` token ids."""

    seed: int
    vocabulary: int
    weights: str = ""
    """Of an adapter: what `adapter_weights` made of its files. Empty: the base."""

    def logits(self, context: Sequence[int], tokens: Sequence[int] | None = None) -> Floats:
        """Logits of `tokens` (in ascending order; None: all) after the ids of `context`."""
        everything = tokens is None or len(tokens) == self.vocabulary
        ids = np.arange(self.vocabulary) if everything else np.asarray(tokens)
        history = np.asarray(context, dtype=np.int64).tobytes()
        found = 3.0 * _uniform(_key(f"base {self.seed}", history), ids)
        if self.weights:
            found += _uniform(_key(f"adapter {self.weights}", history), ids)
        return found


def distribution(
    policy: FakePolicy,
    context: Sequence[int],
    *,
    allowed: Sequence[int] | None = None,
    bias: Mapping[int, float] | None = None,
    temperature: float = 1.0,
) -> dict[int, float]:
    """Log-probability of every token that may come next; temperature 0 counts as 1, as in vLLM."""
    ids = list(range(policy.vocabulary)) if allowed is None else sorted(set(allowed))
    return dict(zip(ids, log_softmax(policy, context, ids, bias, temperature).tolist(), strict=True))


def token_logprobs(policy: FakePolicy, ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probability at temperature 1 of each id after the first, given those before it: what a learner with these
    weights computes, and what a server reports as prompt_logprobs."""
    found = []
    for place in range(1, len(ids)):
        step = log_softmax(policy, ids[:place], range(policy.vocabulary), None, 1.0)
        found.append(float(step[ids[place]]))
    return tuple(found)


def log_softmax(
    policy: FakePolicy,
    context: Sequence[int],
    ids: Sequence[int],
    bias: Mapping[int, float] | None,
    temperature: float,
) -> Floats:
    """Log-probabilities over exactly `ids`."""
    logits = policy.logits(context, ids)
    if bias:
        # vLLM clamps as OpenAI does
        logits += np.array([min(100.0, max(-100.0, bias.get(token, 0.0))) for token in ids])
    scaled = logits / (temperature or 1.0)
    scaled -= scaled.max()
    shifted: Floats = scaled - np.log(np.exp(scaled).sum())
    return shifted


def _key(salt: str, history: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(history, digest_size=8, key=salt.encode()[:64]).digest(), "big")


def _uniform(key: int, ids: NDArray[np.int64]) -> Floats:
    """In [-1, 1], one for each id (SplitMix64; Steele, Lea & Flood 2014)."""
    z = np.uint64(key) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    units: Floats = (z >> np.uint64(11)).astype(np.float64) / 2**52 - 1.0
    return units


# -- adapters ---------------------------------------------------------------------------------------------------


def adapter_weights(directory: Path, max_rank: int | None = None) -> str:
    """What tells the adapter in a PEFT directory from others: a digest of rank, alpha and tensors; empty when it
    changes nothing because its B matrices are zero.

    Raises:
        AdapterError: not a readable adapter, or its rank is beyond `max_rank`.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        blob = (directory / "adapter_model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", blob[:8])
        header, data = json.loads(blob[8 : 8 + size]), blob[8 + size :]
        tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        parts = {name: data[start:end] for name, (start, end) in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise AdapterError(f"cannot read the adapter in {directory}: {type(error).__name__}: {error}") from error
    if max_rank is not None and rank > max_rank:
        raise AdapterError(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    if not any(part.strip(b"\0") for name, part in parts.items() if "lora_B" in name):
        return ""
    digest = hashlib.blake2b(json.dumps([rank, alpha]).encode(), digest_size=16)
    for name in sorted(parts):
        digest.update(name.encode() + parts[name])
    return digest.hexdigest()


def write_adapter(directory: Path, seed: int, *, rank: int = 4, zero: bool = False) -> Path:
    """Write a small adapter in PEFT's format, to be loaded by the fake; other seeds are other weights.

    `zero`: with B all zero, as before training. Returns `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    shapes = {"lora_A": (rank, 8), "lora_B": (8, rank)}
    header, data = {}, b""
    for name, shape in shapes.items():
        values = np.zeros(shape) if zero and name == "lora_B" else generator.normal(size=shape)
        part = values.astype("<f4").tobytes()
        header[f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    head = json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
