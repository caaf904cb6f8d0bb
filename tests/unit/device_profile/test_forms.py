from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dse.decomposition.low_rank import LowRankFactors, LowRankLinear
from dse.decomposition.stacked import stacked_modules
from dse.errors import InvalidMeasurementError
from dse.measurement.device_profile.product_timings import ProductShape, ProductTimings
from dse.runtime import FastRuntime, FormChoice, GenerationShape, build_forms, form_choice, optimise_for_inference
from dse.runtime.matrices import modules_by_input
from dse.runtime.products import Chain, Product, SharedLinear, SharedProduct


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 200,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()


def low_rank(linear, rank, *, core=False):
    left, right = torch.randn(linear.out_features, rank), torch.randn(rank, linear.in_features) / 32
    return LowRankLinear(left, right, linear.bias, torch.randn(rank, rank) if core else None).eval()


def by_turns(layouts):
    turns = itertools.cycle(layouts)
    return FormChoice(lambda shapes: [next(turns) for _ in shapes])


def everywhere(layout, seconds=None):
    return FormChoice(lambda shapes: [layout] * len(shapes), seconds)


def logits(model, tokens):
    with torch.inference_mode():
        return model(input_ids=tokens).logits


def paths(model):
    return [[matrix.path for matrix in group] for group in modules_by_input(model, torch.arange(1, 5)[None])]


def test_modules_given_the_same_tensor_are_found_by_watching():
    layers = [f"model.layers.{layer}." for layer in range(2)]
    assert paths(llama()) == [
        *(
            [layer + name for name in names]
            for layer in layers
            for names in (
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            )
        ),
        ["lm_head"],
    ]


def test_a_module_that_is_called_twice_is_left_alone():
    model = llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    assert not any("down_proj" in path for group in paths(model) for path in group)


def with_factors(model):
    for layer, core in zip(model.model.layers, (False, True), strict=True):
        layer.self_attn.k_proj = low_rank(layer.self_attn.k_proj, 3, core=core)
        layer.mlp.gate_proj = low_rank(layer.mlp.gate_proj, 5)
        layer.mlp.up_proj = low_rank(layer.mlp.up_proj, 7)
        layer.mlp.down_proj = low_rank(layer.mlp.down_proj, 4, core=core)
    return model


