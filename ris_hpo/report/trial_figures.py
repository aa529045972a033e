"""Files of one trial for the dashboard: its configuration, its curve while it runs, and figures of its result.

    config.toml      the run configuration, as ``train --config`` reads it
    curve.svg        k_loc after each validation beside the floor and the ml reference; redrawn as the trial runs
    counts.svg       estimated against true number of sources, network and pipeline
    errors.svg       RMSE of azimuth, elevation and range against SNR beside the Cramer-Rao floor
    scene.svg        spectrum of one fixed scene with its true and estimated sources
    telemetry.jsonl  events of the run, steps thinned out

The figures show what the trial has computed anyway; drawing them takes about half a second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import optuna
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ris_hpo import drawing
from ris_hpo.config import Spec, to_toml
from ris_hpo.drawing import LIGHT
from ris_hpo.learning.features import back_projection, noise_loading, whiten
from ris_hpo.physics.array import steering
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.report.artifacts import Artifacts
from ris_hpo.scoring.metrics import SceneErrors, Scores, floor_errors, scene_errors
from ris_hpo.store import attributes as names
from ris_hpo.store.folders import ARTIFACTS
from ris_hpo.training import telemetry

if TYPE_CHECKING:
    from ris_hpo.training.results import Conclusion, Findings, Validation

SHARE_OF_TIME: Final = 0.02
"""Redrawing the curve of a running trial may take this share of the time since it began."""
MAX_STEPS: Final = 400
"""Steps of the telemetry that are kept."""
BIN_DB: Final = 5
FLOOR_DRAWS: Final = 2

_SCENE_SNR_DB: Final = 10.0
_SCENE_SOURCES: Final = 3
_PIXELS: Final = (61, 31, 16)  # azimuth, elevation, range
_SPECTRUM: Final = LinearSegmentedColormap.from_list("spectrum", [to_rgba(LIGHT["accent"], a) for a in (0.0, 0.85)])


class TrialFigures:
    """Writes the artifacts of one trial; a trial that is resumed goes on with those it has.

    A figure that cannot be drawn or written is logged, noted in the trial's attributes, and left out.

    Args:
        study: the study.
        trial: the running trial.
        directory: the trainer's directory, where telemetry is.
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
        self._clock = clock
        self._begun = clock()
        self._spent = 0.0
        self._artifacts = Artifacts(trial, artifacts, directory / ARTIFACTS)
        self._missing: dict[str, str] = {}
        self._reference = _k_loc(study.user_attrs.get(names.REFERENCE, {}).get("ml"))

    def begin(self, config: Spec) -> None:
        """Write the configuration."""
        head = f"# Trial {self._trial.number} of study {self._study.study_name}, configuration {config.fingerprint()}\n"
        self._put("config.toml", lambda: head + to_toml(config.stored()))

    def show(self, objects: Mapping[str, Any]) -> None:
        """Draw what the training program hands out: ``history``, and ``conclusion`` at the end."""
        if "conclusion" in objects:
            self.conclude(objects["history"], objects["conclusion"])
        else:
            self.follow(objects["history"])

    def follow(self, history: Sequence[Validation]) -> None:
        """Redraw the curve, unless that has taken too much of the trial's time already."""
        if self._spent <= SHARE_OF_TIME * (self._clock() - self._begun):
            self._put("curve.svg", lambda: curve(history, self._trial.number, self._reference))

    def conclude(self, history: Sequence[Validation], conclusion: Conclusion | None) -> None:
        """Write everything else; ``conclusion`` is None for a trial that was pruned. Call it before ``tell``."""
        self._put("curve.svg", lambda: curve(history, self._trial.number, self._reference))
        if conclusion is not None:
            findings = conclusion.findings
            tables = functools.cache(lambda: tabulate(findings))
            self._put("counts.svg", lambda: counts(tables(), findings.network.max_sources))
            self._put("errors.svg", lambda: errors(tables(), findings.scenes))
            self._put("scene.svg", lambda: scene(findings))
        self._put("telemetry.jsonl", lambda: events(self._directory))

    def _put(self, name: str, make: Callable[[], str]) -> None:
        begun = self._clock()
        error = self._artifacts.put(name, make)
        if error is not None and self._missing.get(name) != error:
            self._missing[name] = error
            self._trial.set_user_attr(names.FIGURES_MISSING, dict(self._missing))
        self._spent += self._clock() - begun


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
    """Draw k_loc of the network path against scenes seen."""
    scenes = [validation.scenes_seen for validation in history]
    values = [validation.network.k_loc for validation in history]
    levels: list[drawing.Level] = []
    if history:
        levels.append((history[-1].floor.k_loc, f"floor {history[-1].floor.k_loc:.2f}", "mark"))
    if reference is not None:
        levels.append((reference, f"ml {reference:.2f}", "warn"))
    heading = f"k_loc of trial {number} (lower is better)"

    def draw(figure: Figure) -> None:
        room = drawing.room_for(levels)
        (axes,) = drawing.frames(figure, x="scenes seen", y="k_loc", heading=heading, right=room)
        axes.plot(scenes, values, "o-", color=LIGHT["accent"], markersize=4, label="network path")
        best = min(zip(values, scenes, strict=True), default=None)
        if best is not None:
            ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
            axes.plot([best[1]], [best[0]], "o", color=LIGHT["good"], label=f"best {best[0]:.3f}", **ring)
        axes.set_xlim(0, 1.02 * max(scenes, default=1))
        axes.set_ylim(*drawing.bulk(values, 1.0))
        drawing.legend(figure)
        drawing.levels(axes, levels)

    return drawing.as_svg(draw, 720, 340, heading, standalone=True)


