"""Access control in front of the dashboard: token, read-only mode, Host header, security headers."""

from __future__ import annotations

import functools
import gzip
import hmac
import ipaddress
import json
import re
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable
from urllib.parse import parse_qsl, quote, urlencode

from jinja2 import Environment, PackageLoader

from ris_hpo.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MIN_TOKEN_LENGTH: Final = 16
ATTEMPTS_PER_ADDRESS: Final = 10
ATTEMPTS: Final = 100
ATTEMPT_WINDOW_S: Final = 60.0
_LOGIN_PATH: Final = "/login"
_HEALTH_PATH: Final = "/healthz"
_ZOOM_PATH: Final = "/ris-hpo/zoom.js"
_ZOOM_STYLE: Final = '<style>img[src*="/artifacts/"] { cursor: zoom-in; max-width: 100% }</style>'
_ZOOM_TAG: Final = f'<script defer src="{_ZOOM_PATH}"></script>\n{_ZOOM_STYLE}\n</head>'.encode()
_MAX_FORM_BYTES: Final = 4096
_COMPRESS_ABOVE: Final = 16_384
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_READING: Final = frozenset({"GET", "HEAD"})
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_NOTHING_MAY_RUN: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_LOGIN_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer, browsers post the login form with "Origin: null"
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
)
_templates = Environment(
    loader=PackageLoader("ris_hpo.dashboard"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_zoom: Final = (Path(__file__).parent / "templates" / "zoom.js").read_text(encoding="utf-8")


def make_token() -> str:
    """Return a fresh token of 192 random bits that a link can carry."""
    return secrets.token_urlsafe(24)


def check_token(token: str) -> str:
    """Return the token, checked.

    Raises:
        ConfigError: too short to withstand guessing, or with characters that a header or a link cannot carry.
    """
    if len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(f"the dashboard's token has {len(token)} characters, expected at least {MIN_TOKEN_LENGTH}")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("the dashboard's token holds spaces or other characters than printable ASCII")
    return token


class Attempts:
    """Wrong tokens of the last minute, counted per address and in all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: deque[tuple[float, str]] = deque()
        self._lock = threading.Lock()

    def blocked(self, address: str) -> bool:
        """Whether further tokens are refused unseen for now."""
        with self._lock:
            while self._failures and self._failures[0][0] <= self._clock() - ATTEMPT_WINDOW_S:
                self._failures.popleft()
            own = sum(1 for _, other in self._failures if other == address)
            return own >= ATTEMPTS_PER_ADDRESS or len(self._failures) >= ATTEMPTS

    def failed(self, address: str) -> None:
        """Count a wrong token."""
        with self._lock:
            self._failures.append((self._clock(), address))


class AccessControl:
    """WSGI middleware: token, read-only mode, Host header, security headers.

    A right token (link, form or ``Authorization: Bearer``) opens a session: a random value known to this process alone,
    in a cookie that scripts cannot read and other sites cannot send. It is not derived from the token, so that the old
    cookie of a tab left open does not count as a wrong token.

    Args:
        app: the application to protect.
        token: what a visitor must present.
        read_write: pass on requests that change something.
        hosts: names allowed in the Host header, without port; None allows any IP address and this machine's name.
        cookie: name of the cookie; cookies are shared by all ports of a host, so it should carry the port.
        clock: seconds, for counting attempts.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        token: str,
        read_write: bool = False,
        hosts: frozenset[str] | None = LOOPBACK,
        cookie: str = "ris_hpo",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._token = check_token(token).encode()
        self._session = secrets.token_urlsafe(32)
        self._read_write = read_write
        self._hosts = hosts
        self._cookie = cookie
        self._attempts = Attempts(clock)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer the request, or pass it on to the application."""
        path, method = environ.get("PATH_INFO", "") or "/", environ["REQUEST_METHOD"]
        reply = _Reply(environ, start_response)
        if path == _HEALTH_PATH:
            return reply.text(HTTPStatus.OK, "ok\n")
        if not self._host_allowed(environ.get("HTTP_HOST", "")):
            return reply.text(HTTPStatus.MISDIRECTED_REQUEST, "This host name is not allowed; see --allow-host.\n")
        if path == _LOGIN_PATH and method == "POST":
            return self._log_in(environ, reply)
        query = parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        guesses = [value for name, value in query if name == "token"]
        if guesses and method in _READING:
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            return self._admit(environ, reply, guesses[0], _local(path) + (f"?{rest}" if rest else ""))
        scheme, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "bearer":
            verdict = self._verdict(environ, bearer.strip())
            if verdict is not HTTPStatus.OK:
                return self._refuse(reply, verdict)
        elif not self._has_session(environ):
            return self._refuse(reply, HTTPStatus.UNAUTHORIZED)
        if path == _LOGIN_PATH:
            return reply.redirect("/dashboard")
        if path == _ZOOM_PATH and method in _READING:
            return reply.script(_zoom)
        if method not in _READING:
            if not self._read_write:
                return reply.json(
                    HTTPStatus.FORBIDDEN,
                    {"reason": "This dashboard is read-only. Start it with --read-write to change a study."},
                )
            if not _same_origin(environ):
                return reply.json(HTTPStatus.FORBIDDEN, {"reason": "The request comes from another site."})
        return self._forward(environ, start_response, path)

    def _host_allowed(self, header: str) -> bool:
        matched = _HOST.fullmatch(header)
        if matched is None:
            return False
        host = matched["name"].strip("[]").lower()
        if self._hosts is not None:
            return host in self._hosts
        if host in LOOPBACK or host in _own_names():
            return True
        try:  # DNS rebinding needs a name; an address in the Host header is what the visitor typed
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _has_session(self, environ: WSGIEnvironment) -> bool:
        try:
            morsel = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(self._cookie)
        except CookieError:
            return False
        return morsel is not None and _equal(morsel.value, self._session.encode())

    def _verdict(self, environ: WSGIEnvironment, guess: str) -> HTTPStatus:
        address = environ.get("REMOTE_ADDR", "")
        if self._attempts.blocked(address):
            return HTTPStatus.TOO_MANY_REQUESTS
        if _equal(guess, self._token):
            return HTTPStatus.OK
        self._attempts.failed(address)
        return HTTPStatus.UNAUTHORIZED

    def _admit(self, environ: WSGIEnvironment, reply: _Reply, guess: str, location: str) -> Iterable[bytes]:
        verdict = self._verdict(environ, guess)
        if verdict is not HTTPStatus.OK:
            return self._refuse(reply, verdict, wrong=True)
        secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
        cookie = f"{self._cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict{secure}"
        return reply.redirect(location, ("Set-Cookie", cookie))

    def _log_in(self, environ: WSGIEnvironment, reply: _Reply) -> Iterable[bytes]:
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
        except ValueError:
            length = -1
        if not 0 <= length <= _MAX_FORM_BYTES:
            return reply.text(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The login form is too large.\n")
        if not _same_origin(environ):
            return reply.text(HTTPStatus.FORBIDDEN, "The request comes from another site.\n")
        form = dict(parse_qsl(environ["wsgi.input"].read(length).decode("ascii", "replace")))
        return self._admit(environ, reply, form.get("token", "").strip(), "/dashboard")

    def _refuse(self, reply: _Reply, status: HTTPStatus, *, wrong: bool = False) -> Iterable[bytes]:
        extra: list[tuple[str, str]] = [("WWW-Authenticate", 'Bearer realm="ris-hpo dashboard"')]
        if status is HTTPStatus.TOO_MANY_REQUESTS:
            extra = [("Retry-After", str(round(ATTEMPT_WINDOW_S)))]
            reason = "Too many wrong tokens. Wait a minute and try again."
        elif wrong:
            reason = "That is not the token. It was printed where the dashboard was started."
        else:
            reason = ""
        if reply.path.startswith("/api/"):
            return reply.json(status, {"reason": reason or "A token is required."}, *extra)
        return reply.html(status, _templates.get_template("login.html.j2").render(reason=reason), *extra)

    def _forward(self, environ: WSGIEnvironment, start_response: StartResponse, path: str) -> Iterable[bytes]:
        captured: dict[str, Any] = {}

        def capture(
            status: str,
            headers: list[tuple[str, str]],
            exc_info: tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None = None,
        ) -> Callable[[bytes], object]:
            captured["status"], captured["headers"] = status, headers
            return _no_write

        body = self._app(environ, capture)
        dropped = {"access-control-allow-origin", "server"}  # the application opens artifacts to every site
        headers = [(name, value) for name, value in captured["headers"] if name.lower() not in dropped]
        kind = next((value for name, value in headers if name.lower() == "content-type"), "")
        if path.startswith("/artifacts/"):  # figures are redrawn in place
            headers += [("Content-Security-Policy", _NOTHING_MAY_RUN), ("Cache-Control", "private, no-cache")]
        elif path.startswith("/static/"):
            headers.append(("Cache-Control", "private, no-cache"))  # kept, revalidated by its date
        else:
            headers.append(("Cache-Control", "no-store"))
        if path.startswith("/dashboard") and kind.startswith("text/html"):
            body, headers = _with_zoom(body, headers)
        elif kind.startswith("application/json") and "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body, headers = _compressed(body, headers)
        start_response(captured["status"], headers + list(_HEADERS))
        return body


class _Reply:
    """The middleware's own answers, with the headers that all of them carry."""

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self.path = environ.get("PATH_INFO", "")
        self._bodiless = environ["REQUEST_METHOD"] == "HEAD"
        self._start_response = start_response

    def text(self, status: HTTPStatus, text: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        return self._send(status, "text/plain; charset=utf-8", text, *extra)

    def html(self, status: HTTPStatus, text: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        policy = ("Content-Security-Policy", _LOGIN_POLICY)
        return self._send(status, "text/html; charset=utf-8", text, policy, *extra)

    def json(self, status: HTTPStatus, value: Any, *extra: tuple[str, str]) -> Iterable[bytes]:
        return self._send(status, "application/json", json.dumps(value), *extra)

    def script(self, text: str) -> Iterable[bytes]:
        return self._send(HTTPStatus.OK, "text/javascript; charset=utf-8", text)

    def redirect(self, location: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        return self._send(HTTPStatus.SEE_OTHER, "text/plain", "", ("Location", location), *extra)

    def _send(self, status: HTTPStatus, kind: str, text: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        body = text.encode()
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"), *extra]
        self._start_response(f"{status.value} {status.phrase}", headers + list(_HEADERS))
        return [] if self._bodiless else [body]


@functools.cache
def _own_names() -> frozenset[str]:
    return frozenset({socket.gethostname().lower(), socket.getfqdn().lower()})


def _equal(guess: str, secret: bytes) -> bool:
    return hmac.compare_digest(guess.encode("utf-8", "surrogatepass"), secret)


def _local(path: str) -> str:
    """Return a redirect target on this host: never ``//elsewhere``."""
    path = quote(path.encode("latin-1", "replace").decode("utf-8", "replace").lstrip("/\\"))
    return "/" + (path or "dashboard")


def _same_origin(environ: WSGIEnvironment) -> bool:
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in {"same-origin", "none"}:
        return False
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or origin.partition("://")[2] == environ.get("HTTP_HOST")


def _with_zoom(body: Iterable[bytes], headers: list[tuple[str, str]]) -> tuple[Iterable[bytes], list[tuple[str, str]]]:
    """Return the page with a script that enlarges figures, which the page itself shows only as thumbnails."""
    whole = b"".join(body)
    if isinstance(body, _Closeable):
        body.close()
    page = whole.replace(b"</head>", _ZOOM_TAG, 1)
    dropped = {"content-length", "last-modified", "etag", "accept-ranges"}
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [page], [*kept, ("Content-Length", str(len(page)))]


def _compressed(body: Iterable[bytes], headers: list[tuple[str, str]]) -> tuple[Iterable[bytes], list[tuple[str, str]]]:
    whole = b"".join(body)
    if len(whole) <= _COMPRESS_ABOVE:
        return [whole], headers
    packed = gzip.compress(whole, compresslevel=1, mtime=0)
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    extra = [("Content-Length", str(len(packed))), ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")]
    return [packed], kept + extra


@runtime_checkable
class _Closeable(Protocol):
    def close(self) -> None: ...


def _no_write(data: bytes) -> object:
    raise NotImplementedError("the application answers with an iterable, never with write()")
