"""What a command loads, seen from outside: a method that needs no network loads none, and no model command the service.

The commands run one after the other in one fresh process, each adding to what was loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import ris_hpo

SERVICE = ("search", "store", "trials", "workers", "report", "results", "dashboard")
LIBRARIES = ("optuna", "optuna_dashboard", "sqlalchemy", "ray", "matplotlib", "plotly", "jinja2", "waitress")
PROGRAM = """
import contextlib, io, json, sys
from ris_hpo.cli import execute

found = {}
for name, *arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        code = execute(arguments)
    found[name] = [code, sorted(sys.modules)]
print(json.dumps(found))
"""
TINY = [
    option
    for pair in (
        "width=16",
        "depth=1",
        "heads=2",
        "residual_passes=0",
        "grid.num_v=9",
        "grid.num_w=5",
        "grid.num_rho=2",
    )
    for option in ("--set", f"network.{pair}")
]
BUDGET = [
    option
    for pair in ("scenes=32", "validate_every=32", "validation_scenes=8", "pipeline_scenes=2")
    for option in ("--set", f"budget.{pair}")
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("imports")
    cells = ["--per-cell", "1", "--snr-db", "20", "--counts", "1"]
    commands = [
        ["evaluate an estimator", "evaluate", "--estimator", "ml", *cells],
        ["evaluate a network", "evaluate", "--weights", "default", *cells],
        ["train", "train", "--out", str(folder / "run"), *TINY, *BUDGET],
        ["prove", "prove", "--num-scenes", "16", "--epochs", "1", *TINY],
    ]
    environment = os.environ | {"RIS_HPO_STORAGE_DIR": str(folder / "storage")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def of(loaded: dict[str, list], command: str, package: str) -> list[str]:
    return [name for name in loaded[command][1] if name == package or name.startswith(f"{package}.")]


def test_the_commands_ran(loaded):
    codes = {name: code for name, (code, _) in loaded.items()}
    assert codes.pop("prove") == 11  # one epoch memorises nothing
    assert set(codes.values()) == {0}, codes
    assert of(loaded, "train", "ris_hpo.learning.losses")


def test_an_estimator_loads_no_network(loaded):
    assert of(loaded, "evaluate an estimator", "ris_hpo.estimators.maximum_likelihood")
    assert of(loaded, "evaluate an estimator", "ris_hpo.learning") == []
    assert of(loaded, "evaluate an estimator", "ris_hpo.training") == []


def test_a_network_is_evaluated_without_the_code_that_trains_it(loaded):
    assert of(loaded, "evaluate a network", "ris_hpo.learning.inference")
    assert of(loaded, "evaluate a network", "ris_hpo.training.trainer") == []


def test_model_commands_load_nothing_of_the_service(loaded):
    everything = loaded["prove"][1]  # the last of them
    service = [name for part in SERVICE for name in of(loaded, "prove", f"ris_hpo.{part}")]
    assert set(service) <= {"ris_hpo.store", "ris_hpo.store.credentials"}, service  # messages hide passwords
    assert not set(LIBRARIES) & set(everything)


def test_a_worker_loads_no_library_that_its_program_may_not_need():
    listed = "import sys, ris_hpo.workers.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert {"optuna", "sqlalchemy"} <= set(done.stdout.split())
    assert not {"torch", "scipy", "matplotlib", "ray", "rich"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ris_hpo.__all__)
def test_public_names_are_there(name):
    assert getattr(ris_hpo, name).__name__ == name
