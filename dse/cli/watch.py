"""`dse watch`: show a running or finished study on a live page."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from dse.cli.options import EXIT_OK, add_command
from dse.errors import ConfigError

_PORT = 8050
_TOKEN = "DSE_WATCH_TOKEN"  # noqa: S105 - the name of a variable


def add_parser(commands: Any) -> None:
    """Add `dse watch`."""
    parser = add_command(
        commands,
        "watch",
        run,
        summary="show a running or finished study on a live page",
        example="dse watch runs/quickstart\n  dse watch runs/quickstart --host 0.0.0.0 --token auto",
        details="The page follows the study by itself; Ctrl-C ends the server. Needs pip install 'lowrank-dse[dashboard]'.",
    )
    parser.add_argument("directory", metavar="DIR", help="folder of the study")
    parser.add_argument("--port", type=_port, default=_PORT, metavar="N", help=f"port; 0 takes any free one ({_PORT})")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to listen on; needs a token (127.0.0.1)"
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help=f"auto prints a random token once; or a text of 16 characters or more, also as {_TOKEN}",
    )


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from dse.study.live_study import LiveStudy

    source = LiveStudy(options.directory)
    serve = _serve()
    token = _token(options)
    try:
        serve(source, host=options.host, port=options.port, token=token, on_ready=_announcer(options))
    except KeyboardInterrupt:
        print("stopped; the study goes on without the page", file=sys.stderr)
    return EXIT_OK


def _serve() -> Any:
    """The server.

    Raises:
        ConfigError: Plotly Dash is not installed.
    """
    try:
        from dse.report.dashboard.page_server import serve_page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("dash", "flask", "werkzeug"):
            raise
        raise ConfigError(
            "`dse watch` must have Plotly Dash, but it is not installed; run pip install 'lowrank-dse[dashboard]'"
        ) from error
    return serve_page


def _token(options: argparse.Namespace) -> str | None:
    """The token; None on loopback without one.

    Raises:
        ConfigError: The host needs a token and there is none, or it is too short.
    """
    from dse.report.dashboard.page_server import MIN_TOKEN, is_loopback, new_token

    given: str | None = options.token or os.environ.get(_TOKEN)
    if given == "auto":
        return new_token()
    if given is not None and (len(given) < MIN_TOKEN or not given.isascii() or not given.isprintable()):
        raise ConfigError(
            f"a token must have at least {MIN_TOKEN} printable ASCII characters, but this one does not; `--token auto`"
            " makes one"
        )
    if given is None and not is_loopback(options.host):
        raise ConfigError(
            f"`--host {options.host}` is reached by other machines and must have a token, but got none; add"
            " `--token auto`"
        )
    return given


def _announcer(options: argparse.Namespace) -> Any:
    from dse.cli.printing import print_json

    def announce(address: str) -> None:
        if options.json:
            print_json({"address": address, "directory": options.directory})
        else:
            print(f"watching {options.directory} at {address}\npress Ctrl-C to stop")
        sys.stdout.flush()

    return announce


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, but got '{text}'")
    return int(text)
