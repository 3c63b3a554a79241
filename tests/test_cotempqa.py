"""CoTempQA: dates, intervals, anchors, leaks and bad rows, by hand and on the real files."""

import datetime
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT, notebook_functions, papermill
from hypothesis import given
from hypothesis import strategies as st

import tracekd_utils as tk

ROWS = {"equal": 436, "overlap": 653, "during": 1697, "mix": 563}
SHARED = "subject or gold fact also in test"
# measured on the 3,349 rows: 0.9954, 0.9862, 0.9140, 0.9378
FLOORS = {"equal": 0.995, "overlap": 0.986, "during": 0.913, "mix": 0.937}
NB = notebook_functions("11_decompose_cotempqa")
CARD = tk.dataset("cotempqa")


@pytest.fixture(scope="module")
def rows(data_dir):
    """(example, answers as annotated, triple_element) of all rows of the real files."""
    return list(NB.cotempqa_rows(data_dir / "cotempqa"))


@pytest.fixture(scope="module")
def real(data_dir):
    return NB.read_cotempqa(data_dir / "cotempqa", 0)


# ------------------------------------------------------------------------------- dates
@pytest.mark.parametrize(
    "text, date, first, last",
    [
        ("1999", (1999,), (1999, 1, 1), (1999, 12, 31)),
        ("May, 1999", (1999, 5), (1999, 5, 1), (1999, 5, 31)),
        ("February, 2000", (2000, 2), (2000, 2, 1), (2000, 2, 29)),
        ("May 3, 1999", (1999, 5, 3), (1999, 5, 3), (1999, 5, 3)),
        ("February 29, 2000", (2000, 2, 29), (2000, 2, 29), (2000, 2, 29)),
        ("0999", (999,), (999, 1, 1), (999, 12, 31)),
    ],
)
def test_dates_by_hand(text, date, first, last):
    assert NB.parse_date(text) == date
    assert NB.first_day(date) == datetime.date(*first)
    assert NB.last_day(date) == datetime.date(*last)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "99",
        "19999",
        "0000",
        "Mai, 1999",
        "may, 1999",
        "May 1999",
        "May 3 1999",
        "May 32, 1999",
        "May 0, 1999",
        "February 29, 1999",
        "3 May, 1999",
        "May, 1999 ",
        "from 1999",
        "May 3, 1999 to May 4, 1999",
        "1999-05-03",
        "١٩٩٩",
    ],
)
def test_what_is_no_date_is_refused(text):
    with pytest.raises(ValueError):
        NB.parse_date(text)


@given(st.dates())
def test_dates_come_back_as_written_at_each_granularity(day):
    month, year = NB.MONTHS[day.month - 1], f"{day.year:04d}"
    for text, parts in ((year, 1), (f"{month}, {year}", 2), (f"{month} {day.day}, {year}", 3)):
        date = NB.parse_date(text)
        assert date == (day.year, day.month, day.day)[:parts]
        assert NB.first_day(date) <= day <= NB.last_day(date)


