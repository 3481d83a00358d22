"""Calls to one server through one client, and the CPU time they cost this process; run by ../client_cost.py.

Over standard input and output, one JSON object a line:

    {"client": "openai", "url": ..., "model": ..., "prompt": [ids], "text": ..., "max_tokens": n}
                                            <-  {"versions": {...}}
    {"calls": 512, "concurrency": 64}       <-  {"cpu_s": ..., "seconds": ..., "calls": 512}

Only the standard library is imported at the top: this file runs in the environment of every client. To add a client,
write a function like those below and put it into `CLIENTS`, then into the table of client_cost.py. Every client must
read what a learner needs from each answer, ids and log-probabilities; `check` counts them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

Spec = Mapping[str, Any]
Ask = Callable[[int], Awaitable[tuple[list[int], list[int], list[float]]]]
"""seed -> (prompt ids, token ids, log-probability of each)"""

EXTRA = {"return_token_ids": True, "return_tokens_as_token_ids": True, "top_k": -1}


@asynccontextmanager
async def coterie_tier(spec: Spec, chat: bool = False, camel: bool = False) -> AsyncIterator[Ask]:
    """Our HTTP tier, aiohttp underneath, or our CAMEL tier: a model object of CAMEL's for every call."""
    from coterie.inference.wire import WireRequest, server_spec

    transport: Any
    if camel:
        from coterie.inference.camel import CamelTransport

        transport = CamelTransport()
    else:
        from coterie.inference.http import HttpTransport

        transport = HttpTransport()
    server = server_spec(spec["url"])
    prompt: dict[str, Any] = (
        {"messages": ({"role": "user", "content": spec["text"]},)} if chat else {"prompt_ids": tuple(spec["prompt"])}
    )

    async def ask(seed: int) -> tuple[Any, Any, Any]:
        request = WireRequest(spec["model"], max_tokens=spec["max_tokens"], seed=seed, **prompt)
        reply = await transport.call(server, request, 60)
        return reply.prompt_ids, reply.token_ids, reply.logprobs

    yield ask
    await transport.close()


@asynccontextmanager
async def aiohttp_alone(spec: Spec) -> AsyncIterator[Ask]:
    """The library our HTTP tier uses, and nothing around it: what no client on it can go below."""
    import aiohttp

    body = {"model": spec["model"], "prompt": spec["prompt"], "max_tokens": spec["max_tokens"], "logprobs": 0, **EXTRA}
    connector = aiohttp.TCPConnector(limit=0, limit_per_host=256)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def ask(seed: int) -> tuple[Any, Any, Any]:
            async with session.post(spec["url"] + "/completions", json={**body, "seed": seed}) as response:
                choice = (await response.json())["choices"][0]
            return choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]["token_logprobs"]

        yield ask


@asynccontextmanager
async def openai_package(spec: Spec, chat: bool = False) -> AsyncIterator[Ask]:
    """The openai package as it comes, httpx underneath."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=spec["url"], api_key="none", max_retries=0, timeout=60) as client:

        async def complete(seed: int) -> tuple[Any, Any, Any]:
            answer = await client.completions.create(
                model=spec["model"], prompt=spec["prompt"], max_tokens=spec["max_tokens"], temperature=1.0, top_p=1.0,
                seed=seed, logprobs=0, extra_body=EXTRA,
            )  # fmt: skip
            choice: Any = answer.choices[0]
            return choice.prompt_token_ids, choice.token_ids, choice.logprobs.token_logprobs

        async def converse(seed: int) -> tuple[Any, Any, Any]:
            answer: Any = await client.chat.completions.create(
                model=spec["model"], messages=[{"role": "user", "content": spec["text"]}], temperature=1.0, top_p=1.0,
                max_tokens=spec["max_tokens"], seed=seed, logprobs=True, extra_body=EXTRA,
            )  # fmt: skip
            choice = answer.choices[0]
            return answer.prompt_token_ids, choice.token_ids, [entry.logprob for entry in choice.logprobs.content]

        yield converse if chat else complete


@asynccontextmanager
async def camel_model(spec: Spec) -> AsyncIterator[Ask]:
    """A model of CAMEL's for vLLM as it comes, the openai package underneath."""
    from camel.models import ModelFactory
    from camel.types import ModelPlatformType

    from coterie.inference.camel import CoterieTokenCounter
    from coterie.inference.counting import ByteCounter

    settings = {
        "temperature": 1.0, "top_p": 1.0, "max_tokens": spec["max_tokens"], "logprobs": True, "extra_body": EXTRA,
    }  # fmt: skip
    model = ModelFactory.create(
        model_platform=ModelPlatformType.VLLM, model_type=spec["model"], model_config_dict=settings, api_key="none",
        token_counter=CoterieTokenCounter(ByteCounter()), url=spec["url"], max_retries=0, timeout=60,
    )  # fmt: skip

    async def ask(seed: int) -> tuple[Any, Any, Any]:
        answer: Any = await model.arun([{"role": "user", "content": spec["text"]}])
        choice = answer.choices[0]
        return answer.prompt_token_ids, choice.token_ids, [entry.logprob for entry in choice.logprobs.content]

    yield ask


CLIENTS: dict[str, Callable[[Spec], Any]] = {
    "coterie": coterie_tier,
    "coterie-chat": lambda spec: coterie_tier(spec, chat=True),
    "coterie-camel": lambda spec: coterie_tier(spec, chat=True, camel=True),
    "camel": camel_model,
    "aiohttp": aiohttp_alone,
    "openai": openai_package,
    "openai-chat": lambda spec: openai_package(spec, chat=True),
}
PACKAGES = ("coterie", "aiohttp", "openai", "httpx", "camel-ai")


def check(answer: tuple[list[int], list[int], list[float]], spec: Spec) -> None:
    prompt, tokens, logprobs = answer
    if not prompt or not 1 <= len(tokens) == len(logprobs) <= spec["max_tokens"]:
        raise ValueError(f"an answer of {len(tokens)} tokens and {len(logprobs)} log-probabilities")


async def measured(ask: Ask, spec: Spec, calls: int, concurrency: int) -> dict[str, Any]:
    """`concurrency` workers make `calls` calls between them."""
    seeds = iter(range(calls))

    async def worker() -> None:
        for seed in seeds:
            check(await ask(seed), spec)

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return {"cpu_s": time.process_time() - cpu, "seconds": time.perf_counter() - started, "calls": calls}


async def main() -> None:
    def installed() -> dict[str, str]:
        found = {"python": sys.version.split()[0]}
        for package in PACKAGES:
            try:
                found[package] = version(package)
            except ModuleNotFoundError:
                continue
        return found

    spec = json.loads(sys.stdin.readline())
    async with CLIENTS[spec["client"]](spec) as ask:
        print(json.dumps({"versions": installed()}), flush=True)
        # between repetitions only the answer to the benchmark is awaited: nothing runs in this loop meanwhile
        while line := sys.stdin.readline():
            asked = json.loads(line)
            print(json.dumps(await measured(ask, spec, asked["calls"], asked["concurrency"])), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
