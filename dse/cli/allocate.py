"""`dse allocate`: compute points under parameter or latency budgets, from a sensitivity profile."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from dse.cli.options import add_command, count, positive
from dse.cli.sensitivity import add_profile_options, sensitivity_request


def add_parser(commands: Any) -> None:
    """Add `dse allocate`."""
    parser = add_command(
        commands,
        "allocate",
        run,
        summary="compute the points with the least predicted divergence under budgets",
        example="dse allocate --model demo:smollm2-135m-instruct --reduction 0.09,0.2 --out points\n"
        "  dse evaluate --model demo:smollm2-135m-instruct --point points/reduction-0.09.json --task dse_facts",
    )
    add_profile_options(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--reduction", type=_shares, metavar="R,...", help="shares of the parameters to remove")
    budget.add_argument(
        "--latency-reduction",
        type=_shares,
        metavar="R,...",
        help="shares of the latency to remove; first time the products with `dse profile-device --profile`",
    )
    parser.add_argument(
        "--phase", choices=("decode", "prefill"), default="decode", help="phase of the latency (decode)"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="batch size of the latency (1)")
    parser.add_argument("--prompt", type=positive, default=128, metavar="N", help="prompt tokens of the latency (128)")
    parser.add_argument(
        "--dense-latency",
        type=_seconds,
        metavar="S",
        help="measured latency of the dense model in seconds (the sum of its timed products)",
    )
    parser.add_argument("--profile", metavar="FILE", help="use this profile.json instead of measuring")
    parser.add_argument("--untouched-layers", type=_counts, default=(), metavar="N,...", help="layers that stay dense")
    parser.add_argument("--dense-roles", type=_names, default=(), metavar="ROLE,...", help="roles that stay dense")
    parser.add_argument("--max-removed", type=count, metavar="N", help="largest number of removed blocks")
    parser.add_argument(
        "--refit", action="store_true", help="use the method that refits the profile's method (fisher_svd_refit)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for one reduction-<R>.json per point, for `--point`")


def run(options: argparse.Namespace) -> int:
    """Allocate and print one line per point."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.sensitivity import AllocationConstraints
    from dse.standalone import AllocationRequest, LatencyBudget, allocate_points

    latency = None
    if options.latency_reduction is not None:
        latency = LatencyBudget(options.phase, options.batch, options.prompt, options.dense_latency)
    request = AllocationRequest(
        sensitivity_request(options),
        options.reduction if latency is None else options.latency_reduction,
        latency=latency,
        profile=options.profile,
        constraints=AllocationConstraints(
            untouched_layers=frozenset(options.untouched_layers),
            dense_roles=frozenset(options.dense_roles),
            max_removed_blocks=options.max_removed,
        ),
        with_refit=options.refit,
        out=options.out,
    )
    with TerminalListener() as listener:
        documents = allocate_points(request, listener)
    return print_result(options, documents, _print_allocations)


def _print_allocations(documents: Sequence[Mapping[str, Any]]) -> None:
    latency = next((f"predicted {entry['phase']} latency  " for entry in documents if "phase" in entry), "")
    print(f"reduction  parameters  {latency}predicted KL (nats/token)  narrow MLPs  removed blocks  point")
    for entry in documents:
        seconds = ""
        if latency:
            text = f"{1e3 * entry['latency_s']:.4g} ms, -{100 * entry['latency_reduction']:.2f} %"
            seconds = f"{text:>{len(latency) - 2}}  "
        print(
            f"{100 * entry['reduction']:8.2f} %  {entry['parameters'] / 1e6:8.1f} M  {seconds}"
            f"{entry['predicted_divergence']:25.4f}  {entry['narrow_mlps']:11d}  {entry['removed_blocks']:14d}"
            f"  {entry.get('file', entry['point_id'])}"
        )
    if sources := {entry["latency_of"] for entry in documents if "latency_of" in entry}:
        print(f"latencies are predicted from {sources.pop()}")
    if not any("file" in entry for entry in documents):
        print("use `--out DIR` to write the points as files, or `--json` to print them")


def _shares(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.09,0.2, but got '{text}'") from None
    if not all(0 <= value < 1 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"`0 <= reduction < 1` must hold, each listed once, but got '{text}'")
    return values


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, but got '{text}'")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
