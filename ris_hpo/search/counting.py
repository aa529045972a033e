"""Exact counting: how many trials a study has, which is the best, when it stops, and who continues a lost trial.

A line is a trial that was asked for with the trials that continue it after faults of machines. A study of N trials has
N lines, and it has ended when each of them is complete, pruned, or failed for good; in a study with promotion also when
those that are paused stay so (``rungs.next_promotion``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from ris_hpo.search.spec import RetrySpec, StopSpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store, ticket


class Counted(Protocol):
    """What counting needs of a trial."""

    @property
    def number(self) -> int:
        """Of the trial in its study."""

    @property
    def state(self) -> TrialState:
        """Optuna's."""

    @property
    def user_attrs(self) -> dict[str, Any]:
        """Attributes, those of line and rungs at least."""


AnyTrial = TypeVar("AnyTrial", bound=Counted)


@dataclass(frozen=True)
class Tally:
    """Trials of a study by state; failures that a successor continues are ``retried`` and not ``fail``.

    A trial that was declared invalid is neither complete nor pruned any more, and has ended all the same.
    """

    complete: int = 0
    pruned: int = 0
    fail: int = 0
    running: int = 0
    waiting: int = 0
    retried: int = 0
    paused: int = 0
    invalidated: int = 0

    @property
    def ended(self) -> int:
        """Trials that have ended for good: what ``--n-trials`` counts."""
        return self.complete + self.pruned + self.fail + self.invalidated

    @property
    def open(self) -> int:
        """Trials that are running or waiting."""
        return self.running + self.waiting

    @property
    def at_rest(self) -> int:
        """Trials that have ended, or are paused."""
        return self.ended + self.paused

    @property
    def asked_for(self) -> int:
        """All trials that the study was given."""
        return self.at_rest + self.open

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


def live_trials(trials: Iterable[AnyTrial]) -> list[AnyTrial]:
    """Return one trial per line: neither those a successor continues nor tickets that were withdrawn."""
    trials = list(trials)
    continued = {trial.user_attrs[names.PREDECESSOR] for trial in trials if names.PREDECESSOR in trial.user_attrs}
    return [trial for trial in trials if trial.number not in continued and cause_of(trial) != Cause.WITHDRAWN]


def cause_of(trial: Counted) -> str | None:
    """Return why a trial is failed; None where it is not."""
    if trial.state != TrialState.FAIL:
        return None
    return str(trial.user_attrs.get(names.CAUSE, Cause.BUG.value))


def state_of(trial: Counted) -> str:
    """Return the state of a trial in one word: Optuna's, or ``invalidated`` or ``paused``."""
    if is_paused(trial):
        return "paused"
    return "invalidated" if cause_of(trial) == Cause.INVALIDATED else trial.state.name.lower()


def is_paused(trial: Counted) -> bool:
    """Say whether a trial waits at a rung, and for a promotion."""
    return trial.state == TrialState.WAITING and trial.user_attrs.get(names.PAUSED) is not None


def tally(trials: Sequence[FrozenTrial]) -> Tally:
    """Count the trials of a study."""
    live = live_trials(trials)
    withdrawn = sum(cause_of(trial) == Cause.WITHDRAWN for trial in trials)
    return Tally(retried=len(trials) - len(live) - withdrawn, **Counter(state_of(trial) for trial in live))


Direction = Literal["minimize", "maximize"]


def ranked(trials: Iterable[FrozenTrial], direction: Direction = "minimize") -> list[FrozenTrial]:
    """Return the completed trials that did not diverge, best first; the earlier of two equals leads.

    This order is the one meaning of best everywhere: status, stop rules, report, ``best`` and ``export``.

    Args:
        trials: of one study.
        direction: ``StudySpec.direction``.
    """
    sign = 1 if direction == "minimize" else -1
    complete = [
        trial for trial in trials if trial.state == TrialState.COMPLETE and names.DIVERGED not in trial.user_attrs
    ]
    return sorted(complete, key=lambda trial: (sign * trial.values[0], trial.number))


