"""What two traces differ in, by hand and on the real data, and what the committed checks hold."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, notebook_functions
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekd_utils as tk

NB = notebook_functions("32_measure_traces")
RESULTS = ROOT / "data" / "results"
STUDIES = ("babi", "cotempqa", "marco", "microworld")


def checks(study, name="manipulation_checks"):
    return tk.read_json(RESULTS / study / f"{name}.json")


def gold(example):
    return tk.Trace(label=example.label, facts=example.gold_facts)


def words(text):
    return len(text.split())


# ------------------------------------------------------------------- relevance and position
def test_relevance_is_the_share_of_facts_with_a_content_word_of_the_question(example):
    assert NB.content_words("Where is the apple?") == {"apple"}
    assert NB.relevance(example, example.gold_facts) == 0.5  # took the apple; went to the kitchen
    assert NB.relevance(example, ("John did not take the ball.",)) == 0
    assert NB.relevance(example, ("AN APPLE!",)) == 1
    assert NB.relevance(example, ()) is None
    assert NB.relevance(replace(example, question="Where is it?"), example.facts) == 0


def test_position_is_the_mean_place_in_the_story(example):
    assert NB.position(example, example.gold_facts) == pytest.approx(0.5)  # 1 and 2 of 0 to 3
    assert NB.position(example, example.facts[:1]) == 0
    assert NB.position(example, (example.facts[3].lower(),)) == 1  # `published` writes lower case
    for facts in ((), ("Mary took the [masked].",), (example.facts[0], "Not there.")):
        assert NB.position(example, facts) is None
    assert NB.position(replace(example, facts=example.facts[:1]), example.facts[:1]) is None


def test_text_is_a_fact_in_published_alone():
    bare = tk.Trace(label="x", text="a passage")
    assert NB.cited_facts(bare, "published") == ("a passage",)
    assert NB.cited_facts(bare) == ()
    assert NB.cited_facts(tk.Trace(facts=("a", "b")), "published") == ("a", "b")


def test_one_trace_by_hand(example):
    found = NB.measure_one(example, gold(example), words)
    assert found == {
        # <think>Question type: object-place / Facts: / - Mary took the apple. / - Mary went …
        "tokens": 3 + 1 + 5 + 6,
        "facts": 2,
        "label_truth": True,
        "facts_truth": True,
        "holds_answer": True,
        "relevance": 0.5,
        "position": 0.5,
    }
    text = NB.measure_one(example, tk.Trace(text="the Kitchen ..."), words)
    assert (text["facts"], text["holds_answer"]) == (0, True)
    assert (text["relevance"], text["position"]) == (None, None)
    both = replace(example, answers=("kitchen", "garden"))
    assert NB.measure_one(both, gold(both), words)["holds_answer"] is False  # one of two


def test_means_are_null_where_nothing_can_be_measured(example):
    pairs = [(example, tk.Trace(text="dots")), (example, tk.Trace(text="dots dots"))]
    found = NB.measure(pairs, words, {"kitchen"})
    assert (found["relevance"], found["position"], found["position_n"]) == (None, None, 0)
    assert found["tokens_mean"] == 1.5 and found["tokens_sd"] == pytest.approx(np.sqrt(0.5))
    assert NB.measure(pairs[:1], words, {"kitchen"})["tokens_sd"] is None
    tk.write_json(tk.RESULTS / "plain.json", found)  # no NumPy value in it


# ------------------------------------------------------------------------ answer information
NAMES = ["Duke of York", "Duke of Kent", "Prime Minister of Israel"] * 20


def information(example, facts, vocabulary=NAMES):
    pairs = [
        (replace(example, answers=(name,)), tk.Trace(facts=(fact,)))
        for name, fact in zip(NAMES, facts, strict=True)
    ]
    return NB.answer_information(pairs, vocabulary)


def test_answers_of_several_words_are_looked_for_as_a_whole(example):
    assert information(example, [f"He was {n} in 1820." for n in NAMES]) == pytest.approx(1)
    other = NAMES[1:] + NAMES[:1]  # never the own answer, and as telling
    assert information(example, [f"He was {n.upper()}." for n in other]) == pytest.approx(1)
    parts = ["Duke", "Kent", "Prime"] * 20  # words of the answers, no answer
    assert information(example, [f"He was {n}." for n in parts]) == 0
    assert information(example, ["Dukedom of York."] * 60) == 0
    mixed = [NAMES[(i * 7 + i // 5) % 3] for i in range(60)]  # no link to the answer
    assert abs(information(example, [f"He was {n}." for n in mixed])) < 0.1


@pytest.fixture(scope="module")
def cotempqa(data_dir):
    """300 training examples of CoTempQA, most of whose answers have several words."""
    nb = notebook_functions("11_decompose_cotempqa")
    examples = nb.read_cotempqa(data_dir / "cotempqa", 0)[0]
    return [e for e in examples if e.split == "train"][:300]


def test_gold_facts_tell_the_answers_of_cotempqa(cotempqa, corrupter):
    vocabulary = {a for e in cotempqa for a in e.answers}
    assert sum(" " in a for a in vocabulary) > len(vocabulary) / 2
    assert NB.answer_information([(e, gold(e)) for e in cotempqa], vocabulary) > 0.98
    relevances = [NB.relevance(e, corrupter.wrong_facts(e, 0)) for e in cotempqa]
    assert min(relevances) == 1 and all(corrupter.enough_near(e) for e in cotempqa)


# -------------------------------------------------------------------- relevance on real data
@pytest.fixture(scope="module")
def stories(babi, microworld, corrupter):
    """Items of the paper's bAbI tasks and of the microworld that can have a wrong trace."""
    tasks = tk.dataset("babi").labels
    both = {"babi": [e for e in babi[0] if e.label in tasks], "microworld": microworld}
    usable = {
        k: [e for e in v if 0 < len(set(e.gold_facts)) <= len(corrupter.non_gold_facts(e))]
        for k, v in both.items()
    }
    return {k: corrupter.select(v, 800) for k, v in usable.items()}


