import http.client
import http.server
import threading
import urllib.parse
import warnings
from pathlib import Path

import optuna
import pytest
from matplotlib.figure import Figure
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.exceptions import ExperimentalWarning

from ris_hpo import drawing
from ris_hpo.dashboard.server import Dashboard
from ris_hpo.store import attributes as names
from ris_hpo.store.open import open_store

TOKEN = "correct-horse-battery"


@pytest.fixture(autouse=True, scope="session")
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class Site:
    """A served store with one study of two trials and an artifact."""

    token = TOKEN

    def __init__(self, url: str, folder: Path, **options):
        self.folder = folder
        self.store = open_store(url, heartbeat=None)
        self.study = optuna.create_study(storage=self.store, study_name="wide")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # set_metric_names is marked so
            self.study.set_metric_names(["k_loc"])
        self.study.optimize(self.objective, n_trials=2)
        self.dashboard = Dashboard(open_store(url), folder / "artifacts", token=TOKEN, port=0, **options)
        self.base = self.dashboard.url.removesuffix("/studies").removesuffix(options.get("prefix", ""))
        self._thread = threading.Thread(target=self.dashboard.run)
        self._thread.start()

    def objective(self, trial: optuna.Trial) -> float:
        rate = trial.suggest_float("optimizer.learning_rate", 1e-5, 1e-2, log=True)
        curve = [(20_000.0 * i, 2 + 4 / i + 30 * rate) for i in range(1, 11)]
        for step, value in curve:
            trial.report(value, int(step))
        trial.set_user_attr(names.EFFICIENCY, 0.5)
        heading = f"k_loc of trial {trial.number}"

        def draw(figure: Figure) -> None:
            (axes,) = drawing.frames(figure, x="scenes seen", y="k_loc", heading=heading)
            axes.plot(*zip(*curve, strict=True))

        svg = drawing.as_svg(draw, 720, 300, heading, standalone=True)
        file = self.folder / "curve.svg"
        file.write_text(svg)
        artifacts = self.folder / "artifacts"
        artifacts.mkdir(exist_ok=True)
        upload_artifact(
            artifact_store=FileSystemArtifactStore(str(artifacts)),
            file_path=str(file),
            study_or_trial=trial,
            mimetype="image/svg+xml",
        )
        return curve[-1][1]

    def close(self) -> None:
        self.dashboard.close()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.store.close()
        self.dashboard.storage.close()


class Proxy:
    """A reverse proxy that passes requests below ``path`` on as they are, and says who asked and by which scheme.

    ``stripping`` takes the path off first, as some proxies do.
    """

    def __init__(self, target: str, path: str, *, scheme: str = "http", stripping: bool = False):
        proxy = self
        self.visitor = "203.0.113.7"
        place = urllib.parse.urlsplit(target)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                if not self.path.startswith(f"{path}/"):
                    self.send_error(404)
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
                headers |= {"X-Forwarded-For": f"10.9.9.9, {proxy.visitor}", "X-Forwarded-Proto": scheme}
                behind = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
                behind.request(self.command, self.path.removeprefix(path) if stripping else self.path, body, headers)
                answer = behind.getresponse()
                content = answer.read()
                behind.close()
                self.send_response_only(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = pass_on

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.base = f"http://{self.host}{path}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)


@pytest.fixture
def make_proxy():
    proxies = []

    def make(*arguments, **options) -> Proxy:
        proxies.append(Proxy(*arguments, **options))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def make_site(tmp_path):
    sites = []

    def make(url: str | None = None, **options) -> Site:
        sites.append(Site(url or f"sqlite:///{tmp_path}/studies.db", tmp_path, **options))
        return sites[-1]

    yield make
    for site in sites:
        site.close()
