"""A program of one's own: its study has every promise of the service, whatever its score is and whichever way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ris_hpo.errors import ConfigError
from ris_hpo.programs.program import RequeuedError, TrialContext, load_program
from ris_hpo.results.replay import replay
from ris_hpo.search.files import load_study, parse_study
from ris_hpo.search.lifecycle import get_study, stored_spec
from ris_hpo.store.open import open_store
from tests.cli.conftest import Cli, cli

__all__ = ["cli"]

PROGRAM = """
import json, os, random, signal
from pathlib import Path


def train(trial):
    state = {"step": 0, "accuracy": 0.0}
    if (saved := trial.saved("state.json")) is not None:
        state = json.loads(saved.read_text())
    trial.plan(1, trial.config["steps"])
    for step in range(state["step"] + 1, trial.config["steps"] + 1):
        if trial.should_stop():
            trial.requeue()
        rate, noise = trial.config["optimizer"]["rate"], random.Random(f"{trial.seed}/{step}").random()
        if trial.config.get("diverge") and step == 2:
            state["accuracy"] = float("nan")
        else:
            state["accuracy"] = (1 - abs(rate - 0.3)) * (1 - 0.6 ** step) + 0.01 * noise
        state["step"] = step
        with trial.saving("state.json") as path:
            path.write_text(json.dumps(state))
        flag = Path(os.environ["KILLED"])
        if step == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if trial.report(step, state["accuracy"], loss=1 - state["accuracy"]):
            return None
    trial.record(weights=12)
    trial.artifact(trial.directory / "state.json")
    return state["accuracy"]
"""

STUDY = """
[study]
program = "own_trainer:train"
score = "accuracy"
direction = "maximize"

[base]
steps = 5
optimizer.rate = 0.9

[space]
"optimizer.rate" = { low = 0.0, high = 1.0 }

[pruner]
name = "median"
startup = 2
"""


@pytest.fixture
def home(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_trainer.py").write_text(PROGRAM)
    (tmp_path / "own.toml").write_text(STUDY)
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_study_of_ones_own_program_keeps_every_promise(cli: Cli, home: Path) -> None:
    run = ["run", "--space", "own.toml", "--gpus", "none", "--workers", 2]
    ended = cli(*run, "--n-trials", 6, "--json")
    assert ended.code == 0, ended.err
    assert (home / "killed").exists()
    trials = ended.json["trials"]
    assert trials["complete"] + trials["pruned"] == 6
    assert trials["retried"] == 1  # the worker that was killed

    store = open_store(f"sqlite:///{home}/storage/studies.db", create=False)
    study = get_study(store, "own")
    complete = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    assert ended.json["best"]["accuracy"] == max(trial.value for trial in complete) == study.best_value
    assert study.metric_names == ["accuracy"]
    base = next(trial for trial in study.get_trials() if trial.user_attrs.get("origin") == "base")
    assert base.params == {"optimizer.rate": 0.9}
    best = study.best_trial
    assert best.user_attrs["weights"] == 12
    assert best.user_attrs["metrics"] == {"loss": 1 - best.intermediate_values[5]}
    assert list(best.intermediate_values) == [1, 2, 3, 4, 5]
    for trial in study.get_trials():
        if trial.state.name in ("COMPLETE", "PRUNED"):
            repeated = replay(store, "own", trial.number)
            assert repeated.identical
            assert repeated.fingerprint_agrees

    shown = cli("run", "--study", "own", "--gpus", "none", "--n-trials", 7)  # it remembers its program
    assert shown.code == 0, shown.err
    assert "accuracy" in shown.out
    assert "k_loc" not in shown.out
    assert "loss" in shown.out

    exported = cli("export", "--study", "own", "--trial", best.number, "--out", "best.json", "--json")
    assert (exported.json["metric"], exported.json["score"]) == ("accuracy", best.value)
    written = json.loads((home / "best.json").read_text())
    assert written["steps"] == 5
    assert written["optimizer"]["rate"] == best.params["optimizer.rate"]
    refused = cli("train", "--config", "best.json", "--out", "runs/best")
    assert refused.code == ConfigError.exit_code
    assert "settings of the program 'own_trainer:train'" in refused.err

    confirmed = cli("best", "--study", "own", "--top", 1, "--seeds", 3)
    assert confirmed.code == 0, confirmed.err
    assert "is better than the base configuration: accuracy higher by" in confirmed.out
    assert cli("report", "--study", "own", "--out", "report.html").code == 0
    store.close()


def test_a_trial_that_diverges_fails_where_no_score_is_the_worst(cli: Cli, home: Path) -> None:
    (home / "killed").touch()
    run = ["run", "--space", "own.toml", "--gpus", "none", "--set", "diverge=true"]
    ended = cli(*run, "--n-trials", 4, "--json")
    assert (ended.json["trials"]["fail"], ended.json["causes"]) == (4, {"diverged": 4})  # and no bug, which would stop
    (home / "own.toml").write_text(STUDY.replace("[base]", "worst = 0.0\n[base]", 1))
    ended = cli(*run, "--study", "worst", "--n-trials", 2, "--json")
    assert ended.json["trials"]["complete"] == 2
    store = open_store(f"sqlite:///{home}/storage/studies.db", create=False)
    assert [trial.intermediate_values[2] for trial in get_study(store, "worst").get_trials()] == [0.0, 0.0]
    assert stored_spec(get_study(store, "worst")).worst == 0.0
    store.close()


def test_a_program_runs_without_a_study(home: Path) -> None:
    (home / "killed").touch()
    program = load_program("own_trainer:train")
    settings = {"steps": 4, "optimizer": {"rate": 0.3}}
    trial = TrialContext(settings, home / "alone", seed=3)
    assert program.train(trial) == trial.scores[4]
    assert trial.recorded == {"weights": 12}
    again = TrialContext({**settings, "steps": 6}, home / "alone", seed=3)  # goes on from its checkpoint
    program.train(again)
    assert list(again.scores) == [5, 6]
    with pytest.raises(RequeuedError):
        again.requeue()
    assert again.saved("none") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_trainer", "expected package.module:function"),
        ("own_trainer:", "expected package.module:function"),
        ("no_such_module:train", "cannot be imported (No module named 'no_such_module')"),
        ("own_trainer:trian", "module 'own_trainer' has no 'trian'"),
        ("own_trainer:__doc__", "is not a function but NoneType"),
    ],
)
def test_a_program_that_cannot_be_found_is_named_in_one_line(name: str, words: str, home: Path) -> None:
    (home / "own.toml").write_text(STUDY.replace("own_trainer:train", name))
    with pytest.raises(ConfigError) as caught:
        load_study(home / "own.toml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_score_and_direction_need_a_program() -> None:
    tree: dict[str, Any] = {"study": {"score": "accuracy"}, "space": {"seed": {"low": 0, "high": 1}}}
    with pytest.raises(ConfigError, match="are those of a program of your own; set program too"):
        parse_study(tree, name="unit", source="test")
