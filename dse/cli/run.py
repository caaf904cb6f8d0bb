"""`dse run`: run a study, or continue one."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from dse.cli.options import EXIT_INTERRUPTED, add_command, count, positive
from dse.shipped_files import shipped_names

if TYPE_CHECKING:
    from dse.study import Study


def add_parser(commands: Any) -> None:
    """Add `dse run`."""
    parser = add_command(
        commands,
        "run",
        run,
        summary="run a study, or continue one",
        example="dse run quickstart\n  dse run studies/quickstart.yaml --trials 40",
        details=f"shipped studies: {', '.join(shipped_names('studies'))}",
    )
    parser.add_argument("study", metavar="STUDY", help="study file, or the name of a shipped study")
    parser.add_argument("--trials", type=positive, metavar="N", help="total number of evaluated points")
    parser.add_argument("--out", metavar="DIR", help="folder of the study (default: runs/<study name>)")
    parser.add_argument("--workers", type=positive, metavar="N", help="evaluate trials on N workers, by Ray")
    parser.add_argument("--gpus-per-worker", type=positive, metavar="K", help="GPUs of each worker (default: 1)")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="join a running Ray cluster: auto or HOST:PORT")
    parser.add_argument(
        "--grace", type=count, metavar="S", help="seconds for trials in flight after Ctrl-C (default: 30)"
    )
    parser.add_argument("--no-cache", action="store_true", help="do not read or write evaluations in the user's cache")


def run(options: argparse.Namespace) -> int:
    """Run the study and print its front, files and recommendation."""
    from dse.cli.printing import print_result
    from dse.cli.terminal_listener import TerminalListener
    from dse.study import Study, run_study

    listener = TerminalListener()
    try:
        with listener:
            study = run_study(
                options.study,
                out=options.out,
                trials=options.trials,
                use_cache=not options.no_cache,
                workers=_workers(options),
                listener=listener,
            )
    except KeyboardInterrupt:
        again = ["dse", "run", options.study]
        again += ["--trials", str(options.trials)] if options.trials else []
        again += ["--out", options.out] if options.out else []
        for option in ("workers", "gpus_per_worker", "ray_address", "grace"):
            value = getattr(options, option)
            again += [] if value is None else [f"--{option.replace('_', '-')}", f"{value}"]
        again += ["--no-cache"] if options.no_cache else []
        print(f"stopped; every finished trial is stored. Continue with:\n  {shlex.join(again)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return print_result(options, study, _print_study, Study.to_document)


def _workers(options: argparse.Namespace) -> dict[str, Any] | None:
    """The keys of `workers` that the options set; None without any."""
    given = {
        "count": options.workers,
        "gpus_per_worker": options.gpus_per_worker,
        "ray_address": options.ray_address,
        "grace_s": options.grace,
    }
    return {key: value for key, value in given.items() if value is not None} or None


def _print_study(study: Study) -> None:
    from dse.cli.front import print_front
    from dse.cli.recommend import print_recommendation
    from dse.report.units import percent
    from dse.study import DEFAULT_MAX_ACCURACY_DROP

    print_front(study)
    folder = study.folder
    print(f"\nfiles in {folder.path}/:")
    for path, content in (
        (folder.front_html, "the front as an interactive page"),
        (folder.front_png, "the front as a picture"),
        (folder.front_csv, "the front as a table"),
        (folder.trials_csv, "every trial with all its values (for pandas)"),
        (folder.study_yaml, "the resolved study"),
        (folder.log, "the log"),
    ):
        print(f"  {path.name:<12} {content}")
    if study.has_accuracy:
        print(f"\nwithin {percent(DEFAULT_MAX_ACCURACY_DROP, 0)} of accuracy:")
        print_recommendation(study, study.recommend())
    print("\nnext:")
    for command in study.next_commands():
        print(f"  {command}")
