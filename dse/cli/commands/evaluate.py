"""`dse evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, POINT_HELP, add_calibration, add_model, command, positive, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse evaluate`."""
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate a model, dense or at a point, with lm-eval",
        "dse evaluate --model demo:smollm2-135m-instruct --task dse_facts --limit 50",
    )
    add_model(parser)
    parser.add_argument("--point", default="dense", metavar="POINT", help=POINT_HELP)
    parser.add_argument(
        "--task", action="append", required=True, metavar="T", help="lm-eval task, dse_* task or task YAML; repeatable"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="documents per task, drawn by seed")
    parser.add_argument("--seed", type=int, default=0, help="of the documents (0)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    add_calibration(parser)
    parser.add_argument("--no-cache", action="store_true", help="evaluate anew, and keep nothing in the user's cache")


def _evaluate(options: argparse.Namespace) -> int:
    from dse.cli.evaluate import evaluate_command
    from dse.cli.progress import TerminalListener
    from dse.cli.report import print_evaluation

    with TerminalListener() as listener:
        document = evaluate_command(options, listener)
    if options.json:
        print_json(document)
    else:
        print_evaluation(document)
    return EXIT_OK
