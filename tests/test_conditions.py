"""What the traces of every condition hold, and what their random draws depend on."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from conftest import notebook_functions
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import tracekd_utils as tk

nb = notebook_functions("02_corrupt_traces")


def usable(examples):
    return [e for e in examples if len(nb.non_gold_facts(e)) >= len(set(e.gold_facts))]


@pytest.fixture(scope="module")
def items(microworld):
    return usable(microworld)


@pytest.fixture(scope="module")
def pool(items):
    return nb.Pool(items)


LABELS = tk.dataset("microworld").labels


def test_the_registry_and_the_helper_name_the_same_conditions():
    assert list(nb.CONDITIONS) == tk.conditions()
    assert list(nb.PUBLISHED) == tk.conditions("published") == tk.conditions()[:4]
    for rules in (nb.CONDITIONS, nb.PUBLISHED):
        without = {c for c, r in rules.items() if r.build is None}
        assert without == {c for c, r in rules.items() if r.layout == "none"} == {"vanilla"}
        assert {r.layout for r in rules.values()} <= {"before", "after", "none"}
    assert {c for c, r in nb.CONDITIONS.items() if r.layout == "after"} == {"after_answer"}


def test_a_new_condition_is_one_entry_of_the_registry(items, pool, monkeypatch):
    upper = lambda e, pool, seed: tk.Trace(label=e.label, facts=(e.facts[0].upper(),))  # noqa: E731
    monkeypatch.setitem(nb.CONDITIONS, "loud", nb.Condition(upper, "the case", "the label"))
    e = items[0]
    assert nb.make_trace(e, "loud", pool).facts == (e.facts[0].upper(),)
    assert nb.make_trace(e, "loud", pool, dose=0.0) == nb.make_trace(e, "correct", pool)
    assert nb.CONDITIONS["loud"].layout == "before" and nb.CONDITIONS["loud"].applies(e)


def in_story_order(example, facts):
    return tuple(f for f in example.facts if f in facts)


def test_the_correct_trace_is_the_gold(items, pool):
    for e in items:
        trace = nb.make_trace(e, "correct", pool)
        assert trace == tk.Trace(label=e.label, facts=in_story_order(e, e.gold_facts))
        assert nb.make_trace(e, "vanilla", pool) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_the_incorrect_trace_is_wrong_in_content_and_right_in_form(items, pool, seed):
    for e in items:
        trace = nb.make_trace(e, "incorrect", pool, seed)
        assert trace.label != e.label and trace.label in LABELS
        assert not set(trace.facts) & set(e.gold_facts)
        assert len(trace.facts) == len(set(trace.facts)) == len(set(e.gold_facts))
        assert trace.facts == in_story_order(e, trace.facts)


def test_babi_traces_hold_the_same(babi):
    examples = usable(babi[0])
    study = nb.Pool(examples)
    for e in examples:
        trace = nb.make_trace(e, "incorrect", study)
        assert trace.label != e.label
        assert not set(trace.facts) & set(e.gold_facts)
        assert len(trace.facts) == len(set(e.gold_facts))
    assert len(examples) < len(babi[0])  # items that no condition can take


def test_every_non_gold_fact_is_drawn(items, pool):
    e = next(e for e in items if len(e.gold_facts) == 1)
    drawn = {nb.make_trace(e, "incorrect", pool, seed).facts[0] for seed in range(200)}
    assert drawn == set(nb.non_gold_facts(e))


def test_wrong_labels_are_drawn_by_their_frequency(items):
    counts = dict(zip(LABELS, (40, 400, 200, 100, 60, 200), strict=True))
    study = nb.Pool(replace(items[0], label=k) for k, n in counts.items() for _ in range(n))
    own = "carried-count"
    drawn = Counter(
        nb.make_trace(
            replace(items[0], id=f"x/{i}", label=own, gold_facts=items[0].gold_facts),
            "incorrect",
            study,
        ).label
        for i in range(4000)
    )
    others = [k for k in counts if k != own]
    assert set(drawn) == set(others)
    expected = [4000 * counts[k] / 900 for k in others]
    assert chisquare([drawn[k] for k in others], expected).pvalue > 1e-3
    assert chisquare([drawn[k] for k in others]).pvalue < 1e-10  # and not evenly


def test_a_row_depends_on_itself_alone(items, pool):
    alone = [nb.make_trace(e, "incorrect", pool, 3) for e in items]
    order = list(range(len(items)))
    random.Random(0).shuffle(order)
    shuffled = nb.Pool(items[i] for i in order)
    random.seed(99)
    moved = {i: nb.make_trace(items[i], "incorrect", shuffled, 3) for i in order}
    assert alone == [moved[i] for i in range(len(items))]
    assert alone != [nb.make_trace(e, "incorrect", pool, 4) for e in items]


def test_draws_do_not_depend_on_the_name_of_the_condition(items, pool, monkeypatch):
    monkeypatch.setitem(nb.CONDITIONS, "other", nb.CONDITIONS["incorrect"])
    for dose in (0.4, 1.0):
        for e in items:
            assert nb.make_trace(e, "other", pool, 0, dose) == nb.make_trace(
                e, "incorrect", pool, 0, dose
            )


def test_doses_are_nested_and_are_shares(items, pool):
    full = {e.id: nb.make_trace(e, "incorrect", pool) for e in items}
    before = set()
    for dose in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        traces = {e.id: nb.make_trace(e, "incorrect", pool, 0, dose) for e in items}
        wrong = {e.id for e in items if traces[e.id].label != e.label}
        assert before <= wrong and all(traces[i] == full[i] for i in wrong)
        assert all(
            traces[e.id] == nb.make_trace(e, "correct", pool) for e in items if e.id not in wrong
        )
        assert len(wrong) / len(items) == pytest.approx(dose, abs=0.07)
        before = wrong
    assert len(before) == len(items)


def test_a_dose_touches_no_condition_that_corrupts_nothing(items, pool):
    for e in items[:20]:
        assert nb.make_trace(e, "correct", pool, 0, 0.0) == nb.make_trace(e, "correct", pool)
        assert nb.make_trace(e, "vanilla", pool, 0, 0.0) is None


def test_too_few_other_facts_raise_naming_the_item(items, pool):
    e = replace(items[0], facts=items[0].gold_facts)
    with pytest.raises(ValueError, match=e.id):
        nb.make_trace(e, "incorrect", pool)


def test_a_single_label_leaves_no_wrong_one(items):
    with pytest.raises(ValueError, match=f"{items[0].id}.*label"):
        nb.make_trace(items[0], "incorrect", nb.Pool(items[:1]))


def test_the_conditions_differ_in_truth_and_not_in_number_of_facts(items, pool):
    right, wrong = ([nb.make_trace(e, c, pool) for e in items] for c in ("correct", "incorrect"))
    assert [len(t.facts) for t in right] == [len(t.facts) for t in wrong]
    for traces, truth in ((right, True), (wrong, False)):
        rows = [
            tk.score(tk.parse_output(tk.render_target(e, t), e), e)
            for e, t in zip(items, traces, strict=True)
        ]
        for field in ("label_ok", "facts_ok", "trace_ok"):
            assert {r[field] for r in rows} == {truth}
        assert all(r["answer_ok"] and r["parsed_ok"] for r in rows)


# ------------------------------------------------------------- the registry beyond the first four
MAKES_TRACES = tuple(c for c, r in nb.CONDITIONS.items() if r.build)
CORRUPTS = tuple(c for c, r in nb.CONDITIONS.items() if r.corrupts)
CITES = tuple(c for c in MAKES_TRACES if c not in ("shuffled", "filler"))
NEVER_GOLD = ("incorrect", "wrong_facts", "rule_wrong", "wrong_with_answer", "near_facts")


@pytest.fixture
def trio(example):
    """Three items of three labels; the first is the example worked out by hand."""
    return nb.Pool(
        [
            example,
            replace(
                example,
                id="microworld/test/y",
                question="Where is Mary?",
                label="person-place",
                facts=(
                    "Mary went to the garden.",
                    "The key is in the box.",
                    "Mary went to the cellar.",
                ),
                gold_facts=("Mary went to the cellar.",),
                answers=("cellar",),
            ),
            replace(
                example,
                id="microworld/test/z",
                question="Is the box bigger?",
                label="size-compare",
                facts=("The box is bigger.", "The jar is small.", "The box is blue."),
                gold_facts=("The box is bigger.",),
                answers=("box",),
            ),
        ]
    )


def test_traces_of_one_item_by_hand(example, trio):
    made = {c: nb.make_trace(example, c, trio) for c in MAKES_TRACES}
    gold = ("Mary took the apple.", "Mary went to the kitchen.")
    others = ("Mary went to the garden.", "John did not take the ball.")
    right = tk.Trace(label="object-place", facts=gold)
    assert made["correct"] == made["after_answer"] == made["direct"] == right
    wrong = made["incorrect"].label
    assert made["incorrect"] == tk.Trace(label=wrong, facts=others)
    assert made["wrong_label"] == tk.Trace(label=wrong, facts=gold) and wrong != right.label
    assert made["wrong_facts"] == tk.Trace(label="object-place", facts=others)
    # labels of the pool: object-place, person-place, size-compare; after the apple comes the
    # ball, after the kitchen the ball is taken already and the garden comes round
    assert made["rule_wrong"] == tk.Trace(label="person-place", facts=others)
    # no fact but a gold one holds `kitchen`, none but a gold one `apple`
    assert made["wrong_with_answer"] == made["near_facts"] == made["wrong_facts"]
    assert made["masked"] == replace(
        right, facts=("Mary took the apple.", "Mary went to the [masked].")
    )
    assert made["swapped"] in (
        tk.Trace(label="person-place", facts=("Mary went to the cellar.",)),
        tk.Trace(label="size-compare", facts=("The box is bigger.",)),
    )
    assert sorted(made["shuffled"].text.split()) == sorted(
        [
            "Question",
            "type:",
            "object-place",
            "Facts:",
            "-",
            "Mary",
            "took",
            "the",
            "apple.",
            "-",
            "Mary",
            "went",
            "to",
            "the",
            "kitchen.",
        ]
    )
    # 5 pieces in `Question type: object-place`, with its hyphen 6, `Facts:` 2, two lines of
    # 6 and 7 pieces with dash and full stop, three line breaks
    assert made["filler"].text == " ".join(["..."] * (6 + 2 + 6 + 7 + 3))


def test_the_draws_have_not_moved(trio):
    """Run ids hang on these draws: a change here makes every finished run unfinished."""
    place, person, size = "object-place", "person-place", "size-compare"
    garden, jar, key = ("Mary went to the garden.", "The jar is small.", "The key is in the box.")
    drawn = [nb.make_trace(e, "incorrect", trio, seed) for seed in (0, 1, 2) for e in trio.examples]
    assert [t.label for t in drawn] == [size, size, person, size, size, person, size, place, place]
    assert [t.facts[0] for t in drawn] == [
        garden,
        garden,
        jar,
        garden,
        garden,
        jar,
        garden,
        key,
        jar,
    ]


def test_the_answer_is_masked_as_a_word_and_only_in_facts(example):
    e = replace(
        example,
        facts=("The box is in the boxes.", "A Box, a box.", "One.", "Two."),
        gold_facts=("The box is in the boxes.", "A Box, a box."),
        answers=("box",),
        label="object-place",
    )
    assert nb.masked(e, None, 0).facts == (
        "The [masked] is in the boxes.",
        "A [masked], a [masked].",
    )
    assert nb.is_masked(e) and not nb.is_masked(replace(e, answers=("chest",)))
    yes = replace(e, label="object-place", answers=("place",))
    assert nb.masked(yes, None, 0) == nb.correct(yes, None, 0)
    assert nb.CONDITIONS["masked"].applies(e) and not nb.CONDITIONS["masked"].applies(yes)
    both = replace(e, answers=("box", "the box"))  # the longer one first
    assert nb.masked(both, None, 0).facts[0] == "[masked] is in the boxes."


def test_a_wrong_fact_that_holds_the_answer_is_cited_where_there_is_one(example, trio):
    facts = (*example.facts, "John is in the kitchen.", "John likes kitchens.")
    for i in range(40):
        e = replace(example, id=f"x/{i}", facts=facts)
        wrong, held = (nb.make_trace(e, c, trio) for c in ("wrong_facts", "wrong_with_answer"))
        assert "John is in the kitchen." in held.facts and held.label == e.label
        assert not set(held.facts) & set(e.gold_facts) and len(held.facts) == 2
        assert len(set(held.facts) & set(wrong.facts)) >= 1  # the other one is shared


@pytest.mark.parametrize("seed", [0, 5])
def test_conditions_share_their_wrong_label_and_wrong_facts(items, pool, seed):
    for e in items:
        both, label, facts = (
            nb.make_trace(e, c, pool, seed) for c in ("incorrect", "wrong_label", "wrong_facts")
        )
        assert (label.label, label.facts) == (both.label, nb.cite(e, e.gold_facts))
        assert (facts.label, facts.facts) == (e.label, both.facts)


@pytest.mark.parametrize("condition", NEVER_GOLD)
def test_wrong_facts_are_never_gold_and_as_many(items, pool, condition):
    for e in items:
        trace = nb.make_trace(e, condition, pool)
        assert not set(trace.facts) & set(e.gold_facts)
        assert len(set(trace.facts)) == len(trace.facts) == len(set(e.gold_facts))
        assert trace.facts == in_story_order(e, trace.facts)


def test_the_rule_is_a_permutation_and_the_same_in_every_seed(items, pool):
    to = {e.label: nb.make_trace(e, "rule_wrong", pool, 3).label for e in items}
    assert sorted(to) == sorted(to.values()) and all(a != b for a, b in to.items())
    for e in items:
        assert nb.make_trace(e, "rule_wrong", pool, 3) == nb.make_trace(e, "rule_wrong", pool, 4)


def test_random_traces_are_right_by_chance_alone(items, pool):
    one = next(e for e in items if len(set(e.gold_facts)) == 1)
    n = len(set(one.facts))
    drawn = [nb.make_trace(one, "random_facts", pool, seed) for seed in range(4000)]
    facts = Counter(t.facts for t in drawn)
    assert len(facts) == n and chisquare(list(facts.values())).pvalue > 1e-3
    labels = Counter(t.label for t in drawn)
    expected = [4000 * n / len(items) for n in pool.labels.values()]
    assert chisquare([labels[k] for k in pool.labels], expected).pvalue > 1e-3
    right = [t.facts == tuple(one.gold_facts) for t in drawn]
    hits = [
        t.label == one.label for t, ok in zip(drawn, right, strict=True) if ok
    ]  # independent of it
    p = pool.labels[one.label] / len(items)
    assert abs(sum(hits) / len(hits) - p) < 4 * (p * (1 - p) / len(hits)) ** 0.5


def test_near_facts_are_wrong_and_about_what_is_asked(example, trio):
    facts = (*example.facts, "John took the apple.", "The apple is red.", "Apples grow.")
    for i in range(40):
        e = replace(example, id=f"x/{i}", facts=facts)
        trace = nb.make_trace(e, "near_facts", trio)
        assert trace == tk.Trace(label=e.label, facts=facts[4:6]) and nb.enough_near(e)
    one = replace(example, facts=facts[:5])  # two are needed
    assert nb.near(one) == [facts[4]] and not nb.enough_near(one)
    assert not nb.CONDITIONS["near_facts"].applies(one)
    assert nb.make_trace(one, "near_facts", trio) == nb.make_trace(one, "wrong_facts", trio)
    more = replace(example, facts=(*facts, "The apple is big."))
    drawn = {nb.make_trace(more, "near_facts", trio, seed).facts for seed in range(60)}
    assert len(drawn) == 3  # pairs of three


def test_near_facts_change_what_they_say_they_change(items, pool):
    for e in items:
        trace, asked = nb.make_trace(e, "near_facts", pool), nb.MEASURE.content_words(e.question)
        near = all(asked & nb.MEASURE.content_words(f) for f in trace.facts)
        assert near is nb.CONDITIONS["near_facts"].applies(e) or not near
        if nb.CONDITIONS["near_facts"].applies(e):
            assert near


def test_swapped_traces_are_the_correct_ones_in_another_order(items, pool):
    for seed in (0, 1):
        for split, part in pool.splits.items():
            ring = pool.ring(split, seed)
            assert sorted(d.id for d in ring.values()) == sorted(ring) == [e.id for e in part]
            assert all(donor.id != name for name, donor in ring.items())
            swapped = Counter(nb.make_trace(e, "swapped", pool, seed) for e in part)
            assert swapped == Counter(nb.make_trace(e, "correct", pool) for e in part)
    assert pool.ring("train", 0) != pool.ring("train", 1)


def test_without_an_item_one_other_trace_is_swapped_differently(items, pool):
    for k in (0, 17, -1):
        gone = pool.splits["train"][k].id
        fewer = nb.Pool(e for e in items if e.id != gone)
        before, after = pool.ring("train", 0), fewer.ring("train", 0)
        moved = [name for name in after if after[name] != before[name]]
        assert len(moved) == 1 and before[moved[0]].id == gone
        assert after[moved[0]] == before[gone]
        assert fewer.ring("test", 0) == pool.ring("test", 0)


def test_a_swapped_trace_is_a_correct_one_of_another_item_of_the_split(items, pool):
    traces = {}
    for e in pool.examples:
        traces.setdefault(nb.make_trace(e, "correct", pool), set()).add((e.split, e.id))
    for e in items:
        found = traces[nb.make_trace(e, "swapped", pool)]
        assert any(split == e.split and other != e.id for split, other in found)


def test_words_are_kept_in_shuffled_and_their_number_in_filler(items, pool):
    same = 0
    for e in items:
        right = nb.written(e, nb.make_trace(e, "correct", pool))
        words, dots = (nb.make_trace(e, c, pool).text for c in ("shuffled", "filler"))
        assert sorted(words.split()) == sorted(right.split())
        same += words.split() == right.split()
        assert set(dots) == {".", " "} and pool.count(dots) == pool.count(right)
    assert same < len(items) / 100


@pytest.mark.parametrize("condition", CORRUPTS)
def test_every_corruption_takes_a_nested_dose(items, pool, condition):
    part = items[:120]
    right = {e.id: nb.make_trace(e, "correct", pool) for e in part}
    full = {e.id: nb.make_trace(e, condition, pool) for e in part}
    before = set()
    for dose in (0.0, 0.25, 0.5, 0.75, 1.0):
        made = {e.id: nb.make_trace(e, condition, pool, 0, dose) for e in part}
        share = {i for i in made if tk.stream(0, i, "dose").random() < dose}
        assert all(made[i] == (full if i in share else right)[i] for i in made)
        assert before <= share
        before = share


@pytest.mark.parametrize("condition", MAKES_TRACES)
def test_a_row_of_any_condition_depends_on_itself_alone(items, pool, condition):
    moved = nb.Pool(reversed(items))
    for e in items[::7]:
        assert nb.make_trace(e, condition, pool, 3) == nb.make_trace(e, condition, moved, 3)


@pytest.mark.parametrize(
    "condition",
    [
        c
        for c in CORRUPTS
        if c not in ("wrong_label", "random_facts", "swapped", "shuffled", "masked", "filler")
    ],
)
def test_an_item_with_a_single_fact_is_refused_by_name(example, trio, condition):
    e = replace(example, facts=example.gold_facts[:1], gold_facts=example.gold_facts[:1])
    with pytest.raises(ValueError, match=f"{e.id}.*1 gold and only 0 other"):
        nb.make_trace(e, condition, trio)


def test_an_item_alone_in_its_split_has_no_trace_to_swap(example):
    with pytest.raises(ValueError, match=f"{example.id}.*no other item in test"):
        nb.make_trace(example, "swapped", nb.Pool([example]))


FACT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    str.strip
) | st.sampled_from(
    [
        "a; b",
        "<think>",
        "x\ny",
        "\\u003b",
        "- ",
        "Facts:",
        "[",
        "the kitchen",
        "kitchen;",
        "KITCHEN <answer>",
    ]
)


@settings(max_examples=60)
@given(
    facts=st.lists(FACT, min_size=2, max_size=6, unique=True),
    k=st.integers(1, 3),
    answer=FACT,
    seed=st.integers(0, 9),
)
def test_every_condition_round_trips_on_any_story(facts, k, answer, seed):
    k = min(k, len(facts) // 2)
    story = [
        tk.Example(
            id=f"s/{i}",
            dataset="microworld",
            split="test",
            question="?",
            answers=(answer,),
            label=LABELS[i],
            facts=tuple(facts),
            gold_facts=tuple(facts[:k]),
        )
        for i in range(3)
    ]
    study = nb.Pool(story)
    for condition in MAKES_TRACES:
        layout = nb.CONDITIONS[condition].layout
        trace = nb.make_trace(story[0], condition, study, seed)
        parsed = tk.parse_output(tk.render_target(story[0], trace, layout=layout), story[0])
        assert (parsed.trace, parsed.answers, parsed.layout) == (trace, (answer,), layout)
        assert (parsed.problems == ()) is (condition in CITES)


def test_a_dose_is_a_coin_for_each_row(items):
    drawn = [nb.is_dosed(e, "incorrect", 0, 0.5) for e in items]
    assert drawn == [tk.stream(0, e.id, "dose").random() < 0.5 for e in items]
    assert 0.4 < sum(drawn) / len(drawn) < 0.6
    assert all(nb.is_dosed(e, "incorrect") for e in items)
    assert not any(nb.is_dosed(e, c) for e in items for c in ("correct", "direct"))


def test_checks_of_another_student_do_not_replace_those_that_are_stored(tmp_path):
    here = notebook_functions("02_corrupt_traces", student="org/other")
    same = {"protocol": "controlled", "dose": 1.0, "seed": 0, "rows": {"train": 4}}
    checks = {**same, "student": "org/other"}
    assert here.choose_file(tmp_path, checks) == (tmp_path / "manipulation_checks.json", {})
    stored = {**same, "student": "smollm2-135m", "conditions": {"correct": {}}}
    tk.write_json(tmp_path / "manipulation_checks.json", stored)
    path, kept = here.choose_file(tmp_path, checks)
    assert (path.name, kept) == ("manipulation_checks-org-other.json", {})
    tk.write_json(path, {**checks, "conditions": {"vanilla": {}}})
    assert here.choose_file(tmp_path, checks) == (path, {"vanilla": {}})


def test_checks_of_before_the_upper_share_are_added_to(tmp_path):
    here = notebook_functions("02_corrupt_traces")
    checks = {"protocol": "controlled", "dose": 1.0, "seed": 0, "student": "smollm2-135m"}
    tk.write_json(tmp_path / "manipulation_checks.json", {**checks, "conditions": {"correct": {}}})
    path, kept = here.choose_file(tmp_path, {**checks, "max_share": 1.0})
    assert (path.name, kept) == ("manipulation_checks.json", {"correct": {}})
    other = notebook_functions("02_corrupt_traces", seed=1)
    path, kept = other.choose_file(tmp_path, {**checks, "max_share": 1.0, "seed": 1})
    assert (path.name, kept) == ("manipulation_checks-dose1-seed1.json", {})
    path, kept = here.choose_file(tmp_path, {**checks, "max_share": 0.02})  # other rows
    assert (path.name, kept) == ("manipulation_checks.json", {})
