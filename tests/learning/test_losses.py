"""Every loss term against values computed by hand, and what all terms share: finite gradients, weights, activity."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.estimators.channel import split_channel
from ris_hpo.learning import losses
from ris_hpo.learning.hybrid import Covariances, HybridSpec, covariances
from ris_hpo.learning.losses import TERMS, LossSpec, label_factor, loss_terms, nmse
from ris_hpo.learning.network import Network, NetworkSpec, Outputs
from ris_hpo.physics.array import Cosines, Geometry, from_cosines, steering, to_cosines
from ris_hpo.physics.grid import Grid, GridSpec
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.physics.sources import Sources

GRID = Grid(num_v=5, num_w=5, num_rho=3)


@pytest.fixture(scope="module")
def scenes():
    return simulate(SceneSpec(), 2, range(8))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network(NetworkSpec(width=16, depth=2, heads=2, residual_passes=1, noise_known=False))


def outputs_with(**fields: torch.Tensor) -> Outputs:
    """Outputs of which a term looks at these fields alone."""
    nothing = torch.empty(1, 0)
    return Outputs(**(dict.fromkeys(Outputs._fields[:10], nothing) | fields))


def sources(azimuth_deg, elevation_deg, range_m, mask, power=None) -> Sources:
    azimuth, elevation = (torch.tensor(value).deg2rad() for value in (azimuth_deg, elevation_deg))
    far, here = torch.tensor(range_m), torch.tensor(mask)
    return Sources(azimuth, elevation, far, torch.ones_like(far) if power is None else torch.tensor(power), here)


def huber(x: float, beta: float) -> float:
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# -- labels and covariance -------------------------------------------------------------------------------------------


def test_the_label_is_the_covariance_of_the_true_sources():
    geometry = Geometry(num_horizontal=3, num_vertical=2)
    truth = sources(
        [[10.0, -30.0, 50.0]], [[5.0, 0.0, 9.0]], [[2.0, 4.0, 1.0]], [[True, True, False]], [[1.0, 3.0, 7.0]]
    )
    found = label_factor(truth, geometry)
    a = steering(geometry, truth.azimuth, truth.elevation, truth.range_m)[0]
    expected = sum(
        share * torch.outer(a[k], a[k].conj()) for k, share in ((0, 1 / 4), (1, 3 / 4))
    )  # a has unit norm, so that the trace is 1 before scaling
    torch.testing.assert_close(found[0] @ found[0].mH, 6 * expected)
    assert (found[0, :, 2] == 0).all()
    nobody = dataclasses.replace(truth, mask=torch.zeros_like(truth.mask))
    assert (label_factor(nobody, geometry) == 0).all()


def test_nmse_is_0_for_truth_and_1_for_zero(scenes):
    label = label_factor(scenes.truth, scenes.geometry)
    covariance = label @ label.mH
    assert float(nmse(covariance, covariance).max()) == 0.0
    assert torch.equal(nmse(torch.zeros_like(covariance), covariance), torch.ones(8))
    assert torch.allclose(nmse(3 * covariance, covariance), torch.full((8,), 4.0))


def test_nmse_by_hand():
    """Errors 1 and 2j on the diagonal, 3 and 4 off it, against ||R||^2 = 1 + 4 + 0.25 + 0.25."""
    label = torch.tensor([[[1.0 + 0j, 0.5], [0.5, 2.0]]])
    estimate = label + torch.tensor([[[1.0 + 0j, 3.0], [4.0j, 2.0j]]])
    assert float(nmse(estimate, label)) == pytest.approx((1 + 4 + 9 + 16) / 5.5)
    assert float(nmse(estimate, label, 1, 0)) == pytest.approx((1 + 4) / 5.5)
    assert float(nmse(estimate, label, 0.5, 2)) == pytest.approx((0.5 * 5 + 2 * 25) / 5.5)


# -- cells -----------------------------------------------------------------------------------------------------------


def cell(plane: int, row: int, column: int, offset=(0.0, 0.0, 0.0)) -> tuple[float, float, float]:
    """(azimuth deg, elevation deg, range m) at an offset, in cells, from a cell's centre."""
    axes = GRID.axes()
    values = (axes.v[row], axes.w[column], axes.rho[plane])
    v, w, rho = (value + step * o for value, step, o in zip(values, GRID.spacing(), offset, strict=True))
    azimuth, elevation, range_m = from_cosines(Cosines(*(torch.as_tensor(x) for x in (v, w, rho))))
    return float(azimuth.rad2deg()), float(elevation.rad2deg()), float(range_m)


