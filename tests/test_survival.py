"""Runs that are killed, doubled, cut short or out of space: each ends as an undisturbed one
would, or with one error that says what to do.

`pytest -s tests/test_survival.py -k matrix` prints the kill matrix.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from conftest import make_workspace, notebook_functions
from test_student import make_trainer
from transformers import AutoTokenizer

import tracekd_utils as tk

TIMES = ("seconds", "train_tokens_per_s", "peak_memory_gib")
# enough training for labels that are right
RUN = {
    "student": "tiny",
    "study": "killed",
    "epochs": 100,
    "learning_rate": 0.015,
    "max_new_tokens": 64,
    "checkpoint_steps": 10,
}
WORLD = {"study": "killed", "n_train": 24, "n_validation": 12, "n_test": 96}


def start(folder, name, parameters, log="log.txt", limit=None):
    """Start a notebook by papermill, one thread, offline; its output goes to `log`."""
    command = [
        sys.executable,
        "-m",
        "papermill",
        f"notebooks/{name}.ipynb",
        f"{log}.ipynb",
        "--no-progress-bar",
        "--log-output",
        *(x for k, v in parameters.items() for x in ("-p", k, str(v))),
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=(folder / log).open("w"),
        preexec_fn=limit,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )


def finish(folder, name, parameters, log="log.txt", limit=None):
    """Run a notebook to its end: (exit status, log)."""
    process = start(folder, name, parameters, log, limit)
    return process.wait(timeout=600), (folder / log).read_text()


def run_whole(folder, name, parameters):
    status, log = finish(folder, name, parameters)
    assert status == 0, log[-3000:]
    return log


def kill_when(folder, name, parameters, reached):
    """Start a notebook and kill it and its kernel the hard way as soon as `reached()`."""
    process, end = start(folder, name, parameters), time.monotonic() + 600
    while not reached():
        assert process.poll() is None and time.monotonic() < end, (
            "ended before its kill",
            (folder / "log.txt").read_text()[-3000:],
        )
        time.sleep(0.01)
    for victim in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        victim.kill()
    process.wait()


def prepare(folder, corrupter):
    """Workspace with the training rows of `correct`: 24 train, 12 validation, 96 test."""
    make_workspace(folder)
    examples = notebook_functions("01_decompose_microworld").make_microworld(24, 12, 96)
    interim, pool = folder / "data/interim/microworld", corrupter.Pool(examples)
    tk.write_jsonl(interim / "examples.jsonl", examples)
    tk.write_jsonl(
        interim / "sft/controlled/correct-dose1-seed0.jsonl",
        [
            {
                "id": e.id,
                "split": e.split,
                "condition": "correct",
                "prompt": tk.render_prompt(e),
                "target": tk.render_target(e, corrupter.make_trace(e, "correct", pool)),
                "item": tk.item_of(e),
            }
            for e in examples
        ],
    )
    return folder


def read_run(folder):
    """Everything of a finished run that must not depend on kills."""
    (path,) = records_of(folder)
    run_dir, record = path.parent, json.loads(path.read_text())
    curve = pd.read_csv(run_dir / "training_curve.csv")
    return SimpleNamespace(
        folder=folder,
        run_dir=run_dir,
        record={k: v for k, v in record.items() if k not in TIMES},
        outputs=(run_dir / "outputs.jsonl").read_bytes(),
        adapter=(run_dir / "adapter/adapter_model.safetensors").read_bytes(),
        curve=curve[["step", "loss", "eval_loss", "learning_rate"]].fillna(0).to_numpy(),
    )


def records_of(folder):
    """The file that comes last and marks a run as finished."""
    return list(folder.glob("data/runs/*/run.json"))


def labels_right(run):
    """Share of outputs whose label is right; 0 would say that nothing was learnt."""
    examples = tk.read_examples(run.folder / "data/interim/microworld/examples.jsonl")
    known, right = {e.id: e for e in examples}, []
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "data/raw/students/tiny")
    for row in tk.read_jsonl(run.run_dir / "outputs.jsonl"):
        parsed = tk.parse_output(tokenizer.decode(row["ids"]), known[row["id"]])
        right.append(bool(tk.score(parsed, known[row["id"]])["label_ok"]))
    return sum(right) / len(right)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory, corrupter):
    """A run that two processes were started for at the same time; none was killed."""
    folder = prepare(tmp_path_factory.mktemp("unkilled"), corrupter)
    twins = [start(folder, "03_finetune_student", RUN, log) for log in ("a.txt", "b.txt")]
    statuses = [p.wait(timeout=600) for p in twins]
    logs = [(folder / log).read_text() for log in ("a.txt", "b.txt")]
    assert statuses == [0, 0], logs[0][-2000:] + logs[1][-2000:]
    run = read_run(folder)
    run.logs = logs
    return run


def copy_of(unkilled, folder):
    """Workspace of the unkilled run without its record; returns the run's folder."""
    shutil.copytree(unkilled.folder, folder)
    (record,) = records_of(folder)
    record.unlink()
    return record.parent


