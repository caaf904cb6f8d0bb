"""Exact parameters, bytes and FLOPs of a design point, computed from shapes alone (no weights, no torch).

Let m = out_features and n = in_features. A dense weight has mn parameters and costs 2mn FLOPs per token (one multiply
and one add per entry). Two factors of rank r have r(m + n) parameters and cost 2r(m + n) FLOPs. Tucker adds an r x r
core: r^2 parameters and 2r^2 FLOPs. Pivoted factors have r(m + n) - r^2 parameters and twice as many FLOPs; their
index is not counted, and every rank saves. A stack counts as one matrix: its right factor counts once. The
break-even rank is the largest r whose factors have no more parameters than the weight.

An MLP of reduced width has fewer rows and columns in its matrices; parameters and FLOPs are proportional to the
channels kept. A removed block saves all its parameters and FLOPs, including attention over the KV cache and the cache
itself.
`dse.expert_tensor` has the arithmetic for fused expert tensors.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError, RankError
from dse.expert_tensor import ExpertTensor
from dse.model_parts import Decomposable, DecomposableTensor, Mlp, RemovableBlock
from dse.topology import Topology

__all__ = [
    "Cost",
    "break_even_rank",
    "check_point",
    "factor_parameters",
    "has_core",
    "largest_rank",
    "parameters_saved",
    "pivots_columns",
    "point_cost",
    "point_problems",
]

DEFAULT_PROMPT_TOKENS = 512
_RESIDUAL_ROLES = ("attention_output", "down", "output")


def has_core(method: str) -> bool:
    """Whether the method keeps an r x r core between its two factors."""
    return method == "tucker"


def break_even_rank(out_features: int, in_features: int, *, core: bool = False) -> int:
    """Largest rank whose factors have no more parameters than the dense weight (at least 1).

    Without a core this is floor(mn / (m + n)). With a core it is the floor of the positive root of
    r^2 + r(m + n) = mn.
    """
    m, n = out_features, in_features
    if not core:
        return max(1, (m * n) // (m + n))
    # isqrt is exact for any size: r = (sqrt((m + n)^2 + 4mn) - (m + n)) / 2.
    return max(1, (math.isqrt((m + n) ** 2 + 4 * m * n) - (m + n)) // 2)


def parameters_saved(topology: Topology, point: DesignPoint) -> int:
    """Parameters that `point` removes, including those of layers that are bypassed entirely.

    Raises:
        PointError: The point names a part that the model does not have.
    """
    bypassed = topology.passed_layers(point.removed)
    rest = {block.layer: block.rest_parameters for block in topology.blocks if block.layer in bypassed}
    blocks = sum(topology.blocks_by_name[name].parameters for name in point.removed)
    choices = [(topology.decomposable(name), choice) for name, choice in point.decomposed]
    factors = sum(part.parameters - factor_parameters(part, choice) for part, choice in choices)
    mlps = [(topology.mlp(name), kept) for name, kept in point.widths.items()]
    channels = sum(mlp.parameters_per_channel * (mlp.channels - kept) for mlp, kept in mlps)
    return factors + channels + blocks + sum(rest.values())


def pivots_columns(role: str) -> bool:
    """Whether pivoted factors of a tensor with this role consist of independent columns, rather than rows.

    Columns reorder the inputs of the product, rows its outputs. Engines split matrices that write to the residual
    stream by their inputs, and others by their outputs; the dimension that is split must keep its order.
    """
    return role not in _RESIDUAL_ROLES


def largest_rank(part: Decomposable, choice: TensorChoice | str) -> int:
    """Break-even rank of a tensor, stack or fused expert tensor.

    Args:
        part: The part to decompose.
        choice: The method's name, or a choice, which also sets the expert rank.
    """
    if isinstance(choice, TensorChoice) and choice.is_pivoted:
        return min(part.shape[-2:]) - 1  # fewer parameters than the dense weight at every rank
    method, expert_rank = (choice, 0) if isinstance(choice, str) else (choice.method, choice.expert_rank)
    if isinstance(part, ExpertTensor):
        return part.break_even_rank(expert_rank)
    return break_even_rank(*part.shape, core=has_core(method))


def factor_parameters(tensor: Decomposable, choice: TensorChoice) -> int:
    """Parameters of the factors (and core) that replace the weight or stack, without biases."""
    if isinstance(tensor, ExpertTensor):
        return tensor.factor_parameters(choice.rank, choice.expert_rank)
    square = choice.rank**2
    more = square if has_core(choice.method) else -square if choice.is_pivoted else 0
    return choice.rank * (tensor.out_features + tensor.in_features) + more


def point_problems(topology: Topology, point: DesignPoint) -> list[PointError]:
    """Every reason why `point` cannot be applied to a model of this topology, in the order of the point."""
    problems: list[PointError] = []
    taken: dict[str, str] = {}
    for name, choice in point:
        try:
            part = topology.part(name)
        except PointError as error:
            problems.append(error)
            continue
        problems += _overlaps(topology, name, taken)
        if choice.is_width:
            problems += _width_problems(topology, name, choice.rank)
            continue
        if isinstance(part, (RemovableBlock, Mlp)) or choice.is_removal:
            problems += _removal_problems(topology, part, choice)
            continue
        if problem := _expert_problem(part, choice) or _pivoted_problem(part, choice):
            problems.append(problem)
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
    """A problem if an earlier part already uses a tensor of this one. Adds this part's tensors to `taken`."""
    problems = []
    for tensor in topology.tensors_of(name):
        if tensor in taken:
            problems.append(
                PointError(
                    f"a point must name a tensor once, but '{tensor}' is part of both '{taken[tensor]}' and '{name}';"
                    " remove one of them"
                )
            )
            break
    taken.update(dict.fromkeys(topology.tensors_of(name), name))
    return problems


