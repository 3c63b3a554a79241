"""README.md and data/results/README.md hold what 23 computes from the committed results."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

import tracekd_utils as tk

RESULTS = ROOT / "data/results"


@pytest.fixture(scope="module")
def report():
    return tk.lesson("23_report_results")


@pytest.fixture(scope="module")
def studies(report):
    """The committed studies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "RESULTS", RESULTS)
        yield report.read_studies()


def block(page, name):
    """Text of a page between the two marks of a block."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, re.S)[1]


def table(name, page="README.md"):
    """Rows of a table of a page, as dictionaries of cell texts."""
    lines = block((ROOT / page).read_text(), name).splitlines()
    head, _, *rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_both_pages_are_what_23_computes(report, studies, monkeypatch):
    """Run 23 where this fails: a result, a baseline or a notebook is new."""
    monkeypatch.setattr(tk, "RESULTS", RESULTS)
    for page, blocks in report.make_blocks(studies).items():
        text = (ROOT / page).read_text()
        for name, expected in blocks.items():
            assert block(text, name) == expected, f"{page}, {name}: run 23_report_results"


def test_every_run_has_its_row_and_no_other(studies):
    shown = table("runs", "data/results/README.md")
    runs = [run for part in studies.values() for run in part]
    assert len(shown) == len(runs) == len(list(RESULTS.glob("*/*/metrics.json")))
    by_hand = {}
    for path in RESULTS.glob("*/*/metrics.json"):
        m = tk.read_json(path)
        cells = [str(m["quadrants"][k]) for k in ("TP", "FP", "FN", "TN")] if m["quadrants"] else []
        key = (m["parameters"]["dataset"], str(m["parameters"]["seed"]), str(m["n_test"]))
        row = (f"{100 * m['answer_ok']:.1f}%", " / ".join(cells) or "–")
        by_hand.setdefault(key, []).append(row)
    found = {}
    for row in shown:
        key = (row["dataset"], row["seed"], row["n"])
        found.setdefault(key, []).append(
            (row["answer right"].split(" ")[0], row["TP / FP / FN / TN"])
        )
    assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in by_hand.items()}


def test_a_command_names_what_is_not_the_default(studies):
    rows = {row["command"] for row in table("runs", "data/results/README.md")}
    assert "`03 -p dataset babi -p condition incorrect -p seed 2`" in rows
    assert "`03 -p dataset microworld -p condition incorrect -p dose 0.25`" in rows
    for words in rows:
        assert re.fullmatch(r"`03 -p dataset \w+ -p condition \w+( -p \w+ \S+)*`", words), words


def test_a_condition_is_one_row_of_the_compact_table(studies):
    rows = [row for row in table("results") if row["condition"].startswith("`")]
    keys = [(row["dataset"], row["condition"]) for row in rows]
    arms = [(run.parameters["dataset"], run.arm) for part in studies.values() for run in part]
    assert len(set(keys)) == len(keys) == len(set(arms))
    row = rows[keys.index(("babi", "`correct`"))]
    # 300, 320 and 327 of 600
    assert (row["seeds"], row["answers right"]) == ("3", "52.6% (50.0–54.5)")


def test_the_findings_carry_what_the_results_say():
    """The numbers of the findings, each found in the files by another way."""
    said = " ".join(block((ROOT / "README.md").read_text(), "findings").split())
    pairs = pd.read_csv(ROOT / "figures/babi/05_differences.csv")
    for row in pairs[pairs["over"] == "seeds"].itertuples():
        if row.first in ("incorrect", "vanilla") and row.second in ("correct", "vanilla"):
            text = f"`{row.first}` − `{row.second}` {100 * row.estimate:+.1f} points"
            assert f"{text} ({100 * row.low:+.1f} to {100 * row.high:+.1f})" in said
    path = next(RESULTS.glob("babi/babi-*-correct-controlled-seed0-90cf72f2/interventions.parquet"))
    rows = pd.DataFrame(tk.read_parquet(path))
    planted = rows[rows["arm"] == "planted"]
    gold = rows[(rows["arm"] == "gold") & rows["id"].isin(planted["id"])]
    shares = [100 * part["follows"].astype(bool).mean() for part in (planted, gold)]
    assert f"babi {shares[0]:.1f}% against {shares[1]:.1f}%" in said
    assert "“titular bishop” is the gold answer of 28 of 300 items" in said
    assert "261 subjects" in said
    # the audit's counts: 11 and 15 of 272 without it, 26 and 43 of 300 with it
    assert f"{100 * (26 - 43) / 300:+.1f} points" in said
    assert f"{100 * (11 - 15) / 272:+.1f} points" in said


def findings():
    return " ".join(block((ROOT / "README.md").read_text(), "findings").split())


def test_the_reaudit_finding_reads_the_same_outputs_twice():
    """Not the authors' matrix, which is of another generation."""
    claims = tk.read_json(RESULTS / "reaudit/cotempqa-details.json")["claims"]
    for student in ("Llama-3.2-1B-Instruct", "Qwen3-1.7B"):
        phi = {
            r["cells"]: r["phi"]
            for r in claims
            if (r["student"], r["variant"]) == (student, "correct")
        }
        text = f"{phi['own gold']:.2f} instead of {phi['reproduced']:.2f} ({student})"
        assert text in findings()
    assert "0.71 instead of 0.11 (Llama" in findings()


