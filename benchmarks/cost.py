"""CPU seconds a scene and peak memory of each part, over elements, antennas and snapshots.

    python -m benchmarks.cost                # a table, one process a row
    python -m benchmarks.cost --row 16 64 64 # one row: 16 x 16 elements, 64 antennas, 64 snapshots

Half a wavelength at 28 GHz; 4 scenes at 15 dB; process time, so that a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from ris_hpo import estimate
from ris_hpo.learning.inference import InferenceSpec, localize, network_sources, predict
from ris_hpo.learning.network import Network, NetworkSpec
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.scene import SceneSpec, simulate

ROWS = ((8, 4, 4), (8, 16, 16), (12, 16, 16), (16, 16, 256), (16, 64, 64), (24, 16, 16), (32, 16, 16), (32, 64, 64),
        (48, 16, 16))  # fmt: skip
SCENES = 4


def row(side: int, antennas: int, snapshots: int) -> str:
    """One row of the table."""
    torch.set_num_threads(1)
    geometry = Geometry(num_horizontal=side, num_vertical=side, wavelength_m=0.0107)
    spec = SceneSpec(geometry=geometry, num_antennas=antennas, num_snapshots=snapshots, snr_db=(15, 15))
    scenes = simulate(spec, 3, range(SCENES))
    network = Network(NetworkSpec(geometry=geometry)).eval()
    settings = InferenceSpec()
    outputs = predict(network, scenes)  # and the dictionary is made
    parts: dict[str, Callable[[], object]] = {
        "simulation": lambda: simulate(spec, 3, range(SCENES)),
        "bound": lambda: deterministic_crb(scenes),
        "features": lambda: network.features(scenes),
        "network": lambda: network_sources(predict(network, scenes), settings),
        "pipeline": lambda: localize(network, scenes, settings, outputs=outputs),
        "ml": lambda: estimate("ml", scenes),
    }
    figures = []
    for part in parts.values():
        began = time.process_time()
        part()
        figures.append(f"{(time.process_time() - began) / SCENES:.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"| {side * side} | {antennas} | {snapshots} | {' | '.join(figures)} | {peak:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", type=int, nargs=3, metavar=("SIDE", "M", "L"))
    given = parser.parse_args()
    if given.row:
        print(row(*given.row))
        return
    print("| N | M | L | simulation | bound | features | network | pipeline | `ml` | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for sizes in ROWS:
        subprocess.run([sys.executable, "-m", "benchmarks.cost", "--row", *map(str, sizes)], check=True)


if __name__ == "__main__":
    main()
