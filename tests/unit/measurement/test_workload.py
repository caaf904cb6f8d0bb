from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from needs import needs_compiler
from tiny_models import tiny_model

from dse.errors import ConfigError
from dse.measurement.latency_spec import LatencySpec
from dse.measurement.static_execution import StaticExecution
from dse.measurement.workload import Workload


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens": 0},
        {"new_tokens": -1},
        {"batch_size": 0},
        {"blocks": 1},
        {"warmup_blocks": -1},
        {"prompt_tokens": 2.5},
        {"prompt_tokens": True},
        {"seed": "a"},
    ],
)
def test_a_spec_refuses_numbers_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"`{name} >= "):
        LatencySpec(**wrong)


def test_the_prompt_is_seeded_and_has_no_special_tokens(llama):
    spec = LatencySpec(prompt_tokens=32, new_tokens=2, batch_size=16)
    first, again = Workload(llama, spec).prompt, Workload(llama, spec).prompt
    other = Workload(llama, LatencySpec(prompt_tokens=32, new_tokens=2, batch_size=16, seed=1)).prompt
    assert first.shape == (16, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) >= 4  # 0 to 3 are special in the fixture
    assert int(first.max()) < llama.config.vocab_size


def greedy_without_cache(model, prompt, steps):
    tokens = prompt
    with torch.inference_mode():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


def prefilled(workload, variant="baseline"):
    generation = workload.begin(variant)
    workload.prefill(generation)
    workload.prepare(generation, variant)
    return generation


def tokens_fed(model, run):
    """The tokens that `run` passes to the model's embedding, one entry per call."""
    fed = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, given, _out: fed.append(given[0].clone()))
    run()
    hook.remove()
    return fed


def test_decode_is_a_real_greedy_generation(llama):
    workload = Workload(llama, LatencySpec(prompt_tokens=12, new_tokens=5, batch_size=3))
    state = prefilled(workload)
    fed = tokens_fed(llama, lambda: workload.decode(state))
    assert [tuple(step.shape) for step in fed] == [(3, 1)] * 5
    assert torch.equal(torch.cat(fed, dim=1), greedy_without_cache(llama, workload.prompt, 5))
    assert state.cache.get_seq_length() == 12 + 5


def test_prefill_is_one_pass_and_computes_logits_of_one_position(llama):
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape))
    workload = Workload(llama, LatencySpec(prompt_tokens=12, new_tokens=1))
    seen.clear()
    fed = tokens_fed(llama, lambda: workload.prefill(workload.begin()))
    hook.remove()
    assert [tuple(step.shape) for step in fed] == [(1, 12)]
    assert [tuple(shape) for shape in seen] == [(1, 1, 32)]


@pytest.mark.parametrize(("family", "changes"), [("gpt2", {}), ("mistral", {"sliding_window": 4})])
def test_decode_again_restores_the_generation(family, changes):
    """Decode repeats both with a cache that can be cropped and with one that cannot (sliding window)."""
    model = tiny_model(family, **changes)
    workload = Workload(model, LatencySpec(prompt_tokens=10, new_tokens=3))
    state = prefilled(workload)
    length = state.cache.get_seq_length()
    runs = [tokens_fed(model, lambda: workload.decode_again(state)) for _ in range(3)]
    assert state.cache.get_seq_length() == length
    # The first run also tests whether the cache can be cropped.
    assert [torch.cat(run[-3:]).tolist() for run in runs] == [torch.cat(runs[-1]).tolist()] * 3
    fresh = copy.deepcopy(state)
    assert torch.cat(tokens_fed(model, lambda: workload.decode(fresh))).tolist() == torch.cat(runs[-1]).tolist()


def test_a_static_cache_generates_the_same_tokens_and_can_be_rewound(llama):
    """The fixed program of modes compile and cuda_graph, run eagerly: masks and positions are tensors."""
    prompt = Workload(llama, LatencySpec(prompt_tokens=12, batch_size=3)).prompt
    execution = StaticExecution(llama, prompt, 5, {"use_cache": True, "logits_to_keep": 1})
    expected = greedy_without_cache(llama, prompt, 6)
    for _ in range(2):  # the one cache of a variant is reset
        generation = execution.begin("baseline")
        execution.prefill(generation)
        first = generation.next_tokens
        for _ in range(2):
            decoded = [generation.next_tokens]
            for _ in range(5):
                execution.step("baseline", generation)
                decoded.append(generation.next_tokens)
            assert torch.equal(torch.cat(decoded, dim=1), expected)
            assert execution.rewind(generation, first)


