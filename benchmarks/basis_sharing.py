"""Whether neighbouring layers should share a right factor, as in Basis Sharing (Wang et al. 2024, arXiv 2410.03765).

    python benchmarks/basis_sharing.py --text wikitext2_valid.txt [--layers 2 4] [--kept 0.75 0.5]

For each role, every tensor of the model is decomposed twice to the same number of parameters: alone, and in groups of
neighbouring layers with a common right factor (rank x in_features). Sharing saves a factor, which pays for a higher
rank, but its rows must serve the inputs of several layers. As in the paper, the shared factor comes from the stacked
weights whitened by the sum of the layers' Gram matrices. Every left factor is then refitted to its own layer's
activations by least squares, which the paper does not do and which can only help. The first two thirds of the text are
for calibration, the last third is scored. Prints a table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from factorisation import WINDOW, perplexity, windows_of
from torch import Tensor

from dse import load_model
from dse.decomposition.activation_grams import iterate_grams
from dse.models import LoadedModel

DAMPING = 1e-6  # share of the mean eigenvalue, so that rarely used directions have an inverse


def right_factor(weights: Sequence[Tensor], grams: Sequence[Tensor], rank: int) -> Tensor:
    """Rows that are optimal for all layers' outputs under the summed Gram matrix, shape (rank, in_features)."""
    gram = torch.stack(list(grams)).sum(dim=0)
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    root = torch.linalg.cholesky(gram)  # gram = root root^T, so that |dW root|_F is the error of the outputs
    *_, right = torch.linalg.svd(torch.cat(list(weights)) @ root, full_matrices=False)
    return torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)


def refitted(weight: Tensor, gram: Tensor, right: Tensor) -> Tensor:
    """The product with the optimal left factor for this layer, in the shape of the weight."""
    inner = right @ gram @ right.T
    inner = inner + DAMPING * inner.diagonal().mean() * torch.eye(len(inner))
    return torch.linalg.solve(inner, right @ gram @ weight.T).T @ right


def loss(weight: Tensor, product: Tensor, gram: Tensor) -> float:
    """Squared error of the outputs relative to the outputs."""
    error = weight - product
    return float(((error @ gram) * error).sum() / ((weight @ gram) * weight).sum())


def products(weights: Sequence[Tensor], grams: Sequence[Tensor], kept: float, share: int) -> tuple[list[Tensor], int]:
    """Approximations of all layers in groups of `share`, and the rank that the parameter ratio allows."""
    rows, columns = weights[0].shape
    rank = math.floor(kept * share * rows * columns / (share * rows + columns))
    rank = min(rank, columns, share * rows)
    found = []
    for first in range(0, len(weights), share):
        group = slice(first, first + share)
        right = right_factor(weights[group], grams[group], rank)
        found += [refitted(w, g, right) for w, g in zip(weights[group], grams[group], strict=True)]
    return found, rank


def with_weights(loaded: LoadedModel, weights: Mapping[str, Tensor], token_ids: Tensor) -> float:
    """Perplexity with these weights, which are restored afterwards."""
    kept = {}
    for module, weight in weights.items():
        parameter = loaded.model.get_submodule(module).weight
        kept[module] = parameter.data
        parameter.data = weight.to(parameter.dtype)
    try:
        return perplexity(loaded, token_ids)
    finally:
        for module, before in kept.items():
            loaded.model.get_submodule(module).weight.data = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, required=True, help="a UTF-8 text file; WikiText-2 in the published figures"
    )
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=16384, help="number of calibration tokens")
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="number of layers that share a factor")
    parser.add_argument(
        "--kept", type=float, nargs="+", default=[0.75, 0.5], help="parameter ratio of the decomposed tensors"
    )
    options = parser.parse_args()
    loaded = load_model(options.model)
    content = options.text.read_text("utf-8")
    cut = len(content) * 2 // 3
    ids = loaded.tokenizer(content[cut:], add_special_tokens=False)["input_ids"]
    held_out = torch.tensor(ids)[: options.evaluation_tokens // WINDOW * WINDOW].reshape(-1, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "head.txt"
        text.write_text(content[:cut], encoding="utf-8")
        windows = windows_of(loaded, text, options.tokens, draw=0)
    names = [tensor.name for tensor in loaded.topology.tensors if tensor.layer is not None]
    grams: dict[str, Tensor] = {}
    for sharing, gram in iterate_grams(loaded.model, loaded.topology, names, windows):
        grams |= dict.fromkeys(sharing, gram.float())
    dense = perplexity(loaded, held_out)
    rows = []
    print(
        f"{'role':<18}{'kept':>5}{'layers':>7}{'rank':>6}{'loss alone':>12}{'shared':>9}{'ppl alone':>11}{'shared':>8}"
    )
    for role in loaded.topology.roles:
        own = [tensor for tensor in loaded.topology.tensors if tensor.role == role and tensor.layer is not None]
        weights = [loaded.model.get_submodule(t.module).weight.detach().float() for t in own]
        own_grams = [grams[tensor.name] for tensor in own]
        for kept in options.kept:
            measured = {}
            for share in (1, *options.layers):
                found, rank = products(weights, own_grams, kept, share)
                losses = [loss(w, p, g) for w, p, g in zip(weights, found, own_grams, strict=True)]
                ratio = with_weights(loaded, {t.module: p for t, p in zip(own, found, strict=True)}, held_out) / dense
                measured[share] = {"rank": rank, "loss": sum(losses) / len(losses), "ppl_ratio": ratio}
            for share in options.layers:
                alone, shared = measured[1], measured[share]
                print(
                    f"{role:<18}{kept:>5.2f}{share:>7}{shared['rank']:>6}{alone['loss']:>12.4f}{shared['loss']:>9.4f}"
                    f"{alone['ppl_ratio']:>11.3f}{shared['ppl_ratio']:>8.3f}",
                    flush=True,
                )
            rows.append({"role": role, "kept": kept, **{str(share): entry for share, entry in measured.items()}})
    print(json.dumps({"dense_perplexity": round(dense, 3), "tokens": options.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
