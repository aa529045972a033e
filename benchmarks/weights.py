"""Figures of trained networks beside ``ml``, the control and the floor; and the files that ship.

    python -m benchmarks.weights ship runs/default default       # figures, then ris_hpo/weights/default.safetensors
    python -m benchmarks.weights ship runs/imperfect imperfect --error-db -10
    python -m benchmarks.weights figures default --seed 9101 --per-cell 20
    python -m benchmarks.weights robust default
    python -m benchmarks.weights covariance runs/a runs/b

Scenes lie on cells of SNR by source count, seeds are arguments; all methods see the same scenes in one run. The control
is the same refinement and evidence with the plain spectrum's maxima, as many, in place of the network's proposals.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ris_hpo
from ris_hpo.estimators import EstimatorSpec, estimate, ols, spectrum_maxima
from ris_hpo.estimators.spectrum import localize_covariance
from ris_hpo.learning.hybrid import HybridSpec, covariances
from ris_hpo.learning.inference import InferenceSpec, localize, network_sources, predict, sharpened
from ris_hpo.learning.losses import label_factor, nmse
from ris_hpo.learning.network import Network
from ris_hpo.physics.scene import Scenes, SceneSpec, grid_of_cells
from ris_hpo.physics.sources import TOLERANCE, Sources
from ris_hpo.scoring.matching import match
from ris_hpo.scoring.metrics import CAP, Scores, floor_scores, score
from ris_hpo.training import checkpoint
from ris_hpo.training.trainer import load_network

SNR_DB, COUNTS = [-5.0, 0.0, 5.0, 10.0, 15.0, 20.0], [1, 2, 3, 4, 5]
SHIPPED = Path(ris_hpo.__file__).parent / "weights"


def find(name: str) -> Path:
    """A run's folder, a file, or weights that ship."""
    return Path(name) if Path(name).exists() else SHIPPED / f"{name}.safetensors"


def timed(function: Callable[[], Sources]) -> tuple[Sources, float]:
    """Result and processor time, which is the clock's on a machine with nothing else to do."""
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


def methods(
    network: Network, spec: InferenceSpec, scenes: Scenes, error_db: float | None
) -> dict[str, tuple[Sources, float]]:
    """Estimates and seconds of everything that stands in the table."""
    localize(network, scenes[:8], spec)
    found = {
        "pipeline": timed(lambda: localize(network, scenes, spec)),
        "network path": timed(lambda: network_sources(predict(network, scenes), spec)),
        "control": timed(lambda: ols(scenes, spectrum_maxima(scenes, spec.proposals), spec.likelihood)),
        "ml": timed(lambda: estimate("ml", scenes)),
    }
    if error_db is not None:
        stated = EstimatorSpec.parse({"likelihood": {"channel_error_db": error_db}})
        found["ml, error stated"] = timed(lambda: estimate("ml", scenes, stated))
    return found


def table(found: Mapping[str, tuple[Sources, float]], scenes: Scenes) -> dict[str, dict[str, Any]]:
    """Print K_acc, success and k_loc: all scenes, below 5 dB, per SNR; return the first two."""
    truth, snr = scenes.require_truth(), scenes.snr_db
    assert snr is not None
    groups = {"all": snr > -100, "< 5 dB": snr < 5, "0..20": snr >= 0} | {
        f"{value:g} dB": snr == value for value in SNR_DB
    }
    print("| | scenes/s | " + " | ".join(groups) + " |\n" + "|---" * (len(groups) + 2) + "|")
    result: dict[str, dict[str, Any]] = {}

    def line(name: str, speed: str, scores: Mapping[str, Scores]) -> None:
        cells = [f"{s.k_acc:.3f} {s.success:.3f} {s.k_loc:.2f}" for s in scores.values()]
        print(f"| {name} | {speed} | " + " | ".join(cells) + " |", flush=True)
        kept = ("k_acc", "success", "k_loc")
        result[name] = {
            group: {key: round(getattr(scores[group], key), 4) for key in kept} for group in ("all", "< 5 dB")
        }

    for name, (sources, seconds) in found.items():
        line(name, f"{len(scenes) / seconds:.0f}", {group: score(sources[m], truth[m]) for group, m in groups.items()})
    line("floor", "", {group: floor_scores(scenes[m]) for group, m in groups.items()})
    return result


