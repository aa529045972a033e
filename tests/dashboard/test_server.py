"""The dashboard as it is served, on SQLite and PostgreSQL, while a study is written to."""

import http.client
import json
import random
import socket
import threading
import urllib.parse

import optuna
import pytest

from ris_hpo.dashboard.server import Dashboard
from ris_hpo.errors import ConfigError
from tests.waiting import until


def ask(site, path, method="GET", headers=None, body=None):
    place = urllib.parse.urlsplit(site.base)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    try:
        connection.request(
            method, path, body, {"Authorization": f"Bearer {site.token}"} if headers is None else headers
        )
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_studies_trials_and_artifacts_are_served(make_site):
    site = make_site()
    status, _, body = ask(site, "/api/studies")
    assert status == 200
    [study] = json.loads(body)["study_summaries"]
    detail = json.loads(ask(site, f"/api/studies/{study['study_id']}")[2])
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Complete"]
    artifact = detail["trials"][0]["artifacts"][0]
    path = f"/artifacts/{study['study_id']}/{detail['trials'][0]['trial_id']}/{artifact['artifact_id']}"
    status, headers, body = ask(site, path)
    assert (status, headers["Content-Type"]) == (200, "image/svg+xml")
    assert b"k_loc of trial 0" in body
    assert "Server" not in headers
    assert headers["Cache-Control"] == "private, no-cache"  # a curve is redrawn in place as its trial goes on
    (site.folder / "artifacts" / artifact["artifact_id"]).unlink()  # as on a machine that did not run the trial
    assert ask(site, path)[0] == 404
    assert ask(site, "/static/bundle.js")[0] == 200
    assert ask(site, "/csv/1")[0] == 200


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/../../secret", "..%2fsecret", "%2e%2e/secret"])
def test_an_artifacts_name_leads_nowhere_else(make_site, name):
    """A store may say anything of its artifacts; the folder beside theirs holds what is nobody's business."""
    site = make_site()
    (site.folder / "secret").write_text("nobody's business")
    trial = site.study.ask()
    meta = {"artifact_id": name, "filename": name, "mimetype": "text/plain", "encoding": None}
    site.store.set_trial_system_attr(trial._trial_id, f"artifacts:{name}", json.dumps(meta))
    for path in (name, urllib.parse.quote(name, safe="")):
        status, _, body = ask(site, f"/artifacts/1/{trial._trial_id}/{path}")
        assert status in (400, 404)
        assert b"nobody's business" not in body
        assert b"root:" not in body


def test_nothing_without_token_and_no_change_with_it(make_site):
    site = make_site()
    for path in ("/", "/dashboard", "/api/studies", "/api/studies/1", "/static/bundle.js", "/csv/1"):
        assert ask(site, path, headers={})[0] == 401
    assert ask(site, "/api/studies/1", "DELETE", headers={})[0] == 401
    assert ask(site, "/api/studies/1", "DELETE")[0] == 403
    body = json.dumps({"study_name": "renamed"})
    assert ask(site, "/api/studies/1/rename", "POST", body=body)[0] == 403
    assert [study.study_name for study in optuna.get_all_study_summaries(site.store)] == ["wide"]


def test_read_write_form_can_rename(make_site):
    site = make_site(read_write=True)
    body = json.dumps({"study_name": "renamed"})
    headers = {"Authorization": f"Bearer {site.token}", "Content-Type": "application/json"}
    assert ask(site, "/api/studies/1/rename", "POST", headers=headers, body=body)[0] == 201
    assert [study.study_name for study in optuna.get_all_study_summaries(site.store)] == ["renamed"]


def follow(site, trials):
    """Write trials from another thread while polling as the page does."""
    writer = threading.Thread(target=lambda: site.study.optimize(site.objective, n_trials=trials))
    writer.start()

    def shown():
        status, _, body = ask(site, "/api/studies/1")
        assert status == 200
        return [trial["state"] for trial in json.loads(body)["trials"]].count("Complete") == 2 + trials

    until(shown, "page with every trial")
    writer.join()


def test_a_study_is_followed_while_it_runs_on_sqlite(make_site):
    follow(make_site(), trials=10)


@pytest.mark.postgres
def test_a_study_is_followed_while_it_runs_on_postgres(make_site, postgres):
    follow(make_site(postgres.url()), trials=10)


def test_address_in_use_and_unknown_host_are_one_line(make_site, tmp_path):
    site = make_site()
    port = urllib.parse.urlsplit(site.base).port
    with pytest.raises(ConfigError, match="--port 0 takes a free port"):
        Dashboard(site.store, tmp_path / "a", token=site.token, port=port)
    with pytest.raises(ConfigError, match="cannot listen on"):
        Dashboard(site.store, tmp_path / "a", token=site.token, host="no.such.host.invalid")
    with pytest.raises(ConfigError, match="at least 16"):
        Dashboard(site.store, tmp_path / "a", token="short")


def test_loopback_unless_asked(make_site, tmp_path):
    site = make_site()
    assert not site.dashboard.exposed
    assert site.dashboard.login_url == f"{site.base}/studies?token={site.token}"
    with Dashboard(site.store, tmp_path / "a", token=site.token, host="0.0.0.0", port=0) as everywhere:
        assert everywhere.exposed
        assert everywhere.url.startswith("http://127.0.0.1:")


def test_slow_and_malformed_visitors_do_not_stop_it(make_site):
    site = make_site()
    place = urllib.parse.urlsplit(site.base)
    with socket.create_connection((place.hostname, place.port)) as silent:
        silent.sendall(b"GET /dashboard HTTP/1.1\r\nHost: ")
        for junk in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", random.Random(1).randbytes(200) + b"\r\n\r\n"):
            with socket.create_connection((place.hostname, place.port)) as connection:
                connection.sendall(junk)
                connection.settimeout(5)
                assert b" 200 " not in connection.recv(1000)
        assert ask(site, "/api/studies")[0] == 200
