"""The model card states the point, its measurements and sizes; foreign text in it is escaped."""

from __future__ import annotations

import dataclasses
import html.parser
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dse.design_point import DesignPoint, TensorChoice
from dse.export.card_tables import code, measured_figures, table, text
from dse.export.model_card import CardContent, model_card
from dse.model_parts import DecomposableTensor
from dse.topology import Topology

TENSORS = tuple(
    DecomposableTensor(f"layers.{layer}.{role}", f"model.layers.{layer}.{role}_proj", layer, role, 64, 48)
    for layer in range(2)
    for role in ("query", "up")
)
TOPOLOGY = Topology("LlamaForCausalLM", "llama", 2, TENSORS, parameters_dense=20_000)
UNIFORM = DesignPoint.uniform(TOPOLOGY, "svd", 4, layers=[1])
UNEVEN = DesignPoint.of({"layers.0.query": TensorChoice("tucker", 2), "layers.1.up": TensorChoice("svd", 8)})
ROW = {
    "accuracy": 0.52,
    "accuracy_low": 0.50,
    "accuracy_high": 0.54,
    "accuracy_drop": 0.031,
    "accuracy_drop_low": 0.012,
    "accuracy_drop_high": 0.05,
    "decode_latency_s": 0.0412,
    "decode_latency_s_ratio": 0.93,
    "decode_latency_s_ratio_low": 0.91,
    "decode_latency_s_ratio_high": 0.95,
    "perplexity": float("nan"),
    "task.dse_grammar.acc": 0.81,
    "task.dse_grammar.acc_stderr": 0.0123,
    "task.dse_grammar.documents": 640,
}
DENSE = {"accuracy": 0.551, "decode_latency_s": 0.0443, "task.dse_grammar.acc": 0.9}
ENVIRONMENT = {
    "gpus": [{"name": "NVIDIA H200", "driver_version": "570.1"}],
    "cpu": {"model": "Xeon", "usable_cores": 2},
}


def content(**changes: Any) -> CardContent:
    plain = CardContent(
        base_model="some-org/some-model",
        revision=None,
        fingerprint="0123456789abcdef",
        topology=TOPOLOGY,
        point=UNIFORM,
        format="transformers",
        is_dense=False,
        auto_class="AutoModelForCausalLM",
        dtype="float32",
        parameters=15_000,
        weight_file_bytes=61_234,
        dense_weight_bytes=80_000,
        other_bytes=12_345_678,
        max_difference=2.5e-6,
        tolerance=1e-4,
        details={},
    )
    return dataclasses.replace(plain, **changes)


def front_matter(card: str) -> Any:
    head, _, _ = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head)


def test_sizes_and_reduction_are_stated() -> None:
    card = model_card(content())

    assert "# some-org/some-model with 25.0 % fewer parameters" in card
    assert "2 of its 4 weight matrices" in card
    assert "| parameters | 20,000 | 15,000 | 25.0 % |" in card
    assert "| weights on disk (float32) | 80.0 kB | 61.2 kB | 23.5 % |" in card
    assert "12.3 MB" in card
    assert "the largest difference of a logit is 2.5e-06 (allowed: 0.0001)" in card


def test_the_yaml_header_has_the_hubs_fields() -> None:
    assert front_matter(model_card(content(details={"license": "apache-2.0"}))) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some-org/some-model",
        "license": "apache-2.0",
        "tags": ["low-rank", "compression", "lowrank-dse"],
    }
    local = front_matter(model_card(content(base_model="demo:smollm2", auto_class="AutoModelForMaskedLM")))
    assert "base_model" not in local
    assert local["pipeline_tag"] == "fill-mask"


def test_a_uniform_point_is_written_compactly() -> None:
    assert '{"method": "svd", "rank": 4, "layers": [1], "roles": "all"}' in model_card(content())


@pytest.mark.parametrize("point", [UNIFORM, UNEVEN])
def test_the_point_in_the_card_can_be_read_back(point: DesignPoint) -> None:
    card = model_card(content(point=point))
    found = re.search(r"```json\n(.*?)\n```", card, re.DOTALL)
    assert found is not None
    assert DesignPoint.from_json(found[1], TOPOLOGY) == point
    assert f"## Design point {point.id}" in card


def test_measurements_come_with_their_uncertainty() -> None:
    card = model_card(
        content(details={"row": ROW, "dense_row": DENSE, "environment": ENVIRONMENT, "study": "s", "trial": 3})
    )

    assert "| Accuracy | 0.551 | 0.520 ±0.020 | -3.1 pts [-5.0, -1.2] |" in card
    assert "| Decode latency | 44.3 ms | 41.2 ms | x0.93 [0.91, 0.95] |" in card
    assert "| `dse_grammar` acc | 0.9 | 0.81 ± 0.012 (standard error) | 640 |" in card
    assert "Perplexity" not in card
    assert "NVIDIA H200 (driver 570.1); Xeon, 2 cores" in card
    assert "- Study: s, trial 3" in card


def test_a_point_without_measurements_claims_nothing() -> None:
    assert measured_figures({}, {}) == ""
    card = model_card(content(max_difference=None))
    assert "No measurements of this point are available" in card
    assert "Not verified by reloading" in card


def test_the_dense_form_saves_nothing_and_needs_no_code() -> None:
    card = model_card(content(is_dense=True, parameters=20_000, details={"row": ROW}))
    assert "**saves nothing**" in card
    assert "trust_remote_code" not in card
    assert "before it was multiplied out" in card


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)


ODD = [
    "<script>alert(1)</script>",
    "a|b\n| c |",
    "# heading\n\n## Measurements",
    "`code` ```fence",
    "---\nlicense: evil",
    "[link](javascript:alert(1))",
    "**bold** _it_ ~~no~~ $x$",
    "&lt;b&gt;",
]


def check_stays_text(odd: str) -> None:
    details = {
        "study": odd,
        "trial": odd,
        "license": odd,
        "versions": {odd: odd},
        "environment": {"cpu": {"model": odd, "usable_cores": odd}, "gpus": [{"name": odd, "driver_version": odd}]},
        "row": ROW | {f"task.{odd}.acc": 0.5, "task.t.documents": odd},
    }
    card = model_card(content(base_model=odd, revision=odd, details=details))
    plain = model_card(content(base_model="x", revision="x", details=details | {"study": "x", "versions": {"x": "x"}}))

    assert set(front_matter(card)) <= {"library_name", "pipeline_tag", "base_model", "license", "tags"}
    body = card.split("\n---\n", 1)[1]
    outside_code = re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"```.*?\n```", "", body, flags=re.DOTALL))
    tags = _Tags()
    tags.feed(outside_code)
    assert tags.seen == []
    headings = [line for line in body.splitlines() if line.startswith("## ")]
    assert headings == [line for line in plain.splitlines() if line.startswith("## ")]
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


@pytest.mark.parametrize("odd", ODD)
def test_foreign_text_is_escaped(odd: str) -> None:
    check_stays_text(odd)


@given(st.text(alphabet=st.sampled_from("a1 \n\t\\`*_[]()<>&|~$#-!:.\"'{}"), max_size=20))
def test_any_foreign_text_is_escaped(odd: str) -> None:
    check_stays_text(odd)


def test_markdown_helpers() -> None:
    assert text("a*b_c|d <e>\n f") == r"a\*b\_c\|d &lt;e&gt; f"
    assert code("x") == "`x`"
    assert code("a`b") == "``a`b``"
    assert code("`a") == "`` `a ``"
    assert table(("k", "v"), [("a", "1")]) == "| k | v |\n| :-- | --: |\n| a | 1 |"
