"""A long study under watch: memory, descriptors and pace of supervisor, dashboard and workers, trial by trial.

    python -m benchmarks.soak                             # 2,000 trials of 1.5 s, 8 workers, embedded PostgreSQL
    python -m benchmarks.soak --trials 200 --sampler random --storage sqlite

The supervisor is this process, with everything that ``ris-hpo run`` does around a pool; the dashboard is a process of
its own, asked for the study again and again as an open page asks. Trials only wait: the pace is the service's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks.bench_service import HERE, begin, spec_of
from ris_hpo.report.study_page import kept_current
from ris_hpo.search.lifecycle import quiet_optuna
from ris_hpo.store.open import open_store
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import job_for
from tests.postgres import Postgres

TOKEN = "token-of-the-soak-benchmark"
POLL_S = 2.0
ROWS = 10


@dataclass(frozen=True)
class Look:
    """What the processes held at one moment."""

    ended: int
    seconds: float
    supervisor: tuple[float, int]
    dashboard: tuple[float, int]
    worker: tuple[float, int]
    poll_s: float


def held(process: psutil.Process) -> tuple[float, int]:
    """Resident megabytes and open descriptors."""
    return process.memory_info().rss / 2**20, process.num_fds()


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The address of an empty store."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/soak.db"
        return
    if kind != "embedded":
        yield kind
        return
    with tempfile.TemporaryDirectory(prefix="ris", dir="/tmp") as short:  # a socket's path has to stay short
        server = Postgres(Path(short))
        yield server.url()
        server.close()


class Watched:
    """The dashboard in a process of its own, polled from a thread of ours as an open page polls."""

    def __init__(self, address: str, folder: Path) -> None:
        environment = {**os.environ, "RIS_HPO_STORAGE_URL": address, "RIS_HPO_DASHBOARD_TOKEN": TOKEN}
        environment["RIS_HPO_STORAGE_DIR"] = str(folder)
        command = [sys.executable, "-m", "ris_hpo", "dashboard", "--port", "0", "--json"]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            text += self.process.stdout.readline()
        self.base = json.loads(text)["url"].removesuffix("/dashboard")
        self.seconds, self.polls, self.known = 0.0, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        while not self._done.wait(POLL_S):
            # as the page: the whole study once, then what came since
            request = urllib.request.Request(f"{self.base}/api/studies/1?after={self.known}")
            request.add_header("Authorization", f"Bearer {TOKEN}")
            begun = time.perf_counter()
            with urllib.request.urlopen(request, timeout=60) as answer:
                trials = json.loads(answer.read())["trials"]
            self.seconds = time.perf_counter() - begun
            self.polls += 1
            ended = [trial["number"] for trial in trials if trial["state"] in ("Complete", "Pruned", "Fail")]
            self.known = max([self.known, *ended])

    def close(self) -> None:
        """End both."""
        self._done.set()
        self._thread.join()
        self.process.terminate()
        self.process.wait()


def soak(address: str, folder: Path, trials: int, workers: int, seconds: float, sampler: str) -> None:
    """Run the study and print the table."""
    store = open_store(address)
    study = begin(store, spec_of("soak", 10, seconds / 10, sampler), trials)
    processes = LocalProcesses(plan_slots(workers, [], threads=1), folder / "trials")
    pool = Supervisor(store, study, processes, job_for(store, study, directory=folder / "trials"))
    watched = Watched(address, folder)
    supervisor, dashboard = psutil.Process(), psutil.Process(watched.process.pid)
    begun = time.monotonic()
    looks: list[Look] = []
    try:
        for snapshot in kept_current(study, store, pool.run(), folder / "artifacts"):
            ended = snapshot.tally.ended
            pids = [view.pid for view in snapshot.workers if view.pid is not None]
            if (looks and ended < looks[-1].ended + trials / ROWS and ended < trials) or not ended or not pids:
                continue
            each = [held(psutil.Process(pid)) for pid in pids]
            worker = max(each) if each else (0.0, 0)
            passed = time.monotonic() - begun
            looks.append(Look(ended, passed, held(supervisor), held(dashboard), worker, watched.seconds))
            tell(looks[-1])
    finally:
        watched.close()
    counts = snapshot.tally
    print(f"{counts.complete} complete, {counts.open} open, {counts.fail} failed, {watched.polls} polls")
    ends = sorted(trial.datetime_complete for trial in study.get_trials(deepcopy=False) if trial.datetime_complete)
    few = trials // ROWS
    first, last = pace(ends[: few + 1]), pace(ends[-few - 1 :])
    print(f"trials/s: first {few}: {first:.2f}, last {few}: {last:.2f}, ratio {last / first:.3f}")
    store.close()


def pace(ends: list[datetime]) -> float:
    """Trials a second between the first and the last of these ends."""
    return (len(ends) - 1) / (ends[-1] - ends[0]).total_seconds()


def tell(look: Look) -> None:
    """One line of the table."""
    columns = [
        f"{megabytes:6.1f} MB {files:4d} fd" for megabytes, files in (look.supervisor, look.dashboard, look.worker)
    ]
    print(
        f"| {look.ended:5d} | {look.seconds:5.0f} s | {' | '.join(columns)} | {1000 * look.poll_s:5.0f} ms |",
        flush=True,
    )


def main() -> None:
    """Run the soak named on the command line."""
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet_optuna()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a trial")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--storage", default="embedded", help="embedded PostgreSQL, sqlite, or an address")
    arguments = parser.parse_args()
    print("| ended | time | supervisor | dashboard | largest worker | page |\n|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory(prefix="ris-hpo-soak-") as name,
        database(arguments.storage, Path(name)) as address,
    ):
        soak(address, Path(name), arguments.trials, arguments.workers, arguments.seconds, arguments.sampler)


if __name__ == "__main__":
    main()
