"""Containers without privileges: what compose grants them, and who they run as."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"} & set(service)
    assert "no-new-privileges:true" in service["security_opt"]
    for volume in service.get("volumes", []):
        assert not volume.startswith(("/", ".", "~")), f"{volume}: a folder of the host"
    if "build" in service:
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]


def test_the_image_runs_as_a_user_of_its_own_and_holds_no_secret() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1] not in ("root", "0")
    assert not [line for line in lines if re.search(r"(?i)password|secret|token", line)]
