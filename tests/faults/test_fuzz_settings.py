"""Study files and run configurations with anything in them: usable, or refused in one line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import strategies as st

from ris_hpo.config import to_toml
from ris_hpo.errors import ConfigError
from ris_hpo.search.files import load_study, study_directories
from ris_hpo.search.spec import StudySpec
from ris_hpo.training.config import RunConfig
from ris_hpo.training.curriculum import with_curriculum
from ris_hpo.training.files import Exported, load_config, write_config

from .fuzzing import Whole, damaged_bytes, damaged_trees, fuzz, junk, outcome

STUDIES = sorted(study_directories()[-1].glob("*.toml"))


def as_toml(tree: dict[str, Any]) -> bytes:
    """The tree as TOML, without what TOML cannot say."""

    def sayable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sayable(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [sayable(item) for item in value if item is not None]
        return value

    return tomlkit.dumps(sayable(tree)).encode("utf-8", "surrogatepass")


def test_study_files(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    contents = [file.read_bytes() for file in STUDIES]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        spec = outcome(lambda: load_study(path))
        if spec is not None:
            params = outcome(spec.base_params)
            assert StudySpec.parse(json.loads(spec.model_dump_json())) == spec  # as it stands in the store
            assert params is None or spec.config(params) == spec.config({})

    trees = [damaged_trees(Whole(tomllib.loads(content.decode()))).map(as_toml) for content in contents]
    fuzz(check, st.one_of([*trees, *trees, *(damaged_bytes(Whole(content)) for content in contents)]))


def test_run_configurations(tmp_path: Path) -> None:
    trees = [RunConfig().model_dump(mode="json"), with_curriculum(RunConfig()).model_dump(mode="json")]
    write_config(Exported(config=RunConfig()), tmp_path / "whole.toml")

    def check(drawn: tuple[str, bytes]) -> None:
        suffix, data = drawn
        path = tmp_path / f"config.{suffix}"
        path.write_bytes(data)
        found = outcome(lambda: load_config(path))
        if found is not None:
            for form in ("toml", "json"):
                write_config(found, tmp_path / f"again.{form}")
                assert load_config(tmp_path / f"again.{form}") == found

    files = st.one_of(
        *(damaged_trees(Whole(tree)).map(lambda t: ("toml", as_toml(t))) for tree in trees),
        *(damaged_trees(Whole(tree)).map(lambda t: ("json", json.dumps(t).encode())) for tree in trees),
        damaged_bytes(Whole((tmp_path / "whole.toml").read_bytes())).map(lambda data: ("toml", data)),
    )
    fuzz(check, files)


def test_changes_of_single_keys() -> None:
    keys = _leaves(RunConfig().model_dump(mode="json"))

    def check(change: tuple[str, Any]) -> None:
        found = outcome(lambda: RunConfig().replaced(dict([change])))
        if found is not None:
            assert RunConfig.parse(tomllib.loads(to_toml(found.model_dump(mode="json")))) == found

    fuzz(check, st.tuples(st.sampled_from(keys) | st.text(max_size=20), junk))


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


@pytest.mark.parametrize("text", ["x = " + "[" * 50_000, "x = " + "9" * 5000, "x" * 10, "x = 1\nx = 2", "\0"])
def test_toml_beyond_all_bounds(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert len(str(caught.value)) < 1000
    path.with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(ConfigError):
        load_config(path.with_suffix(".json"))
