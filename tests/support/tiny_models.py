"""Tiny random models of every family, with tokenizers: built in milliseconds, offline.

A family is named by its `model_type` in transformers. Every size can be changed by keyword, under the name that most
configs use (`num_hidden_layers=2` also works for GPT-2, whose config calls it `n_layer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dse.models import LoadedModel, topology_of

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = ("the", "a", "cat", "dog", "sun", "moon", "sees", "runs", "likes", "finds", "red", "blue", "old", "new", "on")
HEADS: Mapping[str, Any] = {
    "causal_lm": hf.AutoModelForCausalLM,
    "seq2seq": hf.AutoModelForSeq2SeqLM,
    "masked_lm": hf.AutoModelForMaskedLM,
    "classification": hf.AutoModelForSequenceClassification,
    "question_answering": hf.AutoModelForQuestionAnswering,
    "embedding": hf.AutoModel,
}


@dataclass(frozen=True)
class Family:
    """How to build the tiny model of one family.

    Attributes:
        config: Its config class.
        settings: What it needs beside `SIZES`.
        head: The head that it has unless a test asks for another one.
    """

    config: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    head: str = "causal_lm"


GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
"""The head dimension is not hidden_size / heads, as in most models with this setting."""
ENCODER = {"intermediate_size": 48, "pad_token_id": 0}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "pad_token_id": 0, "initializer_range": 0.3}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(hf.LlamaConfig, GROUPED),
    "mistral": Family(hf.MistralConfig, GROUPED),
    "qwen2": Family(hf.Qwen2Config, GROUPED),
    "qwen3": Family(hf.Qwen3Config, WIDE),
    "smollm3": Family(hf.SmolLM3Config, {**GROUPED, "pad_token_id": 0}),
    "gemma": Family(hf.GemmaConfig, WIDE),
    "gemma2": Family(hf.Gemma2Config, WIDE),
    "gemma3_text": Family(hf.Gemma3TextConfig, WIDE),
    "olmo": Family(hf.OlmoConfig, GROUPED),
    "olmo2": Family(hf.Olmo2Config, GROUPED),
    "phi": Family(hf.PhiConfig, {"intermediate_size": 48}),
    "phi3": Family(hf.Phi3Config, {**GROUPED, "pad_token_id": 0}),
    "cohere": Family(hf.CohereConfig, GROUPED),
    "granite": Family(hf.GraniteConfig, GROUPED),
    "gpt_neox": Family(hf.GPTNeoXConfig, {"intermediate_size": 48}),
    "gpt2": Family(hf.GPT2Config, {"n_inner": 48}),
    "opt": Family(hf.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 24, "pad_token_id": 0}),
    "bloom": Family(hf.BloomConfig),
    "falcon": Family(hf.FalconConfig),
    "mamba": Family(hf.MambaConfig, {"state_size": 4, "pad_token_id": 0}),
    # 4 experts, 2 for each token; gate_up 4 x 96 x 32, down 4 x 32 x 48.
    "mixtral": Family(hf.MixtralConfig, {**EXPERTS, "num_local_experts": 4}),
    # 6 experts, 3 for each token; gate_up 6 x 48 x 32, down 6 x 32 x 24.
    "qwen3_moe": Family(
        hf.Qwen3MoeConfig,
        {**EXPERTS, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    ),
    "qwen2_moe": Family(
        hf.Qwen2MoeConfig,
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "olmoe": Family(hf.OlmoeConfig, {**EXPERTS, "num_experts": 4}),
    "granitemoe": Family(hf.GraniteMoeConfig, {**EXPERTS, "num_local_experts": 4}),
    "deepseek_v3": Family(hf.DeepseekV3Config, {**EXPERTS, "num_key_value_heads": 4, "moe_intermediate_size": 24}),
    "gpt_oss": Family(hf.GptOssConfig, {**EXPERTS, "head_dim": 16, "num_local_experts": 4}),
    "llama4_text": Family(
        hf.Llama4TextConfig, {**EXPERTS, "head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 4}
    ),
    "bert": Family(hf.BertConfig, ENCODER, "masked_lm"),
    # RoBERTa numbers positions from the padding index on: 64 tokens need 66 positions.
    "roberta": Family(
        hf.RobertaConfig,
        {**ENCODER, "pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 66, "type_vocab_size": 1},
        "masked_lm",
    ),
    "albert": Family(hf.AlbertConfig, {**ENCODER, "embedding_size": 16}, "masked_lm"),
    "distilbert": Family(hf.DistilBertConfig, {"hidden_dim": 48, "pad_token_id": 0}, "masked_lm"),
    "t5": Family(hf.T5Config, {"d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0}, "seq2seq"),
}
EXPERT_FAMILIES = ("mixtral", "qwen3_moe")
EXPERT_ROLES = ["expert_gate_up", "expert_down"]
ENCODER_FAMILIES = ("bert", "roberta", "distilbert")


# --- models ---------------------------------------------------------------------------------------------------------


def tiny_config(family: str = "llama", **changes: Any) -> hf.PreTrainedConfig:
    """The config of a family's tiny model, with these settings changed."""
    config_class = FAMILIES[family].config
    settings = {**SIZES, **FAMILIES[family].settings, **changes}
    return config_class(**{config_class.attribute_map.get(name, name): value for name, value in settings.items()})


