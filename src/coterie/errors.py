"""One root for every error Coterie raises on purpose.

Each message says what is wrong, where, and what to do. The command line prints it and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class CoterieError(Exception):
    """Root of all errors that are the outside world's or the user's doing."""

    exit_code = 1


class ConfigError(CoterieError):
    """A setting is unknown, impossible, or does not fit the others."""

    exit_code = 2


class MissingPackageError(ConfigError):
    """What a setting asks for needs a package that is not installed."""


class BaseModelError(CoterieError):
    """The base model cannot be found, fetched, checked or used."""

    exit_code = 3


class AdapterError(CoterieError):
    """An adapter does not fit the base or cannot be read."""

    exit_code = 4


class RunFolderError(CoterieError):
    """A run folder is in use, holds another run, or is not a run."""

    exit_code = 5


class EngineError(CoterieError):
    """An engine cannot serve. The run ends, unless it is a `RequestError`."""

    exit_code = 6


class RequestError(EngineError):
    """An engine refuses one request for what is in it: too long, or choices it cannot tell apart.

    The engine is sound and goes on; the episode that asked has failed.
    """


class ScenarioError(CoterieError):
    """A scenario broke its contract (scores out of range, unknown seat, too many turns, bad task data)."""

    exit_code = 7


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'lora_rank'?)", or the list of valid names when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (valid: {', '.join(names)})"


def cause(error: BaseException) -> str:
    """An error in one line; of one that nobody raised on purpose also where: file, line and function."""
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, CoterieError):
        return told
    steps = traceback.extract_tb(error.__traceback__)
    return f"{told} ({Path(steps[-1].filename).name}:{steps[-1].lineno} in {steps[-1].name})" if steps else told
