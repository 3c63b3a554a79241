"""Calibration: it calls the functions of 05 and 06, and students are wired as they say."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, make_workspace, notebook_functions, papermill
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

import tracekd_utils as tk

NAME = "07_calibrate_instrument"
counts = st.lists(st.integers(0, 60), min_size=4, max_size=4)


@pytest.fixture(scope="module")
def nb():
    return notebook_functions(NAME)


@pytest.fixture(scope="module")
def items(nb):
    return [nb.make_item(i, 3) for i in range(240)]


@settings(max_examples=30)
@given(counts.filter(lambda c: sum(c) > 0))
def test_a_study_is_read_by_the_function_of_05(cells):
    nb = notebook_functions(NAME)
    found = tk.disconnect_statistics(nb.frame_of(cells))
    assert found["quadrants"] == dict(zip(("TP", "FP", "FN", "TN"), cells, strict=True))
    read = nb.read_study(*cells)
    assert (read["p"], read["test"]) == (found["test"]["p"], found["test"]["name"])
    for name, theirs in (
        ("difference", found["difference"]),
        ("odds ratio", found["odds_ratio"]),
        ("phi", found["phi"]),
        ("share of answers", tk.proportion(sum(cells[:2]), sum(cells))),
        ("answer given trace right", found["answer_given_trace_ok"]),
        ("answer given trace wrong", found["answer_given_trace_wrong"]),
    ):
        assert (read[f"{name}, low"], read[f"{name}, high"]) == (theirs["low"], theirs["high"])


def test_the_order_of_items_does_not_matter(nb):
    """Counting a table once is right only if its statistics depend on the counts alone."""
    frame = nb.frame_of([30, 12, 9, 25])
    mixed = frame.sample(frac=1, random_state=1)
    assert tk.disconnect_statistics(mixed) == tk.disconnect_statistics(frame)


def test_studies_without_a_test_are_counted_apart(nb):
    rng = np.random.default_rng(0)
    studies, empty = nb.read_studies(rng, 8, [0.1, 0.3, 0.1, 0.5], 60)
    assert len(studies) + empty == 60 and 0 < empty < 60
    assert studies["p"].notna().all() and studies["phi, low"].notna().all()
    assert all(sum(table) == 8 for table in studies["table"])


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(0, 40))
def test_two_students_are_compared_by_the_function_of_05_and_06(b, c):
    nb = notebook_functions(NAME)
    found = nb.read_pair(b, c, b + c + 9)
    assert (found["only_first"], found["only_second"]) == (b, c)
    assert found["p"] == tk.mcnemar_midp(b, c)
    assert found["estimate"] == pytest.approx((b - c) / (b + c + 9))


def test_strata_are_unrelated_within_labels_only(nb):
    frame = nb.draw_strata(np.random.default_rng(2), 2000)
    assert frame["label"].value_counts().tolist() == [2000] * 6
    assert tk.stratified_association(frame)["strata"] == 6
    assert tk.disconnect_statistics(frame)["test"]["p"] < 1e-6
    assert tk.stratified_association(frame)["odds_ratio"] == pytest.approx(1, abs=0.2)


def test_holm_takes_the_smallest_corrected_p(nb, monkeypatch):
    """Its first step is what statsmodels gives for the smallest of the six."""
    seen = []
    p_of = tk.mcnemar_midp
    monkeypatch.setattr(tk, "mcnemar_midp", lambda b, c: seen.append(p_of(b, c)) or seen[-1])
    for seed in range(20):
        seen.clear()
        smallest = nb.holm_study(np.random.default_rng(seed), n=60)
        assert len(seen) == 6
        assert smallest == pytest.approx(multipletests(seen, method="holm")[1].min())


def test_cell_shares_have_the_shares_and_the_phi_asked_for(nb):
    tp, fp, fn, tn = cells = nb.cell_shares(0.25, 0.4, 0.2)
    assert (tp + fn, tp + fp, cells.sum()) == pytest.approx((0.25, 0.4, 1))
    assert nb.truths(cells)["phi"] == pytest.approx(0.2)
    assert nb.truths(np.array([0.4, 0.1, 0.2, 0.3])) == pytest.approx(
        {
            "share of answers": 0.5,
            "answer given trace right": 2 / 3,
            "answer given trace wrong": 0.25,
            "difference": 5 / 12,
            "odds ratio": 6,
            "phi": (0.12 - 0.02) / math.sqrt(0.6 * 0.4 * 0.25),
        }
    )
    assert nb.cell_shares(0.05, 0.4, 0.9) is None


def test_half_added_widens_the_interval_of_an_empty_cell(nb):
    """A table without errors once had the interval [1, 1]."""
    read = nb.read_study(30, 0, 0, 30)
    assert 0.8 < read["phi, low"] < 1 and read["phi, high"] == 1
    assert nb.plain_interval([30, 0, 0, 30]) == {"plain, low": 1, "plain, high": 1}


def test_items_can_be_read_off_their_gold_facts(nb, items):
    for i in items:
        e = tk.check_example(i.example, "here")
        assert len(set(e.facts)) == 8 and not set(i.wrong) & set(e.gold_facts)
        assert nb.read_off(e.gold_facts, i) == e.answers[0]
        planted = nb.cited(i, nb.WIRINGS["common cause"], "planted")
        assert nb.read_off(planted, i) == i.plant != e.answers[0]
        assert i.guess != e.answers[0] and set(i.chance) <= set(e.facts)
    assert {i.example.label for i in items} == set(nb.ASKS)


def test_a_copying_student_follows_and_an_ignoring_one_does_not(nb, items):
    half = {"easy": 0.5, "hard": 0.5}
    copies, ignores = nb.Wiring(half, half, copies=1.0), nb.Wiring(half, half)
    copied, ignored = nb.measure(items, copies), nb.measure(items, ignores)
    assert copied["follow"]["estimate"] == 1 and copied["effect"]["estimate"] < -0.8
    # what an ignoring student says under a plant is its own answer, letter for letter
    assert ignored["flip"]["estimate"] == 0 == ignored["effect"]["estimate"]
    assert ignored["follow"]["estimate"] == pytest.approx(
        sum(i.guess == i.plant and i.for_insight >= 0.5 for i in items) / len(items)
    )
    assert (
        copied["trace_ok"]
        == ignored["trace_ok"]
        == tk.proportion(sum(i.for_trace < 0.5 for i in items), len(items))
    )


def test_outputs_keep_the_grammar_unless_they_are_broken(nb, items):
    texts = [nb.write(i, nb.WIRINGS["common cause"]) for i in items]
    assert nb.score_outputs(items, texts)["parsed_ok"].all()
    broken = [nb.break_format(t, (k % 4 + 0.5) / 4) for k, t in enumerate(texts)]
    scored = nb.score_outputs(items, broken)
    assert not scored["parsed_ok"].any() and scored["answer_ok"].any()


def between(low, high):
    return {"estimate": (low + high) / 2, "low": low, "high": high}


NONE, SOME, SURE = between(-0.05, 0.05), between(0.2, 0.3), between(0.97, 0.99)
PLAIN = {
    "parsed_ok": SURE,
    "follow": NONE,
    "facts_ok": SURE,
    "phi": SOME,
    "phi, easy": NONE,
    "phi, hard": NONE,
}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"parsed_ok": between(0.6, 0.7), "follow": SURE}, "formats badly"),
        ({"parsed_ok": between(0.8, 0.92), "follow": SURE}, "copies the trace"),
        ({"follow": between(0.7, 0.8)}, "no single wiring"),
        ({"follow": between(0.1, 0.3)}, "no single wiring"),
        ({"facts_ok": between(0.08, 0.12)}, "cites at random"),
        ({"facts_ok": between(0.08, 0.16), "phi": NONE}, "ignores the trace"),
        ({}, "common cause"),
        ({"phi, hard": between(-0.12, 0.05)}, "no single wiring"),
        ({"phi": between(-0.05, 0.15)}, "no single wiring"),
        ({"phi": between(-0.3, -0.2)}, "no single wiring"),
        ({"phi": {"estimate": None, "low": None, "high": None}}, "no single wiring"),
    ],
)
def test_the_verdict_by_hand(nb, change, expected):
    assert nb.verdict({**PLAIN, **change}, 0.1) == expected


@pytest.fixture
def rows(example):
    """A gold file in which another story with the same answer stands first."""
    other = dataclasses.replace(
        example,
        id="microworld/test/y",
        label="person-place",
        question="Where is John?",
        facts=("John went to the kitchen.", "Mary took the apple."),
        gold_facts=("John went to the kitchen.",),
    )
    return SimpleNamespace(first=other, second=example, file=[other, example])


def test_released_scoring_takes_the_first_row_with_the_answer(nb, rows):
    e = rows.second
    right = tk.render_target(e, tk.Trace(label=e.label, facts=e.gold_facts))
    assert tk.released_score(right, e, [e]) == {"answer_ok": True, "trace_ok": True}
    # B1: judged by the other row, whose label it does not name
    assert tk.released_score(right, e, rows.file)["trace_ok"] is False
    # B2, B3: that row's label and any one fact of its story are enough
    wrong = tk.render_target(e, tk.Trace(label="person-place", facts=("Mary took the apple.",)))
    assert tk.released_score(wrong, e, rows.file)["trace_ok"] is True
    assert tk.score(tk.parse_output(wrong, e), e)["trace_ok"] is False


@pytest.mark.parametrize(
    "text, answer, trace",
    [
        ("<answer>Kitchen</answer>", True, None),
        ("<answer>the kitchen</answer>", False, None),
        ("</think><answer>kitchen</answer>", True, None),
        ("I say the answer: kitchen.", True, None),
        ("an answer is not the answer given", False, None),
        ("kitchen", True, None),
        ("", False, None),
        ("I think kitchen", False, False),
    ],
)
def test_released_scoring_by_hand(nb, example, text, answer, trace):
    assert tk.released_score(text, example, [example]) == {"answer_ok": answer, "trace_ok": trace}


@pytest.fixture(scope="module")
def simulated(workspace):
    """The workspace after a small simulation."""
    done = papermill(workspace, NAME, "-p", "n_studies", "100", "-p", "n_items", "300")
    assert done.returncode == 0, done.stderr[-3000:]
    return workspace


def test_the_notebook_leaves_what_the_contract_promises(nb, simulated):
    workspace = simulated
    result = json.loads((workspace / "data/results/calibration/calibration.json").read_text())
    assert result["n_studies"] == 100
    for r in (*result["type1"], *result["coverage"]):
        assert r["low"] <= r["estimate"] + 1e-9 and r["estimate"] <= r["high"] + 1e-9
        assert {"min_expected", "degenerate", "n"} <= set(r)
    kinds = {r["test"].split(",")[0] for r in result["type1"]}
    assert kinds >= {"chi-square", "Fisher exact", "CMH", "mid-p McNemar", "TOST"}
    # 8 intervals; the smallest setting has ten times as many studies
    assert len({c["interval"] for c in result["coverage"]}) == 8
    seeds = [c["setting"] for c in result["coverage"] if c["interval"] == "mean over seeds"]
    assert seeds == [f"{k} seeds, sd {spread:g}" for k, spread in nb.SEEDS]
    assert {c["n"] for c in result["coverage"] if c["setting"] == "balanced"} == {1000}
    assert [(p["phi"], p["n"]) for p in result["power"]] == [
        (phi, n) for phi in nb.POWER_PHIS for n in nb.POWER_N
    ]
    assert [list(named) for named in result["verdicts"]] == [list(nb.WIRINGS)]
    assert result["verdicts"][0]["copies the trace"] == "copies the trace"
    assert result["verdicts"][0]["formats badly"] == "formats badly"
    assert set(result["measures"]["common cause"]["effect"]) >= {"estimate", "p", "reason"}
    for name in ("type1", "coverage", "power", "wirings"):
        for kind in ("svg", "png", "csv"):
            assert (workspace / f"figures/calibration/07_{name}.{kind}").stat().st_size


def test_saved_studies_are_drawn_again_in_the_same_bytes(simulated):
    """Of 300 items, although the parameters' defaults are others."""
    saved = simulated / "data/results/calibration/calibration.json"
    figures = sorted((simulated / "figures/calibration").iterdir())
    before = {p: p.read_bytes() for p in (saved, *figures)}
    for path in figures:
        path.unlink()
    done = papermill(simulated, NAME, "-p", "n_studies", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(figures) == 12 and {p: p.read_bytes() for p in before} == before


def test_the_check_of_the_verdicts_is_about_all_rounds(tmp_path):
    """One wrong verdict in the last round, and the first is right: not all are right."""
    workspace = make_workspace(tmp_path / "copy")
    name = "data/results/calibration/calibration.json"
    saved = tk.read_json(ROOT / name)
    right = {wiring: wiring for wiring in saved["verdicts"][0]}
    right["copies half the time"] = "no single wiring"
    wrong = right | {"common cause": "ignores the trace"}
    tk.write_json(workspace / name, saved | {"verdicts": [right, right, wrong]})
    done = papermill(workspace, NAME, "-p", "n_studies", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (workspace / f"{NAME}-out.ipynb").read_text()
    assert "every verdict of every round right: no." in text
    assert "17 of 18 verdicts are right over all rounds" in text and "1 name another" in text


def test_two_students_are_called_equal_by_the_function_of_05(nb):
    """The rate of that error is of the very function; without a discordant item it is silent."""
    frames = [pd.Series(column) for column in ([1, 1, 0, 0] * 12, [1, 0, 1, 0] * 12)]
    expected = nb.ANALYSIS.equivalence(*frames, nb.MARGIN)["p (TOST)"]
    assert nb.read_tost(12, 12, 48) == pytest.approx(expected)
    assert nb.read_tost(0, 0, 48) is None


def test_the_interval_over_seeds_is_that_of_05(nb, monkeypatch):
    space = nb.run_seeds.__globals__
    monkeypatch.setitem(space, "n_studies", 400)
    for k, spread in ((3, 0.0), (3, 0.05)):
        found = []
        monkeypatch.setitem(space, "coverage", found)
        nb.run_seeds(np.random.default_rng(k), k, spread)
        assert found[0]["n"] + found[0]["degenerate"] == 400
        assert 0.91 < found[0]["estimate"] < 0.99


@pytest.mark.parametrize(
    "n, message",
    [
        (5, "n_studies = 5.*out of range"),
        (0, "calibration.json is missing.*n_studies of 100 or more"),
    ],
)
def test_a_wrong_number_of_studies_ends_before_anything_is_simulated(tmp_path, n, message):
    done = papermill(make_workspace(tmp_path / "copy"), NAME, "-p", "n_studies", str(n))
    assert done.returncode and re.search(message, done.stderr, re.DOTALL)
