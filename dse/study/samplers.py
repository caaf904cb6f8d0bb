"""Optuna samplers by the names that study files use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import optuna

__all__ = ["SAMPLERS", "make_sampler"]


def _tpe(seed: int, trials: int, *, constant_liar: bool = False) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=max(5, min(10, trials // 3)), constant_liar=constant_liar
    )


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
"""Name to a function from (seed, trials of the budget) to the sampler."""


def make_sampler(
    name: str, seed: int, trials: int, asked: int, *, is_parallel: bool = False
) -> optuna.samplers.BaseSampler:
    """The sampler for the next proposal, seeded by the study's seed and the number of proposals so far.

    A sampler's random state does not survive its process. Seeding every proposal anew makes a resumed study propose the
    same points as an undisturbed one. A quasi-random sequence keeps its position in the storage, and one scramble.

    Args:
        name: A key of `SAMPLERS`.
        seed: The study's seed.
        trials: The study's budget, for population sizes and start-up trials.
        asked: Proposals that the sampler has made so far, without those from the queue.
        is_parallel: Whether several trials run at once. TPE then counts running trials as bad ones (constant liar).
    """
    own_seed = seed if name == "qmc" else (seed * 1_000_003 + asked) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return _tpe(own_seed, trials, constant_liar=is_parallel)
        return SAMPLERS[name](own_seed, trials)


def _population(trials: int) -> int:
    """About four generations, with enough points for crossover."""
    return max(8, min(50, trials // 4))
