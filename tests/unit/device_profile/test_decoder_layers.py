"""Whole layers by the kernel give what the model's own layers give; what the kernel cannot do stays with them."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_compiler
from torch import nn
from transformers import StaticCache

from dse.decomposition import apply_point
from dse.decomposition.low_rank import LowRankLinear
from dse.design_point import DesignPoint, TensorChoice
from dse.kernel import FEW_ROWS, KernelForward, has_kernel, runs_in_kernel
from dse.measurement.device_profile.product_timings import ProductTimings
from dse.models import topology_of
from dse.runtime import FormChoice, build_forms, optimise_for_inference
from dse.runtime.decoder_layers import pass_outputs
from dse.runtime.onednn import has_onednn, linear_by_onednn

pytestmark = needs_compiler

VOCABULARY = 97
FAMILIES = {"llama": hf.LlamaConfig, "mistral": hf.MistralConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}


def tiny(family="llama", **changes):
    torch.manual_seed(0)
    config = FAMILIES[family](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 42,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 800,
            "sliding_window": None,
            **changes,
        }
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms of ones and weights near zero would hide much
        parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0))
    return model


def with_factors(model):
    for layer in model.model.layers[:2]:
        for block, name, rank, core in (
            (layer.self_attn, "q_proj", 5, False),
            (layer.self_attn, "v_proj", 3, True),
            (layer.self_attn, "o_proj", 7, False),
            (layer.mlp, "gate_proj", 9, False),
            (layer.mlp, "down_proj", 6, True),
        ):
            linear = getattr(block, name)
            left, right = torch.randn(linear.out_features, rank) / rank, torch.randn(rank, linear.in_features) / 6
            middle = torch.randn(rank, rank) if core else None
            setattr(block, name, LowRankLinear(left, right, linear.bias, middle).eval())
    return model


def as_it_lies(layout="row_major"):
    return FormChoice(lambda shapes: [layout] * len(shapes))


def generated(model, tokens, prompt, cache=None):
    """Logits of a prompt and of the steps after it, over a static cache that has been used before."""
    cache = cache or StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 3)
    with torch.inference_mode():
        model(input_ids=tokens[:, :2], past_key_values=cache, use_cache=True)
        cache.reset()
        found = [model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True).logits]
        for at in range(prompt, tokens.shape[1]):
            found.append(model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def tokens_of(batch, count):
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(1))


def agree(model, forms, tokens, prompt):
    expected = copy.deepcopy(model).double()(input_ids=tokens).logits
    forms.put()
    try:
        found = generated(model, tokens, prompt)
    finally:
        forms.remove()
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)


MODELS = {
    **{name: lambda name=name: tiny(name) for name in FAMILIES},
    "biases": lambda: tiny(attention_bias=True, mlp_bias=True),
    "factors": lambda: with_factors(tiny()),
    "factors and biases": lambda: with_factors(tiny("qwen2")),
    "factors and head norms": lambda: with_factors(tiny("qwen3")),
    "odd sizes": lambda: tiny(hidden_size=30, intermediate_size=53, head_dim=6),
}


@pytest.mark.parametrize("layout", ["row_major", "row_major_onednn", "row_major_panels"])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_and_steps_are_those_of_the_model(name, layout):
    model = MODELS[name]()
    forms, _ = build_forms(model, as_it_lies(layout))
    assert len(forms.forwards) == 3
    assert not runs_in_kernel(model)
    agree(model, forms, tokens_of(2, 12), 7)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, FEW_ROWS), prompt=st.integers(2, 30), steps=st.integers(1, 4), threads=st.integers(1, 5))
def test_any_batch_length_and_number_of_threads(batch, prompt, steps, threads):
    model = with_factors(tiny())
    forms, _ = build_forms(model, as_it_lies())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agree(model, forms, tokens_of(batch, prompt + steps), prompt)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["llama", "factors and biases", "factors and head norms", "odd sizes"]),
    batch=st.integers(1, 3),
    prompt=st.integers(2, 140) | st.sampled_from([256, 257, 320, 600]),
    threads=st.integers(1, 5),
)
def test_prompts_of_any_length_by_panels(name, batch, prompt, threads):
    """Panels that are full and panels that are not, and more positions than are looked at in one go."""
    model = MODELS[name]()
    forms, _ = build_forms(model, as_it_lies("row_major_panels"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        agree(model, forms, tokens_of(batch, prompt + 2), prompt)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["row_major", "row_major_panels"])
@pytest.mark.parametrize(
    "removed",
    [
        ["layers.0.attention"],
        ["layers.1.mlp", "layers.2.attention"],
        ["layers.0.mlp", "layers.1.attention", "layers.2.mlp"],
        ["layers.1.attention", "layers.1.mlp"],
    ],
)
def test_removed_blocks_are_passed_by(removed, layout):
    model = tiny()
    point = DesignPoint.of({name: TensorChoice.removal() for name in removed})
    apply_point(model, topology_of(model), point, None)
    forms, _ = build_forms(model, as_it_lies(layout))
    assert len(forms.forwards) == 3 - int(removed == ["layers.1.attention", "layers.1.mlp"])
    tokens = tokens_of(2, 9)
    expected = generated(model, tokens, 6)
    forms.put()
    found = generated(model, tokens, 6)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def counted(monkeypatch):
    """How many passes of layers the kernel was given."""
    calls = []
    result = KernelForward._result
    monkeypatch.setattr(KernelForward, "_result", lambda self, *given: calls.append(given[2]) or result(self, *given))
    return calls


def test_what_the_kernel_cannot_do_stays_with_the_layers(monkeypatch):
    model = tiny()
    forms, _ = build_forms(model, as_it_lies())
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[0, :3] = 0
    tokens = tokens_of(2, 9)

    def passes():
        cache = StaticCache(config=model.config, max_cache_len=12)
        with torch.inference_mode():
            yield model(input_ids=tokens[:, :2], past_key_values=cache, use_cache=True).logits
            cache.reset()
            yield model(input_ids=tokens, attention_mask=padded, past_key_values=cache, use_cache=True).logits[1]
            yield model(input_ids=tokens).logits
            yield model(input_ids=tokens, use_cache=True).logits
            many = tokens_of(FEW_ROWS + 1, 2)
            wide = StaticCache(config=model.config, max_cache_len=4)
            yield model(input_ids=many[:, :1], past_key_values=wide, use_cache=True).logits
            yield model(input_ids=many[:, 1:], past_key_values=wide, use_cache=True).logits
        embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
        model(inputs_embeds=embedded).logits.sum().backward()
        yield embedded.grad

    expected = list(passes())
    forms.put()
    calls = counted(monkeypatch)
    for found, known in zip(passes(), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=2e-4, atol=2e-4)
    assert calls == []


def test_a_padded_prompt_and_the_steps_after_it(monkeypatch):
    """The prompt is the layers' own; its steps are the kernel's, by the mask that the model makes of the padding."""
    model = tiny()
    tokens, padded = tokens_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    padded[0, :3] = 0
    wanted = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": padded}
    expected = model.generate(tokens, **wanted)
    forms, _ = build_forms(model, as_it_lies(), at_once=False)
    forms.put()
    calls = counted(monkeypatch)
    found = model.generate(tokens, cache_implementation="static", **wanted)
    assert torch.equal(found, expected)
    assert len(calls) >= 3 * 4
    assert all(mask is not None for mask in calls)


@pytest.fixture
def cached_timings(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "dse.runtime.sides.timings_for",
        lambda model: ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path),
    )


@pytest.mark.usefixtures("cached_timings")
def test_a_deployed_model_generates_the_same_and_shows_its_hidden_states(monkeypatch):
    model, tokens = with_factors(tiny()), tokens_of(1, 8)
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    expected = model.generate(tokens, output_hidden_states=True, **wanted)
    calls = counted(monkeypatch)
    optimised = optimise_for_inference(model)
    calls.clear()
    found = optimised.generate(tokens, output_hidden_states=True, cache_implementation="static", **wanted)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(calls) >= 3 * 5
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


def test_a_copied_model_has_layers_of_its_own():
    model = tiny()
    forms, _ = build_forms(model, as_it_lies())
    forms.put()
    tokens = tokens_of(1, 6)
    before = generated(model, tokens, 4)
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "shared"):
            module.shared.kernel.weights.zero_()
            module.shared.first.weight_data.zero_()
    changed = generated(other, tokens, 4)
    del other
    gc.collect()
    assert torch.equal(generated(model, tokens, 4), before)
    assert not torch.allclose(changed, before)


def test_a_compiled_step_is_one_call(monkeypatch):
    model, tokens = tiny(), tokens_of(1, 6)
    expected = pass_outputs(model, tokens)[:, -1:]
    forms, _ = build_forms(model, as_it_lies())
    forms.put()
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler stack's own
        model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
        mask = torch.where(torch.arange(8) <= 5, 0.0, torch.finfo(torch.float32).min).view(1, 1, 1, 8)
        step = torch.compile(
            lambda token: (
                model(
                    input_ids=token,
                    past_key_values=cache,
                    use_cache=True,
                    attention_mask=mask,
                    position_ids=torch.full((1, 1), 5),
                ).logits
            ),
            dynamic=False,
        )
        found = step(tokens[:, -1:])
        assert [int(layer.cumulative_length) for layer in cache.layers] == [6, 6, 6]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_a_full_cache_is_an_error_that_says_so():
    model, tokens = tiny(), tokens_of(1, 6)
    forms, _ = build_forms(model, as_it_lies())
    forms.put()
    cache = StaticCache(config=model.config, max_cache_len=6)
    generated(model, tokens, 4, cache)
    mask = torch.zeros(1, 1, 1, 6)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="the cache has 6 positions"):
        model(input_ids=tokens[:, :1], past_key_values=cache, attention_mask=mask, position_ids=torch.full((1, 1), 6))


def test_a_layer_that_was_freed_is_an_error_that_says_so():
    assert has_kernel()
    hidden, angles = torch.zeros(1, 1, 8), torch.zeros(1, 1, 4)
    with pytest.raises(RuntimeError, match="layer 987654321 must be known"):
        torch.ops.dse.decoder_layers(hidden, angles, angles, torch.zeros(1, 1, 1, 4), [], [], [], [987654321])


def test_a_layer_that_gives_something_else_is_left_alone():
    """A family that is known by name, but whose layer was changed by its user."""
    model = tiny()
    act = model.model.layers[1].mlp.act_fn

    class SiLU(nn.Module):
        def forward(self, x):
            return act(x) + 1.0

    model.model.layers[1].mlp.act_fn = SiLU()
    with pytest.warns(UserWarning, match="the layers of LlamaForCausalLM run as its own"):
        forms, _ = build_forms(model, as_it_lies())
    assert forms.forwards == []


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 30), out=st.integers(1, 30), bias=st.booleans())
def test_onednn_multiplies_like_torch(rows, columns, out, bias):
    if not has_onednn(torch.device("cpu"), torch.float32):
        pytest.skip("this torch was built without oneDNN")
    x, weight, added = torch.randn(2, rows, columns), torch.randn(out, columns), torch.randn(out) if bias else None
    expected = nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    torch.testing.assert_close(linear_by_onednn(x, weight, added).double(), expected, rtol=1e-4, atol=1e-4)
