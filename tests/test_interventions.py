"""Forced traces: tokens, cached answers, planted answers, metrics, resuming, bad runs."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import make_workspace, notebook_functions, papermill
from hypothesis import given, settings
from hypothesis import strategies as st

import tracekd_utils as tk

nb = notebook_functions("06_intervene_on_traces")
SPACE = nb.make_item.__globals__  # what the notebook's functions see as globals
STUDY = "forced"


@pytest.fixture(scope="module")
def plain():
    """The tiny student in float32, its weights enlarged so that every token matters."""
    import torch

    model, tokenizer = tk.load_student("tiny", quantize=False)
    with torch.no_grad():
        for p in model.float().parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    return model, tokenizer


@pytest.fixture
def items(microworld, corrupter, plain, monkeypatch):
    """Ten items whose own trace is the gold one, with all that is forced on them."""
    examples = [e for e in microworld if e.split == "test"][:10]
    pool = corrupter.Pool(examples)
    texts = {
        a: {
            e.id: tk.render_target(e, corrupter.make_trace(e, c, pool)).partition("<answer>")[0]
            + "<answer>"
            for e in examples
        }
        for a, c in nb.FILES.items()
    }
    for name, value in (
        ("examples", {e.id: e for e in examples}),
        ("texts", texts),
        ("prompts", {e.id: tk.render_prompt(e) for e in examples}),
        ("run", {"protocol": "controlled"}),
    ):
        monkeypatch.setitem(SPACE, name, value)
    known = nb.answers_of(examples)
    return [
        nb.make_item(
            plain[1],
            {"id": e.id, "output": text, "output_ids": plain[1](text).input_ids},
            "before",
            known,
        )
        for e in examples
        for text in [texts["gold"][e.id] + "; ".join(e.answers) + "</answer>"]
    ]


# ------------------------------------------------------------------------- tokens
def test_forced_tokens_and_answers_are_those_of_training(items, plain):
    tokenizer = plain[1]
    for item in items:
        for arm, text in ((a, SPACE["texts"][a][item.example.id]) for a in nb.FILES):
            if arm not in item.forced:
                assert arm == "masked"
                continue
            forced = item.forced[arm]
            target = text + "; ".join(item.example.answers) + "</answer>"
            ids, _ = tk.encode(tokenizer, tk.render_prompt(item.example), target)
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
    other = nb.force_text(tokenizer, "<answer>", ["kitchen</answer>"])
    forced = nb.force_own(tokenizer, letters, other)
    head = text.partition("kitchen")[0]
    assert forced.ids == letters[: len(head)] and forced.lead == ""
    assert forced.tails == other.tails
    half = nb.force_cut(tokenizer, letters, 0.5, ["kitchen</answer>"])
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
    other = nb.force_text(tokenizer, "<answer>", ["a</answer>"])
    forced = nb.force_own(tokenizer, ids, other)
    assert (forced is not None) is own
    assert not own or tokenizer.decode(forced.ids) == text.partition("<answer>")[0] + "<answer>"
    assert (nb.force_cut(tokenizer, ids, 0.5, ["a</answer>"]) is not None) is cut


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
    forced = nb.force_text(joins, head, ends)
    assert forced.lead == ">"
    for tail, end in zip(forced.tails, ends):
        assert forced.ids + tail == joins(head + end).input_ids
    assert nb.read_answer(">kitchen</answer>", forced, example) == ("kitchen", ("kitchen",))
    assert nb.read_answer("kitchen</answer>", forced, example)[1] is None


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
    batch = items[:4]  # prompts and traces of unequal length
    assert len({len(i.prompt) for i in batch}) > 1
    jobs = [(n, f) for n, i in enumerate(batch) for f in i.forced.values()]
    found = nb.answer_all(model, tokenizer, [i.prompt for i in batch], jobs, 12)
    plainly = tk.generate(
        model,
        tokenizer,
        [batch[n].prompt + f.ids for n, f in jobs],
        max_new_tokens=12,
        batch_size=1,
    )
    for (n, forced), (text, values), ids in zip(jobs, found, plainly):
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(values) == len(forced.tails) == 1 + bool(batch[n].planted)
        for tail, value in zip(forced.tails, values):
            assert value == pytest.approx(
                reference(model, tokenizer, batch[n].prompt, forced, tail), abs=2e-3
            )
    alone = [
        nb.answer_all(model, tokenizer, [batch[n].prompt], [(0, f)], 12)[0] for n, f in jobs[::5]
    ]
    assert [a[0] for a in alone] == [f[0] for f in found[::5]]
    spread = pd.Series([v[0] for _, v in found]).std()
    assert spread > 0.5  # traces change what is compared, by far more than its tolerance


def test_writing_stops_at_the_closing_tag_or_the_limit(plain, monkeypatch):
    import torch

    _, tokenizer = plain
    scripts = [
        tokenizer("kitchen</answer> and more").input_ids,
        [*tokenizer("a").input_ids, tokenizer.eos_token_id, 5],
        tokenizer("a b c d e f g h").input_ids,
    ]

    def feed(model, state, ids, seen, keep):
        """Say the next token of the script that the row's last token belongs to."""
        rows, cache = len(ids), state.cache
        cache.step += 1
        logits = torch.zeros(rows, 1, len(tokenizer))
        for at, row in enumerate(cache.rows):
            logits[at, 0, scripts[row][cache.step]] = 1
        return logits, state

    class Cache:
        """Stands for keys and values; remembers which rows are left."""

        step, rows = 0, [0, 1, 2]

        def batch_select_indices(self, which):
            self.rows = [self.rows[k] for k in which.tolist()]

    monkeypatch.setitem(SPACE, "feed", feed)
    first = torch.zeros(3, len(tokenizer))
    for row, script in enumerate(scripts):
        first[row, script[0]] = 1
    found = nb.write_answers(plain[0], tokenizer, nb.State(Cache(), torch.ones(3, 1)), first, 6)
    assert found == ["kitchen</answer>", "a", tokenizer.decode(scripts[2][:6])]


