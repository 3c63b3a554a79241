"""The re-audit of the published outputs: published numbers, defects, bad input.

The real outputs are needed: without `TRACEKD_DATA_DIR` these tests fail, not skip.
"""

import csv
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, notebook_functions

import tracekd_utils as tk

NAME = "09_reaudit_published"
LLAMA, QWEN = "Llama-3.2-1B-Instruct", "Qwen3-1.7B"
FACTS = (
    "Ann works for Acme in 1999.",
    "Bob works for Acme from 1999 to 2001.",
    "Ann works for Bolt in 1999.",
)
TRACE = (
    "<think>The temporal relation between the event in question and the event in "
    "context is: {label}.\nI need to use the following facts to answer the question: "
    "{facts}</think> <answer>{answer}</answer>"
)


@pytest.fixture(scope="module")
def nb():
    return notebook_functions(NAME)


@pytest.fixture(scope="module")
def nb_babi():
    return notebook_functions(NAME, dataset="babi")


@pytest.fixture
def item(nb):
    """Maker of one output with its own gold; facts and golds can be read off above."""

    def make(
        text,
        question="While Ann worked for Acme, which employer did Ann work for?",
        answers=("Bolt",),
        gold_facts=FACTS[2:],
        triple="S1_R1_O2",
        facts=FACTS,
    ):
        own = tk.Example(
            id="x",
            dataset="cotempqa",
            split="test",
            question=question,
            facts=facts,
            gold_facts=tuple(gold_facts),
            label="equal",
            answers=tuple(answers),
        )
        names = {"student": "s", "condition": "correct", "label_file": "equal", "line": 1}
        return nb.Output(**names, text=text, example=own, stored=own.answers, triple=triple)

    return make


# ------------------------------------------------------------------ one case per defect


def test_a1_looks_for_the_subject_where_the_object_is_asked_for(nb, item):
    more = (*FACTS, "Ann works for Crux in 1950.")
    rows = [
        item("<answer>['Bolt']</answer>"),
        item("<answer>['Bolt', 'Crux']</answer>", facts=more),
    ]
    on = [nb.answer_ok(r) for r in rows]
    off = [nb.answer_ok(r, frozenset(["A1"])) for r in rows]
    assert (on, off) == ([True, True], [True, False])


def test_a1_is_the_other_way_round_where_the_subject_is_asked_for(nb, item):
    row = item(
        "<answer>['Bob', 'Cid']</answer>",
        "While Ann worked for Acme, who also did?",
        ("Bob",),
        FACTS[1:2],
        "S2_R1_O1",
        (*FACTS, "Cid works for Acme in 1950."),
    )
    assert nb.answer_ok(row)
    assert not nb.answer_ok(row, frozenset(["A1"]))


def test_a2_does_not_see_an_invented_answer(nb, item):
    rows = [item("<answer>['Bolt']</answer>"), item("<answer>['Bolt', 'Invented Ltd']</answer>")]
    for off, expected in ((["A1"], [True, True]), (["A2"], [True, False])):
        assert [nb.answer_ok(r, frozenset(off)) for r in rows] == expected


def test_a3_searches_the_trace_where_there_are_no_tags(nb, item):
    cut = TRACE.split("</think>")[0].format(label="equal", facts=[FACTS[2]])
    rows = [item(cut + "</think>\n['Crux']"), item(cut + "</think>\n['Bolt']")]
    assert [nb.answer_ok(r) for r in rows] == [True, True]
    assert [nb.answer_ok(r, frozenset(["A3"])) for r in rows] == [False, True]


def test_b1_takes_the_first_row_that_holds_the_answer_text(nb, item):
    row = item(TRACE.format(label="equal", facts=[FACTS[2]], answer=["Bolt"]))
    facts = ("Zoe works for Bolt & Co in 1900.",)
    other = replace(row.example, facts=facts, gold_facts=facts, answers=("Bolt & Co",), label="mix")
    first = nb.first_holder("Bolt", [other, row.example])
    assert first is other and nb.first_holder("Crux", [other]) is None
    assert nb.trace_ok(row, first) == (False, False)
    assert nb.trace_ok(row, first, frozenset(["B1"])) == (True, True)


