"""Figures: errors against SNR beside the bound (``evaluate --plot``), the curve of a run (``train --plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ris_hpo.atomic import replacing
from ris_hpo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ris_hpo.scoring.evaluate import Evaluation
    from ris_hpo.training.results import Validation

SUFFIXES = {".png", ".svg", ".pdf"}

_PANELS = {
    "rmse_azimuth_deg": "RMSE azimuth, deg",
    "rmse_elevation_deg": "RMSE elevation, deg",
    "rmse_range_m": "RMSE range, m",
    "success": "success",
    "k_acc": "right number of sources",
    "k_loc": "k_loc (lower is better)",
}


def error_against_snr(evaluation: Evaluation, name: str, path: Path) -> None:
    """Draw one panel per figure, the value as a line with dots and its floor dashed; written whole or not at all.

    Raises:
        ConfigError: scenes whose SNR is not known.
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = evaluation.by_snr
    if not rows:
        raise ConfigError("these scenes carry no SNR; nothing to draw errors against")
    labels = [row.label.removesuffix(" dB") for row in rows]
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, sharex=True).flat
    for panel, (key, title) in zip(panels, _PANELS.items(), strict=True):
        for label, side, style in ((name, "scores", "o-"), ("floor (CRB, count known)", "floor", "k--")):
            figures = [getattr(row, side) for row in rows]
            if None not in figures:  # no floor without a complete truth
                panel.plot(labels, [getattr(each, key) for each in figures], style, label=label, markersize=4)
        if key.startswith("rmse"):
            panel.set_yscale("log")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, which="both")
    figure.supxlabel("SNR, dB", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    _save(figure, path)


def learning_curve(initial: Validation | None, history: Sequence[Validation], name: str, path: Path) -> None:
    """Draw ``k_loc`` with its floor, and the loss, against the scenes seen.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [*([initial] if initial is not None else []), *history]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    score, loss = figure.subplots(1, 2)
    scenes = [each.scenes_seen for each in points]
    score.plot(scenes, [each.network.k_loc for each in points], "o-", label="network", markersize=4)
    score.plot(scenes, [each.floor.k_loc for each in points], "k--", label="floor (CRB, count known)")
    score.set_title("k_loc (lower is better)", fontsize=10)
    score.legend(frameon=False)
    loss.plot([each.scenes_seen for each in history], [each.loss for each in history], "o-", markersize=4)
    loss.set_title("mean loss between validations", fontsize=10)
    for panel in (score, loss):
        panel.set_xlabel("scenes seen", fontsize=10)
        panel.grid(alpha=0.3)
    figure.suptitle(name, fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)
