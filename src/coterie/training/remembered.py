"""Last hidden states under weights that seldom change, kept from update to update.

A small game asks the same prompts in every update. What the base makes of them, or a magnet until it moves, is the same
every time: only what was not seen yet is computed, as a forest of its own. What is kept stands in checkpoints, so that
a run that goes on from one has the very same numbers: another batch of the same tokens may differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.lm.attention import Plan
from coterie.lm.forest import pack
from coterie.types import ModelId

Site = tuple[ModelId, tuple[int, ...]]
"""A policy, and the tokens up to and with the one whose hidden state is meant."""
Segments = Sequence[tuple[ModelId, int, int]]
"""Packed tokens [start, end) are those of that policy."""
Compute = Callable[[Tensor, Tensor, Plan, Segments], Tensor]
"""(ids, positions, plan, segments) -> (tokens, hidden)."""

MOST_BYTES = 2**26
"""Of hidden states that are kept; for more, all that came before is forgotten."""


class Remembered:
    """Of one set of weights, called `name`; `compute` is a pass with them on `device`."""

    def __init__(self, name: str, compute: Compute, device: torch.device, most_bytes: int = MOST_BYTES) -> None:
        self._name = name
        self.compute = compute
        self._device = device
        self._most_bytes = most_bytes
        self._rows: dict[Site, Tensor] = {}

    def forget(self) -> None:
        self._rows.clear()

    def of(self, sites: Mapping[int, Site], tokens: int) -> Tensor:
        """(tokens, hidden): the last hidden states at `sites`, packed token -> site, at least one; 0 elsewhere."""
        if sum(row.nbytes for row in self._rows.values()) > self._most_bytes:
            self.forget()
        lacking = sorted({site for site in sites.values() if site not in self._rows})
        if lacking:
            self._learn(lacking)
        rows = torch.stack([self._rows[site] for site in sites.values()])
        out = rows.new_zeros(tokens, rows.shape[1])
        out[torch.tensor(list(sites), device=self._device)] = rows
        return out

    def _learn(self, sites: Sequence[Site]) -> None:
        policies = sorted({policy for policy, _ in sites})
        number = {policy: i for i, policy in enumerate(policies)}
        forest = pack([(number[policy], tokens) for policy, tokens in sites])
        ids, positions = (torch.from_numpy(part).to(self._device) for part in (forest.token_ids, forest.positions))
        segments = [(policies[p], start, end) for p, start, end in forest.segments]
        hidden = self.compute(ids, positions, forest.plan(), segments)
        for site, path in zip(sites, forest.paths, strict=True):
            self._rows[site] = hidden[int(path[-1])].clone()

    def state(self) -> dict[str, Tensor]:
        """Rows, and the tokens of their sites one after another, by policy, for a checkpoint."""
        found: dict[str, Tensor] = {}
        for policy in sorted({policy for policy, _ in self._rows}):
            sites = [(tokens, row) for (owner, tokens), row in self._rows.items() if owner == policy]
            parts = {
                "rows": torch.stack([row for _, row in sites]).cpu(),
                "tokens": torch.tensor([token for tokens, _ in sites for token in tokens], dtype=torch.int32),
                "lengths": torch.tensor([len(tokens) for tokens, _ in sites], dtype=torch.int32),
            }
            found |= {f"{policy}/{self._name}_{part}": tensor for part, tensor in parts.items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state()`; where there is none, to having seen nothing."""
        self.forget()
        for name, rows in state.items():
            policy, _, part = name.rpartition("/")
            if part == f"{self._name}_rows":
                tokens, lengths = (state[f"{policy}/{self._name}_{other}"] for other in ("tokens", "lengths"))
                for row, path in zip(rows.to(self._device), torch.split(tokens, lengths.tolist()), strict=True):
                    self._rows[policy, tuple(path.tolist())] = row.clone()
