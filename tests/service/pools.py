"""Pools and supervisors on the test double, for the tests that run real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.results.replay import replay
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.owner import Owner
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.supervisor import PoolSnapshot, Supervisor
from ris_hpo.workers.worker import job_for

from .conftest import HERE, make_spec, study_tree


def begin(store: Store, n_trials: int, name: str = "unit", **changes: Any) -> Study:
    study = create_or_resume_study(store, make_spec(name, **changes), score_version=1)
    fill_budget(store, study, n_trials)
    return study


def supervisor_of(
    store: Store,
    study: Study,
    folder: Path,
    workers: int,
    *,
    heartbeat: int | None = 10,
    environment: Mapping[str, str] | None = None,
    **clocks: float | None,
) -> Supervisor:
    """A supervisor of local processes, with everything that they write in ``folder``."""
    directory, artifacts = folder / "trials", folder / "artifacts"
    job = job_for(store, study, directory=directory, artifacts=artifacts, heartbeat=heartbeat)
    processes = LocalProcesses(plan_slots(workers, [], threads=1), directory, environment=environment)
    return Supervisor(store, study, processes, job, **clocks)  # type: ignore[arg-type]


def drain(supervisor: Supervisor, interval: float = 0.1) -> list[PoolSnapshot]:
    return list(supervisor.run(interval=interval))


def slow_base(scenes: int = 800, pause_s: float = 0.03, **more: Any) -> dict[str, Any]:
    return {"budget": {"scenes": scenes, "validate_every": 100}, "pause_s": pause_s, **more}


def same_curves(store: Store, study: Study) -> None:
    """Every trial that ended has, step by step, the curve it has when nothing disturbs it."""
    for trial in counting.live_trials(study.get_trials()):
        report = replay(store, study.study_name, trial.number)
        assert report.identical, (trial.number, report.steps)


def kill_and_resume(store: Store, study: Study, start: Callable[[int], Supervisor], workers: int = 4) -> None:
    """Kill a worker within a trial, stop the run when the loss is known, go on with one worker, and check what is left.

    Args:
        store: the store.
        study: the study, with its tickets, of a program that reports at each step from 1 on.
        start: makes a supervisor of so many workers.
        workers: of the run that is disturbed.
    """
    n_trials, killed = len(study.get_trials()), None
    supervisor = start(workers)
    for snapshot in supervisor.run(interval=0.05):
        trials = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        within = next((trial for trial in trials if (trial.last_step or 0) >= 2), None)
        if killed is None and within is not None:
            killed = within.user_attrs[names.OWNER]
            os.kill(Owner.parse(killed).process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        elif snapshot.tally.retried:
            supervisor.stop()
    assert supervisor.ending == "interrupted"
    last = drain(start(1), 0.2)[-1]
    assert (last.tally.ended, last.tally.open, last.tally.fail) == (n_trials, 0, 0)
    trials = study.get_trials()
    (lost,) = (trial for trial in trials if trial.state == TrialState.FAIL)
    assert lost.user_attrs[names.OWNER] == killed
    successor = next(trial for trial in trials if trial.user_attrs.get(names.PREDECESSOR) == lost.number)
    assert {step: successor.intermediate_values[step] for step in lost.intermediate_values} == lost.intermediate_values
    for trial in counting.live_trials(trials):
        assert list(trial.intermediate_values) == list(range(1, (trial.last_step or 0) + 1))
    same_curves(store, study)


class Driver:
    """The supervisor in its own process."""

    def __init__(self, url: str, folder: Path, n_trials: int, workers: int, **changes: Any) -> None:
        options = {
            "url": url,
            "folder": str(folder),
            "n_trials": n_trials,
            "workers": workers,
            "name": "unit",
            "tree": study_tree(**changes),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "drive.py"), json.dumps(options)], stdout=subprocess.PIPE, text=True
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def when_running(self) -> list[int]:
        """Wait until a trial runs; return the workers' pids."""
        for line in self.lines():
            if line.get("tally", {}).get("running"):
                return [pid for pid in line["pids"] if pid is not None]
        return []  # it ended before anything ran

    def finish(self, timeout: float = 60) -> int:
        assert self.process.stdout is not None
        self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait(timeout)


def table(store: Store) -> list[tuple[Any, ...]]:
    study_id = store.get_study_id_from_name("unit")
    return [
        (trial.number, trial.state.name, trial.values, trial.params, trial.intermediate_values)
        for trial in store.get_all_trials(study_id)
    ]
