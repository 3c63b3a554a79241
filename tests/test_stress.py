"""08: variations that keep the meaning are read as before, changes are seen."""

import dataclasses
import json
import re

import pytest
from conftest import ROOT, notebook_functions, papermill

import tracekd_utils as tk

# under `published`, what is no Python list behind its cue is one bare fact: bullets are not read
NOT_READ = {("published/babi", "bullets"), ("published/cotempqa", "bullets")}
SAVED = sorted((ROOT / "data/results/stress").glob("*.json"))
TEXT = (
    "<think>Question type: object-place\nFacts:\n- Mary took the apple.\n"
    "- Mary went to the kitchen.</think>\n<answer>kitchen</answer>"
)


@pytest.fixture(scope="module")
def stress():
    return notebook_functions("08_stress_the_parser")


@pytest.fixture
def item(stress, example):
    (found,), _ = stress.draw_items([(TEXT, example, "controlled")], 1)
    assert (found.label, found.answers) == ("object-place", ("kitchen",))
    return found


KEEP = (
    "tag case",
    "tag name",
    "tag missing",
    "tag repeated",
    "bullets",
    "list form",
    "reordered",
    "prose before",
    "prose between",
    "prose after",
    "label form",
    "curly quotes",
    "full width",
    "line break",
    "word cut",
    "spaces",
    "markdown",
    "truncated",
)
CHANGE = (
    "other label",
    "fact swapped",
    "near-miss fact",
    "fact negated",
    "fact added",
    "fact left out",
    "other answer",
    "answer added",
)


def test_the_lists_above_are_the_notebooks(stress):
    assert set(stress.KEEP) == set(KEEP) and set(stress.CHANGE) == set(CHANGE)


@pytest.mark.parametrize("name", KEEP)
def test_a_mild_variation_is_another_text_that_reads_the_same(stress, item, name):
    text = stress.KEEP[name](item, tk.stream(0, "x", name), 1)
    assert text != TEXT
    fields, verdicts = stress.readings(text, item)
    assert fields == {
        "label": True,
        "facts": True,
        "answer": True,
        "strict_ok": (name in ("reordered", "curly quotes", "word cut", "spaces")),
    }
    assert verdicts["lenient"] == (True, True)


@pytest.mark.parametrize("name", CHANGE)
def test_a_change_is_seen_in_its_field_and_nowhere_else(stress, item, name):
    field, change = stress.CHANGE[name]
    fields, _ = stress.readings(change(item, tk.stream(0, "x", name)), item)
    assert {f for f in stress.FIELDS if not fields[f]} == {field}


@pytest.mark.parametrize("strength, has", [(2, "  "), (3, "<Think>")])
def test_noise_comes_on_top_of_the_change(stress, item, strength, has):
    text = stress.vary(item, "fact negated", strength)
    assert has in text and " not " in text


def test_a_fact_is_cut_only_where_the_rest_fits_it_alone(stress):
    story = ("Mary went to the garden.", "Mary went to the kitchen.", "Tom is not here.")
    assert "Mary went to the" not in stress.cuts(story[0], story)
    assert "went to the garden." in stress.cuts(story[0], story)
    assert "Tom is here." not in stress.cuts(story[2], story)


def test_outputs_without_a_meaning_to_keep_are_left_out_and_counted(stress, example):
    texts = (TEXT, "", "<think></think>", TEXT + TEXT, TEXT.replace("\n- ", "\n"))
    outputs = [(text, example, "controlled") for text in texts]
    items, left_out = stress.draw_items(outputs, 10)
    assert [i.text for i in items] == [TEXT] and sum(left_out.values()) == 4


def test_the_released_scoring_by_hand(example):
    other = dataclasses.replace(
        example, id="b", label="person-place", facts=("Tom is here.",), gold_facts=("Tom is here.",)
    )
    one_fact = TEXT.replace("\n- Mary went to the kitchen.", "")
    assert tk.released_score(one_fact, example) == {"answer_ok": True, "trace_ok": True}
    assert tk.released_score(TEXT, example, [other, example])["trace_ok"] is False  # B1
    assert tk.released_score("kitchen", example) == {"answer_ok": True, "trace_ok": None}
    assert (
        tk.released_score(TEXT.replace(">kitchen<", ">the kitchen<"), example)["answer_ok"] is False
    )
    assert tk.released_extract("Answer: Kitchen") == " kitchen"
    assert tk.released_extract("My answer is x, no answer is y") == "is x, no"


@pytest.mark.parametrize("path", SAVED, ids=lambda p: p.stem)
def test_the_committed_results_reach_the_floor(path):
    saved = json.loads(path.read_text())
    assert saved["n_varied"] > 0 and {r["strength"] for r in saved["variations"]} == {1, 2, 3}
    for r in saved["variations"]:
        unread = (saved["source"], r["variation"]) in NOT_READ
        if r["kind"] == "keeps" and r["strength"] == 1 and r["n"] and not unread:
            assert all(
                r[f]["estimate"] >= 0.95 for f in ("label", "facts", "answer", "lenient_quadrant")
            ), r
        if r["kind"] == "changes" and r["n"]:
            assert r[r["changed"]]["estimate"] <= 0.01, r


def test_there_are_committed_results():
    assert {p.stem for p in SAVED} >= {"microworld", "babi", "published-babi", "published-cotempqa"}


def test_a_source_without_outputs_says_so(workspace):
    options = ("-r", "source", "nowhere", "-p", "n_outputs", "5")
    done = papermill(workspace, "08_stress_the_parser", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads((workspace / "08_stress_the_parser-out.ipynb").read_text())
    text = "".join("".join(o.get("text", "")) for c in out["cells"] for o in c.get("outputs", ()))
    assert re.search("nowhere: no output that can be varied", text)


def test_published_outputs_are_those_that_the_audit_wrote(stress, tmp_path, monkeypatch, example):
    monkeypatch.setattr(tk, "INTERIM", tmp_path)
    monkeypatch.delenv("TRACEKD_DATA_DIR", raising=False)
    assert stress.published_outputs("babi") == []
    row = {"student": "s", "label_file": "all", "line": 1, **dataclasses.asdict(example)}
    rows = [row | {"condition": c, "text": f"text of {c}"} for c in ("vanilla", "correct")]
    tk.write_jsonl(tmp_path / "published" / "babi.jsonl", rows)
    assert stress.published_outputs("babi") == [("text of correct", example, "published")]


def test_outputs_are_read_under_their_protocol(stress, example):
    example = dataclasses.replace(example, dataset="babi", label="counting")
    trace = tk.Trace(label="counting", facts=("Mary took the apple.",))
    text = tk.render_target(example, trace, "published")
    (found,), _ = stress.draw_items([(text, example, "published")], 1)
    assert found.facts == trace.facts and found.protocol == "published"
    kept, verdicts = stress.readings(text, found)
    assert all(kept.values()) and verdicts["lenient"] == (False, True)


def test_only_outputs_of_our_own_have_a_strict_reading():
    for path in SAVED:
        saved = json.loads(path.read_text())
        assert ("strict" in saved["readers"]) is not saved["source"].startswith("published/")