def calibration(sources: Sources, truth: Sources) -> dict[str, float]:
    """How far reported probabilities and covariances are to be believed, over the reported sources.

    ``ece_count``: expected calibration error over ten bins of existence as defined, p(K >= slot | y). ``ece_near``:
    the same against "a true source is within the score's caps", which existence does not claim. ``nees``: mean squared
    error of found sources (within the tolerances of a success) under their covariance; 3 where calibrated.
    """
    assert sources.existence is not None
    order = torch.arange(1, sources.max_sources + 1).expand_as(sources.mask)
    there = truth.num_sources.unsqueeze(-1) >= order
    found, padded, paired = match(sources, truth)
    error = torch.stack(
        [(getattr(found, n) - getattr(padded, n)).abs() for n in ("azimuth", "elevation", "range_m")], -1
    )
    near = paired & (error < error.new_tensor(CAP)).all(-1)
    hit = paired & (error < error.new_tensor(TOLERANCE)).all(-1)
    assert found.existence is not None
    assert found.covariance_m2 is not None
    offset = (found.positions() - padded.positions())[hit].double()
    precise = torch.linalg.solve(found.covariance_m2[hit].double(), offset.unsqueeze(-1)).squeeze(-1)
    return {
        "ece_count": round(calibration_error(sources.existence[sources.mask], there[sources.mask]), 4),
        "ece_near": round(calibration_error(found.existence[found.mask], near[found.mask]), 4),
        "nees": round(float((offset * precise).sum(-1).mean()), 3),
    }


def calibration_error(said: Tensor, true: Tensor, bins: int = 10) -> float:
    """Mean distance between what was said and how often it was true, over bins of what was said."""
    place = (said * bins).long().clamp(max=bins - 1)
    gaps = [
        (said[place == b].double().mean() - true[place == b].double().mean()).abs() * (place == b).double().mean()
        for b in place.unique()
    ]
    return float(torch.stack(gaps).sum())


