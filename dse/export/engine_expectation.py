"""`verification.json` of an export: prompts with the tokens and log-probabilities that an engine must reproduce.

It stays in the folder, so that `dse verify` can repeat the check in any engine without the study.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dse.errors import ExportError
from dse.export.expectation import half_precision_tolerance
from dse.files import write_text

__all__ = [
    "VERIFICATION_FILE",
    "EngineExpectation",
    "VerifiedEngine",
    "expected_of",
    "read_engine_expectation",
    "weight_file_sizes",
    "write_engine_expectation",
]

VERIFICATION_FILE = "verification.json"
FLOAT32_TOLERANCE = 5e-4
"""Largest difference of a log-probability (nats) allowed in float32.

Engines sum in another order than transformers. Differences are usually below 1e-4, but rounding alone reaches that:
transformers in float32 and in float64 differ by 1.1e-4 on a strongly decomposed SmolLM2, whose logits reach 40.
"""

_TEXTS = (
    "The capital of France is Paris. The capital of Japan is",
    "def area(radius):\n    return 3.14159 *",
    "Once upon a time, in a small village by the sea, there lived",
)
_RANDOM_LENGTHS = (7, 24)
_NEW_TOKENS = 12
_MAX_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class VerifiedEngine:
    """An engine in which the folder gave the expected outputs.

    Attributes:
        versions: Package to version.
        max_difference: Largest difference of a log-probability; None if the check compared weights and logits instead.
    """

    versions: Mapping[str, str]
    max_difference: float | None = None


@dataclass(frozen=True)
class EngineExpectation:
    """What an engine must compute from the folder.

    Attributes:
        format: Name of the export format.
        dtype: Dtype of the weights.
        prompts: Token ids.
        tokens: Greedy continuation of each prompt, all equally long.
        margins: For each of these tokens, its log-probability minus that of the second best.
        log_probabilities: Of each prompt token but the first, in nats.
        tolerance: Largest difference of a log-probability that counts as equal.
        weight_files: Size in bytes of each file that holds weights.
        verified: Engines that were verified, by name.
    """

    format: str
    dtype: str
    prompts: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]
    margins: Sequence[Sequence[float]]
    log_probabilities: Sequence[Sequence[float]]
    tolerance: float
    weight_files: Mapping[str, int]
    verified: Mapping[str, VerifiedEngine] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """Length of each continuation."""
        return len(self.tokens[0])


def expected_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str, files: Mapping[str, int]
) -> EngineExpectation:
    """Run the resident model, to which the point is applied, on three short texts and two random prompts.

    Args:
        model: A model that generates text.
        tokenizer: Its tokenizer.
        form: Name of the export format.
        files: Size of each file that holds weights.
    """
    prompts = _prompts(model, tokenizer)
    tokens, margins, log_probabilities, largest = [], [], [], 0.0
    for prompt in prompts:
        continuation, gaps = _greedy(model, prompt)
        tokens.append(continuation)
        margins.append(gaps)
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1].float()
        largest = max(largest, float(logits.abs().max()))
        chosen = logits.double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        log_probabilities.append([float(value) for value in chosen])
    is_full = model.dtype in (torch.float32, torch.float64)
    tolerance = FLOAT32_TOLERANCE if is_full else half_precision_tolerance(model.dtype, largest)
    dtype = str(model.dtype).removeprefix("torch.")
    return EngineExpectation(form, dtype, prompts, tokens, margins, log_probabilities, tolerance, files)


def _prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 4 * _MAX_PROMPT_TOKENS
    limit = max(2, min(_MAX_PROMPT_TOKENS, int(longest) - _NEW_TOKENS))
    generator = torch.Generator().manual_seed(0)
    texts = [[int(token) for token in tokenizer(text)["input_ids"]][:limit] for text in _TEXTS]
    drawn = [
        torch.randint(config.vocab_size, (min(length, limit),), generator=generator).tolist()
        for length in _RANDOM_LENGTHS
    ]
    return [prompt for prompt in (*texts, *drawn) if len(prompt) > 1 and max(prompt) < config.vocab_size]


def _greedy(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation and its margins."""
    found: list[int] = []
    gaps: list[float] = []
    ids, cache = torch.tensor([list(prompt)], device=model.device), None
    with torch.inference_mode():
        for _ in range(_NEW_TOKENS):
            past: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "use_cache": True}
            output = model(input_ids=ids, **past)
            best = output.logits[0, -1].float().topk(2)
            found.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            cache = output.get("past_key_values")
            new = torch.tensor([found[-1:]], device=model.device)
            ids = torch.cat((ids, new), 1) if cache is None else new
    return found, gaps


def weight_file_sizes(folder: Path, patterns: Sequence[str]) -> dict[str, int]:
    """Size in bytes of each file that holds weights, by name."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return {file.name: file.stat().st_size for file in sorted(files)}


def write_engine_expectation(folder: Path, expected: EngineExpectation) -> None:
    """Write `verification.json`."""
    write_text(folder / VERIFICATION_FILE, json.dumps(asdict(expected)) + "\n")


def read_engine_expectation(folder: Path) -> EngineExpectation:
    """Read `verification.json`.

    Raises:
        ExportError: There is none, or it is damaged.
    """
    file = folder / VERIFICATION_FILE
    if not folder.is_dir():
        raise ExportError(f"an export must be a folder, but '{folder}' is none")
    if not file.is_file():
        raise ExportError(
            f"an export must hold {VERIFICATION_FILE} to be verified, but '{folder}' has none: `dse export` writes it"
            " for models that generate text"
        )
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        verified = {name: VerifiedEngine(**entry) for name, entry in found.pop("verified").items()}
        expected = EngineExpectation(**found, verified=verified)
        rows = {len(r) for r in (expected.prompts, expected.tokens, expected.margins, expected.log_probabilities)}
        if len(rows) != 1 or not expected.prompts:
            raise ValueError("its lists differ in length")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(
            f"{file} must be as `dse export` wrote it, but it is damaged ({error}); export again"
        ) from error
    return expected
