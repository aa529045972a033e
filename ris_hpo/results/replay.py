"""Run a recorded trial again and compare its curve step by step."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from ris_hpo.errors import StudyError
from ris_hpo.programs.program import Program, load_program
from ris_hpo.scoring.k_loc import finite_score
from ris_hpo.search.counting import lineage_root
from ris_hpo.search.lifecycle import get_study, stored_spec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store


@dataclass(frozen=True)
class ReplayStep:
    """One validation: ``k_loc`` as recorded and as it came out again."""

    step: int
    recorded: float
    replayed: float


@dataclass(frozen=True)
class ReplayReport:
    """A recorded curve and its repetition.

    ``identical`` means bit for bit, which holds on the same kind of CPU under the same number of threads; on a GPU, or
    elsewhere, ``max_difference`` says how far apart the two came. ``stopped`` is true when a stop cut the replay short.
    """

    study: str
    number: int
    identical: bool
    max_difference: float
    steps: list[ReplayStep]
    fingerprint_agrees: bool
    stopped: bool

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def replay(
    store: Store,
    study_name: str,
    number: int,
    *,
    device: str | None = None,
    program: Program | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ReplayReport:
    """Train trial ``number`` again from its first scene, as far as its record goes, and compare.

    Nothing of the study is touched: the repetition works in a directory of its own.

    Args:
        store: the store.
        study_name: the study.
        number: the trial; complete, pruned, or failed after at least one report.
        device: device to run on; the recorded one by default.
        program: the training program; the study kind's by default.
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
    if not recorded or trial.state in (TrialState.RUNNING, TrialState.WAITING):
        raise StudyError(f"trial {number} of study '{study_name}' has no finished curve to compare with")
    spec = stored_spec(study)
    program = program or load_program(spec.program or spec.kind)
    root, seed = lineage_root(trial), trial.user_attrs.get(names.SEED)
    config = spec.config(trial.params, root, program.config, seed=seed)
    recorded_as = str(trial.user_attrs.get(names.CONFIG_FINGERPRINT, ""))
    where = device or trial.user_attrs.get(names.DEVICE, "cpu")
    with tempfile.TemporaryDirectory(prefix="ris-hpo-replay-") as scratch:
        return repeated(
            lambda: program.trainer(config, Path(scratch) / str(number), device=where, resume=False),
            recorded,
            study=study_name,
            number=number,
            threads=trial.user_attrs.get(names.THREADS),
            fingerprint_agrees=spec.ran(recorded_as, trial.params, root, program.config, seed=seed),
            stop=stop,
        )


def repeated(
    trainer: Callable[[], Any],
    recorded: Mapping[int, float],
    *,
    study: str,
    number: int,
    threads: int | None,
    fingerprint_agrees: bool,
    stop: Callable[[], bool],
    progress: Callable[[int, float], None] = lambda scenes, k_loc: None,
) -> ReplayReport:
    """Train from the first scene, as far as a recorded curve goes, and compare.

    Args:
        trainer: makes the trainer, at its first scene.
        recorded: ``k_loc`` by scenes seen, not empty.
        study: the study of the record, for the report.
        number: the trial of the record, for the report.
        threads: torch threads of the record, in force meanwhile; None leaves those there are.
        fingerprint_agrees: for the report.
        stop: asked between training steps.
        progress: called with (scenes seen, ``k_loc``) after each validation.
    """
    torch: Any = sys.modules.get("torch")  # not imported for a program that does without
    before = torch.get_num_threads() if torch is not None else 1
    steps: list[ReplayStep] = []
    try:
        if torch is not None:
            torch.set_num_threads(threads or before)
        for validation in trainer().run(stop):
            scenes, value = validation.scenes_seen, finite_score(validation.network.k_loc)
            progress(scenes, value)
            if scenes in recorded:
                steps.append(ReplayStep(scenes, recorded[scenes], value))
            if scenes >= max(recorded):
                break
    finally:
        if torch is not None:
            torch.set_num_threads(before)
    differences = [abs(step.recorded - step.replayed) for step in steps]
    complete = len(steps) == len(recorded)
    return ReplayReport(
        study=study,
        number=number,
        identical=complete and all(difference == 0 for difference in differences),
        max_difference=max(differences, default=math.inf),
        steps=steps,
        fingerprint_agrees=fingerprint_agrees,
        stopped=not complete and stop(),
    )
