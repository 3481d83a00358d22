"""Whether a server really serves the adapter it was told to load.

    learner's log-probabilities of some tokens, adapter applied  <-- mean |difference| <= tolerance -->  the server's
    the server's under this name  !=  the server's under the base's name, and under the version before

The first catches another model, a swapped or broken adapter; it cannot tell a small change from the numerical
difference between two machines. The second can: the same server computes both, so an adapter that is not applied at
all, or a version that went stale, answers to the last digit as what it was mistaken for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import EngineError
from coterie.inference.wire import ServerSpec, Transport, WireRequest

Probe = tuple[tuple[int, ...], tuple[float, ...]]
"""Token ids, and the learner's log-probability of each token after the first, adapter applied, temperature 1."""

_WEIGHTS = "adapter_model.safetensors"


class CanaryError(EngineError):
    """A server answers, but not with the adapter it should."""


@dataclass(frozen=True, slots=True)
class Content:
    """What stands in an adapter's directory."""

    digest: str
    """Of every file; equal content, equal digest."""
    zero: bool
    """Whether every B matrix is zero, so that the adapter changes nothing."""


def content_of(directory: Path) -> Content:
    """Look at a PEFT directory.

    Raises:
        EngineError: there is none, or its files cannot be read.
    """
    try:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        digest = hashlib.sha256()
        for path in files:
            digest.update(str(path.relative_to(directory)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        weights = directory / _WEIGHTS
        zero = weights.is_file() and _is_zero(weights.read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"cannot read the adapter in {directory}: {type(error).__name__}: {error}") from error
    if not files:
        raise EngineError(f"no adapter in {directory}; save it there first, in PEFT's format")
    return Content(digest.hexdigest(), zero)


def _is_zero(blob: bytes) -> bool:
    """Whether a safetensors file's B matrices are all zero (8 bytes of header size, header in JSON, data)."""
    size = int.from_bytes(blob[:8], "little")
    header, data = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    spans = [entry["data_offsets"] for name, entry in header.items() if ".lora_B" in name]
    return bool(spans) and not any(data[begin:end].strip(b"\0") for begin, end in spans)


def check_probe(probe: Probe) -> None:
    """Raises `CanaryError` when nothing can be compared with `probe`."""
    tokens, expected = probe
    if len(tokens) < 2 or len(expected) != len(tokens) - 1 or not all(map(math.isfinite, expected)):
        raise CanaryError(
            f"a probe of {len(tokens)} tokens with {len(expected)} log-probabilities: give two tokens or more, and "
            "the finite log-probability of each after the first"
        )


async def score(
    transport: Transport, server: ServerSpec, model: str, tokens: Sequence[int], timeout_s: float
) -> tuple[float, ...]:
    """The server's log-probability of each of `tokens` after the first, under the served name `model`.

    Raises:
        ServerFault: it did not answer.
        CanaryError: it answered without log-probabilities of the prompt.
    """
    # prompt log-probabilities make vLLM compute the prompt anew instead of from a cache that may be stale
    request = WireRequest(model, tuple(tokens), max_tokens=1, temperature=1.0, seed=0, extra={"prompt_logprobs": 0})
    reply = await transport.call(server, request, timeout_s)
    found = reply.prompt_logprobs
    if found is None or len(found) != len(tokens) - 1:
        raise CanaryError(
            f"{server.name}: {model!r}: {len(tokens) - 1} log-probabilities of the prompt were asked for "
            f"(prompt_logprobs), {0 if found is None else len(found)} came back; without them a published adapter "
            "cannot be checked"
        )
    return found


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean absolute difference in nats a token; infinite when one of them is no finite number."""
    if not all(map(math.isfinite, (*ours, *theirs))):
        return math.inf
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


async def check(
    transport: Transport,
    server: ServerSpec,
    name: str,
    probe: Probe,
    *,
    tolerance: float,
    unlike: Sequence[str],
    timeout_s: float = 60.0,
) -> None:
    """Check that `server` serves under `name` the adapter that `probe` was made with.

    Args:
        tolerance: largest mean absolute difference from the learner, in nats a token.
        unlike: served names there whose answers must differ from those of `name` (the base, the version before).
        timeout_s: of each of the 1 + len(unlike) calls.

    Raises:
        CanaryError: it serves something else.
        ServerFault: it does not answer.
    """
    tokens, expected = probe
    served = await score(transport, server, name, tokens, timeout_s)
    off = distance(expected, served)
    if off > tolerance:
        raise CanaryError(
            f"{server.name}: under {name!r} log-probabilities differ from the learner's by {off:.3g} nats a token on "
            f"average, {tolerance:g} are allowed: it serves another adapter or another base"
        )
    for other in unlike:
        if await score(transport, server, other, tokens, timeout_s) == served:
            raise CanaryError(
                f"{server.name}: {name!r} answers exactly as {other!r}: the adapter is not applied there, or is stale"
            )
