"""Samplers with a seed of their own for each trial.

The seed comes from the study's seed and the trial's number (of a retry: the number of the trial that it continues). So
the draws of one worker repeat bit for bit, also after a restart, and no two workers draw the same random point.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial

from ris_hpo.search.spec import StudySpec, derived_seed


def build_sampler(spec: StudySpec, root: int) -> BaseSampler:
    """Return the sampler of one trial.

    Args:
        spec: the study.
        root: number of the trial, or of the first of those that it continues.
    """
    seed = derived_seed(spec.seed, root, "sampler")
    sampler = spec.sampler
    conditional = any(dimension.when for dimension in spec.space.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match sampler.name:
            case "tpe":
                return TPESampler(
                    seed=seed,
                    n_startup_trials=sampler.startup,
                    multivariate=True,
                    group=conditional,
                    constant_liar=True,
                )
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=sampler.startup, warn_independent_sampling=False)
            case "cmaes":
                return CmaEsSampler(seed=seed, n_startup_trials=sampler.startup, warn_independent_sampling=False)
            case "random":
                return RandomSampler(seed=seed)
            case "qmc":
                return _NumberedQMCSampler(spec, root)
            case "nsga2":
                return NSGAIISampler(seed=seed, population_size=sampler.population)


class _NumberedQMCSampler(BaseSampler):
    """A scrambled Sobol sequence that takes the point with the trial's number.

    Optuna's own counts the points in a study attribute that it reads and writes in two steps, so that two workers may
    draw the same one. The draws are the same: point n of ``optuna.samplers.QMCSampler`` with the study's seed.
    """

    def __init__(self, spec: StudySpec, root: int) -> None:
        self._seed = derived_seed(spec.seed, 0, "qmc")  # one sequence for the whole study
        self._point = root
        self._independent = RandomSampler(seed=derived_seed(spec.seed, root, "sampler"))
        self._space: dict[str, BaseDistribution] = {
            path: dimension.distribution() for path, dimension in spec.space.items() if not dimension.when
        }

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        from scipy.stats.qmc import Sobol  # imported late: it takes as long as all else that a worker imports

        sequence = Sobol(len(search_space), scramble=True, seed=self._seed)
        if self._point > 0:  # nothing to skip is an error to scipy
            sequence.fast_forward(self._point)
        (point,) = sequence.random(1)
        shares = dict(zip(search_space, point.tolist(), strict=True))
        return {path: _value_at(distribution, shares[path]) for path, distribution in search_space.items()}

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._independent.sample_independent(study, trial, name, distribution)


def _value_at(distribution: BaseDistribution, share: float) -> Any:
    """Return the value below which ``share`` in [0, 1) of a distribution lies."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = distribution.step or 0.0
    low, high = distribution.low - step / 2, distribution.high + step / 2  # each step is as wide as the next
    if distribution.log:
        value = math.exp(math.log(low) + share * math.log(high / low))
    else:
        value = low + share * (high - low)
    if step:
        value = distribution.low + step * math.floor((value - distribution.low) / step + 0.5)
    value = min(max(value, distribution.low), distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else value
