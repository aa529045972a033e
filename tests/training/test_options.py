"""Every option of the training specifications against a value computed by hand, on networks of a few numbers."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ris_hpo.errors import ConfigError
from ris_hpo.learning.losses import TERMS, LossSpec
from ris_hpo.physics.scene import simulate
from ris_hpo.training import checkpoint, results
from ris_hpo.training import learner as learner_module
from ris_hpo.training.balance import Balance
from ris_hpo.training.config import BalanceSpec, PhaseSpec, RunConfig
from ris_hpo.training.data import TRAINING_FAMILY, RunData, training_scenes
from ris_hpo.training.learner import Learner
from ris_hpo.training.results import concluded
from ris_hpo.training.stability import AveragedWeights, OptimizerSpec, StepGate, resolved_precision
from ris_hpo.training.trainer import Trainer

PLAIN = {"warmup": 0.0, "final_rate": 1.0, "weight_decay": 0.0, "clip": 1e6, "ema_decay": 0.0}


class Toy(nn.Module):
    """A network of eight numbers: a backbone and heads, each with a matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.heads = nn.Linear(2, 1), nn.Linear(1, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(2.0)

    def give(self, backbone: float, heads: float) -> None:
        """Set every gradient."""
        for part, value in ((self.backbone, backbone), (self.heads, heads)):
            for p in part.parameters():
                p.grad = torch.full_like(p, value)

    def values(self) -> tuple[float, ...]:
        return tuple(float(part.weight.detach()[0, 0]) for part in (self.backbone, self.heads))


def gate_of(toy: Toy, steps: int = 1, **changes) -> StepGate:
    return StepGate(toy, OptimizerSpec(**(PLAIN | changes)), steps)


# -- OptimizerSpec ---------------------------------------------------------------------------------------------------


def test_the_first_step_of_adam_is_the_learning_rate_and_heads_have_their_multiple():
    toy = Toy()
    toy.give(0.5, -3.0)
    gate = gate_of(toy, learning_rate=0.25, head_multiplier=2.0)
    assert gate.step()
    assert toy.values() == pytest.approx((2 - 0.25, 2 + 0.5))
    assert {name: float(rate) for name, rate in gate.rates().items()} == {"backbone": 0.25, "heads": 0.5}


def test_a_phase_slows_the_backbone_alone():
    toy = Toy()
    toy.give(1.0, 1.0)
    gate = gate_of(toy, learning_rate=0.5)
    gate.step(0.25)
    assert toy.values() == pytest.approx((2 - 0.125, 2 - 0.5))


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay_spares_biases_and_gains(decay):
    """AdamW: p <- p - rate * decay * p - rate * sign(g) at the first step."""
    toy = Toy()
    toy.give(1.0, 1.0)
    gate_of(toy, learning_rate=0.5, weight_decay=0.1, decay=decay).step()
    kept = 1.5 if decay == "matrices" else 1.4
    for part in (toy.backbone, toy.heads):
        assert part.weight.flatten().tolist() == pytest.approx([1.4] * part.weight.numel())
        assert part.bias.tolist() == pytest.approx([kept] * part.bias.numel())


def test_what_is_decayed_in_the_networks_themselves(tiny):
    for front_end in ("spectra", "tokens"):
        learner = Learner(tiny.replaced({"network.front_end": front_end}), torch.device("cpu"))
        decays = {id(p): g["weight_decay"] for g in learner.gate.optimizer.param_groups for p in g["params"]}
        names = {name: decays[id(p)] for name, p in learner.network.named_parameters()}
        assert set(decays) == {id(p) for p in learner.network.parameters()}
        assert all(value == 0 for name, value in names.items() if "norm" in name or name.endswith("bias"))
        assert all(value == 1e-4 for name, value in names.items() if name.endswith("weight") and "norm" not in name)
        assert all(value == 0 for name, value in names.items() if name.endswith("gain"))


def test_clipping_is_on_the_norm_of_all_gradients_together():
    toy = Toy()
    toy.give(3.0, 4.0)  # 3 numbers of the backbone, 6 of the heads
    total = math.sqrt(3 * 9 + 6 * 16)
    gate = gate_of(toy, clip=2.0)
    gate.step()
    norms = {name: float(norm) for name, norm in gate.norms().items()}
    assert norms == pytest.approx({"backbone": math.sqrt(27), "heads": math.sqrt(96)})  # as they were before
    assert toy.backbone.bias.grad.item() == pytest.approx(3 * 2 / total)
    assert toy.heads.bias.grad.tolist() == pytest.approx([4 * 2 / total] * 3)
    toy.give(0.01, 0.01)
    gate.step()
    assert toy.heads.bias.grad.tolist() == pytest.approx([0.01] * 3)  # shorter than the limit


def test_a_warm_up_that_ends_within_a_step_never_passes_the_highest_rate():
    gate = gate_of(Toy(), steps=5, warmup=0.5, warmup_floor=0.2)  # it takes two and a half of them
    rates = []
    for taken in range(4):
        gate.steps_taken.fill_(taken)
        rates.append(float(gate.rate()))
    assert rates == pytest.approx([0.2 + 0.8 / 2.5, 0.2 + 1.6 / 2.5, 1, 1])


def test_the_rate_rises_from_its_floor_and_falls_as_a_cosine():
    gate = gate_of(Toy(), steps=10, warmup=0.4, warmup_floor=0.2, final_rate=0.1)
    rates = []
    for taken in range(11):
        gate.steps_taken.fill_(taken)
        rates.append(float(gate.rate()))
    rising = [0.2 + 0.8 * step / 4 for step in (1, 2, 3)]
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * max(0, taken - 4) / 6)) / 2 for taken in range(3, 11)]
    assert rates == pytest.approx(rising + falling, rel=1e-5)
    gate.extend(16)
    gate.steps_taken.fill_(10)
    assert float(gate.rate()) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way from 4 to 16
    gate.steps_taken.fill_(1)
    assert float(gate.rate()) == pytest.approx(rates[1])


