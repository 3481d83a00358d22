"""TRL's `GRPOTrainer` with a PEFT adapter: whole updates, rollout and learning.

spec: model, prompts (each {"user", "ids"}), answers (per prompt), tokens (most of an answer), forced (answers never
end early), rank, dtype ("default": TRL's own settings, which are bfloat16 autocast and gradient checkpointing;
"float32" or "bfloat16": in that, without checkpointing), micro_batch (sequences of one forward and backward pass),
warm_up (whether an update comes first).

The trainer runs its own loop; a callback waits for `go` before a step and reports after it, so that what is timed is
generation, rewards, advantages, forward, backward and the optimizer, as `train()` does them.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

from datasets import Dataset
from peft import LoraConfig
from protocol import Channel, check_ids, versions
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

STEPS = 10_000
"""More than are ever asked for; the callback ends the training."""


def even_share(completions: list[Any], completion_ids: list[list[int]], **others: Any) -> list[float]:
    """The reward: share of even token ids. It varies within a group, so that advantages are not zero."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Steps(TrainerCallback):
    """Holds the trainer between steps."""

    def __init__(self, channel: Channel, facts: dict[str, Any], warm_up: bool) -> None:
        self.channel, self.facts = channel, facts
        self.warming = warm_up
        self.started: float | None = None
        self.trainer: GRPOTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self.warming:
            if state.global_step == 0:
                self.channel.send("ready", self.facts)
            if self.channel.wait("go") is None:
                os._exit(0)  # a step cannot be left out, and nothing is kept
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        assert self.started is not None
        assert self.trainer is not None
        seconds = time.perf_counter() - self.started
        metrics = self.trainer._metrics["train"]
        facts = {
            "seconds": seconds,
            "answer_tokens": metrics["completions/mean_length"][-1],
            "reward_std": metrics["reward_std"][-1],
        }
        if self.warming:
            self.warming = False
            self.channel.send("ready", {**self.facts, "warm_up": facts})
        else:
            self.channel.send("result", facts)


def main(channel: Channel) -> None:
    spec = channel.wait("spec")
    prompts, answers = spec["prompts"], spec["answers"]
    rows = [{"prompt": [{"role": "user", "content": prompt["user"]}]} for prompt in prompts]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rendered = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]
    check_ids([prompt["ids"] for prompt in prompts], rendered)
    sequences = len(prompts) * answers
    own = {}
    if spec["dtype"] != "default":
        own = {"bf16": spec["dtype"] == "bfloat16", "gradient_checkpointing": False}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=sequences // spec["micro_batch"],
        num_generations=answers,
        max_completion_length=spec["tokens"],
        generation_kwargs={"min_new_tokens": spec["tokens"]} if spec["forced"] else None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        shuffle_dataset=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **own,
    )
    made = versions("trl", "peft", "transformers", "torch", "accelerate")
    steps = Steps(channel, {"versions": made, "micro_batch": spec["micro_batch"]}, spec["warm_up"])
    lora = LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=spec["model"],
        reward_funcs=even_share,
        args=config,
        train_dataset=Dataset.from_list(rows * 64),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[steps],
    )
    steps.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    talk = Channel()
    try:
        main(talk)
    except Exception as error:  # noqa: BLE001 - whatever it is, the benchmark must hear of it
        talk.send("error", {"message": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
        raise SystemExit(1) from None
