"""The command line with any arguments: its result, or one line and the exit code of its kind, and no half file.

What takes minutes (training, the pool, serving) is cut short; everything before and after it is the real thing.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from ris_hpo.cli import app, execute, options
from ris_hpo.dashboard import server as dashboard
from ris_hpo.errors import ProofError, RisHpoError, StudyError
from ris_hpo.learning import bundle
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.files import load_estimates, load_scenes, save_estimates, save_scenes
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.report import reference
from ris_hpo.results import winner
from ris_hpo.search.counting import Tally
from ris_hpo.search.files import parse_study
from ris_hpo.search.lifecycle import create_or_resume_study
from ris_hpo.store import attributes
from ris_hpo.store.cache import ticket
from ris_hpo.store.open import open_store
from ris_hpo.training import proof
from ris_hpo.training.config import RunConfig
from ris_hpo.training.files import Exported, write_config
from ris_hpo.training.trainer import Trainer
from ris_hpo.workers import watch
from ris_hpo.workers.supervisor import PoolSnapshot, Supervisor
from tests.training.conftest import TINY

from .fuzzing import fuzz, outcome

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SHORT = {"evaluate": ["--per-cell", "1", "--counts", "1", "--snr-db", "10"], "simulate": ["--num-scenes", "2"]}

STUDY = """
[base]
"budget.scenes" = 96
[space]
"optimizer.learning_rate" = { low = 1e-4, high = 1e-2, log = true }
"""

PLAIN = """
x -1 0 1 2 3.5 1e-3 nan inf truth 1,2 0,,1 none cpu cuda cuda:9 made mode tiny smoke wide run default über - -- --json
--help tiny.toml run.toml run.json best.toml bad.toml scenes.npz found.npz bad.npz out.npz out.png out.svg out.html
out.json out.toml out missing/out.npz . .. /dev/null /proc/x.npz /proc/x ml music mvdr spectrum-maxima toml json short
a=b seed=1 seed=x num_snapshots=2 geometry.num_horizontal=4 = likelihood.gamma=0 sqlite:///other.db sqlite:// mysql://x
sqlite:///scenes.npz postgresql://me:canary@127.0.0.1:9/x :// tpe random nsga2 asha network pipeline ray local
127.0.0.1 256.0.0.1 localhost correct-horse-battery
"""
WORDS = [*PLAIN.split(), "", " ", "two\nlines", "\x1b[31m", "\udcff", "x" * 300]


NUMBERS = ["0", "1", "2", "3"]
FITTING = {
    "out": ["out.npz", "out.toml", "out.json", "out.html", "out", "run"],
    "plot": ["out.png", "out.svg", "out.pdf"],
    "scenes": ["scenes.npz", "bad.npz", "found.npz"],
    "estimates": ["found.npz", "scenes.npz"],
    "config": ["run.toml", "run.json", "tiny.toml", "bad.toml"],
    "checkpoint": ["run", "run/best.safetensors", "scenes.npz", "."],
    "space": ["tiny.toml", "smoke", "wide", "inference", "bad.toml"],
    "name": ["tiny.toml", "narrow", "smoke"],
    "study": ["made", "maid", "tiny", "fresh"],
    "fork": ["made-2", "made"],
    "warm_start": ["made", "none"],
    "storage": ["sqlite:///storage/studies.db", "storage/studies.db", "other.db", "scenes.npz"],
    "estimator": ["ml", "music", "mvdr", "modified-music", "spectrum-maxima", "mll"],
    "device": ["cpu", "cuda", "cpu:0", "mps"],
    "set_": [
        "seed=3",
        "num_snapshots=2",
        "budget.scenes=64",
        "likelihood.gamma=3",
        "nothing=1",
        "optimizer.batch_size=-1",
    ],
    "path": ["network", "fast", "pipeline"],
    "engine": ["local", "ray"],
    "sampler": ["tpe", "random", "nsga2", "tp"],
    "pruner": ["asha", "none", "median", "x"],
    "form": ["toml", "json"],
    "preset": ["base", "large"],
    "head": ["structured", "factor"],
    "gpus": ["none", "0", "0,1", ""],
    "num_sources": ["truth", "1", "2", "9"],
    "snr_db": ["0", "10,20", "-5"],
    "counts": ["1", "1,2", "0", "7"],
    "host": ["127.0.0.1", "localhost", "256.0.0.1"],
    "port": ["0", "99999"],
    "first": ["made", "maid"],
    "second": ["made"],
    "to": ["other.db", "scenes.npz"],
    "file": ["tiny.toml", "scenes.npz", "bad.npz"],
    "checkpoints": ["best", "none", "few"],
    "token": ["correct-horse-battery", "short"],
}

Words = list[str]


@st.composite
def command_lines(draw: st.DrawFn) -> Words:
    """A command with some of its options, in any order, with values that fit and values that do not."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    line = [name, *SHORT.get(name, [])]
    words = st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=6)
    parameters = COMMANDS[name].params
    needed = [each for each in parameters if each.required and draw(st.integers(0, 9))]
    for each in [*needed, *draw(st.lists(st.sampled_from(parameters), max_size=4))]:
        value = draw(st.sampled_from(FITTING.get(each.name, NUMBERS)) if draw(st.integers(0, 5)) else words)
        if each.param_type_name == "argument":
            line.append(value)
        elif each.is_flag:
            line.append(draw(st.sampled_from(each.opts)))
        else:
            line += [draw(st.sampled_from(each.opts)), value]
    if draw(st.integers(0, 19)) == 7:
        line.insert(draw(st.integers(0, len(line))), draw(words))
    return line


