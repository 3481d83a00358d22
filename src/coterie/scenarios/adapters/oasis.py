"""An OASIS social simulation in which the users' decisions are turns of the models in training.

    episode = one whole simulation: `rounds` rounds on a platform of its own
    turn    = what one agent does in one round: one choice among the tool calls the platform would accept
    score   = what came of the agent's and its group's posts, by the platform's tables (`scenarios/oasis/campaign.py`)

OASIS (Yang et al. 2024, arXiv 2411.11581) is the package camel-oasis 0.2.5, in an environment of its own: `make oasis`.
Two ways of acting, chosen by `acting`, make the same choices of the same prompts:

    told   what a seat chose is a ManualAction of OasisEnv.step. The default: no agent objects, no tool schemas, and an
           episode costs little more than its turns.
    chat   every agent is OASIS' SocialAgent, a CAMEL ChatAgent; its model is a CAMEL backend that takes the seat's
           turn, and the choice comes back as a tool call that the agent executes.

Either way tokens go in and out as everywhere in Coterie, so every engine serves it and every turn trains. Whole prompts
and tool calls of CAMEL's own making, from servers, need no table: see `simulate`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, cycle, islice
from typing import Any, Literal

from pydantic import Field

from coterie.errors import ScenarioError
from coterie.scenarios.asking import chosen
from coterie.scenarios.base import Script, Table, at_random
from coterie.scenarios.oasis.actions import TOOLS, Act, Kind, words
from coterie.scenarios.oasis.campaign import Campaign, CampaignOptions
from coterie.scenarios.oasis.loading import load, require
from coterie.types import Frozen, Observation, Outcome, Seat, Split, TaskType, Trained, TrainingTask


class OasisOptions(CampaignOptions):
    """Settings of the scenario."""

    acting: Literal["told", "chat"] = "told"
    """How decisions reach the platform; see the module."""
    simulations: int = Field(default=0, ge=0)
    """Different simulations in training, again and again; 0: every task is another one."""
    reward_pool: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of each task."""
    cooperation_level: float = Field(default=0.5, ge=0, le=1)
    """Of each task; matters in mode mixed."""


class Oasis:
    """Seats ``<group>_<number>``; each acts once a round.

    Metrics: for every group its posts' ``<group>_reach`` (share of the other agents a post was shown to), ``_views``
    (the group's share of all that was shown), ``_likes``, ``_reposts``, ``_comments``, ``_followers`` (shares of the
    other agents alike, means per post or agent) and ``_posts``, how many;
    ``valid_calls``, the share of tool calls that were well formed, counted from calls, and ``accepted_calls``, the
    share the platform carried out.

    Scripts: ``loyal`` likes and reposts its own group's posts, and dislikes the others'; ``random``.
    """

    Options = OasisOptions

    def __init__(self, options: OasisOptions) -> None:
        """Raises `ConfigError` when OASIS is not installed; it is imported when the first simulation begins."""
        require()
        self.options = options
        self.scripts: Mapping[str, Script] = {"loyal": partial(_loyal, options), "random": at_random}

    def tasks(self, split: Split, seed: int) -> Iterator[TrainingTask]:
        """Simulations that differ by what the platform draws; endless for both sides."""
        options = self.options
        rng = random.Random(f"oasis:{split}:{seed}")
        # even numbers are training's, odd ones held out
        numbers: Iterator[int] = (2 * rng.getrandbits(31) + (split is Split.HELDOUT) for _ in count())
        if options.simulations and split is Split.TRAIN:
            numbers = cycle(islice(numbers, options.simulations))
        for simulation in numbers:
            yield TrainingTask(
                task_id=f"oasis-{simulation}",
                task_type=TaskType.COLLABORATION,
                reward_pool=options.reward_pool,
                max_steps=options.rounds,
                required_models=self._population,
                cooperation_level=options.cooperation_level,
                content={"simulation": simulation},
                split=split,
            )

    def seats(self, task: TrainingTask) -> Sequence[Seat]:
        seats = []
        for group in self.options.groups:
            player = Frozen(None) if group.untrained else Trained(group.model) if group.model else None
            seats += [Seat(f"{group.name}_{number}", player) for number in range(1, group.agents + 1)]
        return seats

    def check_task(self, task: TrainingTask) -> None:
        """Raises `ScenarioError` for content that is no simulation, or too few steps."""
        content, rounds = dict(task.content), self.options.rounds
        simulation = content.get("simulation", 0)
        if isinstance(simulation, bool) or not isinstance(simulation, int) or content.keys() - {"simulation"}:
            raise ScenarioError(
                f'task {task.task_id!r}: content is {content}; expected is {{"simulation": a whole number}}, or nothing'
            )
        if task.max_steps < rounds:
            raise ScenarioError(
                f"task {task.task_id!r}: max_steps is {task.max_steps}, but a simulation has {rounds} rounds"
            )
        if task.required_models != self._population:
            raise ScenarioError(
                f"task {task.task_id!r}: required_models is {task.required_models}, the groups have {self._population} "
                "agents"
            )

    async def play(self, task: TrainingTask, table: Table) -> Outcome:
        campaign = Campaign(self.options, _seed_of(task), table.language)
        seats = [seat.seat_id for seat in self.seats(task)]

        async def decide(agent: int) -> Act:
            offered = campaign.menus[agent]
            turn = await table[seats[agent]].act(offered.observation, choices=offered.choices, kind="act")
            return offered.acts[chosen(turn)]

        platform = load("platform")
        users: list[Any]
        if self.options.acting == "chat":
            agents = load("agents")
            users = [
                agents.ChattingUser(
                    agent, seats[agent], campaign.group_of(agent).name, model=agents.SeatModel(partial(decide, agent)),
                    tools=_tools(self.options), shown=campaign.shown,
                )
                for agent in range(len(seats))
            ]  # fmt: skip
        else:
            users = [platform.ToldUser(a, seat, campaign.group_of(a).name) for a, seat in enumerate(seats)]
        async with platform.Simulation(users, platform_settings(self.options), campaign.seed) as simulation:
            for agent, text in campaign.seeds():
                await simulation.publish(agent, text)
            for round_ in range(self.options.rounds):
                for agent, text in campaign.scheduled(round_):
                    await simulation.publish(agent, text)
                order = campaign.order()
                if self.options.acting == "chat":
                    calls = await simulation.ask(order)
                else:
                    for agent, feed in enumerate(await simulation.feeds()):
                        campaign.offer(agent, feed)
                    acts = await asyncio.gather(*(decide(agent) for agent in range(len(seats))))
                    calls = await simulation.act({agent: acts[agent] for agent in order})
                campaign.note(calls, simulation.db)
        scores = campaign.scores()
        return Outcome(
            scores={seat: scores[agent] for agent, seat in enumerate(seats)},
            metrics=campaign.metrics(),
        )

    @property
    def _population(self) -> int:
        return sum(group.agents for group in self.options.groups)


