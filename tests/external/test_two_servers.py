"""Two real vLLMs as one pool: kill -9 of one costs no answer, and it is used again once it is back."""

from __future__ import annotations

import asyncio
from collections import Counter

from coterie.inference.calls import CallRecord
from coterie.inference.client import VLLMClient
from tests.external.conftest import SERVED
from tests.external.processes import ServerProcess


class Records:
    """Every attempt."""

    def __init__(self) -> None:
        self.all: list[CallRecord] = []

    def call(self, record: CallRecord) -> None:
        self.all.append(record)

    def answers(self) -> Counter[str]:
        return Counter(record.server for record in self.all if record.outcome == "ok")


def test_a_killed_server_costs_no_answer_and_comes_back(vllm_pair: list[ServerProcess]) -> None:
    dying, staying = vllm_pair
    records = Records()

    async def ask(client: VLLMClient, count: int) -> list[str]:
        questions = [f"Say the number {number}." for number in range(count)]
        return list(await asyncio.gather(*(client.generate(q, max_tokens=6, temperature=0.0) for q in questions)))

    async def play() -> None:
        urls = [dying.url, staying.url]
        async with VLLMClient(
            urls, SERVED, tiers=("http",), timeout_s=240, calls=records, policy="round_robin"
        ) as client:
            calm = await ask(client, 12)
            assert set(records.answers()) == {dying.spec.name, staying.spec.name}

            records.all.clear()
            asking = asyncio.create_task(ask(client, 12))
            await asyncio.sleep(0.3)
            dying.kill()
            assert await asking == calm
            assert sum(records.answers().values()) == 12
            assert any(r.server == dying.spec.name and r.outcome == "fallback" for r in records.all)

            dying.start()
            await asyncio.to_thread(dying.wait_until_up)
            for _ in range(60):
                records.all.clear()
                await ask(client, 4)
                if records.answers()[dying.spec.name]:
                    return
                await asyncio.sleep(1)
            raise AssertionError("the server that came back was not used again")

    # the time a vLLM takes to start is in there
    async def patient() -> None:
        async with asyncio.timeout(600):
            await play()

    asyncio.run(patient())
