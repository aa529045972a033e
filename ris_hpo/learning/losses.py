"""Loss terms: pure functions, one per term, and the frozen weights that combine them.

No term differentiates an eigenvector; structure terms use projectors onto the true subspace, computed without gradient.
The label covariance is R = A diag(p) A^H scaled to trace N, and predictions are scaled alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.estimators.channel import LEAST_GAIN, split_channel
from ris_hpo.learning.features import GAIN_EDGE
from ris_hpo.learning.hybrid import Covariances
from ris_hpo.learning.network import Network, Outputs, slot_geometry
from ris_hpo.physics.array import Geometry, cosine_steering, steering, to_cosines
from ris_hpo.physics.grid import Grid, dictionary
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.matching import assignment, distances, match

SUBSPACE_LOADING = 3e-4


NMSE_PARTS = ("diagonal", "off_diagonal")  # weights within the two NMSEs, no terms of their own


class LossSpec(Spec):
    """Weights of the loss terms; names in earlier reports in brackets. A term of weight 0 is not computed."""

    covariance: float = Field(0.1, ge=0, description="NMSE of R_eff (lam_cov)")
    covariance_pred: float = Field(0.0, ge=0, description="NMSE of R_pred (lam_cov_pred)")
    diagonal: float = Field(1.0, ge=0, description="relative weight of the diagonal in both NMSEs (lam_diag)")
    off_diagonal: float = Field(1.0, ge=0, description="relative weight off the diagonal (lam_off)")
    detection: float = Field(1.0, ge=0, description="existence of a source in a cell, or of a slot")
    offset: float = Field(0.5, ge=0, description="offset from the cell's centre and relative power, at true cells")
    count: float = Field(0.5, ge=0, description="negative log-probability of the true count (lam_K)")
    auxiliary: float = Field(0.2, ge=0, description="Huber loss on matched angles and log-range (lam_aux)")
    disturbance: float = Field(
        0.2, ge=0, description="share of noise and channel error; for networks without the noise power"
    )
    orthogonality: float = Field(0.0, ge=0, description="factor columns' mutual coherence (lam_ortho)")
    cross: float = Field(0.0, ge=0, description="agreement of angle and range Gram matrices (lam_cross)")
    gap: float = Field(0.0, ge=0, description="eigengap hinge (lam_gap)")
    peak: float = Field(0.0, ge=0, description="angle Chamfer distance (lam_peak)")
    subspace_alignment: float = Field(0.0, ge=0, description="energy outside the true subspace (lam_subspace_align)")
    peak_contrast: float = Field(0.0, ge=0, description="spectrum at truth against elsewhere (lam_peak_contrast)")

    def only(self, **weights: float) -> LossSpec:
        """All terms off but the named ones; the relative NMSE weights return to 1."""
        off = dict.fromkeys(TERMS, 0.0) | dict.fromkeys(NMSE_PARTS, 1.0)
        return LossSpec(**(off | weights))

    def active(self, *, noise_known: bool) -> list[str]:
        """Terms with a weight, without the disturbance where the network is given the noise power."""
        return [name for name in TERMS if getattr(self, name) > 0 and not (noise_known and name == "disturbance")]


TERMS = tuple(name for name in LossSpec.model_fields if name not in NMSE_PARTS)
"""Names of the loss terms, in their order."""

EMPTY_TERMS = ("detection", "count", "disturbance", "orthogonality", "cross")
"""Terms that a scene without a source has a share in."""


def label_factor(truth: Sources, geometry: Geometry) -> Tensor:
    """B [batch, N, K_max] with B B^H = A diag(p) A^H scaled to trace N; columns of absent sources are zero."""
    weight = truth.power * truth.mask
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30) * geometry.num_elements
    return steering(geometry, truth.azimuth, truth.elevation, truth.range_m).mT * weight.sqrt().unsqueeze(1)


def nmse(estimate: Tensor, label: Tensor, diagonal: float = 1.0, off_diagonal: float = 1.0) -> Tensor:
    """||R^ - R||_F^2 / ||R||_F^2 per scene [B]: exactly 0 for R^ = R and 1 for R^ = 0 at unit weights."""
    difference = torch.view_as_real(estimate - label).square().sum(-1)
    scale = torch.view_as_real(label).square().sum(-1).sum((-1, -2)).clamp(min=1e-30)
    on = difference.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (off_diagonal * difference.sum((-1, -2)) + (diagonal - off_diagonal) * on) / scale


def cell_targets(truth: Sources, grid: Grid) -> tuple[Tensor, Tensor]:
    """Nearest cell of every source and its position relative to that cell's centre.

    Returns:
        index [B, K] into the flattened grid, offset [B, 3, K] in cells along (v, w, rho).
    """
    cosines = to_cosines(truth.azimuth, truth.elevation, truth.range_m)
    places, offsets = [], []
    sizes = (grid.num_v, grid.num_w, grid.num_rho)
    for value, (low, _), step, size in zip(cosines, grid.region.bounds(), grid.spacing(), sizes, strict=True):
        continuous = (value - low) / (step or 1.0)  # a coordinate that is known has one cell
        nearest = continuous.round().clamp(0, size - 1)
        places.append(nearest.long())
        offsets.append(continuous - nearest)
    v, w, rho = places
    return (rho * grid.num_v + v) * grid.num_w + w, torch.stack(offsets, 1)


def detection(outputs: Outputs, truth: Sources, grid: Grid) -> Tensor:
    """Cross-entropy of "a source is here": over cells (sum, nearest cell positive), or over matched slots (mean)."""
    if outputs.cell_logit is None:
        slots = _slots(outputs, truth.max_sources)
        width = max(slots.max_sources, truth.max_sources)
        slots, truth = slots.padded(width), truth.padded(width)
        order = assignment(distances(slots, truth), truth.mask, slots.mask)
        logits = F.pad(outputs.existence[:, :width], (0, width - outputs.existence[:, :width].shape[1]))
        cost = F.binary_cross_entropy_with_logits(logits.gather(1, order), truth.mask.float(), reduction="none")
        real = slots.mask.gather(1, order)  # not what a wide truth was padded with
        return (cost * real).sum() / real.sum()
    index, _ = cell_targets(truth, grid)
    target = torch.zeros_like(outputs.cell_logit).flatten(1)
    target = target.scatter_reduce(1, index, truth.mask.to(target.dtype), reduce="amax")
    cells = F.binary_cross_entropy_with_logits(outputs.cell_logit.flatten(1), target, reduction="sum")
    return cells / (len(truth) * truth.max_sources)


def offset(outputs: Outputs, truth: Sources, grid: Grid) -> Tensor:
    """Huber on offset (cells) and on log relative power at the true cells; 0 for the token front-end."""
    if outputs.cell_offset is None or outputs.cell_power is None:
        return outputs.existence.sum() * 0.0
    index, target = cell_targets(truth, grid)
    found = outputs.cell_offset.flatten(2).gather(2, index.unsqueeze(1).expand(-1, 3, -1))
    mask = truth.mask.unsqueeze(1)
    place = (F.smooth_l1_loss(found, target, beta=0.1, reduction="none") * mask).sum() / mask.sum()
    power = outputs.cell_power.flatten(1).gather(1, index).clamp(min=1e-6).log()
    share = truth.power / (truth.power * truth.mask).sum(-1, keepdim=True).clamp(min=1e-30)
    strength = F.smooth_l1_loss(power, share.clamp(min=1e-6).log(), reduction="none") * truth.mask
    return place + 0.2 * strength.sum() / truth.mask.sum()


def count(outputs: Outputs, truth: Sources) -> Tensor:
    """Negative log-probability of the true number of sources."""
    return F.nll_loss(outputs.log_count, truth.num_sources)


def auxiliary(outputs: Outputs, truth: Sources) -> Tensor:
    """Huber on wrapped angles (in units of 5 deg) and on log-range, over slots matched to the truth."""
    matched, padded, paired = match(_slots(outputs, truth.max_sources), truth)
    unit = 0.0873
    total = F.smooth_l1_loss(matched.range_m.log(), padded.range_m.log(), reduction="none")
    for name in ("azimuth", "elevation"):
        difference = getattr(matched, name) - getattr(padded, name)
        wrapped = torch.atan2(difference.sin(), difference.cos())
        total = total + F.smooth_l1_loss(wrapped / unit, torch.zeros_like(wrapped), reduction="none")
    return (total * paired).sum() / paired.sum().clamp(min=1)


def disturbance(outputs: Outputs, scenes: Scenes) -> Tensor:
    """Huber on the logits of the channel's gain and of the disturbance's share of the received power.

    The true gain is the regression coefficient of the true channel's scattered part on the known one's; the true
    disturbance is what the channel with that gain does not explain: y_l - H^ diag(c_l) sum_k a_k s_kl.

    Raises:
        ConfigError: scenes without symbols.
    """
    truth, symbols = scenes.require_truth(), scenes.symbols
    if symbols is None:
        raise ConfigError("the loss term 'disturbance' needs scenes with symbols; set loss.disturbance = 0")
    known = scenes.bs_ris_channel
    direct, scattered = split_channel(known)
    gain = torch.ones_like(outputs.channel_gain)
    if scenes.true_channel is not None:
        along = (scattered.conj() * (scenes.true_channel - direct)).real.sum((1, 2))
        gain = (along / scattered.abs().square().sum((1, 2)).clamp(min=1e-30)).clamp(LEAST_GAIN, 1)
    wave = symbols * truth.mask.unsqueeze(1)
    wave = wave @ steering(scenes.geometry, truth.azimuth, truth.elevation, truth.range_m)
    explained = (scenes.ris_codes * wave) @ (direct + gain[:, None, None] * scattered).mT
    share = (scenes.y - explained).abs().square().mean((1, 2)) / scenes.y.abs().square().mean((1, 2)).clamp(min=1e-30)
    noise = F.smooth_l1_loss(_logit(outputs.disturbance, 1e-4), _logit(share, 1e-4))
    return noise + F.smooth_l1_loss(_logit(outputs.channel_gain, GAIN_EDGE), _logit(gain, GAIN_EDGE))


def peak(outputs: Outputs, truth: Sources) -> Tensor:
    """Chamfer distance in (v, w), in beam widths, between existence-weighted slots and the truth."""
    slots = truth.max_sources
    target = to_cosines(truth.azimuth, truth.elevation, truth.range_m)
    dv = outputs.v[:, :slots, None] - target.v[:, None]
    dw = outputs.w[:, :slots, None] - target.w[:, None]
    distance = (dv.square() + dw.square() + 1e-8).sqrt() / 0.167
    far = distance.max().detach() + 1
    nearest_slot = distance.amin(1)
    nearest_truth = distance.masked_fill(~truth.mask.unsqueeze(1), far).amin(2)
    weight = torch.sigmoid(outputs.existence[:, :slots])
    forward = (nearest_slot * truth.mask).sum() / truth.mask.sum()
    return forward + (nearest_truth * weight).sum() / weight.sum().clamp(min=1e-6)


def orthogonality(factor: Tensor, columns: int) -> Tensor:
    """Mean squared coherence between the first ``columns`` columns of F [B, N, R]: [B]."""
    gram = _normalised_gram(factor[:, :, :columns])
    return _mean_off_diagonal(gram.abs().square())


def cross(outputs: Outputs, geometry: Geometry, slots: int) -> Tensor:
    """Mean squared difference of the normalised Gram off-diagonals of the slots' angle and range factors: [B].

    The angle factor is the plane wave toward the slot, the range factor what the exact wave has beyond it.
    """
    coordinates = outputs.cosines(slots)
    planar = cosine_steering(geometry.model_copy(update={"wave": "planar"}), coordinates)
    curvature = cosine_steering(geometry, coordinates) * planar.conj()
    angle, radial = _normalised_gram(planar.mT), _normalised_gram(curvature.mT)
    return _mean_off_diagonal((angle.abs() - radial.abs()).square())


def eigengap(factor: Tensor, num_sources: Tensor, margin: float = 0.05) -> Tensor:
    """Hinge on (lambda_K - lambda_{K+1}) / trace of F F^H; eigenvalues of F^H F, no eigenvector is differentiated."""
    gram = factor.mH @ factor
    values = torch.linalg.eigvalsh(gram).flip(-1)
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    share = F.pad(share, (0, 1))
    last = (num_sources - 1).clamp(min=0).unsqueeze(-1)
    return F.relu(margin - (share.gather(1, last) - share.gather(1, last + 1))).mean()


def subspace_alignment(predicted: Tensor, label: Tensor) -> Tensor:
    """||P_perp R P_perp||^2 / ||R||^2 with P = U (U^H U + 3e-4 I)^-1 U^H from the label's columns, without gradient."""
    outside = predicted - _project(predicted, label)
    outside = outside - _project(outside.mH, label).mH
    return (_energy(outside) / _energy(predicted).clamp(min=1e-30)).mean()


