"""The command line: arguments and printing only. Heavy imports wait inside the commands, so that `--help` is quick."""

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
from typing import Any, NoReturn

from dse.cli.commands import COMMANDS
from dse.cli.commands._base import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR
from dse.errors import DseError, UserError

__all__ = ["build_parser", "main"]


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
    for add in COMMANDS:
        add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text in front."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, which before Python 3.13 turns a value that is `--` into an empty list."""
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