def best_trial(trials: Iterable[FrozenTrial], direction: Direction = "minimize") -> FrozenTrial | None:
    """Return the best trial, or None where nothing is complete yet; see ``ranked``."""
    order = ranked(trials, direction)
    return order[0] if order else None


# -- tickets ---------------------------------------------------------------------------------------------------------


def fill(
    store: Store,
    study_id: int,
    n_trials: int,
    first: Callable[[], list[FrozenTrial]],
    *,
    withdraw: bool = True,
) -> int:
    """Give a study exactly ``n_trials`` lines: append the missing tickets, withdraw waiting ones that are too many.

    Args:
        store: the store.
        study_id: the study.
        n_trials: lines of trials that the study is to have; more that already ran stay.
        first: tickets with parameters that open an empty study (base configuration, warm start).
        withdraw: False only appends.

    Returns:
        Tickets added; running the same command again adds none.
    """

    def missing(present: list[FrozenTrial]) -> list[FrozenTrial]:
        short = n_trials - len(live_trials(present))
        opening = first() if not present else []
        return [*opening, *(ticket() for _ in range(short - len(opening)))][: max(short, 0)]

    added = store.fill(study_id, missing)
    if not withdraw:
        return added
    live = live_trials(store.get_all_trials(study_id, deepcopy=False))
    surplus = len(live) - n_trials
    if surplus > 0:
        waiting = [trial for trial in live if trial.state == TrialState.WAITING]
        # last the ones that hold work: put back half-way, or continuing a lost trial; then those that were asked for
        waiting.sort(key=lambda trial: (bool(trial.params), bool(trial.user_attrs), -trial.number))
        store.withdraw(study_id, [trial.number for trial in waiting[:surplus]])
    return added


def successor_of(trial: FrozenTrial, cause: Cause, retries: RetrySpec) -> FrozenTrial | None:
    """Return the ticket that continues a trial after a fault of its machine, or None where its line ends."""
    if cause not in names.RETRIED_CAUSES:
        return None
    times = {**trial.user_attrs.get(names.RETRIES, {})}
    inherited, reached = trial.user_attrs.get(names.INHERITED_STEP, 0), trial.last_step or 0
    if reached > inherited and cause is Cause.LOST_WORKER:
        times[cause.value] = 0  # it made progress before it was lost, and will end some day however often that happens
    times[cause.value] = times.get(cause.value, 0) + 1
    allowed: dict[str, int] = retries.model_dump()
    return None if times[cause.value] > allowed[cause.value] else continuation(trial, times)


def continuation(trial: FrozenTrial, times: Mapping[str, int]) -> FrozenTrial:
    """Return the ticket that continues a failed trial.

    It has the same parameters, the lineage, and nothing else: inherited system attributes (rungs, constraints) would
    count twice, and inherited reports could not be made again.

    Args:
        trial: the failed trial.
        times: failures of its line by cause, those that count for the limits.
    """
    inherited, reached = trial.user_attrs.get(names.INHERITED_STEP, 0), trial.last_step or 0
    marks = {
        names.LINEAGE: lineage_root(trial),
        names.PREDECESSOR: trial.number,
        names.ATTEMPT: trial.user_attrs.get(names.ATTEMPT, 0) + 1,
        names.RETRIES: dict(times),
        names.INHERITED_STEP: max(inherited, reached),
    }
    of_the_line = (names.ORIGIN, names.RUNGS, names.PROMOTED_AT, names.POINT)
    marks |= {name: trial.user_attrs[name] for name in of_the_line if name in trial.user_attrs}
    if names.CONFIG_FINGERPRINT in trial.user_attrs:
        # handed on with the parameters: the successor may be lost before it gets to write its own
        handed_on = (names.CONFIG_FINGERPRINT, names.SEED)
        marks |= {name: trial.user_attrs[name] for name in handed_on if name in trial.user_attrs}
        return create_trial(
            state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, user_attrs=marks
        )
    # lost while its parameters were being drawn: drawn again from the line's own seed, they come out the same
    return ticket(trial.system_attrs.get("fixed_params"), marks)


