"""Read data sets of the hub, or of its cache where the hub cannot be reached, without waiting for minutes."""

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
def hub_dataset(task: str, what: str) -> Iterator[None]:
    """Load from the hub's cache alone when the hub cannot be reached, instead of retrying for minutes.

    Args:
        task: For the message.
        what: Is needed from the hub, for the message.

    Raises:
        TaskError: The hub cannot be reached and its cache does not hold what is needed.
    """
    is_reachable = _is_hub_reachable()
    constants, config = huggingface_hub.constants, datasets.config
    kept = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not is_reachable:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    except (OSError, ValueError) as error:
        if is_reachable:
            raise
        raise TaskError(
            f"task '{task}' needs {what} from the Hugging Face hub, which cannot be reached and has no copy in the "
            f"local cache; connect once, or use a local YAML task or a builtin one ({', '.join(builtin_tasks())})"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = kept


@functools.lru_cache(maxsize=1)
def _is_hub_reachable() -> bool:
    if huggingface_hub.is_offline_mode():
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except Exception:  # noqa: BLE001 - whatever the HTTP library raises, the hub is out of reach
        return False
    return True
