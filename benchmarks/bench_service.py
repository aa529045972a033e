"""What the service costs: overhead beside training, trials per second beside plain Optuna, claims under contention.

    python benchmarks/bench_service.py overhead     # trials of 5 s at 1 and 8 workers: share of time outside training
    python benchmarks/bench_service.py store        # trials/s of our path and of plain Optuna's on the same store
    python benchmarks/bench_service.py claims       # tickets taken twice by 8 processes: Optuna's queue, and ours
    python benchmarks/bench_service.py crowd        # 16 processes x 50 trials x 20 reports on one SQLite file

Trials only wait or do nothing, so that the rest is the service's own time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from ris_hpo.search import counting
from ris_hpo.search.files import parse_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, quiet_optuna
from ris_hpo.search.spec import StudySpec
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner, this_process
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import WorkerJob, job_for, run_worker

HERE = Path(__file__).parent
PROGRAM = "idle_program"


def spec_of(name: str, reports: int, pause_s: float, sampler: str = "tpe") -> StudySpec:
    """Return a study of four dimensions whose trials report ``reports`` times, ``pause_s`` apart."""
    tree: dict[str, Any] = {
        "study": {"program": PROGRAM},
        "base": {"budget": {"scenes": reports, "validate_every": 1}, "pause_s": pause_s},
        "space": {
            "shape.a": {"low": 0.0, "high": 1.0},
            "shape.b": {"low": 0.0, "high": 1.0},
            "shape.c": {"low": 1, "high": 9},
            "shape.d": {"choices": ["x", "y", "z"]},
        },
        "sampler": {"name": sampler},
        "pruner": {"name": "none"},
    }
    return parse_study(tree, name=name, source="benchmark")


def begin(store: Store, spec: StudySpec, n_trials: int) -> optuna.Study:
    """Make a study with its tickets."""
    study = create_or_resume_study(store, spec, score_version=1)
    fill_budget(store, study, n_trials)
    return study


def overhead(folder: Path, urls: dict[str, str], seconds: float) -> None:
    """Print the share of the workers' time that is not training."""
    print(f"trials of {seconds:.0f} s with 10 reports; share of the workers' time outside training")
    for kind, url in urls.items():
        for workers, trials in ((1, 6), (8, 48)):
            journal = folder / f"{kind}-{workers}.seconds"
            os.environ["IDLE_JOURNAL"] = str(journal)
            store = open_store(url)
            study = begin(store, spec_of(f"w{workers}", 10, seconds / 10), trials)
            processes = LocalProcesses(plan_slots(workers, []), folder / kind)
            job = job_for(store, study, directory=folder / kind)
            for _ in Supervisor(store, study, processes, job).run():
                pass
            # from a worker's first claim to its last end: starting a process, and waiting for the others' last trials
            # when no ticket is left, are once per study and not per trial
            training = sum(float(line) for line in journal.read_text().split())
            each = [trial.user_attrs["seconds"] for trial in study.get_trials()]
            begun = [trial.datetime_start.timestamp() for trial in study.get_trials() if trial.datetime_start]
            ended = [trial.datetime_complete.timestamp() for trial in study.get_trials() if trial.datetime_complete]
            owners = [trial.user_attrs["owner"].rpartition(":")[0] for trial in study.get_trials()]
            busy = sum(
                max(end for end, who in zip(ended, owners, strict=True) if who == owner)
                - min(start for start, who in zip(begun, owners, strict=True) if who == owner)
                for owner in set(owners)
            )
            share = 1 - training / busy
            inside = statistics.mean(each) - training / trials
            outside = 1000 * (busy - training) / trials
            print(
                f"{kind:10} {workers} workers, {trials} trials: {share:6.2%} outside training "
                f"({outside:.0f} ms a trial, {1000 * inside:.0f} ms of it within the trial)"
            )
            store.close()


def throughput(folder: Path, urls: dict[str, str], trials: int, repeats: int) -> None:
    """Print trials per second of our worker and of plain Optuna, with and without the same attributes."""
    print(f"one process, {trials} trials x 10 reports, random sampler; best of {repeats}, trials/s")
    for kind, url in urls.items():
        ours, plainly, bare = [], [], []
        for repeat in range(repeats):
            store = open_store(url)
            study = begin(store, spec_of(f"ours{repeat}", 10, 0.0, "random"), trials)
            job = WorkerJob(store.address, study.study_name, str(folder / f"{kind}{repeat}"))
            began = time.perf_counter()
            run_worker(job)
            ours.append(trials / (time.perf_counter() - began))
            plainly.append(plain(store, f"plain{repeat}", trials, attributes=True))
            bare.append(plain(store, f"bare{repeat}", trials, attributes=False))
            store.close()
        print(
            f"{kind:10} ours {max(ours):6.1f}   Optuna with the same attributes {max(plainly):6.1f} "
            f"(ratio {max(ours) / max(plainly):.2f})   bare {max(bare):6.1f} (ratio {max(ours) / max(bare):.2f})"
        )


