"""Files of studies: whose checkpoints are kept, what nobody owns, and how much room there is."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import Direction, lineage_root, live_trials, ranked
from ris_hpo.search.lifecycle import direction_of, get_study, stored_spec
from ris_hpo.search.spec import KeepSpec
from ris_hpo.store import folders
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import ARTIFACTS, folder_size
from ris_hpo.store.transfer import artifacts_of
from ris_hpo.text import file_size


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


@dataclass(frozen=True)
class Removable:
    """Files that nobody needs: a folder, or a file; their size; and why they go."""

    path: Path
    bytes: int
    why: str


def checkpoints_to_remove(
    folder: Path, trials: Sequence[FrozenTrial], keep: KeepSpec, direction: Direction = "minimize"
) -> list[Removable]:
    """Return the checkpoints in a study's folder of trials that have ended and whose checkpoints do not stay.

    Args:
        folder: of the study.
        trials: all of the study.
        keep: the rule.
        direction: ``StudySpec.direction``.
    """
    kept = kept_numbers(trials, keep, direction)
    ended = [trial.number for trial in trials if trial.state.is_finished() and trial.number not in kept]
    found = []
    for number in ended:
        for path in sorted((folder / str(number)).rglob("*")):
            if path.is_file() and is_checkpoint(path):
                found.append(Removable(path, path.stat().st_size, f"a checkpoint of trial {number}, which has ended"))
    return found


def removable(store: Store, names: Collection[str], keep: KeepSpec | None = None) -> list[Removable]:
    """Return all files on this machine that a store's studies do not need.

    Checkpoints by each study's rule; folders of studies that are gone; what was half removed or half written by
    processes that are gone; artifacts that neither an attribute of this store nor a study's folder names. Where studies
    of other stores have folders too, artifacts stay, since those stores may name them.

    Args:
        store: the store.
        names: studies whose checkpoints are looked at.
        keep: the rule for them; None for each study's own.
    """
    found = []
    for name in names:
        study, folder = get_study(store, name), folders.find_folder(store, name)
        if folder is not None:
            rule = keep or stored_spec(study).keep
            trials = study.get_trials(deepcopy=False)
            found += checkpoints_to_remove(folder, trials, rule, direction_of(study))
    found += [
        Removable(folder, folder_size(folder), "the folder of a study that is not there any more")
        for folder in folders.leftovers(store)
    ]
    found += [
        Removable(path, folder_size(path), "half written or half removed by a process that is gone")
        for path in folders.abandoned()
    ]
    if not folders.has_others(store):
        held = artifacts_of(store)
        for path in folders.unlisted_artifacts():
            if path.name not in held:
                found.append(Removable(path, path.stat().st_size, "an artifact that belongs to no trial and no study"))
    return found


def remove(found: Sequence[Removable]) -> int:
    """Remove files; return the bytes that were freed. What is gone already, or cannot be removed, stays uncounted."""
    freed = 0
    for each in found:
        try:
            folders.remove(each.path) if each.path.is_dir() else each.path.unlink()
        except OSError:
            continue
        freed += each.bytes
    return freed


def shortage(folder: Path, keep: KeepSpec) -> str | None:
    """Return why no trial should go on in a study's folder now, as one line; None where there is room.

    Args:
        folder: of the study; where it is not there, nothing is short: it may be on the nodes of a cluster alone.
        keep: its limits.
    """
    if not folder.is_dir():
        return None
    if keep.free_gb is not None and (free := shutil.disk_usage(folder).free) < keep.free_gb * 1e9:
        return f"the disk of {folder} has {file_size(free)} free, keep.free_gb asks for {keep.free_gb:g} GB"
    if keep.quota_gb is not None and (size := folder_size(folder)) > keep.quota_gb * 1e9:
        return f"{folder} has {file_size(size)}, keep.quota_gb allows {keep.quota_gb:g} GB"
    return None
