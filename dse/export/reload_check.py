"""Reload exported folders in a process of its own and compare them with what was written.

`verification` runs this file as a script, in a fresh interpreter in which `dse` cannot be imported: what loads here
loads on a machine that has torch and transformers alone. For the same reason it imports nothing of the package, while
`expectation` imports from it, so that both sides ask a model and hash a weight by the same lines.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXPECTED_FACTS", "EXPECTED_TENSORS", "check_folder", "main_output", "tensor_digests", "token_ids"]

EXPECTED_TENSORS = "expected.safetensors"
EXPECTED_FACTS = "expected.json"


class _DseForbidden(importlib.abc.MetaPathFinder):
    """Makes `import dse` fail, as it would where the package is not installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "dse":
            raise ModuleNotFoundError("an export must load without the package dse, but it imports it", name=fullname)


def main_output(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The model's logits, or its hidden states where it has no head; padded positions left out.

    Args:
        model: Any Hugging Face model that reads tokens.
        input_ids: Shape (batch, tokens).
        attention_mask: Same shape; 0 marks padding, whose outputs mean nothing.

    Returns:
        Float32 on the CPU: shape (tokens seen, width), or (batch, labels) where there is one output per sequence; the
        width of a question-answering head is 2, a logit for the first and one for the last token of an answer.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    named: Mapping[str, Any] = output
    keys = [key for key in ("logits", "prediction_logits", "last_hidden_state") if key in named]
    tensor: Tensor
    if "start_logits" in named and "end_logits" in named:
        tensor = torch.stack((named["start_logits"], named["end_logits"]), dim=-1)
    else:
        tensor = named[keys[0]] if keys else output[0]
    tensor = tensor.float().cpu()
    return tensor[attention_mask.bool()] if tensor.shape[:2] == attention_mask.shape and tensor.ndim == 3 else tensor


def tensor_digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name to SHA-256 of dtype, shape and bytes."""
    digests = {}
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer
        digests[name] = digest.hexdigest()
    return digests


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """How the tokenizer reads each text."""
    return [[int(token) for token in tokenizer(text)["input_ids"]] for text in texts]


def check_folder(folder: Path, expected: Path) -> dict[str, Any]:
    """Load one exported folder the way its model card says, and compare it with what was expected.

    Returns:
        `max_difference` of the outputs, `differing_weights` (names), `differing_texts` (those the tokenizer reads
        otherwise), and `device`.
    """
    import transformers
    from safetensors.torch import load_file

    facts = json.loads((expected / EXPECTED_FACTS).read_text(encoding="utf-8"))
    tensors = load_file(expected / EXPECTED_TENSORS)
    remote = {} if facts["is_plain"] else {"trust_remote_code": True}
    model = getattr(transformers, facts["auto_class"]).from_pretrained(folder, **remote)
    model.eval()
    digests = tensor_digests(model.state_dict().items())
    wanted = facts["digests"]
    differing = sorted(name for name in digests.keys() | wanted.keys() if digests.get(name) != wanted.get(name))
    device = _place(model, facts["device"])
    differences = [
        _difference(
            main_output(model, tensors[f"input_ids.{i}"], tensors[f"attention_mask.{i}"]), tensors[f"output.{i}"]
        )
        for i in range(facts["batches"])
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **remote)
    read = token_ids(tokenizer, facts["texts"])
    return {
        "max_difference": max(differences),
        "differing_weights": differing,
        "differing_texts": [
            t for t, now, then in zip(facts["texts"], read, facts["token_ids"], strict=True) if now != then
        ],
        "device": device,
    }


def _place(model: Any, device: str) -> str:
    """Move the model where the original computed, so that the same kernels answer; the CPU serves a full one."""
    if device != "cpu":
        try:
            model.to(device)
        except torch.OutOfMemoryError:
            model.to("cpu")
            return "cpu"
    return device


def _difference(now: Tensor, then: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is not a number."""
    if now.shape != then.shape:
        return float("inf")
    largest = float((now - then).abs().max())
    return largest if largest == largest else float("inf")


def _main(request_file: str, result_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    results = []
    for check in request["checks"]:
        try:
            results.append(check_folder(Path(check["folder"]), Path(check["expected"])))
        except Exception as error:  # noqa: BLE001 - whatever a library raises here means that the folder does not load
            results.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
    Path(result_file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    sys.meta_path.insert(0, _DseForbidden())
    _main(*sys.argv[1:])
