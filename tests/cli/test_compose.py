"""What docker-compose.yml starts, as plain processes against a real PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from ris_hpo.store.open import open_store
from tests.postgres import Postgres
from tests.service.conftest import IMPORTABLE
from tests.waiting import until

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

PAUSED = """
[study]
program = "double:PROGRAM"
worst = 7.0
[base]
budget = { scenes = 800, validate_every = 100 }
pause_s = 0.05
[space]
"shape.x" = { low = 0.0, high = 1.0 }
"""

pytestmark = pytest.mark.postgres


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The address of an empty database, as compose writes it."""
    return postgres.url().replace("+psycopg", "")


def command_of(service: str, chosen: dict[str, str]) -> list[str]:
    """The service's command line with compose's variables filled in."""

    def filled(match: re.Match[str]) -> str:
        return chosen.get(match.group(1), match.group(2))

    words = [re.sub(r"\$\{(\w+):-(.*?)\}", filled, word) for word in SERVICES[service]["command"]]
    return [sys.executable, "-m", "ris_hpo", *words]


def environment_of(service: str, database: str, folder: Path) -> dict[str, str]:
    """The names that compose sets, with this test's values."""
    named = SERVICES[service]["environment"]
    values = {"RIS_HPO_STORAGE_URL": database, "RIS_HPO_STORAGE_PASSWORD": "unused over a socket"}
    values |= {"RIS_HPO_DASHBOARD_TOKEN": "token-of-the-compose-test"}
    assert set(named) <= set(values)
    return {**os.environ, **{name: values[name] for name in named}, "RIS_HPO_STORAGE_DIR": str(folder)}


def test_what_finishes_is_not_started_again() -> None:
    restarts = {service["command"][0]: service["restart"] for service in SERVICES.values() if "command" in service}
    assert restarts == {"run": "on-failure:3", "dashboard": "unless-stopped"}


@pytest.mark.system
def test_two_workers_share_a_study_exactly(database: str, tmp_path: Path) -> None:
    (tmp_path / "paused.toml").write_text(PAUSED)
    space = {"SPACE": str(tmp_path / "paused.toml"), "TRIALS": "5"}
    command = [*command_of("worker", space), "--gpus", "none", "--json"]
    environment = environment_of("worker", database, tmp_path) | {"PYTHONPATH": IMPORTABLE}
    pair = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=240) for process in pair]
    for process, (out, err) in zip(pair, ends, strict=True):
        assert process.returncode == 0, err
        trials = json.loads(out)["trials"]
        assert trials["complete"] + trials["pruned"] + trials["fail"] == 5
        assert trials["running"] == trials["waiting"] == 0


@pytest.mark.system
def test_the_dashboard_is_healthy_and_wants_its_token(database: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [word.replace("8080", str(port)) for word in command_of("dashboard", {})]
    check = SERVICES["dashboard"]["healthcheck"]["test"]
    assert check[:3] == ["CMD", "python", "-c"]
    environment = environment_of("dashboard", database, tmp_path)
    open_store(database).close()  # as the first worker makes it; until then the dashboard refuses and is started again
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            healthy = [sys.executable, "-c", check[3].replace("8080", str(port))]

            def is_healthy() -> bool:
                assert server.poll() is None
                return subprocess.run(healthy, capture_output=True, check=False).returncode == 0

            until(is_healthy, "healthy dashboard")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/dashboard", timeout=10)
            refused.value.close()
            assert refused.value.code == 401
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=90)
        finally:
            server.kill()
