"""Every command as a user types it: output, exit code and errors."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_study import environment, merged, tiny_study, write_study
from topologies import LLAMA2_7B, save_published_config

from dse.cli import main
from dse.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (
    "plan",
    "run",
    "front",
    "recommend",
    "compare",
    "export",
    "cost",
    "space",
    "sensitivity",
    "allocate",
    "evaluate",
    "measure",
    "profile-device",
    "doctor",
)


@pytest.fixture(scope="session")
def llama2_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_published_config(tmp_path_factory.mktemp("llama-2-7b"), LLAMA2_7B))


Run = Callable[..., "Done"]


class Done:
    """Exit code and output of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The error line; all other lines of stderr are progress."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if "error: " in line]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n")
        return lines[0]


@pytest.fixture
def dse(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse exits this way
            code = int(exit_.code or 0)
        return Done(code, *capsys.readouterr())

    return run


# --- help -------------------------------------------------------------------------------------------------------------

HELP = """
import contextlib, io, json, sys, time
begin = time.monotonic()
from dse.cli import main
texts = {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    texts[command] = out.getvalue()
heavy = [n for n in ("torch", "transformers", "optuna", "lm_eval", "pandas", "plotly", "rich") if n in sys.modules]
print(json.dumps({"texts": texts, "heavy": heavy, "seconds": time.monotonic() - begin}))
"""


def test_help_is_fast_and_shows_an_example() -> None:
    command = [sys.executable, "-c", HELP, "", *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["seconds"] < 2
    for command_name, text in found["texts"].items():
        assert "usage: dse" in text
        example = text[text.index("example:") :].splitlines()[1].strip()
        assert example.startswith(f"dse {command_name}".strip())
        # The parser accepts the example.
        build_parser().parse_args(shlex.split(example)[1:])
    assert all(f"\n    {name}" in found["texts"][""] for name in COMMANDS)
    assert "--json" in found["texts"]["front"]
    assert "shipped studies: bert_base_squad, " in found["texts"]["run"]
    assert "shipped search spaces: all_forms, depth_profile, " in found["texts"]["space"]


def test_version(dse: Run) -> None:
    from dse import __version__

    assert dse("--version").out == f"dse {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["rum", "study.yaml"], "invalid choice: 'rum'"),
        (["run"], "STUDY"),
        (["run", "x.yaml", "--trials", "0"], "must be an integer of at least 1, but got 0"),
        (["run", "x.yaml", "--trials", "ten"], "must be an integer of at least 1, but got 'ten'"),
        (["recommend", "runs/x"], "--max-accuracy-drop"),
        (["compare", "runs/x"], "--trials"),
        (["compare", "runs/x", "--trials", "1"], "expected 2 arguments"),
        (["cost", "--model", "x"], "--point"),
    ],
)
def test_wrong_arguments_are_rejected(dse: Run, arguments: list[str], words: str) -> None:
    assert words in dse(*arguments).error


# --- cost and space ---------------------------------------------------------------------------------------------------


def test_cost_of_llama_2_7b_from_its_config(dse: Run, llama2_7b: str) -> None:
    point = '{"method": "tucker", "rank": 1, "layers": [2, 17, 31], "roles": "all"}'
    result = dse("cost", "--model", llama2_7b, "--point", point, "--json")
    assert result.code == 0
    assert result.err == ""
    found = result.json
    keys = "parameters_dense parameters reduction weight_bytes flops_prefill_per_token flops_decode_per_token"
    assert set(keys.split()) <= set(found)
    dense_layer = 4 * 4096**2 + 3 * 4096 * 11008
    rank_1_layer = 4 * (2 * 4096 + 1) + 3 * (4096 + 11008 + 1)
    assert found["parameters_dense"] == 6_738_415_616
    assert found["parameters"] == 6_738_415_616 - 3 * (dense_layer - rank_1_layer)
    assert found["reduction"] == pytest.approx(1 - found["parameters"] / found["parameters_dense"], rel=1e-12)
    assert round(100 * found["reduction"]) == 9  # the paper's second set
    assert found["weight_bytes"] == 2 * found["parameters"]
    dense = dse("cost", "--model", llama2_7b, "--point", "dense", "--json").json
    saved = 2 * 3 * (dense_layer - rank_1_layer)
    assert dense["flops_decode_per_token"] - found["flops_decode_per_token"] == saved
    assert dense["flops_prefill_per_token"] - found["flops_prefill_per_token"] == saved


