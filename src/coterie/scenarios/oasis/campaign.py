"""A campaign: groups of agents, each wanting its posts to be seen.

    before the first round   every agent publishes `seed_posts` posts, in an order drawn at random
    every round              every group publishes `posts_per_round` posts, its agents taking turns;
                             then every agent sees its feed and does one thing
    figure of posts          reach * weights.reach + views * weights.views + …, divided by the sum of the weights
    score of an agent        (1 - shared) * figure of its own posts + shared * figure of its group's posts

Which agent publishes when, in which order agents act, and whatever the platform draws depend on the simulation's seed
alone: episodes of one task differ only in what the agents decide.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

from pydantic import Field, model_validator

from coterie.scenarios.base import ScenarioOptions
from coterie.scenarios.oasis.actions import Call, Done, Kind, Menu, Post, done_by, menu
from coterie.scenarios.oasis.tables import FIGURES, Ledger, Standing
from coterie.types import Observation

_T = TypeVar("_T")

TEXTS: Final[Mapping[str, tuple[str, ...]]] = {
    "en": ("A walk in the park.", "A book for the evening.", "A cup of tea.", "A song from home."),
    "zh": ("公园里散步。", "晚上读一本书。", "一杯茶。", "家乡的歌。"),
}
"""What groups post that have no posts of their own; neutral, and the same for all."""


class GroupOptions(ScenarioOptions):
    """One camp."""

    name: str = Field(pattern=r"^\w+$", max_length=24)
    """One word; posts are called by it in prompts and figures in metrics."""
    agents: int = Field(default=5, ge=1, le=500)
    """How many users it has."""
    model: str | None = None
    """model_id of the model that acts for all of them; None: every agent is a seat of its own, filled in order by the
    models of the run."""
    untrained: bool = False
    """Whether the bare base acts for all of them instead, with calibrated choices and never trained."""
    posts: tuple[str, ...] = ()
    """What it publishes, in turn; none: neutral sentences, the same for every group."""

    @model_validator(mode="after")
    def _fits(self) -> GroupOptions:
        if any(not text.strip() for text in self.posts):
            raise ValueError("a post is empty")
        if self.untrained and self.model is not None:
            raise ValueError(f"group {self.name!r} is untrained, so no model acts for it; leave one of the two out")
        return self


class WeightOptions(ScenarioOptions):
    """What a post is worth, by what came of it; each is in [0, 1] before weighing."""

    reach: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Share of the other agents it was shown to."""
    views: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Share of everything shown to anybody but its author that was a post of these agents: what one camp gains here,
    another loses."""
    likes: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Share of the other agents that like it."""
    reposts: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Share of the other agents that reposted it."""
    comments: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Share of the other agents that commented on it."""
    followers: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Share of the other agents that follow its author."""

    @model_validator(mode="after")
    def _some(self) -> WeightOptions:
        if self.total <= 0:
            raise ValueError("all weights are 0; at least one figure must be worth something")
        return self

    @property
    def total(self) -> float:
        return sum(self.each.values())

    @property
    def each(self) -> dict[str, float]:
        """Figure -> its weight."""
        return {name: float(getattr(self, name)) for name in FIGURES}

    def of(self, figures: Mapping[str, float]) -> float:
        """The weighed mean of the figures, in [0, 1]."""
        return min(1.0, sum(weight * figures[name] for name, weight in self.each.items()) / self.total)


class CampaignOptions(ScenarioOptions):
    """Settings of a campaign; the scenario `oasis` adds how agents act."""

    groups: tuple[GroupOptions, ...] = (GroupOptions(name="red"), GroupOptions(name="blue"))
    """The camps, in the order in which prompts list them."""
    rounds: int = Field(default=20, ge=1, le=200)
    """Rounds of a simulation; each agent acts once a round."""
    actions: tuple[Kind, ...] = ("like", "dislike", "nothing")
    """What agents may do: like, dislike, repost, comment, follow (the author), post, nothing."""
    targets: int = Field(default=1, ge=1, le=9)
    """Posts of each group that an agent is offered to act upon, at most, a round."""
    seed_posts: int = Field(default=1, ge=0, le=20)
    """Posts of every agent before the first round."""
    posts_per_round: int = Field(default=1, ge=0, le=20)
    """Posts of every group in each round, by its agents in turn."""
    comment: str = Field(default="Well said.", min_length=1)
    """Text of comments."""
    show_text: bool = False
    """Whether prompts show what a post says; prompts then repeat less, and cost more."""
    recommender: Literal["reddit", "random"] = "reddit"
    """OASIS' recommender: by likes and age, or at random. The others need downloads."""
    recommended: int = Field(default=10, ge=1, le=100)
    """Posts the recommender picks out for each agent a round (max_rec_post_len). While there are no more posts than
    that, it shows them all alike, and likes decide nothing."""
    shown: int = Field(default=3, ge=1, le=50)
    """Posts of those that an agent is shown (refresh_rec_post_count)."""
    following: int = Field(default=0, ge=0, le=50)
    """Posts of followed users shown besides; with recommender random only."""
    minutes: float = Field(default=30.0, gt=0, le=100_000)
    """Length of a round on the platform's clock; to the reddit recommender, 750 minutes count like ten times the
    likes."""
    weights: WeightOptions = WeightOptions()
    """What a post is worth."""
    shared: float = Field(default=1.0, ge=0, le=1)
    """Share of an agent's score that is its group's; the rest is its own posts'."""

    @model_validator(mode="after")
    def _fits(self) -> CampaignOptions:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"groups must be at least one, each with a name of its own; got {names}")
        if sum(group.agents for group in self.groups) < 2:
            raise ValueError("a platform with a single agent has nobody to reach; give groups more agents")
        if not self.actions or len(set(self.actions)) < len(self.actions):
            raise ValueError("actions must name at least one action, each once")
        if not self.seed_posts and not self.posts_per_round and "post" not in self.actions:
            raise ValueError("nobody ever posts: set seed_posts or posts_per_round, or allow the action post")
        if self.following and self.recommender != "random":
            raise ValueError("following needs recommender = \"random\"; OASIS' reddit shows nobody's followed users")
        return self


