from __future__ import annotations

import pytest
import torch

from ris_hpo.errors import ConfigError, GateError, ProofError, TrainingDivergedError
from ris_hpo.learning.losses import TERMS
from ris_hpo.physics.scene import simulate
from ris_hpo.training import proof, telemetry
from ris_hpo.training.config import RunConfig
from ris_hpo.training.curriculum import standard_phases, with_curriculum
from ris_hpo.training.trainer import Trainer


def gate(metric, direction, margin):
    return {"metric": metric, "direction": direction, "margin": margin}


def test_gates_are_evaluated_with_their_evidence(tiny, tmp_path):
    phases = [
        {"name": "one", "share": 1 / 3, "gates": [gate("k_loc", "down", -9.0)]},
        {"name": "two", "share": 2 / 3, "gates": [gate("success", "up", -1.0), gate("k_over", "down", -1.0)]},
    ]
    trainer = Trainer(tiny.replaced({"phases": phases}), tmp_path)
    list(trainer.run())
    assert trainer.finished
    gates = [event for event in telemetry.read(tmp_path) if event["event"] == telemetry.GATE]
    assert [(g["phase"], g["metric"], g["passed"]) for g in gates] == [
        ("one", "k_loc", True),
        ("two", "success", True),
        ("two", "k_over", True),
    ]
    assert gates[0]["after"] == trainer.history[0].network.k_loc


def test_sabotaged_phase_is_stopped_by_its_gate_after_its_extensions(tiny, tmp_path):
    phases = [
        {"name": "sabotaged", "share": 1 / 3, "patience": 1, "gates": [gate("k_loc", "down", 5.0)]},
        {"name": "never", "share": 2 / 3},
    ]
    trainer = Trainer(tiny.replaced({"phases": phases}), tmp_path)
    with pytest.raises(GateError, match=r"phase 'sabotaged' failed its gate: k_loc should go down by 5: "):
        list(trainer.run())
    assert trainer.phase_extensions == 1
    assert "never" not in {event.get("phase") for event in telemetry.read(tmp_path)}


def test_phase_survives_a_stop(tiny, tmp_path):
    phases = [{"name": n, "share": s, "backbone_rate": r} for n, s, r in (("a", 1 / 3, 1.0), ("b", 2 / 3, 0.1))]
    config = tiny.replaced({"phases": phases})
    whole = Trainer(config, tmp_path / "whole")
    list(whole.run())
    steps = iter(range(100))
    stopped = Trainer(config, tmp_path / "parts")
    list(stopped.run(lambda: next(steps) >= 6))
    assert stopped.phase_index == 1
    resumed = Trainer(config, tmp_path / "parts")
    list(resumed.run())
    assert [v.network for v in resumed.history] == [v.network for v in whole.history]


def test_standard_curriculum_is_valid_and_its_shares_add_up():
    config = with_curriculum(RunConfig())
    assert sum(phase.share for phase in config.phases) == pytest.approx(1)
    assert [phase.name for phase in config.phases][:2] == ["hybrid covariance", "count"]
    assert with_curriculum(config) == config
    assert all(phase.gates for phase in standard_phases())


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"name": "a", "share": 0.5}], "must add up to 1"),
        ([{"name": "a", "share": 1, "loss": {"lam_cov": 1}}], "unknown loss term 'lam_cov'"),
        ([{"name": "a", "share": 1, "ramp_share": 0.5}], "less than or equal to 0.15"),
        ([{"name": "a", "share": 1, "ramp": ["diagonal"]}], "unknown loss term 'diagonal'"),
        ([{"name": "a", "share": 1, "ramp_share": 0.15, "ramp": list(TERMS[-7:])}], "7 terms"),
        ([{"name": "a", "share": 1, "ramp": list(TERMS), "ramp_share": 0.05}], "no loss term has a weight"),
        ([{"name": "a", "share": 1, "loss": {"count": -1}}], "count: input should be greater than or equal to 0"),
        ([{"name": "a", "share": 1, "gates": [gate("k_ac", "up", 0)]}], "unknown metric 'k_ac'; did you mean 'k_acc'"),
    ],
)
def test_impossible_phases_are_refused(phases, message, tiny):
    with pytest.raises(ConfigError, match=message):
        tiny.replaced({"phases": phases})


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

    import ris_hpo.training.trainer as trainer_module

    monkeypatch.setattr(trainer_module, "covariances", detached)
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


def test_training_from_given_scenes_in_shuffled_epochs(tiny, tmp_path):
    scenes = simulate(tiny.scene, 77, range(24))
    trainer = Trainer(tiny, tmp_path / "a", scenes=scenes)
    list(trainer.run())
    assert trainer.finished
    again = Trainer(tiny, tmp_path / "b", scenes=scenes)
    list(again.run())
    assert [v.network for v in again.history] == [v.network for v in trainer.history]
    first, second = trainer._shuffled(0).clone(), trainer._shuffled(1)
    assert sorted(first.tolist()) == list(range(24))
    assert not torch.equal(first, second)