@pytest.mark.parametrize(
    "study, right, wrong, auc, near",
    [("microworld", 0.92, 0.12, 0.96, 0.28), ("babi", 0.88, 0.36, 0.80, 0.61)],
)
def test_wrong_traces_are_irrelevant_and_not_only_wrong(
    stories, corrupter, study, right, wrong, auc, near
):
    examples = stories[study]
    relevances = [
        [NB.relevance(e, facts) for e, facts in zip(examples, of, strict=True)]
        for of in (
            [e.gold_facts for e in examples],
            [corrupter.wrong_facts(e, 0) for e in examples],
        )
    ]
    assert np.mean(relevances, axis=1) == pytest.approx([right, wrong], abs=0.03)
    assert NB.overlap_auc(*relevances)[0] == pytest.approx(auc, abs=0.03)
    share = np.mean([corrupter.enough_near(e) for e in examples])
    assert share == pytest.approx(near, abs=0.04)


def test_the_auc_by_hand():
    assert NB.overlap_auc([1.0] * 20, [0.0] * 20) == (1.0, None)
    assert NB.overlap_auc([0.5] * 20, [0.5] * 20) == (0.5, None)
    # three of four pairs in the right order, one tie: 0.5 * 0 + 1 * ... of every pair of halves
    assert NB.overlap_auc([1.0, 0.5] * 20, [0.5, 0.0] * 20)[0] == pytest.approx(0.875, abs=0.03)
    found = NB.overlap_auc([1.0] * 20, [None] * 20)
    assert found == (None, "0 traces with facts")


# --------------------------------------------------------------------------------- baselines
@pytest.fixture(scope="module")
def known(example):
    return {
        "object-place": {
            (name,): (name,) for name in ("cellar", "garden", "kitchen", "Mary", "office")
        },
        "size-compare": {("no",): ("no",), ("yes",): ("yes",)},
        "place-before": {(str(k),): (str(k),) for k in range(NB.FEW + 1)},
    }