def _expert_problem(part: Decomposable, choice: TensorChoice) -> PointError | None:
    """A problem if the method or expert rank does not apply to this part."""
    if not isinstance(part, ExpertTensor):
        if not choice.expert_rank:
            return None
        return PointError(
            f"`expert_rank` applies to fused expert tensors only, but '{part.name}' is a matrix; remove it"
        )
    if choice.method != "tucker":
        return PointError(
            f"a fused expert tensor must be decomposed by method 'tucker', but '{part.name}' of shape"
            f" {' x '.join(map(str, part.shape))} has method '{choice.method}'; use 'tucker' or leave it dense"
        )
    if choice.expert_rank >= part.experts:
        return RankError(
            f"`expert_rank < {part.experts}` must hold for '{part.name}' ({part.experts} experts), but got"
            f" expert_rank={choice.expert_rank}; omit it to keep the expert mode at full rank"
        )
    return None


def _pivoted_problem(part: Decomposable, choice: TensorChoice) -> PointError | None:
    """A problem if pivoted factors are asked for several matrices."""
    if not choice.is_pivoted or isinstance(part, DecomposableTensor):
        return None
    return PointError(
        f"`form: pivoted` applies to single matrices, but '{part.name}' holds several; name its members, or remove it"
    )


def _width_problems(topology: Topology, name: str, kept: int) -> list[PointError]:
    """A problem if the part has no independent channels, or keeps all of them or more."""
    try:
        mlp = topology.mlp(name)
    except PointError as error:
        return [error]
    if kept < mlp.channels:
        return []
    return [
        RankError(
            f"`rank < {mlp.channels}` must hold for the width of '{name}', which has {mlp.channels} channels, but got"
            f" rank={kept}; lower it or leave the MLP dense."
        )
    ]


