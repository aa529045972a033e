"""Our own pages, and all pages through a real reverse proxy below a path of it."""

import http.client
import json
import re
import threading
import urllib.parse
from html.parser import HTMLParser

import optuna
import optuna_dashboard
import pytest
from optuna.trial import TrialState

from ris_hpo.dashboard.access import ATTEMPTS_PER_ADDRESS
from ris_hpo.dashboard.pages import OWN_PATHS, check_prefix
from ris_hpo.dashboard.server import Dashboard
from ris_hpo.errors import ConfigError
from ris_hpo.search.rungs import RungCount, count_rungs
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import ticket
from tests.dashboard.conftest import TOKEN

PREFIX = "/team/hpo"
EDITOR = "editors-and-nobody-else"


def ask(base, path, method="GET", body=None, **headers):
    place = urllib.parse.urlsplit(base)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    try:
        connection.request(method, place.path + path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


class Links(HTMLParser):
    """The addresses that a page asks for or leads to."""

    def __init__(self, page: bytes):
        super().__init__()
        self.found: list[str] = []
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "action")]


@pytest.mark.parametrize("stripping", [False, True])
def test_below_a_path_of_a_proxy_with_tls(make_site, make_proxy, stripping):
    site = make_site(prefix=PREFIX, trusted_proxy="127.0.0.1", editor_token=EDITOR)
    proxy = make_proxy(site.base, PREFIX, scheme="https", stripping=stripping)

    status, headers, body = ask(proxy.base, "/studies")
    assert status == 401
    assert f"{PREFIX}/login" in Links(body).found
    status, headers, _ = ask(proxy.base, "/login", "POST", f"token={TOKEN}", Origin=f"https://{proxy.host}")
    assert (status, headers["Location"]) == (303, f"{PREFIX}/studies")
    cookie = headers["Set-Cookie"]
    assert f"; Path={PREFIX};" in cookie
    assert cookie.endswith("; Secure")
    session = {"Cookie": cookie.partition(";")[0]}
    assert ask(proxy.base, "/", **session)[1]["Location"] == f"{PREFIX}/studies"
    number = site.store.get_study_id_from_name("wide")
    for path in ("/studies", f"/studies/{number}", f"/dashboard/studies/{number}", "/studies/99"):
        status, headers, page = ask(proxy.base, path, **session)
        assert status == (404 if path.endswith("99") else 200)
        links = Links(page).found
        assert links
        for link in links:
            if link == "data:,":  # no icon, and no request for one
                continue
            assert link.startswith(f"{PREFIX}/")
            assert ask(proxy.base, link.removeprefix(PREFIX), **session)[0] == 200
    # optuna-dashboard's own script builds its addresses below the path, and is sent once
    status, headers, script = ask(proxy.base, "/static/bundle.js", **session)
    assert script.count(f'url_prefix:"{PREFIX}/dashboard"'.encode()) == 1
    assert ask(proxy.base, "/static/bundle.js", **session, **{"If-None-Match": headers["Etag"]})[0] == 304
    assert json.loads(ask(proxy.base, "/api/studies", **session)[2])["study_summaries"][0]["study_name"] == "wide"
    # a viewer's session changes nothing through the proxy either, an editor's token does
    rename = json.dumps({"study_name": "renamed"})
    assert ask(proxy.base, f"/api/studies/{number}/rename", "POST", rename, **session)[0] == 403
    editor = {"Authorization": f"Bearer {EDITOR}", "Content-Type": "application/json"}
    assert ask(proxy.base, f"/api/studies/{number}/rename", "POST", rename, **editor)[0] == 201


def test_a_proxy_is_believed_only_where_it_is_trusted(make_site, make_proxy):
    trusting = make_site(trusted_proxy="127.0.0.1")
    proxy = make_proxy(trusting.base, "")
    for _ in range(ATTEMPTS_PER_ADDRESS):
        ask(proxy.base, "/studies?token=wrong")
    assert ask(proxy.base, f"/studies?token={TOKEN}")[0] == 429
    proxy.visitor = "203.0.113.8"
    assert ask(proxy.base, f"/studies?token={TOKEN}")[0] == 303
    with Dashboard(trusting.store, trusting.folder / "none", token=TOKEN, port=0) as plain:
        thread = threading.Thread(target=plain.run)
        thread.start()
        forged = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
        base = plain.url.removesuffix("/studies")
        status, headers, _ = ask(base, f"/studies?token={TOKEN}", **forged)
        assert status == 303
        assert "Secure" not in headers["Set-Cookie"]
        for index in range(ATTEMPTS_PER_ADDRESS):
            forged["X-Forwarded-For"] = f"203.0.113.{index}"
            ask(base, "/studies?token=wrong", **forged)
        assert ask(base, f"/studies?token={TOKEN}")[0] == 429
        plain.close()
        thread.join(60)
    assert not (trusting.folder / "none").exists()  # a viewer's dashboard writes nothing, wherever it is


