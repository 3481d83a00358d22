"""The frozen base model every policy shares: loading, and forward passes over packed tokens."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coterie.config import BaseConfig
from coterie.errors import BaseModelError
from coterie.lm.activations import PassActivations, Recalled
from coterie.lm.adapter import Segment
from coterie.lm.attention import Plan
from coterie.lm.bank import AdapterBank
from coterie.lm.chat import TokenizerChat
from coterie.lm.decoder import Decoder
from coterie.lm.embedded import resolve_base
from coterie.lm.memory import keep_freed_memory
from coterie.lm.native.kernels import kernels_for
from coterie.lm.products import OutputMatrix
from coterie.lm.quiet import quiet_transformers

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "GemmaForCausalLM")


class BaseModel:
    """A causal language model with frozen weights, its chat format, and its bank of adapters."""

    def __init__(self, model: Any, tokenizer: Any, path: Path, config: BaseConfig) -> None:
        self.model = model.requires_grad_(False).eval()
        self.path = path
        self.chat = TokenizerChat(tokenizer)
        self.hidden_size: int = model.config.hidden_size
        self.layers: int = model.config.num_hidden_layers
        self.heads: int = model.config.num_attention_heads
        self.kv_heads: int = model.config.num_key_value_heads
        self.head_dim: int = getattr(model.config, "head_dim", None) or self.hidden_size // self.heads
        self.context: int = model.config.max_position_embeddings
        window = getattr(model.config, "sliding_window", None)
        if window and getattr(model.config, "use_sliding_window", True):
            self.context = min(self.context, window)
        self.vocabulary: int = model.config.vocab_size
        self.fingerprint = _fingerprint(model)
        self.bank = AdapterBank(model, config.lora_targets, config.lora_layers)
        self.head: Tensor = model.get_output_embeddings().weight
        self.device: torch.device = self.head.device
        self.dtype: torch.dtype = self.head.dtype
        self.kernels = kernels_for(self.dtype, self.device)
        """What is compiled for this processor; None: nothing."""
        self._decoder = Decoder(model, self.kernels)
        self._output = OutputMatrix(self.head)

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        plan: Plan,
        segments: Sequence[Segment],
        record: PassActivations | None = None,
    ) -> Tensor:
        """Last hidden states (T, hidden) of packed tokens; token_ids and positions are int64 (T,).

        What the layers computed goes to `record` too.
        """
        with self.bank.routing(segments):
            return self._decoder(token_ids, positions, plan, record=record)

    @contextmanager
    def trained(
        self,
        token_ids: Tensor,
        positions: Tensor,
        plan: Plan,
        segments: Sequence[Segment],
        *,
        checkpoint: bool = False,
        known: Recalled | None = None,
    ) -> Iterator[Tensor]:
        """The same, with gradients; the backward pass has to happen inside the context.

        With `checkpoint` each layer keeps only its input and is computed again on the way back, which needs the same
        routing once more. What is `known`, of the same tokens under the same weights, is not computed again; adapters
        have their gradients then when the context is left.
        """
        with self.bank.routing(segments):
            if known is None:
                yield self._decoder(token_ids, positions, plan, checkpoint=checkpoint)
                return
            last, hidden = self._decoder.end(known)
            yield hidden
            if last.grad is not None:
                self._decoder.back(last.grad, positions, plan, known, self.bank.layers[0])

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """float32 logits (n, rows) of hidden states (n, hidden); `rows` picks vocabulary ids, None: all.

        Those of a few rows are computed in float32: in bfloat16 a logit of 20 has neighbours 0.125 away, which is
        coarser than what an update of a policy changes.
        """
        if rows is None:
            return self._output(hidden).float()
        return torch.nn.functional.linear(hidden.float(), self.head.index_select(0, rows).float())

    def rough_logits(self, hidden: Tensor, known: Tensor | None = None) -> Tensor:
        """All logits (n, vocabulary), in the base's own dtype; `known`, if they were computed before."""
        return self._output(hidden, known)


def native_bfloat16(device: torch.device) -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere float32 is many times faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def _set_threads(wanted: int) -> None:
    """`wanted` threads, or what OMP_NUM_THREADS says, or every core this process may use."""
    if wanted:
        torch.set_num_threads(wanted)
    elif "OMP_NUM_THREADS" not in os.environ and sys.platform == "linux":
        # torch counts the machine's cores; a container or taskset may give fewer
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def load_base(config: BaseConfig, *, allow_download: bool = True) -> BaseModel:
    """Load the base model a config names.

    Raises:
        BaseModelError: it does not exist, cannot be read, or its class is not supported.
    """
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    if device.type == "cpu":
        _set_threads(config.threads)
        keep_freed_memory()
    path = resolve_base(config.model, allow_download=allow_download)
    if config.dtype == "auto":
        dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    else:
        dtype = getattr(torch, config.dtype)
    try:
        architecture = (AutoConfig.from_pretrained(path).architectures or ["unknown"])[0]
        if architecture not in SUPPORTED:
            raise BaseModelError(
                f"base model {config.model!r} is a {architecture}, which is not supported; "
                f"supported classes: {', '.join(SUPPORTED)}"
            )
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"base model {config.model!r} at {path} cannot be loaded: {error}") from error
    return BaseModel(model.to(device), tokenizer, path, config)


def _fingerprint(model: Any) -> str:
    """Tells bases apart: shape settings and a sample of the weights; the same for float32 and bfloat16 loads."""
    c = model.config
    shape = [c.model_type, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.vocab_size]
    sample = model.get_input_embeddings().weight[:: max(1, c.vocab_size // 64), :8].detach()
    digest = hashlib.sha256(json.dumps(shape).encode())
    digest.update(sample.to(torch.bfloat16).to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
