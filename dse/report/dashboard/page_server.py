"""The server of the live page: on loopback without a token, elsewhere only with one."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dash import Dash
from flask import Flask, Response, redirect, request
from werkzeug.serving import make_server

from dse.errors import ConfigError
from dse.report.dashboard.page_callbacks import PageCallbacks
from dse.report.dashboard.page_layout import page_layout
from dse.report.dashboard.snapshot import StudySource

__all__ = ["MIN_TOKEN", "bound_socket", "is_loopback", "make_app", "new_token", "serve_page"]

MIN_TOKEN = 16
"""Characters of the shortest token."""

_COOKIE, _HEADER, _PARAMETER = "dse_watch", "X-Dse-Token", "token"
_HEADERS = {
    # Plotly and Dash add styles at run time, and Plotly saves images through data: and blob: URLs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def new_token() -> str:
    """A random token."""
    return secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_app(source: StudySource, *, token: str | None = None, any_host: bool = False) -> Dash:
    """The page as a Dash application.

    Args:
        source: The study.
        token: Token that every request needs; None for a server on loopback.
        any_host: Whether requests may name a host other than this machine. Elsewhere a page of another site could
            reach a server on loopback through a name that resolves to it.
    """
    server = Flask("dse.watch")
    app = Dash(
        "dse.watch",
        server=server,
        title=f"{source.snapshot().name} - dse watch",
        update_title=None,
        assets_folder=str(Path(__file__).with_name("assets")),
        serve_locally=True,
        suppress_callback_exceptions=True,
        add_log_handler=False,
        enable_mcp=False,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
        index_string=_INDEX,
    )
    app.layout = lambda: page_layout(source.snapshot())
    PageCallbacks(source).register(app)
    hashes = " ".join(app.csp_hashes())
    headers = {name: value.replace("{hashes}", hashes) for name, value in _HEADERS.items()}

    def admit() -> Any:
        if not any_host and not is_loopback(request.host.rpartition(":")[0] or request.host):
            return Response("this page is served to this machine only\n", 403, mimetype="text/plain")
        return None if token is None else _checked(token)

    def protect(response: Response) -> Response:
        response.headers.update(headers)
        return response

    server.before_request(admit)
    server.after_request(protect)
    return app


def _checked(token: str) -> Any:
    """Admit a request with the token; a link with the token sets a cookie and loses it from the address."""
    given = request.args.get(_PARAMETER)
    if given is not None and request.method == "GET":
        if not _same(given, token):
            return _refusal()
        answer = redirect(request.path)
        answer.set_cookie(_COOKIE, token, httponly=True, samesite="Strict", path="/")
        return answer
    given = request.headers.get(_HEADER) or request.cookies.get(_COOKIE) or ""
    return None if _same(given, token) else _refusal()


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _refusal() -> Response:
    text = f"this page needs its token: open the link that `dse watch` printed, or send it as {_HEADER}\n"
    return Response(text, 401, mimetype="text/plain")


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: The port is taken, or the host is not one of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen()
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"`dse watch` must be able to listen on {host}:{port}, but: {reason}; choose another `--port`, or"
            " `--port 0` for any free one"
        ) from error
    return found


def serve_page(
    source: StudySource,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        source: The study.
        host: Address to listen on; one that other machines reach needs a token.
        port: Port; 0 for any free one.
        token: Token that every request needs; None on loopback.
        on_ready: Receives the address of the page, with the token, once the server listens.

    Raises:
        ConfigError: The host needs a token, or the port is taken.
    """
    if not is_loopback(host) and token is None:
        raise ConfigError(
            f"`--host {host}` is reached by other machines and must have a token, but got none; add `--token auto`"
        )
    listening = bound_socket(host, port)
    with listening:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        app = make_app(source, token=token, any_host=token is not None)
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}/"
        server = make_server(name, listening.getsockname()[1], app.server, threaded=True, fd=os.dup(listening.fileno()))
        on_ready(address if token is None else f"{address}?{_PARAMETER}={token}")
        try:
            server.serve_forever()
        finally:
            server.server_close()


_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""
