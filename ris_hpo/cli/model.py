"""Commands around one network and its scenes: train, evaluate, localize, simulate, prove, package."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ris_hpo.cli import display, evaluation_tables, methods, options, scene_files, standing
from ris_hpo.errors import SceneFileError
from ris_hpo.text import duration, file_size

if TYPE_CHECKING:
    from ris_hpo.physics.grid import Region
    from ris_hpo.physics.scene import Scenes
    from ris_hpo.physics.sources import Sources
    from ris_hpo.training.results import Validation
    from ris_hpo.training.trainer import Trainer

PANEL = "Scenes and networks"
CHUNK = 512
SAMPLE = 200  # own scenes that are checked against the model before training

Checkpoint = Annotated[Path | None, typer.Option(help="Folder of a trained network or of a bundle, or a weights file.")]
Weights = Annotated[
    str | None, typer.Option(metavar="NAME", help="A network that ships: default, imperfect.", show_default="default")
]
Estimator = Annotated[
    str | None, typer.Option(help="A classical estimator instead: ml, spectrum-maxima, music, mvdr, modified-music.")
]
NumSources = Annotated[
    str | None, typer.Option(metavar="truth|K", help="Source count where it is known; else it is estimated.")
]


def simulate(
    out: Annotated[Path, typer.Option(help="The scene file to write: .npz, .mat, .h5; with --per-file a new folder.")],
    num_scenes: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 1000,
    per_file: Annotated[
        int | None, typer.Option(min=1, help="Write files of so many scenes, which are read as one.")
    ] = None,
    seed: options.Seed = 0,
    num_sources: Annotated[int | None, typer.Option(min=0, help="Sources in every scene; else drawn.")] = None,
    snr_db: Annotated[
        float | None, typer.Option(min=-60, max=100, help="SNR of every scene in dB; else drawn.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML whose scene table to use, such as an exported run.")] = None,
    surface: options.Surface = None,
    set_: options.Changes = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Draw scenes with known truth into a file. Scene i depends on the scene settings, the seed and i alone."""
    import torch

    from ris_hpo.atomic import new_folder
    from ris_hpo.physics.containers import SUFFIXES
    from ris_hpo.physics.device import find_device
    from ris_hpo.physics.files import save_scenes
    from ris_hpo.physics.scene import SceneSpec
    from ris_hpo.physics.scene import simulate as draw
    from ris_hpo.training.files import load_scene

    if per_file is None:
        options.check_output(out, suffix=SUFFIXES)
    scene = options.with_surface(load_scene(config) if config else SceneSpec(), surface, "")
    spec = options.changed(scene, set_)
    find_device(device)
    started = time.perf_counter()
    with display.progress(num_scenes, "scenes") as advance:

        def parts(indices: range) -> Iterator[Scenes]:
            for first in range(indices.start, indices.stop, CHUNK):
                index = range(first, min(first + CHUNK, indices.stop))
                count = None if num_sources is None else torch.full((len(index),), num_sources)
                snr = None if snr_db is None else torch.full((len(index),), snr_db)
                yield draw(spec, seed, index, num_sources=count, snr_db=snr, device=device).to("cpu")
                advance(index.stop, "")

        if per_file is None:
            save_scenes(out, parts(range(num_scenes)))
            size = out.stat().st_size
        else:
            with new_folder(out) as folder:
                for number, first in enumerate(range(0, num_scenes, per_file), 1):
                    indices = range(first, min(first + per_file, num_scenes))
                    save_scenes(folder / f"scenes-{number:05}.npz", parts(indices))
            size = sum(file.stat().st_size for file in out.iterdir())
    result = {
        "file": str(out),
        "scenes": num_scenes,
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 3),
        "scene_fingerprint": spec.fingerprint(),
        "seed": seed,
    }
    if json_:
        display.print_json(result)
    else:
        display.facts("", {**result, "bytes": file_size(size)})
        display.print_note(f"next: ris-hpo localize {out} --out estimates.npz")


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; one that is there already is continued.")],
    config: Annotated[Path | None, typer.Option(help="Run configuration, TOML.", show_default="the defaults")] = None,
    surface: options.Surface = None,
    set_: options.Changes = None,
    num_scenes: Annotated[
        int | None,
        typer.Option(min=1, help="Scenes to train on, repeated ones counted.", show_default="budget.scenes"),
    ] = None,
    scenes: Annotated[Path | None, typer.Option(help="Train on this scene file instead of simulated scenes.")] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Validate on this scene file.", show_default="a fifth of --scenes, drawn by a seed"),
    ] = None,
    curriculum: Annotated[
        bool, typer.Option("--curriculum", help="Train in phases; each ends with conditions on its scores (gates).")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Train an exported trial again, compare the two curves, and end.")
    ] = False,
    device: options.Device = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw the learning curve: .png, .svg or .pdf.")] = None,
    json_: options.Json = False,
) -> None:
    """Train one configuration to the end of its budget; Ctrl-C saves it, the same command continues it."""
    from ris_hpo.physics.device import find_device
    from ris_hpo.process import StopSignals
    from ris_hpo.training.curriculum import with_curriculum
    from ris_hpo.training.trainer import Trainer

    options.check_folder(out)
    if plot is not None:
        options.check_output(plot, suffix=options.PLOT_SUFFIXES)
    find_device(device)
    if replay:
        if config is None or surface or set_ or num_scenes is not None or scenes or validation or curriculum:
            raise options.UsageError("--replay needs --config alone: the exported trial, unchanged")
        _replay(config, out, device, json_=json_)
        return
    if validation is not None and scenes is None:
        raise options.UsageError("--validation needs --scenes")
    spec = options.changed(methods.run_config(config, surface), set_)
    for line in spec.coarse_grids():
        display.print_note(f"warning: {line}")
    if num_scenes is not None:
        spec = spec.replaced({"budget.scenes": num_scenes})
    if curriculum:
        spec = with_curriculum(spec)
    geometry = spec.scene.geometry
    own, held = (
        scene_files.read_scenes(path, surface, geometry, "the configuration").knowing(spec.scene) if path else None
        for path in (scenes, validation)
    )
    trainer = Trainer(spec, out, device=device, scenes=own, validation=held)
    if own is not None and spec.network.noise_known:
        _warn_of_data(own, spec.network.grid.region)
    for line in _outline(trainer):
        display.print_note(line)
    if trainer.scenes_seen:
        display.print_note(f"{out}: continuing at {trainer.scenes_seen:,} of {trainer.plan.total:,} scenes")
    with StopSignals() as stop, display.progress(trainer.plan.total, "scenes") as advance:
        for each in trainer.run(stop):
            k_loc, floor = each.network.k_loc, each.floor.k_loc
            advance(each.scenes_seen, f"k_loc {k_loc:.3f} | floor {floor:.3f} | loss {each.loss:.3f}")
            for line in _gates(trainer, each):
                display.print_note(line)
    if not trainer.finished:
        display.print_note(f"stopped at {trainer.scenes_seen:,} scenes, saved; the same command continues")
        raise typer.Exit(options.INTERRUPTED)
    if plot is not None:
        from ris_hpo.cli import plots

        plots.learning_curve(trainer.initial, trainer.history, str(out), plot)
    _show_run(trainer, json_=json_)