def test_a_step_that_is_skipped_moves_nothing_and_is_counted_by_cause():
    toy = Toy()
    gate = gate_of(toy, learning_rate=0.5, weight_decay=0.5)
    for value, causes in ((math.nan, (1, 0)), (math.inf, (2, 0)), (0.0, (2, 1)), (1e-14, (2, 2))):
        toy.give(value, value)
        assert not gate.step()
        assert (int(gate.skipped_not_finite), int(gate.skipped_vanishing)) == causes
    assert toy.values() == (2.0, 2.0)
    assert gate.counts() == (0, 4)
    assert int(gate.skipped_in_a_row) == 4
    toy.give(1.0, math.nan)  # one bad gradient is enough
    assert not gate.step()
    toy.give(1.0, 1.0)
    assert gate.step()
    assert toy.values() == pytest.approx((1.0, 1.0))  # 2 - .5 * .5 * 2 - .5: the first step, no momentum of others
    assert gate.counts() == (1, 5)
    assert int(gate.skipped_in_a_row) == 0


def test_the_loss_scale_of_fp16_is_taken_out_halved_and_doubled():
    toy = Toy()
    gate = gate_of(toy, precision="fp16", learning_rate=0.5)
    assert float(gate.scale) == 2.0**14
    toy.give(2.0**14, 2.0**15)
    gate.step()
    assert float(gate.norms()["backbone"]) == pytest.approx(math.sqrt(3))
    assert float(gate.norms()["heads"]) == pytest.approx(2 * math.sqrt(6))
    toy.give(math.inf, 1.0)
    gate.step()
    assert float(gate.scale) == 2.0**13
    gate.since_overflow.fill_(999)
    toy.give(2.0**13, 2.0**13)
    gate.step()
    assert float(gate.scale) == 2.0**14
    assert int(gate.since_overflow) == 0


