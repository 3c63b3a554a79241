"""Protocol `published`: the authors' text letter for letter, their corruptions, the reading of
their outputs and of ours, and their way of training and decoding.

The authors' gold rows are needed: without `TRACEKD_DATA_DIR` these tests fail, not skip.
"""

import ast
import copy
import csv
import json
import random
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import make_workspace, notebook_functions, papermill
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

import tracekd_utils as tk

nb = notebook_functions("02_corrupt_traces", protocol="published")
trainer = notebook_functions("03_finetune_student", protocol="published")
ROWS = {"cotempqa": 950, "babi": 376}
CONDITIONS = ("direct", "vanilla", "correct", "incorrect")


@pytest.fixture(scope="module")
def gold(data_dir):
    """{dataset: [(example, its row of the authors' gold table), …]}.

    Gold facts of CoTempQA are left empty: our code has to find them.
    """
    found = {}
    for dataset in ROWS:
        audit = notebook_functions("09_reaudit_published", dataset=dataset)
        for path in sorted((data_dir / "published" / dataset / "gold").glob("*.csv")):
            problems = []
            items = audit.read_gold(path, problems)
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            assert problems == [] and len(items) == len(rows)
            for k, (item, row) in enumerate(zip(items, rows, strict=True)):
                e = replace(item, id=f"{dataset}/test/{path.stem}/{k:04d}")
                if dataset == "cotempqa":
                    e = replace(e, gold_facts=())
                found.setdefault(dataset, []).append((e, row))
    return found


def published(example, condition="correct", seed=0):
    """(trace, target) of an example under a condition."""
    trace = nb.make_trace(example, condition, None, seed)
    return trace, tk.render_target(example, trace, "published")


# ---------------------------------------------------------------------- letter for letter


@pytest.mark.parametrize("dataset", ROWS)
def test_prompts_and_targets_are_the_authors_letter_for_letter(gold, dataset):
    same = Counter()
    for e, row in gold[dataset]:
        user, assistant = ast.literal_eval(row["messages"])
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        same["prompts"] += tk.render_prompt(e, "published") == user["content"]
        same["targets"] += published(e)[1] == assistant["content"]
        same["vanilla"] += published(e, "vanilla")[1] == row["answer"]
    print(f"\n{dataset}: {dict(same)} of {len(gold[dataset])} gold rows are the same")
    assert same == dict.fromkeys(("prompts", "targets", "vanilla"), ROWS[dataset])


def test_the_untuned_student_gets_the_same_prompt(gold):
    for e, _ in gold["babi"][:20]:
        assert tk.render_prompt(e, "published", direct=True) == tk.render_prompt(e, "published")


def test_our_reading_of_babi_gives_the_authors_gold(gold, data_dir):
    """Annotation and first question of each story as 10 reads them out of the raw files."""
    reader = notebook_functions("10_decompose_babi", dataset="babi")
    ours = {
        (asked.facts, asked.question): (label, asked.answers, asked.gold_facts)
        for split, _, label, questions in reader.babi_stories(data_dir / "babi/en", "babi")
        for asked in questions[:1]
        if split == "test"
    }
    for e, _ in gold["babi"]:
        label, answers, sentences = ours[e.facts, e.question.strip()]
        mine = replace(e, label=label, answers=answers, gold_facts=sentences)
        assert published(mine)[1] == published(e)[1]


def test_where_the_gold_facts_of_the_two_protocols_differ_is_counted(data_dir):
    reader = notebook_functions("11_decompose_cotempqa")
    rows = [row.example for row in reader.cotempqa_rows(data_dir / "cotempqa")]
    rows = [e for e in rows if e.split == "test"]
    more = sum(set(nb.published_gold(e)) > set(e.gold_facts) for e in rows)
    other = sum(set(nb.published_gold(e)) != set(e.gold_facts) for e in rows)
    print(
        f"\npublished gold facts differ from the controlled ones in {other} of {len(rows)} "
        f"CoTempQA test rows; in {more} they are more"
    )
    assert len(rows) == 950 and other == more and 0 < more < 300


PASSAGES = (
    "A sty is an infection of an oil gland.",
    "Penicillin treats infections.",
    "Oily hands have many causes.",
    "Tea comes from China.",
    "The gland of a sty is in the eyelid.",
)


