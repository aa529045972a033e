"""The heads of the network: from hidden states to proposals, counts and covariance factors.

Names of modules, parameters and buffers are names in checkpoints.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_hpo.estimators.counting import CountWeights
from ris_hpo.learning.features import Features
from ris_hpo.learning.network.spec import NetworkSpec
from ris_hpo.physics.grid import local_maxima, over_planes


class Proposals(NamedTuple):
    """Places where a source may be, ranked, best first.

    Attributes:
        existence: [B, C] logit that there is a source near the proposal.
        v, w, rho: [B, C] cosine coordinates.
        power: [B, C] positive, relative to the scene's total.
        state: [B, C, F] hidden state at the proposal.
        cell_logit, cell_power: [B, P, V, W]; cell_offset: [B, 3, P, V, W] in cells; None for the token front-end.
    """

    existence: Tensor
    v: Tensor
    w: Tensor
    rho: Tensor
    power: Tensor
    state: Tensor
    cell_logit: Tensor | None = None
    cell_power: Tensor | None = None
    cell_offset: Tensor | None = None


class CellHead(nn.Module):
    """Per cell of the grid a logit, an offset and a power; the best local maxima of the logit become proposals.

    The first spectrum itself enters the logit,

        logit = raw + gain_1 spectrum / its spread + gain_2 (spectrum - its maximum) + bias,

    so that an untrained network proposes the spectrum's maxima and training only improves on them. A proposal's
    existence is the sum of sigmoid(logit) over its 27 cells: an offset source is shared out among neighbours.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        fine, planes = spec.fine_width, spec.cells.num_rho
        self.cells = nn.Conv2d(spec.cell_width or fine, 5 * planes, 1)
        if spec.cell_width:  # offsets follow from the maps' curvature about the cell, which the linear head cannot see
            self.from_hidden = nn.Conv2d(fine, spec.cell_width, 1)
            self.from_maps = nn.Conv2d(spec.num_planes, spec.cell_width, 3, padding=1)
        nn.init.normal_(self.cells.weight, std=0.01)
        nn.init.zeros_(self.cells.bias)  # type: ignore[arg-type]
        # fitted by least squares: these three alone reach 14.3 nats a scene, where a flat prior has 25
        self.spectrum_gain = nn.Parameter(torch.tensor(0.95))
        self.relief_gain = nn.Parameter(torch.tensor(3.2))
        self.bias = nn.Parameter(torch.tensor(-5.4))
        for name, axis in spec.cells.cells()._asdict().items():
            self.register_buffer(f"cell_{name}", axis.clone(), persistent=False)

    def forward(self, hidden: Tensor, features: Features) -> Proposals:
        """Proposals from the hidden map [B, F, V, W]."""
        grid = self.spec.cells
        planes = grid.num_rho
        seen = hidden
        if self.spec.cell_width:
            seen = F.gelu(self.from_hidden(hidden) + self.from_maps(features.maps))
        raw = self.cells(seen).unflatten(1, (5, planes))
        logit = (
            raw[:, 0] + self.spectrum_gain * features.maps[:, :planes] + self.relief_gain * features.relief + self.bias
        )
        offset = 1.5 * torch.tanh(raw[:, 1:4])
        power = F.softplus(raw[:, 4])

        with torch.no_grad():
            chosen = local_maxima(logit, self.spec.candidates)
        near = over_planes(9 * F.avg_pool2d(torch.sigmoid(logit), 3, stride=1, padding=1), torch.add)
        near = near.flatten(1).gather(1, chosen).clamp(1e-6, 1 - 1e-6)
        shift = offset.flatten(2).gather(2, chosen.unsqueeze(1).expand(-1, 3, -1))
        coordinates = []
        bounds = grid.region.bounds()
        names = ("v", "w", "rho")
        for axis, (name, step, (low, high)) in enumerate(zip(names, grid.spacing(), bounds, strict=True)):
            centre = self.get_buffer(f"cell_{name}")[chosen]
            coordinates.append((centre + step * shift[:, axis]).clamp(low, high))
        strength = power.flatten(1).gather(1, chosen)
        column = (chosen % (grid.num_v * grid.num_w)).unsqueeze(1).expand(-1, hidden.shape[1], -1)
        state = hidden.flatten(2).gather(2, column).mT
        v, w, rho = coordinates
        return Proposals(torch.logit(near), v, w, rho, strength, state, logit, power, offset)


