"""Commands around a study: run, worker, status, best, report, export, replay, spaces, init."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ris_hpo.cli import display, live, options, standing
from ris_hpo.errors import OutputError, StudyError

if TYPE_CHECKING:
    from ris_hpo.search.spec import StudySpec
    from ris_hpo.workers.pool import Executor

PANEL = "Studies"

StudyName = Annotated[
    str | None,
    typer.Option("--study", help="Name of the study.", show_default="the only one in the store"),
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Trial store: sqlite:///FILE or postgresql://USER@HOST/DATABASE.",
        show_default="SQLite under storage/",
    ),
]


def run(
    space: Annotated[
        str | None,
        typer.Option(
            help="Name of a study file (see 'ris-hpo spaces') or its path.",
            show_default="what --study was made with, else wide",
        ),
    ] = None,
    program: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="A training program of your own.", show_default="the study file's, if any"
        ),
    ] = None,
    n_trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Total number of trials to finish, over all runs and workers.", show_default="the study's"
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study.", show_default="the space's")] = None,
    storage: Storage = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Worker processes.", show_default="1, or one a GPU slot")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="GPUs to use, such as 0,1, counted among the visible; or none.", show_default="all"
        ),
    ] = None,
    per_gpu: Annotated[int, typer.Option(min=1, max=64, help="Workers that share a GPU.")] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes here, or actors of a Ray cluster.")
    ] = "local",
    address: Annotated[str, typer.Option(help="The Ray cluster, with --engine ray.")] = "auto",
    sampler: Annotated[
        str | None, typer.Option(help="tpe, gp, cmaes, random, qmc, nsga2.", show_default="the study's")
    ] = None,
    pruner: Annotated[
        str | None, typer.Option(help="asha, hyperband, median, wilcoxon, none.", show_default="the study's")
    ] = None,
    epochs_per_trial: Annotated[
        int | None, typer.Option(min=1, help="Length of a trial in epochs of budget.epoch_scenes scenes.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the study.", show_default="the study's")] = None,
    surface: options.Surface = None,
    set_: options.Changes = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Stop after so many seconds.")] = None,
    gpu_hours: Annotated[
        float | None,
        typer.Option(min=0, help="Stop when the trials have used so many hours of devices, CPUs included."),
    ] = None,
    target: Annotated[float | None, typer.Option(help="Stop when a trial reaches this k_loc.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many trials without a better one.")] = None,
    no_stop: Annotated[bool, typer.Option("--no-stop", help="Drop the stop rules that the study has.")] = False,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Take sampler, pruner, retries, stop rules and time limits from the file as it is now."
        ),
    ] = False,
    fork: Annotated[
        str | None, typer.Option(metavar="NEW", help="Go on in a new study of this name, from the old one's best.")
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option(metavar="STUDY", help="Run the 5 best trials of this study first.")
    ] = None,
    no_proof: Annotated[
        bool, typer.Option("--no-proof", help="Skip the proof that such a network can learn; the study records this.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Run the trials of a study; resume it if it exists. A finished study gets no more trials.

    A study keeps what it was made with; run again, it changes only what the options name.
    """
    from ris_hpo.programs.program import source
    from ris_hpo.report.study_page import kept_current
    from ris_hpo.search.files import checked, load_study
    from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, find_spec, stored_spec
    from ris_hpo.search.spec import StopSpec
    from ris_hpo.store.credentials import redact
    from ris_hpo.store.open import open_store
    from ris_hpo.workers.devices import plan_slots
    from ris_hpo.workers.local import LocalProcesses
    from ris_hpo.workers.ray import RayActors
    from ris_hpo.workers.supervisor import Supervisor
    from ris_hpo.workers.worker import job_for

    given: dict[str, Any] = {
        "sampler.name": sampler,
        "pruner.name": "none" if sampler == "nsga2" and pruner is None else pruner,
        "seed": seed,
        "stop.timeout_s": timeout,
        "stop.gpu_hours": gpu_hours,
        "stop.target": target,
        "stop.patience": patience,
        "budget.n_trials": n_trials,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    if no_stop:
        changes = dict.fromkeys([f"stop.{rule}" for rule in StopSpec.model_fields]) | changes
    known = find_spec(open_store(storage), study) if space is None and study is not None else None
    spec = known or load_study(space or "wide")
    if program is not None:
        spec = spec.replaced({"program": program})
    base = options.changes(set_)
    if surface:
        from ris_hpo.physics.surfaces import surface_changes  # imported late, since it brings torch

        base = {**surface_changes(surface, "scene."), **base}
    if base:
        spec = spec.with_base(base)
    if epochs_per_trial is not None:
        spec = spec.with_epochs(epochs_per_trial)
    checked(spec.replaced(changes))
    chosen = _gpus(gpus)
    if engine == "ray" and chosen:
        raise options.UsageError("--gpus LIST counts the GPUs of one machine; with --engine ray leave it out, or none")
    store = open_store(storage)
    if engine == "ray" and store.is_sqlite:
        raise options.UsageError("--engine ray needs a store that every node reaches: --storage postgresql://...")
    # before a study is made: a device that is not there is refused here
    slots = plan_slots(workers, chosen, per_gpu) if engine == "local" else []
    proof = "no-proof" if no_proof else _proof(spec)
    command = redact(shlex.join(["ris-hpo", *sys.argv[1:]]))
    made = create_or_resume_study(
        store,
        spec,
        name=study,
        changes=changes,
        update=update,
        fork=fork,
        warm_start=warm_start,
        proof=proof,
        command=command,
        note=display.print_note,
    )
    name = made.study_name
    added = fill_budget(store, made, n_trials)
    total = stored_spec(made).budget.n_trials
    display.print_note(f"study '{name}' in {store.redacted}: {total} trials, {added} to add")
    job = job_for(store, made)
    if engine == "ray":
        own = None if spec.program is None else source(spec.program)
        executor: Executor = RayActors(
            store, workers=workers, address=address, gpus=chosen is None, per_gpu=per_gpu, program=own
        )
    else:
        executor = LocalProcesses(slots, Path(job.directory))
    supervisor = Supervisor(store, made, executor, job)
    assert job.artifacts is not None
    page = kept_current(made, store, supervisor.run(), Path(job.artifacts), Path(job.directory))
    live.follow(page)
    standing.show_outcome(store, name, json_=json_)
    standing.end_of_run(supervisor, store, name)


def worker(
    study: StudyName = None,
    storage: Storage = None,
    device: options.Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Stop after so many trials.")] = None,
    json_: options.Json = False,
) -> None:
    """Join a study as one more worker, from any host that reaches its store."""
    from ris_hpo.physics.device import find_device
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.store.open import open_store
    from ris_hpo.workers.devices import Slot
    from ris_hpo.workers.local import LocalProcesses
    from ris_hpo.workers.supervisor import Supervisor
    from ris_hpo.workers.worker import job_for

    if device != "cpu":
        find_device(device)
    store = open_store(storage, create=False, write=True)
    title = standing.choose_study(store, study)
    joined = get_study(store, title)
    job = job_for(store, joined)
    log = f"worker-{socket.gethostname()}-{os.getpid()}.log"  # hosts may share the folder
    executor = LocalProcesses([Slot(0, device, None, threads)], Path(job.directory), log_name=log)
    supervisor = Supervisor(store, joined, executor, job, max_trials=max_trials)
    live.follow(supervisor.run())
    if json_:
        display.print_json({"study": title, "ended": supervisor.ended, "reason": supervisor.ending})
    else:
        display.facts("", {"study": title, "trials ended here": supervisor.ended, "why it left": supervisor.ending})
    standing.end_of_run(supervisor, store, title)


def status(study: StudyName = None, storage: Storage = None, json_: options.Json = False) -> None:
    """Say where a study stands: its trials by state, the best one, what runs now."""
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False)
    standing.show_status(store, standing.choose_study(store, study), json_=json_)


