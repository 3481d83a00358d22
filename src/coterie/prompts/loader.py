"""Load prompt templates. A template file is a set of jinja macros; scenarios call them with plain values."""

from __future__ import annotations

from functools import cache
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
    """One macro's text, white space at both ends removed."""
    return str(getattr(macros(language, name), macro)(**values)).strip()
