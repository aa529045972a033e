"""A storage that shows Optuna's samplers and pruners the trials of a study otherwise than they are stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState


class View:
    """A storage whose trials are shown through a function; everything else goes to the storage behind it.

    Args:
        storage: the storage behind it.
        shown: makes the trials to be shown from all of a study; it must not change them.
    """

    def __init__(self, storage: BaseStorage, shown: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]) -> None:
        self._storage_behind = storage
        self._shown = shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage_behind, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See ``BaseStorage.get_all_trials``."""
        trials = self._shown(self._storage_behind.get_all_trials(study_id, deepcopy=False))
        chosen = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(chosen) if deepcopy else chosen

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """See ``BaseStorage.get_best_trial``: the best of the trials that are shown."""
        return BaseStorage.get_best_trial(cast(BaseStorage, self), study_id)
