"""From episodes and advantages to what the learner computes: distinct sequences, and terms that point into them.

A *term* is one sampled token of one policy after one exact prefix. Equal terms (same prefix, same token, same sampling
policy) of different episodes are one term with their advantages added up, so the work does not grow with the number
of episodes that made the same choice. Tokens that had no alternative carry no gradient and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.types import Advantages, Episode, ModelId, Turn

Allowed = tuple[int, ...] | None


@dataclass(slots=True)
class Term:
    """Sampled occurrences of one token at one position, added up."""

    sequence: int
    """Index into `Batch.sequences`."""
    position: int
    """Of the token whose hidden state predicts; the sampled token stands at position + 1."""
    token: int
    old_logprob: float
    gain: float = 0.0
    """Sum of the positive advantages."""
    loss: float = 0.0
    """Sum of the negative advantages."""
    count: int = 0
    """Occurrences."""


@dataclass(frozen=True, slots=True)
class HeadKey:
    """Terms that share a normaliser: the allowed tokens, their bias, and the temperature."""

    allowed: Allowed
    bias: tuple[tuple[int, float], ...]
    temperature: float


@dataclass(frozen=True, slots=True)
class Batch:
    """One update's data for every policy."""

    policies: tuple[ModelId, ...]
    sequences: tuple[tuple[int, tuple[int, ...]], ...]
    """(index into policies, token ids): prompt and answer without its last token."""
    terms: Mapping[HeadKey, tuple[Term, ...]]
    turns: tuple[int, ...]
    """Trainable turns of each policy, zero-advantage ones included: the loss is a mean over them."""


def build_batch(
    policies: Sequence[ModelId], episodes: Sequence[Episode], advantages: Advantages, *, keep_zero: bool
) -> Batch:
    """Collect the trainable turns of `episodes`.

    Args:
        policies: the models in training.
        keep_zero: keep tokens whose advantages are all zero (an entropy bonus or a KL term still moves them).

    Turns of simulated, scripted or human tiers, and turns of models not in `policies`, never get in.
    """
    number = {model_id: i for i, model_id in enumerate(policies)}
    turns = [0] * len(policies)
    sequences: dict[tuple[int, tuple[int, ...]], int] = {}
    by_head: dict[HeadKey, dict[tuple[int, int, int, float], Term]] = {}
    heads: dict[tuple[Allowed, int, float], HeadKey] = {}
    for episode in episodes:
        values = advantages.values[episode.episode_id]
        for seat_id, trajectory in episode.trajectories.items():
            for turn, advantage in zip(trajectory.turns, values[seat_id], strict=True):
                if not turn.trainable or turn.model_id not in number:
                    continue
                policy = number[turn.model_id]
                turns[policy] += 1
                if advantage == 0.0 and not keep_zero:
                    continue
                _add_turn(turn, policy, advantage, sequences, by_head, heads)
    return Batch(
        tuple(policies),
        tuple(sequences),
        {head: tuple(terms.values()) for head, terms in by_head.items()},
        tuple(turns),
    )


def _add_turn(
    turn: Turn,
    policy: int,
    advantage: float,
    sequences: dict[tuple[int, tuple[int, ...]], int],
    by_head: dict[HeadKey, dict[tuple[int, int, int, float], Term]],
    heads: dict[tuple[Allowed, int, float], HeadKey],
) -> None:
    free = [j for j in range(len(turn.token_ids)) if turn.allowed is None or len(turn.allowed[j]) > 1]
    if not free:
        return
    key = (policy, turn.prompt_ids + turn.token_ids[: free[-1]])
    sequence = sequences.setdefault(key, len(sequences))
    start = len(turn.prompt_ids) - 1
    for j in free:
        allowed = turn.allowed[j] if turn.allowed is not None else None
        head_key = (allowed, id(turn.bias), turn.temperature)
        head = heads.get(head_key)
        if head is None:
            head = heads[head_key] = _head(allowed, turn)
        terms = by_head.setdefault(head, {})
        token, old = turn.token_ids[j], turn.logprobs[j]
        term_key = (sequence, start + j, token, old)
        term = terms.get(term_key)
        if term is None:
            term = terms[term_key] = Term(sequence, start + j, token, old)
        if advantage > 0:
            term.gain += advantage
        else:
            term.loss += advantage
        term.count += 1


def _head(allowed: Allowed, turn: Turn) -> HeadKey:
    bias = turn.bias or {}
    relevant = bias if allowed is None else {token: bias[token] for token in allowed if token in bias}
    return HeadKey(allowed, tuple(sorted(relevant.items())), turn.temperature or 1.0)
