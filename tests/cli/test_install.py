"""ris-hpo works where only its wheel is installed, in a folder that holds nothing; ``init`` copies a study to edit."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ris_hpo.search.files import study_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, to be put before everything else on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def ris_hpo(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RIS_HPO_")}
    environment["PYTHONPATH"] = str(installed)
    done = subprocess.run(
        [sys.executable, "-m", "ris_hpo", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_is_not_code(installed: Path) -> None:
    held = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files", "ris_hpo"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:
        assert set(tracked.stdout.split()) <= held
    assert {f"ris_hpo/studies/{path.name}" for path in (ROOT / "studies").glob("*.toml")} <= held


@pytest.mark.system
def test_a_study_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = ris_hpo(installed, tmp_path, "init", "smoke", "--out", "mine.toml").strip()
    assert (tmp_path / where).read_text() == study_file("smoke").read_text()
    said = ris_hpo(
        installed, tmp_path, "run", "--space", "smoke", "--n-trials", "1", "--no-proof", "--gpus", "none", "--json"
    )
    assert '"complete": 1' in said
    assert {path.name for path in tmp_path.iterdir()} == {"mine.toml", "storage"}


def test_init_overwrites_nothing_and_knows_its_names(cli, tmp_path: Path) -> None:
    assert cli("init", "smoke").out == "studies/my-smoke.toml\n"
    again = cli("init", "smoke")
    assert (again.code, "is there already" in again.err) == (15, True)
    unknown = cli("init", "smok")
    assert (unknown.code, "did you mean 'smoke'" in unknown.err) == (4, True)
    missing = cli("init", "none.toml")
    assert (missing.code, "no such file" in missing.err) == (3, True)
