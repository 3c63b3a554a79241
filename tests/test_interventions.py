"""Forced traces: tokens, cached answers, planted answers, metrics, resuming, bad runs."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT, make_workspace, notebook_functions, papermill
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekd_utils as tk

nb = notebook_functions("06_intervene_on_traces")
force = notebook_functions("37_force_traces")
answering = nb.ANSWERING
SPACE = force.make_item.__globals__  # what the notebook's functions see as globals
ANSWERS = answering.intervene.__globals__
STUDY = "forced"
EXAMPLES = "data/interim/microworld/examples.jsonl"


@pytest.fixture
def items(microworld, corrupter, plain):
    """Ten items whose own trace is the gold one, with all that is forced on them."""
    examples = [e for e in microworld if e.split == "test"][:10]
    texts = forced_texts(examples, corrupter)
    known = {}
    for e in microworld:
        known.setdefault(e.label, set()).add(e.answers)
    known = {label: sorted(answers) for label, answers in known.items()}
    found = []
    for e in examples:
        planted = force.planted_answers(e, known, 0)
        text = texts["gold"][e.id] + "; ".join(e.answers) + "</answer>"
        said = {"output": text, "output_ids": plain[1](text).input_ids}
        heads = force.heads_of(e, texts, planted)
        prompt = tk.render_prompt(e)
        found.append(force.make_item(plain[1], e, prompt, heads, planted, said, "before"))
    return found


def forced_texts(examples, corrupter):
    """{arm: {id: text up to `<answer>`}} of the traces that 02 writes."""
    pool = corrupter.Pool(examples)
    return {
        arm: {
            e.id: force.up_to_answer(e, corrupter.make_trace(e, condition, pool)) for e in examples
        }
        for arm, condition in force.FILES.items()
    }


# ------------------------------------------------------------------------- tokens
def test_forced_tokens_and_answers_are_those_of_training(items, plain, corrupter):
    tokenizer = plain[1]
    texts = forced_texts([i.example for i in items], corrupter)
    for item in items:
        for arm, text in ((a, texts[a][item.example.id]) for a in force.FILES):
            if arm not in item.forced:
                assert arm == "masked"
                continue
            forced = item.forced[arm]
            target = text + "; ".join(item.example.answers) + "</answer>"
            ids, _ = tk.encode_row(tokenizer, tk.render_prompt(item.example), target)
            assert ids == [*item.prompt, *forced.ids, *forced.tails[0], tokenizer.eos_token_id]
            assert forced.lead == "" and len(forced.tails) == 1 + bool(item.planted)
        assert item.forced["own"] == item.forced["gold"] == item.forced["cut_100"]
        assert item.forced["cut_0"] == item.forced["empty"]
        assert tokenizer.decode(item.forced["empty"].ids) == "<think></think>\n<answer>"


def test_an_arm_that_does_not_exist_for_an_item_is_left_out(items):
    for item in items:
        e, gold = item.example, " ".join(item.example.gold_facts).split()
        inside = all(a in " ".join(gold).replace(".", "").split() for a in e.answers)
        assert ("masked" in item.forced) is inside
        assert ("planted" in item.forced) is (item.planted is not None)
        assert inside or item.planted is None
    assert 0 < sum(i.planted is not None for i in items) < len(items)


def test_own_tokens_are_forced_as_they_were_written(plain):
    tokenizer = plain[1]
    text = "<think>Question type: x\nFacts:\n- a b</think>\n<answer>kitchen</answer>"
    letters = [i for c in text for i in tokenizer(c).input_ids]  # not what it would choose
    assert letters != tokenizer(text).input_ids
    other = force.force_text(tokenizer, "<answer>", ["kitchen</answer>"])
    forced = force.force_own(tokenizer, letters, other)
    head = text.partition("kitchen")[0]
    assert forced.ids == letters[: len(head)] and forced.lead == ""
    assert forced.tails == other.tails
    half = force.force_cut(tokenizer, letters, 0.5, ["kitchen</answer>"])
    kept = len("<think>") + len("Question type: x\nFacts:\n- a b") // 2
    assert half.ids[:kept] == letters[:kept]
    assert tokenizer.decode(half.ids[kept:]) == "</think>\n<answer>"
    assert tokenizer.decode(half.tails[0]) == "kitchen</answer>"


@pytest.mark.parametrize(
    "text, own, cut",
    [
        ("<think>a", False, False),
        ("<answer>a</answer>", True, False),
        ("<answer>a</answer>\n<think>b</think>", True, False),
        ("", False, False),
        ("<think>b</think>\n<answer>", True, True),
    ],
)
def test_outputs_without_an_answer_or_a_trace(plain, text, own, cut):
    tokenizer, ids = plain[1], plain[1](text).input_ids
    other = force.force_text(tokenizer, "<answer>", ["a</answer>"])
    forced = force.force_own(tokenizer, ids, other)
    assert (forced is not None) is own
    assert not own or tokenizer.decode(forced.ids) == text.partition("<answer>")[0] + "<answer>"
    assert (force.force_cut(tokenizer, ids, 0.5, ["a</answer>"]) is not None) is cut


def test_a_tokenizer_that_joins_the_tag_with_the_answer(example):
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.Fuse()
    head = "<think></think>\n<answer>"
    bpe.train_from_iterator(
        [">kitchen", ">garden"] * 50,
        trainers.BpeTrainer(
            vocab_size=60, show_progress=False, initial_alphabet=sorted(set(head + "/"))
        ),
    )
    joins = PreTrainedTokenizerFast(tokenizer_object=bpe)
    ends = ["kitchen</answer>", "garden</answer>"]
    forced = force.force_text(joins, head, ends)
    assert forced.lead == ">"
    for tail, end in zip(forced.tails, ends, strict=True):
        assert forced.ids + tail == joins(head + end).input_ids
    assert force.read_answer(">kitchen</answer>", forced, example) == ("kitchen", ("kitchen",))
    assert force.read_answer("kitchen</answer>", forced, example)[1] is None


# ------------------------------------------------------------- cache against no cache
def reference(model, tokenizer, prompt, forced, tail):
    """Summed log-probability of `tail` by one plain pass over everything."""
    import torch

    ids = torch.tensor([prompt + forced.ids + tail])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    start = len(prompt) + len(forced.ids)
    return sum(float(scores[start + k - 1, t]) for k, t in enumerate(tail))


def test_cached_answers_are_those_without_a_cache(items, plain):
    model, tokenizer = plain
    for item in items[:4]:
        traces = list(item.forced.values())
        assert len({len(f.ids) for f in traces}) > 1  # of unequal length, side by side
        found = force.answer_all(model, tokenizer, item.prompt, traces, 12)
        prompts = [item.prompt + f.ids for f in traces]
        plainly = tk.generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=1)
        for forced, (ours, values), ids in zip(traces, found, plainly, strict=True):
            assert ours == ids
            assert len(values) == len(forced.tails) == 1 + bool(item.planted)
            for tail, value in zip(forced.tails, values, strict=True):
                expected = reference(model, tokenizer, item.prompt, forced, tail)
                assert value == pytest.approx(expected, abs=2e-3)
        alone = [force.answer_all(model, tokenizer, item.prompt, [f], 12)[0] for f in traces[::5]]
        assert [ids for ids, _ in alone] == [ids for ids, _ in found[::5]]
        spread = pd.Series([values[0] for _, values in found]).std()
        assert spread > 0.1  # traces change what is compared, by far more than its tolerance


def test_a_trace_whose_tag_ends_elsewhere_has_no_log_probability(items, plain):
    model, tokenizer = plain
    gold = items[0].forced["gold"]
    found = force.answer_all(model, tokenizer, items[0].prompt, [gold, gold._replace(tails=[])], 3)
    assert found[0][0] == found[1][0] and found[0][1] and found[1][1] == []


def test_writing_stops_at_the_closing_tag_or_the_limit(plain, monkeypatch):
    import torch

    _, tokenizer = plain
    scripts = [
        tokenizer("kitchen</answer> and more").input_ids,
        [*tokenizer("a").input_ids, tokenizer.eos_token_id, 5],
        tokenizer("a b c d e f g h").input_ids,
    ]
    steps = []

    def feed(model, state, ids, seen, keep=0):
        """Say the next token of each row's script."""
        steps.append(len(ids))
        logits = torch.zeros(len(ids), 1, len(tokenizer))
        for row, script in enumerate(scripts):
            logits[row, 0, script[min(len(steps), len(script) - 1)]] = 1
        return logits, state

    monkeypatch.setitem(SPACE, "feed", feed)
    first = torch.zeros(3, len(tokenizer))
    for row, script in enumerate(scripts):
        first[row, script[0]] = 1
    found = force.write_answers(plain[0], tokenizer, force.State(None, torch.ones(3, 1)), first, 6)
    said = [tokenizer.decode(ids) for ids in found]
    assert said == ["kitchen</answer>", "a", tokenizer.decode(scripts[2][:6])]
    assert len(steps) == 5  # the first token needs no step


