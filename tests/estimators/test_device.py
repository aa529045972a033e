"""The same estimates on an accelerator as on the CPU."""

import pytest
import torch

from ris_hpo.estimators import EstimatorSpec, LikelihoodSpec, estimate, refine
from ris_hpo.physics.bounds import deterministic_crb
from tests.estimators.conftest import COARSE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["ml", "spectrum-maxima", "music", "mvdr", "modified-music"])
def test_estimates_agree_across_devices(loud, name):
    spec = EstimatorSpec(likelihood=LikelihoodSpec(grid=COARSE), covariance="truth")
    count = loud.truth.num_sources
    here = estimate(name, loud, spec, count)
    there = estimate(name, loud.to("cuda"), spec, count.to("cuda"))
    assert there.azimuth.is_cuda
    close = (here.azimuth - there.azimuth.cpu()).abs()[loud.truth.mask] < 5e-3
    assert close.double().mean().item() > 0.9


def test_refinement_and_bounds_agree_across_devices(loud):
    away = loud.to("cuda")
    here, there = refine(loud, loud.truth, 20), refine(away, away.truth, 20)
    torch.testing.assert_close(here.azimuth, there.azimuth.cpu(), atol=1e-3, rtol=0)
    torch.testing.assert_close(deterministic_crb(loud), deterministic_crb(away).cpu(), rtol=1e-5, atol=1e-12)
