from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.learning.features import (
    back_projection,
    estimated_loading,
    noise_loading,
    spectral_features,
    spectrum,
    whiten,
)
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.grid import GridSpec, Region, dictionary, is_symmetric
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
    grid = GridSpec(num_v=num_v, num_w=num_w, num_rho=num_rho, region=region)
    assert is_symmetric(geometry, grid) == (not lopsided and n_h % 2 == 0 and n_v % 2 == 0)
    z = torch.randn(5, 3, n_h * n_v, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    plain = (z.conj() @ dictionary(geometry, grid, z.device)).abs().square().sum(1)
    assert torch.allclose(spectrum(geometry, z, grid).flatten(1), plain, rtol=1e-4, atol=1e-5)


def test_residual_pass_takes_the_strongest_source_out():
    scenes = grid_of_cells(SceneSpec(), 3, [20.0], [1], 16)
    grid = GridSpec()
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
    features = spectral_features(silent, GridSpec(), passes=passes, noise_known=noise_known)
    assert all(torch.isfinite(part).all() for part in features)
