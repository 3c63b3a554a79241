"""`make figures` runs a notebook for every committed figure, and each figure is complete."""

import ast
import json
import re
import shutil
import subprocess
from collections import defaultdict

import pytest
from conftest import ROOT, make_workspace, papermill

FILES = sorted(
    p.relative_to(ROOT / "figures") for p in (ROOT / "figures").rglob("*") if p.is_file()
)
NAMES = sorted({p.with_suffix("").as_posix() for p in FILES})


def make_figures(folder, run):
    """`make figures` in a folder that has only the names of the results; `run` runs a notebook."""
    for path in (ROOT / "data/results").rglob("*.json"):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    return subprocess.run(
        ["make", "-s", "-f", ROOT / "Makefile", "-o", "venv", "figures", f"RUN={run}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """[(notebook, parameters)] that `make figures` would run."""
    done = make_figures(tmp_path_factory.mktemp("make"), "echo")
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    return [(first, dict(zip(rest[1::3], rest[2::3], strict=True))) for first, _, *rest in words]


def nodes(notebook):
    """Syntax tree of a notebook, node by node."""
    for cell in json.loads((ROOT / notebook).read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield from ast.walk(ast.parse("".join(cell["source"])))


def calls(node, *names):
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def drawn_by(notebook, parameters):
    """Pattern of the figures that a notebook draws with these parameters."""
    known = {
        "study": parameters.get("study"),
        "source.stem": parameters.get("dataset"),
        "slug": parameters.get("source", "").replace("/", "-")
        or rf"\w+_{parameters.get('run_id', '')[-8:]}",
    }
    return "|".join(
        "".join(
            re.escape(part.value)
            if isinstance(part, ast.Constant)
            else known.get(ast.unparse(part.value)) or r"[\w.-]+"
            for part in getattr(node.args[1], "values", [node.args[1]])
        )
        for node in nodes(notebook)
        if calls(node, "tk.save_figure")
    )


def test_every_committed_figure_is_drawn_by_a_job_and_every_job_draws_some(jobs):
    drawn = defaultdict(list)
    for notebook, parameters in jobs:
        pattern = re.compile(drawn_by(notebook, parameters))
        some = [name for name in NAMES if pattern.fullmatch(name)]
        assert some, f"{notebook} {parameters}: figures are not committed"
        for name in some:
            drawn[name].append(notebook)
    assert set(drawn) == set(NAMES), set(NAMES) - set(drawn)
    assert {len(found) for found in drawn.values()} == {1}


@pytest.mark.parametrize("name", NAMES)
def test_every_committed_figure_has_picture_vector_and_numbers(name):
    kinds = {p.suffix for p in FILES if p.with_suffix("").as_posix() == name}
    assert kinds == {".svg", ".png", ".csv"}


def is_set(node):
    return (
        isinstance(node, (ast.Set, ast.SetComp))
        or calls(node, "set", "frozenset")
        or (isinstance(node, ast.BinOp) and (is_set(node.left) or is_set(node.right)))
    )


def test_nothing_that_draws_walks_through_a_set(jobs):
    """Its order changes with the process: an SVG once had its texts in another order."""
    assert is_set(ast.parse("set(a) - {b}", mode="eval").body)
    for notebook in sorted({name for name, _ in jobs}):
        walked = [
            ast.unparse(node.iter)
            for node in nodes(notebook)
            if isinstance(node, (ast.For, ast.comprehension)) and is_set(node.iter)
        ]
        assert not walked, f"{notebook}: sort {walked}"


def test_a_notebook_that_fails_fails_the_target(tmp_path):
    assert make_figures(tmp_path, "false").returncode != 0


def test_saved_results_give_the_committed_bytes(tmp_path):
    """One notebook of the target for real; the others are left to `make figures`."""
    folder, name = make_workspace(tmp_path / "copy"), "stress/published-babi"
    saved = folder / f"data/results/{name}.json"
    saved.parent.mkdir(parents=True)
    shutil.copy(ROOT / saved.relative_to(folder), saved)
    done = papermill(
        folder, "08_stress_the_parser", "-p", "n_outputs", "0", "-r", "source", "published/babi"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = sorted((folder / "figures").rglob("*.*"))
    assert [p.relative_to(folder / "figures") for p in drawn] == [
        p for p in FILES if p.stem.endswith("_published-babi")
    ]
    for path in drawn:
        assert path.read_bytes() == (ROOT / path.relative_to(folder)).read_bytes(), path
