"""`dse cost`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, POINT_HELP, add_model, command, positive, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse cost`."""
    parser = command(
        commands,
        "cost",
        _cost,
        "exact parameters, bytes and FLOPs of a point, from the model's config alone",
        """dse cost --model meta-llama/Llama-2-7b-hf --point '{"method": "tucker", "rank": 1, "layers": [2, 17]}'""",
    )
    add_model(parser)
    parser.add_argument("--point", required=True, metavar="POINT", help=POINT_HELP)
    parser.add_argument(
        "--prompt-tokens", type=positive, default=512, metavar="N", help="prompt or cache length for the FLOPs (512)"
    )


def _cost(options: argparse.Namespace) -> int:
    from dse.cli.report import print_cost
    from dse.cost import cost
    from dse.design_point import DesignPoint
    from dse.models import load_topology

    topology = load_topology(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    point = DesignPoint.read(options.point, topology)
    result = cost(topology, point, prompt_tokens=options.prompt_tokens)
    if options.json:
        print_json(result.to_json())
    else:
        print_cost(options.model, topology, point, result)
    return EXIT_OK
