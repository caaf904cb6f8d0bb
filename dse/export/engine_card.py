"""The section of a model card that says how to run the folder in each engine that was verified."""

from __future__ import annotations

import re
from pathlib import Path

from dse.engines import ENGINES
from dse.export.card_tables import code, text
from dse.export.engine_expectation import EngineExpectation, VerifiedEngine
from dse.export.formats import export_format
from dse.files import write_text

__all__ = ["engine_section", "update_card"]

_HEADING = "## Verified engines"
_SECTION = re.compile(rf"^{_HEADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)

_ONNXRUNTIME = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx")
print([port.name for port in session.get_inputs()])  # input_ids, attention_mask, position_ids, past_key_values.*
```

`past_key_values.N.key` and `.value` have the shape (batch, heads, cached tokens, head size) and begin with 0 cached
tokens; each step returns the next ones as `present.N.key` and `.value`. Optimum loads the folder with
`optimum.onnxruntime.ORTModelForCausalLM.from_pretrained(folder)`."""

_OPENVINO = """\
```python
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = OVModelForCausalLM.from_pretrained(folder)
```

OpenVINO itself reads `openvino_model.xml` with `openvino.Core().compile_model(...)`; the key-value cache is state of
the inference request. A CPU may compute in bfloat16 unless `INFERENCE_PRECISION_HINT` is `f32`."""

_VLLM = """\
```
vllm serve path/to/this/folder{remote} --dtype {dtype}
lm_eval --model vllm --model_args pretrained=path/to/this/folder,{arguments}dtype={dtype} --tasks arc_easy
```"""


def engine_section(expected: EngineExpectation) -> str:
    """The section as Markdown; "" if no engine was verified."""
    parts = [_HEADING] if expected.verified else []
    for name, engine in ENGINES.items():
        if name in expected.verified:
            parts += [f"### {engine.title}", _sentence(expected.verified[name]), _usage(name, expected)]
    return "\n\n".join(part for part in parts if part)


def update_card(folder: Path, expected: EngineExpectation) -> None:
    """Replace the section in README.md, or add it before the provenance; a folder without README.md stays so."""
    file = folder / "README.md"
    if not file.is_file():
        return
    card = file.read_text(encoding="utf-8")
    section = engine_section(expected) + "\n\n"
    rest = _SECTION.sub("", card)
    place = rest.find("## Provenance\n")
    place = len(rest) if place < 0 else place
    write_text(file, rest[:place] + section + rest[place:])


def _sentence(verified: VerifiedEngine) -> str:
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in verified.versions.items())
    if verified.max_difference is None:
        return f"Verified in a fresh process with {versions}: equal weights and logits."
    return (
        f"Verified in a fresh process with {versions}: equal greedy tokens, largest difference of a log-probability"
        f" {verified.max_difference:.2g}."
    )


def _usage(name: str, expected: EngineExpectation) -> str:
    remote = export_format(expected.format).needs_remote_code
    if name == "vllm":
        flag, argument = (" --trust-remote-code", "trust_remote_code=True,") if remote else ("", "")
        return _VLLM.format(remote=flag, arguments=argument, dtype=expected.dtype)
    if name == "transformers":
        return f"See [How to load it](#how-to-load-it){' and read the code of the folder first' if remote else ''}."
    return {"onnxruntime": _ONNXRUNTIME, "openvino": _OPENVINO}.get(name, code(name))