def test_unavailable_and_unknown_modes_are_refused(llama, bert):
    with pytest.raises(ConfigError, match="'cuda_graph' must be available, but CUDA graphs need an NVIDIA GPU"):
        Workload(llama, LatencySpec(prompt_tokens=8, mode="cuda_graph"))
    with pytest.raises(ConfigError, match="this model has none; use eager"):
        Workload(bert, LatencySpec(prompt_tokens=8, mode="compile"))
    with pytest.raises(ConfigError, match=r"one of eager, compile, cuda_graph, but got 'compiled'; did you mean"):
        LatencySpec(mode="compiled")


def test_compile_without_a_compiler_reports_the_reason(tmp_path):
    """In a separate process with no compiler on the path; the reason comes from the compiler stack."""
    source = (
        "import torch; from dse.measurement.modes import mode_problem;"
        "print(mode_problem('compile', [torch.device('cpu')], decodes=True))"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stdout
    assert "install a C++ compiler, or use eager" in done.stdout


@needs_compiler
def test_compiled_steps_generate_the_same_tokens_and_compile_once_per_variant(llama):
    del llama.model.layers[1]  # compile time grows with the number of layers
    llama.config.num_hidden_layers = 1
    heads = {"baseline": llama.lm_head, "candidate": torch.nn.Linear(32, 200, bias=False)}
    decoded = {"baseline": [], "candidate": []}
    # Variants that shared one code object would need a second program for it.
    limit = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with warnings.catch_warnings(), limit:
        warnings.simplefilter("ignore")  # from the compiler stack
        workload = Workload(llama, LatencySpec(prompt_tokens=6, new_tokens=4, mode="compile"))
        expected, generations = {}, {}
        for variant, head in heads.items():
            llama.lm_head = head
            expected[variant] = greedy_without_cache(llama, workload.prompt, 4)
            generations[variant] = prefilled(workload, variant)
        programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(4):  # alternating, as in a measurement
            for variant, head in heads.items():
                llama.lm_head = head
                decoded[variant].append(generations[variant].next_tokens)
                workload.step(generations[variant], variant)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs
    for variant, tokens in decoded.items():
        assert torch.equal(torch.cat(tokens, dim=1), expected[variant])


def test_encoders_have_no_decode(bert):
    assert not Workload(bert, LatencySpec(prompt_tokens=32, new_tokens=100)).decodes
    # This one claims that it can generate, but attends in both directions and returns no cache.
    assert not Workload(tiny_model("bert", head="causal_lm"), LatencySpec(prompt_tokens=8, new_tokens=2)).decodes


def test_a_prompt_longer_than_the_context_is_refused(llama, bert):
    Workload(llama, LatencySpec(prompt_tokens=60, new_tokens=4))
    with pytest.raises(ConfigError, match=r"`prompt_tokens \+ new_tokens <= 64` must hold .* got 61 \+ 4"):
        Workload(llama, LatencySpec(prompt_tokens=61, new_tokens=4))
    with pytest.raises(ConfigError, match=r"`prompt_tokens <= 32` must hold .* got prompt_tokens=33"):
        Workload(bert, LatencySpec(prompt_tokens=33))


def test_roberta_has_fewer_positions_because_of_padding():
    model = tiny_model("roberta", max_position_embeddings=34, pad_token_id=1)
    prefilled(Workload(model, LatencySpec(prompt_tokens=32)))
    with pytest.raises(ConfigError, match="`prompt_tokens <= 32`"):
        Workload(model, LatencySpec(prompt_tokens=33))


def test_encoder_decoders_are_refused():
    with pytest.raises(ConfigError, match="encoder-decoder"):
        Workload(tiny_model("t5"), LatencySpec())
