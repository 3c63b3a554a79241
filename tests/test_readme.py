"""The numbers in the README are those of the committed results."""

import json
import re

import pandas as pd
import pytest
from conftest import ROOT

import tracekd_utils as tk

README = (ROOT / "README.md").read_text()


def table(name):
    """Rows of the README table between two comments, as lists of cell texts."""
    body = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)[1]
    return [[c.strip() for c in line.strip("|").split("|")] for line in body.splitlines()[2:]]


def percent(value):
    return "–" if value is None else f"{100 * value:.1f}%"


def arm(p):
    """Condition, with the dose and the protocol where they are not the usual ones."""
    return (
        f"`{p['condition']}`"
        + ("" if p["dose"] == 1 else f" {p['dose']:.0%}")
        + ("" if p["protocol"] == "controlled" else f", {p['protocol']}")
    )


def test_every_row_of_the_result_table_is_a_committed_run():
    runs = {}
    for path in sorted((ROOT / "data/results").glob("*/*/metrics.json")):
        m = json.loads(path.read_text())
        p = m["parameters"]
        runs[p["dataset"], arm(p), str(p["seed"])] = m
    rows = table("results")
    assert len(rows) == len(runs) and {tuple(r[:3]) for r in rows} == set(runs)
    for dataset, condition, seed, n, answer, label, facts, trace, cells, command in rows:
        m = runs[dataset, condition, seed]
        right = tk.proportion(round(m["answer_ok"] * m["n_test"]), m["n_test"])
        assert n == str(m["n_test"])
        assert answer == (
            f"{percent(right['estimate'])} ({percent(right['low'])}–{percent(right['high'])})"
        )
        assert [label, facts, trace] == [percent(m[f"{k}_ok"]) for k in ("label", "facts", "trace")]
        q = m["quadrants"]
        assert cells == (" / ".join(str(q[k]) for k in ("TP", "FP", "FN", "TN")) if q else "–")
        assert re.match(r"`(make study|03 -p dataset )", command)


@pytest.mark.parametrize("dataset", ["cotempqa", "babi"])
def test_the_reaudit_table_is_the_committed_reaudit(dataset):
    rows = json.loads((ROOT / f"data/results/reaudit/{dataset}.json").read_text())
    rows = {(r["student"], f"`{r['variant']}`"): r for r in rows if r["label_file"] == "all"}
    shown = {tuple(r[1:3]): r[3:] for r in table("reaudit") if r[0] == dataset}
    assert set(shown) == set(rows)
    for key, cells in shown.items():
        r = rows[key]
        own = tk.proportion(round(r["accuracy_corrected"] * r["n"] / 100), r["n"])
        phi = "–" if r["phi_corrected"] is None else f"{r['phi_corrected']:.2f}"
        assert cells[0] == str(r["n"]) and cells[1] == f"{r['accuracy_released_scorer']:.1f}"
        assert cells[2] == (
            f"{r['accuracy_corrected']:.1f} ({100 * own['low']:.1f}–{100 * own['high']:.1f})"
        )
        assert cells[3] == ("–" if r["trace_ok"] is None else f"{100 * r['trace_ok']:.1f}")
        assert cells[-1] == phi


def test_the_intervention_table_is_the_committed_one():
    found = {}
    for path in sorted((ROOT / "data/results").glob("*/*/interventions.json")):
        p = json.loads((path.parent / "metrics.json").read_text())["parameters"]
        found[p["dataset"], arm(p), str(p["seed"])] = json.loads(path.read_text())
    rows = table("interventions")
    assert {tuple(r[:3]) for r in rows} == set(found)
    for dataset, condition, seed, n, own, flip, follow, n_planted, effect in rows:
        r = found[dataset, condition, seed]
        planted, (low, high) = r["arms"]["planted"], r["ate_interval"]
        assert (n, n_planted) == (str(r["n"]), str(planted["n"]))
        assert own == percent(r["own_identical"])
        assert flip == percent(r["arms"]["wrong_facts"]["flip_rate"])
        assert follow == percent(planted["follow_rate"])
        assert effect == (
            f"{100 * r['ate_answer_ok']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        )


def points(row):
    """A difference of shares and its interval, in points."""
    return f"{100 * row.estimate:+.1f} points ({100 * row.low:+.1f} to {100 * row.high:+.1f})"


def findings():
    """Sentences of `What came out`, out of the tables behind the committed figures."""
    figures = ROOT / "figures"
    pairs = pd.read_csv(figures / "babi/05_differences.csv")
    seeds = pairs[pairs["over"] == "seeds"].set_index(["first", "second"])
    rows = {"wrong": ("incorrect", "correct"), "none": ("vanilla", "correct")}
    rows["against"] = ("incorrect", "vanilla")
    said = {name: points(seeds.loc[pair]) for name, pair in rows.items()}
    n = int(seeds["n"].iloc[0])
    phi = pd.read_csv(figures / "babi/05_association.csv").query("measure == 'phi'")
    phi = phi[phi["arm"] == "correct"].sort_values("seed")
    phis = ", ".join(f"{r.estimate:.2f} ({r.low:.2f} to {r.high:.2f})" for r in phi.itertuples())
    after = pd.read_csv(figures / "microworld/05_association.csv").query("measure == 'phi'")
    after = after.set_index("arm").loc["after_answer"]
    forced = pd.read_csv(figures / "babi/05_interventions.csv").set_index(["arm", "measure"])
    follow = {arm: forced.loc[arm, "follow"] for arm in ("correct", "incorrect")}
    effect = {arm: forced.loc[arm, "effect"] for arm in ("correct", "incorrect")}
    audit = tk.read_json(ROOT / "data/results/reaudit/cotempqa-details.json")["claims"]
    audit = [r for r in audit if r["variant"] == "correct" and "Qwen" in r["student"]]
    cells = {r["cells"]: r for r in audit}
    ours, theirs = cells["own gold"], cells["released matrix"]
    return [
        f"bAbI, {n} seeds, 600 test items each: training on never-gold traces costs answers, "
        f"{said['wrong']} against `correct`. No trace at all is undecided between the two: "
        f"{said['none']} against `correct`, and never-gold against no trace {said['against']} "
        "(t intervals over seeds).",
        "In the `correct` students right traces go with right answers: phi "
        f"{phis}, n = 600 a seed.",
        "That alone shows no use of the trace: a student that writes its trace *behind* the answer "
        f"has phi {after.estimate:.2f} ({after.low:.2f} to {after.high:.2f}), "
        f"n = {after.n:.0f} (microworld).",
        f"Forced traces decide. The `correct` student gives a planted answer in "
        f"{follow['correct'].estimate:.1%} of {follow['correct'].n:.0f} items, wrong facts cost it "
        f"{points(effect['correct'])}; the `incorrect` student follows in "
        f"{follow['incorrect'].estimate:.1%}, and wrong facts change it by "
        f"{points(effect['incorrect'])} (bAbI, seed 0, n = {effect['correct'].n:.0f}).",
        "The paper's own outputs, each scored against its own gold (CoTempQA, Qwen3-1.7B, "
        f"`correct`): phi {ours['phi']:.2f} where the released scoring has {theirs['phi']:.2f}, "
        f"n = {ours['n']}.",
    ]


def test_what_came_out_is_what_the_figures_hold():
    block = re.search(r"<!-- findings -->\n(.*?)\n<!-- /findings -->", README, re.S)[1]
    shown = [" ".join(part.split()) for part in block.removeprefix("- ").split("\n- ")]
    assert shown == findings()
