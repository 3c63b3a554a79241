"""Cards, studies, and the other pieces of the helper that notebooks share."""

import dataclasses
import html
import os
import re
import shutil
import signal
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import ROOT, make_workspace, papermill
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import tracekd_utils as tk

CARD = """
labels = ["colour", "size"]
rows = { train = 6, validation = 2, test = 2 }
epochs = 1
answers = "all"
separators = []
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Folders of an empty project with a dataset of somebody's own."""
    for name in ("INTERIM", "RESULTS", "RUNS"):
        monkeypatch.setattr(tk, name, tmp_path / name.lower())
    tk.write_atomic(tk.INTERIM / "own" / "card.toml", CARD)
    return tmp_path


# ------------------------------------------------------------------------------------ cards
def test_every_card_of_the_repository_is_whole():
    for name in tk.dataset_names():
        card = tk.dataset(name)
        assert card.name == name and len(set(card.labels)) == len(card.labels) > 1
        assert set(card.rows) == set(tk.SPLITS) and tk.find_room(name)
        assert all(len(digest) == 64 for digest in card.source.get("sha256", {}).values())


def test_the_helper_names_no_dataset():
    text = (ROOT / "tracekd_utils.py").read_text().lower()
    assert [name for name in tk.dataset_names() if name in text] == []


def test_a_card_of_ones_own_is_found_and_read_again_when_it_changes(own):
    assert "own" in tk.dataset_names() and tk.dataset("own").labels == ("colour", "size")
    assert tk.find_room("own") is None and tk.dataset("own").max_new_tokens == 96
    path = tk.write_atomic(
        tk.INTERIM / "own" / "card.toml", CARD.replace("epochs = 1", "epochs = 3")
    )
    os.utime(path, ns=(1, 1))
    assert tk.dataset("own").epochs == 3


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("epochs = 1", "", "entry own: field epochs: .*required.*allowed fields: name, labels"),
        ("epochs = 1", "epoch = 1", "field epochs.*field epoch: .*allowed fields.*epochs"),
        ("epochs = 1", 'epochs = "one"', "field epochs: .*integer"),
        ('"all"', '"some"', "field answers: .*'all' or 'any'"),
        ("validation = 2, ", "", "field rows.validation: .*required"),
        ("validation = 2", "valid = 2", "field rows.valid"),
        ("epochs = 1", "epochs = ", " is no TOML"),
        (
            "epochs = 1",
            'epochs = 1\npublished = {context = "list"}',
            "field published.after_question: .*required.*field published.category",
        ),
    ],
)
def test_a_bad_card_names_file_entry_field_and_what_is_allowed(own, old, new, message):
    path = tk.write_atomic(tk.INTERIM / "own" / "card.toml", CARD.replace(old, new))
    os.utime(path, ns=(2, hash(new) % 10**9))
    with pytest.raises(ValueError, match=f"card.toml.*{message}"):
        tk.dataset("own")


def test_an_unknown_dataset_is_refused_with_the_nearest(own):
    with pytest.raises(ValueError, match="dataset: 'bab' is unknown.*own.*'babi'"):
        tk.dataset("bab")


def test_the_protocol_of_the_paper_needs_its_words(own):
    e = tk.Example(
        **{"id": "own/1", "dataset": "own", "split": "test", "question": "Which?"},
        **{"facts": ("a", "b"), "label": "size", "gold_facts": ("a",), "answers": ("x",)},
    )
    for call in (tk.render_prompt, lambda e, p: tk.render_target(e, None, p)):
        with pytest.raises(ValueError, match="own.*no table `published`.*controlled"):
            call(e, "published")


# ---------------------------------------------------------------------------------- studies
def test_a_study_that_holds_another_dataset_is_refused_before_anything_is_written(own):
    path = tk.write_json(tk.RESULTS / "mine" / "decomposition.json", {"dataset": "babi"})
    for notebook in ("02_corrupt_traces", "03_finetune_student", "01_decompose_microworld"):
        values = {**tk.notebook_defaults(notebook), "study": "mine"}
        with pytest.raises(ValueError, match=r"'mine' holds the dataset babi \(.*decomposition"):
            tk.check_parameters(notebook, values)
    assert list(tk.RESULTS.rglob("*.*")) == [path]
    assert tk.claim_study("mine", "babi") == tk.RESULTS / "mine"


def test_a_run_alone_marks_the_dataset_of_its_study_too(own):
    found = {"parameters": {"dataset": "marco"}}
    tk.write_json(tk.RESULTS / "s" / "a-run" / "metrics.json", found)
    with pytest.raises(ValueError, match="'s' holds the dataset marco.*metrics.json.*study=babi"):
        tk.claim_study("s", "babi")


