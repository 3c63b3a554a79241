"""08: variations that keep the meaning are read as before, changes are seen."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, make_workspace, notebook_functions, papermill
from sklearn.metrics import cohen_kappa_score

import tracekd_utils as tk

# under `published`, what is no Python list behind its cue is one bare fact: bullets are not read
NOT_READ = {("published/babi", "bullets"), ("published/cotempqa", "bullets")}
RESULTS = ROOT / "data" / "results"
SAVED = sorted((RESULTS / "stress").glob("*.json"))
LABELLED = RESULTS / "stress" / "labelled.csv"
AGAIN = "run 08_stress_the_parser again with source={}, n_outputs=100000"
TEXT = (
    "<think>Question type: object-place\nFacts:\n- Mary took the apple.\n"
    "- Mary went to the kitchen.</think>\n<answer>kitchen</answer>"
)


@pytest.fixture(scope="module")
def stress():
    """What 08 defines, and the variations of 39 that it takes."""
    found = notebook_functions("08_stress_the_parser")
    return SimpleNamespace(**{**vars(found.VARIED), **vars(found)})


def read(stress, *texts, example, protocol="controlled"):
    return stress.read_all([stress.Output("a run", t, example, protocol) for t in texts])


@pytest.fixture
def item(stress, example):
    (found,), left_out, rows = read(stress, TEXT, example=example)
    assert (found.label, found.answers) == ("object-place", ("kitchen",))
    assert left_out == {} and rows.loc[0, ["answer_ok", "trace_ok"]].tolist() == [True, True]
    return found


KEEP = (
    "tag case",
    "tag name",
    "tag missing",
    "tag repeated",
    "bullets",
    "list form",
    "reordered",
    "prose before",
    "prose between",
    "prose after",
    "label form",
    "curly quotes",
    "full width",
    "line break",
    "spaces",
    "markdown",
    "truncated",
)
CHANGE = (
    "other label",
    "fact swapped",
    "near-miss fact",
    "fact negated",
    "fact added",
    "fact left out",
    "other answer",
    "answer added",
)


def test_the_lists_above_are_the_notebooks(stress):
    assert set(stress.KEEP) == set(KEEP) and set(stress.CHANGE) == set(CHANGE)


@pytest.mark.parametrize("name", KEEP)
def test_a_mild_variation_is_another_text_that_reads_the_same(stress, item, name):
    text = stress.KEEP[name](item, tk.stream(0, "x", name), 1)
    assert text != TEXT
    found = stress.readings(text, item)
    assert all(found["lenient", field] for field in stress.FIELDS)
    in_form = name in ("reordered", "curly quotes", "spaces")
    assert found["strict", "answer"] is in_form


@pytest.mark.parametrize("name", CHANGE)
def test_a_change_is_seen_in_its_field_and_nowhere_else(stress, item, name):
    field, change = stress.CHANGE[name]
    found = stress.readings(change(item, tk.stream(0, "x", name)), item)
    wrong = {f for f in ("label", "facts", "answer") if not found["lenient", f]}
    assert wrong == {field}
    assert found["lenient", "trace"] is (field == "answer")


def test_survival_is_counted_among_what_was_right(stress, example):
    """Of four outputs two answers and one trace are right; what was wrong counts nowhere."""
    texts = (
        TEXT,
        TEXT.replace("object-place", "person-place"),
        TEXT.replace(">kitchen<", ">garden<"),
        TEXT.replace("the apple", "the ball").replace(">kitchen<", ">garden<"),
    )
    items, _, _ = read(stress, *texts, example=example)
    assert len(items) == 4
    row = stress.measure("fact swapped", 1, items, ("lenient", "strict"))
    assert row["n"] == 4
    counts = {k: row[f"lenient {k}"]["n"] for k in stress.FIELDS}
    assert counts == {"label": 3, "facts": 3, "trace": 2, "answer": 2}
    assert row["lenient facts"]["estimate"] == row["lenient trace"]["estimate"] == 0
    assert row["lenient answer"]["estimate"] == row["strict answer"]["estimate"] == 1
    assert row["strict trace"]["n"] == 2 and "released trace" not in row


# ------------------------------------------------------- as students of other people write


def test_forms_of_others_apply_to_one_answer_and_are_other_texts(stress, item):
    for name, form in stress.FORMS.items():
        text = stress.as_others(item, tk.stream(0, "x", name), form)
        assert (text is None) is (name == "digit"), name
        assert text is None or ("{" not in text.replace('{"', "") or "boxed" in text)
        assert text != TEXT
    two = dataclasses.replace(item, answers=("kitchen", "garden"))
    assert stress.as_others(two, tk.stream(0, "x", "or"), stress.FORMS["boxed"]) is None


def test_a_number_is_written_as_a_digit(stress, example):
    example = dataclasses.replace(example, question="How many things?", answers=("two",))
    text = TEXT.replace(">kitchen<", ">two<")
    (item,), _, _ = read(stress, text, example=example)
    said = stress.as_others(item, tk.stream(0, "x", "digit"), stress.FORMS["digit"])
    assert said.endswith("<answer>2</answer>")
    assert stress.as_others(item, tk.stream(0, "x", "a"), stress.FORMS["article"]) is None


@pytest.mark.parametrize("name", ["or", "negated", "not but", "taken back", "not known", "maybe"])
def test_a_hedge_inside_the_tags_is_wrong(stress, item, name):
    text = stress.as_others(item, tk.stream(0, "x", name), stress.FORMS[name])
    assert stress.readings(text, item)["lenient", "answer"] is False


# ----------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("strength, has", [(2, "  "), (3, "<Think>")])
def test_noise_comes_on_top_of_the_change(stress, item, strength, has):
    text = stress.vary(item, "fact negated", strength)
    assert has in text and " not " in text


def test_outputs_without_a_meaning_to_keep_are_left_out_and_counted(stress, example):
    wrong = TEXT.replace("object-place", "size-compare").replace("apple", "ball")
    texts = (TEXT, "", "<think></think>", TEXT + TEXT, TEXT.replace("\n- ", "\n"))
    texts += (wrong.replace(">kitchen<", ">garden<"),)
    items, left_out, rows = read(stress, *texts, example=example)
    assert [i.text for i in items] == [TEXT] and sum(left_out.values()) == 5
    assert left_out["nothing in it is right"] == 1
    assert len(rows) == 6 and rows["answer_ok"].sum() == 3  # all of them are read


def test_fewer_outputs_are_the_same_ones_for_the_same_seed(stress, example):
    texts = [TEXT.replace("Mary went", f"Mary{' ' * k} went") for k in range(1, 9)]
    items = read(stress, *texts, example=example)[0]
    few = stress.draw(items, 3)
    assert few == stress.draw(items[::-1], 3) and len(few) == 3 < len(items)
    assert few == stress.draw(items, 5)[:3]


def test_the_released_scoring_by_hand(example):
    other = dataclasses.replace(
        example, id="b", label="person-place", facts=("Tom is here.",), gold_facts=("Tom is here.",)
    )
    one_fact = TEXT.replace("\n- Mary went to the kitchen.", "")
    assert tk.released_score(one_fact, example) == {"answer_ok": True, "trace_ok": True}
    assert tk.released_score(TEXT, example, [other, example])["trace_ok"] is False  # B1
    assert tk.released_score("kitchen", example) == {"answer_ok": True, "trace_ok": None}
    assert (
        tk.released_score(TEXT.replace(">kitchen<", ">the kitchen<"), example)["answer_ok"] is False
    )
    assert tk.released_extract("Answer: Kitchen") == " kitchen"
    assert tk.released_extract("My answer is x, no answer is y") == "is x, no"


@pytest.mark.parametrize("path", SAVED, ids=lambda p: p.stem)
def test_the_committed_results_reach_the_floor(path):
    saved = json.loads(path.read_text())
    assert saved["n_varied"] > 0 and {r["strength"] for r in saved["variations"]} == {1, 2, 3}
    for r in saved["variations"]:
        unread = (saved["source"], r["variation"]) in NOT_READ
        if r["kind"] == "keeps" and r["strength"] == 1 and not unread:
            shares = [r[f"lenient {f}"] for f in ("label", "facts", "trace", "answer")]
            assert all(x["estimate"] >= 0.95 for x in shares if x["n"]), r
        if r["kind"] == "changes" and r[f"lenient {r['changed']}"]["n"]:
            assert r[f"lenient {r['changed']}"]["estimate"] <= 0.01, r


def test_there_are_committed_results():
    assert {p.stem for p in SAVED} >= {"microworld", "babi", "published-babi", "published-cotempqa"}


@pytest.mark.parametrize("path", SAVED, ids=lambda p: p.stem)
def test_all_committed_outputs_were_read_and_as_they_are_committed(path):
    """The number of outputs and the shares of right ones are those of the committed runs."""
    saved = json.loads(path.read_text())
    again = AGAIN.format(saved["source"])
    found = {r["run"]: (r["n"], r["answer_ok"], r["trace_ok"]) for r in saved["runs"]}
    kind, _, name = saved["source"].partition("/")
    expected = {}
    for metrics in RESULTS.glob(f"{kind}/*/metrics.json"):
        m = json.loads(metrics.read_text())
        n = len(tk.read_parquet(metrics.with_name("predictions.parquet")))
        expected[metrics.parent.name] = (n, m["answer_ok"], m["trace_ok"])
    for row in json.loads((RESULTS / f"reaudit/{name}.json").read_text()) if name else ():
        run = f"{row['student']}, {row['variant']}, {row['label_file']}"
        if name == "babi" or row["label_file"] != "all":  # `all`: the other rows together
            expected[run] = (row["n"], row["accuracy_corrected"] / 100, row["trace_ok"])
    assert found.keys() == expected.keys(), again
    for run, numbers in expected.items():
        assert found[run] == pytest.approx(numbers, abs=1e-6), (run, again)
    n = saved["n_varied"] + sum(saved["left_out"].values())
    assert saved["n_outputs"] == n == sum(n for n, _, _ in expected.values()), again


def test_the_authors_answers_alone_are_read_under_their_protocol():
    """Qwen's vanilla answers on CoTempQA: 52.4 % are right; read as `controlled` it was 20.2 %."""
    saved = json.loads((RESULTS / "stress" / "published-cotempqa.json").read_text())
    runs = [r for r in saved["runs"] if r["run"].startswith("Qwen3-1.7B, vanilla")]
    n = sum(r["n"] for r in runs)
    assert n == 950 and sum(r["n"] * r["answer_ok"] for r in runs) / n == pytest.approx(
        0.524, abs=1e-3
    )


