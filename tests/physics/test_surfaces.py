"""Surfaces in files, grids and steps that follow the aperture, and settings that follow the surface."""

from pathlib import Path

import pytest
import torch

from ris_hpo.config import SCHEMA_KEY, stored_defaults
from ris_hpo.errors import ConfigError
from ris_hpo.estimators.box import strides
from ris_hpo.learning.network import NetworkSpec
from ris_hpo.physics.array import Cosines, Geometry, cosine_steering
from ris_hpo.physics.grid import GridSpec, Region, resolution
from ris_hpo.physics.scene import SceneSpec
from ris_hpo.physics.surfaces import list_surfaces, load_surface, surface_changes
from ris_hpo.training.config import RunConfig

SMALL = {"num_horizontal": 8, "num_vertical": 6, "wavelength_m": 0.1, "spacing_wavelengths": 0.4}
STATED = "num_antennas = 4\n[geometry]\n" + "".join(f"{name} = {value}\n" for name, value in SMALL.items())


def correlation(geometry: Geometry, v: float, rho: float) -> float:
    """|a(0, 0, 0)^H a(v, 0, rho)| of the far field at boresight with another place."""
    points = Cosines(torch.tensor([0.0, v]).double(), torch.zeros(2).double(), torch.tensor([0.0, rho]).double())
    a = cosine_steering(geometry, points)
    return float((a[0].conj() @ a[1]).abs())


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(num_horizontal=32, num_vertical=32, wavelength_m=0.0107)])
def test_a_beam_width_is_the_first_null_and_half_a_depth_of_focus_the_half_power_point(geometry: Geometry) -> None:
    beam, _, depth = resolution(geometry)
    assert correlation(geometry, beam, 0.0) < 1e-6
    assert correlation(geometry, beam / 2, 0.0) > 0.6
    assert correlation(geometry, 0.0, depth / 2) ** 2 == pytest.approx(0.5, abs=0.03)


def test_the_default_surface_keeps_the_grid_and_the_steps_of_its_trained_networks() -> None:
    assert GridSpec().on(Geometry())[:3] == (33, 17, 8)
    assert strides(Geometry(), 0.48, 0.864, torch.device("cpu")).tolist() == [0.08, 0.08, 0.4]


@pytest.mark.parametrize("horizontal", [8, 16, 31, 48])
@pytest.mark.parametrize("spacing", [0.4, 0.5])
@pytest.mark.parametrize("wavelength", [0.3, 0.0107])
def test_cells_lie_within_a_beam_and_a_depth_of_focus(horizontal: int, spacing: float, wavelength: float) -> None:
    geometry = Geometry(
        num_horizontal=horizontal, num_vertical=16, spacing_wavelengths=spacing, wavelength_m=wavelength
    )
    grid = GridSpec().on(geometry)
    shares = [step / width for step, width in zip(grid.spacing(), resolution(geometry), strict=True)]
    assert max(shares[:2]) <= 0.375 + 1e-6
    assert shares[2] <= 0.6 + 1e-6
    assert (grid.num_v % 8, grid.num_w % 8) == (1, 1)
    assert not GridSpec().coarseness(geometry)


def test_a_row_of_elements_has_few_cells_in_elevation() -> None:
    row = Geometry(num_horizontal=64, num_vertical=1)
    assert GridSpec().on(row).num_w == 3
    assert GridSpec(region=Region(elevation_deg=(0, 0))).on(row).num_w == 1


def test_a_grid_that_is_stated_too_coarse_is_named_with_its_figure() -> None:
    large = Geometry(num_horizontal=32, num_vertical=32)
    assert GridSpec(num_v=33, num_w=17, num_rho=8).coarseness(large) == [
        "num_v = 33 puts cells 0.87 beam widths apart",
        "num_w = 17 puts cells 1 beam widths apart",
        "num_rho = 8 puts cells 4.2 depths of focus apart",
    ]
    config = RunConfig().replaced({"network.grid.num_v": 9})
    assert config.coarse_grids() == ["network.grid: num_v = 9 puts cells 1.3 beam widths apart; sources may be missed"]
    assert not RunConfig().coarse_grids()


