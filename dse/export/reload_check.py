"""Reload exported folders in a separate process and compare them with the expectation.

`verification` runs this file as a script in a new interpreter in which `dse` cannot be imported, so a folder that loads
here loads on any machine with torch and transformers. For the same reason this file imports nothing from the package.
`expectation` imports it, so that both sides run a model and hash a weight with the same code.
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

__all__ = ["EXPECTED_FILE", "EXPECTED_TENSORS", "check_folder", "main_output", "tensor_digests", "token_ids"]

EXPECTED_TENSORS = "expected.safetensors"
EXPECTED_FILE = "expected.json"


class _DseForbidden(importlib.abc.MetaPathFinder):
    """Makes `import dse` fail, as on a machine without the package."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] == "dse":
            raise ModuleNotFoundError("an export must load without the package dse, but it imports it", name=fullname)


def main_output(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The model's logits, or its hidden states if it has no head, without padded positions.

    Args:
        model: Any Hugging Face model that reads tokens.
        input_ids: Shape (batch, tokens).
        attention_mask: Same shape; 0 marks padding, whose outputs are ignored.

    Returns:
        Float32 on the CPU: shape (unpadded tokens, width), or (batch, labels) for one output per sequence. A
            question-answering head has width 2: the logits of the first and of the last token of an answer.
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
    """Name to the SHA-256 of dtype, shape and bytes."""
    digests = {}
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(flat.numpy())  # type: ignore[arg-type]  # an array is a buffer
        digests[name] = digest.hexdigest()
    return digests


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text."""
    return [[int(token) for token in tokenizer(text)["input_ids"]] for text in texts]


def check_folder(folder: Path, expected: Path) -> dict[str, Any]:
    """Load one exported folder as its model card says, and compare it with the expectation.

    Returns:
        `max_difference` of the outputs (for a decoder with code of its own, also of the hidden states that AutoModel
            computes), `differing_weights` (names), `differing_texts` (those with other token ids),
        and `device`.
    """
    import transformers
    from safetensors.torch import load_file

    wanted = json.loads((expected / EXPECTED_FILE).read_text(encoding="utf-8"))
    tensors = load_file(expected / EXPECTED_TENSORS)
    remote = {} if wanted["is_plain"] else {"trust_remote_code": True}
    model = getattr(transformers, wanted["auto_class"]).from_pretrained(folder, **remote)
    model.eval()
    digests = tensor_digests(model.state_dict().items())
    # An item differs if only one side has the name, or both with different digests.
    differing = {name for name, _ in digests.items() ^ wanted["digests"].items()}
    device = _place(model, wanted["device"])
    differences = []
    for i in range(wanted["batches"]):
        output = main_output(model, tensors[f"input_ids.{i}"], tensors[f"attention_mask.{i}"])
        differences.append(_difference(output, tensors[f"output.{i}"]))
    if wanted["auto_class"] != "AutoModel" and _names_a_body(folder):
        # Engines load the model without its head, and compute logits themselves.
        del model
        body = transformers.AutoModel.from_pretrained(folder, **remote).eval()
        _place(body, device)
        for i in range(wanted["batches"]):
            output = main_output(body, tensors[f"input_ids.{i}"], tensors[f"attention_mask.{i}"])
            differences.append(_difference(output, tensors[f"hidden.{i}"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **remote)
    texts = zip(wanted["texts"], token_ids(tokenizer, wanted["texts"]), wanted["token_ids"], strict=True)
    return {
        "max_difference": max(differences),
        "differing_weights": sorted(differing),
        "differing_texts": [text for text, now, then in texts if now != then],
        "device": device,
    }


def _names_a_body(folder: Path) -> bool:
    """Whether the folder's own code defines the base model without the head."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "AutoModel" in config.get("auto_map", {})


def _place(model: Any, device: str) -> str:
    """Move the model to the device of the original, so that the same kernels run; use the CPU if the device is full."""
    if device != "cpu":
        try:
            model.to(device)
        except torch.OutOfMemoryError:
            model.to("cpu")
            return "cpu"
    return device


def _difference(now: Tensor, then: Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ or a value is NaN."""
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
        except Exception as error:  # noqa: BLE001 - any error means that the folder does not load
            results.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
    Path(result_file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    sys.meta_path.insert(0, _DseForbidden())
    _main(*sys.argv[1:])
