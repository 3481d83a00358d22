"""Constraints: every answer is one of those allowed, every allowed answer can be given, bad ones are refused."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from coterie.serve.engine import Step
from coterie.serve.errors import ApiError
from coterie.serve.grammar import Compiled, Grammars
from coterie.serve.protocol import StructuredOutputs
from coterie.serve.sampling import unpack
from coterie.serve.text import Text
from coterie.serve.tools import CallReader

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 20}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def text(tiny_path: Path) -> Text:
    return Text(AutoTokenizer.from_pretrained(tiny_path))


@pytest.fixture
def grammars(text: Text) -> Grammars:
    # a vocabulary wider than the tokenizer's, as models have it
    return Grammars(text, len(text.tokenizer) + 13, (text.tokenizer.eos_token_id,))


def structured(grammars: Grammars, **wanted: Any) -> Compiled:
    found = asyncio.run(grammars.structured(StructuredOutputs.model_validate(wanted)))
    assert found is not None
    return found


def ids_of(step: Step, vocabulary: int) -> list[int]:
    return list(step.ids) if step.ids is not None else unpack(step.mask, vocabulary).tolist()  # type: ignore[arg-type]


def wander(text: Text, compiled: Compiled, seed: int, begin: str = "", limit: int = 300) -> str:
    """An answer whose every token is drawn from all that are allowed."""
    rng, constraint, said = random.Random(seed), compiled.fresh(), list[int]()
    vocabulary = len(text.tokenizer) + 13
    for token in text.encode(begin, special=False):
        assert token in ids_of(constraint.step(), vocabulary)
        constraint.accept(token)
        said.append(token)
    while not constraint.ended and len(said) < limit:
        token = rng.choice(ids_of(constraint.step(), vocabulary))
        assert token < len(text.tokenizer)
        if token == text.tokenizer.eos_token_id:
            break
        constraint.accept(token)
        said.append(token)
    else:
        assert constraint.ended, "never ended"
    return text.decode(said)


def test_choices_are_given_and_nothing_else(text: Text, grammars: Grammars) -> None:
    choices = ["red", "reduce", "green", "stag"]  # "red" begins "reduce": the end of the turn tells them apart
    compiled = structured(grammars, choice=choices)
    assert {wander(text, compiled, seed) for seed in range(60)} == set(choices)
    assert structured(grammars, choice=["red", "red"]).fresh().step().ids == text.encode("red", special=False)


@pytest.mark.parametrize("choices", [["a", ""], [str(i) for i in range(5000)]])
def test_choices_that_cannot_be_are_refused(grammars: Grammars, choices: list[str]) -> None:
    with pytest.raises(ApiError) as caught:
        structured(grammars, choice=choices)
    assert caught.value.status == 400


def test_json_follows_its_schema_in_one_style(text: Text, grammars: Grammars) -> None:
    for wanted in (PLACE, json.dumps(PLACE)):
        compiled = structured(grammars, json=wanted)
        found = {wander(text, compiled, seed) for seed in range(25)}
        assert len(found) > 10
        for said in found:
            data = json.loads(said)
            assert data["city"] in ("Oslo", "Rome")
            assert 1 <= data["days"] <= 20
            assert said == json.dumps(data)


def test_any_json_object(text: Text, grammars: Grammars) -> None:
    compiled = structured(grammars, json_object=True)
    assert wander(text, compiled, 0, begin='{"a": [1, {"b": null}]}') == '{"a": [1, {"b": null}]}'
    first = unpack(compiled.fresh().step().mask, len(text.tokenizer))  # type: ignore[arg-type]
    assert {text.token(token)[:1] for token in first} == {"{"}


def test_regular_expressions_and_grammars(text: Text, grammars: Grammars) -> None:
    for wanted in ({"regex": "[ab]{2,5}"}, {"grammar": "root ::= [ab] [ab] [ab]? [ab]? [ab]?"}):
        for seed in range(10):
            assert re.fullmatch("[ab]{2,5}", wander(text, structured(grammars, **wanted), seed))


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "strong"}},
        {"json": "{"},
        {"json": "3"},
        {"json": {"type": "string", "pattern": "(?=a)"}},
        {"regex": "("},
        {"grammar": "root ::= ("},
    ],
)
def test_what_is_no_schema_or_grammar_is_refused(grammars: Grammars, wanted: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        structured(grammars, **wanted)
    assert caught.value.status == 400
    assert caught.value.param == "structured_outputs"


def test_no_constraint_where_none_is_asked_for(grammars: Grammars) -> None:
    assert asyncio.run(grammars.structured(StructuredOutputs())) is None


def test_answers_share_what_was_compiled_but_not_where_they_are(text: Text, grammars: Grammars) -> None:
    async def both() -> tuple[Compiled, ...]:
        wanted = StructuredOutputs.model_validate({"json": PLACE})
        found = await asyncio.gather(grammars.structured(wanted), grammars.structured(wanted))
        return (*(one for one in found if one), (await grammars.structured(wanted)) or found[0])  # type: ignore[return-value]

    *_, one, again = asyncio.run(both())
    assert again is one
    first, second = one.fresh(), one.fresh()
    first.accept(text.encode("{", special=False)[0])
    assert ids_of(first.step(), 300) != ids_of(second.step(), 300)


# -- tools ------------------------------------------------------------------------------------------------------------


def calls(grammars: Grammars, *, required: bool, parallel: bool) -> Compiled:
    tools = [("trip", PLACE), ("stop", None)]
    return asyncio.run(grammars.tools(tools, required=required, parallel=parallel))


def read(said: str) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader()
    plain, made = reader.add(said)
    return plain + reader.finish(), [(call.name, json.loads(call.arguments)) for call in made]


@pytest.mark.parametrize("parallel", [False, True])
def test_required_calls_are_valid_whatever_the_model_wants(text: Text, grammars: Grammars, parallel: bool) -> None:
    compiled = calls(grammars, required=True, parallel=parallel)
    counts, names = set(), set()
    for seed in range(20):
        plain, made = read(wander(text, compiled, seed, limit=2000))
        assert plain == ""
        counts.add(len(made))
        for name, arguments in made:
            names.add(name)
            if name == "trip":
                assert arguments["city"] in ("Oslo", "Rome")
            else:
                assert arguments == {}
    assert names == {"trip", "stop"}
    assert counts == {1} if not parallel else max(counts) > 1


def test_free_text_stays_free_until_it_begins_a_call(text: Text, grammars: Grammars) -> None:
    compiled = calls(grammars, required=False, parallel=True)
    vocabulary = len(text.tokenizer)
    constraint = compiled.fresh()
    free = ids_of(constraint.step(), vocabulary)
    assert text.tokenizer.eos_token_id in free
    whole = [token for token in range(3, vocabulary) if "\ufffd" not in text.token(token)]  # no half characters
    assert set(whole) <= set(free)
    said = wander(
        text, compiled, 1, begin='I will go. <tool_call>\n{"name": "trip", "arguments": {"city": "O', limit=2000
    )
    plain, made = read(said.split("</tool_call>")[0] + "</tool_call>")
    assert plain == "I will go. "
    ((name, arguments),) = made
    assert (name, arguments["city"]) == ("trip", "Oslo")


def test_names_of_other_tools_cannot_be_called(text: Text, grammars: Grammars) -> None:
    constraint = calls(grammars, required=True, parallel=False).fresh()
    for token in text.encode('<tool_call>\n{"name": "', special=False):
        assert token in ids_of(constraint.step(), len(text.tokenizer))
        constraint.accept(token)
    assert {text.token(token)[0] for token in ids_of(constraint.step(), len(text.tokenizer))} == {"t", "s"}


def test_a_tool_with_a_bad_schema_is_refused(grammars: Grammars) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(grammars.tools([("f", {"type": "strong"})], required=True, parallel=True))
    assert (caught.value.status, caught.value.param) == (400, "tools")