@dataclass(slots=True)
class Campaign:
    """The bookkeeping of one simulation. Knows nothing of the platform but its tables."""

    options: CampaignOptions
    seed: int
    language: str = "en"
    groups: dict[str, range] = field(init=False)
    """Name -> its agents' ids."""
    calls: list[Call] = field(init=False, default_factory=list)
    """Every call made so far."""
    standing: Standing = field(init=False, default_factory=lambda: Standing((), {}))
    history: list[dict[str, float]] = field(init=False, default_factory=list)
    """After each round, the weighed figure of each group's posts."""
    menus: dict[int, Menu] = field(init=False, default_factory=dict)
    """What each agent was last offered."""
    _done: dict[int, set[tuple[Kind, int]]] = field(init=False, default_factory=dict)
    _ledger: Ledger = field(init=False, default_factory=Ledger)
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(f"campaign:{self.seed}")
        self.groups, first = {}, 0
        for group in self.options.groups:
            self.groups[group.name] = range(first, first + group.agents)
            first += group.agents

    @property
    def population(self) -> int:
        return sum(map(len, self.groups.values()))

    def group_of(self, agent: int) -> GroupOptions:
        """The group of an agent."""
        return next(group for group in self.options.groups if agent in self.groups[group.name])

    def seeds(self) -> list[tuple[int, str]]:
        """(agent, text) of the posts before the first round, in their order."""
        posts = [
            (agent, self._text(agent, number))
            for number in range(self.options.seed_posts)
            for agent in range(self.population)
        ]
        return self._shuffled(posts)

    def scheduled(self, round_: int) -> list[tuple[int, str]]:
        """(agent, text) of the posts that open round `round_`, counted from 0."""
        posts = []
        for members in self.groups.values():
            for k in range(self.options.posts_per_round):
                number = round_ * self.options.posts_per_round + k
                posts.append((members[number % len(members)], number))
        return self._shuffled([(agent, self._text(agent, number)) for agent, number in posts])

    def order(self) -> list[int]:
        """In which order agents act in the coming round."""
        return self._shuffled(list(range(self.population)))

    def offer(self, agent: int, feed: Iterable[Post]) -> Menu:
        """What an agent with this feed sees and may do; kept in `menus`."""
        options = self.options
        made = self.menus[agent] = menu(
            feed,
            agent,
            groups=self.groups,
            own_group=self.group_of(agent).name,
            kinds=options.actions,
            done=self.done(agent),
            targets=options.targets,
            texts=self._texts(agent),
            comment=options.comment,
            show_text=options.show_text,
            language=self.language,
        )
        return made

    def shown(self, agent: int, feed: Sequence[Post]) -> Observation:
        """What an agent with this feed is told."""
        return self.offer(agent, feed).observation

    def done(self, agent: int) -> Done:
        """What an agent has done that cannot be done again."""
        return frozenset(self._done.get(agent, ()))

    def note(self, calls: Mapping[int, Sequence[Call]], db: sqlite3.Connection) -> None:
        """Take in a round: what agents called, and where things stand after it."""
        for agent, made in calls.items():
            self.calls += made
            for call in made:
                done = done_by(call)
                if done is not None:
                    self._done.setdefault(agent, set()).add(done)
        self.standing = self._ledger.read(db)
        self.history.append({name: self._worth(members) for name, members in self.groups.items()})

    def scores(self) -> dict[int, float]:
        """Score of every agent so far, in [0, 1]."""
        shared = self.options.shared
        found = {}
        for members in self.groups.values():
            together = self._worth(members)
            for agent in members:
                own = self._worth([agent]) if shared < 1 else 0.0
                found[agent] = (1 - shared) * own + shared * together
        return found

    def metrics(self) -> dict[str, float]:
        """Figures of every group (see `tables.FIGURES`), how many posts it has, and how well calls were formed."""
        found = {}
        for name, members in self.groups.items():
            for what, value in self.standing.figures(members, self.population).items():
                found[f"{name}_{what}"] = value
            found[f"{name}_posts"] = float(self.standing.count(members))
        calls = len(self.calls)
        found["valid_calls"] = sum(call.valid for call in self.calls) / calls if calls else 0.0
        found["accepted_calls"] = sum(call.accepted for call in self.calls) / calls if calls else 0.0
        return found

    def _worth(self, agents: Sequence[int]) -> float:
        return self.options.weights.of(self.standing.figures(agents, self.population))

    def _texts(self, agent: int) -> tuple[str, ...]:
        return self.group_of(agent).posts or TEXTS[self.language]

    def _text(self, agent: int, number: int) -> str:
        texts = self._texts(agent)
        return texts[number % len(texts)]

    def _shuffled(self, items: list[_T]) -> list[_T]:
        self._rng.shuffle(items)
        return items
