"""Every word of an output is accounted for: dresses stay right, hedges do not, in linear time."""

import json
import time
from dataclasses import replace

import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekd_utils as tk

BULLETS = "Facts:\n- Mary took the apple.\n- Mary went to the kitchen."
THOUGHT = f"<think>Question type: object-place\n{BULLETS}</think>"
PERFECT = f"{THOUGHT}\n<answer>kitchen</answer>"


def item(**changes):
    return replace(EXAMPLE, **changes)


def score(text, example=EXAMPLE, protocol="controlled", layout=None):
    return tk.score(tk.parse_output(text, example, protocol), example, layout)


def scores(text, **options):
    row = score(text, layout="before", **options)
    return row["label_ok"], row["facts_ok"], row["answer_ok"]


def published(answer, trace=None):
    """A target of the paper with another answer text."""
    text = tk.render_target(EXAMPLE, trace, "published")
    return text.replace("kitchen</answer>", f"{answer}</answer>") if trace else answer


# ------------------------------------------------------------------------------- answers

DRESSES = [
    "kitchen",
    "the kitchen",
    "A kitchen.",
    "**Kitchen**",
    r"\boxed{kitchen}",
    r"$\boxed{\text{kitchen}}$.",
    r"The answer is $\boxed{kitchen}$",
    "The answer is kitchen.",
    "The answer is: kitchen",
    "So the final answer is **kitchen**.",
    "The answer to the question is the kitchen.",
    "Answer: kitchen",
    "**Final answer:** kitchen",
    "Answer:\n- kitchen",
    "- kitchen",
    "['kitchen']",
    '["kitchen"].',
    "[kitchen]",
    '{"answer": "kitchen"}',
    "{'final_answer': 'kitchen'}",
    '{"answer": ["kitchen"]}',
    '```json\n{"answer": "kitchen"}\n```',
    "kitchen is the answer.",
    "It is in the kitchen.",
    "“kitchen”",
]
HEDGES = [
    "kitchen or garden",
    "not kitchen",
    "maybe kitchen",
    "kitchen, garden",
    "kitchen and the garden",
    "kitchen; garden",
    "kitchen\nor garden",
    "kitchen (or the garden)",
    "kitchen. Not the garden.",
    "['kitchen'] or maybe",
    "['kitchen'] no",
    "[school, 'kitchen']",
    "['kitchen', school]",
    "- kitchen\n- yes",
    "neither:\n- kitchen",
    "The answer is not kitchen",
    "The answer is: kitchen\nor garden",
    "The wrong answer is: kitchen",
    "It is false that the answer is kitchen",
    r"\boxed{kitchen} or \boxed{garden}",
    '{"answer": "kitchen", "or": "garden"}',
    '{"answer": "kitchen"} or garden',
    "Answer:\n- kitchen\n- garden",
    "kitchen is not the answer.",
    "It is not in the kitchen.",
]
PLACES = {
    "bare": "{}",
    "tags": "<answer>{}</answer>",
    "open": "<answer>{}",
    "behind a thought": THOUGHT + "\n{}",
    "target": THOUGHT + "\n<answer>{}</answer>",
}


@pytest.mark.parametrize("protocol", tk.PROTOCOLS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("answer", DRESSES)
def test_a_right_answer_in_another_dress_is_right(answer, place, protocol):
    row = score(place.format(answer) if "{}" in place else place, protocol=protocol)
    assert row["answer_ok"] is True, row
    # strictly it is the answer alone, but for marks that normalisation drops
    assert row["answer_ok_strict"] <= (tk.normalise(answer) == "kitchen")


@pytest.mark.parametrize("protocol", tk.PROTOCOLS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("answer", HEDGES)
def test_a_hedge_a_list_or_a_negation_is_not_right(answer, place, protocol):
    row = score(place.format(answer), protocol=protocol)
    assert row["answer_ok"] is row["answer_ok_strict"] is False, row


@pytest.mark.parametrize("answer", HEDGES)
def test_the_strict_reading_of_published_takes_no_hedge(answer):
    trace = tk.Trace(label=EXAMPLE.label, facts=EXAMPLE.gold_facts)
    for text in (published(answer), published(answer, trace)):
        row = score(text, protocol="published")
        assert row["answer_ok"] is row["answer_ok_strict"] is False, row


@pytest.mark.parametrize(
    "text",
    [
        "<answer>kitchen</answer> or garden",
        "<answer>kitchen</answer>\nor maybe the garden",
        "It is not <answer>kitchen</answer>",
        "<answer>kitchen</answer>, not the garden",
        "maybe <answer>kitchen</answer>",
    ],
)
def test_a_hedge_beside_the_tags_belongs_to_the_answer(text):
    row = score(text)
    assert row["answer_ok"] is False and "hedge beside the answer" in row["problems"]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("The answer is: kitchen\nor garden", "hedge in the answer"),
        ("['kitchen'] so", "words beside the list of answers"),
        ("<answer>['kitchen'] so</answer>", "words beside the list of answers"),
        ("<answer>kitchen or garden</answer>", "hedge in the answer"),
        (THOUGHT.replace("Facts:", "Facts: all but:"), "words beside the list of facts"),
        (f"Question type: not object-place\n{BULLETS}</think>\nkitchen", "words beside the label"),
        ("<answer>garden</answer><answer>kitchen</answer>", "different answers"),
    ],
)
def test_what_is_left_over_is_named(text, problem):
    assert problem in score(text)["problems"]


WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=8)


@settings(max_examples=150)
@given(
    dress=st.sampled_from([d for d in DRESSES if "\n" not in d]),
    word=WORDS.filter(lambda w: w != "and" and tk.lesson("38_read_pieces").words_left(w)),
    behind=st.booleans(),
)
def test_one_more_word_beside_an_answer_makes_it_wrong(dress, word, behind):
    text = f"{dress} {word}" if behind else f"{word} {dress}"
    for place in ("{}", "<answer>{}</answer>", THOUGHT + "\n<answer>{}</answer>"):
        for protocol in tk.PROTOCOLS:
            assert score(place.format(text), protocol=protocol)["answer_ok"] is False, text


@settings(max_examples=150)
@given(st.text(max_size=60), st.sampled_from(tk.PROTOCOLS), st.booleans())
def test_strictly_right_is_leniently_right_and_nothing_raises(text, protocol, tagged):
    gold = item(answers=tuple(a for a in text.split(";") if a.strip()) or ("x",))
    for output in (text, f"<answer>{text}</answer>" if tagged else f"{THOUGHT}\n{text}"):
        row = score(output, gold, protocol)
        assert row["answer_ok_strict"] <= row["answer_ok"]
        assert (row["trace_ok_strict"] or False) <= (row["trace_ok"] or False)
        json.dumps(row, allow_nan=False)


# ------------------------------------------------------------- numbers, order, alternatives


@pytest.mark.parametrize(
    "gold, said, right",
    [
        ("1,000", "1000", True),
        ("1,000", "1,000.", True),
        ("1,000", "2,000", False),
        ("1,000", "1", False),
        ("1,234,567", "1234567", True),
        ("3.5", "5.3", False),
        ("3.5", "35", False),
        ("3.5", "The answer is 3.5.", True),
        ("-2", "2", False),
        ("-2", "-2", True),
        ("-2", "−2", True),
        ("1/2", "2/1", False),
        ("1/2", "½", True),
        ("10:30", "30:10", False),
        ("two", "2", True),
        ("2", "Two.", True),
        ("three", "2", False),
        ("none", "0", True),
        ("twelve", "12", True),
    ],
)
def test_numbers_are_whole(gold, said, right):
    for text in (said, f"<answer>{said}</answer>", f"{THOUGHT}\n<answer>{said}</answer>"):
        assert score(text, item(answers=(gold,)))["answer_ok"] is right


def test_the_comma_of_a_number_separates_no_answers():
    two = item(answers=("apple", "1,000"))
    for text in ("1,000, apple", "apple and 1,000", "apple,1,000", "1000; apple"):
        assert score(text, two)["answer_ok"] is True, text


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_two_numbers_are_one_if_their_values_are(first, second):
    for form in ("{}", "{:,}"):
        same = tk.normalise(f"{first}") == tk.normalise(form.format(second))
        assert same is (first == second)


@pytest.mark.parametrize("form", ["{}, {}", "{}; {}", "{},{}", "['{}', '{}']", "{}, then {}"])
@pytest.mark.parametrize("tags", ["{}", "<answer>{}</answer>"])
def test_a_path_is_a_sequence(form, tags):
    path = item(dataset="babi20", label="path-finding", answers=("s", "e"))
    assert score(tags.format(form.format("s", "e")), path)["answer_ok"] is True
    assert score(tags.format(form.format("e", "s")), path)["answer_ok"] is False
    assert score(tags.format("s"), path)["answer_ok"] is False
    twice = replace(path, answers=("s", "s"))
    assert score(tags.format("s"), twice)["answer_ok"] is False
    assert score(tags.format(form.format("s", "s")), twice)["answer_ok"] is True


def test_real_paths_reversed_or_halved_are_wrong(babi):
    paths = [e for e in babi[0] if e.label == "path-finding"][:200]
    for e in paths:
        whole = tk.render_target(e, None)
        assert score(whole, e)["answer_ok"] is True
        turned = replace(e, answers=e.answers[::-1])
        right = e.answers == turned.answers
        assert score(tk.render_target(turned, None), e)["answer_ok"] is right
        half = tk.render_target(replace(e, answers=e.answers[:1]), None)
        assert score(half, e)["answer_ok"] is False
    assert len(paths) == 200


