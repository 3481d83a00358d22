"""The tasks scenario: what is asked, who hears whom, what counts as right, and what it costs."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice, permutations
from typing import Any

import pytest
from transformers import AutoTokenizer

from coterie.errors import ConfigError, ScenarioError
from coterie.lm.embedded import resolve_base
from coterie.modes.base import build_mode
from coterie.scenarios.base import build_scenario
from coterie.scenarios.practice import Answer, PracticeTable
from coterie.scenarios.tasks import Tasks, TasksOptions
from coterie.scenarios.tasks.kinds import KINDS
from coterie.scenarios.tasks.words import POOLS, numbers, translate, words
from coterie.types import ModelRole, Observation, Outcome, PlayerCard, SeatId, Split, TaskType, TrainingMode
from tests.support.tables import make_task, play

TASKS = Tasks(TasksOptions())
CHOOSING = (TaskType.CLASSIFICATION, TaskType.REASONING, TaskType.OPTIMIZATION, TaskType.COLLABORATION)
SENTIMENT = {
    "form": "sentiment", "labels": ["positive", "negative"], "answer": "negative", "adjective": "awful",
    "subject": "soup",
}  # fmt: skip
SECRET = {"colours": ["red", "blue"], "items": ["cup", "hat"], "colour": "blue", "item": "cup"}


def seated(
    *roles: str,
    task_type: TaskType = TaskType.CLASSIFICATION,
    content: Mapping[str, Any] = SENTIMENT,
    level: float = 0.6,
    mode: str = "cooperative",
    teams: Sequence[str | None] = (),
    answer: Answer | None = None,
    max_steps: int = 2,
    **options: Any,
) -> tuple[Outcome, PracticeTable]:
    """Play one task with a model of each role, "m1", "m2", …, under a real mode."""
    task = make_task(
        task_type=task_type, content=content, cooperation_level=level, required_models=len(roles), max_steps=max_steps
    )
    rules = build_mode(TrainingMode(mode))
    cards = [
        PlayerCard(f"seat_{i + 1}", f"m{i + 1}", ModelRole(role), teams[i] if teams else None)
        for i, role in enumerate(roles)
    ]
    return play(
        TASKS,
        task,
        cards=cards,
        mode=TrainingMode(mode),
        hearing=lambda listener, speaker: rules.hears(listener, speaker, task),
        answer=answer,
        **options,
    )


def kinds(table: PracticeTable) -> list[list[str]]:
    """The kinds of every seat's turns."""
    return [[turn.kind for turn in table[seat].turns] for seat in table.seats]


def heard(table: PracticeTable, seat: SeatId) -> list[str]:
    """Who is quoted in the prompts of a seat, English or Chinese."""
    return re.findall(r"(m\d)(?: says|说)", "\n".join(shown.user for shown in table[seat].shown))


