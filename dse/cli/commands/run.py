"""`dse run`."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from dse.cli.commands._base import EXIT_INTERRUPTED, EXIT_OK, command, positive, print_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add `dse run`."""
    parser = command(
        commands, "run", _run, "run a study, or go on with one", "dse run studies/quickstart.yaml --trials 40"
    )
    parser.add_argument("study", metavar="STUDY.yaml", help="study file")
    parser.add_argument("--trials", type=positive, metavar="N", help="evaluated points in all; overrides the file")
    parser.add_argument("--out", metavar="DIR", help="folder of the study (default: runs/<study name>)")
    parser.add_argument(
        "--no-cache", action="store_true", help="evaluate everything anew, and keep nothing in the user's cache"
    )


def _run(options: argparse.Namespace) -> int:
    from dse.cli.progress import TerminalListener
    from dse.cli.report import print_study, study_json
    from dse.study import run_study

    listener = TerminalListener()
    try:
        with listener:
            study = run_study(
                options.study, out=options.out, trials=options.trials, use_cache=not options.no_cache, listener=listener
            )
    except KeyboardInterrupt:
        again = ["dse", "run", options.study]
        again += ["--trials", str(options.trials)] if options.trials else []
        again += ["--out", options.out] if options.out else []
        again += ["--no-cache"] if options.no_cache else []
        print(f"stopped; every finished trial is kept. Go on with:\n  {shlex.join(again)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if options.json:
        print_json(study_json(study))
    else:
        print_study(study)
    return EXIT_OK