def test_cost_as_a_table_of_a_point_from_a_file(dse: Run, llama2_7b: str, tmp_path: Path) -> None:
    point = {"tensors": {"layers.2.query": {"method": "svd", "rank": 64}}}
    (tmp_path / "point.json").write_text(json.dumps(point))
    result = dse("cost", "--model", llama2_7b, "--point", tmp_path / "point.json", "--prompt-tokens", "64")
    assert result.code == 0
    assert "6,738,415,616" in result.out
    assert f"{6_738_415_616 - 4096**2 + 64 * 8192:,}" in result.out
    assert "1 of 224 tensors decomposed" in result.out
    assert "prefill of 64" in result.out


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ('{"method": "svd", "rank": 0}', "`rank >= 1` must hold"),
        ('{"method": "svd", "rank": -3}', "`rank >= 1` must hold and be an integer, but got rank=-3"),
        ('{"method": "svdd", "rank": 1}', "did you mean 'svd'?"),
        ('{"method": "svd", "rank": 1, "roles": ["querry"]}', "did you mean 'query'?"),
        ('{"method": "svd", "rank": 1, "layers": [32]}', "`0 <= layer < 32` must hold"),
        ('{"method": "svd", "rank": 4000, "layers": [0]}', "`rank <= 2048` must hold for 'layers.0.query'"),
        ('{"tensors": {"layers.0.querry": {"method": "svd", "rank": 1}}}', "did you mean 'layers.0.query'?"),
        ('{"method": "svd"', "must be valid JSON"),
        ("no_such_file.json", "no_such_file.json"),
        ("[1]", "must be a JSON object"),
        ("", "a point must be"),
    ],
)
def test_invalid_points_are_rejected(dse: Run, llama2_7b: str, point: str, words: str) -> None:
    result = dse("cost", "--model", llama2_7b, f"--point={point}")
    assert words in result.error
    assert result.err.count("\n") == 1


JSON_KEYS = st.sampled_from(["method", "rank", "layers", "roles", "tensors", "layers.0.query"]) | st.text(max_size=5)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=[]), max_size=6)
    | st.sampled_from(["svd", "tucker", "all", "query", 0, 1, 4, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_KEYS, inner, max_size=4),
    max_leaves=8,
)
POINTS = st.one_of(
    JSON_VALUES.map(json.dumps),
    st.fixed_dictionaries({"method": st.sampled_from(["svd", "tucker"]), "rank": st.integers(-1, 9)}).map(json.dumps),
    st.dictionaries(JSON_KEYS, JSON_VALUES, min_size=1, max_size=4).map(json.dumps),
    st.text(max_size=30),
    st.text(st.sampled_from('{}[]":,0123eE-. \n\\"truefalsn'), max_size=40),
    st.binary(max_size=20).map(lambda content: content.decode("utf-8", "surrogateescape")),
)


@given(POINTS)
@example("--")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_point_is_read_or_rejected(dse: Run, tiny_folder: Path, tmp_path: Path, point: str) -> None:
    for text in (point, str(tmp_path / "point.json")):
        (tmp_path / "point.json").write_bytes(point.encode("utf-8", "surrogatepass"))
        result = dse("cost", "--model", tiny_folder / "model", f"--point={text}", "--json")
        assert result.code in (0, 2)
        if result.code == 0:
            assert result.json["parameters"] <= result.json["parameters_dense"]
        else:
            assert result.error
            assert result.err.count("\n") == 1