@pytest.fixture
def two_cells() -> Sources:
    """Sources in cells (0, 1, 2) and (2, 3, 1), with powers 1 and 3, and a padded slot."""
    places = [cell(0, 1, 2, (0.2, -0.1, 0.3)), cell(2, 3, 1, (-0.4, 0.25, 0.0)), (0.0, 0.0, 1.0)]
    azimuth, elevation, range_m = ([list(values)] for values in zip(*places, strict=True))
    return sources(azimuth, elevation, range_m, [[True, True, False]], [[1.0, 3.0, 5.0]])


def test_cell_targets_by_hand(two_cells):
    index, offset = losses.cell_targets(two_cells, GRID)
    assert index[0, :2].tolist() == [(0 * 5 + 1) * 5 + 2, (2 * 5 + 3) * 5 + 1]
    assert offset[0, :, 0].tolist() == pytest.approx([0.2, -0.1, 0.3], abs=1e-4)
    assert offset[0, :, 1].tolist() == pytest.approx([-0.4, 0.25, 0.0], abs=1e-4)


def test_cell_targets_point_at_the_source(scenes):
    grid = GridSpec().on(Geometry())
    index, offset = losses.cell_targets(scenes.truth, grid)
    assert float(offset[scenes.truth.mask.unsqueeze(1).expand_as(offset)].abs().max()) <= 0.5 + 1e-4
    there = to_cosines(scenes.truth.azimuth, scenes.truth.elevation, scenes.truth.range_m)
    for axis, (centres, value, step) in enumerate(zip(grid.cells(), there, grid.spacing(), strict=True)):
        assert float((centres[index] + offset[:, axis] * step - value)[scenes.truth.mask].abs().max()) < 1e-4


def test_detection_over_cells_by_hand(two_cells):
    logit = torch.full((1, 3, 5, 5), -2.0)
    logit[0, 0, 1, 2], logit[0, 2, 3, 1], logit[0, 1, 1, 1] = 3.0, -1.0, 0.5
    found = losses.detection(outputs_with(cell_logit=logit), two_cells, GRID)
    expected = softplus(-3.0) + softplus(1.0) + softplus(0.5) + 72 * softplus(-2.0)
    assert float(found) == pytest.approx(expected / (1 * 3), rel=1e-5)  # a sum over cells, a mean over slots


def test_two_sources_in_one_cell_are_one_target():
    place = cell(1, 2, 2)
    truth = sources([[place[0]] * 2], [[place[1]] * 2], [[place[2]] * 2], [[True, True]])
    logit = torch.zeros(1, 3, 5, 5)
    assert float(losses.detection(outputs_with(cell_logit=logit), truth, GRID)) == pytest.approx(75 * math.log(2) / 2)


def slots(azimuth_deg, range_m, existence) -> Outputs:
    azimuth, far = torch.tensor(azimuth_deg).deg2rad(), torch.tensor(range_m)
    v, w, rho = to_cosines(azimuth, torch.zeros_like(azimuth), far)
    return outputs_with(v=v, w=w, rho=rho, existence=torch.tensor(existence), power=torch.ones_like(far))


def test_detection_over_slots_by_hand():
    """Slots at 0, 10 and 40 deg with logits 1, -2 and 3; sources at 41 and 1 deg take the last and the first."""
    outputs = slots([[0.0, 10.0, 40.0]], [[2.0] * 3], [[1.0, -2.0, 3.0]])
    truth = sources([[41.0, 1.0, 10.0]], [[0.0] * 3], [[2.0] * 3], [[True, True, False]])
    found = losses.detection(outputs, truth, GRID)
    assert float(found) == pytest.approx((softplus(-1.0) + softplus(-2.0) + softplus(-3.0)) / 3, rel=1e-5)


