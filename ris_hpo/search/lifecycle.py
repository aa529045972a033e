"""Making, resuming and forking studies; what a study's attributes have to agree on before anything is added to it."""

from __future__ import annotations

import platform
import re
import time
import warnings
from importlib import metadata
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from ris_hpo.config import suggestion
from ris_hpo.errors import SpaceError, StudyError
from ris_hpo.programs.program import Program, load_program
from ris_hpo.scoring.k_loc import SCORE_VERSION
from ris_hpo.search import counting
from ris_hpo.search.spec import NAME, StudySpec
from ris_hpo.search.status import StudyStatus, study_status
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.credentials import redact

_WARM_TRIALS = 5
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


def _check_name(name: str) -> None:
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
    _check_name(study.study_name)
    tree = study.user_attrs.get(names.SPEC)
    if tree is None:
        raise StudyError(f"study '{study.study_name}' was not made by ris-hpo: it carries no specification")
    return StudySpec.parse(tree, f"study '{study.study_name}'")


def create_or_resume_study(
    store: Store,
    spec: StudySpec,
    *,
    name: str | None = None,
    fork: str | None = None,
    warm_start: str | None = None,
    proof: str | None = None,
    command: str = "",
    score_version: int = SCORE_VERSION,
) -> Study:
    """Return the study of ``spec``, new or resumed.

    Args:
        store: the store.
        spec: what is searched.
        name: the study's name; the specification's own by default.
        fork: make a new study of this name instead, warm-started from the study ``name`` where that exists.
        warm_start: another study of the store whose best trials are tried first.
        proof: fingerprint of the phase-0 certificate, or ``no-proof``.
        command: the command line, for the record.
        score_version: version of the score; this program's by default.

    Raises:
        SpaceError: the study exists with another space, or was scored by another version.
        StudyError: the fork exists already; the study to start from does not; a name that no folder can have.
    """
    quiet_optuna()
    source = name or spec.name
    title = fork or source
    _check_name(title)
    existing = [study.study_name for study in store.get_all_studies()]
    if fork is not None:
        if fork in existing:
            raise StudyError(f"study '{fork}' exists already; choose another name for the fork")
        warm_start = warm_start or (source if source in existing else None)
    if warm_start is not None and warm_start not in existing:
        raise StudyError(f"no study '{warm_start}' to start from{suggestion(warm_start, existing)}")
    attributes: dict[str, Any] = {
        names.SPEC: spec.model_dump(mode="json"),
        names.SPACE_FINGERPRINT: spec.space_fingerprint(),
        names.SCORE_VERSION: score_version,
        names.PROOF: proof,
        names.COMMAND: redact(command),
        names.VERSIONS: versions(),
        names.WARM_START: warm_start,
        names.FORKED_FROM: source if fork is not None else None,
    }
    try:
        store.create_new_study([optuna.study.StudyDirection.MINIMIZE] * len(spec.directions), title)
    except DuplicatedStudyError:
        return _resumed(store, get_study(store, title), spec, attributes)
    study = get_study(store, title)
    _write(study, spec, attributes)
    return study


def _write(study: Study, spec: StudySpec, attributes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # set_metric_names is marked so
        study.set_metric_names(spec.metric_names)
    # the fingerprint goes last: a study that has it has everything
    for key in sorted(attributes, key=lambda key: key == names.SPACE_FINGERPRINT):
        if attributes[key] is not None:
            study.set_user_attr(key, attributes[key])


def _resumed(store: Store, study: Study, spec: StudySpec, attributes: dict[str, Any]) -> Study:
    title = study.study_name
    study_id = store.get_study_id_from_name(title)
    deadline = time.monotonic() + _SETTLING_S
    while names.SPACE_FINGERPRINT not in study.user_attrs:
        if store.get_all_trials(study_id, deepcopy=False):
            raise StudyError(f"study '{title}' was not made by ris-hpo: it carries no specification")
        if time.monotonic() > deadline:  # its maker died between creating and describing it
            _write(study, spec, attributes)
            return study
        time.sleep(0.1)
    stored = study.user_attrs
    fork = f"--fork {_free_name(store, title)}"
    if stored[names.SPACE_FINGERPRINT] != attributes[names.SPACE_FINGERPRINT]:
        changed = _difference(stored_spec(study), spec)
        raise SpaceError(f"study '{title}' was made with another space ({changed}); add {fork} to start a new one")
    if stored[names.SCORE_VERSION] != attributes[names.SCORE_VERSION]:
        raise SpaceError(
            f"study '{title}' was scored by version {stored[names.SCORE_VERSION]} of k_loc, this program has "
            f"{attributes[names.SCORE_VERSION]}; add {fork} to start a new one"
        )
    if stored[names.SPEC] != attributes[names.SPEC]:  # the sampler, pruner, budget or stop rules may change
        study.set_user_attr(names.SPEC, attributes[names.SPEC])
    return study


def _free_name(store: Store, title: str) -> str:
    taken = {study.study_name for study in store.get_all_studies()}
    number = 2
    while f"{title}-{number}" in taken:
        number += 1
    return f"{title}-{number}"


def _difference(old: StudySpec, new: StudySpec) -> str:
    before = {**old.model_dump(mode="json", include={"base", "space"})}
    after = {**new.model_dump(mode="json", include={"base", "space"})}
    for table in ("space", "base"):
        for key in sorted({*before[table], *after[table]}):
            if before[table].get(key) != after[table].get(key):
                return f"'{table}.{key}' differs"
    return "its objective differs"


def fill_budget(store: Store, study: Study, n_trials: int, *, program: Program | None = None) -> int:
    """Give the study its tickets, so that exactly ``n_trials`` of its trials will end.

    The base configuration is the first, the best of a warm start's trials come next, the rest is the sampler's.

    Args:
        store: the store.
        study: the study.
        n_trials: trials of the study that shall end for good, those that already have included.
        program: the training program; it defines the base values.

    Returns:
        Tickets added; 0 when the same command runs again.

    Raises:
        StudyError: not a number of trials.
    """
    if n_trials < 1:
        raise StudyError(f"number of trials: {n_trials} is not above 0")
    spec = stored_spec(study)

    def first() -> list[FrozenTrial]:
        base = spec.base_params((program or load_program(spec.kind)).config)
        opening = [ticket(base, {names.ORIGIN: "base"})]
        source = study.user_attrs.get(names.WARM_START)
        if source is not None:
            opening += _warm_tickets(store, source, spec, base)
        return opening

    return counting.fill(store, store.get_study_id_from_name(study.study_name), n_trials, first)


def _warm_tickets(store: Store, source: str, spec: StudySpec, base: dict[str, Any]) -> list[FrozenTrial]:
    tickets: list[FrozenTrial] = []
    seen = [base]
    for trial in counting.ranked(get_study(store, source).get_trials(deepcopy=False)):
        params: dict[str, Any] = {}
        for path, dimension in spec.space.items():
            if dimension.active(params):
                value = trial.params.get(path, base.get(path))
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
    return study_status(study.study_name, study.get_trials(deepcopy=False))


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
