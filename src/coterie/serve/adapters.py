"""Adapters by served name: loading from allowed directories, and letting go once nobody uses them.

    load(name, path) ──► checked ──► the engine keeps it under a version of its own ──► lease(name) … ──► unload(name)

Every load gets a new version number, so a name that is loaded again never meets the cache of its former self. Unloading
takes the name away at once; the weights go when the last answer under them is finished.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from coterie.errors import AdapterError
from coterie.serve.engine import TokenEngine
from coterie.serve.errors import ApiError, failed, unknown_model
from coterie.serve.settings import ServeSettings
from coterie.types import AdapterVersion

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SERVED = "served"
"""Model id of the versions made here; what they are called outside is the registry's business."""


@dataclass(slots=True)
class Loaded:
    """One adapter that is, or was, served."""

    name: str
    path: str
    version: AdapterVersion
    created: int
    """Unix time."""
    users: int = 0
    """Answers being made under it."""
    gone: bool = False
    """Unloaded; only its users keep it."""
    free: asyncio.Event = field(default_factory=asyncio.Event)


class AdapterRegistry:
    """See the module."""

    def __init__(self, engine: TokenEngine, settings: ServeSettings) -> None:
        self._engine, self._settings = engine, settings
        self._allowed = tuple(directory.resolve() for directory in settings.adapter_dirs)
        self._loaded: dict[str, Loaded] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._count = 0
        self._changing = asyncio.Lock()

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """In the order they were loaded."""
        return tuple(self._loaded.values())

    # -- loading and unloading ----------------------------------------------------------------------------------

    async def load(self, name: str, path: str, now: int, *, in_place: bool = False, trusted: bool = False) -> str:
        """Serve the PEFT directory `path` as `name`; returns vLLM's words of success.

        Args:
            in_place: replace an adapter of that name.
            trusted: the path comes from whoever started the server, and may be anywhere.

        Raises:
            ApiError: with vLLM's status and words: 400 for a name that is taken or a path that is not allowed, 404
                where there is no adapter, 500 for one that does not fit.
        """
        if not name or not path:
            raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
        if name == self._settings.model:
            raise _invalid(f"The lora adapter '{name}' conflicts with a served base model.")
        async with self._changing:
            before = self._loaded.get(name)
            if before is not None and not in_place:
                raise _invalid(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                    "set 'load_inplace' to True."
                )
            if before is None and len(self._loaded) >= self._settings.max_adapters:
                raise _invalid(
                    f"{len(self._loaded)} adapters are loaded, which is all this server holds; unload one first."
                )
            directory = self._directory(name, path, trusted=trusted)
            self._count += 1
            version = AdapterVersion(_SERVED, self._count)
            try:
                await self._engine.load(version, directory)
            except AdapterError as error:
                raise failed(str(error)) from error
            self._loaded[name] = Loaded(name, path, version, now)
            if before is not None:
                self._let_go(before)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, name: str) -> str:
        """Serve `name` no more; returns vLLM's words of success. Raises `ApiError`: 404 when it is not loaded."""
        if not name:
            raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
        async with self._changing:
            loaded = self._loaded.pop(name, None)
        if loaded is None:
            raise ApiError(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self._let_go(loaded)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _let_go(self, loaded: Loaded) -> None:
        loaded.gone = True
        if not loaded.users:
            loaded.free.set()
        task = asyncio.ensure_future(self._free(loaded))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _free(self, loaded: Loaded) -> None:
        await loaded.free.wait()
        await self._engine.unload(loaded.version)

    async def close(self) -> None:
        """Wait for nobody any more."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    # -- use ----------------------------------------------------------------------------------------------------

    def known(self, model: str | None) -> str:
        """The served name a request means; no name: the base. Raises `ApiError`: 404."""
        if model and model != self._settings.model and model not in self._loaded:
            raise unknown_model(model, self._settings.model)
        return model or self._settings.model

    @contextmanager
    def lease(self, model: str | None) -> Iterator[AdapterVersion | None]:
        """The version behind a served name (None: the base), kept while the block lasts. Raises `ApiError`: 404."""
        loaded = self._loaded.get(self.known(model))
        if loaded is None:
            yield None
            return
        loaded.users += 1
        try:
            yield loaded.version
        finally:
            loaded.users -= 1
            if loaded.gone and not loaded.users:
                loaded.free.set()

    # -- checks -------------------------------------------------------------------------------------------------

    def _directory(self, name: str, path: str, *, trusted: bool) -> Path:
        """The directory to read, with no links left in its path."""
        try:
            directory = Path(path).resolve()
            files = [(directory / part).resolve() for part in (_CONFIG, _WEIGHTS)]
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
            raise _invalid(f"lora_path of '{name}' is no path of a directory.") from error
        if not trusted:
            # said before looking whether anything is there: the server does not tell what exists elsewhere
            if not self._allowed:
                raise _invalid("This server loads no adapters over HTTP; start it with --adapter-dir DIRECTORY.")
            if not all(any(one.is_relative_to(root) for root in self._allowed) for one in (directory, *files)):
                raise _invalid(
                    f"lora_path of '{name}' is outside the directories this server may load adapters from; "
                    "start it with --adapter-dir DIRECTORY."
                )
        missing = ApiError(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        if not files[0].is_file():
            raise missing
        if not files[1].is_file():
            if any(directory.glob("adapter_model.*")):
                raise _invalid(f"The lora adapter '{name}' is not in safetensors; save it as {_WEIGHTS}.")
            raise missing
        self._check_rank(files[0])
        return directory

    def _check_rank(self, config: Path) -> None:
        try:
            rank = int(json.loads(config.read_text(encoding="utf-8"))["r"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise failed(f"{_CONFIG} of this adapter cannot be read: {error}") from error
        if rank < 1:
            raise failed(f"{_CONFIG} of this adapter has rank {rank}; it must be at least 1.")
        if rank > self._settings.max_lora_rank:
            raise failed(f"LoRA rank {rank} is greater than max_lora_rank {self._settings.max_lora_rank}.")


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, "InvalidUserInput")
