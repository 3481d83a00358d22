"""README and docs say what is there: files they name exist, links lead somewhere, and their examples are valid."""

from __future__ import annotations

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from coterie.config import parse_config
from coterie.credit.base import build_credit
from coterie.modes.base import build_mode
from coterie.scenarios.base import build_scenario
from coterie.scenarios.jsonl_rows import Row
from tests.support.scripts import ROOT

READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("src/", "tests/", "docs/", "configs/", "benchmarks/", "demo/")
PACKAGES = (
    "cli", "credit", "inference", "lm", "modes", "monitor", "prompts", "rollout", "runs", "scenarios", "training",
)  # fmt: skip

ELSEWHERE = ("openai", "camel")
"""Packages that are not installed here; tests/external runs the examples that need them."""

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
both_readmes = pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)


def examples(page: Path, language: str) -> list[str]:
    """The contents of a page's code blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def named_files(text: str) -> list[str]:
    """Paths in backticks, relative to the repository; those inside the package may leave out src/coterie."""
    found = []
    for path in re.findall(r"`([\w./-]+)`", text):
        if re.search("[A-Z]{3}", path):
            continue  # stands for a name
        if path.startswith(FOLDERS):
            found.append(path)
        elif (path.split("/")[0] in PACKAGES and "/" in path) or re.fullmatch(r"[a-z_]+\.py", path):
            found.append(f"src/coterie/{path}")
    return found


def test_files_in_backticks_are_found() -> None:
    text = "`tests/a.py` `lm/` `inference/base.py` `loop.py` `learn/x` `play/<model>` `runs/` `runs/NAME/` `tests`"
    assert named_files(text) == [
        "tests/a.py", "src/coterie/lm/", "src/coterie/inference/base.py", "src/coterie/loop.py", "src/coterie/runs/",
    ]  # fmt: skip


@every_page
def test_every_file_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # by a measurement, or by the reader, who is told to write it
    written = {"benchmarks/results/", *(f"src/coterie/{name}" for name in re.findall(r"<!-- file: (\S+) -->", text))}
    # a short name may be that of a file beside others a page has just spoken of
    names = {path.name for path in (ROOT / "src").rglob("*.py")} | {path.name for path in ROOT.glob("*/*.py")}
    missing = [
        path
        for path in named_files(text)
        if path not in written and not (ROOT / path).exists() and path.removeprefix("src/coterie/") not in names
    ]
    assert missing == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_all_layers_are_in_the_architecture_in_the_order_imports_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = [
        [part.strip().removeprefix("coterie.") for part in layer.split("|")]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
        for layer in contract["layers"]
    ]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^`types` ←.*?\n\n", text, re.MULTILINE | re.DOTALL)
    order = [re.findall(r"`(\w+)`", layer) for layer in told.split("←")]
    wanted = [sorted(layer) for layer in reversed(layers) if layer != ["errors"]]
    assert [sorted(layer) for layer in order] == wanted


@both_readmes
def test_python_examples_compile_and_their_imports_exist(page: Path) -> None:
    found = examples(page, "python")
    assert found
    for example in found:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                if node.module.partition(".")[0] in ELSEWHERE:
                    continue
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert getattr(module, name.name) is not None


@both_readmes
def test_example_rows_and_config_make_a_run(page: Path, tmp_path: Path) -> None:
    (rows,) = examples(page, "json")
    for line in rows.splitlines():
        Row.model_validate(json.loads(line))
    config, servers = examples(page, "toml")
    parse_config(tomllib.loads(servers))
    data = tomllib.loads(config)
    parsed = parse_config(data)
    assert parsed.scenario.id == "jsonl"
    # enough rows of the same kind that both sides of the split have some
    path = tmp_path / "tasks.jsonl"
    shown = [json.loads(line) for line in rows.splitlines()]
    many = [{**row, "prompt": f"{row['prompt']} ({number})"} for number in range(20) for row in shown]
    path.write_text("".join(json.dumps(row) + "\n" for row in many))
    build_scenario(parsed.scenario.id, {**parsed.scenario.options, "path": str(path)})
    build_mode(parsed.mode)
    build_credit(parsed.credit, parsed.mode)
    assert len(parsed.models) == data["scenario"]["options"]["required_models"]


@both_readmes
def test_commands_and_options_exist(page: Path) -> None:
    from typer.testing import CliRunner

    from coterie.cli.main import app

    text = page.read_text(encoding="utf-8")
    used = set(re.findall(r"^coterie (\w+)(.*?)(?:#.*)?$", text, re.MULTILINE))
    assert {verb for verb, _ in used} == {
        "train",
        "eval",
        "play",
        "init",
        "check",
        "models",
        "serve",
        "bench",
        "doctor",
    }
    for verb, arguments in used:
        shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[\w-]+", arguments):
            assert option in shown, f"coterie {verb} has no {option}"


@both_readmes
def test_settings_on_command_lines_exist(page: Path, tmp_path: Path) -> None:
    from coterie.config import load_config

    for config, changes in re.findall(r'CONFIG=(\S+) ARGS="([^"]*)"', page.read_text(encoding="utf-8")):
        sets = re.findall(r"--set (\S+)", changes)
        assert sets
        parsed = load_config(ROOT / config, sets)
        build_scenario(parsed.scenario.id, parsed.scenario.options)


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_measured_numbers_stand_between_markers_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outside = re.sub(r"<!-- claims:.*?<!-- /claims -->", "", text, flags=re.DOTALL)
    outside = re.sub(r"^```.*?^```|`[^`]*`|<img[^>]*>", "", outside, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)?\s*(?:%|s\b|秒|个百分点|points|seconds|minutes)", outside) == []


def test_readmes_have_the_same_sections_in_both_languages() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in READMES)
    for pattern in (r"^## ", r"^\|", r"^```\w*", r"\]\((?!README)[^)]*\)", r"<img src=\"([^\"]*)\""):
        ours, theirs = (re.findall(pattern, text, re.MULTILINE) for text in (english, chinese))
        assert ours == theirs, pattern
