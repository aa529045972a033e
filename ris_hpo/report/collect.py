"""What a report says of a study, as plain values; ``html`` writes them as a page or as JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy import stats

from ris_hpo.scoring.k_loc import WORST_K_LOC
from ris_hpo.search.counting import Direction, cause_of, is_paused, ranked, state_of, tally
from ris_hpo.search.lifecycle import direction_of
from ris_hpo.search.status import standing_verdict
from ris_hpo.store import attributes as names
from ris_hpo.store.credentials import redact
from ris_hpo.text import short_number

MIN_COMPARED: Final = 4
MAX_COMPARED: Final = 500  # the latest; the forest's time grows faster than their number
_PACKAGES: Final = ("ris-hpo", "torch", "optuna", "optuna-dashboard", "sqlalchemy", "numpy")


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial as the report sees it."""

    number: int
    state: str
    value: float | None
    last_value: float | None
    params: dict[str, Any]
    scores: dict[str, float | None]
    pipeline: dict[str, float | None]
    floor: float | None
    efficiency: float | None
    scenes: int
    seconds: float
    core_seconds: float
    gpu_seconds: float
    origin: str | None
    cause: str | None
    error: str | None
    diverged: str | None
    lineage: int | None
    config_fingerprint: str | None
    host: str | None
    device: str | None
    started: str | None
    ended: str | None
    metrics: dict[str, float]
    curve: list[tuple[int, float]]

    @property
    def ranks(self) -> bool:
        """Whether the trial takes part in a ranking: complete, and not diverged."""
        return self.value is not None and self.diverged is None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of the ended trials at one step; importances, slices and parallel coordinates are taken from them.

    Final scores would compare survivors alone: a parameter that decides which trials survive would seem to have no
    influence, because all survivors share its value.

    Attributes:
        step: scenes seen, or the unit of one's own program; None where no trial reported anything on its way, so that
            final scores are compared.
        values: score by number of the trial.
        complete: trials among them that were completed.
        pruned: trials among them that were pruned.
        paused: trials among them that are paused at a rung.
        diverged: trials among them that diverged; one that did so before the step counts at the worst score.
        left_out: ended trials without a score at the step.
    """

    step: int | None
    values: dict[int, float]
    complete: int
    pruned: int
    paused: int
    diverged: int
    left_out: int


@dataclass(frozen=True, slots=True)
class Pruning:
    """What pruning saved, in scenes and in seconds, against running every pruned trial to the end."""

    pruned: int
    spent_scenes: int
    saved_scenes: int
    saved_seconds: float
    saved_share: float


@dataclass(frozen=True, slots=True)
class Report:
    """A study, ready to be written."""

    study: str
    description: str
    program: str | None
    metric: str
    direction: Direction
    step_unit: str
    command: str | None
    made: str
    started: str | None
    ended: str | None
    objective: str
    sampler: str | None
    pruner: str | None
    proof: str | None
    space_fingerprint: str | None
    score_version: int | None
    counts: dict[str, int]
    causes: dict[str, int]
    best: Trial | None
    base: Trial | None
    floor: float | None
    reference: dict[str, dict[str, float | None]]
    base_params: dict[str, Any]
    comparison: Comparison
    importances: dict[str, float]
    importances_note: str | None
    space: dict[str, dict[str, Any]]
    pruning: Pruning
    cost: dict[str, float]
    winner: dict[str, Any] | None
    environment: dict[str, Any]
    trials: list[Trial]

    @property
    def sign(self) -> int:
        """1 where lower scores are better, -1 where higher ones are."""
        return 1 if self.direction == "minimize" else -1

    def ranked(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return trials by their final scores, best first; those without one come last."""
        return sorted(trials, key=lambda t: (math.inf if t.value is None else self.sign * t.value, t.number))

    def compared(self) -> list[Trial]:
        """Return the trials that ``comparison`` has a score of, best first."""
        values = self.comparison.values
        chosen = [trial for trial in self.trials if trial.number in values]
        return sorted(chosen, key=lambda trial: (self.sign * values[trial.number], trial.number))

    def by_importance(self) -> list[str]:
        """Return the names of all parameters, the most important first, then those without a share."""
        order = sorted(self.importances, key=lambda name: -self.importances[name])
        return order + [name for name in self.space if name not in self.importances]


