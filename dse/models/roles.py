"""The role of a module inside a layer, read from its path with one table of suffixes for all families.

Families name the same matrix in different ways, but within a layer the end of the path is enough: `self_attn.q_proj`,
`attention.self.query` and `attention.q_lin` are all the query. The longest matching suffix wins, so that
`attention.output.dense` is not mistaken for BERT's `output.dense`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dse.errors import ModelError
from dse.topology import ATTENTION_ROLES

__all__ = ["ROLE_ORDER", "ROLE_SUFFIXES", "block_role_of", "check_role_names", "role_of", "suffix_match"]

ROLE_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "query": ("q_proj", "query_proj", "q_lin", "self.query", "attn.q", "attn.wq", "attention.wq"),
    "key": ("k_proj", "key_proj", "k_lin", "self.key", "attn.k", "attn.wk", "attention.wk"),
    "value": ("v_proj", "value_proj", "v_lin", "self.value", "attn.v", "attn.wv", "attention.wv"),
    "query_key_value": ("qkv_proj", "query_key_value", "attn.c_attn", "attn.Wqkv"),
    "attention_output": (
        "o_proj",
        "out_lin",
        "self_attn.out_proj",
        "attn.out_proj",
        "attention.out_proj",
        "attention.output.dense",
        "attention.dense",
        "self_attention.dense",
        "self_attn.dense",
        "attn.c_proj",
        "attn.o",
        "attn.Wo",
        "attn.wo",
        "attention.wo",
    ),
    "gate": ("gate_proj", "feed_forward.w1"),
    "up": ("up_proj", "feed_forward.w3", "mlp.c_fc", "mlp.fc_in", "fc1", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj", "mlp.Wi"),
    "down": ("down_proj", "feed_forward.w2", "mlp.c_proj", "mlp.fc_out", "fc2", "dense_4h_to_h", "mlp.Wo"),
    "intermediate": ("intermediate.dense", "ffn.lin1"),
    "output": ("output.dense", "ffn.lin2"),
}
"""Role to the path suffixes that have it, for every supported family; roles in the order of a forward pass."""

_SHARED_EXPERT_ROLES = ("shared_gate", "shared_up", "shared_down")

ROLE_ORDER: tuple[str, ...] = (*ROLE_SUFFIXES, *_SHARED_EXPERT_ROLES)
"""The roles in the order of a forward pass through a layer."""

_ROLE_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SHARED_EXPERT = re.compile(r"(^|\.)shared_experts?\.")
_ROUTED_EXPERT = re.compile(r"(^|\.)experts(\.|$)")


def suffix_match(path: str, suffixes: Iterable[str]) -> str | None:
    """The longest of `suffixes` that ends `path` at a dot; None if none does."""
    fitting = [suffix for suffix in suffixes if path == suffix or path.endswith("." + suffix)]
    return max(fitting, key=len, default=None)


def role_of(path: str, role_names: Mapping[str, str]) -> str | None:
    """The role of the module at `path`; None if neither the user nor the table names one.

    Args:
        path: Path below the layer, for example `self_attn.q_proj`.
        role_names: The user's path suffixes to roles; they take precedence.
    """
    named = suffix_match(path, role_names)
    if named is not None:
        return role_names[named]
    if _ROUTED_EXPERT.search(path):
        # Experts that are separate modules have no role: one role would name several tensors.
        return None
    known = {suffix: role for role, suffixes in ROLE_SUFFIXES.items() for suffix in suffixes}
    suffix = suffix_match(path, known)
    if suffix is None:
        return None
    role = known[suffix]
    if _SHARED_EXPERT.search(path):
        return f"shared_{role}" if f"shared_{role}" in _SHARED_EXPERT_ROLES else None
    return role


def block_role_of(roles: Iterable[str], paths: Iterable[str]) -> str | None:
    """`attention` or `mlp` for a part of a layer that holds these roles; None if it is neither or both.

    Args:
        roles: Roles of the decomposable tensors inside.
        paths: Paths of all modules inside, to detect experts, which have no role.
    """
    found = {"attention" if role in ATTENTION_ROLES else "mlp" for role in roles if role in ROLE_ORDER}
    if not found and any(_ROUTED_EXPERT.search(path) for path in paths):
        return "mlp"
    return found.pop() if len(found) == 1 else None


def check_role_names(role_names: Mapping[str, str]) -> None:
    """Check that the keys of `role_names` are path suffixes and its values are role names.

    Raises:
        ModelError: An entry is wrong; the message shows it.
    """
    for suffix, role in role_names.items():
        if not isinstance(suffix, str) or not suffix.strip(".") or suffix != suffix.strip(". "):
            raise ModelError(
                f"a key of `role_names` must be the end of a module path, like 'mixer.in_proj', but got {suffix!r}"
            )
        if not isinstance(role, str) or not _ROLE_NAME.fullmatch(role) or role == "layers":
            raise ModelError(
                f"a role must be a word of lower-case letters, digits and underscores, like 'input', but"
                f" `role_names` gives {role!r} for '{suffix}'"
            )
