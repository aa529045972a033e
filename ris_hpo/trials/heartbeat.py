"""The heartbeat of a running trial: what tells other machines that its worker lives, and what it has cost so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from optuna.exceptions import UpdateFinishedTrialError

from ris_hpo.errors import StoreError, StudyGoneError
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store


@contextmanager
def heartbeat(store: Store, study_id: int, number: int, seconds: Callable[[], float]) -> Iterator[None]:
    """Beat from a thread of its own while the block runs; does nothing where the store has no heartbeat interval.

    Each beat also records the seconds spent on the trial, by this process's own clock: the time of a worker that is
    killed counts up to its last beat, whatever the clocks of other machines say.

    Args:
        store: the store.
        study_id: the study.
        number: the running trial.
        seconds: returns the seconds that workers have spent on the trial until now.
    """
    interval = store.get_heartbeat_interval()
    if interval is None:
        yield
        return
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
    store.record_heartbeat(trial_id)  # before anything else: a trial without any beat is given a while to make one
    done = threading.Event()

    def beat() -> None:
        while not done.wait(interval):
            try:
                store.record_heartbeat(trial_id)
                store.mark(study_id, number, {names.SECONDS: seconds()})
            except StoreError:
                continue  # the trial meets the same error; a store that comes back finds this thread beating
            except (UpdateFinishedTrialError, StudyGoneError):
                break  # declared lost, or deleted with its study: the trial finds out at its next report
        store.remove_session()

    thread = threading.Thread(target=beat, name=f"heartbeat of trial {number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=1.0)  # it may be waiting for a server that is away
