"""One answer while it is made, and all answers of a request together.

    Plan ──► Answer (the engine's steering: constraint, penalties, stops, text) ──► Piece after Piece ──► finish reason

An `Answer` decides what ends it: a stop token, a stop string, a constraint that is complete, the token limit.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from coterie.serve.engine import Step, Token, TokenEngine
from coterie.serve.grammar import AllowedOnly, Constraint, Unconstrained
from coterie.serve.plan import Plan
from coterie.serve.text import Text, Unfolding

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to an answer."""

    text: str
    """Text that became certain; may lag behind the tokens."""
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or the request's own stop token that ended the answer."""


class Answer:
    """One sequence; the engine's `Steering`."""

    def __init__(self, plan: Plan, text: Text, constraint: Constraint | None = None) -> None:
        self.plan = plan
        self.tell: Callable[[Piece], None] | None = None
        """Called with every piece as it comes."""
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.born = time.perf_counter()
        self.times: list[float] = []
        """When each token came, of `time.perf_counter`."""
        self._unfolding = Unfolding(
            text,
            plan.request.prompt_ids,
            stops=plan.stops,
            include_stop=plan.include_stop,
            skip_special=plan.skip_special,
        )
        if constraint is None:
            constraint = Unconstrained() if plan.allowed is None else AllowedOnly(plan.allowed)
        self._constraint = constraint
        self._counts: dict[int, int] = {}
        self._enders = frozenset((*plan.eos_ids, *plan.stop_ids))

    # -- steering -----------------------------------------------------------------------------------------------

    def before(self) -> Step:
        """See `Steering.before`."""
        step = self._constraint.step()
        bias = dict(self.plan.bias or {})
        if self.plan.presence_penalty or self.plan.frequency_penalty:
            for token, count in self._counts.items():
                penalty = self.plan.presence_penalty + self.plan.frequency_penalty * count
                bias[token] = bias.get(token, 0.0) - penalty
        if len(self.tokens) < self.plan.min_tokens:
            bias.update(dict.fromkeys(self._enders, -math.inf))
        return Step(step.ids, step.mask, bias) if bias else step

    def after(self, token: Token) -> bool:
        """See `Steering.after`."""
        self.tokens.append(token)
        self.times.append(time.perf_counter())
        self._counts[token.token_id] = self._counts.get(token.token_id, 0) + 1
        enough = len(self.tokens) >= self.plan.min_tokens
        said = ""
        if token.token_id in self._enders and enough:
            self._end("stop", None if token.token_id in self.plan.eos_ids else token.token_id)
            if self.plan.include_stop and self.stop_reason is not None:
                said = self._unfolding.add(token.token_id)
        else:
            self._constraint.accept(token.token_id)
            said = self._unfolding.add(token.token_id, look=enough)
            if self._unfolding.stopped_by is not None:
                self._end("stop", self._unfolding.stopped_by)
            elif self._constraint.ended:
                self._end("stop")
            elif len(self.tokens) >= self.plan.request.max_tokens:
                self._end("length")
        if self.finish_reason is not None:
            said += self._unfolding.finish()
        self.text += said
        if self.tell is not None:
            self.tell(Piece(said, (token,), self.finish_reason, self.stop_reason))
        return self.finish_reason is not None

    def _end(self, reason: FinishReason, stop: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop


async def complete(engine: TokenEngine, answers: Sequence[tuple[int, Answer]]) -> None:
    """Generate all of these (index in its plan, answer); when one fails or the call is cancelled, all end."""
    tasks = [asyncio.ensure_future(engine.run(answer.plan.answer(index), answer)) for index, answer in answers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # the adapter may be let go once nothing runs under it, so leave no sooner
        await asyncio.gather(*tasks, return_exceptions=True)


Numbered = tuple[int, Piece]
"""(place of the answer among those of the request, what was added to it)."""


async def stream(engine: TokenEngine, answers: Sequence[tuple[int, Answer]]) -> AsyncGenerator[Numbered, None]:
    """The pieces of all answers as they come; use it within `contextlib.aclosing`, whose end ends what still runs."""
    queue: asyncio.Queue[Numbered | None] = asyncio.Queue()
    for place, (_, answer) in enumerate(answers):
        answer.tell = partial(_put, queue, place)
    work = asyncio.ensure_future(complete(engine, answers))
    work.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (item := await queue.get()) is not None:
            yield item
        await work  # raises what made it fail
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _put(queue: asyncio.Queue[Numbered | None], place: int, piece: Piece) -> None:
    queue.put_nowait((place, piece))
