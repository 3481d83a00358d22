"""/v1/chat/completions: a conversation is answered, or its last message continued; tools may be called."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from coterie.serve.engine import Token
from coterie.serve.errors import rejected
from coterie.serve.generation import Answer, Piece, complete, stream
from coterie.serve.grammar import Compiled
from coterie.serve.logprobs import Shapes, usage
from coterie.serve.plan import Plan, check_logprobs, make_plan
from coterie.serve.protocol import ChatBody
from coterie.serve.service import Service
from coterie.serve.tools import CallReader, ToolCall
from coterie.types import AdapterVersion


class ChatJob:
    """See `Job`."""

    def __init__(self, service: Service, body: ChatBody, request_id: str) -> None:
        self.body = body
        self.answers: list[tuple[int, Answer]] = []
        self._service = service
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = service.adapters.known(body.model)
        self._shapes = Shapes(service.text, as_ids=bool(body.return_tokens_as_token_ids))
        self._prompt_ids: tuple[int, ...] = ()
        self._adapter: AdapterVersion | None = None
        self._prompt_top: int | None = None

    @property
    def sequences(self) -> int:
        return self.body.n or 1

    async def prepare(self, adapter: AdapterVersion | None) -> None:
        """See `Job.prepare`."""
        body, service = self.body, self._service
        self._adapter = adapter
        prompt = service.text.render(
            body.messages,
            tools=None if body.tools is None else [tool.model_dump() for tool in body.tools],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            arguments=body.chat_template_kwargs,
        )
        plan = make_plan(
            body,
            service.text.encode(prompt, special=bool(body.add_special_tokens)),
            max_tokens=body.limit,
            default_max_tokens=None,
            top_logprobs=body.top_logprobs or 0,
            adapter=adapter,
            seed=service.seed(),
            engine=service.engine,
            settings=service.settings,
        )
        if body.calling != "none":
            # the tags of a call are special tokens in some models
            plan = replace(plan, skip_special=False)
        if body.prompt_logprobs is not None:
            self._prompt_top = check_logprobs(
                body.prompt_logprobs, "prompt", service.engine.vocabulary, service.settings
            )
        self._prompt_ids = plan.request.prompt_ids
        self.answers = service.answers(plan, await self._constraint(plan))

    async def _constraint(self, plan: Plan) -> Compiled | None:
        body, grammars = self.body, self._service.grammars
        if body.structure is not None:
            return await grammars.structured(body.structure)
        if body.calling == "none" or body.tools is None:
            return None
        if plan.allowed is not None:
            raise rejected("allowed_token_ids and tools cannot be used together.", "allowed_token_ids")
        tools = [
            (tool.function.name, tool.function.parameters)
            for tool in body.tools
            if body.forced_tool in (None, tool.function.name)
        ]
        return await grammars.tools(
            tools,
            required=body.calling == "required",
            parallel=body.parallel_tool_calls is not False and body.forced_tool is None,
        )

    async def whole(self) -> dict[str, Any]:
        """See `Job.whole`."""
        body, engine = self.body, self._service.engine
        scored = None
        if self._prompt_top is not None:
            scored = self._shapes.prompt(await engine.score(self._adapter, self._prompt_ids, self._prompt_top))
        await complete(engine, self.answers)
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(place, answer) for place, (_, answer) in enumerate(self.answers)],
            "usage": self._usage(),
            "prompt_logprobs": scored,
            "prompt_token_ids": list(self._prompt_ids) if body.return_token_ids else None,
        }

    def _choice(self, place: int, answer: Answer) -> dict[str, Any]:
        body = self.body
        reader = self._reader()
        content = answer.text
        calls: list[ToolCall] = []
        if reader is not None:
            said, calls = reader.add(answer.text)
            content = said + reader.finish()
        message: dict[str, Any] = {"role": self._role, "content": self._echo + content, "refusal": None}
        if calls:
            message["tool_calls"] = [call.shown() for call in calls]
            # a line break is all that Hermes' form puts before a call
            message["content"] = message["content"] if message["content"].strip() else None
        return {
            "index": place,
            "message": message,
            "logprobs": self._logprobs(tuple(answer.tokens)),
            "finish_reason": self._finish(answer.finish_reason, called=bool(calls)),
            "stop_reason": answer.stop_reason,
            "token_ids": [token.token_id for token in answer.tokens] if body.return_token_ids else None,
        }

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `Job.events`."""
        body = self.body
        options = body.stream_options
        continuous = bool(options and options.include_usage and options.continuous_usage_stats)
        readers = [self._reader() for _ in self.answers]
        for place in range(len(self.answers)):
            event = self._event(place, {"role": self._role, "content": self._echo}, logprobs=None, finish_reason=None)
            if body.return_token_ids:
                event["prompt_token_ids"] = list(self._prompt_ids)
            if continuous:
                event["usage"] = self._usage()
            yield event
        async with aclosing(stream(self._service.engine, self.answers)) as flow:
            async for place, piece in flow:
                delta, called = self._delta(piece, readers[place])
                if not delta and piece.finish_reason is None and not body.logprobs and not body.return_token_ids:
                    continue
                event = self._event(
                    place,
                    delta,
                    logprobs=self._logprobs(piece.tokens),
                    finish_reason=self._finish(piece.finish_reason, called=called),
                )
                choice = event["choices"][0]
                if piece.finish_reason is not None:
                    choice["stop_reason"] = piece.stop_reason
                if body.return_token_ids:
                    choice["token_ids"] = [token.token_id for token in piece.tokens]
                if continuous:
                    event["usage"] = self._usage()
                yield event
        if options and options.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}

    # -- parts --------------------------------------------------------------------------------------------------

    def _delta(self, piece: Piece, reader: CallReader | None) -> tuple[dict[str, Any], bool]:
        """The delta of a piece, and whether its answer has called a tool by now."""
        if reader is None:
            return ({"content": piece.text} if piece.text else {}), False
        before = len(reader.calls)
        said, made = reader.add(piece.text)
        if piece.finish_reason is not None:
            said += reader.finish()
        delta: dict[str, Any] = {"content": said} if said else {}
        if made:
            delta["tool_calls"] = [call.shown(before + number) for number, call in enumerate(made)]
        return delta, bool(reader.calls)

    def _reader(self) -> CallReader | None:
        if self.body.calling == "none":
            return None
        return CallReader(most=1 if self.body.parallel_tool_calls is False else None)

    def _finish(self, reason: str | None, *, called: bool) -> str | None:
        """As OpenAI has it: "tool_calls" when the model chose to call, "stop" when the request named the tool."""
        return "tool_calls" if reason == "stop" and called and self.body.forced_tool is None else reason

    def _logprobs(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return self._shapes.chat(tokens, self.answers[0][1].plan.request.top_logprobs)

    @property
    def _role(self) -> str:
        return "assistant" if self.body.add_generation_prompt else str(self.body.messages[-1]["role"])

    @property
    def _echo(self) -> str:
        """The last message, where `echo` asks for it and it is the one being continued."""
        last = self.body.messages[-1]
        content = last.get("content")
        return content if self.body.echo and last.get("role") == self._role and isinstance(content, str) else ""

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, Any]:
        return usage(len(self._prompt_ids), sum(len(answer.tokens) for _, answer in self.answers))

    def _event(self, place: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [{"index": place, "delta": delta, **fields}]}
