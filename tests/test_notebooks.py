"""House rules of the notebooks and the smoke study from end to end."""

import ast
import json
import re
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import NOTEBOOKS, ROOT, papermill

import tracekd_utils as tk

CONDITIONS = ("direct", "vanilla", "correct", "incorrect")  # the default grid
TIMES = ("seconds", "train_tokens_per_s", "peak_memory_gib")


def cells(name, kind="code"):
    content = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return [c for c in content if c["cell_type"] == kind]


def test_the_notebooks_of_the_study_are_there():
    walk = ("00_run_study", "01_decompose_microworld", "02_corrupt_traces", "03_finetune_student")
    assert set(NOTEBOOKS) >= {*walk, "04_score_outputs", "05_analyse_disconnect"}
    assert all(tk.find_room(name) in NOTEBOOKS for name in tk.dataset_names())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_house_rules(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    code, text = cells(name), path.read_text()
    title = "".join(cells(name, "markdown")[0]["source"])
    assert re.match(rf"# {name[:2]} · .*\?", title) and "| needs |" in title
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1 and tagged[0] is code[0]
    for line in "".join(tagged[0]["source"]).splitlines():
        assert re.search(r"^\w+ = .*  # \S", line), f"no literal with its reason: {line}"
        ast.literal_eval(ast.parse(line).body[0].value)
    checked = f'tk.check_parameters("{name}", globals())'
    assert any(checked in "".join(c["source"]) for c in code[:4])
    assert max(len("".join(c["source"]).splitlines()) for c in code) <= 30
    assert path.stat().st_size < 1_000_000
    paths = re.findall(
        r"(?<![\w.])/(?:home|root|work|Users|tmp|mnt|opt)/\S{0,40}|[A-Z]:\\\\\S*", text
    )
    assert not paths, paths[:3]
    assert "application/vnd.jupyter.widget" not in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_were_executed_in_order(name):
    code = cells(name)
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]


def test_every_notebook_finds_the_project_by_the_same_cell():
    (source,) = {"".join(cells(name)[1]["source"]) for name in NOTEBOOKS}
    assert "FileNotFoundError" in source


def test_outside_of_the_project_a_notebook_says_what_to_do(tmp_path):
    source = "".join(cells("01_decompose_microworld")[1]["source"])
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert f"FileNotFoundError: {tmp_path} lies in no copy of the project" in done.stderr
    assert "papermill --cwd" in done.stderr
    done = subprocess.run(
        [*command[:2], source + "\nprint(root)"], cwd=ROOT / "data", text=True, capture_output=True
    )
    assert done.stdout.strip() == str(ROOT)


def runs(workspace, study="*"):
    """{condition: folder of results} of a study."""
    return {
        json.loads(p.read_text())["parameters"]["condition"]: p.parent
        for p in sorted(workspace.glob(f"data/results/{study}/*/metrics.json"))
    }


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_smoke_study_runs_from_end_to_end(smoke):
    assert smoke.process.returncode == 0, smoke.process.stderr[-4000:]
    out = (smoke.workspace / "00_run_study-out.ipynb").read_text()
    assert all(re.search(rf"\b{c}\b", out) for c in CONDITIONS)


def test_01_and_02_leave_what_they_promise(smoke):
    data = smoke.workspace / "data"
    examples = tk.read_examples(data / "interim/microworld/examples.jsonl")
    assert {e.split for e in examples} == set(tk.SPLITS)
    found = json.loads((data / "results/smoke/decomposition.json").read_text())
    assert found["kept"] == len(examples) and found["disagreements"] == []
    assert {a["all_same"] for a in found["agreement"].values()} == {1.0}
    checks = json.loads((data / "results/smoke/manipulation_checks.json").read_text())
    right, wrong = (checks["conditions"][c] for c in ("correct", "incorrect"))
    assert right["facts_mean"] == wrong["facts_mean"] > 1
    assert (right["label_truth"], right["facts_truth"]) == (1.0, 1.0)
    assert (wrong["label_truth"], wrong["facts_truth"]) == (0.0, 0.0)
    assert 0 < checks["chance"]["facts_truth"] < 1 and checks["chance"]["non_gold_min"] >= 3
    assert sum(wrong["labels"].values()) == wrong["n"] == checks["rows"]["train"]
    assert checks["conditions"]["vanilla"]["reason"]