def counts(tables: Mapping[str, PathErrors], max_sources: int) -> str:
    """Draw the confusion of the number of sources, one matrix a path, each row shaded by its shares."""
    size = max_sources + 1
    titles = []
    for path, table in tables.items():
        right = float((table.errors.num_true == table.errors.num_estimated).double().mean())
        titles.append(f"{path}: {right:.0%} of {len(table.errors)} counts right")

    def draw(figure: Figure) -> None:
        panels = drawing.frames(figure, titles, x="estimated sources", y="true sources")
        for axes, table in zip(panels, tables.values(), strict=True):
            pairs = table.errors.num_true * size + table.errors.num_estimated
            confusion = torch.bincount(pairs, minlength=size * size).view(size, size)
            rows = [k for k in range(size) if int(confusion[k].sum())]
            for place, k in enumerate(rows):
                for estimated in range(size):
                    share = float(confusion[k, estimated] / confusion[k].sum())
                    if not share and estimated != k:
                        continue
                    cell: dict[str, Any] = {
                        "facecolor": LIGHT["good" if estimated == k else "bad"],
                        "alpha": 0.06 + 0.75 * share,
                    }
                    axes.add_patch(Rectangle((estimated - 0.48, place - 0.48), 0.96, 0.96, linewidth=0, **cell))
                    look: dict[str, Any] = {"ha": "center", "va": "center", "color": LIGHT["ink"]}
                    axes.text(estimated, place, f"{share:.0%}", **look)
            axes.set_xlim(-0.5, size - 0.5)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xticks(range(size))
            axes.set_yticks(range(len(rows)), [str(k) for k in rows])
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)

    describe = "Estimated against true number of sources, in shares of each row"
    return drawing.as_svg(draw, 420 * len(tables), 360, describe, standalone=True)


def errors(tables: Mapping[str, PathErrors], scenes: Scenes) -> str:
    """Draw RMSE against SNR for azimuth, elevation and range, beside the Cramer-Rao floor on the network's scenes."""
    present = sorted(set(tables["network"].bins.tolist()))
    labels = [f"{BIN_DB * index} to {BIN_DB * (index + 1)}" for index in present]
    looks = {"network": ("accent", "o-"), "pipeline": ("good", "o-"), "Cramér-Rao floor": ("mark", "--")}
    curves: dict[str, dict[int, Scores]] = {}
    for path, table in {**tables, "Cramér-Rao floor": _bound(_Frozen(scenes))}.items():
        masks = {index: table.bins == index for index in present}
        curves[path] = {index: table.errors[mask].scores() for index, mask in masks.items() if bool(mask.any())}
    panels: dict[str, Callable[[Scores], float]] = {
        "RMSE azimuth, deg": lambda scores: scores.rmse_azimuth_deg,
        "RMSE elevation, deg": lambda scores: scores.rmse_elevation_deg,
        "RMSE range, m": lambda scores: scores.rmse_range_m,
    }

    def draw(figure: Figure) -> None:
        found = drawing.frames(figure, list(panels), x="SNR, dB", y="")
        for axes, rmse in zip(found, panels.values(), strict=True):
            drawn: list[float] = []
            for path, bins in curves.items():
                colour, line = looks[path]
                values = [max(rmse(scores), 1e-6) for scores in bins.values()]
                axes.plot([present.index(i) for i in bins], values, line, color=LIGHT[colour], markersize=4, label=path)
                drawn += values
            drawing.categories(axes, labels)
            drawing.logarithmic(axes, "y", 0.8 * min(drawn), 1.25 * max(drawn))
        drawing.legend(figure)

    describe = "RMSE of azimuth, elevation and range against SNR, beside the Cramér-Rao floor"
    return drawing.as_svg(draw, 1080, 320, describe, standalone=True)


