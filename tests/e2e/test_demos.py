"""The demos run as they are, say what they do, and tell what they measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.errors import BaseModelError
from coterie.types import ModelRole, TaskType, TrainingMode
from tests.support.scripts import load_script

DEMO = Path(__file__).parents[2] / "demo" / "multi_model_single_env_simple.py"
GROUPS = {
    "A cooperative team": ["leader", "follower_1", "follower_2"],
    "Competitors": ["competitor_1", "competitor_2", "competitor_3"],
    "A team battle": ["red_1", "red_2", "blue_1", "blue_2"],
    "A mixed group": ["leader", "follower", "rival", "loner"],
}


def demo(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The demo as a newcomer starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_four_groups_train_and_tell_what_changed(tiny_path: Path, tmp_path: Path) -> None:
    done = demo(tmp_path, "--base", tiny_path, "--cycles", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    parts = re.split(r"^\d\. (.*) \(mode \w+\)$", done.stdout, flags=re.MULTILINE)
    assert parts[1::2] == list(GROUPS)
    for title, part in zip(parts[1::2], parts[2::2], strict=True):
        assert "Cycle 1 -> cycle 2:" in part
        for model in GROUPS[title]:
            (row,) = re.findall(rf"^{model} .*$", part, flags=re.MULTILINE)
            reward, accuracy = re.findall(r"(\d\.\d\d) -> (\d\.\d\d)", row)[:2]
            assert all(0 <= float(value) <= 1 for value in (*reward, *accuracy))
            updates, adapter = row.split()[-2:]
            # its weights really changed, and the version says so
            assert int(updates) >= 1
            assert adapter == f"{model}@v{updates}"
    # who gives advice has a measured effect on the others; who gives none has none
    assert re.search(r"^leader .* [+-]\d\.\d\d", parts[2], flags=re.MULTILINE)
    assert re.search(r"^competitor_1 .* - +\d", parts[4], flags=re.MULTILINE)
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--seed", "-1"], 2, "error: demo: seed: Input should be greater than or equal to 0"),
        (["--cycles", "0"], 2, "0 is less than 1"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    done = demo(tmp_path, *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_base_that_is_not_there_is_told_before_anything_long(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("demo/multi_model_single_env_simple.py")
    with pytest.raises(BaseModelError, match=r"base model '\./nowhere': no such directory"):
        script.main(["--base", "./nowhere"])
    assert "cycle 1" not in capsys.readouterr().out


def test_the_groups_are_what_they_are_said_to_be() -> None:
    script = load_script("demo/multi_model_single_env_simple.py")
    assert [group.title for group in script.GROUPS] == list(GROUPS)
    assert {group.mode for group in script.GROUPS} == set(TrainingMode)
    for group in script.GROUPS:
        env = script.make_environment(group, "some-base", seed=4, cycles=1)
        assert list(env.models) == GROUPS[group.title]
        stats = env.get_environment_stats()
        assert (stats["base"], stats["training_mode"], stats["queued_tasks"]) == (
            "some-base",
            group.mode,
            len(TaskType),
        )
        assert env.config.seed == 4
    mixed = [config.role for config in script.create_mixed_group()]
    assert mixed == [ModelRole.LEADER, ModelRole.FOLLOWER, ModelRole.COMPETITOR, ModelRole.NEUTRAL]
