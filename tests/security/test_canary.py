"""A password planted in the store's address is found nowhere: not in what is printed, logged, stored, served or run."""

from __future__ import annotations

import gc
import http.client
import logging
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy

from ris_hpo.cli import execute, live
from ris_hpo.dashboard.server import Dashboard
from ris_hpo.errors import StoreError, StudyError, WorkerError
from ris_hpo.store import credentials
from ris_hpo.store.open import URL_VARIABLE, open_store
from ris_hpo.store.retry import reason
from ris_hpo.workers.supervisor import PoolSnapshot
from tests.postgres import Postgres

CANARY = "cAnArY5e9f2"
PASSWORD = f"{CANARY}/@: ?&{CANARY}%"
TOKEN = "token-of-the-canary-test"

STUDY = """
[base]
budget = { scenes = 64, validate_every = 32, validation_scenes = 16, pipeline_scenes = 4 }
network = { width = 8, depth = 1, heads = 2, head_width = 16, residual_passes = 0 }
optimizer.batch_size = 16
[space]
"optimizer.learning_rate" = { low = 1e-4, high = 2e-2, log = true }
"""
BROKEN = """
[study]
kind = "inference"
[base]
checkpoint = "nowhere"
[space]
"inference.likelihood.search.final_steps" = { low = 2, high = 20 }
"""


@pytest.fixture
def address(postgres: Postgres) -> str:
    """A fresh database with the canary as its password; the server trusts whoever reaches its socket."""
    return sqlalchemy.make_url(postgres.url()).set(password=PASSWORD).render_as_string(hide_password=False)


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[list[str]]:
    """Everything that was printed, logged, or stood on a command line of a worker."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    heard: list[str] = []
    follow = live.follow

    def watched(snapshots: Iterator[PoolSnapshot]) -> None:
        def each() -> Iterator[PoolSnapshot]:
            for snapshot in snapshots:
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        heard.append(" ".join(child.cmdline()))
                yield snapshot

        follow(each())

    monkeypatch.setattr(live, "follow", watched)
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield heard
    root.handlers[:] = handlers
    logging.captureWarnings(False)
    heard += [*capfd.readouterr(), caplog.text]
    assert any("ris_hpo.workers.worker" in line for line in heard)
    assert [line[:300] for line in heard if CANARY in line] == []


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ris-hpo", *words])
    return execute(words)


@pytest.mark.system
@pytest.mark.postgres
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_password_is_found_nowhere(
    address: str, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "brief.toml").write_text(STUDY)
    (tmp_path / "broken.toml").write_text(BROKEN)
    place, few = ("--storage", address), ("--gpus", "none", "--no-proof", "--n-trials", "1")
    assert command(monkeypatch, "--verbose", "run", "--space", "brief.toml", *place, *few) == 0
    monkeypatch.setenv(URL_VARIABLE, address)
    # its trial fails, with a traceback
    assert command(monkeypatch, "run", "--space", "broken.toml", *few, "--set", "seed=1") == WorkerError.exit_code
    for words in (
        ("status",), ("doctor",), ("best", "--no-confirm"), ("report", "--out", "report.html"),
        ("report", "--out", "report.json"), ("export", "--out", "best.toml"), ("status", "--json"),
    ):  # fmt: skip
        study = () if words == ("doctor",) else ("--study", "brief")
        assert command(monkeypatch, *words, *study) in (0, 1)
    assert command(monkeypatch, "status", "--study", "none") == StudyError.exit_code
    away = urllib.parse.quote(PASSWORD, safe="")
    for wrong in (
        f"postgresql://me:{away}@127.0.0.1:9/none",
        f"mysql://me:{PASSWORD}@h/d",
        f"postgresql://me:{PASSWORD}",
    ):
        assert command(monkeypatch, "status", "--storage", wrong) == StoreError.exit_code
    said += served(address, tmp_path)
    said += stored(address)
    said += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".log" for path in tmp_path.rglob("*")) >= 2  # workers' own
    gc.collect()  # a command leaves its connections to the end of its process


def stored(address: str) -> list[str]:
    """Every row of every table."""
    engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        tables = sqlalchemy.inspect(engine).get_table_names()
        rows = [str(tuple(row)) for name in tables for row in connection.exec_driver_sql(f'SELECT * FROM "{name}"')]
    assert any("Traceback" in row for row in rows)
    assert any("--storage" in row and "***" in row for row in rows)  # the command, redacted
    return rows


def served(address: str, folder: Path) -> list[str]:
    """What the dashboard answers."""
    store = open_store(address)
    pages = []
    with Dashboard(store, folder / "storage" / "artifacts", token=TOKEN, port=0) as dashboard:
        thread = threading.Thread(target=dashboard.run)
        thread.start()
        host = urllib.parse.urlsplit(dashboard.url).netloc
        for path in ("/dashboard", "/api/studies", "/api/studies/1", "/api/studies/2", "/csv/1", "/api/meta"):
            connection = http.client.HTTPConnection(host, timeout=30)
            connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
            pages.append(connection.getresponse().read().decode())
            connection.close()
    thread.join(60)
    store.close()
    assert "brief" in pages[1]
    return pages


@pytest.mark.parametrize("password", [CANARY, PASSWORD, f"{CANARY} with spaces", f"@{CANARY}", f"{CANARY}\tx@y"])
def test_redaction_leaves_nothing_of_it(password: str) -> None:
    for text in (
        f"postgresql://me:{password}@host/db", f"see postgresql+psycopg://me:{password}@host:5432/db?x=1 now",
        f"ris-hpo run --storage 'postgresql://me:{password}@host/db' --set a=b", f"postgresql:/me:{password}@host/db",
    ):  # fmt: skip
        assert CANARY not in credentials.redact(text)
    error = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception(f"no postgresql://me:{password}@host/db"))
    assert CANARY not in reason(error)
