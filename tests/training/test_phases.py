"""Phases: the plan as tables, and runs whose gates pass, fail, and are asked again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.errors import ConfigError, GateError
from ris_hpo.learning.losses import TERMS
from ris_hpo.training import telemetry
from ris_hpo.training.config import GateSpec, PhaseSpec, RunConfig
from ris_hpo.training.curriculum import standard_phases, with_curriculum
from ris_hpo.training.phases import PhasePlan, apportioned
from ris_hpo.training.results import diagnosed
from ris_hpo.training.trainer import Trainer
from tests.properties import examples

STANDARD = (0.4, 0.2, 0.1, 0.1, 0.1, 0.1)
IMPOSSIBLE = {"metric": "k_loc", "direction": "down", "margin": 9.0}
EASY = {"metric": "k_loc", "direction": "down", "margin": -9.0}


def plan_of(shares, budget=6144, every=1024, *, gates=(), patience=2) -> PhasePlan:
    gates = [GateSpec(**gate) for gate in gates]
    phases = [PhaseSpec(name=str(i), share=share, gates=gates, patience=patience) for i, share in enumerate(shares)]
    return PhasePlan.begin(phases, budget, every)


def scores(**values) -> SimpleNamespace:
    return SimpleNamespace(**values)


# -- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "budget", "every", "ends"),
    [
        ((1.0,), 6144, 1024, (6144,)),
        (STANDARD, 6144, 1024, (1024, 2048, 3072, 4096, 5120, 6144)),  # a validation each is all there is
        (STANDARD, 20480, 1024, (8192, 12288, 14336, 16384, 18432, 20480)),
        (STANDARD, 10240, 1024, (4096, 6144, 7168, 8192, 9216, 10240)),
        (STANDARD, 8192, 1024, (3072, 4096, 5120, 6144, 7168, 8192)),
        ((1 / 3, 2 / 3), 96, 32, (32, 96)),
        ((0.5, 0.5), 80, 32, (64, 80)),  # the last interval is shorter
        ((0.5, 0.5), 96, 32, (64, 96)),  # 1.5 intervals each: the first of two equal remainders
        ((0.05, 0.95), 64, 32, (32, 64)),
    ],
)
def test_phases_are_whole_validations_that_add_up_to_the_budget(shares, budget, every, ends):
    assert plan_of(shares, budget, every).ends == ends


@examples(100)
@given(
    shares=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    every=st.integers(1, 50),
    more=st.integers(0, 60),
    short=st.integers(0, 49),
    extensions=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    per_step=st.integers(1, 64),
)
def test_any_plan_holds_together(shares, every, more, short, extensions, per_step):
    budget = (len(shares) + more) * every - min(short, every - 1)
    plain = plan_of([share / sum(shares) for share in shares], budget, every)
    assert plain.total == budget
    plan = PhasePlan(plain.phases, budget, every, tuple(extensions[: len(shares)]))
    starts = [plan.start(i) for i in range(len(shares))]
    assert starts == [0, *plan.ends[:-1]]
    assert all(end > start for start, end in zip(starts, plan.ends, strict=True))
    assert plan.total >= budget + every * sum(plan.extensions)  # each extension is a validation at least
    seen = steps = 0
    while seen < plan.total:
        index, boundary = plan.index(seen), plan.next_validation(seen)
        assert plan.start(index) <= seen < plan.ends[index]
        assert plan.progress(seen) == (seen - plan.start(index)) / (plan.ends[index] - plan.start(index))
        assert seen < boundary <= min(seen + every, plan.ends[index])  # no validation interval lies in two phases
        steps += math.ceil((boundary - seen) / per_step)
        seen = boundary
    assert steps == plan.steps(per_step)
    assert plan.index(plan.total) == len(shares) - 1


def test_lengths_are_as_near_to_the_shares_as_they_can_be():
    assert apportioned([0.4, 0.2, 0.1, 0.1, 0.1, 0.1], 7) == [2, 1, 1, 1, 1, 1]
    assert apportioned([0.9, 0.05, 0.05], 10) == [8, 1, 1]
    assert apportioned([0.35, 0.35, 0.3], 10) == [4, 3, 3]


@pytest.mark.parametrize(
    ("direction", "margin", "before", "after", "passed"),
    [
        ("up", 0.0, 0.5, 0.5, True),
        ("up", 0.0, 0.5, 0.4, False),
        ("up", 0.25, 0.5, 0.75, True),
        ("up", 0.25, 0.5, 0.625, False),
        ("up", -0.25, 0.5, 0.25, True),
        ("up", -0.25, 0.5, 0.125, False),
        ("down", 0.0, 0.5, 0.5, True),
        ("down", 0.0, 0.5, 0.625, False),
        ("down", 0.25, 0.5, 0.25, True),
        ("down", 0.25, 0.5, 0.375, False),
        ("down", -0.25, 0.5, 0.75, True),
        ("down", -0.25, 0.5, 0.875, False),
        ("down", 0.0, math.inf, math.inf, False),  # nothing was measured
    ],
)
def test_a_gate_asks_for_a_change_in_its_direction(direction, margin, before, after, passed):
    plan = plan_of([1.0], gates=[{"metric": "rmspe_m", "direction": direction, "margin": margin}], patience=0)
    end = plan.end_of_phase(6144, scores(rmspe_m=before), scores(rmspe_m=after))
    assert [(v.before, v.after, v.passed) for v in end.verdicts] == [(before, after, passed)]
    assert end.outcome == ("passed" if passed else "failed")


def test_there_is_no_verdict_within_a_phase():
    plan = plan_of((0.5, 0.5), gates=[EASY])
    assert plan.end_of_phase(1024, scores(k_loc=5.0), scores(k_loc=5.0)) is None
    assert plan.end_of_phase(3072, scores(k_loc=5.0), scores(k_loc=5.0)).outcome == "passed"


@pytest.mark.parametrize("phase", range(6))
def test_every_phase_can_be_extended_by_a_validation_and_then_fails(phase):
    """At the default budget an extension of the short phases came to 0 validations, and the last gate never failed."""
    plan = plan_of(STANDARD, gates=[IMPOSSIBLE], patience=2)
    start = plan.start(phase)
    for extension in (1, 2):
        end = plan.end_of_phase(plan.ends[phase], scores(k_loc=5.0), scores(k_loc=5.0))
        assert (end.outcome, end.extensions) == ("extended", extension)
        plan = end.plan
        assert plan.start(phase) == start
        assert plan.ends[phase] == start + (1 + extension) * 1024
        assert plan.total == 6144 + extension * 1024
    end = plan.end_of_phase(plan.ends[phase], scores(k_loc=5.0), scores(k_loc=5.0))
    assert (end.outcome, end.plan) == ("failed", plan)
    assert end.not_run == tuple(str(i) for i in range(phase + 1, 6))
    assert f"phase '{phase}' failed its gate: k_loc should go down by 9: 5.0000 -> 5.0000" in end.failure()
    assert ("phases not run" in end.failure()) == (phase < 5)


def test_an_extension_is_a_quarter_of_a_long_phase():
    plan = plan_of((0.8, 0.2), budget=20_480, gates=[IMPOSSIBLE])
    extended = plan.end_of_phase(16_384, scores(k_loc=5.0), scores(k_loc=5.0)).plan
    assert extended.ends == (16_384 + 4_096, 20_480 + 4_096)


def test_one_failed_gate_of_several_is_enough():
    plan = plan_of([1.0], gates=[EASY, IMPOSSIBLE], patience=0)
    end = plan.end_of_phase(6144, scores(k_loc=5.0), scores(k_loc=5.0))
    assert [verdict.passed for verdict in end.verdicts] == [True, False]
    assert end.outcome == "failed"


# -- runs ------------------------------------------------------------------------------------------------------------


def phases(*gates, patience=1):
    """One validation each."""
    return [{"name": f"{i}", "share": 1 / len(gates), "patience": patience, "gates": [g]} for i, g in enumerate(gates)]


@pytest.fixture
def short(tiny):
    """Six validations, as the default budget has."""
    return tiny.replaced({"budget.scenes": 48, "budget.validate_every": 8, "budget.validation_scenes": 8})


def written(directory, kind):
    return [event for event in telemetry.read(directory) if event["event"] == kind]


def test_a_curriculum_that_passes_takes_its_budget_exactly(short, tmp_path):
    """It took 7,168 of 6,144 scenes, the last of them at the end of a schedule for fewer."""
    trainer = Trainer(short.replaced({"phases": phases(*[EASY] * 6)}), tmp_path)
    found = list(trainer.run())
    assert trainer.finished
    assert [validation.scenes_seen for validation in found] == [8, 16, 24, 32, 40, 48]
    assert [event["phase"] for event in written(tmp_path, telemetry.PHASE)] == list("012345")
    assert all(verdict.passed for validation in found for verdict in validation.verdicts)
    assert int(trainer.learner.gate.steps_taken) == trainer.learner.gate.total_steps == 6
    rates = [event["rate_backbone"] for event in written(tmp_path, telemetry.STEP)]
    plain = Trainer(short, tmp_path / "plain")
    list(plain.run())
    assert rates == [event["rate_backbone"] for event in written(tmp_path / "plain", telemetry.STEP)]


@pytest.mark.parametrize("failing", range(6))
def test_a_gate_that_fails_ends_the_run_for_good(short, tmp_path, failing):
    gates = [EASY] * 6
    gates[failing] = IMPOSSIBLE
    config = short.replaced({"phases": phases(*gates)})
    trainer = Trainer(config, tmp_path)
    found = []
    with pytest.raises(GateError, match=f"phase '{failing}' failed its gate: k_loc should go down by 9: ") as failure:
        found.extend(trainer.run())
    assert trainer.plan.extensions == tuple(int(i == failing) for i in range(6))
    assert trainer.scenes_seen == found[-1].scenes_seen == 8 * (failing + 2)  # one extension of one validation
    assert not trainer.finished
    missing = [str(i) for i in range(failing + 1, 6)]
    assert str(failure.value).endswith(f"; phases not run: {', '.join(missing)}" if missing else "")
    assert ("phases not run" in str(failure.value)) == bool(missing)
    assert [event["phase"] for event in written(tmp_path, telemetry.PHASE)] == [str(i) for i in range(failing)]
    assert written(tmp_path, telemetry.END)[-1]["diagnosis"] == str(failure.value)

    before = (tmp_path / "last.safetensors").read_bytes(), (tmp_path / "telemetry.jsonl").read_bytes()
    for _ in range(2):
        again = Trainer(config, tmp_path)
        with pytest.raises(GateError) as repeated:
            list(again.run())
        assert str(repeated.value) == str(failure.value)
        assert again.scenes_seen == trainer.scenes_seen  # nothing was trained
        assert again.history == trainer.history
    assert before == ((tmp_path / "last.safetensors").read_bytes(), (tmp_path / "telemetry.jsonl").read_bytes())


def test_an_extension_moves_the_learning_rate_and_the_phases_behind_it(short, tmp_path):
    """A gate that passes at its second verdict, since the first one counts from another start."""
    config = short.replaced({"phases": phases(EASY, IMPOSSIBLE, EASY, EASY, EASY, EASY), "optimizer.warmup": 0.5})
    trainer = Trainer(config, tmp_path)
    run = trainer.run()
    next(run)
    next(run)
    assert trainer.plan.extensions == (0, 1, 0, 0, 0, 0)
    assert trainer.plan.total == 56
    trainer.plan = PhasePlan(tuple(config.plan().phases[:1] * 6), 48, 8, trainer.plan.extensions)  # let it pass now
    list(run)
    assert trainer.finished
    assert trainer.scenes_seen == 56
    assert int(trainer.learner.gate.steps_taken) == trainer.learner.gate.total_steps == 7
    rates = [event["rate_backbone"] / 2e-3 for event in written(tmp_path, telemetry.STEP)]
    floor, final = 0.05, 0.02
    rising = [floor + (1 - floor) * step / 3 for step in (1, 2)]  # the warm-up is as planned: half of six steps
    falling = [final + (1 - final) * (1 + math.cos(math.pi * x)) / 2 for x in (0, 0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx(rising + falling, rel=1e-5)


def test_an_extended_run_resumes_where_it_was(short, tmp_path):
    config = short.replaced({"phases": phases(IMPOSSIBLE, EASY, patience=3)})
    trainer = Trainer(config, tmp_path)
    run = trainer.run()
    for _ in range(4):
        next(run)
    run.close()
    resumed = Trainer(config, tmp_path)
    assert resumed.plan == trainer.plan
    assert resumed.plan.extensions == (2, 0)
    assert resumed.last_validation == trainer.last_validation == 64  # of 48 planned
    assert resumed.learner.gate.total_steps == trainer.learner.gate.total_steps == 8


def test_gates_are_told_with_their_evidence(tiny, tmp_path):
    over = {"metric": "k_over", "direction": "down", "margin": -1.0}
    two = [{"metric": "success", "direction": "up", "margin": -1.0}, over]
    both = [{"name": "one", "share": 1 / 3, "gates": [EASY]}, {"name": "two", "share": 2 / 3, "gates": two}]
    trainer = Trainer(tiny.replaced({"phases": both}), tmp_path)
    list(trainer.run())
    gates = written(tmp_path, telemetry.GATE)
    assert [(g["phase"], g["metric"], g["direction"], g["margin"], g["passed"]) for g in gates] == [
        ("one", "k_loc", "down", -9.0, True),
        ("two", "success", "up", -1.0, True),
        ("two", "k_over", "down", -1.0, True),
    ]
    first, last = trainer.history[0].network, trainer.history[2].network
    assert [(g["before"], g["after"]) for g in gates] == [
        (trainer.initial.network.k_loc, first.k_loc),
        (first.success, last.success),
        (first.k_over, last.k_over),
    ]
    assert [len(validation.verdicts) for validation in trainer.history] == [1, 0, 2]
    assert [v.verdicts for v in Trainer(trainer.config, tmp_path).history] == [v.verdicts for v in trainer.history]


def test_phases_left_out_by_an_early_stop_are_named(short, tmp_path):
    changes = {"phases": phases(*[EASY] * 6), "budget.patience": 1, "optimizer.learning_rate": 0.5}
    trainer = Trainer(short.replaced(changes), tmp_path)
    list(trainer.run())
    assert trainer.finished
    done = trainer.scenes_seen // 8
    assert done < 6
    assert trainer.diagnosis().endswith(f"; stopped early, phases not run: {', '.join(str(i) for i in range(done, 6))}")


@pytest.mark.parametrize(
    ("steps", "start", "best", "bad_term", "not_run", "line"),
    [
        ((5, 0), 4.0, 1.5, None, (), "k_loc fell by 2.500 in 5 steps"),
        ((5, 0), 4.0, 1.5, None, ("b", "c"), "k_loc fell by 2.500 in 5 steps; stopped early, phases not run: b, c"),
        (
            (5, 2), 4.0, 3.5, "count", (),
            "k_loc fell by 0.500 in 5 steps, 2 of 7 steps skipped, first non-finite term: count",
        ),
        ((5, 0), 4.0, 4.0, None, ("b",), "k_loc never fell below its start (4.000); 5 steps taken; stopped early, "
         "phases not run: b"),
        ((5, 0), 4.0, 6.5, None, (), "k_loc never fell below its start (4.000); 5 steps taken"),
        ((0, 3), 4.0, None, "gap", (), "no step was taken: 3 of 3 skipped, first non-finite term: gap"),
        ((2, 1), 4.0, None, None, (), "2 of 3 steps taken"),
    ],
)  # fmt: skip
def test_the_diagnosis_says_what_came_of_the_steps(steps, start, best, bad_term, not_run, line):
    initial, found = (k and SimpleNamespace(network=scores(k_loc=k)) for k in (start, best))
    assert diagnosed(steps, initial, found, bad_term, not_run) == line


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5)])
def test_an_early_stop_leaves_no_gate_of_a_begun_phase_unjudged(short, tmp_path, monkeypatch, shares):
    """However flat the scores are: neither within a phase with gates, nor where one has just been extended."""
    monkeypatch.setattr("ris_hpo.training.trainer._is_flat", lambda *_: True)
    gated = [{"name": f"{i}", "share": share, "gates": [IMPOSSIBLE], "patience": 2} for i, share in enumerate(shares)]
    trainer = Trainer(short.replaced({"phases": gated}), tmp_path)
    with pytest.raises(GateError, match="phase '0' failed its gate"):
        list(trainer.run())
    assert not trainer.finished
    assert trainer.plan.extensions[0] == 2
    assert trainer.last_validation == trainer.scenes_seen


def test_an_early_stop_between_phases_names_the_one_that_did_not_run(short, tmp_path, monkeypatch):
    monkeypatch.setattr("ris_hpo.training.trainer._is_flat", lambda *_: True)
    gated = [{"name": name, "share": 0.5, "gates": [gate]} for name, gate in (("a", EASY), ("b", IMPOSSIBLE))]
    trainer = Trainer(short.replaced({"phases": gated}), tmp_path)
    list(trainer.run())
    assert trainer.finished
    assert trainer.scenes_seen == trainer.last_validation == 24
    assert trainer.diagnosis().endswith("; stopped early, phases not run: b")


@pytest.mark.parametrize("after", [math.inf, -math.inf, math.nan])
def test_a_gate_on_a_figure_that_is_not_finite_is_saved_and_read(short, tmp_path, monkeypatch, after):
    trainer = Trainer(short.replaced({"phases": phases(*[gate("rmspe_m", "down", -1e9)] * 6, patience=0)}), tmp_path)
    validate = trainer.validate

    def validated():
        found = validate()
        return dataclasses.replace(found, network=dataclasses.replace(found.network, rmspe_m=after))

    monkeypatch.setattr(trainer, "validate", validated)
    with contextlib.suppress(GateError):
        list(trainer.run())
    again = Trainer(trainer.config, tmp_path)
    assert [str(v.verdicts) for v in again.history] == [str(v.verdicts) for v in trainer.history]
    assert str(again.history[0].verdicts[0].after) == str(after)


def test_phase_survives_a_stop(tiny, tmp_path):
    phases = [{"name": n, "share": s, "backbone_rate": r} for n, s, r in (("a", 1 / 3, 1.0), ("b", 2 / 3, 0.1))]
    config = tiny.replaced({"phases": phases})
    whole = Trainer(config, tmp_path / "whole")
    list(whole.run())
    steps = iter(range(100))
    stopped = Trainer(config, tmp_path / "parts")
    list(stopped.run(lambda: next(steps) >= 6))
    assert stopped.plan.index(stopped.scenes_seen) == 1
    resumed = Trainer(config, tmp_path / "parts")
    list(resumed.run())
    assert [v.network for v in resumed.history] == [v.network for v in whole.history]


# -- specifications --------------------------------------------------------------------------------------------------


def gate(metric, direction, margin):
    return {"metric": metric, "direction": direction, "margin": margin}


def test_standard_curriculum_is_valid_and_its_shares_add_up():
    config = with_curriculum(RunConfig())
    assert sum(phase.share for phase in config.phases) == pytest.approx(1)
    assert [phase.name for phase in config.phases][:2] == ["hybrid covariance", "count"]
    assert with_curriculum(config) == config
    assert all(phase.gates for phase in standard_phases())
    count = config.phase_loss(config.phases[1])
    assert count.count > config.loss.count  # it weighs more in its phase, and the rest as before
    assert count.replaced({"count": config.loss.count}) == config.loss


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
        ([{"name": n, "share": 0.25} for n in "abcd"], "4 phases need a validation each, but .* give 3; lower"),
        ([{"name": "a", "share": 1, "gates": [gate("k_ac", "up", 0)]}], "unknown metric 'k_ac'; did you mean 'k_acc'"),
    ],
)
def test_impossible_phases_are_refused(phases, message, tiny):
    with pytest.raises(ConfigError, match=message):
        tiny.replaced({"phases": phases})