def test_alternatives_have_an_exact_match_and_a_hedge_is_named():
    gold = item(dataset="marco", label="NUMERIC", answers=("about 330 metres",))
    row = score("<answer>about 330 metres or 400</answer>", gold)
    assert row["answer_ok"] is True and row["answer_exact"] is False
    assert "hedge in the answer" in row["problems"]
    assert score("<answer>5.3</answer>", replace(gold, answers=("3.5",)))["answer_f1"] == 0
    assert score("2", replace(gold, answers=("two",)))["answer_exact"] is True


# -------------------------------------------------------------------------- scope of tags

QUOTED = "<think>Question type: the type\nFacts:\n- a fact</think>\n<answer>the answer</answer>"


@pytest.mark.parametrize("protocol", tk.PROTOCOLS)
@pytest.mark.parametrize(
    "start",
    [
        "",
        "<think>\n\n</think>\n\n",
        "<think></think>",
        f"<think>I am asked for {QUOTED}. So be it.</think>\n",
        f"I am asked for {QUOTED}. So be it.</think>\n\n",
        "<think>Is it <answer>garden</answer>? no.</think>",
        "<think>The apple was taken, so it is in the kitchen or not.</think>\n\n",
        "<think>Question type: person-place\nFacts:\n- Mary went to the garden.</think>\n",
    ],
)
def test_what_is_thought_before_loses_nothing(start, protocol):
    assert scores(start + PERFECT, protocol=protocol) == (True, True, True)


@pytest.mark.parametrize(
    "text, answers",
    [
        ("<think>Is it <answer>garden</answer>? no.</think><answer>kitchen</answer>", "kitchen"),
        ("<think>Is it <answer>garden</answer>? no.</think>kitchen", "kitchen"),
        ("<think>Is it <answer>garden</answer>? no.</think>", None),
        ("<answer>kitchen</answer>\n<think>or <answer>garden</answer>?</think>", "kitchen"),
        (f"{THOUGHT}<answer>kitchen</answer>{THOUGHT}<answer>garden</answer>", "garden"),
        (f"{THOUGHT}<answer>kitchen</answer><answer>garden</answer>", "kitchen"),
        (f"{THOUGHT}<answer></answer><answer>garden</answer>", "garden"),
        ("<think>It is <answer>kitchen</answer></think>", "kitchen"),
        (f"{THOUGHT}\nQuestion type: object-place\n{BULLETS}", None),
        (f"{THOUGHT}\nQuestion type: object-place\n{BULLETS}\nAnswer: kitchen", "kitchen"),
    ],
)
def test_which_answer_counts(text, answers):
    parsed = tk.parse_output(text, EXAMPLE)
    assert parsed.answers == (answers and (answers,))


def test_different_answers_are_counted():
    twice = f"{PERFECT}<answer>kitchen</answer>"
    assert "different answers" not in score(twice)["problems"]
    assert (
        "different answers" in score(twice.replace("kitchen</answer>", "a</answer>", 1))["problems"]
    )


# ------------------------------------------------------------------------ labels and facts


@pytest.mark.parametrize("protocol", tk.PROTOCOLS)
@pytest.mark.parametrize(
    "label, right",
    [
        ("object-place", True),
        ("**Object place**.", True),
        ("object-places", True),
        ("this is about object place, I think", True),
        ("the type is object-place", True),
        ("not object-place", False),
        ("object-place or person-place", False),
        ("object-place, person-place", False),
        ("object-place\nor person-place", False),
        ("maybe object-place", False),
        ("anything but object-place", False),
    ],
)
def test_a_label_is_all_that_its_line_says(label, right, protocol):
    text = PERFECT.replace("object-place", label)
    assert scores(text, protocol=protocol) == (right, True, True)


@pytest.mark.parametrize(
    "trace, right",
    [
        ("It is about an object place.", True),
        ("Where is the object place that Mary went to?", False),
        ("the place object-place took Question", False),
        ("Not the question type: object-place", False),
    ],
)
def test_a_label_that_is_only_mentioned_is_none(trace, right):
    assert score(f"<think>{trace}</think>kitchen", layout="before")["label_ok"] is right


def test_the_during_of_an_echoed_question_is_no_label():
    e = item(dataset="cotempqa", label="during", answers=("x",))
    for text in ("While A was B, who was C during the same time span?\n\nAnswer: x", "during\nB"):
        assert score(text, e, layout="before")["label_ok"] is False
    assert score("<think>during</think>x", e, layout="before")["label_ok"] is True


