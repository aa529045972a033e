"""Exact counting: how many trials a study has, which is the best, when it stops, and who continues a lost trial.

A line of trials is one ticket: the trial that was asked for, and the successors of its infrastructure faults. A study
of N trials is a study of N lines, and it has ended when each of them is complete, pruned, or failed for good.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import psutil
from optuna.trial import FrozenTrial, TrialState, create_trial

from ris_hpo.hpo import attributes as names
from ris_hpo.hpo.attributes import Cause
from ris_hpo.hpo.samplers import lineage_root
from ris_hpo.hpo.space import RetrySpec, StopSpec
from ris_hpo.hpo.store import LONGEST_PAUSE_S, Store, ticket


@dataclass(frozen=True)
class Tally:
    """Trials of a study by state; failures that a successor continues are ``retried`` and not ``fail``."""

    complete: int = 0
    pruned: int = 0
    fail: int = 0
    running: int = 0
    waiting: int = 0
    retried: int = 0

    @property
    def ended(self) -> int:
        """Trials that have ended for good: what ``--n-trials`` counts."""
        return self.complete + self.pruned + self.fail

    @property
    def open(self) -> int:
        """Trials that are running or waiting."""
        return self.running + self.waiting

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


def live_trials(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return one trial per line: neither those a successor continues nor tickets that were withdrawn."""
    trials = list(trials)
    continued = {trial.user_attrs[names.PREDECESSOR] for trial in trials if names.PREDECESSOR in trial.user_attrs}
    return [
        trial
        for trial in trials
        if trial.number not in continued
        and not (trial.state == TrialState.FAIL and trial.user_attrs.get(names.CAUSE) == Cause.WITHDRAWN)
    ]


def tally(trials: Sequence[FrozenTrial]) -> Tally:
    """Count the trials of a study."""
    live = live_trials(trials)
    counts = dict.fromkeys(TrialState, 0)
    for trial in live:
        counts[trial.state] += 1
    withdrawn = sum(
        trial.state == TrialState.FAIL and trial.user_attrs.get(names.CAUSE) == Cause.WITHDRAWN for trial in trials
    )
    return Tally(
        complete=counts[TrialState.COMPLETE],
        pruned=counts[TrialState.PRUNED],
        fail=counts[TrialState.FAIL],
        running=counts[TrialState.RUNNING],
        waiting=counts[TrialState.WAITING],
        retried=len(trials) - len(live) - withdrawn,
    )


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the completed trials that did not diverge, best first; the earlier of two equals leads.

    This order is the one meaning of best everywhere: status, stop rules, report, ``best`` and ``export``.
    """
    complete = [
        trial for trial in trials if trial.state == TrialState.COMPLETE and names.DIVERGED not in trial.user_attrs
    ]
    return sorted(complete, key=lambda trial: (trial.values[0], trial.number))


def best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Return the best trial, or None where nothing is complete yet."""
    order = ranked(trials)
    return order[0] if order else None


def efficiency(value: float, floor: float) -> float:
    """Return how much of the way from the worst score to the floor a value covers; 1 at the floor."""
    return (names.WORST_SCORE - value) / (names.WORST_SCORE - floor)


# -- tickets ---------------------------------------------------------------------------------------------------------


def fill(store: Store, study_id: int, n_trials: int, first: Callable[[], list[FrozenTrial]]) -> int:
    """Give a study exactly ``n_trials`` lines: append the missing tickets, withdraw waiting ones that are too many.

    Args:
        store: the store.
        study_id: the study.
        n_trials: lines of trials the study shall have; more that already ran stay.
        first: tickets with parameters that open an empty study (base configuration, warm start).

    Returns:
        Tickets added; running the same command again adds none.
    """

    def missing(present: list[FrozenTrial]) -> list[FrozenTrial]:
        short = n_trials - len(live_trials(present))
        opening = first() if not present else []
        return [*opening, *(ticket() for _ in range(short - len(opening)))][: max(short, 0)]

    added = store.fill(study_id, missing)
    live = live_trials(store.get_all_trials(study_id, deepcopy=False))
    surplus = len(live) - n_trials
    if surplus > 0:
        waiting = [trial for trial in live if trial.state == TrialState.WAITING]
        # last the ones that hold work: put back half-way, or continuing a lost trial
        waiting.sort(key=lambda trial: (bool(trial.params), -trial.number))
        store.withdraw([trial._trial_id for trial in waiting[:surplus]])
    return added


