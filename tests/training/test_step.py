"""Each known way in which such a trainer fails to learn, made on purpose: it must be impossible or caught by name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ris_hpo.errors import ConfigError, DeviceError, OutputError, TrainingDivergedError
from ris_hpo.learning.inference import network_sources, predict
from ris_hpo.learning.losses import TERMS
from ris_hpo.physics.scene import simulate
from ris_hpo.scoring.metrics import score
from ris_hpo.training import learner as learner_module
from ris_hpo.training import telemetry
from ris_hpo.training.data import RunData
from ris_hpo.training.finished import load_network
from ris_hpo.training.learner import Learner
from ris_hpo.training.stability import AveragedWeights, OptimizerSpec, StepGate
from ris_hpo.training.trainer import Trainer
from tests.properties import examples


def run(config, directory) -> Trainer:
    trainer = Trainer(config, directory)
    list(trainer.run())
    return trainer


def events(directory, kind):
    return [event for event in telemetry.read(directory) if event["event"] == kind]


def parameters(trainer):
    return [p.detach().clone() for p in trainer.network.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mixed_precision_moves_the_parameters(precision, tiny, tmp_path):
    """AMP that silently froze the parameters."""
    trainer = Trainer(tiny.replaced({"optimizer.precision": precision}), tmp_path)
    before = parameters(trainer)
    list(trainer.run())
    assert all((a != b).any() for a, b in zip(before, parameters(trainer), strict=True) if a.numel() > 1)
    assert all(event["movement"] > 0 for event in events(tmp_path, telemetry.STEP) if event["taken"])
    assert int(trainer.learner.gate.steps_taken) > 0


def poison(monkeypatch, term, value, when):
    """Replace one loss term by ``value`` at the steps in ``when``."""
    real, calls = learner_module.loss_terms, iter(range(10**6))

    def poisoned(*arguments, **options):
        terms = real(*arguments, **options)
        if next(calls) in when:
            terms[term] = terms[term] * value
        return terms

    monkeypatch.setattr(learner_module, "loss_terms", poisoned)


def test_nan_in_one_term_is_skipped_counted_and_named(tiny, tmp_path, monkeypatch):
    """A NaN scrub that hid overflows: here nothing is scrubbed, the step is not taken, and the term is named."""
    poison(monkeypatch, "count", math.nan, {2, 5})
    trainer = run(tiny, tmp_path)
    assert int(trainer.learner.gate.skipped_not_finite) == 2
    assert int(trainer.learner.gate.steps_taken) == 12 - 2
    assert "first non-finite term: count" in trainer.diagnosis()
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
    skipped = [event for event in events(tmp_path, telemetry.STEP) if not event["taken"]]
    assert [event["movement"] for event in skipped] == [0.0, 0.0]
    assert all("raw_count" in event["not_finite"] for event in skipped)


def test_skips_in_a_row_end_the_run_with_the_reason(tiny, tmp_path, monkeypatch):
    """A step gate that skipped and said nothing."""
    poison(monkeypatch, "detection", math.inf, set(range(100)))
    with pytest.raises(TrainingDivergedError, match=r"no step was taken: 4 of 4 skipped, .* term: detection"):
        run(tiny.replaced({"optimizer.skips_allowed": 4}), tmp_path)
    assert events(tmp_path, telemetry.END)[0]["diagnosis"].startswith("training diverged")


def test_overflow_under_fp16_halves_the_scale_and_training_recovers(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, "detection", 1e36, {3})
    trainer = run(tiny.replaced({"optimizer.precision": "fp16"}), tmp_path)
    assert int(trainer.learner.gate.skipped_not_finite) >= 1
    assert float(trainer.learner.gate.scale) < 2.0**14
    assert events(tmp_path, telemetry.STEP)[-1]["taken"]


def test_schedule_cannot_tick_without_a_step(tiny, tmp_path, monkeypatch):
    """A scheduler ticking without a step: the rate is a function of the steps taken."""
    poison(monkeypatch, "count", math.nan, set(range(0, 100, 2)))
    trainer = run(tiny, tmp_path)
    rates = [event["rate_backbone"] for event in events(tmp_path, telemetry.STEP)]
    assert int(trainer.learner.gate.steps_taken) == 6
    assert rates[0] == rates[1]
    assert rates[2] == rates[3]


def test_rate_warms_up_from_a_floor_and_ends_low(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path)
    gate = StepGate(trainer.network, OptimizerSpec(warmup=0.1, warmup_floor=0.2, final_rate=0.05), 100)
    rates = []
    for step in range(100):
        gate.steps_taken.fill_(step)
        rates.append(float(gate.rate()))
    assert 0.2 <= rates[0] < 0.4
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert all(rate > 0 for rate in rates)


class Waits(TorchDispatchMode):
    """Counts values read one at a time, each of which makes an accelerator's queue run dry."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", ["fixed", "gradnorm"])