def test_precision_is_what_is_asked_for():
    cpu = torch.device("cpu")
    assert [resolved_precision(OptimizerSpec(precision=p), cpu) for p in ("fp32", "bf16", "fp16")] == [
        "fp32", "bf16", "fp16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "has", "found"),
    [
        ("cpu", {"avx512_bf16": True}, "bf16"),
        ("cpu", {"amx_bf16": True}, "bf16"),
        ("cpu", {"avx512_bf16": False, "avx2": True}, "fp32"),
        ("cpu", {}, "fp32"),
        ("cuda", True, "bf16"),
        ("cuda", False, "fp32"),  # it would be emulated, which is slower than fp32
    ],
)
def test_half_precision_is_chosen_where_the_device_computes_it(device, has, found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has)
    assert resolved_precision(OptimizerSpec(), torch.device(device)) == found


def averaged(toy: Toy, values: list[float], taken: list[bool], progress: list[float], **changes) -> float:
    averages = AveragedWeights(toy, OptimizerSpec(**changes))
    for value, step, spent in zip(values, taken, progress, strict=True):
        with torch.no_grad():
            toy.backbone.weight.fill_(value)
        averages.update(toy, torch.tensor(step), spent)
    return float(averages.state(toy)["backbone.weight"][0, 0])


def test_the_exponential_average_starts_fast_and_counts_taken_steps():
    """Share kept: min(decay, (1 + n) / (10 + n)) after n steps; 2 is where the weights start."""
    first = 2 * (2 / 11) + 3 * (9 / 11)
    second = first * (3 / 12) + 5 * (9 / 12)
    assert averaged(Toy(), [3.0], [True], [0.1], ema_decay=0.9) == pytest.approx(first)
    assert averaged(Toy(), [3.0, 7.0, 5.0], [True, False, True], [0.1] * 3, ema_decay=0.9) == pytest.approx(second)
    low = first * 0.2 + 5 * 0.8
    assert averaged(Toy(), [3.0, 5.0], [True, True], [0.1] * 2, ema_decay=0.2) == pytest.approx(low)
    assert averaged(Toy(), [3.0, 5.0], [True, True], [0.1] * 2, ema_decay=0.0) == 5.0


def test_the_even_average_begins_at_its_share_of_the_run():
    spec = {"ema_decay": 0.0, "swa_start": 0.5}
    values, progress = [3.0, 5.0, 7.0, 100.0, 8.0], [0.4, 0.5, 0.6, 0.7, 0.8]
    taken = [True, True, True, False, True]
    assert averaged(Toy(), values, taken, progress, **spec) == pytest.approx((5 + 7 + 8) / 3)
    assert averaged(Toy(), [3.0], [True], [0.4], **spec) == 3.0  # none yet: the network's own


def test_batches_and_accumulation_make_a_step():
    spec = OptimizerSpec(batch_size=7, accumulate=3)
    assert spec.scenes_per_step == 21
    config = RunConfig(optimizer=spec)
    data = RunData(config, SimpleNamespace(features=lambda scenes: None), torch.device("cpu"), None)
    parts = list(data.micro_batches(21, 21 + 16))
    assert [(batch.scenes_seen, len(batch.scenes), batch.share) for batch in parts] == [
        (21, 7, 7 / 16),
        (28, 7, 7 / 16),
        (35, 2, 2 / 16),
    ]
    expected = training_scenes(config, range(21, 37))
    assert torch.equal(torch.cat([batch.scenes.y for batch in parts]), expected.y)


# -- BalanceSpec and ramps -------------------------------------------------------------------------------------------

LOSS = LossSpec().only(covariance=0.5, count=2.0, detection=3.0)
NO_PHASE = PhaseSpec(name="", share=1)


def terms(shared: Tensor, covariance: float, count: float, detection: float) -> dict[str, Tensor]:
    """Three terms whose gradients at ``shared`` are the given values, and which are that large at 1."""
    return {"covariance": covariance * shared, "count": count * shared, "detection": detection * shared}


def test_fixed_weights_are_those_of_the_loss():
    values = terms(torch.tensor(1.0), 4.0, 5.0, 6.0)
    balance = Balance(BalanceSpec(), TERMS)
    weighted = balance.weighted(values, LOSS, NO_PHASE, 0.5)
    assert {name: float(value) for name, value in weighted.items()} == {"covariance": 2, "count": 10, "detection": 18}
    assert float(balance.regulariser(values)) == 0
    assert [p.requires_grad for p in balance.parameters()] == [False]


