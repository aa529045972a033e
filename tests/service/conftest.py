"""Stores to test on: SQLite files, and databases of a real PostgreSQL server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from ris_hpo.process import STORAGE_VARIABLE
from ris_hpo.programs.program import Program, load_program
from ris_hpo.search.files import parse_study
from ris_hpo.search.spec import StudySpec
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner, Process
from tests.postgres import Postgres

HERE = Path(__file__).parent
IMPORTABLE = os.pathsep.join([str(HERE), str(HERE.parents[1])])
"""``PYTHONPATH`` of worker processes: the double, and this very package, installed or not."""
DOUBLE = "double:PROGRAM"
sys.path.append(str(HERE))  # where the double is found


def study_tree(**changes: object) -> dict[str, object]:
    """Return the tables of a small study of the test double."""
    tree: dict[str, object] = {
        "study": {"seed": 7, "program": DOUBLE, "worst": 7.0},
        "base": {"budget": {"scenes": 800, "validate_every": 100}},
        "space": {
            "shape.x": {"low": 0.0, "high": 1.0},
            "shape.y": {"low": 1, "high": 9},
            "shape.kind": {"choices": ["plain", "fancy"]},
            "shape.depth": {"low": 1, "high": 4, "when": {"shape.kind": ["fancy"]}},
        },
        "sampler": {"name": "tpe", "startup": 5},
        "pruner": {"name": "asha"},
    }
    for key, value in changes.items():
        table = tree.get(key)
        tree[key] = {**table, **value} if isinstance(table, dict) and isinstance(value, dict) else value
    return tree


def elsewhere(pid: int = 1, claim: int = 0) -> Owner:
    """A claim by a process of another machine."""
    return Owner(Process("elsewhere", "another-boot", "1", pid, "0"), claim)


def make_spec(name: str = "unit", **changes: object) -> StudySpec:
    return parse_study(study_tree(**changes), name=name, source="test")


def id_of(store: Store, study: optuna.Study) -> int:
    return int(store.get_study_id_from_name(study.study_name))


@pytest.fixture(autouse=True)
def storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The storage directory, for what is not given a folder."""
    monkeypatch.setenv(STORAGE_VARIABLE, str(tmp_path / "storage"))
    return tmp_path / "storage"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty store, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'studies.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = open_store(url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'studies.db'}")
    yield opened
    opened.close()


@pytest.fixture
def program() -> Program:
    return load_program(DOUBLE)
