"""The pages made from the source: complete, readable, and up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from coterie.config import RunConfig
from coterie.monitor.metrics import METRICS
from tests.support.scripts import load_script

generate = load_script("docs/generate_configuration.py")


class Parent(BaseModel):
    """What both have.

    More of it.
    """

    width: float = Field(default=0.5, gt=0, le=1)
    """Of the thing,
    in metres."""
    silent: bool = True


class Child(Parent):
    """One of a kind."""

    path: Path | None = None
    kind: Literal["a", "b"] = "a"
    """One | the other, as <name>."""
    pairs: tuple[tuple[float, int], ...] = ((1.0, 2),)
    count: int = Field(ge=3)
    width: float = Field(default=2.0, gt=0)
    """Another width."""
    named: int = Field(default=0, alias="plain")


def test_meanings_are_the_docstrings_right_below() -> None:
    assert generate.meanings(Parent) == {"width": "Of the thing, in metres."}
    assert generate.meanings(Child) == {"width": "Another width.", "kind": "One | the other, as <name>."}


def test_a_table_has_types_bounds_and_defaults() -> None:
    lines = generate.settings(Child, without=["silent"])
    assert lines[2:] == [
        "| `width` | number, > 0 | `2` | Another width. |",
        "| `path` | path | `none` |  |",
        '| `kind` | "a" or "b" | `"a"` | One \\| the other, as &lt;name>. |',
        "| `pairs` | list of list of 2: number, integer | `[[1, 2]]` |  |",
        "| `count` | integer, ≥ 3 | required |  |",
        "| `plain` | integer | `0` |  |",
    ]
    assert generate.settings(Parent)[2] == "| `width` | number, > 0, ≤ 1 | `0.5` | Of the thing, in metres. |"


def test_only_the_first_paragraph_is_a_summary() -> None:
    assert generate.summary(Parent) == "What both have."


def leaves(model: type[BaseModel]) -> set[str]:
    """Names of all settings below `model`, tables of their own left out."""
    found = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation)
        else:
            found.add(name)
    return found


def test_every_setting_is_there() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", generate.configuration(), re.MULTILINE))
    assert leaves(RunConfig) - {"models"} <= listed
    assert {"model_id", "lora_rank", "game", "receivers", "heldout_path", "global", "decay"} <= listed


def test_every_metric_is_there() -> None:
    page = generate.metrics()
    for name in METRICS:
        assert f"| `{name}` |" in page


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    (tmp_path / "metrics.md").write_text("old")
    capsys.readouterr()
    assert generate.main(["--check"], tmp_path) == 1
    assert "metrics.md is out of date" in capsys.readouterr().err
    assert (tmp_path / "metrics.md").read_text() == "old"
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