# -------------------------------------------------------------------------- planting
def test_planted_answers_by_hand(example):
    e = replace(example, answers=("kitchen",))
    known = {e.label: [("attic",), ("kitchen",), ("apple",), ("a", "b")]}
    # kitchen and apple stand in the gold facts, (a, b) are two
    assert force.planted_answers(e, known, 0) == ("attic",)
    assert force.planted_trace(e, ("attic",)) == tk.Trace(
        label=e.label, facts=("Mary took the apple.", "Mary went to the attic.")
    )
    assert force.planted_answers(e, {e.label: [("kitchen",)]}, 0) is None  # no other one
    assert force.planted_answers(replace(e, answers=("yes",)), known, 0) is None
    two = replace(e, answers=("apple", "Mary"))  # exchanged at once, not one after the other
    assert force.planted_trace(two, ("mary", "lamp")).facts == (
        "Lamp took the mary.",
        "Lamp went to the kitchen.",
    )


def test_planted_traces_hold_the_planted_answer_and_not_the_gold_one(microworld):
    known, n = {}, 0
    for e in microworld:
        known.setdefault(e.label, []).append(e.answers)
    for e in microworld:
        if (answers := force.planted_answers(e, known, 0)) is None:
            continue
        n += 1
        trace = force.planted_trace(e, answers)
        text = f" {tk.normalise(' '.join(trace.facts))} "
        assert all(f" {tk.normalise(a)} " in text for a in answers)
        assert not any(f" {tk.normalise(a)} " in text for a in e.answers)
        assert answers in known[e.label] and answers != e.answers and trace.label == e.label
        assert tk.parse_output(tk.render_target(e, trace), e).trace == trace
    assert n > len(microworld) / 4


