"""A tiny random Llama with a byte tokenizer, and task files that need no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_models
import yaml
from transformers import PreTrainedTokenizerFast

from dse.models import LoadedModel

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "fast", "over", "hill", "moon", "is", "red", "blue")
END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one that ends a text."""
    return tiny_models.byte_tokenizer((), (END,), eos_token=END)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    return tiny_models.word_tokenizer(WORDS, (END, "<unk>"), eos_token=END)


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, context: int = 64, tied: bool = False) -> LoadedModel:
    """A random two-layer Llama whose answers are far from uniform."""
    return tiny_models.loaded_tiny_model(
        tokenizer=tokenizer,
        seed=5,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


@contextmanager
def watched_inputs(loaded: LoadedModel, shapes: list[tuple[int, int]]) -> Iterator[None]:
    """Record (rows, tokens) of every forward pass within the block."""

    def note(_: object, __: object, keywords: dict[str, Any]) -> None:
        shapes.append(tuple(keywords["input_ids"].shape))

    hook = loaded.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield
    hook.remove()


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 3)) % len(WORDS)] for i in range(length))


TaskWriter = Callable[..., Path]


def task_writer(folder: Path) -> TaskWriter:
    """Return `write(kind, rows=..., name=..., **overrides)`: it writes a task file with data and returns its path."""

    def write(kind: str, rows: int = 12, name: str | None = None, **overrides: Any) -> Path:
        name = name or f"local_{kind}"
        documents = [
            {
                "question": sentence(i, 3 + i % 4),
                "choices": [sentence(i + j, 1 + (i + j) % 3) for j in range(4)],
                "gold": (i * 3) % 4,
                "text": sentence(i, 4 + 9 * (i % 3)),
            }
            for i in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
        config: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **KINDS[kind],
            **overrides,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return path

    return write


def _metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{' ' + choices[0]}}",
        "metric_list": [_metric("perplexity", "perplexity", False), _metric("acc", "mean", True)],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            _metric("word_perplexity", "weighted_perplexity", False),
            _metric("byte_perplexity", "weighted_perplexity", False),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    },
    "generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [_metric("exact_match", "mean", True)],
    },
}
