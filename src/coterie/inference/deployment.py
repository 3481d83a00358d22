"""Where a run's turns come from, put together from its settings: tiers, servers, pool, publisher.

    Deployment -> TieredEngine -> camel, http (one Fleet of servers) | the engine inside the process | simulation
               -> Publisher, on the way of every new version: save aside, load, check, flip, later take down

To the loop a `Deployment` is an `Engine` like any other: it publishes a version by name, and where the adapter's
directory comes from is settled here. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coterie.config import InferenceConfig, ServerConfig
from coterie.errors import ConfigError
from coterie.inference.base import Engine
from coterie.inference.calls import CallSink
from coterie.inference.canary import Probe
from coterie.inference.fleet import Fleet
from coterie.inference.http import HttpControl, HttpTransport
from coterie.inference.ladder import TierStatus
from coterie.inference.leftovers import take_down
from coterie.inference.pool import ServerPool
from coterie.inference.publisher import Publisher
from coterie.inference.remote import RemoteEngine
from coterie.inference.tiers import Recorded, TieredEngine
from coterie.inference.wire import ServerSpec, Transport, server_spec
from coterie.types import AdapterVersion, GenerateRequest, Generation, ModelId, Tier

logger = logging.getLogger("coterie.deployment")

WITHDRAW_S = 15.0
"""Servers have to let go of adapters, at the end of a run or of those another process left."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What publication needs of whoever holds the weights."""

    save: Callable[[AdapterVersion, Path], None]
    """Writes a model's current adapter to a directory, in PEFT's format."""
    probe: Callable[[AdapterVersion], Probe | None]
    """What the canary compares servers with, as that version answers; None: no canary."""


def server_specs(servers: Sequence[ServerConfig]) -> tuple[ServerSpec, ...]:
    """The servers of a config, keys read from the environment.

    Raises:
        ConfigError: a bad url, an environment variable that is not set, or a server named twice.
    """
    specs = []
    for number, server in enumerate(servers):
        key = None
        if server.api_key_env is not None:
            key = os.environ.get(server.api_key_env)
            if not key:
                raise ConfigError(
                    f"inference.servers.{number}.api_key_env: environment variable {server.api_key_env} is not set; "
                    "export it, or take the line out"
                )
        specs.append(server_spec(server.url, key, server.paths))
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"inference.servers: {name} stands there {names.count(name)} times; name each once")
    return tuple(specs)


