"""Figures in files: errors against SNR beside the floor (``evaluate --plot``), a run's curve (``train --plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_hpo import drawing
from ris_hpo.drawing import LIGHT
from ris_hpo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ris_hpo.scoring.evaluate import Evaluation
    from ris_hpo.training.results import Validation

_FLOOR = "floor (CRB, count known)"
_ROWS = (
    {
        "rmse_azimuth_deg": "RMSE azimuth, deg",
        "rmse_elevation_deg": "RMSE elevation, deg",
        "rmse_range_m": "RMSE range, m",
    },
    {"success": "success", "k_acc": "right number of sources", "k_loc": "k_loc (lower is better)"},
)


def error_against_snr(evaluation: Evaluation, name: str, path: Path) -> None:
    """Draw one panel per score: its value in each SNR bin, and the floor dashed.

    Raises:
        ConfigError: scenes whose SNR is not known.
        OutputError: the file cannot be written.
    """
    rows = evaluation.by_snr
    if not rows:
        raise ConfigError("these scenes carry no SNR; there is nothing to draw errors against")
    labels = [row.label.removesuffix(" dB") for row in rows]

    def draw(figure: Figure) -> None:
        upper, lower = _ROWS
        panels = drawing.frames(figure, [*upper.values(), *lower.values()], x="SNR, dB", y="", columns=3)
        for axes, key in zip(panels, [*upper, *lower], strict=True):
            values = [getattr(row.scores, key) for row in rows]
            axes.plot(values, "o-", color=LIGHT["accent"], markersize=4, label=name)
            floor = [getattr(row.floor, key) for row in rows if row.floor is not None]
            if len(floor) == len(rows):  # there is no floor without a complete truth
                axes.plot(floor, "--", color=LIGHT["mark"], label=_FLOOR)
            drawing.categories(axes, labels)
            positive = [each for each in (*values, *floor) if each > 0]
            if key in upper and positive:
                drawing.logarithmic(axes, "y", 0.8 * min(positive), 1.25 * max(positive))
        drawing.legend(figure)

    drawing.write(draw, 1000, 620, path)


def learning_curve(initial: Validation | None, history: Sequence[Validation], name: str, path: Path) -> None:
    """Draw ``k_loc`` with its floor, and the loss, against the scenes seen.

    Raises:
        OutputError: the file cannot be written.
    """
    points = [*([initial] if initial is not None else []), *history]

    def draw(figure: Figure) -> None:
        titles = ["k_loc (lower is better)", "mean loss between validations"]
        score, loss = drawing.frames(figure, titles, x="scenes seen", y="", heading=name)
        scenes = [each.scenes_seen for each in points]
        style: dict[str, Any] = {"color": LIGHT["accent"], "markersize": 4}
        score.plot(scenes, [each.network.k_loc for each in points], "o-", label="network", **style)
        score.plot(scenes, [each.floor.k_loc for each in points], "--", color=LIGHT["mark"], label=_FLOOR)
        loss.plot([each.scenes_seen for each in history], [each.loss for each in history], "o-", **style)
        drawing.legend(figure)

    drawing.write(draw, 900, 400, path)
