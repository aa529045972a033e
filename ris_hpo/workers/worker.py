"""A worker: claims one trial after the other, runs it, and leaves when the study has none left.

The same loop serves the local pool (one spawned process per slot, ``python -m ris_hpo.workers.worker``), ``ris-hpo
worker`` on any host, and the actors of a Ray cluster. All it needs is the store's address and the study's name: the
rest stands in the study's attributes.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from optuna.study import Study
from optuna.trial import Trial, TrialState

from ris_hpo.errors import RisHpoError, WorkerError
from ris_hpo.process import StopSignals, storage_directory
from ris_hpo.programs.program import load_program
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import get_study, stored_spec
from ris_hpo.search.spec import StopSpec
from ris_hpo.store.attributes import Cause
from ris_hpo.store.open import HEARTBEAT_S, open_store
from ris_hpo.store.owner import owner_name
from ris_hpo.store.patience import PATIENCE_S
from ris_hpo.trials.run import Figures, Outcome, Seat, TrialBugError, UnfitHostError, run_trial
from ris_hpo.workers.lost import LostTrials

EXIT_DONE: Final = 0
EXIT_STOPPED: Final = 3
EXIT_BUG: Final = 70
EXIT_UNFIT: Final = 74
EXIT_OUT_OF_MEMORY: Final = 75
EXIT_STORE: Final = 76

_LONGEST_IDLE_S = 1.0
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Event = dict[str, Any]


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is told: plain values, so that it travels as JSON.

    Attributes:
        address: the store; may hold a password, and is never put on a command line.
        study: the study's name.
        device: ``cpu`` or ``cuda``.
        threads: torch threads; None leaves torch's own choice.
        directory: folder of the trials' checkpoints; None for the storage directory's.
        program: module with ``Trainer`` and ``RunConfig``; None for the study kind's own, with the dashboard's figures.
        artifacts: folder of the dashboard's figures; None for the storage directory's.
        heartbeat: seconds between heartbeats.
        max_bugs: trials that may fail with a bug before this worker gives up.
        fresh_after_memory: leave after an out-of-memory failure, so that a fresh process goes on.
        max_trials: trials after which this worker leaves; None for as many as there are.
    """

    address: str
    study: str
    device: str = "cpu"
    threads: int | None = None
    directory: str | None = None
    program: str | None = None
    artifacts: str | None = None
    heartbeat: int | None = HEARTBEAT_S
    max_bugs: int = 3
    fresh_after_memory: bool = False
    max_trials: int | None = None


@dataclass(frozen=True)
class WorkerReport:
    """What a worker did.

    ``reason``: ``done`` (nothing left to run), ``stopped`` (asked to), ``out_of_memory`` (leaves for a fresh process),
    ``share`` (its own ``max_trials``), or the stop rule that struck.
    """

    ended: int
    requeued: int
    bugs: int
    reason: Literal["done", "stopped", "out_of_memory", "share"] | counting.StopRule


