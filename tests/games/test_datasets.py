"""Data sets as questions: files, folders and objects, columns, answers that point at choices, and bad records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from coterie.errors import ConfigError
from coterie.scenarios.adapters.datasets import Datasets, DatasetsOptions
from coterie.scenarios.base import build_scenario
from coterie.types import Split, TaskType
from tests.support.tables import first_task, play, saying

SUMS = [{"question": f"{n} + 1 =", "solution": n + 1} for n in range(30)]
NAMED = {"prompt": "question", "answer": "solution"}


def build(data: Any, **options: Any) -> Datasets:
    made = Dataset.from_list(data) if isinstance(data, list) else data
    return Datasets(DatasetsOptions.model_validate({"data": "memory", "columns": NAMED, **options}), made)


def contents(scenario: Datasets, split: Split = Split.TRAIN, count: int = 100) -> list[Mapping[str, Any]]:
    tasks = list(islice(scenario.tasks(split, 0), count))
    return [task.content for task in sorted(tasks, key=lambda task: task.task_id)]


def sums() -> Dataset:
    return Dataset.from_list(SUMS)


def both_sides() -> DatasetDict:
    return DatasetDict({"train": Dataset.from_list(SUMS[:20]), "test": Dataset.from_list(SUMS[20:])})


# -- where records come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "object"])
def test_the_same_records_from_everywhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"sums.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    elif kind == "json":
        path.write_text(json.dumps(SUMS))
    elif kind == "csv":
        sums().to_csv(str(path))
    elif kind == "parquet":
        sums().to_parquet(str(path))
    elif kind == "folder":
        sums().save_to_disk(str(path))
    data = "tests.games.test_datasets:sums" if kind == "object" else str(path)
    scenario = build_scenario("datasets", {"data": data, "columns": NAMED})
    assert isinstance(scenario, Datasets)
    expected = build(SUMS)
    for split in Split:
        found = [task.content for task in islice(scenario.tasks(split, 0), 20)]
        assert found == [task.content for task in islice(expected.tasks(split, 0), 20)]
    assert first_task(scenario).content["answer"].isdigit()


def test_splits() -> None:
    scenario = build(both_sides(), heldout_split="test")
    assert len(contents(scenario, Split.HELDOUT)) == 10
    assert {row["prompt"] for row in contents(scenario, Split.HELDOUT)} == {row["question"] for row in SUMS[20:]}
    shared = build(both_sides(), split="test", heldout_share=0.3)
    sides = [{row["prompt"] for row in contents(shared, split)} for split in Split]
    assert set.union(*sides) == {row["question"] for row in SUMS[20:]}
    assert not set.intersection(*sides)


def test_held_out_records_from_elsewhere(tmp_path: Path) -> None:
    for name, rows in (("train", SUMS[:20]), ("held", SUMS[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": str(tmp_path / "train.jsonl"), "heldout_data": str(tmp_path / "held.jsonl"), "columns": NAMED}
    scenario = build_scenario("datasets", options)
    assert isinstance(scenario, Datasets)
    assert len(contents(scenario, Split.HELDOUT)) == 10
    with pytest.raises(ConfigError, match="asks the same question as"):
        build_scenario("datasets", {**options, "heldout_data": options["data"]})


# -- what records become ----------------------------------------------------------------------------------------------


def test_playing() -> None:
    scenario = build(SUMS, scorer="number")
    task = first_task(scenario)
    outcome, table = play(scenario, task, answer=saying({"seat_1": f"it is {task.content['answer']}"}))
    assert outcome.accuracy == {"seat_1": 1.0}
    assert table["seat_1"].shown[0].user == task.content["prompt"]


def test_choices_by_text_index_letter_and_label() -> None:
    rows: Sequence[dict[str, Any]] = [
        {"prompt": f"Fruit {n}?", "choices": ["brick", "pear"], "text": "pear", "index": 1, "letter": "B"}
        for n in range(10)
    ]
    for kind, column in (("text", "text"), ("index", "index"), ("label", "letter")):
        scenario = build(list(rows), columns={"answer": column}, answer_is=kind, heldout_share=0)
        task = first_task(scenario)
        assert (task.content["answer"], task.content["choices"]) == ("pear", ("brick", "pear"))
        assert task.task_type is TaskType.CLASSIFICATION
    labelled = [
        {"prompt": f"{n}?", "choices": {"text": ["brick", "pear"], "label": ["1", "2"]}, "answer": "2"}
        for n in range(10)
    ]
    scenario = build(labelled, columns={}, answer_is="label", heldout_share=0)
    assert first_task(scenario).content["answer"] == "pear"


def test_class_labels_name_the_choices() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict(
        {"text": [f"film {n}" for n in range(20)], "label": [n % 2 for n in range(20)]}, features=features
    )
    scenario = build(data, columns={"prompt": "text", "answer": "label"})
    for row in contents(scenario, count=10):
        assert row["choices"] == ("neg", "pos")
        assert row["answer"] == ("neg", "pos")[int(row["prompt"].split()[1]) % 2]


def test_the_same_choices_for_all_and_a_template() -> None:
    rows = [{"passage": f"It is {n}.", "question": "Even?", "even": n % 2 == 0} for n in range(20)]
    scenario = build(rows, columns={"answer": "even"}, choices=["yes", "no"], template="{passage}\n{question}")
    for row in contents(scenario, count=10):
        assert row["answer"] == ("no", "yes")[int(row["prompt"].split(".")[0].split()[-1]) % 2 == 0]
        assert row["prompt"].endswith(".\nEven?")


def test_only_the_first_records() -> None:
    scenario = build(SUMS, limit=12)
    assert sum(len({row["prompt"] for row in contents(scenario, split)}) for split in Split) == 12


def test_other_columns_say_what_rows_say() -> None:
    rows = [{"question": f"{n}?", "solution": "x", "hard": n / 20, "max_tokens": 3} for n in range(20)]
    tasks = list(islice(build(rows, columns={**NAMED, "difficulty": "hard"}).tasks(Split.TRAIN, 0), 10))
    assert all(task.difficulty == float(task.content["prompt"][:-1]) / 20 for task in tasks)
    assert tasks[0].content["max_tokens"] == 3


# -- what is refused --------------------------------------------------------------------------------------------------


def test_bad_records_are_listed_with_their_numbers() -> None:
    rows = [*SUMS, {"question": " ", "solution": 1}, {"question": "x", "solution": None}]
    with pytest.raises(
        ConfigError, match=r"2 bad rows.*\n.*memory:30: prompt is blank\n.*memory:31: column 'solution' is empty"
    ):
        build(rows)
    pointed = [{"prompt": f"{n}?", "choices": ["a", "b"], "answer": n % 3} for n in range(4)]
    with pytest.raises(ConfigError, match="memory:2: answer 2 is no index of the 2 choices"):
        build(pointed, columns={}, answer_is="index")
    with pytest.raises(ConfigError, match="answer_is 'label' needs choices"):
        build(SUMS, answer_is="label")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"prompt": "questions", "answer": "solution"}}, "no column 'questions'.*did you mean 'question'"),
        ({"columns": {"prompt": "question"}}, "no column 'answer'"),
        ({"columns": {"promt": "question"}}, "columns names 'promt'.*did you mean 'prompt'"),
        ({"split": "trian"}, "no split 'trian'.*did you mean 'train'"),
        ({"heldout_split": "dev"}, "no split 'dev'"),
        ({"heldout_split": "test", "heldout_data": "x"}, "either heldout_split or heldout_data"),
        ({"heldout_split": "test", "heldout_share": 0.1}, "or heldout_share, not both"),
        ({"template": "{question.__class__}", "columns": {"answer": "solution"}}, "nothing but their names"),
        ({"template": "{question", "columns": {"answer": "solution"}}, "template"),
        ({"template": "{question}"}, "either template or columns.prompt"),
        ({"data": "no/such.csv"}, "no such file or folder"),
        ({"data": "hub/name"}, r"save_to_disk\(folder\)"),
        ({"data": "https://example.com/x.csv"}, "no such file or folder"),
        ({"data": "collections:Counter"}, "is a Counter, not a Dataset"),
        ({"data": "pyproject.toml"}, ".toml is none of"),
        ({"data": "tests"}, "cannot be read"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("datasets", {"data": "tests.games.test_datasets:both_sides", "columns": NAMED, **options})


def test_one_data_set_has_no_splits() -> None:
    with pytest.raises(ConfigError, match="has no splits"):
        build(SUMS, heldout_split="test")
    with pytest.raises(ConfigError, match="has no records"):
        build(Dataset.from_dict({"question": [], "solution": []}))