def test_candidates_stand_in_the_story_or_are_a_closed_set(example, known):
    found = NB.candidates(example, known)
    assert found == ([("Mary",), ("garden",), ("kitchen",)], True)
    closed = replace(example, label="size-compare")
    assert NB.candidates(closed, known) == ([("no",), ("yes",)], False)
    assert NB.candidates(replace(example, label="place-before"), known) == ([], True)


def test_several_answers_are_a_candidate_where_all_of_them_stand():
    facts = ("Ann got the red apple.", "Ann got milk.")
    e = tk.Example(
        **{"id": "babi/test/x", "dataset": "babi", "split": "test", "question": "What?"},
        **{"label": "lists-sets", "facts": facts, "gold_facts": facts},
        answers=("milk", "red apple"),
    )
    sets = [("milk",), ("milk", "red apple"), ("ball", "milk"), ("apple got milk",)]
    known = {"lists-sets": {s: s for s in sets}}
    assert NB.candidates(e, known) == ([("milk",), ("milk", "red apple")], True)
    assert NB.last_place(e, ("milk", "red apple")) < NB.last_place(e, ("milk",))
    row = NB.baseline(e, known, {"lists-sets": ("red apple", "milk")}, "counting")
    assert (row["chance"], row["majority_ok"], row["last_ok"]) == (0.5, True, False)


def test_the_baselines_of_one_item_by_hand(example, known):
    row = NB.baseline(example, known, {"object-place": ("office",)}, "object-place")
    assert row == {
        "id": example.id,
        "label": "object-place",
        "n_candidates": 3,
        "chance": pytest.approx(1 / 3),
        "majority": "office",
        "majority_ok": False,
        # fact 2 is `Mary went to the kitchen.`, in which the kitchen stands last
        "last": "kitchen",
        "last_ok": True,
        "label_majority_ok": True,
        "facts_chance": pytest.approx(1 / 6),  # 2 of 4
    }
    none = NB.baseline(replace(example, label="place-before"), known, {}, "object-place")
    assert (none["n_candidates"], none["chance"], none["last"]) == (0, None, None)
    assert not none["majority_ok"] and none["last_ok"] is None and not none["label_majority_ok"]
    one = {"object-place": {("kitchen",): ("kitchen",)}}
    alone = NB.baseline(example, one, {}, "")  # the gold answer itself: nothing to choose from
    assert alone["n_candidates"] == 1 and alone["majority_ok"] is False
    assert [alone[name] for name in ("chance", "last", "last_ok")] == [None] * 3


def test_the_majority_of_a_label_is_that_of_the_training_rows(example):
    labels = ["size-compare"] * 5 + ["object-place"] * 4
    answers = ["no", "Yes", "yes", "yes", "no", "b", "a", "a", "b"]
    rows = [
        replace(example, id=f"x/{k}", label=label, answers=(a,))
        for k, (label, a) in enumerate(zip(labels, answers, strict=True))
    ]
    most, label = NB.majorities(rows)
    assert most == {"size-compare": ("Yes",), "object-place": ("a",)} and label == "size-compare"


def test_order_counts_where_the_card_says_so(example):
    path = replace(example, dataset="babi20", label="path-finding", answers=("s", "n"))
    assert NB.answer_key(path) == ("s", "n")
    assert NB.answer_key(replace(path, label="lists-sets")) == ("n", "s")
    assert NB.asked_for(replace(path, dataset="marco")) == ("s",)  # alternatives


@pytest.mark.parametrize("study", STUDIES)
def test_committed_baselines_have_a_row_for_every_test_item(study):
    rows = pd.DataFrame(tk.read_parquet(RESULTS / study / "baselines.parquet"))
    assert list(rows) == [
        *("id", "item", "label", "n_candidates", "chance", "majority", "majority_ok", "last"),
        *("last_ok", "label_majority_ok", "facts_chance"),
    ]
    path = next((RESULTS / study).glob("*-correct-controlled-seed0-*/predictions.parquet"))
    tested = {r["id"]: r["item"] for r in tk.read_parquet(path)}
    assert dict(zip(rows["id"], rows["item"], strict=True)) == tested
    assert rows["chance"].dropna().between(0, 1).all() and rows["facts_chance"].between(0, 1).all()
    for name in ("chance", "last_ok", *(() if tk.dataset(study).private else ("last",))):
        assert (rows[name].isna() == (rows["n_candidates"] < 2)).all()
    assert rows["majority"].isna().all() == tk.dataset(study).private


