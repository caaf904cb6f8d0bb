"""`dse export`: write the models of trials as folders for transformers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dse.cli.options import add_command

if TYPE_CHECKING:
    from dse.export import ExportResult


def add_parser(commands: Any) -> None:
    """Add `dse export`."""
    parser = add_command(
        commands,
        "export",
        run,
        summary="write the model of a trial as a folder for transformers",
        example="dse export runs/quickstart --trial 12 --out exports/smollm2-small",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument("--trial", type=int, action="append", required=True, metavar="N", help="trial; repeatable")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="new folder; with several trials, one subfolder per trial"
    )
    parser.add_argument(
        "--dense", action="store_true", help="write merged dense weights, which run in any engine but save nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Export the trials and print the results."""
    from dse.cli.printing import as_json, print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.export import export_trials

    with TerminalListener() as listener:
        results = export_trials(options.directory, options.trial, options.out, dense=options.dense, listener=listener)
    return print_result(options, results, _print_exports, as_json)


def _print_exports(results: Sequence[ExportResult]) -> None:
    from dse.report.units import percent

    for result in results:
        size_mb, dense_mb = result.weight_file_bytes / 1e6, result.dense_weight_bytes / 1e6
        print(f"{result.folder}: {size_mb:.1f} MB of weights (dense: {dense_mb:.1f} MB)")
        if result.is_dense:
            print("  merged dense weights: run in any engine, save nothing")
        else:
            print(f"  {percent(result.reduction)} of the parameters removed")
            print(f'  load: AutoModelForCausalLM.from_pretrained("{result.folder}", trust_remote_code=True)')
        if result.max_logit_difference is not None:
            largest, limit = result.max_logit_difference, result.tolerance
            print(f"  reloaded in a fresh process: largest logit difference {largest:.2g} (limit {limit:.2g})")
