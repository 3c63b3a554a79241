"""05: names of arms, comparisons over items and over seeds, equivalence; by hand."""

import html
import json
import math
import re
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
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


@pytest.fixture(scope="module")
def read():
    """Reading, saying and drawing, which 05 shares with 23."""
    return notebook_functions("34_read_results")


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
    half = {**p, "loss": "balanced"}
    assert analyse.is_matched(half, p) and not analyse.is_matched(p, half)
    assert analyse.is_matched({**half, **wrong}, half)
    assert not analyse.is_matched({**half, **wrong}, p)
    assert analyse.is_matched({**theirs, "temperature": 0.6}, theirs)


def test_answers_are_split_by_what_the_corruption_could_change(read):
    def run(arm, right):
        return SimpleNamespace(
            arm=arm,
            seed=0,
            frame=pd.DataFrame({"id": list("abcd"), "answer_ok": [c == "1" for c in right]}),
        )

    runs = [run("correct", "1101"), run("masked", "0111"), run("vanilla", "1111")]
    found = {
        (r["arm"], r["items"]): (r["estimate"], r["n"]) for r in read.apart(runs, "masked", ["d"])
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
        == {"masked", "near_facts", "wrong_with_answer"}
        == {c for c, v in checks["conditions"].items() if v.get("applies", 1) < 1}
    )
    tested = {
        r["id"] for p in folder.glob("*-correct-*/predictions.parquet") for r in tk.read_parquet(p)
    }
    for ids in listed.values():
        assert 0 < len(ids) == len(set(ids)) < len(tested) and set(ids) < tested


def test_a_comparison_is_paired_by_id_whatever_the_order(read):
    a, b = answers("11110000"), answers("11000100")
    found = read.compare(a, b[::-1])
    assert (found["n"], found["only_first"], found["only_second"]) == (8, 2, 1)
    assert found["estimate"] == pytest.approx(1 / 8)
    assert found["low"] < found["estimate"] < found["high"]
    # mid-p McNemar with 2 against 1: 2 (1/8 + 3/8) - 3/8
    assert found["p"] == pytest.approx(2 * (1 / 8 + 3 / 8) - 3 / 8)
    assert read.compare(a, b.drop("id0"))["n"] == 7


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_comparison_turned_round_changes_its_sign_alone(pairs):
    read = notebook_functions("34_read_results")
    a, b = (pd.Series(column, dtype=bool) for column in zip(*pairs, strict=True))
    one, other = read.compare(a, b), read.compare(b, a)
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
def test_differences_over_items_are_those_of_the_stored_answers(read, study, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tk.ROOT / "data/results")
    right = {
        (run.arm, f"{run.seed}"): run.frame.set_index("id")["answer_ok"]
        for run in tk.study_runs(study)
    }
    table = pd.read_csv(tk.ROOT / f"figures/{study}/05_differences.csv", dtype={"seed": str})
    table = table[table["over"] == "items"]
    assert len(table) >= {"babi": 25, "microworld": 26}[study]
    for row in table.sample(6, random_state=0).itertuples():
        found = read.compare(right[row.first, row.seed], right[row.second, row.seed])
        expected = [found[k] for k in ("estimate", "low", "high", "only_first", "only_second", "p")]
        stored = [row.estimate, row.low, row.high, row.only_first, row.only_second, row.p]
        assert stored == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_difference_is_said_with_its_interval_or_the_reason_for_none(read):
    assert read.in_points(tk.estimate(-0.074, -0.113, -0.035, 3)) == (
        "-7.4 points (-11.3 to -3.5, n 3)"
    )
    assert read.in_points(tk.estimate(0.1, None, None, 1, "one seed")) == (
        "+10.0 points (no interval: one seed)"
    )
    assert "all traces are wrong" in read.in_points(
        tk.estimate(None, None, None, 9, "all traces are wrong")
    )


def test_labels_are_counted_by_gold_and_by_what_was_written(read):
    frame = pd.DataFrame({"label": list("aabb"), "predicted_label": ["a", "b", None, "z"]})
    found = read.confusion(frame, ["a", "b"])
    assert found.to_numpy().tolist() == [[1, 1, 0], [0, 0, 2]]
    assert list(found) == ["a", "b", "none"] and list(found.index) == ["a", "b"]


