"""Covariances of the surface's aperture and source counts from eigenvalues.

All covariances are complex Hermitian [B, N, N] with trace N. The classical sample covariance does not exist here: y_l
has M < N entries and the sensing matrix changes with every snapshot, so an aperture vector is never observed. See
``least_squares_covariance`` for what comes of pretending otherwise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ris_hpo.errors import NumericalError
from ris_hpo.physics.array import Geometry, steering
from ris_hpo.physics.cholesky import cholesky
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

CountCriterion = Literal["mdl", "aic", "sorte"]


def source_covariance(geometry: Geometry, sources: Sources) -> Tensor:
    """R = A diag(p) A^H, scaled to trace N (zero where a scene has no source or no power).

    With refined sources this is the estimate of choice: it uses all snapshots jointly through the likelihood.
    """
    a = steering(geometry, sources.azimuth, sources.elevation, sources.range_m)
    weighted = a * (sources.power * sources.mask).clamp(min=0).sqrt().unsqueeze(-1)
    return trace_normalised(weighted.mT @ weighted.conj())


def least_squares_covariance(scenes: Scenes) -> Tensor:
    """R = (1/L) sum_l x_l x_l^H with the minimum-norm solution x_l = T_l^+ y_l of every snapshot, trace N.

    Nearly useless, and here to be seen to fail. x_l is the projection of the aperture vector on the M-dimensional row
    space of T_l: a fraction M / N (1/9 at the defaults) of its energy, and since codes differ, another fraction every
    time. The L projections of one steering vector do not line up, so R's leading subspace overlaps the sources' by
    .02-.23; more snapshots average the projectors to a multiple of the identity only slowly, against a noise that T_l^+
    has amplified by the weakest of its M singular values. Use ``source_covariance`` of refined sources.
    """
    snapshots = least_squares_snapshots(scenes)
    return trace_normalised(snapshots.mT @ snapshots.conj())


def least_squares_snapshots(scenes: Scenes) -> Tensor:
    """x_l = T_l^H (T_l T_l^H + eps I)^-1 y_l, complex64 [B, L, N]; eps is 1e-5 of the mean diagonal."""
    sensing = scenes.sensing_matrices()
    gram = sensing @ sensing.mH
    level = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = cholesky(gram + (1e-5 * level + 1e-30) * eye, "T T^H")
    return (sensing.mH @ torch.cholesky_solve(scenes.y.to(gram.dtype).unsqueeze(-1), factor)).squeeze(-1)


def received_covariance(scenes: Scenes) -> Tensor:
    """(1/L) sum_l y_l y_l^H, complex64 [B, M, M]. The sources' signatures change with l: it has no signal subspace."""
    return scenes.y.mT @ scenes.y.conj() / scenes.y.shape[1]


def trace_normalised(matrix: Tensor) -> Tensor:
    """Hermitian part scaled to trace N; a matrix without trace stays zero."""
    hermitian = (matrix + matrix.mH) / 2
    trace = hermitian.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
    tiny = torch.finfo(trace.dtype).tiny
    return torch.where(
        trace > tiny, hermitian * (matrix.shape[-1] / trace.clamp(min=tiny)), torch.zeros_like(hermitian)
    )


