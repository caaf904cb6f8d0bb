"""Exact cost of a design point, by arithmetic on shapes alone: no weights, no torch.

With m = out_features and n = in_features, a dense weight has mn parameters and costs 2mn FLOPs a token (one multiply
and one add per entry). Two factors of rank r hold r(m + n) and cost 2r(m + n); Tucker keeps an r x r core between them
and pays r^2 more of both. The break-even rank is the largest r at which the factors are not larger than the weight.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dse.callable_module import make_callable
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError, RankError
from dse.topology import DecomposableTensor, Topology

__all__ = ["Cost", "break_even_rank", "check_point", "cost", "factor_parameters", "has_core", "point_problems"]

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


def factor_parameters(tensor: DecomposableTensor, choice: TensorChoice) -> int:
    """Parameters of the factors (and core) that replace the weight; the bias is not counted."""
    core = choice.rank**2 if has_core(choice.method) else 0
    return choice.rank * (tensor.out_features + tensor.in_features) + core


def point_problems(topology: Topology, point: DesignPoint) -> list[PointError]:
    """Everything that keeps `point` from being applied to a model of this topology, in order."""
    problems: list[PointError] = []
    for name, choice in point:
        try:
            tensor = topology[name]
        except PointError as error:
            problems.append(error)
            continue
        limit = break_even_rank(*tensor.shape, core=has_core(choice.method))
        if choice.rank > limit:
            problems.append(
                RankError(
                    f"`rank <= {limit}` must hold for '{name}' (break-even of {tensor.out_features} x"
                    f" {tensor.in_features}), but got rank={choice.rank}; lower it or leave the tensor dense."
                )
            )
    return problems


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
        kv_cache_bytes_per_token: Bytes a token adds to the KV cache (decomposition does not change it); None for
            encoders.
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
    saved = sum(topology[name].parameters - factor_parameters(topology[name], choice) for name, choice in point)
    parameters = topology.parameters_dense - saved
    layer_matrices = (
        sum(t.parameters for t in topology.tensors if t.layer is not None) + topology.other_matmul_parameters
    )
    outside = sum(
        t.parameters - factor_parameters(t, point.by_name[t.name])
        for t in topology.tensors
        if t.layer is None and t.name in point.by_name
    )
    matmul, head = layer_matrices - (saved - outside), topology.head_parameters - outside
    # Scores and weighted sum are two products of (tokens seen) x (attention width) each; a causal prompt sees half.
    attention = 4 * topology.layer_count * topology.attention_width
    seen_in_prefill = (prompt_tokens + 1) / 2 if topology.is_decoder else prompt_tokens
    head_share = head / prompt_tokens if topology.is_decoder else head
    return Cost(
        parameters_dense=topology.parameters_dense,
        parameters=parameters,
        reduction=1 - parameters / topology.parameters_dense,
        weight_bytes=round(parameters * topology.bytes_per_parameter) + topology.buffers_bytes,
        flops_prefill_per_token=round(2 * (matmul + head_share) + attention * seen_in_prefill),
        flops_decode_per_token=(
            round(2 * (matmul + head) + attention * (prompt_tokens + 1)) if topology.is_decoder else None
        ),
        kv_cache_bytes_per_token=(
            round(2 * topology.layer_count * topology.key_value_width * topology.bytes_per_parameter)
            if topology.is_decoder
            else None
        ),
        prompt_tokens=prompt_tokens,
    )


make_callable(__name__)
