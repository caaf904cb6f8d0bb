from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from needs import needs_compiler
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dse.errors import ConfigError, InvalidMeasurementError
from dse.measurement.attention import GROUPED_ATTENTION, grouped_attention, grouped_attention_in_use
from dse.measurement.execution import StaticExecution
from dse.measurement.workload import LatencySpec, Workload


class PlainStatic(StaticExecution):
    mode = "static"

    @torch.inference_mode()
    def step(self, side, generation):
        generation.next_tokens = self._fixed_step(generation.next_tokens, generation.cache)


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
def test_spec_refuses_what_cannot_be_measured(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"`{name} >= "):
        LatencySpec(**wrong)


def test_prompt_is_seeded_and_free_of_special_tokens(llama):
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


def prefilled(workload, side="dense"):
    generation = workload.begin(side)
    workload.prefill(generation)
    workload.get_ready(generation, side)
    return generation


def tokens_fed(model, run):
    """What `run` feeds to the model's embedding, call by call."""
    fed = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, given, _out: fed.append(given[0].clone()))
    run()
    hook.remove()
    return fed


def test_decode_is_the_real_greedy_generation(llama):
    workload = Workload(llama, LatencySpec(prompt_tokens=12, new_tokens=5, batch_size=3))
    state = prefilled(workload)
    fed = tokens_fed(llama, lambda: workload.decode(state))
    assert [tuple(step.shape) for step in fed] == [(3, 1)] * 5
    assert torch.equal(torch.cat(fed, dim=1), greedy_without_cache(llama, workload.prompt, 5))
    assert state.cache.get_seq_length() == 12 + 5


def test_prefill_is_one_pass_and_asks_for_one_position(llama):
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape))
    workload = Workload(llama, LatencySpec(prompt_tokens=12, new_tokens=1))
    seen.clear()
    fed = tokens_fed(llama, lambda: workload.prefill(workload.begin()))
    hook.remove()
    assert [tuple(step.shape) for step in fed] == [(1, 12)]
    assert [tuple(shape) for shape in seen] == [(1, 1, 32)]


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


def sliding_mistral():
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("build", [gpt2, sliding_mistral])
def test_decode_again_leaves_the_state_as_it_was(build):
    """Caches that can be cropped and caches that cannot (a sliding window forgets) repeat the same decode."""
    torch.manual_seed(0)
    model = build()
    workload = Workload(model, LatencySpec(prompt_tokens=10, new_tokens=3))
    state = prefilled(workload)
    length = state.cache.get_seq_length()
    runs = [tokens_fed(model, lambda: workload.decode_again(state)) for _ in range(3)]
    assert state.cache.get_seq_length() == length
    # The first run also tries whether the cache can be cropped.
    assert [torch.cat(run[-3:]).tolist() for run in runs] == [torch.cat(runs[-1]).tolist()] * 3
    fresh = copy.deepcopy(state)
    assert torch.cat(tokens_fed(model, lambda: workload.decode(fresh))).tolist() == torch.cat(runs[-1]).tolist()


def test_a_static_cache_generates_the_same_tokens_and_goes_back(llama):
    """The fixed program of compile and cuda_graph, run kernel by kernel: masks and positions are tensors."""
    prompt = Workload(llama, LatencySpec(prompt_tokens=12, batch_size=3)).prompt
    execution = PlainStatic(llama, prompt, 5, {"use_cache": True, "logits_to_keep": 1})
    expected = greedy_without_cache(llama, prompt, 6)
    for _ in range(2):  # the one cache of a side starts anew
        generation = execution.begin("dense")
        execution.prefill(generation)
        first = generation.next_tokens
        for _ in range(2):
            decoded = [generation.next_tokens]
            for _ in range(5):
                execution.step("dense", generation)
                decoded.append(generation.next_tokens)
            assert torch.equal(torch.cat(decoded, dim=1), expected)
            assert execution.rewind(generation, first)


def test_a_static_cache_serves_learned_positions_and_refuses_a_sliding_window():
    torch.manual_seed(0)
    model = gpt2()
    prompt = Workload(model, LatencySpec(prompt_tokens=10, new_tokens=4)).prompt
    execution = PlainStatic(model, prompt, 4, {"use_cache": True, "logits_to_keep": 1})
    generation = execution.begin("subject")
    execution.prefill(generation)
    decoded = [generation.next_tokens]
    for _ in range(4):
        execution.step("subject", generation)
        decoded.append(generation.next_tokens)
    assert torch.equal(torch.cat(decoded, dim=1), greedy_without_cache(model, prompt, 5))
    with pytest.raises(InvalidMeasurementError, match="sliding window"):
        PlainStatic(sliding_mistral(), prompt, 4, {"use_cache": True}).begin("dense")


def test_cuda_graphs_are_refused_without_a_gpu_and_unknown_modes_always(llama, bert):
    with pytest.raises(ConfigError, match="'cuda_graph' must be available, but CUDA graphs need an NVIDIA GPU"):
        Workload(llama, LatencySpec(prompt_tokens=8, mode="cuda_graph"))
    with pytest.raises(ConfigError, match="this model has none; use eager"):
        Workload(bert, LatencySpec(prompt_tokens=8, mode="compile"))
    with pytest.raises(ConfigError, match=r"one of eager, compile, cuda_graph, fast, but got 'compiled'; did you mean"):
        LatencySpec(mode="compiled")