def marco():
    """An example in the shape of MARCO, whose texts are not the dataset's."""
    return tk.Example(
        id="marco/test/1",
        dataset="marco",
        split="test",
        question="sty causes",
        facts=PASSAGES,
        label="DESCRIPTION",
        gold_facts=PASSAGES[:1],
        answers=("Infections of the oil glands in the eyelid", "an infection"),
    )


def test_marco_has_the_form_of_the_description():
    e = marco()
    assert tk.render_prompt(e, "published") == (
        "Answer the question based on the context:\n"
        + "\n".join(PASSAGES)
        + "\nQuestion: sty causes\nOnly return the answer.\n"
    )
    trace, target = published(e)  # of, the, in, eyelid against of, oil
    assert trace == tk.Trace(label="DESCRIPTION", text=PASSAGES[4])
    assert target == (
        "<think>The category of the question represents what is being asked in that question. "
        "The category of the question asked is: DESCRIPTION.\nI need to use the following text "
        f"to answer the question: {PASSAGES[4]}</think> <answer>Infections of the oil glands in "
        "the eyelid</answer>"
    )
    drawn = Counter(published(e, "incorrect", seed)[0].text for seed in range(200))
    assert set(drawn) == set(PASSAGES[1:3])  # the half that shares no word with the gold one


# ---------------------------------------------------------------------------- corruptions


def test_the_incorrect_trace_of_cotempqa_is_one_bare_fact(gold):
    part = [e for e, _ in gold["cotempqa"] if set(nb.published_gold(e)) < set(e.facts)]
    print(f"\n{950 - len(part)} of 950 CoTempQA rows have no wrong fact")
    assert len(part) > 900
    for e in part:
        right, (trace, target) = published(e)[0], published(e, "incorrect")
        assert (
            right.label == e.label != trace.label and trace.label in tk.dataset("cotempqa").labels
        )
        assert trace.facts == () and trace.text in e.facts
        assert not any(a in trace.text for a in e.answers)
        assert f"the question: {trace.text}</think> <answer>['" in target.replace('"', "'")


def test_an_item_without_a_wrong_fact_is_refused_by_name(gold):
    for dataset in ROWS:
        e = gold[dataset][0][0]
        e = replace(e, facts=(f"It is {e.answers[0]}.",), gold_facts=(f"It is {e.answers[0]}.",))
        with pytest.raises(ValueError, match=f"{e.id}.*1 gold and only 0 other"):
            published(e, "incorrect")


def test_the_incorrect_trace_of_babi_is_lower_case_and_as_long(gold):
    seen = 0
    for e, _ in gold["babi"]:
        others = [f for f in e.facts if f not in e.gold_facts]
        if len(others) < len(set(e.gold_facts)):
            continue  # 02 leaves such items out
        trace, _ = published(e, "incorrect")
        assert trace.label != e.label and trace.label in tk.dataset("babi").labels
        assert len(trace.facts) == len(set(e.gold_facts))
        assert all(f == f.lower() for f in trace.facts)
        assert not {f.lower() for f in e.gold_facts} & set(trace.facts)
        assert not Counter(trace.facts) - Counter(f.lower() for f in others)
        seen += 1
    assert seen > 300


def test_wrong_labels_are_drawn_evenly_whatever_their_frequency(gold):
    e, _ = gold["cotempqa"][0]
    drawn = Counter(published(replace(e, id=f"x/{k}"), "incorrect")[0].label for k in range(3000))
    assert set(drawn) == set(tk.dataset("cotempqa").labels) - {e.label}
    assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_the_rest_of_a_dose_has_the_authors_correct_trace(gold):
    for e, _ in gold["cotempqa"][::50]:
        assert nb.make_trace(e, "incorrect", None, 0, dose=0.0) == published(e)[0]


@pytest.mark.parametrize(
    "notebook, name",
    [
        ("00_run_study", "conditions"),
        ("02_corrupt_traces", "conditions"),
        ("03_finetune_student", "condition"),
    ],
)
def test_other_conditions_are_refused(notebook, name):
    values = {**tk.notebook_defaults(notebook), "protocol": "published"}
    assert tuple(nb.PUBLISHED) == tuple(tk.conditions("published")) == CONDITIONS
    for condition in CONDITIONS:
        assert tk.check_parameters(notebook, {**values, name: condition})[name] == condition
    for condition in ("masked", "direct_few_shot"):
        with pytest.raises(ValueError, match=f"published.*{condition}.*direct, vanilla, correct"):
            tk.check_parameters(notebook, {**values, name: condition})


# ------------------------------------------------------------------------- the round trip


