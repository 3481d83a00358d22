"""What stands between a decoder's matrix products, compiled for this processor (`kernels.cpp`).

On a processor, composed of torch's operations, these parts take as long as the products between them: each operation
is a pass over memory and some microseconds of dispatch. Here each part is one pass. Where there is no C++ compiler, or
on another device, callers compose the same of torch's operations; results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.profiler import record_function

from coterie.lm.native.build import find_library
from coterie.lm.native.operands import Outer, OuterJob, Panels, Ranges, Sights, Summary

_P, _N, _F, _I = c_void_p, c_int64, c_float, c_int
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "rms_norm": (_P, _N, _P, _P, _P, _F, _P, _P, _N, _N, _I),
    "rms_norm_backward": (_P, _P, _N, _P, _P, _P, _P, _N, _N, _I),
    "rotate": (_P, _N, _P, _P, _P, _N, _F, _N, _N, _N, _I),
    "swiglu": (_P, _N, _P, _N, _P, _N, _N, _I),
    "swiglu_backward": (_P, _P, _N, _P, _N, _P, _P, _N, _N, _I),
    "attend": (_P, _N, _P, _N, _P, _N, _P, _P, _N, _P, _P, _N, _P, _P, _P, _P, _P, _N, _N, _N, _N, _F, _N, _I),
    "add_low_rank": (_P, _N, _P, _P, _P, _N, _P, _P, _P, _P, _P, _P, _N, _N, _N, _P, _I),
    "low_rank_gradients": (_P, _N, _I),
    "summarise": (_P, _N, _N, _P, _P, _P, _P, _P, _P, _I),
    "softmax_backward": (_P, _N, _N, _P, _P, _P, _P, _P, _I),
    "masked_softmax": (_P, _P, _F, _N, _N, _N, _I),
    "softmax_scores_backward": (_P, _P, _P, _P, _F, _N, _N, _N, _I),
    "gather": (_P, _N, _N, _P, _I),
    "pick": (_P, _N, _P, _P, _P, _P, _P, _P, _P, _P, _P, _N),
}
_FLOAT32: dict[str, tuple[Any, ...]] = {
    "pack_panels": (_P, _N, _N, _N, _N, _P, _I),
    "product": (_P, _P, _P, _N, _P, _P, _N, _N, _P, _I),
    "decoder_layer": (_P, _P, _P),
    "decoder_layer_back": (_P, _P, _P),
    "attend_tree": (_P, _N, _P, _N, _P, _N, _P, _P, _P, _P, _N, _N, _N, _N, _F, _N, _I),
    "attend_tree_backward": (_P, _N, _P, _N, _P, _N, _P, _P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _F, _N, _I),
}
_GROUPS = (1, 2, 3, 4, 7, 8)
"""Query heads of a key head that attention within a pass is compiled for."""
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_CHUNK = 256
"""As in kernels.cpp."""


class Kernels:
    """The functions of `kernels.cpp` for one storage type, on tensors of the processor.

    Rows may be far apart in memory (slices of a wider tensor); within a row elements lie side by side. Shapes are the
    caller's business: nothing is checked twice in a function that is called a hundred times a pass.
    """

    def __init__(self, library: CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.telling = False
        """Whether calls are being told to a profiler, one by one."""
        self.panel = 0
        """Outputs that `Panels` lays side by side; 0: matrix libraries are better here, or as good."""
        self._names = {**_ARGUMENTS, **(_FLOAT32 if dtype == torch.float32 else {})}
        if dtype == torch.float32:
            library.panel_f32.restype = c_int64
            self.panel = library.panel_f32()
        for name, types in self._names.items():
            function = getattr(library, f"{name}_{_SUFFIX[dtype]}")
            function.argtypes, function.restype = types, None
            setattr(self, f"_{name}", function)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Meanwhile every call is an event of torch's profiler, coterie::attend and so on."""
        plain = {name: getattr(self, f"_{name}") for name in self._names}

        def event(name: str, function: Any) -> Any:
            def call(*given: Any) -> None:
                with record_function(f"coterie::{name}"):
                    function(*given)

            return call

        for name, function in plain.items():
            setattr(self, f"_{name}", event(name, function))
        self.telling = True
        try:
            yield
        finally:
            self.telling = False
            for name, function in plain.items():
                setattr(self, f"_{name}", function)

    _rms_norm: Any
    _rms_norm_backward: Any
    _rotate: Any
    _swiglu: Any
    _swiglu_backward: Any
    _attend: Any
    _add_low_rank: Any
    _low_rank_gradients: Any
    _summarise: Any
    _softmax_backward: Any
    _masked_softmax: Any
    _softmax_scores_backward: Any
    _gather: Any
    _pick: Any
    _pack_panels: Any
    _product: Any
    _decoder_layer: Any
    _decoder_layer_back: Any
    _attend_tree: Any
    _attend_tree_backward: Any

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, inverse: Tensor | None = None) -> Tensor:
        """x / sqrt(mean x^2 + eps) * weight of rows (n, size); `inverse` (n,) float32 receives the first factor."""
        out = x.new_empty(x.shape)
        rows, size = x.shape
        kept = _address(inverse)
        self._rms_norm(x.data_ptr(), x.stride(0), None, None, weight.data_ptr(), eps, out.data_ptr(), kept, rows, size,
                       torch.get_num_threads())  # fmt: skip
        return out

    def add_rms_norm(
        self, x: Tensor, more: Tensor, weight: Tensor, eps: float, total: Tensor, inverse: Tensor | None = None
    ) -> Tensor:
        """`total = x + more`, then as `rms_norm` of that; all contiguous (n, size), and total may be x."""
        out = torch.empty_like(x)
        rows, size = x.shape
        kept = _address(inverse)
        self._rms_norm(x.data_ptr(), size, more.data_ptr(), total.data_ptr(), weight.data_ptr(), eps, out.data_ptr(),
                       kept, rows, size, torch.get_num_threads())  # fmt: skip
        return out

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """The gradient at x (n, size) of `rms_norm`, given that at its result, and `added` to it; grad and added are
        contiguous (n, size)."""
        out = torch.empty_like(grad)
        rows, size = x.shape
        more = _address(added)
        self._rms_norm_backward(grad.data_ptr(), x.data_ptr(), x.stride(0), weight.data_ptr(), inverse.data_ptr(), more,
                                out.data_ptr(), rows, size, torch.get_num_threads())  # fmt: skip
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """Halves of every head of x (n, heads, dim) turned by the angles (n, 1, dim / 2) whose cosine and sine are
        given; sign -1 turns back. Heads of a token lie side by side."""
        rows, heads, dim = x.shape
        out = x.new_empty(x.shape)
        self._rotate(x.data_ptr(), x.stride(0), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.stride(0), sign,
                     rows, heads, dim, torch.get_num_threads())  # fmt: skip
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up of rows (n, size)."""
        rows, size = gate.shape
        out = gate.new_empty(gate.shape)
        self._swiglu(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr(), rows, size,
                     torch.get_num_threads())  # fmt: skip
        return out

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at gate and up of `swiglu`, given that at its result, contiguous (n, size)."""
        rows, size = gate.shape
        of_gate, of_up = torch.empty_like(grad), torch.empty_like(grad)
        self._swiglu_backward(grad.data_ptr(), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0),
                              of_gate.data_ptr(), of_up.data_ptr(), rows, size, torch.get_num_threads())  # fmt: skip
        return of_gate, of_up

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, pool_k: Tensor, pool_v: Tensor,
        own: Tensor, see: Sights, scale: float,
    ) -> Tensor:  # fmt: skip
        """Put the tokens' keys, turned, and values into a cache, and let every token ask the keys it sees.

        Args:
            q: (n, heads, dim), not turned yet; k and v (n, kv_heads, dim).
            cos: as for `rotate`, and `sin`.
            pool_k: (kv_heads, slots, dim) contiguous, and `pool_v`.
            own: int64 (n,): the slot of each token.
            see: slots.

        Returns:
            (n, heads * dim)
        """
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        out = q.new_empty(tokens, heads * dim)
        self._attend(
            *_heads(q, k, v), cos.data_ptr(), sin.data_ptr(), cos.stride(0), pool_k.data_ptr(), pool_v.data_ptr(),
            pool_k.stride(0), own.data_ptr(), *_lists(see), out.data_ptr(),
            tokens, kv_heads, heads // kv_heads, dim, scale, see.most, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_low_rank(
        self, x: Tensor, outs: Sequence[tuple[str, Tensor]], ranges: Ranges, *, keep: bool = False
    ) -> list[Tensor]:
        """Add scale x A^T B of each range's adapter to what the layers of `outs` (name, (n, fan_out)) made of
        x (n, fan_in); B stands transposed here (rank, fan_out).

        Returns x A^T (tokens, rank) of every range in the first layer, then in the next, if they are to be kept.
        """
        a, b = ranges.addresses.of(tuple(name for name, _ in outs))
        return self._low_rank(x, [out for _, out in outs], a, b, ranges, keep)

    def low_rank(self, x: Tensor, names: Sequence[str], ranges: Ranges) -> list[Tensor]:
        """What `add_low_rank` returns where it keeps, and nothing more."""
        a, b = ranges.addresses.of(tuple(names))
        nothing = x.new_empty(len(x), 0)
        return self._low_rank(x, [nothing] * len(names), a, b, ranges, True)

    def low_rank_backward(self, grad: Tensor, name: str, grad_x: Tensor, ranges: Ranges) -> list[Tensor]:
        """Add the way back through one layer's updates, scale dy B^T A, to `grad_x`; returns dy B^T (tokens, rank) of
        every range, without the scale."""
        a, b = ranges.addresses.of((name,))
        return self._low_rank(grad, [grad_x], b, a, ranges, True)

    def _low_rank(self, x: Tensor, outs: Sequence[Tensor], a: Any, b: Any, ranges: Ranges, keep: bool) -> list[Tensor]:
        layers = len(outs)
        numbers, places = c_int64 * layers, c_void_p * layers
        kept = [x.new_empty(size) for _ in outs for size in ranges.sizes] if keep else []
        self._add_low_rank(
            x.data_ptr(), x.stride(0), places(*(out.data_ptr() for out in outs)),
            numbers(*(out.stride(0) for out in outs)), numbers(*(out.shape[1] for out in outs)), layers, a, b,
            ranges.ranks, ranges.scales, ranges.starts, ranges.ends, ranges.count, x.shape[1], ranges.most_rank,
            (c_void_p * len(kept))(*(inner.data_ptr() for inner in kept)) if keep else None, torch.get_num_threads(),
        )  # fmt: skip
        return kept

    def low_rank_gradients(self, sums: Sequence[Outer]) -> None:
        """Add every sum to where it belongs."""
        jobs = (OuterJob * len(sums))(*(one.described() for one in sums))
        self._low_rank_gradients(jobs, len(sums), torch.get_num_threads())

    def sample(
        self, logits: Tensor, rows: Sequence[int], uniforms: Sequence[float], temperatures: Sequence[float]
    ) -> tuple[list[int], list[float], list[float]]:
        """Draw from softmax(logits / temperatures).

        Args:
            logits: (n, vocabulary) contiguous.
            rows: the row each of the m draws is from.
            uniforms: the number in [0, 1) that decides each draw; a negative one takes the likeliest token.
            temperatures: of the rows (n), positive.

        Returns:
            tokens (m), their log-probabilities (m), and the entropy of every row in nats (n).
        """
        told = self.summarise(logits, temperatures)
        asked = len(rows)
        at, drawn = torch.tensor(rows, dtype=torch.int64), torch.tensor(uniforms, dtype=torch.float64)
        found, logprob = torch.empty(asked, dtype=torch.int64), torch.empty(asked, dtype=torch.float64)
        self._pick(logits.data_ptr(), logits.shape[1], told.sharpness.data_ptr(), told.log_z.data_ptr(),
                   told.chunks.data_ptr(), told.best.data_ptr(), told.most.data_ptr(), at.data_ptr(), drawn.data_ptr(),
                   found.data_ptr(), logprob.data_ptr(), asked)  # fmt: skip
        return found.tolist(), logprob.tolist(), told.entropy.tolist()

    def summarise(self, logits: Tensor, temperatures: Sequence[float]) -> Summary:
        """What normalises the rows of logits (n, vocabulary), contiguous, at `temperatures` (n)."""
        n, size = logits.shape
        told = Summary(
            torch.tensor(temperatures, dtype=torch.float32).reciprocal_(),
            torch.empty(n),
            torch.empty(n, dtype=torch.float64),
            torch.empty(n, dtype=torch.float64),
            torch.empty(n, -(-size // _CHUNK), dtype=torch.float64),
            torch.empty(n, dtype=torch.int64),
        )
        self._summarise(logits.data_ptr(), n, size, told.sharpness.data_ptr(), told.log_z.data_ptr(),
                        told.entropy.data_ptr(), told.chunks.data_ptr(), told.best.data_ptr(), told.most.data_ptr(),
                        torch.get_num_threads())  # fmt: skip
        return told

    def softmax_backward_(self, logits: Tensor, told: Summary, alpha: Tensor, beta: Tensor) -> Tensor:
        """sharpness * p * (alpha + beta * log p) of every row, with p the probabilities `told` is of, written over the
        logits; alpha and beta float32 (n,)."""
        n, size = logits.shape
        self._softmax_backward(logits.data_ptr(), n, size, told.sharpness.data_ptr(), told.most.data_ptr(),
                               told.log_z.data_ptr(), alpha.data_ptr(), beta.data_ptr(),
                               torch.get_num_threads())  # fmt: skip
        return logits

    def masked_softmax(self, scores: Tensor, visible: Tensor, scale: float) -> Tensor:
        """softmax(scale * scores) over the visible keys, in place; scores (heads, n, keys), visible bool (n, keys)."""
        heads, n, keys = scores.shape
        self._masked_softmax(scores.data_ptr(), visible.data_ptr(), scale, heads, n, keys, torch.get_num_threads())
        return scores

    def softmax_scores_backward(self, spread: Tensor, weights: Tensor, grad: Tensor, out: Tensor, scale: float) -> None:
        """From the gradient at probabilities `weights`, `spread` (heads, n, keys), to that at scores, in place; `grad`
        and `out` (heads, n, dim) are what came back and what went out. All contiguous."""
        keys, dim = weights.shape[-1], out.shape[-1]
        self._softmax_scores_backward(spread.data_ptr(), weights.data_ptr(), grad.data_ptr(), out.data_ptr(), scale,
                                      weights.numel() // keys, keys, dim, torch.get_num_threads())  # fmt: skip

    def attends_trees(self, heads: int, kv_heads: int, dim: int) -> bool:
        """Whether `attend_tree` and its way back are made for such heads."""
        return self.dtype == torch.float32 and heads // kv_heads in _GROUPS and dim % 16 == 0

    def attend_tree(self, q: Tensor, k: Tensor, v: Tensor, see: Sights, scale: float) -> Tensor:
        """Attention among the tokens of a pass, which stand in depth-first order of their prefix tree.

        Args:
            q: (n, heads, dim); k and v (n, kv_heads, dim); heads of a token side by side.
            see: tokens.

        Returns:
            (n, heads, dim)
        """
        out = torch.empty(q.shape)
        self._attend_tree(*_heads(q, k, v), *_lists(see), out.data_ptr(), *_sizes(q, k), scale, see.most,
                          torch.get_num_threads())  # fmt: skip
        return out

    def attend_tree_backward(
        self, grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, see: Sights, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients at q, k and v, given that at `out`, what `attend_tree` made of them; both contiguous."""
        grad_q, grad_k, grad_v = torch.empty(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
        self._attend_tree_backward(
            *_heads(q, k, v), *_lists(see), grad.data_ptr(), out.data_ptr(), grad_q.data_ptr(), grad_k.data_ptr(),
            grad_v.data_ptr(), *_sizes(q, k), scale, see.most, torch.get_num_threads(),
        )  # fmt: skip
        return grad_q, grad_k, grad_v

    def decoder_layer(self, layer: Any, work: Any, call: Any) -> None:
        """References to the structures of `coterie.lm.native.decoding`."""
        self._decoder_layer(layer, work, call)

    def decoder_layer_back(self, layer: Any, work: Any, call: Any) -> None:
        """References to the structures of `coterie.lm.native.way_back`."""
        self._decoder_layer_back(layer, work, call)

    def gather(self, addresses: NDArray[np.int64], out: Tensor) -> None:
        """Copy the rows that begin at `addresses` (n,) to `out` (n, size), contiguous."""
        self._gather(np.ascontiguousarray(addresses).ctypes.data, len(out), out.shape[1] * out.element_size(),
                     out.data_ptr(), torch.get_num_threads())  # fmt: skip

    def panels(self, weight: Tensor, bias: Tensor | None = None) -> Panels:
        """Lay out a matrix (out, size) of any strides, and a bias (out,), where `panel` is not 0."""
        out, size = weight.shape
        wide = -(-out // self.panel) * self.panel
        data = weight.new_empty(wide * size)
        self._pack_panels(weight.data_ptr(), weight.stride(0), weight.stride(1), out, size, data.data_ptr(),
                          torch.get_num_threads())  # fmt: skip
        if bias is not None:
            bias = torch.cat([bias.detach(), bias.new_zeros(wide - out)])
        return Panels(data, out, bias)

    def product(self, parts: Sequence[Tensor], panels: Panels) -> Tensor:
        """x W^T + b of the matrix in `panels`; x (n, size) is `parts` (n, size_i) side by side, each of whose rows lies
        in one piece. What a row gives depends on that row alone, bit by bit."""
        count, rows = len(parts), len(parts[0])
        out = parts[0].new_empty(rows, panels.out)
        numbers = c_int64 * count
        self._product(
            (c_void_p * count)(*(part.data_ptr() for part in parts)), numbers(*(part.stride(0) for part in parts)),
            numbers(*(part.shape[1] for part in parts)), count, panels.data.data_ptr(),
            _address(panels.bias), rows, panels.out, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def _heads(*parts: Tensor) -> Iterator[int]:
    """Where each of (n, heads, dim) begins, and how far its rows are apart."""
    for part in parts:
        yield part.data_ptr()
        yield part.stride(0)


def _lists(see: Sights) -> tuple[int, int, int]:
    return see.slots.data_ptr(), see.first.data_ptr(), see.seen.data_ptr()


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """Tokens, key heads, query heads of each, and their dimension."""
    tokens, heads, dim = q.shape
    return tokens, k.shape[1], heads // k.shape[1], dim


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=8)
def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """Kernels for tensors of this type on this device; None where there are none, or no compiler."""
    if device.type != "cpu" or dtype not in _SUFFIX:
        return None
    library = find_library()
    return None if library is None else Kernels(library, dtype)