def figures(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    network, config = load_network(path)
    error = arguments.error_db
    spec = SceneSpec() if error is None else SceneSpec(channel_error_db=(error, error))
    scenes = grid_of_cells(spec, arguments.seed, SNR_DB, COUNTS, arguments.per_cell)
    print(
        f"{path.stem}: seed {arguments.seed}, {arguments.per_cell} scenes a cell, channel error {error} dB; "
        f"K_acc, success, k_loc"
    )
    found = methods(network, config.inference, scenes, error)
    scores = table(found, scenes)
    calibrated = calibration(found["pipeline"][0], scenes.require_truth())
    print(json.dumps(calibrated))
    return {"seed": arguments.seed, "per_cell": arguments.per_cell, "error_db": error, "scores": scores, **calibrated}


def ship(arguments: argparse.Namespace) -> None:
    run = Path(arguments.run)
    tensors, state = checkpoint.read(run / checkpoint.BEST)
    names = ("torch", "numpy", "ris-hpo")
    state["provenance"] = {
        "versions": {name: version(name) for name in names},
        "scenes_seen": state["scenes_seen"],
        "figures": figures(arguments, run),
    }
    target = SHIPPED / f"{arguments.name}.safetensors"
    checkpoint.write(target, tensors, state)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def robust(arguments: argparse.Namespace) -> None:
    """One network on data of another kind, ``ml`` beside it: snapshots, codes, power law, channel error, wave."""
    network, config = load_network(find(arguments.name))
    kinds: dict[str, dict[str, Any]] = {"as trained": {}}
    kinds |= {f"L = {count}": {"num_snapshots": count} for count in (8, 32, 64)}
    kinds |= {f"{codes} codes": {"codes": codes} for codes in ("dft", "hadamard")}
    kinds |= {"p ~ 1/r^2": {"power_law": "path_loss"}, "channel error -20 dB": {"channel_error_db": (-20.0, -20.0)}}
    kinds |= {"Fresnel data": {"geometry.wave": "fresnel"}, "coherent symbols": {"symbols": "coherent"}}
    print("| data | pipeline: K_acc success k_loc | network path | ml | floor |\n|---|---|---|---|---|")
    for name, changes in kinds.items():
        scenes = grid_of_cells(SceneSpec().replaced(changes), arguments.seed, SNR_DB[1:], COUNTS, arguments.per_cell)
        scenes = dataclasses.replace(scenes, geometry=network.spec.geometry)  # the receiver believes in its own wave
        truth, outputs = scenes.require_truth(), predict(network, scenes)
        rows = [
            score(localize(network, scenes, config.inference, outputs=outputs), truth),
            score(network_sources(outputs, config.inference), truth),
            score(estimate("ml", scenes), truth),
            floor_scores(scenes),
        ]
        print(
            f"| {name} | " + " | ".join(f"{s.k_acc:.2f} {s.success:.2f} {s.k_loc:.2f}" for s in rows) + " |", flush=True
        )


def covariance(arguments: argparse.Namespace) -> None:
    """How well R_pred alone tells the sources at 10 dB, K <= 3, the count known."""
    scenes = grid_of_cells(SceneSpec(), arguments.seed, [10.0], COUNTS[:3], arguments.per_cell)
    truth, label = scenes.require_truth(), label_factor(scenes.require_truth(), scenes.geometry)
    count = truth.num_sources
    print(
        "| network | steps | scenes seen | NMSE | subspace overlap | F1: MUSIC | MVDR |\n|---|---|---|---|---|---|---|"
    )
    for name, steps in itertools.product(arguments.runs, (0, 5)):
        path = find(name)
        network, config = load_network(path)
        outputs = predict(network, scenes)
        if steps:
            spec = config.inference.replaced({"hybrid.sharpening": steps})
            outputs = sharpened(network, scenes, outputs, spec)
        predicted = covariances(outputs, scenes, HybridSpec()).predicted
        scores = [
            score(localize_covariance(scenes.geometry, predicted, kind, count, max_sources=5), truth).f1
            for kind in ("music", "mvdr")
        ]
        error = float(nmse(predicted, label @ label.mH).mean())
        seen = checkpoint.read(path / checkpoint.BEST if path.is_dir() else path)[1]["scenes_seen"]
        overlap = float(subspace_overlap(predicted, label, count).mean())
        cells = f"{steps} | {seen:,} | {error:.3f} | {overlap:.3f} | {scores[0]:.3f} | {scores[1]:.3f}"
        print(f"| {name} | {cells} |", flush=True)


def subspace_overlap(predicted: Tensor, label: Tensor, count: Tensor) -> Tensor:
    """||U^H V||_F^2 / K [B] between the true signal subspace and the K leading eigenvectors of R_pred."""
    vectors = torch.linalg.eigh(predicted)[1]
    shares = []
    for scene, k in enumerate(count.tolist()):
        basis = torch.linalg.svd(label[scene], full_matrices=False)[0][:, :k]
        shares.append((basis.mH @ vectors[scene, :, -k:]).abs().square().sum() / k)
    return torch.stack(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=9101)
    parser.add_argument("--per-cell", type=int, default=20)
    parser.add_argument("--error-db", type=float)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ship").add_argument("run")
    commands.choices["ship"].add_argument("name")
    for command in ("figures", "robust"):
        commands.add_parser(command).add_argument("name")
    commands.add_parser("covariance").add_argument("runs", nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "figures":
        figures(arguments, find(arguments.name))
    else:
        {"ship": ship, "robust": robust, "covariance": covariance}[arguments.command](arguments)


if __name__ == "__main__":
    main()
