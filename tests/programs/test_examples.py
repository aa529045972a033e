"""The examples are short, and their studies lose nothing: a worker is killed, the run is stopped and goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.study import Study

from ris_hpo.search.files import load_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.workers.supervisor import Supervisor
from tests.cli.conftest import Cli, cli
from tests.cli.test_readme import commands
from tests.service.pools import kill_and_resume, supervisor_of

__all__ = ["cli"]

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = {"own_trainer": "spirals", "sklearn": "digits"}


@pytest.mark.parametrize("folder", PROGRAMS)
def test_an_example_is_short(folder: str) -> None:
    written = (EXAMPLES / folder / f"{PROGRAMS[folder]}.py").read_text().splitlines()
    assert written[0].startswith('"""')
    assert len(written) <= 45
    assert not any("ris_hpo" in line or "scene" in line for line in written)  # of the package it needs nothing


def small_study(store: Store, n_trials: int) -> Study:
    """The study of two spirals with short trials, none of which is pruned."""
    spec = load_study(EXAMPLES / "own_trainer" / "spirals.toml")
    study = create_or_resume_study(store, spec.with_base({"epochs": 5}).replaced({"pruner.name": "none"}))
    fill_budget(store, study, n_trials)
    return study


# on PostgreSQL it also runs with Ray, in tests/service/test_ray.py
@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.slow])])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.chdir(EXAMPLES / "own_trainer")  # where the program is found, here and by the workers
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path / "storage"))
    url = f"sqlite:///{tmp_path}/studies.db"
    opened = open_store(url if request.param == "sqlite" else request.getfixturevalue("postgres").url())
    yield opened
    opened.close()


@pytest.mark.system
def test_own_trainer_under_a_kill_and_a_stop(store: Store, tmp_path: Path) -> None:
    study = small_study(store, 6)

    def start(workers: int) -> Supervisor:
        return supervisor_of(store, study, tmp_path, workers)

    kill_and_resume(store, study, start)


def test_scikit_learn_as_its_file_says(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES / "sklearn")
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path / "storage"))
    ended = cli("run", "--space", "digits.toml", "--n-trials", 2, "--set", "rounds=6", "--gpus", "none", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["metric"] == "log_loss"
    assert ended.json["trials"]["complete"] + ended.json["trials"]["pruned"] == 2
    again = cli("replay", 1, "--study", "digits", "--json")
    assert again.json["identical"]
    assert [step["step"] for step in again.json["steps"]] == [2, 4, 6]


@pytest.mark.system
def test_the_how_to_page_runs_as_printed(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (EXAMPLES.parent / "docs" / "how-to" / "own-trainer.md").read_text()
    enter, *lines = commands(page)
    assert enter == "cd examples/own_trainer"
    monkeypatch.chdir(shutil.copytree(EXAMPLES / "own_trainer", tmp_path / "own_trainer"))
    monkeypatch.delitem(sys.modules, "spirals", raising=False)
    for line in lines:
        outcome = cli(*shlex.split(line)[1:])
        assert outcome.code == 0, f"{line}\n{outcome.err}"
    assert {"spirals.py", "spirals.toml", "storage", "report.html", "best.toml"} <= set(os.listdir())
