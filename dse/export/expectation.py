"""The expectation of an export: the outputs, weights and tokens that a reload must reproduce."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dse.errors import ExportError
from dse.export.modelling_code import body_of
from dse.export.reload_check import EXPECTED_FILE, EXPECTED_TENSORS, main_output, tensor_digests, token_ids
from dse.models import LoadedModel

__all__ = ["FLOAT32_TOLERANCE", "Expectation", "half_precision_tolerance", "probe_batches", "write_expectation"]

FLOAT32_TOLERANCE = 1e-4
"""Largest absolute difference of a logit allowed in float32.

For multiplied-out factors it is per unit of the largest logit: rounding differs between a product and its factors, and
grows with every merged matrix.
"""

_HALF_STEPS = 4
_MAX_PROBE_TOKENS = 24
_PADDED_TOKENS = 3
_TEXTS = (
    "The quick brown fox jumps over the lazy dog; 3.14 + 1 = 4.14.",
    "def area(radius):\n\treturn 3 * radius  ** 2\n\n\n",
    "naïve café, 東京, Ελλάδα, 😀",
)


@dataclass(frozen=True)
class Expectation:
    """A folder with the data that the reload is compared with.

    Attributes:
        folder: Holds the probe inputs, the outputs, a digest of every weight, and the token ids of a few texts.
        tolerance: Largest absolute difference of an output that counts as equal.
    """

    folder: Path
    tolerance: float


def probe_batches(model: PreTrainedModel, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Seeded random tokens: a single sequence, and a batch of two sequences of which the second is padded.

    Returns:
        (input_ids, attention_mask) pairs, int64, on the CPU.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 2 * _MAX_PROBE_TOKENS
    length = max(1, min(_MAX_PROBE_TOKENS, longest // 2))
    generator = torch.Generator().manual_seed(seed)
    alone = torch.randint(config.vocab_size, (1, length), generator=generator)
    pair = torch.randint(config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(pair)
    padding = getattr(config, "pad_token_id", None)
    if length > _PADDED_TOKENS:
        mask[1, -_PADDED_TOKENS:] = 0
        pair[1, -_PADDED_TOKENS:] = padding or 0
    batches = [(alone, torch.ones_like(alone)), (pair, mask)]
    # A decoder that classifies reads the last token before the padding, and refuses a batch without a padding token.
    reads_last = padding is None and type(model).__name__.endswith("ForSequenceClassification")
    return batches[:1] if reads_last else batches


def write_expectation(
    loaded: LoadedModel, state: Mapping[str, Tensor], auto_class: str, folder: Path, *, is_plain: bool
) -> Expectation:
    """Run the resident model, to which the point is applied, and write its outputs to `folder`.

    Args:
        loaded: The model with the point applied.
        state: Every weight of the reloaded model by name; shared weights under each of their names.
        auto_class: The transformers class that will load the export, for example `AutoModelForCausalLM`.
        folder: An existing, empty folder.
        is_plain: Whether the export must load without remote code.

    Raises:
        ExportError: The decomposed model's outputs are not finite.
    """
    batches = probe_batches(loaded.model)
    body = body_of(loaded.model)
    tensors: dict[str, Tensor] = {}
    for i, (input_ids, attention_mask) in enumerate(batches):
        output = main_output(loaded.model, input_ids, attention_mask)
        if not bool(torch.isfinite(output).all()):
            raise ExportError(
                "the decomposed model must compute finite outputs to be exported, but some are NaN or infinite; choose"
                " another point, or load the model in float32 or bfloat16"
            )
        tensors |= {
            f"input_ids.{i}": input_ids,
            f"attention_mask.{i}": attention_mask,
            f"output.{i}": output.contiguous(),
        }
        if body is not loaded.model:
            tensors[f"hidden.{i}"] = main_output(body, input_ids, attention_mask).contiguous()
    save_file(tensors, folder / EXPECTED_TENSORS)
    expected = {
        "auto_class": auto_class,
        "is_plain": is_plain,
        "batches": len(batches),
        "device": str(loaded.device),
        "digests": tensor_digests(state.items()),
        "texts": _TEXTS,
        "token_ids": token_ids(loaded.tokenizer, _TEXTS),
    }
    (folder / EXPECTED_FILE).write_text(json.dumps(expected), encoding="utf-8")
    largest = max(float(tensors[f"output.{i}"].abs().max()) for i in range(len(batches)))
    return Expectation(folder, _tolerance(loaded.model.dtype, largest, is_merged=is_plain))


def _tolerance(dtype: torch.dtype, largest: float, *, is_merged: bool) -> float:
    """1e-4 for float32; in half precision a few steps of the dtype at the magnitude of the largest output."""
    if dtype in (torch.float32, torch.float64):
        return FLOAT32_TOLERANCE * (max(1.0, largest) if is_merged else 1.0)
    return half_precision_tolerance(dtype, largest)


def half_precision_tolerance(dtype: torch.dtype, largest: float) -> float:
    """A few steps of the dtype at the magnitude of the largest output."""
    return _HALF_STEPS * torch.finfo(dtype).eps * 2.0 ** math.ceil(math.log2(max(1.0, largest)))
