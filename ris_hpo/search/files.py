"""Study files: TOML in, a checked specification out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ris_hpo.config import SCHEMA, SCHEMA_KEY, read_toml, suggestion
from ris_hpo.errors import ConfigError, SpaceError
from ris_hpo.process import study_directories
from ris_hpo.search.dimension import Dimension
from ris_hpo.search.points import Points
from ris_hpo.search.spec import StudySpec, leaves

_PROBES: Final = 64
"""Random configurations that are tried at load, since a combination may be refused where its parts are not."""


def list_studies() -> dict[str, Path]:
    """Return the known studies by name.

    Raises:
        SpaceError: none in any of the folders.
    """
    found: dict[str, Path] = {}
    for directory in study_directories():
        for path in sorted(directory.glob("*.toml")):
            found.setdefault(path.stem, path)
    if not found:
        places = " or ".join(str(directory.absolute()) for directory in study_directories())
        raise SpaceError(
            f"no study files in {places}; work in a folder with studies/, or give the path of a study file"
        )
    return found


def study_file(name_or_path: str | Path) -> Path:
    """Return the file of a study, given its name (``wide``) or the file itself (``my/space.toml``).

    Raises:
        SpaceError: unknown name, with a suggestion, or no study files at all.
    """
    text = str(name_or_path)
    if text.endswith(".toml") or "/" in text:
        return Path(text)
    known = list_studies()
    if text not in known:
        raise SpaceError(f"unknown space '{text}'{suggestion(text, list(known))}")
    return known[text]


def load_study(name_or_path: str | Path) -> StudySpec:
    """Read and validate a study by name (``wide``) or file (``my/space.toml``).

    Raises:
        SpaceError: unknown name (with a suggestion, or where names are looked for), unknown key, impossible bounds, or
            a value the run configuration refuses.
        ConfigError: a file that is missing or not TOML.
    """
    path = study_file(name_or_path)
    spec = parse_study(read_toml(path), name=path.stem, source=str(path))
    return checked(spec)


def checked(spec: StudySpec) -> StudySpec:
    """Check every dimension, alone at its edges and together at random points, against the run configuration.

    Returns:
        The study with dimensions of whole numbers only where the run configuration has whole numbers.

    Raises:
        SpaceError: one line that names the key and what the run configuration said.
    """
    try:
        spec = _with_decimal_keys(spec)
        reference = spec.base_params()
        for path, dimension in spec.space.items():
            for value in dimension.edges():
                # where it is conditional and off in the base, its parents are set so that it counts
                off = path not in reference
                parents = {parent: values[0] for parent, values in dimension.when.items()} if off else {}
                spec.config({**parents, path: value})
        generator, points = random.Random(0), Points(spec)
        if not points.allows(reference):
            raise SpaceError(f"study '{spec.name}': the base configuration does not meet the constraints")
        draws = [points.draw(generator) for _ in range(_PROBES)]
        unscaled = spec.replaced({"budget.equal": "steps"})  # counting takes a while
        for params in filter(points.allows, draws):
            unscaled.config(params)
    except SpaceError:
        raise
    except ConfigError as error:
        raise SpaceError(f"study '{spec.name}': {error}") from None
    return spec


def with_own_scenes(spec: StudySpec) -> StudySpec:
    """Return the study with the files of ``data.scenes`` fixed: absolute paths, and the scenes' fingerprint.

    Raises:
        SceneFileError: a file that is missing or does not fit.
        ConfigError: scenes that cannot be trained on.
    """
    if not spec.trains_networks or spec.base.get("data.scenes") is None or spec.base_schema != SCHEMA:
        return spec
    from ris_hpo.training.data import with_fingerprint  # late, since it takes torch

    return spec.with_base(with_fingerprint(spec.config({})))


def _with_decimal_keys(spec: StudySpec) -> StudySpec:
    base = dict(leaves(spec.config({}).model_dump(mode="json")))
    space = {
        path: dimension.for_decimal_key() if isinstance(base.get(path), float) else dimension
        for path, dimension in spec.space.items()
    }
    return spec.replaced({"space": {path: dimension.model_dump() for path, dimension in space.items()}})


def parse_study(tree: Mapping[str, Any], *, name: str, source: str) -> StudySpec:
    """Turn the tables of a study file into a specification, without looking at the run configuration.

    A file of an older version says ``schema_version = N`` at its top; without it the keys are this version's.

    Raises:
        SpaceError: unknown table or key, impossible bounds.
    """
    tables = ("study", "base", "space", "sampler", "pruner", "budget", "retries", "stop", "keep")
    for key, value in tree.items():
        if key == SCHEMA_KEY:
            continue
        if key not in tables:
            raise SpaceError(f"{source}: unknown table '{key}'{suggestion(key, list(tables))}")
        if not isinstance(value, Mapping):
            raise SpaceError(f"{source}: '{key}' must be a table (found {value!r})")
    head = dict(tree.get("study", {}))
    heading = [key for key in StudySpec.model_fields if key not in (*tables, "base_schema")]
    for key in head:
        if key not in heading:
            raise SpaceError(f"{source}: unknown key 'study.{key}'{suggestion(key, heading)}")

    def dimension_like(table: Mapping[str, Any]) -> bool:
        return any(key in table for key in ("low", "high", "choices"))

    space = dict(_flattened(tree.get("space", {}), dimension_like))
    for path, table in space.items():
        if not isinstance(table, Mapping):
            raise SpaceError(f"{source}: 'space.{path}' needs low and high, or choices (found {table!r})")
        if isinstance(table.get("when"), Mapping):
            conditions = dict(_flattened(table["when"], lambda _: False))
            space[path] = {**table, "when": {k: v if isinstance(v, list) else [v] for k, v in conditions.items()}}
        try:
            Dimension.parse(space[path], f"{source}: space.'{path}'")
        except ConfigError as error:
            raise SpaceError(str(error)) from None
    rest = {key: tree[key] for key in ("sampler", "pruner", "budget", "retries", "stop", "keep") if key in tree}
    whole = {
        "name": name,
        **head,
        "base": dict(_flattened(tree.get("base", {}), lambda _: False)),
        "space": space,
        **rest,
    }
    try:
        return StudySpec.from_stored({SCHEMA_KEY: tree.get(SCHEMA_KEY, SCHEMA), **whole}, source)
    except SpaceError:
        raise
    except ConfigError as error:
        raise SpaceError(str(error)) from None


def _flattened(
    table: Mapping[str, Any], is_leaf: Callable[[Mapping[str, Any]], bool], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and not is_leaf(value):
            yield from _flattened(value, is_leaf, f"{prefix}{key}.")
        else:
            yield prefix + key, value
