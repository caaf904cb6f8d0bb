"""`dse space`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dse.cli.commands._base import EXIT_OK, add_model, command, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse space`."""
    parser = command(
        commands,
        "space",
        _space,
        "what a search space contains on a model",
        "dse space search_spaces/layer_rank.yaml --model demo:smollm2-135m-instruct",
    )
    parser.add_argument("space", metavar="SPACE.yaml", help="search-space file")
    add_model(parser)


def _space(options: argparse.Namespace) -> int:
    from dse.cli.report import print_space
    from dse.config import load_search_space
    from dse.models import load_topology
    from dse.search.spaces.base import SearchSpace

    config = load_search_space(Path(options.space))
    topology = load_topology(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        role_names=config.role_names,
    )
    description = SearchSpace.from_config(config, topology).describe()
    if options.json:
        print_json(description)
    else:
        print_space(description)
    return EXIT_OK