def test_space(dse: Run, llama2_7b: str) -> None:
    found = dse("space", "moar2024", "--model", llama2_7b, "--json").json
    assert found["number_of_configurations"] == 2**39
    assert found["number_of_configurations_log2"] == 39
    assert found["number_of_points"] == (2**32 - 1) * (2**7 - 1) + 1
    assert found["layers"] == list(range(32))
    assert found["roles"] == ["query", "key", "value", "attention_output", "gate", "up", "down"]
    assert found["ranks"]["query"] == [1]
    assert 0.95 < found["largest_reduction"] < 0.97
    shown = dse("space", ROOT / "search_spaces" / "layer_role_rank.yaml", "--model", llama2_7b)
    assert shown.code == 0
    for words in ("32: 0-31", "ranks of query", "= 2^", "smallest reduction", "limits on reduction"):
        assert words in shown.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["sdv"]}, "did you mean 'svd'?"),
        ({"roles": ["querry"]}, "did you mean 'query'?"),
        ({"ranks": {"absolute": [0]}}, "greater than or equal to 1, but got 0"),
        ({"ranks": {"absolute": [-3]}}, "greater than or equal to 1, but got -3"),
        ({"layers": [40]}, "`0 <= layer < 32` must hold"),
        ({"limits": {"reduction": {"min": 0.999}}}, "some point must lie within `limits.reduction`"),
        ({"rank": 3}, "unknown key 'rank'; did you mean 'ranks'?"),
    ],
)
def test_invalid_spaces_are_rejected(
    dse: Run, llama2_7b: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    space = {"name": "s", "methods": ["svd"], "ranks": {"absolute": [1]}, **change}
    result = dse("space", write_study(tmp_path / "space.yaml", space), "--model", llama2_7b)
    assert words in result.error
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./no/such/folder", "no/such/folder"),
        ("demo:smollm3", "a demo model must be one of smollm2-135m-instruct, all-minilm-l6-v2, but got 'smollm3'"),
        ("org/name-that-nobody-has", "neither a local folder nor in the local hub cache"),
        ("", "a model must be"),
    ],
)
def test_invalid_models_are_rejected(dse: Run, monkeypatch: pytest.MonkeyPatch, model: str, words: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = dse("cost", "--model", model, "--point", "dense")
    assert words in result.error
    assert result.err.count("\n") == 1


# --- a study ----------------------------------------------------------------------------------------------------------


def test_run_complete_and_extend_a_study(dse: Run, tiny_folder: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder, budget={"trials": 3}))
    out = tmp_path / "my runs" / "tiny"
    first = dse("run", study, "--out", out)
    assert first.code == 0
    assert first.out.startswith("trial  point")
    assert "3 of 3 trials evaluated" in first.out
    for name in ("study.yaml", "trials.csv", "front.csv", "front.html", "front.png", "run.log"):
        assert name in first.out
        assert (out / name).stat().st_size > 0
    assert "recommended: trial" in first.out or "No trial fits within " in first.out
    assert f"  dse front '{out}'\n" in first.out
    assert f"  dse recommend '{out}' --max-accuracy-drop 0.02\n" in first.out
    assert [line[:6] for line in first.err.splitlines() if line.startswith("[")] == ["[  1/3", "[  2/3", "[  3/3"]
    assert "hypervolume" in first.err
    again = dse("run", study, "--out", out)
    assert again.code == 0
    assert again.err == "complete: all 3 trials are done\n"
    assert again.out == first.out
    more = dse("run", study, "--out", out, "--trials", "4", "--json")
    assert more.json["trials_evaluated"] == more.json["trials_budget"] == 4
    assert more.json["is_complete"]
    assert "resuming: 3 of 4 trials are done" in more.err


def test_run_shows_progress_bars_on_a_terminal(
    dse: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder, budget={"trials": 3}))
    assert dse("run", study, "--out", tmp_path / "run").code == 0
    drawn = terminal.getvalue()
    assert "trial 3 of 3" in drawn
    assert "evaluate" in drawn
    assert "[  3/3] trial 2" in drawn
    assert "front" in drawn


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_front_fits_a_narrow_terminal(dse: Run, finished_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["front", str(finished_study)]) == 0
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert max(map(len, drawn.splitlines()[:-1])) <= 80
    assert "…" not in drawn
    assert "decode latency" in drawn


