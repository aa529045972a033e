"""How long the dashboard, its figures and the report make people and trials wait, as recorded in the log of figures.

OMP_NUM_THREADS=1 python -m benchmarks.bench_dashboard load
OMP_NUM_THREADS=1 python -m benchmarks.bench_dashboard load --postgres
OMP_NUM_THREADS=1 python -m benchmarks.bench_dashboard figures
OMP_NUM_THREADS=1 python -m benchmarks.bench_dashboard winner
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import statistics
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ris_hpo.dashboard.server import Dashboard
from ris_hpo.report.html import write_report
from ris_hpo.report.study_page import write_page
from ris_hpo.results.winner import judge
from ris_hpo.store import attributes as names
from ris_hpo.store.open import open_store
from tests.postgres import Postgres

TOKEN = "benchmark-of-the-dashboard"
SPACE = {
    "optimizer.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "network.width": IntDistribution(16, 256, step=16),
    "network.front_end": CategoricalDistribution(["spectra", "tokens"]),
    **{f"loss.term_{index}": FloatDistribution(0.0, 1.0) for index in range(9)},
}


def drawn(distribution: BaseDistribution, draw: random.Random) -> object:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return draw.choice(choices)
        case IntDistribution(low=first, high=last, step=step):
            return first + step * draw.randrange((last - first) // step + 1)
        case FloatDistribution(low=low, high=high, log=True):
            return math.exp(draw.uniform(math.log(low), math.log(high)))
        case FloatDistribution(low=low, high=high):
            return draw.uniform(low, high)
    raise TypeError(distribution)


def fill(study: optuna.Study, trials: int, reports: int) -> None:
    draw = random.Random(0)
    for start in range(0, trials, 100):
        added = []
        for number in range(start, min(start + 100, trials)):
            params = {name: drawn(distribution, draw) for name, distribution in SPACE.items()}
            quality = 2 + draw.random()
            scores = {f"figure_{index}": draw.random() for index in range(16)} | {"k_loc": quality}
            marks = {
                names.COMPONENTS: scores, names.PIPELINE: scores, names.FLOOR: 1.03, names.EFFICIENCY: 0.7,
                names.SECONDS: 60.0, names.SCENES: 20_000 * reports, names.HOST: "node", names.DEVICE: "cpu",
                names.THREADS: 1, names.CONFIG_FINGERPRINT: f"{number:016x}",
            }  # fmt: skip
            curve = {20_000 * i: quality + 4 * math.exp(-i / 12) for i in range(1, reports + 1)}
            figures = {
                f"artifacts:{number:08d}-0000-0000-0000-{index:012d}": json.dumps(
                    {"artifact_id": f"{number:08d}-0000-0000-0000-{index:012d}", "filename": f"{index}.svg",
                     "mimetype": "image/svg+xml", "encoding": None}
                )
                for index in range(6)
            }  # fmt: skip
            trial = create_trial(
                state=TrialState.COMPLETE, value=quality, params=params, distributions=SPACE,
                intermediate_values=curve, user_attrs=marks, system_attrs=figures,
            )  # fmt: skip
            added.append(trial)
        study.add_trials(added)


def ask(site: Dashboard, path: str) -> tuple[float, float, int]:
    """Seconds by the clock, seconds of processor time (visitor included), bytes."""
    place = urllib.parse.urlsplit(site.url)
    assert place.hostname is not None
    begun, cpu = time.perf_counter(), time.process_time()
    connection = http.client.HTTPConnection(place.hostname, place.port or 80, timeout=120)
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept-Encoding": "gzip"}
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200, (path, response.status)
    connection.close()
    return time.perf_counter() - begun, time.process_time() - cpu, len(body)


def load(arguments: argparse.Namespace) -> None:
    """First page and polling on a study of ``--trials`` trials with ``--reports`` reports, while a trial reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url, server = f"sqlite:///{folder}/studies.db", None
        if arguments.postgres:
            server = Postgres(folder)
            url = server.url()
        store = open_store(url, heartbeat=None)
        study = optuna.create_study(storage=store, study_name="load")
        begun = time.perf_counter()
        fill(study, arguments.trials, arguments.reports)
        write_page(study, store, folder / "artifacts")
        print(f"filled in {time.perf_counter() - begun:.1f} s")
        for wait in (0.0, 5.0):
            served = open_store(url, heartbeat=None)
            site = Dashboard(served, folder / "artifacts", token=TOKEN, port=0)
            thread = threading.Thread(target=site.run)
            thread.start()
            time.sleep(wait)
            parts = {path: ask(site, path) for path in ("/dashboard", "/api/studies", "/api/studies/1")}
            whole, cpu = (sum(part[index] for part in parts.values()) for index in (0, 1))
            size = sum(part[2] for part in parts.values())
            print(
                f"first page, {wait:.0f} s after the start: {whole:.2f} s, processor {cpu:.2f} s, {size / 1e3:.0f} kB"
            )
            if wait:
                poll(site, study, arguments.trials)
            site.close()
            thread.join()
            served.close()
        begun = time.process_time()
        write_report(study, folder / "report.html")
        size = (folder / "report.html").stat().st_size
        print(f"report: processor {time.process_time() - begun:.2f} s, {size / 1e3:.0f} kB")
        store.close()
        if server is not None:
            server.close()