def fail_trial(
    store: Store,
    study_id: int,
    trial: FrozenTrial,
    cause: Cause,
    error: str,
    retries: RetrySpec,
    *,
    owner: str | None = None,
    marks: Mapping[str, Any] | None = None,
) -> bool:
    """Fail a running trial and queue its successor in one transaction; False when it was not running any more.

    Args:
        store: the store.
        study_id: the study.
        trial: the trial as it stands.
        cause: why.
        error: one line for people.
        retries: how often a trial is tried again after each cause.
        owner: who must still hold the trial; None for anyone.
        marks: further attributes.
    """
    last = trial.last_step
    marks = {names.CAUSE: cause.value, names.ERROR: error, names.LAST_STEP: last, **(marks or {})}
    return store.retire(study_id, trial.number, owner, marks, lambda latest: successor_of(latest, cause, retries))


# -- stop rules ------------------------------------------------------------------------------------------------------

StopRule = Literal["timeout", "gpu_hours", "hours", "target", "patience"]


def stop_reason(
    rules: StopSpec, trials: Sequence[FrozenTrial], seconds: float, direction: Direction = "minimize"
) -> StopRule | None:
    """Return the rule that ends the study now, if any.

    Args:
        rules: the limits; one that is None does not apply.
        trials: all trials of the study.
        seconds: wall clock since this run began.
        direction: ``StudySpec.direction``.
    """
    if rules.timeout_s is not None and seconds >= rules.timeout_s:
        return "timeout"
    if rules.gpu_hours is not None and device_seconds(trials) >= 3600 * rules.gpu_hours:
        return "gpu_hours"
    best = best_trial(trials, direction)
    if best is None:
        return None
    if rules.target is not None:
        value = best.values[0]
        if value <= rules.target if direction == "minimize" else value >= rules.target:
            return "target"
    if rules.patience is not None and best.datetime_complete is not None:
        reached = best.datetime_complete.timestamp()  # local times repeat an hour in autumn, time stamps do not
        since = sum(
            trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            and trial.datetime_complete is not None
            and trial.datetime_complete.timestamp() > reached
            for trial in trials
        )
        if since >= rules.patience:
            return "patience"
    return None


def device_seconds(trials: Iterable[FrozenTrial]) -> float:
    """Return the seconds that workers have spent on these trials, whatever became of them.

    Workers measure them on their own clocks: exactly for a trial that ended, was put back, or was killed by its
    supervisor, and up to the last heartbeat for one that runs or was lost.
    """
    return sum(float(trial.user_attrs.get(names.SECONDS, 0.0)) for trial in trials)


def spent_hours(trials: Iterable[FrozenTrial]) -> float:
    """Return the core-hours of these trials on processors plus their GPU-hours; see ``device_seconds``.

    A worker with four threads takes four core-hours in an hour; on a GPU one GPU-hour, whoever shares it.
    """
    seconds = 0.0
    for trial in trials:
        on_gpu = str(trial.user_attrs.get(names.DEVICE)).startswith("cuda")
        seconds += device_seconds([trial]) * (1 if on_gpu else int(trial.user_attrs.get(names.THREADS) or 1))
    return seconds / 3600


def is_untouched(trial: FrozenTrial) -> bool:
    """Say whether a waiting trial is a mere number: nobody began it, and nobody gave it parameters."""
    return trial.state is TrialState.WAITING and not (trial.params or trial.user_attrs or trial.system_attrs)


def lineage_root(trial: FrozenTrial | Trial) -> int:
    """Return the number of the first trial of this trial's line: its own unless it is a retry."""
    return int(trial.user_attrs.get(names.LINEAGE, trial.number))
