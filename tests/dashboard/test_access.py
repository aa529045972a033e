"""Access control alone, as WSGI: who gets in, what is refused, and which headers every answer carries."""

import hmac
import io
import json
import types

import pytest

from ris_hpo.dashboard import access
from ris_hpo.dashboard.access import (
    ADDRESSES,
    ATTEMPT_WINDOW_S,
    ATTEMPTS_PER_ADDRESS,
    AccessControl,
    check_token,
    make_token,
)
from ris_hpo.errors import ConfigError

TOKEN = "correct-horse-battery"
HOST = "127.0.0.1:8080"


def inner(environ, start_response):
    """Stands for the dashboard: says what reached it, opens itself to every site, as the real one does."""
    body = json.dumps({"method": environ["REQUEST_METHOD"], "path": environ["PATH_INFO"], "pad": "x" * 40_000}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("200 OK", [*headers, ("Access-Control-Allow-Origin", "*")])
    return [body]


class Visitor:
    def __init__(self, **options):
        self.now = 1000.0
        self.guarded = AccessControl(inner, token=TOKEN, clock=lambda: self.now, **options)
        self.cookie = ""

    def ask(
        self,
        path="/api/studies",
        method="GET",
        *,
        query="",
        host=HOST,
        body=b"",
        address="127.0.0.1",
        scheme="http",
        root="",
        **headers,
    ):
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "REMOTE_ADDR": address,
            "wsgi.input": io.BytesIO(body), "wsgi.url_scheme": scheme, "SCRIPT_NAME": root,
            "CONTENT_LENGTH": str(len(body)), "HTTP_HOST": host,
            **({"HTTP_COOKIE": self.cookie} if self.cookie else {}),
            **{f"HTTP_{name.upper()}": value for name, value in headers.items()},
        }  # fmt: skip
        answer = {}

        def start_response(status, headers, exc_info=None):
            answer.update(status=int(status[:3]), headers=dict(headers))

        answer["body"] = b"".join(self.guarded(environ, start_response))
        if "Set-Cookie" in answer["headers"]:
            self.cookie = answer["headers"]["Set-Cookie"].split(";")[0]
        return answer

    def log_in(self, token=TOKEN, **options):
        return self.ask("/login", "POST", body=f"token={token}".encode(), **options)


def test_without_token_401_everywhere_and_a_form_to_log_in():
    visitor = Visitor()
    for path in ("/", "/dashboard", "/api/studies", "/static/bundle.js", "/artifacts/1/2/abc", "/csv/1", "/nowhere"):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            assert visitor.ask(path, method)["status"] == 401
    assert b'action="/login"' in visitor.ask("/dashboard")["body"]
    assert json.loads(visitor.ask("/api/studies")["body"])["reason"]
    assert visitor.ask("/dashboard", "HEAD")["body"] == b""
    assert "WWW-Authenticate" in visitor.ask("/dashboard")["headers"]


