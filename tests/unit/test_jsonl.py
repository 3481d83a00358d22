"""Tasks from a file: what is read, what is refused, who hears what, and what an answer earns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import ConfigError, ScenarioError
from coterie.scenarios.base import build_scenario
from coterie.scenarios.jsonl import JsonLines, JsonLinesOptions
from coterie.scenarios.jsonl_rows import SCORERS, last_number
from coterie.types import Split, TaskType, TrainingMode
from tests.support.tables import cards, first_task, make_task, play, saying, shown_to

SUM = {"prompt": "2 + 2 =", "answer": "4"}
FRUIT = {"prompt": "Which is a fruit?", "choices": ["pear", "brick"], "answer": "pear"}


def write(path: Path, rows: Sequence[Any], encoding: str = "utf-8") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


@pytest.fixture
def build(tmp_path: Path) -> Any:
    def made(*rows: Any, heldout: Sequence[Any] | None = None, **options: Any) -> JsonLines:
        options["path"] = write(tmp_path / "train.jsonl", rows)
        if heldout is not None:
            options["heldout_path"] = write(tmp_path / "heldout.jsonl", heldout)
        elif "heldout_share" not in options:
            options["heldout_share"] = 0.0
        return JsonLines(JsonLinesOptions.model_validate(options))

    return made


def refused(build: Any, *rows: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(*rows, **options)
    return str(caught.value)


def ask(scenario: JsonLines, row: Mapping[str, Any], said: Mapping[str, Any], **options: Any) -> Any:
    """Play the row (already in the file, or any other) with these answers."""
    content = {key: row[key] for key in row if key in ("prompt", "answer", "choices", "system", "prefix", "max_tokens")}
    fields = {key: row[key] for key in row if key in ("cooperation_level", "max_steps", "required_models")}
    return play(scenario, make_task(content=content, **fields), answer=saying(said), **options)


# -- reading -----------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_task(build: Any) -> None:
    full = {
        **FRUIT,
        "task_id": "fruit",
        "task_type": "reasoning",
        "difficulty": 1,
        "reward_pool": 2.5,
        "max_steps": 3,
        "required_models": 2,
        "cooperation_level": 0.25,
        "system": "Be brief.",
        "prefix": "So:",
        "max_tokens": 5,
    }
    fruit = first_task(build(full))
    assert (fruit.task_id, fruit.task_type, fruit.difficulty) == ("fruit", TaskType.REASONING, 1.0)
    assert (fruit.reward_pool, fruit.max_steps, fruit.required_models, fruit.cooperation_level) == (2.5, 3, 2, 0.25)
    assert fruit.content == {
        "prompt": "Which is a fruit?", "answer": "pear", "choices": ("pear", "brick"), "system": "Be brief.",
        "prefix": "So:", "max_tokens": 5,
    }  # fmt: skip


def test_what_a_row_does_not_say_comes_from_the_options(build: Any) -> None:
    scenario = build(SUM, FRUIT, required_models=3, cooperation_level=0.8)
    by_id = {task.task_id: task for task in islice(scenario.tasks(Split.TRAIN, 0), 2)}
    assert [by_id[f"line-{n}"].task_type for n in (1, 2)] == [TaskType.GENERATION, TaskType.CLASSIFICATION]
    assert all((task.required_models, task.cooperation_level) == (3, 0.8) for task in by_id.values())
    assert [seat.seat_id for seat in scenario.seats(by_id["line-1"])] == ["seat_1", "seat_2", "seat_3"]
    assert [seat.symmetric_with for seat in scenario.seats(by_id["line-1"])] == [None, "seat_1", "seat_1"]


def test_every_row_comes_once_a_round_in_a_seeded_order(build: Any) -> None:
    scenario = build(*({"prompt": f"p{i}", "answer": "a"} for i in range(7)))
    drawn = [task.task_id for task in islice(scenario.tasks(Split.TRAIN, 0), 21)]
    rounds = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(r) == [f"line-{n}" for n in range(1, 8)] for r in rounds)
    assert rounds[0] != rounds[1]
    assert drawn != [task.task_id for task in islice(scenario.tasks(Split.TRAIN, 1), 21)]
    assert list(scenario.tasks(Split.HELDOUT, 0)) == []


def test_byte_order_mark_crlf_and_blank_lines_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    text = json.dumps(SUM) + "\r\n" + '{"prompt": "一加一", "answer": "二\u2028"}' + "\r\n\r\n  \n\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    scenario = JsonLines(JsonLinesOptions(path=path, heldout_share=0.0))
    assert {task.content["prompt"] for task in islice(scenario.tasks(Split.TRAIN, 0), 2)} == {"2 + 2 =", "一加一"}


# -- the held-out side -------------------------------------------------------------------------------------------


def sides(scenario: JsonLines, rows: int) -> tuple[set[str], set[str]]:
    train = {task.content["prompt"] for task in islice(scenario.tasks(Split.TRAIN, 0), rows)}
    return train, {task.content["prompt"] for task in scenario.tasks(Split.HELDOUT, 0)}


def test_split_covers_everything_once_and_never_moves_a_question(build: Any) -> None:
    rows = [{"prompt": f"question {i}", "answer": "a"} for i in range(400)]
    train, heldout = sides(build(*rows, heldout_share=0.2), 400)
    assert not train & heldout
    assert len(train | heldout) == 400
    assert 50 < len(heldout) < 110  # 80 expected, standard deviation 8
    smaller_train, smaller_heldout = sides(build(*reversed(rows[:200]), heldout_share=0.2), 200)
    assert smaller_train <= train
    assert smaller_heldout <= heldout


def test_equal_questions_stand_on_one_side(build: Any) -> None:
    rows = []
    for i in range(60):
        rows.append({"prompt": f"Pick {i}", "choices": ["x", "y"], "answer": "x"})
        rows.append({"prompt": f"  pick\t{i} ", "choices": ["Y", "x"], "answer": "x"})
    train, heldout = sides(build(*rows, heldout_share=0.5), 120)
    assert len(train) + len(heldout) == 120
    assert {" ".join(p.lower().split()) for p in train}.isdisjoint(" ".join(p.lower().split()) for p in heldout)


def test_held_out_file(build: Any) -> None:
    scenario = build(SUM, heldout=[FRUIT, {"prompt": "3 + 3 =", "answer": "6"}])
    assert {task.task_id for task in scenario.tasks(Split.HELDOUT, 0)} == {"heldout-line-1", "heldout-line-2"}
    assert first_task(scenario).task_id == "line-1"


def test_a_held_out_question_that_is_trained_on_is_an_error(build: Any, tmp_path: Path) -> None:
    said = refused(build, FRUIT, SUM, heldout=[{"prompt": "2 +  2 =", "answer": "four"}])
    assert f"{tmp_path / 'heldout.jsonl'}:1: asks the same question as {tmp_path / 'train.jsonl'}:2" in said
    same_prompt_other_choices = {**FRUIT, "choices": ["plum", "brick"], "answer": "plum"}
    assert build(FRUIT, heldout=[same_prompt_other_choices])


def test_an_empty_side_is_an_error(build: Any) -> None:
    assert "0 of 1 rows are held out" in refused(build, SUM, heldout_share=0.0001)
    assert "1 of 1 rows are held out" in refused(build, SUM, heldout_share=0.9999)


# -- bad files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "invalid JSON"),
        ("[1, 2]", "a row must be a JSON object"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "key 'prompt' stands twice"),
        ({"answer": "4"}, "prompt: Field required"),
        ({"prompt": "2 + 2 ="}, "answer: Field required"),
        ({"prompt": "  ", "answer": "4"}, "prompt is blank"),
        ({"prompt": "2 + 2 =", "answer": " "}, "answer is blank"),
        ({"prompt": "2 + 2 =", "answer": 4}, "answer: Input should be a valid string, got 4"),
        ({**FRUIT, "answer": "Pear"}, "answer 'Pear' is not among the choices (pear, brick)"),
        ({**FRUIT, "choices": ["pear"]}, "choices has 1 entries"),
        ({**FRUIT, "choices": ["pear", "pear"]}, "choice 'pear' stands twice"),
        ({**FRUIT, "choices": ["pear", ""]}, "choices must not be empty"),
        ({**FRUIT, "choices": "pear"}, "choices: "),
        ({**SUM, "promt": "x"}, "unknown key 'promt' (did you mean 'prompt'?)"),
        ({**SUM, "difficulty": 1.1}, "difficulty: Input should be less than or equal to 1, got 1.1"),
        ({**SUM, "difficulty": "hard"}, "difficulty: "),
        ({**SUM, "cooperation_level": -0.1}, "cooperation_level: "),
        ({**SUM, "reward_pool": 0}, "reward_pool: "),
        ('{"prompt": "a", "answer": "b", "reward_pool": Infinity}', "reward_pool: "),
        ({**SUM, "max_steps": 0}, "max_steps: "),
        ({**SUM, "max_steps": True}, "max_steps: "),
        ({**SUM, "max_tokens": 0}, "max_tokens: "),
        ({**SUM, "required_models": 0}, "required_models: "),
        ({**SUM, "task_type": "puzzle"}, "task_type: "),
        ({**SUM, "task_id": ""}, "task_id: "),
        ("", "blank line between rows"),
        ('{"prompt": "\\ud800", "answer": "b"}', "prompt: "),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_reason(build: Any, tmp_path: Path, row: Any, message: str) -> None:
    said = refused(build, {"prompt": "fine", "answer": "a"}, row, {"prompt": "fine too", "answer": "a"})
    assert said.startswith("1 bad row;")
    assert f"{tmp_path / 'train.jsonl'}:2: " in said
    assert message in said.split("train.jsonl:2: ")[1]


def test_a_row_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "ok", "answer": "a"}\n{"prompt": "caf\xe9", "answer": "a"}\n')
    with pytest.raises(ConfigError, match=r"latin.jsonl:2: not UTF-8: byte 16 of the line is 0xe9"):
        build_scenario("jsonl", {"path": str(path)})


def test_duplicate_task_ids_are_named_over_both_files(build: Any, tmp_path: Path) -> None:
    rows = [{**SUM, "task_id": "same"}, {**FRUIT, "task_id": "line-1"}]
    said = refused(build, *rows, heldout=[{"prompt": "p", "answer": "a", "task_id": "same"}])
    assert f"heldout.jsonl:1: task_id 'same' is already used at {tmp_path / 'train.jsonl'}:1" in said
    said = refused(build, SUM, {**FRUIT, "task_id": "line-1"})
    assert "train.jsonl:2: task_id 'line-1' is already used at" in said


def test_all_bad_rows_are_reported_at_once_twenty_by_name(build: Any) -> None:
    said = refused(build, *["nonsense"] * 25, heldout=[*["nonsense"] * 2, SUM])
    assert said.startswith("27 bad rows;")
    assert said.count("invalid JSON") == 20
    assert said.endswith("… and 7 more")


def test_number_answers_must_be_numbers(build: Any) -> None:
    said = refused(build, FRUIT, {"prompt": "How many?", "answer": "four"}, scorer="number")
    assert "train.jsonl:2: answer 'four' has no number" in said
    assert "train.jsonl:1" not in said


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.jsonl: No such file"):
        build_scenario("jsonl", {"path": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(ConfigError, match=r"cannot read .*directory"):
        build_scenario("jsonl", {"path": str(tmp_path)})
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"empty.jsonl is empty; it needs one JSON object a line"):
        build_scenario("jsonl", {"path": str(tmp_path / "empty.jsonl")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path: Field required"),
        ({"path": "x", "heldout_path": "y", "heldout_share": 0.2}, "either heldout_path or heldout_share"),
        ({"path": "x", "heldout_share": 1.0}, "heldout_share"),
        ({"path": "x", "scorer": "exakt"}, "scorer"),
        ({"path": "x", "heldoutpath": "y"}, "did you mean 'heldout_path'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scenario("jsonl", options)


# -- scoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "text", "answer", "right"),
    [
        ("exact", "  PARIS\n", "Paris", True),
        ("exact", "New   York", "new york", True),
        ("exact", "Paris.", "Paris", False),
        ("number", "2 + 2 is 4", "4", True),
        ("number", "4 or 5", "4", False),
        ("number", "It is 1,234.50.", "1234.5", True),
        ("number", "5-2", "2", True),
        ("number", "so −3", "-3", True),
        ("number", "3.0000001", "3", True),
        ("number", "3.00001", "3", False),
        ("number", "none", "3", False),
        ("contains", "I say PARIS, surely", "paris", True),
        ("contains", "Pari s", "paris", False),
    ],
)
def test_scorers(scorer: str, text: str, answer: str, right: bool) -> None:
    assert SCORERS[scorer](text, answer) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [("", None), ("x", None), (".5", 0.5), ("-.5", -0.5), ("1,2", 2), ("1,2345", 2345), ("2e3", 2000), ("a-7", 7)],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_score_is_accuracy_times_efficiency(build: Any) -> None:
    scenario = build(SUM)
    row = {"prompt": "p", "answer": "one two", "max_tokens": 8, "required_models": 3}
    outcome, _ = ask(scenario, row, {"seat_1": "One two", "seat_2": "two", "seat_3": "one two three"}, hearing=never)
    assert outcome.accuracy == {"seat_1": 1.0, "seat_2": 0.0, "seat_3": 0.0}
    assert outcome.scores == {"seat_1": 1 - 0.5 * 2 / 8, "seat_2": 0.0, "seat_3": 0.0}
    assert outcome.metrics == {"accuracy": pytest.approx(1 / 3), "response_quality": pytest.approx(0.05)}


def never(listener: Any, speaker: Any) -> bool:
    return False


def test_choices_are_given_as_choices(build: Any) -> None:
    scenario = build(FRUIT)
    outcome, table = play(scenario, probabilities=lambda seat, seen, choices: [float(c == "pear") for c in choices])
    assert outcome.accuracy == {"seat_1": 1.0}
    assert table["seat_1"].shown[0].user == "Which is a fruit?\nChoices: pear, brick"
    assert (table["seat_1"].shown[0].system, table["seat_1"].shown[0].prefix) == ("Answer in few words.", "Answer:")
    _, table = play(build(FRUIT, show_choices=False), language="zh")
    assert table["seat_1"].shown[0].user == "Which is a fruit?"
    assert (table["seat_1"].shown[0].system, table["seat_1"].shown[0].prefix) == ("请简短作答。", "答案：")


def test_a_rows_own_system_and_prefix_are_kept_even_when_empty(build: Any) -> None:
    _, table = play(build({**SUM, "system": "", "prefix": ""}))
    assert (table["seat_1"].shown[0].system, table["seat_1"].shown[0].prefix) == ("", "")


# -- advice ------------------------------------------------------------------------------------------------------

LED = {"seat_1": "follower", "seat_2": "leader", "seat_3": "follower"}
EQUAL = dict.fromkeys(LED, "teammate")
TRIO = {"prompt": "Where to?", "answer": "left", "required_models": 3, "cooperation_level": 0.5, "max_tokens": 8}


def test_a_leader_advises_first_and_all_answer(build: Any) -> None:
    said = {"seat_1": "left", "seat_2": ["go  left\nnow", "right"], "seat_3": "left"}
    outcome, table = ask(build(SUM), TRIO, said, cards=cards(LED))
    assert [turn.kind for turn in table["seat_2"].turns] == ["advice", "answer"]
    assert table["seat_2"].shown[0].user == "Where to?\nGive your partners a short hint."
    assert table["seat_2"].shown[0].prefix == "Advice:"
    assert table["seat_2"].shown[1].user == "Where to?"
    assert shown_to(table, ["seat_1", "seat_3"]) == ["Where to?\nAdvice from seat_2: go left now"] * 2
    assert outcome.accuracy == {"seat_1": 1.0, "seat_2": 0.0, "seat_3": 1.0}


def test_delegated_all_advise_and_hear_each_other(build: Any) -> None:
    said = {seat: [f"hint of {seat}", "left"] for seat in EQUAL}
    _, table = ask(build(SUM), TRIO, said, cards=cards(EQUAL), language="zh")
    assert table["seat_2"].shown[1].user == "Where to?\nseat_1的建议：hint of seat_1\nseat_3的建议：hint of seat_3"


@pytest.mark.parametrize("why", ["no communication", "nobody hears", "one turn only"])
def test_no_advice_turn(build: Any, why: str) -> None:
    row = {**TRIO, "cooperation_level": 0.3} if why == "no communication" else TRIO
    row = {**row, "max_steps": 1} if why == "one turn only" else row
    hearing = {"hearing": never} if why == "nobody hears" else {}
    _, table = ask(build(SUM), row, dict.fromkeys(EQUAL, "left"), cards=cards(EQUAL), **hearing)
    assert shown_to(table, table.seats) == ["Where to?"] * 3


def test_withheld_advice_is_given_and_not_shown(build: Any) -> None:
    said = {seat: [f"hint of {seat}", "left"] for seat in EQUAL}
    _, table = ask(build(SUM), TRIO, said, cards=cards(EQUAL), withheld=["seat_1"])
    assert len(table["seat_1"].turns) == 2
    assert not any("hint of seat_1" in text for text in shown_to(table, ["seat_2", "seat_3"]))
    assert "hint of seat_2" in table["seat_1"].shown[1].user


def test_advice_stays_where_mode_and_roles_let_it(build: Any) -> None:
    teams = {"seat_1": "red", "seat_2": "red", "seat_3": "blue"}
    said = {"seat_1": ["hint", "left"], "seat_2": ["tip", "left"], "seat_3": "left"}
    _, table = ask(
        build(SUM),
        TRIO,
        said,
        cards=cards(EQUAL, teams),
        mode=TrainingMode.TEAM_BATTLE,
        hearing=lambda listener, speaker: listener.team == speaker.team,
    )
    assert shown_to(table, ["seat_3"]) == ["Where to?"], "nobody would hear it, so it is not asked for advice either"
    assert table["seat_2"].shown[1].user == "Where to?\nAdvice from seat_1: hint"


def test_advice_on_choices_is_a_choice(build: Any) -> None:
    row = {**FRUIT, "required_models": 2, "cooperation_level": 0.5}
    _, table = ask(build(SUM), row, {"seat_1": ["brick", "pear"], "seat_2": ["pear", "pear"]})
    assert [turn.choice for turn in table["seat_1"].turns] == [1, 0]
    assert table["seat_2"].shown[1].user == "Which is a fruit?\nChoices: pear, brick\nAdvice from seat_1: brick"


def test_advice_is_cut_and_counts_against_its_own_allowance(build: Any) -> None:
    row = {**TRIO, "required_models": 2}
    said = {"seat_1": ["word " * 30, "left"], "seat_2": ["", "left"]}
    outcome, table = ask(build(SUM), row, said)
    assert table["seat_2"].shown[1].user.count("word") == 24
    assert outcome.scores["seat_1"] == pytest.approx(1 - 0.5 * (24 + 1) / (24 + 8))
    assert outcome.scores["seat_2"] == pytest.approx(1 - 0.5 * (0 + 1) / (24 + 8))
    assert table["seat_1"].shown[1].user == "Where to?", "empty advice is not shown"


def test_resource_sharing_pools_the_allowance(build: Any) -> None:
    row = {**TRIO, "required_models": 2, "cooperation_level": 0.8}
    said = {"seat_1": ["word " * 30, "left"], "seat_2": ["", "right"]}
    outcome, _ = ask(build(SUM), row, said)
    assert outcome.scores == pytest.approx({"seat_1": 1 - 0.5 * 26 / 64, "seat_2": 0.0})


# -- tasks a user makes ------------------------------------------------------------------------------------------


def test_a_task_with_the_id_of_a_row_plays_that_row(build: Any) -> None:
    scenario = build(SUM, {**FRUIT, "task_id": "fruit"})
    _, table = play(scenario, make_task(task_id="fruit"))
    assert table["seat_1"].shown[0].user.startswith("Which is a fruit?")
    with pytest.raises(ScenarioError, match="'meat' has no content and is no row of"):
        play(scenario, make_task(task_id="meat"))


def test_a_task_with_bad_content_is_an_error(build: Any) -> None:
    with pytest.raises(ScenarioError, match="task 't', content: answer: Field required"):
        build(SUM).check_task(make_task(content={"prompt": "p"}))  # when it is queued
    with pytest.raises(ScenarioError, match=r"task 't', content: .*answer 'c' is not among the choices"):
        play(build(SUM), make_task(content={"prompt": "p", "choices": ["a", "b"], "answer": "c"}))
    with pytest.raises(ScenarioError, match="unknown key 'question'"):
        play(build(SUM), make_task(content={"question": "p"}))