@pytest.mark.parametrize(
    "build",
    [
        llama,
        lambda: llama(attention_bias=True, mlp_bias=True),
        gpt2,
        lambda: with_factors(llama()),
        lambda: with_factors(llama(attention_bias=True, mlp_bias=True)),
    ],
    ids=["llama", "biases", "gpt2", "factors", "factors and biases"],
)
@pytest.mark.parametrize("layouts", [["row_major"], ["column_major"], ["row_major", "column_major", "column_major"]])
def test_forms_keep_the_function_and_undo_is_exact(build, layouts):
    model = build()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)
    tokens = torch.randint(5, 50, (3, 9))
    before = dict(model.named_modules())
    expected = logits(model, tokens)
    forms, _ = build_forms(model, by_turns(layouts))
    assert dict(model.named_modules()) == before
    forms.put()
    assert any(isinstance(module, SharedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    forms.remove()
    assert dict(model.named_modules()) == before
    assert torch.equal(logits(model, tokens), expected)


def test_query_key_and_value_are_one_product_and_so_are_right_factors():
    model = with_factors(llama())
    forms, _ = build_forms(model, everywhere("column_major"))
    forms.put()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.shared is attention.k_proj.shared is attention.v_proj.shared
    assert attention.q_proj.shared.first.weight_data.shape == (32, 32 + 3 + 16)
    assert mlp.gate_proj.shared is mlp.up_proj.shared
    assert mlp.gate_proj.shared.first.weight_data.shape == (32, 5 + 7)


def with_stacks(model, *, core=False):
    """Query, key and value of the first layer as one stack, gate and up of the second as another."""
    for parent, names in (
        (model.model.layers[0].self_attn, ["q_proj", "k_proj", "v_proj"]),
        (model.model.layers[1].mlp, ["gate_proj", "up_proj"]),
    ):
        linears = [getattr(parent, name) for name in names]
        ends = list(itertools.accumulate(linear.out_features for linear in linears))
        rows = [slice(end - linear.out_features, end) for end, linear in zip(ends, linears, strict=True)]
        factors = LowRankFactors(torch.randn(ends[-1], 6), torch.randn(6, 32) / 32, torch.randn(6, 6) if core else None)
        for name, module in zip(names, stacked_modules(factors, rows, [x.bias for x in linears]), strict=True):
            setattr(parent, name, module.eval())
    return model


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("merges", [False, True])
def test_stacks_are_two_products_and_merged_ones_are_one(core, bias, merges):
    model = with_stacks(llama(attention_bias=bias, mlp_bias=bias), core=core)
    tokens = torch.randint(5, 50, (3, 9))
    expected = logits(model, tokens)
    # Seconds as the number of products: one matrix is always faster than a chain.
    forms, _ = build_forms(model, everywhere("column_major", (lambda *_: 1.0) if merges else None))
    forms.put()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    attention = model.model.layers[0].self_attn
    shared = attention.q_proj.shared
    assert shared is attention.v_proj.shared
    if merges:
        assert len(forms.merged) == 5
        assert not any(isinstance(module, Chain) and len(module.rest) for module in model.modules())
    else:
        assert forms.merged == []
        assert shared.first.weight_data.shape == (32, 6)
        assert [product.weight_data.shape for product in shared.chains[0].rest] == [(6, 6)] * core + [(6, 64)]


def test_only_what_is_slower_is_merged():
    """Time as the number of multiplications: the factors of up (rank 60 of 64 x 32) cost more than their product."""
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj, mlp.gate_proj = low_rank(mlp.up_proj, 60), low_rank(mlp.gate_proj, 4)
    forms, _ = build_forms(model, everywhere("row_major", lambda rows, columns: float(rows * columns)))
    assert forms.merged == ["model.layers.0.mlp.up_proj"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=12))
def test_a_shared_product_serves_any_order_of_calls(calls):
    """Members called in any order, repeatedly, with either of two inputs: always what each would give alone."""
    torch.manual_seed(0)
    weights = [torch.randn(rows, 4) for rows in (2, 3, 1)]
    shared = SharedProduct(Product(torch.cat(weights), "row_major"), [Chain(2), Chain(3), Chain(1)])
    members = [SharedLinear(shared, index) for index in range(3)]
    inputs = [torch.randn(5, 4), torch.randn(5, 4)]
    for member, given_input in calls:
        x = inputs[given_input]
        torch.testing.assert_close(members[member](x), x @ weights[member].T)


def test_a_shared_product_holds_nothing_once_all_are_served():
    shared = SharedProduct(Product(torch.randn(4, 4), "row_major"), [Chain(2), Chain(2)])
    x = torch.randn(1, 4)
    shared.part(1, x)
    shared.part(0, x)
    assert shared._given is None
    assert shared._parts == ()


class Sides:
    def __init__(self, model):
        self.parent, self.dense = model.model.layers[0].mlp, model.model.layers[0].mlp.down_proj
        self.point = low_rank(self.dense, 4)

    def use_candidate(self):
        self.parent.down_proj = self.point

    def use_baseline(self):
        self.parent.down_proj = self.dense


def test_sides_swap_forms_share_weights_that_did_not_change_and_leave_the_plain_point():
    model = llama()
    sides = Sides(model)
    tokens = torch.arange(5, 14)[None]
    dense = logits(model, tokens)
    sides.use_candidate()
    point = logits(model, tokens)
    plain = dict(model.named_modules())
    runtime = FastRuntime(model, everywhere("column_major"))
    for _ in range(2):
        with runtime.sides(sides) as fast:
            for _ in range(2):
                fast.use_baseline()
                torch.testing.assert_close(logits(model, tokens), dense, rtol=1e-4, atol=1e-5)
                head = model.lm_head.shared.first.weight_data
                fast.use_candidate()
                torch.testing.assert_close(logits(model, tokens), point, rtol=1e-4, atol=1e-5)
                assert model.lm_head.shared.first.weight_data is head
        assert dict(model.named_modules()) == plain


def test_a_model_whose_outputs_change_is_refused():
    """Its code changes the tensor between two modules that are given it, so that they must not share a product."""
    model = llama()
    mlp = model.model.layers[0].mlp

    def forward(x):
        gate = mlp.gate_proj(x)
        x.mul_(3)
        return mlp.down_proj(gate * mlp.up_proj(x))

    mlp.forward = forward
    with pytest.raises(InvalidMeasurementError, match="in its fast form must agree with its own"):
        build_forms(model, everywhere("row_major"))
    assert type(mlp.gate_proj) is nn.Linear


class PhaseTimings(ProductTimings):
    """Decode likes columns and pays for the entries read; prefill likes rows, and few products. There is no kernel."""

    has_kernel = False

    def seconds(self, shape, layout):
        if shape.rows == 1:
            return shape.weight_entries * (1.0 if layout == "column_major" else 1.5)
        return (shape.weight_entries + 10_000) * (1.0 if layout == "row_major" else 1.5)


@pytest.fixture
def phase_timings(tmp_path):
    return PhaseTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)