def best(
    study: StudyName = None,
    storage: Storage = None,
    top: Annotated[int, typer.Option(min=1, max=20, help="How many of the best trials to train again.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Fresh seeds for each of them and for the base.")] = 5,
    no_confirm: Annotated[
        bool, typer.Option("--no-confirm", help="Show the best trial as searched; train nothing.")
    ] = False,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Train the best trials and the base configuration again with new seeds, and say whether they differ."""
    from dataclasses import asdict
    from functools import partial

    from ris_hpo.physics.device import find_device
    from ris_hpo.results import winner
    from ris_hpo.search.lifecycle import get_study, stored_spec
    from ris_hpo.search.lifecycle import status as status_of
    from ris_hpo.store.folders import study_folder
    from ris_hpo.store.open import open_store

    find_device(device)
    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    chosen = get_study(store, title)
    standings = status_of(store, title)
    leader = standings.best
    if leader is None:
        raise StudyError(f"study '{title}' has no completed trial yet")
    verdict: dict[str, Any] | None = None
    if not no_confirm:
        spec, directory = stored_spec(chosen), study_folder(store, title) / "winner"
        with display.progress((top + 1) * seeds, "runs") as advance:
            found = winner.confirm(
                chosen,
                spec,
                partial(winner.fresh_score, device=device)
                if spec.program is None
                else partial(winner.program_score, spec=spec, device=device),
                directory,
                top=top,
                seeds=seeds,
                progress=lambda done, total, what: advance(done, what),
            )
        verdict = asdict(found)
    if json_:
        display.print_json({"study": title, "best": standings.as_dict()["best"], "winner": verdict})
        return
    pairs = standing.best_line(leader, standings.metric)
    display.facts(f"study '{title}', as searched", {**pairs, "pipeline k_loc": leader.pipeline_k_loc, **leader.params})
    if verdict is not None:
        rows = [
            (each["name"], each["mean"], each["difference"], each["low"], each["high"])
            for each in verdict["candidates"]
        ]
        rows.append(("base", verdict["base_mean"], None, None, None))
        score = "k_loc (pipeline)" if standings.metric == "k_loc" else standings.metric
        columns = ["on fresh seeds", score, "against base", "from", "to"]
        display.table("", columns, rows)
        display.print_result(str(verdict["sentence"]))
    display.print_note(f"next: ris-hpo export --study {shlex.quote(title)} --out best.toml")


def report(
    study: StudyName = None,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="The page to write: .html, or .json for its figures.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="First measure the ml estimator on the study's scenes, once.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Write a study as one HTML file without external files, or print its figures."""
    from ris_hpo.process import storage_directory
    from ris_hpo.report.collect import collect
    from ris_hpo.report.html import as_json, headline, write_report
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.store.open import open_store

    if out is not None:
        options.check_output(out)
    store = open_store(storage, create=False)
    chosen = get_study(store, standing.choose_study(store, study))
    if reference:
        from ris_hpo.report.reference import attach
        from ris_hpo.search.lifecycle import stored_spec

        spec = stored_spec(chosen)
        if not spec.trains_networks:
            raise StudyError(f"study '{chosen.study_name}' trains no networks of this package: no reference to measure")
        with display.progress(spec.config({}).budget.pipeline_scenes, "scenes") as advance:
            folder = storage_directory() / "reference"
            attach(chosen, spec, folder, progress=lambda done, total: advance(done, "ml reference"))
    made = collect(chosen) if out is None else write_report(chosen, out)
    if json_:
        display.print_json(as_json(made))
        return
    for sentence in headline(made):
        display.print_result(sentence)
    if out is not None:
        display.print_note(f"written: {out}")


def export(
    out: Annotated[Path, typer.Option(help="The configuration file to write.")],
    study: StudyName = None,
    storage: Storage = None,
    trial: Annotated[
        int | None,
        typer.Option(min=0, help="Number of the trial.", show_default="the one with the best score in the search"),
    ] = None,
    form: Annotated[
        Literal["toml", "json"] | None, typer.Option("--format", help="Form of the file.", show_default="by its suffix")
    ] = None,
    json_: options.Json = False,
) -> None:
    """Write a trial's configuration with its provenance, for 'train --config' or a program of your own."""
    from ris_hpo.results.export import exported
    from ris_hpo.search.lifecycle import get_study, stored_spec
    from ris_hpo.store.open import open_store
    from ris_hpo.training.files import write_config

    options.check_output(out)
    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    chosen = get_study(store, title)
    found = exported(chosen, stored_spec(chosen), trial)
    write_config(found, out, form=form)
    provenance = found.provenance
    assert provenance is not None
    if json_:
        display.print_json({"file": str(out), **provenance.model_dump(mode="json")})
        return
    told = {"file": str(out), "study": title, "trial": provenance.trial, "fingerprint": provenance.config_fingerprint}
    score = provenance.k_loc if provenance.score is None else provenance.score
    scores = {provenance.metric or "k_loc": score, "floor": provenance.floor, "efficiency": provenance.efficiency}
    display.facts("", {**told, **scores})
    if provenance.program is None:
        display.print_note(f"next: ris-hpo train --config {shlex.quote(str(out))} --out runs/best")


def replay(
    number: Annotated[int, typer.Argument(min=0, help="Number of the trial.")],
    study: StudyName = None,
    storage: Storage = None,
    device: Annotated[str | None, typer.Option(help="Where to compute.", show_default="the trial's own")] = None,
    json_: options.Json = False,
) -> None:
    """Run a trial again from its parameters and seed, and compare the curves digit for digit."""
    from ris_hpo.physics.device import find_device
    from ris_hpo.process import StopSignals
    from ris_hpo.results.replay import replay as run_again
    from ris_hpo.store.open import open_store

    if device is not None:
        find_device(device)
    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    with StopSignals() as stop:
        found = run_again(store, title, number, device=device, stop=stop)
    standing.end_of_replay(found, json_=json_)


def spaces(
    name: Annotated[
        str | None, typer.Argument(help="One study, by name or file; without it, all study files are listed.")
    ] = None,
    json_: options.Json = False,
) -> None:
    """List the studies that can be run, or the search space of one."""
    from ris_hpo.config import description
    from ris_hpo.search.files import list_studies, load_study

    if name is None:
        known = {found: load_study(path) for found, path in list_studies().items()}
        if json_:
            display.print_json({found: spec.model_dump(mode="json") for found, spec in known.items()})
            return
        summary = [
            (found, len(spec.space), spec.sampler.name, spec.pruner.name, spec.budget.n_trials, spec.description)
            for found, spec in known.items()
        ]
        display.table(
            "", ["study", "dimensions", "sampler", "pruner", "trials", "what for"], summary, text={0, 2, 3, 5}
        )
        return
    spec = load_study(name)
    if json_:
        display.print_json({**spec.model_dump(mode="json"), "space_fingerprint": spec.space_fingerprint()})
        return
    base, config = spec.base_params(), spec.config({})
    rows = [
        (path, standing.range_of(each), base.get(path), standing.condition_of(each), description(config, path))
        for path, each in spec.space.items()
    ]
    columns = ["dimension", "range", "base", "when", "what it is"]
    display.table(f"{spec.name}: {spec.description}", columns, rows, text=range(5))


def init(
    name: Annotated[str, typer.Argument(help="The study to copy, as 'ris-hpo spaces' lists it.")],
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="studies/my-NAME.toml")] = None,
) -> None:
    """Copy a study file to edit."""
    from ris_hpo.atomic import make_folder, write_text
    from ris_hpo.search.files import load_study, study_file

    source = study_file(name)
    load_study(source)
    target = out or Path("studies") / f"my-{source.stem}.toml"
    if target.exists():
        raise OutputError(f"{target}: is there already; name another --out")
    if out is None:
        make_folder(target.parent)
    write_text(options.check_output(target, suffix=".toml"), source.read_text(encoding="utf-8"))
    display.print_result(str(target))
    display.print_note(f"next: edit it, then ris-hpo run --space {target} --n-trials 8")


