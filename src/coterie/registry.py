"""Find a class by name: a built-in id, "module:attr", or an installed entry point (in that order).

An installed package offers its own under the group ``coterie.<kind>`` in its pyproject.toml:

    [project.entry-points."coterie.scenario"]
    tea-party = "tea_party:TeaParty"

Kinds are scenario, mode, credit and script. A module of "module:attr" may also lie in the folder a command runs in.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from coterie.errors import ConfigError, cause, nearest


def resolve(kind: str, name: str, builtin: Mapping[str, str]) -> Any:
    """Return the object `name` stands for.

    Args:
        kind: what is looked up ("scenario", "mode", "credit", "script"); the entry point group is ``coterie.<kind>``.
        name: a key of `builtin`, "module:attr", or an entry point's name.
        builtin: id -> "module:attr".

    Raises:
        ConfigError: nothing of that name exists, several packages offer it, or its module cannot be imported.
    """
    target = builtin.get(name)
    if target is None and ":" in name:
        target = name
    if target is None:
        target = _installed(kind, name, builtin).value
    module_name, _, attribute = target.partition(":")
    try:
        module = _import(module_name)
    except ImportError as error:
        raise ConfigError(f"{kind} {name!r}: cannot import {module_name!r}: {error}") from error
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigError(f"{kind} {name!r}: importing {module_name!r} raised {cause(error)}") from error
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}") from error
    return found


def _installed(kind: str, name: str, builtin: Mapping[str, str]) -> EntryPoint:
    """The one entry point of that name."""
    points = tuple(entry_points(group=f"coterie.{kind}"))
    found = {point.value: point for point in points if point.name == name}
    if not found:
        raise ConfigError(
            f"unknown {kind} {name!r}{nearest(name, [*builtin, *(point.name for point in points)])}; "
            f'your own is named "module:attr" and must be importable'
        )
    if len(found) > 1:
        raise ConfigError(
            f"{kind} {name!r} is offered more than once, as {' and '.join(sorted(found))}; "
            'uninstall one of the packages, or name the one you mean as "module:attr"'
        )
    (point,) = found.values()
    return point


def _import(name: str) -> ModuleType:
    """Import a module; one that is not installed may lie in the folder the command runs in."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        missing = error.name is not None and (name == error.name or name.startswith(f"{error.name}."))
        if not missing or here in sys.path or "" in sys.path:
            raise
        # last, so that nothing in that folder hides what is installed; it stays, for what the module imports later
        sys.path.append(here)
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            sys.path.remove(here)
            raise
