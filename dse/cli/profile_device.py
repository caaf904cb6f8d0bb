"""`dse profile-device`: time the matrix products of a model on this device, by rank."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.cli.options import (
    add_command,
    add_device,
    add_engine,
    add_model,
    engine_request,
    model_request,
    positive,
    positive_list,
)


def add_parser(commands: Any) -> None:
    """Add `dse profile-device`."""
    parser = add_command(
        commands,
        "profile-device",
        run,
        summary="time the matrix products of a model on this device, dense and by rank",
        example="dse profile-device --model demo:smollm2-135m-instruct --ranks 64,128,256 --batch 1,8",
    )
    add_model(parser)
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--space", metavar="SPACE", help="search space whose ranks are timed")
    ranks.add_argument(
        "--profile",
        metavar="FILE",
        help="profile.json of `dse sensitivity`: time the products that `dse allocate` needs for latencies",
    )
    ranks.add_argument(
        "--ranks", type=positive_list, metavar="R,...", help="ranks, up to the break-even of each matrix"
    )
    parser.add_argument("--batch", type=positive_list, default=(1,), metavar="N,...", help="batch sizes (1)")
    parser.add_argument("--prompt", type=positive, default=128, metavar="N", help="prompt tokens of prefill (128)")
    parser.add_argument("--plot", type=_page, metavar="FILE.html", help="plot time relative to dense by rank")
    add_device(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> int:
    """Time the products and print their ratios."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.files import write_text
    from dse.standalone import RankTimingRequest, rank_timings_html, time_ranks

    request = RankTimingRequest(
        options.ranks or (), options.space, options.profile, options.batch, options.prompt, engine_request(options)
    )
    with TerminalListener() as listener:
        document = time_ranks(model_request(options), request, listener)
        if options.plot is not None:
            write_text(Path(options.plot), rank_timings_html(document))
            listener.on_message(f"plot written to {options.plot}")
    return print_result(options, document, _print_timings)


def _print_timings(document: Mapping[str, Any]) -> None:
    """Print one line per matrix, phase and batch size, with its ranks side by side."""
    from dse.cli.printing import plain_table, wide_console

    ratios = "time relative to dense, by rank"
    table = plain_table(["matrix", "shape", "phase", "batch", "dense", ratios], left=("matrix", "phase", ratios))
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in document["matrices"]:
        shape = f"{row['out_features']} x {row['in_features']}"
        lines.setdefault((row["role"], shape, row["phase"], row["batch_size"]), []).append(row)
    for (role, shape, phase, batch), rows in lines.items():
        ranks = "  ".join(f"{row['rank']}: {row['ratio']:.2f}" for row in sorted(rows, key=lambda row: row["rank"]))
        table.add_row(role, shape, phase, str(batch), f"{1e6 * rows[0]['dense_s']:.0f} us", ranks)
    out = wide_console()
    out.print(table)
    conditions = document["conditions"]
    out.print(
        f"{conditions['device']}, {conditions['dtype']}, {conditions['threads']} threads, {_runtime(document)}"
        f"; times are those of the matrix products only;"
        f" {document['timed_now']} products timed now, the others read from the cache",
        soft_wrap=True,
    )


def _runtime(document: Mapping[str, Any]) -> str:
    """`torch 2.13.0`, or the engine with its versions: `vllm: vllm 0.32.0, torch 2.13.0`."""
    version = str(document["conditions"]["torch_version"])
    return version if ":" in version else f"torch {version}"


def _page(text: str) -> str:
    if not text.endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"must be a file that ends in .html, but got '{text}'")
    return text
