"""Workers as processes of this machine: one spawned process per slot, its events on a pipe, its output in a log."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from ris_hpo.workers.devices import Slot, free_memory
from ris_hpo.workers.events import Event, Left, Reason, decode
from ris_hpo.workers.pool import Worker
from ris_hpo.workers.worker import THREAD_VARIABLES, WorkerJob

_KILL_S = 7.0  # for the kernel to end a process
_ROOM = 1.2  # of the peak that trials have had: what a GPU must have free for one more worker
_SHARE = 0.8  # of its share of a GPU's memory: what a worker needs as long as no trial has shown


class LocalProcesses:
    """Starts workers as processes of this machine.

    Args:
        slots: one per worker; see ``devices.plan_slots``.
        logs: folder of the workers' logs.
        log_name: name of a log, with ``{index}`` for the slot's.
        environment: further variables of the workers.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        logs: Path,
        *,
        log_name: str = "worker-{index}.log",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._slots = list(slots)
        self._logs = logs
        self._log_name = log_name
        self._environment = dict(environment or {})

    def __enter__(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)

    def __exit__(self, *exception: object) -> None:
        pass

    def slots(self) -> Sequence[Slot]:
        """Return one slot per worker."""
        return self._slots

    def has_room(self, slot: Slot, peak_bytes: Callable[[], int]) -> bool:
        """Return whether a GPU that already has a worker has memory for one more."""
        if not slot.mask or slot.rank == 0:
            return True
        memory = free_memory(slot.mask)
        if memory is None:
            return True
        free, total = memory
        sharing = sum(each.mask == slot.mask for each in self._slots)
        peak = peak_bytes()
        return free >= (_ROOM * peak if peak else _SHARE * total / sharing)

    def start(self, slot: Slot, job: WorkerJob) -> Worker:
        """Start a worker process."""
        environment = {**os.environ, **self._environment, "PYTHONUNBUFFERED": "1"}
        if slot.mask is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.mask
        if slot.threads is not None:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(slot.threads))
        # threads that wait without spinning: measured five times faster where cores are shared, and no slower alone
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return _LocalWorker(job, environment, self._logs / self._log_name.format(index=slot.index))

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when a worker has something to report, or after so many seconds."""
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                if isinstance(worker, _LocalWorker) and worker.events is not None:
                    selector.register(worker.events, selectors.EVENT_READ)
            if selector.get_map():
                selector.select(timeout=seconds)
            else:
                time.sleep(seconds / 2)


class _LocalWorker:
    """One worker process: a job on its standard input, events on a pipe."""

    def __init__(self, job: WorkerJob, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._pending = b""
        self._left: Event | None = None
        reading, writing = os.pipe()
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ris_hpo.workers.worker"],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=(writing,),
                    start_new_session=True,  # Ctrl-C reaches the supervisor alone, which then asks its workers
                    env=environment,
                )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self.pid: int | None = self._process.pid
        self.events = os.fdopen(reading, "rb", buffering=0)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; the next poll finds out why
            self._process.stdin.write(json.dumps({"job": asdict(job), "events": writing}).encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> list[Event]:
        """Return what the worker reported since the last call; ``Left`` comes once its process has ended."""
        status = self._process.poll()  # first: what it wrote before it ended is then in the pipe
        if self.events.closed:
            return []
        while chunk := self.events.read(65536):
            self._pending += chunk
        *lines, self._pending = self._pending.split(b"\n")
        events = [decode(line) for line in lines]
        if events and isinstance(events[-1], Left):
            self._left = events[-1]
            del events[-1]
        if status is not None:
            events.append(self._left or self._crash(status))
            self._close()
        return events

    def ask_to_stop(self) -> None:
        """Ask the worker to checkpoint its trial, put it back and leave."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process and wait for its end: SIGKILL also ends a stopped one, where SIGTERM would wait with it."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILL_S)

    def memory_bytes(self) -> int | None:
        """Return the resident memory of the process."""
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return None

    def _crash(self, status: int) -> Left:
        ending = f"signal {-status}" if status < 0 else f"exit code {status}"
        return Left(Reason.CRASHED, f"{ending}, {_last_line(self._log)} (its log is {self._log})")

    def _close(self) -> None:
        self.events.close()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing in its log")
