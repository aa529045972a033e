"""Speed and accuracy of the physics and the classical estimators, as recorded in the log of figures.

OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/bench_physics.py speed
OMP_NUM_THREADS=1 python benchmarks/bench_physics.py table --estimator ml --seed 1 --per-cell 20
OMP_NUM_THREADS=1 python benchmarks/bench_physics.py efficiency
OMP_NUM_THREADS=1 python benchmarks/bench_physics.py spectrum
OMP_NUM_THREADS=1 python benchmarks/bench_physics.py counting
OMP_NUM_THREADS=1 python benchmarks/bench_physics.py rough
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ris_hpo.estimators import EstimatorSpec, estimate, refine
from ris_hpo.estimators.covariance import count_from_snapshots
from ris_hpo.physics.bounds import deterministic_crb, stochastic_crb
from ris_hpo.physics.scene import Scenes, SceneSpec, grid_of_cells, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import floor_scores, score

SNR_DB = [0.0, 5.0, 10.0, 15.0, 20.0]
COUNTS = [1, 2, 3, 4, 5]


def rate(function: Callable[[], object], items: int, repeats: int = 3) -> str:
    """Best of a few runs, by the clock and by processor time (the same on a machine with nothing else to do)."""
    function()
    wall = cpu = float("inf")
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        function()
        wall = min(wall, time.perf_counter() - start)
        cpu = min(cpu, time.process_time() - start_cpu)
    return f"{items / wall:.1f} scenes/s by the clock, {items / cpu:.1f} by processor time"


def speed(arguments: argparse.Namespace) -> None:
    spec = SceneSpec()
    print(f"simulation, batches of 256: {rate(lambda: simulate(spec, 1, range(256)), 256)}")
    scenes = simulate(spec, arguments.seed, range(256))
    print(f"deterministic bound: {rate(lambda: deterministic_crb(scenes), 256)}")
    print(f"stochastic bound: {rate(lambda: stochastic_crb(scenes), 256)}")
    part = scenes[:64]
    for name in ("ml", "spectrum-maxima", "music", "mvdr", "modified-music"):
        print(f"{name}, blind, 64 scenes: {rate(functools.partial(estimate, name, part), 64, 2)}")
    start = part.require_truth()
    print(f"refine from the truth, 10 steps: {rate(lambda: refine(part, start, 10), 64)}")


def table(arguments: argparse.Namespace) -> None:
    scenes = grid_of_cells(SceneSpec(), arguments.seed, SNR_DB, COUNTS, arguments.per_cell)
    truth = scenes.require_truth()
    overrides = dict(item.split("=", 1) for item in arguments.set)
    spec = EstimatorSpec(num_candidates=arguments.candidates).replaced(overrides)
    start = time.perf_counter()
    found = estimate(arguments.estimator, scenes, spec, truth.num_sources if arguments.known else None)
    seconds = time.perf_counter() - start
    print(f"{arguments.estimator} seed {arguments.seed} known={arguments.known}: {len(scenes) / seconds:.1f} scenes/s")
    print("SNR  K_acc  success floor  k_loc floor  RMSE az el r")
    for snr in [*SNR_DB, None]:
        rows = torch.ones(len(scenes), dtype=torch.bool) if snr is None else scenes.snr_db == snr
        s, f = score(found[rows], truth[rows]), floor_scores(scenes[rows])
        name = "all" if snr is None else f"{snr:.0f}"
        print(
            f"{name:>4} {s.k_acc:.3f}  {s.success:.3f} {f.success:.3f}  {s.k_loc:.2f} {f.k_loc:.2f}  "
            f"{s.rmse_azimuth_deg:.2f} {s.rmse_elevation_deg:.2f} {s.rmse_range_m:.2f}"
        )
    for count in COUNTS:
        rows = truth.num_sources == count
        s, f = score(found[rows], truth[rows]), floor_scores(scenes[rows])
        print(f"K={count} K_acc {s.k_acc:.3f} success {s.success:.3f} floor {f.success:.3f} k_loc {s.k_loc:.2f}")


def matched_errors(found: Sources, truth: Sources) -> tuple[Tensor, Tensor]:
    """Slots of the truth nearest to each estimate (few, well separated sources) and Cartesian errors [n, 3]."""
    distance = torch.cdist(found.positions(), truth.positions())
    distance = distance.masked_fill(~truth.mask.unsqueeze(1), torch.inf)
    index = distance.argmin(-1)
    error = found.positions() - truth.positions().gather(1, index.unsqueeze(-1).expand(-1, -1, 3))
    return index, error.double()


def efficiency(arguments: argparse.Namespace) -> None:
    overrides = dict(item.split("=", 1) for item in arguments.set)
    spec = EstimatorSpec.parse({"likelihood": {"range_estimate": arguments.range_estimate}}).replaced(overrides)
    for snr in (10.0, 15.0, 20.0):
        for count in (1, 2, 3):
            scenes = grid_of_cells(SceneSpec(), arguments.seed, [snr], [count], arguments.per_cell)
            truth = scenes.require_truth()
            found = estimate("ml", scenes, spec, count)
            index, error = matched_errors(found, truth)
            bound = deterministic_crb(scenes)
            rows = torch.arange(len(scenes)).unsqueeze(-1)
            polar = torch.stack([found.azimuth, found.elevation, found.range_m], -1)
            true = torch.stack([truth.azimuth, truth.elevation, truth.range_m], -1)[rows, index]
            difference = (polar - true).double()[found.mask]
            covariance = bound[rows, index][found.mask]
            ratio = difference.square() / covariance.diagonal(dim1=-2, dim2=-1)
            assert found.covariance_m2 is not None
            own = found.covariance_m2.double()[found.mask]
            e = error[found.mask].unsqueeze(-1)
            nees = (e.mT @ torch.linalg.solve(own, e)).flatten()
            # a source is an outlier when it is off by more than its scene's tolerance for reasons other than noise
            kept = (nees < 30) & (ratio < 30).all(-1)
            q, n = ratio[kept], nees[kept]
            mean, error_of_mean = q.mean(0).tolist(), (q.std(0) / len(q) ** 0.5).tolist()
            inside = " ".join(f"{m:.2f}+-{s:.2f}" for m, s in zip(mean, error_of_mean, strict=True))
            calibration = f"NEES {n.mean():.2f}+-{n.std() / len(n) ** 0.5:.2f}"
            print(
                f"SNR {snr:.0f} K {count}: error^2/CRB az el r {inside}; {calibration}"
                f" outliers {1 - kept.double().mean():.3f} of {len(kept)}",
                flush=True,
            )


def separated(scenes: Scenes, gap: float = 2 / 12) -> Scenes:
    """Scenes whose sources are a beam width apart in (v, w)."""
    truth = scenes.require_truth()
    direction = torch.stack([truth.elevation.cos() * truth.azimuth.sin(), truth.elevation.sin()], -1)
    distance = torch.cdist(direction, direction)
    other = ~torch.eye(truth.max_sources, dtype=torch.bool)
    pair = truth.mask.unsqueeze(-1) & truth.mask.unsqueeze(-2) & other
    return scenes[((distance > gap) | ~pair).all(-1).all(-1)]


def spectrum(arguments: argparse.Namespace) -> None:
    scenes = separated(simulate(SceneSpec(num_sources=(1, 3)), arguments.seed, range(300)))
    truth = scenes.require_truth()
    for covariance in ("truth", "refined", "least-squares"):
        for name in ("music", "mvdr", "modified-music"):
            found = estimate(name, scenes, EstimatorSpec(covariance=covariance), truth.num_sources)
            s = score(found, truth)
            print(f"{covariance} {name}: F1 {s.f1:.3f} success {s.success:.3f} ({len(scenes)} scenes)", flush=True)


def counting(arguments: argparse.Namespace) -> None:
    scenes = grid_of_cells(SceneSpec(), arguments.seed, SNR_DB, COUNTS, arguments.per_cell)
    truth = scenes.require_truth().num_sources
    for criterion in ("mdl", "aic", "sorte"):
        right = (count_from_snapshots(scenes, criterion, 5) == truth).double()
        print(
            f"{criterion}: K_acc {right.mean():.3f}",
            [round(right[scenes.snr_db == s].mean().item(), 2) for s in SNR_DB],
        )


def rough(arguments: argparse.Namespace) -> None:
    for level in (-30.0, -20.0, -10.0):
        spec = SceneSpec(channel_error_db=(level, level))
        scenes = grid_of_cells(spec, arguments.seed, SNR_DB, COUNTS, arguments.per_cell)
        truth = scenes.require_truth()
        for stated in (None, level):
            chosen = EstimatorSpec.parse({"likelihood": {"channel_error_db": stated}})
            for known in (False, True):
                s = score(estimate("ml", scenes, chosen, truth.num_sources if known else None), truth)
                print(
                    f"channel error {level:.0f} dB, stated {stated}, K known {known}: "
                    f"K_acc {s.k_acc:.3f} success {s.success:.3f} k_loc {s.k_loc:.2f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "table", "efficiency", "spectrum", "counting", "rough"])
    parser.add_argument("--estimator", default="ml")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-cell", type=int, default=20)
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--range-estimate", default="mode")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {
        "speed": speed, "table": table, "efficiency": efficiency, "spectrum": spectrum, "counting": counting,
        "rough": rough,
    }[arguments.what](arguments)  # fmt: skip


if __name__ == "__main__":
    main()
