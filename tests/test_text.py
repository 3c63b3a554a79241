"""Writing and reading of the task's text: round trip, lenient reading, hostile outputs."""

import json
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekd_utils as tk

# what breaks grammars: separators, tags, escapes, other scripts, control characters
PIECES = (
    ";",
    "; ",
    "\n",
    "\r",
    "\\",
    "\\u003b",
    "\\u",
    "<",
    ">",
    "<think>",
    "</think>",
    "</answer>",
    "\n- ",
    "Facts:",
    "Question type: ",
    "[",
    "'",
    "İ",
    "ﬁ",
    "漢字",
    "עב",
    "\x00",
    "\x85",
    "\u2028",
    "e\u0301",
    "\U0001f600",
    " ",
    "a",
)
CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.lists(
    st.sampled_from(PIECES), max_size=8
).map("".join)
ANSWERS = st.lists(CONTENT.filter(str.strip), min_size=1, max_size=3).map(tuple)
TRACES = st.builds(
    tk.Trace, label=CONTENT, facts=st.lists(CONTENT, max_size=4).map(tuple)
) | st.builds(tk.Trace, text=CONTENT)


@pytest.mark.parametrize("condition", tk.conditions())
@pytest.mark.parametrize("dataset", ["microworld", "babi"])
def test_round_trip_of_every_example(corrupter, request, dataset, condition):
    examples = request.getfixturevalue(dataset)
    examples = [
        e
        for e in (examples[0] if dataset == "babi" else examples)
        if len(corrupter.non_gold_facts(e)) >= len(set(e.gold_facts))
    ]
    pool, layout = corrupter.Pool(examples), corrupter.CONDITIONS[condition].layout
    for e in examples[:: 1 if condition in ("correct", "incorrect", "vanilla") else 5]:
        trace = corrupter.make_trace(e, condition, pool)
        parsed = tk.parse_output(tk.render_target(e, trace, layout=layout), e)
        assert (parsed.trace, parsed.answers) == (trace, e.answers), e.id
        free = trace is not None and trace.text is not None
        assert parsed.problems == (("no list of facts",) if free else ()), e.id
        assert parsed.layout == layout, e.id


@settings(max_examples=600)
@given(trace=TRACES, answers=ANSWERS, layout=st.sampled_from(("before", "after")))
def test_round_trip_of_any_content(trace, answers, layout):
    e = tk.Example(
        id="x",
        dataset="microworld",
        split="test",
        question="?",
        facts=("f",),
        label="size-compare",
        gold_facts=("f",),
        answers=answers,
    )
    parsed = tk.parse_output(tk.render_target(e, trace, layout=layout), e)
    assert (parsed.trace, parsed.answers, parsed.layout) == (trace, answers, layout)
    alone = tk.parse_output(tk.render_target(e, None), e)
    assert (alone.trace, alone.answers, alone.layout) == (None, answers, "none")


@given(facts=st.lists(CONTENT, min_size=1, max_size=4), question=CONTENT)
def test_a_fact_stays_on_its_line_of_the_prompt(facts, question):
    e = tk.Example(
        id="x",
        dataset="babi",
        split="test",
        question=question,
        label="counting",
        facts=tuple(facts),
        gold_facts=(),
        answers=("a",),
    )
    lines = tk.render_prompt(e).split("\n")
    assert len(lines) == len(facts) + 3 and lines[-2].startswith("Question: ")


def test_the_untuned_student_is_told_format_and_labels(example):
    text = tk.render_prompt(example, direct=True)
    assert text.startswith(tk.render_prompt(example))
    assert all(word in text for word in (*tk.dataset("microworld").labels, "<think>", "</answer>"))


def test_the_other_protocol_is_refused_and_not_ignored(example):
    for call in (
        lambda: tk.render_prompt(example, "publishd"),
        lambda: tk.render_target(example, None, "publishd"),
        lambda: tk.parse_output("", example, "publishd"),
    ):
        with pytest.raises(ValueError, match="publishd.*controlled"):
            call()


FACTS = ("Mary took the apple.", "Mary went to the kitchen.")
BULLETS = "Facts:\n- Mary took the apple.\n- Mary went to the kitchen."
TRACE = f"<think>Question type: object-place\n{BULLETS}</think>"


