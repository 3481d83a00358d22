"""Where time goes: operations of torch's profiler, by kind."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

    from coterie.lm.base import BaseModel

T = TypeVar("T")

KINDS = ("matrix products", "adapters", "attention", "sampling and loss", "copies", "element-wise", "Python")
"""What time goes to. Python is whatever passes outside torch's operations and our own."""

_MATRIX = re.compile(r"aten::(mm|addmm|linear|addmv|mv|dot|mkldnn_linear.*|_.*mm.*)|mkldnn.*|mkl::.*|coterie::product")
_BATCHED = re.compile(r"aten::(bmm|baddbmm|matmul|einsum)")
_ADAPTERS = re.compile(r"coterie::(add_low_rank|low_rank_gradients)")
_ATTENTION = re.compile(
    r"aten::(_?scaled_dot_product.*|_softmax.*|softmax.*|_?flex_attention.*)"
    r"|coterie::(attend|attend_tree|attend_tree_backward|masked_softmax|softmax_scores_backward)"
)
_SAMPLING = re.compile(
    r"aten::(_?log_softmax.*|logsumexp|exp_?|log_?|cumsum_?|searchsorted|bucketize|multinomial|argmax|topk|sort"
    r"|exponential_|special_entr|entropy|nll_loss.*|xlogy)|coterie::(summarise|pick|softmax_backward)"
)
_COPIES = re.compile(
    r"aten::(copy_|clone|contiguous|_to_copy|to|cat|stack|index.*|gather.*|scatter.*|embedding.*|fill_|zero_|zeros.*"
    r"|new_zeros|masked_fill.*|repeat.*|constant_pad_nd|slice_backward|select_backward|as_strided.*)|coterie::(pack_panels|gather)"
)


async def profiled(work: Awaitable[T], base: BaseModel) -> tuple[T, list[FunctionEvent]]:
    """Await `work`, which computes with `base`, under torch's profiler; what it returned, and every operation."""
    from torch.autograd.profiler import profile

    # else it says on standard error that it starts and stops, into a live table or beside JSON
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    other = base.device.type if base.device.type != "cpu" else None
    told = base.kernels.told() if base.kernels is not None else nullcontext()
    with told, profile(use_device=other, use_kineto=other is not None, record_shapes=True) as recorded:
        returned = await work
    return returned, list(recorded.function_events or ())


def by_kind(events: Sequence[FunctionEvent], wall: float, head_dim: int) -> dict[str, float]:
    """Seconds by kind of profiled operations that took `wall` seconds in all, Python included."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        shapes: Any = event.input_shapes or ()
        kind = kind_of(event.name, shapes, head_dim)
        if kind is not None:
            found[kind] += 1e-6 * max(event.self_cpu_time_total, event.self_device_time_total)
    found["Python"] = max(0.0, wall - sum(found.values()))
    return found


def kind_of(name: str, shapes: Sequence[Sequence[int]], head_dim: int) -> str | None:
    """Which of `KINDS` a profiled operation belongs to; None: no operation of torch or ours.

    Batched products are attention's when one of their dimensions is that of a head, and of adapters otherwise.
    """
    if "::" not in name:
        return None
    if _BATCHED.fullmatch(name):
        sizes = {size for shape in shapes for size in shape[-2:]} if shapes else {head_dim}
        return "attention" if head_dim in sizes else "adapters"
    for kind, pattern in zip(KINDS, (_MATRIX, _ADAPTERS, _ATTENTION, _SAMPLING, _COPIES), strict=False):
        if pattern.fullmatch(name):
            return kind
    return "element-wise"


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each kind's share of the whole; empty when nothing took time."""
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()} if total else {}
