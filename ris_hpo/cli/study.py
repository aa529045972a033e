"""Commands around a study: status, top, best, compare, report, export, replay, spaces, init."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ris_hpo.cli import display, live, options, standing
from ris_hpo.cli.options import PANEL, Storage, StudyName
from ris_hpo.errors import OutputError, StudyError


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
                device=device,
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


def top(
    study: StudyName = None,
    storage: Storage = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Follow a study that somebody else runs, until it has ended or you press Ctrl-C."""
    from ris_hpo.store.open import open_store
    from ris_hpo.workers.watch import watched

    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    live.follow(watched(store, title, interval))
    standing.show_status(store, title, json_=False)


def compare(
    first: Annotated[str, typer.Argument(help="The one study.")],
    second: Annotated[str, typer.Argument(help="The other study.")],
    storage: Storage = None,
    other_storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Store of the other study.", show_default="the same")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write a page, ending in .html.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Fresh seeds for each winner.")] = 5,
    as_searched: Annotated[bool, typer.Option("--as-searched", help="Train nothing; show both as searched.")] = False,
    device: options.Device = "cpu",
    json_: options.Json = False,
) -> None:
    """Compare two studies: train the winner of each again on the same new seeds and scenes, and tell the difference."""
    from ris_hpo.atomic import write_text
    from ris_hpo.physics.device import find_device
    from ris_hpo.process import storage_directory
    from ris_hpo.results.compare import compare_studies, comparison_page
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.store.open import open_store

    if out is not None:
        options.check_output(out, suffix=".html")
    find_device(device)
    store = open_store(storage, create=False)
    other = store if other_storage is None else open_store(other_storage, create=False)
    one, two = get_study(store, first), get_study(other, second)
    with display.progress(2 * seeds, "runs") as advance:
        found = compare_studies(
            one,
            two,
            storage_directory() / "compare",
            seeds=seeds,
            device=device,
            train=not as_searched,
            progress=lambda done, total, what: advance(done, what),
        )
    if out is not None:
        write_text(out, comparison_page(found, one, two))
        display.print_note(f"written: {out}")
    if json_:
        display.print_json(found.as_dict())
        return
    columns = ["study", "trials", "best trial", f"{found.metric} as searched", "on fresh seeds", "floor"]
    rows = [
        (each.study, each.trials, each.best, each.score, each.mean, each.floor) for each in (found.first, found.second)
    ]
    display.table("", columns, rows)
    display.print_result(found.sentence)


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
    display.facts("", told | {name: value for name, value in scores.items() if value is not None})
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
        (path, each.in_words(), base.get(path), standing.condition_of(each), description(config, path))
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


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests read."""
    examples: dict[Callable[..., None], str] = {
        status: "ris-hpo status --study wide --json",
        best: "ris-hpo best --study wide --top 3",
        top: "ris-hpo top --study wide",
        compare: "ris-hpo compare wide narrow --out comparison.html",
        report: "ris-hpo report --study wide --out report.html",
        export: "ris-hpo export --study wide --out best.toml",
        replay: "ris-hpo replay 3 --study wide",
        spaces: "ris-hpo spaces wide",
        init: "ris-hpo init wide --out studies/mine.toml",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
