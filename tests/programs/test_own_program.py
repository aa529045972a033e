"""A program of one's own: its study has every promise of the service, whatever its score is and whichever way."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial
from optuna_dashboard import get_note

from ris_hpo.errors import ConfigError
from ris_hpo.programs.program import Program, RequeuedError, TrialContext, load_program
from ris_hpo.report.collect import collect
from ris_hpo.results.replay import replay
from ris_hpo.search.files import load_study, parse_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, get_study, stored_spec
from ris_hpo.store.attributes import Cause
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner, this_process
from ris_hpo.trials.context import TrialEnvironment
from ris_hpo.trials.run import Outcome, UnfitHostError, run_trial
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
        if trial.report(step, state["accuracy"], loss=1 - state["accuracy"]):
            return None
        flag = Path(os.environ["KILLED"])
        if step == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with trial.saving("state.json") as path:
            path.write_text(json.dumps(state))
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
    assert {tuple(trial.intermediate_values) for trial in complete} == {(1, 2, 3, 4, 5)}  # the killed one's too
    for trial in study.get_trials():
        if trial.state.name in ("COMPLETE", "PRUNED"):
            repeated = replay(store, "own", trial.number)
            assert repeated.identical
            assert repeated.fingerprint_agrees

    table = cli("replay", best.number, "--study", "own").out
    assert "recorded accuracy" in table
    assert "steps" in table
    assert "identical" in table

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
    page = (home / "report.html").read_text()
    assert f"<p>Trial {best.number} scores accuracy {best.value:.3f}.</p>" in page
    assert "higher is better" in page
    for word in ("k_loc", "scenes", "pipeline", "Cramér"):
        assert word not in page
    text = get_note(study)
    assert f"| Best accuracy | trial {best.number}: **{best.value:.3f}** |" in text
    assert "accuracy of own_trainer:train is maximized." in text
    found = collect(study)
    assert found.ranked(found.trials)[0].number == best.number
    assert found.compared()[0].curve == max((trial.curve for trial in found.compared()), key=lambda curve: curve[0][1])
    refused = cli("report", "--study", "own", "--reference")
    assert "trains no networks of this package" in refused.err
    store.close()

    kept = home / "storage" / "artifacts"
    assert any(kept.iterdir())
    assert cli("delete", "own", "--yes").code == 0
    assert list(kept.iterdir()) == []


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
        ("own_trainer:trian", "own_trainer.py) has no 'trian'"),
        ("sys:train", "module 'sys' (built in) has no 'train'"),
        ("own_trainer:__doc__", "is not a function but NoneType"),
    ],
)
def test_a_program_that_cannot_be_found_is_named_in_one_line(name: str, words: str, home: Path) -> None:
    (home / "own.toml").write_text(STUDY.replace("own_trainer:train", name))
    with pytest.raises(ConfigError) as caught:
        load_study(home / "own.toml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_hides_behind_another_one_is_told_apart(home: Path) -> None:
    (home / "wave.py").write_text(PROGRAM)  # a name that the standard library has
    (home / "own.toml").write_text(STUDY.replace("own_trainer:", "wave:"))
    sys.path.remove(str(home))  # as when the command line runs: the current folder comes last
    with pytest.raises(
        ConfigError, match=r"wave\.py\) has no 'train'; .*wave\.py is not seen because of it: give yours"
    ):
        load_study(home / "own.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def train(trial:", "(SyntaxError: '(' was never closed"),
        ("import math\nmath.no_such_name\n", "has no attribute 'no_such_name'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_in_one_line(text: str, words: str, home: Path) -> None:
    (home / "broken_trainer.py").write_text(text)
    (home / "own.toml").write_text(STUDY.replace("own_trainer:", "broken_trainer:"))
    with pytest.raises(ConfigError) as caught:
        load_study(home / "own.toml")
    assert words in str(caught.value)
    assert "broken_trainer.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- what a program can do wrong -------------------------------------------------------------------------------------


def raises(trial: TrialContext) -> float:
    raise KeyError("no such layer")


def leaves(trial: TrialContext) -> float:
    sys.exit("usage: train.py DATA")


def reports(*scores: Any, steps: tuple[Any, ...] = (1, 2), **metrics: Any) -> Callable[[TrialContext], float]:
    def train(trial: TrialContext) -> float:
        for step, score in zip(steps, scores, strict=False):
            trial.report(step, score, **metrics)
        return 0.5

    return train


def saves(name: str) -> Callable[[TrialContext], float]:
    def train(trial: TrialContext) -> float:
        with trial.saving(name) as path:
            path.write_text("state")
        return 0.5

    return train


def keeps(trial: TrialContext) -> float:
    trial.artifact(trial.directory / "figure.png")
    return 0.5


WRONG = [
    (raises, "KeyError: 'no such layer'"),
    (leaves, "SystemExit: usage: train.py DATA"),
    (lambda trial: None, "TypeError: own:train returned no score and has reported none"),
    (lambda trial: "good", "TypeError: what own:train returned is 'good' (str), expected one number"),
    (lambda trial: np.zeros(2), "TypeError: what own:train returned is array([0., 0.]) (ndarray), expected one number"),
    (reports(None), "TypeError: score is None (NoneType), expected one number"),
    (reports("0.5"), "TypeError: score is '0.5' (str), expected one number"),
    (reports(0.5, loss=[1]), "TypeError: metric 'loss' is [1] (list), expected one number"),
    (reports(0.5, steps=(0.5,)), "TypeError: step is 0.5 (float), expected a whole number"),
    (reports(0.5, steps=(-1,)), "ValueError: step is -1, but must not be negative"),
    (reports(0.5, 0.6, steps=(3, 2)), "ValueError: step is 2, but must be above 3, the one reported before"),
    (reports(0.5, 0.6, steps=(3, 3)), "ValueError: step is 3, but must be above 3, the one reported before"),
    (lambda trial: trial.record(owner="me"), "ValueError: 'owner' is written by the service; choose another name"),
    (saves("../state.pt"), "ValueError: '../state.pt' cannot be saved with the trial: expected a plain file name"),
    (saves("/tmp/state.pt"), "ValueError: '/tmp/state.pt' cannot be saved with the trial"),
    (saves(".state"), "ValueError: '.state' cannot be saved with the trial"),
    (saves("reports.jsonl"), "ValueError: 'reports.jsonl' cannot be saved with the trial"),
    (keeps, "figure.png: no such file"),
]


@pytest.fixture
def one_trial(tmp_path: Path) -> Iterator[Callable[[Callable[[TrialContext], Any]], tuple[Outcome, FrozenTrial]]]:
    """Runs one function as the only trial of a study, in this process."""
    store = open_store(f"sqlite:///{tmp_path}/studies.db")

    def run(train: Callable[[TrialContext], Any]) -> tuple[Outcome, FrozenTrial]:
        head = {"program": "own:train", "score": "accuracy", "direction": "maximize"}
        spec = parse_study({"study": head, "space": {"rate": {"low": 0, "high": 1}}}, name="own", source="test")
        with pytest.MonkeyPatch.context() as patch:
            module = ModuleType("own")
            module.train = train  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "own", module)
            study = create_or_resume_study(store, spec, score_version=1)
            fill_budget(store, study, 1)
            study_id, owner = store.get_study_id_from_name("own"), Owner(this_process(), 0)
            number = store.claim(study_id, str(owner))
            assert number is not None
            environment = TrialEnvironment(store, study_id, spec, Program(train), lambda number: tmp_path / str(number))
            outcome = run_trial(environment, number, owner)
        return outcome, study.get_trials()[number]

    yield run
    store.close()


@pytest.mark.parametrize(("train", "line"), WRONG, ids=[line[:50] for _, line in WRONG])
def test_what_a_program_does_wrong_is_one_line(train: Any, line: str, one_trial: Any) -> None:
    outcome, trial = one_trial(train)
    assert (outcome.state, outcome.cause) == ("failed", Cause.BUG)
    assert line in outcome.error
    assert "\n" not in outcome.error
    assert trial.user_attrs["error"] == outcome.error


def test_a_folder_that_may_not_be_written_is_the_machines_fault(one_trial: Any) -> None:
    def train(trial: TrialContext) -> float:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/weights.pt")

    with pytest.raises(UnfitHostError, match=r"trial 0 was put back: PermissionError: .* '/data/weights.pt'"):
        one_trial(train)


def test_numbers_of_every_library_are_numbers(one_trial: Any) -> None:
    def train(trial: TrialContext) -> Any:
        trial.report(np.int64(1), np.float32(0.25), loss=torch.tensor(0.5, requires_grad=True))
        trial.report(torch.tensor(2), torch.tensor([0.5]))
        return np.float64(0.75)

    outcome, trial = one_trial(train)
    assert (outcome.state, outcome.value) == ("complete", 0.75)
    assert trial.intermediate_values == {1: 0.25, 2: 0.5}


def test_putting_back_passes_through_a_program_that_catches_everything(one_trial: Any) -> None:
    def train(trial: TrialContext) -> float:
        try:
            trial.requeue()
        except Exception:  # noqa: BLE001 - as many programs have it
            return 0.0

    assert one_trial(train)[0].state == "requeued"


def test_score_and_direction_need_a_program() -> None:
    tree: dict[str, Any] = {"study": {"score": "accuracy"}, "space": {"seed": {"low": 0, "high": 1}}}
    with pytest.raises(ConfigError, match="are those of a program of your own; set program too"):
        parse_study(tree, name="unit", source="test")
