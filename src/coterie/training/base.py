"""What the loop needs of whoever holds the weights: a learner that steps them, and a way to save and serve them.

    Policies  TrainedPolicies (policies.py)      a base in this process, an adapter for every model, a learner
              UntrainedPolicies (untrained.py)   no torch: prompts become ids, and no weight ever moves

Nothing here imports torch, so the loop runs with either.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from coterie.inference.base import Engine
from coterie.inference.deployment import Weights
from coterie.lm.chat import TokenizerChat
from coterie.models import LoRAModel
from coterie.training.batch import Batch
from coterie.types import ModelId


@dataclass(slots=True)
class StepStats:
    """What one update did to one policy. Means are over sampled tokens."""

    loss: float = 0.0
    entropy: float = 0.0
    """nats"""
    kl: float = 0.0
    """From the base, nats; 0 when kl_coefficient is 0."""
    magnet_kl: float = 0.0
    """From its magnet, nats; 0 when it has none."""
    mismatch: float = 0.0
    """Mean absolute difference of learner and engine log-probabilities before the step, nats."""
    max_ratio: float = 1.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    tokens: int = 0
    """Sampled tokens that had an alternative."""
    stepped: bool = False


@dataclass(slots=True)
class LearnerStats:
    """What one update did."""

    policies: dict[ModelId, StepStats] = field(default_factory=dict)
    packed_tokens: int = 0
    """Distinct tokens that went through the base, all passes together."""
    recalled_tokens: int = 0
    """Of these, how many rollout had put through the same weights, so that only the way back was computed."""
    naive_tokens: int = 0
    """Tokens one sequence at a time would have needed."""


class Learner(Protocol):
    """Turns a batch into one step of every policy."""

    @property
    def keep_zero(self) -> bool:
        """Whether tokens without advantage still matter to the loss."""
        ...

    def listening(self) -> AbstractContextManager[None]:
        """While an update's episodes are played: what the engine in this process computes may be kept for its step."""
        ...

    def step(self, batch: Batch, update: int) -> LearnerStats:
        """One update of every policy that has terms; `update` counts from 1."""
        ...


class Policies(Protocol):
    """What a run's models are made of."""

    @property
    def untrained(self) -> str:
        """Why no weight can ever move here; empty: weights are trained."""
        ...

    @property
    def scarce(self) -> str:
        """What is to be said before the first update where memory may not suffice; empty: nothing."""
        ...

    @property
    def chat(self) -> TokenizerChat:
        """How prompts become ids."""
        ...

    @property
    def local(self) -> Engine | None:
        """The engine over the same weights, where there are any."""
        ...

    @property
    def weights(self) -> Weights | None:
        """What publication to servers needs; None: only the base can be served."""
        ...

    @property
    def learner(self) -> Learner: ...

    def add(self, model: LoRAModel) -> None:
        """Begin to train a model. Raises `AdapterError` when what it brings does not fit; nothing is changed then."""
        ...

    def remove(self, model_id: ModelId) -> None:
        """Forget a model."""
        ...
