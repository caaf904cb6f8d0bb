"""Keep transformers quiet for the length of a block, and put everything back afterwards."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import modeling_gguf_pytorch_utils as gguf_module
from transformers.utils import logging as transformers_logging

__all__ = ["quiet_transformers"]


class _NoBar:
    """Stands in for a progress bar: iterates over what it was given and ignores everything else."""

    def __init__(self, iterable: Iterable[Any] = (), *_: Any, **__: Any) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _no_bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _NoBar(*args, **kwargs)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the log messages, warnings and loading bars of transformers; download bars of the hub stay.

    A download of gigabytes must show that it moves; converting weights that are already here need not.
    """
    level = transformers_logging.get_verbosity()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    hook = transformers_logging.set_tqdm_hook(_no_bar)
    # The GGUF reader takes its bar from tqdm itself, past the hook.
    gguf_bar = vars(gguf_module)["tqdm"]
    try:
        transformers_logging.set_verbosity(logging.CRITICAL)
        hub_logger.setLevel(logging.CRITICAL)
        vars(gguf_module)["tqdm"] = _NoBar
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        vars(gguf_module)["tqdm"] = gguf_bar
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(level)
        hub_logger.setLevel(hub_level)
