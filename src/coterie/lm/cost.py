"""The least a pass must compute: floating-point operations of distinct tokens, and how fast matrices multiply here.

    distinct token    one node of the prefix tree of (policy, token ids): computed once, however many sequences share it
    linear layers     2 operations a weight and token; their backward pass through frozen weights 2 more
    LoRA              2 * rank * (in + out) a layer and token; backward, to the input and to the weights, twice that
    attention         4 * heads * head_dim a layer, token and key it sees; backward twice that
    output matrix     2 * hidden a row and sampled position; backward to the hidden state 2 more

Only what no implementation can leave out is counted: a layer below all adapters has no backward pass, queries, keys
and values of the lowest adapted layer need no gradient of their input, forced tokens need no logits, and
normalisation, activations, softmax and the optimizer count nothing. Dividing by the rate at which large matrices
multiply on the same processor gives a time no pass beats.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from coterie.lm.native.kernels import kernels_for

Policy = str | None
"""Who a token is computed for; None: the bare base. The prefix trees of two policies share nothing."""

_INPUT_SIDE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What decides the cost of a decoder of the Llama kind."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a model's transformers config."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocabulary=config.vocab_size,
        )

    @property
    def linear(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of each linear layer of one decoder layer."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, self.intermediate),
            "up_proj": (h, self.intermediate),
            "down_proj": (self.intermediate, h),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.linear.values())


@dataclass(frozen=True, slots=True)
class Adapters:
    """Which linear layers have adapters, and of what rank."""

    ranks: Mapping[str, int]
    """By policy; a policy that is not here has no adapter."""
    targets: tuple[str, ...]
    layers: int
    """Adapted layers, counted from the top."""

    def sizes(self, shape: DecoderShape, names: Iterable[str] | None = None) -> int:
        """Sum of in + out over the adapted linear layers of one decoder layer."""
        chosen = set(self.targets) & set(shape.linear if names is None else names)
        return sum(sum(shape.linear[name]) for name in chosen)


@dataclass(slots=True)
class Work:
    """Distinct tokens of some sequences, and what they have to be computed for."""

    tokens: dict[Policy, int] = field(default_factory=dict)
    """Distinct tokens of each policy."""
    keys: int = 0
    """Keys the distinct tokens see, summed over them."""
    rows: int = 0
    """Rows of the output matrix, summed over the distinct positions something was sampled at."""
    sampled: int = 0
    """Tokens sampled, repetitions included."""
    naive: int = 0
    """Tokens that one sequence at a time computes."""
    _nodes: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    _prompts: dict[tuple[Policy, tuple[int, ...]], int] = field(default_factory=dict, repr=False)
    _sites: set[tuple[int, tuple[int, ...] | None]] = field(default_factory=set, repr=False)

    @property
    def distinct(self) -> int:
        return sum(self.tokens.values())

    def add(
        self,
        policy: Policy,
        prompt_ids: tuple[int, ...],
        token_ids: Sequence[int],
        allowed: Sequence[tuple[int, ...]] | None,
        vocabulary: int,
    ) -> None:
        """One sampled answer; `allowed`: the ids each token was chosen among, None: the whole vocabulary.

        Tokens after the last real choice are known without the model; a token that is chosen needs the hidden state
        before it and not its own.
        """
        self.sampled += len(token_ids)
        free = [at for at in range(len(token_ids)) if allowed is None or len(allowed[at]) > 1]
        if not free:
            return
        self.naive += len(prompt_ids) + free[-1]
        node = self._prompts.get((policy, prompt_ids))
        if node is None:
            # node -1 - n is the empty sequence of the n-th policy
            self.tokens.setdefault(policy, 0)
            node = -1 - list(self.tokens).index(policy)
            for depth, token in enumerate(prompt_ids):
                node = self._child(policy, node, token, depth)
            self._prompts[policy, prompt_ids] = node
        at_choice = set(free)
        for number in range(free[-1] + 1):
            if number in at_choice:
                site = (node, allowed[number] if allowed is not None else None)
                if site not in self._sites:
                    self._sites.add(site)
                    self.rows += vocabulary if allowed is None else len(allowed[number])
            if number < free[-1]:
                node = self._child(policy, node, token_ids[number], len(prompt_ids) + number)

    def _child(self, policy: Policy, node: int, token: int, depth: int) -> int:
        known = self._nodes.get((node, token))
        if known is None:
            known = self._nodes[node, token] = len(self._nodes)
            self.tokens[policy] += 1
            self.keys += depth + 1
        return known


def forward_flops(shape: DecoderShape, work: Work, adapters: Adapters) -> float:
    """Floating-point operations of computing every distinct token once."""
    base = 2.0 * shape.layers * shape.layer_weights * work.distinct
    lora = 2.0 * adapters.layers * adapters.sizes(shape) * _rank_tokens(work, adapters)
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * work.keys
    return base + lora + attention + 2.0 * shape.hidden * work.rows


def backward_flops(shape: DecoderShape, work: Work, adapters: Adapters) -> float:
    """Floating-point operations of the gradient of the adapters, after a forward pass that kept what it needs."""
    if adapters.layers == 0:
        return 0.0
    lowest = sum(shape.linear[name][0] * shape.linear[name][1] for name in _INPUT_SIDE)
    base = 2.0 * (adapters.layers * shape.layer_weights - lowest) * work.distinct
    lora = 4.0 * adapters.layers * adapters.sizes(shape)
    lora -= 2.0 * sum(shape.linear[name][0] for name in set(adapters.targets) & set(_INPUT_SIDE))
    attention = 8.0 * adapters.layers * shape.heads * shape.head_dim * work.keys
    return base + lora * _rank_tokens(work, adapters) + attention + 2.0 * shape.hidden * work.rows


def _rank_tokens(work: Work, adapters: Adapters) -> int:
    """Distinct tokens, each times the rank of its policy's adapter."""
    return sum(adapters.ranks.get(policy, 0) * n for policy, n in work.tokens.items() if policy is not None)


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """Floating-point operations a second of large matrix products here and now: the best of several sizes, and of
    torch's products and ours.

    `seconds`: how long to measure, about. The best repetition counts: what is wanted is what the processor can do.
    """
    best = 0.0
    sizes = [(512, 512, 512), (1024, 1024, 1024), (1536, 1536, 1536), (1024, 576, 1536)]
    for rows, inner, columns in sizes:
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        ways = [lambda a=a, b=b, out=out: torch.mm(a, b, out=out)]
        kernels = kernels_for(dtype, device)
        if kernels is not None and kernels.panel:
            panels = kernels.panels(b.t())
            ways.append(lambda a=a, kernels=kernels, panels=panels: kernels.product([a], panels))
        for way in ways:
            quickest = _quickest(way, device, seconds / len(sizes) / len(ways))
            best = max(best, 2.0 * rows * inner * columns / quickest)
    return best


def read_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes a second at which a large float32 tensor (256 MB) is read here and now."""
    big = torch.ones(64 * 2**20, device=device)
    return big.numel() * 4 / _quickest(lambda: big.sum(), device, seconds)


def _quickest(run: Any, device: torch.device, seconds: float) -> float:
    """Seconds of the quickest repetition of `run` within about `seconds`; at least three are made."""
    best, begun, times = float("inf"), time.perf_counter(), 0
    while times < 3 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        times += 1
    return best
