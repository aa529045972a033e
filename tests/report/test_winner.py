"""The winner: honest on noise, right on a real difference, and going on where it was interrupted."""

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from ris_hpo.config import Spec
from ris_hpo.errors import StudyError
from ris_hpo.programs.program import Program
from ris_hpo.results import winner
from ris_hpo.results.winner import confirm, judge
from ris_hpo.search.spec import StudySpec, derived_seed
from ris_hpo.store import attributes as names


class Knobs(Spec):
    gain: float = 0.0
    seed: int = 0


PROGRAM = Program(lambda trial: float(trial.config["gain"]), Knobs)
SPEC = StudySpec.parse(
    {"name": "double", "seed": 5, "program": f"{__name__}:PROGRAM", "space": {"gain": {"low": -1.0, "high": 1.0}}}
)


def noisy(slope):
    """A test double of training: score = slope * gain + noise of the seed and the configuration."""

    def evaluate(config, directory):
        noise = np.random.default_rng([config.seed, round(1e6 * (config.gain + 2))]).normal()
        return 2.0 + slope * config.gain + 0.1 * noise

    return evaluate


def searched(seed, slope, trials=40):
    """A study searched with noise: its best trials are the luckiest."""
    study = optuna.create_study()
    generator = np.random.default_rng(seed)
    for _ in range(trials):
        gain = generator.uniform(-1, 1)
        study.add_trial(
            create_trial(
                value=2.0 + slope * gain + 0.1 * generator.normal(),
                params={"gain": gain},
                distributions={"gain": FloatDistribution(-1, 1)},
            )
        )
    return study


def run(study, tmp_path, slope, seed=5, **options):
    spec = SPEC.replaced({"seed": seed})
    return confirm(study, spec, noisy(slope), tmp_path, **options)


def test_pure_noise_is_not_distinguishable_in_nine_of_ten(tmp_path):
    honest = 0
    for repetition in range(50):
        study = searched(repetition, slope=0.0)
        assert study.best_value < 1.9  # the flattering number
        verdict = run(study, tmp_path / str(repetition), 0.0, seed=repetition)
        honest += not verdict.distinguishable and "not distinguishable" in verdict.sentence
    assert honest >= 45


def test_a_real_difference_is_named(tmp_path):
    named = 0
    for repetition in range(20):
        study = searched(repetition, slope=0.4)
        best = min(study.trials, key=lambda trial: trial.params["gain"])
        verdict = run(study, tmp_path / str(repetition), 0.4, seed=repetition)
        gain = study.trials[int(verdict.winner.removeprefix("trial "))].params["gain"]
        named += verdict.distinguishable and gain < best.params["gain"] + 0.4 and "is better than" in verdict.sentence
    assert named >= 19


def test_judge_names_the_right_one_of_three_and_its_peers():
    generator = np.random.default_rng(1)
    table = 2 + 0.05 * generator.normal(size=(4, 6))
    table[2] -= 0.6
    verdict = judge(["a", "b", "c"], table)
    assert (verdict.winner, verdict.distinguishable, verdict.peers) == ("b", True, ())
    table[3] -= 0.6
    assert judge(["a", "b", "c"], table).peers in {("b",), ("c",)}


@pytest.mark.parametrize("candidates", [1, 3, 10])
def test_simultaneous_intervals_hold_as_often_as_promised(candidates):
    generator = np.random.default_rng(candidates)
    covered = 0
    for _ in range(300):
        verdict = judge([str(i) for i in range(candidates)], generator.normal(size=(1 + candidates, 5)))
        covered += all(item.low <= 0 <= item.high for item in verdict.candidates)
    assert covered >= 274  # 95 % less three standard errors of a count


def test_intervals_pair_by_seed():
    difficulty = 10 * np.random.default_rng(0).normal(size=6)  # a hard seed is hard for everyone
    table = np.stack([difficulty, difficulty - 0.3 + 0.01 * np.arange(6)])
    verdict = judge(["a"], table)
    assert verdict.distinguishable
    assert verdict.candidates[0].difference == pytest.approx(-0.275)


