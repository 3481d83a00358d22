"""The servers as all remote tiers of a run share them: pool, publication, and what the base is called where."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from coterie.errors import EngineError
from coterie.inference.canary import Probe as Probe
from coterie.inference.pool import ServerPool
from coterie.inference.sharing import InFlight
from coterie.inference.wire import FaultKind, ServerControl, ServerFault, ServerSpec
from coterie.types import AdapterVersion


class Publishes(Protocol):
    """The part of `Publisher` an engine needs."""

    async def publish(self, version: AdapterVersion, directory: Path, probe: Probe | None) -> object: ...

    def name(self, version: AdapterVersion) -> str: ...


class Fleet:
    """The servers as all remote tiers of a run share them: pool, publication, and what the base is called where."""

    def __init__(
        self,
        pool: ServerPool,
        control: ServerControl,
        publisher: Publishes | None = None,
        *,
        model: str | None = None,
        probe: Callable[[AdapterVersion], Probe | None] | None = None,
        closing: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        """
        Args:
            publisher: None where adapters are never published (evaluation of the base, a client).
            model: the base's served name; None: each server's own, from /v1/models.
            probe: makes what the publisher's canary compares; None: no canary.
            closing: close connections that open again when they are used; called by `rest` and `close`.
        """
        self.pool, self.control, self.publisher = pool, control, publisher
        self._model = model
        self._probe = probe
        self._closing = closing
        self._names: dict[AdapterVersion, str | None] = {}
        self._bases: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        """Servers out of the pool because their answers cannot be used, and why."""
        self._publishing: InFlight[AdapterVersion, None] = InFlight()

    def holds(self, version: AdapterVersion) -> bool:
        """Whether `version` was published."""
        return version in self._names

    def name(self, version: AdapterVersion | None) -> str | None:
        """Served name of a version; None for the base. Raises `EngineError` when it was never published."""
        if version is None:
            return None
        try:
            return self._names[version]
        except KeyError:
            raise EngineError(f"adapter {version.name} was never published to the servers, or is gone") from None

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None) -> None:
        """Publish once; a version that is published already is not sent again, because versions are immutable.

        Raises:
            EngineError: no directory, no publisher, or too few servers took it.
        """
        if version in self._names:
            return
        if version.version == 0 and adapter_dir is None:
            self._names[version] = None  # equal to the base by definition
            return
        if adapter_dir is None:
            raise EngineError(f"adapter {version.name}: servers need its directory; save it and publish that")
        await self._publishing.do(version, partial(self._publish, version, adapter_dir))

    async def _publish(self, version: AdapterVersion, adapter_dir: Path) -> None:
        if self.publisher is None:
            raise EngineError(f"adapter {version.name}: these servers were set up without a publisher")
        await self.publisher.publish(version, adapter_dir, self._probe(version) if self._probe else None)
        self._names[version] = self.publisher.name(version)

    def collected(self, versions: Sequence[AdapterVersion]) -> None:
        """Those versions are unloaded and can no longer be asked for."""
        for version in versions:
            self._names.pop(version, None)

    def refuse(self, server_name: str, why: str) -> None:
        """Take a server out of the pool whose answers cannot be used, until `readmit`."""
        self.refused[server_name] = why
        self.pool.retire(server_name, why)

    def readmit(self, server_name: str) -> None:
        """A server that was refused is fit after all, or again."""
        if self.refused.pop(server_name, None) is not None:
            self.pool.restore(server_name)

    async def base(self, server: ServerSpec) -> str:
        """What `server` calls the base. Raises `ServerFault`."""
        if self._model is not None:
            return self._model
        known = self._bases.get(server.name)
        if known is None:
            adapters = set(self._names.values())
            served = [name for name in await self.control.models(server) if name not in adapters]
            if not served:
                raise ServerFault(FaultKind.SERVER, server.name, "it serves no model (/v1/models is empty)")
            known = self._bases[server.name] = served[0]
        return known

    def forget(self, server_name: str) -> None:
        """That server may be another one now."""
        self._bases.pop(server_name, None)

    async def rest(self) -> None:
        """Let go of connections; a later call opens others."""
        for close in self._closing:
            await close()

    async def close(self) -> None:
        """Close the pool and all connections."""
        await self.pool.close()
        await self.rest()
