"""Numbers in README and docs: from results to tables, between markers, and never anywhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT, load_script

claims_file = load_script("benchmarks/claims_file.py")
blocks = load_script("benchmarks/blocks.py")
write_docs = load_script("benchmarks/write_docs.py")

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "system": "Linux x86_64", "python": "3.11.7", "torch": "2.13.0",
    "transformers": "5.23.0", "coterie": "0.1.0",
}  # fmt: skip
EN, ZH = blocks.WORDS["en"], blocks.WORDS["zh"]


def player(cells: Mapping[str, Mapping[str, float]], exact: Mapping[str, float] | None = None) -> dict[str, Any]:
    values = [value for models in cells.values() for value in models.values()]
    return {
        "mean": sum(values) / len(values) if values else 0.0,
        "by_model": {},
        "by_task_type": cells,
        "exact": exact or {},
        "outcome": {},
    }


def tasks_run(seed: int, bare: float, calibrated: float, trained: float, **more: object) -> dict[str, Any]:
    """Two task types, one model; reasoning 0.1 below classification for everyone."""
    players = {
        name: player({"classification": {"m": value}, "reasoning": {"m": value - 0.1}})
        for name, value in (("bare base", bare), ("calibrated base", calibrated), ("trained", trained))
    }
    return {
        "variant": "", "seed": seed, "date": f"2026-01-0{seed + 1}", "wall_seconds": 300.2, "updates": 6,
        "training_seconds": 200.0 + seed, "heldout": {"tasks": 50, "players": players}, "machine": MACHINE,
        "updates_per_round": 2, "curve": {"update": [1, 2, 3, 4], "play/m/accuracy": [0.0, 1.0, 0.5, 1.0]}, **more,
    }  # fmt: skip


def dilemma_run(mode: str, level: float | None, seed: int, end: float) -> dict[str, Any]:
    facts = {"mode": mode} if level is None else {"mode": mode, "cooperation_level": level}
    values = {"bare base": 0.4, "calibrated base": 0.5, "trained": end}
    players = {name: player({}, {"cooperation": value}) for name, value in values.items()}
    variant = mode if level is None else f"{mode} {level:.2f}"
    return {
        "variant": variant, **facts, "seed": seed, "date": "2026-01-01", "updates": 3, "training_seconds": 9.0,
        "heldout": {"tasks": 1, "players": players}, "curve": {"update": [1]}, "machine": MACHINE,
    }  # fmt: skip


def signaling_run(seed: int, end: float) -> dict[str, Any]:
    values = {"bare base": 0.25, "calibrated base": 0.35, "trained": end}
    return {
        "variant": "", "seed": seed, "date": "2026-01-01", "updates": 60, "training_seconds": 70.4,
        "heldout": {"tasks": 4, "players": {n: player({}, {"success": v}) for n, v in values.items()}},
        "curve": {"update": [1]}, "machine": MACHINE,
    }  # fmt: skip


def scenario_run(seed: int, end: float) -> dict[str, Any]:
    values = {"calibrated base": 0.25, "frozen": 0.5, "apart": 0.125, "together": end}
    figures = {key: {"exact": dict.fromkeys(("success", "efficiency", "nash_conv"), v)} for key, v in values.items()}
    return {"variant": "", "seed": seed, "date": "2026-01-01", "conditions": figures, "machine": MACHINE}


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """A repository in small: configs, results of every claim, and two documents with every marker."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "docs").mkdir()
    made = write_docs.Place(tmp_path, tmp_path / "results")
    found = {
        "tasks": [tasks_run(0, 0.4, 0.5, 0.9), tasks_run(1, 0.5, 0.5, 0.9)],
        "signaling": [signaling_run(0, 0.9949), signaling_run(1, 0.9961)],
        "prisoners_dilemma": [
            dilemma_run("cooperative", None, 0, 0.99),
            dilemma_run("mixed", 1.0, 0, 0.97),
            dilemma_run("mixed", 0.5, 0, 0.25),
            dilemma_run("mixed", 0.5, 1, 0.35),
            dilemma_run("competitive", None, 0, 0.01),
        ],
    }
    found |= {claim: [scenario_run(0, 0.9), scenario_run(1, 0.8)] for claim in blocks.TOGETHER}
    quoted = {claim: f"configs/{Path(claim).name}.toml" for claim in blocks.TOGETHER}
    for claim, config in (claims_file.CONFIGS | quoted).items():
        path = tmp_path / config
        path.write_text(f"name = '{path.stem}'\n")
        file = claims_file.ClaimFile(claim, config, claims_file.digest(path))
        for run in found[claim]:
            file = file.merged(run)
        claims_file.write(made.results / f"{claim}.json", file)
    every = "\n\n".join(f"<!-- claims:{name} -->\nas it was\n<!-- /claims -->" for name in blocks.BLOCKS)
    (tmp_path / "README.md").write_text(f"# Title\n\n{every}\n\nthe end\n")
    (tmp_path / "docs" / "page.zh-CN.md").write_text(f"# 标题\n\n{every}\n")
    return made