def test_examples_that_nobody_makes_are_asked_for_with_their_path(own):
    with pytest.raises(FileNotFoundError, match="examples.jsonl is missing.*no notebook.*own"):
        tk.find_examples("own")


def metrics(condition, seed=0, dose=1.0, **more):
    given = {"condition": condition, "seed": seed, "dose": dose, "dataset": "own"}
    return {"parameters": {**given, "student": "tiny", "protocol": "controlled", **more}}


def test_runs_of_a_study_come_in_the_order_of_the_registry(own):
    runs = [metrics("mine"), metrics("incorrect"), metrics("incorrect", dose=0.5)]
    runs += [metrics("correct", seed=1), metrics("correct"), metrics("vanilla")]
    for k, found in enumerate(runs):
        tk.write_json(tk.RESULTS / "s" / str(k) / "metrics.json", found)
    arms = [(run.arm, run.seed) for run in tk.study_runs("s")]
    assert arms == [
        *(("vanilla", 0), ("correct", 0), ("correct", 1)),
        *(("incorrect, 50% of rows", 0), ("incorrect", 0), ("mine", 0)),
    ]
    tk.write_json(tk.RESULTS / "s" / "x" / "metrics.json", metrics("vanilla", protocol="published"))
    assert [r.arm for r in tk.study_runs("s")][:2] == ["vanilla", "vanilla, published"]
    tk.write_json(tk.RESULTS / "s" / "y" / "metrics.json", metrics("vanilla"))
    with pytest.raises(ValueError, match="more than one run of .*vanilla.*stale"):
        tk.study_runs("s")


def test_the_identity_of_a_run_leaves_out_what_came_later_at_its_default():
    p = tk.notebook_defaults("03_finetune_student") | {"epochs": 2, "batch_size": 8}
    name = tk.make_run_id(p, "a" * 64)
    assert tk.make_run_id({**p, "study": "x", "checkpoint_steps": 1}, "a" * 64) == name
    without = {k: v for k, v in p.items() if k != "dtype"}
    assert tk.make_run_id(without, "a" * 64) == name
    for other in ({"dtype": "bfloat16"}, {"epochs": 3}, {"seed": 1}):
        assert tk.make_run_id({**p, **other}, "a" * 64) != name
    assert tk.make_run_id(p, "b" * 64) != name


# ------------------------------------------------------------------------- a run's own files
def scored_row(k, **changes):
    right = k < 2
    row = dict.fromkeys(tk.lesson("00_run_study").SHARES, right)
    row |= {"quadrant": "TP" if right else "TN", "label": "size", "output": "x"}
    return row | {"id": f"own/{k}", "item": f"{k:012x}"} | changes


@pytest.fixture
def scored(own):
    """A study of one scored run of four items: (folder of the run, metrics, rows)."""
    rows = [scored_row(k) for k in range(4)]
    shares = dict.fromkeys(tk.lesson("00_run_study").SHARES, 0.5)
    found = metrics("correct") | shares | {"n_test": 4, "layout": "before", "has_facts": True}
    found |= {"quadrants": {"TP": 2, "FP": 0, "FN": 0, "TN": 2}, "run_id": "a", "data_hash": "x"}
    folder = tk.RESULTS / "s" / "a"
    tk.write_json(folder / "metrics.json", found)
    tk.write_parquet(folder / "predictions.parquet", rows)
    return folder, found, rows


def test_a_whole_run_is_read(scored):
    _, found, rows = scored
    (run,) = tk.study_runs("s")
    assert run.metrics == found and run.frame.to_dict("records") == rows
    tk.check_runs([run, run])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"run_id": "a"', b"\x93NUMPY\x01\x00"])
def test_a_damaged_metrics_file_is_one_error(scored, content):
    (scored[0] / "metrics.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"s/a/metrics\.json: (expected one JSON|field parameters)"
    ):
        tk.study_runs("s")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"parameters": None}, "field parameters: .*found None.*restore"),
        ({"parameters": {"dataset": "own"}}, "field parameters.student: .*required"),
        ({"layout": "above"}, "field layout: .*'before'.*found 'above'"),
        ({"has_facts": "yes"}, "field has_facts: .*boolean.*found 'yes'"),
        ({"run_id": 3}, "field run_id: .*string"),
    ],
)
def test_a_field_of_another_kind_is_named(scored, change, named):
    tk.write_json(scored[0] / "metrics.json", scored[1] | change)
    with pytest.raises(ValueError, match=rf"s/a/metrics\.json: {named}"):
        tk.study_runs("s")