def test_uncertainty_is_exp_of_minus_s_and_pays_s():
    """d/ds (exp(-s) w L + s) = 1 - exp(-s) w L: a large term drives s up, which makes its weight smaller."""
    balance = Balance(BalanceSpec(kind="uncertainty"), TERMS)
    with torch.no_grad():
        balance.log_variance.fill_(math.log(2))
    values = terms(torch.tensor(1.0), 4.0, 5.0, 0.1)
    weighted = balance.weighted(values, LOSS, NO_PHASE, 0.5)
    found = {name: float(value.detach()) for name, value in weighted.items()}
    assert found == pytest.approx({"covariance": 2.0, "count": 5.0, "detection": 0.15})  # the anchor keeps its weight
    regulariser = balance.regulariser(values)
    assert float(regulariser.detach()) == pytest.approx(2 * math.log(2))
    (sum(weighted.values()) + regulariser).backward()
    gradient = dict(zip(TERMS, balance.log_variance.grad.tolist(), strict=True))
    assert gradient["count"] == pytest.approx(1 - 5.0)
    assert gradient["detection"] == pytest.approx(1 - 0.15)
    assert all(gradient[name] == 0 for name in TERMS if name not in ("count", "detection"))


def gradnorm(parts: list[tuple[dict[str, float], float]], **changes) -> dict[str, float]:
    """Weights after a first step at equal losses and one more of ``parts``: (gradients, share of the step)."""
    balance = Balance(BalanceSpec(kind="gradnorm", rate=0.1, **changes), TERMS)
    for batch in ([({"covariance": 1.0, "count": 1.0, "detection": 1.0}, 1.0)], parts):
        balance.task_weight.fill_(1.0)
        for sizes, share in batch:
            shared = torch.tensor(1.0, requires_grad=True)
            balance.follow_gradients(terms(shared, **sizes), LossSpec().only(covariance=1.0, count=1.0, detection=1.0),
                                     shared, share)  # fmt: skip
        balance.move()
    return {name: float(balance.task_weight[TERMS.index(name)]) for name in ("covariance", "count", "detection")}


UP, DOWN = math.exp(0.1), math.exp(-0.1)


def test_gradnorm_pulls_norms_together():
    """Without asymmetry the target is the mean norm; one step multiplies with exp(+-rate). The anchor stays."""
    found = gradnorm([({"covariance": 9.0, "count": 1.0, "detection": 8.0}, 1.0)], asymmetry=0.0)
    assert found == pytest.approx({"covariance": 1.0, "count": UP, "detection": DOWN})


def test_gradnorm_favours_slow_terms():
    """Losses of 4, 1 and 1 against 1, 1 and 1: paces 2, .5 and .5 of the mean; targets 2 * (2, .5, .5)^alpha."""
    slow = {"covariance": 1.0, "count": 4.0, "detection": 1.0}
    assert gradnorm([(slow, 1.0)], asymmetry=0.0) == pytest.approx({"covariance": 1.0, "count": DOWN, "detection": UP})
    # alpha 2: targets 8, .5, .5 against norms 4, 1, 1
    assert gradnorm([(slow, 1.0)], asymmetry=2.0) == pytest.approx({"covariance": 1.0, "count": UP, "detection": DOWN})


def test_gradnorm_moves_once_a_step_by_the_mean_of_its_micro_batches():
    few, many = {"covariance": 1.0, "count": 9.0, "detection": 1.0}, {"covariance": 4.0, "count": 1.0, "detection": 4.0}
    parts = [(few, 0.25), (many, 0.75)]
    found = gradnorm(parts, asymmetry=0.0)  # means 3.25, 3, 3.25
    assert found == pytest.approx({"covariance": 1.0, "count": UP, "detection": DOWN})


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4.0, {"count": math.exp(-1), "detection": math.e}),  # 1, 4, .25, mean 1.75: one step each, then to and fro
        (1e4, {"count": 0.05, "detection": 20.0}),  # the bounds
    ],
)
def test_gradnorm_counts_the_fixed_weights_and_stays_within_bounds(count, expected):
    balance = Balance(BalanceSpec(kind="gradnorm", rate=1.0, asymmetry=0.0), TERMS)
    loss = LossSpec().only(covariance=1.0, count=count, detection=0.25)
    for _ in range(5):
        shared = torch.tensor(1.0, requires_grad=True)
        balance.follow_gradients(terms(shared, 1.0, 1.0, 1.0), loss, shared, 1.0)
        balance.move()
    weights = {name: float(balance.task_weight[TERMS.index(name)]) for name in expected}
    assert weights == pytest.approx(expected)
    weighted = balance.weighted(terms(torch.tensor(1.0), 1.0, 1.0, 1.0), loss, NO_PHASE, 0.0)
    assert float(weighted["count"]) == pytest.approx(count * expected["count"])


