"""The network: from features of a scene to sources, their number and their covariance.

Two front-ends meet one set of heads:

- ``spectra``: log spectra on the grid -> a small U-shaped convolutional network with one attention layer over the
  coarse cells -> for every cell a logit that a source is there, its offset from the cell's centre and its power.
  The cells' own whitened log spectrum enters the logit directly, so that an untrained network proposes the spectrum's
  maxima and learning only improves on them. Slots are the best local maxima.
- ``tokens``: back-projected snapshots as tokens -> pre-norm transformer -> learned queries, one per slot. It
  memorises quickly and generalises slowly; it stands for what earlier pipelines were.

Covariance heads: ``structured`` builds sum_c p_c a(v_c, w_c, rho_c) a^H + sigma^2 I from predicted geometry;
``factor`` predicts F with R = F F^H + sigma^2 I, spanned by steering atoms (``atoms``) or free (``free``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.estimators.counting import CountWeights
from ris_hpo.learning.features import Features, num_context, spectral_features, token_features
from ris_hpo.physics.array import Cosines, Geometry, cosine_steering, from_cosines
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.scene import Scenes

NOT_A_MAXIMUM = 20.0  # taken off the logit of a cell that is no local maximum, so that maxima come first


class NetworkSpec(Spec):
    """Form and size of the network."""

    front_end: Literal["spectra", "tokens"] = "spectra"
    covariance_head: Literal["structured", "factor"] = "structured"
    factor_basis: Literal["atoms", "free"] = "atoms"
    count_head: Literal["cross_entropy", "ordinal", "evidence"] = Field(
        "cross_entropy", description="evidence: cross-entropy, then weighed against the evidence as fitted afterwards"
    )
    width: int = Field(64, ge=8, le=1024, description="channels of the coarse maps, or of a token")
    depth: int = Field(4, ge=1, le=24, description="residual blocks, or transformer layers")
    heads: int = Field(4, ge=1, le=32, description="attention heads")
    head_width: int = Field(128, ge=8, le=4096, description="hidden width of the count and free-factor heads")
    dropout: float = Field(0.0, ge=0, lt=0.9)
    candidates: int = Field(64, ge=5, le=512, description="proposals handed to the refinement")
    max_sources: int = Field(5, ge=1, le=5)
    covariance_atoms: int = Field(16, ge=5, le=512, description="proposals that span the structured covariance")
    cell_width: int = Field(
        96, ge=0, le=512, description="hidden width of the cells' head, which has its own view of the maps; 0: linear"
    )
    residual_passes: int = Field(4, ge=0, le=5, description="spectra of the residual beside the first")
    noise_known: bool = Field(True, description="false: the noise power is estimated, channel error included")
    geometry: Geometry = Geometry()
    grid: GridSpec = GridSpec()

    @model_validator(mode="after")
    def _check(self) -> NetworkSpec:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.front_end == "tokens" and self.covariance_head == "factor" and self.factor_basis == "atoms":
            raise ValueError("factor_basis 'atoms' needs the front_end 'spectra'; with tokens use 'free'")
        if self.front_end == "spectra" and any(low == high for low, high in self.grid.region.bounds()):
            raise ValueError("grid.region must have an extent in azimuth, elevation and range: cells divide it")
        return self


def large() -> NetworkSpec:
    """The 16.3M-parameter form: transformer over snapshot tokens with a free factor, as earlier pipelines had it."""
    return NetworkSpec(
        front_end="tokens", covariance_head="factor", factor_basis="free", width=256, depth=8, heads=8, head_width=2368
    )


class Outputs(NamedTuple):
    """What the network says of a batch of scenes.

    Attributes:
        existence: [B, C] logit that there is a source near the proposal; proposals are ranked, best first, and the
            first K_max are the slots.
        v, w, rho: [B, C] cosine coordinates.
        power: [B, C] positive, relative to the scene's total.
        log_count: [B, K_max + 1] log-probabilities of the number of sources.
        factor: complex64 [B, N, Q], F with R_pred = F F^H + sigma^2 I.
        noise_level: [B] sigma^2, relative.
        disturbance: [B] share of the received power that is noise, or error of the known channel.
        channel_gain: [B] what the scattered part of the known channel is to be multiplied with; 1 if it is exact.
        count_mixing: [B, K_max + 4] raw output of :class:`CountMixing`; None for the other count heads.
        cell_logit, cell_power: [B, P, V, W]; cell_offset: [B, 3, P, V, W] in cells; None for the token front-end.
    """

    existence: Tensor
    v: Tensor
    w: Tensor
    rho: Tensor
    power: Tensor
    log_count: Tensor
    factor: Tensor
    noise_level: Tensor
    disturbance: Tensor
    channel_gain: Tensor
    count_mixing: Tensor | None = None
    cell_logit: Tensor | None = None
    cell_power: Tensor | None = None
    cell_offset: Tensor | None = None

    def cosines(self, most: int | None = None) -> Cosines:
        """Coordinates of the first ``most`` proposals, or of all."""
        return Cosines(self.v[:, :most], self.w[:, :most], self.rho[:, :most])


class Network(nn.Module):
    """Features to :class:`Outputs`; ``backbone`` and ``heads`` are the two groups of parameters."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        body: type[_SpectralBackbone] | type[_TokenBackbone]
        body = _SpectralBackbone if spec.front_end == "spectra" else _TokenBackbone
        self.backbone = body(spec)
        proposals = _CellHead(spec) if spec.front_end == "spectra" else _SlotHead(spec)
        heads: dict[str, nn.Module] = {"proposals": proposals, "count": _CountHead(spec)}
        if spec.covariance_head == "factor":
            heads["factor"] = _FreeFactor(spec) if spec.factor_basis == "free" else _AtomFactor(spec)
        heads["noise"] = nn.Linear(spec.width, 1)
        if not spec.noise_known:  # a correction of what the features estimate
            heads["disturbance"] = nn.Linear(spec.width, 2)
        if spec.count_head == "evidence":
            heads["mixing"] = CountMixing(spec)
        self.heads = nn.ModuleDict(heads)
        nn.init.zeros_(self.heads["noise"].weight)  # type: ignore[arg-type]
        nn.init.constant_(self.heads["noise"].bias, -4.0)  # type: ignore[arg-type]
        if "disturbance" in heads:
            nn.init.zeros_(self.heads["disturbance"].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.heads["disturbance"].bias)  # type: ignore[arg-type]

    def features(self, scenes: Scenes) -> Features:
        """Fixed part of the front-end; no parameters, no gradient.

        Raises:
            ConfigError: scenes of another surface.
        """
        for (name, found), (_, expected) in zip(scenes.geometry, self.spec.geometry, strict=True):
            if found != expected:
                raise ConfigError(f"scenes of another surface than the network's: {name} is {found}, not {expected}")
        scenes = scenes.single()
        with torch.no_grad():
            if self.spec.front_end == "spectra":
                passes = self.spec.residual_passes
                return spectral_features(scenes, self.spec.grid, passes=passes, noise_known=self.spec.noise_known)
            return token_features(scenes, noise_known=self.spec.noise_known)

    def forward(self, maps: Tensor, relief: Tensor, tokens: Tensor, context: Tensor) -> Outputs:
        """Learned part; arguments are the fields of :class:`Features`."""
        features = Features(maps, relief, tokens, context)
        hidden, pooled = self.backbone(features)
        with torch.autocast(maps.device.type, enabled=False):  # geometry, covariance and counts stay in fp32
            hidden, pooled = hidden.float(), pooled.float()
            proposals: _Proposals = self.heads["proposals"](hidden, features)
            count = self.heads["count"](pooled, proposals.existence, context)
            noise_level = F.softplus(self.heads["noise"](pooled)).squeeze(-1)
            disturbance = -math.log(10) * context[:, 0]  # its logit, by the SNR that the features know or estimate
            gain = torch.ones_like(disturbance)
            if "disturbance" in self.heads:
                correction = self.heads["disturbance"](pooled)
                disturbance = disturbance + correction[:, 0]
                gain = torch.sigmoid(context[:, -1] + correction[:, 1])
            mixing = self.heads["mixing"](context) if "mixing" in self.heads else None
            amplitude = (torch.sigmoid(proposals.existence) * proposals.power).clamp(min=1e-12).sqrt()
            if "factor" in self.heads and self.spec.factor_basis == "free":
                factor = self.heads["factor"](pooled)
            else:
                span = self.spec.covariance_atoms
                coordinates = Cosines(proposals.v[:, :span], proposals.w[:, :span], proposals.rho[:, :span])
                atoms = cosine_steering(self.spec.geometry, coordinates).mT
                factor = atoms * amplitude[:, None, :span]
                if "factor" in self.heads:
                    factor = factor @ self.heads["factor"](proposals.state[:, :span]).to(factor.dtype)
        cells = (proposals.cell_logit, proposals.cell_power, proposals.cell_offset)
        geometry = (proposals.existence, proposals.v, proposals.w, proposals.rho, proposals.power)
        return Outputs(*geometry, count, factor, noise_level, torch.sigmoid(disturbance), gain, mixing, *cells)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters in the backbone and in the heads."""
        return {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("backbone", self.backbone), ("heads", self.heads))
        }


def slot_geometry(outputs: Outputs, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """(azimuth, elevation, range_m) [B, slots] of the first proposals, differentiable."""
    return from_cosines(outputs.cosines(slots))


def _num_context(spec: NetworkSpec) -> int:
    return num_context(spec.residual_passes if spec.front_end == "spectra" else None, noise_known=spec.noise_known)


class _Proposals(NamedTuple):
    existence: Tensor
    v: Tensor
    w: Tensor
    rho: Tensor
    power: Tensor
    state: Tensor
    cell_logit: Tensor | None = None
    cell_power: Tensor | None = None
    cell_offset: Tensor | None = None


class _Block(nn.Module):
    """Pre-norm residual block of two convolutions with a global bias (squeeze without excitation)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(max(1, width // 16), width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.globally = nn.Linear(width, width)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(self.norm(x)))
        h = h + self.globally(h.mean((2, 3)))[:, :, None, None]
        out: Tensor = x + self.second(self.dropout(F.gelu(h)))
        return out


class _Attention(nn.Module):
    """Pre-norm self-attention with a multilayer perceptron, tokens [B, T, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, -1)  # few tokens: plain products beat the fused kernel
        mixed = (weight @ v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        out: Tensor = x + self.dropout(self.contract(F.gelu(self.expand(self.second_norm(x)))))
        return out


class _SpectralBackbone(nn.Module):
    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        planes, fine, width = (1 + spec.residual_passes) * spec.grid.num_rho, max(16, spec.width // 2), spec.width
        self.stem = nn.Conv2d(planes, fine, 3, padding=1)
        self.context = nn.Linear(_num_context(spec), fine)
        self.down = nn.Conv2d(fine, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(width, spec.dropout) for _ in range(spec.depth))
        self.attention = _Attention(width, spec.heads, spec.dropout)
        rows, columns = ((size + 3) // 4 for size in (spec.grid.num_v, spec.grid.num_w))
        self.place = nn.Parameter(0.02 * torch.randn(1, rows * columns, width))
        self.up = nn.Conv2d(width, fine, 1)
        self.merge = nn.Conv2d(2 * fine, fine, 3, padding=1)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        fine = F.gelu(self.stem(features.maps) + self.context(features.context)[:, :, None, None])
        coarse = self.down(fine)
        middle = len(self.blocks) // 2
        for position, block in enumerate(self.blocks):
            if position == middle:
                coarse = coarse + self._attended(coarse)
            coarse = block(coarse)
        pooled = coarse.mean((2, 3))
        raised = F.interpolate(self.up(coarse), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return F.gelu(self.merge(torch.cat([fine, raised], 1))), pooled

    def _attended(self, coarse: Tensor) -> Tensor:
        """Attention over cells of half the resolution again: far sources compete for the same energy."""
        rough = F.avg_pool2d(coarse, 2, ceil_mode=True, count_include_pad=False)
        tokens = rough.flatten(2).mT + self.place
        change = self.attention(tokens) - tokens
        return F.interpolate(change.mT.unflatten(-1, rough.shape[-2:]), size=coarse.shape[-2:])


class _CellHead(nn.Module):
    """Per cell: logit, offset, power; the best local maxima become proposals."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        fine, planes = max(16, spec.width // 2), spec.grid.num_rho
        self.cells = nn.Conv2d(spec.cell_width or fine, 5 * planes, 1)
        self.state = fine
        if spec.cell_width:  # an offset is told by the maps' curvature about the cell, which the linear head cannot see
            self.from_hidden = nn.Conv2d(fine, spec.cell_width, 1)
            self.from_maps = nn.Conv2d((1 + spec.residual_passes) * planes, spec.cell_width, 3, padding=1)
        nn.init.normal_(self.cells.weight, std=0.01)
        nn.init.zeros_(self.cells.bias)  # type: ignore[arg-type]
        # least-squares start: these three alone reach 14.3 nats a scene where a flat prior has 25
        self.spectrum_gain = nn.Parameter(torch.tensor(0.95))
        self.relief_gain = nn.Parameter(torch.tensor(3.2))
        self.bias = nn.Parameter(torch.tensor(-5.4))
        for name, axis in spec.grid.cells()._asdict().items():
            self.register_buffer(f"cell_{name}", axis.clone(), persistent=False)

    def forward(self, hidden: Tensor, features: Features) -> _Proposals:
        spec, grid = self.spec, self.spec.grid
        planes = grid.num_rho
        seen = hidden
        if spec.cell_width:
            seen = F.gelu(self.from_hidden(hidden) + self.from_maps(features.maps))
        raw = self.cells(seen).unflatten(1, (5, planes))
        logit = (
            raw[:, 0] + self.spectrum_gain * features.maps[:, :planes] + self.relief_gain * features.relief + self.bias
        )
        offset = 1.5 * torch.tanh(raw[:, 1:4])
        power = F.softplus(raw[:, 4])

        with torch.no_grad():
            highest = _over_planes(F.max_pool2d(logit, 3, stride=1, padding=1), torch.maximum)
            ranked = (logit - NOT_A_MAXIMUM * (logit < highest)).flatten(1)
            chosen = ranked.topk(min(spec.candidates, ranked.shape[1]), dim=-1).indices
        near = _over_planes(9 * F.avg_pool2d(torch.sigmoid(logit), 3, stride=1, padding=1), torch.add)
        near = near.flatten(1).gather(1, chosen).clamp(1e-6, 1 - 1e-6)
        shift = offset.flatten(2).gather(2, chosen.unsqueeze(1).expand(-1, 3, -1))
        coordinates = []
        bounds = grid.region.bounds()
        names = ("v", "w", "rho")
        for axis, (name, step, (low, high)) in enumerate(zip(names, grid.spacing(), bounds, strict=True)):
            centre = self.get_buffer(f"cell_{name}")[chosen]
            coordinates.append((centre + step * shift[:, axis]).clamp(low, high))
        strength = power.flatten(1).gather(1, chosen)
        plane_size = grid.num_v * grid.num_w
        column = (chosen % plane_size).unsqueeze(1).expand(-1, self.state, -1)
        state = hidden.flatten(2).gather(2, column).mT
        v, w, rho = coordinates
        return _Proposals(torch.logit(near), v, w, rho, strength, state, logit, power, offset)


def _over_planes(maps: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine every plane [B, P, V, W] with its two neighbours; two 2-D pools and this are a fast 3-D pool."""
    if maps.shape[1] == 1:
        return maps
    pairs = combine(maps[:, :-1], maps[:, 1:])
    inner = combine(pairs[:, :-1], maps[:, 2:])
    return torch.cat([pairs[:, :1], inner, pairs[:, -1:]], 1)


class _TokenBackbone(nn.Module):
    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * spec.geometry.num_elements, spec.width)
        self.context = nn.Linear(_num_context(spec), spec.width)
        self.queries = nn.Parameter(0.5 * torch.randn(1, spec.max_sources + 1, spec.width))
        self.layers = nn.ModuleList(_Attention(spec.width, spec.heads, spec.dropout) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        snapshots = self.embed(features.tokens) + self.context(features.context).unsqueeze(1)
        x = torch.cat([self.queries.expand(snapshots.shape[0], -1, -1), snapshots], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        count = self.queries.shape[1]
        return x[:, 1:count], x[:, 0] + x[:, count:].mean(1)


class _SlotHead(nn.Module):
    """One slot per learned query."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.body = nn.Sequential(nn.Linear(spec.width, spec.width), nn.GELU(), nn.Linear(spec.width, 5))

    def forward(self, hidden: Tensor, features: Features) -> _Proposals:
        raw = self.body(hidden)
        order = raw[..., 0].detach().argsort(-1, descending=True)
        raw = raw.gather(1, order.unsqueeze(-1).expand_as(raw))
        state = hidden.gather(1, order.unsqueeze(-1).expand_as(hidden))
        bounds = self.spec.grid.region.bounds()
        v, w, rho = (lo + (hi - lo) * torch.sigmoid(raw[..., 1 + i]) for i, (lo, hi) in enumerate(bounds))
        return _Proposals(raw[..., 0], v, w, rho, F.softplus(raw[..., 4]), state)


class _CountHead(nn.Module):
    """Log-probabilities of 0..K_max sources from pooled state, ranked existence logits and context."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.ordinal = spec.count_head == "ordinal"
        self.max_sources = spec.max_sources
        cells = math.prod(spec.grid.shape)
        self.seen = min(16, spec.candidates, cells) if spec.front_end == "spectra" else spec.max_sources
        inputs = spec.width + self.seen + _num_context(spec)
        hidden = min(spec.head_width, 128)
        self.body = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, spec.max_sources + (0 if self.ordinal else 1)),
        )

    def forward(self, pooled: Tensor, existence: Tensor, context: Tensor) -> Tensor:
        ranked = existence[:, : self.seen].clamp(-12, 12) / 4
        raw = self.body(torch.cat([pooled, ranked, context], -1))
        if not self.ordinal:
            return F.log_softmax(raw, -1)
        above = torch.sigmoid(raw).cumprod(-1)  # P(K > k), k = 0..K_max-1, decreasing by construction
        edges = torch.cat([torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])], -1)
        return (edges[:, :-1] - edges[:, 1:]).clamp(min=1e-9).log()


class CountMixing(nn.Module):
    """How much a scene's count owes to the evidence and how much to the count head, see :class:`CountWeights`.

    Affine in the context. Its weights are buffers: no gradient of the training reaches them, they are fitted afterwards
    on the refined evidence (:func:`ris_hpo.learning.calibration.fit_count_mixing`). Until then they are constants.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        context = _num_context(spec)
        outputs = spec.max_sources + 4
        start = torch.zeros(outputs)
        start[:3] = torch.tensor([-1.0, 3.0, -1.0])
        self.register_buffer("weight", torch.zeros(outputs, context))
        self.register_buffer("bias", start)

    def forward(self, context: Tensor) -> Tensor:
        """Raw weights [B, K_max + 4]."""
        return F.linear(context, self.get_buffer("weight"), self.get_buffer("bias"))


def count_weights(raw: Tensor) -> CountWeights:
    """Raw output [B, K_max + 4] as weights: positive ones by their logarithms."""
    evidence, saturation, prior = raw[:, :3].double().clamp(-8, 8).exp().unbind(-1)
    return CountWeights(evidence, saturation, prior, raw[:, 3:].double())


class _FreeFactor(nn.Module):
    """F [B, N, K_max] straight from the pooled state; free of geometry, and known to drift from it."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.shape = (spec.geometry.num_elements, spec.max_sources, 2)
        outputs = 2 * spec.geometry.num_elements * spec.max_sources
        self.body = nn.Sequential(
            nn.Linear(spec.width, spec.head_width),
            nn.GELU(),
            nn.Linear(spec.head_width, spec.head_width),
            nn.GELU(),
            nn.Linear(spec.head_width, outputs),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.view_as_complex(self.body(pooled).unflatten(-1, self.shape).contiguous())


class _AtomFactor(nn.Module):
    """Mixing [B, C, K_max] of the proposals' atoms into K_max columns, F_k = sum_c m_ck sqrt(p_c) a_c.

    Every proposal shares itself out over the columns by a softmax; cross terms inside a column are free to be learned.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(max(16, spec.width // 2), spec.width), nn.GELU(), nn.Linear(spec.width, 2 * spec.max_sources)
        )
        self.rank = nn.Parameter(0.02 * torch.randn(spec.covariance_atoms, 2 * spec.max_sources))
        with torch.no_grad():  # the first K_max proposals start in columns of their own
            for slot in range(spec.max_sources):
                self.rank[slot, slot] = 4.0

    def forward(self, state: Tensor) -> Tensor:
        share, gain = (self.body(state) + self.rank[: state.shape[1]]).chunk(2, -1)
        mixing: Tensor = torch.softmax(share, -1) * (1 + gain)
        return mixing
