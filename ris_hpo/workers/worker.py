"""A worker: claims one trial after the other, runs it, and leaves when the study has none left.

The same loop serves local processes (``python -m ris_hpo.workers.worker``, one per slot) and the actors of a Ray
cluster. All it needs is the store's address and the study's name: the rest stands in the study's attributes. Clocks,
stop rules, lost trials and restarts are its supervisor's.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.study import Study

from ris_hpo.atomic import make_folder
from ris_hpo.errors import DeviceError, OutputError, RisHpoError, StoreError
from ris_hpo.process import StopSignals, storage_directory
from ris_hpo.programs.program import load_program
from ris_hpo.search.counting import tally
from ris_hpo.search.lifecycle import check_code, check_version, get_study, stored_spec
from ris_hpo.search.rungs import next_promotion
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import ARTIFACTS, study_folder
from ris_hpo.store.open import HEARTBEAT_S, open_store
from ris_hpo.store.owner import Owner, this_process
from ris_hpo.store.retry import RETRY_S
from ris_hpo.trials.context import TrialEnvironment
from ris_hpo.trials.drawing import Figures
from ris_hpo.trials.run import UnfitHostError, run_trial
from ris_hpo.workers.events import Event, Left, Note, Ready, Reason, encode

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

log = logging.getLogger("ris_hpo.store")

_SHORTEST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to know: plain values, so that it travels as JSON.

    Attributes:
        address: the store; may hold a password, and is never put on a command line.
        study: the study's name.
        directory: folder of the trials' checkpoints, on the machine of the supervisor.
        device: torch device.
        threads: torch threads; None leaves torch's own choice.
        artifacts: folder of the dashboard's figures of trained networks; None draws none.
        heartbeat: seconds between heartbeats; None for none.
        max_trials: trials after which this worker leaves; None for as many as there are.
        storage: storage directory in which the worker finds the study's folder, which may be another one on another
            machine; None for ``directory`` as it is.
    """

    address: str
    study: str
    directory: str
    device: str = "cpu"
    threads: int | None = None
    artifacts: str | None = None
    heartbeat: int | None = HEARTBEAT_S
    max_trials: int | None = None
    storage: str | None = None


def job_for(
    store: Store,
    study: Study,
    *,
    directory: Path | None = None,
    artifacts: Path | None = None,
    heartbeat: int | None = HEARTBEAT_S,
) -> WorkerJob:
    """Return the job of a study's workers, with absolute paths, so that it holds in any process.

    Args:
        store: the store.
        study: the study.
        directory: folder of the trials; None for the study's own in the storage directory.
        artifacts: folder of the dashboard's figures; None for the storage directory's.
        heartbeat: seconds between heartbeats; None for none.
    """
    storage = storage_directory().absolute()
    return WorkerJob(
        address=store.address,
        study=study.study_name,
        directory=str(directory or study_folder(store, study.study_name, storage)),
        artifacts=str(artifacts or storage / "artifacts"),
        heartbeat=heartbeat,
        storage=None if directory else str(storage),
    )


@dataclass(frozen=True)
class WorkerReport:
    """What a worker did: trials that ended here (completed, pruned, paused or failed), trials put back, why it left."""

    ended: int
    requeued: int
    reason: Reason
    error: str = ""


def run_worker(
    job: WorkerJob,
    *,
    stop: Callable[[], bool] = lambda: False,
    notify: Callable[[Event], None] = lambda event: None,
) -> WorkerReport:
    """Work on a study until it has no open trial, or ``stop()`` is true.

    While other workers still run trials this one waits: a trial of theirs that is lost comes back into the queue. It
    leaves after a trial that ran out of memory or failed with a bug; the next process is a fresh one.

    Args:
        job: which study, where, on what.
        stop: asked between training steps; the trial at hand is then checkpointed and put back.
        notify: called with every event but ``Left``.

    Raises:
        StudyError: no such study, or it was deleted or renamed meanwhile.
        SpaceError: its trials were scored by another version of the score, or this code would configure them otherwise.
        StoreError: the store cannot be opened, or stays away.
        UnfitHostError: this machine cannot run trials now; the trial at hand was put back.
    """
    _limit_threads(job.threads)
    store = open_store(job.address, create=False, write=True, heartbeat=job.heartbeat, retry_s=RETRY_S)
    try:
        study = get_study(store, job.study)
        check_version(study)
        study_id = store.get_study_id_from_name(job.study)
        environment = _environment(job, store, study, study_id, stop, notify)
        spec, process = environment.spec, this_process()
        pauses = spec.pruner.name == "promotion"
        promote = partial(next_promotion, spec=spec)
        notify(Ready(str(Owner(process, 0))))
        ended = requeued = 0
        wait = _SHORTEST_WAIT_S
        for claim in itertools.count():
            if stop():
                return WorkerReport(ended, requeued, Reason.STOPPED)
            if job.max_trials is not None and ended >= job.max_trials:
                return WorkerReport(ended, requeued, Reason.LIMIT)
            trials = store.get_all_trials(study_id, deepcopy=False)
            counts = tally(trials)
            # no claim where nothing waits: it locks the SQLite file, and one stopped meanwhile would keep it locked
            is_work = counts.waiting > 0 or promote(trials) is not None
            if not is_work and not counts.running:
                return WorkerReport(ended, requeued, Reason.DONE)
            owner = Owner(process, claim)
            number = store.claim(study_id, str(owner), promote if pauses else None) if is_work else None
            if number is None:
                time.sleep(wait)
                wait = min(1.5 * wait, _LONGEST_WAIT_S)
                continue
            wait = _SHORTEST_WAIT_S
            outcome = run_trial(environment, number, owner)
            notify(outcome)
            requeued += outcome.state == "requeued"
            ended += outcome.state in ("complete", "pruned", "paused", "failed")
            if outcome.state == "failed" and outcome.cause is not Cause.DIVERGED:
                reason = Reason.OUT_OF_MEMORY if outcome.cause is Cause.OUT_OF_MEMORY else Reason.BUG
                return WorkerReport(ended, requeued, reason, outcome.error or "")
        raise AssertionError("the count of claims has no end")
    finally:
        store.close()


