"""A scenario of one's own: `coterie init`, then the commands it names, on the tiny base; installed, by its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from coterie.cli.init import InitError, names, write
from coterie.config import load_config
from coterie.errors import ConfigError
from coterie.registry import resolve
from coterie.runs.directory import RunDirectory
from coterie.scenarios.base import SCENARIOS, build_scenario
from coterie.scenarios.check import check
from tests.support.scripts import ROOT

COTERIE = [sys.executable, "-c", "import sys; from coterie.cli.main import main; sys.argv[0] = 'coterie'; main()"]


def run(command: Sequence[object], cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with Coterie, and `paths`, importable."""
    path = os.pathsep.join(str(p) for p in (ROOT / "src", *paths))
    # as a console script has it: the folder it runs in is not on the path by itself
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package the command writes."""
    folder = tmp_path_factory.mktemp("author")
    done = run([*COTERIE, "init", "tea-party"], folder)
    assert done.returncode == 0, done.stderr
    assert "coterie check tea_party:TeaParty" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["tea-party"]
    return folder / "tea-party"


@pytest.fixture
def importable(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(made)
    yield
    sys.modules.pop("tea_party", None)


def test_it_is_one_file_with_a_test_and_a_config(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "tea_party.py", "test_tea_party.py", "tea-party.toml", "pyproject.toml", "README.md",
    }  # fmt: skip
    for path in made.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "endezvous" not in text
        compile(text, path.name, "exec") if path.suffix == ".py" else None
    assert len((made / "README.md").read_text().splitlines()) <= 6
    project = tomllib.loads((made / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["coterie.scenario"] == {"tea-party": "tea_party:TeaParty"}
    assert project["tool"]["setuptools"]["py-modules"] == ["tea_party"]


@pytest.mark.usefixtures("importable")
def test_its_config_fits_it_and_every_number_of_places_keeps_the_contract(made: Path) -> None:
    config = load_config(made / "tea-party.toml")
    assert config.scenario.id == "tea_party:TeaParty"
    for places in (2, 6):
        assert check(build_scenario(config.scenario.id, {"places": places}), tasks=4) == []
    with pytest.raises(ConfigError, match=r"unknown key 'place' \(did you mean 'places'\?\)"):
        build_scenario(config.scenario.id, {"place": 3})


def test_its_own_test_passes_with_warnings_as_errors(made: Path) -> None:
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_it_passes_the_check_from_its_folder(made: Path) -> None:
    done = run([*COTERIE, "check", "tea_party:TeaParty", "--tasks", 3, "--options", "places=2", "--json"], made)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] is True
    assert told["problems"] == []


def test_it_trains_from_its_folder(made: Path, tiny_path: Path, tmp_path: Path) -> None:
    sets = ["--set", "updates=2", "--set", "rollout.group_size=4", "--set", f"base.model={tiny_path}"]
    done = run([*COTERIE, "train", "tea-party.toml", "--folder", tmp_path / "run", *sets], made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "update 2/2" in done.stdout
    run_folder = RunDirectory.open(tmp_path / "run")
    last = json.loads(run_folder.metrics_path.read_text().splitlines()[-1])["metrics"]
    assert 0 < last["exact/met"] < 1
    # and it can be gone on with from another folder only where the module can be found
    away = run([*COTERIE, "eval", tmp_path / "run"], tmp_path)
    assert away.returncode == 2
    assert "cannot import 'tea_party'" in away.stderr


# -- names ----------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert names("tea-party") == ("tea_party", "TeaParty")
    assert names("go_fish2") == ("go_fish2", "GoFish2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Tea", "lower-case"),
        ("", "lower-case"),
        ("2go", "starting with a letter"),
        ("a" * 41, "up to 40"),
        ("../up", "lower-case"),
        ("tea--party", "single '-'"),
        ("tasks", "built-in scenario"),
        ("class", "a name of Python"),
        ("random", "a name of Python"),
        ("seat", "a name of Python or of Coterie"),
        ("coterie", "a module 'coterie' already"),
        ("test-drive", "taken for a test"),
    ],
)
def test_a_bad_name_is_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        names(name)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "game").mkdir()
    with pytest.raises(InitError, match=r"game is there already; nothing was written"):
        write(tmp_path / "game", "game", "game", "Game")
    assert list((tmp_path / "game").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InitError, match=r"cannot write .*; choose another place by --folder"):
        write(tmp_path / "file" / "game", "game", "game", "Game")
    assert {path.name for path in tmp_path.iterdir()} == {"game", "file"}


# -- installed packages ---------------------------------------------------------------------------------------------

EXTRAS = '''
"""One of each kind a package may offer."""

from coterie.credit.base import CreditOptions
from coterie.credit.group_relative import GroupRelative
from coterie.modes.competitive import Competitive


class Winner(Competitive):
    """All of the pool to the best; nothing where several are."""

    def rewards(self, task, scores, teams):
        best = max(scores.values())
        winners = [seat for seat, score in scores.items() if score == best]
        return {seat: task.reward_pool if winners == [seat] else 0.0 for seat in scores}


class Plain(GroupRelative):
    """As group_relative, under another name."""


def first(observation, choices, rng):
    return choices[0]
'''


@pytest.fixture(scope="module")
def installed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, with one of every kind, installed into a folder of its own; nothing is fetched for it."""
    source = tmp_path_factory.mktemp("source") / "tea-party"
    shutil.copytree(made, source, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    (source / "tea_extras.py").write_text(EXTRAS)
    project = (source / "pyproject.toml").read_text().replace('["tea_party"]', '["tea_party", "tea_extras"]')
    for kind, name in (("mode", "Winner"), ("credit", "Plain"), ("script", "first")):
        project += f'\n[project.entry-points."coterie.{kind}"]\ntea-{name.lower()} = "tea_extras:{name}"\n'
    (source / "pyproject.toml").write_text(project)
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = run([*pip, "--disable-pip-version-check", "--target", target, source], source)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def site(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(installed)
    yield installed
    for module in ("tea_party", "tea_extras"):
        sys.modules.pop(module, None)


def test_an_installed_package_is_trained_on_by_name(
    installed: Path, made: Path, tiny_path: Path, tmp_path: Path
) -> None:
    config = (made / "tea-party.toml").read_text().replace('"tea_party:TeaParty"', '"tea-party"')
    config = config.replace('"moving_average"', '"tea-plain"').replace('"cooperative"', '"competitive"')
    (tmp_path / "own.toml").write_text(config)
    sets: list[Any] = ["--set", "updates=2", "--set", "rollout.group_size=4", "--set", f"base.model={tiny_path}"]
    sets += ["--set", "custom_mode=tea-winner"]
    done = run([*COTERIE, "train", "own.toml", "--folder", "run", *sets], tmp_path, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line)["metrics"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # both always score the same here, so this mode pays nobody
    assert [line["play/anna/reward"] for line in lines] == [0.0, 0.0]
    checked = run([*COTERIE, "check", "tea-party", "--tasks", 2], tmp_path, installed)
    assert "tea-party: keeps its contract" in checked.stdout, checked.stderr


@pytest.mark.usefixtures("site")
def test_every_kind_of_entry_point_is_found() -> None:
    assert resolve("scenario", "tea-party", SCENARIOS).__name__ == "TeaParty"
    assert resolve("mode", "tea-winner", {}).__name__ == "Winner"
    assert resolve("credit", "tea-plain", {}).__name__ == "Plain"
    assert resolve("script", "tea-first", {})(None, ["a", "b"], None) == "a"
    with pytest.raises(ConfigError, match=r"unknown scenario 'tea-prty' \(did you mean 'tea-party'\?\)"):
        resolve("scenario", "tea-prty", SCENARIOS)


def test_two_packages_of_one_name_are_told_apart(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[coterie.scenario]\ntea-party = other:TeaParty\nbroken = other:Broken\n")
    (tmp_path / "other.py").write_text("class TeaParty: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="offered more than once, as other:TeaParty and tea_party:TeaParty"):
        resolve("scenario", "tea-party", SCENARIOS)
    with pytest.raises(ConfigError, match="scenario 'broken': module 'other' has no 'Broken'"):
        resolve("scenario", "broken", SCENARIOS)
    sys.modules.pop("other", None)


def test_a_module_that_raises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_done.py").write_text("x = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"importing 'half_done' raised ZeroDivisionError.*half_done.py:1 in"):
        resolve("scenario", "half_done:Game", SCENARIOS)