async def simulate(
    options: CampaignOptions, models: Mapping[str, Any], *, seed: int = 0, language: str = "en"
) -> Campaign:
    """Run one simulation in which CAMEL's agents act with the tools of OASIS, through models of any kind.

    Args:
        models: group name -> the CAMEL model of its agents, for example a `CoterieModelBackend`, whose calls are then
            captured. Servers must be able to call tools; ``tool_choice = "required"`` in the model's settings makes
            small models do it, ``parallel_tool_calls = False`` keeps them at one action a round, and 128 tokens are
            enough for it: a call that is cut off is no valid call, and under a grammar models spell it in more tokens
            than a tokenizer would.

    Returns:
        The finished campaign: `metrics()`, `history`, `scores()`, `calls`.

    Raises:
        ConfigError: OASIS is not there, or a group has no model.
        CoterieError: what the models raise, and `ScenarioError` when the platform fails.
    """
    require()
    lacking = [group.name for group in options.groups if group.name not in models]
    if lacking:
        raise ScenarioError(f"group {lacking[0]!r} has no model; models are given for {', '.join(models) or 'none'}")
    campaign = Campaign(options, seed, language)
    platform, agents = load("platform"), load("agents")

    def told(agent: int, feed: Sequence[Any]) -> Observation:
        """As to a seat, but with the numbers tool calls need, and without the beginning of an answer."""
        offered = campaign.offer(agent, feed)
        ids = [f"{act.text}: {act.tool}({_written(act)})" for act in offered.acts]
        return Observation(system=offered.observation.system, user="\n".join([offered.observation.user, *ids]))

    users = [
        agents.ChattingUser(
            agent, f"{campaign.group_of(agent).name}_{agent}", campaign.group_of(agent).name,
            model=models[campaign.group_of(agent).name], tools=_tools(options), shown=told,
        )
        for agent in range(campaign.population)
    ]  # fmt: skip
    async with platform.Simulation(users, platform_settings(options), seed) as simulation:
        for agent, text in campaign.seeds():
            await simulation.publish(agent, text)
        for round_ in range(options.rounds):
            for agent, text in campaign.scheduled(round_):
                await simulation.publish(agent, text)
            campaign.note(await simulation.ask(campaign.order()), simulation.db)
    return campaign


def platform_settings(options: CampaignOptions) -> Any:
    """The `PlatformSettings` of these options."""
    return load("platform").PlatformSettings(
        options.recommender, options.recommended, options.shown, options.following, options.minutes
    )


def _tools(options: CampaignOptions) -> list[str]:
    return [TOOLS[kind] for kind in dict.fromkeys((*options.actions, "nothing"))]


def _written(act: Act) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in act.args.items())


def _seed_of(task: TrainingTask) -> int:
    """Of its content, or, for a task without, of its name."""
    simulation = task.content.get("simulation")
    if simulation is not None:
        return int(simulation)
    return int.from_bytes(hashlib.blake2b(task.task_id.encode(), digest_size=4).digest(), "little")


def _loyal(options: OasisOptions, observation: Observation, choices: Sequence[str], rng: random.Random) -> str:
    """The first of: dislike another group's post, repost or like one of its own, whatever is offered last."""
    names = [group.name for group in options.groups]
    own = max((name for name in names if name in observation.system), key=len)
    others = [name for name in names if name != own]
    wishes: list[tuple[Kind, list[str]]] = [("dislike", others), ("repost", [own]), ("like", [own])]
    for kind, whose in wishes:
        for word in words(kind):
            for choice in choices:
                if choice.startswith(word) and choice.removeprefix(word).strip().rstrip("0123456789") in whose:
                    return choice
    return choices[-1]
