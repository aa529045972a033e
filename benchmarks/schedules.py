"""Learning-rate schedules at equal compute: what a rung says, and what going on gives.

    python -m benchmarks.schedules --scenes 4096 --rung 1024 --seeds 2

The base configuration with three schedules, scored at a rung and at the end on the same scenes: a cosine planned for
the end, a cosine planned for the rung (which cannot go on), and ``wsd``, whose branch decays at the rung. ``trained``
counts the scenes that were trained on, those of the branch included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from ris_hpo.training.config import RunConfig
from ris_hpo.training.trainer import Trainer


def run(changes: dict[str, Any], seed: int, validation: int) -> dict[int, float]:
    """Train and return ``k_loc`` of the network's path by scenes seen."""
    config = RunConfig().replaced(
        {"seed": seed, "budget.pipeline_scenes": 0, "budget.validation_scenes": validation} | changes
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder))
        return {validation.scenes_seen: validation.network.k_loc for validation in trainer.run()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scenes", type=int, default=4096)
    parser.add_argument("--rung", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--validation", type=int, default=256, help="scenes of the validation set")
    given = parser.parse_args()
    whole = {"budget.scenes": given.scenes, "budget.validate_every": given.rung}
    share = RunConfig().optimizer.decay_share
    schedules: dict[str, tuple[dict[str, Any], int]] = {
        "cosine, planned for the end": (whole, given.scenes),
        "cosine, planned for the rung": ({**whole, "budget.scenes": given.rung}, given.rung),
        "wsd, branch at the rung": (
            {**whole, "optimizer.schedule": "wsd", "budget.rungs": [given.rung]},
            given.scenes + round(share * given.rung),
        ),
    }
    print(f"| schedule | seed | k_loc at {given.rung} | k_loc at {given.scenes} | trained | s |")
    print("|---|---|---|---|---|---|")
    for name, (changes, trained) in schedules.items():
        for seed in range(given.seeds):
            began = time.process_time()
            curve = run(changes, seed, given.validation)
            end = f"{curve[given.scenes]:.3f}" if given.scenes in curve else "-"
            seconds = time.process_time() - began
            print(f"| {name} | {seed} | {curve[given.rung]:.3f} | {end} | {trained} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
