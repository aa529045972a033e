"""A trial as its training program sees it: reports go to the store, the pruner and the supervisor."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from ris_hpo.config import Spec
from ris_hpo.programs.program import Program, TrialContext
from ris_hpo.search.points import Points
from ris_hpo.search.pruners import build_pruner
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.trials.drawing import Drawing, Figures
from ris_hpo.trials.journal import Journal
from ris_hpo.trials.record import TrialRecord


@dataclass(frozen=True)
class Started:
    """A trial begins, or goes on from where it was put back; ``seconds_before`` were spent on it until then."""

    number: int
    seconds_before: float


@dataclass(frozen=True)
class Report:
    """One validation of the running trial."""

    number: int
    step: int
    score: float
    floor: float | None
    steps_per_second: float
    memory_bytes: int


@dataclass(frozen=True)
class Scoring:
    """Training is over and its end is being scored; no more validations will come, however long that takes."""

    number: int


@dataclass(frozen=True)
class TrialEnvironment:
    """What a worker gives to each of its trials.

    Attributes:
        store: the store.
        study_id: the study.
        spec: the study's specification.
        program: what the trials run.
        directory: returns the folder of a trial's checkpoints by the trial's number.
        device: torch device.
        stop: asked between training steps; when true, the trial is checkpointed and put back.
        notify: called with a ``Started``, ``Report`` or ``Scoring`` when it happens.
        figures: makes what draws a trial, given the trial and its folder; None draws nothing.
        keep: keeps a copy of a file with a trial, where the dashboard shows it; None keeps none.
    """

    store: Store
    study_id: int
    spec: StudySpec
    program: Program
    directory: Callable[[int], Path]
    device: str = "cpu"
    stop: Callable[[], bool] = lambda: False
    notify: Callable[[Started | Report | Scoring], None] = lambda event: None
    figures: Callable[[optuna.Trial, Path], Figures] | None = None
    keep: Callable[[optuna.Trial, Path], None] | None = None

    @cached_property
    def points(self) -> Points:
        """The points of the study's space."""
        return Points(self.spec)


class StudyTrial(TrialContext):
    """A trial of a study as its program sees it; see ``TrialContext``."""

    def __init__(
        self,
        environment: TrialEnvironment,
        claimed: FrozenTrial,
        trial: optuna.Trial,
        record: TrialRecord,
        config: Spec,
        directory: Path,
        seed: int,
    ) -> None:
        super().__init__(config.model_dump(mode="json"), directory, seed=seed, device=environment.device)
        self.pruned = False
        self.rungs: list[float] = claimed.user_attrs.get(names.RUNGS) or []
        self.is_at_rung = False
        self._first_step = 1
        self.last_score: float | None = None
        self._environment, self._spec, self._trial, self._record = environment, environment.spec, trial, record
        self._stored = set(claimed.intermediate_values)
        self._journal = Journal(self.directory)
        self._resumed_at = max([*self._stored, *self._journal.steps], default=0)
        self._planned_last: int | None = None
        self._last_step: int | None = None
        self._planned = False
        make = environment.figures
        self._drawing = Drawing(trial.number, None if make is None else lambda: make(trial, directory))
        self._drawing.begin(config)

    def plan(self, first_step: int, last_step: int | None) -> None:
        """See ``TrialContext.plan``."""
        self._planned = True
        self._first_step, self._planned_last, self._last_step = first_step, last_step, last_step
        self._trial.study.pruner = build_pruner(
            self._spec, self._environment.store, first_step=first_step, last_step=last_step
        )

    def replan(self, last_step: int) -> None:
        """See ``TrialContext.replan``."""
        self._last_step = last_step

    def report(self, step: int, score: float, **metrics: float) -> bool:
        """See ``TrialContext.report``."""
        super().report(step, score, **metrics)
        step, value = next(reversed(self.scores.items()))
        if not self._planned:
            self.plan(1, None)
        for earlier, recorded in self._journal.before(step):
            if earlier not in self._stored:  # reported by a worker that was lost, and trained past
                self._enter(earlier, recorded)
        self._journal.append(step, value)
        self.last_score = value
        verdict = self._enter(step, value)
        self._environment.notify(
            Report(
                number=self._trial.number,
                step=step,
                score=value,
                floor=self.metrics.get("floor"),
                steps_per_second=max(step - self._resumed_at, 0) / max(self._record.seconds_here(), 1e-9),
                memory_bytes=_memory(self.device),
            )
        )
        if self._reaches_rung(step):
            self.is_at_rung = True
            self.rungs = [*self.rungs, value]
            return True
        # at the last step there is nothing left to save
        self.pruned = verdict and step >= self._resumed_at and step != self._last_step
        return self.pruned

    def _reaches_rung(self, step: int) -> bool:
        """Say whether the trial is to be paused: at the first report at or above the next rung of its line.

        It does not matter whether the step was reported before: its worker may have been lost between the report and
        the pause.
        """
        pruner, reached = self._spec.pruner, len(self.rungs)
        if pruner.name != "promotion" or step == self._last_step or self.is_at_rung:
            return False
        steps = pruner.rung_steps(self._first_step, self._planned_last, reached + 1)
        return len(steps) > reached and step >= steps[reached]

    def finite(self, score: float) -> float:
        """See ``StudySpec.finite``."""
        return self._spec.finite(score)

    def _enter(self, step: int, value: float) -> bool:
        """Report to the store what it does not have; return the pruner's verdict.

        The pruner is asked at each step, also at one that was trained past before, because that is what enters the
        trial in the comparison. The verdict on such a step is ignored, since the death of one worker must not change
        what is tried.
        """
        single = len(self._spec.directions) == 1
        known = step in self._stored
        if not known:
            self._stored.add(step)
            if single:
                self._trial.report(value, step)
            else:  # Optuna's report refuses two objectives, its store does not
                store, study_id = self._environment.store, self._environment.study_id
                trial_id = store.get_trial_id_from_study_id_trial_number(study_id, self._trial.number)
                store.set_trial_intermediate_value(trial_id, step, value)
        if not single or (known and step < self._resumed_at):
            return False
        return self._trial.should_prune()

    def should_stop(self) -> bool:
        """See ``TrialContext.should_stop``."""
        return self._environment.stop()

    def concluding(self) -> None:
        """See ``TrialContext.concluding``."""
        self._environment.notify(Scoring(self._trial.number))

    def record(self, **values: Any) -> None:
        """See ``TrialContext.record``."""
        if taken := sorted(set(values) & names.OF_THE_SERVICE):
            raise ValueError(f"'{taken[0]}' is written by the service; choose another name")
        super().record(**values)

    def artifact(self, path: Path) -> None:
        """See ``TrialContext.artifact``."""
        super().artifact(path)
        if self._environment.keep is not None:
            self._environment.keep(self._trial, Path(path))

    def show(self, **objects: Any) -> None:
        """See ``TrialContext.show``."""
        self._drawing.show(objects)

    def attributes(self) -> dict[str, Any]:
        """Return what is written with the trial's end."""
        seconds = self._record.seconds()
        step = max(self.scores, default=0)
        return {
            names.METRICS: self.metrics,
            **({names.FLOOR: self.metrics["floor"]} if "floor" in self.metrics else {}),
            names.SCENES: step,
            names.SECONDS: seconds,
            names.SCENES_PER_SECOND: step / max(seconds, 1e-9),
            names.PEAK_MEMORY: _memory(self.device),
            **self.recorded,
        }


def _memory(device: str) -> int:
    """Return peak bytes: of the device on a GPU, of this process on a CPU."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)
