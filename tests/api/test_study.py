"""A study as a Python object: made, run, read and handed on; notices and curves beside a run."""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ris_hpo import Study
from ris_hpo.api.table import LiveTable, as_html, in_notebook
from ris_hpo.errors import ConfigError, OutputError, StudyError, WorkerError
from ris_hpo.results import notices, tensorboard
from ris_hpo.results.notices import Notifier
from ris_hpo.search.counting import Tally
from ris_hpo.search.status import BestTrial
from ris_hpo.workers.pool import WorkerView
from ris_hpo.workers.supervisor import PoolSnapshot

PROGRAM = """
def train(trial):
    if trial.directory.name == "1" or trial.config.get("broken"):
        raise KeyError("no such layer")
    for step in (1, 2, 3):
        trial.report(step, trial.config["rate"] * step, loss=1 / step)
"""
STUDY = """
[study]
program = "steady:train"
score = "gain"
direction = "maximize"

[base]
rate = 0.5

[space]
rate = { low = 0.0, high = 1.0 }

[pruner]
name = "none"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "steady.py").write_text(PROGRAM)
    (tmp_path / "steady.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "steady", raising=False)
    for name in ("RIS_HPO_STORAGE_URL", "RIS_HPO_STORAGE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]], list[int]]]:
    """A web address, the requests it had, and the answers that it gives before it says 204."""
    requests: list[tuple[dict[str, str], bytes]] = []
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((dict(self.headers), body))
            self.send_response(answers.pop(0) if answers else 204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}/hook/s3cret", requests, answers
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_a_study_from_its_file_to_its_best_configuration(home: Path) -> None:
    with Study.make("steady.toml", changes={"sampler.name": "random"}) as made:
        stands = made.run(
            4, workers=1, gpus=(), notify=["cat >> notices.jsonl; echo >> notices.jsonl"], tensorboard="curves"
        )
    assert (stands.trials.complete, stands.trials.fail, stands.trials.open) == (3, 1, 0)

    study = Study.open()  # the only one
    assert repr(study).startswith("Study('steady', sqlite")
    assert study.spec.sampler.name == "random"
    trials = study.trials()
    assert [trial.state for trial in trials] == ["complete", "fail", "complete", "complete"]
    assert trials[0].curve == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert trials[0].metrics == {"loss": 1 / 3}
    assert trials[1].error == "KeyError: 'no such layer'"
    best = study.best()
    assert best is not None
    assert best.value == max(trial.value or 0 for trial in trials)

    frame = study.frame()
    assert list(frame.index) == [0, 1, 2, 3]
    assert list(frame.columns) == [
        "state",
        "gain",
        "rate",
        "loss",
        "steps",
        "seconds",
        "device",
        "origin",
        "cause",
        "error",
    ]
    assert frame["gain"].idxmax() == best.number
    assert frame.loc[1, "cause"] == "bug"

    assert study.report("report.html").best.number == best.number  # type: ignore[union-attr]
    assert "gain" in Path("report.html").read_text()
    exported = study.export("best.json")
    assert exported.provenance is not None
    assert json.loads(Path("best.json").read_text())["rate"] == best.params["rate"]
    assert study.replay(best.number).identical
    assert study.run(4, workers=1, gpus=()).trials.ended == 4  # nothing is added

    sent = [json.loads(line) for line in Path("notices.jsonl").read_text().splitlines()]
    assert any(notice["event"] == "new_best" for notice in sent)
    sent = [notice for notice in sent if notice["event"] != "new_best"]
    assert [notice["event"] for notice in sent] == ["trial_failed", "run_ended"]
    assert sent[0]["trial"]["number"] == 1
    assert sent[0]["trial"]["cause"] == "bug"
    assert (sent[1]["ending"], sent[1]["best"]["gain"], sent[1]["trials"]["complete"]) == ("finished", best.value, 3)

    curve = EventAccumulator(f"curves/trial-{best.number}").Reload()
    assert [(event.step, round(event.value, 5)) for event in curve.Scalars("gain")] == [
        (step, round(value, 5)) for step, value in best.curve
    ]
    again = tensorboard.Curves(study._study, Path("curves"))
    again.write()
    again.close()
    assert len(EventAccumulator(f"curves/trial-{best.number}").Reload().Scalars("gain")) == 3
    study.close()


def test_a_run_that_fails_is_told_and_still_fails(home: Path) -> None:
    with (
        Study.make("steady.toml", name="broken", base={"broken": True}) as made,
        pytest.raises(WorkerError, match="3 trials failed with a bug"),
    ):
        made.run(5, workers=1, gpus=(), notify=["cat >> notices.jsonl; echo >> notices.jsonl"])
    sent = [json.loads(line) for line in Path("notices.jsonl").read_text().splitlines()]
    assert sent[-1]["event"] == "run_failed"
    assert "3 trials failed with a bug" in sent[-1]["error"]


def test_a_store_without_the_study_says_so(home: Path) -> None:
    with pytest.raises(StudyError, match="no study 'other'"):
        Study.make("steady.toml").open("other")
    Study.make("steady.toml", name="second")
    with pytest.raises(StudyError, match="several studies: second, steady"):
        Study.open()


def test_what_is_not_installed_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.make("steady.toml")
    assert study.frame().empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"install ris-hpo\[notebook\]"):
        study.frame()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OutputError, match=r"install ris-hpo\[tensorboard\]"):
        study.run(1, workers=1, gpus=(), tensorboard="curves")
    study.close()


# -- notices ---------------------------------------------------------------------------------------------------------


def test_a_notice_is_tried_again_and_signed(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address, requests, answers = server
    answers += [500, 503]
    monkeypatch.setattr(notices, "_PAUSE_S", 0.0)
    monkeypatch.setenv("RIS_HPO_NOTIFY_SECRET", "key")
    with Notifier([address]) as notifier:
        notifier.send({"event": "run_ended", "best": float("nan")})
    assert len(requests) == 3
    headers, body = requests[-1]
    assert json.loads(body) == {"event": "run_ended", "best": None}
    assert headers["X-Ris-Hpo-Signature"] == "sha256=" + hmac.new(b"key", body, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("target", ["false", "http://127.0.0.1:1/hook/s3cret"])
def test_what_cannot_be_delivered_is_one_warning_without_its_secrets(
    target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "_PAUSE_S", 0.0)
    with Notifier([target]) as notifier:
        notifier.send({"event": "run_ended"})
    (warning,) = caplog.messages
    assert "not delivered in 3 tries" in warning
    assert "s3cret" not in warning


def test_an_address_without_a_host_is_refused_at_once() -> None:
    for address in ("https://[/s3cret", "https:///s3cret"):
        with pytest.raises(ConfigError, match="has no host: expected https://HOST/PATH"):
            Notifier([address])


# -- the table of a notebook -----------------------------------------------------------------------------------------


def test_the_live_table_shows_workers_and_the_best_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    best = BestTrial(3, 0.875, None, None, None, {}, None)
    workers = [WorkerView(0, "cpu", "training", trial=4, step=2, score=0.5), WorkerView(1, "<b>", "idle")]
    snapshot = PoolSnapshot("s", 8, Tally(complete=3, pruned=1), best, workers, 65.0, [], "accuracy", "steps")
    page = as_html(snapshot)
    for piece in ('max="8" value="4"', "4 of 8 trials: 3 complete, 1 pruned", "best: trial 3, accuracy 0.875"):
        assert piece in page
    assert "<td>training</td><td>4</td><td>2</td><td>0.5</td>" in page
    assert "&lt;b&gt;" in page
    assert not in_notebook()
    shown: list[str] = []

    class Handle:
        def update(self, table: Any) -> None:
            shown.append("again " + table.data)

    def display(table: Any, *, display_id: bool) -> Handle:
        shown.append(table.data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    table = LiveTable()
    table.update(snapshot)
    table.update(snapshot)
    assert shown == [page, "again " + page]
