"""Adapters over HTTP: vLLM's words and codes, nothing from outside the allowed directories, nothing freed in use."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from coterie.serve.settings import ServeSettings
from tests.support.serving import Client, Reply, talk, until
from tests.support.token_engine import MemoryTokenEngine, write_adapter


@pytest.fixture
def engine(tiny_path: Path) -> MemoryTokenEngine:
    return MemoryTokenEngine(AutoTokenizer.from_pretrained(tiny_path))


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    path = tmp_path / "allowed"
    path.mkdir()
    return path


@pytest.fixture
def settings(allowed: Path) -> ServeSettings:
    return ServeSettings(model="base", adapter_dirs=(allowed,), max_lora_rank=16, max_adapters=3)


async def load(client: Client, name: str, path: Path | str, **more: Any) -> Reply:
    return await client.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)


async def unload(client: Client, name: str) -> Reply:
    return await client.post("/v1/unload_lora_adapter", lora_name=name)


def error(reply: Reply, status: int, kind: str) -> str:
    assert (reply.status, reply.json["error"]["type"]) == (status, kind), reply.text
    return reply.message


def test_adapters_come_and_go_and_change_answers(
    engine: MemoryTokenEngine, settings: ServeSettings, allowed: Path
) -> None:
    one, two = (write_adapter(allowed / name, name) for name in ("one", "two"))

    async def ask(client: Client) -> None:
        said = {"base": (await client.complete(seed=1, max_tokens=20)).choice["text"]}
        for name, path in (("a@v1", one), ("a@v2", two)):
            reply = await load(client, name, path)
            assert (reply.status, reply.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
            answer = await client.complete(seed=1, max_tokens=20, model=name)
            assert answer.json["model"] == name
            said[name] = answer.choice["text"]
        assert len(set(said.values())) == 3
        assert said["base"] == (await client.complete(seed=1, max_tokens=20)).choice["text"]
        cards = (await client.get("/v1/models")).json["data"]
        assert [(card["id"], card["parent"], card["root"]) for card in cards] == [
            ("base", None, ""), ("a@v1", "base", str(one)), ("a@v2", "base", str(two)),
        ]  # fmt: skip
        assert cards[0]["max_model_len"] == 2048
        reply = await unload(client, "a@v1")
        assert (reply.status, reply.text) == (200, "Success: LoRA adapter 'a@v1' removed successfully.")
        error(await client.complete(model="a@v1"), 404, "NotFoundError")
        await until(lambda: len(engine.unloaded) == 1, "its weights are freed")
        assert (await client.chat(model="a@v2", max_tokens=1)).status == 200

    talk(engine, ask, settings)


def test_refusals_have_vllms_words_and_codes(engine: MemoryTokenEngine, settings: ServeSettings, allowed: Path) -> None:
    good = write_adapter(allowed / "good", "x")
    odd = write_adapter(allowed / "odd", "x", kind="LOHA")
    large = write_adapter(allowed / "large", "x", rank=17)
    pickled = write_adapter(allowed / "pickled", "x")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    damaged = write_adapter(allowed / "damaged", "x")
    (damaged / "adapter_config.json").write_text("{")
    none = write_adapter(allowed / "none", "x", rank=0)
    (allowed / "empty").mkdir()

    async def ask(client: Client) -> None:
        assert (await load(client, "a", good)).status == 200
        invalid = "InvalidUserInput"
        assert error(await load(client, "a", good), 400, invalid) == (
            "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
        assert error(await load(client, "base", good), 400, invalid) == (
            "The lora adapter 'base' conflicts with a served base model."
        )
        assert error(await load(client, "", good), 400, invalid) == "Both 'lora_name' and 'lora_path' must be provided."
        assert "lora_path" in error(await client.post("/v1/load_lora_adapter", lora_name="b"), 400, "BadRequestError")
        for path in (allowed / "nothing", allowed / "empty"):
            assert error(await load(client, "b", path), 404, "NotFoundError") == (
                f"Loading lora b failed: No adapter found for {path}"
            )
        assert error(await load(client, "b", large), 500, "InternalServerError") == (
            "LoRA rank 17 is greater than max_lora_rank 16."
        )
        assert "at least 1" in error(await load(client, "b", none), 500, "InternalServerError")
        assert "only plain LoRA" in error(await load(client, "b", odd), 500, "InternalServerError")
        assert "cannot be read" in error(await load(client, "b", damaged), 500, "InternalServerError")
        assert "safetensors" in error(await load(client, "b", pickled), 400, invalid)
        assert error(await unload(client, "b"), 404, "NotFoundError") == "The lora adapter 'b' cannot be found."
        assert "needs to be provided" in error(await unload(client, ""), 400, invalid)
        assert [one.name for one in client.service.adapters.loaded] == ["a"]
        for name in ("b", "c"):
            assert (await load(client, name, good)).status == 200
        assert "3 adapters are loaded" in error(await load(client, "d", good), 400, invalid)
        assert (await load(client, "c", good, load_inplace=True)).status == 200

    talk(engine, ask, settings)


def test_a_name_loaded_again_in_place_answers_anew(
    engine: MemoryTokenEngine, settings: ServeSettings, allowed: Path
) -> None:
    path = write_adapter(allowed / "a", "old")

    async def ask(client: Client) -> None:
        await load(client, "a", path)
        before = (await client.complete(model="a", seed=1, max_tokens=20)).choice["text"]
        (path / "adapter_model.safetensors").write_text("new")
        assert (await load(client, "a", path, load_inplace=True)).status == 200
        after = (await client.complete(model="a", seed=1, max_tokens=20)).choice["text"]
        assert before != after
        first, second = (request.adapter for request in engine.requests)
        assert first != second  # another version: no cache of the old one can answer
        await until(lambda: engine.unloaded == [first], "the old one is freed")

    talk(engine, ask, settings)


def test_an_adapter_in_use_is_kept_until_its_last_answer(
    engine: MemoryTokenEngine, settings: ServeSettings, allowed: Path
) -> None:
    path = write_adapter(allowed / "a", "x")
    engine.delay_s = 0.005

    async def ask(client: Client) -> None:
        await load(client, "a", path)
        whole = (await client.complete(model="a", seed=4, max_tokens=60, ignore_eos=True)).choice["text"]
        answers = [
            asyncio.ensure_future(client.complete(model="a", seed=4, max_tokens=60, ignore_eos=True)) for _ in range(2)
        ]
        await until(lambda: engine.running == 2, "two answers under way")
        assert (await unload(client, "a")).status == 200
        error(await client.complete(model="a"), 404, "NotFoundError")
        await load(client, "a", path)
        assert engine.unloaded == []
        for answer in await asyncio.gather(*answers):
            assert answer.choice["text"] == whole
        await until(lambda: len(engine.unloaded) == 1, "the old one is freed")
        assert (await client.complete(model="a", max_tokens=1)).status == 200

    talk(engine, ask, settings)


def test_nothing_is_loaded_from_outside(engine: MemoryTokenEngine, settings: ServeSettings, allowed: Path) -> None:
    outside = write_adapter(allowed.parent / "outside", "secret")
    beside = write_adapter(allowed.parent / "allowed-not", "secret")
    (allowed / "link").symlink_to(outside)
    half = allowed / "half"
    half.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.symlink(outside / name, half / name)
    (allowed / "loop").symlink_to(allowed / "loop")

    async def ask(client: Client) -> None:
        paths = (
            outside, beside, allowed / ".." / "outside", allowed / "link", half, "/", "outside", "/nonexistent/at/all",
            f"{allowed}/../nothing-here",
        )  # fmt: skip
        said = {error(await load(client, "a", path), 400, "InvalidUserInput") for path in paths}
        # one sentence for all: what exists elsewhere is nobody's business
        assert len(said) == 1
        assert "outside the directories" in said.pop()
        for path in ("a\0b", allowed / "loop"):
            assert (await load(client, "a", path)).status in (400, 404)
        assert engine.adapters == {}
        # a link that stays inside is as good as what it points to
        inside = write_adapter(allowed / "inside", "x")
        (allowed / "alias").symlink_to(inside)
        assert (await load(client, "a", allowed / "alias")).status == 200

    talk(engine, ask, settings)


def test_without_directories_nothing_is_loaded_over_http(engine: MemoryTokenEngine, allowed: Path) -> None:
    path = write_adapter(allowed / "a", "x")
    reply = talk(engine, lambda client: load(client, "a", path))
    assert "--adapter-dir" in error(reply, 400, "InvalidUserInput")


def test_loads_of_one_name_at_once_make_one_adapter(
    engine: MemoryTokenEngine, settings: ServeSettings, allowed: Path
) -> None:
    path = write_adapter(allowed / "a", "x")
    engine.delay_s = 0.01

    async def ask(client: Client) -> list[int]:
        return [reply.status for reply in await asyncio.gather(*(load(client, "a", path) for _ in range(4)))]

    assert sorted(talk(engine, ask, settings)) == [200, 400, 400, 400]
    assert len(engine.adapters) == 1
