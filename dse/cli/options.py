"""Exit codes, common options and option types of the commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dse.defaults import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from dse.standalone import CalibrationText, EngineRequest, ModelRequest

EXIT_OK, EXIT_DIFFERS, EXIT_USER_ERROR, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

POINT_HELP = (
    'design point: JSON text, a JSON file, or "dense"; compact form {"method": "tucker", "rank": 1, "layers": [2, 17],'
    ' "roles": "all"} or expanded form {"tensors": {"layers.2.query": {"method": "svd", "rank": 64}}}'
)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, example: str, details: str = ""
) -> argparse.ArgumentParser:
    """Add a command with the option `--json`.

    Args:
        commands: The result of `add_subparsers`.
        name: Name of the command.
        run: Called with the parsed options; returns the exit code.
        summary: One line, shown by `dse --help` and `dse NAME --help`.
        example: One or more example commands, shown by `dse NAME --help`.
        details: Text below the example.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}" + (f"\n\n{details}" if details else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document to stdout and nothing else")
    return parser


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that select a model."""
    references = "hub id, local folder, .gguf file, or demo:smollm2-135m-instruct"
    parser.add_argument("--model", required=required, metavar="REF", help=references)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def add_device(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the device and the dtype of the model."""
    devices = "auto, cpu, cuda or cuda:<index>" + (", or several GPUs: cuda:0,cuda:1" if several else "")
    parser.add_argument("--device", default="auto", help=f"{devices} (auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, float16 or bfloat16; auto is the checkpoint's on a GPU and float32 elsewhere (auto)",
    )


def add_model_at_point(
    parser: argparse.ArgumentParser, *, several_devices: bool = False, required: bool = True
) -> None:
    """Add the options that select a model, its device, a design point and the calibration text of its methods."""
    add_model(parser, required=required)
    parser.add_argument("--point", default="dense", metavar="POINT", help=POINT_HELP)
    add_device(parser, several=several_devices)
    add_calibration(parser)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the calibration text."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default="general",
        help="text for calibrated methods: general, grammar, facts, python_docs, or a text file (general)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=positive,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help=f"calibration tokens ({CALIBRATION_TOKENS})",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a serving engine."""
    engine = parser.add_argument_group("serving engine")
    engine.add_argument(
        "--engine", metavar="NAME", help="vllm, onnxruntime, openvino, or transformers in a process of its own"
    )
    engine.add_argument("--python", metavar="PATH", help="the engine's Python interpreter (DSE_<ENGINE>_PYTHON)")
    engine.add_argument(
        "--engine-option",
        type=engine_option,
        action="append",
        metavar="KEY=VALUE",
        help="option of the engine, such as max_model_len=512; may be repeated",
    )
    engine.add_argument("--requests", type=positive, metavar="N", help="requests of one turn (the batch size)")
    engine.add_argument(
        "--engine-time-limit",
        type=float,
        default=600.0,
        metavar="S",
        help="an engine that takes longer to start or to answer is killed (600)",
    )


def engine_request(options: argparse.Namespace) -> EngineRequest | None:
    """The options of `add_engine` as a value; None without an engine."""
    from dse.standalone import EngineRequest

    if options.engine is None:
        return None
    chosen = dict(options.engine_option or [])
    return EngineRequest(options.engine, options.python, chosen, options.requests, options.engine_time_limit)


def model_request(options: argparse.Namespace) -> ModelRequest:
    """The options of `add_model` and `add_device` as a request."""
    from dse.standalone import ModelRequest

    return ModelRequest(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        dtype=getattr(options, "dtype", "auto"),
        device=getattr(options, "device", "auto"),
    )


def calibration_text(options: argparse.Namespace) -> CalibrationText:
    """The options of `add_calibration` as a value."""
    from dse.standalone import CalibrationText

    return CalibrationText(options.calibration, options.calibration_tokens)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, but got '{text}'") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, but got {value}")
    return value


def positive_real(text: str) -> float:
    """Parse a number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, but got '{text}'") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, but got {value}")
    return value


def positive_list(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of different integers of at least 1."""
    values = tuple(positive(part) for part in text.split(","))
    if len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"must list each number once, but got '{text}'")
    return values


def count(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, but got '{text}'")
    return int(text)


def engine_option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; a value that reads as a YAML number or truth value becomes one."""
    import yaml

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but got '{text}'")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value