def test_b2_is_content_with_any_one_fact(nb, item):
    rows = [
        item(TRACE.format(label="equal", facts=list(f), answer=["Bolt"]))
        for f in (FACTS[2:], FACTS[1:])
    ]
    for off, expected in ((["B1", "B3"], [True, True]), (["B1", "B3", "B2"], [True, False])):
        assert [nb.trace_ok(r, r.example, frozenset(off))[1] for r in rows] == expected


def test_b3_takes_every_fact_of_the_story_for_gold(nb, item):
    rows = [
        item(TRACE.format(label="equal", facts=[f], answer=["Bolt"])) for f in (FACTS[2], FACTS[0])
    ]
    for off, expected in ((["B1"], [True, True]), (["B1", "B3"], [True, False])):
        assert [nb.trace_ok(r, r.example, frozenset(off))[1] for r in rows] == expected


def test_b4_wants_the_same_case(nb, item):
    rows = [
        item(TRACE.format(label="equal", facts=[f], answer=["Bolt"]))
        for f in (FACTS[2], FACTS[2].lower())
    ]
    off = nb.ALL_OFF
    assert [nb.trace_ok(r, r.example, off - {"B4"})[1] for r in rows] == [True, False]
    assert [nb.trace_ok(r, r.example, off)[1] for r in rows] == [True, True]


def test_an_output_without_a_trace_is_left_out_only_by_the_released_scorer(nb, item):
    row = item("['Bolt']")
    assert nb.trace_ok(row, row.example, nb.ALL_OFF) is None
    assert nb.trace_ok(row, row.example, nb.CORRECTED) == (False, False)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("<answer>['King's College', 'Bolt']</answer>", ("King's College", "Bolt")),
        ("<answer>Bolt</answer>", ("Bolt",)),
        ("assistant\n<think>\n\n</think>\n\n['Bolt']", ("Bolt",)),
        ("assistant\n<think>\n\n['Bolt']", ("Bolt",)),
        ("x</think></answer>['Bolt', 'Crux']</answer>", ("Bolt", "Crux")),
        ("x</think>\nThe answer is: Bolt", ("Bolt",)),
        (
            TRACE.split(" <answer>")[0].format(label="mix", facts=["a"]) + "\nAnswer: Bolt",
            ("Bolt",),
        ),
        ("", None),
    ],
)
def test_answers_are_read_by_the_projects_parser(nb, item, text, answers):
    assert nb.read(item(text)).answers == answers


def test_a_trace_is_read_as_list_and_as_bare_string(nb, item):
    for facts in (list(FACTS[:2]), FACTS[0]):
        o = item(TRACE.format(label="mix", facts=facts, answer="x"))
        expected = set(FACTS[:2] if isinstance(facts, list) else FACTS[:1])
        assert nb.read(o).reading.label == "mix" if nb.read(o).reading else True
        assert nb.cited_facts(o, exact=True) == expected


def test_with_all_put_right_the_scores_are_those_of_every_notebook(nb, item):
    texts = [
        TRACE.format(label=label, facts=list(facts), answer=[answer])
        for label in ("equal", "mix")
        for facts in (FACTS[2:], FACTS[1:])
        for answer in ("Bolt", "Acme")
    ]
    for o in map(item, [*texts, "['Bolt']", ""]):
        found = tk.score(tk.parse_output(o.text, o.example, "published"), o.example, "before")
        assert nb.answer_ok(o, nb.CORRECTED) is found["answer_ok"]
        assert nb.trace_ok(o, None, nb.CORRECTED) == (found["label_ok"], found["facts_ok"])


# -------------------------------------------------------------------- published numbers


def audit(nb, folder, gold=None):
    """Rows of the result, single and cumulated differences, summaries, problems of a folder."""
    problems, students = [], nb.find_students(folder)
    golds = nb.read_golds(gold or folder / "gold", problems)
    outputs = nb.read_everything(folder, students, golds, problems)
    firsts = [nb.first_holder(o.stored[0], golds[o.label_file]) for o in outputs]
    wanted = {nb.RELEASED, nb.SETTINGS["A1"], nb.CORRECTED}
    scores = {off: nb.score_all(outputs, firsts, off) for off in wanted}
    measures = nb.pd.DataFrame(map(nb.read_measures, outputs))
    scores[nb.CORRECTED] = scores[nb.CORRECTED].join(measures)
    table = nb.result_rows(scores, folder)
    return SimpleNamespace(
        outputs=outputs, scores=scores, table=table, problems=problems, nb=nb, folder=folder
    )


