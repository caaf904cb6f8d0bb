"""`dse plan`: what a study needs, before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dse.cli.options import EXIT_DIFFERS, EXIT_OK, add_command
from dse.shipped_files import shipped_names


def add_parser(commands: Any) -> None:
    """Add `dse plan`."""
    parser = add_command(
        commands,
        "plan",
        run,
        summary="forecast the memory, disk and time of a study, and what to change where it does not fit",
        example="dse plan quickstart\n  dse plan study.yaml --trials 60 --json",
        details=(
            "Rehearses each phase on one layer with random weights; no weight of the model is needed. Exits with 1 if"
            f" the study does not fit.\nshipped studies: {', '.join(shipped_names('studies'))}"
        ),
    )
    parser.add_argument("study", metavar="STUDY", help="study file, or the name of a shipped one")
    parser.add_argument(
        "--trials", type=_positive, metavar="N", help="number of evaluated points, instead of the file's"
    )
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=0.02,
        metavar="DROP",
        help="drop in accuracy that the study should tell apart from none (0.02)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the forecast; 1 if the study does not fit."""
    from pathlib import Path

    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.config import load_study
    from dse.shipped_files import find_yaml
    from dse.standalone.study_plan import plan_study

    config = load_study(find_yaml(Path(options.study), "studies"))
    if options.trials is not None:
        config = config.model_copy(update={"budget": config.budget.model_copy(update={"trials": options.trials})})
    with TerminalListener() as listener:
        plan = plan_study(config, tolerance=options.tolerance, listener=listener)
    print_result(options, plan, _print_plan)
    return EXIT_OK if plan["fits"] else EXIT_DIFFERS


def _positive(text: str) -> int:
    from dse.cli.options import positive

    return positive(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, such as 0.02 for two points, but got {text!r}")
    return value


def _print_plan(plan: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dse.cli.printing import console

    title = (
        f"{escape(plan['study'])}: {escape(plan['model'])}, {plan['layers']} layers, {plan['dtype']} on"
        f" {plan['device']}, {plan['trials']} trials"
    )
    has_gpu = any(phase["gpu_bytes"] for phase in plan["phases"])
    table = Table(title=title)
    for column in ("phase", "times", "seconds each", "CPU memory", *(["GPU memory"] if has_gpu else []), "disk"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in plan["phases"]:
        sizes = [phase["host_bytes"], *([phase["gpu_bytes"]] if has_gpu else []), phase["disk_bytes"]]
        seconds = "unknown" if phase["reason"] else f"{phase['seconds']:.1f}"
        table.add_row(phase["phase"], str(phase["repeats"]), seconds, *(_bytes(size) for size in sizes))
    out = console()
    out.print(table)
    for phase in plan["phases"]:
        if phase["reason"]:
            out.print(f"{phase['phase']}: {escape(phase['reason'])}")
    out.print(f"time in all: {_duration(plan['total_s'])}")
    for place in plan["resources"]:
        there = "unknown" if place["available"] is None else _bytes(place["available"])
        fits = place["available"] is None or place["needed"] <= place["available"]
        out.print(
            f"{place['name']}: needs {_bytes(place['needed'])} ({place['phase']}), {there} available:"
            f" {'fits' if fits else 'does not fit'}"
        )
    _print_documents(plan["documents"])
    for advice in plan["advice"]:
        out.print(f"change: {escape(advice)}", soft_wrap=True)


def _print_documents(documents: Mapping[str, Any]) -> None:
    from dse.cli.printing import console

    out = console()
    assumed = f"if a point and the dense model disagree on {documents['assumed_disagreement']:.0%} of the documents"
    if documents["total"] is not None and documents["smallest_detectable_drop"] is not None:
        found = 100 * documents["smallest_detectable_drop"]
        out.print(f"documents: {documents['total']} tell a drop of {found:.1f} points apart from none, {assumed}")
    out.print(f"a drop of {100 * documents['tolerance']:g} points needs {documents['needed']} documents, {assumed}")


def _bytes(size: int) -> str:
    if not size:
        return ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
