"""Finding running trials whose worker is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import fail_trial
from ris_hpo.search.spec import RetrySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.owner import Owner
from ris_hpo.store.retry import LONGEST_PAUSE_S


class LostTrials:
    """Finds running trials whose worker is gone, and queues their successors.

    A dead process of this host, boot and PID namespace is known at once. For all others the heartbeat decides: a trial
    whose heartbeat has not changed while this process watched for a whole grace period is lost, and so is one that
    never had any, since its worker may have died before the first. Only this process's own monotonic clock counts, and
    of a pause between two looks (the server was away, this machine slept) no more than one heartbeat interval. So a
    worker that still beats is not declared lost, whatever any other clock is set to, and however old all beats look
    after an outage.
    """

    def __init__(self, store: Store, study_id: int, retries: RetrySpec) -> None:
        self._store = store
        self._study_id = study_id
        self._retries = retries
        interval = store.get_heartbeat_interval()
        self._interval = interval if interval is not None else 0.0  # nobody beats: silence means nothing
        # long enough for a worker to beat again after the server was away
        self._grace = max(3 * self._interval, 2 * LONGEST_PAUSE_S)
        self._last_look = time.monotonic()
        self._beats: dict[int, datetime | None] = {}
        self._silence: dict[int, float] = {}

    def recover(self, before: Callable[[list[int]], None] = lambda numbers: None) -> list[int]:
        """Fail what is lost now; return the trial numbers.

        Args:
            before: called with the numbers of what looks lost, before the store is written to: a worker that was
                stopped half-way through a write keeps everybody else from writing.
        """
        running = self._store.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,))
        beats = self._store.heartbeats(self._study_id) if running and self._interval else {}
        now = time.monotonic()
        passed, self._last_look = min(now - self._last_look, self._interval), now
        seen = {trial.number: beats.get(trial.number) for trial in running}
        self._silence = {
            key: self._silence[key] + passed if key in self._beats and self._beats[key] == beat else 0.0
            for key, beat in seen.items()
        }
        self._beats = seen
        lost: list[tuple[FrozenTrial, str]] = []
        for trial in running:
            text = trial.user_attrs.get(names.OWNER)
            owner = Owner.parse(text)
            if owner is not None and owner.process.is_gone:
                lost.append((trial, f"process {owner.process.pid} on {owner.process.host} is gone"))
            elif self._silence[trial.number] >= self._grace:
                whose = text if owner is None else f"process {owner.process.pid} on {owner.process.host}"
                lost.append((trial, f"no heartbeat from {whose or 'its worker'} for {self._grace:.0f} s"))
        if lost:
            before([trial.number for trial, _ in lost])
        return [trial.number for trial, reason in lost if self._fail(trial, reason)]

    def _fail(self, trial: FrozenTrial, reason: str) -> bool:
        owner = trial.user_attrs.get(names.OWNER)
        return fail_trial(self._store, self._study_id, trial, Cause.LOST_WORKER, reason, self._retries, owner=owner)