def test_the_last_candidate_is_a_guess_among_two_or_more(studies):
    """Where there is one candidate it is the gold answer; t over the seeds of bAbI."""
    base = pd.DataFrame(tk.read_parquet(RESULTS / "babi/baselines.parquet")).set_index("id")
    last = base.loc[base["n_candidates"] >= 2, "last_ok"].astype(float)
    assert len(last) == 561 and last.notna().all()
    assert f"{100 * last.mean():.1f}% of 561 items of babi" in findings()
    assert "28.9% of 204 items of cotempqa" in findings()
    for arm, side in {"correct": "above it: ", "incorrect": "not told apart from it: "}.items():
        means = []
        for run in (run for run in studies["babi"] if run.arm == arm):
            right = run.frame.set_index("id")["answer_ok"].astype(float)
            means.append((right[last.index] - last).mean())
        low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
        text = f"babi {100 * np.mean(means):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        said = findings()[findings().index(f"By item `{arm}` is ") :]
        assert text in said and side in said[: said.index(text)]


def test_baselines_stand_in_the_column_of_their_score():
    rows = {(row["dataset"], row["condition"]): row for row in table("results")}
    for dataset, n in {"babi": "561", "cotempqa": "204", "marco": "6", "microworld": "400"}.items():
        pair = [rows[dataset, name] for name in ("chance", "last candidate of the story")]
        assert [row["n"] for row in pair] == [n, n]
        majority = rows[dataset, "majority answer of the label"]
        assert majority["label"] == "–" != rows[dataset, "majority label"]["label"]
    assert rows["marco", "majority label"]["label"] == "75.0%"


def test_unlike_is_what_06_stored(studies):
    shown = {(r["dataset"], r["condition"], r["seed"]): r["unlike"] for r in table("interventions")}
    for study, runs in studies.items():
        for run in runs:
            path = run.folder / "interventions-details.json"
            if path.exists():
                off = tk.read_json(path)["off_distribution"]
                arms = [arm for arm in ("gold", "wrong_facts", "planted") if off[arm]]
                name = f"`{run.condition}`{run.arm.removeprefix(run.condition)}"
                key = (study, name, str(run.seed))
                assert shown.pop(key) == ", ".join(arms), run.folder.name
    assert shown == {}


def test_an_association_behind_the_answer_has_its_like_beside_it():
    assert "phi 0.51 (0.43 to 0.60), n = 400 (microworld); `correct` has there 0.5" in findings()
    assert "05 -r study babi; 05 -r study microworld" in findings()


def test_what_a_hand_finds_right_is_counted():
    hand = pd.read_csv(RESULTS / "stress/labelled.csv", dtype=str, keep_default_na=False)
    hand = hand[hand["run_id"].str.contains("-direct")]
    right, known = hand[hand["answer"] == "1"], 0
    for run_id, part in right.groupby("run_id"):
        (folder,) = RESULTS.glob(f"*/{run_id}")
        frame = pd.DataFrame(tk.read_parquet(folder / "predictions.parquet")).set_index("id")
        known += frame.loc[part["id"], "answer_ok"].sum()
    assert f"By hand {len(right)} of {len(hand)} labelled answers" in findings()
    assert f"the reader calls {known} of those {len(right)} right" in findings()


def test_what_wrong_traces_differ_in_is_said(studies):
    apart = []
    for study in studies:
        found = tk.read_json(RESULTS / study / "manipulation_checks.json")["conditions"]
        shares = [100 * found[arm]["relevance"] for arm in ("correct", "incorrect")]
        auc = found["incorrect"]["overlap_auc"]
        if not 0.9 <= shares[1] / shares[0] <= 1.1:
            apart.append(study)
        text = f"{study} {shares[0]:.1f}% / {shares[1]:.1f}%, {auc:.2f}"
        assert text in findings()
        gain = (found["incorrect"]["beyond_story"].get("gain") or {}).get("estimate")
        assert gain is None or f"{study} {100 * gain:+.1f} points" in findings()
    assert f"not matched in relevance in {', '.join(apart)}." in findings()


