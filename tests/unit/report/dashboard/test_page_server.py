from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

pytest.importorskip("dash", reason="the live page needs Plotly Dash")

from dse.errors import ConfigError
from dse.report.dashboard.page_server import bound_socket, is_loopback, make_app, new_token, serve_page
from dse.study.live_study import LiveStudy

TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def live(folder: Path) -> LiveStudy:
    return LiveStudy(folder)


def test_every_file_of_the_page_comes_from_its_own_host(live: LiveStudy) -> None:
    client = make_app(live).server.test_client()
    page = client.get("/", headers={"Host": "127.0.0.1:8050"})
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(addresses) > 5
    assert all(address.startswith("/") and not address.startswith("//") for address in addresses)
    for address in addresses:
        with client.get(address, headers={"Host": "localhost"}) as answer:  # closes the file that it sends
            assert answer.status_code == 200, address
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    assert "unsafe" not in policy.partition("script-src")[2].partition(";")[0]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "127.0.0.1.evil.example"])
def test_a_name_that_resolves_to_this_machine_is_refused(live: LiveStudy, host: str) -> None:
    client = make_app(live).server.test_client()
    for path in ("/", "/_dash-layout"):
        assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8050", "127.0.0.1", "[::1]:8050"])
def test_names_of_this_machine_are_served(live: LiveStudy, host: str) -> None:
    assert make_app(live).server.test_client().get("/", headers={"Host": host}).status_code == 200


def test_a_token_is_needed_for_everything(live: LiveStudy) -> None:
    server = make_app(live, token=TOKEN, any_host=True).server
    for path in ("/", "/_dash-layout", "/_dash-dependencies", "/assets/watch.js", f"/?token={TOKEN}x", "/?token="):
        refused = server.test_client().get(path, headers={"Host": "node7"})
        assert refused.status_code == 401, path
        assert TOKEN not in refused.text
    assert server.test_client().post("/_dash-update-component", json={}).status_code == 401
    assert server.test_client().get("/_dash-layout", headers={"X-Dse-Token": TOKEN}).status_code == 200
    assert server.test_client().get("/_dash-layout", headers={"X-Dse-Token": "ä" * 24}).status_code == 401


def test_the_link_sets_a_cookie_and_loses_the_token(live: LiveStudy) -> None:
    client = make_app(live, token=TOKEN, any_host=True).server.test_client()
    answer = client.get(f"/?token={TOKEN}")
    assert answer.status_code == 302
    assert TOKEN not in answer.headers["Location"]
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get("/_dash-layout").status_code == 200


def test_tokens_are_long_and_differ() -> None:
    assert len(new_token()) >= 24
    assert new_token() != new_token()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.1.5", False), ("node7", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_another_host_without_a_token_is_refused(live: LiveStudy) -> None:
    with pytest.raises(ConfigError, match="must have a token"):
        serve_page(live, host="0.0.0.0")


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another `--port`"):
            bound_socket("127.0.0.1", taken.getsockname()[1])


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be able to listen"):
        bound_socket("192.0.2.1", 0)