# ------------------------------------------------------------------- facts and questions
@pytest.mark.parametrize(
    "text, fact",
    [
        ("Ann works for Bank in 1999.", ("Ann", "employer", "Bank", (1999,), (1999,), "")),
        (
            "Ann worked for Bank in May, 1999.",
            ("Ann", "employer", "Bank", (1999, 5), (1999, 5), ""),
        ),
        (
            "Ann attended School of Art in Rome in May 3, 1999.",
            ("Ann", "school", "School of Art in Rome", (1999, 5, 3), (1999, 5, 3), ""),
        ),
        (
            "Ann holds the position of mayor from 1999 to May 3, 2001.",
            ("Ann", "position", "mayor", (1999,), (2001, 5, 3), ""),
        ),
        (
            "Ann is a member of the Back to 1999 Party from May, 1999 to 2001.",
            ("Ann", "political party", "Back to 1999 Party", (1999, 5), (2001,), ""),
        ),
        (
            "Works, Inc. is owned by Bank from Rome from 1999 to 1999.",
            ("Works, Inc.", "owner", "Bank from Rome", (1999,), (1999,), ""),
        ),
        ("Ann plays for Team in 19x9.", ("Ann", "team", "Team", (), (), "parse")),
        ("Ann plays for Team from 1999 to May 32, 2001.", ("Ann", "team", "Team", (), (), "parse")),
        (
            "Ann plays for Team from May 4, 1999 to May 3, 1999.",
            ("Ann", "team", "Team", (1999, 5, 4), (1999, 5, 3), "ends before"),
        ),
        (
            "Ann plays for Team from May 4, 1999 to 1999.",
            ("Ann", "team", "Team", (1999, 5, 4), (1999,), ""),
        ),
        ("Ann plays for Team.", ("", "", "", (), (), "form")),
        ("Ann likes Team in 1999.", ("", "", "", (), (), "form")),
    ],
)
def test_facts_by_hand(text, fact):
    found = NB.read_fact(text)
    assert found[:5] == fact[:5]
    assert fact[5] in found.problem and bool(fact[5]) is bool(found.problem)


@pytest.mark.parametrize(
    "text, question, pattern",
    [
        (
            "While Ann was holding the position of mayor, which position did Ann at the same time?",
            ("Ann", "position", "mayor", "Ann", "position"),
            "S1_R1_O2",
        ),
        (
            "While Ann was playing for Team, which school did Ann attend concurrently?",
            ("Ann", "team", "Team", "Ann", "school"),
            "S1_R2_O2",
        ),
        (
            "While Ann attended A, B, which school was Bob attending during the same time span?",
            ("Ann", "school", "A, B", "Bob", "school"),
            "S2_R1_O2",
        ),
        (
            "While Ann was a member of X, which employer did Bob work for simultaneously?",
            ("Ann", "political party", "X", "Bob", "employer"),
            "S2_R2_O2",
        ),
        (
            "While X was owned by Y, who was also owned by Y within the same time interval?",
            ("X", "owner", "Y", None, "owner"),
            "S2_R1_O1",
        ),
    ],
)
def test_questions_by_hand(text, question, pattern):
    assert NB.read_question(text) == question and NB.pattern_of(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Where is Ann?",
        "While Ann slept, which school did Ann attend concurrently?",
        "While Ann attended A, which school did Bob attend?",
        "While Ann attended A, which colour did Bob like at the same time?",
    ],
)
def test_a_question_of_another_form_is_not_read(text):
    assert NB.read_question(text) is None and NB.pattern_of(text) is None
    assert NB.rule_cotempqa(("Ann attended A in 1999.",), text) is None


# --------------------------------------------------------------------------- intervals
@pytest.mark.parametrize(
    "a, c, kind",
    [
        ((3, 5), (3, 5), "equal"),
        ((4, 4), (4, 4), "equal"),
        ((1, 9), (3, 5), "during"),
        ((3, 9), (3, 5), "during"),
        ((1, 5), (3, 5), "during"),
        ((1, 9), (4, 4), "during"),
        ((4, 4), (4, 9), "during"),
        ((1, 5), (3, 9), "overlap"),
        ((1, 5), (5, 9), "overlap"),
        ((1, 4), (5, 9), None),
        ((1, 1), (2, 2), None),
    ],
)
def test_kinds_of_time_by_hand(a, c, kind):
    assert NB.kind_of_time(a, c) == NB.kind_of_time(c, a) == kind


intervals = st.tuples(st.integers(0, 7), st.integers(0, 7)).map(lambda p: (min(p), max(p)))


@given(intervals, intervals)
def test_kinds_of_time_are_those_of_sets_of_days(a, c):
    one, other = (set(range(i[0], i[1] + 1)) for i in (a, c))
    expected = (
        "equal"
        if one == other
        else "during"
        if one <= other or other <= one
        else "overlap"
        if one & other
        else None
    )
    assert NB.kind_of_time(a, c) == NB.kind_of_time(c, a) == expected


