"""CPU seconds a scene and peak memory of each part, over elements, antennas and snapshots.

    python -m benchmarks.cost                # a table, one process a row
    python -m benchmarks.cost --row 16 64 64 # one row: 16 x 16 elements, 64 antennas, 64 snapshots
    python -m benchmarks.cost --spectra      # whether a spectrum would be faster by sub-apertures or separable terms

Half a wavelength at 28 GHz; 4 scenes at 15 dB; process time, so that a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from ris_hpo import estimate
from ris_hpo.learning.inference import InferenceSpec, localize, network_sources, predict
from ris_hpo.learning.network import Network, NetworkSpec
from ris_hpo.physics.array import Cosines, Geometry
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.grid import GridSpec, responses, spectrum
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


def spectra(side: int) -> str:
    """One row of the table of spectra: the product as it is, and the larger part of what could replace it.

    Sub-apertures of 4 x 4 elements: a plane wave fits each, so its beams (29 x 17 over the sector) are formed once, and
    every cell takes the nearest beam of each block, turned by the phase of the block's centre. Timed is this second
    stage alone. Separable terms: with y and v on one side, z and w on the other, the dictionary of the nearest plane is
    a sum of r products of functions of either; counted are the products that r terms take, for an error of 1e-3.
    """
    torch.set_num_threads(1)
    geometry = Geometry(num_horizontal=side, num_vertical=side, wavelength_m=0.0107)
    grid, elements, blocks, beams = GridSpec().on(geometry), side * side, (side // 4) ** 2, 29 * 17
    cells = math.prod(grid.shape)
    torch.manual_seed(1)
    z = torch.randn(1, 16, elements, dtype=torch.complex64)
    spectrum(geometry, z, grid)  # and the dictionary is made
    began = time.process_time()
    for _ in range(5):
        spectrum(geometry, z, grid)
    product = (time.process_time() - began) / 5

    formed = torch.randn(blocks, beams, 16, dtype=torch.complex64)
    nearest = torch.randint(0, beams, (blocks, cells))
    turned = torch.randn(blocks, cells, 1, dtype=torch.complex64)
    began = time.process_time()
    total = torch.zeros(cells, 16, dtype=torch.complex64)
    for block in range(blocks):
        total.addcmul_(formed[block].index_select(0, nearest[block]), turned[block])
    total.abs().square().sum(1)
    second_stage = time.process_time() - began

    axes = grid.axes()
    v, w = torch.meshgrid(axes.v[::4], axes.w[::4], indexing="ij")
    atoms = responses(geometry, Cosines(v.reshape(-1), w.reshape(-1), axes.rho[-1].expand(v.numel())))
    sides = atoms.view(*v.shape, side, side).permute(0, 3, 1, 2)  # v, y; w, z
    energy = torch.linalg.svdvals(sides.reshape(v.shape[0] * side, -1)).square()
    left = (energy.flip(0).cumsum(0).flip(0) / energy.sum()).sqrt()
    terms = int((left > 1e-3).sum())
    separable = terms * (elements * grid.num_v + side * grid.num_v * grid.num_w) / 1e6
    quarter = elements * grid.num_v * grid.num_w / 4e6
    return (
        f"| {elements} | {cells:,} | {product:.3f} | {second_stage:.3f} | {terms} | {separable:.1f} | {quarter:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", type=int, nargs=3, metavar=("SIDE", "M", "L"))
    parser.add_argument("--spectra", action="store_true")
    given = parser.parse_args()
    if given.spectra:
        print("| N | cells | product, s | second stage of sub-apertures, s | terms | their products, M | today's, M |")
        print("|---|---|---|---|---|---|---|")
        for side in (24, 32, 48):
            print(spectra(side), flush=True)
        return
    if given.row:
        print(row(*given.row))
        return
    print("| N | M | L | simulation | bound | features | network | pipeline | `ml` | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for sizes in ROWS:
        subprocess.run([sys.executable, "-m", "benchmarks.cost", "--row", *map(str, sizes)], check=True)


if __name__ == "__main__":
    main()
