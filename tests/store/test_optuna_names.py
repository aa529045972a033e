"""What the package knows of Optuna beyond its documented interface: one module, and a schema of one revision."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.study import StudySummary

import ris_hpo
from ris_hpo.store import database
from ris_hpo.store.cache import Store

PACKAGE = Path(ris_hpo.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAD = Path(database.__file__)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def private_names_of(kind: type) -> set[str]:
    """Private methods and attributes of a class and its bases, as far as they are Optuna's."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] == "optuna":
            found |= {name for name in vars(base) if is_private(name)}
            found |= set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(base)))
    return found


@functools.cache
def of_optunas_objects() -> set[str]:
    kinds = (optuna.Study, optuna.Trial, optuna.trial.FrozenTrial, StudySummary, optuna.storages.RDBStorage)
    return set.union(*(private_names_of(kind) for kind in kinds)) | {"_CachedStorage", "_study_id"}


def uses(path: Path) -> Iterator[str]:
    """Private names of Optuna in one module: imports, attributes of its objects, and what a subclass shares with it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    theirs = of_optunas_objects()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"import of {part}" for part in parts if is_private(part))
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and node.attr in theirs:
                yield f"line {node.lineno}: .{node.attr}"
    dotted = ".".join(("ris_hpo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    module = importlib.import_module(dotted)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (kind := vars(module).get(node.name)) is not None:
            mine: set[str] = set()
            for each in ast.walk(node):
                if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self":
                    mine.add(each.attr)
                if isinstance(each, ast.FunctionDef):
                    mine.add(each.name)
            yield from (f"{node.name}.{name}" for name in sorted(mine & private_names_of(kind)))


def test_no_private_name_of_optuna() -> None:
    found = {str(path.relative_to(PACKAGE)): list(uses(path)) for path in MODULES if path.name != "__main__.py"}
    assert {name: used for name, used in found.items() if used} == {}


def test_the_search_finds_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
    from optuna.storages import RDBStorage
    from optuna.storages._rdb import models
    from optuna.samplers import QMCSampler

    class Mine(QMCSampler):
        def _find_sample_id(self, study, space):
            return self._seed

    def number(study, trial):
        return study._study_id, trial._cached_frozen_trial, study._storage
    """
    package = tmp_path / "ris_hpo_names"
    package.mkdir()
    path = package / "names.py"
    path.write_text(inspect.cleandoc(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("tests.store.test_optuna_names.PACKAGE", package)
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: real(name.replace("ris_hpo.", "ris_hpo_names.")))
    assert list(uses(path)) == [
        "import of _rdb",
        "line 10: ._study_id",
        "line 10: ._cached_frozen_trial",
        "line 10: ._storage",
        "Mine._find_sample_id",
        "Mine._seed",
    ]


def test_undocumented_attributes_stand_in_one_module() -> None:
    outside = [
        path.relative_to(PACKAGE)
        for path in MODULES
        if path != HEAD and re.search(r"scoped_session|\.engine\b|sqlalchemy\.table\b", path.read_text())
    ]
    assert outside == []
    for name in ("engine", "scoped_session", "SCHEMA"):
        assert f"{name}``" in str(database.__doc__)


def test_the_schema_is_the_one_that_was_read(sqlite_store: Store) -> None:
    assert sqlite_store.tickets.get_head_version() == database.SCHEMA
    tables: list[Any] = [value for value in vars(database).values() if isinstance(value, sqlalchemy.TableClause)]
    assert len(tables) >= 9
    inspector = sqlalchemy.inspect(sqlite_store.tickets.engine)
    for table in tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        assert {column.name for column in table.columns} <= there


def test_optuna_is_held_to_the_version_that_was_read() -> None:
    assert version("optuna").startswith(f"{database.OPTUNA}.")
    major, minor = database.OPTUNA.split(".")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"optuna>={database.OPTUNA},<{major}.{int(minor) + 1}" in project["dependencies"]
