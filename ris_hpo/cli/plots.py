"""The figure of ``evaluate --plot``: errors against SNR beside the bound, on the same scenes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ris_hpo.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from ris_hpo.learning.evaluate import Evaluation

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
            panel.plot(labels, [getattr(getattr(row, side), key) for row in rows], style, label=label, markersize=4)
        if key.startswith("rmse"):
            panel.set_yscale("log")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, which="both")
    figure.supxlabel("SNR, dB", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)
