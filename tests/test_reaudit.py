"""The re-audit of the published outputs: published numbers, defects, bad input.

The real outputs are needed: without `TRACEKD_DATA_DIR` these tests fail, not skip.
"""

import csv
import json
import shutil

import pytest
from conftest import notebook_functions

NAME = "05_reaudit_published"
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


def item(
    text,
    question="While Ann worked for Acme, which employer did Ann work for?",
    answers=("Bolt",),
    gold_facts=FACTS[2:],
    triple="S1_R1_O2",
    label="equal",
):
    """One output with its own gold; facts and golds can be read off above."""
    own = {
        "question": question,
        "facts": FACTS,
        "gold_facts": tuple(gold_facts),
        "label": label,
        "answers": tuple(answers),
        "answer_text": str(list(answers)),
    }
    return {
        "text": text,
        "question": question,
        "facts": FACTS,
        "gold": tuple(answers),
        "triple": triple,
        "own": own,
        "item": 0,
        "line": 1,
    }


# ------------------------------------------------------------------ one case per defect


def test_a1_looks_for_the_subject_where_the_object_is_asked_for(nb):
    rows = [item("<answer>['Bolt']</answer>"), item("<answer>['Bolt', 'Crux']</answer>")]
    rows[1]["facts"] = (*FACTS, "Ann works for Crux in 1950.")
    on = [nb.answer_ok(r, "cotempqa") for r in rows]
    off = [nb.answer_ok(r, "cotempqa", frozenset(["A1"])) for r in rows]
    assert (on, off) == ([True, True], [True, False])


def test_a1_is_the_other_way_round_where_the_subject_is_asked_for(nb):
    row = item(
        "<answer>['Bob', 'Cid']</answer>",
        "While Ann worked for Acme, who also did?",
        ("Bob",),
        FACTS[1:2],
        "S2_R1_O1",
    )
    row["facts"] = (*FACTS, "Cid works for Acme in 1950.")
    assert nb.answer_ok(row, "cotempqa")
    assert not nb.answer_ok(row, "cotempqa", frozenset(["A1"]))


def test_a2_does_not_see_an_invented_answer(nb):
    rows = [item("<answer>['Bolt']</answer>"), item("<answer>['Bolt', 'Invented Ltd']</answer>")]
    for off, expected in ((["A1"], [True, True]), (["A2"], [True, False])):
        assert [nb.answer_ok(r, "cotempqa", frozenset(off)) for r in rows] == expected


def test_a3_searches_the_trace_where_there_are_no_tags(nb):
    cut = TRACE.split("</think>")[0].format(label="equal", facts=[FACTS[2]])
    rows = [item(cut + "</think>\n['Crux']"), item(cut + "</think>\n['Bolt']")]
    assert [nb.answer_ok(r, "cotempqa") for r in rows] == [True, True]
    assert [nb.answer_ok(r, "cotempqa", frozenset(["A3"])) for r in rows] == [False, True]


def test_b1_takes_the_first_row_that_holds_the_answer_text(nb):
    row = item(TRACE.format(label="equal", facts=[FACTS[2]], answer=["Bolt"]))
    other = {
        **row["own"],
        "facts": ("Zoe works for Bolt & Co in 1900.",),
        "gold_facts": ("Zoe works for Bolt & Co in 1900.",),
        "answer_text": "['Bolt & Co']",
        "label": "mix",
    }
    items = [other, row["own"]]
    assert nb.trace_ok(row, items, "cotempqa") == (False, False)
    assert nb.trace_ok(row, items, "cotempqa", frozenset(["B1"])) == (True, True)


def test_b2_is_content_with_any_one_fact(nb):
    rows = [
        item(TRACE.format(label="equal", facts=list(f), answer=["Bolt"]))
        for f in (FACTS[2:], FACTS[1:])
    ]
    for off, expected in ((["B1", "B3"], [True, True]), (["B1", "B3", "B2"], [True, False])):
        assert [nb.trace_ok(r, [r["own"]], "cotempqa", frozenset(off))[1] for r in rows] == expected


def test_b3_takes_every_fact_of_the_story_for_gold(nb):
    rows = [
        item(TRACE.format(label="equal", facts=[f], answer=["Bolt"])) for f in (FACTS[2], FACTS[0])
    ]
    for off, expected in ((["B1"], [True, True]), (["B1", "B3"], [True, False])):
        assert [nb.trace_ok(r, [r["own"]], "cotempqa", frozenset(off))[1] for r in rows] == expected


def test_b4_wants_the_same_case(nb):
    rows = [
        item(TRACE.format(label="equal", facts=[f], answer=["Bolt"]))
        for f in (FACTS[2], FACTS[2].lower())
    ]
    off = nb.ALL_OFF
    assert [nb.trace_ok(r, [r["own"]], "cotempqa", off - {"B4"})[1] for r in rows] == [True, False]
    assert [nb.trace_ok(r, [r["own"]], "cotempqa", off)[1] for r in rows] == [True, True]


