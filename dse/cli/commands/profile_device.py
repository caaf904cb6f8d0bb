"""`dse profile-device`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, add_model, command, positive, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse profile-device`."""
    parser = command(
        commands,
        "profile-device",
        _profile_device,
        "time a model's matrix products on this device, dense and at the ranks of a space",
        "dse profile-device --model demo:smollm2-135m-instruct --ranks 64,128,256 --batch 1,8",
    )
    add_model(parser)
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--space", metavar="SPACE.yaml", help="search-space file whose ranks are timed")
    ranks.add_argument(
        "--profile", metavar="FILE", help="a profile.json of `dse sensitivity`: what `dse allocate` needs for latencies"
    )
    ranks.add_argument("--ranks", type=_sizes, metavar="R,...", help="ranks, for every matrix up to its break-even")
    parser.add_argument("--batch", type=_sizes, default=(1,), metavar="N,...", help="batch sizes (1)")
    parser.add_argument("--prompt", type=positive, default=128, metavar="N", help="prompt tokens of prefill (128)")
    parser.add_argument(
        "--plot", type=_page, metavar="FILE.html", help="draw time relative to dense by rank, a plot for each matrix"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")


def _profile_device(options: argparse.Namespace) -> int:
    from dse.cli.profile_device import print_profile, profile_device, write_plot
    from dse.cli.progress import TerminalListener

    with TerminalListener() as listener:
        document = profile_device(options, listener)
        if options.plot is not None:
            write_plot(document, options.plot)
            listener.on_message(f"drawn in {options.plot}")
    if options.json:
        print_json(document)
    else:
        print_profile(document)
    return EXIT_OK


def _page(text: str) -> str:
    if not text.endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"a file that ends in .html is needed, but got '{text}'")
    return text


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))
