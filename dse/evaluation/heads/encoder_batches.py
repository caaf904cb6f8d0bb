"""Run encoded texts through a model in batches filled by tokens, longest first, padded to the longest text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dse.evaluation.evaluator_settings import BatchSize, batches
from dse.models import LoadedModel

__all__ = ["EncodedText", "batch_outputs", "encoded_texts"]

EncodedText = Mapping[str, Sequence[int]]
"""Tokenizer output for one text: `input_ids`, `attention_mask`, and `token_type_ids` if the model takes them."""


def encoded_texts(loaded: LoadedModel, encoding: Mapping[str, Any], count: int) -> list[EncodedText]:
    """Split the tokenizer output for `count` texts, keeping the inputs that the model's forward pass accepts."""
    accepted = inspect.signature(loaded.model.forward).parameters
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoding and key in accepted]
    return [{key: encoding[key][index] for key in keys} for index in range(count)]


def batch_outputs(
    loaded: LoadedModel, texts: Sequence[EncodedText], batch_size: BatchSize
) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    """Run texts through the model in its present state.

    Args:
        texts: Encoded texts without padding.
        batch_size: Tokens in a batch, which has at least one text; halved when memory runs out.

    Yields:
        Indices of the texts in the batch, the padded inputs (batch, tokens), and the model's output.

    Raises:
        OutOfMemoryError: The device has no room for a single text.
    """
    tokenizer = loaded.tokenizer
    padding = {
        "input_ids": int(tokenizer.pad_token_id or 0),
        "attention_mask": 0,
        "token_type_ids": int(getattr(tokenizer, "pad_token_type_id", 0)),
    }
    waiting = sorted(range(len(texts)), key=lambda index: -len(texts[index]["input_ids"]))

    def next_batch() -> tuple[list[int], dict[str, Tensor], Any]:
        batch = next(batches(waiting, lambda index: len(texts[index]["input_ids"]), batch_size.tokens))
        longest = len(texts[batch[0]]["input_ids"])
        inputs = {
            key: torch.tensor(
                [[*texts[index][key], *[padding[key]] * (longest - len(texts[index][key]))] for index in batch],
                device=loaded.device,
            )
            for key in texts[batch[0]]
        }
        with torch.inference_mode():
            return batch, inputs, loaded.model(**inputs)

    while waiting:
        batch, inputs, output = batch_size.run(next_batch)
        waiting = waiting[len(batch) :]
        yield batch, inputs, output
