"""Access control in front of the dashboard: tokens of two roles, Host header, security headers."""

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
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qsl, quote, urlencode

from jinja2 import Environment, PackageLoader

from ris_hpo.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MIN_TOKEN_LENGTH: Final = 16
ATTEMPTS_PER_ADDRESS: Final = 10
ATTEMPT_WINDOW_S: Final = 60.0
ADDRESSES: Final = 10_000
"""Addresses whose wrong tokens are remembered; the ones heard of longest ago are forgotten first."""
FIRST_PAGE: Final = "/studies"
Role = Literal["viewer", "editor"]
_LOGIN_PATH: Final = "/login"
_HEALTH_PATH: Final = "/healthz"
_MAX_FORM_BYTES: Final = 4096
_COMPRESS_ABOVE: Final = 16_384
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_FOREIGN: Final = "The request comes from another site, or through a proxy that does not pass on the Host header."
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
    """Wrong tokens of the last minute by the address they came from; nobody is refused for those of other addresses."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def blocked(self, address: str) -> bool:
        """Whether further tokens from this address are refused unseen for now."""
        with self._lock:
            own = self._failures.get(_visitor(address), deque())
            while own and own[0] <= self._clock() - ATTEMPT_WINDOW_S:
                own.popleft()
            return len(own) >= ATTEMPTS_PER_ADDRESS

    def failed(self, address: str) -> None:
        """Count a wrong token."""
        with self._lock:
            self._failures.setdefault(_visitor(address), deque()).append(self._clock())
            self._failures.move_to_end(_visitor(address))
            while len(self._failures) > ADDRESSES:
                self._failures.popitem(last=False)


def _visitor(address: str) -> str:
    """Return what one visitor has for himself: an IPv4 address, or a /64 network of IPv6."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # none, of a socket without addresses
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