def test_the_interval_is_the_paired_t_interval_by_hand():
    found = judge(["a", "b"], [[2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [2.0, 2.5, 3.0]]).candidates
    half = 6.205347 / math.sqrt(3)  # t at 1 - 0.05/4 with 2 degrees of freedom: two candidates, two sides; sd 1
    assert [item.name for item in found] == ["a", "b"]
    assert (found[0].low, found[0].high) == (pytest.approx(-half, rel=1e-6), pytest.approx(half, rel=1e-6))
    assert (found[1].low, found[1].high) == (pytest.approx(0.5 - half / 2), pytest.approx(0.5 + half / 2))


def test_edges_of_the_table():
    assert not judge(["a"], [[2.0], [1.0]]).distinguishable
    assert judge(["a"], [[2.0], [1.0]]).candidates[0].low == -math.inf
    shifted = judge(["a"], [[2.0, 2.1, 2.3], [1.7, 1.8, 2.0]]).candidates[0]
    assert (shifted.low, shifted.high) == (pytest.approx(-0.3), pytest.approx(-0.3))
    alike = judge(["a"], [[2.0, 2.0], [2.0, 2.0]])
    assert (alike.winner, alike.distinguishable) == ("base", False)
    worse = judge(["a"], [[2.0, 2.1, 1.9], [3.0, 3.2, 3.1]])
    assert worse.winner == "base"
    assert worse.candidates[0].low > 0
    with pytest.raises(StudyError, match="shape"):
        judge(["a", "b"], [[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(StudyError, match="not finite"):
        judge(["a"], [[1.0, 2.0], [1.0, math.nan]])


def test_confirm_uses_fresh_seeds_once_each_and_goes_on_after_an_interruption(tmp_path):
    study = searched(3, slope=0.4)
    seen = []

    def interrupted(config, directory):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append((config.gain, config.seed))
        return noisy(0.4)(config, directory)

    with pytest.raises(KeyboardInterrupt):
        confirm(study, SPEC, interrupted, tmp_path)
    assert names.WINNER not in study.user_attrs

    def resumed(config, directory):
        seen.append((config.gain, config.seed))
        return noisy(0.4)(config, directory)

    steps = []
    verdict = confirm(
        study,
        SPEC,
        resumed,
        tmp_path,
        progress=lambda done, total, what: steps.append((done, total)),
    )
    assert len(seen) == len(set(seen)) == 20  # (base + 3) x 5, none twice
    assert {seed for _, seed in seen} == {derived_seed(5, index, "winner") for index in range(5)}
    assert steps[-1] == (20, 20)
    stored = study.user_attrs[names.WINNER]
    assert stored["verdict"] == verdict.sentence
    assert [row["name"] for row in stored["candidates"]] == [item.name for item in verdict.candidates]
    assert all(row["searched"] == study.trials[int(row["name"][6:])].value for row in stored["candidates"])
    assert run(study, tmp_path, 0.4) == verdict  # kept results, no run


def test_confirm_leaves_out_the_base_twins_and_trials_that_diverged(tmp_path):
    study = optuna.create_study()
    shape = {"distributions": {"gain": FloatDistribution(-1, 1)}}
    study.add_trial(create_trial(value=1.0, params={"gain": 0.0}, **shape))  # the base itself
    study.add_trial(create_trial(state=TrialState.FAIL, params={"gain": 0.3}, **shape))
    with pytest.raises(StudyError, match="nothing to confirm"):
        run(study, tmp_path, 0.4)
    study.add_trial(create_trial(value=7.0, params={"gain": 0.9}, user_attrs={names.DIVERGED: "nan"}, **shape))
    study.add_trial(create_trial(value=1.5, params={"gain": 0.5}, **shape))
    study.add_trial(create_trial(value=1.6, params={"gain": 0.5}, **shape))  # the same configuration again
    verdict = run(study, tmp_path, 0.4)
    assert [item.name for item in verdict.candidates] == ["trial 3"]


@pytest.mark.parametrize("what", ["score version", "fresh scenes", "code"])
def test_a_kept_score_is_not_used_for_another_question(tmp_path, monkeypatch, what):
    study, seen = searched(3, slope=0.4), []

    def counted(config, directory):
        seen.append(directory)
        return noisy(0.4)(config, directory)

    def confirmed():
        return confirm(study, SPEC, counted, tmp_path, top=1, seeds=2)

    verdict = confirmed()
    assert len(seen) == 4
    assert confirmed() == verdict
    assert len(seen) == 4
    if what == "score version":
        monkeypatch.setattr(winner, "SCORE_VERSION", winner.SCORE_VERSION + 1)
    elif what == "fresh scenes":
        monkeypatch.setattr(winner, "FRESH_SHARE", winner.FRESH_SHARE + 1)
    else:
        monkeypatch.setattr(winner, "code_of", lambda spec: "of tomorrow")
    assert confirmed() == verdict
    assert len(set(seen)) == 8


def test_the_code_of_ones_own_program_is_its_module_and_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_program_of_this_test.py").write_text("from own_helper_of_this_test import train\n")
    (tmp_path / "own_helper_of_this_test.py").write_text("def train(trial):\n    return 1.0\n")
    spec = SPEC.replaced({"program": "own_program_of_this_test:train"})
    before = winner.code_of(spec)
    assert winner.code_of(spec) == before
    (tmp_path / "own_helper_of_this_test.py").write_text("def train(trial):\n    return 2.0\n")
    assert winner.code_of(spec) != before
