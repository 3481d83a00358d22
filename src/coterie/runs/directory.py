"""A run is a folder, and everything about the run is in it.

    config.toml      the whole resolved config; `load_config` reads it back to an equal `RunConfig`
    run.json         name, seed, when and with which versions it was made; a folder with this file is a run
    metrics.jsonl    one line per update                 episodes.sqlite   calls and episodes
    calls.jsonl      one line per call to a server       calls.1.jsonl     the calls before those
    adapters/<model_id>/v<version>/                      checkpoints/<update>/ with "complete" written last
    results/<name>.json                                  lock   while a process writes the run

A folder never holds two runs, and one process at a time writes it.
"""

from __future__ import annotations

import datetime as dt
import json
import platform
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import tomli_w

from coterie.config import RunConfig, load_config, parse_config
from coterie.errors import ConfigError, RunFolderError
from coterie.runs.lock import LOCK_NAME, locked
from coterie.runs.sinks import MetricsFile, json_text, write_atomically
from coterie.types import AdapterVersion, ModelId

FORMAT = 1
"""Of the folder; raised when an older Coterie could no longer read it."""

_MARKER = "complete"


class RunDirectory:
    """One run's folder. Make it with `create` or `open`."""

    def __init__(self, path: Path, config: RunConfig, info: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config
        self.info = info
        """run.json: "format", "name", "created", "seed", "versions"."""

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Make a new run in `path`, which must be empty or not exist.

        Raises:
            RunFolderError: the folder holds a run or anything else, cannot be written, or is being made by another.
            ConfigError: the config holds a value that TOML cannot (None inside options, for example).
        """
        text = toml_text(config)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise RunFolderError(f"{path} is a file; give the path of a new or empty folder") from error
        except OSError as error:
            raise RunFolderError(
                f"cannot make folder {path}: {error.strerror}; choose another with --folder"
            ) from error
        _refuse_used(path)
        with locked(path):
            _refuse_used(path)
            for folder in ("adapters", "checkpoints", "results"):
                (path / folder).mkdir(exist_ok=True)
            info = {
                "format": FORMAT,
                "name": config.name,
                "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                "seed": config.seed,
                "versions": _versions(),
            }
            write_atomically(path / "config.toml", text)
            write_atomically(path / "run.json", json_text(info, indent=2) + "\n")  # last: now it is a run
        return cls(path, config, info)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            RunFolderError: not a run, a damaged one, or one of a newer format.
            ConfigError: its config.toml was changed to something invalid.
        """
        if not path.is_dir():
            raise RunFolderError(f"there is no run at {path}: no such folder; give the path `coterie train` printed")
        if not (path / "run.json").is_file():
            raise RunFolderError(f"{path} is not a run: it holds no run.json; give the path `coterie train` printed")
        info = _read_info(path)
        if info["format"] > FORMAT:
            raise RunFolderError(
                f"run {path} has format {info['format']}, this Coterie ({_version('coterie')}) reads up to {FORMAT}; "
                f"upgrade Coterie (the run was made with {info.get('versions', {}).get('coterie', 'a newer one')})"
            )
        return cls(path, load_config(path / "config.toml"), info)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def calls_path(self) -> Path:
        """One line per call that generated something, where servers do; see `coterie.monitor.calls.CallLog`."""
        return self.path / "calls.jsonl"

    @property
    def database_path(self) -> Path:
        return self.path / "episodes.sqlite"

    def discard_unused(self) -> None:
        """Take back a run in which nothing has happened yet: delete what `create` made, and nothing else.

        Does nothing once there are metrics or a checkpoint. Files of anyone else stay, and so does their folder.
        """
        if self.metrics_path.exists() or self.checkpoints():
            return
        database = self.database_path.name
        calls = (self.calls_path.name, "calls.1.jsonl")
        for name in ("run.json", "config.toml", database, f"{database}-wal", f"{database}-shm", *calls):
            (self.path / name).unlink(missing_ok=True)
        for folder in ("adapters", "checkpoints", "results"):
            with suppress(OSError):
                (self.path / folder).rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing.

        Raises:
            RunFolderError: another live process (or this one) holds it. A lock left by a process that died is taken
                over when it was on this machine.
        """
        with locked(self.path):
            yield

    def updates_done(self) -> int:
        """The last update in the metrics; those past the latest checkpoint are done again on resume."""
        return _updates_done(self.path)

    def adapter_dir(self, version: AdapterVersion) -> Path:
        """Where an adapter version is kept; its parent exists, it itself is the writer's to make."""
        parent = self.path / "adapters" / version.model_id
        parent.mkdir(parents=True, exist_ok=True)
        return parent / f"v{version.version}"

    def holds_adapters(self, model_id: ModelId) -> bool:
        """Whether any version of this model is kept here."""
        folder = self.path / "adapters" / model_id
        return folder.is_dir() and any(folder.iterdir())

    def checkpoint_dir(self, update: int) -> Path:
        """Where the checkpoint after `update` is kept; its parent exists, it itself is the writer's to make."""
        parent = self.path / "checkpoints"
        parent.mkdir(parents=True, exist_ok=True)
        return parent / f"{update:06d}"

    def complete_checkpoint(self, update: int) -> Path:
        """Say that everything of the checkpoint is written; from now on it counts. Returns its folder."""
        folder = self.checkpoint_dir(update)
        write_atomically(folder / _MARKER, f"{update}\n")
        return folder

    def checkpoints(self) -> list[int]:
        """Updates of all complete checkpoints, ascending."""
        return _checkpoints(self.path)

    def latest_checkpoint(self) -> Path | None:
        """Folder of the last complete checkpoint; its name is the update."""
        done = self.checkpoints()
        return self.checkpoint_dir(done[-1]) if done else None

    def write_results(self, name: str, data: Mapping[str, Any]) -> None:
        """Replace results/<name>.json as a whole. Raises `ValueError` for a name that is not a plain file name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"results name {name!r}: use letters, digits, '_', '-' and '.'")
        folder = self.path / "results"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{name}.json", json_text(data, indent=2) + "\n")


def command(verb: str, path: Path) -> str:
    """What to type to use the run in `path`; ready to be pasted."""
    return f"coterie {verb} {shlex.quote(str(path))}"


def resume_command(path: Path) -> str:
    """What to type to go on with the run in `path`."""
    return command("train --resume", path)


def default_folder(config: RunConfig, now: dt.datetime) -> Path:
    """The folder of a run whose config names none: runs/<name>-<time>, numbered if that is taken."""
    name = re.sub(r"[^\w.-]+", "-", config.name).strip("-.") or "run"
    path = Path("runs") / f"{name}-{now:%Y%m%d-%H%M%S}"
    free, number = path, 2
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def toml_text(config: RunConfig) -> str:
    """The whole config, defaults included, as TOML.

    Raises:
        ConfigError: something in it would not come back equal.
    """
    data = _toml_value(config.model_dump(), "")
    text = tomli_w.dumps(data)
    if _toml_value(parse_config(tomllib.loads(text)).model_dump(), "") != data:
        raise ConfigError("the config does not survive being written as TOML; use plain numbers, texts and lists in it")
    return text


def _toml_value(value: Any, where: str) -> Any:
    """`value` in TOML's types. A None that is a whole field is left out (its default is None)."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool | int | float | str | dt.date | dt.time):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        in_options = ".options" in where
        return {
            str(key): _toml_value(inner, f"{where}.{key}")
            for key, inner in value.items()
            if inner is not None or in_options
        }
    if isinstance(value, list | tuple):
        return [_toml_value(inner, f"{where}[{at}]") for at, inner in enumerate(value)]
    raise ConfigError(f"{where.lstrip('.')}: {value!r} cannot be written as TOML; leave it out or use a plain value")


def _refuse_used(path: Path) -> None:
    """Raise `RunFolderError` unless the folder is empty (a lock aside)."""
    try:
        others = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK_NAME)
    except OSError as error:
        raise RunFolderError(f"cannot read folder {path}: {error.strerror}") from error
    if not others:
        return
    if "run.json" not in others:
        raise RunFolderError(f"folder {path} is not empty (it holds {others[0]!r}); choose a new or empty folder")
    name = _read_info(path).get("name", "?")
    try:
        planned = f" of {load_config(path / 'config.toml').updates}"
    except ConfigError:
        planned = ""
    checkpoints = _checkpoints(path)
    saved = f", the last checkpoint after update {checkpoints[-1]}" if checkpoints else ", no checkpoint yet"
    raise RunFolderError(
        f"folder {path} already holds the run {name!r} ({_updates_done(path)}{planned} updates done{saved}); "
        f"go on with it by `{resume_command(path)}`, or choose another folder with --folder"
    )


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if not isinstance(info, dict) or not isinstance(info.get("format"), int):
            raise ValueError("it has no format number")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"run {path} is damaged, its run.json cannot be read: {error}") from error
    return info


def _updates_done(path: Path) -> int:
    entries = MetricsFile.read(path / "metrics.jsonl")
    return int(entries[-1]["update"]) if entries else 0


def _checkpoints(path: Path) -> list[int]:
    folder = path / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(e.name) for e in folder.iterdir() if re.fullmatch(r"\d{6,}", e.name) and (e / _MARKER).is_file())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    packages = {name: _version(name) for name in ("coterie", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}
