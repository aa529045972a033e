"""Networks by paths (``network``, ``fast``, ``pipeline``), with ``ml`` and the floor, on the same scenes in one run.

    python -m benchmarks.paths untrained runs/base default --seed 52077 --scenes 1000
    python -m benchmarks.paths default --seed 52077 --scenes 1000 --record default

Rates are by processor time of one core, features and refinement included; on a busy machine only their ratios hold.
What has been measured is kept in a file per seed and number of scenes, so that a run that was broken off goes on.
``--record`` writes the figures of a shipped network's paths into its file, from where ``localize --fast`` tells them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch

from benchmarks.weights import find
from ris_hpo.estimators import estimate
from ris_hpo.learning.inference import InferenceSpec, find_sources
from ris_hpo.learning.inference import Path as Way
from ris_hpo.learning.network import Network
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import Scores, floor_scores, score
from ris_hpo.training import checkpoint
from ris_hpo.training.finished import load_network

PART = 500  # scenes at once


def trained(name: str) -> tuple[Network, InferenceSpec]:
    """A run's folder, a file, weights that ship, or the form of ``default`` with random weights."""
    network, config = load_network(find("default" if name == "untrained" else name))
    if name == "untrained":
        torch.manual_seed(0)
        network = Network(config.network).eval()
    return network, config.inference


def main() -> None:
    """Measure what is missing, print the table, and record it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--seed", type=int, default=52_077)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = Path(f"build/paths-{arguments.seed}-{arguments.scenes}.json")
    rows: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    scenes = simulate(SceneSpec(), arguments.seed, range(arguments.scenes))

    def row(name: str, method: Callable[[slice], Sources]) -> None:
        if name in rows:
            return
        began, parts = time.process_time(), []
        for start in range(0, len(scenes), PART):
            parts.append(method(slice(start, start + PART)))
        rate = len(scenes) / (time.process_time() - began)
        keep(name, score(Sources.cat(parts), scenes.require_truth()), rate)

    def keep(name: str, scores: Scores, rate: float = 0.0) -> None:
        figures = {key: round(getattr(scores, key), 4) for key in ("k_loc", "k_acc", "success")}
        rows[name] = figures | {"scenes_per_second": round(rate, 2)}
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(rows, indent=1))
        print(name, rows[name], flush=True)

    if "floor" not in rows:
        keep("floor", floor_scores(scenes))
    for name in arguments.networks:
        network, inference = trained(name)
        for path in get_args(Way):
            spec = inference.of(path)
            row(f"{name}, {path}", lambda few, n=network, s=spec, p=path: find_sources(n, scenes[few], s, p))  # type: ignore[misc]
    row("ml", lambda few: estimate("ml", scenes[few]))
    print(f"seed {arguments.seed}, {len(scenes)} scenes\n")
    print("| | k_loc | K_acc | success | scenes/s |\n|---|---|---|---|---|")
    for name, figures in rows.items():
        rate = f"{figures['scenes_per_second']:.1f}" if figures["scenes_per_second"] else ""
        print(f"| {name} | {figures['k_loc']:.3f} | {figures['k_acc']:.3f} | {figures['success']:.3f} | {rate} |")
    if arguments.record is not None:
        file = find(arguments.record)
        tensors, state = checkpoint.read(file)
        paths = {path: rows[f"{arguments.record}, {path}"] for path in get_args(Way)}
        others = {"ml": rows["ml"], "floor": rows["floor"], "seed": arguments.seed, "scenes": len(scenes)}
        state["provenance"] = state["provenance"] | {"paths": paths | others}
        checkpoint.write(file, tensors, state)


if __name__ == "__main__":
    main()
