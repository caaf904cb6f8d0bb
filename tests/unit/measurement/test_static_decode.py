"""Decoding with a static cache, as modes compile and cuda_graph do it: every decoder family, against eager decoding."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from needs import needs_compiler
from tiny_models import FAMILIES, SIZES, tiny_model

from dse.errors import ConfigError
from dse.measurement import LatencySpec, Workload
from dse.measurement.execution import EagerExecution, Execution
from dse.measurement.modes import require_static_decode
from dse.measurement.static_execution import StaticExecution, with_own_code

OPTIONS = {"use_cache": True}
STEPS = 8

GPT: Mapping[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
PLAIN: Mapping[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
MORE: Mapping[str, Callable[[], hf.PreTrainedConfig]] = {
    "gptj": lambda: hf.GPTJConfig(**GPT, vocab_size=320, rotary_dim=4, bos_token_id=1, eos_token_id=2),
    "codegen": lambda: hf.CodeGenConfig(**GPT, vocab_size=320, rotary_dim=4, bos_token_id=1, eos_token_id=2),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT, vocab_size=320, bos_token_id=1, eos_token_id=2),
    "starcoder2": lambda: hf.Starcoder2Config(**PLAIN, sliding_window=None),
    "stablelm": lambda: hf.StableLmConfig(**PLAIN),
    "nemotron": lambda: hf.NemotronConfig(**PLAIN),
    "mpt": lambda: hf.MptConfig(vocab_size=320, d_model=32, n_heads=4, n_layers=3, max_seq_len=64),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **SIZES, attention_types=[[["global", "local"], 1], [["global"], 1]], window_size=8
    ),
}
REFUSED = ("bloom", "gpt_neo")
"""BLOOM builds its positions from a two-dimensional mask; GPT-Neo cuts local masks by the length of the cache."""
WINDOWED: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4},
    "llama4_text": {"attention_chunk_size": 8, "num_hidden_layers": 4},
}
DECODERS = [name for name, family in FAMILIES.items() if family.head == "causal_lm" and name != "mamba"]


def random_model(name: str, **changes: Any) -> hf.PreTrainedModel:
    """A model whose weights are large enough that its tokens depend on every position."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MORE[name]()) if name in MORE else tiny_model(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def prompt_of(batch: int = 3) -> torch.Tensor:
    return torch.randint(4, 300, (batch, 12), generator=torch.Generator().manual_seed(1))


def decoded(execution: Execution) -> list[list[int]]:
    generation = execution.begin("baseline")
    execution.prefill(generation)
    assert generation.next_tokens is not None
    tokens = [generation.next_tokens]
    for _ in range(STEPS):
        execution.step("baseline", generation)
        tokens.append(generation.next_tokens)
    return torch.cat(tokens, dim=1).tolist()


@pytest.mark.filterwarnings("ignore")  # about settings of tiny models
@pytest.mark.parametrize("name", [name for name in (*DECODERS, *MORE) if name not in REFUSED])
def test_a_static_cache_decodes_the_tokens_of_eager(name: str) -> None:
    model, prompt = random_model(name), prompt_of()
    static = StaticExecution(model, prompt, STEPS, OPTIONS)
    assert decoded(static) == decoded(EagerExecution(model, prompt, STEPS, OPTIONS))
    require_static_decode("compile", model, prompt, STEPS, OPTIONS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WINDOWED)
def test_layers_with_a_window_decode_the_tokens_of_eager(name: str) -> None:
    """The window is shorter than prompt and answer, so positions leave it in prefill and in decode."""
    model, prompt = random_model(name, **WINDOWED[name]), prompt_of()
    expected = decoded(EagerExecution(model, prompt, STEPS, OPTIONS))
    static = StaticExecution(model, prompt, STEPS, OPTIONS)
    assert decoded(static) == expected
    assert decoded(static) == expected  # the cache is reset
    require_static_decode("cuda_graph", model, prompt, STEPS, OPTIONS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_decodes_otherwise_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'compile' must be available, but .*static cache.*; use eager"):
        require_static_decode("compile", random_model(name), prompt_of(), STEPS, OPTIONS)


@needs_compiler
def test_a_workload_verifies_the_static_cache_before_it_compiles() -> None:
    model = random_model("gpt_neo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the compiler stack
        with pytest.raises(ConfigError, match="GPTNeoForCausalLM decodes other logits with a static cache"):
            Workload(model, LatencySpec(prompt_tokens=12, new_tokens=STEPS, mode="compile"))


def test_a_position_that_is_off_by_one_is_found() -> None:
    """The error that GPT-J had: its later layers rotated by the position after the cache had moved."""
    model, prompt = random_model("gptj"), prompt_of(1)
    attention = model.transformer.h[1].attn
    plain = attention.forward

    def late(*inputs: Any, **named: Any) -> Any:
        is_static_decode = named["hidden_states"].shape[1] == 1 and isinstance(named["layer_past"], hf.StaticCache)
        return plain(*inputs, **{**named, "position_ids": named["position_ids"] + int(is_static_decode)})

    attention.forward = late
    with pytest.raises(ConfigError, match="decodes other logits"):
        require_static_decode("compile", model, prompt, STEPS, OPTIONS)


def test_bfloat16_is_not_refused_for_its_rounding() -> None:
    for name in ("llama", "gptj", "gemma2"):
        model = random_model(name).to(torch.bfloat16)
        require_static_decode("compile", model, prompt_of(), STEPS, OPTIONS)


def test_two_programs_have_code_objects_of_their_own() -> None:
    """torch keeps programs, and counts recompilations, by code object."""

    def program(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    first, second = (with_own_code(program, name) for name in ("decode_candidate", "decode_baseline"))
    assert isinstance(first, types.FunctionType)
    assert isinstance(second, types.FunctionType)
    assert first.__code__ is not second.__code__
    assert first.__code__ != second.__code__
    assert first(torch.ones(1)) == second(torch.ones(1)) == 2
