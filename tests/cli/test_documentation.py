"""The documentation is true: its commands are understood, and its tutorial runs the commands of the README's tour."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.test_readme import README, TOUR, commands, understood

ROOT = Path(__file__).parents[2]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))}


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page, text in PAGES.items() for line in commands(text) if "ris-hpo " in line],
)
def test_the_commands_of_every_page_are_understood(page: str, line: str) -> None:
    understood(line)


def test_the_tutorial_runs_the_tour_that_is_tested() -> None:
    assert [line for line in commands(PAGES["docs/tutorial.md"]) if line.startswith("ris-hpo")] == TOUR


def test_every_page_stands_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {page.removeprefix("docs/") for page in PAGES}
    assert listed - {"reference/commands.md", "reference/settings.md"} == written  # those two are made from the code


def test_the_readme_leads_to_the_documentation() -> None:
    assert "docs/tutorial.md" in README
