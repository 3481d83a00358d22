"""The openai package and curl against `coterie serve` in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from coterie.inference.local.engine import LocalEngine
from coterie.lm.adapters import save_adapter
from coterie.lm.base import BaseModel
from coterie.types import AdapterVersion, GenerateRequest, Observation
from tests.external.conftest import SERVED
from tests.external.processes import ServerProcess

pytestmark = pytest.mark.openai

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(coterie_serve: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=coterie_serve.url, api_key="secret", max_retries=0, timeout=120) as made:
        yield made


def test_it_lists_the_base(client: openai.OpenAI) -> None:
    (model,) = [model for model in client.models.list().data if model.id == SERVED]
    assert model.object == "model"


def test_a_chat_is_answered_as_the_engine_in_this_process_would(
    client: openai.OpenAI, base_model: BaseModel, oracle: LocalEngine
) -> None:
    import asyncio

    answer = client.chat.completions.create(
        model=SERVED,
        messages=QUESTION,
        max_tokens=12,
        temperature=0,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    request = GenerateRequest(
        prompt_ids=base_model.chat.render(Observation(user=QUESTION[0]["content"])),
        adapter=None,
        seed=0,
        max_tokens=12,
        temperature=0.0,
        stop_ids=base_model.chat.stop_ids,
    )
    expected = asyncio.run(oracle.generate(request))
    choice = answer.choices[0]
    assert tuple(choice.token_ids) == expected.token_ids
    assert tuple(answer.prompt_token_ids) == expected.prompt_ids
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-3)
    assert choice.message.content == base_model.chat.decode(expected.token_ids)
    assert "Paris" in choice.message.content
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    ask = {"model": SERVED, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(pieces) == whole
    assert len(pieces) > 2


def test_completions_n_stop_seed_and_logit_bias(client: openai.OpenAI) -> None:
    ask = {"model": SERVED, "prompt": "One, two, three,", "max_tokens": 8}
    greedy = client.completions.create(**ask, temperature=0).choices[0]
    assert "four" in greedy.text
    stopped = client.completions.create(**ask, temperature=0, stop=[" five"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert " five" not in stopped.text
    several = client.completions.create(**ask, temperature=1, n=3, seed=1).choices
    again = client.completions.create(**ask, temperature=1, n=3, seed=1).choices
    assert [c.text for c in several] == [c.text for c in again]
    assert len({c.text for c in several}) > 1
    first = client.completions.create(**{**ask, "max_tokens": 1}, temperature=0, logit_bias={"260": 100})
    assert first.choices[0].text == " the"


def test_structured_output_and_tools_follow_their_grammar(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=SERVED,
        messages=QUESTION,
        max_tokens=60,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    data = json.loads(answer.choices[0].message.content)
    assert data["city"] in ("Paris", "Rome")
    assert isinstance(data["sure"], bool)
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Paris", "Rome"]}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    }
    called = client.chat.completions.create(
        model=SERVED, messages=QUESTION, max_tokens=80, seed=3, tools=[tool], tool_choice="required"
    )
    (call, *_) = called.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["place"] in ("Paris", "Rome")


def test_an_adapter_is_loaded_and_asked_by_name(
    client: openai.OpenAI, coterie_serve: ServerProcess, base_model: BaseModel, trained: dict[AdapterVersion, Path]
) -> None:
    version = AdapterVersion("trained_1", 1)
    directory = coterie_serve.folder / "by-hand"
    if not directory.exists():
        save_adapter(base_model.bank.training(version.model_id), directory, base_model, version)
    loaded = client.post("/load_lora_adapter", body={"lora_name": "tuned", "lora_path": str(directory)}, cast_to=str)
    assert "tuned" in loaded
    assert "tuned" in [model.id for model in client.models.list().data]
    ask = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, "logprobs": True}
    base, tuned = (client.chat.completions.create(model=name, **ask) for name in (SERVED, "tuned"))
    assert base.choices[0].logprobs.content[0].logprob != tuned.choices[0].logprobs.content[0].logprob


def test_errors_are_the_packages_own(client: openai.OpenAI, coterie_serve: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=SERVED, messages=QUESTION, temperature=-1)
    with (
        openai.OpenAI(base_url=coterie_serve.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.chat.completions.create(model=SERVED, messages=QUESTION)


def test_curl_gets_an_answer(coterie_serve: ServerProcess) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": SERVED, "messages": QUESTION, "max_tokens": 12, "temperature": 0})
    command = [curl, "-s", f"{coterie_serve.url}/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-H", "Authorization: Bearer secret", "-d", body], capture_output=True, timeout=120, check=True
    )
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]
