"""Making, resuming and forking studies; what a study's attributes have to agree on before anything is added to it."""

from __future__ import annotations

import json
import platform
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from importlib import metadata
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.config import suggestion
from ris_hpo.errors import SpaceError, StudyError
from ris_hpo.migrations import RENAMED
from ris_hpo.scoring.k_loc import SCORE_VERSION
from ris_hpo.search import counting
from ris_hpo.search.counting import Direction
from ris_hpo.search.points import Points
from ris_hpo.search.spec import NAME, StudySpec, leaves
from ris_hpo.search.status import StudyStatus, study_status
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.credentials import redact
from ris_hpo.store.owner import this_user

_WARM_TRIALS = 5
_COMPARED = ("kind", "program", "score", "direction", "worst", "objective", "constraints")
_FIXED = {"name", "description", *_COMPARED, "base", "space", "base_schema"}
_SETTLING_S = 10.0  # how long a study may stand without attributes while another process is making it


def get_study(store: Store, name: str) -> Study:
    """Return a study by name.

    Raises:
        StudyError: there is none, with a suggestion.
    """
    quiet_optuna()
    try:
        # the sampler is set anew for every trial; this one only keeps Optuna from making its default
        return optuna.load_study(study_name=name, storage=store, sampler=RandomSampler(0))
    except KeyError:
        known = [study.study_name for study in store.get_all_studies()]
        hint = suggestion(name, known) if known else "; the store has none yet"
        raise StudyError(f"no study '{name}' in {store.redacted}{hint}") from None


def only_study(store: Store) -> str:
    """Return the name of the only study of a store.

    Raises:
        StudyError: none, or several.
    """
    known = sorted(study.study_name for study in store.get_all_studies())
    if not known:
        raise StudyError(f"{store.redacted} holds no study yet; start one with 'ris-hpo run'")
    if len(known) > 1:
        raise StudyError(f"{store.redacted} holds several studies: {', '.join(known)}; choose one with --study")
    return known[0]


def check_name(name: str) -> None:
    """Refuse a name that a study cannot have.

    Raises:
        StudyError: it has other characters, or too many.
    """
    if re.fullmatch(NAME, name) is None:
        raise StudyError(
            f"study '{name}': a name has letters, digits, '.', '_' and '-', begins with one of the former two, and has "
            "64 characters at most; folders are called by it"
        )


def stored_spec(study: Study) -> StudySpec:
    """Return the specification a study was made with.

    Raises:
        StudyError: the study was not made by this program.
    """
    check_name(study.study_name)
    tree = study.user_attrs.get(names.SPEC)
    if tree is None:
        raise StudyError(f"study '{study.study_name}' was not made by ris-hpo: it carries no specification")
    return StudySpec.from_stored(tree, f"study '{study.study_name}'")


def find_spec(store: Store, name: str) -> StudySpec | None:
    """Return the specification of a study, or None where there is no study of that name."""
    if name not in [study.study_name for study in store.get_all_studies()]:
        return None
    return stored_spec(get_study(store, name))


def as_made(store: Store, title: str, spec: StudySpec, named: Collection[str]) -> StudySpec:
    """Return a study file's specification with the base values that options named when the study was made.

    Args:
        store: the store.
        title: the study; one that is not there has none.
        spec: from the study file, with what is named now.
        named: keys of the base that are named now, which count.
    """
    if title not in [study.study_name for study in store.get_all_studies()]:
        return spec
    study = get_study(store, title)
    before = set(study.user_attrs.get(names.NAMED, ())) - set(named)
    if not before:
        return spec
    base = stored_spec(study).base
    return spec.with_base({path: base[path] for path in sorted(before) if path in base})


