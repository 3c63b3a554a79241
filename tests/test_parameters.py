"""Wrong parameters are refused before anything starts, by every way of starting."""

import json
import subprocess
import sys

import pytest
from conftest import NOTEBOOKS, make_workspace, papermill
from papermill.translators import PythonTranslator

import tracekd_utils as tk

RUN = "03_finetune_student"
DEFAULTS = tk.notebook_defaults(RUN) if RUN in NOTEBOOKS else {}
WRONG = [
    ({"sed": 3}, "sed.*seed"),
    ({"batchsize": 3}, "batchsize.*batch_size"),
    ({"seed": "one"}, "seed.*'one'.*int"),
    ({"seed": 1.0}, "seed.*float.*int"),
    ({"seed": True}, "seed.*bool.*int"),
    ({"seed": None}, "seed.*int"),
    ({"seed": -1}, "seed.*-1.*range.*equal to 0"),
    ({"epochs": 101}, "epochs.*101.*100"),
    ({"dose": 1.5}, "dose.*1.5.*range"),
    ({"dose": float("nan")}, "dose.*nan"),
    ({"dose": "half"}, "dose.*float"),
    ({"learning_rate": 0}, "learning_rate.*range"),
    ({"batch_size": -1}, "batch_size.*range"),
    ({"quantize": "maybe"}, "quantize.*bool"),
    ({"quantize": 0}, "quantize.*bool"),
    ({"study": "../elsewhere"}, "study"),
    ({"protocol": "publishd"}, "protocol.*controlled"),
    ({"dataset": "bab"}, "dataset.*microworld, babi.*'babi'"),
    ({"student": "smollm2"}, "student.*tiny, smollm2-135m.*'smollm2-135m'"),
    ({"student": ""}, "student.*tiny"),
    ({"condition": "corect"}, "condition.*direct, vanilla, correct, incorrect.*'correct'"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=[str(g) for g, _ in WRONG])
def test_a_wrong_parameter_is_named_with_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        tk.check_parameters(RUN, {**DEFAULTS, **given})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"conditions": "correct,incorect"}, "incorect.*'incorrect'"),
        ({"conditions": ""}, "condition.*vanilla"),
        ({"n_train": -1}, "n_train.*range"),
    ],
)
def test_a_list_of_conditions_is_checked_one_by_one(given, message):
    name = "02_corrupt_traces"
    with pytest.raises(ValueError, match=message):
        tk.check_parameters(name, {**tk.notebook_defaults(name), **given})


def test_an_unknown_notebook_is_refused_with_the_nearest():
    for call in (tk.check_parameters, lambda name, values: tk.run_notebook(name, **values)):
        with pytest.raises(ValueError, match="03_finetune.*'03_finetune_student'"):
            call("03_finetune", {})


@pytest.mark.parametrize("name", [RUN, "01_decompose_microworld"])
def test_a_missing_parameter_is_named(name):
    values = tk.notebook_defaults(name)
    del values["dataset"]
    with pytest.raises(ValueError, match="dataset"):
        tk.check_parameters(name, values)


@pytest.mark.parametrize(
    "given, resolved",
    [
        ({"quantize": "false"}, False),
        ({"quantize": "False"}, False),
        ({"quantize": False}, False),
        ({"quantize": "TRUE"}, True),
        ({"dose": 1}, 1.0),
        ({"dose": 0}, 0.0),
        ({"student": "Qwen/Qwen3-1.7B"}, "Qwen/Qwen3-1.7B"),
        ({"seed": 2**31 - 1}, 2**31 - 1),
    ],
)
def test_values_are_resolved_and_written_back(given, resolved):
    values = {**DEFAULTS, **given}
    out = tk.check_parameters(RUN, values)
    (name,) = given
    assert out[name] == values[name] == resolved
    assert type(out[name]) is type(values[name]) is type(resolved)
    assert set(out) == set(DEFAULTS)


def in_kernel(**given):
    """Globals of a kernel after papermill's cell: names of the session are there too."""
    cell = PythonTranslator.codify(given)
    return {**DEFAULTS, **given, "In": ["", "seed = 0  # defaults", cell], "Path": 1, "i": 2}


def test_in_a_kernel_only_the_injected_names_count_as_given():
    values = in_kernel(quantize="false", dose=1)
    assert tk.check_parameters(RUN, values)["quantize"] is False
    assert values["quantize"] is False and values["dose"] == 1.0
    with pytest.raises(ValueError, match="sed.*seed"):
        tk.check_parameters(RUN, in_kernel(sed=3))
    assert tk.check_parameters(RUN, {**DEFAULTS, "In": ["", "sed = 3"], "sed": 3})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_defaults_are_allowed_and_an_empty_study_is_the_datasets_name(name):
    defaults = tk.notebook_defaults(name)
    expected = dict(defaults)
    if expected.get("dataset") and "study" in expected:
        expected["study"] = expected["study"] or expected["dataset"]
    assert tk.check_parameters(name, dict(defaults)) == expected


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_limits_name_parameters_and_hold_for_both_ends(name):
    limits = tk.lesson(name).LIMITS
    defaults = tk.notebook_defaults(name)
    assert set(limits) <= set(defaults)
    for key, rule in limits.items():
        outside = [*rule, "?"][-1] if isinstance(rule, tuple) else rule[1] + 1
        with pytest.raises(ValueError, match=key):
            tk.check_parameters(name, {**defaults, key: outside})


def test_run_notebook_refuses_before_a_kernel_and_before_heavy_imports(tmp_path):
    workspace = make_workspace(tmp_path)
    code = """
import json, subprocess, sys, time
def started(*a, **k): raise SystemExit("a process was started")
subprocess.Popen = started
begun = time.monotonic()
import tracekd_utils as tk
messages = []
for wrong in (dict(sed=3), dict(seed="one"), dict(student="smol"), dict(dose=2.0)):
    try: tk.run_notebook("03_finetune_student", **wrong)
    except ValueError as error: messages.append(str(error))
heavy = [m for m in ("torch", "transformers", "scipy", "sklearn") if m in sys.modules]
print(json.dumps([messages, heavy, time.monotonic() - begun]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workspace, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    messages, heavy, seconds = json.loads(done.stdout)
    assert [
        m for m, k in zip(messages, ("sed", "seed", "student", "dose"), strict=True) if k in m
    ] == messages and len(messages) == 4
    assert heavy == [] and seconds < 3
    assert [p.name for p in (workspace / "data").iterdir()] == ["datasets.toml"]


@pytest.mark.parametrize(
    "options, message",
    [
        (("-p", "sed", "3"), "ValueError: parameter of 03_finetune_student: 'sed'"),
        (("-r", "seed", "one"), "ValueError: parameter seed = 'one'"),
    ],
)
def test_plain_papermill_fails_loudly(tmp_path, options, message):
    workspace = make_workspace(tmp_path)
    done = papermill(workspace, RUN, *options)
    assert done.returncode != 0 and message in done.stderr
    assert [p.name for p in (workspace / "data").iterdir()] == ["datasets.toml"]


def test_quantize_false_means_false_in_a_real_run(smoke):
    options = {
        "student": "tiny",
        "study": "unquantised",
        "epochs": 1,
        "quantize": "false",
        "max_new_tokens": 8,
    }
    done = papermill(
        smoke.workspace, RUN, *(x for k, v in options.items() for x in ("-p", k, str(v)))
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [tk.read_json(path) for path in smoke.workspace.glob("data/runs/*/run.json")]
    (record,) = [r for r in records if r["studies"] == ["unquantised"]]
    assert record["parameters"]["quantize"] is False