def test_detection_does_not_count_the_padding_of_a_wide_truth():
    outputs = slots([[0.0, 10.0, 40.0]], [[2.0] * 3], [[1.0, -2.0, 3.0]])
    truth = sources([[41.0, 1.0, *[10.0] * 10]], [[0.0] * 12], [[2.0] * 12], [[True, True, *[False] * 10]])
    found = losses.detection(outputs, truth, GRID)
    assert float(found) == pytest.approx((softplus(-1.0) + softplus(-2.0) + softplus(-3.0)) / 3, rel=1e-5)


def test_offset_and_power_by_hand(two_cells):
    """Offset errors (.05, .3, 0) and (0, -.2, .5), halved per cell mean; powers 0.5 for a share of 1/4, e for 3/4."""
    cell_offset, cell_power = torch.zeros(1, 3, 3, 5, 5), torch.ones(1, 3, 5, 5)
    cell_offset[0, :, 0, 1, 2] = torch.tensor([0.25, 0.2, 0.3])
    cell_offset[0, :, 2, 3, 1] = torch.tensor([-0.4, 0.05, 0.5])
    cell_power[0, 0, 1, 2], cell_power[0, 2, 3, 1] = 0.5, math.e
    found = losses.offset(outputs_with(cell_offset=cell_offset, cell_power=cell_power), two_cells, GRID)
    place = sum(huber(x, 0.1) for x in (0.05, 0.3, 0.0, 0.0, -0.2, 0.5)) / 2
    strength = (huber(math.log(0.5 / 0.25), 1.0) + huber(1 - math.log(0.75), 1.0)) / 2
    assert float(found) == pytest.approx(place + 0.2 * strength, rel=1e-4)


def test_offset_is_nothing_for_slots():
    outputs = slots([[0.0]], [[2.0]], [[1.0]])
    assert float(losses.offset(outputs, sources([[0.0]], [[0.0]], [[2.0]], [[True]]), GRID)) == 0


# -- counts and geometry ---------------------------------------------------------------------------------------------


def test_count_is_the_negative_log_probability_of_the_true_number():
    log_count = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]).log()
    truth = sources([[0.0] * 2] * 2, [[0.0] * 2] * 2, [[1.0] * 2] * 2, [[True, True], [False, False]])
    found = losses.count(outputs_with(log_count=log_count), truth)
    assert float(found) == pytest.approx(-(math.log(0.7) + math.log(0.5)) / 2, rel=1e-5)


