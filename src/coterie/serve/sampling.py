"""From one row of logits to one token and its probabilities, for engines that hand out logits.

    (logits of the allowed tokens + bias) / temperature ──► min_p, top_k, top_p ──► log-softmax ──► inverse cumulative

Uniform numbers depend on (seed, position) alone, so a sequence does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.inference.local.sampler import uniform
from coterie.serve.engine import Bitmask, NothingAllowedError, Step, Token, TokenRequest

Ids = NDArray[np.int64]


def pack(ids: Sequence[int], vocabulary: int) -> Bitmask:
    """The bitmask of these tokens."""
    bits = np.zeros(-(-vocabulary // 32) * 32, dtype=np.uint8)
    bits[np.asarray(ids, dtype=np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def unpack(mask: Bitmask, vocabulary: int) -> Ids:
    """The tokens of a bitmask, ascending."""
    bits = np.unpackbits(mask.view(np.uint8), count=vocabulary, bitorder="little")
    return np.flatnonzero(bits)


def allowed_ids(step: Step, vocabulary: int) -> Ids | None:
    """The tokens a step allows, ascending; None: all.

    Raises:
        NothingAllowedError: it allows none.
    """
    if step.mask is not None:
        ids = unpack(step.mask, vocabulary)
    elif step.ids is not None:
        ids = np.asarray(step.ids, dtype=np.int64)
    else:
        return None
    if not len(ids):
        raise NothingAllowedError("no token is allowed here; the constraints of the request contradict each other")
    return ids


def pick(logits: NDArray[np.float32], ids: Ids | None, step: Step, request: TokenRequest, position: int) -> Token:
    """Sample one token.

    Args:
        logits: of `ids` (k,), or of the whole vocabulary where `ids` is None.
        position: number of tokens sampled before this one.

    Raises:
        NothingAllowedError: bias forbids every token.
    """
    scores = _biased(logits, ids, step.bias)
    if request.temperature > 0:
        scores = _truncated(scores / request.temperature, request)
    if not np.isfinite(scores.max()):
        raise NothingAllowedError("no token is allowed here; the bias forbids every one")
    logprobs = log_softmax(scores)
    if request.temperature == 0:
        at = int(scores.argmax())
    else:
        cumulative = np.exp(logprobs).cumsum()
        at = int(np.searchsorted(cumulative, uniform(request.seed, position) * cumulative[-1], side="right"))
        if at >= len(logprobs) or logprobs[at] == -np.inf:  # the last of the mass, lost to rounding
            at = int(np.flatnonzero(np.isfinite(logprobs))[-1])
    return describe(logprobs, ids, at, request.top_logprobs)


def describe(logprobs: NDArray[np.float64], ids: Ids | None, at: int, top: int) -> Token:
    """The token at index `at` of a row of log-probabilities, with its rank and the `top` most probable."""
    best: tuple[tuple[int, float], ...] = ()
    if top:
        k = min(top, len(logprobs))
        least = np.partition(logprobs, len(logprobs) - k)[-k]
        # among equals the lowest ids, so that ties are told alike everywhere
        better = np.flatnonzero(logprobs > least)
        found = np.concatenate((better, np.flatnonzero(logprobs == least)[: k - len(better)]))
        order = found[np.argsort(-logprobs[found], kind="stable")]
        best = tuple((_id(ids, int(i)), float(logprobs[i])) for i in order if logprobs[i] > -np.inf)
    rank = 1 + int((logprobs > logprobs[at]).sum())
    return Token(_id(ids, at), float(logprobs[at]), rank, best)


def forced(token_id: int, top: int) -> Token:
    """The only token allowed."""
    return Token(token_id, 0.0, 1, ((token_id, 0.0),) if top else ())


def log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities of a row of scores, some of which may be -inf."""
    shifted = scores - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float64)


def _id(ids: Ids | None, index: int) -> int:
    return index if ids is None else int(ids[index])


def _biased(logits: NDArray[np.float32], ids: Ids | None, bias: Mapping[int, float] | None) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    if bias:
        for token, value in bias.items():
            if ids is None:
                scores[token] += value
            else:
                at = int(np.searchsorted(ids, token))
                if at < len(ids) and ids[at] == token:
                    scores[at] += value
    return scores


def _truncated(scores: NDArray[np.float64], request: TokenRequest) -> NDArray[np.float64]:
    """Scores with what min_p, top_k and top_p cut off at -inf, in vLLM's order."""
    if request.min_p > 0:
        scores = np.where(scores < scores.max() + np.log(request.min_p), -np.inf, scores)
    if 0 < request.top_k < len(scores):
        least = np.partition(scores, len(scores) - request.top_k)[-request.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    if request.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        mass = np.exp(log_softmax(scores))[order]
        beyond = order[mass.cumsum() - mass >= request.top_p]  # the first token past the mass is kept
        scores = scores.copy()
        scores[beyond] = -np.inf
    return scores