def _removal_problems(
    topology: Topology, part: Decomposable | RemovableBlock | Mlp, choice: TensorChoice
) -> list[PointError]:
    if isinstance(part, Mlp) and choice.is_removal:
        reason = topology.blocks_refused.get(part.name, "its removal was not verified")
        return [
            PointError(
                f"'{part.name}' must be a block that the model can skip exactly, but {reason}; reduce its width instead"
            )
        ]
    if isinstance(part, (RemovableBlock, Mlp)) and not choice.is_removal:
        inside = (*part.tensors, *part.experts) if isinstance(part, RemovableBlock) else [t.name for t in part.tensors]
        return [
            PointError(
                f"a block can be removed, or an MLP reduced by method 'width', but '{part.name}' has method"
                f" '{choice.method}'; name its tensors instead ({', '.join(inside)})"
            )
        ]
    if not isinstance(part, RemovableBlock) and choice.is_removal:
        return [
            PointError(
                f"only attention and MLP blocks can be removed, but '{part.name}' is not a block; remove the block that"
                f" contains it, for example 'layers.{part.layer or 0}.mlp'"
            )
        ]
    return []


def _attention_problems(topology: Topology, point: DesignPoint) -> list[PointError]:
    """Problems if no attention block remains, or none of a cache kind (its KV cache would have no length)."""
    attention = [block for block in topology.blocks if block.role == "attention"]
    if not attention:
        return []
    gone = set(point.removed)
    if len(attention) == topology.layer_count and gone.issuperset(block.name for block in attention):
        return [
            PointError(
                f"at least one attention block must remain, but the point removes all {len(attention)}; keep one, or no"
                " token can attend to another"
            )
        ]
    kinds = {block.cache_kind for block in attention}
    for kind in sorted(kinds) if len(kinds) > 1 else ():
        of_kind = [block for block in attention if block.cache_kind == kind]
        if gone.issuperset(block.name for block in of_kind):
            return [
                PointError(
                    f"at least one attention block of every kind must remain, since the KV cache is laid out by kind,"
                    f" but the point removes all {len(of_kind)} of '{kind}'; keep one, such as '{of_kind[0].name}'"
                )
            ]
    return []


def check_point(topology: Topology, point: DesignPoint) -> None:
    """Raise one error that lists all problems of a point that cannot be applied.

    Raises:
        RankError: The only problems are ranks above their break-even.
        PointError: The point has any other problem, such as a tensor that this model does not have.
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
    """Size and arithmetic of a model at a design point.

    Attributes:
        parameters_dense: All parameters of the dense model; tied parameters count once.
        parameters: All parameters of the decomposed model; tied parameters count once.
        reduction: 1 - parameters / parameters_dense.
        weight_bytes: Bytes of parameters and persistent buffers, in the dtype of the topology.
        flops_prefill_per_token: FLOPs per prompt token when `prompt_tokens` tokens are processed in one pass: every
            matrix, causal attention (half the square), and the output head at the last position only, as in generation.
        flops_decode_per_token: FLOPs to generate one token after `prompt_tokens` cached tokens, including the output
            head; None for encoders.
        kv_cache_bytes_per_token: Bytes that one token adds to the KV cache; None for encoders. Decomposition does not
            change it; removed attention blocks have no cache.
        prompt_tokens: Prompt length used for the attention terms.
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


def point_cost(topology: Topology, point: DesignPoint, *, prompt_tokens: int = DEFAULT_PROMPT_TOKENS) -> Cost:
    """Exact parameters, bytes and FLOPs of the model at `point`.

    Args:
        topology: The model's topology; loading it needs the model's config only.
        point: The design point.
        prompt_tokens: Tokens in the prompt (prefill) and in the KV cache (decode).

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
    # Attention scores and the weighted sum are two products of (tokens attended to) x (attention width) each. In
    # causal prefill a token attends to half of the prompt on average.
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
    """Matrix entries that multiply one token: those in the layers and other matrices, and those of the output head."""
    inside = sum(t.parameters for t in topology.tensors if t.layer is not None) + topology.other_matmul_parameters
    head = topology.head_parameters
    for name, choice in point:
        if choice.is_removal:
            inside -= topology.blocks_by_name[name].matmul_parameters
            continue
        if choice.is_width:
            mlp = topology.mlp(name)
            inside -= mlp.entries_per_channel * (mlp.channels - choice.rank)
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
