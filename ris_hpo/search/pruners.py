"""Pruners that judge every line of trials once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container
from typing import TYPE_CHECKING, cast

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner, WilcoxonPruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import lineage_root
from ris_hpo.search.spec import StudySpec, derived_seed

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def build_pruner(spec: StudySpec, *, first_scenes: int, max_scenes: int) -> BasePruner:
    """Return the pruner of one trial.

    Args:
        spec: the study.
        first_scenes: scenes at the first validation: the first rung unless the study names one.
        max_scenes: scenes of a full trial; it sets the number of hyperband's brackets.
    """
    return Judge(spec, spec.pruner.first_scenes or first_scenes, max_scenes)


class Judge(BasePruner):
    """Warm-up and patience on top of one of Optuna's pruners, with failed trials out of the competition.

    A trial that was retried has left its rungs in the store, and its successor reports the same values again: without
    the filter each would count twice. Hyperband's bracket follows the line of trials and not the number, for the same
    reason; within its bracket it is successive halving.
    """

    def __init__(self, spec: StudySpec, first_scenes: int, max_scenes: int) -> None:
        self._spec = spec.pruner
        self._seed = spec.seed
        self._first_scenes = first_scenes
        reduction = self._spec.reduction
        self._brackets = 1
        if self._spec.name == "hyperband" and max_scenes > first_scenes:
            self._brackets = 1 + math.floor(math.log(max_scenes / first_scenes, reduction) + 1e-9)

    def bracket(self, root: int) -> int:
        """Return hyperband's bracket of a line of trials; more lines go to the brackets that prune harder."""
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
        if self._spec.name == "none" or step is None or step < self._spec.warmup_scenes:
            return False
        bracket = self.bracket(lineage_root(trial))
        verdict = self._inner(bracket).prune(cast(Study, _Competition(study, self, bracket)), trial)
        # asked even while patience holds, since asking is what registers the trial on its rung
        return bool(verdict) and not self._still_improving(trial)

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
                    min_resource=self._first_scenes, reduction_factor=spec.reduction, min_early_stopping_rate=bracket
                )

    def _still_improving(self, trial: FrozenTrial) -> bool:
        if self._spec.patience == 0:
            return False
        curve = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
        earlier, recent = curve[: -self._spec.patience], curve[-self._spec.patience :]
        return not earlier or min(recent) < min(earlier)


class _Competition:
    """What a pruner sees of a study: the trials that have not failed, of one bracket."""

    def __init__(self, study: Study, judge: Judge, bracket: int) -> None:
        self._study = study
        self._judge = judge
        self._bracket = bracket
        self._storage: BaseStorage = study._storage
        self.direction = StudyDirection.MINIMIZE

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=deepcopy, states=states)
        return [
            trial
            for trial in trials
            if trial.state != TrialState.FAIL and self._judge.bracket(lineage_root(trial)) == self._bracket
        ]

    @property
    def best_trial(self) -> FrozenTrial:
        complete = self.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete:
            raise ValueError("no trial is complete")  # what wilcoxon expects of a study without one
        return min(complete, key=lambda trial: trial.value if trial.value is not None else math.inf)
