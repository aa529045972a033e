"""What a person changes in the trials of a study: own configurations, another try, scores that do not count.

All of it is safe while the study runs: each change is one transaction, and workers see it at their next look.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.config import read_toml, suggestion, toml_value
from ris_hpo.errors import ConfigError, SpaceError, StudyError, reading
from ris_hpo.search.counting import cause_of, continuation, is_untouched, live_trials, state_of
from ris_hpo.search.dimension import Value, same
from ris_hpo.search.lifecycle import change_settings, get_study, stored_spec
from ris_hpo.search.spec import StudySpec, leaves
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store, ticket

# -- configurations that somebody asks for ---------------------------------------------------------------------------


def read_configurations(path: Path) -> list[dict[str, Any]]:
    """Read a file of configurations, each a mapping of searched keys to values.

    Args:
        path: ``.json`` with a list of objects (or one object), ``.toml`` with tables ``[[trial]]``, or ``.csv`` with
            the keys in its first line, where an empty cell leaves a key out. Keys may be dotted or nested.

    Raises:
        ConfigError: another kind of file, unreadable or malformed, or one without configurations.
    """
    if path.suffix == ".toml":
        tree = read_toml(path)
        if unknown := sorted(set(tree) - {"trial"}):
            raise ConfigError(f"{path}: found '{unknown[0]}', expected tables [[trial]] and nothing else")
        found = tree.get("trial", [])
    elif path.suffix in (".json", ".csv"):
        try:
            with reading(path, ConfigError):
                text = path.read_text(encoding="utf-8-sig")
            found = json.loads(text) if path.suffix == ".json" else _rows(text)
        except (ValueError, RecursionError, csv.Error) as error:  # a UnicodeDecodeError is a ValueError
            raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()} ({error})") from None
    else:
        raise ConfigError(f"{path}: expected a name that ends in .json, .toml or .csv")
    configurations = [found] if isinstance(found, Mapping) else found
    if not isinstance(configurations, list) or not all(isinstance(each, Mapping) for each in configurations):
        raise ConfigError(f"{path}: expected a list of configurations, each with its keys and values")
    if not configurations:
        raise ConfigError(f"{path}: holds no configuration")
    return [dict(leaves(each)) for each in configurations]


def _rows(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(text.splitlines(), strict=True)
    titles = list(reader.fieldnames or ())
    if repeated := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"the first line has {', '.join(repeated)} twice")
    rows = list(reader)
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"line {line} has another number of cells than the first line")
    return [{key.strip(): toml_value(cell) for key, cell in row.items() if cell.strip()} for row in rows]


@dataclass(frozen=True)
class Enqueued:
    """What ``enqueue`` did, or would do.

    Attributes:
        queued: configurations that were queued, as they were completed and checked.
        repeated: numbers of trials that have one of the configurations already, which was therefore left out.
        numbers: the trials that will run them; none where nothing was written.
        n_trials: number of trials of the study from now on.
    """

    queued: list[dict[str, Value]]
    repeated: list[int]
    numbers: list[int]
    n_trials: int


def enqueue(
    store: Store,
    name: str,
    configurations: Sequence[Mapping[str, Any]],
    *,
    again: bool = False,
    dry_run: bool = False,
) -> Enqueued:
    """Let a study try configurations of one's own next.

    Each takes the place of a trial that waits for the sampler, so that the study has as many trials as it was asked
    for; where none waits, the study's number of trials grows. What a configuration leaves out is the sampler's.

    Args:
        store: the store.
        name: the study.
        configurations: values by searched key.
        again: also those that a trial of the study has already.
        dry_run: check, and write nothing.

    Raises:
        SpaceError: a key that is not searched, or a value outside its range; nothing is written then.
        ConfigError: a configuration that the program refuses as a whole; nothing is written then.
    """
    study = get_study(store, name)
    spec, study_id = stored_spec(study), store.get_study_id_from_name(name)
    wanted = [
        checked_params(spec, configuration, f"configuration {place}")
        for place, configuration in enumerate(configurations, start=1)
    ]
    trials = study.get_trials(deepcopy=False)
    queued, repeated = [], []
    for params in wanted:
        present = next((trial.number for trial in trials if _has(trial, params)), None)
        if present is None or again:
            queued.append(params)
        else:
            repeated.append(present)
    now = datetime.now().astimezone().isoformat()
    tickets = {f"enqueued {now}#{place}": params for place, params in enumerate(queued)}

    def missing(present: list[FrozenTrial]) -> list[FrozenTrial]:
        known = {trial.user_attrs.get(names.ORIGIN) for trial in present}
        return [ticket(params, {names.ORIGIN: each}) for each, params in tickets.items() if each not in known]

    if dry_run:
        waiting = sum(is_untouched(trial) for trial in trials)
        return Enqueued(queued, repeated, [], len(live_trials(trials)) + max(0, len(queued) - waiting))
    store.enqueue(study_id, missing)
    trials = study.get_trials(deepcopy=False)
    n_trials = len(live_trials(trials))
    if n_trials > spec.budget.n_trials:
        change_settings(study, {"budget.n_trials": n_trials}, note=lambda sentence: None)
    numbers = [trial.number for trial in trials if trial.user_attrs.get(names.ORIGIN) in tickets]
    return Enqueued(queued, repeated, numbers, n_trials)


def checked_params(spec: StudySpec, configuration: Mapping[str, Any], what: str) -> dict[str, Value]:
    """Return a configuration as parameters of a study's space.

    Args:
        spec: the study.
        configuration: values by searched key.
        what: how to call it in the message.

    Raises:
        SpaceError: a key that is not searched, or not under these values; a value outside its range.
        ConfigError: the whole, with the base, is refused.
    """
    for path in configuration:
        if path not in spec.space:
            raise SpaceError(
                f"{what}: '{path}' is not searched by study '{spec.name}'{suggestion(path, [*spec.space])}"
            )
    if not configuration:
        raise SpaceError(f"{what}: sets nothing; set one of {', '.join(spec.space)}")
    params: dict[str, Value] = {}
    for path, dimension in spec.space.items():
        if path not in configuration:
            continue
        if not dimension.active(params):
            needed = "; ".join(
                f"'{parent}' is {' or '.join(map(str, each))}" for parent, each in dimension.when.items()
            )
            raise SpaceError(f"{what}: '{path}' is searched only where {needed}; set that too, or leave it out")
        value = configuration[path]
        if dimension.is_integer and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not dimension.contains(value):
            raise SpaceError(f"{what}: '{path}' = {value!r} lies outside its range, {dimension.in_words()}")
        params[path] = cast(Value, value)
    try:
        spec.config(params)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    return params


def _has(trial: FrozenTrial, params: Mapping[str, Value]) -> bool:
    """Say whether a trial has, or will have, exactly these parameters, and has not failed."""
    return trial.state is not TrialState.FAIL and any(
        params.keys() == own.keys() and all(same(own[path], value) for path, value in params.items())
        for own in (trial.params, trial.system_attrs.get("fixed_params", {}))
    )


# -- another try -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retried:
    """A failed trial that is tried again: why it failed, and the step that a checkpoint may let it go on from."""

    number: int
    cause: str
    last_step: int | None


def retry(
    store: Store,
    name: str,
    *,
    numbers: Collection[int] = (),
    causes: Collection[str] = (),
    every: bool = False,
    dry_run: bool = False,
) -> list[Retried]:
    """Queue failed trials again: with the same parameters and seed, from their last checkpoint where there is one.

    The study keeps its number of trials, since the new trial takes the place of the failed one. Limits on how often a
    trial is tried again start over.

    Args:
        store: the store.
        name: the study.
        numbers: trials by number.
        causes: trials that failed by one of these.
        every: all that failed.
        dry_run: write nothing.

    Returns:
        The failed trials.

    Raises:
        StudyError: no such trial, or one that has not failed or is continued by another one already.
    """
    study = get_study(store, name)
    trials = study.get_trials(deepcopy=False)
    failed = {trial.number: trial for trial in live_trials(trials) if cause_of(trial) not in (None, Cause.INVALIDATED)}
    for number in numbers:
        if number in failed:
            continue
        trial = _trial(study, trials, number)
        if cause_of(trial) in (None, Cause.INVALIDATED, Cause.WITHDRAWN):
            raise StudyError(f"trial {number} of study '{name}' is {state_of(trial)}; only failed ones are tried again")
        raise StudyError(f"trial {number} of study '{name}' is continued by a later trial already")
    unknown = set(causes) - {cause.value for cause in Cause}
    if unknown:
        known = [cause.value for cause in Cause if cause not in (Cause.WITHDRAWN, Cause.INVALIDATED)]
        raise StudyError(f"no trial fails by '{min(unknown)}'{suggestion(min(unknown), known)}")
    chosen = [trial for number, trial in failed.items() if every or number in numbers or str(cause_of(trial)) in causes]

    def successors(present: list[FrozenTrial]) -> list[FrozenTrial]:
        continued = {trial.user_attrs.get(names.PREDECESSOR) for trial in present}  # by somebody else meanwhile
        return [continuation(trial, {}) for trial in chosen if trial.number not in continued]

    if chosen and not dry_run:
        store.fill(store.get_study_id_from_name(name), successors)
    return [Retried(trial.number, str(cause_of(trial)), trial.last_step) for trial in chosen]


# -- trials whose score does not count -------------------------------------------------------------------------------


def invalidate(store: Store, name: str, numbers: Collection[int], reason: str, *, dry_run: bool = False) -> None:
    """Take ended trials out of every ranking, report and comparison, and out of what sampler and pruner learn from.

    They stay in the study with their scores, and still count as trials that have ended. ``reinstate`` takes it back.

    Args:
        store: the store.
        name: the study.
        numbers: the trials.
        reason: why, as it is shown; one line.
        dry_run: write nothing.

    Raises:
        StudyError: no such trial, or one that is not complete or pruned; no reason.
    """
    study = get_study(store, name)
    trials = study.get_trials(deepcopy=False)
    line = " ".join(reason.split())
    if not line:
        raise StudyError("an invalidated trial is shown with its reason: say why")
    for number in numbers:
        trial = _trial(study, trials, number)
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            raise StudyError(
                f"trial {number} of study '{name}' is {state_of(trial)}; only complete and pruned ones have a score "
                "to invalidate"
            )
    entry = {"reason": line, "time": datetime.now().astimezone().isoformat(timespec="seconds")}
    if not dry_run:
        store.change_attribute(
            store.get_study_id_from_name(name),
            names.INVALID,
            lambda before: {**(before or {}), **{str(number): entry for number in numbers}},
        )


def reinstate(store: Store, name: str, numbers: Collection[int], *, dry_run: bool = False) -> None:
    """Let the scores of invalidated trials count again.

    Raises:
        StudyError: no such trial, or one that was not invalidated.
    """
    study = get_study(store, name)
    trials = study.get_trials(deepcopy=False)
    for number in numbers:
        trial = _trial(study, trials, number)
        if cause_of(trial) != Cause.INVALIDATED:
            raise StudyError(f"trial {number} of study '{name}' is {state_of(trial)}; only invalidated ones come back")
    dropped = {str(number) for number in numbers}
    if not dry_run:
        store.change_attribute(
            store.get_study_id_from_name(name),
            names.INVALID,
            lambda before: {key: entry for key, entry in (before or {}).items() if key not in dropped},
        )


def _trial(study: Study, trials: Sequence[FrozenTrial], number: int) -> FrozenTrial:
    if not 0 <= number < len(trials):
        raise StudyError(f"study '{study.study_name}' has no trial {number}: it has {len(trials)}")
    return trials[number]
