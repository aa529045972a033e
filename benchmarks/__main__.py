"""One table in one run, ratios first: ``python -m benchmarks`` prints it and appends it to ``benchmarks/LOG.md``.

Rates are scenes a second, best of a few repetitions. Each ratio has both of its sides measured in this very run, so it
means the same on any machine; the absolute figures below it mean this machine.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from ris_hpo import RunConfig, Scenes, SceneSpec, Trainer, estimate, localize, simulate
from ris_hpo.learning.inference import network_sources, predict
from ris_hpo.learning.metrics import floor_scores, score
from ris_hpo.learning.network import Network
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.files import load_scenes, save_scenes

LOG = Path(__file__).parent / "LOG.md"
SCENES = 64


def rate(function: Callable[[], object], items: int, repeats: int) -> float:
    """Items a second: the best of ``repeats`` after one to warm up."""
    function()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return items / best


def measure(device: str, repeats: int) -> dict[str, float]:
    """Every rate by name."""
    config = RunConfig()
    scenes = simulate(SceneSpec(), 1, range(SCENES), device=device)
    network = Network(config.network).to(device).eval()
    figures = {
        "simulation": rate(lambda: simulate(SceneSpec(), 1, range(512), device=device), 512, repeats),
        "deterministic bound": rate(lambda: deterministic_crb(scenes), SCENES, repeats),
        "ml, blind": rate(lambda: estimate("ml", scenes), SCENES, 1),
        "spectrum maxima, blind": rate(lambda: estimate("spectrum-maxima", scenes), SCENES, repeats),
        "network path": rate(lambda: network_sources(predict(network, scenes), config.inference), SCENES, repeats),
        "pipeline, blind": rate(lambda: localize(network, scenes, config.inference), SCENES, repeats),
        "validation": rate(lambda: score(scenes.require_truth(), scenes.require_truth()), SCENES, repeats),
        "floor": rate(lambda: floor_scores(scenes), SCENES, 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scenes.npz"

        def through_a_file() -> Scenes:
            save_scenes(file, scenes)
            return load_scenes(file)

        figures["scene file, written and read"] = rate(through_a_file, SCENES, repeats)
        figures["training, generation included"] = training(Path(folder) / "run", device)
    return figures


def training(folder: Path, device: str) -> float:
    """Scenes a second of a short run of the default configuration, its validations left out."""
    config = RunConfig().replaced({"budget.scenes": 512, "budget.validate_every": 512, "budget.pipeline_scenes": 0})
    trainer = Trainer(config, folder, device=device)
    for _ in trainer.run():
        continue
    return trainer.scenes_seen / trainer.seconds


def table(figures: dict[str, float], device: str) -> str:
    """The figures as Markdown, ratios first."""
    pairs = {
        "pipeline / ml": ("pipeline, blind", "ml, blind"),
        "pipeline / spectrum maxima": ("pipeline, blind", "spectrum maxima, blind"),
        "simulation / training": ("simulation", "training, generation included"),
        "bound / ml": ("deterministic bound", "ml, blind"),
    }
    now = datetime.now().astimezone().isoformat(timespec="minutes")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"
    lines = [f"## {now}: speed", "", f"{machine}; ris-hpo {version('ris-hpo')}, torch {torch.__version__}.", ""]
    lines += ["| Ratio | |", "|---|---|"]
    lines += [f"| {name} | {figures[above] / figures[below]:.2f} |" for name, (above, below) in pairs.items()]
    lines += ["", "| Scenes a second | |", "|---|---|"]
    lines += [f"| {name} | {value:,.1f} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-log", action="store_true", help="print only")
    arguments = parser.parse_args()
    text = table(measure(arguments.device, arguments.repeats), arguments.device)
    print(text)
    if not arguments.no_log:
        with LOG.open("a", encoding="utf-8") as log:
            log.write("\n" + text)


if __name__ == "__main__":
    main()
