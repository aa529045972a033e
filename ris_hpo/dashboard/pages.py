"""Pages of our own around optuna-dashboard: all studies with state and owner, one study with workers and failures.

They are drawn from the store at each request. optuna-dashboard's own pages get a script that enlarges figures and,
below a path of a proxy, one that adds this path to all that they ask for.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import optuna_dashboard
from jinja2 import Environment, PackageLoader

from ris_hpo.errors import ConfigError, StoreError, StudyError
from ris_hpo.search.counting import is_paused
from ris_hpo.search.lifecycle import direction_of, get_study
from ris_hpo.search.rungs import count_rungs
from ris_hpo.search.status import study_status
from ris_hpo.search.upkeep import list_entries
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.text import duration, file_size

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

SHOWN: Final = 50
"""Paused and failed trials that a study's page shows; it says how many more there are."""
REFRESH_S: Final = 15
OWN_PATHS: Final = frozenset({"api", "artifacts", "csv", "dashboard", "favicon.ico", "healthz", "login"}) | {
    "incompatible-rdb-schema", "ris-hpo", "static", "studies",
}  # fmt: skip
"""First parts of the paths that are served; a path of a proxy that began so could not be told from them."""

_PREFIX: Final = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
_STUDY: Final = re.compile(r"/studies/([0-9]{1,9})")
_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'"
)
_CONDITIONS: Final = frozenset({"HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE"})
_ZOOM_STYLE: Final = b'<style>img[src*="/artifacts/"] { cursor: zoom-in; max-width: 100% }</style>'
_ROUTER: Final = b'url_prefix:"/dashboard"'
_FOLDER: Final = Path(__file__).parent / "templates"
_SCRIPTS: Final = {
    f"/ris-hpo/{name}": (_FOLDER / name).read_text(encoding="utf-8") for name in ("zoom.js", "prefix.js")
}
_templates = Environment(
    loader=PackageLoader("ris_hpo.dashboard"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.filters["duration"] = duration
_templates.filters["size"] = file_size
_templates.filters["score"] = lambda value: "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def check_prefix(prefix: str) -> str:
    """Return the path below which a proxy shows the dashboard, without a slash at its end; empty for none.

    Raises:
        ConfigError: not a path, or one that begins like the dashboard's own.
    """
    path = prefix.rstrip("/")
    if not path:
        return ""
    if not _PREFIX.fullmatch(path):
        raise ConfigError(f"--prefix {prefix!r} is no path of a proxy; expected something like /team/hpo")
    if path.split("/")[1] in OWN_PATHS:
        raise ConfigError(f"--prefix {prefix}: the dashboard has paths of its own that begin so; choose another one")
    return path


class Pages:
    """WSGI application: our pages, and optuna-dashboard's with what is added to them.

    Args:
        app: optuna-dashboard.
        store: whose studies are shown.
        root: path below which a proxy shows all of it; see ``check_prefix``.

    Raises:
        ConfigError: the installed optuna-dashboard cannot be shown below a path.
    """

    def __init__(self, app: WSGIApplication, store: Store, root: str = "") -> None:
        self._app = app
        self._store = store
        self._root = root
        self._bundle, self._bundle_tag = b"", ""
        if root:
            script = (Path(optuna_dashboard.__file__).parent / "public" / "bundle.js").read_bytes()
            if script.count(_ROUTER) != 1:
                raise ConfigError("this version of optuna-dashboard cannot be shown below a path: leave out --prefix")
            script = script.replace(_ROUTER, _ROUTER.replace(b'"/', b'"' + root.encode() + b"/"))
            self._bundle = gzip.compress(script, compresslevel=6, mtime=0)
            self._bundle_tag = f'"{hashlib.sha256(self._bundle).hexdigest()[:32]}"'

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer the request, or pass it on to optuna-dashboard."""
        path = environ.get("PATH_INFO", "").rstrip("/")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return self._app(environ, start_response)
        answer = _Answer(environ, start_response)
        if path == "":
            return answer.send(HTTPStatus.SEE_OTHER, "text/plain", b"", ("Location", f"{self._root}/studies"))
        if path in _SCRIPTS:
            return answer.send(HTTPStatus.OK, "text/javascript; charset=utf-8", _SCRIPTS[path].encode())
        if path == "/dashboard" or path.startswith("/dashboard/"):
            return self._extended(environ, start_response)
        if path == "/static/bundle.js" and self._root:
            return self._send_bundle(environ, answer)
        if path == "/studies":
            return self._show(answer, self._studies)
        chosen = _STUDY.fullmatch(path)
        if chosen is not None:
            return self._show(answer, lambda: self._study(int(chosen[1])))
        return self._app(environ, start_response)

    def _extended(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Return a page of optuna-dashboard with our scripts, which run before its own."""
        captured: dict[str, Any] = {}

        def capture(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            captured["status"], captured["headers"] = status, headers
            return lambda data: None  # nothing is written so: the application answers with an iterable

        # whole, whatever the browser has: its copy may be of another prefix
        body = self._app({key: value for key, value in environ.items() if key not in _CONDITIONS}, capture)
        page = b"".join(body)
        if isinstance(body, _Closeable):
            body.close()
        root = self._root.encode()
        scripts = b'<script defer src="%s/ris-hpo/zoom.js"></script>\n%s\n' % (root, _ZOOM_STYLE)
        if root:
            icon = b'<link rel="icon" href="%s/favicon.ico">\n' % root
            scripts = b'<script src="%s/ris-hpo/prefix.js" data-root="%s"></script>\n' % (root, root) + icon + scripts
        page = page.replace(b'src="/static/', b'src="%s/static/' % root).replace(b"<head>", b"<head>\n" + scripts, 1)
        dropped = {"content-length", "last-modified", "etag", "accept-ranges"}
        kept = [(name, value) for name, value in captured["headers"] if name.lower() not in dropped]
        start_response(captured["status"], [*kept, ("Content-Length", str(len(page)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [page]

    def _send_bundle(self, environ: WSGIEnvironment, answer: _Answer) -> Iterable[bytes]:
        """Return optuna-dashboard's script, with the prefix in the paths of its pages."""
        tag, kind = ("ETag", self._bundle_tag), "text/javascript; charset=utf-8"
        if environ.get("HTTP_IF_NONE_MATCH") == self._bundle_tag:
            return answer.send(HTTPStatus.NOT_MODIFIED, kind, b"", tag)
        if "gzip" not in environ.get("HTTP_ACCEPT_ENCODING", ""):
            return answer.send(HTTPStatus.OK, kind, gzip.decompress(self._bundle), tag)
        return answer.send(HTTPStatus.OK, kind, self._bundle, tag, ("Content-Encoding", "gzip"))

    def _show(self, answer: _Answer, draw: Callable[[], str]) -> Iterable[bytes]:
        try:
            status, page = HTTPStatus.OK, draw()
        except StudyError as error:  # deleted meanwhile, or never there
            status, page = HTTPStatus.NOT_FOUND, self._render("error", reason=str(error))
        except StoreError as error:
            status, page = HTTPStatus.SERVICE_UNAVAILABLE, self._render("error", reason=str(error))
        return answer.send(status, "text/html; charset=utf-8", page.encode(), ("Content-Security-Policy", _POLICY))

    def _render(self, name: str, **values: Any) -> str:
        return _templates.get_template(f"{name}.html.j2").render(root=self._root, refresh=REFRESH_S, **values)

    def _studies(self) -> str:
        entries = list_entries(self._store)
        rows = [(self._store.get_study_id_from_name(entry.study), entry) for entry in entries]
        return self._render("studies", rows=rows)

    def _study(self, study_id: int) -> str:
        name = self._store.get_study_name_from_id(study_id)
        study = get_study(self._store, name)
        trials, direction = study.get_trials(deepcopy=False), direction_of(study)
        status = study_status(name, trials, (study.metric_names or ["k_loc"])[0], direction)
        return self._render(
            "study",
            study_id=study_id,
            status=status,
            counts={state: count for state, count in status.trials.as_dict().items() if count},
            owner=study.user_attrs.get(names.STARTED_BY),
            rungs=count_rungs(trials, direction),
            paused=[trial for trial in trials if is_paused(trial)],
            failed=status.failed[::-1],
            shown=SHOWN,
        )


class _Answer:
    """An answer of ours; access control adds the headers that all answers carry."""

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self._bodiless = environ["REQUEST_METHOD"] == "HEAD"
        self._start_response = start_response

    def send(self, status: HTTPStatus, kind: str, body: bytes, *extra: tuple[str, str]) -> Iterable[bytes]:
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *extra]
        self._start_response(f"{status.value} {status.phrase}", headers)
        return [] if self._bodiless else [body]


@runtime_checkable
class _Closeable(Protocol):
    def close(self) -> None: ...
