"""What may be asked of a seat: an observation of texts, and choices that can be told apart.

Real tables and practice tables refuse the same questions in the same words, before an engine sees them. A scenario is
foreign code, so types are looked at too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from coterie.errors import ScenarioError
from coterie.types import Observation, SeatId


def check_question(seat: SeatId, observation: Observation, choices: Sequence[str] | None, max_tokens: int) -> None:
    """Raises `ScenarioError` naming the seat, what is wrong with the question, and what it must be."""
    try:
        # most questions were asked before, word for word
        problem = _asked(observation, tuple(choices) if type(choices) is list else choices, max_tokens)
    except TypeError:  # what is in it cannot be looked up, and so is no text
        problem = _problem(observation, choices, max_tokens)
    if problem:
        raise ScenarioError(f"seat {seat!r} {problem}")


def _problem(observation: object, choices: object, max_tokens: object) -> str:
    if not isinstance(observation, Observation):
        return f"was shown {observation!r}; show it an Observation(user=…)"
    for part in ("system", "user", "prefix"):
        text = getattr(observation, part)
        if not isinstance(text, str):
            return f"was shown an Observation whose {part} is {text!r}; it must be text"
    if not observation.user.strip():
        return "was shown an empty prompt; Observation.user must say something"
    if not isinstance(max_tokens, int) or max_tokens < 1:
        return f"was given {max_tokens!r} tokens to answer in; max_tokens must be a whole number of at least 1"
    return "" if choices is None else _problem_of_choices(choices)


_asked = lru_cache(maxsize=65536)(_problem)


def _problem_of_choices(choices: object) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return f"was given {choices!r} for choices; they must be a sequence of texts"
    if not choices:
        return "was given an empty list of choices; give at least one, or None for free text"
    odd = [choice for choice in choices if not isinstance(choice, str)]
    if odd:
        return f"was given the choice {odd[0]!r}; choices must be texts"
    if len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices):
        return f"was given choices that are blank or stand twice: {list(choices)}"
    return ""
