"""What a person sees of one trial in the dashboard: its curve while it runs, and figures of what it found at the end.

    config.toml      the run configuration, as ``train --config`` reads it
    curve.svg        k_loc after each validation beside the floor and the ml reference; redrawn as the trial goes
    counts.svg       estimated against true number of sources, network and pipeline
    errors.svg       RMSE of azimuth, elevation and range against SNR beside the Cramer-Rao floor
    scene.svg        spectrum of one fixed scene with its true and estimated sources
    telemetry.jsonl  events of the run, steps thinned out

All of it is drawn from what the trial computed anyway, as text, for well under 3 % of its time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import optuna
import torch
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from torch import Tensor

from ris_hpo.atomic import make_folder, write_text
from ris_hpo.config import Spec, to_toml
from ris_hpo.errors import OutputError
from ris_hpo.learning.features import back_projection, noise_loading, whiten
from ris_hpo.physics.array import steering
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.report import charts
from ris_hpo.report.charts import Axis, Canvas, Cells, Level, Line, Marks
from ris_hpo.scoring.metrics import SceneErrors, Scores, floor_errors, scene_errors
from ris_hpo.store import attributes as names
from ris_hpo.training import telemetry

if TYPE_CHECKING:
    from ris_hpo.training.results import Conclusion, Findings, Validation

log = logging.getLogger(__name__)

MIMETYPES: Final = {".toml": "application/toml", ".svg": "image/svg+xml", ".jsonl": "application/jsonl"}
SHARE_OF_TIME: Final = 0.02
"""Redrawing the curve of a running trial may take this share of the time since it began."""
MAX_STEPS: Final = 400
BIN_DB: Final = 5
FLOOR_DRAWS: Final = 2

_SCENE_SNR_DB: Final = 10.0
_SCENE_SOURCES: Final = 3
_PIXELS: Final = (61, 31, 16)  # azimuth, elevation, range


class TrialFigures:
    """Writes the artifacts of one trial; a trial taken up again goes on with those it has.

    A figure that cannot be written (a full disk) is logged and left out: it never costs the trial its result. Errors of
    the trial store are not caught, since they say who owns the trial.

    Args:
        study: the study.
        trial: the running trial.
        directory: the trainer's directory, where telemetry stands.
        artifacts: folder of the artifact store, as given to the dashboard.
        clock: seconds.
    """

    def __init__(
        self,
        study: optuna.Study,
        trial: optuna.Trial,
        directory: Path,
        artifacts: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._study, self._trial, self._directory = study, trial, directory
        self._folder = artifacts
        self._clock = clock
        self._begun = clock()
        self._spent = 0.0
        self._store = _Folder(artifacts)
        known = get_all_artifact_meta(trial)
        self._identifiers = {meta.filename: meta.artifact_id for meta in known}
        self._reference = _k_loc(study.user_attrs.get(names.REFERENCE, {}).get("ml"))

    def begin(self, config: Spec) -> None:
        """Write the configuration."""
        head = f"# Trial {self._trial.number} of study {self._study.study_name}, configuration {config.fingerprint()}\n"
        self._put("config.toml", lambda: head + to_toml(config.stored()))

    def follow(self, history: Sequence[Validation]) -> None:
        """Redraw the curve, unless that has taken too much of the trial's time already."""
        if self._spent <= SHARE_OF_TIME * (self._clock() - self._begun):
            self._put("curve.svg", lambda: curve(history, self._trial.number, self._reference))

    def conclude(self, history: Sequence[Validation], conclusion: Conclusion | None) -> None:
        """Write everything else; ``conclusion`` is None for a trial that was pruned. Call it before ``tell``."""
        self._put("curve.svg", lambda: curve(history, self._trial.number, self._reference))
        if conclusion is not None:
            findings = conclusion.findings
            tables = tabulate(findings)
            self._put("counts.svg", lambda: counts(tables, findings.network.max_sources))
            self._put("errors.svg", lambda: errors(tables, findings.scenes))
            self._put("scene.svg", lambda: scene(findings))
        self._put("telemetry.jsonl", lambda: events(self._directory))

    def _put(self, name: str, draw: Callable[[], str]) -> None:
        begun = self._clock()
        try:
            self._write(name, draw())
        except (OSError, OutputError) as error:
            log.warning("trial %d: %s was not written (%s)", self._trial.number, name, error)
        self._spent += self._clock() - begun

    def _write(self, name: str, text: str) -> None:
        known = self._identifiers.get(name)
        if known is None:
            make_folder(self._folder)
            with tempfile.TemporaryDirectory(prefix=".", dir=self._folder) as scratch:
                file = Path(scratch) / name
                file.write_text(text, encoding="utf-8")
                self._identifiers[name] = upload_artifact(
                    artifact_store=self._store,
                    file_path=str(file),
                    study_or_trial=self._trial,
                    mimetype=MIMETYPES[file.suffix],
                )
            return
        write_text(self._folder / known, text)


