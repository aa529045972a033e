"""Run a recorded trial again and compare its curve step by step."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ris_hpo.config import SCHEMA, schema_of
from ris_hpo.errors import StudyError, TrainingDivergedError
from ris_hpo.programs.program import Program, RequeuedError, TrialContext, load_program
from ris_hpo.search.counting import is_paused, lineage_root
from ris_hpo.search.lifecycle import get_study, stored_spec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store


@dataclass(frozen=True)
class ReplayStep:
    """One report: the score as recorded and as it came out again."""

    step: int
    recorded: float
    replayed: float


@dataclass(frozen=True)
class ReplayReport:
    """A recorded curve and its repetition.

    ``identical`` means bit for bit, which holds on the same kind of CPU under the same number of threads; on a GPU, or
    elsewhere, ``max_difference`` says how far apart the two came. ``stopped`` is true when a stop cut the replay short,
    ``older`` where an earlier version of the settings recorded the curve: what computes differently since then shows.
    """

    study: str
    number: int
    identical: bool
    max_difference: float
    steps: list[ReplayStep]
    fingerprint_agrees: bool
    stopped: bool
    older: bool
    metric: str = "k_loc"
    """What the score is called."""
    step_unit: str = "scenes"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def replay(
    store: Store,
    study_name: str,
    number: int,
    *,
    device: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ReplayReport:
    """Train trial ``number`` again from its first scene, as far as its record goes, and compare.

    Nothing of the study is touched: the repetition works in a directory of its own.

    Args:
        store: the store.
        study_name: the study.
        number: the trial; complete, pruned, paused, or failed after at least one report.
        device: device to run on; the recorded one by default.
        stop: asked between training steps.

    Raises:
        StudyError: no such trial, or none that has a curve.
    """
    study = get_study(store, study_name)
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        raise StudyError(f"study '{study_name}' has no trial {number}: it has {len(trials)}")
    trial = trials[number]
    recorded = trial.intermediate_values
    if not recorded or not (trial.state.is_finished() or is_paused(trial)):
        raise StudyError(f"trial {number} of study '{study_name}' has no finished curve to compare with")
    spec = stored_spec(study)
    root, given = lineage_root(trial), trial.user_attrs.get(names.SEED)
    seed = spec.trial_seed(root) if given is None else int(given)
    config = spec.config(trial.params, root, seed=seed)
    recorded_as = str(trial.user_attrs.get(names.CONFIG_FINGERPRINT, ""))
    with tempfile.TemporaryDirectory(prefix="ris-hpo-replay-") as scratch:
        found = repeated(
            load_program(spec.program_name()),
            Repetition(
                config.model_dump(mode="json"),
                Path(scratch) / str(number),
                recorded,
                seed=seed,
                device=device or trial.user_attrs.get(names.DEVICE, "cpu"),
                finite=spec.finite,
                stop=stop,
            ),
            study=study_name,
            number=number,
            threads=trial.user_attrs.get(names.THREADS),
            fingerprint_agrees=spec.ran(recorded_as, trial.params, root, seed=seed),
            older=schema_of(recorded_as) < SCHEMA,
        )
    return replace(found, metric=spec.score, step_unit=spec.step_unit)


class Repetition(TrialContext):
    """A run of a training program that follows a recorded curve, and is pruned where that ends.

    Args:
        config: see ``TrialContext``.
        directory: see ``TrialContext``.
        recorded: score by step, not empty.
        seed: see ``TrialContext``.
        device: see ``TrialContext``.
        finite: turns a score that is not finite into the one that is reported for it.
        stop: asked between training steps.
        progress: called with (step, score) after each report.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        directory: Path,
        recorded: Mapping[int, float],
        *,
        seed: int,
        device: str,
        finite: Callable[[float], float],
        stop: Callable[[], bool],
        progress: Callable[[int, float], None] = lambda step, score: None,
    ) -> None:
        super().__init__(config, directory, seed=seed, device=device)
        self.recorded_curve = dict(recorded)
        self.is_stopped = stop
        self._as_counted = finite
        self._progress = progress

    def report(self, step: int, score: float, **metrics: float) -> bool:
        """See ``TrialContext.report``."""
        super().report(step, score, **metrics)
        step, value = next(reversed(self.scores.items()))
        self._progress(step, value)
        return step >= max(self.recorded_curve)

    def finite(self, score: float) -> float:
        """See ``TrialContext.finite``."""
        return self._as_counted(score)

    def should_stop(self) -> bool:
        """See ``TrialContext.should_stop``."""
        return self.is_stopped()


def repeated(
    program: Program,
    context: Repetition,
    *,
    study: str,
    number: int,
    threads: int | None,
    fingerprint_agrees: bool,
    older: bool,
) -> ReplayReport:
    """Train from the first step, as far as a recorded curve goes, and compare.

    Args:
        program: what was run.
        context: the curve, in an empty folder.
        study: the study of the record, for the report.
        number: the trial of the record, for the report.
        threads: torch threads of the record, in force meanwhile; None leaves those there are.
        fingerprint_agrees: for the report.
        older: for the report.
    """
    torch: Any = sys.modules.get("torch")  # not imported for a program that does without
    before = torch.get_num_threads() if torch is not None else 1
    try:
        if torch is not None:
            torch.set_num_threads(threads or before)
        with suppress(RequeuedError, TrainingDivergedError):
            program.train(context)
    finally:
        if torch is not None:
            torch.set_num_threads(before)
    recorded = context.recorded_curve
    steps = [ReplayStep(step, recorded[step], score) for step, score in context.scores.items() if step in recorded]
    differences = [abs(step.recorded - step.replayed) for step in steps]
    complete = len(steps) == len(recorded)
    return ReplayReport(
        study=study,
        number=number,
        identical=complete and all(difference == 0 for difference in differences),
        max_difference=max(differences, default=math.inf),
        steps=steps,
        fingerprint_agrees=fingerprint_agrees,
        stopped=not complete and context.is_stopped(),
        older=older,
    )
