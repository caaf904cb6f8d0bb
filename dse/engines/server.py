"""What serves requests in a measurement: a session of an engine, or the model that is resident in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import transformers
from torch import nn

from dse.engines.backend_support import window_of
from dse.engines.engine import EngineWindow, EngineWork
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

__all__ = ["ResidentServer", "Server"]


class Server(Protocol):
    """Serves requests and times them; `EngineSession` is one.

    Attributes:
        engine: Name of the engine.
        versions: Package to version.
        start_up_s: Seconds from the start to the loaded model; 0 for a resident model.
    """

    @property
    def engine(self) -> str: ...  # noqa: D102 - see the class

    @property
    def versions(self) -> Mapping[str, str]: ...  # noqa: D102

    @property
    def start_up_s(self) -> float: ...  # noqa: D102

    def run(self, work: EngineWork) -> EngineWindow:
        """Serve the requests and time them."""


class ResidentServer:
    """Serves requests with the model of this process, in batches and in mode eager.

    Args:
        model: The resident Hugging Face model in eval mode.
        use: Puts the weights of the measured variant in place; called before the clock starts.
    """

    engine = "transformers"
    start_up_s = 0.0

    def __init__(self, model: nn.Module, use: Callable[[], None]) -> None:
        self.versions: Mapping[str, str] = {"transformers": transformers.__version__, "torch": str(torch.__version__)}
        self._model = model
        self._use = use
        self._workloads: dict[EngineWork, Workload] = {}

    @torch.inference_mode()
    def run(self, work: EngineWork) -> EngineWindow:
        """Serve the requests in batches of the concurrency.

        Raises:
            ConfigError: A request exceeds the model's context.
            OutOfMemoryError: The device has too little memory.
        """
        with out_of_memory_errors("serving requests"):
            self._use()
            if work not in self._workloads:
                spec = LatencySpec(work.prompt_tokens, work.new_tokens, work.concurrency, seed=work.seed)
                self._workloads[work] = Workload(self._model, spec)
            workload = self._workloads[work]
            workload.synchronize()
            batches = [_batch(workload, work.new_tokens) for _ in range(work.requests // work.concurrency)]
        repeated = [batch for batch in batches for _ in range(work.concurrency)]
        found = window_of([begin_s for begin_s, _ in repeated], [times_s for _, times_s in repeated])
        return EngineWindow.from_json(found)


def _batch(workload: Workload, new_tokens: int) -> tuple[float, list[float]]:
    """Serve one batch; returns when it began and when each token of its sequences was known."""
    begin_s = time.perf_counter()
    generation = workload.begin()
    workload.prefill(generation)
    times_s = []
    for step in itertools.count(1):
        workload.synchronize()
        times_s.append(time.perf_counter())
        if step == new_tokens:
            return begin_s, times_s
        workload.step(generation)
    raise AssertionError("unreachable")