class SlotHead(nn.Module):
    """One proposal per query of the token body, ranked by existence."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.body = nn.Sequential(nn.Linear(spec.width, spec.width), nn.GELU(), nn.Linear(spec.width, 5))

    def forward(self, hidden: Tensor, features: Features) -> Proposals:
        """Proposals from the slots' hidden states [B, K_max, C]; the features are not looked at."""
        raw = self.body(hidden)
        order = raw[..., 0].detach().argsort(-1, descending=True)
        raw = raw.gather(1, order.unsqueeze(-1).expand_as(raw))
        state = hidden.gather(1, order.unsqueeze(-1).expand_as(hidden))
        bounds = self.spec.cells.region.bounds()
        v, w, rho = (lo + (hi - lo) * torch.sigmoid(raw[..., 1 + i]) for i, (lo, hi) in enumerate(bounds))
        return Proposals(raw[..., 0], v, w, rho, F.softplus(raw[..., 4]), state)


class CountHead(nn.Module):
    """Log-probabilities of 0..K_max sources from the pooled state, the best existence logits and the context.

    ``ordinal``: P(K > k) = prod_{i <= k} sigmoid(raw_i), decreasing by construction, and P(K = k) are its differences.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.ordinal = spec.count_head == "ordinal"
        cells = math.prod(spec.cells.shape)
        self.seen = min(16, spec.candidates, cells) if spec.front_end == "spectra" else spec.max_sources
        inputs = spec.width + self.seen + spec.num_context
        hidden = min(spec.head_width, 128)
        self.body = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, spec.max_sources + (0 if self.ordinal else 1)),
        )

    def forward(self, pooled: Tensor, existence: Tensor, context: Tensor) -> Tensor:
        """Log-probabilities [B, K_max + 1] from [B, C], [B, proposals] and [B, num_context]."""
        ranked = existence[:, : self.seen].clamp(-12, 12) / 4
        raw = self.body(torch.cat([pooled, ranked, context], -1))
        if not self.ordinal:
            return F.log_softmax(raw, -1)
        above = torch.sigmoid(raw).cumprod(-1)  # P(K > k), k = 0..K_max-1
        edges = torch.cat([torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])], -1)
        return (edges[:, :-1] - edges[:, 1:]).clamp(min=1e-9).log()


class CountMixing(nn.Module):
    """How a scene's count combines the refined evidence with the count head, see :class:`CountWeights`.

    Affine in the context. Its weights are buffers: training has no gradient for them, they are fitted afterwards on the
    refined evidence (:func:`ris_hpo.learning.calibration.fit_count_mixing`). Until then they are constants.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        outputs = spec.max_sources + 4
        start = torch.zeros(outputs)
        start[:3] = torch.tensor([-1.0, 3.0, -1.0])
        self.register_buffer("weight", torch.zeros(outputs, spec.num_context))
        self.register_buffer("bias", start)

    def forward(self, context: Tensor) -> Tensor:
        """Raw weights [B, K_max + 4], for :func:`count_weights`."""
        return F.linear(context, self.get_buffer("weight"), self.get_buffer("bias"))


def count_weights(raw: Tensor) -> CountWeights:
    """Raw output [B, K_max + 4] as weights; the three positive ones are predicted as logarithms."""
    evidence, saturation, prior = raw[:, :3].double().clamp(-8, 8).exp().unbind(-1)
    return CountWeights(evidence, saturation, prior, raw[:, 3:].double())


class FreeFactor(nn.Module):
    """F complex64 [B, N, K_max] straight from the pooled state; nothing ties its columns to steering vectors."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.shape = (spec.geometry.num_elements, spec.max_sources, 2)
        self.body = nn.Sequential(
            nn.Linear(spec.width, spec.head_width),
            nn.GELU(),
            nn.Linear(spec.head_width, spec.head_width),
            nn.GELU(),
            nn.Linear(spec.head_width, math.prod(self.shape)),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        """F from the pooled state [B, C]."""
        return torch.view_as_complex(self.body(pooled).unflatten(-1, self.shape).contiguous())


class AtomFactor(nn.Module):
    """Mixing m [B, C, K_max] of the proposals' steering vectors into columns F_k = sum_c m_ck sqrt(p_c) a_c.

    m_ck = softmax_k(share_c) (1 + gain_ck): every proposal is divided among the columns. Two proposals in one column
    have cross terms in F F^H, which the gains can learn to use.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(spec.fine_width, spec.width), nn.GELU(), nn.Linear(spec.width, 2 * spec.max_sources)
        )
        self.rank = nn.Parameter(0.02 * torch.randn(spec.covariance_atoms, 2 * spec.max_sources))
        with torch.no_grad():  # the first K_max proposals start in columns of their own
            for slot in range(spec.max_sources):
                self.rank[slot, slot] = 4.0

    def forward(self, state: Tensor) -> Tensor:
        """Mixing from the proposals' hidden states [B, C, F]."""
        share, gain = (self.body(state) + self.rank[: state.shape[1]]).chunk(2, -1)
        mixing: Tensor = torch.softmax(share, -1) * (1 + gain)
        return mixing