def test_effects_of_forced_traces_are_paired_by_item(read):
    rows = [
        {"id": "x", "arm": "gold", "answer_ok": True, "follows": False},
        {"id": "y", "arm": "gold", "answer_ok": True, "follows": False},
        {"id": "y", "arm": "wrong_facts", "answer_ok": False, "follows": False},
        {"id": "x", "arm": "wrong_facts", "answer_ok": True, "follows": False},
        {"id": "x", "arm": "planted", "answer_ok": False, "follows": True},
    ]
    found = read.forced_effects(pd.DataFrame(rows))
    assert (found["effect"]["estimate"], found["effect"]["n"]) == (-0.5, 2)
    assert (found["follow"]["estimate"], found["follow"]["n"]) == (1.0, 1)
    assert (found["coincidence"]["estimate"], found["beyond"]["estimate"]) == (0.0, 1.0)
    only = read.forced_effects(pd.DataFrame(rows[-1:]))
    assert only["effect"]["estimate"] is None and "no such trace" in only["beyond"]["reason"]


@pytest.mark.parametrize(
    "arm, follow, coincidence",
    [
        ("correct", 94.6, 0.0),
        ("vanilla", 45.0, 5.4),
        ("incorrect", 3.5, 14.4),
        ("random_facts", 11.9, 12.4),
        ("swapped", 7.4, 10.9),
    ],
)
def test_planted_answers_stand_beside_coincidence(read, arm, follow, coincidence, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tk.ROOT / "data/results")
    run = next(run for run in tk.study_runs("babi") if run.arm == arm)
    found = read.read_forced(run)
    shares = [100 * found[key]["estimate"] for key in ("follow", "coincidence", "beyond")]
    assert shares == pytest.approx([follow, coincidence, follow - coincidence], abs=0.11)
    assert found["beyond"]["n"] == 202


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
    same = analyse.equivalence(a, a, 0.05)  # too few to test
    assert same["p (TOST)"] is None and "fewer than 20" in same["reason"]
    assert analyse.equivalence(a[:0], b[:0], 0.05)["p (TOST)"] is None
    assert analyse.equivalence(a, b, 0.2)["p (TOST)"] < found["p (TOST)"]


def test_a_verdict_needs_both_tests(analyse):
    assert analyse.verdict(0.5, 0.5) == "undecided"
    assert analyse.verdict(0.01, 0.5) == "differ"
    assert analyse.verdict(0.5, 0.01) == "equivalent"
    assert analyse.verdict(0.01, 0.01) == "differ, within the margin"
    assert analyse.verdict(1.0, None) == "undecided" and analyse.verdict(0.01, None) == "differ"


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


# ------------------------------------------------------ association, read apart; clusters
def test_a_run_is_two_tables_where_its_corruption_left_items_alone(read, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tk.ROOT / "data/results")
    runs = tk.study_runs("babi")
    run = next(run for run in runs if run.arm == "masked")
    parts = dict(read.split_items(run, read.read_checks("babi", runs)))
    phis = {name: tk.disconnect_statistics(part)["phi"] for name, part in parts.items()}
    found = {name: (round(phi["estimate"], 2), phi["n"]) for name, phi in phis.items()}
    assert found == {", changed items": (0.07, 407), ", unchanged items": (0.44, 193)}
    assert read.split_items(run, []) == [("", run.frame)]


@pytest.mark.parametrize(
    "study, arm, part, low, high",
    [
        ("microworld", "wrong_label", "label and facts", 0.115, 0.125),
        ("microworld", "wrong_label", "facts", 0.475, 0.485),
        ("babi", "incorrect", "facts", -0.165, -0.055),
        ("microworld", "after_answer", "label and facts", 0.505, 0.515),
    ],
)
def test_label_and_facts_are_read_apart_in_the_committed_table(study, arm, part, low, high):
    table = pd.read_csv(tk.ROOT / f"figures/{study}/05_association.csv").query("measure == 'phi'")
    found = table[(table["arm"] == arm) & (table["of"] == part)]
    assert len(found) and found["estimate"].between(low, high).all()
    assert found["behind"].eq(arm == "after_answer").all()
    if arm == "incorrect":
        whole = table[(table["arm"] == arm) & (table["of"] == "label and facts")]
        assert whole["estimate"].isna().all() and whole["reason"].eq("all traces are wrong").all()


