"""Samplers seeded by trial, and pruners that judge every line of trials once.

A fresh sampler is made for each trial, seeded from the study's seed and the number of the first trial of its line. So
one worker repeats bit for bit, a restarted worker goes on where it was, and no two workers draw the same random point.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial

from ris_hpo.search.spec import StudySpec, derived_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def build_sampler(spec: StudySpec, root: int) -> BaseSampler:
    """Return the sampler of one trial.

    Args:
        spec: the study.
        root: number of the first trial of the line.
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
                return _TicketQMCSampler(spec, root)
            case "nsga2":
                return NSGAIISampler(seed=seed, population_size=sampler.population)


class _TicketQMCSampler(QMCSampler):
    """A scrambled Sobol sequence whose point is the ticket's number.

    Optuna counts the points in a study attribute that it reads and writes in two steps, so that two workers may draw
    the same one; the sequence itself must have one seed in the whole study.
    """

    def __init__(self, spec: StudySpec, root: int) -> None:
        super().__init__(
            scramble=True,
            seed=derived_seed(spec.seed, 0, "qmc"),
            independent_sampler=RandomSampler(seed=derived_seed(spec.seed, root, "sampler")),
            warn_independent_sampling=False,
        )
        self._point = root
        self._space: dict[str, BaseDistribution] = {
            path: dimension.distribution() for path, dimension in spec.space.items() if not dimension.when
        }

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._point


# -- pruning ---------------------------------------------------------------------------------------------------------
