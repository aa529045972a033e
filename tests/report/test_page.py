"""The study's page in the dashboard, and the reference beside its scores."""

import optuna
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note

from ris_hpo.physics.scene import simulate
from ris_hpo.report import reference
from ris_hpo.report.collect import collect
from ris_hpo.report.study_page import kept_current, note, write_page
from ris_hpo.scoring.metrics import floor_scores
from ris_hpo.search.files import load_study
from ris_hpo.store import attributes as names
from ris_hpo.store.folders import ARTIFACTS
from tests.report.synthetic import fill, make_study

CANARY = "canary-Pa55word"


def figures(study, folder):
    metas = get_all_artifact_meta(study, storage=study._storage)
    return {meta.filename: (folder / meta.artifact_id).read_text() for meta in metas}


def test_the_note_tells_command_space_floor_best_and_efficiency(tmp_path):
    study = make_study()
    assert write_page(study, study._storage, tmp_path)
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
    shown = figures(study, tmp_path)
    assert set(shown) == {"cost.svg", "paths.svg"}
    for svg in shown.values():
        assert len(svg) < 20_000
        assert f"trial {best.number}<" in svg
    for meta in get_all_artifact_meta(study, storage=study._storage):
        assert f"](/artifacts/{study._study_id}/{meta.artifact_id})" in text


def test_it_is_written_only_when_it_has_news(tmp_path):
    study = make_study()
    assert write_page(study, study._storage, tmp_path)
    before = figures(study, tmp_path)
    assert not write_page(study, study._storage, tmp_path)
    fill(study, trials=5, seed=9)
    assert write_page(study, study._storage, tmp_path)
    after = figures(study, tmp_path)  # redrawn in place
    assert set(after) == set(before)
    assert after["cost.svg"] != before["cost.svg"]


def test_its_figures_are_listed_in_the_studys_folder(tmp_path):
    study = make_study()
    folder = tmp_path / "trials" / "wide"
    for _ in range(2):
        write_page(study, study._storage, tmp_path / "artifacts", folder)
        fill(study, trials=2, seed=3)
    [listing] = folder.glob(f"*/{ARTIFACTS}")  # as the removal of a study looks for them
    assert set(listing.read_text().split()) == {path.name for path in (tmp_path / "artifacts").iterdir()}
    assert len(listing.read_text().split()) == 2


def test_a_full_disk_costs_the_figures_and_not_the_run(tmp_path):
    study = make_study()
    (tmp_path / "file").write_text("")
    assert write_page(study, study._storage, tmp_path / "file" / "artifacts")
    assert "| Floor |" in get_note(study)
    assert "/artifacts/" not in get_note(study)


def test_it_is_kept_current_while_a_pool_runs(tmp_path):
    study = optuna.create_study(study_name="live")

    def snapshots():
        for seed in range(3):
            fill(study, trials=4, seed=seed)
            yield seed
        fill(study, trials=4, seed=3)

    seen = [
        (snapshot, get_note(study))
        for snapshot in kept_current(study, study._storage, snapshots(), tmp_path, every_s=0)
    ]
    assert [number for number, _ in seen] == [0, 1, 2]
    assert len({text for _, text in seen}) == 3
    assert get_note(study).startswith(note(collect(study)))
    assert not seen[-1][1].startswith(note(collect(study)))


def test_an_empty_study_has_a_note_and_values_cannot_break_the_table(tmp_path):
    study = optuna.create_study(study_name="<b>empty</b>")
    study.set_user_attr(names.WINNER, {"verdict": "a | b\nc <script>", "winner": "base", "candidates": []})
    text = note(collect(study))
    assert "a \\| b c &lt;script>" in text
    assert write_page(study, study._storage, tmp_path)
    assert figures(study, tmp_path) == {}


def test_no_password_in_the_note(tmp_path):
    study = make_study()
    study.set_user_attr(names.COMMAND, f"ris-hpo run --storage postgresql://me:{CANARY}@db/x")
    write_page(study, study._storage, tmp_path)
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
