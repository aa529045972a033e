"""Studies are data: the TOML form of a study, its search space, and the way from parameters to a run configuration.

A study file has the tables ``[study]``, ``[base]`` (run-configuration values other than the defaults), ``[space]``
(dotted run-configuration path -> ``low``/``high``/``step``/``log`` or ``choices``, and ``when``), ``[sampler]``,
``[pruner]``, ``[budget]``, ``[retries]``, ``[stop]`` and ``[keep]``. Everything is validated at load, bounds against
the run configuration itself, so that no study fails an hour in over a misspelt key.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from optuna.trial import Trial
from pydantic import Field, model_validator

from ris_hpo.config import (
    SCHEMA,
    SCHEMA_KEY,
    AnySettings,
    Spec,
    defaults_of,
    differing,
    dotted_keys,
    filled,
    fingerprint,
    migrated,
    stored_defaults,
    suggestion,
)
from ris_hpo.errors import ConfigError, SpaceError, TrainingDivergedError
from ris_hpo.programs.program import built_in, load_program
from ris_hpo.scoring.k_loc import WORST_K_LOC
from ris_hpo.search.dimension import Dimension, Value

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a study may be called: its trials' folders have that name, and must not lie elsewhere."""


class SamplerSpec(Spec):
    """How new parameters are proposed."""

    name: Literal["tpe", "gp", "cmaes", "random", "qmc", "nsga2", "grid", "brute_force"] = Field(
        default="tpe",
        description="algorithm; nsga2 minimises k_loc and a cost together, grid and brute_force draw each point once",
    )
    prior: float = Field(
        default=0.0,
        ge=0,
        le=0.9,
        description="share of the first draws, fewer later, near the base configuration and the best trials",
    )
    levels: int = Field(default=5, ge=2, description="values that grid takes of a range, at most")
    startup: int = Field(default=10, ge=1, description="random trials before a model is fitted: tpe, gp, cmaes")
    population: int = Field(default=20, ge=2, description="trials in a generation of nsga2")