def run_worker(
    job: WorkerJob,
    *,
    stop: Callable[[], bool] = lambda: False,
    notify: Callable[[Event], None] = lambda event: None,
    rules: StopSpec | None = None,
) -> WorkerReport:
    """Work on a study until it has no open trial, ``stop()`` is true, or a stop rule strikes.

    While other workers still run trials this one waits: a trial of theirs that is lost comes back into the queue.

    Args:
        job: which study, where, on what.
        stop: asked between training steps; the trial at hand is then checkpointed and put back.
        notify: told of every claim, validation and end.
        rules: the study's stop rules, for a worker without a supervisor; None where a supervisor watches them.

    Raises:
        StudyError: no such study.
        StoreError: the store cannot be opened, or stays away.
        WorkerError: too many trials failed with a bug.
    """
    _limit_threads(job.threads)
    store = open_store(job.address, create=False, heartbeat=job.heartbeat, patience_s=PATIENCE_S)
    try:
        study = get_study(store, job.study)
        spec = stored_spec(study)
        study_id = store.get_study_id_from_name(job.study)
        root = Path(job.directory) if job.directory is not None else storage_directory() / "trials" / job.study
        seat = Seat(
            store=store,
            study=study,
            spec=spec,
            program=load_program(job.program or spec.kind),
            directory=lambda number: root / str(number),
            device=job.device,
            stop=stop,
            notify=lambda report: notify({"event": "report", **asdict(report)}),
            started=lambda number: notify({"event": "claimed", "number": number}),
            figures=_figures(job, study) if job.program is None and spec.kind == "training" else None,
        )
        lost = LostTrials(store, study_id, spec.retries)
        notify({"event": "ready"})
        begun = time.monotonic()
        ended = requeued = bugs = 0
        idle, next_look = 0.05, 0.0
        sequence = itertools.count()
        reason: Any = None
        while reason is None:
            if stop():
                reason = "stopped"
                break
            if job.max_trials is not None and ended >= job.max_trials:
                reason = "share"
                break
            if rules is not None:
                trials = store.get_all_trials(study_id, deepcopy=False)
                reason = counting.stop_reason(rules, trials, time.monotonic() - begun)
                if reason is not None:
                    break
            if time.monotonic() >= next_look:
                lost.recover()
                next_look = time.monotonic() + (job.heartbeat or HEARTBEAT_S) / 2
            owner = owner_name(next(sequence))
            number = store.claim(study_id, owner)
            if number is None:
                open_states = (TrialState.RUNNING, TrialState.WAITING)
                if not store.get_all_trials(study_id, deepcopy=False, states=open_states):
                    reason = "done"
                    break
                time.sleep(idle)
                idle = min(1.5 * idle, _LONGEST_IDLE_S)
                continue
            idle = 0.05
            try:
                outcome = run_trial(seat, number, owner)
            except TrialBugError as error:
                bugs += 1
                ended += 1
                notify({"event": "ended", "state": "failed", "cause": Cause.BUG.value, "error": str(error)})
                if bugs >= job.max_bugs:
                    raise WorkerError(
                        f"{bugs} trials failed with a bug, the last: {error}; its traceback stands in the trial's "
                        "attributes, and the same command goes on when it is mended"
                    ) from error
                continue
            notify(_ended(outcome))
            requeued += outcome.state == "requeued"
            ended += outcome.state in ("complete", "pruned")
            if outcome.cause is Cause.OUT_OF_MEMORY and job.fresh_after_memory:
                reason = "out_of_memory"
        return WorkerReport(ended=ended, requeued=requeued, bugs=bugs, reason=reason)
    finally:
        store.close()


def _figures(job: WorkerJob, study: Study) -> Callable[[Trial, Path], Figures]:
    from ris_hpo.report.trial_figures import TrialFigures  # imported late, since it brings torch

    folder = Path(job.artifacts) if job.artifacts is not None else storage_directory() / "artifacts"
    return lambda trial, directory: TrialFigures(study, trial, directory, folder)


def _ended(outcome: Outcome) -> Event:
    return {
        "event": "ended",
        "number": outcome.number,
        "state": outcome.state,
        "value": outcome.value,
        "cause": None if outcome.cause is None else outcome.cause.value,
        "error": outcome.error,
    }


def _limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    for variable in THREAD_VARIABLES:  # for a torch that is still to be imported
        os.environ[variable] = str(threads)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


# -- the process of a local slot -------------------------------------------------------------------------------------


def main(arguments: Mapping[str, Any]) -> int:
    """Run the worker of one slot; the parent's death is a request to stop.

    Args:
        arguments: ``job`` (a ``WorkerJob``) and ``events`` (file descriptor for JSON lines).
    """
    job = WorkerJob(**arguments["job"])
    with os.fdopen(arguments["events"], "w", buffering=1, encoding="utf-8") as events, StopSignals() as stop:

        def notify(event: Event) -> None:
            try:
                events.write(json.dumps(event) + "\n")
            except BrokenPipeError:
                stop.ask()

        def watch_parent() -> None:
            os.read(sys.stdin.fileno(), 1)  # the parent never writes again: this returns when it is gone
            stop.ask()

        threading.Thread(target=watch_parent, daemon=True).start()
        warnings.simplefilter("default")
        try:
            report = run_worker(job, stop=stop, notify=notify)
        except RisHpoError as error:
            notify({"event": "failed", "error": str(error)})
            with suppress(OSError):  # the log may lie on the disk that is full
                sys.stderr.write(f"{error}\n")
            if isinstance(error, UnfitHostError):
                return EXIT_UNFIT
            return EXIT_BUG if isinstance(error, WorkerError) else EXIT_STORE
    if report.reason == "out_of_memory":
        return EXIT_OUT_OF_MEMORY
    return EXIT_STOPPED if report.reason == "stopped" else EXIT_DONE


if __name__ == "__main__":
    _status = main(json.loads(sys.stdin.buffer.readline()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)  # a daemon thread may hang in a system call, and a worker has nothing left to tidy