class AccessControl:
    """WSGI middleware: tokens of viewers and editors, Host header, security headers.

    A viewer sees every page and changes nothing. An editor may also send requests that change something.

    A right token (link, form or ``Authorization: Bearer``) opens a session: a random value known to this process alone,
    in a cookie that scripts cannot read and other sites cannot send. It is not derived from the token, so that the old
    cookie of a tab left open does not count as a wrong token.

    Args:
        app: the application to protect.
        token: what a visitor must present.
        read_write: whoever presents it is an editor.
        editor_token: a second token, of editors, where the first one is a viewer's.
        hosts: names allowed in the Host header, without port; None allows any IP address and this machine's name.
        cookie: name of the cookie; cookies are shared by all ports of a host, so it should carry the port.
        clock: seconds, for counting attempts.

    Raises:
        ConfigError: a token too short, twice the same, or a second one although the first is an editor's.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        token: str,
        read_write: bool = False,
        editor_token: str | None = None,
        hosts: frozenset[str] | None = LOOPBACK,
        cookie: str = "ris_hpo",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._tokens: dict[Role, bytes] = {"editor" if read_write else "viewer": check_token(token).encode()}
        if editor_token is not None:
            if read_write or editor_token == token:
                raise ConfigError("an editor's token beside a viewer's: leave out --read-write, and make them differ")
            self._tokens["editor"] = check_token(editor_token).encode()
        self._sessions: dict[Role, str] = {role: secrets.token_urlsafe(32) for role in self._tokens}
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
            return self._admit(environ, reply, guesses[0], _local(path, FIRST_PAGE) + (f"?{rest}" if rest else ""))
        scheme, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "bearer":
            found = self._role(environ, bearer.strip())
        else:
            found = self._session_role(environ) or HTTPStatus.UNAUTHORIZED
        if isinstance(found, HTTPStatus):
            return self._refuse(reply, found)
        if path == _LOGIN_PATH:
            return reply.redirect(FIRST_PAGE)
        if method not in _READING:
            if found != "editor":
                return reply.json(HTTPStatus.FORBIDDEN, {"reason": self._no_editor()})
            if not _same_origin(environ):
                return reply.json(HTTPStatus.FORBIDDEN, {"reason": _FOREIGN})
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

    def _no_editor(self) -> str:
        if "editor" in self._tokens:
            return "This is a viewer's token, which changes nothing: this dashboard is read-only for it."
        return "This dashboard is read-only. Start it with --read-write to change a study."

    def _session_role(self, environ: WSGIEnvironment) -> Role | None:
        try:
            morsel = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(self._cookie)
        except CookieError:
            return None
        if morsel is None:
            return None
        return next((role for role, own in self._sessions.items() if _equal(morsel.value, own.encode())), None)

    def _role(self, environ: WSGIEnvironment, guess: str) -> Role | HTTPStatus:
        """Return the role that a token gives, or the status that refuses it."""
        address = environ.get("REMOTE_ADDR", "")
        if self._attempts.blocked(address):
            return HTTPStatus.TOO_MANY_REQUESTS
        role = next((role for role, token in self._tokens.items() if _equal(guess, token)), None)
        if role is None:
            self._attempts.failed(address)
        return role or HTTPStatus.UNAUTHORIZED

    def _admit(self, environ: WSGIEnvironment, reply: _Reply, guess: str, location: str) -> Iterable[bytes]:
        role = self._role(environ, guess)
        if isinstance(role, HTTPStatus):
            return self._refuse(reply, role, wrong=True)
        secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
        path = f"{self._cookie}={self._sessions[role]}; Path={reply.root or '/'}"
        return reply.redirect(location, ("Set-Cookie", f"{path}; HttpOnly; SameSite=Strict{secure}"))

    def _log_in(self, environ: WSGIEnvironment, reply: _Reply) -> Iterable[bytes]:
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
        except ValueError:
            length = -1
        if not 0 <= length <= _MAX_FORM_BYTES:
            return reply.text(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The login form is too large.\n")
        if not _same_origin(environ):
            return reply.text(HTTPStatus.FORBIDDEN, f"{_FOREIGN}\n")
        form = dict(parse_qsl(environ["wsgi.input"].read(length).decode("ascii", "replace")))
        return self._admit(environ, reply, form.get("token", "").strip(), FIRST_PAGE)

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
        page = _templates.get_template("login.html.j2").render(reason=reason, root=reply.root)
        return reply.html(status, page, *extra)

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
        if kind.startswith("application/json") and "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body, headers = _compressed(body, headers)
        start_response(captured["status"], headers + list(_HEADERS))
        return body


class _Reply:
    """The middleware's own answers, with the headers that all of them carry."""

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self.path = environ.get("PATH_INFO", "")
        self.root = environ.get("SCRIPT_NAME", "")
        """Path below which the dashboard is, behind a proxy; empty where it has the host for itself."""
        self._bodiless = environ["REQUEST_METHOD"] == "HEAD"
        self._start_response = start_response

    def text(self, status: HTTPStatus, text: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        return self._send(status, "text/plain; charset=utf-8", text, *extra)

    def html(self, status: HTTPStatus, text: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        policy = ("Content-Security-Policy", _LOGIN_POLICY)
        return self._send(status, "text/html; charset=utf-8", text, policy, *extra)

    def json(self, status: HTTPStatus, value: Any, *extra: tuple[str, str]) -> Iterable[bytes]:
        return self._send(status, "application/json", json.dumps(value), *extra)

    def redirect(self, location: str, *extra: tuple[str, str]) -> Iterable[bytes]:
        return self._send(HTTPStatus.SEE_OTHER, "text/plain", "", ("Location", self.root + location), *extra)

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


def _local(path: str, default: str) -> str:
    """Return a redirect target on this host: never ``//elsewhere``."""
    path = quote(path.encode("latin-1", "replace").decode("utf-8", "replace").lstrip("/\\"))
    return f"/{path}" if path else default


def _same_origin(environ: WSGIEnvironment) -> bool:
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in {"same-origin", "none"}:
        return False
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or origin.partition("://")[2] == environ.get("HTTP_HOST")


def _compressed(body: Iterable[bytes], headers: list[tuple[str, str]]) -> tuple[Iterable[bytes], list[tuple[str, str]]]:
    whole = b"".join(body)
    if len(whole) <= _COMPRESS_ABOVE:
        return [whole], headers
    packed = gzip.compress(whole, compresslevel=1, mtime=0)
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    extra = [("Content-Length", str(len(packed))), ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")]
    return [packed], kept + extra


def _no_write(data: bytes) -> object:
    raise NotImplementedError("the application answers with an iterable, never with write()")
