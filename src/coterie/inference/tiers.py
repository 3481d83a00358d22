"""The engine of a run: every tier there is, best first, behind one `Engine`.

    TieredEngine -> Ladder (which tier answers) -> RemoteEngine (camel, http), LocalEngine, SimulatedEngine

Every tier is told of every adapter version. One that could not take a version is left, and is given what it missed
before it is used again; so whichever tier answers, it answers under the version that was asked for, or not at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from coterie.errors import CoterieError, EngineError
from coterie.inference.base import Engine
from coterie.inference.calls import CallRecord, CallSink
from coterie.inference.ladder import FIRST_PAUSE_S, LONGEST_PAUSE_S, Ladder, Rung, TierStatus
from coterie.inference.remote import RemoteEngine
from coterie.inference.simulated import LABEL
from coterie.types import AdapterVersion, GenerateRequest, Generation, ModelId, Tier


class TieredEngine:
    """The `Engine` of a run: the first tier that is up answers, and every tier learns of every adapter version."""

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        on_change: Callable[[str], None] | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
        longest_pause_s: float = LONGEST_PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`engines`: in order of preference, one per tier. Closing this closes them.

        Raises:
            ConfigError: see `Ladder`.
        """
        self.ladder: Ladder[Engine] = Ladder(
            [Rung(engine.tier, engine, _Detection(self, engine)) for engine in engines],
            on_change=on_change, first_pause_s=first_pause_s, longest_pause_s=longest_pause_s, clock=clock,
        )  # fmt: skip
        self._owed: dict[Tier, dict[ModelId, tuple[AdapterVersion, Path | None]]] = {
            engine.tier: {} for engine in engines
        }
        for engine in engines:
            if isinstance(engine, RemoteEngine):
                engine.goes_on = lambda tier=engine.tier: self.ladder.another_after(tier)  # type: ignore[misc]

    @property
    def tier(self) -> Tier:
        """The tier the next call starts at."""
        return self.ladder.in_use.tier

    async def start(self) -> None:
        """Find out which tiers are up; otherwise the first call does."""
        await self.ladder.start()

    def status(self) -> tuple[TierStatus, ...]:
        """Every tier, in order."""
        return self.ladder.status()

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`; `Generation.tier` says who answered."""
        return await self.ladder.run(lambda engine: engine.generate(request))

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """Publish to every tier. One that cannot take the version is left, and given it before it is used again.

        Raises:
            EngineError: no tier took it.
        """
        await self.ladder.start()
        refusals = await asyncio.gather(*(self._publish(rung, version, adapter_dir) for rung in self.ladder.rungs))
        whys = [why for why in refusals if why is not None]
        if len(whys) == len(refusals):
            raise EngineError(f"no tier could take adapter {version.name}: {'; '.join(whys)}")

    async def rest(self) -> None:
        """Let go of connections and background looks, before an event loop ends and another goes on."""
        await self.ladder.pause()
        for rung in self.ladder.rungs:
            if isinstance(rung.subject, RemoteEngine):
                await rung.subject.rest()

    async def close(self) -> None:
        """Close every tier."""
        await self.ladder.close()
        for rung in self.ladder.rungs:
            await rung.subject.close()

    async def _publish(self, rung: Rung[Engine], version: AdapterVersion, adapter_dir: Path | None) -> str | None:
        """Why the tier did not take it; None when it did."""
        owed = self._owed[rung.tier]
        missed, directory = owed.get(version.model_id, (None, None))
        if adapter_dir is None and missed == version:
            adapter_dir = directory  # published again only to forget what was cached
        why = f"{rung.tier} is down: {rung.why}"
        if rung.up:
            try:
                await publish_to(rung.subject, version, adapter_dir)
            except CoterieError as error:
                why = f"{rung.tier}: {error}"
                self.ladder.left(rung.tier, f"adapter {version.name} could not be published: {error}")
            else:
                owed.pop(version.model_id, None)
                return None
        owed[version.model_id] = (version, adapter_dir)
        return why

    async def pay(self, engine: Engine) -> None:
        """Give a tier the newest versions it missed. Raises `EngineError` when it cannot take one."""
        owed = self._owed[engine.tier]
        for model_id, (version, adapter_dir) in list(owed.items()):
            await publish_to(engine, version, adapter_dir)
            if owed.get(model_id) == (version, adapter_dir):
                del owed[model_id]


class _Detection:
    """A look at one tier of a `TieredEngine`: it must be well and hold what was published."""

    def __init__(self, tiers: TieredEngine, engine: Engine) -> None:
        self._tiers, self._engine = tiers, engine

    async def __call__(self) -> None:
        if isinstance(self._engine, RemoteEngine):
            await self._engine.detect()
        await self._tiers.pay(self._engine)


async def publish_to(engine: Engine, version: AdapterVersion, adapter_dir: Path | None) -> None:
    """Publish as the engine's tier wants it: those inside the process share the learner's weights."""
    inside = engine.tier in (Tier.LOCAL, Tier.SIMULATED)
    await engine.publish(version, None if inside else adapter_dir)


class Recorded:
    """An engine inside the process, with a record of every call; remote engines keep their own."""

    def __init__(
        self, engine: Engine, calls: CallSink, decode: Callable[[Sequence[int]], str] | None = None, model: str = "base"
    ) -> None:
        """`decode`: token ids to text, for log lines. `model`: the base's name."""
        self.engine, self.tier = engine, engine.tier
        self._calls, self._decode, self._model = calls, decode, model

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`."""
        started = time.perf_counter()
        try:
            made = await self.engine.generate(request)
        except EngineError as error:
            self._record(request, None, time.perf_counter() - started, type(error).__name__)
            raise
        self._record(request, made, time.perf_counter() - started)
        return made

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """See `Engine.publish`."""
        await self.engine.publish(version, adapter_dir)

    async def close(self) -> None:
        """Close the engine."""
        await self.engine.close()

    def _record(self, request: GenerateRequest, made: Generation | None, seconds: float, fault: str = "") -> None:
        text = self._decode(made.token_ids) if made is not None and self._decode is not None else ""
        if self.tier is Tier.SIMULATED and not text.startswith(LABEL):
            text = f"{LABEL} {text}".rstrip()
        self._calls.call(
            CallRecord(
                tier=self.tier, server="", model=request.adapter.model_id if request.adapter else self._model,
                adapter=request.adapter, prompt_tokens=len(request.prompt_ids),
                completion_tokens=len(made.token_ids) if made is not None else 0, latency_s=seconds, queued_s=0.0,
                outcome="ok" if made is not None else "fault", fault=fault, text=text[:200],
            )
        )  # fmt: skip
