from __future__ import annotations

import math

import pytest

import dse.pareto
from dse.errors import ConfigError, NonFiniteError
from dse.pareto import OBJECTIVES, ideal_point, objective_named, objectives_named, reference_point, reference_value
from dse.pareto.objective import signs


def test_all_lists_exactly_the_exported_names() -> None:
    assert len(set(dse.pareto.__all__)) == len(dse.pareto.__all__)
    for name in dse.pareto.__all__:
        assert hasattr(dse.pareto, name)


def test_objectives_of_study_files_and_their_properties() -> None:
    assert list(OBJECTIVES) == [
        "accuracy",
        "perplexity",
        "choice_probability",
        "target_log_likelihood",
        "kl_divergence",
        "prefill_latency_s",
        "decode_latency_s",
        "prefill_energy_j",
        "energy_per_token_j",
        "ttft_s",
        "tpot_s",
        "throughput_tokens_s",
        "request_energy_j",
        "output_token_energy_j",
        "parameters",
        "weight_bytes",
        "peak_memory_bytes",
    ]
    assert all(name == entry.name for name, entry in OBJECTIVES.items())
    graded = ["choice_probability", "target_log_likelihood"]
    maximised = ["accuracy", *graded, "throughput_tokens_s"]
    assert [name for name, entry in OBJECTIVES.items() if entry.direction == "maximize"] == maximised
    quality = ["accuracy", "perplexity", *graded, "kl_divergence"]
    assert [name for name, entry in OBJECTIVES.items() if not entry.is_cost] == quality
    assert [name for name, entry in OBJECTIVES.items() if entry.is_difference] == [
        "accuracy", *graded, "kl_divergence",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dense", "reference"),
    [
        ("accuracy", 0.7, 0.0),
        ("perplexity", 26.0, 260.0),
        ("choice_probability", 0.6, 0.0),
        ("target_log_likelihood", -5.0, -15.0),
        ("decode_latency_s", 0.04, 0.06),
        ("energy_per_token_j", 2.0, 3.0),
        ("peak_memory_bytes", 4e8, 6e8),
        ("parameters", 1e8, 1.1e8),
        ("weight_bytes", 2e8, 2.2e8),
        ("throughput_tokens_s", 30.0, 20.0),
        ("tpot_s", 0.02, 0.03),
    ],
)
def test_reference_follows_from_the_dense_value(name: str, dense: float, reference: float) -> None:
    assert reference_value(OBJECTIVES[name], dense) == pytest.approx(reference)
    assert reference_point([OBJECTIVES[name]], {name: dense}) == {name: pytest.approx(reference)}


def test_the_ideal_of_an_unbounded_objective_follows_from_the_reference() -> None:
    """Throughput: the reference is 1.5 times slower than dense, the ideal four times faster."""
    objectives = objectives_named(["accuracy", "throughput_tokens_s", "tpot_s"])
    assert ideal_point(objectives, [0.0, 20.0, 0.03]) == [1.0, pytest.approx(120.0), 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_dense_value_is_refused(value: float) -> None:
    with pytest.raises(NonFiniteError, match="decode_latency_s must be finite"):
        reference_value(OBJECTIVES["decode_latency_s"], value)


def test_missing_dense_value_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="parameters"):
        reference_point(objectives_named(["accuracy", "parameters"]), {"accuracy": 0.5})


def test_reference_no_worse_than_the_ideal_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be worse than its ideal"):
        reference_value(OBJECTIVES["decode_latency_s"], 0.0)


def test_name_of_version_0_1_is_accepted() -> None:
    assert objective_named("gold_log_likelihood").name == "target_log_likelihood"


def test_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'decode_latency_s'"):
        objective_named("decode_latency")


@pytest.mark.parametrize(("names", "rule"), [([], "at least one"), (["accuracy", "accuracy"], "given once")])
def test_list_of_objectives_must_be_nonempty_without_repeats(names: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        objectives_named(names)


def test_directions_are_checked() -> None:
    with pytest.raises(ConfigError, match="'upwards'"):
        signs(["minimize", "upwards"])
