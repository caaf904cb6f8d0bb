"""`dse cost`: exact parameters, bytes and FLOPs of a point."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from dse.cli.options import POINT_HELP, add_command, add_model, model_request, positive

if TYPE_CHECKING:
    from dse.standalone import ModelCost


def add_parser(commands: Any) -> None:
    """Add `dse cost`."""
    parser = add_command(
        commands,
        "cost",
        run,
        summary="compute parameters, bytes and FLOPs of a point, from the model's config only",
        example="""dse cost --model Qwen/Qwen3-0.6B --point '{"method": "tucker", "rank": 1, "layers": [2, 17]}'""",
    )
    add_model(parser)
    parser.add_argument("--point", required=True, metavar="POINT", help=POINT_HELP)
    parser.add_argument(
        "--prompt-tokens", type=positive, default=512, metavar="N", help="prompt or cache length for the FLOPs (512)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the cost."""
    from dse.cli.printing import print_result
    from dse.standalone import model_cost

    found = model_cost(model_request(options), options.point, prompt_tokens=options.prompt_tokens)
    return print_result(options, found, partial(_print_cost, options.model), lambda found: found.cost.to_json())


def _print_cost(model: str, found: ModelCost) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dse.cli.printing import console
    from dse.report.units import percent

    cost = found.cost
    table = Table(
        title=f"{escape(model)} ({found.topology.architecture}), point {found.point.id}: {_changes_text(found)}"
    )
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in (
        ("parameters, dense", f"{cost.parameters_dense:,}"),
        ("parameters", f"{cost.parameters:,}"),
        ("reduction", percent(cost.reduction, 2)),
        ("weight bytes", f"{cost.weight_bytes:,} ({cost.weight_bytes / 1e9:.2f} GB)"),
        (f"FLOPs per token, prefill of {cost.prompt_tokens} tokens", f"{cost.flops_prefill_per_token:,}"),
        (f"FLOPs per token, decode after {cost.prompt_tokens} tokens", _number(cost.flops_decode_per_token)),
        ("KV-cache bytes per token", _number(cost.kv_cache_bytes_per_token)),
    ):
        table.add_row(name, value)
    console().print(table)


def _changes_text(found: ModelCost) -> str:
    topology, point = found.topology, found.point
    decomposed = sum(len(topology.tensors_of(name)) for name, _ in point.decomposed)
    parts = [f"{decomposed} of {len(topology.tensors) + len(topology.experts)} tensors decomposed"]
    if point.widths:
        parts.append(f"{len(point.widths)} of {len(topology.mlps)} MLPs of reduced width")
    if point.removed:
        parts.append(f"{len(point.removed)} of {len(topology.blocks)} blocks removed")
    return ", ".join(parts)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
