"""Without the package an adapter needs, its scenario says which extra to install; nothing else needs any of them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import MissingPackageError
from coterie.scenarios.base import SCENARIOS, build_scenario
from tests.support.scripts import ROOT

PACKAGES = {
    "textarena": ("textarena", "textarena"),
    "pettingzoo": ("pettingzoo", "pettingzoo"),
    "openspiel": ("pyspiel", "openspiel"),
    "reasoning_gym": ("reasoning_gym", "reasoning-gym"),
    "datasets": ("datasets", "datasets"),
}
"""Scenario -> the module it imports, the extra that brings it."""

EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


def test_every_adapter_is_looked_at() -> None:
    elsewhere = {"oasis"}  # by test_oasis_campaign: it is no extra of one environment with the others
    assert set(PACKAGES) | elsewhere == {name for name, target in SCENARIOS.items() if ".adapters." in target}


@pytest.mark.parametrize("scenario", PACKAGES)
def test_a_missing_package_names_the_extra(scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = PACKAGES[scenario]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,answer\n1 + 1 =,2\n")
    options: dict[str, Any] = {"data": str(rows)} if scenario == "datasets" else {}
    message = f"scenario '{scenario}' needs the package {package}; pip install 'coterie[{extra}]'"
    with pytest.raises(MissingPackageError, match=re.escape(message)):
        build_scenario(scenario, options)


def test_every_extra_exists_and_games_has_them_all() -> None:
    extras = {extra for _, extra in PACKAGES.values()}
    assert extras <= set(EXTRAS)
    (games,) = EXTRAS["games"]
    named = re.fullmatch(r"coterie\[(.*)\]", games)
    assert named is not None
    assert set(named[1].split(",")) == extras


@pytest.mark.parametrize("scenario", PACKAGES)
def test_a_mistake_in_a_key_is_found_without_the_package(scenario: str) -> None:
    program = (
        f"import sys; sys.modules[{PACKAGES[scenario][0]!r}] = None\n"
        "from coterie.errors import ConfigError\nfrom coterie.scenarios.base import build_scenario\n"
        f"try: build_scenario({scenario!r}, {{'required_modelz': 1}})\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "unknown key 'required_modelz'" in done.stdout


def test_nothing_else_imports_them() -> None:
    names = sorted({package for package, _ in PACKAGES.values()} | {"gymnasium"})
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "import coterie.environment, coterie.cli.main, coterie.scenarios.check, coterie.scenarios.jsonl"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
