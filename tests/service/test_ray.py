"""The Ray engine on a real cluster: exact budgets, a lost node and a bad one, clocks, the password, declared GPUs."""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from ris_hpo.errors import StoreError, WorkerError
from ris_hpo.programs.program import source
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import PASSWORD_VARIABLE
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner
from ris_hpo.workers.ray import RayActors
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import job_for
from tests.postgres import Postgres
from tests.programs.test_examples import EXAMPLES, small_study

from .conftest import IMPORTABLE, make_spec
from .pools import kill_and_resume, same_curves, slow_base

CANARY = "cAnArY81d3"

pytestmark = [
    pytest.mark.system,
    pytest.mark.postgres,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


class RayCluster:
    """A head without work and nodes that can be taken away; GPUs are declared, not there."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, **options: Any) -> Any:
        return self.cluster.add_node(**options)

    def remove(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    import ray

    made = RayCluster()
    made.add(num_cpus=2, num_gpus=1)
    yield made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.shutdown()
        made.cluster.shutdown()


def begin(store: Store, n_trials: int, **changes: Any) -> Any:
    study = create_or_resume_study(store, make_spec("cloud", **changes), score_version=1)
    fill_budget(store, study, n_trials)
    return study


def supervisor_of(
    store: Store,
    study: Any,
    cluster: RayCluster,
    folder: Path,
    *,
    heartbeat: int = 10,
    stall_timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Supervisor:
    options.setdefault("device", "cpu")  # GPUs are declared, not there
    variables = {"PYTHONPATH": IMPORTABLE, **(environment or {})}
    actors = RayActors(store, address=cluster.address, environment=variables, **options)
    job = job_for(store, study, directory=folder / "trials", heartbeat=heartbeat)
    return Supervisor(store, study, actors, job, stall_timeout_s=stall_timeout_s)


def test_sqlite_is_refused(sqlite_store: Store) -> None:
    with pytest.raises(StoreError, match="needs a store that every node reaches"):
        RayActors(sqlite_store, workers=1)


def test_no_cluster_is_one_line(postgres: Postgres) -> None:
    store = open_store(postgres.url())
    study = begin(store, 1)
    actors = RayActors(store, workers=1, address="127.0.0.1:1")
    with pytest.raises(WorkerError, match=r"no Ray cluster at '127.0.0.1:1'"):
        list(Supervisor(store, study, actors, job_for(store, study)).run())
    store.close()


def test_a_small_cluster_runs_the_exact_budget(postgres: Postgres, cluster: RayCluster, tmp_path: Path) -> None:
    store = open_store(postgres.url())
    study = begin(store, 9, base=slow_base(800, 0.01))
    pool = supervisor_of(store, study, cluster, tmp_path, per_gpu=2, cpus_per_worker=0.5)
    last = list(pool.run(interval=0.2))[-1]
    assert pool.ending == "finished"
    assert len(last.workers) == 2  # the slots of the one GPU
    assert (last.tally.ended, last.tally.open, last.tally.retried) == (9, 0, 0)
    owners = [Owner.parse(trial.user_attrs[names.OWNER]) for trial in study.get_trials()]
    assert 1 <= len({owner.process for owner in owners if owner is not None}) <= 2
    assert None not in owners
    same_curves(store, study)
    store.close()


@pytest.fixture
def guarded() -> Iterator[Postgres]:
    """A server that lets nobody in without the password."""
    with tempfile.TemporaryDirectory(prefix="ris", dir="/tmp") as folder:
        server = Postgres(Path(folder))
        server.execute(f"ALTER USER postgres PASSWORD '{CANARY}'")
        (Path(folder) / "pg" / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        server.execute("SELECT pg_reload_conf()")
        yield server
        server.close()


def test_clocks_are_kept_and_the_password_reaches_the_actors_and_no_log(
    guarded: Postgres, cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = guarded.uri.replace("postgres:@", "postgres@")
    with pytest.raises(StoreError, match="no password supplied"):
        open_store(url)
    monkeypatch.setenv(PASSWORD_VARIABLE, CANARY)  # of this process, and not of the nodes, which run by now
    store = open_store(url)
    study = begin(store, 1, base={"fault": "hang"}, pruner={"name": "none"}, retries={"timeout": 3})
    supervisor = supervisor_of(store, study, cluster, tmp_path, workers=1, stall_timeout_s=2.0)
    snapshots = list(supervisor.run(interval=0.2))
    assert (snapshots[-1].tally.complete, snapshots[-1].tally.open) == (1, 0)
    (failed,) = study.get_trials(states=[TrialState.FAIL])  # it hung, was killed, and went on from its checkpoint
    assert failed.user_attrs[names.CAUSE] == Cause.TIMEOUT
    monkeypatch.setenv("DOUBLE_STEADY", "1")
    same_curves(store, study)
    store.close()
    assert CANARY not in repr(snapshots)
    logs = [path for path in Path("/tmp/ray/session_latest/").resolve().rglob("*") if path.is_file()]
    assert any("runtime_env" in path.name for path in logs)
    assert [path for path in logs if CANARY.encode() in path.read_bytes()] == []


def test_one_nodes_full_disk_does_not_end_the_run(
    postgres: Postgres, cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = cluster.add(num_cpus=1, env_vars={"DOUBLE_FULL_DISK": "1"})
    store = open_store(postgres.url())
    study = begin(store, 8, base={"fault": "gate"}, pruner={"name": "none"})
    gate = tmp_path / "gate"  # the good node waits there for the bad one
    supervisor = supervisor_of(
        store, study, cluster, tmp_path, gpus=False, workers=3, environment={"DOUBLE_GATE": str(gate)}
    )
    failed = 0
    for snapshot in supervisor.run(interval=0.1):
        failed += sum("No space left" in message for message in snapshot.messages)
        if failed >= 2:
            gate.touch()
    cluster.remove(node)
    monkeypatch.setenv("DOUBLE_GATE", str(gate))  # for the replay
    assert (snapshot.tally.complete, snapshot.tally.open, snapshot.tally.fail) == (8, 0, 0)
    assert snapshot.tally.retried == 0  # put back, which costs no retry
    same_curves(store, study)
    store.close()


@pytest.mark.slow
def test_the_example_goes_to_the_nodes_and_loses_nothing(
    postgres: Postgres, cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES / "own_trainer")  # where only this process finds the program
    store = open_store(postgres.url())
    study = small_study(store, 4)

    def start(workers: int) -> Supervisor:
        program = source("spirals:train")
        return supervisor_of(
            store, study, cluster, tmp_path, gpus=False, workers=workers, cpus_per_worker=0.5, program=program
        )

    kill_and_resume(store, study, start, workers=2)
    store.close()


@pytest.mark.slow
def test_the_budget_is_exact_again_and_again(postgres: Postgres, cluster: RayCluster, tmp_path: Path) -> None:
    node = cluster.add(num_cpus=8)
    for workers in (1, 4, 8):
        for repetition in range(3):
            store = open_store(postgres.url())
            study = begin(store, 25, study={"seed": repetition})
            for _ in range(2):
                folder = tmp_path / f"{workers}-{repetition}"
                last = list(supervisor_of(store, study, cluster, folder, workers=workers).run(interval=0.2))[-1]
                assert (last.tally.ended, last.tally.open, len(study.get_trials())) == (25, 0, 25)
            store.close()
    cluster.remove(node)


@pytest.mark.slow
def test_a_removed_node_loses_nothing(postgres: Postgres, cluster: RayCluster, tmp_path: Path) -> None:
    node = cluster.add(num_cpus=2, num_gpus=1)
    store = open_store(postgres.url(), heartbeat=1)
    study = begin(store, 20, base=slow_base(1600, 0.1), pruner={"name": "none"})
    pool = supervisor_of(store, study, cluster, tmp_path, workers=4, per_gpu=2, cpus_per_worker=0.5, heartbeat=1)
    removed = False
    for snapshot in pool.run(interval=0.3):
        if not removed and snapshot.tally.running == 4 and snapshot.tally.ended >= 2:
            cluster.remove(node)
            removed = True
            time.sleep(0.1)
    assert removed
    trials = study.get_trials()
    counts = counting.tally(trials)
    assert (counts.complete, counts.open, counts.fail) == (20, 0, 0)
    lost = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert lost
    assert {trial.user_attrs[names.CAUSE] for trial in lost} == {Cause.LOST_WORKER}
    same_curves(store, study)
    store.close()
