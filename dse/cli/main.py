"""The parser of all commands, the exit codes and the set-up of the process.

Commands import the library inside their `run`, so that `--help` stays fast.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dse.cli import (
    allocate,
    compare,
    cost,
    doctor,
    evaluate,
    export,
    front,
    heal,
    measure,
    plan,
    profile_device,
    recommend,
    run,
    sensitivity,
    space,
    verify,
    watch,
)
from dse.cli.options import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR
from dse.errors import DseError, OutOfMemoryError, UserError

# In the order of `dse --help`.
_STUDY_COMMANDS = (plan, run, watch, front, recommend, compare, heal, export, verify)
_MODEL_COMMANDS = (cost, space, sensitivity, allocate, evaluate, measure, profile_device, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line; None means `sys.argv`.

    Returns:
        The exit code: 0 success, 1 `dse verify` found other outputs, 2 user-fixable error, 3 no point fits, 130
        interrupted.
    """
    options = build_parser().parse_args(arguments)
    _set_up_process()
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except (UserError, OutOfMemoryError) as error:
        return _fail(str(error))
    except DseError as error:
        return _fail(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `dse front DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:  # a problem of the disk or of permissions, not a bug
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (MemoryError, RuntimeError) as error:
        from dse.out_of_memory import bytes_asked, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        asked = bytes_asked(str(error))
        amount = "of unknown size" if asked is None else f"of {asked} bytes"
        return _fail(f"out of memory: an allocation {amount} failed; use a smaller model or a device with more memory")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from dse import __version__

    parser = _Parser(
        prog="dse",
        description="Design-space exploration of low-rank decomposition for Hugging Face language models.",
        epilog="example:\n  dse run quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in _STUDY_COMMANDS + _MODEL_COMMANDS:
        command.add_parser(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage text."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reject a value `--`, which argparse before Python 3.13 turns into an empty list."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == []:
                self.error(f"`--` cannot be the value of --{name.replace('_', '-')}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def _fail(message: str) -> int:
    print(f"dse: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


def _set_up_process() -> None:
    """Settings that belong to a process, not to a library: warnings, logging, encodings, and SIGTERM as Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _set_up_warnings()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" must not abort a study
    logger = logging.getLogger("dse")
    logger.propagate = False
    for handler in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_StderrHandler())

    def stop(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


_OTHERS = r"(?!dse(\.|$))"
_NOISY: tuple[tuple[str, type[Warning], str], ...] = (
    # (beginning of the message, category, module). Plans of libraries for their own later versions:
    ("", FutureWarning, _OTHERS),
    ("", DeprecationWarning, _OTHERS),
    ("", PendingDeprecationWarning, _OTHERS),
    (r".*experimental", UserWarning, r"optuna(\.|$)"),
    # What concerns their developers:
    ("", SyntaxWarning, _OTHERS),
    ("", ResourceWarning, _OTHERS),
    ("", ImportWarning, _OTHERS),
    ("", UserWarning, r"torch\.(_dynamo|_inductor|jit|onnx|fx|export)(\.|$)"),
    # A machine without a GPU, which `dse doctor` reports:
    (r"CUDA initialization", UserWarning, r"torch(\.|$)"),
    (r"Can't initialize NVML", UserWarning, r"torch(\.|$)"),
    # Metrics of constant samples; the evaluators check every result themselves:
    ("", RuntimeWarning, r"(lm_eval|sklearn|scipy|numpy)(\.|$)"),
    ("", UserWarning, r"(lm_eval|sklearn|datasets|evaluate)(\.|$)"),
)
"""Warnings of libraries that a user can do nothing about. All others are shown, those of dse in any case."""


def _set_up_warnings() -> None:
    """Print each warning once, in one line, except known noise of libraries."""
    from dse.config import DeprecatedNameWarning

    printed: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if text in printed:
            return
        printed.add(text)
        if issubclass(category, DeprecatedNameWarning):
            print(f"dse: notice: {text}", file=sys.stderr)
        else:
            place = "" if os.sep + "dse" + os.sep in filename else f" ({_library_of(filename)})"
            print(f"dse: warning: {text}{place}", file=sys.stderr)

    warnings.resetwarnings()
    for message, category, module in _NOISY:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    warnings.simplefilter("always", DeprecatedNameWarning)
    warnings.showwarning = show


def _library_of(filename: str) -> str:
    """The package that a file belongs to, such as `transformers`."""
    parts = Path(filename).parts
    known = [index for index, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return parts[known[-1] + 1].removesuffix(".py") if known and known[-1] + 1 < len(parts) else "Python"


class _StderrHandler(logging.Handler):
    """Prints log records to the current `sys.stderr`, which progress bars replace while they are shown."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("dse: %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(self.format(record), file=sys.stderr)
