"""The learner: one step for all policies at once.

All policies' sequences are packed into prefix forests, each pass goes once through the frozen base with every policy's
tokens routed through its own adapter, and each policy then takes its own clipped AdamW step. Micro-batches do not
change the gradient: every term is divided by numbers known before the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from coterie.config import LearnerConfig
from coterie.credit.base import Magnet
from coterie.inference.local.kept import Kept
from coterie.inference.local.sampler import scaled_logprobs
from coterie.lm.activations import Recalled
from coterie.lm.base import BaseModel
from coterie.lm.forest import Forest, pack, split
from coterie.models import ModelConfig
from coterie.training.anchors import Anchor, Anchors, Packed
from coterie.training.base import LearnerStats, StepStats
from coterie.training.batch import Batch, HeadKey, Term
from coterie.training.loss import chosen, columns, divergence, entropy, surrogate
from coterie.training.remembered import Site
from coterie.types import ModelId


class Learner:
    """Updates the adapters of `models` in the bank of `base`."""

    def __init__(
        self,
        base: BaseModel,
        models: Sequence[ModelConfig],
        config: LearnerConfig,
        updates: int,
        magnet: Magnet | None = None,
        kept: Kept | None = None,
    ) -> None:
        """
        Args:
            updates: planned length of the run, for the learning rate's schedule.
            magnet: what credit wants policies held near, besides what the config says.
            kept: what an engine over the same base and bank has computed.
        """
        self.base = base
        self.config = config
        self.updates = updates
        # a checkpointed layer keeps its input only
        self._kept = None if config.gradient_checkpointing else kept
        self.anchors = Anchors(base, config.kl_coefficient, magnet, passes=config.passes)
        self.models = {m.model_id: m for m in models}
        self._optimizers: dict[ModelId, torch.optim.AdamW] = {}
        for m in models:
            self.add(m)

    def add(self, model: ModelConfig) -> None:
        """Start training another adapter of the bank."""
        adapter = self.base.bank.training(model.model_id)
        flat = nn.Parameter(adapter.flat)
        flat.grad = adapter.grad
        self.models[model.model_id] = model
        self._optimizers[model.model_id] = torch.optim.AdamW(
            [flat], lr=model.learning_rate, betas=self.config.betas, weight_decay=self.config.weight_decay
        )
        self.anchors.add(model.model_id)

    def remove(self, model_id: ModelId) -> None:
        del self._optimizers[model_id], self.models[model_id]
        self.anchors.remove(model_id)

    @property
    def keep_zero(self) -> bool:
        """Whether tokens without advantage still matter to the loss."""
        return self.config.entropy_bonus > 0 or bool(self.anchors)

    def listening(self) -> AbstractContextManager[None]:
        """See `Learner.listening`."""
        return nullcontext() if self._kept is None else self._kept.listening()

    def step(self, batch: Batch, update: int) -> LearnerStats:
        """One update (of `config.passes` optimizer steps) of every policy that has terms; `update` counts from 1."""
        stats = LearnerStats({model_id: StepStats() for model_id in batch.policies})
        self.anchors.weigh((update - 1) / max(1, self.updates - 1))
        stats.naive_tokens = sum(len(tokens) for _, tokens in batch.sequences)
        for number in range(self.config.passes):
            self.backward(batch, stats, first=number == 0)
            for model_id in batch.policies:
                self._update(model_id, stats.policies[model_id], update)
        self.anchors.begin()
        self.anchors.move(update)
        return stats

    # -- gradients ----------------------------------------------------------------------------------------------

    def backward(self, batch: Batch, stats: LearnerStats | None = None, *, first: bool = True) -> None:
        """Write the gradient of the whole batch into the adapters, replacing what was there."""
        stats = stats or LearnerStats({model_id: StepStats() for model_id in batch.policies})
        for model_id in batch.policies:
            grad = self.base.bank.training(model_id).grad
            assert grad is not None
            grad.zero_()
        if first:
            self.anchors.begin()
        if not batch.terms:
            return
        by_sequence: dict[int, list[tuple[HeadKey, Term]]] = {}
        for head, terms in batch.terms.items():
            for term in terms:
                by_sequence.setdefault(term.sequence, []).append((head, term))
        for part, members in enumerate(split(batch.sequences, self.config.tokens_per_pass)):
            forest = pack([batch.sequences[i] for i in members])
            heads: dict[HeadKey, list[tuple[int, int, Term]]] = {}
            for local, i in enumerate(members):
                policy = batch.sequences[i][0]
                for head, term in by_sequence.get(i, ()):
                    heads.setdefault(head, []).append((int(forest.paths[local][term.position]), policy, term))
            self._pass(batch, part, forest, heads, stats, first)
            stats.packed_tokens += forest.size

    def _pass(
        self,
        batch: Batch,
        part: int,
        forest: Forest,
        heads: Mapping[HeadKey, list[tuple[int, int, Term]]],
        stats: LearnerStats,
        first: bool,
    ) -> None:
        base, device = self.base, self.base.device
        ids = torch.from_numpy(forest.token_ids).to(device)
        positions = torch.from_numpy(forest.positions).to(device)
        plan = forest.plan()
        owned = [(batch.policies[p], start, end) for p, start, end in forest.segments]
        segments = [(base.bank.training(model_id), start, end) for model_id, start, end in owned]
        choices = _choices(batch, heads) if self.anchors else None
        anchors = self.anchors.of(part, Packed(ids, positions, plan, owned, choices))
        scale = torch.tensor([1.0 / max(1, n) for n in batch.turns], device=device)
        known = self._recalled(forest, [model_id for model_id, _, _ in owned])
        if known is not None:
            stats.recalled_tokens += forest.size - known.computed
        checkpoint = self.config.gradient_checkpointing
        with base.trained(ids, positions, plan, segments, checkpoint=checkpoint, known=known) as hidden:
            if first:
                self.anchors.passed(part, hidden)
            losses = []
            for head, entries in heads.items():
                losses.append(self._head_loss(head, entries, hidden, known, anchors, scale, batch, stats, first))
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    def _recalled(self, forest: Forest, owners: Sequence[ModelId]) -> Recalled | None:
        """What the engine computed for these tokens, if the weights are still those it computed with."""
        if self._kept is None:
            return None
        versions = [self.base.bank.standing(model_id) for model_id in owners]
        standing = [version for version in versions if version is not None]
        return self._kept.recall(forest, standing) if len(standing) == len(versions) else None

    def _head_loss(
        self,
        head: HeadKey,
        entries: list[tuple[int, int, Term]],
        hidden: Tensor,
        known: Recalled | None,
        anchors: Sequence[Anchor],
        scale: Tensor,
        batch: Batch,
        stats: LearnerStats,
        first: bool,
    ) -> Tensor:
        config, device = self.config, self.base.device
        # several terms may stand at one site (one packed token): its logits are computed once
        sites: dict[int, int] = {}
        site_of = [sites.setdefault(index, len(sites)) for index, _, _ in entries]
        rows = torch.tensor(list(sites), device=device)
        asked = hidden.index_select(0, rows)
        at = torch.tensor(site_of, device=device)
        place = None if head.allowed is None else {token: i for i, token in enumerate(head.allowed)}
        column = [term.token if place is None else place[term.token] for _, _, term in entries]
        columns_of = torch.tensor(column, device=device)
        logprobs = None
        if head.allowed is None and not anchors and self.base.kernels is not None and not head.bias:
            logits = self.base.rough_logits(asked, known.logits(list(sites)) if known is not None else None)
            logprob, spreads = chosen(self.base.kernels, logits, at, columns_of, head.temperature)
        else:
            logprobs = self._logprobs(head, asked)
            logprob, spreads = logprobs[at, columns_of], entropy(logprobs)
        terms = columns([(t.old_logprob, t.gain, t.loss, t.count) for _, _, t in entries], device)
        policy = torch.tensor([p for _, p, _ in entries], device=device)
        weight = scale[policy]
        value = surrogate(logprob, terms, config) * weight
        spread = spreads[at]
        if config.entropy_bonus > 0:
            value = value + config.entropy_bonus * spread * terms.count * weight
        figures = {"entropy": spread, "mismatch": (logprob - terms.old_logprob).abs()}
        for anchor in anchors:
            assert logprobs is not None
            distance = divergence(logprobs, self._logprobs(head, anchor.hidden.index_select(0, rows)))[at]
            value = value - anchor.coefficient * distance * terms.count * weight
            figures[anchor.distance] = distance
        if first:
            _tally(stats, batch, policy, value, figures, logprob - terms.old_logprob, terms.count)
        return -value.sum()

    def _logprobs(self, head: HeadKey, hidden: Tensor) -> Tensor:
        """float32 (sites, allowed) log-probabilities of the sampling policy, normalised as the engine did."""
        if head.allowed is not None:
            rows = torch.tensor(head.allowed, device=self.base.device)
            lookup = dict(head.bias)
            bias = [lookup.get(token, 0.0) for token in head.allowed] if lookup else None
            return scaled_logprobs(self.base.logits(hidden, rows), bias, head.temperature)
        logits = self.base.logits(hidden)
        if head.bias:
            bias_row = torch.zeros(logits.shape[-1], device=logits.device)
            for token, value in head.bias:
                bias_row[token] = value
            logits = logits + bias_row
        return scaled_logprobs(logits, None, head.temperature)

    # -- steps --------------------------------------------------------------------------------------------------

    def _update(self, model_id: ModelId, stats: StepStats, update: int) -> None:
        adapter = self.base.bank.training(model_id)
        assert adapter.grad is not None
        norm = float(adapter.grad.norm())
        stats.grad_norm = norm
        stats.learning_rate = self.models[model_id].learning_rate * self.schedule(update)
        # no gradient, no step: AdamW's momentum must not move a policy that learned nothing
        if norm == 0.0 or not math.isfinite(norm):
            return
        if norm > self.config.max_grad_norm:
            adapter.grad.mul_(self.config.max_grad_norm / norm)
        optimizer = self._optimizers[model_id]
        optimizer.param_groups[0]["lr"] = stats.learning_rate
        optimizer.step()
        adapter.touch()
        stats.stepped = True

    def schedule(self, update: int) -> float:
        """Share of the learning rate at `update` (from 1): linear warm-up, then linear fall."""
        config = self.config
        if update <= config.warmup_updates:
            return update / (config.warmup_updates + 1)
        done = (update - config.warmup_updates - 1) / max(1, self.updates - config.warmup_updates - 1)
        return 1.0 - min(1.0, done) * (1.0 - config.final_learning_rate)

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Adapters, magnets and optimizer moments by name, for a checkpoint."""
        out = self.anchors.state()
        for model_id, optimizer in self._optimizers.items():
            out[f"{model_id}/weights"] = self.base.bank.training(model_id).flat.detach().cpu().clone()
            (moments,) = list(optimizer.state.values()) or [{}]
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if name in moments:
                    out[f"{model_id}/{name}"] = moments[name].detach().cpu().clone()
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state()`; adapters must have the same shapes.

        Raises `RunFolderError` when a magnet is wanted that is not in it.
        """
        self.anchors.restore(state)
        for model_id, optimizer in self._optimizers.items():
            adapter = self.base.bank.training(model_id)
            with torch.no_grad():
                adapter.flat.copy_(state[f"{model_id}/weights"])
            adapter.touch()
            (parameter,) = optimizer.param_groups[0]["params"]
            optimizer.state.clear()
            if f"{model_id}/step" in state:
                optimizer.state[parameter] = {
                    "step": state[f"{model_id}/step"].clone(),
                    "exp_avg": state[f"{model_id}/exp_avg"].clone().to(adapter.flat.device),
                    "exp_avg_sq": state[f"{model_id}/exp_avg_sq"].clone().to(adapter.flat.device),
                }


def _choices(batch: Batch, heads: Mapping[HeadKey, list[tuple[int, int, Term]]]) -> dict[int, Site] | None:
    """Where the terms of a pass stand, by packed token; None: some are no choices."""
    if any(head.allowed is None for head in heads):
        return None
    return {
        row: (batch.policies[policy], batch.sequences[term.sequence][1][: term.position + 1])
        for entries in heads.values()
        for row, policy, term in entries
    }


@torch.no_grad()
def _tally(
    stats: LearnerStats,
    batch: Batch,
    policy: Tensor,
    value: Tensor,
    figures: Mapping[str, Tensor],
    log_ratio: Tensor,
    count: Tensor,
) -> None:
    """Add one head's terms to the running means of their policies; `figures` are fields of `StepStats`."""
    for number, model_id in enumerate(batch.policies):
        mine = policy == number
        n = float(count[mine].sum())
        if n == 0:
            continue
        s = stats.policies[model_id]
        share = n / (s.tokens + n)
        for name, column in figures.items():
            mean = float((column[mine] * count[mine]).sum()) / n
            setattr(s, name, getattr(s, name) + share * (mean - getattr(s, name)))
        s.max_ratio = max(s.max_ratio, float(log_ratio[mine].max().exp()))
        s.loss -= float(value[mine].sum())
        s.tokens += int(n)
