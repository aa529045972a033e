"""What every command has in common: help, examples, speed, one-line errors."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys

import pytest
import typer

from ris_hpo.cli import app, execute, main
from ris_hpo.errors import OutputError, RisHpoError

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)  # type: ignore[attr-defined]


def example_of(name: str) -> str:
    """The example at the end of a command's help."""
    return GROUP.commands[name].epilog.removeprefix("Example: ")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_what_it_does_and_ends_with_an_example(cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    outcome = cli(name, "--help")
    assert outcome.code == 0
    assert example_of(name).startswith(f"ris-hpo {name}")
    assert example_of(name) in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_understood(name: str) -> None:
    command = GROUP.commands[name]  # type: ignore[attr-defined]
    words = shlex.split(example_of(name))
    command.make_context(name, words[2:])  # refuses unknown options and values out of bounds


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name: str) -> None:
    for parameter in GROUP.commands[name].params:  # type: ignore[attr-defined]
        assert parameter.help, f"{name} {parameter.name}"


def test_help_is_quick_because_torch_and_optuna_wait() -> None:
    code = "import sys; from ris_hpo.cli import execute; execute(['--help']); "
    code += "print(sorted({'torch', 'optuna', 'matplotlib', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_threads_of_every_command_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libgomp reports it; on a busy machine, threads that spin make a command ten times slower."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    code = "from ris_hpo.cli import main; main(['localize', 'missing.npz', '--out', 'e.npz'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "no such file" in done.stderr
    spins = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert set(spins) == {"0"}


def test_a_wait_policy_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_wrong_usage_is_one_line_and_code_2(cli) -> None:
    for arguments in (
        ["simulat"], ["simulate"], ["simulate", "--num-scenes", "-1", "--out", "s.npz"], ["--nonsense"],
        ["status", "\udcff"], ["status", "\x1b[31m"],
    ):  # fmt: skip
        outcome = cli(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert outcome.err.strip().isprintable()


def test_every_error_has_an_exit_code_of_its_own() -> None:
    classes = [RisHpoError]
    for each in classes:
        classes.extend(each.__subclasses__())
    classes = [each for each in classes if each.__module__ == "ris_hpo.errors"]
    codes = [each.exit_code for each in classes]
    assert len(set(codes)) == len(codes)
    assert not set(codes) & {0, 2, 130}
    assert all(each.__doc__ for each in classes)


def test_version(cli) -> None:
    assert cli("--version").out.startswith("ris-hpo ")


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ris_hpo.cli import options

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(options, "check_output", broken)
    with pytest.raises(ZeroDivisionError):
        execute(["simulate", "--out", "s.npz"])


def test_a_full_disk_is_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from ris_hpo.cli import options

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "s.npz")

    monkeypatch.setattr(options, "check_output", full)
    outcome = cli("simulate", "--out", "s.npz")
    assert outcome.code == OutputError.exit_code
    assert outcome.err == "error: s.npz: cannot be written (No space left on device)\n"


def test_ctrl_c_is_code_130_without_a_traceback(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from ris_hpo.cli import options

    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "check_output", pressed)
    assert cli("simulate", "--out", "s.npz").code == options.INTERRUPTED
