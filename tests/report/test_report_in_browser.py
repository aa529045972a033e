"""The report as a browser shows it: on a desk, on a phone, in the dark and on paper."""

import base64

import pytest

from ris_hpo.report.html import write_report
from ris_hpo.store import attributes as names
from tests.report.synthetic import make_study

pytestmark = pytest.mark.browser

WINNER = {
    "winner": "trial 3", "distinguishable": True, "verdict": "Trial 3 is better.", "method": "Paired.",
    "base_mean": 2.0, "peers": [],
    "candidates": [{"name": "trial 3", "mean": 1.7, "difference": -0.3, "low": -0.4, "high": -0.2, "searched": 1.6}],
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    study = make_study(trials=80)
    study.set_user_attr(names.WINNER, WINNER)
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(study, path)
    return path


@pytest.fixture
def shown(browser, page):

    def show(width, height, mobile=False):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )
        browser.get(f"file://{page}")
        return browser

    return show


def measured(browser, script):
    return browser.execute_script(f"return {script}")


@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (768, True), (390, True), (320, True)])
def test_it_fits_every_width_and_text_stays_readable(shown, width, mobile):
    browser = shown(width, 900, mobile)
    assert measured(browser, "document.scrollingElement.scrollWidth") <= width
    visible = "[...document.querySelectorAll('svg text')].filter(t => t.textContent && t.getClientRects().length)"
    sizes = measured(browser, f"{visible}.map(t => t.getBoundingClientRect().height)")
    assert len(sizes) > 60
    assert min(sizes) > 7
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    shown_forms = "[...document.querySelectorAll('.wide, .narrow')].filter(e => e.offsetParent).map(e => e.className)"
    assert set(measured(browser, shown_forms)) == {"narrow" if width < 640 else "wide"}


def test_the_dark_form_is_dark_and_keeps_its_contrast(shown):
    browser = shown(1280, 900)
    light = measured(browser, "getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = measured(browser, "getComputedStyle(document.body).backgroundColor")
    text = measured(browser, "getComputedStyle(document.querySelector('svg text')).fill")

    def brightness(colour):
        return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])

    assert brightness(light) > 600
    assert brightness(dark) < 120
    assert brightness(text) > 400


def test_it_prints_on_a_few_pages(shown):
    browser = shown(1280, 900)
    printed = browser.execute_cdp_cmd(
        "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    )
    document = base64.b64decode(printed["data"])
    assert document.startswith(b"%PDF")
    assert 3 <= document.count(b"/Type /Page\n") + document.count(b"/Type /Page/") <= 12
