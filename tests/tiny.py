"""Tiny random models of ten architectures and a byte-level tokenizer, made in memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from driftlens.models import LensModel

VOCAB = 300
TEXT = [
    "The Eiffel Tower is located in the city of Paris.",
    "The Louvre is a museum in the city of Rome. The capital of France is Paris.",
    "Ada Lovelace wrote about the mother tongue of Charles Babbage, who was English.",
]

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
}

CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(**_GPT),
    "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SHARED, max_position_embeddings=128),
    "llama": lambda: hf.LlamaConfig(**_SHARED, num_key_value_heads=2),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "mistral": lambda: hf.MistralConfig(**_SHARED, num_key_value_heads=2, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**_SHARED, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**_SHARED, num_key_value_heads=2, head_dim=8),
    "phi": lambda: hf.PhiConfig(**_SHARED),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **{**_SHARED, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
    ),
}
ARCHITECTURES = sorted(CONFIGS)


def hf_model(
    architecture: str, seed: int = 0, scale: float = 5.0, noise: float = 0.0, **changes: Any
) -> Any:
    """A random model, scaled up so that its attention is far from uniform.

    Args:
        architecture: One of ``ARCHITECTURES``.
        seed: The same seed gives the same weights.
        scale: Factor of all matrices; 12 makes edits move attention by tenths.
        noise: Standard deviation of what is added to biases and norm weights, which a fresh
            model has at exactly 0 or 1.
        changes: Other values of the configuration, e.g. ``sliding_window=12``.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
            else:
                parameter.add_(noise * torch.randn_like(parameter))
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Such a norm undoes the scaling, so the norm itself is scaled.
                parameter.add_(scale / 5.0 - 1.0)
    return model


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer without BOS."""
    return _train(bos=False)


@cache
def bos_tokenizer() -> Any:
    """The same tokenizer, prepending ``<s>``."""
    return _train(bos=True)


def _train(bos: bool) -> Any:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def likely(model: LensModel, prompt: str, rank: int = 0) -> str:
    """A likely answer of one token; longer ones have next to no probability in such models."""
    logits = model.run(torch.tensor([model.tokens.encode(prompt).ids]))[0, -1]
    texts = [model.tokens.decode([i]).strip() for i in logits.argsort(descending=True).tolist()]
    good = [t for t in texts if t.isalpha() and len(model.tokens.target_ids(t)) == 1]
    return list(dict.fromkeys(good))[rank]
