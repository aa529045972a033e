"""Artifacts of a trial: redrawn in place, resumed, within their share of time, and never the end of a trial."""

import errno
import json
import os
import types
import xml.etree.ElementTree as ET

import optuna
import pytest
import torch

from ris_hpo.config import Spec
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.report import artifacts, trial_figures
from ris_hpo.report.trial_figures import MAX_STEPS, SHARE_OF_TIME, TrialFigures
from ris_hpo.scoring.metrics import Scores
from ris_hpo.store import attributes as names
from ris_hpo.training import telemetry
from ris_hpo.training.telemetry import Telemetry
from tests.report.synthetic import scores


class Knobs(Spec):
    gain: float = 1.0


def validation(scenes_seen, k_loc):
    made = [Scores.from_dict(scores(value)) for value in (k_loc, 1.03)]
    return types.SimpleNamespace(scenes_seen=scenes_seen, network=made[0], floor=made[1])


HISTORY = [validation(1000 * i, 5.0 - 0.3 * i) for i in range(1, 8)]


@pytest.fixture
def place(tmp_path):
    study = optuna.create_study()
    study.set_user_attr(names.REFERENCE, {"ml": scores(2.37)})
    trial = study.ask()
    run = tmp_path / "run"
    run.mkdir()
    with Telemetry(run) as log:
        log.write(telemetry.START, 0)

    def figures(**options):
        return TrialFigures(study, trial, run, tmp_path / "artifacts", **options)

    def shown():
        metas = optuna.artifacts.get_all_artifact_meta(trial, storage=study._storage)
        assert len({meta.filename for meta in metas}) == len(metas)
        return {meta.filename: (tmp_path / "artifacts" / meta.artifact_id).read_text() for meta in metas}

    def attributes():
        return study.get_trials(deepcopy=False)[trial.number].user_attrs

    return types.SimpleNamespace(
        figures=figures, shown=shown, attributes=attributes, run=run, folder=tmp_path / "artifacts"
    )


def test_the_curve_is_redrawn_in_place_and_taken_up_again(place):
    first = place.figures()
    first.begin(Knobs())
    first.conclude(HISTORY[:2], None)
    early = place.shown()
    assert "best 4.400" in early["curve.svg"]
    assert "floor 1.03" in early["curve.svg"]
    assert ">ml 2.37" in early["curve.svg"]
    second = place.figures()  # the same trial, put back and claimed again
    second.begin(Knobs())
    second.conclude(HISTORY, None)
    assert set(place.shown()) == set(early)
    assert "best 2.900" in place.shown()["curve.svg"]
    assert len(list(place.folder.iterdir())) == len(early)


def test_redrawing_keeps_to_its_share_of_time(place):
    now = [0.0]

    def clock():
        now[0] += 0.05  # each look at the clock takes its time, and so does each redrawing between two looks
        return now[0]

    figures = place.figures(clock=clock)
    drawn = 0
    for step in range(1, 400):
        before = figures._spent
        figures.follow(HISTORY)
        drawn += figures._spent > before
        now[0] += 0.2
        assert figures._spent <= SHARE_OF_TIME * (now[0] - 0.05) + 0.051 or step == 1
    assert 5 < drawn < 60


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_costs_the_figure_and_not_the_trial(place, monkeypatch, caplog, number):
    figures = place.figures()
    figures.begin(Knobs())

    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifacts, "upload_artifact", refuse)
    figures.conclude(HISTORY, None)
    assert set(place.shown()) == {"config.toml"}
    assert os.strerror(number) in caplog.text
    missing = place.attributes()[names.FIGURES_MISSING]
    assert set(missing) == {"curve.svg", "telemetry.jsonl"}
    assert all(os.strerror(number) in line for line in missing.values())


def test_a_figure_that_cannot_be_drawn_costs_itself_and_not_the_trial(place, monkeypatch, caplog):
    def broken(*args):
        raise ZeroDivisionError("no scenes in any bin")

    monkeypatch.setattr(trial_figures, "errors", broken)
    scenes = simulate(SceneSpec(), 3, range(6))
    truth = scenes.require_truth()
    findings = types.SimpleNamespace(scenes=scenes, network=truth, pipeline=truth[:2])
    figures = place.figures()
    figures.begin(Knobs())
    figures.conclude(HISTORY, types.SimpleNamespace(findings=findings))
    assert set(place.shown()) == {"config.toml", "curve.svg", "counts.svg", "scene.svg", "telemetry.jsonl"}
    assert place.attributes()[names.FIGURES_MISSING] == {"errors.svg": "ZeroDivisionError: no scenes in any bin"}
    assert "Traceback" in caplog.text


def test_a_late_owner_is_told(place):
    figures = place.figures()
    figures._study.tell(figures._trial, 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        figures.begin(Knobs())


def test_telemetry_is_thinned_but_no_skipped_step_is_lost(place):
    with Telemetry(place.run) as log:
        for step in range(5000):
            log.write(telemetry.STEP, 64 * step, loss=1.0, taken=step % 1000 != 7)
            if step % 500 == 0:
                log.write(telemetry.VALIDATION, 64 * step, k_loc=3.0)
    events = [json.loads(line) for line in trial_figures.events(place.run).splitlines()]
    steps = [event for event in events if event["event"] == telemetry.STEP]
    assert len(steps) <= MAX_STEPS + 5
    assert sum(not event["taken"] for event in steps) == 5
    assert sum(event["event"] == telemetry.VALIDATION for event in events) == 10


def test_figures_of_findings(tmp_path):
    scenes = simulate(SceneSpec(), 3, range(40))
    truth = scenes.require_truth()
    fewer = truth[:16]
    findings = types.SimpleNamespace(scenes=scenes, network=truth, pipeline=fewer)
    tables = trial_figures.tabulate(findings)
    counts = trial_figures.counts(tables, truth.max_sources)
    assert "network: 100% of 40 counts right" in counts
    assert "pipeline: 100% of 16 counts right" in counts
    for svg in (counts, trial_figures.errors(tables, scenes), trial_figures.scene(findings)):
        ET.fromstring(svg)
        assert "nan" not in svg
    none = types.SimpleNamespace(scenes=scenes, network=truth, pipeline=truth[:0])
    assert set(trial_figures.tabulate(none)) == {"network"}
    ET.fromstring(trial_figures.scene(none))


def test_the_scene_shown_is_the_first_clear_one_with_three_sources():
    scenes = simulate(SceneSpec(), 3, range(200))
    index = trial_figures.chosen_scene(scenes)
    assert scenes.require_truth().num_sources[index] == 3
    assert scenes.snr_db[index] >= 10
    earlier = (scenes.require_truth().num_sources[:index] == 3) & (scenes.snr_db[:index] >= 10)
    assert not earlier.any()


def test_the_spectrum_peaks_at_a_lone_source():
    scenes = simulate(SceneSpec(num_sources=(1, 1), snr_db=(20, 20)), 5, range(1))
    (azimuth, elevation, _), power = trial_figures.spectrum_of(trial_figures._Frozen(scenes))
    row, column, _ = torch.unravel_index(power.argmax(), power.shape)
    truth = scenes.require_truth()
    assert abs(azimuth[row] - truth.azimuth[0, 0]).rad2deg() < 4
    assert abs(elevation[column] - truth.elevation[0, 0]).rad2deg() < 4
    assert (float(power.min()), float(power.max())) == (0, pytest.approx(1))
