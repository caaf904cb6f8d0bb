"""The `workers` section: a study on several GPUs or machines, by Ray."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dse.config._section import Section

__all__ = ["WorkersConfig"]


class WorkersConfig(Section):
    """How many workers evaluate trials, where, and when one counts as stuck."""

    count: int | None = Field(None, ge=1, description="number of workers; by default one per GPU, or one without GPUs")
    gpus_per_worker: int = Field(1, ge=1, description="GPUs of each worker, where there are GPUs")
    ray_address: str | None = Field(
        None, description="a running Ray cluster: auto or HOST:PORT; by default Ray starts on this machine"
    )
    runtime_env: dict[str, Any] = Field({}, description="passed on to Ray, such as {env_vars: {HF_HUB_OFFLINE: '1'}}")
    cache: str | None = Field(
        None, description="cache folder that the machines share, for factor bank and profile; default: the user's cache"
    )
    mixed: Literal["refuse", "accuracy_only"] = Field(
        "refuse",
        description="workers whose device differs from the first worker's, if latency or energy is measured: refuse"
        " them, or let them evaluate accuracy only",
    )
    trial_timeout_s: float | None = Field(
        None, gt=0, description="a worker whose trial takes longer is restarted; default: no limit"
    )
    grace_s: float = Field(30.0, ge=0, description="time for trials in flight to finish after Ctrl-C")
