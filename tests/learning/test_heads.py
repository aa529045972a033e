"""Each head against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ris_hpo.learning.features import Features
from ris_hpo.learning.network import Network, NetworkSpec, count_weights
from ris_hpo.learning.network.heads import AtomFactor, CellHead, CountHead, CountMixing, SlotHead
from ris_hpo.physics.array import Cosines, Geometry, cosine_steering
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.scene import SceneSpec, simulate

STATED = GridSpec(num_v=5, num_w=5, num_rho=3)
GRID = STATED.on(Geometry())
SMALL = NetworkSpec(
    width=16, depth=1, heads=2, head_width=16, residual_passes=0, cell_width=0, candidates=5, grid=STATED
)
TOKENS = SMALL.replaced({"front_end": "tokens"})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_slots_are_ranked_best_first_and_keep_what_belongs_to_them():
    head = SlotHead(TOKENS)
    hidden = draw(4, 5, 16)
    found, raw = head(hidden, None), head.body(hidden)
    assert torch.equal(found.existence, raw[..., 0].sort(-1, descending=True).values)
    bounds = GRID.region.bounds()
    for scene in range(4):
        for slot in range(5):
            source = int((raw[scene, :, 0] == found.existence[scene, slot]).nonzero())
            assert torch.equal(found.state[scene, slot], hidden[scene, source])
            for name, column, (low, high) in zip(("v", "w", "rho"), (1, 2, 3), bounds, strict=True):
                value = getattr(found, name)[scene, slot]
                expected = low + (high - low) / (1 + math.exp(-float(raw[scene, source, column])))
                assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6)
            strength = math.log1p(math.exp(float(raw[scene, source, 4])))
            assert float(found.power[scene, slot]) == pytest.approx(strength, rel=1e-5)


def features_with(maps: torch.Tensor) -> Features:
    nothing = torch.empty(len(maps), 0)
    return Features(maps, maps - maps.amax((1, 2, 3), keepdim=True), nothing, nothing)


def test_cells_start_as_the_spectrum_and_propose_its_maxima():
    head = CellHead(SMALL)
    torch.nn.init.zeros_(head.cells.weight)
    maps = torch.full((1, 3, 5, 5), -1.0)
    peaks = {(0, 1, 1): 3.0, (2, 3, 3): 2.0}
    for cell, height in peaks.items():
        maps[(0, *cell)] = height
    maps[0, 0, 1, 2] = 2.9  # above the second peak, but beside the first
    found = head(torch.zeros(1, 16, 5, 5), features_with(maps))
    expected = 0.95 * maps + 3.2 * (maps - 3.0) - 5.4
    torch.testing.assert_close(found.cell_logit, expected)
    cells = GRID.cells()
    for slot, (plane, row, column) in enumerate(peaks):
        index = (plane * 5 + row) * 5 + column
        for name in ("v", "w", "rho"):
            assert float(getattr(found, name)[0, slot]) == pytest.approx(float(getattr(cells, name)[index]), abs=1e-6)
    around = expected[0, 0:2, 0:3, 0:3].sigmoid().sum()  # planes 0 and 1: there is none below
    assert float(found.existence[0, 0]) == pytest.approx(math.log(around / (1 - around)), rel=1e-4)


def test_offset_and_power_of_a_cell_by_hand():
    """The linear layer's bias gives every cell one offset and one power."""
    head = CellHead(SMALL)
    torch.nn.init.zeros_(head.cells.weight)
    head.cells.bias.view(5, 3).copy_(torch.tensor([0.5, 0.2, -0.1, 0.3, 1.0])[:, None].expand(5, 3))
    maps = torch.full((1, 3, 5, 5), -1.0)
    maps[0, 1, 2, 2] = 1.0  # the middle of the grid, so that nothing is clipped
    found = head(torch.zeros(1, 16, 5, 5), features_with(maps))
    centre = (1 * 5 + 2) * 5 + 2
    cells, steps = GRID.cells(), GRID.spacing()
    for name, raw, step in zip(("v", "w", "rho"), (0.2, -0.1, 0.3), steps, strict=True):
        expected = float(getattr(cells, name)[centre]) + step * 1.5 * math.tanh(raw)
        assert float(getattr(found, name)[0, 0]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(found.power[0, 0]) == pytest.approx(math.log1p(math.e), rel=1e-6)
    assert float(found.cell_logit[0, 1, 2, 2]) == pytest.approx(0.5 + 0.95 * 1.0 - 5.4, rel=1e-6)
    torch.testing.assert_close(found.cell_offset[0, :, 1, 2, 2], 1.5 * torch.tensor([0.2, -0.1, 0.3]).tanh())


def test_proposals_stay_inside_the_region():
    head = CellHead(SMALL)
    torch.nn.init.zeros_(head.cells.weight)
    head.cells.bias.view(5, 3)[1:4] = 9.0  # as far up as an offset goes
    maps = torch.full((1, 3, 5, 5), -1.0)
    maps[0, 2, 4, 4] = 1.0
    found = head(torch.zeros(1, 16, 5, 5), features_with(maps))
    for name, (_, high) in zip(("v", "w", "rho"), GRID.region.bounds(), strict=True):
        assert float(getattr(found, name)[0, 0]) == pytest.approx(high, rel=1e-6)


def test_a_proposal_carries_the_hidden_state_of_its_cell():
    hidden, maps = draw(2, 16, 5, 5), draw(2, 3, 5, 5, seed=1)
    head = CellHead(SMALL)
    found = head(hidden, features_with(maps))
    logit = found.cell_logit
    best = int((logit[0] == F.max_pool3d(logit, 3, 1, 1)[0]).float().mul(logit[0] + 100).argmax())
    assert torch.equal(found.state[0, 0], hidden[0, :, best % 25 // 5, best % 5])


def test_ordinal_counts_are_products_of_steps():
    head = CountHead(TOKENS.replaced({"count_head": "ordinal"}))
    last = head.body[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.copy_(torch.logit(torch.tensor([0.9, 0.5, 0.5, 0.2, 0.25])))
    context = torch.zeros(1, TOKENS.num_context)
    found = head(torch.zeros(1, 16), torch.zeros(1, 5), context).exp()[0]
    above = [1, 0.9, 0.45, 0.225, 0.045, 0.01125, 0]  # P(K > k) from k = -1
    expected = [above[k] - above[k + 1] for k in range(6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_count_head_reads_pooled_state_best_logits_and_context():
    head = CountHead(TOKENS)
    inputs = [draw(1, 16), draw(1, 5), draw(1, TOKENS.num_context)]
    plain = head(*inputs)
    assert torch.allclose(plain.exp().sum(-1), torch.ones(1))
    expected = torch.log_softmax(head.body(torch.cat([inputs[0], inputs[1] / 4, inputs[2]], -1)), -1)
    assert torch.equal(plain, expected)
    for position in range(3):
        changed = [value + (position == place) for place, value in enumerate(inputs)]
        assert not torch.allclose(head(*changed), plain)
    assert torch.equal(head(inputs[0], inputs[1] * 0 + 12, inputs[2]), head(inputs[0], inputs[1] * 0 + 99, inputs[2]))


def test_unfitted_mixing_is_constant_and_positive_weights_are_logarithms():
    mixing = CountMixing(SMALL)
    raw = mixing(draw(3, SMALL.num_context))
    weights = count_weights(raw)
    for value, expected in zip(weights[:3], (math.exp(-1), math.exp(3), math.exp(-1)), strict=True):
        assert value.tolist() == pytest.approx([expected] * 3)
    assert torch.equal(weights.bias, torch.zeros(3, 6, dtype=torch.float64))
    far = count_weights(torch.full((1, 9), 100.0))
    assert [float(value) for value in far[:3]] == pytest.approx([math.exp(8)] * 3)
    assert far.bias.tolist() == [[100.0] * 6]
    mixing.weight[4, 0] = 2.0  # the bias of count 1 follows the first number of the context
    context = torch.zeros(1, SMALL.num_context)
    context[0, 0] = 3.0
    assert count_weights(mixing(context)).bias[0].tolist() == [0, 6, 0, 0, 0, 0]


def test_atoms_are_mixed_into_columns_by_hand():
    spec = SMALL.replaced({"covariance_head": "factor", "covariance_atoms": 5})
    head = AtomFactor(spec)
    torch.nn.init.zeros_(head.body[-1].weight)
    torch.nn.init.zeros_(head.body[-1].bias)
    head.rank.copy_(draw(5, 10))
    found = head(draw(2, 3, 16))
    for atom in range(3):
        share = head.rank[atom, :5].exp() / head.rank[atom, :5].exp().sum()
        torch.testing.assert_close(found[0, atom], share * (1 + head.rank[atom, 5:]))
    assert torch.equal(found[0], found[1])
    fresh = AtomFactor(spec).rank
    assert fresh.diagonal()[:5].tolist() == [4.0] * 5


@pytest.mark.parametrize("basis", ["structured", "atoms"])
def test_the_factor_is_spanned_by_the_proposals(basis):
    """Column c of the structured factor is sqrt(existence power) a_c; the atoms' columns are mixed from these."""
    changes = {} if basis == "structured" else {"covariance_head": "factor"}
    geometry = Geometry(num_horizontal=3, num_vertical=2)
    spec = SMALL.replaced({**changes, "geometry.num_horizontal": 3, "geometry.num_vertical": 2})
    torch.manual_seed(0)
    network = Network(spec)
    scenes = simulate(SceneSpec(geometry=geometry), 3, range(2))
    features = network.features(scenes)
    outputs = network(*features)
    atoms = cosine_steering(geometry, Cosines(outputs.v, outputs.w, outputs.rho)).mT
    spanned = atoms * (outputs.existence.sigmoid() * outputs.power).sqrt().unsqueeze(1)
    if basis == "atoms":
        hidden, _ = network.backbone(features)
        state = network.heads["proposals"](hidden, features).state
        spanned = spanned @ network.heads["factor"](state).to(spanned.dtype)
    torch.testing.assert_close(outputs.factor, spanned)


def test_noise_and_disturbance_start_at_what_the_features_say():
    network = Network(SMALL.replaced({"noise_known": False, "grid.num_v": 5}))
    scenes = simulate(SceneSpec(), 3, range(2))
    features = network.features(scenes)
    outputs = network(*features)
    snr = 10 ** features.context[:, 0]
    torch.testing.assert_close(outputs.disturbance, 1 / (1 + snr), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs.channel_gain, features.context[:, -1].sigmoid())
    assert outputs.noise_level.tolist() == pytest.approx([math.log1p(math.exp(-4))] * 2)
    known = Network(SMALL)
    outputs = known(*known.features(scenes))
    assert outputs.channel_gain.tolist() == [1, 1]
    received = scenes.y.abs().square().mean((1, 2))
    torch.testing.assert_close(outputs.disturbance, scenes.noise_power / received, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("spec", [SMALL, TOKENS], ids=["spectra", "tokens"])
def test_every_head_depends_on_the_last_shared_weight(spec):
    """What gradnorm balances the terms at."""
    torch.manual_seed(0)
    network = Network(spec.replaced({"depth": 2}))
    torch.nn.init.normal_(network.heads["noise"].weight)
    with torch.enable_grad():
        outputs = network(*network.features(simulate(SceneSpec(), 3, range(2))))
        for value in (outputs.existence, outputs.power, outputs.log_count[:, 1], outputs.noise_level):
            [gradient] = torch.autograd.grad(value.sum(), network.backbone.last_shared_weight, retain_graph=True)
            assert (gradient != 0).any()
