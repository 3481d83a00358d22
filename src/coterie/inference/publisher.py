"""Adapter versions on several servers: all or enough of them serve a version before anybody asks for it.

    publish:  load everywhere under a new name -> canary -> enough? -> flip (the pool routes to those that hold it)
                                                 \\-> not enough: unload, `PublishError`, the old one is served on
    collect:  no call needs it any more -> forget it -> unload everywhere -> every reader is known to be gone -> delete

Names are immutable: a version is served under a name of its own from a directory of its own, because a server that
reloads under an old name answers from stale caches. A server reads an adapter's directory again whenever it has
evicted it, and dies when that is gone; so `readers` are all servers that were ever told to load it, successfully or
not, until each has confirmed that it is unloaded. A server that cannot be reached stays a reader.

A server that refuses a version, or serves it wrongly, leaves the pool until a later version loads there. One that is
merely away gets what is current when it comes back (`load`, which the pool calls), before calls that need it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from coterie.errors import ConfigError, EngineError
from coterie.inference.canary import CanaryError, Content, Probe, check, check_probe, content_of, score
from coterie.inference.pool import ServerPool
from coterie.inference.wire import FaultKind, ServerControl, ServerFault, ServerSpec, Transport
from coterie.types import AdapterVersion, ModelId

__all__ = ["Probe", "PublishError", "PublishReport", "Publisher"]

T = TypeVar("T")

PASSING = (FaultKind.CONNECTION, FaultKind.TIMEOUT, FaultKind.OVERLOADED)
"""Faults that say nothing of the adapter: tried again, and no reason to leave the pool."""
TRY_AGAIN_AFTER_S = (0.2, 1.0)
LONGEST_PAUSE_S = 5.0
DOUBT_S = 120.0
"""A load that was never answered may end this much later."""

logger = logging.getLogger("coterie.publisher")


class PublishError(EngineError):
    """A version could not be published; what was served before is served still."""


@dataclass(frozen=True, slots=True)
class PublishReport:
    """How a publication went."""

    version: AdapterVersion
    name: str
    """It is served under."""
    served_by: tuple[str, ...]
    """Names of the servers that hold it."""
    failed: Mapping[str, str]
    """Server name -> why it does not."""
    seconds: float


@dataclass(slots=True, eq=False)
class _Published:
    version: AdapterVersion
    name: str
    directory: Path
    content: Content
    probe: Probe | None
    flipped: bool = False
    """Whether calls may ask for it."""
    collected: bool = False
    """Whether it is being taken down, so that nobody may load it again."""
    readers: dict[str, ServerSpec] = field(default_factory=dict)
    doubtful: dict[str, float] = field(default_factory=dict)
    """Readers that never answered a load, and when that was: the load may still be under way there."""
    busy: dict[str, asyncio.Lock] = field(default_factory=dict)
    """By server: one load or unload at a time, or a late load would undo an unload."""

    def alone(self, server: ServerSpec) -> asyncio.Lock:
        return self.busy.setdefault(server.name, asyncio.Lock())


class Publisher:
    """See the module. It becomes the pool's loader where the pool has none.

    Args:
        quorum: share of the healthy servers that must hold a version before it is used, in (0, 1].
        canary_tolerance: see `canary.check`, nats a token.
        keep: versions behind the current one that `collect` leaves alone.
        base: the base's served name; None: the first name each server lists that is none of ours.
        tag: put at the end of every served name, to keep runs apart that share servers.
        canary_timeout_s: of one canary call.
        drain_s: longest wait of `collect` for calls that still need a version; it is left for the next time then.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self,
        pool: ServerPool,
        control: ServerControl,
        transport: Transport,
        *,
        quorum: float,
        canary_tolerance: float,
        keep: int = 2,
        base: str | None = None,
        tag: str = "",
        canary_timeout_s: float = 60.0,
        drain_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0.0 < quorum <= 1.0:
            raise ConfigError(f"quorum {quorum} must be above 0 and at most 1: the share of the healthy servers")
        if not canary_tolerance > 0 or keep < 0:
            raise ConfigError(f"canary_tolerance {canary_tolerance} must be positive and keep {keep} not negative")
        self._pool = pool
        self._control = control
        self._transport = transport
        self._quorum = quorum
        self._tolerance = canary_tolerance
        self._keep = keep
        self._base = base
        self._tag = tag
        self._canary_timeout_s = canary_timeout_s
        self._drain_s = drain_s
        self._clock = clock
        self._published: dict[str, _Published] = {}
        """By served name; also those on their way in and on their way out."""
        self._retired: dict[str, str] = {}
        """Servers we took out of the pool, and the reason we gave."""
        if pool.loader is None:
            pool.loader = self.load

    def name(self, version: AdapterVersion) -> str:
        """The served name of `version`; "@" is kept out because some proxies and clients give it a meaning."""
        name = version.name.replace("@", "-")
        return f"{name}-{self._tag}" if self._tag else name

    # -- publishing -----------------------------------------------------------------------------------------------

    async def publish(self, version: AdapterVersion, directory: Path, probe: Probe | None) -> PublishReport:
        """Make `version`, saved in `directory`, available. Publishing it again brings it to servers that lack it.

        Args:
            directory: in PEFT's format, never to be changed; deleted by `collect`.
            probe: None: no canary.

        Raises:
            PublishError: too few servers hold it now, or the version was published with other content.
            CanaryError: an impossible probe.
        """
        began = self._clock()
        if probe is not None:
            check_probe(probe)
        record = self._record(version, directory, await asyncio.to_thread(content_of, directory), probe)
        told = {server.name for server in self._pool.within_reach()} | self._out()
        targets = [server for server in self._pool.servers() if server.name in told]
        healthy = len(self._pool.healthy())
        if not targets:
            raise PublishError(f"adapter {version.name}: no server is healthy; see `coterie doctor`")
        ended = await asyncio.gather(*(self._try(server, record) for server in targets))
        failed = {server.name: error for server, error in zip(targets, ended, strict=True) if error is not None}
        holding = [server.name for server in targets if server.name not in failed]
        needed = max(1, math.ceil(self._quorum * healthy - 1e-9))
        if len(holding) < needed:
            if not record.flipped:
                await self._unload(record)
            why = "; ".join(str(error) for error in failed.values())
            raise PublishError(f"adapter {version.name}: {len(holding)} servers hold it, {needed} must: {why}")
        self._flip(record, holding, failed)
        reasons = {name: str(error) for name, error in failed.items()}
        return PublishReport(version, record.name, tuple(holding), reasons, self._clock() - began)

    def _record(self, version: AdapterVersion, directory: Path, content: Content, probe: Probe | None) -> _Published:
        name = self.name(version)
        record = self._published.get(name)
        if record is None:
            record = self._published[name] = _Published(version, name, directory, content, probe)
        elif record.collected:
            raise PublishError(f"adapter {version.name} was published and collected; publish a newer version")
        elif record.version != version or record.content.digest != content.digest:
            raise PublishError(
                f"adapter {version.name} was published as {name!r} from {record.directory} with other content; "
                "a version never changes, so give what changed a new number"
            )
        elif probe is not None:
            record.probe = probe
        return record

    def _out(self) -> set[str]:
        """Servers that are out of the pool for our reason and no other."""
        because = {state.name: state.retired_because for state in self._pool.states()}
        return {name for name, why in self._retired.items() if because.get(name) == why}

    def _flip(self, record: _Published, holding: list[str], failed: Mapping[str, EngineError]) -> None:
        record.flipped = True
        out = self._out()
        present = {server.name for server in self._pool.servers()}
        for name in holding:
            if name in present:  # else it was removed meanwhile
                self._pool.mark(name, record.name, True)
                if name in out:
                    self._pool.restore(name)
                self._retired.pop(name, None)
        for name, error in failed.items():
            if name in present and not (isinstance(error, ServerFault) and error.kind in PASSING):
                self._pool.mark(name, record.name, False)
                self._retired[name] = why = f"cannot serve adapter {record.version.name}: {error}"
                self._pool.retire(name, why)
                logger.warning("%s leaves the pool: it %s", name, why)

    async def _try(self, server: ServerSpec, record: _Published) -> EngineError | None:
        try:
            await self._load(server, record)
        except CanaryError as error:
            await self._unload_from(server, record)
            return error
        except EngineError as error:
            return error
        return None

    async def load(self, server: ServerSpec, adapter_name: str) -> None:
        """Load a version that is published on one server, and check it there; what `ServerPool` calls when it is
        missing.

        Raises:
            ServerFault: the server cannot load it.
            PublishError: there is no such version, or it is being collected.
            CanaryError: the server serves something else under that name.
        """
        record = self._published.get(adapter_name)
        if record is None or record.collected or not record.flipped:
            raise PublishError(f"adapter {adapter_name!r} is not published, or was collected because it is too old")
        if (error := await self._try(server, record)) is not None:
            raise error

    async def _load(self, server: ServerSpec, record: _Published) -> None:
        async with record.alone(server):
            others = await self._patiently(lambda: self._others(server, record))
            if record.collected:
                raise PublishError(f"adapter {record.version.name} was collected meanwhile")
            record.readers[server.name] = server
            # until it answers: a load that is given up here may still succeed there
            record.doubtful[server.name] = self._clock() + DOUBT_S
            path = server.sees(str(record.directory.absolute()))
            try:
                await self._patiently(lambda: self._control.load_adapter(server, record.name, path))
            except ServerFault as fault:
                if fault.kind not in PASSING:
                    del record.doubtful[server.name]
                raise
            del record.doubtful[server.name]
            if record.probe is not None:
                await self._patiently(lambda: self._check(server, record, others))

    async def _others(self, server: ServerSpec, record: _Published) -> dict[str, tuple[float, ...]]:
        """What those say there that must not answer as `record` does."""
        if record.probe is None:
            return {}
        names = await self._unlike(server, record)
        probe, timeout_s = record.probe, self._canary_timeout_s
        return {name: await score(self._transport, server, name, probe, timeout_s) for name in names}

    async def _check(self, server: ServerSpec, record: _Published, others: Mapping[str, tuple[float, ...]]) -> None:
        assert record.probe is not None
        await check(
            self._transport,
            server,
            record.name,
            record.probe,
            tolerance=self._tolerance,
            unlike=others,
            timeout_s=self._canary_timeout_s,
        )

    async def _unlike(self, server: ServerSpec, record: _Published) -> list[str]:
        """Names served there that must not answer as `record` does."""
        served = await self._control.models(server)
        names = []
        if not record.content.zero:
            base = self._base or next((name for name in served if name not in self._published), None)
            names += [] if base is None else [base]
        before = [
            other
            for other in self._published.values()
            if other.version.model_id == record.version.model_id
            and other.version.version < record.version.version
            and other.flipped
            and other.name in served
            and other.content.digest != record.content.digest
            and not (other.content.zero and record.content.zero)
        ]
        if before:
            names.append(max(before, key=lambda other: other.version.version).name)
        return names

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask, and again after faults that pass."""
        for pause in TRY_AGAIN_AFTER_S:
            try:
                return await ask()
            except ServerFault as fault:
                if fault.kind not in PASSING or fault.kind is FaultKind.TIMEOUT:
                    raise  # a time-out was long enough
                await asyncio.sleep(min(LONGEST_PAUSE_S, max(pause, fault.retry_after_s)))
        return await ask()

    # -- collecting -----------------------------------------------------------------------------------------------

    async def collect(
        self, current: Mapping[ModelId, int], also: Collection[AdapterVersion] = ()
    ) -> tuple[AdapterVersion, ...]:
        """Take down versions that are more than `keep` behind `current`: drain, unload, delete.

        Args:
            current: version in use of each model; other models' versions are left alone.
            also: versions to keep however old they are (frozen opponents).

        Returns:
            Versions that can no longer be asked for since this call. The directories of those whose every reader has
            confirmed are deleted; the others' at a later call.
        """
        kept = set(also)
        old = [
            record
            for record in self._published.values()
            if record.version.model_id in current
            and record.version.version < current[record.version.model_id] - self._keep
            and record.version not in kept
        ]
        fresh = [record for record in old if not record.collected]
        await asyncio.gather(*(self._take_down(record) for record in old))
        return tuple(record.version for record in fresh if record.collected)

    async def withdraw(self) -> tuple[Path, ...]:
        """Take everything down, at the end of a run; as `collect`, whatever is current.

        Returns:
            Directories that are not deleted, because a server did not say that it has let go of them.
        """
        await asyncio.gather(*(self._take_down(record) for record in list(self._published.values())))
        return tuple(record.directory for record in self._published.values())

    async def _take_down(self, record: _Published) -> None:
        if not record.collected:
            try:
                async with asyncio.timeout(self._drain_s):
                    await self._pool.unused(record.name)
            except TimeoutError:
                logger.warning("adapter %s is still asked for; it is kept for now", record.version.name)
                return
            # nothing is awaited between the last call's end and this, so none can begin
            record.collected = True
            for state in self._pool.states():
                self._pool.mark(state.name, record.name, False)
        await self._unload(record)
        if record.readers:
            return
        try:
            await asyncio.to_thread(shutil.rmtree, record.directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("cannot delete %s (%s); it is tried again", record.directory, error)
            return
        self._published.pop(record.name, None)

    async def _unload(self, record: _Published) -> None:
        await asyncio.gather(*(self._unload_from(server, record) for server in list(record.readers.values())))

    async def _unload_from(self, server: ServerSpec, record: _Published) -> None:
        """Only a server that says so has let go, and only when no load can still be under way there."""
        async with record.alone(server):
            try:
                await self._control.unload_adapter(server, record.name)
            except ServerFault as fault:
                logger.debug("%s may still hold %s: %s", server.name, record.name, fault)
                return
            if record.doubtful.get(server.name, 0.0) <= self._clock():
                record.readers.pop(server.name, None)
                record.doubtful.pop(server.name, None)
