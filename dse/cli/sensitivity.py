"""`dse sensitivity`: measure how much each tensor and block of a model matters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dse.cli.options import (
    add_calibration,
    add_command,
    add_device,
    add_model,
    calibration_text,
    model_request,
    positive,
)

if TYPE_CHECKING:
    from dse.sensitivity import SensitivityProfile
    from dse.standalone import SensitivityRequest


def add_parser(commands: Any) -> None:
    """Add `dse sensitivity`."""
    parser = add_command(
        commands,
        "sensitivity",
        run,
        summary="measure the divergence caused by decomposing each tensor or removing each block",
        example="dse sensitivity --model demo:smollm2-135m-instruct --out sensitivity\n"
        "  dse sensitivity --model Qwen/Qwen3-0.6B --space layer_role_rank --tokens 2048",
    )
    add_profile_options(parser)
    parser.add_argument(
        "--out",
        default="sensitivity",
        metavar="DIR",
        help="folder for profile.json, sensitivity.png and sensitivity.html (sensitivity)",
    )


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a sensitivity profile."""
    add_model(parser)
    parser.add_argument(
        "--space", metavar="SPACE", help="search space whose layers, roles, methods and rank multiple are used"
    )
    parser.add_argument("--method", action="append", metavar="M", help="decomposition method; repeatable")
    parser.add_argument(
        "--stacks", action="store_true", help="also measure query, key, value and gate, up as stacked matrices"
    )
    parser.add_argument("--widths", action="store_true", help="also measure MLPs with fewer intermediate channels")
    parser.add_argument("--pivoted", action="store_true", help="list pivoted factors too; costs no measurement")
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens on which divergence is measured (512)")
    parser.add_argument(
        "--text",
        metavar="TEXT",
        help="text on which divergence is measured: a builtin text or a file (held-out part of the calibration text)",
    )
    add_calibration(parser)
    add_device(parser)


def sensitivity_request(options: argparse.Namespace) -> SensitivityRequest:
    """The options of `add_profile_options` as a request."""
    from dse.standalone import SensitivityRequest

    return SensitivityRequest(
        model_request(options),
        space=options.space,
        methods=None if options.method is None else tuple(options.method),
        with_stacks=options.stacks,
        with_widths=options.widths,
        with_pivoted=options.pivoted,
        tokens=options.tokens,
        text=options.text,
        calibration=calibration_text(options),
    )


def run(options: argparse.Namespace) -> int:
    """Measure the profile, write its files and print it."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.standalone import run_sensitivity, write_profile

    with TerminalListener() as listener:
        profile = run_sensitivity(sensitivity_request(options), listener)
    written = write_profile(profile, options.out)
    return print_result(options, profile, partial(_print_profile, written), lambda profile: profile.to_json())


def _print_profile(written: Sequence[Path], profile: SensitivityProfile) -> None:
    from dse.report.sensitivity_heat_map import heat_map_of

    heat_map = heat_map_of(profile)
    print(heat_map.title)
    width = max(9, *(len(column) for column in heat_map.columns)) + 2
    print("layer" + "".join(column.rjust(width) for column in heat_map.columns))
    for row, values in zip(heat_map.rows, heat_map.values, strict=True):
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        print(row.rjust(5) + "".join(cell.rjust(width) for cell in cells))
    print(heat_map.note)
    print("files: " + ", ".join(str(path) for path in written))
