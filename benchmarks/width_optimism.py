"""Expected divergence of widths and ranks on the calibration text and on other text: are they equally optimistic?

    python benchmarks/width_optimism.py --text wikitext2_valid.txt [--layers 8 24] [--tokens 12288]

An MLP keeps a share of its channels, or its three matrices are decomposed by `fisher_svd` to that share of their
parameters. Both divergences are the quadratic form 1/2 tr(D E C E^T) with the gradients D of the calibration text (the
first two thirds of the text); C is the Gram matrix of that text or of the last third. Prints one row for each layer and
share, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from factorisation import windows_of
from torch import Tensor

from dse import load_model
from dse.decomposition import CalibrationWindows, GramSettings, fisher_svd, iterate_layer_grams
from dse.decomposition.bank_build import dense_weight
from dse.decomposition.fisher_svd import damped_metric
from dse.decomposition.mlp_width import channel_factors
from dse.models import LoadedModel
from dse.progress import ignore_progress

SHARES = (0.9, 0.75, 0.5, 0.25)


def grams_of(
    loaded: LoadedModel, names: tuple[str, ...], windows: CalibrationWindows, *, with_gradients: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name of each tensor to the Gram matrix of its inputs, and to that of its output gradients."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for of_layer in iterate_layer_grams(
        loaded, names, windows, with_gradients=with_gradients, settings=GramSettings(), progress=ignore_progress
    ):
        inputs |= {name: gram.clone() for sharing, gram in of_layer.sharing.items() for name in sharing}
        gradients |= {name: gram.clone() for name, gram in of_layer.gradients.items()}
    return inputs, gradients


def divergence(error: Tensor, gram: Tensor, metric: Tensor) -> float:
    wide = error.double()
    return 0.5 * float(((metric @ wide @ gram.double()) * wide).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text; WikiText-2 in the published figures")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--tokens", type=int, default=12288, help="calibration tokens")
    parser.add_argument("--other-tokens", type=int, default=6144)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype="float32")
    content = arguments.text.read_text("utf-8")
    cut = len(content) * 2 // 3
    mlps = {layer: loaded.topology.mlp(f"layers.{layer}.mlp") for layer in arguments.layers}
    names = tuple(tensor.name for mlp in mlps.values() for tensor in mlp.tensors)
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: Path(temporary, f"{name}.txt") for name in ("own", "other")}
        files["own"].write_text(content[:cut], encoding="utf-8")
        files["other"].write_text(content[cut:], encoding="utf-8")
        own, gradients = grams_of(
            loaded, names, windows_of(loaded, files["own"], arguments.tokens, 0), with_gradients=True
        )
        other, _ = grams_of(
            loaded, names, windows_of(loaded, files["other"], arguments.other_tokens, 0), with_gradients=False
        )
    metrics = {name: damped_metric(g.double()) * g.diagonal().mean().double() for name, g in gradients.items()}
    rows = []
    for layer, mlp in mlps.items():
        output = mlp.output.name
        weight = dense_weight(loaded, output)
        channels = channel_factors(weight, own[output], gradients[output])
        for share in SHARES:
            width = int(share * mlp.channels)
            error = weight.clone()
            error[:, channels.kept(width)] -= channels.output_matrix(width)
            row = {
                "layer": layer,
                "share": share,
                "width_expected": float(channels.divergence[width]),
                "width_other": divergence(error, other[output], metrics[output]),
                "rank_expected": 0.0,
                "rank_other": 0.0,
            }
            for tensor in mlp.tensors:
                dense, name = dense_weight(loaded, tensor.name), tensor.name
                rank = max(1, int(share * dense.numel() / sum(dense.shape)))
                error = dense - fisher_svd(dense, rank, own[name], gradients[name]).product()
                row["rank_expected"] += divergence(error, own[name], metrics[name])
                row["rank_other"] += divergence(error, other[name], metrics[name])
            for form in ("width", "rank"):
                row[f"{form}_ratio"] = row[f"{form}_other"] / row[f"{form}_expected"]
            rows.append(row)
            print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    print(json.dumps({"tokens": arguments.tokens, "other_tokens": arguments.other_tokens, "rows": rows}))


if __name__ == "__main__":
    main()