def test_gradnorm_keeps_its_weights_through_a_step_that_is_not_finite():
    balance = Balance(BalanceSpec(kind="gradnorm"), TERMS)
    shared = torch.tensor(1.0, requires_grad=True)
    balance.follow_gradients(terms(shared, 1.0, math.nan, 1.0), LOSS, shared, 1.0)
    balance.move()
    assert (balance.task_weight == 1).all()
    assert float(balance.first_loss[TERMS.index("count")]) == 0  # taken from the first step that has one


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (1.0, 0.1)])
def test_a_ramped_term_reaches_its_share(progress, share):
    values = terms(torch.tensor(1.0, requires_grad=True), 4.0, 5.0, 600.0)
    phase = PhaseSpec(name="a", share=1, ramp=["detection"], ramp_share=0.1)
    weighted = Balance(BalanceSpec(), TERMS).weighted(values, LOSS, phase, progress)
    total = sum(float(value.detach()) for value in weighted.values())
    assert float(weighted["detection"].detach()) == pytest.approx(share * total)
    assert float(weighted["count"].detach()) == 10


def test_two_ramped_terms_have_their_share_each_and_rise_evenly():
    values = terms(torch.tensor(1.0, requires_grad=True), 4.0, 5.0, 6.0)
    phase = PhaseSpec(name="a", share=1, ramp=["detection", "count"], ramp_share=0.15)
    whole = {k: float(v.detach()) for k, v in Balance(BalanceSpec(), TERMS).weighted(values, LOSS, phase, 1.0).items()}
    for name in phase.ramp:
        assert whole[name] == pytest.approx(0.15 * sum(whole.values()))
    half = Balance(BalanceSpec(), TERMS).weighted(values, LOSS, phase, 0.5)
    assert float(half["count"].detach()) == pytest.approx(whole["count"] / 2)


# -- PhaseSpec, BudgetSpec, seed -------------------------------------------------------------------------------------


def test_a_phase_has_its_own_loss(tiny):
    own = {"name": "a", "share": 0.5, "loss": {"count": 0.0, "gap": 0.7}}
    phases = [own, {"name": "b", "share": 0.5, "ramp": ["peak"]}]
    config = tiny.replaced({"phases": phases, "loss.count": 0.3})
    first, second = (config.phase_loss(phase) for phase in config.phases)
    assert (first.count, first.gap, first.peak, first.detection) == (0.0, 0.7, 0.0, config.loss.detection)
    assert (second.count, second.gap, second.peak) == (0.3, 0.0, 1.0)
    learner = Learner(config, torch.device("cpu"))
    data = RunData(config, learner.network, torch.device("cpu"), None)
    found = learner.step(data.micro_batches(0, 8), config.plan(), 0, 8)
    assert "raw_count" not in found
    assert found["weighted_gap"] == pytest.approx(0.7 * found["raw_gap"])
    found = learner.step(data.micro_batches(64, 72), config.plan(), 64, 72)
    assert found["weighted_count"] == pytest.approx(0.3 * found["raw_count"])
    assert "raw_gap" not in found
    assert found["weighted_peak"] == 0


