"""What every command shares: its parser, common options, exit codes and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from dse.defaults import CALIBRATION_TOKENS

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_NOTHING_FITS",
    "EXIT_OK",
    "EXIT_USER_ERROR",
    "POINT_HELP",
    "add_calibration",
    "add_model",
    "command",
    "plain",
    "positive",
    "print_json",
]

EXIT_OK, EXIT_USER_ERROR, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 2, 3, 130

POINT_HELP = (
    'design point: JSON text, a JSON file, or "dense"; compact {"method": "tucker", "rank": 1, "layers": [2, 17],'
    ' "roles": "all"} or expanded {"tensors": {"layers.2.query": {"method": "svd", "rank": 64}}}'
)
_MODEL_HELP = "hub id, local folder, .gguf file, or demo:smollm2-135m-instruct"


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    """Add one command with its summary and an example, and the option `--json`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    parser.add_argument("--json", action="store_true", help="print one JSON document to stdout and nothing else there")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model."""
    parser.add_argument("--model", required=True, metavar="REF", help=_MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow Python code that comes with the model")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the text of calibrated methods."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default="general",
        help="for calibrated methods: general, grammar, facts, python_docs, or a text file (general)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=positive,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help=f"how many of that text ({CALIBRATION_TOKENS})",
    )


def positive(text: str) -> int:
    """An option that must be an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is needed, but got '{text}'") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is needed, but got {value}")
    return value


def plain(value: Any) -> Any:
    """A dataclass as JSON values; paths become text."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))


def print_json(document: Any) -> None:
    """The one JSON document of `--json`."""
    print(json.dumps(document, indent=2, allow_nan=False, default=str))