def test_a_cluster_is_drawn_as_a_whole(read):
    values = pd.Series([1, 1, 0, 0, 1, 0], list("abcdef"))
    clusters = pd.Series(list("xxyyzw"), values.index)
    found = read.cluster_mean(values, clusters)
    assert found["estimate"] == 0.5 and found["n"] == 6
    sums, sizes = np.array([1, 2, 0, 0.0]), np.array([1, 2, 2, 1.0])  # of z, x, y, w
    draws = np.random.default_rng(1).integers(0, 4, (20_000, 4))
    shares = sums[draws].sum(1) / sizes[draws].sum(1)
    expected = np.percentile(shares, [2.5, 97.5])
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=0.03)
    wide = read.cluster_mean(values[:4], clusters)
    assert (wide["low"], wide["high"]) == (0, 1)  # two subjects alone
    same = read.cluster_mean(values[:2], clusters)
    assert same["low"] is None and same["reason"] == "all clusters are equal"
    assert read.cluster_mean(values[:0], clusters)["estimate"] is None


def test_the_frequent_answer_is_one_of_several_items_and_of_two_percent(read):
    def groups(text):
        return pd.DataFrame({"gold": list(text)})

    assert read.frequent_answer(groups("aab")) == ("a", 2 / 3)
    assert read.frequent_answer(groups("abc"))[0] is None  # of one item
    assert read.frequent_answer(groups("a" * 2 + "".join(map(chr, range(200, 298)))))[0] is None


