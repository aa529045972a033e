"""The dashboard: our pages and optuna-dashboard's on a production server, behind a token.

optuna-dashboard has neither a login nor a read-only mode: it answers an unauthenticated DELETE with 204. Here
``AccessControl`` is in front of it: it asks for a token, and passes on what changes something from editors only. It
also checks the Host header (DNS rebinding), limits attempts, keeps artifacts from running scripts, and compresses
large JSON for slow connections. ``Pages`` stands between the two.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Self
from urllib.parse import urlencode

import bottle
import optuna_dashboard
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import StorageInternalError
from waitress import create_server

from ris_hpo.dashboard.access import FIRST_PAGE, LOOPBACK, AccessControl
from ris_hpo.dashboard.pages import Pages, check_prefix
from ris_hpo.errors import ConfigError, StoreError
from ris_hpo.store.cache import Store

log = logging.getLogger(__name__)

TOKEN_VARIABLE: Final = "RIS_HPO_DASHBOARD_TOKEN"
EDITOR_TOKEN_VARIABLE: Final = "RIS_HPO_DASHBOARD_EDITOR_TOKEN"

_MAX_HEADER_BYTES: Final = 65_536
_THREADS: Final = 8  # requests answered at once


class _Artifacts(FileSystemArtifactStore):
    """Figures in a folder of this machine; those of workers on other machines are answered with 404."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            return super().open_reader(artifact_id)
        except ArtifactNotFound:
            raise bottle.HTTPError(404, "This artifact is on the machine that ran the trial.") from None


class Dashboard:
    """The dashboard as a server; a context manager that closes its socket.

    Args:
        storage: the store whose studies are shown.
        artifacts: the folder of the artifact store.
        token: what a visitor must present.
        editor_token: a second token, whose visitors may change studies although ``read_write`` is not set.
        host: address to listen on; anything but loopback should be behind a proxy with TLS.
        port: 0 for a free one.
        read_write: allow renaming, deleting and editing notes.
        allowed_hosts: further names allowed in the Host header, for a proxy or a container.
        prefix: path below which a proxy shows the dashboard.
        trusted_proxy: address of a proxy whose word on the visitor's address and on TLS is taken.

    Raises:
        ConfigError: a token too short, no path or no address, or an address that cannot be listened on.
    """

    def __init__(
        self,
        storage: Store,
        artifacts: Path,
        *,
        token: str,
        editor_token: str | None = None,
        host: str = "127.0.0.1",
        port: int = 8080,
        read_write: bool = False,
        allowed_hosts: Sequence[str] = (),
        prefix: str = "",
        trusted_proxy: str | None = None,
    ) -> None:
        self._root = check_prefix(prefix)
        proxy = _proxy_settings(trusted_proxy)
        if read_write or editor_token is not None:  # a viewer may see a store in a folder that cannot be written
            artifacts.mkdir(parents=True, exist_ok=True)
        self.storage = storage
        self._token = token
        app = Pages(optuna_dashboard.wsgi(storage, artifact_store=_Artifacts(str(artifacts))), storage, self._root)
        listener = _listen(host, port)
        self._address = listener.getsockname()[:2]
        wildcard = ipaddress.ip_address(self._address[0]).is_unspecified
        names = None if wildcard and not allowed_hosts else LOOPBACK | {host.lower(), *map(str.lower, allowed_hosts)}
        try:
            guarded = AccessControl(
                app,
                token=token,
                read_write=read_write,
                editor_token=editor_token,
                hosts=names,
                cookie=f"ris_hpo_{self._address[1]}",
            )
        except ConfigError:
            listener.close()
            raise
        self._map: dict[int, Any] = {}
        self._serving = threading.Lock()
        self._server = create_server(
            guarded,
            map=self._map,
            sockets=[listener],
            threads=_THREADS,
            ident=None,
            clear_untrusted_proxy_headers=True,
            url_prefix=self._root,
            **proxy,
            max_request_header_size=_MAX_HEADER_BYTES,
        )

    @property
    def url(self) -> str:
        """Address of the first page, without the token."""
        host, port = self._address
        address = ipaddress.ip_address(host)
        name = "127.0.0.1" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
        return f"http://{name}:{port}{self._root}{FIRST_PAGE}"

    @property
    def login_url(self) -> str:
        """The same address with the token: opens a session and leads to the first page."""
        return f"{self.url}?{urlencode({'token': self._token})}"

    @property
    def exposed(self) -> bool:
        """Whether other machines can connect, so that the token crosses the network unencrypted."""
        return not ipaddress.ip_address(self._address[0]).is_loopback

    def run(self) -> None:
        """Serve until Ctrl-C or :meth:`close`."""
        threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True).start()
        with self._serving:
            self._server.run()

    def close(self) -> None:
        """Stop listening, drop connections and wait for :meth:`run` to return; called again, it does nothing."""
        if not self._map:
            return
        self._server.task_dispatcher.shutdown()
        # asked of the serving thread: a socket closed by another thread is an error in its select
        self._server.trigger.pull_trigger(self._drop)
        with self._serving:
            self._drop()  # where nothing was serving

    def _drop(self) -> None:
        self._server.close()
        for dispatcher in list(self._map.values()):
            dispatcher.close()

    def __enter__(self) -> Self:
        """Nothing to do: the socket listens already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _read_ahead(self) -> None:
        """Fill the storage's cache, so that the first page does not wait for a thousand trials.

        The garbage collector is off meanwhile and skips what was read from then on: none of it is garbage, and looking
        through it takes three times as long as reading it.
        """
        gc.disable()
        try:
            for study in self.storage.get_all_studies():
                study_id = self.storage.get_study_id_from_name(study.study_name)
                self.storage.get_all_trials(study_id, deepcopy=False)
        except (StorageInternalError, StoreError, KeyError) as error:  # a study deleted meanwhile, a store that is away
            log.info("reading ahead stopped: %s", type(error).__name__)
        finally:
            gc.enable()
            gc.freeze()


def _proxy_settings(address: str | None) -> dict[str, Any]:
    """Return how waitress treats what a proxy says of its visitors: as the truth, from this address only."""
    if address is None:
        return {}
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(f"--trusted-proxy {address}: expected the IP address that the proxy connects from") from None
    # not x-forwarded-host: a visitor can send it, and many proxies pass it on as it came
    return {"trusted_proxy": address, "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"}}


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be encoded
        raise ConfigError(f"cannot listen on {host}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; --port 0 takes a free port") from None
    return listener
