"""Optuna samplers by the names that study files use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import optuna

__all__ = ["SAMPLERS", "make_sampler"]


def _tpe(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(5, min(10, trials // 3)))


def _nsga2(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=_population(trials))


def _nsga3(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIIISampler(seed=seed, population_size=_population(trials))


def _gp(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=max(5, min(10, trials // 3)))


def _qmc(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False, warn_asynchronous_seeding=False
    )


def _random(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: Mapping[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "tpe": _tpe,
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "gp": _gp,
    "qmc": _qmc,
    "random": _random,
}
"""Name to `(seed, trials of the budget)` to sampler."""


def make_sampler(name: str, seed: int, trials: int, asked: int) -> optuna.samplers.BaseSampler:
    """A sampler for the next proposal, seeded by the study's seed and the number of proposals so far.

    Seeding each proposal anew makes a resumed study propose what an uninterrupted one would have: a sampler's own
    random state does not survive the process. A quasi-random sequence keeps its place in the storage and one scramble.

    Args:
        name: A key of `SAMPLERS`.
        seed: Of the study.
        trials: Budget of the study, for population sizes and start-up.
        asked: Proposals that a sampler has made so far, those from the queue not counted.
    """
    own_seed = seed if name == "qmc" else (seed * 1_000_003 + asked) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](own_seed, trials)


def _population(trials: int) -> int:
    """About four generations, and not so few points that crossover has nothing to cross."""
    return max(8, min(50, trials // 4))
