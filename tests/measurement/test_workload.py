from __future__ import annotations

import copy

import pytest
import torch
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

from dse.errors import ConfigError
from dse.measurement.workload import LatencySpec, Workload


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


def tokens_fed(model, run):
    """What `run` feeds to the model's embedding, call by call."""
    fed = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, given, _out: fed.append(given[0].clone()))
    run()
    hook.remove()
    return fed


def test_decode_is_the_real_greedy_generation(llama):
    workload = Workload(llama, LatencySpec(prompt_tokens=12, new_tokens=5, batch_size=3))
    state = workload.prefill()
    fed = tokens_fed(llama, lambda: workload.decode(state))
    assert [tuple(step.shape) for step in fed] == [(3, 1)] * 5
    assert torch.equal(torch.cat(fed, dim=1), greedy_without_cache(llama, workload.prompt, 5))
    assert state.cache.get_seq_length() == 12 + 5


def test_prefill_is_one_pass_and_asks_for_one_position(llama):
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape))
    workload = Workload(llama, LatencySpec(prompt_tokens=12, new_tokens=1))
    seen.clear()
    fed = tokens_fed(llama, workload.prefill)
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
    workload = Workload(build(), LatencySpec(prompt_tokens=10, new_tokens=3))
    state = workload.prefill()
    length = state.cache.get_seq_length()
    runs = [tokens_fed(workload._model, lambda: workload.decode_again(state)) for _ in range(3)]
    assert state.cache.get_seq_length() == length
    # The first run also tries whether the cache can be cropped.
    assert [torch.cat(run[-3:]).tolist() for run in runs] == [torch.cat(runs[-1]).tolist()] * 3
    fresh = copy.deepcopy(state)
    assert (
        torch.cat(tokens_fed(workload._model, lambda: workload.decode(fresh))).tolist() == torch.cat(runs[-1]).tolist()
    )


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
    Workload(model, LatencySpec(prompt_tokens=32)).prefill()
    with pytest.raises(ConfigError, match="`prompt_tokens <= 32`"):
        Workload(model, LatencySpec(prompt_tokens=33))


def test_encoder_decoders_are_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        Workload(T5ForConditionalGeneration(config).eval(), LatencySpec())