def create_or_resume_study(
    store: Store,
    spec: StudySpec,
    *,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    named: Collection[str] = (),
    update: bool = False,
    fork: str | None = None,
    warm_start: str | None = None,
    proof: str | None = None,
    command: str = "",
    score_version: int = SCORE_VERSION,
    note: Callable[[str], None] = lambda sentence: None,
) -> Study:
    """Return the study of ``spec``, new or resumed.

    A study keeps what it was made with. Resumed, it takes from ``spec`` nothing but what ``changes`` or ``update``
    name, and each of these is recorded in the study's attributes.

    Args:
        store: the store.
        spec: what is searched, as the study file has it.
        name: the study's name; the specification's own by default.
        changes: settings other than the file's, by dotted ``StudySpec`` keys such as ``sampler.name``.
        named: keys of the base that options named, see ``as_made``.
        update: also take the file's sampler, pruner, retries, stop rules, and time limits of trials.
        fork: make a new study of this name instead, warm-started from the study ``name`` where that exists.
        warm_start: another study of the store whose best trials are tried first.
        proof: fingerprint of the phase-0 certificate, or ``no-proof``.
        command: the command line, for the record.
        score_version: version of the score; this program's by default.
        note: called with one sentence on each setting that was changed, or that differs and was not.

    Raises:
        SpaceError: the study exists with another space, base or number of objectives, or was scored by another version.
        StudyError: the fork exists already; the study to start from does not; a name that no folder can have.
    """
    quiet_optuna()
    source = name or spec.name
    title = fork or source
    check_name(title)
    existing = [study.study_name for study in store.get_all_studies()]
    if fork is not None:
        if fork in existing:
            raise StudyError(f"study '{fork}' exists already; choose another name for the fork")
        warm_start = warm_start or (source if source in existing else None)
    if warm_start is not None and warm_start not in existing:
        raise StudyError(f"no study '{warm_start}' to start from{suggestion(warm_start, existing)}")
    made = spec.replaced(changes or {})
    attributes: dict[str, Any] = {
        names.SPEC: made.whole().stored(),
        names.SPACE_FINGERPRINT: made.space_fingerprint(),
        names.SCORE_VERSION: score_version,
        names.PROOF: proof,
        names.COMMAND: redact(command),
        names.STARTED_BY: this_user(),
        names.VERSIONS: versions(),
        names.NAMED: sorted(named) or None,
        names.WARM_START: warm_start,
        names.FORKED_FROM: source if fork is not None else None,
    }
    try:
        store.create_new_study([StudyDirection[direction.upper()] for direction in made.directions], title)
    except DuplicatedStudyError:
        study = get_study(store, title)
        if _is_made(store, study):
            check_version(study, score_version)
            _check_same_search(study, stored_spec(study), spec, _free_name(store, title))
            _change(study, spec, dict(changes or {}), update=update, note=note)
            return study
    study = get_study(store, title)
    _write(study, made, attributes)
    return study