YEARS, MONTHS = "from 2003 to 2005", "from January, 2003 to June, 2003"


@pytest.mark.parametrize(
    "anchor, other, first, whole, coarse",
    [
        (MONTHS, "in 2003", "during", "during", "equal"),
        (YEARS, "from January, 2003 to 2005", "equal", "equal", "equal"),
        (YEARS, "from May, 2003 to 2005", "during", "during", "equal"),
        (YEARS, "in December, 2005", None, "during", "during"),
        (YEARS, "in 2006", None, None, None),
        (YEARS, "from 2005 to 2007", "overlap", "overlap", "overlap"),
        (YEARS, "from May 3, 2003 to 2003", "during", "during", "during"),
    ],
)
def test_readings_of_coarse_dates_by_hand(anchor, other, first, whole, coarse):
    one, two = (NB.read_fact(f"Ann attended A {when}.") for when in (anchor, other))
    for name, kind in zip(NB.READINGS, (first, whole, coarse), strict=True):
        assert NB.kind_of_time(*NB.READINGS[name](one, two)) == kind, name


# ------------------------------------------------------------------------------ the rule
FACTS = (
    "Ann attended A from 2000 to 2004.",
    "Ann attended E from 2000 to 2004.",
    "Ann attended D in 2002.",
    "Ann attended O from 2003 to 2008.",
    "Ann attended N in 1990.",
    "Ann works for W in 2001.",
    "Bob attended A from 2001 to 2002.",
    "Bob attended B from 2003 to 2006.",
)
WHILE_A = "While Ann attended A, "
DID_ANN = WHILE_A + "which school did Ann attend concurrently?"


@pytest.mark.parametrize(
    "facts, question, expected",
    [
        (FACTS[:2] + FACTS[4:], DID_ANN, ("equal", {FACTS[1]}, {"E"})),
        (FACTS[:1] + FACTS[2:3] + FACTS[4:], DID_ANN, ("during", {FACTS[2]}, {"D"})),
        (FACTS[:1] + FACTS[3:], DID_ANN, ("overlap", {FACTS[3]}, {"O"})),
        (FACTS, DID_ANN, ("mix", set(FACTS[1:4]), {"E", "D", "O"})),
        (
            FACTS,
            WHILE_A + "which employer did Ann work for concurrently?",
            ("during", {FACTS[5]}, {"W"}),
        ),
        (
            FACTS,
            WHILE_A + "which school was Bob attending concurrently?",
            ("mix", set(FACTS[6:]), {"A", "B"}),
        ),
        (FACTS, WHILE_A + "who also attended A concurrently?", ("during", {FACTS[6]}, {"Bob"})),
        (FACTS[:1] + FACTS[4:], DID_ANN, None),
        (FACTS[1:], DID_ANN, None),
        (FACTS + ("Ann attended A in 2010.",), DID_ANN, None),
        (("Ann attended A from 2004 to 2000.",) + FACTS[1:], DID_ANN, None),
    ],
)
def test_the_rule_by_hand(facts, question, expected):
    found = NB.rule_cotempqa(facts, question)
    assert (found and (found[0], set(found[1]), set(found[2]))) == expected


def test_the_rule_does_not_depend_on_the_order_of_the_facts(rows):
    for e, _, _ in rows[::40]:
        facts = random.Random(e.id).sample(e.facts, len(e.facts))
        found, again = (NB.rule_cotempqa(f, e.question) or (None, (), ()) for f in (e.facts, facts))
        assert found[0] == again[0] and list(map(set, found[1:])) == list(map(set, again[1:])), e.id