def _proof(spec: StudySpec) -> str | None:
    """The proof for the form of this study's base network; made at small size if it is missing."""
    if not spec.trains_networks:
        return None
    from ris_hpo.process import storage_directory
    from ris_hpo.training.proof import SMALL_SCENES, find_certificate, prove, small_form

    folder, config = storage_directory() / "proofs", spec.config({})
    found = find_certificate(folder, config)
    if found is None:
        display.print_note("no phase-0 certificate for this code and network form: making a small one")
        found = prove(small_form(config), folder, scenes=SMALL_SCENES, epochs=400)
        display.print_note(f"passed: NMSE {found.nmse:.3f} on {found.scenes} memorised scenes, {found.seconds:.0f} s")
    return f"{found.code}-{found.form}"


def _gpus(text: str | None) -> list[str] | None:
    """``0,1`` as a list, ``none`` as an empty one, nothing as all there are."""
    if text is None:
        return None
    return [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests read."""
    examples: dict[Callable[..., None], str] = {
        run: "ris-hpo run --space wide --n-trials 40",
        worker: "ris-hpo worker --study wide --storage postgresql://ris_hpo@db/ris_hpo",
        status: "ris-hpo status --study wide --json",
        best: "ris-hpo best --study wide --top 3",
        report: "ris-hpo report --study wide --out report.html",
        export: "ris-hpo export --study wide --out best.toml",
        replay: "ris-hpo replay 3 --study wide",
        spaces: "ris-hpo spaces wide",
        init: "ris-hpo init wide --out studies/mine.toml",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
