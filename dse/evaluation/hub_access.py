"""Load datasets from the Hugging Face hub, or from its local cache at once if the hub is unreachable."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import datasets.config
import huggingface_hub

from dse.errors import TaskError
from dse.evaluation.task_spec import builtin_tasks

__all__ = ["hub_dataset"]

_HUB_TIMEOUT_S = 5.0


@contextmanager
def hub_dataset(task: str, needed: str) -> Iterator[None]:
    """Load from the local cache only if the hub is unreachable, instead of retrying for minutes.

    The error message names the `task` and what is `needed` from the hub.

    Raises:
        TaskError: The hub is unreachable and its cache has no copy.
    """
    is_reachable = _is_hub_reachable()
    constants, config = huggingface_hub.constants, datasets.config
    previous = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not is_reachable:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    except (OSError, ValueError) as error:
        if is_reachable:
            raise
        raise TaskError(
            f"task '{task}' needs {needed} from the Hugging Face hub, which cannot be reached and has no copy in the "
            f"local cache; connect once, or use a local YAML task or a built-in one ({', '.join(builtin_tasks())})"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = previous


@functools.lru_cache(maxsize=1)
def _is_hub_reachable() -> bool:
    if huggingface_hub.is_offline_mode():
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except Exception:  # noqa: BLE001 - whatever the HTTP library raises, the hub is unreachable
        return False
    return True
