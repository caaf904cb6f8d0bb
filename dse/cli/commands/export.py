"""`dse export`."""

from __future__ import annotations

import argparse
from typing import Any

from dse.cli.commands._base import EXIT_OK, command, plain, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse export`."""
    parser = command(
        commands,
        "export",
        _export,
        "write a trial's model as a folder for transformers",
        "dse export runs/quickstart --trial 12 --out exports/smollm2-small",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument("--trial", type=int, action="append", required=True, metavar="N", help="trial; may be repeated")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="new folder; with several trials, one folder each inside it"
    )
    parser.add_argument(
        "--dense", action="store_true", help="write merged dense weights (for any runtime; saves nothing)"
    )


def _export(options: argparse.Namespace) -> int:
    from dse.cli.progress import TerminalListener
    from dse.cli.report import print_export
    from dse.export import export
    from dse.study import open_study

    study = open_study(options.directory)
    with TerminalListener() as listener:
        results = export(study, options.trial, options.out, dense=options.dense, listener=listener)
    if options.json:
        print_json([plain(result) for result in results])
    else:
        print_export(results)
    return EXIT_OK
