"""Who holds a trial: the text on it, and whether that process still exists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ris_hpo.store import owner as module
from ris_hpo.store.owner import Owner, Process, this_process

SAY_WHO = "from ris_hpo.store.owner import Owner, this_process; print(Owner(this_process(), 0), flush=True); input()"


def started(*command: str) -> subprocess.Popen[str]:
    """A process that says who it is, and lives until its standard input is closed."""
    return subprocess.Popen(
        [*command, sys.executable, "-c", SAY_WHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said_by(process: subprocess.Popen[str]) -> Process:
    assert process.stdout is not None
    owner = Owner.parse(process.stdout.readline().strip())
    assert owner is not None
    return owner.process


def ended(process: subprocess.Popen[str]) -> None:
    process.communicate()


def test_an_owner_is_read_as_it_was_written() -> None:
    owner = Owner(this_process(), 17)
    assert Owner.parse(str(owner)) == owner
    assert owner.process.pid == os.getpid()
    assert owner != Owner(this_process(), 18)


@pytest.mark.parametrize("text", [None, "", "here:1:0:0", "a:b:c:d:e:f", "host:boot:1:7:12:3:4", "host:boot:1:-7:12:3"])
def test_what_is_no_owner_is_nobody(text: str | None) -> None:
    assert Owner.parse(text) is None  # among them the form of earlier versions, judged by its heartbeat alone


def test_a_process_is_alive_until_it_ends() -> None:
    child = started()
    process = said_by(child)
    assert process.pid == child.pid
    assert not process.is_gone
    ended(child)
    assert process.is_gone


def test_a_zombie_and_a_number_used_again_are_gone() -> None:
    here = this_process()
    assert not here.is_gone
    assert replace(here, start=f"{here.start}1").is_gone
    child = started()
    process = said_by(child)
    assert child.stdin is not None
    child.stdin.close()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    assert process.is_gone
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_a_process_of_another_place_is_never_known_to_be_gone(field: str) -> None:
    """Its number may be free here, or be another process's: only its heartbeat says anything."""
    elsewhere = replace(this_process(), pid=2**22, start="0", **{field: "another"})
    assert replace(this_process(), pid=2**22, start="0").is_gone
    assert not elsewhere.is_gone


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode != 0,
    reason="this machine does not let this user make a PID namespace",
)
@pytest.mark.parametrize("own_proc", [True, False])
def test_a_container_of_the_same_host_name_is_judged_by_its_heartbeat(own_proc: bool) -> None:
    child = started("unshare", "--pid", "--fork", *(["--mount-proc"] if own_proc else []))
    process = said_by(child)
    assert process.host == this_process().host
    assert process.boot == this_process().boot
    assert process.namespace != this_process().namespace
    assert not process.is_gone
    ended(child)
    assert not process.is_gone


def test_a_process_that_proc_hides_is_not_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mounted with ``hidepid``, /proc shows nothing of the processes of other users."""
    here = this_process()
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert not here.is_gone
    assert replace(here, pid=2**22).is_gone