# A stage disturbs a run, starts it again, and returns what it did and where the run ended.


def decomposition(unkilled, folder, corrupter):
    names = ("data/interim/microworld/examples.jsonl", "data/results/killed/decomposition.json")
    for part in ("reference", "killed"):
        make_workspace(folder / part)
    run_whole(folder / "reference", "01_decompose_microworld", WORLD)
    expected = [(folder / "reference" / name).read_bytes() for name in names]
    killed, (examples, result) = folder / "killed", [folder / "killed" / n for n in names]
    kill_when(
        killed,
        "01_decompose_microworld",
        WORLD,
        lambda: "pure Python on the CPU" in (killed / "log.txt").read_text(),
    )
    assert not examples.exists() and not result.exists()
    kill_when(killed, "01_decompose_microworld", WORLD, examples.exists)
    assert examples.read_bytes() == expected[0]
    run_whole(killed, "01_decompose_microworld", WORLD)
    assert [examples.read_bytes(), result.read_bytes()] == expected
    assert not list(folder.rglob("*.partial"))
    both = [
        {k: found[k] for k in ("kept", "disagreements")}
        for found in (json.loads(result.read_text()), json.loads(expected[1]))
    ]
    return "at its start, and at its first file", *both


def training(unkilled, folder, corrupter):
    run_dir = prepare(folder, corrupter) / "data/runs" / unkilled.run_dir.name
    shutil.copytree(unkilled.folder / "data/raw", folder / "data/raw")  # the student
    at = run_dir / "checkpoints"
    status, log = finish(
        folder,
        "03_finetune_student",
        RUN,
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # as a full disk: the optimiser is larger
    assert status and not (run_dir / "adapter").exists()
    assert "could not be written" in last_error(log) and str(run_dir) in last_error(log)
    # the folder appears before its files: the hardest moment
    kill_when(folder, "03_finetune_student", RUN, (at / "checkpoint-20").exists)
    kill_when(folder, "03_finetune_student", RUN, (at / "checkpoint-60/trainer_state.json").exists)
    assert not (run_dir / "adapter").exists() and not records_of(folder)
    newest = max(at.iterdir(), key=lambda p: int(p.name.partition("-")[2]))
    cut_short(newest / "optimizer.pt")
    log = run_whole(folder, "03_finetune_student", RUN)
    assert f"{newest.name} is incomplete" in log and "step 300/300" in log
    return (
        "without space, twice in training, newest checkpoint cut short",
        *same_ends(folder, unkilled),
    )


def generation(unkilled, folder, corrupter):
    run_dir = copy_of(unkilled, folder)
    outputs = run_dir / "outputs.jsonl"
    outputs.unlink()
    kill_when(
        folder, "03_finetune_student", RUN, lambda: outputs.exists() and outputs.stat().st_size
    )
    content = outputs.read_bytes()
    assert 1 < content.count(b"\n") < 96 and not records_of(folder)
    outputs.write_bytes(content[:-20])
    log = run_whole(folder, "03_finetune_student", RUN)
    assert "step " not in log and "generated 96/96" in log
    return "after the first outputs, the last line cut", *same_ends(folder, unkilled)


def record(unkilled, folder, corrupter):
    run_dir = copy_of(unkilled, folder)
    runs = folder / "data/runs"
    runs.rename(folder / "data/kept")
    runs.write_text("a file where a folder should be")
    status, log = finish(folder, "03_finetune_student", RUN)
    assert status and "step " not in log
    assert f"{run_dir}/writable could not be written" in last_error(log)
    runs.unlink()
    (folder / "data/kept").rename(runs)
    facts = run_dir / "training.json"
    content = facts.read_bytes()
    facts.unlink()
    os.mkfifo(facts)  # read between outputs and record: nobody writes, 03 waits there
    writers = []
    kill_when(folder, "03_finetune_student", RUN, lambda: is_read(facts, writers))
    os.close(writers[0])
    assert not records_of(folder)
    facts.unlink()
    facts.write_bytes(content)
    log = run_whole(folder, "03_finetune_student", RUN)
    assert "step " not in log and "generated " not in log
    same_ends(folder, unkilled)
    path = run_dir / "outputs.jsonl"  # of a finished run, cut afterwards
    path.write_bytes(path.read_bytes()[:-20])
    log = run_whole(folder, "03_finetune_student", RUN)
    assert "made again" in log and "generated 96/96" in log
    return (
        "unwritable, between outputs and record, outputs cut in mid-line",
        *same_ends(folder, unkilled),
    )


def is_read(fifo, writers):
    """Does a process wait for the pipe to be written to? Then it goes on waiting for `writers`."""
    try:
        writers.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody has opened it
        return False
    return True


def last_error(log):
    return [line for line in log.splitlines() if "Error: " in line][-1]


def cut_short(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def same_ends(folder, unkilled):
    """What both runs came to, after everything that a run leaves was compared."""
    run = read_run(folder)
    assert run.run_dir.name == unkilled.run_dir.name
    assert run.adapter == unkilled.adapter and run.outputs == unkilled.outputs
    assert run.record == unkilled.record
    # the logged loss is a mean since the last log: the window that a kill fell into is short
    assert run.curve.shape == unkilled.curve.shape
    assert (run.curve != unkilled.curve).any(axis=1).sum() <= 2
    assert not (run.run_dir / "checkpoints").exists()
    return [
        {"label_ok": labels_right(each), "n_test": each.record["n_test"]}
        for each in (run, unkilled)
    ]


STAGES = {f.__name__: f for f in (decomposition, training, generation, record)}


@pytest.fixture(scope="module")
def matrix(unkilled, corrupter, tmp_path_factory):
    """{stage: what was done to it and what both runs came to}, two stages at a time."""
    with ThreadPoolExecutor(2) as pool:
        return {
            name: pool.submit(stage, unkilled, tmp_path_factory.mktemp("stage") / name, corrupter)
            for name, stage in STAGES.items()
        }


@pytest.mark.parametrize("stage", STAGES)
def test_kill_matrix(matrix, stage):
    done, ours, theirs = matrix[stage].result()
    print(f"\n{stage}, killed {done}\n  killed   {ours}\n  unkilled {theirs}")
    assert ours == theirs and (stage == "decomposition" or theirs["label_ok"] > 0)


def test_the_second_process_waits_and_trains_nothing(unkilled):
    assert sum("another process works on this run: waiting" in log for log in unkilled.logs) == 1
    for work in ("step 300/300", "generated 96/96"):
        assert sum(work in log for log in unkilled.logs) == 1
    first, second = sorted(unkilled.logs, key=lambda log: "waiting for it" in log)
    assert "step 300/300" in first and "Traceback" not in second


@pytest.fixture(scope="module")
def checkpoints(corrupter, tmp_path_factory):
    """Folder with the checkpoints 2 and 4 of a training."""
    examples = notebook_functions("01_decompose_microworld").make_microworld(8, 0, 0)
    rows = [{"prompt": tk.render_prompt(e), "target": tk.render_target(e, None)} for e in examples]
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = make_trainer(tk.load_student("tiny"), rows, folder, epochs=2, save_steps=2)
    tk.finetune(trainer, folder)
    return folder / "checkpoints"


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ],
)
@pytest.mark.parametrize("cut", [0, 0.9, None], ids=["empty", "cut", "missing"])
def test_a_checkpoint_cut_short_falls_back_to_the_one_before(checkpoints, tmp_path, name, cut):
    folder, lines = shutil.copytree(checkpoints, tmp_path / "checkpoints"), []
    assert tk.last_checkpoint(folder, lines.append) == str(folder / "checkpoint-4")
    assert not lines
    path = folder / "checkpoint-4" / name
    path.unlink() if cut is None else cut_short(path, cut)
    assert tk.last_checkpoint(folder, lines.append) == str(folder / "checkpoint-2")
    assert [line.startswith("checkpoint-4 is incomplete") for line in lines] == [True]
    cut_short(folder / "checkpoint-2" / name, 0.5)
    assert tk.last_checkpoint(folder, lines.append) is None and len(lines) == 2


def test_the_trainer_writes_the_files_that_are_looked_at(checkpoints):
    for part in checkpoints.iterdir():
        assert {p.name for p in part.iterdir()} >= {
            "adapter_model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        }


def full_disk(path):
    """Make the next atomic write to `path` meet a device without space, by the kernel."""
    path.with_name(f".{path.name}.{os.getpid()}.partial").symlink_to("/dev/full")


@pytest.mark.parametrize(
    "write, content",
    [(tk.write_atomic, "new" * 10_000), (tk.write_json, {"new": 1}), (tk.write_jsonl, [{"a": 1}])],
)
def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, write, content):
    path = tk.write_json(tmp_path / "metrics.json", {"old": 1})
    full_disk(path)
    with pytest.raises(
        OSError,
        match=r"metrics\.json could not be written .*No space left on "
        r"device.*free some space.*again",
    ):
        write(path, content)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads(path.read_text()) == {"old": 1}


def test_an_unwritable_folder_is_one_error_that_names_it(tmp_path):
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(
        OSError,
        match=r"results/run/metrics\.json could not be written.*folder "
        "writable",
    ):
        tk.write_json(tmp_path / "results/run/metrics.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["results"]
