"""Out of memory while a study is set up, and the warnings that a user sees."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_study, write_study

import dse
from dse.cli import main
from dse.errors import OutOfMemoryError
from dse.out_of_memory import bytes_asked, is_out_of_memory, out_of_memory_by_phase


@contextmanager
def small_device(monkeypatch: pytest.MonkeyPatch, most_tokens: int) -> Iterator[None]:
    """A device whose matrix products have room for this many tokens."""
    product = torch.nn.functional.linear

    def limited(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if x[..., 0].numel() > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 is full.")
        return product(x, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", limited)
        yield


@pytest.mark.parametrize(
    ("method", "objective", "most_tokens", "phase", "key"),
    [
        ("whitened_svd", "parameters", 1100, "the Gram matrices of the factor bank", "calibration.window"),
        ("svd", "kl_divergence", 900, "the hidden states of the KL divergence", "evaluation.divergence_tokens"),
        ("svd", "parameters", 400, "the sensitivity profile", "search.profile_tokens"),
    ],
)
def test_a_set_up_without_memory_gives_one_line_and_continues_later(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    objective: str,
    most_tokens: int,
    phase: str,
    key: str,
) -> None:
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    changes = {"objectives": ["accuracy", objective], "sampler": {"name": "tpe"}, "budget": {"trials": 12}}
    study = tiny_study(tiny_folder, **changes)
    study["space"]["methods"] = [method]
    path = write_study(tmp_path / "study.yaml", study)
    with small_device(monkeypatch, most_tokens):
        code = main(["run", str(path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    (line,) = (text for text in error.splitlines() if "error: " in text)
    assert phase in line
    assert f"`{key}`" in line
    assert "an allocation of 1610612736 bytes failed" in line
    if method == "whitened_svd":  # once is enough
        assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0


def test_the_phase_in_progress_is_named() -> None:
    seen = []

    def set_up() -> None:
        with out_of_memory_by_phase(lambda *report: seen.append(report)) as progress:
            progress("calibrate", 1, 2)
            progress("gradients", 0, 2)
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    with pytest.raises(OutOfMemoryError, match="gradients of the Fisher methods, but an allocation of unknown size"):
        set_up()
    assert seen == [("calibrate", 1, 2), ("gradients", 0, 2)]
    with pytest.raises(ValueError, match="another"), out_of_memory_by_phase(lambda *_: None):
        raise ValueError("another")


def test_real_allocators_are_recognised() -> None:
    with pytest.raises(RuntimeError) as by_torch:
        torch.empty(2**60, dtype=torch.uint8)
    numpy = MemoryError("Unable to allocate 4.00 GiB for an array with shape (4, 268435456) and data type float32")
    assert is_out_of_memory(by_torch.value)
    assert bytes_asked(str(by_torch.value)) == 2**60
    assert is_out_of_memory(numpy)
    assert bytes_asked(str(numpy)) == 2**32


def test_own_warnings_are_shown_and_noise_of_libraries_is_not(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(Path(dse.__file__).parent / "study" / "run.py")
    library = "/usr/lib/python3/site-packages/transformers/utils.py"
    with warnings.catch_warnings():
        assert main(["cost", "--model", str(tiny_folder / "model"), "--point", "dense", "--json"]) == 0
        capsys.readouterr()
        for _ in range(2):
            warnings.warn_explicit("values\noverflow", RuntimeWarning, place, 1, "dse.study.run", {})
        warnings.warn_explicit("a key is ignored", UserWarning, library, 1, "transformers.utils", {})
        warnings.warn_explicit("will change", FutureWarning, library, 1, "transformers.utils", {})
        warnings.warn_explicit("old", DeprecationWarning, library, 1, "transformers.utils", {})
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["dse: warning: values overflow", "dse: warning: a key is ignored (transformers)"]
