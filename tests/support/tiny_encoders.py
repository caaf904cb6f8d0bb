"""Random BERT, RoBERTa and DistilBERT models with each head, and tokenizers that split words into pieces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from dse.models import LoadedModel, topology_of

FAMILIES = ("bert", "roberta", "distilbert")
HEADS: Mapping[str, type] = {
    "masked_lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "embedding": AutoModel,
}
WORDS = (
    "the",
    "cat",
    "cats",
    "sees",
    "a",
    "dog",
    "runs",
    "old",
    "new",
    "sun",
    "moon",
    "in",
    "town",
    "who",
    "is",
    "not",
)
PIECES = ("un", "##likely", "##ed", "##s", "##ing", "look", "walk")


def encoder_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Word pieces with [CLS] and [SEP] for BERT and DistilBERT; one token a byte with <s> and </s> for RoBERTa."""
    if family == "roberta":
        return _byte_tokenizer()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "?", *WORDS, *PIECES]
    core = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])],
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )


def encoder_config(family: str, vocabulary: int, *, context: int = 96, labels: int = 3) -> PreTrainedConfig:
    common = {"vocab_size": vocabulary, "num_labels": labels, "initializer_range": 0.4}
    if family == "distilbert":
        return DistilBertConfig(
            dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=context, pad_token_id=0, **common
        )
    common |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    if family == "roberta":  # positions are numbered from the padding index on
        return RobertaConfig(
            max_position_embeddings=context + 2,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            type_vocab_size=1,
            **common,
        )
    return BertConfig(max_position_embeddings=context, pad_token_id=0, **common)


def encoder_model(
    family: str, head: str, *, seed: int = 3, **config: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = encoder_tokenizer(family)
    torch.manual_seed(seed)
    sizes = {"labels": 2, **config} if head == "question_answering" else config
    model = HEADS[head].from_config(encoder_config(family, len(tokenizer), **sizes))
    return model.eval().requires_grad_(False), tokenizer


def loaded_encoder(family: str, head: str, **config: int) -> LoadedModel:
    model, tokenizer = encoder_model(family, head, **config)
    return LoadedModel(family, None, model, tokenizer, topology_of(model), torch.device("cpu"), torch.float32)


def save_encoder(folder: Path, family: str, head: str, **config: int) -> Path:
    model, tokenizer = encoder_model(family, head, **config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
