"""The fake's answers as vLLM writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.inference.fake.generation import Made
from coterie.inference.fake.policy import FakePolicy, log_softmax
from coterie.inference.fake.requests import Settings
from coterie.inference.fake.tokens import FakeTokenizer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything an answer is written from. `made[i]` are the sequences of `prompts[i]`."""

    number: int
    """Of the request; makes ids."""
    model: str
    chat: bool
    settings: Settings
    prompts: Sequence[Sequence[int]]
    shown: Sequence[Sequence[int]]
    """The prompts as reported: others than `prompts` only where the fake is told to misreport."""
    made: Sequence[Sequence[Made]]
    tokenizer: FakeTokenizer
    policy: FakePolicy
    gives_ids: bool
    """False: as servers before vLLM 0.10.2, which know neither return_token_ids nor ids as tokens."""

    @property
    def tokens(self) -> tuple[int, int]:
        """(of all prompts, generated)"""
        return sum(map(len, self.prompts)), sum(len(m.token_ids) for made in self.made for m in made)

    def whole(self) -> Json:
        """The body of an answer that is not streamed."""
        choices = [
            self._choice(place * len(made) + i, place, m)
            for place, made in enumerate(self.made)
            for i, m in enumerate(made)
        ]
        body: Json = {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices}
        body["usage"] = self._usage()
        if self.chat:
            if self._ids:
                body["prompt_token_ids"] = list(self.shown[0])
            if self.settings.prompt_logprobs is not None:
                body["prompt_logprobs"] = self._prompt_logprobs(0)
        return body

    def events(self) -> Iterator[bytes]:
        """The events of a streamed answer, a token each; the sequences one after the other."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        for place, made in enumerate(self.made):
            for i, m in enumerate(made):
                index = place * len(made) + i
                if self.chat:
                    opening = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    head = self._head(kind)
                    if self._ids:
                        head["prompt_token_ids"] = list(self.shown[0])
                    yield _event({**head, "choices": [opening]})
                for step in range(len(m.token_ids)):
                    yield _event({**self._head(kind), "choices": [self._step(index, place, m, step)]})
        if self.settings.usage:
            yield _event({**self._head(kind), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    @property
    def _ids(self) -> bool:
        return self.gives_ids and self.settings.ids

    def _head(self, kind: str) -> Json:
        name = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{name}-{self.number}", "object": kind, "created": 0, "model": self.model}

    def _usage(self) -> Json:
        prompt, generated = self.tokens
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _finish(self, m: Made) -> str:
        return "tool_calls" if self.settings.tool and m.finish_reason == "stop" else m.finish_reason

    def _choice(self, index: int, place: int, m: Made) -> Json:
        text = m.texts[-1] if m.texts else ""
        choice: Json = {"index": index, "finish_reason": self._finish(m), "stop_reason": m.stop_reason}
        choice["logprobs"] = self._logprobs(m, 0, len(m.token_ids), place)
        if self._ids:
            choice["token_ids"] = list(m.token_ids)
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
            if self._finish(m) == "tool_calls":
                choice["message"] = {"role": "assistant", "content": None, "tool_calls": [self._tool(index)]}
            return choice
        only_prompt = self.settings.echo and self.settings.max_tokens == 0
        choice["text"] = (self._echo(place) if self.settings.echo else "") + ("" if only_prompt else text)
        if self._ids:
            choice["prompt_token_ids"] = list(self.shown[place])
        if self.settings.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(place)
        return choice

    def _step(self, index: int, place: int, m: Made, step: int) -> Json:
        """One token of a stream. Text is held back while it ends in the middle of a character."""
        last = step == len(m.token_ids) - 1
        before, now = self._settled(m, step - 1), (m.texts[step] if last else self._settled(m, step))
        choice: Json = {"index": index, "finish_reason": self._finish(m) if last else None}
        choice["logprobs"] = self._logprobs(m, step, step + 1, place)
        if last:
            choice["stop_reason"] = m.stop_reason
        if self._ids:
            choice["token_ids"] = [m.token_ids[step]]
            if step == 0 and not self.chat:
                choice["prompt_token_ids"] = list(self.shown[place])
        if not self.chat:
            echo = self._echo(place) if self.settings.echo and step == 0 else ""
            return {**choice, "text": echo + now[len(before) :]}
        if self.settings.tool is None:
            return {**choice, "delta": {"content": now[len(before) :]}}
        return {**choice, "delta": {"tool_calls": [{"index": 0, **self._tool(index)}]} if last else {}}

    def _settled(self, m: Made, step: int) -> str:
        """Text that no later token takes back: not past a stop string, not half a character."""
        if step < 0:
            return ""
        text, whole = m.texts[step].rstrip("\ufffd"), m.texts[-1]
        return text if whole.startswith(text) else whole

    def _echo(self, place: int) -> str:
        # with token ids asked for, vLLM leaves the prompt's text out
        return "" if self._ids else self.tokenizer.decode(list(self.prompts[place]))

    def _tool(self, index: int) -> Json:
        name, arguments = self.settings.tool or ("", "")
        call = {"name": name, "arguments": arguments}
        return {"id": f"chatcmpl-tool-{self.number}-{index}", "type": "function", "function": call}

    def _name(self, token: int) -> str:
        named = self.gives_ids and self.settings.ids_as_tokens
        return f"token_id:{token}" if named else self.tokenizer.decode([token])

    def _logprobs(self, m: Made, start: int, stop: int, place: int) -> Json | None:
        if self.settings.logprobs is None:
            return None
        ids, values, tops = m.token_ids[start:stop], m.logprobs[start:stop], m.tops[start:stop]
        if self.chat:
            # the sampled token stands first in `tops`, and among the alternatives only when it is one of them
            count = self.settings.logprobs
            entries = []
            for token, value, top in zip(ids, values, tops, strict=True):
                likeliest = sorted(top, key=lambda other: -top[other])[:count] if count else []
                alternatives = [self._entry(other, top[other]) for other in likeliest]
                entries.append({**self._entry(token, value), "top_logprobs": alternatives})
            return {"content": entries}
        all_ids: list[int] = list(ids)
        all_values: list[float | None] = list(values)
        all_tops: list[Mapping[int, float] | None] = list(tops)
        if self.settings.echo and start == 0:
            prompt = self._prompt_steps(place, self.settings.logprobs)
            only_prompt = self.settings.max_tokens == 0
            all_ids = list(self.prompts[place]) + ([] if only_prompt else all_ids)
            values_of_prompt = [None if s is None else s[t] for s, t in zip(prompt, self.prompts[place], strict=True)]
            all_values = values_of_prompt + ([] if only_prompt else all_values)
            all_tops = list(prompt) + ([] if only_prompt else all_tops)
        return {
            "text_offset": [0] * len(all_ids),
            "token_logprobs": [None if value is None else max(value, -9999.0) for value in all_values],
            "tokens": [self._name(token) for token in all_ids],
            "top_logprobs": [None if t is None else {self._name(i): p for i, p in t.items()} for t in all_tops],
        }

    def _entry(self, token: int, value: float) -> Json:
        name = self._name(token)
        return {"token": name, "logprob": max(value, -9999.0), "bytes": list(name.encode())}

    def _prompt_logprobs(self, place: int) -> list[Json | None]:
        """vLLM's prompt_logprobs: those of the model itself, whatever the request asks of sampling."""
        steps = self._prompt_steps(place, self.settings.prompt_logprobs or 0)
        return [
            None
            if step is None
            else {
                str(token): {"logprob": p, "rank": rank, "decoded_token": self.tokenizer.decode([token])}
                for rank, (token, p) in enumerate(step.items(), start=1)
            }
            for step in steps
        ]

    def _prompt_steps(self, place: int, count: int) -> list[Mapping[int, float] | None]:
        ids = self.prompts[place]
        everything = range(self.policy.vocabulary)
        steps: list[Mapping[int, float] | None] = [None]
        for i in range(1, len(ids)):
            found = log_softmax(self.policy, ids[:i], everything, None, 1.0)
            likeliest = (-found).argsort(kind="stable")[:count].tolist() if count else []
            steps.append({token: float(found[token]) for token in (ids[i], *likeliest)})
        return steps


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
