"""``studies``, ``delete``, ``rename`` and ``log`` on the command line."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from ris_hpo.errors import OutputError, StudyError


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


def test_the_log_of_a_failed_trial_names_its_cause(cli, made_study: str) -> None:
    found = cli("log", 3, "--json").json
    assert (found["state"], found["cause"], found["last_step"], found["traceback"]) == ("fail", "bug", 1000, None)
    shown = cli("log", 3).out
    assert "bug" in shown
    assert "traceback" not in shown
    outcome = cli("log", 9)
    assert outcome.code == StudyError.exit_code
    assert "has no trial 9" in outcome.err
