"""Scores of one output against values worked out by hand."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import notebook_functions
from hypothesis import given
from hypothesis import strategies as st

import tracekd_utils as tk

GOLD = ("Mary took the apple.", "Mary went to the kitchen.")
WRONG = "Mary went to the garden."
KITCHEN = "\n<answer>kitchen</answer>"


def score(example, label="object-place", facts=GOLD, answers=None, layout="before"):
    trace = tk.Trace(label=label, facts=tuple(facts))
    shown = replace(example, answers=answers or example.answers)
    text = tk.render_target(shown, trace)
    return tk.score(tk.parse_output(text, example), example, layout)


def picked(row, fields):
    return {k: row[k] for k in fields}


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {},
            dict(
                parsed_ok=True,
                label_ok=True,
                facts_ok=True,
                trace_ok=True,
                answer_ok=True,
                facts_precision=1,
                facts_recall=1,
                answer_f1=1,
                trace_ok_strict=True,
                answer_ok_strict=True,
                answer_in_trace=True,
                trace_words=11,
            ),
        ),
        (
            {"label": "size-compare"},
            dict(
                label_ok=False, facts_ok=True, trace_ok=False, answer_ok=True, trace_ok_strict=False
            ),
        ),
        ({"label": "weather"}, dict(parsed_ok=False, label_ok=False, trace_ok=False)),
        (
            {"facts": GOLD[:1]},
            dict(
                facts_precision=1,
                facts_recall=0.5,
                facts_ok=False,
                trace_ok=False,
                answer_in_trace=False,
            ),
        ),
        (
            {"facts": (*GOLD, WRONG)},
            dict(facts_precision=2 / 3, facts_recall=1, facts_ok=False, trace_ok=False),
        ),
        ({"facts": (WRONG,)}, dict(facts_precision=0, facts_recall=0, facts_ok=False)),
        ({"facts": ()}, dict(facts_precision=0, facts_recall=0, facts_ok=False)),
        ({"facts": GOLD * 2}, dict(facts_precision=1, facts_recall=1, facts_ok=True)),
        (
            {"answers": ("garden",)},
            dict(trace_ok=True, answer_ok=False, answer_f1=0, answer_in_trace=False),
        ),
        ({"answers": ("kitchen", "garden")}, dict(answer_ok=False, answer_f1=2 / 3)),
        ({"answers": (" The-Kitchen",)}, dict(answer_ok=True, answer_ok_strict=False)),
        ({"answers": ("KITCHEN ",)}, dict(answer_ok=True, answer_exact=True)),
    ],
)
def test_own_gold(example, change, expected):
    row = score(example, **change)
    assert picked(row, expected) == pytest.approx(expected)


def test_each_item_is_scored_against_its_own_gold(example):
    other = replace(example, id="microworld/test/y", label="person-place", gold_facts=GOLD[1:])
    parsed = tk.parse_output(
        tk.render_target(example, tk.Trace(label="object-place", facts=GOLD)), example
    )
    assert tk.score(parsed, example)["trace_ok"] is True
    assert picked(tk.score(parsed, other), ("label_ok", "facts_ok")) == {
        "label_ok": False,
        "facts_ok": False,
    }


@pytest.mark.parametrize(
    "cited, counts",
    [
        ("mary  TOOK the apple", True),
        ("Mary took apple.", True),
        ("Mary took the the apple.", False),
        ("John took the apple.", False),
        ("Mary took the ball.", False),
        ("Mary took the apple and the ball.", False),
        ("took the", False),
    ],
)
def test_which_wording_counts_as_the_fact(example, cited, counts):
    assert score(example, facts=(cited, GOLD[1]))["facts_ok"] is counts


@pytest.mark.parametrize(
    "cited, counts",
    [
        ("John did not take the ball.", True),
        ("John did take the ball.", False),
        ("John not take the ball.", True),
    ],
)
def test_a_dropped_negation_is_another_fact(example, cited, counts):
    item = replace(example, gold_facts=("John did not take the ball.",))
    assert score(item, facts=(cited,))["facts_ok"] is counts


def test_a_cut_word_that_fits_two_facts_stands_for_neither(example):
    item = replace(
        example,
        facts=("Mary took the red apple.", "Mary took the green apple."),
        gold_facts=("Mary took the red apple.",),
    )
    assert score(item, facts=("Mary took the apple.",))["facts_ok"] is False


TRACE_FIELDS = (
    "label_ok",
    "facts_ok",
    "trace_ok",
    "facts_precision",
    "facts_recall",
    "answer_in_trace",
    "trace_words",
    "trace_ok_strict",
)


def test_a_missing_trace_is_wrong_where_one_is_asked_for(example):
    parsed = tk.parse_output("<answer>kitchen</answer>", example)
    row = tk.score(parsed, example, "before")
    assert picked(
        row, ("label_ok", "facts_ok", "trace_ok", "answer_ok", "parsed_ok", "answer_ok_strict")
    ) == {
        "label_ok": False,
        "facts_ok": False,
        "trace_ok": False,
        "answer_ok": True,
        "parsed_ok": False,
        "answer_ok_strict": False,
    }


def test_a_missing_trace_is_wrong_even_where_no_fact_is_gold(example):
    row = tk.score(
        tk.parse_output("<answer>kitchen</answer>", example),
        replace(example, gold_facts=()),
        "before",
    )
    assert row["trace_ok"] is False


def test_a_trace_is_null_where_none_is_asked_for(example):
    for text in ("<answer>kitchen</answer>", "kitchen", ""):
        row = tk.score(tk.parse_output(text, example), example, "none")
        assert set(picked(row, TRACE_FIELDS).values()) == {None}
        assert row["answer_ok"] is (text != "")
    assert row["parsed_ok"] is False


def test_strict_and_lenient_stand_side_by_side(example):
    text = tk.render_target(example, tk.Trace(label="object-place", facts=GOLD))
    row = tk.score(tk.parse_output(text.replace("</answer>", ""), example), example)
    assert picked(row, ("trace_ok", "trace_ok_strict", "answer_ok", "answer_ok_strict")) == {
        "trace_ok": True,
        "trace_ok_strict": False,
        "answer_ok": True,
        "answer_ok_strict": False,
    }


def test_free_text_is_read_leniently_for_the_scores(example):
    trace = tk.Trace(text="Type: object-place\nFacts:\n- " + "\n- ".join(GOLD))
    parsed = tk.parse_output(tk.render_target(example, trace), example)
    assert parsed.trace == trace and parsed.problems
    assert tk.score(parsed, example)["trace_ok_strict"] is False


@pytest.mark.parametrize("closed", ["</answer>", ""], ids=["closed", "open"])
@pytest.mark.parametrize(
    "text, right",
    [
        ("ball; apple", True),
        ("ball, apple", True),
        ("apple", False),
        ("ball; apple; ", True),
        ("apple and ball", True),
        ("apple; ball; cup", False),
        ("apple; apple; ball", True),
    ],
)
def test_answers_are_a_set_however_they_are_joined(example, text, right, closed):
    item = replace(example, answers=("apple", "ball"))
    row = tk.score(tk.parse_output(f"<answer>{text}{closed}", item), item)
    assert row["answer_ok"] is right


@pytest.mark.parametrize(
    "answer, ok, exact, f1",
    [
        ("the Eiffel Tower in Paris", True, False, 2 * 2 / (5 + 3)),
        ("about 330 metres", True, True, 1.0),
        ("330", True, False, 0.5),
        ("Rome", False, False, 0.0),
    ],
)
def test_marco_takes_the_best_of_alternative_answers(answer, ok, exact, f1):
    item = tk.Example(
        id="m",
        dataset="marco",
        split="test",
        question="?",
        facts=("f",),
        label="NUMERIC",
        gold_facts=("f",),
        answers=("About 330 metres.", "in Paris today"),
    )
    row = tk.score(tk.parse_output(f"<answer>{answer}</answer>", item), item)
    assert (row["answer_ok"], row["answer_exact"]) == (ok, exact)
    assert row["answer_f1"] == pytest.approx(f1)


def test_token_f1_by_hand():
    assert tk.token_f1("a b c", "b c d e") == pytest.approx(2 * 2 / (3 + 4))
    assert tk.token_f1("a a", "a") == pytest.approx(2 / 3)
    assert tk.token_f1("", "a") == tk.token_f1("a", "") == 0.0


@given(
    order=st.permutations(("Mary took the apple.", "Mary went to the kitchen.", WRONG)),
    story=st.permutations(range(4)),
    answers=st.permutations(("apple", "ball", "cup")),
)
def test_order_of_facts_and_answers_never_counts(order, story, answers):
    facts = (*GOLD, WRONG, "John did not take the ball.")
    base = tk.Example(
        id="x",
        dataset="microworld",
        split="test",
        question="?",
        facts=facts,
        label="object-place",
        gold_facts=GOLD,
        answers=("ball", "cup", "apple"),
    )
    moved = replace(base, facts=tuple(facts[i] for i in story), gold_facts=GOLD[::-1])
    row = score(moved, facts=order, answers=tuple(answers))
    assert row == score(base, facts=(*GOLD, WRONG), answers=base.answers)
    assert row["facts_precision"] == pytest.approx(2 / 3) and row["answer_ok"]


@given(st.text(max_size=80))
def test_json_of_scores_holds_no_nan(text):
    for gold in (("f",), ()):
        e = tk.Example(
            id="x",
            dataset="babi",
            split="test",
            question="?",
            facts=("f",),
            label="counting",
            gold_facts=gold,
            answers=("a",),
        )
        for layout in (None, "before", "none"):
            json.dumps(tk.score(tk.parse_output(text, e), e, layout), allow_nan=False)


def test_speed_of_parsing_and_scoring(corrupter, microworld, record_property):
    pool = corrupter.Pool(microworld)
    pairs = [
        (tk.render_target(e, corrupter.make_trace(e, c, pool)), e)
        for e in microworld
        for c in ("correct", "incorrect", "vanilla")
    ] * 4
    begun = time.process_time()
    for text, e in pairs:
        tk.score(tk.parse_output(text, e), e)
    rate = len(pairs) / (time.process_time() - begun)
    record_property("outputs_per_second", round(rate))
    print(f"{rate:.0f} outputs/s")
    assert rate >= 5_000


@pytest.mark.parametrize(
    "text, layout, expected",
    [
        ("ab<think>cde</think><answer>f</answer>", "before", 20),  # through the closing tag
        ("<answer>f</answer><think>cde</think>", "after", 18),  # the answer is no trace
        ("<answer>f</answer>", "none", None),
        ("<think>never closed", "before", 19),  # all that was written
        ("<think>no answer before</think>", "after", 0),
    ],
)
def test_tokens_of_a_trace_leave_out_an_answer_before_it(text, layout, expected):
    trace_tokens = notebook_functions("04_score_outputs").trace_tokens
    letters = SimpleNamespace(decode="".join)  # a token is a letter
    assert trace_tokens(letters, list(text), layout) == expected


def test_a_condition_without_facts_has_no_trace_scores(example):
    text = tk.render_target(example, tk.Trace(text="... ... ..."))
    row = tk.score(tk.parse_output(text, example), example, "before", has_facts=False)
    described = ("trace_words", "answer_in_trace")
    nulled = [field for field in TRACE_FIELDS if field not in described]
    assert {row[field] for field in (*nulled, "quadrant")} == {None}
    assert picked(row, described) == {"trace_words": 0, "answer_in_trace": False}
    assert row["answer_ok"] is True


@pytest.mark.parametrize(
    "facts, answers, expected",
    [
        (GOLD, ("kitchen",), "TP"),
        ((WRONG,), ("kitchen",), "FP"),
        (GOLD, ("garden",), "FN"),
        ((WRONG,), ("garden",), "TN"),
    ],
)
def test_quadrant_names_trace_and_answer(example, facts, answers, expected):
    row = score(example, facts=facts, answers=answers)
    assert row["quadrant"] == expected == tk.quadrant(row["trace_ok"], row["answer_ok"])