def peak_contrast(predicted: Tensor, truth: Sources, geometry: Geometry, grid: Grid) -> Tensor:
    """softplus(log mean elsewhere - log mean at truth) of the Bartlett spectrum a^H R a; elsewhere: every 16th cell."""
    at = steering(geometry, truth.azimuth, truth.elevation, truth.range_m)
    here = torch.einsum("bkn,bnm,bkm->bk", at.conj(), predicted, at).real.clamp(min=1e-6)
    elsewhere = dictionary(geometry, grid, predicted.device)[:, ::16]
    there = ((predicted @ elsewhere) * elsewhere.conj()).sum(1).real.clamp(min=1e-6).mean(-1)
    here_mean = (here * truth.mask).sum(-1) / truth.mask.sum(-1).clamp(min=1)
    return F.softplus(there.log() - here_mean.clamp(min=1e-6).log()).mean()


def loss_terms(
    spec: LossSpec,
    network: Network,
    outputs: Outputs,
    covariances: Covariances,
    scenes: Scenes,
    *,
    may_be_empty: bool = False,
) -> dict[str, Tensor]:
    """Unweighted value of every active term.

    Args:
        spec: weights; a term of weight 0 is not computed.
        network: whose outputs these are.
        outputs: of the network, with its dense maps.
        covariances: that it predicts, and effective.
        scenes: with truth.
        may_be_empty: some scenes may hold no source; terms about sources are then means over the others. To look for
            one costs a wait for the device.

    Raises:
        ConfigError: scenes without truth, or without the symbols that the disturbance needs.
    """
    truth, geometry, grid = scenes.require_truth(), network.spec.geometry, network.spec.cells
    slots = network.spec.max_sources
    label = label_factor(truth, geometry)
    covariance = label @ label.mH
    parts = (spec.diagonal, spec.off_diagonal)
    active = spec.active(noise_known=network.spec.noise_known)
    if may_be_empty and not bool((some := truth.mask.any(-1)).all()):
        return _with_empty_scenes(spec, network, outputs, covariances, scenes, some)
    compute = {
        "covariance": lambda: nmse(covariances.effective, covariance, *parts).mean(),
        "covariance_pred": lambda: nmse(covariances.predicted, covariance, *parts).mean(),
        "detection": lambda: detection(outputs, truth, grid),
        "offset": lambda: offset(outputs, truth, grid),
        "count": lambda: count(outputs, truth),
        "auxiliary": lambda: auxiliary(outputs, truth),
        "disturbance": lambda: disturbance(outputs, scenes),
        "orthogonality": lambda: orthogonality(outputs.factor, slots),
        "cross": lambda: cross(outputs, geometry, slots),
        "gap": lambda: eigengap(outputs.factor, truth.num_sources),
        "peak": lambda: peak(outputs, truth),
        "subspace_alignment": lambda: subspace_alignment(covariances.predicted, label),
        "peak_contrast": lambda: peak_contrast(covariances.predicted, truth, geometry, grid),
    }
    return {name: compute[name]() for name in active}


