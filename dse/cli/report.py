"""What commands print for people, and the JSON document of a study."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dse.cost import Cost
from dse.design_point import DesignPoint
from dse.export import ExportResult
from dse.measurement import Check
from dse.pareto import Recommendation
from dse.report.front_table import format_front, format_tied, front_text, tied_text, to_records
from dse.report.units import percent, points
from dse.search.origins import share_words
from dse.study import DEFAULT_MAX_ACCURACY_DROP, Study
from dse.topology import Topology

__all__ = [
    "print_checks",
    "print_cost",
    "print_evaluation",
    "print_export",
    "print_front",
    "print_recommendation",
    "print_space",
    "print_study",
    "study_json",
]

_SHOWN_RANKS = 12
_KEPT = ("keep_layers", "keep_roles")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def print_front(study: Study) -> None:
    """The front as a table, and how far the study is."""
    front = study.front()
    if sys.stdout.isatty():
        console = Console()
        console.print(format_front(front, study.objectives, width=console.width))
        if (tied := format_tied(study.trials(), study.objectives)) is not None:
            console.print(tied)
    else:
        print(front_text(front, study.objectives))
        if tied_lines := tied_text(study.trials(), study.objectives):
            print(tied_lines)
    if (least := _smallest_drops(front)) is not None:
        print(least)
    hypervolume = study.hypervolume
    volume = "" if hypervolume is None else f"; hypervolume {hypervolume:.4f} of 1"
    print(
        f"{study.evaluated_trials} of {study.config.budget.trials} trials evaluated,"
        f" {study.front_size} on the front{volume}"
    )
    if shares := study.origin_shares:
        print("origins: " + "; ".join(share_words(share) for share in shares))


def _smallest_drops(front: pd.DataFrame) -> str | None:
    """What the documents of this study could have shown at all."""
    if "accuracy_drop_detectable" not in front.columns:
        return None
    sizes, documents = front["accuracy_drop_detectable"].dropna(), front["accuracy_drop_documents"].dropna()
    if sizes.empty:
        return None
    low, high = (points(float(size)).removesuffix(" pts").lstrip("+") for size in (sizes.min(), sizes.max()))
    size = low if low == high else f"{low} to {high}"
    return f"{int(documents.max())} documents could have shown accuracy drops of {size} pts and above."


def print_study(study: Study) -> None:
    """What `dse run` ends with: the front, the files, a recommendation, and what to type next."""
    print_front(study)
    folder = study.folder
    print(f"\nfiles in {folder.path}/:")
    for path, what in (
        (folder.front_html, "the front, to look at in a browser"),
        (folder.front_png, "the same as a picture"),
        (folder.front_csv, "the front as a table"),
        (folder.trials_csv, "every trial, every figure (pandas)"),
        (folder.study_yaml, "the study as it ran"),
        (folder.log, "the log"),
    ):
        print(f"  {path.name:<12} {what}")
    if study.has_accuracy:
        print(f"\nwithin {percent(DEFAULT_MAX_ACCURACY_DROP, 0)} of accuracy:")
        print_recommendation(study, study.recommend())
    print("\nnext:")
    for command in study.next_commands():
        print(f"  {command}")


def print_recommendation(study: Study, advice: Recommendation) -> None:
    """The recommended point with its reason, or the nearest miss; and the knee."""
    console = _console()
    if advice.trial is not None:
        certified = "" if advice.meets_bound else ", by point estimate; not certified"
        console.print(f"recommended: [bold]trial {advice.trial}[/bold] (point {advice.point_id}){certified}")
        console.print(f"  {escape(advice.reason)}")
        drop = f"accuracy drop: {points(advice.accuracy_drop or 0.0)} by point estimate"
        if advice.accuracy_drop_high is not None:
            drop += f", at most {points(advice.accuracy_drop_high)} with 95 % confidence"
        console.print(f"  {drop}")
    else:
        console.print(escape(advice.reason))
    if advice.knee_trial is not None and advice.knee_trial != advice.trial:
        console.print(f"  knee of the front: {escape(_knee_words(study, advice.knee_trial))}")


def _knee_words(study: Study, trial: int) -> str:
    """The knee with its figures: what to take where no tolerance decides."""
    record = study.record(trial)
    words = f"trial {trial}, {percent(record.cost['reduction'])} of the parameters removed"
    if record.accuracy_drop is not None and record.accuracy_drop.value is not None:
        words += f", accuracy {points(-record.accuracy_drop.value)}"
    return words + "; the best exchange of one objective for the others, whatever the tolerance"


def study_json(study: Study) -> dict[str, Any]:
    """The front, the files and the recommendation as one JSON document."""
    folder = study.folder
    advice = study.recommend() if study.has_accuracy else None
    return {
        "study": study.config.name,
        "directory": str(folder.path),
        "trials_evaluated": study.evaluated_trials,
        "trials_budget": study.config.budget.trials,
        "is_complete": study.evaluated_trials >= study.config.budget.trials or study.is_exhausted,
        "objectives": [
            {"name": entry.name, "unit": entry.unit, "direction": entry.direction} for entry in study.objectives
        ],
        "hypervolume": study.hypervolume,
        "reference": study.attributes.get("reference"),
        "origins": [dataclasses.asdict(share) for share in study.origin_shares],
        "front": to_records(study.front()),
        "tied": to_records(study.tied()),
        "recommendation": None if advice is None else {
            key: getattr(advice, key)
            for key in (
                "trial", "point_id", "reason", "accuracy_drop", "accuracy_drop_high", "meets_bound", "estimate_trial",
                "more_documents", "knee_trial",
            )
        },
        "files": {
            "study": str(folder.study_yaml),
            "trials": str(folder.trials_csv),
            "front": str(folder.front_csv),
            "page": str(folder.front_html),
            "picture": str(folder.front_png),
            "log": str(folder.log),
        },
    }  # fmt: skip


def print_cost(model: str, topology: Topology, point: DesignPoint, result: Cost) -> None:
    """A point's cost beside the dense model's."""
    table = Table(title=f"{escape(model)} ({topology.architecture}), point {point.id}: {_changes(topology, point)}")
    table.add_column("")
    table.add_column("value", justify="right")
    rows = (
        ("parameters, dense", f"{result.parameters_dense:,}"),
        ("parameters", f"{result.parameters:,}"),
        ("reduction", percent(result.reduction, 2)),
        ("weight bytes", f"{result.weight_bytes:,} ({result.weight_bytes / 1e9:.2f} GB)"),
        (f"FLOPs per token, prefill of {result.prompt_tokens}", f"{result.flops_prefill_per_token:,}"),
        (f"FLOPs per token, decode behind {result.prompt_tokens}", _count(result.flops_decode_per_token)),
        ("KV-cache bytes per token", _count(result.kv_cache_bytes_per_token)),
    )
    for name, value in rows:
        table.add_row(name, value)
    _console().print(table)


def _changes(topology: Topology, point: DesignPoint) -> str:
    """How many tensors are decomposed and blocks removed."""
    removed = point.removed
    decomposed = sum(len(topology.tensors_of(name)) for name, choice in point if not choice.is_removal)
    tensors = f"{decomposed} of {len(topology.tensors) + len(topology.experts)} tensors"
    return f"{tensors}, {len(removed)} of {len(topology.blocks)} blocks removed" if removed else tensors


def print_space(description: Mapping[str, Any]) -> None:
    """What a space contains."""
    table = Table(
        title=f"search space {escape(description['name'])} on {description['architecture']}", show_header=False
    )
    table.add_column("", no_wrap=True)
    table.add_column("")
    limits = description["limits"]
    layers = description["layers"]
    rows = [
        ("methods", ", ".join(description["methods"])),
        ("layers", f"{len(layers)}: {_ranges(layers)}"),
        ("roles", ", ".join(description["roles"])),
        ("tensors", str(description["tensors"])),
        ("removable blocks of the model", str(description["removable_blocks"])),
        ("dimensions", f"{description['dimensions']} ({description['kind']})"),
    ]
    for role, ranks in description["ranks"].items():
        shown = ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")
        rows.append((f"ranks of {role}", shown))
    rows += [
        ("points", f"{description['number_of_points']:,} = 2^{description['number_of_points_log2']:.2f}"),
        (
            "configurations",
            f"{description['number_of_configurations']:,} = 2^{description['number_of_configurations_log2']:.2f}",
        ),
        ("smallest reduction", percent(description["smallest_reduction"], 3)),
        ("largest reduction", percent(description["largest_reduction"], 2)),
        *(
            (f"limits on {name}", f"{_limit(name, ends['min'])} to {_limit(name, ends['max'])}")
            for name, ends in limits.items()
        ),
        *((name.replace("_", " "), ", ".join(map(str, description[name]))) for name in _KEPT if description[name]),
    ]
    for name, value in rows:
        table.add_row(name, escape(value))
    _console().print(table)


def print_evaluation(document: Mapping[str, Any]) -> None:
    """Metrics of every task, and the drop against dense where a point was given."""
    is_dense = not document["point"]["tensors"]
    point = "as it is" if is_dense else f"point {document['point_id']} (-{percent(document['reduction'])} parameters)"
    table = Table(title=f"{escape(document['model'])}, {point}")
    for column in ("task", "metric", "value", "standard error", "documents"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task in document["tasks"]:
        for metric, (value, stderr) in task["all_metrics"].items():
            shown = "" if value is None else f"{value:.4f}"
            table.add_row(
                escape(task["task"]), metric, shown, "" if stderr is None else f"{stderr:.4f}", str(task["documents"])
            )
    console = _console()
    console.print(table)
    drop = document.get("accuracy_drop")
    if drop is not None:
        interval = (
            f" (95 % interval {points(drop['low'])} to {points(drop['high'])})" if drop["low"] is not None else ""
        )
        console.print(
            f"accuracy drop against dense: {points(drop['estimate'])}{interval},"
            f" paired over {drop['documents']} documents{_shown(drop)}"
        )


def _shown(drop: Mapping[str, Any]) -> str:
    """The test's result, and what so many documents could have shown."""
    if drop["p_value"] is None:
        return ""
    detectable = drop["smallest_detectable"]
    least = "none" if detectable is None else points(detectable).lstrip("+")
    return f" ({drop['test']}, p = {drop['p_value']:.3g}; smallest drop that they could have shown: {least})"


