"""`dse watch` as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from synthetic_study import SyntheticStudy
from tiny_study import environment

from dse.cli import main

HAS_DASH = pytest.mark.skipif(importlib.util.find_spec("dash") is None, reason="the live page needs Plotly Dash")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch") / "run"
    SyntheticStudy(path).fill(2).close()
    return path


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_folder_that_is_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "must be the folder of a study" in _line(capsys)


@HAS_DASH
def test_another_host_needs_a_token(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSE_WATCH_TOKEN", raising=False)
    assert main(["watch", str(study), "--host", "0.0.0.0"]) == 2
    assert "`--token auto`" in _line(capsys)


@HAS_DASH
def test_a_short_token(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(study), "--token", "secret"]) == 2
    line = _line(capsys)
    assert "at least 16" in line
    assert "secret" not in line


@HAS_DASH
def test_a_port_in_use(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["watch", str(study), "--port", port]) == 2
    assert f"127.0.0.1:{port}" in _line(capsys)


def test_without_dash(study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dse.report.dashboard.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dash", None)
    assert main(["watch", str(study)]) == 2
    assert "pip install 'lowrank-dse[dashboard]'" in _line(capsys)


@HAS_DASH
def test_the_command_serves_the_page_until_ctrl_c(study: Path, cache_folder: Path) -> None:
    arguments = [sys.executable, "-m", "dse.cli", "watch", str(study), "--port", "0", "--token", "auto", "--json"]
    with subprocess.Popen(
        arguments, env=environment(cache_folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], "the server ended before it was ready"
        address = json.loads("".join(lines))["address"]
        place, _, token = address.partition("?token=")
        assert len(token) >= 24
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(place)
        with urllib.request.urlopen(urllib.request.Request(place, headers={"X-Dse-Token": token})) as answer:
            assert b"dse watch" in answer.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "the study goes on" in err
    assert token not in err
