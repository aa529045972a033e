"""The way from outputs to sources: each setting against outputs made by hand, for which the answer is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.estimators import fit
from ris_hpo.estimators.channel import split_channel
from ris_hpo.learning.inference import (
    InferenceSpec,
    find_sources,
    localize,
    network_sources,
    predict,
    refinement,
    sharpened,
)
from ris_hpo.learning.losses import label_factor
from ris_hpo.learning.network import Network, NetworkSpec, Outputs
from ris_hpo.physics.array import to_cosines
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import scene_errors

SPEC = NetworkSpec(width=16, depth=1, heads=2, residual_passes=0, cell_width=0)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network(SPEC).eval()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Two sources of equal power, at least 16 deg apart, at 25 dB."""
    drawn = simulate(SceneSpec(power_spread_db=0), 5, range(64), num_sources=torch.full((64,), 2))
    azimuth = drawn.truth.azimuth
    apart = (azimuth[:, 0] - azimuth[:, 1]).abs() > math.radians(16)
    near = (drawn.truth.range_m[:, :2] < 4).all(-1)
    kept = torch.nonzero(apart & near).squeeze(-1)[:6]
    return simulate(
        SceneSpec(power_spread_db=0),
        5,
        kept,
        num_sources=torch.full((len(kept),), 2),
        snr_db=torch.full((len(kept),), 25.0),
    )


def outputs_at(places: Sources, *, log_count: torch.Tensor | None = None, proposals: int = 64) -> Outputs:
    """Outputs whose best proposals are these places, the others far from any source, with a factor spanned by them."""
    batch = len(places)
    v, w, rho = to_cosines(places.azimuth, places.elevation, places.range_m)
    rest = proposals - places.max_sources
    away = torch.linspace(-0.4, 0.4, rest).expand(batch, -1)
    counts = torch.full((batch, 6), -20.0) if log_count is None else log_count
    if log_count is None:
        counts = counts.scatter(1, places.num_sources.unsqueeze(-1), 0.0)
    return Outputs(
        existence=torch.cat([torch.where(places.mask, 6.0, -6.0), torch.full((batch, rest), -9.0)], 1),
        v=torch.cat([v, away], 1),
        w=torch.cat([w, away.flip(-1)], 1),
        rho=torch.cat([rho, torch.full((batch, rest), 0.2)], 1),
        power=torch.ones(batch, proposals),
        log_count=torch.log_softmax(counts, -1),
        factor=label_factor(places, SPEC.geometry),
        noise_level=torch.full((batch,), 1e-3),
        disturbance=torch.full((batch,), 0.01),
        channel_gain=torch.ones(batch),
    )


def moved(places: Sources, azimuth_deg: float, range_m: float) -> Sources:
    return dataclasses.replace(
        places, azimuth=places.azimuth + math.radians(azimuth_deg), range_m=places.range_m + range_m
    )


def test_the_fast_path_finds_the_same_sources_with_less_work(network, scenes, monkeypatch):
    """From proposals 2 deg off; work is counted in evaluations of the likelihood, scenes times sources each."""
    evaluate, work = fit.stochastic_cost, []

    def counted(observation, x):
        work.append(x.numel())
        assert observation.y.dtype == precision
        return evaluate(observation, x)

    monkeypatch.setattr(fit, "stochastic_cost", counted)
    outputs, spec = outputs_at(moved(scenes.truth, 2, 0.3)), InferenceSpec()
    precision = torch.complex128
    thorough = find_sources(network, scenes, spec.of("pipeline"), "pipeline", outputs=outputs)
    long, precision = sum(work), torch.complex64
    work.clear()
    fast = find_sources(network, scenes, spec.of("fast"), "fast", outputs=outputs)
    assert sum(work) < 0.7 * long
    assert torch.equal(fast.num_sources, scenes.truth.num_sources)
    torch.testing.assert_close(fast.positions()[fast.mask], thorough.positions()[fast.mask], atol=0.02, rtol=0)
    plain = network_sources(outputs, spec)
    assert torch.equal(find_sources(network, scenes, spec, "network", outputs=outputs).azimuth, plain.azimuth)
    assert spec.of("network") is spec


