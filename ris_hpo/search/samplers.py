"""Samplers with a seed of their own for each trial.

The seed comes from the study's seed and the trial's number (of a retry: the number of the trial that it continues). So
the draws of one worker repeat bit for bit, also after a restart, and no two workers draw the same random point.
"""

from __future__ import annotations

import math
import random
import warnings
from typing import Any, Final

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
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.spec import StudySpec, derived_seed


def build_sampler(spec: StudySpec, root: int) -> BaseSampler:
    """Return the sampler of one trial.

    Args:
        spec: the study.
        root: number of the trial, or of the first of those that it continues.
    """
    seed = derived_seed(spec.seed, root, "sampler")
    sampler = spec.sampler
    startup = math.ceil(sampler.startup / (1 - sampler.prior))  # as many even draws as without draws near the base
    near = sampler.prior * min(1.0, startup / max(1, root))  # a model needs it less and less
    if random.Random(derived_seed(spec.seed, root, "prior")).random() < near:
        return _NearSampler(spec, root)
    conditional = any(dimension.when for dimension in spec.space.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match sampler.name:
            case "tpe":
                return TPESampler(
                    seed=seed,
                    n_startup_trials=startup,
                    multivariate=True,
                    group=conditional,
                    constant_liar=True,
                )
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
            case "cmaes":
                return CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
            case "random" | "grid" | "brute_force":  # the last two: where a point is fixed beforehand, all is
                return RandomSampler(seed=seed)
            case "qmc":
                return _NumberedQMCSampler(spec, root)
            case "nsga2":
                return NSGAIISampler(seed=seed, population_size=sampler.population)


class _NearSampler(BaseSampler):
    """Draws near the base configuration or near one of the best trials.

    It takes a share of the trials alone: ``sampler.prior`` of those before the model (which are so many more that there
    are as many even draws), and from then on a share that falls as one over their number. So a misleading base costs
    these trials. The more trials have a score, the rarer the base is the centre: ``startup`` trials make it half of
    these draws. After PriorBand (Mallik et al., 2023), which mixes even draws, draws by a prior and around incumbents.
    """

    def __init__(self, spec: StudySpec, root: int) -> None:
        self._spec = spec
        self._generator = random.Random(derived_seed(spec.seed, root, "near"))
        self._centre: dict[str, Any] | None = None
        self._width = _NEAR_BASE

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        if self._centre is None:
            self._centre = self._chosen_centre(study)
        return self._spec.space[name].near(self._centre.get(name), self._generator, self._width)

    def _chosen_centre(self, study: Study) -> dict[str, Any]:
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        known = [trial for trial in study.get_trials(deepcopy=False, states=states) if _place(trial) is not None]
        if len(study.directions) > 1 or self._generator.random() * (len(known) + self._spec.sampler.startup) >= len(
            known
        ):
            return dict(self._spec.base_params())
        self._width = _NEAR_BEST
        sign = 1 if self._spec.direction == "minimize" else -1

        def order(trial: FrozenTrial) -> tuple[float, float, int]:
            step, score = _place(trial) or (0.0, 0.0)
            return -step, sign * score, trial.number

        best = sorted(known, key=order)[: max(1, len(known) // _BEST)]
        return dict(self._generator.choice(best).params)


_NEAR_BASE, _NEAR_BEST = 0.25, 0.1  # standard deviations over the range
_BEST: Final = 10  # draws are near one of the best tenth


def _place(trial: FrozenTrial) -> tuple[float, float] | None:
    """How far a trial came, and its score there; None without a score that is finite."""
    if trial.state == TrialState.COMPLETE:
        return math.inf, trial.values[0]
    step = trial.last_step
    score = math.nan if step is None else trial.intermediate_values[step]
    return None if step is None or not math.isfinite(score) else (step, score)


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
