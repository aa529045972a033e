"""R_pred and R_eff against their formula written out, and what gradients may flow through."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ris_hpo.estimators.covariance import least_squares_covariance
from ris_hpo.learning.hybrid import HybridSpec, covariances
from ris_hpo.learning.network import Outputs
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.scene import SceneSpec, simulate

N = 9
SPEC = SceneSpec(geometry=Geometry(num_horizontal=3, num_vertical=3), num_antennas=4, num_snapshots=4)


@pytest.fixture(scope="module")
def scenes():
    return simulate(SPEC, 1, range(3))


def outputs_with(factor: torch.Tensor, noise_level: float = 0.25) -> Outputs:
    """Outputs of which the covariances look at the factor and the noise level alone."""
    nothing = torch.empty(len(factor), 0)
    level = torch.full((len(factor),), noise_level)
    return Outputs(*[nothing] * 6, factor, level, nothing, nothing)


@pytest.fixture
def factor():
    return torch.randn(3, N, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


def by_hand(factor, noise_level):
    matrix = factor @ factor.mH + noise_level * torch.eye(N)
    return N * matrix / matrix.diagonal(dim1=1, dim2=2).real.sum(-1)[:, None, None]


def test_r_pred_is_the_factor_and_noise_scaled_to_trace_n(factor, scenes):
    found = covariances(outputs_with(factor), scenes, HybridSpec(shrinkage=0.0))
    torch.testing.assert_close(found.predicted, by_hand(factor, 0.25))
    torch.testing.assert_close(found.effective, found.predicted)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_r_eff_is_the_mixture_that_the_formula_says(beta, shrinkage, factor, scenes):
    """Noise powers for SNRs of 10 dB, 0 dB and one below the least that is believed, -10 dB."""
    received = scenes.y.abs().square().mean((1, 2))
    scenes = dataclasses.replace(scenes, noise_power=received / torch.tensor([11.0, 2.0, 1.01]))
    share = torch.tensor([shrinkage / (shrinkage + (1 - shrinkage) * snr) for snr in (10.0, 1.0, 0.1)])[:, None, None]
    mixed = (1 - beta) * by_hand(factor, 0.25) + beta * least_squares_covariance(scenes)
    found = covariances(outputs_with(factor), scenes, HybridSpec(beta=beta, shrinkage=shrinkage)).effective
    torch.testing.assert_close(found, (1 - share) * mixed + share * torch.eye(N))
    assert torch.allclose(found.diagonal(dim1=1, dim2=2).real.sum(-1), torch.tensor(float(N)), rtol=1e-5)
    given = covariances(outputs_with(factor), scenes, HybridSpec(beta=0.9, shrinkage=shrinkage), beta).effective
    assert torch.equal(given, found)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
def test_the_gradient_flows_through_the_prediction_and_never_through_the_sample(beta, factor, scenes):
    factor.requires_grad_()
    y = scenes.y.clone().requires_grad_()
    watched = dataclasses.replace(scenes, y=y)
    covariances(
        outputs_with(factor), watched, HybridSpec(shrinkage=0.1), beta
    ).effective.abs().square().sum().backward()
    assert (factor.grad != 0).any()
    assert y.grad is None