def test_scenes_that_do_not_fit_are_searched_again(network, scenes):
    """The second source is not among the proposals, and what it leaves shows at 25 dB."""
    outputs = outputs_at(scenes.truth, proposals=6)
    away = {name: getattr(outputs, name).clone() for name in ("v", "w", "rho")}
    for name, value in {"v": 0.75, "w": 0.45, "rho": 0.1}.items():
        away[name][1:, 1:] = value  # in all scenes but the first
    outputs, fast = outputs._replace(**away), InferenceSpec().of("fast")
    assert fast.second_search
    fast = fast.replaced({"likelihood.search.residual_maxima": 0})  # so that the first search cannot find it
    once = find_sources(network, scenes, fast.replaced({"second_search": False}), "fast", outputs=outputs)
    again = find_sources(network, scenes, fast, "fast", outputs=outputs)
    assert not once.fits[1:].any()
    assert again.fits.all()
    error = scene_errors(again, scenes.truth)
    assert error.scores().success == 1
    assert torch.equal(once.azimuth[0], again.azimuth[0])
    known = find_sources(network, scenes, fast, "fast", num_sources=scenes.truth.num_sources, outputs=outputs)
    assert scene_errors(known, scenes.truth).scores().success == 1


@pytest.mark.parametrize("localizer", ["music", "mvdr"])
def test_covariance_localizers_find_what_r_eff_holds(localizer, network, scenes):
    """R_eff of the true places: with another matrix, the identity for one, peaks stand anywhere."""
    spec = InferenceSpec(localizer=localizer)
    found = localize(network, scenes, spec, outputs=outputs_at(scenes.truth))
    assert torch.equal(found.num_sources, scenes.truth.num_sources)
    assert scene_errors(found, scenes.truth).success().all()


def test_r_eff_takes_its_share_of_the_snapshots(network, scenes):
    """Shifted places in the factor: with beta the sample covariance enters, and with it the result."""
    outputs = outputs_at(moved(scenes.truth, 4, 0))
    plain, mixed = (
        localize(network, scenes, InferenceSpec(localizer="music").replaced({"hybrid.beta": beta}), outputs=outputs)
        for beta in (0.0, 0.5)
    )
    assert not torch.allclose(plain.azimuth, mixed.azimuth, atol=1e-5)


def test_sharpening_moves_the_slots_onto_the_sources(network, scenes):
    off = outputs_at(moved(scenes.truth, 1.5, 0.3))
    spec = InferenceSpec(localizer="music")
    errors = {}
    for steps in (0, 10):
        found = localize(network, scenes, spec.replaced({"hybrid.sharpening": steps}), outputs=off)
        errors[steps] = float(scene_errors(found, scenes.truth).error[:, :2, 0].max())
    assert errors[0] > math.radians(1)
    assert errors[10] < math.radians(0.5)
    sharp = sharpened(network, scenes, off, spec.replaced({"hybrid.sharpening": 10}))
    columns = sharp.factor[:, :, :2].abs().square().sum(1)  # powers' shares, since a steering vector has unit norm
    assert torch.allclose(columns.sum(-1), torch.ones(len(scenes)), atol=1e-4)
    assert (columns > 0.2).all()  # equal powers, as 16 snapshots tell them


