"""A study from the command line: to the end, interrupted, resumed, refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ris_hpo.errors import ConfigError, DeviceError, ProofError, SpaceError, StoreError, StudyError
from ris_hpo.search.counting import Tally
from ris_hpo.workers.supervisor import PoolSnapshot, Supervisor
from tests.service.conftest import IMPORTABLE
from tests.waiting import until

STUDY = """
[study]
description = "Seconds in all"

[base]
budget.scenes = 64
budget.validate_every = 32
budget.validation_scenes = 16
budget.pipeline_scenes = 4
network.width = 8
network.depth = 1
network.heads = 2
network.head_width = 16
network.residual_passes = 0
network.cell_width = 0
optimizer.batch_size = 16

[space]
"optimizer.learning_rate" = { low = 1e-4, high = 2e-2, log = true }
"""

PAUSED = """
[study]
program = "double:PROGRAM"
worst = 7.0
[base]
budget = { scenes = 2000, validate_every = 100 }
pause_s = 0.05
[space]
"shape.x" = { low = 0.0, high = 1.0 }
"""


@pytest.fixture
def brief(cli, tmp_path: Path) -> Path:
    path = tmp_path / "brief.toml"
    path.write_text(STUDY)
    return path


def test_a_run_ends_with_its_table_and_adds_nothing_when_repeated(cli, brief: Path, tmp_path: Path) -> None:
    first = cli("run", "--space", brief, "--n-trials", 1, "--gpus", "none", "--no-proof")
    assert first.code == 0, first.err
    assert "study 'brief'" in first.out
    assert "| floor " in first.out
    assert "1 trials, 1 to add" in first.err
    assert "next: ris-hpo best --study brief" in first.err
    again = cli("run", "--space", brief, "--n-trials", 1, "--gpus", "none", "--no-proof", "--json")
    assert again.code == 0, again.err
    assert "1 trials, 0 to add" in again.err
    trials = again.json["trials"]
    assert trials["complete"] + trials["pruned"] + trials["fail"] == 1
    assert trials["running"] == trials["waiting"] == 0

    compared = cli("replay", 0, "--study", "brief", "--json")
    assert compared.code == 0, compared.out
    assert compared.json["identical"]
    assert cli("replay", 99, "--study", "brief").code == StudyError.exit_code

    written = cli("export", "--study", "brief", "--out", "best.toml", "--json")
    assert written.json["config_fingerprint"]
    again = cli("train", "--config", "best.toml", "--out", "again", "--replay", "--json")
    assert again.code == 0, again.err
    assert again.json["identical"]
    assert cli("train", "--config", "best.toml", "--out", "x", "--replay", "--curriculum").code == 2
    assert cli("export", "--study", "brief", "--trial", 99, "--out", "none.toml").code == StudyError.exit_code
    assert not (tmp_path / "none.toml").exists()

    brief.write_text(STUDY.replace("high = 2e-2", "high = 1e-2"))
    other = cli("run", "--space", brief, "--n-trials", 1, "--gpus", "none", "--no-proof")
    assert other.code == SpaceError.exit_code
    assert "add --fork brief-2" in other.err


def test_a_run_stands_on_a_proof_or_says_that_it_does_not(
    cli, brief: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ris_hpo.search import lifecycle as study
    from ris_hpo.store import attributes
    from ris_hpo.store import open as store
    from ris_hpo.training import proof

    def refused(*_: object, **__: object) -> None:
        raise ProofError("NMSE 0.9 after 400 epochs, expected <= 0.1")

    def ended(self: Supervisor) -> Iterator[PoolSnapshot]:
        self.ending = "finished"
        yield PoolSnapshot("brief", 1, Tally(), None, [], 0.0, [])

    monkeypatch.setattr(proof, "prove", refused)
    monkeypatch.setattr(Supervisor, "run", ended)
    outcome = cli("run", "--space", brief, "--n-trials", 1, "--gpus", "none")
    assert outcome.code == ProofError.exit_code
    assert "expected <= 0.1" in outcome.err
    assert cli("status").code != 0  # no study was made
    assert cli("run", "--space", brief, "--n-trials", 1, "--gpus", "none", "--no-proof").code == 0
    opened = store.open_store(create=False)
    assert study.get_study(opened, "brief").user_attrs[attributes.PROOF] == "no-proof"
    opened.close()


@pytest.mark.system
def test_a_worker_joins_a_study_and_leaves_when_nothing_is_left(cli, brief: Path) -> None:
    from ris_hpo.search.files import load_study
    from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
    from ris_hpo.store.open import open_store

    store = open_store()
    fill_budget(store, create_or_resume_study(store, load_study(brief)), 1)
    store.close()
    outcome = cli("worker", "--study", "brief", "--threads", 1, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json == {"study": "brief", "ended": 1, "reason": "finished"}
    assert "1 of 1 trials (1 complete, 0 pruned, 0 failed)" in outcome.err
    assert cli("status", "--json").json["trials"]["complete"] == 1
    assert cli("worker", "--study", "breif").code == StudyError.exit_code


def test_ctrl_c_leaves_a_study_that_the_same_command_finishes(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paused.toml").write_text(PAUSED)
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    command = ["run", "--space", "paused.toml", "--n-trials", "1", "--gpus", "none"]
    written = tmp_path / "written"
    with (
        written.open("w") as stream,
        subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "ris_hpo", *command], stdout=subprocess.DEVNULL, stderr=stream
        ) as running,
    ):
        checkpoint = tmp_path / "storage" / "trials" / "paused" / "0" / "checkpoint.json"
        until(lambda: running.poll() is not None or checkpoint.exists(), "checkpoint")
        running.send_signal(signal.SIGINT)
        running.wait(timeout=60)
    said = written.read_text()
    assert running.returncode == 130, said
    assert " optuna\n" in said
    assert " torch\n" not in said  # which this program does not need
    assert "the same command goes on" in said
    assert cli("status", "--json").json["trials"]["waiting"] == 1
    done = cli(*command)
    assert done.code == 0, done.err
    trials = cli("status", "--json").json["trials"]
    assert (trials["complete"], trials["waiting"], trials["running"]) == (1, 0, 0)


def test_devices_and_engines_are_checked_before_a_study_is_made(cli, brief: Path, tmp_path: Path) -> None:
    assert cli("run", "--space", brief, "--gpus", "97").code == DeviceError.exit_code
    assert cli("run", "--space", brief, "--engine", "ray").code == 2
    counted = cli("run", "--space", brief, "--engine", "ray", "--gpus", "0,1")
    assert counted.code == 2
    assert "with --engine ray leave it out" in counted.err
    assert cli("run", "--space", brief, "--sampler", "tp").code == ConfigError.exit_code
    unknown = cli("run", "--space", brief, "--set", "budgt.scenes=3")
    assert unknown.code == SpaceError.exit_code
    assert "did you mean 'budget.scenes'?" in unknown.err
    mistyped = cli("run", "--study", "breif", "--gpus", "none")
    assert mistyped.code in (StoreError.exit_code, StudyError.exit_code)
    assert cli("status").code in (StoreError.exit_code, StudyError.exit_code)  # no study came of any of these


def test_a_study_that_is_not_there_is_not_made_of_the_default_space(cli, made_study: str) -> None:
    refused = cli("run", "--study", "maid", "--gpus", "none")
    assert refused.code == StudyError.exit_code
    assert refused.err.splitlines()[-1].endswith("to make it, name its --space")
    assert [each["study"] for each in cli("studies", "--json").json] == [made_study]


@pytest.mark.parametrize(
    "address",
    ["sqlite:////proc/studies.db", "sqlite:////dev/null/studies.db", "postgresql://nobody:canary@127.0.0.1:9/none"],
)
def test_a_store_that_cannot_be_used_stops_a_run_before_it_begins(
    cli, brief: Path, tmp_path: Path, address: str
) -> None:
    outcome = cli("run", "--space", brief, "--n-trials", 1, "--storage", address)
    assert outcome.code == StoreError.exit_code
    assert outcome.err.count("\n") == 1
    assert "canary" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["brief.toml"]
