"""What draws near the base gain where it is good, and cost where it misleads, on functions whose values are known.

    python -m benchmarks.prior

Six dimensions in [0, 1]. Trials until the best value is within ``TARGET`` of the least one, with the service's own
samplers; ``LIMIT`` where it is not reached. A good base lies .15 from the optimum in each dimension, a misleading one
in the corner farthest from it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import optuna
from optuna.samplers import RandomSampler

from ris_hpo.programs.program import TrialContext
from ris_hpo.search.lifecycle import quiet_optuna
from ris_hpo.search.samplers import build_sampler
from ris_hpo.search.spec import StudySpec

OPTIMUM = (0.3, 0.7, 0.25, 0.6, 0.8, 0.35)
LIMIT, SEEDS = 80, 12


def bowl(x: Sequence[float]) -> float:
    """One valley, steeper in some dimensions than in others."""
    return sum((1 + index) * (a - b) ** 2 for index, (a, b) in enumerate(zip(x, OPTIMUM, strict=True)))


def rugged(x: Sequence[float]) -> float:
    """The same valley with waves on it."""
    waves = sum(0.05 * (1 - math.cos(12 * math.pi * (a - b))) for a, b in zip(x, OPTIMUM, strict=True))
    return bowl(x) + waves


TARGETS: dict[Callable[[Sequence[float]], float], float] = {bowl: 0.25, rugged: 0.5}


def train(trial: TrialContext) -> float:
    """Stand for a program; nothing is trained here."""
    return 0.0


def spec_of(base: Sequence[float], sampler: str, prior: float, seed: int) -> StudySpec:
    """A study of six numbers."""
    tree = {
        "name": "prior",
        "program": "benchmarks.prior:train",
        "seed": seed,
        "base": {f"x{index}": value for index, value in enumerate(base)},
        "space": {f"x{index}": {"low": 0.0, "high": 1.0} for index in range(len(OPTIMUM))},
        "sampler": {"name": sampler, "prior": prior, "startup": 10},
    }
    return StudySpec.parse(tree, "benchmark")


def trials_needed(spec: StudySpec, function: Callable[[Sequence[float]], float]) -> int:
    """Return how many trials it takes to come within the target; the base is the first, as in the service."""
    study = optuna.create_study(sampler=RandomSampler(0))
    study.enqueue_trial(dict(spec.base_params()))
    for number in range(LIMIT):
        study.sampler = build_sampler(spec, number)
        trial = study.ask()
        params = spec.suggest(trial)
        value = function([float(params[f"x{index}"]) for index in range(len(OPTIMUM))])
        study.tell(trial, value)
        if value <= TARGETS[function]:
            return number + 1
    return LIMIT


def main() -> None:
    """Print a table."""
    quiet_optuna()
    bases = {
        "good": [value + 0.15 * (-1) ** index for index, value in enumerate(OPTIMUM)],
        "misleading": [0.0 if value > 0.5 else 1.0 for value in OPTIMUM],
    }
    print("| function | base | sampler | prior 0 | prior 1/3 | prior 1/2 |\n|---|---|---|---|---|---|")
    for function in TARGETS:
        for name, base in bases.items():
            for sampler in ("random", "tpe"):
                cells = []
                for prior in (0.0, 1 / 3, 1 / 2):
                    needed = [trials_needed(spec_of(base, sampler, prior, seed), function) for seed in range(SEEDS)]
                    cells.append(f"{statistics.mean(needed):.0f} ({max(needed)})")
                print(f"| {function.__name__} | {name} | {sampler} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
