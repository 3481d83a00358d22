"""/metrics under vLLM's names: what routers read is there, and counts what happened."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from coterie.serve.settings import ServeSettings
from tests.support.serving import Client, talk, until
from tests.support.token_engine import MemoryTokenEngine, write_adapter


@pytest.fixture
def engine(tiny_path: Path) -> MemoryTokenEngine:
    return MemoryTokenEngine(AutoTokenizer.from_pretrained(tiny_path))


async def samples(client: Client) -> dict[str, float]:
    """Value by sample name; a finish reason is put behind it."""
    reply = await client.get("/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            if "le" in sample.labels:
                continue
            if family.name != "vllm:lora_requests_info":
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("base", "0")
            reason = sample.labels.get("finished_reason")
            found[sample.name + (f"/{reason}" if reason else "")] = sample.value
    return found


def test_what_happened_is_counted(engine: MemoryTokenEngine) -> None:
    async def ask(client: Client) -> None:
        before = await samples(client)
        assert before["vllm:generation_tokens_total"] == 0
        engine.says("red", end=False)
        await client.complete([20, 21, 22], n=2, max_tokens=5)
        engine.says("red")
        await client.chat(stream=True)
        now = await samples(client)
        chat = len(engine.requests[-1].prompt_ids)
        assert now["vllm:generation_tokens_total"] == 5 + 5 + 2
        assert now["vllm:prompt_tokens_total"] == 3 + 3 + chat
        assert now["vllm:request_success_total/length"] == 2
        assert now["vllm:request_success_total/stop"] == 1
        assert now["vllm:time_to_first_token_seconds_count"] == 3
        assert now["vllm:inter_token_latency_seconds_count"] == 4 + 4 + 1
        assert now["vllm:e2e_request_latency_seconds_count"] == 3
        assert now["vllm:e2e_request_latency_seconds_sum"] > now["vllm:time_to_first_token_seconds_sum"] > 0
        assert now["vllm:request_params_n_sum"] == 3
        assert now["vllm:kv_cache_usage_perc"] == 0.25
        assert (now["vllm:prefix_cache_queries_total"], now["vllm:prefix_cache_hits_total"]) == (100, 40)
        assert (now["vllm:num_requests_running"], now["vllm:num_requests_waiting"]) == (0, 0)

    talk(engine, ask)


def test_what_is_under_way_is_seen(engine: MemoryTokenEngine, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", "x")
    engine.says("red", end=False)

    async def ask(client: Client) -> None:
        await client.post("/v1/load_lora_adapter", lora_name="a", lora_path=str(path))
        engine.delay_s = 30
        waiting = asyncio.ensure_future(client.complete(n=2, model="a"))
        await until(lambda: engine.running == 2, "two answers wait")
        engine.delay_s = 0.01
        running = asyncio.ensure_future(client.complete(max_tokens=500))
        await until(lambda: client.service.metrics.in_flight == 3, "one more runs")
        await asyncio.sleep(0.1)
        now = await samples(client)
        assert (now["vllm:num_requests_running"], now["vllm:num_requests_waiting"]) == (1, 2)
        text = (await client.get("/metrics")).text
        assert 'vllm:lora_requests_info{max_lora="64",running_lora_adapters="",waiting_lora_adapters="a"}' in text
        for task in (waiting, running):
            task.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)
        await until(lambda: client.service.metrics.in_flight == 0, "nothing is left")
        assert (await samples(client))["vllm:request_success_total/abort"] == 3

    talk(engine, ask, ServeSettings(model="base", adapter_dirs=(tmp_path,)))


def test_servers_of_one_process_count_apart(engine: MemoryTokenEngine) -> None:
    assert talk(engine, lambda client: client.complete()).status == 200
    assert talk(engine, samples)["vllm:prompt_tokens_total"] == 0
