"""Exports of every form and family, what transformers computes from them, and what vLLM does.

`python tests/support/served_exports.py` (in the environment of dse, with `DSE_VLLM_PYTHON`) runs all of them and writes
the tables of docs/reference/export-support.md. `tests/engines/test_exports_in_vllm.py` runs the same and compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from decomposition_support import windows_of
from tiny_models import as_loaded, tiny_model, with_random_vectors

from dse.decomposition import FactorBank, LowRankFactors, factorise
from dse.decomposition.factors import as_matrix
from dse.design_point import DesignPoint, TensorChoice
from dse.export import ExportRequest, export_point, stage
from dse.models import LoadedModel, load_model
from dse.models.transformers_patches import quiet_transformers
from dse.topology import Topology

NEW_TOKENS = 8
TOLERANCE = 1e-4
"""Largest difference of a log-probability (nats) in float32."""

PROMPTS = ([5, 9, 120, 33, 7], [11, 12, 13], [200, 201, 202, 203, 204, 205], [44, 9], [300, 17, 80, 81, 82, 83, 84])
"""Token ids that are in every vocabulary."""

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
TINY: Mapping[str, Any] = {
    "num_hidden_layers": 5,
    "hidden_size": 128,  # attention of vLLM on CPUs needs heads of 32 or more
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
TINY_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("llama", {"attention_bias": True}),
    "Mistral": ("mistral", {}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "SmolLM3": ("smollm3", {}),
    "Gemma": ("gemma", {"head_dim": 32}),
    "Gemma 2": ("gemma2", {"head_dim": 32, "sliding_window": 5, "layer_types": KINDS}),
    "Gemma 3": ("gemma3_text", {"head_dim": 32, "sliding_window": 5, "layer_types": KINDS}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {}),
    "Granite": ("granite", {}),
    "Cohere": ("cohere", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-2": ("gpt2", {}),
    "OPT": ("opt", {"word_embed_proj_dim": 128}),
}


FORMS = (
    "low rank",
    "low rank with core",
    "stacks",
    "mixed ranks",
    "removed MLP",
    "removed attention",
    "passed layer",
    "reduced MLP width",
    "pivoted factors",
    "everything",
    "removed blocks and widths as decilm",
)
"""Structural forms of SmolLM2 exports; see `structural_forms`."""


@dataclass(frozen=True)
class Served:
    """What vLLM did with a folder.

    Attributes:
        loads: Whether it generated.
        tokens_equal: Whether all greedy tokens are those of transformers.
        difference: Largest difference of a log-probability of these tokens (nats).
        error: Why it did not load.
    """

    loads: bool
    tokens_equal: bool = False
    difference: float = float("inf")
    error: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether it computes what transformers computes."""
        return self.tokens_equal and self.difference <= TOLERANCE


def structural_forms(topology: Topology) -> dict[str, DesignPoint]:
    """A point of every structural form on SmolLM2."""
    removal = TensorChoice.removal()
    svd, tucker, width = "svd", "tucker", "width"

    def removed(role: str, layers: Iterable[int]) -> dict[str, TensorChoice]:
        return {f"layers.{layer}.{role}": removal for layer in layers}

    everything = {
        **removed("attention", (11, 14)),
        **removed("mlp", (11, 17)),
        "layers.2.query": TensorChoice(svd, 64),
        "layers.3.down": TensorChoice(tucker, 128),
        "layers.20.query_key_value": TensorChoice(tucker, 60),
        "layers.20.gate_up": TensorChoice(svd, 100),
        "layers.21.up": TensorChoice(svd, 128),
        "layers.25.mlp": TensorChoice(width, 768),
    }
    widths = {f"layers.{layer}.mlp": TensorChoice(width, 600 + 40 * layer) for layer in (2, 9, 16)}
    pivoted = {
        tensor.name: TensorChoice(svd, 100 + 5 * i, form="pivoted")
        for i, tensor in enumerate(t for t in topology.tensors if t.layer in (4, 15))
    }
    mixed = {f"layers.{i}.{role}": TensorChoice(svd, 90 + 8 * i) for i in range(2, 29, 3) for role in ("gate", "down")}
    return {
        "low rank": DesignPoint.uniform(
            topology, svd, 100, range(5, 25), ["query", "attention_output", "gate", "down"]
        ),
        "low rank with core": DesignPoint.uniform(topology, tucker, 90, range(5, 25), ["key", "gate", "down"]),
        "stacks": DesignPoint.uniform(topology, svd, 150, range(3, 28), ["query_key_value", "gate_up"]),
        "mixed ranks": DesignPoint.of(mixed),
        "removed MLP": DesignPoint.of(removed("mlp", (20, 22, 25))),
        "removed attention": DesignPoint.of(removed("attention", (0, 12, 18, 29))),
        "passed layer": DesignPoint.of(removed("attention", (11, 24)) | removed("mlp", (11, 24))),
        "reduced MLP width": DesignPoint.of(widths),
        "pivoted factors": DesignPoint.of(pivoted),
        "everything": DesignPoint.of(everything),
        "removed blocks and widths as decilm": DesignPoint.of(
            removed("attention", (12, 20)) | removed("mlp", (20, 26)) | widths
        ),
    }


