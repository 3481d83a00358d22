"""The forward pass of a decoder over packed tokens, on the weights of a transformers model.

    x = embed(ids)
    each layer:  x += o(attend(rotate(q(norm x)), rotate(k(norm x)), v(norm x)));  x += down(act(gate(norm x)) * up(norm x))
    last hidden = norm x

All supported families have this shape. They differ in parts the model itself carries (biases inside its linear
layers, scaled embeddings, the activation) and in two that are read off here: norms of queries and keys (Qwen3) and
norms whose weight is one more than what is stored (Gemma). There is no batch dimension; a plan (`coterie.lm.attention`)
says which keys a token sees.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from coterie.lm.attention import Plan
from coterie.lm.functions import rms_norm, rotate
from coterie.lm.linear import BankLinear, Siblings
from coterie.lm.products import MOST_PACKED, packable


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen root-mean-square norm."""

    weight: Tensor
    """float32 (size,)"""
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Of a norm of transformers."""
        if type(module).__name__ == "GemmaRMSNorm":
            return cls(module.weight.detach().float() + 1.0, module.eps)
        return cls(module.weight.detach().float(), module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; its linear layers are the model's own, adapters included."""

    number: int
    asked: Siblings
    """Queries, keys and values."""
    mixed: Siblings
    inner: Siblings
    """Gate and up."""
    outer: Siblings
    head_dim: int
    scale: float
    activation: Callable[[Tensor], Tensor]
    before_attention: Norm
    before_mlp: Norm
    queries: Norm | None
    keys: Norm | None

    @classmethod
    def of(cls, number: int, module: Any, family: str, *, pack: bool) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        per_head = family == "qwen3"
        return cls(
            number,
            Siblings([attention.q_proj, attention.k_proj, attention.v_proj], pack=pack),
            Siblings([attention.o_proj], pack=pack),
            Siblings([mlp.gate_proj, mlp.up_proj], pack=pack),
            Siblings([mlp.down_proj], pack=pack),
            attention.head_dim,
            attention.scaling,
            mlp.act_fn,
            Norm.of(module.input_layernorm),
            Norm.of(module.post_attention_layernorm),
            Norm.of(attention.q_norm) if per_head else None,
            Norm.of(attention.k_norm) if per_head else None,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, plan: Plan) -> Tensor:
        tokens = len(x)
        q, k, v = (part.view(tokens, -1, self.head_dim) for part in self.asked(self.before_attention(x)))
        if self.queries is not None and self.keys is not None:
            q, k = self.queries(q), self.keys(k)
        seen = plan.attend(self.number, rotate(q, cos, sin), rotate(k, cos, sin), v, self.scale)
        (mixed,) = self.mixed(seen.flatten(1))
        x = x + mixed
        gate, up = self.inner(self.before_mlp(x))
        gate = self.activation(gate)
        inner = gate * up if torch.is_grad_enabled() else gate.mul_(up)
        (out,) = self.outer(inner)
        return x + out


class Decoder:
    """A model's decoder without its output matrix."""

    def __init__(self, model: Any) -> None:
        """`model`: a causal language model of a supported family, its linear layers replaced where adapted."""
        inner = model.get_decoder()
        self._embed = inner.embed_tokens
        self._rotary = inner.rotary_emb
        self._norm = Norm.of(inner.norm)
        weights = [
            module.weight for module in inner.layers.modules() if isinstance(module, torch.nn.Linear | BankLinear)
        ]
        pack = packable(weights, MOST_PACKED)
        self.layers = [Layer.of(i, layer, model.config.model_type, pack=pack) for i, layer in enumerate(inner.layers)]

    def __call__(self, token_ids: Tensor, positions: Tensor, plan: Plan, *, checkpoint: bool = False) -> Tensor:
        """Last hidden states (T, hidden) of packed tokens; token_ids and positions are int64 (T,).

        With `checkpoint` each layer keeps its input only and is computed again on the way back.
        """
        x: Tensor = self._embed(token_ids)
        # (1, T, dim), the two halves alike
        cos, sin = (part[0, :, None, : part.shape[-1] // 2] for part in self._rotary(x, positions[None]))
        for layer in self.layers:
            if checkpoint:
                run = partial(recompute, layer, use_reentrant=False, preserve_rng_state=False)
                x = run(x, cos, sin, plan)
            else:
                x = layer(x, cos, sin, plan)
        return self._norm(x)