def test_an_output_without_a_trace_is_left_out_only_by_the_released_scorer(nb):
    row = item("['Bolt']")
    assert nb.trace_ok(row, [row["own"]], "cotempqa", nb.ALL_OFF) is None
    assert nb.trace_ok(row, [row["own"]], "cotempqa", nb.CORRECTED) == (False, False)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("<answer>['King's College', 'Bolt']</answer>", ("King's College", "Bolt")),
        ("<answer>Bolt</answer>", ("Bolt",)),
        ("assistant\n<think>\n\n</think>\n\n['Bolt']", ("Bolt",)),
        ("assistant\n<think>\n\n['Bolt']", ("Bolt",)),
        ("x</think></answer>['Bolt', 'Crux']</answer>", ("Bolt", "Crux")),
        ("x</think>\nThe answer is: Bolt.", ("Bolt",)),
        ("x</think>\nThe employer at the time is Bolt, Inc.", ("Bolt, Inc",)),
        (
            TRACE.split(" <answer>")[0].format(label="mix", facts=["a"]) + "\nAnswer: Bolt",
            ("Bolt",),
        ),
        ("x</think>\nThe relation between the events in context is: during.", ()),
        ("", ()),
    ],
)
def test_answers_are_read_from_every_form_that_occurs(nb, text, answers):
    assert nb.read_answers(nb.locate_answer(text), "cotempqa") == answers


def test_a_trace_is_read_as_list_and_as_bare_string(nb):
    for facts in (list(FACTS[:2]), FACTS[0]):
        read = nb.read_trace(TRACE.format(label="mix", facts=facts, answer="x"))
        assert read == ("mix", FACTS[:2] if isinstance(facts, list) else FACTS[:1])


# -------------------------------------------------------------------- published numbers


def audit(nb, folder, dataset, gold=None):
    """(rows of the result, details, problems) of a folder in the published layout."""
    problems, outputs = [], nb.find_outputs(folder, dataset)
    golds, rows = nb.read_everything(outputs, gold or folder / "gold", dataset, problems)
    scores = nb.score_all(rows, golds, dataset)
    return (
        nb.result_rows(rows, scores, folder, dataset),
        nb.details_of(rows, scores, golds, folder, dataset),
        problems,
    )


@pytest.fixture(scope="module")
def cotempqa(nb, data_dir):
    return audit(nb, data_dir / "published" / "cotempqa", "cotempqa")


@pytest.fixture(scope="module")
def babi_audit(nb, data_dir):
    return audit(nb, data_dir / "published" / "babi", "babi")


def cells(table, kind="quadrants_released"):
    """{(student, variant): TP, FP, FN, TN} over all files."""
    return {
        (r["student"], r["variant"]): tuple(r[kind][k] for k in ("TP", "FP", "FN", "TN"))
        for r in table
        if r["label_file"] == "all" and r[kind]
    }


def test_all_published_accuracies_are_reproduced(cotempqa, babi_audit):
    for (table, _, problems), files in ((cotempqa, 24), (babi_audit, 6)):
        known = [r for r in table if r["accuracy_published"] is not None]
        assert len(known) == files and problems == []
        assert [r["accuracy_released_scorer"] for r in known] == [
            r["accuracy_published"] for r in known
        ]


def test_the_quadrants_are_those_of_the_description(cotempqa):
    assert cells(cotempqa[0]) == {
        (LLAMA, "correct"): (186, 217, 191, 356),
        (LLAMA, "incorrect"): (42, 329, 69, 510),
        (QWEN, "correct"): (258, 254, 201, 237),
        (QWEN, "incorrect"): (37, 481, 26, 376),
    }


def test_the_babi_quadrants_are_those_released(nb, babi_audit):
    table, details, _ = babi_audit
    released = {
        (s["student"], s["variant"]): tuple(s["released_matrix"].values())
        for s in details["summaries"]
        if s["released_matrix"]
    }
    assert len(released) == 4 and cells(table) == released
    assert "4 of 4 released quadrant matrices" in " ".join(nb.claims_reproduced(table, details))


def test_a1_alone_gives_the_independent_rescoring(nb, cotempqa):
    for s in cotempqa[1]["summaries"]:
        expected = nb.INDEPENDENT["cotempqa"][s["student"]][s["variant"]]
        assert s["macro"]["A1"] == pytest.approx(expected, abs=0.06)


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
        for r in cotempqa[0]
        if (r["student"], r["variant"], r["label_file"]) == (student, variant, "all")
    )
    found = [100 * row[k] for k in ("label_ok", "facts_ok", "trace_ok")]
    assert found == pytest.approx(shares, abs=1)


