"""Known vulnerabilities of the pinned dependencies, where the audit's service can be asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pip_audit") is None, reason="pip-audit is not installed")
def test_no_pinned_dependency_is_known_to_be_vulnerable() -> None:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    done = subprocess.run(
        [*command, "--format", "json", "--progress-spinner", "off", "--timeout", "20"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if not done.stdout.strip().startswith("{"):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        pytest.skip(f"the audit's service cannot be asked: {last[:200]}")
    found = json.loads(done.stdout)["dependencies"]
    unknown = [each["skip_reason"] for each in found if "skip_reason" in each]
    if len(unknown) == len(found):
        pytest.skip(f"the audit's service knows none of {len(found)} dependencies: {unknown[0]}")
    vulnerable = {each["name"]: [flaw["id"] for flaw in each["vulns"]] for each in found if each.get("vulns")}
    assert vulnerable == {}
