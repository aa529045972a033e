"""No file that is read can run code: a look at every call of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ris_hpo

SOURCES = sorted(Path(ris_hpo.__file__).parent.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NEVER = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "yaml.load",
    "pd.read_pickle",
}
ONLY_WITH = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
CODE_BY_DESIGN = {
    ("learning/bundle.py", "torch.export.load"),  # documented, and no command calls it
    ("results/notices.py", "subprocess.run with a shell"),  # a command that the user gave as --notify
}


def offences(source: str) -> Iterator[str]:
    """What in a source could run what a file, a store or a visitor says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from (f"import {name}" for name in modules if name.partition(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {each.arg: each.value for each in node.keywords}
            if name in NEVER or name.endswith("export.load"):
                yield name
            if name in ONLY_WITH:
                keyword, wanted = ONLY_WITH[name]
                found = given.get(keyword)
                if not isinstance(found, ast.Constant) or found.value is not wanted:
                    yield f"{name} without {keyword}={wanted}"
            shell = given.get("shell")
            if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
                yield f"{name} with a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    place = path.relative_to(Path(ris_hpo.__file__).parent).as_posix()
    assert [each for each in offences(path.read_text()) if (place, each) not in CODE_BY_DESIGN] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "eval('1')", "np.load(f)", "np.load(f, allow_pickle=x)",
        "torch.load(f, weights_only=False)", "torch.load(f)", "subprocess.run(c, shell=True)", "os.system(c)",
        "torch.export.load(f)",
    ],
)  # fmt: skip
def test_the_look_finds_what_it_is_for(source: str) -> None:
    assert list(offences(source))
