"""`dse sensitivity` and `dse allocate`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, add_calibration, add_model, command, positive, print_json

__all__ = ["add", "add_allocate"]


def add(commands: Any) -> None:
    """Add `dse sensitivity`."""
    parser = command(
        commands,
        "sensitivity",
        _sensitivity,
        "measure how much each tensor and block of a model costs when it is decomposed",
        "dse sensitivity --model demo:smollm2-135m-instruct --out sensitivity\n"
        "  dse sensitivity --model Qwen/Qwen3-0.6B --space search_spaces/layer_role_rank.yaml --tokens 2048",
    )
    _add_profile_options(parser)
    parser.add_argument(
        "--out",
        default="sensitivity",
        metavar="DIR",
        help="folder for profile.json and the heat map, sensitivity.png and .html (sensitivity)",
    )


def add_allocate(commands: Any) -> None:
    """Add `dse allocate`."""
    parser = command(
        commands,
        "allocate",
        _allocate,
        "the points of least predicted divergence under budgets, from the sensitivity profile",
        "dse allocate --model demo:smollm2-135m-instruct --reduction 0.09,0.2 --out points\n"
        "  dse evaluate --model demo:smollm2-135m-instruct --point points/reduction-0.09.json --task dse_facts",
    )
    _add_profile_options(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--reduction", type=_reductions, metavar="R,...", help="share of the parameters to remove")
    budget.add_argument(
        "--latency-reduction",
        type=_reductions,
        metavar="R,...",
        help="share of the latency to remove, as `dse profile-device --profile` lets predict it",
    )
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode", help="whose latency (decode)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="of that latency: batch size (1)")
    parser.add_argument("--prompt", type=positive, default=128, metavar="N", help="its prompt tokens (128)")
    parser.add_argument(
        "--dense-latency",
        type=_seconds,
        metavar="S",
        help="measured latency of the dense model in seconds; without it its products stand for the whole",
    )
    parser.add_argument("--profile", metavar="FILE", help="a profile.json of `dse sensitivity`, instead of measuring")
    parser.add_argument(
        "--untouched-layers", type=_layers, default=(), metavar="N,...", help="layers of which nothing is decomposed"
    )
    parser.add_argument(
        "--dense-roles", type=_words, default=(), metavar="ROLE,...", help="roles that stay dense in every layer"
    )
    parser.add_argument("--max-removed", type=_count, metavar="N", help="most blocks that may be removed")
    parser.add_argument(
        "--refit", action="store_true", help="points name the method that refits the profile's (fisher_svd_refit)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for one reduction-<R>.json a point, for `--point`")


def _add_profile_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--space", metavar="SPACE.yaml", help="its layers, roles, methods and rank multiple alone")
    parser.add_argument("--method", action="append", metavar="M", help="decomposition method; repeatable")
    parser.add_argument(
        "--stacks", action="store_true", help="measure query, key, value and gate, up stacked as one matrix too"
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="of text to measure divergence on (512)")
    parser.add_argument(
        "--text", metavar="TEXT", help="that text: a file or a builtin text (what calibration leaves of its own)"
    )
    add_calibration(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")


def _sensitivity(options: argparse.Namespace) -> int:
    from dse.cli.progress import TerminalListener
    from dse.cli.sensitivity import print_profile, profile_command, write_profile

    with TerminalListener() as listener:
        profile = profile_command(options, listener)
    written = write_profile(profile, options.out)
    if options.json:
        print_json(profile.to_json())
    else:
        print_profile(profile, written)
    return EXIT_OK


def _allocate(options: argparse.Namespace) -> int:
    from dse.cli.progress import TerminalListener
    from dse.cli.sensitivity import allocate_command, print_allocations

    with TerminalListener() as listener:
        documents = allocate_command(options, listener)
    if options.json:
        print_json(documents)
    else:
        print_allocations(documents)
    return EXIT_OK


def _reductions(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers such as 0.09,0.2 are needed, but got '{text}'") from None
    if not all(0 <= value < 1 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"`0 <= reduction < 1` must hold, each listed once, but got '{text}'")
    return values


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"seconds above 0 are needed, but got '{text}'")
    return value


def _layers(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"an integer of at least 0 is needed, but got '{text}'")
    return int(text)
