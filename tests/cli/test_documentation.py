"""The documentation is true: each command in it is run by a test, or is understood and has a reason not to be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.test_readme import README, TOUR, commands, understood

ROOT = Path(__file__).parents[2]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))}
ELSEWHERE = commands(PAGES["docs/how-to/own-trainer.md"])
"""What tests/programs/test_examples.py runs."""
UPKEEP = commands(PAGES["docs/how-to/studies.md"])
"""What tests/cli/test_upkeep.py runs."""
NOT_RUN = {
    r"make (run|test)$": "takes minutes; tests/cli/test_readme.py reads the recipe",
    r"\. \.venv/bin/activate$": "the tests run in the environment",
    r"ris-hpo dashboard": "serves until it is stopped; tests/dashboard starts it",
    r"ris-hpo worker|.*--engine ray|export RIS_HPO_STORAGE_URL": "needs a server; tests/service has one of its own",
    r"export RIS_HPO_DASHBOARD_TOKEN": "tests/dashboard sets both tokens",
    r"sbatch |pg_dump |pg_restore |tensorboard ": "a tool of its own",
    r"ris-hpo run --space wide": "a real search takes hours; tests/cli/test_run.py runs a small one",
    r".*--notify |.*--tensorboard ": "tests/api/test_study.py runs both",
    r".*--device cuda": "needs a GPU",
    r"ris-hpo (simulate|run) .*--surface|ris-hpo .*mine\.toml|.*--surface ": "tests/physics and tests/cli run surfaces",
    r"ris-hpo top": "follows a study; tests/cli/test_upkeep.py follows one that has ended",
    r"ris-hpo backup": "tests/store/test_opening.py runs it",
}
"""What is not run as printed, and why; a pattern from the start of the line."""
LINES = [(page, line) for page, text in {"README.md": README, **PAGES}.items() for line in commands(text)]


@pytest.mark.parametrize(("page", "line"), [each for each in LINES if "ris-hpo " in each[1]])
def test_the_commands_of_every_page_are_understood(page: str, line: str) -> None:
    understood(line)


def test_each_command_is_run_or_has_a_reason_not_to_be() -> None:
    rest = [line for _, line in LINES if line not in (*TOUR, *ELSEWHERE, *UPKEEP)]
    unexplained = [line for line in rest if not any(re.match(pattern, line) for pattern in NOT_RUN)]
    assert unexplained == []
    unused = [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in rest)]
    assert unused == []


def test_every_page_stands_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {page.removeprefix("docs/") for page in PAGES}
    assert listed - {"reference/commands.md", "reference/settings.md"} == written  # those two are made from the code


def test_the_readme_leads_to_the_documentation() -> None:
    pages = set(re.findall(r"\]\((docs/[\w/-]+\.\w+)", README))
    assert {"docs/tutorial.md", "docs/notebook.ipynb", "docs/how-to/own-trainer.md"} <= pages
    assert len(pages) > 12
