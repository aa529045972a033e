"""Commands that look after studies and trials, and the page that explains them."""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from ris_hpo.cli.display import write_parquet
from ris_hpo.errors import ArchiveError, ConfigError, OutputError, SpaceError, StudyError
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner, this_process

from .test_readme import ROOT, commands


def test_studies_are_listed_for_people_and_programs(cli, made_study: str) -> None:
    (entry,) = cli("studies", "--json").json
    assert (entry["study"], entry["state"], entry["best"], entry["metric"]) == (made_study, "waiting", 1.75, "k_loc")
    assert "k_loc 1.750" in cli("studies").out


def test_nothing_is_removed_unasked(cli, made_study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = cli("delete", made_study, "--dry-run")
    assert outcome.code == 0
    assert outcome.out.startswith("would be removed: study 'made'")
    outcome = cli("delete", made_study)
    assert outcome.code == StudyError.exit_code
    assert "--yes" in outcome.err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert cli("delete", made_study).code == 1
    assert len(cli("studies", "--json").json) == 1
    monkeypatch.setattr("typer.confirm", lambda *_, **__: True)
    assert cli("delete", made_study).code == 0
    assert cli("studies", "--json").json == []


def test_yes_removes_without_a_question(cli, made_study: str) -> None:
    assert cli("delete", made_study, "--yes").out.startswith("removed: study 'made'")
    assert cli("delete", made_study, "--yes").code == StudyError.exit_code


def test_a_study_is_renamed(cli, made_study: str) -> None:
    assert cli("rename", made_study, "new", "--dry-run").code == 0
    assert cli("status", "--study", made_study).code == 0
    assert cli("rename", made_study, "new").code == 0
    assert cli("status", "--json").json["study"] == "new"


def test_trials_are_a_table_a_file_and_records(cli, made_study: str, tmp_path: Path) -> None:
    rows = cli("trials", "--json").json
    assert [(row["number"], row["state"], row["k_loc"]) for row in rows] == [
        (0, "complete", 2.5), (1, "complete", 1.75), (2, "pruned", 4.0), (3, "fail", 5.0),
    ]  # fmt: skip
    assert [row["optimizer.learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert "learning_rate" in cli("trials").out
    assert cli("trials", "--csv", "trials.csv").code == 0
    with (tmp_path / "trials.csv").open() as stream:
        read = list(csv.DictReader(stream))
    assert [float(row["k_loc"]) for row in read] == [2.5, 1.75, 4.0, 5.0]
    assert cli("trials", "--csv", "trials.txt").code == OutputError.exit_code
    assert cli("trials", "--csv", "trials.csv", "--parquet", "trials.parquet").code == 2
    assert cli("trials", "--parquet", "trials.parquet").code == 0
    table = parquet.read_table(tmp_path / "trials.parquet")
    assert table["k_loc"].to_pylist() == [2.5, 1.75, 4.0, 5.0]
    assert table["state"].to_pylist() == ["complete", "complete", "pruned", "fail"]


def test_a_refused_copy_makes_no_store(cli, made_study: str, tmp_path: Path) -> None:
    store = open_store()
    store.claim(store.get_study_id_from_name(made_study), str(Owner(this_process(), 0)))
    store.close()
    before = {path.name for path in tmp_path.iterdir()}
    refused = cli("copy", made_study, "--to", "other.db")
    assert (refused.code, "is running" in refused.err) == (StudyError.exit_code, True)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_values_of_several_types_are_text_in_a_parquet_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"mixed": 1, "flag": True}, {"mixed": "a", "flag": None}])
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [
        {"mixed": "1", "flag": True}, {"mixed": "a", "flag": None},
    ]  # fmt: skip


def test_the_log_of_a_failed_trial_names_its_cause(cli, made_study: str) -> None:
    found = cli("log", 3, "--json").json
    assert (found["state"], found["cause"], found["last_step"], found["traceback"]) == ("fail", "bug", 1000, None)
    shown = cli("log", 3).out
    assert "bug" in shown
    assert "traceback" not in shown
    outcome = cli("log", 9)
    assert outcome.code == StudyError.exit_code
    assert "has no trial 9" in outcome.err


def test_configurations_are_queued_from_options_and_files(cli, made_study: str, tmp_path: Path) -> None:
    outcome = cli("enqueue", "--set", "optimizer.learning_rate=0.005", "--dry-run")
    assert (outcome.code, outcome.out) == (0, "would be queued: optimizer.learning_rate=0.005\n")
    assert cli("enqueue", "--set", "optimizer.learning_rate=0.005", "--json").json == {
        "study": made_study, "queued": [{"optimizer.learning_rate": 0.005}], "trials": [4], "repeated": [],
        "n_trials": 5, "dry_run": False,
    }  # fmt: skip
    (tmp_path / "own.csv").write_text("optimizer.learning_rate\n0.005\n0.001\n0.007\n")
    outcome = cli("enqueue", "own.csv")
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == ["queued", "left out", "left out"]
    assert "6 trials; trials 5 run them" in outcome.err
    assert cli("enqueue").code == cli("enqueue", "own.csv", "--set", "seed=1").code == 2
    assert cli("enqueue", "none.csv").code == ConfigError.exit_code
    outcome = cli("enqueue", "--set", "optimizer.learning_rate=5")
    assert outcome.code == SpaceError.exit_code
    assert "outside its range" in outcome.err


def test_failed_trials_are_queued_again(cli, made_study: str) -> None:
    assert cli("retry").code == 2
    assert "would run again" in cli("retry", 3, "--dry-run").out
    assert cli("retry", "--all", "--json").json["retried"] == [{"number": 3, "cause": "bug", "last_step": 1000}]
    assert cli("retry", "--cause", "bug").out == "no failed trial is among these\n"
    counts = cli("status", "--json").json["trials"]
    assert (counts["fail"], counts["retried"], counts["waiting"]) == (0, 1, 2)