def test_rows_differ_between_conditions_in_the_trace_alone(smoke):
    folder = smoke.workspace / "data/interim/microworld/sft/controlled"
    by_condition = {c: tk.read_jsonl(folder / f"{c}-dose1-seed0.jsonl") for c in CONDITIONS}
    trained = (by_condition[c] for c in ("vanilla", "correct", "incorrect"))
    for rows in zip(*trained, strict=True):
        assert len({(r["id"], r["split"], r["prompt"]) for r in rows}) == 1
        answers = {r["target"].rpartition("\n")[2] for r in rows}
        assert len(answers) == 1 and len({r["target"] for r in rows}) == 3


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_run_leaves_what_the_contract_promises(smoke, condition):
    folder = runs(smoke.workspace, "smoke")[condition]
    metrics, traced = metrics_of(folder), condition != "vanilla"
    rows = tk.read_parquet(folder / "predictions.parquet")
    assert (
        metrics["parameters"].items()
        >= {
            "dataset": "microworld",
            "student": "tiny",
            "condition": condition,
            "protocol": "controlled",
            "seed": 0,
            "n_train": 24 * (condition != "direct"),
        }.items()
    )
    assert metrics["n_test"] == len(rows) == 12
    for name in ("answer_ok", "label_ok", "facts_ok", "trace_ok", "parsed_ok"):
        shares = [r[name] for r in rows]
        assert metrics[name] == (None if None in shares else sum(shares) / 12)
    assert (metrics["trace_ok"] is not None) is (metrics["quadrants"] is not None) is traced
    if traced:
        cells_ = metrics["quadrants"]
        assert set(cells_) == {"TP", "FP", "FN", "TN"} and sum(cells_.values()) == 12
        assert (cells_["TP"] + cells_["FN"]) / 12 == pytest.approx(metrics["trace_ok"])
        assert (cells_["TP"] + cells_["FP"]) / 12 == pytest.approx(metrics["answer_ok"])
    assert metrics["seconds"] > 0 and 0 < metrics["peak_memory_gib"] < 8
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(metrics["versions"])
    assert re.fullmatch(r"[0-9a-f]{64}", metrics["data_hash"])
    assert re.fullmatch(rf".*{condition}.*-[0-9a-f]{{8}}", folder.name)
    if condition == "direct":
        assert not (folder / "training_curve.csv").exists()
        return
    assert metrics["train_tokens_per_s"] > 0
    curve = pd.read_csv(folder / "training_curve.csv")
    assert {"step", "loss", "eval_loss"} <= set(curve) and curve["loss"].notna().sum() == 3
    adapter = smoke.workspace / "data/runs" / folder.name / "adapter"
    assert (adapter / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_predictions_are_rescored_from_their_own_text(smoke, condition):
    folder = runs(smoke.workspace, "smoke")[condition]
    examples = {
        e.id: e
        for e in tk.read_examples(smoke.workspace / "data/interim/microworld/examples.jsonl")
    }
    rows, metrics = tk.read_parquet(folder / "predictions.parquet"), metrics_of(folder)
    assert metrics["layout"] == ("none" if condition == "vanilla" else "before")
    assert metrics["finished"] == sum(r["finished"] for r in rows) / len(rows)
    assert len({r["id"] for r in rows}) == len(rows)
    for r in rows:
        e = examples[r["id"]]
        assert e.split == "test" and len(r["output_ids"]) <= 24
        expected = tk.score(tk.parse_output(r["output"], e), e, metrics["layout"])
        assert {k: r[k] for k in expected} == expected
        assert r["finished"] is (len(r["output_ids"]) < 24)
        assert (r["trace_tokens"] is None) is (condition == "vanilla")


def test_every_figure_has_its_picture_and_its_numbers(smoke):
    figures = smoke.workspace / "figures/smoke"
    names = {p.stem for p in figures.iterdir()}
    assert len(names) >= 7 and all(re.match(r"\d\d_\w+$", n) for n in names)
    for name in names:
        svg, png, csv = (figures / f"{name}.{kind}" for kind in ("svg", "png", "csv"))
        assert svg.read_bytes()[:5] == b"<?xml" and png.read_bytes()[1:4] == b"PNG"
        assert len(pd.read_csv(csv)) > 0
    assert {"05_accuracy", "05_quadrants", "05_trace_length", "05_training_curves"} <= names


def test_a_second_smoke_study_trains_and_draws_the_same(smoke):
    folder = smoke.workspace
    kept = [
        p
        for pattern in ("data/runs/*/adapter/*", "data/results/smoke/*/*", "figures/**/*.*")
        for p in folder.glob(pattern)
    ]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept}
    done = papermill(folder, "00_run_study", "-p", "profile", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    for path, (content, changed) in before.items():
        assert path.read_bytes() == content, path
        assert path.stat().st_mtime_ns == changed or "figures" in path.parts, path
    assert len(runs(folder, "smoke")) == 4


def test_a_failed_run_stops_no_other_and_is_listed(smoke, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEKD_DATA_DIR", str(tmp_path))
    (tmp_path / "babi/en").mkdir(parents=True)
    (tmp_path / "babi/en/qa1_single-supporting-fact_train.txt").write_text("cut\n")
    done = papermill(
        smoke.workspace,
        "00_run_study",
        "-p",
        "profile",
        "smoke",
        "-p",
        "dataset",
        "babi",
        "-p",
        "conditions",
        "direct,correct",
    )
    assert done.returncode != 0
    last = done.stderr[-6000:]
    assert "qa1_single-supporting-fact_train.txt, line 1" in last and "steps failed" in last
    for step in (
        "10_decompose_babi",
        "02_corrupt_traces",
        "condition=correct",
        "05_analyse_disconnect",
    ):
        assert step in last
    assert not list(smoke.workspace.glob("data/interim/babi/*"))
    assert not list(smoke.workspace.glob("data/results/*babi*/*"))


def test_save_figure_gives_the_same_bytes_twice(outside_root):
    data, written = pd.DataFrame({"x": [1, 2, 3], "y": [0.1, 1 / 3, 2.0]}), []
    for _ in range(2):
        tk.use_style()
        fig, axis = plt.subplots()
        axis.errorbar(data["x"], data["y"], yerr=0.1)
        axis.set(title="y over x", xlabel="x")
        paths = tk.save_figure(fig, "study/05_test", data)
        written.append([p.read_bytes() for p in paths])
        plt.close(fig)
        time.sleep(1.1)  # a date would have moved on
    assert written[0] == written[1]
    assert [p.name for p in paths] == ["05_test.svg", "05_test.png", "05_test.csv"]
    assert paths[2].read_text() == "x,y\n1,0.1\n2,0.333333\n3,2\n"
    assert all(p.is_relative_to(outside_root) for p in paths)