def _outline(trainer: Trainer) -> Iterator[str]:
    """What is not plain from the options of a run: how its own scenes are divided, and where its phases end."""
    own, plan = trainer.data.own, trainer.plan
    if own is not None:
        uses = {"to train on": own.training, "to validate on": own.validation, "to fit the count on": own.calibration}
        parts = ", ".join(f"{len(scenes):,} {use}" for use, scenes in uses.items() if scenes is not None)
        seed = trainer.config.budget.validation_seed
        yield f"own scenes: {parts}" + (f" (held out by budget.validation_seed = {seed})" if own.divided else "")
    if trainer.config.phases:
        parts = ", ".join(f"'{phase.name}' to {end:,}" for phase, end in zip(plan.phases, plan.ends, strict=True))
        yield f"phases, in scenes seen: {parts}"


def _gates(trainer: Trainer, validation: Validation) -> Iterator[str]:
    """The verdicts at the end of a phase, and whether it is extended."""
    for verdict in validation.verdicts:
        yield f"phase '{verdict.phase}': {verdict}: {'passed' if verdict.passed else 'not passed'}"
    if trainer.failure is None and not all(verdict.passed for verdict in validation.verdicts):
        yield f"phase '{validation.verdicts[0].phase}' is extended; the run now takes {trainer.plan.total:,} scenes"


