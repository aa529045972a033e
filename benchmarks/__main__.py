"""One table in one run, ratios first: ``python -m benchmarks`` prints it and appends it to ``benchmarks/LOG.md``.

Rates are scenes a second, best of a few repetitions. Each ratio has both of its sides measured in this very run, so it
means the same on any machine; the absolute figures below it mean this machine. ``--clone`` adds the minutes that a
newcomer waits: clone, environment, first finished trial.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import bench_service, pruning
from benchmarks.weights import find
from ris_hpo import RunConfig, Scenes, SceneSpec, Trainer, estimate, localize, simulate
from ris_hpo.estimators import ols, spectrum_maxima
from ris_hpo.learning.inference import network_sources, predict
from ris_hpo.learning.network import large
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.files import load_scenes, save_scenes
from ris_hpo.scoring.metrics import floor_scores, score
from ris_hpo.search.lifecycle import quiet_optuna
from ris_hpo.store.open import open_store
from ris_hpo.training.trainer import load_network
from ris_hpo.workers.worker import WorkerJob, run_worker

HERE = Path(__file__).parent
LOG = HERE / "LOG.md"
SCENES, TRIALS = 256, 40


def rate(function: Callable[[], object], items: int, repeats: int) -> float:
    """Items a second: the best of ``repeats`` after one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return items / best


def physics_and_learning(device: str, repeats: int) -> dict[str, float]:
    """Rates of everything that computes, the network that ships at its work."""
    scenes = simulate(SceneSpec(), 1, range(SCENES), device=device)
    few = scenes[:64]
    network, config = load_network(find("default"), device)
    inference = config.inference
    figures = {
        "simulation": rate(lambda: simulate(SceneSpec(), 1, range(512), device=device), 512, repeats),
        "deterministic bound": rate(lambda: deterministic_crb(few), 64, repeats),
        "ml, blind": rate(lambda: estimate("ml", few), 64, 1),
        "control, blind": rate(
            lambda: ols(few, spectrum_maxima(few, inference.proposals), inference.likelihood), 64, repeats
        ),
        "network path": rate(lambda: network_sources(predict(network, scenes), inference), SCENES, repeats),
        "validation (network path, scores)": rate(
            lambda: score(network_sources(predict(network, scenes), inference), scenes.require_truth()), SCENES, repeats
        ),
        "floor": rate(lambda: floor_scores(few), 64, 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scenes.npz"
        save_scenes(file, scenes)

        def from_file() -> object:
            batch: Scenes = load_scenes(file).to(device)
            return localize(network, batch, inference)

        figures["pipeline, blind, file read included"] = rate(from_file, SCENES, repeats)
        figures["training, base"] = training(RunConfig(), Path(folder) / "base", device)
        grown = RunConfig().replaced({"network": large().model_dump(mode="json")})
        figures["training, large"] = training(grown, Path(folder) / "large", device)
    return figures


def training(config: RunConfig, folder: Path, device: str) -> float:
    """Scenes a second of a few steps of 64 scenes, their generation included and validations left out."""
    changes = {"optimizer.batch_size": 64, "budget.scenes": 512, "budget.validate_every": 512}
    trainer = Trainer(config.replaced({**changes, "budget.validation_scenes": 64}), folder, device=device)
    for _ in trainer.run():
        continue
    return trainer.scenes_seen / trainer.seconds


def service() -> dict[str, float]:
    """Trials a second of the service's whole path and of plain Optuna's on the same store; what pruning saves."""
    quiet_optuna()
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"{folder}/bench.db")
        study = bench_service.begin(store, bench_service.spec_of("ours", 10, 0.0, "random"), TRIALS)
        job = WorkerJob(store.address, study.study_name, f"{folder}/trials")
        began = time.perf_counter()
        run_worker(job)
        ours = TRIALS / (time.perf_counter() - began)
        plain = bench_service.plain(store, "plain", TRIALS, attributes=True)
        store.close()
    rows = json.loads(pruning.CURVES.read_text())
    steps = rows[0]["steps"][1::2]
    saved, regret = pruning.average([row["k_loc"][1::2] for row in rows], steps, {"name": "asha"}, orders=20)
    return {"trials": ours, "plain trials": plain, "saved": saved, "regret": regret}


def clone() -> float:
    """Minutes from ``git clone`` to a finished trial by the two commands of the README."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", str(HERE.parent), f"{folder}/tree"], check=True)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RIS_HPO")}
        command = ["make", "-C", f"{folder}/tree", "run", "SPACE=wide", "TRIALS=1"]
        subprocess.run(command, check=True, env=plain, stdout=subprocess.DEVNULL)
        return (time.perf_counter() - began) / 60


def table(rates: dict[str, float], served: dict[str, float], minutes: float | None, device: str) -> str:
    """The figures as Markdown, ratios first."""
    pipeline = rates["pipeline, blind, file read included"]
    ratios = {
        "pipeline over ml": f"{pipeline / rates['ml, blind']:.2f}",
        "pipeline over control": f"{pipeline / rates['control, blind']:.2f}",
        "network path over pipeline": f"{rates['network path'] / pipeline:.2f}",
        "simulation over training, base": f"{rates['simulation'] / rates['training, base']:.1f}",
        "bound over ml": f"{rates['deterministic bound'] / rates['ml, blind']:.0f}",
        "trials a second over plain Optuna's, same attributes": f"{served['trials'] / served['plain trials']:.2f}",
        "store and service of a trial of 5 s": f"{1 / served['trials'] / 5:.2%}",
        "scenes that asha saves on recorded curves": f"{served['saved']:.0%} (regret {served['regret']:.2f} %)",
    }
    if minutes is not None:
        ratios["minutes from clone to the first finished trial"] = f"{minutes:.1f}"
    now = datetime.now().astimezone().isoformat(timespec="minutes")
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} {'thread' if threads == 1 else 'threads'}, {device}"
    lines = [f"## {now}: speed", "", f"{machine}; ris-hpo {version('ris-hpo')}, torch {torch.__version__}.", ""]
    lines += ["| Ratio | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in ratios.items()]
    lines += ["", "| Scenes a second | |", "|---|---|"]
    lines += [f"| {name} | {value:,.1f} |" for name, value in rates.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clone", action="store_true", help="also time a newcomer's first trial (minutes)")
    parser.add_argument("--no-log", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    minutes = clone() if arguments.clone else None
    text = table(physics_and_learning(arguments.device, arguments.repeats), service(), minutes, arguments.device)
    print(text)
    if not arguments.no_log:
        with LOG.open("a", encoding="utf-8") as log:
            log.write("\n" + text)


if __name__ == "__main__":
    main()