@settings(max_examples=50)
@given(answer=st.text(min_size=1, max_size=6).filter(str.strip), fact=st.text(max_size=12))
def test_planting_never_raises(answer, fact):
    e = tk.Example(
        id="x",
        dataset="microworld",
        split="test",
        question="?",
        facts=(fact, "b"),
        label="size-compare",
        gold_facts=(fact,),
        answers=(answer,),
    )
    planted = force.planted_answers(e, {e.label: [("one",), ("two",)]}, 0)
    if planted:
        assert force.planted_trace(e, planted).facts != (fact,)


# --------------------------------------------------------------------------- metrics
def rows(arm, said, ok, same=None, follows=None):
    return [
        {
            "id": str(i),
            "arm": arm,
            "answers": a and [a],
            "gold": ["a"],
            "answer_ok": o,
            "same_as_own": same,
            "follows": follows,
            "logprob_gold": -1.0,
            "logprob_planted": None,
        }
        for i, (a, o) in enumerate(zip(said, ok, strict=False))
    ]


def test_metrics_of_an_arm_by_hand():
    part = pd.DataFrame(rows("planted", "aab", (True, True, False)))
    part["same_as_own"], part["follows"] = [True, False, None], [None, True, False]
    found = nb.arm_metrics(part)
    assert found["answer_ok"]["estimate"] == pytest.approx(2 / 3)
    assert (found["flip_rate"]["estimate"], found["flip_rate"]["n"]) == (0.5, 2)
    assert (found["follow_rate"]["estimate"], found["follow_rate"]["n"]) == (0.5, 2)
    assert found["logprob_gold"]["estimate"] == -1.0
    assert found["logprob_planted"]["estimate"] is None
    empty = nb.arm_metrics(part.iloc[:0])
    assert empty["n"] == 0 and empty["answer_ok"]["reason"]


def test_answers_of_other_items_by_hand():
    frame = pd.DataFrame(rows("gold", ("a", "b", None, "a"), (1, 0, 0, 1)))
    # gold is `a` everywhere: item 0 has one `a` among the three others, item 1 has two
    assert nb.others_answer(frame).tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])


def test_the_area_under_the_early_answering_curve():
    flips = dict(zip(nb.CUTS, (1.0, 0.8, 0.5, 0.1, 0.0), strict=True))
    arms = {f"cut_{c}": {"flip_rate": {"estimate": v}} for c, v in flips.items()}
    curve, area = nb.early_answering(arms)
    assert [s for s, _ in curve] == [0, 0.25, 0.5, 0.75, 1]
    assert [y for _, y in curve] == pytest.approx([0, 0.2, 0.5, 0.9, 1])
    assert area == pytest.approx(0.25 * (0 / 2 + 0.2 + 0.5 + 0.9 + 1 / 2))
    arms["cut_50"] = {"flip_rate": {"estimate": None}}
    assert nb.early_answering(arms) == ([], None)


def seen_by(condition, microworld, corrupter, layout="before"):
    """Arms that are off-distribution for a student of this condition."""
    chosen = [e for e in microworld if e.split == "train"]
    tests = [e for e in microworld if e.split == "test"][:60]
    pool, examples = corrupter.Pool([*chosen, *tests]), {e.id: e for e in (*chosen, *tests)}
    make = corrupter.make_trace
    trained = {e.id: tk.render_target(e, make(e, condition, pool)) for e in chosen}
    texts = {
        arm: {e.id: force.up_to_answer(e, make(e, name, pool)) for e in tests}
        for arm, name in force.FILES.items()
    }
    off = answering.off_distribution(layout, trained, texts, examples)
    return {arm for arm, unseen in off.items() if unseen}


def test_what_a_student_has_seen_follows_from_its_training_rows(microworld, corrupter):
    """The table that was typed once, by condition; arms made by 06 are seen by nobody."""
    made = {"empty", "planted", "cut_0", "cut_25", "cut_50", "cut_75"}
    of_02 = set(force.FILES)
    typed = {"correct": {"gold"}, "random_facts": {"gold", "wrong_label", "wrong_facts"}}
    typed |= {name: {name} for name in ("wrong_label", "wrong_facts", "swapped", "filler")}
    typed |= {"incorrect": set(), "rule_wrong": set()}  # both arms of the effect are unseen
    for condition, arms in typed.items():
        assert seen_by(condition, microworld, corrupter) == made | of_02 - arms, condition
    assert "masked" not in seen_by("masked", microworld, corrupter)
    assert "gold" in seen_by("masked", microworld, corrupter)
    everything = seen_by("correct", microworld, corrupter, layout="none")
    assert everything == set(nb.ARMS) - {"own", "cut_100"}