@pytest.mark.parametrize("missing", ["layout", "n_test", "answer_ok", "quadrants"])
def test_a_field_that_is_missing_is_named_when_it_is_needed(scored, missing):
    left = {name: value for name, value in scored[1].items() if name != missing}
    tk.write_json(scored[0] / "metrics.json", left)
    (run,) = tk.study_runs("s")
    with pytest.raises(ValueError, match=rf"metrics\.json: field {missing} is missing; restore"):
        assert run.metrics[missing] and run.frame is not None


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda rows: [*rows, rows[1]], r"row 5: id 'own/1' stands twice"),
        (lambda rows: rows[:3], r"metrics\.json: n_test is 4, but .* give 3"),
        (lambda rows: [], "holds no row"),
        (lambda rows: [{**r, "answer_ok": "yes"} for r in rows], "row 1: field answer_ok.*'yes'"),
        (lambda rows: [*rows[:3], {**rows[3], "answer_ok": None}], "row 4: field answer_ok"),
        (
            lambda rows: [{k: v for k, v in r.items() if k != "output"} for r in rows],
            "row 1.*output",
        ),
        (lambda rows: [{k: v for k, v in r.items() if k != "item"} for r in rows], "row 1.*item"),
        (lambda rows: [*rows[:3], {**rows[3], "quadrant": "XX"}], "row 4: field quadrant.*'XX'"),
        (lambda rows: [{**r, "id": k} for k, r in enumerate(rows)], "row 1: field id: .*string"),
    ],
    ids=["twice", "a row less", "none", "text", "null", "no output", "no item", "place", "number"],
)
def test_damaged_rows_are_one_error_with_row_and_field(scored, change, named):
    folder, _, rows = scored
    tk.write_parquet(folder / "predictions.parquet", change(rows))
    with pytest.raises(ValueError, match=f"{named}.*(restore|run)"):
        _ = tk.study_runs("s")[0].frame


@pytest.mark.parametrize(
    "change",
    [
        {"answer_ok": 0.75},
        {"trace_ok": None},
        {"n_test": 5},
        {"quadrants": None},
        {"finished": "no"},
    ],
    ids=repr,
)
def test_a_number_that_does_not_follow_from_the_rows_is_said(scored, change):
    folder, found, _ = scored
    tk.write_json(folder / "metrics.json", found | change)
    (name,) = change
    with pytest.raises(ValueError, match=rf"metrics\.json: {name} is .*, but .*predictions.* give"):
        _ = tk.study_runs("s")[0].frame


@pytest.mark.parametrize("parameters", [None, [], "x"])
def test_a_damaged_run_does_not_end_the_check_of_the_parameters(scored, parameters):
    tk.write_json(scored[0] / "metrics.json", {"parameters": parameters})
    assert tk.claim_study("s", "own")


def test_a_run_is_of_the_examples_as_they_are_now(scored, example):
    nb = tk.lesson("00_run_study")
    given = {"dataset": "own", "label": "size", "id": "own/0"}
    items = [dataclasses.replace(example, **given | {"id": f"own/{k}"}) for k in range(4)]
    folder, _, rows = scored
    named = [{**row, "item": tk.item_of(e)} for row, e in zip(rows, items, strict=True)]
    tk.write_parquet(folder / "predictions.parquet", named)
    path = tk.save_examples("own", items)
    assert nb.has_these_items(tk.study_runs("s")[0])
    items[3] = dataclasses.replace(items[3], gold_facts=example.gold_facts[:1])
    tk.save_examples("own", items)
    os.utime(path, ns=(1, 1))
    assert not nb.has_these_items(tk.study_runs("s")[0])
    tk.save_examples("own", items[:3])
    os.utime(path, ns=(2, 2))
    assert not nb.has_these_items(tk.study_runs("s")[0])


def test_columns_that_came_later_do_no_harm(scored):
    folder, _, rows = scored
    tk.write_parquet(folder / "predictions.parquet", [{**row, "later": 1} for row in rows])
    assert "later" in tk.study_runs("s")[0].frame


def test_runs_of_other_items_are_not_joined(scored):
    folder, found, rows = scored
    other = tk.write_json(folder.with_name("b") / "metrics.json", found | metrics("incorrect"))
    tk.write_parquet(
        other.with_name("predictions.parquet"), [*rows[:3], scored_row(3, item="f" * 12)]
    )
    with pytest.raises(ValueError, match="id own/3 is item 000000000003 in a and item f{12} in b"):
        tk.check_runs(tk.study_runs("s"))


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00", b"text, no tensors"])
def test_an_adapter_that_is_damaged_is_not_believed(own, content):
    p = tk.notebook_defaults("03_finetune_student") | {"dataset": "own"}
    run = tk.Run(run_id="a", data_hash="x", parameters=p, sft=own)
    tk.write_json(run.folder / "training.json", {})
    assert not run.is_trained
    tk.write_atomic(run.adapter, content)
    assert not run.is_trained
    save_file({"x": np.ones((8, 8), np.float32)}, run.adapter)
    assert run.is_trained
    tk.write_atomic(run.adapter, run.adapter.read_bytes()[:-9])
    assert not run.is_trained


