"""Commands around one network and its scenes: train, evaluate, localize, simulate, prove, package."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ris_hpo.cli import display, methods, options
from ris_hpo.config import read_toml

PANEL = "Scenes and networks"
CHUNK = 512

Checkpoint = Annotated[
    Path | None, typer.Option(help="Folder of a trained network.", show_default="the network that ships")
]
Estimator = Annotated[
    str | None, typer.Option(help="A classical estimator instead: ml, spectrum-maxima, music, mvdr, modified-music.")
]
NumSources = Annotated[
    str | None, typer.Option(metavar="truth|K", help="Source count where it is known; else it is estimated.")
]


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


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and telemetry; going on where it stopped.")],
    config: Annotated[Path | None, typer.Option(help="Run configuration, TOML.", show_default="the defaults")] = None,
    set_: options.Changes = None,
    num_scenes: Annotated[
        int | None, typer.Option(min=1, help="Scenes to train on in all.", show_default="the configuration's")
    ] = None,
    scenes: Annotated[Path | None, typer.Option(help="Train on this scene file instead of fresh scenes.")] = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Train one configuration at its full budget; Ctrl-C saves, the same command goes on."""
    from ris_hpo.hpo.budget import efficiency
    from ris_hpo.hpo.workers import StopSignals
    from ris_hpo.physics.files import load_scenes
    from ris_hpo.training.trainer import Trainer

    options.check_folder(out)
    options.check_device(device)
    spec = options.changed(methods.run_config(config), set_)
    if num_scenes is not None:
        spec = spec.replaced({"budget.scenes": num_scenes})
    data = load_scenes(scenes, spec.scene.geometry) if scenes else None
    trainer = Trainer(spec, out, device=device, scenes=data)
    if trainer.scenes_seen:
        display.print_note(f"{out}: going on at {trainer.scenes_seen:,} of {spec.budget.scenes:,} scenes")
    with StopSignals() as stop, display.progress(spec.budget.scenes, "scenes") as advance:
        for validation in trainer.run(stop):
            score, floor = validation.network.k_loc, validation.floor.k_loc
            advance(validation.scenes_seen, f"k_loc {score:.3f} | floor {floor:.3f} | loss {validation.loss:.3f}")
    if not trainer.finished:
        display.print_note(f"stopped at {trainer.scenes_seen:,} scenes, saved; the same command goes on")
        raise typer.Exit(130)
    found = trainer.conclude()
    result = {
        "checkpoint": str(out),
        "config_fingerprint": spec.fingerprint(),
        "scenes": trainer.scenes_seen,
        "diagnosis": trainer.diagnosis(),
        "parameters": found.parameters,
        "network": {**found.network.as_dict(), "floor": found.floor.k_loc},
        "pipeline": {**found.pipeline.as_dict(), "floor": found.pipeline_floor.k_loc},
    }
    if json_:
        display.print_json(result)
        return
    rows = []
    for path, scores, bound in (
        ("network", found.network, found.floor),
        ("pipeline", found.pipeline, found.pipeline_floor),
    ):
        share = efficiency(scores.k_loc, bound.k_loc)
        rows.append(
            (path, scores.k_loc, bound.k_loc, share, scores.k_acc, scores.success, bound.success, scores.num_scenes)
        )
    columns = ["path", "k_loc", "floor", "efficiency", "K_acc", "success", "success floor", "scenes"]
    display.table(f"{out} after {trainer.scenes_seen:,} scenes", columns, rows)
    display.print_result(trainer.diagnosis())
    display.print_note(f"next: ris-hpo evaluate --checkpoint {out}")


def localize(
    scenes: Annotated[Path, typer.Argument(help="The scene file, .npz; truth in it is not looked at.")],
    out: Annotated[Path, typer.Option(help="The estimate file to write, .npz.")],
    checkpoint: Checkpoint = None,
    estimator: Estimator = None,
    num_sources: NumSources = None,
    set_: options.Changes = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Find the sources of every scene in a file, by a trained network or a classical estimator."""
    from ris_hpo.physics.files import load_scenes, save_estimates
    from ris_hpo.physics.sources import Sources

    target = options.check_output(out, suffix=".npz")
    options.check_device(device)
    method = methods.choose(checkpoint, estimator, set_, device)
    batch = load_scenes(scenes, method.geometry)
    counts = methods.known_counts(num_sources, batch)
    started = time.perf_counter()
    parts: list[Sources] = []
    with display.progress(len(batch), "scenes") as advance:
        for first in range(0, len(batch), method.chunk):
            chosen = slice(first, first + method.chunk)
            parts.append(
                method.localize(batch[chosen].to(device), None if counts is None else counts[chosen]).to("cpu")
            )
            advance(min(first + method.chunk, len(batch)), "")
    seconds = time.perf_counter() - started
    found = Sources.cat(parts)
    save_estimates(target, found)
    result = {
        "file": str(target),
        "method": method.name,
        "scenes": len(batch),
        "sources": int(found.num_sources.sum()),
        "seconds": round(seconds, 3),
        "scenes_per_second": round(len(batch) / seconds, 2),
    }
    if json_:
        display.print_json(result)
    else:
        display.facts("", result)


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests run."""
    examples: dict[Callable[..., None], str] = {
        train: "ris-hpo train --config best.toml --out runs/best",
        simulate: "ris-hpo simulate --num-scenes 200 --out scenes.npz",
        localize: "ris-hpo localize scenes.npz --estimator ml --out estimates.npz",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
