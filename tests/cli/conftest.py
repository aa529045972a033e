from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ris_hpo.cli import execute


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The standard output, which must be JSON alone."""
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RIS_HPO_")]:
        monkeypatch.delenv(name)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = execute([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield run
    root.handlers[:], root.level = handlers, level  # a command sets up logging for a process of its own
    logging.captureWarnings(False)


@pytest.fixture
def made_study(cli: Cli, tmp_path: Path) -> str:
    """A study of four ended trials and a waiting one in the default store of the current folder."""
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    from ris_hpo.search.dimension import Dimension
    from ris_hpo.search.lifecycle import create_or_resume_study
    from ris_hpo.search.spec import StudySpec
    from ris_hpo.store import attributes as names
    from ris_hpo.store.cache import ticket
    from ris_hpo.store.open import open_store

    spec = StudySpec(name="made", space={"optimizer.learning_rate": Dimension(low=1e-4, high=1e-2, log=True)})
    store = open_store(f"sqlite:///{tmp_path}/storage/studies.db")
    study = create_or_resume_study(store, spec, score_version=1, command="ris-hpo run")
    ranges = {"optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True)}
    ends = [(TrialState.COMPLETE, 2.5), (TrialState.COMPLETE, 1.75), (TrialState.PRUNED, None), (TrialState.FAIL, None)]
    for place, (state, value) in enumerate(ends):
        marks: dict[str, Any] = {names.SCENES: 1000, names.SECONDS: 2.0, names.FLOOR: 1.0}
        params = {"optimizer.learning_rate": 1e-3 * (place + 1)}
        if value is not None:
            marks[names.CONFIG_FINGERPRINT] = spec.config(params, place).fingerprint()
            marks |= {names.EFFICIENCY: (7 - value) / 6, names.PIPELINE: {"k_loc": value - 0.5}}
            marks |= {names.COMPONENTS: {"k_loc": value, "k_acc": 0.5, "success": 0.25}}
        if state is TrialState.FAIL:
            marks[names.CAUSE] = "bug"
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params=params,
                distributions=ranges,
                user_attrs=marks,
                intermediate_values={500: 3.0 + place, 1000: 2.0 + place},
            )
        )
    study.add_trial(ticket())
    store.close()
    return "made"
