"""MARCO: the layout of v2.1, bad records, the split, alternatives, the window, the licence."""

import copy
import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT, notebook_functions, papermill
from hypothesis import given
from hypothesis import strategies as st

import tracekd_utils as tk

NB = notebook_functions("12_decompose_marco")
CARD = tk.dataset("marco")
NONE = NB.NO_ANSWER


def record(number=1, **changes):
    """One record of the layout; a change is a top-level key, None takes it out."""
    row = {
        "query_id": number,
        "query": f"how many legs has beetle {number}",
        "query_type": "NUMERIC",
        "answers": [f"Six legs on number {number}."],
        "wellFormedAnswers": [],
        "passages": {
            "is_selected": [0, 1, 0],
            "url": ["", "", ""],
            "passage_text": [
                f"Beetle {number} flies; at night.",
                f"All six legs of {number}.",
                f"A spider, {number} of them.",
            ],
        },
    }
    row.update(copy.deepcopy(changes))
    return {k: v for k, v in row.items() if v is not None}


def passages(texts=("a b", "c d"), marks=(0, 1), **extra):
    return {"passage_text": list(texts), "is_selected": list(marks), **extra}


def read(tmp_path, rows, **options):
    path = tmp_path / NB.MARCO_FILE
    tk.write_jsonl(path, rows)
    return NB.read_marco(path, 0, **options)


# --------------------------------------------------------------------------- bad records
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"query_type": None}, "another layout: no query_type"),
        ({"query": None}, "another layout: no query "),
        ({"query_id": "7"}, "another layout: no query_id"),
        ({"answers": "six"}, "another layout: no answers"),
        ({"passages": [{"passage_text": "a", "is_selected": 1}]}, "another layout: no passages"),
        ({"query_type": "numeric"}, "another layout: query_type"),
        ({"passages": {"passage_text": ["a b"]}}, "passages without is_selected"),
        ({"passages": passages(marks=(1,))}, "ragged"),
        ({"passages": passages(texts=("a",))}, "ragged"),
        ({"passages": passages((), ())}, "another layout: passage_text"),
        ({"passages": {"passage_text": "ab", "is_selected": [0, 1]}}, "another layout: passage_"),
        ({"passages": passages(marks=(0, 2))}, "something else than 0 and 1"),
        ({"passages": passages(marks=(0, True))}, "something else than 0 and 1"),
        ({"passages": passages(texts=("a", None))}, "is no text"),
        ({"answers": [None]}, "is no text"),
        ({"passages": passages(texts=("a", " "))}, "no word"),
        ({"query": "?"}, "the query or a passage has no word"),
        ({"answers": [""]}, "no answer has a word"),
        ({"answers": []}, "no answer has a word"),
        ({"answers": ["$"]}, "no answer has a word"),
        ({"passages": passages(marks=(0, 0))}, "no passage is selected although"),
        ({"query": "How many legs has BEETLE 1?"}, "the query stands before"),
        ({"query_id": 1}, "the query stands before"),
    ],
    ids=repr,
)
def test_a_record_that_cannot_be_used_is_refused_and_listed(tmp_path, change, reason):
    rows = [record(k) for k in range(1, 12)]
    kept, found = read(tmp_path, [*rows, record(99, **change)])
    ((why, ids),) = found["refused"].items()
    named = change.get("query_id", 99)
    assert reason in f"{why} " and ids == [f"record 12, query_id {named}"]
    assert len(kept) == 11 and found["rows_read"] == {"records": 12}
    assert all(not v for v in found["left_out"].values()) and found["remarks"] == {}


def test_a_file_without_a_usable_record_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"sample_v2\.1\.jsonl: none of 2 .*layout.*: 2.*v2\.1"):
        read(tmp_path, [record(k, query_type="numeric") for k in (1, 2)])
    path = tmp_path / NB.MARCO_FILE
    path.write_text(json.dumps(record()) + "\n{cut")
    with pytest.raises(ValueError, match=r"sample_v2\.1\.jsonl, line 2"):
        NB.read_marco(path, 0)


