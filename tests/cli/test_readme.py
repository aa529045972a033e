"""The README and the tutorial are true: the tour runs as printed, the two commands are there, the program runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from ris_hpo.cli import app
from ris_hpo.physics.files import load_estimates

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def commands(text: str) -> list[str]:
    """Every command line of the console blocks, without prompt and comment."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.sub(r"\s{2,}#.*", "", line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


def section(heading: str) -> str:
    return README.partition(heading)[2].partition("\n## ")[0]


TOUR = [line for line in commands(TUTORIAL) if line.startswith("ris-hpo")]


def understood(line: str) -> None:
    """Refuses unknown commands and options, and values out of bounds."""
    wrapped = re.search(r'--wrap "exec (.*)"', line)
    words = shlex.split(wrapped.group(1) if wrapped else line)
    words = words[words.index("ris-hpo") + 1 :]
    group = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]


@pytest.mark.system
def test_the_tour_runs_as_printed(cli, tmp_path: Path) -> None:
    assert 8 <= len(TOUR) <= 12
    for line in TOUR:
        words = shlex.split(line)
        assert words[0] == "ris-hpo"
        outcome = cli(*words[1:])
        assert outcome.code == 0, f"{line}\n{outcome.err}"
    assert len(load_estimates(tmp_path / "estimates.npz")) == 40
    assert (tmp_path / "report.html").stat().st_size > 10_000
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"storage", "runs", "report.html", "best.toml", "scenes.npz", "estimates.npz"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["run", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target: str) -> None:
    assert f"make {target}" in commands(section("## Two commands"))
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    recipe = done.stdout.splitlines()[-1]
    if target == "run":
        assert "run --space wide --n-trials 8" in recipe
        understood(recipe.replace(".venv/bin/", ""))
    else:
        assert ".venv/bin/python -m pytest -n logical" in recipe


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "reference" / "python.md"
    program = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert program
    text = program.group(1).replace("range(20)", "range(2)")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
    assert "k_loc" in capsys.readouterr().out


def test_the_public_names_are_there_and_few() -> None:
    import ris_hpo

    assert 5 <= len(ris_hpo.__all__) <= 15
    for name in ris_hpo.__all__:
        assert ris_hpo.__getattr__(name).__doc__
    with pytest.raises(AttributeError):
        ris_hpo.__getattr__("nonsense")


def test_the_readme_is_one_page_with_one_picture() -> None:
    assert len(README.splitlines()) <= 80
    assert len(re.findall(r"!\[", README)) == 1
