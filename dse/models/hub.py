"""One quick question to the Hugging Face hub before `from_pretrained` is let loose on it.

Without a network `from_pretrained` retries every file for half a minute and then says little. One request without
retries tells within seconds whether the hub answers, knows the model, lets us in, and holds safetensors.
"""

from __future__ import annotations

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dse.errors import ModelError

__all__ = ["hub_source"]

_TIMEOUT_S = 8.0


def hub_source(model_id: str, revision: str | None) -> tuple[str, bool]:
    """Ask the hub for `model_id`.

    Returns:
        The id, and whether only the local cache may be used since the hub cannot be reached.

    Raises:
        ModelError: The hub does not know the model or the revision, or does not let us in; or it cannot be reached
            and the cache does not hold the model.
    """
    try:
        huggingface_hub.HfApi().model_info(model_id, revision=revision, timeout=_TIMEOUT_S)
    except HFValidationError as error:
        raise ModelError(f"a hub id must be like 'organisation/name', but got '{model_id}'") from error
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
    except _unreachable() as error:
        if not _is_cached(model_id, revision):
            reason = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else _reason(error)
            raise ModelError(
                f"'{model_id}' is neither a local folder nor in the local hub cache, and {constants.ENDPOINT} cannot be"
                f" reached ({reason}); connect to the network, or name a local folder, a .gguf file or"
                f" 'demo:smollm2-135m-instruct'"
            ) from error
        return model_id, True
    return model_id, False


def _unreachable() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it gets no answer; its HTTP library has changed its name before."""
    http_errors = HfHubHTTPError.__mro__[1]
    errors = [OfflineModeIsEnabled, HfHubHTTPError, OSError]
    if isinstance(http_errors, type) and issubclass(http_errors, Exception):
        errors.append(http_errors)
    return tuple(errors)


def _is_cached(model_id: str, revision: str | None) -> bool:
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(model_id, "config.json", revision=revision), str)
    except (OSError, ValueError):
        return False


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."
