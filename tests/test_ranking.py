"""Ranked answers: candidates, log-probabilities, prefixes, what is stored, bad input."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, notebook_functions, papermill
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekd_utils as tk

nb = notebook_functions("33_rank_answers")


def others_with(example, *answers):
    """Items of the same label with these answers."""
    found = [a if isinstance(a, tuple) else (a,) for a in answers]
    return [replace(example, id=f"o{k}", answers=a) for k, a in enumerate(found)]


# --------------------------------------------------------------------- candidates
def test_candidates_are_the_labels_answers_in_the_story_as_whole_words(example):
    others = others_with(example, "garden", "office", "kitchen", "gard")
    long = [replace(example, id=f"l{k}") for k in range(40)]  # answers that stand there
    pool = nb.make_pool([example, *others, *long])
    assert pool.in_story == {"object-place"}
    assert nb.candidates_of(example, pool) == ([("garden",), ("kitchen",)], True)


def test_a_gold_answer_that_the_rule_would_miss_is_added_and_said(example):
    alone = nb.make_pool([example, *others_with(example, *["garden"] * 20)])
    assert nb.candidates_of(example, alone) == ([("garden",), ("kitchen",)], False)
    cellar = replace(example, answers=("cellar",))  # known, but not in this story
    pool = nb.make_pool([cellar, *others_with(example, "cellar", *["garden"] * 30)])
    assert nb.candidates_of(cellar, pool) == ([("cellar",), ("garden",)], False)


def test_where_answers_do_not_stand_in_stories_all_of_the_label_are_candidates(example):
    two = replace(example, label="carried-count", answers=("two",))
    pool = nb.make_pool([two, *others_with(two, "one", "three", "two", "one"), example])
    assert "carried-count" not in pool.in_story
    assert nb.candidates_of(two, pool) == ([("one",), ("three",), ("two",)], True)


def test_a_list_is_ranked_against_lists_of_as_many_parts(example):
    both = replace(example, answers=("apple", "ball"))
    pool = nb.make_pool([both, *others_with(both, ("ball", "garden"), "apple", ("ball", "x"))])
    listed, by_rule = nb.candidates_of(both, replace_in_story(pool, both))
    assert listed == [("apple", "ball"), ("ball", "garden")] and not by_rule
    assert nb.ending(both, both.answers) == "apple; ball</answer>"


def replace_in_story(pool, example):
    return pool._replace(in_story={example.label})


def test_the_same_words_in_another_form_are_one_candidate(example):
    pool = nb.make_pool([example, *others_with(example, "Kitchen", "KITCHEN!", "garden")])
    assert nb.candidates_of(example, pool)[0] == [("garden",), ("kitchen",)]


def test_fewer_than_two_candidates_and_free_text_have_a_reason(example):
    row, possible = nb.describe_item(example, nb.make_pool([example]))
    assert (row["n_candidates"], row["reason"], possible) == (1, nb.FEW, [])
    free = replace(example, dataset="marco", label="ENTITY", answers=("a b", "b"))
    row, possible = nb.describe_item(free, nb.make_pool([free, *others_with(free, "c")]))
    assert (row["n_candidates"], row["reason"], possible) == (None, nb.FREE, [])
    assert row["rank_ok"] is None and row["item"] == tk.item_of(free)


# --------------------------------------------------------------- log-probabilities
def reference(model, prefix, tail):
    """Log-probability of a tail by one plain forward pass."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prefix + tail])).logits[0].double().log_softmax(-1)
    at = len(prefix) - 1
    return sum(float(logits[at + k, token]) for k, token in enumerate(tail))


@settings(max_examples=8)
@given(data=st.data())
def test_a_ranking_is_that_of_plain_passes_whatever_shares_the_batch(plain, data):
    model, tokenizer = plain
    ids = st.integers(3, len(tokenizer) - 1)
    tail = st.lists(ids, min_size=1, max_size=5)
    item = st.tuples(st.lists(ids, min_size=1, max_size=12), st.lists(tail, max_size=4))
    items = data.draw(st.lists(item, min_size=1, max_size=3))
    prefixes, tails = map(list, zip(*items, strict=True))
    values, texts = nb.rank(model, tokenizer, prefixes, tails)
    assert texts == [None] * len(items) and [*map(len, values)] == [*map(len, tails)]
    for prefix, part, row in zip(prefixes, tails, values, strict=True):
        wanted = [reference(model, prefix, t) for t in part]
        assert row == pytest.approx(wanted, abs=2e-3)