def test_what_is_odd_but_usable_is_kept_and_listed(tmp_path):
    twice = record(2)["passages"]
    twice["passage_text"][2] = twice["passage_text"][0]
    rows = [record(k) for k in range(3, 14)] + [
        record(1, answers=["Nothing that anybody wrote"]),
        record(2, passages=twice),
    ]
    kept, found = read(tmp_path, rows)
    by_number = {e.id.split("/")[-1]: e.id for e in kept}
    assert found["remarks"] == {
        "no passage holds half of an answer's words": [by_number["1"]],
        "a passage stands twice": [by_number["2"]],
    }
    assert len(kept) == 13 and found["refused"] == {}


def test_rows_without_an_answer_stay_on_request_only(tmp_path):
    rows = [record(k) for k in range(1, 12)] + [
        record(12, answers=[NONE], passages=passages(marks=(0, 0)))
    ]
    kept, found = read(tmp_path, rows)
    assert found["left_out"][NONE] == ["record 12, query_id 12"] and len(kept) == 11
    assert found["keep_no_answer"] is False
    more, found = read(tmp_path, rows, keep_no_answer=True)
    (e,) = (e for e in more if e.answers == (NONE,))
    assert e.gold_facts == () and len(more) == 12 and found["left_out"][NONE] == []
    assert found["remarks"] == {"no answer is present": [e.id]}


@pytest.mark.parametrize(
    "given, kept",
    [
        (["Six.", "six legs ", "Six.", ""], ("Six.", "six legs")),
        ([NONE, "Six."], ("Six.",)),
        (["a; b, c"], ("a; b, c",)),
    ],
)
def test_references_are_alternatives_each_once(tmp_path, given, kept):
    examples = NB.marco_rows(write(tmp_path, [record(answers=given)]))[0]
    assert [e.answers for e in examples] == [kept]


def write(tmp_path, rows):
    return tk.write_jsonl(tmp_path / NB.MARCO_FILE, rows)


# ----------------------------------------------------------------------------- the split
def test_the_split_depends_on_ids_alone(tmp_path):
    rows = [
        record(k, query_type=label)
        for k, label in enumerate([*["DESCRIPTION"] * 40, *["PERSON"] * 11, "ENTITY"], start=1)
    ]
    kept, _ = read(tmp_path, rows)
    again, _ = read(tmp_path, rows[::-1])
    assert set(kept) == set(again)
    assert Counter((e.label, e.split) for e in kept) == {
        ("DESCRIPTION", "test"): 8,
        ("DESCRIPTION", "validation"): 3,
        ("DESCRIPTION", "train"): 29,
        ("PERSON", "test"): 3,
        ("PERSON", "validation"): 1,
        ("PERSON", "train"): 7,
        ("ENTITY", "test"): 1,
    }
    assert all(
        e.id.split("/")
        == ["marco", "test" if e.split == "test" else "train", e.label, e.id.split("/")[-1]]
        for e in kept
    )
    path = tmp_path / NB.MARCO_FILE
    other = {e.id: e.split for e in NB.read_marco(path, 1)[0]}
    first = {e.id: e.split for e in kept}
    assert set(other) == set(first) and other != first  # another validation split


def test_passages_of_test_rows_are_taken_out_of_training_by_hand():
    def make(name, facts, *gold):
        return tk.Example(
            id=name,
            dataset="marco",
            split="train",
            question="?",
            label="PERSON",
            facts=tuple(facts),
            gold_facts=gold,
            answers=("a",),
        )

    test = [make("t", "AB", "A")]
    train = [
        make("same", "CDE", "C"),
        make("cut", ["b!", "C", "D"], "C"),
        make("gold", "ACD", "A"),
        make("few", "BCD", "C", "D"),
        make("none", "BC", "C"),
    ]
    kept, dropped, cut = NB.without_test_passages(train, test)
    assert [(e.id, "".join(e.facts)) for e in kept] == [("same", "CDE"), ("cut", "CD")]
    assert list(dropped.values()) == [["gold"], ["few", "none"]] and cut == {"cut": 1}


