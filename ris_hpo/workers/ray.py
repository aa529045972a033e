"""The same workers on a Ray cluster: one actor per slot, restarts left to Ray, state in the store alone.

An actor is a worker in a process that Ray places, with fractional GPUs if asked. When a node goes, Ray starts the actor
elsewhere; the trial it held is found by its missing heartbeat, and its successor goes on from the checkpoint where the
nodes share a disk, or from the start, to the same curve, where they do not.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.errors import StoreError, WorkerError
from ris_hpo.process import StopSignals, storage_directory
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import stored_spec
from ris_hpo.search.status import summarise_best
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.open import HEARTBEAT_S
from ris_hpo.workers.local import Ending, PoolSnapshot, WorkerView
from ris_hpo.workers.lost import LostTrials
from ris_hpo.workers.worker import WorkerJob, run_worker

_GRACE_S = 8.0


class _Actor:
    """One worker in a Ray process; ``work`` runs beside ``ask_to_stop``, on the actor's second thread."""

    def __init__(self) -> None:
        self._stop = False

    def work(self, job: dict[str, Any]) -> dict[str, Any]:
        return asdict(run_worker(WorkerJob(**job), stop=lambda: self._stop))

    def ask_to_stop(self) -> None:
        self._stop = True


class RayPool:
    """Workers as actors of a Ray cluster.

    Args:
        store: the store; PostgreSQL, since the nodes are several machines.
        study: the study, with its tickets filled.
        workers: number of actors; None for one a GPU slot of the cluster, or one where it has no GPU.
        address: the cluster, ``auto`` for the one this machine belongs to.
        gpus: whether to use the cluster's GPUs.
        per_gpu: actors that share a GPU.
        cpus_per_worker: cores per actor.
        device: torch device of the actors; None for ``cuda`` where they have a share of a GPU, else ``cpu``.
        program: module of the training program; None for the study kind's.
        directory: folder of the trials, the same on all nodes where they share one.
        heartbeat: seconds between heartbeats; a trial of a lost node is found after about four of them.
        environment: variables of the actors' processes.

    Attributes:
        workers: the number of actors, once the cluster is known.
        ending: after ``run()``: ``finished``, ``interrupted``, or the stop rule that struck.
    """

    def __init__(
        self,
        store: Store,
        study: Study,
        *,
        workers: int | None = None,
        address: str = "auto",
        gpus: bool = True,
        per_gpu: int = 1,
        cpus_per_worker: float = 1.0,
        device: str | None = None,
        program: str | None = None,
        directory: Path | None = None,
        heartbeat: int = HEARTBEAT_S,
        environment: dict[str, str] | None = None,
    ) -> None:
        if store.is_sqlite:
            raise StoreError("a Ray cluster needs a store that every node reaches: --storage postgresql://...")
        try:
            import ray
        except ImportError:
            raise WorkerError("the ray engine needs Ray; install ris-hpo[ray]") from None
        self._ray: Any = ray
        self._store = store
        self._study = study
        self._spec = stored_spec(study)
        self.workers = workers
        self._address = address
        self._gpus = gpus
        self._per_gpu = per_gpu
        self._cpus = cpus_per_worker
        self._environment = dict(environment or {})
        self._stop = StopSignals()
        self._begun = time.monotonic()
        self._study_id = store.get_study_id_from_name(study.study_name)
        self._lost = LostTrials(store, self._study_id, self._spec.retries)
        self._job = WorkerJob(
            address=store.address,
            study=study.study_name,
            device=device or "cpu",
            threads=max(1, int(cpus_per_worker)),
            directory=str(directory or storage_directory().absolute() / "trials" / study.study_name),
            program=program,
            artifacts=str(storage_directory().absolute() / "artifacts"),
            heartbeat=heartbeat,
            max_bugs=self._spec.retries.bugs,
        )
        self._device = device
        self.ending: Ending | None = None

    def run(self, *, interval: float = 0.5) -> Iterator[PoolSnapshot]:
        """Run until every trial has ended, a stop rule strikes, or a signal asks to stop.

        Raises:
            WorkerError: the cluster cannot be reached, or trials keep failing with a bug.
        """
        ray = self._ray
        self._begun = time.monotonic()
        joined_here = not ray.is_initialized()
        if joined_here:
            self._check_address()
            try:
                ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
            except ConnectionError as error:
                raise WorkerError(f"no Ray cluster at '{self._address}' ({' '.join(str(error).split())})") from None
        gpus = int(ray.cluster_resources().get("GPU", 0)) if self._gpus else 0
        workers = self.workers = self.workers or max(1, gpus * self._per_gpu)
        self._job = replace(self._job, device=self._device or ("cuda" if gpus else "cpu"))
        remote = ray.remote(
            num_cpus=self._cpus,
            num_gpus=1 / self._per_gpu if gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2,
            runtime_env={"env_vars": {**self._environment}},
        )(_Actor)
        actors = [remote.remote() for _ in range(workers)]
        work = [actor.work.remote(asdict(self._job)) for actor in actors]
        finished: list[bool] = [False] * len(work)
        messages: list[str] = []
        try:
            with self._stop:
                while self.ending is None:
                    ready, _ = (
                        ray.wait(
                            [task for task, done in zip(work, finished, strict=True) if not done],
                            num_returns=1,
                            timeout=interval,
                        )
                        if not all(finished)
                        else ([], [])
                    )
                    for task in ready:
                        index = work.index(task)
                        finished[index] = True
                        messages += self._outcome(index, task)
                    trials = self._store.get_all_trials(self._study_id, deepcopy=False)
                    counts = counting.tally(trials)
                    if self._stop():
                        self.ending = "interrupted"
                    elif counts.open == 0:
                        self.ending = "finished"
                    else:
                        self.ending = counting.stop_reason(self._spec.stop, trials, time.monotonic() - self._begun)
                        self._lost.recover()
                        if all(finished):  # a trial came back after the last worker had left
                            work = [actor.work.remote(asdict(self._job)) for actor in actors]
                            finished = [False] * len(work)
                    yield self._snapshot(messages)
                    messages = []
                self._shut_down(actors, work)
                yield self._snapshot(messages)
        finally:
            for actor in actors:
                ray.kill(actor)
            if joined_here:
                ray.shutdown()

    def stop(self) -> None:
        """Ask the run to stop, as SIGTERM does."""
        self._stop.ask()

    def _check_address(self) -> None:
        """Refuse at once what Ray itself would try for minutes, and then end the process over."""
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        if not port.isdigit():
            return  # ``auto``, ``local``: Ray answers soon
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise WorkerError(f"no Ray cluster at '{self._address}' ({error})") from None

    def _outcome(self, index: int, task: Any) -> list[str]:
        ray = self._ray
        try:
            report = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, WorkerError):
                raise WorkerError(str(cause)) from None
            return [f"worker {index}: {' '.join(str(cause).split())[:300]}"]
        except ray.exceptions.RayActorError as error:
            return [f"worker {index} was lost: {' '.join(str(error).split())[:200]}"]
        return [] if report["reason"] in ("done", "stopped") else [f"worker {index} left: {report['reason']}"]

    def _shut_down(self, actors: list[Any], work: list[Any]) -> None:
        ray = self._ray
        for actor in actors:
            actor.ask_to_stop.remote()
        ray.wait(work, num_returns=len(work), timeout=_GRACE_S)

    def _snapshot(self, messages: list[str]) -> PoolSnapshot:
        trials = self._store.get_all_trials(self._study_id, deepcopy=False)
        counts = counting.tally(trials)
        views: list[WorkerView] = []
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            step = trial.last_step
            owner = str(trial.user_attrs.get(names.OWNER))
            views.append(
                WorkerView(
                    slot=len(views),
                    device=f"{trial.user_attrs.get(names.DEVICE, self._job.device)}@{owner.split(':')[0]}",
                    state="training",
                    trial=trial.number,
                    step=step,
                    k_loc=None if step is None else trial.intermediate_values[step],
                )
            )
        return PoolSnapshot(
            study=self._study.study_name,
            n_trials=counts.ended + counts.open,
            tally=counts,
            best=summarise_best(counting.best_trial(trials)),
            workers=views,
            seconds=time.monotonic() - self._begun,
            messages=messages,
        )
