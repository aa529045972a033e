from __future__ import annotations

import pytest
import torch

from ris_hpo.learning import losses
from ris_hpo.learning.hybrid import HybridSpec, covariances
from ris_hpo.learning.losses import TERMS, LossSpec, label_factor, loss_terms, nmse
from ris_hpo.learning.network import Network, NetworkSpec
from ris_hpo.physics.scene import SceneSpec, simulate


@pytest.fixture(scope="module")
def scenes():
    return simulate(SceneSpec(), 2, range(8))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network(NetworkSpec(width=16, depth=2, heads=2, residual_passes=1, noise_known=False))


def test_nmse_is_0_for_truth_and_1_for_zero(scenes):
    label = label_factor(scenes.truth, scenes.geometry)
    covariance = label @ label.mH
    assert float(nmse(covariance, covariance).max()) == 0.0
    assert torch.equal(nmse(torch.zeros_like(covariance), covariance), torch.ones(8))
    trace = covariance.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    assert torch.allclose(trace, torch.full((8,), 144.0), rtol=1e-5)


def test_a_single_slot_has_nothing_to_be_orthogonal_to():
    spec = SceneSpec(max_sources=1, num_sources=(1, 1))
    network, alone = Network(NetworkSpec(width=16, depth=2, heads=2, max_sources=1)), simulate(spec, 2, range(3))
    outputs = network(*network.features(alone))
    weights = LossSpec(**dict.fromkeys(TERMS, 1.0))
    terms = loss_terms(weights, network, outputs, covariances(outputs, alone, HybridSpec()), alone)
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms["orthogonality"] == terms["cross"] == 0


def test_diagonal_and_off_diagonal_weights_split_the_error(scenes):
    label = label_factor(scenes.truth, scenes.geometry)
    covariance = label @ label.mH
    other = covariance.roll(1, 0)
    both = nmse(other, covariance)
    assert torch.allclose(nmse(other, covariance, 1, 0) + nmse(other, covariance, 0, 1), both, rtol=1e-4)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_has_a_finite_gradient_that_is_not_zero(term, scenes, network):
    network.zero_grad()
    outputs = network(*network.features(scenes))
    spec = LossSpec().only(**{term: 1.0})
    terms = loss_terms(spec, network, outputs, covariances(outputs, scenes, HybridSpec()), scenes)
    assert list(terms) == [term]
    terms[term].backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any((g != 0).any() for g in gradients)


def test_disturbance_is_what_the_known_channel_leaves(network):
    """Zero for the very share that noise and the channel's error have, and silent where the noise is known."""
    spec = SceneSpec(channel_error_db=(-10, -10), snr_db=(10, 10), rician_factor=(5, 5))
    scenes = simulate(spec, 5, range(64))
    outputs = network(*network.features(scenes))
    gain = (1 / 6) / (1 / 6 + 0.1)  # power of the scattered part over that and the error's
    told = 1 / 11 + 10 / 11 * 0.1 * gain  # noise, then what is left of the error
    right = outputs._replace(disturbance=torch.full((64,), told), channel_gain=torch.full((64,), gain))
    assert losses.disturbance(right, scenes) < 0.1
    assert losses.disturbance(right._replace(disturbance=torch.full((64,), 4 * told)), scenes) > 0.4
    assert losses.disturbance(right._replace(channel_gain=torch.full((64,), 0.97)), scenes) > 0.4
    known = Network(NetworkSpec(width=16, depth=2, heads=2, residual_passes=1))
    mixed = covariances(outputs, scenes, HybridSpec())
    assert loss_terms(LossSpec().only(disturbance=1.0), known, outputs, mixed, scenes) == {}


def test_structure_terms_have_finite_gradients_on_rank_deficient_r(scenes):
    """One true source, a factor of equal columns: repeated eigenvalues, where eigenvector gradients are NaN."""
    truth = simulate(SceneSpec(), 2, range(4), num_sources=torch.ones(4, dtype=torch.long)).truth
    label = label_factor(truth, scenes.geometry)
    factor = label[:, :, :1].repeat(1, 1, 5).requires_grad_()
    predicted = factor @ factor.mH
    total = losses.subspace_alignment(predicted, label) + losses.eigengap(factor, truth.num_sources)
    total = total + losses.orthogonality(factor, 5)
    total.backward()
    assert torch.isfinite(torch.view_as_real(factor.grad)).all()


def test_alignment_is_0_on_the_true_subspace_and_1_off_it(scenes):
    label = label_factor(scenes.truth, scenes.geometry)
    assert float(losses.subspace_alignment(label @ label.mH, label)) < 1e-3
    basis = torch.linalg.qr(label[:, :, :1]).Q
    other = torch.randn(8, 144, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    other = other - basis @ (basis.mH @ other)
    single = simulate(SceneSpec(), 2, range(8), num_sources=torch.ones(8, dtype=torch.long))
    own = label_factor(single.truth, scenes.geometry)
    outside = other - torch.linalg.qr(own[:, :, :1]).Q @ (torch.linalg.qr(own[:, :, :1]).Q.mH @ other)
    assert float(losses.subspace_alignment(outside @ outside.mH, own)) > 0.99


def test_cell_targets_point_at_the_source(scenes, network):
    grid = network.spec.grid
    index, offset = losses.cell_targets(scenes.truth, grid)
    assert float(offset[scenes.truth.mask.unsqueeze(1).expand_as(offset)].abs().max()) <= 0.5 + 1e-4
    cells = grid.cells()
    v = scenes.truth.azimuth.sin() * scenes.truth.elevation.cos()
    assert float((cells.v[index] + offset[:, 0] * grid.spacing()[0] - v)[scenes.truth.mask].abs().max()) < 1e-4


def test_beta_lets_gradient_through_the_prediction_and_never_through_the_sample(scenes, network):
    """Detached R_pred: the earlier pipelines' hybrid had a gradient on the wrong side."""
    outputs = network(*network.features(scenes))
    for beta in (0.0, 0.3, 0.9):
        network.zero_grad()
        mixed = covariances(outputs, scenes, HybridSpec(shrinkage=0.0), beta)
        mixed.effective.abs().square().mean().backward(retain_graph=True)
        assert any(p.grad is not None and (p.grad != 0).any() for p in network.parameters())
    y = scenes.y.clone().requires_grad_()
    watched = type(scenes)(scenes.geometry, y, scenes.bs_ris_channel, scenes.ris_codes, scenes.noise_power)
    covariances(outputs, watched, HybridSpec(shrinkage=0.0), 0.5).effective.abs().sum().backward()
    assert y.grad is None
