"""`dse space`: describe a search space on a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from dse.cli.options import add_command, add_model, model_request
from dse.shipped_files import shipped_names

_MAX_RANKS = 12


def add_parser(commands: Any) -> None:
    """Add `dse space`."""
    parser = add_command(
        commands,
        "space",
        run,
        summary="describe a search space on a model",
        example="dse space layer_rank --model demo:smollm2-135m-instruct",
        details=f"shipped search spaces: {', '.join(shipped_names('search_spaces'))}",
    )
    parser.add_argument("space", metavar="SPACE", help="search-space file, or the name of a shipped one")
    add_model(parser)


def run(options: argparse.Namespace) -> int:
    """Print the description."""
    from dse.cli.printing import print_result
    from dse.standalone import describe_space

    return print_result(options, describe_space(options.space, model_request(options)), _print_description)


def _print_description(description: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dse.cli.printing import console

    title = f"search space {escape(description['name'])} on {description['architecture']}"
    table = Table(title=title, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    for name, value in _rows(description):
        table.add_row(name, escape(value))
    console().print(table)


def _rows(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from dse.report.units import number_ranges, percent

    layers = description["layers"]
    yield "methods", ", ".join(description["methods"])
    if description["forms"] != ["plain"]:
        yield "forms of factors", ", ".join(description["forms"])
    yield "layers", f"{len(layers)}: {number_ranges(layers)}"
    yield "roles", ", ".join(description["roles"])
    yield "tensors", str(description["tensors"])
    yield "removable blocks of the model", str(description["removable_blocks"])
    if description["reducible_mlps"]:
        yield "MLPs of reducible width", str(description["reducible_mlps"])
    yield "dimensions", f"{description['dimensions']} ({description['kind']})"
    for role, ranks in description["ranks"].items():
        more = ", ..." if len(ranks) > _MAX_RANKS else ""
        yield f"{'widths' if role == 'mlp' else 'ranks'} of {role}", ", ".join(map(str, ranks[:_MAX_RANKS])) + more
    for name in ("points", "configurations"):
        number, log2 = description[f"number_of_{name}"], description[f"number_of_{name}_log2"]
        yield name, f"{number:,} = 2^{log2:.2f}"
    yield "smallest reduction", percent(description["smallest_reduction"], 3)
    yield "largest reduction", percent(description["largest_reduction"], 2)
    for name, limits in description["limits"].items():
        yield f"limits on {name}", f"{_limit_text(name, limits['min'])} to {_limit_text(name, limits['max'])}"
    for name in ("keep_layers", "keep_roles"):
        if description[name]:
            yield name.replace("_", " "), ", ".join(map(str, description[name]))


def _limit_text(name: str, value: float | None) -> str:
    from dse.report.units import percent

    if value is None:
        return "no limit"
    return percent(value) if name == "reduction" else f"{value:,g} {name.rpartition('_')[2]}"
