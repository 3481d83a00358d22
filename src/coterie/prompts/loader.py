"""Load prompt templates. A template file is a set of jinja macros; scenarios call them with plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    # nothing is HTML; values are inserted as they are, and the chat format removes special tokens from them
    return Environment(
        loader=PackageLoader("coterie", "prompts"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def macros(language: str, name: str) -> Any:
    """The macros of `prompts/<language>/<name>.jinja` as attributes; each returns stripped text when called."""
    return _environment().get_template(f"{language}/{name}.jinja").module


def text(language: str, name: str, macro: str, **values: Any) -> str:
    """One macro's text of plain values (strings, numbers, lists and tuples of them), white space at both ends removed.

    Siblings of a group ask for the same texts, so a text is rendered once.
    """
    return _rendered(language, name, macro, _Values(repr(values), values))


@dataclass(frozen=True, slots=True)
class _Values:
    """What a macro is called with; equal when it is written the same, so that 1, 1.0 and True differ."""

    written: str
    by_name: Mapping[str, Any] = field(compare=False)


@lru_cache(maxsize=65536)
def _rendered(language: str, name: str, macro: str, values: _Values) -> str:
    return str(getattr(macros(language, name), macro)(**values.by_name)).strip()