# ------------------------------------------------------------------------ beside the hand


def hand_rows():
    return pd.read_csv(LABELLED, dtype=str, keep_default_na=False).to_dict("records")


def test_labelled_outputs_are_those_of_the_stated_rule():
    rows = hand_rows()
    assert len(rows) == len({(r["run_id"], r["id"]) for r in rows}) == 200
    runs = {}
    for row in rows:
        runs.setdefault(row["run_id"], []).append(row)
        assert {row["answer"]} <= {"0", "1"} and {row["label"], row["facts"]} <= {"0", "1", ""}
    assert {len(part) for run, part in runs.items() if run.startswith("microworld")} == {8}
    assert sorted(len(p) for run, p in runs.items() if "-direct" in run) == [10, 24, 70]
    first = {"-direct-": 40, "babi-smollm2-135m-direct_few_shot": 14}
    for run, part in runs.items():
        (folder,) = RESULTS.glob(f"*/{run}")
        stored = {r["id"]: r for r in tk.read_parquet(folder / "predictions.parquet")}
        assert all(stored[r["id"]]["item"] == r["item"] for r in part)
        order = sorted(stored, key=lambda key: tk.stream(0, key, f"labelled {run}").random())
        n = next((n for name, n in first.items() if name in run), len(part))
        ids = [r["id"] for r in part]
        assert ids[:n] == order[:n]
        assert ids[n:] == sorted(ids[n:], key=order.index)  # of those that hold a gold answer


