"""README.md and data/results/README.md hold what 23 computes from the committed results."""

import re

import pandas as pd
import pytest
from conftest import ROOT

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
    assert f"`correct` {shares[0]:.1f}% / {shares[1]:.1f}%" in said
    assert "“titular bishop” is the gold answer of 28 of 300 items" in said
    assert "261 subjects" in said
    # the audit's counts: 11 and 15 of 272 without it, 26 and 43 of 300 with it
    assert f"{100 * (26 - 43) / 300:+.1f} points" in said
    assert f"{100 * (11 - 15) / 272:+.1f} points" in said


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
    table = pd.DataFrame({"a": ["x|y"], "b": ["–"]})
    assert report.to_markdown(table) == "| a | b |\n|---|---|\n| x\\|y | – |"
