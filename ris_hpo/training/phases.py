"""The plan of a run's phases: where each one starts and ends, and what happens at its end. Pure, and free of torch.

A run is divided at its validations. A phase is a whole number of validation intervals, at least one, and without
extensions the phases add up to the budget exactly. A phase whose gates fail is extended by a quarter of its length, at
least one interval, as often as its patience allows; the total grows by as much. A gate that still fails ends the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ris_hpo.scoring.metrics import Scores
    from ris_hpo.training.config import GateSpec, PhaseSpec

EXTENSION_SHARE = 0.25  # of the phase's own length


@dataclass(frozen=True, slots=True)
class Verdict:
    """One gate of one phase: the metric at the phase's start and end, and whether the change suffices."""

    phase: str
    metric: str
    direction: Literal["up", "down"]
    margin: float
    before: float
    after: float

    @property
    def passed(self) -> bool:
        """Whether the metric went in the gate's direction by at least its margin; NaN does not pass."""
        change = self.after - self.before
        return (change if self.direction == "up" else -change) >= self.margin

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: figures that are not finite are words."""
        figures = {"before": self.before, "after": self.after}
        return dataclasses.asdict(self) | {
            name: value if math.isfinite(value) else str(value) for name, value in figures.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """Inverse of :meth:`as_dict`."""
        return cls(**(values | {name: float(values[name]) for name in ("before", "after")}))

    def __str__(self) -> str:
        figures = f"{self.before:.4f} -> {self.after:.4f}"
        return f"{self.metric} should go {self.direction} by {self.margin:g}: {figures}"


@dataclass(frozen=True, slots=True)
class PhaseEnd:
    """The end of a phase: its gates' verdicts, what follows, its extensions so far, and the plan from here on."""

    phase: str
    verdicts: tuple[Verdict, ...]
    outcome: Literal["passed", "extended", "failed"]
    extensions: int
    plan: PhasePlan
    not_run: tuple[str, ...]

    def failure(self) -> str:
        """Why the run ends here, in one line."""
        failed = "; ".join(str(verdict) for verdict in self.verdicts if not verdict.passed)
        rest = f"; phases not run: {', '.join(self.not_run)}" if self.not_run else ""
        return f"phase '{self.phase}' failed its gate: {failed}{rest}"


@dataclass(frozen=True)
class PhasePlan:
    """Boundaries of a run, counted in scenes seen.

    Attributes:
        phases: in their order, at least one.
        budget: scenes of the whole run without extensions.
        validate_every: scenes between validations; the last interval is shorter where it does not divide the budget.
        extensions: how often each phase has been extended so far.
    """

    phases: tuple[PhaseSpec, ...]
    budget: int
    validate_every: int
    extensions: tuple[int, ...]

    @classmethod
    def begin(cls, phases: Sequence[PhaseSpec], budget: int, validate_every: int) -> PhasePlan:
        """Return the plan of a run that has not been extended."""
        return cls(tuple(phases), budget, validate_every, (0,) * len(phases))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Scenes seen at the end of each phase, extensions included."""
        intervals = math.ceil(self.budget / self.validate_every)
        lengths = apportioned([phase.share for phase in self.phases], intervals)
        ends, end, added = [], 0, 0
        for length, times in zip(lengths, self.extensions, strict=True):
            end += length
            added += times * max(1, round(EXTENSION_SHARE * length))
            ends.append(min(end * self.validate_every, self.budget) + added * self.validate_every)
        return tuple(ends)

    @property
    def total(self) -> int:
        """Scenes of the whole run, extensions included."""
        return self.ends[-1]

    def index(self, scenes_seen: int) -> int:
        """The phase in which scene ``scenes_seen`` is trained on; the last one at the end of the run."""
        return next((i for i, end in enumerate(self.ends) if scenes_seen < end), len(self.ends) - 1)

    def start(self, index: int) -> int:
        """Scenes seen before the first one of a phase."""
        return self.ends[index - 1] if index else 0

    def progress(self, scenes_seen: int) -> float:
        """Share of the current phase that is done, 0..1."""
        index = self.index(scenes_seen)
        start = self.start(index)
        return min(1.0, (scenes_seen - start) / (self.ends[index] - start))

    def next_validation(self, scenes_seen: int) -> int:
        """Scenes seen at the next validation."""
        return min((scenes_seen // self.validate_every + 1) * self.validate_every, self.total)

    def steps(self, scenes_per_step: int) -> int:
        """Optimiser steps of the whole run; none reaches over a validation."""
        whole, rest = divmod(self.total, self.validate_every)
        return whole * math.ceil(self.validate_every / scenes_per_step) + math.ceil(rest / scenes_per_step)

    def end_of_phase(self, scenes_seen: int, before: Scores, after: Scores) -> PhaseEnd | None:
        """Judge the phase that ends at ``scenes_seen``; None where none does.

        Args:
            scenes_seen: so far.
            before: scores at the phase's start.
            after: scores now.
        """
        if scenes_seen not in self.ends:
            return None
        index = self.ends.index(scenes_seen)
        phase, extended = self.phases[index], self.extensions[index]
        verdicts = tuple(_verdict(phase.name, gate, before, after) for gate in phase.gates)
        plan: PhasePlan = self
        outcome: Literal["passed", "extended", "failed"] = "passed"
        if not all(verdict.passed for verdict in verdicts):
            outcome = "failed"
            if extended < phase.patience:
                outcome = "extended"
                extensions = (*self.extensions[:index], extended + 1, *self.extensions[index + 1 :])
                plan = dataclasses.replace(self, extensions=extensions)
        return PhaseEnd(phase.name, verdicts, outcome, plan.extensions[index], plan, self.not_begun(scenes_seen))

    def may_stop(self, scenes_seen: int) -> bool:
        """Whether a run may end early here: not within a phase whose gates would then never be judged."""
        index = self.index(scenes_seen)
        return scenes_seen == self.start(index) or not self.phases[index].gates

    def not_begun(self, scenes_seen: int) -> tuple[str, ...]:
        """Names of the phases of which no scene has been seen."""
        return tuple(phase.name for i, phase in enumerate(self.phases) if self.start(i) >= scenes_seen)


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers >= 1 that add up to ``total``, as near to ``shares`` of it as they can be.

    Largest remainders first; what the floor of 1 costs is taken where most is left over.

    Args:
        shares: positive, adding up to 1.
        total: at least as many as there are shares.
    """
    wanted = [share * total for share in shares]
    lengths = [max(1, math.floor(value + 1e-9)) for value in wanted]
    while sum(lengths) < total:
        lengths[max(range(len(lengths)), key=lambda i: wanted[i] - lengths[i])] += 1
    while sum(lengths) > total:
        lengths[min((i for i, n in enumerate(lengths) if n > 1), key=lambda i: wanted[i] - lengths[i])] -= 1
    return lengths


def _verdict(phase: str, gate: GateSpec, before: Scores, after: Scores) -> Verdict:
    figures: list[Any] = [getattr(scores, gate.metric) for scores in (before, after)]
    return Verdict(phase, gate.metric, gate.direction, gate.margin, *figures)
