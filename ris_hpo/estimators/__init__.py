"""Classical estimators: batched in torch on any device, all returning the one ``Sources`` type."""

from ris_hpo.estimators.estimate import EstimatorName, EstimatorSpec, estimate
from ris_hpo.estimators.maximum_likelihood import deterministic_ml, ols, spectrum_maxima
from ris_hpo.estimators.refinement import evidence, refine
from ris_hpo.estimators.spec import LikelihoodSpec

__all__ = [
    "EstimatorName",
    "EstimatorSpec",
    "LikelihoodSpec",
    "deterministic_ml",
    "estimate",
    "evidence",
    "ols",
    "refine",
    "spectrum_maxima",
]