def test_compile_without_a_compiler_says_so(tmp_path):
    """In a process of its own with no compiler on the path; the reason is the compiler stack's own."""
    source = (
        "import torch; from dse.measurement.modes import mode_problem;"
        "print(mode_problem('compile', [torch.device('cpu')], decodes=True))"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stdout
    assert "install a C++ compiler, or use eager" in done.stdout


@needs_compiler
@pytest.mark.parametrize("mode", ["compile", "fast"])
def test_compiled_steps_generate_the_same_tokens_for_both_sides_and_compile_each_once(llama, mode):
    del llama.model.layers[1]  # compiling takes its time for every layer
    llama.config.num_hidden_layers = 1
    kept, other = llama.lm_head, torch.nn.Linear(32, 200, bias=False)
    decoded = {"dense": [], "subject": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler stack's own
        workload = Workload(llama, LatencySpec(prompt_tokens=6, new_tokens=4, mode=mode))
        expected, generations = {}, {}
        for side, head in (("dense", kept), ("subject", other)):
            llama.lm_head = head
            expected[side] = greedy_without_cache(llama, workload.prompt, 4)
            generations[side] = prefilled(workload, side)
        programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(4):  # by turns, as they are measured
            for side, head in (("dense", kept), ("subject", other)):
                llama.lm_head = head
                decoded[side].append(generations[side].next_tokens)
                workload.step(generations[side], side)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs
    for side, tokens in decoded.items():
        assert torch.equal(torch.cat(tokens, dim=1), expected[side])


@needs_compiler
def test_what_was_compiled_for_the_dense_side_serves_the_next_point(llama):
    del llama.model.layers[1]
    llama.config.num_hidden_layers = 1
    kept, others = llama.lm_head, [torch.nn.Linear(32, 200, bias=False) for _ in range(2)]
    spec = LatencySpec(prompt_tokens=6, new_tokens=3, mode="fast")
    counters = torch._dynamo.utils.counters["stats"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler stack's own
        compiled, programs = Workload(llama, spec), []
        for other in others:
            before = counters["unique_graphs"]
            workload = Workload(llama, spec)
            workload.adopt(compiled)
            for side, head in (("dense", kept), ("subject", other)):
                llama.lm_head = head
                expected = greedy_without_cache(llama, workload.prompt, 3)
                generation = prefilled(workload, side)
                tokens = [generation.next_tokens]
                for _ in range(2):
                    workload.step(generation, side)
                    tokens.append(generation.next_tokens)
                assert torch.equal(torch.cat(tokens, dim=1), expected[:, :3])
            compiled.adopt(workload)
            programs.append(counters["unique_graphs"] - before)
    # Prefill and step of two sides; then of the new point alone, and nothing of the point before is held.
    assert programs == [4, 2]
    assert {side for _, side in compiled._execution._programs} == {"dense"}


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_grouped_attention_is_attention_with_the_cache_repeated(key_heads, scaling):
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8)
    key, value = torch.randn(3, key_heads, 9, 8), torch.randn(3, key_heads, 9, 5)
    mask = torch.where(torch.arange(9) <= 5, 0.0, torch.finfo(torch.float32).min).expand(3, 1, 1, 9)
    mixed, weights = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=scaling)
    repeated = [part.repeat_interleave(4 // key_heads, dim=1) for part in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=scaling)
    torch.testing.assert_close(mixed, expected.transpose(1, 2))
    assert weights is None


def test_grouped_attention_is_in_use_within_its_block_only(llama):
    with grouped_attention_in_use(llama):
        assert llama.config._attn_implementation == GROUPED_ATTENTION
    assert llama.config._attn_implementation == "sdpa"
    llama.config._attn_implementation = "eager"
    with grouped_attention_in_use(llama):
        assert llama.config._attn_implementation == "eager"


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_model_with_grouped_attention_gives_the_same_logits(llama, tokens):
    prompt = Workload(llama, LatencySpec(prompt_tokens=6)).prompt[:, :tokens]
    with torch.inference_mode():
        expected = llama(prompt).logits
        with grouped_attention_in_use(llama):
            got = llama(prompt).logits
    torch.testing.assert_close(got, expected)


def test_encoders_have_no_decode(bert):
    assert not Workload(bert, LatencySpec(prompt_tokens=32, new_tokens=100)).decodes
    # This one says that it can generate, but attends both ways and hands no cache back.
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    assert not Workload(BertLMHeadModel(config).eval(), LatencySpec(prompt_tokens=8, new_tokens=2)).decodes


def test_prompt_longer_than_the_context_is_refused(llama, bert):
    Workload(llama, LatencySpec(prompt_tokens=60, new_tokens=4))
    with pytest.raises(ConfigError, match=r"`prompt_tokens \+ new_tokens <= 64` must hold .* got 61 \+ 4"):
        Workload(llama, LatencySpec(prompt_tokens=61, new_tokens=4))
    with pytest.raises(ConfigError, match=r"`prompt_tokens <= 32` must hold .* got prompt_tokens=33"):
        Workload(bert, LatencySpec(prompt_tokens=33))


def test_roberta_loses_positions_to_padding():
    config = RobertaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    model = RobertaForMaskedLM(config).eval()
    prefilled(Workload(model, LatencySpec(prompt_tokens=32)))
    with pytest.raises(ConfigError, match="`prompt_tokens <= 32`"):
        Workload(model, LatencySpec(prompt_tokens=33))


def test_encoder_decoders_are_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        Workload(T5ForConditionalGeneration(config).eval(), LatencySpec())
