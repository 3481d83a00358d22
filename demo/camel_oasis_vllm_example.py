"""Two CAMEL agents talk through vLLM servers, every token they say captured for training; with less, what there is.

    coterie serve &                                            a server on http://127.0.0.1:8000, or start vLLM
    python demo/camel_oasis_vllm_example.py                    uses it; looks there by default
    python demo/camel_oasis_vllm_example.py --url http://one:8000 --url http://two:8000

It runs as it is, whatever is missing, and says what it fell back to:

    CAMEL and a server     CAMEL agents on Coterie's model backend, and CAMEL's own models as a tier
    a server, no CAMEL     the same talk over plain HTTP
    no server              the engine inside this process, if the base model is on disk
    nothing at all         simulated answers, marked as such; nothing is ever trained on those
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from coterie import CoterieError, VLLMClient
from coterie.inference.http import HttpControl
from coterie.inference.wire import server_spec
from coterie.monitor.tables import ResultTable, clean

TASK = "Plan a picnic for three people in one sentence."
PERSONAS = {
    "planner": "You plan things. Answer in one short sentence.",
    "critic": "You improve plans. Answer in one short sentence.",
}


@dataclass
class Said:
    """What the calls of one speaker amounted to."""

    tier: str = "-"
    server: str = "-"
    answers: int = 0
    tokens: int = 0
    logprobs: list[float] = field(default_factory=list)


class Speaker(Protocol):
    """One side of the talk."""

    said: Said

    async def say(self, heard: str) -> str: ...


class AgentSpeaker:
    """A CAMEL `ChatAgent` on Coterie's backend."""

    def __init__(self, persona: str, backend: Any) -> None:
        from camel.agents import ChatAgent

        self.said = Said(tier="camel agent")
        self._backend = backend
        self._agent = ChatAgent(persona, model=backend)

    async def say(self, heard: str) -> str:
        response = await self._agent.astep(heard)
        for call in self._backend.captured():
            self.said.server = call.reply.server
            self.said.answers += 1
            self.said.tokens += len(call.token_ids)
            self.said.logprobs += call.logprobs
        return response.msgs[0].content if response.msgs else ""


class ClientSpeaker:
    """A `VLLMClient`, whatever tier answers."""

    def __init__(self, persona: str, client: VLLMClient, max_tokens: int) -> None:
        self.said = Said()
        self._client, self._max_tokens = client, max_tokens
        self._messages = [{"role": "system", "content": persona}]

    async def say(self, heard: str) -> str:
        self._messages.append({"role": "user", "content": heard})
        answer = await self._client.generate(
            self._messages, max_tokens=self._max_tokens, temperature=0.7, return_tokens=True
        )
        self._messages.append({"role": "assistant", "content": answer.text})
        self.said.tier, self.said.server = str(answer.tier), answer.server or "this process"
        self.said.answers += 1
        self.said.tokens += len(answer.token_ids or ())
        self.said.logprobs += answer.logprobs or ()
        return answer.text


async def talk(speakers: dict[str, Speaker], turns: int) -> None:
    """The speakers in turn, each hearing what was said last."""
    heard = TASK
    print(f"task: {TASK}\n")
    for turn in range(turns):
        for name, speaker in speakers.items():
            answer = clean((await speaker.say(heard)).strip() or "(nothing)", lines=False)
            print(f"  {name}: {answer}", flush=True)
            heard = f"The other said: {answer}\nNow you, about the task: {TASK}"
        if turn + 1 < turns:
            print()


def what_was_captured(speakers: dict[str, Speaker]) -> str:
    """A row for each speaker."""
    rows = []
    for name, speaker in speakers.items():
        said = speaker.said
        mean = f"{sum(said.logprobs) / len(said.logprobs):.2f}" if said.logprobs else None
        rows.append((name, said.tier, said.server, said.answers, said.tokens, mean))
    columns = ("speaker", "tier", "server", "answers", "tokens captured", "mean log-probability")
    return ResultTable("", columns, tuple(rows)).plain()


