"""Curves of a study's trials for TensorBoard, written from the store while the study runs.

The process that follows the run writes them, so that they cost no trial anything and show the workers of every machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.atomic import make_folder
from ris_hpo.errors import OutputError
from ris_hpo.workers.supervisor import PoolSnapshot

EVERY_S: Final = 5.0


def logged(snapshots: Iterator[PoolSnapshot], study: optuna.Study, folder: Path) -> Iterator[PoolSnapshot]:
    """Pass a run's snapshots on, and keep the curves in a folder up to date.

    Args:
        snapshots: of the run.
        study: the study.
        folder: for one folder a trial, ``trial-NUMBER``; ``tensorboard --logdir FOLDER`` shows them.

    Yields:
        The snapshots.

    Raises:
        OutputError: TensorBoard is not installed, or the folder cannot be made.
    """
    curves, due = Curves(study, folder), 0.0
    try:
        for snapshot in snapshots:
            if time.monotonic() >= due:
                curves.write()
                due = time.monotonic() + EVERY_S
            yield snapshot
    finally:
        curves.write()
        curves.close()


class Curves:
    """The scores of each trial by step, and its parameters beside its final score, as TensorBoard reads them.

    Args:
        study: the study.
        folder: where they are written; files of this kind from an earlier run of the study are replaced.

    Raises:
        OutputError: TensorBoard is not installed, or the folder cannot be made.
    """

    def __init__(self, study: optuna.Study, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise OutputError("curves for TensorBoard need the package; install ris-hpo[tensorboard]") from None
        self._make: Any = SummaryWriter
        self._study = study
        self._folder = make_folder(folder)
        self._metric = (study.metric_names or ["k_loc"])[0]
        self._writers: dict[int, Any] = {}
        self._written: dict[int, int] = {}  # last step by trial
        self._ended: set[int] = set()

    def write(self) -> None:
        """Write what the store has and the folder has not."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number not in self._ended and trial.intermediate_values:
                self._write(trial)

    def _write(self, trial: FrozenTrial) -> None:
        number = trial.number
        if number not in self._writers:
            own = make_folder(self._folder / f"trial-{number}")
            for former in own.glob("events.out.tfevents.*"):
                former.unlink()
            self._writers[number] = self._make(str(own))
        writer = self._writers[number]
        for step, value in sorted(trial.intermediate_values.items()):
            if step > self._written.get(number, -1):
                writer.add_scalar(self._metric, value, step)
                self._written[number] = step
        if trial.state.is_finished():
            if trial.state == TrialState.COMPLETE:
                writer.add_hparams(trial.params, {f"final {self._metric}": trial.values[0]}, run_name=".")
            writer.close()
            self._ended.add(number)
        else:
            writer.flush()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