def _show_run(trainer: Trainer, *, json_: bool) -> None:
    """Score a run that has ended, on both paths."""
    from ris_hpo.scoring.k_loc import efficiency

    found, out = trainer.conclude(), trainer.directory
    paths = {"network": (found.network, found.floor), "pipeline": (found.pipeline, found.pipeline_floor)}
    if json_:
        result = {
            "checkpoint": str(out),
            "config_fingerprint": trainer.config.fingerprint(),
            "data_fingerprint": trainer.data.fingerprint,
            "scenes": trainer.scenes_seen,
            "diagnosis": trainer.diagnosis(),
            "parameters": found.parameters,
        }
        display.print_json(
            result | {path: {**scores.as_dict(), "floor": floor.k_loc} for path, (scores, floor) in paths.items()}
        )
        return
    rows = []
    for path, (scores, floor) in paths.items():
        share = efficiency(scores.k_loc, floor.k_loc)
        rows.append(
            (path, scores.k_loc, floor.k_loc, share, scores.k_acc, scores.success, floor.success, scores.num_scenes)
        )
    columns = ["path", "k_loc", "floor", "efficiency", "K_acc", "success", "success floor", "scenes"]
    display.table(f"{out} after {trainer.scenes_seen:,} scenes", columns, rows)
    display.print_result(trainer.diagnosis())
    display.print_note(f"next: ris-hpo evaluate --checkpoint {out}")


def _replay(config: Path, out: Path, device: str, *, json_: bool) -> None:
    from ris_hpo.process import StopSignals
    from ris_hpo.results.export import replay_config
    from ris_hpo.training.files import load_config

    found = load_config(config)
    with StopSignals() as stop, display.progress(found.config.budget.scenes, "scenes") as advance:
        compared = replay_config(
            found, out, device=device, stop=stop, progress=lambda seen, k_loc: advance(seen, f"k_loc {k_loc:.3f}")
        )
    standing.end_of_replay(compared, json_=json_)


