"""Whether the best trial is really better: fresh seeds, fresh scenes, paired with the base configuration.

The best of two hundred noisy scores is lower than what it would score again. The leading configurations are therefore
trained again, each with the same fresh seeds as the base, and scored on fresh scenes; seed s makes a pair:

    d_is = k_loc(candidate i, seed s) - k_loc(base, seed s),      mean_i +- t_{n-1, 1 - a/(2k)} sd_i / sqrt(n)

With k candidates looked at, each interval is widened (Bonferroni), so that all of them hold at once with probability
1 - a and picking the best of k is allowed for. ``judge`` computes just this, a pure function of a table.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from numpy.typing import ArrayLike
from scipy import stats

from ris_hpo.atomic import make_folder, write_text
from ris_hpo.config import AnySettings, Spec, fingerprint
from ris_hpo.errors import GateError, StudyError, TrainingDivergedError
from ris_hpo.programs.program import TrialContext, as_number, load_program, source
from ris_hpo.scoring.k_loc import SCORE_VERSION, WORST_K_LOC, finite_score
from ris_hpo.search.counting import Direction, ranked
from ris_hpo.search.spec import StudySpec, derived_seed
from ris_hpo.store import attributes as names

TOP: Final = 3
SEEDS: Final = 5
CONFIDENCE: Final = 0.95
FRESH_SHARE: Final = 4  # fresh scenes over those of a trial's own pipeline score: here they are most of what scatters
FRESH_FAMILY: Final = 1 << 41  # seeds of the scenes of the re-evaluation, far from training's and validation's

Row = np.ndarray[Any, np.dtype[np.float64]]
Evaluate = Callable[[Spec, Path], float]
"""Train a configuration in a folder (and go on where it was left), score it on fresh scenes; lower is better."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One candidate and the base: mean score, mean paired difference, simultaneous interval of it.

    ``better`` says whether the whole interval lies on the side of zero where the candidate is the better one.
    """

    name: str
    mean: float
    difference: float
    low: float
    high: float
    better: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of comparing the candidates with the base.

    Attributes:
        winner: name of the candidate with the best mean, or of the base where no candidate's mean is better.
        distinguishable: whether the winner's lead over the base is more than seeds and scenes explain.
        peers: further candidates that this table cannot tell from the winner.
        base_mean: mean score of the base.
        candidates: every candidate, best mean first.
        seeds: pairs.
        confidence: of all intervals together.
        sentence: the same in words.
    """

    winner: str
    distinguishable: bool
    peers: tuple[str, ...]
    base_mean: float
    candidates: tuple[Comparison, ...]
    seeds: int
    confidence: float
    sentence: str


def judge(
    candidates: Sequence[str],
    scores: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    metric: str = "k_loc",
    direction: Direction = "minimize",
) -> Verdict:
    """Compare candidates with a base over paired seeds.

    Args:
        candidates: names of rows 1, 2, ...
        scores: [1 + k, n] scores; row 0 is the base, column s shares one seed and its scenes.
        confidence: probability that all k intervals hold.
        metric: what the score is called.
        direction: which way it is better.

    Returns:
        The verdict; with one seed nothing is distinguishable.

    Raises:
        StudyError: a table of another shape, or with values that are not finite.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != 1 + len(candidates) or len(candidates) == 0 or table.shape[1] == 0:
        raise StudyError(f"scores of shape {table.shape} do not fit a base and {len(candidates)} candidates")
    if not np.isfinite(table).all():
        raise StudyError("scores that are not finite cannot be compared; a failed run has no score")
    table = table if direction == "minimize" else -table  # from here on lower is better
    base, others = table[0], table[1:]
    alpha = 1 - confidence
    compared = []
    for name, row in zip(candidates, others, strict=True):
        difference, low, high = paired_interval(row, base, alpha / len(candidates))
        compared.append(Comparison(name, float(row.mean()), difference, low, high, better=high < 0))
    order = sorted(range(len(candidates)), key=lambda index: (compared[index].mean, index))
    first = order[0]
    pairs = len(candidates) * (len(candidates) - 1) // 2
    peers = tuple(
        candidates[index]
        for index in order[1:]
        if not paired_interval(others[first], others[index], alpha / max(1, pairs))[2] < 0
    )
    leader = compared[first]
    behind = leader.difference >= 0
    verdict = Verdict(
        winner="base" if behind else leader.name,
        distinguishable=leader.better,
        peers=peers,
        base_mean=float(base.mean()),
        candidates=tuple(compared[index] for index in order),
        seeds=table.shape[1],
        confidence=confidence,
        sentence="",
    )
    worded = dataclasses.replace(verdict, sentence=_sentence(verdict, leader, metric, direction))
    return worded if direction == "minimize" else _negated(worded)


def _negated(verdict: Verdict) -> Verdict:
    """The verdict with its figures in the score's own direction."""
    candidates = tuple(
        dataclasses.replace(each, mean=-each.mean, difference=-each.difference, low=-each.high, high=-each.low)
        for each in verdict.candidates
    )
    return dataclasses.replace(verdict, base_mean=-verdict.base_mean, candidates=candidates)