class _Folder(FileSystemArtifactStore):
    """A folder of artifacts that takes a file as its own, where Optuna's would copy it.

    A full disk is met when that file is written, before the trial is told that it has an artifact.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        os.replace(content_body.name, self.folder / artifact_id)


@dataclass(frozen=True, slots=True)
class PathErrors:
    """Errors of one path, with the SNR bin of every scene; the pipeline's may cover fewer scenes."""

    errors: SceneErrors
    bins: Tensor


def tabulate(findings: Findings) -> dict[str, PathErrors]:
    """Errors of the network and, where it was scored, of the pipeline."""
    tables = {}
    for path, found in (("network", findings.network), ("pipeline", findings.pipeline)):
        if len(found):
            few = findings.scenes[: len(found)]
            tables[path] = PathErrors(scene_errors(found, few.require_truth()), _bins(few))
    return tables


def curve(history: Sequence[Validation], number: int, reference: float | None = None) -> str:
    """k_loc of the network path against scenes seen."""
    points = [(float(validation.scenes_seen), validation.network.k_loc) for validation in history]
    levels = [Level(history[-1].floor.k_loc, "floor")] if history else []
    if reference is not None:
        levels.append(Level(reference, "ml", "warn"))
    low, high = charts.robust([value for _, value in points], [level.value for level in levels])
    best = min(points, key=lambda point: point[1], default=None)
    series: list[charts.Series] = [Line(points, label="network path")]
    if best is not None:
        series.append(Marks([best], "good", f"best {best[1]:.3f}"))
    x = Axis("scenes seen", 0, 1.02 * max((step for step, _ in points), default=1.0))
    canvas = Canvas(720, 340, f"k_loc of trial {number} (lower is better)", standalone=True)
    return charts.plot(series, x, Axis("k_loc", low, high), canvas, levels)


def counts(tables: Mapping[str, PathErrors], max_sources: int) -> str:
    """Confusion of the number of sources, one matrix a path."""
    drawn = []
    size = max_sources + 1
    labels = [str(k) for k in range(size)]
    for path, table in tables.items():
        pairs = table.errors.num_true * size + table.errors.num_estimated
        confusion = torch.bincount(pairs, minlength=size * size).view(size, size).tolist()
        rows = [k for k in range(size) if sum(confusion[k])]
        right = sum(confusion[k][k] for k in range(size)) / max(1, len(table.errors))
        canvas = Canvas(400, 360, f"{path}: {right:.0%} of {len(table.errors)} counts right")
        chosen = [confusion[k] for k in rows]
        drawn.append(charts.matrix(chosen, [labels[k] for k in rows], labels, ("true sources", "estimated"), canvas))
    describe = "Estimated against true number of sources, in shares of each row"
    return charts.side_by_side(drawn, Canvas(400 * len(drawn), 360, standalone=True, describe=describe))


def errors(tables: Mapping[str, PathErrors], scenes: Scenes) -> str:
    """RMSE against SNR for azimuth, elevation and range, beside the Cramer-Rao floor on the network's scenes."""
    bound = _bound(_Frozen(scenes))
    present = sorted(set(tables["network"].bins.tolist()))
    labels = [f"{BIN_DB * index}..{BIN_DB * (index + 1)}" for index in present]
    looks = {"network": ("accent", ""), "pipeline": ("good", ""), "Cramér-Rao": ("mark", "dash")}
    curves: dict[str, dict[int, Scores]] = {}
    for path, table in {**tables, "Cramér-Rao": bound}.items():
        masks = {index: table.bins == index for index in present}
        curves[path] = {index: table.errors[mask].scores() for index, mask in masks.items() if bool(mask.any())}
    panels: dict[str, Callable[[Scores], float]] = {
        "azimuth, deg": lambda scores: scores.rmse_azimuth_deg,
        "elevation, deg": lambda scores: scores.rmse_elevation_deg,
        "range, m": lambda scores: scores.rmse_range_m,
    }
    drawn = []
    for title, figure in panels.items():
        lines = []
        for path, bins in curves.items():
            points = [(float(present.index(index)), max(figure(scores), 1e-6)) for index, scores in bins.items()]
            lines.append(Line(points, looks[path][0], path, looks[path][1]))
        y = Axis.over("RMSE", [value for line in lines for _, value in line.points], log=True)
        drawn.append(charts.plot(lines, Axis.of("SNR, dB", labels), y, Canvas(360, 320, title)))
    describe = "RMSE of azimuth, elevation and range against SNR, beside the Cramér-Rao floor"
    return charts.side_by_side(drawn, Canvas(360 * len(drawn), 320, standalone=True, describe=describe))