def test_front(dse: Run, finished_study: Path) -> None:
    result = dse("front", finished_study)
    assert result.code == 0
    assert result.err == ""
    head, *rows, origins = result.out.splitlines()
    assert " ".join(head.split()) == (
        "trial point reduction accuracy vs dense decode latency vs dense parameters vs dense"
    )
    table = pd.read_csv(finished_study / "trials.csv")
    caption = next(index for index, row in enumerate(rows) if "± is a 95 % interval" in row)
    shown = {int(row.split()[0]) for row in rows[:caption]}
    tied = table[table["tied_with"].notna()]
    below = rows[caption + 1 : -2]
    sizes = table.loc[table["on_front"], "accuracy_drop_detectable"].dropna()
    if not sizes.empty:
        assert rows[-2].startswith("smallest accuracy drop that 24 documents detect: ")
        assert f"{100 * sizes.max():.1f} pts" in rows[-2]
    else:
        below = rows[caption + 1 : -1]
    assert {int(row.split()[0]): int(row.split()[1]) for row in below[2:]} == dict(
        zip(tied["trial"], tied["tied_with"], strict=True)
    )
    assert tied["tied_with"].isin(table.loc[table["on_front"], "trial"]).all()
    assert shown == set(table.loc[table["on_front"], "trial"]) | {0}
    assert "reference" in result.out  # the dense row
    assert "6 of 6 trials evaluated" in rows[-1]
    assert origins.startswith("origins: ")
    found = dse("front", finished_study, "--json").json
    assert {row["trial"] for row in found["front"]} == shown
    assert {row["trial"] for row in found["tied"]} == set(tied["trial"])
    assert [entry["name"] for entry in found["objectives"]] == ["accuracy", "decode_latency_s", "parameters"]
    assert [entry["unit"] for entry in found["objectives"]] == ["fraction", "s", "count"]
    assert 0 < found["hypervolume"] < 1
    assert found["directory"] == str(finished_study)
    assert all(Path(path).is_file() for path in found["files"].values())


def test_recommend(dse: Run, finished_study: Path) -> None:
    found = dse("recommend", finished_study, "--max-accuracy-drop", "1", "--json")
    assert found.code == 0
    advice = found.json
    assert advice["accuracy_drop"] <= advice["accuracy_drop_high"]
    shown = dse("recommend", finished_study, "--max-accuracy-drop", "1")
    assert f"recommended: trial {advice['trial']}" in shown.out
    assert "with 95 % confidence" in shown.out
    if advice["knee_trial"] not in (None, advice["trial"]):
        assert f"knee of the front: trial {advice['knee_trial']}" in shown.out


def test_recommend_reports_the_documents_needed_to_certify_a_near_miss(dse: Run, finished_study: Path) -> None:
    table = pd.read_csv(finished_study / "trials.csv").set_index("trial")
    tolerance = max(0.0, table["accuracy_drop"].drop(0).min()) + 0.001
    found = dse("recommend", finished_study, "--max-accuracy-drop", tolerance, "--json")
    assert found.code == 0
    advice = found.json
    assert not advice["meets_bound"]
    assert advice["trial"] == advice["estimate_trial"] == advice["near_miss_trial"]
    row = table.loc[advice["trial"]]
    drop, high = row["accuracy_drop"], row["accuracy_drop_high"]
    assert advice["documents_to_settle"] == math.ceil(24 * ((high - drop) / (tolerance - drop)) ** 2 - 1e-9)
    assert advice["more_documents"] == advice["documents_to_settle"] - 24
    shown = dse("recommend", finished_study, "--max-accuracy-drop", tolerance).out
    assert "by point estimate; not certified" in shown
    assert f"about {advice['more_documents']:,} more documents" in " ".join(shown.split())


def test_compare(dse: Run, finished_study: Path) -> None:
    found = dse("compare", finished_study, "--trials", "0", "2", "--json").json
    table = pd.read_csv(finished_study / "trials.csv").set_index("trial")
    assert (found["first"], found["second"]) == (0, 2)
    accuracy, *graded = found["quality"]
    assert [row["metric"] for row in graded] == ["choice_probability", "target_log_likelihood"]
    assert accuracy["test"] == "exact McNemar"
    assert accuracy["change"] == pytest.approx(-table.loc[2, "accuracy_drop"])
    assert accuracy["high"] == pytest.approx(-table.loc[2, "accuracy_drop_low"])
    assert accuracy["p_value"] == pytest.approx(table.loc[2, "accuracy_drop_p_value"])
    assert accuracy["detectable"] == pytest.approx(table.loc[2, "accuracy_drop_detectable"])
    assert accuracy["second_stderr"] == pytest.approx(table.loc[2, "task.tiny_choice.acc_stderr"])
    assert accuracy["losses"] - accuracy["gains"] == round(table.loc[2, "accuracy_drop"] * 24)
    costs = {row["name"]: row for row in found["costs"]}
    assert set(costs) == {"prefill_latency_s", "decode_latency_s", "parameters", "weight_bytes"}
    assert costs["parameters"]["ratio"] == table.loc[2, "parameters"] / table.loc[0, "parameters"]
    # The ratio of the dense model to itself is exactly 1.
    assert costs["decode_latency_s"]["low"] == pytest.approx(table.loc[2, "decode_latency_s_ratio_low"])
    assert costs["decode_latency_s"]["high"] == pytest.approx(table.loc[2, "decode_latency_s_ratio_high"])
    shown = dse("compare", finished_study, "--trials", "0", "2").out
    assert "changes are trial 2 relative to trial 0, on the same documents" in shown
    assert f"{accuracy['losses']} lost, {accuracy['gains']} gained" in shown
    assert "exact McNemar" in shown
    assert "paired bootstrap" in shown