@pytest.mark.parametrize(
    "study, last, label",
    [
        *(("microworld", 0.4025, 0.1675), ("babi", 0.385, 0.1), ("marco", None, 0.75)),
        ("cotempqa", 0.2892, 0.25),
    ],
)
def test_the_last_candidate_and_the_majority_label_of_the_committed_items(study, last, label):
    rows = pd.DataFrame(tk.read_parquet(RESULTS / study / "baselines.parquet"))
    assert rows["label_majority_ok"].mean() == pytest.approx(label, abs=0.001)
    if last:
        assert rows["last_ok"].dropna().mean() == pytest.approx(last, abs=0.001)
        assert rows["majority_ok"].mean() < rows["chance"].mean() < rows["last_ok"].mean()


# -------------------------------------------------------------------------- beyond the story
@pytest.fixture(scope="module")
def guessing(example):
    """60 items of two places, one of which is the answer: the story does not say which."""
    rng, items = np.random.default_rng(0), []
    for k in range(60):
        facts = [f"Mary saw the {place}." for place in rng.permutation(["garden", "kitchen"])]
        right = int(rng.integers(2))
        answer = facts[right].split()[-1][:-1]
        about = {"id": f"m/{k}", "facts": tuple(facts), "gold_facts": (facts[right],)}
        items.append(replace(example, answers=(answer,), **about))
    return items


def test_what_a_trace_tells_beyond_a_story_that_tells_nothing(guessing):
    known = NB.known_answers(guessing)
    right = [(e, gold(e)) for e in guessing]
    wrong = [
        (e, tk.Trace(label="x", facts=tuple(f for f in e.facts if f not in e.gold_facts)))
        for e in guessing
    ]
    reference = NB.Reference(right, known, words)
    dots = [(e, tk.Trace(text="...")) for e in guessing]
    found = {}
    for name, pairs in (("right", right), ("wrong", wrong), ("dots", dots)):
        found[name] = NB.compare(reference, pairs, reference.measure(pairs))["beyond_story"]
        tk.write_json(tk.RESULTS / "plain.json", found[name])
    assert {f["n"] for f in found.values()} == {60}
    assert {f["story"] for f in found.values()} == {found["dots"]["with_trace"]}
    assert found["dots"]["story"] < 0.75 and found["dots"]["gain"]["estimate"] == 0
    # the right trace says it, and the wrong one says it by leaving it out
    assert found["right"]["with_trace"] == found["wrong"]["with_trace"] == 1
    assert found["wrong"]["gain"]["low"] > 0


def test_the_folds_are_by_item_and_few_items_are_refused(guessing):
    known = NB.known_answers(guessing)
    rows = NB.rank_rows(guessing, known)
    assert len(rows) == 120 and sum(right for _, _, right, _ in rows) == 60
    learnt = NB.answers_right(rows, [[float(right)] for _, _, right, _ in rows])
    assert set(learnt) == {e.id for e in guessing} and all(learnt.values())
    few = NB.Reference([(e, gold(e)) for e in guessing[: NB.FEWEST - 1]], known, words)
    found = NB.compare(few, few.pairs, few.measured)["beyond_story"]
    assert found == {"n": 49, "reason": "49 items with one answer and two candidates"}


def test_items_of_several_answers_are_not_ranked(guessing):
    more = [replace(e, answers=("garden", "kitchen")) for e in guessing]
    assert NB.rank_rows(more, NB.known_answers(guessing)) == []


