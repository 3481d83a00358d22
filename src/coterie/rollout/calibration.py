"""Taking the base model's prior out of choices: a fixed bias per seat and choice set.

A small model answers a choice mostly by which answer it likes to say. Contextual calibration (Zhao et al. 2021)
subtracts that liking; here it is measured over the prompts of some training tasks, as batch calibration does
(Zhou et al. 2023). At every point of the choices' token trie where several tokens are allowed,

    bias[token] = log(share of the choices below token) - mean over prompts of log p(token | prompt, allowed)

so that the typical prompt leaves all choices equally likely and what remains is what the prompt says. The bias is
found once, before training, kept with the run, and applied by engine and learner alike. A choice set seen in too few
prompts (fewer than 4, or than all prompts of its seat) gets none: its mean would be the answer itself. A token that
stands at several branching points gets the mean of their biases, because servers know one bias per token id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coterie.inference.base import Engine
from coterie.inference.local.choices import branching_paths, build_trie
from coterie.types import AdapterVersion, GenerateRequest, SeatId

MIN_PROMPTS = 4
Choices = tuple[str, ...]
Key = tuple[SeatId, Choices]


@dataclass(slots=True)
class Calibration:
    """The biases of a run, and, while they are being found, the prompts seen."""

    biases: dict[Key, dict[int, float]] = field(default_factory=dict)
    recording: bool = False
    seen: dict[Key, dict[tuple[int, ...], GenerateRequest]] = field(default_factory=dict)

    def bias(self, seat_id: SeatId, choices: Choices) -> Mapping[int, float] | None:
        """Bias by token id, or None; the same object every time."""
        return self.biases.get((seat_id, choices))

    def saw(self, seat_id: SeatId, choices: Sequence[str] | None, request: GenerateRequest) -> None:
        """While recording: remember the prompt of a choice."""
        if self.recording and choices is not None:
            self.seen.setdefault((seat_id, tuple(choices)), {})[request.prompt_ids] = request

    def forget(self, seat_id: SeatId, choices: Sequence[str] | None, request: GenerateRequest) -> None:
        """Leave out a prompt that the engine refused; it would refuse it again."""
        if self.recording and choices is not None:
            self.seen.get((seat_id, tuple(choices)), {}).pop(request.prompt_ids, None)

    async def fit(self, engine: Engine, stop_id: int | None) -> int:
        """Find the biases from the prompts seen, under the bare base. Returns how many choice sets got one."""
        prompts: dict[SeatId, int] = {}
        for (seat_id, _), requests in self.seen.items():
            prompts[seat_id] = prompts.get(seat_id, 0) + len(requests)
        for (seat_id, choices), requests in self.seen.items():
            if requests and len(requests) >= min(MIN_PROMPTS, prompts[seat_id]):
                found = await _fit_one(engine, list(requests.values()), None, stop_id)
                if found:
                    self.biases[seat_id, choices] = found
        self.seen.clear()
        return len(self.biases)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"seat": seat, "choices": list(choices), "bias": {str(t): b for t, b in bias.items()}}
            for (seat, choices), bias in self.biases.items()
        ]

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]]) -> Calibration:
        return cls(
            {(row["seat"], tuple(row["choices"])): {int(t): float(b) for t, b in row["bias"].items()} for row in rows}
        )


async def _fit_one(
    engine: Engine, requests: Sequence[GenerateRequest], adapter: AdapterVersion | None, stop_id: int | None
) -> dict[int, float]:
    choices = requests[0].choices
    assert choices is not None
    found: dict[int, list[float]] = {}
    for path, node in branching_paths(build_trie(choices, stop_id)):
        sums = [0.0] * len(node.allowed)
        for request in requests:
            at = GenerateRequest(
                prompt_ids=request.prompt_ids + path,
                adapter=adapter,
                seed=0,
                choices=tuple((token,) for token in node.allowed),
                distribution=True,
            )
            probs = (await engine.generate(at)).choice_probs
            assert probs is not None
            for i, p in enumerate(probs):
                sums[i] += math.log(max(p, 1e-12))
        for i, token in enumerate(node.allowed):
            target = math.log(node.children[token].leaves / node.leaves)
            found.setdefault(token, []).append(target - sums[i] / len(requests))
    return {token: sum(values) / len(values) for token, values in found.items()}