class Deployment:
    """The engine of a run over every tier its settings name."""

    def __init__(
        self,
        config: InferenceConfig,
        *,
        inside: Sequence[Engine],
        weights: Weights | None = None,
        calls: CallSink | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        root: Path | None = None,
        seed: int = 0,
        base: str = "base",
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            inside: the engines inside the process: the local one where there is a base, and the simulated one. Those
                whose tier the config does not name are left out.
            weights: None: nothing can be published to servers (no torch).
            decode: token ids to text, white space kept.
            root: where adapters are put for the servers to read; None: a temporary directory.
            seed: of routing.
            base: the base's name in records of calls.
            on_change: is told, in a sentence, when another tier answers, and when a server goes away or comes back.

        Raises:
            ConfigError: a server's settings, the camel tier without its extra where it was asked for by name, or no
                tier that could ever answer.
        """
        self._weights = weights
        self._keep = config.staleness + 2
        self.fleet: Fleet | None = None
        self.publisher: Publisher | None = None
        self._root: Path | None = None
        self._swept = False
        """Whether the root was looked through for what an earlier process left there."""
        self._leftovers: Callable[[], Awaitable[tuple[str, ...]]] | None = None
        """Takes down whatever stands in the root; see `leftovers.take_down`."""
        self._versions: dict[ModelId, int] = {}
        by_tier = {engine.tier: engine for engine in inside}
        engines: list[Engine] = []
        specs = server_specs(config.servers)
        for name in config.tiers:
            tier = Tier(name)
            if tier in (Tier.CAMEL, Tier.HTTP):
                transport = _transport(tier) if specs else None
                if transport is not None:
                    fleet = self._servers(specs, config, seed, root, on_change)
                    engines.append(
                        RemoteEngine(transport, fleet, timeout_s=config.timeout_s, calls=calls, decode=decode)
                    )
            elif tier in by_tier:
                engine = by_tier[tier]
                engines.append(engine if calls is None else Recorded(engine, calls, decode, base))
        if not engines:
            raise ConfigError(
                f"inference.tiers is {', '.join(config.tiers)}: none of them can answer here; name servers "
                "(inference.servers), or add a tier without: 'local' (needs torch), or last 'simulated'"
            )
        self.remote = self.fleet is not None
        """Whether there are servers at all."""
        # without servers nothing outside can fail: the first engine inside does everything, and if it breaks that is
        # an error to be seen, not a reason to make answers up
        self._engine: Engine = TieredEngine(engines, on_change=on_change) if self.remote else engines[0]

    def _servers(
        self,
        specs: Sequence[ServerSpec],
        config: InferenceConfig,
        seed: int,
        root: Path | None,
        on_change: Callable[[str], None] | None,
    ) -> Fleet:
        """The servers, as the camel and the http tier share them."""
        if self.fleet is not None:
            return self.fleet
        control, transport = HttpControl(), HttpTransport()
        pool = ServerPool(
            specs,
            control,
            policy=config.policy,
            max_in_flight=config.max_in_flight,
            poll_every_s=config.poll_every_s,
            seed=seed,
            on_change=on_change,
        )
        self.publisher = Publisher(
            pool,
            control,
            transport,
            quorum=config.quorum,
            canary_tolerance=config.canary_tolerance,
            keep=self._keep,
            tag=secrets.token_hex(3),  # tells apart runs that share servers; nothing of the training depends on it
        )
        if root is None:
            self._root = Path(tempfile.mkdtemp(prefix="coterie-published-"))
        else:
            root.mkdir(parents=True, exist_ok=True)
            self._root = root
        self._leftovers = partial(take_down, self._root, specs, control)
        self.fleet = Fleet(
            pool,
            control,
            self.publisher,
            probe=self._weights.probe if self._weights is not None else None,
            closing=(control.close, transport.close),
        )
        return self.fleet

    # -- the Engine protocol ------------------------------------------------------------------------------------

    @property
    def tier(self) -> Tier:
        """The tier the next call starts at."""
        return self._engine.tier

    async def generate(self, request: GenerateRequest) -> Generation:
        """See `Engine.generate`."""
        return await self._engine.generate(request)

    async def publish(self, version: AdapterVersion, adapter_dir: Path | None = None) -> None:
        """See `Engine.publish`. Where there are servers, a version they lack is saved for them first, and versions no
        episode can still ask for are taken down."""
        directory = adapter_dir
        fresh = self.fleet is not None and version.version > 0 and not self.fleet.holds(version)
        if fresh and directory is None and self._weights is not None and self.publisher is not None:
            assert self._root is not None
            await self._sweep()
            directory = self._root / self.publisher.name(version)
            if not directory.exists():
                self._weights.save(version, directory)
        await self._engine.publish(version, directory)
        self._versions[version.model_id] = version.version
        if fresh and self.publisher is not None and self.fleet is not None:
            self.fleet.collected(await self.publisher.collect(self._versions))

    async def start(self) -> None:
        """Find out which tiers are up."""
        if isinstance(self._engine, TieredEngine):
            await self._engine.start()

    def status(self) -> tuple[TierStatus, ...]:
        """Every tier, in order; a single one where an engine inside the process does everything."""
        if isinstance(self._engine, TieredEngine):
            return self._engine.status()
        return (TierStatus(self._engine.tier, up=True, in_use=True, why="", retry_in_s=0.0),)

    async def rest(self) -> None:
        """Let go of connections before an event loop ends; the next call opens others."""
        if isinstance(self._engine, TieredEngine):
            await self._engine.rest()

    async def close(self) -> None:
        """Close every tier. What was published is taken down from the servers first, and its files are deleted, but for
        those a server may still read, which would die of it."""
        left = await self._withdraw()
        await self._engine.close()
        if left:
            logger.warning(
                "%s is not deleted: a server that does not answer may still read adapters in it; "
                "the next command on this run tries again",
                self._root,
            )
        elif self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    async def _sweep(self) -> None:
        """Once, before the first adapter is put into the root: take down what a process that was killed left there."""
        if self._leftovers is not None and not self._swept:
            self._swept = True
            with suppress(TimeoutError):
                async with asyncio.timeout(WITHDRAW_S):
                    await self._leftovers()

    async def _withdraw(self) -> bool:
        """Whether files are left that some server may read."""
        if self.publisher is None or self._leftovers is None:
            return False
        try:
            async with asyncio.timeout(WITHDRAW_S):
                return bool(await self.publisher.withdraw() or await self._leftovers())
        except TimeoutError:
            return True


def _transport(tier: Tier) -> Transport | None:
    """The transport of a remote tier; None for the camel tier where CAMEL is not installed."""
    if tier is Tier.HTTP:
        return HttpTransport()
    try:
        from coterie.inference.camel import CamelTransport
    except (ImportError, ConfigError) as error:
        logger.info("the camel tier is left out: %s", error)
        return None
    return CamelTransport()
