"""A `TokenEngine` in memory: exact, quick, and it says what a test tells it to.

    engine = MemoryTokenEngine(tokenizer)
    engine.says("Hello")            # the tokens of this text are all but certain, wherever nothing forbids them

Unless told, logits are a fixed function of (seed, adapter, last two tokens), so log-probabilities can be computed anew.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.errors import AdapterError, EngineError
from coterie.serve.engine import EngineStats, Steering, Token, TokenRequest
from coterie.serve.sampling import allowed_ids, describe, forced, log_softmax, pick
from coterie.types import AdapterVersion


class MemoryTokenEngine:
    """See the module. Every token takes one turn of the event loop, or `delay_s`."""

    def __init__(self, tokenizer: Any, *, context: int = 2048, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        self.vocabulary = len(tokenizer)
        self.context = context
        self.delay_s = 0.0
        self.seed = seed
        self.requests: list[TokenRequest] = []
        self.running = 0
        self.cancelled = 0
        self.adapters: dict[AdapterVersion, str] = {}
        """Content of what was loaded."""
        self.unloaded: list[AdapterVersion] = []
        self.closed = False
        self.broken: Exception | None = None
        self._script: tuple[int, ...] | None = None

    def says(self, text: str | tuple[int, ...] | None, *, end: bool = True) -> None:
        """From now on every answer is this text, then the end of the turn (or, without `end`, the text over again);
        None: as before."""
        if text is None:
            self._script = None
            return
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False)) if isinstance(text, str) else text
        self._script = (*ids, self.stop_ids[0]) if end else ids

    def logits(self, adapter: AdapterVersion | None, prefix: tuple[int, ...], said: int) -> NDArray[np.float32]:
        """(vocabulary,) after `prefix`, of which the last `said` tokens are the answer."""
        content = "" if adapter is None else self.adapters[adapter]
        rng = random.Random(f"{self.seed}/{content}/{prefix[-2:]}")
        row = np.array([rng.gauss(0, 1) for _ in range(self.vocabulary)], dtype=np.float32)
        if self._script is not None:
            row[self._script[said % len(self._script)]] += 40
        return row

    async def run(self, request: TokenRequest, steering: Steering) -> None:
        self.requests.append(request)
        if self.broken is not None:
            raise self.broken
        if request.adapter is not None and request.adapter not in self.adapters:
            raise EngineError(f"adapter {request.adapter.name} is gone")
        self.running += 1
        try:
            tokens = request.prompt_ids
            for position in range(request.max_tokens):
                await asyncio.sleep(self.delay_s)
                step = steering.before()
                ids = allowed_ids(step, self.vocabulary)
                if ids is not None and len(ids) == 1:
                    token = forced(int(ids[0]), request.top_logprobs)
                else:
                    row = self.logits(request.adapter, tokens, position)
                    token = pick(row if ids is None else row[ids], ids, step, request, position)
                tokens = (*tokens, token.token_id)
                if steering.after(token):
                    return
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def score(self, adapter: AdapterVersion | None, token_ids: tuple[int, ...], top: int) -> tuple[Token, ...]:
        if self.broken is not None:
            raise self.broken
        rows = [self.logits(adapter, token_ids[:end], 0) for end in range(1, len(token_ids))]
        return tuple(
            describe(log_softmax(row.astype(np.float64)), None, token, top)
            for row, token in zip(rows, token_ids[1:], strict=True)
        )

    async def load(self, version: AdapterVersion, directory: Path) -> None:
        await asyncio.sleep(self.delay_s)
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise AdapterError(f"adapter {directory}: only plain LoRA is supported")
        self.adapters[version] = (directory / "adapter_model.safetensors").read_text(encoding="utf-8")

    async def unload(self, version: AdapterVersion) -> None:
        del self.adapters[version]
        self.unloaded.append(version)

    def stats(self) -> EngineStats:
        return EngineStats(0.25, 100, 40)

    async def close(self) -> None:
        self.closed = True


def write_adapter(directory: Path, content: str, *, rank: int = 8, kind: str = "LORA") -> Path:
    """A directory `MemoryTokenEngine` loads; what it holds decides its answers."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": rank, "lora_alpha": 2 * rank}))
    (directory / "adapter_model.safetensors").write_text(content)
    return directory
