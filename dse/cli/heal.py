"""`dse heal`: train the factors of trials for minutes, and evaluate them again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dse.cli.options import add_command, positive, positive_real


def add_parser(commands: Any) -> None:
    """Add `dse heal`."""
    parser = add_command(
        commands,
        "heal",
        run,
        summary="train the factors of trials for minutes, and evaluate them again",
        example="dse heal runs/quickstart --trial 12 --minutes 10\n"
        "  dse export runs/quickstart --trial 12 --healed --out exports/smollm2-healed",
        details="Trains factors and norms to reproduce the dense model's probabilities, until text of another source"
        "\nstops gaining. The trial keeps its values; those after healing are named healed.accuracy and so on.",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--trial", type=int, action="append", default=None, metavar="N", help="trial; repeatable (the front)"
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens to train on (the study's, or 65536)")
    parser.add_argument("--minutes", type=positive_real, metavar="M", help="limit for each trial (the study's, or 15)")
    parser.add_argument(
        "--learning-rate", type=positive_real, metavar="RATE", help="peak of the schedule (found on the first steps)"
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 file to train on (the study's calibration text)")
    parser.add_argument(
        "--other-text", metavar="FILE", help="UTF-8 file of another source, which decides when to stop (shipped text)"
    )
    parser.add_argument("--again", action="store_true", help="heal trials that are healed already")


def run(options: argparse.Namespace) -> int:
    """Heal the trials and print their values before and after."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.report.text_tables import to_records
    from dse.standalone import heal_study

    settings = _settings(options)
    with TerminalListener() as listener:
        study = heal_study(
            options.directory, options.trial or (), settings=settings, again=options.again, listener=listener
        )
    table = study.trials()
    column = "healed.kl_divergence_other"
    chosen = table[table[column].notna()] if column in table else table[:0]
    if options.trial:
        chosen = chosen[chosen["trial"].isin(options.trial)]
    reasons = {trial: entry["reason"] for trial, entry in study.attributes.get("healed", {}).items() if entry["reason"]}
    document = {"study": study.config.name, "trials": to_records(chosen), "failed": reasons}
    return print_result(options, document, _print_healed)


def _settings(options: argparse.Namespace) -> Any:
    """The study's settings with the options; None without any."""
    from dse.config import CalibrationConfig, CalibrationSource, HealingConfig
    from dse.study import open_study

    given: dict[str, Any] = {
        name: value
        for name in ("tokens", "minutes", "learning_rate", "other_text")
        if (value := getattr(options, name)) is not None
    }
    if options.text is not None:
        given["text"] = CalibrationConfig(sources=[CalibrationSource(file=options.text)])
    if not given:
        return None
    own = open_study(options.directory).config.healing or HealingConfig()
    return own.model_copy(update=given)


def _print_healed(document: Mapping[str, Any]) -> None:
    """A table of the values before and after."""
    from rich.markup import escape

    from dse.cli.printing import plain_table, wide_console

    out = wide_console()
    table = plain_table(["trial", "quantity", "before", "healed"], left=("quantity",))
    for row in document["trials"]:
        names = [key.removeprefix("healed.") for key in row if key.startswith("healed.") and key[7:] in row]
        shown = [name for name in names if not name.endswith(("_low", "_high", "_documents", "on_front"))]
        for index, name in enumerate(shown):
            before, after = row[name], row[f"healed.{name}"]
            if isinstance(before, int | float) and isinstance(after, int | float):
                table.add_row(str(row["trial"]) if index == 0 else "", name, f"{before:.4f}", f"{after:.4f}")
    out.print(table)
    for trial, reason in document["failed"].items():
        out.print(escape(f"trial {trial}: {reason}"), soft_wrap=True)