def collect(study: optuna.Study, *, with_importances: bool = True) -> Report:
    """Read a study, finished or not; importances take seconds and can be left out."""
    stored = study.get_trials(deepcopy=False)
    begun = [trial for trial in stored if trial.state is not TrialState.WAITING or is_paused(trial)]
    frozen = [trial for trial in begun if cause_of(trial) != names.Cause.WITHDRAWN]
    attributes = study.user_attrs
    spec = attributes.get(names.SPEC, {})
    trials = [_trial(trial) for trial in frozen]
    direction = direction_of(study)
    order = ranked(frozen, direction)
    by_number = {trial.number: trial for trial in trials}
    best = by_number[order[0].number] if order else None
    base = next((trial for trial in trials if trial.origin == "base" and trial.value is not None), None)
    program = spec.get("program")
    comparison = _comparison(trials, WORST_K_LOC if program is None else spec.get("worst"))
    importances, note = _importances(frozen, comparison) if with_importances else ({}, None)
    counts = tally(stored).as_dict()
    counts["diverged"] = sum(trial.diverged is not None for trial in trials)
    causes = Counter(trial.cause or "unknown" for trial in trials if trial.state == "fail")
    starts = [trial.datetime_start for trial in frozen if trial.datetime_start is not None]
    ends = [trial.datetime_complete for trial in frozen if trial.datetime_complete is not None]
    return Report(
        study=study.study_name,
        description=spec.get("description", ""),
        program=program,
        metric=spec.get("score", "k_loc"),
        direction=direction,
        step_unit="scenes" if program is None else "steps",
        command=redact(attributes[names.COMMAND]) if names.COMMAND in attributes else None,
        made=datetime.now().astimezone().isoformat(timespec="seconds"),
        started=min(starts).isoformat(timespec="seconds") if starts else None,
        ended=max(ends).isoformat(timespec="seconds") if ends else None,
        objective=spec.get("objective", "network"),
        sampler=spec.get("sampler", {}).get("name"),
        pruner=spec.get("pruner", {}).get("name"),
        proof=attributes.get(names.PROOF),
        space_fingerprint=attributes.get(names.SPACE_FINGERPRINT),
        score_version=attributes.get(names.SCORE_VERSION),
        counts=counts,
        causes=dict(causes.most_common()),
        best=best,
        base=base,
        floor=next((trial.floor for trial in (best, base, *trials) if trial and trial.floor is not None), None),
        reference=attributes.get(names.REFERENCE, {}),
        base_params=next((trial.params for trial in trials if trial.origin == "base"), {}),
        comparison=comparison,
        importances=importances,
        importances_note=note,
        space={name: _dimension(distribution) for name, distribution in _distributions(frozen).items()},
        pruning=_pruning(trials),
        cost={
            "gpu_seconds": sum(trial.gpu_seconds for trial in trials),
            "core_seconds": sum(trial.core_seconds for trial in trials),
            "trial_seconds": sum(trial.seconds for trial in trials),
            "wall_seconds": (max(ends) - min(starts)).total_seconds() if starts and ends else 0.0,
            "failed_seconds": sum(trial.seconds for trial in trials if trial.state == "fail"),
        },
        winner=standing_verdict(attributes, stored),
        environment=environment(trials, attributes.get(names.VERSIONS, {})),
        trials=trials,
    )


def _trial(trial: FrozenTrial) -> Trial:
    read = trial.user_attrs.get
    curve = sorted((step, value) for step, value in trial.intermediate_values.items())
    seconds = float(read(names.SECONDS) or 0.0)
    device = read(names.DEVICE)
    on_gpu = str(device or "").startswith("cuda")
    return Trial(
        number=trial.number,
        state=state_of(trial),
        value=trial.values[0] if trial.state is TrialState.COMPLETE else None,
        last_value=next((value for _, value in reversed(curve) if math.isfinite(value)), None),
        params=dict(trial.params),
        scores=read(names.COMPONENTS) or {},
        pipeline=read(names.PIPELINE) or {},
        floor=read(names.FLOOR),
        efficiency=read(names.EFFICIENCY),
        scenes=int(read(names.SCENES) or (curve[-1][0] if curve else 0)),
        seconds=seconds,
        core_seconds=0.0 if on_gpu else seconds * int(read(names.THREADS) or 1),
        gpu_seconds=seconds if on_gpu else 0.0,
        origin=read(names.ORIGIN),
        cause=cause_of(trial),
        error=redact(str(read(names.ERROR))) if trial.state is TrialState.FAIL and read(names.ERROR) else None,
        diverged=read(names.DIVERGED) if trial.state is TrialState.COMPLETE else None,
        lineage=read(names.LINEAGE),
        config_fingerprint=read(names.CONFIG_FINGERPRINT),
        host=read(names.HOST),
        device=device,
        started=trial.datetime_start.isoformat(timespec="seconds") if trial.datetime_start else None,
        ended=trial.datetime_complete.isoformat(timespec="seconds") if trial.datetime_complete else None,
        metrics=read(names.METRICS) or {},
        curve=curve,
    )


