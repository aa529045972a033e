"""Studies as the service leaves them, without training anything."""

from __future__ import annotations

import math
import random

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ris_hpo.store import attributes as names

DISTRIBUTIONS = {
    "optimizer.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "network.width": IntDistribution(16, 256, step=16),
    "network.front_end": CategoricalDistribution(["spectra", "tokens"]),
    "network.dropout": FloatDistribution(0.0, 0.3),
    "loss.count": FloatDistribution(0.01, 2.0, log=True),
}
FLOOR = 1.03


def scores(k_loc, success=0.4):
    return {
        "k_loc": k_loc, "k_acc": 0.62, "k_under": 0.3, "k_over": 0.08, "precision": 0.7, "recall": 0.6, "f1": 0.65,
        "success": success, "rmse_azimuth_deg": 2.9, "rmse_elevation_deg": 2.3, "rmse_range_m": 1.2, "rmspe_m": 1.0,
        "gospa_m": 1.9, "median_azimuth_deg": 0.4, "median_elevation_deg": 0.3, "median_range_m": 0.3,
        "num_scenes": 512,
    }  # fmt: skip


def fill(study, trials=60, reports=20, seed=0, bare=False):
    """Add trials of every kind; ``bare`` leaves the service's attributes out."""
    draw = random.Random(seed)
    added = []
    for number in range(trials):
        params = {
            "optimizer.learning_rate": 10 ** draw.uniform(-5, -2),
            "network.width": draw.randrange(16, 257, 16),
            "network.front_end": draw.choice(["spectra", "tokens"]),
            "loss.count": 10 ** draw.uniform(-2, 0.3),
        }
        if params["network.front_end"] == "spectra":
            params["network.dropout"] = draw.uniform(0, 0.3)
        quality = (
            1.6
            + 0.5 * abs(math.log10(params["optimizer.learning_rate"]) + 3.2)
            + (0.9 if params["network.front_end"] == "tokens" else 0)
            + 0.2 * draw.random()
        )
        curve = {
            20_000 * i: quality + 4 * math.exp(-i / (reports / 4)) + 0.05 * draw.random() for i in range(1, reports + 1)
        }
        kind = draw.random()
        state, value = TrialState.COMPLETE, quality
        attributes = {
            names.COMPONENTS: scores(quality), names.FLOOR: FLOOR, names.EFFICIENCY: (7 - quality) / (7 - FLOOR),
            names.SECONDS: 40.0 + draw.random(), names.THREADS: 2, names.HOST: "node-1", names.DEVICE: "cpu",
            names.SCENES: 20_000 * reports, names.CONFIG_FINGERPRINT: f"{number:016x}",
        }  # fmt: skip
        if number == 0:
            attributes[names.ORIGIN] = "base"
        elif kind < 0.4:
            stop = draw.randrange(1, reports)
            curve = {step: v for step, v in curve.items() if step <= 20_000 * stop}
            state, value = TrialState.PRUNED, None
            attributes |= {names.SCENES: 20_000 * stop, names.SECONDS: 40.0 * stop / reports}
        elif kind < 0.5:
            state, value, curve = TrialState.FAIL, None, {}
            cause = draw.choice([names.Cause.OUT_OF_MEMORY, names.Cause.LOST_WORKER])
            attributes |= {names.CAUSE: cause.value, names.ERROR: f"<b>{cause}</b> on node-1"}
        elif kind < 0.54:
            value = 7.0
            attributes[names.DIVERGED] = "loss.count became nan after 4,096 scenes"
        if state is TrialState.COMPLETE:
            attributes[names.PIPELINE] = scores(0.75 * quality + 0.5, 0.52)
        added.append(
            create_trial(
                state=state,
                value=value,
                params=params,
                distributions={name: DISTRIBUTIONS[name] for name in params},
                intermediate_values=curve,
                user_attrs={} if bare else attributes,
            )
        )
    study.add_trials(added)


def make_study(storage=None, name="wide", **options):
    study = optuna.create_study(storage=storage, study_name=name)
    study.set_user_attr(
        names.SPEC,
        {"description": "Every knob.", "objective": "network", "sampler": {"name": "tpe"}, "pruner": {"name": "asha"}},
    )
    study.set_user_attr(names.COMMAND, "ris-hpo run --space wide --n-trials 60")
    study.set_user_attr(names.SPACE_FINGERPRINT, "0123456789abcdef")
    study.set_user_attr(names.REFERENCE, {"ml": scores(2.37, 0.572), "floor": scores(FLOOR, 0.577)})
    fill(study, **options)
    return study