GOLD = EXAMPLE.facts[1:3]
LISTS = {
    "bullets": "\n- {}\n- {}",
    "stars": "\n* {}\n* {}",
    "numbers": "\n1. {}\n2) {}",
    "python": " ['{}', '{}']",
    "json": '\n[\n "{}",\n "{}"\n]',
    "bare list": " [{}, {}]",
    "curly": " [‘{}’, ‘{}’]",
    "sentences": " {} {}",
    "lines": "\n{}\n{}",
}
BESIDE = ["all facts but:{}", "none of these:{}", "John did not take the ball.{}", "{}\n- no"]
BESIDE += ["{} and another fact.", "{}\n- John did not take the ball.", "not{}"]


@pytest.mark.parametrize("facts", LISTS.values(), ids=LISTS)
def test_every_word_of_a_list_is_accounted_for(facts):
    listed = facts.format(*GOLD)
    start, end = "<think>Question type: object-place\nFacts:", "</think><answer>kitchen</answer>"
    assert scores(f"{start}{listed}{end}") == (True, True, True)
    assert scores(f"{start[:7]}{start[-6:]}{listed}\n{start[7:-7]}{end}") == (True, True, True)
    for beside in BESIDE:
        assert scores(f"{start} {beside.format(listed)}{end}") == (True, False, True), beside
    wrong = start.replace("Facts", "Facts that are not needed")
    assert scores(f"{wrong}{listed}{end}") == (True, False, True)


@pytest.mark.parametrize("protocol", tk.PROTOCOLS)
@pytest.mark.parametrize("mark", ["'", "’"])
def test_apostrophes_do_not_break_lists(mark, protocol):
    college, girls = f"St John{mark}s College", f"the girls{mark} school"
    facts = (f"A works for {college}.", f"B attended {girls} in 1999.")
    e = item(dataset="cotempqa", label="mix", facts=facts, gold_facts=facts, answers=(college,))
    text = (
        f"<think>Question type: mix\nFacts: ['{facts[0]}', '{facts[1]}']</think>"
        f"<answer>['{college}']</answer>"
    )
    assert scores(text, example=e, protocol=protocol) == (True, True, True)


def test_a_bulleted_list_under_published_is_a_list():
    assert scores(PERFECT, protocol="published") == (True, True, True)
    one_more = PERFECT.replace("</think>", "\n- Mary went to the garden.</think>")
    assert scores(one_more, protocol="published") == (True, False, True)


@pytest.mark.parametrize(
    "gold, cited, right",
    [
        ("Yesterday Bill went to the school.", "Bill went to the school.", False),
        ("Bill went back to the school.", "Bill went to the school.", False),
        ("Bill went to the school.", "Bill went to school.", True),
        ("Bill is in the school.", "Bill in the school.", True),
        ("A works for Maersk Line.", "A works for Maersk.", False),
        ("Bill never went to school.", "Bill went to school.", False),
    ],
)
def test_a_missing_word_is_forgiven_if_it_says_nothing(gold, cited, right):
    e = item(facts=(gold, "Mary slept."), gold_facts=(gold,))
    text = tk.render_target(e, tk.Trace(label=e.label, facts=(cited,)))
    assert score(text, e)["facts_ok"] is right


# ---------------------------------------------------------------------------------- time

UNITS = ["<", "[", "['", "'a', ", '{"answer":', "\\boxed{", "<think>", "</think>a", "\n- a", "1,"]
UNITS += ["<think>a</think>", "<answer>a</answer>", "answer is ", "facts type ", "a; ", "' \"", "}"]
UNITS += ["\u0301\u0316", "\uff9e\u0316", "\ufdfa", "Question type: counting\n", "\\'", " ", "\n"]


@settings(max_examples=60)
@given(
    start=st.sampled_from(["", "<think>Type: x\nFacts: ['", "<answer>", PERFECT[:-9]]),
    pieces=st.lists(st.sampled_from(UNITS), min_size=1, max_size=3),
    name=st.sampled_from(["microworld", "cotempqa"]),
    protocol=st.sampled_from(tk.PROTOCOLS),
)
def test_a_hundred_thousand_characters_take_a_tenth_of_a_second(start, pieces, name, protocol):
    parts = [*pieces, *tk.published_parts(tk.dataset(name))[: len(pieces) - 1]]
    unit, e = "".join(parts), item(dataset=name)
    text = (start + unit * (100_000 // len(unit) + 1))[:100_000]
    taken = []
    for _ in range(3):  # of a busy machine the quietest moment
        begun = time.process_time()
        tk.score(tk.parse_output(text, e, protocol), e, "before")
        taken.append(time.process_time() - begun)
    assert min(taken) < 0.1
