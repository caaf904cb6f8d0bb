"""The command line: arguments and printing only. Heavy imports wait inside the commands, so that `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dse.errors import DseError, UserError

__all__ = ["build_parser", "main"]

EXIT_OK, EXIT_USER_ERROR, EXIT_NOTHING_FITS, EXIT_INTERRUPTED = 0, 2, 3, 130

_POINT_HELP = (
    'design point: JSON text, a JSON file, or "dense"; compact {"method": "tucker", "rank": 1, "layers": [2, 17],'
    ' "roles": "all"} or expanded {"tensors": {"layers.2.query": {"method": "svd", "rank": 64}}}'
)
_MODEL_HELP = "hub id, local folder, .gguf file, or demo:smollm2-135m-instruct"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user can mend it, 3 nothing fits, 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    _set_up_process()
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error))
    except DseError as error:
        return _fail(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `dse front DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:  # a disk or a permission, not a defect of ours
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from dse import __version__

    parser = _Parser(
        prog="dse",
        description="Design-space exploration of low-rank decomposition for Hugging Face language models.",
        epilog="example:\n  dse run studies/quickstart.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_run, _add_front, _add_recommend, _add_export, _add_cost, _add_space, _add_evaluate, _add_doctor):
        add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    parser.add_argument("--json", action="store_true", help="print one JSON document to stdout and nothing else there")
    return parser


def _add_run(commands: Any) -> None:
    parser = _command(
        commands, "run", _run, "run a study, or go on with one", "dse run studies/quickstart.yaml --trials 40"
    )
    parser.add_argument("study", metavar="STUDY.yaml", help="study file")
    parser.add_argument("--trials", type=_positive, metavar="N", help="evaluated points in all; overrides the file")
    parser.add_argument("--out", metavar="DIR", help="folder of the study (default: runs/<study name>)")


def _add_front(commands: Any) -> None:
    parser = _command(commands, "front", _front, "show the Pareto front of a study", "dse front runs/quickstart")
    parser.add_argument("directory", metavar="DIR", help="folder of the study")


def _add_recommend(commands: Any) -> None:
    parser = _command(
        commands,
        "recommend",
        _recommend,
        "name the cheapest point within a tolerance (exit 3 and the nearest miss where none is)",
        "dse recommend runs/quickstart --max-accuracy-drop 0.02",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--max-accuracy-drop",
        type=float,
        required=True,
        metavar="DROP",
        help="largest accuracy drop against dense, as a fraction: 0.02 is two points",
    )
    parser.add_argument("--min-reduction", type=float, metavar="R", help="least share of parameters to be removed")


def _add_export(commands: Any) -> None:
    parser = _command(
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


def _add_cost(commands: Any) -> None:
    parser = _command(
        commands,
        "cost",
        _cost,
        "exact parameters, bytes and FLOPs of a point, from the model's config alone",
        """dse cost --model meta-llama/Llama-2-7b-hf --point '{"method": "tucker", "rank": 1, "layers": [2, 17]}'""",
    )
    _add_model(parser)
    parser.add_argument("--point", required=True, metavar="POINT", help=_POINT_HELP)
    parser.add_argument(
        "--prompt-tokens", type=_positive, default=512, metavar="N", help="prompt or cache length for the FLOPs (512)"
    )


def _add_space(commands: Any) -> None:
    parser = _command(
        commands,
        "space",
        _space,
        "what a search space contains on a model",
        "dse space search_spaces/layer_rank.yaml --model demo:smollm2-135m-instruct",
    )
    parser.add_argument("space", metavar="SPACE.yaml", help="search-space file")
    _add_model(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate a model, dense or at a point, with lm-eval",
        "dse evaluate --model demo:smollm2-135m-instruct --task dse_facts --limit 50",
    )
    _add_model(parser)
    parser.add_argument("--point", default="dense", metavar="POINT", help=_POINT_HELP)
    parser.add_argument(
        "--task", action="append", required=True, metavar="T", help="lm-eval task, dse_* task or task YAML; repeatable"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="documents per task, drawn by seed")
    parser.add_argument("--seed", type=int, default=0, help="of the documents (0)")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<index>")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        default="general",
        help="for whitened methods: general, grammar, facts, python_docs, or a text file (general)",
    )
    parser.add_argument("--calibration-tokens", type=_positive, default=16384, metavar="N")


def _add_doctor(commands: Any) -> None:
    _command(commands, "doctor", _doctor, "what is here, what is missing, and the remedy", "dse doctor")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="REF", help=_MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow Python code that comes with the model")


def _run(options: argparse.Namespace) -> int:
    from dse.cli.progress import TerminalListener
    from dse.cli.report import print_study, study_json
    from dse.study import run_study

    listener = TerminalListener()
    try:
        with listener:
            study = run_study(options.study, out=options.out, trials=options.trials, listener=listener)
    except KeyboardInterrupt:
        again = ["dse", "run", options.study]
        again += ["--trials", str(options.trials)] if options.trials else []
        again += ["--out", options.out] if options.out else []
        print(f"stopped; every finished trial is kept. Go on with:\n  {shlex.join(again)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if options.json:
        _print_json(study_json(study))
    else:
        print_study(study)
    return EXIT_OK


def _front(options: argparse.Namespace) -> int:
    from dse.cli.report import print_front, study_json
    from dse.study import open_study

    study = open_study(options.directory)
    if options.json:
        _print_json(study_json(study))
    else:
        print_front(study)
    return EXIT_OK


def _recommend(options: argparse.Namespace) -> int:
    from dse.cli.report import print_recommendation
    from dse.study import open_study

    study = open_study(options.directory)
    advice = study.recommend(options.max_accuracy_drop, options.min_reduction)
    if options.json:
        _print_json(dataclasses.asdict(advice))
    else:
        print_recommendation(study, advice)
    return EXIT_OK if advice.trial is not None else EXIT_NOTHING_FITS


def _export(options: argparse.Namespace) -> int:
    from dse.cli.progress import TerminalListener
    from dse.cli.report import print_export
    from dse.export import export
    from dse.study import open_study

    study = open_study(options.directory)
    with TerminalListener() as listener:
        results = export(study, options.trial, options.out, dense=options.dense, listener=listener)
    if options.json:
        _print_json([_plain(result) for result in results])
    else:
        print_export(results)
    return EXIT_OK


def _cost(options: argparse.Namespace) -> int:
    from dse.cli.report import print_cost
    from dse.cost import cost
    from dse.design_point import DesignPoint
    from dse.models import load_topology

    topology = load_topology(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    point = DesignPoint.read(options.point, topology)
    result = cost(topology, point, prompt_tokens=options.prompt_tokens)
    if options.json:
        _print_json(result.to_json())
    else:
        print_cost(options.model, topology, point, result)
    return EXIT_OK


def _space(options: argparse.Namespace) -> int:
    from dse.cli.report import print_space
    from dse.config import load_search_space
    from dse.models import load_topology
    from dse.study import SearchSpace

    config = load_search_space(Path(options.space))
    topology = load_topology(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        role_names=config.role_names,
    )
    description = SearchSpace.from_config(config, topology).describe()
    if options.json:
        _print_json(description)
    else:
        print_space(description)
    return EXIT_OK


def _evaluate(options: argparse.Namespace) -> int:
    from dse.cli.evaluate import evaluate_command
    from dse.cli.progress import TerminalListener
    from dse.cli.report import print_evaluation

    with TerminalListener() as listener:
        document = evaluate_command(options, listener)
    if options.json:
        _print_json(document)
    else:
        print_evaluation(document)
    return EXIT_OK


def _doctor(options: argparse.Namespace) -> int:
    from dse.cli.report import print_checks
    from dse.measurement import run_checks

    checks = run_checks()
    if options.json:
        _print_json([dataclasses.asdict(check) for check in checks])
    else:
        print_checks(checks)
    return EXIT_OK


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is needed, but got '{text}'") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is needed, but got {value}")
    return value


def _plain(value: Any) -> Any:
    """A dataclass as JSON values; paths become text."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, allow_nan=False, default=str))


def _fail(message: str) -> int:
    print(f"dse: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


def _set_up_process() -> None:
    """Settings of a process of ours, not of a library: quiet libraries, and SIGTERM as clean as Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" must not end a study
    logger = logging.getLogger("dse")
    logger.propagate = False
    for handler in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_StderrHandler())

    def stop(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


class _StderrHandler(logging.Handler):
    """Warnings as lines on whatever stderr is now: progress bars replace it while they are drawn."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("dse: %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(self.format(record), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
