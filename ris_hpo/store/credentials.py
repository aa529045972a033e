"""The store's password: where it comes from, and how it stays out of everything printed, logged or stored."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from ris_hpo.errors import StoreError

PASSWORD_VARIABLE: Final = "RIS_HPO_STORAGE_PASSWORD"
PASSWORD_FILE_VARIABLE: Final = "RIS_HPO_STORAGE_PASSWORD_FILE"


def redact(text: str) -> str:
    """Return ``text`` with the password of every URL in it replaced by ``***``.

    A password may hold anything, spaces and ``@`` included, so that everything up to the last ``@`` of the line goes.
    A URL that was taken for a path has one slash left.
    """
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://?[^\s:/@]*):.*@", r"\1:***@", text)
    return re.sub(r"((?:password|passwd|pgpassword)\s*=\s*)[^\s&'\"]+", r"\1***", text, flags=re.IGNORECASE)


def password_from_environment() -> str | None:
    """Return the password of ``$RIS_HPO_STORAGE_PASSWORD`` or of the file ``$RIS_HPO_STORAGE_PASSWORD_FILE`` names.

    Raises:
        StoreError: that file cannot be read.
    """
    if PASSWORD_VARIABLE in os.environ:
        return os.environ[PASSWORD_VARIABLE]
    file = os.environ.get(PASSWORD_FILE_VARIABLE)
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise StoreError(f"{PASSWORD_FILE_VARIABLE}: {file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise StoreError(f"{PASSWORD_FILE_VARIABLE}: {file} cannot be read (not UTF-8 text)") from None


def with_password(address: str) -> str:
    """Return a store's address with the password of this environment, for a process in another one.

    An address with a password of its own, and one of an SQLite file, come back as they are.
    """
    import sqlalchemy  # imported late: messages of every command go through ``redact``

    url = sqlalchemy.make_url(address)
    password = password_from_environment()
    if url.get_backend_name() == "sqlite" or url.password or password is None:
        return address
    return url.set(password=password).render_as_string(hide_password=False)