def test_the_scene_states_surface_region_and_largest_count_for_all() -> None:
    changes = {**surface_changes("sub6-16x16", "scene."), "scene.azimuth_deg": [-45, 45], "scene.max_sources": 3}
    config = RunConfig().replaced({**changes, "scene.num_sources": [1, 3]})
    assert config.network.geometry == config.scene.geometry == load_surface("sub6-16x16").geometry
    assert config.network.grid.region == config.inference.likelihood.grid.region
    assert config.network.grid.region.azimuth_deg == (-45, 45)
    assert config.network.max_sources == config.inference.likelihood.max_sources == 3
    assert config.inference.likelihood.num_sources == (0, 3)
    tree = config.stored()
    assert "geometry" not in tree["network"]
    assert "region" not in tree["network"]["grid"]
    assert RunConfig.from_stored(tree, "test") == config
    again = config.replaced({"scene.geometry": Geometry().model_dump()})
    assert again.network.geometry == Geometry()


def test_what_is_stated_twice_is_the_same_or_refused() -> None:
    twice = {"scene": {"geometry": SMALL}, "network": {"geometry": SMALL, "width": 16}}
    once = {"scene": {"geometry": SMALL}, "network": {"width": 16}}
    assert RunConfig.parse(twice) == RunConfig.parse(once)
    assert RunConfig.parse(twice).fingerprint() == RunConfig.parse(once).fingerprint()
    with pytest.raises(ConfigError, match=r"network.geometry must equal scene.geometry"):
        RunConfig.parse({"network": {"geometry": SMALL}})
    wider = RunConfig().replaced({"network.grid.region.azimuth_deg": [-70, 70]})
    assert RunConfig.from_stored(wider.stored(), "test").network.grid.region.azimuth_deg == (-70, 70)
    assert wider.fingerprint() != RunConfig().fingerprint()


def test_specifications_in_code_follow_too() -> None:
    scene = SceneSpec(geometry=Geometry(**SMALL))
    assert RunConfig(scene=scene, network=NetworkSpec(width=16)).network.geometry == scene.geometry
    with pytest.raises(ValueError, match=r"network.geometry must equal"):
        RunConfig(scene=scene, network=NetworkSpec(geometry=Geometry(num_horizontal=9)))


def test_old_networks_of_another_surface_keep_their_cells() -> None:
    old = stored_defaults(1, "training")
    assert RunConfig.from_stored({SCHEMA_KEY: 1, "network": old["network"]}, "test") == RunConfig()
    surface = {"geometry": {**old["scene"]["geometry"], "num_horizontal": 16}}
    tree = {SCHEMA_KEY: 1, "scene": surface, "network": surface}
    assert RunConfig.from_stored(tree, "test").network.cells[:3] == (33, 17, 8)
    assert RunConfig.parse({"scene": surface}).network.cells[:3] != (33, 17, 8)
    narrow = {SCHEMA_KEY: 1, "scene": {"azimuth_deg": [-30, 30]}}
    found = RunConfig.from_stored(narrow, "test").network
    assert found.grid.region.azimuth_deg == (-60, 60)
    assert found.cells[:3] == (33, 17, 8)


def test_each_surface_that_ships_can_be_trained_on() -> None:
    assert set(list_surfaces()) >= {"default", "sub6-16x16", "mmwave-32x32", "linear-64"}
    assert load_surface("default") == SceneSpec()
    assert load_surface("sub6-16x16").geometry.wavelength_m == pytest.approx(3e8 / 3.5e9, rel=1e-3)
    assert load_surface("mmwave-32x32").geometry.wavelength_m == pytest.approx(3e8 / 28e9, rel=2e-3)
    for name in set(list_surfaces()) - {"linear-64"}:
        RunConfig().replaced(surface_changes(name, "scene."))


def test_a_surface_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(STATED)
    assert load_surface(file).geometry == Geometry(**SMALL)
    file.write_text(STATED.replace("wavelength_m = 0.1\n", ""))
    with pytest.raises(ConfigError, match=r"mine.toml: a surface must state geometry.wavelength_m"):
        load_surface(file)
    file.write_text(STATED.replace("num_antennas", "num_antenas"))
    with pytest.raises(ConfigError, match=r"did you mean 'num_antennas'"):
        load_surface(file)
    with pytest.raises(ConfigError, match=r"unknown surface 'sub6-16'.*did you mean 'sub6-16x16'"):
        load_surface("sub6-16")