def test_features_of_a_list_of_facts_by_hand(example):
    facts = list(example.facts)
    assert NB.places("kitchen", facts) == [1, 0.5, 0.5, 2]
    assert NB.places("Mary", facts) == [3, 0, 0.5, 2]
    assert NB.places("office", facts) == NB.places("office", []) == [0, -1, -1, -1]
    found = NB.describe("kitchen", example.question, facts)
    # near: `Mary took the apple.`; linked by `Mary` or `took`: the three facts of Mary
    assert found[4:8] == [0, -1, -1, -1] and found[8:12] == [1, 2 / 3, 2 / 3, 1]
    assert found[12:] == [4, 1, 1, 0, 1.0]  # facts, near ones, shared words, alike, covered


# ---------------------------------------------------------------------------------- verdicts
MEANS = {"tokens_mean": 20.0, "facts_mean": 1.5, "relevance": 0.8, "position": 0.5}
MEANS["position_n"] = 10


def test_verdicts_are_computed():
    wrong = MEANS | {"tokens_mean": 22.0, "relevance": 0.1, "position": None, "position_n": 0}
    found = NB.compare_form(wrong, MEANS)
    assert {k: v["matched"] for k, v in found.items()} == {
        **{"tokens": True, "facts": True, "relevance": False, "position": None}
    }
    assert NB.in_words(found["tokens"]) == "+10.0%, matched within a tenth"
    assert NB.in_words(found["relevance"]) == "-87.5%, NOT matched"
    assert NB.in_words(found["position"]) == "open (no mean)"
    longer = NB.compare_form(MEANS | {"tokens_mean": 23.12}, MEANS)["tokens"]
    assert NB.in_words(longer) == "+15.6%, NOT matched"
    part = NB.compare_form(MEANS | {"position_n": 4}, MEANS)["position"]
    assert NB.in_words(part) == "open (known for 4 of 10 rows)"
    none = NB.compare_form(MEANS, MEANS | {"facts_mean": 0.0})["facts"]
    assert none["reason"] == "no mean"


def test_the_median_stands_beside_the_mean(example):
    right = [(replace(example, id=f"x/{k}"), gold(example)) for k in range(5)]
    extra = (0, 1, 1, 1, 2)
    longer = [
        (e, replace(t, facts=(t.facts[0] + " so" * n, t.facts[1])))
        for (e, t), n in zip(right, extra, strict=True)
    ]
    reference = NB.Reference(right, NB.known_answers([example]), words)
    found = reference.longer(longer)
    assert (found["mean"], found["median"], found["min"], found["max"]) == (1, 1, 0, 2)
    compared = NB.compare(reference, longer, reference.measure(longer))
    assert compared["changed"] == 0.8
    line = NB.tell("longer", compared | {"dose_realised": 0.523})
    assert "The median difference is +1 tokens." in line and "52.3% of the rows" in line


def test_conditions_are_compared_with_those_of_the_committed_checks():
    found = {study: checks(study)["conditions"] for study in STUDIES}
    token = found["marco"]["incorrect"]["verdicts"]["tokens"]
    assert token["ratio"] == pytest.approx(1.156, abs=0.002) and token["matched"] is False
    for study in ("microworld", "babi"):
        wrong = found[study]["incorrect"]["verdicts"]
        assert wrong["tokens"]["matched"] and wrong["facts"]["matched"]
        assert not wrong["relevance"]["matched"] and not wrong["position"]["matched"]
        assert found[study]["incorrect"]["tokens_over_correct"]["median"] >= 0
    assert found["cotempqa"]["correct"]["answer_information"] > 0.99
    shares = {s: found[s]["near_facts"]["applies"] for s in ("microworld", "babi", "cotempqa")}
    assert shares == pytest.approx({"microworld": 0.28, "babi": 0.61, "cotempqa": 1}, abs=0.015)


@pytest.mark.parametrize("study", ["microworld", "babi"])
def test_a_never_gold_trace_tells_more_than_a_random_one(study):
    found = checks(study)["conditions"]
    told = {name: c["beyond_story"] for name, c in found.items() if "beyond_story" in c}
    assert set(told) == set(tk.conditions()) - {"vanilla"}
    assert len({t["story"] for t in told.values()}) == 1
    correct, wrong, chance = (
        told[c]["with_trace"] for c in ("correct", "incorrect", "random_facts")
    )
    assert correct > wrong > told["correct"]["story"] and wrong > chance - 0.02


