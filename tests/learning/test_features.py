from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.estimators.channel import posterior_mean_channel, split_channel
from ris_hpo.learning.features import (
    back_projection,
    estimated_loading,
    noise_loading,
    num_context,
    spectral_features,
    spectrum,
    token_features,
    whiten,
)
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.grid import Grid, GridSpec, Region, dictionary, is_symmetric
from ris_hpo.physics.scene import SceneSpec, grid_of_cells, simulate
from tests.properties import examples


@examples(20)
@given(
    st.sampled_from([2, 3, 4, 6]),
    st.sampled_from([2, 4, 5]),
    st.integers(3, 9),
    st.integers(3, 9),
    st.integers(1, 3),
    st.booleans(),
)
def test_spectrum_by_mirror_symmetry_is_the_plain_product(n_h, n_v, num_v, num_w, num_rho, lopsided):
    geometry = Geometry(num_horizontal=n_h, num_vertical=n_v)
    region = Region(azimuth_deg=(-40, 60)) if lopsided else Region()
    grid = Grid(num_v=num_v, num_w=num_w, num_rho=num_rho, region=region)
    assert is_symmetric(geometry, grid) == (not lopsided and n_h % 2 == 0 and n_v % 2 == 0)
    z = torch.randn(5, 3, n_h * n_v, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    plain = (z.conj() @ dictionary(geometry, grid, z.device)).abs().square().sum(1)
    assert torch.allclose(spectrum(geometry, z, grid).flatten(1), plain, rtol=1e-4, atol=1e-5)


def test_residual_pass_takes_the_strongest_source_out():
    scenes = grid_of_cells(SceneSpec(), 3, [20.0], [1], 16)
    grid = GridSpec().on(Geometry())
    features = spectral_features(scenes, grid, passes=1, noise_known=True)
    strongest = features.relief.flatten(1).argmax(-1)
    residual = features.maps[:, grid.num_rho :].flatten(1)
    rank = (residual > residual.gather(1, strongest.unsqueeze(1))).float().mean(-1)
    assert (rank > 0.9).all()  # the cell just taken out is among the lowest afterwards
    share = features.context[:, -2].exp()  # energy left over energy before
    assert ((share > 0) & (share < 1)).all()


def test_whitening_makes_isotropic_sources_white():
    scenes = grid_of_cells(SceneSpec(rician_factor=(5, 5)), 3, [20.0], [1], 4)
    _, channel = whiten(scenes, noise_loading(scenes, noise_known=True))
    gram = channel @ channel.mH
    before = torch.linalg.eigvalsh(scenes.bs_ris_channel @ scenes.bs_ris_channel.mH)
    after = torch.linalg.eigvalsh(gram)
    assert ((after[:, -1] / after[:, 0]) < 0.1 * (before[:, -1] / before[:, 0])).all()


@pytest.mark.parametrize("error_db", [None, (-10.0, -10.0)])
def test_the_noise_is_estimated_where_it_is_not_told(error_db):
    """Logarithm of 1 / snr within 1 (4.3 dB) on average, an error of the known channel counted as noise."""
    scenes = simulate(SceneSpec(channel_error_db=error_db), 3, range(256))
    told = 1 / 10 ** (scenes.snr_db / 10) + (0.0 if error_db is None else 0.1)
    difference = (estimated_loading(scenes) / told.clamp(0.003, 5.0)).log()
    assert difference.abs().mean() < 1
    hidden = dataclasses.replace(scenes, noise_power=torch.full_like(scenes.noise_power, torch.nan))
    assert torch.equal(estimated_loading(hidden), estimated_loading(scenes))


def test_back_projection_is_the_adjoint():
    scenes = simulate(SceneSpec(), 3, range(4))
    z = back_projection(scenes.bs_ris_channel, scenes.ris_codes, scenes.y)
    brute = torch.einsum("blmn,blm->bln", scenes.sensing_matrices().conj(), scenes.y)
    assert torch.allclose(z, brute, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise_known", [True, False])
@pytest.mark.parametrize("passes", [0, 3])
def test_features_are_finite_on_silence(passes, noise_known):
    """Zero y: nothing to see is not an error of the front-end."""
    scenes = simulate(SceneSpec(), 3, range(2))
    silent = type(scenes)(scenes.geometry, 0 * scenes.y, scenes.bs_ris_channel, scenes.ris_codes, scenes.noise_power)
    features = spectral_features(silent, GridSpec().on(Geometry()), passes=passes, noise_known=noise_known)
    assert all(torch.isfinite(part).all() for part in features)


def test_the_context_by_hand():
    """Known noise: log10 of the received over noise power less one, and of L; then spread and peak of each spectrum."""
    scenes = grid_of_cells(SceneSpec(num_snapshots=20), 3, [10.0], [2], 3)
    grid = Grid(num_v=9, num_w=5, num_rho=2)
    features = spectral_features(scenes, grid, passes=1, noise_known=True)
    received = scenes.y.abs().square().mean((1, 2))
    context = features.context
    assert context.shape == (3, num_context(1, noise_known=True)) == (3, 8)
    torch.testing.assert_close(context[:, 0], (received / scenes.noise_power - 1).log10(), rtol=1e-4, atol=1e-4)
    assert context[:, 1].tolist() == pytest.approx([math.log10(20)] * 3)
    y, channel = whiten(scenes, noise_loading(scenes, noise_known=True))
    power = spectrum(scenes.geometry, back_projection(channel, scenes.ris_codes, y), grid)
    log = (power / power.mean((1, 2, 3), keepdim=True)).log()
    spread = log.flatten(1).std(-1)
    torch.testing.assert_close(features.maps[:, :2], log / spread[:, None, None, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.relief, log - log.amax((1, 2, 3), keepdim=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context[:, 2], spread, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context[:, 3], (log / spread[:, None, None, None]).amax((1, 2, 3)) / 4)
    energy, strongest = y.abs().square().sum((1, 2)), log.flatten(1).argmax(-1)
    atoms = dictionary(scenes.geometry, grid, scenes.device).mT[strongest]
    columns = torch.einsum("bmn,bln,bn->blm", channel, scenes.ris_codes, atoms)
    along = (columns.conj() * y).sum(-1).abs().square() / columns.abs().square().sum(-1)
    left = energy - along.sum(-1)
    torch.testing.assert_close(context[:, 6], (left / energy).log(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(context[:, 7], (left / energy).log1p(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise_known", [True, False])
def test_tokens_are_both_back_projections_at_unit_power(noise_known):
    scenes = simulate(SceneSpec(), 3, range(2))
    features = token_features(scenes, noise_known=noise_known)
    assert features.context.shape[1] == num_context(None, noise_known=noise_known)
    matched, whitened = (torch.complex(*part.chunk(2, -1)) for part in features.tokens.chunk(2, -1))
    y, channel = whiten(scenes, noise_loading(scenes, noise_known=noise_known))
    for found, z in (
        (matched, back_projection(scenes.bs_ris_channel, scenes.ris_codes, scenes.y)),
        (whitened, back_projection(channel, scenes.ris_codes, y)),
    ):
        power = z.abs().square().mean((1, 2), keepdim=True)
        torch.testing.assert_close(found, z / power.sqrt(), rtol=1e-3, atol=1e-4)


def test_a_hidden_noise_brings_what_the_channel_tells_of_its_own_error():
    """The share of the scattered part, and the logit of its gain with half the noise put down to the channel."""
    scenes = simulate(SceneSpec(channel_error_db=(-10, -10)), 3, range(3))
    context = token_features(scenes, noise_known=False).context
    direct, scattered = split_channel(scenes.bs_ris_channel)
    energies = (part.abs().square().sum((1, 2)) for part in (scattered, direct))
    torch.testing.assert_close(context[:, 2], next(energies).log() - next(energies).log(), rtol=1e-4, atol=1e-4)
    loading = estimated_loading(scenes)
    torch.testing.assert_close(context[:, 0], -loading.log10())
    _, gain = posterior_mean_channel(scenes.bs_ris_channel, (loading / 2).clamp(1e-3, 0.05))
    torch.testing.assert_close(context[:, 3], gain.clamp(0.01, 0.99).logit(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [6, 7])
def test_a_dictionary_too_large_to_keep_gives_the_same_spectrum(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ris_hpo.physics import grid as module

    geometry = Geometry(num_horizontal=columns, num_vertical=4)
    grid = GridSpec().on(geometry)
    z = torch.randn(3, 5, geometry.num_elements, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    kept = module.spectrum(geometry, z, grid)
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 16 * grid.num_v * grid.num_w)  # two snapshots at once
    torch.testing.assert_close(module.spectrum(geometry, z, grid), kept, rtol=1e-4, atol=1e-4)
