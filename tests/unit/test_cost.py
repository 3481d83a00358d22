"""The least a pass must compute: counted by hand, and against torch's own counter on a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from coterie.config import BaseConfig
from coterie.lm.cost import Adapters, DecoderShape, Work, backward_flops, forward_flops, matmul_rate, read_rate

TARGETS = BaseConfig().lora_targets
VOCABULARY = 300
TOKENS = 12


def added(*answers: tuple[Any, ...]) -> Work:
    """The work of (policy, prompt, answer, allowed) answers."""
    work = Work()
    for policy, prompt, answer, allowed in answers:
        work.add(policy, tuple(prompt), tuple(answer), allowed, VOCABULARY)
    return work


def test_one_answer() -> None:
    work = added(("a", (5, 6, 7), (8, 9), None))
    assert work.tokens == {"a": 4}  # the last token's own hidden state is not needed
    assert work.keys == 1 + 2 + 3 + 4
    assert work.rows == 2 * VOCABULARY
    assert (work.sampled, work.naive, work.distinct) == (2, 4, 4)


def test_what_sequences_share_counts_once() -> None:
    work = added(("a", (1, 2), (3, 4, 5), None), ("a", (1, 2), (3, 9, 5), None), ("a", (1, 2, 3), (4, 7), None))
    # 1 2 3 4 | 9; the third asks after 1 2 3 and 1 2 3 4, where the first asked already
    assert work.distinct == 5
    assert work.keys == 1 + 2 + 3 + 4 + 4
    assert work.rows == (1 + 1 + 1 + 1) * VOCABULARY
    assert (work.sampled, work.naive) == (8, 4 + 4 + 4)


def test_policies_share_nothing() -> None:
    work = added(("a", (1, 2), (3,), None), ("b", (1, 2), (3,), None), (None, (1, 2), (3,), None))
    assert work.tokens == {"a": 2, "b": 2, None: 2}
    assert work.rows == 3 * VOCABULARY


def test_forced_tokens_cost_nothing_and_choices_only_their_rows() -> None:
    allowed = ((3,), (4, 5), (6,))
    work = added(("a", (1, 2), (3, 4, 6), allowed), ("a", (1, 2), (3, 5, 6), allowed))
    assert work.distinct == 3  # 1 2 3: what comes after the choice is known
    assert work.rows == 2
    assert added(("a", (1, 2), (3,), ((3,),))).distinct == 0


def shape_of(path: Path) -> DecoderShape:
    return DecoderShape.of(AutoModelForCausalLM.from_pretrained(path).config)


def square(shape: DecoderShape) -> Work:
    """One sequence whose every token sees all others, as a plain implementation computes it and masks afterwards."""
    return Work(tokens={"a": TOKENS}, keys=TOKENS * TOKENS, rows=TOKENS * shape.vocabulary)


def test_a_forward_pass_costs_what_torch_counts(tiny_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.arange(TOKENS)[None])
    shape = shape_of(tiny_path)
    assert shape.layer_weights * shape.layers == sum(
        module.weight.numel() for name, module in model.named_modules() if name.endswith(TARGETS)
    )
    found = forward_flops(shape, square(shape), Adapters({}, TARGETS, shape.layers))
    # transformers' rotary embedding multiplies frequencies by positions, which is no work of the decoder
    assert found == pytest.approx(counted.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("layers", [3, 1])
def test_a_step_of_lora_costs_what_torch_counts(tiny_path: Path, layers: int) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_path, attn_implementation="eager")
    chosen = list(range(3 - layers, 3))
    config = LoraConfig(r=6, target_modules=list(TARGETS), layers_to_transform=chosen, task_type="CAUSAL_LM")
    model = get_peft_model(plain, config)
    with FlopCounterMode(display=False) as counted:
        model(torch.arange(TOKENS)[None]).logits.logsumexp(-1).sum().backward()
    shape = shape_of(tiny_path)
    adapters = Adapters({"a": 6}, TARGETS, layers)
    found = forward_flops(shape, square(shape), adapters) + backward_flops(shape, square(shape), adapters)
    assert found == pytest.approx(counted.get_total_flops(), rel=1e-3)


def test_ranks_and_adapted_layers_count() -> None:
    shape = DecoderShape(4, 64, 128, 4, 2, 16, VOCABULARY)
    work = added(("a", (1, 2), (3,), None), ("b", (1, 2), (3,), None))
    cost = [
        forward_flops(shape, work, Adapters({"a": rank}, targets, layers))
        for rank, targets, layers in ((0, TARGETS, 4), (8, TARGETS, 4), (8, TARGETS, 2), (8, ("q_proj",), 4))
    ]
    whole, half, queries = (value - cost[0] for value in cost[1:])
    assert whole == 2 * half == 2.0 * 8 * 2 * 4 * sum(sum(shape.linear[name]) for name in TARGETS)
    assert queries == 2.0 * 8 * 2 * 4 * (64 + 64)
    assert backward_flops(shape, work, Adapters({"a": 8}, TARGETS, 0)) == 0


def test_rates_are_of_this_processor() -> None:
    cpu = torch.device("cpu")
    started = matmul_rate(torch.float32, cpu, seconds=0.02)
    assert 1e8 < started < 1e15
    assert 1e7 < read_rate(cpu, seconds=0.01) < 1e13