def test_a_step_reads_its_figures_at_once(kind, tiny, tmp_path):
    trainer = Trainer(tiny.replaced({"balance.kind": kind}), tmp_path)
    with Waits() as waits:
        trainer.learner.step(trainer.data.micro_batches(0, 8), trainer.plan, 0, 8)
    assert waits.count == 0
    assert int(trainer.learner.gate.steps_taken) == 1


def test_zero_gradient_is_no_step(tiny, tmp_path):
    """A zero learning signal (detached prediction) is counted as vanishing, not as progress."""
    trainer = Trainer(tiny, tmp_path)
    for p in trainer.network.parameters():
        p.grad = torch.zeros_like(p)
    assert not bool(trainer.learner.gate.step())
    assert int(trainer.learner.gate.skipped_vanishing) == 1
    assert "no step was taken: 1 of 1 skipped" in trainer.diagnosis()


def test_zero_learning_rate_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: input should be greater than 0"):
        tiny.replaced({"optimizer.learning_rate": 0.0})


def test_a_run_that_cannot_be_is_refused(tiny, tmp_path):
    silent = {f"loss.{name}": 0.0 for name in TERMS} | {"loss.disturbance": 1.0}  # which a known noise power mutes
    with pytest.raises(ConfigError, match="no loss term has a weight"):
        tiny.replaced(silent)
    with pytest.raises(DeviceError, match="device 'abacus'"):
        Trainer(tiny, tmp_path, device="abacus")
    with pytest.raises(ConfigError, match="no training scenes are given"):
        Trainer(tiny, tmp_path, scenes=simulate(tiny.scene, 1, range(0)))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        Trainer(tiny, tmp_path / "file" / "run")
    (tmp_path / telemetry.FILE_NAME).mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        list(Trainer(tiny, tmp_path).run())


def test_the_largest_seed_shuffles_a_fixed_set(tiny, tmp_path):
    run(tiny.replaced({"seed": 2**63 - 1, "budget.fixed_scenes": 16}), tmp_path)


def test_everything_frozen_is_refused(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path)
    trainer.network.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trained"):
        StepGate(trainer.network, OptimizerSpec(), 10)