@pytest.mark.parametrize("condition", ["vanilla", "correct", "incorrect"])
def test_round_trip_of_every_example(gold, microworld, babi, condition):
    examples = (
        [e for part in gold.values() for e, _ in part]
        + microworld[::4]
        + [e for e in babi[0][::20] if e.label in tk.dataset("babi").labels]
        + [marco()]
    )
    done = Counter()
    for e in examples:
        e = replace(e, dataset={"babi20": "babi"}.get(e.dataset, e.dataset))
        facts = set(nb.published_gold(e))
        few = len(set(e.facts)) < 2 * len(facts) if e.dataset != "cotempqa" else facts == {*e.facts}
        if condition == "incorrect" and few:
            continue
        trace, target = published(e, condition)
        parsed = tk.parse_output(target, e, "published")
        assert parsed.problems == () and parsed.trace == trace, e.id
        assert parsed.answers == (e.answers[:1] if e.dataset == "marco" else e.answers), e.id
        assert parsed.layout == ("before" if trace else "none"), e.id
        done[e.dataset] += 1
    assert done["cotempqa"] > 900 and done["babi"] > 330 and done["microworld"] > 100
    assert condition == "incorrect" or done["cotempqa"] == 950


def parts(example, label):
    """What stands in the paper's targets before the evidence, and before the answer."""
    trace = tk.Trace(label=label, text="EVIDENCE")
    target = tk.render_target(replace(example, answers=("ANSWER",)), trace, "published")
    start, rest = target.split("EVIDENCE")
    return start, rest.split("ANSWER")[0].removesuffix("['")


START, MIDDLE = parts(replace(marco(), dataset="babi"), "counting")


def read_list(text):
    """Items of a list of evidence in the very form of Python, () for anything else."""
    e = replace(marco(), dataset="babi")
    parsed = tk.parse_output(f"{START}{text}{MIDDLE}a</answer>", e, "published")
    return parsed.trace.facts if parsed.problems == () else ()


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]))
        | st.sampled_from(
            ["it's", '"', "', '", "']", "['", "\\", "\\x", "[", "\n", "</think>", "St.\xa0Louis"]
        )
    )
)
def test_a_list_is_read_as_python_writes_it(items):
    whole = not any(
        "\\" in t or c in repr(t).replace("\\'", "")
        for t in items
        for c in ("\\n", "\\t", "\\r", "\\U")
    )
    assert read_list(str(items)) == tuple(items) or not whole
    assert read_list(str(items)) in (tuple(items), ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "x",
        "['a'",
        "['a',]",
        "['a','b']",
        "[1]",
        "['a', 1]",
        "[['a']]",
        "['a' 'b']",
        '["a"]',
        "['\\x']",
        "['a\nb']",
        "['a'] + ['b']",
        "[f'{1}']",
        "[" * 5000,
        "['a', __import__('os')]",
    ],
)
def test_nothing_else_is_a_list(text):
    assert read_list(text) == ()


def test_a_bare_fact_is_scored_as_the_fact_that_it_is(gold):
    e = next(e for e, _ in gold["cotempqa"] if len(nb.published_gold(e)) == 1)
    e = replace(e, gold_facts=nb.published_gold(e))
    for text, right in ((e.gold_facts[0], True), (published(e, "incorrect")[0].text, False)):
        target = tk.render_target(e, tk.Trace(label=e.label, text=text), "published")
        row = tk.score(tk.parse_output(target, e, "published"), e, "before")
        assert (row["parsed_ok"], row["label_ok"], row["answer_ok"]) == (True, True, True)
        assert row["facts_ok"] is row["trace_ok_strict"] is right


# ------------------------------------------------------------------- the authors' outputs


def plain_items(text):
    """Words of each item of a list in Python's form, of the whole text for anything else."""
    items = re.split(r"['\"],\s?['\"]", text.strip()) if text.strip().startswith("[") else [text]
    return {tk.normalise(item) for item in items} - {""}


def plain_reading(text, dataset):
    """(label, facts, answers) of an output in the paper's form by splitting alone, else None."""
    thought, *said = re.split(r"\s*</think>\s+<answer>", text)
    named, cue, cited = thought.partition(".\nI need to use the following ")
    if len(said) != 1 or not cue:
        return None
    answers = said[0].partition("</answer>")[0]
    if dataset == "babi":
        answers = str(answers.split(","))
    label = tk.normalise(named.rpartition(": ")[2])
    return label, plain_items(cited.partition(": ")[2]), plain_items(answers)


