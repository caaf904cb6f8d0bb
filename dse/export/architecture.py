"""Which transformers classes load an architecture, and whether it can be exported at all."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from dse.errors import ExportError

__all__ = ["auto_classes"]

# A class may stand in several tables: its task says more than these do.
_GENERAL = ("AutoModelForPreTraining", "AutoModel", "AutoModelForTextEncoding")


def auto_classes(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the auto classes whose table holds this model's class, the most telling first.

    Raises:
        ExportError: The model's code is not part of transformers, or no auto class loads it.
    """
    model_class, config_class = type(model), type(model.config)
    if not (model_class.__module__ + ".").startswith("transformers."):
        raise ExportError(
            f"the architecture must be part of transformers to be exported, but {model_class.__name__} comes with code"
            f" of its own; export a point of the model that transformers itself implements"
        )
    found = []
    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            entry = mapping[config_class]
            if model_class in (entry if isinstance(entry, (tuple, list)) else (entry,)):
                found.append(name)
    if not found:
        raise ExportError(
            f"an auto class of transformers must load {model_class.__name__}, but none does; load the model by the"
            f" class that its task needs, for example AutoModelForCausalLM"
        )
    return tuple(sorted(found, key=lambda name: (_GENERAL.index(name) if name in _GENERAL else -1, name)))
