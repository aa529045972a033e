"""Scenes without a source: drawn, and answered with none; no source is lost for it."""

import dataclasses

import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.estimators import LikelihoodSpec, deterministic_ml, ols, spectrum_maxima
from ris_hpo.estimators.counting import CountWeights, EvidenceSpec, null_nll, posterior_of_orders
from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.scene import SceneSpec, simulate
from tests.estimators.conftest import COARSE, SMALL

FAST = LikelihoodSpec(grid=COARSE)


def test_scenes_without_a_source_are_noise_at_the_stated_snr():
    spec = SceneSpec(num_sources=(0, 2), snr_db=(7.0, 7.0))
    scenes = simulate(spec, 3, range(300))
    empty = scenes[scenes.truth.num_sources == 0]
    assert 60 < len(empty) < 140
    assert (empty.truth.power == 0).all()
    received = empty.y.abs().square().mean((1, 2)) / empty.noise_power
    assert received.mean().item() == pytest.approx(1, abs=0.02)
    channel = empty.bs_ris_channel.abs().square().mean((1, 2))
    torch.testing.assert_close(empty.noise_power, channel / 10**0.7)
    # a source of unit power is received with mean |H_mn|^2 on average
    one = simulate(SceneSpec(power_spread_db=0.0), 3, range(300), num_sources=torch.ones(300, dtype=torch.long))
    clean = one.noise_power * 10 ** (one.snr_db / 10)
    share = clean / one.bs_ris_channel.abs().square().mean((1, 2))
    assert share.mean().item() == pytest.approx(1, abs=0.15)


def test_drawing_no_source_leaves_other_scenes_as_they_are():
    count = torch.tensor([0, 2, 3])
    mixed, full = (simulate(SMALL, 4, range(3), num_sources=k) for k in (count, torch.tensor([1, 2, 3])))
    assert torch.equal(mixed.y[1:], full.y[1:])
    with pytest.raises(ConfigError, match=r"must lie within 0\.\.5"):
        simulate(SMALL, 4, range(1), num_sources=torch.tensor([-1]))


def test_ml_reports_none_in_noise_and_misses_no_single_weak_source():
    zero, one = torch.zeros(40, dtype=torch.long), torch.ones(40, dtype=torch.long)
    noise = simulate(SMALL, 520, range(40), num_sources=zero)
    found = deterministic_ml(noise, FAST)
    assert (found.num_sources == 0).double().mean().item() >= 0.95
    weak = simulate(SMALL, 521, range(40), num_sources=one, snr_db=torch.full((40,), -3.0))
    found = deterministic_ml(weak, FAST)
    assert (found.num_sources >= 1).all()
    assert found.existence[:, 0].min().item() > 0.9


def test_a_prior_that_has_never_seen_none_does_not_decide_on_none():
    zero = torch.zeros(12, dtype=torch.long)
    noise = simulate(SMALL, 522, range(12), num_sources=zero)
    candidates = spectrum_maxima(noise, 32, FAST)
    never = torch.log_softmax(torch.tensor([-30.0, 0.0, 0.0, 0.0, 0.0, 5.0]), -1).expand(12, -1)
    found = ols(noise, candidates, FAST, log_prior=never)
    assert (found.num_sources == 0).double().mean().item() >= 0.9
    two = simulate(SMALL, 523, range(4), num_sources=torch.full((4,), 2), snr_db=torch.full((4,), 15.0))
    sure = torch.full((4, 6), -30.0)
    sure[:, 3] = 0
    found = ols(two, spectrum_maxima(two, 32, FAST), FAST, log_prior=sure)
    # how many is the prior's business as before, unless the third is one of the two again
    assert sorted(found.num_sources.tolist())[1:] == [3] * 3


def test_the_posterior_with_a_prior_is_evidence_on_none_times_the_mixture_on_the_rest():
    scores = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    spec = EvidenceSpec(temperature=1.0, prior_weight=1.0)
    prior = torch.log_softmax(torch.tensor([[-50.0, 0.0, 2.0]], dtype=torch.float64), -1)
    allowed = torch.ones(1, 3, dtype=torch.bool)
    found = posterior_of_orders(scores, spec, prior, allowed).exp()
    some = (-scores[:, 1:]).exp().mean(-1)
    none = (-scores[:, 0]).exp() / ((-scores[:, 0]).exp() + some)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], none)
    torch.testing.assert_close(found[0, 2] / found[0, 1], (prior[0, 2] - 1 - prior[0, 1]).exp())
    one = torch.ones(1, dtype=torch.float64)
    weights = CountWeights(one, one, one, torch.tensor([[99.0, 0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(posterior_of_orders(scores, spec, prior, allowed, weights).exp()[:, 0], none)
    only = torch.tensor([[True, False, False]])
    assert posterior_of_orders(scores, spec, prior, only).tolist() == [[0.0, -torch.inf, -torch.inf]]
    several = torch.tensor([[False, True, True]])
    assert posterior_of_orders(scores, spec, prior, several)[0, 0].item() == -torch.inf


def test_with_the_noise_unknown_none_has_the_likelihood_of_the_best_noise():
    noise = simulate(SMALL, 524, range(4), num_sources=torch.zeros(4, dtype=torch.long))
    size = noise.y[0].numel()
    for factor in (0.5, 1.0, 3.0):
        told = dataclasses.replace(noise, noise_power=noise.noise_power * factor)
        observation = Observation.of(told)
        powers = torch.linspace(0.2, 3, 4001, dtype=torch.float64) / factor  # in units of the noise power as told
        energy = null_nll(observation).unsqueeze(-1)
        brute = (size * powers.log() + energy / powers).amin(-1)
        torch.testing.assert_close(null_nll(observation, noise_known=False), brute, atol=1e-2, rtol=0)