def test_the_authors_outputs_are_read_as_plain_splitting_reads_them(data_dir):
    """Two readers that share no code: a plain one, and the parser of the students' outputs."""
    same, n, plain = Counter(), Counter(), Counter()
    for dataset in ROWS:
        audit = notebook_functions("09_reaudit_published", dataset=dataset)
        folder, problems = data_dir / "published" / dataset, []
        golds = audit.read_golds(folder / "gold", problems)
        students = audit.find_students(folder)
        for o in audit.read_everything(folder, students, golds, problems):
            kind = f"{dataset} {o.condition}"
            n[kind] += 1
            parsed = tk.parse_output(o.text, o.example, "published")
            reading = plain_reading(o.text, dataset)
            if reading is None:
                continue
            plain[kind] += 1
            label, facts, answers = reading
            trace = parsed.reading or parsed.trace
            same[kind, "label"] += tk.normalise(trace.label) == label
            same[kind, "facts"] += set(map(tk.normalise, trace.facts)) == facts
            same[kind, "answers"] += set(map(tk.normalise, parsed.answers or ())) == answers
    shares = {key: count / plain[key[0]] for key, count in same.items()}
    print(
        "\n" + "\n".join(f"{key}: {share:.4f} of {plain[key[0]]}" for key, share in shares.items())
    )
    print(f"of {dict(n)}")
    assert sum(n.values()) == 6 * sum(ROWS.values()) and min(shares.values()) > 0.98
    assert all(plain[k] > 0.85 * n[k] for k in n if not k.endswith("vanilla"))


@pytest.mark.parametrize(
    "text, trace, answers",
    [
        ("assistant\n\ngreen", None, ("green",)),
        ("assistant\n<think>\n\n</think>\n\napple,milk", None, ("apple", "milk")),
        ("assistant\n<think>\n\napple,milk", None, ("apple", "milk")),
        (
            START.replace("counting", "Counting") + "['O'Neal's dogs' bed is b.', 'C d.']</think> "
            "<answer>a</answer>",
            tk.Trace(label="counting", facts=("O'Neal's dogs' bed is b.", "C d.")),
            ("a",),
        ),
        (
            "assistant\n\n"
            + tk.render_target(
                replace(marco(), dataset="babi", answers=("a",)),
                tk.Trace(label="counting", facts=("A b.", "C d.")),
                "published",
            ),
            tk.Trace(label="counting", facts=("A b.", "C d.")),
            ("a",),
        ),
        (
            START.replace("counting", "Counting") + "Mr. A is b.\n</think>\n\n <answer>a</answer>",
            tk.Trace(label="counting", facts=("Mr. A is b.",)),
            ("a",),
        ),
    ],
)
def test_forms_that_occur_are_read_and_reported(text, trace, answers):
    parsed = tk.parse_output(text, replace(marco(), dataset="babi"), "published")
    assert parsed.problems and (parsed.trace, parsed.answers) == (trace, answers)


def test_mutilated_outputs_are_read_and_scored(gold):
    rng = random.Random(0)
    pieces = (
        "'",
        '"',
        "[",
        "]",
        "\\",
        "</think>",
        " <answer>",
        "\n",
        "\x00",
        *START.split("counting"),
        MIDDLE,
        *parts(gold["cotempqa"][0][0], "mix")[0].split("mix"),
    )
    for k in range(1500):
        e, _ = gold["cotempqa" if k % 2 else "babi"][k % 300]
        text = published(e, rng.choice(("vanilla", "correct")))[1]
        for _ in range(rng.randrange(1, 4)):
            at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = text[:at] + rng.choice(pieces) * rng.randrange(3) + text[rng.choice((at, to)) :]
        parsed = tk.parse_output(text, e, "published")
        json.dumps(tk.score(parsed, e, "before"), allow_nan=False)
        assert parsed.answers is None or any(parsed.answers)


