"""Write docs/configuration.md and docs/metrics.md from the source: settings from their classes, metrics from `METRICS`.

    python docs/generate_configuration.py            writes both
    python docs/generate_configuration.py --check    writes nothing; exit 1 when one is out of date

What a setting means is the docstring right below it; type, bounds and default are those pydantic checks.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from coterie.config import RunConfig
from coterie.credit.base import FITTING, SCHEMES
from coterie.models import PRESETS, ModelConfig
from coterie.monitor.metrics import METRICS
from coterie.registry import resolve
from coterie.scenarios.base import SCENARIOS
from coterie.scenarios.jsonl_rows import Row
from coterie.types import TrainingTask

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- made by docs/generate_configuration.py; change the source, not this file -->"

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


# -- reading the source ---------------------------------------------------------------------------------------------


def meanings(model: type) -> dict[str, str]:
    """Field -> the docstring right below it, in `model` or in what it derives from; those without one are absent."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls in (object, BaseModel):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = " ".join(inspect.cleandoc(str(below.value.value)).split())
    return found


def shape(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type in words, with its bounds."""
    return ", ".join([_type(annotation), *(_bounds(field) if field else ())])


def _bounds(field: FieldInfo) -> list[str]:
    return [
        f"{sign} {shown(getattr(limit, name))}" + (" long" if "length" in name else "")
        for limit in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_type(inner[0])} ({', '.join(_bounds(inner[1]))})"
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in inner if part is not type(None))
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"list of {len(inner)}: " + ", ".join(_type(part) for part in inner)
    if origin in (tuple, list):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"table of {_type(inner[1])}" if inner[1] is not Any else "table"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f'"{member.value}"' for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return _NAMES[annotation]


def shown(value: Any) -> str:
    """A default as TOML would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return f'"{value.value}"'
    if isinstance(value, str | PurePath):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, BaseModel):
        return shown(value.model_dump(exclude_defaults=True))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


_TASK = meanings(TrainingTask)
"""What settings mean that are handed on to tasks under the same name."""


# -- pages ----------------------------------------------------------------------------------------------------------


def settings(model: type[BaseModel], *, without: Sequence[str] = ()) -> list[str]:
    """A table of a class's settings."""
    told = {**_TASK, **meanings(model)}
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in without:
            continue
        default = "required" if field.is_required() else code(shown(field.get_default(call_default_factory=True)))
        kind = field.annotation
        meaning = told.get(name) or (summary(kind) if isinstance(kind, type) and issubclass(kind, Enum) else "")
        lines.append(row(code(field.alias or name), shape(kind, field), default, text(meaning)))
    return lines


def row(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def text(sentence: str) -> str:
    """Outside code, Markdown would take <name> for a tag."""
    return sentence.replace("<", "&lt;")


def code(text: str) -> str:
    return f"`{text}`"


def summary(part: type) -> str:
    """First paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(part) or "").split("\n\n")[0].split())


def configuration() -> str:
    """docs/configuration.md."""
    tables = {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    lines = [
        "# Configuration",
        "",
        NOTE,
        "",
        "A run is described by one TOML file. Keys that do not exist, values that are impossible and settings that do "
        "not fit each other are errors before anything is loaded; a wrong key is named with the nearest right one. "
        "Every setting can be changed on the command line: `coterie train CONFIG --set rollout.group_size=8 --set "
        "models.0.lora_rank=16`. A setting whose default is `none` is left out to mean that. The resolved config, "
        "defaults included, is kept as `config.toml` in the run folder.",
        "",
        "## The run",
        "",
        "At the top of the file, before any table.",
        "",
        *settings(RunConfig, without=["models", *tables]),
        "",
        "Presets: " + "; ".join(f'`preset = "{name}"`: {_preset(name)}' for name in PRESETS) + ".",
        "",
        "## `[[models]]`",
        "",
        f"{summary(ModelConfig)} One table for each.",
        "",
        *settings(ModelConfig),
    ]
    for name, model in tables.items():
        lines += ["", f"## `[{name}]`", "", summary(model), "", *settings(model)]
        if name == "scenario":
            for scenario, target in SCENARIOS.items():
                lines += _options("scenario.options", f'`id = "{scenario}"`', resolve("scenario", target, {}).Options)
                if scenario == "jsonl":
                    lines += ["", "Each line of the file is one JSON object:", "", *settings(Row)]
        if name == "credit":
            fitting = "; ".join(f"`{mode}`: `{scheme}`" for mode, scheme in FITTING.items())
            lines += ["", f"What `auto` stands for, by mode: {fitting}."]
            for scheme, target in SCHEMES.items():
                lines += _options("credit.options", f'`scheme = "{scheme}"`', resolve("credit", target, {}).Options)
    return "\n".join(lines) + "\n"


def _preset(name: str) -> str:
    return (inspect.getdoc(PRESETS[name]) or "").splitlines()[0].rstrip(".").lower()


def _options(where: str, when: str, options: type[BaseModel]) -> list[str]:
    lines = ["", f"### `[{where}]` with {when}", "", summary(options), "", *settings(options)]
    for name, field in options.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                which = "`" + name + "`" if part is field.annotation else f"Each of `{name}`"
                lines += ["", f"{which}: {summary(part)}", "", *settings(part)]
    return lines


def metrics() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        NOTE,
        "",
        "`metrics.jsonl` in the run folder has one line per update: `update` (from 1), `seconds` (wall time: "
        "`rollout`, `learn`, `total`) and `metrics`. Parts in `<>` stand for a name. What was not measured (no right "
        "answer in the scenario, no advice withheld) is absent, never zero.",
    ]
    group = ""
    for name, meaning in METRICS.items():
        if name.partition("/")[0] != group:
            group = name.partition("/")[0]
            lines += ["", f"## {group}", "", "| metric | how to read it |", "|---|---|"]
        lines.append(row(code(name), text(meaning)))
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "metrics.md": metrics}


def main(arguments: Sequence[str] | None = None, folder: Path = DOCS) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    options = parser.parse_args(arguments)
    stale = False
    for name, page in PAGES.items():
        path, text = folder / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale = True
        if options.check:
            print(f"{path} is out of date; run: python docs/generate_configuration.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