@pytest.fixture(scope="module")
def examples(data_dir):
    """Test items by id of the datasets of the labelled outputs, made from the raw files."""
    made = notebook_functions("01_decompose_microworld").make_microworld(400, 48, 400)
    found = {e.id: e for e in made}
    babi = notebook_functions("10_decompose_babi", dataset="babi")
    for e in babi.read_babi(data_dir / "babi" / "en", "babi", 0)[0]:
        found[e.id] = e
    cotempqa = notebook_functions("11_decompose_cotempqa")
    for row in cotempqa.cotempqa_rows(data_dir / "cotempqa"):
        found[row.example.id] = row.example
    return found


def test_the_reader_agrees_with_the_hand(examples):
    """Read and scored today, not as stored: kappa of at least 0.8 in every field."""
    pairs = {"answer": [], "label": [], "facts": []}
    for row in hand_rows():
        (folder,) = RESULTS.glob(f"*/{row['run_id']}")
        m = tk.read_json(folder / "metrics.json")
        stored = {r["id"]: r for r in tk.read_parquet(folder / "predictions.parquet")}
        example, output = examples[row["id"]], stored[row["id"]]["output"]
        assert tk.item_of(example) == row["item"]
        parsed = tk.parse_output(output, example, m["parameters"]["protocol"])
        scores = tk.score(parsed, example, m["layout"], m["has_facts"])
        for field in pairs:
            if row[field]:
                pairs[field].append((row[field] == "1", bool(scores[f"{field}_ok"])))
    for field, found in pairs.items():
        hand, reader = zip(*found, strict=True)
        kappa = cohen_kappa_score(hand, reader)
        print(f"{field}: n {len(found)}, kappa {kappa:.3f}")
        assert kappa >= 0.8, field
        believed = [h for h, r in found if r and not h]
        assert not believed, field  # nothing is called right that the hand calls wrong


# -------------------------------------------------------------------- the notebook itself


