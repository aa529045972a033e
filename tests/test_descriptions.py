"""Every setting says what it does: ``--help``, ``spaces`` and the documentation print the descriptions."""

from __future__ import annotations

import pytest

from ris_hpo.config import Spec
from ris_hpo.estimators.estimate import EstimatorSpec
from ris_hpo.programs.inference import RunConfig as InferenceRun
from ris_hpo.search.dimension import Dimension
from ris_hpo.search.spec import StudySpec
from ris_hpo.training.config import RunConfig


def undescribed(spec: type[Spec]) -> list[str]:
    """Names of the settings without a description, those of nested tables included."""
    found = []
    for name, field in spec.model_fields.items():
        if isinstance(field.default, Spec):
            found += undescribed(type(field.default))
        elif not field.description:
            found.append(f"{spec.__name__}.{name}")
    return found


@pytest.mark.parametrize("spec", [RunConfig, InferenceRun, EstimatorSpec, StudySpec, Dimension])
def test_every_setting_has_a_description(spec):
    assert undescribed(spec) == []