def test_forced_answers_are_greedy_and_leave_the_ranking_as_it_was(plain, example):
    model, tokenizer = plain
    prefixes = [tokenizer(t).input_ids for t in ("Where is Mary? <answer>", "<answer>")]
    tails = [[tokenizer("kitchen</answer>").input_ids]] * 2
    values, _ = nb.rank(model, tokenizer, prefixes, tails)
    forced, texts = nb.rank(model, tokenizer, prefixes, tails, limit=7)
    assert forced == [pytest.approx(row, abs=1e-4) for row in values]
    alone = tk.generate(model, tokenizer, prefixes, max_new_tokens=7)
    for text, ids in zip(texts, alone, strict=True):
        written = tokenizer.decode(ids, skip_special_tokens=True)
        assert written.startswith(text) and text
    assert nb.rank(model, tokenizer, prefixes, [[], []], 7) == ([[], []], texts)


class Uneven:
    """A student of three words: after any token, word 0, 1, 2 with the odds 1 : 2 : 5."""

    device = "cpu"

    def __call__(self, input_ids, past_key_values=None, logits_to_keep=0, **rest):
        import torch

        row = torch.tensor([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])
        length = logits_to_keep or input_ids.shape[1]
        return SimpleNamespace(
            logits=row.expand(input_ids.shape[0], length, 3),
            past_key_values=past_key_values or self,
        )

    def batch_repeat_interleave(self, times): ...

    def crop(self, tokens): ...


def test_log_probabilities_by_hand(plain):
    class Pads:
        def pad(self, batch, padding_side, return_tensors):
            return plain[1].pad(batch, padding_side=padding_side, return_tensors=return_tensors)

    model = Uneven()
    values, _ = nb.rank(model, Pads(), [[1, 1]], [[[0], [2, 1], [2, 2, 2]]])
    by_hand = [math.log(1 / 8), math.log(10 / 64), math.log(125 / 512)]
    assert values[0] == pytest.approx(by_hand)


def test_the_sum_and_the_mean_per_token_by_hand(example):
    listed = [("garden",), ("kitchen",), ("the old office",)]
    found = nb.describe_ranking(example, listed, [-3.0, -2.0, -2.5], [[1] * 3, [1], [1] * 5])
    assert found["ranked"] == "kitchen" and found["rank_ok"] is True
    assert found["rank_ok_per_token"] is False  # means -1, -2 and -0.5
    assert (found["logprob_gold"], found["logprob_best_other"]) == (-2.0, -2.5)
    assert found["tokens"] == [3, 1, 5] and found["candidates"][2] == "the old office"


# ----------------------------------------------------------------------- prefixes
@pytest.mark.parametrize("layout", ["before", "after", "none"])
def test_a_trained_students_prefix_is_what_it_wrote_up_to_its_answer(plain, example, layout):
    tokenizer = plain[1]
    trace = tk.Trace(label=example.label, facts=example.gold_facts)
    text = tk.render_target(example, None if layout == "none" else trace, layout=layout)
    own = [i for c in text for i in tokenizer(c).input_ids]  # not what it would choose
    ends = ["kitchen</answer>", "garden</answer>"]
    prefix, tails, lead = nb.prefix_of(tokenizer, [5, 6], ends, own)
    head = text.partition("<answer>")[0] + "<answer>"
    assert prefix == [5, 6, *own[: len(head)]] and lead == ""
    assert [tokenizer.decode(t) for t in tails] == ends
    untrained = nb.prefix_of(tokenizer, [5, 6], ends)
    assert tokenizer.decode(untrained[0][2:]) == "<answer>" and untrained[1] == tails


def test_an_output_without_an_answer_is_left_out_with_a_reason(plain, example):
    model, tokenizer = plain
    pool = nb.make_pool([example, *others_with(example, "garden")])
    text = "<think>Question type: object-place"
    output = {"output": text, "output_ids": tokenizer(text).input_ids}
    task = nb.make_task(tokenizer, example, pool, [5, 6], output)
    assert task.prefix is None and task.row["reason"] == nb.UNTAGGED
    assert nb.rank_all(model, tokenizer, [task], [output], "controlled", 0, 4) == [task.row]


def test_forced_text_is_read_up_to_its_closing_tag(example):
    read = nb.read_forced
    assert read("kitchen</answer> garden<answer>x</answer>", "", example) == ("kitchen",)
    assert read(">kitchen</answer>", ">", example) == ("kitchen",)  # the tag's end is a joint
    assert read("kitchen\n", "", example) == ("kitchen",) and read("", "", example) is None
    assert nb.is_right(("Kitchen",), example) and not nb.is_right(None, example)


def test_ranked_and_written_answers_are_compared_as_sets_unless_order_counts(example):
    given = [("a", "b"), ("a", "c")], [-1.0, -2.0]
    assert nb.compare(example, ("B", "a"), *given)["greedy"] is True
    assert nb.compare(example, ("c", "a"), *given)["differs"] == "a likelier candidate"
    assert nb.compare(example, ("a",), *given)["differs"] == "not a candidate"
    none = dict.fromkeys(("greedy", "differs", "written"))
    assert nb.compare(example, None, *given) == none
    path = replace(example, dataset="babi20", label="path-finding")
    assert path.label in tk.dataset("babi20").ordered
    assert nb.compare(path, ("b", "a"), *given)["differs"] == "not a candidate"


