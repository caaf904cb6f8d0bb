"""How the cost of each phase grows with parameters and depth, on random Llama-shaped models.

    python benchmarks/scaling.py [--sizes 0.13 0.36 0.7 1.1] [--depths 8 16 32 64] [--phases load bank export]
        [--tokens 4096] [--rank 64] [--method whitened_svd]

Writes each model as bfloat16 safetensors, then runs every phase in a process of its own: seconds, and the peak of its
memory beyond the interpreter and the libraries. Weights and activations are float32, because the CPUs that this was
made for multiply no bfloat16. Phases: `load` (a resident model), `bank` (from the files, layer by layer), `bank_whole`
(passes of the whole resident model, one for each group of layers: the way before the sequential pass), `profile` (the
divergence of one option, from stored states), `evaluation` (log-likelihoods, per token), `surgery` (apply and undo),
`export` (write the weights of a point). Exponents are slopes of log seconds (log bytes) over log parameters, and over
log depth at one width. Prints a table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES: Mapping[str, Mapping[str, int]] = {
    "0.13": {"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "groups": 3, "vocabulary": 49152},
    "0.36": {"hidden": 960, "intermediate": 2560, "layers": 32, "heads": 15, "groups": 5, "vocabulary": 49152},
    "0.7": {"hidden": 1536, "intermediate": 4096, "layers": 26, "heads": 24, "groups": 4, "vocabulary": 32000},
    "1.1": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "groups": 4, "vocabulary": 32000},
}
"""Billions of parameters to the shape: SmolLM2-135M, SmolLM2-360M, one between, and TinyLlama-1.1B."""

NARROW = {"hidden": 256, "intermediate": 688, "heads": 4, "groups": 4, "vocabulary": 8192}
"""The shape of the models that differ in depth only."""

PHASES = ("load", "bank", "bank_whole", "profile", "evaluation", "surgery", "export")
WINDOW = 256
TRIAL_TOKENS = 16_384
"""Tokens that the tasks of a small trial score; the share of surgery is of the evaluation of these."""


@dataclass(frozen=True)
class Run:
    """One model and the settings of its phases."""

    folder: Path
    method: str
    rank: int
    tokens: int

    @property
    def banks(self) -> Path:
        return self.folder / "banks"


def write_model(folder: Path, shape: Mapping[str, int]) -> int:
    """Write a random model layer by layer, and a tokenizer of bytes; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        max_position_embeddings=2048,
        tie_word_embeddings=shape["hidden"] < 1000,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(torch.bfloat16)

    hidden, key_value = shape["hidden"], shape["hidden"] // shape["heads"] * shape["groups"]
    files: dict[str, str] = {}
    count = 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        count += sum(tensor.numel() for tensor in tensors.values())

    outside = {
        "model.embed_tokens.weight": random(shape["vocabulary"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    if not config.tie_word_embeddings:
        outside["lm_head.weight"] = random(shape["vocabulary"], hidden)
    save("outside.safetensors", outside)
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}"
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (shape["intermediate"], hidden),
            "mlp.up_proj": (shape["intermediate"], hidden),
            "mlp.down_proj": (hidden, shape["intermediate"]),
        }
        tensors = {f"{prefix}.{name}.weight": random(*size) for name, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(f"layer-{layer:03}.safetensors", tensors)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


def peak_and_seconds(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result of `work`, its seconds, and the growth of the peak of resident memory over what was resident before.

    Writing 5 to `clear_refs` resets the peak that Linux keeps. Pages of mapped files count while they are mapped.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, seconds, _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def windows_of(loaded: Any, tokens: int, seed: int = 0) -> Any:
    import torch

    from dse.decomposition import CalibrationWindows

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, min(8192, loaded.model.config.vocab_size), (tokens // WINDOW, WINDOW), generator=generator)
    return CalibrationWindows(ids, f"scaling-{tokens}-{seed}", "random tokens")


def point_of(loaded: Any, run: Run) -> Any:
    from dse import DesignPoint, TensorChoice
    from dse.cost import break_even_rank

    ranks = {t.name: min(run.rank, break_even_rank(*t.shape)) for t in loaded.topology.tensors}
    return DesignPoint.of({name: TensorChoice(run.method, rank) for name, rank in ranks.items()})


def measure(phase: str, run: Run) -> dict[str, float]:
    """Run one phase in this process."""
    import torch

    from dse import FactorBank, load_model
    from dse.decomposition import GramSettings, apply_point

    torch.zeros(64, 64) @ torch.zeros(64, 64)
    model = str(run.folder)
    if phase == "load":
        _, seconds, peak = peak_and_seconds(lambda: load_model(model))
        return {"seconds": seconds, "peak_bytes": peak}
    if phase.startswith("bank"):
        is_sequential = phase == "bank"

        def build() -> None:
            loaded = load_model(model, weights_on_disk=is_sequential)
            folder = run.banks if is_sequential else run.folder / "banks_whole"
            settings = GramSettings(is_sequential=is_sequential)
            windows = windows_of(loaded, run.tokens)
            FactorBank.build(loaded, [point_of(loaded, run)], windows, folder=folder, settings=settings)

        _, seconds, peak = peak_and_seconds(build)
        return {"seconds": seconds, "peak_bytes": peak}
    loaded = load_model(model)
    bank = FactorBank.build(loaded, [point_of(loaded, run)], windows_of(loaded, run.tokens), folder=run.banks)
    point = point_of(loaded, run)
    if phase == "surgery":
        seconds, peaks = [], []
        for _ in range(5):
            handle, apply_s, peak = peak_and_seconds(lambda: apply_point(loaded.model, loaded.topology, point, bank))
            _, undo_s, _ = peak_and_seconds(handle.undo)
            seconds.append(apply_s + undo_s)
            peaks.append(peak)
        return {"seconds": statistics.median(seconds), "peak_bytes": max(peaks)}
    if phase == "profile":
        return _profile(loaded, bank, run)
    with torch.inference_mode():
        if phase == "evaluation":
            ids = windows_of(loaded, 1024, seed=1).token_ids
            loaded.model(ids[:1])
            _, seconds, peak = peak_and_seconds(lambda: [loaded.model(row[None]).logits.log_softmax(-1) for row in ids])
            return {"seconds_per_token": seconds / ids.numel(), "peak_bytes": peak}
    from dse.export.weights import write_weights

    handle = apply_point(loaded.model, loaded.topology, point, bank)
    folder = run.folder / "export"
    folder.mkdir()
    _, seconds, peak = peak_and_seconds(lambda: write_weights(loaded.model, folder))
    handle.undo()
    return {"seconds": seconds, "peak_bytes": peak}


def _profile(loaded: Any, bank: Any, run: Run) -> dict[str, float]:
    """Seconds of one option, as the mean over one tensor of each fourth layer."""
    from dse import DesignPoint
    from dse.sensitivity.divergence_meter import DivergenceMeter

    choices = dict(point_of(loaded, run))
    layers = range(0, loaded.topology.layer_count, 4)

    def options() -> None:
        meter = DivergenceMeter(loaded, windows_of(loaded, 512, seed=2).token_ids, bank)
        for layer in layers:
            name = f"layers.{layer}.down"
            meter.measure(DesignPoint.of({name: choices[name]}), layer)

    _, seconds, peak = peak_and_seconds(options)
    return {"seconds_per_option": seconds / len(layers), "peak_bytes": peak}


def in_a_process(phase: str, run: Run) -> dict[str, float]:
    """`measure` in a fresh process, so that one phase leaves nothing behind for the next."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (phase, run))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log value over log size; None with fewer than two sizes."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return round(statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope, 2)


def measure_series(
    shapes: Mapping[str, Mapping[str, int]], phases: Sequence[str], arguments: argparse.Namespace, scale: str
) -> dict[str, Any]:
    """Measure all phases of these models; `scale` names what the exponents are taken against."""
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary) / "model"
            parameters = write_model(folder, shape)
            run = Run(folder, arguments.method, arguments.rank, arguments.tokens)
            for phase in phases:
                row = {"model": name, "parameters": parameters, "layers": shape["layers"], "phase": phase}
                row |= in_a_process(phase, run)
                rows.append(row)
                print("  ".join(f"{_text(value):<14}" for value in row.values()), flush=True)
    exponents = {}
    for phase in phases:
        if not (of_phase := [row for row in rows if row["phase"] == phase]):
            continue
        keys = [key for key in of_phase[0] if key.startswith(("seconds", "peak"))]
        sizes = [row[scale] for row in of_phase]
        exponents[phase] = {key: exponent(sizes, [row[key] for row in of_phase]) for key in keys}
    return {"rows": rows, "exponents": exponents}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value / 1e6:.0f} MB" if isinstance(value, int) and value > 10**6 else str(value)


def surgery_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Surgery as a share of a small trial: the evaluation of `TRIAL_TOKENS` tokens."""
    by_phase = {(row["model"], row["phase"]): row for row in rows}
    return {
        model: round(row["seconds"] / (TRIAL_TOKENS * by_phase[model, "evaluation"]["seconds_per_token"]), 5)
        for (model, phase), row in by_phase.items()
        if phase == "surgery" and (model, "evaluation") in by_phase
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="billions of parameters")
    parser.add_argument("--depths", nargs="*", type=int, default=[8, 16, 32, 64], help="layers of a narrow model")
    parser.add_argument("--phases", nargs="+", default=[p for p in PHASES if p != "bank_whole"], choices=PHASES)
    parser.add_argument("--tokens", type=int, default=4096, help="number of calibration tokens")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--method", default="whitened_svd")
    parser.add_argument("--folder", type=Path, default=None, help="where models are written; 2.2 GB for the largest")
    arguments = parser.parse_args()
    by_size = measure_series(
        {size: SHAPES[size] for size in arguments.sizes}, arguments.phases, arguments, "parameters"
    )
    depth_phases = [phase for phase in arguments.phases if phase.startswith("bank")] if arguments.depths else []
    shapes = {f"{depth} layers": {**NARROW, "layers": depth} for depth in arguments.depths} if depth_phases else {}
    by_depth = measure_series(shapes, depth_phases, arguments, "layers") if shapes else {}
    shares = surgery_shares(by_size["rows"])
    for title, series in (("parameters", by_size), ("depth", by_depth)):
        for phase, found in series.get("exponents", {}).items():
            print(f"exponent over {title}: {phase:<12} {found}")
    print(f"surgery, share of a trial of {TRIAL_TOKENS} tokens: {shares}")
    settings = {"tokens": arguments.tokens, "rank": arguments.rank, "method": arguments.method}
    print(json.dumps({**settings, "by_size": by_size, "by_depth": by_depth, "surgery_share": shares}))


if __name__ == "__main__":
    main()
