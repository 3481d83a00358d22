"""A server from start to end: load, listen, drain, close.

    load_base ──► LocalEngine ──► build_app ──► listening ──► SIGTERM or Ctrl-C ──► what runs is finished ──► closed

The first signal closes the door and lets what runs finish, for `drain_s` at most; the second ends at once.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from aiohttp import web

from coterie.config import BaseConfig, EngineConfig
from coterie.errors import ConfigError
from coterie.lm.needed import need_packages
from coterie.serve.app import SERVICE, build_app
from coterie.serve.engine import TokenEngine
from coterie.serve.errors import ApiError
from coterie.serve.settings import ServeSettings

Say = Callable[[str], None]

_TICK_S = 0.05


def load_engine(base: BaseConfig, engine: EngineConfig) -> tuple[TokenEngine, Path]:
    """The in-process engine of a base model, and where its weights are. Raises `BaseModelError`."""
    need_packages("serving a model from this process (without --backend vllm)")
    from coterie.inference.local.engine import LocalEngine
    from coterie.lm.base import load_base
    from coterie.serve.local import LocalTokenEngine

    model = load_base(base)
    local = LocalEngine(model, cache_tokens=engine.cache_tokens, tokens_per_pass=engine.tokens_per_pass)
    return LocalTokenEngine(local), model.path


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int) -> AsyncIterator[tuple[web.TCPSite, int]]:
    """Within: the application answers on `host`; `port` 0 takes a free one. Gives the site and the port.

    Raises:
        ConfigError: the address is taken or not one of this machine.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
            ) from error
        yield site, runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def serve(
    engine: TokenEngine,
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    adapters: Mapping[str, Path] | None = None,
    drain_s: float = 30.0,
    say: Say = print,
) -> None:
    """Serve until SIGTERM or SIGINT. Closes the engine.

    Args:
        adapters: served name -> PEFT directory, loaded before the first request; they may lie anywhere.
        drain_s: seconds that running requests get to finish.
        say: told what happens, a line at a time.

    Raises:
        ConfigError: the address cannot be used, or an adapter cannot be loaded.
    """
    app = build_app(engine, settings)
    service = app[SERVICE]
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # Windows: Ctrl-C then ends the process without draining
            loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        for name, path in (adapters or {}).items():
            try:
                await service.adapters.load(name, str(path), int(time.time()), trusted=True)
            except ApiError as error:
                raise ConfigError(f"--adapter {name}={path}: {error}") from error
        async with listening(app, host, port) as (site, taken):
            names = ", ".join([settings.model, *(one.name for one in service.adapters.loaded)])
            say(f"serving {names} at {address(host, taken)}")
            await signals.get()
            service.draining = True
            await site.stop()
            if service.sequences:
                say(f"stopping: {service.sequences} sequences have {drain_s:g} s to finish; once more ends at once")
                await _drained(lambda: not service.sequences, signals, drain_s)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):
                loop.remove_signal_handler(number)
        await engine.close()
    say("stopped")


def address(host: str, port: int) -> str:
    """The url of the API."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


async def _drained(idle: Callable[[], bool], signals: asyncio.Queue[signal.Signals], limit_s: float) -> None:
    """Wait until nothing runs, a second signal comes, or the time is over."""
    end = time.monotonic() + limit_s
    while not idle() and time.monotonic() < end:
        with suppress(TimeoutError):
            await asyncio.wait_for(signals.get(), _TICK_S)
            return
