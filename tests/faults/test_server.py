"""PostgreSQL away for a while, or its connections cut: no report lost, no worker dead."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ris_hpo.errors import StoreError
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store import retry
from ris_hpo.store.open import open_store
from tests.postgres import Postgres
from tests.service.conftest import id_of, make_spec
from tests.service.pools import same_curves, slow_base, supervisor_of

pytestmark = pytest.mark.postgres

CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ris-hpo'"


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server of this test's own, since others would not like it to go away."""
    with tempfile.TemporaryDirectory(prefix="ris", dir="/tmp") as folder:
        server = Postgres(Path(folder))
        yield server
        server.close()


def begin(server: Postgres, n_trials: int, **changes: Any) -> tuple[Any, Any]:
    store = open_store(server.url(), heartbeat=1)
    study = create_or_resume_study(store, make_spec(pruner={"name": "none"}, **changes), score_version=1)
    fill_budget(store, study, n_trials)
    return store, study


def run_through(server: Postgres, folder: Path, n_trials: int, workers: int, outages: list[str]) -> None:
    """Run a study while the server suffers ``outages``, and expect it not to show."""
    store, study = begin(server, n_trials, base=slow_base(1200, 0.05))
    pool = supervisor_of(store, study, folder, workers, heartbeat=1)
    generator = random.Random(3)
    waiting = list(outages)
    next_one = 0.0
    for snapshot in pool.run(interval=0.1):
        if snapshot.tally.running >= 1 and waiting and time.monotonic() > next_one:
            if waiting.pop() == "cut":
                server.execute(CUT)
            else:
                server.restart(lambda: time.sleep(1.0))
            next_one = time.monotonic() + 0.3 + generator.random()
    assert waiting == []
    counts = counting.tally(study.get_trials())
    lost = [trial.user_attrs for trial in study.get_trials() if trial.state.name == "FAIL"]
    assert lost == []
    assert (counts.complete, counts.open, counts.fail, counts.retried) == (n_trials, 0, 0, 0)
    assert sum(view.restarts for view in snapshot.workers) == 0
    assert all(len(trial.intermediate_values) == 12 for trial in study.get_trials())
    same_curves(store, study)
    store.close()


@pytest.mark.system
def test_a_restart_and_cut_connections_do_not_show(own_server: Postgres, tmp_path: Path) -> None:
    run_through(own_server, tmp_path, 7, 2, ["cut", "restart", "cut"])


@pytest.mark.slow
def test_many_outages_do_not_show(own_server: Postgres, tmp_path: Path) -> None:
    run_through(own_server, tmp_path, 40, 4, ["cut", "cut", "restart"] * 5)


def test_a_server_that_stays_away_is_one_line(own_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    store, study = begin(own_server, 1)
    monkeypatch.setattr(retry, "RETRY_S", 0.5)
    own_server.server.stop()
    with pytest.raises(StoreError, match="has not answered for 0 s") as caught:
        store.claim(id_of(store, study), "here:1:0:0")
    assert "\n" not in str(caught.value)
    store.close()