def test_what_was_learned_together_stands_beside_what_was_not(place: Any) -> None:
    lines = blocks.together_block(place.load(), EN).splitlines()
    assert lines[0] == "|  | nobody trained | partners frozen | trained apart | trained together |"
    assert lines[2] == "| signalling, success | 0.250 | 0.500 | 0.125 | 0.850 |"
    assert lines[5] == "| Leduc hold'em, NashConv | 0.250 | 0.500 | 0.125 | 0.850 |"
    other = {**scenario_run(0, 0.1), "variant": "competitive"}
    found = place.load()
    path = place.results / "scenarios" / "kuhn.json"
    claims_file.write(path, found["scenarios/kuhn"].merged(other))
    assert blocks.together_block(place.load(), EN).splitlines() == lines, "variants do not count"
    path.unlink()
    assert "`python benchmarks/scenarios.py configs/kuhn.toml` does it" in blocks.together_block(place.load(), EN)


def test_held_out_accuracy_by_task_type(place: Any) -> None:
    lines = blocks.tasks_table_block(place.load(), EN).splitlines()
    assert lines[0].startswith("| task type | bare base | calibrated base | trained | gain |")
    assert lines[2] == "| classification | 45 % | 50 % | 90 % | +45 points | 90 % |"
    assert lines[3] == "| reasoning | 35 % | 40 % | 80 % | +45 points | 80 % |"
    assert lines[4] == "| all | 40 % | 45 % | 85 % | +45 points | 85 % |"


def test_the_summary_says_the_least_gain_of_all_seeds(place: Any) -> None:
    said = blocks.tasks_summary_block(place.load(), EN)
    assert "seeds 0, 1" in said
    assert "200 to 201 s of training" in said
    assert "300 s in all" in said
    assert "from 35 % to 45 % (bare base) and 45 % (the same" in said
    assert "to 85 %." in said
    assert "at least 40 points above the bare base and 40 above" in said
    assert "all 2 task types rose" in said


def test_a_gain_is_never_rounded_up_and_a_type_that_fell_is_not_counted(place: Any) -> None:
    run = tasks_run(0, 0.4, 0.5, 0.649)
    run["heldout"]["players"]["trained"]["by_task_type"]["reasoning"]["m"] = 0.29
    run["heldout"]["players"]["trained"]["mean"] = 0.5999
    file = claims_file.ClaimFile("tasks", "c", "d", (run,))
    said = blocks.tasks_summary_block({"tasks": file}, EN)
    assert "at least 24 points above the bare base and 14 above" in said
    assert "at least 1 of 2 task types rose" in said
    assert "seed 0," in said


def test_the_final_table_is_what_a_run_shows(place: Any) -> None:
    block = blocks.tasks_run_block(place.load(), EN)
    assert block.startswith("```\nHeld-out accuracy on 50 tasks no training step saw\n")
    assert [line.split() for line in block.splitlines() if line.startswith("reasoning")] == [
        ["reasoning", "m", "0.300", "0.400", "0.800", "0.500"]
    ]


def test_signaling_seed_by_seed(place: Any) -> None:
    lines = blocks.signaling_block(place.load(), EN).splitlines()
    assert lines[2:] == ["| 0 | 60 | 70 | 0.250 | 0.350 | 0.995 |", "| 1 | 60 | 70 | 0.250 | 0.350 | 0.996 |"]


def test_societies_from_rivalry_to_cooperation(place: Any) -> None:
    lines = blocks.dilemma_block(place.load(), EN).splitlines()
    assert lines[2:] == [
        "| `competitive` |  | 0.50 | 0.01 |  | 0.01 |",
        "| `mixed` | 0.5 | 0.50 | 0.25 | 0.35 | 0.30 |",
        "| `mixed` | 1 | 0.50 | 0.97 |  | 0.97 |",
        "| `cooperative` |  | 0.50 | 0.99 |  | 0.99 |",
    ]


def test_hardware_is_said_once_for_each_machine(place: Any) -> None:
    said = blocks.machine_block(place.load(), EN)
    assert said == (
        "Measured on 2 cores of Some CPU (Linux x86_64), Python 3.11.7, PyTorch 2.13.0, Coterie 0.1.0, "
        "2026-01-01 to 2026-01-02."
    )
    other = tasks_run(0, 0.1, 0.1, 0.1, machine={**MACHINE, "cpu": "Another"})
    results = {**place.load(), "tasks": claims_file.ClaimFile("tasks", "c", "d", (other,))}
    assert blocks.machine_block(results, EN).count("Measured on") == 2


def test_every_block_speaks_chinese_too(place: Any) -> None:
    results = place.load()
    for name, block in blocks.BLOCKS.items():
        if name != "tasks-run":  # shown as the terminal shows it
            assert block(results, ZH) != block(results, EN), name
            assert any("\u4e00" <= char <= "\u9fff" for char in block(results, ZH)), name
        assert any("\u4e00" <= char <= "\u9fff" for char in block({}, ZH)), name


def test_what_was_not_measured_says_how_to_measure_it() -> None:
    for name, block in blocks.BLOCKS.items():
        script = "scenarios.py configs/signaling.toml" if name == "together" else "claims.py "
        assert f"python benchmarks/{script}" in block({}, EN), name


