"""The command ``bound``: how well a source could be located at best."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ris_hpo.cli import display, options, scene_files

if TYPE_CHECKING:
    from ris_hpo.physics.bounds import SourceBounds
    from ris_hpo.physics.scene import Scenes


def bound(
    scenes: Annotated[
        Path | None,
        typer.Argument(help="A scene file with truth.", show_default="drawn, --per-cell for each SNR and count"),
    ] = None,
    kind: Annotated[
        Literal["deterministic", "stochastic"],
        typer.Option(help="Symbols as unknown constants, or random with unknown powers and noise power."),
    ] = "deterministic",
    config: Annotated[Path | None, typer.Option(help="TOML whose scene table to draw from.")] = None,
    snr_db: Annotated[str, typer.Option(metavar="LIST", help="SNRs of drawn scenes, dB.")] = "0,5,10,15,20",
    counts: Annotated[str, typer.Option(metavar="LIST", help="Source counts of drawn scenes.")] = "1,2,3,4,5",
    per_cell: Annotated[int, typer.Option(min=1, help="Drawn scenes for each pair of SNR and count.")] = 20,
    seed: options.Seed = 1_000_003,
    surface: options.Surface = None,
    set_: options.Changes = None,
    out: Annotated[Path | None, typer.Option(help="Write one line per source into this file, .csv.")] = None,
    json_: options.Json = False,
) -> None:
    """Cramer-Rao bound of every source: the least standard deviation of azimuth, elevation, range and position."""
    from ris_hpo.physics.bounds import source_bounds
    from ris_hpo.physics.scene import SceneSpec, grid_of_cells
    from ris_hpo.training.files import load_scene

    if out is not None:
        options.check_output(out, suffix=".csv")
    if scenes is not None:
        batch = scene_files.read_scenes(scenes, surface)
    else:
        scene = options.with_surface(load_scene(config) if config else SceneSpec(), surface, "")
        spec = options.changed(scene, set_)
        cells = options.numbers("--snr-db", snr_db, float), options.numbers("--counts", counts, int)
        batch = grid_of_cells(spec, seed, cells[0], [int(count) for count in cells[1]], per_cell)
    rows = list(_records(batch, source_bounds(batch, kind)))
    if out is not None:
        display.write_csv(out, rows)
    if json_:
        display.print_json({"kind": kind, "sources": rows})
        return
    table = [
        (label, len(group), *(median(row[name] for row in group) for name in _COLUMNS))
        for label, group in _groups(rows)
    ]
    display.table(f"{kind} bound, median over sources", ["", "sources", *_COLUMNS.values()], table)


_COLUMNS = {
    "std_azimuth_deg": "azimuth, deg",
    "std_elevation_deg": "elevation, deg",
    "std_range_m": "range, m",
    "std_position_m": "position, m",
}


def _records(scenes: Scenes, bounds: SourceBounds) -> Iterator[dict[str, Any]]:
    """One record per true source."""
    truth = scenes.require_truth()
    deg = (truth.azimuth.rad2deg(), truth.elevation.rad2deg())
    spreads = (bounds.azimuth.rad2deg(), bounds.elevation.rad2deg(), bounds.range_m, bounds.position_m)
    for scene, slot in truth.mask.nonzero().tolist():
        yield {
            "scene": scene,
            "source": slot,
            "num_sources": int(truth.num_sources[scene]),
            "snr_db": None if scenes.snr_db is None else round(float(scenes.snr_db[scene]), 4),
            "azimuth_deg": float(deg[0][scene, slot]),
            "elevation_deg": float(deg[1][scene, slot]),
            "range_m": float(truth.range_m[scene, slot]),
            **{name: float(each[scene, slot]) for name, each in zip(_COLUMNS, spreads, strict=True)},
        }


def _groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """All sources, and those of each number of sources."""
    if rows:
        yield "all", rows
    for count in sorted({row["num_sources"] for row in rows}):
        yield f"K = {count}", [row for row in rows if row["num_sources"] == count]


def register(app: typer.Typer) -> None:
    """Add the command, with an example that the tests run."""
    app.command(rich_help_panel="Scenes and networks", epilog="Example: ris-hpo bound --per-cell 10 --out bound.csv")(
        bound
    )
