"""Whether a server really serves the adapter it was told to load.

    the learner's log p(token | prompt, token allowed)  <-- mean |difference| <= tolerance -->  the server's
    the server's under this name  !=  the server's under the base's name, and under the version before

The first catches another model, a swapped or broken adapter; it cannot tell a small change from the numerical
difference between two machines. The second can: the same server computes both, so an adapter that is not applied at
all, or a version that went stale, answers to the last digit as what it was mistaken for. Those it is compared with are
asked before it is loaded: beside requests under adapters vLLM's CPU build answers the base's with the adapter in its
last slot, which would then be the very one that is checked.

It is asked as turns with choices are: one token out of a few allowed ones, with the log-probabilities of all of them.
The prompt's own log-probabilities (`prompt_logprobs`) would say as much, but vLLM's CPU build dies of them under an
adapter when another request shares the step. Each call brings a fresh `cache_salt`, so that no prefix cache answers it
with keys of an adapter that had the name before.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import EngineError
from coterie.inference.wire import ServerSpec, Transport, WireRequest

PROBE_IDS = 16
"""Tokens a probe allows, where its prompt has as many."""
_MOST_IDS = 20
"""Log-probabilities a vLLM server gives at a step unless started with a larger --max-logprobs."""
_NEAR = 1e-3
"""By which probabilities may miss a sum of 1."""
_WEIGHTS = "adapter_model.safetensors"


class CanaryError(EngineError):
    """A server answers, but not with the adapter it should."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one adapter version says at one position, for a server to be compared with."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    allowed: tuple[int, ...]
    """2 to 20 different token ids, in any order (`probe_ids` picks some)."""
    logprobs: tuple[float, ...]
    """The learner's log-probability, in nats, of each of `allowed` right after `prompt`: adapter applied, temperature
    1, normalised over `allowed`."""


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


def probe_ids(prompt: Sequence[int], without: Collection[int] = (), count: int = PROBE_IDS) -> tuple[int, ...]:
    """The last `count` different ids of a prompt, but for those of `without`: the tokens of a probe.

    A prompt's own ids exist in every vocabulary and are its plainest words, to which a model gives probabilities that
    are neither all alike nor nothing, so that every change of the last hidden state shows in some of their differences.
    Which tokens are likeliest would depend on the adapter, and the same ones must be asked of all.
    """
    found = dict.fromkeys(token for token in reversed(prompt) if token not in without)
    return tuple(found)[:count]


def check_probe(probe: Probe) -> None:
    """Raises `CanaryError` when nothing can be compared with `probe`."""
    logs = probe.logprobs
    if not probe.prompt or not 2 <= len(set(probe.allowed)) == len(probe.allowed) <= _MOST_IDS:
        wanted = f"a prompt, and 2 to {_MOST_IDS} different tokens to allow after it"
    elif len(logs) != len(probe.allowed) or not all(map(math.isfinite, logs)):
        wanted = "the finite log-probability of each allowed token"
    elif max(logs) > _NEAR or abs(math.fsum(map(math.exp, logs)) - 1.0) > _NEAR:
        wanted = "log-probabilities that are normalised over the allowed tokens"
    else:
        return
    raise CanaryError(
        f"a probe of {len(probe.prompt)} prompt tokens, {len(probe.allowed)} allowed ones and {len(logs)} "
        f"log-probabilities: give {wanted}"
    )


async def score(
    transport: Transport, server: ServerSpec, model: str, probe: Probe, timeout_s: float
) -> tuple[float, ...]:
    """The server's log-probability of each allowed token right after the probe's prompt, under the served name `model`.

    As they came back, in nats: of a server with `processed_logprobs` they are normalised over the allowed tokens, of
    one with `raw_logprobs` over the vocabulary; `normalised` makes both the same.

    Raises:
        ServerFault: it did not answer.
        CanaryError: it answered without the log-probability of an allowed token.
    """
    allowed = probe.allowed
    # no seed: vLLM's CPU build dies of a request with a seed whose prompt it computes in parts
    request = WireRequest(
        model, probe.prompt, max_tokens=1, temperature=1.0, allowed=allowed, top=len(allowed),
        extra={"cache_salt": secrets.token_hex(16)},
    )  # fmt: skip
    reply = await transport.call(server, request, timeout_s)
    step: Mapping[int, float] = reply.top_logprobs[0] if reply.top_logprobs else {}
    found = [step[token] for token in allowed if token in step]
    if len(found) < len(allowed):
        raise CanaryError(
            f"{server.name}: {model!r}: the log-probabilities of {len(allowed)} allowed tokens were asked for "
            f"(allowed_token_ids, logprobs {len(allowed)}), those of {len(found)} came back; without them a published "
            "adapter cannot be checked; start vLLM with --logprobs-mode processed_logprobs"
        )
    return tuple(found)


def normalised(logprobs: Sequence[float]) -> tuple[float, ...]:
    """Log-probabilities, in nats, of the distribution over just these tokens; NaN where one is no finite number."""
    if not all(map(math.isfinite, logprobs)):
        return (math.nan,) * len(logprobs)
    top = max(logprobs)
    total = top + math.log(math.fsum(math.exp(value - top) for value in logprobs))
    return tuple(value - total for value in logprobs)


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
    unlike: Mapping[str, Sequence[float]],
    timeout_s: float = 60.0,
) -> None:
    """Check that `server` serves under `name` the adapter that `probe` was made with.

    Args:
        tolerance: largest mean absolute difference from the learner, in nats a token, normalised over those allowed.
        unlike: by served name there, what `score` found for it before `name` was loaded; the answers of `name` must
            differ (the base, the version before).
        timeout_s: of the call.

    Raises:
        CanaryError: it serves something else.
        ServerFault: it does not answer.
    """
    served = await score(transport, server, name, probe, timeout_s)
    off = distance(probe.logprobs, normalised(served))
    if off > tolerance:
        raise CanaryError(
            f"{server.name}: under {name!r} log-probabilities differ from the learner's by {off:.3g} nats a token on "
            f"average, {tolerance:g} are allowed: it serves another adapter or another base"
        )
    for other, answer in unlike.items():
        if tuple(answer) == served:
            raise CanaryError(
                f"{server.name}: {name!r} answers exactly as {other!r}: the adapter is not applied there, or is stale"
            )