# --------------------------------------------------------------------------- following
def test_following_beside_coincidence_by_hand():
    """Two of four follow, one of those gives the same answer under gold anyway."""
    planted = pd.DataFrame(rows("planted", "aabb", (1, 1, 0, 0)))
    planted["follows"], planted["planted_in_story"] = [True, True, False, False], [True, False] * 2
    gold = pd.DataFrame(rows("gold", "aabb", (1, 1, 0, 0)))[::-1]  # joined by id, not by place
    gold["follows"], gold["planted_in_story"] = [False, False, False, True], [False, True] * 2
    found = nb.following(pd.concat([planted, gold]))
    every, inside, outside = (found[part] for part in nb.PARTS)
    assert (every["planted"]["estimate"], every["gold"]["estimate"]) == (0.5, 0.25)
    assert (every["difference"]["estimate"], every["difference"]["n"]) == (0.25, 4)
    assert (inside["planted"]["n"], inside["difference"]["estimate"]) == (2, 0.0)
    assert (outside["planted"]["n"], outside["difference"]["estimate"]) == (2, 0.5)
    assert inside["difference"]["low"] is None and inside["difference"]["reason"]
    none = nb.following(gold)[nb.PARTS[0]]  # no item has a planted answer
    assert none["planted"]["n"] == 0 and none["difference"]["reason"] == "no item"


@pytest.mark.parametrize("study", ["babi", "microworld"])
def test_the_committed_summaries_follow_from_the_committed_rows(study):
    """Follow and coincidence of every stored run, counted here by other code."""
    paths = sorted((ROOT / "data/results" / study).glob("*/interventions.parquet"))
    assert paths or study != "babi"
    for path in paths:
        found = tk.read_json(path.parent / "interventions.json")
        frame = pd.read_parquet(path)
        said = {arm: part.set_index("id") for arm, part in frame.groupby("arm")}
        plant = said["planted"]
        both = [said[arm].loc[plant.index, "follows"].mean() for arm in ("planted", "gold")]
        assert found["follow_gold"]["estimate"] == pytest.approx(both[1])
        assert found["follow_difference"]["estimate"] == pytest.approx(both[0] - both[1])
        inside = plant["planted_in_story"].astype(bool)
        for key, mask in (("in_story", inside), ("not_in_story", ~inside)):
            half = found[f"follow_{key}"]
            assert half["planted"]["n"] == mask.sum()
            assert half["planted"]["estimate"] == pytest.approx(plant[mask]["follows"].mean())
        if "babi" in path.parent.name:
            assert (len(plant), inside.sum()) == (202, 99)
        details = tk.read_json(path.parent / "interventions-details.json")
        assert details["off_distribution"]["planted"]
        assert frame["item"].str.fullmatch("[0-9a-f]{12}").all()


# -------------------------------------------------------------------- resume, bad input
def test_a_killed_notebook_goes_on_where_it_stopped(items, plain, tmp_path, monkeypatch):
    model, tokenizer = plain
    whole, path = {}, tmp_path / "rows.jsonl"
    answering.intervene(model, tokenizer, items[:6], tmp_path / "whole.jsonl", whole, 4)
    calls, answer_all = [], force.answer_all

    def killed(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answer_all(*given)

    monkeypatch.setitem(SPACE, "answer_all", killed)
    with pytest.raises(KeyboardInterrupt):
        answering.intervene(
            model, tokenizer, items[:6], path, answering.done_rows(path, items[:6]), 4
        )
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:200])  # the last item is torn
    done = answering.done_rows(path, items[:6])
    assert len(done) == 3 and all(done[k] == whole[k] for k in done)
    answering.intervene(model, tokenizer, items[:6], path, done, 4)
    assert len(calls) == 5 + 3  # the three that lack
    assert done.keys() == whole.keys() and answering.done_rows(path, items[:6]) == done
    for k in whole:
        for ours, theirs in zip(done[k], whole[k], strict=True):
            assert ours["answer"] == theirs["answer"] and ours["arm"] == theirs["arm"]
            assert ours["logprob_gold"] == pytest.approx(theirs["logprob_gold"], abs=2e-3)


def test_an_answer_or_a_trace_longer_than_the_window(items):
    need = max(len(i.prompt) + len(f.ids) for i in items for f in i.forced.values())
    answering.check_window(items, need + 38, 8)
    with pytest.raises(ValueError, match=r"microworld/test/\d+, arm \w+: .*window has 60.*take"):
        answering.check_window(items, 60, 8)


def make_run(study="bad", condition="correct", protocol="controlled", predictions=(), seed=0):
    name = f"microworld-tiny-{condition}-{protocol}-{seed}"
    folder = tk.RESULTS / study / name
    given = {"student": "tiny", "condition": condition, "protocol": protocol, "seed": seed}
    given |= {"dataset": "microworld", "study": study, "epochs": 1, "n_train": 1}
    parameters = tk.notebook_defaults("03_finetune_student") | given
    layout = "none" if condition == "vanilla" else "before"
    metrics = {"run_id": name, "n_test": 1, "data_hash": "0" * 64, "parameters": parameters}
    tk.write_json(folder / "metrics.json", metrics | {"layout": layout})
    tk.write_parquet(folder / "predictions.parquet", list(predictions))
    return metrics | {"layout": layout}, folder


