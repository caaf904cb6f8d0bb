"""Runs in its own process, started by test_hub.py, because the hub client reads the hub's address on import."""

from __future__ import annotations

import json
import sys
import time
import urllib.request

import torch

from dse.errors import ModelError
from dse.models import load_model, load_topology


def attempt(ref: str, **keywords: str | bool) -> dict[str, object]:
    start = time.monotonic()
    try:
        loaded = load_model(ref, **keywords)  # type: ignore[arg-type]
        result: dict[str, object] = {"fingerprint": loaded.fingerprint, "revision": loaded.revision}
        result |= {"architecture": loaded.topology.architecture, "roles": loaded.topology.roles}
    except ModelError as error:
        result = {"error": str(error)}
    return {**result, "seconds": time.monotonic() - start}


endpoint = sys.argv[1]
torch.set_num_threads(1)
results = {
    "good": attempt("tiny/llama"),
    "branch": attempt("tiny/llama", revision="main"),
    "unknown": attempt("tiny/nothing"),
    "gated": attempt("tiny/gated"),
    "revision": attempt("tiny/llama", revision="no-such-branch"),
    "pickles": attempt("tiny/pickles"),
    "own code": attempt("tiny/custom"),
    "own code allowed": attempt("tiny/custom", trust_remote_code=True),
    "config": {"parameters": load_topology("tiny/pickles").parameters_dense},
}
urllib.request.urlopen(f"{endpoint}/stop-answering").read()
results["cached"] = attempt("tiny/llama")
results["not cached"] = attempt("tiny/other")
json.dump(results, sys.stdout)
