"""Two studies side by side: what each cost and found, and which winner is better on the same fresh scenes.

The best configuration of each study is trained again with the same fresh seeds, and scored on the same fresh scenes;
seed s makes a pair, and the mean difference of n pairs has the interval

    d_s = score(second, seed s) - score(first, seed s),        mean(d) +- t_{n-1, 1 - a/2} sd(d) / sqrt(n)

Where the studies are about different scenes there are no pairs, and nothing is trained: both are shown as searched.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from ris_hpo import drawing
from ris_hpo.config import Spec
from ris_hpo.errors import StudyError
from ris_hpo.report.collect import Report, Trial, collect
from ris_hpo.results import winner
from ris_hpo.results.winner import CONFIDENCE, SEEDS, Evaluate, code_of, kept_score, paired_interval, seeded
from ris_hpo.search.counting import Direction
from ris_hpo.search.lifecycle import direction_of, stored_spec
from ris_hpo.search.spec import StudySpec, derived_seed
from ris_hpo.store import attributes as names
from ris_hpo.text import duration, finite


@dataclass(frozen=True)
class Side:
    """One of the two studies.

    Attributes:
        study: its name.
        trials: that ended.
        best: number of the best trial.
        score: of that trial, in the search.
        floor: of that score.
        seconds: that workers spent on the study.
        params: of the best trial.
        mean: of its configuration on the fresh seeds; None where nothing was trained.
    """

    study: str
    trials: int
    best: int
    score: float
    floor: float | None
    seconds: float
    params: dict[str, Any]
    mean: float | None


@dataclass(frozen=True)
class StudyComparison:
    """Two studies side by side.

    Attributes:
        first: the one study.
        second: the other one.
        metric: what the score is called.
        direction: which way it is better.
        unpaired: why there are no pairs, in one sentence; None where there are.
        seeds: number of pairs.
        difference: mean of second - first; None without pairs, as are the following.
        low: lower end of its interval.
        high: upper end of its interval.
        confidence: of the interval.
        better: name of the study whose winner is better, None where that cannot be told.
        sentence: the same in words.
    """

    first: Side
    second: Side
    metric: str
    direction: Direction
    unpaired: str | None
    seeds: int
    difference: float | None
    low: float | None
    high: float | None
    confidence: float
    better: str | None
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types; an unbounded end is None."""
        tree: dict[str, Any] = finite(dataclasses.asdict(self))
        return tree


