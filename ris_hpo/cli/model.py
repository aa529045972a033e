"""Commands around one network and its scenes: train, evaluate, localize, simulate, prove, package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ris_hpo.cli import display, options
from ris_hpo.config import read_toml

PANEL = "Scenes and networks"
CHUNK = 512


def simulate(
    out: Annotated[Path, typer.Option(help="The scene file to write, .npz.")],
    num_scenes: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 1000,
    seed: options.Seed = 0,
    num_sources: Annotated[int | None, typer.Option(min=1, max=5, help="Sources in every scene; else drawn.")] = None,
    snr_db: Annotated[
        float | None, typer.Option(min=-60, max=100, help="SNR of every scene in dB; else drawn.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML whose scene table to use, such as an exported run.")] = None,
    set_: options.Changes = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Draw scenes with known truth into a file. Scene i depends on the seed and i alone."""
    import torch

    from ris_hpo.physics.files import save_scenes
    from ris_hpo.physics.scene import Scenes, SceneSpec
    from ris_hpo.physics.scene import simulate as draw

    path = options.check_output(out, suffix=".npz")
    tree = read_toml(config).get("scene", {}) if config else {}
    spec = options.changed(SceneSpec.parse(tree, source=str(config)), set_)
    options.check_device(device)
    started = time.perf_counter()
    parts = []
    with display.progress(num_scenes, "scenes") as advance:
        for first in range(0, num_scenes, CHUNK):
            index = range(first, min(first + CHUNK, num_scenes))
            count = None if num_sources is None else torch.full((len(index),), num_sources)
            snr = None if snr_db is None else torch.full((len(index),), snr_db)
            parts.append(draw(spec, seed, index, num_sources=count, snr_db=snr, device=device).to("cpu"))
            advance(index.stop, "")
    save_scenes(path, Scenes.cat(parts))
    result = {
        "file": str(path),
        "scenes": num_scenes,
        "bytes": path.stat().st_size,
        "seconds": round(time.perf_counter() - started, 3),
        "scene_fingerprint": spec.fingerprint(),
        "seed": seed,
    }
    if json_:
        display.print_json(result)
    else:
        display.facts("", {**result, "bytes": f"{path.stat().st_size / 1e6:.1f} MB"})
        display.print_note(f"next: ris-hpo localize {path} --out estimates.npz")


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests run."""
    app.command(rich_help_panel=PANEL, epilog="Example: ris-hpo simulate --num-scenes 200 --out scenes.npz")(simulate)