def scene(findings: Findings) -> str:
    """Whitened spectrum of one scene over azimuth, elevation and range, with its true and estimated sources.

    The scene is the same for all trials that share their frozen scenes: the first with three sources and 10 dB or more,
    or the nearest to that; one the pipeline has seen where there is one.
    """
    among = len(findings.pipeline) or len(findings.scenes)
    index = chosen_scene(findings.scenes[:among])
    one = findings.scenes[index : index + 1].to("cpu")
    network, pipeline = findings.network[index : index + 1], findings.pipeline[index : index + 1]
    truth = one.require_truth()
    (azimuth, elevation, range_m), power = spectrum_of(_Frozen(one))
    drawn = []
    high = float(elevation[-1].rad2deg())
    planes = (
        (Axis("elevation, deg", float(elevation[0].rad2deg()), high), power.amax(2).T, "elevation"),
        (Axis("range, m", float(range_m[0]), float(range_m[-1]), log=True), power.amax(1).T, "range_m"),
    )
    ends = (float(azimuth[0].rad2deg()), float(azimuth[-1].rad2deg()))
    for axis, values, name in planes:
        marks: list[charts.Series] = [Cells(values.tolist()), Marks(_places(truth, name), "good", "truth")]
        marks.append(Marks(_places(network, name), "bad", "network", "cross"))
        if len(pipeline):
            marks.append(Marks(_places(pipeline, name), "mark", "pipeline", "plus"))
        drawn.append(charts.plot(marks, Axis("azimuth, deg", *ends), axis, Canvas(520, 360)))
    snr = f", {float(one.snr_db[0]):.0f} dB" if one.snr_db is not None else ""
    title = f"Spectrum of scene {index}: {int(truth.num_sources[0])} sources{snr}"
    return charts.side_by_side(drawn, Canvas(1040, 390, title, standalone=True))


def events(directory: Path) -> str:
    """Telemetry with its steps thinned to a few hundred; every other event, and every skipped step, stays."""
    lines, steps = [], 0
    every = list(telemetry.read(directory))
    total = sum(event["event"] == telemetry.STEP for event in every)
    stride = max(1, -(-total // MAX_STEPS))
    for event in every:
        if event["event"] == telemetry.STEP:
            steps += 1
            if (steps - 1) % stride and event.get("taken", True):
                continue
        lines.append(json.dumps(event, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def chosen_scene(scenes: Scenes) -> int:
    """Index of the first scene with three sources and at least 10 dB, or of the one that comes nearest."""
    away = (scenes.require_truth().num_sources - _SCENE_SOURCES).abs().double()
    if scenes.snr_db is not None:
        away = away + (_SCENE_SNR_DB - scenes.snr_db.double()).clamp(min=0) / 10
    return int(away.argmin())


class _Frozen:
    """Scenes that hash by what they hold: the trials of a study share theirs, and what is drawn of them alone."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self._digest = hashlib.sha256(scenes.y.cpu().numpy().tobytes()).digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._digest == other._digest


@functools.lru_cache(maxsize=4)
def _bound(frozen: _Frozen) -> PathErrors:
    """Errors drawn from the Cramer-Rao bound of the scenes."""
    scenes = frozen.scenes
    return PathErrors(floor_errors(scenes, FLOOR_DRAWS), _bins(scenes).repeat(FLOOR_DRAWS))


@functools.lru_cache(maxsize=4)
def spectrum_of(frozen: _Frozen) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Whitened matched-filter spectrum of one scene, log scale, over a box around the default sector and the truth.

    Returns:
        (azimuth rad, elevation rad, range m) axes and power [azimuth, elevation, range] in [0, 1].
    """
    one = frozen.scenes
    truth = one.require_truth()
    known = truth.mask[0]
    sides = []
    for values, (low, high) in ((truth.azimuth, (-60, 60)), (truth.elevation, (-30, 30))):
        margin = values[0][known].rad2deg()
        sides.append((min(low, float(margin.min()) - 3), max(high, float(margin.max()) + 3)))
    nearest, farthest = (float(getattr(truth.range_m[0][known], side)()) for side in ("min", "max"))
    azimuth = torch.linspace(*sides[0], _PIXELS[0]).deg2rad()
    elevation = torch.linspace(*sides[1], _PIXELS[1]).deg2rad()
    range_m = torch.logspace(math.log10(min(0.5, nearest)), math.log10(max(10.0, farthest)), _PIXELS[2])
    y, channel = whiten(one, noise_loading(one, noise_known=True))
    z = back_projection(channel, one.ris_codes, y)[0]
    planes = []
    for distance in range_m:  # a range at a time keeps the steering vectors within a few megabytes
        across, up = torch.meshgrid(azimuth, elevation, indexing="ij")
        atoms = steering(one.geometry, across, up, distance.expand(across.shape))
        planes.append((atoms.conj() @ z.mT).abs().square().sum(-1))
    power = torch.stack(planes, -1).log()
    floor = power.quantile(0.5)
    return (azimuth, elevation, range_m), ((power - floor) / (power.max() - floor)).clamp(min=0)


def _places(sources: Sources, name: str) -> list[charts.Point]:
    mask = sources.mask[0]
    values = getattr(sources, name)[0][mask]
    second = values if name == "range_m" else values.rad2deg()
    return list(zip(sources.azimuth[0][mask].rad2deg().tolist(), second.tolist(), strict=True))


def _k_loc(scores: Mapping[str, Any] | None) -> float | None:
    return None if scores is None else scores.get("k_loc")


def _bins(scenes: Scenes) -> Tensor:
    """[B] index of the SNR bin of each scene; one bin for all where the SNR is not known."""
    if scenes.snr_db is None:
        return torch.zeros(len(scenes), dtype=torch.long, device=scenes.device)
    return (scenes.snr_db / BIN_DB).floor().long()
