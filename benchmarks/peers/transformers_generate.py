"""`transformers.generate`, on the bare base or with PEFT's mixed adapters (one adapter name a row).

spec: model, sets (of prompts, lists of token ids of one length), tokens (each answer's length), dtype, adapters
(directories in PEFT format; none: the bare base), warm_up (whether the work is done once before). go: {"set": which
prompts, "adapters": how many the rows take turns with}.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch
from peft import PeftModel
from protocol import Facts, Repetition, serve, timed, versions, warmed
from transformers import AutoModelForCausalLM, GenerationConfig


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    for number, directory in enumerate(spec["adapters"]):
        if number == 0:
            model = PeftModel.from_pretrained(model, directory, adapter_name="adapter_0")
        else:
            model.load_adapter(directory, adapter_name=f"adapter_{number}")
    model.eval()
    tokens = spec["tokens"]
    # no end of text, so that every row has the same length; the whole vocabulary at temperature 1
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0, eos_token_id=None
    )
    model.generation_config = how

    def repeat(asked: Facts) -> Facts:
        ids = torch.tensor(spec["sets"][asked["set"]])
        count = asked["adapters"]
        names = {"adapter_names": [f"adapter_{row % count}" for row in range(len(ids))]} if count else {}

        def work() -> Facts:
            with torch.inference_mode():
                made = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how, **names
                )
            return {"answer_tokens": made.numel() - ids.numel()}

        return timed(work)

    return {"versions": versions("transformers", "peft", "torch"), **warmed(spec, repeat)}, repeat


if __name__ == "__main__":
    serve(prepare)
