"""Every setting says what it does: ``--help`` and ``spaces`` print the descriptions."""

from __future__ import annotations

import pytest

from ris_hpo.learning.losses import LossSpec
from ris_hpo.learning.network import NetworkSpec


@pytest.mark.parametrize("spec", [NetworkSpec, LossSpec], ids=lambda spec: spec.__name__)
def test_every_field_has_a_description(spec):
    assert [name for name, field in spec.model_fields.items() if not field.description] == []