# -------------------------------------------------------------------------- planting
def test_planted_answers_by_hand(example):
    e = replace(example, answers=("kitchen",))
    known = {e.label: [("attic",), ("kitchen",), ("apple",), ("a", "b")]}
    # kitchen and apple stand in the gold facts, (a, b) are two
    assert nb.planted_answers(e, known, 0) == ("attic",)
    assert nb.planted_trace(e, ("attic",)) == tk.Trace(
        label=e.label, facts=("Mary took the apple.", "Mary went to the attic.")
    )
    assert nb.planted_answers(e, {e.label: [("kitchen",)]}, 0) is None  # no other one
    assert nb.planted_answers(replace(e, answers=("yes",)), known, 0) is None
    two = replace(e, answers=("apple", "Mary"))  # exchanged at once, not one after the other
    assert nb.planted_trace(two, ("mary", "lamp")).facts == (
        "Lamp took the mary.",
        "Lamp went to the kitchen.",
    )


def test_planted_traces_hold_the_planted_answer_and_not_the_gold_one(microworld):
    known, n = nb.answers_of(microworld), 0
    for e in microworld:
        if (answers := nb.planted_answers(e, known, 0)) is None:
            continue
        n += 1
        trace = nb.planted_trace(e, answers)
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
    planted = nb.planted_answers(e, {e.label: [("one",), ("two",)]}, 0)
    if planted:
        assert nb.planted_trace(e, planted).facts != (fact,)


# --------------------------------------------------------------------------- metrics
def test_means_by_hand_and_without_spread():
    found = nb.mean_interval([0.0, 1.0, None, 1.0, 0.0])
    assert (found["estimate"], found["n"], found["reason"]) == (0.5, 4, None)
    assert found["low"] == 0.0 and found["high"] == 1.0  # 4 items: both ends are reached
    same = nb.mean_interval([2.0, 2.0])
    assert (same["estimate"], same["low"], same["high"]) == (2.0, None, None)
    assert same["reason"] == "all 2 values are equal"
    assert nb.mean_interval([])["estimate"] is None
    assert nb.mean_interval([None])["reason"] == "no item"


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
        for i, (a, o) in enumerate(zip(said, ok))
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


def test_the_area_under_the_early_answering_curve(monkeypatch):
    flips = dict(zip(nb.CUTS, (1.0, 0.8, 0.5, 0.1, 0.0)))
    monkeypatch.setitem(
        SPACE, "arms", {f"cut_{c}": {"flip_rate": {"estimate": v}} for c, v in flips.items()}
    )
    curve, area = nb.early_answering()
    assert [s for s, _ in curve] == [0, 0.25, 0.5, 0.75, 1]
    assert [y for _, y in curve] == pytest.approx([0, 0.2, 0.5, 0.9, 1])
    assert area == pytest.approx(0.25 * (0 / 2 + 0.2 + 0.5 + 0.9 + 1 / 2))
    SPACE["arms"]["cut_50"] = {"flip_rate": {"estimate": None}}
    assert nb.early_answering() == ([], None)


