"""The scenario pages: examples from code, tables from results, and every scenario has one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import MissingPackageError
from coterie.scenarios.base import SCENARIOS
from tests.support.scripts import ROOT, load_script

claims_file = load_script("benchmarks/claims_file.py")
generate = load_script("docs/generate_scenarios.py")

PAGES = sorted(path for path in (ROOT / "docs" / "scenarios").glob("*.md") if path.name != "index.md")
SIGNALING = "configs/signaling.toml"
SECTIONS = ["Rules", "What a seat is shown", "Metrics", "Train", "Measured"]


def figures(exact: float, outcome: float, mean: float) -> dict[str, Any]:
    return {"mean": mean, "by_model": {"sender": mean}, "exact": {"success": exact}, "outcome": {"said": outcome}}


def write_results(
    folder: Path,
    *,
    stale: bool = False,
    conditions: tuple[str, ...] = ("bare base", "calibrated base", "together"),
    variants: tuple[str, ...] = ("",),
) -> None:
    machine = {
        "cpu": "Some CPU", "cores": 2, "system": "Linux x86_64", "python": "3.11.7", "torch": "2.13.0",
        "transformers": "5.23.0", "coterie": "0.1.0",
    }  # fmt: skip
    runs = tuple(
        {
            "variant": variant, "changes": ["a=1", "b=2"], "seed": seed, "date": "2026-01-01", "wall_seconds": 60.0,
            "updates": 20 + seed,
            "training_seconds": 41.6, "machine": machine, "tasks": 4,
            "conditions": {key: figures(0.25 + at * (0.25 + seed / 10), 0.1, 0.2) for at, key in enumerate(conditions)},
            "matches": {"trained against untrained": [{"wins": 0.9, "draws": 0.1, "losses": 0.0},
                                                      {"wins": 0.8 + seed / 10, "draws": 0.2, "losses": 0.0}]},
        }
        for variant in variants
        for seed in (0, 1)
    )  # fmt: skip
    known = "other" if stale else claims_file.digest(ROOT / SIGNALING)
    claims_file.write(folder / "signaling.json", claims_file.ClaimFile("signaling", SIGNALING, known, runs))


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_every_scenario_has_a_page() -> None:
    assert {path.stem for path in PAGES} >= set(SCENARIOS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_what_every_page_has(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [section for section in sections if section in SECTIONS] == SECTIONS
    commands = re.findall(r"^(?:\S+/)?coterie train (\S+)", text, re.MULTILINE)
    assert commands
    marked = re.findall(r"^<!-- (?:example|table|variants|matches): (\S+)", text, re.MULTILINE)
    assert marked
    for config in {*commands, *marked}:
        used = tomllib.loads((ROOT / config).read_text(encoding="utf-8"))["scenario"]["id"]
        assert used == page.stem or page.stem not in SCENARIOS, f"{config} is of scenario {used!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_numbers_that_were_measured_stand_between_markers_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (measured,) = re.findall(r"^## Measured\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"<!-- (table|variants|matches):.*?<!-- /\1 -->", "", measured, flags=re.DOTALL)
    assert re.findall(r"\b\d+\.\d+\b|\d+\s*%", outside) == []


def test_an_example_shows_what_each_seat_sees_and_may_say() -> None:
    shown = generate.example(SIGNALING)
    lines = shown.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    assert "--- sender, turn 1: signal ---" in lines
    assert "system: Name a signal." in lines
    assert "assistant: Signal: (red | blue | green | pink)" in lines
    assert "--- receiver, turn 1: guess ---" in lines
    assert "assistant: 信号： (红 | 蓝 | 绿 | 紫)" in generate.example(SIGNALING, language="zh").splitlines()
    assert "receiver" not in generate.example(SIGNALING, seats=["sender"])
    with pytest.raises(ValueError, match=r"there is no seat 'dealer' in configs/signaling\.toml"):
        generate.example(SIGNALING, seats=["dealer"])


def test_an_example_stops_after_the_turns_that_were_asked_for() -> None:
    config = "configs/tasks-cooperative.toml"
    assert generate.example(config).count("seat_1, turn") == 1
    assert "leader says" in generate.example(config, seats=["seat_2"])


def test_a_table_says_where_what_was_trained_alone_may_have_trained_longer(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert "may never reach it" not in generate.table(SIGNALING, tmp_path)
    write_results(tmp_path, conditions=("bare base", "calibrated base", "together", "frozen"))
    assert "never reach it, and then does all 120 updates." in generate.table(SIGNALING, tmp_path)


def test_a_table_has_means_and_ranges(tmp_path: Path) -> None:
    write_results(tmp_path)
    lines = generate.table(SIGNALING, tmp_path).splitlines()
    assert lines[:3] == [
        "| metric | bare base | calibrated base | trained together |",
        "| --- | ---: | ---: | ---: |",
        "| success | 0.250 | 0.550 (0.500 to 0.600) | 0.850 (0.750 to 0.950) |",
    ]
    assert lines[4].startswith(
        "Mean over seeds 0, 1 (lowest to highest), on 4 held-out tasks; 20 to 21 updates together took 42 s of "
        "training. Measured on 2 cores of Some CPU"
    )
    chosen = generate.table(SIGNALING, tmp_path, metrics=["score", "said", "sender"])
    assert [line.split(" | ")[0] for line in chosen.splitlines()[2:5]] == ["| score", "| said", "| sender"]
    with pytest.raises(ValueError, match="there is no figure 'nash_conv'; there are success, said, score"):
        generate.table(SIGNALING, tmp_path, metrics=["nash_conv"])


def test_a_figure_may_be_the_mean_of_the_last_quarter(tmp_path: Path) -> None:
    write_results(tmp_path, variants=("", "plain"))
    with pytest.raises(ValueError, match=r"no run kept 'success' while training; set evaluation\.every"):
        generate.table(SIGNALING, tmp_path, metrics=["success@quarter"])
    known = claims_file.read(tmp_path / "signaling.json")
    runs = tuple({**run, "last_quarter": {"success": 0.5 + run["seed"] / 5}} for run in known.runs)
    claims_file.write(tmp_path / "signaling.json", claims_file.ClaimFile("signaling", SIGNALING, known.digest, runs))
    shown = generate.table(SIGNALING, tmp_path, metrics=["success", "success@quarter"]).splitlines()
    assert shown[3] == "| success, mean of the last quarter |  |  | 0.600 (0.500 to 0.700) |"
    shown = generate.variants(SIGNALING, tmp_path, metrics=["success@quarter"]).splitlines()
    assert shown[0] == "| | success, mean of the last quarter |"
    assert [line.rpartition("| ")[0].strip() for line in shown[2:3]] == ["| untrained"], "nobody was being trained"
    assert shown[3] == "| as shipped | 0.600 (0.500 to 0.700) |"


def test_a_figure_of_the_scenario_goes_before_the_mean_of_that_name() -> None:
    measured = figures(0.1, 0.2, 0.9)
    assert generate._value(measured, "score", SIGNALING) == 0.9
    assert generate._value({**measured, "exact": {"score": 0.4}}, "score", SIGNALING) == 0.4


def test_variants_have_a_line_each(tmp_path: Path) -> None:
    write_results(tmp_path, variants=("", "competitive", "mixed"))
    lines = generate.variants(SIGNALING, tmp_path, metrics=["success", "said"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[1:6]] == [
        "| ---", "| untrained", "| as shipped", "| competitive (`a=1`, `b=2`)", "| mixed (`a=1`, `b=2`)",
    ]  # fmt: skip
    assert lines[0] == "| | success | said |"
    assert lines[4] == "| competitive (`a=1`, `b=2`) | 0.850 (0.750 to 0.950) | 0.100 |"
    assert lines[7].startswith("Mean over seeds 0, 1 (")
    assert generate.table(SIGNALING, tmp_path).count("0.850") == 1
    write_results(tmp_path)
    assert "--variant NAME KEY=VALUE` does it" in generate.variants(SIGNALING, tmp_path)


def test_matches_have_the_odds_of_all_seeds_and_teams(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert generate.matches(SIGNALING, tmp_path).splitlines()[:3] == [
        "| match | wins | draws | losses |",
        "| --- | ---: | ---: | ---: |",
        "| trained against untrained | 0.875 (0.800 to 0.900) | 0.150 (0.100 to 0.200) | 0.000 |",
    ]
    assert "Not measured yet" in generate.matches("configs/kuhn.toml", tmp_path)


def test_the_summary_has_the_first_figure_of_what_was_measured(tmp_path: Path) -> None:
    pages, results = tmp_path / "pages", tmp_path / "results"
    pages.mkdir()
    page(pages, f"<!-- table: {SIGNALING} metrics=said,success -->\n<!-- /table -->")
    page(pages, "<!-- table: configs/kuhn.toml -->\n<!-- /table -->", "other.md")
    assert generate.summary(pages, results) == "*Nothing was measured yet.*"
    write_results(results)
    assert generate.summary(pages, results).splitlines()[2:] == [
        "| [signaling](game.md#measured) | said | 0.100 | 0.100 | 2 |"
    ]


def test_what_was_not_measured_or_is_stale_is_said(tmp_path: Path) -> None:
    assert generate.table(SIGNALING, tmp_path) == (
        "*Not measured yet; `python benchmarks/scenarios.py configs/signaling.toml` does it.*"
    )
    write_results(tmp_path, stale=True)
    for made in (generate.table, generate.variants, generate.matches):
        with pytest.raises(ValueError, match=r"signaling.json was measured with another state of configs/signaling"):
            made(SIGNALING, tmp_path)


def page(folder: Path, text: str, name: str = "game.md") -> Path:
    path = folder / name
    path.write_text(f"# Game\n\nA game. It has more.\n\n{text}\n", encoding="utf-8")
    return path


def test_a_page_is_filled_and_found_out_of_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages, results = tmp_path / "pages", tmp_path / "results"
    pages.mkdir()
    write_results(results)
    text = f"<!-- example: {SIGNALING} seats=sender -->\n<!-- /example -->\n\n"
    text += f"<!-- variants: {SIGNALING} metrics=success -->\n<!-- /variants -->\n\n"
    text += f"<!-- matches: {SIGNALING} -->\n<!-- /matches -->\n\n"
    path = page(pages, text + f"<!-- table: {SIGNALING} -->\nold\n<!-- /table -->")
    (pages / "index.md").write_text("# All\n\n<!-- list -->\n<!-- /list -->\n")
    assert generate.main(["--check"], pages, results) == 1
    assert "game.md is out of date" in capsys.readouterr().err
    assert generate.main([], pages, results) == 0
    assert generate.main(["--check"], pages, results) == 0
    filled = path.read_text(encoding="utf-8")
    assert "--- sender, turn 1" in filled
    assert "| success | 0.250 |" in filled
    assert "| trained against untrained |" in filled
    assert "old" not in filled
    assert "- [Game](game.md) (`game`): A game.\n" in (pages / "index.md").read_text()


def test_an_example_whose_package_is_missing_stays_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def example(config: str, **options: Any) -> str:
        if config == SIGNALING:
            return "made anew"
        raise MissingPackageError("scenario 'openspiel' needs the package pyspiel")

    monkeypatch.setattr(generate, "example", example)
    missing = "<!-- example: configs/games/openspiel-kuhn.toml -->\n{}<!-- /example -->\n"
    there = f"<!-- example: {SIGNALING} -->\n{{}}\n<!-- /example -->\n"
    path = page(tmp_path, missing.format("as it stands\n") + there.format("old") + missing.format(""))
    assert generate.main(["--check"], tmp_path, tmp_path) == 1
    assert generate.main([], tmp_path, tmp_path) == 0
    wanted = missing.format("as it stands\n") + there.format("made anew") + missing.format("")
    assert path.read_text(encoding="utf-8").endswith(f"{wanted}\n")
    assert generate.main(["--check"], tmp_path, tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- example: configs/nothing.toml -->\n<!-- /example -->", "line 5: example of 'configs/nothing.toml'"),
        (f"<!-- example: {SIGNALING} loudly -->\n<!-- /example -->", "line 5: example knows no 'loudly'"),
        (f"<!-- table: {SIGNALING} turns=2 -->\n<!-- /table -->", "line 5: table knows no 'turns=2'"),
        (f"<!-- matches: {SIGNALING} metrics=wins -->\n<!-- /matches -->", "matches knows no 'metrics=wins'"),
        (f"<!-- table: {SIGNALING} -->", "has no end"),
        ("<!-- /table -->", "line 5: <!-- /table --> ends nothing"),
        (f"<!-- table: {SIGNALING} -->\n<!-- /example -->", "line 6: <!-- /example --> ends nothing"),
        (f"<!-- table: {SIGNALING} -->\n<!-- list -->\n<!-- /list -->", "before it has no end"),
    ],
)
def test_a_wrong_marker_is_named(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page(tmp_path, text).read_text()
    assert generate.main([], tmp_path, tmp_path) == 1
    told = capsys.readouterr().err
    assert told.startswith("game.md, ")
    assert said in told
    assert (tmp_path / "game.md").read_text() == before


def test_a_page_must_say_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "bare.md").write_text("# Bare\n\n## Rules\n")
    with pytest.raises(ValueError, match=r"bare.md must begin with '# Title' and a paragraph"):
        generate.listed(tmp_path)
