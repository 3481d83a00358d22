"""What a base model in this process needs, and what to say where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from coterie.errors import BaseModelError

NEEDED = ("torch", "transformers")
"""Packages without which there is no base in this process, and so no training."""


def missing_packages() -> list[str]:
    """Those of `NEEDED` that cannot be imported here."""
    return [name for name in NEEDED if not _found(name)]


def need_packages(what: str) -> None:
    """Raise `BaseModelError` where `what` ("serving a model") cannot be done for want of packages."""
    if missing := missing_packages():
        raise BaseModelError(
            f"{what} needs {' and '.join(missing)}, which cannot be imported here: pip install {' '.join(missing)}"
        )


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # somebody's import hook refuses it
        return False