def evaluate(
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    estimator: Estimator = None,
    estimates: Annotated[Path | None, typer.Option(help="Score this estimate file, with --scenes.")] = None,
    scenes: Annotated[
        Path | None,
        typer.Option(
            help="A scene file with truth, complete or in part, or a folder of them.",
            show_default="drawn, --per-cell for each SNR and count",
        ),
    ] = None,
    path: Annotated[
        Literal["pipeline", "fast", "network"],
        typer.Option(
            help="pipeline: as localize, with refinement; fast: as localize --fast, with less of it; network: from the "
            "network's outputs alone."
        ),
    ] = "pipeline",
    snr_db: Annotated[str, typer.Option(metavar="LIST", help="SNRs of drawn scenes, dB.")] = "0,5,10,15,20",
    counts: Annotated[str, typer.Option(metavar="LIST", help="Source counts of drawn scenes.")] = "1,2,3,4,5",
    per_cell: Annotated[int, typer.Option(min=1, help="Drawn scenes for each pair of SNR and count.")] = 20,
    seed: options.Seed = 1_000_003,
    num_sources: NumSources = None,
    surface: options.Surface = None,
    set_: options.Changes = None,
    device: options.Device = "cpu",
    plot: Annotated[
        Path | None, typer.Option(help="Draw errors against SNR beside the bound: .png, .svg or .pdf.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every row, also of each count at each SNR, as .csv.")] = None,
    json_: options.Json = False,
) -> None:
    """Score a network or an estimator per SNR, source count, range and azimuth, each figure beside its floor."""
    from ris_hpo.physics.device import find_device
    from ris_hpo.physics.files import load_estimates
    from ris_hpo.physics.scene import grid_of_cells
    from ris_hpo.scoring.evaluate import evaluate_parts as table_of

    if plot is not None:
        options.check_output(plot, suffix=options.PLOT_SUFFIXES)
    if csv is not None:
        options.check_output(csv, suffix=".csv")
    find_device(device)
    if estimates is not None:
        if scenes is None or checkpoint is not None or estimator is not None:
            raise options.UsageError("--estimates needs --scenes, and excludes --checkpoint and --estimator")
        name, seconds, given = str(estimates), None, load_estimates(estimates)
        with scene_files.opened(scenes, surface, estimates_noise=False) as own:
            if len(given) != len(own):
                raise SceneFileError(f"{estimates}: holds {len(given)} scenes, {scenes} holds {len(own)}")
            own.require_truth()
            starts = range(0, len(own), scene_files.PART)
            pairs = zip((given[i : i + scene_files.PART] for i in starts), own.parts(), strict=True)
            evaluation, found = table_of(pairs), given
    else:
        method = methods.choose(checkpoint, weights, estimator, set_, device, path, surface)
        source: AbstractContextManager[scene_files.OwnScenes | scene_files.DrawnScenes]
        if scenes is not None:
            source = scene_files.opened(scenes, surface, method.geometry, method.name, region=method.grid.region)
        else:
            cells = [options.numbers("--snr-db", snr_db, float), options.numbers("--counts", counts, int)]
            drawn = grid_of_cells(method.scene, seed, cells[0], [int(count) for count in cells[1]], per_cell)
            source = nullcontext(scene_files.DrawnScenes(drawn))
        with source as given_scenes:
            given_scenes.require_truth()
            located = methods.Located(method, given_scenes, num_sources, device)
            evaluation = table_of(located)
        name, seconds, found = method.name, located.seconds, located.sources()
    if scenes is not None:
        _warn_of_misfit(found)
    rate = None if seconds is None else len(found) / seconds
    if plot is not None:
        from ris_hpo.cli import plots

        plots.error_against_snr(evaluation, name, plot)
    if csv is not None:
        display.write_csv(csv, evaluation.flat())
    if json_:
        head = {"method": name, "scenes": len(found), "seconds": seconds, "scenes_per_second": rate}
        head["scenes_that_do_not_fit"] = _unfit(found)
        display.print_json({**head, "num_sources": num_sources, **evaluation.as_dict()})
        return
    evaluation_tables.show(evaluation, name, rate)
    if path == "fast":
        display.print_note(methods.recorded_of_fast(checkpoint, weights))
    if plot is not None:
        display.print_note(f"drawn: {plot}")


def _warn_of_misfit(found: Sources) -> None:
    from ris_hpo.estimators.goodness import misfit

    line = misfit(found)
    if line is not None:
        display.print_note(f"warning: {line}")


def _unfit(found: Sources) -> int | None:
    """Number of scenes that the model does not fit; None where the method does not say."""
    return None if found.fits is None else int((~found.fits).sum())