def test_auxiliary_by_hand():
    """Slots 2 and 10 deg off, 2 m for 3 m and 4 m for 4 m; the third slot has no source."""
    outputs = slots([[2.0, 40.0, -50.0]], [[2.0, 4.0, 1.0]], [[0.0] * 3])
    truth = sources([[50.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[4.0, 3.0, 1.0]], [[True, True, False]])
    found = losses.auxiliary(outputs, truth)
    unit = 0.0873  # 5 deg
    first = huber(math.radians(2) / unit, 1) + huber(math.radians(1) / unit, 1) + huber(math.log(2 / 3), 1)
    second = huber(math.radians(10) / unit, 1) + huber(0, 1) + huber(0, 1)
    assert float(found) == pytest.approx((first + second) / 2, rel=1e-3)


def test_auxiliary_angles_go_the_short_way_round(monkeypatch):
    place = (torch.tensor([[179.0]]).deg2rad(), torch.zeros(1, 1), torch.ones(1, 1))
    monkeypatch.setattr(losses, "slot_geometry", lambda *_: place)
    found = losses.auxiliary(outputs_with(power=torch.ones(1, 1)), sources([[-179.0]], [[0.0]], [[1.0]], [[True]]))
    assert float(found) == pytest.approx(huber(math.radians(2) / 0.0873, 1), rel=1e-3)


def test_peak_is_the_chamfer_distance_in_beam_widths():
    """Slots at v 0, .3 (existence .9, .2), truth at v .1 and a padded one: nearest slot .1, nearest truth .1 and .2."""
    nothing = torch.zeros(1, 2)
    outputs = outputs_with(v=torch.tensor([[0.0, 0.3]]), w=nothing, existence=torch.logit(torch.tensor([[0.9, 0.2]])))
    azimuth = math.degrees(math.asin(0.1))
    truth = sources([[azimuth, 60.0]], [[0.0, 0.0]], [[1.0, 1.0]], [[True, False]])
    found = losses.peak(outputs, truth)
    expected = 0.1 / 0.167 + (0.9 * 0.1 + 0.2 * 0.2) / 1.1 / 0.167
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_disturbance_by_hand(scenes):
    """The gain that regresses the true scattered part on the known one, and the share that this leaves unexplained."""
    spec = SceneSpec(channel_error_db=(-8, -8), snr_db=(6, 6))
    noisy = simulate(spec, 5, range(2))
    shares, gains = [], []
    for scene in range(2):
        known, true = noisy.bs_ris_channel[scene], noisy.true_channel[scene]
        direct, scattered = (part[0] for part in split_channel(known[None]))
        gain = float((scattered.conj() * (true - direct)).real.sum() / scattered.abs().square().sum())
        truth = noisy.truth
        a = steering(noisy.geometry, truth.azimuth[scene], truth.elevation[scene], truth.range_m[scene])
        left = 0.0
        for snapshot in range(noisy.y.shape[1]):
            wave = sum(noisy.symbols[scene, snapshot, k] * a[k] for k in range(int(truth.num_sources[scene])))
            seen = (direct + gain * scattered) @ (noisy.ris_codes[scene, snapshot] * wave)
            left += float((noisy.y[scene, snapshot] - seen).abs().square().sum())
        shares.append(left / float(noisy.y[scene].abs().square().sum()))
        gains.append(gain)

    def logit(p):
        return math.log(p / (1 - p))

    outputs = outputs_with(disturbance=torch.tensor([0.3, shares[1]]), channel_gain=torch.tensor([gains[0], 0.2]))
    found = losses.disturbance(outputs, noisy)
    expected = huber(logit(0.3) - logit(shares[0]), 1) / 2 + huber(logit(0.2) - logit(gains[1]), 1) / 2
    assert float(found) == pytest.approx(expected, rel=1e-3)
    exact = outputs_with(disturbance=torch.tensor(shares), channel_gain=torch.tensor(gains))
    assert float(losses.disturbance(exact, noisy)) < 1e-6
    with pytest.raises(ConfigError, match="needs scenes with symbols"):
        losses.disturbance(exact, dataclasses.replace(noisy, symbols=None))
    certain = outputs_with(disturbance=torch.full((8,), 0.5), channel_gain=torch.full((8,), 0.5))
    assert float(losses.disturbance(certain, scenes)) > huber(
        logit(0.5) - logit(0.99), 1
    )  # an exact channel has gain 1


# -- structure -------------------------------------------------------------------------------------------------------


def test_orthogonality_by_hand():
    """Unit columns of coherence 0, .6 and .8: mean of their squares; a column's length does not matter."""
    factor = torch.tensor([[[1.0, 0.0, 1.8], [0.0, 1.0, 2.4]]]).to(torch.complex64)
    assert float(losses.orthogonality(factor, 3)) == pytest.approx((0 + 0.36 + 0.64) / 3, rel=1e-5)
    assert float(losses.orthogonality(factor, 2)) == pytest.approx(0, abs=1e-6)


def test_cross_by_hand():
    geometry = Geometry(num_horizontal=4, num_vertical=3)
    planar = Geometry(num_horizontal=4, num_vertical=3, wave="planar")
    truth = sources([[10.0, -30.0]], [[5.0, 0.0]], [[0.6, 0.9]], [[True, True]])
    v, w, rho = to_cosines(truth.azimuth, truth.elevation, truth.range_m)
    found = losses.cross(outputs_with(v=v, w=w, rho=rho), geometry, 2)
    exact, flat = (steering(g, truth.azimuth, truth.elevation, truth.range_m)[0].numpy() for g in (geometry, planar))
    curved = exact * flat.conj()

    def coherence(columns):
        return abs(np.vdot(columns[0], columns[1])) / np.linalg.norm(columns[0]) / np.linalg.norm(columns[1])

    assert float(found) == pytest.approx((coherence(flat) - coherence(curved)) ** 2, rel=1e-3)


def test_eigengap_by_hand():
    """Eigenvalues 4, 1, 0 of F F^H: gaps .6 and .2 of the trace; the hinge is 0 beyond the margin."""
    factor = torch.zeros(1, 4, 3, dtype=torch.complex64)
    factor[0, 0, 0], factor[0, 1, 1] = 2.0, 1.0
    for count, gap in ((1, 0.6), (2, 0.2), (3, 0.0), (0, 0.6)):
        found = losses.eigengap(factor, torch.tensor([count]), margin=0.5)
        assert float(found) == pytest.approx(max(0.0, 0.5 - gap), abs=1e-5), count
    assert float(losses.eigengap(factor, torch.tensor([3]))) == pytest.approx(0.05, abs=1e-6)
    faint = losses.eigengap(1e-3 * factor, torch.tensor([1]), margin=0.5)  # a share of the trace, however small that is
    assert float(faint) == pytest.approx(float(losses.eigengap(factor, torch.tensor([1]), margin=0.5)), rel=1e-4)


def test_alignment_by_hand():
    """R = diag(3, 4) against a label along the first axis: what is outside has energy 16 of 25."""
    label = torch.tensor([[[1.0], [0.0]]]).to(torch.complex64)
    predicted = torch.diag_embed(torch.tensor([[3.0, 4.0]])).to(torch.complex64)
    loading = losses.SUBSPACE_LOADING
    left = 3.0 * (1 - 1 / (1 + loading)) ** 2
    assert float(losses.subspace_alignment(predicted, label)) == pytest.approx((left**2 + 16) / 25, rel=1e-5)


def test_alignment_is_0_on_the_true_subspace_and_1_off_it(scenes):
    label = label_factor(scenes.truth, scenes.geometry)
    assert float(losses.subspace_alignment(label @ label.mH, label)) < 1e-3
    other = torch.randn(8, 144, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(label[:, :, :1]).Q
    single = simulate(SceneSpec(), 2, range(8), num_sources=torch.ones(8, dtype=torch.long))
    own = label_factor(single.truth, scenes.geometry)
    outside = other - basis @ (basis.mH @ other)
    outside = outside - torch.linalg.qr(own[:, :, :1]).Q @ (torch.linalg.qr(own[:, :, :1]).Q.mH @ outside)
    assert float(losses.subspace_alignment(outside @ outside.mH, own)) > 0.99


def test_peak_contrast_by_hand(scenes):
    """The identity's Bartlett spectrum is 1 everywhere; the label's is highest at the truth."""
    geometry, grid, truth = scenes.geometry, GridSpec().on(Geometry()), scenes.truth
    flat = torch.eye(144, dtype=torch.complex64).expand(8, -1, -1)
    assert float(losses.peak_contrast(flat, truth, geometry, grid)) == pytest.approx(math.log(2), rel=1e-4)
    one = simulate(SceneSpec(), 2, range(1), num_sources=torch.ones(1, dtype=torch.long)).truth
    label = label_factor(one, geometry)
    cells = grid.cells()
    atoms = steering(geometry, *from_cosines(Cosines(*(axis[::16] for axis in cells))))
    there = float((144 * (atoms.conj() @ label[0, :, 0] / 12).abs().square()).clamp(min=1e-6).mean())
    found = losses.peak_contrast(label @ label.mH, one, geometry, grid)
    assert float(found) == pytest.approx(softplus(math.log(there / 144)), rel=1e-3)


# -- all terms -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_scene_without_a_source_has_a_share_in_existence_and_count_alone(network, scenes):
    outputs = network(*network.features(scenes))
    both = covariances(outputs, scenes, HybridSpec())
    spec = LossSpec(**dict.fromkeys(TERMS, 1.0), diagonal=0.5)
    keep = torch.arange(len(scenes)) % 2 == 0
    emptied = dataclasses.replace(scenes.truth, mask=scenes.truth.mask & keep.unsqueeze(-1))
    half = dataclasses.replace(scenes, truth=emptied)
    found = loss_terms(spec, network, outputs, both, half, may_be_empty=True)
    few = Outputs(*(None if value is None else value[keep] for value in outputs))
    rest = loss_terms(spec, network, few, Covariances(*(value[keep] for value in both)), scenes[keep])
    grid = network.spec.cells
    for name in ("covariance", "covariance_pred", "offset", "auxiliary", "gap", "peak", "subspace_alignment"):
        assert float(found[name]) == pytest.approx(float(rest[name]), rel=1e-5), name
    assert float(found["detection"]) == pytest.approx(float(losses.detection(outputs, emptied, grid)), rel=1e-5)
    assert float(found["count"]) == pytest.approx(float(losses.count(outputs, emptied)), rel=1e-5)
    nobody = dataclasses.replace(scenes, truth=dataclasses.replace(emptied, mask=emptied.mask & False))
    alone = loss_terms(spec, network, outputs, both, nobody, may_be_empty=True)
    assert all(value.isfinite() for value in alone.values())
    assert float(alone["covariance"]) == 0


def test_each_term_is_computed_from_its_own_inputs(network, scenes):
    outputs = network(*network.features(scenes))
    label = label_factor(scenes.truth, scenes.geometry)
    covariance = label @ label.mH
    both = Covariances(0.5 * covariance, 2.0 * covariance)
    spec = LossSpec(**dict.fromkeys(TERMS, 1.0), diagonal=0.5, off_diagonal=2.0)
    found = loss_terms(spec, network, outputs, both, scenes)
    assert tuple(found) == TERMS
    grid, geometry, truth = network.spec.cells, network.spec.geometry, scenes.truth
    expected = {
        "covariance": nmse(both.effective, covariance, 0.5, 2.0).mean(),
        "covariance_pred": nmse(both.predicted, covariance, 0.5, 2.0).mean(),
        "detection": losses.detection(outputs, truth, grid),
        "offset": losses.offset(outputs, truth, grid),
        "count": losses.count(outputs, truth),
        "auxiliary": losses.auxiliary(outputs, truth),
        "disturbance": losses.disturbance(outputs, scenes),
        "orthogonality": losses.orthogonality(outputs.factor, 5),
        "cross": losses.cross(outputs, geometry, 5),
        "gap": losses.eigengap(outputs.factor, truth.num_sources),
        "peak": losses.peak(outputs, truth),
        "subspace_alignment": losses.subspace_alignment(both.predicted, label),
        "peak_contrast": losses.peak_contrast(both.predicted, truth, geometry, grid),
    }
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert float(found["covariance"]) > float(found["covariance_pred"]) > 0


def test_terms_without_a_weight_are_not_computed(network, scenes):
    spec = LossSpec().only(count=0.3, peak=2.0)
    assert {name for name in TERMS if getattr(spec, name)} == {"count", "peak"}
    assert (spec.diagonal, spec.off_diagonal, spec.count, spec.peak) == (1, 1, 0.3, 2.0)
    assert spec.active(noise_known=False) == ["count", "peak"]
    outputs = network(*network.features(scenes))
    mixed = covariances(outputs, scenes, HybridSpec())
    assert set(loss_terms(spec, network, outputs, mixed, scenes)) == {"count", "peak"}
    everything = LossSpec(**dict.fromkeys(TERMS, 1.0))
    assert everything.active(noise_known=False) == list(TERMS)
    assert set(TERMS) - set(everything.active(noise_known=True)) == {"disturbance"}
    assert set(TERMS) == set(LossSpec.model_fields) - {"diagonal", "off_diagonal"}


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


def test_a_single_slot_has_nothing_to_be_orthogonal_to():
    spec = SceneSpec(max_sources=1, num_sources=(1, 1))
    network, alone = Network(NetworkSpec(width=16, depth=2, heads=2, max_sources=1)), simulate(spec, 2, range(3))
    outputs = network(*network.features(alone))
    weights = LossSpec(**dict.fromkeys(TERMS, 1.0))
    terms = loss_terms(weights, network, outputs, covariances(outputs, alone, HybridSpec()), alone)
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms["orthogonality"] == terms["cross"] == 0


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
