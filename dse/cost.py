"""Exact cost of a design point, by arithmetic on shapes alone: no weights, no torch.

A removed block saves all its parameters and FLOPs, attention over the cache and the cache itself included.

With m = out_features and n = in_features, a dense weight has mn parameters and costs 2mn FLOPs a token (one multiply
and one add per entry). Two factors of rank r hold r(m + n) and cost 2r(m + n); Tucker keeps an r x r core between them
and pays r^2 more of both. A stack is one such matrix: its right factor counts once. The break-even rank is the largest
r at which the factors are not larger than the weight. For fused expert tensors `dse.expert_tensor` has the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dse.callable_module import make_callable
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError, RankError
from dse.expert_tensor import ExpertTensor
from dse.topology import Decomposable, RemovableBlock, Topology

__all__ = [
    "Cost",
    "break_even_rank",
    "check_point",
    "cost",
    "factor_parameters",
    "has_core",
    "largest_rank",
    "parameters_saved",
    "point_problems",
]

DEFAULT_PROMPT_TOKENS = 512


def has_core(method: str) -> bool:
    """Whether the method keeps an r x r core beside its two factors."""
    return method == "tucker"


def break_even_rank(out_features: int, in_features: int, *, core: bool = False) -> int:
    """Largest rank whose factors hold no more parameters than the dense weight (at least 1).

    Without a core floor(mn / (m + n)); with one the floor of the positive root of r^2 + r(m + n) = mn.
    """
    m, n = out_features, in_features
    if not core:
        return max(1, (m * n) // (m + n))
    # isqrt keeps this exact for any size: r = (sqrt((m + n)^2 + 4mn) - (m + n)) / 2.
    return max(1, (math.isqrt((m + n) ** 2 + 4 * m * n) - (m + n)) // 2)


def parameters_saved(topology: Topology, point: DesignPoint) -> int:
    """Parameters that `point` does without, layers passed by included.

    Raises:
        PointError: It names what the model does not have.
    """
    passed = topology.passed_layers(point.removed)
    rest = {block.layer: block.rest_parameters for block in topology.blocks if block.layer in passed}
    blocks = sum(topology.blocks_by_name[name].parameters for name in point.removed)
    choices = [(topology.decomposable(name), choice) for name, choice in point if not choice.is_removal]
    factors = sum(part.parameters - factor_parameters(part, choice) for part, choice in choices)
    return factors + blocks + sum(rest.values())


def largest_rank(part: Decomposable, choice: TensorChoice | str) -> int:
    """The break-even rank of a tensor, stack or fused expert tensor.

    Args:
        part: What is decomposed.
        choice: By which method; a choice also says the expert rank.
    """
    method, expert_rank = (choice, 0) if isinstance(choice, str) else (choice.method, choice.expert_rank)
    if isinstance(part, ExpertTensor):
        return part.break_even_rank(expert_rank)
    return break_even_rank(*part.shape, core=has_core(method))


def factor_parameters(tensor: Decomposable, choice: TensorChoice) -> int:
    """Parameters of the factors (and core) that replace the weight or stack; biases are not counted."""
    if isinstance(tensor, ExpertTensor):
        return tensor.factor_parameters(choice.rank, choice.expert_rank)
    core = choice.rank**2 if has_core(choice.method) else 0
    return choice.rank * (tensor.out_features + tensor.in_features) + core


def point_problems(topology: Topology, point: DesignPoint) -> list[PointError]:
    """Everything that keeps `point` from being applied to a model of this topology, in order."""
    problems: list[PointError] = []
    taken: dict[str, str] = {}
    for name, choice in point:
        try:
            part = topology.part(name)
        except PointError as error:
            problems.append(error)
            continue
        problems += _overlaps(topology, name, taken)
        if isinstance(part, RemovableBlock) or choice.is_removal:
            problems += _removal_misused(part, choice)
            continue
        if misfit := _expert_misfits(part, choice):
            problems.append(misfit)
            continue
        limit = largest_rank(part, choice)
        if choice.rank > limit:
            problems.append(
                RankError(
                    f"`rank <= {limit}` must hold for '{name}' (break-even of {' x '.join(map(str, part.shape))}), but"
                    f" got rank={choice.rank}; lower it or leave the tensor dense."
                )
            )
    return problems + _attention_problems(topology, point)


def _overlaps(topology: Topology, name: str, taken: dict[str, str]) -> list[PointError]:
    """Whether a tensor of this part belongs to an earlier one too; `taken` (tensor to part) is added to."""
    problems = []
    for tensor in topology.tensors_of(name):
        if tensor in taken:
            problems.append(
                PointError(
                    f"a point must name a tensor once, but '{tensor}' is part of both '{taken[tensor]}' and '{name}';"
                    " leave one of them out"
                )
            )
            break
    taken.update(dict.fromkeys(topology.tensors_of(name), name))
    return problems


def _expert_misfits(part: Decomposable, choice: TensorChoice) -> PointError | None:
    """A method or an expert rank that does not go with this part."""
    if not isinstance(part, ExpertTensor):
        if not choice.expert_rank:
            return None
        return PointError(
            f"`expert_rank` must go with a fused expert tensor, but '{part.name}' is a matrix; leave it out"
        )
    if choice.method != "tucker":
        return PointError(
            f"a fused expert tensor must be decomposed by method 'tucker', but '{part.name}' of shape"
            f" {' x '.join(map(str, part.shape))} is given '{choice.method}'; write 'tucker' or leave it dense"
        )
    if choice.expert_rank >= part.experts:
        return RankError(
            f"`expert_rank < {part.experts}` must hold for '{part.name}', which has as many experts, but got"
            f" expert_rank={choice.expert_rank}; leave it out to keep the expert mode full"
        )
    return None


def _removal_misused(part: Decomposable | RemovableBlock, choice: TensorChoice) -> list[PointError]:
    if isinstance(part, RemovableBlock) and not choice.is_removal:
        return [
            PointError(
                f"a block can only be removed, but '{part.name}' is given method '{choice.method}'; name its tensors"
                f" ({', '.join((*part.tensors, *part.experts))})"
            )
        ]
    if not isinstance(part, RemovableBlock) and choice.is_removal:
        return [
            PointError(
                f"only attention and MLP blocks can be removed, but '{part.name}' is none; remove the block around"
                f" it, for example 'layers.{part.layer or 0}.mlp'"
            )
        ]
    return []


def _attention_problems(topology: Topology, point: DesignPoint) -> list[PointError]:
    """Without any attention no token sees another; without any of a kind, its KV cache has no length."""
    attention = [block for block in topology.blocks if block.role == "attention"]
    if not attention:
        return []
    gone = set(point.removed)
    if len(attention) == topology.layer_count and gone.issuperset(block.name for block in attention):
        return [
            PointError(
                f"one attention block must remain, but the point removes all {len(attention)}; no token would see"
                " another"
            )
        ]
    kinds = {block.cache_kind for block in attention}
    for kind in sorted(kinds) if len(kinds) > 1 else ():
        of_kind = [block for block in attention if block.cache_kind == kind]
        if gone.issuperset(block.name for block in of_kind):
            return [
                PointError(
                    f"one attention block of every kind must remain, since the KV cache is laid out by kind, but the"
                    f" point removes all {len(of_kind)} of '{kind}'; keep one, such as '{of_kind[0].name}'"
                )
            ]
    return []


def check_point(topology: Topology, point: DesignPoint) -> None:
    """Refuse a point that cannot be applied, with all its problems in one error.

    Raises:
        RankError: One rank or more lies above its break-even and nothing else is wrong.
        PointError: A tensor does not exist in this model.
    """
    problems = point_problems(topology, point)
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    kind = RankError if all(isinstance(problem, RankError) for problem in problems) else PointError
    raise kind(f"{len(problems)} problems with this point: " + " | ".join(str(problem) for problem in problems))


@dataclass(frozen=True)
class Cost:
    """What a design point costs on a model.

    Attributes:
        parameters_dense: All parameters of the dense model, tied ones once.
        parameters: The same of the decomposed model.
        reduction: 1 - parameters / parameters_dense.
        weight_bytes: Bytes of parameters and persistent buffers, in the dtype of the topology.
        flops_prefill_per_token: FLOPs per prompt token when a prompt of `prompt_tokens` is processed in one pass: every
            matrix, causal attention (half the square), and the output head on the last position alone, as generation
            needs it.
        flops_decode_per_token: FLOPs to generate one token behind `prompt_tokens` cached ones, output head included;
            None for encoders, which generate nothing.
        kv_cache_bytes_per_token: Bytes a token adds to the KV cache (decomposition does not change it, removed
            attention blocks do without); None for encoders.
        prompt_tokens: The prompt length that the attention terms assume.
    """

    parameters_dense: int
    parameters: int
    reduction: float
    weight_bytes: int
    flops_prefill_per_token: int
    flops_decode_per_token: int | None
    kv_cache_bytes_per_token: int | None
    prompt_tokens: int

    def to_json(self) -> dict[str, Any]:
        """The attributes as a JSON mapping."""
        return asdict(self)


def cost(topology: Topology, point: DesignPoint, *, prompt_tokens: int = DEFAULT_PROMPT_TOKENS) -> Cost:
    """Exact parameters, bytes and FLOPs of `point`.

    Args:
        topology: The model, from its config alone if need be.
        point: What is decomposed.
        prompt_tokens: Tokens in the prompt (prefill) and in the cache (decode).

    Raises:
        PointError: The point cannot be applied to this model.
        RankError: A rank lies above its break-even.
        ConfigError: `prompt_tokens` is below 1.
    """
    if prompt_tokens < 1:
        raise ConfigError(f"`prompt_tokens >= 1` must hold, but got {prompt_tokens}")
    check_point(topology, point)
    saved = parameters_saved(topology, point)
    parameters = topology.parameters_dense - saved
    removed = [topology.blocks_by_name[name] for name in point.removed]
    matmul, head = _matmul_entries(topology, point)
    # Scores and weighted sum are two products of (tokens seen) x (attention width) each; a causal prompt sees half.
    width = topology.layer_count * topology.attention_width - sum(block.attention_width for block in removed)
    cached = topology.layer_count * topology.key_value_width - sum(block.key_value_width for block in removed)
    attention = 4 * width
    seen_in_prefill = (prompt_tokens + 1) / 2 if topology.is_decoder else prompt_tokens
    head_share = head / prompt_tokens if topology.is_decoder else head
    return Cost(
        parameters_dense=topology.parameters_dense,
        parameters=parameters,
        reduction=1 - parameters / topology.parameters_dense,
        weight_bytes=round(parameters * topology.bytes_per_parameter)
        + topology.buffers_bytes
        - sum(block.buffers_bytes for block in removed),
        flops_prefill_per_token=round(2 * (matmul + head_share) + attention * seen_in_prefill),
        flops_decode_per_token=(
            round(2 * (matmul + head) + attention * (prompt_tokens + 1)) if topology.is_decoder else None
        ),
        kv_cache_bytes_per_token=(round(2 * cached * topology.bytes_per_parameter) if topology.is_decoder else None),
        prompt_tokens=prompt_tokens,
    )


def _matmul_entries(topology: Topology, point: DesignPoint) -> tuple[int, int]:
    """Entries that multiply a token inside the layers (and in other matrices), and in the output head."""
    inside = sum(t.parameters for t in topology.tensors if t.layer is not None) + topology.other_matmul_parameters
    head = topology.head_parameters
    for name, choice in point:
        if choice.is_removal:
            inside -= topology.blocks_by_name[name].matmul_parameters
            continue
        part = topology.decomposable(name)
        if isinstance(part, ExpertTensor):
            inside -= part.matmul_parameters - part.factor_matmul_parameters(choice.rank, choice.expert_rank)
            continue
        saved = part.parameters - factor_parameters(part, choice)
        if part.layer is None:
            head -= saved
        else:
            inside -= saved
    return inside, head


make_callable(__name__)
