"""What backends share: prompts, per-request timings, and product timings. Imports no dse; see `dse.engines.worker`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
