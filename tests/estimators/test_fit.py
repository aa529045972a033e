"""The batched likelihood: derivatives, equivariance, retirement from the batch, precision, singular cases."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.estimators import fit as fits
from ris_hpo.estimators.box import box_steering_jacobian, to_box_coordinates, to_polar
from ris_hpo.estimators.channel import posterior_mean_channel
from ris_hpo.estimators.cost import (
    PowerStatistics,
    deterministic_cost,
    least_squares_log_power,
    power_cost,
    power_statistics,
    removal_cost,
    stochastic_cost,
)
from ris_hpo.estimators.counting import EvidenceSpec, order_scores
from ris_hpo.estimators.descent import descend
from ris_hpo.estimators.fit import Fit, deterministic_fit, joint_fit, stochastic_fit
from ris_hpo.estimators.moments import position_moments
from ris_hpo.estimators.observation import Observation
from ris_hpo.estimators.refinement import evidence, refine
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.grid import Region
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from tests.estimators.conftest import SMALL
from tests.properties import examples


def observed(count: int = 2, batch: int = 3) -> tuple[Observation, Tensor, Scenes]:
    scenes = simulate(
        SMALL, 3, range(batch), num_sources=torch.full((batch,), count), snr_db=torch.full((batch,), 10.0)
    )
    truth = scenes.truth
    u = to_box_coordinates(truth.azimuth, truth.elevation, truth.range_m)[:, :count]
    return Observation.of(scenes, dtype=torch.complex128), u, scenes


def disturbed(truth: Sources, scale: float, seed: int = 0) -> Sources:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, *truth.mask.shape, generator=generator) * scale
    return dataclasses.replace(
        truth,
        azimuth=truth.azimuth + 0.02 * noise[0],
        elevation=truth.elevation + 0.02 * noise[1],
        range_m=truth.range_m * (1 + 0.1 * noise[2]).clamp(0.5, 2),
    )


def numerical_gradient(function, x: Tensor, step: float = 1e-6) -> Tensor:
    unit = torch.eye(x.shape[1], dtype=x.dtype) * step
    return torch.stack([(function(x + e)[0] - function(x - e)[0]) / (2 * step) for e in unit], -1)


def test_gradients_agree_with_finite_differences():
    observation, u, _ = observed()
    x = u.flatten(1) * 1.01
    cost = lambda x: deterministic_cost(observation, x)  # noqa: E731
    expected = numerical_gradient(cost, x)
    torch.testing.assert_close(cost(x)[1], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    statistics = power_statistics(observation, u)
    log_power = least_squares_log_power(statistics)
    powers = lambda p: power_cost(statistics, p)  # noqa: E731
    expected = numerical_gradient(powers, log_power)
    torch.testing.assert_close(powers(log_power)[1], expected, rtol=1e-5, atol=1e-4)

    joint = lambda x: stochastic_cost(observation, x)  # noqa: E731
    x = torch.cat([x, log_power], -1)
    expected = numerical_gradient(joint, x)
    torch.testing.assert_close(joint(x)[1], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(power_cost(power_statistics(observation, u * 1.01), log_power)[0], joint(x)[0])


def test_box_jacobian_agrees_with_autograd():
    geometry = SMALL.geometry
    u = torch.tensor([0.4, -0.3, 0.7], dtype=torch.float64)

    def parts(u: Tensor) -> Tensor:
        return torch.view_as_real(box_steering_jacobian(geometry, u)[0])

    automatic = torch.view_as_complex(torch.autograd.functional.jacobian(parts, u).movedim(-1, 0).contiguous())
    torch.testing.assert_close(box_steering_jacobian(geometry, u)[1], automatic, atol=1e-9, rtol=1e-9)


def test_the_stochastic_cost_is_the_gaussian_likelihood():
    observation, u, _ = observed()
    power = torch.tensor([3.0, 0.5], dtype=torch.float64).expand(3, 2)
    g = observation.linearised(u)[0]
    covariance = (g * power[:, None, None]) @ g.mH + torch.eye(g.shape[2], dtype=g.dtype)
    y = observation.y.unsqueeze(-1)
    expected = torch.linalg.slogdet(covariance).logabsdet + (y.mH @ torch.linalg.solve(covariance, y)).real[..., 0, 0]
    found, _, information = stochastic_cost(observation, torch.cat([u.flatten(1), power.log()], -1))
    torch.testing.assert_close(found, expected.sum(1))
    assert torch.linalg.eigvalsh(information).min().item() > -1e-6


def test_deterministic_fit_finds_a_local_minimum_and_never_gets_worse():
    observation, u, _ = observed()
    start = u + 0.01
    before = deterministic_cost(observation, start.flatten(1))[0]
    fitted = deterministic_fit(observation, start, Region(), 30, 1e-9)
    cost, gradient, hessian = deterministic_cost(observation, fitted.flatten(1))
    assert (cost <= before).all()
    decrement = (gradient * torch.linalg.solve(hessian, gradient)).sum(-1)
    low, high = fitted.flatten(1).amin(), fitted.flatten(1).amax()
    assert low < high
    inside = ((fitted[..., 2] > 0.1001) & (fitted[..., 2] < 1.999)).all(-1)
    assert decrement[inside].abs().max().item() < 1e-4


def test_scenes_that_converge_early_do_not_disturb_the_others():
    """The batch shrinks as scenes converge; each ends where it would have ended alone."""
    observation, u, _ = observed(2, 8)
    start = u + torch.linspace(0, 0.03, 8, dtype=torch.float64)[:, None, None]
    together = deterministic_fit(observation, start, Region(), 40, 1e-8)
    for i in range(8):
        alone = deterministic_fit(observation[slice(i, i + 1)], start[i : i + 1], Region(), 40, 1e-8)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Bowl:
    centre: Tensor

    def __getitem__(self, index: Tensor) -> "Bowl":
        return Bowl(self.centre[index])

    def evaluated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        away = x - self.centre
        hessian = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64).expand(len(x), 2, 2)
        gradient = (hessian @ away.unsqueeze(-1)).squeeze(-1)
        return 0.5 * (away * gradient).sum(-1), gradient, hessian


@examples(40)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6))
def test_descent_solves_boxed_quadratics(centres):
    bowl = Bowl(torch.tensor(centres, dtype=torch.float64))
    low, high = torch.tensor([-1.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    stride = torch.full((2,), 10.0, dtype=torch.float64)
    start = torch.zeros(len(centres), 2, dtype=torch.float64)
    x, _ = descend(bowl, Bowl.evaluated, start, low, high, stride, 100, 1e-14)
    assert ((x >= low) & (x <= high)).all()
    gradient = bowl.evaluated(x)[1]
    free = (x > low) & (x < high)
    assert gradient[free].abs().max().item() < 1e-3 if free.any() else True
    assert (gradient[x <= low] >= -1e-3).all()
    assert (gradient[x >= high] <= 1e-3).all()


def test_refinement_reaches_the_bound_from_a_coarse_start(loud):
    truth = loud.truth
    found = refine(loud, disturbed(truth, 0.5), 30, covariance=True)
    error = torch.stack([found.azimuth - truth.azimuth, found.elevation - truth.elevation], -1).double()
    sigma = deterministic_crb(loud).diagonal(dim1=-2, dim2=-1)[..., :2].sqrt()
    ratio = (error / sigma)[truth.mask].abs()
    assert 0.5 < ratio.median().item() < 0.9  # |N(0, 1)| has median 0.674
    assert torch.equal(found.mask, truth.mask)
    assert torch.linalg.eigvalsh(found.covariance_m2[truth.mask].double()).min().item() > 0


def test_single_precision_products_are_within_tolerance(loud):
    """complex64 products move the estimate by far less than its standard deviation."""
    truth = loud.truth
    start = disturbed(truth, 0.2)
    double = refine(loud, start, 30)
    single = refine(loud, start, 30, double=False)
    sigma = deterministic_crb(loud).diagonal(dim1=-2, dim2=-1).sqrt()
    for i, name in enumerate(("azimuth", "elevation", "range_m")):
        shift = (getattr(double, name) - getattr(single, name)).abs().double()[truth.mask]
        # a scene stops when a step gains < 1e-3 nats, which is a move of about .03 sigma
        assert (shift / sigma[..., i][truth.mask]).quantile(0.9).item() < 0.05


def test_evidence_in_single_precision_is_within_a_tenth_of_a_nat(loud):
    truth = loud.truth
    for k in (1, 2, 3):
        scenes = loud[truth.num_sources == k]
        t = scenes.truth
        u = to_box_coordinates(t.azimuth, t.elevation, t.range_m)[:, :k]
        nll = [
            stochastic_fit(Observation.of(scenes, dtype=dtype), u, None, Region(), 0, 1e-6, positions=False).nll
            for dtype in (torch.complex64, torch.complex128)
        ]
        torch.testing.assert_close(nll[0], nll[1], atol=0.1, rtol=0)


def test_refine_keeps_empty_scenes_slots_and_existence(mixed):
    truth = mixed.truth
    mask = truth.mask.clone()
    mask[0] = False
    mask[1] = torch.tensor([False, True, False, False, False])
    init = dataclasses.replace(truth, mask=mask, existence=torch.full(mask.shape, 0.7))
    found = refine(mixed, init, 3)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.existence, init.existence)
    for name in ("azimuth", "elevation", "range_m", "power"):
        assert torch.isfinite(getattr(found, name)).all()
    assert refine(mixed[:0], init[:0], 3).mask.shape == (0, 5)


@pytest.mark.parametrize("fitted", [refine, evidence])
def test_starts_of_other_scenes_or_nowhere_are_refused(fitted, mixed):
    with pytest.raises(ConfigError, match="candidates for 1 scenes beside 10"):
        fitted(mixed, mixed.truth[:1])
    with pytest.raises(NumericalError, match="candidates: not finite"):
        fitted(mixed, dataclasses.replace(mixed.truth, azimuth=mixed.truth.azimuth * torch.nan))


def test_zero_steps_clip_to_the_region(mixed):
    init = dataclasses.replace(mixed.truth, range_m=mixed.truth.range_m * 100)
    found = refine(mixed, init, 0)
    assert found.range_m[mixed.truth.mask].max().item() <= 10.0001
    narrow = refine(mixed, mixed.truth, 5, region=Region(azimuth_deg=(-10, 10)))
    assert narrow.azimuth[mixed.truth.mask].rad2deg().abs().max().item() <= 10.001


@examples(10)
@given(st.floats(0.01, 100.0), st.floats(0, 6.28))
def test_scale_and_phase_of_the_data_change_nothing(scale, phase):
    scenes = simulate(SMALL, 9, range(2), num_sources=torch.tensor([2, 2]), snr_db=torch.full((2,), 15.0))
    turned = dataclasses.replace(
        scenes,
        y=(scenes.y * scale * torch.exp(torch.tensor(1j * phase))).to(torch.complex64),
        noise_power=scenes.noise_power * scale**2,
    )
    torch.testing.assert_close(evidence(turned, scenes.truth), evidence(scenes, scenes.truth), rtol=1e-4, atol=1e-2)
    one, other = refine(scenes, scenes.truth, 10), refine(turned, scenes.truth, 10)
    torch.testing.assert_close(other.azimuth, one.azimuth, atol=2e-4, rtol=0)
    mask = scenes.truth.mask
    torch.testing.assert_close(other.power[mask], one.power[mask] * scale**2, rtol=2e-2, atol=0)


def test_the_order_of_sources_and_snapshots_changes_nothing(mixed):
    order = torch.tensor([4, 2, 0, 1, 3]).expand(len(mixed), -1)
    torch.testing.assert_close(
        evidence(mixed, mixed.truth.take(order)), evidence(mixed, mixed.truth), rtol=1e-6, atol=1e-4
    )
    turned = dataclasses.replace(mixed, y=mixed.y.flip(1), ris_codes=mixed.ris_codes.flip(1))
    torch.testing.assert_close(evidence(turned, mixed.truth), evidence(mixed, mixed.truth), rtol=1e-6, atol=1e-4)


@examples(10)
@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_mirroring_the_surface_mirrors_the_sources(index, horizontally, vertically):
    scenes = simulate(SMALL, 10, range(index, index + 2), snr_db=torch.full((2,), 15.0))
    truth = scenes.truth
    rows, columns = SMALL.geometry.num_vertical, SMALL.geometry.num_horizontal
    order = torch.arange(rows * columns).reshape(rows, columns)
    order = order.flip(1) if horizontally else order
    order = (order.flip(0) if vertically else order).flatten()
    mirrored = dataclasses.replace(
        scenes,
        bs_ris_channel=scenes.bs_ris_channel[..., order],
        ris_codes=scenes.ris_codes[..., order],
        truth=dataclasses.replace(
            truth,
            azimuth=-truth.azimuth if horizontally else truth.azimuth,
            elevation=-truth.elevation if vertically else truth.elevation,
        ),
    )
    torch.testing.assert_close(evidence(mirrored, mirrored.truth), evidence(scenes, truth), rtol=1e-5, atol=1e-2)
    variance, other = (deterministic_crb(s).diagonal(dim1=-2, dim2=-1) for s in (scenes, mirrored))
    torch.testing.assert_close(other, variance, rtol=1e-4, atol=1e-12)


def test_evidence_prefers_the_truth():
    scenes = simulate(SMALL, 5, range(6), num_sources=torch.full((6,), 2), snr_db=torch.full((6,), 20.0))
    truth = scenes.truth
    right = evidence(scenes, truth)
    none = evidence(scenes, dataclasses.replace(truth, mask=torch.zeros_like(truth.mask)))
    torch.testing.assert_close(
        none, (scenes.y.abs().square().sum((1, 2)) / scenes.noise_power).double(), rtol=1e-5, atol=0
    )
    one = evidence(scenes, dataclasses.replace(truth, mask=truth.mask & (torch.arange(5) < 1)))
    assert (right < one).all()
    assert (one < none).all()


def test_a_stated_channel_error_raises_the_noise():
    spec = SceneSpec(channel_error_db=(-10.0, -10.0), snr_db=(30.0, 30.0))  # large enough to tell the line of sight
    scenes = simulate(spec, 5, range(200))
    truth = scenes.truth
    received = scenes.y.abs().square().mean((1, 2)).double()
    plain, aware = (  # the noise power that each divides by
        received / Observation.of(scenes, channel_error_db=error).y.abs().square().mean((1, 2))
        for error in (None, -10.0)
    )
    assert (aware > plain).all()
    steering = box_steering_jacobian(
        scenes.geometry, to_box_coordinates(truth.azimuth, truth.elevation, truth.range_m)
    )[0].to(torch.complex64)
    wave = torch.einsum("bkn,blk->bln", steering, scenes.symbols)
    channel, _ = posterior_mean_channel(scenes.bs_ris_channel, torch.full((200,), 0.1))
    left = scenes.y - torch.einsum("bmn,bln->blm", channel, scenes.ris_codes * wave)
    realised = left.abs().square().mean((1, 2)).double()
    # the error's power is random: right on average
    assert (realised / aware).mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rician", [1.0, 10.0])
def test_the_posterior_mean_of_the_channel_is_nearer_the_truth(rician):
    """Gain by theory s_w^2 / (s_w^2 + s_e^2), error smaller by it in the scattered part, none left out at no error."""
    spec = SceneSpec(channel_error_db=(-10.0, -10.0), rician_factor=(rician, rician))
    scenes = simulate(spec, 5, range(64))
    channel, gain = posterior_mean_channel(scenes.bs_ris_channel, torch.full((64,), 0.1))
    scatter = 1 / (rician + 1)
    assert gain.mean().item() == pytest.approx(scatter / (scatter + 0.1), abs=0.03)
    before = (scenes.bs_ris_channel - scenes.true_channel).abs().square().mean()
    after = (channel - scenes.true_channel).abs().square().mean()
    assert (after / before).item() == pytest.approx(scatter / (scatter + 0.1), abs=0.08)
    exact, gain = posterior_mean_channel(scenes.bs_ris_channel, torch.zeros(64))
    assert (gain == 1).all()
    torch.testing.assert_close(exact, scenes.bs_ris_channel)


def degenerate(kind: str) -> tuple[Scenes, Sources]:
    spec = SMALL
    if kind == "one snapshot":
        spec = SMALL.replaced({"num_snapshots": 1})
    elif kind == "more sources than antennas":
        spec = SMALL.replaced({"num_antennas": 2})
    elif kind == "one antenna and snapshot":
        spec = SMALL.replaced({"num_antennas": 1, "num_snapshots": 1})
    scenes = simulate(spec, 6, range(3), num_sources=torch.tensor([2, 3, 5]))
    truth = scenes.truth
    if kind == "zero y":
        scenes = dataclasses.replace(scenes, y=torch.zeros_like(scenes.y))
    elif kind == "equal sources":
        truth = dataclasses.replace(truth.take(torch.zeros(3, 5, dtype=torch.long)), mask=truth.mask)
    elif kind == "range at a bound":
        truth = dataclasses.replace(truth, range_m=torch.full_like(truth.range_m, 10.0))
    elif kind == "zero channel":
        scenes = dataclasses.replace(scenes, bs_ris_channel=torch.zeros_like(scenes.bs_ris_channel))
    elif kind == "planar wave":
        scenes = dataclasses.replace(scenes, geometry=SMALL.geometry.replaced({"wave": "planar"}))
    elif kind == "huge signal":
        scenes = dataclasses.replace(scenes, y=scenes.y * 1e6)
    return scenes, truth


KINDS = [
    "zero y",
    "equal sources",
    "range at a bound",
    "one snapshot",
    "more sources than antennas",
    "one antenna and snapshot",
    "zero channel",
    "planar wave",
    "huge signal",
]


@pytest.mark.parametrize("kind", KINDS)
def test_singular_cases_are_finite(kind):
    scenes, init = degenerate(kind)
    found = refine(scenes, init, 8, covariance=True)
    for name in ("azimuth", "elevation", "range_m", "power", "covariance_m2"):
        assert torch.isfinite(getattr(found, name)).all(), name
    assert torch.isfinite(evidence(scenes, found)).all()


def test_input_that_is_not_finite_is_a_named_error(mixed):
    broken = dataclasses.replace(mixed, y=mixed.y * torch.nan)
    with pytest.raises(NumericalError, match="must be finite"):
        refine(broken, mixed.truth, 3)
    with pytest.raises(NumericalError, match="must be finite"):
        evidence(dataclasses.replace(mixed, noise_power=mixed.noise_power * 0), mixed.truth)


def test_the_cost_of_a_removal_is_that_of_the_model_without_the_source():
    observation, u, _ = observed(3)
    statistics = power_statistics(observation, u)
    log_power = torch.tensor([3.0, 0.5, -2.0], dtype=torch.float64).expand(3, 3)
    whole = power_cost(statistics, log_power)[0]
    for source in range(3):
        rest = [each for each in range(3) if each != source]
        fewer = PowerStatistics(
            statistics.gram[..., rest, :][..., rest], statistics.matched[..., rest], statistics.energy
        )
        without = power_cost(fewer, log_power[:, rest])[0]
        torch.testing.assert_close(removal_cost(statistics, log_power)[:, source], without - whole)


def test_single_precision_gives_the_cost_to_its_digits():
    observation, u, scenes = observed(3)
    x = torch.cat([u.flatten(1), torch.ones(3, 3, dtype=torch.float64)], -1)
    single = Observation.of(scenes, algebra=torch.complex64)
    assert single.y.dtype == torch.complex64
    for rough, exact in zip(stochastic_cost(single, x), stochastic_cost(observation, x), strict=True):
        assert rough.dtype == torch.float64
        assert not torch.equal(rough, exact)
        torch.testing.assert_close(rough, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    assert single.double().y.dtype == torch.complex128


def test_a_fit_goes_on_from_what_is_known_of_it(monkeypatch):
    """Two steps at once are one step, then one from its result, for one evaluation less than with a new start."""
    observation, u, _ = observed(2)
    log_power, evaluations = torch.ones(3, 2, dtype=torch.float64), []

    def counted(data, x):
        evaluations.append(len(x))
        return stochastic_cost(data, x)

    monkeypatch.setattr(fits, "stochastic_cost", counted)
    first = joint_fit(observation, u, log_power, Region(), 1, 0)
    assert first.evaluated(observation) is not None
    assert len(evaluations) == 2
    torch.testing.assert_close(first.evaluation, first.plain().evaluated(observation))
    evaluations.clear()
    joint_fit(observation, first.u, first.log_power, Region(), 1, 0, first.evaluation)
    assert len(evaluations) == 1


def test_moments_are_the_inverse_information_where_the_range_is_sharp():
    scenes = simulate(
        SceneSpec(range_m=(0.5, 1.5)),
        3,
        range(6),
        num_sources=torch.ones(6, dtype=torch.long),
        snr_db=torch.full((6,), 25.0),
    )
    truth = scenes.truth
    observation = Observation.of(scenes, dtype=torch.complex128)
    u = to_box_coordinates(truth.azimuth, truth.elevation, truth.range_m)[:, :1]
    fit = stochastic_fit(observation, u, None, Region(), 30, 1e-8)
    mode = position_moments(observation, fit, Region()).position
    mean, covariance, _ = position_moments(observation, fit, Region(), mean=True)
    torch.testing.assert_close(mean, mode, atol=2e-3, rtol=0)
    torch.testing.assert_close(mode, torch.stack(to_polar(fit.u), -1))
    assert (covariance.diagonal(dim1=-2, dim2=-1) < 0.01).all()


def test_an_untold_range_has_the_moments_of_its_prior():
    scenes = simulate(SMALL, 3, range(2), num_sources=torch.ones(2, dtype=torch.long))
    observation = Observation.of(dataclasses.replace(scenes, y=scenes.y * 0), dtype=torch.complex128)
    fit = Fit(
        torch.tensor([[[0.0, 0.0, 0.4]]], dtype=torch.float64).expand(2, 1, 3),
        torch.full((2, 1), -12.0, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    mean, covariance, _ = position_moments(observation, fit, Region(), mean=True)
    torch.testing.assert_close(mean[..., 2], torch.full((2, 1), 5.25, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(
        covariance[..., 0, 0], torch.full((2, 1), 9.5**2 / 12, dtype=torch.float64), rtol=0.05, atol=0
    )


def test_two_strong_sources_at_almost_one_place_have_moments_in_single_precision(caplog):
    loud = torch.full((8,), 50.0)
    scenes = simulate(SMALL, 3, range(8), num_sources=torch.ones(8, dtype=torch.long), snr_db=loud)
    truth = scenes.truth
    u = to_box_coordinates(truth.azimuth, truth.elevation, truth.range_m)[:, :1].clamp(-0.8, 0.8)
    twice = torch.cat([u, u + 1e-5], dim=1)
    fit = Fit(twice, torch.full((8, 2), 15.0, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    moments = position_moments(Observation.of(scenes), fit, Region())
    exact = position_moments(Observation.of(scenes, dtype=torch.complex128), fit, Region())
    torch.testing.assert_close(moments.position, exact.position)
    scores, _ = order_scores(Observation.of(scenes), [fit], Region(), EvidenceSpec())
    assert scores.isfinite().all()