@pytest.mark.parametrize(
    ("own", "ramp", "seen", "expected"),
    [(None, 0.0, 0, 0.2), (None, 0.5, 12, 0.05), (None, 0.5, 48, 0.2), (0.4, 0.5, 12, 0.1), (0.0, 0.0, 40, 0.0)],
)
def test_beta_is_the_phases_own_and_ramped_over_the_run(tiny, monkeypatch, own, ramp, seen, expected):
    """Total 96: a ramp over half of it is 48 scenes long."""
    asked = []
    real = learner_module.covariances

    def watched(outputs, scenes, spec, beta):
        asked.append(beta)
        return real(outputs, scenes, spec, beta)

    monkeypatch.setattr(learner_module, "covariances", watched)
    changes = {"inference.hybrid.beta": 0.2, "inference.hybrid.beta_ramp": ramp}
    config = tiny.replaced(changes | {"phases": [{"name": "a", "share": 1, "beta": own}], "optimizer.batch_size": 2})
    learner = Learner(config, torch.device("cpu"))
    data = RunData(config, learner.network, torch.device("cpu"), None)
    learner.step(data.micro_batches(seen, seen + 4), config.plan(), seen, seen + 4)
    later = min(1, (seen + 2) / 48) / min(1, seen / 48) if ramp else 1
    assert asked == pytest.approx([expected, expected * later])


def test_beta_jitters_evenly_within_its_bounds(tiny, monkeypatch):
    config = tiny.replaced({"inference.hybrid.beta": 0.1, "inference.hybrid.beta_jitter": 0.2})
    learner = Learner(config, torch.device("cpu"))
    place = learner_module._Place(config.plan().phases[0], config.loss, 0.0, 96)
    found = [learner._beta(40, place) for _ in range(400)]
    assert min(found) == 0.0
    assert 0.28 < max(found) <= 0.3
    assert 0.2 < sum(value == 0 for value in found) / 400 < 0.3  # a quarter of -0.1 .. 0.3 lies below 0
    top = learner.config.replaced({"inference.hybrid.beta": 0.9})
    assert max(Learner(top, torch.device("cpu"))._beta(40, place) for _ in range(50)) == 0.9


def test_the_budget_says_how_much_and_when(tiny, tmp_path):
    budget = {"scenes": 40, "validate_every": 16, "validation_scenes": 6, "pipeline_scenes": 2, "validation_seed": 5}
    config = tiny.replaced({f"budget.{name}": value for name, value in budget.items()})
    trainer = Trainer(config, tmp_path)
    assert [validation.scenes_seen for validation in trainer.run()] == [16, 32, 40]
    frozen = trainer.data.frozen().scenes
    assert torch.equal(frozen.y, simulate(config.scene, 5, range(6)).y)
    conclusion = trainer.conclude()
    assert (conclusion.network.num_scenes, conclusion.pipeline.num_scenes) == (6, 2)
    assert len(conclusion.findings.network) == 6
    assert len(conclusion.findings.pipeline) == 2
    plain = config.replaced({"budget.pipeline_scenes": 0})
    without = concluded(trainer.finished_network(), trainer.data.frozen(), plain)
    assert without.pipeline == without.network
    assert (without.fast, conclusion.fast) == (None, None)


def test_the_fast_path_is_scored_on_the_scenes_of_the_pipeline_and_chooses_the_weights(tiny, tmp_path, monkeypatch):
    """The path itself is replaced by one that is right at the second validation alone."""
    budget = {"scenes": 48, "validate_every": 16, "validation_scenes": 6, "pipeline_scenes": 2}
    config = tiny.replaced({f"budget.{name}": value for name, value in budget.items()})
    calls = []

    def found(network, scenes, spec, path):
        assert (len(scenes), path) == (2, "fast")
        assert spec == config.inference.of("fast")
        calls.append(path)
        right = scenes.require_truth()
        return right if len(calls) == 3 else dataclasses.replace(right, range_m=right.range_m + 3)

    monkeypatch.setattr(results, "find_sources", found)
    trainer = Trainer(config, tmp_path, fast=True)
    history = list(trainer.run())
    assert [validation.fast.success for validation in history] == [0, 1, 0]
    assert history[0].searched == (history[0].fast, history[0].fast_floor)
    assert checkpoint.read(tmp_path / "best.safetensors")[1]["scenes_seen"] == 32
    assert Trainer(config, tmp_path, fast=True).best == history[1]  # read back from the checkpoint
    assert trainer.conclude().fast.num_scenes == 2