def _with_empty_scenes(
    spec: LossSpec, network: Network, outputs: Outputs, covariances: Covariances, scenes: Scenes, some: Tensor
) -> dict[str, Tensor]:
    """Terms of a batch of which only ``some`` scenes hold a source: of these alone where a term is about sources."""
    active = spec.active(noise_known=network.spec.noise_known)
    of_all = {name: getattr(spec, name) if name in EMPTY_TERMS else 0.0 for name in active}
    terms = loss_terms(spec.only(**of_all), network, outputs, covariances, scenes)
    rest = [name for name in active if name not in EMPTY_TERMS]
    if rest and bool(some.any()):
        chosen = Outputs._make(None if value is None else value[some] for value in outputs)
        both = Covariances(*(value[some] for value in covariances))
        weights = {**dict.fromkeys(TERMS, 0.0), **{name: getattr(spec, name) for name in rest}}
        terms |= loss_terms(spec.model_copy(update=weights), network, chosen, both, scenes[some])
    nothing = outputs.existence.sum() * 0.0
    return {name: terms.get(name, nothing) for name in active}


def _logit(share: Tensor, edge: float) -> Tensor:
    return torch.logit(share.clamp(edge, 1 - edge))


def _slots(outputs: Outputs, slots: int) -> Sources:
    """The slots as sources, all of them present."""
    power = outputs.power[:, :slots]
    return Sources(*slot_geometry(outputs, slots), power, torch.ones_like(power, dtype=torch.bool))


def _normalised_gram(columns: Tensor) -> Tensor:
    unit = columns / columns.abs().square().sum(-2, keepdim=True).clamp(min=1e-12).sqrt()
    return unit.mH @ unit


def _mean_off_diagonal(square: Tensor) -> Tensor:
    """Mean of the entries off the diagonal of [B, K, K]; 0 for K = 1."""
    size = square.shape[-1]
    if size == 1:
        return square.sum() * 0
    return square[:, ~torch.eye(size, dtype=torch.bool, device=square.device)].mean()


def _energy(matrix: Tensor) -> Tensor:
    return torch.view_as_real(matrix).square().sum((-1, -2, -3))


@torch.no_grad()
def _inverse_gram(label: Tensor) -> Tensor:
    gram = label.mH @ label
    scale = gram.diagonal(dim1=-2, dim2=-1).real.amax(-1).clamp(min=1e-30)[:, None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse: Tensor = torch.linalg.inv(gram + SUBSPACE_LOADING * scale * identity)
    return inverse


def _project(matrix: Tensor, label: Tensor) -> Tensor:
    """P M with P onto the span of the label's columns."""
    return label @ (_inverse_gram(label) @ (label.mH @ matrix))
