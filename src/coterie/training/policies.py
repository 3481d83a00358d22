"""The models of a run as weights: one frozen base, an adapter for each model, an engine and a learner over both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from coterie.capacity import free_memory, whole_memory
from coterie.config import RunConfig
from coterie.credit.base import Magnet
from coterie.errors import AdapterError
from coterie.inference.canary import Probe, probe_ids
from coterie.inference.deployment import Weights
from coterie.inference.local.engine import LocalEngine
from coterie.lm.adapters import restore_adapter, save_adapter
from coterie.lm.base import load_base
from coterie.lm.chat import TokenizerChat
from coterie.lm.forest import pack
from coterie.models import LoRAModel
from coterie.training.learner import Learner
from coterie.types import AdapterVersion, ModelId, Observation

PROBE_QUESTION = "Say which of these is a colour: stone, blue, seven."
"""Of the canary that tells whether a server applies an adapter as the learner does."""


class TrainedPolicies:
    """See `Policies`."""

    untrained = ""

    def __init__(
        self,
        config: RunConfig,
        models: Iterable[LoRAModel],
        seed_of: Callable[[ModelId], int],
        magnet: Magnet | None = None,
    ) -> None:
        """
        Args:
            seed_of: of a new model's adapter.
            magnet: of credit schemes that hold every policy near one.

        Raises:
            BaseModelError: the base cannot be found or used.
            AdapterError: the saved adapter of a model that goes on does not fit it or the base.
        """
        models = list(models)
        self.base = load_base(config.base)
        self._seed_of = seed_of
        for model in models:
            self._give_adapter(model)
        kept_bytes = _kept_bytes(config, self.base.device)
        self.scarce = scarcity(kept_bytes, free_memory())
        self.local = LocalEngine(
            self.base,
            cache_tokens=config.engine.cache_tokens,
            tokens_per_pass=config.engine.tokens_per_pass,
            kept_versions=config.inference.staleness,
            kept_bytes=kept_bytes,
        )
        configs = [model.config for model in models]
        self.learner = Learner(self.base, configs, config.learner, config.updates, magnet, self.local.kept)
        self.weights = Weights(save=self.save, probe=self.probe)

    @property
    def chat(self) -> TokenizerChat:
        """See `Policies.chat`."""
        return self.base.chat

    def add(self, model: LoRAModel) -> None:
        """See `Policies.add`."""
        self._give_adapter(model)
        self.learner.add(model.config)

    def remove(self, model_id: ModelId) -> None:
        """See `Policies.remove`."""
        self.learner.remove(model_id)
        self.base.bank.remove(model_id)

    def save(self, version: AdapterVersion, directory: Path) -> None:
        """Write a model's adapter as it is now, in PEFT's format."""
        save_adapter(self.base.bank.training(version.model_id), directory, self.base, version)

    def probe(self, version: AdapterVersion) -> Probe:
        """What the adapter in training answers to a fixed question, for a server's canary."""
        base = self.base
        prompt = base.chat.render(Observation(user=PROBE_QUESTION))
        allowed = probe_ids(prompt, without=base.chat.stop_ids)
        forest = pack([(0, prompt)])
        with torch.no_grad():
            hidden = base.hidden(
                torch.from_numpy(forest.token_ids).to(base.device),
                torch.from_numpy(forest.positions).to(base.device),
                forest.plan(),
                [(base.bank.training(version.model_id), 0, len(prompt))],
            )
            logits = base.logits(hidden[-1:], torch.tensor(allowed, device=base.device))
        return Probe(prompt, allowed, tuple(logits.log_softmax(-1)[0].tolist()))

    def _give_adapter(self, model: LoRAModel) -> None:
        """An adapter in training: the one saved where the model stands, or, for a new model, one equal to the base.

        Raises:
            AdapterError: the saved one does not fit; the bank is then as it was.
        """
        c, base = model.config, self.base
        adapter = base.bank.add(c.model_id, c.lora_rank, c.lora_alpha, self._seed_of(c.model_id))
        if model.version and model.adapter_dir is not None:
            try:
                restore_adapter(adapter, model.adapter_dir, base, model.adapter)
            except AdapterError:
                base.bank.remove(c.model_id)
                raise
        base.bank.publish(model.adapter)


def _kept_bytes(config: RunConfig, device: torch.device) -> int:
    """See `EngineConfig.activations_mb`; none for a learner that checkpoints, which asks for nothing."""
    if config.learner.gradient_checkpointing:
        return 0
    if config.engine.activations_mb is not None:
        return config.engine.activations_mb * 10**6
    # of all memory, not of what is free: two runs of one seed on one machine are then the same to the last bit
    return 0 if device.type != "cpu" else (whole_memory() or 0) // 4


def scarcity(kept_bytes: int, free_bytes: int | None) -> str:
    """See `Policies.scarce`."""
    if free_bytes is None or kept_bytes <= free_bytes:
        return ""
    return (
        f"of an update's activations up to {kept_bytes / 1e9:.1f} GB are kept from rollout to learning, but only "
        f"{free_bytes / 1e9:.1f} GB of memory are free; end other programs, or set engine.activations_mb lower"
    )
