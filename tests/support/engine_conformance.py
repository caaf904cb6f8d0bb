"""What every engine must do; `tests/engines/test_*_engine.py` inherit it, one class for each engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from engine_environments import engine_python, needs_modules
from tiny_models import byte_tokenizer, loaded_tiny_model

from dse.decomposition import FactorBank, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.engines import ENGINES, EngineSettings, EngineWork, WorkerSession
from dse.errors import EngineError
from dse.export import write_engine_folder
from dse.models import LoadedModel

POINT = DesignPoint.of(
    {
        "layers.0.query": TensorChoice("svd", 8),
        "layers.1.down": TensorChoice("tucker", 12),
        "layers.2.gate_up": TensorChoice("svd", 10),
    }
)
"""A tensor, a tensor with a core, and a stack, in different layers."""

PROMPTS = ([11, 12, 13, 14], [40, 41, 42, 43, 44, 45, 46], [99, 7, 31])


def engine_model() -> LoadedModel:
    """A tiny Llama whose sizes every engine supports: head dimension 32."""
    return loaded_tiny_model(
        "llama",
        tokenizer=byte_tokenizer(),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_hidden_layers=3,
        max_position_embeddings=128,
        initializer_range=0.1,
    )


class EngineConformance:
    """One engine on one folder: a tiny model with a tensor, a core and a stack."""

    engine: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    times_products: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls) -> LoadedModel:
        return engine_model()

    @pytest.fixture(scope="class")
    @classmethod
    def bank(cls, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> FactorBank:
        return FactorBank.build(loaded, [POINT], folder=tmp_path_factory.mktemp("bank"))

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls) -> EngineSettings:
        needs_modules(*cls.modules)
        return EngineSettings(python=engine_python(cls.engine), options=cls.options, threads=1, context_tokens=64)

    @pytest.fixture(scope="class")
    @classmethod
    def session(
        cls,
        loaded: LoadedModel,
        bank: FactorBank,
        settings: EngineSettings,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Iterator[WorkerSession]:
        engine, folder = ENGINES[cls.engine], tmp_path_factory.mktemp(cls.engine) / "point"
        write_engine_folder(loaded, POINT, bank, folder, engine.format)
        with engine.start(folder, settings) as started:
            assert isinstance(started, WorkerSession)
            yield started

    def test_versions_name_the_engine(self, session: WorkerSession) -> None:
        assert set(session.versions) & {name for names in ENGINES[self.engine].packages for name in names}
        assert session.start_up_s > 0

    def test_greedy_tokens_equal_those_of_transformers(
        self, session: WorkerSession, loaded: LoadedModel, bank: FactorBank
    ) -> None:
        with decompose(loaded, POINT, bank), torch.inference_mode():
            expected = [_greedy(loaded, prompt, 6) for prompt in PROMPTS]
        assert session.greedy(PROMPTS, 6) == expected

    def test_log_probabilities_equal_those_of_transformers(
        self, session: WorkerSession, loaded: LoadedModel, bank: FactorBank
    ) -> None:
        with decompose(loaded, POINT, bank), torch.inference_mode():
            expected = [_log_probabilities(loaded, prompt) for prompt in PROMPTS]
        found = session.log_probabilities(PROMPTS)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)

    @pytest.mark.parametrize(
        "work",
        [EngineWork(5, 3, concurrency=2, requests=4), EngineWork(7, 1), EngineWork(4, 6, concurrency=3, requests=3)],
    )
    def test_timings_are_positive_and_add_up(self, session: WorkerSession, work: EngineWork) -> None:
        window = session.run(work)
        assert window.output_tokens == work.requests * work.new_tokens
        assert len(window.ttft_s) == work.requests
        assert len(window.tpot_s) == (work.requests if work.new_tokens > 1 else 0)
        assert min(*window.ttft_s, *window.tpot_s, window.duration_s) > 0
        tpot_s = window.tpot_s or (0.0,) * work.requests
        served_s = [first + (work.new_tokens - 1) * later for first, later in zip(window.ttft_s, tpot_s, strict=True)]
        assert max(served_s) <= window.duration_s * (1 + 1e-9)
        rounds = work.requests // work.concurrency
        assert window.duration_s <= sum(served_s) + 1e-3 * rounds or rounds > 1
        assert window.throughput_tokens_s == pytest.approx(window.output_tokens / window.duration_s)

    def test_products_are_timed_in_the_engine(self, session: WorkerSession) -> None:
        shapes = [(1, 64, 96), (16, 96, 64)]
        seconds = session.time_products(shapes, 2**16)
        assert len(seconds) == 2
        assert min(seconds) > 0

    def test_an_error_leaves_the_session_alive(self, session: WorkerSession) -> None:
        with pytest.raises(EngineError, match=f"engine '{self.engine}' failed in `greedy`") as caught:
            session.greedy([["no token"]], 1)  # type: ignore[list-item]
        assert "\n" not in str(caught.value)
        assert session.greedy(PROMPTS[:1], 1)

    def test_a_folder_that_is_no_model_is_one_line(self, settings: EngineSettings, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=f"engine '{self.engine}' failed in `load`") as caught:
            ENGINES[self.engine].start(tmp_path, settings)
        assert "\n" not in str(caught.value)

    def test_death_is_reported_and_leaves_nothing(self, session: WorkerSession) -> None:
        os.killpg(session.process_id, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"but its process was killed by SIGKILL"):
            session.run(EngineWork(4, 2))
        assert not session.is_alive
        session.close()
        with pytest.raises(ProcessLookupError):
            os.killpg(session.process_id, 0)


def _greedy(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _log_probabilities(loaded: LoadedModel, prompt: list[int]) -> list[float]:
    tokens = torch.tensor([prompt])
    logits = loaded.model(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
    found: list[float] = logits.gather(-1, tokens[0, 1:, None])[:, 0].tolist()
    return found