def test_private_text_and_sampled_outputs(plain, example):
    free = replace(example, dataset="marco", label="ENTITY")
    task = nb.make_task(plain[1], free, nb.make_pool([free]), [5, 6])
    row = nb.finish(task, [], "kitchen</answer>")
    assert row["forced_ok"] is True and row["forced"] is None and row["rank_ok"] is None
    pool = nb.make_pool([example, *others_with(example, "garden")])
    output = {"output": "<answer>kitchen</answer>"}
    output["output_ids"] = plain[1](output["output"]).input_ids
    task = nb.make_task(plain[1], example, pool, [5, 6], output)
    assert nb.finish(task, [-1.0, -2.0], None, output)["greedy"] is False
    sampled = nb.finish(task, [-1.0, -2.0], None, output, "published")
    assert sampled["greedy"] is None and sampled["rank_ok"] is False


# ------------------------------------------------------------------------ numbers
def rows_of(*verdicts):
    """Rows with (rank_ok, n_candidates, greedy)."""
    known = {"rank_ok_per_token": True, "differs": None, "reason": None, "forced_ok": None}
    names = ("rank_ok", "n_candidates", "greedy")
    rows = [known | dict(zip(names, v, strict=True)) for v in verdicts]
    return [row | {"id": str(k), "gold_by_rule": k > 0} for k, row in enumerate(rows)]


def test_the_numbers_of_a_run_by_hand():
    rows = rows_of((True, 2, True), (False, 4, True), (True, 4, False), (None, 1, None))
    rows[2]["differs"], rows[3]["reason"] = "not a candidate", nb.FEW
    outputs = [{"id": str(k), "answer_ok": k == 0, "finished": k < 2} for k in range(4)]
    run = SimpleNamespace(metrics={"run_id": "r"})
    found = nb.summarise(run, rows, outputs)
    shares = {
        k: (v["estimate"], v["n"]) for k, v in found.items() if isinstance(v, dict) and "n" in v
    }
    assert shares["ranked"] == (2 / 3, 3) and shares["all_outputs"] == (1 / 4, 4)
    assert shares["finished_only"] == (1 / 2, 2) and shares["equals_greedy"] == (2 / 3, 3)
    assert shares["forced"] == (None, 0) and shares["answer_ok_of_ranked"] == (1 / 3, 3)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert found["ranked"] == tk.proportion(2, 3)
    assert found["left_out"] == {nb.FEW: 1} and found["differs"] == {"not a candidate": 1}
    assert (found["gold_not_by_rule"], found["n"], found["reason"]) == (1, 4, None)


def test_nothing_to_rank_is_null_with_the_reason():
    rows = rows_of((None, None, None), (None, None, None))
    for row in rows:
        row["reason"] = nb.FREE
    outputs = [{"id": str(k), "answer_ok": True, "finished": None} for k in range(2)]
    found = nb.summarise(SimpleNamespace(metrics={"run_id": "r"}), rows, outputs)
    assert found["chance"] is None and found["ranked"]["estimate"] is None
    assert found["reason"] == nb.FREE and found["finished_only"]["n"] == 0
    assert nb.against_chance(found) == f"no ranking ({nb.FREE})"
    assert "not compared" in nb.agreement(found)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "right, chance, verdict",
    [(90, 0.5, "above chance"), (10, 0.5, "below chance"), (52, 0.5, "not told apart")],
)
def test_a_share_is_read_against_chance(right, chance, verdict):
    numbers = {"ranked": tk.proportion(right, 100), "chance": chance, "reason": None}
    assert verdict in nb.against_chance(numbers)


@pytest.mark.parametrize("same, level", [(96, "at least 95%"), (80, "less than 95%")])
def test_agreement_is_explained(same, level):
    found = {"equals_greedy": tk.proportion(same, 100), "differs": {"not a candidate": 3}}
    assert level in nb.agreement(found) and "3 not a candidate" in nb.agreement(found)


