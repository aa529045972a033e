"""Workers as actors of a Ray cluster: Ray places them, the supervisor restarts them, the state is in the store alone.

An actor runs the worker on one thread and hands its events to the supervisor on another. When a node goes, the
supervisor starts another actor, which Ray places elsewhere; the trial that was lost is found by its missing heartbeat,
and its successor goes on from the checkpoint where the nodes share a disk, or from the start, to the same curve, where
they do not.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ris_hpo.errors import StoreError, WorkerError
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import with_password
from ris_hpo.trials.failures import one_line
from ris_hpo.workers.devices import Slot
from ris_hpo.workers.events import Event, Left, Reason, decode, encode
from ris_hpo.workers.pool import Worker
from ris_hpo.workers.worker import WorkerJob, work

_QUIET_S = 5.0  # how long an actor waits for its worker to report anything before it answers with nothing
_CONNECT_S = 5.0
_END = ""  # stands after the last event, also where the worker raised something unforeseen


class _Actor:
    """One worker in a process of a Ray node; each method runs on a thread of its own."""

    def __init__(self) -> None:
        self._stop = False
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work(self, job: dict[str, Any]) -> None:
        """Run the worker to its end."""
        try:
            work(WorkerJob(**job), lambda: self._stop, lambda event: self._events.put(encode(event)))
        finally:
            self._events.put(_END)

    def events(self) -> list[str]:
        """Return what the worker has reported since the last call, after waiting for the first of it."""
        lines: list[str] = []
        try:
            lines.append(self._events.get(timeout=_QUIET_S))
            while True:
                lines.append(self._events.get_nowait())
        except queue.Empty:
            return lines

    def ask_to_stop(self) -> None:
        """Ask the worker to checkpoint its trial, put it back and leave."""
        self._stop = True


class RayActors:
    """Starts workers as actors of a Ray cluster.

    Args:
        store: the store; PostgreSQL, since the nodes are several machines.
        workers: number of actors; None for one a GPU slot of the cluster, or one where it has no GPU.
        address: the cluster, ``auto`` for the one that this machine belongs to.
        gpus: whether to use the cluster's GPUs.
        per_gpu: actors that share a GPU.
        cpus_per_worker: cores per actor.
        device: torch device of the actors; None for ``cuda`` where they have a share of a GPU, else ``cpu``.
        environment: variables of the actors' processes. Ray writes them into its logs: nothing secret may stand here.
        program: module or package that the nodes do not have; Ray brings it to them.

    Raises:
        StoreError: the store is a file of this machine.
        WorkerError: Ray is not installed.
    """

    def __init__(
        self,
        store: Store,
        *,
        workers: int | None = None,
        address: str = "auto",
        gpus: bool = True,
        per_gpu: int = 1,
        cpus_per_worker: float = 1.0,
        device: str | None = None,
        environment: Mapping[str, str] | None = None,
        program: Path | None = None,
    ) -> None:
        if store.is_sqlite:
            raise StoreError("a Ray cluster needs a store that every node reaches: --storage postgresql://...")
        try:
            import ray
        except ImportError:
            raise WorkerError("the ray engine needs Ray; install ris-hpo[ray]") from None
        self._ray: Any = ray
        self._workers = workers
        self._address = address
        self._use_gpus = gpus
        self._per_gpu = per_gpu
        self._cpus = cpus_per_worker
        self._device = device
        self._environment = {"OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
        self._modules = [] if program is None else [str(program)]
        self._joined_here = False
        self._gpus = 0

    def __enter__(self) -> None:
        """Connect to the cluster.

        Raises:
            WorkerError: it cannot be reached.
        """
        ray = self._ray
        self._joined_here = not ray.is_initialized()
        if self._joined_here:
            self._check_address()
            try:
                modules = {"py_modules": self._modules} if self._modules else None  # Ray fails on an empty list
                ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", runtime_env=modules)
            except ConnectionError as error:
                raise WorkerError(f"no Ray cluster at '{self._address}' ({' '.join(str(error).split())})") from None
        self._gpus = int(ray.cluster_resources().get("GPU", 0)) if self._use_gpus else 0

    def __exit__(self, *exception: object) -> None:
        if self._joined_here:
            self._ray.shutdown()

    def slots(self) -> Sequence[Slot]:
        """Return one slot per actor."""
        count = self._workers or max(1, self._gpus * self._per_gpu)
        device = self._device or ("cuda" if self._gpus else "cpu")
        return [Slot(index, device, None, max(1, int(self._cpus))) for index in range(count)]

    def has_room(self, slot: Slot, peak_bytes: Callable[[], int]) -> bool:
        """Return True: Ray itself keeps an actor waiting until a node has room for it."""
        return True

    def start(self, slot: Slot, job: WorkerJob) -> Worker:
        """Start an actor.

        The job goes as an argument, since the address of the store holds its password: Ray logs the environment of an
        actor, and not its arguments.
        """
        kind = self._ray.remote(
            num_cpus=self._cpus,
            num_gpus=1 / self._per_gpu if self._gpus else 0,
            max_restarts=0,  # the supervisor restarts, and counts
            max_concurrency=3,
            runtime_env={"env_vars": self._environment},
        )(_Actor)
        return _RayWorker(self._ray, kind.remote(), replace(job, address=with_password(job.address)))

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when a worker has something to report, or after so many seconds."""
        answers = [worker.answer for worker in workers if isinstance(worker, _RayWorker)]
        if answers:
            self._ray.wait(answers, num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)

    def _check_address(self) -> None:
        """Refuse at once what Ray itself would try for minutes, and then end the process over."""
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        if not port.isdigit():
            return  # ``auto``, ``local``: Ray answers soon
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except OSError as error:
            raise WorkerError(f"no Ray cluster at '{self._address}' ({error})") from None


class _RayWorker:
    """One actor, as the supervisor sees it."""

    def __init__(self, ray: Any, actor: Any, job: WorkerJob) -> None:
        self._ray = ray
        self._actor = actor
        self._has_left = False
        self._end = actor.work.remote(asdict(job))
        self.pid: int | None = None
        self.answer = actor.events.remote()

    def poll(self) -> list[Event]:
        """Return what the worker reported since the last call; ``Left`` comes last, also from an actor that died."""
        ray = self._ray
        if self._has_left or not ray.wait([self.answer], timeout=0)[0]:
            return []
        events: list[Event] = []
        try:
            lines = ray.get(self.answer)
            events = [decode(line) for line in lines if line != _END]
            if _END in lines and not (events and isinstance(events[-1], Left)):
                ray.get(self._end)  # raises what the worker died of
        except ray.exceptions.RayTaskError as error:
            events = [*events, Left(Reason.CRASHED, one_line(error.cause))]
        except ray.exceptions.RayError as error:  # the actor or its node is gone
            events = [*events, Left(Reason.CRASHED, one_line(error))]
        if events and isinstance(events[-1], Left):
            self._has_left = True
            ray.kill(self._actor)
        else:
            self.answer = self._actor.events.remote()
        return events

    def ask_to_stop(self) -> None:
        """Ask the worker to checkpoint its trial, put it back and leave."""
        self._actor.ask_to_stop.remote()

    def kill(self) -> None:
        """End the actor's process."""
        self._ray.kill(self._actor)

    def memory_bytes(self) -> int | None:
        """Return None: the process is on another machine."""
        return None
