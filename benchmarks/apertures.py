"""Whether the grid and the steps of ``ml`` follow the aperture: its success beside the floor's on many surfaces.

    python -m benchmarks.apertures [--scenes 12] [--only 32x32]

Scenes with one and with two sources at 20 dB, the count unknown. Prints rows of a table; each should be within .03.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

from ris_hpo import estimate, score
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.scene import SceneSpec, grid_of_cells
from ris_hpo.scoring.metrics import floor_scores

LONG, SHORT = 0.0857, 0.0107  # 3.5 and 28 GHz
CASES = (
    # horizontal, vertical, spacing, wavelength, antennas, snapshots: each value of each at least twice
    (8, 8, 0.5, LONG, 16, 16),
    (8, 8, 0.4, SHORT, 4, 64),
    (12, 12, 0.5, LONG, 1, 256),
    (12, 12, 0.5, SHORT, 64, 1),
    (12, 12, 0.4, 0.3, 16, 16),
    (64, 1, 0.5, LONG, 16, 16),
    (64, 1, 0.4, SHORT, 16, 64),
    (8, 32, 0.5, LONG, 16, 16),
    (8, 32, 0.4, SHORT, 64, 4),
    (16, 16, 0.5, LONG, 64, 64),
    (16, 16, 0.4, SHORT, 16, 16),
    (32, 32, 0.5, 0.3, 16, 16),
    (32, 32, 0.5, SHORT, 16, 16),
    (32, 32, 0.4, LONG, 4, 64),
    (48, 48, 0.5, SHORT, 16, 16),
    (48, 48, 0.4, LONG, 16, 16),
)


def rows(scenes: int, only: str | None) -> Iterator[str]:
    """One row of the table a case, as it is measured."""
    yield "| surface | cells | M | L | floor | `ml` | K_acc | s a scene | peak GB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for horizontal, vertical, spacing, wavelength, antennas, snapshots in CASES:
        name = f"{horizontal}x{vertical}"
        if only not in (None, name):
            continue
        geometry = Geometry(
            num_horizontal=horizontal, num_vertical=vertical, spacing_wavelengths=spacing, wavelength_m=wavelength
        )
        elevation = (0.0, 0.0) if vertical == 1 else (-30.0, 30.0)
        spec = SceneSpec(geometry=geometry, num_antennas=antennas, num_snapshots=snapshots, elevation_deg=elevation)
        grid = GridSpec().replaced({"region.elevation_deg": elevation})
        drawn = grid_of_cells(spec, 9_501, [20.0], [1, 2], scenes)
        began = time.perf_counter()
        from ris_hpo.estimators import EstimatorSpec, LikelihoodSpec

        found = estimate("ml", drawn, EstimatorSpec(likelihood=LikelihoodSpec(grid=grid)))
        seconds = (time.perf_counter() - began) / len(drawn)
        scored, floor = score(found, drawn.require_truth()), floor_scores(drawn)
        cells = "x".join(str(size) for size in grid.on(geometry)[:3])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        title = f"{name}, {spacing:g} of {wavelength:g} m"
        yield (
            f"| {title} | {cells} | {antennas} | {snapshots} | {floor.success:.2f} | {scored.success:.2f} "
            f"| {scored.k_acc:.2f} | {seconds:.2f} | {peak:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=12, help="of each count")
    parser.add_argument("--only", help="one size, such as 32x32")
    given = parser.parse_args()
    for row in rows(given.scenes, given.only):
        print(row, flush=True)


if __name__ == "__main__":
    main()
