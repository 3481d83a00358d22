"""Whether OASIS is there, and importing it.

OASIS opens log files in `./log` when it is imported. It is imported in a temporary directory instead, its log files are
closed and thrown away, and its loggers say nothing below a warning. This happens once, when the first simulation
begins, and not in `coterie --help`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from coterie.errors import ConfigError, MissingPackageError

VERSION = "0.2.5"
_NEEDS = {
    "camel": "camel-ai", "igraph": "igraph", "neo4j": "neo4j", "pandas": "pandas",
    "sentence_transformers": "sentence-transformers", "sklearn": "scikit-learn",
}  # fmt: skip
_MEND = (
    "run `make oasis`, which makes an environment for it, and use .venv-oasis/bin/coterie; or, under Python 3.11: "
    f"pip install 'coterie[oasis]' && pip install --no-deps camel-oasis=={VERSION}"
)


def require() -> None:
    """Raises `ConfigError` (`MissingPackageError`) saying what is missing and how to get it. Imports nothing."""
    try:
        found = version("camel-oasis")
    except PackageNotFoundError:
        unrelated = " (the package named oasis is another one)" if find_spec("oasis") is not None else ""
        raise MissingPackageError(
            f"scenario 'oasis' needs camel-oasis, which is not installed{unrelated}; {_MEND}"
        ) from None
    if found != VERSION:
        raise ConfigError(f"scenario 'oasis' was made for camel-oasis {VERSION}, installed is {found}; {_MEND}")
    lacking = [package for module, package in _NEEDS.items() if find_spec(module) is None]
    if lacking:
        raise MissingPackageError(f"camel-oasis needs {', '.join(lacking)}, not installed here; {_MEND}")


def load(part: str) -> ModuleType:
    """The module `coterie.scenarios.oasis.<part>`, which imports OASIS.

    Raises:
        ConfigError: OASIS does not import.
    """
    name = f"coterie.scenarios.oasis.{part}"
    if name in sys.modules:
        return sys.modules[name]
    require()
    with tempfile.TemporaryDirectory(prefix="coterie-oasis-") as folder:
        with contextlib.chdir(folder):
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(f"camel-oasis {VERSION} does not import ({error}); {_MEND}") from error
        _close_logs(os.path.realpath(folder))
    return module


def _close_logs(folder: str) -> None:
    """Close every log file in `folder`, and quieten its loggers."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler) and os.path.realpath(handler.baseFilename).startswith(folder):
                logger.removeHandler(handler)
                handler.close()
                logger.setLevel(logging.WARNING)
