"""`dse verify`: run an export in an engine and compare it with the model it was written from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dse.cli.options import EXIT_DIFFERS, EXIT_OK, add_command, engine_option

if TYPE_CHECKING:
    from dse.export import EngineReport


def add_parser(commands: Any) -> None:
    """Add `dse verify`."""
    parser = add_command(
        commands,
        "verify",
        run,
        summary="run an export in an engine and compare it with the model of its trial",
        example="dse verify exports/smollm2-small --trust-remote-code --engine vllm --python ~/venvs/vllm/bin/python",
        details=(
            "A success is added to the model card, with the commands that serve the folder in that engine.\n"
            "Engines run the Python files of a folder with factors; --trust-remote-code allows it.\n"
            "exit codes: 0 same outputs, 1 other outputs, 2 the folder or the engine cannot be used"
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder that `dse export` wrote")
    parser.add_argument(
        "--engine", help="transformers, vllm, onnxruntime or openvino (the engine of the folder's format)"
    )
    parser.add_argument(
        "--python", metavar="PATH", help="Python interpreter of the engine (DSE_<ENGINE>_PYTHON, or this one)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the folder")
    parser.add_argument(
        "--option",
        type=engine_option,
        action="append",
        default=None,
        metavar="NAME=VALUE",
        help="option of the engine, such as max_model_len=512; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """Verify the folder and print the comparison."""
    from dse.cli.printing import print_result
    from dse.export import verify_export

    report = verify_export(
        options.folder,
        options.engine,
        python=options.python,
        options=dict(options.option or ()),
        trust_remote_code=options.trust_remote_code,
    )
    print_result(options, report, print_report, lambda found: found.to_json())
    return EXIT_OK if report.is_valid else EXIT_DIFFERS


def print_report(report: EngineReport, indent: str = "") -> None:
    """Print what was compared, in one line, and what differs."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    equal = report.prompts - report.differing_prompts
    print(
        f"{indent}{'verified' if report.is_valid else 'NOT verified'} in {report.engine} ({versions}): greedy tokens of"
        f" {equal} of {report.prompts} prompts equal, largest difference of a log-probability"
        f" {report.max_difference:.2g} (limit {report.tolerance:.2g}), {report.weight_bytes / 1e6:.1f} MB of weights"
    )
    if report.problem:
        print(f"{indent}  {report.problem}")