def make(facts=FACTS, answers=("E",), question=DID_ANN, label="equal", split="train"):
    """Example as the reader makes it."""
    gold = NB.gold_facts(facts, NB.read_question(question), answers)
    return tk.Example(
        id=f"cotempqa/{split}/{label}/0000",
        dataset="cotempqa",
        split=split,
        label=label,
        question=question,
        facts=tuple(facts),
        answers=answers,
        gold_facts=gold,
    )


def test_gold_facts_hold_an_answer_and_co_occur():
    assert make().gold_facts == (FACTS[1],)
    assert make(answers=("E", "O")).gold_facts == (FACTS[1], FACTS[3])
    assert make(answers=("W",)).gold_facts == (FACTS[5],)  # of another relation
    assert make(answers=("N",)).gold_facts == ()  # apart in time
    assert make(answers=("B",)).gold_facts == ()  # of another subject
    twice = FACTS + ("Ann attended E in 1990.",)
    assert make(twice).gold_facts == (FACTS[1],)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"question": "Who is Ann?"}, "form"),
        ({"facts": FACTS[1:]}, "no fact"),
        ({"facts": FACTS + ("Ann attended A in 1999.",)}, "several facts"),
        ({"facts": FACTS + FACTS[:1]}, None),
        ({"facts": ("Ann attended A in 19x9.",) + FACTS[1:]}, "does not parse"),
        ({"facts": ("Ann attended A from 2004 to 2000.",) + FACTS[1:]}, "ends before"),
        ({"answers": ("N",)}, "held by no fact"),
        ({"answers": ("E", "Z")}, "held by no fact"),
        ({"facts": FACTS + ("Cid attended E in 19x9.",)}, None),
        ({"facts": FACTS[:1] + ("Ann attended E in 19x9.",)}, "held by no fact"),
        ({"facts": FACTS[:1] + ("Ann attended E from 2004 to 2000.",)}, "held by no fact"),
    ],
)
def test_a_row_without_defined_gold_is_refused_with_the_reason(change, reason):
    found = NB.refusal(make(**change))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "change, answers, text",
    [
        ({}, ("E",), None),
        ({}, ("E", "E"), "an answer stands twice"),
        ({"facts": FACTS + FACTS[:1]}, ("E",), "a fact stands twice"),
        ({"facts": FACTS + ("Ann attended Q in 19x9.",)}, ("E",), "a date does not parse"),
        ({"facts": FACTS + ("Ann slept.",)}, ("E",), "a fact is of no known form"),
        ({"facts": FACTS + ("Ann attended Q from 9 to 8.",)}, ("E",), "a date does not parse"),
        (
            {"facts": FACTS + ("Ann attended Q from 2009 to 2008.",)},
            ("E",),
            "a fact ends before it starts",
        ),
    ],
)
def test_odd_facts_that_take_no_part_are_remarked_on(change, answers, text):
    e = make(
        **{**change, "facts": [f for f in change.get("facts", FACTS) if not f.startswith("Bob")]}
    )
    assert NB.refusal(e) is None
    assert NB.remarks(e, answers) == ({text} if text else set())


def test_facts_about_somebody_else_are_remarked_on():
    assert NB.remarks(make(), ("E",)) == {"a fact is about somebody else"}
    who = WHILE_A + "who also attended A concurrently?"
    assert NB.remarks(make(FACTS[:1] + FACTS[6:7], ("Bob",), who), ("Bob",)) == set()
    assert NB.remarks(make(FACTS[:1] + FACTS[6:], ("Bob",), who), ("Bob",)) == {
        "a fact is about somebody else"
    }


@pytest.mark.parametrize(
    "facts, answers, kind",
    [
        (FACTS[1:], ("E",), "refused: the anchor stands in no fact"),
        (FACTS[:1] + FACTS[2:3] + FACTS[5:], ("D", "W"), "other relation"),
        (FACTS[:1] + FACTS[2:3] + ("Ann attended P in 2003.",), ("D",), "one date only"),
        (FACTS[:2], ("E",), "another label"),
        (FACTS[:2] + FACTS[3:4], ("E",), "other facts"),
    ],
)
def test_kinds_of_disagreement_by_hand(facts, answers, kind):
    e = make(facts, answers, label="mix")
    cited = (NB.rule_cotempqa(e.facts, e.question) or (None, ()))[1]
    assert NB.kind_of_dates(e, cited).startswith(kind)


