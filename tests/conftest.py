"""Settings of the suite and what several test files share.

Nothing under the repository is written: in-process tests have the helper's folders in a
temporary directory, notebooks run in a copy. `TRACEKD_DATA_DIR` must name the real data.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tracekd_utils as tk  # noqa: E402

NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
settings.register_profile("tracekd", deadline=None, derandomize=True, database=None)
settings.load_profile("tracekd")


def pytest_configure(config):
    for rule in (
        "ignore::FutureWarning",
        "ignore::DeprecationWarning",
        "ignore:.*gemm_4bit_forward.*",
    ):
        config.addinivalue_line("filterwarnings", rule)


def notebook_functions(name: str, **parameters):
    """What a notebook defines: imports, functions, classes, constants and parameters."""
    return tk.lesson(name, **parameters)


def papermill(workspace: Path, name: str, *options: str, start=False):
    """Run (or only start) a notebook of the workspace by plain papermill, offline."""
    command = [
        sys.executable,
        "-m",
        "papermill",
        f"notebooks/{name}.ipynb",
        f"{name}-out.ipynb",
        "--no-progress-bar",
        "--log-output",
        *options,
    ]
    runner, extra = (
        (
            subprocess.Popen,
            {"stdout": subprocess.DEVNULL, "stderr": (workspace / "log.txt").open("w")},
        )
        if start
        else (subprocess.run, {"capture_output": True})
    )
    return runner(
        command,
        cwd=workspace,
        text=True,
        **extra,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )


def make_workspace(folder: Path) -> Path:
    """Copy of the helper, the cards and the notebooks, in which notebooks run."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tracekd_utils.py", folder)
    shutil.copy(ROOT / "data" / "datasets.toml", folder / "data")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session", autouse=True)
def outside_root(tmp_path_factory):
    """Folders that the helper writes to, away from the repository."""
    folder = tmp_path_factory.mktemp("helper")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAW", "INTERIM", "RUNS", "RESULTS", "FIGURES"):
            patch.setattr(tk, name, folder / name.lower())
        yield folder


@pytest.fixture(scope="session")
def smoke(workspace):
    """The smoke study, run once: workspace and finished process."""
    done = papermill(workspace, "00_run_study", "-p", "profile", "smoke")
    return SimpleNamespace(workspace=workspace, process=done)


@pytest.fixture(scope="session")
def data_dir():
    """Folder of the real data; its tests fail, and do not skip, where there is none."""
    folder = os.environ.get("TRACEKD_DATA_DIR", "")
    if not folder or not (Path(folder) / "babi" / "en").is_dir():
        pytest.fail(
            "TRACEKD_DATA_DIR must name the folder that holds babi/en, found "
            f"{folder!r}; .ci/run sets it to ../shared/data"
        )
    return Path(folder)


@pytest.fixture(scope="session")
def microworld():
    """480 generated examples: 240 train, 60 validation, 180 test."""
    return notebook_functions("01_decompose_microworld").make_microworld(240, 60, 180)


@pytest.fixture(scope="session")
def babi(data_dir):
    """All 20 bAbI tasks, one question a story, with what was left out."""
    return notebook_functions("10_decompose_babi", dataset="babi20").read_babi(
        data_dir / "babi" / "en", "babi20", 0
    )


@pytest.fixture(scope="session")
def corrupter():
    """Functions of 02, which holds the registry of the conditions."""
    return notebook_functions("02_corrupt_traces")


@pytest.fixture(scope="module")
def plain():
    """The tiny student in float32, its weights enlarged so that every token matters."""
    import torch

    model, tokenizer = tk.load_student("tiny", quantize=False)
    with torch.no_grad():
        for p in model.float().parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    return model, tokenizer


EXAMPLE = tk.Example(
    id="microworld/test/x",
    dataset="microworld",
    split="test",
    question="Where is the apple?",
    label="object-place",
    answers=("kitchen",),
    facts=(
        "Mary went to the garden.",
        "Mary took the apple.",
        "Mary went to the kitchen.",
        "John did not take the ball.",
    ),
    gold_facts=("Mary took the apple.", "Mary went to the kitchen."),
)


@pytest.fixture(scope="session")
def example():
    """One example whose scores can be worked out by hand."""
    return EXAMPLE
