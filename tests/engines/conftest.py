"""Fixtures of the tests with real engines: the command line in this process, and a cache for it and its children."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_environments import Run


@pytest.fixture(scope="module", autouse=True)
def engine_cache(cache_folder: Path) -> Iterator[None]:
    """The cache of the tests, for this process and those it starts."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], own_process: None) -> Run:
    """Run one command in this process."""
    from dse.cli import main

    def call(*arguments: object, expect: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # of argparse
            code = int(error.code or 0)
        found = capsys.readouterr()
        assert code == expect, found.err + found.out
        return found.out, found.err

    return call
