"""`dse export`: write the models of trials as folders for transformers and for inference engines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dse.cli.options import add_command

if TYPE_CHECKING:
    from dse.export import ExportResult

FORMATS = {
    "transformers": "factors, for transformers and vLLM",
    "dense": "factors multiplied out: runs anywhere, saves nothing",
    "onnx": "a graph for ONNX Runtime",
    "openvino": "a graph for OpenVINO",
    "decilm": "removed blocks and widths of a Llama-like model as DeciLM, which vLLM runs natively",
}
"""As in `dse.export.formats`, which takes a second to import."""


def add_parser(commands: Any) -> None:
    """Add `dse export`."""
    parser = add_command(
        commands,
        "export",
        run,
        summary="write the model of a trial as a folder for an engine",
        example="dse export runs/quickstart --trial 12 --out exports/smollm2-small",
        details="\n".join(f"- {name}: {summary}" for name, summary in FORMATS.items()),
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument("--trial", type=int, action="append", required=True, metavar="N", help="trial; repeatable")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="new folder; with several trials, one subfolder per trial"
    )
    parser.add_argument(
        "--format", default="transformers", metavar="FORMAT", help=f"{', '.join(FORMATS)} (transformers)"
    )
    parser.add_argument("--healed", action="store_true", help="trained weights, of trials that `dse heal` has healed")
    parser.add_argument("--dense", action="store_true", help="same as `--format dense`")
    parser.add_argument(
        "--verify-in",
        action="append",
        default=None,
        metavar="ENGINE",
        help="further engine that must reproduce the model, such as vllm; repeatable",
    )
    parser.add_argument("--python", metavar="PATH", help="Python interpreter of the engine that verifies the export")


def run(options: argparse.Namespace) -> int:
    """Export the trials and print the results."""
    from dse.cli.printing import as_json, print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.standalone import export_trials

    with TerminalListener() as listener:
        results = export_trials(
            options.directory,
            options.trial,
            options.out,
            format=options.format,
            dense=options.dense,
            healed=options.healed,
            verify_in=options.verify_in or (),
            python=options.python,
            listener=listener,
        )
    return print_result(options, results, _print_exports, as_json)


def _print_exports(results: Sequence[ExportResult]) -> None:
    from dse.cli.verify import print_report
    from dse.report.units import percent

    for result in results:
        size_mb, dense_mb = result.weight_file_bytes / 1e6, result.dense_weight_bytes / 1e6
        print(f"{result.folder}: {size_mb:.1f} MB of weights (dense: {dense_mb:.1f} MB)")
        if result.is_dense:
            print("  dense weights: run in any engine, save nothing")
        else:
            print(f"  {percent(result.reduction)} of the parameters removed")
        if not result.is_dense and result.max_logit_difference is not None:
            print(f'  load: AutoModelForCausalLM.from_pretrained("{result.folder}", trust_remote_code=True)')
        if result.max_logit_difference is not None:
            largest, limit = result.max_logit_difference, result.tolerance
            print(f"  reloaded in a fresh process: largest logit difference {largest:.2g} (limit {limit:.2g})")
        for report in result.engine_reports:
            print_report(report, indent="  ")