@pytest.mark.parametrize(
    "arm, seed, right",
    [("vanilla", 0, 15), ("vanilla", 1, 14), ("correct", 0, 23), ("correct", 1, 19)]
    + [("incorrect", 0, 11), ("incorrect", 1, 17)],
)
def test_rows_of_cotempqa_without_the_answer_that_carries_them(read, arm, seed, right, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", tk.ROOT / "data/results")
    runs = tk.study_runs("cotempqa")
    run = next(run for run in runs if run.arm == arm and run.seed == seed)
    items = read.read_items("cotempqa")
    assert read.frequent_answer(items) == ("titular bishop", 28 / 300)
    assert items["cluster"].nunique() == 261
    found = read.without_frequent(run, items)
    assert (round(found["estimate"] * found["n"]), found["n"]) == (right, 272)


def copy_study(folder, study, *conditions):
    """Workspace that holds the runs of some conditions of a study, and nothing else of it."""
    workspace = make_workspace(folder)
    for condition in conditions:
        for run in (ROOT / "data/results" / study).glob(f"*-{condition}-controlled-seed0-*"):
            shutil.copytree(run, workspace / "data/results" / study / run.name)
    return workspace


def test_a_study_without_scored_traces_is_analysed_and_says_what_is_missing(tmp_path):
    """No checks, no decomposition, one seed, no trace to score: a sentence each."""
    workspace = copy_study(tmp_path, "microworld", "filler", "shuffled")
    done = papermill(workspace, "05_analyse_disconnect", "-r", "study", "microworld")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (workspace / "05_analyse_disconnect-out.ipynb").read_text()
    for said in (
        "no trained student here has a trace to score",
        "there is no interval over seeds",
        "02 left no manipulation checks",
        "no interventions; run 06",
        "story not shown",
        "no dose curve",
    ):
        assert said in text, said
    figures = {p.stem for p in (workspace / "figures/microworld").glob("*.svg")}
    assert "05_accuracy" in figures
    assert not figures & {"05_association", "05_conditional", "05_dose", "05_rule_agreement"}
    assert "05_against_last" not in figures  # no baselines


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


# ------------------------------------------------- 05 on studies that lack something
LABELS = ("person-place", "object-place")


def made_rows(n, condition="correct", right=lambda k: k % 3 > 0, finished=True):
    """Rows of predictions of n made-up items, some right, as 04 writes them."""
    rows = []
    for k in range(n):
        answer, facts, label = bool(right(k)), bool(right(k + 1)), bool(right(k + 2))
        row = {"id": f"microworld/test/{k}", "item": f"{k:012x}", "output": "<answer>x</answer>"}
        row |= {"label": LABELS[k % 2], "predicted_label": LABELS[(k + (not label)) % 2]}
        row |= {"parsed_ok": True, "finished": finished, "problems": [], "trace_tokens": 20 + k % 5}
        row |= {"label_ok": label, "facts_ok": facts, "trace_ok": label and facts}
        row |= dict.fromkeys(("answer_ok", "answer_exact", "answer_ok_strict"), answer)
        row["trace_ok_strict"] = row["trace_ok"]
        row["quadrant"] = tk.quadrant(row["trace_ok"], answer)
        if condition in ("vanilla", "filler"):
            none = ("label_ok", "facts_ok", "trace_ok", "trace_ok_strict", "quadrant")
            row |= dict.fromkeys((*none, "predicted_label", "trace_tokens"))
        rows.append(row)
    return rows


def made_run(condition, rows, *, seed=0, curve=True, **parameters):
    """A scored run of study `made`, in the folder of results."""
    others = "-".join(map(str, parameters.values()))
    folder = tk.RESULTS / "made" / f"made-{condition}-{others}-seed{seed}"
    p = {"dataset": "microworld", "study": "made", "student": "tiny", "condition": condition}
    p |= {"protocol": "controlled", "dose": 1.0, "seed": seed, **parameters}
    found = tk.lesson("00_run_study").count_again(pd.DataFrame(rows))
    found |= {"parameters": p, "run_id": folder.name, "layout": "before", "versions": {}}
    tk.write_json(folder / "metrics.json", found | {"device": "cpu torch.float32"})
    nulls = dict.fromkeys(("label_ok", "facts_ok", "trace_ok", "trace_ok_strict"), "bool")
    types = nulls | {"quadrant": "string", "predicted_label": "string", "trace_tokens": "int64"}
    tk.write_parquet(folder / "predictions.parquet", rows, types | {"finished": "bool"})
    if curve and condition not in tk.UNTRAINED:
        tk.write_atomic(folder / "training_curve.csv", "step,loss,eval_loss\n1,2.0,\n2,,1.5\n")
    return folder


def made_checks(**conditions):
    """Manipulation checks of study `made`, as 02 writes them."""
    found = {"dataset": "microworld", "protocol": "controlled", "dose": 1.0, "seed": 0}
    chance = {"label_truth": 0.5, "facts_truth": 0.1, "trace_truth": None}
    found |= {"student": "tiny", "chance": chance, "conditions": conditions}
    tk.write_json(tk.RESULTS / "made/manipulation_checks.json", found)


def made_baselines(n):
    """Baselines of study `made`; one item has one candidate, hence no chance."""
    rows = []
    for k in range(n):
        row = {"id": f"microworld/test/{k}", "item": f"{k:012x}", "label": LABELS[k % 2]}
        row |= {"n_candidates": 4, "chance": 0.25, "majority": "x", "majority_ok": k % 4 == 0}
        row |= {"last": "y", "last_ok": k % 2 == 0, "label_majority_ok": k % 2 == 0}
        rows.append(row | {"facts_chance": 0.1})
    rows[0] |= {"n_candidates": 1, "chance": None, "last_ok": None}
    tk.write_parquet(tk.RESULTS / "made/baselines.parquet", rows)


def forced_rows(n, right=lambda arm, k: arm == "gold" and k % 2 == 0):
    """Rows of interventions of n items under three forced traces."""
    rows = []
    for arm in ("gold", "wrong_facts", "planted"):
        for k in range(n):
            row = {"id": f"microworld/test/{k}", "item": f"{k:012x}", "arm": arm}
            rows.append(row | {"answer_ok": bool(right(arm, k)), "follows": arm == "planted"})
    return rows


def analyse_made():
    """What the cells of 05 print and show for study `made`, run in this process."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell, text = InteractiveShell.instance(), []
    for cell in json.loads((ROOT / "notebooks/05_analyse_disconnect.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "sys.path" in source:
            continue
        if "parameters" in cell["metadata"].get("tags", ()):
            source = source.replace('study = "babi"', 'study = "made"')
        with capture_output() as caught:
            done = shell.run_cell(source)
        done.raise_error()
        shown = [str(data) for output in caught.outputs for data in output.data.values()]
        result = getattr(done.result, "to_html", lambda d=done: repr(d.result))
        text += [caught.stdout, result(), *shown]
    InteractiveShell.clear_instance()
    return "\n".join(text)


def only_vanilla():
    made_run("vanilla", made_rows(24, "vanilla"))
    return "no trained student here has a trace to score", "no run of this study has a trace"


def one_run():
    made_run("correct", made_rows(24))
    return "no interventions; run 06", "no comparison, hence there is no interval over seeds"


def only_untrained():
    made_run("direct", made_rows(24, right=lambda k: False, finished=False))
    return "no trained student here has a trace", "finished: not defined (no item to count)"


def nulls_in_interventions():
    folder = made_run("correct", made_rows(24))
    rows = forced_rows(12, right=lambda arm, k: True)  # no difference has a spread
    tk.write_parquet(folder / "interventions.parquet", rows)
    made_run("incorrect", made_rows(24))
    return "correct, seed 0, effect: +0.0 points (no interval: all 12 values are equal)"


def other_arms_of_interventions():
    folder = made_run("correct", made_rows(24))
    rows = [row for row in forced_rows(12) if row["arm"] == "planted"]
    tk.write_parquet(folder / "interventions.parquet", rows)
    return "effect: not defined, 06 forced no such trace"


def no_checks_no_decomposition():
    for condition in ("vanilla", "correct", "incorrect"):
        for seed in (0, 1):
            made_run(condition, made_rows(24, condition, lambda k, s=seed: k % (3 + s)), seed=seed)
    return "02 left no manipulation checks", "this study has no decomposition.json"


def checks_with_nothing_measured():
    made_run("vanilla", made_rows(24, "vanilla"))
    made_run("masked", made_rows(24))
    ids = [f"microworld/test/{k}" for k in range(9)]
    masked = {"n": 9, "reason": None, "answer_information": None, "unchanged_test_ids": ids}
    made_checks(masked=masked, vanilla={"reason": "no trace"})
    tk.write_json(tk.RESULTS / "made/decomposition.json", {"dataset": "microworld"})
    return "masked, seed 0, changed items", "masked, seed 0, unchanged items", "n 9"


def one_item():
    for condition in ("direct", "vanilla", "correct", "incorrect"):
        made_run(condition, made_rows(1, condition))
    made_baselines(1)
    return "fewer than 20 items are answered differently"


def all_right():
    for condition in ("vanilla", "correct"):
        made_run(condition, made_rows(12, condition, lambda k: True))
    made_baselines(12)
    return "all traces are right"


def all_wrong():
    for condition in ("vanilla", "correct"):
        made_run(condition, made_rows(12, condition, lambda k: False))
    return "all traces are wrong"


def only_cut_outputs():
    made_run("direct", made_rows(12, finished=False))
    made_run("correct", made_rows(12, finished=False), curve=False)
    return "finished: not defined (no item to count)", "no training curve"


def finish_unknown():
    made_run("correct", made_rows(12, finished=None))
    return "correct, seed 0"


def other_items():
    made_run("correct", made_rows(24)[:12])
    made_run("vanilla", made_rows(24, "vanilla")[12:])
    return "no two arms share a seed and items"


def a_dose_of_which_the_share_is_known():
    made_run("correct", made_rows(12))
    made_run("incorrect", made_rows(12), dose=0.5)
    made_checks(incorrect={"reason": None, "dose_realised": 0.523})
    path = tk.RESULTS / "made/manipulation_checks.json"
    tk.write_json(path, tk.read_json(path) | {"dose": 0.5})
    return "incorrect on 50% of rows (52.3% drawn)"


def many_arms_of_one_condition():
    for k, loss in enumerate(("completion", "balanced", "answer", "trace")):
        made_run("correct", made_rows(12, right=lambda i, k=k: i % (k + 2)), loss=loss)
    made_run("correct", made_rows(12), loss="completion", temperature=0.6)
    return "correct, loss trace − correct", "correct, temperature 0.6 − correct"


def ranked_answers():
    folder = made_run("direct", made_rows(12, finished=False))
    none = tk.estimate(None, None, None, 0, "fewer than two candidates")
    found = {"ranked": tk.proportion(5, 12), "forced": None, "equals_greedy": none}
    tk.write_json(folder / "ranked.json", found | {"reason": "forced was left out"})
    return "ranked: 41.7%", "forced: not defined (forced was left out)", "fewer than two candidates"


@pytest.mark.parametrize(
    "study",
    [
        only_vanilla,
        one_run,
        only_untrained,
        nulls_in_interventions,
        other_arms_of_interventions,
        no_checks_no_decomposition,
        checks_with_nothing_measured,
        one_item,
        all_right,
        all_wrong,
        only_cut_outputs,
        finish_unknown,
        other_items,
        a_dose_of_which_the_share_is_known,
        many_arms_of_one_condition,
        ranked_answers,
    ],
)
def test_every_section_works_or_says_that_there_is_nothing_to_show(study, tmp_path, monkeypatch):
    for name in ("RESULTS", "FIGURES", "INTERIM"):
        monkeypatch.setattr(tk, name, tmp_path / name.lower())
    if study is not many_arms_of_one_condition:  # seconds each, and the same code
        monkeypatch.setattr(tk, "save_figure", lambda fig, name, data: len(data.to_csv()))
    wanted = study()
    text = analyse_made()
    plt.close("all")
    for words in (wanted,) if isinstance(wanted, str) else wanted:
        assert words.lower() in html.unescape(text).lower(), (words, text[-4000:])
    assert "nan" not in re.findall(r"\w+", text.lower())


def test_a_p_value_below_four_digits_is_not_zero(analyse):
    assert [analyse.p_text(p) for p in (0.04321, 0.0001, 3e-9)] == ["0.0432", "0.0001", "< 0.0001"]