def compare_studies(
    first: optuna.Study,
    second: optuna.Study,
    directory: Path,
    *,
    seeds: int = SEEDS,
    confidence: float = CONFIDENCE,
    device: str = "cpu",
    train: bool = True,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> StudyComparison:
    """Compare two studies, of one store or of two.

    Args:
        first: the one study.
        second: the other one.
        directory: where runs are kept, so that an interrupted comparison goes on where it was.
        seeds: fresh seeds.
        confidence: of the interval.
        device: where the winners are trained again.
        train: False shows both as searched.
        progress: called with (runs done, runs in all, what is next).

    Raises:
        StudyError: one has no completed trial, or the two have different scores.
    """
    studies = (first, second)
    specs = [stored_spec(study) for study in studies]
    reports = [collect(study, with_importances=False) for study in studies]
    best = [_best(report) for report in reports]
    if (specs[0].score, specs[0].direction) != (specs[1].score, specs[1].direction):
        told = " and ".join(f"{spec.score} ({spec.direction})" for spec in specs)
        raise StudyError(f"the studies have different scores, {told}: there is nothing to compare")
    configs = [spec.config(trial.params) for spec, trial in zip(specs, best, strict=True)]
    unpaired = _why_unpaired(studies, specs, configs)
    if unpaired is None and not train:
        unpaired = "Nothing was trained again: the scores are those of the search, of the best of many noisy ones."
    table = np.empty((2, 0))
    if unpaired is None:
        table = np.empty((2, seeds))
        fresh = [derived_seed(0, index, "compare") for index in range(seeds)]
        runs = list(itertools.product(enumerate(fresh), range(2)))  # seed by seed: whole pairs early
        for done, ((column, seed), row) in enumerate(runs):
            progress(done, len(runs), f"{studies[row].study_name}, seed {column + 1} of {seeds}")
            evaluate, code = _evaluation(specs[row], device), code_of(specs[row])
            table[row, column] = kept_score(evaluate, seeded(configs[row], seed), directory, code, device)
        progress(len(runs), len(runs), "done")
    sides = [
        Side(
            study=study.study_name,
            trials=sum(report.counts.get(state, 0) for state in ("complete", "pruned", "fail", "invalidated")),
            best=trial.number,
            score=float(trial.value or 0.0),
            floor=trial.floor,
            seconds=report.cost["trial_seconds"],
            params=trial.params,
            mean=float(row.mean()) if row.size else None,
        )
        for study, report, trial, row in zip(studies, reports, best, table, strict=True)
    ]
    found = StudyComparison(
        first=sides[0],
        second=sides[1],
        metric=specs[0].score,
        direction=direction_of(first),
        unpaired=unpaired,
        seeds=table.shape[1],
        difference=None,
        low=None,
        high=None,
        confidence=confidence,
        better=None,
        sentence="",
    )
    return _judged(found, table)


def _best(report: Report) -> Trial:
    if report.best is None:
        raise StudyError(f"study '{report.study}' has no completed trial yet")
    return report.best


def _why_unpaired(
    studies: tuple[optuna.Study, optuna.Study], specs: list[StudySpec], configs: list[Spec]
) -> str | None:
    """Return why one winner's run with a seed makes no pair with the other's; None where it does."""
    versions = [study.user_attrs.get(names.SCORE_VERSION) for study in studies]
    if versions[0] != versions[1]:
        return f"Not the same score: version {versions[0]} of k_loc in the one study, {versions[1]} in the other."
    if specs[0].program != specs[1].program or specs[0].kind != specs[1].kind:
        return (
            f"Not the same program: {specs[0].program_name()} in the one study, {specs[1].program_name()} in the other."
        )
    scenes: list[dict[str, Any]] = [dict(config.model_dump(mode="json").get("scene") or {}) for config in configs]
    if specs[0].program is None and scenes[0] != scenes[1]:
        keys = sorted(key for key in {*scenes[0], *scenes[1]} if scenes[0].get(key) != scenes[1].get(key))
        return f"Not the same scenes: the studies differ in scene.{', scene.'.join(keys)}."
    return None


def _evaluation(spec: StudySpec, device: str) -> Evaluate:
    if spec.program is None:
        return lambda config, folder: winner.fresh_score(config, folder, device=device)
    return lambda config, folder: winner.program_score(config, folder, spec=spec, device=device)


def _judged(found: StudyComparison, table: np.ndarray[Any, np.dtype[np.float64]]) -> StudyComparison:
    """Return the comparison with its verdict."""
    sides = (found.first, found.second)
    if found.unpaired is not None:
        scores = " and ".join(f"'{side.study}' {side.score:.4g}" for side in sides)
        return dataclasses.replace(found, sentence=f"{found.unpaired} As searched, {found.metric} is {scores}.")
    difference, low, high = paired_interval(table[1], table[0], 1 - found.confidence)
    sign = 1 if found.direction == "minimize" else -1
    better = None
    if sign * low > 0 and sign * high > 0:
        better = found.first.study
    elif sign * low < 0 and sign * high < 0:
        better = found.second.study
    interval = f"{found.confidence:.0%} interval {low:+.4g} to {high:+.4g} over {found.seeds} fresh seeds"
    shift = f"{found.metric} of '{found.second.study}' minus '{found.first.study}' is {difference:+.4g}, {interval}"
    if found.seeds < 2:
        sentence = "One seed cannot tell a difference from luck. Use more seeds."
    elif better is None:
        sentence = f"The winners cannot be told apart: {shift}, which holds zero."
    else:
        sentence = f"The winner of '{better}' is better: {shift}."
    return dataclasses.replace(found, difference=difference, low=low, high=high, better=better, sentence=sentence)


# -- the page --------------------------------------------------------------------------------------------------------


def comparison_page(found: StudyComparison, first: optuna.Study, second: optuna.Study) -> str:
    """Return the comparison as one page without script, network access or further files."""
    reports = [collect(study, with_importances=False) for study in (first, second)]
    templates = Environment(
        loader=PackageLoader("ris_hpo.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    params = [
        (name, *(_cell(side.params.get(name)) for side in (found.first, found.second)))
        for name in dict.fromkeys((*found.first.params, *found.second.params))
        if found.first.params.get(name) != found.second.params.get(name)
    ]
    page: str = templates.get_template("compare.html.j2").render(
        found=found,
        sides=[found.first, found.second],
        params=params,
        style=Markup(drawing.STYLE),
        duration=duration,
        cell=_cell,
        figure=Markup(drawing.as_svg(lambda figure: _history(figure, reports), 960, 330, "Best score so far")),
    )
    return page


def _history(figure: Figure, reports: list[Report]) -> None:
    """Draw the best score so far of both studies against the time that workers had spent by then."""
    (axes,) = drawing.frames(figure, x="seconds of all workers", y=reports[0].metric)
    for report, colour in zip(reports, ("accent", "good"), strict=True):
        spent = 0.0
        times: list[float] = []
        values: list[float] = []
        for trial in sorted(report.trials, key=lambda trial: (trial.ended or "", trial.number)):
            spent += trial.seconds
            if trial.ranks and trial.value is not None:
                times.append(spent)
                values.append(min([*values[-1:], trial.value], key=lambda value: report.sign * value))
        axes.step([*times, spent], [*values, values[-1]], where="post", color=drawing.LIGHT[colour], label=report.study)
    drawing.legend(figure)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
