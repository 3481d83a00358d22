"""`TokenEngine` on today's `LocalEngine`, which only knows whole requests: one request a token.

    run ──► engine.generate(prompt so far, one token out of two) ──► the last hidden state is in the cache
        ──► logits of all sequences that woke together, in one product ──► pick ──► next

The engine's prefix cache makes each of these requests cost one new token. What is sampled by the probe is thrown away:
sampling happens here, under the request's own constraints. Prompts are read in pieces and not all at once, so that no
step of the engine, which runs inside the event loop, keeps /health waiting for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.errors import EngineError
from coterie.inference.local.engine import LocalEngine
from coterie.lm.adapters import load_adapter
from coterie.serve.engine import EngineStats, Steering, Token, TokenRequest
from coterie.serve.sampling import allowed_ids, describe, forced, log_softmax, pick
from coterie.types import AdapterVersion, GenerateRequest

_FEW = 1024
"""Allowed sets up to this size have only their own logits computed."""

_PROBE = ((0,), (1,))
"""Two answers of one token: the cheapest request that leaves a hidden state behind."""

Row = tuple[Tensor, tuple[int, ...] | None, asyncio.Future[NDArray[np.float32]]]
"""(hidden,), the vocabulary ids asked for or None for all, and who waits for their logits."""


class LocalTokenEngine:
    """See the module."""

    def __init__(self, engine: LocalEngine, *, prefill_tokens: int = 256) -> None:
        """`prefill_tokens`: prompt tokens that may go into one step of the engine."""
        self.engine = engine
        self.prefill_tokens = prefill_tokens
        self._reading = 0
        self._gate = asyncio.Lock()
        self._freed = asyncio.Event()
        self._rows: list[Row] = []
        self._queries = self._hits = 0

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        return self.engine.base.chat.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.engine.base.chat.stop_ids

    @property
    def vocabulary(self) -> int:
        return self.engine.base.vocabulary

    @property
    def context(self) -> int:
        return min(self.engine.base.context, self.engine.cache.slots)

    def stats(self) -> EngineStats:
        cache = self.engine.cache
        return EngineStats(1 - cache.free / cache.slots, self._queries, self._hits)

    # -- sampling -----------------------------------------------------------------------------------------------

    async def run(self, request: TokenRequest, steering: Steering) -> None:
        """See `TokenEngine.run`."""
        length = len(request.prompt_ids) + request.max_tokens
        if not request.prompt_ids:
            raise EngineError("prompt_ids is empty")
        if length > self.context:
            raise EngineError(f"prompt and answer need {length} tokens, but the engine holds {self.context}")
        self._queries += len(request.prompt_ids)
        self._hits += len(request.prompt_ids) - self._missing(request.adapter, request.prompt_ids)
        tokens = list(request.prompt_ids)
        read = False
        for position in range(request.max_tokens):
            step = steering.before()
            ids = allowed_ids(step, self.vocabulary)
            if ids is not None and len(ids) == 1:
                token = forced(int(ids[0]), request.top_logprobs)
            else:
                if not read:
                    await self._read(request.adapter, request.prompt_ids)
                    read = True
                few = ids if ids is not None and len(ids) <= _FEW else None
                logits = await self._logits(
                    request.adapter, tuple(tokens), None if few is None else tuple(few.tolist())
                )
                token = pick(logits if few is not None or ids is None else logits[ids], ids, step, request, position)
            tokens.append(token.token_id)
            if steering.after(token):
                return

    async def score(self, adapter: AdapterVersion | None, token_ids: tuple[int, ...], top: int) -> tuple[Token, ...]:
        """See `TokenEngine.score`."""
        if len(token_ids) > self.context:
            raise EngineError(f"{len(token_ids)} tokens to score, but the engine holds {self.context}")
        found: list[Token] = []
        for start in range(1, len(token_ids), self.prefill_tokens):
            ends = range(start, min(start + self.prefill_tokens, len(token_ids)))
            rows = await _all(self._logits(adapter, token_ids[:end], None) for end in ends)
            for end, row in zip(ends, rows, strict=True):
                found.append(describe(log_softmax(row.astype(np.float64)), None, token_ids[end], top))
        return tuple(found)

    async def _logits(
        self, adapter: AdapterVersion | None, token_ids: tuple[int, ...], rows: tuple[int, ...] | None
    ) -> NDArray[np.float32]:
        """Logits after `token_ids`, (rows,) or (vocabulary,). Whoever asks in the same turn of the event loop shares
        one product."""
        hidden = await self._hidden(adapter, token_ids)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[NDArray[np.float32]] = loop.create_future()
        self._rows.append((hidden, rows, future))
        if len(self._rows) == 1:
            loop.call_soon(self._flush)
        return await future

    def _flush(self) -> None:
        waiting, self._rows = self._rows, []
        groups: dict[tuple[int, ...] | None, list[Row]] = {}
        for row in waiting:
            if not row[2].done():
                groups.setdefault(row[1], []).append(row)
        base = self.engine.base
        for rows, members in groups.items():
            try:
                wanted = None if rows is None else torch.tensor(rows, device=base.device)
                with torch.no_grad():
                    logits = base.logits(torch.stack([hidden for hidden, _, _ in members]), wanted).cpu().numpy()
            except Exception as error:  # noqa: BLE001 - whoever waits must learn of it
                for _, _, future in members:
                    future.set_exception(error)
            else:
                for (_, _, future), found in zip(members, logits, strict=True):
                    future.set_result(found)

    async def _hidden(self, adapter: AdapterVersion | None, token_ids: tuple[int, ...]) -> Tensor:
        """Last hidden state (hidden,) after `token_ids`."""
        probe = GenerateRequest(prompt_ids=token_ids, adapter=adapter, seed=0, max_tokens=1, choices=_PROBE)
        while True:
            await self.engine.generate(probe)
            # the engine rests for some turns of the event loop before it may give the cache to others
            hidden = self.engine.cache.node(adapter, token_ids).hidden
            if hidden is not None:
                return hidden

    # -- reading prompts ----------------------------------------------------------------------------------------

    async def _read(self, adapter: AdapterVersion | None, prompt: tuple[int, ...]) -> None:
        """Bring a prompt into the cache, `prefill_tokens` of all prompts together at a time, in order of arrival."""
        missing = self._missing(adapter, prompt)
        while missing:
            taken = min(missing, self.prefill_tokens)
            async with self._gate:
                while self._reading and self._reading + taken > self.prefill_tokens:
                    self._freed.clear()
                    await self._freed.wait()
                missing = self._missing(adapter, prompt)  # somebody else may have read it while this one waited
                if not missing:
                    return
                taken = min(missing, self.prefill_tokens)
                self._reading += taken
            try:
                await self._hidden(adapter, prompt[: len(prompt) - missing + taken])
            finally:
                self._reading -= taken
                self._freed.set()
            missing -= taken

    def _missing(self, adapter: AdapterVersion | None, prompt: tuple[int, ...]) -> int:
        """Tokens at the end of a prompt that are not in the cache."""
        node = self.engine.cache.node(adapter, prompt)
        count = 0
        while node.depth >= 0 and node.slot < 0 and node.parent is not None:
            count += 1
            node = node.parent
        return count

    # -- adapters -----------------------------------------------------------------------------------------------

    async def load(self, version: AdapterVersion, directory: Path) -> None:
        """See `TokenEngine.load`."""
        base = self.engine.base
        adapter = await asyncio.to_thread(load_adapter, directory, base)
        base.bank.freeze(version, adapter)

    async def unload(self, version: AdapterVersion) -> None:
        """See `TokenEngine.unload`."""
        self.engine.base.bank.drop(version)

    async def close(self) -> None:
        await self.engine.close()


async def _all(work: Iterable[Coroutine[Any, Any, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
    """Results in order; when one fails or this is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