@pytest.mark.parametrize(
    "output, label, facts, answers",
    [
        (f"{TRACE}\n<answer>kitchen", "object-place", FACTS, ("kitchen",)),
        (f"{TRACE}<answer>kitchen</answer>", "object-place", FACTS, ("kitchen",)),
        (f"{TRACE} kitchen", "object-place", FACTS, ("kitchen",)),
        (f"{TRACE}\nThe final answer is: kitchen", "object-place", FACTS, ("kitchen",)),
        (TRACE, "object-place", FACTS, None),
        (f"{TRACE}\n<answer></answer>", "object-place", FACTS, None),
        (f"{TRACE}\n<answer>a</answer>\n<answer>b</answer>", "object-place", FACTS, ("a",)),
        (
            f"Question type: object-place\n{BULLETS}</think>\nkitchen",
            "object-place",
            FACTS,
            ("kitchen",),
        ),
        (
            f"< Think >QUESTION TYPE: Object Place\n{BULLETS}</ THINK >\n<Answer>kitchen</Answer>",
            "object-place",
            FACTS,
            ("kitchen",),
        ),
        (
            "<think>Type: **object_places**\nFacts:\n1. Mary took the apple.\n2) Mary went to the "
            "kitchen.</think><answer>`kitchen`</answer>",
            "object-place",
            FACTS,
            ("kitchen",),
        ),
        (
            "<think>Type: object-place\nFacts: ['Mary took the apple.', \"Mary went to the "
            "kitchen.\"]</think><answer>['kitchen', \"it's\"]</answer>",
            "object-place",
            FACTS,
            ("kitchen", "it's"),
        ),
        (
            "<reasoning>Label: weather\nEvidence: Mary took the apple. Mary went to the kitchen."
            "</reasoning><answer>apple, ball and cup</answer>",
            "weather",
            FACTS,
            ("apple", "ball", "cup"),
        ),
        (
            "<think>This is about an object place.\n* Mary took the apple.\n• Mary went to the "
            "kitchen.</think><answer>a；b</answer>",
            "object-place",
            FACTS,
            ("a", "b"),
        ),
        ("<answer>; </answer>", None, None, None),
        ("kitchen", None, None, ("kitchen",)),
        ("Answer: kitchen", None, None, ("kitchen",)),
        ("<answer>kitchen", None, None, ("kitchen",)),
        ("", None, None, None),
        ("   \n\t", None, None, None),
    ],
)
def test_lenient_reading(example, output, label, facts, answers):
    parsed = tk.parse_output(output, example)
    assert parsed.problems and parsed.answers == answers
    trace = parsed.trace or tk.Trace(label=None, facts=None)
    assert (trace.label, trace.facts) == (label, facts)


def test_an_unknown_label_is_read_and_reported(example):
    text = tk.render_target(example, tk.Trace(label="weather", facts=FACTS))
    parsed = tk.parse_output(text, example)
    assert parsed.trace == tk.Trace(label="weather", facts=FACTS) and parsed.problems


def test_the_parser_never_looks_at_the_gold(example):
    other = replace(
        example,
        label="size-compare",
        gold_facts=(example.facts[0],),
        answers=("office",),
        question="Who?",
    )
    for text in (f"{TRACE}\n<answer>kitchen</answer>", f"{TRACE} kitchen", "kitchen"):
        assert tk.parse_output(text, example) == tk.parse_output(text, other)


def mutate(text, rng):
    """One random departure from the grammar."""
    at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    junk = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 6)))
    return rng.choice(
        (
            lambda: text[:at],
            lambda: text[at:],
            lambda: text[:at] + text[to:],
            lambda: text[:at] + junk + text[at:],
            lambda: text[:to] + text[at:],
            lambda: text * rng.randrange(2, 4),
            lambda: text[::-1],
            lambda: f"<think>{text}</think>",
            lambda: f"<answer>{text}</answer>",
            lambda: text.replace("\n", rng.choice(PIECES)),
            lambda: text.swapcase(),
            lambda: "".join(
                chr(
                    rng.choice((0, 7, 27, 0x5D0, 0x4E00, 0xFFFE, 0x1F600))
                    if rng.random() < 0.2
                    else ord(c)
                )
                for c in text
            ),
        )
    )()


def test_twenty_thousand_fuzzed_outputs_are_read_and_scored(corrupter, microworld):
    rng, pool, readable = random.Random(0), corrupter.Pool(microworld), 0
    for i in range(20_000):
        e = microworld[i % len(microworld)]
        rule = rng.choice(tk.conditions())
        text = tk.render_target(
            e, corrupter.make_trace(e, rule, pool), layout=rng.choice(("before", "after"))
        )
        for _ in range(rng.randrange(1, 5)):
            text = mutate(text, rng)
        parsed = tk.parse_output(text, e)
        row = tk.score(parsed, e, corrupter.CONDITIONS[rule].layout)
        json.dumps(row, allow_nan=False)
        assert parsed.answers is None or any(parsed.answers), text
        assert parsed.answers is not None or not row["answer_ok"], text
        readable += parsed.answers is not None
    assert 5_000 < readable < 19_900


LONG = {
    "open angles": "<",
    "open brackets": "[",
    "bullets": "- ",
    "line breaks": "\n",
    "spaces": " ",
    "open tags": "<think>",
    "closing tags": "</think>",
    "nested tags": "<think><answer>",
    "answers": "<answer>a; ",
    "cues": "answer type fact ",
    "quotes": "'a'",
    "escapes": "\\'",
    "sentences": ". ",
    "controls": "\x00\x1b",
    "ligatures": "\ufdfa",
    "marks": "\u0301\u0316",
    "short lines": "b\n",
    "right to left": "ע",
}


@pytest.mark.parametrize(
    "start", ["", "<think>Type: x\nFacts:\n- a\n", "<think>Facts: ['", "<answer>['"]
)
@pytest.mark.parametrize("piece", LONG.values(), ids=LONG)
def test_a_hundred_thousand_characters_take_under_a_tenth_of_a_second(example, start, piece):
    text, taken = start + piece * (100_000 // len(piece)), []
    for _ in range(3):  # of a busy machine the quietest moment
        begun = time.process_time()
        tk.score(tk.parse_output(text, example), example)
        taken.append(time.process_time() - begun)
    assert min(taken) < 0.1