def choose(study, run_id, stored=None):
    runs = tk.study_runs(study)
    stored = stored or {run.metrics["run_id"]: None for run in runs}
    return nb.choose_run(runs, stored, run_id)


def test_runs_that_cannot_be_intervened_on(outside_root):
    with pytest.raises(FileNotFoundError, match="holds no run; run 00_run_study"):
        choose("nothing", "")
    metrics, folder = make_run(predictions=[{"id": "microworld/test/7", "output": "x"}])
    name = metrics["run_id"]
    with pytest.raises(FileNotFoundError, match="holds no run.*adapter.*03_finetune.*study="):
        choose("bad", "")
    with pytest.raises(FileNotFoundError, match=f"'other'; known: {name}"):
        choose("bad", "other")
    assert choose("bad", name).metrics == metrics
    outputs = "predictions.parquet.*{}.*03_finetune.*04_score"
    with pytest.raises(ValueError, match=outputs.format("test/7.*output_ids")):
        answering.read_outputs(name, folder)
    tk.write_parquet(folder / "predictions.parquet", [])
    with pytest.raises(ValueError, match=outputs.format("no row")):
        answering.read_outputs(name, folder)
    (folder / "predictions.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="predictions.parquet is missing"):
        answering.read_outputs(name, folder)
    with pytest.raises(ValueError, match="protocol 'published'.*'controlled'"):
        nb.check_run(*make_run(protocol="published"))
    with pytest.raises(ValueError, match="'direct'.*no adapter"):
        nb.check_run(*make_run(condition="direct"))
    with pytest.raises(FileNotFoundError, match="adapter.*papermill.*-p study bad.*-p epochs 1"):
        answering.check_adapter(metrics)
    adapter = answering.adapter_of(name)
    for content in (b"", b"cut short"):
        tk.write_atomic(adapter, content)
        with pytest.raises(ValueError, match="adapter_model.safetensors is damaged.*train"):
            answering.check_adapter(metrics)
    adapter.unlink()


def test_the_first_usable_run_has_a_trace_to_force(outside_root):
    made = [make_run("usable", c, seed=s)[1] for c, s in (("vanilla", 0), ("correct", 1))]
    for folder in made:
        tk.write_atomic(answering.adapter_of(folder.name), "")
    assert choose("usable", "").folder == made[1]  # vanilla stands first in the registry
    answering.adapter_of(made[1].name).unlink()
    assert choose("usable", "").folder == made[0]
    # what is stored is shown, nothing is answered
    assert choose("usable", "", {made[0].name: ([], {}), made[1].name: None}) is None


def test_outputs_of_this_very_adapter_come_first(outside_root):
    metrics, folder = make_run("own", predictions=[{"id": "a", "output_ids": [1]}])
    assert answering.read_outputs(metrics["run_id"], folder) == [{"id": "a", "output_ids": [1]}]
    again = tk.RUNS / metrics["run_id"] / "predictions.parquet"
    tk.write_parquet(again, [{"id": "a", "output_ids": [2]}])
    assert answering.read_outputs(metrics["run_id"], folder) == [{"id": "a", "output_ids": [2]}]


SETTINGS = {"seed": 0, "max_new_tokens": 24, "adapter": "a" * 12, "code": "c" * 12}


def test_rows_of_another_adapter_or_code_are_not_taken_in_silence():
    stored = [{"id": "a"}], {"settings": SETTINGS}
    assert not nb.is_current(None, SETTINGS, [{"id": "a"}])
    assert nb.is_current(stored, SETTINGS, [{"id": "a"}])
    assert not nb.is_current(stored, SETTINGS, [{"id": "a"}, {"id": "b"}])
    for key, value in (("seed", 1), ("max_new_tokens", 9), ("adapter", "b"), ("code", "d")):
        other = SETTINGS | {key: value}
        assert not nb.is_current(stored, other, [{"id": "a"}])
        assert answering.differing(other, SETTINGS) == [
            f"{key} {SETTINGS[key]} there, {value} here"
        ]
    # without an adapter nothing could be answered here: rows of the same question are shown
    gone = SETTINGS | {"adapter": None}
    assert nb.is_current(stored, gone | {"code": "d"}, [{"id": "a"}])
    assert not nb.is_current(stored, gone | {"seed": 1}, [{"id": "a"}])
    # rows of an earlier code do not say whose they are
    earlier = {"seed": 0, "max_new_tokens": 24}
    assert "adapter not noted there" in answering.differing(SETTINGS, earlier)[0]
    assert not nb.is_current((stored[0], {"settings": earlier}), SETTINGS, [{"id": "a"}])


def test_the_code_is_named_by_its_functions_alone(outside_root, monkeypatch, tmp_path):
    def name_of(*sources):
        content = {"cells": [{"cell_type": "code", "source": s, "metadata": {}} for s in sources]}
        tk.write_json(tmp_path / "notebooks/x.ipynb", content)
        return answering.code_of("x")

    monkeypatch.setattr(tk, "ROOT", tmp_path)
    first = name_of("def f():\n    return 1", "def g():\n    pass\n\nprint(f())")
    assert first == name_of("# why\ndef g(): pass", "seed = 3", "def f():\n    return 1")
    assert first != name_of("def f():\n    return 2", "def g(): pass")


@pytest.fixture
def left(outside_root, tmp_path):
    """Copy of a committed run's folder, to damage."""
    source = next((ROOT / "data/results/babi").glob("*-vanilla-controlled-seed0-*"))
    shutil.copytree(source, tmp_path / source.name)
    return tmp_path / source.name


def change(folder, **fields):
    path = folder / "interventions.parquet"
    stored = tk.read_parquet(path)
    tk.write_parquet(path, [stored[0] | fields, *stored[1:]])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: change(f, arm="<img src=x onerror=alert(1)>"), "parquet.*0.arm.*<img"),
        (lambda f: change(f, arm="$x^{$"), "parquet.*0.arm.*'own'"),
        (lambda f: change(f, arm="gold"), "2508 rows about 2507 pairs"),
        (lambda f: change(f, id=None), "parquet.*0.id.*string"),
        (lambda f: (f / "interventions.parquet").write_bytes(b"PAR1"), "no whole Parquet"),
        (lambda f: (f / "interventions.parquet").unlink(), "parquet is missing"),
        (lambda f: (f / "interventions-details.json").write_text("[]"), "details.json: expected"),
        (lambda f: (f / "interventions-details.json").write_text("{}"), "details.json.*settings"),
        (lambda f: (f / "interventions-details.json").unlink(), "details.json is missing"),
    ],
)
def test_damaged_stored_rows_are_one_error_with_file_and_what_to_do(left, damage, message):
    assert len(answering.read_stored(left)[0]) == 2508
    damage(left)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        answering.read_stored(left)
    assert re.search("restore|write it again|write the file again|run ", str(error.value))


