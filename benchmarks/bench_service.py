"""What the service costs: overhead beside training, trials per second beside plain Optuna, claims under contention.

    python benchmarks/bench_service.py overhead     # trials of 5 s at 1 and 8 workers: share of time outside training
    python benchmarks/bench_service.py store        # trials/s of our path and of plain Optuna's on the same store
    python benchmarks/bench_service.py claims       # tickets taken twice by 8 processes: Optuna's queue, and ours
    python benchmarks/bench_service.py crowd        # 16 processes x 50 trials x 20 reports on one SQLite file
    python -m benchmarks.bench_service scale --keep FOLDER   # 10,000 trials x 50 reports, 64 workers, on PostgreSQL

``scale`` keeps its database and the figures that it has in FOLDER, and goes on where it was interrupted.

Trials only wait or do nothing, so that the rest is the service's own time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from ris_hpo.dashboard.server import Dashboard
from ris_hpo.errors import StoreError
from ris_hpo.search import counting
from ris_hpo.search.files import parse_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, get_study, quiet_optuna, status
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner, this_process
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import WorkerJob, job_for, run_worker

HERE = Path(__file__).parent
PROGRAM = "idle_program:PROGRAM"
PAGE_TOKEN = "benchmark-of-the-service"


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


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Return seconds by the clock and of this process's processor that ``work`` takes."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return {"clock_s": round(time.perf_counter() - began, 3), "processor_s": round(time.process_time() - cpu, 3)}


def _filled(url: str, trials: int, reports: int) -> dict[str, float]:
    """Make a study of ended trials with attributes as large as real ones, and tickets behind them."""
    spec, draw = spec_of("scale", reports, 0.0, "random"), random.Random(0)
    ranges = {name: dimension.distribution() for name, dimension in spec.space.items()}
    scores = {f"figure_{index}": 0.5 for index in range(16)} | {"k_loc": 2.0}
    marks = {names.COMPONENTS: scores, names.PIPELINE: scores, names.FLOOR: 1.0, names.EFFICIENCY: 0.7}
    marks |= {names.SECONDS: 60.0, names.SCENES: reports, names.HOST: "node", names.DEVICE: "cpu", names.THREADS: 1}

    def work() -> None:
        store = open_store(url)
        create_or_resume_study(store, spec, score_version=1)
        study_id, ended = store.get_study_id_from_name("scale"), []
        for number in range(trials):
            params = {"shape.a": draw.random(), "shape.b": draw.random(), "shape.c": draw.randint(1, 9), "shape.d": "x"}
            curve = {step: 5.0 / step + draw.random() for step in range(1, reports + 1)}
            ended.append(
                create_trial(
                    value=curve[reports],
                    params=params,
                    distributions=ranges,
                    intermediate_values=curve,
                    user_attrs=marks,
                )
            )
            ended[-1].number = number
        times = {trial.number: (trial.datetime_start, trial.datetime_complete) for trial in ended}
        with store.tickets.transaction(study_id) as connection:
            store.tickets.add_trials(connection, study_id, ended, times)
        store.close()

    return measured(work)


def _first_page(url: str, folder: Path, wait_s: float) -> dict[str, dict[str, float]]:
    """Return what each part of the first pages takes, ``wait_s`` after the dashboard was started."""
    store = open_store(url, create=False)
    number, found = store.get_study_id_from_name("scale"), {}
    with Dashboard(store, folder / "artifacts", token=PAGE_TOKEN, port=0) as site:
        thread = threading.Thread(target=site.run)
        thread.start()
        time.sleep(wait_s)
        for path in ("/studies", f"/studies/{number}", "/dashboard", "/api/studies", f"/api/studies/{number}"):
            request = urllib.request.Request(
                site.url.removesuffix("/studies") + path, headers={"Authorization": f"Bearer {PAGE_TOKEN}"}
            )

            def get(request: urllib.request.Request = request) -> None:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    answer.read()

            found[path] = measured(get)
        site.close()
        thread.join()
    store.close()
    return found


def _look(url: str, over: Any, seen: Any) -> None:
    """Read a study again and again, as a supervisor does, and tell what a look takes and how memory grows."""
    store, process, memory, seconds = open_store(url, create=False), psutil.Process(), [], []
    study_id = store.get_study_id_from_name("scale")
    store.get_all_trials(study_id, deepcopy=False)
    seen.put("ready")
    while not over.wait(0.5):
        seconds.append(measured(lambda: store.get_all_trials(study_id, deepcopy=False))["processor_s"])
        memory.append(round(process.memory_info().rss / 1e6, 1))
    figures = {"looks": len(seconds), "median_processor_s": statistics.median(seconds)}
    seen.put(figures | {"first_MB": memory[0], "half_MB": memory[len(memory) // 2], "last_MB": memory[-1]})
    store.close()


def _claims_of_many(url: str, workers: int, each: int, pause_s: float) -> dict[str, Any]:
    """Return how long claims take while many workers, each with a store of its own, mostly wait."""
    store = open_store(url)
    study_id = store.get_study_id_from_name("scale")
    store.fill(study_id, lambda present: [ticket() for _ in range(workers * each)])
    seconds: list[float] = []
    problems: list[str] = []

    def work(place: int) -> None:
        draw, own = random.Random(place), open_store(url, retry_s=60)
        try:
            for turn in range(each):
                time.sleep(draw.uniform(0, 2 * pause_s))
                began = time.perf_counter()
                number = own.claim(study_id, str(Owner(this_process(), 1000 * place + turn)))
                seconds.append(time.perf_counter() - began)
                if number is None:
                    break
                trial_id = own.get_trial_id_from_study_id_trial_number(study_id, number)
                own.record_heartbeat(trial_id)
                own.set_trial_intermediate_value(trial_id, 1, 3.0)
                own.set_trial_state_values(trial_id, TrialState.COMPLETE, [3.0])
        except StoreError as error:
            problems.append(str(error))
        finally:
            own.close()

    context = multiprocessing.get_context("spawn")
    seen, over = context.Queue(), context.Event()
    looker = context.Process(target=_look, args=(url, over, seen))
    looker.start()
    seen.get(timeout=300)  # it has read the study
    crew = [threading.Thread(target=work, args=(place,)) for place in range(workers)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    over.set()
    looks = seen.get(timeout=300)
    looker.join()
    ordered = sorted(seconds)
    store.close()
    return {
        "claims": len(ordered),
        "median_ms": round(1000 * ordered[len(ordered) // 2], 1),
        "p95_ms": round(1000 * ordered[int(0.95 * len(ordered))], 1),
        "slowest_ms": round(1000 * ordered[-1], 1),
        "problems": problems[:3],
        "another process that looks every half second": looks,
    }


def _connections(url: str, most: int) -> dict[str, Any]:
    """Return how many stores can be open at once, and what the one too many is told."""
    opened: list[Store] = []
    try:
        for _ in range(most):
            opened.append(open_store(url, create=False))
            opened[-1].get_all_studies()
    except StoreError as error:
        return {"opened": len(opened), "then": str(error).partition(": ")[2]}
    finally:
        for store in opened:
            store.close()
    return {"opened": len(opened)}


def scale(folder: Path, trials: int, reports: int, workers: int, each: int, pause_s: float) -> None:
    """Print what a large study costs in status, pages, claims, memory and connections; keep it in ``folder``."""
    from tests.postgres import Postgres

    server = Postgres(folder)
    url = sqlalchemy.make_url(server.uri).set(database="scale").render_as_string(hide_password=False)
    journal = folder / "figures.json"
    figures: dict[str, Any] = json.loads(journal.read_text()) if journal.exists() else {}

    def step(name: str, work: Callable[[], Any]) -> None:
        if name not in figures:
            load = os.getloadavg()[0]
            figures[name] = {"load": round(load, 1), "found": work()}
            journal.write_text(json.dumps(figures, indent=1))
        print(f"{name}: {json.dumps(figures[name]['found'])} (load {figures[name]['load']})", flush=True)

    if "fill" not in figures:
        server.execute("DROP DATABASE IF EXISTS scale")
        server.execute("CREATE DATABASE scale")
    step("fill", lambda: _filled(url, trials, reports))
    store = open_store(url, create=False)
    step("status", lambda: measured(lambda: status(store, "scale")))
    step("all trials, whole", lambda: measured(lambda: get_study(store, "scale").get_trials(deepcopy=False)))
    step("status where they are known", lambda: measured(lambda: status(store, "scale")))
    store.close()
    for wait_s in (0.0, 20.0):
        step(f"pages {wait_s:.0f} s after the start", partial(_first_page, url, folder, wait_s))
    step(f"claims of {workers} workers", lambda: _claims_of_many(url, workers, each, pause_s))
    step("connections", lambda: _connections(url, 200))

    def queue() -> dict[str, Any]:
        own = open_store(url)
        study_id = own.get_study_id_from_name("scale")
        own.fill(study_id, lambda present: [ticket() for _ in range(trials)])
        taken = []
        for turn in range(50):
            began = time.perf_counter()
            own.claim(study_id, str(Owner(this_process(), 10**6 + turn)))
            taken.append(1000 * (time.perf_counter() - began))
        own.close()
        return {"waiting": trials, "median_ms": round(statistics.median(taken), 1), "slowest_ms": round(max(taken), 1)}

    step("claims of one worker with a full queue", queue)
    server.close()


def main() -> None:
    """Run the benchmark named on the command line."""
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet_optuna()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "store", "claims", "crowd", "scale"))
    parser.add_argument("--postgres", help="address of an empty database to measure too")
    parser.add_argument("--keep", type=Path, help="folder of 'scale', with a short path: a socket lies in it")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the benchmark as JSON")
    arguments = parser.parse_args()
    options = arguments.options
    if arguments.what == "scale":
        keep = arguments.keep or Path(tempfile.mkdtemp(prefix="ris", dir="/tmp"))
        keep.mkdir(exist_ok=True)
        scale(
            keep,
            options.get("trials", 10_000),
            options.get("reports", 50),
            options.get("workers", 64),
            options.get("each", 5),
            options.get("pause_s", 5.0),
        )
        return
    with tempfile.TemporaryDirectory(prefix="ris-hpo-bench-") as name:
        folder = Path(name)
        urls = {"sqlite": f"sqlite:///{folder}/bench.db"}
        if arguments.postgres:
            urls["postgres"] = arguments.postgres
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
