"""Packages tested here warn about their own dependencies; their warnings are no errors of ours."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for module in ("pygame", "pkg_resources", "gymnasium", "pettingzoo", "textarena", "open_spiel", "nltk", "sympy"):
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}")
