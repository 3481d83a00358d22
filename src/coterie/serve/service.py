"""What all requests of one server share, and the life of a request.

body ──► lease of its adapter ──► admitted ──► Job.prepare ──► Job.whole, or Job.events one by one
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from coterie.serve.adapters import AdapterRegistry
from coterie.serve.engine import TokenEngine
from coterie.serve.errors import busy
from coterie.serve.generation import Answer
from coterie.serve.grammar import Compiled, Grammars
from coterie.serve.metrics import ServeMetrics
from coterie.serve.plan import Plan
from coterie.serve.protocol import SamplingBody
from coterie.serve.settings import ServeSettings
from coterie.serve.text import Text
from coterie.types import AdapterVersion


class Service:
    """One engine, its adapters, and who may still come in."""

    def __init__(self, engine: TokenEngine, settings: ServeSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.text = Text(engine.tokenizer)
        self.grammars = Grammars(self.text, engine.vocabulary, engine.stop_ids)
        self.adapters = AdapterRegistry(engine, settings)
        self.metrics = ServeMetrics(engine, settings.model, settings.max_adapters)
        self.started = int(time.time())
        self.draining = False
        """Whether the server is on its way out: what runs is finished, nothing new is taken."""
        self.sequences = 0
        """Admitted and not finished."""
        self._rng = random.Random(settings.seed)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return min(self.engine.context, self.settings.max_model_len or self.engine.context)

    def seed(self) -> int:
        """For a request that brings none."""
        return self._rng.getrandbits(62)

    @contextmanager
    def admitted(self, sequences: int) -> Iterator[None]:
        """Room for this many sequences while the block lasts.

        Raises:
            ApiError: 503 with Retry-After when there is none.
        """
        if self.draining:
            raise busy("The server is shutting down.", retry_after_s=10)
        # a request that is larger than the whole server is let in when there is nobody else
        if self.sequences and self.sequences + sequences > self.settings.max_sequences:
            raise busy()
        self.sequences += sequences
        try:
            yield
        finally:
            self.sequences -= sequences

    def answers(self, plan: Plan, compiled: Compiled | None) -> list[tuple[int, Answer]]:
        """The n answers of a plan, each with a constraint of its own."""
        return [
            (index, Answer(plan, self.text, None if compiled is None else compiled.fresh())) for index in range(plan.n)
        ]


class Job(Protocol):
    """One request to generate something, of either kind."""

    @property
    def body(self) -> SamplingBody: ...

    @property
    def sequences(self) -> int:
        """How many it will need."""
        ...

    @property
    def answers(self) -> list[tuple[int, Answer]]:
        """Made by `prepare`."""
        ...

    async def prepare(self, adapter: AdapterVersion | None) -> None:
        """Check everything that can be wrong. Raises `ApiError`."""
        ...

    async def whole(self) -> dict[str, Any]:
        """Generate, and give the reply."""
        ...

    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Generate, and give the reply piece by piece."""
        ...