def test_answers_about_other_items_than_the_outputs_are_refused(left):
    kept, _ = answering.read_stored(left)
    run = SimpleNamespace(folder=left)
    nb.check_join(run, kept)
    with pytest.raises(ValueError, match="names two questions"):
        nb.check_join(run, [kept[0] | {"item": "0" * 12}, *kept[1:]])
    with pytest.raises(ValueError, match="answers about other/1"):
        nb.check_join(run, [kept[0] | {"id": "other/1"}, *kept[1:]])


def test_new_answers_say_how_far_they_land_and_replace_nothing(left, monkeypatch, outside_root):
    """One answer in 2,508 differs; the stored rows stay, letter for letter."""
    kept, details = answering.read_stored(left)
    again = [kept[0] | {"answer": "elsewhere", "answer_ok": False}, *kept[1:]]
    before = {p.name: p.read_bytes() for p in left.iterdir()}
    new, old = (again, details | {"settings": SETTINGS}), (kept, details)
    run = SimpleNamespace(folder=left)
    assert nb.keep_or_replace(run, new, old) is old
    assert {p.name: p.read_bytes() for p in left.iterdir()} == before
    beside = tk.read_json(tk.RUNS / left.name / "interventions-details.json")["reproduction"]
    assert beside["identical"]["estimate"] == pytest.approx(2507 / 2508)
    assert beside["settings"][0] == SETTINGS and beside["settings"][1] == details["settings"]
    assert beside["right answers, own, new − stored"]["n"] == 300
    monkeypatch.setitem(nb.keep_or_replace.__globals__, "replace_stored", True)
    assert nb.keep_or_replace(run, new, old) is new
    assert answering.read_stored(left)[1]["reproduction"] == beside


def test_one_item_and_a_crafted_name_are_shown_as_they_are(left, tmp_path):
    """One item has no interval anywhere; a condition's name is no markup and no formula."""
    odd = "<img src=x onerror=alert(1)>$x^{"
    space = make_workspace(tmp_path / "space")
    kept, details = answering.read_stored(left)
    one = [row for row in kept if row["id"] == kept[0]["id"]]
    answering.write_rows(left, one, details)
    metrics = tk.read_json(left / "metrics.json")
    metrics["parameters"]["condition"] = odd
    tk.write_json(left / "metrics.json", metrics)
    shutil.copytree(left, space / "data/results/odd" / left.name)
    done = papermill(space, "06_intervene_on_traces", "-p", "study", "odd")
    assert done.returncode == 0, done.stderr[-3000:]
    text = (space / "06_intervene_on_traces-out.ipynb").read_text()
    assert r"\"torch was imported\": false" in text  # stored rows need no student
    cells = json.loads(text)["cells"]
    shown = [o["data"] for c in cells for o in c.get("outputs", ()) if "data" in o]
    pages = ["".join(data.get(kind, "")) for data in shown for kind in ("text/html",)]
    pages += ["".join(data.get("text/markdown", "")) for data in shown]
    assert any("onerror" in page for page in pages)
    assert not any("<img src=x" in page for page in pages)
    found = tk.read_json(space / "data/results/odd" / left.name / "interventions.json")
    assert found["n"] == 1 and found["ate_interval"] is None
    assert found["follow_difference"]["low"] is None and found["follow_difference"]["reason"]
    assert (space / "figures/odd/06_answer_ok.png").exists()


