"""Everything that this package asks of Ray: connect, count resources, place actors, call them, wait for them.

The only importer of ray, and only inside functions: a study without workers never imports it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dse.config import WorkersConfig
from dse.errors import ConfigError, DseError, StudyError

__all__ = ["RayCall", "RayCluster", "Share", "WorkerLostError", "call_actor", "connected", "find_actor"]

_CONNECT_S = 10.0
_CORE_STEPS = 10_000
"""Ray counts resources in ten-thousandths."""


class WorkerLostError(Exception):
    """The process of a worker ended, or cannot be reached; the message says why.

    Attributes:
        is_starting: Whether Ray is still restarting the worker, so that the call never ran.
    """

    def __init__(self, reason: str, *, is_starting: bool = False) -> None:
        super().__init__(reason)
        self.is_starting = is_starting


@dataclass(frozen=True)
class Share:
    """What one worker gets.

    Attributes:
        workers: Number of workers.
        cores: Cores of each, possibly less than one.
        gpus: GPUs of each.
    """

    workers: int
    cores: float
    gpus: int

    @property
    def threads(self) -> int:
        """Threads of each worker on a CPU."""
        return max(1, int(self.cores))


@dataclass(frozen=True)
class RayCall:
    """A call of an actor's method that is under way.

    Attributes:
        ref: The result to come.
        begun: A result that comes as soon as the actor takes calls.
    """

    ref: Any
    begun: Any = None

    def result(self) -> Any:
        """Wait for the result.

        Raises:
            DseError: The method raised it.
            WorkerLostError: The worker ended, or its node did.
        """
        import ray.exceptions as errors

        lost = (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
            errors.OutOfDiskError,
        )
        try:
            import ray

            return ray.get(self.ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, DseError):
                raise error.cause from None
            raise
        except errors.RuntimeEnvSetupError as error:
            raise StudyError(f"`workers.runtime_env` must be usable on every node, but: {_first_line(error)}") from None
        except lost as error:
            raise WorkerLostError(_reason(error), is_starting=not self._has_begun()) from None

    def _has_begun(self) -> bool:
        """Whether the actor took calls when this one was made."""
        import ray

        try:
            ray.get(self.begun, timeout=0)
        except ray.exceptions.ActorDiedError:
            return True  # it failed to start, and Ray does not try again
        except ray.exceptions.RayError:
            return False
        return True


class RayCluster:
    """A connection to Ray."""

    def __init__(self, config: WorkersConfig) -> None:
        self._config = config

    def share(self) -> Share:
        """Divide the cluster's GPUs, or without GPUs its cores, among the workers.

        Raises:
            ConfigError: There are fewer GPUs than the workers need.
        """
        nodes = self._nodes()
        gpus = sorted(int(node.get("GPU", 0)) for node in nodes)
        each = self._config.gpus_per_worker
        if not any(gpus):
            if each > 1:
                raise ConfigError(
                    f"`gpus_per_worker: {each}` needs GPUs, but no node of this cluster has one; leave it out"
                )
            count = self._config.count or len(nodes)
            return Share(count, _cores([node.get("CPU", 1) for node in nodes], count), 0)
        room = sum(number // each for number in gpus)
        count = self._config.count or room
        if count > room or not room:
            raise ConfigError(
                f"`workers <= {room}` must hold for {each} GPU{'s' * (each > 1)} each on nodes with"
                f" {', '.join(map(str, gpus))} GPUs, but got {max(count, 1)}; lower `--workers` or `--gpus-per-worker`"
            )
        return Share(count, 1.0, each)

    def start(self, kind: type, share: Share, *arguments: Any) -> Any:
        """Start a worker as an actor, which Ray restarts whenever its process ends."""
        import ray

        options: dict[str, Any] = {"num_cpus": share.cores, "max_restarts": -1, "max_task_retries": 0}
        if share.gpus:
            options["num_gpus"] = share.gpus
        if self._config.runtime_env:
            options["runtime_env"] = self._config.runtime_env
        return ray.remote(kind).options(**options).remote(*arguments)

    def start_here(self, kind: type, name: str, *arguments: Any) -> Any:
        """Start a light actor on the driver's node, which workers find by its name."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": name, "num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        return ray.remote(kind).options(**options).remote(*arguments)

    def wait(self, calls: Sequence[RayCall], timeout_s: float) -> list[RayCall]:
        """The calls that are done, at least one of them unless the time is over."""
        import ray

        by_ref = {call.ref: call for call in calls}
        done, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        return [by_ref[ref] for ref in done]

    def kill(self, actor: Any, *, restart: bool) -> None:
        """End the process of an actor; Ray starts it anew if asked."""
        import ray

        with contextlib.suppress(Exception):  # it is gone already
            ray.kill(actor, no_restart=not restart)

    def _nodes(self) -> list[Mapping[str, float]]:
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def call_actor(actor: Any, method: str, *arguments: Any) -> RayCall:
    """Call a method of an actor without waiting."""
    begun = actor.ping.remote()
    return RayCall(getattr(actor, method).remote(*arguments), begun)


