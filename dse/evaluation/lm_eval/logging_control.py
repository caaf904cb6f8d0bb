"""Run lm-eval without logs, progress bars and warnings, and with task templates in a sandbox."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import lm_eval.utils
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from dse.models.transformers_patches import quiet_transformers

__all__ = ["quiet_lm_eval", "swallowed_output"]

_LOUD_LOGGERS = ("lm_eval", "datasets", "evaluate", "fsspec", "httpx", "filelock")


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox with a cache of compiled templates, since lm-eval compiles them again for every document."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._compiled: dict[str, Template] = {}

    def from_string(self, source: str, *_: Any, **__: Any) -> Template:  # type: ignore[override]
        if source not in self._compiled:
            self._compiled[source] = super().from_string(source)
        return self._compiled[source]


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval and its libraries within the block, and render task templates in a sandbox.

    lm-eval renders templates in an ordinary Jinja environment, in which `{{ ''.__class__ }}` reaches every class of
    the process. Task files are data, so their templates run in Jinja's sandbox.
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
    """Discard everything that the block prints; only for work that reports no progress of its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