def test_a_generation_counts_its_passes():
    assert GenerationShape(2, 8, 5).passes() == {2: 5, 16: 1}
    assert GenerationShape(2, 8, 5).passes(of_head=True) == {2: 6}
    assert GenerationShape(2, 0, 5).passes() == GenerationShape(2, 0, 5).passes(of_head=True) == {2: 5}
    assert GenerationShape(2, 8, 0).passes() == {16: 1}
    assert GenerationShape(2, 1, 5).passes() == {2: 6}


@pytest.mark.parametrize(
    ("generation", "layout", "is_merged"),
    [
        (GenerationShape(1, 0, 1), "column_major", False),
        (GenerationShape(1, 8, 0), "row_major", True),
        # A weight lies once for both phases, so that a long answer and a short one after the same prompt differ.
        (GenerationShape(1, 8, 1), "row_major", True),
        (GenerationShape(1, 8, 200), "column_major", False),
    ],
)
def test_forms_are_chosen_by_the_time_of_a_whole_generation(phase_timings, generation, layout, is_merged):
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = low_rank(mlp.down_proj, 4)
    forms, _ = build_forms(model, form_choice(phase_timings, generation))
    assert forms.merged == (["model.layers.0.mlp.down_proj"] if is_merged else [])
    forms.put()
    assert model.model.layers[0].mlp.down_proj.shared.first.layout == layout
    # The head multiplies one row a sequence in prefill, too: it is always a decode product.
    assert model.lm_head.shared.first.layout == "column_major"


def test_building_forms_tells_how_far_it_is(phase_timings):
    told = []
    build_forms(
        llama(),
        form_choice(phase_timings, GenerationShape(1, 0, 1)),
        progress=lambda phase, done, total: told.append((phase, done, total)),
    )
    total = told[0][2]
    assert total == 4 * 2 + 1  # two layers of four products, and the head
    assert told == [("preparing mode fast", done, total) for done in range(total + 1)]


def test_with_the_kernel_layers_lie_row_by_row(tmp_path):
    """A layer one of whose weights lies otherwise is none that the kernel could run; the head is in no layer."""

    class KernelTimings(PhaseTimings):
        has_kernel = True

    timings = KernelTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    model = llama()
    forms, _ = build_forms(model, form_choice(timings, GenerationShape(1, 0, 1)))
    forms.put()
    assert model.model.layers[0].mlp.down_proj.shared.first.layout == "row_major"
    assert model.lm_head.shared.first.layout == "column_major"


def test_optimised_for_good(monkeypatch, tmp_path):
    monkeypatch.setenv("DSE_CACHE", str(tmp_path))
    model = with_factors(llama())
    tokens = torch.arange(5, 14)[None]
    expected = logits(model, tokens)
    assert optimise_for_inference(model) is model
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, (nn.Linear, LowRankLinear)) for module in model.modules())


def test_timings_are_taken_once_kept_and_told_apart_by_conditions(tmp_path):
    shape = ProductShape(2, 24, 16)
    timings = ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    assert not timings.knows(shape, "row_major")
    seconds = timings.seconds(shape, "row_major")
    assert seconds > 0
    again = ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    assert again.knows(shape, "row_major")
    assert again.seconds(shape, "row_major") == seconds
    assert not ProductTimings(torch.device("cpu"), torch.bfloat16, 2**20, tmp_path).knows(shape, "row_major")
    assert not ProductTimings(torch.device("cpu"), torch.float32, 2**22, tmp_path).knows(shape, "row_major")


def test_a_file_that_is_none_of_ours_is_measured_anew(tmp_path):
    timings = ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    timings.path.write_text('{"seconds": [1, 2]}')
    again = ProductTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    assert again.seconds(ProductShape(1, 8, 8), "column_major") > 0