def test_the_realised_dose_is_stored():
    found = checks("babi", "manipulation_checks-dose0.5-seed0")["conditions"]["incorrect"]
    assert found["dose_realised"] == found["changed"] == pytest.approx(0.5225)
    assert checks("babi")["conditions"]["incorrect"]["dose_realised"] == 1
    assert checks("babi")["conditions"]["correct"]["dose_realised"] is None
    masked = checks("babi")["conditions"]["masked"]
    assert masked["changed"] == masked["applies"] < masked["dose_realised"] == 1


# ------------------------------------------------------------------- upper share of an answer
def with_answers(example, answers):
    return [replace(example, id=f"x/{k:03}", answers=(a,)) for k, a in enumerate(answers)]


def test_no_answer_has_more_than_its_share(example, corrupter):
    items = with_answers(example, ["titular bishop"] * 60 + [f"a{k}" for k in range(100)])
    free = corrupter.select(items, 100)
    held = corrupter.select(items, 100, 0.02)
    counts = Counter(e.answers for e in held)
    assert len(held) == 100 and counts["titular bishop",] == 2
    assert Counter(e.answers for e in free)["titular bishop",] > 20
    # where there are too few others the share is one of what is there
    few = corrupter.select(items[:110], 100, 0.1)
    assert Counter(e.answers for e in few)["titular bishop",] == 5 and len(few) == 55
    assert len(corrupter.select(items[:60], 30, 0.02)) == 1  # one at least
    assert corrupter.select([], 30, 0.02) == corrupter.select(items, 0, 0.02) == []


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from("aaaabcdefg"), min_size=1, max_size=40),
    st.integers(1, 50),
    st.sampled_from([0.02, 0.1, 0.5, 1.0]),
)
def test_the_share_holds_for_every_selection(answers, size, share):
    corrupter = notebook_functions("02_corrupt_traces")
    e = tk.Example(
        **{"id": "m", "dataset": "microworld", "split": "test", "question": "?"},
        **{"label": "size-compare", "facts": ("f",), "gold_facts": ("f",), "answers": ("x",)},
    )
    items = with_answers(e, answers)
    taken = corrupter.select(items, size, share)
    most = max(Counter(e.answers for e in taken).values())
    assert 0 < len(taken) <= min(size, len(items)) and most <= max(1, share * len(taken))
    if share == 1:
        assert taken == corrupter.select(items, size) and len(taken) == min(size, len(items))


def test_a_study_keeps_its_share_and_a_new_one_takes_two_percent(tmp_path, corrupter):
    assert corrupter.study_share(tmp_path) == 0.02
    tk.write_json(tmp_path / "manipulation_checks-dose1-seed1.json", {"dataset": "x"})
    assert corrupter.study_share(tmp_path) == 1.0  # older than the rule
    tk.write_json(tmp_path / "manipulation_checks-dose1-seed1.json", {"max_share": 0.05})
    assert corrupter.study_share(tmp_path) == 0.05
    assert {checks(study)["max_share"] for study in STUDIES} == {1.0}


def test_the_share_is_for_open_answers(stories, cotempqa):
    for examples in stories.values():  # places, people, yes and no
        assert not NB.has_open_answers(examples, 0.02)
    assert NB.has_open_answers(cotempqa, 0.02) and not NB.has_open_answers(cotempqa, 1.0)


def test_one_answer_no_longer_carries_cotempqa(cotempqa, corrupter):
    usable = [e for e in cotempqa if len(corrupter.non_gold_facts(e)) >= len(set(e.gold_facts))]
    free, held = (corrupter.select(usable, 100, share) for share in (1.0, 0.02))
    counts = [Counter(map(NB.answer_key, taken)) for taken in (free, held)]
    assert len(held) == 100 and max(counts[0].values()) > 2 == max(counts[1].values())
    assert counts[0]["titular bishop",] == max(counts[0].values())