def test_what_a_student_has_seen():
    off = nb.off_distribution
    assert not off("correct", 1.0, "gold") and off("correct", 1.0, "masked")
    assert not off("masked", 1.0, "masked") and off("masked", 1.0, "gold")
    assert not off("masked", 0.5, "gold")  # the other half of its rows were correct
    assert all(off("vanilla", 1.0, a) for a in nb.ARMS if a not in ("own", "cut_100"))
    assert set(nb.SEEN) <= set(tk.LAYOUTS)


# -------------------------------------------------------------------- resume, bad input
def test_a_killed_notebook_goes_on_where_it_stopped(items, plain, tmp_path, monkeypatch):
    model, tokenizer = plain
    monkeypatch.setitem(SPACE, "batch_size", 2)
    monkeypatch.setitem(SPACE, "max_new_tokens", 4)
    whole, path = {}, tmp_path / "rows.jsonl"
    nb.intervene(model, tokenizer, items[:6], tmp_path / "whole.jsonl", whole)
    calls, answer_all = [], nb.answer_all

    def killed(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_all(*given)

    monkeypatch.setitem(SPACE, "answer_all", killed)
    with pytest.raises(KeyboardInterrupt):
        nb.intervene(model, tokenizer, items[:6], path, nb.done_rows(path, items[:6]))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])  # the last item is torn
    done = nb.done_rows(path, items[:6])
    assert len(done) == 3 and all(done[k] == whole[k] for k in done)
    nb.intervene(model, tokenizer, items[:6], path, done)
    assert [len(given[2]) for given in calls[3:]] and len(calls) == 5  # 3 items in 2 batches
    assert done.keys() == whole.keys()
    for k in whole:
        for ours, theirs in zip(done[k], whole[k], strict=True):
            assert ours["answer"] == theirs["answer"] and ours["arm"] == theirs["arm"]
            assert ours["logprob_gold"] == pytest.approx(theirs["logprob_gold"], abs=2e-3)


def test_an_answer_or_a_trace_longer_than_the_window(items):
    need = max(len(i.prompt) + len(f.ids) for i in items for f in i.forced.values()) + 8
    nb.check_window(items, need + 30, 8)
    with pytest.raises(ValueError, match=r"microworld/test/\d+, arm \w+: .*window has 60.*take"):
        nb.check_window(items, 60, 8)


def make_run(
    study="bad", condition="correct", protocol="controlled", predictions=(), name="microworld-tiny"
):
    folder = tk.RESULTS / study / name
    metrics = {
        "run_id": name,
        "n_test": 1,
        "data_hash": "0" * 64,
        "parameters": {
            **tk.notebook_defaults("03_finetune_student"),
            "student": "tiny",
            "n_train": 1,
            "condition": condition,
            "protocol": protocol,
            "study": study,
            "epochs": 1,
        },
    }
    tk.write_json(folder / "metrics.json", metrics)
    tk.write_jsonl(folder / "predictions.jsonl", predictions)
    return metrics, folder


def test_runs_that_cannot_be_intervened_on(outside_root):
    with pytest.raises(FileNotFoundError, match="holds no run whose adapter.*03_finetune"):
        nb.find_run("nothing", "")
    metrics, folder = make_run(predictions=[{"id": "microworld/test/7", "output": "x"}])
    with pytest.raises(FileNotFoundError, match="'other'; known: microworld-tiny"):
        nb.find_run("bad", "other")
    assert nb.find_run("bad", "microworld-tiny") == metrics
    with pytest.raises(ValueError, match="predictions.jsonl.*test/7.*output_ids.*03_finetune"):
        nb.check_run(metrics, folder)
    tk.write_jsonl(folder / "predictions.jsonl", [])
    with pytest.raises(ValueError, match="no row.*03_finetune"):
        nb.check_run(metrics, folder)
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="predictions.jsonl is missing.*03_finetune"):
        nb.check_run(metrics, folder)
    with pytest.raises(ValueError, match="protocol 'published'.*'controlled'"):
        nb.check_run(*make_run(protocol="published"))
    with pytest.raises(ValueError, match="'direct'.*no adapter"):
        nb.check_run(*make_run(condition="direct"))
    with pytest.raises(FileNotFoundError, match="adapter.*papermill.*-p study bad.*-p epochs 1"):
        nb.check_adapter(metrics)