@pytest.mark.parametrize(
    ("trials", "words"),
    [(("0", "0"), "must differ to compare, but both are trial 0"), (("0", "99"), "must be one of this study's")],
)
def test_invalid_trials_cannot_be_compared(dse: Run, finished_study: Path, trials: tuple[str, str], words: str) -> None:
    assert words in dse("compare", finished_study, "--trials", *trials).error


def test_missing_outcomes_cannot_be_compared(dse: Run, finished_study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished_study, copy)
    (copy / "outcomes" / "trial-00002.npz").unlink()
    assert "stored outcomes must exist, but " in dse("compare", copy, "--trials", "0", "2").error
    assert dse("front", copy).code == 0


def test_recommend_reports_the_nearest_miss_if_no_trial_fits(dse: Run, finished_study: Path) -> None:
    arguments = ("recommend", finished_study, "--max-accuracy-drop", "0.01", "--min-reduction", "0.9")
    shown = dse(*arguments)
    assert shown.code == 3
    assert shown.out.startswith("No trial fits within ")
    assert "the nearest miss, trial " in shown.out
    assert shown.err == ""
    found = dse(*arguments, "--json")
    assert found.code == 3
    assert found.json["trial"] is None
    assert found.json["nearest_miss_trial"] is not None
    assert found.json["nearest_miss_reason"]


def test_export_of_several_trials(dse: Run, finished_study: Path, tmp_path: Path) -> None:
    table = pd.read_csv(finished_study / "trials.csv")
    decomposed = table[(table["state"] == "complete") & (table["decomposed_tensors"] > 0)]
    trials = [int(trial) for trial in decomposed["trial"][:2]]
    options = [text for trial in trials for text in ("--trial", str(trial))]
    result = dse("export", finished_study, *options, "--out", tmp_path / "exports", "--json")
    assert result.code == 0, result.err
    for trial, found in zip(trials, result.json, strict=True):
        folder = tmp_path / "exports" / f"trial-{trial}"
        assert found["folder"] == str(folder)
        assert found["max_logit_difference"] <= 1e-4
        assert found["weight_file_bytes"] < found["dense_weight_bytes"]
        assert found["parameters"] == table.loc[table["trial"] == trial, "parameters"].item()
        assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
        assert re.search(rf"\b[Tt]rial\D{{1,5}}{trial}\b", (folder / "README.md").read_text())
    assert (
        "must go to a new or empty folder"
        in dse("export", finished_study, *options, "--out", tmp_path / "exports").error
    )


def test_export_of_one_trial_as_dense_weights(dse: Run, finished_study: Path, tmp_path: Path) -> None:
    table = pd.read_csv(finished_study / "trials.csv")
    trial = int(table.loc[(table["state"] == "complete") & (table["decomposed_tensors"] > 0), "trial"].iloc[-1])
    result = dse("export", finished_study, "--trial", str(trial), "--out", tmp_path / "dense", "--dense")
    assert result.code == 0, result.err
    assert "save nothing" in result.out
    assert (tmp_path / "dense" / "config.json").is_file()


