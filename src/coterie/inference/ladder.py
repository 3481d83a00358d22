"""Which tier answers: the best one that is up, found out at start, in every call, and again while running.

    Ladder:  camel -> http -> local -> simulated        (any part of it, in configured order; simulated only last)
        a call starts at the first tier that is up, and goes on to the next inside the call when the tier fails
        a tier that fails is left: at once when it says it cannot serve at all, else after `TOLERATED` failures in a row
        a tier that is down is looked at again in the background, after 1 s, 2 s, 4 s, … up to a limit; when it is
        well it is used again

A tier fails when its servers do or when what they return cannot be used. A request that is refused (too long, an
adapter never published, the server's 400) is the request's own error: it is raised, and no other tier is asked.
Every change of the tier in use is told once, by log and observer; that answers are simulated is told as a warning.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from coterie.errors import ConfigError, CoterieError, EngineError
from coterie.inference.pool import NoServers
from coterie.inference.trust import TierFailedError
from coterie.inference.wire import FaultKind, ServerFault
from coterie.types import Tier

T = TypeVar("T")
R = TypeVar("R")

TOLERATED = 3
"""Calls in a row that may fail in a tier that does not say it is down, before it is left."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
DETECT_S = 30.0
"""Seconds a look at one tier may take."""

logger = logging.getLogger("coterie.tiers")


@dataclass(frozen=True, slots=True)
class TierStatus:
    """How a tier is, for doctor and console."""

    tier: Tier
    up: bool
    in_use: bool
    """Whether the next call starts here."""
    why: str
    """Why it is down, or the last failure of one that is up; empty when there was none since it last answered."""
    retry_in_s: float
    """Until it is looked at again; 0 when it is up."""


@dataclass(slots=True)
class Rung(Generic[T]):
    """One tier of a ladder: what answers there, and how to find out whether it can."""

    tier: Tier
    subject: T
    detect: Callable[[], Awaitable[None]]
    """Returns when the tier can answer; raises `CoterieError` saying why it cannot."""
    up: bool = True
    why: str = ""
    failures: int = 0
    """Calls in a row that failed."""
    falls: int = 0
    """How often it went down, to tell news from old news."""
    strikes: int = 0
    """Looks and falls since a call last succeeded; the pause doubles with each."""
    retry_at: float = 0.0


@dataclass(slots=True)
class _Loops:
    """The tasks of one event loop; a training run may use several loops, one after the other."""

    loop: asyncio.AbstractEventLoop
    watch: asyncio.Task[None] | None = None
    starting: asyncio.Task[None] | None = None


