"""What an agent sees of its feed, and what it may do about it.

    feed (posts as the platform shows them) -> one line for each post that something can be done about
    action kinds x posts                    -> choices such as "like red", each standing for one call of a platform tool

A post is called by the group of its author ("red"), or by group and rank in the feed ("red2") where several posts of a
group are offered. Within a group the better liked post comes first, then the newer one. A repost stands for the post
it repeats. Only calls the platform accepts are offered: nobody likes its own posts, and nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from coterie.errors import ScenarioError
from coterie.types import Observation

Kind = Literal["like", "dislike", "repost", "comment", "follow", "post", "nothing"]

TOOLS: Final[Mapping[Kind, str]] = {
    "like": "like_post",
    "dislike": "dislike_post",
    "repost": "repost",
    "comment": "create_comment",
    "follow": "follow",
    "post": "create_post",
    "nothing": "do_nothing",
}
"""Kind of action -> OASIS' tool (its `ActionType`)."""

AT_A_POST: Final = ("like", "dislike", "repost", "comment", "follow")

_WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "en": {
        "like": "like", "dislike": "dislike", "repost": "repost", "comment": "comment", "follow": "follow",
        "post": "post", "nothing": "nothing",
        "system": "You are with {group}. Choose one action.", "feed": "Posts and their likes:", "none": "none",
        "prefix": "Action:", "between": " ",
    },
    "zh": {
        "like": "赞", "dislike": "踩", "repost": "转", "comment": "评", "follow": "关注",
        "post": "发", "nothing": "无",
        "system": "你属于{group}。选一个动作。", "feed": "帖子和赞数：", "none": "无",
        "prefix": "动作：", "between": "",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Post:
    """A post as an agent meets it in its feed."""

    post_id: int
    """Of the original, where a repost was shown."""
    author: int
    likes: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Act:
    """A choice, and the tool call it stands for."""

    text: str
    kind: Kind
    args: Mapping[str, int | str]

    @property
    def tool(self) -> str:
        return TOOLS[self.kind]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call that an agent made, and what the platform said."""

    tool: str
    args: Mapping[str, Any]
    result: Any
    valid: bool
    """Whether it called a tool that was offered, with arguments that tool takes."""

    @property
    def accepted(self) -> bool:
        """Whether the platform did it (it does not let anybody like a post twice, say)."""
        return self.valid and isinstance(self.result, Mapping) and self.result.get("success") is True


@dataclass(frozen=True, slots=True)
class Menu:
    """What one agent sees in one round and may choose among."""

    observation: Observation
    acts: tuple[Act, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(act.text for act in self.acts)


Done = frozenset[tuple[Kind, int]]
"""What an agent has done already: (kind, post id), or ("follow", agent)."""


def menu(
    feed: Iterable[Post],
    me: int,
    *,
    groups: Mapping[str, Collection[int]],
    own_group: str,
    kinds: Sequence[Kind],
    done: Collection[tuple[Kind, int]] = (),
    targets: int = 1,
    texts: Sequence[str] = (),
    comment: str = "",
    show_text: bool = False,
    language: str = "en",
) -> Menu:
    """What `me` sees and may do.

    Args:
        feed: posts shown to it, in any order; one that stands twice counts once.
        groups: name -> its agents; lines stand in this order.
        kinds: actions that are allowed at all; "nothing" is always there when no other is possible.
        targets: posts of each group that something can be done about, at most.
        texts: what it may post.
        comment: what it says in a comment.
    """
    told = _WORDS[language]
    group_of = {agent: name for name, members in groups.items() for agent in members}
    posts = {post.post_id: post for post in feed if post.author != me and post.author in group_of}
    ranked = sorted(posts.values(), key=lambda post: (-post.likes, -post.post_id))
    at_a_post = [kind for kind in kinds if kind in AT_A_POST]
    lines, offered = [], []
    for name in groups:
        here = [post for post in ranked if group_of[post.author] == name]
        if at_a_post:
            here = [post for post in here if any(_open(kind, post, done) for kind in at_a_post)]
        here = here[:targets]
        if not here:
            lines.append(f"{name} {told['none']}")
        for number, post in enumerate(here, 1):
            label = name if targets == 1 else f"{name}{number}"
            lines.append(f"{label} {post.likes}" + (f" {post.text}" if show_text else ""))
            offered.append((label, post))
    acts = []
    for kind in kinds:
        if kind in AT_A_POST:
            acts += [
                Act(f"{told[kind]}{told['between']}{label}", kind, _arguments(kind, post, comment))
                for label, post in offered
                if _open(kind, post, done)
            ]
        elif kind == "post":
            for number, text in enumerate(texts, 1):
                name = told["post"] if len(texts) == 1 else f"{told['post']}{told['between']}{number}"
                acts.append(Act(name, "post", {"content": text}))
    if "nothing" in kinds or not acts:
        acts.append(Act(told["nothing"], "nothing", {}))
    observation = Observation(
        system=told["system"].format(group=own_group),
        user="\n".join([told["feed"], *lines]),
        prefix=told["prefix"],
    )
    return Menu(observation, tuple(acts))


def words(kind: Kind) -> tuple[str, ...]:
    """What an action is called, in every language."""
    return tuple(told[kind] for told in _WORDS.values())


def done_by(call: Call) -> tuple[Kind, int] | None:
    """What an accepted call did that cannot be done again; None: nothing of that sort."""
    if not call.accepted:
        return None
    kind = next((kind for kind, tool in TOOLS.items() if tool == call.tool), None)
    if kind is None or kind not in AT_A_POST or kind == "comment":
        return None
    target = call.args.get("followee_id" if kind == "follow" else "post_id")
    return (kind, int(target)) if target is not None else None


_REFUSALS: Final = (
    "already exists",
    "not found",
    "does not exist",
    "not allowed to like/dislike",
    "'NoneType' object is not subscriptable",  # what OASIS says of a like for a post that does not exist
)
"""What OASIS answers when it understands a call and declines it."""


def check_result(call: Call, agent: int) -> None:
    """Raises `ScenarioError` when the platform failed, rather than declined what it was asked."""
    if not call.valid or call.accepted or not isinstance(call.result, Mapping):
        return
    said = str(call.result.get("error") or call.result.get("message") or call.result)
    if not any(refusal in said for refusal in _REFUSALS):
        raise ScenarioError(f"OASIS, agent {agent}, {call.tool}({dict(call.args)}): {said}")


def _open(kind: Kind, post: Post, done: Collection[tuple[Kind, int]]) -> bool:
    return (kind, post.author if kind == "follow" else post.post_id) not in done


def _arguments(kind: Kind, post: Post, comment: str) -> Mapping[str, int | str]:
    if kind == "follow":
        return {"followee_id": post.author}
    if kind == "comment":
        return {"post_id": post.post_id, "content": comment}
    return {"post_id": post.post_id}