def signal_subspace(covariance: Tensor, rank: int, iterations: int = 12) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the ``rank`` leading eigenvectors by orthogonal iteration, without gradient.

    Costs rank + 4 matrix-vector products an iteration and one (rank + 4)-sized eigenproblem, where a full
    eigendecomposition of N x N would be some fifty times as dear. It converges by the eigengap to the power
    ``iterations``: at once for R of exact rank.

    Returns:
        U [B, N, rank] and Ritz values [B, rank], largest first.

    Raises:
        NumericalError: the covariance is not finite.
    """
    with torch.no_grad():
        if not bool(torch.view_as_real(covariance).isfinite().all()):
            raise NumericalError("covariance: not finite")
        n = covariance.shape[-1]
        width = min(n, rank + 4)
        matrix = covariance.to(torch.complex128)
        # columns of R plus fixed pseudo-random mixing: deterministic, and never orthogonal to the signal subspace
        angle = torch.arange(n * width, dtype=torch.float64, device=matrix.device).square() * (math.sqrt(5) - 1)
        start = torch.polar(torch.ones_like(angle), angle).view(n, width)
        basis = torch.linalg.qr(matrix @ start + 1e-12 * start).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ basis + 1e-14 * basis).Q
        values, vectors = torch.linalg.eigh(basis.mH @ matrix @ basis)
        order = torch.arange(width - 1, width - 1 - rank, -1, device=matrix.device)
        return (basis @ vectors)[..., order], values[..., order]


def mdl_order(eigenvalues: Tensor, num_snapshots: int, max_order: int) -> Tensor:
    """Minimum description length (Wax and Kailath 1985) on eigenvalues [B, P], any order: int64 [B] in 0..max_order."""
    penalty = 0.5 * math.log(max(num_snapshots, 2))
    return _information_order(eigenvalues, num_snapshots, max_order, penalty)


def aic_order(eigenvalues: Tensor, num_snapshots: int, max_order: int) -> Tensor:
    """Akaike's criterion on eigenvalues [B, P]: int64 [B] in 0..max_order."""
    return _information_order(eigenvalues, num_snapshots, max_order, 1.0)


def sorte_order(eigenvalues: Tensor, max_order: int) -> Tensor:
    """SORTE, the ratio of variances of eigenvalue gaps (He, Cichocki, Xie and Choi, IEEE TSP 58(12), 2010).

    Returns:
        int64 [B] in 1..max_order; 1 where there are too few eigenvalues for a ratio.
    """
    values = eigenvalues.sort(-1, descending=True).values
    gaps = values[..., :-1] - values[..., 1:]
    last = min(max_order, gaps.shape[-1] - 2)
    if last < 1:
        return torch.ones(values.shape[:-1], dtype=torch.int64, device=values.device)
    variances = torch.stack([gaps[..., k:].var(-1, correction=0) for k in range(last + 1)], dim=-1)
    ratio = variances[..., 1:] / variances[..., :-1].clamp(min=torch.finfo(values.dtype).tiny)
    return ratio.argmin(-1) + 1


def count_from_snapshots(scenes: Scenes, criterion: CountCriterion, max_order: int) -> Tensor:
    """Source count from the M x M covariance of y, int64 [B] in 1..max_order.

    At chance level by construction (see ``received_covariance``): the baseline that evidence has to beat.
    """
    eigenvalues = torch.linalg.eigvalsh(received_covariance(scenes).to(torch.complex128)).clamp(min=0)
    num_snapshots = scenes.y.shape[1]
    if criterion == "mdl":
        order = mdl_order(eigenvalues, num_snapshots, max_order)
    elif criterion == "aic":
        order = aic_order(eigenvalues, num_snapshots, max_order)
    else:
        order = sorte_order(eigenvalues, max_order)
    return order.clamp(1, max_order)


def _information_order(eigenvalues: Tensor, num_snapshots: int, max_order: int, penalty: float) -> Tensor:
    values = eigenvalues.sort(-1, descending=True).values
    size = values.shape[-1]
    # more eigenvalues than snapshots: the surplus are zero and carry no likelihood
    size = min(size, num_snapshots)
    values = values[..., :size]
    values = values.clamp(min=1e-9) if bool((values <= 0).all()) else values
    values = torch.maximum(values, 1e-7 * values[..., :1])
    costs = []
    for k in range(min(max_order, size - 1) + 1):
        rest = values[..., k:]
        misfit = num_snapshots * (size - k) * (rest.mean(-1).log() - rest.log().mean(-1))
        costs.append(misfit + penalty * k * (2 * size - k))
    return torch.stack(costs, dim=-1).argmin(-1)
