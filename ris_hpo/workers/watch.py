"""A study that somebody else runs, seen from its store alone: the same snapshots that a supervisor gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search import counting
from ris_hpo.search.lifecycle import get_study, stored_spec
from ris_hpo.search.rungs import next_promotion
from ris_hpo.search.status import study_status, summarise_best
from ris_hpo.store.cache import Store
from ris_hpo.workers.pool import WorkerView
from ris_hpo.workers.supervisor import PoolSnapshot


def watched(
    store: Store, name: str, interval: float = 2.0, pause: Callable[[float], None] = time.sleep
) -> Iterator[PoolSnapshot]:
    """Look at a study again and again until it has ended; nothing is written.

    Args:
        store: the store.
        name: the study.
        interval: seconds between two looks.
        pause: waits so long.

    Yields:
        What each look shows; a trial that runs stands for its worker.

    Raises:
        StudyError: no such study.
    """
    study = get_study(store, name)
    spec = stored_spec(study)
    ended: set[int] | None = None
    while True:
        trials = study.get_trials(deepcopy=False)
        counts, now = counting.tally(trials), {trial.number for trial in trials if trial.state.is_finished()}
        news = [] if ended is None else [_news(trials[number], spec.score) for number in sorted(now - ended)]
        ended = now
        running = study_status(name, trials, spec.score, spec.direction).running
        yield PoolSnapshot(
            study=name,
            n_trials=counts.asked_for,
            tally=counts,
            best=summarise_best(counting.best_trial(trials, spec.direction)),
            workers=[
                WorkerView(
                    slot=place,
                    device=f"{each.device or 'unknown'}@{each.host or 'unknown'}",
                    state="training",
                    pid=each.pid,
                    trial=each.number,
                    step=each.step,
                    score=each.score,
                    steps_per_second=None if each.step is None or not each.seconds else each.step / each.seconds,
                    seconds=each.seconds,
                )
                for place, each in enumerate(running)
            ],
            seconds=_seconds(trials),
            messages=news,
            metric=spec.score,
            step_unit=spec.step_unit,
        )
        if counts.open == 0 and next_promotion(trials, spec) is None:
            return
        pause(interval)


def _news(trial: FrozenTrial, metric: str) -> str:
    score = f", {metric} {trial.values[0]:.4g}" if trial.values else ""
    cause = counting.cause_of(trial)
    return f"trial {trial.number}: {counting.state_of(trial)}{score}{'' if cause is None else f' ({cause})'}"


def _seconds(trials: Sequence[FrozenTrial]) -> float:
    """Return the time from the first start to the last end, or to now while a trial runs."""
    starts = [trial.datetime_start for trial in trials if trial.datetime_start is not None]
    if not starts:
        return 0.0
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete is not None]
    is_running = any(trial.state is TrialState.RUNNING for trial in trials)
    last = datetime.now() if is_running else max(ends, default=min(starts))
    return (last - min(starts)).total_seconds()