@pytest.fixture(scope="module")
def cotempqa(nb, data_dir):
    return audit(nb, data_dir / "published" / "cotempqa")


@pytest.fixture(scope="module")
def babi_audit(nb_babi, data_dir):
    return audit(nb_babi, data_dir / "published" / "babi")


def cells(table, kind="quadrants_released"):
    """{(student, variant): TP, FP, FN, TN} over all files."""
    return {
        (r["student"], r["variant"]): tuple(r[kind][k] for k in ("TP", "FP", "FN", "TN"))
        for r in table
        if r["label_file"] == "all" and r[kind]
    }


def test_all_published_accuracies_are_reproduced(cotempqa, babi_audit):
    for found, files in ((cotempqa, 24), (babi_audit, 6)):
        known = [r for r in found.table if r["accuracy_published"] is not None]
        assert len(known) == files and found.problems == []
        assert [r["accuracy_released_scorer"] for r in known] == [
            r["accuracy_published"] for r in known
        ]


def test_the_quadrants_are_those_of_the_description(cotempqa):
    assert cells(cotempqa.table) == {
        (LLAMA, "correct"): (186, 217, 191, 356),
        (LLAMA, "incorrect"): (42, 329, 69, 510),
        (QWEN, "correct"): (258, 254, 201, 237),
        (QWEN, "incorrect"): (37, 481, 26, 376),
    }


def test_the_babi_quadrants_are_those_released(babi_audit):
    found = babi_audit
    released = {
        (student, variant): found.nb.published_matrix(found.folder, student, variant)
        for student in (LLAMA, QWEN)
        for variant in ("correct", "incorrect")
    }
    assert cells(found.table) == {k: tuple(v.values()) for k, v in released.items()}
    assert found.nb.published_matrix(found.folder, LLAMA, "vanilla") is None
    details = json.loads((ROOT / "data/results/reaudit/babi-details.json").read_text())
    table = json.loads((ROOT / "data/results/reaudit/babi.json").read_text())
    assert found.nb.reproduction(table, details) == [
        "6 of 6 accuracies that stand beside the released outputs, one a label file, are "
        "reproduced to one decimal.",
        "Of the 6 values in the paper's table, 6 are the mean over the label files of these "
        "outputs; the largest gap is 0.00 points. Where they differ, the table was made from "
        "other outputs.",
        "4 of 4 released quadrant matrices follow.",
    ]


INDEPENDENT = {  # mean of the four files, released scorer with A1 put right
    LLAMA: {"vanilla": 39.3, "correct": 36.4, "incorrect": 35.9},
    QWEN: {"vanilla": 52.5, "correct": 50.4, "incorrect": 45.9},
}


def test_a1_alone_gives_the_independent_rescoring(nb, cotempqa):
    frame = cotempqa.scores[nb.SETTINGS["A1"]]
    for (student, variant), part in frame.groupby(["student", "variant"]):
        files = [100 * file["answer_ok"].mean() for _, file in part.groupby("label_file")]
        assert sum(files) / 4 == pytest.approx(INDEPENDENT[student][variant], abs=0.06)


@pytest.mark.parametrize(
    ("student", "variant", "shares"),
    [
        (LLAMA, "correct", (56.1, 37.5, 25.3)),
        (QWEN, "correct", (63.9, 45.7, 33.3)),
        (LLAMA, "incorrect", (15.5, 4.3, 0.6)),
        (QWEN, "incorrect", (10.3, 3.5, 0.4)),
    ],
)
def test_own_gold_traces_are_within_one_point_of_the_description(
    cotempqa, student, variant, shares
):
    row = next(
        r
        for r in cotempqa.table
        if (r["student"], r["variant"], r["label_file"]) == (student, variant, "all")
    )
    found = [100 * row[k] for k in ("label_ok", "facts_ok", "trace_ok")]
    assert found == pytest.approx(shares, abs=1)


