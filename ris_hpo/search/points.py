"""The points of a space: which there are, which of them constraints allow, and how one near another is drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

from ris_hpo.errors import SpaceError
from ris_hpo.search.constraints import Constraint
from ris_hpo.search.dimension import Value
from ris_hpo.search.spec import StudySpec, leaves


class Points:
    """The points of a study's space; under the sampler ``grid`` those of its grid alone.

    Args:
        spec: the study.

    Attributes:
        is_finite: whether they can be counted.

    Raises:
        SpaceError: ``brute_force`` where a dimension has no end of values; a constraint that names an unknown key.
    """

    def __init__(self, spec: StudySpec) -> None:
        self._spec = spec
        levels = spec.sampler.levels if spec.sampler.name == "grid" else None
        self._values = {path: dimension.values(levels) for path, dimension in spec.space.items()}
        endless = [path for path, values in self._values.items() if values is None]
        self.is_finite = not endless
        if endless and spec.sampler.name == "brute_force":
            raise SpaceError(
                f"study '{spec.name}': brute_force needs a finite space, and '{endless[0]}' has no steps, or too many; "
                "give it a step, or take the sampler grid"
            )
        self._constraints = [Constraint(text) for text in spec.constraints]
        keys = {key for constraint in self._constraints for key in constraint.keys}
        base = dict(leaves(spec.config({}).model_dump(mode="json"))) if keys else {}
        for constraint in self._constraints:
            if unknown := sorted(constraint.keys - base.keys() - spec.space.keys()):
                raise SpaceError(f"study '{spec.name}': constraint '{constraint.text}' names unknown '{unknown[0]}'")
        self._base = {key: base[key] for key in keys if key in base}

    @property
    def is_restricted(self) -> bool:
        """Whether not any point may be drawn at any time: some are not allowed, or none may come twice."""
        return self.is_finite or bool(self._constraints)

    def allows(self, point: Mapping[str, Any]) -> bool:
        """Say whether a point meets the constraints; what it does not have keeps the base's value."""
        values = {**self._base, **point}
        return all(constraint.holds(values) for constraint in self._constraints)

    def is_whole(self, point: Mapping[str, Any]) -> bool:
        """Say whether a point has a value for each dimension that its other values make active."""
        return all(path in point for path, dimension in self._spec.space.items() if dimension.active(point))

    def draw(self, generator: random.Random, fixed: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Draw a point evenly, but for the values that are fixed."""
        point: dict[str, Value] = {}
        for path, dimension in self._spec.space.items():
            if fixed and path in fixed:
                point[path] = fixed[path]
            elif dimension.active(point):
                values = self._values[path]
                is_grid = self._spec.sampler.name == "grid" and values is not None
                point[path] = generator.choice(values or []) if is_grid else dimension.draw(generator)
        return point

    def __iter__(self) -> Iterator[dict[str, Value]]:
        """Yield all points of a finite space, those against a constraint left out."""
        return filter(self.allows, self._from({}, list(self._spec.space)))

    def count(self, at_most: int) -> int:
        """Return how many points a finite space has, counted up to a limit."""
        return sum(1 for _ in itertools.islice(self, at_most))

    def _from(self, point: dict[str, Value], paths: list[str]) -> Iterator[dict[str, Value]]:
        if not paths:
            yield dict(point)
            return
        path, *rest = paths
        active = self._spec.space[path].active(point)
        for value in (self._values[path] or []) if active else [None]:
            yield from self._from({**point, path: value} if value is not None else point, rest)