def test_link_opens_a_session_and_takes_the_token_out_of_the_address():
    visitor = Visitor()
    answer = visitor.ask("/dashboard/studies/1", query=f"a=1&token={TOKEN}&b=2")
    assert (answer["status"], answer["headers"]["Location"]) == (303, "/dashboard/studies/1?a=1&b=2")
    cookie = answer["headers"]["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert visitor.ask()["status"] == 200
    assert visitor.ask("/login")["status"] == 303


def test_link_never_leads_to_another_site():
    for path in ("//evil.example/x", "/\\evil.example", "///evil.example"):
        location = Visitor().ask(path, query=f"token={TOKEN}")["headers"]["Location"]
        assert location.startswith("/evil.example")
    assert "\n" not in Visitor().ask("/a\r\nSet-Cookie: x", query=f"token={TOKEN}")["headers"]["Location"]


def test_form_and_bearer():
    visitor = Visitor()
    assert visitor.log_in("not-the-right-token")["status"] == 401
    assert b"not the token" in visitor.log_in("not-the-right-token")["body"]
    assert visitor.log_in()["headers"]["Location"] == "/studies"
    assert visitor.ask("/dashboard")["status"] == 200
    other = Visitor()
    assert other.ask(authorization=f"Bearer {TOKEN}")["status"] == 200
    assert other.ask(authorization="Bearer wrong")["status"] == 401
    assert other.ask()["status"] == 401  # a bearer opens no session
    assert other.ask("/login", "POST", body=b"token=" + b"x" * 5000)["status"] == 413
    assert other.log_in(origin="http://evil.example")["status"] == 403


@pytest.mark.parametrize("cookie", ["ris_hpo=", "ris_hpo=wrong", "other=1", "ris_hpo", "\x00;=", "ris_hpo=\xff"])
def test_a_made_up_cookie_is_nothing_and_no_guess(cookie):
    visitor = Visitor()
    visitor.cookie = cookie
    for _ in range(2 * ATTEMPTS_PER_ADDRESS):
        assert visitor.ask()["status"] == 401
    assert visitor.log_in()["status"] == 303


def test_sessions_end_with_the_process():
    visitor = Visitor()
    visitor.log_in()
    old = visitor.cookie
    fresh = Visitor()
    fresh.cookie = old
    assert fresh.ask()["status"] == 401


def test_wrong_guesses_shut_out_their_own_address_only():
    visitor = Visitor()
    for _ in range(ATTEMPTS_PER_ADDRESS):
        assert visitor.log_in("wrong", address="10.0.0.1")["status"] == 401
    blocked = visitor.log_in(address="10.0.0.1")  # the right one, too late
    assert blocked["status"] == 429
    assert int(blocked["headers"]["Retry-After"]) > 0
    assert visitor.ask(query=f"token={TOKEN}", address="10.0.0.1")["status"] == 429
    assert visitor.ask(authorization=f"Bearer {TOKEN}", address="10.0.0.1")["status"] == 429
    assert visitor.log_in(address="10.0.0.2")["status"] == 303  # others are not shut out
    assert visitor.ask(address="10.0.0.1")["status"] == 200  # an open session is no guess
    visitor.now += ATTEMPT_WINDOW_S + 1
    assert visitor.log_in(address="10.0.0.1")["status"] == 303
    for index in range(200):  # somebody with many addresses shuts out nobody else
        visitor.log_in("wrong", address=f"10.1.0.{index}")
    assert visitor.log_in(address="10.2.0.1")["status"] == 303


def test_a_visitor_has_a_whole_network_of_ipv6_addresses():
    visitor = Visitor()
    for index in range(ATTEMPTS_PER_ADDRESS):
        visitor.log_in("wrong", address=f"2001:db8:0:1::{index:x}")
        visitor.log_in("wrong", address=f"::ffff:10.0.0.{index}")  # IPv4 on a socket of IPv6
    assert visitor.log_in(address="2001:db8:0:1:ffff::1")["status"] == 429
    assert visitor.log_in(address="2001:db8:0:2::1")["status"] == 303
    assert visitor.log_in(address="::ffff:10.0.0.1")["status"] == 303


def test_secrets_are_compared_in_constant_time_whatever_way_they_come(monkeypatch):
    compared = []

    def spy(guess, secret):
        compared.append((guess, secret))
        return hmac.compare_digest(guess, secret)

    monkeypatch.setattr(access, "hmac", types.SimpleNamespace(compare_digest=spy))
    visitor = Visitor()
    visitor.log_in("wrong-by-form")
    visitor.ask(query="token=wrong-by-link")
    visitor.ask(authorization="Bearer wrong-as-bearer")
    visitor.cookie = "ris_hpo=wrong-as-cookie"
    visitor.ask()
    assert [guess for guess, _ in compared] == [
        b"wrong-by-form", b"wrong-by-link", b"wrong-as-bearer", b"wrong-as-cookie",
    ]  # fmt: skip
    assert [secret for _, secret in compared[:3]] == [TOKEN.encode()] * 3


def test_a_flood_of_guesses_takes_no_memory(monkeypatch):
    monkeypatch.setattr(access, "ADDRESSES", 100)
    assert ADDRESSES >= 1000
    visitor = Visitor()
    for address in range(300):
        visitor.log_in("wrong", address=f"10.0.{address // 256}.{address % 256}")
    for _ in range(50):
        visitor.log_in("wrong", address="10.9.9.9")
    kept = visitor.guarded._attempts._failures
    assert len(kept) == 100
    assert len(kept["10.9.9.9"]) == ATTEMPTS_PER_ADDRESS


@pytest.mark.parametrize("query", [f"token={TOKEN}", ""])
def test_a_name_that_was_rebound_sees_nothing(query):
    """DNS rebinding: the visitor's browser asks this machine in the name of another site."""
    visitor = Visitor()
    visitor.log_in()
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "2130706433"):
        for path in ("/", "/dashboard", "/api/studies", "/login", "/artifacts/1/2/ab"):
            answer = visitor.ask(path, query=query, host=host, authorization=f"Bearer {TOKEN}")
            assert answer["status"] == 421
            assert "Set-Cookie" not in answer["headers"]
            assert b"method" not in answer["body"]


def test_read_only_refuses_everything_that_changes():
    visitor = Visitor()
    visitor.log_in()
    for method, path in (
        ("DELETE", "/api/studies/1"), ("POST", "/api/studies/1/rename"), ("PUT", "/api/studies/1/note"),
        ("POST", "/api/trials/1/tell"), ("PATCH", "/api/x"), ("OPTIONS", "/api/studies"), ("delete", "/api/studies/1"),
    ):  # fmt: skip
        answer = visitor.ask(path, method)
        assert answer["status"] == 403
        assert "read-only" in json.loads(answer["body"])["reason"]
    assert visitor.ask("/dashboard", "HEAD")["status"] == 200


def test_read_write_asks_where_a_change_comes_from():
    visitor = Visitor(read_write=True)
    assert visitor.ask("/api/studies/1", "DELETE")["status"] == 401
    visitor.log_in()
    assert visitor.ask("/api/studies/1", "DELETE", origin=f"http://{HOST}")["status"] == 200
    assert visitor.ask("/api/studies/1", "DELETE", origin="http://evil.example")["status"] == 403
    assert visitor.ask("/api/studies/1", "DELETE", sec_fetch_site="cross-site")["status"] == 403


