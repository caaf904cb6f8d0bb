"""`dse sensitivity` and `dse allocate` on a tiny model."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest
from tiny_models import WORDS, save_tiny_model

import dse
from dse.cli import main
from dse.design_point import DesignPoint

pytestmark = pytest.mark.usefixtures("own_cache", "own_process")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=3000)), encoding="utf-8")
    return path


def arguments(command: str, folder: Path, text: Path, *more: str) -> list[str]:
    fixed = ["--model", str(folder / "model"), "--method", "svd", "--text", str(text), "--tokens", "256"]
    return [command, *fixed, "--device", "cpu", *more]


def test_a_profile_is_printed_plotted_and_used_for_an_allocation(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile"
    assert main(arguments("sensitivity", tiny_folder, text_file, "--out", str(out))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["layer", "query", "key"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert "keeping about 50 % of its parameters" in lines[5]
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "<table>" in (out / "sensitivity.html").read_text()
    profile = out / "profile.json"
    points = tmp_path / "points"
    more = ("--profile", str(profile), "--reduction", "0.1,0.3", "--out", str(points), "--max-removed", "0")
    assert main(arguments("allocate", tiny_folder, text_file, *more, "--json")) == 0
    documents = json.loads(capsys.readouterr().out)
    topology = dse.load_topology(str(tiny_folder / "model"))
    for document, reduction in zip(documents, (0.1, 0.3), strict=True):
        point = DesignPoint.read(document["file"], topology)
        assert point.to_json() == document["point"]
        assert dse.point_cost(topology, point).reduction == pytest.approx(document["reduction"])
        assert document["reduction"] >= reduction
        assert document["removed_blocks"] == 0
    # Without --profile it is read from the cache. Without --json each point is one line.
    assert main(arguments("allocate", tiny_folder, text_file, "--reduction", "0.1", "--dense-roles", "up")) == 0
    printed = capsys.readouterr().out
    assert "predicted KL" in printed
    assert "`--out DIR`" in printed


def test_pivoted_factors_lose_less_at_the_same_reduction(
    tiny_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for more in ((), ("--pivoted",)):
        command = arguments("allocate", tiny_folder, text_file, "--reduction", "0.1", "--max-removed", "0", *more)
        assert main([*command, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)[0])
    plain, pivoted = found
    assert pivoted["predicted_divergence"] < plain["predicted_divergence"]
    assert {choice.get("form") for choice in plain["point"]["tensors"].values()} == {None}
    assert "pivoted" in {choice.get("form") for choice in pivoted["point"]["tensors"].values()}
    assert main(arguments("sensitivity", tiny_folder, text_file, "--method", "tucker", "--pivoted")) == 2
    assert "but got 'tucker', which keeps a core" in capsys.readouterr().err


def test_points_are_allocated_under_a_latency_budget(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error contains the commands that time the missing products; the test runs them unchanged."""
    monkeypatch.chdir(tmp_path)
    more = ("--latency-reduction", "0.02,0.05", "--batch", "2", "--prompt", "8")
    command = arguments("allocate", tiny_folder, text_file, *more)
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a latency budget needs the" in error
    remedy = error[error.index("`") + 1 : error.rindex("`")]
    for part in remedy.split(" && "):
        assert main(shlex.split(part)[1:]) == 0, part
    capsys.readouterr()
    # The timings decide which reductions are possible; a reduction of 0 always is.
    none = arguments("allocate", tiny_folder, text_file, "--latency-reduction", "0", *more[2:], "--out", "points")
    assert main([*none, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    topology = dse.load_topology(str(tiny_folder / "model"))
    assert DesignPoint.read(document["file"], topology).to_json() == document["point"]
    assert document["file"].endswith("latency-reduction-0.json")
    assert document["latency_s"] <= document["latency_dense_s"]
    assert document["latency_is_predicted"] is True
    assert document["latency_dense_is_predicted"] is True
    assert document["latency_reduction"] == pytest.approx(1 - document["latency_s"] / document["latency_dense_s"])
    profile = ("--profile", "sensitivity/profile.json")
    assert main([*none, *profile, "--dense-latency", "10", "--json"]) == 0
    (measured,) = json.loads(capsys.readouterr().out)
    assert measured["latency_dense_s"] == 10
    assert measured["latency_dense_is_predicted"] is False
    assert main(none) == 0
    printed = capsys.readouterr().out
    assert "predicted decode latency" in printed
    assert "latencies are predicted from" in printed
    # Timings of one batch size do not apply to another.
    assert main(arguments("allocate", tiny_folder, text_file, "--latency-reduction", "0", "--batch", "3")) == 2
    assert "--batch 3 --prompt 128" in capsys.readouterr().err
    impossible = arguments("allocate", tiny_folder, text_file, "--latency-reduction", "0.999", *more[2:])
    assert main(impossible) == 2
    assert "latency" in capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(SystemExit):
        main([*none, "--reduction", "0.1"])
    with pytest.raises(SystemExit):
        main([*none, "--dense-latency", "0"])


def test_user_fixable_errors_are_one_line(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    assert main(arguments("sensitivity", tiny_folder, text_file, "--out", str(tmp_path))) == 0
    save_tiny_model(tmp_path / "model", seed=6)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    other_text = tmp_path / "other.txt"
    other_text.write_text(" ".join(random.Random(1).choices(WORDS, k=3000)), encoding="utf-8")
    capsys.readouterr()
    by_profile = ("--profile", str(profile), "--reduction", "0.1")
    cases = [
        (arguments("allocate", tmp_path, text_file, *by_profile), "must be of the same model"),
        (arguments("allocate", tiny_folder, other_text, *by_profile), "must be of the same profile text"),
        (
            arguments("allocate", tiny_folder, text_file, "--profile", str(damaged), "--reduction", "0.1"),
            "readable JSON",
        ),
        (arguments("allocate", tiny_folder, text_file, "--reduction", "0.99"), "must hold for this profile"),
        (
            arguments("allocate", tiny_folder, text_file, "--reduction", "0.1", "--untouched-layers", "0,1,2"),
            "must hold for this profile",
        ),
        (
            arguments("allocate", tiny_folder, text_file, "--reduction", "0.1", "--untouched-layers", "9"),
            "an untouched layer must be one of the profile's (0 to 2)",
        ),
        (
            arguments("allocate", tiny_folder, text_file, "--reduction", "0.1", "--dense-roles", "quary"),
            "but got 'quary'; did you mean 'query'",
        ),
        (
            arguments("allocate", tiny_folder, text_file, "--reduction", "0.1", "--refit"),
            "`--refit` needs a profile of fisher_svd, but this profile is of 'svd'",
        ),
        (arguments("sensitivity", tiny_folder, text_file, "--method", "sdv"), "a method must be one of"),
        (arguments("sensitivity", tiny_folder, tmp_path / "absent.txt"), "must be readable UTF-8 text"),
        (arguments("sensitivity", tiny_folder, text_file, "--space", str(tmp_path / "absent.yaml")), "not both"),
    ]
    for command, message in cases:
        assert main(command) == 2, command
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("dse: error: ")
        assert message in error


def test_options_that_are_not_numbers_are_rejected(tiny_folder: Path, text_file: Path) -> None:
    for more in (("--reduction", "1.5"), ("--reduction", "a"), ("--reduction", "0.1", "--max-removed", "-1")):
        with pytest.raises(SystemExit) as caught:
            main(arguments("allocate", tiny_folder, text_file, *more))
        assert caught.value.code == 2
