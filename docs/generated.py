"""Pages of the reference that are written from the code when the site is built: every command and every setting."""

from __future__ import annotations

from typing import Any

import typer
import typer.core
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from ris_hpo.cli import app
from ris_hpo.config import Spec
from ris_hpo.search.spec import StudySpec
from ris_hpo.training.config import RunConfig


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in {"reference/commands.md": commands(), "reference/settings.md": settings()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def commands() -> str:
    """Every command with its options, as ``--help`` has them."""
    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Exit codes: see `ris-hpo --help` and the README.", ""]
    for name in sorted(group.commands):
        command = group.commands[name]
        lines += [f"## ris-hpo {name}", "", plain(command.help or ""), ""]
        if command.epilog:
            lines += ["```console", f"$ {command.epilog.removeprefix('Example: ')}", "```", ""]
        lines += ["| Option | Default | |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            shown = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
            if isinstance(parameter, typer.core.TyperArgument):
                shown = f"`{parameter.name.upper()}`"
            lines.append(f"| {shown} | {default(parameter)} | {cell(parameter.help or '')} |")
        lines.append("")
    return "\n".join(lines)


def settings() -> str:
    """Every setting of a run and of a study file with its default and what it means."""
    lines = ["# Settings", ""]
    for title, spec, note in (
        ("A run", RunConfig(), "Keys of a run configuration, of `[base]` in a study file and of `--set`."),
        ("A study", None, "Tables of a study file. `[base]` and `[space]` take the keys of a run."),
    ):
        lines += [f"## {title}", "", note, "", "| Key | Default | Meaning |", "|---|---|---|"]
        lines += rows(spec) if spec is not None else study_rows()
        lines.append("")
    return "\n".join(lines)


def rows(spec: Spec, prefix: str = "", follows: frozenset[str] = frozenset()) -> list[str]:
    """One row a setting, nested specifications flattened to dotted keys; those that follow others are left out."""
    found = []
    follows |= spec.follows
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if isinstance(value, Spec):
            found += rows(value, f"{prefix}{name}.", follows)
        elif f"{prefix}{name}" not in follows:
            found.append(f"| `{prefix}{name}` | {shown(value)} | {meaning(field)} |")
    return found


def study_rows() -> list[str]:
    """Rows of a study's own tables."""
    found = []
    for name, field in StudySpec.model_fields.items():
        inner = field.default
        if isinstance(inner, Spec):
            found += rows(inner, f"{name}.")
        elif name not in ("base", "space"):
            found.append(
                f"| `study.{name}` | {shown(field.get_default(call_default_factory=True))} | {meaning(field)} |"
            )
    return found


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def meaning(field: FieldInfo) -> str:
    """The description of a field with its bounds."""
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in SIGNS.items()
        if getattr(rule, name, None) is not None
    ]
    return cell("; ".join(part for part in (field.description or "", ", ".join(bounds)) if part))


def default(parameter: Any) -> str:
    """The default of an option as the help shows it."""
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return cell(parameter.show_default)
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


def shown(value: object) -> str:
    """A default value as it stands in TOML."""
    if value is None or "PydanticUndefined" in str(value):
        return ""
    return cell(f"`{str(value).lower() if isinstance(value, bool) else value}`")


def plain(text: str) -> str:
    """Help text without the markup of the terminal."""
    return text.replace("\b", "").strip()


def cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