def test_a_closed_pipe_is_no_error(finished_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `dse front DIR --json | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["front", str(finished_study), "--json"]) == 0


def test_output_encoding_without_unicode(finished_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["front", str(finished_study)]) == 0
    assert b"? is a 95 % interval" in written.getvalue()


def test_run_prints_exactly_one_json_document(tiny_folder: Path, cache_folder: Path, tmp_path: Path) -> None:
    """Run in a subprocess, because output of libraries would break the JSON."""
    config = tiny_study(tiny_folder, objectives=["accuracy", "decode_latency_s"], budget={"trials": 3})
    config["space"]["methods"] = ["whitened_svd"]
    config["calibration"] = {"sources": [{"builtin": "general"}], "tokens": 256, "window": 32}
    study = write_study(tmp_path / "study.yaml", config)
    command = [sys.executable, "-m", "dse.cli", "run", str(study), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(cache_folder)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["directory"] == "runs/tiny"
    assert found["trials_evaluated"] == 3
    assert found["reference"].keys() == {"accuracy", "decode_latency_s"}
    assert (tmp_path / "runs" / "tiny" / "trials.csv").is_file()
    assert "calibration text: general (256 tokens)" in done.stderr


# --- evaluate and doctor ----------------------------------------------------------------------------------------------


def test_evaluate(dse: Run, tiny_folder: Path) -> None:
    arguments = ("evaluate", "--model", tiny_folder / "model", "--task", tiny_folder / "tiny_choice.yaml")
    dense = dse(*arguments, "--json").json
    assert dense["tasks"][0]["documents"] == 24
    assert dense["accuracy"] == dense["tasks"][0]["value"]
    assert dense["reduction"] == 0
    assert dense["accuracy_drop"] is None
    point = '{"method": "svd", "rank": 2, "layers": [1, 2]}'
    found = dse(*arguments, "--point", point, "--limit", "16", "--json").json
    assert found["tasks"][0]["documents"] == 16
    assert found["accuracy_drop"]["documents"] == 16
    assert found["accuracy_drop"]["test"] == "exact McNemar"
    assert 0 < found["accuracy_drop"]["p_value"] <= 1
    assert found["accuracy_drop"]["smallest_detectable"] > 0
    assert found["graded_drops"]["choice_probability"]["test"] == "paired bootstrap"
    assert found["accuracy_drop"]["estimate"] == pytest.approx(found["dense"]["accuracy"] - found["accuracy"])
    shown = dse(*arguments, "--point", point, "--limit", "16")
    assert "accuracy drop against dense: " in shown.out
    assert "paired over 16 documents" in shown.out


def test_evaluate_with_calibration(dse: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sees a red dog on the moon " * 40)
    arguments = ("evaluate", "--model", tiny_folder / "model", "--task", tiny_folder / "tiny_choice.yaml")
    point = '{"method": "whitened_svd", "rank": 2, "layers": [1]}'
    options = ("--point", point, "--calibration", tmp_path / "text.txt", "--calibration-tokens", "128")
    result = dse(*arguments, *options, "--json")
    assert result.code == 0, result.err
    assert f"calibration text: {tmp_path / 'text.txt'} (128 tokens)" in " ".join(result.err.split())
    assert "none.txt" in dse(*arguments, "--point", point, "--calibration", "none.txt").error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "no_such_task_at_all"], "no_such_task_at_all"),
        (["--task", "none.yaml"], "none.yaml"),
        (["--task", "dse_fact"], "did you mean 'dse_facts'?"),
        (["--task", "TASK", "--seed", "-1"], "must be an integer of at least 0, but got '-1'"),
        (["--task", "TASK", "--device", "abacus"], "abacus"),
        (["--task", "TASK", "--dtype", "int4"], "int4"),
        (["--task", "TASK", "--point", '{"method": "svd", "rank": 900}'], "`rank <= 16` must hold"),
    ],
)
def test_invalid_evaluations_are_rejected(dse: Run, tiny_folder: Path, options: list[str], words: str) -> None:
    task = str(tiny_folder / "tiny_choice.yaml")
    options = [task if option == "TASK" else option for option in options]
    assert words in dse("evaluate", "--model", tiny_folder / "model", *options).error


def test_doctor(dse: Run) -> None:
    found = dse("doctor", "--json").json
    assert {check["status"] for check in found} <= {"ok", "missing", "note"}
    assert any("torch" in check["name"].lower() or "torch" in check["detail"].lower() for check in found)
    assert all(check["remedy"] for check in found if check["status"] == "missing")
    shown = dse("doctor")
    assert shown.code == 0
    assert all(check["name"] in shown.out for check in found)


# --- rejected studies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "must be a readable YAML file, but: No such file or directory"),
        ("name: [1", "must be valid YAML"),
        ("- a", "must be a mapping"),
        ({"name": "x"}, "`model` is missing"),
        ({"modell": 1}, "did you mean 'model'?"),
        ({"objectives": ["acuracy"]}, "did you mean 'accuracy'?"),
        ({"tasks": ["none.yaml"]}, "none.yaml"),
        ({"model": "./none"}, "none"),
        ({"sampler": {"name": "grid"}}, "`sampler.name`"),
        ({"enqueue": [{"method": "svd", "rank": -3}]}, "got rank=-3"),
    ],
)
def test_invalid_studies_are_rejected(dse: Run, tiny_folder: Path, tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "study.yaml"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        write_study(path, content if content == {"name": "x"} else merged(tiny_study(tiny_folder), content))
    out = tmp_path / "run"
    assert words in dse("run", path, "--out", out).error
    assert not out.exists()


def test_invalid_folders_are_rejected(dse: Run, tiny_folder: Path, finished_study: Path, tmp_path: Path) -> None:
    for command in (["front"], ["recommend", "--max-accuracy-drop", "0.1"], ["export", "--trial", "0", "--out", "x"]):
        assert "has no study.yaml" in dse(command[0], tmp_path, *command[1:]).error
    study = write_study(tmp_path / "study.yaml", tiny_study(tiny_folder))
    assert (
        "holds another study (different: objectives, measurement)" in dse("run", study, "--out", finished_study).error
    )
    assert "must be a number >= 0" in dse("recommend", finished_study, "--max-accuracy-drop", "-0.1").error
    assert "must be a number >= 0" in dse("recommend", finished_study, "--max-accuracy-drop", "nan").error
    assert "must be in [0, 1)" in (
        dse("recommend", finished_study, "--max-accuracy-drop", "0.1", "--min-reduction", "7").error
    )
    assert "a trial must be one of this study's" in dse("export", finished_study, "--trial", "99", "--out", "x").error
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_study, damaged)
    (damaged / "study.db").write_bytes(b"no database" * 500)
    assert "must be a study storage of dse" in dse("front", damaged).error
    (damaged / "study.db").unlink()
    assert "must hold study.db" in dse("front", damaged).error
    (damaged / "study.yaml").write_text(yaml.safe_dump({"name": "x"}))
    assert "`model` is missing" in dse("front", damaged).error


def test_old_names_are_one_notice_line_each(dse: Run, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(tiny_folder, budget={"trials": 2}, fidelity={"shares": [0.5], "least_gain": 0.01})
    result = dse("run", write_study(tmp_path / "study.yaml", config), "--out", tmp_path / "run")
    assert result.code == 0, result.err
    notices = [line for line in result.err.splitlines() if "notice" in line]
    assert len(notices) == 1
    assert notices[0].startswith("dse: notice: `fidelity.least_gain` is now `fidelity.min_gain`; ")
    stored = tmp_path / "run" / "study.yaml"
    stored.write_text(stored.read_text().replace("min_gain:", "least_gain:"))
    config["fidelity"] = {"shares": [0.5], "min_gain": 0.01}
    again = dse("run", write_study(tmp_path / "study.yaml", config), "--out", tmp_path / "run", "--trials", "3")
    assert again.code == 0, again.err  # the same study: only the names of the keys differ
    assert "3 of 3 trials evaluated" in again.out


def test_a_study_without_a_finished_trial(dse: Run, tiny_folder: Path, tmp_path: Path) -> None:
    from dse.config import parse_study
    from dse.study.storage import StudyStorage

    (tmp_path / "study.yaml").write_text(parse_study(tiny_study(tiny_folder)).to_yaml())
    storage = StudyStorage.open(tmp_path / "study.db", "tiny", {"accuracy": "maximize", "parameters": "minimize"})
    assert "never started; run `dse run` again" in dse("front", tmp_path).error
    storage.set_attribute("objectives", ["accuracy", "parameters"])
    storage.close()
    assert "a front needs a finished trial" in dse("front", tmp_path).error
    assert "run `dse run` again" in dse("recommend", tmp_path, "--max-accuracy-drop", "0.1").error