def mixed_point(topology: Topology) -> DesignPoint:
    """A passed layer, another removed attention and MLP block, stacks with and without a core, and single tensors.

    Some of the single tensors have pivoted factors.
    """
    names = ("layers.1.attention", "layers.1.mlp", "layers.2.attention", "layers.3.mlp")
    gone = [topology.blocks_by_name[name] for name in names if name in topology.blocks_by_name]
    choices = {block.name: TensorChoice.removal() for block in gone}
    stacks = [stack for stack in topology.stacks if stack.layer == 0]
    choices |= {stack.name: TensorChoice(("svd", "tucker")[i % 2], 5) for i, stack in enumerate(stacks)}
    taken = {name for block in gone for name in block.tensors} | {m.name for stack in stacks for m in stack.members}
    for i, tensor in enumerate(topology.tensors):
        if tensor.name not in taken and i % 2 == 0:
            method = ("svd", "tucker")[i // 2 % 2]
            form = "pivoted" if method == "svd" and i % 8 == 0 else ""
            choices[tensor.name] = TensorChoice(method, 3 + i % 3, form=form)
    return DesignPoint.of(choices)


class ExactFactors:
    """Decomposes the model's own weights on request."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        modules = [self.loaded.model.get_submodule(path) for path in self.loaded.topology.matrix(name).modules]
        weight = torch.cat([as_matrix(module).detach().float() for module in modules])
        return factorise(weight, choice.method, choice.rank)


def export_families(root: Path, families: Iterable[str] = tuple(TINY_FAMILIES)) -> dict[str, tuple[Path, Path]]:
    """Write a mixed export and the dense model of each tiny family; returns the two folders by family."""
    found = {}
    for family in families:
        model_type, changes = TINY_FAMILIES[family]
        export = root / f"tiny-{model_type}"
        found[family] = (export, _export_tiny(export, model_type, changes))
    return found


def export_to_split(root: Path) -> Path:
    """Write a mixed export of a tiny Llama whose heads, widths and vocabulary can be split over 2 and 3 devices."""
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 192}
    # vLLM pads a vocabulary to a multiple of 64, which it then splits.
    _export_tiny(root / "split", "llama", {**sizes, "vocab_size": 384})
    return root / "split"


def _export_tiny(export: Path, model_type: str, changes: Mapping[str, Any]) -> Path:
    loaded = as_loaded(with_random_vectors(tiny_model(model_type, **{**TINY, **changes})))
    stage(loaded, ExportRequest(mixed_point(loaded.topology), export), ExactFactors(loaded)).publish()
    dense = export.with_name(f"{export.name}-dense")
    loaded.model.save_pretrained(dense)
    return dense


def export_forms(root: Path) -> dict[str, Path]:
    """Write an export of SmolLM2 for every structural form; returns their folders."""
    loaded = load_model("demo:smollm2-135m-instruct", dtype="float32")
    points = structural_forms(loaded.topology)
    tokens = torch.randint(3, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    bank = FactorBank.build(loaded, list(points.values()), windows_of(tokens), folder=root / "bank")
    folders = {name: root / name.replace(" ", "-") for name in points}
    for name, point in points.items():
        form = "decilm" if "decilm" in name else "transformers"
        export_point(loaded, point, bank, folders[name], verify=False, format=form)
    return folders


def in_transformers(folder: Path) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens and their log-probabilities for every prompt."""
    with quiet_transformers(), torch.inference_mode():
        model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        tokens, log_probabilities = [], []
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            scores = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            new = ids[len(prompt) :]
            tokens.append(new)
            log_probabilities.append([float(scores[i, token]) for i, token in enumerate(new)])
    return tokens, log_probabilities


@dataclass(frozen=True)
class Job:
    """A folder that vLLM loads, with options beside those of `in_vllm`."""

    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def in_vllm(python: str, jobs: Sequence[Job], timeout_s: float = 1500) -> list[Served]:
    """Run the jobs one after the other in one process of vLLM's environment, and compare each with transformers."""
    script = Path(__file__).with_name("run_in_vllm.py")
    defaults = {"max_model_len": 48, "enforce_eager": True, "model_impl": "auto"}
    with tempfile.TemporaryDirectory() as temporary:
        request, result = Path(temporary) / "request.json", Path(temporary) / "result.json"
        entries = [{"folder": str(job.folder), "options": {**defaults, **job.options}} for job in jobs]
        request.write_text(json.dumps({"jobs": entries, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}), "utf-8")
        process = subprocess.run(
            [python, str(script), str(request), str(result)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if not result.is_file():
            raise RuntimeError(f"vLLM did not start: {process.stderr[-2000:]}")
        found = json.loads(result.read_text(encoding="utf-8"))
    found += [{"error": f"vLLM ended with code {process.returncode}"}] * (len(jobs) - len(found))
    return [_compared(job.folder, entry) for job, entry in zip(jobs, found, strict=True)]


def _compared(folder: Path, entry: Mapping[str, Any]) -> Served:
    if "error" in entry:
        return Served(False, error=entry["error"])
    tokens, log_probabilities = in_transformers(folder)
    difference = max(
        abs(one - other)
        for row, expected in zip(entry["log_probabilities"], log_probabilities, strict=True)
        for one, other in zip(row, expected, strict=True)
    )
    return Served(True, entry["tokens"] == tokens, difference)


def dense_verdicts(
    python: str, exports: Mapping[str, tuple[Path, Path]], served: Mapping[str, Served]
) -> dict[str, Served]:
    """What vLLM's Transformers backend does with the dense models of the families whose exports fail."""
    failed = [family for family in exports if not served[family].is_equal]
    jobs = [Job(exports[family][1], {"model_impl": "transformers"}) for family in failed]
    return dict(zip(failed, in_vllm(python, jobs), strict=True)) if failed else {}


def form_table(served: Mapping[str, Served]) -> str:
    """The table of structural forms as Markdown."""
    lines = ["| form (SmolLM2-135M) | transformers | vLLM |", "|---|---|---|"]
    lines += [f"| {form} | loads, same outputs | {_verdict(one)} |" for form, one in served.items()]
    return "\n".join(lines)


def family_table(served: Mapping[str, Served], dense: Mapping[str, Served]) -> str:
    """The table of families as Markdown; a family whose dense model vLLM refuses is said to be refused."""
    lines = ["| family | model type | transformers | vLLM |", "|---|---|---|---|"]
    for family, one in served.items():
        refused = family in dense and not dense[family].is_equal
        verdict = "not supported: vLLM does not run the dense model either" if refused else _verdict(one)
        lines.append(f"| {family} | `{TINY_FAMILIES[family][0]}` | loads, same outputs | {verdict} |")
    return "\n".join(lines)


def _verdict(served: Served) -> str:
    return "loads, same outputs" if served.is_equal else "loads, other outputs" if served.loads else "does not load"


DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "export-support.md"


def documented_table(name: str) -> str:
    """A table of the documentation: "forms" or "families"."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def main() -> None:
    """Run all forms and families, print what was seen, and write the tables."""
    from dse.engines import ENGINES

    python = ENGINES["vllm"].availability().python
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        forms, exports = export_forms(root), export_families(root)
        folders = {**forms, **{family: export for family, (export, _) in exports.items()}}
        served = dict(zip(folders, in_vllm(python, [Job(folder) for folder in folders.values()]), strict=True))
        dense = dense_verdicts(python, exports, served)
    for name, one in (*served.items(), *((f"{family}, dense", one) for family, one in dense.items())):
        print(f"{name}: {one}")
    text = DOCUMENT.read_text(encoding="utf-8")
    tables = {
        "forms": form_table({name: served[name] for name in forms}),
        "families": family_table({name: served[name] for name in exports}, dense),
    }
    for name, table in tables.items():
        text = text.replace(documented_table(name), table)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
