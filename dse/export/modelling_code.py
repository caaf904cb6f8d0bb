"""The modelling file of an export, and the transformers auto classes that load its architecture.

The file is a template plus the source of the library's own modules: each `from dse... import` line of the template is
replaced by the body of that module, so the exported classes and the library's are the same code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Set
from importlib import resources
from types import ModuleType

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from dse.errors import ExportError

__all__ = ["MODELLING_MODULE", "MODEL_TYPE_PREFIX", "auto_classes", "body_of", "modelling_code"]

MODEL_TYPE_PREFIX = "lowrank-"
MODELLING_MODULE = "modeling_lowrank"

_LIBRARY_IMPORTS = re.compile(r"^\n*(?:from dse\S+ import .+\n)+", re.MULTILINE)
_OWN_MODULES = {
    "experts": ("dse.models.plain_attributes", "dse.decomposition.expert_modules"),
    "pivoted": ("dse.decomposition.pivoted_module",),
}

_GENERAL_CLASSES = ("AutoModelForPreTraining", "AutoModel", "AutoModelForTextEncoding")
"""Auto classes that list a model class beside its task-specific one."""


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base model without its head; the model itself if it has no head."""
    body = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    return body if isinstance(body, PreTrainedModel) else model


def modelling_code(
    model_class: type[PreTrainedModel],
    body_class: type[PreTrainedModel],
    config_class: type,
    *,
    has_experts: bool = False,
    joins_heads: bool = False,
    is_pivoted: bool = False,
) -> str:
    """The modelling file for one architecture: the Llama template with the names of the architecture.

    Args:
        model_class: The model's class.
        body_class: The class of the base model without the head; the same for a model without a head.
        config_class: Its config's class.
        has_experts: Whether fused expert tensors are decomposed. Otherwise their code is omitted.
        joins_heads: Whether the config lists `attention_outputs`. Otherwise their code is omitted.
        is_pivoted: Whether a matrix has pivoted factors. Otherwise their code is omitted.
    """
    template = resources.files("dse.export").joinpath("templates", f"{MODELLING_MODULE}.py").read_text(encoding="utf-8")
    sections = {
        "experts": has_experts,
        "head": model_class is not body_class,
        "attention_outputs": joins_heads,
        "pivoted": is_pivoted,
    }
    left_out = {module for section, modules in _OWN_MODULES.items() if not sections[section] for module in modules}
    for section, is_kept in sections.items():
        marked = rf"^ *# </?{section}>\n" if is_kept else rf"^ *# <{section}>\n.*?# </{section}>\n"
        template = re.sub(marked, "", template, flags=re.MULTILINE | re.DOTALL)
    template = _LIBRARY_IMPORTS.sub(lambda match: _library_source(match[0], left_out), template).rstrip() + "\n"
    names = {
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel": _imports(
            {model_class, body_class, config_class}
        ),
        "LlamaForCausalLM": model_class.__name__,
        "LlamaModel": body_class.__name__,
        "self.model": f"self.{model_class.base_model_prefix}",
        "LlamaConfig": config_class.__name__,
        "lowrank-llama": MODEL_TYPE_PREFIX + config_class.model_type,  # type: ignore[attr-defined]
        "Llama model": f"{model_class.__name__.split('For')[0]} model",
    }
    # One pass, so that an inserted name is never replaced again.
    return re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], template)


def auto_classes(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the auto classes that list this model's class, the most specific first.

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
            f"an auto class of transformers must load {model_class.__name__}, but none does; load the model with the"
            f" class for its task, for example AutoModelForCausalLM"
        )
    return tuple(
        sorted(found, key=lambda name: (_GENERAL_CLASSES.index(name) if name in _GENERAL_CLASSES else -1, name))
    )


def _library_source(imports: str, left_out: Set[str]) -> str:
    """The bodies of the modules that the template imports from this package."""
    names = re.findall(r"^from (dse\S+) import", imports, re.MULTILINE)
    modules = [importlib.import_module(name) for name in names if name not in left_out]
    return "".join(f"\n\n{_body(module)}\n" for module in modules)


def _body(module: ModuleType) -> str:
    """A module's source without its docstring, imports and `__all__`."""
    source = inspect.getsource(module)
    header = 0
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)):
            break
        header = node.end_lineno or 0
    return "\n".join(source.splitlines()[header:]).strip()


def _imports(classes: set[type]) -> str:
    by_home: dict[str, list[str]] = {}
    for cls in classes:
        home = "transformers" if getattr(transformers, cls.__name__, None) is cls else cls.__module__
        by_home.setdefault(home, []).append(cls.__name__)
    return "\n".join(f"from {home} import {', '.join(sorted(names))}" for home, names in sorted(by_home.items()))