# ------------------------------------------------------------------------------ the rule
@pytest.mark.parametrize(
    "query, label",
    [
        ("how many legs", "NUMERIC"),
        ("average wage gilded age", "NUMERIC"),
        ("Who was he", "PERSON"),
        ("where is rome", "LOCATION"),
        ("which drug helps", "ENTITY"),
        ("types of drugs", "ENTITY"),
        ("what is rome", "DESCRIPTION"),
        ("how does it work", "DESCRIPTION"),
        ("whenever he runs", "DESCRIPTION"),
    ],
)
def test_the_label_rule_by_hand(query, label):
    assert NB.rule_marco(("a",), query, ("a",)) == (label, ("a",), ("a",))


def test_the_passage_rule_by_hand():
    assert NB.held_share("Six legs, six!", "The six of it") == 1 / 2
    facts = ("six ants", "Six legs.", "legs: six")
    assert NB.most_words(facts, ("six legs",)) == "Six legs."
    assert NB.most_words(facts, ("no", "the six ants ran")) == "six ants"


# ---------------------------------------------------------------------------- the scores
def item(*answers):
    return tk.Example(
        id="m",
        dataset="marco",
        split="test",
        question="?",
        facts=("f",),
        label="NUMERIC",
        gold_facts=("f",),
        answers=answers,
    )


rouge_l = notebook_functions("04_score_outputs").rouge_l


def scored(text, *answers):
    return tk.score(tk.parse_output(text, item(*answers)), item(*answers))


@pytest.mark.parametrize(
    "output, f1, rouge, exact",
    [
        # tokens a b c d: longest common subsequence a b d, precision 3/4, recall 3/3
        ("<answer>a b c d</answer>", 2 * 3 / 7, 2 * 3 / 7, False),
        # the same tokens, turned around: overlap 3, subsequence 1
        ("<answer>d b a</answer>", 1.0, 1 / 3, False),
        ("<answer>z</answer>", 0.0, 0.0, False),
        ("<answer></answer>", 0.0, 0.0, False),
        ("<answer>A; b, d!</answer>", 1.0, 1.0, True),
        ("<answer>A; b, d!", 1.0, 1.0, True),
        ("<answer>[a] b (d)", 1.0, 1.0, True),
    ],
)
def test_scores_by_hand(output, f1, rouge, exact):
    row, e = scored(output, "x y", "a b d"), item("x y", "a b d")
    said = "; ".join(tk.parse_output(output, e).answers or ())
    assert row["answer_f1"] == pytest.approx(f1)
    assert rouge_l(said, e.answers) == pytest.approx(rouge)
    assert row["answer_exact"] is exact and row["answer_ok"] is (f1 >= 0.5)


def test_rouge_l_is_the_librarys_best_over_references():
    from rouge_score.rouge_scorer import RougeScorer

    scorer, said = RougeScorer(["rougeL"]), "The price of 1,000 shares was $5 in May"
    gold = ["In May the price was 5 dollars", "1,000 shares", "shares of May"]
    best = max(scorer.score(g, said)["rougeL"].fmeasure for g in gold)
    assert 0 < rouge_l(said, gold) == best < 1


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(tk.normalise)


@given(st.lists(CONTENT, min_size=1, max_size=3), st.lists(CONTENT, max_size=2))
def test_the_first_of_any_references_is_written_and_right(answers, facts):
    e = replace(item(*answers), facts=("f", *facts))
    trace = tk.Trace(label="PERSON", facts=tuple(facts))
    parsed = tk.parse_output(tk.render_target(e, trace), e)
    assert (parsed.trace, parsed.answers, parsed.problems) == (trace, (answers[0],), ())
    row = tk.score(parsed, e)
    assert row["answer_ok"] is row["answer_exact"] is True and row["answer_f1"] == 1.0


# ------------------------------------------------------------------------ the real sample
@pytest.fixture(scope="module")
def real(data_dir):
    return NB.read_marco(data_dir / "msmarco" / NB.MARCO_FILE, 0)