def codes() -> set[int]:
    """Every exit code a command may end with."""
    classes: list[type[RisHpoError]] = [RisHpoError]
    for each in classes:
        classes.extend(each.__subclasses__())
    return {0, 2, options.INTERRUPTED, *(each.exit_code for each in classes)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study, scenes, estimates, configurations, and some files that are none of these."""
    folder = tmp_path_factory.mktemp("template")
    scenes = simulate(SceneSpec(geometry=Geometry(num_horizontal=4, num_vertical=3), num_snapshots=3), 1, range(2))
    save_scenes(folder / "scenes.npz", scenes)
    save_estimates(folder / "found.npz", scenes.require_truth())
    for form in ("toml", "json"):
        write_config(Exported(config=RunConfig().replaced(TINY)), folder / f"run.{form}")
    (folder / "tiny.toml").write_text(STUDY)
    (folder / "bad.toml").write_text("[space\n")
    (folder / "bad.npz").write_bytes(b"PK\x03\x04 and nothing else")
    list(Trainer(RunConfig().replaced({**TINY, "budget.scenes": 32}), folder / "run").run())
    space = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    store = open_store(str(folder / "storage" / "studies.db"))
    spec = parse_study({"base": dict(TINY), "space": space}, name="made", source="test")
    study = create_or_resume_study(store, spec, command="ris-hpo run")
    distributions = {path: dimension.distribution() for path, dimension in spec.space.items()}
    for place, state in enumerate([TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]):
        params = {"optimizer.learning_rate": 1e-3 * (place + 1)}
        marks = {attributes.CONFIG_FINGERPRINT: spec.config(params, place).fingerprint(), attributes.FLOOR: 1.0}
        value = 2.0 + place if state is TrialState.COMPLETE else None
        study.add_trial(
            create_trial(
                state=state, value=value, params=params, distributions=distributions, user_attrs=marks,
                intermediate_values={32: 3.0, 64: 2.5 + place},
            )
        )  # fmt: skip
    study.add_trial(ticket())
    store.close()
    return folder


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def finished(self: Supervisor) -> Iterator[PoolSnapshot]:
        self.ending = "finished"
        yield PoolSnapshot("made", 0, Tally(), None, [], 0.0, [])

    def refused(error: RisHpoError) -> Any:
        def refuse(*_: object, **__: object) -> None:
            raise error

        return refuse

    monkeypatch.setattr(Supervisor, "run", finished)
    monkeypatch.setattr(dashboard.Dashboard, "run", lambda self: None)
    monkeypatch.setattr(watch, "watched", lambda *_: iter(()))
    monkeypatch.setattr(winner, "fresh_score", lambda config, folder, device: 2.0 + config.seed % 7)
    monkeypatch.setattr(proof, "prove", refused(ProofError("cut short")))
    monkeypatch.setattr(reference, "measure", refused(StudyError("cut short")))
    monkeypatch.setattr(Trainer, "run", lambda self, stop=None: iter(()))
    monkeypatch.setattr(bundle, "_program", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda program, path: path.write_bytes(b""))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_command_line(
    template: Path,
    cut_short: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    allowed, folder = codes(), tmp_path / "work"

    def check(line: Words) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        monkeypatch.chdir(folder)
        code = execute(line)
        out, err = capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        assert code in allowed, (line, code)
        assert "Traceback" not in out + err
        assert "canary" not in err
        if code not in (0, 1, StudyError.exit_code, options.INTERRUPTED):
            assert err.splitlines()[-1].startswith("error: "), err
        if code == 0 and "--json" in line and "--help" not in line and "-h" not in line:
            json.loads(out)
        assert not list(folder.rglob(f".*.{os.getpid()}-*")), "half a file is left"
        made = folder / "out.npz"
        if made.exists() and line[0] in ("simulate", "localize"):
            assert outcome(lambda: load_scenes(made)) or outcome(lambda: load_estimates(made))

    fuzz(check, command_lines())
    gc.collect()  # a command leaves its connections to the end of its process