def test_a_training_file_of_other_content_is_refused(outside_root, monkeypatch):
    metrics, _ = make_run(name="microworld-tiny-correct")
    path = tk.sft_path("microworld", "controlled", "correct", 1.0, 0)
    before = path.read_bytes() if path.exists() else None
    tk.write_jsonl(path, [{"id": "a"}])
    with pytest.raises(
        ValueError, match="not the training file of microworld-tiny-correct.*run 01 and 02 again"
    ):
        nb.training_rows(metrics)
    path.unlink() if before is None else path.write_bytes(before)


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
        for now, then in zip(chain, chain[1:]):
            model.lm_head.weight[then, now] = 1
    model.save_pretrained(folder / "blind")
    tokenizer.save_pretrained(folder / "blind")
    get_peft_model(model, LoraConfig(r=2, target_modules=tk.PROJECTIONS)).save_pretrained(
        folder / "adapter"
    )
    return tokenizer


def add_run(monkeypatch, folder, condition, examples, corrupter, tokenizer, answer):
    """A finished run of the blind student in a workspace: 03's files without its training."""
    for name in ("INTERIM", "RUNS", "RESULTS"):
        monkeypatch.setattr(tk, name, folder / "data" / name.lower())
    tk.write_jsonl(tk.INTERIM / "microworld/examples.jsonl", examples)
    pool = corrupter.Pool(examples)
    for c in {*nb.FILES.values(), condition}:
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
    run = tk.resolve_run(
        {
            **tk.notebook_defaults("03_finetune_student"),
            "epochs": 1,
            "student": "data/blind",
            "condition": condition,
            "study": STUDY,
            "quantize": False,
        },
        STUDY,
    )
    rows = []
    for e in (e for e in examples if e.split == "test"):
        text = (
            tk.render_target(
                replace(e, answers=(answer,)), corrupter.make_trace(e, condition, pool)
            )
            if len(rows)
            else "unreadable"
        )
        rows.append({"id": e.id, "output": text, "output_ids": tokenizer(text).input_ids})
    tk.write_jsonl(run["results_dir"] / "predictions.jsonl", rows)
    tk.write_json(
        run["results_dir"] / "metrics.json",
        {
            "parameters": {**run["parameters"], "n_train": 4},
            "n_test": len(rows),
            "run_id": run["run_id"],
            "data_hash": run["data_hash"],
        },
    )
    run["run_dir"].mkdir(parents=True)
    (folder / "data/adapter").rename(run["run_dir"] / "adapter")
    return run["results_dir"]


def forced_run(folder, condition, microworld, corrupter, answer):
    """Workspace with a run of a blind student: folder of its results and gold answers."""
    (make_workspace(folder) / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = blind_student(folder / "data", f"{answer}</answer>")
        by = {s: [e for e in microworld if e.split == s] for s in tk.SPLITS}
        examples = by["train"][:4] + by["validation"][:2] + by["test"][:12]
        results = add_run(patch, folder, condition, examples, corrupter, tokenizer, answer)
    return results, [e.answers for e in examples if e.split == "test"]


def execute(monkeypatch, folder):
    """Run the cells of 06 in this process on a workspace; return their variables."""
    for name in ("INTERIM", "RUNS", "RESULTS"):
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
    assert set(found) == {
        "n",
        "own_identical",
        "arms",
        "ate_answer_ok",
        "ate_interval",
        "early_answering",
        "area",
    }
    assert (found["n"], found["own_identical"], found["ate_answer_ok"]) == (12, 1.0, 0.0)
    assert found["ate_interval"] is None and found["area"] == 1.0
    assert found["early_answering"] == [[c / 100, 1.0] for c in nb.CUTS]
    right = [answers == ("office",) for answers in gold]
    assert 0 < sum(right) < 12
    lines = tk.read_jsonl(results / "interventions.jsonl")
    assert len(lines) == 12 and nb.fold(nb.unfold(lines)) == lines
    rows = pd.DataFrame(nb.unfold(lines))
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
    drawn = {p.name.split("_correct_")[0] for p in (tmp_path / "figures" / STUDY).glob("*.png")}
    assert drawn == {
        f"06_{m}"
        for m in ("answer_ok", "flip_rate", "follow_rate", "logprob", "effects", "early_answering")
    }


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
    assert execute(monkeypatch, tmp_path)["items"] == []
    assert {p.name: p.read_bytes() for p in results.iterdir()} == before
