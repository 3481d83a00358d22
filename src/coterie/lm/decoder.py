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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from transformers.activations import SiLUActivation

from coterie.lm.activations import LayerActivations, PassActivations, Recalled
from coterie.lm.attention import CachePlan, Plan, TreePlan
from coterie.lm.functions import add_rms_norm, rms_norm, rotate, swiglu
from coterie.lm.linear import BankLinear, Siblings
from coterie.lm.native.decoding import WholeLayer, WholePass
from coterie.lm.native.kernels import Kernels
from coterie.lm.native.operands import Ranges
from coterie.lm.native.way_back import WholeLayerBack, WholePassBack
from coterie.lm.products import MOST_PACKED, packable

_SILU = (torch.nn.SiLU, SiLUActivation)


@dataclass(frozen=True, slots=True)
class Norm:
    """A frozen root-mean-square norm."""

    weight: Tensor
    """float32 (size,)"""
    eps: float
    kernels: Kernels | None

    @classmethod
    def of(cls, module: Any, kernels: Kernels | None) -> Norm:
        """Of a norm of transformers."""
        if type(module).__name__ == "GemmaRMSNorm":
            return cls(module.weight.detach().float() + 1.0, module.eps, kernels)
        return cls(module.weight.detach().float(), module.variance_epsilon, kernels)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.kernels)

    def of_sum(
        self, x: Tensor, more: Tensor | None, known: Tensor | None = None, *, over: bool = True
    ) -> tuple[Tensor, Tensor]:
        """x + more, if there is any, which may be `known`, and the norm of that; without gradients the sum is written
        `over` x."""
        if more is None:
            return x, self(x)
        return add_rms_norm(x, more, self.weight, self.eps, self.kernels, known, over=over)


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
    kernels: Kernels | None
    before_attention: Norm
    before_mlp: Norm
    queries: Norm | None
    keys: Norm | None

    @classmethod
    def of(cls, number: int, module: Any, family: str, kernels: Kernels | None, *, pack: bool) -> Layer:
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
            kernels,
            Norm.of(module.input_layernorm, kernels),
            Norm.of(module.post_attention_layernorm, kernels),
            Norm.of(attention.q_norm, kernels) if per_head else None,
            Norm.of(attention.k_norm, kernels) if per_head else None,
        )

    def __call__(
        self,
        x: Tensor,
        more: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        plan: Plan,
        record: PassActivations | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states x + more (T, hidden), where `more` is what the layer before left to be added -> the same of
        this layer. Without gradients x is written over, unless there is a `record`."""
        x, normed = self.before_attention.of_sum(x, more, over=record is None)
        asked = self.asked(normed)
        seen = self._seen(asked, cos, sin, plan)
        (mixed,) = self.mixed(seen)
        middle, normed = self.before_mlp.of_sum(x, mixed, over=record is None)
        inner = self.inner(normed)
        (outer,) = self.outer(self._gated(*inner))
        if record is not None:
            record.layers.append(LayerActivations(x, asked, seen, middle, inner))
        return middle, outer

    def whole(self) -> WholeLayer | None:
        """The layer as one call of compiled code; None: there is none for such a layer, here."""
        asked, mixed, inner, outer = (siblings.group() for siblings in self.siblings)
        if not self._plain or asked is None or mixed is None or inner is None or outer is None:
            return None
        return WholeLayer((asked, mixed, inner, outer), self._norms, self._counts, self.scale)

    def whole_back(self) -> WholeLayerBack | None:
        """The same for the way back."""
        asked, mixed, inner, outer = (siblings.back_group() for siblings in self.siblings)
        if not self._plain or asked is None or mixed is None or inner is None or outer is None:
            return None
        return WholeLayerBack((asked, mixed, inner, outer), self._norms, self._counts, self.scale)

    @property
    def siblings(self) -> tuple[Siblings, Siblings, Siblings, Siblings]:
        return self.asked, self.mixed, self.inner, self.outer

    def attends_trees(self, kernels: Kernels) -> bool:
        """See `Kernels.attends_trees`."""
        kv_heads, group, dim = self._counts
        return kernels.attends_trees(kv_heads * group, kv_heads, dim)

    @property
    def _plain(self) -> bool:
        """Whether it has the parts that compiled code for whole layers knows."""
        return self.queries is None and isinstance(self.activation, _SILU)

    @property
    def _norms(self) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
        one, other = self.before_attention, self.before_mlp
        return (one.weight, one.eps), (other.weight, other.eps)

    @property
    def _counts(self) -> tuple[int, int, int]:
        """Heads of keys, heads of queries for each of them, and their dimension."""
        queries, keys, _ = self.asked.sizes
        return keys // self.head_dim, queries // keys, self.head_dim

    def again(self, known: LayerActivations, cos: Tensor, sin: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """The same for the way back, of a pass whose activations are known: only what costs little is computed, and
        what is returned is right as to its gradients, not its values."""
        x = known.x
        asked = self.asked(self.before_attention(x), known.asked)
        seen = self._seen(asked, cos, sin, plan, known.seen)
        (mixed,) = self.mixed(seen, [torch.empty_like(x)])
        middle, normed = self.before_mlp.of_sum(x, mixed, known.middle)
        inner = self.inner(normed, known.inner)
        (outer,) = self.outer(self._gated(*inner), [torch.empty_like(x)])
        return middle, outer

    def _seen(
        self, asked: Sequence[Tensor], cos: Tensor, sin: Tensor, plan: Plan, known: Tensor | None = None
    ) -> Tensor:
        """What attention makes of queries, keys and values."""
        q, k, v = self._heads(asked)
        if self.kernels is not None and isinstance(plan, CachePlan) and plan.sights is not None:
            return plan.attend_compiled(self.kernels, self.number, q, k, v, cos, sin, self.scale)
        turned = rotate(q, cos, sin, self.kernels), rotate(k, cos, sin, self.kernels)
        if known is not None:
            known = known.view(q.shape)
        return plan.attend(self.number, *turned, v, self.scale, known).flatten(1)

    def _heads(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, normed where the family does that."""
        q, k, v = (part.view(len(part), -1, self.head_dim) for part in projected)
        if self.queries is not None and self.keys is not None:
            q, k = self.queries(q), self.keys(k)
        return q, k, v

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if isinstance(self.activation, _SILU):
            return swiglu(gate, up, self.kernels)
        gate = self.activation(gate)
        return gate * up if torch.is_grad_enabled() else gate.mul_(up)


class Decoder:
    """A model's decoder without its output matrix."""

    def __init__(self, model: Any, kernels: Kernels | None) -> None:
        """`model`: a causal language model of a supported family, its linear layers replaced where adapted."""
        inner = model.get_decoder()
        self._embed = inner.embed_tokens
        self._rotary = inner.rotary_emb
        self._norm = Norm.of(inner.norm, kernels)
        weights = [
            module.weight for module in inner.layers.modules() if isinstance(module, torch.nn.Linear | BankLinear)
        ]
        pack = packable(weights, MOST_PACKED)
        family = model.config.model_type
        self._kernels = kernels
        self._whole: list[WholeLayer] | None = None
        """Layers as single calls, once they were asked for; empty: there are none."""
        self._whole_back: list[WholeLayerBack] | None = None
        self.layers = [Layer.of(i, layer, family, kernels, pack=pack) for i, layer in enumerate(inner.layers)]

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        plan: Plan,
        *,
        checkpoint: bool = False,
        record: PassActivations | None = None,
    ) -> Tensor:
        """Last hidden states (T, hidden) of packed tokens; token_ids and positions are int64 (T,).

        With `checkpoint` each layer keeps its input only and is computed again on the way back. What is computed goes
        to `record` too.
        """
        x: Tensor = self._embed(token_ids)
        cos, sin = self._angles(x, positions)
        whole = None if torch.is_grad_enabled() else self._whole_pass(cos, sin, plan, keep=record is not None)
        if whole is not None:
            return self._through(whole, x, cast(CachePlan, plan), record)
        more: Tensor | None = None
        for layer in self.layers:
            if checkpoint:
                x, more = recompute(layer, x, more, cos, sin, plan, use_reentrant=False, preserve_rng_state=False)
            else:
                x, more = layer(x, more, cos, sin, plan, record)
        x, normed = self._norm.of_sum(x, more, over=record is None)
        if record is not None:
            record.last = x
        return normed

    def _whole_pass(self, cos: Tensor, sin: Tensor, plan: Plan, *, keep: bool) -> WholePass | None:
        """A pass a layer a call; None: not of this model, these adapters or this plan, or while a profiler listens."""
        kernels = self._kernels
        if kernels is None or kernels.telling or not isinstance(plan, CachePlan) or plan.sights is None:
            return None
        if self._whole is None:
            made = [layer.whole() for layer in self.layers]
            self._whole = [layer for layer in made if layer is not None] if all(made) else []
        ranged, ranges = self._ranges()
        if not self._whole or not ranged:
            return None
        return WholePass(kernels, self._whole[0], (cos, sin), plan.slots, plan.sights, ranges, keep=keep)

    def _whole_pass_back(self, cos: Tensor, sin: Tensor, plan: Plan) -> WholePassBack | None:
        """The same for the way back."""
        kernels = self._kernels
        if kernels is None or kernels.telling or not isinstance(plan, TreePlan):
            return None
        if self._whole_back is None:
            made = [layer.whole_back() for layer in self.layers]
            self._whole_back = [layer for layer in made if layer is not None] if all(made) else []
        ranged, ranges = self._ranges()
        if not self._whole_back or not ranged or not self.layers[0].attends_trees(kernels):
            return None
        return WholePassBack(kernels, self._whole_back[0], (cos, sin), plan.sights, ranges)

    def _ranges(self) -> tuple[bool, Ranges | None]:
        """Whether compiled code serves all adapters of the pass under way, and their ranges of tokens."""
        routes = (siblings.route for layer in self.layers for siblings in layer.siblings)
        route = next((found for found in routes if found is not None), None)
        if route is None:
            return True, None
        return not route.one_by_one, route.compiled[1] if route.compiled is not None else None

    def _through(self, whole: WholePass, x: Tensor, plan: CachePlan, record: PassActivations | None) -> Tensor:
        """All layers, and the last norm."""
        for layer, described, keys, values in zip(self.layers, self._whole or (), plan.keys, plan.values, strict=True):
            made = whole(described, x, keys, values)
            if record is not None:
                asked = torch.split(made.asked, layer.asked.sizes, 1)
                inner = torch.split(made.inner, layer.inner.sizes, 1)
                record.layers.append(LayerActivations(made.x, asked, made.seen, made.middle, inner))
            x = made.middle
        x, normed = self._norm.of_sum(x, whole.left, over=record is None)
        if record is not None:
            record.last = x
        return normed

    def end(self, known: Recalled) -> tuple[Tensor, Tensor]:
        """What came out of the last layer, a leaf that takes the gradient, and the last hidden states (T, hidden)."""
        last = known.last().requires_grad_()
        return last, self._norm(last)

    def back(self, grad: Tensor, positions: Tensor, plan: Plan, known: Recalled, lowest: int) -> None:
        """The way back from the gradient (T, hidden) at what came out of the last layer, a layer at a time down to the
        `lowest` that has adapters: their gradients are what comes of it."""
        cos, sin = self._angles(grad, positions)
        grad = grad.contiguous()
        whole = self._whole_pass_back(cos, sin, plan)
        for layer in reversed(self.layers[lowest:]):
            made = known.layer(layer.number)
            if whole is not None and self._whole_back is not None:
                found = whole(self._whole_back[layer.number], made, grad, lowest=layer.number == lowest)
                grad = grad if found is None else found
                continue
            made.x.requires_grad_(layer.number > lowest)
            torch.autograd.backward(layer.again(made, cos, sin, plan), [grad, grad])
            if made.x.grad is not None:
                grad = made.x.grad

    def _angles(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (T, 1, dim / 2) of the rotations at these positions."""
        # (1, T, dim), the two halves alike
        cos, sin = (part[0, :, None, : part.shape[-1] // 2] for part in self._rotary(like, positions[None]))
        return cos, sin
