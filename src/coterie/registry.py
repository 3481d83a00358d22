"""Find a class by name: a built-in id, "module:attr", or an installed entry point (in that order)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from coterie.errors import ConfigError, nearest


def resolve(kind: str, name: str, builtin: Mapping[str, str]) -> Any:
    """Return the object `name` stands for.

    Args:
        kind: what is looked up ("scenario", "mode", "credit"); the entry point group is ``coterie.<kind>``.
        name: a key of `builtin`, "module:attr", or an entry point's name.
        builtin: id -> "module:attr".

    Raises:
        ConfigError: nothing of that name exists, or its module does not import.
    """
    target = builtin.get(name)
    if target is None and ":" in name:
        target = name
    if target is None:
        installed = {point.name: point for point in entry_points(group=f"coterie.{kind}")}
        if name in installed:
            return installed[name].load()
        raise ConfigError(
            f"unknown {kind} {name!r}{nearest(name, [*builtin, *installed])}; "
            f'your own is named "module:attr" and must be importable'
        )
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{kind} {name!r}: cannot import {module_name!r}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}") from error