def test_fixed_scenes_are_trained_and_validated_on_again_and_again(tiny):
    config = tiny.replaced({"budget.fixed_scenes": 12, "seed": 3})
    data = RunData(config, Learner(config, torch.device("cpu")).network, torch.device("cpu"), None)
    assert torch.equal(data.frozen().scenes.y, training_scenes(config, range(12)).y)
    for epoch in range(2):
        noise = torch.cat([data.batch(12 * epoch + start, 4)[0].noise_power for start in (0, 4, 8)])
        assert sorted(noise.tolist()) == sorted(data.frozen().scenes.noise_power.tolist())


def test_batches_of_any_number_of_snapshots(tiny):
    def drawn(seed: int) -> list[int]:
        config = tiny.replaced({"data.num_snapshots": (1, 64), "seed": seed})
        data = RunData(config, SimpleNamespace(features=lambda scenes: None), torch.device("cpu"), None)
        batches = [data.batch(start, 2)[0] for start in range(0, 128, 2)]
        first = training_scenes(config, range(2), num_snapshots=batches[0].y.shape[1])
        assert torch.equal(batches[0].y, first.y)
        return [scenes.y.shape[1] for scenes in batches]

    lengths = drawn(3)
    assert lengths == drawn(3) != drawn(4)  # a resumed run has the same, whatever was drawn before
    assert min(lengths) < 4
    assert max(lengths) > 32
    below = sum(length < 8 for length in lengths) / len(lengths)  # the middle of the range, in its logarithm
    assert below == pytest.approx(0.5, abs=0.15)
    assert max(lengths) <= 64
    for limits in ((5, 4), (0, 4)):
        with pytest.raises(ConfigError, match=r"within 1\.\.4096, in order"):
            tiny.replaced({"data.num_snapshots": limits})
    fixed = tiny.replaced({"data.num_snapshots": (1, 4), "budget.fixed_scenes": 12})
    with pytest.raises(ConfigError, match="drawn afresh"):
        RunData(fixed, SimpleNamespace(features=lambda scenes: None), torch.device("cpu"), None)


def test_calibration_scenes_are_a_family_of_their_own(tiny):
    config = tiny.replaced({"budget.calibration_scenes": 70})
    data = RunData(config, Learner(config, torch.device("cpu")).network, torch.device("cpu"), None)
    assert torch.equal(data.calibration().y, simulate(config.scene, 7002, range(70)).y)


def test_the_seed_draws_weights_and_training_scenes(tiny):
    one, two = (Learner(tiny.replaced({"seed": seed}), torch.device("cpu")).network for seed in (4, 5))
    again = Learner(tiny.replaced({"seed": 4}), torch.device("cpu")).network
    for a, b, c in zip(one.parameters(), two.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, c)
        assert a.numel() == 1 or a.std() == 0 or not torch.equal(a, b)
    scenes = training_scenes(tiny.replaced({"seed": 4}), range(3, 5))
    assert torch.equal(scenes.y, simulate(tiny.scene, TRAINING_FAMILY + 4, range(3, 5)).y)
    assert TRAINING_FAMILY > 2**32  # validation and test seeds lie below


def test_patience_counts_validations_since_the_best(tiny, tmp_path, monkeypatch):
    short = {"budget.scenes": 64, "budget.validate_every": 8, "budget.validation_scenes": 4, "budget.patience": 2}
    trainer = Trainer(tiny.replaced(short), tmp_path)
    real, values = trainer.validate, iter([9.0, 3.0, 2.0, 2.5, 2.0, 1.0])

    def scripted():
        validation = real()
        return dataclasses.replace(validation, network=dataclasses.replace(validation.network, k_loc=next(values)))

    monkeypatch.setattr(trainer, "validate", scripted)
    assert [validation.network.k_loc for validation in trainer.run()] == [3.0, 2.0, 2.5, 2.0]
    assert trainer.finished
    assert trainer.best.scenes_seen == 16  # the earlier of two equal ones