def test_every_record_of_the_sample_is_kept_or_accounted_for(real):
    examples, found = real
    for e in examples:
        tk.check_example(e, "marco")
        assert e.gold_facts and NONE not in e.answers
    assert len({e.id for e in examples}) == len(examples)
    assert found["rows_read"] == {"records": 247} and len(found["left_out"][NONE]) == 13
    # one record has an empty answer, one query stands twice
    assert {k: len(v) for k, v in found["refused"].items()} == {
        "no answer has a word": 1,
        "the query stands before": 1,
    }
    out = sum(map(len, [*found["refused"].values(), *found["left_out"].values()]))
    assert len(examples) + out == 247
    splits = Counter(e.split for e in examples)
    assert splits["train"] > 150 and all(
        splits[s] >= CARD.rows[s] for s in ("validation", "test")
    ), splits
    assert {e.label for e in examples if e.split == "test"} == set(CARD.labels)


def test_training_and_test_share_no_passage_and_no_query(real, data_dir):
    texts = {
        part: {
            tk.normalise(f)
            for e in real[0]
            if (e.split == "test") is part
            for f in (*e.facts, e.question)
        }
        for part in (True, False)
    }
    assert not texts[True] & texts[False]
    whole = {e.id.split("/")[-1]: e for e in NB.marco_rows(data_dir / "msmarco" / NB.MARCO_FILE)[0]}
    for e in real[0]:
        n = len(whole[e.id.split("/")[-1]].facts) - len(e.facts)
        assert n == real[1]["passages_taken_out"].get(e.id, 0) >= 0


def test_the_answers_that_no_passage_supports_are_those_listed(real):
    listed = real[1]["remarks"]["no passage holds half of an answer's words"]
    expected = [
        e.id
        for e in real[0]
        if all(
            2 * sum(w in tk.normalise(f).split() for w in set(tk.normalise(a).split()))
            < len(set(tk.normalise(a).split()))
            for a in e.answers
            for f in e.facts
        )
    ]
    assert sorted(listed) == sorted(expected) and 0 < len(listed) < 40


@pytest.mark.parametrize("condition", tk.conditions())
def test_every_trace_and_the_first_reference_come_back(real, corrupter, condition):
    examples, layout = real[0], corrupter.CONDITIONS[condition].layout
    pool = corrupter.Pool(examples)
    assert all(len(corrupter.non_gold_facts(e)) >= len(set(e.gold_facts)) for e in examples)
    for e in examples:
        trace = corrupter.make_trace(e, condition, pool)
        parsed = tk.parse_output(tk.render_target(e, trace, layout=layout), e)
        assert (parsed.trace, parsed.answers) == (trace, e.answers[:1]), e.id
        row = tk.score(parsed, e, layout)
        assert row["answer_ok"] is row["answer_exact"] is True, e.id
        assert rouge_l(parsed.answers[0], e.answers) == row["answer_f1"] == 1.0, e.id
        if condition in ("correct", "incorrect"):
            assert row["trace_ok"] is row["facts_ok"] is (condition == "correct"), e.id


# ----------------------------------------------------------------------------- the window
def test_facts_that_are_not_gold_go_whole_and_no_more_than_needed(corrupter):
    e = replace(item("a"), facts=tuple("abcdefgh"), gold_facts=("c", "f"))
    for n in range(4, 9):
        short = corrupter.fit(e, lambda e, n=n: len(e.facts) <= n)
        assert len(short.facts) == n and set("cf") <= set(short.facts)
        assert "".join(short.facts) == "".join(sorted(short.facts))
        assert replace(short, facts=e.facts) == e
        longer = corrupter.fit(e, lambda e, n=n: len(e.facts) <= n + 1)
        assert set(short.facts) <= set(longer.facts)
    assert corrupter.fit(e, lambda e: len(e.facts) <= 3) is None
    other = corrupter.fit(replace(e, id="n"), lambda e: len(e.facts) <= 4)
    assert other.facts != corrupter.fit(e, lambda e: len(e.facts) <= 4).facts  # drawn by id


def test_a_record_with_a_field_twice_is_named(tmp_path):
    line = json.dumps(record())
    path = tmp_path / NB.MARCO_FILE
    path.write_text(line + "\n" + line[:-1] + ', "query": "another"}\n')
    with pytest.raises(ValueError, match="line 2.*stands twice"):
        NB.read_marco(path, 0)