def successor_of(trial: FrozenTrial, cause: Cause, retries: RetrySpec) -> FrozenTrial | None:
    """Return the ticket that continues a failed trial, or None where its line ends.

    It has the same parameters, the lineage, and nothing else: inherited system attributes (rungs, constraints) would
    count twice, and inherited reports could not be made again.
    """
    if cause not in names.RETRIED_CAUSES:
        return None
    struck = {**trial.user_attrs.get(names.RETRIES, {})}
    inherited, reached = trial.user_attrs.get(names.INHERITED_STEP, 0), trial.last_step or 0
    if reached > inherited and cause in (Cause.LOST_WORKER, Cause.PREEMPTED):
        struck[cause.value] = 0  # it got on before it was lost: however often that happens, it ends some day
    struck[cause.value] = struck.get(cause.value, 0) + 1
    allowed: dict[str, int] = retries.model_dump()
    if struck[cause.value] > allowed[cause.value]:
        return None
    marks = {
        names.LINEAGE: lineage_root(trial),
        names.PREDECESSOR: trial.number,
        names.ATTEMPT: trial.user_attrs.get(names.ATTEMPT, 0) + 1,
        names.RETRIES: struck,
        names.INHERITED_STEP: max(inherited, reached),
    }
    if names.ORIGIN in trial.user_attrs:
        marks[names.ORIGIN] = trial.user_attrs[names.ORIGIN]
    if names.CONFIG_FINGERPRINT in trial.user_attrs:
        # handed on with the parameters: the successor may be lost before it gets to write its own
        marks[names.CONFIG_FINGERPRINT] = trial.user_attrs[names.CONFIG_FINGERPRINT]
        return create_trial(
            state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, user_attrs=marks
        )
    # lost while its parameters were being drawn: drawn again from the line's own seed, they come out the same
    return ticket(trial.system_attrs.get("fixed_params"), marks)


def fail_trial(
    store: Store,
    trial: FrozenTrial,
    cause: Cause,
    error: str,
    retries: RetrySpec,
    *,
    owner: str | None = None,
    marks: Mapping[str, Any] | None = None,
) -> bool:
    """Fail a running trial and queue its successor in one transaction; False when it was not running any more.

    Args:
        store: the store.
        trial: the trial as it stands.
        cause: why.
        error: one line for people.
        retries: how often each cause is forgiven.
        owner: who must still hold the trial; None for anyone.
        marks: further attributes.
    """
    last = trial.last_step
    marks = {names.CAUSE: cause.value, names.ERROR: error, names.LAST_STEP: last, **(marks or {})}
    return store.retire(trial._trial_id, owner, marks, lambda latest: successor_of(latest, cause, retries))


# -- owners ----------------------------------------------------------------------------------------------------------


def owner_name(sequence: int) -> str:
    """Return a name no other claim has: host, process, when that process began, and a running number."""
    born = psutil.Process().create_time()
    return f"{socket.gethostname()}:{os.getpid()}:{born:.2f}:{sequence}"


def is_dead_here(owner: str) -> bool:
    """Say whether ``owner`` is a process of this host that does not exist any more."""
    host, pid, born, _ = owner.rsplit(":", 3)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        return bool(process.status() == psutil.STATUS_ZOMBIE) or abs(process.create_time() - float(born)) > 1.0
    except psutil.NoSuchProcess:
        return True


class LostTrials:
    """Finds running trials whose worker is gone, and queues their successors.

    A dead process of this host is known at once. For other hosts the heartbeat decides, and only when a trial looks
    stale twice, half a grace period apart by this process's own monotonic clock: a clock that was set forward, or a
    server that was away, makes every heartbeat look old for a moment. A trial without any heartbeat is given the same
    time from when it was first seen, since its worker may have died before the first beat.
    """

    def __init__(self, store: Store, study_id: int, retries: RetrySpec) -> None:
        self._store = store
        self._study_id = study_id
        self._retries = retries
        interval = store.get_heartbeat_interval()
        self._grace = 3.0 * interval if interval is not None else math.inf
        # long enough for a worker to beat again after the server was away, when all beats look old at once
        self._second_look = max(self._grace / 2, 2 * LONGEST_PAUSE_S)
        self._suspects: dict[int, float] = {}
        self._silent: dict[int, float] = {}

    def recover(self) -> list[int]:
        """Fail what is lost now; return the trial numbers."""
        running = self._store.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,))
        stale = set(self._store._get_stale_trial_ids(self._study_id)) if math.isfinite(self._grace) else set()
        now = time.monotonic()
        ids = {trial._trial_id for trial in running}
        self._suspects = {key: since for key, since in self._suspects.items() if key in ids & stale}
        self._silent = {key: since for key, since in self._silent.items() if key in ids}
        lost: list[int] = []
        for trial in running:
            owner = trial.user_attrs.get(names.OWNER)
            if owner is not None and is_dead_here(owner):
                reason = f"worker {owner} is gone"
            elif trial._trial_id in stale:
                if now - self._suspects.setdefault(trial._trial_id, now) < self._second_look:
                    continue
                reason = f"no heartbeat from {owner} for more than {self._grace:.0f} s"
            elif owner is None:  # claimed by something else than our workers: no beat will ever come
                if now - self._silent.setdefault(trial._trial_id, now) < self._grace:
                    continue
                reason = "claimed without an owner"
            else:
                continue
            if fail_trial(self._store, trial, Cause.LOST_WORKER, reason, self._retries, owner=owner):
                lost.append(trial.number)
        return lost


