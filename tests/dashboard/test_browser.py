"""The dashboard in a real browser: log in, see the study, a live trial and a figure, and no error in the console."""

import json
import time

import optuna
import pytest
from optuna_dashboard import save_note

pytestmark = pytest.mark.browser

PATIENCE_S = 60


def wait_for(browser, condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    console = errors_in_console(browser)
    pytest.fail(f"no {what} after {PATIENCE_S} s; the page says {text_of(browser)[:500]!r}, its console {console}")


def text_of(browser):
    return browser.execute_script("return document.body ? document.body.innerText : ''")


def wait_for_text(browser, text):
    wait_for(browser, lambda: text in text_of(browser), f"'{text}'")


def errors_in_console(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def fetch(browser, method, path, body=None):
    """A request by the page itself, with its cookie: [status, text]."""
    script = """
        const done = arguments[arguments.length - 1];
        fetch(arguments[1], {method: arguments[0], body: arguments[2],
                             headers: {'Content-Type': 'application/json'}})
            .then(async answer => done([answer.status, await answer.text()]), error => done([0, String(error)]));
    """
    return browser.execute_async_script(script, method, path, body)


def test_from_login_to_a_live_trial_and_its_figure(make_site, browser):
    site = make_site()

    # without a token: the form, whatever the page
    browser.get(f"{site.base}/dashboard/studies/1")
    field = browser.find_element("name", "token")
    status = "return performance.getEntriesByType('navigation')[0].responseStatus"
    assert browser.execute_script(status) == 401
    field.send_keys("not-the-right-token")
    field.submit()
    wait_for_text(browser, "That is not the token")
    errors_in_console(browser)  # three refusals so far, each of them wanted

    # with it: the list of studies, from the form as from the link
    field = browser.find_element("name", "token")
    field.send_keys(site.token)
    field.submit()
    wait_for_text(browser, "wide")
    browser.delete_all_cookies()
    browser.get(site.dashboard.login_url)
    wait_for_text(browser, "wide")
    assert site.token not in browser.current_url
    assert browser.execute_script("return document.cookie") == ""

    # a trial appears while the page is open
    browser.get(f"{site.base}/dashboard/studies/1/trials")
    wait_for_text(browser, "Trial 1")
    assert "Trial 2" not in text_of(browser)
    site.study.optimize(site.objective, n_trials=1)
    wait_for_text(browser, "Trial 2")

    # its figure is an image that has been drawn
    browser.get(f"{site.base}/dashboard/studies/1/trials?numbers=2")
    image = wait_for(
        browser,
        lambda: browser.execute_script(
            "return [...document.images].filter(i => i.src.includes('/artifacts/') && i.complete && i.naturalWidth)[0]"
        ),
        "artifact image",
    )
    assert image.get_attribute("src").startswith(site.base)
    browser.execute_script("arguments[0].scrollIntoView()", image)

    # a click shows it large, Escape closes it
    image.click()
    large = wait_for(browser, lambda: browser.find_elements("css selector", "dialog[open] img"), "large figure")[0]
    wait_for(browser, lambda: large.size["width"] > 800, "large figure of its size")
    browser.switch_to.active_element.send_keys("\ue00c")
    wait_for(browser, lambda: not browser.find_elements("css selector", "dialog"), "figure closed")

    # plots of the study, then the log: nothing went wrong on any page
    browser.get(f"{site.base}/dashboard/studies/1/analytics")
    wait_for(browser, lambda: browser.execute_script("return document.querySelector('.js-plotly-plot')"), "plot")
    assert errors_in_console(browser) == []

    # read-only: refused with a reason, nothing changed
    status, body = fetch(browser, "DELETE", "/api/studies/1")
    assert status == 403
    assert "read-only" in json.loads(body)["reason"]
    status, body = fetch(browser, "POST", "/api/studies/1/rename", json.dumps({"study_name": "renamed"}))
    assert status == 403
    assert [study.study_name for study in optuna.get_all_study_summaries(site.store)] == ["wide"]


def test_an_artifact_cannot_run_a_script(make_site, browser, tmp_path):
    site = make_site()
    evil = tmp_path / "evil.svg"
    evil.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>document.documentElement.id='ran'</script></svg>")
    trial = site.study.ask()
    identifier = optuna.artifacts.upload_artifact(
        artifact_store=optuna.artifacts.FileSystemArtifactStore(str(tmp_path / "artifacts")),
        file_path=str(evil), study_or_trial=trial, mimetype="image/svg+xml",
    )  # fmt: skip
    browser.get(site.dashboard.login_url)
    browser.get(f"{site.base}/artifacts/1/{trial._trial_id}/{identifier}")
    assert "<svg" in browser.page_source
    assert "ran" not in browser.page_source.replace("='ran'", "")


def test_below_a_path_of_a_proxy_every_page_and_figure_is_there(make_site, make_proxy, browser):
    site = make_site(prefix="/team/hpo", trusted_proxy="127.0.0.1")
    proxy = make_proxy(site.base, "/team/hpo")
    save_note(site.study, f"![curve](/artifacts/1/{artifact_of(site)})")
    browser.get(f"{proxy.base}/studies?token={site.token}")
    browser.find_element("link text", "wide").click()
    wait_for_text(browser, "No trial is running.")
    browser.find_element("link text", "trials").click()
    wait_for_text(browser, "Trial 1")
    browser.get(f"{proxy.base}/dashboard/studies/1/trials?numbers=1")
    for page in (None, f"{proxy.base}/dashboard/studies/1/note"):
        if page is not None:
            browser.get(page)
        source = wait_for(
            browser,
            lambda: browser.execute_script(
                "return [...document.images].filter(i => i.src.includes('/artifacts/') && i.naturalWidth)[0]?.src"
            ),
            "artifact image",
        )
        assert source.startswith(f"{proxy.base}/artifacts/")
    browser.get(f"{proxy.base}/dashboard")
    wait_for_text(browser, "wide")
    paths = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    )
    assert [path for path in paths if not path.startswith(proxy.base)] == []
    assert errors_in_console(browser) == []


def artifact_of(site):
    [meta] = optuna.artifacts.get_all_artifact_meta(site.study.trials[1], storage=site.store)
    return f"{site.study.trials[1]._trial_id}/{meta.artifact_id}"