def test_the_anchors_own_object_is_a_kind_of_disagreement():
    e = make(
        answers=("B",),
        question=WHILE_A + "which school was Bob attending concurrently?",
        label="overlap",
    )
    assert NB.kind_of_dates(e, FACTS[6:]).startswith("anchor's own object")


# --------------------------------------------------------------------------------- files
def question_row(name, *answers, **extra):
    """One raw row: `name` attended A, and one school more per answer at that time."""
    facts = [f"{name} attended A from 2000 to 2004.", f"{name} attended N in 1990."]
    return {
        "question": f"While {name} attended A, which school did {name} attend concurrently?",
        "answer": list(answers),
        "triple_element": None,
        "facts": facts + [f"{name} attended {x} in 2002." for x in dict.fromkeys(answers)],
        **extra,
    }


@pytest.fixture
def folder(tmp_path):
    """Four small files: per label a test row and training rows, one of them shared."""
    split = {}
    for label in CARD.labels:
        people = [f"{label}{k}" for k in range(4)]
        tk.write_jsonl(
            tmp_path / f"{label}.json",
            [
                question_row(people[0], "X"),
                question_row(people[1], "X"),
                question_row(people[0], "Y"),
                question_row(people[3], "X", "X"),
            ],
        )
        split[label] = [0]
    tk.write_json(tmp_path / "published_test_rows.json", split)
    return tmp_path


def test_ids_splits_and_leaks_by_hand(folder):
    examples, read = NB.read_cotempqa(folder, 0)
    assert read["rows_read"] == {"test": 4, "train": 12}
    assert read["left_out"] == {SHARED: [f"cotempqa/train/{k}/0002" for k in CARD.labels]}
    assert read["training_rows_that_share_with_test"] == {"subject": 4, "gold fact": 0, "either": 4}
    assert read["remarks"] == {
        "an answer stands twice": [f"cotempqa/train/{k}/0003" for k in CARD.labels]
    }
    assert [e.id for e in examples if e.split == "test"] == [
        f"cotempqa/test/{k}/0000" for k in CARD.labels
    ]
    assert all(e.answers == ("X",) for e in examples)
    kept, again = NB.read_cotempqa(folder, 0, keep_overlap=True)
    assert again["left_out"] == {SHARED: []} and len(kept) == len(examples) + 4 == 16
    assert again["training_rows_that_share_with_test"]["either"] == 4


def test_a_shared_gold_fact_is_a_leak_by_hand(folder):
    row = question_row("Eve", "X")
    row["question"] = "While overlap0 attended A, who also attended A concurrently?"
    row |= {
        "answer": ["Eve"],
        "facts": ["overlap0 attended A from 2000 to 2004.", "Eve attended A in 2002."],
    }
    other = {
        **row,
        "question": row["question"].replace("overlap0", "Max"),
        "facts": ["Max attended A from 2000 to 2004.", row["facts"][1]],
    }
    tk.write_jsonl(folder / "mix.json", [row, other, question_row("Kim", "X")])
    _, read = NB.read_cotempqa(folder, 0)
    assert "cotempqa/train/mix/0001" in read["left_out"][SHARED]
    assert "cotempqa/train/mix/0002" not in read["left_out"][SHARED]
    assert read["training_rows_that_share_with_test"]["gold fact"] == 1


