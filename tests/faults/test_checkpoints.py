"""Checkpoints truncated or with a flipped bit, with the real trainer: noticed, set aside, the same curve."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from ris_hpo.results.replay import replay
from ris_hpo.store.cache import Store
from ris_hpo.training import checkpoint
from ris_hpo.trials.context import Report
from ris_hpo.workers.worker import WorkerJob, run_worker

from .test_disk import tiny_study


def truncated(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def flipped(content: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[generator.randrange(len(content) // 2, len(content))] ^= 1 << generator.randrange(8)  # among the tensors
    return bytes(damaged)


@pytest.mark.parametrize("damage", [truncated, flipped], ids=["truncated", "bit-flipped"])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_a_damaged_checkpoint_costs_time_and_nothing_else(
    damage: Callable[[bytes, random.Random], bytes], seed: int, sqlite_store: Store, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    study = tiny_study(sqlite_store)
    reports = generator.randint(1, 2)
    seen: list[int] = []
    folders = {"directory": str(tmp_path / "trials"), "artifacts": str(tmp_path / "artifacts")}
    job = WorkerJob(sqlite_store.address, "tiny", threads=1, **folders)
    stopped = run_worker(
        job,
        stop=lambda: len(seen) >= reports,
        notify=lambda event: seen.append(event.step) if isinstance(event, Report) else None,
    )
    assert stopped.requeued == 1
    acknowledged = study.get_trials()[0].intermediate_values
    assert len(acknowledged) == reports
    file = tmp_path / "trials" / "0" / generator.choice([checkpoint.LAST, checkpoint.BEST])
    file.write_bytes(damage(file.read_bytes(), generator))
    assert run_worker(job).ended == 1
    (trial,) = study.get_trials()
    assert trial.state == TrialState.COMPLETE
    assert acknowledged.items() <= trial.intermediate_values.items()
    assert replay(sqlite_store, "tiny", 0).identical
