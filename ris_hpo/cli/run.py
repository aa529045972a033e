"""Commands that run trials: run, worker."""

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
from ris_hpo.cli.options import PANEL, Storage, StudyName

if TYPE_CHECKING:
    from ris_hpo.workers.pool import Executor


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
    hours: Annotated[
        float | None,
        typer.Option(
            min=0, help="In place of a number of trials: core-hours and GPU-hours of all trials, over all runs."
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
        str | None,
        typer.Option(help="tpe, gp, cmaes, random, qmc, nsga2, grid, brute_force.", show_default="the study's"),
    ] = None,
    pruner: Annotated[
        str | None, typer.Option(help="asha, promotion, hyperband, median, wilcoxon, none.", show_default="the study's")
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
    target: Annotated[float | None, typer.Option(help="Stop when a trial reaches this score.")] = None,
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
    notify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COMMAND|URL",
            help="Send failed trials, each new best one, pauses and the end of the run as JSON to a command or a web "
            "address; may be repeated.",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the trials' curves there, for TensorBoard.")
    ] = None,
    no_proof: Annotated[
        bool, typer.Option("--no-proof", help="Skip the proof that such a network can learn; the study records this.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Run the trials of a study; resume it if it exists. A finished study gets no more trials.

    A study keeps what it was made with; run again, it changes only what the options name.
    """
    from ris_hpo.api.study import NO_PROOF, Study, certificate_of
    from ris_hpo.errors import StudyError
    from ris_hpo.programs.program import source
    from ris_hpo.search.files import checked, load_study, with_own_scenes
    from ris_hpo.search.lifecycle import as_made, create_or_resume_study, fill_budget, find_spec, stored_spec
    from ris_hpo.search.spec import StopSpec
    from ris_hpo.store.credentials import redact
    from ris_hpo.store.open import open_store
    from ris_hpo.workers.devices import plan_slots
    from ris_hpo.workers.local import LocalProcesses
    from ris_hpo.workers.ray import RayActors

    given: dict[str, Any] = {
        "sampler.name": sampler,
        "pruner.name": "none" if sampler == "nsga2" and pruner is None else pruner,
        "seed": seed,
        "stop.timeout_s": timeout,
        "stop.gpu_hours": gpu_hours,
        "stop.target": target,
        "stop.patience": patience,
        "budget.n_trials": n_trials,
        "budget.hours": hours,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    if hours is not None and n_trials is not None:
        raise options.UsageError("--hours and --n-trials are two kinds of budget; give one of them")
    if n_trials is not None:
        changes["budget.hours"] = None
    if no_stop:
        changes = dict.fromkeys([f"stop.{rule}" for rule in StopSpec.model_fields]) | changes
    known = None
    if space is None and study is not None:
        there = open_store(storage, create=program is not None)
        known = find_spec(there, study)
        if known is None and program is None:  # a name mistyped must not begin a study of the default space
            raise StudyError(f"no study '{study}' in {there.redacted}; to make it, name its --space")
    spec = known or load_study(space or "wide")
    if program is not None:
        spec = spec.replaced({"program": program})
    base = options.changes(set_)
    if surface:
        from ris_hpo.physics.surfaces import surface_changes  # imported late, since it brings torch

        base = {**surface_changes(surface, "scene."), **base}
    if base:
        spec = spec.with_base(base)
    named = {*base, *(["budget.scenes"] if epochs_per_trial is not None else [])}
    if epochs_per_trial is not None:
        spec = spec.with_epochs(epochs_per_trial)
    spec = with_own_scenes(spec)
    checked(spec.replaced(changes))
    chosen = _gpus(gpus)
    if engine == "ray" and chosen:
        raise options.UsageError("--gpus LIST counts the GPUs of one machine; with --engine ray leave it out, or none")
    store = open_store(storage)
    if engine == "ray" and store.is_sqlite:
        raise options.UsageError("--engine ray needs a store that every node reaches: --storage postgresql://...")
    # before a study is made: a device that is not there is refused here
    slots = plan_slots(workers, chosen, per_gpu) if engine == "local" else []
    if fork is None:
        spec = as_made(store, study or spec.name, spec, named)
    proof = NO_PROOF if no_proof else certificate_of(spec, display.print_note)
    command = redact(shlex.join(["ris-hpo", *sys.argv[1:]]))
    made = create_or_resume_study(
        store,
        spec,
        name=study,
        changes=changes,
        named=named,
        update=update,
        fork=fork,
        warm_start=warm_start,
        proof=proof,
        command=command,
        note=display.print_note,
    )
    name = made.study_name
    added = fill_budget(store, made, n_trials)
    budget = stored_spec(made).budget
    size = f"{budget.n_trials} trials, {added} to add" if budget.hours is None else f"{budget.hours:g} hours"
    display.print_note(f"study '{name}' in {store.redacted}: {size}")

    def executor(folder: Path) -> Executor:
        if engine == "local":
            return LocalProcesses(slots, folder)
        own = None if spec.program is None else source(spec.program)
        return RayActors(store, workers=workers, address=address, gpus=chosen is None, per_gpu=per_gpu, program=own)

    opened = Study(store, made)
    supervisor = opened.supervisor(executor)
    live.follow(opened.followed(supervisor, notify=notify or (), tensorboard=tensorboard))
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
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