def _warn_of_data(scenes: Scenes, region: Region) -> None:
    """Say so where the model does not fit own scenes at their truth, on a sample of them."""
    from ris_hpo.estimators.refinement import with_goodness_of_fit

    if scenes.truth is None:
        return
    sample = scenes[:: -(-len(scenes) // SAMPLE)]
    _warn_of_misfit(with_goodness_of_fit(sample, sample.require_truth(), region=region))


def prove(
    config: Annotated[Path | None, typer.Option(help="Run configuration, TOML.", show_default="the preset")] = None,
    preset: Annotated[Literal["base", "large"], typer.Option(help="Network to use without --config.")] = "base",
    head: Annotated[
        Literal["structured", "factor"] | None,
        typer.Option(help="Covariance head.", show_default="network.covariance_head"),
    ] = None,
    num_scenes: Annotated[int, typer.Option("--num-scenes", min=16, help="Number of scenes to memorise.")] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over these scenes before the proof fails.")] = 150,
    surface: options.Surface = None,
    set_: options.Changes = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Check that a kind of network can reproduce a few training scenes; the result is what 'run' asks for."""
    from ris_hpo.learning.network import large
    from ris_hpo.physics.device import find_device
    from ris_hpo.process import storage_directory
    from ris_hpo.training.proof import prove as certify

    find_device(device)
    spec = methods.run_config(config, surface)
    if config is None and preset == "large":
        own = ("geometry", "grid", "max_sources")  # these follow the scenes
        large_form = large().model_dump(mode="json", exclude=set(own))
        spec = spec.replaced({f"network.{name}": value for name, value in large_form.items()})
    if head is not None:
        spec = spec.replaced({"network.covariance_head": head})
    spec = options.changed(spec, set_)
    with display.progress(epochs, "epochs") as advance:
        found = certify(
            spec,
            storage_directory() / "proofs",
            scenes=num_scenes,
            epochs=epochs,
            device=device,
            progress=lambda epoch, figure: advance(epoch, f"NMSE {figure:.3f}"),
        )
    if json_:
        display.print_json(found.as_dict())
        return
    rows = [(name.replace("_", " "), f"{value:.4g}") for name, value in found.checks.items()]
    rows.append((f"NMSE after {found.epochs} epochs of {found.scenes} scenes", f"{found.nmse:.4f}"))
    rows += [(f"parameters, {group}", f"{count:,}") for group, count in found.parameters.items()]
    display.table(f"certificate for code {found.code}, form {found.form}", ["check", "figure"], rows)
    display.print_result(f"passed in {duration(found.seconds)}")


def localize(
    scenes: Annotated[
        Path,
        typer.Argument(help="A scene file (npz, MATLAB, HDF5), or a folder of them. Truth in it is not used."),
    ],
    out: Annotated[Path, typer.Option(help="The estimate file to write: .npz, .mat or .h5.")],
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    estimator: Estimator = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Less refinement: several times as fast and nearly as good. Says how good.")
    ] = False,
    num_sources: NumSources = None,
    surface: options.Surface = None,
    set_: options.Changes = None,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Find the sources of every scene in a file, by a trained network or a classical estimator."""
    from ris_hpo.physics.containers import SUFFIXES
    from ris_hpo.physics.device import find_device
    from ris_hpo.physics.files import save_estimates

    target = options.check_output(out, suffix=SUFFIXES)
    find_device(device)
    method = methods.choose(checkpoint, weights, estimator, set_, device, "fast" if fast else "pipeline", surface)
    if fast:
        display.print_note(methods.recorded_of_fast(checkpoint, weights))
    wants_truth = num_sources == "truth" or method.needs_truth
    with scene_files.opened(
        scenes, surface, method.geometry, method.name, truth=wants_truth, estimates_noise=method.noise_known
    ) as own:
        located = methods.Located(method, own, num_sources, device)
        for _ in located:
            pass
    found, seconds = located.sources(), located.seconds
    save_estimates(target, found)
    _warn_of_misfit(found)
    result = {
        "file": str(target),
        "method": method.name,
        "scenes": len(found),
        "sources": int(found.num_sources.sum()),
        "scenes_that_do_not_fit": _unfit(found),
        "seconds": round(seconds, 3),
        "scenes_per_second": round(len(found) / seconds, 2),
    }
    if json_:
        display.print_json(result)
    else:
        display.facts("", result)


def package(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; must not be there yet.")],
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    json_: options.Json = False,
) -> None:
    """Make an inference bundle that loads without the training code: weights, configuration, exported program."""
    from ris_hpo.results.export import package as make

    if checkpoint is not None and weights is not None:
        raise options.UsageError("--checkpoint and --weights exclude each other")
    source = checkpoint if checkpoint is not None else methods.shipped_weights(weights or "default")
    options.check_folder(out)
    told = make(source, out)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    if json_:
        display.print_json({"folder": str(out), "files": files, **told})
        return
    display.facts(str(out), {name: file_size(size) for name, size in files.items()})


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests run."""
    examples: dict[Callable[..., None], str] = {
        train: "ris-hpo train --config best.toml --out runs/best",
        prove: "ris-hpo prove --head factor",
        evaluate: "ris-hpo evaluate --checkpoint runs/best --plot errors.png",
        package: "ris-hpo package --checkpoint runs/best --out bundle",
        simulate: "ris-hpo simulate --num-scenes 200 --out scenes.npz",
        localize: "ris-hpo localize scenes.npz --fast --out estimates.npz",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