def test_the_network_path_is_the_best_slots():
    """By hand: the count head's mode where it is confident, the sum of existences elsewhere."""
    nothing = torch.zeros(3, 5)
    log_count = torch.tensor([[0.05, 0.05, 0.05, 0.8, 0.05, 0.0], [0.3, 0.1, 0.2, 0.1, 0.2, 0.1], [0.0] * 5 + [1.0]])
    outputs = Outputs(
        existence=torch.logit(torch.tensor([[0.9, 0.9, 0.1, 0.05, 0.05], [0.9, 0.8, 0.7, 0.2, 0.1], [0.01] * 5])),
        v=torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]).expand(3, -1),
        w=nothing,
        rho=nothing + 0.5,
        power=nothing + torch.arange(5.0),
        log_count=log_count.clamp(min=1e-9).log(),
        factor=torch.zeros(3, 4, 5, dtype=torch.complex64),
        noise_level=nothing[:, 0],
        disturbance=nothing[:, 0],
        channel_gain=nothing[:, 0],
    )
    trusting = network_sources(outputs, InferenceSpec(count_confidence=0))
    assert trusting.num_sources.tolist() == [3, 0, 5]
    careful = network_sources(outputs, InferenceSpec(count_confidence=0.5))
    assert careful.num_sources.tolist() == [3, 3, 5]  # .9 + .8 + .7 + .2 + .1 = 2.7 existing slots
    wary = network_sources(outputs, InferenceSpec(count_confidence=1))
    assert wary.num_sources.tolist() == [2, 3, 5]  # a probability of 1 reaches a confidence of 1
    unsure = outputs._replace(log_count=torch.full((3, 6), -math.log(6)))
    assert network_sources(unsure, InferenceSpec(count_confidence=1)).num_sources.tolist() == [2, 3, 1]  # at least 1
    told = network_sources(outputs, InferenceSpec(count_confidence=1), torch.tensor([1, 2, 0]))
    assert told.num_sources.tolist() == [1, 2, 0]
    assert told.mask[1].tolist() == [True, True, False, False, False]
    assert told.azimuth[0].tolist() == pytest.approx([math.asin(v) for v in (0.1, 0.2, 0.3, 0.4, 0.5)], rel=1e-5)
    assert told.range_m[0].tolist() == pytest.approx([2.0] * 5)
    assert told.power[0].tolist() == [0, 1, 2, 3, 4]
    assert told.existence[0].tolist() == pytest.approx([0.9, 0.9, 0.1, 0.05, 0.05], rel=1e-4)


def test_polish_starts_from_the_proposals_and_from_no_others(network, scenes):
    """The sources' places stand behind 32 others: among 16 proposals they are not found, among 64 they are."""
    outputs = outputs_at(scenes.truth)
    late = outputs._replace(
        **{name: getattr(outputs, name).roll(32, 1) for name in ("v", "w", "rho", "existence", "power")}
    )
    spec = InferenceSpec().replaced({"likelihood.search.greedy_steps": 0, "likelihood.search.residual_maxima": 0})
    spec = spec.replaced({"likelihood.search.final_steps": 0})
    known = scenes.truth.num_sources
    few, many = (
        localize(network, scenes, spec.replaced({"proposals": count}), num_sources=known, outputs=late)
        for count in (16, 64)
    )
    assert scene_errors(many, scenes.truth).scores().rmspe_m < 0.2
    assert scene_errors(few, scenes.truth).scores().rmspe_m > 0.5


def test_the_last_steps_refine_and_the_covariances_are_widened(network, scenes):
    off = outputs_at(moved(scenes.truth, 1.0, 0.1))
    fixed = InferenceSpec().replaced({"likelihood.search.greedy_steps": 0, "likelihood.search.residual_maxima": 0})
    known = scenes.truth.num_sources
    found = {
        steps: localize(
            network, scenes, fixed.replaced({"likelihood.search.final_steps": steps}), num_sources=known, outputs=off
        )
        for steps in (0, 10)
    }
    errors = {steps: scene_errors(each, scenes.truth).scores().rmse_azimuth_deg for steps, each in found.items()}
    assert errors[0] > 0.5
    assert errors[10] < 0.3
    wide = localize(network, scenes, fixed.replaced({"covariance_scale": 2.0}), num_sources=known, outputs=off)
    assert torch.equal(wide.covariance_m2, 2 * found[10].covariance_m2)
    assert torch.equal(wide.range_m, found[10].range_m)


