"""Fixtures every test may use: the tiny random model, once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.config import BaseConfig
from coterie.lm.base import BaseModel, load_base
from coterie.lm.tiny import tiny_random

MakeBase = Callable[..., BaseModel]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny random Llama."""
    return tiny_random(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def make_base(tiny_path: Path) -> MakeBase:
    """A freshly loaded tiny base, in float32 on every machine, because most tests compare numbers with those of plain
    transformers or of another way of computing them; keyword arguments are fields of `BaseConfig`."""

    def make(**fields: object) -> BaseModel:
        return load_base(
            BaseConfig.model_validate({"model": str(tiny_path), "threads": 1, "dtype": "float32", **fields})
        )

    return make


@pytest.fixture
def tiny_base(make_base: MakeBase) -> BaseModel:
    return make_base()
