"""Do trials tell configurations apart? Random configurations of a space by seeds, at the trial budget, whole.

    python -m benchmarks.separation run --space wide --configs 8 --seeds 3 --workers 2 --out storage/separation.jsonl
    python -m benchmarks.separation table storage/separation.jsonl

Prints the objective's own score of every run, the ratio of the variance between configurations to that between seeds
(one-way analysis of variance, F with its p-value), and where the winner by the network path stands by the pipeline.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import f_oneway, spearmanr

from ris_hpo.search.files import load_study
from ris_hpo.search.lifecycle import quiet_optuna
from ris_hpo.training.config import RunConfig
from ris_hpo.training.trainer import Trainer


def one(space: str, params: dict[str, Any], config: int, seed: int, pipeline_scenes: int) -> dict[str, Any]:
    """Train one configuration with one seed."""
    torch.set_num_threads(1)
    spec = load_study(space)
    run: RunConfig = spec.config(params).replaced({"seed": 1000 + 17 * seed, "budget.pipeline_scenes": pipeline_scenes})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(run, Path(folder))
        values = [validation.network.k_loc for validation in trainer.run()]
        end = trainer.conclude()
    return {
        "config": config,
        "seed": seed,
        "k_loc": min(values),
        "pipeline": end.pipeline.k_loc,
        "floor": end.floor.k_loc,
        "seconds": round(trainer.seconds, 1),
        "params": params,
    }


def run(arguments: argparse.Namespace) -> None:
    spec = load_study(arguments.space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=arguments.seed))
    drawn = [spec.suggest(study.ask()) for _ in range(arguments.configs)]
    out = Path(arguments.out)
    done = {(row["config"], row["seed"]) for row in rows_of(out)} if out.exists() else set()
    todo = [(c, s) for s in range(arguments.seeds) for c in range(arguments.configs) if (c, s) not in done]
    with ProcessPoolExecutor(arguments.workers) as pool, out.open("a", encoding="utf-8") as file:
        for future in as_completed(
            [pool.submit(one, arguments.space, drawn[c], c, s, arguments.pipeline_scenes) for c, s in todo]
        ):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
    table(out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(path: Path) -> None:
    rows = rows_of(path)
    configs = sorted({row["config"] for row in rows})
    scores = {c: [row["k_loc"] for row in rows if row["config"] == c] for c in configs}
    pipeline = {c: float(np.mean([row["pipeline"] for row in rows if row["config"] == c])) for c in configs}
    mean = {c: float(np.mean(values)) for c, values in scores.items()}
    print("| configuration | form | network path, by seed | mean | pipeline |\n|---|---|---|---|---|")
    for c in sorted(configs, key=mean.__getitem__):
        params = next(row["params"] for row in rows if row["config"] == c)
        rate = params["optimizer.learning_rate"]
        form = f"{params['network.front_end']}, {params['network.covariance_head']}, rate {rate:.1e}"
        print(f"| {c} | {form} | {' '.join(f'{v:.2f}' for v in scores[c])} | {mean[c]:.2f} | {pipeline[c]:.2f} |")
    test = f_oneway(*scores.values())
    between = np.var(list(mean.values()), ddof=1)
    within = np.mean([np.var(values, ddof=1) for values in scores.values()])
    print(f"variance between configurations over variance between seeds {between / within:.1f}")
    print(f"F = {test.statistic:.1f} (p = {test.pvalue:.1e})")
    winner = min(mean, key=mean.__getitem__)
    place = sorted(pipeline.values()).index(pipeline[winner]) + 1
    rank = spearmanr([mean[c] for c in configs], [pipeline[c] for c in configs]).statistic
    print(f"winner by the network path: configuration {winner}, place {place} of {len(configs)} by the pipeline")
    print(f"rank correlation of the two paths {rank:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--space", default="wide")
    runs.add_argument("--configs", type=int, default=8)
    runs.add_argument("--seeds", type=int, default=3)
    runs.add_argument("--seed", type=int, default=11)
    runs.add_argument("--pipeline-scenes", type=int, default=512)
    runs.add_argument("--workers", type=int, default=1)
    runs.add_argument("--out", required=True)
    commands.add_parser("table").add_argument("file")
    arguments = parser.parse_args()
    quiet_optuna()
    if arguments.command == "table":
        table(Path(arguments.file))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