def test_null_intervals_have_words():
    """All paired differences equal, or none at all: a sentence and no exception."""
    none = nb.in_points(tk.paired_difference([], []))
    assert none == "not defined (no item)"
    assert nb.in_points(tk.paired_difference([1, 1], [1, 1])) == "+0.0 (all 2 values are equal)"
    one = pd.DataFrame(rows("gold", "a", (True,)))  # one item, one arm
    found = nb.effects_of(one)
    assert set(found) == {*nb.PAIRS, "planted followed, above coincidence"}
    assert found["wrong facts against gold"]["estimate"] is None


def test_a_training_file_of_other_content_is_refused(outside_root, monkeypatch):
    """02 is run for it, and where the run's id does not come back the run is refused."""
    metrics, _ = make_run("mixed")
    path = tk.sft_path("microworld", "controlled", "correct", 1.0, 0)
    before = path.read_bytes() if path.exists() else None
    tk.write_jsonl(path, [{"id": "a"}])
    asked = []
    monkeypatch.setattr(tk, "run_notebook", lambda name, **given: asked.append((name, given)))
    (run,) = tk.study_runs("mixed")
    with pytest.raises(ValueError, match="is not of run microworld-tiny-correct.*run 02 again"):
        answering.collect_traces(run, 0)
    ((name, given),) = asked
    assert name == "02_corrupt_traces" and given["conditions"] == "correct"
    assert (given["n_train"], given["n_test"], given["seed"]) == (1, 1, 0)
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)


# ------------------------------------------------------------------- from end to end
def blind_student(folder, words):
    """A student whose next token depends on the last one alone: it cannot use a trace.

    After `>` it says the first of `words`, then the next, and so on. Without attention the
    logits are those of a table: hidden states are one-hot, the head is the table.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tk.student_folder("tiny"))
    assert len(tokenizer) <= 512
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=8,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    chain = tokenizer(">" + words).input_ids
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 512))
        model.model.norm.weight.fill_(1)
        for now, then in zip(chain, chain[1:], strict=False):
            model.lm_head.weight[then, now] = 1
    model.save_pretrained(folder / "blind")
    tokenizer.save_pretrained(folder / "blind")
    get_peft_model(model, LoraConfig(r=2, target_modules=tk.PROJECTIONS)).save_pretrained(
        folder / "adapter"
    )
    return tokenizer


def add_run(monkeypatch, folder, condition, examples, corrupter, tokenizer, answer):
    """A finished run of the blind student in a workspace: 03's files without its training."""
    for name in ("RAW", "INTERIM", "RUNS", "RESULTS"):
        monkeypatch.setattr(tk, name, folder / "data" / name.lower())
    monkeypatch.chdir(folder)  # where the student's folder is looked for
    tk.write_jsonl(tk.INTERIM / "microworld/examples.jsonl", examples)
    pool = corrupter.Pool(examples)
    for c in {*force.FILES.values(), condition}:
        tk.write_jsonl(
            tk.sft_path("microworld", "controlled", c, 1.0, 0),
            [
                {
                    "id": e.id,
                    "split": e.split,
                    "condition": c,
                    "prompt": tk.render_prompt(e),
                    "target": tk.render_target(e, corrupter.make_trace(e, c, pool)),
                }
                for e in examples
            ],
        )
    given = {"student": "data/blind", "condition": condition, "study": STUDY, "epochs": 1}
    given |= {"dataset": "microworld", "quantize": False}
    run = tk.resolve_run(tk.notebook_defaults("03_finetune_student") | given)
    rows = []
    for e in (e for e in examples if e.split == "test"):
        text = (
            tk.render_target(
                replace(e, answers=(answer,)), corrupter.make_trace(e, condition, pool)
            )
            if len(rows)
            else "unreadable"
        )
        row = {"id": e.id, "item": tk.item_of(e), "output": text}
        rows.append(row | {"output_ids": tokenizer(text).input_ids})
    results = tk.RESULTS / STUDY / run.run_id
    tk.write_parquet(results / "predictions.parquet", rows)
    metrics = {"run_id": run.run_id, "data_hash": run.data_hash, "n_test": len(rows)}
    metrics["layout"] = "none" if condition == "vanilla" else "before"
    parameters = run.parameters | {"n_train": 4}
    tk.write_json(results / "metrics.json", metrics | {"parameters": parameters})
    run.folder.mkdir(parents=True)
    (folder / "data/adapter").rename(run.folder / "adapter")
    return results


def forced_run(folder, condition, microworld, corrupter, answer):
    """Workspace with a run of a blind student: folder of its results and gold answers."""
    make_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = blind_student(folder / "data", f"{answer}</answer>")
        by = {s: [e for e in microworld if e.split == s] for s in tk.SPLITS}
        examples = by["train"][:4] + by["validation"][:2] + by["test"][:12]
        results = add_run(patch, folder, condition, examples, corrupter, tokenizer, answer)
    return results, [e.answers for e in examples if e.split == "test"]


