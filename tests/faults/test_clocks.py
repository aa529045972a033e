"""Clocks that somebody sets, on this host or the server's: no live worker is declared lost, no dead one overlooked."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import sqlalchemy
from optuna.trial import TrialState

from ris_hpo.search import counting
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.owner import _identity, this_process
from ris_hpo.workers import lost as lost_module
from ris_hpo.workers.lost import LostTrials
from tests.service.conftest import elsewhere, id_of, make_spec
from tests.service.pools import begin, same_curves, slow_base, supervisor_of


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Set this host's clock as a process sees it: the kernel counts the time of boot back from now."""
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + seconds)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + seconds)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs the kernel's own ticks")
@pytest.mark.parametrize("seconds", [-86400, -2, 2, 3600])
def test_a_process_keeps_its_name_when_the_clock_is_set(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    process = this_process()
    began = psutil.Process().create_time()
    set_clock(monkeypatch, seconds)
    assert psutil.Process().create_time() == pytest.approx(began + seconds)  # what the name must not be made of
    _identity.cache_clear()
    assert this_process() == process
    assert not process.is_gone


def test_workers_of_a_run_survive_a_set_clock(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(sqlite_store, 4, base=slow_base(), pruner={"name": "none"})
    generator = random.Random(11)
    running = supervisor_of(sqlite_store, study, tmp_path, 2)
    lost: list[int] = []
    for snapshot in running.run(interval=0.1):
        if snapshot.tally.running:
            with monkeypatch.context() as patch:
                set_clock(patch, generator.uniform(-1e6, 1e6))
                lost += LostTrials(sqlite_store, id_of(sqlite_store, study), make_spec().retries).recover()
    counts = counting.tally(study.get_trials())
    assert (counts.complete, counts.retried, counts.open) == (4, 0, 0)
    assert lost == []
    same_curves(sqlite_store, study)


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_databases_clock_is_set_by_hours(hours: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats are stamped by the database: after a step they are all far in the past, or in the future."""
    study = begin(store, 2)
    alive, dead = (store.claim(id_of(store, study), str(elsewhere(pid))) for pid in (1, 2))
    assert alive is not None
    assert dead is not None
    ids = [store.get_trial_id_from_study_id_trial_number(id_of(store, study), number) for number in (alive, dead)]
    for trial_id in ids:
        store.record_heartbeat(trial_id)
    table = sqlalchemy.Table("trial_heartbeats", sqlalchemy.MetaData(), autoload_with=store.tickets.engine)

    def shift(beats: sqlalchemy.ColumnElement[bool], by: timedelta) -> None:
        with store.tickets.engine.begin() as connection:
            for row in connection.execute(sqlalchemy.select(table).where(beats)).all():
                change = sqlalchemy.update(table).where(table.c.trial_id == row.trial_id)
                connection.execute(change.values(heartbeat=row.heartbeat + by))

    shift(sqlalchemy.true(), timedelta(hours=-hours))
    clock = [1000.0]
    monkeypatch.setattr(lost_module.time, "monotonic", lambda: clock[0])
    lost = LostTrials(store, id_of(store, study), make_spec().retries)
    found: list[int] = []
    for _ in range(8):
        clock[0] += 5
        shift(table.c.trial_id == ids[0], timedelta(seconds=5))  # it beats on, by the database's new clock
        found += lost.recover()
    assert found == [1]
    failed = study.get_trials(states=[TrialState.FAIL])
    assert [trial.user_attrs[names.ERROR] for trial in failed] == ["no heartbeat from process 2 on elsewhere for 30 s"]