# ------------------------------------------------------------------------ the runs
def ranked_files(folder):
    """{path: (content, time of writing)} of the rankings of the smoke study."""
    paths = sorted(folder.glob("data/results/smoke/*/ranked.*"))
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def check_rows(folder):
    """A run's rows and numbers belong together and to its predictions."""
    rows = pd.read_parquet(folder / "ranked.parquet").sort_values("id")
    numbers = json.loads((folder / "ranked.json").read_text())
    predictions = pd.read_parquet(folder / "predictions.parquet").sort_values("id")
    untrained = "-direct" in folder.name
    assert list(rows["id"]) == list(predictions["id"])
    assert rows["item"].str.len().eq(12).all()
    if "item" in predictions:
        assert list(rows["item"]) == list(predictions["item"])
    known = rows["rank_ok"].notna()
    assert numbers["run_id"] == folder.name and numbers["n"] == len(rows)
    assert numbers["ranked"]["n"] == known.sum()
    assert numbers["all_outputs"]["estimate"] == predictions["answer_ok"].mean()
    assert rows["forced_ok"].notna().all() == untrained
    assert known.all() == (rows["reason"].isna().all())
    for row in rows[known].itertuples():
        assert row.n_candidates == len(row.logprobs) == len(row.candidates) > 1
        assert row.candidates[row.logprobs.argmax()] == row.ranked
        assert row.rank_ok == (row.logprob_gold >= row.logprob_best_other)


def test_committed_rankings_belong_to_their_predictions():
    folders = {path.parent for path in (ROOT / "data/results").glob("*/*/ranked.*")}
    assert folders
    for folder in folders:
        check_rows(folder)


def test_a_study_is_ranked_once_and_then_shown_as_it_is_stored(smoke):
    done = papermill(smoke.workspace, "33_rank_answers", "-r", "study", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    kept = ranked_files(smoke.workspace)
    folders = {path.parent for path in kept}
    assert len(kept) == 2 * len(folders) == 8
    for folder in folders:
        check_rows(folder)
    options = ["-r", "study", "smoke", "-p", "n_items", "3"]
    done = papermill(smoke.workspace, "33_rank_answers", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 runs as stored, 0 to be ranked" in done.stderr + done.stdout
    assert ranked_files(smoke.workspace) == kept


def test_what_is_replaced_is_compared_first(tmp_path, capsys):
    run = SimpleNamespace(metrics={"run_id": "r"}, folder=tmp_path, parameters={})
    rows, outputs = rows_of((True, 2, True), (False, 4, True)), []
    outputs = [{"id": str(k), "answer_ok": True, "finished": True} for k in range(2)]
    nb.save(run, rows, outputs, 1.0)
    assert capsys.readouterr().out == ""
    rows[1]["rank_ok"] = True
    nb.save(run, rows, outputs, 2.0)
    assert "r: replaced, the same verdict on 1 of 2 items" in capsys.readouterr().out
    assert tk.read_json(tmp_path / "ranked.json")["ranked"] == tk.proportion(2, 2)


# ----------------------------------------------------------------------- bad input
@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A study with one trained run whose adapter is not here, as find_runs sees it."""
    run = SimpleNamespace(
        metrics={"run_id": "m-correct", "parameters": {"condition": "correct"}},
        parameters={"condition": "correct", "seed": 0, "protocol": "controlled"},
        condition="correct",
        folder=tmp_path / "m-correct",
        frame=pd.DataFrame({"id": ["a"], "item": ["0" * 12]}),
        arm="correct",
        seed=0,
    )
    run.folder.mkdir()
    monkeypatch.setattr(tk, "study_runs", lambda study: [run])
    return run


def test_an_unknown_run_and_one_without_an_adapter_are_refused(stored):
    with pytest.raises(ValueError, match="study s has no run 'x'; known: m-correct"):
        nb.find_runs("s", "x")
    with pytest.raises(FileNotFoundError, match="adapter.*Train the run again"):
        nb.find_runs("s", "m-correct")
    assert nb.find_runs("s", "") == [stored] and not nb.has_student(stored)


def test_prompts_of_another_run_are_refused(stored):
    rows = [{"id": "a", "split": "test", "prompt": "p", "target": "t", "item": "1"}]
    stored.parameters |= {"dataset": "microworld", "student": "tiny", "n_train": 4}
    with pytest.raises(ValueError, match="m-correct: the prompts that 02 writes are not those"):
        nb.prompts_of(stored, rows, {"a"})
    line = json.dumps({k: v for k, v in rows[0].items() if k != "item"}) + "\n"
    digest = nb.hashlib.sha256(line.encode()).hexdigest()
    known = {k: v for k, v in stored.parameters.items() if k != "n_train"}
    stored.metrics["run_id"] = tk.make_run_id(known, digest)
    more = [*rows, {"id": "b", "split": "test", "prompt": "q", "target": "t"}]
    assert nb.prompts_of(stored, more, {"a"}) == {"a": "p"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": "b", "item": "0" * 12}, "has b, which the run's predictions have not"),
        ({"id": "a", "item": "1" * 12}, "id a is item 1{12} in ranked and item 0{12}"),
    ],
)
def test_rankings_of_other_items_are_refused(stored, row, message):
    tk.write_parquet(stored.folder / "ranked.parquet", [row])
    tk.write_json(stored.folder / "ranked.json", {"n": 1})
    with pytest.raises(ValueError, match=message):
        nb.read_ranked(stored)