def test_blocks_are_replaced_and_nothing_else(place: Any) -> None:
    assert write_docs.main([], place) == 0
    text = (place.root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- claims:machine -->\nMeasured on 2 cores")
    assert text.endswith("<!-- /claims -->\n\nthe end\n")
    assert "as it was" not in text
    chinese = (place.root / "docs" / "page.zh-CN.md").read_text()
    assert chinese.startswith("# 标题\n\n<!-- claims:machine -->\n测量环境")
    assert write_docs.main(["--check"], place) == 0
    before = (text, chinese)
    assert write_docs.main([], place) == 0
    assert before == ((place.root / "README.md").read_text(), (place.root / "docs" / "page.zh-CN.md").read_text())


def test_check_writes_nothing_and_names_what_is_wrong(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place.root / "README.md").read_text()
    assert write_docs.main(["--check"], place) == 1
    said = capsys.readouterr().err
    assert "README.md is not what the results say" in said
    assert "docs/figures/learning-curve.svg is missing" in said
    assert (place.root / "README.md").read_text() == before
    assert not (place.root / "docs" / "figures").exists()


def test_a_number_changed_by_hand_is_found(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_docs.main([], place)
    readme = place.root / "README.md"
    readme.write_text(readme.read_text().replace("| 90 % |", "| 95 % |"))
    assert write_docs.main(["--check"], place) == 1
    assert "README.md" in capsys.readouterr().err


def test_results_of_another_state_of_the_config_are_found(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_docs.main([], place)
    (place.root / claims_file.CONFIGS["signaling"]).write_text("updates = 9\n")
    assert write_docs.main(["--check"], place) == 1
    assert "signaling.json was measured with another state of configs/signaling.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- claims:no-such -->\n<!-- /claims -->", "unknown block 'no-such'; there are dilemma, machine"),
        ("\n<!-- claims:machine -->\n", "'machine' has no"),
        ("<!-- claims:machine -->\n<!-- claims:dilemma -->\n<!-- /claims -->", "line 2: the block 'machine'"),
        ("text\n<!-- /claims -->", "line 2: .* not begun"),
    ],
)
def test_wrong_markers_are_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_docs.replaced(text, {}, EN)


def test_wrong_markers_stop_before_anything_is_written(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (place.root / "docs" / "zz.md").write_text("<!-- claims:no-such -->\n<!-- /claims -->")
    before = (place.root / "README.md").read_text()
    assert write_docs.main([], place) == 1
    assert "zz.md" in capsys.readouterr().err
    assert (place.root / "README.md").read_text() == before


def test_figures_are_the_same_bytes_every_time_and_hold_no_date(place: Any) -> None:
    write_docs.main([], place)
    drawn = {name: (place.root / "docs" / "figures" / name).read_bytes() for name in write_docs.FIGURES.values()}
    write_docs.main([], place)
    for name, before in drawn.items():
        after = (place.root / "docs" / "figures" / name).read_bytes()
        assert after == before, name
        assert b"<dc:date>" not in after
    assert b"mixed, by cooperation_level" in drawn["one-switch.svg"]


def test_the_learning_curve_averages_whole_rounds_of_task_types() -> None:
    figures = load_script("benchmarks/figures.py")
    assert figures._trailing([0.0, 1.0, 0.5, 1.0], 2) == [0.5, 0.75, 0.75]
    assert figures._trailing([0.25], 1) == [0.25]


def test_labels_of_lines_keep_their_distance() -> None:
    figures = load_script("benchmarks/figures.py")
    heights = figures._apart([(0.5, "a", ""), (0.5, "b", ""), (0.9, "c", "")], 0.1)
    assert heights[1] - heights[0] == pytest.approx(0.1)
    assert heights[2] - heights[1] >= 0.1 - 1e-9
    assert sum(heights) == pytest.approx(1.9)


def test_a_damaged_file_of_results_is_an_error(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (place.results / "tasks.json").write_text("{")
    assert write_docs.main(["--check"], place) == 1
    assert "delete it" in capsys.readouterr().err


# -- this repository ------------------------------------------------------------------------------------------------


def test_every_marker_of_this_repository_is_known_and_both_readmes_have_the_same() -> None:
    found = {}
    for path in write_docs.Place().documents():
        text = path.read_text(encoding="utf-8")
        write_docs.replaced(text, {}, EN)  # raises for an unknown or open block
        found[path.name] = [marker["name"] for marker in write_docs._MARKER.finditer(text) if marker["name"]]
    assert found["README.md"], "the README shows nothing that was measured"
    assert found["README.md"] == found["README.zh-CN.md"]


def test_the_numbers_of_this_repository_are_what_its_results_say() -> None:
    assert write_docs.Place().check() == []


def test_results_of_this_repository_hold_no_paths_of_the_machine() -> None:
    for path in sorted(claims_file.RESULTS.glob("*.json")):
        strings = json.dumps(json.loads(path.read_text(encoding="utf-8")))
        assert str(ROOT) not in strings
        assert "/tmp/" not in strings
