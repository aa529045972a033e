"""The command line: thin, and the only place that prints or sets up logging.

Results go to stdout, everything else to stderr; ``--json`` leaves JSON alone on stdout. An error caused by the input,
the disk or the network prints one line and exits with the code of its class (``ris_hpo/errors.py``); wrong usage exits
with 2, Ctrl-C with 130. Modules that import torch or optuna are imported inside the commands: ``--help`` is instant.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from ris_hpo.cli import bound, check, display, model, options, run, store, study, trials, upkeep
from ris_hpo.errors import OutputError, RisHpoError

_CANNOT_WRITE = {errno.EDQUOT, errno.ENOSPC, errno.EROFS}
_NO_ACCESS = {errno.EACCES, errno.EPERM}
_NO_PATH = {errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}

app = typer.Typer(
    name="ris-hpo",
    help="Train, search and certify networks that localise near-field sources through a reconfigurable surface.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ris-hpo {version('ris-hpo')}")
        raise typer.Exit


@app.callback(epilog="Example: ris-hpo run --space smoke --n-trials 4")
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log informational messages as well.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Settings before the command; not a command itself."""
    display.set_up_logging(logging.INFO if verbose else logging.WARNING)


run.register(app)
study.register(app)
store.register(app)
upkeep.register(app)
trials.register(app)
model.register(app)
bound.register(app)
check.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    OpenMP threads spin while they wait for each other unless told to sleep; on a machine whose cores are busy, spinning
    makes every command several times slower. libgomp reads the variable when torch is loaded, hence here.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(execute(sys.argv[1:] if arguments is None else arguments))


def execute(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    try:
        code = command.main(list(arguments), prog_name="ris-hpo", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TyperException as error:  # wrong usage
        message = error.format_message()
        if message:
            display.print_error(message)
        return error.exit_code
    except RisHpoError as error:
        display.print_error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):  # the latter at a question
        return options.INTERRUPTED
    except OSError as error:
        if error.errno in _NO_PATH:
            display.print_error(f"{error.filename}: not a usable path ({error.strerror})")
            return options.UsageError.exit_code
        if error.errno not in _CANNOT_WRITE | _NO_ACCESS:
            raise
        what = "cannot be written" if error.errno in _CANNOT_WRITE else "cannot be read or written"
        display.print_error(f"{error.filename or 'output'}: {what} ({error.strerror})")
        return OutputError.exit_code
