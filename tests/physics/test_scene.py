"""Scenes: moments, SNR, determinism in batch size, code books, power laws, channel error."""

import math

import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.physics.array import Geometry, steering
from ris_hpo.physics.grid import Region
from ris_hpo.physics.random import SceneRandom
from ris_hpo.physics.scene import Scenes, SceneSpec, code_book, grid_of_cells, simulate


def same(one: Scenes, other: Scenes) -> bool:
    tensors = ("y", "bs_ris_channel", "ris_codes", "noise_power", "snr_db", "symbols")
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return equal and all(
        torch.equal(getattr(one.truth, name), getattr(other.truth, name)) for name in ("azimuth", "range_m", "mask")
    )


def test_a_scene_depends_on_seed_and_index_alone():
    spec = SceneSpec()
    whole = simulate(spec, 5, range(20))
    parts = Scenes.cat([simulate(spec, 5, range(7)), simulate(spec, 5, range(7, 20))])
    assert torch.equal(whole.ris_codes, parts.ris_codes)
    assert torch.equal(whole.symbols, parts.symbols)
    assert torch.equal(whole.truth.range_m, parts.truth.range_m)
    # sums over elements may be taken in another order for another batch size: equal to rounding
    torch.testing.assert_close(whole.y, parts.y, rtol=1e-4, atol=1e-5)
    assert same(whole, simulate(spec, 5, range(20)))
    assert not torch.equal(whole.y, simulate(spec, 6, range(20)).y)
    shuffled = torch.tensor([3, 0, 11])
    torch.testing.assert_close(simulate(spec, 5, shuffled).y, whole.y[shuffled], rtol=1e-4, atol=1e-5)


def test_the_model_equation_holds():
    scenes = simulate(SceneSpec(), 3, range(4))
    truth = scenes.truth
    a = steering(scenes.geometry, truth.azimuth, truth.elevation, truth.range_m)
    clean = torch.einsum("blmn,bkn,blk->blm", scenes.sensing_matrices(), a, scenes.symbols)
    residual = (scenes.y - clean).abs().square().mean((1, 2)) / scenes.noise_power
    assert residual.sub(1).abs().max().item() < 5 / math.sqrt(256)
    realised = 10 * torch.log10(clean.abs().square().mean((1, 2)) / scenes.noise_power)
    torch.testing.assert_close(realised, scenes.snr_db, atol=1e-3, rtol=0)


def test_draws_have_the_moments_of_their_laws():
    random = SceneRandom(11, torch.arange(500))
    normal = random.complex_normal("x", 200)
    assert normal.mean().abs().item() < 5 / math.sqrt(1e5)
    assert normal.abs().square().mean().item() == pytest.approx(1, abs=5 / math.sqrt(1e5))
    assert (normal * normal).mean().abs().item() < 5 / math.sqrt(1e5)  # circular
    assert normal.abs().pow(4).mean().item() == pytest.approx(2, abs=0.1)
    uniform = random.uniform("u", 200)
    assert uniform.min().item() >= 0
    assert uniform.max().item() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / 1e5))
    assert uniform.var().item() == pytest.approx(1 / 12, rel=0.03)
    counts = torch.bincount(random.integers("k", 5, 200).flatten(), minlength=5)
    assert (counts - 20_000).abs().max().item() < 5 * math.sqrt(1e5 * 0.2 * 0.8)


def test_truth_and_noise_follow_the_specification():
    spec = SceneSpec()
    scenes = simulate(spec, 2, range(2000))
    truth = scenes.truth
    mask = truth.mask
    assert set(truth.num_sources.tolist()) == {1, 2, 3, 4, 5}
    assert truth.azimuth[mask].abs().max().item() <= math.radians(60)
    assert truth.elevation[mask].abs().max().item() <= math.radians(30)
    assert 0.5 <= truth.range_m[mask].min().item() <= 0.6
    assert 9.9 <= truth.range_m[mask].max().item() <= 10
    level = 10 * torch.log10(truth.power[mask])
    assert level.abs().max().item() <= 3.001
    assert level.mean().item() == pytest.approx(0, abs=0.1)
    ratio = scenes.symbols.abs().square().mean(1)[mask] / truth.power[mask]
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert scenes.bs_ris_channel.abs().square().mean().item() == pytest.approx(1 / spec.num_antennas, rel=0.02)
    torch.testing.assert_close(scenes.ris_codes.abs(), torch.ones_like(scenes.ris_codes.real))


@pytest.mark.parametrize("factor", [0.5, 10.0])
def test_the_rician_factor_is_the_true_one(factor):
    scenes = simulate(SceneSpec(rician_factor=(factor, factor), num_antennas=8), 7, range(400))
    h = scenes.bs_ris_channel * math.sqrt(8)
    # rank-one line of sight of power k/(k+1) an entry: E |h|^4 = 2 s^2 + 4 s l + l^2 with s = 1/(k+1), l = k/(k+1)
    s, line = 1 / (factor + 1), factor / (factor + 1)
    assert h.abs().pow(4).mean().item() == pytest.approx(2 * s * s + 4 * s * line + line * line, rel=0.03)


def test_power_law_coherent_symbols_and_fixed_counts():
    spec = SceneSpec(power_law="path_loss", symbols="coherent")
    scenes = simulate(spec, 1, range(6), num_sources=torch.full((6,), 3), snr_db=torch.full((6,), 12.0))
    truth = scenes.truth
    assert truth.num_sources.tolist() == [3] * 6
    torch.testing.assert_close(truth.power[truth.mask], truth.range_m[truth.mask].pow(-2))
    torch.testing.assert_close(scenes.symbols, scenes.symbols[:, :1].expand_as(scenes.symbols))
    assert scenes.snr_db.tolist() == [12.0] * 6


