"""The one Cholesky factorisation: exact where it exists, repaired one matrix at a time, refused beyond its bounds."""

import logging

import pytest
import torch

from ris_hpo.errors import NumericalError
from ris_hpo.physics.cholesky import RIDGES, cholesky, inverse_information


def spectrum_of(*eigenvalues: float, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    """A Hermitian matrix [1, P, P] of these eigenvalues."""
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=dtype, generator=generator)).Q
    return ((basis * torch.tensor(eigenvalues, dtype=dtype)) @ basis.mH).unsqueeze(0)


def test_a_positive_definite_matrix_is_factorised_as_it_is(caplog):
    matrix = spectrum_of(1.0, 2.0, 5.0)
    with caplog.at_level(logging.INFO):
        factor = cholesky(matrix, "matrix")
    assert torch.equal(factor, torch.linalg.cholesky(matrix))
    assert not caplog.records


@pytest.mark.parametrize(("least", "ridge"), [(-1e-14, 1e-12), (-1e-8, 1e-5), (-1e-4, 1e-3)])
def test_the_smallest_ridge_that_works_is_added_and_logged(least, ridge, caplog):
    good = spectrum_of(1.0, 2.0, 5.0)
    matrix = torch.cat([good, spectrum_of(least, 1.0, 1.0), good])
    with caplog.at_level(logging.INFO):
        factor = cholesky(matrix, "Gram matrix")
    level = matrix[1].diagonal().real.max()
    torch.testing.assert_close(
        factor[1] @ factor[1].mH, matrix[1] + ridge * level * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-13
    )
    assert torch.equal(factor[0], torch.linalg.cholesky(good)[0])  # the others are not touched
    assert caplog.records[-1].getMessage() == f"Gram matrix: 1 of 3 matrices get a ridge of {ridge:g}"
    assert caplog.records[-1].levelno == (logging.WARNING if ridge == RIDGES[-1] else logging.INFO)


def test_what_no_ridge_repairs_is_refused_by_name():
    with pytest.raises(NumericalError, match=r"Gram matrix: not positive semi-definite, even with a ridge of 0\.001"):
        cholesky(spectrum_of(-0.1, 1.0, 1.0), "Gram matrix")
    with pytest.raises(NumericalError, match="Gram matrix: not finite"):
        cholesky(spectrum_of(1.0, 1.0) * torch.nan, "Gram matrix")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_ridge_bounds_the_solution_where_columns_coincide(dtype):
    column = torch.ones(4, 1, dtype=dtype)
    twice = torch.cat([column, column], -1)
    factor = cholesky(twice.mH @ twice, "Gram matrix", ridged=True)
    solution = torch.cholesky_solve(twice.mH @ column, factor)
    torch.testing.assert_close(solution.sum(), torch.ones((), dtype=dtype), rtol=1e-3, atol=0)
    assert solution.abs().max().item() < 10
    nothing = cholesky(torch.zeros(1, 2, 2, dtype=dtype), "Gram matrix", ridged=True)
    assert torch.isfinite(nothing).all()


def test_information_is_inverted_in_any_units():
    information = spectrum_of(1.0, 2.0, 5.0, dtype=torch.float64)
    units = torch.tensor([1e-6, 1.0, 1e7], dtype=torch.float64)
    scaled = information * units.unsqueeze(-1) * units
    covariance, log_det = inverse_information(scaled, "information")
    torch.testing.assert_close(covariance * units.unsqueeze(-1) * units, torch.linalg.inv(information))
    torch.testing.assert_close(log_det, torch.linalg.slogdet(scaled).logabsdet)


def test_a_parameter_without_information_has_a_large_finite_variance_of_its_own():
    information = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)).unsqueeze(0)
    covariance, _ = inverse_information(information, "information")
    assert covariance[0, 0, 0].item() == pytest.approx(0.25)
    assert 1e9 < covariance[0, 1, 1].item() < 1e15
    assert covariance[0, 0, 1].item() == 0