def test_frozen_group_does_not_move_and_the_other_does(tiny, tmp_path):
    phase = {"name": "heads", "share": 1.0, "backbone_rate": 0.0}
    trainer = Trainer(tiny.replaced({"phases": [phase]}), tmp_path)
    backbone = [p.detach().clone() for p in trainer.network.backbone.parameters()]
    heads = [p.detach().clone() for p in trainer.network.heads.parameters()]
    list(trainer.run())
    assert all(torch.equal(a, b) for a, b in zip(backbone, trainer.network.backbone.parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(heads, trainer.network.heads.parameters(), strict=True))


def gradient_of_a_step(config, accumulate) -> dict[str, torch.Tensor]:
    """Of one step on 16 scenes in ``accumulate`` passes."""
    changes = {"optimizer.batch_size": 16 // accumulate, "optimizer.accumulate": accumulate, "optimizer.clip": 1e6}
    learner = Learner(config.replaced(changes), torch.device("cpu"))
    data = RunData(learner.config, learner.network, torch.device("cpu"), None)
    learner.step(data.micro_batches(0, 16), config.plan(), 0, 16)
    named = [*learner.network.named_parameters(), *learner.balance.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", ["fixed", "uncertainty", "gradnorm"])
def test_equal_micro_batches_equal_the_large_batch(kind, tiny):
    """Only the last micro-batch's gradient, or one without its share of the step, are other steps.

    The scenes have as many sources each, so that means over sources weigh the micro-batches alike.
    """
    config = tiny.replaced({"scene.num_sources": (3, 3), "balance.kind": kind, "optimizer.precision": "fp32"})
    whole, parts = (gradient_of_a_step(config, accumulate) for accumulate in (1, 4))
    assert whole.keys() == parts.keys()
    assert ("log_variance" in whole) == (kind == "uncertainty")
    for name, gradient in whole.items():  # a plain step of rate 1 moves by just this
        assert (parts[name] - gradient).norm() <= 1e-5 * max(1.0, gradient.norm()), name
    assert max(gradient.norm() for gradient in whole.values()) > 0.1


def test_accumulation_learns_as_the_large_batch_does(tiny, tmp_path):
    whole = run(tiny.replaced({"optimizer.batch_size": 32}), tmp_path / "whole")
    parts = run(tiny.replaced({"optimizer.batch_size": 8, "optimizer.accumulate": 4}), tmp_path / "parts")
    losses = [[event["loss"] for event in events(tmp_path / name, telemetry.STEP)] for name in ("whole", "parts")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.02)  # per-source means weigh scenes a little differently
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a.network.k_loc == pytest.approx(b.network.k_loc, abs=0.3)


def test_running_loss_counts_every_step(tiny, tmp_path):
    trainer = run(tiny, tmp_path)
    steps = events(tmp_path, telemetry.STEP)
    for validation in trainer.history:
        last = [s["loss"] for s in steps if validation.scenes_seen - 32 < s["scenes_seen"] <= validation.scenes_seen]
        assert len(last) == 4
        assert validation.loss == pytest.approx(sum(last) / 4, rel=1e-5)


def test_only_asked_for_loss_terms_are_computed(tiny, tmp_path):
    """Hidden loss weights: telemetry shows every term that enters the loss, and a weight of 0 computes nothing."""
    only = {f"loss.{name}": 0.0 for name in ("detection", "offset", "count", "auxiliary")} | {"loss.covariance": 1.0}
    run(tiny.replaced(only), tmp_path)
    for event in events(tmp_path, telemetry.STEP):
        assert [key for key in event if key.startswith("weighted_")] == ["weighted_covariance"]
        assert event["loss"] == pytest.approx(event["weighted_covariance"])


def test_averages_ignore_skipped_steps_and_movement_is_measured_before_them(tiny, tmp_path):
    """A probe that measured after EMA."""
    trainer = Trainer(tiny, tmp_path)
    averaged = AveragedWeights(trainer.network, OptimizerSpec(ema_decay=0.5))
    start = {name: value.clone() for name, value in averaged.state(trainer.network).items()}
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.add_(1.0)
    averaged.update(trainer.network, torch.tensor(False), 0.5)
    assert int(averaged.count) == 0
    averaged.update(trainer.network, torch.tensor(True), 0.5)
    moved = averaged.state(trainer.network)
    for name, value in moved.items():
        assert ((value - start[name]) > 0.5).all()  # the first average of all counts 1/5.5 of the old weights
        assert ((value - start[name]) < 1.0).all()


def test_swa_is_the_even_mean(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path)
    averaged = AveragedWeights(trainer.network, OptimizerSpec(ema_decay=0.0, swa_start=0.5))
    values = []
    for step in range(3):
        with torch.no_grad():
            for p in trainer.network.parameters():
                p.fill_(float(step))
        values.append(step)
        averaged.update(trainer.network, torch.tensor(True), 0.6)
    assert all(torch.allclose(v, torch.tensor(1.0)) for v in averaged.state(trainer.network).values())


def test_validation_is_the_path_of_use(tiny, tmp_path):
    """Validation on another path than use: the saved weights, loaded as a user would, give the very same score."""
    trainer = run(tiny, tmp_path)
    network, config = load_network(tmp_path)
    scenes = simulate(config.scene, config.budget.validation_seed, range(config.budget.validation_scenes))
    found = network_sources(predict(network, scenes), config.inference)
    assert score(found, scenes.require_truth()) == trainer.best.network == trainer.conclude().network


def test_validation_leaves_training_untouched(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path)
    before = parameters(trainer)
    trainer.validate()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    assert trainer.network.training


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_balancing_moves_weights_but_not_the_anchor(kind, tiny, tmp_path):
    trainer = run(tiny.replaced({"balance.kind": kind}), tmp_path)
    balance = trainer.learner.balance
    moved = balance.log_variance.detach() if kind == "uncertainty" else balance.task_weight - 1
    used = [balance.terms.index(name) for name in ("detection", "offset", "count", "auxiliary")]
    assert (moved[used] != 0).any()
    assert moved[balance.terms.index("covariance")] == 0
    assert moved[balance.terms.index("gap")] == 0  # not at work: nothing may push it
    assert int(trainer.learner.gate.steps_taken) == 12


def test_balancing_survives_a_bad_start(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, "count", math.nan, {0})
    trainer = run(tiny.replaced({"balance.kind": "gradnorm"}), tmp_path)
    assert torch.isfinite(trainer.learner.balance.first_loss).all()


def test_ramped_term_ends_at_its_share(tiny, tmp_path):
    phase = {"name": "structure", "share": 1.0, "ramp": ["subspace_alignment"], "ramp_share": 0.1}
    run(tiny.replaced({"phases": [phase]}), tmp_path)
    steps = events(tmp_path, telemetry.STEP)
    shares = [step["weighted_subspace_alignment"] / step["loss"] for step in steps]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0.05 < shares[-1] <= 0.1


@examples(8)
@given(batch=st.integers(1, 40), accumulate=st.integers(1, 5))
def test_validations_fall_on_the_same_scenes_whatever_the_batch(batch, accumulate, tmp_path_factory):
    from ris_hpo.training.config import RunConfig

    from .conftest import TINY

    changes = {"optimizer.batch_size": batch, "optimizer.accumulate": accumulate, "budget.validation_scenes": 4}
    config = RunConfig().replaced(TINY | changes | {"budget.scenes": 40, "budget.validate_every": 16})
    trainer = run(config, tmp_path_factory.mktemp("run"))
    assert [v.scenes_seen for v in trainer.history] == [16, 32, 40]
    assert int(trainer.learner.gate.steps_taken) == trainer.learner.gate.total_steps


def test_early_stopping(tiny, tmp_path):
    changes = {"budget.scenes": 3200, "budget.patience": 2, "optimizer.learning_rate": 0.5}
    trainer = run(tiny.replaced(changes), tmp_path)
    assert trainer.finished
    assert trainer.scenes_seen < 3200


def test_dataclasses_are_plain_values(tiny, tmp_path):
    validation = run(tiny, tmp_path).history[0]
    assert type(validation).from_dict(validation.as_dict()) == validation
    assert dataclasses.is_dataclass(validation)


def test_sources_drawn_where_nothing_is_searched_are_refused(tiny):
    wider: dict[str, object] = {"scene.azimuth_deg": [-60, 61], "network.grid.region.azimuth_deg": [-60, 60]}
    with pytest.raises(ConfigError, match=r"azimuth_deg \(-60.0, 61.0\) reaches beyond network.grid"):
        tiny.replaced(wider)
    wider["network.grid.region.azimuth_deg"] = [-70, 70]
    assert tiny.replaced(wider).inference.likelihood.grid.region.azimuth_deg == (-60, 61)
    with pytest.raises(ConfigError, match=r"beyond inference\.likelihood\.grid"):
        tiny.replaced(wider | {"inference.likelihood.grid.region.azimuth_deg": [-60, 60]})