def test_the_page_says_what_the_sample_is():
    page = " ".join((ROOT / "data/README.md").read_text().split())
    made = json.loads((ROOT / "data/results/marco/decomposition.json").read_text())
    again = tk.dataset("marco").source["reassembled"]
    assert f"{again} of the {made['rows_read']['records']} records" in page
    assert made["raw_as_on_card"] == {NB.MARCO_FILE: True}


# --------------------------------------------------------------------- the hub, the folder
def test_the_folder_comes_from_the_environment_then_from_raw(tmp_path, monkeypatch):
    (tmp_path / "msmarco").mkdir()
    write(tmp_path / "msmarco", [record()])
    monkeypatch.setattr(tk, "RAW", tmp_path)
    (tmp_path / "other").mkdir()
    for value in ("", str(tmp_path / "other"), str(tmp_path)):
        monkeypatch.setenv("TRACEKD_DATA_DIR", value)
        assert NB.raw_folder() == tmp_path / "msmarco"


def test_a_download_can_be_read(tmp_path, monkeypatch):
    from datasets import Dataset

    rows = [record(k) for k in range(1, 9)] + [record(9, answers=[NONE])]
    (tmp_path / "v2.1").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / NB.MARCO_PART)

    def fetch(repo, kind, pin, patterns, instead):
        assert (repo, kind, len(pin)) == ("microsoft/ms_marco", "dataset", 40)
        assert patterns == [NB.MARCO_PART] and instead
        return tmp_path

    monkeypatch.setattr(tk, "fetch", fetch)
    monkeypatch.setattr(tk, "RAW", tmp_path / "raw")
    monkeypatch.setenv("TRACEKD_DATA_DIR", "")
    monkeypatch.setitem(NB.read_hub.__globals__, "MARCO_ROWS", 6)
    assert NB.raw_folder() == tmp_path / "raw" / "msmarco"
    written = tk.read_jsonl(tmp_path / "raw/msmarco" / NB.MARCO_FILE)
    assert written == rows[:6] + rows[8:]
    (tmp_path / NB.MARCO_PART).write_bytes(b"no parquet")
    monkeypatch.setattr(tk, "RAW", tmp_path / "again")
    with pytest.raises(RuntimeError, match=r"microsoft/ms_marco.*sample_v2\.1.*TRACEKD_DATA_DIR"):
        NB.raw_folder()
    assert not (tmp_path / "again" / "msmarco").exists()


