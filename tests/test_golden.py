"""What the code gave before its refactoring, in golden.json, and what it gives now.

golden.json holds, for every committed run: its identity, hashes of its score rows as
they are stored and as its outputs are read and scored again, and its statistics; then
hashes of training files, the tensors of a small adapter, and the re-audit's rows.

02 is run for most training files; with GOLDEN=all in the environment for all of them.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, make_workspace, papermill

import tracekd_utils as tk

GOLDEN = Path(__file__).with_name("golden.json")
RESULTS = ROOT / "data" / "results"
DATASETS = ("microworld", "babi", "cotempqa", "marco")

# -------------------------------------------- what has to follow the helper's interface


def stored_rows(folder):
    """Rows of a run as they are stored: id, scores and, if there, `output`."""
    return tk.read_parquet(folder / "predictions.parquet")


def rescore(output, example, metrics):
    """Score row of one output under the protocol and the condition of its run."""
    return tk.lesson("04_score_outputs").score_output(output, example, metrics, {})


def current_identity(parameters, study):
    """(run id, hash of the training file) that the helper gives to a run of 03."""
    run = tk.resolve_run({**parameters, "study": study, "checkpoint_steps": 20})
    return run.run_id, run.data_hash


def statistics(rows):
    """Statistics of the score rows of a run."""
    return tk.disconnect_statistics(pd.DataFrame(rows))


def finetune(rows, run_dir):
    """Folder of the adapter of the tiny student after two epochs on `rows`."""
    recipe = tk.lesson("03_finetune_student")
    model, tokenizer = tk.load_student("tiny")
    train = recipe.code_rows(tokenizer, rows)
    lora = recipe.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=tk.PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    model = recipe.add_lora(model, lora, seed=0)
    arguments = recipe.training_arguments(
        run_dir / "checkpoints",
        2 * len(train) // 8,
        seed=0,
        learning_rate=5e-4,
        warmup_steps=0.1,
        per_device_train_batch_size=8,
        save_steps=20,
    )
    trainer = recipe.make_trainer(model, tokenizer.pad_token_id, train, [], arguments, epochs=2)
    tk.finetune(trainer, run_dir)
    return run_dir / "adapter"


# ----------------------------------------------------------------- accepted differences

INTENDED = {
    # folder of the study, before and now
    "studies": {"laptop": "microworld"},
    # a stricter reading moved these scores of committed outputs (a content word that is missing,
    # a label that is only mentioned): `moved` in golden.json has each by id, before and now
    "moved": 25,
    # trained on rows that 02 drew by position; it draws them by id now
    "drawn_otherwise": {"babi-smollm2-135m-swapped-controlled-seed0-9a2da904"},
    # outputs of CoTempQA that the re-audit reads with the project's parser, no longer with a
    # reader of its own: `reaudit_differs` in golden.json has each by id, before and now
    "reaudit_differs": {"answers": 9, "traces": 1},
    # these traces are no list of facts: no score of the trace, hence no quadrants
    "no_trace_scores": {
        "conditions": ("filler", "shuffled"),
        "columns": (
            "label_ok",
            "facts_precision",
            "facts_recall",
            "facts_ok",
            "trace_ok",
            "answer_in_trace",
            "trace_words",
            "trace_ok_strict",
        ),
    },
    # only columns that golden.json names are compared; these are new
    "new_columns": ("quadrant", "finished", "trace_faults", "item"),
}

# ---------------------------------------------------------------------- canonical forms


def canonical(value):
    """A value as JSON has it: numbers as floats of nine digits, NaN as null."""
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's
    if isinstance(value, dict):
        return {k: canonical(v) for k, v in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if isinstance(value, bool | str | None):
        return value
    return None if math.isnan(value) else round(float(value), 9)


def sha256(value):
    """Hash of the canonical form of a value."""
    text = json.dumps(canonical(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digests(rows, columns=None):
    """Hashes of rows in their order: of all rows, and of every column."""
    columns = sorted(columns or rows[0])
    return {
        "rows": sha256([{k: row.get(k) for k in columns} for row in rows]),
        "columns": {k: sha256([row.get(k) for row in rows])[:16] for k in columns},
    }


def differences(rows, expected, condition):
    """Columns of the rows that are not as expected, but for the intended ones."""
    nulled, found = INTENDED["no_trace_scores"], digests(rows, expected["columns"])
    odd = [k for k, v in expected["columns"].items() if found["columns"][k] != v]
    if not odd:
        assert found["rows"] == expected["rows"]
    return [
        k
        for k in odd
        if not (
            condition in nulled["conditions"]
            and k in nulled["columns"]
            and all(canonical(row.get(k)) is None for row in rows)
        )
    ]


def reaudit_rows(folder):
    """Hash and main numbers of the rows of 09, by dataset."""
    keys = (
        "student",
        "variant",
        "label_file",
        "n",
        "accuracy_released_scorer",
        "accuracy_corrected",
        "trace_ok",
        "phi_corrected",
    )
    tables = {d: json.loads((folder / f"{d}.json").read_text()) for d in ("cotempqa", "babi")}
    return {
        d: {
            "sha256": sha256(table),
            "rows": [{k: row.get(k) for k in keys} for row in table],
        }
        for d, table in tables.items()
    }


# -------------------------------------------------------------------- the small adapter


def tiny_rows():
    """56 prompts with targets in the grammar: 14 steps of 8 rows in two epochs."""
    people, places = (
        ("Mary", "John", "Sandra", "Daniel"),
        ("garden", "kitchen", "office"),
    )
    rows = []
    for i in range(56):
        one, other = people[i % 4], people[(i + 1 + i // 4 % 3) % 4]
        here, there = places[i % 3], places[(i + 1 + i // 8 % 2) % 3]
        facts = [
            f"{one} went to the {here}.",
            f"{other} walked to the {there}.",
            f"{other} took the apple.",
        ][: 2 + i % 2]
        cited = "\n- ".join(["Facts:", facts[i % len(facts)]])
        rows.append(
            {
                "prompt": "Context:\n" + "\n".join(facts) + f"\nQuestion: Where is {one}?\n",
                "target": f"<think>Question type: person-place\n{cited}</think>\n"
                f"<answer>{here}</answer>",
            }
        )
    return rows


def machine():
    """What the last digits of a training on a CPU depend on."""
    import torch

    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ][:1]
    return {
        "torch": torch.__version__,
        "cpu": (model or ["unknown"])[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(tk.resolve_device()["dtype"]),
    }


def train_tiny(run_dir):
    """Shape, sums and hash of every tensor of the adapter, trained on one thread."""
    import torch
    from safetensors.torch import load_file

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        adapter = finetune(tiny_rows(), run_dir)
    finally:
        torch.set_num_threads(threads)
    tensors = {k: v.float() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    return {
        "machine": machine(),
        "tensors": {
            k: {
                "shape": list(v.shape),
                "sum": v.double().sum().item(),
                "abs_sum": v.double().abs().sum().item(),
                "sha256": hashlib.sha256(v.numpy().tobytes()).hexdigest(),
            }
            for k, v in sorted(tensors.items())
        },
    }


# ---------------------------------------------------------------------------- the tests

golden = json.loads(GOLDEN.read_text())
RUNS = sorted(golden["runs"])
CALLS = [
    call for call in golden["training_files"] if call["often"] or os.environ.get("GOLDEN") == "all"
]


def run_of(run_id):
    """Expected values, folder, metrics and stored rows of a run."""
    folders = sorted(RESULTS.glob(f"*/{run_id}"))
    assert len(folders) == 1, f"{run_id}: {folders}"
    metrics = json.loads((folders[0] / "metrics.json").read_text())
    return SimpleNamespace(
        expected=golden["runs"][run_id],
        folder=folders[0],
        metrics=metrics,
        parameters=metrics["parameters"],
        rows=stored_rows(folders[0]),
    )


@pytest.fixture(scope="module")
def interim(tmp_path_factory, data_dir):
    """Workspace in which every dataset's notebook has run."""
    folder = make_workspace(tmp_path_factory.mktemp("golden"))
    for path in RESULTS.glob("*/*.json"):  # a committed study keeps its rules
        (folder / "data/results" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "data/results" / path.parent.name)
    for dataset in DATASETS:
        done = papermill(folder, tk.find_room(dataset))
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def examples(interim):
    """{dataset: {id: example}}"""
    return {
        d: {e.id: e for e in tk.read_examples(interim / "data/interim" / d / "examples.jsonl")}
        for d in DATASETS
    }


