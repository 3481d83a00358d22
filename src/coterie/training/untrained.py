"""A run without torch: models that play and are measured, and of which nothing is ever trained.

Prompts become ids by the base's own tokenizer, so turns can come from servers. Without servers every turn is simulated,
and without a base on disk even the ids are those of no model; then nothing said in such a run means anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from coterie.config import RunConfig
from coterie.errors import BaseModelError
from coterie.lm.catalog import CATALOG
from coterie.lm.chat import TokenizerChat
from coterie.lm.embedded import resolve_base
from coterie.lm.plain import PlainTokenizer, byte_tokenizer, read_tokenizer
from coterie.models import LoRAModel
from coterie.training.base import LearnerStats, StepStats
from coterie.training.batch import Batch
from coterie.types import ModelId


class IdleLearner:
    """See `Learner`. No policy steps, whatever it is given."""

    keep_zero = False

    def listening(self) -> AbstractContextManager[None]:
        """See `Learner.listening`."""
        return nullcontext()

    def step(self, batch: Batch, update: int) -> LearnerStats:
        """See `Learner.step`."""
        return LearnerStats({model_id: StepStats() for model_id in batch.policies})


class UntrainedPolicies:
    """See `Policies`."""

    local = None
    weights = None
    scarce = ""

    def __init__(self, config: RunConfig, missing: Sequence[str]) -> None:
        """`missing`: the packages without which nothing can be trained.

        Raises:
            BaseModelError: the base is not on disk and servers are to be asked, or its tokenizer cannot be read.
        """
        tokenizer, labelled = _tokenizer(config)
        self.chat = TokenizerChat(tokenizer)
        self.learner = IdleLearner()
        why = f"{' and '.join(missing)} cannot be imported (pip install {' '.join(missing)})"
        if config.inference.servers:
            self.untrained = (
                f"NOTHING IS TRAINED: {why}, and gradients are computed in this process. Turns come from servers and "
                "are only measured; no weight moves"
            )
        else:
            self.untrained = (
                f"SIMULATED RESPONSES, NOTHING IS TRAINED: {why}, and no servers are configured. Every answer is made "
                f"up{labelled}; rewards and scores say nothing of any model, and no weight moves"
            )

    def add(self, model: LoRAModel) -> None:
        """See `Policies.add`."""

    def remove(self, model_id: ModelId) -> None:
        """See `Policies.remove`."""


def _tokenizer(config: RunConfig) -> tuple[PlainTokenizer, str]:
    """The base's tokenizer, or one of bytes, and then what is to be said of it."""
    name = config.base.model
    if (Path(name).expanduser() / "tokenizer.json").is_file():
        return read_tokenizer(Path(name).expanduser()), ""  # a model of which only the tokenizer is here will do
    try:
        return read_tokenizer(resolve_base(name, allow_download=False)), ""
    except BaseModelError as error:
        if name not in CATALOG:
            raise
        if config.inference.servers:
            raise BaseModelError(
                f"{error}. Servers are sent token ids, so the base's tokenizer is needed even where nothing is "
                "trained: set base.model to a directory with its tokenizer.json and chat template"
            ) from error
        return byte_tokenizer(), ", under a tokenizer of bytes in the base's place"