# -- stop rules ------------------------------------------------------------------------------------------------------

StopRule = Literal["timeout", "gpu_hours", "target", "patience"]


def stop_reason(rules: StopSpec, trials: Sequence[FrozenTrial], seconds: float) -> StopRule | None:
    """Return the rule that ends the study now, if any.

    Args:
        rules: the limits; every one that is None is off.
        trials: all trials of the study.
        seconds: wall clock since this run began.
    """
    if rules.timeout_s is not None and seconds >= rules.timeout_s:
        return "timeout"
    if rules.gpu_hours is not None:
        now = datetime.now()
        spent = 0.0
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.datetime_start is not None:
                spent += (now - trial.datetime_start).total_seconds()
            spent += trial.user_attrs.get(names.SECONDS, 0.0)
        if spent >= 3600 * rules.gpu_hours:
            return "gpu_hours"
    best = best_trial(trials)
    if best is None:
        return None
    if rules.target is not None and best.values[0] <= rules.target:
        return "target"
    if rules.patience is not None and best.datetime_complete is not None:
        since = sum(
            trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            and trial.datetime_complete is not None
            and trial.datetime_complete > best.datetime_complete
            for trial in trials
        )
        if since >= rules.patience:
            return "patience"
    return None


# -- status ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BestTrial:
    """The best trial in a few figures."""

    number: int
    k_loc: float
    floor: float | None
    efficiency: float | None
    pipeline_k_loc: float | None
    params: dict[str, Any]
    scenes: int | None


@dataclass(frozen=True)
class RunningTrial:
    """A trial that a worker holds now."""

    number: int
    owner: str | None
    step: int | None
    k_loc: float | None
    seconds: float | None


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands: what ``status --json`` prints."""

    study: str
    trials: Tally
    best: BestTrial | None
    running: list[RunningTrial]
    causes: dict[str, int]
    device_hours: float

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def summarise_best(trial: FrozenTrial | None) -> BestTrial | None:
    """Return the few figures of a trial."""
    if trial is None:
        return None
    attributes = trial.user_attrs
    pipeline = attributes.get(names.PIPELINE)
    return BestTrial(
        number=trial.number,
        k_loc=trial.values[0],
        floor=attributes.get(names.FLOOR),
        efficiency=attributes.get(names.EFFICIENCY),
        pipeline_k_loc=None if pipeline is None else pipeline.get("k_loc"),
        params=dict(trial.params),
        scenes=attributes.get(names.SCENES),
    )


def study_status(name: str, trials: Sequence[FrozenTrial]) -> StudyStatus:
    """Summarise the trials of a study."""
    now = datetime.now()
    causes: dict[str, int] = {}
    running: list[RunningTrial] = []
    seconds = 0.0
    for trial in trials:
        seconds += trial.user_attrs.get(names.SECONDS, 0.0)
        if trial.state == TrialState.FAIL:
            cause = str(trial.user_attrs.get(names.CAUSE, Cause.BUG.value))
            causes[cause] = causes.get(cause, 0) + 1
        elif trial.state == TrialState.RUNNING:
            step = trial.last_step
            running.append(
                RunningTrial(
                    number=trial.number,
                    owner=trial.user_attrs.get(names.OWNER),
                    step=step,
                    k_loc=None if step is None else trial.intermediate_values[step],
                    seconds=None if trial.datetime_start is None else (now - trial.datetime_start).total_seconds(),
                )
            )
    return StudyStatus(
        study=name,
        trials=tally(trials),
        best=summarise_best(best_trial(trials)),
        running=running,
        causes=causes,
        device_hours=seconds / 3600,
    )