def test_the_notes_say_what_has_not_run(report, studies):
    notes = " ".join(block((ROOT / "README.md").read_text(), "notes").split())
    ran = {run.condition for runs in studies.values() for run in runs}
    missing = notes[notes.index("Not run yet") :] if "Not run yet" in notes else ""
    assert [name for name in tk.conditions() if (f"`{name}`" in missing) == (name in ran)] == []
    assert (
        "marco `correct` writes the label DESCRIPTION on 48 of 48 items; it is right on 36" in notes
    )
    checks = tk.read_json(RESULTS / "babi/manipulation_checks-dose0.5-seed0.json")
    share = 100 * checks["conditions"]["incorrect"]["dose_realised"]
    assert f"babi `incorrect`, 50% of rows: {share:.1f}%" in notes
    known = [SimpleNamespace(condition=name, parameters={}) for name in tk.conditions()]
    known[0].parameters = {"temperature": 0.6, "loss": "balanced"}
    assert report.say_missing({"x": known}) == "All of it has run."
    assert report.say_missing({"x": known[1:]}).startswith(f"Not run yet: `{known[0].condition}`, ")


def test_items_are_those_of_the_runs(studies):
    for study, runs in studies.items():
        ids = [row["id"] for row in tk.read_parquet(RESULTS / study / "items.parquet")]
        assert len(ids) == len(set(ids)) and set(ids) == {i for r in runs for i in r.frame["id"]}
    assert len(tk.read_parquet(RESULTS / "babi/items.parquet")) == 600


def test_a_question_asked_twice_is_kept_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "INTERIM", tmp_path / "interim")
    monkeypatch.setattr(tk, "RESULTS", tmp_path / "results")
    facts = ("Mary went to the garden.", "John went to the hall.")
    about = {"dataset": "microworld", "split": "test", "question": "Where is Mary?"}
    about |= {"label": tk.dataset("microworld").labels[0], "facts": facts}
    about |= {"gold_facts": facts[:1], "answers": ("garden",)}
    twice = [tk.Example(id=name, **about) for name in ("a", "b")]
    assert tk.item_of(twice[0]) == tk.item_of(twice[1])
    tk.save_examples("microworld", twice)
    frame = pd.DataFrame([{"id": "a", "item": tk.item_of(twice[0])}])
    run = SimpleNamespace(parameters={"dataset": "microworld"}, frame=frame)
    read = tk.lesson("34_read_results")
    read.write_items("microworld", [run])
    assert [row["id"] for row in tk.read_parquet(read.items_path("microworld"))] == ["a"]


@pytest.mark.parametrize("dataset", ["cotempqa", "babi"])
def test_the_reaudit_table_is_the_committed_reaudit(report, dataset, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", RESULTS)
    shown = [row for row in table("reaudit") if row["dataset"] == dataset]
    assert shown == [{k: str(v) for k, v in row.items()} for row in report.reaudit_rows(dataset)]
    assert len(shown) == 6 and shown[1]["condition"] == "`correct`"
    phis = {"cotempqa": ("0.11", "0.71"), "babi": ("0.00", "0.37")}[dataset]
    assert (shown[1]["phi, released"], shown[1]["phi, own gold"]) == phis


def test_a_block_is_replaced_where_its_marks_stand_once(report):
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    new = report.put_block(page, "x", "new \\1")
    assert new == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    assert report.put_block(new, "x", "old") == page
    empty = "<!-- x -->\n<!-- /x -->"
    assert report.put_block(empty, "x", "y") == "<!-- x -->\ny\n<!-- /x -->"
    for wrong in ("a", page * 2):
        with pytest.raises(ValueError, match="'x' stand [02] times"):
            report.put_block(wrong, "x", "new")


def test_the_glossary_names_every_condition():
    text = (ROOT / "README.md").read_text()
    glossary = text[text.index("## Results") : text.index("<!-- results -->")]
    assert [name for name in tk.conditions() if f"`{name}`" not in glossary] == []


def test_a_dash_stands_where_nothing_is_known(report, monkeypatch, tmp_path):
    monkeypatch.setattr(tk, "RESULTS", tmp_path)
    assert report.find_reaudit({}) is None and report.find_seeds({}) is None
    assert report.find_forced({}) is None and report.find_level({}) is None
    assert report.find_manipulation({}) is None and report.say_hand() == ""
    assert report.say_unlike(SimpleNamespace(folder=tmp_path)) == "–"
    table = pd.DataFrame({"a": ["x|y"], "b": ["–"]})
    assert report.to_markdown(table) == "| a | b |\n|---|---|\n| x\\|y | – |"
