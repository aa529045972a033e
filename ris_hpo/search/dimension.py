"""One searched key: its range or choices, and when it is searched."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Self, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial
from pydantic import Field, model_validator

from ris_hpo.config import Spec

Value = bool | int | float | str

_MOST_STEPS = 1_000_000
_MOST_VALUES = 10_000


class Dimension(Spec):
    """One searched key: a range (``low``, ``high``, optional ``step`` or ``log``) or ``choices``.

    Integers in ``low`` and ``high`` make an integer range. ``when`` makes the dimension conditional: it is searched
    only where every named dimension has one of the listed values, and keeps the base value elsewhere.
    """

    low: int | float | None = Field(default=None, description="smallest value")
    high: int | float | None = Field(default=None, description="largest value")
    step: int | float | None = Field(default=None, description="distance of neighbouring values; it divides the range")
    log: bool = Field(default=False, description="search the logarithm of the value")
    choices: list[Value] | None = Field(default=None, description="the values, in place of a range")
    when: dict[str, list[Value]] = Field(
        default_factory=dict, description="values of other dimensions under which this one is searched"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        for parent, values in self.when.items():
            if not values:
                raise ValueError(f"'when' lists no value for '{parent}'")
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("choices exclude low, high, step and log")
            if len(self.choices) < 2 or any(same(one, other) for one, other in itertools.combinations(self.choices, 2)):
                raise ValueError("choices need two different values or more")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and (self.step is not None or self.low <= 0):
            raise ValueError("log needs low above 0 and no step")
        if self.step is not None:
            if self.step <= 0:
                raise ValueError("step must be above 0")
            low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
            if (high - low) / step > _MOST_STEPS or (high - low) % step != 0:
                raise ValueError(f"step {self.step} must divide {self.low}..{self.high} into {_MOST_STEPS:,} at most")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether this is a range of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)

    def in_words(self) -> str:
        """Return the values of this dimension in a few words."""
        if self.choices is not None:
            return " | ".join(str(choice) for choice in self.choices)
        notes = [word for word, present in (("log", self.log), (f"step {self.step}", self.step)) if present]
        return f"{self.low} .. {self.high}" + (f" ({', '.join(notes)})" if notes else "")

    def distribution(self) -> BaseDistribution:
        """Return the Optuna distribution."""
        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.is_integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def contains(self, value: object) -> bool:
        """Say whether ``value`` is one this dimension can take."""
        if self.choices is not None:
            return any(same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None
        assert self.high is not None
        if not self.low <= value <= self.high:
            return False
        step = 1 if self.is_integer and self.step is None else self.step
        if step is None or (self.log and not self.is_integer):
            return True
        steps = (value - self.low) / step
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def edges(self) -> list[Value]:
        """Return the values where a run configuration is most likely to refuse: both ends, or every choice."""
        if self.choices is not None:
            return list(self.choices)
        distribution = self.distribution()
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        return [distribution.low, distribution.high]

    def draw(self, generator: random.Random) -> Value:
        """Return a random value of this dimension (for probing, not for searching)."""
        distribution = self.distribution()
        if isinstance(distribution, IntDistribution):
            return generator.randrange(distribution.low, distribution.high + 1, distribution.step)
        if isinstance(distribution, FloatDistribution):
            if distribution.log:
                return math.exp(generator.uniform(math.log(distribution.low), math.log(distribution.high)))
            value = generator.uniform(distribution.low, distribution.high)
            if distribution.step is None:
                return value
            return distribution.low + distribution.step * round((value - distribution.low) / distribution.step)
        assert self.choices is not None
        return generator.choice(self.choices)

    def values(self, levels: int | None = None) -> list[Value] | None:
        """Return the values of this dimension in their order; None where there are more than 10,000.

        Args:
            levels: of a range at most so many of its values, evenly apart, its ends among them.
        """
        if self.choices is not None:
            return list(self.choices)
        distribution = self.distribution()
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high, step = distribution.low, distribution.high, distribution.step
        if step is not None:
            count = round((high - low) / step) + 1
            whole = isinstance(distribution, IntDistribution)
            if levels is None and count > _MOST_VALUES:
                return None
            if levels is None or count <= levels:
                return [int(low + index * step) if whole else low + index * step for index in range(count)]
        elif levels is None:
            return None
        shares = [index / (levels - 1) for index in range(levels)]
        return list(dict.fromkeys(self._at(share) for share in shares))

    def near(self, centre: Value | None, generator: random.Random, width: float = 0.25) -> Value:
        """Return a random value near another one.

        A number is drawn from a normal distribution of so much of the range, within it; a choice stays in half of the
        draws, and is any other in the rest.

        Args:
            centre: the other one; None draws evenly.
            generator: of random numbers.
            width: standard deviation over the range, in logarithms where the dimension is.
        """
        if centre is None or not self.contains(centre):
            return self.draw(generator)
        if self.choices is not None:
            return centre if generator.random() < 0.5 else generator.choice(self.choices)
        assert self.low is not None
        assert self.high is not None
        assert isinstance(centre, int | float)
        low, high, middle = (math.log(v) if self.log else v for v in (self.low, self.high, centre))
        place = (middle - low) / (high - low)
        while not 0 <= (share := generator.gauss(place, width)) <= 1:
            pass
        return self._at(share)

    def _at(self, share: float) -> Value:
        """The value of a range at a share of it, 0..1."""
        distribution = self.distribution()
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        low, high, step = distribution.low, distribution.high, distribution.step
        value = low * (high / low) ** share if distribution.log else low + share * (high - low)
        if step is not None and not (distribution.log and isinstance(distribution, FloatDistribution)):
            value = low + step * round((value - low) / step)
        value = min(max(value, low), high)
        return int(value) if isinstance(distribution, IntDistribution) else float(value)

    def suggest(self, trial: Trial, path: str) -> Value:
        """Ask the study's sampler for a value, under the name ``path``."""
        match self.distribution():
            case CategoricalDistribution(choices=choices):
                return cast(Value, trial.suggest_categorical(path, list(choices)))
            case IntDistribution(low=lowest, high=highest, step=step, log=log):
                return trial.suggest_int(path, lowest, highest, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=distance, log=log):
                return trial.suggest_float(path, low, high, step=distance, log=log)
            case other:
                raise AssertionError(other)

    def active(self, params: Mapping[str, Value]) -> bool:
        """Say whether the conditions of this dimension hold under ``params``."""
        return all(any(same(params.get(parent), value) for value in values) for parent, values in self.when.items())

    def for_decimal_key(self) -> Dimension:
        """Return this dimension for a key that is no whole number: 0 among its numbers is 0.0, 0..1 has all between."""

        def decimal(value: Value | None) -> Any:
            return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

        return self.replaced(
            {
                "low": decimal(self.low),
                "high": decimal(self.high),
                "step": decimal(self.step),
                "choices": None if self.choices is None else [decimal(choice) for choice in self.choices],
            }
        )


def same(one: object, other: object) -> bool:
    """Say whether two values are the same: 1 and 1.0 are one number, True is none."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
