"""`dse measure` on a CPU: its table, its JSON document and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dse.cli import main

QUICK = ["--prompt", "8", "--new", "2", "--blocks", "2", "--precision", "0.9"]


@pytest.fixture
def model(tiny_folder: Path) -> list[str]:
    return ["--model", str(tiny_folder / "model")]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(["measure", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_has_every_combination_with_a_replayed_meter(
    model: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,gpu_w\n" + "".join(f"{0.002 * index:.3f},75\n" for index in range(500)))
    point = '{"method": "svd", "rank": 2, "layers": "all", "roles": ["up"]}'
    code, out, err = run(
        capsys, *model, "--point", point, *QUICK, "--batch", "1,3", "--meter", f"replay:{trace}", "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert [cell["batch_size"] for cell in document["cells"]] == [1, 3]
    assert document["meter"]["is_replay"] is True
    assert document["idle_power"]["power_w"] == pytest.approx(75)
    for cell in document["cells"]:
        decode = cell["latency"]["latency"]["decode"]
        assert decode["ratio_low"] <= decode["ratio"] <= decode["ratio_high"]
        energy = cell["energy"]["point"]["decode"]
        joules = sum(window["gross_j"] for window in energy["windows"])
        assert joules == pytest.approx(75 * sum(window["duration_s"] for window in energy["windows"]), rel=1e-3)
        memory = cell["memory"]
        assert memory["point"]["weight_bytes"] < memory["dense"]["weight_bytes"]
        # Keys and values of three layers, two heads of eight, ten tokens, four bytes.
        assert memory["dense"]["kv_cache_bytes"] == 2 * 3 * 2 * 8 * 10 * 4 * cell["batch_size"]


def test_the_table_has_dense_point_and_ratio_and_the_reason_for_missing_energy(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    point = '{"method": "svd", "rank": 2, "layers": [1], "roles": "all"}'
    code, out, err = run(capsys, *model, "--point", point, *QUICK, "--meter", "none")
    assert code == 0, err
    for word in (
        "dense",
        "point",
        "ratio",
        "95 % interval",
        "time to first token",
        "time per output token",
        "KV cache",
    ):
        assert word in out
    assert "energy: not measured (not requested)" in out
    assert "mode eager, clock perf_counter_ns" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,0"], "must be an integer of at least 1, but got 0"),
        (["--new", ""], "must be an integer of at least 1"),
        (["--prompt", "8,8"], "must list each number once"),
        (["--prompt", "60", "--new", "8"], "`prompt_tokens + new_tokens <= 64` must hold"),
        (["--meter", "wattmeter"], "a meter must be one of"),
        (["--meter", "nvml:0"], "no energy meter nvml: no NVIDIA driver"),
        (["--meter", "replay:/no/trace.csv"], "a power trace must be a CSV file"),
        (["--mode", "quick"], "the mode of a measurement must be one of eager, compile, cuda_graph"),
        (["--mode", "cuda_graph", "--prompt", "8"], "CUDA graphs need an NVIDIA GPU"),
        (["--device", "cpu,cuda:0"], "several devices must be different GPUs"),
        (["--device", "cuda:0,cuda:1"], "must be GPUs that torch sees, but it sees 0"),
        (["--precision", "0"], "`0 < precision < 1` must hold"),
    ],
)
def test_invalid_input_is_one_line_and_exit_code_2(
    model: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    import torch

    if torch.cuda.is_available() and any(word in message for word in ("NVIDIA", "sees 0")):
        pytest.skip("this machine has a GPU, so the input is valid")
    code, out, err = run(capsys, *model, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