def tiny_model(family: str = "llama", *, head: str | None = None, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
    """A random model in evaluation mode that needs no gradients; the same seed and settings give the same weights."""
    torch.manual_seed(seed)
    model = HEADS[head or FAMILIES[family].head].from_config(tiny_config(family, **changes))
    return model.eval().requires_grad_(False)


def with_random_vectors(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Add noise to norms and biases: their initial ones and zeros would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def as_loaded(
    model: hf.PreTrainedModel,
    tokenizer: Any = None,
    *,
    ref: str = "tiny",
    role_names: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """A model as `load_model` returns it, on the CPU; its tokenizer is `byte_tokenizer` unless one is given."""
    model.eval().requires_grad_(False).to(dtype)  # type: ignore[arg-type]
    topology = topology_of(model, None if role_names is None else dict(role_names))
    return LoadedModel(ref, None, model, tokenizer or byte_tokenizer(), topology, torch.device("cpu"), dtype)


def loaded_tiny_model(
    family: str = "llama", *, tokenizer: Any = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> LoadedModel:
    """`tiny_model` as `load_model` returns it."""
    return as_loaded(tiny_model(family, **changes), tokenizer, ref=family, dtype=dtype)


def save_tiny_model(
    folder: Path, family: str = "llama", *, tokenizer: Any = None, seed: int = 5, **changes: Any
) -> Path:
    """Write config, safetensors and tokenizer (`word_tokenizer` unless one is given); returns `folder`.

    The weights are large enough that the model's answers are far from uniform.
    """
    tokenizer = tokenizer or word_tokenizer()
    settings = {"vocab_size": len(tokenizer), "initializer_range": 0.3, **changes}
    tiny_model(family, seed=seed, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- tokenizers -----------------------------------------------------------------------------------------------------


class LetterTokenizer:
    """One token per character, ids below 60: enough for calibration, which only reads `input_ids`."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}


def byte_tokenizer(
    before: Sequence[str] = ("<pad>", "<s>", "</s>", "<mask>"), after: Sequence[str] = (), **special: str
) -> hf.PreTrainedTokenizerFast:
    """One token per byte: reads any text, and its ids fit every tiny model.

    Args:
        before: Special tokens with the first ids.
        after: Special tokens with the last ids.
        special: Their roles, such as `eos_token="</s>"`; by default those of `before`'s default.
    """
    tokens = [*before, *sorted(pre_tokenizers.ByteLevel.alphabet()), *after]
    core = Tokenizer(models.BPE(_numbered(tokens), [], unk_token="<unk>" if "<unk>" in tokens else None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    default = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return _fast(core, special or default)


def word_tokenizer(
    words: Sequence[str] = WORDS, before: Sequence[str] = ("<unk>", "<s>", "</s>"), **special: str
) -> hf.PreTrainedTokenizerFast:
    """One token per word, unknown words share `<unk>`; arguments as of `byte_tokenizer`."""
    core = Tokenizer(models.WordLevel(_numbered([*before, *words]), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(core, {"unk_token": "<unk>", **(special or {"bos_token": "<s>", "eos_token": "</s>"})})


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _fast(core: Tokenizer, special: Mapping[str, str], **keywords: Any) -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **special, **keywords)  # type: ignore[no-untyped-call]


# --- encoders -------------------------------------------------------------------------------------------------------

ENCODER_WORDS = (
    "the", "cat", "cats", "sees", "a", "dog", "runs", "old", "new", "sun", "moon", "in", "town", "who", "is", "not"
)  # fmt: skip
WORD_PIECES = ("un", "##likely", "##ed", "##s", "##ing", "look", "walk")


def encoder_tokenizer(family: str) -> hf.PreTrainedTokenizerFast:
    """Word pieces with [CLS] and [SEP] for BERT and DistilBERT; bytes with <s> and </s> for RoBERTa."""
    if family == "roberta":
        names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>"}
        special = {f"{role}_token": token for role, token in {**names, "mask": "<mask>"}.items()}
        tokenizer = byte_tokenizer(("<s>", "<pad>", "</s>", "<unk>", "<mask>"), **special)
        tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", 2), ("<s>", 0), add_prefix_space=False
        )
        return tokenizer
    special = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    tokens = [*special.values(), ".", ",", "?", *ENCODER_WORDS, *WORD_PIECES]
    core = Tokenizer(models.WordPiece(_numbered(tokens), unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])]
    return _fast(core, special, model_input_names=inputs)


def _encoder_settings(family: str, head: str, tokenizer: Any, context: int, labels: int) -> dict[str, Any]:
    return {
        "head": head,
        "seed": 3,
        "vocab_size": len(tokenizer),
        "num_labels": 2 if head == "question_answering" else labels,
        "initializer_range": 0.4,
        "max_position_embeddings": context + (2 if family == "roberta" else 0),
    }


def loaded_encoder(family: str, head: str, *, context: int = 96, labels: int = 3, **changes: Any) -> LoadedModel:
    """An encoder with one of `HEADS` and its tokenizer; `context` is the number of tokens it reads."""
    tokenizer = encoder_tokenizer(family)
    settings = _encoder_settings(family, head, tokenizer, context, labels)
    return loaded_tiny_model(family, tokenizer=tokenizer, **{**settings, **changes})


def save_encoder(folder: Path, family: str, head: str, *, context: int = 96, labels: int = 3) -> Path:
    """`loaded_encoder` in a folder."""
    tokenizer = encoder_tokenizer(family)
    settings = _encoder_settings(family, head, tokenizer, context, labels)
    return save_tiny_model(folder, family, tokenizer=tokenizer, **settings)
