"""The README.md of an export: what it is, what it saves, how to load it, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dse.design_point import DesignPoint
from dse.export.card_tables import code, measured_figures, table, text
from dse.measurement.environment import package_versions
from dse.report.units import percent
from dse.topology import Topology

__all__ = ["CardContent", "model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}


_LIBRARIES = {"onnx": "onnx", "openvino": "openvino"}
_CODE = {
    "transformers": "`modeling_lowrank.py` of this folder, a short file that you can read first",
    "decilm": "`configuration_decilm.py` and `modeling_decilm.py` of this folder, short files that you can read first",
}

_WRONG_CLASS = {
    "transformers": "does not support factors and would use random weights",
    "decilm": "has every block and would use random weights",
}


@dataclass(frozen=True, eq=False)
class CardContent:
    """The content of a model card.

    Attributes:
        base_model: Name of the dense model.
        revision: Its revision on the hub, if one was named.
        fingerprint: Fingerprint of the dense model's config and weights.
        topology: Topology of the dense model.
        point: The design point.
        format: Name of the export format.
        is_dense: Whether the factors are multiplied out.
        auto_class: The transformers class that loads the folder.
        dtype: Dtype of the weights.
        parameters: Number of parameters in the folder.
        weight_file_bytes: Size of the files that hold weights.
        dense_weight_bytes: Size of the dense model's weights.
        other_bytes: Size of its other files, without this card.
        max_difference: Largest difference on reloading; None if it was not verified.
        tolerance: Largest difference allowed.
        details: `study`, `trial`, `row`, `dense_row`, `environment`, `versions`, `license`; all optional.
    """

    base_model: str
    revision: str | None
    fingerprint: str
    topology: Topology
    point: DesignPoint
    format: str
    is_dense: bool
    auto_class: str
    dtype: str
    parameters: int
    weight_file_bytes: int
    dense_weight_bytes: int
    other_bytes: int
    max_difference: float | None
    tolerance: float
    details: Mapping[str, Any]

    @property
    def reduction(self) -> float:
        """1 - parameters / parameters of the dense model."""
        return 1 - self.parameters / self.topology.parameters_dense


def model_card(content: CardContent) -> str:
    """The card as Markdown with a YAML header."""
    parts = (_front_matter, _introduction, _sizes, _loading, _point, _measured, _provenance)
    return "\n\n".join(section for part in parts if (section := part(content))) + "\n"


def _front_matter(content: CardContent) -> str:
    head: dict[str, Any] = {"library_name": _LIBRARIES.get(content.format, "transformers")}
    if content.auto_class in _PIPELINES:
        head["pipeline_tag"] = _PIPELINES[content.auto_class]
    if _HUB_ID.fullmatch(content.base_model):
        head["base_model"] = content.base_model
    if content.details.get("license"):
        head["license"] = str(content.details["license"])
    head["tags"] = ["low-rank", "compression", "lowrank-dse"]
    return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---"


def _introduction(content: CardContent) -> str:
    name, total = text(content.base_model), len(content.topology.tensors) + len(content.topology.experts)
    count = sum(len(content.topology.tensors_of(name)) for name, _ in content.point.decomposed)
    if not content.point.choices:
        return f"# {name}\n\nThe unmodified dense model: nothing is decomposed."
    changes = [f"{count} of its {total} weight matrices replaced by"] if count else []
    removed, narrow = _removed(content), _narrow(content)
    if content.is_dense:
        parts = [f"{c} low-rank approximations that are multiplied out to dense matrices" for c in changes]
        parts += [f"{narrow}" for _ in (narrow,) if narrow]
        parts += [f"{removed} filled with zeros" for _ in (removed,) if removed]
        return f"# {name}, {_dense_title(content)}\n\n{name} with {' and '.join(parts)}. {_dense_savings(content)}"
    pivoted = sum(choice.is_pivoted for _, choice in content.point)
    share = f" ({pivoted} of them as independent rows or columns)" if pivoted else ""
    parts = [f"{c} products of low-rank factors{share}" for c in changes] + ([narrow] if narrow else [])
    text_of_parts = [f"with {' and '.join(parts)}"] * bool(parts) + [f"without {removed}"] * bool(removed)
    return (
        f"# {name} with {percent(content.reduction)} fewer parameters\n\n"
        f"{name} {' and '.join(text_of_parts)}. It was not retrained."
    )


def _dense_title(content: CardContent) -> str:
    """What the dense form does to the point."""
    if content.point.decomposed:
        return "low-rank factors multiplied out"
    return "narrower MLPs" if content.point.widths else "removed blocks filled with zeros"


def _dense_savings(content: CardContent) -> str:
    """What the dense form saves in comparison with the base model."""
    others = "Use the low-rank form of the export if size or speed matters. It was not retrained."
    if content.reduction > 0:
        return (
            f"It runs wherever the base model runs, and has {percent(content.reduction)} fewer parameters. Its MLPs"
            f" have one width; smaller ones are filled up with zeros. {others}"
        )
    return (
        "It runs wherever the base model runs, and **saves nothing**: it has the same number of parameters, size and"
        f" FLOPs as the base model. {others}"
    )


def _narrow(content: CardContent) -> str:
    """The MLPs of reduced width in words, such as `3 of its 30 MLPs reduced to 512 to 1,016 of their channels`."""
    kept = sorted(set(content.point.widths.values()))
    if not kept:
        return ""
    span = f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} to {kept[-1]:,}"
    return f"{len(content.point.widths)} of its {content.topology.layer_count} MLPs reduced to {span} channels"


def _removed(content: CardContent) -> str:
    """The removed blocks in words, such as `2 of its 24 attention blocks and 1 of its 24 MLP blocks`."""
    roles = [content.topology.blocks_by_name[name].role for name in content.point.removed]
    layers, words = content.topology.layer_count, {"attention": "attention", "mlp": "MLP"}
    return " and ".join(
        f"{roles.count(role)} of its {layers} {word} blocks" for role, word in words.items() if role in roles
    )


def _sizes(content: CardContent) -> str:
    files = f"weights on disk ({text(content.dtype)})"
    dense, here = content.dense_weight_bytes, content.weight_file_bytes
    rows = [
        ("parameters", f"{content.topology.parameters_dense:,}", f"{content.parameters:,}", percent(content.reduction)),
        (files, _megabytes(dense), _megabytes(here), percent(1 - here / dense)),
    ]
    return (
        "## Size\n\n"
        + table(("", "dense model", "this folder", "saved"), rows)
        + "\n\nParameters include embeddings; tied weights count once. The other files (tokenizer, config, code) take"
        + f" {_megabytes(content.other_bytes)}."
    )


def _loading(content: CardContent) -> str:
    if content.format in _LIBRARIES:
        return ""  # the section of verified engines says how to load a graph
    needs_code = content.format in _CODE and not (content.format == "transformers" and content.is_dense)
    remote = ", trust_remote_code=True" if needs_code else ""
    lines = [
        "## How to load it",
        "",
        "```python",
        f"from transformers import {', '.join(sorted((content.auto_class, 'AutoTokenizer')))}",
        "",
        'folder = "path/to/this/folder"',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})",
        f"model = {content.auto_class}.from_pretrained(folder{remote})",
        "```",
    ]
    if needs_code:
        lines += [
            "",
            f"`trust_remote_code=True` runs {_CODE[content.format]}. It needs only torch and transformers (5 or later)."
            " Without it, the folder refuses to load. Do not load it with the base architecture's own class, which"
            f" {_WRONG_CLASS[content.format]}.",
        ]
    return "\n".join(lines)


def _point(content: CardContent) -> str:
    if not content.point.choices:
        return ""
    compact = content.point.compact(content.topology)
    lines = (f"  {json.dumps(name)}: {json.dumps(c.to_json())}" for name, c in content.point)
    body = json.dumps(compact) if compact is not None else '{"tensors": {\n' + ",\n".join(lines) + "\n}}"
    return f"## Design point {content.point.id}\n\n```json\n{body}\n```"


def _measured(content: CardContent) -> str:
    details = content.details
    figures = measured_figures(details.get("row") or {}, details.get("dense_row") or {})
    if not figures:
        return "## Measurements\n\nNo measurements of this point are available."
    hardware = _hardware(details.get("environment"))
    form = " The figures are of the low-rank form, before it was multiplied out." if content.is_dense else ""
    note = f"Measured on {hardware}." if hardware else "The machine was not recorded."
    return f"## Measurements\n\n{figures}\n\n{note}{form} ± and brackets are 95 % intervals unless stated otherwise."


def _hardware(environment: object) -> str:
    """The machine in words, from `dse.measurement.describe_environment`; "" if it says nothing."""
    if not isinstance(environment, Mapping):
        return ""
    parts = []
    for gpu in environment.get("gpus") or ():
        if isinstance(gpu, Mapping) and gpu.get("name"):
            driver = f" (driver {text(gpu['driver_version'])})" if gpu.get("driver_version") else ""
            parts.append(text(gpu["name"]) + driver)
    cpu = environment.get("cpu")
    if isinstance(cpu, Mapping) and cpu.get("model"):
        cores = f", {text(cpu['usable_cores'])} cores" if cpu.get("usable_cores") else ""
        parts.append(text(cpu["model"]) + cores)
    return "; ".join(parts)


def _provenance(content: CardContent) -> str:
    details = content.details
    revision = f", revision {code(content.revision)}" if content.revision else ""
    lines = [f"- Base model: {code(content.base_model)}{revision}, fingerprint {code(content.fingerprint)}"]
    if details.get("study") is not None:
        trial = f", trial {text(details['trial'])}" if details.get("trial") is not None else ""
        lines.append(f"- Study: {text(details['study'])}{trial}")
    if content.format in _LIBRARIES:
        pass  # the section of verified engines says it
    elif content.max_difference is None:
        lines.append("- Not verified by reloading")
    else:
        lines.append(
            "- Verified: reloaded from disk in a process without lowrank-dse; all weights are equal, the largest"
            f" difference of a logit is {content.max_difference:.2g} (allowed: {content.tolerance:.2g})"
        )
    versions = details.get("versions") or package_versions()
    known = [f"{text(name)} {text(version)}" for name, version in versions.items() if version]
    lines.append(f"- Written by lowrank-dse with {', '.join(known)}")
    return "## Provenance\n\n" + "\n".join(lines)


def _megabytes(size_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes} B"
