"""CAMEL's chat agents as users of the platform.

    ChattingUser (OASIS' SocialAgent, a ChatAgent) -> BaseModelBackend -> tool call -> the platform's tool

The model is either `SeatModel`, which takes the turn of a seat at Coterie's table (token in, token out, so that it can
be trained on with any engine), or any other backend, such as `coterie.inference.camel.CoterieModelBackend` on servers.
A user remembers nothing from one round to the next, so that its context does not grow.

Importing this module imports OASIS: use `coterie.scenarios.oasis.loading.load`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from camel.models import BaseModelBackend
from camel.types import ChatCompletion
from camel.utils import BaseTokenCounter
from oasis import ActionType, SocialAgent

from coterie.errors import EngineError, ScenarioError
from coterie.scenarios.oasis.actions import Act, Call, Post
from coterie.scenarios.oasis.platform import user_info
from coterie.types import Observation

Shown = Callable[[int, Sequence[Post]], Observation]
"""(agent id, its feed) -> what it is told."""
Feed = Callable[["ChattingUser"], Awaitable[list[Post]]]


class ChattingUser(SocialAgent):  # type: ignore[misc]  # camel-oasis is an extra, so unknown to the type checker
    """A user of the platform that is a ChatAgent and acts by tool calls."""

    def __init__(
        self,
        agent_id: int,
        name: str,
        bio: str,
        *,
        model: BaseModelBackend,
        tools: Sequence[str],
        shown: Shown,
    ) -> None:
        """
        Args:
            model: whose tool calls are carried out.
            tools: names of OASIS' tools it has.
            shown: what it is told of its feed.
        """
        super().__init__(
            agent_id,
            user_info(name, bio),
            model=model,
            available_actions=[ActionType(tool) for tool in tools],
            max_iteration=1,
        )
        # OASIS has each call's model drawn, by the global generator, even where there is only one
        self.model_backend.scheduling_strategy = self.model_backend.round_robin
        self.calls: list[Call] = []
        self.look: Feed | None = None
        """How it is shown its feed; given by its simulation."""
        self._shown = shown
        self._has = frozenset(tools)

    async def perform_action_by_llm(self) -> Any:
        """Look at the feed, ask the model, carry out what it calls; what came of it is in `calls`.

        Raises what the model raises, instead of returning it as OASIS does.
        """
        if self.look is None:
            raise ScenarioError(f"OASIS, agent {self.social_agent_id}: nothing shows it its feed")
        told = self._shown(self.social_agent_id, await self.look(self))
        self.reset()
        response = await self.astep("\n".join(part for part in (told.system, told.user, told.prefix) if part))
        made = response.info["tool_calls"]
        for call in made:
            # CAMEL puts a text in place of the result when the arguments do not fit
            fits = call.tool_name in self._has and isinstance(call.result, Mapping)
            self.calls.append(Call(call.tool_name, dict(call.args), call.result, fits))
        if not made:
            self.calls.append(Call("", {}, None, False))
        return response

    async def _aexecute_tool(self, tool_call_request: Any) -> Any:
        """A tool nobody offered is a call that is not valid, and no reason to stop."""
        name = tool_call_request.tool_name
        if name not in self._has:
            return self._record_tool_calling(
                name, tool_call_request.args, f"there is no tool {name!r}", tool_call_request.tool_call_id
            )
        return await super()._aexecute_tool(tool_call_request)


class SeatModel(BaseModelBackend):  # type: ignore[misc]  # see ChattingUser
    """The model of an agent whose decisions are turns of a seat: what is decided becomes a tool call."""

    def __init__(self, decide: Callable[[], Awaitable[Act]]) -> None:
        """`decide`: takes the turn, seeing what its agent has just been told."""
        super().__init__("coterie-seat", {}, token_counter=_NoCounter())
        self._decide = decide

    @property
    def token_counter(self) -> BaseTokenCounter:
        return self._token_counter

    @property
    def token_limit(self) -> int:
        """Never reached: a conversation is one message long, and the engine has its own limit."""
        return 1 << 20

    @property
    def stream(self) -> bool:
        return False

    def _run(self, messages: list[Any], response_format: Any = None, tools: Any = None) -> ChatCompletion:
        raise EngineError("a seat's turn is taken in the event loop of its run; use `await agent.astep(…)`")

    async def _arun(self, messages: list[Any], response_format: Any = None, tools: Any = None) -> ChatCompletion:
        act = await self._decide()
        call = {
            "id": f"call-{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": act.tool, "arguments": json.dumps(dict(act.args), ensure_ascii=False)},
        }
        return ChatCompletion.model_validate({
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "coterie-seat",
            "choices": [{
                "index": 0,
                "finish_reason": "tool_calls",
                "message": {"role": "assistant", "content": None, "tool_calls": [call]},
                "logprobs": None,
            }],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        })  # fmt: skip


class _NoCounter(BaseTokenCounter):  # type: ignore[misc]  # see ChattingUser
    """CAMEL wants to know the length of what is sent; a seat's prompt is not sent, so it has none."""

    def count_tokens_from_messages(self, messages: list[Any]) -> int:
        return 0

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, token_ids: list[int]) -> str:
        return ""