# ------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}'])
def test_a_field_that_stands_twice_is_refused(tmp_path, text):
    path = tk.write_atomic(tmp_path / "rows.jsonl", '{"a": 1}\n' + text)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .*stands twice"):
        tk.read_jsonl(path)


def test_parquet_gives_back_plain_values_and_typed_empty_columns(tmp_path):
    rows = [
        {"id": "ä", "ok": None, "ids": [1, 2], "x": 0.1, "said": None},
        {"id": "b", "ok": None, "ids": [], "x": None, "said": ["y"]},
    ]
    path = tk.write_parquet(tmp_path / "rows.parquet", rows, {"ok": "bool", "absent": "string"})
    assert tk.read_parquet(path) == rows
    assert str(pd.read_parquet(path, dtype_backend="pyarrow")["ok"].dtype) == "bool[pyarrow]"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="rows.parquet is no whole Parquet file"):
        tk.read_parquet(path)
    with pytest.raises(FileNotFoundError, match="none.parquet is missing"):
        tk.read_parquet(tmp_path / "none.parquet")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff\xfe", "{} {}"])
def test_damaged_json_names_the_file_and_what_was_found(tmp_path, text):
    path = tmp_path / "metrics.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="metrics.json: expected one JSON object"):
        tk.read_json(path)


# ------------------------------------------------------------------------------- statistics
def test_a_paired_difference_by_hand():
    first = [True] * 6 + [False] * 4
    second = [True] * 3 + [False] * 3 + [True] * 1 + [False] * 3
    found = tk.paired_difference(first, second)
    assert (found["only_first"], found["only_second"], found["n"]) == (3, 1, 10)
    assert found["estimate"] == pytest.approx(0.2) and found["low"] < 0.2 < found["high"]
    # mid-p: 2 (P(0) + P(1)) - P(1), X ~ Binomial(4, 1/2)
    assert found["p"] == pytest.approx(2 * 5 / 16 - 4 / 16)


def test_a_paired_difference_without_spread_or_of_other_numbers():
    same = tk.paired_difference([1, 0, 1], [1, 0, 1])
    assert (same["estimate"], same["low"], same["p"]) == (0.0, None, 1.0)
    assert same["reason"] == "all 3 values are equal"
    other = tk.paired_difference([0.5, None, -2.0], [0.25, 1.0, -1.0])
    assert (other["n"], other["p"], other["only_first"]) == (2, None, None)
    assert tk.paired_difference([], [])["reason"] == "no item"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_paired_difference_turns_its_sign_with_its_columns(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    a, b = tk.paired_difference(first, second), tk.paired_difference(second, first)
    assert a["estimate"] == pytest.approx(-b["estimate"]) and a["p"] == b["p"]
    assert a["estimate"] == pytest.approx(np.mean(first) - np.mean(second))


# ---------------------------------------------------------------------------------- showing
def test_points_with_intervals_stand_where_they_belong():
    rows = [("a", 0, 0.5, 0.4, 0.6), ("a", 1, 0.2, None, None), ("b", 0, None, None, None)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "estimate", "low", "high"])
    table["new"] = table["seed"] == 1
    _, axis = plt.subplots()
    tk.draw_intervals(axis, table, "arm", by="seed", hollow="new", order=["b", "a"])
    drawn = [line for line in axis.lines if len(line.get_xdata())]
    points = {float(p.get_xdata()[0]): p for p in drawn if len(p.get_xdata()) == 1}
    assert set(points) == {0.5, 0.2} and [t.get_text() for t in axis.get_yticklabels()] == [
        "b",
        "a",
    ]
    assert points[0.5].get_ydata()[0] < points[0.2].get_ydata()[0]  # about line 1, that of a
    assert points[0.2].get_markerfacecolor() == "white" != points[0.5].get_markerfacecolor()
    assert axis.get_legend_handles_labels()[1] == ["0", "1"]
    plt.close()


