"""Files of studies: whose checkpoints are kept, what nobody owns, and how much room there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import Direction, lineage_root, live_trials, ranked
from ris_hpo.search.spec import KeepSpec
from ris_hpo.store.folders import ARTIFACTS


def is_checkpoint(path: PurePath) -> bool:
    """Say whether a file of a trial is there for going on only: not its reports, telemetry and list of artifacts."""
    return path.suffix != ".jsonl" and path.name != ARTIFACTS


def kept_numbers(trials: Sequence[FrozenTrial], keep: KeepSpec, direction: Direction = "minimize") -> set[int]:
    """Return the trials whose checkpoints stay.

    Those of a line that has not ended stay in any case, since its next trial goes on from them.

    Args:
        trials: all trials of a study.
        keep: the rule.
        direction: ``StudySpec.direction``.
    """
    if keep.checkpoints == "all":
        return {trial.number for trial in trials}
    open_lines = {lineage_root(t) for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)}
    kept = {trial.number for trial in trials if lineage_root(trial) in open_lines}
    if keep.checkpoints == "best":
        kept |= {trial.number for trial in ranked(trials, direction)[: keep.best]}
    elif keep.checkpoints == "last_rung":
        ended = [trial for trial in live_trials(trials) if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        last = max((trial.last_step or 0 for trial in ended), default=0)
        kept |= {trial.number for trial in ended if (trial.last_step or 0) == last}
    return kept
