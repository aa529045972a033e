"""Options that several commands share, and how their values are read and checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.exceptions import TyperException

from ris_hpo.config import toml_value
from ris_hpo.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from ris_hpo.config import Spec

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as in shells."""

PLOT_SUFFIXES = {".png", ".svg", ".pdf"}

S = TypeVar("S", bound="Spec")
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option(help="Seed of the scenes; the same seed gives the same scenes.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, its value as in TOML; may be repeated."),
]
Surface = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Surface, region and base station: default, sub6-16x16, mmwave-32x32, linear-64, or a TOML file.",
        show_default="the configuration's",
    ),
]


PANEL = "Studies"
"""Heading of the commands around studies in the help."""

StudyName = Annotated[
    str | None,
    typer.Option("--study", help="Name of the study.", show_default="the only one in the store"),
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Trial store: sqlite:///FILE or postgresql://USER@HOST/DATABASE.",
        show_default="SQLite under storage/",
    ),
]


DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


class UsageError(TyperException):
    """Options that exclude each other, or a value of the wrong type."""

    exit_code = 2


def changes(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; a value is TOML, or a plain word.

    Raises:
        ConfigError: a pair without ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {pair}: expected KEY=VALUE, for example --set num_snapshots=64")
        found[key.strip()] = toml_value(text)
    return found


def changed(spec: S, pairs: Sequence[str] | None) -> S:
    """Return the specification with ``--set`` applied."""
    wanted = changes(pairs)
    return spec.replaced(wanted) if wanted else spec


def with_surface(spec: S, surface: str | None, prefix: str = "scene.") -> S:
    """Return the specification with ``--surface`` applied.

    Raises:
        ConfigError: an unknown or incomplete surface.
    """
    from ris_hpo.physics.surfaces import surface_changes

    return spec if surface is None else spec.replaced(surface_changes(surface, prefix))


def numbers(option: str, text: str, kind: Callable[[str], float]) -> list[float]:
    """Read a list such as ``0,5,10``.

    Raises:
        UsageError: anything else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers with commas between them") from None


def check_output(path: Path, *, suffix: str | Collection[str] | None = None) -> Path:
    """Return the path of a file to write, checked before any long work.

    Raises:
        OutputError: the path is a folder, its parent is missing, or it has another suffix.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, expected a file name")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    endings = [suffix] if isinstance(suffix, str) else sorted(suffix or ())
    if endings and path.suffix not in endings:
        raise OutputError(f"{path}: expected a name that ends in {' or '.join(endings)}")
    return path


def check_folder(path: Path) -> Path:
    """Return the path of a folder to write into, checked before any long work; it need not exist yet.

    Raises:
        OutputError: the path, or one above it, is a file.
    """
    for each in (path, *path.parents):
        if each.exists():
            if not each.is_dir():
                raise OutputError(f"{path}: {each} is a file, expected a folder")
            break
    return path