def print_export(results: Sequence[ExportResult]) -> None:
    """Where exports lie and how large they are."""
    for result in results:
        print(
            f"{result.folder}: {result.weight_file_bytes / 1e6:.1f} MB of weights"
            f" ({result.dense_weight_bytes / 1e6:.1f} MB dense)"
        )
        if result.is_dense:
            print("  merged dense weights: runs everywhere, saves nothing")
        else:
            print(f"  {percent(result.reduction)} of the parameters removed")
            print(f'  load: AutoModelForCausalLM.from_pretrained("{result.folder}", trust_remote_code=True)')
        if result.max_logit_difference is not None:
            print(
                f"  reloaded in a fresh process: logits agree within {result.max_logit_difference:.2g}"
                f" (limit {result.tolerance:.2g})"
            )


def print_checks(checks: Sequence[Check]) -> None:
    """What `dse doctor` found."""
    marks = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "note": "[yellow]note[/yellow]"}
    console = _console()
    for check in checks:
        console.print(f"{marks[check.status]:<22} {escape(check.name)}: {escape(check.detail)}")
        if check.remedy:
            console.print(f"        remedy: {escape(check.remedy)}")


def _limit(name: str, end: float | None) -> str:
    if end is None:
        return "no limit"
    return percent(end) if name == "reduction" else f"{end:,g} {name.rpartition('_')[2]}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0 1 2 3 7."""
    parts: list[str] = []
    start = previous = None
    for number in [*numbers, None]:
        if previous is not None and number == previous + 1:
            previous = number
            continue
        if start is not None:
            parts.append(f"{start}" if start == previous else f"{start}-{previous}")
        start = previous = number
    return ", ".join(parts)
