"""The tiny random model: same seed, same bytes; a tokenizer that behaves like a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.errors import BaseModelError
from coterie.lm.base import BaseModel
from coterie.lm.quiet import quiet_transformers
from coterie.lm.tiny import FAMILIES, tiny_random, tiny_tokenizer


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_seed_decides_the_weights_and_the_global_generator_is_untouched(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first = tiny_random(tmp_path / "a", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = tiny_random(tmp_path / "b", seed=3), tiny_random(tmp_path / "c", seed=4)
    assert weights(first) == weights(again)
    assert weights(first) != weights(other)


def test_heads_can_be_wider_than_their_share(tmp_path: Path, make_base: Callable[..., BaseModel]) -> None:
    base = make_base(model=str(tiny_random(tmp_path, head_dim=32)))
    assert (base.head_dim, base.heads, base.hidden_size) == (32, 4, 64)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loads_in_transformers_with_a_chat_template_that_round_trips(tmp_path: Path, family: str) -> None:
    directory = tiny_random(tmp_path, family=family)  # type: ignore[arg-type]
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.model_type == family
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    chat = [{"role": "user", "content": "pick 42, 协同 or red?"}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = "<|im_start|>user\npick 42, 协同 or red?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encoded["input_ids"][0]) == expected
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == model.generation_config.eos_token_id
    )
    probabilities = model(**encoded).logits.softmax(-1)[0, -1]
    assert 3 / len(tokenizer) < probabilities.max() < 0.5  # uneven, and not degenerate


def test_choices_of_one_token_of_several_and_with_a_common_first_token() -> None:
    tokenizer = tiny_tokenizer()
    left, leftover = tokenizer.encode("left").ids, tokenizer.encode("leftover").ids
    assert len(left) == 1
    assert leftover[:1] == left
    assert len(leftover) > 1
    assert len(tokenizer.encode(" cooperate").ids) == 1
    assert tokenizer.encode("12").tokens == ["1", "2"]


def test_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="unknown family 'mamba'; valid: llama, qwen2, qwen3, mistral, gemma"):
        tiny_random(tmp_path, family="mamba")  # type: ignore[arg-type]


def test_quiet_transformers_restores_the_users_settings() -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    def settings() -> tuple[int, bool, bool]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()

    before = settings()
    logging.set_verbosity_info()
    try:
        noisy = settings()
        with pytest.raises(KeyError, match=rf"{logging.ERROR}, False, True"), quiet_transformers():
            raise KeyError(settings())
        assert settings() == noisy
    finally:
        logging.set_verbosity(before[0])
    assert settings() == before