def _distributions(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Every dimension any trial had; of the widest range where ranges were widened."""
    found: dict[str, BaseDistribution] = {}
    for trial in trials:
        found.update(trial.distributions)
    return found


def _dimension(distribution: BaseDistribution) -> dict[str, Any]:
    written = json.loads(distribution_to_json(distribution))["attributes"]
    tree = {name: value for name, value in written.items() if value is not None}
    return {"kind": type(distribution).__name__.removesuffix("Distribution").lower(), **tree}


def _comparison(trials: Sequence[Trial], worst: float | None) -> Comparison:
    """Compare trials at the last step that the most of them reached: the lowest rung they share."""
    proper = [trial for trial in trials if trial.state in ("complete", "pruned", "paused") and trial.diverged is None]
    diverged = [trial for trial in trials if trial.diverged is not None]
    curves = {trial.number: dict(trial.curve) for trial in [*proper, *diverged]}
    reached = Counter(step for trial in proper for step, value in trial.curve if math.isfinite(value))
    step = max(reached, key=lambda step: (reached[step], step)) if reached else None
    values = {}
    for trial in proper:
        value = trial.value if step is None else curves[trial.number].get(step)
        if value is not None and math.isfinite(value):
            values[trial.number] = value
    states = Counter(trial.state for trial in proper if trial.number in values)
    for trial in diverged:
        reported = None if step is None else curves[trial.number].get(step)
        value = reported if reported is not None and math.isfinite(reported) else worst
        if value is not None:  # a diverged trial is complete only where there is a worst score
            values[trial.number] = value
    return Comparison(
        step=step,
        values=values,
        complete=states["complete"],
        pruned=states["pruned"],
        paused=states["paused"],
        diverged=len(diverged),
        left_out=len(proper) + len(diverged) - len(values),
    )


def _importances(trials: Sequence[FrozenTrial], comparison: Comparison) -> tuple[dict[str, float], str | None]:
    """Return what share of the variance of the compared trials' ranks each parameter explains, or why nothing is said.

    Functional ANOVA over a random forest (Hutter et al., ICML 2014). It sees ranks, not scores, since a few trials that
    learned nothing would else make up most of the variance. Parameters that only some trials have are left out.
    """
    compared = [trial for trial in trials if trial.number in comparison.values][-MAX_COMPARED:]
    values = [comparison.values[trial.number] for trial in compared]
    if len(values) < MIN_COMPARED:
        least = f"Importances need at least {MIN_COMPARED} trials with a score at the same step"
        return {}, f"{least}; there are {len(values)}."
    if max(values) - min(values) < 1e-12:
        return {}, "All trials score alike, so no parameter can be said to matter."
    ranks = optuna.create_study(storage=InMemoryStorage())
    ranks.add_trials(
        [
            create_trial(value=float(rank), params=trial.params, distributions=trial.distributions)
            for rank, trial in zip(stats.rankdata(values), compared, strict=True)
        ]
    )
    forest = FanovaImportanceEvaluator(n_trees=32, max_depth=8, seed=0)
    return {name: float(share) for name, share in get_param_importances(ranks, evaluator=forest).items()}, None


def _pruning(trials: Sequence[Trial]) -> Pruning:
    complete = [trial for trial in trials if trial.state == "complete" and trial.diverged is None]
    pruned = [trial for trial in trials if trial.state == "pruned"]
    whole = statistics.median(trial.scenes for trial in complete) if complete else 0
    spent = sum(trial.scenes for trial in trials)
    saved = [max(0, round(whole - trial.scenes)) for trial in pruned]
    rates = [trial.seconds / trial.scenes for trial in trials if trial.scenes and trial.seconds]
    rate = statistics.median(rates) if rates else 0.0
    seconds = sum(
        missing * (trial.seconds / trial.scenes if trial.scenes else rate)
        for missing, trial in zip(saved, pruned, strict=True)
    )
    total = spent + sum(saved)
    return Pruning(len(pruned), spent, sum(saved), seconds, sum(saved) / total if total else 0.0)


def choices(dimension: Mapping[str, Any]) -> str:
    """A dimension of the space in words: ``1e-05 to 0.01, log``."""
    if dimension["kind"] == "categorical":
        return ", ".join(str(choice) for choice in dimension["choices"])
    text = f"{short_number(dimension['low'])} to {short_number(dimension['high'])}"
    if dimension.get("step") not in (None, 1):
        text += f", step {dimension['step']:g}"
    return text + (", log" if dimension.get("log") else "")


def environment(trials: Sequence[Trial], versions: Mapping[str, str]) -> dict[str, Any]:
    """Versions, hosts and devices the study ran on; versions of this process where the study has none."""
    found = dict(versions)
    for package in _PACKAGES:
        if package not in found:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
    found.setdefault("python", platform.python_version())
    return {
        "versions": found,
        "hosts": dict(Counter(trial.host for trial in trials if trial.host).most_common()),
        "devices": dict(Counter(trial.device for trial in trials if trial.device).most_common()),
    }