@pytest.mark.parametrize("codes", ["random", "dft", "hadamard"])
def test_code_books_have_unit_modulus_and_their_phases(codes):
    spec = SceneSpec(codes=codes)
    book = code_book(spec, SceneRandom(3, torch.arange(30)))
    assert book.shape == (30, 16, 144)
    torch.testing.assert_close(book.abs(), torch.ones_like(book.real))
    eighths = book.angle() / (2 * math.pi / 8)
    torch.testing.assert_close(eighths, eighths.round(), atol=1e-4, rtol=0)


def test_dft_and_hadamard_codes_are_orthogonal():
    dft = SceneSpec(codes="dft", code_bits=8, geometry=Geometry(num_horizontal=8, num_vertical=8), num_snapshots=8)
    book = code_book(dft, SceneRandom(3, torch.arange(4)))
    gram = (book @ book.mH).abs() / 64
    torch.testing.assert_close(gram, torch.eye(8).expand(4, 8, 8), atol=1e-3, rtol=0)
    hadamard = dft.replaced({"codes": "hadamard"})
    book = code_book(hadamard, SceneRandom(3, torch.arange(4)))
    torch.testing.assert_close((book @ book.mH).abs() / 64, torch.eye(8).expand(4, 8, 8), atol=1e-6, rtol=0)


def test_channel_error_has_the_stated_power():
    scenes = simulate(SceneSpec(channel_error_db=(-10.0, -10.0)), 4, range(50))
    error = scenes.bs_ris_channel - scenes.true_channel
    ratio = error.abs().square().mean((1, 2)) / scenes.true_channel.abs().square().mean((1, 2))
    assert (10 * ratio.log10() + 10).abs().max().item() < 0.5


def test_noise_power_error_changes_only_what_the_receiver_believes():
    exact = simulate(SceneSpec(), 4, range(20))
    wrong = simulate(SceneSpec(noise_power_error_db=3.0), 4, range(20))
    torch.testing.assert_close(exact.y, wrong.y)
    level = 10 * (wrong.noise_power / exact.noise_power).log10()
    assert 0 < level.abs().max().item() <= 3.001


def test_grid_of_cells_orders_snr_outermost_and_refuses_bad_counts():
    scenes = grid_of_cells(SceneSpec(), 1, [0.0, 10.0], [1, 4], 3)
    assert scenes.snr_db.tolist() == [0.0] * 6 + [10.0] * 6
    assert scenes.truth.num_sources.tolist() == [1, 1, 1, 4, 4, 4] * 2
    with pytest.raises(ConfigError, match="source counts"):
        grid_of_cells(SceneSpec(), 1, [0.0], [6], 1)
    with pytest.raises(ConfigError, match="source counts"):
        simulate(SceneSpec(), 1, range(2), num_sources=torch.tensor([1, -1]))


def test_any_whole_numbers_name_the_same_scenes():
    for kind in (torch.int32, torch.uint8, torch.float32):
        assert same(simulate(SceneSpec(), 5, torch.arange(3).to(kind)), simulate(SceneSpec(), 5, range(3)))


@pytest.mark.parametrize("changes", [{"range_m": (0, 10)}, {"azimuth_deg": (60, -60)}, {"elevation_deg": (-90, 30)}])
def test_a_region_lies_in_front_of_the_surface(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Region.parse(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"range_m": (0.0, 1.0)},
        {"azimuth_deg": (10.0, -10.0)},
        {"azimuth_deg": (-95.0, 0.0)},
        {"num_sources": (-1, 3)},
        {"num_sources": (1, 6)},
        {"channel_error_db": (0.0, -10.0)},
        {"unheard_of": 1},
    ],
)
def test_impossible_specifications_are_refused(changes):
    with pytest.raises(ConfigError):
        SceneSpec.parse(changes)


def test_scenes_without_truth_say_so():
    scenes = simulate(SceneSpec(), 1, range(2))
    bare = Scenes(scenes.geometry, scenes.y, scenes.bs_ris_channel, scenes.ris_codes, scenes.noise_power)
    with pytest.raises(ConfigError, match="no truth"):
        bare.require_truth()


def test_sources_keep_their_least_separation_and_other_draws_stay():
    spec = SceneSpec(num_sources=(5, 5))
    apart = spec.replaced({"min_separation_deg": 20.0})
    plain, scenes = simulate(spec, 21, range(40)), simulate(apart, 21, range(40))
    place = scenes.truth.positions() / scenes.truth.range_m.unsqueeze(-1)
    cosine = (place @ place.mT)[:, *torch.triu_indices(5, 5, 1)]
    assert cosine.max().item() <= math.cos(math.radians(20)) + 1e-6
    assert torch.equal(plain.truth.range_m, scenes.truth.range_m)
    assert torch.equal(plain.truth.azimuth[:, 0], scenes.truth.azimuth[:, 0])
    assert 0.3 < (plain.truth.azimuth == scenes.truth.azimuth).double().mean().item() < 1
    assert torch.equal(simulate(apart, 21, torch.tensor([17, 3])).truth.azimuth, scenes.truth.azimuth[[17, 3]])
    with pytest.raises(ConfigError, match="no room for 5 sources"):
        simulate(apart.replaced({"min_separation_deg": 80.0}), 21, range(2))


def test_an_interval_without_width_is_known_beforehand():
    assert simulate(SceneSpec(), 22, range(3)).truth.given is None
    scenes = simulate(SceneSpec(elevation_deg=(5.0, 5.0)), 22, range(3))
    assert scenes[1:].truth.given.tolist() == [[False, True, False]] * 2
    assert Scenes.cat([scenes, scenes]).truth.given.shape == (6, 3)