def test_a_trial_is_invalidated_and_back(cli, made_study: str) -> None:
    assert cli("invalidate", 1).code == cli("invalidate", 1, "--undo", "--reason", "x").code == 2
    assert cli("invalidate", 1, "--reason", "wrong [file]", "--dry-run").out.startswith("would be invalidated: trial 1")
    assert cli("invalidate", 1, "--reason", "wrong [file]").code == 0
    stands = cli("status", "--json").json
    assert (stands["best"]["number"], stands["trials"]["invalidated"]) == (0, 1)
    assert stands["invalidated"][0]["k_loc"] == 1.75
    assert "wrong [file]" in cli("status").out
    row = cli("trials", "--json").json[1]
    assert (row["state"], row["cause"], row["error"]) == ("invalidated", "invalidated", "wrong [file]")
    found = cli("log", 1, "--json").json
    assert (found["state"], found["scored"]) == ("invalidated", 1.75)
    assert cli("export", "--trial", 1, "--out", "best.toml").code == StudyError.exit_code
    assert cli("invalidate", 1, "--undo").code == 0
    assert cli("status", "--json").json["best"]["number"] == 1


def test_a_study_is_packed_restored_and_copied(cli, made_study: str, tmp_path: Path) -> None:
    outcome = cli("archive", made_study, "--out", "made.zip", "--dry-run", "--json")
    assert outcome.json == {"study": made_study, "trials": 5, "files": 0, "bytes": 0, "dry_run": True}
    assert cli("archive", made_study, "--out", "made.tar").code == OutputError.exit_code
    outcome = cli("archive", made_study, "--out", "made.zip", "--delete")
    assert outcome.code == StudyError.exit_code
    assert "--yes" in outcome.err
    assert not (tmp_path / "made.zip").exists()
    before = cli("trials", "--json").json
    outcome = cli("archive", made_study, "--out", "made.zip", "--delete", "--yes")
    assert outcome.out == "written to made.zip and removed: study 'made', 5 trials, 0 files, 0 B\n"
    assert cli("studies", "--json").json == []
    assert cli("restore", "made.zip", "--dry-run").code == 0
    assert cli("studies", "--json").json == []
    assert cli("restore", "made.zip").code == 0
    assert cli("trials", "--json").json == before
    outcome = cli("restore", "made.zip")
    assert outcome.code == StudyError.exit_code
    assert "--name NEW" in outcome.err
    assert cli("copy", made_study, "--to", "other.db", "--name", "twin").code == 0
    assert cli("trials", "--study", "twin", "--storage", "other.db", "--json").json == before
    (tmp_path / "made.zip").write_bytes((tmp_path / "made.zip").read_bytes()[:-9])
    outcome = cli("restore", "made.zip", "--name", "third")
    assert (outcome.code, outcome.err.count("\n")) == (ArchiveError.exit_code, 1)


def test_files_that_nobody_needs_are_removed(cli, made_study: str, tmp_path: Path) -> None:
    left = tmp_path / "storage" / "trials" / ".removed-old-1"
    left.mkdir(parents=True)
    (left / "last.bin").write_bytes(bytes(10))
    assert [row["bytes"] for row in cli("clean", "--dry-run", "--json").json["removed"]] == [10]
    outcome = cli("clean")
    assert outcome.code == StudyError.exit_code
    assert "--yes" in outcome.err
    assert left.exists()
    assert cli("clean", "--yes").out.endswith("removed: 1 files and folders, 10 B\n")
    assert not left.exists()
    assert cli("clean", made_study, "--checkpoints", "none").out == "removed: 0 files and folders, 0 B\n"
    assert cli("clean", "maid").code == StudyError.exit_code


def test_two_studies_are_compared(cli, made_study: str, tmp_path: Path) -> None:
    cli("copy", made_study, "--to", "other.db", "--name", "twin")
    both = (made_study, "twin", "--other-storage", "other.db", "--as-searched")
    found = cli("compare", *both, "--out", "comparison.html", "--json").json
    assert (found["first"]["score"], found["second"]["score"], found["better"]) == (1.75, 1.75, None)
    assert "Nothing was trained again" in (tmp_path / "comparison.html").read_text()
    assert "As searched" in cli("compare", *both).out
    assert cli("compare", *both, "--out", "comparison.txt").code == OutputError.exit_code
    assert cli("compare", made_study, "maid").code == StudyError.exit_code


def test_a_study_is_followed_to_its_end(cli, made_study: str, tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/storage/studies.db")
    store.withdraw(store.get_study_id_from_name(made_study), [4])
    store.close()
    outcome = cli("top")
    assert "4 of 4 trials" in outcome.err
    assert "trial 1: k_loc 1.750" in outcome.out


def test_the_commands_of_the_page_run_as_printed(cli, made_study: str, tmp_path: Path) -> None:
    cli("rename", made_study, "wide")
    (tmp_path / "configurations.csv").write_text("optimizer.learning_rate\n0.002\n")
    for line in commands((ROOT / "docs" / "how-to" / "studies.md").read_text()):
        words = shlex.split(line)
        assert words[0] == "ris-hpo"
        if "postgresql://ris_hpo@db/ris_hpo" in words:
            words[words.index("postgresql://ris_hpo@db/ris_hpo")] = "sqlite:///server.db"
        outcome = cli(*words[1:])
        assert outcome.code == 0, f"{line}\n{outcome.err}"
