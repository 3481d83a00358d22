"""LiteLLM's Router doing the calls of `pool.py`; run by the interpreter of LiteLLM's own environment.

Reads one JSON object from standard input; writes {"half": true} when half of the calls are answered, and then the
fields of `pool_systems.Outcome`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from litellm import Router


async def main(given: dict[str, Any]) -> None:
    router = Router(
        model_list=[
            {
                "model_name": "pool",
                "litellm_params": {"model": f"hosted_vllm/{given['model']}", "api_base": url, "api_key": "none"},
            }
            for url in given["urls"]
        ],
        routing_strategy=given["strategy"],
        num_retries=given["attempts"] - 1,
        timeout=given["timeout_s"],
    )
    places = asyncio.Semaphore(given["at_once"])
    latencies: list[float] = []
    lost = 0

    async def one(number: int, tokens: int) -> None:
        messages = [{"role": "user", "content": f"call {number}"}]
        await router.acompletion("pool", messages, max_tokens=tokens, extra_body={"ignore_eos": True})

    async def call(number: int, tokens: int) -> None:
        nonlocal lost
        async with places:
            began = time.perf_counter()
            # whatever the router gives up on is asked again, as for every other way; its errors have no common root
            for attempt in range(given["attempts"]):
                try:
                    await one(number, tokens)
                except Exception as error:  # noqa: BLE001
                    print(f"call {number}: {error}"[:300], file=sys.stderr)
                    await asyncio.sleep(0.05 * 2**attempt)
                else:
                    latencies.append(time.perf_counter() - began)
                    break
            else:
                lost += 1
        if len(latencies) == len(given["tokens"]) // 2:
            print(json.dumps({"half": True}), flush=True)

    for _ in range(given["warm_up"]):
        await one(-1, 1)
    began = time.perf_counter()
    await asyncio.gather(*(call(number, tokens) for number, tokens in enumerate(given["tokens"])))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "latencies": latencies, "lost": lost}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
