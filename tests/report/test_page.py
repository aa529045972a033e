"""The study's page in the dashboard, and the reference beside its scores."""

import json

import optuna
from optuna_dashboard import get_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from ris_hpo.physics.scene import simulate
from ris_hpo.report import reference
from ris_hpo.report.collect import collect
from ris_hpo.report.study_page import kept_current, note, write_page
from ris_hpo.scoring.metrics import floor_scores
from ris_hpo.search.files import load_study
from ris_hpo.store import attributes as names
from tests.report.synthetic import fill, make_study

CANARY = "canary-Pa55word"


def graphs(study):
    return get_plotly_graph_objects(study._storage.get_study_system_attrs(study._study_id))


def test_the_note_tells_command_space_floor_best_and_efficiency():
    study = make_study()
    assert write_page(study, study._storage)
    text = get_note(study)
    best = collect(study).best
    for piece in (
        "ris-hpo run --space wide --n-trials 60",
        f"trial {best.number}: **{best.value:.3f}** on the network path",
        "| Floor | 1.030; the best covers",
        "| Base configuration | 2.048 (trial 0) |",
        "| ml reference | 2.370 |",
        "| optimizer.learning_rate | 1e-05 to 0.01, log |",
        "| network.front_end | spectra, tokens | spectra |",
    ):
        assert piece in text
    assert set(graphs(study)) == {"score-against-cost", "pipeline-against-network"}
    for figure in graphs(study).values():
        assert len(figure) < 20_000
        assert json.loads(figure)["data"][0]["type"] == "scatter"


def test_it_is_written_only_when_it_has_news():
    study = make_study()
    assert write_page(study, study._storage)
    assert not write_page(study, study._storage)
    fill(study, trials=5, seed=9)
    assert write_page(study, study._storage)


def test_it_is_kept_current_while_a_pool_runs():
    study = optuna.create_study(study_name="live")

    def snapshots():
        for seed in range(3):
            fill(study, trials=4, seed=seed)
            yield seed
        fill(study, trials=4, seed=3)

    seen = [(snapshot, get_note(study)) for snapshot in kept_current(study, study._storage, snapshots(), every_s=0)]
    assert [number for number, _ in seen] == [0, 1, 2]
    assert len({text for _, text in seen}) == 3
    assert get_note(study) == note(collect(study)) != seen[-1][1]


def test_an_empty_study_has_a_note_and_values_cannot_break_the_table():
    study = optuna.create_study(study_name="<b>empty</b>")
    study.set_user_attr(names.WINNER, {"verdict": "a | b\nc <script>", "winner": "base", "candidates": []})
    text = note(collect(study))
    assert "a \\| b c &lt;script>" in text
    assert write_page(study, study._storage)
    assert graphs(study) == {}


def test_no_password_in_the_note():
    study = make_study()
    study.set_user_attr(names.COMMAND, f"ris-hpo run --storage postgresql://me:{CANARY}@db/x")
    write_page(study, study._storage)
    assert CANARY not in str(study._storage.get_study_system_attrs(study._study_id))


def test_the_reference_is_measured_once_on_the_frozen_scenes(tmp_path):
    spec = load_study("smoke").with_base({"budget.pipeline_scenes": 2})
    config = spec.config({})
    study = optuna.create_study()
    steps = []
    found = reference.attach(study, spec, tmp_path, progress=lambda done, total: steps.append((done, total)))
    count = config.budget.pipeline_scenes
    assert found.scenes == found.ml.num_scenes == count
    assert steps[-1] == (count, count)
    assert found.floor == floor_scores(simulate(config.scene, config.budget.validation_seed, range(count)))
    assert found.ml.k_loc < 7
    assert study.user_attrs[names.REFERENCE]["ml"]["k_loc"] == found.ml.k_loc
    steps.clear()
    assert reference.attach(optuna.create_study(), spec, tmp_path, progress=lambda *_: steps.append(1)) == found
    assert reference.attach(study, spec, tmp_path / "elsewhere") == found
    assert steps == []
    other = spec.with_base({"budget.validation_seed": 5})
    assert reference.attach(optuna.create_study(), other, tmp_path) != found