def poll(site: Dashboard, study: optuna.Study, trials: int) -> None:
    done = threading.Event()

    def report() -> None:
        trial, step = study.ask(SPACE), 0
        while not done.wait(0.2):
            step += 20_000
            trial.report(3.0, step)

    writer = threading.Thread(target=report)
    writer.start()
    seconds, cpu = [], []
    for _ in range(40):
        taken = ask(site, f"/api/studies/1?after={trials}")
        seconds.append(taken[0])
        cpu.append(taken[1])
        time.sleep(0.5)
    done.set()
    writer.join()
    for name, values in (("clock", seconds), ("processor", cpu)):
        print(f"polling, {name}: median {statistics.median(values):.3f} s, slowest of 40 {max(values):.3f} s")


def figures(arguments: argparse.Namespace) -> None:
    """What the figures of a trial cost beside the trial itself, in processor time."""
    from ris_hpo.report.trial_figures import TrialFigures
    from ris_hpo.search.files import load_study
    from ris_hpo.training.trainer import Trainer

    spec = load_study(arguments.space)
    if arguments.scenes:
        spec = spec.with_base({"budget.scenes": arguments.scenes})
    config = spec.config({})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = optuna.create_study(storage=open_store(f"sqlite:///{folder}/studies.db", heartbeat=None))
        for number in range(3):
            trial, run = study.ask(), folder / str(number)
            begun, own = time.process_time(), 0.0

            def spend(work: object, *given: object) -> None:
                nonlocal own
                before = time.process_time()
                work(*given)  # type: ignore[operator]
                own += time.process_time() - before

            drawn = TrialFigures(study, trial, run, folder / "artifacts")
            spend(drawn.begin, config)
            trainer = Trainer(config, run)
            for _ in trainer.run():
                spend(drawn.follow, trainer.history)
            conclusion = trainer.conclude()
            spend(drawn.conclude, trainer.history, conclusion)
            whole = time.process_time() - begun
            size = sum(file.stat().st_size for file in (folder / "artifacts").iterdir()) / (number + 1)
            share = f"{own / whole:.1%} of {whole:.2f} s"
            print(f"{arguments.space}, trial {number}: figures {own:.3f} s, {share}; {size / 1e3:.0f} kB a trial")


def winner(arguments: argparse.Namespace) -> None:
    """How often pure noise passes for a winner, and a real lead for none."""
    generator = np.random.default_rng(0)
    for seeds in (3, 5, 10):
        wrong = named = 0
        for _ in range(arguments.repetitions):
            table = generator.normal(size=(4, seeds))
            wrong += judge(["a", "b", "c"], table).distinguishable
            table[2] -= arguments.lead
            verdict = judge(["a", "b", "c"], table)
            named += verdict.distinguishable and verdict.winner == "b"
        total = arguments.repetitions
        print(f"{seeds} seeds: noise passes {wrong / total:.1%}, {arguments.lead:g} sigma named {named / total:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tasks = parser.add_subparsers(required=True)
    for task in (load, figures, winner):
        part = tasks.add_parser(task.__name__)
        part.set_defaults(task=task)
        if task is load:
            part.add_argument("--trials", type=int, default=1000)
            part.add_argument("--reports", type=int, default=50)
            part.add_argument("--postgres", action="store_true")
        if task is figures:
            part.add_argument("--space", default="smoke")
            part.add_argument("--scenes", type=int, default=0)
        if task is winner:
            part.add_argument("--repetitions", type=int, default=2000)
            part.add_argument("--lead", type=float, default=4.0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments.task(arguments)


if __name__ == "__main__":
    main()
