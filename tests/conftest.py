"""What tests in several folders share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings  # here first: when imported it looks for trio's random state, which selenium brings
from hypothesis.internal.conjecture import providers

from tests.postgres import Postgres

# The same examples on every machine and in every order of tests; ``make test-long`` takes the long profile.
settings.register_profile("short", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("long", settings.get_profile("short"), max_examples=2000)
settings.load_profile("short")
# drawn among others: constants of the modules that happen to be imported by then, and other tests import more of them
providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many processes as there are cores; a core is idle now and then, since some tests wait for other processes."""
    return len(os.sched_getaffinity(0))


LONGEST = ("service/test_ray.py", "faults/test_workers.py", "programs/test_examples.py", "cli/test_readme.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files go first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
    "--force-device-scale-factor=1",
)  # fmt: skip
PATIENCE_S = 60


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """One browser for all tests of a process, since its start takes seconds."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(shutil.which("chromedriver"), log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(PATIENCE_S)
    driver.set_script_timeout(PATIENCE_S)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser without anything that the test before left in it: pages, cookies, cache, screen, console."""
    for handle in chromium.window_handles[1:]:
        chromium.switch_to.window(handle)
        chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])
    chromium.get("about:blank")
    for command, arguments in (
        ("Network.clearBrowserCookies", {}), ("Network.clearBrowserCache", {}),
        ("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"}),
        ("Emulation.clearDeviceMetricsOverride", {}), ("Emulation.setEmulatedMedia", {"media": "", "features": []}),
    ):  # fmt: skip
        chromium.execute_cdp_cmd(command, arguments)
    chromium.get_log("browser")
    return chromium


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="ris", dir="/tmp"))  # a short path: a socket's may have 107 bytes
    server = Postgres(folder)
    yield server
    server.close()
    shutil.rmtree(folder, ignore_errors=True)
