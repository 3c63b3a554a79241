"""Calibration: array statistics are the helper's, students are wired as they say."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import make_workspace, notebook_functions, papermill
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import tracekd_utils as tk

NAME = "07_calibrate_instrument"
counts = st.lists(st.integers(0, 60), min_size=4, max_size=4).map(np.array)


@pytest.fixture(scope="module")
def nb():
    return notebook_functions(NAME)


@pytest.fixture(scope="module")
def items(nb):
    return [nb.make_item(i, 3) for i in range(240)]


def frame(cells, label="a"):
    """One row an item, TP, FP, FN, TN."""
    return pd.DataFrame(
        {
            "trace_ok": np.repeat([True, False, True, False], cells),
            "answer_ok": np.repeat([True, True, False, False], cells),
            "label": label,
        }
    )


@settings(max_examples=30)
@given(counts.filter(lambda c: c.sum() > 0))
def test_array_statistics_are_those_of_the_helper(cells):
    nb = notebook_functions(NAME)
    whole, degenerate = nb.split_degenerate(cells[None])
    helper = tk.disconnect_statistics(frame(cells))
    assert len(whole) + degenerate == 1
    assert (helper["test"]["p"] is None) is bool(degenerate)
    if degenerate:
        return
    p, fisher = nb.table_test(whole)
    assert p[0] == pytest.approx(helper["test"]["p"], rel=1e-9)
    assert fisher[0] == (helper["test"]["name"] == "Fisher exact")
    ours = nb.formula_intervals(whole) | {"phi": nb.phi_interval(whole)}
    for name, theirs in (
        ("difference", helper["difference"]),
        ("odds ratio", helper["odds_ratio"]),
        ("phi", helper["phi"]),
        ("share of answers", tk.proportion(int(cells[:2].sum()), int(cells.sum()))),
        ("answer given trace right", helper["answer_given_trace_ok"]),
        ("answer given trace wrong", helper["answer_given_trace_wrong"]),
    ):
        low, high = (end[0] for end in ours[name])
        assert (low, high) == pytest.approx((theirs["low"], theirs["high"]), rel=1e-9, abs=1e-12), (
            name
        )


@settings(max_examples=40)
@given(st.lists(counts.filter(lambda c: c.sum() > 1), min_size=1, max_size=4))
def test_stratified_p_is_that_of_the_helper(strata):
    nb = notebook_functions(NAME)
    helper = tk.disconnect_statistics(
        pd.concat([frame(c, label=str(k)) for k, c in enumerate(strata)])
    )["by_label"]
    p = nb.stratified_test(np.array(strata)[None])[0]
    assert math.isnan(p) if helper["p"] is None else p == pytest.approx(helper["p"])


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(0, 40))
def test_paired_statistics_are_those_of_helper_and_scipy(b, c):
    nb = notebook_functions(NAME)
    first, second = np.repeat([[1, 0], [0, 1], [1, 1]], [b, c, 9], axis=0).T
    assert nb.paired_test(np.array([b]), np.array([c]))[0] == pytest.approx(
        tk.mcnemar_midp(first, second)["p"]
    )
    low, high = nb.paired_interval(np.array([b]), np.array([c]), b + c + 9)
    if b + c:
        assert (low[0], high[0]) == pytest.approx(
            tuple(stats.ttest_1samp(first - second, 0).confidence_interval())
        )
    one = nb.paired_difference(first, second)
    assert one["estimate"] == pytest.approx((b - c) / (b + c + 9))
    assert one["low"] == pytest.approx(low[0])


def test_the_bootstrap_of_counts_is_that_of_items(nb):
    """Drawing counts and resampling items agree up to the noise of the draws."""
    b, c, rest = 40, 15, 145
    d = np.repeat([1.0, -1.0, 0.0], [b, c, rest])
    reference = stats.bootstrap(
        (d,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = nb.paired_bootstrap(np.array([[b, c, rest]] * 2))
    assert low[0] == low[1] and (low[0], high[0]) == pytest.approx(tuple(reference), abs=0.01)


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
    low, high = nb.phi_interval(np.array([[30, 0, 0, 30]]))
    assert 0.8 < low[0] < 1 and high[0] == 1
    assert nb.plain_interval(np.array([[30, 0, 0, 30]])).ravel().tolist() == [1, 1]


def test_items_can_be_read_off_their_gold_facts(nb, items):
    for i in items:
        e = tk.check_example(i.example, "here")
        assert len(set(e.facts)) == 8 and not set(i.wrong) & set(e.gold_facts)
        assert nb.read_off(e.gold_facts, i) == e.answers[0]
        assert nb.read_off(i.planted, i) == i.plant != e.answers[0]
        assert i.guess != e.answers[0] and set(i.chance) <= set(e.facts)
    assert {i.example.label for i in items} == set(nb.ASKS)


def test_a_copying_student_follows_and_an_ignoring_one_does_not(nb, items):
    copies = nb.Wiring((0.5, 0.5), (0.5, 0.5), copies=1.0)
    ignores = nb.Wiring((0.5, 0.5), (0.5, 0.5))
    copied, ignored = nb.measure(items, copies), nb.measure(items, ignores)
    assert copied["follow"]["estimate"] == 1 and copied["effect"]["estimate"] < -0.8
    # what an ignoring student says under a plant is its own answer, letter for letter
    assert ignored["flip"]["estimate"] == 0 == ignored["effect"]["estimate"]
    assert ignored["follow"]["estimate"] == pytest.approx(
        sum(i.guess == i.plant and i.u[2] >= 0.5 for i in items) / len(items)
    )
    assert (
        copied["trace_ok"]
        == ignored["trace_ok"]
        == tk.proportion(sum(i.u[0] < 0.5 for i in items), len(items))
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
    rates = [*result["type1"].values(), *result["coverage"].values()]
    assert all(0 <= r["low"] <= r["rate"] + 1e-9 and r["rate"] <= r["high"] + 1e-9 for r in rates)
    assert all({"rate", "asymptotic", "min_expected"} <= set(r) for r in result["type1"].values())
    kinds = {name.split(",")[0] for name in result["type1"]}
    assert kinds >= {"chi-square", "Fisher exact", "CMH", "mid-p McNemar"}
    assert len({c["interval"] for c in result["coverage"].values()}) == 8
    assert [(p["phi"], p["n"]) for p in result["power"]] == [
        (phi, n) for phi in nb.POWER_PHIS for n in nb.POWER_N
    ]
    assert [v["wiring"] for v in result["verdicts"]] == list(nb.WIRINGS)
    found = {v["wiring"]: v["found"] for v in result["verdicts"]}
    assert found["copies the trace"] == "copies the trace"
    assert found["formats badly"] == "formats badly"
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


@pytest.mark.parametrize(
    "n, message",
    [(5, "n_studies.*out of range"), (0, "calibration.json is missing.*n_studies of 100 or more")],
)
def test_a_wrong_number_of_studies_ends_before_anything_is_simulated(tmp_path, n, message):
    done = papermill(make_workspace(tmp_path / "copy"), NAME, "-p", "n_studies", str(n))
    assert done.returncode and re.search(message, done.stderr, re.DOTALL)
