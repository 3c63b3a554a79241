"""Statistics on hand-computed tables, with the libraries as reference."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from statsmodels.stats.contingency_tables import StratifiedTable, Table2x2, mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep

import tracekd_utils as tk


def frame(tp, fp, fn, tn, label="a"):
    """One row an item, from the four counts."""
    cells = (
        [(True, True)] * tp + [(False, True)] * fp + [(True, False)] * fn + [(False, False)] * tn
    )
    return pd.DataFrame(cells, columns=["trace_ok", "answer_ok"]).assign(label=label)


def test_quadrants_are_trace_first_then_answer():
    table = frame(4, 3, 2, 1).sample(frac=1, random_state=0)
    assert tk.quadrants(table) == {"TP": 4, "FP": 3, "FN": 2, "TN": 1}
    assert tk.quadrants(table.astype(object)) == tk.quadrants(table)


def test_quadrants_are_null_without_traces_or_items():
    table = frame(2, 1, 1, 1).astype(object)
    table.loc[0, "trace_ok"] = None
    assert tk.quadrants(table) is None and tk.quadrants(table[:0]) is None
    out = tk.disconnect_statistics(table)
    assert out["quadrants"] is None and out["reason"]


def test_rates_by_hand():
    out = tk.disconnect_statistics(frame(30, 20, 10, 40))
    assert out["n"] == 100 and out["joint"]["TP"]["estimate"] == 0.3
    assert out["answer_given_trace_ok"]["estimate"] == 30 / 40
    assert out["answer_given_trace_ok"]["n"] == 40
    assert out["answer_given_trace_wrong"]["estimate"] == 20 / 60
    assert out["difference"]["estimate"] == pytest.approx(30 / 40 - 20 / 60)
    assert out["phi"]["estimate"] == pytest.approx(
        (30 * 40 - 20 * 10) / math.sqrt(40 * 60 * 50 * 50)
    )
    assert out["odds_ratio"]["estimate"] == pytest.approx(30 * 40 / (20 * 10))
    chi2 = 100 * (30 * 40 - 20 * 10) ** 2 / (40 * 60 * 50 * 50)
    assert out["test"]["statistic"] == pytest.approx(chi2)
    assert out["test"]["p"] == pytest.approx(stats.chi2.sf(chi2, 1))


@pytest.mark.parametrize(
    "cells", [(30, 20, 10, 40), (5, 60, 70, 9), (50, 50, 50, 50), (200, 3, 12, 90)]
)
def test_association_is_that_of_the_libraries(cells):
    table, out = frame(*cells), tk.disconnect_statistics(frame(*cells))
    tp, fp, fn, tn = cells
    assert out["phi"]["estimate"] == pytest.approx(
        matthews_corrcoef(table["trace_ok"], table["answer_ok"])
    )
    assert out["phi"]["low"] <= out["phi"]["estimate"] <= out["phi"]["high"]
    # delta method (Agresti 2013, section 3.1.7, by simulation): width within a tenth
    draws = (
        np.random.default_rng(1)
        .multinomial(sum(cells), np.array(cells) / sum(cells), 20_000)
        .astype(float)
    )
    a, b, c, d = draws.T
    phi = (a * d - b * c) / np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    assert out["phi"]["high"] - out["phi"]["low"] == pytest.approx(
        np.subtract(*np.percentile(phi, [97.5, 2.5])), rel=0.1
    )
    odds = Table2x2(np.array([[tp, fn], [fp, tn]]), shift_zeros=False)
    assert [out["odds_ratio"][k] for k in ("estimate", "low", "high")] == pytest.approx(
        [odds.oddsratio, *odds.oddsratio_confint()]
    )
    low, high = confint_proportions_2indep(tp, tp + fn, fp, fp + tn, method="newcomb")
    assert (out["difference"]["low"], out["difference"]["high"]) == pytest.approx((low, high))
    assert out["test"]["p"] == pytest.approx(
        stats.chi2_contingency([[tp, fn], [fp, tn]], correction=False).pvalue
    )


def test_fisher_below_an_expected_count_of_five():
    out = tk.disconnect_statistics(frame(6, 2, 1, 5))["test"]
    assert out["name"] == "Fisher exact" and out["min_expected"] == pytest.approx(42 / 14)
    assert out["p"] == pytest.approx(stats.fisher_exact([[6, 1], [2, 5]]).pvalue)
    assert tk.disconnect_statistics(frame(30, 20, 10, 40))["test"]["name"] == "chi-square"


def test_haldane_anscombe_where_a_cell_is_empty():
    out = tk.disconnect_statistics(frame(8, 4, 0, 6))["odds_ratio"]
    log = math.log(8.5 * 6.5 / (4.5 * 0.5))
    half = stats.norm.ppf(0.975) * math.sqrt(1 / 8.5 + 1 / 6.5 + 1 / 4.5 + 1 / 0.5)
    assert [out[k] for k in ("estimate", "low", "high")] == pytest.approx(
        np.exp([log, log - half, log + half])
    )
    assert "half" in out["reason"]
    assert tk.disconnect_statistics(frame(8, 4, 1, 6))["odds_ratio"]["reason"] is None


@pytest.mark.parametrize(
    "cells, reason",
    [
        ((3, 0, 2, 0), "all traces are right"),
        ((0, 3, 0, 2), "all traces are wrong"),
        ((3, 2, 0, 0), "all answers are right"),
        ((0, 0, 3, 2), "all answers are wrong"),
        ((5, 0, 0, 0), "all traces are right"),
        ((0, 0, 0, 1), "all traces are wrong"),
    ],
)
def test_an_empty_margin_gives_null_and_its_reason(cells, reason):
    out = tk.disconnect_statistics(frame(*cells))
    for name in ("phi", "odds_ratio"):
        assert out[name]["estimate"] is None and out[name]["reason"] == reason
    assert out["test"]["p"] is None and out["test"]["reason"] == reason
    assert out["by_label"]["p"] is None and out["by_label"]["reason"]
    json.dumps(out, allow_nan=False)


def test_strata_are_those_of_the_library_and_empty_ones_are_left_out():
    parts = [(12, 5, 6, 20), (30, 14, 9, 11), (7, 0, 3, 0)]
    table = pd.concat([frame(*c, label=k) for k, c in zip("abc", parts, strict=True)])
    out = tk.disconnect_statistics(table)["by_label"]
    reference = StratifiedTable(
        [np.array([[tp, fn], [fp, tn]], float) for tp, fp, fn, tn in parts[:2]]
    )
    assert out["strata"] == 2
    assert out["odds_ratio"] == pytest.approx(reference.oddsratio_pooled)
    assert out["p"] == pytest.approx(reference.test_null_odds(correction=False).pvalue)


def exact_by_enumeration(tables):
    """Two-sided exact p of 2x2 tables given their margins, by listing all sums."""
    chances = {0: 1.0}
    for table in tables:
        n, first, column = table.sum(), table[0].sum(), table[:, 0].sum()
        draw = {
            k: math.comb(column, k) * math.comb(n - column, first - k) / math.comb(n, first)
            for k in range(max(0, first + column - n), min(first, column) + 1)
        }
        sums = {}
        for s, p in chances.items():
            for k, q in draw.items():
                sums[s + k] = sums.get(s + k, 0) + p * q
        chances = sums
    seen = chances[sum(int(table[0, 0]) for table in tables)]
    return sum(p for p in chances.values() if p <= seen * (1 + 1e-7))


@pytest.mark.parametrize(
    "tables",
    [
        [[[3, 1], [1, 3]]],
        [[[1, 0], [41, 25]], [[7, 4], [17, 39]]],
        [[[0, 2], [5, 1]], [[1, 3], [4, 4]], [[2, 2], [0, 3]]],
    ],
)
def test_small_strata_have_an_exact_p(tables):
    tables = [np.array(table) for table in tables]
    exact, count = tk.lesson("34_read_results").exact_stratified(tables)
    assert exact == pytest.approx(exact_by_enumeration(tables))
    if len(tables) == 1:
        assert exact == pytest.approx(stats.fisher_exact(tables[0]).pvalue)
    parts = [
        frame(t[0, 0], t[1, 0], t[0, 1], t[1, 1], label)
        for label, t in zip("abc", tables, strict=False)
    ]
    assert count < 5
    assert tk.stratified_association(pd.concat(parts))["p"] == pytest.approx(exact)


def test_the_committed_run_with_small_strata_has_its_exact_p(monkeypatch):
    """`wrong_with_answer` of the microworld: chi-square says .026, the exact test .047."""
    monkeypatch.setattr(tk, "RESULTS", tk.ROOT / "data/results")
    run = next(r for r in tk.study_runs("microworld") if r.condition == "wrong_with_answer")
    found = tk.stratified_association(run.frame)
    tables = [
        np.array([[sum(t & a), sum(t & ~a)], [sum(~t & a), sum(~t & ~a)]])
        for _, part in run.frame.groupby("label")
        for t, a in [(part["trace_ok"].to_numpy(bool), part["answer_ok"].to_numpy(bool))]
        if 0 < t.sum() < len(part)
    ]
    chi_square = StratifiedTable(np.stack(tables, -1).astype(float))
    assert chi_square.test_null_odds(correction=False).pvalue == pytest.approx(0.026, abs=5e-4)
    assert found["p"] == pytest.approx(exact_by_enumeration(tables))
    assert found["p"] == pytest.approx(0.047, abs=5e-4) and found["strata"] == 2


def test_large_strata_keep_the_chi_square():
    table = pd.concat([frame(12, 5, 6, 20, "a"), frame(30, 14, 9, 11, "b")])
    reference = StratifiedTable([np.array([[12, 6], [5, 20]]), np.array([[30, 9], [14, 11]])])
    p = reference.test_null_odds(correction=False).pvalue
    assert tk.stratified_association(table)["p"] == pytest.approx(p)


@pytest.mark.filterwarnings("error")  # a warning would carry a path into the notebooks
def test_an_infinite_pooled_odds_ratio_is_null_with_a_reason():
    out = tk.disconnect_statistics(frame(5, 0, 0, 5))
    assert out["by_label"]["odds_ratio"] is None and out["by_label"]["reason"]
    json.dumps(out, allow_nan=False)


def test_wilson_interval_by_hand():
    z, n, p = stats.norm.ppf(0.975), 20, 0.35
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n),
    )
    out = tk.proportion(7, 20)
    assert [out[k] for k in ("estimate", "low", "high")] == pytest.approx(
        [p, centre - half, centre + half]
    )
    none, all_ = tk.proportion(0, 9), tk.proportion(9, 9)
    assert none["low"] == pytest.approx(0) and all_["high"] == pytest.approx(1)
    assert none["high"] == pytest.approx(1 - all_["low"])
    empty = tk.proportion(0, 0)
    assert empty["estimate"] is None and empty["reason"]


@pytest.mark.parametrize("b, c", [(9, 2), (2, 9), (5, 5), (0, 0), (1, 0), (40, 21)])
def test_mcnemar_midp(b, c):
    pairs = [(1, 0)] * b + [(0, 1)] * c + [(1, 1)] * 7 + [(0, 0)] * 3
    first, second = (np.array(x, bool) for x in zip(*pairs, strict=True))
    out = tk.paired_difference(first, second)
    # mid-p = exact p less the probability of the observed split (Fagerland 2013)
    n, k = b + c, min(b, c)
    expected = (
        1.0 if b == c else mcnemar([[7, b], [c, 3]], exact=True).pvalue - (math.comb(n, k) / 2**n)
    )
    assert out["p"] == tk.mcnemar_midp(b, c) == pytest.approx(expected)
    assert (out["only_first"], out["only_second"], out["n"]) == (b, c, len(pairs))
    assert out["estimate"] == pytest.approx((b - c) / len(pairs))
    assert tk.mcnemar_midp(c, b) == pytest.approx(out["p"])


def test_the_interval_of_a_difference_is_scipys_bootstrap():
    first, second = np.array([1, 1, 1, 0, 1, 0, 1, 1]), np.array([0, 1, 0, 0, 1, 1, 0, 1])
    out = tk.paired_difference(first, second)
    expected = stats.bootstrap(
        (first - second,),
        np.mean,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (out["low"], out["high"]) == (expected.low, expected.high)
    # every resample has the share of one of its values, hence eighths
    assert (8 * np.array([out["low"], out["high"]]) % 0.5 == 0).all()


@pytest.mark.filterwarnings("error")
def test_without_spread_there_is_no_interval_but_a_reason():
    for first, second, value in (([1, 0], [1, 0], 0), ([1, 1, 1], [0, 0, 0], 1)):
        out = tk.paired_difference(first, second)
        assert (out["estimate"], out["low"], out["high"]) == (value, None, None)
        assert "equal" in out["reason"]
    assert tk.paired_difference([], [])["estimate"] is None


def test_only_complete_pairs_are_compared_and_only_answers_have_a_p():
    out = tk.paired_difference([1.0, None, 0.0, 1.0], [0.0, 1.0, None, 0.0])
    assert (out["n"], out["only_first"]) == (2, 2)
    out = tk.paired_difference([0.5, 2.5], [0.0, 1.0])
    assert out["estimate"] == 1.0 and out["p"] is None and out["only_first"] is None


def test_the_functions_are_those_of_the_notebook_that_teaches_them():
    from conftest import notebook_functions

    lesson = notebook_functions("05_analyse_disconnect")
    assert tk.disconnect_statistics is lesson.disconnect_statistics
    assert tk.phi_coefficient is lesson.phi_coefficient
    assert tk.stratified_association is lesson.stratified_association


def test_newcombes_interval_is_made_of_wilsons():
    cells = {"TP": 30, "FP": 20, "FN": 10, "TN": 40}
    out = tk.disconnect_statistics(frame(30, 20, 10, 40))["difference"]
    one, two = tk.proportion(30, 40), tk.proportion(20, 60)
    p1, p2 = one["estimate"], two["estimate"]
    assert out["low"] == pytest.approx(
        p1 - p2 - math.hypot(p1 - one["low"], two["high"] - p2), abs=1e-9
    )
    assert out["high"] == pytest.approx(
        p1 - p2 + math.hypot(one["high"] - p1, p2 - two["low"]), abs=1e-9
    )
    assert tk.lesson("05_analyse_disconnect").rate_difference(cells) == out
