"""A whole study in seconds, offline: a tiny model, a small multiple-choice task and a study file."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tiny_models import WORDS

DOCUMENTS = 24


def save_choice_task(folder: Path, *, documents: int = DOCUMENTS, name: str = "tiny_choice") -> Path:
    """Write a multiple-choice task as a YAML file of lm-eval, with its data in the same folder."""
    generator = random.Random(name)
    rows = [
        {
            "question": " ".join(generator.choices(WORDS, k=4)),
            "choices": [" ".join(generator.choices(WORDS, k=2)) for _ in range(4)],
            "gold": generator.randrange(4),
        }
        for _ in range(documents)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def tiny_study(folder: Path, **changes: Any) -> dict[str, Any]:
    """A valid study of `folder/model` and `folder/tiny_choice.yaml`; its results do not depend on timing."""
    study: dict[str, Any] = {
        "name": "tiny",
        "model": {"ref": str(folder / "model"), "device": "cpu"},
        "space": {
            "name": "tiny_space",
            "methods": ["svd"],
            "groups": {
                "layers": 1,
                "roles": {"attention": ["query", "key", "value", "attention_output"], "mlp": ["up"]},
            },
            "ranks": {"absolute": [2, 6]},
            "limits": {"reduction": {"min": 0.02, "max": 0.5}},
        },
        "objectives": ["accuracy", "parameters"],
        "tasks": [str(folder / "tiny_choice.yaml")],
        "evaluation": {"batch_size": 64},
        "measurement": {
            "prompt_tokens": 8,
            "new_tokens": 2,
            "blocks": 2,
            "warmup_blocks": 0,
            "max_warmup_blocks": 0,
            "precision": None,
        },
        "sampler": {"name": "random", "seed": 1},
        "budget": {"trials": 5},
    }
    return merged(study, changes)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; the sections sampler, budget, evaluation and measurement are merged key by key."""
    result = dict(base)
    for key, value in changes.items():
        is_section = key in ("sampler", "budget", "evaluation", "measurement") and isinstance(value, dict)
        result[key] = {**result[key], **value} if is_section else value
    return result


def write_study(path: Path, study: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(study), sort_keys=False), encoding="utf-8")
    return path


def environment(cache: Path) -> dict[str, str]:
    """Environment of a subprocess: offline, its own caches, one thread."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache / "hf"), "DSE_CACHE": str(cache / "dse")}
    return {**os.environ, **offline, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
