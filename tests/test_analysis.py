"""05: names of arms, comparisons over items and over seeds, equivalence; by hand."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, make_workspace, notebook_functions, papermill
from hypothesis import given
from hypothesis import strategies as st

import tracekd_utils as tk


@pytest.fixture(scope="module")
def analyse():
    return notebook_functions("05_analyse_disconnect")


def answers(text):
    """Answers by item id, `1` is right."""
    return pd.Series([c == "1" for c in text], [f"id{k}" for k in range(len(text))])


def arms_of(folder, *several):
    """Names of the arms of a study, one run for each of `several` changes of the parameters."""
    common = {"condition": "incorrect", "dose": 1.0, "seed": 0, "dataset": "babi"}
    common |= {"student": "Qwen/Qwen3-1.7B", "protocol": "controlled"}
    for k, changes in enumerate(several):
        tk.write_json(folder / f"run{k}" / "metrics.json", {"parameters": {**common, **changes}})
    return {run.arm for run in tk.study_runs(folder.name)}


def test_an_arm_is_named_by_condition_dose_and_what_varies(tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tmp_path)
    assert arms_of(tmp_path / "one", {}) == {"incorrect"}
    assert arms_of(tmp_path / "dose", {"dose": 0.25}) == {"incorrect, 25% of rows"}
    students = arms_of(tmp_path / "students", {}, {"student": "tiny"})
    assert students == {"incorrect, Qwen3-1.7B", "incorrect, tiny"}
    protocols = arms_of(tmp_path / "protocols", {}, {"protocol": "published"})
    assert protocols == {"incorrect", "incorrect, published"}


def test_compared_arms_differ_in_their_condition_or_in_their_protocol(analyse):
    p = {"condition": "correct", "dataset": "babi", "student": "tiny", "protocol": "controlled"}
    theirs, wrong = {**p, "protocol": "published"}, {"condition": "incorrect"}
    assert analyse.is_matched({**p, **wrong}, p) and analyse.is_matched({**theirs, **wrong}, theirs)
    assert analyse.is_matched(theirs, p) and not analyse.is_matched(p, theirs)
    assert not analyse.is_matched({**theirs, **wrong}, p)
    assert not analyse.is_matched({**p, **wrong, "student": "other"}, p)


def test_answers_are_split_by_what_the_corruption_could_change(analyse):
    def run(arm, right):
        return SimpleNamespace(
            arm=arm,
            seed=0,
            frame=pd.DataFrame({"id": list("abcd"), "answer_ok": [c == "1" for c in right]}),
        )

    runs = [run("correct", "1101"), run("masked", "0111"), run("vanilla", "1111")]
    found = {
        (r["arm"], r["items"]): (r["estimate"], r["n"])
        for r in analyse.apart(runs, "masked", ["d"])
    }
    assert found == {
        ("correct", "changed"): (2 / 3, 3),
        ("correct", "unchanged"): (1.0, 1),
        ("masked", "changed"): (2 / 3, 3),
        ("masked", "unchanged"): (1.0, 1),
    }


@pytest.mark.parametrize("study", ["babi", "microworld"])
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
        r["id"] for p in folder.glob("*-correct-*/predictions.parquet") for r in tk.read_parquet(p)
    }
    for ids in listed.values():
        assert 0 < len(ids) == len(set(ids)) < len(tested) and set(ids) < tested


def test_a_comparison_is_paired_by_id_whatever_the_order(analyse):
    a, b = answers("11110000"), answers("11000100")
    found = analyse.compare(a, b[::-1])
    assert (found["n"], found["only_first"], found["only_second"]) == (8, 2, 1)
    assert found["estimate"] == pytest.approx(1 / 8)
    assert found["low"] < found["estimate"] < found["high"]
    # mid-p McNemar with 2 against 1: 2 (1/8 + 3/8) - 3/8
    assert found["p"] == pytest.approx(2 * (1 / 8 + 3 / 8) - 3 / 8)
    assert analyse.compare(a, b.drop("id0"))["n"] == 7


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_comparison_turned_round_changes_its_sign_alone(pairs):
    analyse = notebook_functions("05_analyse_disconnect")
    a, b = (pd.Series(column, dtype=bool) for column in zip(*pairs, strict=True))
    one, other = analyse.compare(a, b), analyse.compare(b, a)
    assert one["estimate"] == -other["estimate"] and one["p"] == other["p"]
    if one["low"] is None:  # no spread
        assert other["high"] is None and one["reason"]
    else:
        assert one["low"] == pytest.approx(-other["high"])


def test_seeds_carry_a_t_interval(analyse):
    one = analyse.over_seeds(np.array([0.1]))
    assert (one["estimate"], one["low"], one["high"], one["n"]) == (0.1, None, None, 1)
    assert one["reason"]
    three = analyse.over_seeds(np.array([0.1, 0.2, 0.3]))
    half = 4.302653 * 0.1 / math.sqrt(3)  # t quantile for 2 degrees of freedom
    assert three["estimate"] == pytest.approx(0.2) and three["n"] == 3
    assert (three["low"], three["high"]) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_seeds_that_do_not_differ_carry_no_interval(analyse):
    same = analyse.over_seeds(np.array([0.25, 0.25, 0.25]))
    assert (same["estimate"], same["low"], same["high"]) == (0.25, None, None)
    assert same["reason"]


def test_the_claim_over_seeds_stands_in_the_committed_table():
    """bAbI: each mean with its interval, from the three differences over items beside it."""
    table = pd.read_csv(tk.ROOT / "figures/babi/05_differences.csv")
    seeds = table[table["over"] == "seeds"]
    assert set(seeds["first"] + "-" + seeds["second"]) == {
        "vanilla-correct",
        "incorrect-correct",
        "incorrect-vanilla",
    }
    for row in seeds.itertuples():
        pair = (table["first"] == row.first) & (table["second"] == row.second)
        each = table[pair & (table["over"] == "items")]["estimate"].to_numpy()
        half = 4.302653 * each.std(ddof=1) / math.sqrt(3)
        assert (row.n, row.seed) == (3, "mean")
        assert row.estimate == pytest.approx(each.mean(), abs=1e-5)
        assert (row.low, row.high) == pytest.approx(
            (each.mean() - half, each.mean() + half), abs=1e-5
        )


@pytest.mark.parametrize("study", ["babi", "microworld"])
def test_differences_over_items_are_those_of_the_stored_answers(analyse, study, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tk.ROOT / "data/results")
    right = {
        (run.arm, f"{run.seed}"): run.frame.set_index("id")["answer_ok"]
        for run in tk.study_runs(study)
    }
    table = pd.read_csv(tk.ROOT / f"figures/{study}/05_differences.csv", dtype={"seed": str})
    table = table[table["over"] == "items"]
    assert len(table) == {"babi": 25, "microworld": 23}[study]
    for row in table.sample(6, random_state=0).itertuples():
        found = analyse.compare(right[row.first, row.seed], right[row.second, row.seed])
        expected = [found[k] for k in ("estimate", "low", "high", "only_first", "only_second", "p")]
        stored = [row.estimate, row.low, row.high, row.only_first, row.only_second, row.p]
        assert stored == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_difference_is_said_with_its_interval_or_the_reason_for_none(analyse):
    assert analyse.in_points(tk.estimate(-0.074, -0.113, -0.035, 3)) == (
        "-7.4 points (-11.3 to -3.5, n 3)"
    )
    assert analyse.in_points(tk.estimate(0.1, None, None, 1, "one seed")) == (
        "+10.0 points (no interval: one seed)"
    )
    assert "all traces are wrong" in analyse.in_points(
        tk.estimate(None, None, None, 9, "all traces are wrong")
    )


def test_labels_are_counted_by_gold_and_by_what_was_written(analyse):
    frame = pd.DataFrame({"label": list("aabb"), "predicted_label": ["a", "b", None, "z"]})
    found = analyse.confusion(frame, ["a", "b"])
    assert found.to_numpy().tolist() == [[1, 1, 0], [0, 0, 2]]
    assert list(found) == ["a", "b", "none"] and list(found.index) == ["a", "b"]


def test_effects_of_forced_traces_are_paired_by_item(analyse):
    rows = [
        {"id": "x", "arm": "gold", "answer_ok": True, "follows": False},
        {"id": "y", "arm": "gold", "answer_ok": True, "follows": False},
        {"id": "y", "arm": "wrong_facts", "answer_ok": False, "follows": False},
        {"id": "x", "arm": "wrong_facts", "answer_ok": True, "follows": False},
        {"id": "x", "arm": "planted", "answer_ok": False, "follows": True},
    ]
    found = analyse.forced_effects(pd.DataFrame(rows))
    assert (found["effect"]["estimate"], found["effect"]["n"]) == (-0.5, 2)
    assert (found["follow"]["estimate"], found["follow"]["n"]) == (1.0, 1)


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


def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tmp_path)
    parameters = {
        "condition": "correct",
        "dose": 1.0,
        "seed": 0,
        "dataset": "microworld",
        "student": "tiny",
        "protocol": "controlled",
    }
    for name in ("one", "two"):
        tk.write_json(tmp_path / "s" / name / "metrics.json", {"parameters": parameters})
        tk.write_parquet(tmp_path / "s" / name / "predictions.parquet", [{"id": "x"}])
    with pytest.raises(ValueError, match="more than one run of .*correct.*stale"):
        tk.study_runs("s")
    other = {**parameters, "student": "other/student"}
    tk.write_json(tmp_path / "s" / "two" / "metrics.json", {"parameters": other})
    assert [r.arm for r in tk.study_runs("s")] == ["correct, student", "correct, tiny"]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        tk.study_runs("none")
    other = {**parameters, "dataset": "babi", "seed": 1}
    tk.write_json(tmp_path / "s" / "two" / "metrics.json", {"parameters": other})
    with pytest.raises(ValueError, match="holds the dataset"):
        tk.study_runs("s")


def test_the_published_numbers_are_those_that_the_reaudit_reproduces():
    """bAbI: the released scoring in our code gives the same answers to one decimal."""
    table = pd.read_csv(ROOT / "data/results/reaudit/paper.csv")
    assert len(table) == 22 and not table.duplicated(["dataset", "student", "condition"]).any()
    table = table.set_index(["dataset", "student", "condition"])["answer_ok"]
    rows = json.loads((ROOT / "data/results/reaudit/babi.json").read_text())
    found = {
        (r["student"], r["variant"]): r["accuracy_released_scorer"]
        for r in rows
        if r["label_file"] == "all"
    }
    assert len(found) == 6
    for (student, variant), value in found.items():
        assert round(value, 1) == table["babi", student, variant]


def copy_study(folder, study, *conditions):
    """Workspace that holds the runs of some conditions of a study, and nothing else of it."""
    workspace = make_workspace(folder)
    for condition in conditions:
        for run in (ROOT / "data/results" / study).glob(f"*-{condition}-controlled-seed0-*"):
            shutil.copytree(run, workspace / "data/results" / study / run.name)
    return workspace


@pytest.mark.parametrize("conditions", [("direct",), ("vanilla",), ("filler", "shuffled")])
def test_a_study_without_scored_traces_is_analysed_and_says_what_is_missing(conditions, tmp_path):
    """No checks, no decomposition, one seed, no trace to score: a sentence each."""
    workspace = copy_study(tmp_path, "microworld", *conditions)
    done = papermill(workspace, "05_analyse_disconnect", "-r", "study", "microworld")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (workspace / "05_analyse_disconnect-out.ipynb").read_text()
    for said in (
        "No trained student of this study has a trace to score.",
        "there is no interval over seeds",
        "02 left no manipulation checks",
        "has interventions: run 06",
        "story not shown",
        "no dose curve",
    ):
        assert said in text, said
    figures = {p.stem for p in (workspace / "figures/microworld").glob("*.svg")}
    assert "05_accuracy" in figures
    assert not figures & {"05_association", "05_conditional", "05_dose", "05_rule_agreement"}


def test_the_same_results_give_the_same_figures(tmp_path):
    """A study of one seed, in another process and folder, against the committed bytes."""
    workspace = copy_study(tmp_path, "marco", "")
    shutil.copytree(
        ROOT / "data/results/marco", workspace / "data/results/marco", dirs_exist_ok=True
    )
    done = papermill(workspace, "05_analyse_disconnect", "-r", "study", "marco")
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = sorted((workspace / "figures/marco").glob("05_*"))
    assert [p.name for p in drawn] == sorted(p.name for p in (ROOT / "figures/marco").glob("05_*"))
    for path in drawn:
        assert path.read_bytes() == (ROOT / "figures/marco" / path.name).read_bytes(), path.name