# --------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def study(workspace, real):
    """The room on the sample; 02 to 04 on a few rows, with the tiny student's short window."""
    path = workspace / "data/interim/marco/examples.jsonl"
    for name, *options in (
        ("12_decompose_marco",),
        ("02_corrupt_traces", "-p", "student", "tiny"),
        (
            "03_finetune_student",
            "-p",
            "student",
            "tiny",
            "-p",
            "condition",
            "direct",
            "-p",
            "max_new_tokens",
            "8",
            "-p",
            "quantize",
            "false",
        ),
        ("04_score_outputs",),
    ):
        if name != "04_score_outputs":
            options = ("-p", "dataset", "marco", *options)
        done = papermill(workspace, name, "-p", "study", "marco", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        if name.startswith("12"):
            examples = tk.read_examples(path)
            assert set(examples) == set(real[0])
            few = [e for s, n in SMALL.items() for e in [e for e in examples if e.split == s][:n]]
            tk.write_jsonl(path, few)
            made = workspace / "data/results/marco/decomposition.json"  # or the room runs again
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            tk.write_json(made, {**tk.read_json(made), "examples_sha256": digest})
    return workspace


SMALL = {"train": 6, "validation": 2, "test": 6}


def test_the_room_leaves_what_it_promises(study, real):
    found = json.loads((study / "data/results/marco/decomposition.json").read_text())
    assert found["kept"] == len(real[0]) and found["refused"] == real[1]["refused"]
    assert sum(v["n"] for v in found["agreement"].values()) == 232
    assert all("answers_same" not in v for v in found["agreement"].values())
    ids = [i for part in found["disagreement_kinds"].values() for i in part]
    assert sorted(ids) == sorted(found["disagreements"]) and 0 < len(ids) < 232
    # measured on the 232 records, all labels together: 212 labels, 222 passages
    for name, floor in (("label_same", 212), ("facts_same", 222)):
        agreed = sum(v[name] * v["n"] for v in found["agreement"].values())
        assert floor <= round(agreed) < 232, (name, agreed)
    assert found["raw_sha256"] == CARD.source["sha256"] and all(found["raw_as_on_card"].values())


def test_02_fits_every_row_into_the_window_the_same_in_all_conditions(study, real):
    from transformers import AutoTokenizer

    folder = study / "data/interim/marco/sft/controlled"
    rows = {p.stem.split("-")[0]: tk.read_jsonl(p) for p in folder.glob("*.jsonl")}
    checks = json.loads((study / "data/results/marco/manipulation_checks.json").read_text())
    window, by_id = checks["window"], {e.id: e for e in real[0]}
    assert set(rows) == {"direct", "vanilla", "correct", "incorrect"}
    assert window["limit"] == 2048 and window["facts_taken_out"]
    out = Counter(by_id[i].split for i in window["left_out"])
    assert checks["rows"] == {s: n - out[s] for s, n in SMALL.items()}
    tokenizer = AutoTokenizer.from_pretrained(study / "data/raw/students/tiny")
    for r, v, i in zip(rows["correct"], rows["vanilla"], rows["incorrect"], strict=True):
        assert (r["id"], r["prompt"]) == (v["id"], v["prompt"]) == (i["id"], i["prompt"])
        e, lines = by_id[r["id"]], set(r["prompt"].split("\n"))
        shown = {
            f for f in e.facts if tk.render_prompt(replace(e, facts=(f,))).split("\n")[1] in lines
        }
        assert set(e.gold_facts) < shown
        assert len(shown) >= 2 * len(e.gold_facts)
        assert len(e.facts) - len(shown) == window["facts_taken_out"].get(e.id, 0)
        assert e.id not in window["left_out"]
        parsed = tk.parse_output(i["target"], e)
        assert set(parsed.trace.facts) <= shown - set(e.gold_facts)
        for row in (r, v, i):
            assert len(tk.encode_row(tokenizer, row["prompt"], row["target"])[0]) <= 2048
    for r, d in zip(rows["correct"], rows["direct"], strict=True):
        assert d["prompt"].startswith(r["prompt"])
        assert len(tk.encode_prompt(tokenizer, d["prompt"], chat=True)) < 2048


def test_the_results_hold_scores_and_no_text_of_marco(study, real):
    (folder,) = (study / "data/results/marco").glob("marco-tiny-direct-*")
    rows = tk.read_parquet(folder / "predictions.parquet")
    sft = tk.read_jsonl(study / "data/interim/marco/sft/controlled/correct-dose1-seed0.jsonl")
    assert {r["id"] for r in rows} == {r["id"] for r in sft if r["split"] == "test"}
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("answer_f1", "answer_rouge_l"):
        assert metrics[name] == pytest.approx(sum(r[name] for r in rows) / len(rows))
    private = tk.read_parquet(study / "data/runs" / folder.name / "predictions.parquet")
    assert [
        {k: v for k, v in r.items() if k not in ("output", "output_ids")} for r in private
    ] == rows and all(r["output_ids"] for r in private)
    public = "".join(p.read_text() for p in (study / "data/results/marco").rglob("*.json"))
    public += json.dumps(rows)
    for name in ("12_decompose_marco", "03_finetune_student", "04_score_outputs"):
        public += (study / f"{name}-out.ipynb").read_text()
    for e in real[0]:
        for text in (*e.facts, *(a for a in e.answers if len(a) > 25)):
            assert json.dumps(text)[1:40] not in public, e.id


@pytest.mark.parametrize("notebook", ["06_intervene_on_traces", "08_stress_the_parser"])
def test_what_needs_the_text_of_outputs_refuses_marco(notebook, monkeypatch):
    monkeypatch.setattr(tk, "RESULTS", ROOT / "data" / "results")
    (path,) = (tk.RESULTS / "marco").glob("marco-*-correct-*/metrics.json")
    nb = notebook_functions(notebook)
    with pytest.raises(ValueError, match="(?i)marco.*another dataset"):
        if notebook.startswith("06"):
            nb.check_run(tk.read_json(path), path.parent)
        else:
            nb.study_outputs("marco")
