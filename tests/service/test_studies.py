"""The study files that come with the program: they load, and every knob in them does something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ris_hpo.errors import ConfigError
from ris_hpo.programs.program import TrialContext, load_program
from ris_hpo.search.files import list_studies, load_study
from ris_hpo.search.spec import StudySpec

HERE = Path(__file__).resolve().parents[2] / "studies"
STUDIES = sorted(path.stem for path in HERE.glob("*.toml"))

# small enough for a run of under a second; what a study searches is set on top
TINY: dict[str, Any] = {
    "training": {
        "budget.scenes": 48,
        "budget.validate_every": 48,
        "budget.validation_scenes": 24,
        "budget.pipeline_scenes": 0,  # no study here has that objective
        "network.width": 16,
        "network.depth": 1,
        "network.heads": 2,
        "network.head_width": 32,
        "network.residual_passes": 0,
        "network.cell_width": 0,
        "optimizer.batch_size": 8,
    },
    "inference": {"budget.scenes": 12, "budget.validate_every": 12},
}


def knobs() -> list[tuple[str, str]]:
    """Every searched key once for each objective, with the first study that searches it."""
    seen: dict[tuple[str, str, str], str] = {}
    for name in STUDIES:
        spec = load_study(name)
        for path in spec.space:
            seen.setdefault((spec.kind, spec.objective, path), name)
    return [(study, path) for (*_, path), study in seen.items()]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_loads(name: str) -> None:
    spec = load_study(name)
    assert spec.name == name
    assert spec.description
    assert len(spec.base_params()) >= 1
    assert StudySpec.parse(spec.model_dump(mode="json")) == spec


def test_the_studies_are_the_ones_promised() -> None:
    assert {"wide", "narrow", "smoke", "inference"} <= set(list_studies())
    wide = set(load_study("wide").space)
    assert {
        "network.covariance_head",
        "network.front_end",
        "network.width",
        "network.depth",
        "network.heads",
        "network.dropout",
        "optimizer.learning_rate",
        "optimizer.head_multiplier",
        "optimizer.warmup",
        "optimizer.weight_decay",
        "optimizer.batch_size",
        "inference.hybrid.beta",
        "inference.hybrid.shrinkage",
        "inference.count_confidence",
    } <= wide
    config = load_study("wide").config({})
    assert config.network.noise_known
    weights = {name for name, value in config.loss if value > 0} - {"disturbance"}  # silent where the noise is known
    assert {f"loss.{name}" for name in weights} <= wide


def test_an_inference_study_needs_its_network(tmp_path: Path) -> None:
    spec = load_study("inference")
    with pytest.raises(ConfigError, match="no trained network there; name one with --set checkpoint=FOLDER"):
        run(spec, {"checkpoint": str(tmp_path / "none")}, tmp_path / "trial")


def run(spec: StudySpec, params: dict[str, Any], folder: Path) -> float | None:
    program = load_program(spec.program_name())
    return program.train(TrialContext(spec.config(params).model_dump(mode="json"), folder))


class Outcomes:
    """Objectives of tiny runs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[str, str], float | None] = {}

    def of(self, spec: StudySpec, params: dict[str, Any]) -> float | None:
        if spec.kind == "inference":
            params = {"checkpoint": str(self.network()), **params}
        params = {**TINY[spec.kind], **params}
        key = (spec.objective, spec.config(params).fingerprint())
        if key not in self.known:
            self.known[key] = run(spec, params, self.folder / "-".join(key))
        return self.known[key]

    def network(self) -> Path:
        """A network of a few steps, for the settings that need one."""
        folder = self.folder / "network"
        if not folder.exists():
            run(load_study("wide"), TINY["training"], folder)
        return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    import torch

    torch.set_num_threads(1)
    return Outcomes(tmp_path_factory.mktemp("outcomes"))


@pytest.mark.parametrize(("study", "path"), knobs())
def test_every_dimension_moves_the_objective(study: str, path: str, outcomes: Outcomes) -> None:
    spec = load_study(study)
    dimension = spec.space[path]
    context = {parent: values[0] for parent, values in dimension.when.items()}
    found: set[float] = set()
    base = [value for key, value in spec.base_params().items() if key == path]  # a run that most dimensions share
    for value in (*base, *reversed(dimension.edges())):
        found.add(outcomes.of(spec, {**context, path: value}))
        if len(found) > 1:
            return
    pytest.fail(f"{path} does not move the {spec.objective} objective of '{study}'")
