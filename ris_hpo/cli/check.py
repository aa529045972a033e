"""The command ``check``: what is in a scene file, what fits, and what would be assumed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ris_hpo.cli import display, options, scene_files

if TYPE_CHECKING:
    from ris_hpo.cli.scene_files import OwnScenes
    from ris_hpo.physics.scene import Scenes, SceneSpec

SAMPLE = 20
"""Scenes that sources are located in."""


def check(
    scenes: Annotated[Path, typer.Argument(help="The scene file: npz, MATLAB or HDF5.")],
    surface: options.Surface = None,
    sample: Annotated[int, typer.Option(min=1, help="Scenes in which sources are located, to see a misfit.")] = SAMPLE,
    json_: options.Json = False,
) -> None:
    """Say what is in a scene file, what fits and what would be assumed, before anything is trained or estimated on it.

    Every array is read and checked. In a few scenes sources are located, and what they leave is set against the noise.
    """
    from ris_hpo.estimators.goodness import misfit
    from ris_hpo.physics.scene import SceneSpec
    from ris_hpo.physics.surfaces import load_surface

    spec = SceneSpec() if surface is None else load_surface(surface)
    with scene_files.opened(scenes, surface) as own:
        facts = _contents(own)
        facts |= _truth(own, spec)
        step = -(-len(own) // sample)
        few = [own.read(place, place + 1) for place in range(0, len(own), step)]
        found = _located(few, spec)
    line = misfit(found)
    assert found.residual is not None
    facts["scenes looked at"] = len(found)
    facts["sources found in them"] = int(found.num_sources.sum())
    if own.file.has_noise_power:
        facts["median residual over noise"] = round(float(found.residual.median()), 3)
        facts["fit"] = line or "the model fits them"
    else:
        facts["fit"] = "not known: only a stated noise power shows what the model leaves unexplained"
    if json_:
        display.print_json({name.replace(" ", "_"): value for name, value in facts.items()})
        return
    display.facts(str(scenes), {name: "; ".join(v) if isinstance(v, list) else v for name, v in facts.items()})


def _contents(own: OwnScenes) -> dict[str, Any]:
    """The file as it was opened, after all of its values were read."""
    file = own.file
    with display.progress(len(own), "scenes read") as advance:
        for start in range(0, len(own), scene_files.PART):
            file.read(start, start + scene_files.PART)
            advance(min(start + scene_files.PART, len(own)), "")
    size = file.sizes
    noise = "in the file" if file.has_noise_power else "missing, estimated from what sources leave"
    return {
        "kind": file.kind,
        "scenes": size["B"],
        "snapshots": size["L"],
        "antennas": size["M"],
        "surface": str(file.geometry),
        "surface stated": "in the file" if file.states_surface else "no" if own.region is None else "by --surface",
        "noise power": noise,
        "remarks": file.remarks or ["none: every array is as files are written"],
        "not read": file.unused or ["nothing"],
    }


def _truth(own: OwnScenes, spec: SceneSpec) -> dict[str, Any]:
    """What the file says of the sources, and how many of its scenes could be trained on."""
    if not own.file.has_truth:
        return {"truth": "none: localize works, evaluate and train need one"}

    import torch

    from ris_hpo.physics.scene import SECTOR

    complete, inside, most, least = True, 0, 0, 99
    for start in range(0, len(own), scene_files.PART):
        part = own.file.read(start, start + scene_files.PART)
        complete &= part.truth is not None
        truth = part.known_truth()
        most, least = max(most, int(truth.num_sources.max())), min(least, int(truth.num_sources.min()))
        if part.truth is not None:
            outside = torch.zeros_like(truth.mask)
            coordinates = (truth.azimuth.rad2deg(), truth.elevation.rad2deg(), truth.range_m)
            for axis, value in zip(SECTOR, coordinates, strict=True):
                low, high = getattr(spec, axis)
                outside |= (value < low - 1e-3) | (value > high + 1e-3)
            inside += int((~(outside & truth.mask).any(-1)).sum())
    found: dict[str, Any] = {"truth": "complete" if complete else "in part", "sources a scene": f"{least} to {most}"}
    if complete:
        found["scenes with all sources in the region"] = f"{inside} of {len(own)}"
    return found


def _located(scenes: list[Scenes], spec: SceneSpec) -> Any:
    from ris_hpo.estimators.estimate import EstimatorSpec, estimate
    from ris_hpo.physics.scene import SECTOR, Scenes

    region = {f"likelihood.grid.region.{axis}": getattr(spec, axis) for axis in SECTOR}
    return estimate("spectrum-maxima", Scenes.cat(scenes), EstimatorSpec().replaced(region))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Scenes and networks", epilog="Example: ris-hpo check scenes.npz")(check)
