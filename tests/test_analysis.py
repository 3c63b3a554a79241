"""04: names of arms, comparisons over items and over seeds, equivalence; by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import notebook_functions
from hypothesis import given
from hypothesis import strategies as st

import tracekd_utils as tk


@pytest.fixture(scope="module")
def analyse():
    return notebook_functions("04_analyse_disconnect")


def answers(text):
    """Answers by item id, `1` is right."""
    return pd.Series([c == "1" for c in text], [f"id{k}" for k in range(len(text))])


def test_an_arm_is_named_by_condition_dose_and_what_varies(analyse):
    p = {"condition": "incorrect", "dose": 1.0, "student": "Qwen/Qwen3-1.7B"}
    assert analyse.arm_of(p, []) == "incorrect"
    assert analyse.arm_of({**p, "dose": 0.25}, []) == "incorrect, 25% of rows"
    assert analyse.arm_of(p, ["student"]) == "incorrect, Qwen3-1.7B"
    assert [
        analyse.arm_of({**p, "protocol": k}, ["protocol"]) for k in ("controlled", "published")
    ] == ["incorrect", "incorrect, published"]


def test_compared_arms_differ_in_their_condition_or_in_their_protocol(analyse):
    p = {"condition": "correct", "dataset": "babi", "student": "tiny", "protocol": "controlled"}
    theirs, wrong = {**p, "protocol": "published"}, {"condition": "incorrect"}
    assert analyse.matched({**p, **wrong}, p) and analyse.matched({**theirs, **wrong}, theirs)
    assert analyse.matched(theirs, p) and not analyse.matched(p, theirs)
    assert not analyse.matched({**theirs, **wrong}, p)
    assert not analyse.matched({**p, **wrong, "student": "other"}, p)


def test_answers_are_split_by_what_the_corruption_could_change(analyse, monkeypatch):
    def run(arm, right):
        return SimpleNamespace(
            arm=arm,
            seed=0,
            frame=pd.DataFrame({"id": list("abcd"), "answer_ok": [c == "1" for c in right]}),
        )

    monkeypatch.setitem(
        analyse.apart.__globals__,
        "runs",
        [run("correct", "1101"), run("masked", "0111"), run("vanilla", "1111")],
    )
    found = {
        (r["arm"], r["its items"]): (r["estimate"], r["n"]) for r in analyse.apart("masked", ["d"])
    }
    assert found == {
        ("correct", "changed"): (2 / 3, 3),
        ("correct", "unchanged"): (1.0, 1),
        ("masked", "changed"): (2 / 3, 3),
        ("masked", "unchanged"): (1.0, 1),
    }


@pytest.mark.parametrize("study", ["babi", "laptop"])
def test_unchanged_items_are_listed_for_the_conditions_that_have_some(study):
    folder = tk.ROOT / "data/results" / study
    checks = json.loads((folder / "manipulation_checks.json").read_text())
    listed = {
        c: v["unchanged_test_ids"]
        for c, v in checks["conditions"].items()
        if "unchanged_test_ids" in v
    }
    assert (
        set(listed)
        == {"masked", "wrong_with_answer"}
        == {c for c, v in checks["conditions"].items() if v.get("applies", 1) < 1}
    )
    tested = {
        r["id"] for p in folder.glob("*-correct-*/predictions.jsonl") for r in tk.read_jsonl(p)
    }
    for ids in listed.values():
        assert 0 < len(ids) == len(set(ids)) < len(tested) and set(ids) < tested


def test_a_comparison_is_paired_by_id_whatever_the_order(analyse):
    a, b = answers("11110000"), answers("11000100")
    found = analyse.compare(a, b[::-1])
    assert (found["n"], found["only first right"], found["only second right"]) == (8, 2, 1)
    assert found["estimate"] == pytest.approx(1 / 8)
    assert found["low"] < found["estimate"] < found["high"]
    # mid-p McNemar with 2 against 1: 2 (1/8 + 3/8) - 3/8
    assert found["p"] == pytest.approx(2 * (1 / 8 + 3 / 8) - 3 / 8)
    assert analyse.compare(a, b.drop("id0"))["n"] == 7


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_comparison_turned_round_changes_its_sign_alone(pairs):
    analyse = notebook_functions("04_analyse_disconnect")
    a, b = (pd.Series(column, dtype=bool) for column in zip(*pairs))
    one, other = analyse.compare(a, b), analyse.compare(b, a)
    assert one["estimate"] == -other["estimate"] and one["p"] == other["p"]
    assert one["low"] == pytest.approx(-other["high"])


def test_seeds_carry_a_t_interval(analyse):
    one = analyse.over_seeds(np.array([0.1]))
    assert one == {"seeds": 1, "mean": 0.1, "low": None, "high": None}
    three = analyse.over_seeds(np.array([0.1, 0.2, 0.3]))
    half = 4.302653 * 0.1 / math.sqrt(3)  # t quantile for 2 degrees of freedom
    assert three["mean"] == pytest.approx(0.2) and three["seeds"] == 3
    assert (three["low"], three["high"]) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)


def test_equivalence_needs_items_in_proportion_to_the_discordant_ones(analyse):
    a, b = answers("10" * 50 + "1" * 300), answers("01" * 50 + "1" * 300)
    found = analyse.equivalence(a, b, 0.05)
    assert found["discordant"] == 0.25
    # (1.644854 + 1.281552)^2 * 0.25 / 0.0025
    assert found["n needed"] == math.ceil((1.6448536 + 1.2815516) ** 2 * 0.25 / 0.05**2)
    # no difference, standard error 0.5/sqrt(399) about: t of 0.05 over it
    t = 0.05 / math.sqrt(100 / 399 / 400)
    from scipy import stats

    assert found["p (TOST)"] == pytest.approx(stats.t.sf(t, 399))
    assert analyse.equivalence(a, a, 0.05) == {"discordant": 0.0, "p (TOST)": 0.0, "n needed": 0}
    assert analyse.equivalence(a, b, 0.2)["p (TOST)"] < found["p (TOST)"]


def test_a_verdict_needs_both_tests(analyse):
    assert analyse.verdict(0.5, 0.5) == "undecided"
    assert analyse.verdict(0.01, 0.5) == "differ"
    assert analyse.verdict(0.5, 0.01) == "equivalent"
    assert analyse.verdict(0.01, 0.01) == "differ, within the margin"


def test_two_runs_of_one_arm_and_seed_are_refused(analyse, tmp_path):
    parameters = {
        "condition": "correct",
        "dose": 1.0,
        "seed": 0,
        "dataset": "microworld",
        "student": "tiny",
        "protocol": "controlled",
    }
    for name in ("one", "two"):
        tk.write_json(tmp_path / name / "metrics.json", {"parameters": parameters})
        tk.write_jsonl(tmp_path / name / "predictions.jsonl", [{"id": "x"}])
    with pytest.raises(ValueError, match="more than one run of .*correct.*stale"):
        analyse.read_runs(tmp_path)
    tk.write_json(
        tmp_path / "two" / "metrics.json",
        {"parameters": {**parameters, "student": "other/student"}},
    )
    assert [r.arm for r in analyse.read_runs(tmp_path)] == ["correct, student", "correct, tiny"]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        analyse.read_runs(tmp_path / "none")


def test_the_published_numbers_are_those_that_the_reaudit_reproduces(analyse):
    """bAbI: the released scoring in our code gives the same answers to one decimal."""
    from conftest import ROOT

    table = analyse.PUBLISHED.set_index(["dataset", "student", "condition"])["answer"]
    rows = json.loads((ROOT / "data/results/reaudit/babi.json").read_text())
    found = {
        (r["student"], r["variant"]): r["accuracy_released_scorer"]
        for r in rows
        if r["label_file"] == "all"
    }
    assert len(found) == 6
    for (student, variant), value in found.items():
        assert round(value, 1) == table["babi", student, variant]
