"""Rungs and promotion: which paused trial goes on, and when a study with promotion is over.

Asynchronous successive halving with promotion (Li et al., "A system for massively parallel hyperparameter tuning",
2020). A rung is a step of the trial. A trial that reaches its next rung is paused there with its checkpoint. A worker
that has nothing begun to finish takes, from the highest rung that has one, the best paused trial among the best
``1/reduction`` of the lines that have reached this rung; where no rung has one it begins a new trial. When every line
has been begun and rests, and none is complete, the best of the highest rung goes on: a study ends with a result.

The rule sees lines, not trials: the score at a rung is handed to the successor of a lost trial, and counts once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import Counted, Direction, is_paused, live_trials
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names


def next_promotion(trials: Sequence[Counted], spec: StudySpec) -> int | None:
    """Return the number of the paused trial that is to be promoted now; None where there is none.

    Args:
        trials: all of the study.
        spec: the study.
    """
    if spec.pruner.name != "promotion":
        return None
    sign = 1 if spec.direction == "minimize" else -1
    lines = live_trials(trials)
    scores: dict[int, list[float]] = {trial.number: trial.user_attrs.get(names.RUNGS) or [] for trial in lines}
    paused = {trial.number: trial.user_attrs[names.PAUSED] for trial in lines if is_paused(trial)}
    highest = max((len(each) for each in scores.values()), default=0) - 1
    for rung in range(highest, -1, -1):
        reached = [number for number, each in scores.items() if len(each) > rung]
        reached.sort(key=lambda number: (sign * scores[number][rung], number))
        for number in reached[: len(reached) // spec.pruner.reduction]:
            if paused.get(number) == rung:
                return number
    has_result = any(t.state == TrialState.COMPLETE and names.DIVERGED not in t.user_attrs for t in lines)
    is_open = any(not trial.state.is_finished() and trial.number not in paused for trial in lines)
    if has_result or is_open or not paused:
        return None
    return min(paused, key=lambda number: (-paused[number], sign * scores[number][-1], number))


def as_samplers_see(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials as a sampler should learn from them: one at a rung is a pruned one, by its score there.

    The rung stands for the step, so that trials compare whose rungs have different steps. To Optuna a paused trial
    waits, and one that was promoted runs: the one would teach nothing, the other would count as bad until it ends.
    """
    live = {trial.number for trial in live_trials(trials)}
    seen: list[FrozenTrial] = []
    for trial in trials:
        scores: list[float] = trial.user_attrs.get(names.RUNGS) or []
        if trial.number not in live or trial.state == TrialState.COMPLETE or not scores:
            seen.append(trial)
            continue
        shown = copy.copy(trial)
        shown.state, shown.intermediate_values = TrialState.PRUNED, {len(scores) - 1: scores[-1]}
        shown.datetime_complete = trial.datetime_complete or datetime.now()
        seen.append(shown)
    return seen


@dataclass(frozen=True)
class RungCount:
    """A rung in figures: lines that have reached it, lines that are paused at it, and the best score there."""

    rung: int
    reached: int
    paused: int
    best: float


def count_rungs(trials: Sequence[Counted], direction: Direction) -> list[RungCount]:
    """Return the rungs that any line has reached, the first one first; none without promotion.

    Args:
        trials: all of the study.
        direction: which way a score is better.
    """
    lines = live_trials(trials)
    scores: list[list[float]] = [trial.user_attrs.get(names.RUNGS) or [] for trial in lines]
    paused = Counter(trial.user_attrs[names.PAUSED] for trial in lines if is_paused(trial))
    choose = min if direction == "minimize" else max
    return [
        RungCount(rung, len(reached), paused[rung], choose(reached))
        for rung in range(max(map(len, scores), default=0))
        if (reached := [each[rung] for each in scores if len(each) > rung])
    ]
