"""A tiny random language model made on the spot: the stand-in for a base model where only the arithmetic matters.

It has everything a real base has (grouped-query attention, tied embeddings, a byte-level BPE tokenizer with tokens of
several characters, a chat template, an end-of-turn token) at a thousandth of the size, so tests of engine and learner
run in milliseconds. Its answers mean nothing. The same seed gives the same weights bit for bit, whatever the state of
torch's global generator, which is left as it was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coterie.errors import BaseModelError
from coterie.lm.quiet import quiet_transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Family = Literal["llama", "qwen2", "qwen3", "mistral", "gemma"]

FAMILIES: dict[str, str] = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mistral": "MistralConfig",
    "gemma": "GemmaConfig",
}
"""Family -> its config class in transformers. Against llama, qwen2 has biases on q, k and v; qwen3 normalises queries
and keys per head; gemma scales embeddings, adds one to the weights of its norms, and has GELU gates."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Words that become single tokens; all others fall into pieces. That gives choices of one token, of several, and with a
# common first token ("left", "leftover"), all of which a token trie must handle.
_WORDS = (
    "system", "user", "assistant", " the", " a", " of", " to", " and", " is", " you", " are", " in",
    "yes", "no", " yes", " no", "red", "reduce", " red", "blue", " blue", "green", " green",
    "cooperate", "defect", " cooperate", " defect", "stag", "hare", "heads", "tails", "left", "right",
    "answer", " answer", "question", "choose", " choose", "true", "false", "task", " task", "team", " team",
)  # fmt: skip


def tiny_random(directory: Path, *, seed: int = 0, family: Family = "llama", head_dim: int = 16) -> Path:
    """Write a tiny random model and its tokenizer in Hugging Face format.

    float32, hidden 64, 3 layers, 4 heads, 2 key/value heads, tied embeddings, context 2048; 0.14M parameters.

    Args:
        directory: Where to write; made when missing. Files of an earlier call are overwritten.
        seed: Of the weights; the tokenizer is always the same.
        family: Architecture, one of `FAMILIES`.
        head_dim: Of an attention head; vLLM's CPU build takes multiples of 32 only.

    Returns:
        `directory`.

    Raises:
        BaseModelError: unknown family.
    """
    if family not in FAMILIES:
        raise BaseModelError(f"tiny_random: unknown family {family!r}; valid: {', '.join(FAMILIES)}")
    import torch
    import transformers

    tokenizer = tiny_tokenizer()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=TURN_END,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    options: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
        "dtype": "float32",
    }
    if family in ("qwen3", "gemma") or head_dim != 16:
        options["head_dim"] = head_dim
    if family == "mistral":
        options["sliding_window"] = None
    config = getattr(transformers, FAMILIES[family])(**options)
    # The constructor draws its own initial weights from the global generator; they are replaced below.
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_((0 if family == "gemma" else 1) + 0.1 * noise)
            elif "embed" in name or parameter.ndim == 1:
                # Wide enough that next-token probabilities are clearly uneven (logits of deviation about 1).
                parameter.copy_(0.125 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(directory)
        fast.save_pretrained(directory)
    return directory


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE over all 256 bytes plus the merges of `_WORDS`; digits stand alone, special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((END_OF_TEXT, TURN_START, TURN_END, *alphabet))}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        # Join what the merges so far make of the word; later merges rank lower, so it stays one token.
        letters = word.replace(" ", "Ġ")  # the byte-level alphabet writes a space as Ġ
        first, *rest = (token.value for token in models.BPE(vocab=vocabulary, merges=merges).tokenize(letters))
        for piece in rest:
            merges.append((first, piece))
            first += piece
            vocabulary.setdefault(first, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    return tokenizer
