"""Pruners in which a trial and the retries that continue it count once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner, WilcoxonPruner
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import lineage_root
from ris_hpo.search.spec import StudySpec, derived_seed
from ris_hpo.search.view import View


def build_pruner(spec: StudySpec, storage: BaseStorage, *, first_step: int, last_step: int | None) -> BasePruner:
    """Return the pruner of one trial.

    Args:
        spec: the study.
        storage: where its trials are.
        first_step: step of the first report, such as scenes seen: the first rung unless the study names one.
        last_step: step of the last report, which sets the number of hyperband's brackets; unknown, there is one.
    """
    first = spec.pruner.first_scenes or first_step
    return StudyPruner(spec, storage, first, first if last_step is None else last_step)


class StudyPruner(BasePruner):
    """One of Optuna's pruners, with a warm-up and a patience, that does not compare with failed trials.

    A failed trial has left its rungs in the store, and the retry that continues it reports the same values again: both
    together would count twice. For the same reason hyperband's bracket depends on the number of the first trial, which
    the retries share; within its bracket it is successive halving.
    """

    def __init__(self, spec: StudySpec, storage: BaseStorage, first_step: int, last_step: int) -> None:
        self._spec = spec.pruner
        self._storage_of_all = storage
        self._seed = spec.seed
        self._sign = 1 if spec.direction == "minimize" else -1
        self._first_step = first_step
        reduction = self._spec.reduction
        self._brackets = 1
        if self._spec.name == "hyperband" and last_step > first_step:
            self._brackets = 1 + math.floor(math.log(last_step / first_step, reduction) + 1e-9)

    def bracket(self, root: int) -> int:
        """Return the bracket in hyperband of a trial and its retries; brackets that prune harder get more of them.

        Args:
            root: number of the first trial.
        """
        top = self._brackets - 1
        shares = [math.ceil(self._brackets * self._spec.reduction ** (top - s) / (top - s + 1)) for s in range(top + 1)]
        place = derived_seed(self._seed, root, "bracket") % sum(shares)
        for index, share in enumerate(shares):
            place -= share
            if place < 0:
                return index
        return top

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Say whether the trial should be given up after its last report."""
        step = trial.last_step
        if self._spec.name in ("none", "promotion") or step is None or step < self._spec.warmup_scenes:
            return False
        bracket = self.bracket(lineage_root(trial))

        def compared_with(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
            proper = (other for other in trials if other.state != TrialState.FAIL)
            return [other for other in proper if self.bracket(lineage_root(other)) == bracket]

        others: Any = View(self._storage_of_all, compared_with)
        compared = optuna.load_study(study_name=study.study_name, storage=others, sampler=RandomSampler(0))
        pruned = self._inner(bracket).prune(compared, trial)
        # asked before patience is looked at, since asking is what registers the trial on its rung
        return bool(pruned) and not self._still_improving(trial)

    def _inner(self, bracket: int) -> BasePruner:
        spec = self._spec
        match spec.name:
            case "median":
                return MedianPruner(n_startup_trials=spec.startup, n_warmup_steps=spec.warmup_scenes)
            case "wilcoxon":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    return WilcoxonPruner(p_threshold=spec.p_threshold, n_startup_steps=2)
            case _:
                return SuccessiveHalvingPruner(
                    min_resource=self._first_step, reduction_factor=spec.reduction, min_early_stopping_rate=bracket
                )

    def _still_improving(self, trial: FrozenTrial) -> bool:
        if self._spec.patience == 0:
            return False
        curve = [self._sign * trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
        earlier, recent = curve[: -self._spec.patience], curve[-self._spec.patience :]
        return not earlier or min(recent) < min(earlier)
