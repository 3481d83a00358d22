"""CAMEL agents talk, and act on an OASIS platform, through vLLM servers, every token captured for training.

    coterie serve &                                            a server on http://127.0.0.1:8000, or start vLLM
    python demo/camel_oasis_vllm_example.py                    uses it; looks there by default
    python demo/camel_oasis_vllm_example.py --url http://one:8000 --url http://two:8000

It runs as it is, whatever is missing, and says what it fell back to:

    CAMEL and a server     CAMEL agents on Coterie's model backend, and CAMEL's own models as a tier
    a server, no CAMEL     the same talk over plain HTTP
    no server              the engine inside this process, if the base model is on disk
    nothing at all         simulated answers, marked as such; nothing is ever trained on those

Then a small OASIS campaign, where OASIS is installed (`make oasis`, then .venv-oasis/bin/python demo/…):

    OASIS and a server     OASIS' own agents act by tool calls, which are captured
    OASIS, no server       the same users are seats of a training run on the engine inside this process
    OASIS, no base model   choices drawn at random, said to be so
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from coterie import CoterieError, MultiModelEnvironment, RunConfig, VLLMClient
from coterie.config import parse_config
from coterie.errors import BaseModelError
from coterie.inference.http import HttpControl
from coterie.inference.wire import server_spec
from coterie.lm.embedded import resolve_base
from coterie.monitor.tables import ResultTable, clean
from coterie.scenarios.base import build_scenario
from coterie.scenarios.oasis.loading import require
from coterie.scenarios.practice import PracticeTable
from coterie.types import Split

CAMPAIGN: dict[str, Any] = {
    "groups": [{"name": "red", "agents": 2}, {"name": "blue", "agents": 2}],
    "rounds": 3,
    "actions": ["like", "repost", "nothing"],
    "recommended": 4,
    "shown": 2,
    "weights": {"reach": 1.0, "reposts": 1.0},
}
"""Two camps of two on a social platform; each wants its posts seen and passed on, and there are more than places."""
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


def what_happened(metrics: Mapping[str, float]) -> str:
    """A row for each camp."""
    columns = ("camp", "posts", "reach of a post", "share of what was shown", "likes of a post")
    rows = [
        (camp, *(f"{metrics[f'{camp}_{what}']:.2f}" for what in ("posts", "reach", "views", "likes")))
        for camp in ("red", "blue")
    ]
    calls = (
        f"valid tool calls {metrics['valid_calls']:.0%}, carried out by the platform {metrics['accepted_calls']:.0%}"
    )
    return f"{ResultTable('', columns, tuple(rows)).plain()}\n{calls}"


async def agents_on_oasis(asked: argparse.Namespace, model: str) -> None:
    """OASIS' agents, each a CAMEL ChatAgent on Coterie's backend, act by tool calls."""
    from coterie.inference.camel import CoterieModelBackend
    from coterie.scenarios.adapters.oasis import simulate
    from coterie.scenarios.oasis.campaign import CampaignOptions

    config = {
        "tool_choice": "required",
        "parallel_tool_calls": False,  # one action a round
        "max_completion_tokens": 128,  # bound to a grammar, a model spells a call in more tokens than a tokenizer would
        "temperature": 1.0,
    }
    backends = {
        camp: CoterieModelBackend(model, config, servers=asked.url, tokenizer=asked.tokenizer, context=asked.context)
        for camp in ("red", "blue")
    }
    try:
        campaign = await simulate(CampaignOptions.model_validate(CAMPAIGN), backends)
        for camp, backend in backends.items():
            captured = backend.captured()
            tokens = sum(len(call.token_ids) for call in captured)
            print(f"  {camp}: {len(captured)} calls captured, {tokens} tokens with log-probabilities")
    finally:
        for backend in backends.values():
            await asyncio.to_thread(backend.close)
    for round_, worth in enumerate(campaign.history, 1):
        print(f"  round {round_}: " + ", ".join(f"reach of {camp} {value:.2f}" for camp, value in worth.items()))
    print(f"\n{what_happened(campaign.metrics())}")


async def seats_on_oasis(asked: argparse.Namespace) -> None:
    """Users of the platform are seats of a training run: one update of two adapters, on the base in this process."""
    base = asked.base or RunConfig().base.model
    resolve_base(base, allow_download=False, report=lambda line: None)
    groups = [{**group, "model": group["name"]} for group in CAMPAIGN["groups"]]
    config = parse_config({
        "mode": "team_battle",
        "base": {"model": base},
        "models": [{"model_id": camp, "team_id": camp} for camp in ("red", "blue")],
        "scenario": {"id": "oasis", "options": {**CAMPAIGN, "groups": groups}},
        "rollout": {"tasks_per_update": 1, "group_size": 4},
        "engine": {"calibration_tasks": 4},
    })  # fmt: skip
    env = MultiModelEnvironment(config=config)
    (record,) = await env.train_cycles(1)
    await env.aclose()
    print(what_happened({name.removeprefix("outcome/"): value for name, value in record.metrics.items()}))
    for camp, trained in env.models.items():
        print(f"{camp}: {trained.weight_updates} update of its adapter from what happened there")


async def anybody_on_oasis() -> None:
    """The platform without any model."""
    scenario = build_scenario("oasis", CAMPAIGN)
    task = next(iter(scenario.tasks(Split.HELDOUT, 0)))
    outcome = await scenario.play(task, PracticeTable(task, scenario.seats(task)))
    print(what_happened(outcome.metrics))


async def oasis(asked: argparse.Namespace, model: str | None, number: int) -> None:
    """The campaign, by whoever there is to act."""
    try:
        require()
    except CoterieError as error:
        _heading(number, "No OASIS campaign")
        print(clean(str(error), lines=False))
        return
    if model is not None:
        _heading(number, "OASIS agents on Coterie's backend")
        await agents_on_oasis(asked, model)
        return
    _heading(number, "OASIS users as seats of a training run")
    try:
        await seats_on_oasis(asked)
    except BaseModelError as error:
        print(f"no base model ({clean(str(error), lines=False)}): choices are SIMULATED, drawn at random")
        await anybody_on_oasis()


def _heading(number: int, text: str) -> None:
    text = f"{number}. {text}"
    print(f"\n{text}\n{'=' * len(text)}")


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
        await oasis(asked, asked.model or model, 4)
        return
    fallen = "the next best tier, without CAMEL agents" if model else "what this process can do by itself"
    _heading(2, f"Fallen back to {fallen}")
    await with_client(asked, asked.url if model is not None else [])
    await oasis(asked, (asked.model or model) if camel else None, 3)
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
