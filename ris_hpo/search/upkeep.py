"""All studies of a store at a glance, and what is done to a study as a whole: another name, removal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from optuna.exceptions import DuplicatedStudyError
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.errors import StudyError
from ris_hpo.search.counting import Tally, best_trial, tally
from ris_hpo.search.lifecycle import check_name, direction_of, get_study
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import find_folder, folder_size
from ris_hpo.store.owner import Owner

State = Literal["running", "waiting", "ended", "empty"]


@dataclass(frozen=True)
class StudyEntry:
    """A study in the list of all.

    Attributes:
        study: its name.
        owner: who made it, ``user@host``; None in studies of earlier versions.
        state: ``running`` where a trial runs, ``waiting`` where trials wait and none runs, ``ended`` where all have
            ended, ``empty`` where there are none.
        trials: counts by state.
        metric: what the score is called.
        best: the best score.
        last_activity: when a trial began or ended last, in the clock of the machine that ran it.
        hosts: machines that ran its trials, the last one first.
        bytes: size of its folder on this machine; None where it has none here.
    """

    study: str
    owner: str | None
    state: State
    trials: Tally
    metric: str
    best: float | None
    last_activity: datetime | None
    hosts: list[str]
    bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        tree = asdict(self)
        tree["last_activity"] = None if self.last_activity is None else self.last_activity.isoformat(timespec="seconds")
        return tree


def list_entries(store: Store) -> list[StudyEntry]:
    """Return every study of the store, the one with the latest activity first; those without any come last."""
    entries = [_entry(store, summary.study_name) for summary in store.get_all_studies()]
    entries.sort(key=lambda entry: entry.study)
    return sorted(entries, key=lambda entry: entry.last_activity or datetime.min, reverse=True)


def _entry(store: Store, name: str) -> StudyEntry:
    study = get_study(store, name)
    trials = store.outline(store.get_study_id_from_name(name))
    counts = tally(trials)
    times = [time for trial in trials for time in (trial.datetime_start, trial.datetime_complete) if time is not None]
    state: State = "ended" if counts.at_rest else "empty"
    if counts.open:
        state = "running" if counts.running else "waiting"
    best = best_trial(trials, direction_of(study))
    folder = find_folder(store, name)
    return StudyEntry(
        study=name,
        owner=study.user_attrs.get(names.STARTED_BY),
        state=state,
        trials=counts,
        metric=(study.metric_names or ["k_loc"])[0],
        best=None if best is None else best.values[0],
        last_activity=max(times, default=None),
        hosts=list(dict.fromkeys(host for trial in reversed(trials) if (host := _host(trial)) is not None)),
        bytes=None if folder is None else folder_size(folder),
    )


def _host(trial: FrozenTrial) -> str | None:
    owner = Owner.parse(trial.user_attrs.get(names.OWNER))
    host: str | None = trial.user_attrs.get(names.HOST)
    return host if host is not None or owner is None else owner.process.host


def require_at_rest(store: Store, name: str, *, force: bool = False) -> None:
    """Refuse a study that somebody works on.

    Args:
        store: the store.
        name: the study.
        force: take trials for lost whose process cannot be looked up from here.

    Raises:
        StudyError: no such study, or a trial of it runs.
    """
    for trial in get_study(store, name).get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = Owner.parse(trial.user_attrs.get(names.OWNER))
        if owner is not None and owner.process.is_gone:
            continue
        if owner is None or not owner.process.is_here:
            if force:
                continue
            advice = "stop it there, or add --force if that process is gone"
        else:
            advice = "stop it first"
        where = "an unknown process" if owner is None else f"process {owner.process.pid} on {owner.process.host}"
        raise StudyError(f"trial {trial.number} of study '{name}' is running: {where}; {advice}")


def delete_study(store: Store, name: str, *, force: bool = False) -> None:
    """Remove a study with its trials and its folder on this machine.

    Raises:
        StudyError: as ``require_at_rest``.
    """
    require_at_rest(store, name, force=force)
    store.delete_study(store.get_study_id_from_name(name))


def rename_study(store: Store, name: str, new: str, *, force: bool = False) -> None:
    """Give a study another name; its trials, folder and exports stay as they are.

    Raises:
        StudyError: as ``require_at_rest``; not a name for a study, or that of another one.
    """
    check_name(new)
    require_at_rest(store, name, force=force)
    try:
        store.rename(store.get_study_id_from_name(name), new)
    except DuplicatedStudyError:
        raise StudyError(f"there is a study '{new}' already; choose another name") from None