def find_actor(name: str) -> Any:
    """A named actor of this job. A handle as an argument would not survive a restart of the worker."""
    import ray

    return ray.get_actor(name)


@contextlib.contextmanager
def connected(config: WorkersConfig) -> Iterator[RayCluster]:
    """Start Ray on this machine, or join a cluster; disconnected, and what was started is stopped, at the end.

    Raises:
        ConfigError: Ray is not installed, or no Ray listens at the address.
        StudyError: The cluster runs another version of Ray or Python.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("workers need Ray, which is not installed; pip install 'lowrank-dse[ray]'") from error
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let other processes disturb measurements
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if ray.is_initialized():  # by a program that uses dse as a library
        yield RayCluster(config)
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if config.ray_address is None:
            cores = _usable_cores()
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        else:
            _check_address(config.ray_address)
            ray.init(address=config.ray_address, **quiet)
    except DseError:
        raise
    except ConnectionError as error:
        raise ConfigError(
            f"a Ray cluster must listen at '{config.ray_address}', but none does ({_first_line(error)}); start one with"
            " `ray start --head`, or leave `--ray-address` out"
        ) from None
    except (RuntimeError, ValueError, OSError) as error:
        if "Version mismatch" in str(error):
            raise StudyError(
                "driver and cluster must run the same versions of Ray and Python, but:"
                f" {' '.join(str(error).split())}; install the same ones"
            ) from None
        raise StudyError(f"Ray must start, but: {_first_line(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)  # Ray replaces them
    try:
        with _quiet():
            yield RayCluster(config)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing the deaths of workers to stdout, which belongs to results; there is no option for it."""
    import ray._private.worker as internals

    before = getattr(internals, "print_to_stdstream", None)
    if before is None:
        yield
        return
    internals.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        internals.print_to_stdstream = before


def _check_address(address: str) -> None:
    """Fail fast where nothing listens: Ray itself tries for a minute."""
    if address in ("auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"`ray_address` must be auto or HOST:PORT, but got '{address}'")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"a Ray cluster must listen at '{address}', but none does ({error}); start one with `ray start --head`, or"
            " correct `--ray-address`"
        ) from None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores(nodes: Sequence[float], workers: int) -> float:
    """Cores per worker such that all workers find room: a whole number if possible, else a fraction."""
    for cores in range(int(max(nodes)), 0, -1):
        if sum(int(node) // cores for node in nodes) >= workers:
            return float(cores)
    return max(1, int(_CORE_STEPS * sum(nodes) / workers * 0.9)) / _CORE_STEPS if sum(nodes) else 0.0


def _reason(error: BaseException) -> str:
    """Why a worker is lost, in words."""
    import ray.exceptions as errors

    if isinstance(error, errors.OutOfMemoryError):
        return "the machine ran out of memory, and Ray ended the worker"
    if isinstance(error, errors.ActorDiedError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1][:300] if lines else type(error).__name__
    if isinstance(error, (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError)):
        return "its process ended or its machine is gone"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
