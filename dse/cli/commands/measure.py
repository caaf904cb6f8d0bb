"""`dse measure`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, POINT_HELP, add_calibration, add_model, command, positive, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse measure`."""
    parser = command(
        commands,
        "measure",
        _measure,
        "latency, energy and memory of a model beside its dense self",
        "dse measure --model demo:smollm2-135m-instruct --point"
        """ '{"method": "svd", "rank": 64, "layers": [20, 21]}' --batch 1,8""",
    )
    add_model(parser)
    parser.add_argument("--point", default="dense", metavar="POINT", help=POINT_HELP)
    parser.add_argument("--batch", type=_sizes, default=(1,), metavar="N,...", help="batch sizes (1)")
    parser.add_argument("--prompt", type=_sizes, default=(128,), metavar="N,...", help="prompt lengths in tokens (128)")
    parser.add_argument("--new", type=_sizes, default=(16,), metavar="N,...", help="tokens to decode (16)")
    parser.add_argument(
        "--mode", default="eager", help="how a generation is run: eager, compile, cuda_graph or fast (eager)"
    )
    parser.add_argument(
        "--meter",
        default="auto",
        metavar="METER",
        help="auto, rapl, nvml, nvml:<index or UUID>,..., replay:<trace.csv>, or none (auto: the device's, if any)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>, or several: cuda:0,cuda:1")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--blocks", type=positive, default=4, metavar="N", help="least number of ABBA blocks (4)")
    parser.add_argument(
        "--precision", type=float, default=0.02, metavar="P", help="half the interval of a ratio to aim at (0.02)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, metavar="S", help="timed work after which a cell ends (60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompt (0)")
    add_calibration(parser)


def _measure(options: argparse.Namespace) -> int:
    from dse.cli.measure import measure_command
    from dse.cli.measure_report import print_measurement
    from dse.cli.progress import TerminalListener

    with TerminalListener() as listener:
        document = measure_command(options, listener)
    if options.json:
        print_json(document)
    else:
        print_measurement(document)
    return EXIT_OK


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(positive(part) for part in text.split(","))
    if len(set(sizes)) != len(sizes):
        raise argparse.ArgumentTypeError(f"a size may be listed once, but got '{text}'")
    return sizes