def test_refused_rows_are_counted_by_id_and_leave_all_splits(folder):
    bad = [
        question_row("A0", "X", question="Who?"),
        question_row("A1", "X", facts=["A1 attended X in 2002."]),
        question_row("A2", "X", answer=["Q"]),
        question_row("A3", "X"),
    ]
    tk.write_jsonl(folder / "during.json", bad)
    examples, read = NB.read_cotempqa(folder, 0)
    assert read["refused"] == {
        "the question is of no known form": ["cotempqa/test/during/0000"],
        "the anchor stands in no fact": ["cotempqa/train/during/0001"],
        "an answer is held by no fact that co-occurs with the anchor": [
            "cotempqa/train/during/0002"
        ],
    }
    assert [e.id for e in examples if e.label == "during"] == ["cotempqa/train/during/0003"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"facts": []}, "row 2"),
        ({"facts": "Ann"}, "row 2"),
        ({"facts": [1]}, "row 2"),
        ({"answer": []}, "row 2"),
        ({"answer": [" "]}, "row 2"),
        ({"answer": None}, "row 2"),
        ({"question": None}, "row 2"),
        ({"question": 3}, "row 2"),
    ],
    ids=repr,
)
def test_a_broken_row_is_named_with_its_file(folder, change, named):
    tk.write_jsonl(
        folder / "mix.json", [question_row("a", "X"), {**question_row("b", "X"), **change}]
    )
    with pytest.raises(ValueError, match=rf"mix\.json, {named}.*fetch"):
        NB.read_cotempqa(folder, 0)


def test_a_row_with_a_field_twice_is_named(folder):
    row = json.dumps(question_row("b", "X"))
    (folder / "mix.json").write_text(row + "\n" + row[:-1] + ', "answer": ["Y"]}')
    with pytest.raises(ValueError, match=r"mix\.json, line 2.*stands twice"):
        NB.read_cotempqa(folder, 0)


def test_the_page_says_how_many_rows_of_the_source_there_are():
    page = " ".join((ROOT / "data/README.md").read_text().split())
    made = json.loads((ROOT / "data/results/cotempqa/decomposition.json").read_text())
    read, known = made["agreement"]["during"]["n"], made["rows_known"]["during"]
    assert f"{read:,.0f} of {known:,} rows" in page and read < known


