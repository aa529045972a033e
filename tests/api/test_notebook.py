"""The notebook of the documentation runs from its first cell to its last, and shows what a run of it shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def shown(notebook: Any) -> list[list[str]]:
    """For each code cell, the kinds of output it has: text, or the richest form of an object."""
    return [
        [out.get("name") or ",".join(sorted(out["data"])) for out in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def spoken(notebook: Any) -> list[str]:
    """For each code cell, the text of its outputs."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.get("text", "") or out["data"]["text/plain"] for out in cell.outputs) for cell in cells]


@pytest.mark.system
@pytest.mark.filterwarnings("ignore")  # of the libraries that run a notebook
def test_the_notebook_runs_and_its_stored_output_is_what_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name in ("RIS_HPO_STORAGE_URL", "RIS_HPO_STORAGE_DIR"):
        monkeypatch.delenv(name, raising=False)
    run = nbformat.read(NOTEBOOK, as_version=4)
    for cell in run.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(run, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(run) == shown(stored)
    assert not any("stderr" in kinds for kinds in shown(run))
    texts = spoken(run)
    assert texts[:2] == spoken(stored)[:2]  # simulated scenes and their estimates, digit for digit
    assert "True" in texts
    assert {"report.html", "best.toml", "storage"} <= {path.name for path in tmp_path.iterdir()}
