"""Phase 0: the certificate, and each fault that must not get one."""

from __future__ import annotations

import pytest
import torch

from ris_hpo.errors import ProofError, TrainingDivergedError
from ris_hpo.learning.losses import TERMS
from ris_hpo.training import proof
from ris_hpo.training.config import RunConfig


def test_proof_of_a_small_form_passes_and_is_found_again(tmp_path):
    config = proof.small_form(RunConfig().replaced({"network.covariance_head": "factor"}))
    assert proof.find_certificate(tmp_path, config) is None
    certificate = proof.prove(config, tmp_path, scenes=8, epochs=400)
    assert certificate.nmse <= 0.1
    assert certificate.checks["nmse_of_truth"] == 0
    assert certificate.checks["parameters_without_gradient"] == 0
    assert proof.find_certificate(tmp_path, config) == certificate
    other = config.replaced({"network.front_end": "tokens", "network.factor_basis": "free"})
    assert proof.find_certificate(tmp_path, other) is None


def test_a_proof_that_failed_says_the_same_when_asked_again(tiny, tmp_path):
    for _ in range(2):
        with pytest.raises(ProofError, match=r"NMSE 0\.\d+ after 1 epochs"):
            proof.prove(tiny, tmp_path, scenes=16, epochs=1)


def test_proof_catches_a_prediction_that_is_detached(tmp_path, monkeypatch):
    real = proof.covariances

    def detached(*arguments):
        mixed = real(*arguments)
        return type(mixed)(*(matrix.detach() for matrix in mixed))

    import ris_hpo.training.learner as learner_module

    monkeypatch.setattr(learner_module, "covariances", detached)
    with pytest.raises(TrainingDivergedError, match="loss term 'covariance_pred' depends on no parameter"):
        proof.prove(proof.small_form(RunConfig()), tmp_path, scenes=8, epochs=4)


def test_proof_catches_a_parameter_without_gradient(tmp_path, monkeypatch):
    real = proof.Network.__init__

    def frozen(self, spec):
        real(self, spec)
        self.backbone.stem.weight.register_hook(torch.zeros_like)

    monkeypatch.setattr(proof.Network, "__init__", frozen)
    with pytest.raises(ProofError, match=r"1 trained parameters get no gradient, first: backbone.stem.weight"):
        proof.prove(proof.small_form(RunConfig()), tmp_path, scenes=8, epochs=4)


def test_proof_catches_too_little_learning(tmp_path):
    with pytest.raises(ProofError, match=r"NMSE 0\.\d+ after 4 epochs, expected <= 0.1; "):
        proof.prove(proof.small_form(RunConfig()), tmp_path, scenes=16, epochs=4)


def test_proof_switches_off_everything_that_could_hide_failure():
    plain = proof.proof_config(RunConfig(), 512, 10)
    weights = plain.loss.model_dump()
    assert weights["covariance_pred"] == 1
    assert all(weights[name] == 0 for name in TERMS if name != "covariance_pred")
    assert plain.optimizer.weight_decay == plain.optimizer.ema_decay == plain.network.dropout == 0
    assert plain.optimizer.precision == "fp32"
    assert plain.inference.hybrid.beta == 0
    assert plain.budget.fixed_scenes == 512
