"""One quick request to the Hugging Face hub before `from_pretrained` runs.

Without a network, `from_pretrained` retries every file for half a minute and its error says little. One request without
retries shows within seconds whether the hub answers, knows the model, grants access, and has safetensors.
"""

from __future__ import annotations

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dse.errors import ModelError

__all__ = ["ask_hub", "short"]

_TIMEOUT_S = 6.0


def ask_hub(model_id: str, revision: str | None) -> tuple[str, ...] | None:
    """Names of the files of `model_id` on the hub; None if the hub cannot be reached, but the model is in the cache.

    Raises:
        ModelError: The hub does not know the model or the revision, or denies access; or it cannot be reached and the
            model is not in the cache.
    """
    try:
        info = huggingface_hub.HfApi().model_info(model_id, revision=revision, timeout=_TIMEOUT_S)
    except HFValidationError as error:
        raise ModelError(f"a hub id must be like 'organisation/name', but got '{short(model_id)}'") from error
    except GatedRepoError as error:
        raise ModelError(
            f"'{model_id}' is gated: ask for access at {constants.ENDPOINT}/{model_id}, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"a revision must exist on the hub, but '{model_id}' has no '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub must know the model, but it has no '{model_id}' (and no such local folder exists); check the"
            f" spelling, or run `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub client has changed its HTTP library and error types before
        if _is_cached(model_id, revision):
            return None
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else short(str(error))
        raise ModelError(
            f"'{model_id}' is neither a local folder nor in the local hub cache, and {constants.ENDPOINT} cannot be"
            f" reached ({reason or type(error).__name__}); connect to the network, or name a local folder, a .gguf"
            f" file or 'demo:smollm2-135m-instruct'"
        ) from error
    return tuple(file.rfilename for file in info.siblings or ())


def short(text: str) -> str:
    """`text` on one line of at most 100 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


def _is_cached(model_id: str, revision: str | None) -> bool:
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(model_id, "config.json", revision=revision), str)
    except (OSError, ValueError):
        return False