def _write(study: Study, spec: StudySpec, attributes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # set_metric_names is marked so
        study.set_metric_names(spec.metric_names)
    # the fingerprint goes last: a study that has it has everything
    for key in sorted(attributes, key=lambda key: key == names.SPACE_FINGERPRINT):
        if attributes[key] is not None:
            study.set_user_attr(key, attributes[key])


def _is_made(store: Store, study: Study) -> bool:
    """Wait until whoever creates the study has described it; False where its maker died before it did."""
    study_id = store.get_study_id_from_name(study.study_name)
    deadline = time.monotonic() + _SETTLING_S
    while names.SPACE_FINGERPRINT not in study.user_attrs:
        if store.get_all_trials(study_id, deepcopy=False):
            raise StudyError(f"study '{study.study_name}' was not made by ris-hpo: it carries no specification")
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def check_version(study: Study, score_version: int = SCORE_VERSION) -> None:
    """Refuse a study whose trials this program would score by another rule.

    Raises:
        SpaceError: it was scored by another version of ``k_loc``.
    """
    recorded = study.user_attrs.get(names.SCORE_VERSION, score_version)
    if recorded != score_version:
        raise SpaceError(
            f"study '{study.study_name}' was scored by version {recorded} of k_loc, this program has {score_version}; "
            "go on with the version that made it, or add --fork NEW to start a new one"
        )


def check_code(study: Study, spec: StudySpec) -> None:
    """Refuse a study whose trials this program would configure differently from those that it has.

    The first and the last trial that ended well are configured again from their parameters; another fingerprint than
    the recorded one means that the code, here or there, has other settings or other defaults.

    Raises:
        SpaceError: a trial of the same parameters would run another configuration.
    """
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    known = [t for t in study.get_trials(deepcopy=False, states=states) if names.CONFIG_FINGERPRINT in t.user_attrs]
    for trial in known[:1] + known[1:][-1:]:
        recorded, seed = trial.user_attrs[names.CONFIG_FINGERPRINT], trial.user_attrs.get(names.SEED)
        root = counting.lineage_root(trial)
        if not spec.ran(recorded, trial.params, root, seed=seed):
            built = spec.config(trial.params, root, seed=seed).fingerprint()
            made_by = study.user_attrs.get(names.VERSIONS, {}).get("ris-hpo", "unknown")
            raise SpaceError(
                f"trial {trial.number} of study '{study.study_name}' ran configuration {recorded}, this program builds "
                f"{built} from the same parameters; go on with the version that ran it "
                f"({trial.user_attrs.get(names.CODE, made_by)}), or start a new study with --fork NEW"
            )


def _check_same_search(study: Study, old: StudySpec, new: StudySpec, free_name: str) -> None:
    """Refuse to add trials that could not be compared with those that the study has.

    Raises:
        SpaceError: space, base configuration, program or objective are not the study's.
    """
    title = study.study_name
    fork = f"--fork {free_name}"
    renamed = RENAMED if old.base_schema == 0 else {}
    made_with = {renamed.get(path, path): dimension for path, dimension in old.space.items()}
    for path in sorted({*made_with, *new.space}):
        before, now = made_with.get(path), new.space.get(path)
        if before != now or before is None or now is None or before.is_integer != now.is_integer:
            raise SpaceError(
                f"study '{title}' was made with another space ('space.{path}' differs); add {fork} to start a new one"
            )
    for field in _COMPARED:
        if getattr(old, field) != getattr(new, field):
            raise SpaceError(f"study '{title}' was made with another {field}; add {fork} to start a new one")
    # the pruner may differ, and with promotion it has a part in the configuration
    alike = new.replaced({"pruner": old.pruner, "sampler": old.sampler, "budget.equal": old.budget.equal})
    before_values, now_values = (dict(leaves(spec.config({}).model_dump(mode="json"))) for spec in (old, alike))
    for path in sorted({*before_values, *now_values}):
        was, has = before_values.get(path), now_values.get(path)
        if was != has and path in new.base:
            raise SpaceError(
                f"study '{title}' was made with another base ('base.{path}' differs: it was {was!r}, now {has!r}); "
                f"add {fork} to start a new one"
            )
        if was != has:
            raise SpaceError(
                f"study '{title}' was made with {path} = {was!r}, the default of this version is {has!r}; go on with "
                f"--set {path}={json.dumps(was)}, or add {fork} to start a new one"
            )


_UPDATED = ("sampler", "pruner", "retries", "stop", "keep", "budget.trial_timeout_s", "budget.stall_timeout_s")


def _change(
    study: Study, spec: StudySpec, changes: dict[str, Any], *, update: bool, note: Callable[[str], None]
) -> None:
    """Change the settings of a study that are named, record each, and say which of the file's are not taken."""
    stored = stored_spec(study)
    old, filed = (dict(leaves(each.model_dump(mode="json", exclude=_FIXED))) for each in (stored, spec))
    differing = {key: value for key, value in filed.items() if old[key] != value and key not in changes}
    if update:
        taken = {key: value for key, value in differing.items() if key.startswith(_UPDATED)}
        changes |= taken
        differing = {key: value for key, value in differing.items() if key not in taken}
    if differing:
        kept = [f"{key} {json.dumps(old[key])} (the file has {json.dumps(differing[key])})" for key in differing]
        note(f"study '{study.study_name}' keeps what it was made with: {', '.join(kept)}")
    change_settings(study, changes, note=note)


def change_settings(study: Study, changes: Mapping[str, Any], *, note: Callable[[str], None]) -> None:
    """Change settings of a study that are not those its trials are compared by, and record each change.

    Args:
        study: the study.
        changes: new values by dotted ``StudySpec`` key.
        note: called with one sentence on each that was changed.

    Raises:
        SpaceError: the study would get another number of objectives.
    """
    stored = stored_spec(study)
    old = dict(leaves(stored.model_dump(mode="json", exclude=_FIXED)))
    changed = stored.replaced(changes)
    if (rungs := _rungs(changed)) != (before := _rungs(stored)):
        raise SpaceError(
            f"study '{study.study_name}' was made with {before}, and cannot go on with {rungs}: its trials would not "
            "compare; add --fork NEW to start a new one"
        )
    if changed.metric_names != stored.metric_names:
        raise SpaceError(
            f"study '{study.study_name}' minimises {' and '.join(stored.metric_names)}, the sampler "
            f"{changed.sampler.name} {' and '.join(changed.metric_names)}; add --fork NEW to start a new one"
        )
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    new = dict(leaves(changed.model_dump(mode="json", exclude=_FIXED)))
    entries = [{"time": now, "key": key, "old": old[key], "new": new[key]} for key in new if old[key] != new[key]]
    if entries:
        study.set_user_attr(names.CHANGES, [*study.user_attrs.get(names.CHANGES, []), *entries])
        study.set_user_attr(names.SPEC, changed.stored())
    for entry in entries:
        note(f"study '{study.study_name}': {entry['key']} was {entry['old']!r}, is {entry['new']!r} from now on")


def _rungs(spec: StudySpec) -> str:
    """What of a study's pruner cannot change while trials are paused, in words."""
    pruner, alike = spec.pruner, f", trials of equal {spec.budget.equal}"
    if pruner.name != "promotion":
        return f"no rungs with promotion{alike}"
    first = "" if pruner.first_scenes is None else f" from {pruner.first_scenes}"
    return f"rungs with promotion{first} by {pruner.reduction}{alike}"


def _free_name(store: Store, title: str) -> str:
    taken = {study.study_name for study in store.get_all_studies()}
    number = 2
    while f"{title}-{number}" in taken:
        number += 1
    return f"{title}-{number}"


def fill_budget(store: Store, study: Study, n_trials: int | None = None) -> int:
    """Give the study its tickets, so that exactly ``n_trials`` of its trials will end.

    The base configuration is the first, the best of a warm start's trials come next, the rest is the sampler's.

    Args:
        store: the store.
        study: the study.
        n_trials: trials of the study that are to end for good, those that already have included; waiting ones beyond
            that number are withdrawn. None: as many as the study has been given, and none is withdrawn.

    Returns:
        Tickets added; 0 when the same command runs again.

    Raises:
        StudyError: not a number of trials.
    """
    spec = stored_spec(study)
    wanted = spec.budget.n_trials if n_trials is None else n_trials
    if wanted < 1:
        raise StudyError(f"number of trials: {wanted} is not above 0")
    if n_trials is None and spec.budget.hours is not None:
        wanted = 1 if names.WARM_START not in study.user_attrs else 1 + _WARM_TRIALS  # the rest come while it runs
    points = Points(spec)
    if points.is_finite and (there := points.count(wanted)) < wanted:
        raise StudyError(
            f"study '{study.study_name}': its space has {there} points, and none is tried twice; found a budget of "
            f"{wanted} trials, expected at most --n-trials {there}"
        )

    def first() -> list[FrozenTrial]:
        base = spec.base_params()
        opening = [ticket(base, {names.ORIGIN: "base"})] if base else []
        source = study.user_attrs.get(names.WARM_START)
        if source is not None:
            opening += _warm_tickets(store, source, spec, base)
        return opening

    study_id = store.get_study_id_from_name(study.study_name)
    return counting.fill(store, study_id, wanted, first, withdraw=n_trials is not None)


def top_up(store: Store, study_id: int, spec: StudySpec, stock: int) -> int:
    """Let so many trials wait, in a study whose budget is hours; a finite space gives no more than it has.

    Returns:
        Tickets added.
    """
    points = Points(spec)

    def missing(present: list[FrozenTrial]) -> list[FrozenTrial]:
        short = max(0, stock - counting.tally(present).waiting)
        live = len(counting.live_trials(present))
        room = points.count(live + short) - live if points.is_finite else short
        return [ticket() for _ in range(min(short, room))]

    return store.fill(study_id, missing)


def _warm_tickets(store: Store, source: str, spec: StudySpec, base: dict[str, Any]) -> list[FrozenTrial]:
    tickets: list[FrozenTrial] = []
    seen = [base]
    study = get_study(store, source)
    other = stored_spec(study)
    for trial in counting.ranked(study.get_trials(deepcopy=False), other.direction):
        values = dict(leaves(other.config(trial.params).model_dump(mode="json")))
        params: dict[str, Any] = {}
        for path, dimension in spec.space.items():
            if dimension.active(params):
                value = values.get(path, base.get(path))
                if value is None or not dimension.contains(value):
                    value = base.get(path)
                if value is None:
                    continue  # conditional and off in the base: left to the sampler
                params[path] = value
        if params not in seen:
            seen.append(params)
            tickets.append(ticket(params, {names.ORIGIN: f"warm-start {source}#{trial.number}"}))
        if len(tickets) == _WARM_TRIALS:
            break
    return tickets


def status(store: Store, name: str) -> StudyStatus:
    """Return where a study stands.

    Raises:
        StudyError: there is no such study.
    """
    study = get_study(store, name)
    metric = (study.metric_names or ["k_loc"])[0]
    study_id, direction = store.get_study_id_from_name(name), direction_of(study)
    trials = store.outline(study_id)
    best = counting.best_trial(trials, direction)
    if best is not None:  # the one whose parameters are shown
        whole = store.get_trial(store.get_trial_id_from_study_id_trial_number(study_id, best.number))
        trials = [whole if trial is best else trial for trial in trials]
    return study_status(study.study_name, trials, metric, direction)


def direction_of(study: Study) -> Direction:
    """Return which way the score of a study is better."""
    return "maximize" if study.directions[0] is StudyDirection.MAXIMIZE else "minimize"


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("ris-hpo", "torch", "optuna", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def quiet_optuna() -> None:
    """Keep Optuna's own log lines to warnings: the command line tells the story itself."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