def scene(findings: Findings) -> str:
    """Draw the whitened spectrum of one scene over azimuth, elevation and range, with true and estimated sources.

    The scene is the same for all trials that share their frozen scenes: the first with three sources and 10 dB or more,
    or the nearest to that; one that the pipeline was scored on where there is one.
    """
    among = len(findings.pipeline) or len(findings.scenes)
    index = chosen_scene(findings.scenes[:among])
    one = findings.scenes[index : index + 1].to("cpu")
    truth = one.require_truth()
    marks: list[tuple[str, Sources, dict[str, Any]]] = [
        ("truth", truth, {"marker": "o", "color": LIGHT["good"], "markersize": 13, "markerfacecolor": "none"}),
        ("network", findings.network[index : index + 1], {"marker": "x", "color": LIGHT["bad"], "markersize": 9}),
        ("pipeline", findings.pipeline[index : index + 1], {"marker": "+", "color": LIGHT["mark"], "markersize": 12}),
    ]
    (azimuth, elevation, range_m), power = spectrum_of(_Frozen(one))
    snr = f", {float(one.snr_db[0]):.0f} dB" if one.snr_db is not None else ""
    heading = f"Spectrum of scene {index}: {int(truth.num_sources[0])} sources{snr}"
    across = (float(azimuth[0].rad2deg()), float(azimuth[-1].rad2deg()))

    def draw(figure: Figure) -> None:
        right, below = drawing.frames(figure, ["elevation, deg", "range, m"], x="azimuth, deg", y="", heading=heading)
        up = (float(elevation[0].rad2deg()), float(elevation[-1].rad2deg()))
        image: dict[str, Any] = {"cmap": _SPECTRUM, "aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        right.imshow(power.amax(2).T.numpy(), extent=(*across, *up), **image)
        # the range axis is logarithmic, and an image is not: its rows are equal steps of the logarithm
        away = (math.log10(float(range_m[0])), math.log10(float(range_m[-1])))
        below.imshow(power.amax(1).T.numpy(), extent=(*across, *away), **image)
        ticks = [metres for metres in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if away[0] <= math.log10(metres) <= away[1]]
        below.set_yticks([math.log10(metres) for metres in ticks], [f"{metres:g}" for metres in ticks])
        for name, sources, look in marks:
            if len(sources) == 0:
                continue
            mask = sources.mask[0]
            x = sources.azimuth[0][mask].rad2deg().tolist()
            for axes, y in (
                (right, sources.elevation[0][mask].rad2deg()),
                (below, sources.range_m[0][mask].clamp(10 ** away[0], 10 ** away[1]).log10()),
            ):
                axes.plot(x, y.tolist(), linestyle="none", markeredgewidth=2, label=name, **look)
        for axes in (right, below):
            axes.set_xlim(*across)
            axes.grid(visible=False)
        drawing.legend(figure)

    return drawing.as_svg(draw, 1040, 420, heading, standalone=True)


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


def _k_loc(scores: Mapping[str, Any] | None) -> float | None:
    return None if scores is None else scores.get("k_loc")


def _bins(scenes: Scenes) -> Tensor:
    """[B] index of the SNR bin of each scene; one bin for all where the SNR is not known."""
    if scenes.snr_db is None:
        return torch.zeros(len(scenes), dtype=torch.long, device=scenes.device)
    return (scenes.snr_db / BIN_DB).floor().long()
