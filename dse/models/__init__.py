"""Load a model and find its decomposable parts."""

from __future__ import annotations

from dse.models.demo import DEMO_MODELS, demo_model_folder
from dse.models.fingerprint import model_fingerprint
from dse.models.heads import Head, context_tokens, head_of
from dse.models.load import DTYPES, LoadedModel, load_model, load_topology
from dse.models.model_topology import topology_of
from dse.models.removed_modules import PassedLayer, RemovedBlock

__all__ = [
    "DEMO_MODELS",
    "DTYPES",
    "Head",
    "LoadedModel",
    "PassedLayer",
    "RemovedBlock",
    "context_tokens",
    "demo_model_folder",
    "head_of",
    "load_model",
    "load_topology",
    "model_fingerprint",
    "topology_of",
]