def test_every_committed_run_is_there():
    found = {p.parent.name for p in RESULTS.glob("*/*/metrics.json")}
    assert len(RUNS) == 44 and found >= set(RUNS)


def test_scores_that_a_stricter_reading_moved_are_listed():
    assert len(golden["moved"]) == INTENDED["moved"]
    for moved in golden["moved"]:
        (row,) = [r for r in run_of(moved["run_id"]).rows if r["id"] == moved["id"]]
        assert row[moved["score"]] == moved["now"] != moved["before"], moved


@pytest.mark.parametrize("run_id", RUNS)
def test_run_has_its_identity_and_its_metrics(run_id):
    run = run_of(run_id)
    before = run.expected
    study = INTENDED["studies"].get(before["study"], before["study"])
    assert run.folder.parent.name in (before["study"], study)
    assert run.metrics["data_hash"] == before["data_hash"]
    assert run.parameters.items() >= before["identity"].items()
    text = json.dumps(dict(sorted(before["identity"].items()))) + before["data_hash"]
    assert run_id.endswith(hashlib.sha256(text.encode()).hexdigest()[:8])
    nulled = INTENDED["no_trace_scores"]
    for key, value in before["metrics"].items():
        now = run.metrics[key]
        intended = (
            now is None
            and key in (*nulled["columns"], "quadrants")
            and run.parameters["condition"] in nulled["conditions"]
        )
        assert intended or now == value, (key, value, now)


