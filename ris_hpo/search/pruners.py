"""Pruners that judge every line of trials once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container
from typing import Any, cast

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner, WilcoxonPruner
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import lineage_root
from ris_hpo.search.spec import StudySpec, derived_seed


def build_pruner(spec: StudySpec, storage: BaseStorage, *, first_scenes: int, max_scenes: int) -> BasePruner:
    """Return the pruner of one trial.

    Args:
        spec: the study.
        storage: where its trials are.
        first_scenes: scenes at the first validation: the first rung unless the study names one.
        max_scenes: scenes of a full trial; it sets the number of hyperband's brackets.
    """
    return Judge(spec, storage, spec.pruner.first_scenes or first_scenes, max_scenes)


class Judge(BasePruner):
    """Warm-up and patience on top of one of Optuna's pruners, with failed trials out of the competition.

    A trial that was retried has left its rungs in the store, and its successor reports the same values again: without
    the filter each would count twice. Hyperband's bracket follows the line of trials and not the number, for the same
    reason; within its bracket it is successive halving.
    """

    def __init__(self, spec: StudySpec, storage: BaseStorage, first_scenes: int, max_scenes: int) -> None:
        self._spec = spec.pruner
        self._storage_of_all = storage
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
        others: Any = _Competition(
            self._storage_of_all,
            lambda other: other.state != TrialState.FAIL and self.bracket(lineage_root(other)) == bracket,
        )
        competition = optuna.load_study(study_name=study.study_name, storage=others, sampler=RandomSampler(0))
        verdict = self._inner(bracket).prune(competition, trial)
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
    """A storage of which a pruner sees some trials only: those that have not failed, of one bracket."""

    def __init__(self, storage: BaseStorage, keep: Callable[[FrozenTrial], bool]) -> None:
        self._all = storage
        self._keep = keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._all, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in self._all.get_all_trials(study_id, deepcopy, states) if self._keep(trial)]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        return BaseStorage.get_best_trial(cast(BaseStorage, self), study_id)  # its own look at all trials, kept ones