def confirm(
    study: optuna.Study,
    spec: StudySpec,
    evaluate: Evaluate,
    directory: Path,
    *,
    top: int = TOP,
    seeds: int = SEEDS,
    confidence: float = CONFIDENCE,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Verdict:
    """Re-evaluate the best configurations of a study, write the verdict into the study, and return it.

    Finished runs are kept in ``directory``, so that an interrupted call continues where it was. A kept score is used
    again only for the same configuration, seed, fresh scenes, score version, code, torch and device.

    Args:
        study: the study.
        spec: its specification.
        evaluate: trains and scores one configuration; ``fresh_score``, or of a program of one's own ``program_score``.
        directory: where runs are kept.
        top: candidates.
        seeds: fresh seeds for each of them and for the base.
        confidence: probability that all intervals hold.
        device: where ``evaluate`` computes.
        progress: called with (runs done, runs in all, what is next).

    Raises:
        StudyError: no completed trial other than the base configuration.
    """
    base = spec.config({})
    candidates: dict[str, tuple[optuna.trial.FrozenTrial, Spec]] = {}
    taken = {_same(base)}
    for trial in ranked(study.get_trials(deepcopy=False), spec.direction):
        config = spec.config(trial.params)
        if _same(config) not in taken and len(candidates) < top:
            taken.add(_same(config))
            candidates[f"trial {trial.number}"] = (trial, config)
    if not candidates:
        raise StudyError(
            f"study '{study.study_name}' has no completed trial besides the base configuration; nothing to confirm"
        )
    configs: dict[str, Spec] = {"base": base, **{name: config for name, (_, config) in candidates.items()}}
    code = code_of(spec)
    fresh = [derived_seed(spec.seed, index, "winner") for index in range(seeds)]
    table = np.empty((len(configs), seeds))
    runs = list(itertools.product(enumerate(fresh), enumerate(configs.items())))  # seed by seed: whole pairs early
    for done, ((column, seed), (row, (name, chosen))) in enumerate(runs):
        progress(done, len(runs), f"{name}, seed {column + 1} of {seeds}")
        table[row, column] = kept_score(evaluate, seeded(chosen, seed), directory, code, device)
    progress(len(runs), len(runs), "done")
    verdict = judge(list(candidates), table, confidence=confidence, metric=spec.score, direction=spec.direction)
    searched = {name: trial.values[0] for name, (trial, _) in candidates.items()}
    study.set_user_attr(names.WINNER, as_attribute(verdict, searched, on_scenes=spec.program is None))
    return verdict


def as_attribute(verdict: Verdict, searched: dict[str, float], *, on_scenes: bool = True) -> dict[str, Any]:
    """The verdict as it stands in the study's attributes: JSON types, None for an unbounded end.

    Args:
        verdict: the verdict.
        searched: score in the search by name of the candidate.
        on_scenes: the scores are of fresh scenes, which those of a program of one's own are not.
    """
    rows = []
    for item in verdict.candidates:
        ends = {"low": _bounded(item.low), "high": _bounded(item.high)}
        rows.append({**dataclasses.asdict(item), **ends, "searched": searched.get(item.name)})
    return {
        "winner": verdict.winner,
        "distinguishable": verdict.distinguishable,
        "verdict": verdict.sentence,
        "method": (
            f"Trained again with {verdict.seeds} fresh seeds, {'scored on fresh scenes, ' if on_scenes else ''}paired "
            "with the base by seed; "
            f"the intervals hold together with {verdict.confidence:.0%} probability."
        ),
        "base_mean": verdict.base_mean,
        "peers": list(verdict.peers),
        "candidates": rows,
    }


def fresh_score(config: Spec, directory: Path, *, device: str = "cpu") -> float:
    """Train from scratch, then score the finished network: the pipeline's ``k_loc`` on scenes nobody has selected on.

    A configuration of an inference study has a network already and is scored at once.

    The scenes are a function of the configuration's seed, so that the base and every candidate meet the same ones. A
    run that diverges scores worst; one whose curriculum fails a gate is scored by what it reached.
    """
    from ris_hpo.learning.inference import localize
    from ris_hpo.physics.scene import simulate
    from ris_hpo.programs.inference import RunConfig as InferenceConfig
    from ris_hpo.programs.inference import Trainer as InferenceTrainer
    from ris_hpo.scoring.metrics import score
    from ris_hpo.training.config import RunConfig
    from ris_hpo.training.trainer import Trainer

    if isinstance(config, InferenceConfig):
        trial = InferenceTrainer(config.replaced({"scene_seed": FRESH_FAMILY + config.seed}), directory, device=device)
        for _ in trial.run():
            continue
        return finite_score(trial.conclude().pipeline.k_loc)
    run = RunConfig.parse(config.model_dump(mode="json"))
    trainer = Trainer(run, directory, device=device)
    try:
        for _ in trainer.run():
            continue
    except TrainingDivergedError:
        return WORST_K_LOC
    except GateError:
        if trainer.best is None:
            return WORST_K_LOC
    network = trainer.finished_network()
    count = FRESH_SHARE * (run.budget.pipeline_scenes or run.budget.validation_scenes)
    scenes = simulate(run.scene, FRESH_FAMILY + run.seed, range(count), device=device)
    return finite_score(score(localize(network, scenes, run.inference), scenes.require_truth()).k_loc)


def program_score(config: Spec, directory: Path, *, spec: StudySpec, device: str = "cpu") -> float:
    """Run a study's own program again, to its end, and return its score; for a run that diverges the worst one.

    Raises:
        TrainingDivergedError: it diverges, and the study has no worst score.
    """
    program = load_program(spec.program_name())
    settings = config.model_dump(mode="json")
    trial = TrialContext(settings, directory, seed=settings["seed"], device=device)
    try:
        returned = program.train(trial)
        return spec.finite(trial.scores[max(trial.scores)] if returned is None else as_number(returned, "the score"))
    except TrainingDivergedError:
        if spec.worst_score is None:
            raise
        return spec.worst_score


def paired_interval(first: Row, second: Row, alpha: float) -> tuple[float, float, float]:
    """Mean of ``first - second`` with its two-sided paired t interval at level ``1 - alpha``: (mean, low, high)."""
    mean = float((first - second).mean())
    if len(first) < 2:
        return mean, -math.inf, math.inf
    with warnings.catch_warnings():  # of differences that are all alike; their interval has no width
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = stats.ttest_rel(first, second).confidence_interval(1 - alpha)
    return mean, float(low), float(high)


def _sentence(verdict: Verdict, leader: Comparison, metric: str, direction: Direction) -> str:
    lower, above = ("lower", "above") if direction == "minimize" else ("higher", "below")
    level = f"{verdict.confidence:.0%}"
    if verdict.seeds < 2:
        return "One seed cannot tell a lead from luck: not distinguishable. Use more seeds."
    if leader.better:
        text = (
            f"{leader.name.capitalize()} is better than the base configuration: {metric} {lower} by "
            f"{-leader.difference:.3f}, {level} interval {-leader.high:.3f} to {-leader.low:.3f} over {verdict.seeds} "
            "fresh seeds."
        )
        if verdict.peers:
            text += f" It cannot be told from {' or '.join(verdict.peers)}."
        return text
    if leader.difference >= 0:
        return (
            f"No candidate beats the base configuration on fresh seeds: {leader.name} comes closest, "
            f"{leader.difference:.3f} {above} it; not distinguishable from a lucky draw of the search."
        )
    return (
        f"{leader.name.capitalize()} is not distinguishable from the base configuration: {metric} {lower} by "
        f"{-leader.difference:.3f}, but the {level} interval, {_signed(-leader.high)} to {_signed(-leader.low)} over "
        f"{verdict.seeds} fresh seeds, holds zero."
    )


def code_of(spec: StudySpec) -> str:
    """Fingerprint of the code that a study's scores depend on.

    Of a program of one's own that is its package, or its module with the modules beside it in the current folder.
    """
    if spec.program is None:
        from ris_hpo.training.proof import LEARNING_CODE, code_fingerprint

        return code_fingerprint((*LEARNING_CODE, "programs", "results"))
    module = importlib.import_module(spec.program.partition(":")[0].partition(".")[0])
    if module.__file__ is None:
        folders = [Path(folder) for folder in module.__path__]
        files = [file for folder in folders for file in folder.rglob("*.py")]
    elif hasattr(module, "__path__"):
        files = list(Path(module.__file__).parent.rglob("*.py"))
    elif source(spec.program) is not None:
        files = list(Path(module.__file__).parent.glob("*.py"))
    else:
        files = [Path(module.__file__)]
    return fingerprint({str(file): file.read_text(encoding="utf-8") for file in sorted(files)})


def kept_score(evaluate: Evaluate, config: Spec, directory: Path, code: str, device: str) -> float:
    """The score of a configuration, computed once for all that it depends on."""
    version = {
        "config": config.fingerprint(),  # the seed is in it
        "score_version": SCORE_VERSION,
        "fresh_scenes": [FRESH_FAMILY, FRESH_SHARE],
        "code": code,
        "torch": metadata.version("torch"),
        "device": device,
    }
    folder = directory / fingerprint(version)
    result = folder / "score.json"
    if result.is_file():
        return float(json.loads(result.read_text(encoding="utf-8"))["score"])
    value = evaluate(config, make_folder(folder))
    write_text(result, json.dumps({"score": value, **version, "configuration": config.model_dump(mode="json")}))
    return value


def seeded(config: Spec, seed: int) -> Spec:
    """Return a configuration with another seed."""
    if isinstance(config, AnySettings):
        return AnySettings.parse({**config.model_dump(), "seed": seed})
    return config.replaced({"seed": seed})


def _same(config: Spec) -> str:
    return seeded(config, 0).fingerprint()


def _bounded(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _signed(value: float) -> str:
    return f"{value:+.3f}"