@pytest.mark.parametrize("run_id", RUNS)
def test_stored_scores_are_those_of_before(run_id):
    run = run_of(run_id)
    assert len(run.rows) == run.expected["n_test"]
    assert not differences(run.rows, run.expected["stored"], run.parameters["condition"])


@pytest.mark.parametrize("run_id", RUNS)
def test_statistics_are_those_of_before(run_id):
    run = run_of(run_id)
    before = run.expected["statistics"]
    now = statistics(run.rows)
    nulled = INTENDED["no_trace_scores"]["conditions"]
    if run.parameters["condition"] in nulled and now["quadrants"] is None:
        assert now["n"] == before["n"]
    else:
        now, before = flat(now), flat(before)
        assert now.keys() == before.keys()
        for key, value in before.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-12, abs=1e-15)
            assert now[key] == value, key


def flat(value, name=""):
    """{path: number or text} of a nested dictionary."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}


@pytest.mark.parametrize("run_id", [k for k in RUNS if "rescored" in golden["runs"][k]])
def test_outputs_are_read_and_scored_as_before(run_id, examples):
    # the gold facts of `published` are the same set in bAbI, which has its only runs
    run = run_of(run_id)
    known = examples[run.parameters["dataset"]]
    rows = [rescore(r["output"], known[r["id"]], run.metrics) for r in run.rows]
    assert not differences(rows, run.expected["rescored"], run.parameters["condition"])


@pytest.fixture(scope="module")
def with_student(interim):
    """The workspace with SmolLM2, whose tokens 02 counts; fetched where it is not."""
    name = "data/raw/students/smollm2-135m"
    have = ROOT / name
    if not (have / "complete").exists():
        try:
            have = Path(tk.student_folder("smollm2-135m"))
        except RuntimeError as error:
            pytest.fail(str(error))
    no_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(have, interim / name, ignore=no_weights)
    return interim


def hash_of_rows(path):
    """sha256 of a training file without the key `item`, which rows have got since."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "item"} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call["options"]))
def test_training_files_are_those_of_before(call, with_student):
    given = call["options"]
    options = " ".join(f"-p {key} {value}" for key, value in given.items()).split()
    done = papermill(with_student, "02_corrupt_traces", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = with_student / "data" / "interim"
    assert call["files"] == {name: hash_of_rows(folder / name) for name in call["files"]}
    runs = [r for r in golden["runs"].items() if r[1]["training_file"] in call["files"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "INTERIM", folder)
        for run_id, run in runs:
            if run_id in INTENDED["drawn_otherwise"]:
                continue
            assert run["data_hash"] == call["files"][run["training_file"]]
            found = current_identity(run["identity"], run["study"])
            assert found == (run_id, run["data_hash"])


def test_small_adapter_has_the_tensors_of_before(tmp_path):
    before, now = golden["adapter"], train_tiny(tmp_path)
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, tensor in now["tensors"].items():
        assert tensor["shape"] == before["tensors"][name]["shape"], name
    if now["machine"] == before["machine"]:
        assert now["tensors"] == before["tensors"]
    elif now["machine"]["dtype"] == before["machine"]["dtype"]:  # other last digits
        for name, tensor in now["tensors"].items():
            assert tensor["abs_sum"] == pytest.approx(
                before["tensors"][name]["abs_sum"], rel=0.02
            ), name


def test_committed_reaudit_is_that_of_before():
    found = {k: len(v) for k, v in golden["reaudit_differs"].items()}
    assert found == INTENDED["reaudit_differs"]
    assert reaudit_rows(RESULTS / "reaudit") == golden["reaudit"]


@pytest.mark.parametrize("dataset", ["cotempqa", "babi"])
def test_reaudit_gives_the_rows_of_before(dataset, workspace, data_dir):
    done = papermill(
        workspace,
        "09_reaudit_published",
        "-p",
        "dataset",
        dataset,
        "-p",
        "results_path",
        f"golden/{dataset}.json",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads((workspace / "golden" / f"{dataset}.json").read_text())
    assert sha256(table) == golden["reaudit"][dataset]["sha256"]
