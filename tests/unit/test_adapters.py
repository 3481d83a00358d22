"""Adapters on disk: PEFT reads them, and what does not fit is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from coterie.errors import AdapterError
from coterie.lm.adapter import Adapter
from coterie.lm.adapters import load_adapter, restore_adapter, save_adapter
from coterie.lm.attention import TreePlan
from coterie.lm.base import BaseModel
from coterie.lm.forest import pack
from coterie.lm.tiny import tiny_random
from coterie.types import AdapterVersion
from tests.conftest import MakeBase
from tests.support.disk import no_file_above

VERSION = AdapterVersion("solver", 3)


def _trained(base: BaseModel) -> Adapter:
    adapter = base.bank.add("solver", 4, 12.0, 0)
    with torch.no_grad():
        adapter.flat.add_(0.1 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)))
    return adapter


def _logits(base: BaseModel, adapter: Adapter, tokens: tuple[int, ...]) -> torch.Tensor:
    forest = pack([(0, tokens)])
    plan: TreePlan = forest.plan()
    with torch.no_grad():
        hidden = base.hidden(
            torch.from_numpy(forest.token_ids), torch.from_numpy(forest.positions), plan, [(adapter, 0, len(tokens))]
        )
        return base.logits(hidden)


@pytest.mark.parametrize("layers", [1.0, 0.4], ids=["all layers", "upper layers"])
def test_a_saved_adapter_gives_the_same_logits_in_peft(make_base: MakeBase, tmp_path: Path, layers: float) -> None:
    base = make_base(lora_layers=layers)
    adapter = _trained(base)
    save_adapter(adapter, tmp_path / "v3", base, VERSION)
    tokens = tuple(range(5, 30))
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "v3")
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
        unadapted = base.logits(
            base.hidden(torch.tensor(tokens), torch.arange(len(tokens)), pack([(0, tokens)]).plan(), [])
        )
    ours = _logits(base, adapter, tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - unadapted).abs().max() > 0.01


def test_loading_gives_back_the_weights_bit_by_bit(tiny_base: BaseModel, tmp_path: Path) -> None:
    adapter = _trained(tiny_base)
    save_adapter(adapter, tmp_path / "v3", tiny_base, VERSION)
    again = load_adapter(tmp_path / "v3", tiny_base)
    assert torch.equal(adapter.flat, again.flat)
    assert again.scaling == adapter.scaling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_was_in_use_answers_with_the_weights_it_is_given_back(
    make_base: MakeBase, tmp_path: Path, dtype: str
) -> None:
    base = make_base(dtype=dtype)
    adapter, tokens = _trained(base), tuple(range(30, 45))
    save_adapter(adapter, tmp_path / "v3", base, VERSION)
    saved = _logits(base, adapter, tokens)
    with torch.no_grad():
        adapter.flat.mul_(2.0)
    adapter.touch()
    assert not torch.equal(_logits(base, adapter, tokens), saved)
    restore_adapter(adapter, tmp_path / "v3", base, VERSION)
    assert torch.equal(_logits(base, adapter, tokens), saved)


def test_versions_are_never_overwritten(tiny_base: BaseModel, tmp_path: Path) -> None:
    adapter = _trained(tiny_base)
    save_adapter(adapter, tmp_path / "v3", tiny_base, VERSION)
    with pytest.raises(AdapterError, match="exists already"):
        save_adapter(adapter, tmp_path / "v3", tiny_base, VERSION)


def test_what_a_full_disk_refuses_leaves_nothing_behind(tiny_base: BaseModel, tmp_path: Path) -> None:
    adapter = _trained(tiny_base)
    with no_file_above(1000), pytest.raises(AdapterError, match=r"cannot write adapter .*v3: .*; make room"):
        save_adapter(adapter, tmp_path / "v3", tiny_base, VERSION)
    assert list(tmp_path.iterdir()) == []
    save_adapter(adapter, tmp_path / "v3", tiny_base, VERSION)


def test_an_adapter_of_another_base_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    save_adapter(_trained(base), tmp_path / "v3", base, VERSION)
    other = make_base(model=str(tiny_random(tmp_path / "other", seed=1)))
    with pytest.raises(AdapterError, match="trained on another base"):
        load_adapter(tmp_path / "v3", other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": "many"}, "not a PEFT LoRA adapter"),
        ({"r": 5}, "is of another base"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(
    tiny_base: BaseModel, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    save_adapter(_trained(tiny_base), tmp_path / "v3", tiny_base, VERSION)
    path = tmp_path / "v3" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=said):
        load_adapter(tmp_path / "v3", tiny_base)


def test_missing_and_damaged_files_are_refused(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    with pytest.raises(AdapterError, match="not a PEFT LoRA adapter"):
        load_adapter(tmp_path / "nothing", base)
    save_adapter(_trained(base), tmp_path / "v3", base, VERSION)
    narrow = make_base(lora_targets=("q_proj",))
    with pytest.raises(AdapterError, match="lora_targets"):
        load_adapter(tmp_path / "v3", narrow)
    (tmp_path / "v3" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterError, match="cannot read"):
        load_adapter(tmp_path / "v3", base)


def test_a_target_that_is_no_layer_is_named(make_base: MakeBase) -> None:
    with pytest.raises(AdapterError, match=r"'w_proj' names no linear layer.*q_proj"):
        make_base(lora_targets=("q_proj", "w_proj"))


def test_a_directory_that_cannot_be_read_leaves_no_trace_in_the_bank(tiny_base: BaseModel, tmp_path: Path) -> None:
    tiny_base.bank.add("a", 4, 8.0, 0)
    save_adapter(tiny_base.bank.training("a"), tmp_path / "a", tiny_base, AdapterVersion("a", 1))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"nothing")
    for _ in range(40):  # more than a pool has rows
        with pytest.raises(AdapterError, match="cannot read"):
            load_adapter(tmp_path / "a", tiny_base)
    assert tiny_base.bank.empty(4, 8.0).pool is tiny_base.bank.training("a").pool
