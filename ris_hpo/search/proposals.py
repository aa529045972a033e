"""The point of a trial, chosen before anything is stored: within constraints, and in a finite space never twice.

Where a study has constraints or a finite space, the sampler's proposal is not yet the trial's point. The choice is one
transaction with the points of all other trials in sight (``Store.reserve``): the proposal where it is allowed and free,
a random point that is so where it is not, and in the end the first one in order.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Collection, Mapping
from typing import Any, Final

from optuna.study import Study
from optuna.trial import FrozenTrial

from ris_hpo.errors import SpaceError
from ris_hpo.search.counting import lineage_root, live_trials
from ris_hpo.search.dimension import Value
from ris_hpo.search.points import Points
from ris_hpo.search.spec import StudySpec, derived_seed
from ris_hpo.store.cache import Store

_DRAWS: Final = 1000


def choose(
    store: Store, study_id: int, spec: StudySpec, points: Points, study: Study, trial: FrozenTrial
) -> dict[str, Value]:
    """Choose the point of a trial that has none yet, or a part of one, and keep it from all other trials.

    Args:
        store: the store.
        study_id: the study.
        spec: its specification.
        points: of its space.
        study: the study with the trial's own sampler.
        trial: as it was claimed.

    Raises:
        SpaceError: no point of the space is allowed and free.
    """
    fixed = given_point(trial) or {}
    proposed = [] if spec.sampler.name in ("grid", "brute_force") else [_proposed(spec, study, trial, fixed)]
    given = [point for other in live_trials(study.get_trials(deepcopy=False)) if (point := given_point(other))]

    def chosen(taken: Collection[str]) -> str:
        unfit = {*taken, *map(_text, given)} if points.is_finite else set()
        generator = random.Random(derived_seed(spec.seed, lineage_root(trial), "points"))
        draws = (points.draw(generator, fixed) for _ in range(_DRAWS))
        rest = (point for point in points if fixed.items() <= point.items()) if points.is_finite else ()
        for point in itertools.chain(proposed, draws, rest):
            if _text(point) not in unfit and points.allows(point):
                return _text(point)
        what = "is allowed and free" if points.is_finite else f"was allowed in {_DRAWS} draws"
        raise SpaceError(f"study '{spec.name}': no point of its space {what}; widen it, or ask for fewer trials")

    found: dict[str, Value] = json.loads(store.reserve(study_id, trial.number, chosen))
    return found


def given_point(trial: FrozenTrial) -> dict[str, Any] | None:
    """Return the parameters that a trial has, or was given with its ticket; None where they are still to be drawn."""
    return dict(trial.params) or trial.system_attrs.get("fixed_params")


def _proposed(spec: StudySpec, study: Study, trial: FrozenTrial, fixed: Mapping[str, Value]) -> dict[str, Value]:
    """Return what the sampler would draw for the trial, but for the values that are fixed."""
    sampler = study.sampler
    relative = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
    params: dict[str, Value] = {}
    relative = {**relative, **fixed}
    for path, dimension in spec.space.items():
        if dimension.active(params):
            asked = path not in relative
            value = (
                sampler.sample_independent(study, trial, path, dimension.distribution()) if asked else relative[path]
            )
            params[path] = value
    return params


def _text(point: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(point.items())))