def test_own_gold_traces_of_babi(babi_audit):
    found = {
        r["student"]: [round(100 * r[k], 1) for k in ("label_ok", "facts_ok", "trace_ok")]
        for r in babi_audit.table
        if r["variant"] == "correct"
    }
    assert found == {LLAMA: [99.5, 93.9, 93.6], QWEN: [97.3, 95.5, 92.8]}


def test_rows_keep_the_schema_and_nothing_is_dropped(cotempqa):
    table = cotempqa.table
    assert len(table) == 30 and len({tuple(r) for r in table}) == 1
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    for r in table:
        traced = r["variant"] != "vanilla"
        assert all(
            (r[k] is None) != traced
            for k in ("label_ok", "quadrants_released", "quadrants_corrected", "answer_in_trace")
        )
        if traced:
            q = r["quadrants_corrected"]
            assert q["n"] == r["n"] == sum(q[k] for k in ("TP", "FP", "FN", "TN"))
    assert sum(r["n"] for r in table if r["label_file"] == "all") == 6 * 950


@pytest.mark.parametrize("dataset", ["cotempqa", "babi"])
def test_the_steps_start_released_and_end_corrected(nb, dataset):
    folder = ROOT / "data/results/reaudit"
    table = json.loads((folder / f"{dataset}.json").read_text())
    details = json.loads((folder / f"{dataset}-details.json").read_text())
    at = {(r["student"], r["variant"]): r for r in table if r["label_file"] == "all"}
    for step, key in (("released", "accuracy_released_scorer"), ("rest", "accuracy_corrected")):
        ends = [r for r in details["waterfall"] if r["step"] == step]
        assert len(ends) == 6
        for r in ends:
            assert r["accuracy"] == pytest.approx(at[r["student"], r["variant"]][key], abs=0.051)
    assert len(nb.matrices(table, details)) == 12
    points = nb.step_points(details["waterfall"]).dropna(subset="estimate")
    assert ((points["low"] <= points["estimate"]) & (points["estimate"] <= points["high"])).all()


def quadrants(*counts):
    return dict(zip(("TP", "FP", "FN", "TN"), counts, strict=True))


@pytest.mark.parametrize(
    ("counts", "joint", "conditional", "chi_square", "phi"),
    [  # CoTempQA, `correct`: released matrix and own gold as first published here
        ((174, 244, 187, 345), "18.3%", "48.2% (43.1% to 53.3%, n 361)", 4.2, 0.07),
        ((261, 248, 195, 245), "27.5%", "57.2% (52.7% to 61.7%, n 456)", 4.6, 0.07),
        ((237, 140, 2, 571), "24.9%", "99.2% (97.0% to 99.8%, n 239)", 472.0, 0.70),
        ((302, 133, 13, 502), "31.8%", "95.9% (93.1% to 97.6%, n 315)", 476.2, 0.71),
    ],
)
def test_the_claims_of_a_matrix(nb, counts, joint, conditional, chi_square, phi):
    found = nb.claim(quadrants(*counts))
    assert found["n"] == sum(counts) and f"{found['joint']['estimate']:.1%}" == joint
    assert tk.percent(found["conditional"]) == conditional
    assert round(found["chi_square"], 1) == chi_square and round(found["phi"], 2) == phi
    assert found["chi_square"] == pytest.approx(found["n"] * found["phi"] ** 2)


def test_a_matrix_with_an_empty_margin_has_no_chi_square(nb):
    found = nb.claim(quadrants(0, 324, 0, 52))
    assert [found[k] for k in nb.MEASURED] == [None, None, None]
    row = {"student": "s", "variant": "incorrect", "cells": "own gold", **found}
    assert "a margin is empty" in nb.read_claim(row)


def test_the_stated_share_is_a_joint_one(nb):
    row = {"student": "s", "variant": "correct", "cells": "released matrix"}
    text = nb.read_claim(row | nb.claim(quadrants(261, 248, 195, 245)))
    assert "rounds to the stated 28%" in text and "above 3.841" in text
    text = nb.read_claim(row | nb.claim(quadrants(34, 347, 71, 498)))
    assert "stated" not in text and "below 3.841" in text


CHI_SQUARE = {  # of the released matrices
    "cotempqa": {(LLAMA, "correct"): 4.2, (LLAMA, "incorrect"): 2.9}
    | {(QWEN, "correct"): 4.6, (QWEN, "incorrect"): 0.3},
    "babi": {(LLAMA, "correct"): 0.0, (LLAMA, "incorrect"): None}
    | {(QWEN, "correct"): 0.4, (QWEN, "incorrect"): None},
}