@pytest.mark.parametrize("by", ["weight", "mixing"])
def test_the_count_head_outvotes_the_evidence_when_it_is_given_the_weight(by, network, scenes):
    """The head says 3 sources where there are 2; evidence alone says 2."""
    wrong = torch.full((len(scenes), 6), -4.0)
    wrong[:, 3] = 0.0
    outputs = outputs_at(scenes.truth, log_count=wrong)
    spec = InferenceSpec()
    if by == "weight":
        loud, quiet = (
            spec.replaced({"likelihood.evidence.prior_weight": 100.0}),
            spec.replaced({"likelihood.evidence.prior_weight": 0.0}),
        )
        found = [localize(network, scenes, each, outputs=outputs) for each in (quiet, loud)]
    else:
        raw = torch.zeros(len(scenes), 9)
        raw[:, 1] = 8.0  # no saturation
        head_alone, evidence_alone = raw.clone(), raw.clone()
        head_alone[:, 0], head_alone[:, 2] = -8, 5
        evidence_alone[:, 0], evidence_alone[:, 2] = 0, -8
        found = [
            localize(network, scenes, spec, outputs=outputs._replace(count_mixing=each))
            for each in (evidence_alone, head_alone)
        ]
    assert set(found[0].num_sources.tolist()) == {2}
    three = found[1].num_sources == 3  # the others would have one of the two twice
    assert (found[1].num_sources[~three] == 2).all()
    assert three.double().mean() >= 0.5
    assert (found[1].existence[three, 2] > 0.9).all()


def test_a_network_that_is_not_told_the_noise_uses_its_own(scenes):
    network = Network(SPEC.replaced({"noise_known": False}))
    outputs = outputs_at(scenes.truth)._replace(
        disturbance=torch.full((len(scenes),), 0.25), channel_gain=torch.full((len(scenes),), 0.5)
    )
    hidden = dataclasses.replace(scenes, noise_power=torch.full_like(scenes.noise_power, torch.nan))
    seen, candidates, _ = refinement(network, hidden, InferenceSpec(proposals=7), outputs)
    torch.testing.assert_close(seen.noise_power, 0.25 * scenes.y.abs().square().mean((1, 2)))
    direct, scattered = split_channel(scenes.bs_ris_channel)
    torch.testing.assert_close(seen.bs_ris_channel, direct + 0.5 * scattered)
    assert candidates.v.shape == (len(scenes), 7)
    for localizer in ("polish", "music", "mvdr"):
        spec = InferenceSpec(localizer=localizer)
        plain, blind = (localize(network, each, spec, outputs=outputs) for each in (scenes, hidden))
        assert torch.equal(plain.azimuth, blind.azimuth), localizer
    known = Network(SPEC)
    assert refinement(known, scenes, InferenceSpec(), outputs)[0] is scenes


def test_polish_searches_as_many_sources_as_network_and_settings_both_allow(scenes):
    for network_most, settings_most, counts in ((3, 5, (0, 3)), (5, 5, (0, 5)), (5, 2, (0, 2))):
        network = Network(SPEC.replaced({"max_sources": network_most}))
        most = {"max_sources": settings_most, "num_sources": (0, settings_most)}
        spec = InferenceSpec().replaced({f"likelihood.{name}": value for name, value in most.items()})
        likelihood = refinement(network, scenes, spec, outputs_at(scenes.truth))[2]
        assert (likelihood.max_sources, likelihood.num_sources) == (counts[1], counts)


def test_the_confidence_in_a_count_is_a_probability():
    for confidence in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="count_confidence"):
            InferenceSpec().replaced({"count_confidence": confidence})


def test_polish_searches_5_to_512_proposals():
    assert [InferenceSpec(proposals=number).proposals for number in (5, 512)] == [5, 512]
    for number in (4, 513):
        with pytest.raises(ConfigError, match="proposals"):
            InferenceSpec().replaced({"proposals": number})


def test_prediction_neither_trains_nor_depends_on_the_batch(scenes):
    torch.manual_seed(0)
    network = Network(SPEC.replaced({"dropout": 0.5})).train()
    once, again, alone = predict(network, scenes), predict(network, scenes), predict(network, scenes, batch=1)
    assert network.training  # as it was
    assert torch.equal(once.v, again.v)  # no dropout
    torch.testing.assert_close(once.log_count, alone.log_count, rtol=1e-4, atol=1e-5)
    assert once.cell_logit is None
    assert not once.v.requires_grad
