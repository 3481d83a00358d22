"""/v1/completions: prompts, as texts or as token ids, are continued."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from coterie.serve.engine import Token
from coterie.serve.errors import rejected
from coterie.serve.generation import Answer, complete, stream
from coterie.serve.logprobs import Shapes, usage
from coterie.serve.plan import Plan, check_logprobs, make_plan
from coterie.serve.protocol import CompletionBody
from coterie.serve.service import Service
from coterie.types import AdapterVersion


class CompletionJob:
    """See `Job`. Answer i of prompt p is choice p * n + i."""

    def __init__(self, service: Service, body: CompletionBody, request_id: str) -> None:
        self.body = body
        self.answers: list[tuple[int, Answer]] = []
        self._service = service
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._model = service.adapters.known(body.model)
        self._prompts = _prompts(body.prompt)
        if len(self._prompts) > service.settings.max_prompts:
            raise rejected(
                f"prompt list length {len(self._prompts)} exceeds the maximum allowed count of "
                f"{service.settings.max_prompts}.",
                "prompt",
            )
        self._plans: list[Plan] = []
        self._adapter: AdapterVersion | None = None
        self._shapes = Shapes(service.text, as_ids=bool(body.return_tokens_as_token_ids))
        self._prompt_top: int | None = None
        """Log-probabilities wanted of each prompt token beside its own; None: none at all."""

    @property
    def sequences(self) -> int:
        return len(self._prompts) * (self.body.n or 1)

    async def prepare(self, adapter: AdapterVersion | None) -> None:
        """See `Job.prepare`."""
        body, service = self.body, self._service
        if body.max_tokens == 0 and not body.echo:
            raise rejected("max_tokens must be at least 1, got 0.", "max_tokens")
        self._adapter = adapter
        seed = service.seed()
        for prompt in self._prompts:
            plan = make_plan(
                body,
                service.text.encode(prompt, special=body.add_special_tokens is not False)
                if isinstance(prompt, str)
                else prompt,
                max_tokens=body.max_tokens,
                default_max_tokens=16,
                top_logprobs=body.logprobs or 0,
                adapter=adapter,
                seed=seed,
                engine=service.engine,
                settings=service.settings,
            )
            if not plan.request.prompt_ids:
                raise rejected("The prompt has no tokens.", "prompt")
            self._plans.append(plan)
        wanted = body.prompt_logprobs
        if wanted is None and body.echo:
            wanted = body.logprobs
        if wanted is not None:
            self._prompt_top = check_logprobs(wanted, "prompt", service.engine.vocabulary, service.settings)
        structure = body.structure
        compiled = await service.grammars.structured(structure) if structure is not None else None
        self.answers = [pair for plan in self._plans for pair in service.answers(plan, compiled)]

    async def whole(self) -> dict[str, Any]:
        """See `Job.whole`."""
        body, engine = self.body, self._service.engine
        scored: list[tuple[Token, ...] | None] = [None] * len(self._plans)
        if self._prompt_top is not None:
            for number, plan in enumerate(self._plans):
                scored[number] = await engine.score(self._adapter, plan.request.prompt_ids, self._prompt_top)
        if body.max_tokens != 0:
            await complete(engine, self.answers)
        choices = []
        for place, (_, answer) in enumerate(self.answers):
            number = place // (body.n or 1)
            prompt_ids, prompt = answer.plan.request.prompt_ids, scored[number]
            tokens: Sequence[Token | int] = answer.tokens
            if body.echo and prompt is not None:
                tokens = [prompt_ids[0], *prompt, *answer.tokens]
            choices.append(
                {
                    "index": place,
                    "text": (self._echo(number) if body.echo else "") + answer.text,
                    "logprobs": None if body.logprobs is None else self._shapes.completion(tokens, self._top),
                    "finish_reason": answer.finish_reason or "length",
                    "stop_reason": answer.stop_reason,
                    "token_ids": [token.token_id for token in answer.tokens] if body.return_token_ids else None,
                    "prompt_logprobs": None if prompt is None else self._shapes.prompt(prompt),
                    "prompt_token_ids": list(prompt_ids) if body.return_token_ids else None,
                }
            )
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """See `Job.events`."""
        body = self.body
        options = body.stream_options
        continuous = bool(options and options.include_usage and options.continuous_usage_stats)
        offsets = [0] * len(self.answers)
        begun = [False] * len(self.answers)
        if body.max_tokens == 0:
            for place in range(len(self.answers)):
                text = self._echo(place // (body.n or 1))
                yield self._event(place, text, (), offsets, first=True, end={"finish_reason": "length"})
        else:
            async with aclosing(stream(self._service.engine, self.answers)) as flow:
                async for place, piece in flow:
                    first = not begun[place]
                    begun[place] = True
                    text = self._echo(place // (body.n or 1)) if first and body.echo else ""
                    end = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
                    event = self._event(place, text + piece.text, piece.tokens, offsets, first=first, end=end)
                    if continuous:
                        event["usage"] = self._usage()
                    yield event
        if options and options.include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    # -- parts --------------------------------------------------------------------------------------------------

    @property
    def _top(self) -> int:
        return self.answers[0][1].plan.request.top_logprobs

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(plan.request.prompt_ids) for plan in self._plans)
        return usage(prompt, sum(len(answer.tokens) for _, answer in self.answers))

    def _echo(self, number: int) -> str:
        """The text of a prompt."""
        prompt = self._prompts[number]
        return prompt if isinstance(prompt, str) else self._service.text.decode(prompt)

    def _event(
        self,
        place: int,
        text: str,
        tokens: tuple[Token, ...],
        offsets: list[int],
        *,
        first: bool,
        end: dict[str, Any],
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": place, "text": text, "logprobs": None, "stop_reason": None, **end}
        if self.body.logprobs is not None:
            choice["logprobs"] = self._shapes.completion(tokens, self._top, offsets[place])
            offsets[place] += sum(map(len, choice["logprobs"]["tokens"]))
        if self.body.return_token_ids:
            prompt_ids = self.answers[place][1].plan.request.prompt_ids
            choice["prompt_token_ids"] = list(prompt_ids) if first else None
            choice["token_ids"] = [token.token_id for token in tokens]
        return {**self._head(), "choices": [choice]}


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | tuple[int, ...]]:
    """Prompts one by one."""
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(part, int) for part in prompt):
        return [tuple(part for part in prompt if isinstance(part, int))]
    return [part if isinstance(part, str) else tuple(part) for part in prompt if not isinstance(part, int)]
