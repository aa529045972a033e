"""What pruning saves and what it costs, on recorded full curves of real configurations.

    python benchmarks/pruning.py record --trials 44     # random points of wide, trained to the end, to curves.json
    python benchmarks/pruning.py replay                 # every pruner over many orders of the same curves

A replay feeds the recorded values to the service's own pruners, one trial after the other, as one worker would; the
regret is how much worse the best completed trial is than the best of all curves, in percent of the range of their best
values. Orders are shuffled, since one order is one draw.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from ris_hpo.search.files import load_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, quiet_optuna
from ris_hpo.search.pruners import build_pruner
from ris_hpo.store.open import open_store
from ris_hpo.workers.devices import plan_slots
from ris_hpo.workers.local import LocalProcesses
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import job_for

CURVES = Path(__file__).with_name("curves.json")
SCENES, EVERY = 1536, 128


def record(trials: int, folder: Path, workers: int) -> None:
    """Train random points of the wide space to the end and keep their curves."""
    spec = load_study("wide").with_base(
        {
            "budget.scenes": SCENES,
            "budget.validate_every": EVERY,
            "budget.validation_scenes": 128,
            "budget.pipeline_scenes": 0,
        }
    )
    spec = spec.replaced({"sampler.name": "random", "pruner.name": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(str(folder / "curves.db"))
    study = create_or_resume_study(store, spec)
    fill_budget(store, study, trials)
    processes = LocalProcesses(plan_slots(workers, [], threads=1), folder / "trials")
    pool = Supervisor(store, study, processes, job_for(store, study, directory=folder / "trials"))
    for snapshot in pool.run(interval=30):
        print(f"{snapshot.seconds:7.0f} s  {snapshot.tally.complete} of {trials}", *snapshot.messages, flush=True)
        _write([trial for trial in study.get_trials() if trial.state == TrialState.COMPLETE])
    store.close()


def _write(trials: list[optuna.trial.FrozenTrial]) -> None:
    rows = [
        {
            "number": trial.number,
            "front_end": trial.params["network.front_end"],
            "covariance_head": trial.params["network.covariance_head"],
            "steps": sorted(trial.intermediate_values),
            "k_loc": [round(trial.intermediate_values[step], 5) for step in sorted(trial.intermediate_values)],
        }
        for trial in trials
    ]
    CURVES.write_text(json.dumps(rows, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")


def once(curves: list[list[float]], steps: list[int], pruner: dict[str, object]) -> tuple[float, float]:
    """Replay curves in the order given; return the share of scenes saved and the regret."""
    spec = load_study("wide").replaced({f"pruner.{key}": value for key, value in pruner.items()})
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage)
    spent, best = 0, float("inf")
    for curve in curves:
        study.pruner = build_pruner(spec, storage, first_step=steps[0], last_step=steps[-1])
        trial = study.ask()
        for step, value in zip(steps, curve, strict=True):
            trial.report(value, step)
            if trial.should_prune() and step < steps[-1]:
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            best = min(best, min(curve))
            study.tell(trial, min(curve))
        spent += step
    bests = [min(curve) for curve in curves]
    regret = (best - min(bests)) / (max(bests) - min(bests))
    return 1 - spent / (steps[-1] * len(curves)), regret


def average(curves: list[list[float]], steps: list[int], pruner: dict[str, object], orders: int) -> tuple[float, float]:
    """Mean share of scenes saved and mean regret in percent over so many orders of the same curves."""
    results = [once(random.Random(seed).sample(curves, len(curves)), steps, pruner) for seed in range(orders)]
    saved, regret = zip(*results, strict=True)
    return sum(saved) / orders, 100 * sum(regret) / orders


def replay(orders: int) -> None:
    """Print the table of pruners."""
    quiet_optuna()
    rows = json.loads(CURVES.read_text())
    print(f"{len(rows)} curves of {rows[0]['steps'][-1]} scenes, {orders} orders each; mean (worst tenth)")
    print(f"{'pruner':34}{'validations':>12}{'scenes saved':>20}{'regret, % of range':>24}")
    settings: list[tuple[dict[str, object], int]] = [
        ({"name": "asha"}, 6),
        ({"name": "asha"}, 12),
        ({"name": "asha", "reduction": 2}, 6),
        ({"name": "asha", "reduction": 4}, 6),
        ({"name": "asha", "patience": 1}, 6),
        ({"name": "hyperband"}, 6),
        ({"name": "median"}, 6),
        ({"name": "wilcoxon"}, 6),
        ({"name": "none"}, 6),
    ]
    for pruner, count in settings:
        thin = len(rows[0]["steps"]) // count
        steps = rows[0]["steps"][thin - 1 :: thin]
        curves = [row["k_loc"][thin - 1 :: thin] for row in rows]
        saved, regret = [], []
        for seed in range(orders):
            order = random.Random(seed).sample(curves, len(curves))
            share, loss = once(order, steps, pruner)
            saved.append(share)
            regret.append(100 * loss)
        saved.sort()
        regret.sort()
        tenth = max(1, orders // 10)
        label = ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in pruner.items())
        low = sum(saved[:tenth]) / tenth
        high = sum(regret[-tenth:]) / tenth
        print(
            f"{label:34}{count:>12}{sum(saved) / orders:>12.1%} ({low:.1%}){sum(regret) / orders:>14.2f} ({high:.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--trials", type=int, default=44)
    recording.add_argument("--workers", type=int, default=1)
    recording.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ris-hpo-curves")
    replaying = commands.add_parser("replay")
    replaying.add_argument("--orders", type=int, default=50)
    options = parser.parse_args()
    if options.command == "record":
        record(options.trials, options.folder, options.workers)
    else:
        replay(options.orders)