def test_a_viewer_reaches_no_route_that_writes(make_site):
    """Whatever optuna-dashboard offers besides GET is refused, in one line."""
    site = make_site(editor_token=EDITOR)
    routes = optuna_dashboard.wsgi(site.store).routes
    writing = [(route.method, re.sub(r"<[^>]*>", "1", route.rule)) for route in routes if route.method != "GET"]
    assert len(writing) > 10
    for method, path in writing:
        status, _, body = ask(site.base, path, method, "{}", Authorization=f"Bearer {TOKEN}")
        assert status == 403, (method, path)
        reason = json.loads(body)["reason"]
        assert "viewer" in reason
        assert "\n" not in reason
    assert [study.study_name for study in optuna.get_all_study_summaries(site.store)] == ["wide"]


def test_studies_with_state_and_owner_and_one_with_its_workers(make_site):
    site = make_site()
    study, store = site.study, site.store
    study_id = store.get_study_id_from_name("wide")
    study.set_user_attr(names.STARTED_BY, "ada@<lab>")
    store.fill(study_id, lambda present: [ticket() for _ in range(3)])
    owner = "cluster-7:boot:4026531836:4242:100.0:1"
    running = store.claim(study_id, owner)
    paused = store.claim(study_id, "cluster-8:boot:4026531836:17:100.0:1")
    store.release(study_id, paused, "cluster-8:boot:4026531836:17:100.0:1", {names.RUNGS: [3.25], names.PAUSED: 0})
    failed = store.claim(study_id, "cluster-9:boot:4026531836:18:100.0:1")
    marks = {names.CAUSE: "timeout", names.ERROR: "no progress for 600 s", names.HOST: "cluster-9"}
    store.retire(study_id, failed, None, marks, lambda trial: None)

    header = {"Authorization": f"Bearer {TOKEN}"}
    page = ask(site.base, "/studies", **header)[2].decode()
    assert "wide" in page
    assert "running" in page
    assert "ada@&lt;lab&gt;" in page  # a store may say anything
    status, headers, body = ask(site.base, f"/studies/{study_id}", **header)
    assert status == 200
    assert "script" not in headers["Content-Security-Policy"]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body.decode().partition("<main>")[2]))
    assert "owner ada@&lt;lab&gt;" in text
    assert f"{running} cluster-7 4242" in text
    assert "Rungs Rung Reached by Paused there Best k_loc 0 1 1 3.25" in text
    assert f"Paused trials Trial Rung k_loc {paused} 0 3.25" in text
    assert (
        f"Failures 1 timeout Trial Cause Retried Machine Device Last step Error {failed} timeout no cluster-9" in text
    )
    assert "no progress for 600 s" in text
    assert ask(site.base, f"/studies/{study_id + 1}", **header)[0] == 404
    assert ask(site.base, f"/studies/{study_id}")[0] == 401


def test_rungs_are_counted_by_lines():
    def trial(number, rungs, paused=None, state=TrialState.WAITING, **marks):
        made = optuna.trial.create_trial(state=state, value=1.0 if state is TrialState.COMPLETE else None)
        made.number = number
        made.user_attrs.update({names.RUNGS: rungs, names.PAUSED: paused, **marks})
        return made

    trials = [
        trial(0, [3.0, 2.0], state=TrialState.COMPLETE),
        trial(1, [4.0], paused=0),
        trial(2, [2.5], state=TrialState.FAIL),  # goes on as 3, and counts once
        trial(3, [2.5, 2.4], paused=1, **{names.PREDECESSOR: 2}),
        trial(4, None),
    ]
    assert count_rungs(trials, "minimize") == [RungCount(0, 3, 1, 2.5), RungCount(1, 2, 1, 2.0)]
    assert [each.best for each in count_rungs(trials, "maximize")] == [4.0, 2.4]
    assert count_rungs(trials[4:], "minimize") == []


def test_paths_of_a_proxy():
    assert [check_prefix(path) for path in ("", "/", "/hpo", "/team/hpo/")] == ["", "", "/hpo", "/team/hpo"]
    for path in ("hpo", "//evil.example", "/a/../b", '/a"b', "/a b", "/a?b", "/a%2fb"):
        with pytest.raises(ConfigError, match="no path of a proxy"):
            check_prefix(path)
    for path in ("/dashboard", "/studies/x", "/api"):
        with pytest.raises(ConfigError, match="paths of its own"):
            check_prefix(path)


def test_every_path_of_optuna_dashboard_is_known():
    """A prefix may not begin with one of them."""
    routes = optuna_dashboard.wsgi(optuna.storages.InMemoryStorage()).routes
    assert {re.split(r"[/<]", route.rule)[1] for route in routes} - {""} <= OWN_PATHS


def test_what_a_proxy_cannot_be(make_site, tmp_path):
    site = make_site()
    for proxy in ("nginx", "10.0.0.0/8", "*"):
        with pytest.raises(ConfigError, match="expected the IP address"):
            Dashboard(site.store, tmp_path / "a", token=TOKEN, port=0, trusted_proxy=proxy)
