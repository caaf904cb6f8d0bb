"""Copies the shipped studies and search spaces into the package when a wheel is built; see pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED_FOLDERS = ("studies", "search_spaces")


class BuildWithShippedFiles(build_py):
    """`build_py`, and `dse/studies` and `dse/search_spaces` for `dse.shipped_files`.

    An editable installation needs no copies: it finds the folders of the checkout.
    """

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED_FOLDERS:
            target = Path(self.build_lib, "dse", folder)
            shutil.rmtree(target, ignore_errors=True)  # files of an earlier build
            shutil.copytree(Path(__file__).parent / folder, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