def test_a_source_without_outputs_says_so(workspace):
    options = ("-r", "source", "nowhere", "-p", "n_outputs", "5")
    done = papermill(workspace, "08_stress_the_parser", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads((workspace / "08_stress_the_parser-out.ipynb").read_text())
    text = "".join("".join(o.get("text", "")) for c in out["cells"] for o in c.get("outputs", ()))
    assert re.search("nowhere: no output that can be varied", text)


def test_published_outputs_are_those_that_the_audit_wrote(stress, tmp_path, monkeypatch, example):
    monkeypatch.setattr(tk, "INTERIM", tmp_path)
    monkeypatch.setattr(tk, "RESULTS", tmp_path)
    monkeypatch.delenv("TRACEKD_DATA_DIR", raising=False)
    assert stress.published_outputs("babi") == ([], {})
    row = {"student": "s", "label_file": "all", "line": 1, **dataclasses.asdict(example)}
    rows = [row | {"condition": c, "text": f"text of {c}"} for c in ("vanilla", "correct")]
    tk.write_jsonl(tmp_path / "published" / "babi.jsonl", rows)
    table = {"student": "s", "variant": "correct", "label_file": "all", "trace_ok": 0.5}
    text = json.dumps([table | {"accuracy_corrected": 25.0}])
    tk.write_atomic(tmp_path / "reaudit" / "babi.json", text)
    found, committed = stress.published_outputs("babi")
    assert committed == {"s, correct, all": (0.25, 0.5)}
    assert [(o.text, o.protocol, o.layout) for o in found] == [
        ("text of vanilla", "published", "none"),
        ("text of correct", "published", "before"),
    ]


def test_outputs_are_read_under_their_protocol(stress, example):
    example = dataclasses.replace(example, dataset="babi", label="counting")
    trace = tk.Trace(label="counting", facts=("Mary took the apple.",))
    text = tk.render_target(example, trace, "published")
    (found,), _, _ = read(stress, text, example=example, protocol="published")
    assert found.facts == trace.facts and found.protocol == "published"
    readings = stress.readings(text, found)
    right = {field for field in stress.FIELDS if readings["lenient", field]}
    assert right == {"label", "answer"}
    alone = tk.render_target(example, None, "published")
    _, left_out, rows = read(stress, alone, example=example, protocol="published")
    assert rows["answer_ok"].tolist() == [True] and sum(left_out.values()) == 1


def test_an_output_of_another_item_is_refused(stress, example, tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tmp_path)
    other = dataclasses.replace(example, question="Where is the ball?")
    frame = pd.DataFrame([{"id": example.id, "item": tk.item_of(other), "output": TEXT}])
    metrics = {"answer_ok": 1.0, "trace_ok": 1.0, "layout": "before", "has_facts": True}
    run = SimpleNamespace(
        folder=tmp_path / "a-run",
        frame=frame,
        metrics=metrics,
        parameters={"dataset": "microworld", "protocol": "controlled"},
    )
    monkeypatch.setattr(tk, "study_runs", lambda study: [run])
    monkeypatch.setattr(tk, "find_examples", lambda name, study: [example])
    with pytest.raises(ValueError, match="a-run.*names two questions.*make the examples"):
        stress.study_outputs("microworld")
    frame["item"] = tk.item_of(example)
    (found,), committed = stress.study_outputs("microworld")
    assert (found.run, found.text, committed) == ("a-run", TEXT, {"a-run": (1.0, 1.0)})


def test_only_outputs_of_our_own_have_a_strict_reading():
    for path in SAVED:
        saved = json.loads(path.read_text())
        assert ("strict" in saved["readers"]) is not saved["source"].startswith("published/")


EVIL = "<img src=x onerror=alert(1)>$x^2$`|**b**"


def test_names_out_of_result_files_are_no_markup(tmp_path):
    """A variation, a run and a note with markup in their names, on the exported page."""
    folder = make_workspace(tmp_path)
    source = json.loads((RESULTS / "stress" / "microworld.json").read_text())
    for row in source["variations"]:
        if row["kind"] != "keeps":
            row["variation"] = EVIL + row["variation"]
        row["lenient answer"]["estimate"] = 0.5  # so that it is listed
    for run in source["runs"]:
        run["run"] = EVIL + run["run"]
    tk.write_json(folder / "data/results/stress/microworld.json", source)
    shutil.copytree(
        RESULTS,
        folder / "data/results",
        dirs_exist_ok=True,
        ignore=lambda d, names: ([n for n in names if n == "microworld.json"]),
    )
    text = LABELLED.read_text().replace("garbled, but names one colour", EVIL)
    (folder / "data/results/stress/labelled.csv").write_text(text)
    done = papermill(folder, "08_stress_the_parser")
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "08_stress_the_parser-out.ipynb"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    page = (folder / "08_stress_the_parser-out.html").read_text()
    assert "onerror=alert" in page and "<img src=x" not in page
    assert "<b>b</b>" not in page and "<strong>b</strong>" not in page