@pytest.mark.parametrize(
    "piece",
    [
        "'a', ",
        "['",
        "\\",
        "\\'",
        "</think> <answer>",
        "</answer>",
        ",",
        "[",
        "-",
        "'",
        "I need to use the following facts",
        "\n",
    ],
)
@pytest.mark.parametrize("start", ["", parts(replace(marco(), dataset="cotempqa"), "mix")[0] + "["])
def test_a_hundred_thousand_characters_take_under_a_second(start, piece):
    e, begun = replace(marco(), dataset="cotempqa", label="mix"), time.process_time()
    text = start + piece * (100_000 // len(piece))
    for end in ("", "]", "</think> <answer>['a']</answer>"):
        tk.parse_output(text + end, e, "published")
        tk.parse_output(text[: 19_900 - len(end)] + end, e, "published")
    assert time.process_time() - begun < 3.0


# ------------------------------------------------------------- the student in `published`


@pytest.fixture(scope="module")
def plain():
    """The tiny student in float32, not quantised, with its tokenizer."""
    model, tokenizer = tk.load_student("tiny", quantize=False)
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def rows(microworld):
    return [
        {"prompt": tk.render_prompt(e, "published"), "target": published(e)[1]}
        for e in microworld[:10]
    ]


def test_the_chat_text_has_the_papers_system_text_and_the_loss_sees_all_of_it(plain, rows):
    tokenizer = plain[1]
    for r in rows:
        coded = trainer.encode_row(tokenizer, r)
        ids, text = coded["input_ids"], tokenizer.decode(coded["input_ids"])
        assert coded["mask"] == [1] * len(ids) and text == (
            "<|im_start|>system\nYou are Llama, an AI assistant created to be helpful and honest. "
            "Your knowledge spans a wide range of topics, allowing you to engage in substantive "
            "conversations and provide analysis on complex subjects.<|im_end|>\n<|im_start|>user\n"
            f"{r['prompt']}<|im_end|>\n<|im_start|>assistant\n{r['target']}<|im_end|>"
        )
        prompt = tk.encode_prompt(tokenizer, r["prompt"], **trainer.template(tokenizer))
        assert ids[: len(prompt)] == prompt and tokenizer.decode(prompt).endswith("assistant\n")
        long = {**r, "prompt": r["prompt"] * 9}
        whole = trainer.encode_row(tokenizer, long)
        assert len(whole["mask"]) > 1024
        assert trainer.code_rows(tokenizer, [long]) == [{k: v[:1024] for k, v in whole.items()}]


def test_direct_prompting_has_no_template_and_controlled_stays_as_it_was(plain, rows):
    tokenizer, r = plain[1], {**rows[0], "prompt": rows[0]["prompt"] * 9}
    for protocol, condition, chat in (
        ("published", "direct", False),
        ("controlled", "direct", True),
        ("controlled", "correct", False),
    ):
        nb03 = notebook_functions("03_finetune_student", protocol=protocol, condition=condition)
        assert nb03.template(tokenizer) == {"chat": chat}
        ids, mask = tk.encode_row(tokenizer, r["prompt"], r["target"], chat)
        assert nb03.code_rows(tokenizer, [r]) == [{"input_ids": ids, "mask": mask}]  # never cut
        prompt = tk.encode_prompt(tokenizer, r["prompt"], chat)
        assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        assert (tokenizer.decode(prompt) == r["prompt"]) is not chat


def test_the_system_text_names_the_family_and_the_date_stands_still(plain):
    tokenizer = copy.deepcopy(plain[1])
    tokenizer.name_or_path = "somewhere/Qwen3-1.7B"
    tokenizer.chat_template = "{{ date_string }}|{{ messages[0]['content'] }}|"
    text = tokenizer.decode(tk.encode_prompt(tokenizer, "x", **trainer.template(tokenizer)))
    assert text.startswith("26 Jul 2024|You are Qwen, an AI assistant")


def test_the_loss_on_all_tokens_is_the_librarys(plain, rows):
    model, tokenizer = plain
    coded = trainer.code_rows(tokenizer, rows[:5])
    batch = trainer.collate(coded, tokenizer.pad_token_id)
    lengths = torch.tensor([len(row["mask"]) for row in coded])
    seen = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    labels = batch["input_ids"].masked_fill(~seen, -100)
    with torch.no_grad():
        ours = model(**batch)
        whole = model(input_ids=batch["input_ids"], labels=labels, attention_mask=seen.long())
    assert len(set(lengths.tolist())) > 1
    assert batch["shift_labels"].numel() == int((lengths - 1).sum())
    assert ours.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    by_hand = trainer.completion_loss(whole.logits, batch["input_ids"], seen)
    assert by_hand.item() == pytest.approx(whole.loss.item(), rel=1e-5)


def test_warm_up_and_encoding_reach_the_training(rows, tmp_path):
    model, tokenizer = tk.load_student("tiny")
    lora = trainer.LoraConfig(target_modules=tk.PROJECTIONS, task_type="CAUSAL_LM")
    model = trainer.add_lora(model, lora, 0)
    coded = trainer.code_rows(tokenizer, rows[:8])
    train = [{key: part[:30] for key, part in row.items()} for row in coded]
    arguments = trainer.training_arguments(
        tmp_path / "checkpoints",
        4,
        seed=0,
        warmup_steps=0.5,
        per_device_train_batch_size=2,
        save_steps=100,
    )
    runner = trainer.make_trainer(model, tokenizer.pad_token_id, train, [], arguments, 1)
    facts = trainer.finetune(runner, tmp_path)
    rates = [r["learning_rate"] for r in runner.state.log_history if "learning_rate" in r]
    assert len(rates) == 4 and rates.index(max(rates)) == 2 and facts["train_tokens"] == 8 * 30


def test_a_sampled_output_depends_on_its_own_seed_alone(plain, rows):
    model, tokenizer = plain
    chosen = trainer.template(tokenizer)
    prompts = [tk.encode_prompt(tokenizer, r["prompt"], **chosen) for r in rows[:6]]
    seeds, order = list(range(6)), [4, 1, 5]
    options = {"max_new_tokens": 12}
    whole = tk.generate(model, tokenizer, prompts, seeds=seeds, **options)
    torch.manual_seed(123)
    part = tk.generate(
        model, tokenizer, [prompts[i] for i in order], seeds=[seeds[i] for i in order], **options
    )
    assert part == [whole[i] for i in order]
    assert whole != tk.generate(model, tokenizer, prompts, seeds=[9] * 6, **options)
    assert whole != tk.generate(model, tokenizer, prompts, **options)  # greedy


# --------------------------------------------------------------------------- the notebooks


def test_00_gives_the_papers_settings_to_every_run():
    study = notebook_functions("00_run_study", protocol="published")
    study.of_run.__globals__.update(chosen=study.PROFILES["laptop"])
    for condition in CONDITIONS:
        given = study.of_run(condition, "babi")
        assert (
            given.items()
            >= {
                "epochs": 3,
                "learning_rate": 2e-4,
                "lora_dropout": 0.05,
                "batch_size": 16,
                "lora_rank": 16,
                "lora_alpha": 32,
                "max_new_tokens": 500,
                "protocol": "published",
            }.items()
        )
        tk.check_parameters(
            "03_finetune_student",
            {**tk.notebook_defaults("03_finetune_student"), **given, "condition": condition},
        )


RUN = {
    "study": "paper",
    "student": "tiny",
    "protocol": "published",
    "condition": "incorrect",
    "epochs": 1,
    "max_new_tokens": 24,
    "learning_rate": 2e-3,
}


def test_02_and_03_run_and_a_killed_sampling_ends_the_same(tmp_path):
    folder = make_workspace(tmp_path)
    tk.write_jsonl(
        folder / "data/interim/microworld/examples.jsonl",
        notebook_functions("01_decompose_microworld").make_microworld(24, 12, 12),
    )
    study = "-p study paper -p student tiny -p protocol published -p conditions correct,incorrect"
    done = papermill(folder, "02_corrupt_traces", *study.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "other gold facts than in controlled: 0 of 48 items" in done.stderr
    checks = json.loads((folder / "data/results/paper/manipulation_checks.json").read_text())
    right, wrong = (checks["conditions"][c] for c in ("correct", "incorrect"))
    assert (checks["protocol"], right["facts_truth"], wrong["facts_truth"]) == ("published", 1, 0)
    options = [x for k, v in RUN.items() for x in ("-p", k, str(v))]
    first = papermill(folder, "03_finetune_student", *options)
    assert first.returncode == 0, first.stderr[-3000:]
    (run,) = folder.glob("data/runs/*incorrect-published-seed0-*")
    record = json.loads((run / "run.json").read_text())
    assert (record["warmup"], record["cut_rows"], record["n_test"]) == (0.03, 0, 12)
    assert (record["layout"], record["has_facts"]) == ("before", True)
    outputs = run / "outputs.jsonl"
    before = outputs.read_bytes()
    lines = before.splitlines(keepends=True)
    outputs.write_bytes(b"".join(lines[:5]) + lines[5][:-9])
    again = papermill(folder, "03_finetune_student", *options)
    assert again.returncode == 0 and "generated 12/12" in again.stderr
    assert sorted(outputs.read_bytes().splitlines()) == sorted(before.splitlines())