@pytest.mark.parametrize(
    ("hosts", "header", "allowed"),
    [
        (None, "127.0.0.1:8080", True), (None, "[::1]:8080", True), (None, "192.168.1.7", True),
        (None, "localhost", True), (None, "evil.example", False), (None, "", False), (None, "evil.example:8080", False),
        (frozenset({"localhost", "box.example"}), "box.example:80", True),
        (frozenset({"localhost"}), "192.168.1.7", False), (frozenset({"localhost"}), "LOCALHOST:1", True),
        (frozenset({"localhost"}), "localhost.evil.example", False), (frozenset({"localhost"}), "a b[", False),
    ],
)  # fmt: skip
def test_host_header(hosts, header, allowed):
    status = Visitor(hosts=hosts).ask(query=f"token={TOKEN}", host=header)["status"]
    assert status == (303 if allowed else 421)


def test_every_answer_carries_the_headers():
    visitor = Visitor()
    answers = [visitor.ask(), visitor.ask("/dashboard"), visitor.ask(host="evil.example"), visitor.log_in()]
    answers += [
        visitor.ask(),
        visitor.ask("/static/bundle.js"),
        visitor.ask("/artifacts/1/2/ab"),
        visitor.ask("/healthz"),
    ]
    for answer in answers:
        headers = answer["headers"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert headers["Cache-Control"]
        assert TOKEN.encode() not in answer["body"]
    assert "sandbox" in visitor.ask("/artifacts/1/2/ab")["headers"]["Content-Security-Policy"]


def test_large_json_is_compressed_for_those_who_can():
    import gzip

    visitor = Visitor()
    visitor.log_in()
    plain, packed = visitor.ask(), visitor.ask(accept_encoding="gzip, br")
    assert gzip.decompress(packed["body"]) == plain["body"]
    assert int(packed["headers"]["Content-Length"]) == len(packed["body"]) < len(plain["body"]) / 10


EDITOR = "editors-and-nobody-else"
WRITING = (("DELETE", "/api/studies/1"), ("POST", "/api/studies/1/rename"), ("PUT", "/api/studies/1/note"))


def test_two_tokens_two_roles():
    viewer, editor = Visitor(editor_token=EDITOR), Visitor(editor_token=EDITOR)
    assert viewer.log_in(TOKEN)["status"] == 303
    assert editor.log_in(EDITOR)["status"] == 303
    for method, path in WRITING:
        refused = viewer.ask(path, method)
        assert refused["status"] == 403
        reason = json.loads(refused["body"])["reason"]
        assert "viewer's token" in reason
        assert "\n" not in reason
        assert viewer.ask(path, method, authorization=f"Bearer {TOKEN}")["status"] == 403
        assert editor.ask(path, method)["status"] == 200
        assert Visitor(editor_token=EDITOR).ask(path, method, authorization=f"Bearer {EDITOR}")["status"] == 200
    assert viewer.ask("/api/studies")["status"] == editor.ask("/api/studies")["status"] == 200
    viewer.log_in(EDITOR)  # the same browser, from now on as an editor
    assert viewer.ask("/api/studies/1", "DELETE")["status"] == 200


def test_tokens_that_contradict_each_other():
    for options in ({"editor_token": TOKEN}, {"editor_token": EDITOR, "read_write": True}):
        with pytest.raises(ConfigError, match="make them differ"):
            Visitor(**options)
    with pytest.raises(ConfigError, match="at least 16"):
        Visitor(editor_token="short")


def test_behind_tls_and_below_a_path():
    visitor = Visitor()
    cookie = visitor.log_in(scheme="https", root="/team/hpo")["headers"]["Set-Cookie"]
    assert "; Path=/team/hpo;" in cookie
    assert cookie.endswith("; Secure")
    assert "Secure" not in visitor.log_in()["headers"]["Set-Cookie"]
    link = visitor.ask("/studies/3", query=f"token={TOKEN}", root="/team/hpo")
    assert link["headers"]["Location"] == "/team/hpo/studies/3"
    assert visitor.ask("/login", root="/team/hpo")["headers"]["Location"] == "/team/hpo/studies"
    visitor.cookie = ""
    assert b'action="/team/hpo/login"' in visitor.ask("/studies", root="/team/hpo")["body"]


def test_health_needs_no_token_and_says_nothing():
    answer = Visitor().ask("/healthz", host="container")
    assert (answer["status"], answer["body"]) == (200, b"ok\n")


def test_tokens():
    assert make_token() != make_token()
    assert check_token(make_token())
    with pytest.raises(ConfigError, match="has 5 characters, expected at least 16"):
        check_token("short")
    for token in ("spaces in the token", "tökens-with-umlauts", "new\nline-in-the-token"):
        with pytest.raises(ConfigError, match="printable ASCII"):
            check_token(token)
