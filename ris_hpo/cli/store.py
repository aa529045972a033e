"""The commands about the store: watch it, copy it, check it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ris_hpo.cli import display, options
from ris_hpo.cli.options import PANEL, Storage


def dashboard(
    storage: Storage = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback use a proxy with TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    token: Annotated[
        str | None,
        typer.Option(
            help="What a visitor must show; better in RIS_HPO_DASHBOARD_TOKEN.", show_default="made and printed"
        ),
    ] = None,
    editor_token: Annotated[
        str | None,
        typer.Option(
            help="A second token, for those who may change studies; better in RIS_HPO_DASHBOARD_EDITOR_TOKEN.",
            show_default="none",
        ),
    ] = None,
    read_write: Annotated[
        bool, typer.Option("--read-write", help="Everybody may rename, delete and write notes.")
    ] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further host name a visitor may use.")] = None,
    prefix: Annotated[
        str, typer.Option(metavar="PATH", help="Path below which a proxy shows the dashboard, as /team/hpo.")
    ] = "",
    trusted_proxy: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="IP address of a proxy whose X-Forwarded-For and X-Forwarded-Proto are believed.",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Watch studies in the browser, on this machine alone unless told otherwise."""
    from ris_hpo.dashboard.access import make_token
    from ris_hpo.dashboard.server import EDITOR_TOKEN_VARIABLE, TOKEN_VARIABLE, Dashboard
    from ris_hpo.process import storage_directory
    from ris_hpo.store.open import open_store

    secret = token or os.environ.get(TOKEN_VARIABLE) or make_token()
    editors = editor_token or os.environ.get(EDITOR_TOKEN_VARIABLE) or None
    store = open_store(storage, create=False, write=read_write or editors is not None)
    server = Dashboard(
        store,
        storage_directory() / "artifacts",
        token=secret,
        editor_token=editors,
        host=host,
        port=port,
        read_write=read_write,
        allowed_hosts=allow_host or (),
        prefix=prefix,
        trusted_proxy=trusted_proxy,
    )
    with server:
        if json_:
            display.print_json({"url": server.url, "login_url": server.login_url})
        else:
            display.print_result(server.login_url)
        form = "may be changed" if read_write else "read-only" if editors is None else "may be changed by editors"
        display.print_note(f"serving {store.redacted}, {form}; Ctrl-C ends it")
        if server.exposed and trusted_proxy is None:
            display.print_note(
                "other machines can connect and the token goes unencrypted: put a proxy with TLS in front"
            )
        server.run()


def backup(
    out: Annotated[Path, typer.Option(help="The file to write; one that is there is replaced.")],
    storage: Storage = None,
    json_: options.Json = False,
) -> None:
    """Copy an SQLite store into one file, while studies may be running on it."""
    from ris_hpo.store.open import backup as copy_store

    options.check_output(out)
    copy_store(storage, out)
    if json_:
        display.print_json({"file": str(out), "bytes": out.stat().st_size})
        return
    display.print_result(f"written: {out}")
    display.print_note(f"it can be used as a store: ris-hpo status --storage {shlex.quote(str(out))}")


def doctor(storage: Storage = None, json_: options.Json = False) -> None:
    """Look at the store, disk, devices and versions, and say what to do."""
    from ris_hpo.results.doctor import examine

    findings = examine(storage)
    if json_:
        display.print_json([finding.as_dict() for finding in findings])
    else:
        rows = [(each.severity, each.name, each.found, each.advice) for each in findings]
        display.table("", ["", "what", "found", "what to do"], rows, text=range(4))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests read."""
    examples: dict[Callable[..., None], str] = {
        dashboard: "ris-hpo dashboard --port 8080",
        backup: "ris-hpo backup --out studies-backup.db",
        doctor: "ris-hpo doctor",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