@pytest.mark.parametrize("dataset", ["cotempqa", "babi"])
def test_the_committed_claims_follow_from_the_committed_matrices(nb, dataset):
    folder = ROOT / "data/results/reaudit"
    table = json.loads((folder / f"{dataset}.json").read_text())
    details = json.loads((folder / f"{dataset}-details.json").read_text())
    assert details["claims"] == nb.claims(table, details) and len(details["claims"]) == 12
    released = {
        (r["student"], r["variant"]): r["chi_square"] and round(r["chi_square"], 1)
        for r in details["claims"]
        if r["cells"] == "released matrix"
    }
    assert released == CHI_SQUARE[dataset]


def test_the_committed_result_is_what_the_outputs_give(cotempqa, babi_audit):
    for found, name in ((cotempqa, "cotempqa"), (babi_audit, "babi")):
        path = ROOT / "data/results/reaudit" / f"{name}.json"
        assert found.table == json.loads(path.read_text())


def test_what_was_read_is_written_for_others(cotempqa):
    path = cotempqa.nb.save_outputs(cotempqa.outputs)
    rows = tk.read_jsonl(path)
    assert path == tk.INTERIM / "published" / "cotempqa.jsonl" and len(rows) == 6 * 950
    names = ("student", "condition", "label_file", "line")
    assert len({tuple(row[k] for k in names) for row in rows}) == len(rows)
    fields = tk.Example.__dataclass_fields__
    for row, o in zip(rows[::500], cotempqa.outputs[::500], strict=True):
        example = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        assert tk.Example(**{k: example[k] for k in fields}) == o.example
        assert row["text"] == o.text


def test_pairs_are_joined_by_item(nb):
    rows = [
        {"student": "s", "variant": v, "id": k, "answer_ok": ok}
        for v, answers in (("vanilla", {"a": 1, "b": 1, "c": 0}), ("correct", {"b": 0, "a": 1}))
        for k, ok in answers.items()
    ]
    (found,) = nb.comparisons(nb.pd.DataFrame(rows), "released")
    assert (found["b"], found["c"], found["n"], found["difference"]) == (1, 0, 2, 0.5)
    assert found["p"] == found["p_holm"] == pytest.approx(0.5)


# ---------------------------------------------------------------------------- bad input


@pytest.fixture
def small(nb, data_dir, tmp_path):
    """bAbI gold and one `correct` file, of another student, to be spoilt by a test."""
    source = data_dir / "published" / "babi"
    (tmp_path / "evaluation_outputs").mkdir()
    shutil.copytree(source / "gold", tmp_path / "gold")
    path = tmp_path / "evaluation_outputs" / "Other-9B-sft-adapter-reasoning-facts_default.json"
    shutil.copy(
        source / "evaluation_outputs" / f"{LLAMA}-sft-adapter-reasoning-facts_default.json", path
    )
    return path


def test_bad_lines_are_named_and_the_rest_is_scored(nb_babi, small):
    lines = small.read_text().splitlines()
    strange = {**json.loads(lines[3]), "question": "Where is Nobody?"}
    keyless = {k: v for k, v in json.loads(lines[2]).items() if k != "prediction"}
    lines[1:5] = [lines[1][:80], json.dumps(keyless), json.dumps(strange), "[1, 2]"]
    lines.append(lines[0])
    small.write_text("\n".join(lines))
    found = audit(nb_babi, small.parents[1])
    table, problems = found.table, found.problems
    assert [r["n"] for r in table] == [372]
    named = {p["line"]: p["problem"] for p in problems if small.name in p["file"]}
    assert set(named) == {2, 3, 4, 5, 377, None}
    for line, text in (
        (2, "JSON"),
        (3, "'prediction' is missing"),
        (4, "no gold row"),
        (5, "[1, 2]"),
        (377, "taken"),
        (None, "4 gold rows"),
    ):
        assert text in named[line]