class PrunerSpec(Spec):
    """When a trial is given up, or paused. All lengths are scenes seen, so that batch sizes and phases compare."""

    name: Literal["asha", "promotion", "hyperband", "median", "wilcoxon", "none"] = Field(
        default="asha", description="rule; promotion pauses trials at rungs and goes on with the best, the others stop"
    )
    first_scenes: int | None = Field(
        default=None,
        ge=1,
        description="scenes at the first rung of asha, promotion and hyperband; unset: one validation interval",
    )
    reduction: int = Field(
        default=3, ge=2, description="asha, promotion and hyperband keep one in so many trials at each rung"
    )
    startup: int = Field(default=5, ge=0, description="trials that end before median and wilcoxon prune any")
    warmup_scenes: int = Field(default=0, ge=0, description="scenes before which no trial is pruned")
    patience: int = Field(
        default=0, ge=0, description="prune only trials without a better score in so many reports; 0 prunes any"
    )
    p_threshold: float = Field(default=0.1, gt=0, lt=1, description="significance level of wilcoxon")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.name == "promotion" and (self.warmup_scenes or self.patience):
            raise ValueError("warmup_scenes and patience belong to pruners that stop trials; promotion pauses them")
        return self

    def rung_steps(self, first_report: int, last: int | None, count: int = 64) -> list[int]:
        """Return the steps of the first ``count`` rungs; the last step of a trial is its end, and no rung.

        Where the last step is known the rungs are ``last / reduction``, ``last / reduction**2`` and so on down to the
        first, in whole steps; where it is not, the first one, ``reduction`` times it, and so on.

        Args:
            first_report: step of a trial's first report; no rung lies below it.
            last: step at which a trial ends, where it is known.
            count: how many at most.
        """
        first = max(self.first_scenes or first_report, first_report)
        if last is None:
            return [first * self.reduction**rung for rung in range(count)]
        steps: list[int] = []
        step = -(-last // self.reduction)  # rounded up: a rung is the first report at or above its step
        while first <= step < last and (not steps or step < steps[0]):
            steps.insert(0, step)
            step = -(-step // self.reduction)
        return steps[:count]


class StudyBudget(Spec):
    """How much a study may use."""

    n_trials: int = Field(default=20, ge=1, description="total number of trials to finish, over all runs and workers")
    hours: float | None = Field(
        default=None, gt=0, description="core-hours and GPU-hours of all trials, in place of a number of trials"
    )
    equal: Literal["steps", "compute"] = Field(
        default="steps",
        description="what trials get alike: steps, or operations by the program's count, in fewer or more",
    )
    epoch_scenes: int = Field(default=20_000, ge=1, description="scenes of an epoch, for --epochs-per-trial")
    trial_timeout_s: float | None = Field(default=None, gt=0, description="longest wall-clock time of one trial")
    stall_timeout_s: float | None = Field(default=None, gt=0, description="longest wait for a trial's next validation")


class RetrySpec(Spec):
    """How often a trial is tried again after a fault that is not its own; a bug is never retried."""

    lost_worker: int = Field(default=5, ge=0, description="losses of its worker without progress in between")
    out_of_memory: int = Field(default=1, ge=0, description="times that memory ran out")
    timeout: int = Field(default=1, ge=0, description="times that it took too long")
    bugs: int = Field(default=3, ge=1, description="bug failures in one run after which the study stops")


class StopSpec(Spec):
    """What ends a study before its budget; a rule without a value is off."""

    timeout_s: float | None = Field(default=None, gt=0, description="wall-clock time of one run")
    gpu_hours: float | None = Field(default=None, gt=0, description="device hours of all trials")
    target: float | None = Field(default=None, description="score that one trial has to reach")
    patience: int | None = Field(default=None, ge=1, description="ended trials since the best one")


class KeepSpec(Spec):
    """Which files of trials that have ended stay, and how much room a study may take on each machine."""

    checkpoints: Literal["all", "best", "last_rung", "none"] = Field(
        default="all",
        description="whose checkpoints stay: of all, of the best, of those that came as far as any did, of none",
    )
    best: int = Field(default=3, ge=1, description="how many the best are")
    quota_gb: float | None = Field(
        default=None, gt=0, description="pause while the study's folder is larger; 1e9 bytes each"
    )
    free_gb: float | None = Field(default=None, gt=0, description="pause while the disk has less room; 1e9 bytes each")


class StudySpec(Spec):
    """One study: what is searched, from which base, by which sampler and pruner, within which budget."""

    settings = "study"

    name: str = Field(pattern=NAME, description="what the study and its folders are called")
    description: str = Field(default="", description="one line for people")
    kind: Literal["training", "inference"] = Field(
        default="training", description="train networks, or tune the localizer of a trained one"
    )
    program: str | None = Field(
        default=None, description="training program of your own, as package.module:function; see TrialContext"
    )
    score: str = Field(default="k_loc", min_length=1, description="name of what your program reports")
    direction: Literal["minimize", "maximize"] = Field(default="minimize", description="which way its score is better")
    worst: float | None = Field(default=None, description="score of a trial whose training diverged; unset: it fails")
    seed: int = Field(default=0, ge=0, lt=2**32, description="source of the seeds of all trials and samplers")
    objective: Literal["network", "fast", "pipeline"] = Field(
        default="network",
        description="whose k_loc is minimised: the network's own estimates, those of localize --fast, or of localize",
    )
    cost: Literal["parameters", "seconds"] = Field(default="parameters", description="second objective of nsga2")
    base: dict[str, Any] = Field(
        default_factory=dict, description="run-configuration values other than the defaults, by dotted key"
    )
    space: dict[str, Dimension] = Field(min_length=1, description="what is searched, by dotted key")
    constraints: list[str] = Field(
        default_factory=list, description="conditions on the parameters, such as 'network.width % network.heads == 0'"
    )
    base_schema: int = Field(
        default=SCHEMA, ge=0, le=SCHEMA, description="schema version of the keys in base and space; the others move on"
    )
    sampler: SamplerSpec = SamplerSpec()
    pruner: PrunerSpec = PrunerSpec()
    budget: StudyBudget = StudyBudget()
    retries: RetrySpec = RetrySpec()
    stop: StopSpec = StopSpec()
    keep: KeepSpec = KeepSpec()

    @classmethod
    def from_stored(cls, tree: Mapping[str, Any], source: str) -> Self:
        """Read a study as it was stored, in this version or in an older one; see ``Spec.from_stored``.

        Base and space keep the keys they were written with, since trials of the study have parameters of these names.
        """
        return cls.parse({"base_schema": tree.get(SCHEMA_KEY, 0), **migrated(tree, cls.settings, source)}, source)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        _check_conditions(self.space, self.base)
        if self.program is None and (self.score, self.direction, self.worst) != ("k_loc", "minimize", None):
            raise ValueError("score, direction and worst are those of a program of your own; set program too")
        if self.program is None and (self.kind, self.objective) == ("inference", "fast"):
            raise ValueError("an inference study draws the settings that 'fast' fixes; set objective to 'pipeline'")
        if self.sampler.name == "nsga2" and self.pruner.name != "none":
            raise ValueError("nsga2 has two objectives, and no pruner works with two; set pruner.name to 'none'")
        if self.budget.equal == "compute" and self.pruner.first_scenes is not None:
            raise ValueError(
                "with budget.equal = 'compute' the first rung is a trial's first report; leave pruner.first_scenes out "
                "and set the step of that report"
            )
        if self.pruner.name == "promotion" and self.sampler.name in ("gp", "cmaes"):
            raise ValueError(
                f"{self.sampler.name} learns from completed trials alone, and promotion completes few; choose another "
                "sampler or pruner"
            )
        return self

    @property
    def directions(self) -> list[str]:
        """Optuna directions: of the score, and of the cost under nsga2."""
        return [self.direction, "minimize"] if self.sampler.name == "nsga2" else [self.direction]

    @property
    def metric_names(self) -> list[str]:
        """Names of the objectives as the dashboard shows them."""
        return [self.score, self.cost] if self.sampler.name == "nsga2" else [self.score]

    @property
    def trains_networks(self) -> bool:
        """Whether trials are runs of this package's own trainer."""
        return self.program is None and self.kind == "training"

    @property
    def step_unit(self) -> str:
        """What the steps of a trial are."""
        return "scenes" if self.program is None else "steps"

    @property
    def worst_score(self) -> float | None:
        """Score of a trial whose training diverged; None where such a trial has none."""
        return WORST_K_LOC if self.program is None else self.worst

    def finite(self, score: float) -> float:
        """Return a score as it is reported: where it is not finite, the worst one.

        Raises:
            TrainingDivergedError: it is not finite, and the study has no worst score.
        """
        if math.isfinite(score):
            return score
        if self.worst_score is None:
            raise TrainingDivergedError(f"{self.score} is {score}")
        return self.worst_score

    def space_fingerprint(self) -> str:
        """Fingerprint of what makes two trials comparable: program, base, space with constraints, objectives."""
        what = {"kind", "program", "objective", "score", "direction", "constraints"}
        tree = self.model_dump(mode="json", include=what, exclude_defaults=True)
        if self.program is None:
            defaults = stored_defaults(self.base_schema, self.kind)
        else:
            defaults = defaults_of(self.config_type())
        base = differing(_nested(self.base), defaults)
        space = {path: dimension.fingerprint() for path, dimension in self.space.items()}
        return fingerprint({**tree, "base": base, "space": space, "metrics": self.metric_names})

    def whole(self) -> StudySpec:
        """Return this study with every value of its base stated, so that it means the same when defaults change.

        The seed stays out unless the study fixes it, since every trial has its own.
        """
        values = dict(leaves(self._base_config()))
        if "seed" not in self.base:
            values.pop("seed", None)
        return self.replaced({"base": values})

    def with_epochs(self, epochs: int) -> StudySpec:
        """Return this study with trials of ``epochs`` times ``budget.epoch_scenes`` scenes."""
        if epochs < 1:
            raise ConfigError(f"epochs per trial: {epochs} is not above 0")
        return self.with_base({"budget.scenes": epochs * self.budget.epoch_scenes})

    def with_base(self, changes: Mapping[str, Any]) -> StudySpec:
        """Return this study with base values replaced."""
        return self.replaced({"base": {**self.base, **changes}})

    def suggest(self, trial: Trial) -> dict[str, Value]:
        """Ask the study's sampler for every active dimension, parents first."""
        params: dict[str, Value] = {}
        for path, dimension in self.space.items():
            if dimension.active(params):
                params[path] = dimension.suggest(trial, path)
        return params

    def program_name(self) -> str:
        """Return the name by which ``load_program`` finds what the trials run."""
        return self.program or built_in(self.kind, self.objective)

    def trial_seed(self, root: int) -> int:
        """Return the seed of a trial, unless it was given another one before.

        Args:
            root: number of the first trial of its line.
        """
        return int(self.base["seed"]) if "seed" in self.base else derived_seed(self.seed, root, "run")

    def config(self, params: Mapping[str, Value], root: int | None = None, *, seed: int | None = None) -> Any:
        """Return the frozen run configuration of a trial, an instance of ``config_type()``; ``export`` writes it.

        Args:
            params: parameters of the trial; a dimension that is absent keeps its base value.
            root: number of the first trial of its line; the seed is derived from it. None keeps the base's seed.
            seed: the seed that the trial was given before, since the study's may have been changed meanwhile.

        Raises:
            ConfigError: an unknown key or a value out of bounds.
        """
        kind, source = self.config_type(), f"study '{self.name}'"
        values = self._values(kind, params, root, seed)
        if kind is AnySettings:
            return kind.parse(_nested(values), source)
        if self.base_schema == SCHEMA:
            return kind.parse({}).replaced(values)
        return kind.from_stored(self._stored_config(values), source)

    def ran(
        self, recorded: str, params: Mapping[str, Value], root: int | None = None, *, seed: int | None = None
    ) -> bool:
        """Say whether a trial of these parameters had the configuration of this fingerprint.

        Args:
            recorded: fingerprint of the run configuration, as this version or an older one recorded it.
            params: as for ``config``.
            root: as for ``config``.
            seed: as for ``config``.
        """
        if self.base_schema == SCHEMA:
            return bool(self.config(params, root, seed=seed).fingerprint() == recorded)
        kind = self.config_type()
        tree = self._stored_config(self._values(kind, params, root, seed))
        return kind.is_fingerprint_of(recorded, tree, f"study '{self.name}'")

    def _values(
        self, kind: type[Spec], params: Mapping[str, Value], root: int | None, seed: int | None
    ) -> dict[str, Any]:
        values = {**self.base, **params}
        if kind is not AnySettings:
            values |= _lengths(self, kind, values)
        if "seed" in kind.model_fields and (seed is not None or root is not None):
            values["seed"] = seed if seed is not None else self.trial_seed(root or 0)
        return values

    def _base_config(self) -> dict[str, Any]:
        """The base configuration, whole, in the keys of the study's own schema version."""
        kind, config = self.config_type(), self.config({})  # refuses what this version cannot run
        if self.base_schema == SCHEMA or kind.settings is None:
            return dict(config.model_dump(mode="json"))
        return filled(_nested(self.base), stored_defaults(self.base_schema, kind.settings))

    def _stored_config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A run configuration as it is stored, in the study's own schema version."""
        return {SCHEMA_KEY: self.base_schema, **_nested(values)}

    def config_type(self) -> type[Spec]:
        """Return the class of the trials' run configurations."""
        # imported late: a supervisor or a status query reads studies without paying for torch
        if self.program is not None:
            return load_program(self.program).config or AnySettings
        if self.kind == "inference":
            from ris_hpo.programs.inference import RunConfig as InferenceRun

            return InferenceRun
        from ris_hpo.training.config import RunConfig

        return RunConfig

    def base_params(self) -> dict[str, Value]:
        """Return the base configuration as parameters of this space.

        A program of your own that takes any settings need not have a base value for each dimension.

        Raises:
            SpaceError: a key that the run configuration does not have, or a base value outside its dimension.
        """
        values = dict(leaves(self._base_config()))
        any_settings = self.config_type() is AnySettings
        params: dict[str, Value] = {}
        for path, dimension in self.space.items():
            if not dimension.active(params) or (any_settings and path not in values):
                continue
            if path not in values:
                known = list(dotted_keys(self.config({})))
                raise SpaceError(f"study '{self.name}': unknown key '{path}'{suggestion(path, known)}")
            value = values[path]
            if dimension.is_integer and isinstance(value, float) and value.is_integer():
                value = int(value)
            if not dimension.contains(value):
                raise SpaceError(
                    f"study '{self.name}': base value {value!r} of '{path}' lies outside its range; "
                    "set it in [base] or widen the range"
                )
            params[path] = value
        return params


def _check_conditions(space: Mapping[str, Dimension], base: Mapping[str, Any]) -> None:
    """Refuse a condition on what is not searched, or not in its range, and a base value outside its range."""
    seen: list[str] = []
    for path, dimension in space.items():
        for parent, values in dimension.when.items():
            if parent not in seen:
                known = [key for key in space if key != path]
                raise ValueError(
                    f"'{path}' depends on '{parent}', which is not searched above it{suggestion(parent, known)}"
                )
            for value in values:
                if not space[parent].contains(value):
                    raise ValueError(f"'when' of '{path}' lists {value!r} for '{parent}', which is not in its range")
        if path in base and not dimension.when and not dimension.contains(base[path]):
            raise ValueError(f"base value {base[path]!r} of '{path}' lies outside its range")
        seen.append(path)


def derived_seed(seed: int, number: int, purpose: str) -> int:
    """Return a seed that is a function of the study's seed, a trial number and a purpose, and of nothing else."""
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFF_FFFF


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested tables with its dotted path."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _lengths(spec: StudySpec, kind: type[Spec], values: Mapping[str, Any]) -> dict[str, Any]:
    """The length of a trial, scaled where trials get equal compute, and its rungs, where its program has keys for them.

    Length and interval are scaled alike, so that each trial has as many reports, and its rungs at the same ones.
    """
    pauses, scales = spec.pruner.name == "promotion", spec.budget.equal == "compute"
    if not (pauses or scales):
        return {}
    program = load_program(spec.program_name())
    if program.length is None or program.interval is None or (scales and program.cost is None):
        if scales:
            raise ConfigError("budget.equal = 'compute' needs a program that states its length, interval and cost")
        return {}
    base = {**spec.base} if program.rungs is None else {**spec.base, program.rungs: []}
    first: Any = kind.parse({}).replaced(base)
    given = dict(leaves(first.model_dump(mode="json")))
    interval, length = int(given[program.interval]), int(given[program.length])
    found: dict[str, Any] = {}
    if scales and program.cost is not None:
        own = kind.parse({}).replaced({**values, **({} if program.rungs is None else {program.rungs: []})})
        ratio = program.cost(first) / program.cost(own)
        reports = -(-length // interval)
        interval = max(1, round(interval * ratio))
        length = reports * interval
        found = {program.interval: interval, program.length: length}
    if pauses and program.rungs is not None:
        found[program.rungs] = spec.pruner.rung_steps(interval, length)
    return found


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"'{path}' and '{part}' cannot both have a value")
        node[leaf] = value
    return tree