def plain(store: Store, name: str, trials: int, *, attributes: bool) -> float:
    """Trials a second of plain Optuna on the same store, with or without attributes like ours."""
    spec = spec_of(name, 10, 0.0)
    # our settings of the engine (WAL, pool) on both sides: what is compared is the path, not the store
    sampler, pruner = optuna.samplers.RandomSampler(0), optuna.pruners.NopPruner()
    study = optuna.create_study(study_name=name, storage=store, sampler=sampler, pruner=pruner)

    def objective(trial: optuna.Trial) -> float:
        params = spec.suggest(trial)
        if attributes:
            for key in ("config", "seed", "host", "device", "threads"):
                trial.set_user_attr(key, 1)
        for step in range(1, 11):
            trial.report(5.0 / step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        if attributes:
            for key in ("components", "pipeline", "floor", "efficiency", "scenes", "seconds", "rate", "memory"):
                trial.set_user_attr(key, {"k_loc": 1.0})
        return float(params["shape.a"])

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.optimize(objective, n_trials=trials)
    return trials / (time.perf_counter() - began)


def _pop(url: str, study_id: int, ours: bool, start: float, results: Any) -> None:
    if ours:
        store: Any = open_store(url)
    else:
        store = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    study = optuna.load_study(study_name="queue", storage=store, sampler=optuna.samplers.RandomSampler(0))
    taken: list[int] = []
    time.sleep(max(0.0, start - time.time()))
    while True:
        if ours:
            trial_id = store.claim(study_id, str(Owner(this_process(), len(taken))))
        else:
            trial_id = study._pop_waiting_trial_id()
        if trial_id is None:
            break
        taken.append(trial_id)
    results.put(taken)


def claims(folder: Path, tickets: int, processes: int) -> None:
    """Print how many of the tickets several processes took twice."""
    for label, ours in (("Optuna's queue, WAL", False), ("ours", True)):
        url = f"sqlite:///{folder}/{'ours' if ours else 'plain'}.db"
        store = open_store(url)
        study_id = store.create_new_study([optuna.study.StudyDirection.MINIMIZE], "queue")
        store.fill(study_id, lambda present: [ticket() for _ in range(tickets)])
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        start = time.time() + 3.0 + processes
        crew = [context.Process(target=_pop, args=(url, study_id, ours, start, results)) for _ in range(processes)]
        for process in crew:
            process.start()
        taken = [trial_id for _ in crew for trial_id in results.get(timeout=300)]
        for process in crew:
            process.join()
        print(f"{label:22} {processes} processes, {tickets} tickets: {len(taken) - len(set(taken))} taken twice")
        store.close()


def _crowd_worker(url: str, folder: str, results: Any) -> None:
    try:
        report = run_worker(WorkerJob(url, "crowd", folder))
    except Exception as error:  # noqa: BLE001 - the figure asked for is how many of them there are
        results.put((0, f"{type(error).__name__}: {error}"))
        return
    results.put((report.ended, None))


def crowd(folder: Path, processes: int, trials: int, reports: int) -> None:
    """Print the errors and the rate of many processes on one SQLite file."""
    url = f"sqlite:///{folder}/crowd.db"
    store = open_store(url)
    study = begin(store, spec_of("crowd", reports, 0.0, "random"), processes * trials)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    began = time.perf_counter()
    crew = [context.Process(target=_crowd_worker, args=(url, str(folder), results)) for _ in range(processes)]
    for process in crew:
        process.start()
    found = [results.get(timeout=1200) for _ in crew]
    seconds = time.perf_counter() - began
    for process in crew:
        process.join()
    counts = counting.tally(study.get_trials())
    errors = [error for _, error in found if error is not None]
    reported = sum(len(trial.intermediate_values) for trial in study.get_trials())
    complete = sum(trial.state == TrialState.COMPLETE for trial in study.get_trials())
    print(
        f"{processes} processes x {trials} trials x {reports} reports on SQLite: {len(errors)} errors, "
        f"{complete} complete, {counts.open} open, {reported} reports, {seconds:.0f} s "
        f"({complete / seconds:.1f} trials/s, imports included)"
    )
    for error in errors:
        print("  ", error)
    store.close()


def main() -> None:
    """Run the benchmark named on the command line."""
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet_optuna()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "store", "claims", "crowd"))
    parser.add_argument("--postgres", help="address of an empty database to measure too")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the benchmark as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ris-hpo-bench-") as name:
        folder = Path(name)
        urls = {"sqlite": f"sqlite:///{folder}/bench.db"}
        if arguments.postgres:
            urls["postgres"] = arguments.postgres
        options = arguments.options
        if arguments.what == "overhead":
            overhead(folder, urls, options.get("seconds", 5.0))
        elif arguments.what == "store":
            throughput(folder, urls, options.get("trials", 200), options.get("repeats", 3))
        elif arguments.what == "claims":
            claims(folder, options.get("tickets", 400), options.get("processes", 8))
        else:
            crowd(folder, options.get("processes", 16), options.get("trials", 50), options.get("reports", 20))


if __name__ == "__main__":
    main()
