"""Supervisors stopped, killed, or two at once: the same table at the end."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from ris_hpo.search import counting
from ris_hpo.store.open import open_store
from tests.service.pools import Driver, slow_base, table
from tests.waiting import until

SOON_S = 30  # with every core taken by others; at rest it is less than one


@pytest.mark.system
def test_a_stopped_supervisor_resumes_to_the_same_table(tmp_path: Path) -> None:
    generator = random.Random(2)
    changes = {"base": slow_base(1600, 0.06)}  # long enough that a stop finds one under way
    whole = Driver(f"sqlite:///{tmp_path}/whole.db", tmp_path / "whole", 4, 1, **changes)
    broken = f"sqlite:///{tmp_path}/broken.db"
    for number in (signal.SIGTERM, signal.SIGINT):
        driver = Driver(broken, tmp_path / "broken", 4, 1, **changes)
        driver.when_running()
        time.sleep(0.4 * generator.random())
        driver.process.send_signal(number)
        began = time.monotonic()
        assert driver.finish() == 0
        assert time.monotonic() - began < SOON_S
    assert Driver(broken, tmp_path / "broken", 4, 1, **changes).finish() == 0
    assert whole.finish() == 0
    first, second = open_store(f"sqlite:///{tmp_path}/whole.db"), open_store(broken)
    assert table(first) == table(second)
    assert any("preemptions" in trial.user_attrs for trial in second.get_all_trials(1))
    first.close()
    second.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_stops_at_random_moments(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    changes = {"base": slow_base(800, 0.1), "pruner": {"name": "median", "startup": 3}}
    workers = 1 + 2 * (seed % 2)
    whole = Driver(f"sqlite:///{tmp_path}/whole.db", tmp_path / "whole", 10, 1, **changes)
    broken = f"sqlite:///{tmp_path}/broken.db"
    for _ in range(5):
        driver = Driver(broken, tmp_path / "broken", 10, workers, **changes)
        driver.when_running()
        time.sleep(2.0 * generator.random())
        driver.process.send_signal(generator.choice([signal.SIGTERM, signal.SIGINT]))
        began = time.monotonic()
        driver.finish()
        assert time.monotonic() - began < SOON_S
    assert Driver(broken, tmp_path / "broken", 10, workers, **changes).finish() == 0
    assert whole.finish() == 0
    first, second = open_store(f"sqlite:///{tmp_path}/whole.db"), open_store(broken)
    if workers == 1:
        assert table(first) == table(second)
    counts = counting.tally(second.get_all_trials(1))
    assert (counts.ended, counts.open) == (10, 0)
    first.close()
    second.close()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    driver = Driver(f"sqlite:///{tmp_path}/a.db", tmp_path, 4, 1, base=slow_base(80_000, 0.02, fault="hang"))
    pids = driver.when_running()
    until((tmp_path / "trials" / "0" / "hung").exists, "trial that hangs, where no question is asked")

    def told_again() -> bool:
        driver.process.send_signal(signal.SIGTERM)
        return driver.process.poll() is not None

    until(told_again, "end of the supervisor")
    # an end that waited for the worker would kill it and have another code
    assert driver.finish() == 128 + signal.SIGTERM
    for pid in pids:  # a worker that hangs outlives it until someone ends it
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_supervisor_leaves_no_worker_and_no_loss(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    driver = Driver(url, tmp_path, 4, 2, base=slow_base(1600, 0.03))
    pids = driver.when_running()
    driver.process.kill()
    driver.finish()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "end of the workers")
    store = open_store(url)
    assert counting.tally(store.get_all_trials(1)).running == 0  # checkpointed and put back, not abandoned
    assert Driver(url, tmp_path, 4, 2, base=slow_base(1600, 0.03)).finish() == 0
    counts = counting.tally(store.get_all_trials(1))
    assert (counts.ended, counts.open) == (4, 0)
    store.close()


def test_two_supervisors_share_one_budget(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    pair = [Driver(url, tmp_path, 10, 1) for _ in range(2)]
    assert [driver.finish() for driver in pair] == [0, 0]
    store = open_store(url)
    counts = counting.tally(store.get_all_trials(1))
    assert (counts.ended, counts.open, counts.retried) == (10, 0, 0)
    store.close()