def _environment(
    job: WorkerJob,
    store: Store,
    study: Study,
    study_id: int,
    stop: Callable[[], bool],
    notify: Callable[[Event], None],
) -> TrialEnvironment:
    spec = stored_spec(study)
    check_code(study, spec)
    root = Path(job.directory)
    if job.storage is not None:
        root = study_folder(store, job.study, Path(job.storage))
    figures: Callable[[optuna.Trial, Path], Figures] | None = None
    keep: Callable[[optuna.Trial, Path], None] | None = None
    if job.artifacts is not None:
        artifact_store = FileSystemArtifactStore(make_folder(Path(job.artifacts)))

        def keep(trial: optuna.Trial, path: Path) -> None:
            name = upload_artifact(artifact_store=artifact_store, file_path=str(path), study_or_trial=trial)
            with (root / str(trial.number) / ARTIFACTS).open("a", encoding="utf-8") as listing:  # goes with the study
                listing.write(f"{name}\n")

    if job.artifacts is not None and spec.trains_networks:
        from ris_hpo.report.trial_figures import TrialFigures  # imported late, since it brings torch

        artifacts = Path(job.artifacts)

        def figures(trial: optuna.Trial, directory: Path) -> Figures:
            return TrialFigures(study, trial, directory, artifacts)

    return TrialEnvironment(
        store=store,
        study_id=study_id,
        spec=spec,
        program=load_program(spec.program_name()),
        directory=lambda number: root / str(number),
        device=job.device,
        stop=stop,
        notify=notify,
        figures=figures,
        keep=keep,
    )


def _limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    for variable in THREAD_VARIABLES:  # for a torch that is still to be imported
        os.environ[variable] = str(threads)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def work(job: WorkerJob, stop: Callable[[], bool], notify: Callable[[Event], None]) -> Left:
    """Run a worker to its end; report the end, whatever it is, as the last event.

    Args:
        job: which study, where, on what.
        stop: asked between training steps.
        notify: called with every event.
    """
    notes = _Notes(notify)
    log.addHandler(notes)
    try:
        report = run_worker(job, stop=stop, notify=notify)
        left = Left(report.reason, report.error)
    except (UnfitHostError, DeviceError, OutputError) as error:
        left = Left(Reason.UNFIT, str(error))
    except StoreError as error:
        left = Left(Reason.STORE, str(error))
    except RisHpoError as error:
        left = Left(Reason.REFUSED, str(error))
    finally:
        log.removeHandler(notes)
    notify(left)
    return left


class _Notes(logging.Handler):
    """Reports what the store logs as a warning: that this worker waits, and for what."""

    def __init__(self, notify: Callable[[Event], None]) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        self._notify(Note(record.getMessage()))


# -- the process of a local slot -------------------------------------------------------------------------------------


def main(arguments: Mapping[str, Any]) -> None:
    """Run the worker of one slot; the death of the supervisor is a request to stop.

    Args:
        arguments: ``job`` (a ``WorkerJob``) and ``events`` (file descriptor for lines of JSON).
    """
    job = WorkerJob(**arguments["job"])
    with os.fdopen(arguments["events"], "w", buffering=1, encoding="utf-8") as events, StopSignals() as stop:
        lock = threading.Lock()  # the thread of the heartbeat has its notes

        def notify(event: Event) -> None:
            try:
                with lock:
                    events.write(encode(event) + "\n")
            except BrokenPipeError:
                stop.ask()

        def watch_supervisor() -> None:
            os.read(sys.stdin.fileno(), 1)  # the supervisor never writes again: this returns when it is gone
            stop.ask()

        threading.Thread(target=watch_supervisor, daemon=True).start()
        warnings.simplefilter("default")
        left = work(job, stop, notify)
        if left.error:
            with suppress(OSError):  # the log may lie on the disk that is full
                sys.stderr.write(f"{left.error}\n")


if __name__ == "__main__":
    main(json.loads(sys.stdin.buffer.readline()))
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # a daemon thread may hang in a system call, and a worker has nothing left to tidy
