"""What backends share: prompts, batches, per-request timings, and product timings.

Runs in the engine's interpreter, so it imports nothing of dse; see `dse.engines.worker`.
"""

from __future__ import annotations

import abc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Window = dict[str, Any]
"""The JSON form of an `EngineWindow`."""


class Unsupported(Exception):  # noqa: N818 - the worker knows it by this name
    """The engine cannot do this; the message says why."""


def random_prompts(vocabulary: int, work: Mapping[str, int]) -> list[list[int]]:
    """`work["requests"]` prompts of `work["prompt_tokens"]` token ids, drawn from the seed.

    Ids of special tokens are usually the first or the last ones, so both ends are left out.
    """
    generator = random.Random(work["seed"])
    low, high = min(10, vocabulary // 10), vocabulary - vocabulary // 10
    return [[generator.randrange(low, high) for _ in range(work["prompt_tokens"])] for _ in range(work["requests"])]


def window_of(submitted_s: Sequence[float], token_times_s: Sequence[Sequence[float]]) -> Window:
    """The window of some requests.

    Args:
        submitted_s: Submission time of each request.
        token_times_s: Times of each request's tokens, in order.
    """
    ttft_s = [times[0] - begin for begin, times in zip(submitted_s, token_times_s, strict=True)]
    tpot_s = [(times[-1] - times[0]) / (len(times) - 1) for times in token_times_s if len(times) > 1]
    return {
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "duration_s": max(times[-1] for times in token_times_s) - min(submitted_s),
        "output_tokens": sum(map(len, token_times_s)),
    }


def run_batches(
    work: Mapping[str, int],
    prompts: Sequence[Sequence[int]],
    generate: Callable[[Sequence[Sequence[int]], int, Callable[[], None]], object],
) -> Window:
    """Serve the requests of `work` in batches of its concurrency, for engines without continuous batching.

    Args:
        work: The work, as a mapping.
        prompts: One list of token ids for each request.
        generate: `generate(batch, new_tokens, on_token)` decodes greedily and calls `on_token()` once every step, as
            soon as the tokens of the whole batch are known.
    """
    submitted_s: list[float] = []
    token_times_s: list[list[float]] = []
    size = work["concurrency"]
    for begin in range(0, work["requests"], size):
        times: list[float] = []
        begin_s = time.perf_counter()
        generate(prompts[begin : begin + size], work["new_tokens"], _clock(times))
        submitted_s += [begin_s] * size
        token_times_s += [times] * size
    return window_of(submitted_s, token_times_s)


def _clock(times: list[float]) -> Callable[[], None]:
    return lambda: times.append(time.perf_counter())


def seconds_of(one_pass: Callable[[], object], calls: int) -> float:
    """Median seconds of one call, where `one_pass()` makes `calls` of them."""
    one_pass()
    taken = []
    for _ in range(7):
        begin_s = time.perf_counter()
        one_pass()
        taken.append((time.perf_counter() - begin_s) / calls)
    return statistics.median(taken)


def weight_count(columns: int, results: int, bytes_per_weight: int, footprint_bytes: int, limit: int) -> int:
    """How many weights of one shape a pass multiplies by, so that it reads as many bytes as a pass of the model.

    Args:
        columns: Input features.
        results: Output features.
        bytes_per_weight: Size of an element.
        footprint_bytes: Bytes that one pass of the model reads.
        limit: Largest count; with more, making and packing them would take longer than timing them.
    """
    return max(1, min(footprint_bytes // (columns * results * bytes_per_weight), limit))


class BatchBackend(abc.ABC):
    """A backend that serves batches of equally long prompts; subclasses generate."""

    _vocabulary: int

    @abc.abstractmethod
    def _generate(
        self, batch: Sequence[Sequence[int]], new_tokens: int, on_token: Callable[[], None]
    ) -> list[list[int]]:
        """Greedy tokens of equally long prompts; calls `on_token()` as soon as the batch has another token."""

    def run(self, work: Mapping[str, int]) -> Window:
        """Serve the requests in batches of the concurrency."""
        return run_batches(work, random_prompts(self._vocabulary, work), self._generate)

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations, one prompt after the other, so that none is padded."""
        return [self._generate([prompt], new_tokens, lambda: None)[0] for prompt in prompts]

    def close(self) -> None:  # noqa: B027 - a subclass that starts something ends it here
        """Nothing to end."""


class GraphBackend(BatchBackend):
    """A backend of a graph with a key-value cache; subclasses open it and run it."""

    @abc.abstractmethod
    def _begin(self, batch: int) -> None:
        """Begin `batch` new sequences with an empty cache."""

    @abc.abstractmethod
    def _logits(self, inputs: dict[str, Any]) -> Any:
        """Run the graph on `input_ids`, `attention_mask` and `position_ids`, and keep its cache.

        Returns:
            Logits of shape (batch, new tokens, vocabulary), valid until the next call.
        """

    def log_probabilities(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each prompt token but the first."""
        import numpy as np

        found = []
        for prompt in prompts:
            self._begin(1)
            logits = self._forward(np.array([prompt], dtype=np.int64), 0)[0, :-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            found.append(np.take_along_axis(logits, np.array(prompt[1:])[:, None], -1)[:, 0].tolist())
        return found

    def _read_vocabulary(self, folder: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self._vocabulary = int(config["vocab_size"])

    def _forward(self, tokens: Any, past: int) -> Any:
        """Logits of `tokens`, shape (batch, new), which follow `past` cached ones."""
        import numpy as np

        batch, new = tokens.shape
        positions = np.broadcast_to(np.arange(past, past + new, dtype=np.int64), (batch, new))
        return self._logits(
            {
                "input_ids": tokens,
                "attention_mask": np.ones((batch, past + new), dtype=np.int64),
                "position_ids": np.ascontiguousarray(positions),
            }
        )

    def _generate(
        self, batch: Sequence[Sequence[int]], new_tokens: int, on_token: Callable[[], None]
    ) -> list[list[int]]:
        """Greedy tokens of equally long prompts."""
        import numpy as np

        self._begin(len(batch))
        tokens, past, found = np.array(batch, dtype=np.int64), 0, []
        for _ in range(new_tokens):
            logits = self._forward(tokens, past)
            past += tokens.shape[1]
            tokens = logits[:, -1:].argmax(-1)
            on_token()
            found.append(tokens)
        result: list[list[int]] = np.concatenate(found, 1).tolist()
        return result