async def first_model(urls: Sequence[str]) -> str | None:
    """What the first server that answers calls its base; None: none answers."""
    control = HttpControl(timeout_s=5.0)
    try:
        for url in urls:
            try:
                return (await control.models(server_spec(url)))[0]
            except (CoterieError, IndexError) as error:
                print(f"  no server at {url}: {clean(str(error), lines=False)}")
        return None
    finally:
        await control.close()


async def with_agents(asked: argparse.Namespace, model: str) -> None:
    """Everything there is: CAMEL agents whose answers are captured, routed over all servers."""
    from coterie.inference.camel import CoterieModelBackend

    config = {"max_completion_tokens": asked.max_tokens, "temperature": 0.7}
    backends = [
        CoterieModelBackend(model, config, servers=asked.url, tokenizer=asked.tokenizer, context=asked.context)
        for _ in PERSONAS
    ]
    try:
        pairs = zip(PERSONAS.items(), backends, strict=True)
        speakers: dict[str, Speaker] = {name: AgentSpeaker(persona, backend) for (name, persona), backend in pairs}
        await talk(speakers, asked.turns)
        print(f"\n{what_was_captured(speakers)}")
    finally:
        for backend in backends:
            await asyncio.to_thread(backend.close)


async def with_client(asked: argparse.Namespace, urls: list[str]) -> None:
    """The best tier there is, found by `VLLMClient`, which says why the better ones are out."""
    async with VLLMClient(urls or None, base=asked.base) as client:
        print("\ntiers, best first:")
        for status in client.status():
            print(f"  {status.tier}: {'up' if status.up else clean(status.why, lines=False)}")
        print(f"in use: {client.tier}\n")
        speakers: dict[str, Speaker] = {
            name: ClientSpeaker(persona, client, asked.max_tokens) for name, persona in PERSONAS.items()
        }
        await talk(speakers, asked.turns)
        print(f"\n{what_was_captured(speakers)}")


async def play(asked: argparse.Namespace) -> None:
    print("1. What is there\n================")
    camel = find_spec("camel") is not None
    print("  CAMEL is installed" if camel else "  CAMEL is not installed; pip install 'coterie[camel]'")
    model = await first_model(asked.url)
    if model is not None:
        print(f"  a server, which serves {model}")
    if camel and model is not None:
        print("\n2. CAMEL agents on Coterie's backend\n====================================")
        await with_agents(asked, asked.model or model)
        print("\n3. CAMEL's own models as a tier of VLLMClient\n=============================================")
        await with_client(asked, asked.url)
        return
    fallen = "the next best tier, without CAMEL agents" if model else "what this process can do by itself"
    heading = f"2. Fallen back to {fallen}"
    print(f"\n{heading}\n{'=' * len(heading)}")
    await with_client(asked, asked.url if model is not None else [])
    if model is None:
        print("\nTo have servers answer: coterie serve & python demo/camel_oasis_vllm_example.py")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Two agents talk through CAMEL and vLLM, or what there is of it.")
    parser.add_argument("--url", action="append", help="server, may be repeated (http://127.0.0.1:8000)")
    parser.add_argument("--model", help="served name to ask for (the servers' own)")
    parser.add_argument("--tokenizer", help="of the served model: an embedded model's name or a directory")
    parser.add_argument("--base", help="model of the in-process engine (the embedded one, if it is on disk)")
    parser.add_argument("--context", type=int, default=2048, help="tokens the servers take (2048)")
    parser.add_argument("--turns", type=int, default=2, help="rounds of the talk (2)")
    parser.add_argument("--max-tokens", type=int, default=40, help="of an answer (40)")
    asked = parser.parse_args(given)
    asked.url = asked.url or ["http://127.0.0.1:8000"]
    return asked


def main(given: Sequence[str] | None = None) -> int:
    logging.getLogger("camel").setLevel(logging.ERROR)
    asyncio.run(play(arguments(given)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CoterieError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)
