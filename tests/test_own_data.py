"""A dataset of somebody's own goes through 02, 03, 04 and 05 by the README alone."""

import json
import shutil

import pytest
from conftest import ROOT, make_workspace, papermill

import tracekd_utils as tk

COLOURS = ("red", "green", "blue", "white", "black")


def examples():
    """Ten questions by hand: the colour of a thing, or which of two is larger."""
    for k, colour in enumerate(COLOURS):
        facts = [f"The cup is {colour}.", "The mug is larger than the cup.", "The plate is old."]
        common = {"dataset": "own", "facts": facts, "split": ("train", "test")[k > 2]}
        asked = {"question": "Which colour has the cup?", "label": "colour"}
        yield {"id": f"own/c{k}", **common, **asked, "gold_facts": facts[:1], "answers": [colour]}
        common["split"] = ("train", "validation", "test")[min(k, 2)] if k < 3 else "train"
        asked = {"question": f"Which is larger, {k}?", "label": "size"}
        yield {"id": f"own/s{k}", **common, **asked, "gold_facts": facts[1:2], "answers": ["mug"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which the README's two files were written, and its two loops were run."""
    folder = make_workspace(tmp_path_factory.mktemp("own"))
    readme = (ROOT / "README.md").read_text()
    card = readme.split("## Your own data")[1].split("```")[1]
    lines = [line.strip() for line in card.strip().splitlines()]
    own = folder / "data" / "interim" / "own"
    tk.write_atomic(own / "card.toml", "\n".join(lines))
    tk.write_jsonl(own / "examples.jsonl", examples())
    runs = []
    for notebook in ("02_corrupt_traces", "03_finetune_student"):
        runs.append(papermill(folder, notebook, "-r", "dataset", "own", "-r", "student", "tiny"))
    for notebook in ("04_score_outputs", "05_analyse_disconnect"):
        runs.append(papermill(folder, notebook, "-r", "study", "own"))
    return folder, runs


def test_ten_examples_go_through_the_notebooks(project):
    folder, runs = project
    for done in runs:
        assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("data/results/own/*/metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["parameters"]["dataset"] == "own" and metrics["n_test"] == 2
    assert metrics["parameters"]["epochs"] == 2 and sum(metrics["quadrants"].values()) == 2
    assert list(folder.glob("figures/own/05_accuracy.svg"))


def test_a_row_that_breaks_the_contract_is_named(project):
    folder, _ = project
    path = folder / "data" / "interim" / "own" / "examples.jsonl"
    before = path.read_text()
    path.write_text(before.replace('"label": "size"', '"label": "sise"', 1))
    done = papermill(folder, "02_corrupt_traces", "-r", "dataset", "own", "-r", "student", "tiny")
    path.write_text(before)
    assert done.returncode != 0
    assert "examples.jsonl, row 2: example 'own/s0': label 'sise' is none of" in done.stderr


def test_another_dataset_is_refused_in_the_study(project):
    folder, _ = project
    kept = sorted(p for p in folder.glob("data/results/**/*") if p.is_file())
    options = ("-r", "dataset", "microworld", "-r", "study", "own", "-r", "student", "tiny")
    for notebook in ("01_decompose_microworld", "02_corrupt_traces", "03_finetune_student"):
        given = options[:6] if notebook.startswith("01") else options
        done = papermill(folder, notebook, *given)
        assert done.returncode != 0 and "'own' holds the dataset own" in done.stderr
    assert sorted(p for p in folder.glob("data/results/**/*") if p.is_file()) == kept
    shutil.rmtree(folder / "data" / "runs", ignore_errors=True)