def test_own_gold_traces_of_babi(babi_audit):
    found = {
        r["student"]: [round(100 * r[k], 1) for k in ("label_ok", "facts_ok", "trace_ok")]
        for r in babi_audit[0]
        if r["variant"] == "correct"
    }
    assert found == {LLAMA: [99.5, 93.9, 93.6], QWEN: [97.3, 95.5, 92.8]}


def test_rows_keep_the_schema_and_nothing_is_dropped(cotempqa):
    table = cotempqa[0]
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


def test_the_waterfall_starts_released_and_ends_corrected(cotempqa):
    table, details, _ = cotempqa
    at = {(r["student"], r["variant"]): r for r in table if r["label_file"] == "all"}
    for step, key in (("released", "accuracy_released_scorer"), ("rest", "accuracy_corrected")):
        ends = [r for r in details["waterfall"] if r["step"] == step]
        assert len(ends) == 6
        for r in ends:
            assert r["accuracy"] == pytest.approx(at[r["student"], r["variant"]][key], abs=0.051)


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


def test_bad_lines_are_named_and_the_rest_is_scored(nb, small):
    lines = small.read_text().splitlines()
    strange = {**json.loads(lines[3]), "question": "Where is Nobody?"}
    keyless = {k: v for k, v in json.loads(lines[2]).items() if k != "prediction"}
    lines[1:5] = [lines[1][:80], json.dumps(keyless), json.dumps(strange), "[1, 2]"]
    lines.append(lines[0])
    small.write_text("\n".join(lines))
    table, _, problems = audit(nb, small.parents[1], "babi")
    assert [r["n"] for r in table] == [372]
    named = {p["line"]: p["problem"] for p in problems if small.name in p["file"]}
    assert set(named) == {2, 3, 4, 5, 377, None}
    for line, text in (
        (2, "JSON"),
        (3, "'prediction' is missing"),
        (4, "no gold row"),
        (5, "found list"),
        (377, "taken"),
        (None, "4 gold rows"),
    ):
        assert text in named[line]


def test_missing_files_are_reported_and_make_no_row(nb, small):
    table, _, problems = audit(nb, small.parents[1], "babi")
    assert [(r["student"], r["variant"], r["n"]) for r in table] == [("Other-9B", "correct", 376)]
    missing = [p["file"] for p in problems if p["problem"] == "file is missing"]
    assert missing == ["all: Other-9B, vanilla", "all: Other-9B, incorrect"]
    assert table[0]["accuracy_published"] is None
    assert cells(table) == {("Other-9B", "correct"): (86, 269, 5, 16)}


def test_a_bad_gold_row_is_named_and_its_output_joins_to_nothing(nb, small):
    path = small.parents[1] / "gold" / "test.csv"
    with path.open(newline="") as file:
        gold = list(csv.DictReader(file))
    gold[5]["passages"] = "__import__('os').getcwd()"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, gold[0])
        writer.writeheader()
        writer.writerows(gold)
    table, _, problems = audit(nb, small.parents[1], "babi")
    assert table[0]["n"] == 375
    assert any(p["file"] == "gold/test.csv" and "no Python list" in p["problem"] for p in problems)
    assert any(p["line"] == 6 and "no gold row" in p["problem"] for p in problems)


def test_missing_gold_is_reported(nb, small):
    shutil.rmtree(small.parents[1] / "gold")
    problems = []
    _, rows = nb.read_everything(
        nb.find_outputs(small.parents[1], "babi"), small.parents[1] / "gold", "babi", problems
    )
    assert rows == {} and any(p["file"] == "gold/test.csv" for p in problems)


def test_folders_without_outputs_are_refused_by_name(nb, tmp_path):
    with pytest.raises(ValueError, match="published_dir"):
        nb.find_published("babi", str(tmp_path))
    (tmp_path / "evaluation_outputs").mkdir()
    with pytest.raises(ValueError, match="sft-adapter"):
        nb.find_outputs(tmp_path, "babi")


def test_no_published_folder_is_no_error(nb, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEKD_DATA_DIR", str(tmp_path))
    assert nb.find_published("babi", "") is None
    monkeypatch.delenv("TRACEKD_DATA_DIR")
    assert nb.find_published("babi", "") is None


def test_another_students_files_alone_are_scored(nb, data_dir, tmp_path, cotempqa):
    source = data_dir / "published" / "cotempqa"
    for path in source.glob(f"evaluation_outputs/*/{QWEN}-*"):
        to = tmp_path / "evaluation_outputs" / path.parent.name
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.name.replace(QWEN, "Other-sft_9B"))
    table, details, problems = audit(nb, tmp_path, "cotempqa", source / "gold")
    assert {r["student"] for r in table} == {"Other-sft_9B"} and problems == []
    assert list(cells(table).values()) == [v for k, v in cells(cotempqa[0]).items() if k[0] == QWEN]
    assert nb.all_claims(table, details)["reproduction"] == [
        "No accuracy is published beside these outputs."
    ]