class Ladder(Generic[T]):
    """Tiers in order, with detection, fallback and return. Knows nothing of what is asked."""

    def __init__(
        self,
        rungs: Sequence[Rung[T]],
        *,
        on_change: Callable[[str], None] | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
        longest_pause_s: float = LONGEST_PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is told every change of the tier in use, a line of text each (an observer's `note`).

        Raises:
            ConfigError: no tier, a tier twice, or simulated before another.
        """
        tiers = [rung.tier for rung in rungs]
        if not tiers:
            raise ConfigError("no tier can be used; configure servers, a base model, or the tier simulated")
        if len(set(tiers)) < len(tiers):
            raise ConfigError(f"inference.tiers names a tier twice: {', '.join(tiers)}")
        if Tier.SIMULATED in tiers[:-1]:
            raise ConfigError("inference.tiers: simulated must come last, because it always answers")
        self.rungs = tuple(rungs)
        self._on_change = on_change
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._clock = clock
        self._started = False
        self._told: tuple[Tier, bool] | None = None
        self._loops: _Loops | None = None

    @property
    def in_use(self) -> Rung[T]:
        """Where the next call starts: the first tier that is up, or the first at all when none is."""
        return next((rung for rung in self.rungs if rung.up), self.rungs[0])

    def another_after(self, tier: Tier) -> bool:
        """Whether a call that fails in `tier` would go on to another."""
        at = next((index for index, rung in enumerate(self.rungs) if rung.tier is tier), len(self.rungs))
        return any(rung.up for rung in self.rungs[at + 1 :])

    def status(self) -> tuple[TierStatus, ...]:
        """Every tier, in order."""
        now, in_use = self._clock(), self.in_use
        return tuple(
            TierStatus(
                rung.tier,
                rung.up,
                rung.up and rung is in_use,
                rung.why,
                0.0 if rung.up else max(0.0, rung.retry_at - now),
            )
            for rung in self.rungs
        )

    async def start(self) -> None:
        """Look at every tier. Called by the first call; calling it again does nothing."""
        if self._started:
            return
        loops = self._here()
        if loops.starting is None:
            loops.starting = loops.loop.create_task(self._detect_all())
        await asyncio.shield(loops.starting)

    async def run(self, call: Callable[[T], Awaitable[R]]) -> R:
        """Answer one call. A tier that failed in it is not asked again in it.

        Raises:
            RequestError: the request is refused; no other tier is asked.
            EngineError: no tier could answer; the message has each tier's reason.
        """
        await self.start()
        self._watch()
        tried: list[Rung[T]] = []
        for last_resort in (False, True):
            # tiers that are down are asked when no other answered: a server may be back before the next look
            for rung in self.rungs:
                if rung in tried or not (rung.up or last_resort):
                    continue
                tried.append(rung)
                falls = rung.falls
                try:
                    result = await call(rung.subject)
                except EngineError as error:
                    if not tier_failed(error):
                        raise
                    self._failed(rung, error, falls)
                    continue
                self._answered(rung)
                return result
        whys = "; ".join(f"{rung.tier}: {rung.why}" for rung in self.rungs)
        raise EngineError(f"no tier could answer ({whys}); `coterie doctor` says how to mend each")

    async def look_again(self) -> None:
        """Look now at every tier that is down, whenever it was to be looked at."""
        await self.start()
        await asyncio.gather(*(self._detect(rung) for rung in self.rungs if not rung.up))

    def left(self, tier: Tier, why: str) -> None:
        """Leave `tier` for a reason found outside a call."""
        for rung in self.rungs:
            if rung.tier is tier and rung.up:
                self._fall(rung, why)

    async def pause(self) -> None:
        """End the background look until the next call."""
        loops, self._loops = self._loops, None
        if loops is None or loops.loop is not asyncio.get_running_loop():
            return
        for task in (loops.watch, loops.starting):
            if task is not None and not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def close(self) -> None:
        """End the background look. A later call begins anew, by looking at every tier."""
        await self.pause()
        self._started = False

    # -- news ---------------------------------------------------------------------------------------------------

    def _failed(self, rung: Rung[T], error: EngineError, falls: int) -> None:
        if rung.falls != falls:
            return  # it went down while this call was under way, and may be back since
        rung.failures += 1
        rung.why = str(error)
        if rung.up and (not isinstance(error, ServerFault) or rung.failures >= TOLERATED):
            self._fall(rung, str(error))

    def _fall(self, rung: Rung[T], why: str) -> None:
        rung.up, rung.why = False, why
        rung.falls += 1
        self._pause(rung)
        self._tell()
        self._watch()

    def _pause(self, rung: Rung[T]) -> None:
        rung.retry_at = self._clock() + min(self._longest_pause_s, self._first_pause_s * 2.0 ** min(rung.strikes, 30))
        rung.strikes += 1

    def _answered(self, rung: Rung[T]) -> None:
        rung.failures = rung.strikes = 0
        rung.why = ""
        if not rung.up:
            rung.up = True
            self._tell()
        if rung.tier is Tier.SIMULATED and self._told is not None and not self._told[1]:
            # a better tier is up, but failed this call
            self._told = (self._told[0], True)
            self._say_simulated()

    def _tell(self) -> None:
        """Say which tier is in use, if that changed."""
        rung = self.in_use
        simulated = rung.tier is Tier.SIMULATED
        if not rung.up:
            self._say(logging.WARNING, f"no tier is up ({self._whys()}); calls wait for the first that answers")
            return
        if self._told is not None and self._told[0] is rung.tier:
            return
        first, self._told = self._told is None, (rung.tier, simulated)
        if simulated:
            self._say_simulated()
            return
        whys = self._whys()
        level = logging.WARNING if whys else logging.INFO
        again = "" if first or rung is not self.rungs[0] else " again"
        self._say(level, f"inference by tier {rung.tier}{again}" + (f", because {whys}" if whys else ""))

    def _say_simulated(self) -> None:
        whys = self._whys() or "the other tiers failed a call"
        self._say(
            logging.WARNING,
            f"SIMULATED RESPONSES: {whys}. Answers are made up, nothing is trained on them, and no weight will move "
            "until another tier is up; `coterie doctor` says how to mend each",
        )

    def _whys(self) -> str:
        """Why the tiers before the one in use are not in use."""
        better = self.rungs[: self.rungs.index(self.in_use)] if self.in_use.up else self.rungs
        return "; ".join(f"{rung.tier} is down: {rung.why}" for rung in better)

    def _say(self, level: int, text: str) -> None:
        logger.log(level, "%s", text)
        if self._on_change is not None:
            self._on_change(text)

    # -- looking ------------------------------------------------------------------------------------------------

    def _here(self) -> _Loops:
        """The tasks of the running loop; those of an earlier loop ended with it."""
        loop = asyncio.get_running_loop()
        if self._loops is None or self._loops.loop is not loop:
            self._loops = _Loops(loop)
        return self._loops

    async def _detect_all(self) -> None:
        await asyncio.gather(*(self._detect(rung, tell=False) for rung in self.rungs))
        self._started = True
        self._tell()
        self._watch()

    async def _detect(self, rung: Rung[T], tell: bool = True) -> None:
        try:
            async with asyncio.timeout(DETECT_S):
                await rung.detect()
        except (CoterieError, ImportError, OSError) as error:  # TimeoutError is an OSError
            rung.why = str(error) or f"no answer within {DETECT_S:g} s"
            rung.falls += rung.up
            rung.up = False
            self._pause(rung)
            return
        if not rung.up:
            rung.up, rung.failures, rung.why = True, 0, ""
            if tell:
                self._tell()

    def _watch(self) -> None:
        """See to it that tiers that are down are looked at again."""
        if all(rung.up for rung in self.rungs):
            return
        try:
            loops = self._here()
        except RuntimeError:
            return  # told from outside an event loop; the next call watches
        if loops.watch is None or loops.watch.done():
            loops.watch = loops.loop.create_task(self._look(), name="coterie-tiers")

    async def _look(self) -> None:
        while down := [rung for rung in self.rungs if not rung.up]:
            await asyncio.sleep(max(0.0, min(rung.retry_at for rung in down) - self._clock()))
            now = self._clock()
            await asyncio.gather(*(self._detect(rung) for rung in down if not rung.up and rung.retry_at <= now))


def tier_failed(error: EngineError) -> bool:
    """Whether the tier failed, so that another may answer; else the request itself was refused."""
    if isinstance(error, ServerFault):
        return error.kind is not FaultKind.REJECTED
    return isinstance(error, NoServers | TierFailedError)