def test_missing_and_broken_files_are_named(folder):
    (folder / "mix.json").write_text('{"question": "x"}\n{"quest')
    with pytest.raises(ValueError, match=r"mix\.json, line 2"):
        NB.read_cotempqa(folder, 0)
    (folder / "mix.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"mix\.json"):
        NB.read_cotempqa(folder, 0)
    (folder / "published_test_rows.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"published_test_rows\.json"):
        NB.read_cotempqa(folder, 0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"equal": []}',
        '{"equal": [4]}',
        '{"equal": [-1]}',
        '{"equal": 3}',
        '{"equal": ["0"]}',
        '{"equal": null}',
        '{"equal": [[0]]}',
        '{"equal": [0, 0]}',
        '{"equal": [true]}',
        '{"equal": [0.0]}',
    ],
)
def test_a_broken_list_of_test_rows_is_named(folder, content):
    (folder / "published_test_rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"published_test_rows\.json: equal: .*fetch"):
        NB.read_cotempqa(folder, 0)


def test_the_folder_comes_from_the_environment_then_from_raw(folder, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "cotempqa").mkdir(parents=True)
    (home / "cotempqa/equal.json").write_text("")
    monkeypatch.setattr(tk, "RAW", home)
    for value in ("", str(folder), str(home)):
        monkeypatch.setenv("TRACEKD_DATA_DIR", value)
        assert NB.raw_folder() == home / "cotempqa"


@pytest.fixture
def hub(folder, monkeypatch):
    """The hub, played by the small files of four rows each."""

    def fetch(repo, kind, pin, patterns, instead):
        assert (repo, kind) == ("Warrieryes/CotempQA", "dataset") and pin and instead
        return folder

    monkeypatch.setattr(tk, "fetch", fetch)
    monkeypatch.setitem(CARD.source, "rows", dict.fromkeys(CARD.labels, 4))
    return folder


def test_a_download_can_be_read(hub, tmp_path, monkeypatch):
    target = tmp_path / "raw" / "cotempqa"
    monkeypatch.setattr(tk, "RAW", tmp_path / "raw")
    monkeypatch.setenv("TRACEKD_DATA_DIR", "")
    assert NB.raw_folder() == target
    test = json.loads((target / "published_test_rows.json").read_text())
    assert all(len(test[k]) == 1 for k in CARD.labels)
    assert NB.read_cotempqa(target, 0)[1]["rows_read"] == {"test": 4, "train": 12}


def test_a_failed_download_says_what_to_do_and_leaves_no_marker(hub, tmp_path, monkeypatch):
    tk.write_jsonl(hub / "mix.json", [question_row("a", "X")])
    monkeypatch.setattr(tk, "RAW", tmp_path / "raw")
    monkeypatch.setenv("TRACEKD_DATA_DIR", "")
    with pytest.raises(RuntimeError, match=r"mix\.json has 1 rows, expected 4.*TRACEKD"):
        NB.raw_folder()
    assert not (tmp_path / "raw" / "cotempqa").exists()


# ------------------------------------------------------------------------ the real files
def test_the_split_of_the_release_is_drawn_again(data_dir):
    published = json.loads((data_dir / "cotempqa/published_test_rows.json").read_text())
    for label in ("equal", "mix", "overlap"):  # `during` is not whole in this copy
        assert NB.published_split(ROWS[label]) == published[label]
    assert len(NB.published_split(3096)) == len(published["during"])


def test_all_facts_and_questions_of_the_real_files_are_read(rows):
    assert Counter(e.label for e, _, _ in rows) == ROWS
    facts = [NB.read_fact(f) for e, _, _ in rows for f in e.facts]
    assert len(facts) > 60_000
    assert Counter(f.problem for f in facts if f.problem) == {"a fact ends before it starts": 2}
    assert {len(f.start) for f in facts} == {1, 2, 3}
    patterns = [(p, NB.pattern_of(e.question)) for e, _, p in rows]
    assert all(mine for _, mine in patterns) and sum(p is not None for p, _ in patterns)
    assert all(p == mine for p, mine in patterns if p)


def test_rule_and_annotation_agree_at_least_as_measured(rows):
    agreed, n = Counter(), Counter()
    for e, _, _ in rows:
        found = NB.rule_cotempqa(e.facts, e.question)
        n[e.label] += 1
        agreed[e.label] += bool(found) and (found[0], set(found[1]), set(found[2])) == (
            e.label,
            set(e.gold_facts),
            set(e.answers),
        )
    shares = {k: agreed[k] / n[k] for k in n}
    assert all(shares[k] >= FLOORS[k] for k in FLOORS), shares


def test_every_disagreement_but_one_has_a_known_kind(rows):
    kinds = Counter()
    for e, _, _ in rows:
        label, facts, answers = NB.rule_cotempqa(e.facts, e.question) or ("", (), ())
        same = bool(label) and set(facts) == set(e.gold_facts)
        if not (same and label == e.label and set(answers) == set(e.answers)):
            kinds[NB.kind_of_dates(e, facts).split(":")[0]] += 1
    assert sum(kinds.values()) == 192 and kinds["refused"] == 4
    assert kinds["other facts, for no reason found"] == 1, kinds


def test_single_dated_facts_are_annotated_one_date_at_a_time(rows):
    complete, cut = 0, 0
    for e, _, _ in rows:
        cited = (NB.rule_cotempqa(e.facts, e.question) or (None, ()))[1]
        dates = {NB.read_fact(f)[3:5] for f in (*cited, *e.gold_facts)}
        if len(dates) > 1 and NB.one_single_date([NB.read_fact(f) for f in e.gold_facts]):
            cut += bool(set(cited) - set(e.gold_facts))
            complete += not set(cited) - set(e.gold_facts)
    assert cut > 100 and complete == 0


def test_the_real_examples_hold_their_contract(real):
    examples, read = real
    for e in examples:
        tk.check_example(e, "cotempqa")
        assert e.gold_facts and NB.refusal(e) is None
    assert len({e.id for e in examples}) == len(examples)
    assert read["rows_read"] == {"test": 950, "train": 2399}
    assert sum(map(len, read["refused"].values())) == 4
    assert not any("/test/" in i for ids in read["refused"].values() for i in ids)
    assert len(examples) + 4 + len(read["left_out"][SHARED]) == sum(ROWS.values())
    splits = Counter(e.split for e in examples)
    assert splits["test"] == 950
    assert splits["train"] >= CARD.rows["train"]
    assert splits["validation"] >= CARD.rows["validation"]


def test_no_training_row_shares_a_subject_or_gold_fact_with_a_test_row(real):
    test = [e for e in real[0] if e.split == "test"]
    text = "\n".join(e.question for e in test)
    gold = {f for e in test for f in e.gold_facts}
    train = [e for e in real[0] if e.split != "test"]
    assert not {f for e in train for f in e.gold_facts} & gold
    names = {name for e in train for name in NB.subjects(e)}
    assert len(names) > 500 and not [
        n
        for n in names
        for before in (
            "While",
            "which school did",
            "employer did",
            "position did",
            "party did",
            "school was",
        )
        if f"{before} {n} " in text
    ]


def test_the_overlap_stays_on_request_and_is_counted(data_dir, real):
    kept, read = NB.read_cotempqa(data_dir / "cotempqa", 0, keep_overlap=True)
    shared = read["training_rows_that_share_with_test"]
    assert shared == real[1]["training_rows_that_share_with_test"]
    assert len(kept) - len(real[0]) == shared["either"] == 1201
    assert (shared["subject"], shared["gold fact"]) == (1201, 742)
    test = {e.id for e in real[0] if e.split == "test"}
    assert test == {e.id for e in kept if e.split == "test"}


def test_the_validation_slice_is_drawn_by_the_seed(data_dir, real):
    other = NB.read_cotempqa(data_dir / "cotempqa", 1)[0]
    first, second = ({e.id for e in part if e.split == "validation"} for part in (real[0], other))
    assert first != second and {replace(e, split="") for e in other} == {
        replace(e, split="") for e in real[0]
    }


def test_every_trace_of_a_real_example_comes_back_from_its_text(real):
    for e in real[0][::7]:
        trace = tk.Trace(label=e.label, facts=e.gold_facts)
        parsed = tk.parse_output(tk.render_target(e, trace), e)
        assert parsed.trace == trace and parsed.answers == e.answers, e.id


def test_the_room_leaves_what_it_promises(workspace, data_dir):
    done = papermill(workspace, "11_decompose_cotempqa", "-p", "study", "temporal")
    assert done.returncode == 0, done.stderr[-3000:]
    examples = tk.read_examples(workspace / "data/interim/cotempqa/examples.jsonl")
    found = json.loads((workspace / "data/results/temporal/decomposition.json").read_text())
    assert found["kept"] == len(examples) == sum(found["rows_per_split"].values())
    assert {k: v["n"] for k, v in found["agreement"].items()} == ROWS
    assert all(found["agreement"][k]["all_same"] >= FLOORS[k] for k in FLOORS)
    ids = [i for part in found["disagreement_kinds"].values() for i in part]
    assert sorted(ids) == sorted(found["disagreements"]) and len(set(ids)) == len(ids)
    assert found["no_rule"] == [] and found["keep_overlap"] is False
    assert found["parameters"] == {"dataset": "cotempqa", "seed": 0, "keep_overlap": False}
    assert found["rows_known"] == CARD.source["rows"]
    assert found["raw_sha256"] == CARD.source["sha256"] and all(found["raw_as_on_card"].values())
