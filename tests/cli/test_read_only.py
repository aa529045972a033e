"""Every view of a store that may only be read: a file, and a PostgreSQL role with SELECT and nothing else."""

from __future__ import annotations

import gc
import http.client
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from ris_hpo.dashboard.server import Dashboard
from ris_hpo.errors import StoreError
from ris_hpo.process import STORAGE_VARIABLE
from ris_hpo.store.open import open_store
from tests.postgres import Postgres

# a command leaves its connections to the end of its process
pytestmark = pytest.mark.filterwarnings("ignore:.*deleted while still open:ResourceWarning")
TOKEN = "correct-horse-battery"
VIEWS = (
    ("studies",), ("status",), ("status", "--json"), ("trials",), ("trials", "--csv", "trials.csv"), ("log", "3"),
    ("best", "--no-confirm"), ("report", "--json"), ("report", "--out", "report.html"),
    ("export", "--out", "best.toml"), ("compare", "made", "made", "--as-searched"), ("delete", "made", "--dry-run"),
)  # fmt: skip


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def address(request, cli, made_study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of one study that this process may read, and a storage folder that cannot even be made."""
    file = tmp_path / "storage" / "studies.db"
    if request.param == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        owner = postgres.url()
        assert cli("copy", made_study, "--to", owner).code == 0
        role = f"reader_{sqlalchemy.make_url(owner).database}"
        postgres.execute(f"CREATE ROLE {role} LOGIN")
        engine = sqlalchemy.create_engine(owner, poolclass=sqlalchemy.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        address = sqlalchemy.make_url(owner).set(username=role).render_as_string(hide_password=False)
    else:
        # as for a user who may only read; root may write whatever the mode is
        places, allowed = (file, file.parent), os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: mode == os.R_OK if Path(path) in places else allowed(path, mode)
        )
        address = str(file)
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv(STORAGE_VARIABLE, str(tmp_path / "no-folder" / "storage"))
    yield address
    gc.collect()


def test_every_view_needs_to_read_only(cli, address: str, tmp_path: Path) -> None:
    for command in VIEWS:
        outcome = cli(*command, "--storage", address)
        assert outcome.code == 0, (command, outcome.err)
    assert (tmp_path / "best.toml").exists()
    if address.startswith("postgresql"):  # of the file, root may remove what it likes
        refused = cli("delete", "made", "--yes", "--storage", address)
        assert refused.code == StoreError.exit_code
        assert "Traceback" not in refused.err


def test_the_dashboard_needs_to_read_only(address: str, tmp_path: Path) -> None:
    store = open_store(address, create=False, write=False)
    with Dashboard(store, tmp_path / "no-folder" / "artifacts", token=TOKEN, port=0) as dashboard:
        thread = threading.Thread(target=dashboard.run)
        thread.start()
        place = urllib.parse.urlsplit(dashboard.url)
        for path in ("/studies", "/studies/1", "/dashboard", "/api/studies", "/api/studies/1", "/csv/1"):
            connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
            connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            body = answer.read()
            connection.close()
            assert answer.status == 200, (path, body[:500])
            if path == "/api/studies/1":
                assert len(json.loads(body)["trials"]) == 5
        dashboard.close()
        thread.join(60)
    store.close()