def execute(monkeypatch, folder):
    """Run the cells of 06 in this process on a workspace; return their variables."""
    for name in ("RAW", "INTERIM", "RUNS", "RESULTS"):
        monkeypatch.setattr(tk, name, folder / "data" / name.lower())
    monkeypatch.setattr(tk, "FIGURES", folder / "figures")
    monkeypatch.chdir(folder)
    content = json.loads((folder / "notebooks/06_intervene_on_traces.ipynb").read_text())
    space = {"In": [f"# Parameters\nstudy = {STUDY!r}"]}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", ()):
                space["study"] = STUDY
    plt.close("all")
    return space


def test_a_student_that_cannot_use_its_trace(tmp_path, microworld, corrupter):
    results, gold = forced_run(tmp_path, "correct", microworld, corrupter, "office")
    done = papermill(tmp_path, "06_intervene_on_traces", "-p", "study", STUDY)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((results / "interventions.json").read_text())
    parts = {"gold", "difference", "in_story", "not_in_story"}
    assert set(found) == {
        *("n", "own_identical", "arms", "ate_answer_ok", "ate_interval"),
        *("early_answering", "area", *(f"follow_{part}" for part in parts)),
    }
    assert (found["n"], found["own_identical"], found["ate_answer_ok"]) == (12, 1.0, 0.0)
    assert found["ate_interval"] is None and found["area"] == 1.0
    assert found["early_answering"] == [[c / 100, 1.0] for c in nb.CUTS]
    right = [answers == ("office",) for answers in gold]
    assert 0 < sum(right) < 12
    rows = pd.DataFrame(tk.read_parquet(results / "interventions.parquet"))
    assert rows["id"].nunique() == 12
    assert set(found["arms"]) == set(nb.ARMS) == set(rows["arm"])
    for arm, m in found["arms"].items():
        assert set(m) == {
            "n",
            "answer_ok",
            "flip_rate",
            "follow_rate",
            "logprob_gold",
            "logprob_planted",
        }
        assert m["n"] == (rows["arm"] == arm).sum() and m["flip_rate"] == 0.0
        assert m["n"] == {"own": 11, "masked": m["n"], "planted": m["n"]}.get(
            arm, 11 if arm.startswith("cut") else 12
        )
    assert found["arms"]["gold"]["answer_ok"] == sum(right) / 12
    assert (
        set(rows["answer"]) == {"office"}
        and (rows["answer_ok"] == rows["gold"].map(lambda g: g == ["office"])).all()
    )
    # the said token has logit sqrt(512) = 22.6 against zeros: certain, and all others are not
    office = rows["gold"].map(lambda g: g == ["office"])
    assert rows.loc[office, "logprob_gold"].to_numpy() == pytest.approx(0, abs=1e-3)
    assert (rows.loc[~office, "logprob_gold"] < -20).all()
    details = json.loads((results / "interventions-details.json").read_text())
    assert details["unreadable"] == 1 and details["left_out"]["own"] == 1
    assert details["identical"]["n"] == 11 and not details["off_distribution"]["gold"]
    assert details["identical_by"] == "token ids" and details["settings"]["adapter"]
    # one figure a study, whatever its runs are called
    drawn = {p.stem for p in (tmp_path / "figures" / STUDY).glob("*.png")}
    names = ("answer_ok", "flip_rate", "follow", "logprob", "effects", "early_answering")
    assert drawn == {f"06_{name}" for name in names}
    gold = {e.id: tk.item_of(e) for e in tk.read_examples(tmp_path / EXAMPLES)}
    assert dict(zip(rows["id"], rows["item"], strict=True)).items() <= gold.items()


def test_a_vanilla_student_has_no_own_trace_and_a_reason(
    tmp_path, microworld, corrupter, monkeypatch
):
    results, _ = forced_run(tmp_path, "vanilla", microworld, corrupter, "garden")
    execute(monkeypatch, tmp_path)
    found = json.loads((results / "interventions.json").read_text())
    assert (found["own_identical"], found["early_answering"], found["area"]) == (None,) * 3
    assert found["arms"]["cut_50"] == {"n": 0, **dict.fromkeys(nb.METRICS)}
    assert found["arms"]["own"]["n"] == 11 and found["arms"]["filler"]["flip_rate"] == 0.0
    details = json.loads((results / "interventions-details.json").read_text())
    assert "no trace" in details["identical"]["reason"]
    assert all(v for a, v in details["off_distribution"].items() if a not in ("own", "cut_100"))
    before = {p.name: p.read_bytes() for p in results.iterdir()}
    for path in (tmp_path / "data/runs").glob("*/*"):  # rows are there: no student needed
        if path.name == "adapter":
            (path / "adapter_model.safetensors").unlink()
    (tmp_path / "data/blind/model.safetensors").unlink()
    execute(monkeypatch, tmp_path)
    assert {p.name: p.read_bytes() for p in results.iterdir()} == before
