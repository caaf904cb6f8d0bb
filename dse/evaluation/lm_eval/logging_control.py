"""Run lm-eval without its logs, bars and warnings, and without letting a task's templates run code."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import lm_eval.utils
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from dse.models.quiet import quiet_transformers

__all__ = ["quiet_lm_eval", "swallowed_output"]

_LOUD_LOGGERS = ("lm_eval", "datasets", "evaluate", "fsspec", "httpx", "filelock")


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox that compiles a template once; lm-eval asks for it anew for every document."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._compiled: dict[str, Template] = {}

    def from_string(self, source: str, *_: Any, **__: Any) -> Template:  # type: ignore[override]
        if source not in self._compiled:
            self._compiled[source] = super().from_string(source)
        return self._compiled[source]


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval and what it calls for the length of a block, and render task templates in a sandbox.

    lm-eval renders templates in an ordinary Jinja environment, in which `{{ ''.__class__ }}` reaches every class of
    the process; a task file is data, so its templates get Jinja's sandbox.
    """
    levels = {name: logging.getLogger(name).level for name in _LOUD_LOGGERS}
    environment = lm_eval.utils.env
    sandbox = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(environment.filters)
    try:
        for name in _LOUD_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        lm_eval.utils.env = sandbox
        with quiet_transformers():
            yield
    finally:
        lm_eval.utils.env = environment
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def swallowed_output() -> Iterator[None]:
    """Swallow what is printed under this block; only for work that reports no progress of its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
