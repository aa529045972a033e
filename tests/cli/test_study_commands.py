from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from ris_hpo.errors import ConfigError, SpaceError, StoreError, StudyError


def test_status_is_the_json_that_programs_read(cli, made_study: str) -> None:
    outcome = cli("status", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["study"] == made_study
    assert {"complete": 2, "pruned": 1, "fail": 1, "running": 0, "waiting": 1}.items() <= found["trials"].items()
    assert found["best"]["number"] == 1
    assert found["best"]["k_loc"] == 1.75
    assert found["best"]["floor"] == 1.0
    assert found["best"]["efficiency"] == pytest.approx(0.875)


def test_status_for_people_names_the_best_beside_its_floor(cli, made_study: str) -> None:
    outcome = cli("status", "--study", made_study)
    assert "2 complete, 1 pruned, 1 fail, 1 waiting" in outcome.out
    assert "trial 1: k_loc 1.750 | floor 1.000 | efficiency 88%" in outcome.out


def test_best_as_searched_trains_nothing(cli, made_study: str) -> None:
    found = cli("best", "--no-confirm", "--json").json
    assert found["best"]["number"] == 1
    assert found["winner"] is None
    assert "next: ris-hpo export --study made" in cli("best", "--no-confirm").err


def test_report_is_one_page_or_json(cli, made_study: str, tmp_path: Path) -> None:
    outcome = cli("report", "--study", made_study, "--out", "report.html")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert "Trial 1 scores k_loc 1.750" in outcome.out
    assert cli("report", "--json").json["best"]["number"] == 1


def test_a_dashboard_of_no_store_is_refused_and_makes_none(cli, tmp_path: Path) -> None:
    outcome = cli("dashboard", "--port", "0")
    assert outcome.code == StoreError.exit_code
    assert "no such store" in outcome.err
    assert list(tmp_path.rglob("*.db")) == []


def test_a_study_that_is_not_there_is_named_with_a_suggestion(cli, made_study: str) -> None:
    for command in (["status"], ["report"], ["best", "--no-confirm"]):
        outcome = cli(*command, "--study", "mode")
        assert outcome.code == StudyError.exit_code
        assert "did you mean 'made'?" in outcome.err


def test_without_a_store_nothing_is_made(cli, tmp_path: Path) -> None:
    for command in ("status", "report", "best", "worker"):
        outcome = cli(command)
        assert outcome.code == StoreError.exit_code
        assert "no such store" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_says_how_to_start(cli) -> None:
    from ris_hpo.store.open import open_store

    open_store().close()
    outcome = cli("status")
    assert outcome.code == StudyError.exit_code
    assert "ris-hpo run" in outcome.err


def test_several_studies_need_a_choice(cli, made_study: str) -> None:
    from ris_hpo.search.dimension import Dimension
    from ris_hpo.search.lifecycle import create_or_resume_study
    from ris_hpo.search.spec import StudySpec
    from ris_hpo.store.open import open_store

    store = open_store()
    create_or_resume_study(store, StudySpec(name="other", space={"a": Dimension(low=0, high=1)}), score_version=1)
    store.close()
    outcome = cli("status")
    assert outcome.code == StudyError.exit_code
    assert "made, other; choose one with --study" in outcome.err


@pytest.mark.parametrize(
    "address",
    [
        "mysql://user:secret-canary@host/db",
        "postgresql://user:secret-canary@127.0.0.1:9/db",
        "sqlite:////dev/null/studies.db",
        "sqlite://",
        "http//nonsense://",
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_without_its_password(cli, address: str) -> None:
    outcome = cli("status", "--storage", address)
    assert outcome.code == StoreError.exit_code
    assert outcome.err.count("\n") == 1
    assert "secret-canary" not in outcome.err + outcome.out


def test_a_file_that_is_no_store_is_refused(cli, tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, but long enough to look like one " * 40)
    outcome = cli("status", "--storage", f"sqlite:///{tmp_path}/notes.db")
    assert outcome.code == StoreError.exit_code
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (None, ConfigError, "no such file"),
        ("[study\n", ConfigError, "not valid TOML"),
        ("[space]\n'optimizer.learning_rate' = { low = 1, high = 0 }\n", SpaceError, "not below high"),
        ("[spce]\n", SpaceError, "did you mean 'space'?"),
        ("[study]\nsed = 1\n", SpaceError, "did you mean 'seed'?"),
    ],
)
@pytest.mark.parametrize("command", [["spaces"], ["run", "--n-trials", "1", "--space"]])
def test_a_study_file_that_cannot_be_used(
    cli, tmp_path: Path, command: list[str], text: str | None, error: type[ConfigError], said: str
) -> None:
    if text is not None:
        (tmp_path / "mine.toml").write_text(text)
    outcome = cli(*command, "mine.toml")
    assert outcome.code == error.exit_code
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "storage").exists()


def test_an_unknown_space_is_named(cli, tmp_path: Path) -> None:
    outcome = cli("run", "--space", "wied")
    assert outcome.code == SpaceError.exit_code
    assert "unknown space 'wied'; did you mean 'wide'?" in outcome.err
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    "wrong", [["--n-trials", "-3"], ["--n-trials", "0"], ["--workers", "0"], ["--engine", "slurm"]]
)
def test_wrong_numbers_are_wrong_usage(cli, wrong: list[str], tmp_path: Path) -> None:
    outcome = cli("run", "--space", "smoke", *wrong)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "storage").exists()


def test_the_dashboard_serves_until_it_is_told_to_stop(made_study: str, tmp_path: Path) -> None:
    environment = {**os.environ, "RIS_HPO_DASHBOARD_TOKEN": "a-token-for-the-tests"}
    command = [sys.executable, "-m", "ris_hpo", "dashboard", "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            text = ""
            while not text.rstrip().endswith("}"):
                line = server.stdout.readline()
                assert line, server.stderr.read()
                text += line
            found = json.loads(text)
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/studies", found["url"])
            bearer = {"Authorization": "Bearer a-token-for-the-tests"}
            with urllib.request.urlopen(urllib.request.Request(found["url"], headers=bearer), timeout=10) as reply:
                assert reply.status == 200
            assert "read-only" in server.stderr.readline()
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=90) == 0
        finally:
            server.kill()


def test_spaces_lists_the_studies_and_shows_one(cli) -> None:
    listed = cli("spaces")
    assert {"wide", "narrow", "smoke"} <= {line.split()[0] for line in listed.out.splitlines() if line}
    shown = cli("spaces", "wide")
    assert "optimizer.learning_rate" in shown.out
    assert "(log)" in shown.out
    found = cli("spaces", "wide", "--json").json
    assert found["space_fingerprint"]
    assert len(found["space"]) > 20
    assert set(cli("spaces", "--json").json) >= {"wide", "narrow", "smoke"}


def test_doctor_says_what_it_found_and_makes_nothing(cli, tmp_path: Path) -> None:
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.out
    for what in ("python", "torch", "store", "disk"):
        assert what in outcome.out
    assert {finding["severity"] for finding in cli("doctor", "--json").json} <= {"ok", "note"}
    assert list(tmp_path.iterdir()) == []


def test_doctor_ends_with_an_error_where_there_is_a_problem(cli) -> None:
    outcome = cli("doctor", "--storage", "postgresql://user:secret-canary@127.0.0.1:9/db")
    assert outcome.code == 1
    assert "problem" in outcome.out
    assert "secret-canary" not in outcome.out + outcome.err