def first_choice(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
    return choices[0] if choices else "river!"


# -- which tasks --------------------------------------------------------------------------------------------------


def test_types_come_in_turn_and_one_named_twice_comes_twice_as_often_in_training_only() -> None:
    scenario = build_scenario("tasks", {"types": ["reasoning", "classification", "reasoning"], "heldout": 10})
    train = Counter(task.task_type for task in islice(scenario.tasks(Split.TRAIN, 0), 30))
    heldout = Counter(task.task_type for task in scenario.tasks(Split.HELDOUT, 0))
    assert train == {TaskType.REASONING: 20, TaskType.CLASSIFICATION: 10}
    assert heldout == {TaskType.REASONING: 5, TaskType.CLASSIFICATION: 5}


def test_options_stand_on_the_tasks() -> None:
    options = {"models": 2, "difficulty": [0.4, 0.6], "cooperation_level": 0.2, "reward_pool": 3.0, "max_steps": 5}
    scenario = build_scenario("tasks", options)
    for task in islice(scenario.tasks(Split.TRAIN, 7), 25):
        assert (task.required_models, task.cooperation_level, task.reward_pool, task.max_steps) == (2, 0.2, 3.0, 5)
        assert 0.4 <= task.difficulty <= 0.6
        assert len(scenario.seats(task)) == 2


def test_seeds_give_different_tasks_and_ids_do_not_repeat() -> None:
    one, other = (list(islice(TASKS.tasks(Split.TRAIN, seed), 50)) for seed in (1, 2))
    assert sum(a.content == b.content for a, b in zip(one, other, strict=True)) < 10
    assert len({task.task_id for task in one}) == 50


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"difficulty": [0.7, 0.3]}, r"difficulty.*lowest and the highest"),
        ({"difficulty": [0.0, 1.5]}, r"difficulty.*lowest and the highest"),
        ({"types": []}, "types"),
        ({"types": ["logic"]}, "types"),
        ({"models": 0}, "models"),
        ({"cooperation": 1}, r"unknown key 'cooperation' \(did you mean 'cooperation_level'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_scenario("tasks", options)


# -- difficulty ---------------------------------------------------------------------------------------------------


def made(task_type: TaskType, difficulty: float, count: int = 60) -> list[dict[str, Any]]:
    return [KINDS[task_type].make(random.Random(i), difficulty, Split.TRAIN, 3) for i in range(count)]


@pytest.mark.parametrize(
    ("difficulty", "form", "labels", "opener"),
    [
        (0.0, "sentiment", 2, False),
        (0.24, "sentiment", 2, False),
        (0.25, "sentiment", 2, True),
        (0.49, "sentiment", 2, True),
        (0.5, "topic", 3, False),
        (0.74, "topic", 3, False),
        (0.75, "topic", 4, False),
        (1.0, "topic", 4, False),
    ],
)
def test_classification_by_difficulty(difficulty: float, form: str, labels: int, opener: bool) -> None:
    for content in made(TaskType.CLASSIFICATION, difficulty, 10):
        assert (content["form"], len(content["labels"]), "opener" in content) == (form, labels, opener)


@pytest.mark.parametrize(("difficulty", "count"), [(0.0, 2), (0.29, 2), (0.3, 3), (0.69, 3), (0.7, 4), (1.0, 4)])
def test_reasoning_by_difficulty(difficulty: float, count: int) -> None:
    for content in made(TaskType.REASONING, difficulty):
        assert len(set(content["numbers"])) == count
        assert content["answer"] == max(content["numbers"])


def test_harder_numbers_lie_closer() -> None:
    def spread(difficulty: float) -> float:
        return max(max(c["numbers"]) - min(c["numbers"]) for c in made(TaskType.REASONING, difficulty))

    assert spread(0.0) > spread(0.25)
    assert spread(0.7) > spread(1.0)
    # every number within 20 of the first drawn, so no two further apart than 40
    assert spread(1.0) <= 40


@pytest.mark.parametrize(("difficulty", "count", "limit"), [(0.0, 1, 5), (0.49, 1, 4), (0.5, 2, 4), (1.0, 2, 3)])
def test_generation_by_difficulty(difficulty: float, count: int, limit: int) -> None:
    for content in made(TaskType.GENERATION, difficulty, 10):
        assert (len(content["words"]), content["limit"]) == (count, limit)
        assert limit >= count  # it can be met


@pytest.mark.parametrize(("difficulty", "count"), [(0.0, 2), (0.39, 2), (0.4, 3), (0.79, 3), (0.8, 4), (1.0, 4)])
def test_optimization_by_difficulty(difficulty: float, count: int) -> None:
    for content in made(TaskType.OPTIMIZATION, difficulty, 10):
        assert len({name for name, _ in content["offers"]}) == len({price for _, price in content["offers"]}) == count


@pytest.mark.parametrize(("difficulty", "choices"), [(0.0, 4), (0.39, 4), (0.4, 9), (1.0, 9)])
def test_collaboration_by_difficulty(difficulty: float, choices: int) -> None:
    for content in made(TaskType.COLLABORATION, difficulty, 10):
        assert len(KINDS[TaskType.COLLABORATION].choices(content, "en") or ()) == choices


# -- what is right ------------------------------------------------------------------------------------------------

OFFERS = {"offers": [["pen", 30], ["cup", 20], ["bag", 40]]}
WRITE = {"words": ["river", "lamp"], "limit": 4, "mark": "!"}


@pytest.mark.parametrize(
    ("task_type", "content", "language", "answer", "accuracy"),
    [
        (TaskType.CLASSIFICATION, SENTIMENT, "en", "negative", 1.0),
        (TaskType.CLASSIFICATION, SENTIMENT, "en", "positive", 0.0),
        (TaskType.CLASSIFICATION, SENTIMENT, "zh", "负面", 1.0),
        (TaskType.CLASSIFICATION, SENTIMENT, "zh", "正面", 0.0),
        (TaskType.REASONING, {"numbers": [15, 51, 24], "answer": 51}, "en", "51", 1.0),
        (TaskType.REASONING, {"numbers": [15, 51, 24], "answer": 51}, "zh", "15", 0.0),
        (TaskType.OPTIMIZATION, OFFERS, "en", "cup", 1.0),
        (TaskType.OPTIMIZATION, OFFERS, "en", "pen", 0.5),
        (TaskType.OPTIMIZATION, OFFERS, "en", "bag", 0.0),
        (TaskType.OPTIMIZATION, OFFERS, "zh", "杯子", 1.0),
        (TaskType.COLLABORATION, SECRET, "en", "blue cup", 1.0),
        (TaskType.COLLABORATION, SECRET, "en", "blue hat", 0.0),
        (TaskType.COLLABORATION, SECRET, "en", "red cup", 0.0),
        (TaskType.COLLABORATION, SECRET, "zh", "蓝色杯子", 1.0),
        (TaskType.GENERATION, WRITE, "en", "A lamp, a river!", 1.0),
        (TaskType.GENERATION, WRITE, "en", "Lamp River!", 1.0),
        (TaskType.GENERATION, WRITE, "en", "A lamp by the river!", 0.75),  # a word too many
        (TaskType.GENERATION, WRITE, "en", "A lamp, a river.", 0.75),  # the wrong mark
        (TaskType.GENERATION, WRITE, "en", "A lamp!", 0.75),
        (TaskType.GENERATION, WRITE, "en", "The lamps glow!", 0.5),  # "lamps" is not "lamp"
        (TaskType.GENERATION, WRITE, "en", "", 0.0),
        (TaskType.GENERATION, WRITE, "zh", "河边有灯!", 1.0),
        (TaskType.GENERATION, WRITE, "zh", "河边有灯！", 1.0),  # the full-width mark
        (TaskType.GENERATION, WRITE, "zh", "河边有一盏很亮的灯!", 0.75),
        (TaskType.GENERATION, WRITE, "zh", "河边!", 0.75),
    ],
)
def test_answers_are_checked(
    task_type: TaskType, content: Mapping[str, Any], language: str, answer: str, accuracy: float
) -> None:
    assert KINDS[task_type].accuracy(content, language, answer, True) == accuracy


def test_a_text_that_was_cut_off_meets_neither_length_nor_ending() -> None:
    generation = KINDS[TaskType.GENERATION]
    assert generation.accuracy(WRITE, "en", "A lamp, a river!", False) == 0.5


@pytest.mark.parametrize("task_type", TaskType)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_scores_are_accuracy_times_efficiency(task_type: TaskType, language: str) -> None:
    outcome, table = seated("competitor", task_type=task_type, content={}, answer=first_choice, language=language)
    budget = 12 + (0 if task_type in CHOOSING else 8 if language == "en" else 24)
    used = sum(len(turn.token_ids) for turn in table["seat_1"].turns)
    assert outcome.scores["seat_1"] == pytest.approx(outcome.accuracy["seat_1"] * (1 - 0.5 * used / budget))


@pytest.mark.parametrize("task_type", TaskType)
def test_choices_are_announced_by_a_prefix_and_free_text_is_not(task_type: TaskType) -> None:
    _, table = seated("neutral", task_type=task_type, content={}, answer=first_choice)
    (shown,) = table["seat_1"].shown
    (turn,) = table["seat_1"].turns
    assert bool(shown.prefix) is (task_type in CHOOSING)
    assert (turn.choice is not None) is (task_type in CHOOSING)


# -- prompts ------------------------------------------------------------------------------------------------------


def system(role: str = "teammate", language: str = "en", others: int = 2, **options: Any) -> str:
    team, specialization = options.pop("team", None), options.pop("specialization", "")
    task = make_task(
        task_type=TaskType.CLASSIFICATION,
        content=SENTIMENT,
        required_models=others + 1,
        cooperation_level=options.pop("level", 0.5),
    )
    card = PlayerCard("seat_1", "m1", ModelRole(role), team, specialization)
    _, table = play(TASKS, task, cards=[card], answer=first_choice, language=language, **options)
    return table["seat_1"].shown[0].system


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_prompt_says_who_one_is_and_how_the_group_goes_about_it(language: str) -> None:
    plain = system(language=language)
    told = system(language=language, team="crimson", specialization="proofs", others=6)
    assert "crimson" in told
    assert "proofs" in told
    assert "6" in told
    assert "crimson" not in plain
    assert len({system(role, language) for role in ModelRole}) == len(ModelRole)
    assert len({system(language=language, mode=mode) for mode in TrainingMode}) == len(TrainingMode)
    # teamwork low, medium, high; with them advice from above 0.3, a common budget from above 0.7
    assert len({system(language=language, level=level) for level in (0.1, 0.3, 0.5, 0.7, 0.9)}) == 3
    assert system(language=language, level=0.3) == system(language=language, level=0.1)


def test_the_prompt_names_the_strategy_in_words() -> None:
    assert "Advice" not in system(level=0.3)
    assert "Advice is shared" in system(level=0.31)
    assert "Tokens are shared" not in system(level=0.7)
    assert "Tokens are shared" in system(level=0.71)
    assert "建议" not in system(level=0.3, language="zh")
    assert "建议" in system(level=0.31, language="zh")
    assert "共享" in system(level=0.71, language="zh")


@pytest.mark.parametrize("task_type", TaskType)
def test_chinese_prompts_are_chinese(task_type: TaskType) -> None:
    _, table = seated("leader", "follower", task_type=task_type, content={}, answer=first_choice, language="zh")
    for seat in table.seats:
        for seen in table[seat].shown:
            text = re.sub(r"m\d", "", "".join((seen.system, seen.user, seen.prefix)))
            assert not re.findall(r"[A-Za-z]+", text)
            assert not re.findall(r"[,.:;?!()]", text), "half-width punctuation"
        assert all(not re.search("[a-z]", turn.text) for turn in table[seat].turns if turn.choice is not None)


@pytest.mark.parametrize(("language", "end"), [("en", "End with ?"), ("zh", "以？结尾")])
def test_the_mark_is_written_as_the_language_writes_it(language: str, end: str) -> None:
    assert KINDS[TaskType.GENERATION].question({**WRITE, "mark": "?"}, language, 0).endswith(end)


def test_every_word_of_a_task_has_a_chinese_form() -> None:
    for pool in POOLS:
        for split in Split:
            assert all(re.search(r"[一-鿿]", translate(word, "zh")) for word in words(pool, split))
    assert translate("qwerty", "zh") == "qwerty"
    assert translate("river", "en") == "river"


def test_every_fifth_number_is_held_out() -> None:
    assert numbers(Split.HELDOUT, 10, 25) == (12, 17, 22)
    assert sorted((*numbers(Split.HELDOUT, 10, 99), *numbers(Split.TRAIN, 10, 99))) == list(range(10, 100))


# -- roles --------------------------------------------------------------------------------------------------------


def test_a_leader_decides_first_and_its_followers_hear_the_decision() -> None:
    def answer(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        assert choices is not None
        return "negative" if seat == "seat_2" or "says: negative" in seen.user else "positive"

    outcome, table = seated("follower", "leader", "follower", answer=answer)
    assert kinds(table) == [["answer"], ["decision"], ["answer"]]
    assert [heard(table, seat) for seat in table.seats] == [["m2"], [], ["m2"]]
    assert set(outcome.accuracy.values()) == {1.0}


def test_without_a_leader_each_advises_and_then_decides_alone() -> None:
    _, table = seated("teammate", "teammate", "teammate", answer=first_choice)
    assert kinds(table) == [["advice", "answer"]] * 3
    assert [heard(table, seat) for seat in table.seats] == [["m2", "m3"], ["m1", "m3"], ["m1", "m2"]]
    # advice is given before any is heard
    assert all("says" not in table[seat].shown[0].user for seat in table.seats)


def test_a_competitor_shares_nothing_and_a_neutral_model_hears_nothing() -> None:
    _, table = seated("competitor", "teammate", "neutral", answer=first_choice)
    assert kinds(table) == [["answer"], ["advice", "answer"], ["advice", "answer"]]
    assert [heard(table, seat) for seat in table.seats] == [["m2", "m3"], ["m3"], []]


@pytest.mark.parametrize("task_type", TaskType)
def test_in_a_competition_nobody_speaks(task_type: TaskType) -> None:
    _, table = seated(
        "leader", "follower", "teammate", mode="competitive", task_type=task_type, content={}, answer=first_choice
    )
    assert kinds(table) == [["answer"]] * 3
    assert not any(heard(table, seat) for seat in table.seats)


def test_teams_advise_themselves_only() -> None:
    _, table = seated(*["teammate"] * 4, mode="team_battle", teams=["red", "blue", "red", "blue"], answer=first_choice)
    assert [heard(table, seat) for seat in table.seats] == [["m3"], ["m4"], ["m1"], ["m2"]]


@pytest.mark.parametrize("task_type", TaskType)
@pytest.mark.parametrize(("level", "max_steps"), [(0.3, 2), (1.0, 1)])
def test_no_advice_without_communication_or_a_turn_to_spare(task_type: TaskType, level: float, max_steps: int) -> None:
    _, table = seated(
        "leader", "follower", task_type=task_type, content={}, level=level, max_steps=max_steps, answer=first_choice
    )
    assert kinds(table) == [["answer"], ["answer"]]


def test_withheld_advice_is_given_but_not_shown() -> None:
    _, told = seated("leader", "follower", answer=first_choice)
    _, kept = seated("leader", "follower", answer=first_choice, withheld=["seat_1"])
    assert kinds(told) == kinds(kept) == [["decision"], ["answer"]]
    assert "says" in told["seat_2"].shown[0].user
    assert "says" not in kept["seat_2"].shown[0].user
    # nothing else about the prompt tells whether advice was withheld, and the speaker cannot know
    assert told["seat_2"].shown[0].system == kept["seat_2"].shown[0].system
    assert told["seat_1"].shown == kept["seat_1"].shown


def test_a_writer_is_told_by_its_leader_what_to_mind_and_answers_itself() -> None:
    _, table = seated("leader", "follower", task_type=TaskType.GENERATION, content=WRITE, answer=first_choice)
    assert kinds(table) == [["advice", "answer"], ["answer"]]
    assert [turn.text for turn in table["seat_1"].turns] == ["words", "river!"]
    assert "m1 says: words" in table["seat_2"].shown[0].user


# -- collaboration ------------------------------------------------------------------------------------------------


def reasonable(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
    """Tells what it knows, and answers what fits all it was told; the first such choice if several do."""
    assert choices is not None
    facts = re.findall(r"(?:know|says): (\w+)", seen.user)
    fitting = [choice for choice in choices if all(fact in choice.split() for fact in facts)]
    if fitting:
        return fitting[0]
    (known,) = (choice for choice in choices if choice in facts)  # an advice turn: which half do I know?
    return known


def collaboration(*roles: str, tasks: int = 24, **options: Any) -> dict[SeatId, float]:
    """Mean accuracy of reasonable players."""
    totals: Counter[SeatId] = Counter()
    for number in range(tasks):
        content = KINDS[TaskType.COLLABORATION].make(random.Random(number), 1.0, Split.TRAIN, len(roles))
        outcome, _ = seated(*roles, task_type=TaskType.COLLABORATION, content=content, answer=reasonable, **options)
        totals.update(outcome.accuracy)
    return {seat: total / tasks for seat, total in totals.items()}


def test_what_is_needed_reaches_the_others_through_advice_alone() -> None:
    assert set(collaboration("leader", "follower", "follower").values()) == {1.0}
    assert set(collaboration("teammate", "teammate").values()) == {1.0}
    for alone in (
        collaboration("teammate", "teammate", withheld=["seat_1", "seat_2"]),
        collaboration("teammate", "teammate", level=0.3),
        collaboration("teammate", "teammate", mode="competitive"),
        collaboration("competitor", "competitor"),
    ):
        assert max(alone.values()) < 0.7


def test_one_silent_half_leaves_only_its_listeners_guessing() -> None:
    one_way = collaboration("teammate", "teammate", withheld=["seat_2"])
    assert one_way["seat_2"] == 1.0
    assert one_way["seat_1"] < 0.7


def test_two_who_know_the_same_half_cannot_help_each_other() -> None:
    # seats 1 and 3 know the colour; only the second seat knows the thing
    outcome = collaboration("teammate", "competitor", "teammate")
    assert max(outcome["seat_1"], outcome["seat_3"]) < 0.7
    assert outcome["seat_2"] == 1.0


# -- tokens -------------------------------------------------------------------------------------------------------


def test_shared_resources_are_one_budget() -> None:
    def answer(seat: SeatId, seen: Observation, choices: Sequence[str] | None, rng: random.Random) -> str:
        if choices:
            return choices[0]
        return "river lamp " + ("and so on and on!" if seat == "seat_1" else "!")

    def efficiencies(level: float) -> list[float]:
        outcome, _ = seated(
            "teammate", "teammate", task_type=TaskType.GENERATION, content=WRITE, level=level, answer=answer
        )
        return [outcome.scores[seat] / outcome.accuracy[seat] for seat in outcome.scores]

    # of 20 tokens each: 1 of advice and 7, 1 of advice and 3
    assert efficiencies(0.7) == pytest.approx([1 - 0.5 * 8 / 20, 1 - 0.5 * 4 / 20])
    assert efficiencies(0.8) == pytest.approx([1 - 0.5 * 12 / 40] * 2)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_line_that_meets_everything_fits_in_its_tokens(language: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("smollm2-135m-instruct", allow_download=False))
    _, table = seated(
        "neutral", task_type=TaskType.GENERATION, content=WRITE, language=language, answer=lambda *_: "on " * 99
    )
    room = len(table["seat_1"].turns[0].token_ids)
    generation = KINDS[TaskType.GENERATION]
    for split in Split:
        for first, second in permutations(words("thing", split), 2):
            for mark in "!?":
                content = {"words": [first, second], "limit": 3, "mark": mark}
                written = {
                    "en": f"{first} {second}{mark}",
                    "zh": translate(first, "zh") + translate(second, "zh") + mark,
                }
                line = written[language].translate({33: "！", 63: "？"} if language == "zh" else {})
                assert generation.accuracy(content, language, line, True) == 1.0
                assert len(tokenizer.encode(line)) + 1 <= room, line  # and one that ends the turn


# -- a user's own tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", TaskType)
def test_a_task_without_content_gets_it_from_its_id(task_type: TaskType) -> None:
    def shown(task_id: str, split: Split = Split.TRAIN) -> str:
        task = make_task(task_id=task_id, task_type=task_type, difficulty=0.9, required_models=2, split=split)
        _, table = play(Tasks(TasksOptions()), task, answer=first_choice)
        return table["seat_1"].shown[0].user + str(table["seat_1"].turns)

    ids = [f"mine-{number}" for number in range(8)]
    assert [shown(task_id) for task_id in ids] == [shown(task_id) for task_id in ids]
    assert len({shown(task_id) for task_id in ids}) > 4
    assert shown("mine-1", Split.HELDOUT) != shown("mine-1")


def test_a_task_may_bring_its_own_content() -> None:
    content = {"numbers": [7, 1000], "answer": 1000}
    outcome, table = seated("neutral", task_type=TaskType.REASONING, content=content, answer=lambda s, o, c, r: "1000")
    assert outcome.accuracy == {"seat_1": 1.0}
    assert "7, 1000" in table["seat_1"].shown[0].user


TOPIC = {"form": "topic", "labels": ["animal", "food"], "answer": "food", "noun": "soup", "place": "on the table"}


@pytest.mark.parametrize(
    ("task_type", "content", "said"),
    [
        ("classification", {"text": "Nice soup."}, "form is None; it must be one of 'sentiment', 'topic'"),
        ("classification", {**SENTIMENT, "form": "mood"}, "form is 'mood'; it must be"),
        ("classification", {k: v for k, v in SENTIMENT.items() if k != "labels"}, "labels: Field required"),
        ("classification", {**SENTIMENT, "adjectiv": "x"}, "unknown key 'adjectiv' (did you mean 'adjective'?)"),
        ("classification", {**SENTIMENT, "answer": "good"}, "answer 'good' is not among labels (positive, negative)"),
        ("classification", {k: v for k, v in TOPIC.items() if k != "place"}, "place: Field required"),
        ("classification", {**TOPIC, "labels": ["food", "food"]}, "labels has 'food' twice"),
        ("reasoning", {"numbers": [1, 2]}, "answer: Field required"),
        ("reasoning", {"numbers": [1, 2], "answer": 1}, "answer is 1, but the largest of numbers is 2"),
        ("reasoning", {"numbers": [3], "answer": 3}, "numbers: "),
        ("reasoning", {"numbers": ["1", "2"], "answer": 2}, "numbers.0"),
        ("generation", {"words": ["river"], "limit": 4}, "mark: Field required"),
        ("generation", {"words": ["river"], "limit": 4, "mark": "."}, "mark: "),
        ("generation", {"words": ["river", "lamp"], "limit": 1, "mark": "!"}, "no room for 2 words"),
        ("optimization", {"offer": [["pen", 1], ["cup", 2]]}, "offers: Field required; unknown key 'offer'"),
        ("optimization", {"offers": [["pen", 1], ["cup"]]}, "offers.1.1: Field required"),
        ("optimization", {"offers": [["pen", 1], ["cup", 1]]}, "all offers have the same price"),
        ("collaboration", {"colours": ["red", "blue"], "items": ["cup", "hat"], "item": "hat"}, "colour: Field requ"),
        ("collaboration", {**SECRET, "item": "bag"}, "item 'bag' is not among items (cup, hat)"),
    ],
)
def test_content_a_task_cannot_be_played_with_is_named(task_type: str, content: Mapping[str, Any], said: str) -> None:
    task = make_task(task_id="mine", task_type=task_type, content=content, required_models=2)
    with pytest.raises(ScenarioError, match=rf"^task 'mine', content of a {task_type} task: ") as queued:
        TASKS.check_task(task)
    message = str(queued.value)
    assert said in message
    # what is expected, by an example that would pass
    example = ast.literal_eval(message[message.index("it looks like ") + 14 : message.index(", or leave content out")])
    TASKS.check_task(make_task(task_type=task_type, content=example))
    with pytest.raises(ScenarioError, match="task 'mine', content"):
        play(TASKS, task)


@pytest.mark.parametrize("task_type", TaskType)
def test_content_that_fits_is_accepted(task_type: TaskType) -> None:
    TASKS.check_task(make_task(task_type=task_type))
    for difficulty in (0.0, 0.25, 0.5, 0.75, 1.0):
        for content in made(task_type, difficulty, 10):
            TASKS.check_task(make_task(task_type=task_type, content=content))
