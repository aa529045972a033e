"""The one Cholesky factorisation, with the one rule for matrices that rounding made indefinite.

A matrix whose factor does not exist gets a ridge, a multiple of the identity: 1e-12 of its largest diagonal entry (the
rounding of double precision), then 1e-5 (that of products in single precision), then 1e-3. The first that works is
taken and logged, the last of them as a warning; what none of them repairs is a :class:`NumericalError`. Only the
matrices that fail are changed, so that the result for one scene never depends on the others of its batch.

Two places factorise for themselves: a Levenberg-Marquardt step (:mod:`ris_hpo.estimators.descent`) takes a failure as a
sign to raise its damping; the whitening of features cannot fail, and a training step must not wait for the check.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ris_hpo.errors import NumericalError

RIDGES = (1e-12, 1e-5, 1e-3)
"""Ridges that are tried in turn, relative to the largest diagonal entry."""

log = logging.getLogger(__name__)


def cholesky(matrix: Tensor, name: str, *, ridged: bool = False) -> Tensor:
    """Lower Cholesky factor of Hermitian positive semi-definite matrices, repaired where rounding requires it.

    Args:
        matrix: real or complex [..., P, P]; only the lower triangle is read.
        name: what it is, for the log and the error.
        ridged: add the first ridge to every matrix, so that solutions stay bounded where columns of a Gram matrix
            coincide. A matrix of zeros then becomes 1e-12 times the identity.

    Returns:
        [..., P, P] of the same dtype; no gradient flows through a repaired factor.

    Raises:
        NumericalError: an entry is not finite, or a matrix is indefinite even with the largest ridge.
    """
    level = matrix.diagonal(dim1=-2, dim2=-1).real.amax(-1, keepdim=True)
    level = torch.where(level > 0, level, torch.ones_like(level)).expand(matrix.shape[:-1])
    start = matrix + torch.diag_embed(RIDGES[0] * level).to(matrix.dtype) if ridged else matrix
    factor, failed = torch.linalg.cholesky_ex(start)
    if bool((failed > 0).any()) and not bool(matrix.isfinite().all()):
        raise NumericalError(f"{name}: not finite; a position, power or noise power is out of bounds")
    for ridge in RIDGES[1:] if ridged else RIDGES:
        bad = failed > 0
        if not bool(bad.any()):
            break
        importance = logging.WARNING if ridge == RIDGES[-1] else logging.INFO
        log.log(importance, "%s: %d of %d matrices get a ridge of %g", name, int(bad.sum()), bad.numel(), ridge)
        repaired = torch.linalg.cholesky_ex(matrix[bad] + torch.diag_embed(ridge * level[bad]).to(matrix.dtype))
        factor, failed = factor.clone(), failed.clone()
        factor[bad], failed[bad] = repaired
    if bool((failed > 0).any()):
        raise NumericalError(
            f"{name}: not positive semi-definite, even with a ridge of {RIDGES[-1]:g} of its largest diagonal entry"
        )
    result: Tensor = factor
    return result


def inverse_information(information: Tensor, name: str, *, ridged: bool = False) -> tuple[Tensor, Tensor]:
    """Inverse and log-determinant of information (Fisher) matrices, scaled to a unit diagonal first.

    Scaled so, parameters of any units are factorised alike and the repair of :func:`cholesky` means the same for each.
    A parameter without information gets a very large finite variance, not correlated with the others.

    Args:
        information: symmetric positive semi-definite, float64 [..., P, P].
        name: what it is, for the log and the error.
        ridged: as of :func:`cholesky`.

    Returns:
        covariance [..., P, P] and log det [...] of the information.

    Raises:
        NumericalError: as of :func:`cholesky`.
    """
    diagonal = information.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    factor = cholesky(information * scale.unsqueeze(-1) * scale.unsqueeze(-2), name, ridged=ridged)
    covariance = torch.cholesky_inverse(factor) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    log_det = 2 * (factor.diagonal(dim1=-2, dim2=-1).log() - scale.log()).sum(-1)
    return covariance, log_det