def test_missing_files_are_reported_and_make_no_row(nb_babi, small):
    found = audit(nb_babi, small.parents[1])
    table, problems = found.table, found.problems
    assert [(r["student"], r["variant"], r["n"]) for r in table] == [("Other-9B", "correct", 376)]
    missing = [p["file"] for p in problems if p["problem"] == "file is missing"]
    assert missing == ["Other-9B, vanilla, all", "Other-9B, incorrect, all"]
    assert table[0]["accuracy_published"] is None
    assert cells(table) == {("Other-9B", "correct"): (86, 269, 5, 16)}


def test_a_bad_gold_row_is_named_and_its_output_joins_to_nothing(nb_babi, small):
    path = small.parents[1] / "gold" / "test.csv"
    with path.open(newline="") as file:
        gold = list(csv.DictReader(file))
    gold[5]["passages"] = "__import__('os').getcwd()"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, gold[0])
        writer.writeheader()
        writer.writerows(gold)
    found = audit(nb_babi, small.parents[1])
    table, problems = found.table, found.problems
    assert table[0]["n"] == 375
    assert any(p["file"] == "gold/test.csv" and "no Python list" in p["problem"] for p in problems)
    assert any(p["line"] == 6 and "no gold row" in p["problem"] for p in problems)


def test_missing_gold_is_reported(nb_babi, small):
    shutil.rmtree(small.parents[1] / "gold")
    problems = []
    golds = nb_babi.read_golds(small.parents[1] / "gold", problems)
    assert golds == {"all": []} and [p["file"] for p in problems] == ["gold/test.csv"]
    assert nb_babi.read_everything(small.parents[1], ["Other-9B"], golds, problems) == []


def test_folders_without_outputs_are_refused_by_name(tmp_path):
    nb = notebook_functions(NAME, dataset="babi", published_dir=str(tmp_path))
    with pytest.raises(ValueError, match="published_dir"):
        nb.find_published()
    (tmp_path / "evaluation_outputs").mkdir()
    assert nb.find_published() == tmp_path
    with pytest.raises(ValueError, match="sft-adapter"):
        nb.find_students(tmp_path)


def test_no_published_folder_is_no_error(nb, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEKD_DATA_DIR", str(tmp_path))
    assert nb.find_published() is None
    monkeypatch.delenv("TRACEKD_DATA_DIR")
    assert nb.find_published() is None


def test_another_students_files_alone_are_scored(nb, data_dir, tmp_path, cotempqa):
    source = data_dir / "published" / "cotempqa"
    for path in source.glob(f"evaluation_outputs/*/{QWEN}-*"):
        to = tmp_path / "evaluation_outputs" / path.parent.name
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.name.replace(QWEN, "Other-sft_9B"))
    found = audit(nb, tmp_path, source / "gold")
    assert {r["student"] for r in found.table} == {"Other-sft_9B"} and found.problems == []
    expected = [v for k, v in cells(cotempqa.table).items() if k[0] == QWEN]
    assert list(cells(found.table).values()) == expected
    assert nb.reproduction(found.table, {"summaries": []}) == [
        "No accuracy is published beside these outputs."
    ]


def test_the_papers_table_is_another_matter(nb, nb_babi):
    for notebook, name, same in ((nb, "cotempqa", 0), (nb_babi, "babi", 6)):
        path = ROOT / "data" / "results" / "reaudit" / f"{name}-details.json"
        found = notebook.paper_values(json.loads(path.read_text()))
        assert (len(found), found["same"].sum()) == (6, same)
    assert nb.paper_values({"summaries": []}).empty


def test_the_outputs_that_are_read_otherwise_than_before_are_listed(nb, cotempqa):
    differs = json.loads((ROOT / "tests" / "golden.json").read_text())["reaudit_differs"]
    at = {f"{o.student}/{o.condition}/{o.label_file}/{o.line}": o for o in cotempqa.outputs}
    assert [len(differs[k]) for k in ("answers", "traces")] == [9, 1]
    for row in differs["answers"]:
        assert at[row["output"]].example.id == row["id"]
        assert nb.answer_ok(at[row["output"]], nb.CORRECTED) is row["now"] is not row["before"]
    for row in differs["traces"]:
        label_ok, facts_ok = nb.trace_ok(at[row["output"]], None, nb.CORRECTED)
        assert {"label_ok": label_ok, "facts_ok": facts_ok} == row["now"] != row["before"]