def test_an_item_is_shown_escaped_and_a_private_one_not_at_all(example):
    hostile = "<script>alert(1)</script>"
    page = tk.show_example(example, {"correct": hostile}, note="<b>TP").data
    assert hostile not in page and "&lt;script&gt;" in page and "&#60;b&#62;TP" in page
    assert "<u>Mary took the apple.</u>" in page and "Where is the apple?" in page
    private = tk.Example(
        **{"id": "marco/1", "dataset": "marco", "split": "test", "question": "secret"},
        **{"facts": ("secret",), "label": "PERSON", "gold_facts": ("secret",)},
        answers=("secret",),
    )
    assert "secret" not in tk.show_example(private, {"x": "secret"}).data


HOSTILE = "<img src=x onerror=alert(1)> $x^2$ `code` **bold** [a](b) | _i_ </td> &amp;"


def test_foreign_text_is_no_markup(own):
    text = tk.plain(HOSTILE)
    assert not set("<>`*[]|_$^") & set(re.sub(r"</?span>", "", text))
    assert html.unescape(re.sub(r"</?span>", "", text)) == HOSTILE
    table = pd.DataFrame({HOSTILE: [HOSTILE, "y"]}, index=[HOSTILE, "x"])
    table.index.name = table.columns.name = HOSTILE
    for how in ({}, {"precision": 2}, {"formatter": "{}!"}, {"index": False}):
        page = tk.show_table(table, HOSTILE, **how).to_html()
        assert "<img" not in page and "mathjax_ignore" in page and "&lt;img src" in page


def test_a_crafted_run_puts_no_markup_on_a_page(scored, example):
    folder, found, rows = scored
    student = {"student": f"a/{HOSTILE.replace('/', '')}", "condition": HOSTILE}
    tk.write_json(folder / "metrics.json", found | {"parameters": found["parameters"] | student})
    other = tk.write_json(folder.with_name("b") / "metrics.json", found)
    tk.write_parquet(other.with_name("predictions.parquet"), rows)
    runs = tk.study_runs("s")
    table = pd.DataFrame([{"arm": run.arm, **run.parameters} for run in runs])
    assert HOSTILE in table["arm"][1] and "<img" not in tk.show_table(table).to_html()
    page = tk.show_example(example, {run.arm: run.arm for run in runs}, note=runs[1].arm).data
    assert "<img" not in page and "$" not in re.sub(r"<pre>.*?</pre>|<span>.{5}</span>", "", page)
    figure, axis = plt.subplots()
    tk.use_style()
    axis.set_title(runs[1].arm)
    for path in tk.save_figure(figure, "s/00_hostile", table):
        assert path.suffix != ".svg" or "<img" not in path.read_text()
    plt.close()


# -------------------------------------------------------------------------------- launching
def test_what_is_taught_in_a_notebook_is_found_by_its_name():
    for notebook, names in tk.TAUGHT_IN.items():
        for name in names:
            assert getattr(tk, name).__module__ == notebook
            assert getattr(tk.lesson(notebook), name) is getattr(tk, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = tk.nothing_of_the_kind


DRIVER = """
import sys
sys.path.insert(0, ".")
import tracekd_utils as tk
tk.run_notebook("09_sleep")
"""
SLEEP = """
import os, time
from filelock import FileLock
lock = FileLock("sleep.lock")
lock.acquire()
open("pids", "a").write(f"{os.getpid()} {os.getppid()}\\n")
time.sleep(seconds)
"""


@pytest.fixture
def sleeper(tmp_path):
    """Workspace with a notebook that notes its process id and sleeps, and one that starts it."""
    import nbformat

    folder = make_workspace(tmp_path / "w")
    shutil.rmtree(folder / "notebooks")
    (folder / "notebooks").mkdir()
    for name, code in (("09_sleep", SLEEP), ("08_drive", DRIVER)):
        sources = ["seconds = 60  # how long", "LIMITS = {}", code]
        cells = [nbformat.v4.new_code_cell(text) for text in sources]
        cells[0]["metadata"]["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")
    shutil.copy(ROOT / "notebooks" / "02_corrupt_traces.ipynb", folder / "notebooks")
    return folder


def check_ended(folder, pids):
    """Processes end within seconds, and what the last one had locked is free again."""
    gone, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], 15
    )
    for process in alive:
        process.kill()
    assert not alive, "outlived the driver"
    FileLock(folder / "sleep.lock").acquire(timeout=1)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_notebook_that_a_notebook_started_ends_with_the_first_driver(sleeper, sign):
    driver, pids = papermill(sleeper, "08_drive", start=True), sleeper / "pids"
    end = time.monotonic() + 60
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    started = list(map(int, pids.read_text().split()))
    driver.send_signal(sign)
    driver.wait(timeout=30)
    check_ended(sleeper, started)
