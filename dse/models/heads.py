"""The head on top of a model's layers, and the class that loads a checkpoint with a requested head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

__all__ = ["Head", "checkpoint_has_head", "context_tokens", "head_of", "model_factory"]

Head = Literal["causal_lm", "masked_lm", "classification", "question_answering", "embedding"]

_AUTO_CLASSES: Mapping[Head, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
}
# A class may be in several tables, so the most specific table comes first.
_TABLES: Mapping[Head, Any] = {
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "question_answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "embedding": modeling_auto.MODEL_MAPPING_NAMES,
}


def head_of(model_class: type) -> Head | None:
    """The head of a transformers class or of a class derived from one; None for any other head.

    A class without a head counts as `embedding`, because its hidden states are used as embeddings.
    """
    for base in model_class.__mro__:
        for head, table in _TABLES.items():
            if any(base.__name__ in ((entry,) if isinstance(entry, str) else entry) for entry in table.values()):
                return head
    return None


def model_factory(config: PreTrainedConfig, trust_remote_code: bool, head: Head | None = None) -> Any:
    """The class to build.

    Args:
        config: The checkpoint's config.
        trust_remote_code: Whether classes that come with the checkpoint may be used.
        head: The required head. None for the class named in the config, or else an auto class that fits.
    """
    custom = getattr(config, "auto_map", None) or {}
    if trust_remote_code and custom:
        offered = [auto for auto in ([_AUTO_CLASSES[head]] if head else _AUTO_CLASSES.values()) if auto in custom]
        # `auto_map` may name several classes; `architectures` names the one that was saved.
        saved = [auto for auto in offered if str(custom[auto]).rpartition(".")[2] in (config.architectures or ())]
        if offered:
            return getattr(transformers, (saved or offered)[0])
    named = _named_class(config)
    if named is not None and (head is None or head_of(named) == head):
        return named
    if head is not None:
        return getattr(transformers, _AUTO_CLASSES[head])
    if type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and not (
        config.is_encoder_decoder or getattr(config, "is_decoder", False)
    ):
        return transformers.AutoModelForMaskedLM
    is_causal = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel


def checkpoint_has_head(config: PreTrainedConfig, head: Head) -> bool:
    """Whether the class named in the config can have this head; False only if it certainly does not.

    An embedding needs no head, so any checkpoint will do.
    """
    named = _named_class(config)
    return head == "embedding" or named is None or head_of(named) == head


def context_tokens(model: nn.Module) -> int | None:
    """The longest sequence that the model's position embeddings allow, special tokens included; None if unbounded.

    RoBERTa counts positions from its padding index, so the first rows are never used.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            return longest - padding - 1
    return longest


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    for name in config.architectures or ():
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    return None
