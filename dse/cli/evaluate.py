"""`dse evaluate`: evaluate a model, dense or at a point."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dse.cli.options import add_command, add_model_at_point, calibration_text, count, model_request, positive


def add_parser(commands: Any) -> None:
    """Add `dse evaluate`."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        summary="evaluate a model, dense or at a point, with lm-eval",
        example="dse evaluate --model demo:smollm2-135m-instruct --task dse_facts --limit 50",
    )
    add_model_at_point(parser)
    parser.add_argument(
        "--task", action="append", required=True, metavar="T", help="lm-eval task, dse_* task or task YAML; repeatable"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="documents per task, drawn by seed (all)")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the documents (0)")
    parser.add_argument(
        "--batch-size",
        type=lambda text: "auto" if text == "auto" else positive(text),
        default="auto",
        metavar="N",
        help="a batch has at most N times 128 tokens (auto: 64 on a GPU, 16 elsewhere); halved when memory runs out",
    )
    parser.add_argument("--no-cache", action="store_true", help="do not read or write evaluations in the user's cache")


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the results."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.config import EvaluationConfig
    from dse.standalone import evaluate_model

    with TerminalListener() as listener:
        document = evaluate_model(
            model_request(options),
            options.task,
            EvaluationConfig(limit=options.limit, seed=options.seed, batch_size=options.batch_size),
            point=options.point,
            calibration=calibration_text(options),
            use_cache=not options.no_cache,
            listener=listener,
        )
    return print_result(options, document, _print_results)


def _print_results(document: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dse.cli.printing import console
    from dse.report.units import percent

    is_dense = not document["point"]["tensors"]
    point = "dense" if is_dense else f"point {document['point_id']} (-{percent(document['reduction'])} parameters)"
    table = Table(title=f"{escape(document['model'])}, {point}")
    for column in ("task", "metric", "value", "standard error", "documents"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task in document["tasks"]:
        for metric, numbers in task["all_metrics"].items():
            value, error = ("" if number is None else f"{number:.4f}" for number in numbers)
            table.add_row(escape(task["task"]), metric, value, error, str(task["documents"]))
    out = console()
    out.print(table)
    if document["accuracy_drop"] is not None:
        out.print(_drop_text(document["accuracy_drop"]))


def _drop_text(drop: Mapping[str, Any]) -> str:
    from dse.report.units import points

    text = f"accuracy drop against dense: {points(drop['estimate'])}"
    if drop["low"] is not None:
        text += f" (95 % interval {points(drop['low'])} to {points(drop['high'])})"
    text += f", paired over {drop['documents']} documents"
    if drop["p_value"] is None:
        return text
    smallest = drop["smallest_detectable"]
    detectable = "none" if smallest is None else points(smallest).lstrip("+")
    return f"{text} ({drop['test']}, p = {drop['p_value']:.3g}; smallest detectable drop: {detectable})"
