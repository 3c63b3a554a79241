"""What the traces of every condition hold, and what their random draws depend on."""
import random
from collections import Counter
from dataclasses import replace

import pytest
import tracekd_utils as tk
from conftest import notebook_functions
from scipy.stats import chisquare

nb = notebook_functions("02_corrupt_traces")


def usable(examples):
    return [e for e in examples if len(nb.non_gold_facts(e)) >= len(set(e.gold_facts))]


@pytest.fixture(scope="module")
def items(microworld):
    return usable(microworld)


@pytest.fixture(scope="module")
def pool(items):
    return nb.Pool(items)


def test_the_registry_and_the_helper_name_the_same_conditions():
    assert list(nb.CONDITIONS) == list(tk.LAYOUTS)
    assert {c for c, r in nb.CONDITIONS.items() if r.build is None} == {
        c for c, layout in tk.LAYOUTS.items() if layout == "none"}


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
        assert trace.label != e.label and trace.label in tk.LABELS["microworld"]
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
    counts = dict(zip(tk.LABELS["microworld"], (40, 400, 200, 100, 60, 200)))
    study = nb.Pool(replace(items[0], label=k) for k, n in counts.items() for _ in range(n))
    own = "carried-count"
    drawn = Counter(nb.make_trace(replace(items[0], id=f"x/{i}", label=own,
                                          gold_facts=items[0].gold_facts), "incorrect",
                                  study).label for i in range(4000))
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
                e, "incorrect", pool, 0, dose)


def test_doses_are_nested_and_are_shares(items, pool):
    full = {e.id: nb.make_trace(e, "incorrect", pool) for e in items}
    before = set()
    for dose in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        traces = {e.id: nb.make_trace(e, "incorrect", pool, 0, dose) for e in items}
        wrong = {e.id for e in items if traces[e.id].label != e.label}
        assert before <= wrong and all(traces[i] == full[i] for i in wrong)
        assert all(traces[e.id] == nb.make_trace(e, "correct", pool)
                   for e in items if e.id not in wrong)
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
    right, wrong = ([nb.make_trace(e, c, pool) for e in items]
                    for c in ("correct", "incorrect"))
    assert [len(t.facts) for t in right] == [len(t.facts) for t in wrong]
    for traces, truth in ((right, True), (wrong, False)):
        rows = [tk.score(tk.parse_output(tk.render_target(e, t), e), e)
                for e, t in zip(items, traces)]
        for field in ("label_ok", "facts_ok", "trace_ok"):
            assert {r[field] for r in rows} == {truth}
        assert all(r["answer_ok"] and r["parsed_ok"] for r in rows)
